"""What several tests share: finished runs, a small random GPT-2, the real IMDB reviews where they are."""
import contextlib
import io
import multiprocessing
import os
import shutil
import signal
from dataclasses import dataclass
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")             # before torch: files run side by side, a core each
os.environ.setdefault("TQDM_DISABLE", "1")

import pytest
import torch

import checkpoint
import figures
import train
from model import GPT, GPTConfig

SMALL = ["--smoke", "--preset", "tiny", "--feedback", "reward", "--new-tokens", "8", "--sft-reviews", "200",
         "--test-reviews", "60", "--prompts", "32", "--sft-steps", "6", "--oracle-steps", "6",
         "--rm-steps", "6", "--align-steps", "6", "--save-every", "2", "--limit-responses", "64",
         "--eval-samples", "2", "--ppo-epochs", "1"]
ALIGNED = "exo-reward-k4-s0"                              # what it aligns
ALL_METHODS = ["--method", "all", "--rounds", "2"]

multiprocessing.set_forkserver_preload(["train", "torch._dynamo"])   # so each process starts at once


def pytest_collection_modifyitems(items):
    """The files that take longest come first, so that the others run beside them."""
    longest = ("test_tiny.py", "test_readme.py", "test_checkpoint.py")
    items.sort(key=lambda item: item.path.name not in longest)


@dataclass
class Ended:
    """How a command ended: its arguments, exit status, and what it printed."""
    arguments: list
    code: int
    out: str
    err: str


def run_train(*arguments):
    """`python train.py ARGUMENTS` in this process, which gets its signal handlers back.  -> Ended"""
    arguments = [str(argument) for argument in arguments]
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    out, err = io.StringIO(), io.StringIO()
    code = 0
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            train.main(arguments)
    except SystemExit as leaving:
        code = leaving.code
    finally:
        torch.set_float32_matmul_precision("highest")     # bfloat16 runs set another
        checkpoint.pending.clear()
        for number, handler in handlers.items():
            signal.signal(number, handler)
    if isinstance(code, str):                             # as Python does at its end
        err.write(code + "\n")
        code = 1
    return Ended(arguments, code, out.getvalue(), err.getvalue())


def small(folder, *flags, draw=lambda run: None):
    """The smallest run of every stage, without figures (most of the time), or with those of `draw`."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(figures, "draw", draw)
        patch.setattr(figures, "progress", lambda run: None)
        return run_train(*SMALL, "--run", folder, *flags)


def at(patch, step, action, stage=ALIGNED):
    """Makes `action` happen in this step of a stage, when it is taken and not yet saved."""
    write = checkpoint.Log.write

    def write_and_act(log, **row):
        write(log, **row)
        if log.path.parts[-2:] == (stage, "metrics.csv") and row["step"] == step:
            action()
    patch.setattr(checkpoint.Log, "write", write_and_act)


@pytest.fixture(scope="session")
def first_run(tmp_path_factory):
    """The finished small run of EXO from rewards, with figures: its folder, and how it ended."""
    folder = tmp_path_factory.mktemp("runs") / "a run with spaces"
    ended = run_train(*SMALL, "--run", folder)
    assert ended.code == 0, ended.err
    return folder, ended


@pytest.fixture(scope="session")
def smoke(first_run):
    """The folder of that run, to be read."""
    return first_run[0]


@pytest.fixture
def finished(smoke, tmp_path):
    """A copy of it, to be changed."""
    return shutil.copytree(smoke, tmp_path / "run")


@pytest.fixture
def begun(smoke, tmp_path):
    """A copy of it without its alignment."""
    return shutil.copytree(smoke, tmp_path / "run", ignore=shutil.ignore_patterns(ALIGNED))


@pytest.fixture(scope="session")
def all_methods(tmp_path_factory):
    """The folder of a finished run of all methods, with figures."""
    folder = tmp_path_factory.mktemp("all") / "run"
    ended = small(folder, *ALL_METHODS, draw=figures.draw)
    assert ended.code == 0, ended.err
    return folder


@pytest.fixture(scope="session")
def real_data(tmp_path_factory):
    """The folder EXO_TEST_DATA: aclImdb_labelled.tar.xz, aclImdb_unsup.tar.xz, and tiktoken/, its cache.

    tiktoken removes cached files that it doubts, so it gets a copy of its own.
    """
    if "EXO_TEST_DATA" not in os.environ:
        pytest.skip("EXO_TEST_DATA names no folder with the real reviews")
    folder = Path(os.environ["EXO_TEST_DATA"])
    copy = tmp_path_factory.mktemp("tiktoken")
    for file in (folder / "tiktoken").iterdir():
        shutil.copyfile(file, copy / file.name)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TIKTOKEN_CACHE_DIR", str(copy))
        yield folder


@pytest.fixture
def gpt():
    """A GPT-2 of two layers, random and far from uniform: 13 words, 24 positions."""
    torch.manual_seed(0)
    gpt = GPT(GPTConfig(n_layer=2, n_head=2, n_embd=16, vocab_size=13, block_size=24))
    for parameter in gpt.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return gpt.eval()
