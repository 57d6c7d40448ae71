"""PPO for the alignment objective  J(pi) = E r - beta KL(pi || pi_sft)  of the EXO paper (arXiv 2402.00856).

Where EXO and DPO fit pi* on responses drawn once from pi_sft, PPO climbs J itself (Eq 4), on fresh responses.
A response is an episode, a token an action.  J's KL, summed over tokens, gives each token a reward,

    R_t = -beta (log pi_old(y_t|x, y_<t) - log pi_sft(y_t|x, y_<t))  +  r(x, y) at the response's last token,

whose sum is r - beta log(pi_old / pi_sft).  A critic V turns rewards into advantages (GAE, arXiv 1506.02438),

    delta_t = R_t + gamma V_{t+1} - V_t,  A_t = sum_{k >= 0} (gamma lam)^k delta_{t+k},  G_t = A_t + V_t,

and several passes over the same responses stay close to pi_old by clipping rho = pi / pi_old (1707.06347):

    L_policy = mean over tokens of max(-A rho, -A clip(rho, 1 - clip, 1 + clip)).

Implementations add details.  N: "The N implementation details of RLHF with PPO"; DS: DeepSpeed-Chat; TRL: its
PPO trainer.  Percentages: how much of J* - J(pi_sft) 60 iterations of 96 responses gain on
tests/enumerable.py, where this file gains 96 to 98% (3 seeds, learning rates 3e-3).  "Same": within a point.
Kept:

 1. KL in the token reward, by the plain log-ratio (N, DS, TRL).  It is what makes J the objective.
 2. A critic separate from the policy, from the reward model's weights (DS, TRL), with its own optimizer (DS).
 3. The critic alone in the first iterations (EXO paper): a wrong V makes the policy gradient noise.  Same
    without.
 4. Advantages whitened over the batch's response tokens (N, TRL; not DS), so that neither the step nor the
    gradient clip depends on the reward's scale.  Same without.
 5. Policy loss clipped (N, DS, TRL): 51 to 84% without.  Value loss clipped (N, DS, TRL), here in standard
    deviations of the returns (ours): same without.
 6. 4 passes over the responses (N, TRL; DS once), in minibatches (ours; N: one): 2 passes 93 to 94%, one step
    78 to 81%.
 7. Adam's eps at least 1e-5 (N), set by the caller: the first steps do not divide by almost 0.  Same
    with 1e-8.
 8. Log-probs under the sampling temperature in pi, pi_old and pi_sft (N, TRL; not DS), as sampled.
 9. log pi_old by training's function, not the sampler's (N, TRL): rho is 1 at first.  No dropout (N).
10. No value past the end, or past the length cap: the reward has already scored the cut text.

Dropped, because they change the objective under which the methods are compared, or have to be balanced:

11. Adaptive beta (arXiv 1909.08593): beta is fixed, beta_r * beta_pi of the other methods.
12. Reward whitening, scaling and clipping (off in N's TL;DR code; DS clips at 5): they change beta.
13. A penalty for responses without end-of-text (N, TRL): EXO and DPO see the reward as it is.
14. The value head on the policy's own trunk, its loss weighted by 0.1 (N).

(N, T) tensors are indexed by the token they describe, 0 off the mask; N responses, T tokens.
"""
import math

import torch
import torch.nn.functional as F

from loop import Sums, my_rows, update
from model import respond, token_logprob, trim

# ---- the formulas -------------------------------------------------------------------------------------


def token_rewards(logp, ref_logp, reward, mask, beta):
    """R_t as defined above.  logp, ref_logp (N, T) in nats, reward (N,), mask (N, T) -> (N, T)

    The sum of a row is reward - beta * (log pi(y|x) - log pi_sft(y|x)).
    """
    last = mask & ~F.pad(mask[:, 1:], (0, 1))                  # (N, T) end-of-text, or the token before a cut
    rewards = -beta * (logp - ref_logp) + reward[:, None] * last     # (N, T)
    return rewards.where(mask, 0.0)


