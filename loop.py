"""One optimizer step, several processes, loops that resume, and the files that they leave.

A loop's random numbers depend on its step alone (`rng`), and `resumable` saves everything else.  So a run
that was killed ends with the same bits as one that was not.
"""
import atexit
import contextlib
import csv
import hashlib
import http.client
import json
import math
import os
import sys
from functools import partialmethod
from pathlib import Path

import torch
import torch.distributed as dist
from tqdm import tqdm

try:
    import fcntl
except ImportError:                                       # Windows
    fcntl = None


for stream in (sys.stdout, sys.stderr):
    if hasattr(stream, "reconfigure"):
        stream.reconfigure(errors="replace")              # a ? for what the terminal cannot show


class UserError(ValueError):
    """An error that a user can cause and fix, in one sentence."""


# ---- one step -----------------------------------------------------------------------------------------

def rng(*key):
    """A random generator (CPU) that depends on the key alone, such as ("align", seed, epoch)."""
    digest = hashlib.sha256(repr(key).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "little"))


def adamw(parameters, eps=1e-8):
    """AdamW with the official code's betas and no weight decay.  `update` sets the learning rate."""
    return torch.optim.AdamW(parameters, betas=(0.9, 0.95), eps=eps, weight_decay=0.0, fused=True)


class Muon(torch.optim.Optimizer):
    """A matrix's Nesterov momentum, made orthogonal before each step [kellerjordan.github.io/posts/muon].

    The steps are those of torch.optim.Muon up to rounding.  torch's works in bfloat16, and on a CPU without
    bfloat16 it takes 20 times as long as this one.
    """

    def __init__(self, matrices):
        super().__init__(matrices, {"lr": 1e-3})

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for p in group["params"]:
                state = self.state[p]
                if not state:
                    state["momentum"] = torch.zeros_like(p)
                momentum = state["momentum"].lerp_(p.grad, 0.05)
                size = 0.2 * max(p.shape) ** 0.5             # steps of AdamW's size, so one rate serves both
                p.sub_(group["lr"] * size * orthogonal(p.grad.lerp(momentum, 0.95)))


def orthogonal(g):
    """U V^T of g = U S V^T, nearly: five Newton-Schulz steps bring all but tiny singular values near 1."""
    if g.size(0) > g.size(1):
        return orthogonal(g.T).T                          # the smaller of X X^T and X^T X
    x = g / g.norm().clamp(min=1e-7)
    for _ in range(5):
        square = x @ x.T
        x = 3.4445 * x + (2.0315 * square @ square - 4.7750 * square) @ x                # Muon's coefficients
    return x


def muon(gpt):
    """Muon for the matrices of the blocks, AdamW for the rest.  -> two optimizers"""
    matrices = [p for p in gpt.h.parameters() if p.dim() == 2]
    chosen = set(matrices)
    others = [p for p in gpt.parameters() if p not in chosen]
    return [Muon(matrices), adamw(others)]


def cosine(step, steps):
    """The learning rate over its peak: a cosine from 1 to 0."""
    return 0.5 * (1 + math.cos(math.pi * step / steps))


def shuffled_batch(step, batch, n, *key):
    """Batch number `step` of endless shuffled epochs over n examples: (batch,) indices, by the key alone."""
    first, end = step * batch, (step + 1) * batch
    epochs = range(first // n, (end - 1) // n + 1)                    # those that the batch touches
    shuffled = [torch.randperm(n, generator=rng(*key, epoch)) for epoch in epochs]
    return torch.cat(shuffled)[first - epochs[0] * n:end - epochs[0] * n]


def batch_by_length(step, batch, length, *key, window=32):
    """Like `shuffled_batch`, but each batch holds examples of similar length, so it pads little.

    length: (n,) tokens of each example -> (batch,) indices, ascending in length.  The examples of `window`
    batches are sorted by length and cut into batches, which are then shuffled.
    Not used for alignment: EXO-rw diverged with it on one of three seeds.
    """
    number, place = divmod(step, window)
    index = shuffled_batch(number, window * batch, len(length), *key)                    # (window * batch,)
    by_length = length[index].argsort(stable=True)
    order = torch.randperm(window, generator=rng(*key, "window", number))
    return index[by_length].view(window, batch)[order[place]]                            # (batch,)


class Sums:
    """What a batch adds up to: the loss, and what is logged.  Stays on the device until `update` reads it."""

    def __init__(self):
        self.count, self.total = 0, {}

    def add(self, count, **sums):
        """count: how many examples or tokens the mean is over; sums: scalar tensors, among them the loss."""
        self.count += count
        for name, value in sums.items():
            self.total[name] = self.total.get(name, 0.0) + value.detach().float()


def update(optimizers, lr, sums, where):
    """One step on the gradients of the summed loss: mean, clip at norm 1, step.  -> {name: mean, grad_norm}

    UserError, before anything is changed, if the loss or the gradient is not finite; it names `where`.
    """
    groups = [group for optimizer in optimizers for group in optimizer.param_groups]
    parameters = [p for group in groups for p in group["params"] if p.grad is not None]
    gradients = [p.grad for p in parameters]
    total = torch.stack([sums.total["loss"].new_tensor(sums.count), *sums.total.values()])
    add_up([total, *gradients])
    torch._foreach_div_(gradients, total[0])
    norm = torch.nn.utils.clip_grad_norm_(parameters, 1.0)            # official code
    means = torch.cat([total[1:] / total[0], norm[None]]).tolist()    # the one wait for the device
    means = dict(zip([*sums.total, "grad_norm"], means))
    if not (math.isfinite(means["loss"]) and math.isfinite(means["grad_norm"])):
        raise UserError(f"{where}: the loss is {means['loss']:.4g} and its gradient's norm "
                        f"{means['grad_norm']:.4g}; this step was not taken: lower the learning rate")
    for group in groups:
        group["lr"] = lr
    for optimizer in optimizers:
        optimizer.step()
        optimizer.zero_grad()
    return means


# ---- several processes, a GPU each:  torchrun --nproc_per_node=4 -- train.py --method exo ---------------
#
# Every process runs the same program and holds the same weights.  They split the rows of a training batch,
# whose gradients are added up, and the chunks to sample.  So the number of processes changes the time
# and, up to rounding, nothing else.  Process 0 writes the files and prints.

WORLD, RANK = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("RANK", 0))      # set by torchrun


