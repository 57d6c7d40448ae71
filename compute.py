"""What computes, and how: the device, several processes, random numbers, one optimizer step.

Several processes on one run, a GPU each:  torchrun --nproc_per_node=4 -- train.py --method exo
Every process runs the same program with the same settings and random numbers, and holds the same weights.
Only rows are split: those of a training batch (`micro_batches`; `update` adds up the gradients) and of a
batch of prompts (`model.respond`).  So the number of processes changes the time and, up to rounding, nothing
else.  Process 0 writes the files and prints.
"""
import contextlib
import functools
import hashlib
import math
import os
import sys

import torch
import torch.distributed as dist

ADAM_BETAS = (0.9, 0.95)                                  # official code
GRADIENT_CLIP = 1.0                                       # official code, norm of all gradients


class UserError(ValueError):
    """An error that a user can cause and mend.  Its text is one sentence: what, where, what to do."""


# ---- the device and its arithmetic --------------------------------------------------------------------

def pick_device(name):
    """"cpu", "cuda", "mps", or "auto" for the fastest that is here -> torch.device"""
    here = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        name = next(device for device in here if here[device])
    if not here[name]:
        raise UserError(f"--device {name}: PyTorch finds no such device here, use --device auto")
    return torch.device(name)


def arithmetic(device, matmul, bf16=None):
    """Sets how float32 matrices are multiplied.  -> whether other products are in bfloat16

    bf16: as a run was made, or None: where the device has it natively.
    """
    if bf16 is None:
        bf16 = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    precision = "high" if bf16 else matmul                # beside bfloat16 only the heads' are left: TF32
    torch.set_float32_matmul_precision(precision)
    torch.backends.cuda.enable_cudnn_sdp(False)           # it plans 20 to 40 ms for every new shape
    return bf16


def move(device, *tensors):
    """Copies tensors to the device, on CUDA without waiting for the work under way there.  -> a list"""
    if device.type != "cuda":
        return [tensor.to(device) for tensor in tensors]
    moved = []
    for tensor in tensors:
        if not tensor.is_cuda:
            with contextlib.suppress(RuntimeError):       # no page-locked memory to be had: the copy waits
                tensor = tensor.pin_memory()
        moved.append(tensor.to(device, non_blocking=True))
    return moved


def out_of_memory(error):
    """Whether an exception says so.  On a CPU and on MPS it is a RuntimeError that only its text tells."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return "out of memory" in str(error) or "can't allocate memory" in str(error)


# ---- random numbers -----------------------------------------------------------------------------------

def rng(*key):
    """A random generator (CPU) that depends on the key alone, such as ("align", seed, epoch).

    So no random state is ever stored: a loop that resumes asks for the numbers of its step.
    """
    digest = hashlib.sha256(repr(key).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "little"))


# ---- several processes (with one, each of these does nothing) -----------------------------------------

def start(device):
    """Joins the processes that torchrun started, if it did.  torch.device -> this process's own"""
    if "LOCAL_RANK" not in os.environ:
        return device
    backend = "gloo"
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
        backend = "cpu:gloo,cuda:nccl"                    # gloo: for what lies on the CPU
    dist.init_process_group(backend)
    if rank() > 0:
        sys.stdout = open(os.devnull, "w")
    return device


def stop():
    if dist.is_initialized():
        dist.destroy_process_group()


def rank():
    """This process's number; 0 is the one that writes."""
    return dist.get_rank() if dist.is_initialized() else 0


def world():
    """The number of processes."""
    return dist.get_world_size() if dist.is_initialized() else 1


def own_rows(rows):
    """This process's rows of a batch, every world()-th: a sorted batch's tokens are then evenly spread."""
    return rows[rank()::world()]


def add_up(tensors):
    """Sums each tensor over the processes, in place: the same bits everywhere."""
    if world() == 1:
        return
    flat = torch.cat([tensor.flatten() for tensor in tensors])        # one message, not a hundred
    dist.all_reduce(flat)
    totals = flat.split([tensor.numel() for tensor in tensors])
    for tensor, total in zip(tensors, totals):
        tensor.copy_(total.view_as(tensor))


def gather(columns):
    """The inverse of `own_rows`: {name: (n, ...)} of each process, on the CPU -> {name: (N, ...)}"""
    if world() == 1:
        return columns
    parts = [None] * world()
    dist.all_gather_object(parts, columns)
    whole = {}
    for name, own in columns.items():
        rows = sum(len(part[name]) for part in parts)
        whole[name] = own.new_empty((rows, *own.shape[1:]))
        for number, part in enumerate(parts):
            whole[name][number::world()] = part[name]
    return whole


def agreed(number):
    """The largest of the processes' numbers: a signal that one of them got stops them all."""
    if world() == 1:
        return number
    largest = torch.tensor(number)
    dist.all_reduce(largest, dist.ReduceOp.MAX)
    return int(largest)


def on_first(function):
    """Decorator: process 0 alone runs the function; all get what it returned or raised, after it is done."""
    @functools.wraps(function)
    def wrapper(*args, **kwargs):
        if world() == 1:
            return function(*args, **kwargs)
        result = error = None
        if rank() == 0:
            try:
                result = function(*args, **kwargs)
            except Exception as raised:
                error = raised
        message = [result, error]
        dist.broadcast_object_list(message)
        if message[1] is not None:
            raise message[1]
        return message[0]
    return wrapper


