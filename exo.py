"""EXO: efficient exact optimization (arXiv 2402.00856), probability matching by the reverse KL.

The alignment objective  J(pi) = E r - beta KL(pi || pi_sft)  equals  -beta KL(pi || pi*) + const, with the
optimum  pi*(y|x) = pi_sft(y|x) exp(r(x,y) / beta) / Z(x)  (Eq 5).  So aligning is matching pi* under the
*reverse* KL.  EXO does it on K responses y_1..y_K ~ pi_sft of each prompt.  Both distributions are normalised
over those K, so that no Z is ever needed:

    p_f(i) = softmax_i( beta_pi * h_i ),  h_i = log pi_theta(y_i|x) - log pi_sft(y_i|x)     Eq 13, the policy
    p_r(i) = softmax_i( r_i / beta_r )                                                      Eq 14, the reward
    L_EXO  = mean over prompts of KL(p_f || p_r)                                            Eq 15

beta_pi * beta_r = beta.  As K grows the gradient of L_EXO is that of KL(pi^beta_pi || pi*_beta_r), where
pi^beta_pi is pi_theta^beta_pi pi_sft^(1 - beta_pi), normalised: the generalised alignment objective
(Theorem 3.2), which at beta_pi = 1 is -J / beta_r up to a constant.
`dpo.py` is this file with the two distributions swapped: read them side by side.

Everything here is a pure function of sequence log-probs in nats: B prompts, K candidate responses each.
Equation numbers: arXiv version 1.
"""
import math

import torch.nn.functional as F


def exo_loss(logp, ref_logp, reward, beta_r=0.1, beta_pi=0.1):
    """EXO from rewards, L_EXO (Eq 15): reverse KL(p_f || p_r) over the K candidates, in nats.

    logp, ref_logp, reward: (B, K) -> scalar, the mean over the B prompts.  ValueError on any other form.
    With l_i = log p_f(i) - log p_r(i):  dL/dh_i = beta_pi p_f(i) (l_i - sum_j p_f(j) l_j) / B.
    At pi_theta = pi_sft: REINFORCE with the group mean as baseline, -beta_pi (r_i - mean r)/(K beta_r B).
    """
    check_inputs(logp, ref_logp, reward, beta_r=beta_r, beta_pi=beta_pi)
    log_p_f = F.log_softmax(beta_pi * (logp - ref_logp), dim=-1)     # (B, K)  Eq 13
    log_p_r = F.log_softmax(reward / beta_r, dim=-1)                 # (B, K)  Eq 14
    return (log_p_f.exp() * (log_p_f - log_p_r)).sum(-1).mean()      # (B, K) -> (B,) -> scalar  Eq 15


def exo_pref_loss(logp, ref_logp, beta_pi=0.1, eps=1e-3):
    """EXO from preferences, L_EXO-pref (Eq 18): Eq 15 on a pair whose target is (1 - eps, eps).

    logp, ref_logp: (B, 2), column 0 chosen, column 1 rejected -> scalar, the mean over the B pairs.
    With u = beta_pi (h_chosen - h_rejected), s = sigmoid(u): dL/du = s (1 - s) (u - log((1 - eps)/eps)) / B.
    So the margin that it aims at is finite, 6.907 at eps = 1e-3; at u = 0 the loss is 2.7612.
    eps = 1e-3, normalised  # paper; the official code aims at log p_r = (0, -10), which is eps = 4.5e-5.
    eps = 0 would put an infinite price on the rejected response, whatever the policy: it is refused.
    """
    check_inputs(logp, ref_logp, pairs=True, eps=eps, beta_pi=beta_pi)
    log_p_f = F.log_softmax(beta_pi * (logp - ref_logp), dim=-1)     # (B, 2)  Eq 13
    log_p_r = logp.new_full((2,), math.log(eps))
    log_p_r[0] = math.log1p(-eps)                                    # (2,)    the target of Eq 18
    return (log_p_f.exp() * (log_p_f - log_p_r)).sum(-1).mean()      # (B, 2) -> (B,) -> scalar  Eq 18


def check_inputs(logp, ref_logp, reward=None, pairs=False, eps=None, **betas):
    """Raises ValueError for shapes and coefficients on which the losses of exo, dpo and xpo are undefined."""
    if logp.dim() != 2 or logp.shape[0] == 0:
        raise ValueError(f"logp must have shape (B, K), a row for each prompt, got {tuple(logp.shape)}")
    for name, tensor in (("ref_logp", ref_logp), ("reward", reward)):
        if tensor is not None and tensor.shape != logp.shape:
            raise ValueError(f"{name} must have logp's shape {tuple(logp.shape)}, got {tuple(tensor.shape)}")
    K = logp.shape[1]
    if pairs and K != 2:
        raise ValueError(f"a preference loss takes pairs (B, 2), column 0 the chosen response, got K = {K}")
    if K < 2:
        raise ValueError(f"K must be at least 2, got {K}: one response has nothing to be compared with")
    for name, beta in betas.items():
        if not 0 < beta < math.inf:
            raise ValueError(f"{name} must be positive and finite, got {beta}")
    if eps is not None and not 0 < eps < 0.5:
        raise ValueError(f"eps must lie in (0, 0.5), got {eps}: at 0 the reverse KL is infinite")
