"""Statements about the GPT-2 of model.py: the same as transformers', cached sampling, log-probs, files."""
import contextlib
import json
import os
import pickle

import pytest
import torch
import torch.nn.functional as F

import model
from files import UserError
from model import GPT, GPTConfig, ScalarGPT, generate, sample, sequence_logprob, token_logprob

EOS = 12
PROMPTS = [[1, 2, 3], [4], [5, 6, 7, 8, 9], [2, 2], [11, 0, 3, 1]]


def random_ids(*shape, vocab=13, seed=0):
    return torch.randint(vocab, shape, generator=torch.Generator().manual_seed(seed))


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def close(a, b):
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


# ---- the same model as transformers' ---------------------------------------------------------------------------------

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
    ids = random_ids(3, 24)
    assert type(theirs) is GPT2LMHeadModel
    close(theirs.train()(ids).logits, gpt(ids))                      # train(): a dropout would show
    assert not notes["missing_keys"] and not notes["unexpected_keys"]
    config = theirs.config
    assert (config.attn_pdrop, config.embd_pdrop, config.resid_pdrop) == (0, 0, 0)
    assert (config.bos_token_id, config.eos_token_id, config.n_positions) == (EOS, EOS, 24)


def test_we_open_transformers_folder_as_the_same_model(tmp_path):
    theirs, ids = their_gpt2(), random_ids(3, 24)
    theirs.save_pretrained(tmp_path)
    assert (tmp_path / "model.safetensors").exists()
    close(GPT.from_pretrained(tmp_path)(ids), theirs(ids).logits)


@pytest.mark.parametrize("prefix", ["", "transformer."])
def test_we_open_pytorch_model_bin_with_and_without_the_prefix(tmp_path, prefix):
    theirs, ids = their_gpt2(), random_ids(3, 24)
    theirs.save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    weights = {prefix + k: v for k, v in theirs.transformer.state_dict().items()}
    if prefix:                                                       # old files also hold the head and the causal masks
        weights |= {"lm_head.weight": theirs.lm_head.weight, "transformer.h.0.attn.masked_bias": torch.tensor(-1e4),
                    "transformer.h.0.attn.bias": torch.ones(1, 1, 24, 24).tril()}
    torch.save(weights, tmp_path / "pytorch_model.bin")
    close(GPT.from_pretrained(str(tmp_path))(ids), theirs(ids).logits)


def test_transformers_opens_our_scalar_model_as_the_same_classifier(gpt, tmp_path):
    from transformers import GPT2ForSequenceClassification
    scorer, text = ScalarGPT(gpt, EOS), random_ids(4, 9, vocab=12)   # no end-of-text inside
    torch.nn.init.normal_(scorer.score.weight)
    scorer.save_pretrained(tmp_path)
    theirs = GPT2ForSequenceClassification.from_pretrained(tmp_path).eval()
    ids = F.pad(text, (0, 3), value=EOS)
    mask = torch.zeros(4, 12, dtype=torch.bool)
    mask[:, 2:10] = True                                             # up to and including the end-of-text
    close(scorer(ids, mask), theirs(ids).logits.squeeze(-1))


def test_a_saved_model_is_read_back_bit_for_bit(gpt, tmp_path):
    gpt.save_pretrained(tmp_path)
    again = GPT.from_pretrained(tmp_path)
    assert again.config == gpt.config
    assert all(torch.equal(a, b) for a, b in zip(gpt.state_dict().values(), again.state_dict().values()))


def test_a_saved_scalar_model_is_read_back_bit_for_bit(gpt, tmp_path):
    scorer = ScalarGPT(gpt, EOS)
    torch.nn.init.normal_(scorer.score.weight)
    scorer.save_pretrained(tmp_path)
    again = ScalarGPT.from_pretrained(tmp_path, EOS)
    assert all(torch.equal(a, b) for a, b in zip(scorer.state_dict().values(), again.state_dict().values()))


# ---- the scalar head -------------------------------------------------------------------------------------------------

def test_a_fresh_scalar_model_says_zero(gpt):
    ids = random_ids(2, 8)
    assert (ScalarGPT(gpt, EOS).values(ids) == 0).all()


def test_the_score_is_read_at_the_last_token_of_the_text_itself(gpt):
    scorer = ScalarGPT(gpt, EOS)
    torch.nn.init.normal_(scorer.score.weight)
    ids = torch.tensor([[1, 2, 3, 4, 5, 6], [1, 2, 3, EOS, EOS, EOS], [1, 2, 3, 4, 5, EOS]])
    mask = torch.tensor([[0, 0, 1, 1, 1, 1], [0, 0, 1, 1, 0, 0], [0, 0, 1, 1, 1, 1]]).bool()
    close(scorer(ids, mask), scorer.values(ids)[range(3), [5, 2, 4]])            # cut; ended; ended


