"""Alignments compared over pipelines, each a run folder:  python results/compare.py results/tiny/p*

Everything is a gain over pi_sft's.  J = E r - beta KL is in percent of what pi*_beta gains.  "At equal KL"
is reward where each path first reaches the smaller final KL, in percent of the limit's.
seen: the 95% t interval excludes 0, and the exact sign-flip test with Holm's correction rejects.
the opposite: the same with the other sign.  equal: the 90% t interval lies within 5 points of 0.  undecided:
neither; the number says about how many more pipelines would decide, if mean and spread stay as they are.
A runaway ends at more than 1.5 times pi*_beta's KL.
"""
import csv
import itertools
import math
import sys
from pathlib import Path

import numpy as np

CLAIMS = {                                                # named before the runs
    "EXO above DPO, from pairs": ("exo", "dpo"),
    "EXO above DPO, from pairs, at DPO's temperature": ("exo-e119", "dpo"),
    "EXO above DPO, from rewards": ("exo-rw-k4", "dpo-rw-k4"),
    "rewards above pairs, by EXO": ("exo-rw-k4", "exo"),
    "Adam's epsilon, EXO from pairs": ("exo", "exo-adam8"),
    "Adam's epsilon, EXO from rewards": ("exo-rw-k4", "exo-rw-k4-adam8"),
    "Adam's epsilon, DPO from rewards": ("dpo-rw-k4", "dpo-rw-k4-adam8"),
    "rounds above offline EXO": ("exo-rw-k4-rounds8", "exo-rw-k4"),
    "rounds above PPO, as many responses": ("exo-rw-k4-rounds40", "ppo"),
    "XPO above online DPO": ("xpo", "xpo-online")}
T90 = {2: 6.314, 3: 2.920, 4: 2.353, 5: 2.132, 6: 2.015, 7: 1.943, 8: 1.895, 9: 1.860, 10: 1.833}
T95 = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571, 7: 2.447, 8: 2.365, 9: 2.306, 10: 2.262}


def read(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def pipeline(folder):
    """A run folder -> {alignment: its path and the limit, (n, 2) of KL and gain; what it has at the end}"""
    lines, paths, found = {}, {}, {}
    table = read(folder / "table.csv")
    beta = float(table[0]["own_beta"])                    # the same in all rows
    for row in read(folder / "frontier.csv"):
        lines.setdefault(row["line"], []).append((float(row["kl"]), float(row["gain"])))
    for row in table:
        steps = read(folder / row["run"] / "eval.csv")
        path = np.array([(float(step["kl"]), float(step["reward"])) for step in steps])
        path[:, 1] -= path[0, 1]
        paths[row["run"].rpartition("-s")[0]] = path, float(row.get("faulty", "nan"))
    for line in ("best of n", "best of n by the reward model"):
        for i in (1, 2, 3, 4):
            paths[line.replace("n", str(2 ** i), 1)] = np.array(lines[line][:i + 1]), np.nan
    limit = np.array(lines["the limit"])
    for name, (path, faulty) in paths.items():
        J, best_J = (points[:, 1] - beta * points[:, 0] for points in (path, limit))
        runaway = path[-1, 0] > 1.5 * limit[best_J.argmax(), 0]
        found[name] = {"path": path, "limit": limit, "J": J[-1] / best_J.max(), "runaway": runaway,
                       "KL": path[-1, 0], "reward": path[-1, 1], "faulty": faulty}
    return found


def at_equal_kl(a, b):
    """The difference of two gains in reward at the smaller of the last KLs, as a share of the limit's."""
    kl, gains = min(a["KL"], b["KL"]), []
    for path in (a["path"], b["path"]):
        beyond = int(np.argmax(path[:, 0] >= kl))
        gains.append(np.interp(kl, *path[beyond - 1:beyond + 1].T))
    return (gains[0] - gains[1]) / np.interp(kl, *a["limit"].T)


def half_width(x, t=T95):
    return t[len(x)] * np.std(x, ddof=1) / len(x) ** 0.5 if len(x) > 1 else np.nan


def sign_flip_p(x):
    """The exact two-sided p of a mean of 0, over all 2^n signs."""
    signs = np.array(list(itertools.product((-1, 1), repeat=len(x))))            # (2^n, n)
    return np.mean(np.abs(signs @ x) >= abs(np.sum(x)) - 1e-12)


def more_pipelines(x, claims):
    """About how many more pipelines would decide a claim of (n,) differences, one of `claims` claims.

    Two standard errors must reach from the mean to 0 or to 5 points, and 2^n signs be enough for Holm.
    """
    mean = abs(np.mean(x))
    enough = (2 * np.std(x, ddof=1) / max(mean, 0.05 - mean)) ** 2
    return math.ceil(max(enough, math.log2(2 * claims / 0.05), len(x) + 1)) - len(x)


def verdicts(differences):
    """{claim: (n,)} -> {claim: its row's cells}"""
    rows, holds = {}, True
    for i, claim in enumerate(sorted(differences, key=lambda claim: sign_flip_p(differences[claim]))):
        x = differences[claim]
        holds = holds and sign_flip_p(x) * (len(differences) - i) <= 0.05
        word = f"undecided, {more_pipelines(x, len(differences))} more"
        if abs(np.mean(x)) + half_width(x, T90) <= 0.05:
            word = "equal"
        if holds and abs(np.mean(x)) > half_width(x):
            word = "seen" if np.mean(x) > 0 else "the opposite"
        rows[claim] = f"{100 * np.mean(x):+.0f} ± {100 * half_width(x):.0f} | {word}"
    return rows


def main(folders):
    """Prints the alignments' table and the claims' table, in Markdown."""
    pipelines = [pipeline(Path(folder)) for folder in folders]
    print("| | pipelines | gain in J | median | runaways | reward | KL, nats | faulty |\n" + "|---" * 8 + "|")
    for name in dict.fromkeys(name for each in pipelines for name in each):
        ends = [each[name] for each in pipelines if name in each]
        J = np.array([end["J"] for end in ends])
        runaways, reward, kl, faulty = (np.mean([end[key] for end in ends])
                                        for key in ("runaway", "reward", "KL", "faulty"))
        row = (f"| {name} | {len(J)} | {J.mean():.0%} ± {half_width(J):.0%} | {np.median(J):.0%} | "
               f"{runaways:.0%} | {reward:+.2f} | {kl:.2f} | {faulty:.1%} |")
        print(row.replace("nan%", "–"))
    in_J, at_kl = {}, {}
    for claim, (ours, theirs) in CLAIMS.items():
        both = [(each[ours], each[theirs]) for each in pipelines if ours in each and theirs in each]
        if len(both) > 1:
            in_J[claim] = np.array([a["J"] - b["J"] for a, b in both])
            at_kl[claim] = np.array([at_equal_kl(a, b) for a, b in both])
    print("\n| claim | in J, points | | at equal KL, points | |\n" + "|---" * 5 + "|")
    rows, rows_at_kl = verdicts(in_J), verdicts(at_kl)
    for claim in in_J:
        print(f"| {claim} | {rows[claim]} | {rows_at_kl[claim]} |")


if __name__ == "__main__":
    main(sys.argv[1:])
