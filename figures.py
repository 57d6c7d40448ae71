"""Figures and tables of a run folder, with one look for all: python evaluate.py RUN draws them again.

frontier: reward against KL (paper, Figure 2), with the limit and best-of-n.  accuracy: the same with accuracy (Figure 7).  curves:
reward on the way, with its standard deviation within prompts (Figure 8).  density: pi / pi_sft against log pi_sft (Figures 3, 9).
Each has a csv beside it; table.csv holds the last checkpoints, the share of the limit and the win rates (Tables 1, 2).
"""
import argparse
import csv
import sys
from pathlib import Path
from types import SimpleNamespace

import matplotlib
import numpy as np
import torch

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402  the backend must be chosen first

import evaluate  # noqa: E402
import stages  # noqa: E402
from checkpoint import rng  # noqa: E402
from evaluate import COLORS, read_csv  # noqa: E402
from files import UserError, atomic, read_json, read_tensors  # noqa: E402
from model import respond, sequence_logprob  # noqa: E402
from parallel import rank  # noqa: E402

SHARES = (0.5, 1, 2, 4)                                              # nats at which the share of the limit is told


def alignments(folder, unfinished=False):
    """The finished alignments of a run: {name without its seed: [(folder, rows of eval.csv), one a seed]}."""
    found = {}
    for path in sorted(folder.glob("*-s*/eval.csv")):
        if unfinished or "done" in read_json(path.parent / "stage.json"):
            found.setdefault(path.parent.name.rsplit("-s", 1)[0], []).append((path.parent, read_csv(path)))
    return found


def label(name):
    for short, long in (("online-dpo-preferences", "online DPO"), ("xpo-preferences", "XPO"), ("ppo-reward", "PPO"),
                        ("exo", "EXO"), ("dpo", "DPO"), ("-preferences", "-pref"), ("-reward", "-rw"),
                        ("-k", " K="), ("-beta", " β"), ("-alpha", " α"), ("-lr", " lr ")):
        name = name.replace(short, long)
    return name


def style(name):
    """One colour a method, broken lines for pairs, one marker a K."""
    marker = {"k2": "v", "k4": "o", "k8": "^"}.get(next((p for p in name.split("-") if p in ("k2", "k4", "k8")), ""), "s")
    return {"color": next(COLORS[m] for m in COLORS if name.startswith(m)), "ls": "--" if "preferences" in name else "-",
            "marker": marker, "ms": 4, "lw": 1.3}


def final_samples(path):
    return read_tensors(path / read_json(path / "stage.json")["done"]["final"] / "samples.safetensors")[0]


def draw(run):
    """Draws everything that the run holds, and prints its table."""
    found = alignments(run.folder)
    prompts = "held-out prompts" if run.own else "test prompts" if run.cfg.eval_split == "test" else "training prompts"
    limits = sorted(run.folder.glob("limit-*/rewards.safetensors"), key=lambda p: p.stat().st_size)
    if not found or not limits:
        raise UserError(f"{run.folder} holds no finished alignment yet: run train.py first")
    rewards = read_tensors(limits[-1])[0]["reward"].numpy()                                 # (P, M)
    curve = evaluate.limit_curve(rewards)
    frontier(run.folder, found, rewards, curve, reward_axis(run), prompts)
    if not run.own:                                                  # accuracy is the oracle's probability
        accuracy(run.folder, found, prompts)
    curves(run.folder, found, reward_axis(run))
    density(run, found)
    table(run, found, rewards, curve)


def reward_axis(run):
    return "reward model's reward" if run.own else "oracle reward, log-odds of positive"


def progress(run):
    """curves.png while a run goes on, with the alignment under way."""
    if rank() == 0:
        curves(run.folder, alignments(run.folder, unfinished=True), reward_axis(run))


# ---- figures ---------------------------------------------------------------------------------------------------------------

def canvas(title, xlabel, ylabel):
    figure, axes = plt.subplots(figsize=(7, 4.6), layout="constrained")
    axes.set(title=title, xlabel=xlabel, ylabel=ylabel)
    axes.grid(alpha=0.25)
    return figure, axes


def save(figure, path, rows):
    figure.axes[0].legend(fontsize=8)
    with atomic(path) as file:
        figure.savefig(file, dpi=160, format="png")
    plt.close(figure)
    write_csv(path.with_suffix(".csv"), rows)


