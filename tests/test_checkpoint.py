"""Statements about files that are never torn, and runs that are never lost."""
import contextlib
import json
import os
import resource
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import safetensors.torch
import torch

import checkpoint
from checkpoint import Log, Stopped, begin, catch_signals, fingerprint, finish, lock, pack, resumable, rng, unpack
from files import DTYPES, UserError, atomic, read_json, read_tensors, write_tensors
from optim import adamw, batch_at, cosine, descend

ROOT = Path(__file__).parent.parent


def refused(call, *words):
    with pytest.raises(UserError) as error:
        call()
    text = str(error.value)
    assert "\n" not in text and all(str(word) in text for word in words), text


def every_dtype():
    x = torch.tensor([[1, 0, 3], [4, 5, 100]])
    return {name: x.to(dtype) for name, dtype in DTYPES.items()}


def same(a, b):
    return a.keys() == b.keys() and all(a[k].dtype == b[k].dtype and torch.equal(a[k], b[k]) for k in a)


# ---- files of tensors ------------------------------------------------------------------------------------------------

def test_tensors_of_every_dtype_come_back(tmp_path):
    write_tensors(tmp_path / "x", every_dtype(), {"step": 3, "names": ["a", None]})
    tensors, meta = read_tensors(tmp_path / "x")
    assert same(tensors, every_dtype()) and meta == {"step": 3, "names": ["a", None]}


@pytest.mark.parametrize("tensor", [torch.tensor(2.5), torch.empty(0), torch.empty(3, 0, 2, dtype=torch.int64),
                                    torch.arange(12).view(3, 4).T, torch.arange(12)[::2], torch.ones(1).expand(4, 5),
                                    torch.tensor([float("nan"), float("inf"), -0.0]).view(torch.int32)],
                         ids=["0-dim", "empty", "empty-3-dim", "transposed", "strided", "expanded", "bits"])
def test_tensors_of_every_layout_come_back(tmp_path, tensor):
    write_tensors(tmp_path / "x", {"a": torch.ones(3, dtype=torch.uint8), "b": tensor})
    assert same(read_tensors(tmp_path / "x")[0], {"a": torch.ones(3, dtype=torch.uint8), "b": tensor})


def test_a_file_without_tensors_comes_back(tmp_path):
    write_tensors(tmp_path / "x", {}, {"step": 1})
    assert read_tensors(tmp_path / "x") == ({}, {"step": 1})


def test_a_parameter_is_written_and_left_as_it_is(tmp_path):
    parameter = torch.nn.Parameter(torch.ones(2, 3))
    write_tensors(tmp_path / "x", {"w": parameter})
    assert parameter.requires_grad and not read_tensors(tmp_path / "x")[0]["w"].requires_grad


def test_the_tensors_that_come_back_can_be_changed(tmp_path):
    write_tensors(tmp_path / "x", every_dtype())
    tensors, _ = read_tensors(tmp_path / "x")
    tensors["F32"] += 1
    assert torch.equal(tensors["F64"], every_dtype()["F64"]) and torch.equal(tensors["F32"], every_dtype()["F32"] + 1)


def test_the_safetensors_package_opens_our_files(tmp_path):
    write_tensors(tmp_path / "x", every_dtype())
    assert same(safetensors.torch.load_file(tmp_path / "x"), every_dtype())
    with safetensors.safe_open(tmp_path / "x", "pt") as file:
        assert file.metadata()["format"] == "pt"


def test_we_open_the_files_of_the_safetensors_package(tmp_path):
    safetensors.torch.save_file(every_dtype(), tmp_path / "x", {"format": "pt"})
    assert same(read_tensors(tmp_path / "x")[0], every_dtype())


def test_the_same_content_has_the_same_checksum_and_other_content_another(tmp_path):
    x = torch.arange(4.0)
    first, again = write_tensors(tmp_path / "x", {"w": x}), write_tensors(tmp_path / "y", {"w": x})
    others = [write_tensors(tmp_path / "z", {"w": x + 1}), write_tensors(tmp_path / "z", {"v": x}),
              write_tensors(tmp_path / "z", {"w": x}, {"step": 1}), write_tensors(tmp_path / "z", {"w": x.view(2, 2)})]
    assert first == again and first not in others


