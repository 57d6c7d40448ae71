"""Completions of your prompts by pi_sft and by every aligned policy of a run, side by side.

    python sample.py runs/tiny --prompt "Last night I watched this film" --method exo dpo

With each completion y of a prompt x: its reward, and log pi(y|x) - log pi_sft(y|x) in nats under the policy that wrote it.  For a
sample all policies read the same uniform numbers, at the run's temperature, which is part of the policies.
"""
import argparse
import shutil
import sys
import textwrap
from pathlib import Path

import torch

import figures
import stages
from checkpoint import rng
from files import UserError, read_json
from model import generate, sequence_logprob

METHODS = ("exo", "dpo", "ppo", "xpo", "online-dpo")                 # how the names of alignments begin


def finished(folder):
    return (folder / "stage.json").exists() and "done" in read_json(folder / "stage.json")


def policies(folder, methods):
    """{name: folder of the weights}: pi_sft, then the last checkpoint of each finished alignment whose name starts as asked."""
    if not finished(folder / "sft"):
        raise UserError(f"{folder} has no finished sft, which everything starts from: run train.py first")
    aligned = [path for seeds in figures.alignments(folder).values() for path, _ in seeds]
    for method in methods:
        if not method.startswith(METHODS):
            raise UserError(f"--method {method} is unknown: name {', '.join(METHODS[:-1])} or {METHODS[-1]}")
        if not any(path.name.startswith(method) for path in aligned):
            there = ", ".join(path.name for path in aligned) or "none"
            raise UserError(f"{folder} has no finished alignment by {method} (there: {there}): run train.py for it first")
    chosen = [path for path in aligned if not methods or path.name.startswith(tuple(methods))]
    return {"pi_sft": folder / "sft"} | {path.name: path / read_json(path / "stage.json")["done"]["final"] for path in chosen}


def reward(run):
    """What the run calls reward -> its name, a function (ids, mask) -> (N,): the oracle, else the reward model, else None."""
    if finished(run.folder / "oracle"):
        return "oracle", run.scorer(run.folder / "oracle")
    if finished(run.folder / "reward_model"):
        return "reward model", stages.reward_function(run, run.folder / "reward_model")
    return "none in this run", None


def encode(run, text, block_size, new_tokens):
    """A prompt -> its ids, and how many tokens may follow: new_tokens, or the run's own number as far as the context has room."""
    ids = run.encoding.encode_ordinary(text)
    if not text.strip():
        raise UserError("--prompt is empty: give the first words of a text")
    if len(ids) + (new_tokens or 1) > block_size:
        raise UserError(f"a prompt of {len(ids):,} tokens with {new_tokens or 1:,} to follow does not fit into the model's context "
                        f"of {block_size:,}: shorten the prompt{', or lower --new-tokens' if new_tokens else ''}")
    return ids, new_tokens or min(run.cfg.new_tokens, block_size - len(ids))


@torch.no_grad()
def complete(run, policy, ref, score, prompt, new_tokens, n, seed):
    """n completions of a prompt (ids) by a policy.  -> [(text, reward or None, log-ratio to ref in nats)]"""
    temperature = run.cfg.temperature
    ids, mask = generate(policy, [prompt] * n, new_tokens, temperature, run.eos_id, rng(seed, "sample", prompt))    # (n, T) x 2
    ratio = sequence_logprob(policy, ids, mask, temperature) - sequence_logprob(ref, ids, mask, temperature)        # (n,)
    rewards = score(ids, mask).tolist() if score else [None] * n
    texts = [one_line(run, row[kept].tolist()) for row, kept in zip(ids, mask)]
    return list(zip(texts, rewards, ratio.tolist()))


def one_line(run, ids):
    """Ids -> their text in one line, without control characters; where no end-of-text ends it, an ellipsis does."""
    text = " ".join(run.encoding.decode([t for t in ids if t != run.eos_id]).split())
    return "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in text) + " …" * (ids[-1] != run.eos_id)


def main(argv=None):
    """python sample.py RUN --prompt "..."; the run is read whole before anything is printed."""
    parser = argparse.ArgumentParser(prog="sample.py", description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("run", type=Path, metavar="RUN", help="a run folder")
    parser.add_argument("--prompt", action="append", required=True, help="the first words of a text; may be given several times")
    parser.add_argument("--method", nargs="+", default=[], help="alignments whose name starts so: exo, dpo, ...; default: all")
    parser.add_argument("--seed", type=int, default=0, help="of the samples")
    parser.add_argument("--n", type=int, default=2, help="samples a prompt")
    parser.add_argument("--new-tokens", type=int, help="longest completion; default: the run's, as far as the context has room")
    args = parser.parse_args(argv)
    try:
        if args.n < 1 or (args.new_tokens is not None and args.new_tokens < 1):
            raise UserError("--n and --new-tokens must be at least 1")
        run = figures.open_run(args.run)
        folders = policies(args.run, args.method)
        ref = run.policy(folders["pi_sft"])
        prompts = [encode(run, text, ref.config.block_size, args.new_tokens) for text in args.prompt]
        called, score = reward(run)
        found = {}                                                   # {(prompt, policy): its completions}
        for name, folder in folders.items():                         # one policy at a time beside pi_sft: memory
            policy = ref if name == "pi_sft" else run.policy(folder)
            for i, (prompt, new_tokens) in enumerate(prompts):
                found[i, name] = complete(run, policy, ref, score, prompt, new_tokens, args.n, args.seed)
    except UserError as error:
        sys.exit(f"sample.py: {error}")
    wide = max(map(len, folders))
    sys.stdout.reconfigure(errors="replace")                         # a model writes what a terminal may not have
    print(f"{'policy':{wide}}  reward   ratio   (reward: {called}; ratio: log pi(y|x) - log pi_sft(y|x), nats; seed {args.seed})")
    for i, (prompt, _) in enumerate(prompts):
        for k in range(args.n):
            print(f"\n{one_line(run, prompt)} sample {k + 1}")
            for name in folders:
                text, r, h = found[i, name][k]
                head = f"{name:{wide}} {'–' if r is None else f'{r:+.2f}':>7} {h:+7.2f}   "
                width = max(shutil.get_terminal_size().columns, len(head) + 20)
                print(textwrap.fill(text or "(nothing)", width, initial_indent=head, subsequent_indent=" " * len(head)))


if __name__ == "__main__":
    main()
