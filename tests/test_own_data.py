"""Runs on a user's own preferences: from the file to aligned policies, judged by the reward model."""
import contextlib
import csv
import io
import json
import random
import shutil
from types import SimpleNamespace

import pytest
import torch
from conftest import run_train

import data
import figures
import sample
import settings
import stages
from checkpoint import read_json, read_tensors
from evaluate import read_csv
from model import sequence_logprob
from run import Run, open_run, settle


def write(path, n, kind, seed=0):
    """A file of n rows, pairs or scored, about things that are good or bad.  -> path"""
    pick = random.Random(seed).choice
    with path.open("w") as file:
        for _ in range(n):
            row = {"prompt": f"Film number {pick(range(200))} was"}
            responses = [pick([" warm.", " sharp and clear."]), " cold.", " long."]
            if kind == "pairs":
                row |= {"chosen": responses[0], "rejected": responses[1]}
            else:
                row |= {"responses": responses, "rewards": [2, -1, 0.1]}
            file.write(json.dumps(row) + "\n")
    return path


def align(folder, file, *flags):
    return run_train("--smoke", "--tokenizer", "tiny", "--data", file, "--run", folder, *flags)


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    """A finished run on 120 pairs.  -> its folder, its file, what it printed"""
    folder = tmp_path_factory.mktemp("own")
    file = write(folder / "prefs.jsonl", 120, "pairs")
    ended = align(folder / "run", file)
    assert ended.code == 0, ended.err
    return folder / "run", file, ended.out


def test_a_file_of_pairs_leaves_what_reviews_leave_and_its_judge_is_never_called_oracle(pairs):
    run, _, printed = pairs
    for name in ("frontier.png", "curves.png", "density.png", "exo-preferences-s0/step-00010"):
        assert (run / name).exists(), name
    assert "108 rows to train on, 12 held out" in printed
    table = (run / "table.csv").read_text()
    assert "wins_sft_rm" in table and not (run / "oracle").exists()
    assert "oracle" not in printed + table + (run / "exo-preferences-s0/samples.md").read_text()
    assert set(read_json(run / "reward_model/report.json")) == {"shift", "scale", "accuracy_on_held_out_rows"}


def test_a_small_file_gets_the_steps_that_it_needs_and_keeps_the_best_on_held_out_rows(tmp_path):
    file = write(tmp_path / "prefs.jsonl", 300, "pairs")
    other = tmp_path / "others.jsonl"                                # unlike what is learned, sooner or later
    other.write_text('{"prompt": "Film number 7 was", "chosen": " cold.", "rejected": " warm."}\n' * 30)
    flags = ["--preset", "tiny", "--tokenizer", "tiny", "--device", "cpu", "--data", str(file)]
    cfg, _ = settings.parse([*flags, "--run", str(tmp_path / "run"), "--eval-data", str(other)])
    run = Run(cfg, torch.device("cpu"), bf16=False)
    settle(run)
    assert (cfg.sft_steps, cfg.rm_steps, cfg.align_steps) == (300, 100, 29)
    cfg.sft_steps = 60
    folder = stages.sft(run)
    report = read_json(folder / "report.json")
    assert report["step_kept"] < 60
    loss = stages.held_out_loss(run, run.policy(folder))
    assert loss["test_nats_per_token"] == pytest.approx(report["test_nats_per_token"])


def test_what_went_wrong_is_one_sentence_each_on_the_screen_and_in_the_table(tmp_path, capsys):
    (tmp_path / "sft").mkdir()
    (tmp_path / "sft/report.json").write_text('{"test_perplexity": 400}')
    run = SimpleNamespace(folder=tmp_path, encoding=SimpleNamespace(n_vocab=500))
    good = {"reward": 1.0, "kl": 1.0, "ended": 0.9}
    bad = {"reward": -2.32, "kl": 164.0, "ended": 0.2}
    said = figures.warnings(run, bad, {"reward": -2.23}, 0.9, reach=2.5)
    for words in ("perplexity is 400 in a vocabulary of 500", "-2.32, is below pi_sft's, -2.23",
                  "164.0 nats, is beyond the 2.5", "only 20% of the responses end"):
        assert sum(words in sentence for sentence in said) == 1, words
    (tmp_path / "sft/report.json").write_text('{"test_perplexity": 4}')
    assert figures.warnings(run, good, {"reward": 0.5}, 0.9, reach=2.5) == []


