"""What an aligned policy is worth: its reward, its KL to pi_sft, and the limit that no policy can pass.

The limit.  Of all policies with a given average KL the best is pi*_beta with one beta for all prompts (the
Lagrangian separates over prompts).  On M responses of pi_sft per prompt, with w = softmax(r / beta):

    r*(beta) = sum w r,    KL*(beta) = sum w log(M w),    log Z = log mean exp(r / beta)

J_beta = r - beta KL is at most beta log Z at *every* beta, so the limit at a KL k is  min over beta of
beta (log Z + k), and the KL that a reward r needs is  max over beta of  r / beta - log Z.
Shapes: P prompts, S responses of a policy to each, M of pi_sft; N rows of T tokens.
"""
import math

import numpy as np
import torch
import torch.nn.functional as F

from model import CHUNK

BETAS = np.geomspace(100, 0.02, 200)


# ---- a policy's KL and reward ------------------------------------------------------------------------

@torch.no_grad()
def sequence_kl(policy, ref, ids, mask, temperature):
    """KL(policy || ref) in nats per response, by two unbiased estimators.  (N, T), (N, T) -> (N,), (N,)

    First: the sum over the response's states of the KL between the two next-token distributions, over the
    full vocabulary (Rao-Blackwellized, arXiv 2504.10637).  Second: the plain log-ratio, "k1".
    """
    before = mask[:, 1:]                                                        # (N, T-1), of a token's state
    states = policy.hidden(ids[:, :-1])[before], ref.hidden(ids[:, :-1])[before]            # (M, C) each
    rows = max(1, CHUNK // policy.config.vocab_size)                            # of logits at a time
    kl, k1 = [], []
    for ours, theirs, token in zip(*[tensor.split(rows) for tensor in (*states, ids[mask])]):
        logp = F.log_softmax(policy.head(ours) / temperature, dim=-1)           # (m, V)
        log_ratio = logp - F.log_softmax(ref.head(theirs) / temperature, dim=-1)
        kl.append((logp.exp() * log_ratio).sum(1))                              # (m, V) -> (m,)
        k1.append(log_ratio.gather(1, token[:, None]).squeeze(1))               # (m, V) -> (m,)
    zeros = torch.zeros(mask.shape, device=ids.device)                          # (N, T)
    return tuple(zeros.masked_scatter(mask, torch.cat(each)).sum(1) for each in (kl, k1))


def summary(measured, eos_id):
    """A policy's measured responses -> a row of eval.csv.  Standard errors are clustered by prompt.

    measured: {ids, mask: (P, S, T); reward, kl, k1: (P, S)}
    """
    ids, mask = measured["ids"], measured["mask"]                               # (P, S, T)
    reward, reward_se = mean_se(measured["reward"])
    kl, kl_se = mean_se(measured["kl"])
    ended = ((ids == eos_id) & mask).any(2)                                     # (P, S, T) -> (P, S)
    return {"reward": reward, "reward_se": reward_se,
            "accuracy": mean_se(measured["reward"].sigmoid())[0],               # paper D.3
            "kl": kl, "kl_se": kl_se, "kl_k1": mean_se(measured["k1"])[0],
            "within_prompt_sd": within_prompt_sd(measured["reward"]),
            "length": mean_se(mask.sum(2))[0], "ended": mean_se(ended)[0]}


def mean_se(x):
    """(P, S) -> the mean and its standard error, from the spread of the prompts' means."""
    per_prompt = x.float().mean(1)                                              # (P, S) -> (P,)
    n = len(per_prompt)
    return float(per_prompt.mean()), float(per_prompt.std()) / math.sqrt(n) if n > 1 else math.nan


def within_prompt_sd(reward):
    """The standard deviation of a response's reward around its prompt's mean.  (P, S) -> float"""
    return float(reward.var(1, correction=1).mean().sqrt())


# ---- the limit --------------------------------------------------------------------------------------------

def optimum(reward, beta, judged=None):
    """pi*_beta from rewards of pi_sft's responses.  (P, M) -> reward, KL, effective samples, log Z: (P,)

    judged: (P, M), the judge's rewards of the same responses, where `reward` is a reward model's.
    """
    r = np.asarray(reward, dtype=np.float64)
    log_w = r / beta                                                            # (P, M)
    log_z = np.logaddexp.reduce(log_w, axis=1) - math.log(r.shape[1])           # (P,)
    w = np.exp(log_w - log_z[:, None]) / r.shape[1]                             # (P, M), sums to 1
    best = (w * r).sum(1)                                                       # (P,)
    kl = best / beta - log_z                                                    # (P,)
    if judged is not None:
        best = (w * np.asarray(judged)).sum(1)                                  # (P,)
    return best, kl, 1 / (w ** 2).sum(1), log_z


def supported(ess):
    """Whether 90% of the prompts have 50 effective samples: else a few responses decide.  (P,) -> bool"""
    return bool((ess >= 50).mean() >= 0.9)


def limit_curve(reward, judged=None, betas=BETAS):
    """The limit over beta, as far as the samples support it.  (P, M) -> {beta, reward, kl, log_z: (n,)}

    judged: see `optimum`; then the limit when only the reward model is known.
    """
    curve = {"beta": [], "reward": [], "kl": [], "log_z": []}
    for beta in betas:
        best, kl, ess, log_z = optimum(reward, beta, judged)                    # (P,) each
        if supported(ess):
            curve["beta"].append(beta)
            for name, value in (("reward", best), ("kl", kl), ("log_z", log_z)):
                curve[name].append(value.mean())
    return {name: np.array(column) for name, column in curve.items()}


def kl_needed(curve, reward):
    """The KL at which the limit has this reward: max over beta of r / beta - log Z.  nan if unsupported"""
    return float(max(reward / curve["beta"] - curve["log_z"], default=math.nan))


def share_of_objective(beta, reward, kl, start, limit_reward, judged=None):
    """The gain in J = E r - beta KL over pi_sft's as a share of pi*_beta's.  -> share, se; nan if unsupported

    reward, kl: (P, S) of the policy's responses, start: (P, S) pi_sft's rewards on the same prompts;
    limit_reward: (P', M) of pi_sft's responses; judged: see `optimum`, then pi*_beta is the reward model's.
    se: over prompts, of the numerator.
    """
    best, best_kl, ess, _ = optimum(limit_reward, beta, judged)                 # (P',) each
    best_gain = float((best - beta * best_kl).mean() - np.mean(limit_reward if judged is None else judged))
    gain, se = mean_se(reward - beta * kl - start)
    if not supported(ess) or best_gain < 0.01:            # less is noise: an oracle that learned nothing
        return math.nan, math.nan
    return gain / best_gain, se / best_gain


# ---- other measures ---------------------------------------------------------------------------------------

def best_of_n(reward, n, judged=None):
    """The best of n responses, over M // n groups of n.  (P, M) -> an upper bound on its KL, its reward

    judged: (P, M), the judge's rewards of the same responses, where `reward` is a reward model's.
    """
    P, M = reward.shape
    groups = reward[:, :M // n * n].reshape(P, -1, n)                           # (P, M // n, n)
    best = groups.argmax(-1)[..., None]                                         # (P, M // n, 1)
    judged = groups if judged is None else judged[:, :M // n * n].reshape(groups.shape)
    return math.log(n) - (n - 1) / n, float(np.take_along_axis(judged, best, -1).mean())


def wins(ours, theirs):
    """1 where ours is higher, 0 where theirs is, a tie is one half.  Two tensors -> one"""
    return ((ours - theirs).sign() + 1) / 2


def win_rate(ours, theirs):
    """The share of pairs of a prompt's responses that ours win (paper App. C).  (P, S), (P, S') -> float"""
    return float(wins(ours[:, :, None], theirs[:, None, :]).mean())             # (P, S, S')


def density_ratio(s, weight, grid):
    """pi / pi_sft against s = log pi_sft (paper, Figure 3): a kernel estimate of E_pi_sft[pi / pi_sft | s].

    s, weight: (M,) of responses of pi_sft, the weights sum to 1 -> (len(grid),), nan where fewer than 5
    responses are near.  Gaussian, one bandwidth (Silverman's) for numerator and denominator.
    """
    width = max(1.06 * s.std() * len(s) ** -0.2, 1e-9)
    kernel = np.exp(-0.5 * ((grid[:, None] - s) / width) ** 2)                  # (G, M)
    near = kernel.sum(1)                                                        # (G,)
    return np.where(near >= 5, len(s) * (kernel @ weight) / np.maximum(near, 1e-300), np.nan)
