"""Evaluation: the limit against closed forms, the test that no policy passes it, and eval.csv by hand."""
import itertools
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import data
import evaluate
import figures
import train
from evaluate import best_of_n, beta_at, density_ratio, gap_to_limit, limit_at, limit_curve, win_rate


def softmax(x, axis=-1):
    e = np.exp(x - x.max(axis, keepdims=True))
    return e / e.sum(axis, keepdims=True)


# ---- the limit against closed forms ----------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def counts():
    """The known opinion counts of 32 x 2,048 reviews of the grammar, as if they were responses and their rewards."""
    return data.tiny_reviews(32 * 2048, "limit")[2].reshape(32, 2048).astype(float)


def closed_form(log_z, beta, step=1e-4):
    """log Z, r* = d log Z / d(1/beta) and KL* = r*/beta - log Z of pi*_beta from log Z as a function of 1/beta."""
    s = 1 / beta
    best = (log_z(s + step) - log_z(s - step)) / (2 * step)
    return log_z(s), best, s * best - log_z(s)


@pytest.mark.parametrize("beta", [4.0, 2.0, 1.4])
def test_sampled_limit_is_the_grammars_closed_form(counts, beta):
    best, kl, ess, log_z = limit_at(counts, beta)
    bias = (1 / (2 * ess)).mean()                                    # of log Z; r*'s and KL*'s: a few times that
    assert ess.min() >= 50
    for found, exact, slack in zip((log_z, best, kl), closed_form(data.tiny_log_mgf, beta), (1, 4 * beta, 4)):
        se = found.std(ddof=1) / math.sqrt(len(found))
        assert abs(found.mean() - exact) <= 4 * se + slack * bias
        assert se < 0.05                                             # so that the line above means something


def test_drawn_curve_is_the_grammars_closed_form(counts):
    """At the same KL, over all of the part that is drawn: within 0.1 log-odds, up to where 3 are gained and more."""
    curve = limit_curve(counts)
    exact = np.array([closed_form(data.tiny_log_mgf, b)[1:] for b in np.geomspace(100, 0.2, 400)])          # reward, KL
    on = curve["supported"]
    assert np.abs(np.interp(curve["kl"][on], exact[:, 1], exact[:, 0]) - curve["reward"][on]).max() < 0.1
    assert curve["reward"][on].max() > 3 and not on.all()


@pytest.mark.parametrize("beta", [5.0, 1.0, 0.3])
@pytest.mark.parametrize("n", [1, 5])
def test_limit_of_n_plus_or_minus_one_slots_is_n_log_cosh(n, beta):
    """All 2^n outcomes once each are the distribution itself, so that nothing is left to chance."""
    reward = np.array([[sum(slots) for slots in itertools.product((-1, 1), repeat=n)]])
    best, kl, ess, log_z = limit_at(reward, beta)
    assert log_z[0] == pytest.approx(n * math.log(math.cosh(1 / beta)))
    assert best[0] == pytest.approx(n * math.tanh(1 / beta))
    assert kl[0] == pytest.approx(n * (math.tanh(1 / beta) / beta - math.log(math.cosh(1 / beta))), abs=1e-12)
    assert ess[0] == pytest.approx(2 ** n * (math.cosh(1 / beta) ** 2 / math.cosh(2 / beta)) ** n)


def test_limit_is_defined_by_its_weights():
    reward = np.random.default_rng(0).normal(size=(3, 20))
    best, kl, ess, log_z = limit_at(reward, 0.4)
    w = softmax(reward / 0.4)
    np.testing.assert_allclose(best, (w * reward).sum(1))
    np.testing.assert_allclose(kl, (w * np.log(20 * w)).sum(1))
    np.testing.assert_allclose(ess, 1 / (w ** 2).sum(1))
    np.testing.assert_allclose(log_z, np.log(np.exp(reward / 0.4).mean(1)))


def test_a_constant_added_to_the_rewards_moves_the_limit_up_and_no_kl():
    reward = np.random.default_rng(0).normal(size=(3, 50))
    found, moved = limit_at(reward, 0.05), limit_at(reward + 500, 0.05)                # e^(500 / 0.05) is no number
    np.testing.assert_allclose(moved[0], found[0] + 500)
    np.testing.assert_allclose(moved[1:3], found[1:3], atol=1e-6)


def test_limit_is_monotone_and_concave_with_slope_beta(counts):
    curve = limit_curve(counts, np.geomspace(100, 0.1, 150))
    beta, kl, reward = (curve[k] for k in ("beta", "kl", "reward"))
    assert (np.diff(beta) < 0).all() and (np.diff(kl) > 0).all() and (np.diff(reward) > 0).all()
    slope = np.diff(reward) / np.diff(kl)
    assert (slope <= beta[:-1] * (1 + 1e-6)).all() and (slope >= beta[1:] * (1 - 1e-6)).all()


