"""Statements about what is learned from: rows, IMDB, the tiny grammar, downloads, a user's preferences."""
import hashlib
import http.server
import io
import json
import math
import os
import random
import tarfile
import threading
from functools import partial

import numpy as np
import pytest
import tiktoken.registry
import torch

import compute
import data
from compute import UserError
from data import Row

ENCODING = data.tiny_encoding()


def refused(call, *words):
    """The call ends in one sentence that holds these words."""
    with pytest.raises(UserError) as error:
        call()
    assert "\n" not in str(error.value)
    for word in words:
        assert word in str(error.value)


def test_a_row_is_prompt_response_end_of_text_padding():
    reviews = [np.array([1, 2, 3]), [4, 5, 6, 7], np.arange(8)]
    ids, mask = data.rows(reviews, prompt_tokens=[1, 2, 2], block_size=5, eos_id=99)
    assert ids.tolist() == [[1, 2, 3, 99, 99], [4, 5, 6, 7, 99], [0, 1, 2, 3, 4]]        # the last one is cut
    assert mask.int().tolist() == [[0, 1, 1, 1, 0], [0, 0, 1, 1, 1], [0, 0, 1, 1, 1]]    # end-of-text once
    assert (ids.dtype, mask.dtype) == (torch.int64, torch.bool)


# ---- IMDB --------------------------------------------------------------------------------------------------

FILES = {"aclImdb/README": b"not a review", "aclImdb/train/urls_pos.txt": b"http://example.org",
         "aclImdb/train/pos/10_8.txt": "Tr\u00e8s bien, \u201cgut\u201d.".encode(),
         "aclImdb/train/pos/0_9.txt": b"A fine film.<br /><br />Go and see it. \n",
         "aclImdb/train/neg/0_2.txt": b"  Dull na\xefve",              # a byte that is not UTF-8
         "aclImdb/train/unsup/3_0.txt": b"Seen <|endoftext|> it", "aclImdb/test/neg/2_1.txt": b"Bad.\r\n"}
REVIEWS = [("test", 0, "Bad."), ("train", 0, "  Dull na\ufffdve"),
           ("train", 1, "A fine film.\n\nGo and see it."), ("train", 1, "Tr\u00e8s bien, \u201cgut\u201d."),
           ("train", None, "Seen <|endoftext|> it")]
FORMS = ["a b.tar.gz", "a.tar.xz", "aclImdb"]


def make(path, form, files=FILES):
    """Files as an archive, or in a folder."""
    path.mkdir(exist_ok=True)
    if form == "aclImdb":
        for name, text in files.items():
            (path / name).parent.mkdir(parents=True, exist_ok=True)
            (path / name).write_bytes(text)
        return path / form
    with tarfile.open(path / form, "w:" + form[-2:]) as tar:
        for name, text in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(text)
            tar.addfile(member, io.BytesIO(text))
    return path / form


def read_all(paths):
    return list(data.read_imdb(paths))


@pytest.mark.parametrize("form", FORMS)
def test_reviews_are_read_by_name_from_archives_and_folders(tmp_path, form):
    path = make(tmp_path, form)
    assert read_all(str(path)) == REVIEWS
    assert read_all([path, path]) == REVIEWS * 2


@pytest.mark.parametrize("form", FORMS[:2])
def test_an_archive_that_is_cut_or_has_a_flipped_bit_is_refused(tmp_path, form):
    noise = random.Random(0)
    path = make(tmp_path, form, {f"{i}.txt": noise.randbytes(4000).hex().encode() for i in range(20)})
    whole = path.read_bytes()
    for share in (0, 0.1, 0.15, 0.16, 0.53, 0.999):
        place = int(share * len(whole))
        flipped = bytes([whole[place] ^ 16])
        for damaged in (whole[:place], whole[:place] + flipped + whole[place + 1:]):
            path.write_bytes(damaged)
            refused(partial(read_all, path), str(path), "fresh copy")


def test_what_is_not_imdb_is_refused(tmp_path):
    page = tmp_path / "page.tar.gz"
    page.write_text("<html>404</html>")
    refused(partial(read_all, page), str(page), "not an archive")
    refused(partial(read_all, tmp_path / "nowhere"), "nowhere", "missing", "--imdb")
    refused(partial(read_all, tmp_path), str(tmp_path), "no reviews")
    for name in ("aclImdb/train/pos/../../../../evil.txt", "/train/pos/0_9.txt"):
        path = make(tmp_path, "a.tar.gz", {name: b"evil"})
        refused(partial(read_all, path), str(path), name, "outside")


