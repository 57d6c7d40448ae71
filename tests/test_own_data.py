"""Runs on a user's own preferences: from the file to policies, judged by a reward model or a judge."""
import csv
import json
import random
import shutil
import sys

import pytest
import torch
from conftest import run_train

import data
import sample
import stages
from loop import read_csv, read_json, read_tensors
from model import GPT, sequence_logprob
from stages import open_run


def write(path, n, kind, seed=0):
    """A file of n lines, pairs or scored, about things that are good or bad.  -> path"""
    pick = random.Random(seed).choice
    with path.open("w") as file:
        for _ in range(n):
            line = {"prompt": f"Film number {pick(range(200))} was"}
            responses = [pick([" warm.", " sharp and clear."]), " cold.", " long."]
            if kind == "pairs":
                line |= {"chosen": responses[0], "rejected": responses[1]}
            else:
                line |= {"responses": responses, "rewards": [2, -1, 0.1]}
            file.write(json.dumps(line) + "\n")
    return path


def read_csv_of_names(path):
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def align(folder, file, *flags):
    usual = ["--preset", "tiny", "--smoke", "--tokenizer", "tiny"]
    return run_train(*usual, "--data", file, "--run", folder, *flags)


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    """A finished run on 120 pairs.  -> its folder, its file, what it printed"""
    folder = tmp_path_factory.mktemp("own")
    file = write(folder / "prefs.jsonl", 120, "pairs")
    ended = align(folder / "run", file)
    assert ended.code == 0, ended.err
    return folder / "run", file, ended.out


def test_a_file_of_pairs_leaves_what_reviews_leave_judged_by_a_reward_model(pairs):
    run, _, printed = pairs
    for name in ("frontier.png", "curves.png", "density.png", "exo-s0/samples.md"):
        assert (run / name).exists(), name
    assert not (run / "oracle").exists()
    accuracy = read_json(run / "reward_model/report.json")["accuracy"]
    assert f"reward_model: accuracy {accuracy:.3f} on held-out prompts" in printed
    (row,) = read_csv_of_names(run / "table.csv")
    assert row["objective_share"] == "nan"                # beta does not divide the judge's rewards


def test_its_responses_are_the_files_own_after_prompts_of_any_length(pairs):
    run = open_run(pairs[0])
    sampled = read_tensors(run.folder / "responses/responses.safetensors")
    train = run.preferences["train"]
    assert len({len(each.prompt) for each in train}) > 1 and 100 < len(train) < 120
    assert sampled["reward"].tolist() == [[1, 0]] * len(train)
    for each, row_ids, row_mask in zip(train, sampled["ids"], sampled["mask"]):
        for response, ids, mask in zip(each.responses, row_ids, row_mask):
            start = int(mask.int().argmax())
            assert ids[:start].tolist() == each.prompt
            assert ids[mask].tolist() == [*response, run.eos_id]
    held_out = {tuple(each.prompt) for each in run.preferences["test"]}
    assert held_out and not held_out & {tuple(each.prompt) for each in train}


def test_implicit_rewards_of_held_out_prompts_are_beta_pi_times_the_log_ratios(pairs):
    run = open_run(pairs[0])
    first, *_, last = read_csv(run.folder / "exo-s0/eval.csv")
    assert (first["held_out_accuracy"], first["held_out_margin"]) == (0.5, 0)
    policy, sft = run.gpt(run.folder / "exo-s0"), run.gpt(run.folder / "sft")
    margins = []
    for each in run.preferences["test"]:
        rows = [each.prompt + response for response in each.responses]
        ids, mask = data.padded_rows(rows, len(each.prompt), run.T, run.eos_id)
        with torch.no_grad():
            h = sequence_logprob(policy, ids, mask) - sequence_logprob(sft, ids, mask)   # (2,)
        margins.append(run.cfg.beta_pi * float(h[0] - h[1]))
    assert last["held_out_margin"] == pytest.approx(sum(margins) / len(margins), abs=1e-4)
    assert last["held_out_accuracy"] == pytest.approx(sum(m > 0 for m in margins) / len(margins), abs=1e-4)


JUDGE = """
GOOD = {"warm", "sharp", "clear"}


def score(prompts, responses):
    rewards = []
    for prompt, response in zip(prompts, responses):
        assert prompt.startswith("Film number")
        words = response.replace(".", "").split()
        rewards.append(sum(word in GOOD for word in words) - 0.1 * len(words))
    return rewards
"""


