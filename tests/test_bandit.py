"""What the papers claim of the losses, where it is exact: the bandits of `toy/`, xpo_loss and its replay."""
import math

import pytest
import torch

from dpo import dpo_loss, dpo_reward_loss
from exo import exo_loss, exo_pref_loss
from toy import bandit as toy
from toy import xpo_bandit
from xpo import Replay, xpo_loss


@pytest.fixture(scope="module")
def bandits():
    """24 instances of 24 arms."""
    return toy.random_bandits()


@pytest.fixture(scope="module")
def small():
    """24 instances of 6 arms and the full softmax fitted to them by every method; beta = 0.25."""
    bandit = toy.random_bandits(V=6)
    return bandit, toy.recover(bandit, Ks=(2, 8))


# ---- the truth itself --------------------------------------------------------------------------------------------------------

def test_optimum_has_the_highest_objective(bandits):
    best = toy.objective(bandits, toy.log_optimum(bandits, 0.3), 0.3)
    log_Z = (bandits.ref_logp + bandits.reward / 0.3).logsumexp(-1)
    torch.testing.assert_close(best, 0.3 * log_Z)                    # J(pi*) = beta log Z
    for seed in range(5):
        other = toy.softmax_policy(toy.near_reference(bandits, seed=seed))
        gap = best - toy.objective(bandits, other, 0.3)
        torch.testing.assert_close(gap, 0.3 * toy.kl(other, toy.log_optimum(bandits, 0.3)))      # J = -beta KL + const
        assert (gap > 0).all()


@pytest.mark.parametrize("beta_r, beta_pi", [(0.5, 1.0), (0.5, 0.5), (0.1, 0.1), (1.0, 0.3)])
def test_theorem_3_1_and_eq_11(beta_r, beta_pi):
    """The generalised objective has the optimum pi*_beta, beta = beta_r beta_pi, and is a reverse KL; it is not J itself."""
    result = toy.generalised_objective(toy.random_bandits(B=8), beta_r, beta_pi)
    assert result["tv"].max() < 1e-4
    assert result["eq11"].max() < 1e-12
    if beta_pi == 1:
        assert result["cosine"].min() > 1 - 1e-9
    else:
        assert 0.8 < result["cosine"].min() and result["cosine"].max() < 0.999


# ---- Theorems 3.2 and 3.3 ----------------------------------------------------------------------------------------------------

def test_gradients_against_K(bandits):
    """EXO's expected gradient nears the RL gradient like 1/K, in every instance; DPO-rw's nears the forward KL's instead."""
    Ks = (2, 4, 16, 64, 256, 1024)
    study = toy.gradient_study(bandits, beta_r=0.1, beta_pi=0.1, Ks=Ks)
    exo, dpo, K = study["exo"], study["dpo"], torch.tensor(Ks)[:, None]
    bias_K = exo["bias"] * K
    assert 0.9 <= bias_K.min() and bias_K.max() <= 1.15
    assert exo["cos_rl"].min() > 0.99                                # so that the bias is one of scale
    assert (exo["sd"] * K ** 0.5)[3:].std(0).max() < 0.2             # K responses cost what K draws cost
    assert dpo["cos_rl"][0].min() >= 0.85                            # at K = 2 DPO-rw points where RL does
    assert dpo["cos_rl"][4].median() <= 0.5 and dpo["cos_rl"][4].max() < 0.85                    # by K = 256 no more
    assert dpo["cos_limit"][0].median() < 0.5 and dpo["cos_limit"][5].min() > 0.99
    assert dpo["bias"][5].max() < 0.02


