"""Statements about what is learned from: rows, IMDB, the tiny grammar, tokenizers, a user's preferences."""
import io
import json
import math
import random
import tarfile

import numpy as np
import pytest
import torch

import data
from data import Reviews
from loop import UserError

ENCODING = data.tiny_encoding()


def refused(call, *words):
    """The call ends in one sentence that holds these words."""
    with pytest.raises(UserError) as error:
        call()
    assert "\n" not in str(error.value)
    for word in words:
        assert str(word) in str(error.value)


# ---- rows and reviews --------------------------------------------------------------------------------------

def test_a_row_is_prompt_response_end_of_text_padding():
    reviews = [np.array([1, 2, 3]), [4, 5, 6, 7], np.arange(8)]
    ids, mask = data.padded_rows(reviews, prompt_length=[1, 2, 2], T=5, eos_id=99)
    assert ids.tolist() == [[1, 2, 3, 99, 99], [4, 5, 6, 7, 99], [0, 1, 2, 3, 4]]        # the last one is cut
    assert mask.int().tolist() == [[0, 1, 1, 1, 0], [0, 0, 1, 1, 1], [0, 0, 1, 1, 1]]    # end-of-text once
    assert (ids.dtype, mask.dtype) == (torch.int64, torch.bool)


def some_reviews():
    ids = [np.arange(n) for n in (7, 3, 6, 9)]
    return Reviews(ids, np.array([-1, 1, 0, -1], np.int8), np.zeros(4, int))


def test_stretches_are_the_reviews_whole_each_token_once():
    reviews = some_reviews().first(2)
    reviews, n = reviews.behind_stretches(3)
    assert n == 4
    assert [piece.tolist() for piece in reviews.ids[:n]] == [[0, 1, 2], [3, 4, 5], [6], [0, 1, 2]]
    assert [len(ids) for ids in reviews.ids[n:]] == [7, 3]
    ids, mask = data.padded_rows(reviews.ids[:n], reviews.prompt_length[:n], 3, eos_id=9)
    assert ids.tolist() == [[0, 1, 2], [3, 4, 5], [6, 9, 9], [0, 1, 2]]      # an end only where there is one
    assert mask.tolist()[2] == [False, True, False]


def test_reviews_that_are_not_longer_than_a_prompt_are_left_out_and_labeled_ones_come_first():
    shuffled = some_reviews().shuffled(3, torch.Generator().manual_seed(0))
    assert shuffled.label.tolist() == [0, -1, -1] and shuffled.prompt_length.tolist() == [3, 3, 3]
    assert sorted(len(ids) for ids in shuffled.ids) == [6, 7, 9]


# ---- IMDB --------------------------------------------------------------------------------------------------

FILES = {"aclImdb/README": b"not a review", "aclImdb/train/urls_pos.txt": b"http://example.org",
         "aclImdb/train/pos/10_8.txt": "Tr\u00e8s bien, \u201cgut\u201d.".encode(),
         "aclImdb/train/pos/0_9.txt": b"A fine film.<br /><br />Go and see it. \n",
         "aclImdb/train/neg/0_2.txt": b"  Dull na\xefve",              # a byte that is not UTF-8
         "aclImdb/train/pos/._0_9.txt": b"\0", "__MACOSX/aclImdb/train/pos/0_9.txt": b"\0",
         ".old/train/pos/0_9.txt": b"hidden",
         "aclImdb/train/unsup/3_0.txt": b"Seen <|endoftext|> it", "aclImdb/test/neg/2_1.txt": b"Bad.\r\n"}
REVIEWS = [("test", 0, "Bad."), ("train", 0, "  Dull na\ufffdve"),
           ("train", 1, "A fine film.\n\nGo and see it."), ("train", 1, "Tr\u00e8s bien, \u201cgut\u201d."),
           ("train", None, "Seen <|endoftext|> it")]


def archive(path, files=FILES):
    with tarfile.open(path, "w:" + path.suffix[1:]) as tar:
        for name, text in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(text)
            tar.addfile(member, io.BytesIO(text))
    return path


@pytest.mark.parametrize("name", ["a b.tar.gz", "a.tar.xz"])
def test_reviews_are_read_by_name_from_archives(tmp_path, name):
    path = archive(tmp_path / name)
    assert list(data.read_imdb([path])) == REVIEWS
    assert list(data.read_imdb([path, str(path)])) == REVIEWS * 2