def test_the_score_of_an_empty_response_is_read_at_the_prompts_end(gpt):
    scorer = ScalarGPT(gpt, EOS)
    torch.nn.init.normal_(scorer.score.weight)
    ids, mask = torch.tensor([[1, 2, EOS]]), torch.tensor([[False, False, True]])
    close(scorer(ids, mask), scorer.values(ids)[:, 1])


# ---- log-probs -------------------------------------------------------------------------------------------------------

def naive_logprob(gpt, ids, mask, temperature):
    log_p = F.log_softmax(gpt(ids).double() / temperature, dim=-1)
    logp = torch.zeros(ids.shape, dtype=torch.float64)
    for n, t in mask.nonzero().tolist():
        logp[n, t] = log_p[n, t - 1, ids[n, t]]
    return logp


def ragged_batch():
    """Rows with prompts of different lengths, responses that end, that are cut, and padding."""
    ids, column = random_ids(4, 12, vocab=12), torch.arange(12)
    start, end = torch.tensor([3, 1, 5, 11])[:, None], torch.tensor([12, 6, 8, 12])[:, None]
    ids[1, 5], ids[2, 7], ids[3, 11] = EOS, EOS, EOS
    return ids.where(column < end, EOS), (column >= start) & (column < end)


@pytest.mark.parametrize("temperature", [1.0, 0.8])
@pytest.mark.parametrize("chunk_rows", [1, 3, 1000])
def test_token_logprob_is_the_gathered_log_softmax_at_the_temperature(gpt, monkeypatch, chunk_rows, temperature):
    monkeypatch.setattr(model, "CHUNK", chunk_rows * 13)
    ids, mask = ragged_batch()
    logp = token_logprob(gpt, ids, mask, temperature)
    assert logp.dtype == torch.float32
    close(logp.double(), naive_logprob(gpt, ids, mask, temperature))


@pytest.mark.parametrize("chunk_rows", [1, 3, 1000])
def test_the_gradient_of_token_logprob_is_that_of_the_gathered_log_softmax(gpt, monkeypatch, chunk_rows):
    monkeypatch.setattr(model, "CHUNK", chunk_rows * 13)
    ids, mask = ragged_batch()
    weight = torch.randn(ids.shape, generator=seeded(0))
    ours = torch.autograd.grad((weight * token_logprob(gpt, ids, mask, 0.8)).sum(), list(gpt.parameters()))
    naive = torch.autograd.grad((weight * naive_logprob(gpt, ids, mask, 0.8)).sum(), list(gpt.parameters()))
    for a, b in zip(ours, naive):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


def test_the_head_never_sees_the_whole_batch_at_once(gpt, monkeypatch):
    monkeypatch.setattr(model, "CHUNK", 3 * 13)
    rows, buffers, mm = [], set(), torch.mm

    def watched(x, weight, *, out):
        rows.append(len(x))
        buffers.add(out.untyped_storage().data_ptr())
        return mm(x, weight, out=out)

    monkeypatch.setattr(torch, "mm", watched)
    ids, mask = ragged_batch()
    logp = sequence_logprob(gpt, ids, mask)
    assert len(buffers) == 1                                         # one for all chunks
    logp.sum().backward()
    assert max(rows) == 3 and sum(rows) == 2 * mask.sum()            # each row once forward, once again in backward


def test_a_hand_made_row_counts_the_response_and_its_end_of_text_and_nothing_else(gpt):
    ids = torch.tensor([[4, 5, 6, 7, EOS, EOS]])                     # prompt 4 5, response 6 7 end-of-text, one padding
    mask = torch.tensor([[False, False, True, True, True, False]])
    log_p = F.log_softmax(gpt(ids[:, :5]), dim=-1)[0]
    by_hand = log_p[1, 6] + log_p[2, 7] + log_p[3, EOS]
    close(sequence_logprob(gpt, ids, mask), by_hand[None])
    assert (token_logprob(gpt, ids, mask)[~mask] == 0).all()


def test_log_probs_are_unchanged_by_right_padding(gpt):
    ids, mask = ragged_batch()
    padded = sequence_logprob(gpt, F.pad(ids, (0, 7), value=EOS), F.pad(mask, (0, 7)))
    close(padded, sequence_logprob(gpt, ids, mask))


def test_log_probs_of_a_row_are_those_of_the_row_alone(gpt):
    ids, mask = ragged_batch()
    alone = [sequence_logprob(gpt, ids[n:n + 1], mask[n:n + 1]) for n in range(len(ids))]
    close(sequence_logprob(gpt, ids, mask), torch.cat(alone))