def test_no_uneven_spending_of_the_kl_beats_one_beta_for_all_prompts():
    random = np.random.default_rng(0)
    reward = random.normal(size=(8, 400)) * random.uniform(0.5, 3, size=(8, 1))
    curve = limit_curve(reward)
    for _ in range(20):
        uneven = [limit_at(reward[[i]], beta) for i, beta in enumerate(random.uniform(0.5, 5, size=8))]
        r, kl = np.mean([u[0] for u in uneven]), np.mean([u[1] for u in uneven])
        assert r <= np.interp(kl, curve["kl"], curve["reward"]) + 1e-3


@pytest.mark.parametrize("alive, prompts_below, supported", [(49, 0, True), (49, 1, True), (49, 2, False)])
def test_the_curve_is_drawn_where_nine_prompts_in_ten_have_50_effective_samples(alive, prompts_below, supported):
    reward = np.zeros((10, 200))
    reward[:, 50:] = -1e6                                            # 50 responses share all weight: ESS = 50
    reward[:prompts_below, alive:] = -1e6
    assert limit_curve(reward, [1.0])["supported"].tolist() == [supported]


def test_beta_is_that_of_the_kl(counts):
    for kl in (0.1, 1.0, 2.0):
        assert limit_at(counts, beta_at(counts, kl))[1].mean() == pytest.approx(kl)
    assert beta_at(counts, math.log(2048) + 0.1) is None
    assert gap_to_limit(counts, np.zeros(32), np.full(32, 9.0)) is None


# ---- no policy passes the limit --------------------------------------------------------------------------------------

def test_gap_is_beta_times_the_kl_to_the_optimum():
    """pi_sft uniform over M responses, so that a sample of each is exact; any policy, uneven over the prompts."""
    random = np.random.default_rng(0)
    reward = random.normal(size=(4, 30)) * 2 + random.normal(size=(4, 1))
    for sharp in (0.3, 1.0):
        p = softmax(sharp * (0.5 * reward + random.normal(size=reward.shape)))
        r, kl = (p * reward).sum(1), (p * np.log(30 * p)).sum(1)
        found = gap_to_limit(reward, r, kl)
        beta, best = found["beta"], softmax(reward / found["beta"])
        to_best = (p * np.log(p / best)).sum(1)                      # KL(pi || pi*_beta)
        assert found["gap"] == pytest.approx(beta * to_best.mean())
        assert found["gap"] == pytest.approx(limit_at(reward, beta)[0].mean() - r.mean())   # and the vertical distance
        assert found["se"] == pytest.approx(beta * to_best.std(ddof=1) / 2)
        assert found["bias"] == pytest.approx((beta / 2 * (best ** 2).sum(1)).mean())       # beta / (2 ESS)


TEMPERATURE, LENGTH, P, S = 0.5, 30, 48, 16


@pytest.fixture(scope="module")
def world():
    """Responses of 8 slots of +-1, whose pi_sft, pi*_beta and KL are all known, sampled as those of a language model.

    The P + 1 prompts get steadily better, by one log-odds each.  `policy(share)` has every slot positive with the
    logit 2 share / beta, so that share = 1 is pi*_beta; it is a softmax of TEMPERATURE times that logit at TEMPERATURE.
    """
    n, beta, random = 8, 2.0, np.random.default_rng(0)
    base = 1.0 * np.arange(P + 1)[:, None]
    slots = random.choice([-1, 1], size=(P, 1024, n)).sum(2)
    limit_reward = base[:P] + slots

    def policy(share):
        def kl_at(temperature):
            x = share * TEMPERATURE / beta / temperature             # half of a slot's logit
            return n * (x * math.tanh(x) - math.log(math.cosh(x)))
        up = np.random.default_rng(1).random((P + 1, S, n)) < 1 / (1 + math.exp(-2 * share / beta))
        return SimpleNamespace(reward=base + (2 * up - 1).sum(2), kl=np.full(P + 1, kl_at(TEMPERATURE)),
                               kl_without_temperature=np.full(P + 1, kl_at(1.0)))
    return SimpleNamespace(limit_reward=limit_reward, policy=policy, beta=beta)


def passes(world, reward, kl):
    """The test of the limit: the gap of no policy is negative, beyond chance and the sampled limit's bias."""
    found = gap_to_limit(world.limit_reward, reward.mean(1), kl)
    return found["gap"] >= -4 * found["se"] - found["bias"]