def test_what_is_not_a_whole_archive_of_imdb_is_refused(tmp_path):
    path = archive(tmp_path / "a.tar.gz")
    cut = tmp_path / "cut.tar.gz"
    cut.write_bytes(path.read_bytes()[:200])
    page = tmp_path / "page.tar.gz"
    page.write_text("<html>404</html>")
    for path in (cut, page, tmp_path / "nowhere.tar.gz"):
        refused(lambda path=path: list(data.read_imdb([path])), path, "is missing, damaged or not an archive")
    other = archive(tmp_path / "other.tar.gz", {"aclImdb/README": b"no review"})
    refused(lambda: list(data.read_imdb([other])), other, "holds no reviews")


def test_reviews_are_tokenized_again_only_if_their_content_has_changed(tmp_path, monkeypatch):
    monkeypatch.setenv("EXO_CACHE", str(tmp_path / "cache"))
    paths, sha256 = data.imdb_archives([archive(tmp_path / "a.tar.gz")])
    first = data.load_imdb(paths, sha256, ENCODING)
    assert first["train"].label.tolist() == [0, 1, 1, -1] and first["test"].label.tolist() == [0]
    texts = [ENCODING.decode(ids.tolist()) for split in ("test", "train") for ids in first[split].ids]
    assert texts == [text for _, _, text in REVIEWS]                  # one that names <|endoftext|> goes on
    read = data.read_imdb
    monkeypatch.setattr(data, "read_imdb", lambda paths: pytest.fail("read again"))
    assert len(data.load_imdb(paths, sha256, ENCODING)["train"]) == 4
    monkeypatch.setattr(data, "read_imdb", read)
    more = FILES | {"aclImdb/test/pos/2_9.txt": b"Ah."}
    changed = data.imdb_archives([archive(tmp_path / "a.tar.gz", more)])
    assert len(data.load_imdb(*changed, ENCODING)["test"]) == 2


@pytest.mark.slow
def test_real_imdb_has_25k_train_25k_test_and_50k_unlabeled_reviews(real_data, tmp_path, monkeypatch):
    monkeypatch.setenv("EXO_CACHE", str(tmp_path))
    paths = [real_data / "aclImdb_labelled.tar.xz", real_data / "aclImdb_unsup.tar.xz"]
    loaded = data.load_imdb(*data.imdb_archives(paths), data.gpt2_encoding())
    assert np.bincount(loaded["train"].label + 1).tolist() == [50_000, 12_500, 12_500]
    assert np.bincount(loaded["test"].label + 1).tolist() == [0, 12_500, 12_500]
    assert min(len(ids) for ids in loaded["train"].ids) > 0


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


def test_every_review_is_derived_by_the_grammar(tiny):
    for text in tiny[0][:2000]:
        assert data.faulty(text.split(" ", 6)[6]) == 0               # what follows a prompt of six words


@pytest.mark.parametrize("response, share", [
    (" at home . The plot was not dull at all .", 0),
    (" at home . The plot was was dull . I loved the cast", 1),      # no rule; not finished
    (" at home . I loved the cast . at home .", 0.5),                # the opening stands at the beginning
    (" with plot . Its long cast and its clever script stayed with me .", 0.5), ("", 0)])
def test_what_the_grammar_cannot_derive_is_faulty(response, share):
    assert data.faulty(response) == share


def test_every_word_is_a_token_six_are_the_prompt_and_a_review_fits_72(tiny):
    for text in tiny[0][:2000]:
        assert len(ENCODING.encode_ordinary(text)) == len(text.split())
        assert text.split()[5] in data.FILM
    sentence = max(len(text.split()) for text in data.SENTENCES)
    opening = 6 + max(len(text.split()) for text in data.WHERE) + 1
    assert opening + sentence * max(data.N_SENTENCES) + 1 <= 72       # with its end-of-text


def test_any_text_can_be_encoded_and_comes_back():
    noise = random.Random(0)
    kinds = [range(128), range(0xD800), range(0xE000, 0x110000)]      # ASCII, and all but surrogates
    texts = ["", "\n\n \t", "film plots xyzzy", "I'm<|endoftext|>", "\0"]
    for _ in range(200):
        texts.append("".join(chr(noise.choice(noise.choice(kinds))) for _ in range(50)))
    for text in texts:
        ids = ENCODING.encode_ordinary(text)
        assert ENCODING.decode(ids) == text
        assert ENCODING.eot_token not in ids
    assert ENCODING.eot_token == ENCODING.n_vocab - 1