def test_gradient_study_at_K_2_is_the_enumeration(bandits):
    """The estimate behind the test above, against the exact expectation over all V * V groups, by autograd on the loss."""
    pairs = torch.cartesian_prod(torch.arange(24), torch.arange(24)).expand(24, -1, -1)
    weight = toy.take(bandits.ref_logp, pairs).sum(-1).exp()                                     # (B * V * V,)
    study = toy.gradient_study(bandits, Ks=(2,))
    for name, loss, which in (("exo", exo_loss, 0), ("dpo", dpo_reward_loss, 1)):
        logits = toy.near_reference(bandits).requires_grad_()
        rows = [toy.take(values, pairs) for values in (toy.softmax_policy(logits), bandits.ref_logp, bandits.reward)]
        grad, = torch.autograd.grad(weight @ toy.per_row(loss, *rows, beta_r=0.1, beta_pi=0.1), logits)
        limits = toy.limit_gradients(bandits, logits.detach(), 0.1, 0.1)
        bias = (grad - limits[which]).norm(dim=-1) / limits[which].norm(dim=-1)
        torch.testing.assert_close(study[name]["bias"][0], bias, atol=0.03, rtol=0)


def test_rl_gradient_is_that_of_the_generalised_objective(bandits):
    logits = toy.near_reference(bandits).requires_grad_()
    J_gen = toy.general_objective(bandits, toy.softmax_policy(logits), 0.1, 0.5)
    grad, = torch.autograd.grad(-J_gen.sum() / 0.1, logits)
    torch.testing.assert_close(toy.limit_gradients(bandits, logits, 0.1, 0.5)[0], grad)


def test_equal_candidates_may_be_merged(bandits):
    """What makes K = 1024 cheap: c equal candidates are one with log c more in both softmaxes."""
    groups = toy.draw_groups(bandits, 1, 8)                                                      # (B, 1, 8)
    counts = torch.zeros(24, 1, 24, dtype=torch.float64).scatter_add_(-1, groups, torch.ones(24, 1, 8, dtype=torch.float64))
    for loss in (exo_loss, dpo_reward_loss):
        logits = toy.near_reference(bandits).requires_grad_()
        value = toy.reward_loss(loss, bandits, toy.softmax_policy(logits), groups, beta_r=0.2, beta_pi=0.5)
        grad, = torch.autograd.grad(24 * value, logits)
        merged = toy.group_gradients(loss, bandits, logits.detach(), counts, beta_r=0.2, beta_pi=0.5)
        torch.testing.assert_close(merged[:, 0], grad)


# ---- what recovers pi*, and what does not ------------------------------------------------------------------------------------

def test_what_recovers_the_optimum(small):
    bandit, fits = small
    optimum = toy.log_optimum(bandit, 0.25)
    exact = ["exact reverse KL", "exact forward KL", "policy gradient on J", "EXO-rw, K = 2", "EXO-rw, K = 8", "DPO-rw, K = 2",
             "DPO-rw, K = 8", "DPO-pref, bt labels", "XPO, alpha/beta = 0"]
    for name in exact:
        assert toy.tv(fits[name], optimum).max() <= 1e-3, name


def test_what_does_not(small):
    """By how much: medians over the 24 instances, and at least something in every one."""
    bandit, fits = small
    optimum = toy.log_optimum(bandit, 0.25)
    distance = {name: toy.tv(logp, optimum) for name, logp in fits.items()}
    stated = {"EXO-pref, bt labels": (0.172, 0.01), "DPO-pref, argmax labels": (0.228, 0.01),
              "EXO-pref, argmax labels": (0.228, 0.01), "XPO, alpha/beta = 0.001": (3.8e-3, 5e-4),
              "XPO, alpha/beta = 0.003": (1.22e-2, 1e-3)}
    for name, (median, tolerance) in stated.items():
        assert distance[name].quantile(0.5).item() == pytest.approx(median, abs=tolerance), name
        assert distance[name].min() > 3e-4, name
    one_hot = 1 - optimum.exp().gather(1, bandit.reward.argmax(-1, keepdim=True))[:, 0]
    for name in ("DPO-pref, argmax labels", "EXO-pref, argmax labels"):                          # they chase the best arm alone
        torch.testing.assert_close(distance[name], one_hot, atol=1e-3, rtol=0)
    assert (distance["EXO-pref, best beta_pi"] < 0.01).all()          # EXO-pref's error is mostly one of temperature ...
    assert (distance["EXO-pref, best beta_pi"] > 4e-4).all()          # ... but not only


