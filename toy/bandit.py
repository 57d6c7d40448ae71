"""A bandit with V arms per prompt: the optimum, the KLs and their gradients are exact.

The responses to a prompt are V arms and a policy is a row of V log-probs, so expectations are sums.  The
losses are those that train the language model (`exo_loss`, `dpo_loss`, ...).  This file adds the exact
answers to compare them with, and the groups and pairs of responses that they take.  B prompts are B random
instances.

Theorems and equations are those of the EXO paper, arXiv version 1.
"""
from dataclasses import dataclass
from functools import partial
from itertools import product

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from dpo import dpo_loss, dpo_reward_loss
from exo import exo_loss, exo_pref_loss
from xpo import xpo_loss

REWARD_LOSSES = {"EXO-rw": exo_loss, "DPO-rw": dpo_reward_loss}
KS = (2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)           # candidates per prompt
GRID = torch.linspace(-8, 8, 161, dtype=torch.float64)    # where the arms lie, if they lie on a line


# ---- the truth --------------------------------------------------------------------------------------------

@dataclass
class Bandit:
    """B prompts of V arms, float64: log pi_sft(y|x) in nats and r(x, y)."""
    ref_logp: Tensor                                      # (B, V)
    reward: Tensor                                        # (B, V)


def random_bandits(B=24, V=24, ref_spread=0.5, seed=0):
    """B instances: pi_sft a softmax of normal logits with sd ref_spread, rewards standard normal."""
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
    """Total variation: how much mass would have to move.  (..., V) x2 -> (...)"""
    return (logp.exp() - logq.exp()).abs().sum(-1) / 2


def objective(bandit, logp, beta):
    """J_beta(pi) = E_pi r - beta KL(pi || pi_sft) (Eq 4), in units of reward.  (B, V) -> (B,)"""
    return (logp.exp() * bandit.reward).sum(-1) - beta * kl(logp, bandit.ref_logp)


def suboptimality(bandit, logp, beta):
    """J_beta(pi*) - J_beta(pi), in units of reward.  (B, V) -> (B,)"""
    return objective(bandit, log_optimum(bandit, beta), beta) - objective(bandit, logp, beta)


def sharpen(logp, ref_logp, beta_pi):
    """log of pi^beta_pi, proportional to pi^beta_pi pi_sft^(1 - beta_pi) (Eq 9).  (B, V) x2 -> (B, V)"""
    return (beta_pi * logp + (1 - beta_pi) * ref_logp).log_softmax(-1)


def general_objective(bandit, logp, beta_r, beta_pi):
    """J_gen(pi), the objective J_beta_r of pi^beta_pi (Eq 8).  (B, V) -> (B,)"""
    return objective(bandit, sharpen(logp, bandit.ref_logp, beta_pi), beta_r)


# ---- the losses, in expectation ---------------------------------------------------------------------------

def sample_groups(bandit, G, K, seed=0):
    """The arms of G groups of K responses per prompt, drawn from pi_sft.  -> (B, G, K) int64"""
    gen = torch.Generator().manual_seed(seed)
    return bandit.ref_logp.exp().multinomial(G * K, replacement=True, generator=gen).view(-1, G, K)


def take(values, groups):
    """The values of each group's arms.  (B, V), (B, G, K) -> (B * G, K), the shape that the losses take"""
    return values.gather(1, groups.flatten(1)).view(-1, groups.shape[-1])


def reward_loss(loss, bandit, logp, groups, **betas):
    """exo_loss or dpo_reward_loss on sampled groups.  (B, V), (B, G, K) -> scalar"""
    return loss(take(logp, groups), take(bandit.ref_logp, groups), take(bandit.reward, groups), **betas)


def matching_losses(bandit, optimum, Ks, G, beta_r, beta_pi):
    """Both KLs to pi*, exact, and EXO-rw and DPO-rw at each K.  -> {name: function of log-probs (B, V)}"""
    losses = {"reverse KL": lambda logp: kl(logp, optimum).mean(),
              "forward KL": lambda logp: kl(optimum, logp).mean()}
    for K in Ks:
        groups = sample_groups(bandit, G, K)              # (B, G, K), the same for both losses
        for method, loss in REWARD_LOSSES.items():
            losses[f"{method}, K = {K}"] = partial(reward_loss, loss, bandit, groups=groups, beta_r=beta_r,
                                                   beta_pi=beta_pi)
    return losses


