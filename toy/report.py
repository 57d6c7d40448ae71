"""The tables and figures of the bandits: what `python -m toy.bandit` prints and draws, and what the notebooks show.

Every number over instances is "median [lowest, highest]"; every number over seeds is a mean with its 95% interval.
"""
import time
from pathlib import Path

import matplotlib
import matplotlib.pyplot as plt
import torch
from matplotlib.ticker import NullFormatter

from evaluate import COLORS
from toy import bandit as toy
from toy import xpo_bandit

METHODS = {"exo": "EXO-rw", "dpo": "DPO-rw"}
LIMITS = {"exo": "reverse KL", "dpo": "forward KL"}
MODES_SHOWN = (2, 32)                                                # the K of `mode_fits` that the figure shows
BETAS = (0.05, 0.03, 0.02, 0.0167)                                   # of the two-arm instance
RATIOS = (0.0, 1e-4, 1e-2, 0.1, 1.0)                                 # its alpha / beta
ROUNDS = 4000                                                        # how long online DPO is waited for
CONTROL = (0.0, 0.003, 0.1)                                           # alpha / beta where pi_sft covers the best arm


def band(values, form=".3f"):
    """median [lowest, highest] of what is given for each instance.  (B,) -> str"""
    return f"{values.quantile(0.5):{form}} [{values.min():{form}}, {values.max():{form}}]"


# ---- tables ------------------------------------------------------------------------------------------------------------------

def print_generalised_objective(bandit, settings=((0.5, 1.0), (0.5, 0.5), (0.1, 0.1), (1.0, 0.3))):
    print(f"Theorem 3.1 and Eq 11, {len(bandit.reward)} instances\n"
          f"{'beta_r':>7}{'beta_pi':>8}   {'TV to pi*, highest':20}{'Eq 11 error, highest':22}"
          "cosine of the gradients of J_gen and J_beta")
    for beta_r, beta_pi in settings:
        result = toy.generalised_objective(bandit, beta_r, beta_pi)
        print(f"{beta_r:7}{beta_pi:8}   {result['tv'].max():<20.0e}{result['eq11'].max():<22.0e}{band(result['cosine'])}")


def print_gradients(study, Ks=toy.KS):
    instances = study["exo"]["bias"].shape[1]
    for name, result in study.items():
        print(f"{METHODS[name]}, {instances} instances: the expected gradient from groups of K against its limit\n"
              f"{'K':>5}   {'bias x K':24}{'cosine to ' + LIMITS[name]:24}{'cosine to RL':24}sd of one group / |limit|")
        for i, K in enumerate(Ks):
            print(f"{K:5}   {band(result['bias'][i] * K):24}{band(result['cos_limit'][i]):24}{band(result['cos_rl'][i]):24}"
                  f"{band(result['sd'][i], '.2f')}")


def print_recovery(bandit, fits, beta=0.25):
    optimum = toy.log_optimum(bandit, beta)
    print(f"distance of the fitted full softmax to pi*_{beta}, {len(optimum)} instances of {optimum.shape[1]} arms\n"
          f"{'':24}{'total variation':30}{'KL(pi || pi*), nats':30}J(pi*) - J(pi), reward")
    for name, logp in fits.items():
        gap = toy.objective(bandit, optimum, beta) - toy.objective(bandit, logp, beta)
        columns = [band(values, ".1e") for values in (toy.tv(logp, optimum), toy.kl(logp, optimum), gap.clamp(min=0))]
        print(f"{name:24}{columns[0]:30}{columns[1]:30}{columns[2]}")


def print_modes(fits):
    print(f"the unimodal policy on two modes: what it puts where, and its local minima from 10 starts\n"
          f"{'':18}{'main mode':>10}{'minor':>8}{'elsewhere':>11}   loss of each minimum, nats")
    for name, (minima, losses) in fits.items():
        main, minor, elsewhere = toy.masses(minima[0])
        print(f"{name:18}{main:10.3f}{minor:8.3f}{elsewhere:11.3f}   {' '.join(f'{loss:.3f}' for loss in losses)}")


