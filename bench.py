"""Speed and memory beside the peers, in one run:  pip install -r requirements-bench.txt && python bench.py

An EXO step beside TRL's DPOTrainer (loss_type="exo_pair", without its defaults of gradient checkpointing and bf16 on a CPU) and
beside one that holds all logits; a language-model step beside nanoGPT's way; sampling beside transformers' `generate` and beside
sampling without a cache; then this repository alone over K, over length and over model size.

Each entrant of a table is a process of its own, so that its peak memory is its own.  It builds its model, takes a turn that does
not count, and then turns with the others, one step each (ABAB...): no two ever compute at once.  Seconds are medians of turns.
On a CPU they are the process's CPU seconds on one thread, which hold on a busy machine, and memory is what is resident; everyone
gets both float32 settings, "highest" and "medium" (torch.set_float32_matmul_precision), and is shown at its best, with the peak
over both.  On CUDA they are wall seconds in bfloat16, and memory is what tensors take.  "built" is the peak before the first step.

MFU: the FLOPs that a step must have (no reference pass, no recomputation, no prompt tokens in the head) in its seconds, over
those of a large matrix product that takes turns with it.  Models are random, rows have full length; reference log-probs that
are stored, ours and TRL's precomputed ones, are made before the clock starts.  Nothing is downloaded.
"""
import argparse
import contextlib
import copy
import csv
import importlib.util
import itertools
import multiprocessing.dummy
import os
import re
import resource
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F

from exo import exo_loss, exo_pref_loss
from model import GPT, GPTConfig, generate, sequence_logprob, token_logprob
from optim import adamw, descend

LR, BETA, EPS, TEMPERATURE = 1e-6, 0.1, 1e-3, 0.8


@dataclass
class Case:
    n_layer: int
    n_head: int
    n_embd: int
    V: int
    device: str
    prompts: int = 8
    K: int = 2                                                       # responses a prompt
    start: int = 10                                                  # tokens of a prompt
    T: int = 128                                                     # tokens of a row, the end-of-text (V - 1) included
    product: int = 1024                                              # rows and columns of the matrix product's factors

    @property
    def N(self):
        return self.prompts * self.K


# ---- the entrants: each builds, and then does one step a turn --------------------------------------------------------------

def random_gpt(case):
    gpt = GPT(GPTConfig(case.n_layer, case.n_head, case.n_embd, case.V, case.T)).to(case.device)
    gpt.bf16 = case.device == "cuda"
    return gpt


def their_gpt(case):
    from transformers import GPT2Config, GPT2LMHeadModel
    return GPT2LMHeadModel(GPT2Config(n_layer=case.n_layer, n_head=case.n_head, n_embd=case.n_embd, vocab_size=case.V,
                                      n_positions=case.T, bos_token_id=case.V - 1, eos_token_id=case.V - 1))


def random_rows(case, seed=0):
    """-> ids (N, T), the K rows of a prompt one after another, and the mask of their responses (N, T)"""
    ids = torch.randint(case.V - 1, (case.N, case.T), generator=torch.Generator().manual_seed(seed))
    ids[:, :case.start] = ids[::case.K, :case.start].repeat_interleave(case.K, dim=0)
    ids[:, -1] = case.V - 1
    mask = (torch.arange(case.T) >= case.start).expand(ids.shape)
    return ids.to(case.device), mask.to(case.device)


def full_logprob(model, ids, mask):
    """sequence_logprob as most code has it, from all logits at once.  (N, T), (N, T) -> (N,)"""
    logp = model(ids)[:, :-1].log_softmax(-1)                                               # (N, T-1, V)
    return (logp.gather(-1, ids[:, 1:, None]).squeeze(-1) * mask[:, 1:]).sum(1)             # (N, T-1) -> (N,)


def exo(case, turns, logprob=sequence_logprob, rewards=False):
    """EXO from pairs (Eq 18), or from rewards (Eq 15), with stored reference log-probs, as in train.py."""
    model, (ids, mask) = random_gpt(case), random_rows(case)
    with torch.no_grad():
        ref_logp = sequence_logprob(model, ids, mask).view(case.prompts, case.K)            # (N,) -> (B, K)
    reward = torch.randn(ref_logp.shape).to(case.device)                                    # (B, K)

    def loss_sum(index):
        logp = logprob(model, ids, mask).view(ref_logp.shape)                               # (N,) -> (B, K)
        loss = exo_loss(logp, ref_logp, reward, beta_pi=BETA) if rewards else exo_pref_loss(logp, ref_logp, BETA, EPS)
        return {"loss": loss * len(index)}, len(index)

    train(model, case.prompts, loss_sum, turns)


