"""CUDA's rules for devices (`pretended.py`): kept in bfloat16, and broken by mistakes of five kinds."""
import pytest
import torch
from conftest import ALL_METHODS, small
from pretended import GPU, Rules, pretend
from test_own_data import align, write

import figures
import sample
import train


@pytest.fixture
def rules(monkeypatch):
    pretend(monkeypatch)
    with Rules() as mode:
        yield mode


def test_exo_keeps_them_and_waits_once_a_step(rules, tmp_path, monkeypatch):
    waits = []

    def noted(function):
        return lambda *arguments: waits.append(rules.waits) or function(*arguments)
    for name in ("micro_batches", "update"):                         # the one wait is in `update`
        monkeypatch.setattr(train, name, noted(getattr(train, name)))
    ended = small(tmp_path / "run")
    assert ended.code == 0 and "bfloat16 products" in ended.out, ended.err
    assert len(waits) == 12 and waits[::2] == waits[1::2]


@pytest.mark.slow
def test_all_methods_figures_samples_and_own_data_keep_them(rules, tmp_path):
    file = write(tmp_path / "prefs.jsonl", 60, "scored")
    for ended in (small(tmp_path / "run", *ALL_METHODS, draw=figures.draw),
                  align(tmp_path / "own", file, "--method", "all")):
        assert ended.code == 0, ended.err
    sample.main([str(tmp_path / "run"), "--prompt", "Last night"])


MISTAKES = [
    ("model.move", lambda device, *rows: rows, "embedding.default mixes"),                 # rows on the CPU
    ("compute.move", lambda device, *numbers: numbers, "stack.default mixes"),             # numbers there
    ("stages.token_logprob", lambda gpt, ids, mask: gpt.hidden(ids) * torch.ones(gpt.config.n_embd), "mul"),
    ("stages.micro_batches", lambda index, size: [index.to(GPU)], "numpy"),                # from the GPU
    ("stages.batch_by_length", lambda step, n, length, *key: torch.rand(
        n, device=GPU, generator=torch.Generator()), "generator")]


@pytest.mark.parametrize("where, mistake, sentence", MISTAKES)
def test_mistakes_of_five_kinds_do_not_pass(rules, tmp_path, monkeypatch, where, mistake, sentence):
    monkeypatch.setattr(where, mistake)
    with pytest.raises(AssertionError, match=sentence):
        small(tmp_path / "run")