# ---- one optimizer step -------------------------------------------------------------------------------
#
#     sums = Sums()
#     for part in micro_batches(index, size):            a part of the batch's indices, on this process
#         loss = ...                                     the mean over the part
#         (loss * len(part)).backward()
#         sums.add(len(part), loss=loss * len(part))
#     means = update(optimizer, lr, sums, index, where)
#
# Gradients of sums are added up, over micro-batches and processes, and divided by the whole batch's count:
# how a batch is split changes memory and time, not the step.

def adamw(module, lr, eps=1e-8):
    """AdamW without weight decay (official code), one fused kernel."""
    parameters = module.parameters()
    return torch.optim.AdamW(parameters, lr=lr, betas=ADAM_BETAS, eps=eps, weight_decay=0.0, fused=True)


class Muon:
    """Muon for the matrices of a GPT's blocks, AdamW for all else: one optimizer to `update` and to a save.

    A matrix's step is its momentum made orthogonal, at the size that AdamW's steps have, so that one learning
    rate serves both.
    """

    def __init__(self, gpt, lr):
        matrices = [p for p in gpt.h.parameters() if p.dim() == 2]
        chosen = set(matrices)
        others = [p for p in gpt.parameters() if p not in chosen]
        self.matrices = torch.optim.Muon(matrices, lr=lr, weight_decay=0.0, adjust_lr_fn="match_rms_adamw")
        self.others = adamw(torch.nn.ParameterList(others), lr)

    @property
    def param_groups(self):
        return self.matrices.param_groups + self.others.param_groups

    def step(self):
        self.matrices.step()
        self.others.step()

    def zero_grad(self, set_to_none=True):
        self.matrices.zero_grad(set_to_none)
        self.others.zero_grad(set_to_none)

    def state_dict(self):
        return {"matrices": self.matrices.state_dict(), "others": self.others.state_dict()}

    def load_state_dict(self, state):
        self.matrices.load_state_dict(state["matrices"])
        self.others.load_state_dict(state["others"])


def cosine(step, steps, warmup=0.0):
    """The factor of the peak learning rate: a rise in the first `warmup` of the steps, then a cosine to 0."""
    rise = round(warmup * steps)
    if step < rise:
        return (step + 1) / (rise + 1)
    return 0.5 * (1 + math.cos(math.pi * (step - rise) / (steps - rise)))


def shuffled_batch(step, batch, n, *key):
    """Batch number `step` of endless shuffled epochs over n examples: (batch,) indices, by the key alone."""
    first, end = step * batch, (step + 1) * batch
    epochs = range(first // n, (end - 1) // n + 1)                    # those that the batch touches
    shuffled = [torch.randperm(n, generator=rng(*key, epoch)) for epoch in epochs]
    return torch.cat(shuffled)[first - epochs[0] * n:end - epochs[0] * n]


def batch_by_length(step, batch, length, *key, window=32):
    """The same of examples of alike length.  length: (n,) tokens of each -> (batch,), ascending in length

    The examples of `window` batches in a row are sorted by length and cut into batches, which are then
    shuffled: a batch pads little, and the order stays random.  Not for alignment (ours): EXO-rw ran away on a
    seed of three.
    """
    first = step // window * window
    index = shuffled_batch(step // window, window * batch, len(length), *key)             # (window * batch,)
    by_length = length[index].argsort(stable=True)
    batches = index[by_length].view(window, batch)
    order = torch.randperm(window, generator=rng(*key, "window", first))
    return batches[order[step - first]]                               # (batch,)


def micro_batches(index, size):
    """This process's part of a batch, in pieces of at most `size` (0: one piece).  (n,) -> tuple of (m,)"""
    if len(index) < world():
        raise UserError(f"a batch of {len(index)} cannot be split among {world()} processes: start fewer")
    return own_rows(index).split(size or len(index))


class Sums:
    """What a batch adds up to: the loss, and what is logged.  Stays on the device until `update` reads it."""

    def __init__(self):
        self.names = []
        self.total = 0.0

    def add(self, count, **sums):
        """count: how many examples or tokens the mean is over; sums: scalar tensors, among them the loss."""
        self.names = list(sums)
        values = move(sums["loss"].device, *[value.detach().float() for value in sums.values()])
        count = values[0].new_full((), count)
        self.total = self.total + torch.stack([count, *values])       # (1 + number of sums,)


def update(optimizer, lr, sums, index, where):
    """One step on the gradients of the summed loss: mean, clip, step.  -> {name: mean, grad_norm}

    UserError, before anything is changed, if loss or gradient is not finite; it names `where` and `index`.
    """
    parameters = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    gradients = [p.grad for p in parameters]
    add_up([sums.total, *gradients])
    torch._foreach_div_(gradients, sums.total[0])
    norm = torch.nn.utils.clip_grad_norm_(parameters, GRADIENT_CLIP)
    means = torch.cat([sums.total[1:] / sums.total[0], norm[None]])
    means = dict(zip([*sums.names, "grad_norm"], means.tolist()))     # waits for the device
    loss = means["loss"]
    norm = means["grad_norm"]
    if not (math.isfinite(loss) and math.isfinite(norm)):
        raise UserError(f"{where}: the loss is {loss:.4g} and its gradient's norm {norm:.4g}, nothing was "
                        f"changed: lower the learning rate, or look at its examples {index.tolist()}")
    for group in optimizer.param_groups:
        group["lr"] = lr
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return means
