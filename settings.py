"""The settings: one table of defaults, their origins, and the stages that depend on them; the presets.

A run's settings are Config's defaults, which are the tiny preset, then the preset's own, those that the data
ask for, --smoke's, and the flags of the command line: the later ones win.
"""
import argparse
import difflib
import math
from dataclasses import dataclass, field, fields
from pathlib import Path

import torch

BUILT_IN = ("tiny", "imdb")                               # what --data may name beside a user's file


def opt(default, help, stages="", choices=None):
    """A setting.  stages: those whose artifact depends on it, and is refused when it has changed."""
    metadata = {"help": help, "stages": stages.split(), "choices": choices}
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata=metadata)
    return field(default=default, metadata=metadata)


SAMPLED = "responses limit reference align"               # the stages that sample, or score what was sampled


@dataclass
class Config:
    # run
    method: str = opt("exo", "alignment method; all: every method in turn", "",
                      ["exo", "dpo", "ppo", "xpo", "all"])
    feedback: str = opt("preferences", "learn from pairs, or from a reward model's scores", "",
                        ["preferences", "reward"])
    reward: str = opt("model", "what EXO-rw, DPO-rw and PPO climb: a reward model of pairs, or the oracle "
                      "itself, to see the model's part in a gap [ours]", "", ["model", "oracle"])
    num_candidates: list[int] = opt([4], "K, responses a prompt in losses from rewards [paper: up to 8]")
    seeds: list[int] = opt([0], "alignment and evaluation are repeated for each")
    preset: str = opt("auto", "the experiment; auto: imdb with CUDA, else tiny", "",
                      ["auto", "tiny", "imdb-mini", "imdb-small", "imdb", "imdb-large"])
    run: str = opt("", "the folder of this run's artifacts (default: runs/PRESET)")
    smoke: bool = opt(False, "all stages at a toy size, in seconds: does it run from end to end?")
    dry_run: bool = opt(False, "print what each stage takes, and which flags fit the memory; train nothing")
    device: str = opt("auto", "where to compute", "", ["auto", "cpu", "cuda", "mps"])
    matmul: str = opt("highest", "float32 products; with bf16 high [ours]", "", ["highest", "high", "medium"])
    compile: bool = opt(False, "torch.compile the policy's blocks [ours]")
    micro_batch_size: int = opt(0, "rows at once in training, 0: whole batches; memory, not results [ours]")
    sample_batch: int = opt(1024, "rows sampled at once [ours]", "responses limit")
    pipeline: int = opt(0, "repeats the stages before alignment with other random numbers [ours]", "sft")
    save_every: int = opt(0, "steps between the saves that an interrupted stage goes on from; 0: as many as "
                             "take 1% of its time [ours]")
    keep: str = opt("all", "checkpoints whose weights stay; best: the last and that of the highest reward",
                     "", ["all", "best", "last"])
    # reviews
    data: str = opt("tiny", "tiny: a built-in grammar; imdb; or your preferences, a .jsonl file", "sft")
    eval_data: str = opt("", "your held-out preferences; default: some of --data", "sft")
    judge: str = opt("", "my_reward.py:score, a function of lists of prompts and of responses to a list of "
                     "rewards: it evaluates, and no method climbs it; default: the oracle, or your file's "
                     "reward model")
    skip_long: bool = opt(False, "leave out rows of --data with a prompt longer than --prompt-tokens", "sft")
    held_out: float = opt(0.1, "how much of --data is held out, in whole prompts [ours]", "sft")
    tokenizer: str = opt("tiny", "tiny: the grammar's words, bytes; gpt2: GPT-2's", "sft", ["tiny", "gpt2"])
    vocab_size: int = opt(0, "tokens of GPT-2's tokenizer, its first merges; 0: all 50,256 [ours]", "sft")
    imdb: list[str] = opt([], "IMDB archives or extracted folders; default: download once")
    sft_reviews: int = opt(60_000, "training reviews [official code: 25,000]", "sft")
    test_reviews: int = opt(4_000, "held-out reviews of the grammar [ours]", "sft")
    prompt_tokens: int = opt(6, "first tokens of a review that make a prompt [official code: 10]", "sft")
    new_tokens: int = opt(66, "longest response, in tokens [official code: 500]", "sft")
    # model
    init: str = opt("", "start from gpt2, gpt2-medium, -large, -xl or a folder; default: from scratch", "sft")
    n_layer: int = opt(2, "layers, from scratch [ours]", "sft")
    n_head: int = opt(4, "attention heads, from scratch [ours]", "sft")
    n_embd: int = opt(64, "channels, from scratch [ours]", "sft")
    temperature: float = opt(1.0, "divides all logits, in sampling, log-probs and KL [paper: 0.8]", SAMPLED)
    # sft
    sft_steps: int = opt(1200, "steps [paper: 5 epochs; ours from scratch]", "sft")
    sft_segments: int = opt(0, "first steps, on stretches of whole reviews, not beginnings [ours]", "sft")
    sft_batch: int = opt(64, "reviews a step [official code: 128]", "sft")
    sft_optimizer: str = opt("adamw", "muon: Muon for the blocks' matrices [ours]", "sft", ["adamw", "muon"])
    sft_lr: float = opt(2e-3, "peak learning rate [official code: 1e-5; ours from scratch]", "sft")
    # oracle
    oracle_steps: int = opt(1200, "steps [official code: 5 epochs]", "oracle")
    oracle_batch: int = opt(64, "reviews a step [official code: 256]", "oracle")
    oracle_lr: float = opt(1e-3, "peak learning rate [official code: 1e-5]", "oracle")
    # responses
    prompts: int = opt(4096, "training prompts [official code: 25,000]", "responses")
    responses: int = opt(8, "responses of pi_sft a prompt [paper: K up to 8]", "responses")
    labels: str = opt("bt", "who wins a pair: a Bradley-Terry draw [ours], the higher reward [official code]",
                      "reward_model offline xpo", ["argmax", "bt"])
    # reward model
    rm_steps: int = opt(800, "steps [official code: 3 epochs]", "reward_model")
    rm_batch: int = opt(32, "prompts a step, with all their pairs [official code: 128 pairs]", "reward_model")
    rm_responses: int = opt(2, "responses of a prompt that make its pairs [ours]", "reward_model")
    rm_lr: float = opt(1e-3, "peak learning rate [official code: 1e-5]", "reward_model")
    # alignment
    align_steps: int = opt(400, "steps of EXO and DPO [paper: one epoch]", "offline")
    align_prompts: int = opt(0, "prompts of EXO and DPO, the first of --prompts; 0: all [ours]", "offline")
    align_batch: int = opt(32, "prompts a step of EXO, DPO and XPO [paper: 64]", "offline xpo")
    align_lr: float = opt(1e-4, "peak learning rate of EXO, DPO and XPO [paper: 1e-6]", "offline xpo")
    beta_pi: float = opt(0.5, "scales the log-ratio; DPO's beta on pairs [official code: 0.1]", "align")
    beta_r: float = opt(1.0, "divides the reward; beta = beta_pi * beta_r [official code: 0.1]", "align")
    rounds: int = opt(1, "times that EXO and DPO draw responses, from the present policy; 1: once, from "
                      "pi_sft [paper]; --method all: one run more, of 8 [ours]")
    warmup: float = opt(0.0, "part of the steps in which the rate rises [official code: none]", "align")
    eps: float = opt(1e-3, "label smoothing of EXO's pairs [paper]", "offline")
    ppo_steps: int = opt(80, "PPO's iterations [ours]", "ppo")
    ppo_batch: int = opt(64, "prompts an iteration, a fresh response each [paper: tuned, not given]", "ppo")
    ppo_lr: float = opt(4e-4, "PPO's peak learning rate [paper: tuned, not given]", "ppo")
    ppo_critic_lr: float = opt(1e-3, "the critic's [paper: tuned, not given]", "ppo")
    ppo_epochs: int = opt(4, "passes over an iteration's responses [ppo.py, detail 6]", "ppo")
    ppo_minibatches: int = opt(2, "updates a pass [ppo.py, detail 6]", "ppo")
    ppo_warmup: int = opt(10, "first iterations, of the critic alone [paper, no number given]", "ppo")
    xpo_rounds: int = opt(4, "rounds of XPO [XPO's experiment: 3]", "xpo")
    xpo_prompts: int = opt(768, "prompts a round, a pair each [ours]", "xpo")
    xpo_epochs: int = opt(2, "passes a round over all pairs so far [ours]", "xpo")
    alpha: float = opt(0.0015, "XPO's bonus, 0.003 beta_pi [ours]; 0 is online DPO", "xpo")
    # evaluation
    eval_split: str = opt("test", "test: evaluate on test prompts; train: to choose settings, on training "
                          "prompts that no method aligns on", "limit reference align", ["test", "train"])
    checkpoints: int = opt(8, "checkpoints evaluated, evenly spaced in the root of the step [ours]", "align")
    eval_prompts: int = opt(256, "prompts of evaluation [paper: 512]", "reference align")
    eval_samples: int = opt(4, "responses to each [paper]", "reference align")
    limit_prompts: int = opt(32, "evaluation prompts that the limit uses; --method all: 64 [ours]", "limit")
    limit_responses: int = opt(1024, "responses of pi_sft each, 0: no limit; --method all: 4,096; your data: "
                               "256 [ours]", "limit")

    @property
    def own(self):
        """Whether the data are a user's file of preferences."""
        return self.data not in BUILT_IN

    def of(self, *stages):
        """{name: value} of the settings that the artifact of one of these stages depends on."""
        asked = set(stages)
        return {f.name: getattr(self, f.name) for f in fields(self) if asked & set(f.metadata["stages"])}