def test_a_batch_without_response_tokens_has_log_prob_zero(gpt):
    assert (token_logprob(gpt, random_ids(2, 5), torch.zeros(2, 5, dtype=torch.bool)) == 0).all()


def test_a_mask_on_the_first_token_is_refused(gpt):
    mask = torch.zeros(2, 5, dtype=torch.bool)
    mask[1, 0] = True
    with pytest.raises(ValueError, match="nothing comes before the first token"):
        token_logprob(gpt, random_ids(2, 5), mask)


# ---- sampling --------------------------------------------------------------------------------------------------------

def one_by_one(gpt, prompt, uniform, temperature, eos_id):
    """A response the slow way: the whole row through the model for every token, no cache, no batch."""
    ids = list(prompt)
    for u in uniform:
        logits = gpt(torch.tensor([ids]))[:, -1] / temperature
        ids.append(int(sample(logits, u[None])))
        if ids[-1] == eos_id:
            break
    return ids


def expect_the_slow_way(gpt, prompts, new, temperature, eos_id, seed):
    ids, mask = generate(gpt, prompts, new, temperature, eos_id, seeded(seed))
    uniform = torch.rand(len(prompts), new, generator=seeded(seed))
    for n, prompt in enumerate(prompts):
        row = one_by_one(gpt, list(prompt), uniform[n], temperature, eos_id)
        assert ids[n, :len(row)].tolist() == row
        assert mask[n].nonzero().flatten().tolist() == list(range(len(prompt), len(row)))
    return ids, mask


def test_cached_sampling_is_uncached_sampling(gpt):
    expect_the_slow_way(gpt, random_ids(20, 4, vocab=12), 20, 1.0, EOS, seed=1)


def test_cached_sampling_is_uncached_sampling_with_prompts_of_different_lengths(gpt):
    expect_the_slow_way(gpt, PROMPTS * 4, 19, 0.8, EOS, seed=2)


def test_cached_sampling_is_uncached_sampling_without_an_end_of_text(gpt):
    ids, mask = expect_the_slow_way(gpt, PROMPTS, 19, 0.8, None, seed=3)
    assert (mask.sum(1) == 19).all()


@pytest.mark.parametrize("ragged", [False, True])
def test_dropping_finished_rows_changes_no_sample(gpt, monkeypatch, ragged):
    left, keep = [], model.Cache.keep
    monkeypatch.setattr(model.Cache, "keep", lambda self, rows: left.append(int(rows.sum())) or keep(self, rows))
    ids, mask = expect_the_slow_way(gpt, PROMPTS * 12 if ragged else random_ids(60, 5), 19, 1.0, EOS, seed=4)
    assert left and left[-1] >= 10 and mask.sum(1).max() == 19       # else this test would say nothing


def test_a_batch_samples_each_row_as_that_row_alone(gpt):
    ids, mask = generate(gpt, PROMPTS, 12, 1.0, EOS, seeded(5))
    uniform = torch.rand(len(PROMPTS), 12, generator=seeded(5))
    for n, prompt in enumerate(PROMPTS):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch, "rand", lambda *shape, generator, n=n: uniform[n:n + 1])
            alone, alone_mask = generate(gpt, [prompt], 12, 1.0, EOS)
        assert torch.equal(alone[alone_mask], ids[n][mask[n]])


def test_after_its_end_a_row_is_end_of_text_and_off_the_mask(gpt):
    ids, mask = generate(gpt, PROMPTS * 20, 19, 1.0, EOS, seeded(6))
    ended, end = 0, mask.shape[1] - mask.flip(1).int().argmax(1)     # one past the last masked token
    for row, row_mask, stop in zip(ids, mask, end.tolist()):
        count = int((row[row_mask] == EOS).sum())
        assert count == (row[stop - 1] == EOS)                       # once and last, or not at all
        assert (row[stop:] == EOS).all() and not row_mask[stop:].any()
        assert count or row_mask.sum() == 19                         # without one it was cut
        ended += count
    assert 0 < ended < len(ids)


def test_prompts_are_kept_and_a_mask_never_covers_them(gpt):
    ids, mask = generate(gpt, [[EOS, 1], [2, EOS, EOS]], 8, 1.0, EOS, seeded(7))
    assert ids[0, :2].tolist() == [EOS, 1] and ids[1, :3].tolist() == [2, EOS, EOS]
    assert not mask[0, :2].any() and mask[0, 2] and not mask[1, :3].any() and mask[1, 3]


