"""Statements about a user's own preference file: what is read from each accepted form, and the sentence for each faulty row."""
import codecs
import json
import random
import subprocess
import sys
from pathlib import Path

import pytest

import data
from files import UserError
from preferences import Row, read_preferences, split

ROOT = Path(__file__).parent.parent
ENCODING = data.tiny_encoding()
GOOD = {"prompt": "Last night I", "chosen": " loved it", "rejected": " hated it"}
SCORED = {"prompt": "This film", "responses": [" was dull", " was fine", " was superb"], "rewards": [-1, 0.5, 2]}


def ids(text):
    return ENCODING.encode_ordinary(text)


def write(tmp_path, *rows, name="prefs.jsonl"):
    """A row is an object, or a line as bytes."""
    lines = [row if isinstance(row, bytes) else json.dumps(row).encode() for row in rows]
    (tmp_path / name).write_bytes(b"".join(line + b"\n" for line in lines))
    return tmp_path / name


def read(tmp_path, *rows, **limits):
    return read_preferences(write(tmp_path, *rows), ENCODING, **limits)


def texts(row):
    return ENCODING.decode(row.prompt), [ENCODING.decode(response) for response in row.responses]


def message(path, **limits):
    with pytest.raises(UserError) as error:
        read_preferences(path, ENCODING, **limits)
    return str(error.value)


def whole(prompt, chosen, rejected):
    return {"chosen": prompt + chosen, "rejected": prompt + rejected}


# ---- accepted forms ----------------------------------------------------------------------------------------------------------

def test_a_pair_is_its_prompts_ids_the_chosen_ones_the_rejected_ones_and_its_line(tmp_path):
    assert read(tmp_path, GOOD, GOOD) == [Row(ids("Last night I"), [ids(" loved it"), ids(" hated it")], None, line)
                                          for line in (1, 2)]


def test_other_keys_and_nan_in_them_are_ignored(tmp_path):
    assert read(tmp_path, GOOD | {"margin": float("nan"), "messages": [{"role": "user"}], "id": 7}) == read(tmp_path, GOOD)


def test_a_row_with_rewards_keeps_the_order_of_its_responses(tmp_path):
    row, = read(tmp_path, SCORED)
    assert texts(row) == ("This film", [" was dull", " was fine", " was superb"])
    assert row.rewards == [-1.0, 0.5, 2.0] and all(type(reward) is float for reward in row.rewards)


def test_texts_are_taken_as_they_stand(tmp_path):
    """No blank is added or removed, a literal end-of-text marker is text, and no character ends a line but a line end."""
    odd = {"prompt": " \tSo\n", "chosen": "was\u2028it\x85good \r\n", "rejected": "<|endoftext|>"}
    line = json.dumps(odd, ensure_ascii=False).encode()
    assert b"\xe2\x80\xa8" in line
    row, = read(tmp_path, line)
    assert texts(row) == (odd["prompt"], [odd["chosen"], odd["rejected"]])
    assert ENCODING.eot_token not in row.responses[1]


def test_of_dialogues_the_prompt_ends_with_the_last_assistant_that_they_share(tmp_path):
    prompt = "\n\nHuman: Was it good?\n\nAssistant: Quite.\n\nHuman: Why?\n\nAssistant:"
    row, = read(tmp_path, whole(prompt, " The plot was clever.", " The plot was dull.\n\nHuman: Oh.\n\nAssistant: Yes."))
    assert texts(row) == (prompt, [" The plot was clever.", " The plot was dull.\n\nHuman: Oh.\n\nAssistant: Yes."])


def test_of_dialogues_that_part_in_a_humans_words_the_prompt_ends_before(tmp_path):
    start = "\n\nHuman: Hello\n\nAssistant:"
    row, = read(tmp_path, whole(start, " Hi.\n\nHuman: A\n\nAssistant: B", " Hi.\n\nHuman: C\n\nAssistant: D"))
    assert texts(row)[0] == start