IMDB = dict(                                              # official code, or the paper, where they say
    data="imdb", tokenizer="gpt2", init="gpt2", prompt_tokens=10, new_tokens=502, temperature=0.8,
    labels="argmax",
    sft_reviews=25_000, sft_steps=977, sft_batch=128, sft_lr=1e-5,                        # 5 epochs
    oracle_steps=488, oracle_batch=256, oracle_lr=1e-5,                                   # 5 epochs
    prompts=25_000, rm_steps=586, rm_batch=128, rm_lr=1e-5,                               # 3 epochs
    align_steps=391, align_batch=64, align_lr=1e-6, beta_pi=0.1, beta_r=0.1, alpha=3e-4,  # one epoch
    ppo_steps=400, ppo_batch=128, ppo_lr=2e-6, ppo_critic_lr=1e-5, xpo_rounds=3, xpo_prompts=2048,
    checkpoints=10, eval_prompts=512, limit_prompts=64, sample_batch=512, micro_batch_size=64)
IMDB_SMALL = IMDB | dict(                                 # ours: a small model from scratch
    new_tokens=118, init="", n_layer=6, n_head=8, n_embd=512,
    sft_reviews=75_000, sft_steps=4688, sft_batch=64, sft_lr=6e-4,                        # 4 epochs
    oracle_steps=1172, oracle_batch=64, oracle_lr=1e-4,                                   # 3 epochs
    prompts=12_800, rm_steps=400, rm_batch=64, rm_lr=1e-4,                                # 2 epochs
    align_steps=200, align_lr=3e-5, ppo_lr=3e-5, ppo_critic_lr=1e-4,
    limit_responses=4096, sample_batch=1024, micro_batch_size=256)