def write_csv(path, rows):
    with atomic(path, "w") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def plot(axes, name, runs, x, y):
    """A method's checkpoints: the mean over seeds, and a band from the lowest to the highest."""
    runs = [one for one in runs if len(one[1]) == len(runs[0][1])]   # seeds with as many checkpoints as the first
    xs, ys = (np.array([[row[k] for row in rows] for _, rows in runs]) for k in (x, y))     # (seeds, checkpoints)
    axes.plot(xs.mean(0), ys.mean(0), label=label(name) + (f", {len(runs)} seeds" if len(runs) > 1 else ""), **style(name))
    if len(runs) > 1:
        axes.fill_between(xs.mean(0), ys.min(0), ys.max(0), color=style(name)["color"], alpha=0.15, lw=0)


KL_AXIS = "KL$(\\pi \\,\\|\\, \\pi_{sft})$, nats a sequence"


def frontier(folder, found, rewards, curve, judge, prompts):
    """Figure 2: every method's checkpoints, the limit where it is supported, best-of-n.  rewards: (P, M) of pi_sft"""
    figure, axes = canvas(f"{folder.name}: reward against KL, {prompts}", KL_AXIS, judge)
    on = curve["supported"]
    limit = f"the limit: $\\pi^*_\\beta$ over $\\beta$ (on {len(rewards)} of the prompts)"
    axes.plot(curve["kl"][on], curve["reward"][on], color=COLORS["limit"], lw=1.6, label=limit)
    best = [(2 ** i, *evaluate.best_of_n(rewards, 2 ** i)) for i in range(7) if 2 ** i <= rewards.shape[1]]
    axes.plot(*np.array(best)[:, 1:].T, color=COLORS["best-of-n"], marker=".", ls=":", label="best of n, 1 to 64 (KL: upper bound)")
    lines = [{"curve": "limit", "seed": "", "kl": k, "reward": r, "beta_or_n_or_step": b}
             for b, k, r, s in zip(*(curve[c] for c in ("beta", "kl", "reward", "supported"))) if s]
    lines += [{"curve": "best-of-n", "seed": "", "kl": k, "reward": r, "beta_or_n_or_step": n} for n, k, r in best]
    for name, runs in found.items():
        plot(axes, name, runs, "kl", "reward")
        lines += [{"curve": name, "seed": path.name.rsplit("-s", 1)[1], "kl": row["kl"], "reward": row["reward"],
                   "beta_or_n_or_step": row["step"]} for path, rows in runs for row in rows]
    furthest = max(row["kl"] for runs in found.values() for _, rows in runs for row in rows)
    axes.set_xlim(-0.02 * furthest, max(1.1 * furthest, 0.1))
    save(figure, folder / "frontier.png", lines)


def accuracy(folder, found, prompts):
    figure, axes = canvas(f"{folder.name}: accuracy against KL, {prompts}", KL_AXIS, "mean P(positive) by the oracle")
    for name, runs in found.items():
        plot(axes, name, runs, "kl", "accuracy")
    save(figure, folder / "accuracy.png", [{"run": path.name, "step": row["step"], "kl": row["kl"], "accuracy": row["accuracy"]}
                                           for runs in found.values() for path, rows in runs for row in rows])


def curves(folder, found, judge):
    """Figure 8: reward on the way for one seed of each method; the bars are the spread of a prompt's responses."""
    figure, axes = canvas(f"{folder.name}: reward on the way; bars: one standard deviation within prompts", "share of the training",
                          judge)
    lines = []
    for shift, (name, runs) in enumerate(found.items()):
        path, rows = runs[0]
        share = np.arange(1, len(rows)) / read_json(path / "stage.json")["settings"]["checkpoints"]
        spread = []
        for row in rows[1:]:
            samples = read_tensors(path / f"step-{int(row['step']):05d}" / "samples.safetensors")[0]
            spread.append(float(stages.within_prompt_sd(samples["reward"])))
            lines.append({"run": path.name, "step": row["step"], "reward": row["reward"], "within_prompt_sd": spread[-1]})
        axes.errorbar(share + 0.006 * shift, [row["reward"] for row in rows[1:]], yerr=spread, capsize=2,
                      elinewidth=0.7, label=label(name), **style(name))
    save(figure, folder / "curves.png", lines)


