"""Statements about bench/: everyone does the same work, and what the README says of speed and memory."""
import csv
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch

from bench import entrants
from bench.entrants import Case, measure
from model import GPT

TOY = Case("toy", 2, 2, 16, 31, N=6, T=14)


@pytest.fixture
def two_steps(monkeypatch):
    """work -> its losses and gradient norms (2, 2); the second step depends on the first one's update"""
    means = []
    update = entrants.update
    monkeypatch.setattr(entrants, "update", lambda *args: means.append(update(*args)))
    monkeypatch.setattr(entrants, "LR", 1e-2)

    def run(work):
        means.clear()
        torch.manual_seed(0)
        work(TOY, iter(range(2)))
        return torch.tensor([[mean["loss"], mean["grad_norm"]] for mean in means])
    return run


@pytest.mark.parametrize("precompute", [False, True])
def test_trl_has_our_loss_and_gradient(two_steps, monkeypatch, tmp_path, precompute):
    trl = pytest.importorskip("trl")
    from transformers import GPT2LMHeadModel
    theirs = []
    compute_loss = trl.DPOTrainer.compute_loss

    def recorded(self, model, *args, **kwargs):
        loss = compute_loss(self, model, *args, **kwargs)
        gradients = torch.autograd.grad(loss, list(model.parameters()), retain_graph=True)
        theirs.append([loss.item(), torch.nn.utils.get_total_norm(gradients).item()])
        return loss

    def with_our_weights(case):
        GPT(case.config).save_pretrained(tmp_path)
        return GPT2LMHeadModel.from_pretrained(tmp_path)

    monkeypatch.setattr(trl.DPOTrainer, "compute_loss", recorded)
    monkeypatch.setattr(entrants, "transformers_gpt", with_our_weights)
    two_steps(partial(entrants.trl_step, precompute=precompute))
    torch.testing.assert_close(two_steps(entrants.exo_step), torch.tensor(theirs), rtol=1e-3, atol=0)


@pytest.mark.slow
def test_one_command_leaves_a_row_for_everyone_installed_or_not(tmp_path):
    command = [sys.executable, "-m", "bench", "--size", "toy", "--out", tmp_path / "a folder"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parent.parent)
    assert done.returncode == 0, done.stderr
    rows = list(csv.DictReader((tmp_path / "a folder" / "bench.csv").read_text().splitlines()))
    assert [row["who"] for row in rows] == [*entrants.EXO, *entrants.SAMPLING]
    for row in rows:
        assert row["note"].startswith("ModuleNotFoundError") or float(row["time_ratio"]) > 0


@pytest.mark.slow
def test_half_of_the_time_and_memory_of_trl_at_gpt2s_vocabulary():
    pytest.importorskip("trl")
    large = Case("tiny", 4, 4, 128, 50257)
    ours, peak = measure(entrants.exo_step, large)
    theirs, their_peak = measure(entrants.EXO["TRL, precomputed reference"], large)
    assert min(ours) <= 0.5 * min(theirs) and peak <= 0.5 * their_peak