def test_rows_are_trimmed_to_the_longest(gpt):
    eos_id = int(one_by_one(gpt, [1, 2, 3], torch.tensor([0.5]), 1.0, None)[-1])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "rand", lambda *shape, generator: torch.full(shape, 0.5))
        ids, mask = generate(gpt, [[1, 2, 3]], 19, 1.0, eos_id)
    assert ids.tolist() == [[1, 2, 3, eos_id]] and mask.tolist() == [[False, False, False, True]]


def test_the_same_seed_draws_the_same_responses_and_another_seed_others(gpt):
    first, again, other = (generate(gpt, PROMPTS, 12, generator=seeded(s))[0] for s in (8, 8, 9))
    assert torch.equal(first, again) and not torch.equal(first, other)


def test_sampled_frequencies_are_the_tempered_softmax(gpt):
    n, temperature = 20_000, 0.8
    ids, _ = generate(gpt, torch.tensor([[1, 2, 3]]).expand(n, 3), 1, temperature, None, seeded(10))
    expected = n * F.softmax(gpt(torch.tensor([[1, 2, 3]]))[0, -1] / temperature, -1)
    likely = expected > 5
    chi2 = ((ids[:, 3].bincount(minlength=13) - expected)[likely] ** 2 / expected[likely]).sum()
    assert likely.sum() > 5 and chi2 < 36                            # 13 words: chi-square above 36 has p < 3e-4


def test_a_sequences_log_prob_is_the_logarithm_of_how_often_it_is_sampled(gpt):
    n, temperature = 20_000, 0.5
    ids, mask = generate(gpt, torch.tensor([[1, 2]]).expand(n, 2), 3, temperature, EOS, seeded(11))
    rows, index, counts = ids.unique(dim=0, return_inverse=True, return_counts=True)
    top = counts.argmax()
    example = (index == top).nonzero()[0]
    p = sequence_logprob(gpt, ids[example], mask[example], temperature).exp().item()
    assert counts[top] / n == pytest.approx(p, abs=4 * (p * (1 - p) / n) ** 0.5)


def test_sample_never_returns_a_token_of_zero_weight():
    inf = float("inf")
    logits = torch.tensor([[-inf, 0.0, -inf, 1.0, -inf]]).expand(1002, 5)
    uniform = torch.cat([torch.tensor([0.0, 1 - 2 ** -24]), torch.rand(1000, generator=seeded(0))])
    token = sample(logits, uniform)
    assert token[0] == 1 and token[1] == 3
    assert set(token.tolist()) == {1, 3}


@pytest.mark.parametrize("vocab", [1, 2, 50_257])
def test_the_largest_uniform_number_is_still_a_token(vocab):
    logits = torch.randn(4, vocab, generator=seeded(0)) * 10
    token = sample(logits, torch.full((4,), 1 - 2 ** -24))
    assert (token < vocab).all() and (logits.gather(1, token[:, None]).squeeze(1) - logits.amax(1) > -80).all()


@pytest.mark.parametrize("shift", [-1e4, 0, 1e4])
def test_only_differences_of_logits_matter_to_sample(shift):
    logits = torch.tensor([0.0, 1.0, 0.0]).expand(3, 3) + shift
    assert sample(logits, torch.tensor([0.1, 0.5, 0.9])).tolist() == [0, 1, 2]


def test_sample_inverts_the_distribution_function():
    logits = torch.tensor([0.1, 0.2, 0.3, 0.4]).log().expand(5, 4)
    assert sample(logits, torch.tensor([0.05, 0.15, 0.45, 0.65, 0.95])).tolist() == [0, 1, 2, 3, 3]


@pytest.mark.parametrize("prompts, new", [([[1], []], 3), ([[1] * 20], 5), ([[1], [2] * 25], 0)])
def test_prompts_that_are_empty_or_do_not_fit_the_context_are_refused(gpt, prompts, new):
    with pytest.raises(ValueError, match="block_size = 24"):
        generate(gpt, prompts, new)


def test_a_response_may_fill_the_context_exactly(gpt):
    ids, mask = generate(gpt, [[1, 2, 3, 4]], 20, generator=seeded(0))
    assert ids.shape == (1, 24) and mask.sum() == 20


# ---- files that are not what they should be --------------------------------------------------------------------------

def refused(folder, *words):
    with pytest.raises(UserError) as error:
        GPT.from_pretrained(folder)
    text = str(error.value)
    assert "\n" not in text and str(folder) in text
    assert all(word in text for word in words), text


def edit_config(folder, **changes):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({k: v for k, v in (config | changes).items() if v is not None}))


