"""From reviews to aligned policies, by one command:  python train.py --method exo

The stages of stages.py come first: pi_sft, oracle, responses, reward model.  Then, here, the loops that align
pi_sft by EXO, DPO, XPO or PPO, with checkpoints evaluated on the way; at the end the table and the figures.
The same command again goes on where it stopped; another method starts at its alignment.
"""
import shlex
import shutil
import sys
import time

import torch

import checkpoint
import compute
import dryrun
import figures
import ppo
import stages
import xpo
from checkpoint import Log, Rows, Stopped, begin, finish, read_json, read_tensors, resumable, write_tensors
from compute import (
    Sums,
    UserError,
    adamw,
    cosine,
    micro_batches,
    move,
    on_first,
    rank,
    rng,
    shuffled_batch,
    update,
)
from dpo import dpo_loss, dpo_reward_loss
from evaluate import mean_se, read_csv, summary
from exo import exo_loss, exo_pref_loss
from model import respond, sequence_logprob, trim
from run import Run, settle
from settings import PRESETS, Config, parse

# ---- EXO and DPO --------------------------------------------------------------------------------------

def train_exo_dpo(run, training):
    """EXO and DPO on pairs (Eq 18, Eq 7), or on K scored responses of each prompt (Eq 15, Eq 19).

    The paper draws the responses once, from pi_sft.  With --rounds T they are drawn T times, from the present
    policy pi_t, which is then the loss's reference, and the reward has the KL to pi_sft paid already:
    R = r - beta (log pi_t - log pi_sft).  The optimum is pi*_beta in either case.
    """
    cfg, policy, method, rounds = run.cfg, training.policy, training.method, training.rounds
    data = Rows()                                                    # the present round's responses
    if rounds == 1:
        data.append(**drawn_from_sft(run, training.feedback, training.K))
        check_start(run, policy, data.columns)
    else:
        draw = drawn_from_policy(run, training)
    schedule = equal_rounds(cfg.align_steps, rounds)
    state = {"data": data} if rounds > 1 else {}                     # one round is read again, not saved
    for step, bar in training.steps(cfg.align_steps, **state):
        t, i = schedule[step]
        if i == 0 and rounds > 1:
            data.replace(**draw(t))
        key = ("align", training.seed, t) if t > 0 else ("align", training.seed)
        index = shuffled_batch(i, cfg.align_batch, len(data), *key)
        sums = Sums()
        for part in micro_batches(index, run.at_once(training.K or 2)):
            ids, mask, ref_logp, reward = (data.columns[name][part] for name in CANDIDATES)
            ids, mask = trim(ids.flatten(0, 1).long(), mask.flatten(0, 1))             # (b, K, T) -> (b K, t)
            ref_logp, reward = move(run.device, ref_logp, reward)
            logp = sequence_logprob(policy, ids, mask, cfg.temperature)                  # (b K,)
            logp = logp.view(len(part), -1)                                              # (b K,) -> (b, K)
            if training.feedback == "preferences" and method == "exo":
                loss = exo_pref_loss(logp, ref_logp, cfg.beta_pi, cfg.eps)
            elif training.feedback == "preferences":
                loss = dpo_loss(logp, ref_logp, cfg.beta_pi)
            elif method == "exo":
                loss = exo_loss(logp, ref_logp, reward, cfg.beta_r, cfg.beta_pi)
            else:
                loss = dpo_reward_loss(logp, ref_logp, reward, cfg.beta_r, cfg.beta_pi)
            (loss * len(part)).backward()
            implicit_reward = cfg.beta_pi * (logp - ref_logp).detach()                   # (b, K)
            margins = compare(implicit_reward, reward.argmax(1), reward.argmin(1))
            sums.add(len(part), loss=loss * len(part), **margins, tokens=mask.sum())
        lr = cfg.align_lr * cosine(step, cfg.align_steps, cfg.warmup)
        means = update(training.optimizer, lr, sums, index, f"{method}, step {step + 1}")
        training.record(step, means | {"lr": lr}, means["tokens"] * len(index), bar)


CANDIDATES = ("ids", "mask", "ref_logp", "reward")                   # (P, K, T) x2, (P, K) x2


