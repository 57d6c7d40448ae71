"""GPT-2 in one file: transformer, scalar head, log-probs, sampling with a key-value cache, weights on disk.

Pre-norm, learned positions, tanh-GELU, tied head, no dropout.  Parameters carry OpenAI's names, so released
weights load by name, and transformers opens a saved folder as the same model.  A row of ids is a
prompt, one contiguous response, then padding.  Padding is on the right, so causal attention never sees it and
positions are 0..T-1.  N rows, T tokens, C channels, H heads, D = C / H, V vocabulary.
"""
import copy
import math
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F

from loop import WORLD, UserError, fetch, gather, my_chunk, read_json, read_tensors, write_json, write_tensors

CHUNK, CUDA_CHUNK = 2 ** 23, 2 ** 27                # logits alive at once: 32 MiB, 512 MiB on a GPU


@dataclass
class GPTConfig:
    n_layer: int
    n_head: int
    n_embd: int
    vocab_size: int
    block_size: int


class Attention(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.n_head = config.n_head
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd)

    def forward(self, x, cache, layer):
        """(N, T, C) -> (N, T, C), each token sees itself and the past; cache: None, or a `Cache`."""
        N, T, C = x.shape
        qkv = self.c_attn(x).view(N, T, 3, self.n_head, -1)                 # (N, T, 3C) -> (N, T, 3, H, D)
        qkv = qkv.transpose(1, 3)                                           # (N, H, 3, T, D)
        if cache is None:
            y = F.scaled_dot_product_attention(*qkv.unbind(2), is_causal=True)          # (N, H, T, D)
        else:
            y = cache.attend(layer, qkv[:, :, 0], qkv[:, :, 1:])            # (N, H, T, D)
        return self.c_proj(y.transpose(1, 2).reshape(N, T, C))              # (N, H, T, D) -> (N, T, C)


class Block(nn.Module):
    def __init__(self, config):
        super().__init__()
        C = config.n_embd
        self.ln_1 = nn.LayerNorm(C)
        self.attn = Attention(config)
        self.ln_2 = nn.LayerNorm(C)
        mlp = {"c_fc": nn.Linear(C, 4 * C), "gelu": nn.GELU("tanh"), "c_proj": nn.Linear(4 * C, C)}
        self.mlp = nn.Sequential(OrderedDict(mlp))

    def forward(self, x, cache=None, layer=0):
        x = x + self.attn(self.ln_1(x), cache, layer)                       # (N, T, C)
        return x + self.mlp(self.ln_2(x))                                   # (N, T, C), 4C inside