def language_model(case, turns, full=False):
    """Maximum likelihood on every token; full: nanoGPT's way, one cross-entropy on all logits."""
    model, ids = random_gpt(case), random_rows(case)[0]
    mask = (torch.arange(case.T) > 0).expand(ids.shape).to(case.device)

    def loss_sum(index):
        if full:
            loss = F.cross_entropy(model(ids)[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), reduction="sum")
        else:
            loss = -token_logprob(model, ids, mask).sum()
        return {"loss": loss}, len(index) * (case.T - 1)

    train(model, case.N, loss_sum, turns)


def train(model, examples, loss_sum, turns):
    optimizer = adamw(model, LR)
    for _ in turns:
        descend(optimizer, LR, torch.arange(examples), 0, loss_sum, "bench.py")


def trl(case, turns, precompute=False):
    """TRL has a loop of its own: a turn runs from the beginning of one of its steps to the beginning of the next."""
    import datasets
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast, TrainerCallback
    from trl import DPOConfig, DPOTrainer

    class Turn(TrainerCallback):
        def on_step_begin(self, *_, **__):
            next(turns)

    words = {str(i): i for i in range(case.V - 1)} | {"<eos>": case.V - 1}                  # token i is the word "i"
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<eos>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    rows = torch.cat([random_rows(case, seed)[0] for seed in range(4)]).tolist()            # four batches, again and again
    prompt = [" ".join(map(str, row[:case.start])) for row in rows[::2]]
    first, second = ([" " + " ".join(map(str, row[case.start:-1])) for row in rows[i::2]] for i in (0, 1))  # it appends <eos>
    datasets.disable_progress_bars()
    with tempfile.TemporaryDirectory() as folder:
        settings = DPOConfig(
            folder, loss_type="exo_pair", beta=BETA, label_smoothing=EPS, precompute_ref_log_probs=precompute,
            per_device_train_batch_size=case.prompts, learning_rate=LR, lr_scheduler_type="constant", adam_beta2=0.95,
            max_steps=10 ** 6, use_cpu=case.device == "cpu", bf16=case.device == "cuda", gradient_checkpointing=False,
            logging_strategy="no", save_strategy="no", report_to=[], disable_tqdm=True, dataloader_pin_memory=False)
        model = their_gpt(case)
        trainer = DPOTrainer(
            model, None if precompute else copy.deepcopy(model), settings,
            train_dataset=datasets.Dataset.from_dict({"prompt": prompt, "chosen": first, "rejected": second}),
            processing_class=PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<eos>"),
            callbacks=[Turn()])
        with contextlib.suppress(StopIteration):                     # no more turns
            trainer.train()


def sampling(case, turns):
    model, prompts = random_gpt(case), random_rows(case)[0][:, :case.start].cpu()
    for _ in turns:
        generate(model, prompts, case.T - case.start, TEMPERATURE)


@torch.no_grad()
def sampling_uncached(case, turns):
    """nanoGPT's way: for each token the whole row is read again."""
    model, prompts = random_gpt(case), random_rows(case)[0][:, :case.start]
    for _ in turns:
        ids = prompts
        while ids.shape[1] < case.T:
            p = (model.head(model.hidden(ids)[:, -1]) / TEMPERATURE).softmax(-1)            # (N, V)
            ids = torch.cat([ids, torch.multinomial(p, 1)], dim=1)


def sampling_transformers(case, turns):
    model, prompts = their_gpt(case).to(case.device).eval(), random_rows(case)[0][:, :case.start]
    model = model.bfloat16() if case.device == "cuda" else model
    for _ in turns:
        ids = model.generate(prompts, attention_mask=torch.ones_like(prompts), do_sample=True, temperature=TEMPERATURE, top_k=0,
                             min_length=case.T, max_length=case.T, pad_token_id=case.V - 1)
        assert ids.shape == (case.N, case.T)


