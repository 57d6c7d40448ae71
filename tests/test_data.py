"""Statements about the reviews, real and tiny, their tokenizers, and downloads."""
import hashlib
import http.server
import io
import math
import os
import random
import re
import tarfile
import threading

import numpy as np
import pytest
import tiktoken.registry
import torch

import data
from files import UserError

EOS = 99


def refused(call, *words):
    with pytest.raises(UserError) as error:
        call()
    text = str(error.value)
    assert "\n" not in text and all(word in text for word in words), text


# ---- rows ------------------------------------------------------------------------------------------------------------

def test_a_row_is_prompt_response_end_of_text_padding():
    ids, mask = data.rows([np.array([1, 2, 3, 4]), np.array([5, 6, 7])], prompt_tokens=2, block_size=10, eos_id=EOS)
    assert ids.tolist() == [[1, 2, 3, 4, EOS], [5, 6, 7, EOS, EOS]]
    assert mask.int().tolist() == [[0, 0, 1, 1, 1], [0, 0, 1, 1, 0]]         # the end-of-text once, the padding never
    assert (ids.dtype, mask.dtype) == (torch.int64, torch.bool)


def test_a_review_that_is_cut_has_no_end_of_text():
    ids, mask = data.rows([np.arange(1, 8)], prompt_tokens=2, block_size=5, eos_id=EOS)
    assert ids.tolist() == [[1, 2, 3, 4, 5]] and mask.int().tolist() == [[0, 0, 1, 1, 1]]


@pytest.mark.parametrize("length, ends", [(4, True), (5, False)])
def test_the_end_of_text_is_there_where_there_is_room_for_it(length, ends):
    ids, mask = data.rows([np.arange(length)], prompt_tokens=2, block_size=5, eos_id=EOS)
    assert ids.shape == (1, 5) and (ids[0, 4] == EOS) == ends and mask[0, 4]


# ---- reading IMDB ----------------------------------------------------------------------------------------------------

FILES = {"aclImdb/README": b"not a review", "aclImdb/imdb.vocab": b"a b c",
         "aclImdb/train/urls_pos.txt": b"http://example.org",
         "aclImdb/train/pos/0_9.txt": b"A fine film.<br /><br />Go and see it. \n",
         "aclImdb/train/pos/10_8.txt": "Très bien, \u201cgut\u201d.".encode(),
         "aclImdb/train/neg/0_2.txt": b"  Dull", "aclImdb/train/unsup/3_0.txt": b"Seen <|endoftext|> it",
         "aclImdb/test/pos/1_10.txt": b"Great.", "aclImdb/test/neg/2_1.txt": b"Bad.\r\n"}
REVIEWS = [("test", 0, "Bad."), ("test", 1, "Great."), ("train", 0, "  Dull"),
           ("train", 1, "A fine film.\n\nGo and see it."), ("train", 1, "Très bien, \u201cgut\u201d."),
           ("train", None, "Seen <|endoftext|> it")]


def archive(path, files=FILES, **first):
    """A hand-made tarball; `first` are the attributes of a member in front of the files."""
    with tarfile.open(path, {".tar": "w", ".gz": "w:gz", ".xz": "w:xz"}[path.suffix]) as tar:
        for name, text in reversed(files.items()):                   # the archive's own order is not by name
            member = tarfile.TarInfo(name)
            member.size = len(text)
            tar.addfile(member, io.BytesIO(text))
        if first:
            member = tarfile.TarInfo()
            for name, value in first.items():
                setattr(member, name, value)
            tar.addfile(member)
    return path


def folder(path, files=FILES):
    for name, text in files.items():
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_bytes(text)
    return path / "aclImdb"


def large():
    """Reviews that do not compress, so that an archive of them can be cut anywhere."""
    noise = random.Random(0)
    return {f"aclImdb/train/pos/{i}_9.txt": noise.randbytes(4000).hex().encode() for i in range(20)}