class GPT(nn.Module):
    """GPT-2.  gpt(ids) -> logits; gpt.hidden(ids) -> the last layer's states, where every head starts."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.bf16 = False                           # matrix products in bfloat16: set by the caller, on CUDA
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        self.wpe = nn.Embedding(config.block_size, config.n_embd)
        self.h = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.ln_f = nn.LayerNorm(config.n_embd)
        for name, parameter in self.named_parameters():             # as nanoGPT
            if name.endswith("bias"):
                nn.init.zeros_(parameter)
            elif "ln_" not in name:
                terms = 2 * config.n_layer if name.endswith("c_proj.weight") else 1     # of the residual sum
                nn.init.normal_(parameter, std=0.02 / math.sqrt(terms))

    def hidden(self, ids, cache=None):
        """(N, T) ids -> (N, T, C).  With a cache: the prompts first, then one more token of each row."""
        position = torch.arange(ids.shape[1], device=ids.device)            # (T,)
        if cache is not None and cache.kv:
            position = cache.step()                                         # (N, 1)
        with self.precision():
            x = self.wte(ids) + self.wpe(position)                          # (N, T, C)
            for layer, block in enumerate(self.h):
                x = block(x, cache, layer)
            return self.ln_f(x)

    def head(self, hidden):
        """(..., C) -> (..., V) logits, in float32: GPT-2's lie near -100, where bf16 has steps of 0.5."""
        with torch.autocast(self.wte.weight.device.type, enabled=False):
            return F.linear(hidden.float(), self.wte.weight)

    def forward(self, ids):
        return self.head(self.hidden(ids))                                  # (N, T) -> (N, T, V)

    def precision(self):
        """The precision of policy, reference and sampler is set only here."""
        return torch.autocast(self.wte.weight.device.type, torch.bfloat16, enabled=self.bf16)

    @classmethod
    def from_pretrained(cls, source):
        """A released GPT-2 by name (downloaded once), or a Hugging Face folder of one."""
        folder = pretrained_folder(source)
        config = {"n_positions": 1024} | read_json(folder / "config.json")
        for name, known in (FIXED | {"n_inner": [4 * config.get("n_embd", 0)]}).items():
            if config.get(name) not in [None, *known]:
                raise UserError(f"{source} has {name} = {config[name]}: this GPT-2 has {known[0]}")
        gpt = cls(GPTConfig(*[config[name] for name in SIZES]))
        weights = {}
        for name, tensor in read_tensors(folder / "model.safetensors").items():
            if name.endswith((".attn.bias", ".attn.masked_bias", "lm_head.weight")):
                continue                                        # causal masks, and the tied head
            weights[name.removeprefix("transformer.")] = tensor.T if name.endswith(TRANSPOSED) else tensor
        gpt.load_state_dict(weights)
        return gpt

    def cut(self, vocab_size):
        """Drops embedding rows past vocab_size: some are padding.  -> itself"""
        self.wte = nn.Embedding.from_pretrained(self.wte.weight[:vocab_size].detach(), freeze=False)
        self.config.vocab_size = len(self.wte.weight)
        return self

    def save_pretrained(self, folder, eos_id=None):
        """Writes what transformers opens as GPT2LMHeadModel."""
        weights = {name: w.T if name.endswith(TRANSPOSED) else w for name, w in self.state_dict().items()}
        write_tensors(Path(folder) / "model.safetensors", weights)
        ends = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), eos_id)
        no_dropout = dict.fromkeys(("attn_pdrop", "embd_pdrop", "resid_pdrop"), 0.0)
        sizes = dict(zip(SIZES, vars(self.config).values()))
        kind = {"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"], "activation_function": "gelu_new"}
        write_json(Path(folder) / "config.json", kind | sizes | ends | no_dropout)


def pretrained_folder(source):
    """Where the weights of `GPT.from_pretrained(source)` are: released ones are downloaded.  -> Path"""
    folder = Path(source)
    if str(source) in RELEASED:
        for name in ("config.json", "model.safetensors"):
            url = f"https://huggingface.co/openai-community/{source}/resolve/main/{name}"
            folder = fetch(url, f"{source}/{name}").parent
    if not (folder / "config.json").exists():
        raise UserError(f"{source} is neither one of {', '.join(RELEASED)} nor a folder with config.json")
    return folder


RELEASED = ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl")
SIZES = ("n_layer", "n_head", "n_embd", "vocab_size", "n_positions")        # GPTConfig's, in config.json
FIXED = {"model_type": ["gpt2"], "scale_attn_weights": [True], "scale_attn_by_inverse_layer_idx": [False],
         "layer_norm_epsilon": [1e-5], "activation_function": ["gelu_new", "gelu_pytorch_tanh"]}
TRANSPOSED = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")   # on disk


