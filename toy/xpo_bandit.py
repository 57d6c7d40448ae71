"""What XPO's bonus buys: two bandits whose best arm the reference hardly ever draws, and a control where it often does.

A policy of the class is pi_r, proportional to pi_sft exp(r / beta), with a reward r in the box [0, R_max]; labels are drawn
from Bradley-Terry.  Algorithm 1 (see `xpo.py`) asks for the argmin over the *whole* history, and here it is really solved: on a
grid where one number describes the policy, by projected Adam from several starts where twelve do.  alpha = 0 is online DPO.
"""
import torch

from toy.bandit import Bandit, log_optimum, objective, per_row
from xpo import Replay, xpo_loss

SCAN = 25                                                            # steps of `argmin` from each of its V + 1 extra starts
ALPHA_OVER_BETA = (0.0, 0.001, 0.003, 0.01, 0.03, 0.1)               # in units of reward


def mean_ci(values):
    """Mean and half width of its 95% normal interval.  (..., S) -> (...), (...)"""
    return values.mean(-1), 1.96 * values.std(-1) / values.shape[-1] ** 0.5


def two_arms(beta, alpha, rounds=400, seeds=256):
    """Proposition 2.1's instance: r(a) = 1, r(b) = 1/2, pi_sft(a) = exp(-1 / (8 beta)); one pair a round.

    The policies are a grid over d = r(a) - r(b) in [-1, 1].  A pair is one of 8 kinds (who won, who lost, which was the
    reference's), so the history is 8 counts, and counts @ (xpo_loss of every kind at every d) is the whole objective.
    -> rounds to a gap below 1/8 (seeds,), inf where never; the gap J(pi*) - J(pi) after the last round (seeds,)
    """
    gen = torch.Generator().manual_seed(0)
    ref = torch.tensor([-1 / (8 * beta), 0.0], dtype=torch.float64)                              # arm 0 is a, arm 1 is b
    ref_logp = torch.stack([ref[0], torch.log1p(-ref[0].exp())])                                 # (2,)
    bandit = Bandit(ref_logp[None], torch.tensor([[1.0, 0.5]], dtype=torch.float64))
    d = torch.linspace(-1, 1, 401, dtype=torch.float64)                                          # (D,)
    logp = (ref_logp + torch.stack([d, -d], 1) / (2 * beta)).log_softmax(-1)                     # (D, 2)
    gap = objective(bandit, log_optimum(bandit, beta), beta) - objective(bandit, logp, beta)     # (D,)

    kinds = torch.cartesian_prod(*[torch.arange(2)] * 3)                                       # (8, 3) chosen, rejected, column
    pair_logp, pair_ref = logp[:, kinds[:, :2]], ref_logp[kinds[:, :2]].expand(len(d), 8, 2)     # (D, 8, 2)
    explore = pair_logp.gather(-1, kinds[:, 2:].expand(len(d), 8, 1))                            # (D, 8, 1)
    loss = per_row(xpo_loss, pair_logp.flatten(0, 1), pair_ref.flatten(0, 1), explore.flatten(), beta=beta, alpha=alpha)
    loss = loss.view(len(d), 8).T                                                                # (8, D)

    counts, at = torch.zeros(seeds, 8, dtype=torch.float64), torch.full((seeds,), len(d) // 2)   # at d = 0: pi_1 = pi_sft
    first = torch.full((seeds,), torch.inf)
    for t in range(1, rounds + 1):
        draw = torch.rand(3, seeds, generator=gen, dtype=torch.float64)
        arm, ref_arm = (draw[0] > logp[at, 0].exp()).long(), (draw[1] > ref[0].exp()).long()
        wins = draw[2] < (bandit.reward[0, arm] - bandit.reward[0, ref_arm]).sigmoid()
        chosen, rejected = torch.where(wins, arm, ref_arm), torch.where(wins, ref_arm, arm)
        counts[torch.arange(seeds), 4 * chosen + 2 * rejected + wins] += 1                       # column 1 is y~ where y won
        at = (counts @ loss + 1e-9 * d.abs()).argmin(1)                                          # ties: the smallest change
        first = torch.where((gap[at] < 1 / 8) & first.isinf(), t, first)
    return first, gap[at]


def twelve_arms(rare=3.4e-4):
    """Two common arms (r = 1.5, 1.2) and ten of probability `rare` under pi_sft, one of which, arm 2, is the best (r = 3)."""
    probs = torch.tensor([0.5 - 5 * rare] * 2 + [rare] * 10, dtype=torch.float64)
    return Bandit(probs.log()[None], torch.tensor([[1.5, 1.2, 3.0] + [0.0] * 9], dtype=torch.float64))


def argmin(history, start, ref_logp, beta, alpha, R_max, steps=80):
    """The reward in [0, R_max]^V that minimises XPO's objective on each run's history, for S runs at once.

    history: what `merge` returns; start: (S, V), the rewards of the round before; alpha: (S,).
    DPO's loss is convex in r, and the bonus is linear in r less alpha log Z, where log Z is close to the highest
    log pi_sft + r / beta: for each arm that may be that highest one there is a minimum.  So Adam, its learning rate falling
    to 0, starts from the round before and, for a shorter search, from each arm at R_max and all others at 0, and from all
    unseen arms at R_max; the lowest end is polished.  Where ends tie, the first is kept: the smallest change of the policy.
    -> (S, V), its loss in nats a pair (S,)
    """
    run, V = history["run"], start.shape[1]
    arms = torch.stack([history["chosen"], history["rejected"]], 1)                              # (N, 2)
    rows, pair_ref = run[:, None] * V + arms, ref_logp[arms]                                     # (N, 2)

    def losses(r):
        """(S, V) -> (N,).  alpha differs from run to run, so that it is put into explore_logp."""
        logp = (ref_logp + r / beta).log_softmax(-1).flatten()                                   # (S * V,)
        pair_logp = logp.index_select(0, rows.flatten()).view(-1, 2)                             # (N, 2)
        explore = (history["explored"] * pair_logp).sum(-1)                                      # (N,)
        return history["weight"] * per_row(xpo_loss, pair_logp, pair_ref, alpha[run] * explore, beta=beta, alpha=1.0)

    def descend(r, steps, lr):
        r = r.clone().requires_grad_()
        adam = torch.optim.Adam([r], lr=lr)
        for step in range(steps):
            adam.param_groups[0]["lr"] = lr * (1 - step / steps)
            adam.zero_grad()
            losses(r).sum().backward()
            adam.step()
            r.data.clamp_(0, R_max)                                                            # the box: R_max bounds the bonus
        return r.detach(), torch.zeros_like(alpha).index_add(0, run, losses(r.detach()))         # (S, V), (S,)

    best, lowest = descend(start, steps, lr=0.06)
    if alpha.max() > 0:                                                                          # else it is convex
        unseen = torch.ones(start.numel()).index_fill(0, rows.flatten(), 0).view_as(start)       # (S, V) 1 where no pair has it
        for init in (torch.where(unseen > 0, R_max, start), *(R_max * torch.eye(V)[:, None].expand(V, *start.shape))):
            r, loss = descend(init, SCAN, lr=0.2)
            lower = loss < lowest - 1e-3
            best, lowest = torch.where(lower[:, None], r, best), torch.where(lower, loss, lowest)
        best, lowest = descend(best, steps, lr=0.06)
    return best, lowest


def merge(pairs, V, pairs_per_run):
    """Equal pairs of a run become one row.  tensors (pairs,) -> history for `argmin`: run, chosen, rejected, weight (N,), a
    run's weights summing to one, and explored (N, 2), how often y~ was the chosen and the rejected one, summing to one."""
    key = (pairs["run"] * V + pairs["chosen"]) * V + pairs["rejected"]                           # (pairs,)
    count, won = key.bincount(), key.bincount((pairs["explore"] == pairs["chosen"]).float())
    key = count.nonzero()[:, 0]                                                                  # (N,)
    count, won = count[key].float(), won[key].float()
    return dict(run=key // V**2, chosen=key // V % V, rejected=key % V, weight=count / pairs_per_run,
                explored=torch.stack([won / count, 1 - won / count], 1))


def explore(bandit, ratios=ALPHA_OVER_BETA, beta=0.15, R_max=3.0, rounds=12, pairs=64, seeds=256, seed=0):
    """Algorithm 1 on a one-prompt bandit, `seeds` runs for each alpha / beta in ratios, all at once.

    -> dict of (len(ratios), seeds): "gap", J(pi*) - J(pi) of the last policy, "best", its probability of the best arm, "drew",
    whether that arm was ever drawn; and under "solved" the last round's call of argmin and what it returned
    """
    gen = torch.Generator().manual_seed(seed)
    V, S, best = bandit.reward.shape[1], len(ratios) * seeds, bandit.reward[0].argmax()
    ref_logp, reward = bandit.ref_logp[0].float(), bandit.reward[0].float()                      # (V,)
    alpha = beta * torch.tensor(ratios).repeat_interleave(seeds)                                 # (S,)
    run, replay = torch.arange(S).repeat_interleave(pairs), Replay()                             # (S * pairs,)
    r = torch.full((S, V), R_max / 2)                                                         # a constant reward: pi_1 = pi_sft
    for t in range(1, rounds + 1):
        logp = (ref_logp + r / beta).log_softmax(-1)                                             # (S, V)
        arm = logp.exp().multinomial(pairs, replacement=True, generator=gen).flatten()           # (S * pairs,)
        ref_arm = ref_logp.exp().multinomial(S * pairs, replacement=True, generator=gen)         # (S * pairs,)
        wins = torch.rand(S * pairs, generator=gen) < (reward[arm] - reward[ref_arm]).sigmoid()
        chosen, rejected = torch.where(wins, arm, ref_arm), torch.where(wins, ref_arm, arm)      # (S * pairs,)
        replay.append(run=run, chosen=chosen, rejected=rejected, explore=ref_arm)
        problem = (merge(replay.data, V, pairs * t), r, ref_logp, beta, alpha, R_max)
        r, loss = argmin(*problem)
    logp = (bandit.ref_logp + r.double() / beta).log_softmax(-1)                                 # (S, V)
    gap = objective(bandit, log_optimum(bandit, beta), beta) - objective(bandit, logp, beta)     # (S,)
    has_best = (replay.data["chosen"] == best) | (replay.data["rejected"] == best)
    drew = run.repeat(rounds)[has_best].bincount(minlength=S) > 0                                # (S,)
    result = dict(gap=gap, best=logp[:, best].exp(), drew=drew.double())
    return {name: values.view(-1, seeds) for name, values in result.items()} | dict(solved=(problem, r, loss))
