"""Files that are never torn, runs that are never lost, and what is refused: each statement once."""
import hashlib
import io
import multiprocessing
import os
import random
import resource
import shlex
import shutil
import signal
import sys
from functools import partial
from types import SimpleNamespace

import pytest
import safetensors.torch
import torch
from conftest import ALIGNED, ALL_METHODS, at, small

import checkpoint
import figures
import sample
import stages
import train
from checkpoint import Log, Rows, begin, finish, lock, read_json, read_tensors, resumable, write_tensors
from compute import Sums, UserError, adamw, batch_by_length, cosine, micro_batches, rng, update
from evaluate import read_csv
from model import GPT

METHODS = {"exo": ALIGNED, "ppo": "ppo-reward-s0", "xpo": "xpo-preferences-s0"}


def refused(call, *words):
    """The call ends in a UserError of one sentence that has these words."""
    with pytest.raises(UserError) as error:
        call()
    text = str(error.value)
    assert "\n" not in text
    assert all(str(word) in text for word in words), text


def one_sentence(ended, *words):
    """The command ends so too, and without a traceback."""
    assert ended.code == 1
    assert ended.err.startswith("train.py: ") and len(ended.err.splitlines()) == 1, ended.err
    assert all(str(word) in ended.err for word in words), ended.err


def equal(ours, theirs):
    """Whether two dicts hold the same tensors, bit for bit."""
    assert ours.keys() == theirs.keys()
    return all(ours[k].dtype == theirs[k].dtype and torch.equal(ours[k], theirs[k]) for k in ours)


# ---- whole files --------------------------------------------------------------------------------------

def test_tensors_of_every_kind_come_back_and_the_safetensors_package_reads_them_too(tmp_path):
    integers = torch.tensor([[1, 0, 3], [4, 5, 100]])
    tensors = {name: integers.to(dtype) for name, dtype in checkpoint.DTYPES.items()}
    tensors |= {"0-dim": torch.tensor(2.5), "empty": torch.empty(3, 0, 2), "transposed": integers.T,
                "strided": torch.arange(12)[::2], "expanded": torch.ones(1).expand(4, 5)}
    write_tensors(tmp_path / "ours", tensors, {"step": 3, "names": ["a", None]})
    again, meta = read_tensors(tmp_path / "ours")
    assert equal(again, tensors) and meta == {"step": 3, "names": ["a", None]}
    assert equal(safetensors.torch.load_file(tmp_path / "ours"), tensors)
    safetensors.torch.save_file(again, tmp_path / "theirs")
    assert equal(read_tensors(tmp_path / "theirs")[0], tensors)


def flipped(blob, byte):
    """The same bytes but for one bit."""
    return blob[:byte] + bytes([blob[byte] ^ 1 << byte % 8]) + blob[byte + 1:]


def test_no_damage_changes_what_is_read(tmp_path):
    path = tmp_path / "x"
    tensors = {"w": torch.tensor([10.0, -1.5, 32]), "n": torch.tensor([10, 32])}
    write_tensors(path, tensors, {"step": 7})
    blob = path.read_bytes()
    damaged = [flipped(blob, byte) for byte in range(len(blob))]
    damaged += [b"", blob[:50], blob[:-1], blob + b"\0", bytes(len(blob)), b"<html>"]
    refusals = 0
    for content in damaged:
        path.write_bytes(content)
        try:
            again, meta = read_tensors(path)
            assert equal(again, tensors) and meta == {"step": 7}     # the flip renamed the checksum alone
        except UserError as error:
            assert f"{path} is corrupt" in str(error)
            refusals += 1
    assert refusals >= len(damaged) - len("sha256")


@pytest.fixture
def full_disk():
    """full_disk(size): from now on no file grows beyond so many bytes.  full_disk(): there is room again"""
    before, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda size=before: resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    resource.setrlimit(resource.RLIMIT_FSIZE, (before, hard))


def test_a_file_that_cannot_be_written_whole_leaves_the_one_before(tmp_path, full_disk):
    path = tmp_path / "x"
    write_tensors(path, {"w": torch.ones(100)})
    full_disk(50_000)
    refused(lambda: write_tensors(path, {"w": torch.zeros(100_000)}), f"cannot write {path}", "free")
    full_disk()
    assert torch.equal(read_tensors(path)[0]["w"], torch.ones(100))
    assert os.listdir(tmp_path) == ["x"]


class Malice:
    def __reduce__(self):
        return os.mkdir, ("it ran",)


