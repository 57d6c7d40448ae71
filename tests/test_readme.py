"""What the README promises: its commands run, the names and numbers in it are those of the code and of the published results."""
import csv
import importlib
import io
import os
import re
import shlex
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
from test_own_data import write

from data import tiny_reviews

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
COMMANDS = [shlex.split(line, comments=True) for block in re.findall(r"```\n(.*?)```", README, re.DOTALL)
            for line in block.splitlines() if line.startswith(("python ", "torchrun "))]
NAMES = sorted(set(re.findall(r"`([^`\n]+)`", README)))
MODULES = ("exo", "dpo", "xpo", "ppo", "model", "data", "stages", "evaluate", "figures", "train", "toy.bandit", "toy.xpo_bandit")


# ---- names -------------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("name", [name for name in NAMES if name.endswith((".py", ".ipynb", ".md", "/"))])
def test_every_file_that_it_names_is_there(name):
    left_by_runs = ("samples.md",)
    assert name in left_by_runs or (ROOT / name).exists()


@pytest.mark.parametrize("name", [name for name in NAMES if name.rpartition(".")[0] in MODULES])
def test_every_function_that_it_names_is_there(name):
    module, _, function = name.rpartition(".")
    assert name.endswith(".py") or hasattr(importlib.import_module(module), function)


@pytest.mark.parametrize("name", [name for name in NAMES if name.startswith("test_")])
def test_every_test_that_it_names_is_there(name):
    assert any(f"def {name}(" in path.read_text(encoding="utf-8") for path in (ROOT / "tests").glob("test_*.py"))


def test_every_flag_that_it_names_is_there():
    parsers = "".join((ROOT / f).read_text(encoding="utf-8") for f in ("sample.py", "bench.py"))
    known = {"--" + name.replace("_", "-") for name in importlib.import_module("train").Config.__dataclass_fields__}
    for flag in set(re.findall(r"(?<![\w-])--[a-z][a-z_-]+", README)) - {"--help", "--nproc_per_node"}:
        assert flag in known or f'"{flag}"' in parsers, flag


def test_every_picture_that_it_shows_is_there():
    pictures = re.findall(r"!\[[^]]*]\(([^)]+)\)", README + (ROOT / "results" / "README.md").read_text(encoding="utf-8"))
    assert pictures and all((ROOT / p).exists() or (ROOT / "results" / p).exists() for p in pictures)


# ---- numbers -----------------------------------------------------------------------------------------------------------------

def published():
    """{name: its rows, one a seed} of the published table on tiny."""
    found = {}
    with open(ROOT / "results" / "tiny" / "table.csv", newline="") as file:
        for row in csv.DictReader(file):
            found.setdefault(row["run"].rsplit("-s", 1)[0], []).append(row)
    return found


@pytest.mark.parametrize("column, title, form", [("reward", "reward, log-odds", "{:.2f}"), ("kl", "KL, nats", "{:.2f}"),
                                                 ("share_at_end", "share of the limit", "{:.0%}")])
def test_its_table_is_the_published_one(column, title, form):
    names = ("exo-preferences", "dpo-preferences", "exo-reward-k4", "dpo-reward-k4", "ppo-reward", "xpo-preferences")
    line = next(line for line in README.splitlines() if line.startswith(f"| {title}"))
    values = {name: [float(row[column]) for row in published()[name]] for name in names}
    cells = [f"{form.format(sum(v) / len(v))} ({form.format(min(v))} to {form.format(max(v))})" for v in values.values()]
    assert [cell.strip() for cell in line.split("|")[2:-1]] == cells


def test_every_point_of_the_frontier_is_a_row_of_an_evaluation():
    with open(ROOT / "results" / "tiny" / "frontier.csv", newline="") as file:
        points = [row for row in csv.DictReader(file) if row["seed"]]
    last = {(row["curve"], row["seed"]): (row["kl"], row["reward"]) for row in points}
    table = {tuple(row["run"].rsplit("-s", 1)): (row["kl"], row["reward"]) for rows in published().values() for row in rows}
    assert last == table


# ---- commands ----------------------------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("readme")
    write(folder / "prefs.jsonl", 100, "pairs")
    write(folder / "held_out.jsonl", 20, "pairs", seed=1)
    with tarfile.open(folder / "aclImdb_v1.tar.gz", "w:gz") as archive:                     # IMDB's layout, the grammar's reviews
        for split, n in (("train", 300), ("test", 100)):
            for i, (text, label) in enumerate(zip(*tiny_reviews(n, seed=split)[:2])):
                member = tarfile.TarInfo(f"aclImdb/{split}/{'pos' if label else 'neg'}/{i}_7.txt")
                member.size = len(text)
                archive.addfile(member, io.BytesIO(text.encode()))
    return folder


def small(command, place):
    """A command of the README as the same command at toy size and without downloads, or None where other tests run it."""
    text = shlex.join(command)
    if "pytest" in text or text == "python -m toy.bandit":
        return None
    command = [{"prefs.jsonl": str(place / "prefs.jsonl"), "held_out.jsonl": str(place / "held_out.jsonl"),
                "aclImdb_v1.tar.gz": str(place / "aclImdb_v1.tar.gz"), "runs/tiny": str(place / "tiny"),
                "--nproc_per_node=4": "--nproc_per_node=2"}.get(word, word) for word in command]
    if command[0] == "torchrun":
        command = ["python", "-m", "torch.distributed.run", "--standalone", *command[1:]]
    if "train.py" in command:
        own, real = "--data" in command, "--imdb" in command
        command += ["--run", str(place / ("own" if own else "real" if real else "tiny")), "--smoke"]
        command += [] if "--preset" in command else ["--preset", "tiny"]
        command += ["--tokenizer", "tiny"] if own or real else []
        command += ["--sft-reviews", "200", "--new-tokens", "40"] if real else []
        if "--init" in command:                                      # released weights are a download
            command[command.index("--init") + 1] = str(place / "own" / "sft")
            command[command.index("--run") + 1] = str(place / "weights")
        if "imdb" in command:                                        # the same folder under another preset
            command[command.index("--run") + 1] = str(place / "imdb")
        if "--eval-split" in command:
            command[command.index("--run") + 1] = str(place / "trials")
        if "--eval-data" in command:
            command[command.index("--run") + 1] = str(place / "held-out")
    if "bench.py" in command:
        command += ["--quick", "--out", str(place / "bench")]
    return [sys.executable if word == "python" else word for word in command]


@pytest.mark.slow
def test_its_commands_run_in_their_order(place):
    environment = os.environ | {"OMP_NUM_THREADS": "1", "EXO_CACHE": str(place / "cache")}
    done = 0
    for command in COMMANDS:
        command = small(command, place)
        if command:
            result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment)
            assert result.returncode == 0, f"{shlex.join(command)}\n{result.stderr[-3000:]}"
            done += 1
    assert done >= 15
