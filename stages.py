"""The stages before alignment: SFT, the oracle, scored responses, the reward model, the limit's samples.

    reviews -> pi_sft -> 8 responses a prompt, with log pi_sft and oracle reward -> pairs -> reward model
       '-----> oracle -----^

A file of preferences (--data) brings its own responses, and has no oracle: the reward model is the judge.

    chosen texts -> pi_sft -> log pi_sft of the file's responses -> pairs -> reward model

Each leaves one artifact in its own folder of the run.  A stage whose artifact is there, made with the same
settings from the same upstream artifacts, is read and not run again.
"""
import itertools
import math

import numpy as np
import torch
import torch.nn.functional as F

import data
from checkpoint import (
    Log,
    Rows,
    begin,
    finish,
    finished,
    read_json,
    read_tensors,
    resumable,
    write_json,
    write_tensors,
)
from compute import Muon, Sums, UserError, adamw, batch_by_length, cosine, micro_batches, rng, update
from evaluate import measure, within_prompt_sd
from model import (
    CPU_ROWS,
    GPT,
    GPTConfig,
    ScalarGPT,
    config_of,
    respond,
    sequence_logprob,
    token_logprob,
    trim,
)

# ---- SFT and the oracle -------------------------------------------------------------------------------

def lengths(run, reviews):
    """(n,) tokens of each review, as far as the context holds them."""
    return torch.tensor([min(len(ids), run.block_size) for ids in reviews.ids])