def per_row(loss, *tensors, **settings):
    """The loss of each row, which a weighted expectation needs.  (N, K) tensors -> (N,)"""
    def one_row(*row):
        return loss(*(values[None] for values in row), **settings)              # (K,) -> (1, K) -> scalar

    return torch.vmap(one_row)(*tensors)


def all_pairs(bandit, labels):
    """Every pair (chosen, rejected) of arms, and its probability when both are drawn from pi_sft.

    labels: "bt", i beats j with the Bradley-Terry probability sigmoid(r_i - r_j); "argmax", the higher reward
    wins.  -> groups (B, V * V, 2), weight (B, V * V), whose rows sum to one
    """
    B, V = bandit.reward.shape
    arms = torch.arange(V)
    pairs = torch.cartesian_prod(arms, arms).expand(B, -1, -1)                  # (B, V * V, 2)
    chosen, rejected = pairs.unbind(-1)                   # (B, V * V)
    gap = bandit.reward.gather(1, chosen) - bandit.reward.gather(1, rejected)
    wins = gap.sigmoid() if labels == "bt" else (gap.sign() + 1) / 2
    weight = 2 * wins * (bandit.ref_logp.gather(1, chosen) + bandit.ref_logp.gather(1, rejected)).exp()
    return pairs, weight


def pair_loss(loss, bandit, logp, labels, **settings):
    """A preference loss in exact expectation over pairs, the mean over prompts.  (B, V) -> scalar"""
    pairs, weight = all_pairs(bandit, labels)
    values = per_row(loss, take(logp, pairs), take(bandit.ref_logp, pairs), **settings)
    return weight.flatten() @ values / len(logp)          # (B * V * V,) x2 -> scalar


def expected_xpo_loss(logp, ref_logp, beta, alpha):
    """xpo_loss where the reference drew the chosen response in half of the pairs, else the rejected one."""
    return xpo_loss(logp, ref_logp, logp.mean(-1), beta=beta, alpha=alpha)


# ---- policies and fits ------------------------------------------------------------------------------------

def softmax_policy(logits):
    """Can represent any pi*.  (B, V) -> log-probs (B, V)"""
    return logits.log_softmax(-1)


def unimodal_policy(params):
    """A normal density on GRID: one mode, whatever pi* is.  (B, 2) mean and log sd -> log-probs (B, V)"""
    mean, log_sd = params[:, :1], params[:, 1:]           # (B, 1)
    return (-0.5 * ((GRID - mean) / log_sd.exp()) ** 2).log_softmax(-1)


def normal(mean, sd):
    """The unimodal policy with this mean and standard deviation.  -> (1, V)"""
    return unimodal_policy(torch.tensor([[mean, np.log(sd)]], dtype=torch.float64))


def near_reference(bandit, spread=0.5, seed=1):
    """Logits of a policy partway through training: pi_sft's plus normal noise.  -> (B, V)"""
    gen = torch.Generator().manual_seed(seed)
    return bandit.ref_logp + spread * torch.randn(bandit.ref_logp.shape, generator=gen, dtype=torch.float64)


def fit(loss, start, policy=softmax_policy, steps=1000):
    """The minimum of loss(log-probs) that L-BFGS reaches from `start`, a policy's parameters.  -> (B, V)"""
    params = start.clone().requires_grad_()
    lbfgs = torch.optim.LBFGS([params], max_iter=steps, history_size=20, tolerance_grad=1e-9,
                              tolerance_change=1e-12, line_search_fn="strong_wolfe")

    def closure():
        lbfgs.zero_grad()
        value = loss(policy(params))
        value.backward()
        return value

    lbfgs.step(closure)
    return policy(params.detach())


def grad(values, logits):
    """The gradient of each instance's value with respect to its own logits.  (B,), (B, V) -> (B, V)"""
    return torch.autograd.grad(values.sum(), logits, retain_graph=True)[0]


