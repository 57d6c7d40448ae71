"""Figures and the table of a run folder, drawn again by:  python figures.py runs/tiny

frontier.png: reward against KL, the limit, best-of-n (paper, Figure 2); where that leaves alignments out,
frontier-all.png.  accuracy.png: Figure 7.  curves.png: reward on the way and its spread (Figure 8).
training.png: loss, margin, implicit rewards of each step.
density.png: pi / pi_sft against log pi_sft (Figures 3, 9).  table.csv: Tables 1, 2.  The numbers of a figure
are in a csv of its name.
"""
import argparse
import csv
import sys
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure

import evaluate
import stages
from checkpoint import atomic, finished, read_json, read_tensors
from compute import UserError, rank, rng
from model import respond, sequence_logprob
from run import alignments, open_run

# One colour a method in every figure (Okabe and Ito's palette: colour-blind readers can tell them apart).
COLORS = {"exo": "#0072B2", "dpo": "#D55E00", "ppo": "#009E73", "xpo": "#CC79A7", "online-dpo": "#E69F00",
          "best-of-n": "#56B4E9", "sft": "#7F7F7F", "limit": "#000000"}
NAMES = {"exo": "EXO", "dpo": "DPO", "ppo": "PPO", "xpo": "XPO", "online-dpo": "online DPO",
         "beta_pi": "βπ", "beta_r": "βr", "alpha": "α"}
MARKERS = {2: "v", 4: "o", 8: "^"}                      # of K
FILLS = ("full", "none", "left", "right", "top", "bottom")
KL_AXIS = "KL$(\\pi \\,\\|\\, \\pi_{sft})$, nats a sequence"


# ---- the lines of a figure ---------------------------------------------------------------------------------

class Group:
    """Alignments that differ in their seeds alone: one line.

    family: (method, feedback, K).  relatives: `about` of every group of this family.
    """

    def __init__(self, members, family, relatives):
        self.members, self.family = members, family
        about = members[0].about
        method, feedback, K, rounds = family
        self.label = NAMES[method]
        if method in ("exo", "dpo"):
            self.label += "-rw" if feedback == "reward" else "-pref"
        if K:
            self.label += f" K={K}"
        if rounds > 1:
            self.label += f", {rounds} rounds"
        for name, value in about.items():
            if name != "seed" and any(other.get(name) != value for other in relatives):
                self.label += f" {NAMES.get(name, name)}={value}"
        solid = "-." if rounds > 1 else "-"
        self.look = {"color": COLORS[method], "linestyle": "--" if feedback == "preferences" else solid,
                     "linewidth": 1.4, "marker": MARKERS.get(K, "s"), "markersize": 4.5,
                     "fillstyle": FILLS[relatives.index(about) % len(FILLS)]}
        self.seeds = []                                 # for each eval.csv's rows, and what figures' csv add
        for one in members:
            names = {"run": one.folder.name, "curve": self.label, "seed": one.about["seed"]}
            rows = []
            for row in one.rows:
                step = {"share": row["step"] / about["steps"], "beta_or_n_or_step": row["step"]}
                rows.append(names | row | step)
            self.seeds.append(rows)


def grouped(aligned):
    """A list of run.Aligned -> groups."""
    families = {}
    for one in aligned:
        about = one.about
        family = (one.method, about["feedback"], about["K"], about["rounds"])
        settings = frozenset(item for item in about.items() if item[0] != "seed")
        families.setdefault(family, {}).setdefault(settings, []).append(one)
    groups = []
    for family, by_settings in families.items():
        relatives = [members[0].about for members in by_settings.values()]
        groups += [Group(members, family, relatives) for members in by_settings.values()]
    return groups


def selected(groups, most=4):
    """The lines of a figure that has few: EXO, EXO in rounds, DPO, PPO, XPO, then others while there is room.

    Of a method: rewards before pairs, K = 4 before others, the group with most seeds, the usual settings.
    """
    def order(group):
        _, feedback, K, _ = group.family
        return feedback != "reward", K != 4, -len(group.members), len(group.members[0].folder.name)

    def kind(group):
        method, _, _, rounds = group.family
        return method, rounds > 1

    ordered = sorted(groups, key=order)
    first = {kind(group): group for group in reversed(ordered)}                 # the last to enter stays
    kinds = [("exo", False), ("exo", True)] + [(method, False) for method in NAMES if method != "exo"]
    chosen = [first[one] for one in kinds if one in first]
    chosen += [group for group in ordered if group not in chosen]
    return chosen[:most]


