"""One optimizer step, for every stage and method: micro-batches, processes, clipping, the guard against NaN; the data order."""
import math

import torch

from checkpoint import rng
from files import UserError
from parallel import add_up, share, world

BETAS, CLIP = (0.9, 0.95), 1.0                                       # official code: Adam's betas and the gradient clip


def adamw(module, lr, eps=1e-8):
    """AdamW without weight decay (official code), one fused kernel."""
    return torch.optim.AdamW(module.parameters(), lr=lr, betas=BETAS, eps=eps, weight_decay=0.0, fused=True)


def cosine(step, steps):
    """The share of the peak learning rate at `step`: from 1 down to 0 along a cosine, no warm-up (official code)."""
    return 0.5 * (1 + math.cos(math.pi * step / steps))


def descend(optimizer, lr, index, rows, loss_sum, where):
    """One step on the mean loss of the batch `index`, a 1-D tensor, `rows` of it at a time (0: all at once).  -> {name: mean}

    loss_sum(part of index) -> {"loss": sum of the losses, ...: sums of what is logged beside it}, their count.  The gradients of
    sums are added up, over micro-batches and processes, and divided by the whole batch's count: how it is split changes memory
    and time only.  UserError, before anything is changed, if the loss or the gradient is not finite.
    """
    if len(index) < world():
        raise UserError(f"{where}: a batch of {len(index)} cannot be split among {world()} processes: start fewer of them")
    sums = 0.0
    try:
        for part in share(index).split(rows or len(index)):
            stats, count = loss_sum(part)
            stats["loss"].backward()
            sums = sums + torch.stack([stats["loss"].new_tensor(count), *(v.detach().float() for v in stats.values())])
    except (RuntimeError, MemoryError) as error:
        if not out_of_memory(error):
            raise
        raise UserError(f"{where}: out of memory: lower --micro-batch-size, or set it: the result does not depend on it") from error
    parameters = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    add_up([sums, *(p.grad for p in parameters)])
    torch._foreach_div_([p.grad for p in parameters], sums[0])
    norm = torch.nn.utils.clip_grad_norm_(parameters, CLIP)
    *values, norm = torch.stack([*(sums[1:] / sums[0]), norm]).tolist()      # the step's only wait for the device
    means = dict(zip([*stats, "grad_norm"], [*values, norm]))
    if not (math.isfinite(means["loss"]) and math.isfinite(norm)):
        raise UserError(f"{where}: the loss is {means['loss']:.4g} and its gradient's norm {norm:.4g}, nothing was changed: lower "
                        f"the learning rate, or look at its examples {index.tolist()}")
    for group in optimizer.param_groups:
        group["lr"] = lr
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return means


def out_of_memory(error):
    """On a CPU and on MPS it is a RuntimeError like any other, but for its text."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or "out of memory" in str(error) \
        or "can't allocate memory" in str(error)


def stuck(losses):
    """True if these losses are a constant, as when the policy is its own reference."""
    return max(losses) - min(losses) <= 1e-4 * abs(losses[0])


def batch_at(step, batch, length, *names, window=32):
    """The indices of batch number `step` in an endless sequence of shuffled epochs: a function of its arguments alone.

    length: (n,) tokens of each example.  Of every `window` batches in a row the examples are sorted by length, and the batches
    then shuffled, so that a batch pads little and the order stays random.  -> (batch,) int64, ascending in length
    Alignment takes plain shuffled batches, window=1  # ours: with batches of one length EXO-rw ran away on a seed of three
    """
    n, first = len(length), step // window * window
    position = torch.arange(first * batch, (first + window) * batch)
    epochs = [torch.randperm(n, generator=rng(*names, e)) for e in range(int(position[0]) // n, int(position[-1]) // n + 1)]
    index = torch.cat(epochs)[position - int(position[0]) // n * n]                         # (window * batch,)
    index = index[length[index].argsort(stable=True)].view(window, batch)
    return index[torch.randperm(window, generator=rng(*names, "window", first))[step - first]]