def test_the_optimum_lies_on_the_limit(world):
    one = world.policy(1.0)
    found = gap_to_limit(world.limit_reward, one.reward[:P].mean(1), one.kl[:P])
    assert abs(found["gap"]) <= 4 * found["se"] + found["bias"] and found["se"] < 0.12 and found["supported"]
    assert found["beta"] == pytest.approx(world.beta, rel=0.05)
    assert passes(world, one.reward[:P], one.kl[:P])


def test_a_policy_that_wastes_its_kl_lies_below_the_limit(world):
    """Half of the prompts aligned twice as hard, half not at all: more KL for the reward, by the same formula."""
    hard, none = world.policy(2.0), world.policy(0.0)
    even = np.arange(P) % 2 == 0
    reward = np.where(even[:, None], hard.reward[:P], none.reward[:P])
    kl = np.where(even, hard.kl[:P], none.kl[:P])
    found = gap_to_limit(world.limit_reward, reward.mean(1), kl)
    assert found["gap"] > 4 * found["se"] and passes(world, reward, kl)


def test_a_kl_per_token_is_caught(world):
    one = world.policy(1.0)
    assert not passes(world, one.reward[:P], one.kl[:P] / LENGTH)


def test_a_kl_without_the_temperature_is_caught(world):
    one = world.policy(1.0)
    assert not passes(world, one.reward[:P], one.kl_without_temperature[:P])


def test_rewards_of_the_next_prompt_are_caught(world):
    """Where prompts differ.  Rewards shifted around in a circle leave every mean as it is, and the gap with it."""
    one = world.policy(1.0)
    assert not passes(world, one.reward[1:], one.kl[:P])
    around = gap_to_limit(world.limit_reward, np.roll(one.reward[:P].mean(1), 1), one.kl[:P])["gap"]
    assert around == pytest.approx(gap_to_limit(world.limit_reward, one.reward[:P].mean(1), one.kl[:P])["gap"])


def test_the_sampled_limit_is_biased_low_by_the_bias_it_reports():
    """Over 20,000 prompts of 100 responses with Gaussian rewards, log Z = 1 / (2 beta^2)."""
    beta, reward = 0.8, np.random.default_rng(0).normal(size=(20_000, 100))
    _, _, ess, log_z = limit_at(reward, beta)
    below = beta * (1 / (2 * beta ** 2) - log_z)
    expected, se = (beta / (2 * ess) - beta / 200).mean(), below.std() / math.sqrt(20_000)  # with equal weights: none
    assert below.mean() > 10 * se and abs(below.mean() - expected) < 0.2 * expected


# ---- the share of the limit, best-of-n, win rates, the density ratio -------------------------------------------------

ROWS = [{"kl": 0.0, "reward": 1.0}, {"kl": 1.0, "reward": 3.0}, {"kl": 3.0, "reward": 4.0}]
CURVE = {"kl": np.array([0.0, 1.0, 2.0, 4.0]), "reward": np.array([1.0, 4.0, 5.0, 6.0]),
         "start": 1.0, "supported": np.array([True, True, True, False])}


def test_reward_at_a_kl_is_interpolated_and_none_where_the_method_never_gets():
    for kl, reward in ((0.0, 1.0), (0.5, 2.0), (1.0, 3.0), (2.5, 3.75), (3.0, 4.0)):
        assert evaluate.reward_at(kl, ROWS) == pytest.approx(reward)
    assert evaluate.reward_at(3.01, ROWS) is None


def test_where_a_method_turns_back_its_last_passage_counts():
    rows = [*ROWS, {"kl": 2.0, "reward": 5.0}]
    for kl, reward in ((2.0, 5.0), (2.5, 4.5), (1.5, 3.25), (0.5, 2.0)):
        assert evaluate.reward_at(kl, rows) == pytest.approx(reward)
    assert evaluate.reward_at(2.0, [*rows, rows[-1]]) == 5.0         # a checkpoint that stands still


def test_share_of_the_limit_is_the_gain_over_the_limits_gain():
    assert evaluate.share_of_limit(0.5, ROWS, CURVE) == pytest.approx((2.0 - 1.0) / (2.5 - 1.0))
    assert evaluate.share_of_limit(2.0, ROWS, CURVE) == pytest.approx((3.5 - 1.0) / (5.0 - 1.0))
    assert evaluate.share_of_limit(2.5, ROWS, CURVE) is None         # beyond the curve that is drawn
    assert evaluate.share_of_limit(1.5, ROWS[:2], CURVE) is None     # the method never gets there