def drawn_from_sft(run, feedback, K):
    """The paper's data: responses of pi_sft, or a user's own.  -> {CANDIDATES}

    Pairs: column 0 is the chosen response; the rewards are 1 and 0.
    """
    folders = [stages.responses(run)] if feedback == "preferences" else stages.all_responses(run)
    sampled = stages.read_responses(folders)
    P = run.cfg.align_prompts or len(sampled["ids"])
    if feedback == "preferences":
        winner = stages.winners(run, sampled["reward"][:, :2], "train")[:P]              # (P,)
        order = torch.stack([winner, 1 - winner], dim=1)                                 # (P, 2)
    else:
        order = torch.arange(K).expand(P, K)                                             # (P, K)
        if not run.own and run.cfg.reward == "model":                                    # not the oracle's
            sampled["reward"] = read_tensors(stages.reward_model(run) / "rewards.safetensors")[0]["reward"]
    row = torch.arange(P)[:, None]                                                       # (P, 1)
    drawn = {name: sampled[name][row, order] for name in CANDIDATES}
    if feedback == "preferences":
        drawn["reward"] = torch.tensor([1.0, 0.0]).expand(P, 2)
    return drawn


def drawn_from_policy(run, training):
    """The data of rounds: K responses of the present policy to each prompt.  -> function of t: {CANDIDATES}

    The rounds share the prompts out, so that they sample as many responses in all as the paper's one round.
    """
    cfg, K, beta = run.cfg, training.K, run.cfg.beta_r * run.cfg.beta_pi
    prompts = run.train_prompts()[:cfg.align_prompts or None]
    order = torch.randperm(len(prompts), generator=rng("rounds", training.seed))
    n = len(prompts) // training.rounds                              # prompts a round
    reward = stages.reward_function(run, stages.climbed(run))

    def scores(ids, mask):                                           # (N, T), (N, T) -> (N,) each
        logp = sequence_logprob(training.policy, ids, mask, cfg.temperature)
        sft_logp = sequence_logprob(training.ref, ids, mask, cfg.temperature)
        paid = reward(ids, mask) - beta * (logp - sft_logp)    # R
        # the loss's reference is pi_t, which drew these: the KL to pi_sft is in the reward already
        return {"ref_logp": logp, "reward": paid}

    def draw(t):
        chosen = [prompts[i] for i in order[t * n:(t + 1) * n]]
        return fresh_responses(run, training.policy, chosen, K, scores, rng("rounds", training.seed, t))
    return draw


def fresh_responses(run, policy, prompts, each, scores, generator):
    """`each` responses of the policy to every prompt, and their scores.  -> {name: (n, each, ...)}

    scores: (ids, mask), (N, T) each -> {name: (N,)}
    """
    cfg = run.cfg
    repeated = [prompt for prompt in prompts for _ in range(each)]
    new = respond(policy, repeated, cfg.new_tokens, cfg.temperature, run.eos_id, generator, cfg.sample_batch,
                  scores, run.block_size)
    new["ids"] = new["ids"].int()
    return {name: column.unflatten(0, (len(prompts), each)) for name, column in new.items()}


def equal_rounds(steps, rounds):
    """Divides the steps among the rounds.  -> [(round, step within it), ...]"""
    starts = [round(steps * t / rounds) for t in range(rounds + 1)]
    return [(t, i) for t in range(rounds) for i in range(starts[t + 1] - starts[t])]


def check_start(run, policy, data):
    """Under bfloat16, prints how far log pi lies from the stored log pi_sft; in float32 a test holds 1e-4."""
    if run.bf16:
        ids, mask, ref_logp = (data[name][:8].flatten(0, 1).to(run.device) for name in CANDIDATES[:3])
        with torch.no_grad():
            logp = sequence_logprob(policy, ids.long(), mask, run.cfg.temperature)
        h = (logp - ref_logp).abs().max()
        print(f"bfloat16: the largest |log pi - log pi_sft| before the first step is {h:.1e} nats")


