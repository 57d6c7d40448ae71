"""The work that is timed: a function builds its model, then takes a step for each of `turns`.

Weights are random, rows are random and full: nothing is downloaded, and nobody gains by padding less.
"""
import contextlib
import copy
import multiprocessing
import re
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from exo import exo_pref_loss
from loop import Sums, adamw, update
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
    N: int = 16                                           # rows: in training, two responses to each prompt
    T: int = 128                                          # tokens of a row, the end-of-text (V - 1) included

    @property
    def config(self):
        return GPTConfig(self.n_layer, self.n_head, self.n_embd, self.V, self.T)


def transformers_gpt(case):
    from transformers import GPT2Config, GPT2LMHeadModel
    config = GPT2Config(n_layer=case.n_layer, n_head=case.n_head, n_embd=case.n_embd, vocab_size=case.V,
                        n_positions=case.T, bos_token_id=case.V - 1, eos_token_id=case.V - 1)
    return GPT2LMHeadModel(config)


def random_rows(case):
    """-> ids (N, T), the two rows of a prompt one after the other, the chosen one first"""
    ids = torch.randint(case.V - 1, (case.N, case.T), generator=torch.Generator().manual_seed(0))
    ids[1::2, :PROMPT] = ids[::2, :PROMPT]
    ids[:, -1] = case.V - 1
    return ids


def exo_step(case, turns):
    """EXO from pairs (Eq 18) with stored reference log-probs."""
    model, ids = GPT(case.config), random_rows(case)
    mask = torch.zeros_like(ids, dtype=torch.bool)
    mask[:, PROMPT:] = True
    with torch.no_grad():
        ref_logp = token_logprob(model, ids, mask).sum(1).view(-1, 2)             # (N, T) -> (B, 2)
    optimizer = adamw(model.parameters())
    for _ in turns:
        sums = Sums()
        logp = token_logprob(model, ids, mask).sum(1).view(-1, 2)                 # (N, T) -> (B, 2)
        loss = exo_pref_loss(logp, ref_logp, BETA, EPS) * len(logp)
        loss.backward()
        sums.add(len(logp), loss=loss)
        update([optimizer], LR, sums, "bench")


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
             for chosen, rejected in zip(rows[::2], rows[1::2])]
    dataset = datasets.Dataset.from_list(4 * pairs)       # an epoch is four times the same batch
    words = Tokenizer(models.WordLevel({"<eos>": case.V - 1}, unk_token="<eos>"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<eos>", pad_token="<eos>")
    model = transformers_gpt(case)
    reference = None if precompute else copy.deepcopy(model)
    with tempfile.TemporaryDirectory() as folder:
        settings = DPOConfig(
            folder, loss_type="exo_pair", beta=BETA, label_smoothing=EPS, precompute_ref_log_probs=precompute,
            per_device_train_batch_size=len(pairs), train_sampling_strategy="sequential", max_steps=10 ** 6,
            learning_rate=LR, bf16=False, use_cpu=True, gradient_checkpointing=False, logging_strategy="no",
            save_strategy="no", disable_tqdm=True)
        trainer = TrainerOnIds(model, reference, settings, train_dataset=dataset, processing_class=tokenizer,
                               callbacks=[Turn()])
        with contextlib.suppress(StopIteration):          # no more turns
            trainer.train()


def sampling(case, turns):
    model, prompts = GPT(case.config), random_rows(case)[:, :PROMPT]              # (N, PROMPT)
    for _ in turns:
        generate(model, prompts, case.T - PROMPT, TEMPERATURE)


def sampling_transformers(case, turns):
    model, prompts = transformers_gpt(case).eval(), random_rows(case)[:, :PROMPT]        # (N, PROMPT)
    for _ in turns:
        model.generate(prompts, attention_mask=torch.ones_like(prompts), do_sample=True, top_k=0,
                       temperature=TEMPERATURE, min_length=case.T, max_length=case.T, pad_token_id=case.V - 1)


EXO = {"this repository": exo_step, "TRL, live reference": trl_step,
       "TRL, precomputed reference": partial(trl_step, precompute=True)}
SAMPLING = {"this repository": sampling, "transformers": sampling_transformers}


# ---- a process of its own for each --------------------------------------------------------------------

def timed_turns(seconds):
    """Yields once per turn.  The first warms up; the CPU seconds of three more are appended to `seconds`."""
    yield
    while len(seconds) < 3 and sum(seconds) < 15:         # a slow one takes fewer turns
        start = time.process_time()
        yield
        seconds.append(time.process_time() - start)


def take_turns(work, case):
    """-> (CPU seconds of each turn, peak MiB)"""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    seconds = []
    work(case, timed_turns(seconds))
    status = Path("/proc/self/status").read_text()        # Linux; getrusage counts the parent's too
    return seconds, int(re.search(r"VmHWM:\s+(\d+)", status)[1]) / 2 ** 10


def measure(work, case):
    """take_turns in a new process."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(take_turns, work, case).result()
