"""Products in bfloat16, as on a GPU, train what float32 ones train: on a CPU, at reduced size."""
import re
from functools import partial

import pytest
import torch
from conftest import run_train
from test_own_data import write

import compute
import figures
import ppo
import stages
from checkpoint import read_json
from evaluate import read_csv
from model import token_logprob
from run import open_run

pytestmark = pytest.mark.slow
SIZE = ("--sft-steps 120 --sft-batch 32 --rm-steps 60 --align-steps 60 --align-batch 16 --checkpoints 2 "
        "--eval-prompts 30 --limit-responses 64 --limit-prompts 8")


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """The same run of EXO on pairs in float32 and in bfloat16.  -> their folders, what the second printed"""
    place = tmp_path_factory.mktemp("precision")
    file = write(place / "prefs.jsonl", 300, "pairs")
    with pytest.MonkeyPatch.context() as patch:
        for drawing in ("draw", "progress"):
            patch.setattr(figures, drawing, lambda run: None)
        for bf16 in (False, True):
            patch.setattr(compute, "arithmetic", partial(compute.arithmetic, bf16=bf16))
            ended = run_train("--preset", "tiny", "--device", "cpu", "--tokenizer", "tiny", "--data", file,
                              "--run", place / str(bf16), *SIZE.split())
            assert ended.code == 0, ended.err
    yield place / "False", place / "True", ended.out
    torch.set_float32_matmul_precision("highest")


def test_a_run_in_bfloat16_ends_where_one_in_float32_does(runs):
    *folders, printed = runs
    nats, theirs = [read_json(folder / "sft" / "report.json")["test_nats_per_token"] for folder in folders]
    assert abs(nats - theirs) <= 0.003                               # seen: 0.0003 of 0.31
    assert float(re.search(r"log pi_sft\| before the first step is (\S+) nats", printed)[1]) <= 1e-4
    ours, theirs = [read_csv(folder / "exo-preferences-s0" / "eval.csv")[-1] for folder in folders]
    assert abs(ours["reward"] - theirs["reward"]) <= ours["reward_se"]    # seen: 0.006, se 0.18
    assert ours["kl"] == pytest.approx(theirs["kl"], rel=0.15)       # seen: 6%
    ours, theirs = [read_csv(folder / "exo-preferences-s0" / "metrics.csv")[-1] for folder in folders]
    assert ours["rewards_margin"] == pytest.approx(theirs["rewards_margin"], rel=0.01)    # seen: 0.1%


@torch.no_grad()
def test_ppos_first_ratio_is_one_and_would_not_be_with_pi_old_in_float32(runs):
    run = open_run(runs[1])
    policy = run.policy(run.folder / "sft")
    batch = ppo.rollout(policy, policy, run.scorer(run.folder / "reward_model"),
                        stages.reward_function(run, run.folder / "reward_model"), run.train_prompts()[:64],
                        run.cfg.new_tokens, 1.0, run.eos_id, compute.rng("rollout"))

    def furthest():                                                  # |rho - 1|, in minibatches of 7
        parts = zip(*[batch[name].split(7) for name in ("ids", "mask", "old_logp")])
        return max(float((token_logprob(policy, ids, mask) - old).expm1().abs().max())
                   for ids, mask, old in parts)
    assert run.bf16 and furthest() <= 1e-5
    policy.bf16 = False
    assert furthest() > 1e-3                                         # seen: 0.008
