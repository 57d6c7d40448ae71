"""What the papers claim of the losses, checked where it is exact: the bandits of `toy/`; and xpo_loss."""
import math
from functools import partial

import pytest
import torch
import torch.nn.functional as F

from dpo import dpo_loss, dpo_reward_loss
from exo import exo_loss, exo_pref_loss
from toy import bandit as toy
from toy import xpo_bandit
from xpo import xpo_loss

BANDIT = toy.random_bandits()                             # 24 instances of 24 arms
SMALL = toy.random_bandits(V=6)                           # 24 instances of 6 arms
EXO, DPO = "EXO-rw", "DPO-rw"

each_reward_loss = pytest.mark.parametrize("loss", [exo_loss, dpo_reward_loss])


# ---- the optimum, Theorems 3.1 to 3.3 ---------------------------------------------------------------------

def test_optimum_has_the_highest_objective():
    optimum = toy.log_optimum(BANDIT, 0.3)
    log_Z = (BANDIT.ref_logp + BANDIT.reward / 0.3).logsumexp(-1)
    torch.testing.assert_close(toy.objective(BANDIT, optimum, 0.3), 0.3 * log_Z)         # beta log Z
    for seed in range(5):
        other = toy.softmax_policy(toy.near_reference(BANDIT, seed=seed))
        gap = toy.suboptimality(BANDIT, other, 0.3)
        torch.testing.assert_close(gap, 0.3 * toy.kl(other, optimum))
        assert (gap > 0).all()


@pytest.mark.parametrize("beta_r, beta_pi", [(0.5, 1.0), (0.5, 0.5), (0.1, 0.1)])
def test_theorem_3_1_and_eq_11(beta_r, beta_pi):
    """J_gen has the optimum pi*_beta, beta = beta_r beta_pi, and is a reverse KL; at beta_pi = 1 it is J."""
    bandit = toy.random_bandits(B=8)
    result = toy.generalized_objective(bandit, beta_r, beta_pi)
    assert result["tv"].max() < 1e-4
    assert result["eq11"].max() < 1e-12
    lowest, highest = (1 - 1e-9, 1 + 1e-9) if beta_pi == 1 else (0.8, 0.999)
    assert lowest < result["cosine"].min() and result["cosine"].max() < highest
    logits = toy.near_reference(bandit).requires_grad_()
    J_gen = toy.general_objective(bandit, toy.softmax_policy(logits), beta_r, beta_pi)
    limit = toy.limit_gradients(bandit, logits, beta_r, beta_pi)[EXO]           # the reverse KL's gradient
    torch.testing.assert_close(limit, toy.grad(-J_gen / beta_r, logits))


def test_gradients_against_K():
    """EXO's expected gradient approaches RL's like 1/K, in every instance; DPO-rw's the forward KL's."""
    Ks = (2, 16, 256, 1024)
    study = toy.gradient_study(BANDIT, beta_r=0.1, beta_pi=0.1, Ks=Ks, G=2048)
    for K in Ks:
        bias = K * study[EXO, K]["bias"]
        assert 0.9 <= bias.min() and bias.max() <= 1.15
        assert study[EXO, K]["cos_rl"].min() > 0.99       # so the bias is one of scale
    noise = torch.stack([study[EXO, K]["sd"] * K ** 0.5 for K in Ks[1:]])       # (3, B)
    assert noise.std(0).max() < 0.2                       # it falls like 1 / sqrt(K)

    assert study[DPO, 2]["cos_rl"].min() >= 0.85          # at K = 2 DPO-rw points where RL does
    assert study[DPO, 2]["cos_limit"].median() < 0.5
    assert study[DPO, 256]["cos_rl"].median() <= 0.5      # by K = 256 it no longer does
    assert study[DPO, 1024]["cos_limit"].min() > 0.99
    assert study[DPO, 1024]["bias"].max() < 0.02


# ---- which losses recover pi* -----------------------------------------------------------------------------

def test_what_recovers_the_optimum_and_what_does_not():
    """The total variation from each loss's minimizer to pi*, beta = 0.25, in 24 instances."""
    optimum = toy.log_optimum(SMALL, 0.25)
    fits = toy.recover(SMALL, Ks=(2, 8), alphas=(0.001, 0.003))
    distance = {name: toy.tv(logp, optimum) for name, logp in fits.items()}
    medians = {"EXO-pref, bt labels": 0.172, "EXO-pref, best beta_pi": 0.0015,
               "DPO-pref, argmax labels": 0.228, "EXO-pref, argmax labels": 0.228,
               "XPO, alpha/beta = 0.001": 0.0038, "XPO, alpha/beta = 0.003": 0.0122}
    for name, median in medians.items():
        missed = distance.pop(name)
        assert missed.quantile(0.5).item() == pytest.approx(median, rel=0.1) and missed.min() > 3e-4, name
        if "argmax" in name:                              # it ends on the best arm alone
            off_best = 1 - optimum.exp().gather(1, SMALL.reward.argmax(-1, keepdim=True))[:, 0]     # (B,)
            torch.testing.assert_close(missed, off_best, atol=1e-3, rtol=0)
    assert max(tv.max() for tv in distance.values()) < 1e-4             # the other losses recover it


