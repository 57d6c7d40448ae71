"""Statements about the GPT-2 of model.py: the same as transformers', log-probs, exact sampling, files."""
import pytest
import torch
import torch.nn.functional as F

import model
from loop import Muon, UserError, muon, read_json, write_json
from model import GPT, GPTConfig, ScalarGPT, generate, respond, sample, sequence_logprob, token_logprob

EOS = 12                                            # of the fixture gpt: 13 words, 24 positions
PROMPTS = [[1, 2, 3], [4], [5, 6, 7, 8, 9], [2, 2], [EOS, 0, EOS, 1]]


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def random_ids(*shape, vocab=13):
    return torch.randint(vocab, shape, generator=seeded(0))


def close(a, b):
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def random_scorer(gpt):
    scorer = ScalarGPT(gpt, EOS)
    torch.nn.init.normal_(scorer.score.weight)
    return scorer


# ---- the same model as transformers' ---------------------------------------------------------------------

def their_gpt2():
    from transformers import GPT2Config, GPT2LMHeadModel
    torch.manual_seed(1)
    theirs = GPT2LMHeadModel(GPT2Config(n_layer=2, n_head=2, n_embd=16, vocab_size=13, n_positions=24)).eval()
    for parameter in theirs.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return theirs


def test_transformers_opens_our_folder_as_the_same_model(gpt, tmp_path):
    from transformers import AutoModelForCausalLM, GPT2LMHeadModel
    gpt.save_pretrained(tmp_path, eos_id=EOS)
    theirs, notes = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert type(theirs) is GPT2LMHeadModel
    assert not notes["missing_keys"] and not notes["unexpected_keys"]
    assert (theirs.config.eos_token_id, theirs.config.n_positions) == (EOS, 24)
    ids = random_ids(3, 24)
    close(theirs.train()(ids).logits, gpt(ids))     # train(): a dropout would show


def test_we_open_their_folder_as_the_same_model(tmp_path):
    theirs = their_gpt2()
    theirs.save_pretrained(tmp_path)
    ours = GPT.from_pretrained(tmp_path)
    ids = random_ids(3, 24)
    close(ours(ids), theirs(ids).logits)
    greedy = theirs.generate(ids[:, :4], max_new_tokens=20, do_sample=False, eos_token_id=None)
    assert torch.equal(generate(ours, ids[:, :4], 20, temperature=1e-4)[0], greedy)


def test_a_released_gpt2_is_opened_by_its_name(gpt, tmp_path, monkeypatch):
    gpt.save_pretrained(tmp_path)
    asked = []

    def fetch(url, name):
        asked.append(url)
        return tmp_path / name.removeprefix("gpt2-large/")

    monkeypatch.setattr(model, "fetch", fetch)
    again = GPT.from_pretrained("gpt2-large")
    assert again.config == gpt.config
    torch.testing.assert_close(again.state_dict(), gpt.state_dict(), rtol=0, atol=0)
    place = "https://huggingface.co/openai-community/gpt2-large/resolve/main"
    assert asked == [f"{place}/config.json", f"{place}/model.safetensors"]


@pytest.mark.parametrize("changes, refused", [
    ({"model_type": "llama"}, "has model_type = llama: this GPT-2 has gpt2"),
    ({"scale_attn_weights": False}, "has scale_attn_weights = False"), ({"n_inner": 65}, "has n_inner = 65"),
    ({"activation_function": "relu"}, "has activation_function = relu: this GPT-2 has gelu_new"),
    ({"activation_function": "gelu_pytorch_tanh", "n_inner": 64, "scale_attn_weights": True}, None)])
def test_a_folder_that_is_another_model_is_refused_in_one_sentence(gpt, tmp_path, changes, refused):
    gpt.save_pretrained(tmp_path)
    config = read_json(tmp_path / "config.json")
    write_json(tmp_path / "config.json", config | changes)
    if refused:
        with pytest.raises(UserError, match=refused):
            GPT.from_pretrained(tmp_path)
    else:
        close(GPT.from_pretrained(tmp_path)(random_ids(1, 5)), gpt(random_ids(1, 5)))


