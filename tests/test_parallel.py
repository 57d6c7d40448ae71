"""Several processes do the work of one: the same gradients, responses and files, up to rounding."""
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import SMALL, small

from exo import exo_loss
from loop import Sums, UserError, join_processes, my_rows, read_tensors, update
from model import GPT, GPTConfig, sequence_logprob

ROOT = Path(__file__).parent.parent
B, K, T, V = 7, 4, 12, 11                                 # 7 prompts: two processes get 4 and 3 of them


def torchrun(*command):
    """The command in two processes, as torchrun starts them, on the CPU.  -> what they printed"""
    line = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "--"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([*line, *command], capture_output=True, text=True, env=environment)
    return done.returncode, done.stdout + done.stderr


def ten_steps():
    """Ten steps of EXO by SGD, in micro-batches.  -> weights (n,); loss and gradient's norm (10, 2)"""
    torch.manual_seed(0)
    gpt = GPT(GPTConfig(2, 2, 16, V, T))
    optimizer = torch.optim.SGD(gpt.parameters())
    ids = torch.randint(V, (B, K, T))
    mask = (torch.arange(T) >= 3).expand(B, K, T)
    ref_logp, reward = torch.randn(2, B, K)
    means = []
    for _ in range(10):
        index = torch.randperm(B)
        sums = Sums()
        for part in my_rows(index).split(3):
            logp = sequence_logprob(gpt, ids[part].flatten(0, 1), mask[part].flatten(0, 1)).view(-1, K)
            loss = exo_loss(logp, ref_logp[part], reward[part]) * len(part)
            loss.backward()
            sums.add(len(part), loss=loss)
        means.append(list(update([optimizer], 0.1, sums, "step").values()))
    return torch.cat([p.detach().flatten() for p in gpt.parameters()]), torch.tensor(means)


def test_two_processes_take_the_steps_of_one_and_hold_the_same_bits(tmp_path):
    code, printed = torchrun(__file__, str(tmp_path))
    assert code == 0, printed
    assert printed.count("process 0 alone prints") == 1
    weights, means = ten_steps()
    processes = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    for other_weights, other_means in processes:
        torch.testing.assert_close(other_weights, weights, atol=1e-5, rtol=0)
        torch.testing.assert_close(other_means, means, atol=0, rtol=1e-4)
    assert torch.equal(processes[0][0], processes[1][0])


@pytest.mark.slow
def test_a_run_by_two_processes_is_the_run_of_one(tmp_path):
    flags = ["--method", "all", "--rounds", "2"]
    code, printed = torchrun(str(ROOT / "train.py"), *SMALL, *flags, "--run", str(tmp_path / "two"))
    assert code == 0, printed
    assert small(tmp_path / "one", *flags).code == 0
    weights = list((tmp_path / "one").rglob("*.safetensors"))
    assert len(weights) == 6 + 2 * 6                      # before alignment; weights and samples of six
    for path in weights:
        ours = read_tensors(path)
        theirs = read_tensors(tmp_path / "two" / path.relative_to(tmp_path / "one"))
        assert all((ours[name].float() - theirs[name].float()).abs().max() <= 1e-3 for name in ours), path


if __name__ == "__main__":                                # one of the two processes
    join_processes(torch.device("cpu"))
    print("process 0 alone prints")
    try:
        my_rows(torch.arange(1))
    except UserError:
        torch.save(ten_steps(), Path(sys.argv[1]) / f"{os.environ['RANK']}.pt")
