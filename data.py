"""Token ids to learn from: IMDB's reviews, a tiny grammar whose truth is known, or your own preferences.

A review is a list of token ids: its first ids are a prompt, the rest, with the end-of-text id, is a response.
Ids are joined, never strings: a prompt is a prefix of ids, so no token merges across its end.
"""
import functools
import hashlib
import json
import lzma
import os
import random
import re
import shutil
import tarfile
import urllib.request
import zlib
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tiktoken
import torch
from tqdm import tqdm

from checkpoint import read_tensors, write_tensors
from compute import UserError, on_first


@dataclass
class Reviews:
    ids: list                                             # n arrays (length,) int32, without end-of-text
    label: np.ndarray                                     # (n,) int8: 1 positive, 0 negative, -1 unlabelled
    start: np.ndarray | int = 0                           # tokens of the prompt: of all, or (n,) of each

    def __len__(self):
        return len(self.ids)

    def pick(self, index):
        start = np.broadcast_to(self.start, len(self))    # (n,)
        return Reviews([self.ids[i] for i in index], self.label[index], start[index])


def segments(reviews, length):
    """Every stretch of `length` tokens of the reviews, the last ones shorter, as reviews of their own."""
    pieces = [ids[i:i + length] for ids in reviews.ids for i in range(0, len(ids), length)]
    return Reviews(pieces, np.full(len(pieces), -1, np.int8), np.ones(len(pieces), int))


def rows(reviews, prompt_tokens, block_size, eos_id):
    """N sequences of ids -> ids (N, T) int64, mask (N, T) bool.  A row is prompt, response, padding (eos_id).

    prompt_tokens: of all, or (N,) of each.  The mask is True on the response and on the end-of-text id that
    ends it.  A sequence that is cut at block_size has none.
    """
    reviews = [np.append(review, eos_id)[:block_size] for review in reviews]
    length = np.array([len(review) for review in reviews])                    # (N,)
    ids = np.full((len(reviews), length.max()), eos_id, dtype=np.int64)       # (N, T)
    for n, review in enumerate(reviews):
        ids[n, :len(review)] = review
    column = np.arange(length.max())                                          # (T,)
    start = np.reshape(prompt_tokens, (-1, 1))                                # (N, 1), or (1, 1) for all
    mask = (column >= start) & (column < length[:, None])                     # (N, T)
    return torch.from_numpy(ids), torch.from_numpy(mask)


# ---- IMDB --------------------------------------------------------------------------------------------------

IMDB_URL = "http://ai.stanford.edu/~amaas/data/sentiment/aclImdb_v1.tar.gz"
IMDB_SHA256 = "c40f74a18d3b61f90feba1e17730e0d38e8b97c05fde7008942e91923d1658fe"
IMDB_MEMBER = re.compile(r"(?:.*/)?(train|test)/(pos|neg|unsup)/[^/]+\.txt")
IMDB_LABEL = {"pos": 1, "neg": 0, "unsup": None}


def read_imdb(paths):
    """Yields (split, label, text) of the reviews in IMDB's archives (.tar.gz, .tar.xz) or folders, by name.

    split: "train" or "test"; label: 1 positive, 0 negative, None unlabelled; text: <br /> becomes a newline,
    trailing blanks are cut.  UserError if an archive is damaged, or holds no reviews.
    """
    if isinstance(paths, str | Path):
        paths = [paths]
    for path in paths:
        texts = dict(members(Path(path)))                 # {name: bytes}
        matches = [IMDB_MEMBER.fullmatch(name) for name in sorted(texts)]
        if not any(matches):
            raise UserError(f"{path} holds no reviews: expected files like aclImdb/train/pos/0_9.txt")
        for match in filter(None, matches):
            text = texts[match[0]].decode("utf-8", errors="replace")
            yield match[1], IMDB_LABEL[match[2]], text.replace("<br />", "\n").rstrip()


