"""The stages before alignment: SFT, the oracle, scored responses, the reward model, and what the limit is drawn from.

    reviews -> pi_sft -> 8 responses a prompt, with log pi_sft and oracle reward -> pairs -> reward model
       '-----> oracle -----^

Each leaves one artifact in its own folder of the run.  A stage whose artifact is there, made with the same settings from the
same upstream artifacts, is read and not run again.  Nothing here depends on the alignment method or on its seed.
"""
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

import data
from checkpoint import Log, begin, finish, resumable, rng
from evaluate import measure
from files import UserError, read_json, read_tensors, write_json, write_tensors
from model import GPT, GPTConfig, ScalarGPT, respond, sequence_logprob, token_logprob, trim
from optim import adamw, batch_at, cosine, descend


class Run:
    """What every stage needs: the settings, the folder, the device and its precision, the tokenizer and the reviews."""

    def __init__(self, cfg, device, bf16):
        self.cfg, self.folder, self.device, self.bf16 = cfg, Path(cfg.run), device, bf16
        self.encoding = data.tiny_encoding() if cfg.data == "tiny" else data.gpt2_encoding()
        self.eos_id = self.encoding.eot_token
        self.block_size = cfg.prompt_tokens + cfg.new_tokens

    def settings(self, stage):
        """The settings that this stage's artifact depends on, beside what it reads from upstream."""
        fields = self.cfg.__dataclass_fields__.items()
        return {"precision": "bf16" if self.bf16 else f"float32 {self.cfg.matmul}"} | {
            name: getattr(self.cfg, name) for name, field in fields if stage in field.metadata["stages"].split()}

    @cached_property
    def source(self):
        """What identifies the reviews."""
        return "grammar 1" if self.cfg.data == "tiny" else data.imdb_key(self.cfg.imdb, self.encoding)[1]

    @cached_property
    def reviews(self):
        """{"train", "test"}: reviews longer than a prompt, shuffled; in "train" the labelled ones come first."""
        cfg = self.cfg
        both = data.load_tiny(cfg.sft_reviews, cfg.test_reviews, self.encoding) if cfg.data == "tiny" \
            else data.load_imdb(cfg.imdb, self.encoding)
        for split, reviews in both.items():
            long = np.array([len(r) > cfg.prompt_tokens for r in reviews.ids], dtype=bool)
            if not long.all():
                print(f"{split}: {(~long).sum():,} of {len(reviews):,} reviews skipped: not longer than a prompt")
            order = torch.randperm(len(reviews), generator=rng("reviews", split)).numpy()
            order = order[long[order]]
            order = order[np.argsort(reviews.label[order] < 0, kind="stable")]
            both[split] = reviews.pick(order)
        labelled = int((both["train"].label >= 0).sum())
        for flag, asked, there in (("--sft-reviews", cfg.sft_reviews, len(both["train"])), ("--prompts", cfg.prompts, labelled),
                                   ("--eval-prompts", cfg.eval_prompts, len(both["test"]))):
            if asked > there:
                raise UserError(f"{flag} asks for {asked:,} reviews, and there are {there:,}: lower it, or provide more reviews")
        return both

    def prompts(self, split, n):
        """The first ids of the first n reviews of a split, a list of lists."""
        return [review[:self.cfg.prompt_tokens].tolist() for review in self.reviews[split].ids[:n]]

    def rows(self, reviews):
        ids, mask = data.rows(reviews, self.cfg.prompt_tokens, self.block_size, self.eos_id)
        return ids.to(self.device), mask.to(self.device)             # (N, T), (N, T)

    def policy(self, folder):
        gpt = GPT.from_pretrained(folder).to(self.device)
        gpt.bf16 = self.bf16
        return gpt

    def scorer(self, folder):
        scorer = ScalarGPT.from_pretrained(folder, self.eos_id).to(self.device)
        scorer.transformer.bf16 = self.bf16
        return scorer

    def at_once(self, rows_each=1):
        """How many examples of rows_each rows make a micro-batch of at most --micro-batch-size rows; 0: all of them."""
        return max(1, self.cfg.micro_batch_size // rows_each) if self.cfg.micro_batch_size else 0


def fit(run, folder, model, steps, batch, lr, length, loss_sum):
    """Trains `model` for a stage: AdamW, cosine, batches of similar length, resumable; metrics.csv has a row a step."""
    optimizer, log = adamw(model, lr), Log(folder / "metrics.csv")
    state = {"model": model, "optimizer": optimizer, "log": log}
    for step, bar in resumable(folder, state, steps, run.cfg.save_every, folder.name):
        index = batch_at(step, batch, length, folder.name)
        stats = descend(optimizer, lr * cosine(step, steps), index, run.at_once(), loss_sum, f"{folder.name}, step {step + 1}")
        log.write(step=step + 1, **stats)
        bar.set_postfix({k: f"{stats[k]:.3f}" for k in ("loss", "accuracy") if k in stats}, refresh=False)


def sft(run):
    """pi_sft: maximum likelihood of the reviews' responses (prompt tokens carry no loss: official code).  -> its folder"""
    cfg, folder = run.cfg, run.folder / "sft"
    if begin(folder, run.settings("sft") | {"reviews": run.source}):
        return folder
    reviews = run.reviews["train"].ids[:cfg.sft_reviews]
    if cfg.init:
        gpt = GPT.from_pretrained(cfg.init)
        for what, there, needed in (("positions (its block size)", gpt.config.block_size, run.block_size),
                                    ("tokens in its vocabulary", gpt.config.vocab_size, run.encoding.n_vocab)):
            if there < needed:
                raise UserError(f"--init {cfg.init} has {there:,} {what}, {needed:,} are needed: choose other weights, or "
                                "lower --prompt-tokens and --new-tokens")
    else:
        torch.manual_seed(0)
        gpt = GPT(GPTConfig(cfg.n_layer, cfg.n_head, cfg.n_embd, run.encoding.n_vocab, run.block_size))
    gpt = gpt.to(run.device)
    gpt.bf16 = run.bf16

    def loss_sum(index):
        ids, mask = run.rows([reviews[i] for i in index])
        return {"loss": -token_logprob(gpt, ids, mask).sum()}, int(mask.sum())

    length = torch.tensor([min(len(r), run.block_size) for r in reviews])
    fit(run, folder, gpt, cfg.sft_steps, cfg.sft_batch, cfg.sft_lr, length, loss_sum)
    total = count = 0
    with torch.no_grad():
        for index in torch.arange(min(1000, len(run.reviews["test"]))).split(50):
            ids, mask = run.rows([run.reviews["test"].ids[i] for i in index])
            total, count = total - float(token_logprob(gpt, ids, mask).sum()), count + int(mask.sum())
    write_json(folder / "report.json", {"test_perplexity": float(np.exp(total / count)), "test_nats_per_token": total / count})
    finish(folder, **{"model.safetensors": gpt.save_pretrained(folder, run.eos_id)})
    return folder


def oracle(run):
    """The oracle: a classifier of the reviews' labels from pi_sft's weights; its log-odds are the reward.  -> its folder"""
    cfg, folder, upstream = run.cfg, run.folder / "oracle", sft(run)
    if begin(folder, run.settings("oracle"), [upstream]):
        return folder
    train, test = (reviews.pick(np.flatnonzero(reviews.label >= 0)) for reviews in run.reviews.values())
    scorer = ScalarGPT(run.policy(upstream), run.eos_id).to(run.device)

    def logits_and_labels(reviews, index):
        label = torch.tensor(reviews.label[index.numpy()], device=run.device).float()       # (b,)
        return scorer(*run.rows([reviews.ids[i] for i in index])), label

    def loss_sum(index):
        logit, label = logits_and_labels(train, index)
        return {"loss": F.binary_cross_entropy_with_logits(logit, label, reduction="sum"),
                "accuracy": ((logit > 0) == (label > 0)).sum()}, len(index)

    length = torch.tensor([min(len(r), run.block_size) for r in train.ids])
    fit(run, folder, scorer, cfg.oracle_steps, cfg.oracle_batch, cfg.oracle_lr, length, loss_sum)
    with torch.no_grad():
        found = [logits_and_labels(test, index) for index in torch.arange(len(test)).split(100)]
    logit, label = (torch.cat(column) for column in zip(*found))
    write_json(folder / "report.json", {"test_accuracy": float(((logit > 0) == (label > 0)).float().mean()),
                                        "test_log_odds_sd": float(logit.std())})
    finish(folder, **{"model.safetensors": scorer.save_pretrained(folder)})
    return folder


class Table:
    """Columns of rows that come a chunk at a time, as part of a loop's state."""

    def __init__(self):
        self.columns = {}

    def append(self, **new):
        self.columns = {k: torch.cat([self.columns[k], v]) if k in self.columns else v for k, v in new.items()}

    def state_dict(self):
        return self.columns

    def load_state_dict(self, columns):
        self.columns = columns


def draw(run, folder, prompts, each, text=True):
    """`each` responses of pi_sft to every prompt with their oracle reward.  -> {name: (P, each, ...)}, all on the CPU

    reward; with `text` also ids, mask, both padded to the block, and ref_logp by the function that training uses.
    """
    cfg, table = run.cfg, Table()
    policy, score = run.policy(run.folder / "sft"), run.scorer(run.folder / "oracle")
    repeated = [p for p in prompts for _ in range(each)]
    chunks = [repeated[i:i + cfg.sample_batch] for i in range(0, len(repeated), cfg.sample_batch)]

    def columns(ids, mask):
        reward = {"reward": score(ids, mask)}                                               # (n,)
        return reward | {"ref_logp": sequence_logprob(policy, ids, mask, cfg.temperature)} if text else reward

    for step, _ in resumable(folder, {"table": table}, len(chunks), max(1, len(chunks) // 8), folder.name):
        new = respond(policy, chunks[step], cfg.new_tokens, cfg.temperature, run.eos_id, rng(folder.name, step), cfg.sample_batch,
                      columns)
        table.append(**(new | {"ids": new["ids"].int()} if text else {"reward": new["reward"]}))
    return {k: v.view(len(prompts), each, *v.shape[1:]) for k, v in table.columns.items()}


def responses(run):
    """Responses of pi_sft to the training prompts, their log pi_sft and oracle reward.  -> its folder"""
    cfg, folder, upstream = run.cfg, run.folder / "responses", [sft(run), oracle(run)]
    if not begin(folder, run.settings("responses"), upstream):
        table = draw(run, folder, run.prompts("train", cfg.prompts), cfg.responses)
        finish(folder, **{"responses.safetensors": write_tensors(folder / "responses.safetensors", table)})
    return folder


def limit(run):
    """Oracle rewards of many responses of pi_sft to the first test prompts: the limit and best-of-n come from them."""
    cfg, upstream = run.cfg, [sft(run), oracle(run)]
    folder = run.folder / f"limit-{cfg.limit_prompts}x{cfg.limit_responses}"
    if not begin(folder, run.settings("limit"), upstream):
        table = draw(run, folder, run.prompts("test", cfg.limit_prompts), cfg.limit_responses, text=False)
        finish(folder, **{"rewards.safetensors": write_tensors(folder / "rewards.safetensors", table)})
    return folder


def reference(run):
    """pi_sft evaluated on the test prompts, as every checkpoint is: step 0 of every method.  -> its folder"""
    folder, upstream = run.folder / "reference", [sft(run), oracle(run)]
    if not begin(folder, run.settings("reference"), upstream):
        policy, score = run.policy(upstream[0]), run.scorer(upstream[1])
        found = measure(run, policy, policy, score, rng("reference"))
        found["data_ids"], found["data_mask"], found["data_reward"] = written(run, score)
        finish(folder, **{"samples.safetensors": write_tensors(folder / "samples.safetensors", found)})
    return folder


@torch.no_grad()
def written(run, score):
    """The test prompts' own continuations, as their authors wrote them.  -> ids, mask (P, T), reward (P,), on the CPU"""
    ids, mask = run.rows(run.reviews["test"].ids[:run.cfg.eval_prompts])
    reward = torch.cat([score(*part) for part in zip(ids.split(64), mask.split(64))])
    return ids.int().cpu(), mask.cpu(), reward.cpu()


def winners(run, reward, *names):
    """The winner's column of each pair, (P, 2) -> (P,): the higher reward, or Bernoulli by the difference (Bradley-Terry)."""
    if run.cfg.labels == "argmax":                                   # official code: no noise
        return reward.argmax(1)
    uniform = torch.rand(len(reward), generator=rng("winner", *names))
    return (uniform > torch.sigmoid(reward[:, 0] - reward[:, 1])).long()


def reward_model(run):
    """A Bradley-Terry reward model from pi_sft's weights, on the pairs; it scores all responses.  -> its folder

    Pairs leave the reward's shift and scale free: it is shifted to mean 0 and scaled to the oracle's standard deviation within
    prompts, both on the responses to *training* prompts.
    """
    cfg, folder, upstream = run.cfg, run.folder / "reward_model", [sft(run), responses(run)]
    if begin(folder, run.settings("reward_model"), upstream):
        return folder
    table = read_tensors(upstream[1] / "responses.safetensors")[0]
    winner = winners(run, table["reward"][:, :2], "train")
    scorer = ScalarGPT(run.policy(upstream[0]), run.eos_id).to(run.device)

    def scores(index, columns):
        ids, mask = trim(*(table[k][index][:, columns].flatten(0, 1).to(run.device) for k in ("ids", "mask")))  # (b K, T)
        return scorer(ids.long(), mask).view(len(index), -1)                                # (b, K)

    def loss_sum(index):
        score, win = scores(index, [0, 1]), winner[index].to(run.device)
        margin = (score[:, 0] - score[:, 1]) * (1 - 2 * win)                                # (b,) winner's minus loser's
        return {"loss": -F.logsigmoid(margin).sum(), "accuracy": (margin > 0).sum()}, len(index)

    length = table["mask"][:, :2].sum(2).amax(1)
    fit(run, folder, scorer, cfg.rm_steps, cfg.rm_batch, cfg.rm_lr, length, loss_sum)
    with torch.no_grad():
        parts = torch.arange(cfg.prompts).split(max(1, cfg.sample_batch // cfg.responses))
        score = torch.cat([scores(index, range(cfg.responses)).cpu() for index in parts])
    shift, scale = float(score.mean()), float(within_prompt_sd(table["reward"]) / within_prompt_sd(score))
    fresh = [table["reward"][:, 2] > table["reward"][:, 3], score[:, 2] > score[:, 3]]      # a pair that it was not trained on
    centred = [x - x.mean(1, keepdim=True) for x in (score, table["reward"])]
    write_json(folder / "report.json", {
        "shift": shift, "scale": scale, "accuracy_on_fresh_pairs": float((fresh[0] == fresh[1]).float().mean()),
        "within_prompt_r2": float(torch.corrcoef(torch.stack([x.flatten() for x in centred]))[0, 1] ** 2)})
    rewards = write_tensors(folder / "rewards.safetensors", {"reward": (score - shift) * scale})
    finish(folder, **{"model.safetensors": scorer.save_pretrained(folder), "rewards.safetensors": rewards})
    return folder


def reward_function(run, folder):
    """The reward model as a reward function (ids, mask) -> (N,), shifted and scaled as in training."""
    scorer, report = run.scorer(folder), read_json(folder / "report.json")
    return lambda ids, mask: (scorer(ids, mask) - report["shift"]) * report["scale"]


def within_prompt_sd(reward):
    """(P, K) -> the standard deviation of a response's reward around its prompt's mean."""
    return reward.var(1, correction=1).mean().sqrt()
