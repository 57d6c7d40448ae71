"""Evaluation: the limit against closed forms, no policy passes it, a row of eval.csv by hand."""
import itertools
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import gap_to_limit

import data
import evaluate
import stages
from evaluate import kl_needed, limit_curve, optimum, sequence_kl, share_of_objective, win_rate
from model import GPT


# ---- the limit against closed forms ------------------------------------------------------------------------

@pytest.fixture(scope="module")
def counts():
    """The known opinion counts of 32 x 2,048 reviews of the grammar, as if they were responses' rewards."""
    return data.tiny_reviews(32 * 2048, "limit")[2].reshape(32, 2048).astype(float)


@pytest.mark.parametrize("beta", [5.0, 1.0, 0.3])
@pytest.mark.parametrize("n, base", [(1, 0), (5, 0), (5, 500)])      # e^(500 / 0.3) is no number
def test_limit_of_n_plus_or_minus_one_slots_is_n_log_cosh(n, base, beta):
    """All 2^n outcomes once each are the distribution itself, so nothing is left to chance."""
    reward = np.array([[base + sum(slots) for slots in itertools.product((-1, 1), repeat=n)]])
    best, kl, ess, log_z = optimum(reward, beta)
    cosh, tanh = math.cosh(1 / beta), math.tanh(1 / beta)
    assert best[0] == pytest.approx(base + n * tanh)
    assert log_z[0] == pytest.approx(base / beta + n * math.log(cosh))
    assert kl[0] == pytest.approx(n * (tanh / beta - math.log(cosh)), abs=1e-9)
    assert ess[0] == pytest.approx(2 ** n * (cosh ** 2 / math.cosh(2 / beta)) ** n)


def test_limit_is_monotone_and_concave_with_slope_beta(counts):
    curve = limit_curve(counts)
    beta, kl, reward = (curve[name] for name in ("beta", "kl", "reward"))
    assert reward.max() - counts.mean() > 3 and len(beta) < len(evaluate.BETAS)
    assert (np.diff(beta) < 0).all() and (np.diff(kl) > 0).all() and (np.diff(reward) > 0).all()
    slope = np.diff(reward) / np.diff(kl)
    assert (slope <= beta[:-1] * (1 + 1e-6)).all() and (slope >= beta[1:] * (1 - 1e-6)).all()


def test_by_duality_the_gap_is_vertical_and_the_kl_needed_horizontal(counts):
    curve = limit_curve(counts)
    for beta in (4.0, 2.0, 1.3):
        best, kl, _, _ = optimum(counts, beta)
        assert gap_to_limit(curve, best.mean(), kl.mean()) == pytest.approx(0, abs=1e-3)
        assert gap_to_limit(curve, best.mean() - 0.7, kl.mean()) == pytest.approx(0.7, abs=1e-3)
        assert kl_needed(curve, best.mean()) == pytest.approx(kl.mean(), abs=1e-3)
    assert kl_needed(curve, counts.mean()) == pytest.approx(0, abs=1e-3)
    nothing = {name: np.array([]) for name in curve}
    assert math.isnan(kl_needed(nothing, 1.0))


@pytest.mark.parametrize("prompts_below, supported", [(0, True), (1, True), (2, False)])
def test_the_curve_is_drawn_where_nine_prompts_in_ten_have_50_effective_samples(prompts_below, supported):
    reward = np.zeros((10, 200))
    reward[:, 50:] = -1e6                                            # 50 responses share all weight: ESS = 50
    reward[:prompts_below, 49:] = -1e6
    assert len(limit_curve(reward, betas=[1.0])["beta"]) == supported


def test_the_optimum_has_the_whole_gain_in_j_and_a_policy_at_the_wrong_temperature_less(counts):
    """Shares of pi*_beta's gain in E r - beta KL; of a reward model's optimum, judged by the oracle, too."""
    def share(beta, own_beta, reward=counts, judged=None):
        best, kl, _, _ = optimum(reward, own_beta, judged)
        one_response = [torch.tensor(x)[:, None] for x in (best, kl, counts.mean(1))]    # (P, 1) each
        return share_of_objective(beta, *one_response, reward, judged)[0]

    assert share(2.0, 2.0) == pytest.approx(1)
    assert 0 < share(2.0, 4.0) < 0.95 and share(2.0, 1.2) < 0.95
    model = counts + np.random.default_rng(0).normal(size=counts.shape)
    assert share(2.0, 2.0, model, counts) == pytest.approx(1)
    best, kl, _, _ = optimum(model, 2.0, counts)
    assert gap_to_limit(limit_curve(counts), best.mean(), kl.mean()) > 0.1
    assert math.isnan(share(0.05, 0.05))                             # beyond what these samples support
    assert math.isnan(share(2.0, 2.0, counts * 1e-3))                # nothing to gain: noise


# ---- no policy passes the limit ----------------------------------------------------------------------------

TEMPERATURE, LENGTH, P, S = 0.5, 30, 48, 16


