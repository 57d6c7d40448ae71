"""The settings: one table of defaults, their origins, and the stages that depend on them; the presets.

A run starts from Config's defaults, the tiny preset.  A preset overrides those, and the command line's flags
override both.
"""
import argparse
import math
import re
from dataclasses import dataclass, field, fields
from pathlib import Path

import torch

METHODS = ("exo", "dpo", "exo-rw", "dpo-rw", "ppo", "xpo")            # -rw: from rewards of K responses


def opt(default, stages, help, choices=None):
    """A setting.  stages: those whose results depend on it: they are refused if it has changed."""
    metadata = {"help": help, "stages": stages.split(), "choices": choices}
    if isinstance(default, list):
        return field(default_factory=default.copy, metadata=metadata)
    return field(default=default, metadata=metadata)


SCORED = ("exo-rw", "dpo-rw")                                         # they learn from rewards of K responses
PAIRS, REWARDS = "exo dpo", " ".join(SCORED)                          # alignments, by what they learn from
COMPARE = f"{PAIRS} {REWARDS} xpo"                                    # those that compare responses
ALIGN = f"{COMPARE} ppo"
SAMPLED = f"responses reward_model {PAIRS} {REWARDS} ppo"             # what follows from pi_sft's responses
MODELED = f"reward_model {REWARDS} ppo"                              # the reward model and its users
EVALUATED = f"reference {ALIGN}"
ALL = f"sft oracle responses reward_model limit {EVALUATED}"          # every stage


