"""GPT-2 in one file: the transformer, its scalar-head twin, sampling with a key-value cache, log-probs, load and save.

Pre-norm, learned positions, tanh-GELU, tied head, no dropout.  Parameters carry OpenAI's names, so that the released weights
load by equal names, and a saved folder opens in transformers as the same model.

Rows of ids are: prompt, one contiguous block of response, padding.  Padding is on the right, so causal attention never sees it
and positions are 0..T-1.  Shapes: N rows, T tokens, C channels, H heads, D = C / H, V vocabulary.
"""
import contextlib
import math
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F

from files import UserError, read_json, read_tensors, write_json, write_tensors
from parallel import gather, share, world

# name: (layers, heads, channels, bytes of pytorch_model.bin, its sha256 where it is known beforehand)
RELEASED = {"gpt2": (12, 12, 768, 548_118_077, "7c5d3f4b8b76583b422fcb9189ad6c89d5d97a094541ce8932dce3ecabde1421"),
            "gpt2-medium": (24, 16, 1024, 1_520_013_706, None), "gpt2-large": (36, 20, 1280, 3_247_202_234, None),
            "gpt2-xl": (48, 25, 1600, 6_431_878_936, None)}
RELEASED_URL = "https://huggingface.co/openai-community/{name}/resolve/main/pytorch_model.bin"
TRANSPOSED = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")   # OpenAI stores (in, out)
CHUNK, CUDA_CHUNK = 2 ** 23, 2 ** 27                                 # logits alive at once in the head: 32 MiB, 512 MiB on a GPU


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
        N, T, C = x.shape
        q, k, v = self.c_attn(x).view(N, T, 3, self.n_head, -1).permute(2, 0, 3, 1, 4)      # (N, T, 3C) -> 3 x (N, H, T, D)
        if cache is None:
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True)                     # (N, H, T, D)
        else:
            y = cache.attend(layer, q, k, v)                                                # (N, H, T, D)
        return self.c_proj(y.transpose(1, 2).reshape(N, T, C))                              # (N, T, C)


class MLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd)
        self.c_proj = nn.Linear(4 * config.n_embd, config.n_embd)

    def forward(self, x):
        return self.c_proj(F.gelu(self.c_fc(x), approximate="tanh"))                        # (N, T, C), 4C inside


class Block(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd)
        self.attn = Attention(config)
        self.ln_2 = nn.LayerNorm(config.n_embd)
        self.mlp = MLP(config)

    def forward(self, x, cache=None, layer=0):
        x = x + self.attn(self.ln_1(x), cache, layer)
        return x + self.mlp(self.ln_2(x))


