"""Several processes do the work of one: the same gradients, the same responses, the same files.  gloo on the CPU."""
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.multiprocessing as multiprocessing
from enumerable import EOS, NEW, PROMPTS, policy, reward_of

import parallel
import ppo
from checkpoint import rng
from exo import exo_loss
from files import UserError, read_json, read_tensors
from model import GPT, GPTConfig, ScalarGPT, respond, sequence_logprob
from optim import adamw, descend

B, K, T, V = 7, 4, 12, 11                                            # 7 prompts: two processes get 4 and 3 of them
REPOSITORY = Path(parallel.__file__).parent


def run_in_processes(functions, processes, folder):
    """Each function(rank) in so many processes.  -> {its name: what each process returned}"""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    multiprocessing.spawn(one_process, (functions, processes, port, folder), nprocs=processes)
    found = [torch.load(folder / f"{r}.pt", weights_only=False) for r in range(processes)]
    return {function.__name__: [one[function.__name__] for one in found] for function in functions}


def one_process(rank, functions, processes, port, folder):
    os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port), "WORLD_SIZE": str(processes), "RANK": str(rank),
                   "LOCAL_RANK": str(rank)}
    torch.set_num_threads(1)
    parallel.start(torch.device("cpu"))
    torch.save({function.__name__: function(rank) for function in functions}, folder / f"{rank}.pt")
    parallel.stop()


def ten_steps(rank):
    """Ten steps of EXO on rows of unequal lengths, in micro-batches.  -> the gradient of each step, the weights, the logs"""
    torch.manual_seed(0)
    gpt = GPT(GPTConfig(2, 2, 16, V, T))
    optimizer, grads, logs = adamw(gpt, 1e-2, eps=1e-5), [], []
    optimizer.register_step_pre_hook(lambda *_: grads.append(torch.cat([p.grad.flatten().clone() for p in gpt.parameters()])))
    ids, length = torch.randint(V, (B, K, T), generator=rng(1)), torch.randint(2, T - 2, (B, K), generator=rng(2))
    column = torch.arange(T)
    mask = (column >= 3) & (column <= 2 + length[..., None])                                # (B, K, T)
    ref_logp, reward = torch.randn(B, K, generator=rng(3)) - 9, torch.randn(B, K, generator=rng(4))

    def loss_sum(part):
        logp = sequence_logprob(gpt, ids[part].flatten(0, 1), mask[part].flatten(0, 1)).view(-1, K)
        return {"loss": exo_loss(logp, ref_logp[part], reward[part]) * len(part), "logp": logp.detach().mean(1).sum()}, len(part)

    for step in range(10):
        logs.append(descend(optimizer, 1e-2, torch.randperm(B, generator=rng(5, step)), 3, loss_sum, "step"))
    return torch.stack(grads), torch.cat([p.detach().flatten() for p in gpt.parameters()]), logs


def test_two_processes_take_the_steps_of_one(two):
    grads, weights, logs = ten_steps(0)
    for other_grads, other_weights, other_logs in two["ten_steps"]:
        assert ((other_grads - grads).norm(dim=1) <= 1e-5 * grads.norm(dim=1)).all()
        assert (other_weights - weights).abs().max() <= 1e-4
        for ours, theirs in zip(logs, other_logs):
            assert ours == pytest.approx(theirs, rel=1e-4)


def test_the_processes_hold_the_same_bits(two):
    (_, first, _), (_, second, _) = two["ten_steps"]
    assert torch.equal(first, second)


def proximal(rank):
    """Two iterations of PPO on the enumerable model.  -> the responses of a third, the policy's weights, the logs"""
    pi, ref, critic = policy(), policy(), ScalarGPT(policy(), EOS)
    optimizers, prompts = (adamw(pi, 1e-3, eps=1e-5), adamw(critic, 1e-3, eps=1e-5)), PROMPTS.repeat(7, 1)
    logs = [ppo.iteration(pi, ref, critic, *optimizers, reward_of, prompts, policy_lr=1e-3, critic_lr=1e-3, beta=0.5,
                          max_new_tokens=NEW, eos_id=EOS, generator=rng("ppo", step)) for step in range(2)]
    ids = ppo.rollout(pi, ref, critic, reward_of, prompts, NEW, eos_id=EOS, generator=rng("ppo", 2))["ids"]
    return ids, torch.cat([p.detach().flatten() for p in pi.parameters()]), logs


def test_two_processes_do_ppos_iterations_as_one(two):
    ids, weights, logs = proximal(0)                                 # advantages whitened over all rows, not over a process's own
    for other_ids, other_weights, other_logs in two["proximal"]:
        assert torch.equal(other_ids, ids) and (other_weights - weights).abs().max() <= 1e-4
        for ours, theirs in zip(logs, other_logs):
            assert ours == pytest.approx(theirs, rel=1e-3, abs=1e-5)


