"""From reviews to aligned policies, by one command:  python train.py --method exo

Stages (stages.py): pi_sft, oracle, responses, reward model.  Then, here: alignment by a method, from the pairs or from the
reward model's scores, with a row of checkpoints evaluated on the way; at the end the table, samples.md and the frontier.
The same command again goes on where it stopped; another method starts at its alignment.
"""
import argparse
import math
import shlex
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch

import data
import figures
import parallel
import ppo
import preferences
import stages
import xpo
from checkpoint import Log, Stopped, begin, catch_signals, finish, lock, resumable, rng
from dpo import dpo_loss, dpo_reward_loss
from evaluate import measure, read_csv, summary
from exo import exo_loss, exo_pref_loss
from files import UserError, read_json, read_tensors, write_json, write_tensors
from model import sequence_logprob, trim
from optim import adamw, batch_at, cosine, descend, out_of_memory, stuck
from stages import Run


def opt(default, help, stages="", choices=None):
    """A setting: its default (the tiny preset's), its help with that one's origin, the stages whose artifact depends on it."""
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata=dict(help=help, stages=stages, choices=choices))
    return field(default=default, metadata=dict(help=help, stages=stages, choices=choices))


SAMPLED = "responses limit reference align"                          # the stages that sample and score at the temperature