class ScalarGPT(nn.Module):
    """GPT-2 with one number per position: an oracle's log-odds, a reward model's reward, a critic's value."""

    def __init__(self, gpt, eos_id):
        super().__init__()
        self.eos_id = eos_id
        self.transformer = copy.deepcopy(gpt)
        self.score = nn.Linear(gpt.config.n_embd, 1, bias=False)    # official code: no bias
        nn.init.zeros_(self.score.weight)                           # ours: the first output is 0 everywhere

    def values(self, ids):
        """(N, T) ids -> (N, T) float32; column t has read ids[:, :t+1]."""
        return self.score(self.transformer.hidden(ids).float()).squeeze(-1)         # (N, T, C) -> (N, T)

    def forward(self, ids, mask):
        """A reward function: (N, T) ids and mask -> (N,), read at the last token before the end-of-text."""
        row = torch.arange(len(ids), device=ids.device)
        end = mask.shape[1] - 1 - mask.flip(1).int().argmax(1)              # (N,) the response's last token
        end = end - (ids[row, end] == self.eos_id).long()   # official code: the last token of the text itself
        hidden = self.transformer.hidden(ids[:, :int(end.max()) + 1])       # (N, t, C)
        return self.score(hidden[row, end].float()).squeeze(-1)             # (N, t, C) -> (N, C) -> (N,)


# ---- log-probs -------------------------------------------------------------------------------------------

