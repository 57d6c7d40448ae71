"""Where every response can be written out: KL estimators, the limit, the end of a training, against the truth."""
import copy
import math

import pytest
import torch
from enumerable import (
    EOS,
    NEW,
    PROMPTS,
    draws,
    evaluate,
    gap_closed,
    limit,
    log_probs,
    optimum,
    policy,
    responses,
    reward_of,
)

import checkpoint
import files
import stages
import train
import xpo
from dpo import dpo_loss
from evaluate import limit_at, sequence_kl
from model import sequence_logprob
from optim import adamw, cosine

BETA = 1.0


def moved(share=0.5):
    """A policy some nats away from pi_sft."""
    pi = policy()
    with torch.no_grad():
        for p, q in zip(pi.parameters(), policy(1).parameters()):
            p.lerp_(q, share)
    return pi


@pytest.fixture(scope="module")
def exact():
    """log pi_sft, reward: (P, Y), in double precision."""
    ids, mask = responses()
    with torch.no_grad():
        return log_probs(policy(), ids, mask).double(), reward_of(ids, mask).double().view(len(PROMPTS), -1)


# ---- KL --------------------------------------------------------------------------------------------------------------

def exact_kl(pi, ref, temperature):
    ids, mask = responses()
    with torch.no_grad():
        logp, ref_logp = (log_probs(m, ids, mask, temperature).double() for m in (pi, ref))
    return logp.exp(), evaluate(logp, ref_logp, torch.zeros_like(logp))[1]                  # (P, Y), (P,)


