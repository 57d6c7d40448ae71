"""Speed and memory next to the peers, in one run:  pip install -r requirements-bench.txt && python -m bench

An EXO step next to TRL's, sampling next to transformers' `generate`: on the CPU, in float32, one thread.
Each entrant is a process of its own, twice, in the order A B C A B C.  Medians of CPU seconds, peak memory.
"""
import argparse
import math
import os
from dataclasses import replace
from pathlib import Path
from statistics import median

import torch

from bench.entrants import EXO, PROMPT, SAMPLING, Case, measure
from loop import write_csv

TOY, TINY = Case("toy", 1, 4, 16, 97, T=16), Case("tiny", 4, 4, 128, 512)
LARGE = replace(TINY, name="tiny, GPT-2's vocabulary", V=50257)
GPT2 = replace(LARGE, name="124M", n_layer=12, n_head=12, n_embd=768)
SMALL = [(TINY, replace(TINY, N=256)), (LARGE, replace(LARGE, N=256, T=42))]      # steps, sampling
SIZES = {"toy": [(TOY, TOY)], "tiny": SMALL, "124M": [*SMALL, (GPT2, replace(GPT2, N=32, T=42))]}


def compare(what, case, entrants):
    """{who: function}: prints a table.  -> its rows for the csv; the ratios are to the first"""
    print(f"\n{what} · {case.name} · V = {case.V:,} · {case.N} rows of {PROMPT} + {case.T - PROMPT} tokens")
    print(f"{'':27}{'seconds':>9}{'tokens/s':>10}{'peak MiB':>10}{'time':>8}{'memory':>8}", flush=True)
    seconds, peak, note, rows = {who: [] for who in entrants}, {}, {}, []
    for who in [*entrants, *entrants]:
        try:
            turns, peak[who] = measure(entrants[who], case)
            seconds[who] += turns
        except Exception as error:                        # not installed, another version, not enough memory
            note[who] = f"{type(error).__name__}: {error}".splitlines()[0]
    for who in entrants:
        middle = median(seconds[who] or [math.nan])
        tokens = case.N * (case.T - PROMPT if what == "sampling" else case.T)
        row = {"what": what, "size": case.name, "V": case.V, "who": who, "rows": case.N, "tokens": case.T,
               "seconds": middle, "tokens_per_second": tokens / middle, "peak_mib": peak.get(who, math.nan)}
        first = rows[0] if rows else row
        row["time_ratio"] = row["seconds"] / first["seconds"]
        row["memory_ratio"] = row["peak_mib"] / first["peak_mib"]
        row["note"] = note.get(who, "")
        rows.append(row)
        print(f"{who:27}{row['seconds']:9.3f}{row['tokens_per_second']:10,.0f}{row['peak_mib']:10,.0f}"
              f"{row['time_ratio']:7.2f}x{row['memory_ratio']:7.2f}x  {row['note']}", flush=True)
    return rows


def main():
    """Runs the comparisons of one size, prints their tables and writes bench.csv."""
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__.split("\n")[0])
    parser.add_argument("--size", default="tiny", choices=SIZES, help="124M takes 24 GB of memory")
    parser.add_argument("--out", default="results/bench", help="the folder of bench.csv")
    args = parser.parse_args()
    os.environ |= {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error", "PYTHONWARNINGS": "ignore"}
    print(f"torch {torch.__version__}")
    rows = []
    for steps, sampled in SIZES[args.size]:
        rows += compare("EXO step", steps, EXO) + compare("sampling", sampled, SAMPLING)
        write_csv(Path(args.out) / "bench.csv", rows)


if __name__ == "__main__":
    main()