def test_the_first_merges_are_a_tokenizer_by_themselves(real_data):
    """They say what the whole one says, wherever it needs no later merge."""
    whole, cut = data.gpt2_encoding(), data.gpt2_encoding(4096)
    assert (whole.n_vocab, whole.eot_token, cut.n_vocab, cut.eot_token) == (50257, 50256, 4097, 4096)
    words = ["The", " film", " was", " good", " melodramatic", "\n\n", " naïve", " 10", "/", " 😀"]
    early = 0
    for word in words:
        ids = cut.encode_ordinary(word)
        assert cut.decode(ids) == word and max(ids) < 4096
        if max(whole.encode_ordinary(word)) < 4096:
            assert ids == whole.encode_ordinary(word)
            early += 1
    assert 3 <= early < len(words)


# ---- a user's preferences ----------------------------------------------------------------------------------

PAIR = {"prompt": "Last night I", "chosen": " loved it", "rejected": " hated it"}
SCORED = {"prompt": "This film", "responses": [" was fine", " was bad", " was good"], "rewards": [0.5, -1, 2]}


def read(tmp_path, *lines):
    """What a file's first lines hold: a list of (prompt, responses, rewards); the longest.  Others follow."""
    path = tmp_path / "prefs.jsonl"
    lines = [line if isinstance(line, bytes) else json.dumps(line).encode() for line in lines]
    kind = SCORED if lines[0].find(b"rewards") > 0 else PAIR
    others = [json.dumps(kind | {"prompt": f"x{i}"}).encode() for i in range(60)]
    path.write_bytes(b"\n".join(lines + others))
    preferences, *longest = data.read_preferences(path, ENCODING, 50, 100)
    read = [(ENCODING.decode(each.prompt), ENCODING.decode_batch(each.responses), each.rewards)
            for each in preferences["train"] + preferences["test"]]
    return [each for each in read if not each[0].startswith("x")], longest


def test_a_line_is_a_prompt_with_responses_the_best_first_and_the_worst_second(tmp_path):
    expected = ("Last night I", [" loved it", " hated it"], [1.0, 0.0])
    assert read(tmp_path, PAIR | {"margin": None}) == ([expected], [3, 5])     # " it" is 3 bytes; end-of-text
    expected = ("This film", [" was good", " was bad", " was fine"], [2.0, -1.0, 0.5])
    assert read(tmp_path, SCORED)[0] == [expected]


def test_texts_are_taken_as_they_stand_and_the_longest_are_named(tmp_path, capsys):
    odd = {"prompt": " \tSo\n", "chosen": "was\u2028it\x85good \r\n", "rejected": "<|endoftext|>"}
    line = "\ufeff".encode() + json.dumps(odd, ensure_ascii=False).encode()
    long = PAIR | {"chosen": " film" * 60}
    (first, *_), longest = read(tmp_path, line + b"\r", b" \t", PAIR, long)
    assert first == (odd["prompt"], [odd["chosen"], odd["rejected"]], [1.0, 0.0])
    assert longest == [5, 61] and "the longest response 61 (row 3)" in capsys.readouterr().out


def test_responses_that_are_equal_after_the_cut_are_left_out_and_counted(tmp_path, capsys):
    equal = [PAIR | {"rejected": " loved it"}, PAIR | {"chosen": " film" * 200, "rejected": " film" * 201}]
    assert len(read(tmp_path, PAIR, *equal)[0]) == 1
    assert "2 rows are left out: best and worst response are equal" in capsys.readouterr().out


def test_one_prompt_in_ten_is_held_out_whole_and_whatever_the_order():
    prompts = [data.Preference([i, i + 1], [[1], [2]], [1.0, 0.0]) for i in range(1000)]
    held_out = [each.prompt for each in prompts if each.split == "test"]
    assert 70 < len(held_out) < 130
    assert held_out == [each.prompt for each in prompts[::-1] if each.split == "test"][::-1]


@pytest.mark.parametrize("good, bad, reason", [
    (PAIR, b'{"prompt": "a" "chosen": "b"}', "Expecting ',' delimiter"), (PAIR, b"null", "TypeError"),
    (PAIR, {"prompt": "a", "chosen": "b"}, "'rejected'"), (PAIR, PAIR | {"chosen": None}, "an empty text"),
    (PAIR, PAIR | {"prompt": " film" * 51}, "raise --prompt-tokens"),
    (SCORED, SCORED | {"rewards": [1, 2, float("nan")]}, "not a finite number"),
    (SCORED, SCORED | {"rewards": [1, 2]}, "not a reward for each"), (PAIR, SCORED, "the first line has 2")])
def test_a_faulty_line_is_named_by_file_line_and_reason(tmp_path, good, bad, reason):
    refused(lambda: read(tmp_path, good, good, b"", bad), tmp_path / "prefs.jsonl:4: ", reason)
