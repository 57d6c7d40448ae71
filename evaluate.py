"""What an aligned policy is worth: its reward, its KL to pi_sft, and the limit that no policy can pass.

The limit.  Of all policies with a given average KL the best is pi*_beta with one beta for all prompts (the
Lagrangian separates over prompts).  On M responses of pi_sft a prompt, with w = softmax(r / beta):

    r*(beta) = sum w r,    KL*(beta) = sum w log(M w)

The vertical distance to it is the paper's own objective:  r*(k) - r(pi) = beta(k) E_x KL(pi || pi*_beta(k)).
Shapes: P prompts, S responses of a policy to each, M of pi_sft; N rows of T tokens.
"""
import csv
import math
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from compute import UserError
from model import respond, rows_at_once

# ---- sampling and scoring a policy -------------------------------------------------------------------------


@torch.no_grad()
def sequence_kl(policy, ref, ids, mask, temperature):
    """KL(policy || ref) in nats a sequence, by two unbiased estimators.  (N, T), (N, T) -> (N,), (N,)

    First: the sum over the response's states of the KL between the two next-token distributions, over the
    full vocabulary (Rao-Blackwellised, arXiv 2504.10637).  Second: the plain log-ratio, "k1".
    """
    states = policy.hidden(ids[:, :-1])[mask[:, 1:]]                            # (N, T-1, C) -> (n, C)
    ref_states = ref.hidden(ids[:, :-1])[mask[:, 1:]]                           # (N, T-1, C) -> (n, C)
    rows = rows_at_once(policy)
    full, plain = [], []
    for h, ref_h, target in zip(states.split(rows), ref_states.split(rows), ids[mask].split(rows)):
        logp = F.log_softmax(policy.head(h) / temperature, dim=-1)              # (m, V)
        log_ratio = logp - F.log_softmax(ref.head(ref_h) / temperature, dim=-1)             # (m, V)
        full.append((logp.exp() * log_ratio).sum(-1))                           # (m,)
        plain.append(log_ratio.gather(1, target[:, None]).squeeze(1))           # (m,)
    zeros = torch.zeros(mask.shape, device=ids.device)                          # (N, T)
    kl = zeros.masked_scatter(mask, torch.cat(full)).sum(1)                     # (n,) -> (N, T) -> (N,)
    k1 = zeros.masked_scatter(mask, torch.cat(plain)).sum(1)                    # (n,) -> (N, T) -> (N,)
    return kl, k1


@torch.no_grad()
def measure(policy, ref, reward, prompts, each, max_new_tokens, temperature, eos_id, generator, rows):
    """`each` responses to every prompt, sampled `rows` at a time, with their rewards and KL.

    prompts: P id lists.  reward: (ids, mask) -> (N,).  -> {ids, mask, reward, kl, k1: (P, each, ...)}, on CPU
    """
    def columns(ids, mask):
        kl, k1 = sequence_kl(policy, ref, ids, mask, temperature)               # (n,), (n,)
        return {"reward": reward(ids, mask), "kl": kl, "k1": k1}

    repeated = [prompt for prompt in prompts for _ in range(each)]
    measured = respond(policy, repeated, max_new_tokens, temperature, eos_id, generator, rows, columns)
    measured["ids"] = measured["ids"].int()                                     # half the space on disk
    return {name: column.unflatten(0, (len(prompts), each)) for name, column in measured.items()}


def summary(measured, eos_id):
    """What `measure` returns -> a row of eval.csv.  Standard errors are clustered by prompt."""
    ids, mask = measured["ids"], measured["mask"]                               # (P, S, T)
    reward, reward_se = mean_se(measured["reward"])
    kl, kl_se = mean_se(measured["kl"])
    ended = ((ids == eos_id) & mask).any(2)                                     # (P, S, T) -> (P, S)
    return {"reward": reward, "reward_se": reward_se,
            "accuracy": mean_se(measured["reward"].sigmoid())[0],               # paper D.3
            "kl": kl, "kl_se": kl_se, "kl_k1": mean_se(measured["k1"])[0],
            "within_prompt_sd": within_prompt_sd(measured["reward"]),
            "length": mean_se(mask.sum(2))[0], "ended": mean_se(ended)[0], "distinct2": distinct2(ids, mask)}


def mean_se(x):
    """(P, S) -> the mean and its standard error, from the spread of the prompts' means."""
    per_prompt = x.float().mean(1)                                              # (P, S) -> (P,)
    return float(per_prompt.mean()), float(per_prompt.std() / math.sqrt(len(per_prompt)))


