"""Statements of the EXO paper (arXiv 2402.00856) about its four losses."""
import math

import pytest
import torch

from dpo import dpo_loss, dpo_reward_loss
from exo import exo_loss, exo_pref_loss

B, K = 5, 4


def of_reward(loss):
    return lambda logp, ref_logp, reward: loss(logp, ref_logp, reward, beta_r=0.7, beta_pi=0.3)


REWARD_LOSSES = {"exo": of_reward(exo_loss), "dpo_reward": of_reward(dpo_reward_loss)}
PAIR_LOSSES = {"exo_pref": exo_pref_loss, "dpo": dpo_loss}
each_reward_loss = pytest.mark.parametrize("loss", REWARD_LOSSES.values(), ids=REWARD_LOSSES)
each_pair_loss = pytest.mark.parametrize("loss", PAIR_LOSSES.values(), ids=PAIR_LOSSES)


def draws(*shape, n=3, scale=5.0, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [scale * torch.randn(*shape, generator=generator, dtype=dtype) for _ in range(n)]


def gradient(loss, logp, *rest, **settings):
    logp = logp.clone().requires_grad_()
    loss(logp, *rest, **settings).backward()
    return logp.grad


def distributions(logp, ref_logp, reward, beta_r, beta_pi):
    """p_f of Eq 13 and p_r of Eq 14, written out."""
    weight_f, weight_r = (beta_pi * (logp - ref_logp)).exp(), (reward / beta_r).exp()
    return weight_f / weight_f.sum(1, keepdim=True), weight_r / weight_r.sum(1, keepdim=True)


def margin(logp, ref_logp, beta):
    h = logp - ref_logp
    return beta * (h[:, 0] - h[:, 1])                                # (B,) u of Eq 7 and Eq 18


def along_margin(slope, beta):
    """dL/du (B,) -> dL/dlogp (B, 2), mean over B: u rises by beta with the chosen response's log-prob."""
    return beta * torch.stack([slope, -slope], 1) / len(slope)


# ---- values ----------------------------------------------------------------------------------------------------------

def test_exo_is_the_reverse_kl_of_eq_15():
    x = draws(B, K, scale=1.0)
    p_f, p_r = distributions(*x, 0.7, 0.3)
    torch.testing.assert_close(exo_loss(*x, beta_r=0.7, beta_pi=0.3), (p_f * (p_f / p_r).log()).sum(1).mean())


def test_dpo_reward_is_the_cross_entropy_of_eq_19():
    x = draws(B, K, scale=1.0)
    p_f, p_r = distributions(*x, 0.7, 0.3)
    torch.testing.assert_close(dpo_reward_loss(*x, beta_r=0.7, beta_pi=0.3), -(p_r * p_f.log()).sum(1).mean())


def test_dpo_is_the_logistic_loss_of_eq_7():
    logp, ref_logp = draws(B, 2, n=2)
    u = margin(logp, ref_logp, 0.3)
    torch.testing.assert_close(dpo_loss(logp, ref_logp, beta=0.3), (1 + (-u).exp()).log().mean())


def test_exo_pref_is_the_reverse_kl_of_eq_18():
    logp, ref_logp = draws(B, 2, n=2)
    s, eps = margin(logp, ref_logp, 0.3).sigmoid(), 0.01
    expected = s * (s / (1 - eps)).log() + (1 - s) * ((1 - s) / eps).log()
    torch.testing.assert_close(exo_pref_loss(logp, ref_logp, beta_pi=0.3, eps=eps), expected.mean())


def test_the_first_pair_losses_are_log_two_and_2_7612():
    logp = draws(B, 2, n=1, dtype=torch.float32)[0]
    assert dpo_loss(logp, logp).item() == pytest.approx(math.log(2), abs=1e-6)
    assert exo_pref_loss(logp, logp).item() == pytest.approx(2.7612, abs=5e-5)


@each_pair_loss
def test_a_column_of_chosen_responses_comes_first(loss):
    zero, better = torch.zeros(1, 2), torch.tensor([[1.0, -1.0]])
    assert loss(better, zero) < loss(zero, zero) < loss(-better, zero)


def test_the_loss_is_the_mean_over_prompts():
    x = draws(B, K)
    for loss in REWARD_LOSSES.values():
        torch.testing.assert_close(loss(*x), torch.stack([loss(*(t[b:b + 1] for t in x)) for b in range(B)]).mean())


# ---- closed-form gradients -------------------------------------------------------------------------------------------

def test_exo_gradient_is_its_closed_form():
    x = draws(B, K)
    p_f, p_r = distributions(*x, 0.7, 0.3)
    l = p_f.log() - p_r.log()
    expected = 0.3 * p_f * (l - (p_f * l).sum(1, keepdim=True)) / B
    torch.testing.assert_close(gradient(exo_loss, *x, beta_r=0.7, beta_pi=0.3), expected)


def test_dpo_reward_gradient_is_the_difference_of_the_two_distributions():
    x = draws(B, K)
    p_f, p_r = distributions(*x, 0.7, 0.3)
    torch.testing.assert_close(gradient(dpo_reward_loss, *x, beta_r=0.7, beta_pi=0.3), 0.3 * (p_f - p_r) / B)


def test_exo_pref_gradient_is_its_closed_form():
    logp, ref_logp = draws(B, 2, n=2)
    u, eps = margin(logp, ref_logp, 0.3), 0.01
    slope = u.sigmoid() * (-u).sigmoid() * (u - math.log((1 - eps) / eps))
    torch.testing.assert_close(gradient(exo_pref_loss, logp, ref_logp, beta_pi=0.3, eps=eps), along_margin(slope, 0.3))


def test_dpo_gradient_is_its_closed_form():
    logp, ref_logp = draws(B, 2, n=2)
    slope = -(-margin(logp, ref_logp, 0.3)).sigmoid()
    torch.testing.assert_close(gradient(dpo_loss, logp, ref_logp, beta=0.3), along_margin(slope, 0.3))


def test_exo_at_initialisation_is_reinforce_with_the_group_mean():
    logp, reward = draws(B, K, n=2)
    expected = -0.3 / (K * 0.7) * (reward - reward.mean(1, keepdim=True)) / B
    torch.testing.assert_close(gradient(exo_loss, logp, logp, reward, beta_r=0.7, beta_pi=0.3), expected)


@each_reward_loss
def test_gradients_of_a_group_sum_to_zero(loss):
    assert gradient(loss, *draws(B, K)).sum(1).abs().max() < 1e-15


def test_exo_pref_aims_at_a_finite_margin():
    u = torch.tensor([math.log(0.999 / 0.001)], dtype=torch.float64)
    logp = torch.stack([u / 0.1, torch.zeros(1)], 1)
    assert u.item() == pytest.approx(6.907, abs=1e-3)
    assert gradient(exo_pref_loss, logp, torch.zeros(1, 2, dtype=torch.float64)).abs().max() < 1e-15


def test_exo_pref_ignores_a_confidently_wrong_pair_and_dpo_does_not():
    logp, zero = torch.tensor([[-80.0, 0.0]]), torch.zeros(1, 2)     # u = -8 at beta = 0.1
    assert gradient(exo_pref_loss, logp, zero)[0, 0].item() == pytest.approx(0.1 * -0.0050, abs=1e-5)
    assert gradient(dpo_loss, logp, zero)[0, 0].item() == pytest.approx(0.1 * -1.0, abs=1e-4)


# ---- identities ------------------------------------------------------------------------------------------------------

def test_exo_pref_is_exo_with_two_candidates_and_the_matching_reward_gap():
    (logp, ref_logp), eps = draws(B, 2, n=2), 1e-3
    reward = torch.tensor([[0.7 * math.log((1 - eps) / eps), 0.0]], dtype=torch.float64).expand(B, 2)
    torch.testing.assert_close(exo_pref_loss(logp, ref_logp, beta_pi=0.3, eps=eps),
                               exo_loss(logp, ref_logp, reward, beta_r=0.7, beta_pi=0.3))


def test_dpo_is_dpo_reward_with_a_one_hot_target():
    logp, ref_logp = draws(B, 2, n=2)
    reward = torch.tensor([[1e3, 0.0]], dtype=torch.float64).expand(B, 2)            # exp(-1e3) is 0: one-hot exactly
    torch.testing.assert_close(dpo_loss(logp, ref_logp, beta=0.3),
                               dpo_reward_loss(logp, ref_logp, reward, beta_r=1.0, beta_pi=0.3))


def test_both_reward_losses_divide_the_rewards_by_beta_r():
    logp, ref_logp, reward = draws(B, K)
    for loss in (exo_loss, dpo_reward_loss):
        torch.testing.assert_close(loss(logp, ref_logp, reward, beta_r=0.2, beta_pi=0.3),
                                   loss(logp, ref_logp, 5 * reward, beta_r=1.0, beta_pi=0.3))


@each_reward_loss
def test_a_constant_added_to_a_prompts_rewards_changes_nothing(loss):
    (logp, ref_logp, reward), c = draws(B, K), torch.arange(B)[:, None] - 1.5
    torch.testing.assert_close(loss(logp, ref_logp, reward + c), loss(logp, ref_logp, reward))
    torch.testing.assert_close(gradient(loss, logp, ref_logp, reward + c), gradient(loss, logp, ref_logp, reward))


@each_reward_loss
def test_a_constant_added_to_a_groups_log_ratios_changes_nothing(loss):
    (logp, ref_logp, reward), c = draws(B, K), torch.arange(B)[:, None] - 1.5
    torch.testing.assert_close(loss(logp + c, ref_logp, reward), loss(logp, ref_logp, reward))
    torch.testing.assert_close(gradient(loss, logp + c, ref_logp, reward), gradient(loss, logp, ref_logp, reward))


@each_pair_loss
def test_a_constant_added_to_a_pairs_log_ratios_changes_nothing(loss):
    (logp, ref_logp), c = draws(B, 2, n=2), torch.arange(B)[:, None] - 1.5
    torch.testing.assert_close(loss(logp + c, ref_logp), loss(logp, ref_logp))


@each_reward_loss
def test_the_order_of_the_candidates_does_not_matter(loss):
    x, order = draws(B, K), torch.tensor([2, 0, 3, 1])
    torch.testing.assert_close(loss(*(t[:, order] for t in x)), loss(*x))
    torch.testing.assert_close(gradient(loss, *(t[:, order] for t in x)), gradient(loss, *x)[:, order])


def test_exo_is_zero_without_gradient_where_the_policy_matches_the_reward():
    ref_logp, reward = draws(B, K, n=2)
    logp = ref_logp + reward / (0.7 * 0.3) + torch.arange(B)[:, None]                 # pi proportional to Eq 10
    assert abs(exo_loss(logp, ref_logp, reward, beta_r=0.7, beta_pi=0.3)) < 1e-12
    assert gradient(exo_loss, logp, ref_logp, reward, beta_r=0.7, beta_pi=0.3).abs().max() < 1e-12


def test_both_reward_losses_are_stationary_where_the_policy_matches_the_reward_and_grow_around_it():
    ref_logp, reward, away = draws(B, K)
    best = ref_logp + reward / (0.7 * 0.3)
    for loss in REWARD_LOSSES.values():
        assert gradient(loss, best, ref_logp, reward).abs().max() < 1e-12
        assert loss(best + away, ref_logp, reward) > loss(best, ref_logp, reward)


# ---- hard numbers ----------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("beta", [0.1, 1.0])
@pytest.mark.parametrize("sign", [+1, -1])
def test_losses_and_gradients_are_finite_at_a_log_ratio_of_ten_thousand(beta, sign):
    logp = sign * torch.tensor([[1e4, 0.0]])                         # float32
    ref_logp, settings = torch.zeros(1, 2), dict(beta_r=beta, beta_pi=beta)
    for reward in (torch.tensor([[0.0, 1e4]]), torch.tensor([[0.0, 0.0]])):
        for loss in (exo_loss, dpo_reward_loss):
            assert loss(logp, ref_logp, reward, **settings).isfinite()
            assert gradient(loss, logp, ref_logp, reward, **settings).isfinite().all()
    for loss in (exo_pref_loss, dpo_loss):
        assert loss(logp, ref_logp, beta).isfinite()
        assert gradient(loss, logp, ref_logp, beta).isfinite().all()


def test_candidates_that_are_all_alike_give_a_finite_loss_without_gradient():
    same = torch.full((B, K), -50.0)
    for loss in REWARD_LOSSES.values():
        assert loss(same, same, same).isfinite()
        assert gradient(loss, same, same, same).abs().max() < 1e-7


def test_inputs_are_never_modified():
    logp, ref_logp, reward = draws(B, 2)
    before = [t.clone() for t in (logp, ref_logp, reward)]
    for loss in REWARD_LOSSES.values():
        loss(logp, ref_logp, reward)
    for loss in PAIR_LOSSES.values():
        loss(logp, ref_logp)
    assert all(torch.equal(a, b) for a, b in zip(before, (logp, ref_logp, reward)))


# ---- refusals: one sentence each -------------------------------------------------------------------------------------

def refused(loss, *tensors, **settings):
    with pytest.raises(ValueError) as error:
        loss(*tensors, **settings)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("loss", [exo_loss, dpo_reward_loss])
@pytest.mark.parametrize("shapes, named", [
    (((4,), (4,), (4,)), "logp"), (((2, 3, 4),) * 3, "logp"), (((0, 4),) * 3, "logp"), (((), (), ()), "logp"),
    (((2, 4), (2, 3), (2, 4)), "ref_logp"), (((2, 4), (4,), (2, 4)), "ref_logp"), (((2, 4), (2, 4), (2, 1)), "reward"),
    (((2, 4), (2, 4), (8,)), "reward"), (((2, 1),) * 3, "K"), (((2, 0),) * 3, "K")])
def test_wrong_shapes_are_refused_by_name(loss, shapes, named):
    assert refused(loss, *(torch.zeros(s) for s in shapes)).startswith(f"{named} must")


@each_pair_loss
@pytest.mark.parametrize("shape", [(3, 1), (3, 3), (3,), (0, 2), (2, 2, 2)])
def test_pair_losses_take_nothing_but_pairs(loss, shape):
    assert "(B, " in refused(loss, torch.zeros(shape), torch.zeros(shape))


@each_pair_loss
def test_pairs_with_a_reference_of_another_shape_are_refused(loss):
    assert refused(loss, torch.zeros(3, 2), torch.zeros(1, 2)).startswith("ref_logp must")


@pytest.mark.parametrize("beta", [0, -0.1, math.nan, math.inf, -math.inf])
def test_a_beta_that_is_not_positive_and_finite_is_refused_by_name(beta):
    x = torch.zeros(3, 2)
    for loss in (exo_loss, dpo_reward_loss):
        for name in ("beta_r", "beta_pi"):
            assert refused(loss, x, x, x, **{name: beta}).startswith(f"{name} must")
    assert refused(exo_pref_loss, x, x, beta_pi=beta).startswith("beta_pi must")
    assert refused(dpo_loss, x, x, beta=beta).startswith("beta must")


@pytest.mark.parametrize("eps", [0, 0.5, 0.7, -1e-3, math.nan])
def test_an_eps_outside_of_0_to_one_half_is_refused(eps):
    assert refused(exo_pref_loss, torch.zeros(3, 2), torch.zeros(3, 2), eps=eps).startswith("eps must lie in (0, 0.5)")