def test_margin_of_a_single_pair():
    """EXO-pref's minimizer over both labels is (2p - 1) log((1 - eps) / eps), DPO's logit(p) = r_w - r_l."""
    p = 1 / (1 + math.exp(-1))                            # that the first arm wins
    bandit = toy.Bandit(torch.full((1, 2), 0.5).double().log(), torch.tensor([[1.0, 0.0]]).double())
    exo = (exo_pref_loss, {"beta_pi": 0.5, "eps": 1e-3}, (2 * p - 1) * math.log(999))
    dpo = (dpo_loss, {"beta": 0.5}, 1.0)
    for loss, settings, margin in (exo, dpo):
        expected = partial(toy.pair_loss, loss, bandit, labels="bt", **settings)
        logp = toy.fit(expected, bandit.ref_logp)
        assert 0.5 * (logp[0, 0] - logp[0, 1]).item() == pytest.approx(margin, abs=1e-5)


# ---- responses of another policy than pi_sft (--rounds) ---------------------------------------------------

@pytest.mark.parametrize("K", [2, 4, 8])
def test_at_its_own_proposal_exo_is_rloo(K):
    """dL/dlogp = (K - 1) beta_pi / (K beta_r) times the gradient of leave-one-out REINFORCE."""
    beta_r, beta_pi = 0.7, 0.4
    logp, R = torch.randn(2, 5, K, generator=torch.Generator().manual_seed(K), dtype=torch.float64)
    logp.requires_grad_()
    exo = torch.autograd.grad(exo_loss(logp, logp.detach(), R, beta_r, beta_pi), logp)[0]
    others = (R.sum(1, keepdim=True) - R) / (K - 1)       # (B, K) the mean of the others
    rloo = torch.autograd.grad(-((R - others) * logp).mean(1).mean(), logp)[0]
    torch.testing.assert_close(exo, (K - 1) * beta_pi / (K * beta_r) * rloo, rtol=1e-9, atol=1e-12)


@each_reward_loss
@pytest.mark.parametrize("K", [2, 8])
def test_whoever_drew_the_responses_the_minimizer_is_the_optimum(loss, K):
    """With q as the loss's reference and R = r - beta (log q - log pi_sft); with r alone it is another."""
    bandit = toy.random_bandits(B=6, V=6)
    logq = toy.softmax_policy(toy.near_reference(bandit, spread=1.0, seed=3))   # (B, V) far from pi_sft

    def minimizer(reward):
        from_q = toy.Bandit(logq, reward)
        groups = toy.sample_groups(from_q, 256, K)
        return toy.fit(partial(toy.reward_loss, loss, from_q, groups=groups, beta_r=0.5, beta_pi=0.5), logq)

    optimum = toy.log_optimum(bandit, 0.25)
    paid = bandit.reward - 0.25 * (logq - bandit.ref_logp)
    assert toy.tv(minimizer(paid), optimum).max() < 1e-4
    assert toy.tv(minimizer(bandit.reward), optimum).mean() > 0.15


# ---- a policy that cannot represent pi* -------------------------------------------------------------------

def test_reverse_kl_seeks_the_mode_and_forward_kl_the_mean():
    fits = toy.mode_fits(Ks=(2, 32))
    minima, losses = fits["reverse KL"]
    assert losses == pytest.approx([-math.log(0.65), -math.log(0.35)], abs=1e-3)      # the modes
    assert toy.masses(minima[0])[0] >= 0.99               # all on the main mode
    assert toy.masses(minima[1])[1] >= 0.99               # or all on the minor one
    assert len(fits["forward KL"][0]) == 1
    assert toy.masses(fits["EXO-rw, K = 32"][0][0])[0] >= 0.99                  # follows the reverse KL
    assert toy.masses(fits["EXO-rw, K = 2"][0][0])[0] <= 0.4                    # at K = 2 it covers both
    for name in ("forward KL", "DPO-rw, K = 2", "DPO-rw, K = 32"):
        assert toy.masses(fits[name][0][0])[2] >= 0.35    # between the modes and outside them


def test_ablation_of_the_two_betas():
    """Full softmax: only the product counts.  Unimodal: the two differ, and beta_pi = 1 loses nothing."""
    values = (0.1, 0.2, 0.5, 1.0, 2.0)
    result = toy.ablation(toy.smooth_bandits(), values)
    for value in values:
        either = [result[which, value, "softmax"]["reward"] for which in ("beta_r", "beta_pi")]
        torch.testing.assert_close(*either)
    assert min(row["lost"].min() for row in result.values()) >= -1e-12
    for which, family in (("beta_r", "softmax"), ("beta_r", "unimodal"), ("beta_pi", "unimodal")):
        for name in ("reward", "kl"):                     # lowering either raises both, on average
            means = torch.stack([result[which, value, family][name].mean() for value in values])
            assert (means.diff() < 0).all(), (which, family, name)
    assert result["beta_pi", 1.0, "unimodal"]["lost"].max() == 0
    low_r, low_pi = result["beta_r", 0.1, "unimodal"], result["beta_pi", 0.1, "unimodal"]
    assert low_pi["lost"].mean() > 10 * low_r["lost"].mean()                    # at the same beta = 0.05