# ---- 1. Theorem 3.1 and Eq 11: the generalized objective --------------------------------------------------

def generalized_objective(bandit, beta_r, beta_pi):
    """Theorem 3.1 and Eq 11 on every instance.  -> dict of (B,)

    tv: from the maximizer of J_gen to pi*_beta, beta = beta_r beta_pi; Theorem 3.1 says 0
    eq11: |J_gen - its form with the reverse KL| at the policy of `near_reference`, in units of reward
    cosine: between the gradients of J_gen and J_beta at that policy
    """
    def loss(logp, temperature):
        return -general_objective(bandit, logp, temperature, beta_pi).mean() / temperature

    maximizer = bandit.ref_logp                           # (B, V)
    for hotter in (16, 4, 1):                             # started at beta = 0.01 the fit can get stuck
        maximizer = fit(partial(loss, temperature=hotter * beta_r), maximizer)

    beta = beta_r * beta_pi
    logits = near_reference(bandit).requires_grad_()      # (B, V)
    logp = softmax_policy(logits)
    J = objective(bandit, logp, beta)                     # (B,)
    J_gen = general_objective(bandit, logp, beta_r, beta_pi)                    # (B,)
    log_Z = (bandit.ref_logp + bandit.reward / beta_r).logsumexp(-1)            # (B,)
    gap = kl(sharpen(logp, bandit.ref_logp, beta_pi), log_optimum(bandit, beta_r))        # (B,)
    return {"tv": tv(maximizer, log_optimum(bandit, beta)),
            "eq11": (J_gen - beta_r * (log_Z - gap)).abs().detach(),
            "cosine": F.cosine_similarity(grad(J_gen, logits), grad(J, logits))}


# ---- 2. Theorems 3.2 and 3.3: the gradients against K -----------------------------------------------------

def limit_gradients(bandit, logits, beta_r, beta_pi):
    """What the gradients with respect to the logits approach as K grows.  (B, V) -> {method: (B, V)}

    EXO-rw's limit is the gradient of the reverse KL(pi^beta_pi || pi*_beta_r) and, by Eq 11, that of
    -J_gen / beta_r: it is RL's.  DPO-rw's is the gradient of the forward KL.
    """
    logits = logits.clone().requires_grad_()
    sharp = sharpen(softmax_policy(logits), bandit.ref_logp, beta_pi)
    optimum = log_optimum(bandit, beta_r)
    return {"EXO-rw": grad(kl(sharp, optimum), logits), "DPO-rw": grad(kl(optimum, sharp), logits)}


def group_gradients(loss, bandit, logits, counts, beta_r, beta_pi):
    """The gradient with respect to the logits of each group's loss.  (B, V), counts (B, G, V) -> (B, G, V)

    A group is given by how often it has each arm.  Equal candidates have equal probabilities, so c of them
    act as one candidate with log c added in both softmaxes, and K = 1024 costs no more than K = V.  For both
    losses the gradient in a group's log-probs sums to zero, so it is also the gradient in the logits.
    """
    B, G, V = counts.shape
    log_c = counts.clamp(min=1e-300).log()                # (B, G, V), -690 where the arm is absent
    logp = softmax_policy(logits)[:, None].repeat(1, G, 1).requires_grad_()     # (B, G, V)
    ref_logp = bandit.ref_logp[:, None] - log_c / beta_pi
    reward = bandit.reward[:, None] + beta_r * log_c
    groups = [values.view(-1, V) for values in (logp, ref_logp, reward)]        # (B * G, V)
    return torch.autograd.grad(loss(*groups, beta_r=beta_r, beta_pi=beta_pi) * B * G, logp)[0]


