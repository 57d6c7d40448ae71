"""What several tests share: the real IMDB reviews, where there are some, and a small random GPT-2."""
import os
import shutil
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")                        # before torch: test files run side by side, a core each

import pytest
import torch

from model import GPT, GPTConfig


def pytest_collection_modifyitems(items):
    """The files that take longest come first, so that the others run beside them."""
    items.sort(key=lambda item: item.path.name not in ("test_tiny.py", "test_train.py"))


@pytest.fixture(scope="session")
def real_data(tmp_path_factory):
    """The folder EXO_TEST_DATA: aclImdb_labelled.tar.xz, aclImdb_unsup.tar.xz, and tiktoken/, a cache of tiktoken's.

    tiktoken removes cached files that it doubts, so it gets a copy of its own.
    """
    if "EXO_TEST_DATA" not in os.environ:
        pytest.skip("EXO_TEST_DATA names no folder with the real reviews")
    folder, copy = Path(os.environ["EXO_TEST_DATA"]), tmp_path_factory.mktemp("tiktoken")
    for file in (folder / "tiktoken").iterdir():
        shutil.copyfile(file, copy / file.name)
    before = os.environ.get("TIKTOKEN_CACHE_DIR")
    os.environ["TIKTOKEN_CACHE_DIR"] = str(copy)
    yield folder
    os.environ.pop("TIKTOKEN_CACHE_DIR")
    if before is not None:
        os.environ["TIKTOKEN_CACHE_DIR"] = before


@pytest.fixture
def gpt():
    """A GPT-2 of two layers, random and far from uniform: 13 words, 24 positions."""
    torch.manual_seed(0)
    gpt = GPT(GPTConfig(n_layer=2, n_head=2, n_embd=16, vocab_size=13, block_size=24))
    for parameter in gpt.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return gpt.eval()
