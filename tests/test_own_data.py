"""Runs on a user's own preferences: from the file to aligned policies, with a reward model as the judge."""
import json
import random
import subprocess
import sys
from pathlib import Path

import pytest

import preferences
import train
from data import tiny_encoding
from files import read_json, read_tensors

REPOSITORY = Path(train.__file__).parent


def write(path, n, kind, seed=0):
    """n rows about things that are good or bad, in one of the two forms."""
    pick = random.Random(seed).choice
    lines = []
    for _ in range(n):
        prompt = pick(["The film", "Our trip to the lake", "This lamp"]) + f" number {pick(range(200))} was"
        good, bad, fair = f" {pick(['warm', 'sharp'])}.", f" {pick(['cold', 'dull and flat'])}.", " long."
        pair, scored = {"chosen": good, "rejected": bad}, {"responses": [fair, good, bad], "rewards": [0.1, 2, -1]}
        lines.append(json.dumps({"prompt": prompt} | (pair if kind == "pairs" else scored)))
    path.write_text("\n".join(lines))
    return path


def align(folder, file, *arguments):
    command = ["--smoke", "--tokenizer", "tiny", "--data", file, "--run", folder, *arguments]
    return subprocess.run([sys.executable, "train.py", *map(str, command)], cwd=REPOSITORY, capture_output=True, text=True)


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("own")
    file = write(folder / "prefs.jsonl", 120, "pairs")
    done = align(folder / "run", file)
    assert done.returncode == 0, done.stderr
    return folder / "run", file, done.stdout


def test_a_file_of_pairs_leaves_what_reviews_leave(pairs):
    run, _, out = pairs
    for path in ("frontier.png", "curves.png", "density.png", "table.csv", "exo-preferences-s0/samples.md",
                 "exo-preferences-s0/step-00010/model.safetensors"):
        assert (run / path).exists(), path
    assert "108 rows to train on, 12 held out" in out


def test_its_judge_is_the_reward_model_and_is_never_called_oracle(pairs):
    run, _, out = pairs
    assert not (run / "oracle").exists() and "oracle" not in out and "wins, rm" in out
    assert "oracle" not in (run / "table.csv").read_text() + (run / "exo-preferences-s0" / "samples.md").read_text()
    assert set(read_json(run / "reward_model" / "report.json")) == {"shift", "scale", "accuracy_on_held_out_rows"}


def test_the_table_holds_the_files_own_responses_after_prompts_of_any_length(pairs):
    run, file, _ = pairs
    encoding, (train_rows, _) = tiny_encoding(), preferences.split(preferences.read_preferences(file, tiny_encoding()), 0.1)
    table = read_tensors(run / "responses" / "responses.safetensors")[0]
    assert len({len(row.prompt) for row in train_rows}) > 1
    for row, ids, mask in zip(train_rows, table["ids"], table["mask"]):
        for response, i, m in zip(row.responses, ids, mask):
            assert i[m].tolist() == [*response, encoding.eot_token]
            assert i[:m.int().argmax()].tolist() == row.prompt
    assert table["reward"].tolist() == [[1, 0]] * len(train_rows)


def test_changed_preferences_are_refused_by_name(pairs, tmp_path):
    run, file, _ = pairs
    other = write(tmp_path / file.name, 120, "pairs", seed=1)
    other.replace(file.with_name("other.jsonl"))
    done = align(run, file.with_name("other.jsonl"))
    assert done.returncode == 1 and "was made with data =" in done.stderr


def test_faulty_rows_stop_the_run_before_anything_trains(tmp_path):
    file = write(tmp_path / "prefs.jsonl", 5, "pairs")
    file.write_text(file.read_text() + '\n{"prompt": "a", "chosen": "b"}')
    done = align(tmp_path / "run", file)
    assert done.returncode == 1 and done.stderr.splitlines() == [
        f"train.py: 1 of 6 rows of {file} cannot be used: mend or remove it", f"{file}:6: missing key 'rejected'"]
    assert not (tmp_path / "run" / "sft").exists()


@pytest.mark.parametrize("arguments, sentence", [
    (["--data", "prefs.csv"], "--data prefs.csv is neither tiny, nor imdb, nor a .jsonl file"),
    (["--data", "prefs.jsonl", "--held-out", "1"], "--held-out must lie in (0, 1), got 1.0")])
def test_usage_errors_are_one_sentence(arguments, sentence, capsys):
    with pytest.raises(SystemExit) as left:
        train.parse(arguments)
    assert left.value.code == 2 and capsys.readouterr().err == f"train.py: {sentence}: see python train.py --help\n"


def test_weights_of_ones_own_ask_for_the_settings_of_released_weights():
    cfg, _ = train.parse(["--data", "prefs.jsonl", "--init", "gpt2", "--device", "cpu"])
    assert (cfg.preset, cfg.align_lr, cfg.tokenizer) == ("imdb", 1e-6, "gpt2")


def test_the_best_response_comes_first_and_the_worst_second():
    rows = [preferences.Row([1], [[2], [3], [4]], [0.5, -1.0, 3.0], 1), preferences.Row([1], [[2], [3], [4]], [1.0, 1.0, 1.0], 2)]
    assert preferences.best_first(rows) == [preferences.Row([1], [[4], [3], [2]], [3.0, -1.0, 0.5], 1)]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["pairs", "scored"])
def test_every_method_runs_on_a_users_file(tmp_path, kind):
    file, held_out = write(tmp_path / "prefs.jsonl", 100, kind), write(tmp_path / "held.jsonl", 20, kind, seed=1)
    done = align(tmp_path / "run", file, "--method", "all", "--eval-data", held_out)
    assert done.returncode == 0, done.stderr
    assert "100 rows to train on, 20 held out" in done.stdout
    K = 2 if kind == "pairs" else 3
    for name in ("exo-preferences", "dpo-preferences", f"exo-reward-k{K}", f"dpo-reward-k{K}", "ppo-reward", "xpo-preferences"):
        assert (tmp_path / "run" / f"{name}-s0" / "samples.md").exists(), name