@pytest.mark.parametrize("name", ["a.tar.gz", "a b.tar.xz", "a.tar"])
def test_reviews_are_read_from_an_archive(tmp_path, name):
    assert list(data.read_imdb([archive(tmp_path / name)])) == REVIEWS


def test_reviews_are_read_from_a_folder_in_the_same_order(tmp_path):
    assert list(data.read_imdb(str(folder(tmp_path)))) == REVIEWS


def test_a_prefix_in_the_archive_does_not_matter(tmp_path):
    files = {f"./{name}": text for name, text in FILES.items()}
    assert list(data.read_imdb(archive(tmp_path / "a.tar.gz", files))) == REVIEWS


def test_several_archives_and_folders_are_read_one_after_another(tmp_path):
    assert list(data.read_imdb([archive(tmp_path / "a.tar.gz"), folder(tmp_path)])) == REVIEWS * 2


@pytest.mark.parametrize("name", ["a.tar.gz", "a.tar.xz"])
@pytest.mark.parametrize("keep", [0.0, 0.1, 0.5, 0.9, 0.999])
def test_a_truncated_archive_is_refused(tmp_path, name, keep):
    path = archive(tmp_path / name, large())
    path.write_bytes(path.read_bytes()[:int(keep * path.stat().st_size)])
    refused(lambda: list(data.read_imdb([path])), str(path), "damaged")


@pytest.mark.parametrize("name", ["a.tar.gz", "a.tar.xz"])
@pytest.mark.parametrize("where", [0.2, 0.5, 0.95])
def test_an_archive_with_a_flipped_bit_is_refused(tmp_path, name, where):
    path = archive(tmp_path / name, large())
    blob = bytearray(path.read_bytes())
    blob[int(where * len(blob))] ^= 16
    path.write_bytes(blob)
    refused(lambda: list(data.read_imdb([path])), str(path))


@pytest.mark.parametrize("name", ["../evil.txt", "aclImdb/train/pos/../../../../evil.txt", "/train/pos/0_9.txt"])
def test_a_member_that_points_outside_of_the_archive_is_refused(tmp_path, name):
    path = archive(tmp_path / "a.tar.gz", name=name)
    refused(lambda: list(data.read_imdb([path])), str(path), name)


def test_a_link_in_the_archive_is_not_followed(tmp_path):
    link = dict(name="aclImdb/train/pos/9_9.txt", type=tarfile.SYMTYPE, linkname="/etc/passwd")
    assert list(data.read_imdb([archive(tmp_path / "a.tar.gz", **link)])) == REVIEWS


def test_a_review_that_is_not_utf_8_is_refused_by_name(tmp_path):
    path = archive(tmp_path / "a.tar.gz", FILES | {"aclImdb/train/neg/7_1.txt": b"na\xefve"})
    refused(lambda: list(data.read_imdb([path])), str(path), "aclImdb/train/neg/7_1.txt", "UTF-8")


def test_a_file_that_is_no_archive_is_refused(tmp_path):
    path = tmp_path / "page.tar.gz"
    path.write_text("<html>404</html>")
    refused(lambda: list(data.read_imdb([path])), str(path), "not an archive")


def test_a_path_that_does_not_exist_is_refused(tmp_path):
    refused(lambda: list(data.read_imdb([tmp_path / "nowhere.tar.gz"])), "nowhere.tar.gz", "--imdb")


def test_an_archive_or_folder_without_reviews_is_refused(tmp_path):
    archive(tmp_path / "a.tar.gz", {"aclImdb/README": b"hello"})
    archive(tmp_path / "b.tar.xz", {})
    for path in (tmp_path / "a.tar.gz", tmp_path / "b.tar.xz", tmp_path):
        refused(lambda path=path: list(data.read_imdb([path])), str(path), "no reviews")


# ---- reviews as ids, kept --------------------------------------------------------------------------------------------