def gradient_study(bandit, beta_r=0.1, beta_pi=0.1, Ks=KS, G=4096, seed=0):
    """The expected gradient E g_K, from G groups of K responses.  -> {(method, K): dict of (B,)}

    bias: |E g_K - g| / |g|, where g is the limit in Theorem 3.2 or 3.3; cos_limit, cos_rl: the cosine of
    E g_K to g and to the RL gradient; sd: of one group's gradient, over |g|; all at the policy of
    `near_reference`.  E g_K is the intercept of a regression on the arms' frequencies, whose expectation is
    known, pi_sft: this removes the first-order noise, and what remains falls like the bias itself, 1/K.
    """
    gen = np.random.default_rng(seed)
    logits = near_reference(bandit)
    ref = bandit.ref_logp.exp()[:, None]                  # (B, 1, V)
    limits = limit_gradients(bandit, logits, beta_r, beta_pi)
    study = {}
    for K in Ks:
        counts = gen.multinomial(K, ref.numpy(), size=(len(ref), G))
        counts = torch.from_numpy(counts).double()        # (B, G, V)
        regressors = counts / K - ref                     # (B, G, V), their expectation is 0
        regressors[..., 0] = 1                            # one frequency follows from the others
        normal_matrix = regressors.mT @ regressors        # (B, V, V)
        for method, loss in REWARD_LOSSES.items():
            limit = limits[method]
            size = limit.norm(dim=-1)                     # (B,)
            grads = group_gradients(loss, bandit, logits, counts, beta_r, beta_pi)        # (B, G, V)
            mean = torch.linalg.solve(normal_matrix, regressors.mT @ grads)[:, 0]         # (B, V)
            study[method, K] = {"bias": (mean - limit).norm(dim=-1) / size,
                                "cos_limit": F.cosine_similarity(mean, limit),
                                "cos_rl": F.cosine_similarity(mean, limits["EXO-rw"]),
                                "sd": grads.var(1).sum(-1).sqrt() / size}
    return study


# ---- 3. Which losses recover pi* and which do not ---------------------------------------------------------

def recover(bandit, beta_r=0.5, beta_pi=0.5, Ks=(2, 4, 8, 32), alphas=(0, 0.001, 0.003)):
    """The full softmax fitted by every method; alphas are in units of beta.  -> {name: log-probs (B, V)}"""
    beta = beta_r * beta_pi
    optimum = log_optimum(bandit, beta)
    losses = matching_losses(bandit, optimum, Ks, 128, beta_r, beta_pi)         # 128 groups link all arms
    losses["policy gradient on J"] = lambda logp: -objective(bandit, logp, beta).mean()   # what PPO estimates
    for labels in ("bt", "argmax"):
        losses[f"DPO-pref, {labels} labels"] = partial(pair_loss, dpo_loss, bandit, labels=labels, beta=beta)
        losses[f"EXO-pref, {labels} labels"] = partial(pair_loss, exo_pref_loss, bandit, labels=labels,
                                                       beta_pi=beta)
    for alpha in alphas:
        losses[f"XPO, alpha/beta = {alpha:g}"] = partial(pair_loss, expected_xpo_loss, bandit, labels="bt",
                                                         beta=beta, alpha=alpha * beta)
    fits = {name: fit(loss, bandit.ref_logp) for name, loss in losses.items()}
    # EXO-pref's loss depends only on beta_pi h: at another beta_pi its minimizer is this one with h rescaled
    scales = torch.logspace(-2, 1, 301, dtype=torch.float64)[:, None, None]
    rescaled = sharpen(fits["EXO-pref, bt labels"], bandit.ref_logp, scales)    # (scales, B, V)
    nearest = tv(rescaled, optimum).argmin(0)             # (B,)
    fits["EXO-pref, best beta_pi"] = rescaled[nearest, torch.arange(len(optimum))]        # (B, V)
    return fits


# ---- 4. A policy that cannot represent pi*: mode-seeking and mean-seeking ---------------------------------

def two_modes():
    """One prompt with a broad pi_sft = N(0, 3) and a reward that makes pi*_1 65% N(-3, 0.6), 35% N(3, 0.6).
    -> Bandit, log pi* (1, V)"""
    ref_logp = normal(0.0, 3.0)
    main, minor = normal(-3.0, 0.6) + np.log(0.65), normal(3.0, 0.6) + np.log(0.35)
    optimum = torch.logaddexp(main, minor).log_softmax(-1)
    return Bandit(ref_logp, optimum - ref_logp), optimum


