"""What the README promises: its commands run, its names are the code's, its numbers the published ones."""
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

import settings
from data import tiny_reviews

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
RESULTS = (ROOT / "results" / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```\w*\n(.*?)```", README, re.DOTALL)
LINES = [line for block in BLOCKS for line in block.splitlines() if line.startswith(("python ", "torchrun "))]
COMMANDS = [shlex.split(line, comments=True) for line in LINES]
NAMES = sorted(set(re.findall(r"`([^`\n]+)`", README)))
MODULES = ("exo", "dpo", "xpo", "ppo", "model", "data", "stages", "evaluate", "figures", "train",
           "toy.bandit", "toy.xpo_bandit")


# ---- names --------------------------------------------------------------------------------------------

def test_every_file_function_test_and_flag_that_it_names_is_there():
    missing = [name for name in NAMES if name.endswith((".py", ".ipynb", "/")) and not (ROOT / name).exists()]
    assert missing == []
    for name in NAMES:
        module, _, function = name.rpartition(".")
        if module in MODULES and function != "py":
            assert hasattr(importlib.import_module(module), function), name
    tests = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "tests").glob("test_*.py"))
    tables = README + (ROOT / "tests" / "README.md").read_text(encoding="utf-8")
    named = re.findall(r"`(test_\w+)`", tables)
    assert len(named) > 40 and [name for name in named if f"def {name}(" not in tests] == []
    known = {"--" + name.replace("_", "-") for name in settings.Config.__dataclass_fields__}
    known |= {"--help", "--nproc_per_node", "--prompt", "--method"}
    assert set(re.findall(r"(?<![\w-])--[a-z][a-z_-]+", README)) <= known


def test_every_picture_that_it_shows_is_there():
    pictures = re.findall(r"!\[[^]]*]\(([^)]+)\)", README + RESULTS)
    places = [(ROOT / path, ROOT / "results" / path) for path in pictures]
    assert pictures and all(here.exists() or there.exists() for here, there in places)


# ---- numbers ------------------------------------------------------------------------------------------

def test_its_table_and_those_of_the_results_are_what_compare_prints():
    """A reader recomputes every number of the tables from the csv files."""
    rows = set()
    for name, pipelines in (("tiny/p*", 9), ("imdb/p*", 5), ("imdb/p4", 1)):
        folders = sorted((ROOT / "results").glob(name))
        line = [sys.executable, ROOT / "results" / "compare.py", *folders]
        printed = subprocess.run(line, capture_output=True, text=True, check=True).stdout.splitlines()
        own = {line for line in printed if line.startswith("|")}
        assert len(folders) == pipelines and len(own) > 15
        assert pipelines == 1 or own <= set(RESULTS.splitlines())
        rows |= own
    table = {line for line in README.splitlines() if re.match(r"\| (exo|dpo|ppo|best)", line)}
    assert len(table) >= 5 and table <= rows
    of_one = {line for line in RESULTS.splitlines() if re.match(r"\| [\w -]+ \| 1 \|", line)}
    assert len(of_one) >= 5 and of_one <= rows


# ---- commands -----------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with the grammar's reviews as IMDB's archive."""
    folder = tmp_path_factory.mktemp("readme")
    with tarfile.open(folder / "aclImdb_v1.tar.gz", "w:gz") as archive:
        for split, n in (("train", 300), ("test", 100)):
            texts, labels, _ = tiny_reviews(n, seed=split)
            for i, (text, label) in enumerate(zip(texts, labels)):
                member = tarfile.TarInfo(f"aclImdb/{split}/{'pos' if label else 'neg'}/{i}_7.txt")
                member.size = len(text)
                archive.addfile(member, io.BytesIO(text.encode()))
    return folder


def small(command, place):
    """A command of the README at toy size and without downloads, or None where other tests run it."""
    if "pytest" in command or "bench" in command:
        return None
    names = {name: str(place / name) for name in ("prefs.jsonl", "aclImdb_v1.tar.gz")}
    names |= {"toy/pairs.py": str(ROOT / "toy" / "pairs.py"), "runs/tiny": str(place / "tiny"),
              "runs/tiny-prefs": str(place / "judged"), "--nproc_per_node=4": "--nproc_per_node=2"}
    command = [names.get(word, word) for word in command if word not in ("1", "2")]      # one seed only
    if command[0] == "torchrun":
        command = ["python", "-m", "torch.distributed.run", "--standalone", *command[1:]]
    if "train.py" in command:
        command += toy_size(command, place)
    return [sys.executable if word == "python" else word for word in command]


def toy_size(command, place):
    """What makes a call of train.py small, in a folder of its own where its settings differ."""
    own, real = "--data" in command, "--imdb" in command
    folder = "tiny"
    for word, other in (("imdb", "imdb"), ("imdb-mini", "mini"), ("--data", "own"), ("--judge", "judged"),
                        ("--eval-split", "trials"), ("torch.distributed.run", "processes")):
        if word in command:
            folder = other
    extra = ["--run", str(place / folder), "--smoke", "--sft-reviews", "200", "--align-steps", "8",
             "--sft-steps", "6", "--oracle-steps", "6", "--limit-responses", "64", "--eval-samples", "1"]
    extra += [] if "--preset" in command else ["--preset", "tiny"]
    extra += ["--tokenizer", "tiny", "--new-tokens", "40"] if own or real else []
    return extra + (["--responses", "6"] if real else [])


@pytest.mark.slow
def test_its_commands_run_in_their_order(place):
    environment = os.environ | {"OMP_NUM_THREADS": "1", "EXO_CACHE": str(place / "cache")}
    done = 0
    for command in COMMANDS:
        command = small(command, place)
        if command:
            where = place if command[1].endswith("pairs.py") else ROOT           # it writes a file there
            result = subprocess.run(command, cwd=where, capture_output=True, text=True, env=environment)
            assert result.returncode == 0, f"{shlex.join(command)}\n{result.stderr[-3000:]}"
            done += 1
    assert done >= 15
