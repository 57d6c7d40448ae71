"""Files that are never torn, stages that are made once, loops that go on where they stopped.

- A file gets its name only when it is whole and on the disk (temporary name, fsync, rename).  Tensors are
  in safetensors form, so transformers opens our weights and no pickle is ever executed; a sha256 in the
  header is checked on reading.
- `stage.json` in a stage's folder records the settings and upstream artifacts that it was made from.
- A loop over `resumable(...)` saves its state now and then, and goes on from the newest sound save.
- One process at a time works in a run folder; Ctrl-C and SIGTERM wait for the step under way.
"""
import contextlib
import fcntl
import hashlib
import io
import json
import os
import pickle
import shutil
import signal
import sys
import time
from pathlib import Path

import torch
from tqdm import tqdm

from compute import UserError, agreed, on_first, rank

FORMAT = 3                                                # of stages and saves; raised when they change
DTYPES = {"F64": torch.float64, "I64": torch.int64, "F32": torch.float32, "I32": torch.int32,
          "F16": torch.float16, "BF16": torch.bfloat16, "I16": torch.int16, "U8": torch.uint8,
          "I8": torch.int8, "BOOL": torch.bool}


# ---- whole files --------------------------------------------------------------------------------------

@contextlib.contextmanager
def writing(path):
    """A full disk, or whatever else keeps `path` from being written, becomes one sentence."""
    try:
        yield
    except OSError as error:
        free = shutil.disk_usage(path.parent).free if path.parent.is_dir() else 0
        raise UserError(f"cannot write {path}: {error.strerror or error} ({free:,} bytes are free); what "
                        "stood there is untouched: make room, or name another folder by --run") from error


@contextlib.contextmanager
def atomic(path, mode="wb"):
    """Opens a file for writing that takes the name `path` only when it is whole and on the disk."""
    path = Path(path)
    encoding = None if "b" in mode else "utf-8"
    if rank() > 0:                                        # process 0 writes the same
        with open(os.devnull, mode, encoding=encoding) as file:
            yield file
        return
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            with open(part, mode, encoding=encoding) as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            os.replace(part, path)
            folder = os.open(path.parent, os.O_RDONLY)
            os.fsync(folder)                              # the rename lasts through a power cut
            os.close(folder)
    finally:
        with contextlib.suppress(OSError):
            part.unlink(missing_ok=True)


def write_json(path, value):
    with atomic(path, "w") as file:
        json.dump(value, file, indent=1)


def read_json(path):
    try:
        return json.loads(Path(path).read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {path} ({error}): remove its folder, and it is made again") from error


def write_tensors(path, tensors, meta=None):
    """Writes {name: tensor} and a JSON-able `meta` as safetensors.  -> the sha256 of header and data"""
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    names = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))   # widest first: aligned
    codes = {dtype: code for code, dtype in DTYPES.items()}
    header = {"__metadata__": {"format": "pt", "meta": json.dumps(meta), "sha256": "0" * 64}}
    offset = 0
    for name in names:
        tensor = tensors[name]
        end = offset + tensor.numel() * tensor.element_size()
        place = {"shape": list(tensor.shape), "data_offsets": [offset, end]}
        header[name] = {"dtype": codes[tensor.dtype], **place}
        offset = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    blocks = [tensors[name].reshape(-1).view(torch.uint8).numpy() for name in names]
    digest = hashlib.sha256(text)                         # of the header while its own sha256 is zeros
    for block in blocks:
        digest.update(block)
    with atomic(path) as file:
        file.write(len(text).to_bytes(8, "little"))
        file.write(text.replace(b"0" * 64, digest.hexdigest().encode(), 1))
        for block in blocks:
            file.write(block)
    return digest.hexdigest()


def read_tensors(path):
    """Reads a safetensors file -> ({name: tensor}, meta).  UserError where it is torn or a bit flipped."""
    try:
        blob = bytearray(Path(path).read_bytes())
        start = 8 + int.from_bytes(blob[:8], "little")    # where the data begins
        header = json.loads(blob[8:start].decode())
        about = header.pop("__metadata__", {})
        if "sha256" in about:                             # written by `write_tensors`
            blob[8:start] = blob[8:start].replace(about["sha256"].encode(), b"0" * 64, 1)
            if hashlib.sha256(memoryview(blob)[8:]).hexdigest() != about["sha256"]:
                raise ValueError("its checksum does not match")
        tensors = {name: tensor_in(blob, start, **entry) for name, entry in header.items()}
        return tensors, json.loads(about.get("meta", "null"))
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RuntimeError) as error:
        remedy = "remove it, and it is made again"
        raise UserError(f"{path} is corrupt or incomplete ({error}): {remedy}") from error


