"""Figures and table of a run folder:  python figures.py runs/tiny

frontier.png: reward against KL, the limit, best-of-n (paper, Figure 2).  accuracy.png: Figure 7.  curves.png:
reward on the way and its spread (Figure 8).  density.png: pi / pi_sft against log pi_sft (Figures 3, 9).
table.csv: Tables 1, 2.
"""
import argparse
import math
import os
import re
import sys
from pathlib import Path

import numpy as np
import torch

if "ipykernel" not in sys.modules:                        # a notebook's backend may be missing outside of it
    os.environ.pop("MPLBACKEND", None)
from matplotlib.figure import Figure                      # noqa: E402

import evaluate
import stages
from loop import UserError, atomic, read_csv, read_json, read_tensors, rng, write_csv
from model import sequence_logprob

# One color per method (Okabe and Ito's palette: color-blind readers can tell them apart).
COLORS = {"exo": "#0072B2", "dpo": "#D55E00", "ppo": "#009E73", "xpo": "#CC79A7", "online-dpo": "#E69F00",
          "best-of-n": "#56B4E9", "sft": "#7F7F7F", "limit": "#000000"}
LIMITS = {"the limit": {"color": COLORS["limit"]},
          "the reward model's limit": {"color": COLORS["limit"], "linewidth": 0.7},
          "best of n": {"color": COLORS["best-of-n"], "linestyle": ":", "marker": "."},
          "best of n by the reward model": {"color": COLORS["best-of-n"], "linestyle": ":", "marker": "x"}}
KL_AXIS = "KL$(\\pi \\,\\|\\, \\pi_{sft})$, nats per response"


def look(name):
    """How a line is drawn: color for the method, style for what it learns from."""
    method = name.split("-")[0]
    style = "--"                                          # pairs
    if "rounds" in name:
        style = "-."
    elif "-rw" in name or method == "ppo":
        style = "-"                                       # rewards
    return {"color": COLORS[method], "linestyle": style, "linewidth": 1.4, "marker": "o", "markersize": 4}


def plot(axes, groups, x, y, gain=False):
    """Two columns of eval.csv for each group: the mean over seeds, in a band from lowest to highest.

    gain: what y has gained over pi_sft's, the first row.
    """
    for name, folders in groups.items():
        seeds = [read_csv(folder / "eval.csv") for folder in folders]
        xs = np.array([[row[x] for row in rows] for rows in seeds])             # (seeds, n)
        ys = np.array([[row[y] for row in rows] for rows in seeds])             # (seeds, n)
        if gain:
            ys = ys - ys[:, :1]
        style = look(name)
        axes.plot(xs.mean(0), ys.mean(0), label=name, **style)
        axes.fill_between(xs.mean(0), ys.min(0), ys.max(0), color=style["color"], alpha=0.15, linewidth=0)


def canvas(run, title, xlabel, *ylabels):
    """A figure with a panel for each ylabel.  -> figure, axes, ..."""
    figure = Figure(figsize=(3 + 4 * len(ylabels), 4.6), layout="constrained")
    figure.suptitle(f"{run.folder.name}: {title}", parse_math=False)            # a $ in a name is a $
    panels = figure.subplots(1, len(ylabels), squeeze=False)[0]
    for axes, ylabel in zip(panels, ylabels):
        axes.set(xlabel=xlabel, ylabel=ylabel)
        axes.grid(alpha=0.25)
    return figure, *panels


def save(figure, path):
    lines, names = figure.axes[0].get_legend_handles_labels()
    for text in figure.legend(lines, names, loc="outside right center", fontsize=8).get_texts():
        text.set_parse_math(False)
    with atomic(path) as file:
        figure.savefig(file, dpi=160, format="png")


