"""GPT-2 in one file: transformer, scalar head, log-probs, sampling with a key-value cache, weights on disk.

Pre-norm, learned positions, tanh-GELU, tied head, no dropout.  Parameters carry OpenAI's names, so released
weights load by equal names and transformers opens a saved folder as the same model.  A row of ids is a
prompt, one contiguous response, then padding.  Padding is on the right, so causal attention never sees it and
positions are 0..T-1.  N rows, T tokens, C channels, H heads, D = C / H, V vocabulary.
"""
import contextlib
import math
from collections import OrderedDict
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from checkpoint import read_json, read_tensors, write_json, write_tensors
from compute import UserError, gather, move, own_rows, world

CHUNK, CUDA_CHUNK = 2 ** 23, 2 ** 27                # logits alive at once: 32 MiB, 512 MiB on a GPU
CPU_ROWS = 64                                       # scored at once: whole batches do not fit a CPU's caches


@dataclass
class GPTConfig:
    n_layer: int
    n_head: int
    n_embd: int
    vocab_size: int
    block_size: int


def attention_kernels(x):
    """How whole rows attend: as PyTorch chooses, but on a CPU below --matmul highest by plain products.

    Under medium the fused attention's backward is 3 to 20 times slower there: a whole step gains 1.5 times.
    """
    plain = x.device.type == "cpu" and torch.get_float32_matmul_precision() != "highest"
    return sdpa_kernel(SDPBackend.MATH) if plain else contextlib.nullcontext()


class Attention(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.n_head = config.n_head
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd)

    def forward(self, x, cache, layer):
        """(N, T, C) -> (N, T, C), each token attending to those before it; cache: None, or a `Cache`."""
        N, T, C = x.shape
        qkv = self.c_attn(x).view(N, T, 3, self.n_head, -1)                 # (N, T, 3C) -> (N, T, 3, H, D)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)                                # 3 x (N, H, T, D)
        if cache is None:
            with attention_kernels(x):
                y = F.scaled_dot_product_attention(q, k, v, is_causal=True)             # (N, H, T, D)
        else:
            y = cache.attend(layer, q, k, v)                                # (N, H, T, D)
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
            for layer, block in enumerate(self.h):  # the caller may have compiled block(x), for whole rows
                x = block(x) if cache is None else block.forward(x, cache, layer)
            return self.ln_f(x)

    def head(self, hidden):
        """(..., C) -> (..., V) logits, in float32: GPT-2's lie near -100, where bf16 has steps of 0.5."""
        with torch.autocast(self.wte.weight.device.type, enabled=False):
            return F.linear(hidden.float(), self.wte.weight)

    def forward(self, ids):
        return self.head(self.hidden(ids))                                  # (N, T) -> (N, T, V)

    def precision(self):
        """One place decides the arithmetic of policy, reference and sampler alike."""
        return torch.autocast(self.wte.weight.device.type, torch.bfloat16, enabled=self.bf16)

    @classmethod
    def from_pretrained(cls, source):
        """A released GPT-2 by name (downloaded once), or a Hugging Face folder.  UserError if it is none."""
        if source in RELEASED:
            from data import cache_folder, fetch  # here, as only a download needs what stands below this file

            *_, size, sha256 = RELEASED[source]
            config = config_of(source)
            path = cache_folder() / source / "pytorch_model.bin"
            url = f"https://huggingface.co/openai-community/{source}/resolve/main/pytorch_model.bin"
            fetch(url, path, size, sha256, "name a folder by --init, or use --preset tiny or imdb-small")
        else:
            config, path = open_folder(source)
        return load_weights(cls(config), path)

    def save_pretrained(self, folder, eos_id=None):
        """Writes what transformers opens as GPT2LMHeadModel.  -> the sha256 of model.safetensors"""
        return save_model(folder, "GPT2LMHeadModel", self, self.config, eos_id)


