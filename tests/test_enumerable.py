"""Where every response can be written out: KL estimators, the limit, EXO, DPO and XPO against the truth."""
import copy
import math
from types import SimpleNamespace

import enumerable as lm
import pytest
import torch

import stages
import train
import xpo
from dpo import dpo_loss
from evaluate import optimum, sequence_kl
from exo import exo_loss
from loop import Log, Sums, adamw, cosine, resumable, rng, update, write_tensors
from model import GPT, sequence_logprob
from settings import Config
from stages import Run

BETA = 1.0


@torch.no_grad()
def test_every_response_is_there_once():
    total = lm.log_probs(lm.moved_policy()).exp().sum(1)             # (P,)
    torch.testing.assert_close(total, torch.ones(3, dtype=torch.float64), atol=1e-6, rtol=0)
    everything = set(map(str, torch.stack([lm.IDS, lm.MASK], dim=1).tolist()))
    sampled = set(map(str, torch.stack(lm.sample(lm.policy(), 50), dim=1).tolist()))
    assert len(everything) == len(lm.IDS) and sampled <= everything


# ---- KL and the limit ---------------------------------------------------------------------------------

@pytest.mark.parametrize("temperature", [1.0, 0.8])
@torch.no_grad()
def test_both_kl_estimators_are_unbiased_and_the_full_one_varies_less(temperature):
    """In exact expectation over all responses."""
    pi = lm.moved_policy()
    logp, ref_logp = (lm.log_probs(gpt, temperature) for gpt in (pi, lm.policy()))       # (P, Y) each
    p, kl = logp.exp(), lm.evaluate(logp, ref_logp)[1]               # (P, Y), (P,)
    full, plain = sequence_kl(pi, lm.policy(), lm.IDS, lm.MASK, temperature)         # (N,), (N,)
    full = full.double().view(p.shape)                               # (N,) -> (P, Y)
    plain = plain.double().view(p.shape)                             # (N,) -> (P, Y)
    assert kl.min() > 0.2 and full.min() >= 0
    torch.testing.assert_close((p * full).sum(1), kl, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(plain, logp - ref_logp, atol=1e-4, rtol=1e-4)
    variance, plain_variance = ((p * (x - kl[:, None]) ** 2).sum(1) for x in (full, plain))      # (P,), (P,)
    assert (variance < 0.5 * plain_variance).all()


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
        estimates = [torch.tensor(column).view(-1, blocks) for column in optimum(reward, beta)]
        bias = (1 / (2 * estimates.pop(2))).mean(1)                  # (P,) of log Z: 1 / (2 ESS)
        assert bias.max() < 0.03
        exact = (best_reward, best_kl, best_J / beta)                # (P,) each
        for estimate, truth, biases in zip(estimates, exact, (4 * beta, 4, 1)):
            standard_error = estimate.std(1) / math.sqrt(blocks)
            assert ((estimate.mean(1) - truth).abs() < 4 * standard_error + biases * bias).all()


# ---- training, by the loops of train.py ---------------------------------------------------------------

class Practice:
    """In place of train.Alignment: from the enumerable pi_sft, without evaluation; it may break off."""

    def __init__(self, run, method, broken_at=None):
        self.run, self.method, self.seed, self.rewarded_by = run, method, 0, None
        self.policy, self.ref, self.broken_at = lm.policy(), lm.policy(), broken_at
        self.optimizer = adamw(self.policy.parameters())
        self.metrics = Log(run.folder / "metrics.csv")
        train.align_by_comparison(run, self)

    def steps(self, total, **kept):
        self.kept = kept | {"policy": self.policy, "optimizer": self.optimizer, "metrics": self.metrics}
        for step in resumable(self.run.folder, self.kept, total, "practice"):
            if step == self.broken_at:
                raise KeyboardInterrupt
            yield step


@pytest.fixture
def start_run(tmp_path, monkeypatch):
    """start_run(n, settings): a run with every prompt n times, its responses and a perfect reward model."""
    def start(n, name="run", **settings):
        run = Run(Config(run=tmp_path / name, prompts=3 * n, prompt_tokens=1, new_tokens=lm.NEW, device="cpu",
                         **settings))
        run.eos_id = lm.EOS
        ids, mask = lm.sample(lm.policy(), n * run.cfg.responses)
        with torch.no_grad():
            ref_logp = sequence_logprob(lm.policy(), ids, mask)
        sampled = {"ids": ids.int(), "mask": mask, "ref_logp": ref_logp, "reward": lm.reward_of(ids, mask)}
        sampled = {name: column.unflatten(0, (3 * n, -1)) for name, column in sampled.items()}
        write_tensors(run.folder / "responses.safetensors", sampled)
        write_tensors(run.folder / "rewards.safetensors", {"reward": sampled["reward"]})
        return run

    for stage in ("responses", "reward_model", "labeler"):
        monkeypatch.setattr(stages, stage, lambda run: run.folder)
    monkeypatch.setattr(stages, "reward_function", lambda run, folder: lm.reward_of)
    monkeypatch.setattr(Run, "prompts", lambda run, split, n: lm.PROMPTS.tolist() * (n // 3))
    return start


def drawn(run, method, policy):
    """What a first round by this policy compares.  -> {name: (n, K, ...)}, and of it ids, mask: (n K, T)"""
    alignment = SimpleNamespace(method=method, seed=0, rewarded_by=None, policy=policy, ref=lm.policy())
    compared = train.candidates(run, alignment, 0)
    return compared, compared["ids"].flatten(0, 1).long(), compared["mask"].flatten(0, 1)


@pytest.mark.parametrize("method", ["exo-rw", "dpo-rw"])
def test_exo_and_dpo_from_rewards_reach_the_optimum(method, start_run):
    """Within 5% of J* - J(pi_sft), at pi*'s KL within 10%; beta_pi beta_r = beta, and neither is 1."""
    run = start_run(1000, align_steps=100, align_batch=32, rw_lr=8e-3, beta_pi=0.5, beta_r=2.0,
                    responses=8, num_candidates=8)
    gain, kl = lm.reached(Practice(run, method).policy, BETA)
    assert gain >= 0.95 and abs(kl - 1) <= 0.1


ROUNDS = dict(align_batch=24, rw_lr=3e-3, beta_pi=0.5, beta_r=1.0)


@pytest.mark.parametrize("method", ["exo-rw", pytest.param("dpo-rw", marks=pytest.mark.slow)])
def test_rounds_reach_the_optimum_from_ppos_number_of_responses(method, start_run):
    """60 rounds of 96 responses: as near as the test of PPO asks of its 40 iterations of 144."""
    run = start_run(480, align_steps=480, rounds=60, **ROUNDS)
    gain, kl = lm.reached(Practice(run, method).policy, 0.5)
    assert gain >= 0.95 and abs(kl - 1) <= 0.2


@pytest.mark.parametrize("method, settings, prompts", [
    ("exo-rw", dict(align_steps=24, rounds=3, **ROUNDS), 16),        # rounds begin at 0, 8, 16
    ("xpo", dict(xpo_rounds=3, round_prompts=24, align_batch=16, align_lr=3e-3), 72)])     # at 0, 3, 9
def test_rounds_go_on_where_they_broke_off_to_the_same_bits(method, settings, prompts, start_run):
    """In the middle of a round: on that round's responses, for XPO on all pairs so far."""
    whole = Practice(start_run(16, "whole", **settings), method)
    with pytest.raises(KeyboardInterrupt):
        Practice(start_run(16, "broken off", **settings), method, broken_at=14)
    rest = Practice(start_run(16, "broken off", **settings), method)
    assert torch.equal(lm.weights(rest.policy), lm.weights(whole.policy))
    assert rest.metrics.rows == whole.metrics.rows
    assert len(rest.kept["compared"]["reward"]) == prompts


def test_a_round_is_the_policys_own_responses_with_the_kl_paid(start_run):
    run, pi = start_run(100, align_steps=10, rounds=2, **ROUNDS), lm.moved_policy()
    new, ids, mask = drawn(run, "exo-rw", pi)
    logq, ref_logp = (sequence_logprob(gpt, ids, mask) for gpt in (pi, lm.policy()))     # (n K,) each
    assert len(new["ids"]) == run.cfg.prompts // 2
    torch.testing.assert_close(new["ref_logp"].flatten(), logq, atol=1e-4, rtol=1e-4)
    paid = lm.reward_of(ids, mask) - 0.5 * (logq - ref_logp)
    torch.testing.assert_close(new["reward"].flatten(), paid, atol=1e-4, rtol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("alpha", [0.0, 0.003])
def test_xpo_and_online_dpo_come_near_the_optimum(alpha, start_run):
    """Within 10% of J* - J(pi_sft), from 12,000 Bradley-Terry labels and nothing else."""
    run = start_run(4000, responses=2, xpo_rounds=4, round_prompts=3000, align_batch=128,
                    align_lr=3e-3, beta_pi=BETA, alpha=alpha)
    practice = Practice(run, "xpo")
    assert len(practice.kept["compared"]["reward"]) == 12_000
    assert lm.reached(practice.policy, BETA)[0] >= 0.9


# ---- Adam's epsilon -----------------------------------------------------------------------------------

FOLLOWS = torch.tensor([0, 2, 3, 4, 5, 1])                # in this grammar every second token is certain


def fit(gpt, adam_eps, lr, steps, loss_of):
    """Trains a GPT by loss_of(step).  -> [log pi of every response, (P, Y), after each tenth of the steps]"""
    optimizer, passed = adamw(gpt.parameters(), adam_eps), []
    for step in range(steps):
        loss, sums = loss_of(step), Sums()
        loss.backward()
        sums.add(1, loss=loss)
        update([optimizer], lr * cosine(step, steps), sums, "fit")
        if (step + 1) % (steps // 10) == 0:
            with torch.no_grad():
                passed.append(lm.log_probs(gpt))
    return passed


@pytest.mark.slow
def test_offline_mass_leaks_to_responses_that_no_sample_shows_with_adams_usual_epsilon():
    """pi_sft learned by sampled batches gives each wrong token e^-10; pi* leaves it so.  EXO from rewards."""
    torch.manual_seed(0)
    pi_sft = GPT(lm.CONFIG)

    def likelihood(step):
        drawn = torch.randint(1, 6, (2, 64), generator=rng("grammar", step))             # the free tokens
        prompt = torch.randint(1, 4, (64,), generator=rng("prompts", step))
        ids = torch.stack([prompt, drawn[0], FOLLOWS[drawn[0]], drawn[1], FOLLOWS[drawn[1]]], dim=1)
        return -sequence_logprob(pi_sft, ids, (torch.arange(5) > 0).expand(64, 5)).mean()

    before = fit(pi_sft, 1e-8, 3e-3, 3000, likelihood)[-1]
    K, prompts = 4, 3 * 512
    ids, mask = lm.sample(pi_sft, 512 * K)
    shown = set(map(str, ids.tolist()))
    unseen = torch.tensor([str(row) not in shown for row in lm.IDS.tolist()]).view(before.shape)
    taste = torch.randn(lm.V, generator=torch.Generator().manual_seed(2))
    reward = 1.5 * (taste[ids[:, 1]] + taste[ids[:, 3]]).view(prompts, K)
    with torch.no_grad():
        ref_logp = sequence_logprob(pi_sft, ids, mask).view(prompts, K)
    ids, mask = ids.view(prompts, K, -1), mask.view(prompts, K, -1)                      # (prompts, K, T)

    def leaked(adam_eps, lr):
        policy = copy.deepcopy(pi_sft)

        def loss_of(step):
            index = torch.randperm(prompts, generator=rng("batch", step))[:32]
            rows = ids[index].flatten(0, 1), mask[index].flatten(0, 1)                   # (32 K, T) each
            logp = sequence_logprob(policy, *rows).view(32, K)
            return exo_loss(logp, ref_logp[index], reward[index], beta_r=1.0, beta_pi=0.5)

        return max(float(logp.exp()[unseen].sum() / 3) for logp in fit(policy, adam_eps, lr, 400, loss_of))

    start = float(before.exp()[unseen].sum() / 3)
    usual, large = [leaked(1e-8, lr) for lr in (3e-4, 1e-3)], [leaked(1e-2, lr) for lr in (1e-3, 3e-3)]
    assert start < 1e-3 and min(usual) > 0.02 and max(usual) > 10 * max(large)


# ---- XPO ----------------------------------------------------------------------------------------------

SHORT = dict(responses=2, xpo_rounds=2, round_prompts=24, align_batch=16, align_lr=3e-3)


def test_alpha_zero_is_dpo_through_the_whole_training(start_run, monkeypatch):
    alpha_zero = Practice(start_run(16, "alpha zero", alpha=0.0, **SHORT), "xpo")
    with_bonus = Practice(start_run(16, "with bonus", alpha=0.1, **SHORT), "xpo")
    monkeypatch.setattr(xpo, "xpo_loss", lambda logp, ref, explore, beta, alpha: dpo_loss(logp, ref, beta))
    dpo = Practice(start_run(16, "dpo", alpha=0.1, **SHORT), "xpo")
    assert torch.equal(lm.weights(alpha_zero.policy), lm.weights(dpo.policy))
    assert alpha_zero.metrics.rows == dpo.metrics.rows and len(dpo.metrics.rows) == 9
    compared = dpo.kept["compared"]                                  # the bonus pushes pi_sft's down
    ids, mask = (compared[name][range(48), compared["explore"]] for name in ("ids", "mask"))     # (48, T)
    with torch.no_grad():
        after = [sequence_logprob(each.policy, ids.long(), mask).mean() for each in (with_bonus, dpo)]
    assert after[0] < after[1] - 0.1


def test_the_bonus_is_on_the_responses_of_pi_sft(start_run):
    """At the first step pi = pi_sft: log 2 of every pair, and alpha beta times the mean log pi_sft(y~)."""
    run = start_run(16, alpha=0.1, **SHORT | dict(xpo_rounds=1, align_batch=24))
    pairs, _, _ = drawn(run, "xpo", lm.policy())
    explore_logp = pairs["ref_logp"].gather(1, pairs["explore"][:, None]).mean()
    other_logp = pairs["ref_logp"].gather(1, 1 - pairs["explore"][:, None]).mean()
    assert abs(explore_logp - other_logp) > 0.01
    first = Practice(run, "xpo").metrics.rows[0]
    assert first["loss"] == pytest.approx(math.log(2) + 0.1 * 0.5 * float(explore_logp), abs=1e-4)


@pytest.mark.parametrize("labels", ["argmax", "bt"])
def test_a_pair_has_its_winner_first_and_the_references_log_probs(labels, start_run):
    run = start_run(100, round_prompts=300, labels=labels, temperature=0.8)
    pairs, ids, mask = drawn(run, "xpo", lm.moved_policy())
    lead = lm.reward_of(ids, mask).view(-1, 2) @ torch.tensor([1.0, -1.0])               # (2 n,) -> (n,)
    lead = lead[lead != 0]                                           # without ties
    chance = {"argmax": torch.ones(len(lead)), "bt": lead.abs().sigmoid()}[labels]       # that the best won
    surprise = (lead > 0).float() - chance
    assert len(lead) > 270 and abs(surprise.mean()) <= 4 * surprise.std() / math.sqrt(len(lead))
    ref_logp = sequence_logprob(lm.policy(), ids, mask, 0.8).view(-1, 2)                 # (2 n,) -> (n, 2)
    torch.testing.assert_close(pairs["ref_logp"], ref_logp, atol=1e-4, rtol=1e-4)


def test_explore_marks_pi_sfts_response_won_or_lost(start_run):
    """Whatever pi_t is, pi_sft draws the same responses: those that the marks of both rounds point at."""
    run = start_run(40, round_prompts=120)
    rounds = [drawn(run, "xpo", lm.moved_policy(fraction))[0] for fraction in (0.5, 0.2)]
    theirs = [pairs["ids"][range(120), pairs["explore"]] for pairs in rounds]            # (n, T) each
    ours = [pairs["ids"][range(120), 1 - pairs["explore"]] for pairs in rounds]          # (n, T) each
    assert torch.equal(*theirs) and not torch.equal(*ours)
    assert all(0.1 < pairs["explore"].float().mean() < 0.9 for pairs in rounds)          # it won and it lost


def test_the_other_response_is_the_present_policys(start_run):
    """The mean of log pi / pi_sft is the KL on samples of pi, and below 0 on those of pi_sft."""
    pi, ref = lm.moved_policy(), lm.policy()
    pairs, ids, mask = drawn(start_run(400, round_prompts=1200), "xpo", pi)
    theirs = pairs["explore"][:, None]                               # (n, 1)
    h = sequence_kl(pi, ref, ids, mask, 1.0)[1].view(-1, 2)          # (2 n,) -> (n, 2)
    other = h.gather(1, 1 - theirs)                                  # (n, 1)
    kl = lm.evaluate(lm.log_probs(pi), lm.log_probs(ref))[1].mean()
    assert abs(other.mean() - kl) < 4 * other.std() / math.sqrt(len(other))
    assert h.gather(1, theirs).mean() < 0


def test_rounds_make_their_passes_over_all_pairs_so_far():
    assert xpo.schedule(rounds=3, prompts=10, batch_size=8) == [3, 5, 8]       # 20, 40, 60 pairs