def join_processes(device):
    """Joins the processes that torchrun started, if it did.  -> this process's own device"""
    if WORLD == 1:
        return device
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
    atexit.register(dist.destroy_process_group)           # else gloo's threads may abort a process that ends
    if not writes():
        sys.stdout = open(os.devnull, "w")
        tqdm.__init__ = partialmethod(tqdm.__init__, disable=True)
    return device


def writes():
    """Whether this is the process that writes the files."""
    return RANK == 0


def my_chunk(number):
    """Whether this process samples this chunk."""
    return number % WORLD == RANK


def my_rows(index):
    """This process's rows of a batch: every WORLD-th, so that a batch sorted by length is evenly shared."""
    if len(index) < WORLD:
        raise UserError(f"a batch of {len(index)} cannot be shared by {WORLD} processes: start fewer")
    return index[RANK::WORLD]


def add_up(tensors):
    """Sums each tensor over the processes, in place."""
    if WORLD > 1:
        flat = torch.cat([tensor.flatten() for tensor in tensors])    # one message, not a hundred
        dist.all_reduce(flat)
        for tensor, total in zip(tensors, flat.split([tensor.numel() for tensor in tensors])):
            tensor.copy_(total.view_as(tensor))


def gather(parts):
    """Merges {number: part} of all processes.  The parts are on the CPU."""
    every = [parts]
    if WORLD > 1:
        every = [None] * WORLD
        dist.all_gather_object(every, parts)
    return {number: part for each in every for number, part in each.items()}


def barrier():
    """Waits until every process is here: what process 0 wrote before can then be read."""
    if WORLD > 1:
        dist.barrier()


# ---- a loop that resumes where it stopped -------------------------------------------------------------