def test_exo_pref_margin():
    """On a single pair EXO-pref's population minimiser is (2p - 1) log((1 - eps) / eps), DPO's is logit(p) = r_w - r_l."""
    bandit = toy.Bandit(torch.tensor([[0.5, 0.5]], dtype=torch.float64).log(), torch.tensor([[1.0, 0.0]], dtype=torch.float64))
    p = torch.tensor(1.0, dtype=torch.float64).sigmoid()
    for loss, settings, margin in ((exo_pref_loss, dict(beta_pi=0.5, eps=1e-3), (2 * p - 1) * math.log(0.999 / 0.001)),
                                   (dpo_loss, dict(beta=0.5), p.logit())):
        logp = toy.fit(lambda logp, loss=loss, settings=settings: toy.pair_loss(loss, bandit, logp, "bt", **settings),
                       bandit.ref_logp)
        torch.testing.assert_close(0.5 * (logp[0, 0] - logp[0, 1]), margin, atol=1e-5, rtol=0)


def test_too_large_a_bonus_has_no_floor(small):
    """Without a box on the reward XPO's objective falls for ever towards the arm that the reference draws least."""
    bandit, _ = small
    rarest = torch.nn.functional.one_hot(bandit.ref_logp.argmin(-1), 6)
    values = [toy.pair_loss(toy.expected_xpo_loss, bandit, toy.softmax_policy(bandit.ref_logp + t * rarest), "bt", beta=0.25,
                            alpha=0.2 * 0.25) for t in (0, 100, 200, 300)]
    drops = torch.stack(values).diff()
    assert (drops < -1).all() and drops[2].item() == pytest.approx(drops[1].item(), rel=1e-3)


# ---- a policy that cannot represent pi* --------------------------------------------------------------------------------------

def test_reverse_kl_seeks_the_mode_and_forward_kl_the_mean():
    fits = toy.mode_fits(Ks=(2, 32))
    assert toy.masses(fits["reverse KL"][0][0])[0] >= 0.99           # main mode
    assert toy.masses(fits["forward KL"][0][0])[2] >= 0.35           # between and beyond the modes
    reverse_minima, losses = fits["reverse KL"]
    assert len(losses) == 2 and losses[0] == pytest.approx(-math.log(0.65), abs=1e-3)            # ln of the mode's weight
    assert toy.masses(reverse_minima[1])[1] >= 0.99 and losses[1] == pytest.approx(-math.log(0.35), abs=1e-3)
    assert len(fits["forward KL"][1]) == 1
    assert toy.masses(fits["EXO-rw, K = 32"][0][0])[0] >= 0.99       # EXO-rw follows the reverse KL at large K,
    assert toy.masses(fits["EXO-rw, K = 2"][0][0])[0] <= 0.4         # but covers both modes at K = 2
    for K in (2, 32):
        assert toy.masses(fits[f"DPO-rw, K = {K}"][0][0])[2] >= 0.35


def test_ablation_of_the_two_betas():
    """Full softmax: only the product counts.  Unimodal: moving beta_r is not moving beta_pi, and beta_pi = 1 loses nothing."""
    bandit = toy.smooth_bandits()
    result = toy.ablation(bandit)
    torch.testing.assert_close(result["beta_r", "softmax"]["reward"], result["beta_pi", "softmax"]["reward"])
    for (_, family), rows in result.items():                         # lowering either raises reward and KL, on average
        assert (rows["reward"].mean(1).diff() < 0).all() and (rows["kl"].mean(1).diff() < 0).all(), family
        assert (rows["lost"] >= -1e-12).all()
    lost = {series: result[series, "unimodal"]["lost"].mean(1) for series in ("beta_r", "beta_pi")}
    assert lost["beta_pi"][3] == 0                                   # beta_pi = 1 is J_beta itself
    assert lost["beta_pi"][0] > 10 * lost["beta_r"][0]               # same beta = 0.05: low beta_r costs far less


# ---- XPO in the bandit -------------------------------------------------------------------------------------------------------