def compare(implicit_reward, best, worst):
    """What beta_pi h, (b, K), says of the preferred response and of the other.  -> sums over the batch"""
    chosen = implicit_reward.gather(1, best[:, None])                                    # (b, 1)
    rejected = implicit_reward.gather(1, worst[:, None])                                 # (b, 1)
    return {"rewards_chosen": chosen.sum(), "rewards_rejected": rejected.sum(),
            "rewards_margin": (chosen - rejected).sum(), "rewards_accuracy": (chosen > rejected).sum()}


# ---- XPO ----------------------------------------------------------------------------------------------

def train_xpo(run, training):
    """XPO, and online DPO at --alpha 0: rounds of fresh pairs, labelled by the judge, and replay."""
    cfg, policy = run.cfg, training.policy
    history, closed = Rows(), Rows()                                 # all pairs; the rounds that ended early
    answers = stages.read_responses([stages.answers(run)])
    floor = -float(answers["reward"].max() - answers["reward"].min()) / cfg.beta_pi      # -R_max / beta
    schedule = xpo_schedule(cfg)
    for step, bar in training.steps(len(schedule), history=history, closed=closed):
        t, i = schedule[step]
        if i == 0:
            history.append(**fresh_pairs(run, training, answers, t))
        if len(closed) and closed.columns["round"][-1] == t:         # no step until the next round
            training.record(step, {}, 0, bar)
            continue
        index = shuffled_batch(i, cfg.align_batch, len(history), "xpo", training.seed, t)
        sums = Sums()
        for part in micro_batches(index, run.at_once(2)):
            pairs = {name: column[part].to(run.device) for name, column in history.columns.items()}
            ids, mask = trim(pairs["ids"].flatten(0, 1).long(), pairs["mask"].flatten(0, 1))   # (b 2, t)
            logp = sequence_logprob(policy, ids, mask, cfg.temperature)                  # (b 2,)
            logp, ref_logp = logp.view(len(part), 2), pairs["ref_logp"]                  # (b 2,) -> (b, 2)
            explore = pairs["explore"][:, None]                                          # (b, 1)
            explore_logp = logp.gather(1, explore).squeeze(1)                      # (b,) of pi_sft's response
            loss = xpo.xpo_loss(logp, ref_logp, explore_logp, cfg.beta_pi, cfg.alpha)
            (loss * len(part)).backward()
            h = (logp - ref_logp).detach()                                               # (b, 2)
            winner = torch.zeros_like(pairs["explore"])                                  # (b,) its column
            margins = compare(cfg.beta_pi * h, winner, winner + 1)
            sums.add(len(part), loss=loss * len(part), **margins, tokens=mask.sum(),
                     explore_logp=explore_logp.sum(), explore_log_ratio=h.gather(1, explore).sum())
        lr = cfg.align_lr * cosine(step, len(schedule), cfg.warmup)
        means = update(training.optimizer, lr, sums, index, f"xpo, step {step + 1}")
        if cfg.alpha > 0 and means["explore_log_ratio"] < floor:     # on a replay the bonus has no floor
            closed.append(round=torch.tensor([t]))
            bar.write(f"round {t + 1} ends early at step {step + 1}: log pi / pi_sft of pi_sft's responses "
                      f"fell below {floor:.1f} nats, further than the rewards can ask for")
        training.record(step, means | {"lr": lr}, means["tokens"] * len(index), bar)


def xpo_schedule(cfg):
    return xpo.schedule(cfg.xpo_rounds, cfg.xpo_prompts, cfg.xpo_epochs, cfg.align_batch)


def fresh_pairs(run, training, answers, t):
    """Round t's pairs: the present policy's answers to its prompts, and pi_sft's."""
    cfg, seed = run.cfg, training.seed
    order = torch.randperm(cfg.prompts, generator=rng("xpo prompts", seed))
    places = torch.arange(t * cfg.xpo_prompts, (t + 1) * cfg.xpo_prompts) % cfg.prompts
    sampled = {name: column[order[places], 0] for name, column in answers.items()}       # (n, ...)
    prompts = stages.prompts_of(sampled["ids"], sampled["mask"])

    def label(reward):
        return stages.winners(run, reward, "xpo", seed, t)

    def scores(ids, mask):                                                               # (N,) each
        ref_logp = sequence_logprob(training.ref, ids, mask, cfg.temperature)
        return {"ref_logp": ref_logp, "reward": training.judge(ids, mask)}

    fresh = fresh_responses(run, training.policy, prompts, 1, scores, rng("xpo", seed, t))
    fresh = {name: column[:, 0] for name, column in fresh.items()}                   # (n, 1, ...) -> (n, ...)
    return xpo.pairs(fresh, sampled, label)