@pytest.fixture(scope="module")
def world():
    """Responses of 8 slots of +-1, whose pi_sft, pi*_beta and KL are known, sampled as a language model's.

    The P + 1 prompts get steadily better, by one log-odds each.  `policy(share)` has every slot positive
    with the logit 2 share / beta, so share = 1 is pi*_beta; at TEMPERATURE it is a softmax of TEMPERATURE
    times that logit.
    """
    n, beta, random = 8, 2.0, np.random.default_rng(0)
    base = 1.0 * np.arange(P + 1)[:, None]
    slots = random.choice([-1, 1], size=(P, 1024, n)).sum(2)

    def policy(share):
        def kl_at(temperature):
            x = share * TEMPERATURE / beta / temperature             # half of a slot's logit
            return n * (x * math.tanh(x) - math.log(math.cosh(x)))
        up = np.random.default_rng(1).random((P + 1, S, n)) < 1 / (1 + math.exp(-2 * share / beta))
        return SimpleNamespace(reward=base + (2 * up - 1).sum(2), kl=np.full(P + 1, kl_at(TEMPERATURE)),
                               kl_without_temperature=np.full(P + 1, kl_at(1.0)))
    reward = base[:P] + slots
    return SimpleNamespace(limit_reward=reward, curve=limit_curve(reward), policy=policy)


def gap(world, reward, kl):
    """-> the gap and its standard error over prompts, at the beta where the bound is lowest."""
    curve = world.curve
    value = gap_to_limit(curve, reward.mean(), kl.mean())
    beta = curve["beta"][np.argmin(curve["beta"] * (curve["log_z"] + kl.mean()))]
    per_prompt = beta * (optimum(world.limit_reward, beta)[3] + kl) - reward.mean(1)     # (P,)
    assert per_prompt.mean() == pytest.approx(value)
    return value, per_prompt.std() / math.sqrt(P)


def passes(world, reward, kl):
    """The test of the limit: no policy's gap is negative, beyond chance and the sampled limit's bias."""
    value, se = gap(world, reward, kl)
    return value >= -4 * se - 0.02


def test_the_optimum_lies_on_the_limit_and_a_policy_that_wastes_its_kl_below(world):
    """Half of the prompts aligned twice as hard, half not at all: more KL for the reward."""
    one, hard, none = world.policy(1.0), world.policy(2.0), world.policy(0.0)
    value, se = gap(world, one.reward[:P], one.kl[:P])
    assert abs(value) <= 4 * se + 0.02 and se < 0.12
    even = np.arange(P) % 2 == 0
    reward = np.where(even[:, None], hard.reward[:P], none.reward[:P])
    value, se = gap(world, reward, np.where(even, hard.kl[:P], none.kl[:P]))
    assert value > 4 * se


def test_a_kl_per_token_one_without_the_temperature_and_rewards_of_the_next_prompt_are_caught(world):
    one = world.policy(1.0)
    assert passes(world, one.reward[:P], one.kl[:P])
    assert not passes(world, one.reward[:P], one.kl[:P] / LENGTH)
    assert not passes(world, one.reward[:P], one.kl_without_temperature[:P])
    assert not passes(world, one.reward[1:], one.kl[:P])


def test_the_sampled_limit_is_biased_low_by_beta_over_twice_the_effective_samples():
    """Over 20,000 prompts of 100 responses with Gaussian rewards, log Z = 1 / (2 beta^2)."""
    beta, reward = 0.8, np.random.default_rng(0).normal(size=(20_000, 100))
    _, _, ess, log_z = optimum(reward, beta)
    below = beta * (1 / (2 * beta ** 2) - log_z)
    expected = (beta / (2 * ess) - beta / 200).mean()                # with equal weights there is none
    assert below.mean() > 10 * below.std() / math.sqrt(20_000)
    assert abs(below.mean() - expected) < 0.2 * expected


# ---- best-of-n, win rates, the density ratio ---------------------------------------------------------------

def test_best_of_n_is_the_mean_of_the_best_at_a_bound_of_its_kl(counts):
    """The KL by the exact law of the best: ties lower it, and it is reached where all responses differ."""
    ranks, curve = np.random.default_rng(0).permutation(4096)[None], limit_curve(counts)
    ties, fine = np.array([0.5, 0.3, 0.2]), np.full(100_000, 1e-5)   # pi_sft over ascending rewards
    for n in (2, 8, 64):
        assert evaluate.best_of_n(ranks, n)[1] == pytest.approx(4097 * n / (n + 1) - 1, rel=0.05)
        by_model = evaluate.best_of_n(-ranks, n, judged=ranks)       # whose order is the reverse
        assert by_model[1] == pytest.approx(4097 / (n + 1) - 1, rel=0.05, abs=10)
        bound, best = evaluate.best_of_n(counts, n)
        assert gap_to_limit(curve, best, bound) > 0
        best, best_fine = (np.diff(np.append(0, p.cumsum()) ** n) for p in (ties, fine))
        assert (best * np.log(best / ties)).sum() < bound
        assert (best_fine * np.log(best_fine / fine + 1e-300)).sum() == pytest.approx(bound, abs=1e-3)