def print_ablation(result, values=(0.1, 0.2, 0.5, 1.0, 2.0)):
    instances = next(iter(result.values()))["lost"].shape[1]
    print(f"one of beta_r and beta_pi moves, the other stays at 0.5; means over {instances} instances\n"
          f"{'moves':9}{'to':>5}   {'full softmax: reward':>20}{'KL':>7}   {'unimodal: reward':>16}{'KL':>7}   "
          f"{'J_beta lost: mean':>17}   over instances")
    for series in ("beta_r", "beta_pi"):
        full, unimodal = result[series, "softmax"], result[series, "unimodal"]
        for i, value in enumerate(values):
            print(f"{series:9}{value:5}   {full['reward'][i].mean():20.3f}{full['kl'][i].mean():7.3f}   "
                  f"{unimodal['reward'][i].mean():16.3f}{unimodal['kl'][i].mean():7.3f}   "
                  f"{unimodal['lost'][i].mean():17.3f}   {band(unimodal['lost'][i])}")


def print_two_arms(results):
    print("the two arms of the lower bound (XPO's Prop 2.1), 256 seeds: rounds until the gap is below 1/8, median [10%, 90%]\n"
          f"(- : not within {ROUNDS}, or within 400 at alpha > 0), and the gap after 400 rounds, mean and 95% interval\n"
          f"{'beta':>7}{'1/pi_sft(a)':>13}{'alpha/beta':>12}   {'rounds':24}gap after 400")
    for (beta, ratio), (first, gap) in results.items():
        low, median, high = ("-" if q.isinf() else f"{q:.0f}" for q in first.sort().values[[25, 128, 230]])
        mean, half = xpo_bandit.mean_ci(gap)
        print(f"{beta:7}{torch.tensor(1 / (8 * beta)).exp():13.1f}{ratio:12}   {f'{median} [{low}, {high}]':24}"
              f"{mean:.3f} ± {half:.3f}")


def print_twelve_arms(result, ratios, reference_gap):
    seeds = result["gap"].shape[1]
    print(f"12 arms, {seeds} seeds, mean and 95% interval; pi_sft itself has gap {reference_gap:.3f}\n"
          f"{'alpha/beta':>10}   {'gap of the last policy':24}{'pi(best arm)':16}{'ended on it':14}ever drew it")
    for i, ratio in enumerate(ratios):
        gap, best = xpo_bandit.mean_ci(result["gap"][i]), xpo_bandit.mean_ci(result["best"][i])
        print(f"{ratio:10}   {f'{gap[0]:.3f} ± {gap[1]:.3f}':24}{f'{best[0]:.2f} ± {best[1]:.2f}':16}"
              f"{(result['best'][i] > 0.5).double().mean():<14.2f}{result['drew'][i].mean():.2f}")


# ---- figures -----------------------------------------------------------------------------------------------------------------

def new_figure(panels, height=3.5):
    figure, axes = plt.subplots(1, panels, figsize=(10, height), layout="constrained")
    figure.get_layout_engine().set(w_pad=0.12)
    for axis in axes:
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
    return figure, axes