@dataclass
class Config:
    # run
    method: str = opt("exo", "alignment method; all: every method in turn", choices=["exo", "dpo", "ppo", "xpo", "all"])
    feedback: str = opt("preferences", "learn from pairs, or from a reward model's scores", "", ["preferences", "reward"])
    num_candidates: list[int] = opt([4], "K, responses a prompt that a loss with --feedback reward compares [paper: up to 8]")
    seeds: list[int] = opt([0], "alignment and evaluation are repeated for each")
    preset: str = opt("auto", "the experiment; auto: imdb with CUDA, else tiny", "",
                      ["auto", "tiny", "imdb-small", "imdb", "imdb-large"])
    run: str = opt("", "the folder of this run's artifacts")
    smoke: bool = opt(False, "all stages at a toy size, in seconds: does it run from end to end?")
    device: str = opt("auto", "where to compute", "", ["auto", "cpu", "cuda", "mps"])
    matmul: str = opt("highest", "PyTorch's float32 matmul precision: medium is up to 1.7 times as fast on some CPUs [ours]", "",
                      ["highest", "high", "medium"])
    compile: bool = opt(False, "torch.compile the policy's blocks [ours]")
    micro_batch_size: int = opt(0, "rows at once in training, 0 for whole batches: memory, not results [ours]")
    sample_batch: int = opt(1024, "rows sampled at once [ours]", "responses limit")
    save_every: int = opt(100, "most steps between the saves that an interrupted stage goes on from [ours]")
    # reviews
    data: str = opt("tiny", "tiny: reviews of a built-in grammar; imdb: real ones; or your own preferences, a .jsonl file", "sft")
    eval_data: str = opt("", "your held-out preferences; default: a share of --data", "sft")
    held_out: float = opt(0.1, "that share, whole prompts [ours]", "sft")
    tokenizer: str = opt("tiny", "tiny: the grammar's words, and bytes; gpt2: GPT-2's, the default for your own data", "sft",
                         ["tiny", "gpt2"])
    imdb: list[str] = opt([], "IMDB archives or extracted folders; default: download once")
    sft_reviews: int = opt(60_000, "training reviews [official code: 25,000]", "sft")
    test_reviews: int = opt(4_000, "held-out reviews of the grammar [ours]", "sft")
    prompt_tokens: int = opt(6, "first tokens of a review that make a prompt [official code: 10]", "sft")
    new_tokens: int = opt(66, "longest response, in tokens [official code: 500]", "sft")
    # model
    init: str = opt("", "start from gpt2, gpt2-medium, gpt2-large, gpt2-xl or a folder; default: from scratch", "sft")
    n_layer: int = opt(2, "layers, from scratch [ours]", "sft")
    n_head: int = opt(4, "attention heads, from scratch [ours]", "sft")
    n_embd: int = opt(64, "channels, from scratch [ours]", "sft")
    temperature: float = opt(1.0, "divides all logits, in sampling, log-probs and KL [paper: 0.8]", SAMPLED)
    # sft
    sft_steps: int = opt(1200, "steps [paper: 5 epochs; ours from scratch]", "sft")
    sft_batch: int = opt(64, "reviews a step [official code: 128]", "sft")
    sft_lr: float = opt(2e-3, "peak learning rate [official code: 1e-5; ours from scratch]", "sft")
    # oracle
    oracle_steps: int = opt(1200, "steps [official code: 5 epochs]", "oracle")
    oracle_batch: int = opt(64, "reviews a step [official code: 256]", "oracle")
    oracle_lr: float = opt(1e-3, "peak learning rate [official code: 1e-5]", "oracle")
    # responses
    prompts: int = opt(4096, "training prompts [official code: 25,000]", "responses")
    responses: int = opt(8, "responses of pi_sft a prompt [paper: K up to 8]", "responses")
    labels: str = opt("bt", "who wins a pair: the higher reward [official code], or a Bradley-Terry draw [ours]",
                      "reward_model offline xpo", ["argmax", "bt"])
    # reward model
    rm_steps: int = opt(800, "steps [official code: 3 epochs]", "reward_model")
    rm_batch: int = opt(32, "pairs a step [official code: 128]", "reward_model")
    rm_lr: float = opt(1e-3, "peak learning rate [official code: 1e-5]", "reward_model")
    # alignment
    align_steps: int = opt(400, "steps of EXO and DPO [paper: one epoch]", "offline")
    align_batch: int = opt(32, "prompts a step of EXO, DPO and XPO [paper: 64]", "offline xpo")
    align_lr: float = opt(1e-4, "peak learning rate of EXO, DPO and XPO [paper: 1e-6]", "offline xpo")
    beta_pi: float = opt(0.5, "scales the policy's log-ratio; DPO's beta on pairs [official code: 0.1 on IMDB]", "align")
    beta_r: float = opt(1.0, "divides the reward; beta = beta_pi * beta_r [official code: 0.1 on IMDB]", "align")
    eps: float = opt(1e-3, "label smoothing of EXO's pairs [paper]", "offline")
    ppo_steps: int = opt(80, "PPO's iterations [ours]", "ppo")
    ppo_batch: int = opt(64, "prompts an iteration, a fresh response each [paper: tuned, not given]", "ppo")
    ppo_lr: float = opt(2e-4, "PPO's peak learning rate [paper: tuned, not given]", "ppo")
    ppo_critic_lr: float = opt(1e-3, "the critic's [paper: tuned, not given]", "ppo")
    ppo_epochs: int = opt(4, "passes over an iteration's responses [N-details]", "ppo")
    ppo_minibatches: int = opt(2, "updates a pass [N-details: 1 to 8]", "ppo")
    ppo_warmup: int = opt(10, "first iterations, which train the critic alone [paper does so, length not given]", "ppo")
    xpo_rounds: int = opt(4, "rounds of XPO [XPO's experiment: 3]", "xpo")
    xpo_prompts: int = opt(768, "prompts a round, a pair each [ours]", "xpo")
    xpo_epochs: int = opt(2, "passes a round over all pairs so far [ours]", "xpo")
    alpha: float = opt(0.0015, "XPO's bonus, 0.003 times the preset's beta_pi [ours]; 0 is online DPO", "xpo")
    # evaluation
    eval_split: str = opt("test", "evaluate on test prompts; or, to choose settings, on training prompts that no method aligns on",
                          "limit reference align", ["test", "train"])
    checkpoints: int = opt(6, "checkpoints evaluated, evenly spaced [official code: 10]", "align")
    eval_prompts: int = opt(256, "prompts of evaluation [paper: 512]", "reference align")
    eval_samples: int = opt(4, "responses to each [paper]", "reference align")
    limit_prompts: int = opt(32, "of these, those that the limit is drawn on; 64 with --method all [ours]", "limit")
    limit_responses: int = opt(1024, "responses of pi_sft each; 4,096 with --method all [ours]", "limit")


