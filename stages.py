"""A run, and its stages before alignment: SFT, oracle, scored responses, reward model, the limit's samples.

    reviews -> pi_sft -> responses to each prompt, with log pi_sft and oracle reward -> pairs -> reward model
       '-----> oracle -----^

A preference file (--data) brings its own responses and no oracle: a reward model of its pairs is the judge.
Each stage leaves a folder.  With the same settings it is read, not run again.
"""
import functools
import math
from pathlib import Path

import torch
import torch.nn.functional as F

import data
from evaluate import sequence_kl, wins, within_prompt_sd
from loop import (
    Log, Sums, UserError, adamw, batch_by_length, begin, cosine, file_sha256, finish, join_processes, muon,
    my_rows, read_json, read_tensors, resumable, rng, update, write_json, write_tensors)
from model import GPT, GPTConfig, ScalarGPT, pretrained_folder, respond, sequence_logprob, token_logprob, trim
from settings import Config

# The folders before alignment, and the stages whose settings they depend on.
STAGES = {name: [name] for name in ("sft", "oracle", "responses", "reward_model", "reference", "limit")}
STAGES["limit-and-model"] = ["limit", "reward_model"]


class Run:
    """What every stage needs: settings, folder, device and precision, tokenizer, reviews, models."""

    def __init__(self, cfg):
        self.cfg, self.folder = cfg, Path(cfg.run)
        device = cfg.device or ("cuda" if torch.cuda.is_available() else "cpu")
        try:
            self.device = join_processes(torch.device(device))
            torch.zeros(1, device=self.device)
        except (RuntimeError, AssertionError) as error:
            raise UserError(f"--device {device} unavailable: {str(error).splitlines()[0]}") from error
        self.bf16 = self.device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
        if self.device.type == "cuda":
            torch.set_float32_matmul_precision("high")    # TF32 for the heads' float32 products
            torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False     # sums in float32
            torch.backends.cuda.enable_cudnn_sdp(False)   # it plans for 20 to 40 ms at every new shape
        kind, _, size = cfg.tokenizer.partition("-")
        self.encoding = data.tiny_encoding() if kind == "tiny" else data.gpt2_encoding(int(size or 50_256))
        self.eos_id = self.encoding.eot_token
        if cfg.own:
            self.preferences, cfg.prompt_tokens, cfg.new_tokens = data.read_preferences(
                cfg.data, self.encoding, cfg.prompt_tokens, cfg.new_tokens)
            cfg.prompts = len(self.preferences["train"])
            K = len(self.preferences["train"][0].responses)
            cfg.num_candidates, cfg.rm_responses = min(cfg.num_candidates, K), min(cfg.rm_responses, K)
        self.T = cfg.prompt_tokens + cfg.new_tokens

    def rng(self, *names):
        return rng(self.cfg.pipeline, *names)

    @functools.cached_property
    def sources(self):
        """{setting: sha256 of the files that it names}: the same path may hold other content tomorrow."""
        cfg = self.cfg
        found = {"imdb": data.imdb_archives(cfg.imdb)[1] if cfg.data == "imdb" else []}
        if cfg.own:
            found["data"] = file_sha256(cfg.data)
        if cfg.init:
            found["init"] = file_sha256(pretrained_folder(cfg.init) / "model.safetensors")
        return found

    def begin(self, name, *stages):
        """-> a stage's folder, whether it is finished.  stages: whose settings count, by default `name`'s"""
        settings = self.cfg.of(*stages or [name]) | self.sources | {"bf16": self.bf16}
        if settings.get("judge"):
            settings["judge"] += " " + file_sha256(self.cfg.judge.rpartition(":")[0])
        return self.folder / name, begin(self.folder / name, settings)

    def refuse_changes(self):
        """UserError if a stage before alignment was made with other settings."""
        for path in self.folder.glob("*/stage.json"):
            if path.parent.name in STAGES:
                self.begin(path.parent.name, *STAGES[path.parent.name])

    @functools.cached_property
    def reviews(self):
        """Reviews longer than a prompt, shuffled, the labeled ones first.  {split: Reviews}

        "evaluated": those on whose prompts policies are evaluated.
        """
        cfg = self.cfg
        if cfg.own:
            reviews = {split: data.best_responses(own) for split, own in self.preferences.items()}
        else:
            if cfg.data == "tiny":
                both = data.load_tiny(cfg.sft_reviews, 4_000, self.encoding)
            else:
                both = data.load_imdb(cfg.imdb, self.sources["imdb"], self.encoding)
            for split, each in both.items():
                if not {0, 1} <= set(each.label):
                    raise UserError(f"{split} lacks positive or negative reviews: give --imdb all archives")
            reviews = {split: each.shuffled(cfg.prompt_tokens, self.rng("reviews", split))
                       for split, each in both.items()}
        reviews["evaluated"] = reviews["test"]
        if cfg.eval_split == "train":                     # the last ones: of IMDB, no method aligns on them
            reviews["evaluated"] = reviews["train"].pick(range(len(reviews["train"]))[::-1])
        return reviews

    def prompts(self, split, n):
        """The first ids of the first n reviews of a split.  -> n id lists"""
        reviews = self.reviews[split]
        return [list(ids[:length]) for ids, length in zip(reviews.ids[:n], reviews.prompt_length)]

    def rows(self, reviews):
        ids, mask = data.padded_rows(reviews.ids, reviews.prompt_length, self.T, self.eos_id)
        return ids.to(self.device), mask.to(self.device)                                 # (N, t), (N, t)

    def at_once(self, rows_each, n):
        """How many of n examples, each of `rows_each` rows, make a micro-batch."""
        return max(1, self.cfg.micro_batch // rows_each) if self.cfg.micro_batch else n

    def gpt(self, folder):
        gpt = GPT.from_pretrained(folder).to(self.device)
        gpt.bf16 = self.bf16
        return gpt

    def scorer(self, folder):
        scorer = ScalarGPT(self.gpt(self.folder / "sft"), self.eos_id).to(self.device)
        scorer.load_state_dict(read_tensors(folder / "scorer.safetensors"))
        return scorer


def open_run(folder):
    """The run in a folder that train.py has left, in the precision that it was trained in."""
    path = Path(folder) / "config.json"
    settings = read_json(path) if path.exists() else {}
    if "preset" not in settings:
        raise UserError(f"{folder} is not a run folder: train.py makes one")
    run = Run(Config(**settings | {"run": str(folder), "device": ""}))
    made = read_json(run.folder / "sft" / "stage.json")["settings"]
    run.bf16, run.sources = made["bf16"], {name: made[name] for name in ("data", "imdb", "init")}
    return run


def finished_at(path):
    """Whether the stage of this stage.json is finished."""
    return path.exists() and read_json(path)["finished"]


def alignments(run):
    """{name without the seed: folders of the finished alignments}"""
    groups = {}
    for path in sorted(run.folder.glob("*-s*/stage.json")):
        if finished_at(path):
            groups.setdefault(path.parent.name.rpartition("-s")[0], []).append(path.parent)
    return groups


def stage(make):
    """Decorator: make(run, folder) leaves an artifact in its folder, once.  -> the function run -> folder"""
    @functools.wraps(make)
    def made(run):
        folder, finished = run.begin(make.__name__)
        if not finished:
            make(run, folder)
            finish(folder)
        return folder
    return made


# ---- SFT, the oracle, the reward model: three losses in one loop --------------------------------------

def trained(run, folder, model, optimizers, loss_of, lr, steps, batch_of, rows_each=1):
    """Trains a model for a stage.

    loss_of: indices of some examples -> {loss: its sum, what is logged}, the count that the mean is over.
    batch_of: step -> (b,) indices of examples, each of `rows_each` rows.
    """
    log = Log(folder / "metrics.csv")
    state = {"model": model, "log": log} | {f"optimizer{i}": each for i, each in enumerate(optimizers)}
    for step in resumable(folder, state, steps, folder.name):
        index = batch_of(step)
        sums = Sums()
        for part in my_rows(index).split(run.at_once(rows_each, len(index))):
            stats, count = loss_of(part)
            stats["loss"].backward()
            sums.add(count, **stats)
        means = update(optimizers, lr * cosine(step, steps), sums, f"{folder.name}, step {step + 1}")
        log.write(step=step + 1, **means)


@stage
def sft(run, folder):
    """pi_sft: maximum likelihood of the reviews' responses, not of prompts (official code)."""
    cfg = run.cfg
    torch.manual_seed(cfg.pipeline)
    config = GPTConfig(cfg.n_layer, cfg.n_head, cfg.n_embd, run.encoding.n_vocab, run.T)
    gpt = GPT.from_pretrained(cfg.init).cut(config.vocab_size) if cfg.init else GPT(config)
    if gpt.config.block_size < run.T or gpt.config.vocab_size != run.encoding.n_vocab:
        has = f"{gpt.config.block_size} positions and {gpt.config.vocab_size:,} tokens"
        raise UserError(f"--init {cfg.init} has {has} but needs {run.T} and {run.encoding.n_vocab:,}: "
                        "see --new-tokens and --tokenizer")
    gpt.to(run.device).bf16 = run.bf16
    train, test, n = run.reviews["train"].first(cfg.sft_reviews), run.reviews["test"].first(1000), 0
    if cfg.sft_stretches:
        train, n = train.behind_stretches(run.T)                                         # n stretches first
    length = torch.tensor(train.lengths(run.T))                                          # (all,)

    def batch_of(step):
        if step < cfg.sft_stretches:
            return batch_by_length(step, cfg.sft_batch, length[:n], cfg.pipeline, "stretches")
        return n + batch_by_length(step, cfg.sft_batch, length[n:], cfg.pipeline, "sft")

    def loss_of(part, reviews=train):
        ids, mask = run.rows(reviews.pick(part.tolist()))                                # (b, t), (b, t)
        return {"loss": -token_logprob(gpt, ids, mask).sum()}, int(mask.sum())

    optimizers = muon(gpt) if cfg.sft_optimizer == "muon" else [adamw(gpt.parameters())]
    trained(run, folder, gpt, optimizers, loss_of, cfg.sft_lr, cfg.sft_steps, batch_of)
    with torch.no_grad():
        parts = [loss_of(part, test) for part in torch.arange(len(test)).split(50)]
    nats = sum(float(stats["loss"]) for stats, _ in parts) / sum(tokens for _, tokens in parts)
    print(f"sft: perplexity {math.exp(nats):.2f} on held-out texts, a vocabulary of {run.encoding.n_vocab:,}")
    write_json(folder / "report.json", {"test_perplexity": math.exp(nats)})
    gpt.save_pretrained(folder, run.eos_id)


@stage
def oracle(run, folder):
    """The oracle: a classifier of the reviews from pi_sft's weights.  The reward is its log-odds."""
    cfg = run.cfg
    scorer = ScalarGPT(run.gpt(sft(run)), run.eos_id).to(run.device)
    train, test = run.reviews["train"].labeled(), run.reviews["test"].labeled()
    length = torch.tensor(train.lengths(run.T))                                          # (all,)

    def loss_of(part, reviews=train):
        some = reviews.pick(part.tolist())
        label = torch.tensor(some.label, device=run.device).float()                      # (b,)
        log_odds = scorer(*run.rows(some))                                               # (b,)
        loss = F.binary_cross_entropy_with_logits(log_odds, label, reduction="sum")
        return {"loss": loss, "accuracy": ((log_odds > 0) == (label > 0)).sum()}, len(part)

    optimizers = [adamw(scorer.parameters())]
    trained(run, folder, scorer, optimizers, loss_of, cfg.scorer_lr, cfg.oracle_steps,
            lambda step: batch_by_length(step, cfg.oracle_batch, length, cfg.pipeline, "oracle"))
    with torch.no_grad():
        parts = torch.arange(len(test)).split(100)
        right = sum(int(loss_of(part, test)[0]["accuracy"]) for part in parts)
    print(f"oracle: accuracy {right / len(test):.3f} on held-out reviews")
    write_json(folder / "report.json", {"test_accuracy": right / len(test), "shift": 0.0, "scale": 1.0})
    write_tensors(folder / "scorer.safetensors", scorer.state_dict())


def labeler(run):
    """The folder of what labels pairs and judges: the oracle, or for a user's file the reward model."""
    return reward_model(run) if run.cfg.own else oracle(run)


def winners(run, reward, pairs, *names):
    """Which of a pair wins: the higher reward, or a Bradley-Terry draw.  (P, K), (2, n) -> (P, n), 0 or 1

    pairs: two rows of indices into K.  The same names draw the same winners.
    """
    first, second = reward[:, pairs[0]], reward[:, pairs[1]]                             # (P, n) each
    if run.cfg.labels == "argmax":                        # official code: no noise
        return (second > first).long()
    uniform = torch.rand(first.T.shape, generator=run.rng("winner", *names)).T           # (P, n)
    return (uniform > torch.sigmoid(first - second)).long()                              # Bradley-Terry


PAIR = torch.tensor([[0], [1]])                           # the indices of a prompt's first two responses


@stage
def reward_model(run, folder):
    """A Bradley-Terry reward model from pi_sft's weights, and its rewards of all responses.

    It learns from all pairs of a prompt's first `rm_responses` responses; the first pair is alignment's.
    Pairs leave the reward's shift and scale free: it is shifted to mean 0 and scaled to the oracle's standard
    deviation within prompts, both on the responses to *training* prompts.  A user's file keeps scale 1.
    """
    cfg, R = run.cfg, run.cfg.rm_responses
    sampled = read_tensors(responses(run) / "responses.safetensors")
    scorer = ScalarGPT(run.gpt(sft(run)), run.eos_id).to(run.device)
    ids, mask = sampled["ids"][:, :R], sampled["mask"][:, :R]                            # (P, R, T)
    pairs = torch.triu_indices(R, R, offset=1)                                           # (2, n)
    sign = (1 - 2 * winners(run, sampled["reward"], pairs, "train")).to(run.device)      # (P, n) 1 or -1
    length = mask.sum(2).amax(1)                                                         # (P, R, T) -> (P,)

    def loss_of(part):
        score = score_rows(run, scorer, ids[part], mask[part])                           # (b, R)
        margin = (score[:, pairs[0]] - score[:, pairs[1]]) * sign[part]                  # (b, n)
        right = wins(margin, torch.zeros_like(margin))                                   # (b, n)
        return {"loss": -F.logsigmoid(margin).mean(1).sum(), "accuracy": right.mean(1).sum()}, len(part)

    optimizers = [adamw(scorer.parameters())]
    trained(run, folder, scorer, optimizers, loss_of, cfg.scorer_lr, cfg.rm_steps,
            lambda step: batch_by_length(step, cfg.rm_batch, length, cfg.pipeline, "reward_model"), R)
    score = score_all(run, scorer, sampled)                                              # (P, K)
    report = {"shift": float(score.mean()), "scale": 1.0}
    if cfg.own:
        held_out = score_all(run, scorer, own_responses(run, run.gpt(sft(run)), "test"))
        report["accuracy"] = float(wins(held_out[:, 0], held_out[:, 1]).mean())
        print(f"reward_model: accuracy {report['accuracy']:.3f} on held-out prompts")
    else:
        spread = within_prompt_sd(score)                                                 # 0: it tells nothing
        report["scale"] = within_prompt_sd(sampled["reward"]) / spread if spread > 0 else 1.0
        both = torch.stack([score, sampled["reward"]])                                   # (2, P, K)
        both = both - both.mean(2, keepdim=True)
        report["within_prompt_r2"] = float(torch.corrcoef(both.flatten(1))[0, 1].nan_to_num() ** 2)
        print(f"reward_model: r^2 {report['within_prompt_r2']:.2f} with the oracle, within prompts")
    write_json(folder / "report.json", report)
    write_tensors(folder / "scorer.safetensors", scorer.state_dict())
    rewards = (score - report["shift"]) * report["scale"]                                # (P, K)
    write_tensors(folder / "rewards.safetensors", {"reward": rewards})


def score_rows(run, scorer, ids, mask):
    """A scorer's values of stored responses, (b, K, T) each -> (b, K)"""
    ids, mask = ids.to(run.device), mask.to(run.device)
    flat = trim(ids.flatten(0, 1).long(), mask.flatten(0, 1))                            # (b K, t) x2
    return scorer(*flat).view(ids.shape[:2])


@torch.no_grad()
def score_all(run, scorer, sampled):
    """Scores of all stored responses, on the CPU.  -> (P, K)"""
    parts = zip(sampled["ids"].split(16), sampled["mask"].split(16))
    return torch.cat([score_rows(run, scorer, *part).cpu() for part in parts])


def reward_function(run, folder):
    """The oracle, or a reward model, as a reward: (ids, mask) -> (N,)"""
    scorer, report = run.scorer(folder), read_json(folder / "report.json")

    def reward(ids, mask):
        return (scorer(ids, mask) - report["shift"]) * report["scale"]
    return reward


def judge(run):
    """The reward used for evaluation, (ids, mask) -> (N,): --judge's, else the labeler's."""
    if not run.cfg.judge:
        return reward_function(run, labeler(run))
    rewards_of = data.user_judge(run.cfg.judge)
    rewards_of([run.encoding.decode(run.prompts("evaluated", 1)[0])], [""])              # fail early

    def reward(ids, mask):
        prompt_length = mask.int().argmax(1).tolist()                                    # (N,)
        prompts = [run.encoding.decode(row[:n].tolist()) for row, n in zip(ids, prompt_length)]
        rewards = rewards_of(prompts, texts(run, ids, mask))
        return torch.tensor(rewards, dtype=torch.float32, device=ids.device)             # (N,)
    return reward


# ---- responses of pi_sft ------------------------------------------------------------------------------

@stage
def responses(run, folder):
    """Responses to each training prompt, pi_sft's or a user's.

    responses.safetensors: ids, mask (P, K, T); ref_logp, reward (P, K).
    """
    cfg, policy = run.cfg, run.gpt(sft(run))
    if cfg.own:
        sampled = own_responses(run, policy, "train")
    else:
        prompts, measure = run.prompts("train", cfg.prompts), scored(run, policy, oracle(run))
        sampled = sample_responses(run, policy, prompts, cfg.responses, run.rng("responses"), measure)
    write_tensors(folder / "responses.safetensors", sampled)


def scored(run, ref, folder):
    """What is measured of new responses: log pi_ref, and the reward of a scorer's folder."""
    reward = reward_function(run, folder)

    def measure(ids, mask):                                                              # -> (n,) each
        ref_logp = sequence_logprob(ref, ids, mask, run.cfg.temperature)
        return {"ref_logp": ref_logp, "reward": reward(ids, mask)}
    return measure


def sample_responses(run, policy, prompts, each, generator, measure):
    """`each` responses of a policy to every prompt.  -> {ids, mask: (P, each, T), name: (P, each)}

    measure: (ids, mask) of some rows -> {name: (n,)}.
    """
    cfg = run.cfg
    repeated = [prompt for prompt in prompts for _ in range(each)]
    new = respond(policy, repeated, cfg.new_tokens, run.T, cfg.temperature, run.eos_id, generator,
                  cfg.sample_batch, measure)
    return {name: column.unflatten(0, (len(prompts), each)) for name, column in new.items()}


@torch.no_grad()
def own_responses(run, policy, split):
    """The file's responses as `responses` stores them, best first; a pair's rewards: 1 and 0."""
    preferences = run.preferences[split]
    flat = [(each.prompt + response, len(each.prompt)) for each in preferences for response in each.responses]
    ids, mask = data.padded_rows(*zip(*flat), run.T, run.eos_id)                         # (P K, t), (P K, t)
    parts = zip(ids.to(run.device).split(64), mask.to(run.device).split(64))
    logp = torch.cat([sequence_logprob(policy, *part, run.cfg.temperature).cpu() for part in parts])
    reward = torch.tensor([each.rewards for each in preferences])                        # (P, K)
    return {"ids": ids.view(*reward.shape, -1), "mask": mask.view(*reward.shape, -1),
            "ref_logp": logp.view(reward.shape), "reward": reward}


def implicit(run, policy, ref):
    """How well beta_pi h ranks a file's held-out best response above the worst.  -> {name: float}"""
    logp, ref_logp = (own_responses(run, gpt, "test")["ref_logp"] for gpt in (policy, ref))      # (P, K)
    h = run.cfg.beta_pi * (logp - ref_logp)                                              # (P, K)
    return {"held_out_accuracy": float(wins(h[:, 0], h[:, 1]).mean()),
            "held_out_margin": float((h[:, 0] - h[:, 1]).mean())}


def limit(run):
    """Rewards of many responses of pi_sft to prompts of evaluation.  -> {reward: (P, M)}

    With a reward model that is not the judge, also model_reward: its rewards of the same responses.
    """
    scores = {"reward": judge(run)}
    name = "limit"
    if not run.cfg.own and finished_at(run.folder / "reward_model" / "stage.json"):
        scores["model_reward"] = reward_function(run, reward_model(run))
        name = "limit-and-model"
    folder, finished = run.begin(name, *STAGES[name])
    if not finished:
        prompts = run.prompts("evaluated", run.cfg.limit_prompts)

        def measure(ids, mask):
            return {name: reward(ids, mask) for name, reward in scores.items()}          # (n,) each

        policy, generator = run.gpt(sft(run)), run.rng("limit")
        sampled = sample_responses(run, policy, prompts, run.cfg.limit_responses, generator, measure)
        write_tensors(folder / "rewards.safetensors", {name: sampled[name] for name in scores})
        finish(folder)
    return read_tensors(folder / "rewards.safetensors")


@stage
def reference(run, folder):
    """pi_sft evaluated on the prompts of every checkpoint, and the data's own continuations."""
    policy, reward = run.gpt(sft(run)), judge(run)
    samples = evaluation(run, policy, policy, reward, run.rng("reference"))
    ids, mask = run.rows(run.reviews["evaluated"].first(len(samples["reward"])))         # (P, t), (P, t)
    with torch.no_grad():
        rewards = [reward(*part).cpu() for part in zip(ids.split(64), mask.split(64))]
    samples["data_reward"] = torch.cat(rewards)                                          # (P,)
    write_tensors(folder / "samples.safetensors", samples)


def evaluation(run, policy, ref, reward, generator):
    """A policy's responses to the prompts of evaluation.  -> {ids, mask, reward, kl, k1: (P, S, ...)}"""
    cfg = run.cfg

    def measure(ids, mask):
        kl, k1 = sequence_kl(policy, ref, ids, mask, cfg.temperature)                    # (n,), (n,)
        return {"reward": reward(ids, mask), "kl": kl, "k1": k1}

    prompts = run.prompts("evaluated", cfg.eval_prompts)
    return sample_responses(run, policy, prompts, cfg.eval_samples, generator, measure)


def texts(run, ids, mask):
    """The responses' texts, without their end-of-text.  (..., T), (..., T) -> a list of strings"""
    ids, mask = ids.flatten(0, -2), mask.flatten(0, -2)                                  # (N, T) each
    kept = mask & (ids != run.eos_id)                                                    # (N, T)
    return [run.encoding.decode(row[on].tolist()) for row, on in zip(ids, kept)]
