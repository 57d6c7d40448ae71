"""One step, loops that are killed and go on, and files that are never torn: each statement once."""
import http.client
import os
import subprocess
import sys
from pathlib import Path

import pytest
import safetensors.torch
import torch
from conftest import SMALL, small

import loop
import train
from loop import (
    Columns, Log, Sums, UserError, adamw, batch_by_length, begin, cosine, finish, lock, read_tensors,
    resumable, rng, shuffled_batch, update, write_tensors)

ROOT = Path(__file__).parent.parent
STEPS = 140


def same(ours, theirs):
    """Whether two dicts hold the same tensors, bit for bit."""
    assert ours.keys() == theirs.keys()
    return all(ours[k].dtype == theirs[k].dtype and torch.equal(ours[k], theirs[k]) for k in ours)


# ---- one step -----------------------------------------------------------------------------------------

def test_random_numbers_depend_on_their_names_alone():
    names = [(0, "a", "b"), (0, "b", "a"), (0, "ab"), (1, "a", "b"), (0, "a", 0), (0, "a", "0")]
    numbers = [float(torch.rand(1, generator=rng(*name))) for name in names + names]
    assert numbers[:6] == numbers[6:] and len(set(numbers)) == 6


def test_batches_go_through_shuffled_epochs():
    length = torch.arange(24) % 7
    plain = torch.stack([shuffled_batch(step, 3, 24, "x") for step in range(16)])
    by_length = torch.stack([batch_by_length(step, 3, length, "x", window=4) for step in range(16)])
    for batches in (plain, by_length):
        for epoch in batches.view(2, 24):
            assert epoch.bincount().tolist() == 24 * [1]
        assert not torch.equal(batches[:8], batches[8:])
    assert (length[by_length].diff() >= 0).all()
    larger_than_an_epoch = torch.cat([shuffled_batch(step, 7, 5, "x") for step in range(5)])
    assert all(epoch.bincount().tolist() == 5 * [1] for epoch in larger_than_an_epoch.view(7, 5))


def step_of(model, optimizers, x, parts, lr=0.1):
    """One step on the squared outputs, in parts."""
    sums = Sums()
    for part in torch.arange(len(x)).split(parts):
        loss = model(x[part]).square().sum()
        loss.backward()
        sums.add(len(part), loss=loss)
    return update(optimizers, lr, sums, "step 5")


@pytest.mark.parametrize("parts", [8, 3])
def test_a_step_is_the_mean_gradient_clipped_at_norm_one(parts):
    torch.manual_seed(0)
    model = torch.nn.Linear(3, 1)
    x = 10 * torch.randn(8, 3)
    before = [p.detach().clone() for p in model.parameters()]
    gradient = torch.autograd.grad(model(x).square().mean(), list(model.parameters()))
    norm = torch.cat([g.flatten() for g in gradient]).norm()
    means = step_of(model, [torch.optim.SGD(model.parameters())], x, parts)
    assert norm > 1 and means["grad_norm"] == pytest.approx(float(norm), rel=1e-5)
    assert means["loss"] > 0
    for was, now, g in zip(before, model.parameters(), gradient):
        torch.testing.assert_close(now, was - 0.1 * g / norm)
        assert now.grad is None                           # nothing is left for the next step


def test_a_loss_that_is_not_finite_stops_the_run_before_anything_is_changed():
    model = torch.nn.Linear(3, 1)
    optimizer = adamw(model.parameters())
    before = model.weight.detach().clone()
    with pytest.raises(UserError, match="^step 5: the loss is nan .* this step was not taken: lower the"):
        step_of(model, [optimizer], torch.full((4, 3), torch.nan), 4)
    assert torch.equal(model.weight, before) and not optimizer.state


# ---- loops that go on where they stopped --------------------------------------------------------------

class Crash(Exception):
    pass


def training(folder, crash_at=None):
    """A loop with all that a stage's loop keeps.  -> {name: tensor} of what it leaves, its log, its steps"""
    torch.manual_seed(0)
    model = torch.nn.Linear(3, 1)
    optimizer, drawn, log, steps = adamw(model.parameters()), Columns(), Log(folder / "metrics.csv"), []
    x = torch.randn(40, 3, generator=rng(0, "x"))
    state = {"model": model, "optimizer": optimizer, "drawn": drawn, "log": log}
    for step in resumable(folder, state, STEPS, "loop"):
        index = shuffled_batch(step, 4, 40, "loop")
        means = step_of(model, [optimizer], x[index], 3, lr=0.1 * cosine(step, STEPS))
        log.write(step=step + 1, **means)
        if step % 50 == 0:
            drawn.append({"index": index})
        steps.append(step)
        if step == crash_at:
            raise Crash
    return drawn | model.state_dict(), (folder / "metrics.csv").read_text(), steps


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    return training(tmp_path_factory.mktemp("undisturbed"))


@pytest.mark.parametrize("crashes, first", [([0], 0), ([7], 7), ([20, 60, 60], 56), ([139], 133)])
def test_a_loop_that_broke_off_goes_on_from_its_last_save_bit_for_bit(tmp_path, undisturbed, crashes, first):
    """It saves twenty times: at every 7th of 140 steps."""
    for step in crashes:
        with pytest.raises(Crash):
            training(tmp_path, step)
    left, log, steps = training(tmp_path)
    assert steps == list(range(first, STEPS))
    assert same(left, undisturbed[0]) and log == undisturbed[1]