GROUPS = ["run", "reviews", "model", "sft", "oracle", "responses", "reward model", "alignment", "evaluation"]
FIRST = ["method", "data", "init", "sft_steps", "oracle_steps", "prompts", "rm_steps", "align_steps", "eval_split"]

IMDB = dict(data="imdb", tokenizer="gpt2", prompt_tokens=10, new_tokens=502, temperature=0.8, labels="argmax", init="gpt2",
            sft_reviews=25_000, sft_steps=977, sft_batch=128, sft_lr=1e-5,                                   # 5 epochs
            oracle_steps=488, oracle_batch=256, oracle_lr=1e-5,                                              # 5 epochs
            prompts=25_000, rm_steps=586, rm_batch=128, rm_lr=1e-5,                                          # 3 epochs
            align_steps=391, align_batch=64, align_lr=1e-6, beta_pi=0.1, beta_r=0.1, alpha=3e-4,              # one epoch
            ppo_steps=400, ppo_batch=128, ppo_lr=2e-6, ppo_critic_lr=1e-5, xpo_rounds=3, xpo_prompts=2048,
            checkpoints=10, eval_prompts=512, limit_prompts=64, sample_batch=512, micro_batch_size=64)
PRESETS = {
    "tiny": {},
    "imdb-small": IMDB | dict(new_tokens=118, init="", n_layer=6, n_head=8, n_embd=512,                       # ours
                              sft_reviews=75_000, sft_steps=4688, sft_batch=64, sft_lr=6e-4,                  # 4 epochs
                              oracle_steps=1172, oracle_batch=64, oracle_lr=1e-4,                             # 3 epochs
                              prompts=12_800, rm_steps=400, rm_batch=64, rm_lr=1e-4,                          # 2 epochs
                                              align_steps=200, align_lr=3e-5, ppo_lr=3e-5, ppo_critic_lr=1e-4,
                              limit_responses=4096, sample_batch=1024, micro_batch_size=256),
    "imdb": IMDB,
    "imdb-large": IMDB | dict(init="gpt2-large", sample_batch=128, micro_batch_size=16),
}
SMOKE = dict(init="", n_layer=2, n_head=2, n_embd=32, sft_reviews=2_000, test_reviews=500, sft_steps=30, sft_batch=16,
             oracle_steps=30, oracle_batch=16, prompts=64, rm_steps=10, rm_batch=16, align_steps=10, align_batch=8, checkpoints=2,
             ppo_steps=4, ppo_batch=8, ppo_warmup=1, xpo_rounds=2, xpo_prompts=16,
             eval_prompts=16, limit_prompts=8, limit_responses=128, sample_batch=256, save_every=5)