def draw_modes(fits):
    """Figure 1 of the EXO paper, computed: exact KLs on the left, the losses from K samples on the right."""
    bandit, optimum = toy.two_modes()
    figure, (exact, sampled) = new_figure(2)
    density = 1 / (toy.GRID[1] - toy.GRID[0])                        # mass of an arm -> density
    for axis in (exact, sampled):
        axis.fill_between(toy.GRID, optimum[0].exp() * density, color=COLORS["limit"], alpha=0.15, lw=0,
                          label=r"target $\pi^*$")
        axis.plot(toy.GRID, bandit.ref_logp[0].exp() * density, color=COLORS["sft"], lw=1.2, ls=":", label=r"$\pi_{sft}$")
        axis.set(xlabel="place of the response (arms 0.1 apart)", ylabel="probability per unit of place", ylim=(0, 1.0))
    for name, method in (("reverse KL", "exo"), ("forward KL", "dpo")):
        minima, losses = fits[name]
        exact.plot(toy.GRID, minima[0][0].exp() * density, color=COLORS[method], lw=2, label=f"{name}, {losses[0]:.2f} nats")
    minima, losses = fits["reverse KL"]
    exact.plot(toy.GRID, minima[1][0].exp() * density, color=COLORS["exo"], lw=1.2, ls="--",
               label=f"reverse KL, second minimum, {losses[1]:.2f}")
    for K, style in zip(MODES_SHOWN, ("--", "-")):
        for method, name in METHODS.items():
            logp = fits[f"{name}, K = {K}"][0][0]
            sampled.plot(toy.GRID, logp[0].exp() * density, color=COLORS[method], lw=2, ls=style, label=f"{name}, K = {K}")
    exact.set_title("Exact KLs (solid: the lowest of 10 starts)", fontsize=10)
    sampled.set_title("Losses from K samples (the lowest of 10 starts)", fontsize=10)
    for axis in (exact, sampled):
        axis.legend(fontsize=8, frameon=False, ncols=2, loc="upper center")
    return figure


def draw_gradients(study, Ks=toy.KS):
    """Theorems 3.2 and 3.3 at finite K: bias, direction, spread; line = median, band = all instances."""
    figure, axes = new_figure(3)
    titles = "Bias against its own limit g", "Direction against RL", "Spread of one group"
    for axis, what, title in zip(axes, ("bias", "cos_rl", "sd"), titles):
        for method, name in METHODS.items():
            values = study[method][what]                             # (Ks, B)
            axis.fill_between(Ks, values.min(1).values, values.max(1).values, color=COLORS[method], alpha=0.2, lw=0)
            axis.plot(Ks, values.quantile(0.5, dim=1), color=COLORS[method], lw=2, marker="os"[method == "dpo"], ms=3,
                      label=name)
        axis.set_xscale("log", base=2)
        axis.set(xlabel="K, candidates a prompt", xticks=[2, 8, 32, 128, 512])
        axis.set_xticklabels(["2", "8", "32", "128", "512"])
        axis.set_title(title, fontsize=10)
    axes[0].plot(Ks, [1 / K for K in Ks], color=COLORS["limit"], lw=1, ls=":", label="1/K")
    axes[0].set(yscale="log", ylabel=r"|E $g_K$ - g| / |g|")
    axes[1].set(ylim=(0, 1.05), ylabel=r"cosine of E $g_K$ to the RL gradient")
    axes[2].set(yscale="log", ylabel="sd of one group's gradient / |g|")
    for axis in axes:
        axis.legend(fontsize=8, frameon=False)
    return figure


def draw_recovery(bandit, fits, beta=0.25):
    """A point a method, the median; a bar, all instances."""
    figure, axis = plt.subplots(figsize=(10, 4.6), layout="constrained")
    optimum = toy.log_optimum(bandit, beta)
    kinds = {"EXO": "exo", "exact reverse": "exo", "DPO": "dpo", "exact forward": "dpo", "XPO": "xpo",
             "policy": "ppo"}
    for row, (name, logp) in enumerate(reversed(fits.items())):
        distance = toy.tv(logp, optimum)
        kind = next(kind for start, kind in kinds.items() if name.startswith(start))
        kind = "online-dpo" if name.endswith("beta = 0") else kind
        axis.plot([distance.min(), distance.max()], [row, row], color=COLORS[kind], lw=4, alpha=0.35, solid_capstyle="butt")
        axis.plot(distance.quantile(0.5), row, "o", color=COLORS[kind])
    axis.axvline(1e-3, color=COLORS["limit"], lw=1, ls=":")
    axis.text(1.1e-3, len(fits) - 0.7, r"$10^{-3}$", fontsize=8)
    axis.set(xscale="log", yticks=range(len(fits)), yticklabels=list(reversed(fits)),
             xlabel=r"total variation to $\pi^*_\beta$ (point: median, bar: 24 instances; below $10^{-4}$: solver precision)")
    axis.tick_params(axis="y", labelsize=8)
    axis.grid(alpha=0.25, axis="x")
    axis.spines[["top", "right"]].set_visible(False)
    return figure