@torch.no_grad()
def density(run, found, beta=None):
    """Weights of M responses of pi_sft to one prompt under each final policy (h = log pi - log pi_sft) and under pi*_beta."""
    cfg, policy = run.cfg, run.policy(run.folder / "sft")
    M = min(2048, 2 * cfg.limit_responses)
    beta = beta or max(cfg.beta_pi * cfg.beta_r, 0.5)                # ours: at a smaller one a few responses carry all weight
    path = run.folder / "reference" / "samples.safetensors"
    first = read_tensors(path)[0]
    prompt = stages.prompts_of(first["ids"][0, :1], first["mask"][0, :1])[0]
    policies = {name: run.policy(runs[0][0] / read_json(runs[0][0] / "stage.json")["done"]["final"])
                for name, runs in found.items() if name.startswith(("exo", "dpo"))} | {"sft": policy}
    score = stages.judge(run, run.folder / ("reward_model" if run.own else "oracle"))

    def columns(ids, mask):
        return {"optimum": score(ids, mask) / beta} | {
            name: sequence_logprob(policy, ids, mask, cfg.temperature) for name, policy in policies.items()}    # (n,) each

    drawn = respond(policy, [prompt] * M, cfg.new_tokens, cfg.temperature, run.eos_id, rng("density"), cfg.sample_batch, columns)
    drawn = {name: drawn[name].double().numpy() for name in ("optimum", *policies)}         # (M,) each
    s = drawn.pop("sft")                                             # log pi_sft
    exponents = {name: x if name == "optimum" else x - s for name, x in drawn.items()}
    figure, axes = canvas(f"{run.folder.name}: density ratio to $\\pi_{{sft}}$, the first prompt of samples.md",
                          "$\\log \\pi_{sft}$ of a response, nats", "$\\pi / \\pi_{sft}$ (kernel estimate)")
    grid, lines = np.linspace(*np.percentile(s, [2, 98]), 100), []
    for name, exponent in exponents.items():
        weight = np.exp(exponent - np.logaddexp.reduce(exponent))                           # (M,)
        ratio, ess = evaluate.density_ratio(s, weight, grid), 1 / (weight ** 2).sum()
        look = {"color": COLORS["limit"], "lw": 1.6} if name == "optimum" else style(name) | {"markevery": 9}
        curve = f"$\\pi^*_\\beta$, β = {beta:g}" if name == "optimum" else label(name)
        axes.plot(grid, ratio, label=f"{curve} (effective samples {ess:.0f} of {M})", **look)
        lines += [{"curve": name, "log_ref": g, "ratio": r, "effective_samples": ess} for g, r in zip(grid, ratio)]
    axes.axhline(1, color=COLORS["sft"], lw=0.8)
    axes.set_yscale("log")
    save(figure, run.folder / "density.png", lines)


# ---- the table and the samples -----------------------------------------------------------------------------------------------

@torch.no_grad()
def win_rates(run, samples, before, score):
    """Against pi_sft's responses and against the data's own, by the oracle and by the reward model, as far as they are there."""
    rates = {"wins_sft": evaluate.win_rate(samples["reward"], before["reward"]),
             "wins_data": evaluate.win_rate(samples["reward"], before["data_reward"][:, None])}
    rates = {f"{name}_{'rm' if run.own else 'oracle'}": rate for name, rate in rates.items()}
    if score and not run.own:
        def scored(ids, mask):
            both = zip(ids.flatten(0, -2).split(256), mask.flatten(0, -2).split(256))
            return torch.cat([score(i.long().to(run.device), m.to(run.device)).cpu() for i, m in both]).view(ids.shape[:-1])
        ours, sft = scored(samples["ids"], samples["mask"]), scored(before["ids"], before["mask"])
        rates["wins_sft_rm"] = evaluate.win_rate(ours, sft)
        rates["wins_data_rm"] = evaluate.win_rate(ours, scored(before["data_ids"], before["data_mask"])[:, None])
    return rates


