"""Evaluation: the limit against closed forms, no policy passes it, eval.csv by hand, what figures show."""
import itertools
import math
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import data
import evaluate
import figures
from compute import UserError, rng
from evaluate import beta_at, density_ratio, gap_to_limit, limit_at, limit_curve, win_rate
from run import Aligned


def softmax(x):
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


# ---- the limit against closed forms ------------------------------------------------------------------------

@pytest.fixture(scope="module")
def counts():
    """The known opinion counts of 32 x 2,048 reviews of the grammar, as if they were responses' rewards."""
    return data.tiny_reviews(32 * 2048, "limit")[2].reshape(32, 2048).astype(float)


def test_drawn_curve_is_the_grammars_closed_form(counts):
    """r* = d log Z / d(1/beta), KL* = r*/beta - log Z, over all that is drawn: to a gain of 3 and more."""
    s, step = 1 / np.geomspace(100, 0.2, 400), 1e-4
    log_z, above, below = (np.array([data.tiny_log_mgf(x) for x in at]) for at in (s, s + step, s - step))
    best = (above - below) / (2 * step)
    curve = limit_curve(counts)
    drawn = curve["supported"]
    error = np.interp(curve["kl"][drawn], s * best - log_z, best) - curve["reward"][drawn]
    assert np.abs(error).max() < 0.1 and curve["reward"][drawn].max() > 3 and not drawn.all()


@pytest.mark.parametrize("beta", [5.0, 1.0, 0.3])
@pytest.mark.parametrize("n, base", [(1, 0), (5, 0), (5, 500)])      # e^(500 / 0.3) is no number
def test_limit_of_n_plus_or_minus_one_slots_is_n_log_cosh(n, base, beta):
    """All 2^n outcomes once each are the distribution itself, so that nothing is left to chance."""
    reward = np.array([[base + sum(slots) for slots in itertools.product((-1, 1), repeat=n)]])
    best, kl, ess, log_z = limit_at(reward, beta)
    cosh, tanh = math.cosh(1 / beta), math.tanh(1 / beta)
    assert best[0] == pytest.approx(base + n * tanh)
    assert log_z[0] == pytest.approx(base / beta + n * math.log(cosh))
    assert kl[0] == pytest.approx(n * (tanh / beta - math.log(cosh)), abs=1e-9)
    assert ess[0] == pytest.approx(2 ** n * (cosh ** 2 / math.cosh(2 / beta)) ** n)


def test_the_optimum_has_the_whole_gain_in_j_and_a_policy_at_the_wrong_temperature_less(counts):
    """Shares of pi*_beta's gain in E r - beta KL; of a reward model's optimum, judged by the oracle, too."""
    def share(beta, own_beta, *shaping):
        best, kl, _, _ = limit_at(shaping[0] if shaping else counts, own_beta, counts)
        one_response = [torch.tensor(x)[:, None] for x in (best, kl, counts.mean(1))]    # (P, 1) each
        return evaluate.share_of_objective(beta, *one_response, counts, *shaping)[0]

    assert share(2.0, 2.0) == pytest.approx(1)
    assert 0 < share(2.0, 4.0) < 0.95 and share(2.0, 1.2) < 0.95
    noise = np.random.default_rng(0).normal(size=counts.shape)
    assert share(2.0, 2.0, counts + noise) == pytest.approx(1)
    assert share(0.05, 0.05) is None                                 # beyond what these samples support


def test_the_kl_needed_for_a_gain_is_that_of_the_limit(counts):
    curve = limit_curve(counts)
    best, kl, _, _ = limit_at(counts, 1.3)
    assert evaluate.kl_needed(best.mean() - counts.mean(), curve) == pytest.approx(kl.mean(), rel=0.01)
    assert evaluate.kl_needed(-0.1, curve) is None and evaluate.kl_needed(100.0, curve) is None


def test_limit_is_monotone_and_concave_with_slope_beta(counts):
    curve = limit_curve(counts, np.geomspace(100, 0.1, 150))
    beta, kl, reward = (curve[name] for name in ("beta", "kl", "reward"))
    assert (np.diff(beta) < 0).all() and (np.diff(kl) > 0).all() and (np.diff(reward) > 0).all()
    slope = np.diff(reward) / np.diff(kl)
    assert (slope <= beta[:-1] * (1 + 1e-6)).all() and (slope >= beta[1:] * (1 - 1e-6)).all()


