"""A bandit of V arms per prompt: alignment where the optimum, the KLs and every gradient are exact.

A prompt's responses are V arms, the policy is a row of V log-probs, and nothing has to be sampled that one does not want to
sample.  The losses are the language model's own (`exo_loss`, `dpo_loss`, `xpo_loss`, ...); here are only the truth to compare
them with and the expectation over what they are given.  B prompts are B instances: numbers come as bands over them.

    python -m toy.bandit          prints every table and writes every figure into toy/figures, in about a minute

The theorems and Eq numbers are those of the EXO paper, arXiv version 1.
"""
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from dpo import dpo_loss, dpo_reward_loss
from exo import exo_loss, exo_pref_loss
from xpo import xpo_loss

KS = (2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)                      # candidates a prompt
GRID = torch.linspace(-8, 8, 161, dtype=torch.float64)               # the arms of the bandits whose arms have a place


# ---- the truth ---------------------------------------------------------------------------------------------------------------

@dataclass
class Bandit:
    """B prompts of V arms, float64: log pi_sft(y|x) in nats and r(x, y)."""
    ref_logp: Tensor                                                 # (B, V)
    reward: Tensor                                                   # (B, V)


def random_bandits(B=24, V=24, ref_spread=0.5, seed=0):
    """B instances: pi_sft = softmax of normal logits with standard deviation ref_spread, rewards standard normal."""
    gen = torch.Generator().manual_seed(seed)
    ref_logits, reward = torch.randn(2, B, V, generator=gen, dtype=torch.float64)
    return Bandit((ref_spread * ref_logits).log_softmax(-1), reward)


def log_optimum(bandit, beta):
    """log pi*_beta (Eq 5).  -> (B, V)"""
    return (bandit.ref_logp + bandit.reward / beta).log_softmax(-1)


def kl(logp, logq):
    """KL(p || q), nats.  (..., V) x2 -> (...)"""
    return (logp.exp() * (logp - logq)).sum(-1)


def tv(logp, logq):
    """Total variation, the mass that would have to move.  (..., V) x2 -> (...)"""
    return (logp.exp() - logq.exp()).abs().sum(-1) / 2


def objective(bandit, logp, beta):
    """J_beta(pi) = E_pi r - beta KL(pi || pi_sft) (Eq 4), in units of reward.  (B, V) -> (B,)"""
    return (logp.exp() * bandit.reward).sum(-1) - beta * kl(logp, bandit.ref_logp)


def sharpen(bandit, logp, beta_pi):
    """log of pi^beta_pi, proportional to pi^beta_pi pi_sft^(1 - beta_pi) (Eq 9).  (B, V) -> (B, V)"""
    return (beta_pi * logp + (1 - beta_pi) * bandit.ref_logp).log_softmax(-1)


def general_objective(bandit, logp, beta_r, beta_pi):
    """J_gen(pi), the objective J_beta_r of pi^beta_pi (Eq 8).  (B, V) -> (B,)"""
    return objective(bandit, sharpen(bandit, logp, beta_pi), beta_r)


# ---- the losses, in expectation ----------------------------------------------------------------------------------------------

def per_row(loss, *tensors, **settings):
    """A loss is a mean over its rows; a weighted expectation needs each row's own value.  (N, K) tensors -> (N,)"""
    return torch.vmap(lambda *row: loss(*(values[None] for values in row), **settings))(*tensors)


def draw_groups(bandit, G, K, seed=0):
    """The arms of G groups of K responses a prompt, drawn from pi_sft.  -> (B, G, K) int64"""
    gen = torch.Generator().manual_seed(seed)
    return bandit.ref_logp.exp().multinomial(G * K, replacement=True, generator=gen).view(-1, G, K)


def take(values, groups):
    """What the arms of each group have.  (B, V), (B, G, K) -> (B * G, K), the shape that the losses take"""
    return values.gather(1, groups.flatten(1)).view(-1, groups.shape[-1])


