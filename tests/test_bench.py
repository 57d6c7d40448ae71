"""Statements about bench.py: every entrant does the same work, they take turns, and what the README says of speed and memory."""
import csv
import importlib.util
import math
import multiprocessing.dummy
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import median

import pytest
import torch

import bench
from exo import exo_pref_loss

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parent.parent
TOY = bench.Case(n_layer=2, n_head=2, n_embd=16, V=31, device="cpu", prompts=3, K=2, start=4, T=12, product=32)
TINY = bench.Case(n_layer=4, n_head=4, n_embd=128, V=50257, device="cpu")


def run(*arguments):
    command = [sys.executable, "bench.py", "--device", "cpu", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT)


def read(path):
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def in_threads(entrants, settings=("highest",), rounds=1):
    return bench.interleave(entrants, settings, rounds, context=multiprocessing.dummy)


# ---- one command -----------------------------------------------------------------------------------------------------------

def test_quick_leaves_a_row_for_every_entrant_installed_or_not(tmp_path):
    done = run("--quick", "--out", tmp_path / "a folder with spaces")
    assert done.returncode == 0, done.stderr
    rows = read(tmp_path / "a folder with spaces" / "bench.csv")
    for what, entrants in (("EXO step", bench.EXO), ("language-model step", bench.LANGUAGE_MODEL), ("sampling", bench.SAMPLING)):
        for who in entrants:
            found = [row for row in rows if (row["what"], row["who"]) == (what, who)]
            if importlib.util.find_spec(bench.NEEDS.get(who, "torch")) is None:
                assert [row["note"] for row in found] == ["not installed"]
                assert f"{who:27}  not installed" in done.stdout
            else:
                assert [row["setting"] for row in found] == ["highest", "medium"]
                assert all(float(row[k]) > 0 for k in ("seconds", "mfu", "peak_mib", "time_ratio") for row in found)
    scaling = read(tmp_path / "a folder with spaces" / "scaling.csv")
    assert [row["size"] for row in scaling] == ["K", "K", "tokens", "tokens", "parameters", "parameters"]
    assert (tmp_path / "a folder with spaces" / "scaling.png").read_bytes()[:4] == b"\x89PNG"


def test_an_out_that_cannot_be_a_folder_is_one_sentence(tmp_path):
    (tmp_path / "file").write_text("")
    done = run("--quick", "--out", tmp_path / "file")
    assert done.returncode == 1 and done.stderr.startswith("bench.py: cannot write into") and done.stderr.count("\n") == 1


# ---- the same work ---------------------------------------------------------------------------------------------------------

def first_step(monkeypatch, gpt, work):
    """The first step of an entrant on the weights of `gpt`: its mean loss and gradients."""
    seen = {}

    def descend(optimizer, lr, index, rows, loss_sum, where):
        stats, n = loss_sum(index)
        gpt.zero_grad()
        (stats["loss"] / n).backward()
        seen.update(loss=stats["loss"].detach() / n, gradients=[p.grad.clone() for p in gpt.parameters()])

    monkeypatch.setattr(bench, "descend", descend)
    monkeypatch.setattr(bench, "random_gpt", lambda case: gpt)
    torch.manual_seed(0)
    work(TOY, iter(range(1)))
    return seen


@pytest.mark.parametrize("ours, theirs", [
    (bench.exo, bench.exo_full), (bench.exo_rewards, partial(bench.exo_full, rewards=True)),
    (bench.language_model, bench.language_model_full)], ids=["pairs", "rewards", "language model"])
def test_all_logits_at_once_have_our_loss_and_gradients(monkeypatch, ours, theirs):
    torch.manual_seed(1)
    gpt = bench.random_gpt(TOY)
    for parameter in gpt.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    a, b = (first_step(monkeypatch, gpt, work) for work in (ours, theirs))
    torch.testing.assert_close(a["loss"], b["loss"], rtol=1e-5, atol=1e-5)
    for x, y in zip(a["gradients"], b["gradients"]):
        torch.testing.assert_close(x, y, rtol=1e-3, atol=1e-5)
        assert x.abs().max() > 0