def test_a_missing_folder_is_refused(tmp_path):
    refused(tmp_path / "nowhere", "gpt2-xl", "config.json")


def test_a_folder_without_config_is_refused(gpt, tmp_path):
    gpt.save_pretrained(tmp_path)
    (tmp_path / "config.json").unlink()
    refused(tmp_path, "config.json")


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "\xff"])
def test_a_config_that_is_no_config_is_refused(gpt, tmp_path, text):
    gpt.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_bytes(text.encode("latin-1"))
    refused(tmp_path, "config.json")


@pytest.mark.parametrize("size", [0, 5, 300, -1])
def test_truncated_weights_are_refused(gpt, tmp_path, size):
    gpt.save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    path.write_bytes(path.read_bytes()[:size])
    refused(tmp_path, "model.safetensors")


def test_truncated_weights_of_transformers_are_refused(tmp_path):
    their_gpt2().save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    refused(tmp_path, "model.safetensors")


def test_one_flipped_byte_in_saved_weights_is_refused(gpt, tmp_path):
    gpt.save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    blob = bytearray(path.read_bytes())
    blob[-1000] ^= 1
    path.write_bytes(blob)
    refused(tmp_path, "checksum")


def test_weights_of_another_shape_than_the_config_says_are_refused(gpt, tmp_path):
    gpt.save_pretrained(tmp_path)
    edit_config(tmp_path, vocab_size=14)
    refused(tmp_path, "wte.weight")


def test_weights_with_a_layer_too_few_or_too_many_are_refused(gpt, tmp_path):
    gpt.save_pretrained(tmp_path)
    for n_layer in (1, 3):
        edit_config(tmp_path, n_layer=n_layer)
        refused(tmp_path, f"h.{min(n_layer, 2)}.")


@pytest.mark.parametrize("changes", [
    {"activation_function": "relu"}, {"layer_norm_epsilon": 1e-6}, {"n_inner": 32}, {"tie_word_embeddings": False},
    {"scale_attn_by_inverse_layer_idx": True}, {"add_cross_attention": True}, {"n_head": 3}, {"n_positions": None},
    {"n_layer": "two"}])
def test_a_config_of_another_architecture_is_refused(gpt, tmp_path, changes):
    gpt.save_pretrained(tmp_path)
    edit_config(tmp_path, **changes)
    with pytest.raises(UserError, match=next(iter(changes))):
        GPT.from_pretrained(tmp_path)


def test_a_head_that_is_not_the_token_embedding_is_refused(gpt, tmp_path):
    gpt.save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    theirs = their_gpt2().state_dict()
    torch.save(theirs | {"lm_head.weight": theirs["lm_head.weight"] + 1}, tmp_path / "pytorch_model.bin")
    refused(tmp_path, "head")


def test_a_classifiers_folder_is_no_policy(gpt, tmp_path):
    ScalarGPT(gpt, EOS).save_pretrained(tmp_path)
    refused(tmp_path, "score.weight")


class Malice:
    def __reduce__(self):
        return os.mkdir, (self.target,)


@pytest.mark.parametrize("write", [torch.save, lambda value, path: path.write_bytes(pickle.dumps(value, 2))])
def test_a_malicious_pickle_is_refused_and_not_executed(gpt, tmp_path, write):
    gpt.save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    malice = Malice()
    malice.target = str(tmp_path / "executed")
    write({"wte.weight": malice}, tmp_path / "pytorch_model.bin")
    refused(tmp_path, "pytorch_model.bin")
    assert not (tmp_path / "executed").exists()
    with contextlib.suppress(Exception):
        torch.load(tmp_path / "pytorch_model.bin", weights_only=False)
    assert (tmp_path / "executed").exists()                          # it would have done harm


@pytest.mark.parametrize("content", [b"", b"<html>not found</html>", b"\x80\x02"])
def test_a_file_that_is_no_pickle_is_refused(gpt, tmp_path, content):
    gpt.save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    (tmp_path / "pytorch_model.bin").write_bytes(content)
    refused(tmp_path, "pytorch_model.bin")


@pytest.mark.parametrize("value", [[1, 2], torch.zeros(3), {"wte.weight": 1.0}, {1: torch.zeros(3)}])
def test_a_pickle_of_something_else_than_named_tensors_is_refused(gpt, tmp_path, value):
    gpt.save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    torch.save(value, tmp_path / "pytorch_model.bin")
    refused(tmp_path, "pytorch_model.bin")


def test_heads_that_do_not_divide_the_width_are_refused():
    with pytest.raises(UserError, match="n_head = 3"):
        GPT(GPTConfig(n_layer=1, n_head=3, n_embd=16, vocab_size=5, block_size=8))
