"""Your own preferences: a .jsonl file, one JSON object a line, all lines of one of three kinds.

    {"prompt": "...", "chosen": "...", "rejected": "..."}                  a pair
    {"chosen": "...", "rejected": "..."}                                   a pair of whole texts that begin with one prompt
    {"prompt": "...", "responses": ["...", ...], "rewards": [0.3, ...]}    K responses and their rewards, K the same in all rows

Other keys are ignored.  Texts are taken as they stand: a response follows its prompt without a space, unless it begins with one.
Prompt and response are tokenized apart and their ids joined.  A response has no end-of-text id yet.
"""
import codecs
import hashlib
import json
import math
import os
import re
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from tqdm import tqdm

import data
from files import UserError
from model import sequence_logprob

PAIR, WHOLE, SCORED = "a pair", "a pair without 'prompt'", "responses with rewards"      # the kinds of rows
ASSISTANT = "\n\nAssistant:"                                         # ends the prompt in Anthropic's hh-rlhf
SHOWN = 10                                                           # faulty rows that a message names
TYPES = {str: "text", bool: "true or false", int: "a number", float: "a number", list: "a list", dict: "an object",
         type(None): "null"}


@dataclass
class Row:
    prompt: list                                                     # ids
    responses: list                                                  # K lists of ids; of a pair the first is the chosen one
    rewards: list | None                                             # K floats; None for a pair
    line: int                                                        # where the row stands in its file, from 1


def read_preferences(path, encoding, prompt_tokens=None):
    """Reads a .jsonl file -> a list of Row.  prompt_tokens: the longest prompt, in tokens; None for any length.

    One UserError names every row that cannot be used, up to ten of them by file, line and reason.

    Where more than half of a file's rows repeat their prompt at the start of each text, it is cut off them.  In a file where a few
    do, nothing is cut: to the prompt "Hi", "Hi there!" is a response.
    """
    path = Path(path)
    lines, found, bad, rows = read_lines(path), {}, {}, []
    for number, line in lines.items():
        try:
            found[number] = parse(line)
        except UserError as error:
            bad[number] = error
    repeated = {number for number, (_, prompt, texts, _) in found.items() if all(t.startswith(prompt) for t in texts.values())}
    cut = 2 * len(repeated) > len(found)
    first = next(iter(found), None)                                  # the row that all others must be like
    for number, (kind, prompt, texts, rewards) in tqdm(found.items(), desc=f"tokenize {path.name}", unit=" rows", delay=2):
        try:
            if kind != found[first][0]:
                raise UserError(f"{kind}, where line {first} holds {found[first][0]}: a file has one kind of rows")
            if len(texts) != len(found[first][2]):
                raise UserError(f"{len(texts)} responses, where line {first} has {len(found[first][2])}: K is the same in all rows")
            if cut and number not in repeated:
                raise UserError("its texts do not begin with its prompt, as those of most rows do")
            for name, text in texts.items():
                texts[name] = text[len(prompt):] if cut else text
                if not texts[name].strip():
                    raise UserError(f"'{name}' is empty after the prompt")
            ids = encoding.encode_ordinary(prompt)
            if prompt_tokens is not None and len(ids) > prompt_tokens:
                raise UserError(f"a prompt of {len(ids):,} tokens, where at most {prompt_tokens:,} fit: raise --prompt-tokens, or "
                                "shorten it")
            rows.append(Row(ids, [encoding.encode_ordinary(text) for text in texts.values()], rewards, number))
        except UserError as error:
            bad[number] = error
    if bad:
        them = "them" if len(bad) > 1 else "it"
        raise UserError("\n".join([f"{len(bad):,} of {len(lines):,} rows of {path} cannot be used: mend or remove {them}",
                                   *[f"{path}:{number}: {bad[number]}" for number in sorted(bad)[:SHOWN]],
                                   *[f"... and {len(bad) - SHOWN:,} more"] * (len(bad) > SHOWN)]))
    if all(row.rewards and min(row.rewards) == max(row.rewards) for row in rows):
        raise UserError(f"{path}: in every row all rewards are equal, so there is nothing to prefer: give rewards that differ")
    if cut and found[first][0] != WHOLE:
        print(f"{path}: texts begin with their row's prompt, which is cut off them")
    return rows


def read_lines(path):
    """{line number, from 1: its bytes} of a file's lines that are not blank."""
    if path.is_dir():
        raise UserError(f"{path} is a folder: name a .jsonl file of preferences in it")
    try:
        blob = path.read_bytes().removeprefix(codecs.BOM_UTF8)
    except FileNotFoundError as error:
        raise UserError(f"{path} does not exist: name a .jsonl file of preferences") from error
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error
    if blob.startswith(b"\x1f\x8b"):
        raise UserError(f"{path} is compressed: unpack it first, by gunzip")
    lines = {number: line for number, line in enumerate(blob.split(b"\n"), 1) if line.strip()}   # JSON skips a carriage return
    if not lines:
        raise UserError(f"{path} is empty: it must hold a JSON object a line")
    return lines


