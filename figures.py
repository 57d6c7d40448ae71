"""Figures and tables of a run folder, with one look for all."""
import csv
from pathlib import Path

import matplotlib
import numpy as np

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402  the backend must be chosen first

from checkpoint import read_json, read_tensors  # noqa: E402
from evaluate import COLORS, best_of_n, gap_to_limit, limit_curve, read_csv, share_of_limit  # noqa: E402


def alignments(folder):
    """The finished alignments of a run: {name without its seed: [(folder, rows of eval.csv), one a seed]}."""
    found = {}
    for path in sorted(folder.glob("*-s*/eval.csv")):
        if (path.parent / "stage.json").exists() and "done" in read_json(path.parent / "stage.json"):
            found.setdefault(path.parent.name.rsplit("-s", 1)[0], []).append((path.parent, read_csv(path)))
    return found


def label(name):
    for short, long in (("exo", "EXO"), ("dpo", "DPO"), ("-preferences", "-pref"), ("-reward", "-rw"), ("-k", " K=")):
        name = name.replace(short, long)
    return name


def draw(folder):
    """Draws everything that the run holds, and prints its table."""
    folder = Path(folder)
    rewards = read_tensors(max(folder.glob("limit-*/rewards.safetensors"), key=lambda p: p.stat().st_size))[0]["reward"].numpy()
    found, curve = alignments(folder), limit_curve(rewards)
    frontier(folder, found, rewards, curve)
    table(folder, found, rewards, curve)


def frontier(folder, found, rewards, curve):
    """Figure 2: oracle reward against KL, every method's checkpoints, the limit, best-of-n."""
    figure, axes = plt.subplots(figsize=(7, 4.6), layout="constrained")
    on = curve["supported"]
    axes.plot(curve["kl"][on], curve["reward"][on], color=COLORS["limit"], lw=1.5, label="limit: $\\pi^*_\\beta$ over $\\beta$")
    n = [2 ** i for i in range(7)]
    points = np.array([best_of_n(rewards, k) for k in n])
    axes.plot(*points.T, color=COLORS["best-of-n"], marker=".", ls=":", label="best of n, n = 1 to 64 (KL: upper bound)")
    for name, runs in found.items():
        style = "--" if "preferences" in name else "-"
        for i, (_, rows) in enumerate(runs):
            axes.plot([r["kl"] for r in rows], [r["reward"] for r in rows], color=COLORS[name.split("-")[0]], ls=style, marker="o",
                      ms=4, lw=1.2, label=label(name) if i == 0 else None)
    axes.set(xlabel="KL$(\\pi \\,\\|\\, \\pi_{sft})$, nats a sequence", ylabel="oracle reward, log-odds of positive",
             title=f"{folder.name}: reward against KL on test prompts")
    axes.set_xlim(left=-0.1)
    axes.grid(alpha=0.25)
    axes.legend(fontsize=8, loc="lower right")
    figure.savefig(folder / "frontier.png", dpi=160)
    plt.close(figure)


def table(folder, found, rewards, curve):
    """Prints and writes a row a method: its last checkpoint, and its share of the limit at KL = 0.5, 1, 2, 4 nats."""
    lines = []
    for runs in found.values():
        for path, rows in runs:
            last = rows[-1]
            samples = read_tensors(path / read_json(path / "stage.json")["done"]["final"] / "samples.safetensors")[0]
            P = len(rewards)
            gap = gap_to_limit(rewards, samples["reward"][:P].mean(1).numpy(), samples["kl"][:P].mean(1).numpy())
            line = {"run": path.name} | {k: v for k, v in last.items() if k not in ("step", "kl_k1")}
            line |= {f"share_at_{k:g}": share_of_limit(k, rows, curve) for k in (0.5, 1, 2, 4)}
            lines.append(line | {"gap": gap["gap"] if gap and gap["supported"] else None})
    if not lines:
        return
    start = next(iter(found.values()))[0][1][0]
    print(f"\n{'':28} {'':13} {'':13} {'':6} {'':6} {'':7}  {'share of the limit at KL':26} {'gap to it':>9}")
    print(f"{'':28} {'reward':>13} {'KL, nats':>13} {'length':>6} {'ended':>6} {'dist-2':>7}   0.5     1     2     4")
    print(f"{'pi_sft':28} {start['reward']:6.2f} ± {start['reward_se']:.2f} {'0':>6} {'':6} {start['length']:6.1f} "
          f"{start['ended']:6.0%} {start['distinct2']:7.4f}")
    for line in lines:
        shares = "  ".join("   –" if v is None else f"{v:4.0%}" for k, v in line.items() if k.startswith("share"))
        gap = "  beyond" if line["gap"] is None else f"{line['gap']:9.2f}"
        print(f"{line['run']:28} {line['reward']:6.2f} ± {line['reward_se']:.2f} {line['kl']:6.2f} ± {line['kl_se']:.2f} "
              f"{line['length']:6.1f} {line['ended']:6.0%} {line['distinct2']:7.4f}  {shares:26} {gap:>9}")
    with open(folder / "table.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, lines[0])
        writer.writeheader()
        writer.writerows(lines)


def write_samples(run, folder, before, after, n=8):
    """samples.md: the same test prompts continued by pi_sft and by the aligned policy, with their oracle rewards."""
    def text(found, i):
        ids = found["ids"][i, 0][found["mask"][i, 0]].tolist()
        return run.encoding.decode([t for t in ids if t != run.eos_id]).strip().replace("\n", " ")
    lines = [f"# {folder.name}: test prompts continued by π_sft and by the aligned policy\n",
             "In brackets the reward: the oracle's log-odds of a positive review.\n"]
    for i in range(min(n, len(before["ids"]))):
        lines += [f"**{run.encoding.decode(run.prompts('test', i + 1)[i])}** …\n",
                  f"- π_sft ({float(before['reward'][i, 0]):+.2f}): {text(before, i)}",
                  f"- aligned ({float(after['reward'][i, 0]):+.2f}): {text(after, i)}\n"]
    (folder / "samples.md").write_text("\n".join(lines), encoding="utf-8")
