"""The tiny experiment with its default settings: what it reaches, and that nothing in it passes the limit."""
import csv
import math
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import data
from checkpoint import read_json, read_tensors
from evaluate import gap_to_limit, limit_at, read_csv
from model import ScalarGPT

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parent.parent


def command(folder, *arguments):
    """`python train.py` on the tiny preset.  -> the memory in bytes that it has taken at most"""
    line = [sys.executable, "train.py", "--preset", "tiny", "--device", "cpu", "--run", folder, *arguments]
    process = subprocess.Popen(line, cwd=ROOT)
    _, status, usage = os.wait4(process.pid, 0)
    assert status == 0
    return usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """EXO in rounds by a fifth of the steps, then the README's first command.  -> folder, memory, limit

    In this order the limit is drawn once, with the reward model's rewards.
    """
    folder = tmp_path_factory.mktemp("tiny") / "run"
    in_rounds = ["--feedback", "reward", "--rounds", "4", "--align-steps", "80", "--align-lr", "2e-4"]
    peaks = [command(folder, "--method", "exo", *in_rounds, "--align-prompts", "1024"),
             command(folder, "--method", "exo")]
    sampled, _ = read_tensors(next(folder.glob("limit-*-reward-model/rewards.safetensors")))
    return SimpleNamespace(folder=folder, peak=max(peaks), limit=sampled["reward"].numpy())


@pytest.fixture
def aligned(tiny):
    """EXO from pairs: pi_sft's row of eval.csv, those of its 8 checkpoints, their samples by folder name."""
    folder = tiny.folder / "exo-preferences-s0"
    start, *rows = read_csv(folder / "eval.csv")
    files = sorted(folder.glob("samples/*.safetensors"))
    samples = {file.stem: read_tensors(file)[0] for file in files}
    assert start["step"] == 0 and len(rows) == len(samples) == 8
    return SimpleNamespace(folder=folder, start=start, rows=rows, samples=samples)


# ---- what is reached ----------------------------------------------------------------------------------

def test_the_oracle_tracks_the_known_log_odds_of_reviews_that_nobody_has_seen(tiny):
    texts, _, log_odds = data.tiny_reviews(2000, "fresh")
    for n, seed in ((60_000, "train"), (4_000, "test")):
        assert not set(texts) & set(data.tiny_reviews(n, seed)[0])
    encoding = data.tiny_encoding()
    reviews = [np.array(ids) for ids in encoding.encode_ordinary_batch(texts)]
    ids, mask = data.rows(reviews, 6, 72, encoding.eot_token)
    oracle = ScalarGPT.from_pretrained(tiny.folder / "oracle", encoding.eot_token)
    with torch.no_grad():
        reward = torch.cat([oracle(*part) for part in zip(ids.split(100), mask.split(100))]).numpy()
    assert np.corrcoef(reward, log_odds)[0, 1] ** 2 >= 0.85
    slope, offset = np.polyfit(log_odds, reward, 1)                  # and not only up to a scale
    assert 0.7 < slope < 1.2 and abs(offset) < 0.4


def test_the_reward_rises_by_one_and_a_half_log_odds_within_four_nats(aligned):
    assert aligned.rows[-1]["reward"] - aligned.start["reward"] >= 1.5
    assert 0 < aligned.rows[-1]["kl"] <= 4


def test_the_published_reward_is_met_within_its_spread(tiny, aligned):
    """In the oracle's standard deviations: another machine trains another oracle, of another scale."""
    results = ROOT / "results" / "tiny"
    sd = read_json(tiny.folder / "oracle" / "report.json")["test_log_odds_sd"]
    published_sd = read_json(results / "report-oracle.json")["test_log_odds_sd"]
    files = sorted(results.glob(f"eval-{aligned.folder.name.removesuffix('0')}?.csv"))
    published = [read_csv(file)[-1] for file in files]
    rewards = [row["reward"] / published_sd for row in published]
    spread = max(rewards) - min(rewards) + 4 * published[0]["reward_se"] / published_sd
    assert len(rewards) == 5 and abs(aligned.rows[-1]["reward"] / sd - np.mean(rewards)) <= spread


