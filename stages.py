"""The stages before alignment: SFT, the oracle, scored responses, the reward model, and what the limit is drawn from.

    reviews -> pi_sft -> 8 responses a prompt, with log pi_sft and oracle reward -> pairs -> reward model
       '-----> oracle -----^

A file of preferences (--data) brings its own responses, and there is no oracle: the reward model is the judge.

    chosen texts -> pi_sft -> log pi_sft of the file's responses -> pairs -> reward model

Each leaves one artifact in its own folder of the run.  A stage whose artifact is there, made with the same settings from the
same upstream artifacts, is read and not run again.  Nothing here depends on the alignment method or on its seed.
"""
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

import data
import preferences
from checkpoint import Log, begin, finish, resumable, rng
from evaluate import measure
from files import UserError, read_json, read_tensors, write_json, write_tensors
from model import GPT, GPTConfig, ScalarGPT, respond, sequence_logprob, token_logprob, trim
from optim import adamw, batch_at, cosine, descend


class Run:
    """What every stage needs: the settings, the folder, the device and its precision, the tokenizer and the reviews."""

    def __init__(self, cfg, device, bf16):
        self.cfg, self.folder, self.device, self.bf16 = cfg, Path(cfg.run), device, bf16
        self.encoding = data.tiny_encoding() if cfg.tokenizer == "tiny" else data.gpt2_encoding()
        self.eos_id = self.encoding.eot_token
        self.own = cfg.data not in data.BUILT_IN                      # a user's file of preferences

    @property
    def block_size(self):
        return self.cfg.prompt_tokens + self.cfg.new_tokens

    def settings(self, stage):
        """The settings that this stage's artifact depends on, beside what it reads from upstream."""
        fields = self.cfg.__dataclass_fields__.items()
        return {"precision": "bf16" if self.bf16 else f"float32 {self.cfg.matmul}"} | {
            name: getattr(self.cfg, name) for name, field in fields if stage in field.metadata["stages"].split()}

    @cached_property
    def source(self):
        """What identifies the reviews."""
        if self.own:
            return [data.file_sha256(path) for path in (self.cfg.data, self.cfg.eval_data) if path]
        return "grammar 1" if self.cfg.data == "tiny" else data.imdb_key(self.cfg.imdb, self.encoding)[1]

    @cached_property
    def reviews(self):
        """{"train", "test"}: reviews longer than a prompt, shuffled; in "train" the labelled ones come first.

        Of a file of preferences: the prompts with their best responses, in the file's order.
        """
        cfg = self.cfg
        if self.own:
            return {split: data.Reviews([np.array(row.prompt + row.responses[0], dtype=np.int32) for row in rows],
                                        np.full(len(rows), -1, np.int8), np.array([len(row.prompt) for row in rows]))
                    for split, rows in self.preferences.items()}
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
            both[split].start = cfg.prompt_tokens
        labelled = int((both["train"].label >= 0).sum())
        for flag, asked, there in (("--sft-reviews", cfg.sft_reviews, len(both["train"])), ("--prompts", cfg.prompts, labelled),
                                   ("--eval-prompts", cfg.eval_prompts, len(both["test"])) if cfg.eval_split == "test" else
                                   ("--prompts with --eval-prompts", cfg.prompts + cfg.eval_prompts, len(both["train"]))):
            if asked > there:
                raise UserError(f"{flag} asks for {asked:,} reviews, and there are {there:,}: lower it, or provide more reviews")
        return both

    @property
    def evaluated(self):
        """Reviews whose prompts policies are evaluated on: the test split's, or training ones from the end."""
        train = self.reviews["train"]
        return self.reviews["test"] if self.cfg.eval_split == "test" else train.pick(range(len(train))[::-1])

    def prompts(self, reviews, n):
        """The first ids of the first n reviews, a list of lists."""
        reviews = reviews.pick(range(n))
        return [review[:start].tolist() for review, start in zip(reviews.ids, reviews.start)]

    def train_prompts(self):
        """Those that the methods align on."""
        return self.prompts(self.reviews["train"], self.cfg.prompts)

    @cached_property
    def preferences(self):
        """{"train", "test"}: rows of the user's file, the best response first, the worst second."""
        cfg = self.cfg
        rows = preferences.read_preferences(cfg.data, self.encoding, cfg.prompt_tokens or None)
        if cfg.eval_data:
            both = [rows, preferences.read_preferences(cfg.eval_data, self.encoding, cfg.prompt_tokens or None)]
            if len({(row.rewards is None, len(row.responses)) for rows in both for row in rows}) > 1:
                raise UserError(f"{cfg.data} and {cfg.eval_data} must hold rows of the same kind, with as many responses each")
        else:
            both = preferences.split(rows, cfg.held_out)
        return {split: preferences.best_first(rows) for split, rows in zip(("train", "test"), both)}

    @property
    def scored(self):
        """Whether a user's file gives rewards, not only pairs."""
        return self.own and self.preferences["train"][0].rewards is not None

    def rows(self, reviews):
        ids, mask = data.rows(reviews.ids, reviews.start, self.block_size, self.eos_id)
        return ids.to(self.device), mask.to(self.device)             # (N, T), (N, T)

    def policy(self, folder):
        return self.placed(GPT.from_pretrained(folder))

    def placed(self, gpt):
        """A model on the device, in its arithmetic, compiled a block at a time where --compile asks for it."""
        gpt = gpt.to(self.device)
        gpt.bf16 = self.bf16
        if self.cfg.compile:
            for block in gpt.h:
                block.compile(dynamic=True)                          # rows of every length by one program
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
    reviews = run.reviews["train"].pick(range(cfg.sft_reviews))
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
    gpt = run.placed(gpt)

    def loss_sum(index):
        ids, mask = run.rows(reviews.pick(index.tolist()))
        count = int(mask.sum())
        padding = mask.new_tensor(ids.numel() - count - int(reviews.start[index.numpy()].sum()), dtype=torch.float)
        return {"loss": -token_logprob(gpt, ids, mask).sum(), "padding": padding}, count    # padding: positions a counted token

    length = torch.tensor([min(len(r), run.block_size) for r in reviews.ids])
    fit(run, folder, gpt, cfg.sft_steps, cfg.sft_batch, cfg.sft_lr, length, loss_sum)
    total = count = 0
    with torch.no_grad():
        for index in torch.arange(min(1000, len(run.reviews["test"]))).split(50):
            ids, mask = run.rows(run.reviews["test"].pick(index.tolist()))
            total, count = total - float(token_logprob(gpt, ids, mask).sum()), count + int(mask.sum())
    write_json(folder / "report.json", {"test_perplexity": float(np.exp(total / count)), "test_nats_per_token": total / count})
    finish(folder, **{"model.safetensors": gpt.save_pretrained(folder, run.eos_id)})
    return folder