def test_unlabelled_reviews_alone_are_refused_before_they_are_tokenized(tmp_path, cache):
    path = make(tmp_path, "a.tar.gz", {"aclImdb/train/unsup/3_0.txt": b"Seen it"})
    tokenize = partial(data.tokenize_imdb, [path], None, cache / "ids")
    refused(tokenize, str(path), "no labelled reviews", "--imdb")


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("EXO_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def is_loaded(loaded):
    """Whether these are the reviews above, as ids.  A text that says <|endoftext|> does not end there."""
    texts, labels = [], []
    for split in ("test", "train"):
        assert all(ENCODING.eot_token not in ids for ids in loaded[split].ids)
        texts += [ENCODING.decode(ids.tolist()) for ids in loaded[split].ids]
        labels += loaded[split].label.tolist()
    return texts == [text for _, _, text in REVIEWS] and labels == [0, 0, 1, 1, -1]


@pytest.mark.parametrize("form", FORMS)
def test_reviews_are_tokenized_again_only_if_their_content_has_changed(tmp_path, cache, monkeypatch, form):
    path = make(tmp_path, form)
    changed = make(tmp_path / "changed", form, FILES | {"aclImdb/test/neg/2_1.txt": b"Sad."})
    assert is_loaded(data.load_imdb([path], ENCODING))
    assert not is_loaded(data.load_imdb([changed], ENCODING))
    monkeypatch.setattr(data, "read_imdb", lambda paths: pytest.fail("read again"))
    assert is_loaded(data.load_imdb([path], ENCODING))


def test_what_the_first_process_downloads_and_tokenizes_is_loaded_by_all(tmp_path, cache, monkeypatch):
    """Two processes in turn: the second gets the messages of the first, in their order."""
    messages = []

    def receive(message):
        message[:] = messages.pop(0)

    path = make(tmp_path, "a.tar.gz")
    monkeypatch.setattr(data, "fetch", compute.on_first(lambda *_, **__: path))
    monkeypatch.setattr(compute, "world", lambda: 2)
    for rank, broadcast in enumerate((messages.append, receive)):
        monkeypatch.setattr(compute, "rank", lambda rank=rank: rank)
        monkeypatch.setattr(compute.dist, "broadcast_object_list", broadcast)
        assert is_loaded(data.load_imdb([], ENCODING))
    assert not messages


@pytest.mark.slow
def test_real_imdb_has_25k_train_25k_test_and_50k_unlabelled_reviews(real_data, cache):
    paths = [real_data / "aclImdb_labelled.tar.xz", real_data / "aclImdb_unsup.tar.xz"]
    loaded = data.load_imdb(paths, data.gpt2_encoding())
    assert np.bincount(loaded["train"].label + 1).tolist() == [50_000, 12_500, 12_500]
    assert np.bincount(loaded["test"].label + 1).tolist() == [0, 12_500, 12_500]
    assert min(len(ids) for ids in loaded["train"].ids) > 0


def test_segments_are_the_reviews_whole_each_token_once():
    reviews = data.Reviews([np.arange(7), np.arange(3)], np.array([1, 0], np.int8))
    pieces = data.segments(reviews, 3)
    assert [piece.tolist() for piece in pieces.ids] == [[0, 1, 2], [3, 4, 5], [6], [0, 1, 2]]
    ids, mask = data.rows(pieces.ids, pieces.start, 3, eos_id=9)
    assert ids.tolist() == [[0, 1, 2], [3, 4, 5], [6, 9, 9], [0, 1, 2]]      # an end only where one is
    assert mask.tolist()[2] == [False, True, False]


# ---- the tiny grammar, and the tokenizers ------------------------------------------------------------------

@pytest.fixture(scope="module")
def tiny():
    return data.tiny_reviews(20_000, seed=0)


def test_labels_have_the_known_log_odds(tiny):
    _, labels, counts = tiny
    for count in range(-5, 6):
        own = labels[counts == count]
        p = 1 / (1 + math.exp(-count))
        assert len(own) > 100
        assert own.mean() == pytest.approx(p, abs=4 * math.sqrt(p * (1 - p) / len(own)))


def test_the_known_count_can_be_read_off_the_text(tiny):
    opinion = {}
    for words in (data.ADJECTIVE, data.VERB):
        for value, listed in words.items():
            opinion |= dict.fromkeys(listed, value)
    for text, _, count in zip(*tiny):
        words = ["", *text.split()]
        turned = [-1 if before == "not" else 1 for before in words]
        assert sum(sign * opinion.get(word, 0) for sign, word in zip(turned, words[1:])) == count


def test_every_review_is_derived_by_the_grammar_and_its_opinions_are_read(tiny):
    for text, _, count in list(zip(*tiny))[:2000]:
        response = text.split(" ", 6)[6]                             # after a prompt of six words
        sentences = data.read_tiny(response)
        assert None not in sentences and 3 <= len(sentences) <= 5
        assert sum(opinions for opinions, _ in sentences) == count


@pytest.mark.parametrize("response, sentences", [
    (" at home . The plot was not dull at all .", [(1, True)]),
    (" at home . The plot was not moving at all . I loved the cast .", [(-1, True), (1, False)]),
    (" at home . The plot was was dull . I loved the cast", [None, None]),       # no rule; not finished
    (" with plot . Its long cast and its clever script stayed with me .", [None, (1, False)])])
def test_what_the_grammar_cannot_derive_is_faulty(response, sentences):
    assert data.read_tiny(response) == sentences


def test_the_log_moment_generating_function_is_that_of_the_drawn_reviews(tiny):
    for s in (-0.5, 0.5, 1.0):
        weight = np.exp(s * tiny[2])
        standard_error = weight.std() / weight.mean() / len(weight) ** 0.5
        assert data.tiny_log_mgf(s) == pytest.approx(np.log(weight.mean()), abs=4 * standard_error)
    variance = (data.tiny_log_mgf(1e-3) + data.tiny_log_mgf(-1e-3)) / 1e-6
    assert variance == pytest.approx(6 * 0.75, rel=1e-4)              # six slots on average


def test_tiny_reviews_are_always_the_same_and_the_splits_differ():
    loaded = data.load_tiny(30, 20, ENCODING)
    for split, begin in (("train", "Last week you streamed"), ("test", "On Saturday he rented")):
        texts, labels, _ = data.tiny_reviews(len(loaded[split]), seed=split)
        assert [ENCODING.decode(ids.tolist()) for ids in loaded[split].ids] == texts
        assert loaded[split].label.tolist() == labels.tolist()
        assert texts[0].startswith(begin)


def test_every_word_is_a_token_six_are_the_prompt_and_a_review_fits_72(tiny):
    for text in tiny[0][:2000]:
        assert len(ENCODING.encode_ordinary(text)) == len(text.split())
        assert text.split()[5] in data.FILM
    sentence = max(len(text.split()) for text in data.SENTENCES)
    opening = 6 + max(len(text.split()) for text in data.WHERE) + 1
    assert opening + sentence * max(data.N_SENTENCES) + 1 <= 72       # with its end-of-text


def test_any_text_can_be_encoded_and_comes_back():
    noise = random.Random(0)
    kinds = [range(128), range(0xD800), range(0xE000, 0x110000)]      # ASCII, and all else but surrogates
    texts = ["", "\n\n \t", "film plots xyzzy", "I'm<|endoftext|>"]
    for _ in range(200):
        texts.append("".join(chr(noise.choice(noise.choice(kinds))) for _ in range(50)))
    for text in texts:
        ids = ENCODING.encode_ordinary(text)
        assert ENCODING.decode(ids) == text
        assert ENCODING.eot_token not in ids
    assert ENCODING.eot_token == ENCODING.n_vocab - 1


# ---- downloads, from a server on this machine --------------------------------------------------------------

CONTENT = random.Random(0).randbytes(100_000)
SHA256 = hashlib.sha256(CONTENT).hexdigest()
ANSWERS = {"/good": CONTENT, "/page": b"<html></html>", "/cut": CONTENT[:60_000], "/other": CONTENT[::-1]}


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.server.asked.append(self.path)
        self.send_response(200 if self.path in ANSWERS else 404)
        self.send_header("Content-Length", str(len(CONTENT)))
        self.end_headers()
        self.wfile.write(ANSWERS.get(self.path, b"gone"))

    def log_message(self, *_):
        pass


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.asked = []
        server.url = f"http://127.0.0.1:{server.server_port}"
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}).start()
        yield server
        server.shutdown()