def fit_unimodal(loss):
    """The local minima reached from 10 starts, lowest first.  -> their log-probs (1, V), their losses"""
    means = torch.linspace(-4, 4, 5).double()
    log_sds = torch.tensor([0.5, 3.0]).double().log()
    ends = []
    for start in torch.cartesian_prod(means, log_sds):    # (2,)
        logp = fit(loss, start[None], unimodal_policy, steps=200)
        ends.append((loss(logp).item(), logp))
    ends.sort(key=lambda end: end[0])
    minima, losses, before = [], [], -np.inf
    for value, logp in ends:
        if value > before + 1e-3:                         # else it is the minimum before it again
            minima.append(logp)
            losses.append(value)
        before = value
    return minima, losses


def masses(logp):
    """The mass within 3 sd of the main mode, of the minor mode, and elsewhere.  (1, V) -> 3 numbers"""
    main, minor = [(logp.exp() * ((GRID - place).abs() <= 1.8 + 1e-9)).sum().item() for place in (-3, 3)]
    return main, minor, 1 - main - minor


def mode_fits(Ks=(2, 4, 8, 32)):
    """The unimodal policy fitted to `two_modes` by each loss.  -> {name: (minima, losses)}"""
    bandit, optimum = two_modes()
    losses = matching_losses(bandit, optimum, Ks, 2048, beta_r=1.0, beta_pi=1.0)
    return {name: fit_unimodal(loss) for name, loss in losses.items()}


# ---- 5. beta_pi versus beta_r: Appendix D.1 without sampling ----------------------------------------------

def smooth_bandits(B=24, seed=0):
    """B instances on GRID: pi_sft = N(0, 2), the reward six sines of random weight and phase, sd about 1."""
    gen = torch.Generator().manual_seed(seed)
    weight, phase = torch.randn(2, B, 6, 1, generator=gen, dtype=torch.float64)
    waves = torch.arange(1, 7)[:, None] * torch.pi / 16 * GRID + 3 * phase      # (B, 6, V)
    return Bandit(normal(0.0, 2.0).expand(B, -1), (weight * waves.sin()).sum(1) / 3 ** 0.5)


def best_unimodal(bandit, beta_r, beta_pi):
    """The unimodal policy with the highest J_gen of 121 means x 40 sds: no search that could get stuck.
    All instances must have the same pi_sft.  -> log-probs (B, V)"""
    means = torch.linspace(-6, 6, 121).double()
    log_sds = torch.linspace(-1.6, 1.4, 40).double()
    logp = unimodal_policy(torch.cartesian_prod(means, log_sds))                # (P, V)
    sharp = sharpen(logp, bandit.ref_logp[:1], beta_pi)   # (P, V)
    J_gen = sharp.exp() @ bandit.reward.T - beta_r * kl(sharp, bandit.ref_logp[:1])[:, None]  # (P, B)  Eq 8
    return logp[J_gen.argmax(0)]


def ablation(bandit, values=(0.1, 0.2, 0.5, 1.0, 2.0), default=0.5):
    """One beta at each of `values`, the other at `default`.  -> {(which, value, family): dict of (B,)}

    reward, kl (nats): those of the maximizer of J_gen; lost: how far its J_beta, beta = beta_r beta_pi, lies
    below that of the best policy in its family (the maximizer at beta_pi = 1), in units of reward.
    """
    result = {}
    for which, value in product(("beta_r", "beta_pi"), values):
        beta_r, beta_pi = (value, default) if which == "beta_r" else (default, value)
        beta = beta_r * beta_pi
        optimum = log_optimum(bandit, beta)               # of J_gen too (Theorem 3.1)
        policies = {"softmax": (optimum, optimum),
                    "unimodal": (best_unimodal(bandit, beta_r, beta_pi), best_unimodal(bandit, beta, 1.0))}
        for family, (logp, best) in policies.items():
            result[which, value, family] = {
                "reward": (logp.exp() * bandit.reward).sum(-1),
                "kl": kl(logp, bandit.ref_logp),
                "lost": objective(bandit, best, beta) - objective(bandit, logp, beta)}
    return result