def within_prompt_sd(reward):
    """The standard deviation of a response's reward around its prompt's mean.  (P, S) -> float"""
    return float(reward.var(1, correction=1).mean().sqrt())


def distinct2(ids, mask):
    """The share of different ones among all pairs of neighbouring response tokens.  (P, S, T) x 2 -> float"""
    both = mask[..., :-1] & mask[..., 1:]                                       # (P, S, T-1)
    first = ids[..., :-1][both].long()                                          # (P, S, T-1) -> (n,)
    second = ids[..., 1:][both].long()                                          # (P, S, T-1) -> (n,)
    pair = first * (int(ids.max()) + 1) + second                                # (n,) one number a pair
    return len(pair.unique()) / max(1, len(pair))


# ---- the limit ---------------------------------------------------------------------------------------------

def limit_at(reward, beta, judged=None):
    """pi*_beta from rewards of pi_sft's responses.  (P, M) -> reward, KL, effective samples, log Z: (P,)

    judged: the rewards to report, where others than those that shape pi*_beta; (P, M) of the same responses.
    """
    r = np.asarray(reward, dtype=np.float64)
    log_w = r / beta                                                            # (P, M)
    log_z = np.logaddexp.reduce(log_w, axis=1) - math.log(r.shape[1])           # (P,)
    w = np.exp(log_w - log_z[:, None]) / r.shape[1]                             # (P, M), sums to 1
    best = (w * r).sum(1)                                                       # (P,)
    kl = best / beta - log_z                                                    # (P,)
    if judged is not None:
        best = (w * np.asarray(judged, dtype=np.float64)).sum(1)                # (P,)
    return best, kl, 1 / (w ** 2).sum(1), log_z


def supported(ess):
    """Whether 90% of the prompts have 50 effective samples: else a few responses decide.  (P,) -> bool"""
    return bool((ess >= 50).mean() >= 0.9)


def limit_curve(reward, betas=None, judged=None):
    """The limit over beta.  (P, M) -> {beta, reward, kl, supported (only there it is drawn): (n,), start}

    start: pi_sft's reward on the same prompts, where the curve begins at KL 0.  judged: as in `limit_at`: on
    a reward model's rewards, judged by the oracle's, it is the limit of what sees the reward model alone.
    """
    betas = np.geomspace(100, 0.02, 200) if betas is None else np.array(betas)
    curve = {"beta": betas, "reward": [], "kl": [], "supported": []}
    for beta in betas:
        best, kl, ess, _ = limit_at(reward, beta, judged)                       # (P,) each
        curve["reward"].append(best.mean())
        curve["kl"].append(kl.mean())
        curve["supported"].append(supported(ess))
    start = np.mean(reward if judged is None else judged)
    return {name: np.array(column) for name, column in curve.items()} | {"start": float(start)}


def share_of_objective(beta, reward, kl, start, limit_reward, model_reward=None):
    """The gain in J = E r - beta KL over pi_sft's as a share of pi*_beta's.  -> share, se

    None x 2 where the limit is not supported, or the standard error is more than a quarter of its gain.
    reward, kl: (P, S) of the policy's responses, start: (P, S) pi_sft's rewards on the same prompts.
    limit_reward: (P', M) of pi_sft's responses; model_reward: a reward model's of the same, for the share of
    what a policy can gain that sees it alone.  se: over prompts, of the numerator.
    """
    if model_reward is None:
        best, best_kl, ess, _ = limit_at(limit_reward, beta)
    else:
        best, best_kl, ess, _ = limit_at(model_reward, beta, limit_reward)
    if not supported(ess):
        return None, None
    best_gain = (best - beta * best_kl - np.mean(limit_reward, axis=1)).mean()
    if best_gain <= 0:
        return None, None
    gain, se = mean_se(reward - beta * kl - start)
    if se > best_gain / 4:                                                      # the gain is near 0
        return None, None
    return gain / best_gain, se / best_gain


def kl_needed(gain, curve):
    """The KL at which the limit gains this reward over pi_sft's; None where it is not supported."""
    on = curve["supported"]
    if not on.any() or not 0 < gain < curve["reward"][on].max() - curve["start"]:
        return None
    return float(np.interp(gain, curve["reward"][on] - curve["start"], curve["kl"][on]))


def beta_at(reward, kl):
    """The beta whose pi*_beta has this average KL on these responses, by bisection, or None beyond them."""
    def kl_of(beta):
        return limit_at(reward, beta)[1].mean()

    low, high = 1e-3, 1e3
    if not kl_of(high) < kl < kl_of(low):
        return None
    for _ in range(60):
        middle = math.sqrt(low * high)
        if kl_of(middle) > kl:
            low = middle
        else:
            high = middle
    return math.sqrt(low * high)


