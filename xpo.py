"""XPO: exploratory preference optimization (arXiv 2405.21046), online DPO with one term more.

Algorithm 1, with pi_1 = pi_sft and an empty history D:

    for t = 1, ..., T:
        draw a prompt x, a response y ~ pi_t(.|x) and a reference response y~ ~ pi_sft(.|x)
        label the pair: y wins with probability sigmoid(r(x, y) - r(x, y~));  add (winner, loser, y~) to D
        pi_{t+1} = argmin over pi of
            sum over D of  [ -log sigmoid(beta h(winner) - beta h(loser))  +  alpha log pi(y~|x) ],
                           h(y) = log pi(y|x) - log pi_sft(y|x)

The first term is DPO's loss (`dpo.py`).  The second, the bonus, is minimised too: it pushes mass *away* from
the reference's responses, won or lost.  Among the rewards that explain the labels equally well it picks the
one that promises the most over the reference, which is optimism: what has not been tried is tried.  alpha is
a price in nats of DPO loss per nat of log pi, so that what matters is alpha / beta, in units of reward.
alpha = 0 is online DPO.

Both sums run over the *whole* history: a bonus that sees only the newest batch finds a rare response and then
forgets it.  And the bonus has no floor on a replay: where y~ lost its pair, DPO and the bonus both push
log pi(y~) down without end.  Keep alpha small beside beta, make few passes a round, and stop a round when the
mean of log pi(y~) - log pi_sft(y~) has fallen too far.  In the bandit of `toy/` the box on the reward is that
floor.
The paper returns the best of the iterates; `train.py` keeps the last.
"""
import math

import torch

from dpo import dpo_loss


def xpo_loss(logp, ref_logp, explore_logp, beta=0.1, alpha=3e-4):
    """XPO on a batch of the history: dpo_loss(logp, ref_logp, beta) + alpha * mean of explore_logp, in nats.

    logp, ref_logp: (B, 2), column 0 chosen, column 1 rejected; explore_logp: (B,), the column of logp that
    holds y~, the response that pi_sft drew, chosen or not -> scalar, the mean over the B pairs.
    Its gradient on explore_logp is alpha / B.
    alpha = 0.003 beta  # ours; the paper's theory: alpha ~ beta / sqrt(T), its experiment gives no value
    """
    if explore_logp.shape != logp.shape[:1]:
        raise ValueError(f"explore_logp must have a number for each pair, {tuple(logp.shape[:1])}, "
                         f"got {tuple(explore_logp.shape)}")
    if not 0 <= alpha < math.inf:
        raise ValueError(f"alpha must be finite and not negative, got {alpha}: below 0 it rewards pi_sft")
    return dpo_loss(logp, ref_logp, beta) + alpha * explore_logp.mean()


def pairs(fresh, sampled, label):
    """The first half of a round of Algorithm 1: each prompt's answers by pi_t and by pi_sft become a pair.

    fresh, sampled: {ids, mask: (n, T), ref_logp, reward: (n,)}; label: rewards (n, 2) -> the winner's column.
    -> {ids, mask: (n, 2, T), ref_logp: (n, 2), explore: (n,)}: column 0 won, column `explore` is pi_sft's.
    """
    both = {name: torch.stack([fresh[name], sampled[name]], dim=1) for name in fresh}    # (n, 2, ...)
    winner = label(both.pop("reward"))                                                   # (n,)
    order = torch.stack([winner, 1 - winner], dim=1)                                     # (n, 2)
    row = torch.arange(len(winner))[:, None]                                             # (n, 1)
    both = {name: column[row, order] for name, column in both.items()}                   # (n, 2, ...)
    return both | {"explore": 1 - winner}                                              # pi_sft's was column 1


def schedule(rounds, prompts, epochs, batch_size):
    """Algorithm 1 as steps, [(round, step within it), ...]: `epochs` passes a round over all pairs so far."""
    steps = []
    for t in range(rounds):
        steps += [(t, i) for i in range(math.ceil(epochs * (t + 1) * prompts / batch_size))]
    return steps