def matrix_product(case, turns):
    factor = torch.randn(case.product, case.product, device=case.device)
    factor = factor.bfloat16() if case.device == "cuda" else factor
    for _ in turns:
        for _ in range(10):
            factor @ factor


exo_rewards, exo_full = partial(exo, rewards=True), partial(exo, logprob=full_logprob)
language_model_full, trl_precomputed = partial(language_model, full=True), partial(trl, precompute=True)
OURS, PRODUCT = "this repository", "matrix product"
EXO = {OURS: exo, "all logits at once": exo_full, "TRL, live reference": trl, "TRL, precomputed reference": trl_precomputed}
LANGUAGE_MODEL = {OURS: language_model, "all logits, as in nanoGPT": language_model_full}
SAMPLING = {OURS: sampling, "no cache, as in nanoGPT": sampling_uncached, "transformers": sampling_transformers}
NEEDS = {"TRL, live reference": "trl", "TRL, precomputed reference": "trl", "transformers": "transformers"}


def work_of(what, case):
    """Tokens and FLOPs of a step: a weight times a token is 2, attention is causal, backward is twice forward."""
    body = 12 * case.n_layer * case.n_embd ** 2 + case.n_layer * case.T * case.n_embd       # weights and attention, a token
    scored = case.T - (1 if what == "language-model step" else case.start)
    forward = 2 * case.N * ((case.T - 1) * body + scored * case.V * case.n_embd)
    return (case.N * scored, forward) if what == "sampling" else (case.N * case.T, 3 * forward)


# ---- taking turns ----------------------------------------------------------------------------------------------------------

def peak_memory(device):
    """The most that this process has held so far, in MiB."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated() / 2 ** 20
    if os.path.exists("/proc/self/status"):                          # ru_maxrss would also count the process that started it
        return int(re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[1]) / 2 ** 10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2 ** 20 if sys.platform == "darwin" else 2 ** 10)


def clock(device):
    if device == "cpu":
        return time.process_time()
    torch.cuda.synchronize()
    return time.perf_counter()


def take_turns(pipe, device):
    """Yields whenever the parent names a setting; sends it the seconds, and the peak memory, when that turn is over."""
    pipe.send((0.0, peak_memory(device)))                            # built
    while (setting := pipe.recv()) is not None:
        if device == "cpu":
            torch.set_float32_matmul_precision(setting)
        start = clock(device)
        yield
        pipe.send((clock(device) - start, peak_memory(device)))


def entrant(work, case, pipe):
    """The life of an entrant's process: builds, takes its turns as the pipe asks, and tells by it what went wrong, if anything."""
    try:
        if case.device == "cpu":
            torch.set_num_threads(1)
        torch.manual_seed(0)
        work(case, take_turns(pipe, case.device))
    except EOFError:                                                 # the parent is gone
        pass
    except Exception as error:                                       # no memory, or a peer's other version: its row says so
        pipe.send(f"{type(error).__name__}: {error}".splitlines()[0])


def interleave(entrants, settings, rounds=5, context=None):
    """entrants: {name: (work, case)} -> {name: (seconds {setting: [of a turn]}, MiB when built, MiB at most), or a sentence}

    `rounds` turns each in every setting; it stays at two for an entrant whose turns have taken 30 seconds together.
    """
    context, processes, pipes, found = context or multiprocessing.get_context("spawn"), [], {}, {}

    def turn(name, setting=None):
        try:
            if setting:
                pipes[name].send(setting)
            answer = pipes[name].recv()
        except (EOFError, OSError):
            answer = "the process died: out of memory?"
        if isinstance(answer, str):
            found[name] = answer
            del pipes[name]
        return answer

    for name, (work, case) in entrants.items():
        if name in NEEDS and importlib.util.find_spec(NEEDS[name]) is None:
            found[name] = "not installed"
            continue
        pipes[name], far_end = context.Pipe()
        processes.append(context.Process(target=entrant, args=(work, case, far_end)))
        processes[-1].start()
        far_end.close()
        built = turn(name)
        warm = turn(name, settings[0]) if name in pipes else None    # it does not count
        if name in pipes:
            found[name] = {setting: [] for setting in settings}, built[1], warm[1]
    for i, name, setting in itertools.product(range(rounds), tuple(pipes), settings):
        if name in pipes and (i < 2 or sum(map(sum, found[name][0].values())) < 30):
            answer = turn(name, setting)
            if name in pipes:
                found[name][0][setting].append(answer[0])
                found[name] = *found[name][:2], answer[1]
    for pipe in pipes.values():
        pipe.send(None)
    for process in processes:
        process.join()
    return found