def table(run, found, rewards, curve):
    """Prints and writes a row a run: its last checkpoint, the share of the limit on the way, the gap to it, the win rates."""
    lines, P = [], len(rewards)
    before = read_tensors(run.folder / "reference" / "samples.safetensors")[0]
    trained = run.folder / "reward_model"
    score = stages.reward_function(run, trained) if (trained / "report.json").exists() else None
    for path, rows in (one for runs in found.values() for one in runs):
        samples = final_samples(path)
        gap = evaluate.gap_to_limit(rewards, samples["reward"][:P].mean(1).numpy(), samples["kl"][:P].mean(1).numpy())
        line = {"run": path.name} | rows[-1] | {f"share_at_{k:g}": evaluate.share_of_limit(k, rows, curve) for k in SHARES}
        end = min(rows[-1]["kl"], curve["kl"][curve["supported"]].max(initial=0))
        line["share_at_end"] = evaluate.share_of_limit(end, rows, curve)
        line |= {k: gap[k] if gap and gap["supported"] else None for k in ("gap", "se", "bias", "beta")}
        lines.append(line | win_rates(run, samples, before, score))
    write_csv(run.folder / "table.csv", lines)
    start = next(iter(found.values()))[0][1][0]
    wins = "rm" if run.own else "oracle"
    print(f"\n{'':28} {'':13} {'':13} {'':6} {'':6} {'':7}  {'share of the limit at KL':28} {'gap to':>7} {f'wins, {wins}':>13}")
    print(f"{'':28} {'reward':>13} {'KL, nats':>13} {'length':>6} {'ended':>6} {'dist-2':>7}   0.5     1     2     4   end "
          f"{'limit':>8} {'π_sft':>6} {'data':>6}")
    print(f"{'pi_sft':28} {start['reward']:6.2f} ± {start['reward_se']:.2f} {0:6.2f} {'':6} {start['length']:6.1f} "
          f"{start['ended']:6.0%} {start['distinct2']:7.4f}")
    for line in lines:
        shares = "  ".join("   –" if v is None else f"{v:4.0%}" for k, v in line.items() if k.startswith("share"))
        gap = "beyond" if line["gap"] is None else f"{line['gap']:.2f}"
        print(f"{line['run']:28} {line['reward']:6.2f} ± {line['reward_se']:.2f} {line['kl']:6.2f} ± {line['kl_se']:.2f} "
              f"{line['length']:6.1f} {line['ended']:6.0%} {line['distinct2']:7.4f}  {shares} {gap:>8} "
              f"{line[f'wins_sft_{wins}']:6.0%} {line[f'wins_data_{wins}']:6.0%}")


def write_samples(run, folder, before, after, n=8):
    """samples.md: the same prompts continued by pi_sft and by the aligned policy, with their oracle rewards."""
    def text(found, i):
        ids = found["ids"][i, 0][found["mask"][i, 0]].tolist()
        return run.encoding.decode([t for t in ids if t != run.eos_id]).strip().replace("\n", " ")
    lines = [f"# {folder.name}: prompts continued by π_sft and by the aligned policy\n",
             f"In brackets the reward: {'the reward model’s' if run.own else 'the oracle’s log-odds of a positive review'}.\n"]
    for i in range(min(n, len(before["ids"]))):
        prompt = run.encoding.decode(stages.prompts_of(before["ids"][i, :1], before["mask"][i, :1])[0])
        lines += [f"**{prompt}** …\n", f"- π_sft ({float(before['reward'][i, 0]):+.2f}): {text(before, i)}",
                  f"- aligned ({float(after['reward'][i, 0]):+.2f}): {text(after, i)}\n"]
    with atomic(folder / "samples.md", "w") as file:
        file.write("\n".join(lines))


def open_run(folder):
    """The run that train.py left in `folder`, with its settings, on a CUDA device where there is one and the run may use it."""
    config = read_json(folder / "config.json") if (folder / "config.json").exists() else {}
    if "new_tokens" not in config:                                   # a model's folder has a config.json too
        raise UserError(f"{folder} is not a run folder: name one that train.py has made")
    older = {"tokenizer": "tiny" if config["data"] == "tiny" else "gpt2", "compile": False, "eval_split": "test"}
    cfg = SimpleNamespace(**older | config | {"run": str(folder)})
    device = torch.device("cuda" if torch.cuda.is_available() and cfg.device in ("auto", "cuda") else "cpu")
    return stages.Run(cfg, device, stages.arithmetic(device, cfg.matmul))


def main(argv=None):
    """python evaluate.py RUN"""
    parser = argparse.ArgumentParser(prog="evaluate.py", description="Draws the figures and prints the table of a run folder.")
    parser.add_argument("run", type=Path)
    folder = parser.parse_args(argv).run
    try:
        draw(open_run(folder))
    except UserError as error:
        sys.exit(f"evaluate.py: {error}")
