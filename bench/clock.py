"""Seconds and peak memory of an entrant, in a process of its own."""
import multiprocessing
import re
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import torch

from compute import arithmetic

TURNS = 3                                                 # of a process
ENOUGH = 15                                               # seconds after which it takes no further turn


def clock(device):
    """CUDA: wall seconds, all work done.  CPU: this process's CPU seconds, which hold on a busy machine."""
    if device.type == "cpu":
        return time.process_time()
    torch.cuda.synchronize()
    return time.perf_counter()


def peak_memory(device):
    """The most that this process has held so far, in MiB.  CUDA: tensors.  CPU: all that is resident."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 2 ** 20
    status = Path("/proc/self/status").read_text()        # Linux; getrusage counts the parent's too
    return int(re.search(r"VmHWM:\s+(\d+)", status)[1]) / 2 ** 10


def timed_turns(seconds, device):
    """Yields once a turn.  The first warms up; the seconds of every further one are appended to `seconds`."""
    yield
    while len(seconds) < TURNS and sum(seconds) < ENOUGH:
        start = clock(device)
        yield
        seconds.append(clock(device) - start)


def take_turns(work, case):
    """-> (seconds of each turn, peak MiB)"""
    if case.device.type == "cpu":
        torch.set_num_threads(1)
    arithmetic(case.device, "highest")
    torch.manual_seed(0)
    seconds = []
    work(case, timed_turns(seconds, case.device))
    return seconds, peak_memory(case.device)


def measure(work, case):
    """take_turns in a new process.  Raises what was raised there, or BrokenProcessPool if it died."""
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=spawn) as pool:
        return pool.submit(take_turns, work, case).result()
