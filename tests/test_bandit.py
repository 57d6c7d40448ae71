"""What the papers claim of the losses, where it is exact: the bandits of `toy/`, and xpo_loss."""
import math
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from dpo import dpo_loss, dpo_reward_loss
from exo import exo_loss, exo_pref_loss
from toy import bandit as toy
from toy import xpo_bandit
from toy.report import mean_ci
from xpo import xpo_loss

BANDIT = toy.random_bandits()                             # 24 instances of 24 arms
SMALL = toy.random_bandits(V=6)                           # 24 instances of 6 arms
EXO, DPO = "EXO-rw", "DPO-rw"


@pytest.fixture(scope="module")
def distance():
    """From the full softmax fitted by every method to pi*, beta = 0.25.  {name: total variation (24,)}"""
    optimum = toy.log_optimum(SMALL, 0.25)
    return {name: toy.tv(logp, optimum) for name, logp in toy.recover(SMALL, Ks=(2, 8)).items()}


# ---- the truth itself, Theorem 3.1 ------------------------------------------------------------------------

def test_optimum_has_the_highest_objective():
    optimum = toy.log_optimum(BANDIT, 0.3)
    log_Z = (BANDIT.ref_logp + BANDIT.reward / 0.3).logsumexp(-1)
    torch.testing.assert_close(toy.objective(BANDIT, optimum, 0.3), 0.3 * log_Z)         # beta log Z
    for seed in range(5):
        other = toy.softmax_policy(toy.near_reference(BANDIT, seed=seed))
        gap = toy.suboptimality(BANDIT, other, 0.3)
        torch.testing.assert_close(gap, 0.3 * toy.kl(other, optimum))
        assert (gap > 0).all()


@pytest.mark.parametrize("beta_r, beta_pi", [(0.5, 1.0), (0.5, 0.5), (0.1, 0.1), (1.0, 0.3)])
def test_theorem_3_1_and_eq_11(beta_r, beta_pi):
    """J_gen has the optimum pi*_beta, beta = beta_r beta_pi, and is a reverse KL; at beta_pi = 1 it is J."""
    result = toy.generalised_objective(toy.random_bandits(B=8), beta_r, beta_pi)
    assert result["tv"].max() < 1e-4
    assert result["eq11"].max() < 1e-12
    lowest, highest = (1 - 1e-9, 1 + 1e-9) if beta_pi == 1 else (0.8, 0.999)
    assert lowest < result["cosine"].min() and result["cosine"].max() < highest


# ---- Theorems 3.2 and 3.3 ---------------------------------------------------------------------------------

def test_gradients_against_K():
    """EXO's expected gradient nears RL's like 1/K, in every instance; DPO-rw's nears the forward KL's."""
    study = toy.gradient_study(BANDIT, beta_r=0.1, beta_pi=0.1, Ks=(2, 4, 16, 64, 256, 1024))
    for K in (2, 4, 16, 64, 256, 1024):
        bias = K * study[EXO, K]["bias"]
        assert 0.9 <= bias.min() and bias.max() <= 1.15
        assert study[EXO, K]["cos_rl"].min() > 0.99       # so that the bias is one of scale
    noise = torch.stack([study[EXO, K]["sd"] * K ** 0.5 for K in (64, 256, 1024)])        # (3, B)
    assert noise.std(0).max() < 0.2                       # K responses cost what K draws cost

    assert study[DPO, 2]["cos_rl"].min() >= 0.85          # at K = 2 DPO-rw points where RL does
    assert study[DPO, 2]["cos_limit"].median() < 0.5
    assert study[DPO, 256]["cos_rl"].median() <= 0.5      # by K = 256 no more
    assert study[DPO, 256]["cos_rl"].max() < 0.85
    assert study[DPO, 1024]["cos_limit"].min() > 0.99
    assert study[DPO, 1024]["bias"].max() < 0.02


