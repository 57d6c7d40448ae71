"""Statements about the GPT-2 of model.py: the same as transformers', log-probs, exact sampling, files."""
import copy
import json
import weakref

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import data
import model
from checkpoint import read_tensors
from compute import Muon, UserError
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


@pytest.mark.parametrize("form", ["model.safetensors", "pytorch_model.bin", "pytorch_model.bin of old"])
def test_we_open_their_folder_as_the_same_model(tmp_path, form):
    theirs = their_gpt2()
    theirs.save_pretrained(tmp_path)
    if form != "model.safetensors":
        (tmp_path / "model.safetensors").unlink()
        weights = theirs.transformer.state_dict()   # names without "transformer."
        if form.endswith("old"):                    # these also hold the head and the causal masks
            masks = {"transformer.h.0.attn.bias": torch.ones(1, 1, 24, 24).tril(),
                     "transformer.h.0.attn.masked_bias": torch.tensor(-1e4)}
            weights = theirs.state_dict() | masks
        torch.save(weights, tmp_path / "pytorch_model.bin")
    ours = GPT.from_pretrained(tmp_path)
    ids = random_ids(3, 24)
    close(ours(ids), theirs(ids).logits)
    greedy = theirs.generate(ids[:, :4], max_new_tokens=20, do_sample=False, eos_token_id=None)
    assert torch.equal(generate(ours, ids[:, :4], 20, temperature=1e-4)[0], greedy)


def test_a_released_gpt2_is_opened_by_its_name(tmp_path, monkeypatch):
    ours = GPT(GPTConfig(1, 2, 4, vocab_size=50257, block_size=1024))
    ours.save_pretrained(tmp_path)

    def fetch(url, path, size, sha256, hint):
        assert url.endswith("/gpt2/resolve/main/pytorch_model.bin") and (size, sha256) == (123, "its sha256")
        path.parent.mkdir()
        torch.save(read_tensors(tmp_path / "model.safetensors")[0], path)

    monkeypatch.setattr(data, "fetch", fetch)
    monkeypatch.setenv("EXO_CACHE", str(tmp_path))
    monkeypatch.setitem(model.RELEASED, "gpt2", (1, 2, 4, 123, "its sha256"))
    again = GPT.from_pretrained("gpt2")
    assert again.config == ours.config
    torch.testing.assert_close(again.state_dict(), ours.state_dict(), rtol=0, atol=0)


def test_transformers_opens_our_scalar_model_as_the_same_classifier(gpt, tmp_path):
    from transformers import GPT2ForSequenceClassification
    scorer = random_scorer(gpt)
    scorer.save_pretrained(tmp_path)
    theirs = GPT2ForSequenceClassification.from_pretrained(tmp_path).eval()
    ids = F.pad(random_ids(4, 9, vocab=12), (0, 3), value=EOS)
    mask = torch.zeros(4, 12, dtype=torch.bool)
    mask[:, 2:10] = True                            # up to and including the end-of-text
    close(scorer(ids, mask), theirs(ids).logits.squeeze(-1))


def test_saved_models_are_read_back_bit_for_bit(gpt, tmp_path):
    scorer = random_scorer(gpt)
    gpt.save_pretrained(tmp_path / "gpt")
    scorer.save_pretrained(tmp_path / "scorer")
    again = GPT.from_pretrained(tmp_path / "gpt")
    scorer_again = ScalarGPT.from_pretrained(tmp_path / "scorer", EOS)
    assert again.config == gpt.config
    for ours, read in ((gpt, again), (scorer, scorer_again)):
        torch.testing.assert_close(read.state_dict(), ours.state_dict(), rtol=0, atol=0)


# ---- Muon ------------------------------------------------------------------------------------------------

def test_muon_turns_a_matrix_alike_in_all_directions_and_goes_on_from_its_state():
    """Its first step on a matrix is near U V^T of the gradient's decomposition, as long as AdamW's."""
    torch.manual_seed(0)
    gpt, again = (GPT(GPTConfig(2, 2, 16, 13, 24)) for _ in range(2))
    optimizer = Muon(gpt, 0.01)

    def step(gpt, optimizer):
        ids = random_ids(64, 12)
        token_logprob(gpt, ids, (torch.arange(12) > 0).expand(64, 12)).mean().neg().backward()
        optimizer.step()
        optimizer.zero_grad()

    before = gpt.h[0].mlp.c_fc.weight.detach().clone()
    embedding = gpt.wte.weight.detach().clone()
    step(gpt, optimizer)
    turned = torch.linalg.svdvals(before - gpt.h[0].mlp.c_fc.weight.detach())            # (16,)
    size = turned / (0.01 * 0.2 * 64 ** 0.5)
    assert 0.6 < size[:-1].min() and size.max() < 1.3           # but for where the gradient is nearly 0
    assert (embedding - gpt.wte.weight.detach()).abs().median() == pytest.approx(0.01, rel=1e-3)
    again.load_state_dict(gpt.state_dict())
    restored = Muon(again, 0.5)
    restored.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for one, its in ((gpt, optimizer), (again, restored)):
        step(one, its)
    for name, weight in gpt.state_dict().items():
        assert torch.equal(weight, again.state_dict()[name]), name


# ---- the scalar head -------------------------------------------------------------------------------------

def test_a_fresh_scalar_model_says_zero(gpt):
    assert (ScalarGPT(gpt, EOS).values(random_ids(2, 8)) == 0).all()


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