def draw_ablation(result, values=(0.1, 0.2, 0.5, 1.0, 2.0)):
    """Appendix D.1, exactly: what moving beta_r or beta_pi from 0.5 does to reward, and what it costs."""
    figure, (reward, lost) = new_figure(2)
    reward.plot(values, result["beta_r", "softmax"]["reward"].mean(1), color=COLORS["limit"], marker="o", ms=4,
                label="full softmax, either moves")
    lost.axhline(0, color=COLORS["limit"], lw=1, label="full softmax, either moves")
    for series, style, name in (("beta_r", "-", r"$\beta_r$"), ("beta_pi", "--", r"$\beta_\pi$")):
        rows = result[series, "unimodal"]
        for axis, what in ((reward, "reward"), (lost, "lost")):
            axis.plot(values, rows[what].mean(1), color=COLORS["exo"], ls=style, marker="s", ms=4,
                      label=f"unimodal, {name} moves")
    for axis in (reward, lost):
        axis.set(xscale="log", xlabel=r"value of $\beta_r$ or $\beta_\pi$ (the other is 0.5)", xticks=values)
        axis.set_xticklabels([f"{value:g}" for value in values])
        axis.xaxis.set_minor_formatter(NullFormatter())
        axis.legend(fontsize=8, frameon=False)
    reward.set(ylabel="expected reward, mean of 24 instances")
    lost.set(ylabel=r"$J_\beta$ lost to the best of its family, reward")
    return figure


def draw_two_arms(results):
    """Proposition 2.1: how long the best arm is missed, and whether it is kept."""
    figure, (rounds, kept) = new_figure(2)
    inverse = [float(torch.tensor(1 / (8 * beta)).exp()) for beta in BETAS]                      # 1 / pi_sft(a)
    shades = dict(zip(RATIOS, (1, 0.35, 0.55, 0.75, 1)))
    for ratio, marker in zip(RATIOS, "osD^v"):
        color = COLORS["xpo" if ratio else "online-dpo"]
        label = rf"XPO, $\alpha/\beta$ = {ratio:g}" if ratio else r"online DPO, $\alpha$ = 0"
        first = torch.stack([results[beta, ratio][0] for beta in BETAS]).sort(1).values          # (betas, seeds)
        if ratio in (0.0, 1.0):
            rounds.fill_between(inverse, first[:, 25], first[:, 230].clamp(max=ROUNDS), color=color, alpha=0.2, lw=0)
            rounds.plot(inverse, first[:, 128], color=color, marker=marker,
                        label=r"XPO, each of the $\alpha$ > 0" if ratio else label + f" (band: 10% to 90%, cut at {ROUNDS})")
        mean, half = xpo_bandit.mean_ci(torch.stack([results[beta, ratio][1] for beta in BETAS]))
        kept.errorbar(inverse, mean, half, color=color, alpha=shades[ratio], marker=marker, ms=4, capsize=2, label=label)
    rounds.plot(inverse, [x / 2 for x in inverse], color=COLORS["limit"], lw=1, ls=":", label=r"1 / (2 $\pi_{sft}$(a))")
    rounds.set(xscale="log", yscale="log", xlabel=r"1 / $\pi_{sft}$(best arm)", ylabel="rounds (one pair each) to a gap < 1/8")
    kept.set(xscale="log", xlabel=r"1 / $\pi_{sft}$(best arm)", ylabel=r"J($\pi^*$) - J($\pi$) after 400 rounds, reward")
    for axis in (rounds, kept):
        axis.legend(fontsize=8, frameon=False)
    return figure