def token_logprob(model, ids, mask, temperature=1.0):
    """log pi(ids[:, t] | ids[:, :t]) on the mask, 0 off it.  (N, T), (N, T) -> (N, T) float32

    pi = softmax(logits / temperature).  The head sees response tokens only, a chunk of rows at a time.
    """
    if mask.dtype != torch.bool or mask[:, 0].any():
        raise ValueError("mask must be boolean, and False on the first token: nothing comes before it")
    hidden = model.hidden(ids[:, :-1])[mask[:, 1:]].float()                 # (N, T-1, C) -> (M, C)
    rows = max(1, (CUDA_CHUNK if ids.is_cuda else CHUNK) // model.config.vocab_size)
    logp = HeadLogprob.apply(hidden / temperature, model.wte.weight, ids[mask], rows)       # (M,)
    return torch.zeros(mask.shape, device=ids.device).masked_scatter(mask, logp)            # (M,) -> (N, T)


class HeadLogprob(torch.autograd.Function):
    """log softmax(h W^T)[y] of M rows, `rows` of them at a time.  h (M, C), W (V, C), target y (M,) -> (M,)

    Backward recomputes a chunk's logits and, with the log-sum-exp that forward kept, the probabilities p:
        d/dh = W_y - p W,        d/dW = (onehot(y) - p)^T h,        times each row's incoming gradient g.
    Written by hand, because torch.utils.checkpoint holds a (V, C) gradient per chunk, which makes a step's
    memory 2 to 3 times as large.
    """

    @staticmethod
    def forward(ctx, hidden, weight, target, rows):
        buffer = hidden.new_empty(min(rows, len(hidden)), len(weight))      # (rows, V), of all chunks
        logits_y, logs_z = [], []
        for h, y in zip(hidden.split(rows), target.split(rows)):
            logits = torch.mm(h, weight.T, out=buffer[:len(h)])             # (m, V)
            logits_y.append(logits.gather(1, y[:, None]))                   # (m, 1)
            top = logits.amax(1, keepdim=True)                              # (m, 1)
            logs_z.append(top + logits.sub_(top).exp_().sum(1, keepdim=True).log())         # (m, 1)
        log_z = torch.cat(logs_z)                                           # (M, 1)
        ctx.save_for_backward(hidden, weight, target, log_z)
        ctx.rows = rows
        return (torch.cat(logits_y) - log_z).squeeze(1)                     # (M, 1) -> (M,)

    @staticmethod
    def backward(ctx, grad):
        hidden, weight, target, log_z = ctx.saved_tensors
        buffer = hidden.new_empty(min(ctx.rows, len(hidden)), len(weight))  # (rows, V)
        grad_hidden = []
        grad_weight = torch.zeros_like(weight)                              # (V, C)
        rowwise = (hidden, target, log_z, grad[:, None])                    # (M, C), (M,), (M, 1), (M, 1)
        for h, y, z, g in zip(*[tensor.split(ctx.rows) for tensor in rowwise]):
            p = torch.mm(h, weight.T, out=buffer[:len(h)]).sub_(z).exp_()   # (m, V)
            grad_hidden.append(g * (weight[y] - p @ weight))                # (m, C)
            grad_weight.addmm_(p.T, g * h, alpha=-1).index_add_(0, y, g * h)
        return torch.cat(grad_hidden), grad_weight, None, None


def sequence_logprob(model, ids, mask, temperature=1.0):
    """log pi(y|x) in nats, summed over the response, its end-of-text included.  (N, T), (N, T) -> (N,)"""
    return token_logprob(model, ids, mask, temperature).sum(1)


def trim(ids, mask):
    """Cuts the padding that no row of a batch needs.  (N, T), (N, T) -> (N, t), (N, t)"""
    longest = int(mask.any(0).nonzero().max()) + 1
    return ids[:, :longest], mask[:, :longest]


# ---- sampling --------------------------------------------------------------------------------------------

class Cache:
    """Keys and values of N rows of up to T tokens: the prompts', then one more token per row at a time."""

    def __init__(self, lengths, T, device):
        self.T = T
        self.kv = []                                # (N, H, 2, T, D) of each layer, once the prompts are in
        self.length = torch.tensor(lengths, device=device)                  # (N,) tokens that a row holds
        self.longest = max(lengths)                 # on the host: no step waits for the device
        self.ragged = min(lengths) < self.longest

    def step(self):
        """Prepares for one more token of each row.  -> its position, (N, 1)"""
        place = self.length                                                 # (N,)
        self.length = self.length + 1
        self.longest += 1
        every = slice(None)
        self.new = (every, every, every, self.longest - 1)                  # its place in (N, H, 2, T, D)
        self.visible = None
        if self.ragged:
            self.new = (torch.arange(len(place), device=place.device), every, every, place)
            column = torch.arange(self.longest, device=place.device)        # (t,)
            self.visible = (column <= place[:, None])[:, None, None]        # (N, t) -> (N, 1, 1, t)
        return place[:, None]

    def attend(self, layer, q, kv):
        """Stores kv (N, H, 2, t, D) and lets q attend to what its row holds so far.  -> (N, H, t, D)"""
        if layer == len(self.kv):                   # the prompts: ordinary causal attention
            self.kv.append(F.pad(kv, (0, 0, 0, self.T - kv.shape[3])))      # (N, H, 2, T, D)
            return F.scaled_dot_product_attention(q, *kv.unbind(2), is_causal=True)
        self.kv[layer][self.new] = kv[:, :, :, 0]                           # (N, H, 2, D)
        keys, values = self.kv[layer][:, :, :, :self.longest].unbind(2)     # (N, H, longest, D) each
        return F.scaled_dot_product_attention(q, keys, values, attn_mask=self.visible)

    def keep(self, rows):
        """Drops all rows but these, (n,) indices, layer by layer: never two caches at once."""
        self.length = self.length[rows]
        for layer, kv in enumerate(self.kv):
            self.kv[layer] = kv[rows]                                       # (N, ...) -> (n, H, 2, T, D)


@torch.no_grad()
def generate(model, prompt_ids, max_new_tokens, temperature=1.0, eos_id=None, generator=None, uniform=None):
    """Samples a response to each prompt from softmax(logits / temperature).  -> ids, mask: (N, t) int64, bool

    prompt_ids: (N, T0) tensor, or a list of N id lists of any lengths.  A response starts right after its own
    prompt and ends with eos_id, which its mask includes, or at max_new_tokens; then comes eos_id (0 if None).
    Each token takes one uniform number, whatever other rows do: from uniform (N, max_new_tokens) or the
    generator (CPU).
    """
    device = model.wte.weight.device
    prompts = [torch.as_tensor(prompt, dtype=torch.long) for prompt in prompt_ids]
    lengths = [len(prompt) for prompt in prompts]
    T = max(lengths) + max_new_tokens
    if min(lengths) < 1 or max_new_tokens < 1 or T > model.config.block_size or not temperature > 0:
        raise ValueError(f"cannot add {max_new_tokens} tokens to prompts of {min(lengths)} to {max(lengths)} "
                         f"at temperature {temperature} and block_size = {model.config.block_size}")
    pad = eos_id or 0
    prompt = nn.utils.rnn.pad_sequence(prompts, batch_first=True, padding_value=pad).to(device)     # (N, T0)
    ids = F.pad(prompt, (0, max_new_tokens), value=pad)                     # (N, T0) -> (N, T)
    mask = torch.zeros_like(ids, dtype=torch.bool)
    if uniform is None:
        uniform = torch.rand(len(prompts), max_new_tokens, generator=generator)
    uniform = uniform.to(device)
    row = torch.arange(len(prompts), device=device)                         # (n,) the rows still going
    ended = torch.zeros_like(row, dtype=torch.bool)                         # (n,) those that ended meanwhile
    with model.precision():                         # one scope: weights are cast once
        cache = Cache(lengths, T, device)
        hidden = model.hidden(prompt, cache)[row, cache.length - 1]         # (N, T0, C) -> (N, C)
        for t in range(max_new_tokens):
            token = sample(model.head(hidden / temperature), uniform[row, t])               # (n,)
            ids[row, cache.length] = token.where(~ended, pad)
            mask[row, cache.length] = ~ended
            if eos_id is not None:
                ended |= token == eos_id
            if t % 8 == 7:                          # now and then: asking the device costs a wait
                going = (~ended).nonzero().squeeze(1)                       # (n,) -> (m,)
                if len(going) == 0:
                    break
                if len(going) <= 3 / 4 * len(row):
                    cache.keep(going)
                    row, token, ended = row[going], token[going], ended[going]
            if t + 1 < max_new_tokens:
                hidden = model.hidden(token[:, None], cache)[:, 0]          # (n, 1, C) -> (n, C)
    return trim(ids, mask)


def sample(logits, uniform):
    """One draw per row by inverting the distribution function.  (N, V) float32, (N,) in [0, 1) -> (N,)"""
    cdf = logits.softmax(-1).cumsum(-1)                                     # (N, V)
    point = uniform[:, None] * cdf[:, -1:]          # (N, 1), below cdf[:, -1] after rounding too: uniform < 1
    token = torch.searchsorted(cdf, point, right=True).squeeze(1)           # (N,), the first with cdf > point
    return token.clamp(max=logits.shape[1] - 1)     # only nan logits reach V: the next loss will say so


@torch.no_grad()
def respond(policy, prompts, new_tokens, T, temperature, eos_id, generator, rows, measure, pieces=64):
    """A response to each prompt, `rows` sampled and `pieces` measured at a time.  prompts: N id lists.

    measure: (ids, mask) of some rows -> {name: (n,) or (n, t)}.
    -> {ids, mask: (N, T), name: (N,) or (N, T)} on the CPU, the same for any number of rows and processes
    """
    rows = min(rows, math.ceil(len(prompts) / WORLD))
    parts = {}
    for number, first in enumerate(range(0, len(prompts), rows)):
        chunk = prompts[first:first + rows]
        uniform = torch.rand(len(chunk), new_tokens, generator=generator)   # in every process
        if my_chunk(number):
            ids, mask = generate(policy, chunk, new_tokens, temperature, eos_id, uniform=uniform)
            measured = [measure(*piece) for piece in zip(ids.split(pieces), mask.split(pieces))]
            part = {name: torch.cat([piece[name] for piece in measured]) for name in measured[0]}
            part |= {"ids": ids.int(), "mask": mask}
            for name, column in part.items():
                if column.dim() == 2:                                       # (n, t) -> (n, T)
                    room = (0, T - column.shape[1])
                    column = F.pad(column, room, value=eos_id if name == "ids" else 0)
                part[name] = column.cpu()
            parts[number] = part
    parts = [part for _, part in sorted(gather(parts).items())]
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