@dataclass
class Config:
    # run
    method: list[str] = opt(["exo"], "", "alignment methods, in turn", [*METHODS, "all"])
    seeds: list[int] = opt([0], "", "alignment and evaluation are repeated for each")
    label: str = opt("", "", "a word in the alignments' names, to tell settings apart")
    preset: str = opt("", "", "the experiment; default: imdb on CUDA, else tiny",
                      ["tiny", "imdb-mini", "imdb-small", "imdb", "imdb-large"])
    run: str = opt("", "", "the folder of this run's artifacts; default: runs/PRESET")
    device: str = opt("", "", "where to compute; default: cuda, else cpu")
    smoke: bool = opt(False, "", "all stages at a toy size: does it run from end to end?")
    micro_batch: int = opt(0, "", "rows at once in training, 0: whole batches; memory, not results [ours]")
    sample_batch: int = opt(1024, "", "rows at once in sampling; memory, not results [ours]")
    pipeline: int = opt(0, ALL, "repeats everything with new random numbers [ours]")
    # reviews
    data: str = opt("tiny", ALL, "tiny: a built-in grammar; imdb; or your preferences, a .jsonl file")
    imdb: list[str] = opt([], "", "IMDB's archives; default: download once")
    tokenizer: str = opt("tiny", ALL, "tiny: the grammar's words, bytes; gpt2; gpt2-4096: its first 4,096")
    sft_reviews: int = opt(60_000, ALL, "training reviews [official code: 25,000]")
    prompt_tokens: int = opt(6, ALL, "tokens of a review used as its prompt [official code: 10]")
    new_tokens: int = opt(66, ALL, "longest response, in tokens [official code: 500]")
    # model
    init: str = opt("", ALL, "start from gpt2, gpt2-medium, -large, -xl or a folder; default: from scratch")
    n_layer: int = opt(2, ALL, "layers, from scratch [ours]")
    n_head: int = opt(4, ALL, "attention heads, from scratch [ours]")
    n_embd: int = opt(64, ALL, "channels, from scratch [ours]")
    temperature: float = opt(1.0, ALL, "divides logits after SFT: sampling, log-probs, KL [paper: 0.8]")
    # before alignment
    sft_steps: int = opt(1200, ALL, "steps [paper: 5 epochs; ours from scratch]")
    sft_stretches: int = opt(0, ALL, "initial steps that use stretches of whole reviews [ours]")
    sft_batch: int = opt(64, ALL, "reviews per step [official code: 128]")
    sft_optimizer: str = opt("adamw", ALL, "muon: for the blocks' matrices [ours]", ["adamw", "muon"])
    sft_lr: float = opt(2e-3, ALL, "peak learning rate [official code: 1e-5; ours from scratch]")
    oracle_steps: int = opt(1200, ALL, "steps [official code: 5 epochs]")
    oracle_batch: int = opt(64, ALL, "reviews per step [official code: 256]")
    scorer_lr: float = opt(1e-3, ALL, "peak rate of oracle, reward model, PPO's critic [official code: 1e-5]")
    prompts: int = opt(4096, f"{SAMPLED} xpo", "training prompts [official code: 25,000]")
    responses: int = opt(4, SAMPLED, "from pi_sft per prompt [paper: up to 8]")
    labels: str = opt("bt", f"reward_model {ALIGN}", "how a pair's winner is found [official code: argmax]",
                      ["bt", "argmax"])
    rm_steps: int = opt(800, MODELED, "steps [official code: 3 epochs]")
    rm_responses: int = opt(2, MODELED, "responses to a prompt whose pairs it learns from [paper: 2]")
    rm_batch: int = opt(32, MODELED, "prompts per step, with all their pairs [official code: 128 pairs]")
    # alignment
    align_steps: int = opt(400, f"{PAIRS} {REWARDS}", "steps of EXO and DPO [paper: one epoch]")
    align_batch: int = opt(32, COMPARE, "prompts per step of EXO, DPO and XPO [paper: 64]")
    align_lr: float = opt(3e-4, f"{PAIRS} xpo", "peak learning rate of EXO, DPO and XPO [paper: 1e-6]")
    rw_lr: float = opt(1.5e-4, REWARDS, "peak learning rate of -rw [paper: 1e-6]")
    adam_eps: float = opt(1e-2, ALIGN, "the policy's Adam epsilon [official code: 1e-8]; see results")
    beta_pi: float = opt(0.5, ALIGN, "scales the log-ratio; DPO's beta on pairs [official code: 0.1]")
    beta_r: float = opt(1.0, f"{REWARDS} ppo", "divides the reward; beta = beta_pi beta_r [official: 0.1]")
    eps: float = opt(1e-3, "exo", "label smoothing of EXO's pairs [paper]")
    reward: str = opt("model", f"{REWARDS} ppo", "the reward that -rw and PPO maximize [paper: model]",
                      ["model", "oracle"])
    num_candidates: int = opt(4, REWARDS, "K, responses per prompt of -rw [paper: up to 8]")
    rounds: int = opt(1, REWARDS, "times that -rw draws responses, from the current policy [paper: 1]")
    round_prompts: int = opt(0, f"{REWARDS} xpo", "prompts per round; 0: --prompts / rounds [ours]")
    ppo_steps: int = opt(80, "ppo", "PPO's iterations [ours]")
    ppo_batch: int = opt(64, "ppo", "prompts per iteration, one response each [paper: tuned, not given]")
    ppo_lr: float = opt(1e-3, "ppo", "PPO's peak learning rate [paper: tuned, not given]")
    xpo_rounds: int = opt(4, "xpo", "rounds of XPO [XPO's experiment: 3]")
    alpha: float = opt(0.003, "xpo", "XPO's alpha / beta_pi [ours]; 0 is online DPO")
    # evaluation
    checkpoints: int = opt(8, ALIGN, "evaluations on the way, evenly spaced in sqrt(step) [ours]")
    eval_prompts: int = opt(256, EVALUATED, "prompts of evaluation [paper: 512]")
    eval_split: str = opt("test", f"limit {EVALUATED}", "whose prompts; train: to choose settings [ours]",
                          ["test", "train"])
    judge: str = opt("", f"limit {EVALUATED}", "FILE.py:NAME, evaluation's reward; default: as for labels")
    eval_samples: int = opt(4, EVALUATED, "responses to each [paper]")
    limit_prompts: int = opt(32, "limit", "how many of the evaluation prompts the limit uses [ours]")
    limit_responses: int = opt(1024, "limit", "responses per prompt [ours]")

    @property
    def own(self):
        """Whether the data are a user's file of preferences."""
        return self.data.endswith(".jsonl")

    @property
    def judge_is_reward(self):
        """Whether evaluation's rewards are on the scale of the rewards that beta divides."""
        return not self.own and not self.judge

    def of(self, *stages):
        """{name: value} of the settings that an artifact of these stages depends on."""
        stages = set(stages)
        if self.own and not stages & {"sft", "responses"}:            # the reward model judges everything
            stages.add("reward_model")
        return {f.name: getattr(self, f.name) for f in fields(self) if stages & set(f.metadata["stages"])}


