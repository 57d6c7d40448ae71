"""Completions of your prompts by pi_sft and by every aligned policy of a run, side by side.

    python sample.py runs/tiny --prompt "Last night I watched this film" --method exo dpo

With each completion y of a prompt x: its reward, and log pi(y|x) - log pi_sft(y|x) in nats under the policy
that wrote it.  All policies get the same uniform numbers, and sample at the run's temperature.
"""
import argparse
import shutil
import sys
import textwrap
from pathlib import Path

import torch

import stages
from checkpoint import finished
from compute import UserError, rng
from model import generate, sequence_logprob
from run import alignments, open_run

METHODS = ("exo", "dpo", "ppo", "xpo", "online-dpo")


def policies(folder, methods):
    """{name: folder of the weights}: pi_sft, and the finished alignments by these methods, or by all."""
    if not finished(folder / "sft"):
        raise UserError(f"{folder} has no finished sft, which everything starts from: run train.py first")
    aligned = alignments(folder)
    chosen = {"pi_sft": folder / "sft"}
    for one in aligned:
        if (not methods or one.method in methods) and one.still_has_weights():
            chosen[one.folder.name] = one.last
    for method in methods:
        if method not in [one.method for one in aligned]:
            there = ", ".join(one.folder.name for one in aligned) or "none"
            raise UserError(f"{folder} has no finished alignment by {method} (there: {there}): run train.py "
                            "for it first")
    return chosen


def reward(run):
    """What scores: --judge, else the oracle, else the reward model, else None.  -> its name, the function"""
    if run.cfg.judge:
        return f"--judge {run.cfg.judge}", stages.evaluator(run)
    if finished(run.folder / "oracle"):
        return "oracle", run.scorer(run.folder / "oracle")
    if finished(run.folder / "reward_model"):
        return "reward model", stages.reward_function(run, run.folder / "reward_model")
    return "none in this run", None


def encode(run, text, block_size, new_tokens):
    """A prompt -> its ids, and how many tokens may follow: new_tokens, else the run's if there is room."""
    ids = run.encoding.encode_ordinary(text)
    room = block_size - len(ids)
    if not text.strip():
        raise UserError("--prompt is empty: give the first words of a text")
    if room < (new_tokens or 1):
        raise UserError(f"a prompt of {len(ids):,} tokens with {new_tokens or 1:,} to follow does not fit "
                        f"into the context of {block_size:,}: shorten the prompt, or lower --new-tokens")
    return ids, new_tokens or min(run.cfg.new_tokens, room)


@torch.no_grad()
def complete(run, policy, ref, score, prompt, new_tokens, n, seed):
    """n completions of a prompt (ids) by a policy.  -> [(text, reward or None, log-ratio to ref in nats)]"""
    temperature = run.cfg.temperature
    generator = rng(seed, "sample", prompt)
    ids, mask = generate(policy, [prompt] * n, new_tokens, temperature, run.eos_id, generator)  # (n, T) x 2
    logp = sequence_logprob(policy, ids, mask, temperature)                     # (n,)
    ref_logp = sequence_logprob(ref, ids, mask, temperature)                    # (n,)
    texts = [one_line(run, row[response].tolist()) for row, response in zip(ids, mask)]
    rewards = score(ids, mask).tolist() if score else [None] * n
    return list(zip(texts, rewards, (logp - ref_logp).tolist()))


def one_line(run, ids):
    """Ids -> their text in one line, without control characters; an ellipsis where no end-of-text ends it."""
    text = run.encoding.decode([t for t in ids if t != run.eos_id])
    words = " ".join(text.split())
    shown = "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in words)
    return shown if ids[-1] == run.eos_id else shown + " …"


def main(argv=None):
    """python sample.py RUN --prompt "..."; the run is read whole before anything is printed."""
    parser = argparse.ArgumentParser(prog="sample.py", description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("run", type=Path, metavar="RUN", help="a run folder")
    parser.add_argument("--prompt", action="append", required=True, help="first words of a text; repeatable")
    parser.add_argument("--method", nargs="+", default=[], choices=METHODS, help="default: all of the run")
    parser.add_argument("--seed", type=int, default=0, help="of the samples")
    parser.add_argument("--n", type=int, default=2, help="samples a prompt")
    parser.add_argument("--new-tokens", type=int, help="longest completion; default: the run's")
    args = parser.parse_args(argv)
    try:
        if args.n < 1 or (args.new_tokens is not None and args.new_tokens < 1):
            raise UserError("--n and --new-tokens must be at least 1")
        run = open_run(args.run)
        folders = policies(args.run, args.method)
        ref = run.policy(folders["pi_sft"])
        prompts = [encode(run, text, ref.config.block_size, args.new_tokens) for text in args.prompt]
        scorer, score = reward(run)
        completions = {}                                # {(prompt's number, policy's name): a list}
        for name, folder in folders.items():            # one policy at a time beside pi_sft: memory
            policy = ref if name == "pi_sft" else run.policy(folder)
            for i, (prompt, length) in enumerate(prompts):
                completions[i, name] = complete(run, policy, ref, score, prompt, length, args.n, args.seed)
    except UserError as error:
        sys.exit(f"sample.py: {error}")
    sys.stdout.reconfigure(errors="replace")            # a model writes what a terminal may not have
    wide = max(map(len, folders))
    print(f"{'policy':{wide}}  reward   ratio   (reward: {scorer}; ratio: log pi(y|x) - log pi_sft(y|x), "
          f"nats; seed {args.seed})")
    for i, (prompt, _) in enumerate(prompts):
        for k in range(args.n):
            print(f"\n{one_line(run, prompt)} sample {k + 1}")
            for name in folders:
                text, value, ratio = completions[i, name][k]
                head = f"{name:{wide}} {'–' if value is None else format(value, '+.2f'):>7} {ratio:+7.2f}   "
                width = max(shutil.get_terminal_size().columns, len(head) + 20)
                below = " " * len(head)
                print(textwrap.fill(text or "(nothing)", width, initial_indent=head, subsequent_indent=below))


if __name__ == "__main__":
    main()