def test_rows_beyond_the_tokenizers_are_cut(gpt):
    ids = random_ids(1, 5, vocab=11)
    logits = gpt(ids)
    close(gpt.cut(11)(ids), logits[..., :11])
    assert gpt.config.vocab_size == 11 and gpt.wte.weight.requires_grad


# ---- Muon ------------------------------------------------------------------------------------------------

def test_muon_turns_a_matrix_alike_in_all_directions_and_adamw_takes_the_rest():
    """Its first step on a matrix is near U V^T of the gradient's decomposition, as long as AdamW's."""
    torch.manual_seed(0)
    gpt = GPT(GPTConfig(2, 2, 16, 13, 24))
    matrices, others = muon(gpt)
    counts = [sum(len(group["params"]) for group in each.param_groups) for each in (matrices, others)]
    assert counts[0] == 8 and sum(counts) == len(list(gpt.parameters()))
    before = gpt.h[0].mlp.c_fc.weight.detach().clone()
    embedding = gpt.wte.weight.detach().clone()
    ids = random_ids(64, 12)
    token_logprob(gpt, ids, (torch.arange(12) > 0).expand(64, 12)).mean().neg().backward()
    matrices.step()
    others.step()
    turned = torch.linalg.svdvals(before - gpt.h[0].mlp.c_fc.weight.detach())            # (16,)
    size = turned / (1e-3 * 0.2 * 64 ** 0.5)
    assert 0.6 < size[:-1].min() and size.max() < 1.3           # but for where the gradient is nearly 0
    assert (embedding - gpt.wte.weight.detach()).abs().median() == pytest.approx(1e-3, rel=1e-3)


def test_muon_steps_like_torchs():
    """Up to bfloat16, in which torch.optim.Muon works: its steps have 8 bits."""
    torch.manual_seed(0)
    for shape in ((16, 64), (64, 16)):
        start = torch.randn(shape)
        ours, theirs = (torch.nn.Parameter(start.clone()) for _ in range(2))
        optimizers = [Muon([ours]),
                      torch.optim.Muon([theirs], weight_decay=0.0, adjust_lr_fn="match_rms_adamw")]
        for _ in range(3):
            ours.grad = torch.randn(shape)
            theirs.grad = ours.grad.clone()
            for optimizer in optimizers:
                optimizer.step()
        assert (ours - theirs).norm() < 0.03 * (theirs - start).norm()


# ---- the scalar head -------------------------------------------------------------------------------------

def test_the_score_is_read_at_the_last_token_of_the_text_itself(gpt):
    scorer = random_scorer(gpt)
    ids = torch.tensor([[1, 2, 3, 4, 5], [1, 2, 3, EOS, EOS], [1, 2, 3, 4, EOS], [1, 2, EOS, 0, 0]])
    length = torch.tensor([3, 2, 3, 1])             # of the response after 1 2: cut, ended, ended, empty
    column = torch.arange(5)
    mask = (column >= 2) & (column < 2 + length[:, None])
    close(scorer(ids, mask), scorer.values(ids)[range(4), [4, 2, 3, 1]])


# ---- log-probs -------------------------------------------------------------------------------------------

def naive_logprob(gpt, ids, mask, temperature):
    """token_logprob by the whole (N, T, V) log-softmax in float64."""
    log_p = F.log_softmax(gpt(ids).double() / temperature, dim=-1)
    logp = torch.zeros(ids.shape, dtype=torch.float64)
    for n, t in mask.nonzero().tolist():
        logp[n, t] = log_p[n, t - 1, ids[n, t]]
    return logp