def test_no_flipped_bit_anywhere_changes_what_is_read(tmp_path):
    tensors, meta = {"w": torch.tensor([10.0, -1.5, 32]), "n": torch.tensor([10, 32])}, {"step": 7}
    write_tensors(tmp_path / "x", tensors, meta)
    whole, refusals = (tmp_path / "x").read_bytes(), 0
    for bit in range(8 * len(whole)):
        blob = bytearray(whole)
        blob[bit // 8] ^= 1 << bit % 8
        (tmp_path / "x").write_bytes(blob)
        try:
            found = read_tensors(tmp_path / "x")
        except UserError as error:
            assert str(tmp_path / "x") in str(error)
            refusals += 1
        else:                                                        # the flip renamed the checksum, nothing else
            assert same(found[0], tensors) and found[1] == meta
    assert refusals >= 8 * (len(whole) - len("sha256"))


@pytest.mark.parametrize("damage", [
    lambda b: b"", lambda b: b[:7], lambda b: b[:50], lambda b: b[:-1], lambda b: b + b"\0", lambda b: b[1:],
    lambda b: bytes(len(b)), lambda b: b[:200] + bytes(len(b) - 200), lambda b: b"\xff" * len(b), lambda b: b"<html>"])
def test_a_truncated_empty_zeroed_or_foreign_file_is_refused_in_one_sentence(tmp_path, damage):
    write_tensors(tmp_path / "x", every_dtype())
    (tmp_path / "x").write_bytes(damage((tmp_path / "x").read_bytes()))
    refused(lambda: read_tensors(tmp_path / "x"), tmp_path / "x", "corrupt")


def header_only(text):
    return len(text).to_bytes(8, "little") + text


@pytest.mark.parametrize("text", [
    b"[]", b"3", b"null", b'{"w": 1}', b'{"w": {"dtype": "F32", "shape": [1]}}',
    b'{"w": {"dtype": "F99", "shape": [1], "data_offsets": [0, 4]}}',
    b'{"w": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}',
    b'{"w": {"dtype": "F32", "shape": [-1], "data_offsets": [-4, 0]}}',
    b'{"w": {"dtype": "F32", "shape": [1], "data_offsets": [-8, -4]}}',
    b'{"w": {"dtype": "F32", "shape": ["a"], "data_offsets": [0, 4]}}', b'{"__metadata__": 3}'])
def test_a_header_that_makes_no_sense_is_refused(tmp_path, text):
    (tmp_path / "x").write_bytes(header_only(text))
    refused(lambda: read_tensors(tmp_path / "x"), tmp_path / "x", "corrupt")


def test_a_missing_file_is_refused_by_name(tmp_path):
    refused(lambda: read_tensors(tmp_path / "nowhere"), tmp_path / "nowhere")


# ---- writing that fails ----------------------------------------------------------------------------------------------

def python(*lines, **settings):
    """A new Python process that runs these lines in the repository."""
    return subprocess.Popen([sys.executable, "-c", "\n".join(lines)], cwd=ROOT, text=True, stdin=subprocess.PIPE,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE, **settings)


def test_a_disk_that_is_full_leaves_the_file_before_whole_and_nothing_else(tmp_path):
    path = tmp_path / "x"
    write_tensors(path, {"w": torch.ones(100)})
    child = python("import sys, torch, checkpoint, files", "try:",
                   f"    files.write_tensors({str(path)!r}, {{'w': torch.zeros(100_000)}})",
                   "except files.UserError as error:", "    sys.exit(f'refused: {error}')",
                   preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000)))
    _, text = child.communicate()
    assert child.returncode == 1 and text.startswith(f"refused: cannot write {path}: ") and "bytes are free" in text
    assert len(text.splitlines()) == 1
    assert torch.equal(read_tensors(path)[0]["w"], torch.ones(100)) and os.listdir(tmp_path) == ["x"]


def test_a_path_that_cannot_be_written_is_refused_and_leaves_nothing(tmp_path):
    (tmp_path / "file").write_text("in the way")
    (tmp_path / "folder" / "x").mkdir(parents=True)
    for path in (tmp_path / "file" / "x", tmp_path / "folder" / "x"):
        refused(lambda path=path: write_tensors(path, {"w": torch.ones(1)}), "cannot write", path)
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["file", "folder", "x"]


def test_an_error_while_a_file_is_written_leaves_the_file_before_whole(tmp_path):
    (tmp_path / "x").write_text("before")
    with pytest.raises(KeyError), atomic(tmp_path / "x") as file:
        file.write(b"half of what")
        raise KeyError
    assert (tmp_path / "x").read_text() == "before" and os.listdir(tmp_path) == ["x"]