# ---- XPO in the bandit ------------------------------------------------------------------------------------

def test_lower_bound():
    """Prop 2.1: online DPO waits for about 1 / pi_sft(a) rounds, XPO for one; a small bonus may lose a."""
    waits = {beta: xpo_bandit.two_arms(beta, 0.0)[0].median().item() for beta in (0.05, 0.03)}
    assert waits[0.03] > 3 * waits[0.05]
    for beta, wait in waits.items():
        assert 0.3 < wait * math.exp(-1 / (8 * beta)) < 1.5                     # in units of 1 / pi_sft(a)
        for alpha in (beta, 1e-4 * beta):
            reached, gap = xpo_bandit.two_arms(beta, alpha)
            assert (reached == 1).double().mean() > 0.9   # in the other runs a was drawn at once, but lost
            assert gap.max() < 0.01 if alpha == beta else gap.mean() > 0.015


def won_by_searching_again(result, seed, **settings):
    """How much lower a search from random rewards ends than `explore`'s last one.  -> (S,)"""
    start = 3 * torch.rand(result["solution"].shape, generator=torch.Generator().manual_seed(seed))
    _, loss = xpo_bandit.argmin(**result["problem"] | {"start": start}, **settings)
    return result["loss"] - loss


def test_argmin_stays_in_the_box_and_out_of_poor_local_minima():
    """With a large bonus, where the objective has many minima, random starts end nowhere much lower."""
    result = xpo_bandit.explore(xpo_bandit.twelve_arms(), (0.4,), rounds=1, seeds=32)
    assert result["solution"].min() == 0 and result["solution"].max() == 3      # the box's two ends
    for seed in range(2):
        assert won_by_searching_again(result, seed).quantile(0.9) < 0.01


@pytest.mark.slow
def test_the_bonus_finds_the_rare_arm_and_too_much_of_it_harms():
    """The gap J(pi*) - J(pi) after 12 rounds, mean of 256 runs: online DPO, a good bonus, too large a one."""
    rare = xpo_bandit.twelve_arms()
    result = xpo_bandit.explore(rare, (0.0, 0.01, 0.1))
    online_dpo, xpo, too_much = result["gap"].mean(1)
    start = toy.suboptimality(rare, rare.ref_logp, 0.15)  # pi_sft's own gap
    assert xpo < 0.11 and 0.27 < online_dpo < start < too_much
    assert result["drew"][0].mean() < 0.5 and result["drew"][1].mean() > 0.95
    won = won_by_searching_again(result, seed=0, steps=400)
    assert won.mean() < 1e-3 and won.quantile(0.95) < 5e-3        # it was the argmin
    covered = xpo_bandit.twelve_arms(rare=0.011)          # here pi_sft draws the best arm often
    assert xpo_bandit.explore(covered, (0.0, 0.003))["gap"].mean(1).max() < 0.08


# ---- xpo_loss ---------------------------------------------------------------------------------------------

LOGP, REF_LOGP = torch.randn(2, 5, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def test_xpo_loss_without_bonus_is_dpo():
    assert xpo_loss(LOGP, REF_LOGP, LOGP[:, 1], beta=0.3, alpha=0) == dpo_loss(LOGP, REF_LOGP, beta=0.3)


def test_bonus_pushes_away_from_the_reference_sample():
    """The bonus adds alpha / B to the gradient of each log pi(y~), chosen or not: descent lowers it."""
    logp, column = LOGP.clone().requires_grad_(), torch.tensor([0, 1, 1, 0, 1])
    explore = logp[torch.arange(5), column]
    with_bonus, = torch.autograd.grad(xpo_loss(logp, REF_LOGP, explore, beta=0.3, alpha=0.02), logp)
    without, = torch.autograd.grad(dpo_loss(logp, REF_LOGP, beta=0.3), logp)
    torch.testing.assert_close(with_bonus - without, 0.02 / 5 * F.one_hot(column, 2).double())


@pytest.mark.parametrize("explore, alpha, words", [
    (LOGP[:, 0], -1e-3, "alpha must be finite and not negative"), (LOGP[:, 0], math.nan, "alpha must be"),
    (LOGP, 0.1, "explore_logp must have a number for each pair")])
def test_xpo_loss_refuses(explore, alpha, words):
    with pytest.raises(ValueError, match=words):
        xpo_loss(LOGP, REF_LOGP, explore, alpha=alpha)
