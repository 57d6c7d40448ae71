"""The reviews: real IMDB or a tiny grammar whose truth is known, as token ids; prompts, rows with masks; downloads.

A review is a list of token ids.  Its first `prompt_tokens` ids are a prompt, the rest, with the end-of-text id, a response.
Ids are joined, never strings: a prompt is a prefix of ids, so no token ever merges across its end.
"""
import hashlib
import http.client
import lzma
import os
import random
import re
import tarfile
import urllib.request
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tiktoken
import torch
from tqdm import tqdm

from files import UserError, read_tensors, write_tensors
from parallel import on_first

IMDB_URL = "http://ai.stanford.edu/~amaas/data/sentiment/aclImdb_v1.tar.gz"
IMDB_SIZE, IMDB_SHA256 = 84_125_825, "c40f74a18d3b61f90feba1e17730e0d38e8b97c05fde7008942e91923d1658fe"
IMDB_MEMBER = re.compile(r"(?:.*/)?(train|test)/(pos|neg|unsup)/[^/]+\.txt")
IMDB_LABEL = {"pos": 1, "neg": 0, "unsup": None}
BUILT_IN = ("tiny", "imdb")                                          # what --data may name beside a user's file


@dataclass
class Reviews:
    ids: list          # of (length,) int32 arrays, the whole review without end-of-text
    label: np.ndarray  # (n,) int8: 1 positive, 0 negative, -1 unlabelled
    start: np.ndarray | int = 0                                      # tokens of the prompt: of all reviews, or (n,) of each

    def __len__(self):
        return len(self.ids)

    def pick(self, index):
        return Reviews([self.ids[i] for i in index], self.label[index], np.broadcast_to(self.start, len(self))[index])


def rows(reviews, prompt_tokens, block_size, eos_id):
    """Reviews (id arrays) -> ids (N, T) int64 and mask (N, T) bool: prompt, response, padding by eos_id up to the longest row.

    prompt_tokens: of all reviews, or (N,) of each.
    The end-of-text id is appended, and counted in the mask, where there is room for it: a review cut at block_size has none.
    """
    rows = [np.append(r, eos_id)[:block_size] for r in reviews]
    ids = np.full((len(rows), max(map(len, rows))), eos_id, dtype=np.int64)                 # (N, T)
    for n, row in enumerate(rows):
        ids[n, :len(row)] = row
    column, length = np.arange(ids.shape[1]), np.array([len(row) for row in rows])
    mask = (column >= np.reshape(prompt_tokens, (-1, 1))) & (column < length[:, None])      # (N, T)
    return torch.from_numpy(ids), torch.from_numpy(mask)


# ---- real reviews ----------------------------------------------------------------------------------------------------------

def read_imdb(paths):
    """Yields (split, label, text) of each review in IMDB archives (.tar.gz, .tar.xz) or extracted folders, ordered by name.

    split "train" or "test"; label 1 positive, 0 negative, None unlabelled; text without trailing blanks, <br /> as newline.
    Archives are read where they are; nothing is extracted.  UserError where one is damaged or not IMDB.
    """
    for path in [Path(p) for p in ([paths] if isinstance(paths, str | Path) else paths)]:
        found = sorted((match.groups(), name, text) for name, text in members(path) if (match := IMDB_MEMBER.fullmatch(name)))
        if not found:
            raise UserError(f"{path} holds no reviews: expected files like aclImdb/train/pos/0_9.txt")
        for (split, kind), name, text in found:
            try:
                yield split, IMDB_LABEL[kind], text.decode("utf-8").replace("<br />", "\n").rstrip()
            except UnicodeDecodeError as error:
                raise UserError(f"{path}: {name} is not UTF-8 text ({error.reason} at byte {error.start}): take a fresh "
                                "copy") from error


