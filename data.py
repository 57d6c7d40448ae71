"""Token ids to learn from: IMDB's reviews, a tiny grammar whose truth is known, or your own preferences.

A review is a list of token ids: its first ids are a prompt, the rest, with the end-of-text id, is a response.
Ids are joined, never strings: a prompt is a prefix of ids, so no token merges across its end.
"""
import functools
import hashlib
import itertools
import json
import lzma
import math
import random
import re
import runpy
import sys
import tarfile
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tiktoken
import torch

from loop import UserError, atomic, barrier, cache_folder, fetch, file_sha256


@dataclass
class Reviews:
    ids: list                                             # n arrays (length,) int32, without end-of-text
    label: np.ndarray                                     # (n,) int8: 1 positive, 0 negative, -1 unlabeled
    prompt_length: np.ndarray                             # (n,) tokens of the prompt

    def __len__(self):
        return len(self.ids)

    def pick(self, index):
        return Reviews([self.ids[i] for i in index], self.label[index], self.prompt_length[index])

    def first(self, n):
        return self.pick(range(len(self))[:n])

    def lengths(self, T):
        return [min(len(ids), T) for ids in self.ids]

    def labeled(self):
        return self.pick(np.flatnonzero(self.label >= 0))

    def shuffled(self, prompt_tokens, generator):
        """Shuffled, labeled ones first; only reviews that are longer than a prompt."""
        order = torch.randperm(len(self), generator=generator).tolist()
        order = [i for i in order if len(self.ids[i]) > prompt_tokens]
        order.sort(key=lambda i: self.label[i] < 0)       # stable
        reviews = self.pick(np.array(order))
        reviews.prompt_length[:] = prompt_tokens
        return reviews

    def behind_stretches(self, T):
        """Stretches of <= T tokens as reviews, then the reviews.  -> Reviews, the number of stretches"""
        pieces = [ids[i:i + T] for ids in self.ids for i in range(0, len(ids), T)]
        label = np.append(np.full(len(pieces), -1), self.label)
        prompt_length = np.append(np.ones(len(pieces), int), self.prompt_length)
        return Reviews(pieces + self.ids, label, prompt_length), len(pieces)


def padded_rows(sequences, prompt_length, T, eos_id):
    """N sequences of ids -> ids (N, t) int64, mask (N, t) bool.  A row is prompt, response, padding (eos_id).

    prompt_length: of all, or (N,) of each.  The mask is True on the response and on the end-of-text id that
    ends it.  A sequence that is cut at T tokens has no end-of-text.
    """
    sequences = [np.append(sequence, eos_id)[:T] for sequence in sequences]
    length = np.array([len(sequence) for sequence in sequences])              # (N,)
    ids = np.full((len(sequences), length.max()), eos_id, dtype=np.int64)     # (N, t)
    for n, sequence in enumerate(sequences):
        ids[n, :len(sequence)] = sequence
    column = np.arange(length.max())                                          # (t,)
    first = np.reshape(prompt_length, (-1, 1))                                # (N, 1), or (1, 1) for all
    mask = (column >= first) & (column < length[:, None])                     # (N, t)
    return torch.from_numpy(ids), torch.from_numpy(mask)


# ---- IMDB --------------------------------------------------------------------------------------------------

IMDB_URL = "http://ai.stanford.edu/~amaas/data/sentiment/aclImdb_v1.tar.gz"
IMDB_SHA256 = "c40f74a18d3b61f90feba1e17730e0d38e8b97c05fde7008942e91923d1658fe"
HIDDEN = r"(?!\.[^/]|__MACOSX)"                            # skips files that operating systems add
IMDB_MEMBER = re.compile(rf"(?:{HIDDEN}[^/]*/)*(train|test)/(pos|neg|unsup)/{HIDDEN}[^/]+\.txt")


def read_imdb(paths):
    """Yields (split, label, text) of the reviews in IMDB's archives (.tar.gz, .tar.xz), read in place.

    split: "train" or "test"; label: 1 positive, 0 negative, None unlabeled; <br /> becomes a newline.
    """
    for path in paths:
        try:
            with tarfile.open(path) as archive:
                files = {member.name: archive.extractfile(member).read() for member in archive
                         if IMDB_MEMBER.fullmatch(member.name)}
        except (OSError, EOFError, tarfile.TarError, zlib.error, lzma.LZMAError) as error:
            reason = str(error).splitlines()[0]
            raise UserError(f"{path} is missing, damaged or not an archive: {reason}") from error
        if not files:
            raise UserError(f"{path} holds no reviews: expected files like aclImdb/train/pos/0_9.txt")
        for name in sorted(files):
            split, folder = IMDB_MEMBER.fullmatch(name).groups()
            text = files[name].decode("utf-8", "replace").replace("<br />", "\n").rstrip()
            yield split, {"pos": 1, "neg": 0, "unsup": None}[folder], text