def test_a_process_killed_while_it_saves_leaves_a_sound_save(tmp_path):
    child = python("import torch, checkpoint", "module = torch.nn.Linear(50, 50)", "for step in range(1, 10**6):",
                   "    torch.nn.init.constant_(module.weight, step)",
                   f"    checkpoint.save({str(tmp_path)!r}, step, {{'module': module}})", "    print(step, flush=True)")
    for _ in range(25):                                              # after the 25th save, somewhere in a later one
        saved = int(child.stdout.readline())
    child.kill()
    child.communicate()
    module = torch.nn.Linear(50, 50)
    step = checkpoint.restore(tmp_path, {"module": module})
    assert step >= saved and (module.weight == step).all()


# ---- stages ----------------------------------------------------------------------------------------------------------

def finished(folder, sha256="0", **settings):
    begin(folder, settings)
    finish(folder, **{"model.safetensors": sha256})
    return folder


def test_a_stage_is_open_until_it_is_finished(tmp_path):
    folder, settings = tmp_path / "sft", {"lr": 1e-3, "prompts": [1, 2], "init": None}
    assert [begin(folder, settings), begin(folder, settings)] == [False, False]
    finish(folder, model="sha256")
    assert begin(folder, settings)


def test_changed_settings_are_refused_by_name_with_both_values(tmp_path):
    begin(tmp_path / "sft", {"lr": 0.1, "steps": 5, "gone": 1})
    refused(lambda: begin(tmp_path / "sft", {"lr": 0.2, "steps": 5, "new": 2}), tmp_path / "sft", "lr = 0.1 (now 0.2)",
            "gone = 1", "(now 2)", "--run")
    with pytest.raises(UserError) as error:
        begin(tmp_path / "sft", {"lr": 0.1, "steps": 6, "gone": 1})
    assert "lr" not in str(error.value) and "steps = 5 (now 6)" in str(error.value)


def test_a_changed_upstream_is_refused_by_name(tmp_path):
    one, two = finished(tmp_path / "one"), finished(tmp_path / "two")
    begin(tmp_path / "next", {}, [one, two])
    finish(two, **{"model.safetensors": "another"})
    refused(lambda: begin(tmp_path / "next", {}, [one, two]), tmp_path / "next", "another two")


def test_an_unchanged_upstream_is_accepted(tmp_path):
    one = finished(tmp_path / "one")
    begin(tmp_path / "next", {}, [one])
    assert begin(tmp_path / "next", {}, [one]) is False


def test_an_upstream_that_is_not_finished_is_refused(tmp_path):
    begin(tmp_path / "one", {})
    refused(lambda: begin(tmp_path / "next", {}, [tmp_path / "one"]), tmp_path / "one", "not finished")


def test_the_fingerprint_is_that_of_the_artifacts(tmp_path):
    one, same_one, other = (finished(tmp_path / name, sha) for name, sha in (("a", "0"), ("b", "0"), ("c", "1")))
    assert fingerprint(one) == fingerprint(same_one) != fingerprint(other)


def test_a_stage_of_another_format_is_refused(tmp_path):
    begin(tmp_path, {})
    (tmp_path / "stage.json").write_text(json.dumps(read_json(tmp_path / "stage.json") | {"format": 0}))
    refused(lambda: begin(tmp_path, {}), tmp_path, "format 0", "--run")


def test_a_stage_file_that_is_torn_is_refused(tmp_path):
    begin(tmp_path, {"lr": 1})
    (tmp_path / "stage.json").write_text((tmp_path / "stage.json").read_text()[:-5])
    refused(lambda: begin(tmp_path, {"lr": 1}), tmp_path / "stage.json")


def test_leftovers_of_a_killed_writer_are_removed(tmp_path):
    begin(tmp_path, {})
    (tmp_path / ".model.safetensors.123.part").write_bytes(b"half")
    begin(tmp_path, {})
    assert os.listdir(tmp_path) == ["stage.json"]


# ---- random numbers --------------------------------------------------------------------------------------------------

def test_random_numbers_are_a_function_of_their_names_alone():
    first = torch.rand(3, generator=rng(0, "sft", 5))
    torch.manual_seed(1)
    torch.rand(10, generator=rng(0, "sft", 6))
    assert torch.equal(first, torch.rand(3, generator=rng(0, "sft", 5)))