def gae(rewards, values, mask, gamma=1.0, lam=0.95):
    """Generalized advantage estimation (arXiv 1506.02438, Eq 16).  (N, T) x3 -> advantages, returns (N, T)

    values[:, t] is V before token t.  lam = 1: reward-to-go minus value, unbiased for any V; 0: TD error.
    gamma = 1: N, DS, TRL; J does not discount.
    lam = 0.95: N, DS, TRL; a little bias for less variance.  On tests/enumerable.py lam = 1 does as well.
    """
    rewards = rewards.where(mask, 0.0)
    values = values.where(mask, 0.0)                                 # V past the end is 0 (detail 10)
    advantages = torch.zeros_like(rewards)                           # (N, T)
    carry = next_value = torch.zeros_like(rewards[:, 0])             # (N,)
    for t in reversed(range(rewards.shape[1])):
        delta = rewards[:, t] + gamma * next_value - values[:, t]    # (N,)
        carry = (delta + gamma * lam * carry).where(mask[:, t], 0.0)  # (N,)
        advantages[:, t] = carry
        next_value = values[:, t]
    return advantages, advantages + values


def whiten(advantages, mask):
    """Mean 0 and variance 1 over the mask (detail 4).  (N, T), (N, T) -> (N, T), 0 off the mask"""
    mean = advantages[mask].mean()
    std = advantages[mask].std(correction=0)
    return ((advantages - mean) / (std + 1e-8)).where(mask, 0.0)


def policy_loss(logp, old_logp, advantages, mask, clip=0.2):
    """Clipped policy loss (arXiv 1707.06347, Eq 7), summed over the mask.  (N, T) x4 -> {name: sum}, tokens

    At logp = old_logp its gradient is the policy gradient, -sum A_t grad logp_t.
    clip = 0.2: paper, N, DS, TRL.
    approx_kl: KL(pi_old || pi) per token, rho - 1 - log rho >= 0; clip_fraction: beyond the clip.
    """
    log_ratio = (logp - old_logp)[mask]                              # (N, T) -> (M,)
    A = advantages[mask]                                             # (N, T) -> (M,)
    ratio = log_ratio.exp()
    loss = torch.maximum(-A * ratio, -A * ratio.clamp(1 - clip, 1 + clip))                # (M,)
    with torch.no_grad():
        approx_kl = ratio - 1 - log_ratio                            # (M,)
        clipped = (ratio - 1).abs() > clip                           # (M,)
    return {"loss": loss.sum(), "approx_kl": approx_kl.sum(), "clip_fraction": clipped.sum()}, len(A)


def value_loss(values, old_values, returns, mask, clip):
    """Half the squared error of V, clipped, summed over the mask.  (N, T) x4 -> {name: sum}, tokens

    clip: how far V may move from old_values before its gradient stops, in the reward's unit.  A fixed 0.2
    (N, DS, TRL) suits rewards of variance 1; `iteration` passes 0.2 standard deviations of the returns.
    """
    V, old, G = values[mask], old_values[mask], returns[mask]        # (N, T) -> (M,)
    near = torch.maximum(torch.minimum(V, old + clip), old - clip)   # (M,)
    return {"loss": 0.5 * torch.maximum((V - G) ** 2, (near - G) ** 2).sum()}, len(V)


def token_values(critic, ids, mask):
    """V before each response token.  (N, T), (N, T) -> (N, T), 0 off the mask

    A ScalarGPT's column t has read token t itself, so V before token t is one column to the left.
    """
    values = critic.values(ids[:, :-1])                              # (N, T-1)
    return F.pad(values, (1, 0)).where(mask, 0.0)                    # (N, T-1) -> (N, T)


def explained_variance(values, returns, mask):
    """1 - var(G - V) / var(G) over the mask: 1 for a perfect critic, 0 for a constant.  (N, T) x3 -> float"""
    error = (returns - values)[mask]                                 # (N, T) -> (M,)
    G = returns[mask]                                                # (N, T) -> (M,)
    return 1 - float(error.var(correction=0) / G.var(correction=0).clamp(min=1e-8))


# ---- one iteration ------------------------------------------------------------------------------------