def parse(argv=None):
    """Command line -> Config: the preset's settings, then --smoke's, then the flags.  Usage errors are one sentence, status 2."""
    class Parser(argparse.ArgumentParser):
        def error(self, message):
            self.exit(2, f"train.py: {message}: see python train.py --help\n")

    def build(defaults):
        parser = Parser(description=__doc__.split("\n")[0], allow_abbrev=False,
                        formatter_class=argparse.ArgumentDefaultsHelpFormatter)
        group = None
        for name, f in Config.__dataclass_fields__.items():
            if name in FIRST:
                group = parser.add_argument_group(GROUPS[FIRST.index(name)])
            kind = {"action": argparse.BooleanOptionalAction} if f.type is bool else {"type": f.type, "metavar": "X"}
            if f.metadata["choices"]:
                kind = {"choices": f.metadata["choices"]}
            elif f.type in (list[int], list[str]):
                kind = {"type": f.type.__args__[0], "nargs": "+", "metavar": "X"}
            group.add_argument("--" + name.replace("_", "-"), help=f.metadata["help"], default=defaults[name], **kind)
        return parser

    plain = vars(Config())
    first = build(plain).parse_args([a for a in (sys.argv[1:] if argv is None else argv) if a not in ("-h", "--help")])
    cuda = torch.cuda.is_available() and first.device in ("auto", "cuda")
    preset = first.preset if first.preset != "auto" else "imdb" if (cuda or first.init) and not first.smoke else "tiny"
    limit = dict(limit_prompts=64, limit_responses=4096) if first.method == "all" and preset == "tiny" else {}
    smoke = SMOKE if first.smoke else {}
    own = dict(prompt_tokens=0, new_tokens=0, sft_steps=0, rm_steps=0, align_steps=0, tokenizer="gpt2", labels="argmax") \
        if first.data not in data.BUILT_IN else {}                   # 0: as the file needs, `preferences.settle`
    real = dict(tokenizer="gpt2") if first.data == "imdb" else {}
    name = preset + (f"-{Path(first.data).stem}" if own else "") + "-smoke" * first.smoke
    name += "-trials" * (first.eval_split == "train")
    parser = build(plain | PRESETS[preset] | limit | real | own | smoke | {"run": f"runs/{name}"})
    cfg = Config(**vars(parser.parse_args(argv)))
    cfg.preset = preset
    if problem := impossible(cfg):
        parser.error(problem)
    why = "--smoke" if first.smoke else "no CUDA in use" if preset == "tiny" else "CUDA is there" if cuda else "for --init"
    return cfg, "as asked" if first.preset != "auto" else why


def impossible(cfg):
    """What is wrong with these values, or None."""
    own = cfg.data not in data.BUILT_IN
    if own and not cfg.data.endswith((".jsonl", ".json")):
        return f"--data {cfg.data} is neither tiny, nor imdb, nor a .jsonl file"
    if own and cfg.eval_split == "train":
        return "--eval-split train has no prompts left in --data: name a file of others by --eval-data instead"
    if not 0 < cfg.held_out < 1:
        return f"--held-out must lie in (0, 1), got {cfg.held_out}"
    for name in Config.__dataclass_fields__:
        value = getattr(cfg, name)
        if isinstance(value, int | float) and not isinstance(value, bool):
            zero = ["micro_batch_size", "alpha", "ppo_warmup"]
            zero += ["prompt_tokens", "new_tokens", "sft_steps", "rm_steps", "align_steps"] * own
            if not (0 <= value < math.inf and (value > 0 or name in zero)):
                return f"--{name.replace('_', '-')} must be positive and finite, got {value}"
    if not 0 < cfg.eps < 0.5:
        return f"--eps must lie in (0, 0.5), got {cfg.eps}"
    if not all(2 <= k <= cfg.responses or own for k in cfg.num_candidates):
        return f"--num-candidates must lie between 2 and --responses {cfg.responses}, got {cfg.num_candidates}"
    if cfg.responses < 4:
        return f"--responses must be at least 4 (two pairs: to train on, and to check the reward model), got {cfg.responses}"
    if cfg.init == "" and cfg.n_embd % cfg.n_head:
        return f"--n-embd {cfg.n_embd} must be a multiple of --n-head {cfg.n_head}"
    if len(set(cfg.seeds)) < len(cfg.seeds):
        return f"--seeds must be different, got {cfg.seeds}"
    at_most = {"every": [("limit_prompts", "eval_prompts")], "ppo": [("ppo_batch", "prompts"), ("checkpoints", "ppo_steps")],
               "xpo": [("xpo_prompts", "prompts")], "exo": [("checkpoints", "align_steps"), ("align_batch", "prompts")]}
    at_most["dpo"] = at_most["exo"]
    asked = at_most if cfg.method == "all" else ("every", cfg.method)
    for small, large in (pair for method in asked for pair in at_most[method]):
        if getattr(cfg, small) > getattr(cfg, large) and not own:    # a user's file bounds them
            return f"--{small.replace('_', '-')} must be at most --{large.replace('_', '-')} {getattr(cfg, large)}"