def test_other_names_draw_other_random_numbers():
    names = [(0, "a", "b"), (0, "b", "a"), (0, "ab"), (1, "a", "b"), (0, "a", 0), (0, "a", "0"), ("0", "a", "b")]
    assert len({float(torch.rand(1, generator=rng(*name), dtype=torch.float64)) for name in names}) == len(names)


# ---- state as JSON and tensors ---------------------------------------------------------------------------------------

def through_json(value):
    tensors = {}
    text = json.dumps(pack(value, tensors))
    return unpack(json.loads(text), {name: tensor.clone() for name, tensor in tensors.items()})


def test_plain_values_and_nested_ones_come_back():
    value = {"a": [1, 2.5, None, True, "x", float("inf")], 3: {"b": {}, "c": []}, "tensor": "not one", "lr": 0.1 + 0.2}
    assert through_json(value) == value


def test_tensors_come_back_from_lists_and_dicts_alike():
    value = through_json({"rows": [torch.ones(2), {"x": torch.zeros(1)}]})
    assert torch.equal(value["rows"][0], torch.ones(2)) and torch.equal(value["rows"][1]["x"], torch.zeros(1))


def test_the_state_of_adamw_comes_back_bit_for_bit():
    def fresh():
        torch.manual_seed(0)
        module = torch.nn.Linear(3, 2)
        return module, adamw(module, 0.1)

    def step(module, optimizer):
        module(torch.ones(3)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()

    (module, optimizer), (other, resumed) = fresh(), fresh()
    step(module, optimizer)
    other.load_state_dict(through_json(module.state_dict()))
    resumed.load_state_dict(through_json(optimizer.state_dict()))
    step(module, optimizer)
    step(other, resumed)
    assert torch.equal(module.weight, other.weight) and torch.equal(module.bias, other.bias)
    assert resumed.param_groups[0]["betas"] == list(optimizer.param_groups[0]["betas"])


# ---- loops that can be stopped and go on -----------------------------------------------------------------------------

class Crash(Exception):
    pass


STEPS = 7


def train(folder, crash_at=None, inside_step=None, every=2):
    """A small training with all that a stage's loop has: optimizer, schedule, data order, log.  -> what it leaves"""
    torch.manual_seed(0)
    module = torch.nn.Linear(3, 1)
    optimizer, log = adamw(module, 0.1), Log(folder / "metrics.csv")
    x = torch.randn(40, 3, generator=rng(0, "x"))

    def loss_sum(index):
        return {"loss": (module(x[index]).squeeze(1) - x[index].sum(1)).square().sum()}, len(index)

    state = {"module": module, "optimizer": optimizer, "log": log}
    for step, _ in resumable(folder, state, STEPS, every, "train"):
        if inside_step:
            inside_step(step)
        index = batch_at(step, 4, torch.arange(40), "train")
        stats = descend(optimizer, 0.1 * cosine(step, STEPS), index, 0, loss_sum, f"step {step}")
        log.write(step=step + 1, **stats)
        if step == crash_at:
            raise Crash
    log.file.close()
    adam = [v for s in optimizer.state_dict()["state"].values() for v in s.values()]
    return [*module.state_dict().values(), *adam], (folder / "metrics.csv").read_text()


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    return train(tmp_path_factory.mktemp("undisturbed"))


def equal(a, b):
    return all(torch.equal(x, y) for x, y in zip(a[0], b[0], strict=True)) and a[1] == b[1]


def crash(folder, step=4):
    with pytest.raises(Crash):
        train(folder, crash_at=step)


@pytest.mark.parametrize("step", range(STEPS))
def test_a_run_that_broke_off_goes_on_as_if_nothing_had_happened(tmp_path, undisturbed, step):
    crash(tmp_path, step)
    assert equal(train(tmp_path), undisturbed)


def test_a_run_may_break_off_again_and_again(tmp_path, undisturbed):
    for step in (1, 2, 2, 5, 6):
        crash(tmp_path, step)
    assert equal(train(tmp_path), undisturbed)


def test_only_what_came_after_the_last_save_is_done_again(tmp_path):
    crash(tmp_path, 4)
    done = []
    train(tmp_path, inside_step=done.append)
    assert done == [4, 5, 6]


def test_a_finished_loop_does_nothing_and_gives_its_last_state(tmp_path, undisturbed):
    train(tmp_path)
    assert equal(train(tmp_path, inside_step=lambda step: pytest.fail("done again")), undisturbed)


def test_the_saves_change_nothing(tmp_path, undisturbed):
    assert equal(train(tmp_path, every=100), undisturbed)


def test_the_two_newest_saves_are_kept_until_the_stage_is_finished(tmp_path):
    begin(tmp_path, {})
    train(tmp_path)
    saves = ["resume-00000006.safetensors", "resume-00000007.safetensors"]
    assert sorted(p.name for p in tmp_path.glob("resume*")) == saves
    finish(tmp_path, **{"metrics.csv": "sha256"})
    assert not list(tmp_path.glob("resume*")) and (tmp_path / "metrics.csv").exists()


def test_a_log_has_a_header_and_a_row_a_step(undisturbed):
    header, *rows = undisturbed[1].splitlines()
    assert header == "step,loss,grad_norm"
    assert [row.split(",")[0] for row in rows] == [str(step + 1) for step in range(STEPS)]


def test_a_log_keeps_six_digits_and_the_columns_of_its_first_row(tmp_path):
    log = Log(tmp_path / "metrics.csv")
    log.write(step=1, loss=1 / 3, nan=float("nan"))
    log.write(nan=2.0, loss=1e-9, step=2)
    log.file.close()
    assert (tmp_path / "metrics.csv").read_text() == "step,loss,nan\n1,0.333333,nan\n2,1e-09,2\n"


@pytest.mark.parametrize("torn", ["6,0.1", "6,0.123,4\n" * 50 + "7,", "\0\0\0"])
def test_a_log_with_a_torn_last_line_is_repaired(tmp_path, undisturbed, torn):
    crash(tmp_path, 4)
    with open(tmp_path / "metrics.csv", "a") as file:
        file.write(torn)
    assert equal(train(tmp_path), undisturbed)


@pytest.mark.parametrize("keep", [0, 30])
def test_a_log_that_lost_rows_is_not_filled_up_with_zeros(tmp_path, keep):
    crash(tmp_path)
    os.truncate(tmp_path / "metrics.csv", keep)
    with contextlib.suppress(UserError):
        train(tmp_path)
    assert "\0" not in (tmp_path / "metrics.csv").read_text()


def test_a_log_of_a_try_that_saved_nothing_is_begun_anew(tmp_path, undisturbed):
    (tmp_path / "metrics.csv").write_text("step,loss,grad_norm\n1,7,7\n2,")
    assert equal(train(tmp_path), undisturbed)


def corrupt(path):
    blob = bytearray(path.read_bytes())
    blob[-1] ^= 1
    path.write_bytes(blob)
    return path


@pytest.mark.parametrize("damage", [corrupt, lambda path: path.write_bytes(b""),
                                    lambda path: path.write_bytes(path.read_bytes()[:-9])])
def test_a_corrupt_newest_save_is_named_and_the_one_before_is_used(tmp_path, undisturbed, capsys, damage):
    crash(tmp_path, 5)
    newest, done = tmp_path / "resume-00000004.safetensors", []
    damage(newest)
    assert equal(train(tmp_path, inside_step=done.append), undisturbed) and done == [2, 3, 4, 5, 6]
    said = capsys.readouterr().err
    assert str(newest) in said and "the save before it" in said


def test_where_every_save_is_corrupt_the_loop_begins_anew(tmp_path, undisturbed):
    crash(tmp_path, 5)
    for path in tmp_path.glob("resume*"):
        corrupt(path)
    assert equal(train(tmp_path), undisturbed)


def test_a_save_of_another_format_is_refused(tmp_path, monkeypatch):
    module = torch.nn.Linear(2, 1)
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "FORMAT", checkpoint.FORMAT - 1)
        checkpoint.save(tmp_path, 1, {"module": module})
    refused(lambda: checkpoint.restore(tmp_path, {"module": module}), "resume-00000001", "another version")