# ---- tables ----------------------------------------------------------------------------------------------------------------

def table(what, size, entrants, settings, rounds, context=None):
    """entrants: {name: (work, case)}.  Prints each at its best setting, beside the first.  -> rows of a csv, one a setting"""
    case = next(iter(entrants.values()))[1]
    print(f"\n{what} · {size} · V = {case.V:,} · {case.N} rows of {case.start} + {case.T - case.start} tokens", flush=True)
    found = interleave({**entrants, PRODUCT: (matrix_product, case)}, settings, rounds, context)
    speed = {s: 10 * 2 * case.product ** 3 / statistics.median(found[PRODUCT][0][s]) for s in settings}     # FLOP/s
    print(f"{'':27}{'setting':>9}{'seconds':>9}{'tokens/s':>9}{'MFU':>5}{'peak MiB':>9}{'built':>7}{'time':>8}{'memory':>8}")
    rows, first = [], None
    for name, (_, case) in entrants.items():
        head = {"what": what, "size": size, "V": case.V, "who": name, "rows": case.N, "K": case.K, "tokens": case.T,
                "parameters": 12 * case.n_layer * case.n_embd ** 2}
        if isinstance(found[name], str):
            rows.append(head | {"note": found[name]})
            print(f"{name:27}  {found[name]}")
            continue
        (times, built, peak), (tokens, flops) = found[name], work_of(what, case)
        mine = []
        for setting in settings:
            t = statistics.median(times[setting])
            mine.append(head | {"setting": setting, "turns": len(times[setting]), "seconds": t, "tokens_per_second": tokens / t,
                                "flops": flops, "mfu": flops / t / speed[setting], "peak_mib": peak, "built_mib": built})
        best = min(mine, key=lambda row: row["seconds"])
        first = first or best
        for row in mine:                                             # per token: without a cache fewer rows are sampled
            row["time_ratio"] = first["tokens_per_second"] / row["tokens_per_second"]
            row["memory_ratio"] = peak / first["peak_mib"]
        rows += mine
        print(f"{name:27}{best['setting']:>9}{best['seconds']:9.3f}{best['tokens_per_second']:9,.0f}{best['mfu']:5.0%}{peak:9,.0f}"
              f"{built:7,.0f}{best['time_ratio']:7.2f}x{best['memory_ratio']:7.2f}x")
    print(f"{PRODUCT:27}" + "".join(f"{s:>9} {speed[s] / 1e9:,.0f} GFLOP/s" for s in settings), flush=True)
    return rows