def rows_of(groups):
    return [row for group in groups for rows in group.seeds for row in rows]


# ---- figures -----------------------------------------------------------------------------------------------

def draw(run):
    """Draws everything that the run holds, writes its table and prints a part of it."""
    aligned = alignments(run.folder)
    limits = sorted(run.folder.glob("limit-*/rewards.safetensors"), key=lambda path: path.stat().st_size)
    if not aligned:
        raise UserError(f"{run.folder} holds no finished alignment yet: run train.py first")
    limit = {"reward": torch.zeros(1, 1)}               # --limit-responses 0: a limit that nothing supports
    if limits and run.cfg.limit_responses:
        limit = read_tensors(limits[-1])[0]
    limit = {name: column.numpy() for name, column in limit.items()}            # (P, M) each
    curve = evaluate.limit_curve(limit["reward"])
    groups = grouped(aligned)
    frontier(run, groups, limit, curve)
    if run.judged_by == "oracle":                       # accuracy is its probability
        accuracy(run, groups)
    curves(run, groups)
    density(run, selected([group for group in groups if group.family[0] in ("exo", "dpo")]))
    training(run, selected(groups))
    table(run, aligned, limit, curve)
    print(f"\nfigures: {run.folder}/frontier.png and others · samples: {aligned[-1].folder}/samples.md")


def progress(run):
    """Draws curves.png while a run goes on, with the alignment under way."""
    if rank() == 0:
        curves(run, grouped(alignments(run.folder, unfinished=True)))


JUDGES = {"judge": "judge", "rm": "reward model", "oracle": "oracle"}            # as `Run.judged_by` has them


def reward_axis(run):
    if run.judged_by == "oracle":
        return "oracle reward, log-odds of positive"
    return f"{JUDGES[run.judged_by]}'s reward"


def canvas(run, title, xlabel, *ylabels):
    """A figure with a panel for each ylabel.  -> figure, axes, ..."""
    figure = Figure(figsize=(3 + 4 * len(ylabels), 4.6), layout="constrained")
    prompts = "training prompts" if run.cfg.eval_split == "train" else "held-out prompts"
    figure.suptitle(f"{run.folder.name}: {title} {prompts}")
    panels = figure.subplots(1, len(ylabels), squeeze=False)[0]
    for axes, ylabel in zip(panels, ylabels):
        axes.set(xlabel=xlabel, ylabel=ylabel)
        axes.grid(alpha=0.25)
    return figure, *panels


def plot(axes, group, x, y):
    """Two columns of a group's rows: the mean over seeds, in a band from the lowest to the highest."""
    seeds = [rows for rows in group.seeds if len(rows) == len(group.seeds[0])]  # one under way has fewer
    xs = np.array([[row[x] for row in rows] for rows in seeds])                 # (seeds, checkpoints)
    ys = np.array([[row[y] for row in rows] for rows in seeds])                 # (seeds, checkpoints)
    text = group.label if len(seeds) == 1 else f"{group.label}, {len(seeds)} seeds"
    axes.plot(xs.mean(0), ys.mean(0), label=text, **group.look)
    axes.fill_between(xs.mean(0), ys.min(0), ys.max(0), color=group.look["color"], alpha=0.15, linewidth=0)


def save(figure, path):
    """Adds the legend, beside the panels where it would hide too much, and writes the picture."""
    handles, labels = figure.axes[0].get_legend_handles_labels()
    if len(figure.axes) == 1 and len(labels) <= 6:
        figure.axes[0].legend(fontsize=8, handlelength=3)
    else:
        figure.set_figwidth(figure.get_figwidth() + 2)
        figure.legend(handles, labels, loc="outside right center", fontsize=8, handlelength=3)
    with atomic(path) as file:
        figure.savefig(file, dpi=160, format="png")