@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("EXO_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_loaded_reviews_are_the_read_ones_as_ids(tmp_path, cache):
    encoding = data.tiny_encoding()
    loaded = data.load_imdb([archive(tmp_path / "a.tar.gz")], encoding)
    for split in ("train", "test"):
        expected = [(label, text) for s, label, text in REVIEWS if s == split]
        assert loaded[split].label.tolist() == [-1 if label is None else label for label, _ in expected]
        assert [encoding.decode(ids.tolist()) for ids in loaded[split].ids] == [text for _, text in expected]


def test_a_review_that_mentions_the_end_of_text_does_not_end_there(tmp_path, cache):
    loaded = data.load_imdb([archive(tmp_path / "a.tar.gz")], data.tiny_encoding())
    assert all(data.tiny_encoding().eot_token not in ids for ids in loaded["train"].ids)


@pytest.mark.parametrize("make", [lambda path: archive(path / "a.tar.gz"), folder])
def test_a_second_load_does_not_read_the_reviews_again(tmp_path, cache, monkeypatch, make):
    path = make(tmp_path)
    first = data.load_imdb([path], data.tiny_encoding())
    monkeypatch.setattr(data, "read_imdb", lambda paths: pytest.fail("read again"))
    again = data.load_imdb([path], data.tiny_encoding())
    for split in ("train", "test"):
        assert all(np.array_equal(a, b) for a, b in zip(first[split].ids, again[split].ids))
        assert np.array_equal(first[split].label, again[split].label)


@pytest.mark.parametrize("make", [lambda path, files: archive(path / "a.tar.gz", files), folder])
def test_reviews_whose_content_changed_are_read_again(tmp_path, cache, make):
    data.load_imdb([make(tmp_path, FILES)], data.tiny_encoding())
    path = make(tmp_path, FILES | {"aclImdb/test/pos/1_10.txt": b"Fine."})
    loaded = data.load_imdb([path], data.tiny_encoding())
    assert data.tiny_encoding().decode(loaded["test"].ids[1].tolist()) == "Fine."


def test_the_same_content_under_another_name_is_not_read_again(tmp_path, cache, monkeypatch):
    path = archive(tmp_path / "a.tar.gz")
    data.load_imdb([path], data.tiny_encoding())
    monkeypatch.setattr(data, "read_imdb", lambda paths: pytest.fail("read again"))
    data.load_imdb([path.rename(tmp_path / "b.tar.gz")], data.tiny_encoding())


def test_reviews_can_be_picked():
    reviews = data.Reviews([np.array([1]), np.array([2, 3]), np.array([4])], np.array([1, 0, -1], dtype=np.int8))
    picked = reviews.pick([2, 0])
    assert len(picked) == 2 and [r.tolist() for r in picked.ids] == [[4], [1]] and picked.label.tolist() == [-1, 1]


# ---- the tiny reviews ------------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def tiny():
    return data.tiny_reviews(20_000, seed=0)


def test_labels_have_the_known_log_odds(tiny):
    _, labels, counts = tiny
    for count in range(-5, 6):
        n, p = (counts == count).sum(), 1 / (1 + math.exp(-count))
        assert n > 100
        assert labels[counts == count].mean() == pytest.approx(p, abs=4 * math.sqrt(p * (1 - p) / n))


def test_the_known_count_can_be_read_off_the_text(tiny):
    opinion = {w: o for words in (data.ADJECTIVE, data.VERB) for o, listed in words.items() for w in listed}
    for text, _, count in zip(*tiny):
        words = text.split()
        turned = [-1 if words[i - 1] == "not" else 1 for i in range(len(words))]
        assert sum(sign * opinion.get(w, 0) for sign, w in zip(turned, words)) == count


@pytest.mark.parametrize("s", [-0.5, 0.5, 1.0])
def test_the_log_moment_generating_function_is_exact(tiny, s):
    weight = np.exp(s * tiny[2])
    standard_error = weight.std() / weight.mean() / len(weight) ** 0.5
    assert data.tiny_log_mgf(s) == pytest.approx(np.log(weight.mean()), abs=4 * standard_error)


@pytest.mark.parametrize("s", [-2.0, 0.3, 2.0])
def test_the_log_moment_generating_function_is_that_of_the_exact_distribution(s):
    def several(one, n):
        """The distribution of the sum of n, on -20..20."""
        total = np.zeros(41)
        total[20] = 1
        for _ in range(n):
            total = np.convolve(total, one, mode="same")
        return total

    slot = np.array([data.OPINION[-1], data.OPINION[0], data.OPINION[1]])
    sentence = np.mean([several(slot, len(re.findall("{[+~-]}", text))) for text in data.SENTENCES], axis=0)
    review = np.mean([several(sentence, n) for n in data.N_SENTENCES], axis=0)
    assert data.tiny_log_mgf(s) == pytest.approx(np.log((review * np.exp(s * np.arange(-20, 21))).sum()), abs=1e-9)


def test_there_are_six_opinion_slots_on_average():
    slots = np.mean([len(re.findall("{[+~-]}", s)) for s in data.SENTENCES]) * np.mean(data.N_SENTENCES)
    assert slots == pytest.approx(6)


def test_the_same_seed_gives_the_same_reviews():
    first, again, other = (data.tiny_reviews(20, seed) for seed in ("train", "train", "test"))
    assert first[0] == again[0] and (first[1] == again[1]).all() and first[0] != other[0]


def test_every_tiny_review_fits_72_tokens_with_its_end_of_text(tiny):
    encoding = data.tiny_encoding()
    assert max(map(len, encoding.encode_ordinary_batch(tiny[0]))) + 1 <= 72
    longest = max(len(s.split()) for s in data.SENTENCES) * max(data.N_SENTENCES)
    assert 6 + max(len(w.split()) for w in data.WHERE) + 1 + longest + 1 <= 72       # also those that were not drawn


def test_a_tiny_prompt_is_six_tokens_and_six_whole_words(tiny):
    encoding = data.tiny_encoding()
    for text in tiny[0][:200]:
        prompt = encoding.decode(encoding.encode_ordinary(text)[:6])
        assert prompt.split() == text.split()[:6] and prompt.split()[-1] in data.FILM


def test_loaded_tiny_reviews_are_the_drawn_ones_and_the_splits_differ():
    encoding = data.tiny_encoding()
    loaded = data.load_tiny(30, 20, encoding)
    texts, labels, _ = data.tiny_reviews(30, seed="train")
    assert [encoding.decode(ids.tolist()) for ids in loaded["train"].ids] == texts
    assert loaded["train"].label.tolist() == labels.tolist() and len(loaded["test"]) == 20
    assert loaded["test"].ids[0].tolist() != loaded["train"].ids[0].tolist()


# ---- tokenizers ------------------------------------------------------------------------------------------------------

def test_every_word_of_a_tiny_review_is_one_token(tiny):
    encoding = data.tiny_encoding()
    for text, ids in zip(tiny[0], encoding.encode_ordinary_batch(tiny[0])):
        assert len(ids) == len(text.split()) and encoding.decode(ids) == text


def test_an_unknown_word_becomes_bytes():
    assert data.tiny_encoding().encode_ordinary(" xyzzy") == list(b" xyzzy")


def test_any_text_can_be_encoded_and_comes_back():
    encoding, noise = data.tiny_encoding(), random.Random(0)
    texts = ["", " ", "\n\n \t", "film", "plots", "the film!!", "\u00e9t\u00e9 \U0001f600 \u0301", "I'm<|endoftext|>"]
    kinds = [range(128), range(0xD800), range(0xE000, 0x110000)]     # ASCII, and all the rest but surrogates
    texts += ["".join(chr(noise.choice(noise.choice(kinds))) for _ in range(50)) for _ in range(200)]
    for text in texts:
        ids = encoding.encode_ordinary(text)
        assert encoding.decode(ids) == text and encoding.eot_token not in ids


def test_the_end_of_text_is_the_last_id():
    encoding = data.tiny_encoding()
    assert encoding.eot_token == encoding.n_vocab - 1 == len(set(encoding.token_byte_values()))


def test_every_id_can_be_decoded():
    encoding = data.tiny_encoding()
    assert all(encoding.decode_single_token_bytes(i) for i in range(encoding.n_vocab))


def test_gpt2s_tokenizer_without_a_network_says_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setattr(tiktoken.registry, "ENCODINGS", {})          # what this process has loaded already
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path))
    for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"):
        monkeypatch.setenv(name, f"http://127.0.0.1:{free_port()}")  # where nobody answers
    refused(data.gpt2_encoding, "TIKTOKEN_CACHE_DIR", "--preset tiny")