class ScalarGPT(nn.Module):
    """GPT-2 with one number a position: an oracle's log-odds, a reward model's reward, a critic's value."""

    def __init__(self, gpt, eos_id):
        super().__init__()
        self.eos_id = eos_id
        self.transformer = GPT(gpt.config)
        self.transformer.bf16 = gpt.bf16
        self.transformer.load_state_dict(gpt.state_dict())
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

    @classmethod
    def from_pretrained(cls, folder, eos_id):
        config, path = open_folder(folder)
        return load_weights(cls(GPT(config), eos_id), path)

    def save_pretrained(self, folder):
        """As GPT.save_pretrained, but as GPT2ForSequenceClassification with one label."""
        return save_model(folder, "GPT2ForSequenceClassification", self, self.transformer.config, self.eos_id)


# ---- log-probs -------------------------------------------------------------------------------------------

def rows_at_once(model):
    """How many rows' logits, V each, are alive at once."""
    return max(1, (CUDA_CHUNK if model.wte.weight.is_cuda else CHUNK) // model.config.vocab_size)


def token_logprob(model, ids, mask, temperature=1.0):
    """log pi(ids[:, t] | ids[:, :t]) on the mask, 0 off it.  (N, T), (N, T) -> (N, T) float32

    pi = softmax(logits / temperature).  The head sees response tokens only, a chunk of rows at a time.
    ids and mask may lie on the CPU: then nothing here waits for the device.
    """
    if mask.dtype != torch.bool or mask[:, 0].any():
        raise ValueError("mask must be boolean, and False on the first token: nothing comes before it")
    device = model.wte.weight.device
    row, before = mask[:, 1:].nonzero(as_tuple=True)                        # (M,), (M,) of the token before
    ids, mask, target, row, before = move(device, ids, mask, ids[mask], row, before)        # target: (M,)
    hidden = model.hidden(ids[:, :-1])[row, before].float()                 # (N, T-1, C) -> (M, C)
    logp = HeadLogprob.apply(hidden / temperature, model.wte.weight, target, rows_at_once(model))     # (M,)
    return torch.zeros(mask.shape, device=device).masked_scatter(mask, logp)                # (M,) -> (N, T)


class HeadLogprob(torch.autograd.Function):
    """log softmax(h W^T)[y] of M rows, `rows` of them at a time.  h (M, C), W (V, C), target y (M,) -> (M,)

    Backward makes a chunk's logits again and, with the log-sum-exp that forward kept, the probabilities p:
        d/dh = W_y - p W,        d/dW = (onehot(y) - p)^T h,        times each row's incoming gradient g.
    Written out, as torch.utils.checkpoint makes a (V, C) gradient a chunk: 2 to 3 times the memory of a step.
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
    """Keys and values of N rows of up to T tokens: first the prompts', then one more token's a row."""

    def __init__(self, lengths, T, device):
        self.T = T
        self.kv = []                                # (2, N, H, T, D) of each layer, once the prompts are in
        self.length = torch.tensor(lengths, device=device)                  # (N,) tokens that a row holds
        self.longest = max(lengths)                 # on the host: no step waits for the device
        self.ragged = min(lengths) < self.longest

    def step(self):
        """Prepares for one more token of each row.  -> its position, (N, 1)"""
        place = self.length                                                 # (N,)
        self.length = self.length + 1
        self.longest += 1
        self.new = (slice(None), slice(None), self.longest - 1)             # its place in (N, H, T, D)
        self.visible = None
        if self.ragged:
            self.new = (torch.arange(len(place), device=place.device), slice(None), place)
            column = torch.arange(self.longest, device=place.device)        # (t,)
            self.visible = (column <= place[:, None])[:, None, None]        # (N, t) -> (N, 1, 1, t)
        return place[:, None]

    def attend(self, layer, q, k, v):
        """Stores k, v (N, H, t, D) and lets q attend to what its row holds so far.  -> (N, H, t, D)"""
        if layer == len(self.kv):                   # the prompts: ordinary causal attention
            self.kv.append(F.pad(torch.stack([k, v]), (0, 0, 0, self.T - k.shape[2])))      # (2, N, H, T, D)
            return F.scaled_dot_product_attention(q, k, v, is_causal=True)
        keys, values = self.kv[layer][:, :, :, :self.longest]               # (N, H, longest, D) each
        keys[self.new] = k[:, :, 0]                                         # (N, H, D)
        values[self.new] = v[:, :, 0]                                       # (N, H, D)
        return F.scaled_dot_product_attention(q, keys, values, attn_mask=self.visible)

    def keep(self, rows):
        """Drops all rows but these, (n,) indices, layer by layer: never two caches at once."""
        self.length = self.length[rows]
        for layer, kv in enumerate(self.kv):
            self.kv[layer] = kv[:, rows]                                    # (2, N, ...) -> (2, n, H, T, D)


@torch.no_grad()
def generate(model, prompt_ids, max_new_tokens, temperature=1.0, eos_id=None, generator=None, uniform=None):
    """Samples a response to each prompt from softmax(logits / temperature).  -> ids, mask: (N, T) int64, bool

    prompt_ids: (N, T0) tensor, or a list of N id lists of any lengths.  A response starts right after its own
    prompt and ends with eos_id, which its mask includes, or at max_new_tokens; then comes eos_id (0 if None).
    uniform: (N, max_new_tokens), by default drawn on the CPU; one number a token, whatever other rows do.
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
    rows = rows_at_once(model)
    row = torch.arange(len(prompts), device=device)                         # (n,) the rows still going
    ended = torch.zeros_like(row, dtype=torch.bool)                         # (n,) those that ended meanwhile
    with model.precision():                         # around all: weights are cast once
        cache = Cache(lengths, T, device)
        hidden = model.hidden(prompt, cache)[row, cache.length - 1]         # (N, T0, C) -> (N, C)
        for t in range(max_new_tokens):
            chunks = zip(hidden.split(rows), uniform[row, t].split(rows))
            token = torch.cat([sample(model.head(h) / temperature, u) for h, u in chunks])  # (n,)
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
    """One draw a row by the inverse of the distribution function.  (N, V) float32, (N,) in [0, 1) -> (N,)"""
    cdf = (logits - logits.amax(-1, keepdim=True)).exp().cumsum(-1)         # (N, V), not normalised
    point = uniform[:, None] * cdf[:, -1:]          # (N, 1), below cdf[:, -1] after rounding too: uniform < 1
    token = torch.searchsorted(cdf, point, right=True).squeeze(1)           # (N,), the first with cdf > point
    return token.clamp(max=logits.shape[1] - 1)     # only nan logits reach V: the next loss will say so


@torch.no_grad()
def respond(policy, prompts, max_new_tokens, temperature, eos_id, generator, rows, measure, T=None,
            uniform=None):
    """Samples a response to each prompt, `rows` at a time, and measures it; each process does its share.

    prompts: (N, T0) ids, or N id lists.  measure: (ids, mask) of some rows -> {name: (n,) or (n, t)}.
    -> {ids, mask: (N, T), name: (N,) or (N, T)} on the CPU, in the prompts' order; T: if given, the width.
    uniform: (N, max_new_tokens), by default from the generator, which must be alike in every process.
    """
    T = T or max(map(len, prompts)) + max_new_tokens
    if uniform is None:
        uniform = torch.rand(len(prompts), max_new_tokens, generator=generator)
    parts = []
    for first in range(0, len(prompts), rows):
        chunk = prompts[first:first + rows]
        numbers = uniform[first:first + rows]                                            # (n, t)
        split = len(chunk) >= world()               # else each process does all of it
        if split:
            chunk, numbers = own_rows(chunk), own_rows(numbers)
        ids, mask = generate(policy, chunk, max_new_tokens, temperature, eos_id, uniform=numbers)
        n = len(ids) if ids.is_cuda else CPU_ROWS
        pieces = [measure(*piece) for piece in zip(ids.split(n), mask.split(n))]
        part = {"ids": ids, "mask": mask}
        part |= {name: torch.cat([piece[name] for piece in pieces]) for name in pieces[0]}
        for name, column in part.items():
            if column.shape == mask.shape:          # a number a token, not a row
                pad = (eos_id or 0) if name == "ids" else 0
                column = F.pad(column, (0, T - ids.shape[1]), value=pad)    # (n, t) -> (n, T)
            part[name] = column.cpu()
        parts.append(gather(part) if split else part)
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


# ---- weights in Hugging Face's layout --------------------------------------------------------------------

RELEASED = {    # name: layers, heads, channels; bytes of pytorch_model.bin, its sha256 where it is known
    "gpt2": (12, 12, 768, 548_118_077, "7c5d3f4b8b76583b422fcb9189ad6c89d5d97a094541ce8932dce3ecabde1421"),
    "gpt2-medium": (24, 16, 1024, 1_520_013_706, None),
    "gpt2-large": (36, 20, 1280, 3_247_202_234, None),
    "gpt2-xl": (48, 25, 1600, 6_431_878_936, None)}
SIZES = ("n_layer", "n_head", "n_embd", "vocab_size", "n_positions")        # GPTConfig's, in config.json
ARCHITECTURE = {"model_type": "gpt2", "activation_function": "gelu_new", "layer_norm_epsilon": 1e-5,
                "n_inner": None, "tie_word_embeddings": True, "scale_attn_by_inverse_layer_idx": False}
TRANSPOSED = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")   # on disk


def config_of(source):
    """The sizes of a released GPT-2, by name, or of a Hugging Face folder.  -> GPTConfig"""
    if source in RELEASED:
        return GPTConfig(*RELEASED[source][:3], vocab_size=50257, block_size=1024)
    return open_folder(source)[0]


def open_folder(folder):
    """-> GPTConfig, path of the weights in a Hugging Face folder; UserError if it is no GPT-2"""
    path = Path(folder) / "model.safetensors"
    if not path.exists():
        path = path.with_name("pytorch_model.bin")
    if not path.exists() or not path.with_name("config.json").exists():
        raise UserError(f"{folder} is neither one of {', '.join(RELEASED)} nor a folder with config.json and "
                        "model.safetensors or pytorch_model.bin")
    config = read_json(path.with_name("config.json"))
    wrong = {name: config[name] for name, ours in ARCHITECTURE.items() if config.get(name, ours) != ours}
    if wrong:
        raise UserError(f"{folder}: config.json is not of GPT-2's architecture: {wrong}")
    return GPTConfig(*[config[name] for name in SIZES]), path


def load_weights(model, path):
    """Fills a GPT or ScalarGPT from model.safetensors or pytorch_model.bin; UserError if it does not fit."""
    if path.suffix == ".safetensors":
        stored = read_tensors(path)[0]
    else:
        try:
            stored = dict(torch.load(path, map_location="cpu", weights_only=True))  # no code in it runs
        except Exception as error:
            raise UserError(f"{path} is corrupt, or holds more than tensors by name") from error
    weights = {}
    for name, tensor in stored.items():
        if isinstance(model, GPT):
            name = name.removeprefix("transformer.")
        if not name.endswith((".attn.bias", ".attn.masked_bias", "lm_head.weight")):    # masks, the tied head
            weights[name] = tensor.T if name.endswith(TRANSPOSED) else tensor
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:300]
        raise UserError(f"{path} does not fit its config.json: {reason}") from error
    return model


def save_model(folder, architecture, model, config, eos_id):
    """Writes config.json for transformers' class `architecture`, and model.safetensors.  -> its sha256"""
    state = model.state_dict()
    weights = {name: tensor.T if name.endswith(TRANSPOSED) else tensor for name, tensor in state.items()}
    sizes = dict(zip(SIZES, asdict(config).values()))
    other = {"architectures": [architecture], "num_labels": 1, "attn_pdrop": 0.0, "embd_pdrop": 0.0,
             "resid_pdrop": 0.0, "bos_token_id": eos_id, "eos_token_id": eos_id, "pad_token_id": eos_id}
    write_json(Path(folder) / "config.json", sizes | ARCHITECTURE | other)
    return write_tensors(Path(folder) / "model.safetensors", weights)