def members(path):
    """Yields (name, bytes) of the files in an archive or below a folder."""
    if path.is_dir():
        for file in sorted(path.rglob("*.txt")):
            yield f"{path.name}/{file.relative_to(path).as_posix()}", file.read_bytes()
        return
    try:
        with tarfile.open(path) as archive:
            for member in archive:
                if member.name.startswith("/") or ".." in Path(member.name).parts:
                    raise UserError(f"{path}: member {member.name} points outside of the archive: take a fresh copy of IMDB")
                if member.isfile():
                    yield member.name, archive.extractfile(member).read()
            while archive.fileobj.read(1 << 20):                     # to the very end: only there gzip looks at its checksum
                pass
    except FileNotFoundError as error:
        raise UserError(f"{path} does not exist: name IMDB's archives or folders by --imdb") from error
    except (OSError, EOFError, tarfile.TarError, zlib.error, lzma.LZMAError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{path} is damaged or not an archive ({reason}): take a fresh copy") from error


def imdb_key(paths, encoding):
    """Paths of the reviews (IMDB's archive, downloaded once, where none are given) and a hash of what they hold."""
    if not paths:
        paths = [fetch(IMDB_URL, cache_folder() / "aclImdb_v1.tar.gz", IMDB_SIZE, IMDB_SHA256,
                       hint="name the archive or its extracted folder by --imdb PATH, or use --preset tiny")]
    paths = list(map(Path, paths))
    digest = hashlib.sha256(encoding.name.encode())
    for path in paths:
        if path.is_file():
            digest.update(file_sha256(path).encode())
        else:
            for name, text in members(path):
                digest.update(name.encode() + hashlib.sha256(text).digest())
    return paths, digest.hexdigest()[:16]


def load_imdb(paths, encoding):
    """Real reviews as ids -> {"train": Reviews, "test": Reviews}.  The tokenized result is cached by content."""
    flat = {k: v.numpy() for k, v in read_tensors(tokenized(paths, encoding))[0].items()}
    reviews = Reviews(np.split(flat["ids"], np.cumsum(flat["length"])[:-1]), flat["label"])
    return {"train": reviews.pick(np.flatnonzero(flat["train"])), "test": reviews.pick(np.flatnonzero(~flat["train"]))}


@on_first
def tokenized(paths, encoding):
    """The file that holds the reviews' ids, made unless it is there."""
    paths, key = imdb_key(paths, encoding)
    cached = cache_folder() / f"imdb-{key}.safetensors"
    if not cached.exists():
        split, label, ids, lengths = [], [], [], []
        texts = list(tqdm(read_imdb(paths), desc="read reviews", unit=" reviews"))
        for begin in tqdm(range(0, len(texts), 1000), desc=f"tokenize into {cached}", unit="k reviews"):
            part = texts[begin:begin + 1000]
            encoded = encoding.encode_ordinary_batch([text for _, _, text in part], num_threads=os.cpu_count())
            split += [s == "train" for s, _, _ in part]
            label += [-1 if y is None else y for _, y, _ in part]
            lengths += map(len, encoded)
            ids.append(np.concatenate([np.array(e, dtype=np.int32) for e in encoded]))
        write_tensors(cached, {"ids": torch.from_numpy(np.concatenate(ids)), "length": torch.tensor(lengths),
                               "label": torch.tensor(label, dtype=torch.int8), "train": torch.tensor(split)})
    return cached


def gpt2_encoding():
    """GPT-2's tokenizer; its end-of-text id is 50256."""
    try:
        return tiktoken.get_encoding("gpt2")
    except Exception as error:                                       # tiktoken lets its network library's errors through
        raise UserError(f"cannot load GPT-2's tokenizer ({type(error).__name__}): without a network set TIKTOKEN_CACHE_DIR to "
                        "a folder that holds its two files, or use --preset tiny") from error


# ---- tiny reviews: a grammar with a known truth ----------------------------------------------------------------------------
#
# A review is a neutral opening, whose first six words are the prompt, and three to five sentences with one or two opinions each.
# An opinion is +1, -1 or 0 by independent draws, and  P(label = 1) = sigmoid(sum of opinions):  that sum is the best log-odds.

WHEN = ["Last night", "Last week", "Last summer", "On Friday", "On Sunday", "One evening", "This morning", "Two days"]
WHO, SAW, THE = ["I", "we", "they"], ["watched", "saw", "rented", "finished"], ["this", "that"]
FILM = ["film", "movie", "picture", "comedy", "drama"]
WHERE = ["at home", "with friends", "with my family", "on a train", "in town"]
ASPECT = ["plot", "acting", "music", "script", "ending", "dialogue", "pacing", "camera", "cast", "humor", "story", "lighting"]
ADJECTIVE = {+1: ["wonderful", "brilliant", "moving", "charming", "superb", "delightful", "clever", "gripping", "excellent"],
             -1: ["terrible", "boring", "dull", "awful", "clumsy", "dreadful", "silly", "tedious", "annoying"],
             0: ["ordinary", "long", "quiet", "simple", "familiar", "modern", "usual"]}
VERB = {+1: ["loved", "enjoyed", "admired"], -1: ["hated", "disliked", "regretted"], 0: ["noticed", "expected", "remembered"]}
ADVERB, WHOM = ["really", "quite", "rather", "very"], ["sister", "brother", "friend", "neighbor"]
# {+} an adjective, {~} a verb, {-} an adjective whose opinion the sentence turns around, {a} an aspect
SENTENCES = ["The {a} was {adv} {+} .", "The {a} was {+} and the {a} was {+} .", "I {~} the {a} .",
             "The {a} was not {-} at all .", "Its {+} {a} and its {+} {a} stayed with me .", "My {who} {~} the {+} {a} ."]
OPINION = {+1: 0.375, -1: 0.375, 0: 0.25}                            # of each slot, independent
N_SENTENCES = (3, 4, 5)                                              # with these and SENTENCES: six slots on average


def tiny_reviews(n, seed):
    """Draws n reviews of the grammar -> texts, labels (n,) int8, opinions (n,) int: the known log-odds of each label."""
    uniform = random.Random(seed).random                             # random() alone is the same on every Python version

    def pick(words):
        return words[int(uniform() * len(words))]

    def sentence():
        """-> its text, the sum of its opinions"""
        opinions, out = 0, []
        for word in pick(SENTENCES).split():
            if word in ("{+}", "{-}", "{~}"):
                u = uniform()
                opinion = 1 if u < OPINION[1] else -1 if u < OPINION[1] + OPINION[-1] else 0
                opinions += -opinion if word == "{-}" else opinion
                out.append(pick((VERB if word == "{~}" else ADJECTIVE)[opinion]))
            else:
                out.append(pick({"{a}": ASPECT, "{adv}": ADVERB, "{who}": WHOM}.get(word, [word])))
        return " ".join(out), opinions

    texts, labels, counts = [], np.empty(n, np.int8), np.empty(n, np.int64)
    for i in range(n):
        opening = f"{pick(WHEN)} {pick(WHO)} {pick(SAW)} {pick(THE)} {pick(FILM)} {pick(WHERE)} ."
        body = [sentence() for _ in range(pick(N_SENTENCES))]
        texts.append(" ".join([opening, *(text for text, _ in body)]))
        counts[i] = sum(count for _, count in body)
        labels[i] = uniform() < 1 / (1 + np.exp(-counts[i]))
    return texts, labels, counts


def tiny_log_mgf(s):
    """log E exp(s * opinions) of the grammar, exactly: log Z of the limit at beta = 1/s when the reward is the known truth."""
    slot = sum(p * np.exp(s * opinion) for opinion, p in OPINION.items())                   # one slot; -1 and +1 are as likely
    sentence = np.mean([slot ** len(re.findall(r"{[-+~]}", text)) for text in SENTENCES])
    return np.log(np.mean([sentence ** n for n in N_SENTENCES]))


def tiny_encoding():
    """A word-level tokenizer in memory: every byte, and every word of the grammar with and without its leading space.

    All 256 bytes are there, so that an unknown word becomes bytes (tiktoken panics on a vocabulary that lacks one).
    """
    lists = [WHEN, WHO, SAW, THE, FILM, WHERE, ASPECT, *ADJECTIVE.values(), *VERB.values(), ADVERB, WHOM, SENTENCES]
    words = sorted({w for words in lists for text in words for w in text.split() if not w.startswith("{")})
    ranks = {bytes([b]): b for b in range(256)}
    for word in words:
        for token in (word.encode(), b" " + word.encode()):
            ranks.setdefault(token, len(ranks))
    return tiktoken.Encoding("tiny", pat_str=r" ?\w+| ?[^\s\w]+|\s", mergeable_ranks=ranks,
                             special_tokens={"<|endoftext|>": len(ranks)})


def load_tiny(n_train, n_test, encoding):
    """The grammar's reviews as ids -> {"train": Reviews, "test": Reviews}, always the same ones."""
    reviews = {}
    for split, n in (("train", n_train), ("test", n_test)):
        texts, labels, _ = tiny_reviews(n, seed=split)
        reviews[split] = Reviews([np.array(e, dtype=np.int32) for e in encoding.encode_ordinary_batch(texts)], labels)
    return reviews


# ---- downloads -------------------------------------------------------------------------------------------------------------

@on_first
def fetch(url, path, size=None, sha256=None, hint=""):
    """Downloads `url` to `path` unless it is there, whole: size and sha256 are checked, and a bad file is never kept.

    Without a sha256 the server's etag serves, where that is one.  `hint` tells a user without a network what to do.
    """
    path, linked = Path(path), []

    class Redirect(urllib.request.HTTPRedirectHandler):              # the first answer of a model hub names the file's sha256
        def redirect_request(self, req, fp, code, msg, headers, newurl):
            linked.append(headers.get("X-Linked-Etag", ""))
            return super().redirect_request(req, fp, code, msg, headers, newurl)

    if path.exists() and (size is None or path.stat().st_size == size) and (sha256 is None or file_sha256(path) == sha256):
        return path
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with urllib.request.build_opener(Redirect).open(url, timeout=30) as source, open(part, "wb") as target:
            etags = [*linked, source.headers.get("ETag", "")]
            total = int(source.headers.get("Content-Length") or 0) or size
            with tqdm(desc=f"download {path.name} to {path.parent}", total=total, unit="B", unit_scale=True) as bar:
                while block := source.read(1 << 20):
                    target.write(block)
                    bar.update(len(block))
        expected = sha256 or next((e.strip('W/"') for e in etags if re.fullmatch(r'(W/)?"?[0-9a-f]{64}"?', e)), None)
        got = file_sha256(part)
        if expected is not None and got != expected:
            raise UserError(f"{url}: checksum mismatch, expected {expected}, got {got}: the file was not kept, try again")
        if size is not None and part.stat().st_size != size:
            raise UserError(f"{url}: expected {size:,} bytes, got {part.stat().st_size:,}: not kept, try again")
        os.replace(part, path)
        return path
    except (OSError, http.client.HTTPException) as error:            # URLError is an OSError
        raise UserError(f"cannot download {url} ({getattr(error, 'reason', error)}){': ' + hint if hint else ''}") from error
    finally:
        part.unlink(missing_ok=True)


def file_sha256(path):
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def cache_folder():
    """Where downloads and tokenized reviews are kept: $EXO_CACHE, or .cache/exo in the home folder."""
    return Path(os.environ.get("EXO_CACHE") or Path.home() / ".cache" / "exo")