def tensor_in(blob, start, dtype, shape, data_offsets):
    """One tensor of a safetensors file's bytes."""
    dtype = DTYPES[dtype]
    begin, end = data_offsets
    count = torch.Size(shape).numel()
    if begin < 0 or start + end > len(blob) or end - begin != count * dtype.itemsize:
        raise ValueError("a tensor lies outside of it")
    if count == 0:
        return torch.empty(shape, dtype=dtype)
    return torch.frombuffer(blob, dtype=dtype, count=count, offset=start + begin).view(shape)


def stored_checksum(path):
    """The sha256 in a file's header, None where there is none, or where the file is too short.

    It tells which file it is, without reading it all.
    """
    faults = (OSError, ValueError, KeyError, TypeError, AttributeError)
    with contextlib.suppress(*faults), open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(min(length, 2 ** 20)))
        about = header.pop("__metadata__")
        end = max(entry["data_offsets"][1] for entry in header.values())
        return about["sha256"] if Path(path).stat().st_size == 8 + length + end else None


# ---- stages -------------------------------------------------------------------------------------------

@on_first
def begin(folder, settings, upstream=(), about=None):
    """Opens a stage's folder.  -> whether its artifact is finished; UserError if it was made otherwise.

    settings: {name: JSON-able value}.  upstream: the folders of the finished stages that this one reads.
    about: what figures and sample.py read of an alignment, {method, feedback, K, ...}.
    """
    folder = Path(folder)
    upstream = {Path(path).name: fingerprint(path) for path in upstream}
    settings = json.loads(json.dumps(settings))
    path = folder / "stage.json"
    if not path.exists():
        write_json(path, {"format": FORMAT, "about": about, "settings": settings, "upstream": upstream})
        return False
    old = read_json(path)
    remedy = f"name another folder by --run, or remove {folder}"
    if old.get("format") != FORMAT:
        raise UserError(f"{folder} is of format {old.get('format')}, this code writes {FORMAT}: {remedy}")
    was = old["settings"]
    changed = [name for name in sorted({*was, *settings}) if was.get(name) != settings.get(name)]
    if changed:
        differences = ", ".join(f"{name} = {was.get(name)} (now {settings.get(name)})" for name in changed)
        raise UserError(f"{folder} was made with {differences}: {remedy}")
    stale = [name for name in upstream if old["upstream"].get(name) != upstream[name]]
    if stale:
        others = " and another ".join(stale)
        raise UserError(f"{folder} was made from another {others} than the one beside it: {remedy}")
    damaged = [name for name in old.get("done", {}) if not sound(folder, name, old["done"][name])]
    if damaged:
        what = "its last checkpoint" if damaged[0] == "final" else damaged[0]
        print(f"{folder}: {what} is missing or damaged, so this stage runs again", file=sys.stderr)
        write_json(path, {name: part for name, part in old.items() if name != "done"})
    for leftover in saves(folder) if "done" in old else []:          # of a process killed inside `finish`
        leftover.unlink()
    return "done" in old and not damaged


def sound(folder, name, recorded):
    """Whether a finished stage's artifact is there and whole, as far as its header tells."""
    if name == "final":                                   # of an alignment: its last checkpoint
        files = (folder / recorded / "model.safetensors", folder / "samples" / f"{recorded}.safetensors")
        return all(stored_checksum(file) for file in files)
    return not name.endswith(".safetensors") or stored_checksum(folder / name) is not None


@on_first
def finish(folder, **artifacts):
    """Marks a stage's artifact as finished, {file name: sha256}, and removes the saves of its loop."""
    folder = Path(folder)
    write_json(folder / "stage.json", read_json(folder / "stage.json") | {"done": artifacts})
    for old in saves(folder):
        old.unlink()


def finished(folder):
    """Whether a stage's artifact is there."""
    path = Path(folder) / "stage.json"
    return path.exists() and "done" in read_json(path)