def test_win_rate_is_over_all_pairs_with_ties_one_half():
    ours, theirs = torch.tensor([[1.0, 2.0], [0.0, 0.0]]), torch.tensor([[1.0, 0.0, 3.0], [0.0, 0.0, -1.0]])
    brute = [float(a > b) + 0.5 * float(a == b) for x, y in zip(ours, theirs) for a in x for b in y]
    assert win_rate(ours, theirs) == pytest.approx(sum(brute) / len(brute)) == pytest.approx(7.5 / 12)
    assert win_rate(ours, theirs) + win_rate(theirs, ours) == pytest.approx(1)


def test_density_ratio_follows_a_known_tilt():
    """pi / pi_sft = exp(tilt * s) / Z, within the kernel's smoothing, whatever else the weights depend on."""
    random = np.random.default_rng(0)
    s, noise, tilt = random.normal(size=4096), random.normal(size=4096), 0.5
    weight = np.exp(tilt * s + 0.3 * noise)
    weight /= weight.sum()
    grid = np.linspace(-1.5, 1.5, 13)
    ratio = evaluate.density_ratio(s, weight, grid)
    np.testing.assert_allclose(ratio, np.exp(tilt * grid - tilt ** 2 / 2), rtol=0.12)
    assert np.isnan(evaluate.density_ratio(s, weight, np.array([-9.0, 9.0]))).all()      # nothing is near


# ---- a row of eval.csv -------------------------------------------------------------------------------------

def test_every_prompt_is_measured_on_responses_of_its_own_at_the_sampling_temperature(gpt):
    cfg = SimpleNamespace(temperature=2.0, eval_prompts=3, eval_samples=4, new_tokens=6, sample_batch=5)
    run = SimpleNamespace(cfg=cfg, T=9, eos_id=0, prompts=lambda split, n: [[1, 2], [3], [4, 5, 6]])
    ref, generator = GPT(gpt.config), torch.Generator().manual_seed(0)
    measured = stages.evaluation(run, gpt, ref, lambda ids, mask: ids[:, 0].float(), generator)
    assert measured["reward"].tolist() == [[1.0] * 4, [3.0] * 4, [4.0] * 4]
    ids, mask = measured["ids"].flatten(0, 1).long(), measured["mask"].flatten(0, 1)     # (P S, T) each
    assert len(ids.unique(dim=0)) > 9
    measured = torch.stack([measured["kl"], measured["k1"]]).flatten(1)                  # (2, P S)
    torch.testing.assert_close(measured, torch.stack(sequence_kl(gpt, ref, ids, mask, 2.0)))


def test_copies_of_a_sample_do_not_shrink_its_standard_error():
    random = torch.Generator().manual_seed(0)
    reward = torch.randn(40, 1, generator=random) + 0.5 * torch.randn(40, 3, generator=random)
    once = {"ids": torch.randint(1, 20, (40, 3, 9), generator=random), "mask": torch.ones(40, 3, 9) > 0,
            "reward": reward, "kl": 2 * reward, "k1": reward}
    one = evaluate.summary(once, 0)
    two = evaluate.summary({name: torch.cat([column, column], dim=1) for name, column in once.items()}, 0)
    assert two.pop("within_prompt_sd") < one.pop("within_prompt_sd")
    assert two == pytest.approx(one)
    assert one["reward_se"] == pytest.approx(float(reward.mean(1).std()) / math.sqrt(40))
    assert one["kl_se"] == pytest.approx(2 * one["reward_se"])


def test_a_row_holds_the_plain_means():
    ids = torch.tensor([[[9, 1, 2, 0, 0], [7, 1, 2, 3, 1]], [[8, 1, 1, 1, 0], [8, 0, 0, 0, 0]]])
    mask = torch.tensor([[[0, 1, 1, 1, 0], [0, 1, 1, 1, 1]], [[0, 1, 1, 1, 1], [0, 1, 0, 0, 0]]]) > 0
    reward = torch.tensor([[0.0, 2.0], [-1.0, 1.0]])
    measured = {"ids": ids, "mask": mask, "reward": reward, "kl": reward + 1, "k1": reward + 2}
    row = evaluate.summary(measured, eos_id=0)
    assert row["reward"] == 0.5 and row["kl"] == 1.5 and row["kl_k1"] == 2.5
    assert row["length"] == 3.0 and row["ended"] == 0.75             # 3 4 4 1; the second is cut
    assert row["accuracy"] == pytest.approx(float(reward.sigmoid().mean()))
    assert row["within_prompt_sd"] == pytest.approx(math.sqrt(2))         # of both prompts
    assert list(row) == "reward reward_se accuracy kl kl_se kl_k1 within_prompt_sd length ended".split()