def test_lower_bound():
    """Prop 2.1: online DPO waits for about 1 / pi_sft(a) rounds, XPO for one; a small bonus tries the arm and may lose it."""
    medians = []
    for beta in (0.05, 0.03):
        first, _ = xpo_bandit.two_arms(beta, 0.0, rounds=1500)
        medians.append(first.median().item())
        assert 0.3 < medians[-1] * math.exp(-1 / (8 * beta)) < 1.5   # rounds in units of 1 / pi_sft(a)
        for ratio in (1e-4, 1.0):
            first, gap = xpo_bandit.two_arms(beta, ratio * beta)
            assert (first == 1).float().mean() > 0.9                 # the others: a was drawn at once, and lost by its label
            assert gap.max() < 0.01 if ratio == 1 else gap.mean() > 0.015
    assert medians[1] > 3 * medians[0]


def test_argmin_on_a_grid_agrees_with_adam():
    """The two solvers of Algorithm 1's argmin, on a two-arm history."""
    ref_logp = torch.tensor([0.1, 0.9]).log()
    pairs = dict(run=torch.zeros(10, dtype=torch.long), chosen=torch.tensor([0] * 6 + [1] * 4),
                 rejected=torch.tensor([1] * 6 + [0] * 4), explore=torch.tensor([1] * 6 + [0] * 4))
    history = xpo_bandit.merge(pairs, 2, 10)
    assert len(history["run"]) == 2 and history["weight"].tolist() == pytest.approx([0.6, 0.4])
    r, loss = xpo_bandit.argmin(history, torch.full((1, 2), 0.5), ref_logp, 0.3, torch.tensor([0.03]), R_max=1.0)
    d = torch.linspace(-1, 1, 4001)
    logp = (ref_logp + torch.stack([d, -d], 1) / 0.6).log_softmax(-1)
    arms = torch.stack([pairs["chosen"], pairs["rejected"]], 1)
    grid = torch.stack([xpo_loss(row[arms], ref_logp[arms], row[pairs["explore"]], beta=0.3, alpha=0.03) for row in logp])
    assert loss.item() == pytest.approx(grid.min().item(), abs=1e-5)
    assert (r[0, 0] - r[0, 1]).item() == pytest.approx(d[grid.argmin()].item(), abs=5e-3)


def test_argmin_stays_in_the_box_and_out_of_poor_local_minima():
    """At a large bonus, where the objective has many minima: random starts find nothing much lower."""
    problem, r, loss = xpo_bandit.explore(xpo_bandit.twelve_arms(), (0.4,), rounds=1, seeds=64)["solved"]
    assert r.min() == 0 and r.max() == 3                             # the bonus goes as far as the box lets it
    for seed in range(3):
        start = 3 * torch.rand(r.shape, generator=torch.Generator().manual_seed(seed))
        _, other = xpo_bandit.argmin(problem[0], start, *problem[2:])
        assert (loss - other).quantile(0.9) < 0.01


def separated(low, high):
    """Whether one 95% interval lies wholly below the other."""
    (low_mean, low_half), (high_mean, high_half) = xpo_bandit.mean_ci(low), xpo_bandit.mean_ci(high)
    return bool(low_mean + low_half < high_mean - high_half)


@pytest.mark.slow
def test_the_bonus_finds_the_rare_arm_and_too_much_of_it_harms():
    result = xpo_bandit.explore(xpo_bandit.twelve_arms(), (0.0, 0.01, 0.1))
    online_dpo, xpo, too_much = result["gap"]
    assert xpo.mean() < 0.11 and online_dpo.mean() > 0.27 and separated(xpo, online_dpo)
    assert result["drew"][0].mean() < 0.5 and result["drew"][1].mean() > 0.95
    assert separated(online_dpo, too_much)
    problem, r, loss = result["solved"]                              # the argmin is one: a longer search finds nothing lower
    start = 3 * torch.rand(r.shape, generator=torch.Generator().manual_seed(0))
    for init in (r, start):
        _, longer = xpo_bandit.argmin(problem[0], init, *problem[2:], steps=400)
        assert (loss - longer).mean() < 1e-3 and (loss - longer).quantile(0.95) < 5e-3


@pytest.mark.slow
def test_control_where_the_reference_covers_the_best_arm():
    online_dpo, xpo = xpo_bandit.explore(xpo_bandit.twelve_arms(rare=0.011), (0.0, 0.003))["gap"]
    assert not separated(xpo, online_dpo) and not separated(online_dpo, xpo)
    assert online_dpo.mean() < 0.08 and xpo.mean() < 0.08