def test_trl_steps_on_the_same_rows_and_starts_at_the_same_loss(monkeypatch):
    trl = pytest.importorskip("trl")
    seen, theirs = [], trl.DPOTrainer.compute_loss

    def compute_loss(self, model, inputs, *rest, **more):
        loss = theirs(self, model, inputs, *rest, **more)
        seen.append((tuple(inputs["input_ids"].shape), int(inputs["completion_mask"].sum()), float(loss.detach())))
        return loss

    monkeypatch.setattr(trl.DPOTrainer, "compute_loss", compute_loss)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")

    for work in (bench.trl, bench.trl_precomputed):
        work(TOY, iter(range(2)))
    shape, responses = (TOY.N, TOY.T), TOY.N * (TOY.T - TOY.start)
    start = float(exo_pref_loss(torch.zeros(1, 2), torch.zeros(1, 2), eps=bench.EPS))
    assert [s[:2] for s in seen] == 4 * [(shape, responses)]
    assert math.isclose(seen[0][2], start, rel_tol=1e-5) and math.isclose(seen[2][2], start, rel_tol=1e-5)


def test_flops_of_a_small_model_by_hand():
    case = replace(TOY, n_layer=1, n_embd=2, V=5, prompts=1, T=4, start=3)                  # two rows, one response token each
    weights, attention, head = 12 * 2 * 2, 4 * 2, 5 * 2
    read = 3 * (weights + attention)                                                        # the last token is only predicted
    assert bench.work_of("EXO step", case) == (2 * 4, 3 * 2 * 2 * (read + head))
    assert bench.work_of("language-model step", case) == (2 * 4, 3 * 2 * 2 * (read + 3 * head))
    assert bench.work_of("sampling", case) == (2 * 1, 2 * 2 * (read + head))


# ---- turns -----------------------------------------------------------------------------------------------------------------

ORDER = []


def entry(case, turns, name):
    for _ in turns:
        ORDER.append((name, torch.get_float32_matmul_precision()))


def test_entrants_take_turns_and_the_first_one_does_not_count():
    ORDER.clear()
    found = in_threads({name: (partial(entry, name=name), TOY) for name in "ab"}, ("highest", "medium"), rounds=2)
    torch.set_float32_matmul_precision("highest")
    once = [(name, setting) for name in "ab" for setting in ("highest", "medium")]
    assert ORDER == [("a", "highest"), ("b", "highest"), *once, *once]
    assert [len(found["b"][0][setting]) for setting in ("highest", "medium")] == [2, 2]


def broken(case, turns):
    next(turns)
    raise RuntimeError("not this version\nand a traceback")


def test_an_entrant_that_fails_is_a_sentence_and_the_others_go_on(monkeypatch):
    monkeypatch.setitem(bench.NEEDS, "absent", "a_package_that_is_not_there")
    found = in_threads({"broken": (broken, TOY), "absent": (bench.exo, TOY), "whole": (bench.exo, TOY)})
    assert found["broken"] == "RuntimeError: not this version" and found["absent"] == "not installed"
    assert len(found["whole"][0]["highest"]) == 1


# ---- speed and memory: ratios in one run, with room for a busy machine -----------------------------------------------------

def measured(entrants, rounds=3):
    """-> {name: median CPU seconds}, {name: peak MiB}, each entrant in a process of its own"""
    found = bench.interleave(entrants, ["highest"], rounds)
    assert not any(isinstance(result, str) for result in found.values()), found
    return {n: median(r[0]["highest"]) for n, r in found.items()}, {n: r[2] for n, r in found.items()}


@pytest.mark.slow
def test_a_step_takes_a_fraction_of_the_time_and_memory_of_one_with_all_logits():
    seconds, peak = measured({"ours": (bench.exo, TINY), "all": (bench.exo_full, TINY)}, rounds=2)
    assert seconds["ours"] <= 0.75 * seconds["all"], seconds
    assert peak["ours"] <= 0.5 * peak["all"], peak


@pytest.mark.slow
def test_a_cache_makes_sampling_ten_times_as_fast():
    case = replace(TINY, V=512, K=1)
    seconds, _ = measured({"ours": (bench.sampling, replace(case, prompts=256)),
                           "uncached": (bench.sampling_uncached, replace(case, prompts=16))}, rounds=1)
    assert seconds["uncached"] / 16 >= 10 * seconds["ours"] / 256, seconds


@pytest.mark.slow
def test_a_sequence_costs_the_same_whatever_K_is():
    seconds, _ = measured({K: (bench.exo_rewards, replace(TINY, V=512, K=K)) for K in (2, 16)})
    assert abs(seconds[16] / 16 / (seconds[2] / 2) - 1) <= 0.25, seconds
