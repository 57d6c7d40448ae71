"""What an aligned policy is worth: oracle reward, KL to pi_sft, and the limit that no policy can pass.

The limit.  Of all policies with a given average KL the best is pi*_beta with one beta for all prompts (the Lagrangian separates
over prompts).  On M responses of pi_sft a prompt, with w = softmax(r / beta):  r*(beta) = sum w r,  KL*(beta) = sum w log(M w).
The vertical distance to that curve is the paper's own objective:  r*(k) - r(pi) = beta(k) E_x KL(pi || pi*_beta(k)).

    python evaluate.py runs/tiny          draws again what the run folder holds: figures, and a csv beside each
"""
import csv
import math

import numpy as np
import torch
import torch.nn.functional as F

from model import respond, rows_at_once

# One colour a method in every figure of the project (Okabe and Ito's palette: told apart by colour-blind readers).
COLORS = {"exo": "#0072B2", "dpo": "#D55E00", "ppo": "#009E73", "xpo": "#CC79A7", "online-dpo": "#E69F00",
          "best-of-n": "#56B4E9", "sft": "#7F7F7F", "limit": "#000000"}


# ---- sampling and scoring a policy -----------------------------------------------------------------------------------------

@torch.no_grad()
def sequence_kl(policy, ref, ids, mask, temperature):
    """KL(policy || ref) of the sampled responses in nats a sequence, two unbiased estimators.  (N, T), (N, T) -> (N,), (N,)

    First: sum over the response's states of the KL between the two next-token distributions, over the full vocabulary
    (Rao-Blackwellised, arXiv 2504.10637).  Second: the plain log-ratio, "k1".  Both under the sampling temperature.
    """
    states = [model.hidden(ids[:, :-1])[mask[:, 1:]] for model in (policy, ref)]            # 2 x (M, C)
    rows, full, plain = rows_at_once(policy), [], []
    for h, g, target in zip(states[0].split(rows), states[1].split(rows), ids[mask].split(rows)):
        logp = F.log_softmax(policy.head(h) / temperature, dim=-1)                          # (m, V)
        difference = logp - F.log_softmax(ref.head(g) / temperature, dim=-1)                # (m, V)
        full.append((logp.exp() * difference).sum(-1))                                      # (m,)
        plain.append(difference.gather(1, target[:, None]).squeeze(1))                      # (m,)
    zeros = torch.zeros(mask.shape, device=ids.device)
    return tuple(zeros.masked_scatter(mask, torch.cat(x)).sum(1) for x in (full, plain))    # (M,) -> (N, T) -> (N,)


@torch.no_grad()
def measure(run, policy, ref, reward, generator):
    """Samples --eval-samples responses to each prompt of evaluation.  -> {ids, mask, reward, kl, k1: (P, S, ...)}, on the CPU"""
    cfg = run.cfg
    repeated = [p for p in run.prompts(run.evaluated, cfg.eval_prompts) for _ in range(cfg.eval_samples)]

    def columns(ids, mask):
        kl, k1 = sequence_kl(policy, ref, ids, mask, cfg.temperature)                       # (n,), (n,)
        return {"reward": reward(ids, mask), "kl": kl, "k1": k1}

    found = respond(policy, repeated, cfg.new_tokens, cfg.temperature, run.eos_id, generator, cfg.sample_batch, columns)
    return {k: v.unflatten(0, (cfg.eval_prompts, cfg.eval_samples)) for k, v in (found | {"ids": found["ids"].int()}).items()}


def summary(found, eos_id):
    """What `measure` found as one row of eval.csv.  Standard errors are clustered by prompt."""
    def mean_se(x):
        per_prompt = x.float().mean(1)                                                      # (P, S) -> (P,)
        return float(per_prompt.mean()), float(per_prompt.std() / math.sqrt(len(per_prompt)))
    reward, reward_se = mean_se(found["reward"])
    kl, kl_se = mean_se(found["kl"])
    ids, mask = found["ids"], found["mask"]
    return {"reward": reward, "reward_se": reward_se, "accuracy": mean_se(found["reward"].sigmoid())[0],   # paper D.3
            "kl": kl, "kl_se": kl_se, "kl_k1": mean_se(found["k1"])[0], "length": mean_se(mask.sum(2))[0],
            "ended": mean_se(((ids == eos_id) & mask).any(2))[0], "distinct2": distinct2(ids, mask)}


def distinct2(ids, mask):
    """The share of different ones among all pairs of neighbouring response tokens.  (P, S, T), (P, S, T) -> float"""
    both = mask[..., :-1] & mask[..., 1:]
    pairs = torch.stack([ids[..., :-1][both], ids[..., 1:][both]])                          # (2, number of pairs)
    return torch.unique(pairs, dim=1).shape[1] / max(1, pairs.shape[1])


# ---- the limit -------------------------------------------------------------------------------------------------------------

def limit_at(reward, beta):
    """pi*_beta from rewards (P, M) of pi_sft's responses -> reward (P,), KL (P,), effective sample size (P,), log Z (P,)."""
    r = np.asarray(reward, dtype=np.float64)
    log_w = r / beta
    log_z = np.logaddexp.reduce(log_w, axis=1) - math.log(r.shape[1])                       # (P,)
    w = np.exp(log_w - log_z[:, None]) / r.shape[1]                                         # (P, M), sums to 1
    best = (w * r).sum(1)
    return best, best / beta - log_z, 1 / (w ** 2).sum(1), log_z


