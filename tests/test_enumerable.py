"""Where every response can be written out: KL estimators, the limit, EXO, DPO and XPO against the truth."""
import math

import enumerable as lm
import pytest
import torch

import stages
import train
import xpo
from checkpoint import resumable, write_tensors
from compute import adamw
from dpo import dpo_loss
from evaluate import limit_at, sequence_kl
from model import sequence_logprob
from run import Run
from settings import Config

BETA = 1.0


@torch.no_grad()
def test_every_response_is_there_once():
    total = lm.log_probs(lm.moved_policy()).exp().sum(1)             # (P,)
    torch.testing.assert_close(total, torch.ones(3, dtype=torch.float64), atol=1e-6, rtol=0)
    everything = set(map(str, torch.stack([lm.IDS, lm.MASK], dim=1).tolist()))
    sampled = set(map(str, torch.stack(lm.sample(lm.policy(), 50), dim=1).tolist()))
    assert len(everything) == len(lm.IDS) and sampled <= everything


# ---- KL -----------------------------------------------------------------------------------------------

@torch.no_grad()
def exact_kl(pi, temperature):
    """-> log pi(y|x) (P, Y), log pi / pi_sft (P, Y), KL(pi || pi_sft) (P,)"""
    logp = lm.log_probs(pi, temperature)
    ref_logp = lm.log_probs(lm.policy(), temperature)
    return logp, logp - ref_logp, lm.evaluate(logp, ref_logp)[1]