def test_the_bonus_beats_online_dpo():
    """The first slow test above in small: fewer rounds, 128 seeds."""
    online_dpo, xpo = xpo_bandit.explore(xpo_bandit.twelve_arms(), (0.0, 0.003), rounds=8, seeds=128)["gap"]
    assert separated(xpo, online_dpo) and xpo.mean() < 0.6 * online_dpo.mean()


# ---- xpo_loss and its replay -------------------------------------------------------------------------------------------------

def pair_batch(B=5, seed=0):
    return torch.randn(2, B, 2, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_xpo_loss_without_bonus_is_dpo():
    logp, ref_logp = pair_batch()
    assert xpo_loss(logp, ref_logp, logp[:, 1], beta=0.3, alpha=0) == dpo_loss(logp, ref_logp, beta=0.3)


def test_bonus_pushes_away_from_the_reference_sample():
    """Minimising adds alpha / B to the gradient of each log pi(y~), chosen or not: down goes its probability."""
    logp, ref_logp = pair_batch()
    logp.requires_grad_()
    column = torch.tensor([0, 1, 1, 0, 1])
    explore = logp[torch.arange(5), column]
    with_bonus, = torch.autograd.grad(xpo_loss(logp, ref_logp, explore, beta=0.3, alpha=0.02), logp)
    without, = torch.autograd.grad(dpo_loss(logp, ref_logp, beta=0.3), logp)
    expected = 0.02 / 5 * torch.nn.functional.one_hot(column, 2).double()
    torch.testing.assert_close(with_bonus - without, expected)


@pytest.mark.parametrize("alpha", [-1e-3, math.inf, math.nan])
def test_xpo_loss_refuses_what_is_no_price(alpha):
    logp, ref_logp = pair_batch()
    with pytest.raises(ValueError, match="alpha must be finite and not negative"):
        xpo_loss(logp, ref_logp, logp[:, 0], alpha=alpha)


@pytest.mark.parametrize("explore", [torch.zeros(5, 2), torch.zeros(4), torch.zeros(())])
def test_xpo_loss_refuses_other_shapes(explore):
    logp, ref_logp = pair_batch()
    with pytest.raises(ValueError, match="explore_logp must have a number for each pair"):
        xpo_loss(logp, ref_logp, explore)


def filled_replay():
    replay = Replay()
    for t in range(3):
        replay.append(chosen=torch.arange(4) + 10 * t, ref_logp=torch.randn(4, 2, generator=torch.Generator().manual_seed(t)))
    return replay


def test_replay_keeps_every_pair_of_every_round_in_its_order():
    replay = filled_replay()
    assert len(Replay()) == 0 and len(replay) == 12
    assert replay.data["chosen"].tolist() == [0, 1, 2, 3, 10, 11, 12, 13, 20, 21, 22, 23]
    for t in range(3):                                               # the columns of a pair stay together
        expected = torch.randn(4, 2, generator=torch.Generator().manual_seed(t))
        assert torch.equal(replay.data["ref_logp"][4 * t:4 * t + 4], expected)


def test_replay_survives_a_file(tmp_path):
    replay, copy = filled_replay(), Replay()
    torch.save(replay.state_dict(), tmp_path / "replay.pt")
    copy.load_state_dict(torch.load(tmp_path / "replay.pt", weights_only=True))
    for one in (replay, copy):
        one.append(chosen=torch.tensor([7]), ref_logp=torch.zeros(1, 2))
    assert len(copy) == 13 and all(torch.equal(replay.data[name], copy.data[name]) for name in replay.data)


def test_replay_refuses_pairs_that_do_not_fit():
    replay = filled_replay()
    for pairs in (dict(chosen=torch.zeros(2)), dict(chosen=torch.zeros(2), ref_logp=torch.zeros(3, 2))):
        with pytest.raises(ValueError, match="a round's pairs must be tensors of equal length named"):
            replay.append(**pairs)
    assert len(replay) == 12