def test_no_uneven_spending_of_the_kl_beats_one_beta_for_all_prompts():
    random = np.random.default_rng(0)
    reward = random.normal(size=(8, 400)) * random.uniform(0.5, 3, size=(8, 1))
    curve = limit_curve(reward)
    for _ in range(20):
        uneven = [limit_at(reward[[i]], beta) for i, beta in enumerate(random.uniform(0.5, 5, size=8))]
        best, kl = np.mean([point[0] for point in uneven]), np.mean([point[1] for point in uneven])
        assert best <= np.interp(kl, curve["kl"], curve["reward"]) + 1e-3


@pytest.mark.parametrize("prompts_below, supported", [(0, True), (1, True), (2, False)])
def test_the_curve_is_drawn_where_nine_prompts_in_ten_have_50_effective_samples(prompts_below, supported):
    reward = np.zeros((10, 200))
    reward[:, 50:] = -1e6                                            # 50 responses share all weight: ESS = 50
    reward[:prompts_below, 49:] = -1e6
    assert limit_curve(reward, [1.0])["supported"].tolist() == [supported]


def test_beta_is_that_of_the_kl(counts):
    for kl in (0.1, 1.0, 2.0):
        assert limit_at(counts, beta_at(counts, kl))[1].mean() == pytest.approx(kl)
    assert beta_at(counts, math.log(2048) + 0.1) is None
    assert gap_to_limit(counts, np.zeros(32), np.full(32, 9.0)) is None


# ---- no policy passes the limit ----------------------------------------------------------------------------

def test_gap_is_beta_times_the_kl_to_the_optimum():
    """pi_sft uniform over M responses, so a sample of each is exact; any policy, uneven over the prompts."""
    random = np.random.default_rng(0)
    reward = random.normal(size=(4, 30)) * 2 + random.normal(size=(4, 1))
    for sharp in (0.3, 1.0):
        p = softmax(sharp * (0.5 * reward + random.normal(size=reward.shape)))
        r, kl = (p * reward).sum(1), (p * np.log(30 * p)).sum(1)
        gap = gap_to_limit(reward, r, kl)
        beta, best = gap["beta"], softmax(reward / gap["beta"])
        to_best = (p * np.log(p / best)).sum(1)                      # KL(pi || pi*_beta)
        assert gap["gap"] == pytest.approx(beta * to_best.mean())
        assert gap["gap"] == pytest.approx(limit_at(reward, beta)[0].mean() - r.mean())     # vertical
        assert gap["se"] == pytest.approx(beta * to_best.std(ddof=1) / 2)
        assert gap["bias"] == pytest.approx((beta / 2 * (best ** 2).sum(1)).mean())         # beta / (2 ESS)


TEMPERATURE, LENGTH, P, S = 0.5, 30, 48, 16


@pytest.fixture(scope="module")
def world():
    """Responses of 8 slots of +-1, whose pi_sft, pi*_beta and KL are known, sampled as a language model's.

    The P + 1 prompts get steadily better, by one log-odds each.  `policy(share)` has every slot positive
    with the logit 2 share / beta, so that share = 1 is pi*_beta; at TEMPERATURE it is a softmax of
    TEMPERATURE times that logit.
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
    return SimpleNamespace(limit_reward=base[:P] + slots, policy=policy, beta=beta)


def passes(world, reward, kl):
    """The test of the limit: the gap of no policy is negative, beyond chance and the sampled limit's bias."""
    gap = gap_to_limit(world.limit_reward, reward.mean(1), kl)
    return gap["gap"] >= -4 * gap["se"] - gap["bias"]


def test_the_optimum_lies_on_the_limit(world):
    one = world.policy(1.0)
    gap = gap_to_limit(world.limit_reward, one.reward[:P].mean(1), one.kl[:P])
    assert abs(gap["gap"]) <= 4 * gap["se"] + gap["bias"] and gap["se"] < 0.12 and gap["supported"]
    assert gap["beta"] == pytest.approx(world.beta, rel=0.05)
    assert passes(world, one.reward[:P], one.kl[:P])