def resumable(folder, state, steps, title):
    """Yields the steps still to do; saves about every 5%, and after the last.

    state: {name: object with state_dict() and load_state_dict()}.
    """
    path = Path(folder) / "resume.pt"
    first = 0
    if path.exists():
        saved = torch.load(path, map_location="cpu", weights_only=True)
        first = saved["step"]
        for name, part in state.items():
            part.load_state_dict(saved[name])
    for step in tqdm(range(first, steps), title, steps, initial=first):
        yield step
        if (step + 1) % max(1, steps // 20) == 0 or step + 1 == steps:
            with atomic(path) as file:
                saved = {name: part.state_dict() for name, part in state.items()}
                torch.save({"step": step + 1} | saved, file)


class Columns(dict):
    """{name: (rows, ...)} on the CPU that grows, as part of a loop's state."""

    def append(self, chunk):
        for name, column in chunk.items():
            self[name] = torch.cat([self[name], column]) if name in self else column

    def state_dict(self):
        return dict(self)

    def load_state_dict(self, columns):
        self.clear()
        self.update(columns)


class Log:
    """A csv file, a row per step, as part of a loop's state: a loop that resumes writes no row twice."""

    def __init__(self, path):
        self.path, self.rows = path, []

    def write(self, **row):
        """Appends a row; the first one names the columns."""
        self.rows.append(row)
        if len(self.rows) == 1:
            write_csv(self.path, self.rows)
        elif writes():
            with open(self.path, "a", encoding="utf-8") as file:
                file.write(",".join(cell(row[name]) for name in self.rows[0]) + "\n")

    def state_dict(self):
        return {"rows": self.rows}

    def load_state_dict(self, state):
        self.rows = state["rows"]
        write_csv(self.path, self.rows)                   # drops rows written after the save


# ---- stages and files ---------------------------------------------------------------------------------

def begin(folder, settings):
    """Opens a stage's folder.  -> whether it is finished; UserError if it was made with other settings."""
    path = Path(folder) / "stage.json"
    stage = read_json(path) if path.exists() else None
    barrier()
    if stage is None:
        write_json(path, {"settings": settings, "finished": False})
        return False
    for name, value in json.loads(json.dumps(settings)).items():
        was = stage["settings"].get(name)
        if was != value:
            raise UserError(f"{folder} was made with {name} = {was} (now {value}): use a new folder with "
                            f"--run, give the alignment a --label, or remove {folder}")
    return stage["finished"]


def finish(folder):
    """Marks a stage as finished, and removes its loop's save."""
    barrier()
    write_json(Path(folder) / "stage.json", read_json(Path(folder) / "stage.json") | {"finished": True})
    if writes():
        (Path(folder) / "resume.pt").unlink(missing_ok=True)
    barrier()


def lock(folder):
    """Takes a run folder.  -> the lock file (keep it open); UserError if another process has it"""
    Path(folder).mkdir(parents=True, exist_ok=True)
    file = open(Path(folder) / f".lock{RANK}", "w")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise UserError(f"{folder} is in use by another process: wait for it, or use a new folder with "
                        "--run") from error
    except (AttributeError, OSError):                     # Windows, or a file system without locks
        print(f"{folder} cannot be locked here: do not start a second run in it")
    return file


@contextlib.contextmanager
def atomic(path, mode="wb"):
    """Opens a file that gets the name `path` only once complete."""
    path = Path(path)
    part = path.with_name(f".{path.name}.{os.getpid()}.part") if writes() else Path(os.devnull)
    if writes():
        path.parent.mkdir(parents=True, exist_ok=True)
    with open(part, mode, encoding=None if "b" in mode else "utf-8") as file:
        yield file
    if writes():
        os.replace(part, path)


def write_json(path, value):
    with atomic(path, "w") as file:
        json.dump(value, file, indent=1)


def read_json(path):
    return json.loads(Path(path).read_text(encoding="utf-8"))


def write_csv(path, rows):
    """rows: dicts with the first one's columns.  Floats keep six digits."""
    with atomic(path, "w") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows({name: cell(value) for name, value in row.items()} for row in rows)


def cell(value):
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def read_csv(path):
    """A list of {column: float}"""
    with open(path, newline="", encoding="utf-8") as file:
        return [{name: float(value) for name, value in row.items()} for row in csv.DictReader(file)]


DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
          "I32": torch.int32, "BOOL": torch.bool}


def write_tensors(path, tensors):
    """{name: tensor} as safetensors, the format of Hugging Face's weights."""
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    codes = {dtype: code for code, dtype in DTYPES.items()}
    header, end = {"__metadata__": {"format": "pt"}}, 0
    for name, tensor in tensors.items():
        first, end = end, end + tensor.nbytes
        place = {"shape": list(tensor.shape), "data_offsets": [first, end]}
        header[name] = {"dtype": codes[tensor.dtype], **place}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with atomic(path) as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for tensor in tensors.values():
            file.write(tensor.reshape(-1).view(torch.uint8).numpy())


def read_tensors(path):
    """A safetensors file -> {name: tensor}"""
    blob = bytearray(Path(path).read_bytes())
    data = 8 + int.from_bytes(blob[:8], "little")                     # where the tensors begin
    header = json.loads(blob[8:data])
    header.pop("__metadata__", None)
    tensors = {}
    for name, entry in header.items():
        first, end = entry["data_offsets"]
        dtype, shape = DTYPES[entry["dtype"]], entry["shape"]
        count = (end - first) // dtype.itemsize
        tensors[name] = torch.frombuffer(blob, dtype=dtype, count=count, offset=data + first).view(shape)
    return tensors


# ---- downloads ----------------------------------------------------------------------------------------

def fetch(url, name, sha256=None):
    """A file from the internet, downloaded once into $EXO_CACHE, else ~/.cache/exo.  -> its path"""
    path = cache_folder() / name
    if writes() and not path.exists():
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            torch.hub.download_url_to_file(url, str(path), hash_prefix=sha256)    # whole, or not at all
        except (OSError, http.client.HTTPException, RuntimeError) as error:
            raise UserError(f"cannot download {url} to {path} (see $EXO_CACHE): {error}") from error
    barrier()
    return path


def cache_folder():
    return Path(os.environ.get("EXO_CACHE") or Path.home() / ".cache" / "exo")


def file_sha256(path):
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
