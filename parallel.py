"""Several processes on one run, a GPU each:  torchrun --nproc_per_node=4 train.py --method exo

Every process runs the same program with the same settings and the same random numbers, and holds the same weights.  Only the rows
of a batch are split: each process takes its share, of a training batch (`optim.descend` adds up the gradients) and of a batch of
prompts (`model.respond` puts the responses together).  So the number of processes changes the time and nothing else, up to
rounding.  Process 0 writes the files and talks.  With one process every function here does nothing.
"""
import functools
import os
import sys

import torch
import torch.distributed as dist


def start(device):
    """Joins the processes that torchrun started, if it did.  torch.device -> this process's own"""
    if "LOCAL_RANK" not in os.environ:
        return device
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")      # gloo: what lies on the CPU
    if rank() > 0:
        sys.stdout = open(os.devnull, "w")                           # one process talks
    return device


def stop():
    if dist.is_initialized():
        dist.destroy_process_group()


def rank():
    """This process's number, 0 for the one that writes."""
    return dist.get_rank() if dist.is_initialized() else 0


def world():
    """The number of processes."""
    return dist.get_world_size() if dist.is_initialized() else 1


def share(rows):
    """This process's rows of a batch, every world()-th: they come sorted by length, and so all have as much to do."""
    return rows[rank()::world()]


def add_up(tensors):
    """The sum over the processes of each tensor, in place: the same bits everywhere."""
    if world() > 1:
        flat = torch.cat([tensor.flatten() for tensor in tensors])   # one message, not a hundred
        dist.all_reduce(flat)
        for tensor, total in zip(tensors, flat.split([tensor.numel() for tensor in tensors])):
            tensor.copy_(total.view_as(tensor))


def gather(columns):
    """The inverse of `share`: {name: (n, ...) of this process's rows, on the CPU} -> {name: (N, ...) of all, in their order}"""
    if world() == 1:
        return columns
    parts = [None] * world()
    dist.all_gather_object(parts, columns)
    whole = {k: v.new_empty((sum(len(part[k]) for part in parts), *v.shape[1:])) for k, v in columns.items()}
    for r, part in enumerate(parts):
        for k, v in part.items():
            whole[k][r::world()] = v
    return whole


def agreed(number):
    """The largest of the processes' numbers: a signal that one has got is every one's."""
    if world() == 1:
        return number
    largest = torch.tensor(number)
    dist.all_reduce(largest, dist.ReduceOp.MAX)
    return int(largest)


def on_first(function):
    """Process 0 runs it; each gets what it returned or raised, and no one goes on before it is done."""
    @functools.wraps(function)
    def run(*args, **kwargs):
        if world() == 1:
            return function(*args, **kwargs)
        answer = [None, None]                                        # what process 0 got, and the error that it met instead
        if rank() == 0:
            try:
                answer[0] = function(*args, **kwargs)
            except Exception as error:
                answer[1] = error
        dist.broadcast_object_list(answer)
        if answer[1] is not None:
            raise answer[1]
        return answer[0]
    return run