KILLED = """
import os, signal, sys
import loop
write, left = loop.Log.write, {left}
def write_and_die(log, **row):
    global left
    write(log, **row)
    left -= 1
    if left == 0:
        os.kill(os.getpid(), signal.SIGKILL)
loop.Log.write = write_and_die
import train
train.main(sys.argv[1:])
"""


@pytest.mark.slow
@pytest.mark.parametrize("method", ["exo-rw", "xpo", "ppo"])
def test_a_killed_run_ends_with_the_same_bytes(tmp_path, method):
    """Killed in SFT, in the reward model (XPO has none), and twice in the alignment."""
    flags = [*SMALL, "--method", method, "--rounds", "2"]
    assert small(tmp_path / "whole", "--method", method, "--rounds", "2").code == 0
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    for left in (4, 10, 8, 4):
        command = [sys.executable, "-c", KILLED.format(left=left), *flags, "--run", tmp_path / "killed"]
        assert subprocess.run(command, env=environment, capture_output=True).returncode == -9
    assert small(tmp_path / "killed", "--method", method, "--rounds", "2").code == 0
    files = [path.relative_to(tmp_path / "whole") for path in (tmp_path / "whole").rglob("*.*")
             if path.is_file() and path.name not in ("config.json", ".lock0")]
    assert len(files) > 15
    for file in files:
        assert (tmp_path / "killed" / file).read_bytes() == (tmp_path / "whole" / file).read_bytes(), file
    assert not list((tmp_path / "killed").rglob("resume.pt"))


# ---- stages -------------------------------------------------------------------------------------------

def test_a_stage_is_finished_once_and_refused_by_name_when_its_settings_have_changed(tmp_path):
    assert begin(tmp_path / "a", {"lr": 0.1, "seeds": (0, 1)}) is False
    assert begin(tmp_path / "a", {"lr": 0.1, "seeds": (0, 1)}) is False
    (tmp_path / "a" / "resume.pt").touch()
    finish(tmp_path / "a")
    assert begin(tmp_path / "a", {"lr": 0.1, "seeds": (0, 1)}) is True
    assert not (tmp_path / "a" / "resume.pt").exists()
    with pytest.raises(UserError, match=r"a was made with lr = 0.1 \(now 0.2\): use a new folder"):
        begin(tmp_path / "a", {"lr": 0.2, "seeds": (0, 1)})


def test_one_process_at_a_time_works_in_a_run_folder(tmp_path):
    with lock(tmp_path), pytest.raises(UserError, match="is in use by another process"):
        lock(tmp_path)
    lock(tmp_path).close()


def test_a_file_system_without_locks_is_worked_in_all_the_same(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(loop, "fcntl", None)              # as on Windows
    with lock(tmp_path):
        assert "cannot be locked here" in capsys.readouterr().out


def test_a_download_that_breaks_off_or_has_no_place_is_one_sentence(tmp_path, monkeypatch):
    def broken(*_, **__):
        raise http.client.IncompleteRead(b"half")

    monkeypatch.setattr(torch.hub, "download_url_to_file", broken)
    monkeypatch.setenv("EXO_CACHE", str(tmp_path))
    with pytest.raises(UserError, match="cannot download http://x to .*EXO_CACHE.*IncompleteRead"):
        loop.fetch("http://x", "file")
    monkeypatch.setenv("EXO_CACHE", "/proc/nowhere")
    with pytest.raises(UserError, match="cannot download http://x to /proc/nowhere/file"):
        loop.fetch("http://x", "file")


def test_a_lack_of_memory_and_a_full_disk_are_one_sentence(finished, monkeypatch):
    def raises(error):
        def call(*_, **__):
            raise error
        return call

    for name, error, sentence in (
            ("exo_loss", torch.OutOfMemoryError("CUDA"), "out of memory: lower --micro-batch"),
            ("write_tensors", OSError(28, "No space left on device", "runs/x"), "No space left on device")):
        with monkeypatch.context() as patch:
            patch.setattr(train, name, raises(error))
            ended = small(finished, "--method", "exo-rw", "--label", "again")
        assert ended.code == 1 and sentence in ended.err and len(ended.err.splitlines()) == 1


# ---- files --------------------------------------------------------------------------------------------

def test_tensors_come_back_and_the_safetensors_package_reads_them_too(tmp_path):
    tensors = {name: torch.tensor([[1, 0, 3], [4, 5, 100]]).to(dtype) for name, dtype in loop.DTYPES.items()}
    tensors |= {"0-dim": torch.tensor(2.5), "transposed": tensors["I64"].T, "strided": torch.arange(12)[::2]}
    write_tensors(tmp_path / "ours", tensors)
    assert same(read_tensors(tmp_path / "ours"), tensors)
    assert same(safetensors.torch.load_file(tmp_path / "ours"), tensors)
    safetensors.torch.save_file(read_tensors(tmp_path / "ours"), tmp_path / "theirs")
    assert same(read_tensors(tmp_path / "theirs"), tensors)


def test_a_file_that_cannot_be_written_whole_leaves_the_one_before(tmp_path):
    write_tensors(tmp_path / "x", {"w": torch.ones(3)})
    with pytest.raises(Crash), loop.atomic(tmp_path / "x") as file:
        file.write(b"half")
        raise Crash
    assert torch.equal(read_tensors(tmp_path / "x")["w"], torch.ones(3))
