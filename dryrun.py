"""What a run takes, before it is run:  python train.py --preset imdb --dry-run

Steps, tokens, operations and memory of each stage, from the settings alone: nothing is downloaded or trained.
Every row is counted as full, prompt_tokens + new_tokens: an upper bound.  GB = 1e9 bytes.
"""
import os
from dataclasses import dataclass, replace

import torch

import data
import xpo
from compute import UserError
from model import CHUNK, CUDA_CHUNK, GPTConfig, config_of

ROOM = 0.9                                                # of the memory: the rest is PyTorch's own, and gaps


@dataclass
class Stage:
    """Steps of `batch` rows; rows sampled in all; models that an optimizer holds, and models beside them."""
    name: str
    steps: int = 0
    batch: int = 0
    sampled: int = 0
    trained: int = 0
    fixed: int = 0


def stages(cfg, plan):
    """The stages of a run with these alignments, (method, feedback, K, rounds) each."""
    evaluated = cfg.eval_prompts * cfg.eval_samples
    yield Stage("sft", cfg.sft_steps, cfg.sft_batch, trained=1)
    from_rewards = any(feedback == "reward" for _, feedback, _, _ in plan)
    if not cfg.own:
        yield Stage("oracle", cfg.oracle_steps, cfg.oracle_batch, trained=1)
        yield Stage("responses", sampled=cfg.prompts * (cfg.responses if from_rewards else 2), fixed=2)
    if cfg.own or (from_rewards and cfg.reward == "model"):
        yield Stage("reward_model", cfg.rm_steps, cfg.rm_responses * cfg.rm_batch, trained=1)
    for method, feedback, K, rounds in plan:
        name = f"{method}-{feedback}" + (f"-k{K}" if K else "") + (f"-rounds{rounds}" if rounds > 1 else "")
        one = Stage(name, cfg.align_steps, (K or 2) * cfg.align_batch, trained=1, fixed=2)
        if method == "ppo":                               # updates of policy and critic
            steps = cfg.ppo_steps * cfg.ppo_epochs * cfg.ppo_minibatches
            one = Stage(name, steps, cfg.ppo_batch // cfg.ppo_minibatches, trained=2, fixed=3)
            one.sampled = cfg.ppo_steps * cfg.ppo_batch
        elif method == "xpo":
            one.steps = len(xpo.schedule(cfg.xpo_rounds, cfg.xpo_prompts, cfg.xpo_epochs, cfg.align_batch))
            one.sampled = cfg.xpo_rounds * cfg.xpo_prompts
        elif rounds > 1:
            one.sampled = (cfg.align_prompts or cfg.prompts) * K
            one.fixed = 3
        one.sampled += cfg.checkpoints * evaluated
        yield one
    yield Stage("limit", sampled=cfg.limit_prompts * cfg.limit_responses + evaluated, fixed=2)


def shape(cfg):
    """-> GPTConfig of the run's model, without reading its weights"""
    V = (cfg.vocab_size or 50256) + 1 if cfg.tokenizer == "gpt2" else data.tiny_encoding().n_vocab
    if cfg.init:
        return config_of(cfg.init)
    return GPTConfig(cfg.n_layer, cfg.n_head, cfg.n_embd, V, cfg.prompt_tokens + cfg.new_tokens)


def parameters(config):
    C = config.n_embd
    return config.n_layer * (12 * C + 13) * C + (config.vocab_size + config.block_size + 2) * C


def operations(config, stage, T):
    """Of all its steps: 2 a multiply-add, attention causal, backward twice forward and the logits again."""
    body = T * config.n_layer * (24 * config.n_embd ** 2 + 2 * T * config.n_embd)
    head = T * 2 * config.n_embd * config.vocab_size * (stage.name not in ("oracle", "reward_model"))
    trained = stage.steps * stage.batch * (3 * body * stage.trained + 4 * head)
    return trained + stage.sampled * (4 * body + 3 * head)               # drawn, then read by three models


def rest(cfg, plan):
    """The operations of all that follows SFT, over those of SFT."""
    T = cfg.prompt_tokens + cfg.new_tokens
    config = shape(cfg)
    first, *others = [operations(config, stage, T) for stage in stages(cfg, plan)]
    return sum(others) / first


def memory(cfg, config, stage, cuda):
    """-> GB of weights, optimizer, activations, logits, cache; the most of training, the most of sampling

    Backward needs 16 C numbers of a token and layer: 2 residuals, 2 norms, q, k, v, attention, and 4 C before
    and after the GELU; in bfloat16 all but the residuals take half.  Without it one layer's are enough.
    """
    T, C, V = cfg.prompt_tokens + cfg.new_tokens, config.n_embd, config.vocab_size
    n = parameters(config)
    chunk = CUDA_CHUNK if cuda else CHUNK
    weights = 4 * n * (stage.trained + stage.fixed) + 2 * n * cuda       # one's also cast to bfloat16
    optimizer = 12 * n * stage.trained                                   # gradients, Adam's two moments
    rows = min(stage.batch, max(cfg.micro_batch_size or stage.batch, *cfg.num_candidates, 2))
    activations = rows * T * C * (config.n_layer * (36 if cuda else 64) + 64)    # 64: a layer's gradients
    logits = 4 * min(chunk, rows * T * V) + 4 * V * C                    # and the head's gradient
    rows = min(cfg.sample_batch, stage.sampled)
    cache = rows * T * C * config.n_layer * (4 if cuda else 8)
    drawn = 3 * 4 * min(chunk, rows * V)                                 # logits and what is made of them
    read = rows * T * C * (30 if cuda else 44)                           # then the cache is gone
    measured = 4 * 4 * min(chunk, rows * T * V)
    in_training = weights + optimizer + activations + logits
    in_sampling = weights + optimizer + max(cache + drawn, read + measured)
    parts = (weights, optimizer, max(activations, read), max(logits, drawn, measured), cache)
    return [size / 1e9 for size in (*parts, in_training, in_sampling)]


def fitting(cfg, config, planned, cuda, room):
    """In words: the flags, halved as often as needed, with which all stages fit into `room` GB."""
    first = replace(cfg, micro_batch_size=cfg.micro_batch_size or max(stage.batch for stage in planned))
    cfg = first
    for name, peak in (("micro_batch_size", -2), ("sample_batch", -1)):
        while max(memory(cfg, config, stage, cuda)[peak] for stage in planned) > room:
            if getattr(cfg, name) == 1:
                return "too little, whatever the flags"
            cfg = replace(cfg, **{name: getattr(cfg, name) // 2})
    flags = f"--micro-batch-size {cfg.micro_batch_size} --sample-batch {cfg.sample_batch}"
    return "enough" if cfg == first else f"enough with {flags}"


def report(cfg, plan):
    """Prints it for the device in use, and the flags that fit this machine and usual GPUs."""
    if cfg.own:
        raise UserError("--dry-run reads no file: leave out --data, give --prompt-tokens and --new-tokens")
    cuda = torch.cuda.is_available() if cfg.device == "auto" else cfg.device == "cuda"
    config = shape(cfg)
    planned = list(stages(cfg, plan))
    T = cfg.prompt_tokens + cfg.new_tokens
    print(f"preset {cfg.preset}, {'bfloat16 on CUDA' if cuda else 'float32 on the CPU'}, rows of {T} tokens, "
          f"{config}\n{'':31}{'million tokens':^16}{'':8}{'GB, and the most of them at once':^48}\n"
          f"{'stage':24}  steps trained sampled   PFLOP weights  optim.  activ.  logits   cache    most")
    for stage in planned:
        *parts, most, most_sampling = memory(cfg, config, stage, cuda)
        tokens = [stage.steps * stage.batch * T / 1e6, stage.sampled * T / 1e6]
        numbers = [*tokens, operations(config, stage, T) / 1e15, *parts, max(most, most_sampling)]
        print(f"{stage.name:24}{stage.steps:7,}" + "".join(f"{number:8.2f}" for number in numbers))
    here = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9
    if cuda and torch.cuda.is_available():
        here = torch.cuda.get_device_properties(0).total_memory / 1e9
    print(f"this machine, {here:.0f} GB: {fitting(cfg, config, planned, cuda, ROOM * here)}")
    for size in (24, 48, 80):
        print(f"a GPU of {size} GB: {fitting(cfg, config, planned, True, ROOM * size)}")