def pick_device(cfg, why):
    """The device and whether to compute in bf16 there; prints one line that says what runs where, and why."""
    there = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    name = next(d for d in ("cuda", "mps", "cpu") if there[d]) if cfg.device == "auto" else cfg.device
    if not there[name]:
        raise UserError(f"--device {name}: PyTorch finds no such device here, use --device auto")
    device = parallel.start(torch.device(name))
    bf16 = stages.arithmetic(device, cfg.matmul)
    kind = "bfloat16 products, float32 weights" if bf16 else f"float32, {cfg.matmul} precision"
    print(f"preset {cfg.preset} ({why}; --preset tiny, imdb-small, imdb or imdb-large to choose) · {name} "
          f"{torch.cuda.get_device_name() if name == 'cuda' else f'{torch.get_num_threads()} threads'} · "
          f"{f'{parallel.world()} processes · ' if parallel.world() > 1 else ''}"
          f"{kind} · torch {torch.__version__} · {cfg.run}")
    return device, bf16


# ---- alignment -------------------------------------------------------------------------------------------------------------

def candidates(run, feedback, K):
    """What EXO and DPO train on: ids, mask (P, K, T), ref_logp, reward (P, K).  Pairs: column 0 is the chosen response."""
    table = read_tensors(stages.responses(run) / "responses.safetensors")[0]
    if feedback == "reward" and not run.scored:
        table["reward"] = read_tensors(stages.reward_model(run) / "rewards.safetensors")[0]["reward"]
        order = torch.arange(K).expand(run.cfg.prompts, K)
    else:
        winner = stages.winners(run, table["reward"][:, :2], "train")                       # (P,)
        order = torch.stack([winner, 1 - winner], dim=1)                                    # (P, 2)
    row = torch.arange(run.cfg.prompts)[:, None]
    return [table[k][row, order].to(run.device) for k in ("ids", "mask", "ref_logp", "reward")]


def offline(run, policy, optimizer, method, feedback, K, seed):
    """EXO and DPO, from pairs or from a reward model's scores.  -> number of steps, step(step, share of lr) -> stats, state"""
    cfg = run.cfg
    ids, mask, ref_logp, reward = candidates(run, feedback, K)
    if run.bf16:                                                     # in float32 it is below 1e-4, which a test holds
        with torch.no_grad():
            logp = sequence_logprob(policy, ids[:8].flatten(0, 1).long(), mask[:8].flatten(0, 1), cfg.temperature)
        h = logp - ref_logp[:8].flatten()                                                   # (8 K,)
        print(f"bfloat16: the largest |log pi - log pi_sft| before the first step is {h.abs().max():.1e} nats")

    def loss_sum(index):
        x, m = trim(ids[index].flatten(0, 1).long(), mask[index].flatten(0, 1))             # (b K, T)
        logp = sequence_logprob(policy, x, m, cfg.temperature).view(len(index), -1)         # (b K,) -> (b, K)
        ref, r = ref_logp[index], reward[index]                                             # (b, K)
        if feedback == "preferences":
            loss = exo_pref_loss(logp, ref, cfg.beta_pi, cfg.eps) if method == "exo" else dpo_loss(logp, ref, cfg.beta_pi)
            best, worst = torch.zeros_like(index), torch.ones_like(index)
        else:
            loss = (exo_loss if method == "exo" else dpo_reward_loss)(logp, ref, r, cfg.beta_r, cfg.beta_pi)
            best, worst = r.argmax(1), r.argmin(1)
        stats = implicit_rewards(cfg.beta_pi * (logp - ref).detach(), best, worst)
        return {"loss": loss * len(index), **stats, "tokens": m.sum()}, len(index)

    def step(step, share):
        index = batch_at(step, cfg.align_batch, torch.zeros(len(ids)), "align", seed, window=1)
        return descend(optimizer, cfg.align_lr * share, index, run.at_once(ids.shape[1]), loss_sum, f"{method}, step {step + 1}")

    return cfg.align_steps, step, {}