def draw(rows, path):
    """The seconds of a sequence over K, tokens and parameters, beside its FLOPs on the scale of the first point."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.ticker import LogLocator
    figure, panels = plt.subplots(1, 3, figsize=(11, 3.4), layout="constrained")
    labels = {"K": "K, responses a prompt", "tokens": "tokens a sequence", "parameters": "parameters without embeddings"}
    for axes, (axis, label) in zip(panels, labels.items()):
        points = [row for row in rows if row["size"] == axis and "seconds" in row]
        x = [row[axis] for row in points]
        for name, style, unit in ((OURS, "o-", "seconds"), ("its FLOPs", "--", "flops")):
            scale = 1e3 * points[0]["seconds"] / points[0][unit]
            axes.plot(x, [scale * row[unit] / row["rows"] for row in points], style, label=name,
                      color="#0072B2" if unit == "seconds" else "#7F7F7F")
        axes.set(xlabel=label, ylabel="ms a sequence", xscale="log", yscale="log")
        axes.set_xticks(x, [f"{v:,}" if v < 10 ** 5 else f"{v / 1e6:.1f}M" for v in x])
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter("{x:g}")
        axes.minorticks_off()
        axes.set_ylim(axes.get_ylim()[0] / 2.5, axes.get_ylim()[1] * 2.5)
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].legend(frameon=False)
    figure.savefig(path, dpi=160)
    plt.close(figure)


def write(rows, path):
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, dict.fromkeys(key for row in rows for key in row))
        writer.writeheader()
        writer.writerows({k: f"{v:.5g}" if isinstance(v, float) else v for k, v in row.items()} for row in rows)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("--size", default="tiny", choices=["tiny", "124M"], help="124M: gpt2's size too, with 24 GB of memory")
    parser.add_argument("--device", default="auto", choices=["auto", "cpu", "cuda"])
    parser.add_argument("--quick", action="store_true", help="toy sizes in one process, in seconds: does it run here?")
    parser.add_argument("--rounds", type=int, default=5, help="turns of each entrant in a setting; 1 with --quick")
    parser.add_argument("--out", default="results/bench", help="the folder of bench.csv, scaling.csv and scaling.png")
    args = parser.parse_args(argv)
    out, cuda = Path(args.out), torch.cuda.is_available() and args.device != "cpu"
    if args.rounds < 1:
        sys.exit(f"bench.py: --rounds must be at least 1, got {args.rounds}")
    if args.device == "cuda" and not cuda:
        sys.exit("bench.py: --device cuda: PyTorch finds no such device here, use --device auto")
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        sys.exit(f"bench.py: cannot write into {out} ({error.strerror}): name another folder by --out")
    print(f"torch {torch.__version__} · medians of " + (f"wall seconds on {torch.cuda.get_device_name()}, bfloat16" if cuda else
                                                        "CPU seconds of one thread, float32"))
    os.environ |= {"HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "TRANSFORMERS_VERBOSITY": "error", "TQDM_DISABLE": "1",
                   "PYTHONWARNINGS": "ignore"}                       # for the peers' processes
    settings, measure = ["bfloat16"] if cuda else ["highest", "medium"], partial(table, rounds=args.rounds)
    tiny = Case(4, 4, 128, V=512, device="cuda" if cuda else "cpu", product=8192 if cuda else 1024)
    large = replace(tiny, V=50257)
    sizes = {"tiny": (tiny, 256, 128), "tiny, GPT-2's vocabulary": (large, 256, 42)}        # rows and their length in sampling
    if args.size == "124M":
        sizes["124M"] = replace(large, n_layer=12, n_head=12, n_embd=768), 32, 42
    Ks, Ts, shapes = (2, 4, 8, 16), (128, 256, 512), [(2, 4, 64), (4, 4, 128), (6, 8, 256), (8, 8, 512)]
    if args.quick:                                                   # threads in place of processes: nothing has to start
        measure = partial(table, rounds=1, context=multiprocessing.dummy)
        tiny = replace(tiny, n_layer=1, n_embd=16, V=97, prompts=2, start=3, T=8, product=64)
        sizes, Ks, Ts, shapes = {"toy": (tiny, 8, 8)}, (2, 4), (8, 16), [(1, 2, 16), (1, 2, 32)]
    rows = []
    for size, (case, N, T) in sizes.items():
        sampled = replace(case, prompts=N, K=1, T=T)
        fewer = replace(sampled, prompts=N // 8)                     # without a cache: the seconds of a token are the same
        rows += measure("EXO step", size, {who: (work, case) for who, work in EXO.items()}, settings)
        rows += measure("language-model step", size, {who: (work, case) for who, work in LANGUAGE_MODEL.items()}, settings)
        rows += measure("sampling", size, {who: (work, fewer if work is sampling_uncached else sampled)
                                           for who, work in SAMPLING.items()}, settings)
        write(rows, out / "bench.csv")
    rows = []
    for axis, cases in (("K", {f"K = {K}": replace(tiny, K=K) for K in Ks}),
                        ("tokens", {f"T = {T}": replace(tiny, T=T) for T in Ts}),
                        ("parameters", {f"{L} layers of {C}": replace(tiny, n_layer=L, n_head=H, n_embd=C) for L, H, C in shapes})):
        rows += measure("EXO step from rewards", axis, {name: (exo_rewards, case) for name, case in cases.items()}, settings[:1])
    write(rows, out / "scaling.csv")
    draw(rows, out / "scaling.png")
    print(f"\n{out}: bench.csv, scaling.csv, scaling.png")


if __name__ == "__main__":
    main()
