"""Products in bfloat16, as on a GPU: log-probs stay close to float32's, and step 0 stays at the reference."""
import copy

import torch

from model import generate, sequence_logprob, token_logprob


@torch.no_grad()
def test_in_bfloat16_step_0_is_the_reference_and_the_policy_is_nearly_the_same(gpt):
    low = copy.deepcopy(gpt)
    low.bf16 = True
    ids, mask = generate(low, [[1, 2, 3]] * 64, 20, 0.8, 12, torch.Generator().manual_seed(0))
    logp = token_logprob(low, ids, mask, 0.8)                        # (64, T)
    assert logp.dtype == torch.float32
    assert torch.equal(sequence_logprob(copy.deepcopy(low), ids, mask, 0.8), logp.sum(1))        # h = 0
    exact = token_logprob(gpt, ids, mask, 0.8)                       # (64, T)
    assert 0 < (logp - exact).abs()[mask].mean() < 0.05
    in_parts = [token_logprob(low, *part, 0.8) for part in zip(ids.split(7), mask.split(7))]
    assert (torch.cat(in_parts) - logp).abs().max() < 1e-4           # PPO's first ratio is one
    assert low.head(low.hidden(ids)).dtype == torch.float32          # the logits, and so the log-softmax