def test_a_good_download_is_kept_under_its_name_alone_and_not_asked_for_again(server, tmp_path):
    path = tmp_path / "deep" / "file"
    for sha256 in (SHA256, SHA256, None):
        assert data.fetch(server.url + "/good", path, len(CONTENT), sha256).read_bytes() == CONTENT
    assert server.asked == ["/good"]
    assert os.listdir(path.parent) == ["file"]


@pytest.mark.parametrize("kept, sha256", [(CONTENT[:-1], None), (CONTENT[::-1], SHA256)])
def test_a_kept_file_of_another_size_or_content_is_downloaded_again(server, tmp_path, kept, sha256):
    (tmp_path / "file").write_bytes(kept)
    data.fetch(server.url + "/good", tmp_path / "file", len(CONTENT), sha256)
    assert (tmp_path / "file").read_bytes() == CONTENT


@pytest.mark.parametrize("answer", ["/gone", "/page", "/cut", "/other"])
def test_a_download_that_fails_leaves_nothing_and_can_be_tried_again(server, tmp_path, answer):
    path = tmp_path / "file"
    sha256 = SHA256 if answer == "/other" else None
    refused(lambda: data.fetch(server.url + answer, path, len(CONTENT), sha256), server.url + answer)
    assert os.listdir(tmp_path) == []
    assert data.fetch(server.url + "/good", path, len(CONTENT), sha256).read_bytes() == CONTENT