# ---- PPO ----------------------------------------------------------------------------------------------

def train_ppo(run, training):
    """PPO on the reward that --reward names, at beta = beta_r beta_pi: the objective of the other methods."""
    cfg, seed, trained = run.cfg, training.seed, stages.climbed(run)
    reward = stages.reward_function(run, trained)
    critic = run.scorer(trained)
    # V in the reward's unit; the head has no bias, so the shift is left to the critic's first iterations
    critic.score.weight.data *= read_json(trained / "report.json").get("scale", 1.0)
    critic_optimizer = adamw(critic, cfg.ppo_critic_lr, eps=1e-5)
    prompts = run.train_prompts()
    critic_alone = min(cfg.ppo_warmup, cfg.ppo_steps - 1)
    state = {"critic": critic, "critic_optimizer": critic_optimizer}
    for step, bar in training.steps(cfg.ppo_steps, critic_alone, **state):
        index = shuffled_batch(step, cfg.ppo_batch, len(prompts), "ppo", seed)
        factor = cosine(step, cfg.ppo_steps, cfg.warmup)
        stats = ppo.iteration(
            training.policy, training.ref, critic, training.optimizer, critic_optimizer, reward,
            [prompts[i] for i in index], policy_lr=cfg.ppo_lr * factor, critic_lr=cfg.ppo_critic_lr * factor,
            beta=cfg.beta_pi * cfg.beta_r, max_new_tokens=cfg.new_tokens, temperature=cfg.temperature,
            eos_id=run.eos_id, generator=rng("ppo rollout", seed, step), epochs=cfg.ppo_epochs,
            minibatches=cfg.ppo_minibatches, critic_only=step < critic_alone, sample_batch=cfg.sample_batch,
            micro_batch_size=cfg.micro_batch_size, where=f"ppo, step {step + 1}")
        training.record(step, stats | {"lr": cfg.ppo_lr * factor}, stats["length"] * cfg.ppo_batch, bar)


# ---- what the loops share -----------------------------------------------------------------------------