def gap_to_limit(limit_reward, reward, kl):
    """beta E_x KL(pi || pi*_beta) at the beta of the policy's own KL: the vertical distance to the limit.

    limit_reward (P, M): of pi_sft's responses; reward, kl (P,): the policy's means on the same prompts.
    -> {gap, se, bias (by which the sampled limit makes the gap too small), beta, supported}; None beyond it.
    """
    beta = beta_at(limit_reward, float(np.mean(kl)))
    if beta is None:
        return None
    _, _, ess, log_z = limit_at(limit_reward, beta)
    gap = beta * log_z - (np.asarray(reward) - beta * np.asarray(kl))           # (P,)
    return {"gap": gap.mean(), "se": gap.std(ddof=1) / math.sqrt(len(gap)), "bias": (beta / (2 * ess)).mean(),
            "beta": beta, "supported": supported(ess)}


def share_of_limit(kl, rows, curve):
    """(r(pi) - r(pi_sft)) / (r*(KL) - r(pi_sft)), each gain on its own prompts, of the checkpoint near a KL.

    Near: within a fifth of it.  Between checkpoints far apart the way is not known.  rows: eval.csv's.  None
    without one, beyond the curve, and where the reward's standard error is more than a quarter of the gain.
    """
    near = min(rows, key=lambda row: abs(row["kl"] - kl))
    reach = curve["kl"][curve["supported"]].max(initial=-math.inf)
    if abs(near["kl"] - kl) > kl / 5 or near["kl"] > reach:
        return None
    best_gain = np.interp(near["kl"], curve["kl"], curve["reward"]) - curve["start"]
    if not near["reward_se"] < best_gain / 4:
        return None
    return (near["reward"] - rows[0]["reward"]) / best_gain


# ---- other measures ----------------------------------------------------------------------------------------

def best_of_n(reward, n):
    """The best of n responses.  (P, M) -> the upper bound of its KL, E[max] by order statistics."""
    r = np.sort(np.asarray(reward, dtype=np.float64), axis=1)
    M = r.shape[1]                                  # P(the i-th smallest is the best) = C(i-1, n-1) / C(M, n)
    log_choose = [math.lgamma(i) - math.lgamma(i - n + 1) if i >= n else -math.inf for i in range(1, M + 1)]
    weight = np.exp(np.array(log_choose) + math.log(n) - math.lgamma(M + 1) + math.lgamma(M - n + 1))   # (M,)
    return math.log(n) - (n - 1) / n, float((r @ weight).mean())


def win_rate(ours, theirs, length=None, their_length=None):
    """The share of pairs of a prompt's responses that ours win, ties one half.  (P, S), (P, S') -> float

    length, their_length: of the same shapes, tokens: only pairs within 10% count; None where there are none.
    """
    ours, theirs = ours[:, :, None], theirs[:, None, :]                         # (P, S, 1), (P, 1, S')
    wins = (ours > theirs).float() + 0.5 * (ours == theirs).float()             # (P, S, S'), paper App. C
    if length is not None:
        length, their_length = length[:, :, None], their_length[:, None, :]     # (P, S, 1), (P, 1, S')
        wins = wins[(length - their_length).abs() <= 0.1 * their_length]        # (P, S, S') -> (n,)
    return float(wins.mean()) if len(wins) else None


def density_ratio(s, weight, grid):
    """pi / pi_sft against s = log pi_sft (paper, Figure 3): a kernel estimate of E_pi_sft[pi / pi_sft | s].

    s, weight: (M,) of responses of pi_sft, the weights sum to 1 -> (len(grid),), nan where fewer than 5
    responses are near.  Gaussian, one bandwidth (Silverman's) for numerator and denominator.
    """
    upper, lower = np.percentile(s, [75, 25])
    width = 0.9 * min(s.std(), (upper - lower) / 1.34) * len(s) ** -0.2
    kernel = np.exp(-0.5 * ((grid[:, None] - s) / width) ** 2)                  # (G, M)
    near = kernel.sum(1)                                                        # (G,)
    return np.where(near >= 5, len(s) * (kernel @ weight) / np.maximum(near, 1e-300), np.nan)


def read_csv(path):
    """A list of {column: float}; an empty cell is nan.  UserError where the last line is cut short."""
    text = Path(path).read_text()
    if not text.endswith("\n"):
        raise UserError(f"{path} is cut short: remove its folder, and it is made again")
    rows = csv.DictReader(text.splitlines())
    return [{name: float(cell or "nan") for name, cell in row.items()} for row in rows]