def ragged_batch():
    """Rows with prompts of different lengths, responses that end, that are cut, and padding."""
    ids = random_ids(4, 12, vocab=12)
    ids[1, 5] = ids[2, 7] = ids[3, 11] = EOS
    column = torch.arange(12)
    start = torch.tensor([3, 1, 5, 11])[:, None]
    end = torch.tensor([12, 6, 8, 12])[:, None]
    return ids.where(column < end, EOS), (column >= start) & (column < end)


@pytest.mark.parametrize("chunk_rows, temperature", [(1, 0.8), (3, 0.8), (1000, 0.8), (1000, 1.0)])
def test_token_logprob_is_the_gathered_log_softmax(gpt, monkeypatch, chunk_rows, temperature):
    monkeypatch.setattr(model, "CHUNK", chunk_rows * 13)
    ids, mask = ragged_batch()
    weight = torch.randn(ids.shape, generator=seeded(0))
    ours = token_logprob(gpt, ids, mask, temperature)
    naive = naive_logprob(gpt, ids, mask, temperature)
    assert ours.dtype == torch.float32
    close(ours.double(), naive)                     # and so are the gradients
    gradients = torch.autograd.grad((weight * ours).sum(), list(gpt.parameters()))
    naive_gradients = torch.autograd.grad((weight * naive).sum(), list(gpt.parameters()))
    torch.testing.assert_close(gradients, naive_gradients, rtol=1e-3, atol=1e-4)


def test_a_hand_made_row_counts_the_response_and_its_end_of_text_and_nothing_else(gpt):
    ids = torch.tensor([[4, 5, 6, 7, EOS, EOS]])    # prompt 4 5, response 6 7 end-of-text, one padding
    mask = torch.tensor([[False, False, True, True, True, False]])
    log_p = F.log_softmax(gpt(ids)[0] / 0.8, dim=-1)
    by_hand = torch.stack([log_p[1, 6], log_p[2, 7], log_p[3, EOS]])
    tokens = token_logprob(gpt, ids, mask, 0.8)
    close(tokens[mask], by_hand)
    assert (tokens[~mask] == 0).all()
    close(sequence_logprob(gpt, ids, mask, 0.8), by_hand.sum()[None])


def test_the_log_prob_of_a_row_depends_neither_on_padding_nor_on_other_rows(gpt):
    ids, mask = ragged_batch()
    together = sequence_logprob(gpt, F.pad(ids, (0, 7), value=EOS), F.pad(mask, (0, 7)))
    for n in range(len(ids)):
        close(sequence_logprob(gpt, *model.trim(ids[n:n + 1], mask[n:n + 1])), together[n:n + 1])


@pytest.mark.parametrize("mask", [torch.ones(2, 5).bool(), torch.zeros(2, 5)])
def test_a_mask_on_the_first_token_or_of_numbers_is_refused(gpt, mask):
    with pytest.raises(ValueError, match="mask must be boolean, and False on the first token"):
        token_logprob(gpt, random_ids(2, 5), mask)


# ---- sampling --------------------------------------------------------------------------------------------

def one_by_one(gpt, prompt, uniform, temperature, eos_id):
    """A response the slow way: the whole row through the model for every token, no cache, no batch."""
    ids = list(prompt)
    for u in uniform:
        logits = gpt(torch.tensor([ids]))[:, -1] / temperature
        ids.append(int(sample(logits, u[None])))
        if ids[-1] == eos_id:
            break
    return ids


@pytest.mark.parametrize("prompts, eos_id", [
    ([[1, 2, 3, 4, 5]] * 20, EOS), (PROMPTS * 4, EOS), (PROMPTS, None)], ids=["equal", "ragged", "endless"])