def members(path):
    """Yields (name, bytes) of the files in an archive, without extracting it, or of a folder's .txt files."""
    if path.is_dir():
        for file in sorted(path.rglob("*.txt")):
            yield f"{path.name}/{file.relative_to(path).as_posix()}", file.read_bytes()
        return
    try:
        with tarfile.open(path) as archive:
            for member in archive:
                if member.name.startswith("/") or ".." in Path(member.name).parts:
                    raise UserError(f"{path}: {member.name} lies outside of the archive: take a fresh copy")
                if member.isfile():
                    yield member.name, archive.extractfile(member).read()
            while archive.fileobj.read(1 << 20):          # gzip checks its checksum only at the very end
                pass
    except (OSError, EOFError, tarfile.TarError, zlib.error, lzma.LZMAError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{path} is missing, damaged or not an archive ({reason}): name IMDB's archives or "
                        "folders by --imdb, or take a fresh copy") from error


def imdb_key(paths, encoding):
    """-> paths of the reviews (none given: IMDB's archive, downloaded once), hash of tokenizer and content"""
    if not paths:
        paths = [fetch(IMDB_URL, cache_folder() / "aclImdb_v1.tar.gz", 84_125_825, IMDB_SHA256,
                       hint="name the archive or its extracted folder by --imdb PATH, or use --preset tiny")]
    paths = [Path(path) for path in paths]
    digest = hashlib.sha256(encoding.name.encode())
    for path in paths:
        if path.is_file():
            digest.update(file_sha256(path).encode())
            continue
        for name, text in members(path):
            digest.update(name.encode() + hashlib.sha256(text).digest())
    return paths, digest.hexdigest()[:16]


def load_imdb(paths, encoding):
    """IMDB's reviews as ids -> {"train": Reviews, "test": Reviews}.  They are tokenized once, and kept."""
    paths, key = imdb_key(paths, encoding)
    cached = cache_folder() / f"imdb-{key}.safetensors"
    tokenize_imdb(paths, encoding, cached)
    columns = {name: column.numpy() for name, column in read_tensors(cached)[0].items()}
    ids = np.split(columns["ids"], columns["length"].cumsum()[:-1])
    reviews = Reviews(ids, columns["label"])
    train = columns["train"]                              # (n,) bool
    return {"train": reviews.pick(np.flatnonzero(train)), "test": reviews.pick(np.flatnonzero(~train))}


@on_first
def tokenize_imdb(paths, encoding, cached):
    """Writes the reviews' ids to the file `cached`, unless it is there."""
    if cached.exists():
        return
    reviews = list(read_imdb(paths))
    if all(label is None for _, label, _ in reviews):
        raise UserError(f"{' '.join(map(str, paths))}: there are no labelled reviews: name the archive of "
                        "train/pos and train/neg too, by --imdb")
    ids, labels, train = [], [], []
    for split, label, text in tqdm(reviews, desc=f"tokenize into {cached}", unit=" reviews"):
        ids.append(np.array(encoding.encode_ordinary(text), dtype=np.int32))
        labels.append(-1 if label is None else label)
        train.append(split == "train")
    length = [len(review) for review in ids]
    write_tensors(cached, {"ids": torch.from_numpy(np.concatenate(ids)), "length": torch.tensor(length),
                           "label": torch.tensor(labels, dtype=torch.int8), "train": torch.tensor(train)})


def gpt2_encoding(vocab_size=0):
    """GPT-2's tokenizer; its end-of-text id is 50256.

    vocab_size: of the tokens in the order of their merges only the first, at least the 256 bytes; then comes
    the end-of-text.  Byte pairs that are merged first are a tokenizer by themselves.
    """
    try:
        whole = tiktoken.get_encoding("gpt2")
    except Exception as error:                            # whatever tiktoken's network library raises
        raise UserError(f"cannot load GPT-2's tokenizer ({type(error).__name__}): set TIKTOKEN_CACHE_DIR to "
                        "a folder that holds its two files, or use --preset tiny") from error
    if vocab_size == 0:
        return whole
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
OPINIONATED = {"{+}": ADJECTIVE, "{~}": VERB, "{-}": ADJECTIVE}       # a sentence turns {-} around
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