def draw(run):
    """Draws everything that the run holds, writes its table and prints it."""
    groups = stages.alignments(run)
    if not groups:
        raise UserError(f"{run.folder} holds no finished alignment yet: run train.py first")
    sampled = {name: reward.numpy() for name, reward in stages.limit(run).items()}        # (P, M) each
    title = "higher is better, further right costs more KL"
    figure, axes = canvas(run, title, KL_AXIS, "gain in reward over $\\pi_{sft}$")        # Figure 2
    frontier(axes, groups, sampled, run.folder / "frontier.csv")
    save(figure, run.folder / "frontier.png")

    figure, axes = canvas(run, "accuracy against KL", KL_AXIS, "mean P(positive)")        # Figure 7
    plot(axes, groups, "kl", "accuracy")
    save(figure, run.folder / "accuracy.png")

    figure, reward, spread = canvas(run, "on the way", "step", "reward",                  # Figure 8
                                    "standard deviation of a prompt's rewards")
    plot(reward, groups, "step", "reward")
    plot(spread, groups, "step", "within_prompt_sd")
    save(figure, run.folder / "curves.png")
    density(run, groups)
    table(run, groups, sampled)


def frontier(axes, groups, sampled, path):
    """Figure 2: reward against KL.  All lines begin at (0, 0): pi_sft.  sampled: of `stages.limit`

    With a reward model, only its best of n is plotted, as in the paper; the csv has both.
    """
    reward = sampled["reward"]                                                  # (P, M)
    lines = {"the limit": evaluate.limit_curve(reward), "best of n": best_of(reward)}
    if "model_reward" in sampled:
        lines["the reward model's limit"] = evaluate.limit_curve(sampled["model_reward"], judged=reward)
        lines["best of n by the reward model"] = best_of(sampled["model_reward"], judged=reward)
    rows = []
    for name, curve in lines.items():
        gain = curve["reward"] - reward.mean()
        if name != "best of n" or "model_reward" not in sampled:
            axes.plot(curve["kl"], gain, label=name, **LIMITS[name])
        rows += [{"line": name, "kl": kl, "gain": y} for kl, y in zip(curve["kl"], gain)]
    write_csv(path, rows)
    plot(axes, groups, "kl", "reward", gain=True)


def best_of(reward, judged=None):
    """Best of 1, 2, 4, ...: (P, M) -> {kl, an upper bound; reward: (n,)}"""
    ns = [n for n in (1, 2, 4, 8, 16, 32, 64) if n <= reward.shape[1]]
    points = [evaluate.best_of_n(reward, n, judged) for n in ns]
    return {"kl": np.array(points)[:, 0], "reward": np.array(points)[:, 1]}


@torch.no_grad()
def density(run, groups):
    """Figures 3, 9: the weights of M responses of pi_sft to one prompt under the policies and pi*_beta."""
    cfg, M = run.cfg, run.cfg.limit_responses
    beta = max(cfg.beta_pi * cfg.beta_r, 0.5)           # ours: below it a few responses hold the weight
    policies = {name: run.gpt(folders[0]) for name, folders in groups.items()}
    ref = run.gpt(run.folder / "sft")
    score = stages.judge(run)

    def measure(ids, mask):                             # (n,) each
        measured = {"optimum": score(ids, mask) / beta}
        for name, policy in ({"ref": ref} | policies).items():
            measured[name] = sequence_logprob(policy, ids, mask, cfg.temperature)
        return measured

    drawn = stages.sample_responses(run, ref, run.prompts("evaluated", 1), M, rng("density"), measure)
    drawn = {name: column[0].double().numpy() for name, column in drawn.items()}        # (M,) each
    grid = np.linspace(*np.percentile(drawn["ref"], [2, 98]), 100)              # (G,)
    figure, axes = canvas(run, "density ratio on one prompt", "$\\log \\pi_{sft}$ of a response, nats",
                          "$\\pi / \\pi_{sft}$")
    for name in (["optimum"] if cfg.judge_is_reward else []) + list(groups):
        if name == "optimum":
            log_weight, style = drawn[name], {"color": COLORS["limit"]}
        else:
            log_weight, style = drawn[name] - drawn["ref"], look(name) | {"marker": ""}
        weight = np.exp(log_weight - np.logaddexp.reduce(log_weight))           # (M,), sums to 1
        label = f"{name} ({1 / (weight ** 2).sum():.0f} effective samples)"
        axes.plot(grid, evaluate.density_ratio(drawn["ref"], weight, grid), label=label, **style)
    axes.axhline(1, color=COLORS["sft"], linewidth=0.8)
    axes.set_yscale("log", base=2)
    save(figure, run.folder / "density.png")


