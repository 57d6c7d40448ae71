"""How the bandits' numbers are printed, and Figure 1 of the EXO paper drawn."""
import matplotlib.pyplot as plt

from figures import COLORS


def band(values):
    """median [lowest, highest] over instances.  (B,) -> str"""
    return f"{values.quantile(0.5):.3g} [{values.min():.3g}, {values.max():.3g}]"


def mean_ci(values):
    """Mean and half width of its 95% normal interval, over seeds.  (..., S) -> (...), (...)"""
    return values.mean(-1), 1.96 * values.std(-1) / values.shape[-1] ** 0.5


def print_bands(title, table):
    """table: {row: {column: (B,)}}."""
    lines = [["", *next(iter(table.values()))]]           # the header
    for name, row in table.items():
        lines.append([name, *map(band, row.values())])
    widths = [max(map(len, column)) for column in zip(*lines)]
    print(f"{title}; median [lowest, highest] of the instances")
    for line in lines:
        print("  ".join(map(str.ljust, line, widths)).rstrip())
    print(flush=True)


def draw_modes(grid, bandit, optimum, fits):
    """Figure 1 of the EXO paper: the policies of `mode_fits` on pi*.  (V,), Bandit, (1, V), fits -> figure"""
    panels = {"Exact KLs": ("reverse KL", "forward KL"),
              "Losses on K = 2 responses": ("EXO-rw, K = 2", "DPO-rw, K = 2"),
              "Losses on K = 32 responses": ("EXO-rw, K = 32", "DPO-rw, K = 32")}
    figure, axes = plt.subplots(1, 3, figsize=(11, 3.2), sharey=True, layout="constrained")
    for axis, (title, names) in zip(axes, panels.items()):
        axis.fill_between(grid, optimum[0].exp(), color=COLORS["limit"], alpha=0.15, lw=0, label=r"$\pi^*$")
        axis.plot(grid, bandit.ref_logp[0].exp(), color=COLORS["sft"], lw=1.2, ls=":", label=r"$\pi_{sft}$")
        for method, name in zip(("exo", "dpo"), names):
            minima, _ = fits[name]
            axis.plot(grid, minima[0][0].exp(), color=COLORS[method], lw=2, label=name)
        axis.set(title=title, xlabel="place of the arm")
        axis.legend(fontsize=8, frameon=False, loc="upper right")
    axes[0].set_ylabel("probability of the arm")
    return figure