def imdb_archives(paths):
    """IMDB's archives, the original one downloaded if none is given.  -> paths, their sha256"""
    paths = paths or [fetch(IMDB_URL, "aclImdb_v1.tar.gz", IMDB_SHA256)]
    return paths, [file_sha256(path) for path in paths]


def load_imdb(paths, sha256, encoding):
    """IMDB's reviews as ids -> {"train": Reviews, "test": Reviews}.  Tokenized once, then cached."""
    key = hashlib.sha256(repr([encoding.name, *sha256]).encode()).hexdigest()[:16]
    kept = cache_folder() / f"imdb-{key}.pt"
    if not kept.exists():
        reviews = {"train": ([], []), "test": ([], [])}
        for split, label, text in read_imdb(imdb_archives(paths)[0]):
            ids, labels = reviews[split]
            ids.append(torch.tensor(encoding.encode_ordinary(text), dtype=torch.int32))
            labels.append(-1 if label is None else label)
        with atomic(kept) as file:
            torch.save(reviews, file)
    barrier()
    loaded = {}
    for split, (ids, labels) in torch.load(kept).items():
        ids = [review.numpy() for review in ids]
        loaded[split] = Reviews(ids, np.array(labels, np.int8), np.zeros(len(ids), int))
    return loaded


def gpt2_encoding(vocab_size=50_256):
    """GPT-2's tokenizer, or its first merges, which are a tokenizer by themselves; then end-of-text."""
    whole = tiktoken.get_encoding("gpt2")                 # offline: set TIKTOKEN_CACHE_DIR
    ranks = {token: rank for token, rank in whole._mergeable_ranks.items() if rank < vocab_size}
    return tiktoken.Encoding(f"gpt2-{vocab_size}", pat_str=whole._pat_str, mergeable_ranks=ranks,
                             special_tokens={"<|endoftext|>": vocab_size})


# ---- tiny reviews: a grammar with a known truth ------------------------------------------------------------
#
# A review is a neutral opening, whose first six words are the prompt, and three to five sentences with one or
# two opinions each: +1, -1 or 0 by independent draws.  P(label = 1) = sigmoid(sum of opinions), so that the
# sum is the best possible log-odds.

WHEN = ("Last night,Last week,Last month,Last summer,Last winter,Last spring,Last autumn,Last year,On Monday,"
        "On Tuesday,On Wednesday,On Thursday,On Friday,On Saturday,On Sunday,One evening,One morning,"
        "One afternoon,This morning,This week").split(",")
WHO = ["I", "we", "they", "you", "he", "she"]
SAW = ["watched", "saw", "rented", "finished", "streamed", "borrowed", "caught", "chose"]
THE = ["this", "that", "another"]
FILM = "film movie picture comedy drama thriller western musical documentary mystery".split()
WHERE = ["at home", "with friends", "with my family", "on a train", "in town"]
ASPECT = "plot acting music script ending dialogue pacing camera cast humor story lighting".split()
ADJECTIVE = {+1: "wonderful brilliant moving charming superb delightful clever gripping excellent".split(),
             -1: "terrible boring dull awful clumsy dreadful silly tedious annoying".split(),
             0: "ordinary long quiet simple familiar modern usual".split()}
VERB = {+1: ["loved", "enjoyed", "admired"], -1: ["hated", "disliked", "regretted"],
        0: ["noticed", "expected", "remembered"]}
ADVERB, WHOM = ["really", "quite", "rather", "very"], ["sister", "brother", "friend", "neighbor"]
SENTENCES = ["The {a} was {adv} {+} .", "The {a} was {+} and the {a} was {+} .", "I {~} the {a} .",
             "The {a} was not {-} at all .", "Its {+} {a} and its {+} {a} stayed with me .",
             "My {who} {~} the {+} {a} ."]
NEUTRAL = {"{a}": ASPECT, "{adv}": ADVERB, "{who}": WHOM}
OPINIONATED = {"{+}": ADJECTIVE, "{~}": VERB, "{-}": ADJECTIVE}       # the sentence negates {-}
OPINION = {+1: 0.375, -1: 0.375, 0: 0.25}                 # probabilities in each slot
N_SENTENCES = (3, 4, 5)                                   # with these and SENTENCES: six slots on average