@pytest.mark.parametrize("saved", ["a", "ac", "abc"])
def test_a_save_with_other_parts_than_the_loop_has_is_refused(tmp_path, saved):
    parts = {name: torch.nn.Linear(2, 1) for name in "abc"}
    checkpoint.save(tmp_path, 1, {name: parts[name] for name in saved})
    refused(lambda: checkpoint.restore(tmp_path, {name: parts[name] for name in "ab"}), "resume-00000001")


# ---- stopping --------------------------------------------------------------------------------------------------------

SIGNALS = [signal.SIGINT, signal.SIGTERM]


@pytest.fixture
def signals():
    """Signals are caught as train.py does, for the length of a test."""
    before = [signal.getsignal(number) for number in SIGNALS]
    catch_signals()
    yield
    checkpoint.pending.clear()
    for number, handler in zip(SIGNALS, before):
        signal.signal(number, handler)


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_lets_the_step_finish_and_saves_it(tmp_path, undisturbed, signals, number):
    with pytest.raises(Stopped) as stopped:
        train(tmp_path, inside_step=lambda step: step == 2 and signal.raise_signal(number))
    assert stopped.value.args == (number,)
    checkpoint.pending.clear()
    done = []
    assert equal(train(tmp_path, inside_step=done.append), undisturbed) and done == [3, 4, 5, 6]


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_while_nothing_is_under_way_stops_at_once(signals, number):
    with pytest.raises(Stopped):
        signal.raise_signal(number)