class Training:
    """One alignment of a run: the policy to train, its folder, its logs, and the checkpoints on the way."""

    def __init__(self, run, method, feedback, K, rounds, seed):
        self.run, self.method, self.feedback = run, method, feedback
        self.K, self.rounds, self.seed = K, rounds, seed
        self.folder = run.folder / name_of(run.cfg, method, feedback, K, rounds, seed)

    def begin(self):
        """Makes the stages before it, then all that the loops need.  -> whether it is finished already"""
        run = self.run
        sft, oracle = stages.sft(run), stages.oracle(run)
        if self.feedback == "reward":
            upstream = [sft, oracle, *stages.all_responses(run), stages.climbed(run)]
        else:
            upstream = [sft, oracle, stages.responses(run)]
        if begin(self.folder, self.settings(), upstream, self.about()):
            return True
        reference = stages.reference(run)
        self.start = read_tensors(reference / "samples.safetensors")[0]                  # pi_sft's responses
        self.policy = run.policy(sft)
        self.ref = run.policy(sft)
        self.judge = stages.judge(run)                               # of XPO's labels
        self.evaluator = stages.evaluator(run) if run.cfg.judge else self.judge
        self.held_out = stages.own_responses(run, "test") if run.own else None
        self.optimizer = adamw(self.policy, run.cfg.align_lr, eps=1e-5 if self.method == "ppo" else 1e-8)
        self.metrics = Log(self.folder / "metrics.csv")
        self.evaluations = Log(self.folder / "eval.csv")
        self.tokens = self.seconds = 0.0                             # trained on since the last printed line
        return False

    def settings(self):
        kind = self.method if self.method in ("ppo", "xpo") else "offline"
        own = {"method": self.method, "seed": self.seed, "rounds": self.rounds}
        if self.feedback == "reward":
            own["reward"] = self.run.cfg.reward
        return self.run.settings("align", kind) | own

    def about(self):
        """What figures and sample.py read in stage.json."""
        cfg = self.run.cfg
        steps = {"ppo": cfg.ppo_steps, "xpo": len(xpo_schedule(cfg))}.get(self.method, cfg.align_steps)
        prompts = cfg.align_prompts if self.method in ("exo", "dpo") else 0
        return {"method": self.method, "feedback": self.feedback, "labels": cfg.labels,
                "reward": cfg.reward if self.feedback == "reward" else "",
                "K": self.K, "rounds": self.rounds, "prompts": prompts or cfg.prompts,
                "beta_pi": cfg.beta_pi, "beta_r": cfg.beta_r,
                "alpha": cfg.alpha if self.method == "xpo" else 0.0,
                "steps": steps, "lr": cfg.ppo_lr if self.method == "ppo" else cfg.align_lr, "seed": self.seed}

    def steps(self, total, frozen=0, **state):
        """Yields (step, progress bar), resumable; state: what the loop keeps beside policy and optimizer.

        frozen: first steps that leave the policy as it is.  Checkpoints are spaced in the root of the rest.
        """
        n = self.run.cfg.checkpoints
        spaced = [frozen + (total - frozen) * ((i + 1) / n) ** 2 for i in range(n)]
        self.checkpoints = sorted({max(1, round(step)) for step in spaced})
        state |= {"policy": self.policy, "optimizer": self.optimizer, "metrics": self.metrics,
                  "eval": self.evaluations}
        every = self.run.cfg.save_every
        for step, bar in resumable(self.folder, state, total, every, self.folder.name):
            if step == 0:
                self.evaluations.write(step=0, **self.evaluated(self.start))
            self.began = time.perf_counter()
            yield step, bar

    def evaluated(self, samples):
        """A row of eval.csv, but for its step."""
        row = summary(samples, self.run.eos_id) | stages.drift(self.run, self.policy, samples, self.start)
        if self.held_out:
            row |= stages.implicit(self.run, self.policy, self.held_out)
        return row

    def record(self, step, means, tokens, bar):
        """Logs a step, which trained on so many tokens; at a checkpoint evaluates and keeps the policy.

        means: empty for a step that was not taken.
        """
        if means:
            self.metrics.write(step=step + 1, **means)
        self.tokens += tokens
        self.seconds += time.perf_counter() - self.began
        shown = ("loss", "rewards_margin", "rewards_accuracy", "reward", "kl", "explore_log_ratio")
        postfix = {name.removeprefix("rewards_"): f"{means[name]:.3f}" for name in shown if name in means}
        bar.set_postfix(postfix, refresh=False)
        if step + 1 in self.checkpoints:
            self.checkpoint(step + 1, means, bar)

    def checkpoint(self, step, means, bar):
        """Evaluates the policy after `step` steps, keeps its weights and responses, prints a line."""
        run = self.run
        folder = self.folder / f"step-{step:05d}"
        generator = rng("evaluate", self.seed, step)
        samples = stages.evaluation(run, self.policy, self.ref, self.evaluator, generator)
        row = self.evaluated(samples)
        run.save_policy(self.policy, folder)
        write_tensors(self.folder / "samples" / f"{folder.name}.safetensors", samples)
        self.evaluations.write(step=step, **row)                     # last: a row says that the rest is there
        learned = f"loss {means['loss']:.3f}, " if means else ""
        if "rewards_margin" in means and self.rounds == 1:           # in rounds they begin at 0 each time
            learned += f"margin {means['rewards_margin']:.3f}, accuracy {means['rewards_accuracy']:.3f}, "
        if self.held_out:
            learned += (f"held out: margin {row['held_out_margin']:.3f}, accuracy "
                        f"{row['held_out_accuracy']:.3f}, ")
        speed = self.tokens / self.seconds if self.seconds else 0
        start = mean_se(self.start["reward"])[0]
        bar.write(f"{self.folder.name}, step {step}: {learned}reward {row['reward']:.2f} (pi_sft "
                  f"{start:.2f}) at KL {row['kl']:.2f} nats, length {row['length']:.0f}, "
                  f"{speed:,.0f} tokens/s")
        self.tokens = self.seconds = 0.0
        self.prune()
        figures.progress(run)

    @on_first
    def prune(self):
        """Removes the weights that --keep does not ask for; the samples stay."""
        if self.run.cfg.keep == "all":
            return
        rows = read_csv(self.folder / "eval.csv")[1:]
        kept = rows[-1:]
        if self.run.cfg.keep == "best":
            kept.append(max(rows, key=lambda row: row["reward"]))
        names = {f"step-{int(row['step']):05d}" for row in kept}
        for old in self.folder.glob("step-*"):
            if old.name not in names:
                shutil.rmtree(old)

    def finish(self):
        final = f"step-{self.checkpoints[-1]:05d}"
        samples = read_tensors(self.folder / "samples" / f"{final}.safetensors")[0]
        figures.write_samples(self.run, self.folder, self.start, samples)
        finish(self.folder, final=final)