# ---- downloads, from a server on this machine ------------------------------------------------------------------------

CONTENT = random.Random(0).randbytes(100_000)
SHA256 = hashlib.sha256(CONTENT).hexdigest()


def free_port():
    with http.server.HTTPServer(("127.0.0.1", 0), http.server.BaseHTTPRequestHandler) as server:
        return server.server_port


class Server(http.server.ThreadingHTTPServer):
    """Serves CONTENT in good and bad ways, and counts how often it was asked."""
    asked = 0

    class RequestHandlerClass(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.server.asked += 1
            status, body, headers = {
                "/good": (200, CONTENT, {}), "/gone": (404, b"gone", {}),
                "/page": (200, b"<html>Please log in</html>", {}),
                "/cut": (200, CONTENT[:60_000], {"Content-Length": "100000"}),
                "/cut-chunks": (200, b"%x\r\n" % 100_000 + CONTENT[:60_000], {"Transfer-Encoding": "chunked"}),
                "/etag": (200, CONTENT, {"ETag": f'"{SHA256}"'}),
                "/weak-etag": (200, CONTENT[1:], {"ETag": f'W/"{SHA256}"'}),
                "/other-etag": (200, CONTENT, {"ETag": '"0123-abc"'}),
                "/hub": (302, b"", {"Location": "/good", "X-Linked-Etag": f'"{SHA256}"'}),
                "/bad-hub": (302, b"", {"Location": "/page", "X-Linked-Etag": f'"{SHA256}"'})}[self.path]
            self.protocol_version = "HTTP/1.1"
            self.send_response(status)
            if "Transfer-Encoding" not in headers:
                headers = {"Content-Length": str(len(body))} | headers
            for name, value in headers.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(body)
            self.close_connection = True

        def log_message(self, *_):
            pass

    def __init__(self):
        super().__init__(("127.0.0.1", 0), self.RequestHandlerClass)

    def url(self, path):
        return f"http://127.0.0.1:{self.server_port}/{path}"


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with Server() as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def left_in(path):
    return [p.name for p in path.rglob("*") if p.is_file()]


def test_a_good_download_is_kept_under_its_name_alone(server, tmp_path):
    path = data.fetch(server.url("good"), tmp_path / "deep" / "file", len(CONTENT), SHA256)
    assert path.read_bytes() == CONTENT and left_in(tmp_path) == ["file"]


@pytest.mark.parametrize("sha256", [SHA256, None])
def test_a_second_call_does_not_download_again(server, tmp_path, sha256):
    for _ in range(2):
        data.fetch(server.url("good"), tmp_path / "file", len(CONTENT), sha256)
    assert server.asked == 1


def test_a_cached_file_needs_no_network(tmp_path):
    (tmp_path / "file").write_bytes(CONTENT)
    assert data.fetch(f"http://127.0.0.1:{free_port()}/", tmp_path / "file", len(CONTENT), SHA256) == tmp_path / "file"


@pytest.mark.parametrize("bad", [CONTENT[:-1], CONTENT[:-1] + b"?", b""])
def test_a_cached_file_that_is_not_whole_is_downloaded_again(server, tmp_path, bad):
    (tmp_path / "file").write_bytes(bad)
    assert data.fetch(server.url("good"), tmp_path / "file", len(CONTENT), SHA256).read_bytes() == CONTENT


def test_a_cached_file_of_another_size_is_downloaded_again_where_no_checksum_is_known(server, tmp_path):
    (tmp_path / "file").write_bytes(CONTENT[:-1])
    assert data.fetch(server.url("good"), tmp_path / "file", len(CONTENT)).read_bytes() == CONTENT


def test_a_wrong_checksum_is_refused_with_both_and_nothing_is_kept(server, tmp_path):
    wrong = "0" * 64
    refused(lambda: data.fetch(server.url("good"), tmp_path / "file", None, wrong), f"expected {wrong}, got {SHA256}")
    assert left_in(tmp_path) == []


@pytest.mark.parametrize("path", ["page", "cut", "cut-chunks", "gone"])
def test_a_page_or_a_part_instead_of_the_file_is_refused_and_nothing_is_kept(server, tmp_path, path):
    refused(lambda: data.fetch(server.url(path), tmp_path / "file", len(CONTENT), SHA256), server.url(path))
    assert left_in(tmp_path) == []


@pytest.mark.parametrize("path", ["page", "cut"])
def test_a_wrong_size_is_refused_where_no_checksum_is_known(server, tmp_path, path):
    refused(lambda: data.fetch(server.url(path), tmp_path / "file", len(CONTENT)), "expected 100,000 bytes, got")
    assert left_in(tmp_path) == []


@pytest.mark.parametrize("path", ["etag", "hub", "other-etag"])
def test_a_download_that_agrees_with_the_servers_own_checksum_is_kept(server, tmp_path, path):
    assert data.fetch(server.url(path), tmp_path / "file").read_bytes() == CONTENT


@pytest.mark.parametrize("path", ["weak-etag", "bad-hub"])
def test_a_download_that_differs_from_the_servers_own_checksum_is_refused(server, tmp_path, path):
    refused(lambda: data.fetch(server.url(path), tmp_path / "file"), f"expected {SHA256}, got ")
    assert left_in(tmp_path) == []


def test_a_failed_download_can_be_tried_again(server, tmp_path):
    refused(lambda: data.fetch(server.url("cut"), tmp_path / "file", len(CONTENT), SHA256), "try again")
    assert data.fetch(server.url("good"), tmp_path / "file", len(CONTENT), SHA256).read_bytes() == CONTENT


def test_without_a_network_the_hint_is_given(tmp_path, monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    refused(lambda: data.fetch(f"http://127.0.0.1:{free_port()}/x", tmp_path / "file", hint="use --preset tiny"),
            "cannot download", "use --preset tiny")


def test_imdb_without_a_network_says_to_name_the_archive(cache, monkeypatch):
    monkeypatch.setenv("http_proxy", f"http://127.0.0.1:{free_port()}")
    refused(lambda: data.load_imdb([], data.tiny_encoding()), "--imdb PATH", "--preset tiny")


# ---- the real reviews ------------------------------------------------------------------------------------------------

def test_gpt2s_tokenizer_joins_and_splits_as_gpt2_does(real_data):
    encoding = data.gpt2_encoding()
    assert (encoding.n_vocab, encoding.eot_token) == (50257, 50256)
    assert encoding.encode_ordinary("Hello world") == [15496, 995]
    assert encoding.encode_ordinary("<|endoftext|>") != [50256]


@pytest.mark.slow
def test_real_imdb_has_25k_train_25k_test_and_50k_unlabelled_reviews(real_data, cache):
    paths = [real_data / "aclImdb_labelled.tar.xz", real_data / "aclImdb_unsup.tar.xz"]
    loaded = data.load_imdb(paths, data.gpt2_encoding())
    assert {split: np.bincount(reviews.label + 1).tolist() for split, reviews in loaded.items()} == {
        "train": [50_000, 12_500, 12_500], "test": [0, 12_500, 12_500]}
    assert min(len(ids) for ids in loaded["train"].ids) > 0 and os.listdir(cache)