def tiny_log_mgf(s):
    """log E exp(s * sum of opinions), exactly: the limit's log Z at beta = 1/s if the reward is the truth."""
    slot = sum(p * np.exp(s * opinion) for opinion, p in OPINION.items())
    slots = [len(re.findall(r"{[-+~]}", text)) for text in SENTENCES]
    sentence = np.mean([slot ** n for n in slots])
    return np.log(np.mean([sentence ** n for n in N_SENTENCES]))


def read_tiny(text):
    """Parses a response to a prompt of the grammar: the end of the opening, then sentences.

    -> for each sentence the sum of its opinions and whether it turns one around ("not X at all"), or None
    where no rule of the grammar derives it, or where it is not finished.
    """
    *pieces, rest = text.split(" .")
    sentences = [] if rest.strip() == "" else [None]      # what follows the last full stop
    for place, piece in enumerate(pieces):
        if place == 0 and piece.strip() in WHERE:
            continue
        reading = None
        for pattern, turned in sentence_patterns():
            match = pattern.fullmatch(piece.strip())
            if match:
                opinions = sum(OPINION_OF[word] for word in match.groups())
                reading = (-opinions if turned else opinions, turned)
        sentences.append(reading)
    return sentences


OPINION_OF = {word: opinion for lists in (ADJECTIVE, VERB) for opinion in lists for word in lists[opinion]}


@functools.cache
def sentence_patterns():
    """[(regular expression, whether it turns its opinion around)] of SENTENCES, a group for every opinion."""
    patterns = []
    for sentence in SENTENCES:
        words = []
        for word in sentence.removesuffix(" .").split():
            if word in OPINIONATED:
                words.append("(" + "|".join(sum(OPINIONATED[word].values(), [])) + ")")
            else:
                words.append("(?:" + "|".join(NEUTRAL.get(word, [word])) + ")")
        patterns.append((re.compile(" ".join(words)), "{-}" in sentence))
    return patterns


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


@functools.cache                                          # seconds, for GPT-2's whole vocabulary
def tokenizer_json(encoding):
    """A tiktoken encoding as the tokenizer.json that transformers opens.

    tiktoken takes a piece of text whole where it is a token, else merges neighbours, the lowest rank first.
    """
    visible = [*range(33, 127), *range(161, 173), *range(174, 256)]   # GPT-2 writes each byte as a letter
    hidden = [b for b in range(256) if b not in visible]
    letter = {b: chr(b) for b in visible} | {b: chr(256 + n) for n, b in enumerate(hidden)}
    ranks = {"".join(letter[b] for b in token): rank for token, rank in encoding._mergeable_ranks.items()}
    merges = []
    for token in sorted(ranks, key=ranks.get):
        splits = [(token[:i], token[i:]) for i in range(1, len(token))]
        merges += [f"{left} {right}" for left, right in splits if left in ranks and right in ranks]
    end = {"id": encoding.eot_token, "content": "<|endoftext|>", "special": True, "single_word": False,
           "lstrip": False, "rstrip": False, "normalized": False}
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    pattern = {"Regex": encoding._pat_str}
    split = {"type": "Split", "pattern": pattern, "behavior": "Isolated", "invert": False}
    return {"version": "1.0", "truncation": None, "padding": None, "added_tokens": [end], "normalizer": None,
            "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, byte_level]},
            "post_processor": None, "decoder": byte_level,
            "model": {"type": "BPE", "ignore_merges": True, "vocab": ranks, "merges": merges}}


def load_tiny(n_train, n_test, encoding):
    """The grammar's reviews as ids -> {"train": Reviews, "test": Reviews}, always the same ones."""
    reviews = {}
    for split, n in (("train", n_train), ("test", n_test)):
        texts, labels, _ = tiny_reviews(n, seed=split)
        ids = [np.array(review, dtype=np.int32) for review in encoding.encode_ordinary_batch(texts)]
        reviews[split] = Reviews(ids, labels)
    return reviews