def name_of(cfg, method, feedback, K, rounds, seed):
    """An alignment's folder: exo-preferences-s0, exo-reward-k4-betapi0.25-s0; a trial names its rate too."""
    usual = vars(Config()) | PRESETS[cfg.preset]
    online_dpo = method == "xpo" and cfg.alpha == 0
    name = f"{'online-dpo' if online_dpo else method}-{feedback}"
    if feedback == "reward" and cfg.reward == "oracle":
        name += "-oracle"
    if K:
        name += f"-k{K}"
    if rounds > 1:
        name += f"-rounds{rounds}"
    if cfg.align_prompts and method in ("exo", "dpo"):
        name += f"-prompts{cfg.align_prompts}"
    for setting in ("beta_pi", "beta_r", "alpha"):
        shown = setting != "alpha" or (method == "xpo" and not online_dpo)
        if shown and getattr(cfg, setting) != usual[setting]:
            name += f"-{setting.replace('_', '')}{getattr(cfg, setting):g}"
    if cfg.eval_split == "train":
        name += f"-lr{cfg.ppo_lr if method == 'ppo' else cfg.align_lr:g}"
    return f"{name}-s{seed}"


def plan(cfg):
    """The alignments that the command asks for: (method, feedback, K, rounds)."""
    offline = [(method, "preferences", 0, 1) for method in ("exo", "dpo")]
    rounds = 1 if cfg.method == "all" else cfg.rounds
    offline += [(method, "reward", K, rounds) for K in cfg.num_candidates for method in ("exo", "dpo")]
    online = [("ppo", "reward", 0, 1), ("xpo", "preferences", 0, 1)]
    if cfg.method in ("ppo", "xpo"):
        return [one for one in online if one[0] == cfg.method]
    if cfg.method != "all":
        return [one for one in offline if one[:2] == (cfg.method, cfg.feedback)]
    K = 4 if 4 in cfg.num_candidates else cfg.num_candidates[0]
    in_rounds = [("exo", "reward", K, cfg.rounds)] if cfg.rounds > 1 else []
    return offline + in_rounds + online


def align(run, method, feedback, K, rounds, seed):
    """One alignment, unless it is there: pi_sft trained by the method, evaluated on the way."""
    training = Training(run, method, feedback, K, rounds, seed)
    finished = training.begin()
    checkpoint.write_json(run.folder / "config.json", vars(run.cfg))    # once the stages accepted them
    if finished:
        return
    if method == "ppo":
        train_ppo(run, training)
    elif method == "xpo":
        train_xpo(run, training)
    else:
        train_exo_dpo(run, training)
    training.finish()


