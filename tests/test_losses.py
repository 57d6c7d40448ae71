"""What the EXO paper (arXiv 2402.00856) says of its four losses: values, gradients, identities."""
import math
from functools import partial

import pytest
import torch

from dpo import dpo_loss, dpo_reward_loss
from exo import exo_loss, exo_pref_loss

B, K = 5, 4
BETA_R, BETA_PI, EPS = 0.7, 0.3, 0.01
exo = partial(exo_loss, beta_r=BETA_R, beta_pi=BETA_PI)
dpo_reward = partial(dpo_reward_loss, beta_r=BETA_R, beta_pi=BETA_PI)
exo_pref = partial(exo_pref_loss, beta_pi=BETA_PI, eps=EPS)
dpo = partial(dpo_loss, beta=BETA_PI)

each_reward_loss = pytest.mark.parametrize("loss", [exo, dpo_reward], ids=["exo", "dpo_reward"])


def normal(*shape, scale=1.0):
    """Random numbers, the same for the same shape: logp, ref_logp, reward are (3, B, K)."""
    return scale * torch.randn(*shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def gradient(loss, logp, *rest):
    logp = logp.clone().requires_grad_()
    loss(logp, *rest).backward()
    return logp.grad


def distributions(logp, ref_logp, reward):
    """p_f of Eq 13 and p_r of Eq 14, written out.  (B, K) x3 -> (B, K), (B, K)"""
    weight_f = (BETA_PI * (logp - ref_logp)).exp()
    weight_r = (reward / BETA_R).exp()
    return weight_f / weight_f.sum(1, keepdim=True), weight_r / weight_r.sum(1, keepdim=True)


def margin(logp, ref_logp):
    """u of Eq 7 and Eq 18.  (B, 2), (B, 2) -> (B,)"""
    h = logp - ref_logp
    return BETA_PI * (h[:, 0] - h[:, 1])


def along_margin(slope):
    """dL/du of each pair, (B,) -> dL/dlogp, (B, 2), since u = beta_pi (h_chosen - h_rejected)."""
    return BETA_PI * torch.stack([slope, -slope], dim=1) / len(slope)


# ---- values -------------------------------------------------------------------------------------------

def test_exo_is_the_reverse_kl_of_eq_15():
    logp, ref_logp, reward = normal(3, B, K)
    p_f, p_r = distributions(logp, ref_logp, reward)
    expected = (p_f * (p_f / p_r).log()).sum(1).mean()
    torch.testing.assert_close(exo(logp, ref_logp, reward), expected)


def test_dpo_reward_is_the_cross_entropy_of_eq_19():
    logp, ref_logp, reward = normal(3, B, K)
    p_f, p_r = distributions(logp, ref_logp, reward)
    torch.testing.assert_close(dpo_reward(logp, ref_logp, reward), -(p_r * p_f.log()).sum(1).mean())


def test_exo_pref_is_the_reverse_kl_of_eq_18():
    logp, ref_logp = normal(2, B, 2, scale=5)
    s = margin(logp, ref_logp).sigmoid()                             # (B,)
    expected = s * (s / (1 - EPS)).log() + (1 - s) * ((1 - s) / EPS).log()
    torch.testing.assert_close(exo_pref(logp, ref_logp), expected.mean())


def test_dpo_is_the_logistic_loss_of_eq_7():
    logp, ref_logp = normal(2, B, 2, scale=5)
    u = margin(logp, ref_logp)                                       # (B,)
    torch.testing.assert_close(dpo(logp, ref_logp), (1 + (-u).exp()).log().mean())


def test_the_first_pair_losses_are_log_two_and_2_7612():
    logp = normal(B, 2)
    assert dpo_loss(logp, logp).item() == pytest.approx(math.log(2))
    assert exo_pref_loss(logp, logp).item() == pytest.approx(2.7612, abs=5e-5)


# ---- gradients ----------------------------------------------------------------------------------------

def test_exo_gradient_is_its_closed_form():
    logp, ref_logp, reward = normal(3, B, K, scale=5)
    p_f, p_r = distributions(logp, ref_logp, reward)
    l = p_f.log() - p_r.log()                                        # (B, K)
    expected = BETA_PI * p_f * (l - (p_f * l).sum(1, keepdim=True)) / B
    torch.testing.assert_close(gradient(exo, logp, ref_logp, reward), expected)


def test_dpo_reward_gradient_is_the_difference_of_the_two_distributions():
    logp, ref_logp, reward = normal(3, B, K, scale=5)
    p_f, p_r = distributions(logp, ref_logp, reward)
    torch.testing.assert_close(gradient(dpo_reward, logp, ref_logp, reward), BETA_PI * (p_f - p_r) / B)


def test_exo_pref_gradient_is_its_closed_form():
    logp, ref_logp = normal(2, B, 2, scale=5)
    u = margin(logp, ref_logp)                                       # (B,)
    slope = u.sigmoid() * (-u).sigmoid() * (u - math.log((1 - EPS) / EPS))
    torch.testing.assert_close(gradient(exo_pref, logp, ref_logp), along_margin(slope))


def test_dpo_gradient_is_its_closed_form():
    logp, ref_logp = normal(2, B, 2, scale=5)
    slope = -(-margin(logp, ref_logp)).sigmoid()
    torch.testing.assert_close(gradient(dpo, logp, ref_logp), along_margin(slope))


def test_exo_at_initialisation_is_reinforce_with_the_group_mean():
    logp, reward = normal(2, B, K)
    expected = -BETA_PI / (K * BETA_R) * (reward - reward.mean(1, keepdim=True)) / B
    torch.testing.assert_close(gradient(exo, logp, logp, reward), expected)


def test_exo_pref_aims_at_a_finite_margin():
    u = math.log(0.999 / 0.001)                                      # at the default eps
    logp = torch.tensor([[u / 0.1, 0.0]], dtype=torch.float64)
    assert u == pytest.approx(6.907, abs=1e-3)
    assert gradient(exo_pref_loss, logp, torch.zeros_like(logp)).abs().max() < 1e-15


# ---- identities ---------------------------------------------------------------------------------------

def test_exo_pref_is_exo_with_two_candidates_and_the_matching_reward_gap():
    logp, ref_logp = normal(2, B, 2)
    gap = BETA_R * math.log((1 - EPS) / EPS)
    reward = torch.tensor([gap, 0.0], dtype=torch.float64).expand(B, 2)
    torch.testing.assert_close(exo_pref(logp, ref_logp), exo(logp, ref_logp, reward))


def test_dpo_is_dpo_reward_with_a_one_hot_target():
    logp, ref_logp = normal(2, B, 2)
    reward = torch.tensor([1e3, 0.0], dtype=torch.float64).expand(B, 2)    # exp(-1e3 / beta_r) is 0: one-hot
    torch.testing.assert_close(dpo(logp, ref_logp), dpo_reward(logp, ref_logp, reward))


def test_at_a_target_margin_of_two_exo_pref_has_dpos_gradient_to_first_order():
    """eps is a temperature: 1e-3 asks for 6.907 / 2 = 3.45 times the margin of eps = 0.119."""
    eps = 1 / (1 + math.exp(2))                                      # log((1 - eps) / eps) = 2
    assert eps == pytest.approx(0.1192, abs=1e-4)
    logp, ref_logp = normal(2, B, 2)
    for size in (1e-2, 1e-3):                                        # of the margins: the rest is quadratic
        near = size * logp
        difference = gradient(partial(exo_pref_loss, beta_pi=BETA_PI, eps=eps), near, size * ref_logp)
        difference -= gradient(dpo, near, size * ref_logp)
        assert difference.abs().max() < BETA_PI * margin(near, size * ref_logp).abs().max() ** 2 / B
    three_times = gradient(partial(exo_pref_loss, beta_pi=BETA_PI, eps=1e-3), logp, logp)
    torch.testing.assert_close(three_times, gradient(dpo, logp, logp) * math.log(0.999 / 0.001) / 2)


@each_reward_loss
def test_a_constant_added_to_a_prompts_rewards_or_log_ratios_changes_nothing(loss):
    logp, ref_logp, reward = normal(3, B, K)
    constant = torch.arange(B)[:, None] - 1.5                        # (B, 1)
    for moved in [(logp, ref_logp, reward + constant), (logp + constant, ref_logp, reward)]:
        torch.testing.assert_close(loss(*moved), loss(logp, ref_logp, reward))
        torch.testing.assert_close(gradient(loss, *moved), gradient(loss, logp, ref_logp, reward))


@each_reward_loss
def test_the_loss_is_stationary_where_the_policy_matches_the_reward_and_grows_around_it(loss):
    away, ref_logp, reward = normal(3, B, K)
    best = ref_logp + reward / (BETA_R * BETA_PI)                    # pi of Eq 10, but for its constant
    assert gradient(loss, best, ref_logp, reward).abs().max() < 1e-12
    assert loss(best + away, ref_logp, reward) > loss(best, ref_logp, reward)
    assert abs(exo(best, ref_logp, reward)) < 1e-12                  # EXO's minimum is 0, DPO's an entropy


# ---- hard numbers -------------------------------------------------------------------------------------

def assert_finite(loss, *tensors):
    assert loss(*tensors).isfinite()
    assert gradient(loss, *tensors).isfinite().all()


@pytest.mark.parametrize("beta", [0.1, 1.0])
@pytest.mark.parametrize("log_ratio", [1e4, -1e4])
def test_losses_and_gradients_are_finite_at_a_log_ratio_of_ten_thousand(beta, log_ratio):
    logp = torch.tensor([[log_ratio, 0.0]])                          # float32
    ref_logp = torch.zeros(1, 2)
    for gap in (0.0, 1e4):
        reward = torch.tensor([[0.0, gap]])
        for loss in (exo_loss, dpo_reward_loss):
            assert_finite(partial(loss, beta_r=beta, beta_pi=beta), logp, ref_logp, reward)
    assert_finite(partial(exo_pref_loss, beta_pi=beta), logp, ref_logp)
    assert_finite(partial(dpo_loss, beta=beta), logp, ref_logp)


def test_inputs_are_never_modified():
    inputs = normal(3, B, 2)
    before = inputs.clone()
    for loss in (exo, dpo_reward):
        loss(*inputs)
    for loss in (exo_pref, dpo):
        loss(*inputs[:2])
    assert torch.equal(inputs, before)


# ---- refusals: one sentence each ----------------------------------------------------------------------

X = torch.zeros(3, 2)


@pytest.mark.parametrize("loss, tensors, settings, sentence", [
    (exo_loss, (torch.zeros(4),) * 3, {}, r"logp must be \(B, K\), K = 2 for pairs, K >= 2 otherwise, got"),
    (dpo_reward_loss, (torch.zeros(3, 1),) * 3, {}, r"got \(3, 1\)"),
    (exo_pref_loss, (torch.zeros(3, 3),) * 2, {}, r"got \(3, 3\)"),
    (dpo_loss, (X, torch.zeros(3)), {}, r"all must have logp's shape \(3, 2\), got \[\(3,\)\]"),
    (exo_loss, (X, X, torch.zeros(3, 1)), {}, r"all must have logp's shape"),
    (exo_loss, (X, X, X), {"beta_r": 0}, "must be positive and finite: {'beta_r': 0, 'beta_pi': 0.1}"),
    (dpo_reward_loss, (X, X, X), {"beta_pi": math.nan}, "must be positive and finite"),
    (dpo_loss, (X, X), {"beta": math.inf}, "must be positive and finite: {'beta': inf}"),
    (exo_pref_loss, (X, X), {"eps": 0}, r"eps must lie in \(0, 0.5\), got 0"),
    (exo_pref_loss, (X, X), {"eps": 0.5}, r"eps must lie in \(0, 0.5\), got 0.5")])
def test_what_has_no_loss_is_refused(loss, tensors, settings, sentence):
    with pytest.raises(ValueError, match=sentence) as error:
        loss(*tensors, **settings)
    assert "\n" not in str(error.value)