def test_a_policy_that_wastes_its_kl_lies_below_the_limit(world):
    """Half of the prompts aligned twice as hard, half not at all: more KL for the reward."""
    hard, none = world.policy(2.0), world.policy(0.0)
    even = np.arange(P) % 2 == 0
    reward = np.where(even[:, None], hard.reward[:P], none.reward[:P])
    kl = np.where(even, hard.kl[:P], none.kl[:P])
    gap = gap_to_limit(world.limit_reward, reward.mean(1), kl)
    assert gap["gap"] > 4 * gap["se"] and passes(world, reward, kl)


def test_a_kl_per_token_is_caught(world):
    one = world.policy(1.0)
    assert not passes(world, one.reward[:P], one.kl[:P] / LENGTH)


def test_a_kl_without_the_temperature_is_caught(world):
    one = world.policy(1.0)
    assert not passes(world, one.reward[:P], one.kl_without_temperature[:P])


def test_rewards_of_the_next_prompt_are_caught(world):
    """Where prompts differ.  Rewards shifted in a circle leave every mean as it is, and the gap with it."""
    one = world.policy(1.0)
    assert not passes(world, one.reward[1:], one.kl[:P])
    mean = one.reward[:P].mean(1)
    honest = gap_to_limit(world.limit_reward, mean, one.kl[:P])["gap"]
    assert gap_to_limit(world.limit_reward, np.roll(mean, 1), one.kl[:P])["gap"] == pytest.approx(honest)


def test_the_sampled_limit_is_biased_low_by_the_bias_it_reports():
    """Over 20,000 prompts of 100 responses with Gaussian rewards, log Z = 1 / (2 beta^2)."""
    beta, reward = 0.8, np.random.default_rng(0).normal(size=(20_000, 100))
    _, _, ess, log_z = limit_at(reward, beta)
    below = beta * (1 / (2 * beta ** 2) - log_z)
    expected = (beta / (2 * ess) - beta / 200).mean()                # with equal weights there is none
    assert below.mean() > 10 * below.std() / math.sqrt(20_000)
    assert abs(below.mean() - expected) < 0.2 * expected


# ---- the share of the limit, best-of-n, win rates, the density ratio ---------------------------------------

PASSAGE = ((0, 1), (0.9, 3), (0.525, 2), (3, 4))
ROWS = [{"kl": kl, "reward": reward, "reward_se": 0.05} for kl, reward in PASSAGE]
CURVE = {"kl": np.array([0.0, 1.0, 2.0, 4.0]), "reward": np.array([1.0, 4.0, 5.0, 6.0]), "start": 1.0,
         "supported": np.array([True, True, True, False])}


def test_share_of_the_limit_is_read_at_a_checkpoint_near_the_kl_and_never_between(counts):
    """A method that jumps to a KL of .9 and falls back to .525 has its share at .5 from there."""
    assert evaluate.share_of_limit(0.5, ROWS, CURVE) == pytest.approx((2 - 1) / (3 * 0.525))
    assert evaluate.share_of_limit(1.0, ROWS, CURVE) == pytest.approx((3 - 1) / (3 * 0.9))
    assert evaluate.share_of_limit(2.0, ROWS, CURVE) is None         # no checkpoint is near
    assert evaluate.share_of_limit(3.0, ROWS, CURVE) is None         # beyond the curve that is drawn
    assert evaluate.share_of_limit(0.5, ROWS, CURVE | {"supported": np.zeros(4, bool)}) is None
    curve = limit_curve(counts)
    itself = [{"kl": 0.0, "reward": curve["start"], "reward_se": 0.0}]
    for kl, reward in zip(curve["kl"], curve["reward"]):
        itself.append({"kl": kl, "reward": reward, "reward_se": 0.0})
    for kl in (0.1, 0.5, 1.0, 1.6):
        assert evaluate.share_of_limit(kl, itself, curve) == pytest.approx(1, abs=0.01)