def test_weights_or_a_save_that_are_a_program_are_refused_and_not_run(smoke, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    buffer = io.BytesIO()
    torch.save({"wte.weight": Malice()}, buffer)
    blob = buffer.getvalue()
    shutil.copy(smoke / "sft" / "config.json", tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(blob)
    refused(lambda: GPT.from_pretrained(tmp_path), tmp_path / "pytorch_model.bin")
    (tmp_path / "resume-00000001.pt").write_bytes(hashlib.sha256(blob).digest() + blob)
    assert checkpoint.restore(tmp_path, {}) == 0                     # named, removed, begun anew
    assert not (tmp_path / "it ran").exists()


# ---- loops that go on where they stopped --------------------------------------------------------------

def test_random_numbers_depend_on_their_names_alone():
    names = [(0, "a", "b"), (0, "b", "a"), (0, "ab"), (1, "a", "b"), (0, "a", 0), (0, "a", "0")]
    numbers = [float(torch.rand(1, generator=rng(*name))) for name in names + names]
    assert numbers[:6] == numbers[6:] and len(set(numbers)) == 6


STEPS = 7
ALL = [0, 1, 2, 3, 4, 5, 6]


class Crash(Exception):
    pass


def loop(folder, every=2, inside=lambda step: None):
    """A training with all that a stage's loop keeps; inside(step) comes when a step is taken, not yet saved.

    -> {name: tensor} of all that it leaves, and its log
    """
    torch.manual_seed(0)
    module = torch.nn.Linear(3, 1)
    optimizer = adamw(module, 0.1)
    rows = Rows()
    log = Log(folder / "metrics.csv")
    x = torch.randn(40, 3, generator=rng(0, "x"))
    state = {"module": module, "optimizer": optimizer, "rows": rows, "log": log}
    for step, _ in resumable(folder, state, STEPS, every, "loop"):
        index = batch_by_length(step, 4, torch.zeros(40), "loop")
        sums = Sums()
        for part in micro_batches(index, 3):
            loss = (module(x[part]).squeeze(1) - x[part].sum(1)).square().sum()
            loss.backward()
            sums.add(len(part), loss=loss)
        means = update(optimizer, 0.1 * cosine(step, STEPS), sums, index, f"step {step + 1}")
        log.write(step=step + 1, **means)
        rows.append(index=index, x=x[index])
        inside(step)
    return rows.columns | module.state_dict(), (folder / "metrics.csv").read_text()


def crash(folder, last, every=2):
    def inside(step):
        if step == last:
            raise Crash
    with pytest.raises(Crash):
        loop(folder, every, inside)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    return loop(tmp_path_factory.mktemp("undisturbed"), every=100)


def goes_on(folder, undisturbed, steps):
    """The loop takes these steps, and leaves what the undisturbed one left."""
    taken = []
    left, log = loop(folder, inside=taken.append)
    assert taken == steps
    assert equal(left, undisturbed[0]) and log == undisturbed[1]


@pytest.mark.parametrize("crashes, steps", [
    ([0], ALL), ([1], ALL), ([2], ALL[2:]), ([3], ALL[2:]), ([4], ALL[4:]), ([5], ALL[4:]), ([6], ALL[6:]),
    ([1, 2, 2, 5, 6], ALL[6:])])
def test_a_loop_that_broke_off_goes_on_from_its_last_save_bit_for_bit(tmp_path, undisturbed, crashes, steps):
    for step in crashes:
        crash(tmp_path, step)
    goes_on(tmp_path, undisturbed, steps)


@pytest.mark.parametrize("parameters", [0.13e6, 45e6, 124e6, 774e6])             # of each preset's model
def test_saves_take_a_hundredth_of_the_time_and_a_kill_costs_a_hundred_saves_at_most(
        tmp_path, monkeypatch, parameters):
    """Four hours of steps of a second, by a clock that saving moves too: weights and Adam's two moments."""
    weights = torch.nn.Linear(int(3 * parameters), 1, bias=False, device="meta")
    one_save = 12 * parameters / checkpoint.BYTES_PER_SECOND
    clock = SimpleNamespace(now=0.0)
    ends = [0.0]                                                     # of the saves

    def save(folder, step, state):
        clock.now += one_save
        ends.append(clock.now)
    monkeypatch.setattr(checkpoint, "save", save)
    monkeypatch.setattr(checkpoint, "time", SimpleNamespace(perf_counter=lambda: clock.now))
    for _ in resumable(tmp_path, {"weights": weights}, 4 * 3600, 0, "loop"):
        clock.now += 1
    for number, end in enumerate(ends[:-1]):                         # the one at the end comes on top
        assert number * one_save <= 0.011 * end
    assert max(after - before for before, after in zip(ends, ends[1:])) <= 101 * one_save + 2


def test_a_loop_that_saves_by_time_goes_on_bit_for_bit_too(tmp_path, undisturbed, monkeypatch):
    monkeypatch.setattr(checkpoint, "SHARE", 1e9)                    # after every step
    crash(tmp_path, 3, every=0)
    goes_on(tmp_path, undisturbed, ALL[3:])


def test_rows_are_joined_when_they_are_read_and_not_at_every_chunk():
    chunks = [torch.arange(5) + 5 * n for n in range(100)]
    rows = Rows()
    for chunk in chunks:
        rows.append(x=chunk)
    assert len(rows) == 500 and all(ours["x"] is chunk for ours, chunk in zip(rows.chunks, chunks))
    assert torch.equal(rows.columns["x"], torch.arange(500)) and len(rows.chunks) == 1


def test_a_log_has_the_columns_of_its_first_row_and_six_digits(tmp_path):
    log = Log(tmp_path / "metrics.csv")
    log.write(step=1, loss=1 / 3, nan=float("nan"))
    log.write(nan=2.0, loss=1e-9, step=2)
    assert (tmp_path / "metrics.csv").read_text() == "step,loss,nan\n1,0.333333,nan\n2,1e-09,2\n"


def test_the_two_newest_saves_are_kept_until_the_stage_is_finished(tmp_path, undisturbed):
    assert not begin(tmp_path, {})
    loop(tmp_path)
    names = [path.name for path in checkpoint.saves(tmp_path)]
    assert names == ["resume-00000006.pt", "resume-00000007.pt"]
    goes_on(tmp_path, undisturbed, [])
    finish(tmp_path, **{"metrics.csv": "sha256"})
    assert not checkpoint.saves(tmp_path)
    (tmp_path / names[1]).write_bytes(b"there if the process was killed in the midst of `finish`")
    assert begin(tmp_path, {}) and not checkpoint.saves(tmp_path)


@pytest.mark.parametrize("file, damage, steps", [
    ("resume-00000004.pt", lambda blob: flipped(blob, 999), ALL[2:]),
    ("resume-00000004.pt", lambda blob: b"", ALL[2:]),
    ("resume-00000004.pt", lambda blob: blob[:999], ALL[2:]),
    ("resume-*.pt", lambda blob: flipped(blob, 999), ALL),
    ("metrics.csv", lambda blob: blob + b"6,7,8\n7,0.1", ALL[4:]),
    ("metrics.csv", lambda blob: blob[:30], ALL[4:])])
def test_a_torn_log_is_mended_and_a_corrupt_save_named_and_passed_over(tmp_path, undisturbed, capsys,
                                                                       file, damage, steps):
    crash(tmp_path, 5)
    paths = list(tmp_path.glob(file))
    for path in paths:
        path.write_bytes(damage(path.read_bytes()))
    goes_on(tmp_path, undisturbed, steps)
    said = capsys.readouterr().err
    for path in paths:
        sentence = f"{path} is corrupt or incomplete; going on from the save before it\n"
        assert (sentence in said) == (path.suffix == ".pt")


@pytest.mark.parametrize("loss", [
    lambda weight: weight.sum() * float("nan"), lambda weight: weight.sum() * float("inf"),
    lambda weight: weight.sum() + (weight * 0).sqrt().sum()], ids=["nan", "infinite", "gradient alone"])
def test_a_step_that_is_not_finite_changes_neither_weights_nor_optimizer(loss):
    weight = torch.nn.Parameter(torch.ones(2))
    optimizer = torch.optim.AdamW([weight], lr=0.1)
    sums = Sums()
    loss(weight).backward()
    sums.add(3, loss=loss(weight))
    refused(lambda: update(optimizer, 0.2, sums, torch.tensor([4, 0, 7]), "sft, step 1"),
            "sft, step 1: the loss is ", "nothing was changed", "[4, 0, 7]")
    assert torch.equal(weight, torch.ones(2))
    assert not optimizer.state


# ---- runs that are stopped, killed, out of disk -------------------------------------------------------

def files(folder):
    """{name: content} of a run's files, but for two that hold a process id and the folder's own path."""
    paths = [path for path in folder.rglob("*") if path.is_file()]
    paths = [path for path in paths if path not in (folder / ".lock", folder / "config.json")]
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths}


def same(folder, other):
    """Two runs left the same files, byte for byte."""
    ours, theirs = files(folder), files(other)
    assert [name for name in sorted({*ours, *theirs}) if ours.get(name) != theirs.get(name)] == []


@pytest.mark.parametrize("flags, folder, number", [
    ("--align-steps 20", ALIGNED, signal.SIGTERM),                   # which saves every second step
    ("--align-steps 4 --rounds 2", "exo-reward-k4-rounds2-s0", signal.SIGINT),
    ("--method ppo", METHODS["ppo"], signal.SIGINT), ("--method xpo", METHODS["xpo"], signal.SIGTERM)])
def test_a_stopped_run_saves_its_step_and_goes_on(begun, tmp_path, monkeypatch, flags, folder, number):
    calm = shutil.copytree(begun, tmp_path / "calm")
    assert small(calm, *flags.split()).code == 0
    with monkeypatch.context() as patch:
        at(patch, 3, lambda: signal.raise_signal(number), folder)
        ended = small(begun, *flags.split())
    assert ended.code == 128 + number
    assert checkpoint.saves(begun / folder)[-1].name == "resume-00000003.pt"
    said, command = ended.err.splitlines()[-1].split("python train.py ")
    assert said == "stopped; go on with: " and shlex.split(command) == ended.arguments
    assert small(begun, *flags.split()).code == 0
    same(begun, calm)


def two_signals(full_disk):
    signal.raise_signal(signal.SIGTERM)
    signal.raise_signal(signal.SIGTERM)


@pytest.mark.parametrize("action, code, sentence", [
    (two_signals, 143, "stopping after this step, then saving; once more to leave at once"),
    (lambda full_disk: full_disk(100_000), 1, "make room, or name another folder by --run")],
    ids=["a second signal", "a full disk"])
def test_a_step_cut_short_by_a_second_signal_or_a_full_disk_is_taken_again(
        begun, smoke, monkeypatch, full_disk, action, code, sentence):
    with monkeypatch.context() as patch:
        patch.setattr(os, "_exit", sys.exit)
        at(patch, 3, lambda: action(full_disk))
        ended = small(begun)
    full_disk()
    assert ended.code == code and sentence in ended.err
    assert checkpoint.saves(begun / ALIGNED)[-1].name == "resume-00000002.pt"
    assert small(begun).code == 0
    same(begun, smoke)


def test_a_signal_outside_of_a_loop_stops_at_once(finished, monkeypatch):
    monkeypatch.setattr(stages, "limit", lambda run: signal.raise_signal(signal.SIGINT))
    ended = small(finished)
    assert ended.code == 130 and ended.err.startswith("stopped; go on with: ")


def test_one_run_at_a_time_works_in_a_folder(finished):
    leftover = finished / "sft" / ".model.safetensors.123.part"
    leftover.write_bytes(b"of a process that was killed")
    held = lock(finished)
    assert not leftover.exists()
    one_sentence(small(finished), finished, f"in use by process {os.getpid()}", "--run")
    held.close()
    assert small(finished).code == 0


def kill_at_file_operation(n):
    """Kills this process right before the n-th time that it opens a file to write, renames or removes one."""
    operations = iter(range(1, n))

    def hook(event, arguments):
        writes = event == "open" and arguments[2] & (os.O_WRONLY | os.O_RDWR)
        if (writes or event in ("os.rename", "os.remove")) and next(operations, None) is None:
            os.kill(os.getpid(), signal.SIGKILL)
    sys.addaudithook(hook)


def kill_inside_a_file(size):
    """Kills this process inside the write that makes any file longer than this."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
    signal.signal(signal.SIGXFSZ, signal.SIG_DFL)


def killed_run(folder, kill):
    kill()
    small(folder, *ALL_METHODS, draw=figures.draw)


@pytest.mark.slow
def test_a_run_that_is_killed_20_times_leaves_what_an_undisturbed_one_leaves(all_methods, tmp_path):
    processes = multiprocessing.get_context("forkserver")
    draw = random.Random(0)
    exits = []
    while len(exits) < 20:
        kill = partial(kill_at_file_operation, draw.randrange(1, 90))
        if len(exits) % 4 == 3:
            kill = partial(kill_inside_a_file, draw.randrange(2_000, 170_000))
        process = processes.Process(target=killed_run, args=(tmp_path / "run", kill))
        process.start()
        process.join()
        exits.append(process.exitcode)
    assert set(exits) == {-signal.SIGKILL, -signal.SIGXFSZ}
    ended = small(tmp_path / "run", *ALL_METHODS, draw=figures.draw)
    assert ended.code == 0, ended.err
    same(tmp_path / "run", all_methods)


def damage(path, how):
    if how == "removed":
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[:-1] if how == "cut short" else b"")


@pytest.mark.parametrize("artifact, how", [
    ("sft/model.safetensors", "removed"), ("sft/model.safetensors", "empty"),
    ("responses/responses.safetensors", "cut short"), ("reward_model/rewards.safetensors", "removed"),
    (f"{ALIGNED}/step-00006/model.safetensors", "removed")])
def test_a_stage_whose_artifact_is_damaged_is_named_and_made_again(finished, smoke, artifact, how):
    damage(finished / artifact, how)
    ended = small(finished)
    assert ended.code == 0, ended.err
    stage = finished / artifact.split("/")[0]
    assert f"{stage}: " in ended.err and "is missing or damaged, so this stage runs again" in ended.err
    same(finished, smoke)


def test_a_policy_without_weights_stays_in_the_table_and_is_left_out_elsewhere(finished, capsys):
    shutil.rmtree(finished / ALIGNED / "step-00006")
    figures.main([str(finished)])
    assert ALIGNED in (finished / "table.csv").read_text()
    sample.main([str(finished), "--prompt", "Last night we saw this film"])
    said = capsys.readouterr().out
    assert said.count(f"{finished / ALIGNED / 'step-00006'} has no weights any more") == 2


@pytest.mark.parametrize("keep, left", [("last", ["step-00006"]), ("best", ["step-00001", "step-00006"])])
def test_only_the_weights_asked_for_stay_and_all_samples(begun, monkeypatch, keep, left):
    rewards = {0: 0.0, 1: 9.0, 3: 1.0, 6: 2.0}

    def read(path):
        return [row | {"reward": rewards[row["step"]]} for row in read_csv(path)]

    monkeypatch.setattr(train, "read_csv", read)
    assert small(begun, "--keep", keep, "--checkpoints", "3").code == 0
    assert sorted(path.name for path in (begun / ALIGNED).glob("step-*")) == left
    assert len(list((begun / ALIGNED / "samples").iterdir())) == 3


# ---- runs that are refused ----------------------------------------------------------------------------

@pytest.mark.parametrize("method", METHODS)
def test_a_loss_that_blows_up_stops_the_run_before_the_step(begun, method):
    ended = small(begun, "--method", method, "--align-lr", "1e30", "--ppo-lr", "1e30", "--save-every", "1")
    steps = len(read_csv(begun / METHODS[method] / "metrics.csv"))
    one_sentence(ended, f"{method}, step {steps + 1}", "the loss is ", "lower the learning rate")
    saves = checkpoint.saves(begun / METHODS[method])
    assert saves[-1].name == f"resume-{steps:08d}.pt"
    policy = checkpoint.read_save(saves[-1])["state"]["policy"]
    assert all(weight.isfinite().all() for weight in policy.values())


@pytest.mark.parametrize("flag, value, stage", [
    ("--sft-lr", 0.5, "sft"), ("--oracle-steps", 9, "oracle"), ("--temperature", 0.5, "responses"),
    ("--labels", "argmax", "reward_model"), ("--align-lr", 0.5, ALIGNED), ("--eval-prompts", 12, ALIGNED)])
def test_a_run_with_other_settings_is_refused_by_name(finished, smoke, flag, value, stage):
    name = flag[2:].replace("-", "_")
    ended = small(finished, flag, value)
    one_sentence(ended, f"{finished / stage} was made with {name} = ", f"(now {value})", "--run")
    same(finished, smoke)
    assert read_json(finished / "config.json")[name] != value


@pytest.mark.parametrize("artifact, stage", [
    ("sft/model.safetensors", "oracle"), ("oracle/model.safetensors", "responses"),
    ("responses/responses.safetensors", "reward_model"), ("reward_model/rewards.safetensors", ALIGNED)])
def test_what_was_made_from_another_artifact_is_refused(finished, artifact, stage):
    tensors, meta = read_tensors(finished / artifact)
    write_tensors(finished / artifact, {name: tensor + 1 for name, tensor in tensors.items()}, meta)
    upstream = artifact.split("/")[0]
    one_sentence(small(finished), f"{finished / stage} was made from another {upstream}", "--run")