def test_without_a_network_one_sentence_says_what_to_do(cache, monkeypatch):
    monkeypatch.setattr(tiktoken.registry, "ENCODINGS", {})           # what this process has loaded already
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(cache))
    for name in ("http_proxy", "https_proxy", "HTTPS_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")                # where nobody answers
    refused(data.gpt2_encoding, "TIKTOKEN_CACHE_DIR", "--preset tiny")
    refused(lambda: data.load_imdb([], ENCODING), "cannot download", "--imdb PATH", "--preset tiny")


# ---- a user's preferences ----------------------------------------------------------------------------------

PAIR = {"prompt": "Last night I", "chosen": " loved it", "rejected": " hated it"}
SCORED = {"prompt": "This film", "responses": [" was bad", " was fine", " was good"], "rewards": [-1, 0.5, 2]}
START = "\n\nHuman: Was it good?\n\nAssistant:"


def write(tmp_path, *rows):
    """A file of rows: objects, or lines as bytes."""
    path = tmp_path / "prefs.jsonl"
    lines = [row if isinstance(row, bytes) else json.dumps(row).encode() for row in rows]
    path.write_bytes(b"\n".join(lines))
    return path


def read(tmp_path, *rows):
    """What a file's rows hold: a list of (prompt, responses, rewards, line)."""
    rows = data.read_preferences(write(tmp_path, *rows), ENCODING)
    return [(ENCODING.decode(row.prompt), ENCODING.decode_batch(row.responses), row.rewards, row.line)
            for row in rows]


def whole(prompt, chosen, rejected):
    return {"chosen": prompt + chosen, "rejected": prompt + rejected}


def test_a_row_is_a_prompt_and_responses_with_rewards_or_the_chosen_one_first(tmp_path):
    ignored = {"margin": float("nan"), "messages": [{"role": "user"}]}
    assert read(tmp_path, PAIR | ignored) == [("Last night I", [" loved it", " hated it"], None, 1)]
    assert read(tmp_path, SCORED) == [("This film", SCORED["responses"], [-1.0, 0.5, 2.0], 1)]


def test_texts_and_lines_are_taken_as_they_stand(tmp_path):
    """No blank is added or removed, end-of-text is a text like others, only a line feed ends a line."""
    odd = {"prompt": " \tSo\n", "chosen": "was\u2028it\x85good \r\n", "rejected": "<|endoftext|>"}
    line = json.dumps(odd, ensure_ascii=False).encode()
    expected = (odd["prompt"], [odd["chosen"], odd["rejected"]], None)
    assert read(tmp_path, line + b"\r", b"\r", line, b" \t") == [(*expected, 1), (*expected, 3)]


@pytest.mark.parametrize("prompt, chosen, rejected", [
    ("The movie was", " good", " great"),                             # not "The movie was g"
    ("The movie was", " good", " good fun"),                          # both keep a word
    (START, " The plot was clever.", " The plot was dull.\n\nHuman: Oh.\n\nAssistant: Yes."),
    (START, " So.\n\nHuman: A\n\nAssistant: B", " So.\n\nHuman: C\n\nAssistant: D")])
