"""EXO and DPO on responses of the policy itself (--rounds): what the loss becomes, and what it ends at."""
import pytest
import torch

from dpo import dpo_reward_loss
from exo import exo_loss
from toy import bandit as toy


def paid(reward, logq, ref_logp, beta):
    """R = r - beta (log q - log pi_sft): the reward with the KL to pi_sft paid."""
    return reward - beta * (logq - ref_logp)


@pytest.mark.parametrize("K", [2, 4, 8])
def test_at_its_own_proposal_exo_is_rloo(K):
    """dL/dlogp = (K - 1) beta_pi / (K beta_r) times the gradient of leave-one-out REINFORCE."""
    beta_r, beta_pi = 0.7, 0.4
    random = torch.Generator().manual_seed(K)
    logp = torch.randn(5, K, generator=random, dtype=torch.float64).requires_grad_()
    R = torch.randn(5, K, generator=random, dtype=torch.float64)
    exo = torch.autograd.grad(exo_loss(logp, logp.detach(), R, beta_r, beta_pi), logp)[0]
    others = (R.sum(1, keepdim=True) - R) / (K - 1)                 # (B, K) the mean of the others
    rloo = torch.autograd.grad(-((R - others) * logp).mean(1).mean(), logp)[0]
    torch.testing.assert_close(exo, (K - 1) * beta_pi / (K * beta_r) * rloo, rtol=1e-9, atol=1e-12)


def proposal(bandit):
    """A policy far from pi_sft that covers every arm.  -> log q (B, V)"""
    random = torch.Generator().manual_seed(3)
    noise = torch.randn(bandit.ref_logp.shape, generator=random, dtype=torch.float64)
    return (bandit.ref_logp + noise).log_softmax(-1)


def minimiser(bandit, loss, logq, reward, K, beta_r=0.5, beta_pi=0.5):
    """The full softmax fitted to groups of K arms that q drew, with q as the loss's reference.  -> (B, V)"""
    from_q = toy.Bandit(logq, reward)
    groups = toy.sample_groups(from_q, 256, K)

    def expected(logp):
        return toy.reward_loss(loss, from_q, logp, groups, beta_r=beta_r, beta_pi=beta_pi)

    return toy.fit(expected, bandit.ref_logp)


@pytest.mark.parametrize("loss", [exo_loss, dpo_reward_loss])
@pytest.mark.parametrize("K", [2, 8])
def test_whoever_drew_the_responses_the_minimiser_is_the_optimum(loss, K):
    bandit = toy.random_bandits(B=6, V=6)
    logq = proposal(bandit)
    R = paid(bandit.reward, logq, bandit.ref_logp, beta=0.25)
    fitted = minimiser(bandit, loss, logq, R, K)
    assert toy.tv(fitted, toy.log_optimum(bandit, 0.25)).max() < 1e-4


def test_without_the_paid_kl_the_minimiser_is_another():
    """It is q exp(r / beta), normalised: on these instances a fifth of the mass is elsewhere."""
    bandit = toy.random_bandits(B=6, V=6)
    logq = proposal(bandit)
    fitted = minimiser(bandit, exo_loss, logq, bandit.reward, K=8)
    assert toy.tv(fitted, toy.log_optimum(bandit, 0.25)).mean() > 0.15
    assert toy.tv(fitted, toy.log_optimum(toy.Bandit(logq, bandit.reward), 0.25)).max() < 1e-4