@pytest.mark.parametrize("method", [EXO, DPO])
def test_gradient_study_at_K_2_is_the_enumeration(method):
    """The estimate behind the test above, against the exact expectation over all V * V groups."""
    pairs = torch.cartesian_prod(torch.arange(24), torch.arange(24)).expand(24, -1, -1)   # (B, V * V, 2)
    logits = toy.near_reference(BANDIT).requires_grad_()
    columns = [toy.take(values, pairs) for values in (logits.log_softmax(-1), BANDIT.ref_logp, BANDIT.reward)]
    loss = toy.per_row(toy.REWARD_LOSSES[method], *columns, beta_r=0.1, beta_pi=0.1)      # (B * V * V,)
    weight = toy.take(BANDIT.ref_logp, pairs).sum(-1).exp()
    limit = toy.limit_gradients(BANDIT, logits.detach(), 0.1, 0.1)[method]
    bias = (toy.grad(weight * loss, logits) - limit).norm(dim=-1) / limit.norm(dim=-1)
    study = toy.gradient_study(BANDIT, Ks=(2,))
    torch.testing.assert_close(study[method, 2]["bias"], bias, atol=0.03, rtol=0)


def test_rl_gradient_is_that_of_the_generalised_objective():
    logits = toy.near_reference(BANDIT).requires_grad_()
    J_gen = toy.general_objective(BANDIT, toy.softmax_policy(logits), 0.1, 0.5)
    limit = toy.limit_gradients(BANDIT, logits, 0.1, 0.5)[EXO]
    torch.testing.assert_close(limit, toy.grad(-J_gen / 0.1, logits))


@pytest.mark.parametrize("loss", [exo_loss, dpo_reward_loss])
def test_equal_candidates_may_be_merged(loss):
    """What makes K = 1024 cheap: c equal candidates are one with log c more in both softmaxes."""
    groups = toy.sample_groups(BANDIT, 1, 8)              # (B, 1, 8)
    counts = F.one_hot(groups, 24).sum(2).double()        # (B, 1, V)
    logits = toy.near_reference(BANDIT).requires_grad_()
    value = toy.reward_loss(loss, BANDIT, toy.softmax_policy(logits), groups, beta_r=0.2, beta_pi=0.5)
    merged = toy.group_gradients(loss, BANDIT, logits.detach(), counts, beta_r=0.2, beta_pi=0.5)
    torch.testing.assert_close(merged[:, 0], toy.grad(24 * value, logits))


# ---- what recovers pi*, and what does not -----------------------------------------------------------------

@pytest.mark.parametrize("name", ["reverse KL", "forward KL", "policy gradient on J", "EXO-rw, K = 2",
                                  "EXO-rw, K = 8", "DPO-rw, K = 2", "DPO-rw, K = 8", "DPO-pref, bt labels",
                                  "XPO, alpha/beta = 0"])
def test_what_recovers_the_optimum(distance, name):
    assert distance[name].max() <= 1e-3


@pytest.mark.parametrize("name, median, tolerance", [
    ("EXO-pref, bt labels", 0.172, 0.01), ("DPO-pref, argmax labels", 0.228, 0.01),
    ("EXO-pref, argmax labels", 0.228, 0.01), ("XPO, alpha/beta = 0.001", 3.8e-3, 5e-4),
    ("XPO, alpha/beta = 0.003", 1.22e-2, 1e-3)])
def test_what_does_not(distance, name, median, tolerance):
    """By how much in the median, and by at least something in every instance."""
    assert distance[name].quantile(0.5).item() == pytest.approx(median, abs=tolerance)
    assert distance[name].min() > 3e-4


def test_argmax_labels_lead_to_the_best_arm_alone(distance):
    best = SMALL.reward.argmax(-1, keepdim=True)
    other_arms = 1 - toy.log_optimum(SMALL, 0.25).exp().gather(1, best)[:, 0]   # (B,)
    for name in ("DPO-pref, argmax labels", "EXO-pref, argmax labels"):
        torch.testing.assert_close(distance[name], other_arms, atol=1e-3, rtol=0)


def test_the_error_of_exo_pref_is_mostly_one_of_temperature(distance):
    rescaled = distance["EXO-pref, best beta_pi"]
    assert rescaled.max() < 0.01 and rescaled.min() > 4e-4      # mostly, but not only


