"""Several processes do the work of one: the same gradients, responses and files, up to rounding."""
import itertools
import os
import signal
import socket
from types import SimpleNamespace

import pytest
import torch
import torch.multiprocessing as multiprocessing
from conftest import ALIGNED, ALL_METHODS, at, small

import checkpoint
import compute
from checkpoint import Rows, begin, read_tensors, saves
from compute import Sums, UserError, micro_batches, rng, update
from exo import exo_loss
from model import GPT, GPTConfig, respond, sequence_logprob

B, K, T, V = 7, 4, 12, 11                                 # 7 prompts: two processes get 4 and 3 of them


def in_two_processes(function, folder):
    """function(folder) in two processes, as torchrun starts them, on the CPU.  -> what each returned"""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    arguments = (function, folder, port)
    multiprocessing.start_processes(one_process, arguments, nprocs=2, start_method="forkserver")
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(2)]


def one_process(rank, function, folder, port):
    os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port), "WORLD_SIZE": "2"}
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank)}
    torch.save(function(folder), folder / f"{rank}.pt")


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
        for part in micro_batches(index, 3):
            logp = sequence_logprob(gpt, ids[part].flatten(0, 1), mask[part].flatten(0, 1)).view(-1, K)
            loss = exo_loss(logp, ref_logp[part], reward[part]) * len(part)
            loss.backward()
            sums.add(len(part), loss=loss)
        means.append(list(update(optimizer, 0.1, sums, index, "step").values()))
    return torch.cat([p.detach().flatten() for p in gpt.parameters()]), torch.tensor(means)


def first_tokens():
    """Of the rows that answer 5 prompts: 4 at a time, and one alone, which two processes cannot split."""
    torch.manual_seed(0)
    gpt = GPT(GPTConfig(2, 2, 16, 6, 8))
    prompts = [[1, 2], [3], [4, 5, 1], [2], [1]]
    answers = respond(gpt, prompts, 4, 1.0, 0, rng("answers"), 4, lambda ids, mask: {"first": ids[:, 0]})
    return answers["first"].tolist()


def saved_by_time(folder):
    """Saves of a loop, by a clock that shows 10 seconds more at each look in process 0, and stands in 1."""
    clock = itertools.count(0, 10 if compute.rank() == 0 else 0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoint, "time", SimpleNamespace(perf_counter=lambda: next(clock)))
        for _ in checkpoint.resumable(folder / "loop", {"rows": Rows()}, 6, 0, "loop"):
            pass
    return [path.name for path in saves(folder / "loop")]


def parts(folder):
    compute.start(torch.device("cpu"))
    with pytest.raises(UserError, match="nowhere"):
        begin(folder, {}, upstream=[folder / "nowhere"])             # process 0 alone looks there
    return ten_steps(), first_tokens(), saved_by_time(folder)


def test_two_processes_take_the_steps_of_one_and_hold_the_same_bits(tmp_path):
    weights, means = ten_steps()
    processes = in_two_processes(parts, tmp_path)
    for (other_weights, other_means), first, saved in processes:
        assert saved == ["resume-00000001.pt", "resume-00000006.pt"]
        torch.testing.assert_close(other_weights, weights, atol=1e-5, rtol=0)
        torch.testing.assert_close(other_means, means, atol=0, rtol=1e-4)
        assert first == [1, 3, 4, 2, 1]                              # in the order of the prompts
    assert torch.equal(processes[0][0][0], processes[1][0][0])


def whole_run(folder):
    return small(folder / "run", *ALL_METHODS)


def run_with_a_signal(folder):
    """In step 3 of an alignment a signal comes to process 1 alone."""
    with pytest.MonkeyPatch.context() as patch:
        at(patch, 3, lambda: compute.rank() == 1 and signal.raise_signal(signal.SIGTERM))
        return whole_run(folder)


@pytest.mark.slow
def test_a_run_by_two_processes_stops_goes_on_and_is_the_run_of_one(tmp_path, all_methods):
    stopped = in_two_processes(run_with_a_signal, tmp_path)
    assert [each.code for each in stopped] == [143, 143]
    assert "stopped; go on with" in stopped[0].err and "go on" not in stopped[1].err
    assert saves(tmp_path / "run" / ALIGNED)[-1].name == "resume-00000003.pt"
    assert [each.code for each in in_two_processes(whole_run, tmp_path)] == [0, 0]
    weights = list((tmp_path / "run").rglob("model.safetensors"))
    assert len(weights) == 3 + 7 * 2             # sft, oracle, reward model; two checkpoints an alignment
    for path in weights:
        ours = read_tensors(path)[0]
        theirs = read_tensors(all_methods / path.relative_to(tmp_path / "run"))[0]
        assert all((ours[name] - theirs[name]).abs().max() <= 1e-3 for name in ours), path