def test_warnings_of_the_table_are_printed(pairs):
    run, _, printed = pairs
    with open(run / "table.csv", newline="") as file:
        sentences = next(csv.DictReader(file))["warnings"].split("; ")
    assert sentences[0] and all(f"warning: exo-preferences-s0: {one}\n" in printed for one in sentences)


def test_without_the_limits_samples_all_else_is_there(pairs, tmp_path):
    folder = shutil.copytree(pairs[0], tmp_path / "run", ignore=shutil.ignore_patterns("limit*", "*.png"))
    ended = align(folder, pairs[1], "--limit-responses", "0")
    assert ended.code == 0, ended.err
    assert (folder / "frontier.png").exists() and not list(folder.glob("limit*"))
    assert "limit" not in (folder / "frontier.csv").read_text()
    assert "that the limit's samples support" not in ended.out


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


def test_a_judge_of_ones_own_evaluates_and_no_method_climbs_it(pairs, tmp_path, capsys, monkeypatch):
    """XPO asks for labels on the way: those stay the reward model's."""
    run, file, _ = pairs
    (tmp_path / "my_reward.py").write_text(JUDGE)
    there = shutil.ignore_patterns("reference", "limit*", "exo*")
    for name, flags in (("without", []), ("with", ["--judge", f"{tmp_path / 'my_reward.py'}:score"])):
        shutil.copytree(run, tmp_path / name, ignore=there)
        ended = align(tmp_path / name, file, "--method", "xpo", *flags)
        assert ended.code == 0, ended.err
    logs = [(tmp_path / name / "xpo-preferences-s0/metrics.csv").read_text() for name in ("with", "without")]
    assert logs[0] == logs[1]
    samples, _ = read_tensors(tmp_path / "with/reference/samples.safetensors")
    ids, mask = samples["ids"].flatten(0, 1), samples["mask"].flatten(0, 1)
    judged = open_run(tmp_path / "with")
    prompts = ["Film number 0 was"] * len(ids)
    assert samples["reward"].flatten().tolist() == pytest.approx(
        judged.judge(prompts, stages.texts(judged, ids, mask)))
    table = (tmp_path / "with/table.csv").read_text()
    assert "wins_sft_judge" in table and "wins_sft_rm" in table
    monkeypatch.setenv("COLUMNS", "500")
    sample.main([str(tmp_path / "with"), "--prompt", "Film number 0 was", "--n", "1"])
    shown = capsys.readouterr().out.splitlines()
    policy, reward, _, text = shown[3].split(maxsplit=3)
    assert f"reward: --judge {tmp_path / 'my_reward.py'}:score" in shown[0] and policy == "pi_sft"
    by_judge = judged.judge(prompts[:1], [text.removesuffix(" …")])
    assert float(reward) == pytest.approx(by_judge[0], abs=0.006)


@pytest.mark.parametrize("judge", ["nowhere.py:score", "my_reward.py:other", "my_reward.py"])
def test_a_judge_that_is_not_there_is_named(tmp_path, judge):
    (tmp_path / "my_reward.py").write_text(JUDGE)
    file = write(tmp_path / "prefs.jsonl", 60, "pairs")
    ended = align(tmp_path / "run", file, "--judge", tmp_path / judge)
    assert ended.code == 1 and f"--judge {tmp_path / judge} is not there" in ended.err


def test_the_judge_and_the_held_out_rows_are_told_as_soon_as_they_are_known(pairs):
    run, _, printed = pairs
    report = read_json(run / "sft/report.json")
    assert f"sft: perplexity {report['test_perplexity']:.2f} on held-out texts" in printed
    accuracy = read_json(run / "reward_model/report.json")["accuracy_on_held_out_rows"]
    assert f"reward_model: accuracy {accuracy:.3f} on held-out rows" in printed
    start, *_, last = read_csv(run / "exo-preferences-s0/eval.csv")
    assert (start["held_out_accuracy"], start["held_out_margin"]) == (0.5, 0)
    told = f"held out: margin {last['held_out_margin']:.3f}, accuracy {last['held_out_accuracy']:.3f}"
    assert told in printed