def test_the_prompt_of_whole_texts_is_what_they_begin_with(tmp_path, prompt, chosen, rejected):
    assert read(tmp_path, whole(prompt, chosen, rejected)) == [(prompt, [chosen, rejected], None, 1)]


def test_the_joined_ids_of_a_whole_text_are_those_of_the_text(tmp_path, real_data):
    encoding = data.gpt2_encoding()
    assert (encoding.n_vocab, encoding.eot_token) == (50257, 50256)
    starts = ["The movie was", "I saw it.\n\n\nIt", "a  b\t c", START, "one\n\n", "two  "]
    path = write(tmp_path, *[whole(start, " good, I'd say.", " great\n") for start in starts])
    for row, line in zip(data.read_preferences(path, encoding), path.read_text().splitlines()):
        for response, text in zip(row.responses, json.loads(line).values()):
            assert row.prompt + response == encoding.encode_ordinary(text)


def test_the_first_merges_are_a_tokenizer_by_themselves(real_data):
    """They say what the whole one says, wherever it needs no later merge."""
    whole, cut = data.gpt2_encoding(), data.gpt2_encoding(4096)
    assert (cut.n_vocab, cut.eot_token) == (4097, 4096)
    words = ["The", " film", " was", " good", " melodramatic", "\n\n", " naïve", " 10", "/", " 😀"]
    early = 0
    for word in words:
        ids = cut.encode_ordinary(word)
        assert cut.decode(ids) == word and max(ids) < 4096
        if max(whole.encode_ordinary(word)) < 4096:
            assert ids == whole.encode_ordinary(word)
            early += 1
    assert 3 <= early < len(words)


def test_a_prompt_that_most_rows_repeat_is_cut_off_their_texts(tmp_path, capsys):
    hello = {"prompt": "Hi", "chosen": "Hi there!", "rejected": "Hi."}
    assert read(tmp_path, PAIR, hello)[1][1] == ["Hi there!", "Hi."]  # of half of the rows it is not
    assert capsys.readouterr().out == ""
    repeated = PAIR | whole("Last night I", " laughed", " slept")
    texts = [row[1] for row in read(tmp_path, repeated, PAIR, repeated)]
    assert texts == [[" laughed", " slept"], [" loved it", " hated it"], [" laughed", " slept"]]
    assert "which is cut off" in capsys.readouterr().out


CHAT = [{"role": "user", "content": "Was it good?"}]
WHOLE = whole("Once we", " left", " stayed")


@pytest.mark.parametrize("good, bad, reason", [
    (PAIR, b'{"prompt": "a" "chosen": "b"}', "not JSON (Expecting ',' delimiter: column 16)"),
    (PAIR, b"null", "not an object"),
    (PAIR, {"prompt": "a", "chosen": "b"}, "missing key 'rejected'"),
    (SCORED, {"prompt": "a", "responses": ["b", "c"]}, "missing key 'rewards'"),
    (PAIR, PAIR | {"chosen": None}, "must be text"),
    (PAIR, PAIR | {"prompt": CHAT, "chosen": CHAT}, "by your chat template"),
    (PAIR, PAIR | {"chosen": " hated it"}, "'chosen' and 'rejected' are equal"),
    (SCORED, SCORED | {"responses": ["a", "", "b"]}, "empty prompt or response"),
    (WHOLE, whole(START, " Yes", " "), "empty prompt or response"),
    (WHOLE, whole("", "Good", "Great"), "must begin with the same"),
    (SCORED, SCORED | {"responses": "abc"}, "must be lists of the same length"),
    (SCORED, SCORED | {"responses": ["a"], "rewards": [1]}, "at least 2"),
    (SCORED, SCORED | {"rewards": [1, "2", 3]}, "must be numbers"),
    (SCORED, SCORED | {"rewards": [1, 2, float("nan")]}, "finite in float32"),
    (SCORED, SCORED | {"rewards": [0, 1, -1e39]}, "finite in float32"),
    (PAIR, SCORED, "unlike line 1"),
    (PAIR, WHOLE, "unlike line 1"),
    (SCORED, SCORED | {"responses": ["a", "b"], "rewards": [1, 2]}, "as many responses")])
