"""A run: its settings, folder, device, tokenizer, and its reviews or a user's preferences.

`Run` is what every stage gets.  `open_run` finds it again from its folder, `alignments` what was trained.
"""
import math
import runpy
import sys
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch

import data
from checkpoint import finished, read_json, write_json
from compute import UserError, arithmetic, pick_device, rng
from evaluate import read_csv
from model import GPT, ScalarGPT
from settings import Config, most_rounds


class Run:
    """What every stage needs: settings, folder, device and precision, tokenizer, reviews, models."""

    def __init__(self, cfg, device, bf16):
        self.cfg = cfg
        self.folder = Path(cfg.run)
        self.device = device
        self.bf16 = bf16
        tiny = cfg.tokenizer == "tiny"
        self.encoding = data.tiny_encoding() if tiny else data.gpt2_encoding(cfg.vocab_size)
        self.eos_id = self.encoding.eot_token

    @property
    def own(self):
        return self.cfg.own

    @property
    def block_size(self):
        return self.cfg.prompt_tokens + self.cfg.new_tokens

    def names(self, *names):
        """What a stage's random numbers depend on: its name and --pipeline."""
        return ("pipeline", self.cfg.pipeline, *names) if self.cfg.pipeline else names

    def settings(self, *stages):
        """The settings that the artifact of one of these stages depends on, beside its upstream."""
        precision = "bf16" if self.bf16 else f"float32 {self.cfg.matmul}"
        settings = {"precision": precision} | self.cfg.of(*stages)
        if self.cfg.judge and {"limit", "reference", "align"} & set(stages):
            content = data.file_sha256(self.cfg.judge.rpartition(":")[0])
            settings["judge"] = f"{self.cfg.judge} {content[:8]}"
        return settings

    @property
    def judged_by(self):
        """Whose rewards evaluate: "judge" (--judge), "rm" (a file's reward model) or "oracle"."""
        if self.cfg.judge:
            return "judge"
        return "rm" if self.own else "oracle"

    @cached_property
    def judge(self):
        """--judge's function: (prompts, responses), lists of n texts -> n rewards."""
        path, _, name = self.cfg.judge.rpartition(":")
        if not Path(path).is_file():
            raise UserError(f"--judge {self.cfg.judge} is not there: name a file and its function, as "
                            "my_reward.py:score")
        sys.path.insert(0, str(Path(path).parent))        # it may import what lies beside it
        function = runpy.run_path(path).get(name)
        if not callable(function):
            raise UserError(f"--judge {self.cfg.judge} is not there: the file has no function of this name")
        return function

    @cached_property
    def source(self):
        """What identifies the reviews."""
        if self.own:
            return [data.file_sha256(path) for path in (self.cfg.data, self.cfg.eval_data) if path]
        if self.cfg.data == "tiny":
            return "grammar 2"
        return data.imdb_key(self.cfg.imdb, self.encoding)[1]

    @cached_property
    def reviews(self):
        """{"train", "test"}: reviews longer than a prompt, shuffled; in "train" the labelled ones come first.

        Of a file of preferences: the prompts with their best responses, in the file's order.
        """
        if self.own:
            return {split: best_responses(rows) for split, rows in self.preferences.items()}
        cfg = self.cfg
        if cfg.data == "tiny":
            both = data.load_tiny(cfg.sft_reviews, cfg.test_reviews, self.encoding)
        else:
            both = data.load_imdb(cfg.imdb, self.encoding)
        reviews = {}
        for split in both:
            generator = rng(*self.names("reviews", split))
            reviews[split] = shuffled(both[split], split, generator, cfg.prompt_tokens)
        train = reviews["train"]
        needed = [("--sft-reviews", cfg.sft_reviews, len(train)),
                  ("--prompts", cfg.prompts, int((train.label >= 0).sum()))]
        if cfg.eval_split == "test":
            needed.append(("--eval-prompts", cfg.eval_prompts, len(reviews["test"])))
        else:
            needed.append(("--prompts with --eval-prompts", cfg.prompts + cfg.eval_prompts, len(train)))
        for flag, asked, there in needed:
            if asked > there:
                raise UserError(f"{flag} asks for {asked:,} reviews, and there are {there:,}: lower it, or "
                                "provide more reviews")
        return reviews

    @property
    def evaluated(self):
        """Reviews whose prompts policies are evaluated on: test ones, or training ones from the end."""
        if self.cfg.eval_split == "test":
            return self.reviews["test"]
        train = self.reviews["train"]
        return train.pick(range(len(train))[::-1])

    def prompts(self, reviews, n):
        """The first ids of the first n reviews, a list of lists."""
        first = reviews.pick(range(n))
        return [review[:start].tolist() for review, start in zip(first.ids, first.start)]

    def train_prompts(self):
        """Those that the methods align on."""
        return self.prompts(self.reviews["train"], self.cfg.prompts)

    @cached_property
    def preferences(self):
        """{"train", "test"}: rows of the user's file, the best response first, the worst second."""
        cfg = self.cfg
        longest = cfg.prompt_tokens or None
        train = data.read_preferences(cfg.data, self.encoding, longest, cfg.skip_long)
        if cfg.eval_data:
            test = data.read_preferences(cfg.eval_data, self.encoding, longest, cfg.skip_long)
            kinds = {(row.rewards is None, len(row.responses)) for row in [*train, *test]}
            if len(kinds) > 1:
                raise UserError(f"{cfg.data} and {cfg.eval_data} must hold rows of the same kind, with as "
                                "many responses each")
        else:
            train, test = data.split_rows(train, cfg.held_out)
        return {"train": data.best_first(train), "test": data.best_first(test)}

    @property
    def scored(self):
        """Whether a user's file gives rewards, not only pairs."""
        return self.own and self.preferences["train"][0].rewards is not None

    def rows(self, reviews):
        ids, mask = data.rows(reviews.ids, reviews.start, self.block_size, self.eos_id)
        return ids.to(self.device), mask.to(self.device)                                 # (N, T), (N, T)

    def policy(self, folder):
        return self.placed(GPT.from_pretrained(folder))

    def save_policy(self, gpt, folder):
        """Weights, tokenizer and how it samples, as transformers opens them.  -> model.safetensors' sha256"""
        end = {"bos_token_id": self.eos_id, "eos_token_id": self.eos_id, "pad_token_id": self.eos_id}
        sampling = {"do_sample": True, "temperature": self.cfg.temperature, "top_k": 0, "top_p": 1.0,
                    "max_length": self.block_size}
        names = dict.fromkeys(("bos_token", "eos_token", "pad_token"), "<|endoftext|>")
        write_json(folder / "tokenizer.json", data.tokenizer_json(self.encoding))
        write_json(folder / "tokenizer_config.json", {"tokenizer_class": "PreTrainedTokenizerFast"} | names)
        write_json(folder / "generation_config.json", sampling | end)
        return gpt.save_pretrained(folder, self.eos_id)

    def placed(self, gpt):
        """A model on the device, in its arithmetic, compiled block by block where --compile asks for it."""
        gpt = gpt.to(self.device)
        gpt.bf16 = self.bf16
        if self.cfg.compile:
            for block in gpt.h:
                block.compile(dynamic=True)               # rows of every length by one program
        return gpt

    def scorer(self, folder):
        scorer = ScalarGPT.from_pretrained(folder, self.eos_id).to(self.device)
        scorer.transformer.bf16 = self.bf16
        return scorer

    def at_once(self, rows_each=1):
        """How many examples of rows_each rows make a micro-batch of --micro-batch-size rows; 0: all."""
        if self.cfg.micro_batch_size == 0:
            return 0
        return max(1, self.cfg.micro_batch_size // rows_each)


def shuffled(reviews, split, generator, prompt_tokens):
    """Reviews in random order, the labelled ones first, without those that are not longer than a prompt."""
    long = np.array([len(ids) > prompt_tokens for ids in reviews.ids], dtype=bool)
    if not long.all():
        print(f"{split}: {(~long).sum():,} of {len(reviews):,} reviews skipped: not longer than a prompt")
    order = torch.randperm(len(reviews), generator=generator).numpy()
    order = order[long[order]]
    unlabelled = reviews.label[order] < 0
    reviews = reviews.pick(order[np.argsort(unlabelled, kind="stable")])
    reviews.start = prompt_tokens
    return reviews


def open_run(folder):
    """The run that train.py left in `folder`, with its settings, on CUDA where it is there and allowed."""
    folder = Path(folder)
    config = read_json(folder / "config.json") if (folder / "config.json").exists() else {}
    if "new_tokens" not in config:                        # a model's folder has a config.json too
        raise UserError(f"{folder} is not a run folder: name one that train.py has made")
    cfg = Config(**config | {"run": str(folder)})
    device = pick_device("cuda" if torch.cuda.is_available() and cfg.device in ("auto", "cuda") else "cpu")
    bf16 = None                                           # or as it was trained, also on another device
    if finished(folder / "sft"):
        bf16 = read_json(folder / "sft" / "stage.json")["settings"]["precision"] == "bf16"
    return Run(cfg, device, arithmetic(device, cfg.matmul, bf16))


@dataclass
class Aligned:
    """An alignment in a run's folder: what stage.json says of it, eval.csv's rows, its last checkpoint."""
    folder: Path
    about: dict                                        # what train.Training.about wrote
    rows: list
    last: Path

    @property
    def samples(self):
        """The file of its last checkpoint's responses."""
        return self.folder / "samples" / f"{self.last.name}.safetensors"

    def still_has_weights(self):
        """Whether its last checkpoint is there; says so where it was removed."""
        there = (self.last / "model.safetensors").exists()
        if not there:
            print(f"{self.last} has no weights any more, so it is left out here")
        return there

    @property
    def method(self):
        """As it is called: XPO without its bonus is online DPO."""
        online_dpo = self.about["method"] == "xpo" and self.about["alpha"] == 0
        return "online-dpo" if online_dpo else self.about["method"]


def alignments(folder, unfinished=False):
    """The finished alignments of a run folder, ordered by name; also those under way."""
    aligned = []
    for path in sorted(Path(folder).glob("*/eval.csv")):
        stage = read_json(path.parent / "stage.json")
        rows = read_csv(path)
        if "done" in stage or (unfinished and len(rows) > 1):
            last = path.parent / f"step-{int(rows[-1]['step']):05d}"
            aligned.append(Aligned(path.parent, stage["about"], rows, last))
    return aligned


# ---- a user's file of preferences ---------------------------------------------------------------------

def settle(run):
    """Fits a run's settings to its file: lengths and steps not given (0), sizes that it does not reach.

    Steps have a floor, as a few passes over a small file are too few: on files of 300 pairs, short and long,
    SFT from scratch had its lowest held-out loss after 180 to 300 steps of 300, and 600 brought nothing.
    More than three passes of EXO over such a file cost what the first ones had gained.
    """
    cfg = run.cfg
    train = run.preferences["train"]
    test = run.preferences["test"]
    n, K = len(train), len(train[0].responses)
    if n < 10 or len(test) < 2:
        raise UserError(f"{cfg.data}: {n} rows to train on and {len(test)} held out, 10 and 2 are the least")
    longest_prompt = max(len(row.prompt) for row in [*train, *test])
    longest_response = max(len(response) for row in [*train, *test] for response in row.responses)
    cfg.prompt_tokens = cfg.prompt_tokens or longest_prompt
    cfg.new_tokens = cfg.new_tokens or longest_response + 1               # its end-of-text
    ends = [len(row.prompt) + len(response) for row in train for response in row.responses]
    cut = sum(end >= run.block_size for end in ends)
    if cut:
        print(f"{cfg.data}: {cut:,} of {len(ends):,} responses are cut, at --prompt-tokens and --new-tokens")
    sft_passes, rm_passes, align_passes = (5, 3, 1) if cfg.init else (20, 10, 3)    # paper; ours from scratch
    sft_least, rm_least, align_least = (50, 50, 50) if cfg.init else (300, 100, 25)                     # ours
    cfg.sft_steps = cfg.sft_steps or max(sft_least, math.ceil(sft_passes * n / cfg.sft_batch))
    cfg.rm_steps = cfg.rm_steps or max(rm_least, math.ceil(rm_passes * n / cfg.rm_batch))
    cfg.align_steps = cfg.align_steps or max(align_least, math.ceil(align_passes * n / cfg.align_batch))
    cfg.sft_reviews = cfg.prompts = n
    cfg.align_prompts = min(cfg.align_prompts, n)
    cfg.responses = K
    cfg.num_candidates = sorted({min(asked, K) for asked in cfg.num_candidates})
    cfg.checkpoints = min(cfg.checkpoints, cfg.align_steps)
    cfg.rounds = max(1, min(cfg.rounds, most_rounds(cfg)))
    cfg.eval_prompts = min(cfg.eval_prompts, len(test))
    cfg.limit_prompts = min(cfg.limit_prompts, cfg.eval_prompts)
    cfg.xpo_prompts = min(cfg.xpo_prompts, n)
    cfg.ppo_batch = min(cfg.ppo_batch, n)
    if not run.scored:
        cfg.labels = "argmax"                             # who wins is known
    print(f"{cfg.data}: {n:,} rows to train on, {len(test):,} held out; prompts of up to {cfg.prompt_tokens} "
          f"tokens, responses of up to {cfg.new_tokens}; {cfg.sft_steps:,} steps of SFT, {cfg.rm_steps:,} of "
          f"the reward model, {cfg.align_steps:,} of EXO and DPO")


def best_responses(rows):
    """A file's prompts with their best responses, as reviews."""
    ids = [np.array(row.prompt + row.responses[0], dtype=np.int32) for row in rows]
    start = [len(row.prompt) for row in rows]
    return data.Reviews(ids, np.full(len(rows), -1, np.int8), np.array(start))
