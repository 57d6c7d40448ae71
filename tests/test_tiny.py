"""The tiny experiment with its default settings: what it reaches, and that nothing in it passes the limit."""
import csv
import math
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import gap_to_limit

import data
import stages
from evaluate import limit_curve, optimum
from loop import read_csv, read_tensors

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """The README's first command.  -> folder, the limit's rewards, eval.csv"""
    folder = tmp_path_factory.mktemp("tiny") / "run"
    line = [sys.executable, "train.py", "--preset", "tiny", "--device", "cpu", "--run", folder]
    subprocess.run([*line, "--method", "exo"], cwd=ROOT, check=True)
    sampled = read_tensors(folder / "limit" / "rewards.safetensors")
    start, *rows = read_csv(folder / "exo-s0" / "eval.csv")
    assert start["step"] == 0 and len(rows) == 8
    limit = sampled["reward"].numpy()                                # (P, M)
    return SimpleNamespace(folder=folder, limit=limit, start=start, rows=rows)


# ---- what is reached ----------------------------------------------------------------------------------

def test_the_oracle_tracks_the_known_log_odds_of_reviews_that_nobody_has_seen(tiny):
    texts, _, log_odds = data.tiny_reviews(2000, "fresh")
    assert not set(texts) & set(data.tiny_reviews(60_000, "train")[0] + data.tiny_reviews(4_000, "test")[0])
    run = stages.open_run(tiny.folder)
    reviews = [np.array(ids) for ids in run.encoding.encode_ordinary_batch(texts)]
    ids, mask = data.padded_rows(reviews, 6, 72, run.eos_id)
    oracle = stages.reward_function(run, tiny.folder / "oracle")
    with torch.no_grad():
        reward = torch.cat([oracle(*part) for part in zip(ids.split(100), mask.split(100))]).numpy()
    assert np.corrcoef(reward, log_odds)[0, 1] ** 2 >= 0.85
    slope, offset = np.polyfit(log_odds, reward, 1)                  # and not only up to a scale
    assert 0.7 < slope < 1.2 and abs(offset) < 0.4


def test_the_reward_rises_by_one_and_a_half_log_odds_within_four_nats(tiny):
    assert tiny.rows[-1]["reward"] - tiny.start["reward"] >= 1.5
    assert 0 < tiny.rows[-1]["kl"] <= 4


def test_the_path_goes_out_and_does_not_come_back(tiny):
    """With Adam's usual epsilon one checkpoint of 8 could lie at three times the last one's KL, or more."""
    assert max(row["kl"] for row in tiny.rows) <= 1.5 * tiny.rows[-1]["kl"]


def test_the_table_tells_the_gain_in_the_objective(tiny):
    """J = E r - beta KL at beta = .5, as a share of pi*'s."""
    with open(tiny.folder / "table.csv", newline="") as file:
        (row,) = csv.DictReader(file)
    best, best_kl, _, _ = optimum(tiny.limit, 0.5)
    best_gain = (best - 0.5 * best_kl).mean() - tiny.limit.mean()
    gain = float(row["reward"]) - 0.5 * float(row["kl"]) - tiny.start["reward"]
    assert 0.2 <= float(row["objective_share"]) <= 1
    assert float(row["objective_share"]) == pytest.approx(gain / best_gain, abs=1e-3)
    assert float(row["kl_ratio"]) > 1


def test_responses_end_as_often_as_those_of_pi_sft_and_few_sentences_are_faulty(tiny):
    assert abs(tiny.rows[-1]["ended"] - tiny.start["ended"]) <= 0.1 and tiny.start["ended"] > 0.9
    assert tiny.start["faulty"] < 0.03 and tiny.rows[-1]["faulty"] < 0.15


def test_the_last_row_of_eval_csv_is_the_summary_of_the_saved_samples_and_both_kl_estimators_agree(tiny):
    samples = read_tensors(tiny.folder / "exo-s0" / "samples.safetensors")
    assert samples["reward"].shape == (256, 4)
    assert tiny.rows[-1]["reward"] == pytest.approx(float(samples["reward"].mean()), abs=1e-4)
    assert tiny.rows[-1]["kl"] == pytest.approx(float(samples["kl"].mean()), abs=1e-4)
    difference = (samples["kl"] - samples["k1"]).mean(1)             # (P,): a prompt's samples go together
    assert abs(difference.mean()) <= 4 * difference.std() / math.sqrt(len(difference))
    assert samples["kl"].min() >= -1e-4 and samples["kl"].var() < samples["k1"].var()


# ---- nothing passes the limit -------------------------------------------------------------------------

def test_no_checkpoint_beats_the_limit_and_a_kl_per_token_would_be_caught(tiny):
    """As gains over pi_sft, whose own place is the limit's beginning; 4 standard errors are allowed."""
    curve = limit_curve(tiny.limit)
    moved = tiny.limit.mean() - tiny.start["reward"]                 # to the limit's prompts
    caught = 0
    for row in tiny.rows:
        allowed = 4 * math.hypot(row["reward_se"], tiny.start["reward_se"]) + 0.02       # the limit's bias
        assert gap_to_limit(curve, row["reward"] + moved, row["kl"]) >= -allowed, row["step"]
        assert gap_to_limit(curve, row["reward"] + moved, row["kl_k1"]) >= -allowed, row["step"]
        caught += gap_to_limit(curve, row["reward"] + moved, row["kl"] / row["length"]) < -allowed
    assert caught >= 4
