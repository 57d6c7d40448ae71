"""A sequence model small enough to write out: 6 tokens, at most 4 new ones, so 781 responses a prompt.

Every expectation over responses is a finite sum, so J, KL, pi* and their gradients are exact: a method is held against
the truth.  A prompt is one token; token 0 ends the text; 4 tokens without it are a response that was cut.
(P, Y): P prompts with Y = 781 responses each.
"""
import itertools

import torch

from model import GPT, GPTConfig, generate, sequence_logprob

V, NEW, EOS = 6, 4, 0
Y = sum((V - 1) ** n for n in range(NEW + 1))
PROMPTS = torch.tensor([[1], [2], [3]])                              # (P, 1)
CONFIG = GPTConfig(n_layer=2, n_head=2, n_embd=32, vocab_size=V, block_size=1 + NEW)


def responses(prompts=PROMPTS):
    """Every response to every prompt, those of a prompt together, padded with EOS.  -> ids, mask (P*Y, 1+NEW)"""
    words = [w for n in range(NEW) for w in itertools.product(range(1, V), repeat=n)]       # each ends with EOS
    cut = list(itertools.product(range(1, V), repeat=NEW))                                  # no room for it
    rows = torch.tensor([w + (EOS,) * (NEW - len(w)) for w in words + cut])                 # (Y, NEW)
    length = torch.tensor([len(w) + 1 for w in words] + [NEW] * len(cut))                   # (Y,)
    ids = torch.cat([prompts.repeat_interleave(Y, 0), rows.repeat(len(prompts), 1)], 1)     # (P*Y, 1+NEW)
    column = torch.arange(1 + NEW)
    return ids, (column > 0) & (column <= length.repeat(len(prompts))[:, None])             # (P*Y, 1+NEW)


def policy(seed=0, sharpness=5.0):
    """A tiny GPT as pi_sft: random weights, sharpened so that its entropy is 4 to 5 nats instead of 6.4."""
    with torch.random.fork_rng(devices=[]):                          # the global generator is left alone
        torch.manual_seed(seed)
        gpt = GPT(CONFIG)
    with torch.no_grad():
        gpt.wte.weight.mul_(sharpness)                               # embedding and head in one
        gpt.wpe.weight.mul_(sharpness)
    return gpt


def log_probs(gpt, ids, mask, temperature=1.0):
    """Exact log pi(y|x) of every response, differentiable.  The rows of `responses` -> (P, Y)"""
    return sequence_logprob(gpt, ids, mask, temperature).view(-1, Y)


def reward_of(ids, mask):
    """A reward function (ids, mask) -> (N,): a score of each token at its place after its neighbour; sd about 1.5."""
    table = torch.randn(1 + NEW, V, V, generator=torch.Generator().manual_seed(1))          # place, token before, token
    score = table[torch.arange(1, ids.shape[1]), ids[:, :-1], ids[:, 1:]]                   # (N, T-1)
    return score.where(mask[:, 1:], 0.0).sum(1)


def optimum(ref_logp, reward, beta):
    """log pi*_beta and J* = beta log Z (EXO paper, Eq 5).  (P, Y), (P, Y) -> (P, Y), (P,)"""
    tilted = ref_logp + reward / beta                                                       # (P, Y)
    log_z = tilted.logsumexp(1)                                                             # (P,)
    return tilted - log_z[:, None], beta * log_z


def evaluate(logp, ref_logp, reward, beta=0.0):
    """Exact reward, KL to the reference in nats, J = reward - beta KL.  (P, Y) x3 -> (P,) x3, differentiable"""
    p = logp.exp()
    expected, kl = (p * reward).sum(1), (p * (logp - ref_logp)).sum(1)
    return expected, kl, expected - beta * kl


def limit(ref_logp, reward, beta):
    """Exact reward and KL of pi*_beta: a point of the limit.  (P, Y), (P, Y) -> (P,), (P,)"""
    return evaluate(optimum(ref_logp, reward, beta)[0], ref_logp, reward)[:2]


def gap_closed(logp, ref_logp, reward, beta):
    """The share of J* - J(pi_sft) that a policy has closed: 0 at pi_sft, 1 at the optimum.  (P, Y) x3 -> float"""
    start, here = (evaluate(x, ref_logp, reward, beta)[2].mean() for x in (ref_logp, logp))
    best = optimum(ref_logp, reward, beta)[1].mean()
    return float(((here - start) / (best - start)).detach())


def draws(gpt, each, seed=0, temperature=1.0):
    """`each` sampled responses to every prompt, those of a prompt together.  -> ids, mask (P*each, 1+NEW)"""
    random = torch.Generator().manual_seed(seed)
    ids, mask = generate(gpt, PROMPTS.repeat_interleave(each, 0), NEW, temperature, EOS, random)
    room = (0, 1 + NEW - ids.shape[1])                               # generate trims to the longest
    return torch.nn.functional.pad(ids, room, value=EOS), torch.nn.functional.pad(mask, room)