@pytest.mark.parametrize("chosen, rejected, prompt", [
    ("The movie was good", "The movie was great", "The movie was"),          # not "The movie was g"
    ("The movie was good", "The movie was good fun", "The movie was"),       # one begins with the other: both keep a word
    ("Q: why?\nA: so", "Q: why?\nA: then", "Q: why?\nA:"),
    ("one  two", "one  six", "one "),
])
def test_of_whole_texts_the_prompt_is_the_words_that_they_share(tmp_path, chosen, rejected, prompt):
    row, = read(tmp_path, {"chosen": chosen, "rejected": rejected})
    assert texts(row) == (prompt, [chosen[len(prompt):], rejected[len(prompt):]])


def joined_ids_are_those_of_the_whole_text(tmp_path, encoding):
    starts = ["The movie was", "I saw it.\n\n\nIt", "a  b\t c", "\n\nHuman: Why?\n\nAssistant:", "one\n\n", "two  "]
    rows = [whole(start, " good, I'd say.", " great\n") for start in starts]
    path = write(tmp_path, *rows, whole("three\n", "\ngood", "\ngreat"))
    for row, line in zip(read_preferences(path, encoding), path.read_text().splitlines()):
        for response, text in zip(row.responses, json.loads(line).values()):
            assert row.prompt + response == encoding.encode_ordinary(text)


def test_the_joined_ids_of_a_whole_text_are_those_of_the_text(tmp_path):
    joined_ids_are_those_of_the_whole_text(tmp_path, ENCODING)


def test_the_joined_ids_of_a_whole_text_are_those_of_the_text_also_with_gpt2s_tokenizer(tmp_path, real_data):
    joined_ids_are_those_of_the_whole_text(tmp_path, data.gpt2_encoding())


def test_a_prompt_that_most_rows_repeat_is_cut_off_their_texts(tmp_path, capsys):
    prompts = ["One evening", "Two days", "On Friday"]
    rows = read(tmp_path, *[{"prompt": p} | whole(p, " we laughed", " we slept") for p in prompts])
    assert [texts(row) for row in rows] == [(p, [" we laughed", " we slept"]) for p in prompts]
    assert "which is cut off" in capsys.readouterr().out


def test_a_greeting_that_answers_a_greeting_is_not_cut(tmp_path, capsys):
    hello = {"prompt": "Hi", "chosen": "Hi there!", "rejected": "Hi."}
    row = read(tmp_path, GOOD, hello, GOOD)[1]
    assert texts(row) == ("Hi", ["Hi there!", "Hi."]) and capsys.readouterr().out == ""


def test_responses_that_repeat_their_prompt_are_cut_as_pairs_are(tmp_path):
    row, = read(tmp_path, SCORED | {"responses": ["This film" + text for text in SCORED["responses"]]})
    assert texts(row) == ("This film", SCORED["responses"])


@pytest.mark.parametrize("ending", [b"\n", b"\r\n"])
@pytest.mark.parametrize("start", [b"", codecs.BOM_UTF8])
@pytest.mark.parametrize("end", [b"", b"LF", b"LF \tLF"])
def test_byte_order_marks_line_ends_and_blank_lines_do_not_matter(tmp_path, start, ending, end):
    line, path = json.dumps(GOOD).encode(), tmp_path / "prefs.jsonl"
    path.write_bytes(start + ending.join([line, b"", line]) + end.replace(b"LF", ending))
    assert read_preferences(path, ENCODING) == [Row(ids("Last night I"), [ids(" loved it"), ids(" hated it")], None, line)
                                                for line in (1, 3)]


# ---- faulty rows -------------------------------------------------------------------------------------------------------------

def without(key, row=GOOD):
    return {name: value for name, value in row.items() if name != key}


