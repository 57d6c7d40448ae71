"""PPO: its formulas by their definitions, its update against the exact gradient of J, its end by pi*."""
import math

import enumerable as lm
import pytest
import torch
import torch.nn.functional as F
from torch.nn.utils import parameters_to_vector

import ppo
from loop import adamw, cosine
from model import ScalarGPT, token_logprob

N, T, BETA = 7, 9, 1.0


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def ragged():
    """A mask whose rows have prompts of 1 to 3 tokens and responses of 1 to 6.  -> (N, T)"""
    start = torch.tensor([1, 2, 3, 1, 2, 3, 3])
    length = torch.tensor([1, 6, 6, 4, 2, 1, 5])
    place = torch.arange(T) - start[:, None]                         # (N, T)
    return (place >= 0) & (place < length[:, None])


def models():
    """pi, one step away from pi_sft; pi_sft; a critic with a random head."""
    critic = ScalarGPT(lm.policy(), lm.EOS)
    torch.nn.init.normal_(critic.score.weight, std=0.1, generator=torch.Generator().manual_seed(0))
    return lm.moved_policy(0.1), lm.policy(), critic


def adam(pi, critic):
    return adamw(pi.parameters(), eps=1e-5), adamw(critic.parameters(), eps=1e-5)


def sgd(pi, critic):
    return torch.optim.SGD(pi.parameters()), torch.optim.SGD(critic.parameters())


def iterate(pi, ref, critic, optimizers=None, seed=0, samples=8, **settings):
    usual = dict(policy_lr=1e-3, critic_lr=1e-3, beta=BETA, new_tokens=lm.NEW, T=lm.T, temperature=1.0,
                 eos_id=lm.EOS, generator=torch.Generator().manual_seed(seed))
    prompts = [prompt for prompt in lm.PROMPTS.tolist() for _ in range(samples)]
    optimizers = optimizers or adam(pi, critic)
    return ppo.iteration(pi, ref, critic, *optimizers, lm.reward_of, prompts, **usual | settings)


# ---- the formulas -------------------------------------------------------------------------------------

def test_token_rewards_are_the_kl_of_each_token_and_the_reward_at_the_last():
    mask = ragged()
    logp, ref_logp = normal(2, N, T)
    reward = normal(N, seed=1)
    expected = -0.3 * (logp - ref_logp) * mask                       # (N, T)
    for row in range(N):
        expected[row, mask[row].nonzero().max()] += reward[row]
    torch.testing.assert_close(ppo.token_rewards(logp, ref_logp, reward, mask, beta=0.3), expected)


@pytest.mark.parametrize("gamma, lam", [(1.0, 0.95), (0.9, 0.8), (1.0, 0.0), (1.0, 1.0)])
def test_gae_is_its_double_sum(gamma, lam):
    mask = ragged()
    rewards, values = normal(2, N, T)                                # also off the mask, where nothing counts
    expected = torch.zeros(N, T, dtype=torch.float64)
    for row in range(N):
        places = mask[row].nonzero().flatten()
        R = rewards[row, places]
        V = torch.cat([values[row, places], torch.zeros(1)])         # no value beyond the end
        delta = R + gamma * V[1:] - V[:-1]
        for i, place in enumerate(places):
            discount = (gamma * lam) ** torch.arange(len(places) - i)
            expected[row, place] = (discount * delta[i:]).sum()
    advantages, returns = ppo.gae(rewards, values, mask, gamma, lam)
    torch.testing.assert_close(advantages, expected)
    torch.testing.assert_close(returns, (expected + values) * mask)


def test_whitening_has_mean_zero_and_variance_one_over_the_mask():
    mask = ragged()
    whitened = ppo.whiten(3 + 5 * normal(N, T), mask)
    assert whitened[mask].mean().item() == pytest.approx(0, abs=1e-9)
    assert whitened[mask].var(correction=0).item() == pytest.approx(1, abs=1e-6)
    assert (whitened[~mask] == 0).all()