@pytest.mark.parametrize("temperature", [1.0, 0.8])
def test_the_mean_of_both_kl_estimators_over_all_responses_is_the_kl(temperature):
    pi, ref = moved(), policy()
    p, kl = exact_kl(pi, ref, temperature)
    assert kl.min() > 0.2
    for estimate in sequence_kl(pi, ref, *responses(), temperature):
        torch.testing.assert_close((p * estimate.view(p.shape)).sum(1), kl, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("temperature", [1.0, 0.8])
def test_both_kl_estimators_are_unbiased_on_samples_and_the_full_one_varies_less(temperature):
    pi, ref, n = moved(), policy(), 3000
    _, kl = exact_kl(pi, ref, temperature)
    full, plain = (x.view(-1, n).double() for x in sequence_kl(pi, ref, *draws(pi, n, 0, temperature), temperature))
    for estimate in (full, plain):
        assert ((estimate.mean(1) - kl).abs() < 4 * estimate.std(1) / math.sqrt(n)).all()
    difference = full - plain
    assert (difference.mean(1).abs() < 4 * difference.std(1) / math.sqrt(n)).all()
    assert (full.var(1) < 0.5 * plain.var(1)).all() and (full >= 0).all() and (plain < 0).any()


def test_a_kl_at_another_temperature_is_another_number():
    pi, ref, n = moved(), policy(), 3000
    _, kl = exact_kl(pi, ref, 0.8)
    ids, mask = draws(pi, n, 0, 0.8)
    for estimate in sequence_kl(pi, ref, ids, mask, 1.0):
        estimate = estimate.view(-1, n)
        assert ((estimate.mean(1) - kl).abs() > 4 * estimate.std(1) / math.sqrt(n)).all()


def test_the_kl_of_a_policy_to_itself_is_zero():
    ids, mask = responses()
    for estimate in sequence_kl(policy(), policy(), ids, mask, 0.8):
        assert (estimate == 0).all()


def test_the_plain_estimator_is_the_difference_of_sequence_log_probs():
    pi, ref = moved(), policy()
    ids, mask = responses()
    with torch.no_grad():
        expected = sequence_logprob(pi, ids, mask, 0.8) - sequence_logprob(ref, ids, mask, 0.8)
    torch.testing.assert_close(sequence_kl(pi, ref, ids, mask, 0.8)[1], expected, atol=1e-4, rtol=1e-4)


def test_padding_adds_no_kl():
    ids, mask = responses()
    longer = torch.cat([ids[:, :-1], torch.full((len(ids), 1), 3)], 1), mask.clone()
    longer[1][:, -1] = False
    short = ~mask[:, -1]
    for a, b in zip(sequence_kl(moved(), policy(), *longer, 1.0), sequence_kl(moved(), policy(), ids, mask, 1.0)):
        torch.testing.assert_close(a[short], b[short], atol=1e-5, rtol=1e-5)


# ---- the limit -------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("beta", [4.0, 2.0, 1.0])
def test_sampled_limit_is_the_exact_one(exact, beta):
    """16 blocks of 1,024 responses of pi_sft to each prompt."""
    blocks, n = 16, 1024
    sampled = reward_of(*draws(policy(), blocks * n)).view(len(PROMPTS) * blocks, n).numpy()
    best, kl, ess, log_z = (torch.tensor(x).view(-1, blocks) for x in limit_at(sampled, beta))
    truths = *limit(*exact, beta), optimum(*exact, beta)[1] / beta
    bias = (1 / (2 * ess)).mean(1)
    for found, truth, slack in zip((best, kl, log_z), truths, (4 * beta, 4, 1)):
        assert ((found.mean(1) - truth).abs() < 4 * found.std(1) / math.sqrt(blocks) + slack * bias).all()
    assert bias.max() < 0.03


def test_the_gap_to_the_limit_is_beta_times_the_kl_to_the_optimum(exact):
    """r*(k) - r(pi) = beta(k) E KL(pi || pi*_beta(k)), k the KL of pi, which each spends on prompts in its way."""
    ref_logp, reward = exact
    for share in (0.3, 0.5, 0.8):
        with torch.no_grad():
            logp = log_probs(moved(share), *responses()).double()
        r, kl, _ = evaluate(logp, ref_logp, reward)
        low, high = 1e-2, 1e3
        for _ in range(80):                                          # beta(k), by bisection
            beta = math.sqrt(low * high)
            low, high = (beta, high) if limit(ref_logp, reward, beta)[1].mean() > kl.mean() else (low, beta)
        best, best_kl = limit(ref_logp, reward, beta)
        assert float(best_kl.mean()) == pytest.approx(float(kl.mean())) and kl.std() > 0.01
        to_best = (logp.exp() * (logp - optimum(ref_logp, reward, beta)[0])).sum(1)
        assert float(best.mean() - r.mean()) == pytest.approx(beta * float(to_best.mean()), rel=1e-4)


# ---- training, by the functions of train.py --------------------------------------------------------------------------

class Small(stages.Run):
    """A run whose pi_sft, oracle and reward model are the enumerable ones, and whose responses are drawn here."""

    def __init__(self, folder, patch, n, each=2, **settings):
        """n prompts of each kind, `each` responses to a prompt."""
        usual = dict(prompts=n * len(PROMPTS), responses=each, prompt_tokens=1, new_tokens=NEW)
        self.cfg, self.folder, self.device = train.Config(**usual | settings), folder, torch.device("cpu")
        self.bf16, self.eos_id, self.own = False, EOS, False
        ids, mask = draws(policy(), n * each)
        with torch.no_grad():
            table = {"ids": ids.int(), "mask": mask, "ref_logp": sequence_logprob(policy(), ids, mask),
                     "reward": reward_of(ids, mask)}
        table = {k: v.view(n * len(PROMPTS), each, *v.shape[1:]) for k, v in table.items()}
        files.write_tensors(folder / "responses.safetensors", table)
        files.write_tensors(folder / "rewards.safetensors", {"reward": table["reward"]})
        patch.setattr(stages, "responses", lambda run: folder)
        patch.setattr(stages, "reward_model", lambda run: folder)

    def policy(self, folder):
        return policy()

    def scorer(self, folder):
        return reward_of

    def train(self, method, steps=None, K=8):
        """`method` by train.py's own functions.  -> the policy, what the method keeps, the rows of metrics.csv"""
        pi = policy()
        optimizer = adamw(pi, self.cfg.align_lr)
        total, take, state = train.online(self, pi, policy(), reward_of, optimizer, 0) if method == "xpo" else \
            train.offline(self, pi, optimizer, method, "reward", K, 0)
        return pi, state, [take(step, cosine(step, total)) for step in range(steps or total)]


def closed(pi, exact):
    with torch.no_grad():
        logp = log_probs(pi, *responses()).double()
    return gap_closed(logp, *exact, BETA), evaluate(logp, *exact)[1].mean() / limit(*exact, BETA)[1].mean()


@pytest.mark.parametrize("method", ["exo", "dpo"])
@pytest.mark.parametrize("K", [4, pytest.param(8, marks=pytest.mark.slow)])
def test_exo_and_dpo_from_rewards_reach_the_optimum(method, K, exact, tmp_path, monkeypatch):
    """Within 5% of J* - J(pi_sft), at pi*'s KL within 10%; beta_pi beta_r = beta, and neither is 1."""
    run = Small(tmp_path, monkeypatch, 1500, each=K, align_steps=200, align_batch=64, align_lr=5e-3, beta_pi=0.5,
                beta_r=2.0)
    pi, _, _ = run.train(method, K=K)
    share, kl = closed(pi, exact)
    assert share >= 0.95 and abs(kl - 1) <= 0.1


@pytest.mark.slow
@pytest.mark.parametrize("alpha", [0.0, 0.003])
def test_xpo_and_online_dpo_come_near_the_optimum(alpha, exact, tmp_path, monkeypatch):
    """Within 10% of J* - J(pi_sft), from 12,000 Bradley-Terry labels and nothing else."""
    run = Small(tmp_path, monkeypatch, 4000, xpo_rounds=4, xpo_prompts=3000, xpo_epochs=2, align_batch=128,
                align_lr=3e-3, beta_pi=BETA, alpha=alpha)
    pi, state, stats = run.train("xpo")
    assert len(state["replay"]) == 12_000 and state["replay"].closed == -1
    assert closed(pi, exact)[0] >= 0.9


# ---- XPO -------------------------------------------------------------------------------------------------------------

def short_run(folder, patch, **settings):
    usual = dict(xpo_rounds=2, xpo_prompts=24, xpo_epochs=2, align_batch=16, align_lr=3e-3, beta_pi=0.5)
    return Small(folder, patch, 16, **usual | settings)


def state_of(pi):
    return torch.cat([p.detach().flatten() for p in pi.parameters()])


def test_alpha_zero_is_dpo_through_the_whole_training(tmp_path, monkeypatch):
    pi, _, stats = short_run(tmp_path, monkeypatch, alpha=0.0).train("xpo")
    with monkeypatch.context() as patch:
        patch.setattr(xpo, "xpo_loss", lambda logp, ref_logp, explore_logp, beta, alpha: dpo_loss(logp, ref_logp, beta))
        dpo, _, dpo_stats = short_run(tmp_path, monkeypatch, alpha=0.0).train("xpo")
    assert torch.equal(state_of(pi), state_of(dpo)) and stats == dpo_stats
    bonus, _, _ = short_run(tmp_path, monkeypatch, alpha=0.1).train("xpo")
    assert not torch.equal(state_of(bonus), state_of(dpo))


def test_the_bonus_lowers_the_log_prob_of_pi_sfts_responses(tmp_path, monkeypatch):
    without, bonus = (short_run(tmp_path, monkeypatch, alpha=alpha).train("xpo")[2][-1] for alpha in (0.0, 0.1))
    assert bonus["explore_log_ratio"] < without["explore_log_ratio"] - 0.1


def test_the_bonus_is_on_the_responses_of_pi_sft(tmp_path, monkeypatch):
    """At the first step pi = pi_sft: log 2 of every pair, and alpha times the mean log pi_sft of what pi_sft drew."""
    run = short_run(tmp_path, monkeypatch, alpha=0.1, align_batch=24)
    monkeypatch.setattr(train, "batch_at", lambda *names, window: torch.arange(24))
    _, state, stats = run.train("xpo", steps=1)
    pairs = state["replay"].data
    drawn, fresh = (pairs["ref_logp"].gather(1, x[:, None]).mean() for x in (pairs["explore"], 1 - pairs["explore"]))
    assert stats[0]["explore_logp"] == pytest.approx(float(drawn), abs=1e-4) and abs(drawn - fresh) > 0.01
    assert stats[0]["loss"] == pytest.approx(math.log(2) + 0.1 * float(drawn), abs=1e-4)


def played(label, n=40, temperature=0.8):
    """One call of xpo.play with a policy away from pi_sft.  -> the replay's columns, what pi_sft had drawn"""
    ref, pi, replay = policy(), moved(), xpo.Replay()
    ids, mask = draws(ref, n, 3, temperature)
    with torch.no_grad():
        sampled = {"ids": ids.int(), "mask": mask, "ref_logp": sequence_logprob(ref, ids, mask, temperature),
                   "reward": reward_of(ids, mask)}
    xpo.play(pi, ref, reward_of, label, PROMPTS.repeat_interleave(n, 0), sampled, replay, NEW, temperature, EOS,
             torch.Generator().manual_seed(4))
    return replay.data, sampled


def test_a_stored_pair_has_its_winner_first():
    data, _ = played(lambda reward: reward.argmax(1))
    reward = reward_of(data["ids"].flatten(0, 1).long(), data["mask"].flatten(0, 1)).view(-1, 2)
    assert (reward[:, 0] >= reward[:, 1]).all() and (reward[:, 0] > reward[:, 1]).float().mean() > 0.9
    worst, _ = played(lambda reward: reward.argmin(1))
    other = reward_of(worst["ids"].flatten(0, 1).long(), worst["mask"].flatten(0, 1)).view(-1, 2)
    assert (other[:, 0] <= other[:, 1]).all()


@pytest.mark.parametrize("label", [lambda r: r.argmax(1), lambda r: torch.zeros(len(r), dtype=torch.long),
                                   lambda r: torch.ones(len(r), dtype=torch.long)])
def test_explore_marks_pi_sfts_response_won_or_lost(label):
    data, sampled = played(label)
    row = torch.arange(len(data["explore"]))
    for name in ("ids", "mask", "ref_logp"):
        assert torch.equal(data[name][row, data["explore"]], sampled[name])
    theirs = data["ids"][row, 1 - data["explore"]]
    assert torch.equal(theirs[:, 0], sampled["ids"][:, 0]) and not torch.equal(theirs, sampled["ids"])


def test_stored_reference_log_probs_are_those_of_the_reference():
    data, _ = played(lambda reward: reward.argmax(1))
    with torch.no_grad():
        expected = sequence_logprob(policy(), data["ids"].flatten(0, 1).long(), data["mask"].flatten(0, 1), 0.8)
    torch.testing.assert_close(data["ref_logp"], expected.view(-1, 2), atol=1e-4, rtol=1e-4)


def test_the_other_response_is_the_present_policys():
    """Under pi its log-probs are those that pi has of its own samples, and pi_sft's are not."""
    data, _ = played(lambda reward: reward.argmax(1), n=400, temperature=1.0)
    h = sequence_kl(moved(), policy(), data["ids"].flatten(0, 1).long(), data["mask"].flatten(0, 1), 1.0)[1].view(-1, 2)
    fresh, old = (h.gather(1, x[:, None]) for x in (1 - data["explore"], data["explore"]))
    kl = exact_kl(moved(), policy(), 1.0)[1].mean()                  # E_pi log pi / pi_sft is the KL
    assert abs(fresh.mean() - kl) < 4 * fresh.std() / math.sqrt(len(fresh)) and old.mean() < 0


def test_the_replay_survives_a_checkpoint_bit_for_bit(tmp_path, monkeypatch):
    """Stopped inside the second round, saved, restored into a fresh one: the same pairs, and the same end."""
    ends = []
    for name, stop in (("a", None), ("b", 7)):
        (tmp_path / name).mkdir()
        run = short_run(tmp_path / name, monkeypatch, alpha=0.01)
        pi = policy()
        optimizer = adamw(pi, run.cfg.align_lr)
        total, take, state = train.online(run, pi, policy(), reward_of, optimizer, 0)
        for step in range(total):
            if step == stop:
                whole = {"policy": pi, "optimizer": optimizer, **state}
                checkpoint.save(tmp_path / name, step, whole)
                before = state["replay"].data
                pi = copy.deepcopy(policy())
                optimizer = adamw(pi, run.cfg.align_lr)
                _, take, state = train.online(run, pi, policy(), reward_of, optimizer, 0)
                assert checkpoint.restore(tmp_path / name, {"policy": pi, "optimizer": optimizer, **state}) == step
                after = state["replay"].data
                assert len(state["replay"]) == 48 and list(before) == list(after)
                assert all(torch.equal(before[k], after[k]) and before[k].dtype == after[k].dtype for k in before)
            take(step, cosine(step, total))
        ends.append((state_of(pi), state["replay"].closed))
    assert torch.equal(ends[0][0], ends[1][0]) and ends[0][1] == ends[1][1]


def test_a_closed_round_stays_closed_through_a_checkpoint(tmp_path):
    replay, fresh = xpo.Replay(), xpo.Replay()
    replay.closed = 3
    replay.append(ids=torch.arange(6, dtype=torch.int32).view(3, 2), explore=torch.tensor([0, 1, 1]))
    checkpoint.save(tmp_path, 1, {"replay": replay})
    checkpoint.restore(tmp_path, {"replay": fresh})
    assert fresh.closed == 3 and all(torch.equal(fresh.data[k], v) for k, v in replay.data.items())


def test_a_round_stops_where_pi_sfts_responses_have_fallen_by_the_rewards_range(tmp_path, monkeypatch):
    """Without a floor of its own the bonus pushes on; what is stopped stays stopped until the next round."""
    run = short_run(tmp_path, monkeypatch, alpha=30.0, beta_pi=8.0, xpo_epochs=8, align_lr=1e-2)
    reward = files.read_tensors(tmp_path / "responses.safetensors")[0]["reward"]
    floor = -float(reward.max() - reward.min()) / 8.0
    schedule = xpo.rounds(2, 24, 8, 16)
    stats = run.train("xpo")[2]
    fallen = [s.get("explore_log_ratio", 0.0) < floor for s in stats]
    for t in (0, 1):
        steps = [s for s, (round, _) in enumerate(schedule) if round == t]
        first = next(s for s in steps if fallen[s])
        assert first < steps[-1] and all(math.isnan(stats[s]["grad_norm"]) for s in steps if s > first)
        assert all(stats[s]["grad_norm"] > 0 for s in steps if s <= first)


def test_rounds_make_their_passes_over_all_pairs_so_far():
    schedule = xpo.rounds(3, 10, 2, 4)
    assert schedule == [(t, i) for t, n in enumerate((5, 10, 15)) for i in range(n)]        # 2 x 10, 20, 30 pairs by 4
    assert xpo.rounds(2, 10, 1, 8) == [(0, 0), (0, 1), (1, 0), (1, 1), (1, 2)]         # the last batch wraps around