def test_a_share_of_a_gain_that_chance_alone_could_make_is_none(counts):
    noisy = [row | {"reward_se": 0.5} for row in ROWS]               # of a gain of 1.6
    assert evaluate.share_of_limit(0.5, noisy, CURVE) is None
    random = np.random.default_rng(0)
    reward = torch.tensor(random.normal(size=(32, 4)))
    almost_flat = counts * 0.01
    assert evaluate.share_of_objective(2.0, reward, 0 * reward, 0 * reward, almost_flat) == (None, None)


def test_best_of_n_is_the_mean_over_all_choices_of_n(counts):
    reward = np.random.default_rng(0).normal(size=(3, 7))
    reward[0, 1] = reward[0, 0]                                      # a tie
    for n in range(1, 8):
        kl, best = evaluate.best_of_n(reward, n)
        brute = np.mean([max(choice) for row in reward for choice in itertools.combinations(row, n)])
        assert best == pytest.approx(brute) and kl == pytest.approx(math.log(n) - (n - 1) / n)
    ranks, curve = np.arange(4096)[None], limit_curve(counts)
    for n in (2, 8, 64):                                             # of many
        assert evaluate.best_of_n(ranks, n)[1] == pytest.approx(4097 * n / (n + 1) - 1)
        kl, best = evaluate.best_of_n(counts, n)
        assert best <= np.interp(kl, curve["kl"], curve["reward"])   # below the limit


def test_the_kl_of_best_of_n_is_a_bound():
    """By the exact law of the best: ties lower it, and it is reached where all responses differ."""
    ties, fine = np.array([0.5, 0.3, 0.2]), np.full(100_000, 1e-5)   # pi_sft over ascending rewards
    for n in (2, 4, 16):
        bound = evaluate.best_of_n(np.zeros((1, 16)), n)[0]
        best, best_fine = (np.diff(np.append(0, p.cumsum()) ** n) for p in (ties, fine))
        assert (best * np.log(best / ties)).sum() < bound
        assert (best_fine * np.log(best_fine / fine + 1e-300)).sum() == pytest.approx(bound, abs=1e-3)


def test_win_rate_is_over_all_pairs_with_ties_one_half():
    ours, theirs = torch.tensor([[1.0, 2.0], [0.0, 0.0]]), torch.tensor([[1.0, 0.0, 3.0], [0.0, 0.0, -1.0]])
    brute = [float(a > b) + 0.5 * float(a == b) for x, y in zip(ours, theirs) for a in x for b in y]
    assert win_rate(ours, theirs) == pytest.approx(sum(brute) / len(brute)) == pytest.approx(7.5 / 12)
    assert win_rate(ours, theirs) + win_rate(theirs, ours) == pytest.approx(1)
    assert win_rate(ours, ours) == 0.5


def test_at_matched_length_only_pairs_within_a_tenth_count():
    ours, theirs = torch.tensor([[3.0, 0.0]]), torch.tensor([[1.0, 2.0, 4.0]])
    length, their_length = torch.tensor([[40, 10]]), torch.tensor([[10, 44, 45]])
    assert win_rate(ours, theirs, length, their_length) == 0.5       # 3 over 2; 0 below 1; 40 is not near 45
    assert win_rate(ours, theirs, length, 2 * their_length) is None


def test_density_ratio_of_equal_weights_is_one_and_nan_where_no_samples_are():
    s = np.random.default_rng(0).normal(-40, 5, 2000)
    grid = np.linspace(-120, 40, 81)
    ratio = density_ratio(s, np.full(2000, 1 / 2000), grid)
    np.testing.assert_allclose(ratio[np.abs(grid + 40) < 10], 1)
    assert np.isnan(ratio[np.abs(grid + 40) > 30]).all()


def test_density_ratio_follows_a_known_tilt():
    """pi / pi_sft = exp(tilt * s) / Z, within the kernel's smoothing, whatever else the weights depend on."""
    random = np.random.default_rng(0)
    s, noise, tilt = random.normal(size=4096), random.normal(size=4096), 0.5
    weight = softmax(tilt * s + 0.3 * noise)
    grid = np.linspace(-1.5, 1.5, 13)
    np.testing.assert_allclose(density_ratio(s, weight, grid), np.exp(tilt * grid - tilt ** 2 / 2), rtol=0.12)


