"""What XPO's bonus buys: two bandits whose best arm the reference hardly ever draws.

The policies are pi_r, proportional to pi_sft exp(r / beta), for rewards r in the box [0, R_max].  Labels are
drawn from Bradley-Terry.  Algorithm 1 (see `xpo.py`) asks for the argmin over the *whole* history, and here
it is solved: with two arms on a grid, with twelve by projected Adam from several starts.  alpha = 0 is
online DPO; alpha / beta is in units of reward.
"""
import torch

from loop import Columns
from toy.bandit import Bandit, per_row, suboptimality
from xpo import xpo_loss

SCAN = 25                                                 # steps of `argmin` from its V + 1 extra starts
RATIOS = (0.0, 0.001, 0.003, 0.01, 0.03, 0.1)             # alpha / beta


# ---- two arms: the lower bound of Proposition 2.1 ---------------------------------------------------------

def two_arms(beta, alpha, rounds=400, seeds=256):
    """Proposition 2.1's instance: r(a) = 1, r(b) = 1/2, pi_sft(a) = exp(-1 / (8 beta)); one pair per round.

    The policies are a grid over d = r(a) - r(b) in [-1, 1].  There are 8 kinds of pairs (who won, who lost,
    which was the reference's): the history is 8 counts, the objective counts @ (each kind's loss at each d).
    -> rounds until J(pi*) - J(pi) < 1/8 (seeds,), inf where never; J(pi*) - J(pi) after the last (seeds,)
    """
    gen = torch.Generator().manual_seed(0)
    ref_a = torch.tensor(-1 / (8 * beta), dtype=torch.float64)                  # log-prob of arm 0
    ref_logp = torch.stack([ref_a, torch.log1p(-ref_a.exp())])                  # (2,)
    reward = torch.tensor([1.0, 0.5], dtype=torch.float64)                      # (2,)
    d = torch.linspace(-1, 1, 401, dtype=torch.float64)                         # (D,)
    logp = (ref_logp + torch.stack([d, -d], 1) / (2 * beta)).log_softmax(-1)    # (D, 2)
    gap = suboptimality(Bandit(ref_logp[None], reward[None]), logp, beta)       # (D,)

    arms = torch.arange(2)
    kinds = torch.cartesian_prod(arms, arms, arms)        # (8, 3) chosen, rejected, the reference's column
    pairs = kinds[:, :2]                                  # (8, 2)
    pair_logp = logp[:, pairs]                            # (D, 8, 2)
    pair_ref = ref_logp[pairs].expand(len(d), 8, 2)       # (D, 8, 2)
    explore = pair_logp.gather(-1, kinds[:, 2:].expand(len(d), 8, 1))           # (D, 8, 1)
    loss = per_row(xpo_loss, pair_logp.flatten(0, 1), pair_ref.flatten(0, 1), explore.flatten(),
                   beta=beta, alpha=alpha)                # (D * 8,)
    loss = loss.view(len(d), 8).T                         # (8, D)

    counts = torch.zeros(seeds, 8, dtype=torch.float64)
    policy = torch.full((seeds,), len(d) // 2)            # an index into the grid; pi_1 = pi_sft is d = 0
    reached = torch.full((seeds,), torch.inf)
    for t in range(1, rounds + 1):
        uniform = torch.rand(3, seeds, generator=gen, dtype=torch.float64)
        arm = (uniform[0] > logp[policy, 0].exp()).long()
        ref_arm = (uniform[1] > ref_a.exp()).long()
        wins = uniform[2] < (reward[arm] - reward[ref_arm]).sigmoid()
        chosen = torch.where(wins, arm, ref_arm)
        rejected = torch.where(wins, ref_arm, arm)
        kind = 4 * chosen + 2 * rejected + wins.long()    # column 1 is the reference's where it lost
        counts[torch.arange(seeds), kind] += 1
        policy = (counts @ loss + 1e-9 * d.abs()).argmin(1)                     # a tie: nearest to pi_sft
        reached = torch.where((gap[policy] < 1 / 8) & reached.isinf(), t, reached)
    return reached, gap[policy]


# ---- twelve arms ------------------------------------------------------------------------------------------

def twelve_arms(rare=3.4e-4):
    """Two common arms (r = 1.5, 1.2) and ten of probability `rare` under pi_sft: one has r = 3, nine 0."""
    probs = torch.tensor([0.5 - 5 * rare] * 2 + [rare] * 10, dtype=torch.float64)
    return Bandit(probs.log()[None], torch.tensor([[1.5, 1.2, 3.0] + [0.0] * 9], dtype=torch.float64))


def merge(pairs, V, pairs_per_run):
    """Merges equal pairs of a run into one row.  tensors (pairs,) -> history for `argmin`, N rows:

    run, chosen, rejected (N,); weight (N,), a run's weights sum to one; explored (N, 2), the fractions of the
    merged pairs in which y~, the reference's response, was the chosen and the rejected one
    """
    key = (pairs["run"] * V + pairs["chosen"]) * V + pairs["rejected"]          # (pairs,)
    count = key.bincount()
    won = key.bincount((pairs["explore"] == pairs["chosen"]).float())
    key = count.nonzero()[:, 0]                           # (N,)
    count, won = count[key].float(), won[key].float()
    return {"run": key // V**2, "chosen": key // V % V, "rejected": key % V, "weight": count / pairs_per_run,
            "explored": torch.stack([won / count, 1 - won / count], 1)}


def argmin(history, start, ref_logp, beta, alpha, R_max, steps=80):
    """The rewards in [0, R_max]^V that minimize XPO's objective on each run's history, for S runs at once.

    history: from `merge`; start: (S, V), the last round's rewards; alpha: (S,).
    DPO's loss is convex in r.  The bonus is linear in r minus alpha log Z, and log Z is close to the highest
    log pi_sft + r / beta, so there is a minimum for each arm that can be the highest.  Adam, with a learning
    rate that falls to 0, starts from the round before and, for a shorter search, from all unseen arms at
    R_max and from each arm at R_max with the others at 0.  The lowest end is refined; on a tie the first is
    kept, the smallest change of the policy.
    -> (S, V), its loss in nats per pair (S,)
    """
    V = start.shape[1]
    run = history["run"]                                  # (N,)
    arms = torch.stack([history["chosen"], history["rejected"]], 1)             # (N, 2)
    flat = (run[:, None] * V + arms).flatten()            # (N * 2,) into (S, V)

    def losses(r):
        """(S, V) -> (N,).  alpha differs from run to run, so it is multiplied into explore_logp."""
        logp = (ref_logp + r / beta).log_softmax(-1).flatten()                  # (S * V,)
        pair_logp = logp.index_select(0, flat).view(-1, 2)                      # (N, 2)
        explore = (history["explored"] * pair_logp).sum(-1)                     # (N,)
        loss = per_row(xpo_loss, pair_logp, ref_logp[arms], alpha[run] * explore, beta=beta, alpha=1.0)
        return history["weight"] * loss

    def descend(r, steps, lr):
        """Projected Adam from rewards r.  (S, V) -> rewards (S, V), their loss (S,)"""
        r = r.clone().requires_grad_()
        adam = torch.optim.Adam([r], lr=lr)
        for step in range(steps):
            adam.param_groups[0]["lr"] = lr * (1 - step / steps)
            adam.zero_grad()
            losses(r).sum().backward()
            adam.step()
            r.data.clamp_(0, R_max)                       # the box bounds the bonus
        r = r.detach()
        return r, torch.zeros_like(alpha).index_add(0, run, losses(r))          # (S, V), (S,)

    best, lowest = descend(start, steps, lr=0.06)
    if alpha.max() == 0:
        return best, lowest                               # convex
    unseen = torch.ones(start.numel()).index_fill(0, flat, 0).view_as(start)    # (S, V)
    one_arm = R_max * torch.eye(V)                        # (V, V)
    starts = [torch.where(unseen > 0, R_max, start)] + [row.expand_as(start) for row in one_arm]
    for init in starts:
        r, loss = descend(init, SCAN, lr=0.2)
        lower = loss < lowest - 1e-3
        best = torch.where(lower[:, None], r, best)
        lowest = torch.where(lower, loss, lowest)
    return descend(best, steps, lr=0.06)


def explore(bandit, ratios=RATIOS, beta=0.15, R_max=3.0, rounds=12, pairs=64, seeds=256, seed=0):
    """Algorithm 1 on a one-prompt bandit: `seeds` runs for each alpha / beta in ratios, S runs at once.

    -> three of (ratios, seeds): gap, J(pi*) - J(pi) of the last policy; best, its probability of the best
    arm; drew, 1 where that arm was ever drawn.  And problem, the arguments of the last argmin, with its
    solution (S, V) and loss (S,).
    """
    gen = torch.Generator().manual_seed(seed)
    V = bandit.reward.shape[1]
    S = len(ratios) * seeds
    ref_logp, reward = bandit.ref_logp[0].float(), bandit.reward[0].float()     # (V,)
    alpha = beta * torch.tensor(ratios).repeat_interleave(seeds)                # (S,)
    run = torch.arange(S).repeat_interleave(pairs)        # (S * pairs,)
    r = torch.full((S, V), R_max / 2)                     # a constant reward: pi_1 = pi_sft
    played = Columns()
    for t in range(1, rounds + 1):
        logp = (ref_logp + r / beta).log_softmax(-1)      # (S, V)
        arm = logp.exp().multinomial(pairs, replacement=True, generator=gen).flatten()       # (S * pairs,)
        ref_arm = ref_logp.exp().multinomial(S * pairs, replacement=True, generator=gen)
        wins = torch.rand(S * pairs, generator=gen) < (reward[arm] - reward[ref_arm]).sigmoid()
        chosen = torch.where(wins, arm, ref_arm)
        rejected = torch.where(wins, ref_arm, arm)
        played.append({"run": run, "chosen": chosen, "rejected": rejected, "explore": ref_arm})
        problem = {"history": merge(played, V, pairs * t), "start": r, "ref_logp": ref_logp,
                   "beta": beta, "alpha": alpha, "R_max": R_max}
        r, loss = argmin(**problem)

    logp = (bandit.ref_logp + r.double() / beta).log_softmax(-1)                # (S, V)
    best = bandit.reward[0].argmax()
    has_best = (played["chosen"] == best) | (played["rejected"] == best)
    drew = played["run"][has_best].bincount(minlength=S) > 0                    # (S,)
    return {"gap": suboptimality(bandit, logp, beta).view(-1, seeds),
            "best": logp[:, best].exp().view(-1, seeds), "drew": drew.double().view(-1, seeds),
            "problem": problem, "solution": r, "loss": loss}
