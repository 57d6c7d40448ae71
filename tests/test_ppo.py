"""PPO: GAE and the token rewards by their definitions, its update against the exact gradient of J, its end by pi*."""
import copy
import math

import pytest
import torch
from enumerable import EOS, NEW, PROMPTS, evaluate, gap_closed, limit, log_probs, optimum, policy, responses, reward_of

import ppo
from model import ScalarGPT, generate, token_logprob
from optim import adamw, cosine

N, T, BETA = 7, 9, 1.0


def table(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def ragged():
    """Masks of rows with prompts of 1..3 tokens and responses of 1..6.  -> (N, T)"""
    start, length = torch.tensor([1, 2, 3, 1, 2, 3, 3]), torch.tensor([1, 6, 6, 4, 2, 1, 5])
    column = torch.arange(T) - start[:, None]
    return (column >= 0) & (column < length[:, None])


def padded(x, value):
    return torch.cat([x, torch.full((len(x), 4), value, dtype=x.dtype)], 1)


def models(seed=0):
    """pi, one step away from pi_sft; pi_sft; a critic with a random head."""
    ref = policy(seed)
    pi, critic = copy.deepcopy(ref), ScalarGPT(ref, EOS)
    with torch.no_grad():
        for p, q in zip(pi.parameters(), policy(seed + 1).parameters()):
            p.lerp_(q, 0.1)
        critic.score.weight.copy_(0.1 * table(*critic.score.weight.shape))
    return pi, ref, critic


def iterate(pi, ref, critic, optimizers=None, prompts=PROMPTS, seed=0, **settings):
    optimizers = optimizers or (adamw(pi, 1e-3, 1e-5), adamw(critic, 1e-3, 1e-5))
    settings = dict(policy_lr=1e-3, critic_lr=1e-3, beta=BETA, max_new_tokens=NEW, eos_id=EOS, samples=8) | settings
    generator = torch.Generator().manual_seed(seed)
    return ppo.iteration(pi, ref, critic, *optimizers, reward_of, prompts, generator=generator, **settings)


def flat(tensors):
    return torch.cat([x.detach().flatten() for x in tensors])


def state(module):
    return flat(module.parameters()).clone()


# ---- rewards and advantages ------------------------------------------------------------------------------------------

def test_token_rewards_sum_to_the_reward_minus_beta_log_ratio():
    mask, reward = ragged(), table(N, seed=2)
    logp, ref_logp = table(N, T, seed=3), table(N, T, seed=4)
    rewards = ppo.token_rewards(logp, ref_logp, reward, mask, 0.3)
    torch.testing.assert_close(rewards.sum(1), reward - 0.3 * ((logp - ref_logp) * mask).sum(1))
    assert (rewards[~mask] == 0).all()


def test_the_reward_stands_at_the_last_response_token():
    mask, reward, zeros = ragged(), table(N), torch.zeros(N, T, dtype=torch.float64)
    rewards = ppo.token_rewards(zeros, zeros, reward, mask, 0.3)
    last = [int(row.nonzero().max()) for row in mask]
    torch.testing.assert_close(rewards[range(N), last], reward)
    assert (rewards != 0).sum() == N


@pytest.mark.parametrize("gamma, lam", [(1.0, 0.95), (0.9, 0.8), (1.0, 0.0)])
def test_gae_is_its_double_sum(gamma, lam):
    mask = ragged()
    rewards, values = table(N, T, seed=1), table(N, T, seed=2)       # also off the mask: nothing there may count
    advantages, returns = ppo.gae(rewards, values, mask, gamma, lam)
    expected = torch.zeros(N, T, dtype=torch.float64)
    for n in range(N):
        steps = mask[n].nonzero().flatten().tolist()
        V = [float(values[n, t]) for t in steps] + [0.0]             # no value beyond the end
        delta = [float(rewards[n, t]) + gamma * V[i + 1] - V[i] for i, t in enumerate(steps)]
        for i, t in enumerate(steps):
            expected[n, t] = sum((gamma * lam) ** (k - i) * delta[k] for k in range(i, len(steps)))
    torch.testing.assert_close(advantages, expected)
    torch.testing.assert_close(returns, (expected + values) * mask)


def test_gae_with_gamma_and_lambda_one_is_reward_to_go_minus_value():
    mask = ragged()
    rewards, values = table(N, T, seed=1) * mask, table(N, T, seed=2)
    to_go = rewards.flip(1).cumsum(1).flip(1) * mask
    advantages, returns = ppo.gae(rewards, values, mask, gamma=1.0, lam=1.0)
    torch.testing.assert_close(advantages, (to_go - values) * mask)
    torch.testing.assert_close(returns, to_go)


def test_whitening_has_mean_zero_and_variance_one_over_the_mask():
    mask = ragged()
    whitened = ppo.whiten(3 + 5 * table(N, T), mask)
    torch.testing.assert_close(whitened[mask].mean().item(), 0.0, atol=1e-9, rtol=0)
    torch.testing.assert_close(whitened[mask].var(correction=0).item(), 1.0, atol=1e-6, rtol=0)
    assert (whitened[~mask] == 0).all()


def test_padding_changes_nothing():
    mask, nan = ragged(), math.nan
    logp, ref_logp, values, old_values = (table(N, T, seed=s) for s in range(4))

    def all_of(pad, mask):
        rewards = ppo.token_rewards(pad(logp), pad(ref_logp), table(N), mask, 0.3)
        advantages, returns = ppo.gae(rewards, pad(values), mask)
        advantages = ppo.whiten(advantages, mask)
        return ([x[:, :T] for x in (rewards, advantages, returns)],
                [ppo.policy_loss(pad(logp), pad(ref_logp), advantages, mask),
                 ppo.value_loss(pad(values), pad(old_values), returns, mask, 0.2)])

    torch.testing.assert_close(all_of(lambda x: padded(x, nan), padded(mask, False)), all_of(lambda x: x, mask))


def test_padding_changes_no_log_prob_and_no_value():
    pi, _, critic = models()
    ids, mask = responses()
    ids, mask = ids[::50, :3], mask[::50, :3]
    ended = mask[:, 2] & (ids[:, 2] == EOS) | ~mask[:, 2]
    ids, mask = ids[ended], mask[ended]
    longer = torch.cat([ids, torch.full((len(ids), 2), EOS)], 1), torch.cat([mask, torch.zeros(len(ids), 2) > 0], 1)
    torch.testing.assert_close(token_logprob(pi, *longer)[:, :3], token_logprob(pi, ids, mask))
    torch.testing.assert_close(ppo.token_values(critic, *longer)[:, :3], ppo.token_values(critic, ids, mask))


def test_a_value_has_not_read_its_own_token():
    critic = models()[2]
    ids, mask = responses()
    assert (ppo.token_values(critic, ids, mask)[~mask] == 0).all()
    ids, mask = ids[-5:], mask[-5:]                                  # 4 tokens each
    for t in range(1, 1 + NEW):
        other = torch.cat([ids[:, :t], (ids[:, t:] + 1) % 6], 1)
        values, changed = ppo.token_values(critic, ids, mask), ppo.token_values(critic, other, mask)
        torch.testing.assert_close(changed[:, :t + 1], values[:, :t + 1])
        assert t == NEW or (changed[:, t + 1] != values[:, t + 1]).all()     # but it has read the one before


# ---- losses ----------------------------------------------------------------------------------------------------------

def test_first_minibatch_has_ratio_one(monkeypatch):
    seen = []

    def recorded(logp, old_logp, *rest, loss=ppo.policy_loss):
        seen.append((logp - old_logp).detach().sum(1).abs().max())
        return loss(logp, old_logp, *rest)

    monkeypatch.setattr(ppo, "policy_loss", recorded)
    iterate(*models(), temperature=0.8, minibatches=3)
    assert seen[0] < 1e-4 < seen[1]


def test_gradient_at_ratio_one_is_the_policy_gradient():
    mask, logp, A = ragged(), table(N, T, seed=1).requires_grad_(), table(N, T, seed=2)
    stats, count = ppo.policy_loss(logp, logp.detach(), A, mask)
    stats["loss"].backward()
    torch.testing.assert_close(logp.grad, -A * mask)
    assert count == mask.sum() and stats["approx_kl"] == stats["clip_fraction"] == 0


def test_the_clip_stops_gains_and_not_losses():
    log_ratio = torch.tensor([[0.0, 0.5, 0.5, -0.5, -0.5, 0.1]]).requires_grad_()
    A, mask = torch.tensor([[9.0, 1.0, -1.0, 1.0, -1.0, 2.0]]), torch.tensor([[False] + 5 * [True]])
    stats, count = ppo.policy_loss(log_ratio, torch.zeros(1, 6), A, mask, clip=0.2)
    stats["loss"].backward()
    ratio = log_ratio.exp().detach()[0]
    torch.testing.assert_close(log_ratio.grad[0], torch.tensor([0.0, 0.0, 1.0, -1.0, 0.0, -2.0]) * ratio)
    torch.testing.assert_close(stats["loss"].detach(), -1.2 + ratio[2] - ratio[3] + 0.8 - 2 * ratio[5])
    assert stats["clip_fraction"] == 4 and count == 5
    torch.testing.assert_close(stats["approx_kl"], (ratio - 1 - log_ratio.detach()[0])[1:].sum())


def test_the_value_clip_stops_steps_towards_the_return_and_not_away():
    values = torch.tensor([[9.0, 0.1, 0.5, -0.5]]).requires_grad_()
    mask = torch.tensor([[False, True, True, True]])
    stats, count = ppo.value_loss(values, torch.zeros(1, 4), torch.ones(1, 4), mask, clip=0.2)
    stats["loss"].backward()
    torch.testing.assert_close(values.grad, torch.tensor([[0.0, -0.9, 0.0, -1.5]]))
    torch.testing.assert_close(stats["loss"].item() * 2, 0.9 ** 2 + 0.8 ** 2 + 1.5 ** 2)
    assert count == 3


def test_losses_are_sums_so_that_their_parts_add_up():
    mask, part = ragged(), slice(0, 3)
    x = [table(N, T, seed=s) for s in range(3)]
    for loss in (ppo.policy_loss, lambda *a: ppo.value_loss(*a, 0.2)):
        whole, n = loss(*x, mask)
        a, b = (loss(*(y[rows] for y in x), mask[rows]) for rows in (part, slice(3, N)))
        torch.testing.assert_close({k: a[0][k] + b[0][k] for k in whole}, whole)
        assert a[1] + b[1] == n


def test_explained_variance():
    mask, returns = ragged(), table(N, T)
    assert ppo.explained_variance(returns + 2.0, returns, mask) == pytest.approx(1.0)
    assert ppo.explained_variance(torch.ones(N, T), returns, mask) == pytest.approx(0.0)
    assert ppo.explained_variance(-returns, returns, mask) == pytest.approx(-3.0)


# ---- against the exact policy gradient, on every response there is -------------------------------------------------

def test_the_enumeration_is_complete():
    pi, ref, _ = models()
    ids, mask = responses()
    with torch.no_grad():
        logp, ref_logp = log_probs(pi, ids, mask).double(), log_probs(ref, ids, mask).double()
    torch.testing.assert_close(logp.exp().sum(1), torch.ones(3, dtype=torch.float64), atol=1e-6, rtol=0)
    drawn, drawn_mask = generate(pi, PROMPTS.repeat(50, 1), NEW, eos_id=EOS, generator=torch.Generator().manual_seed(0))
    rows = {(*x, *m) for x, m in zip(ids.tolist(), mask.tolist())}
    assert len(rows) == len(ids) and {(*x, *m) for x, m in zip(drawn.tolist(), drawn_mask.tolist())} <= rows
    reward = reward_of(ids, mask).double().view(3, -1)
    log_best, J_best = optimum(ref_logp, reward, BETA)
    torch.testing.assert_close(evaluate(log_best, ref_logp, reward, BETA)[2], J_best)
    kl_to_best = (logp.exp() * (logp - log_best)).sum(1)             # J* - J = beta KL(pi || pi*)
    torch.testing.assert_close(J_best - evaluate(logp, ref_logp, reward, BETA)[2], BETA * kl_to_best, atol=1e-5, rtol=0)


def exact(pi, ref, temperature=1.0):
    """The gradient of J, summed over prompts, by autograd; and a rollout that holds every response, of all prompts."""
    ids, mask = responses()
    reward = reward_of(ids, mask)
    with torch.no_grad():
        old_logp, ref_logp = (token_logprob(m, ids, mask, temperature) for m in (pi, ref))
    J = evaluate(log_probs(pi, ids, mask, temperature), ref_logp.sum(1).view(3, -1), reward.view(3, -1), BETA)[2].sum()
    rewards = ppo.token_rewards(old_logp, ref_logp, reward, mask, BETA)
    batch = {"ids": ids, "mask": mask, "old_logp": old_logp, "rewards": rewards}
    return flat(torch.autograd.grad(J, pi.parameters())), batch


def exact_values(ids, mask, old_logp, rewards):
    """V(x, y_<t), the mean reward-to-go of the responses that begin alike.  (N, T) x4 -> (N, T)"""
    p, to_go = old_logp.sum(1).exp(), rewards.flip(1).cumsum(1).flip(1)
    values = torch.zeros(mask.shape)
    for t in range(1, ids.shape[1]):
        prefix = torch.unique(ids[:, :t], dim=0, return_inverse=True)[1]                    # (N,)
        total, weight = torch.zeros(2, len(ids)).index_add(1, prefix, torch.stack([p * to_go[:, t], p]))
        values[:, t] = (total / weight)[prefix]
    return values.where(mask, 0.0)


@pytest.mark.parametrize("critic_is_exact, lam", [(False, 1.0), (True, 1.0), (True, 0.95), (True, 0.0)])
def test_expected_gradient_is_the_gradient_of_J(critic_is_exact, lam):
    """In expectation over all responses, at ratio 1: with any critic at lam = 1, with the exact one at any lam."""
    pi, ref, critic = models()
    gradient, batch = exact(pi, ref)
    with torch.no_grad():
        values = exact_values(**batch) if critic_is_exact else ppo.token_values(critic, batch["ids"], batch["mask"])
    advantages, _ = ppo.gae(batch["rewards"], values, batch["mask"], lam=lam)
    weighted = advantages * batch["old_logp"].sum(1).exp()[:, None]  # the loss is linear in A, so A takes the weights
    logp = token_logprob(pi, batch["ids"], batch["mask"])
    stats, _ = ppo.policy_loss(logp, batch["old_logp"], weighted, batch["mask"])
    found = flat(torch.autograd.grad(-stats["loss"], pi.parameters()))
    torch.testing.assert_close(found, gradient, atol=2e-4 * float(gradient.abs().max()), rtol=0)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_mean_update_points_along_the_gradient_of_J(temperature):
    """A whole iteration, as one plain gradient step, from sampling to the update; with a critic that knows nothing."""
    pi, ref, critic = models()
    gradient, before, mean = exact(pi, ref, temperature)[0], state(pi), 0.0
    for seed in range(6):
        new = copy.deepcopy(pi)
        sgd = (torch.optim.SGD(new.parameters(), lr=1.0), torch.optim.SGD(critic.parameters(), lr=0.0))
        iterate(new, ref, critic, sgd, policy_lr=1e-2, critic_lr=0.0, seed=seed, samples=500, epochs=1, minibatches=1,
                temperature=temperature)
        mean = mean + (state(new) - before) / 6
    assert torch.cosine_similarity(mean, gradient, dim=0) > 0.97


def test_metrics_are_the_exact_ones_within_sampling_error():
    pi, ref, critic = models()
    ids, mask = responses()
    with torch.no_grad():
        logp, ref_logp = (log_probs(m, ids, mask, 0.7) for m in (pi, ref))
    found = iterate(pi, ref, critic, samples=700, critic_only=True, epochs=1, temperature=0.7)
    reward = reward_of(ids, mask).view(3, -1)
    for name, x in {"reward": reward, "kl": logp - ref_logp, "objective": reward - BETA * (logp - ref_logp),
                    "length": mask.sum(1).view(3, -1)}.items():
        mean = (logp.exp() * x).sum(1)
        se = float((logp.exp() * (x - mean[:, None]) ** 2).sum(1).mean() / 2100) ** 0.5
        assert abs(found[name] - float(mean.mean())) < 4 * se, name


def test_training_reaches_the_optimum():
    """Within 5% of J* - J(pi_sft), at pi*'s KL within 20%, of which no step was told."""
    ref, steps, lr = policy(), 60, 3e-3
    pi, critic = copy.deepcopy(ref), ScalarGPT(ref, EOS)
    optimizers, generator = (adamw(pi, lr, 1e-5), adamw(critic, lr, 1e-5)), torch.Generator().manual_seed(0)
    for step in range(-5, steps):
        now = lr * cosine(max(step, 0), steps)
        stats = ppo.iteration(pi, ref, critic, *optimizers, reward_of, PROMPTS, policy_lr=now, critic_lr=now, beta=BETA,
                              max_new_tokens=NEW, eos_id=EOS, generator=generator, samples=32, minibatches=4,
                              critic_only=step < 0)
    ids, mask = responses()
    with torch.no_grad():
        logp, ref_logp, reward = log_probs(pi, ids, mask), log_probs(ref, ids, mask), reward_of(ids, mask).view(3, -1)
    assert gap_closed(logp, ref_logp, reward, BETA) >= 0.95
    kl, best_kl = evaluate(logp, ref_logp, reward)[1].mean(), limit(ref_logp, reward, BETA)[1].mean()
    assert abs(kl / best_kl - 1) <= 0.2
    assert stats["explained_variance"] > 0.8


# ---- one iteration as a piece of a program -------------------------------------------------------------------------

def test_critic_only_leaves_the_policy_as_it_is():
    pi, ref, critic = models()
    before = [state(m) for m in (pi, ref, critic)]
    optimizers = adamw(pi, 1e-3, 1e-5), adamw(critic, 1e-3, 1e-5)
    warm_up = iterate(pi, ref, critic, optimizers, critic_only=True)
    assert torch.equal(state(pi), before[0]) and not optimizers[0].state
    assert not torch.equal(state(critic), before[2])
    training = iterate(pi, ref, critic, optimizers)
    assert not torch.equal(state(pi), before[0]) and torch.equal(state(ref), before[1])
    assert list(warm_up) == list(training)                           # the same columns in metrics.csv


def test_the_critic_learns_the_exact_value():
    pi, ref, critic = models()
    batch = exact(pi, ref)[1]
    value, mask = exact_values(**batch), batch["mask"]
    p = (batch["old_logp"].sum(1).exp()[:, None] * mask)[mask]       # (M,) how often pi reads it

    def explained():
        with torch.no_grad():
            x = (value - ppo.token_values(critic, batch["ids"], mask))[mask], value[mask]   # (M,), (M,)
        var = [(p * (y - (p * y).sum() / p.sum()) ** 2).sum() for y in x]
        return float(1 - var[0] / var[1])

    assert explained() < 0.1
    optimizers = adamw(pi, 0.0), adamw(critic, 3e-3, 1e-5)
    for seed in range(6):
        iterate(pi, ref, critic, optimizers, critic_lr=3e-3, critic_only=True, samples=256, seed=seed)
    assert explained() > 0.3


def test_an_iteration_is_a_function_of_its_arguments():
    found = []
    for draws in (0, 5):
        torch.rand(draws)                                            # the global generator has no say
        pi, ref, critic = models()
        found.append((iterate(pi, ref, critic), state(pi), state(critic)))
    torch.testing.assert_close(*found, atol=0, rtol=0)


def test_micro_batches_change_memory_only():
    found = []
    for rows in (0, 5):
        pi, ref, critic = models()
        sgd = (torch.optim.SGD(pi.parameters(), lr=0.1), torch.optim.SGD(critic.parameters(), lr=0.1))
        stats = iterate(pi, ref, critic, sgd, micro_batch_size=rows, policy_lr=0.1, critic_lr=0.1)
        found.append((stats, state(pi), state(critic)))
    torch.testing.assert_close(*found, atol=1e-4, rtol=1e-4)


def test_inputs_are_never_written_to():
    mask, x = ragged(), [table(N, T, seed=s) for s in range(4)]
    before = [y.clone() for y in (mask, *x)]
    ppo.token_rewards(x[0], x[1], x[2][:, 0], mask, 0.3)
    ppo.gae(x[2], x[3], mask)
    ppo.whiten(x[2], mask)
    ppo.policy_loss(x[0], x[1], x[2], mask)
    ppo.value_loss(x[0], x[1], x[2], mask, 0.2)
    assert all(map(torch.equal, (mask, *x), before))
    prompts, kept = PROMPTS.clone(), []

    def reward(ids, mask):
        kept.append((ids, mask, ids.clone(), mask.clone()))
        return reward_of(ids, mask)

    pi, ref, critic = models()
    ppo.iteration(pi, ref, critic, adamw(pi, 1e-3), adamw(critic, 1e-3), reward, prompts, policy_lr=1e-3,
                  critic_lr=1e-3, beta=BETA, max_new_tokens=NEW, eos_id=EOS, generator=torch.Generator().manual_seed(0))
    assert torch.equal(prompts, PROMPTS) and all(torch.equal(a, c) and torch.equal(b, d) for a, b, c, d in kept)


def test_prompts_may_be_a_list_of_any_lengths():
    pi, ref, critic = models()
    found = ppo.rollout(pi, ref, critic, reward_of, [[1], [2, 3, 4]], 2, eos_id=EOS, samples=3,
                        generator=torch.Generator().manual_seed(0))
    assert found["ids"][:, 0].tolist() == [1, 1, 1, 2, 2, 2]
    assert found["mask"][:, 1].tolist() == [True, True, True, False, False, False]
