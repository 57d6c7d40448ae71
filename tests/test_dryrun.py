"""`python train.py --dry-run`: what it says of memory is what a process takes, and it does nothing else."""
import os
import sys
from dataclasses import replace

import pytest
import torch
from conftest import run_train

import dryrun
import train
from bench import clock, entrants
from compute import rng
from evaluate import measure
from model import GPTConfig
from settings import Config, parse

CASE = entrants.Case("", 8, 4, 256, 512, torch.device("cpu"), bf16=False, N=64, T=96)


def nothing(case, turns):
    entrants.random_gpt(replace(case, n_layer=1, n_embd=16))


def training(case, turns):
    entrants.exo_step(case, [1])


def sampling(case, turns):
    policy = entrants.random_gpt(case)
    prompts = entrants.random_rows(case)[:, :entrants.PROMPT].tolist()
    measure(policy, policy, lambda ids, mask: mask.sum(1), prompts, 1, 86, 1.0, None, rng("x"), case.N)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="resident memory is read from /proc")
def test_memory_is_what_a_training_and_a_sampling_process_take(monkeypatch):
    monkeypatch.setenv("MALLOC_MMAP_THRESHOLD_", "1000000")          # what is freed goes back at once
    cfg, config = Config(prompt_tokens=10, new_tokens=86), GPTConfig(8, 4, 256, 512, 96)
    _, base = clock.measure(nothing, CASE)
    for work, stage, most in ((training, dryrun.Stage("", 1, CASE.N, trained=1), -2),
                              (sampling, dryrun.Stage("", sampled=CASE.N, fixed=1), -1)):
        _, peak = clock.measure(work, CASE)
        estimate = dryrun.memory(cfg, config, stage, cuda=False)[most]
        assert (peak - base) * 2 ** 20 / 1e9 == pytest.approx(estimate, rel=0.15)    # seen: -7%, +6%
    assert dryrun.parameters(config) == sum(p.numel() for p in entrants.random_gpt(CASE).parameters())


def test_the_imdb_preset_fits_24_gb_and_its_stages_are_told_without_a_download(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    ended = run_train("--preset", "imdb", "--method", "all", "--device", "cuda", "--dry-run")
    assert ended.code == 0 and os.listdir(tmp_path) == []
    lines = ended.out.splitlines()
    assert "a GPU of 24 GB: enough" in lines
    rows = {line.split()[0]: line.split()[1:] for line in lines[3:-4]}
    cfg, _ = parse(["--preset", "imdb", "--method", "all"])
    names = [train.name_of(cfg, *one, 0).removesuffix("-s0") for one in train.plan(cfg)]
    assert list(rows) == ["sft", "oracle", "responses", "reward_model", *names, "limit"]
    assert rows["sft"][:2] == ["977", f"{977 * 128 * 512 / 1e6:.2f}"]
    assert rows["responses"][2] == f"{25_000 * 8 * 512 / 1e6:.2f}"


def test_the_rest_of_a_run_is_all_that_follows_sft_for_every_seed():
    cfg, _ = parse(["--preset", "tiny", "--method", "all"])
    one, three = (dryrun.rest(cfg, n * train.plan(cfg)) for n in (1, 3))
    T, config = 72, dryrun.shape(cfg)
    sft, *others = [dryrun.operations(config, stage, T) for stage in dryrun.stages(cfg, train.plan(cfg))]
    alignments = sum(others[3:-1]) / sft                             # after oracle, responses, reward model
    assert one == pytest.approx(sum(others) / sft) and three - one == pytest.approx(2 * alignments)


def test_flags_that_fit_are_named_for_less_memory():
    cfg, _ = parse(["--preset", "imdb"])
    config, found = dryrun.shape(cfg), list(dryrun.stages(cfg, train.plan(cfg)))
    words = dryrun.fitting(cfg, config, found, True, room=9)
    assert words.startswith("enough with --micro-batch-size ")
    named, _ = parse(["--preset", "imdb", *words.split()[2:]])
    assert max(dryrun.memory(named, config, stage, True)[-2] for stage in found) <= 9
    assert dryrun.fitting(named, config, found, True, room=9) == "enough"
    assert "too little" in dryrun.fitting(cfg, config, found, True, room=1)


def test_operations_of_a_step_are_six_a_parameter_and_token_and_the_logits_again():
    config = GPTConfig(12, 12, 768, 50257, 1024)
    step = dryrun.operations(config, dryrun.Stage("sft", 1, 1, trained=1), T=64)
    matrices = 12 * 12 * 768 ** 2 + 8 / 6 * 768 * 50257
    assert step == pytest.approx(6 * matrices * 64, rel=0.01)