def test_a_judge_of_ones_own_is_for_evaluation_and_no_method_trains_on_it(pairs, tmp_path, capsys):
    """XPO asks for labels on the way: those stay the reward model's."""
    run, file, _ = pairs
    judge = tmp_path / "my_reward.py"
    judge.write_text(JUDGE)
    for name, flags in (("without", []), ("with", ["--judge", f"{judge}:score"])):
        shutil.copytree(run, tmp_path / name, ignore=shutil.ignore_patterns("reference", "limit*", "exo*"))
        ended = align(tmp_path / name, file, "--method", "xpo", *flags)
        assert ended.code == 0, ended.err
    logs = [(tmp_path / name / "xpo-s0/metrics.csv").read_text() for name in ("with", "without")]
    assert logs[0] == logs[1]
    judged = open_run(tmp_path / "with")
    samples = read_tensors(tmp_path / "with/reference/samples.safetensors")
    texts = stages.texts(judged, samples["ids"].flatten(0, 1), samples["mask"].flatten(0, 1))
    own = {}
    exec(JUDGE, own)
    expected = own["score"](["Film number 0 was"] * len(texts), texts)
    assert samples["reward"].flatten().tolist() == pytest.approx(expected)
    sample.main([str(tmp_path / "with"), "--prompt", "Film number 0 was", "--n", "1"])
    name, reward, text = capsys.readouterr().out.splitlines()[-2].split(maxsplit=2)
    assert name == "sft"
    assert float(reward) == pytest.approx(own["score"](["Film number"], [text])[0], abs=0.006)
    judge.write_text(JUDGE.replace("0.1", "0.2"))
    ended = align(tmp_path / "with", file, "--judge", f"{judge}:score", "--label", "x")
    assert ended.code == 1 and "reference was made with judge = " in ended.err


@pytest.mark.parametrize("name, sentence", [
    ("other", "KeyError('other')"), ("none", "gives None for the response ''"), ("scalar", "fails on ''"),
    ("strings", "gives '1' for the response ''"), ("divides", "ZeroDivisionError"), ("short", "gives None")])
def test_a_judge_that_does_not_judge_is_named_before_all_work(pairs, tmp_path, name, sentence):
    returned = {"none": "[None]", "scalar": "1.0", "strings": "['1']", "divides": "[1 / len(responses[0])]",
                "short": "[]"}
    lines = [f"def {name}(prompts, responses):\n    return {value}\n" for name, value in returned.items()]
    (tmp_path / "my_reward.py").write_text("\n".join(lines))
    ended = align(tmp_path / "run", pairs[1], "--judge", f"{tmp_path / 'my_reward.py'}:{name}")
    assert ended.code == 1 and sentence in ended.err and ended.err.count("\n") == 1
    assert not (tmp_path / "run" / "sft").exists()


def test_a_judge_imports_what_lies_next_to_it_even_a_data_module_of_its_own(tmp_path):
    (tmp_path / "data.py").write_text("worth = 7.0\n")
    (tmp_path / "my_reward.py").write_text("from data import worth\nscore = lambda p, r: [worth] * len(r)\n")
    assert data.user_judge(f"{tmp_path / 'my_reward.py'}:score")(["a"] * 2, ["b"] * 2) == [7.0, 7.0]
    assert sys.modules["data"] is data


def test_changed_preferences_and_too_few_of_them_are_refused(pairs, tmp_path):
    changed = write(tmp_path / "prefs.jsonl", 120, "pairs", seed=1)
    ended = align(pairs[0], changed)
    assert ended.code == 1 and "was made with data = " in ended.err
    ended = align(tmp_path / "run", write(tmp_path / "few.jsonl", 3, "pairs"))
    assert ended.code == 1 and "too few prompts" in ended.err and ended.err.count("\n") == 1
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
@pytest.mark.parametrize("kind, K", [("pairs", 2), ("scored", 3)])
def test_every_method_runs_on_a_users_file(tmp_path, kind, K):
    file = write(tmp_path / "prefs.jsonl", 100, kind)
    ended = align(tmp_path / "run", file, "--method", "all")
    assert ended.code == 0, ended.err
    for name in ("exo", "dpo", f"exo-rw-k{K}", f"dpo-rw-k{K}", "ppo", "xpo"):
        assert GPT.from_pretrained(tmp_path / "run" / f"{name}-s0")