def all_pairs(bandit, labels):
    """Every ordered pair (chosen, rejected) of arms, and how often it comes up when both are drawn from pi_sft.

    labels "bt": i beats j with the Bradley-Terry probability sigmoid(r_i - r_j); "argmax": the higher reward always wins.
    -> groups (B, V * V, 2), weight (B, V * V), whose rows sum to one
    """
    B, V = bandit.reward.shape
    pairs = torch.cartesian_prod(torch.arange(V), torch.arange(V)).expand(B, -1, -1)             # (B, V * V, 2)
    chosen, rejected = pairs.unbind(-1)
    gap = bandit.reward.gather(1, chosen) - bandit.reward.gather(1, rejected)                    # (B, V * V)
    wins = gap.sigmoid() if labels == "bt" else (gap.sign() + 1) / 2
    return pairs, 2 * wins * (bandit.ref_logp.gather(1, chosen) + bandit.ref_logp.gather(1, rejected)).exp()


def pair_loss(loss, bandit, logp, labels, **settings):
    """A preference loss in exact expectation over pairs, the mean over prompts.  (B, V) -> scalar"""
    pairs, weight = all_pairs(bandit, labels)
    return weight.flatten() @ per_row(loss, take(logp, pairs), take(bandit.ref_logp, pairs), **settings) / len(logp)


def reward_loss(loss, bandit, logp, groups, **betas):
    """exo_loss or dpo_reward_loss on the groups that were drawn.  (B, V), (B, G, K) -> scalar"""
    return loss(take(logp, groups), take(bandit.ref_logp, groups), take(bandit.reward, groups), **betas)


def expected_xpo_loss(logp, ref_logp, beta, alpha):
    """xpo_loss on pairs of which either response is, one time in two, the one that the reference drew for the bonus."""
    return xpo_loss(logp, ref_logp, logp.mean(-1), beta=beta, alpha=alpha)


# ---- policies and fits -------------------------------------------------------------------------------------------------------

def softmax_policy(logits):
    """Can represent any pi*.  (B, V) -> log-probs (B, V)"""
    return logits.log_softmax(-1)


def unimodal_policy(params):
    """A normal density on GRID: one mode, whatever pi* looks like.  (B, 2) mean and log sd -> log-probs (B, V)"""
    mean, log_sd = params[:, :1], params[:, 1:]                                                  # (B, 1)
    return (-0.5 * ((GRID - mean) / log_sd.exp()) ** 2).log_softmax(-1)


def normal(mean, sd):
    """The unimodal policy with this mean and standard deviation.  -> (1, V)"""
    return unimodal_policy(torch.tensor([[mean, np.log(sd)]], dtype=torch.float64))


def fit(loss, start, policy=softmax_policy, steps=1000):
    """The minimiser of loss(log-probs) that L-BFGS finds from `start`.  (B, V) or (B, 2) -> its log-probs (B, V)"""
    params = start.clone().requires_grad_()
    lbfgs = torch.optim.LBFGS([params], max_iter=steps, history_size=50, tolerance_grad=1e-9, tolerance_change=1e-12,
                              line_search_fn="strong_wolfe")

    def closure():
        lbfgs.zero_grad()
        value = loss(policy(params))
        value.backward()
        return value

    lbfgs.step(closure)
    return policy(params.detach())


# ---- 1. Theorem 3.1 and Eq 11: the generalised objective ---------------------------------------------------------------------

def generalised_objective(bandit, beta_r, beta_pi):
    """Thm 3.1 and Eq 11 on every instance.  -> dict of (B,):

    "tv", from the maximiser of J_gen to pi*_beta, beta = beta_r beta_pi (Thm 3.1 says 0); "eq11", |J_gen - its form with the
    reverse KL| at a random policy, in units of reward; "cosine", between the gradients of J_gen and J_beta at that policy.
    """
    beta, optimum = beta_r * beta_pi, log_optimum(bandit, beta_r)
    found = bandit.ref_logp
    for hotter in (16, 4, 1):                                        # from pi_sft straight to beta = 0.01 it can get stuck
        found = fit(lambda logp, r=hotter * beta_r: -general_objective(bandit, logp, r, beta_pi).mean() / r, found)
    logits = near_reference(bandit).requires_grad_()
    J_gen = general_objective(bandit, softmax_policy(logits), beta_r, beta_pi)                   # (B,)
    log_Z = (bandit.ref_logp + bandit.reward / beta_r).logsumexp(-1)                             # (B,)
    eq11 = beta_r * (log_Z - kl(sharpen(bandit, softmax_policy(logits), beta_pi), optimum))      # (B,)
    J = objective(bandit, softmax_policy(logits), beta)
    grads = [torch.autograd.grad(value.sum(), logits, retain_graph=True)[0] for value in (J_gen, J)]
    return dict(tv=tv(found, log_optimum(bandit, beta)), eq11=(J_gen - eq11).abs().detach(),
                cosine=F.cosine_similarity(*grads))


