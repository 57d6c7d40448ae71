"""Speed and memory beside the peers, in one run:  pip install -r requirements-bench.txt && python -m bench

An EXO step beside TRL's DPOTrainer and beside one that holds all logits; a language-model step beside
nanoGPT's way; sampling beside transformers' `generate` and beside sampling without a cache.

Each entrant is a process of its own, one at a time, twice in the order A B C A B C.  Seconds are medians over
its turns, memory is the peak.  With CUDA: wall seconds, bfloat16, memory of tensors.  Without: CPU seconds of
one thread, float32, resident memory.  Reference log-probs that are stored are made before the clock starts.
"""
import argparse
import csv
import os
from dataclasses import replace
from pathlib import Path
from statistics import median

import torch

from bench.clock import measure
from bench.entrants import EXO, LANGUAGE_MODEL, PROMPT, SAMPLING, UNCACHED, Case
from compute import arithmetic


def compare(what, case, entrants):
    """{who: function}: prints a table.  -> its rows for the csv; the ratios are to the first who runs"""
    print(f"\n{what} · {case.name} · V = {case.V:,} · {case.N} rows of {PROMPT} + {case.T - PROMPT} tokens")
    print(f"{'':27}{'seconds':>9}{'tokens/s':>10}{'peak MiB':>10}{'time':>8}{'memory':>8}", flush=True)
    cases = dict.fromkeys(entrants, case)
    if UNCACHED in cases:                                 # fewer rows: the tokens a second are the same
        cases[UNCACHED] = replace(case, N=case.N // 8)
    seconds = {who: [] for who in entrants}
    peak = {}
    failure = {}
    for who in [*entrants, *entrants]:
        if who in failure:
            continue
        try:
            turns, peak[who] = measure(entrants[who], cases[who])
            seconds[who] += turns
        except Exception as error:                        # not installed, another version, not enough memory
            failure[who] = f"{type(error).__name__}: {error}".splitlines()[0]
    rows = []
    first = None
    for who, case in cases.items():
        row = {"what": what, "size": case.name, "V": case.V, "who": who, "rows": case.N, "tokens": case.T,
               "parameters": 12 * case.n_layer * case.n_embd ** 2}
        rows.append(row)
        if who in failure:
            row["note"] = failure[who]
            print(f"{who:27}  {failure[who]}", flush=True)
            continue
        first = first or row
        tokens = case.N * (case.T - PROMPT if what == "sampling" else case.T)
        row["turns"] = len(seconds[who])
        row["seconds"] = median(seconds[who])
        row["tokens_per_second"] = tokens / row["seconds"]
        row["peak_mib"] = peak[who]
        row["time_ratio"] = first["tokens_per_second"] / row["tokens_per_second"]
        row["memory_ratio"] = row["peak_mib"] / first["peak_mib"]
        print(f"{who:27}{row['seconds']:9.3f}{row['tokens_per_second']:10,.0f}{row['peak_mib']:10,.0f}"
              f"{row['time_ratio']:7.2f}x{row['memory_ratio']:7.2f}x", flush=True)
    return rows


def write(rows, path):
    columns = [*max(rows, key=len), "note"]               # a row that failed has no numbers
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        for row in rows:
            writer.writerow({name: f"{v:.5g}" if isinstance(v, float) else v for name, v in row.items()})


def main():
    """Runs the comparisons of one size, prints their tables and writes bench.csv."""
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__.split("\n")[0])
    parser.add_argument("--size", default="tiny", choices=["toy", "tiny", "124M"],
                        help="tiny: a small model with a small and with GPT-2's vocabulary; 124M: gpt2's "
                             "size too, with 24 GB of memory; toy: only shows that everything runs")
    parser.add_argument("--out", default="results/bench", help="the folder of bench.csv")
    args = parser.parse_args()
    path = Path(args.out) / "bench.csv"
    path.parent.mkdir(parents=True, exist_ok=True)
    os.environ |= {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error", "PYTHONWARNINGS": "ignore"}
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    bf16 = arithmetic(device, "highest")
    toy = Case("toy", 1, 4, 16, 97, device, bf16, T=16)
    tiny = Case("tiny", 4, 4, 128, 512, device, bf16)
    large = replace(tiny, name="tiny, GPT-2's vocabulary", V=50257)
    gpt2 = replace(large, name="124M", n_layer=12, n_head=12, n_embd=768)
    sizes = {"toy": [(toy, replace(toy, N=8))],           # pairs: the case of the steps, the case of sampling
             "tiny": [(tiny, replace(tiny, N=256)), (large, replace(large, N=256, T=42))]}
    sizes["124M"] = [*sizes["tiny"], (gpt2, replace(gpt2, N=32, T=42))]
    print(f"torch {torch.__version__}, {'bfloat16' if bf16 else 'float32'} on {device}")
    rows = []
    for steps, sampled in sizes[args.size]:
        rows += compare("EXO step", steps, EXO)
        rows += compare("language-model step", steps, LANGUAGE_MODEL)
        rows += compare("sampling", sampled, SAMPLING)
        write(rows, path)
    print(f"\n{path}")


if __name__ == "__main__":
    main()