class GPT(nn.Module):
    """GPT-2.  gpt(ids) -> logits; gpt.hidden(ids) -> the last layer's states, which every head here starts from."""

    def __init__(self, config):
        super().__init__()
        if config.n_embd % config.n_head:
            raise UserError(f"n_embd = {config.n_embd} is not a multiple of n_head = {config.n_head}")
        self.config = config
        self.bf16 = False                                            # matrix products in bfloat16: set by the caller, on CUDA
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        self.wpe = nn.Embedding(config.block_size, config.n_embd)
        self.h = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.ln_f = nn.LayerNorm(config.n_embd)
        for name, parameter in self.named_parameters():              # GPT-2's own initialisation
            if name.endswith("bias"):
                nn.init.zeros_(parameter)
            elif parameter.dim() == 2:
                residual = name.endswith("c_proj.weight")            # two residual additions a layer share the variance
                nn.init.normal_(parameter, std=0.02 / math.sqrt(2 * config.n_layer) if residual else 0.02)

    def hidden(self, ids, cache=None):
        """(N, T) ids -> (N, T, C).  With a cache, ids continue each of its rows at that row's own position."""
        start = 0 if cache is None else cache.length[:, None]                               # (N, 1)
        position = start + torch.arange(ids.shape[1], device=ids.device)                    # (T,) or (N, T)
        with self.precision():
            x = self.wte(ids) + self.wpe(position)                                          # (N, T, C)
            for layer, block in enumerate(self.h):                  # Run.policy may have compiled block(x), for whole rows
                x = block(x) if cache is None else block.forward(x, cache, layer)
            return self.ln_f(x)

    def head(self, hidden):
        """(..., C) -> (..., V) logits; the head is the token embedding.

        In float32 also under bf16: GPT-2's logits lie near -100, where bf16 knows steps of 0.5, and log-ratios would be noise.
        """
        with torch.autocast(self.wte.weight.device.type, enabled=False):
            return F.linear(hidden.float(), self.wte.weight)

    def forward(self, ids):
        return self.head(self.hidden(ids))                                                  # (N, T) -> (N, T, V)

    def precision(self):
        """One place decides the arithmetic of policy, reference and sampler alike."""
        return torch.autocast(self.wte.weight.device.type, torch.bfloat16) if self.bf16 else contextlib.nullcontext()

    @classmethod
    def from_pretrained(cls, source):
        """A released GPT-2 by name (downloaded once), or a Hugging Face folder.  UserError where that is not a GPT-2."""
        if str(source) in RELEASED:
            from data import cache_folder, fetch  # only a download needs data.py
            n_layer, n_head, n_embd, size, sha256 = RELEASED[str(source)]
            config = dict(n_layer=n_layer, n_head=n_head, n_embd=n_embd, vocab_size=50257, n_positions=1024)
            path = fetch(RELEASED_URL.format(name=source), cache_folder() / source / "pytorch_model.bin", size, sha256,
                         hint="name a folder that holds the weights by --init, or use --preset tiny or imdb-small")
        else:
            folder = Path(source)
            path = next((folder / f for f in ("model.safetensors", "pytorch_model.bin") if (folder / f).exists()), None)
            if path is None or not (folder / "config.json").exists():
                raise UserError(f"{source} is neither one of {', '.join(RELEASED)} nor a folder with config.json and "
                                "model.safetensors or pytorch_model.bin")
            config = read_json(folder / "config.json")
        gpt = cls(read_config(config, source))
        gpt.load_state_dict(read_weights(path, gpt.state_dict()))
        return gpt

    def save_pretrained(self, folder, eos_id=None):
        """Writes model.safetensors and config.json, which transformers opens as GPT2LMHeadModel; returns the file's sha256."""
        return write_model(folder, self, self.state_dict(), "GPT2LMHeadModel", eos_id)


class ScalarGPT(nn.Module):
    """GPT-2 with one number a position: the classifier's log-odds, the reward model's reward, the critic's value."""

    def __init__(self, gpt, eos_id):
        super().__init__()
        self.eos_id = eos_id
        self.transformer = GPT(gpt.config)
        self.transformer.bf16 = gpt.bf16
        self.transformer.load_state_dict(gpt.state_dict())
        self.score = nn.Linear(gpt.config.n_embd, 1, bias=False)     # official code: no bias
        nn.init.zeros_(self.score.weight)                            # ours: the first output is 0 everywhere

    def values(self, ids):
        """(N, T) ids -> (N, T) float32; column t has read ids[:, :t+1]."""
        return self.score(self.transformer.hidden(ids).float()).squeeze(-1)                 # (N, T, C) -> (N, T)

    def forward(self, ids, mask):
        """A reward function: (N, T) ids and response mask -> (N,), read at the last token that is not the end-of-text."""
        row = torch.arange(len(ids), device=ids.device)
        end = mask.shape[1] - 1 - mask.flip(1).int().argmax(1)                              # (N,) the response's last token
        end = end - (ids[row, end] == self.eos_id).long()            # official code: the last token of the text itself
        hidden = self.transformer.hidden(ids[:, :int(end.max()) + 1])
        return self.score(hidden[row, end].float()).squeeze(-1)                             # (N, T, C) -> (N, C) -> (N,)

    @classmethod
    def from_pretrained(cls, folder, eos_id):
        folder = Path(folder)
        config = read_config(read_json(folder / "config.json"), folder)
        model = cls(GPT(config), eos_id)
        model.load_state_dict(read_weights(folder / "model.safetensors", model.state_dict()))
        return model

    def save_pretrained(self, folder):
        """As GPT.save_pretrained; transformers opens it as GPT2ForSequenceClassification with one label."""
        return write_model(folder, self.transformer, self.state_dict(), "GPT2ForSequenceClassification", self.eos_id)