# ---- 2. Theorems 3.2 and 3.3: the gradients against K ------------------------------------------------------------------------

def near_reference(bandit, spread=0.5, seed=1):
    """Logits of a policy on its way: those of pi_sft plus normal noise.  -> (B, V)"""
    gen = torch.Generator().manual_seed(seed)
    return bandit.ref_logp + spread * torch.randn(bandit.ref_logp.shape, generator=gen, dtype=torch.float64)


def limit_gradients(bandit, logits, beta_r, beta_pi):
    """Gradients on the logits of the reverse KL(pi^beta_pi || pi*_beta_r), which is that of -J_gen / beta_r (Eq 11) and so the
    RL gradient, and of the forward KL(pi*_beta_r || pi^beta_pi).  (B, V) -> (B, V) x2"""
    logits = logits.clone().requires_grad_()
    sharp, optimum = sharpen(bandit, softmax_policy(logits), beta_pi), log_optimum(bandit, beta_r)
    return [torch.autograd.grad(value.sum(), logits, retain_graph=True)[0]
            for value in (kl(sharp, optimum), kl(optimum, sharp))]


def group_gradients(loss, bandit, logits, counts, beta_r, beta_pi):
    """The gradient on the logits from each single group of K responses.  (B, V), counts (B, G, V) -> (B, G, V)

    A group is given by how often it has each arm.  Equal candidates have equal probabilities, so that c of them are one
    candidate with log c more in both softmaxes, and K = 1024 costs no more than K = V.  The gradient on the log-probs of both
    losses sums to zero over a group, and is then the gradient on the logits too.
    """
    B, G, V = counts.shape
    log_c = counts.clamp(min=1e-300).log()                                                       # (B, G, V), absent: e^-690
    logp = softmax_policy(logits)[:, None].repeat(1, G, 1).requires_grad_()                      # (B, G, V)
    ref_logp, reward = bandit.ref_logp[:, None] - log_c / beta_pi, bandit.reward[:, None] + beta_r * log_c
    value = loss(logp.view(-1, V), ref_logp.view(-1, V), reward.view(-1, V), beta_r=beta_r, beta_pi=beta_pi)
    return torch.autograd.grad(value * B * G, logp)[0]


def gradient_study(bandit, beta_r=0.1, beta_pi=0.1, Ks=KS, G=4096, seed=0):
    """The expected gradient of EXO-rw and DPO-rw at each K, from G groups an instance.  -> dict of method -> dict of (Ks, B):

    "bias", |E g_K - g| / |g| against the limit g of Thm 3.2 or 3.3; "cos_limit" and "cos_rl", the cosine of E g_K to g and to
    the RL gradient; "sd", the standard deviation of one group's gradient over |g|; all on the logits of `near_reference`.
    The expectation is the intercept of a regression on the arms' frequencies, whose own expectation pi_sft is known: that
    removes the noise of first order, and leaves one that falls like the bias itself, 1/K.
    """
    rng, logits = np.random.default_rng(seed), near_reference(bandit)
    ref = bandit.ref_logp.exp()
    limits = limit_gradients(bandit, logits, beta_r, beta_pi)                                    # RL first
    study = {name: {what: [] for what in ("bias", "cos_limit", "cos_rl", "sd")} for name in ("exo", "dpo")}
    for K in Ks:
        counts = torch.from_numpy(rng.multinomial(K, ref[:, None].numpy(), size=(len(ref), G))).double()   # (B, G, V)
        regressors = torch.cat([torch.ones_like(counts[..., :1]), (counts / K - ref[:, None])[..., 1:]], -1)
        normal_eq = regressors.mT @ regressors                                                   # (B, V, V)
        for result, loss, limit in zip(study.values(), (exo_loss, dpo_reward_loss), limits):
            grads = group_gradients(loss, bandit, logits, counts, beta_r, beta_pi)               # (B, G, V)
            mean = torch.linalg.solve(normal_eq, regressors.mT @ grads)[:, 0]                    # (B, V)
            size = limit.norm(dim=-1)                                                            # (B,)
            result["bias"].append((mean - limit).norm(dim=-1) / size)
            result["cos_limit"].append(F.cosine_similarity(mean, limit))
            result["cos_rl"].append(F.cosine_similarity(mean, limits[0]))
            result["sd"].append(grads.var(1).sum(-1).sqrt() / size)
    return {name: {what: torch.stack(rows) for what, rows in result.items()} for name, result in study.items()}