def test_implicit_rewards_of_held_out_rows_are_beta_pi_times_the_log_ratios(pairs):
    run = open_run(pairs[0])
    settle(run)
    held_out = stages.own_responses(run, "test")
    policy = run.policy(run.folder / "exo-preferences-s0/step-00010")
    h = []
    for row, ref_logp in zip(run.preferences["test"], held_out["ref_logp"].tolist()):
        rows = [row.prompt + response for response in row.responses]
        ids, mask = data.rows(rows, len(row.prompt), run.block_size, run.eos_id)
        with torch.no_grad():
            logp = sequence_logprob(policy, ids, mask).tolist()
        h.append(logp[0] - ref_logp[0] - logp[1] + ref_logp[1])
    said = stages.implicit(run, policy, held_out)
    assert said["held_out_margin"] == pytest.approx(run.cfg.beta_pi * sum(h) / len(h), abs=1e-5)
    assert said["held_out_accuracy"] == sum(one > 0 for one in h) / len(h)


def test_its_responses_are_the_files_own_after_prompts_of_any_length(pairs):
    run, file, _ = pairs
    encoding = data.tiny_encoding()
    rows, _ = data.split_rows(data.read_preferences(file, encoding), 0.1)
    sampled, _ = read_tensors(run / "responses/responses.safetensors")
    assert len({len(row.prompt) for row in rows}) > 1
    assert sampled["reward"].tolist() == [[1, 0]] * len(rows)
    for row, row_ids, row_mask in zip(rows, sampled["ids"], sampled["mask"]):
        for response, ids, mask in zip(row.responses, row_ids, row_mask):
            start = int(mask.int().argmax())
            assert ids[:start].tolist() == row.prompt
            assert ids[mask].tolist() == [*response, encoding.eot_token]


def test_changed_preferences_are_refused_by_name(pairs):
    run, file, _ = pairs
    write(file, 120, "pairs", seed=1)
    ended = align(run, file)
    assert ended.code == 1 and "was made with reviews = " in ended.err
    write(file, 120, "pairs")


def test_faulty_rows_stop_the_run_before_anything_trains(tmp_path):
    file = tmp_path / "prefs.jsonl"
    file.write_text('{"prompt": "a", "chosen": "b"}')
    ended = align(tmp_path / "run", file)
    assert ended.code == 1 and f"{file}:1: missing key 'rejected'" in ended.err
    assert not (tmp_path / "run/sft").exists()


def test_three_rows_are_too_few_and_cut_responses_are_counted(tmp_path):
    file = write(tmp_path / "prefs.jsonl", 3, "pairs")
    ended = align(tmp_path / "run", file)
    assert ended.code == 1 and ended.err.count("\n") == 1 and "10 and 2 are the least" in ended.err
    assert not (tmp_path / "run").exists()
    file = write(tmp_path / "prefs.jsonl", 60, "pairs")
    flags = ["--tokenizer", "tiny", "--device", "cpu", "--new-tokens", "8"]
    cfg, _ = settings.parse(["--data", str(file), *flags])
    run = Run(cfg, torch.device("cpu"), bf16=False)
    with contextlib.redirect_stdout(io.StringIO()) as said:
        settle(run)
    long = [row for row in run.preferences["train"] for response in row.responses
            if len(row.prompt) + len(response) >= cfg.prompt_tokens + 8]
    assert long and f"{len(long)} of 108 responses are cut" in said.getvalue()


def test_weights_of_ones_own_ask_for_the_settings_of_released_weights():
    cfg, _ = settings.parse(["--data", "prefs.jsonl", "--init", "gpt2", "--device", "cpu"])
    assert (cfg.preset, cfg.align_lr, cfg.tokenizer) == ("imdb", 1e-6, "gpt2")


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["pairs", "scored"])
def test_every_method_runs_on_a_users_file(tmp_path, kind):
    file = write(tmp_path / "prefs.jsonl", 100, kind)
    held_out = write(tmp_path / "held.jsonl", 20, kind, seed=1)
    ended = align(tmp_path / "run", file, "--method", "all", "--eval-data", held_out)
    assert ended.code == 0, ended.err
    assert "100 rows to train on, 20 held out" in ended.out
    K = 2 if kind == "pairs" else 3
    names = ["exo-preferences", "dpo-preferences", f"exo-reward-k{K}", f"dpo-reward-k{K}", "ppo-reward"]
    for name in [*names, "xpo-preferences"]:
        assert (tmp_path / "run" / f"{name}-s0/samples.md").exists(), name