def test_what_lies_off_the_mask_changes_nothing_and_inputs_are_not_written_to():
    """Prompts and padding, first of zeros, then of nan and four columns longer."""
    results = []
    for room, off in ((0, 0.0), (4, math.nan)):
        mask = F.pad(ragged(), (0, room))                            # (N, T + room)
        tensors = F.pad(normal(4, N, T), (0, room)).where(mask, off)             # (4, N, T + room)
        before = tensors.clone()
        logp, ref_logp, values, old_values = tensors
        rewards = ppo.token_rewards(logp, ref_logp, normal(N), mask, beta=0.3)
        advantages, returns = ppo.gae(rewards, values, mask)
        whitened = ppo.whiten(advantages, mask)
        losses = [ppo.policy_loss(logp, ref_logp, whitened, mask),
                  ppo.value_loss(values, old_values, returns, mask, clip=0.2)]
        results.append((losses, [x[:, :T] for x in (rewards, whitened, returns)]))
        torch.testing.assert_close(tensors, before, atol=0, rtol=0, equal_nan=True)
    torch.testing.assert_close(*results)


def test_a_value_has_read_the_token_before_and_not_its_own():
    critic = models()[2]
    assert (ppo.token_values(critic, lm.IDS, lm.MASK)[~lm.MASK] == 0).all()
    ids, mask = lm.IDS[-5:], lm.MASK[-5:]                            # 4 tokens each
    values = ppo.token_values(critic, ids, mask)
    for t in range(1, lm.T):
        other = torch.cat([ids[:, :t], (ids[:, t:] + 1) % lm.V], dim=1)
        changed = ppo.token_values(critic, other, mask) - values     # (5, T)
        assert changed[:, :t + 1].abs().max() < 1e-5
        assert (changed[:, t + 1:] != 0).all()


def test_the_clip_stops_gains_and_not_losses():
    log_ratio = torch.tensor([[0.0, 0.5, 0.5, -0.5, -0.5, 0.1]], requires_grad=True)
    A = torch.tensor([[9.0, 1.0, -1.0, 1.0, -1.0, 2.0]])
    mask = torch.tensor([[False, True, True, True, True, True]])
    stats, tokens = ppo.policy_loss(log_ratio, torch.zeros(1, 6), A, mask, clip=0.2)
    stats["loss"].backward()
    ratio = log_ratio.detach().exp()
    torch.testing.assert_close(log_ratio.grad, torch.tensor([[0.0, 0.0, 1.0, -1.0, 0.0, -2.0]]) * ratio)
    terms = [-1.2, ratio[0, 2], -ratio[0, 3], 0.8, -2 * ratio[0, 5]]
    assert stats["loss"].item() == pytest.approx(float(sum(terms)))
    assert stats["clip_fraction"] == 4 and tokens == 5
    assert stats["approx_kl"].item() == pytest.approx(float((ratio - 1 - ratio.log())[0, 1:].sum()))


def test_the_value_clip_stops_steps_toward_the_return_and_not_away():
    values = torch.tensor([[9.0, 0.1, 0.5, -0.5]], requires_grad=True)
    mask = torch.tensor([[False, True, True, True]])
    stats, tokens = ppo.value_loss(values, torch.zeros(1, 4), torch.ones(1, 4), mask, clip=0.2)
    stats["loss"].backward()
    torch.testing.assert_close(values.grad, torch.tensor([[0.0, -0.9, 0.0, -1.5]]))
    assert stats["loss"].item() == pytest.approx((0.9 ** 2 + 0.8 ** 2 + 1.5 ** 2) / 2) and tokens == 3


def test_the_first_update_starts_at_ratio_one():
    settings = dict(temperature=0.8, epochs=1)
    assert iterate(*models(), minibatches=1, **settings)["approx_kl"] < 1e-9
    assert iterate(*models(), minibatches=2, **settings)["approx_kl"] > 1e-6


# ---- iterations, against the exact gradient over every response there is ------------------------------

def exact_gradient(pi, ref, temperature=1.0):
    """The gradient of J, summed over prompts, by autograd."""
    ref_logp = lm.log_probs(ref, temperature).detach()
    J = lm.evaluate(lm.log_probs(pi, temperature), ref_logp, BETA)[2].sum()
    return parameters_to_vector(torch.autograd.grad(J, pi.parameters()))


@torch.no_grad()
def every_rollout(pi, ref):
    """log pi, R_t, and V as the mean reward-to-go of all responses that begin alike.  -> (N, T) each"""
    logp = token_logprob(pi, lm.IDS, lm.MASK)
    rewards = ppo.token_rewards(logp, token_logprob(ref, lm.IDS, lm.MASK), lm.REWARD.flatten(), lm.MASK, BETA)
    to_go = rewards.flip(1).cumsum(1).flip(1)                        # (N, T)
    p = logp.sum(1).double().exp()                                   # (N,)
    values = torch.zeros_like(rewards)
    for t in range(1, lm.T):
        _, alike = torch.unique(lm.IDS[:, :t], dim=0, return_inverse=True)     # (N,) beginnings, numbered
        weight, total = (torch.zeros_like(p).index_add(0, alike, x) for x in (p, p * to_go[:, t]))
        values[:, t] = (total / weight)[alike]
    return logp, rewards, values.where(lm.MASK, 0.0)