def fingerprint(folder):
    """What identifies a finished artifact: a hash of its files' checksums, as recorded and as they are."""
    done = read_json(Path(folder) / "stage.json").get("done")
    if not done:
        raise UserError(f"{folder} is not finished: run the command that makes it again")
    for name, recorded in done.items():
        path = Path(folder) / name
        if path.is_file() and stored_checksum(path) != recorded:
            done[name] = [recorded, stored_checksum(path)]
    return hashlib.sha256(json.dumps(done, sort_keys=True).encode()).hexdigest()[:16]


# ---- loops that go on where they stopped --------------------------------------------------------------

class Stopped(BaseException):
    """Ctrl-C or SIGTERM came, and what was under way has been saved."""


SHARE = 0.01                                              # of a loop's time that its saves may take
BYTES_PER_SECOND = 2.5e8                                  # of a save, sha256 and fsync, until one was timed


def resumable(folder, state, steps, every, title):
    """Yields (step, progress bar) for the steps still to do; saves now and then, and after the last.

    every: steps between saves; 0: whenever all saves so far and one more take at most SHARE of the time, by
    the clock of process 0.  The one after the last step comes on top.
    state: {name: object with state_dict() and load_state_dict()}.  The two newest saves are kept: a torn or
    corrupt newest one is named, and the loop goes on from the one before.  On Ctrl-C or SIGTERM: finishes the
    step, saves, raises Stopped.
    """
    first = restore(folder, state)
    began = time.perf_counter()
    spent = cost = 0.0                                    # seconds of the saves so far, and of the next one
    quiet = {"disable": True} if rank() > 0 else {}       # else $TQDM_DISABLE decides
    with tqdm(desc=title, total=steps, initial=first, dynamic_ncols=True, **quiet) as bar:
        inside.append(title)
        try:
            for step in range(first, steps):
                yield step, bar
                bar.update()
                signalled = agreed(pending[0] if pending else 0)
                if every:
                    due = (step + 1) % every == 0
                else:
                    cost = cost or size([part.state_dict() for part in state.values()]) / BYTES_PER_SECOND
                    within = spent + cost <= SHARE * (time.perf_counter() - began)
                    due = agreed(int(within and rank() == 0))
                if due or step + 1 == steps or signalled:
                    start = time.perf_counter()
                    save(folder, step + 1, state)
                    cost = time.perf_counter() - start
                    spent += cost
                if signalled:
                    raise Stopped(signalled)
        finally:
            inside.pop()


def size(value):
    """The bytes of all tensors in nested dicts and lists."""
    if isinstance(value, torch.Tensor):
        return value.nbytes
    if isinstance(value, dict):
        value = list(value.values())
    return sum(map(size, value)) if isinstance(value, list) else 0


@on_first
def save(folder, step, state):
    """Writes the loop's state after `step` steps, and removes all but the two newest saves.

    A save is torch.save's bytes behind their sha256.
    """
    states = {name: part.state_dict() for name, part in state.items()}
    buffer = io.BytesIO()
    torch.save({"step": step, "state": states}, buffer)
    blob = buffer.getbuffer()
    with atomic(Path(folder) / f"resume-{step:08d}.pt") as file:
        file.write(hashlib.sha256(blob).digest())
        file.write(blob)
    for old in saves(folder)[:-2]:
        old.unlink()


def saves(folder):
    """The saves of a loop, the newest last."""
    return sorted(Path(folder).glob("resume-*.pt"))


def restore(folder, state):
    """Loads the newest sound save of `folder` into `state`.  -> its step, 0 where there is none"""
    path = newest(folder)
    if path is None:
        return 0
    saved = read_save(path)
    for name, part in state.items():
        part.load_state_dict(saved["state"][name])
    return saved["step"]


@on_first
def newest(folder):
    """The newest save that is whole, or None; names and removes those that are not."""
    for path in reversed(saves(folder)):
        try:
            read_save(path)
            return path
        except UserError as error:
            print(f"{error}; going on from the save before it", file=sys.stderr)
            path.unlink()