def parse(line):
    """A line (bytes) -> kind, prompt, {name: text}, rewards or None.  UserError, without a place, where it is faulty.

    Of a pair of whole texts the prompt is found here; it is still part of the texts.
    """
    try:
        row = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise UserError(f"not UTF-8 text (byte {error.start + 1} of the line)") from error
    except json.JSONDecodeError as error:
        raise UserError(f"not JSON ({error.msg}: column {error.colno})") from error
    except (ValueError, RecursionError) as error:                    # Python's own bounds: 4,300 digits, nesting
        raise UserError("not JSON that can be read: a number is too long, or the nesting too deep") from error
    if not isinstance(row, dict):
        raise UserError(f"{TYPES[type(row)]}, where an object {{\"prompt\": ...}} must stand")
    if "chosen" in row or "rejected" in row:
        kind, needed = (PAIR, ("prompt", "chosen", "rejected")) if "prompt" in row else (WHOLE, ("chosen", "rejected"))
    elif "responses" in row or "rewards" in row:
        kind, needed = SCORED, ("prompt", "responses", "rewards")
    else:
        raise UserError("neither 'chosen' and 'rejected' nor 'responses' and 'rewards' are among its keys")
    if missing := [name for name in needed if name not in row]:
        raise UserError(f"missing key '{missing[0]}'")
    if kind == SCORED:
        return kind, checked("prompt", row["prompt"]), *scored(row["responses"], row["rewards"])
    texts = {name: checked(name, row[name]) for name in needed}
    chosen, rejected = texts["chosen"], texts["rejected"]
    if chosen == rejected:
        raise UserError("'chosen' and 'rejected' are equal")
    prompt = texts.get("prompt") or shared_prompt(chosen, rejected)
    if not prompt.strip():
        raise UserError("'chosen' and 'rejected' do not begin with the same words: give the prompt as 'prompt'")
    return kind, prompt, {"chosen": chosen, "rejected": rejected}, None


def checked(name, text):
    """A value that must be a text with something in it."""
    if isinstance(text, list) and text and all(isinstance(message, dict) for message in text):
        raise UserError(f"'{name}' is a list of messages: make one text of them by your chat template")
    if not isinstance(text, str):
        raise UserError(f"'{name}' must be text, and is {TYPES[type(text)]}")
    if not text.strip():
        raise UserError(f"'{name}' {'holds only blanks' if text else 'is empty'}")
    if half := re.search("[\ud800-\udfff]", text):                   # legal JSON, but no text: it cannot be tokenized
        raise UserError(f"'{name}' holds half of a character (\\u{ord(half[0]):x})")
    return text


def scored(responses, rewards):
    """The two lists of a row -> {name: text}, rewards as floats."""
    for name, value in (("responses", responses), ("rewards", rewards)):
        if not isinstance(value, list):
            raise UserError(f"'{name}' must be a list, and is {TYPES[type(value)]}")
    if len(responses) != len(rewards) or len(responses) < 2:
        raise UserError(f"'responses' holds {len(responses)} and 'rewards' {len(rewards)}: both must hold as many, at least 2")
    for i, reward in enumerate(rewards, 1):
        if isinstance(reward, bool) or not isinstance(reward, int | float):
            raise UserError(f"reward {i} must be a number, and is {TYPES[type(reward)]}")
        if not abs(reward) < 1e38:                                   # float32 ends soon after; NaN is not below it either
            raise UserError(f"reward {i} is not finite (in float32)")
    return {f"response {i}": checked(f"response {i}", text) for i, text in enumerate(responses, 1)}, list(map(float, rewards))


def shared_prompt(chosen, rejected):
    """The prompt that two whole texts begin with: up to the last "\\n\\nAssistant:" that they share, else their shared words.

    The cut is before a blank, where tokens begin: the response keeps its leading space, and in ordinary text the joined ids are
    those of the whole.
    """
    shared = os.path.commonprefix([chosen, rejected])
    if ASSISTANT in shared:
        return shared[:shared.rindex(ASSISTANT) + len(ASSISTANT)]
    words = re.match(r"(.*)\s", shared, re.DOTALL)                   # greedy: up to the last blank
    return words[1] if words else ""