def introduce(cfg, why, device, bf16):
    """One line: what runs where, and why."""
    where = f"{torch.get_num_threads()} threads"
    if device.type == "cuda":
        where = torch.cuda.get_device_name()
    if compute.world() > 1:
        where += f" · {compute.world()} processes"
    products = "bfloat16 products, float32 weights" if bf16 else f"float32, {cfg.matmul} precision"
    presets = ", ".join(PRESETS)
    print(f"preset {cfg.preset} ({why}; --preset {presets} to choose) · "
          f"{device.type} {where} · {products} · torch {torch.__version__} · {cfg.run}")


def announce(run):
    """Two lines: what the command needs, made where it is not there yet, and the disk that it takes."""
    cfg = run.cfg
    plans = len(cfg.seeds) * len(plan(cfg))
    model = stages.model_config(run)
    weights = 4 * dryrun.parameters(model)
    kept = {"all": cfg.checkpoints, "best": 2, "last": 1}[cfg.keep]
    row = 5 * run.block_size                                         # ids in int32, and the mask
    evaluated = cfg.eval_prompts * cfg.eval_samples
    planned = {stage.name: stage for stage in dryrun.stages(cfg, plan(cfg))}
    drawn = cfg.prompts * cfg.responses if run.own else planned["responses"].sampled
    saves = 18 if cfg.method in ("ppo", "all") else 9                # of three, a model with its moments
    models = (2 if run.own else 3) + plans * kept + saves
    disk = models * weights + row * (drawn + plans * cfg.checkpoints * evaluated)
    scores = "" if run.own else f", oracle {cfg.oracle_steps:,}"
    if "reward_model" in planned:
        scores += f", reward model {cfg.rm_steps:,}"
    print(f"steps: sft {cfg.sft_steps:,}{scores}; alignments: {plans}, evaluated {cfg.checkpoints} times "
          "each")
    print(f"samples: {drawn:,} responses, {evaluated:,} an evaluation, "
          f"{cfg.limit_prompts * cfg.limit_responses:,} for the limit · disk: about {disk / 1e6:,.0f} MB, "
          f"with --keep {cfg.keep}")


def begin_with_sft(run):
    """Trains pi_sft, unless it is there; its speed then tells how long the rest will take."""
    begun = (run.folder / "sft").exists()
    start = time.perf_counter()
    stages.sft(run)
    minutes = (time.perf_counter() - start) / 60
    if not begun:
        rest = minutes * dryrun.rest(run.cfg, len(run.cfg.seeds) * plan(run.cfg))
        print(f"sft took {minutes:.1f} minutes; at its speed the rest takes about {rest:.1f}")


def main(argv=None):
    """The command: every stage and alignment that is not there yet, then the figures and the table."""
    cfg, why = parse(argv)
    held = None
    try:
        if cfg.dry_run:
            return dryrun.report(cfg, plan(cfg))
        device = compute.start(compute.pick_device(cfg.device))
        bf16 = compute.arithmetic(device, cfg.matmul)
        introduce(cfg, why, device, bf16)
        held = checkpoint.lock(cfg.run) if rank() == 0 else None     # open and locked until the end
        compute.agreed(0)                                         # no process goes on before process 0 has it
        checkpoint.catch_signals()
        run = Run(cfg, device, bf16)
        if cfg.judge:
            stages.evaluator(run)                                    # a wrong name shows before the work
        if run.own:
            settle(run)
        announce(run)
        begin_with_sft(run)
        for seed in cfg.seeds:
            for method, feedback, K, rounds in plan(cfg):
                align(run, method, feedback, K, rounds, seed)
        if cfg.limit_responses:
            stages.limit(run)
        figures.draw(run)
        compute.stop()
        if held:
            held.close()
    except UserError as error:
        if held:
            checkpoint.unreserve(cfg.run)
        sys.exit(f"train.py: {error}" if rank() == 0 else 1)
    except Stopped as stopped:
        if rank() == 0:
            command = shlex.join(sys.argv[1:] if argv is None else argv)
            print(f"stopped; go on with: python train.py {command}", file=sys.stderr)
        sys.exit(128 + stopped.args[0])
    except (RuntimeError, MemoryError) as error:
        if not compute.out_of_memory(error):
            raise
        sys.exit("train.py: out of memory: lower --micro-batch-size (or set it: results do not change), "
                 "or --sample-batch in another --run")


if __name__ == "__main__":
    main()