@pytest.mark.parametrize("temperature", [1.0, 0.8])
def test_both_kl_estimators_are_unbiased_and_the_full_one_varies_less(temperature):
    """In exact expectation over all responses."""
    pi = lm.moved_policy()
    logp, log_ratio, kl = exact_kl(pi, temperature)
    p = logp.exp()                                                   # (P, Y)
    full, plain = sequence_kl(pi, lm.policy(), lm.IDS, lm.MASK, temperature)         # (N,), (N,)
    full = full.double().view(p.shape)                               # (N,) -> (P, Y)
    plain = plain.double().view(p.shape)                             # (N,) -> (P, Y)
    assert kl.min() > 0.2 and full.min() >= 0
    torch.testing.assert_close((p * full).sum(1), kl, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(plain, log_ratio, atol=1e-4, rtol=1e-4)
    variance, plain_variance = ((p * (x - kl[:, None]) ** 2).sum(1) for x in (full, plain))      # (P,), (P,)
    assert (variance < 0.5 * plain_variance).all()


# ---- the limit ----------------------------------------------------------------------------------------

@torch.no_grad()
def test_the_sampled_limit_is_the_exact_one():
    """16 blocks of 1,024 responses of pi_sft to each prompt, for the standard errors."""
    blocks = 16
    ids, mask = lm.sample(lm.policy(), blocks * 1024)
    reward = lm.reward_of(ids, mask).view(-1, 1024).numpy()          # (P blocks, 1024)
    ref_logp = lm.log_probs(lm.policy())
    for beta in (4.0, 2.0, 1.0):
        log_best, best_J = lm.optimum(ref_logp, beta)
        best_reward, best_kl, _ = lm.evaluate(log_best, ref_logp)
        estimates = [torch.tensor(column).view(-1, blocks) for column in limit_at(reward, beta)]
        bias = (1 / (2 * estimates.pop(2))).mean(1)                  # (P,) of log Z: 1 / (2 ESS)
        assert bias.max() < 0.03
        exact = (best_reward, best_kl, best_J / beta)                # (P,) each
        for estimate, truth, biases in zip(estimates, exact, (4 * beta, 4, 1)):
            standard_error = estimate.std(1) / math.sqrt(blocks)
            assert ((estimate.mean(1) - truth).abs() < 4 * standard_error + biases * bias).all()


# ---- training, by the loops of train.py ---------------------------------------------------------------

class BrokenOff(Exception):
    pass


class Practice:
    """In place of train.Training: from the enumerable pi_sft, without evaluation, every step's means kept."""

    def __init__(self, run, method, K=None, rounds=1, broken_off_at=None):
        self.run, self.method, self.feedback, self.seed = run, method, "reward", 0
        self.K, self.rounds = K, rounds
        self.policy, self.ref, self.judge = lm.policy(), lm.policy(), lm.reward_of
        self.optimizer = adamw(self.policy, run.cfg.align_lr)
        self.broken_off_at = broken_off_at
        self.means = {}

    def steps(self, total, **state):
        self.kept = state
        state = state | {"policy": self.policy, "optimizer": self.optimizer}
        yield from resumable(self.run.folder, state, total, self.run.cfg.save_every, "practice")

    def record(self, step, means, tokens, bar):
        self.means[step] = means
        if step == self.broken_off_at:
            raise BrokenOff


def responses(each, seed=0, temperature=1.0):
    """What the responses stage keeps: `each` responses of pi_sft to every prompt, scored."""
    ids, mask = lm.sample(lm.policy(), each, seed, temperature)
    with torch.no_grad():
        ref_logp = sequence_logprob(lm.policy(), ids, mask, temperature)
    return {"ids": ids.int(), "mask": mask, "ref_logp": ref_logp, "reward": lm.reward_of(ids, mask)}


@pytest.fixture
def start_run(tmp_path, monkeypatch):
    """start_run(n, settings): a run with every prompt n times, its responses and a perfect reward model."""
    def start(n, name="run", **settings):
        cfg = Config(run=tmp_path / name, prompts=3 * n, prompt_tokens=1, new_tokens=lm.NEW, **settings)
        run = Run(cfg, torch.device("cpu"), bf16=False)
        run.eos_id = lm.EOS
        sampled = {}
        for column, values in responses(n * cfg.responses).items():
            sampled[column] = values.view(cfg.prompts, cfg.responses, *values.shape[1:])
        write_tensors(run.folder / "responses.safetensors", sampled)
        write_tensors(run.folder / "rewards.safetensors", {"reward": sampled["reward"]})
        return run

    monkeypatch.setattr(stages, "responses", lambda run: run.folder)
    monkeypatch.setattr(stages, "all_responses", lambda run: [run.folder])
    monkeypatch.setattr(stages, "reward_model", lambda run: run.folder)
    monkeypatch.setattr(stages, "reward_function", lambda run, folder: lm.reward_of)
    monkeypatch.setattr(Run, "train_prompts", lambda run: lm.PROMPTS.tolist() * (run.cfg.prompts // 3))
    return start


@pytest.mark.parametrize("method", ["exo", "dpo"])
def test_exo_and_dpo_from_rewards_reach_the_optimum(method, start_run):
    """Within 5% of J* - J(pi_sft), at pi*'s KL within 10%; beta_pi beta_r = beta, and neither is 1."""
    run = start_run(1000, align_steps=100, align_batch=32, align_lr=8e-3, beta_pi=0.5, beta_r=2.0)
    training = Practice(run, method, K=8)
    train.train_exo_dpo(run, training)
    gain, kl = lm.reached(training.policy, BETA)
    assert gain >= 0.95 and abs(kl - 1) <= 0.1


ROUNDS = dict(responses=4, align_batch=24, align_lr=3e-3, beta_pi=0.5, beta_r=1.0)


@pytest.mark.parametrize("method", ["exo", pytest.param("dpo", marks=pytest.mark.slow)])
def test_rounds_reach_the_optimum_from_ppos_number_of_responses(method, start_run):
    """60 rounds of 96 responses: as near as the test of PPO asks of its 60 iterations of 96."""
    run = start_run(480, align_steps=480, **ROUNDS)
    training = Practice(run, method, K=4, rounds=60)
    train.train_exo_dpo(run, training)
    gain, kl = lm.reached(training.policy, 0.5)
    assert gain >= 0.95 and abs(kl - 1) <= 0.2


def test_rounds_go_on_where_they_broke_off(start_run):
    """In the middle of a round: on that round's responses, to the same bits."""
    def trained(name, broken_off_at=None):
        run = start_run(16, name, align_steps=24, save_every=5, **ROUNDS)
        training = Practice(run, "exo", K=4, rounds=3, broken_off_at=broken_off_at)
        train.train_exo_dpo(run, training)
        return training

    undisturbed = trained("undisturbed")
    with pytest.raises(BrokenOff):
        trained("broken off", broken_off_at=13)           # rounds begin at 0, 8, 16
    rest = trained("broken off")
    assert min(rest.means) == 10
    assert torch.equal(lm.weights(rest.policy), lm.weights(undisturbed.policy))


def test_a_round_is_the_policys_own_responses_with_the_kl_paid(start_run):
    run = start_run(100, align_steps=10, **ROUNDS)
    training = Practice(run, "exo", K=4, rounds=2)
    training.policy = lm.moved_policy()
    new = train.drawn_from_policy(run, training)(1)
    ids, mask = new["ids"].flatten(0, 1).long(), new["mask"].flatten(0, 1)               # (n K, T)
    with torch.no_grad():
        logq = sequence_logprob(training.policy, ids, mask)                              # (n K,)
        ref_logp = sequence_logprob(training.ref, ids, mask)                             # (n K,)
    assert len(new["ids"]) == run.cfg.prompts // 2
    torch.testing.assert_close(new["ref_logp"].flatten(), logq, atol=1e-4, rtol=1e-4)
    paid = lm.reward_of(ids, mask) - 0.5 * (logq - ref_logp)
    torch.testing.assert_close(new["reward"].flatten(), paid, atol=1e-4, rtol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("alpha", [0.0, 0.003])
def test_xpo_and_online_dpo_come_near_the_optimum(alpha, start_run):
    """Within 10% of J* - J(pi_sft), from 12,000 Bradley-Terry labels and nothing else."""
    run = start_run(4000, responses=2, xpo_rounds=4, xpo_prompts=3000, xpo_epochs=2, align_batch=128,
                    align_lr=3e-3, beta_pi=BETA, alpha=alpha)
    training = Practice(run, "xpo")
    train.train_xpo(run, training)
    assert len(training.kept["history"]) == 12_000 and len(training.kept["closed"]) == 0
    assert lm.reached(training.policy, BETA)[0] >= 0.9


# ---- XPO ----------------------------------------------------------------------------------------------

@pytest.fixture
def short_xpo(start_run):
    """short_xpo(name of the run, settings) -> a Practice, trained on rounds of 24 pairs."""
    def trained(name, broken_off_at=None, **settings):
        usual = dict(responses=2, xpo_rounds=2, xpo_prompts=24, xpo_epochs=2, align_batch=16, align_lr=3e-3,
                     beta_pi=0.5)
        run = start_run(16, name, **usual | settings)
        training = Practice(run, "xpo", broken_off_at=broken_off_at)
        train.train_xpo(run, training)
        return training

    return trained


def test_alpha_zero_is_dpo_through_the_whole_training(short_xpo, monkeypatch):
    def without_bonus(logp, ref_logp, explore_logp, beta, alpha):
        return dpo_loss(logp, ref_logp, beta)

    alpha_zero = short_xpo("alpha zero", alpha=0.0)
    xpo_trained = short_xpo("xpo", alpha=0.1)
    monkeypatch.setattr(xpo, "xpo_loss", without_bonus)
    dpo = short_xpo("dpo", alpha=0.1)
    assert torch.equal(lm.weights(alpha_zero.policy), lm.weights(dpo.policy))
    assert alpha_zero.means == dpo.means
    assert xpo_trained.means[8]["explore_log_ratio"] < dpo.means[8]["explore_log_ratio"] - 0.1


def test_the_bonus_is_on_the_responses_of_pi_sft(short_xpo):
    """At the first step pi = pi_sft: log 2 of every pair, and alpha times the mean log pi_sft(y~)."""
    training = short_xpo("one step", alpha=0.1, xpo_rounds=1, xpo_epochs=1, align_batch=24)
    pairs = training.kept["history"].columns
    theirs = pairs["explore"][:, None]                               # (24, 1)
    explore_logp = float(pairs["ref_logp"].gather(1, theirs).mean())
    other_logp = float(pairs["ref_logp"].gather(1, 1 - theirs).mean())
    assert abs(explore_logp - other_logp) > 0.01
    assert training.means[0]["explore_logp"] == pytest.approx(explore_logp, abs=1e-4)
    assert training.means[0]["loss"] == pytest.approx(math.log(2) + 0.1 * explore_logp, abs=1e-4)


STEEP = dict(alpha=30.0, beta_pi=8.0, xpo_epochs=8, align_lr=1e-2, save_every=5)


def test_a_round_stops_where_pi_sfts_responses_have_fallen_by_the_rewards_range(short_xpo):
    """The bonus has no floor of its own.  What has stopped stays so until the next round."""
    training = short_xpo("steep", **STEEP)
    reward = responses(32)["reward"]
    floor = -float(reward.max() - reward.min()) / 8.0
    for means in (list(training.means.values())[:12], list(training.means.values())[12:]):
        taken = [step for step in means if "explore_log_ratio" in step]
        assert len(taken) < len(means) and taken == means[:len(taken)]
        assert taken[-1]["explore_log_ratio"] < floor
        assert all(step["explore_log_ratio"] >= floor for step in taken[:-1])


def test_xpo_goes_on_where_it_broke_off(short_xpo):
    """In the middle of a round that had stopped early: still stopped, the same pairs, the same end."""
    undisturbed = short_xpo("undisturbed", xpo_rounds=3, **STEEP)
    with pytest.raises(BrokenOff):
        short_xpo("broken off", broken_off_at=33, xpo_rounds=3, **STEEP)     # of 12 + 24 + 36 steps
    rest = short_xpo("broken off", xpo_rounds=3, **STEEP)
    assert min(rest.means) == 30 and rest.means[30] == {}
    assert torch.equal(lm.weights(rest.policy), lm.weights(undisturbed.policy))
    for name, column in undisturbed.kept["history"].columns.items():
        assert torch.equal(rest.kept["history"].columns[name], column)


def played(winner=None, n=40, temperature=0.8):
    """A round by a policy away from pi_sft; the higher reward wins, or always the column `winner`.

    -> its pairs, the responses of pi_sft in them
    """
    def label(reward):
        return reward.argmax(1) if winner is None else torch.full((len(reward),), winner)

    sampled = responses(n, 3, temperature)
    ids, mask = lm.sample(lm.moved_policy(), n, 4, temperature)
    with torch.no_grad():
        ref_logp = sequence_logprob(lm.policy(), ids, mask, temperature)
    fresh = {"ids": ids.int(), "mask": mask, "ref_logp": ref_logp, "reward": lm.reward_of(ids, mask)}
    return xpo.pairs(fresh, sampled, label), sampled


def test_a_pair_has_its_winner_first_and_the_references_log_probs():
    pairs, _ = played()
    ids = pairs["ids"].flatten(0, 1).long()                          # (n, 2, T) -> (2 n, T)
    mask = pairs["mask"].flatten(0, 1)                               # (n, 2, T) -> (2 n, T)
    reward = lm.reward_of(ids, mask).view(-1, 2)                     # (2 n,) -> (n, 2)
    assert (reward[:, 0] >= reward[:, 1]).all() and (reward[:, 0] > reward[:, 1]).float().mean() > 0.9
    with torch.no_grad():
        ref_logp = sequence_logprob(lm.policy(), ids, mask, 0.8).view(-1, 2)
    torch.testing.assert_close(pairs["ref_logp"], ref_logp, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("winner", [None, 0, 1])
def test_explore_marks_pi_sfts_response_won_or_lost(winner):
    pairs, sampled = played(winner)
    row = torch.arange(len(pairs["explore"]))
    for name in ("ids", "mask", "ref_logp"):
        assert torch.equal(pairs[name][row, pairs["explore"]], sampled[name])
    other = pairs["ids"][row, 1 - pairs["explore"]]                  # (n, T)
    assert torch.equal(other[:, 0], sampled["ids"][:, 0]) and not torch.equal(other, sampled["ids"])


def test_the_other_response_is_the_present_policys():
    """The mean of log pi / pi_sft is the KL on samples of pi, and below 0 on those of pi_sft."""
    pairs, _ = played(n=400, temperature=1.0)
    ids = pairs["ids"].flatten(0, 1).long()                          # (n, 2, T) -> (2 n, T)
    _, h = sequence_kl(lm.moved_policy(), lm.policy(), ids, pairs["mask"].flatten(0, 1), 1.0)
    theirs = pairs["explore"][:, None]                               # (n, 1)
    other = h.view(-1, 2).gather(1, 1 - theirs)                      # (n, 1)
    kl = exact_kl(lm.moved_policy(), 1.0)[2].mean()
    assert abs(other.mean() - kl) < 4 * other.std() / math.sqrt(len(other))
    assert h.view(-1, 2).gather(1, theirs).mean() < 0


def test_rounds_make_their_passes_over_all_pairs_so_far():
    steps = [(t, i) for t, n in enumerate((5, 10, 15)) for i in range(n)]    # 2 passes over 10, 20, 30 pairs
    assert xpo.schedule(rounds=3, prompts=10, epochs=2, batch_size=4) == steps
    last_batch_wraps_around = [(0, 0), (0, 1), (1, 0), (1, 1), (1, 2)]
    assert xpo.schedule(rounds=2, prompts=10, epochs=1, batch_size=8) == last_batch_wraps_around