def tiny_reviews(n, seed):
    """Draws n reviews -> texts, labels (n,) int8, sums of opinions (n,) int64: the labels' known log-odds"""
    uniform = random.Random(seed).random                  # random() is the same on every Python version

    def pick(choices):
        return choices[int(uniform() * len(choices))]

    texts, labels, counts = [], np.empty(n, np.int8), np.zeros(n, np.int64)
    for i in range(n):
        words = [pick(choices) for choices in (WHEN, WHO, SAW, THE, FILM, WHERE)] + ["."]
        for _ in range(pick(N_SENTENCES)):
            for word in pick(SENTENCES).split():
                choices = NEUTRAL.get(word, [word])
                if word in OPINIONATED:
                    u = uniform()
                    opinion = 1 if u < OPINION[1] else -1 if u < OPINION[1] + OPINION[-1] else 0
                    counts[i] += -opinion if word == "{-}" else opinion
                    choices = OPINIONATED[word][opinion]
                words.append(pick(choices))
        texts.append(" ".join(words))
        labels[i] = uniform() < 1 / (1 + np.exp(-counts[i]))
    return texts, labels, counts


@functools.cache
def sentence_pattern():
    """A regular expression of all that SENTENCES can generate, period included."""
    def words(word):
        opinions = OPINIONATED.get(word)
        choices = sum(opinions.values(), []) if opinions else NEUTRAL.get(word, [word])
        return f"(?:{'|'.join(map(re.escape, choices))})"

    return re.compile("|".join(" ".join(map(words, text.split())) for text in SENTENCES))


def faulty(text):
    """The share of a response's sentences that the grammar cannot generate, unfinished ones included."""
    sentences = [sentence.strip() for sentence in re.findall(r"[^.]+\.?", text)]
    if sentences and sentences[0].removesuffix(" .") in WHERE:        # the rest of the opening
        sentences = sentences[1:]
    wrong = [sentence for sentence in sentences if not sentence_pattern().fullmatch(sentence)]
    return len(wrong) / max(1, len(sentences))


def tiny_encoding():
    """A tokenizer of the grammar's words, with and without a leading space; any other word becomes bytes."""
    opinions = [*ADJECTIVE.values(), *VERB.values()]
    lists = [WHEN, WHO, SAW, THE, FILM, WHERE, ASPECT, ADVERB, WHOM, SENTENCES, *opinions]
    words = " ".join(text for texts in lists for text in texts).split()
    ranks = {bytes([b]): b for b in range(256)}           # tiktoken panics on a vocabulary that lacks a byte
    for word in sorted(set(words)):
        if not word.startswith("{"):
            ranks.setdefault(word.encode(), len(ranks))
            ranks.setdefault(b" " + word.encode(), len(ranks))
    return tiktoken.Encoding("tiny", pat_str=r" ?\w+| ?[^\s\w]+|\s", mergeable_ranks=ranks,
                             special_tokens={"<|endoftext|>": len(ranks)})


def load_tiny(n_train, n_test, encoding):
    """The grammar's reviews as ids -> {"train": Reviews, "test": Reviews}, always the same ones."""
    reviews = {}
    for split, n in (("train", n_train), ("test", n_test)):
        texts, labels, _ = tiny_reviews(n, seed=split)
        ids = [np.array(review, dtype=np.int32) for review in encoding.encode_ordinary_batch(texts)]
        reviews[split] = Reviews(ids, labels, np.zeros(n, int))
    return reviews


# ---- your own preferences: a .jsonl file, a JSON object on each line, all of one kind --------------------
#
#     {"prompt": "...", "chosen": "...", "rejected": "..."}
#     {"prompt": "...", "responses": ["...", ...], "rewards": [0.3, ...]}    K of each, the same K in all rows
#
# Prompt and response are tokenized separately, and joined as they are: start each response with a space.

@dataclass
class Preference:
    prompt: list                                          # ids
    responses: list                                       # K lists of ids, the best first, the worst second
    rewards: list                                         # K floats; of a pair 1 and 0

    @property
    def split(self):
        """One prompt in ten is held out, whatever the order of the lines; a prompt's lines go together."""
        digest = hashlib.sha256(repr(self.prompt).encode()).hexdigest()
        return "test" if int(digest, 16) % 10 == 0 else "train"