@torch.no_grad()
def rollout(policy, ref, critic, reward, prompts, new_tokens, T, temperature, eos_id, generator, rows):
    """A response to each prompt, with everything that the updates leave fixed.  prompts: N id lists

    reward: (ids, mask) -> (N,).  rows: how many are sampled at once.
    -> {ids, mask, old_logp, ref_logp, old_values: (N, T), reward: (N,)}
    """
    def measure(ids, mask):
        return {"old_logp": token_logprob(policy, ids, mask, temperature),               # detail 9
                "ref_logp": token_logprob(ref, ids, mask, temperature),
                "old_values": token_values(critic, ids, mask), "reward": reward(ids, mask)}

    batch = respond(policy, prompts, new_tokens, T, temperature, eos_id, generator, rows, measure)
    batch["ids"] = batch["ids"].long()
    longest = trim(batch["ids"], batch["mask"])[0].shape[1]
    for name, column in batch.items():
        batch[name] = (column[:, :longest] if column.dim() == 2 else column).to(critic.score.weight.device)
    return batch


def iteration(policy, ref, critic, policy_optimizer, critic_optimizer, reward, prompts, *, policy_lr,
              critic_lr, beta, new_tokens, T, temperature, eos_id, generator, epochs=4, minibatches=2,
              clip=0.2, value_clip=0.2, gamma=1.0, lam=0.95, critic_only=False, micro_batch=0,
              sample_batch=1024):
    """One PPO iteration: sample, score, estimate advantages, then epochs x minibatches steps of each model.

    policy, ref: GPT; critic: ScalarGPT; prompts, reward as in `rollout`; optimizers: AdamW.
    policy_lr, critic_lr: this iteration's; the schedule is the caller's.  critic_only: see detail 3.
    value_clip: in standard deviations of the returns (detail 5), math.inf for none.
    micro_batch, sample_batch: rows at once in an update (0: all) and in sampling; memory, not results.
    generator (CPU): the only source of randomness, first for the responses, then for the minibatches.
    -> {name: float}: reward, kl (log-ratio to pi_sft in nats per response), objective (J) and length of the
    responses, explained_variance of the critic, all before the updates; the others are means over updates.
    """
    batch = rollout(policy, ref, critic, reward, prompts, new_tokens, T, temperature, eos_id, generator,
                    sample_batch)
    ids, mask, old_logp, old_values = (batch[name] for name in ("ids", "mask", "old_logp", "old_values"))
    rewards = token_rewards(old_logp, batch["ref_logp"], batch["reward"], mask, beta)    # (N, T)
    advantages, returns = gae(rewards, old_values, mask, gamma, lam)                     # (N, T), (N, T)
    whitened = whiten(advantages, mask)                                                  # (N, T)
    radius = value_clip * float(returns[mask].std(correction=0))

    updates = []
    for _ in range(epochs):
        for rows in torch.randperm(len(ids), generator=generator).chunk(minibatches):
            sums = Sums()
            for part in my_rows(rows).split(micro_batch or len(rows)):
                values = token_values(critic, ids[part], mask[part])                     # (m, T)
                stats, tokens = value_loss(values, old_values[part], returns[part], mask[part], radius)
                stats["loss"].backward()
                sums.add(tokens, **stats)
            value = update([critic_optimizer], critic_lr, sums, "ppo, critic")
            if critic_only:
                means = dict.fromkeys(("loss", "approx_kl", "clip_fraction", "grad_norm"), math.nan)
            else:
                sums = Sums()
                for part in my_rows(rows).split(micro_batch or len(rows)):
                    logp = token_logprob(policy, ids[part], mask[part], temperature)     # (m, T)
                    stats, tokens = policy_loss(logp, old_logp[part], whitened[part], mask[part], clip)
                    stats["loss"].backward()
                    sums.add(tokens, **stats)
                means = update([policy_optimizer], policy_lr, sums, "ppo, policy")
            updates.append(means | {"value_loss": value["loss"], "value_grad_norm": value["grad_norm"]})

    log_ratio = (old_logp - batch["ref_logp"]).sum(1)                                    # (N, T) -> (N,)
    objective = batch["reward"] - beta * log_ratio                                       # (N,)
    stats = {"reward": float(batch["reward"].mean()), "kl": float(log_ratio.mean()),
             "objective": float(objective.mean()), "length": float(mask.sum(1).float().mean()),
             "explained_variance": explained_variance(old_values, returns, mask)}
    for name in updates[0]:
        stats[name] = sum(means[name] for means in updates) / len(updates)
    return stats