def limit_curve(reward, betas=None):
    """The limit over beta -> {beta, kl, reward, supported: (n,), start}: drawn only where 90% of the prompts have ESS >= 50.

    start: pi_sft's reward on the same prompts, where the curve begins at KL 0.
    """
    betas = np.geomspace(100, 0.02, 200) if betas is None else betas
    found = [limit_at(reward, b) for b in betas]
    return {"beta": np.asarray(betas), "reward": np.array([r.mean() for r, _, _, _ in found]),
            "kl": np.array([k.mean() for _, k, _, _ in found]),
            "start": float(np.mean(reward)), "supported": np.array([(ess >= 50).mean() >= 0.9 for _, _, ess, _ in found])}


def beta_at(reward, kl):
    """The beta whose pi*_beta has this average KL on these responses, by bisection; None beyond log M's reach."""
    low, high = 1e-3, 1e3
    if not limit_at(reward, high)[1].mean() < kl < limit_at(reward, low)[1].mean():
        return None
    for _ in range(60):
        middle = math.sqrt(low * high)
        low, high = (middle, high) if limit_at(reward, middle)[1].mean() > kl else (low, middle)
    return math.sqrt(low * high)


def gap_to_limit(limit_reward, reward, kl):
    """beta E_x KL(pi || pi*_beta) at the beta of the policy's own KL: the vertical distance to the limit.

    limit_reward (P, M): pi_sft's responses; reward, kl (P,): the policy's means on the same prompts.
    -> {gap, se, bias (by which the sampled limit makes the gap too small: add it), beta, supported}, or None beyond the curve.
    """
    beta = beta_at(limit_reward, float(np.mean(kl)))
    if beta is None:
        return None
    _, _, ess, log_z = limit_at(limit_reward, beta)
    gap = beta * log_z - (np.asarray(reward) - beta * np.asarray(kl))                       # (P,)
    return {"gap": gap.mean(), "se": gap.std(ddof=1) / math.sqrt(len(gap)), "bias": (beta / (2 * ess)).mean(), "beta": beta,
            "supported": bool((ess >= 50).mean() >= 0.9)}


def best_of_n(reward, n):
    """E max of n responses by order statistics over all M, at the KL's upper bound log n - (n-1)/n.  (P, M) -> KL, reward"""
    r = np.sort(np.asarray(reward, dtype=np.float64), axis=1)
    i = np.arange(1, r.shape[1] + 1)                                 # P(the i-th smallest is the best of n) = C(i-1,n-1)/C(M,n)
    log_choose = [math.lgamma(k) - math.lgamma(k - n + 1) if k >= n else -math.inf for k in i]
    weight = np.exp(np.array(log_choose) + math.log(n) - math.lgamma(r.shape[1] + 1) + math.lgamma(r.shape[1] - n + 1))
    return math.log(n) - (n - 1) / n, float((r @ weight).mean())


def win_rate(ours, theirs):
    """The share of all pairs of a prompt's responses that ours win, ties one half (paper, App. C).  (P, S), (P, S') -> float"""
    ours, theirs = ours[:, :, None], theirs[:, None, :]                                     # (P, S, 1), (P, 1, S')
    return float(((ours > theirs).float() + 0.5 * (ours == theirs).float()).mean())


def density_ratio(s, weight, grid):
    """pi / pi_sft against s = log pi_sft (paper, Figure 3): a Gaussian kernel estimate of E_pi_sft[pi / pi_sft | log pi_sft = s].

    s, weight: (M,) of responses of pi_sft, the weights sum to 1 -> (len(grid),), nan where fewer than 5 responses are near.
    One bandwidth (Silverman's) for numerator and denominator.
    """
    width = 0.9 * min(s.std(), np.subtract(*np.percentile(s, [75, 25])) / 1.34) * len(s) ** -0.2
    kernel = np.exp(-0.5 * ((grid[:, None] - s) / width) ** 2)                              # (G, M)
    near = kernel.sum(1)
    return np.where(near >= 5, len(s) * (kernel @ weight) / np.maximum(near, 1e-300), np.nan)


def reward_at(kl, rows):
    """The reward of a method at this KL, interpolated on its checkpoints; None if it never gets there.  rows: eval.csv's"""
    for a, b in zip(rows[-2::-1], rows[:0:-1]):                      # where it passes for the last time: some turn back
        if min(a["kl"], b["kl"]) <= kl <= max(a["kl"], b["kl"]):
            return b["reward"] + (a["reward"] - b["reward"]) * (b["kl"] - kl) / ((b["kl"] - a["kl"]) or 1)
    return None


def share_of_limit(kl, rows, curve):
    """(r(pi at kl) - r(pi_sft)) / (r*(kl) - r(pi_sft)), each gain on its own prompts; None where either does not reach."""
    reward, reachable = reward_at(kl, rows), curve["kl"][curve["supported"]]
    if reward is None or not len(reachable) or kl > reachable.max():
        return None
    return (reward - rows[0]["reward"]) / (np.interp(kl, curve["kl"], curve["reward"]) - curve["start"])


def read_csv(path):
    with open(path, newline="") as file:
        return [{k: float(v) if v else math.nan for k, v in row.items()} for row in csv.DictReader(file)]


if __name__ == "__main__":
    from figures import main  # drawing stands above this file, and imports it

    main()