def answers(rank):
    """Responses to 8 prompts, 5 at a time: chunks of 5 and of 3."""
    prompts = [[1, 2], [3], [4, 5, 1], [2], [1], [5], [3, 3], [2, 4]]
    torch.manual_seed(0)
    gpt = GPT(GPTConfig(2, 2, 16, 6, 3 + NEW))
    return respond(gpt, prompts, NEW, 1.0, EOS, rng("answers"), 5, lambda ids, mask: {
        "logp": sequence_logprob(gpt, ids, mask), "first": ids[:, 0]})


def test_responses_come_back_in_the_order_of_their_prompts(two):
    one = answers(0)
    assert one["first"].tolist() == [1, 3, 4, 2, 1, 5, 3, 2]
    for found in two["answers"]:
        torch.testing.assert_close(found, one, atol=1e-5, rtol=1e-5)


@pytest.mark.slow
def test_a_chunk_of_fewer_rows_than_processes_is_not_split(tmp_path):
    for found in run_in_processes([answers], 4, tmp_path)["answers"]:
        torch.testing.assert_close(found, answers(0), atol=1e-5, rtol=1e-5)


@parallel.on_first
def judged(answer):
    if answer == "bad":
        raise UserError("bad")
    return answer, os.environ["RANK"]


def alone(rank):
    """What `on_first`, `agreed` and a batch that is too small do in each process."""
    told = []
    for broken in (lambda: judged("bad"), lambda: descend(None, 0, torch.arange(1), 0, None, "exo, step 1")):
        with pytest.raises(UserError) as error:
            broken()
        told.append(str(error.value))
    return judged(f"of {rank}"), parallel.agreed(15 * rank), told


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """What two processes return from every function above."""
    return run_in_processes([ten_steps, proximal, answers, alone], 2, tmp_path_factory.mktemp("two"))


def test_the_first_process_decides_for_all(two):
    for answer, number, told in two["alone"]:
        assert answer == ("of 0", "0") and number == 15
        assert told == ["bad", "exo, step 1: a batch of 1 cannot be split among 2 processes: start fewer of them"]


# ---- whole runs --------------------------------------------------------------------------------------------------------------

def torchrun(folder, *arguments):
    """The README's way to start two processes."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "--", "train.py", "--smoke",
               "--run", str(folder), *map(str, arguments)]
    return subprocess.Popen(command, cwd=REPOSITORY, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                            env=os.environ | {"OMP_NUM_THREADS": "1"})


@pytest.mark.slow
def test_a_run_by_two_processes_is_the_run_of_one(tmp_path):
    one, two = tmp_path / "one" / "run", tmp_path / "two" / "run"
    subprocess.run([sys.executable, "train.py", "--smoke", "--method", "all", "--run", one], cwd=REPOSITORY, check=True,
                   capture_output=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    process = torchrun(two, "--method", "all")
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    assert out.count("pi_sft") == 1 and "2 processes" in out        # one of them talks
    files = {path.relative_to(one) for path in one.rglob("*.*") if not path.name.startswith(".")}
    assert files == {path.relative_to(two) for path in two.rglob("*.*") if not path.name.startswith(".")}
    for stage in one.glob("*/stage.json"):
        assert "done" in read_json(two / stage.relative_to(one))
    for weights in sorted(one.rglob("model.safetensors")):
        ours, theirs = (read_tensors(run / weights.relative_to(one))[0] for run in (one, two))
        assert all((ours[k] - theirs[k]).abs().max() <= 1e-3 for k in ours), weights


@pytest.mark.slow
def test_a_run_by_two_processes_that_is_stopped_goes_on(tmp_path):
    process = torchrun(tmp_path / "run", "--align-steps", 300, "--save-every", 1000)
    metrics = tmp_path / "run" / "exo-preferences-s0" / "metrics.csv"
    while process.poll() is None and not (metrics.exists() and metrics.read_text().count("\n") > 5):
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)                              # torchrun passes it on
    _, err = process.communicate(timeout=120)
    assert err.count("stopped; go on with") == 1 and list(metrics.parent.glob("resume-*.safetensors")), err
    again = torchrun(tmp_path / "run", "--align-steps", 300, "--save-every", 1000)
    _, err = again.communicate(timeout=300)
    assert again.returncode == 0 and "0/300" not in err.split("exo-preferences-s0:")[1], err
    assert len(metrics.read_text().splitlines()) == 301
