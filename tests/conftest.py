"""What several tests share: a finished small run, a small random GPT-2, the real IMDB reviews."""
import contextlib
import io
import os
import shutil
from pathlib import Path
from types import SimpleNamespace

os.environ.setdefault("OMP_NUM_THREADS", "1")             # before torch: files run side by side, a core each
os.environ.setdefault("TQDM_DISABLE", "1")

import pytest
import torch

import figures
import train
from model import GPT, GPTConfig

SMALL = ["--smoke", "--preset", "tiny", "--new-tokens", "8", "--sft-reviews", "200", "--prompts", "32",
         "--sft-steps", "6", "--oracle-steps", "6", "--rm-steps", "6", "--align-steps", "6",
         "--limit-responses", "64", "--eval-samples", "2"]
ALIGNED = "exo-rw-k4-s0"                                  # what the run `smoke` aligns


def gap_to_limit(curve, reward, kl):
    """How far a policy's (KL, reward) lies below the limit: min over beta of beta log Z - (r - beta KL)."""
    return float((curve["beta"] * (curve["log_z"] + kl)).min() - reward)


def pytest_collection_modifyitems(items):
    """The files that take longest come first, so that the others run next to them."""
    longest = ("test_tiny.py", "test_readme.py", "test_train.py", "test_loop.py")
    items.sort(key=lambda item: item.path.name not in longest)


def run_train(*arguments):
    """`python train.py ARGUMENTS` in this process.  -> code, its exit status; out, err, what it printed"""
    out, err, code = io.StringIO(), io.StringIO(), 0
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            train.main([str(argument) for argument in arguments])
    except SystemExit as leaving:
        code = leaving.code
    if isinstance(code, str):                             # as Python does at its end
        err.write(code + "\n")
        code = 1
    return SimpleNamespace(code=code, out=out.getvalue(), err=err.getvalue())


def small(folder, *flags, draw=lambda run: None):
    """The smallest run of every stage, without figures (most of the time), or with those of `draw`."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(figures, "draw", draw)
        return run_train(*SMALL, "--run", folder, *flags)


@pytest.fixture(scope="session")
def smoke(tmp_path_factory):
    """The folder of a finished small run of EXO from rewards, with figures, to be read."""
    folder = tmp_path_factory.mktemp("runs") / "a $run with spaces"
    ended = small(folder, "--method", "exo-rw", draw=figures.draw)
    assert ended.code == 0, ended.err
    return folder


@pytest.fixture
def finished(smoke, tmp_path):
    """A copy of it, to be changed."""
    return shutil.copytree(smoke, tmp_path / "run")


@pytest.fixture(scope="session")
def real_data(tmp_path_factory):
    """The folder EXO_TEST_DATA: aclImdb_labelled.tar.xz, aclImdb_unsup.tar.xz, and tiktoken/, its cache.

    tiktoken removes cached files that it doubts, so it gets a copy of its own.
    """
    if "EXO_TEST_DATA" not in os.environ:
        pytest.skip("EXO_TEST_DATA names no folder with the real reviews")
    folder = Path(os.environ["EXO_TEST_DATA"])
    copy = shutil.copytree(folder / "tiktoken", tmp_path_factory.mktemp("tiktoken") / "cache")
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