# ---- 3. What recovers pi*, and what does not ---------------------------------------------------------------------------------

def recover(bandit, beta_r=0.5, beta_pi=0.5, Ks=(2, 4, 8, 32), alphas=(0.001, 0.003)):
    """The full softmax fitted by every method; alphas are in units of beta.  -> dict of name -> log-probs (B, V)"""
    beta = beta_r * beta_pi
    optimum = log_optimum(bandit, beta)
    losses = {"exact reverse KL": lambda logp: kl(logp, optimum).mean(),
              "exact forward KL": lambda logp: kl(optimum, logp).mean(),
              "policy gradient on J": lambda logp: -objective(bandit, logp, beta).mean()}        # what PPO estimates
    for K in Ks:
        groups = draw_groups(bandit, 128, K)                                                     # enough to connect all arms
        for name, loss in (("EXO-rw", exo_loss), ("DPO-rw", dpo_reward_loss)):
            losses[f"{name}, K = {K}"] = lambda logp, loss=loss, groups=groups: reward_loss(
                loss, bandit, logp, groups, beta_r=beta_r, beta_pi=beta_pi)
    for labels in ("bt", "argmax"):
        for name, loss, strength in (("DPO-pref", dpo_loss, dict(beta=beta)), ("EXO-pref", exo_pref_loss, dict(beta_pi=beta))):
            losses[f"{name}, {labels} labels"] = lambda logp, loss=loss, labels=labels, strength=strength: pair_loss(
                loss, bandit, logp, labels, **strength)
    for alpha in (0, *alphas):
        losses[f"XPO, alpha/beta = {alpha:g}"] = lambda logp, alpha=alpha: pair_loss(
            expected_xpo_loss, bandit, logp, "bt", beta=beta, alpha=alpha * beta)
    fits = {name: fit(loss, bandit.ref_logp) for name, loss in losses.items()}
    # EXO-pref's loss depends on beta_pi h alone: its minimiser at another beta_pi is this one with h rescaled (Eq 9)
    scales = torch.logspace(-2, 1, 301, dtype=torch.float64)
    rescaled = torch.stack([sharpen(bandit, fits["EXO-pref, bt labels"], scale) for scale in scales])      # (scales, B, V)
    fits["EXO-pref, best beta_pi"] = rescaled[tv(rescaled, optimum).argmin(0), torch.arange(len(optimum))]
    return fits


# ---- 4. A policy that cannot represent pi*: mode-seeking and mean-seeking ----------------------------------------------------

def two_modes():
    """One prompt whose pi*_1 has a main mode (65%, at -3) and a minor one (35%, at 3) of standard deviation 0.6, under a broad
    pi_sft = N(0, 3): the reward is what makes it so.  -> Bandit, log pi* (1, V)"""
    ref_logp = normal(0.0, 3.0)
    optimum = torch.logaddexp(normal(-3.0, 0.6) + np.log(0.65), normal(3.0, 0.6) + np.log(0.35)).log_softmax(-1)
    return Bandit(ref_logp, optimum - ref_logp), optimum


def fit_unimodal(loss):
    """From 10 starts: the log-probs (1, V) of every local minimum found, lowest loss first, and the losses."""
    starts = torch.cartesian_prod(torch.linspace(-4, 4, 5).double(), torch.tensor([0.5, 3.0]).double().log())
    ends = sorted(((loss(logp).item(), i, logp) for i, logp in
                   enumerate(fit(loss, start[None], unimodal_policy, steps=200) for start in starts)), key=lambda end: end[:2])
    minima = [end for i, end in enumerate(ends) if i == 0 or end[0] > ends[i - 1][0] + 1e-3]
    return [logp for _, _, logp in minima], [value for value, _, _ in minima]