def draw_twelve_arms(rare, control, rare_gap, control_gap):
    """The gap after 12 rounds against alpha / beta: where pi_sft misses the best arm, and where it covers it."""
    figure, axes = new_figure(2)
    rows = (rare, xpo_bandit.ALPHA_OVER_BETA, rare_gap, "0.00034"), (control, CONTROL, control_gap, "0.011 (the control)")
    for axis, (result, ratios, reference, prob) in zip(axes, rows):
        mean, half = xpo_bandit.mean_ci(result["gap"])
        for i, ratio in enumerate(ratios):
            axis.errorbar(i, mean[i], half[i], fmt="o" if ratio else "s", capsize=3,
                          color=COLORS["xpo" if ratio else "online-dpo"],
                          label=[r"online DPO, $\alpha$ = 0", "XPO"][i] if i < 2 else None)
        axis.axhline(reference, color=COLORS["sft"], lw=1, ls=":", label=r"$\pi_{sft}$")
        axis.set(xlabel=r"$\alpha/\beta$, units of reward", ylabel=r"J($\pi^*$) - J($\pi$) after 12 rounds, reward",
                 ylim=(-0.1, 1.9), xticks=range(len(ratios)))
        axis.set_xticklabels([f"{ratio:g}" for ratio in ratios])
        axis.set_title(r"$\pi_{sft}$(best arm) = " + prob, fontsize=10)
    axes[0].legend(fontsize=8, frameon=False)
    return figure


# ---- all of it ---------------------------------------------------------------------------------------------------------------

def two_arm_results():
    """Every beta and alpha of the lower bound; online DPO is waited for for longer than the 400 rounds that the gap is of."""
    results = {}
    for beta in BETAS:
        for ratio in RATIOS:
            first, gap = xpo_bandit.two_arms(beta, ratio * beta)
            if ratio == 0:
                first, _ = xpo_bandit.two_arms(beta, 0.0, rounds=ROUNDS)
            results[beta, ratio] = first, gap
    return results


def reference_gap(bandit, beta=0.15):
    return (toy.objective(bandit, toy.log_optimum(bandit, beta), beta) - toy.objective(bandit, bandit.ref_logp, beta)).item()


def main(folder=Path(__file__).parent / "figures"):
    matplotlib.use("Agg")
    torch.set_num_threads(1)                                         # on tensors this small, threads wait for one another
    folder.mkdir(exist_ok=True)
    start = time.time()

    def save(figure, name):
        figure.savefig(folder / f"{name}.png", dpi=150)
        plt.close(figure)
        print(f"    toy/figures/{name}.png, {time.time() - start:.0f} s\n")

    print_generalised_objective(toy.random_bandits())
    print()
    print_gradients(study := toy.gradient_study(toy.random_bandits()))
    save(draw_gradients(study), "gradients_against_K")
    small = toy.random_bandits(V=6)
    print_recovery(small, fits := toy.recover(small))
    save(draw_recovery(small, fits), "what_recovers_the_optimum")
    print_modes(fits := toy.mode_fits())
    save(draw_modes(fits), "reverse_vs_forward_kl")
    print_ablation(result := toy.ablation(toy.smooth_bandits()))
    save(draw_ablation(result), "beta_ablation")
    print_two_arms(results := two_arm_results())
    save(draw_two_arms(results), "xpo_two_arms")
    rare, control = xpo_bandit.twelve_arms(), xpo_bandit.twelve_arms(rare=0.011)
    print_twelve_arms(found := xpo_bandit.explore(rare), xpo_bandit.ALPHA_OVER_BETA, reference_gap(rare))
    print("\nthe control, where pi_sft covers the best arm:")
    print_twelve_arms(covered := xpo_bandit.explore(control, CONTROL), CONTROL, reference_gap(control))
    save(draw_twelve_arms(found, covered, reference_gap(rare), reference_gap(control)), "xpo_twelve_arms")