def test_margin_of_a_single_pair():
    """EXO-pref's population minimiser is (2p - 1) log((1 - eps) / eps), DPO's is logit(p) = r_w - r_l."""
    p = 1 / (1 + math.exp(-1))                            # that the first arm wins
    bandit = toy.Bandit(torch.full((1, 2), 0.5).double().log(), torch.tensor([[1.0, 0.0]]).double())
    exo_margin = (2 * p - 1) * math.log(999)
    for loss, settings, margin in ((exo_pref_loss, {"beta_pi": 0.5, "eps": 1e-3}, exo_margin),
                                   (dpo_loss, {"beta": 0.5}, 1.0)):
        expected = partial(toy.pair_loss, loss, bandit, labels="bt", **settings)
        logp = toy.fit(expected, bandit.ref_logp)
        assert 0.5 * (logp[0, 0] - logp[0, 1]).item() == pytest.approx(margin, abs=1e-5)


def test_too_large_a_bonus_has_no_floor():
    """Without a box on the reward XPO's objective falls for ever towards the arm that pi_sft draws least."""
    rarest = F.one_hot(SMALL.ref_logp.argmin(-1), 6)
    values = []
    for t in (0, 100, 200, 300):
        logp = toy.softmax_policy(SMALL.ref_logp + t * rarest)
        values.append(toy.pair_loss(toy.expected_xpo_loss, SMALL, logp, "bt", beta=0.25, alpha=0.2 * 0.25))
    drops = torch.stack(values).diff()
    assert (drops < -1).all() and drops[2].item() == pytest.approx(drops[1].item(), rel=1e-3)


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
        assert toy.masses(fits[name][0][0])[2] >= 0.35    # between and beyond the modes


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
    assert result["beta_pi", 1.0, "unimodal"]["lost"].max() == 0                # beta_pi = 1 is J_beta itself
    low_r, low_pi = result["beta_r", 0.1, "unimodal"], result["beta_pi", 0.1, "unimodal"]
    assert low_pi["lost"].mean() > 10 * low_r["lost"].mean()                    # at the same beta = 0.05


# ---- XPO in the bandit ------------------------------------------------------------------------------------

def test_lower_bound():
    """Prop 2.1: online DPO waits for about 1 / pi_sft(a) rounds, XPO for one; a small bonus may lose a."""
    waits = {beta: xpo_bandit.two_arms(beta, 0.0, rounds=1500)[0].median().item() for beta in (0.05, 0.03)}
    assert waits[0.03] > 3 * waits[0.05]
    for beta, wait in waits.items():
        assert 0.3 < wait * math.exp(-1 / (8 * beta)) < 1.5                     # in units of 1 / pi_sft(a)
        reached, gap = xpo_bandit.two_arms(beta, beta)
        assert (reached == 1).double().mean() > 0.9       # the others: a drawn at once, and lost by its label
        assert gap.max() < 0.01
        reached, gap = xpo_bandit.two_arms(beta, 1e-4 * beta)
        assert (reached == 1).double().mean() > 0.9
        assert gap.mean() > 0.015


def test_argmin_on_a_grid_agrees_with_adam():
    """The two solvers of Algorithm 1's argmin, on a two-arm history."""
    ref_logp, chosen = torch.tensor([0.1, 0.9]).log(), torch.tensor([0] * 6 + [1] * 4)
    pairs = {"run": torch.zeros(10).long(), "chosen": chosen, "rejected": 1 - chosen, "explore": 1 - chosen}
    history = xpo_bandit.merge(pairs, 2, 10)
    assert history["weight"].tolist() == pytest.approx([0.6, 0.4])
    start = torch.full((1, 2), 0.5)
    r, loss = xpo_bandit.argmin(history, start, ref_logp, 0.3, torch.tensor([0.03]), R_max=1.0)
    d = torch.linspace(-1, 1, 4001)
    logp = (ref_logp + torch.stack([d, -d], 1) / 0.6).log_softmax(-1)           # (4001, 2)
    arms = torch.stack([chosen, 1 - chosen], 1)           # (10, 2)
    grid = [xpo_loss(row[arms], ref_logp[arms], row[1 - chosen], beta=0.3, alpha=0.03) for row in logp]
    lowest, place = torch.stack(grid).min(0)
    assert loss.item() == pytest.approx(lowest.item(), abs=1e-5)
    assert (r[0, 0] - r[0, 1]).item() == pytest.approx(d[place].item(), abs=5e-3)