# ---- a row of eval.csv -------------------------------------------------------------------------------------

def test_every_prompt_is_measured_on_responses_of_its_own_however_many_rows_at_once(gpt):
    def measure(rows):
        return evaluate.measure(gpt, gpt, lambda ids, mask: ids[:, 0].float(), [[1, 2], [3], [4, 5, 6]], 4, 6,
                                1.0, 0, torch.Generator().manual_seed(0), rows)
    measured, at_once = measure(5), measure(100)
    assert measured["reward"].tolist() == [[1.0] * 4, [3.0] * 4, [4.0] * 4]
    assert measured["kl"].abs().max() < 1e-5 and measured["k1"].shape == (3, 4)
    assert (measured["ids"] == at_once["ids"]).all() and len(measured["ids"].flatten(0, 1).unique(dim=0)) > 9


def test_copies_of_a_sample_do_not_shrink_its_standard_error():
    random = torch.Generator().manual_seed(0)
    reward = torch.randn(40, 1, generator=random) + 0.5 * torch.randn(40, 3, generator=random)
    once = {"ids": torch.randint(1, 20, (40, 3, 9), generator=random), "mask": torch.ones(40, 3, 9) > 0,
            "reward": reward, "kl": 2 * reward, "k1": reward}
    one = evaluate.summary(once, 0)
    two = evaluate.summary({name: torch.cat([column, column], dim=1) for name, column in once.items()}, 0)
    for of_all_copies in ("distinct2", "within_prompt_sd"):
        assert two.pop(of_all_copies) < one.pop(of_all_copies)
    assert two == pytest.approx(one)
    assert one["reward_se"] == pytest.approx(float(reward.mean(1).std()) / math.sqrt(40))
    assert one["kl_se"] == pytest.approx(2 * one["reward_se"])


def test_a_csv_that_is_cut_short_is_named(tmp_path):
    (tmp_path / "eval.csv").write_text("step,kl\n1,0.25\n2,0.")
    with pytest.raises(UserError, match="eval.csv is cut short"):
        evaluate.read_csv(tmp_path / "eval.csv")


def test_a_row_holds_the_plain_means():
    ids = torch.tensor([[[9, 1, 2, 0, 0], [7, 1, 2, 3, 1]], [[8, 1, 1, 1, 0], [8, 0, 0, 0, 0]]])
    mask = torch.tensor([[[0, 1, 1, 1, 0], [0, 1, 1, 1, 1]], [[0, 1, 1, 1, 1], [0, 1, 0, 0, 0]]]) > 0
    reward = torch.tensor([[0.0, 2.0], [-1.0, 1.0]])
    measured = {"ids": ids, "mask": mask, "reward": reward, "kl": reward + 1, "k1": reward + 2}
    row = evaluate.summary(measured, eos_id=0)
    assert row["reward"] == 0.5 and row["kl"] == 1.5 and row["kl_k1"] == 2.5
    assert row["length"] == 3.0 and row["ended"] == 0.75             # 3 4 4 1; the second is cut
    assert row["accuracy"] == pytest.approx(float(reward.sigmoid().mean()))
    assert row["distinct2"] == 6 / 8                                 # 12 20 | 12 23 31 | 11 11 10 | none
    assert row["within_prompt_sd"] == pytest.approx(math.sqrt(2))         # of both prompts
    names = "reward reward_se accuracy kl kl_se kl_k1 within_prompt_sd length ended distinct2"
    assert list(row) == names.split()


def test_distinct_pairs_are_counted_once_whoever_wrote_them():
    ids = torch.randint(50257, (4, 3, 200), generator=rng("distinct")) % 300
    mask = torch.rand(ids.shape, generator=rng("mask")) < 0.9
    pairs = []
    for row, on in zip(ids.flatten(0, 1).tolist(), mask.flatten(0, 1).tolist()):
        pairs += [row[t:t + 2] for t in range(199) if on[t] and on[t + 1]]
    assert evaluate.distinct2(ids, mask) == len({tuple(pair) for pair in pairs}) / len(pairs) < 1