IMDB_MINI = IMDB_SMALL | dict(                             # ours: real reviews on a CPU
    vocab_size=4096, n_layer=4, n_head=4, n_embd=192, prompt_tokens=12, new_tokens=60, temperature=1.0,
    sft_steps=5000, sft_segments=3300, sft_batch=32, sft_lr=3e-3, sft_optimizer="muon",
    oracle_steps=1600, oracle_batch=32, oracle_lr=5e-4,
    prompts=9_600, labels="bt", rm_steps=800, rm_batch=16, rm_responses=6, rm_lr=5e-4,
    align_steps=300, align_batch=32, align_lr=5e-5, beta_pi=0.75, beta_r=1.0, alpha=0.00225,
    ppo_steps=80, ppo_batch=64, ppo_lr=3e-5, ppo_critic_lr=5e-4, xpo_rounds=4, xpo_prompts=768,
    checkpoints=6, eval_prompts=256, limit_prompts=64, limit_responses=4096, micro_batch_size=0)
PRESETS = {"tiny": {}, "imdb-mini": IMDB_MINI, "imdb-small": IMDB_SMALL, "imdb": IMDB,
           "imdb-large": IMDB | dict(init="gpt2-large", sample_batch=128, micro_batch_size=16)}
ALL_METHODS = dict(rounds=8)
ALL_ON_TINY = dict(limit_prompts=64, limit_responses=4096)
OWN_DATA = dict(tokenizer="gpt2", labels="argmax", limit_responses=256, sft_segments=0,
                # 0: as the file needs, `run.settle`
                prompt_tokens=0, new_tokens=0, sft_steps=0, rm_steps=0, align_steps=0)