def implicit_rewards(implicit, best, worst):
    """What beta (log pi - log pi_sft), (b, K), says of the preferred response and of the other.  -> sums over the batch"""
    row = torch.arange(len(implicit))
    chosen, rejected = implicit[row, best], implicit[row, worst]                            # (b,)
    return {"rewards_chosen": chosen.sum(), "rewards_rejected": rejected.sum(), "rewards_margin": (chosen - rejected).sum(),
            "rewards_accuracy": (chosen > rejected).sum()}


def proximal(run, policy, ref, optimizer, seed):
    """PPO on the reward model's reward, at beta = beta_r beta_pi: the objective of the other methods.  As `offline`."""
    cfg, trained = run.cfg, stages.reward_model(run)
    critic = run.scorer(trained)
    critic.score.weight.data *= read_json(trained / "report.json")["scale"]
    critic_optimizer = adamw(critic, cfg.ppo_critic_lr, eps=1e-5)
    prompts = run.train_prompts()
    reward, order = stages.reward_function(run, trained), torch.zeros(len(prompts))         # plain shuffled batches

    def step(step, share):
        return ppo.iteration(
            policy, ref, critic, optimizer, critic_optimizer, reward,
            [prompts[i] for i in batch_at(step, cfg.ppo_batch, order, "ppo", seed)],
            policy_lr=cfg.ppo_lr * share, critic_lr=cfg.ppo_critic_lr * share, beta=cfg.beta_pi * cfg.beta_r,
            max_new_tokens=cfg.new_tokens, temperature=cfg.temperature, eos_id=run.eos_id, generator=rng("ppo", seed, step),
            epochs=cfg.ppo_epochs, minibatches=cfg.ppo_minibatches, critic_only=step < cfg.ppo_warmup,
            micro_batch_size=cfg.micro_batch_size, where=f"ppo, step {step + 1}")

    return cfg.ppo_steps, step, {"critic": critic, "critic_optimizer": critic_optimizer}


def online(run, policy, ref, score, optimizer, seed):
    """XPO, and online DPO at --alpha 0: rounds of fresh pairs labelled by the oracle, then passes over all pairs so far."""
    cfg, replay = run.cfg, xpo.Replay()
    table = read_tensors(stages.answers(run) / "responses.safetensors")[0]
    floor = -float(table["reward"].max() - table["reward"].min()) / cfg.beta_pi              # -R_max / beta
    order = torch.randperm(cfg.prompts, generator=rng("xpo prompts", seed))
    schedule = xpo.rounds(cfg.xpo_rounds, cfg.xpo_prompts, cfg.xpo_epochs, cfg.align_batch)

    def play(t):
        index = order[torch.arange(t * cfg.xpo_prompts, (t + 1) * cfg.xpo_prompts) % cfg.prompts]
        sampled = {name: column[index, 0] for name, column in table.items()}
        xpo.play(policy, ref, score, lambda reward: stages.winners(run, reward, "xpo", seed, t),
                 stages.prompts_of(sampled["ids"], sampled["mask"]), sampled, replay, cfg.new_tokens, cfg.temperature, run.eos_id,
                 rng("xpo", seed, t), cfg.sample_batch)

    def loss_sum(index):
        pairs = {name: column[index].to(run.device) for name, column in replay.data.items()}
        x, m = trim(pairs["ids"].flatten(0, 1).long(), pairs["mask"].flatten(0, 1))         # (b 2, T)
        logp = sequence_logprob(policy, x, m, cfg.temperature).view(len(index), 2)          # (b 2,) -> (b, 2)
        explore = logp.gather(1, pairs["explore"][:, None]).squeeze(1)                      # (b,) log pi of pi_sft's response
        h = (logp - pairs["ref_logp"]).detach()                                             # (b, 2)
        loss = xpo.xpo_loss(logp, pairs["ref_logp"], explore, cfg.beta_pi, cfg.alpha)
        stats = implicit_rewards(cfg.beta_pi * h, torch.zeros_like(index), torch.ones_like(index))
        return {"loss": loss * len(index), **stats, "tokens": m.sum(), "explore_logp": explore.detach().sum(),
                "explore_log_ratio": h.gather(1, pairs["explore"][:, None]).sum()}, len(index)

    def step(step, share):
        t, i = schedule[step]
        if i == 0:
            play(t)
        if replay.closed == t:                                       # this round is over: no step until the next one
            return dict.fromkeys(("loss", "grad_norm"), math.nan)
        index = batch_at(i, cfg.align_batch, torch.zeros(len(replay)), "xpo", seed, t, window=1)
        stats = descend(optimizer, cfg.align_lr * share, index, run.at_once(2), loss_sum, f"xpo, step {step + 1}")
        if stats["explore_log_ratio"] < floor:                       # the bonus has no floor of its own on a replay
            replay.closed = t
        return stats

    return len(schedule), step, {"replay": replay}