MESSAGES = [{"role": "user", "content": "Was it good?"}]
FAULTS = {
    "not JSON": (b'{"prompt": "a" "chosen": "b"}', "not JSON (Expecting ',' delimiter: column 16)"),
    "cut line": (b'{"prompt": "a", "chosen": "b', "not JSON (Unterminated string starting at: column 27)"),
    "many digits": (b'{"id": 1' + b"0" * 5000 + b"}", "not JSON that can be read: a number is too long, or the nesting too deep"),
    "deep": (b"[" * 100_000, "not JSON that can be read: a number is too long, or the nesting too deep"),
    "not UTF-8": (b'{"prompt": "caf\xe9"}', "not UTF-8 text (byte 16 of the line)"),
    "list": (b"[1, 2]", 'a list, where an object {"prompt": ...} must stand'),
    "null": (b"null", 'null, where an object {"prompt": ...} must stand'),
    "no keys": ({"prompt": "a", "choosen": "b"},
                "neither 'chosen' and 'rejected' nor 'responses' and 'rewards' are among its keys"),
    "no rejected": (without("rejected"), "missing key 'rejected'"),
    "no chosen": (without("chosen"), "missing key 'chosen'"),
    "no rewards": (without("rewards", SCORED), "missing key 'rewards'"),
    "no responses": (without("responses", SCORED), "missing key 'responses'"),
    "no prompt": (without("prompt", SCORED), "missing key 'prompt'"),
    "number": (GOOD | {"chosen": 3}, "'chosen' must be text, and is a number"),
    "null text": (GOOD | {"prompt": None}, "'prompt' must be text, and is null"),
    "true": (GOOD | {"rejected": True}, "'rejected' must be text, and is true or false"),
    "object": (GOOD | {"rejected": {}}, "'rejected' must be text, and is an object"),
    "strings": (GOOD | {"rejected": ["a"]}, "'rejected' must be text, and is a list"),
    "messages": (GOOD | {"prompt": MESSAGES}, "'prompt' is a list of messages: make one text of them by your chat template"),
    "chat": ({"chosen": MESSAGES, "rejected": MESSAGES},
             "'chosen' is a list of messages: make one text of them by your chat template"),
    "empty prompt": (GOOD | {"prompt": ""}, "'prompt' is empty"),
    "blank prompt": (GOOD | {"prompt": " \n"}, "'prompt' holds only blanks"),
    "empty chosen": (GOOD | {"chosen": ""}, "'chosen' is empty"),
    "blank rejected": (GOOD | {"rejected": "\t"}, "'rejected' holds only blanks"),
    "half": (GOOD | {"chosen": "so \ud83d"}, r"'chosen' holds half of a character (\ud83d)"),
    "equal": (GOOD | {"chosen": "a", "rejected": "a"}, "'chosen' and 'rejected' are equal"),
    "response": (SCORED | {"responses": ["a", 5, "b"]}, "'response 2' must be text, and is a number"),
    "empty response": (SCORED | {"responses": ["a", "", "b"]}, "'response 2' is empty"),
    "one text": (SCORED | {"responses": "abc"}, "'responses' must be a list, and is text"),
    "one reward": (SCORED | {"rewards": 1.5}, "'rewards' must be a list, and is a number"),
    "lengths": (SCORED | {"rewards": [1, 2]}, "'responses' holds 3 and 'rewards' 2: both must hold as many, at least 2"),
    "K = 1": (SCORED | {"responses": ["a"], "rewards": [1]},
              "'responses' holds 1 and 'rewards' 1: both must hold as many, at least 2"),
    "reward text": (SCORED | {"rewards": [1, "2", 3]}, "reward 2 must be a number, and is text"),
    "reward true": (SCORED | {"rewards": [True, 2, 3]}, "reward 1 must be a number, and is true or false"),
    "NaN": (SCORED | {"rewards": [1, 2, float("nan")]}, "reward 3 is not finite (in float32)"),
    "Infinity": (SCORED | {"rewards": [float("-inf"), 2, 3]}, "reward 1 is not finite (in float32)"),
    "1e400": (b'{"prompt": "a", "responses": ["b", "c", "d"], "rewards": [1e400, 1, 2]}', "reward 1 is not finite (in float32)"),
    "huge": (SCORED | {"rewards": [0, 10 ** 400, 3]}, "reward 2 is not finite (in float32)"),
    "1e39": (SCORED | {"rewards": [0, 1, 1e39]}, "reward 3 is not finite (in float32)"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_faulty_row_is_named_by_file_line_and_reason(tmp_path, fault):
    line, reason = FAULTS[fault]
    path = write(tmp_path, *[SCORED if isinstance(line, dict) and "rewards" in line else GOOD] * 2, b"", line)
    assert message(path) == f"1 of 3 rows of {path} cannot be used: mend or remove it\n{path}:4: {reason}"


WHOLE = whole("Once we", " left", " stayed")
REPEATED = WHOLE | {"prompt": "Once we"}
LIKE = "a file has one kind of rows"


@pytest.mark.parametrize("first, line, reason", [
    (GOOD, SCORED, f"responses with rewards, where line 1 holds a pair: {LIKE}"),
    (SCORED, GOOD, f"a pair, where line 1 holds responses with rewards: {LIKE}"),
    (GOOD, WHOLE, f"a pair without 'prompt', where line 1 holds a pair: {LIKE}"),
    (WHOLE, GOOD, f"a pair, where line 1 holds a pair without 'prompt': {LIKE}"),
    (SCORED, SCORED | {"responses": ["a", "b"], "rewards": [1, 2]}, "2 responses, where line 1 has 3: K is the same in all rows"),
    (WHOLE, whole("", "Good", "Great"), "'chosen' and 'rejected' do not begin with the same words: give the prompt as 'prompt'"),
    (WHOLE, whole("", "\n a", "\n b"), "'chosen' and 'rejected' do not begin with the same words: give the prompt as 'prompt'"),
    (WHOLE, whole("\n\nHuman: Hi\n\nAssistant:", " Yes", " "), "'rejected' is empty after the prompt"),
    (WHOLE, whole("\n\nHuman: Hi\n\nAssistant:", "", " Yes"), "'chosen' is empty after the prompt"),
    (REPEATED, {"prompt": "Two"} | whole("Two", " a", ""), "'rejected' is empty after the prompt"),
    (REPEATED, GOOD, "its texts do not begin with its prompt, as those of most rows do"),
])
def test_a_row_unlike_the_others_is_named_by_file_line_and_reason(tmp_path, first, line, reason):
    path = write(tmp_path, first, first, line)
    assert message(path) == f"1 of 3 rows of {path} cannot be used: mend or remove it\n{path}:3: {reason}"


def test_a_prompt_too_long_is_named_by_file_and_line(tmp_path):
    long = " film" * 1050                                            # a token each
    path = write(tmp_path, GOOD, GOOD | {"prompt": long})
    assert message(path, prompt_tokens=1049) == (
        f"1 of 2 rows of {path} cannot be used: mend or remove it\n"
        f"{path}:2: a prompt of 1,050 tokens, where at most 1,049 fit: raise --prompt-tokens, or shorten it")
    assert len(read_preferences(path, ENCODING, prompt_tokens=1050)) == len(read_preferences(path, ENCODING)) == 2


def test_ten_faulty_rows_are_named_in_their_order_and_the_others_counted(tmp_path):
    """Whatever the kinds of their faults, those that only comparing with other rows shows among them."""
    faulty = [b"{", GOOD | {"chosen": ""}, SCORED] * 5
    path = write(tmp_path, *[row for one in faulty for row in (GOOD, one)], *[GOOD] * 1000)
    head, *named, rest = message(path).split("\n")
    assert head == f"15 of 1,030 rows of {path} cannot be used: mend or remove them"
    assert [line.split(": ")[0] for line in named] == [f"{path}:{number}" for number in range(2, 22, 2)]
    assert rest == "... and 5 more"


def test_rows_whose_responses_are_all_worth_the_same_are_kept_unless_all_are_so(tmp_path):
    same = SCORED | {"rewards": [1, 1, 1.0]}
    assert len(read(tmp_path, same, SCORED)) == 2
    path = write(tmp_path, same, SCORED | {"rewards": [2, 2, 2]})
    assert message(path) == f"{path}: in every row all rewards are equal, so there is nothing to prefer: give rewards that differ"


@pytest.mark.parametrize("blob", [b"", b"\n \r\n", codecs.BOM_UTF8])
def test_an_empty_file_is_one_sentence(tmp_path, blob):
    path = tmp_path / "prefs.jsonl"
    path.write_bytes(blob)
    assert message(path) == f"{path} is empty: it must hold a JSON object a line"


def test_a_missing_file_a_folder_and_a_compressed_file_are_one_sentence(tmp_path):
    assert message(tmp_path / "no.jsonl") == f"{tmp_path / 'no.jsonl'} does not exist: name a .jsonl file of preferences"
    assert message(tmp_path) == f"{tmp_path} is a folder: name a .jsonl file of preferences in it"
    (tmp_path / "a.jsonl.gz").write_bytes(b"\x1f\x8b\x08\x00")
    assert message(tmp_path / "a.jsonl.gz") == f"{tmp_path / 'a.jsonl.gz'} is compressed: unpack it first, by gunzip"


# ---- the split ---------------------------------------------------------------------------------------------------------------

def rows(*sizes):
    """Rows whose prompt i stands sizes[i] times, shuffled."""
    found = [Row([i, i + 1], [[1], [2]], None, 0) for i, size in enumerate(sizes) for _ in range(size)]
    random.Random(0).shuffle(found)
    return [Row(row.prompt, row.responses, row.rewards, line) for line, row in enumerate(found, 1)]


def prompts(rows):
    return {tuple(row.prompt) for row in rows}


def test_no_prompt_is_on_both_sides_and_no_row_is_lost():
    given = rows(*[1, 2, 5] * 50)
    train, held = split(given, 0.2)
    assert not prompts(train) & prompts(held)
    assert sorted(train + held, key=lambda row: row.line) == given
    assert [row.line for row in train] == sorted(row.line for row in train)


@pytest.mark.parametrize("share", [0.01, 0.1, 0.5, 0.9])
def test_the_share_is_met_as_closely_as_whole_prompts_allow(share):
    for seed in range(5):
        assert abs(len(split(rows(*[1] * 1000), share, seed)[1]) - 1000 * share) <= 0.5
        assert abs(len(split(rows(*[1, 2, 3] * 100), share, seed)[1]) - 600 * share) <= 1.5


def test_both_sides_hold_something_wherever_there_are_two_prompts():
    for share in (0.001, 0.5, 0.999):
        for sizes in ((1, 1), (500, 1), (100, 100, 100)):
            assert all(split(rows(*sizes), share))


def test_the_split_depends_on_the_seed_and_not_on_the_order_of_the_rows():
    given = rows(*[1, 2] * 100)
    held = prompts(split(given, 0.3)[1])
    assert prompts(split(given[::-1], 0.3)[1]) == held
    assert prompts(split(given, 0.3, seed=1)[1]) != held


@pytest.mark.slow
def test_the_split_is_the_same_in_another_process():
    code = "from preferences import *; print([r.line for r in split([Row([i], [], None, i) for i in range(50)], .2)[1]])"
    outputs = {subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT,
                              env={"PYTHONHASHSEED": seed}).stdout for seed in ("1", "2")}
    assert len(outputs) == 1 and outputs.pop().count(",") == 9


def test_nothing_held_out_is_everything_trained_on():
    assert split(rows(1, 2), 0) == (rows(1, 2), []) and split(rows(3), 0) == (rows(3), [])


def test_one_prompt_alone_cannot_be_divided():
    with pytest.raises(UserError, match="^all rows have the same prompt, so none can be held out: give rows with other prompts$"):
        split(rows(3), 0.5)