WITH_ROUNDS = [("exo", "reward"), ("dpo", "reward")]
SMOKE = dict(
    init="", n_layer=2, n_head=2, n_embd=32, sft_reviews=2_000, test_reviews=500, sft_steps=30,
    sft_segments=0, sft_batch=16,
    oracle_steps=30, oracle_batch=16, prompts=64, rm_steps=10, rm_batch=16, align_steps=10, align_batch=8,
    checkpoints=2, ppo_steps=4, ppo_batch=8, ppo_warmup=1, xpo_rounds=2, xpo_prompts=16,
    eval_prompts=16, limit_prompts=8, limit_responses=128, sample_batch=256)
BUILT_IN_REVIEWS = dict(data="tiny", tokenizer="tiny", vocab_size=0, prompt_tokens=6, new_tokens=66)


class Parser(argparse.ArgumentParser):
    def error(self, message):
        start = "unrecognized arguments: "
        if message.startswith(start):
            wrong = message.removeprefix(start).split()[0]
            for meant in difflib.get_close_matches(wrong, self._option_string_actions, 1):
                message += f" (did you mean {meant}?)"
        self.exit(2, f"{self.prog}: {message}: see python {self.prog} --help\n")


def flags():
    """The command line's parser: a flag for each setting, in the namespace only where it is given."""
    parser = Parser(prog="train.py", allow_abbrev=False, argument_default=argparse.SUPPRESS,
                    description="Aligns GPT-2 by EXO, DPO, PPO or XPO, from reviews to figures.",
                    epilog="Defaults are the tiny preset's; settings.py lists the others'.")
    for setting in fields(Config):
        default = getattr(Config(), setting.name)
        shown = setting.metadata["help"] + (f" (default: {default})" if default not in ("", []) else "")
        if setting.type is bool:
            kind = {"action": argparse.BooleanOptionalAction}
        elif setting.metadata["choices"]:
            kind = {"choices": setting.metadata["choices"]}
        elif setting.type in (list[int], list[str]):
            kind = {"type": setting.type.__args__[0], "nargs": "+", "metavar": "X"}
        else:
            kind = {"type": setting.type, "metavar": "X"}
        parser.add_argument(flag(setting.name), help=shown.replace("%", "%%"), **kind)
    return parser


def flag(name):
    return "--" + name.replace("_", "-")


def parse(argv=None):
    """The command line -> Config, why it has this preset.  A usage error is one sentence, exit status 2."""
    parser = flags()
    given = vars(parser.parse_args(argv))
    smoke = given.get("smoke", False)
    cuda = torch.cuda.is_available() and given.get("device", "auto") in ("auto", "cuda")
    preset = given.get("preset", "auto")
    why = "as asked"
    if preset == "auto" and smoke:
        preset, why = "tiny", "--smoke"
    elif preset == "auto" and cuda:
        preset, why = "imdb", "CUDA is there"
    elif preset == "auto" and given.get("init"):
        preset, why = "imdb", "for --init"
    elif preset == "auto":
        preset, why = "tiny", "no CUDA in use"
    settings = dict(PRESETS[preset])
    if given.get("method") == "all":
        settings |= ALL_METHODS | (ALL_ON_TINY if preset == "tiny" else {})
    if smoke and settings.get("data") == "imdb" and not {"data", "imdb"} & set(given):
        settings |= BUILT_IN_REVIEWS
        why += "; without --imdb --smoke takes the built-in reviews"
    data = given.get("data", settings.get("data", "tiny"))
    name = preset
    if data == "imdb":
        settings["tokenizer"] = "gpt2"
    elif data not in BUILT_IN:
        settings |= OWN_DATA
        name += f"-{Path(data).stem}"
    if smoke:
        settings |= SMOKE
        name += "-smoke"
    if given.get("pipeline"):
        name += f"-pipeline{given['pipeline']}"
    if given.get("eval_split") == "train":
        name += "-trials"
    cfg = Config(**{"run": f"runs/{name}"} | settings | given | {"preset": preset})
    if "rounds" not in given and not cfg.own:             # --method all's own
        cfg.rounds = max(1, min(cfg.rounds, most_rounds(cfg)))
    if problem := impossible(cfg):
        parser.error(problem)
    return cfg, why