def test_a_method_on_the_limit_has_all_of_it(counts):
    curve = limit_curve(counts)
    rows = [{"kl": 0.0, "reward": curve["start"]}, *({"kl": k, "reward": r} for k, r in zip(curve["kl"], curve["reward"]))]
    for kl in (0.1, 0.5, 1.0, 1.6):
        assert evaluate.share_of_limit(kl, rows, curve) == pytest.approx(1, abs=0.01)


def test_best_of_n_is_the_mean_over_all_choices_of_n():
    reward = np.random.default_rng(0).normal(size=(3, 7))
    reward[0, 1] = reward[0, 0]                                      # a tie
    for n in range(1, 8):
        kl, best = best_of_n(reward, n)
        brute = np.mean([max(choice) for row in reward for choice in itertools.combinations(row, n)])
        assert best == pytest.approx(brute) and kl == pytest.approx(math.log(n) - (n - 1) / n)


def test_best_of_n_of_many_responses_is_exact_and_below_the_limit(counts):
    curve = limit_curve(counts)
    spread = np.arange(4096)[None] / 4095.0
    for n in (1, 2, 8, 64):
        assert best_of_n(spread, n)[1] == pytest.approx((4097 * n / (n + 1) - 1) / 4095)   # the mean rank, from 0 to 1
        kl, best = best_of_n(counts, n)
        assert best <= np.interp(kl, curve["kl"], curve["reward"]) + 1e-9


def test_the_kl_of_best_of_n_is_a_bound():
    """log n - (n-1)/n is reached where all responses differ; ties only lower it: by the exact law of the best."""
    p = np.array([0.5, 0.3, 0.2])                                    # pi_sft over three rewards, ascending
    for n in (2, 4, 16):
        best = np.diff(np.concatenate([[0], p.cumsum()]) ** n)
        fine = np.diff((np.arange(100_001) / 100_000) ** n)          # of 100,000 responses that all differ
        bound = best_of_n(np.zeros((1, 16)), n)[0]
        assert (best * np.log(best / p)).sum() < bound
        assert (fine[fine > 0] * np.log(fine[fine > 0] * 100_000)).sum() == pytest.approx(bound, abs=1e-3)


def test_win_rate_is_over_all_pairs_with_ties_one_half():
    ours, theirs = torch.tensor([[1.0, 2.0], [0.0, 0.0]]), torch.tensor([[1.0, 0.0, 3.0], [0.0, 0.0, -1.0]])
    brute = [float(a > b) + 0.5 * float(a == b) for x, y in zip(ours, theirs) for a in x for b in y]
    assert win_rate(ours, theirs) == pytest.approx(sum(brute) / len(brute)) == pytest.approx(7.5 / 12)
    assert win_rate(ours, theirs) + win_rate(theirs, ours) == pytest.approx(1)
    assert win_rate(ours, ours) == 0.5


def test_density_ratio_of_equal_weights_is_one_and_nan_where_no_samples_are():
    s = np.random.default_rng(0).normal(-40, 5, 2000)
    grid = np.linspace(-120, 40, 81)
    ratio = density_ratio(s, np.full(2000, 1 / 2000), grid)
    seen = np.abs(grid + 40) < 10
    np.testing.assert_allclose(ratio[seen], 1)
    assert np.isnan(ratio[np.abs(grid + 40) > 30]).all()


def test_density_ratio_follows_a_known_tilt():
    """pi / pi_sft = exp(tilt * s) / Z, within the kernel's smoothing, whatever else the weights depend on."""
    random = np.random.default_rng(0)
    s, noise, tilt = random.normal(size=4096), random.normal(size=4096), 0.5
    weight = softmax(tilt * s + 0.3 * noise)
    grid = np.linspace(-1.5, 1.5, 13)
    np.testing.assert_allclose(density_ratio(s, weight, grid), np.exp(tilt * grid - tilt ** 2 / 2), rtol=0.12)


# ---- a row of eval.csv -----------------------------------------------------------------------------------------------

def found(P=40, S=3, T=9, seed=0):
    random = torch.Generator().manual_seed(seed)
    length = torch.randint(1, T - 1, (P, S, 1), generator=random)
    mask = (torch.arange(T) >= 2) & (torch.arange(T) < 2 + length)
    reward = torch.randn(P, 1, generator=random) + 0.5 * torch.randn(P, S, generator=random)
    return {"ids": torch.randint(1, 20, (P, S, T), generator=random), "mask": mask, "reward": reward,
            "kl": reward ** 2, "k1": reward ** 2 + torch.randn(P, S, generator=random)}