# ---- your own preferences: a .jsonl file, a JSON object on each line, all of one of three kinds ------------
#
#     {"prompt": "...", "chosen": "...", "rejected": "..."}
#     {"chosen": "...", "rejected": "..."}                                   whole texts, prompt included
#     {"prompt": "...", "responses": ["...", ...], "rewards": [0.3, ...]}    K of each, the same K in all rows
#
# Other keys are ignored.  Prompt and response are tokenized apart; no space is put between them.

@dataclass
class Row:
    prompt: list                                          # ids
    responses: list                                       # K lists of ids; of a pair the chosen one is first
    rewards: list | None                                  # K floats; None for a pair
    line: int                                             # where the row stands in its file, from 1


def read_preferences(path, encoding, prompt_tokens=None, skip_long=False):
    """A .jsonl file -> list of Row.  prompt_tokens: how many a prompt may have at most; None: any number.

    skip_long: leaves rows with longer ones out, and counts them; else they are faulty.

    If most rows repeat their prompt at the start of every response, it is cut off.  If a few do, it is not:
    to the prompt "Hi", "Hi there!" is a response.  One UserError counts faulty rows and names the first ten.
    """
    lines = read_lines(path)
    parsed, faults = {}, {}                               # by line number
    for number, line in lines.items():
        try:
            parsed[number] = parse(line)
        except UserError as fault:
            faults[number] = fault
    repeated = [os.path.commonprefix([prompt, *texts]) == prompt for _, prompt, texts, _ in parsed.values()]
    cut = 2 * sum(repeated) > len(parsed)
    first = min(parsed, default=None)
    rows = []
    skipped = 0
    for number, (kind, prompt, texts, rewards) in tqdm(parsed.items(), f"tokenize {path}", delay=2):
        if cut:
            texts = [text.removeprefix(prompt) for text in texts]
        ids = encoding.encode_ordinary(prompt)
        long = prompt_tokens and len(ids) > prompt_tokens
        if long and skip_long:
            skipped += 1
            continue
        rows.append(Row(ids, [encoding.encode_ordinary(text) for text in texts], rewards, number))
        if kind != parsed[first][0]:
            faults[number] = f"unlike line {first}: all rows must have the same keys and as many responses"
        elif not all(text.strip() for text in [prompt, *texts]):
            faults[number] = "empty prompt or response (without a 'prompt', texts must begin with the same)"
        elif long:
            faults[number] = (f"a prompt of {len(ids):,} tokens, more than --prompt-tokens {prompt_tokens}: "
                              "raise it, or leave such rows out by --skip-long")
    if faults:
        them = "them" if len(faults) > 1 else "it"
        message = [f"{len(faults):,} of {len(lines):,} rows of {path} cannot be used: mend or remove {them}"]
        message += [f"{path}:{number}: {faults[number]}" for number in sorted(faults)[:10]]
        raise UserError("\n".join(message))
    if skipped:
        print(f"{path}: {skipped:,} of {len(lines):,} rows left out, their prompts are longer than "
              f"--prompt-tokens {prompt_tokens}")
    if cut:
        print(f"{path}: texts begin with their row's prompt, which is cut off")
    return rows


def read_lines(path):
    """{line number, from 1: line} of a .jsonl file, without blank lines."""
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read {path} ({error}): name a .jsonl file in UTF-8") from error
    if not text.strip() or text.lstrip().startswith("["):
        content = "one JSON array" if text.strip() else "empty"
        raise UserError(f"{path} is {content}: write a JSON object on each line")
    return {number: line for number, line in enumerate(text.split("\n"), 1) if line.strip()}