def read_save(path):
    blob = path.read_bytes()
    if hashlib.sha256(blob[32:]).digest() != blob[:32]:
        raise UserError(f"{path} is corrupt or incomplete")
    try:
        return torch.load(io.BytesIO(blob[32:]), map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:               # code: it is not run
        raise UserError(f"{path} holds more than tensors and numbers") from error


class Rows:
    """Rows that come a chunk at a time, as part of a loop's state: {name: (rows, ...)}, in that order."""

    def __init__(self):
        self.chunks = []                                  # of {name: (n, ...)}, joined when they are read

    def __len__(self):
        return sum(len(next(iter(chunk.values()))) for chunk in self.chunks)

    def append(self, **chunk):
        """Adds rows: tensors of equal length, under the same names every time.  They are kept on the CPU."""
        names = sorted(self.chunks[0]) if self.chunks else sorted(chunk)
        lengths = {name: len(rows) for name, rows in chunk.items()}
        if sorted(chunk) != names or len(set(lengths.values())) != 1:
            raise ValueError(f"rows must come as tensors of equal length named {names}, got {lengths}")
        self.chunks.append({name: rows.cpu() for name, rows in chunk.items()})

    def replace(self, **rows):
        """Drops all rows and begins with these."""
        self.chunks = []
        self.append(**rows)

    @property
    def columns(self):
        """{name: (rows, ...)}, empty where there are none."""
        if len(self.chunks) > 1:
            names = self.chunks[0]
            self.chunks = [{name: torch.cat([chunk[name] for chunk in self.chunks]) for name in names}]
        return dict(self.chunks[0]) if self.chunks else {}

    def state_dict(self):
        return self.columns

    def load_state_dict(self, columns):
        self.chunks = [dict(columns)] if columns else []


class Log:
    """A csv file, a row a step, as part of a loop's state: a loop that resumes writes no row twice."""

    def __init__(self, path):
        self.path = Path(path)
        self.text = ""                                    # what the file holds

    def write(self, **row):
        """Appends a row; the first one names the columns.  Floats keep six digits."""
        new = self.text == ""
        header = ",".join(row) + "\n" if new else ""
        columns = (self.text or header).split("\n", 1)[0].split(",")
        cells = [cell(row.get(name, "")) for name in columns]
        text = header + ",".join(cells) + "\n"
        self.text += text
        if rank() == 0:
            with writing(self.path), open(self.path, "w" if new else "a") as file:
                file.write(text)

    def state_dict(self):
        return {"text": self.text}

    def load_state_dict(self, state):
        self.text = state["text"]
        with atomic(self.path, "w") as file:              # rows behind the save will come again
            file.write(self.text)


def unreserve(folder):
    """Removes what a start that failed has left in a run folder: stages that have no file yet, itself."""
    for path in Path(folder).glob("*/stage.json"):
        if list(path.parent.iterdir()) == [path]:
            shutil.rmtree(path.parent)
    if [path.name for path in Path(folder).iterdir()] == [".lock"]:
        shutil.rmtree(folder)


def cell(value):
    return f"{value:.6g}" if isinstance(value, float) else str(value)


# ---- one run at a time, and how it is stopped ---------------------------------------------------------

pending = []                                              # the signal that came inside a loop, if any
inside = []                                               # not empty while a loop is under way


def catch_signals():
    """Ctrl-C or SIGTERM: finish the step, save, stop; outside of a loop, or at the second, stop at once."""
    def handle(number, frame):
        if pending:
            os._exit(128 + number)                        # every file is whole: nothing to undo
        pending.append(number)
        if not inside:
            raise Stopped(number)
        print("\nstopping after this step, then saving; once more to leave at once", file=sys.stderr)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, handle)


def lock(folder):
    """Takes the run folder until this process ends; UserError if another has it.  -> the open lock file"""
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = open(folder / ".lock", "a+")
    except OSError as error:
        remedy = "name another run folder by --run"
        raise UserError(f"cannot use {folder} ({error.strerror}): {remedy}") from error
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        file.seek(0)
        process = file.read().strip()
        remedy = "wait for it, or name another folder by --run"
        raise UserError(f"{folder} is in use by process {process}: {remedy}") from error
    with writing(folder / ".lock"):
        file.truncate(0)
        file.write(f"{os.getpid()}\n")
        file.flush()
    for leftover in folder.rglob(".*.part"):              # of a process that was killed while it wrote
        leftover.unlink()
    return file