def test_a_faulty_row_is_named_by_file_line_and_reason(tmp_path, good, bad, reason):
    path = write(tmp_path, good, good, b"", bad)
    with pytest.raises(UserError) as error:
        data.read_preferences(path, ENCODING)
    head, fault = str(error.value).split("\n")
    assert head == f"1 of 3 rows of {path} cannot be used: mend or remove it"
    assert fault.startswith(f"{path}:4: ")
    assert reason in fault


def test_faulty_rows_of_all_kinds_are_counted_and_the_first_ten_named(tmp_path):
    long = PAIR | {"prompt": " film" * 50}                            # 50 tokens
    rows = []
    for faulty in [b"{", PAIR | {"chosen": ""}, SCORED, long] * 4:
        rows += [PAIR, faulty]
    path = write(tmp_path, *rows, *[PAIR] * 1000)
    with pytest.raises(UserError) as error:
        data.read_preferences(path, ENCODING, prompt_tokens=49)
    head, *named = str(error.value).split("\n")
    assert head == f"16 of 1,032 rows of {path} cannot be used: mend or remove them"
    assert [line.split(": ")[0] for line in named] == [f"{path}:{number}" for number in range(2, 22, 2)]
    assert named[3] == (f"{path}:8: a prompt of 50 tokens, more than --prompt-tokens 49: raise it, or leave "
                        "such rows out by --skip-long")
    assert len(data.read_preferences(write(tmp_path, long), ENCODING, prompt_tokens=50)) == 1


def test_rows_with_long_prompts_can_be_left_out_and_are_counted(tmp_path, capsys):
    path = write(tmp_path, PAIR, PAIR | {"prompt": " film" * 50}, PAIR)
    rows = data.read_preferences(path, ENCODING, prompt_tokens=49, skip_long=True)
    assert [row.line for row in rows] == [1, 3]
    assert f"{path}: 1 of 3 rows left out" in capsys.readouterr().out


@pytest.mark.parametrize("content, reason", [
    (None, "No such"), (b" \n", "is empty"), (b'[{"prompt":\n', "one JSON array"), (b'"\xef"', "UTF-8")])
def test_a_file_without_rows_is_one_sentence(tmp_path, content, reason):
    path = tmp_path / "prefs.json"
    if content is not None:
        path.write_bytes(content)
    refused(lambda: data.read_preferences(path, ENCODING), str(path), reason)


def test_the_best_response_comes_first_and_the_worst_second():
    pair = Row([1], [[2], [3]], None, 1)
    scored = Row([1], [[2], [3], [4], [5]], [0.5, -1.0, 3.0, 2.0], 2)
    equal = Row([1], [[2], [3]], [1.0, 1.0], 3)                       # nothing to prefer: left out
    ordered = Row([1], [[4], [3], [2], [5]], [3.0, -1.0, 0.5, 2.0], 2)
    assert data.best_first([pair, scored, equal]) == [pair, ordered]
    refused(lambda: data.best_first([equal, equal]), "rewards are equal")


def rows_of(*sizes):
    """Rows whose prompt i stands sizes[i] times, shuffled."""
    prompts = np.repeat(np.arange(len(sizes)), sizes).tolist()
    random.Random(0).shuffle(prompts)
    return [Row([i, i + 1], [[1], [2]], None, line) for line, i in enumerate(prompts, 1)]


def prompts_of(rows):
    return {tuple(row.prompt) for row in rows}


@pytest.mark.parametrize("share", [0.01, 0.1, 0.5, 0.9])
def test_the_held_out_share_is_met_as_closely_as_whole_prompts_allow(share):
    rows = rows_of(*[1, 2, 3] * 100)
    train, held = data.split_rows(rows, share)
    assert abs(len(held) - share * len(rows)) <= 1.5
    assert not prompts_of(train) & prompts_of(held)
    assert train == [row for row in rows if row not in held]          # none is lost, and their order is kept
    assert all(data.split_rows(rows_of(100, 100), share))             # both sides hold something
    refused(lambda: data.split_rows(rows_of(3), share), "all rows have the same prompt")


def test_the_split_depends_on_the_prompts_alone():
    rows = rows_of(*[1] * 20)
    held = prompts_of(data.split_rows(rows, 0.2)[1])
    assert held == {(1, 2), (4, 5), (5, 6), (14, 15)}                 # in every process
    assert prompts_of(data.split_rows(rows[::-1], 0.2)[1]) == held