def parse(line):
    """A line -> kind, prompt, responses (K texts), rewards (K floats, or None).  UserError if faulty."""
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise UserError(f"not JSON ({error.msg}: column {error.colno})") from error
    if not isinstance(row, dict):
        raise UserError('not an object like {"prompt": ...}')
    scored = "responses" in row
    for key in ("prompt", "responses", "rewards") if scored else ("chosen", "rejected"):
        if key not in row:
            raise UserError(f"missing key '{key}'")
    texts = row["responses"] if scored else [row["chosen"], row["rejected"]]
    rewards = row["rewards"] if scored else [1, 0]
    if not (isinstance(texts, list) and isinstance(rewards, list) and len(texts) == len(rewards) > 1):
        raise UserError("'responses' and 'rewards' must be lists of the same length, at least 2")
    if not all(isinstance(text, str) for text in [row.get("prompt", ""), *texts]):
        raise UserError("prompt and responses must be text: make one of chat messages, by your chat template")
    if not all(isinstance(reward, int | float) and abs(reward) < 1e38 for reward in rewards):
        raise UserError("the rewards must be numbers, finite in float32")     # NaN is not below 1e38 either
    if not scored and texts[0] == texts[1]:
        raise UserError("'chosen' and 'rejected' are equal")
    # Whole texts' prompt: to hh-rlhf's last "Assistant:" in both, or before their last shared blank.  A token
    # begins at a blank, and so the joined ids are those of the whole text.
    shared = re.match(r".*\n\nAssistant:|.*(?=\s)|", os.path.commonprefix(texts), re.DOTALL)
    prompt = row.get("prompt", shared[0])
    kind = ("prompt" in row, scored, len(texts))          # the same in all rows
    return kind, prompt, texts, [float(reward) for reward in rewards] if scored else None


def best_first(rows):
    """The rows with their best response first, the worst second.  Rows of equal rewards are left out."""
    ordered = []
    for row in rows:
        rewards = row.rewards or [1.0, 0.0]               # of a pair
        best = rewards.index(max(rewards))
        worst = rewards.index(min(rewards))
        if best != worst:
            order = [best, worst, *(i for i in range(len(rewards)) if i not in (best, worst))]
            responses = [row.responses[i] for i in order]
            rewards = row.rewards and [rewards[i] for i in order]
            ordered.append(Row(row.prompt, responses, rewards, row.line))
    if not ordered:
        raise UserError("in all rows to train on, or in all held out, the rewards are equal: add other rows")
    return ordered


def split_rows(rows, held_out):
    """-> rows to train on, rows held out, both in their order; a prompt's rows are all on one side.

    held_out: a share of the rows in (0, 1), met as closely as whole prompts allow.  Which prompts are held
    out depends on the prompts alone, not on the order of the rows.
    """
    count = Counter(tuple(row.prompt) for row in rows)
    if len(count) < 2:
        raise UserError("all rows have the same prompt, so none can be held out: add rows of other prompts")
    order = sorted(count, key=lambda prompt: hashlib.sha256(repr((0, prompt)).encode()).digest())
    left = held_out * len(rows)
    held = set()
    for prompt in order[:-1]:                             # one prompt is always trained on
        if count[prompt] < 2 * left:                      # it brings the share closer
            held.add(prompt)
            left -= count[prompt]
    held = held or {min(order, key=count.get)}
    train = [row for row in rows if tuple(row.prompt) not in held]
    return train, [row for row in rows if tuple(row.prompt) in held]


# ---- downloads ---------------------------------------------------------------------------------------------

@on_first
def fetch(url, path, size, sha256=None, hint="try again"):
    """Downloads `url` to `path`, unless it is there.  A file of another size or sha256 is never kept."""
    def whole(file):
        return file.stat().st_size == size and (sha256 is None or file_sha256(file) == sha256)

    if path.exists() and whole(path):
        return path
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with urllib.request.urlopen(url, timeout=30) as source, open(part, "wb") as target:
            with tqdm.wrapattr(source, "read", total=size, desc=f"download {path}") as body:
                shutil.copyfileobj(body, target)
        if not whole(part):
            raise UserError(f"{url} did not send the {size:,} bytes expected: nothing was kept, try again")
        os.replace(part, path)
        return path
    except OSError as error:
        raise UserError(f"cannot download {url} ({error}): {hint}") from error
    finally:
        part.unlink(missing_ok=True)


def file_sha256(path):
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def cache_folder():
    """Where downloads and tokenized reviews are kept: $EXO_CACHE, or .cache/exo in the home folder."""
    return Path(os.environ.get("EXO_CACHE") or Path.home() / ".cache" / "exo")
