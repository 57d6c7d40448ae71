"""DPO: direct preference optimization (arXiv 2305.18290) in the frame of the EXO paper, forward KL by probability matching.

The same two distributions over the K responses of a prompt as in `exo.py`, in the other order:

    p_f(i) = softmax_i( beta_pi * h_i ),   h_i = log pi_theta(y_i|x) - log pi_sft(y_i|x)      Eq 13, the policy
    p_r(i) = softmax_i( r_i / beta_r )                                                        Eq 14, the reward
    L_DPO-rw = mean over prompts of the cross-entropy of p_f under p_r                        Eq 19

which is KL(p_r || p_f) up to a constant.  As K grows its gradient is that of the *forward* KL(pi*_beta_r || pi^beta_pi)
(Theorem 3.3).  That is a statement about large K: at K = 2 and beta_r = beta_pi = 0.1 the expected gradient lies near the one
of J, as EXO's does, and turns towards the forward KL's only as K grows (`toy/exo_is_exact.ipynb` shows by how much).
Equation numbers: the EXO paper, arXiv version 1.
"""
import torch.nn.functional as F

from exo import check_inputs


def dpo_reward_loss(logp, ref_logp, reward, beta_r=0.1, beta_pi=0.1):
    """DPO from rewards, L_DPO-rw (Eq 19): cross-entropy of p_f under p_r over the K candidates, in nats.

    logp, ref_logp, reward: (B, K) -> scalar, the mean over the B prompts.  ValueError on what is not of that form.
    dL/dh_i = beta_pi (p_f(i) - p_r(i)) / B.
    """
    check_inputs(logp, ref_logp, reward, beta_r=beta_r, beta_pi=beta_pi)
    log_p_f = F.log_softmax(beta_pi * (logp - ref_logp), dim=-1)     # (B, K)  Eq 13
    log_p_r = F.log_softmax(reward / beta_r, dim=-1)                 # (B, K)  Eq 14
    return -(log_p_r.exp() * log_p_f).sum(-1).mean()                 # (B, K) -> (B,) -> scalar  Eq 19


def dpo_loss(logp, ref_logp, beta=0.1):
    """DPO from preferences (Eq 7): Eq 19 on a pair whose target is (1, 0), -log sigmoid(beta (h_chosen - h_rejected)).

    logp, ref_logp: (B, 2), column 0 chosen, column 1 rejected -> scalar, the mean over the B pairs.
    With u = beta (h_chosen - h_rejected):   dL/du = -sigmoid(-u) / B, so no margin is ever enough; at u = 0 the loss is log 2.
    """
    check_inputs(logp, ref_logp, pairs=True, beta=beta)
    log_p_f = F.log_softmax(beta * (logp - ref_logp), dim=-1)        # (B, 2)  Eq 13, log p_f(chosen) = log sigmoid(u)
    return -log_p_f[:, 0].mean()                                     # (B,) -> scalar  Eq 7