def test_copies_of_a_sample_do_not_shrink_its_standard_error():
    once = found()
    twice = {k: torch.cat([v, v], dim=1) for k, v in once.items()}
    one, two = evaluate.summary(once, 0), evaluate.summary(twice, 0)
    assert two.pop("distinct2") < one.pop("distinct2")
    assert two == pytest.approx(one)
    means = once["reward"].mean(1)
    assert one["reward_se"] == pytest.approx(float(means.std()) / math.sqrt(40)) and one["reward_se"] > 0.1
    assert one["kl_se"] == pytest.approx(float(once["kl"].mean(1).std()) / math.sqrt(40))


def test_standard_error_is_the_spread_of_the_mean_over_repetitions():
    rows = [evaluate.summary(found(seed=i), 0) for i in range(300)]
    means, ses = [row["reward"] for row in rows], [row["reward_se"] for row in rows]
    assert np.mean(ses) == pytest.approx(np.std(means), rel=0.15)


def test_a_row_holds_the_plain_means():
    ids = torch.tensor([[[9, 1, 2, 0, 0], [7, 1, 2, 3, 1]], [[8, 1, 1, 1, 0], [8, 0, 0, 0, 0]]])
    mask = torch.tensor([[[0, 1, 1, 1, 0], [0, 1, 1, 1, 1]], [[0, 1, 1, 1, 1], [0, 1, 0, 0, 0]]]) > 0
    reward = torch.tensor([[0.0, 2.0], [-1.0, 1.0]])
    row = evaluate.summary({"ids": ids, "mask": mask, "reward": reward, "kl": reward + 1, "k1": reward + 2}, eos_id=0)
    assert row["reward"] == 0.5 and row["kl"] == 1.5 and row["kl_k1"] == 2.5
    assert row["length"] == 3.0 and row["ended"] == 0.75             # 3 4 4 1; the second is cut
    assert row["accuracy"] == pytest.approx(float(reward.sigmoid().mean()))
    # pairs: 12 20 | 12 23 31 | 11 11 10 | none: of 8, six differ
    assert row["distinct2"] == 6 / 8
    assert list(row) == ["reward", "reward_se", "accuracy", "kl", "kl_se", "kl_k1", "length", "ended", "distinct2"]


# ---- figures ---------------------------------------------------------------------------------------------------------

def named(*arguments):
    """The names, without the seed, of the folders that `train.align` gives to what a command asks for."""
    names, cfg = [], train.parse([*arguments, "--preset", "tiny"])[0]

    def begin(folder, *rest):
        names.append(folder.name.rsplit("-s", 1)[0])
        return True

    run = SimpleNamespace(cfg=cfg, folder=figures.Path("runs"), settings=lambda stage: {})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "begin", begin)
        for stage in ("sft", "oracle", "responses", "reward_model"):
            patch.setattr(train.stages, stage, lambda run: None)
        for one in train.plan(cfg):
            train.align(run, *one, seed=0)
    return names


def test_every_run_has_a_name_and_a_look_of_its_own():
    names = named("--method", "all", "--num-candidates", "2", "4", "8")
    names += named("--method", "xpo", "--alpha", "0")
    assert len(names) == 11
    assert [figures.label(name) for name in names] == [
        "EXO-pref", "DPO-pref", "EXO-rw K=2", "DPO-rw K=2", "EXO-rw K=4", "DPO-rw K=4", "EXO-rw K=8", "DPO-rw K=8",
        "PPO", "XPO", "online DPO"]
    looks = [tuple(sorted(figures.style(name).items())) for name in names]
    assert len(set(looks)) == len(looks)


def test_one_colour_a_method_and_broken_lines_for_pairs():
    names = named("--method", "all", "--num-candidates", "2", "4") + named("--method", "xpo", "--alpha", "0")
    for name in names:
        look, method = figures.style(name), name.split("-preferences")[0].split("-reward")[0]
        assert look["color"] == evaluate.COLORS[method] and (look["ls"] == "--") == ("preferences" in name)
    assert len(set(evaluate.COLORS.values())) == len(evaluate.COLORS)


def test_other_betas_and_alphas_are_told_in_the_label():
    assert [figures.label(name) for name in named("--method", "exo", "--beta-pi", "0.1", "--beta-r", "5")] == [
        "EXO-pref βpi0.1 βr5"]
    assert [figures.label(name) for name in named("--method", "xpo", "--alpha", "0.1")] == ["XPO α0.1"]
    for name in named("--method", "all", "--beta-pi", "0.1"):
        figures.style(name)