def most_rounds(cfg):
    """As many rounds as have a step each, and a batch of different prompts."""
    return min(cfg.align_steps, (cfg.align_prompts or cfg.prompts) // cfg.align_batch)


def impossible(cfg):
    """What is wrong with these values, in one sentence, or None."""
    zero = {"micro_batch_size", "save_every", "alpha", "ppo_warmup", "warmup", "pipeline",
            "align_prompts", "vocab_size", "sft_segments", "limit_responses"}
    if cfg.own:
        zero |= {name for name, value in OWN_DATA.items() if value == 0}
    for setting in fields(cfg):
        value = getattr(cfg, setting.name)
        if setting.type in (int, float):
            if not (0 < value < math.inf or (value == 0 and setting.name in zero)):
                return f"{flag(setting.name)} must be positive and finite, got {value}"
    checks = [
        (not cfg.own or cfg.data.endswith((".jsonl", ".json")),
         f"--data {cfg.data} is neither tiny, nor imdb, nor a .jsonl file"),
        (not cfg.own or cfg.eval_split == "test",
         "--eval-split train has no prompts left in --data: name a file of others by --eval-data instead"),
        (cfg.held_out < 1, f"--held-out must lie in (0, 1), got {cfg.held_out}"),
        (cfg.warmup < 1, f"--warmup must lie in [0, 1), got {cfg.warmup}"),
        (cfg.rounds == 1 or cfg.method == "all" or (cfg.method, cfg.feedback) in WITH_ROUNDS,
         "--rounds is for --method exo and dpo with --feedback reward: the fresh responses need scores"),
        (cfg.own or cfg.rounds == 1 or cfg.rounds <= most_rounds(cfg),
         f"--rounds must be at most --align-steps, each with a batch of prompts: {most_rounds(cfg)} here"),
        (cfg.vocab_size == 0 or 256 <= cfg.vocab_size <= 50_256,
         f"--vocab-size must lie between 256, the bytes, and 50256, got {cfg.vocab_size}"),
        (cfg.vocab_size == 0 or (cfg.tokenizer == "gpt2" and not cfg.init.startswith("gpt2")),
         "--vocab-size is for --tokenizer gpt2 and a model from scratch: released weights need all tokens"),
        (cfg.eps < 0.5, f"--eps must lie in (0, 0.5), got {cfg.eps}"),
        (min(cfg.num_candidates) >= 2 and (max(cfg.num_candidates) <= cfg.responses or cfg.own),
         f"--num-candidates must lie between 2 and --responses {cfg.responses}, got {cfg.num_candidates}"),
        (not cfg.own or cfg.reward == "model",
         "--reward oracle: a file of preferences has no oracle, its reward model judges"),
        (cfg.own or 2 <= cfg.rm_responses <= cfg.responses - 2,
         f"--rm-responses {cfg.rm_responses} must be at least 2, and two less than --responses "
         f"{cfg.responses}: they are what the reward model is checked by"),
        (cfg.init or cfg.n_embd % cfg.n_head == 0,
         f"--n-embd {cfg.n_embd} must be a multiple of --n-head {cfg.n_head}"),
        (len(set(cfg.seeds)) == len(cfg.seeds), f"--seeds must be different, got {cfg.seeds}"),
    ]
    at_most = [("all", "limit_prompts", "eval_prompts"), ("all", "sft_segments", "sft_steps"),
               ("exo dpo", "checkpoints", "align_steps"),
               ("exo dpo", "align_batch", "prompts"), ("exo dpo", "align_prompts", "prompts"),
               ("ppo", "ppo_batch", "prompts"),
               ("ppo", "checkpoints", "ppo_steps"), ("xpo", "xpo_prompts", "prompts")]
    for methods, small, large in at_most:
        if not cfg.own and (methods == "all" or cfg.method == "all" or cfg.method in methods.split()):
            most = getattr(cfg, large)                    # a user's file bounds its own
            holds = getattr(cfg, small) <= most
            checks.append((holds, f"{flag(small)} must be at most {flag(large)} {most}"))
    return next((sentence for holds, sentence in checks if not holds), None)