def table(run, groups, sampled):
    """A row per alignment, printed and in table.csv: its last evaluation, its gain in J, its win rates."""
    before, rows = read_tensors(stages.reference(run) / "samples.safetensors"), []
    limit_reward, model_reward = sampled["reward"], sampled.get("model_reward")             # (P, M) each
    curve = evaluate.limit_curve(limit_reward)
    for folder in sum(groups.values(), []):
        settings = read_json(folder / "stage.json")["settings"]
        samples = read_tensors(folder / "samples.safetensors")
        first, *_, last = read_csv(folder / "eval.csv")
        beta = settings["beta_pi"] * settings.get("beta_r", 1)                  # pairs: beta_pi alone
        measured = beta, samples["reward"], samples["kl"], before["reward"]
        share, se, model_share = math.nan, math.nan, math.nan
        if run.cfg.judge_is_reward:
            share, se = evaluate.share_of_objective(*measured, limit_reward)
        if model_reward is not None and settings.get("reward") == "model":
            model_share, _ = evaluate.share_of_objective(*measured, model_reward, judged=limit_reward)
        gained = last["reward"] - first["reward"] + limit_reward.mean()         # on the limit's own prompts
        needed = evaluate.kl_needed(curve, gained)
        rows.append({"run": folder.name} | last | {
            "own_beta": beta, "objective_share": share, "objective_share_se": se, "model_share": model_share,
            "kl_ratio": last["kl"] / needed if needed > 0.01 else math.nan,
            "wins_sft": evaluate.win_rate(samples["reward"], before["reward"]),
            "wins_data": evaluate.win_rate(samples["reward"], before["data_reward"][:, None])})
    write_csv(run.folder / "table.csv", rows)
    print(f"\npi_sft: reward {first['reward']:.2f}.  After alignment (–: cannot be measured here):\n"
          f"{'':28} {'reward':>13} {'KL':>6}  share of J*  KL/limit's  wins: pi_sft  data")
    for row in rows:
        line = (f"{row['run']:28} {row['reward']:6.2f} ± {row['reward_se']:.2f} {row['kl']:6.2f} "
                f"{row['objective_share']:6.0%} ± {row['objective_share_se']:3.0%} {row['kl_ratio']:10.1f} "
                f"{row['wins_sft']:14.0%} {row['wins_data']:6.0%}")
        print(re.sub(r"\bnan\b%?", "–", line))


def write_samples(run, folder, before, after, n=8):
    """samples.md: n prompts continued by both policies.  before, after: of `stages.evaluation`"""
    columns = []
    for samples in (before, after):
        texts = stages.texts(run, samples["ids"][:n, 0], samples["mask"][:n, 0])
        columns.append(list(zip(samples["reward"][:n, 0].tolist(), texts)))
    lines = [f"# {folder.name}: prompts continued by π_sft and by the aligned policy, (reward)\n"]
    for prompt, *both in zip(run.prompts("evaluated", n), *columns):
        lines.append(f"**{run.encoding.decode(prompt)}** …\n")
        for who, (reward, text) in zip(("π_sft", "aligned"), both):
            lines.append(f"- {who} ({reward:+.2f}): {' '.join(text.split())}")
        lines.append("")
    with atomic(folder / "samples.md", "w") as file:
        file.write("\n".join(lines))


def main(argv=None):
    parser = argparse.ArgumentParser(prog="figures.py", description=__doc__.split("\n")[0])
    parser.add_argument("run", type=Path, metavar="RUN", help="a run folder")
    try:
        draw(stages.open_run(parser.parse_args(argv).run))
    except (UserError, OSError) as error:
        sys.exit(f"figures.py: {error}")


if __name__ == "__main__":
    main()