def excess(result, seed=None, **settings):
    """What another search wins over `explore`'s last: from where it ended, or from random rewards."""
    start = result["solution"]
    if seed is not None:
        start = 3 * torch.rand(start.shape, generator=torch.Generator().manual_seed(seed))
    _, loss = xpo_bandit.argmin(**result["problem"] | {"start": start}, **settings)
    return result["loss"] - loss


def test_argmin_stays_in_the_box_and_out_of_poor_local_minima():
    """At a large bonus, where the objective has many minima: random starts end nowhere much lower."""
    result = xpo_bandit.explore(xpo_bandit.twelve_arms(), (0.4,), rounds=1, seeds=64)
    assert result["solution"].min() == 0 and result["solution"].max() == 3      # as far as the box lets it
    for seed in range(3):
        assert excess(result, seed).quantile(0.9) < 0.01


def separated(low, high):
    """Whether one 95% interval lies wholly below the other."""
    low_mean, low_half = mean_ci(low)
    high_mean, high_half = mean_ci(high)
    return bool(low_mean + low_half < high_mean - high_half)


@pytest.mark.slow
def test_the_bonus_finds_the_rare_arm_and_too_much_of_it_harms():
    result = xpo_bandit.explore(xpo_bandit.twelve_arms(), (0.0, 0.01, 0.1))
    online_dpo, xpo, too_much = result["gap"]
    assert xpo.mean() < 0.11 and online_dpo.mean() > 0.27 and separated(xpo, online_dpo)
    assert result["drew"][0].mean() < 0.5 and result["drew"][1].mean() > 0.95
    assert separated(online_dpo, too_much)
    for seed in (None, 0):                                # the argmin is one: a longer search ends no lower
        won = excess(result, seed, steps=400)
        assert won.mean() < 1e-3 and won.quantile(0.95) < 5e-3


@pytest.mark.slow
def test_control_where_the_reference_covers_the_best_arm():
    online_dpo, xpo = xpo_bandit.explore(xpo_bandit.twelve_arms(rare=0.011), (0.0, 0.003))["gap"]
    assert not separated(xpo, online_dpo) and not separated(online_dpo, xpo)
    assert online_dpo.mean() < 0.08 and xpo.mean() < 0.08


def test_the_bonus_beats_online_dpo():
    """The first slow test above in small: fewer rounds, 128 seeds."""
    online_dpo, xpo = xpo_bandit.explore(xpo_bandit.twelve_arms(), (0.0, 0.003), rounds=8, seeds=128)["gap"]
    assert separated(xpo, online_dpo) and xpo.mean() < 0.6 * online_dpo.mean()


@pytest.mark.slow
@pytest.mark.parametrize("command, last_line", [
    (["toy.bandit", "--out", "figures"], "beta_pi = 2.0  unimodal"), (["toy.xpo_bandit"], "alpha/beta 0.1 ")])
def test_the_commands_print_every_table(tmp_path, monkeypatch, command, last_line):
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent.parent))
    done = subprocess.run([sys.executable, "-m", *command], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.splitlines()[-1].startswith(last_line), done.stderr
    assert ("--out" in command) == (tmp_path / "figures" / "reverse_vs_forward_kl.png").exists()


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
    (LOGP[:, 0], -1e-3, "alpha must be finite and not negative"), (LOGP[:, 0], math.inf, "alpha must be"),
    (LOGP[:, 0], math.nan, "alpha must be"), (LOGP, 0.1, "explore_logp must have a number for each pair"),
    (LOGP[:4, 0], 0.1, "explore_logp must have"), (LOGP[0, 0], 0.1, "explore_logp must have")])
def test_xpo_loss_refuses(explore, alpha, words):
    with pytest.raises(ValueError, match=words):
        xpo_loss(LOGP, REF_LOGP, explore, alpha=alpha)