# ---- figures -----------------------------------------------------------------------------------------------

def aligned(method, feedback="preferences", K=0, seed=0, **settings):
    about = {"method": method, "feedback": feedback, "K": K, "beta_pi": 0.5, "beta_r": 1.0,
             "alpha": 0.001 if method == "xpo" else 0.0, "lr": 1e-4, "rounds": 1,
             "labels": "bt", "steps": 18, "seed": seed} | settings
    rows = [{"step": 9.0 * i, "kl": 1.0 * i, "reward": 2.0 * i} for i in range(3)]
    return Aligned(Path("anything"), about, rows, None)


SETTINGS = ((), ("reward", 2), ("reward", 4), ("reward", 8))
EVERY = [aligned(method, *setting) for setting in SETTINGS for method in ("exo", "dpo")]
EVERY += [aligned("ppo", "reward"), aligned("xpo"), aligned("xpo", alpha=0)]


def test_every_line_has_a_name_and_a_look_of_its_own():
    groups = figures.grouped([*EVERY, aligned("exo", seed=1)])       # another seed is the same line
    assert [group.label for group in groups] == [
        "EXO-pref", "DPO-pref", "EXO-rw K=2", "DPO-rw K=2", "EXO-rw K=4", "DPO-rw K=4", "EXO-rw K=8",
        "DPO-rw K=8", "PPO", "XPO", "online DPO"]
    assert [len(group.members) for group in groups] == [2] + [1] * 10
    other = figures.grouped([aligned("exo"), aligned("exo", lr=1)])[1]
    assert len({tuple(group.look.items()) for group in [*groups, other]}) == 12
    assert len(set(figures.COLORS.values())) == len(figures.COLORS)
    for group in groups:
        assert group.look["color"] == figures.COLORS[group.family[0]]
        assert (group.look["linestyle"] == "--") == (group.family[1] == "preferences")


def test_a_label_names_the_settings_of_which_a_run_has_several():
    groups = figures.grouped([
        aligned("exo"), aligned("exo", beta_pi=0.1), aligned("dpo", lr=3e-4), aligned("ppo", "reward", lr=1),
        aligned("xpo"), aligned("xpo", alpha=0.1), aligned("xpo", alpha=0)])
    assert [group.label for group in groups] == ["EXO-pref βπ=0.5", "EXO-pref βπ=0.1", "DPO-pref", "PPO",
                                                 "XPO α=0.001", "XPO α=0.1", "online DPO"]


def test_the_frontier_has_six_lines_at_most_and_another_picture_has_all(tmp_path, monkeypatch):
    limit_reward = np.random.default_rng(0).normal(size=(4, 500))

    def labels(alignments, own):
        pictures, cfg = {}, SimpleNamespace(eval_split="test")
        run = SimpleNamespace(folder=tmp_path, judged_by="rm" if own else "oracle", cfg=cfg)
        monkeypatch.setattr(figures, "save", lambda figure, path: pictures.update({path.name: figure}))
        groups, curve = figures.grouped(alignments), limit_curve(limit_reward)
        figures.frontier(run, groups, {"reward": limit_reward}, curve)
        return {name: [line.get_label() for line in one.axes[0].lines[1:]] for name, one in pictures.items()}

    pictures = labels(EVERY, own=False)
    best = "best of n by the oracle (KL: upper bound)"
    assert pictures["frontier.png"] == [best, "EXO-rw K=4", "DPO-rw K=4", "PPO", "XPO"]
    assert len(pictures["frontier-all.png"]) == 12
    best = "best of n by the reward model (KL: upper bound)"
    few = [aligned("dpo"), aligned("exo", beta_r=2), aligned("exo"), aligned("exo", seed=1)]
    assert labels(few, own=True) == {
        "frontier.png": [best, "EXO-pref βr=1.0, 2 seeds", "DPO-pref", "EXO-pref βr=2"]}
    points = (tmp_path / "frontier.csv").read_text().splitlines()
    assert points[0] == "curve,seed,kl,reward,beta_or_n_or_step"
    assert points[-1] == "EXO-pref βr=1.0,1,2.0,4.0,18.0"
