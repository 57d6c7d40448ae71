"""Runs that are never lost: the one mechanism behind every stage.

- A stage is a loop over `resumable(...)`: it saves the loop's state now and then and goes on from the newest sound save.
  Random numbers are a function of (seed, names, step), so that resuming exactly needs no random state to be kept.
- `stage.json` in a stage's folder tells which settings and which upstream artifacts it was made with.
- One process at a time works in a run folder; Ctrl-C and SIGTERM wait for the step under way.
"""
import hashlib
import json
import os
import signal
import sys
from pathlib import Path

import torch
from tqdm import tqdm

from files import UserError, read_json, read_tensors, stored_checksum, write_json, write_tensors, writing
from parallel import agreed, on_first, rank

try:
    import fcntl
except ImportError:                                                  # Windows has no flock: there, nobody guards the folder
    fcntl = None

FORMAT = 1                                                           # of stages and resume files; raised when they change


class Stopped(BaseException):
    """Ctrl-C or SIGTERM came, and what was under way has been saved."""


# ---- stages ----------------------------------------------------------------------------------------------------------------

def rng(seed, *names):
    """A random generator (CPU) that depends on (seed, names) alone: the same draws whenever, wherever it is asked for."""
    digest = hashlib.sha256(repr((seed, *names)).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "little"))


@on_first
def begin(folder, settings, upstream=()):
    """Opens a stage's folder; True if its artifact is finished.  UserError if the folder was made with anything else.

    settings: {name: JSON-able value}.  upstream: the folders of the finished stages that this one reads.
    """
    folder = Path(folder)
    record = {"format": FORMAT, "settings": json.loads(json.dumps(settings)),
              "upstream": {Path(u).name: fingerprint(u) for u in upstream}}
    path = folder / "stage.json"
    if not path.exists():
        write_json(path, record)
        return False
    old = read_json(path)
    remedy = f"name another folder by --run, or remove {folder}"
    if old.get("format") != FORMAT:
        raise UserError(f"{folder} is of format {old.get('format')}, this code writes {FORMAT}: {remedy}")
    was, now = old["settings"], record["settings"]
    changed = [f"{k} = {was.get(k)} (now {now.get(k)})" for k in sorted({*was, *now}) if was.get(k) != now.get(k)]
    if changed:
        raise UserError(f"{folder} was made with {', '.join(changed)}: {remedy}")
    stale = [k for k, v in record["upstream"].items() if old["upstream"].get(k) != v]
    if stale:
        raise UserError(f"{folder} was made from another {' and another '.join(stale)} than the one beside it: {remedy}")
    done = "done" in old
    for leftover in [*folder.glob(".*.part"), *(folder.glob("resume-*.safetensors") if done else [])]:
        leftover.unlink()                                            # of a process that was killed in the middle of it
    return done


@on_first
def finish(folder, **artifacts):
    """Marks a stage's artifact as finished, {file name: sha256}, and removes what only an unfinished one needs."""
    folder = Path(folder)
    write_json(folder / "stage.json", read_json(folder / "stage.json") | {"done": artifacts})
    for path in folder.glob("resume-*.safetensors"):
        path.unlink()


def fingerprint(folder):
    """What identifies a finished artifact: a hash over its files' checksums, as recorded and, where a file differs, as found."""
    done = read_json(Path(folder) / "stage.json").get("done")
    if not done:
        raise UserError(f"{folder} is not finished: run the command that makes it again")
    for name, recorded in done.items():
        if (path := Path(folder) / name).is_file() and (found := stored_checksum(path)) != recorded:
            done[name] = [recorded, found]                           # another file was put in its place
    return hashlib.sha256(json.dumps(done, sort_keys=True).encode()).hexdigest()[:16]


# ---- loops that can be stopped and go on -----------------------------------------------------------------------------------

def resumable(folder, state, steps, every, title):
    """Yields (step, progress bar) for the steps in 0..steps-1 still to do; saves `state` each `every` steps and at the end.

    state: {name: object with state_dict() and load_state_dict()}.  The two newest saves are kept: a torn or corrupt newest one
    is named, and the loop goes on from the one before.  On Ctrl-C or SIGTERM: finishes the step, saves, raises Stopped.
    """
    first = restore(folder, state)
    quiet = {"disable": True} if rank() > 0 else {}                  # one process talks, if $TQDM_DISABLE lets it
    with tqdm(desc=title, total=steps, initial=first, dynamic_ncols=True, **quiet) as bar:
        inside.append(title)
        try:
            for step in range(first, steps):
                yield step, bar
                bar.update()
                signalled = agreed(pending[0] if pending else 0)     # what comes later is for the next step
                if (step + 1) % every == 0 or step + 1 == steps or signalled:
                    save(folder, step + 1, state)
                if signalled:
                    raise Stopped(signalled)
        finally:
            inside.pop()