def read_preferences(path, encoding, prompt_tokens, new_tokens):
    """A .jsonl file -> {"train": list of Preference, "test": ...}, tokens of the longest prompt and response.

    Responses are at most `new_tokens` long.  UserError names a faulty line, such as one with more than
    `prompt_tokens` in its prompt.
    """
    preferences = []
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                text = line.decode("utf-8-sig")           # with or without a byte order mark
                new = read_preference(json.loads(text), encoding)
                if len(new.prompt) > prompt_tokens:
                    raise ValueError(f"a prompt of {len(new.prompt):,} tokens: raise --prompt-tokens")
                preferences.append(new)
                K, first_K = len(new.responses), len(preferences[0].responses)
                if K != first_K:
                    raise ValueError(f"{K} responses, the first line has {first_K}")
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise UserError(f"{path}:{number}: {error!r}: fix or remove this line") from error
    tokens = [[len(each.prompt), max(map(len, each.responses)) + 1] for each in preferences] or [[0, 0]]
    longest, row = np.max(tokens, axis=0), np.argmax(tokens, axis=0) + 1
    print(f"{path}: {len(tokens):,} rows; the longest prompt has {longest[0]:,} tokens (row {row[0]}), the "
          f"longest response {longest[1]:,} (row {row[1]})")
    prompt_tokens, new_tokens = int(longest[0]), int(min(longest[1], new_tokens))
    split = {"train": [], "test": []}
    for each in preferences:
        room = prompt_tokens + new_tokens - len(each.prompt)
        if each.responses[0][:room] != each.responses[1][:room]:
            split[each.split].append(each)
    equal = len(preferences) - len(split["train"]) - len(split["test"])
    if equal:
        print(f"{path}: {equal:,} rows are left out: best and worst response are equal once cut")
    if min(map(len, split.values())) < 2:
        raise UserError(f"{path}: too few prompts to hold out a tenth: add more")
    return split, prompt_tokens, new_tokens


def read_preference(line, encoding):
    """A line's object -> Preference"""
    if "chosen" in line:
        texts, rewards = [line["chosen"], line["rejected"]], [1.0, 0.0]
    else:
        texts, rewards = line["responses"], [float(reward) for reward in line["rewards"]]
    if len(texts) != len(rewards) or len(texts) < 2 or not line["prompt"] or not all(texts):
        raise ValueError("an empty text, fewer than two responses, or not a reward for each")
    if not np.isfinite(rewards).all():
        raise ValueError("a reward that is not a finite number")
    order = sorted(range(len(texts)), key=lambda i: -rewards[i])
    order.insert(1, order.pop())                          # the best, the worst, the others
    responses = [encoding.encode_ordinary(texts[i]) for i in order]
    return Preference(encoding.encode_ordinary(line["prompt"]), responses, [rewards[i] for i in order])


def user_judge(judge):
    """--judge FILE.py:NAME -> a function of prompts and responses, lists of texts, that gives their rewards.

    UserError if it is not there, fails, or gives anything but a finite number for each response.
    """
    path, _, name = judge.rpartition(":")
    folder = Path(path).resolve().parent

    @functools.cache
    def function():
        same_name = [module for module in sys.modules if (folder / f"{module}.py").exists()]
        ours = {module: sys.modules.pop(module) for module in same_name}
        sys.path.insert(0, str(folder))                   # it may import its neighbors, even a data.py
        try:
            return runpy.run_path(path)[name]
        finally:
            sys.modules.update(ours)

    def rewards_of(prompts, responses):
        try:
            rewards = function()(prompts, responses)
            rewards = [reward.item() if hasattr(reward, "item") else reward for reward in rewards]
        except Exception as error:                        # whatever it is, it is the user's
            raise UserError(f"--judge {judge} fails on {responses[0]!r} and others: {error!r}") from error
        for response, reward in itertools.zip_longest(responses, rewards):
            if response is None or not isinstance(reward, int | float) or not math.isfinite(reward):
                raise UserError(f"--judge {judge} gives {reward!r} for the response {response!r}: it must "
                                "return a list with a finite number for each response")
        return rewards
    return rewards_of


def best_responses(preferences):
    """The texts that SFT learns.  list of Preference -> Reviews"""
    prompt_length = np.array([len(each.prompt) for each in preferences])
    ids = [each.prompt + each.responses[0] for each in preferences]
    return Reviews(ids, np.full(len(ids), -1), prompt_length)