IMDB = dict(                                              # official code, or the paper, where they say
    data="imdb", tokenizer="gpt2", init="gpt2", prompt_tokens=10, new_tokens=502, temperature=0.8,
    labels="argmax",
    sft_reviews=25_000, sft_steps=977, sft_batch=128, sft_lr=1e-5,                        # 5 epochs
    oracle_steps=488, oracle_batch=256, scorer_lr=1e-5,                                   # 5 epochs
    prompts=25_000, responses=8, rm_steps=586, rm_batch=128,                              # 3 epochs
    align_steps=391, align_batch=64, align_lr=1e-6, rw_lr=1e-6, adam_eps=1e-8,            # one epoch
    beta_pi=0.1, beta_r=0.1,
    ppo_steps=400, ppo_batch=128, ppo_lr=2e-6, xpo_rounds=3,
    checkpoints=10, eval_prompts=512, limit_prompts=64, sample_batch=512, micro_batch=64)
IMDB_SMALL = IMDB | dict(                                 # ours: a small model from scratch
    new_tokens=118, init="", n_layer=6, n_head=8, n_embd=512,
    sft_reviews=75_000, sft_steps=4688, sft_batch=64, sft_lr=6e-4,                        # 4 epochs
    oracle_steps=1172, oracle_batch=64, scorer_lr=1e-4,                                   # 3 epochs
    prompts=12_800, rm_steps=400, rm_batch=64,                                            # 2 epochs
    align_steps=200, align_lr=3e-5, rw_lr=3e-5, ppo_lr=3e-5,
    limit_responses=4096, sample_batch=1024, micro_batch=256)
IMDB_MINI = IMDB_SMALL | dict(                            # ours: real reviews on a CPU
    tokenizer="gpt2-4096", n_layer=4, n_head=4, n_embd=128, prompt_tokens=12, new_tokens=60, temperature=1.0,
    sft_steps=3000, sft_stretches=2000, sft_batch=32, sft_optimizer="muon", sft_lr=3e-3,
    oracle_steps=800, oracle_batch=32, scorer_lr=5e-4,
    prompts=4_800, responses=4, labels="bt", rm_steps=400, rm_batch=32,
    align_steps=150, align_batch=32, align_lr=1.5e-4, rw_lr=7.5e-5, adam_eps=1e-2, beta_pi=0.75, beta_r=1.0,
    ppo_steps=40, ppo_batch=64, ppo_lr=6.25e-5, xpo_rounds=4,
    checkpoints=3, eval_prompts=128, eval_samples=16, limit_prompts=128, limit_responses=512, micro_batch=0)
PRESETS = {"tiny": {}, "imdb-mini": IMDB_MINI, "imdb-small": IMDB_SMALL, "imdb": IMDB,
           "imdb-large": IMDB | dict(init="gpt2-large", sample_batch=128, micro_batch=16)}
OWN_DATA = dict(tokenizer="gpt2", labels="argmax", prompt_tokens=512, new_tokens=512, sft_stretches=0,
                rm_responses=2, limit_responses=256)
SMOKE = dict(init="", n_layer=2, n_head=2, n_embd=32, sft_reviews=2_000, sft_steps=30, sft_stretches=0,
             oracle_steps=30, prompts=64, rm_steps=10, align_steps=10, align_batch=8, checkpoints=2,
             ppo_steps=4, ppo_batch=8, xpo_rounds=2, eval_prompts=16, limit_prompts=8,
             limit_responses=128)