@on_first
def save(folder, step, state):
    """Writes the loop's state after `step` steps, and removes all but the two newest saves."""
    tensors, meta = {}, {"format": FORMAT, "step": step}
    meta["state"] = pack({name: part.state_dict() for name, part in state.items()}, tensors)
    write_tensors(Path(folder) / f"resume-{step:08d}.safetensors", tensors, meta)
    for old in sorted(Path(folder).glob("resume-*.safetensors"))[:-2]:
        old.unlink()


def restore(folder, state):
    """Loads the newest sound save of `folder` into `state` and returns its step, 0 where there is none."""
    path = newest(folder)
    if path is None:
        return 0
    tensors, meta = read_tensors(path)
    if meta["format"] != FORMAT or {name for name, _ in meta["state"]["dict"]} != set(state):
        raise UserError(f"{path} was written by another version of this code: remove it to start this stage again")
    loaded = unpack(meta["state"], tensors)
    for name, part in state.items():
        part.load_state_dict(loaded[name])
    return meta["step"]


@on_first
def newest(folder):
    """The newest save that is not torn or corrupt, or None; names and removes those that are."""
    for path in sorted(Path(folder).glob("resume-*.safetensors"), reverse=True):
        try:
            read_tensors(path)
            return path
        except UserError as error:
            print(f"{error}; going on from the save before it", file=sys.stderr)
            path.unlink()


def pack(value, tensors):
    """Nested dicts and lists of tensors and plain values -> the same as JSON; the tensors themselves go into `tensors`."""
    if isinstance(value, torch.Tensor):
        tensors[str(len(tensors))] = value
        return {"tensor": str(len(tensors) - 1)}
    if isinstance(value, dict):
        return {"dict": [[k, pack(v, tensors)] for k, v in value.items()]}   # pairs: JSON would make strings of integer keys
    if isinstance(value, list | tuple):
        return {"list": [pack(v, tensors) for v in value]}
    return value


def unpack(value, tensors):
    """The inverse of `pack`; tuples come back as lists."""
    if not isinstance(value, dict):
        return value
    if "tensor" in value:
        return tensors[value["tensor"]]
    if "dict" in value:
        return {k: unpack(v, tensors) for k, v in value["dict"]}
    return [unpack(v, tensors) for v in value["list"]]


class Log:
    """A csv file, a row a step, as part of a loop's state: resuming cuts off the rows that the loop will write again.

    Of several processes only process 0 has the file.
    """

    def __init__(self, path):
        self.path, self.file, self.columns = Path(path), None, None

    def write(self, **row):
        """Appends a row; the first one names the columns.  Floats keep six digits."""
        if rank() > 0:
            return
        if self.file is None:                                        # nothing was resumed: what an earlier try wrote goes
            self.load_state_dict({"bytes": 0, "columns": None})
        lines = [] if self.columns else [",".join(row)]
        self.columns = self.columns or list(row)
        cells = [f"{row[c]:.6g}" if isinstance(row.get(c), float) else str(row.get(c, "")) for c in self.columns]
        with writing(self.path):
            self.file.write("".join(line + "\n" for line in [*lines, ",".join(cells)]).encode())
            self.file.flush()

    def state_dict(self):
        if self.file is None:
            return {"bytes": 0, "columns": None}
        os.fsync(self.file.fileno())                                 # the rows reach the disk before the save that counts them
        return {"bytes": self.file.tell(), "columns": self.columns}

    def load_state_dict(self, state):
        if rank() > 0:
            return
        self.columns = state["columns"]
        if state["bytes"] and (not self.path.exists() or self.path.stat().st_size < state["bytes"]):
            raise UserError(f"{self.path} has lost rows since the last save: remove its folder, and this stage starts again")
        with writing(self.path):
            self.file = open(self.path, "r+b" if self.path.exists() else "w+b")
            self.file.truncate(state["bytes"])
            self.file.seek(state["bytes"])


# ---- one run at a time, and how it is stopped ------------------------------------------------------------------------------

pending = []                                                         # the signal that came inside a loop, if any
inside = []                                                          # not empty while a loop is under way


def catch_signals():
    """Ctrl-C or SIGTERM: finish the step and save, or stop at once where nothing is under way; a second one leaves at once."""
    def handle(number, frame):
        if pending:
            os._exit(128 + number)                                   # every file is whole at every moment: nothing to undo
        pending.append(number)
        if not inside:
            raise Stopped(number)
        print("\nstopping after this step, then saving; once more to leave at once", file=sys.stderr)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, handle)


def lock(folder):
    """Takes the run folder for this process, until it ends; UserError if another run has it.  Returns the open lock file."""
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = open(folder / ".lock", "a+")
    except OSError as error:
        raise UserError(f"cannot use {folder} as the run folder ({error.strerror}): name another by --run") from error
    try:
        if fcntl:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        file.seek(0)
        raise UserError(f"{folder} is in use by process {file.read().strip()}: wait for it, or name another folder by "
                        "--run") from error
    with writing(folder / ".lock"):
        file.seek(0)
        file.truncate()
        file.write(f"{os.getpid()}\n")
        file.flush()
    for leftover in folder.rglob(".*.part"):                         # of a process that was killed while it wrote
        leftover.unlink()
    return file