def name_of(cfg, method, feedback, K, seed):
    """An alignment's folder: exo-preferences-s0, exo-reward-k4-betapi0.25-s0; of a trial its learning rate too."""
    usual = vars(Config()) | PRESETS[cfg.preset]
    name = ["online-dpo" if method == "xpo" and cfg.alpha == 0 else method, feedback, *([f"k{K}"] if K else [])]
    told = [s for s in ("beta_pi", "beta_r", *(["alpha"] if method == "xpo" and cfg.alpha else [])) if getattr(cfg, s) != usual[s]]
    if cfg.eval_split == "train":
        told.append("ppo_lr" if method == "ppo" else "align_lr")
    name += [f"{s.removeprefix('align_').removeprefix('ppo_').replace('_', '')}{getattr(cfg, s):g}" for s in told]
    return "-".join([*name, f"s{seed}"])


def align(run, method, feedback, K, seed):
    """One alignment: from pi_sft's weights by the method's steps, checkpoints evaluated on the way.  -> its folder"""
    cfg, folder = run.cfg, run.folder / name_of(run.cfg, method, feedback, K, seed)
    kind = method if method in ("ppo", "xpo") else "offline"
    sft, oracle = stages.sft(run), stages.oracle(run)
    upstream = [sft, oracle, stages.responses(run)] + ([stages.reward_model(run)] if feedback == "reward" else [])
    if begin(folder, run.settings("align") | run.settings(kind) | {"method": method, "seed": seed}, upstream):
        return folder
    policy, ref, score = run.policy(sft), run.policy(sft), stages.judge(run)
    optimizer = adamw(policy, cfg.align_lr, eps=1e-5 if method == "ppo" else 1e-8)
    if method == "ppo":
        steps, take, extra = proximal(run, policy, ref, optimizer, seed)
    elif method == "xpo":
        steps, take, extra = online(run, policy, ref, score, optimizer, seed)
    else:
        steps, take, extra = offline(run, policy, optimizer, method, feedback, K, seed)
    log, evaluations = Log(folder / "metrics.csv"), Log(folder / "eval.csv")
    state = {"policy": policy, "optimizer": optimizer, "metrics": log, "eval": evaluations, **extra}
    evaluated = [round(steps * (i + 1) / cfg.checkpoints) for i in range(cfg.checkpoints)]
    start = read_tensors(stages.reference(run) / "samples.safetensors")[0]
    tokens = seconds = 0.0                                           # trained on since the last line
    for step, bar in resumable(folder, state, steps, min(cfg.save_every, max(1, steps // 10)), folder.name):
        if step == 0:
            evaluations.write(step=0, **summary(start, run.eos_id))
        began = time.perf_counter()
        stats = take(step, cosine(step, steps))
        seconds += time.perf_counter() - began
        tokens += stats["length"] * cfg.ppo_batch if method == "ppo" else stats.get("tokens", 0) * cfg.align_batch
        log.write(step=step + 1, **stats)
        if step + 1 in evaluated:
            found = measure(run, policy, ref, score, rng("evaluate", seed, step + 1))
            row = summary(found, run.eos_id)
            evaluations.write(step=step + 1, **row)
            policy.save_pretrained(folder / f"step-{step + 1:05d}", run.eos_id)
            write_tensors(folder / f"step-{step + 1:05d}" / "samples.safetensors", found)
            learned = "".join(f", {k.split('_')[-1]} {stats[k]:.3f}" for k in ("rewards_margin", "rewards_accuracy") if k in stats)
            bar.write(f"step {step + 1}: loss {stats['loss']:.3f}{learned}, reward {row['reward']:.2f} at KL {row['kl']:.2f} nats, "
                      f"length {row['length']:.0f}, {tokens / seconds:,.0f} tokens/s")
            tokens = seconds = 0.0
            figures.progress(run)
        if step + 1 == 50 and parallel.rank() == 0 and stuck([row["loss"] for row in read_csv(folder / "metrics.csv")]):
            print(f"\n{folder.name}, step 50: warning: the loss has stood at {stats['loss']:.4g} for 50 steps: nothing is learned; "
                  "look at the learning rate, and whether all responses of a prompt are the same", file=sys.stderr)
        shown = ("loss", "rewards_margin", "rewards_accuracy", "reward", "kl", "explore_log_ratio")
        bar.set_postfix({k.removeprefix("rewards_"): f"{stats[k]:.3f}" for k in shown if k in stats}, refresh=False)
    final = f"step-{evaluated[-1]:05d}"
    figures.write_samples(run, folder, start, read_tensors(folder / final / "samples.safetensors")[0])
    finish(folder, final=final)
    return folder


def plan(cfg):
    """The alignments that the command asks for: (method, feedback, K)."""
    everything = [(method, "preferences", 0) for method in ("exo", "dpo")]
    everything += [(method, "reward", K) for K in cfg.num_candidates for method in ("exo", "dpo")]
    everything += [("ppo", "reward", 0), ("xpo", "preferences", 0)]
    return [one for one in everything if cfg.method == "all" or
            (one[0] == cfg.method and (cfg.method in ("ppo", "xpo") or one[1] == cfg.feedback))]


def main(argv=None):
    cfg, why = parse(argv)
    try:
        device, bf16 = pick_device(cfg, why)
        held = lock(cfg.run) if parallel.rank() == 0 else None       # kept open: the lock lasts as long as the process
        parallel.agreed(0)                                           # no one goes on before process 0 has it
        catch_signals()
        run = Run(cfg, device, bf16)
        if run.own:
            preferences.settle(run)
        write_json(run.folder / "config.json", vars(cfg))
        for seed in cfg.seeds:
            for method, feedback, K in plan(cfg):
                align(run, method, feedback, K, seed)
        stages.limit(run)
        figures.draw(run)
        parallel.stop()
        if held:
            held.close()
    except UserError as error:
        sys.exit(f"train.py: {error}" if parallel.rank() == 0 else 1)
    except Stopped as stopped:
        if parallel.rank() == 0:
            print(f"stopped; go on with: python train.py {shlex.join(sys.argv[1:] if argv is None else argv)}", file=sys.stderr)
        sys.exit(128 + stopped.args[0])
    except (RuntimeError, MemoryError) as error:
        if not out_of_memory(error):
            raise
        sys.exit("train.py: out of memory: lower --micro-batch-size, or set it, or lower --sample-batch in another --run")


if __name__ == "__main__":
    main()
