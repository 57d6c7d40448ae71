"""A language model small enough to write out: 6 tokens, at most 4 new ones, so 781 responses to a prompt.

Every expectation over responses is a finite sum.  So J, the KL, pi* and all gradients are exact, and a method
is held against them.  A prompt is one token.  Token 0 ends the text; 4 tokens without it are a cut response.
Shapes: P = 3 prompts, Y = 781 responses to each; N = P Y rows of T = 5 tokens, those of a prompt together.
"""
import itertools

import torch
import torch.nn.functional as F
from torch.nn.utils import parameters_to_vector

from model import GPT, GPTConfig, generate, sequence_logprob

V, NEW, EOS = 6, 4, 0
T = 1 + NEW
PROMPTS = torch.tensor([[1], [2], [3]])                              # (P, 1)
CONFIG = GPTConfig(n_layer=2, n_head=2, n_embd=32, vocab_size=V, block_size=T)


def every_response():
    """All responses to all prompts, padded with EOS.  -> ids, mask: (N, T)"""
    rows, lengths = [], []
    for words in range(NEW + 1):
        for response in itertools.product(range(1, V), repeat=words):
            rows.append(response + (EOS,) * (NEW - words))
            lengths.append(min(words + 1, NEW))                      # its EOS counts, where there is room
    ids = torch.cat([PROMPTS.repeat_interleave(len(rows), 0), torch.tensor(rows).repeat(len(PROMPTS), 1)], 1)
    place = torch.arange(T)
    mask = (place > 0) & (place <= torch.tensor(lengths)[:, None])   # (Y, T)
    return ids, mask.repeat(len(PROMPTS), 1)


def reward_of(ids, mask):
    """A reward function, (N, T), (N, T) -> (N,): a score of each token by its place and the token before."""
    scores = torch.randn(T, V, V, generator=torch.Generator().manual_seed(1))
    score = scores[torch.arange(1, ids.shape[1]), ids[:, :-1], ids[:, 1:]]    # (N, T-1)
    return score.where(mask[:, 1:], 0.0).sum(1)


IDS, MASK = every_response()
REWARD = reward_of(IDS, MASK).double().view(len(PROMPTS), -1)        # (P, Y), of standard deviation 1.5


# ---- policies -----------------------------------------------------------------------------------------

def policy(seed=0):
    """A GPT with random weights, pi_sft: sharpened, so that its entropy is 4 to 5 nats instead of 6.4."""
    with torch.random.fork_rng(devices=[]):                          # the global generator is left alone
        torch.manual_seed(seed)
        gpt = GPT(CONFIG)
    with torch.no_grad():
        gpt.wte.weight.mul_(5)                                       # embedding and head in one
        gpt.wpe.weight.mul_(5)
    return gpt


def moved_policy(fraction=0.5):
    """A policy some nats away from pi_sft: its weights moved by this fraction toward other random ones."""
    gpt = policy()
    with torch.no_grad():
        for parameter, other in zip(gpt.parameters(), policy(1).parameters()):
            parameter.lerp_(other, fraction)
    return gpt


def weights(model):
    """A copy of all parameters, in one vector."""
    return parameters_to_vector(model.parameters()).detach()


def sample(gpt, each, seed=0, temperature=1.0):
    """`each` responses to every prompt, those of a prompt together.  -> ids, mask: (P each, T)"""
    generator = torch.Generator().manual_seed(seed)
    ids, mask = generate(gpt, PROMPTS.repeat_interleave(each, 0), NEW, temperature, EOS, generator)
    room = (0, T - ids.shape[1])                                     # generate trims to the longest
    return F.pad(ids, room, value=EOS), F.pad(mask, room)


# ---- the truth ----------------------------------------------------------------------------------------

def log_probs(gpt, temperature=1.0):
    """log pi(y|x) of every response, differentiable.  -> (P, Y) float64"""
    return sequence_logprob(gpt, IDS, MASK, temperature).double().view(REWARD.shape)


def optimum(ref_logp, beta):
    """log pi*_beta and J* = beta log Z (EXO paper, Eq 5).  (P, Y) -> (P, Y), (P,)"""
    tilted = ref_logp + REWARD / beta                                # (P, Y)
    log_z = tilted.logsumexp(1)                                      # (P,)
    return tilted - log_z[:, None], beta * log_z


def evaluate(logp, ref_logp, beta=0.0):
    """Reward, KL to the reference in nats, J = reward - beta KL.  (P, Y), (P, Y) -> (P,) each"""
    p = logp.exp()
    reward = (p * REWARD).sum(1)
    kl = (p * (logp - ref_logp)).sum(1)
    return reward, kl, reward - beta * kl


def reached(gpt, beta):
    """How far a policy has come: its gain in J over pi_sft's, and its KL, both as fractions of pi*'s."""
    with torch.no_grad():
        logp = log_probs(gpt)
        ref_logp = log_probs(policy())
    log_best, best_J = optimum(ref_logp, beta)
    start_J = evaluate(ref_logp, ref_logp, beta)[2].mean()
    _, kl, J = evaluate(logp, ref_logp, beta)
    best_kl = evaluate(log_best, ref_logp)[1]
    return float((J.mean() - start_J) / (best_J.mean() - start_J)), float(kl.mean() / best_kl.mean())