def test_a_signal_in_the_last_step_still_saves_it(tmp_path, undisturbed, signals):
    with pytest.raises(Stopped):
        train(tmp_path, inside_step=lambda step: step == STEPS - 1 and signal.raise_signal(signal.SIGTERM))
    checkpoint.pending.clear()
    assert equal(train(tmp_path, inside_step=lambda step: pytest.fail("done again")), undisturbed)


def training_process(folder):
    """A process that trains, says which step it is in, and goes on with the step when a line comes."""
    return python("import sys", f"sys.path.insert(0, {str(ROOT / 'tests')!r})", "from pathlib import Path",
                  "from test_checkpoint import Stopped, catch_signals, train", "catch_signals()",
                  "def inside_step(step):", "    print(step, flush=True)", "    sys.stdin.readline()",
                  "try:", f"    train(Path({str(folder)!r}), inside_step=inside_step)",
                  "except Stopped as stopped:", "    print('stopped by', stopped.args[0])")


def until_step(child, step):
    for expected in range(step + 1):
        assert child.stdout.readline() == f"{expected}\n"
        if expected < step:
            print(file=child.stdin, flush=True)


def until_heard(child):
    while "stopping after this step" not in (line := child.stderr.readline()):
        assert line


@pytest.mark.parametrize("number", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.slow)])
def test_a_stopped_process_goes_on_in_another_as_if_nothing_had_happened(tmp_path, undisturbed, number):
    child = training_process(tmp_path)
    until_step(child, 2)
    child.send_signal(number)
    until_heard(child)
    out, _ = child.communicate("\n")
    assert out == f"stopped by {int(number)}\n"
    done = []
    assert equal(train(tmp_path, inside_step=done.append), undisturbed) and done == [3, 4, 5, 6]


@pytest.mark.parametrize("number, code", [(signal.SIGINT, 130), pytest.param(signal.SIGTERM, 143, marks=pytest.mark.slow)])
def test_a_second_signal_leaves_at_once_and_the_last_save_is_sound(tmp_path, undisturbed, number, code):
    child = training_process(tmp_path)
    until_step(child, 3)
    child.send_signal(number)
    until_heard(child)
    child.send_signal(number)
    child.communicate()
    assert child.returncode == code
    done = []
    assert equal(train(tmp_path, inside_step=done.append), undisturbed) and done == [2, 3, 4, 5, 6]


# ---- one run at a time -----------------------------------------------------------------------------------------------

def test_a_second_process_is_refused_while_the_first_has_the_folder(tmp_path):
    held = lock(tmp_path / "a run")
    child = python("import sys, checkpoint", "try:", f"    checkpoint.lock({str(tmp_path / 'a run')!r})",
                   "except files.UserError as error:", "    sys.exit(str(error))")
    _, text = child.communicate()
    assert child.returncode == 1 and f"{tmp_path / 'a run'} is in use by process {os.getpid()}: " in text
    held.close()


def test_a_folder_that_was_let_go_can_be_taken(tmp_path):
    lock(tmp_path).close()                                           # its file stays, as it does when a run is killed
    again = lock(tmp_path)
    assert (tmp_path / ".lock").read_text() == f"{os.getpid()}\n"
    again.close()


def test_a_file_where_the_run_folder_should_be_is_refused(tmp_path):
    (tmp_path / "run").write_text("")
    refused(lambda: lock(tmp_path / "run"), tmp_path / "run", "--run")