def write_csv(path, columns, rows):
    with atomic(path, "w") as file:
        writer = csv.DictWriter(file, columns, extrasaction="ignore", lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def frontier(run, groups, limit, curve):
    """Figure 2: checkpoints, the limits where they are supported, best-of-n.

    limit: {reward, and where there is a reward model beside the judge model_reward: (P, M)} of pi_sft.
    """
    judge = JUDGES[run.judged_by]
    text = f"the limit: $\\pi^*_\\beta$ over $\\beta$ (on {len(limit['reward'])} of the prompts)"
    lines = [("limit", 1.8, "-", text, limit_rows("limit", curve))]
    if "model_reward" in limit:
        seen = evaluate.limit_curve(limit["model_reward"], judged=limit["reward"])
        text = f"$\\pi^*_\\beta$ of the reward model, judged by the {judge}"
        lines.append(("limit", 0.8, "-", text, limit_rows("model-limit", seen)))
    best = []
    for n in (1, 2, 4, 8, 16, 32, 64):
        if n <= limit["reward"].shape[1]:
            kl, reward = evaluate.best_of_n(limit["reward"], n)
            best.append({"curve": "best-of-n", "kl": kl, "reward": reward, "beta_or_n_or_step": n})
    lines.append(("best-of-n", 1.8, ".:", f"best of n by the {judge} (KL: upper bound)", best))
    lines = [line for line in lines if len(line[-1]) > 1]                       # without a limit: none
    columns = ("curve", "seed", "kl", "reward", "beta_or_n_or_step")
    drawn = [row for line in lines for row in line[-1]]
    write_csv(run.folder / "frontier.csv", columns, drawn + rows_of(groups))
    few = selected(groups)
    frontier_picture(run, run.folder / "frontier.png", few, lines)
    if len(few) < len(groups):
        frontier_picture(run, run.folder / "frontier-all.png", groups, lines)


def limit_rows(name, curve):
    points = zip(curve["beta"], curve["kl"], curve["reward"], curve["supported"])
    return [{"curve": name, "kl": kl, "reward": reward, "beta_or_n_or_step": beta}
            for beta, kl, reward, supported in points if supported]


def frontier_picture(run, path, groups, lines):
    """These groups, and lines of (colour's name, width, style, label, rows) as far as the groups go."""
    figure, axes = canvas(run, "reward against KL on", KL_AXIS, reward_axis(run))
    furthest = 1.1 * max(row["kl"] for row in rows_of(groups))
    for name, width, style, text, rows in lines:
        near = [row for row in rows if row["kl"] <= furthest]
        kl = [row["kl"] for row in near]
        reward = [row["reward"] for row in near]
        axes.plot(kl, reward, style, color=COLORS[name], label=text, linewidth=width)
    for group in groups:
        plot(axes, group, "kl", "reward")
    save(figure, path)


def accuracy(run, groups):
    """Figure 7: the mean of the oracle's P(positive) against KL."""
    figure, axes = canvas(run, "accuracy against KL on", KL_AXIS, "mean P(positive) by the oracle")
    for group in selected(groups):
        plot(axes, group, "kl", "accuracy")
    save(figure, run.folder / "accuracy.png")
    write_csv(run.folder / "accuracy.csv", ("run", "step", "kl", "accuracy"), rows_of(groups))


def curves(run, groups):
    """Figure 8: reward on the way, and a response's standard deviation around its prompt's mean."""
    figure, reward, spread = canvas(run, "reward during training, on", "share of the training",
                                    reward_axis(run), "standard deviation of a prompt's rewards")
    for group in groups:
        plot(reward, group, "share", "reward")
        plot(spread, group, "share", "within_prompt_sd")
    save(figure, run.folder / "curves.png")
    write_csv(run.folder / "curves.csv", ("run", "step", "reward", "within_prompt_sd"), rows_of(groups))


def training(run, groups):
    """What metrics.csv has of each step, of the first seed of a line; PPO has no margin."""
    figure, loss, margin, both = canvas(run, "", "step", "loss", "implicit reward: margin",
                                        "of the chosen; of the rejected, thin")
    figure.suptitle(f"{run.folder.name}: the batches of training")
    panels = {"loss": loss, "rewards_margin": margin, "rewards_chosen": both, "rewards_rejected": both}
    for group in groups:
        rows = evaluate.read_csv(group.members[0].folder / "metrics.csv")
        look = group.look | {"marker": ""}
        for name, axes in panels.items():
            if name in rows[0]:
                look["linewidth"] = 0.4 if name == "rewards_rejected" else 1
                values = [row[name] for row in rows]
                axes.plot([row["step"] for row in rows], values, label=group.label, **look)
    save(figure, run.folder / "training.png")


@torch.no_grad()
def density(run, groups):
    """Figures 3, 9: the weights of M responses of pi_sft to one prompt under the policies and pi*_beta."""
    cfg = run.cfg
    M = min(2048, 2 * cfg.limit_responses or 512)
    beta = max(cfg.beta_pi * cfg.beta_r, 0.5)           # ours: at a smaller one few responses weigh all
    samples = read_tensors(run.folder / "reference" / "samples.safetensors")[0]
    prompt = stages.prompts_of(samples["ids"][0, :1], samples["mask"][0, :1])[0]
    groups = [group for group in groups if group.members[0].still_has_weights()]
    policies = {group.label: run.policy(group.members[0].last) for group in groups}
    ref = policies["ref"] = run.policy(run.folder / "sft")
    score = stages.reward_function(run, run.folder / ("reward_model" if run.own else "oracle"))

    def measure(ids, mask):                             # (n,) each
        columns = {"optimum": score(ids, mask) / beta}
        for name, policy in policies.items():
            columns[name] = sequence_logprob(policy, ids, mask, cfg.temperature)
        return columns

    drawn = respond(ref, [prompt] * M, cfg.new_tokens, cfg.temperature, run.eos_id, rng("density"),
                    cfg.sample_batch, measure)                                  # (M,) each
    ref_logp = drawn["ref"].double().numpy()
    grid = np.linspace(*np.percentile(ref_logp, [2, 98]), 100)                  # (G,)
    looks = {"optimum": {"color": COLORS["limit"], "linewidth": 1.8}}
    looks |= {group.label: group.look | {"markevery": 9} for group in groups}
    figure, axes = canvas(run, "density ratio to $\\pi_{sft}$ on the first of the",
                          "$\\log \\pi_{sft}$ of a response, nats", "$\\pi / \\pi_{sft}$")
    rows = []
    for name, look in looks.items():
        exponent = drawn[name].double().numpy()         # log pi / pi_sft, up to a constant
        if name != "optimum":
            exponent = exponent - ref_logp
        weight = np.exp(exponent - np.logaddexp.reduce(exponent))               # (M,), sums to 1
        ess = 1 / (weight ** 2).sum()
        ratio = evaluate.density_ratio(ref_logp, weight, grid)                  # (G,)
        text = f"$\\pi^*_\\beta$, β = {beta:g}" if name == "optimum" else name
        axes.plot(grid, ratio, label=f"{text} (effective samples {ess:.0f} of {M})", **look)
        for at, value in zip(grid, ratio):
            rows.append({"curve": name, "log_ref": at, "ratio": value, "effective_samples": ess})
    axes.axhline(1, color=COLORS["sft"], linewidth=0.8)
    axes.set_yscale("log", base=2)
    axes.yaxis.set_major_formatter("{x:.3g}")
    low, high = axes.get_ylim()
    axes.set_ylim(min(low, 0.4), max(high, 2.5))        # three ticks at least
    save(figure, run.folder / "density.png")
    write_csv(run.folder / "density.csv", list(rows[0]), rows)


# ---- the table and the samples -----------------------------------------------------------------------------

@torch.no_grad()
def table(run, aligned, limit, curve):
    """A row an alignment: its last checkpoint, its gain in J, its distance to the limit, its win rates.

    objective_share: the gain in J = E r - beta KL over pi_sft's, beta the run's own, a share of pi*_beta's;
    model_share: of what pi*_beta of the reward model gains, for a method that sees that reward alone.
    kl_ratio: the KL spent over the KL that the limit needs for the same reward.
    """
    judge, trained = run.judged_by, run.folder / "reward_model"
    score = None
    if judge != "rm" and finished(trained):             # a second opinion
        score = stages.reward_function(run, trained)

    def rewards(samples, prefix=""):                    # by the judge and by the reward model
        by = {judge: samples[f"{prefix}reward"]}
        if score:
            by["rm"] = scored(run, score, samples[f"{prefix}ids"], samples[f"{prefix}mask"])
        return by

    before = read_tensors(run.folder / "reference" / "samples.safetensors")[0]
    sft, data = rewards(before), rewards(before, "data_")                       # (P, S) and (P,) each
    written_ended = ((before["data_ids"] == run.eos_id) & before["data_mask"]).any(1).float().mean()
    reach = curve["kl"][curve["supported"]].max(initial=0) if limit["reward"].size > 1 else np.inf
    n = len(limit["reward"])
    rows = []
    for one in aligned:
        row = {"run": one.folder.name} | one.rows[-1]
        samples = read_tensors(one.samples)[0]
        row |= gains(one, samples, before, limit, own_unit=judge == "judge")
        gain = row["reward"] - one.rows[0]["reward"]
        needed = evaluate.kl_needed(gain, curve) if gain > 2 * row["reward_se"] else None
        row["kl_ratio"] = row["kl"] / needed if needed else None
        for kl in (0.5, 1, 2):
            row[f"share_at_{kl:g}"] = evaluate.share_of_limit(kl, one.rows, curve)
        reward, kl = samples["reward"][:n].mean(1), samples["kl"][:n].mean(1)   # (n,), (n,)
        gap = evaluate.gap_to_limit(limit["reward"], reward.numpy(), kl.numpy())
        for name in ("gap", "se", "bias", "beta"):
            column = name if name == "gap" else f"gap_{name}"
            row[column] = gap[name] if gap and gap["supported"] else None
        for name, ours in rewards(samples).items():     # (P, S)
            row[f"wins_sft_{name}"] = evaluate.win_rate(ours, sft[name])
            row[f"wins_sft_{name}_same_length"] = evaluate.win_rate(
                ours, sft[name], samples["mask"].sum(2), before["mask"].sum(2))
            row[f"wins_data_{name}"] = evaluate.win_rate(ours, data[name][:, None])
        row["warnings"] = "; ".join(warnings(run, row, one.rows[0], float(written_ended), reach))
        rows.append(row)
    write_csv(run.folder / "table.csv", list(rows[0]), rows)
    print_table(rows, aligned[0].rows[0]["reward"], judge)


def warnings(run, row, start, written_ended, reach):
    """What a reader of an alignment's last row of eval.csv must know first, a sentence each.

    start: its row of step 0; written_ended: the share of the data's own responses that end before the cut;
    reach: the largest KL that the limit's samples support.
    """
    perplexity = read_json(run.folder / "sft" / "report.json")["test_perplexity"]
    words = run.encoding.n_vocab
    checks = [
        (perplexity > words / 10,
         f"pi_sft has learned little: its perplexity is {perplexity:,.0f} in a vocabulary of {words:,}"),
        (round(row["reward"], 2) < round(start["reward"], 2),
         f"the reward, {row['reward']:.2f}, is below pi_sft's, {start['reward']:.2f}"),
        (row["kl"] > reach,
         f"the KL, {row['kl']:.1f} nats, is beyond the {reach:.1f} that the limit's samples support"),
        (row["ended"] < written_ended / 2,
         f"only {row['ended']:.0%} of the responses end before the cut, of the data's {written_ended:.0%}")]
    return [sentence for holds, sentence in checks if holds]


def gains(one, samples, before, limit, own_unit):
    """The gain in J at the alignment's own beta, as shares of the optimum's.

    From Bradley-Terry pairs beta is beta_pi; argmax labels tell no beta, nor a judge with a unit of its own.
    """
    if own_unit or (one.about["feedback"] == "preferences" and one.about["labels"] == "argmax"):
        return dict.fromkeys(("own_beta", "objective_share", "objective_share_se", "model_share"))
    beta = one.about["beta_pi"]
    if one.about["feedback"] == "reward":
        beta *= one.about["beta_r"]
    ours = (beta, samples["reward"], samples["kl"], before["reward"], limit["reward"])
    share, se = evaluate.share_of_objective(*ours)
    model_share = None
    if one.about["feedback"] == "reward" and one.about["reward"] == "model" and "model_reward" in limit:
        model_share = evaluate.share_of_objective(*ours, limit["model_reward"])[0]
    return {"own_beta": beta, "objective_share": share, "objective_share_se": se, "model_share": model_share}


def print_table(rows, start, judge):
    """Prints a part of `table`'s rows, and their warnings.  start: pi_sft's reward; judge: `Run.judged_by`"""
    def cells(row, *names):
        return " ".join("    –" if row[name] is None else f"{row[name]:5.0%}" for name in names)

    own = "held_out_accuracy" in rows[0]
    wins = (f"wins_sft_{judge}", f"wins_sft_{judge}_same_length", f"wins_data_{judge}")
    head = f"{'':30} {'reward':>13} {'KL':>6} {'J':>5} {'±':>5} x KL {'.5':>5} {'1':>5} {'2':>5}"
    print(f"\npi_sft: reward {start:.2f}.  At the end: J, the gain in E r - beta KL as a share of pi*'s;\n"
          "x KL, the KL over what the limit needs; the share of the limit's reward at KL .5, 1, 2;\n"
          f"wins by the {JUDGES[judge]} over pi_sft, over its responses of the same length, over the data.")
    if own:
        print("margin: of the implicit reward on held-out rows, and acc, how often it is positive.")
    print(f"{head}  wins  same  data" + ("   acc margin" if own else ""))
    for row in rows:
        ratio = "   –" if row["kl_ratio"] is None else f"{row['kl_ratio']:4.1f}"
        print(f"{row['run']:30} {row['reward']:6.2f} ± {row['reward_se']:.2f} {row['kl']:6.2f} "
              f"{cells(row, 'objective_share', 'objective_share_se')} {ratio} "
              f"{cells(row, 'share_at_0.5', 'share_at_1', 'share_at_2')} "
              f"{cells(row, *wins)}"
              + (f" {row['held_out_accuracy']:5.0%} {row['held_out_margin']:6.2f}" if own else ""))
    told = {}
    for row in rows:
        for sentence in filter(None, row["warnings"].split("; ")):
            told.setdefault(sentence, []).append(row["run"])
    for sentence, runs in told.items():
        print(f"warning: {', '.join(runs)}: {sentence}")


def scored(run, score, ids, mask):
    """A reward function on rows that lie on the CPU, 256 at a time.  (..., T), (..., T) -> (...)"""
    parts = []
    for x, m in zip(ids.flatten(0, -2).split(256), mask.flatten(0, -2).split(256)):
        parts.append(score(x.long().to(run.device), m.to(run.device)).cpu())    # (256,)
    return torch.cat(parts).view(ids.shape[:-1])


def write_samples(run, folder, before, after, n=8):
    """samples.md: n prompts continued by pi_sft and by the aligned policy.  before, after: from `measure`"""
    def responses(samples):                             # the first to each prompt, with its reward
        written = stages.texts(run, samples["ids"][:n, 0], samples["mask"][:n, 0])
        rewards = samples["reward"][:n, 0].tolist()
        return [f"({reward:+.2f}): {' '.join(text.split())}" for reward, text in zip(rewards, written)]

    judge = f"the {JUDGES[run.judged_by]}’s"
    if run.judged_by == "oracle":
        judge += " log-odds of a positive review"
    lines = [f"# {folder.name}: prompts continued by π_sft and by the aligned policy\n",
             f"In brackets the reward: {judge}.\n"]
    prompts = stages.prompts_of(before["ids"][:n, 0], before["mask"][:n, 0])
    for prompt, ours, theirs in zip(prompts, responses(after), responses(before)):
        lines += [f"**{run.encoding.decode(prompt)}** …\n", f"- π_sft {theirs}", f"- aligned {ours}\n"]
    with atomic(folder / "samples.md", "w") as file:
        file.write("\n".join(lines))


def main(argv=None):
    parser = argparse.ArgumentParser(prog="figures.py", description="Draws a run's figures, prints results.")
    parser.add_argument("run", type=Path, metavar="RUN", help="a run folder")
    try:
        draw(open_run(parser.parse_args(argv).run))
    except UserError as error:
        sys.exit(f"figures.py: {error}")


if __name__ == "__main__":
    main()