def test_the_table_tells_the_gain_in_the_objective(tiny):
    """J = E r - beta KL at beta = .5, in a share of pi*'s; from rewards also of the reward model's pi*."""
    with open(tiny.folder / "table.csv", newline="") as file:
        rows = {row["run"]: row for row in csv.DictReader(file)}
    pairs, rounds = rows["exo-preferences-s0"], rows["exo-reward-k4-rounds4-prompts1024-s0"]
    start = read_csv(tiny.folder / "exo-preferences-s0" / "eval.csv")[0]["reward"]
    best, best_kl, _, _ = limit_at(tiny.limit, 0.5)
    best_gain = (best - 0.5 * best_kl).mean() - tiny.limit.mean()
    for row, least in ((pairs, 0.4), (rounds, 0.4)):
        gain = float(row["reward"]) - 0.5 * float(row["kl"]) - start
        assert least <= float(row["objective_share"]) <= 1
        assert float(row["objective_share"]) == pytest.approx(gain / best_gain, abs=1e-3)
        assert float(row["kl_ratio"]) > 1
    assert pairs["model_share"] == ""
    assert float(rounds["model_share"]) > float(rounds["objective_share"])     # the model's pi* gains less
    for folder in (row["run"] for row in (pairs, rounds)):
        for row in read_csv(tiny.folder / folder / "eval.csv"):
            assert 0 <= row["faulty"] < 0.1 and -1 < row["log_mean_ratio"] < 0.1


def test_responses_stay_as_varied_and_end_as_often_as_those_of_pi_sft(aligned):
    assert aligned.rows[-1]["distinct2"] >= 0.7 * aligned.start["distinct2"]
    assert abs(aligned.rows[-1]["ended"] - aligned.start["ended"]) <= 0.1 and aligned.start["ended"] > 0.9


def test_a_row_of_eval_csv_is_the_summary_of_the_saved_samples(aligned):
    for row, (name, samples) in zip(aligned.rows, aligned.samples.items()):
        assert name == f"step-{int(row['step']):05d}" and samples["reward"].shape == (256, 4)
        assert row["reward"] == pytest.approx(float(samples["reward"].mean()), abs=1e-4)
        assert row["kl"] == pytest.approx(float(samples["kl"].mean()), abs=1e-4)
    assert read_json(aligned.folder / "stage.json")["done"]["final"] == name


def test_both_kl_estimators_agree(aligned):
    for name, samples in aligned.samples.items():
        difference = (samples["kl"] - samples["k1"]).mean(1)         # (P,): a prompt's samples go together
        assert abs(difference.mean()) <= 4 * difference.std() / math.sqrt(len(difference)), name
        assert samples["kl"].min() >= -1e-4 and samples["kl"].var() < samples["k1"].var()


def test_two_gigabytes_are_enough(tiny):
    assert tiny.peak < 2e9


# ---- nothing passes the limit -------------------------------------------------------------------------

def gap(tiny, samples, kl):
    """-> the gap to the limit on its prompts, and whether it is not negative beyond chance and bias"""
    n = len(tiny.limit)
    to_limit = gap_to_limit(tiny.limit, samples["reward"][:n].mean(1).numpy(), kl[:n].mean(1).numpy())
    return to_limit, to_limit["gap"] >= -4 * to_limit["se"] - to_limit["bias"]


def test_no_checkpoint_beats_the_limit(tiny, aligned):
    supported = 0
    for name, samples in aligned.samples.items():
        for estimator in ("kl", "k1"):
            to_limit, holds = gap(tiny, samples, samples[estimator])
            supported += to_limit["supported"]                       # where the curve is drawn
            assert holds, name
    assert supported >= 6


def test_a_kl_per_token_would_be_caught(tiny, aligned):
    for name, samples in list(aligned.samples.items())[4:]:            # from the middle of the training on
        assert not gap(tiny, samples, samples["kl"] / samples["mask"].sum(2))[1], name