@pytest.mark.parametrize("critic_is_exact, lam", [(False, 1.0), (True, 1.0), (True, 0.95), (True, 0.0)])
def test_expected_gradient_is_the_gradient_of_J(critic_is_exact, lam):
    """Over all responses, at ratio 1: with any critic at lam = 1, with the exact one at any lam."""
    pi, ref, critic = models()
    old_logp, rewards, values = every_rollout(pi, ref)
    if not critic_is_exact:
        values = ppo.token_values(critic, lm.IDS, lm.MASK).detach()
    advantages, _ = ppo.gae(rewards, values, lm.MASK, lam=lam)
    weighted = advantages * old_logp.sum(1).exp()[:, None]           # the loss is linear in the advantages
    stats, _ = ppo.policy_loss(token_logprob(pi, lm.IDS, lm.MASK), old_logp, weighted, lm.MASK)
    ours = parameters_to_vector(torch.autograd.grad(-stats["loss"], pi.parameters()))
    gradient = exact_gradient(pi, ref)
    torch.testing.assert_close(ours, gradient, atol=2e-4 * float(gradient.abs().max()), rtol=0)


def test_the_mean_update_points_along_the_gradient_of_J():
    """A whole iteration as one plain gradient step, at a temperature, with a critic that knows nothing."""
    mean_update = 0
    for seed in range(6):
        pi, ref, critic = models()
        before = lm.weights(pi)
        iterate(pi, ref, critic, sgd(pi, critic), seed, policy_lr=1e-2, critic_lr=0.0, samples=500,
                epochs=1, minibatches=1, temperature=0.7)
        mean_update = mean_update + (lm.weights(pi) - before) / 6
    assert torch.cosine_similarity(mean_update, exact_gradient(*models()[:2], 0.7), dim=0) > 0.97


def test_training_reaches_the_optimum():
    """Within 5% of J* - J(pi_sft), at pi*'s KL within 20%, which no step has been given."""
    steps, lr = 40, 4e-3
    pi, ref = lm.policy(), lm.policy()
    critic = ScalarGPT(ref, lm.EOS)
    optimizers = adam(pi, critic)
    for step in range(-3, steps):
        now = lr * cosine(max(step, 0), steps)
        stats = iterate(pi, ref, critic, optimizers, seed=step, policy_lr=now, critic_lr=now, samples=48,
                        critic_only=step < 0)
    gain, kl = lm.reached(pi, BETA)
    assert gain >= 0.95 and abs(kl - 1) <= 0.2
    assert stats["explained_variance"] > 0.7


def test_critic_only_leaves_the_policy_as_it_is():
    pi, ref, critic = models()
    before = [lm.weights(model) for model in (pi, ref, critic)]
    optimizers = adam(pi, critic)
    warm_up = iterate(pi, ref, critic, optimizers, critic_only=True)
    assert torch.equal(lm.weights(pi), before[0]) and not optimizers[0].state
    assert not torch.equal(lm.weights(critic), before[2])
    training = iterate(pi, ref, critic, optimizers)
    assert not torch.equal(lm.weights(pi), before[0]) and torch.equal(lm.weights(ref), before[1])
    assert list(warm_up) == list(training)                           # the same columns in metrics.csv


def test_micro_batches_change_memory_only():
    results = []
    for rows in (0, 5):
        pi, ref, critic = models()
        stats = iterate(pi, ref, critic, sgd(pi, critic), micro_batch=rows, sample_batch=rows or 100,
                        policy_lr=0.1, critic_lr=0.1)
        results.append((stats, lm.weights(pi), lm.weights(critic)))
    torch.testing.assert_close(*results, atol=1e-4, rtol=1e-4)


def test_prompts_may_have_any_lengths():
    batch = ppo.rollout(*models(), lm.reward_of, [[1], [2, 3, 4]] * 3, 2, 5, 1.0, lm.EOS, None, 4)
    assert batch["ids"][:, 0].tolist() == [1, 2] * 3
    assert batch["mask"][:, 1].tolist() == [True, False] * 3
