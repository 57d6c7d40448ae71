"""The work that is timed: a function builds its model, then takes a step for each of `turns`.

Weights are random, rows are random and full: nothing is downloaded, and nobody gains by padding less.
"""
import contextlib
import copy
import tempfile
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F

from compute import Sums, adamw, update
from exo import exo_pref_loss
from model import GPT, GPTConfig, generate, token_logprob

LR, BETA, EPS, TEMPERATURE = 1e-6, 0.1, 1e-3, 0.8
PROMPT = 10                                               # tokens of a prompt


@dataclass
class Case:
    """The size of a model and of its batch."""
    name: str
    n_layer: int
    n_head: int
    n_embd: int
    V: int
    device: torch.device
    bf16: bool
    N: int = 16                                           # rows: in training, two responses to each prompt
    T: int = 128                                          # tokens of a row, the end-of-text (V - 1) included


def random_gpt(case):
    gpt = GPT(GPTConfig(case.n_layer, case.n_head, case.n_embd, case.V, case.T)).to(case.device)
    gpt.bf16 = case.bf16
    return gpt


def transformers_gpt(case):
    from transformers import GPT2Config, GPT2LMHeadModel
    return GPT2LMHeadModel(GPT2Config(
        n_layer=case.n_layer, n_head=case.n_head, n_embd=case.n_embd, vocab_size=case.V, n_positions=case.T,
        bos_token_id=case.V - 1, eos_token_id=case.V - 1))


def random_rows(case):
    """-> ids (N, T), the two rows of a prompt one after the other, the chosen one first"""
    ids = torch.randint(case.V - 1, (case.N, case.T), generator=torch.Generator().manual_seed(0))
    ids[1::2, :PROMPT] = ids[::2, :PROMPT]
    ids[:, -1] = case.V - 1
    return ids.to(case.device)


def all_logits_logprob(model, ids, mask):
    """token_logprob in nanoGPT's way: one cross-entropy on all logits.  (N, T), (N, T) -> (N, T-1)"""
    logits = model(ids)[:, :-1]                                                   # (N, T-1, V)
    nll = F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none")   # (N (T-1),)
    return -nll.view(len(ids), -1) * mask[:, 1:]                                  # (N, T-1)


def exo_step(case, turns, logprob=token_logprob):
    """EXO from pairs (Eq 18) with stored reference log-probs."""
    model = random_gpt(case)
    ids = random_rows(case)
    mask = torch.zeros_like(ids, dtype=torch.bool)
    mask[:, PROMPT:] = True
    with torch.no_grad():
        ref_logp = token_logprob(model, ids, mask).sum(1).view(-1, 2)             # (N, T) -> (B, 2)
    index = torch.arange(len(ref_logp))
    optimizer = adamw(model, LR)
    for _ in turns:
        sums = Sums()
        logp = logprob(model, ids, mask).sum(1).view(-1, 2)                       # (N, T) -> (B, 2)
        loss = exo_pref_loss(logp, ref_logp, BETA, EPS)
        (loss * len(index)).backward()
        sums.add(len(index), loss=loss * len(index))
        update(optimizer, LR, sums, index, "bench")


def language_model_step(case, turns, logprob=token_logprob):
    """Maximum likelihood on every token but a row's first."""
    model = random_gpt(case)
    ids = random_rows(case)
    mask = torch.ones_like(ids, dtype=torch.bool)
    mask[:, 0] = False
    index = torch.arange(case.N)
    optimizer = adamw(model, LR)
    for _ in turns:
        sums = Sums()
        loss = -logprob(model, ids, mask).sum()
        loss.backward()
        sums.add(case.N * (case.T - 1), loss=loss)
        update(optimizer, LR, sums, index, "bench")


def trl_step(case, turns, precompute=False):
    """TRL's DPOTrainer on the same rows, without its defaults of checkpointing and of bfloat16 on a CPU.

    It has a loop of its own: a turn runs from the start of one of its steps to the start of the next.
    """
    import datasets
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast, TrainerCallback
    from trl import DPOConfig, DPOTrainer

    class Turn(TrainerCallback):
        def on_step_begin(self, *args, **kwargs):
            next(turns)

    class TrainerOnIds(DPOTrainer):
        def _prepare_dataset(self, dataset, *args):       # it would tokenize: these are ids already
            return dataset

    rows = random_rows(case).tolist()
    pairs = [{"prompt_ids": chosen[:PROMPT], "chosen_ids": chosen[PROMPT:], "rejected_ids": rejected[PROMPT:]}
             for chosen, rejected in zip(rows[::2], rows[1::2], strict=True)]
    dataset = datasets.Dataset.from_list(4 * pairs)       # an epoch is four times the same batch
    words = Tokenizer(models.WordLevel({"<eos>": case.V - 1}, unk_token="<eos>"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<eos>", pad_token="<eos>")
    model = transformers_gpt(case)
    reference = None if precompute else copy.deepcopy(model)
    with tempfile.TemporaryDirectory() as folder:
        settings = DPOConfig(
            folder, loss_type="exo_pair", beta=BETA, label_smoothing=EPS, precompute_ref_log_probs=precompute,
            per_device_train_batch_size=len(pairs), train_sampling_strategy="sequential", max_steps=10 ** 6,
            learning_rate=LR, bf16=case.bf16, use_cpu=case.device.type == "cpu", gradient_checkpointing=False,
            logging_strategy="no", save_strategy="no", disable_tqdm=True)
        trainer = TrainerOnIds(model, reference, settings, train_dataset=dataset, processing_class=tokenizer,
                               callbacks=[Turn()])
        with contextlib.suppress(StopIteration):          # no more turns
            trainer.train()


def sampling(case, turns):
    model = random_gpt(case)
    prompts = random_rows(case)[:, :PROMPT].cpu()                                 # (N, PROMPT)
    for _ in turns:
        generate(model, prompts, case.T - PROMPT, TEMPERATURE)


@torch.no_grad()
def sampling_uncached(case, turns):
    """nanoGPT's way: for each token the whole row is read again."""
    model = random_gpt(case)
    for _ in turns:
        ids = random_rows(case)[:, :PROMPT]                                       # (N, PROMPT)
        while ids.shape[1] < case.T:
            logits = model.head(model.hidden(ids)[:, -1])                         # (N, V)
            token = torch.multinomial((logits / TEMPERATURE).softmax(-1), 1)      # (N, 1)
            ids = torch.cat([ids, token], dim=1)                                  # (N, t) -> (N, t+1)


def sampling_transformers(case, turns):
    dtype = torch.bfloat16 if case.bf16 else torch.float32
    model = transformers_gpt(case).to(case.device, dtype).eval()
    prompts = random_rows(case)[:, :PROMPT]                                       # (N, PROMPT)
    for _ in turns:
        model.generate(prompts, attention_mask=torch.ones_like(prompts), do_sample=True, top_k=0,
                       temperature=TEMPERATURE, min_length=case.T, max_length=case.T, pad_token_id=case.V - 1)


OURS, ALL_LOGITS, UNCACHED = "this repository", "all logits, as in nanoGPT", "no cache, as in nanoGPT"
EXO = {OURS: exo_step, ALL_LOGITS: partial(exo_step, logprob=all_logits_logprob),
       "TRL, live reference": trl_step, "TRL, precomputed reference": partial(trl_step, precompute=True)}
LANGUAGE_MODEL = {OURS: language_model_step,
                  ALL_LOGITS: partial(language_model_step, logprob=all_logits_logprob)}
SAMPLING = {OURS: sampling, UNCACHED: sampling_uncached, "transformers": sampling_transformers}