def sft(run):
    """pi_sft: maximum likelihood of the reviews' responses, not of prompts (official code).  -> its folder

    On a user's file the weights with the lowest held-out loss of ten on the way are kept.
    """
    cfg = run.cfg
    folder = run.folder / "sft"
    if begin(folder, run.settings("sft") | {"reviews": run.source}):
        return folder
    sources = {"sft": run.reviews["train"].pick(range(cfg.sft_reviews))}
    if cfg.sft_segments:                                  # more text than the beginnings, which come last
        sources["sft segments"] = data.segments(sources["sft"], run.block_size)
    length = {name: lengths(run, reviews) for name, reviews in sources.items()}
    gpt = run.placed(initial_gpt(run))
    optimizer = Muon(gpt, cfg.sft_lr) if cfg.sft_optimizer == "muon" else adamw(gpt, cfg.sft_lr)
    log = Log(folder / "metrics.csv")
    held_out = Rows()                                     # on the way, of a user's file: what is kept
    state = {"model": gpt, "optimizer": optimizer, "log": log, "held_out": held_out}
    for step, bar in resumable(folder, state, cfg.sft_steps, cfg.save_every, "sft"):
        name = "sft segments" if step < cfg.sft_segments else "sft"
        reviews = sources[name]
        index = batch_by_length(step, cfg.sft_batch, length[name], *run.names(name))
        sums = Sums()
        for part in micro_batches(index, run.at_once()):
            ids, mask = run.rows(reviews.pick(part.tolist()))                            # (b, T), (b, T)
            loss = -token_logprob(gpt, ids, mask).sum()
            loss.backward()
            tokens = int(mask.sum())
            prompt_tokens = int(reviews.start[part.numpy()].sum())
            padding = ids.numel() - tokens - prompt_tokens                      # positions that teach nothing
            sums.add(tokens, loss=loss, padding=torch.tensor(padding))
        lr = cfg.sft_lr * cosine(step, cfg.sft_steps)
        means = update(optimizer, lr, sums, index, f"sft, step {step + 1}")
        log.write(step=step + 1, **means)
        bar.set_postfix(loss=f"{means['loss']:.3f}", refresh=False)
        if run.own and (step + 1) % max(1, cfg.sft_steps // 10) == 0:
            nats = held_out_loss(run, gpt)["test_nats_per_token"]
            held_out.append(step=torch.tensor([step + 1]), nats=torch.tensor([nats]))
            if held_out.columns["nats"].argmin() == len(held_out) - 1:
                run.save_policy(gpt, folder)
    kept = {}
    if run.own:                                           # a small file is soon learned by heart
        gpt = run.policy(folder)
        kept = {"step_kept": int(held_out.columns["step"][held_out.columns["nats"].argmin()])}
    report = held_out_loss(run, gpt) | kept
    print(f"sft: perplexity {report['test_perplexity']:.2f} on held-out texts, of a vocabulary of "
          f"{run.encoding.n_vocab}")
    write_json(folder / "report.json", report)
    finish(folder, **{"model.safetensors": run.save_policy(gpt, folder)})
    return folder


def initial_gpt(run):
    """The model that SFT starts from: released or saved weights (--init), or random ones."""
    if run.cfg.init:
        return GPT.from_pretrained(run.cfg.init)
    torch.manual_seed(run.cfg.pipeline)
    return GPT(model_config(run))


def model_config(run):
    """Its sizes, before any weights are read; UserError where --init does not fit.  -> GPTConfig"""
    cfg = run.cfg
    if not cfg.init:
        return GPTConfig(cfg.n_layer, cfg.n_head, cfg.n_embd, run.encoding.n_vocab, run.block_size)
    config = config_of(cfg.init)
    for what, there, needed in (("positions (its block size)", config.block_size, run.block_size),
                                ("tokens in its vocabulary", config.vocab_size, run.encoding.n_vocab)):
        if there < needed:
            raise UserError(f"--init {cfg.init} has {there:,} {what}, {needed:,} are needed: choose other "
                            "weights, or lower --prompt-tokens and --new-tokens")
    return config


@torch.no_grad()
def held_out_loss(run, gpt):
    """The loss on the responses of up to 1,000 test reviews, at temperature 1, a token and a byte of text."""
    reviews = run.reviews["test"]
    total = tokens = size = 0
    for index in torch.arange(min(1000, len(reviews))).split(50):
        ids, mask = run.rows(reviews.pick(index.tolist()))
        total -= float(token_logprob(gpt, ids, mask).sum())
        tokens += int(mask.sum())
        size += sum(len(response.encode()) for response in texts(run, ids, mask))
    return {"test_perplexity": math.exp(total / tokens), "test_nats_per_token": total / tokens,
            "test_bits_per_byte": total / math.log(2) / size}


def oracle(run):
    """The oracle: a classifier of the reviews from pi_sft's weights; its log-odds reward.  -> its folder

    There is none for a user's file: the reward model stands in its place.
    """
    if run.own:
        return reward_model(run)
    cfg = run.cfg
    folder, upstream = run.folder / "oracle", sft(run)
    if begin(folder, run.settings("oracle"), [upstream]):
        return folder
    train, test = (reviews.pick(np.flatnonzero(reviews.label >= 0)) for reviews in run.reviews.values())
    length = lengths(run, train)
    scorer = ScalarGPT(run.policy(upstream), run.eos_id).to(run.device)
    optimizer = adamw(scorer, cfg.oracle_lr)
    log = Log(folder / "metrics.csv")
    state = {"model": scorer, "optimizer": optimizer, "log": log}
    for step, bar in resumable(folder, state, cfg.oracle_steps, cfg.save_every, "oracle"):
        index = batch_by_length(step, cfg.oracle_batch, length, *run.names("oracle"))
        sums = Sums()
        for part in micro_batches(index, run.at_once()):
            log_odds, label = classify(run, scorer, train, part)                         # (b,), (b,)
            loss = F.binary_cross_entropy_with_logits(log_odds, label, reduction="sum")
            loss.backward()
            sums.add(len(part), loss=loss, accuracy=((log_odds > 0) == (label > 0)).sum())
        lr = cfg.oracle_lr * cosine(step, cfg.oracle_steps)
        means = update(optimizer, lr, sums, index, f"oracle, step {step + 1}")
        log.write(step=step + 1, **means)
        bar.set_postfix(loss=f"{means['loss']:.3f}", accuracy=f"{means['accuracy']:.3f}", refresh=False)
    with torch.no_grad():
        chunks = torch.arange(len(test)).split(100)
        pairs = [torch.stack(classify(run, scorer, test, index)) for index in chunks]    # of (2, 100)
    log_odds, label = torch.cat(pairs, dim=1)                                           # (2, n) -> (n,), (n,)
    right = (log_odds > 0) == (label > 0)                                                # (n,)
    print(f"oracle: accuracy {right.float().mean():.3f} on held-out reviews")
    write_json(folder / "report.json", {"test_accuracy": float(right.float().mean()),
                                        "test_log_odds_sd": float(log_odds.std())})
    finish(folder, **{"model.safetensors": scorer.save_pretrained(folder)})
    return folder


def classify(run, scorer, reviews, index):
    """The scorer's log-odds and the labels of some reviews.  -> (b,), (b,)"""
    label = torch.tensor(reviews.label[index.numpy()], device=run.device).float()
    return scorer(*run.rows(reviews.pick(index.tolist()))), label


def judge(run):
    """The reward of labels, (ids, mask) -> (N,): the oracle's, or on a user's file the reward model's."""
    return reward_function(run, oracle(run))


def evaluator(run):
    """The reward of evaluation, (ids, mask) -> (N,): --judge's, which nothing trains on, or `judge`'s."""
    if not run.cfg.judge:
        return judge(run)
    score = run.judge

    def reward(ids, mask):
        prompts = [run.encoding.decode(prompt) for prompt in prompts_of(ids, mask)]
        rewards = score(prompts, texts(run, ids, mask))
        if len(rewards) != len(ids):
            raise UserError(f"--judge {run.cfg.judge} gave {len(rewards)} rewards for {len(ids)} responses: "
                            "return one for each")
        return torch.tensor(rewards, dtype=torch.float32, device=ids.device)             # (N,)
    return reward


# ---- responses of pi_sft ------------------------------------------------------------------------------

def sample_responses(run, folder, name, prompts, each, columns=None, rewards_only=False, model_reward=None):
    """`each` responses of pi_sft to every prompt, with the judge's reward.  -> {name: (P, each, ...)}

    ids and mask, padded to the block, ref_logp by the function that training uses, and reward; or rewards
    only, with those of a second reward function, model_reward, beside them.
    name: what the random numbers depend on.  columns: of the `each` only these are drawn, by the numbers that
    they have where all are drawn.
    """
    cfg = run.cfg
    policy = run.policy(run.folder / "sft")
    reward = evaluator(run) if rewards_only else judge(run)
    columns = columns or range(each)
    places = torch.arange(len(prompts) * each).view(-1, each)[:, list(columns)].flatten()   # (P columns,)
    chunks = places.split(cfg.sample_batch)
    rows = Rows()

    def scores(ids, mask):
        row = {"reward": reward(ids, mask)}                                              # (n,)
        if model_reward:
            row["model_reward"] = model_reward(ids, mask)                                # (n,)
        if not rewards_only:
            row["ref_logp"] = sequence_logprob(policy, ids, mask, cfg.temperature)       # (n,)
        return row

    for step, _ in resumable(folder, {"rows": rows}, len(chunks), cfg.save_every, folder.name):
        uniform = uniform_rows(chunks[step], cfg.sample_batch, cfg.new_tokens, *run.names(name))
        repeated = [prompts[place // each] for place in chunks[step].tolist()]
        new = respond(policy, repeated, cfg.new_tokens, cfg.temperature, run.eos_id, None,
                      cfg.sample_batch, scores, run.block_size, uniform)
        new["ids"] = new["ids"].int()
        if rewards_only:
            del new["ids"], new["mask"]
        rows.append(**new)
    return {name: column.unflatten(0, (len(prompts), len(columns))) for name, column in rows.columns.items()}


def uniform_rows(places, batch, n, *key):
    """Rows of an endless table of uniform numbers, which is drawn `batch` rows at a time.  -> (m, n)

    places: (m,) ascending.
    """
    first, last = int(places[0]) // batch, int(places[-1]) // batch
    drawn = [torch.rand(batch, n, generator=rng(*key, i)) for i in range(first, last + 1)]
    return torch.cat(drawn)[places - first * batch]


def responses(run):
    """The two responses of pi_sft to a prompt that make its pair; or all of a user's own.  -> its folder"""
    if not run.own:
        return drawn_responses(run, "responses", run.cfg.responses, range(2))
    folder = run.folder / "responses"
    if not begin(folder, run.settings("responses"), [sft(run)]):
        sampled = own_responses(run, "train")
        finish(folder, **{"responses.safetensors": write_tensors(folder / "responses.safetensors", sampled)})
    return folder


def all_responses(run):
    """Those and the other responses, which methods from rewards use.  -> their folders"""
    first = responses(run)
    if run.own or run.cfg.responses == 2:
        return [first]
    K = run.cfg.responses
    return [first, drawn_responses(run, "other_responses", K, range(2, K), name="responses")]


def drawn_responses(run, stage, each, columns=None, name=None):
    """A stage of responses of pi_sft to the training prompts, as `sample_responses` draws.  -> its folder"""
    folder = run.folder / stage
    if not begin(folder, run.settings("responses"), [sft(run), oracle(run)]):
        sampled = sample_responses(run, folder, name or stage, run.train_prompts(), each, columns)
        finish(folder, **{"responses.safetensors": write_tensors(folder / "responses.safetensors", sampled)})
    return folder


def read_responses(folders):
    """The responses in these folders, side by side.  -> {ids, mask: (P, K, T), ref_logp, reward: (P, K)}"""
    parts = [read_tensors(folder / "responses.safetensors")[0] for folder in folders]
    return {name: torch.cat([part[name] for part in parts], dim=1) for name in parts[0]}


def answers(run):
    """A response of pi_sft to each training prompt, for XPO; a user's file has none.  -> its folder"""
    if not run.own:
        return responses(run)
    return drawn_responses(run, "answers", 1)


def limit(run):
    """Rewards of many responses of pi_sft to prompts of evaluation, for the limit.  -> its folder

    Where there is a reward model beside what evaluates, with its rewards of the same responses, model_reward.
    """
    cfg = run.cfg
    name = f"limit-{cfg.limit_prompts}x{cfg.limit_responses}"
    folder = run.folder / name
    upstream = [sft(run), oracle(run)]
    both = run.judged_by != "rm" and finished(run.folder / "reward_model")
    if both:
        upstream.append(reward_model(run))
        folder = run.folder / f"{name}-reward-model"
    if not begin(folder, run.settings("limit"), upstream):
        model_reward = reward_function(run, upstream[-1]) if both else None
        prompts = run.prompts(run.evaluated, cfg.limit_prompts)
        sampled = sample_responses(run, folder, name, prompts, cfg.limit_responses, rewards_only=True,
                                   model_reward=model_reward)
        finish(folder, **{"rewards.safetensors": write_tensors(folder / "rewards.safetensors", sampled)})
    return folder


def evaluation(run, policy, ref, reward, generator):
    """`evaluate.measure` on the run's prompts of evaluation.  -> {ids, mask, reward, kl, k1: (P, S, ...)}"""
    cfg = run.cfg
    prompts = run.prompts(run.evaluated, cfg.eval_prompts)
    return measure(policy, ref, reward, prompts, cfg.eval_samples, cfg.new_tokens, cfg.temperature,
                   run.eos_id, generator, cfg.sample_batch)


def drift(run, policy, samples, start):
    """What tells that mass leaves the responses of pi_sft.  -> {log_mean_ratio, and on tiny faulty}

    log_mean_ratio: log of the mean of pi / pi_sft over responses that pi_sft drew for evaluation, nats; below
    0 for a policy whose mass has gone elsewhere.  faulty: the share of sentences outside of the grammar,
    those cut at the length cap among them.
    samples: the policy's, from `evaluation`; start: pi_sft's, with their ref_logp, from `reference`.
    """
    logp = logprob_of(run, policy, start["ids"].flatten(0, 1), start["mask"].flatten(0, 1))    # (P S,)
    h = logp - start["ref_logp"].flatten()                                               # (P S,)
    row = {"log_mean_ratio": float(h.logsumexp(0) - math.log(len(h)))}
    if run.cfg.data == "tiny":
        written_by_it = texts(run, samples["ids"].flatten(0, 1), samples["mask"].flatten(0, 1))
        sentences = [sentence for text in written_by_it for sentence in data.read_tiny(text)]
        row["faulty"] = sum(sentence is None for sentence in sentences) / max(1, len(sentences))
    return row


def implicit(run, policy, held_out):
    """How beta_pi h tells a file's held-out best responses from the worst.  held_out: of `own_responses`

    -> {held_out_accuracy (ties one half), held_out_margin: the mean of the difference}
    """
    logp = logprob_of(run, policy, held_out["ids"].flatten(0, 1), held_out["mask"].flatten(0, 1))    # (P K,)
    h = logp.view(held_out["ref_logp"].shape) - held_out["ref_logp"]                     # (P K,) -> (P, K)
    margin = run.cfg.beta_pi * (h[:, 0] - h[:, 1])                                       # (P,)
    right = (margin > 0).float() + 0.5 * (margin == 0).float()                           # (P,)
    return {"held_out_accuracy": float(right.mean()), "held_out_margin": float(margin.mean())}


def texts(run, ids, mask):
    """The responses' texts, without their end-of-text.  (N, T), (N, T) -> N strings"""
    kept = mask & (ids != run.eos_id)                                                    # (N, T)
    return [run.encoding.decode(row[on].tolist()) for row, on in zip(ids, kept)]


def reference(run):
    """pi_sft evaluated on the same prompts as every checkpoint: step 0 of every method.  -> its folder"""
    folder, upstream = run.folder / "reference", [sft(run), oracle(run)]
    if not begin(folder, run.settings("reference"), upstream):
        policy, reward = run.policy(upstream[0]), evaluator(run)
        samples = evaluation(run, policy, policy, reward, rng(*run.names("reference")))
        ref_logp = logprob_of(run, policy, samples["ids"].flatten(0, 1), samples["mask"].flatten(0, 1))
        samples["ref_logp"] = ref_logp.view(samples["reward"].shape)                     # (P S,) -> (P, S)
        samples |= written(run, reward)
        finish(folder, **{"samples.safetensors": write_tensors(folder / "samples.safetensors", samples)})
    return folder


@torch.no_grad()
def written(run, reward):
    """Those prompts' continuations as their authors wrote them.  -> {data_ids, data_mask, data_reward}"""
    ids, mask = run.rows(run.evaluated.pick(range(run.cfg.eval_prompts)))                # (P, T), (P, T)
    rewards = [reward(*part) for part in zip(ids.split(64), mask.split(64))]
    return {"data_ids": ids.int().cpu(), "data_mask": mask.cpu(), "data_reward": torch.cat(rewards).cpu()}


@torch.no_grad()
def logprob_of(run, policy, ids, mask):
    """log pi of many responses, 64 at a time.  (N, T), (N, T) -> (N,), on the CPU"""
    parts = []
    for chunk, chunk_mask in zip(ids.split(64), mask.split(64)):
        chunk, chunk_mask = trim(chunk.long().to(run.device), chunk_mask.to(run.device))
        parts.append(sequence_logprob(policy, chunk, chunk_mask, run.cfg.temperature).cpu())
    return torch.cat(parts)


@torch.no_grad()
def own_responses(run, split):
    """The file's responses as `sample_responses` gives pi_sft's; the rewards of a pair are 1 and 0."""
    rows = run.preferences[split]
    policy = run.policy(run.folder / "sft")
    sequences, starts = [], []
    for row in rows:
        sequences += [row.prompt + response for response in row.responses]
        starts += [len(row.prompt)] * len(row.responses)
    ids, mask = data.rows(sequences, starts, run.block_size, run.eos_id)                  # (P K, t), (P K, t)
    logp = logprob_of(run, policy, ids, mask)                                            # (P K,)
    reward = torch.tensor([row.rewards or [1.0, 0.0] for row in rows])                   # (P, K)
    room = (0, run.block_size - ids.shape[1])
    ids = F.pad(ids, room, value=run.eos_id).int()                                      # (P K, t) -> (P K, T)
    mask = F.pad(mask, room)                                                            # (P K, t) -> (P K, T)
    P, K = reward.shape
    return {"reward": reward, "ids": ids.view(P, K, -1), "mask": mask.view(P, K, -1),
            "ref_logp": logp.view(P, K)}


# ---- pairs and the reward model -----------------------------------------------------------------------

def winners(run, reward, *names):
    """The winner's column of each pair, (P, 2) -> (P,): the higher reward, or Bernoulli by the difference."""
    if run.cfg.labels == "argmax":                        # official code: no noise
        return reward.argmax(1)
    uniform = torch.rand(len(reward), generator=rng(*run.names("winner", *names)))
    return (uniform > torch.sigmoid(reward[:, 0] - reward[:, 1])).long()                 # Bradley-Terry


def reward_model(run):
    """A Bradley-Terry reward model from pi_sft's weights, on the pairs.  -> its folder, with all rewards

    Pairs leave the reward's shift and scale free: it is shifted to mean 0 and scaled to the oracle's standard
    deviation within prompts, both on the responses to *training* prompts.  On a user's file to that of its
    rewards; a file of pairs has none.
    """
    cfg = run.cfg
    folder, upstream = run.folder / "reward_model", [sft(run), *all_responses(run)]
    if begin(folder, run.settings("reward_model"), upstream):
        return folder
    sampled = read_responses(upstream[1:])
    R = 2 if run.own else cfg.rm_responses                # the first R responses of a prompt make its pairs
    pairs = list(itertools.combinations(range(R), 2))
    first, second = torch.tensor(pairs).T                                                # (n,), (n,) columns
    labels = []
    for n, pair in enumerate(pairs):
        key = ("train", n) if n > 0 else ("train",)       # the first pair's label is that of alignment
        labels.append(winners(run, sampled["reward"][:, list(pair)], *key))              # (P,)
    winner = torch.stack(labels, dim=1)                                                  # (P, n)
    length = sampled["mask"][:, :R].sum(2).amax(1)                                       # (P,)
    scorer = ScalarGPT(run.policy(upstream[0]), run.eos_id).to(run.device)
    optimizer = adamw(scorer, cfg.rm_lr)
    log = Log(folder / "metrics.csv")
    held_out_log = Log(folder / "held_out.csv")           # shows whether it still learns when it stops
    state = {"model": scorer, "optimizer": optimizer, "log": log, "held_out": held_out_log}
    for step, bar in resumable(folder, state, cfg.rm_steps, cfg.save_every, "reward_model"):
        index = batch_by_length(step, cfg.rm_batch, length, *run.names("reward_model"))
        sums = Sums()
        for part in micro_batches(index, run.at_once(R)):
            score = score_responses(run, scorer, sampled, part, R)                       # (b, R)
            sign = 1 - 2 * winner[part].to(run.device)                             # (b, n) -1: the second won
            margin = (score[:, first] - score[:, second]) * sign               # (b, n) winner's minus loser's
            loss = -F.logsigmoid(margin).mean(1).sum()
            loss.backward()
            sums.add(len(part), loss=loss, accuracy=(margin > 0).float().mean(1).sum())
        lr = cfg.rm_lr * cosine(step, cfg.rm_steps)
        means = update(optimizer, lr, sums, index, f"reward_model, step {step + 1}")
        log.write(step=step + 1, **means)
        bar.set_postfix(loss=f"{means['loss']:.3f}", accuracy=f"{means['accuracy']:.3f}", refresh=False)
        if not run.own and (step + 1) % max(1, cfg.rm_steps // 8) == 0:
            held_out_log.write(step=step + 1, loss=held_out_pairs(run, scorer, sampled))

    score = score_all(run, scorer, sampled)                                              # (P, K)
    shift = float(score.mean())
    scale = within_prompt_sd(sampled["reward"]) / within_prompt_sd(score)
    if run.own and not run.scored:
        scale = 1.0
    report = agreement(run, scorer, sampled, score)
    write_json(folder / "report.json", {"shift": shift, "scale": scale} | report)
    rewards = write_tensors(folder / "rewards.safetensors", {"reward": (score - shift) * scale})
    finish(folder, **{"model.safetensors": scorer.save_pretrained(folder), "rewards.safetensors": rewards})
    return folder


def agreement(run, scorer, sampled, score):
    """How the reward model orders responses that it did not train on; printed.  -> entries of report.json

    score: (P, K) its scores of `sampled`.
    """
    if run.own:
        held_out = score_all(run, scorer, own_responses(run, "test"))                    # (P, K)
        accuracy = float((held_out[:, 0] > held_out[:, 1]).float().mean())
        print(f"reward_model: accuracy {accuracy:.3f} on held-out rows")
        return {"accuracy_on_held_out_rows": accuracy}
    R = run.cfg.rm_responses
    oracle_says = sampled["reward"][:, R] > sampled["reward"][:, R + 1]
    right = oracle_says == (score[:, R] > score[:, R + 1])                               # (P,)
    accuracy = float(right.float().mean())
    print(f"reward_model: accuracy {accuracy:.3f} on fresh pairs")
    both = torch.stack([score, sampled["reward"]])                                       # (2, P, K)
    centred = (both - both.mean(2, keepdim=True)).flatten(1)                             # (2, P K)
    report = {"accuracy_on_fresh_pairs": accuracy,
              "within_prompt_r2": float(torch.corrcoef(centred)[0, 1] ** 2)}
    if run.cfg.data == "tiny":
        report |= opinion_weights(run, sampled, centred)
    return report


@torch.no_grad()
def held_out_pairs(run, scorer, sampled):
    """The Bradley-Terry loss on pairs that no step sees, two responses of 1,000 prompts; nats."""
    R = run.cfg.rm_responses
    pairs = {name: column[:1000, R:R + 2] for name, column in sampled.items()}
    winner = winners(run, pairs["reward"], "held out")                                   # (n,)
    score = score_all(run, scorer, pairs)                                                # (n, 2)
    margin = (score[:, 0] - score[:, 1]) * (1 - 2 * winner)                              # (n,)
    return float(-F.logsigmoid(margin).mean())


def opinion_weights(run, sampled, centred):
    """What the reward model and the oracle pay for an opinion, plain and in "not X at all": least squares.

    centred: (2, P K), both rewards less their prompt's mean.  In the grammar both weigh 1.
    """
    counts = []
    for text in texts(run, sampled["ids"].flatten(0, 1), sampled["mask"].flatten(0, 1)):
        sentences = [sentence for sentence in data.read_tiny(text) if sentence is not None]
        in_not = sum(opinions for opinions, turned in sentences if turned)
        counts.append([sum(opinions for opinions, _ in sentences) - in_not, in_not])
    counts = torch.tensor(counts).float().view(*sampled["reward"].shape, 2)              # (P, K, 2)
    counts = (counts - counts.mean(1, keepdim=True)).flatten(0, 1)                       # (P K, 2)
    plain, turned = torch.linalg.lstsq(counts, centred.T).solution.tolist()             # (2, 2): a row a kind
    return {"weight_of_an_opinion": plain[0], "weight_in_not_at_all": turned[0],
            "oracle_weight_of_an_opinion": plain[1], "oracle_weight_in_not_at_all": turned[1]}


def score_responses(run, scorer, sampled, index, columns):
    """The scorer's value of the first `columns` responses to some prompts.  -> (b, columns)"""
    ids = sampled["ids"][index][:, :columns].flatten(0, 1).to(run.device)                # (b K, T)
    mask = sampled["mask"][index][:, :columns].flatten(0, 1).to(run.device)              # (b K, T)
    ids, mask = trim(ids, mask)
    return scorer(ids.long(), mask).view(len(index), -1)                                 # (b K,) -> (b, K)


@torch.no_grad()
def score_all(run, scorer, sampled):
    """The same of all responses to all prompts, on the CPU.  -> (P, K)"""
    P, K = sampled["reward"].shape
    rows = run.cfg.sample_batch if run.device.type == "cuda" else CPU_ROWS
    chunks = torch.arange(P).split(max(1, rows // K))
    return torch.cat([score_responses(run, scorer, sampled, index, K).cpu() for index in chunks])


def climbed(run):
    """What gives the reward to the methods from rewards: the reward model, or the oracle.  -> its folder"""
    return oracle(run) if run.cfg.reward == "oracle" else reward_model(run)


def reward_function(run, folder):
    """A scorer as a reward function (ids, mask) -> (N,); a reward model's is shifted and scaled."""
    scorer = run.scorer(folder)
    report = {"shift": 0.0, "scale": 1.0} | read_json(folder / "report.json")
    return lambda ids, mask: (scorer(ids, mask) - report["shift"]) * report["scale"]


def prompts_of(ids, mask):
    """The prompts of rows (N, T), (N, T) -> N id lists."""
    start = mask.int().argmax(1)
    return [row[:n].tolist() for row, n in zip(ids, start)]