def test_the_head_never_sees_the_whole_batch_at_once(gpt, monkeypatch):
    monkeypatch.setattr(model, "CHUNK", 3 * 13)
    mm = torch.mm
    rows, buffers = [], set()

    def watched(x, weight, *, out):
        rows.append(len(x))
        buffers.add(out.untyped_storage().data_ptr())
        return mm(x, weight, out=out)

    monkeypatch.setattr(torch, "mm", watched)
    ids, mask = ragged_batch()
    logp = sequence_logprob(gpt, ids, mask)
    assert len(buffers) == 1                        # one for all chunks
    logp.sum().backward()
    assert max(rows) == 3 and sum(rows) == 2 * mask.sum()           # each row once forward, once in backward


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


class Before(TorchDispatchMode):
    """Calls look(name) before every tensor operation."""

    def __init__(self, look):
        super().__init__()
        self.look = look

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.look(func.overloadpacket.__name__)
        return func(*args, **kwargs or {})


def test_under_medium_products_whole_rows_attend_by_plain_ones_and_the_policy_is_the_same(gpt):
    ids, mask = ragged_batch()
    logp, names = {}, {}
    try:
        for precision in ("highest", "medium"):
            torch.set_float32_matmul_precision(precision)
            names[precision] = []
            with Before(names[precision].append):
                logp[precision] = sequence_logprob(gpt, ids, mask)
    finally:
        torch.set_float32_matmul_precision("highest")
    fused = "_scaled_dot_product_flash_attention_for_cpu"            # slow in backward under medium
    assert fused in names["highest"] and fused not in names["medium"]
    close_in_bf16 = {"rtol": 0.02, "atol": 0.1}                      # what medium is on some processors
    torch.testing.assert_close(logp["medium"], logp["highest"], **close_in_bf16)


@torch.no_grad()
def test_a_token_builds_one_mask_for_all_layers_and_dropped_rows_make_room_layer_by_layer(gpt):
    cache = model.Cache([2, 3, 1], 9, "cpu")
    gpt.hidden(random_ids(3, 3), cache)
    names = []
    with Before(names.append):
        gpt.hidden(random_ids(3, 1), cache)
    assert names.count("le") == 1 and len(cache.kv) == 2
    old = [weakref.ref(kv) for kv in cache.kv]
    alive = []                                                       # of the old ones, at every copy of rows
    with Before(lambda name: name == "index" and alive.append(sum(kv() is not None for kv in old))):
        cache.keep(torch.tensor([0, 2]))
    assert alive[-2:] == [2, 1]


def test_responses_are_sampled_as_often_as_their_log_prob_says(gpt):
    n, temperature = 20_000, 0.8
    ids, mask = generate(gpt, [[1, 2]] * n, 2, temperature, EOS, seeded(11))
    rows, counts = torch.cat([ids, mask], 1).unique(dim=0, return_counts=True)
    expected = n * sequence_logprob(gpt, rows[:, :4], rows[:, 4:].bool(), temperature).exp()
    likely = expected > 5
    freedom = int(likely.sum())
    chi2 = ((counts - expected) ** 2 / expected)[likely].sum()
    assert freedom > 20 and abs(chi2 - freedom) < 4 * (2 * freedom) ** 0.5


def test_responses_come_in_the_order_of_their_prompts_with_what_is_measured(gpt):
    def measure(ids, mask):
        return {"logp": token_logprob(gpt, ids, mask), "length": mask.sum(1)}

    got = respond(gpt, PROMPTS, 9, 1.0, EOS, seeded(3), 2, measure, 20)
    generator = seeded(3)
    for first in (0, 2, 4):                         # two prompts at once
        ids, mask = generate(gpt, PROMPTS[first:first + 2], 9, 1.0, EOS, generator)
        room = (0, 20 - ids.shape[1])
        rows = slice(first, first + 2)
        assert torch.equal(got["ids"][rows], F.pad(ids, room, value=EOS))
        assert torch.equal(got["mask"][rows], F.pad(mask, room))
        close(got["logp"][rows], F.pad(token_logprob(gpt, ids, mask), room))
        assert torch.equal(got["length"][rows], mask.sum(1))


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


# ---- folders that are not what they should be ------------------------------------------------------------

def with_config(**changes):
    def change(folder):
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return change


def with_pickle(write):
    def change(folder):
        (folder / "model.safetensors").unlink()
        write(folder / "pytorch_model.bin")
    return change


class Program:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def classifier(folder):
    ScalarGPT(GPT.from_pretrained(folder), EOS).save_pretrained(folder)


@pytest.mark.parametrize("change, words", [
    (lambda folder: (folder / "config.json").unlink(), "is neither one of gpt2,"),
    (lambda folder: (folder / "model.safetensors").unlink(), "is neither one of gpt2,"),
    (with_config(model_type="llama"), "llama"),
    (with_config(activation_function="relu"), "relu"),
    (with_config(vocab_size=14), "does not fit its config.json: .*wte.weight"),
    (with_config(n_layer=3), "does not fit its config.json: .*h.2."),
    (classifier, "does not fit its config.json: .*score.weight"),
    (with_pickle(lambda path: path.write_bytes(b"<html>not here</html>")), "pytorch_model.bin is corrupt"),
    (with_pickle(lambda path: torch.save(Program(path.with_name("it ran")), path)), "more than tensors")])
def test_a_folder_that_is_no_gpt2_is_refused_in_one_sentence(gpt, tmp_path, change, words):
    gpt.save_pretrained(tmp_path)
    change(tmp_path)
    with pytest.raises(UserError, match=words) as error:
        GPT.from_pretrained(tmp_path)
    assert str(tmp_path) in str(error.value) and "\n" not in str(error.value)
    assert not (tmp_path / "it ran").exists()       # no pickled program was executed