def arithmetic(device, matmul):
    """Sets how PyTorch multiplies float32 matrices; True where other products are to be in bfloat16, which the GPU must have."""
    bf16 = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    torch.set_float32_matmul_precision("high" if bf16 else matmul)   # beside bfloat16 the heads' are left: by TF32
    return bf16


def judge(run, folder=None):
    """The reward that everything is evaluated by, (ids, mask) -> (N,): the oracle's, or for a user's file the reward model's.

    folder: where it lies, made where it is not given.
    """
    folder = folder or oracle(run)
    return reward_function(run, folder) if run.own else run.scorer(folder)


def oracle(run):
    """The oracle: a classifier of the reviews' labels from pi_sft's weights; its log-odds are the reward.  -> its folder

    There is none for a user's file: the reward model stands in its place.
    """
    if run.own:
        return reward_model(run)
    cfg, folder, upstream = run.cfg, run.folder / "oracle", sft(run)
    if begin(folder, run.settings("oracle"), [upstream]):
        return folder
    train, test = (reviews.pick(np.flatnonzero(reviews.label >= 0)) for reviews in run.reviews.values())
    scorer = ScalarGPT(run.policy(upstream), run.eos_id).to(run.device)

    def logits_and_labels(reviews, index):
        label = torch.tensor(reviews.label[index.numpy()], device=run.device).float()       # (b,)
        return scorer(*run.rows(reviews.pick(index.tolist()))), label

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
    """`each` responses of pi_sft to every prompt with the judge's reward.  -> {name: (P, each, ...)}, all on the CPU

    reward; with `text` also ids, mask, both padded to the block, and ref_logp by the function that training uses.
    """
    cfg, table = run.cfg, Table()
    policy, score = run.policy(run.folder / "sft"), judge(run)
    repeated = [p for p in prompts for _ in range(each)]
    chunks = [repeated[i:i + cfg.sample_batch] for i in range(0, len(repeated), cfg.sample_batch)]

    def columns(ids, mask):
        reward = {"reward": score(ids, mask)}                                               # (n,)
        return reward | {"ref_logp": sequence_logprob(policy, ids, mask, cfg.temperature)} if text else reward

    for step, _ in resumable(folder, {"table": table}, len(chunks), max(1, len(chunks) // 8), folder.name):
        new = respond(policy, chunks[step], cfg.new_tokens, cfg.temperature, run.eos_id, rng(folder.name, step), cfg.sample_batch,
                      columns, run.block_size)
        table.append(**(new | {"ids": new["ids"].int()} if text else {"reward": new["reward"]}))
    return {k: v.view(len(prompts), each, *v.shape[1:]) for k, v in table.columns.items()}


def responses(run):
    """Responses of pi_sft to the training prompts, their log pi_sft and oracle reward; or a user's own.  -> its folder"""
    cfg, folder, upstream = run.cfg, run.folder / "responses", [sft(run), *([] if run.own else [oracle(run)])]
    if not begin(folder, run.settings("responses"), upstream):
        table = preferences.table(run, "train") if run.own else draw(run, folder, run.train_prompts(), cfg.responses)
        finish(folder, **{"responses.safetensors": write_tensors(folder / "responses.safetensors", table)})
    return folder


def answers(run):
    """A response of pi_sft to each training prompt, which XPO's own are compared with; a user's file has none.  -> its folder"""
    if not run.own:
        return responses(run)
    folder, upstream = run.folder / "answers", [sft(run), oracle(run)]
    if not begin(folder, run.settings("responses"), upstream):
        table = draw(run, folder, run.train_prompts(), 1)
        finish(folder, **{"responses.safetensors": write_tensors(folder / "responses.safetensors", table)})
    return folder


def limit(run):
    """Oracle rewards of many responses of pi_sft to the first prompts of evaluation: the limit and best-of-n come from them."""
    cfg, upstream = run.cfg, [sft(run), oracle(run)]
    folder = run.folder / f"limit-{cfg.limit_prompts}x{cfg.limit_responses}"
    if not begin(folder, run.settings("limit"), upstream):
        table = draw(run, folder, run.prompts(run.evaluated, cfg.limit_prompts), cfg.limit_responses, text=False)
        finish(folder, **{"rewards.safetensors": write_tensors(folder / "rewards.safetensors", table)})
    return folder


def reference(run):
    """pi_sft evaluated on the same prompts as every checkpoint: step 0 of every method.  -> its folder"""
    folder, upstream = run.folder / "reference", [sft(run), oracle(run)]
    if not begin(folder, run.settings("reference"), upstream):
        policy, score = run.policy(upstream[0]), judge(run)
        found = measure(run, policy, policy, score, rng("reference"))
        found["data_ids"], found["data_mask"], found["data_reward"] = written(run, score)
        finish(folder, **{"samples.safetensors": write_tensors(folder / "samples.safetensors", found)})
    return folder


@torch.no_grad()
def written(run, score):
    """Those prompts' own continuations, as their authors wrote them.  -> ids, mask (P, T), reward (P,), on the CPU"""
    ids, mask = run.rows(run.evaluated.pick(range(run.cfg.eval_prompts)))
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
    prompts, both on the responses to *training* prompts.  For a user's file to that of its rewards; a file of pairs has none.
    """
    cfg, folder, upstream = run.cfg, run.folder / "reward_model", [sft(run), responses(run)]
    if begin(folder, run.settings("reward_model"), upstream):
        return folder
    table = read_tensors(upstream[1] / "responses.safetensors")[0]
    winner = winners(run, table["reward"][:, :2], "train")
    scorer = ScalarGPT(run.policy(upstream[0]), run.eos_id).to(run.device)

    def scores(table, index, columns):
        ids, mask = trim(*(table[k][index][:, columns].flatten(0, 1).to(run.device) for k in ("ids", "mask")))  # (b K, T)
        return scorer(ids.long(), mask).view(len(index), -1)                                # (b, K)

    def loss_sum(index):
        score, win = scores(table, index, [0, 1]), winner[index].to(run.device)
        margin = (score[:, 0] - score[:, 1]) * (1 - 2 * win)                                # (b,) winner's minus loser's
        return {"loss": -F.logsigmoid(margin).sum(), "accuracy": (margin > 0).sum()}, len(index)

    length = table["mask"][:, :2].sum(2).amax(1)
    fit(run, folder, scorer, cfg.rm_steps, cfg.rm_batch, cfg.rm_lr, length, loss_sum)

    @torch.no_grad()
    def all_scores(table):
        P, K = table["reward"].shape
        return torch.cat([scores(table, index, range(K)).cpu() for index in torch.arange(P).split(max(1, cfg.sample_batch // K))])

    score = all_scores(table)                                                               # (P, K)
    shift, scale = float(score.mean()), float(within_prompt_sd(table["reward"]) / within_prompt_sd(score))
    if run.own:
        held_out = all_scores(preferences.table(run, "test"))
        report = {"accuracy_on_held_out_rows": float((held_out[:, 0] > held_out[:, 1]).float().mean())}
        scale = scale if run.scored else 1.0
    else:
        fresh = [x[:, 2] > x[:, 3] for x in (table["reward"], score)]                       # a pair that it was not trained on
        centred = [(x - x.mean(1, keepdim=True)).flatten() for x in (score, table["reward"])]
        report = {"accuracy_on_fresh_pairs": float((fresh[0] == fresh[1]).float().mean()),
                  "within_prompt_r2": float(torch.corrcoef(torch.stack(centred))[0, 1] ** 2)}
    write_json(folder / "report.json", {"shift": shift, "scale": scale} | report)
    rewards = write_tensors(folder / "rewards.safetensors", {"reward": (score - shift) * scale})
    finish(folder, **{"model.safetensors": scorer.save_pretrained(folder), "rewards.safetensors": rewards})
    return folder


def reward_function(run, folder):
    """The reward model as a reward function (ids, mask) -> (N,), shifted and scaled as in training."""
    scorer, report = run.scorer(folder), read_json(folder / "report.json")
    return lambda ids, mask: (scorer(ids, mask) - report["shift"]) * report["scale"]


def prompts_of(ids, mask):
    """The prompts of rows (N, T), (N, T) -> N id lists."""
    return [row[:start].tolist() for row, start in zip(ids, mask.int().argmax(1))]


def within_prompt_sd(reward):
    """(P, K) -> the standard deviation of a response's reward around its prompt's mean."""
    return reward.var(1, correction=1).mean().sqrt()