def parse(argv=None):
    """The command line -> Config.  A usage error is one sentence, exit status 2."""
    parser = argparse.ArgumentParser(prog="train.py", argument_default=argparse.SUPPRESS, allow_abbrev=False,
                                     usage="python train.py --method exo ..., or --help for every flag")
    for setting in fields(Config):
        default, metadata = getattr(Config(), setting.name), setting.metadata
        if setting.type is bool:
            kind = {"action": "store_true"}
        elif isinstance(default, list):
            kind = {"nargs": "+", "type": int if setting.type == list[int] else str}
        else:
            kind = {"type": setting.type}
        if metadata["choices"]:
            kind |= {"choices": metadata["choices"]}
        text = f"{metadata['help']} (tiny: {default})" if default not in ("", []) else metadata["help"]
        parser.add_argument("--" + setting.name.replace("_", "-"), help=text.replace("%", "%%"), **kind)
    given = vars(parser.parse_args(argv))
    if "preset" not in given:
        given["preset"] = "imdb" if torch.cuda.is_available() and "smoke" not in given else "tiny"
        print(f"preset {given['preset']}: --preset chooses another, one of {', '.join(PRESETS)}")
    name, settings = given["preset"], PRESETS[given["preset"]]
    if given.get("data", "").endswith(".jsonl"):
        settings = settings | OWN_DATA
        name += f"-{Path(given['data']).stem}"
    if "smoke" in given:
        settings = settings | SMOKE
        name += "-smoke"
    if given.get("eval_split") == "train":
        name += "-trials"
    cfg = Config(**{"run": f"runs/{name}"} | settings | given)
    if "all" in cfg.method:
        cfg.method = list(METHODS)
    for problem in problems(cfg):
        parser.error(problem)
    return cfg


def problems(cfg):
    """Yields what would otherwise fail late, or silently mean something else."""
    for setting in fields(Config):
        least = 0 if setting.name in ("pipeline", "micro_batch", "sft_stretches", "round_prompts") else 1
        if setting.type is int and getattr(cfg, setting.name) < least:
            yield f"--{setting.name.replace('_', '-')} must be at least {least}"
        value = getattr(cfg, setting.name)
        if setting.type is float and setting.name != "alpha" and not 0 < value < math.inf:
            yield f"--{setting.name.replace('_', '-')} must be positive and finite"
    if not 0 < cfg.eps < 0.5:
        yield f"--eps must lie in (0, 0.5), got {cfg.eps}: at 0 the reverse KL is infinite"
    if not 0 <= cfg.alpha < math.inf:
        yield f"--alpha must be finite and not negative, got {cfg.alpha}"
    if cfg.n_embd % cfg.n_head:
        yield f"--n-embd must be a multiple of --n-head, got {cfg.n_embd} and {cfg.n_head}"
    size = re.fullmatch(r"tiny|gpt2(?:-(\d+))?", cfg.tokenizer)
    if not size or not 256 <= int(size[1] or 256) <= 50_256:
        yield f"--tokenizer must be tiny, gpt2 or gpt2-N with N in [256, 50256], got {cfg.tokenizer}"
    if not cfg.run:
        yield "--run must name a folder"
    if not cfg.own and cfg.data not in ("tiny", "imdb"):
        yield f"--data must be tiny, imdb or a .jsonl file, got {cfg.data}"
    if cfg.own and cfg.labels == "bt":
        yield "--labels bt would flip some of your file's pairs: use argmax"
    if cfg.rounds > cfg.align_steps:
        yield f"--rounds must be at most --align-steps, got {cfg.rounds}"
    if cfg.num_candidates < 2 or cfg.rm_responses < 2:
        yield "--num-candidates and --rm-responses must be at least 2"
    if not cfg.own:
        if cfg.rounds > cfg.prompts // cfg.align_batch:
            yield f"--rounds must be at most --prompts / --align-batch, got {cfg.rounds}"
        if not 2 <= cfg.num_candidates <= cfg.responses or not 2 <= cfg.rm_responses <= cfg.responses:
            yield f"--num-candidates and --rm-responses must lie in [2, --responses = {cfg.responses}]"
    if "/" in cfg.label or "\\" in cfg.label:
        yield f"--label must be a word without a slash, got {cfg.label}"
    if cfg.imdb and cfg.data != "imdb":
        yield "--imdb needs an imdb preset, such as --preset imdb-mini"
    if cfg.judge and not re.fullmatch(r".+\.py:\w+", cfg.judge):
        yield f"--judge must be FILE.py:NAME, got {cfg.judge}"
    files = [cfg.data] * cfg.own + cfg.imdb + [cfg.judge.rpartition(":")[0]] * bool(cfg.judge)
    for path in files:
        if not Path(path).is_file():
            yield f"there is no file {path}"