def best_first(rows):
    """Rows with the best response first and the worst second, the others as they stood; a row of equal rewards says nothing."""
    found = []
    for row in rows:
        order = list(range(len(row.responses)))
        if row.rewards:
            if min(row.rewards) == max(row.rewards):
                continue
            ends = [row.rewards.index(max(row.rewards)), row.rewards.index(min(row.rewards))]
            order = ends + [i for i in order if i not in ends]
        found.append(Row(row.prompt, [row.responses[i] for i in order], row.rewards and [row.rewards[i] for i in order], row.line))
    if not found:
        raise UserError("all rewards of the rows to train on, or of those held out, are equal: give rows whose rewards differ")
    return found


def split(rows, held_out, seed=0):
    """Divides rows by their prompts -> the rows to train on, the held-out rows, both in their order.

    held_out: a share of the rows in [0, 1), met as closely as whole prompts allow: a prompt's rows are all on one side.  Which
    prompts are held out depends on the seed and the prompts alone, not on the rows' order.
    """
    count = {}
    for row in rows:
        count[tuple(row.prompt)] = count.get(tuple(row.prompt), 0) + 1
    if held_out and len(count) < 2:
        raise UserError("all rows have the same prompt, so none can be held out: give rows with other prompts")
    order = sorted(count, key=lambda prompt: hashlib.sha256(repr((seed, prompt)).encode()).digest())
    left, held = held_out * len(rows), set()
    for prompt in order[:-1]:                                        # one prompt is always trained on
        if count[prompt] < 2 * left:                                 # it brings the share closer
            held.add(prompt)
            left -= count[prompt]
    if held_out and not held:
        held = {min(order, key=count.get)}
    return [row for row in rows if tuple(row.prompt) not in held], [row for row in rows if tuple(row.prompt) in held]


def settle(run):
    """Fits a run's settings to its file: lengths and steps that were not given (0), sizes that the file does not reach."""
    cfg, (train, test) = run.cfg, run.preferences.values()
    K, both = len(train[0].responses), [*train, *test]
    cfg.prompt_tokens = cfg.prompt_tokens or max(len(row.prompt) for row in both)
    cfg.new_tokens = cfg.new_tokens or 1 + max(len(response) for row in both for response in row.responses)
    cfg.sft_reviews, cfg.prompts, cfg.responses = len(train), len(train), K
    sft, rm, align = (5, 3, 1) if cfg.init else (20, 10, 10)         # passes: the paper's; ours from scratch
    cfg.sft_steps = cfg.sft_steps or math.ceil(sft * len(train) / cfg.sft_batch)
    cfg.rm_steps = cfg.rm_steps or math.ceil(rm * len(train) / cfg.rm_batch)
    cfg.align_steps = cfg.align_steps or math.ceil(align * len(train) / cfg.align_batch)
    cfg.checkpoints = min(cfg.checkpoints, cfg.align_steps)
    cfg.eval_prompts = min(cfg.eval_prompts, len(test))
    cfg.limit_prompts, cfg.xpo_prompts = min(cfg.limit_prompts, cfg.eval_prompts), min(cfg.xpo_prompts, len(train))
    cfg.ppo_batch, cfg.num_candidates = min(cfg.ppo_batch, len(train)), sorted({min(k, K) for k in cfg.num_candidates})
    if not run.scored:
        cfg.labels = "argmax"                                        # who wins is known
    print(f"{cfg.data}: {len(train):,} rows to train on, {len(test):,} held out; prompts of up to {cfg.prompt_tokens} tokens, "
          f"responses of up to {cfg.new_tokens}; {cfg.sft_steps:,} steps of SFT, {cfg.rm_steps:,} of the reward model, "
          f"{cfg.align_steps:,} of EXO and DPO")


@torch.no_grad()
def table(run, split):
    """A run's rows as `stages.draw` gives pi_sft's: {ids, mask: (P, K, T), ref_logp, reward: (P, K)}; a pair's rewards are 1, 0."""
    rows, policy = run.preferences[split], run.policy(run.folder / "sft")
    texts = [(row.prompt + response, len(row.prompt)) for row in rows for response in row.responses]
    ids, mask = data.rows(*zip(*texts), run.block_size, run.eos_id)                         # (P K, t), (P K, t)
    logp = torch.cat([sequence_logprob(policy, i.to(run.device), m.to(run.device), run.cfg.temperature).cpu()
                      for i, m in zip(ids.split(64), mask.split(64))])                      # (P K,)
    room = (0, run.block_size - ids.shape[1])
    flat = {"ids": F.pad(ids, room, value=run.eos_id).int(), "mask": F.pad(mask, room), "ref_logp": logp}
    reward = torch.tensor([row.rewards or [1.0, 0.0] for row in rows])                      # (P, K)
    return {"reward": reward} | {name: x.unflatten(0, reward.shape) for name, x in flat.items()}