# ---- log-probs -------------------------------------------------------------------------------------------------------------

def rows_at_once(model):
    """How many rows' logits, V each, are alive at once."""
    return max(1, (CUDA_CHUNK if model.wte.weight.is_cuda else CHUNK) // model.config.vocab_size)


def token_logprob(model, ids, mask, temperature=1.0):
    """log pi(ids[:, t] | ids[:, :t]) on the mask, 0 off it, under softmax(logits / temperature).  (N, T), (N, T) -> (N, T)

    The head sees response tokens only, a chunk of rows at a time: (N, T, V) logits never exist at once.
    """
    if mask.dtype != torch.bool:
        raise ValueError(f"mask must be boolean, True on response tokens, got {mask.dtype}")
    if mask[:, 0].any():
        raise ValueError("mask[:, 0] must be False: nothing comes before the first token, so it has no log-prob")
    hidden = model.hidden(ids[:, :-1])[mask[:, 1:]]                                         # (N, T-1, C) -> (M, C)
    logp = HeadLogprob.apply(hidden.float() / temperature, model.wte.weight, ids[mask], rows_at_once(model))    # (M,)
    return torch.zeros(mask.shape, device=ids.device).masked_scatter(mask, logp)            # (M,) -> (N, T)


class HeadLogprob(torch.autograd.Function):
    """log softmax(h W^T)[y] of M rows, `rows` of them at a time, in float32.  h (M, C), W (V, C), target y (M,) -> (M,)

    Backward makes a chunk's logits again; with the log-sum-exp that forward kept they give the probabilities p, and then

        d/dh = W_y - p W,        d/dW = (onehot(y) - p)^T h,        times each row's incoming gradient g.

    Written out because autograd's way (torch.utils.checkpoint) takes 2 to 3 times the memory of a step on a CPU at V = 50257: a
    (V, C) gradient for every chunk.
    """

    @staticmethod
    def forward(ctx, hidden, weight, target, rows):
        buffer, found = hidden.new_empty(min(rows, len(hidden)), len(weight)), []   # one for all chunks
        for h, y in zip(hidden.split(rows), target.split(rows)):
            logits = torch.mm(h, weight.T, out=buffer[:len(h)])                             # (m, V)
            logit, top = logits.gather(1, y[:, None]), logits.amax(1, keepdim=True)         # (m, 1), (m, 1)
            found.append(torch.cat([logit, top + logits.sub_(top).exp_().sum(1, keepdim=True).log()], dim=1))     # (m, 2)
        logit, log_z = torch.cat(found).unbind(1)                                           # (M,), (M,)
        ctx.save_for_backward(hidden, weight, target, log_z)
        ctx.rows = rows
        return logit - log_z

    @staticmethod
    def backward(ctx, grad):
        hidden, weight, target, log_z = ctx.saved_tensors
        buffer = hidden.new_empty(min(ctx.rows, len(hidden)), len(weight))
        grad_hidden, grad_weight = [], torch.zeros_like(weight)
        for h, y, z, g in zip(*(x.split(ctx.rows) for x in (hidden, target, log_z[:, None], grad[:, None]))):
            p = torch.mm(h, weight.T, out=buffer[:len(h)]).sub_(z).exp_()                   # (m, V)
            grad_hidden.append(g * (weight[y] - p @ weight))                                # (m, C)
            grad_weight.addmm_(p.T, g * h, alpha=-1).index_add_(0, y, g * h)                # (V, C)
        return torch.cat(grad_hidden), grad_weight, None, None


def sequence_logprob(model, ids, mask, temperature=1.0):
    """log pi(y|x) in nats, the sum over the response's tokens, its end-of-text included.  (N, T), (N, T) -> (N,)"""
    return token_logprob(model, ids, mask, temperature).sum(1)


def trim(ids, mask):
    """Cuts the padding that no row of a batch needs.  (N, T), (N, T) -> (N, t), (N, t)"""
    longest = int(mask.any(0).nonzero().max()) + 1
    return ids[:, :longest], mask[:, :longest]


# ---- sampling --------------------------------------------------------------------------------------------------------------

class Cache:
    """Keys and values of N rows, each with its own length: row n's next token is written at position length[n]."""

    def __init__(self, config, N, T, device, dtype):
        self.length = torch.zeros(N, dtype=torch.long, device=device)
        shape = (2, N, config.n_head, T, config.n_embd // config.n_head)
        self.kv = [torch.zeros(shape, device=device, dtype=dtype) for _ in range(config.n_layer)]    # L x (2, N, H, T, D)
        self.longest, self.ragged = 0, False                         # on the host: no question to the device in a step

    def attend(self, layer, q, k, v):
        """Stores k, v (N, H, T, D) and lets q attend to what its row holds so far.  -> (N, H, T, D)"""
        kv, T = self.kv[layer], k.shape[2]
        if self.longest == 0:                                        # the prompts: ordinary causal attention
            kv[0, :, :, :T], kv[1, :, :, :T] = k, v
            return F.scaled_dot_product_attention(q, k, v, is_causal=True)
        seen, mask = self.longest + 1, None
        if self.ragged:
            row = torch.arange(len(k), device=k.device)
            kv[0, row, :, self.length], kv[1, row, :, self.length] = k[:, :, 0], v[:, :, 0]
            mask = (torch.arange(seen, device=k.device) <= self.length[:, None])[:, None, None]  # (N, 1, 1, seen)
        else:
            kv[0, :, :, seen - 1], kv[1, :, :, seen - 1] = k[:, :, 0], v[:, :, 0]
        return F.scaled_dot_product_attention(q, kv[0, :, :, :seen], kv[1, :, :, :seen], attn_mask=mask)

    def advance(self, length):
        """length: (N,) tokens that each row holds now, or None for one more."""
        if length is None:
            self.length = self.length + 1
            self.longest += 1
        else:
            self.length, self.longest = length, int(length.max())
            self.ragged = bool((length != self.longest).any())

    def keep(self, rows):
        self.length = self.length[rows]
        self.kv = [kv[:, rows] for kv in self.kv]                                           # (2, N, H, T, D) -> (2, n, H, T, D)


@torch.no_grad()
def generate(model, prompt_ids, max_new_tokens, temperature=1.0, eos_id=None, generator=None, uniform=None):
    """Samples a response to each prompt from softmax(logits / temperature).  -> ids (N, T) int64, mask (N, T) bool

    prompt_ids: (N, T0) tensor, or a list of N id lists of any lengths.  A response starts right after its own prompt and ends
    with eos_id, which its mask includes, or at max_new_tokens.  Rows are trimmed to the longest, padded with eos_id (0 if None).
    One uniform number decides a token, uniform (N, max_new_tokens), drawn here on the CPU unless given: whatever else happens in
    the batch, dropping finished rows say, changes no sample.
    """
    device, prompts = model.wte.weight.device, [torch.as_tensor(p, dtype=torch.long) for p in prompt_ids]
    start = torch.tensor([len(p) for p in prompts], device=device)                          # (N,)
    if not prompts or not temperature > 0:
        raise ValueError(f"generate needs at least one prompt and a temperature above 0, got {len(prompts)} and {temperature}")
    N, T0, shortest = len(prompts), max(map(len, prompts)), min(map(len, prompts))
    if shortest < 1 or T0 + max_new_tokens > model.config.block_size:
        raise ValueError(f"prompts of {shortest} to {T0} tokens and {max_new_tokens} new ones do not fit: a prompt has at "
                         f"least one token, and both together have at most block_size = {model.config.block_size}")
    ids = torch.full((N, T0 + max_new_tokens), 0 if eos_id is None else eos_id, device=device)
    ids[:, :T0] = nn.utils.rnn.pad_sequence(prompts, batch_first=True, padding_value=int(ids[0, 0])).to(device)
    uniform = (torch.rand(N, max_new_tokens, generator=generator) if uniform is None else uniform).to(device)       # (N, new)
    chunk = rows_at_once(model)
    row = torch.arange(N, device=device)                             # the rows still going
    ended = torch.zeros(N, dtype=torch.bool, device=device)          # of those, the ones that have ended meanwhile
    with model.precision():                                          # one autocast around all: weights are cast once
        cache = Cache(model.config, N, T0 + max_new_tokens, device, torch.bfloat16 if model.bf16 else torch.float32)
        hidden = model.hidden(ids[:, :T0], cache)[row, start - 1]                           # (N, T0, C) -> (N, C)
        cache.advance(start)
        for t in range(max_new_tokens):
            token = torch.cat([sample(model.head(h) / temperature, u)                       # (n, C), (n,) -> (n,)
                               for h, u in zip(hidden.split(chunk), uniform[row, t].split(chunk))])
            ids[row, start[row] + t] = token
            ended |= token == (-1 if eos_id is None else eos_id)
            if t % 8 == 7 and eos_id is not None:                    # now and then: asking the device costs a wait
                if ended.all():
                    break
                if 4 * int(ended.sum()) >= len(row):
                    cache.keep(~ended)
                    row, token, ended = row[~ended], token[~ended], ended[~ended]
            if t + 1 < max_new_tokens:
                hidden = model.hidden(token[:, None], cache)[:, 0]                          # (n, 1, C) -> (n, C)
                cache.advance(None)
    if not hidden.isfinite().all():
        raise UserError("the policy's states are not finite while it samples: its training has blown up, lower the learning rate")
    column = torch.arange(ids.shape[1], device=device) - start[:, None]                     # (N, T) 0 at the response's start
    mask = (column >= 0) & (column < max_new_tokens)
    if eos_id is not None:
        stop = mask & (ids == eos_id)
        mask &= stop.cumsum(1) - stop.long() == 0                    # up to and including the first end-of-text
        ids = ids.where(mask | (column < 0), eos_id)
    longest = int(mask.any(0).nonzero().max()) + 1 if max_new_tokens else T0
    return ids[:, :longest], mask[:, :longest]


@torch.no_grad()
def respond(policy, prompts, max_new_tokens, temperature, eos_id, generator, rows, columns, T=None):
    """Samples a response to each prompt, `rows` of them at a time, and what else is told of it; each process does its share.

    prompts: (N, T0) ids, or N id lists; columns: (ids, mask) of n rows -> {name: (n,) or (n, t)}.
    -> {ids, mask: (N, T), name: (N,) or (N, T)} on the CPU, in the prompts' order; T: the longest row that there could be.
    """
    T, parts = T or max(map(len, prompts)) + max_new_tokens, []
    for chunk in (prompts[i:i + rows] for i in range(0, len(prompts), rows)):
        uniform = torch.rand(len(chunk), max_new_tokens, generator=generator)               # the same in every process
        split = len(chunk) >= world()                                                       # else each process does all of it
        own = share(range(len(chunk))) if split else range(len(chunk))
        ids, mask = generate(policy, [chunk[i] for i in own], max_new_tokens, temperature, eos_id, uniform=uniform[own])
        part, pad = {"ids": ids, "mask": mask} | columns(ids, mask), (0, T - ids.shape[1])
        part = {k: (F.pad(v, pad, value=(eos_id or 0) * (k == "ids")) if v.dim() == 2 else v).cpu() for k, v in part.items()}
        parts.append(gather(part) if split else part)
    return {k: torch.cat([part[k] for part in parts]) for k in parts[0]}


def sample(logits, uniform):
    """One draw a row by the inverse of the distribution function.  (N, V) float32, (N,) in [0, 1) -> (N,) int64"""
    cdf = (logits - logits.amax(-1, keepdim=True)).exp().cumsum(-1)                         # (N, V), not normalised
    total = cdf[:, -1:]
    point = torch.minimum(uniform[:, None] * total, total.nextafter(torch.zeros_like(total)))   # rounding stays below
    token = torch.searchsorted(cdf, point, right=True).squeeze(1)    # the first with cdf > point: its weight is not zero
    return token.clamp(max=logits.shape[1] - 1)                      # only nan logits reach V: `generate` refuses them


# ---- weights in Hugging Face's layout --------------------------------------------------------------------------------------

def read_config(config, source):
    """config.json -> GPTConfig; refuses what would make it another model than the one in this file."""
    config = config if isinstance(config, dict) else {}
    expected = {"activation_function": "gelu_new", "layer_norm_epsilon": 1e-5, "n_inner": None, "tie_word_embeddings": True,
                "scale_attn_weights": True, "scale_attn_by_inverse_layer_idx": False, "add_cross_attention": False}
    other = [f"{k} = {config[k]}" for k, v in expected.items() if config.get(k, v) not in (v, 4 * (config.get("n_embd") or 0))]
    missing = [k for k in ("n_layer", "n_head", "n_embd", "vocab_size", "n_positions")
               if not (isinstance(config.get(k), int) and config[k] > 0)]
    if missing or other:
        raise UserError(f"{source}: config.json is not that of a GPT-2 ({', '.join(other) or 'without ' + ', '.join(missing)})")
    return GPTConfig(config["n_layer"], config["n_head"], config["n_embd"], config["vocab_size"], config["n_positions"])


def read_weights(path, expected):
    """Tensors of model.safetensors or pytorch_model.bin by our names; refuses missing, unknown and misshapen ones."""
    if path.suffix == ".safetensors":
        loaded = read_tensors(path)[0]
    else:
        try:
            loaded = torch.load(path, map_location="cpu", weights_only=True)     # weights_only: no pickle gets to run code
        except Exception as error:
            reason = (str(error) or type(error).__name__).splitlines()[0][:100]  # an empty file: an EOFError without a word
            raise UserError(f"{path} is corrupt, or holds more than tensors ({reason})") from error
        if not isinstance(loaded, dict) or not all(isinstance(k, str) and torch.is_tensor(v) for k, v in loaded.items()):
            raise UserError(f"{path} holds something else than tensors by name")
    prefix = "" if any(k.startswith("transformer.") for k in expected) else "transformer."
    loaded = {k.removeprefix(prefix): v for k, v in loaded.items()}
    head = loaded.pop("lm_head.weight", None)
    if head is not None and "wte.weight" in loaded and not torch.equal(head, loaded["wte.weight"]):
        raise UserError(f"{path}: its head is not its token embedding, and model.py ties the two")
    loaded = {k: v for k, v in loaded.items() if not k.endswith((".attn.bias", ".attn.masked_bias"))}      # masks of old files
    loaded = {k: v.T if k.endswith(TRANSPOSED) else v for k, v in loaded.items()}
    wrong = [k for k in sorted({*loaded, *expected})
             if k not in loaded or k not in expected or loaded[k].shape != expected[k].shape]
    if wrong:
        raise UserError(f"{path} does not fit its config.json at {', '.join(wrong[:3])}{' and others' * (len(wrong) > 3)}")
    return {k: v.float() for k, v in loaded.items()}


def write_model(folder, gpt, state, architecture, eos_id):
    """Writes `state` and a config.json for transformers' class `architecture`; returns the weights' sha256."""
    config = asdict(gpt.config)
    config["n_positions"] = config.pop("block_size")
    config |= {"architectures": [architecture], "model_type": "gpt2", "activation_function": "gelu_new", "dtype": "float32",
               "attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0, "tie_word_embeddings": True,
               "bos_token_id": eos_id, "eos_token_id": eos_id, "pad_token_id": eos_id}
    if architecture.endswith("Classification"):
        config["num_labels"] = 1
    sha256 = write_tensors(Path(folder) / "model.safetensors",
                           {k: v.T if k.endswith(TRANSPOSED) else v for k, v in state.items()})
    write_json(Path(folder) / "config.json", config)
    return sha256