def test_a_batch_samples_each_row_as_that_row_alone(gpt, monkeypatch, prompts, eos_id):
    keep = model.Cache.keep
    left = []
    monkeypatch.setattr(model.Cache, "keep", lambda self, rows: left.append(len(rows)) or keep(self, rows))
    ids, mask = generate(gpt, prompts, 19, 0.8, eos_id, seeded(5))
    uniform = torch.rand(len(prompts), 19, generator=seeded(5))
    rows = [one_by_one(gpt, prompt, uniform[n], 0.8, eos_id) for n, prompt in enumerate(prompts)]
    T = max(map(len, rows))                         # rows are trimmed to the longest: of "ragged", 23
    for n, row in enumerate(rows):                  # prompt, response with its end-of-text, padding
        assert ids[n].tolist() == row + [eos_id or 0] * (T - len(row))
        assert mask[n].nonzero().flatten().tolist() == list(range(len(prompts[n]), len(row)))
    assert left or eos_id is None                   # finished rows were dropped


def test_responses_are_sampled_as_often_as_their_log_prob_says(gpt):
    n, temperature = 20_000, 0.8
    ids, mask = generate(gpt, [[1, 2]] * n, 2, temperature, EOS, seeded(11))
    rows, counts = torch.cat([ids, mask], 1).unique(dim=0, return_counts=True)
    expected = n * sequence_logprob(gpt, rows[:, :4], rows[:, 4:].bool(), temperature).exp()
    likely = expected > 5
    freedom = int(likely.sum())
    chi2 = ((counts - expected) ** 2 / expected)[likely].sum()
    assert freedom > 20 and abs(chi2 - freedom) < 4 * (2 * freedom) ** 0.5


@pytest.mark.parametrize("at_once", [1, 2, 100])
def test_responses_come_in_the_order_of_their_prompts_however_many_are_drawn_at_once(gpt, at_once):
    def measure(ids, mask):
        return {"logp": token_logprob(gpt, ids, mask), "length": mask.sum(1)}

    got = respond(gpt, PROMPTS, 15, 20, 1.0, EOS, seeded(3), at_once, measure, pieces=2)
    uniform = torch.rand(len(PROMPTS), 15, generator=seeded(3))
    for n, prompt in enumerate(PROMPTS):
        ids, mask = generate(gpt, [prompt], 15, 1.0, EOS, uniform=uniform[n:n + 1])
        room = (0, 20 - ids.shape[1])
        assert torch.equal(got["ids"][n:n + 1], F.pad(ids, room, value=EOS))
        assert torch.equal(got["mask"][n:n + 1], F.pad(mask, room))
        close(got["logp"][n:n + 1], F.pad(token_logprob(gpt, ids, mask), room))
        assert got["length"][n] == mask.sum()


@pytest.mark.parametrize("shift", [-1e4, 0, 1e4])
def test_sample_inverts_the_distribution_function(shift):
    logits = torch.tensor([1.0, 2.0, 4.0, 8.0]).log().expand(5, 4) + shift
    uniform = torch.tensor([0.03, 0.1, 0.4, 0.6, 0.99])             # the steps are at 1/15, 3/15, 7/15
    assert sample(logits, uniform).tolist() == [0, 1, 2, 3, 3]


@pytest.mark.parametrize("vocab", [3, 50_257])
def test_sample_never_returns_a_token_of_zero_weight(vocab):
    logits = torch.randn(102, vocab, generator=seeded(0)) * 10
    logits[:, [0, vocab - 1]] = -torch.inf
    uniform = torch.cat([torch.tensor([0.0, 1 - 2 ** -24]), torch.rand(100, generator=seeded(0))])
    token = sample(logits, uniform)
    assert (token > 0).all() and (token < vocab - 1).all()


@pytest.mark.parametrize("prompts, new, temperature", [([[1], []], 3, 1), ([[1] * 20], 5, 1), ([[1]], 3, 0)])
def test_what_cannot_be_sampled_is_refused(gpt, prompts, new, temperature):
    with pytest.raises(ValueError, match="cannot add . tokens .* block_size = 24"):
        generate(gpt, prompts, new, temperature)