def masses(logp):
    """What a policy puts on the main mode, on the minor one (within 3 sd of each), and elsewhere.  (1, V) -> 3 numbers"""
    main, minor = [(logp.exp() * ((GRID - at).abs() <= 1.8 + 1e-9)).sum().item() for at in (-3, 3)]
    return main, minor, 1 - main - minor


def mode_fits(Ks=(2, 4, 8, 32)):
    """The unimodal policy on `two_modes` by exact KLs, EXO-rw and DPO-rw, beta_pi = 1.  -> dict of name -> (minima, losses)"""
    bandit, optimum = two_modes()
    losses = {"reverse KL": lambda logp: kl(logp, optimum).mean(), "forward KL": lambda logp: kl(optimum, logp).mean()}
    for K in Ks:
        groups = draw_groups(bandit, 2048, K)
        for name, loss in (("EXO-rw", exo_loss), ("DPO-rw", dpo_reward_loss)):
            losses[f"{name}, K = {K}"] = lambda logp, loss=loss, groups=groups: reward_loss(
                loss, bandit, logp, groups, beta_r=1.0, beta_pi=1.0)
    return {name: fit_unimodal(loss) for name, loss in losses.items()}


# ---- 5. beta_pi against beta_r, Appendix D.1 in exact form -------------------------------------------------------------------

def smooth_bandits(B=24, seed=0):
    """B instances on GRID: pi_sft = N(0, 2), the reward a sum of six sines of random weight and phase, sd about 1."""
    gen = torch.Generator().manual_seed(seed)
    weight, phase = torch.randn(2, B, 6, 1, generator=gen, dtype=torch.float64)
    waves = torch.arange(1, 7)[:, None] * torch.pi / 16 * GRID + 3 * phase                       # (B, 6, V)
    return Bandit(normal(0.0, 2.0).expand(B, -1), (weight * waves.sin()).sum(1) / 3 ** 0.5)


def best_unimodal(bandit, beta_r, beta_pi):
    """The unimodal policy with the highest J_gen among 121 means x 40 standard deviations: no start, no local optimum.
    All instances must have one and the same pi_sft.  -> log-probs (B, V)"""
    means, log_sds = torch.linspace(-6, 6, 121).double(), torch.linspace(-1.6, 1.4, 40).double()
    logp = unimodal_policy(torch.cartesian_prod(means, log_sds))                                 # (P, V)
    sharp = sharpen(Bandit(bandit.ref_logp[:1], None), logp, beta_pi)
    value = sharp.exp() @ bandit.reward.T - beta_r * kl(sharp, bandit.ref_logp[:1])[:, None]     # (P, B)  Eq 8
    return logp[value.argmax(0)]


def ablation(bandit, values=(0.1, 0.2, 0.5, 1.0, 2.0), default=0.5):
    """One of beta_r and beta_pi at `default`, the other at each of `values`.  -> {(series, family): dict of (values, B)}:

    "reward" and "kl", nats, of the maximiser of J_gen, and "lost", how far its J_beta, beta = beta_r beta_pi, lies below that
    of the best policy of its family (the maximiser at beta_pi = 1), in units of reward.
    """
    result = {}
    for series in ("beta_r", "beta_pi"):
        for family in ("softmax", "unimodal"):
            rows = dict(reward=[], kl=[], lost=[])
            for value in values:
                beta_r, beta_pi = (value, default) if series == "beta_r" else (default, value)
                beta = beta_r * beta_pi
                if family == "softmax":
                    found = best = log_optimum(bandit, beta)                                     # Theorem 3.1
                else:
                    found, best = best_unimodal(bandit, beta_r, beta_pi), best_unimodal(bandit, beta, 1.0)
                rows["reward"].append((found.exp() * bandit.reward).sum(-1))
                rows["kl"].append(kl(found, bandit.ref_logp))
                rows["lost"].append(objective(bandit, best, beta) - objective(bandit, found, beta))
            result[series, family] = {name: torch.stack(row) for name, row in rows.items()}
    return result


if __name__ == "__main__":
    from toy import report

    report.main()
