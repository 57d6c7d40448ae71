"""From reviews to aligned policies, by one command:  python train.py --method exo

The stages of stages.py come first: pi_sft, oracle, responses, reward model.  Then, here, the loops that align
pi_sft by EXO, DPO, XPO or PPO, with checkpoints evaluated on the way; at the end the table and the figures.
The same command again goes on where it stopped; another method starts at its alignment.
"""
import shlex
import sys
import time

import torch

import checkpoint
import compute
import figures
import ppo
import stages
import xpo
from checkpoint import Log, Rows, Stopped, begin, finish, read_json, read_tensors, resumable, write_tensors
from compute import Sums, UserError, adamw, batch_at, cosine, micro_batches, rank, rng, update
from dpo import dpo_loss, dpo_reward_loss
from evaluate import summary
from exo import exo_loss, exo_pref_loss
from model import sequence_logprob, trim
from run import Run, settle
from settings import PRESETS, Config, parse

# ---- EXO and DPO --------------------------------------------------------------------------------------

def train_offline(run, training):
    """EXO and DPO on responses of pi_sft: on pairs (Eq 18, Eq 7), or on K scored responses (Eq 15, Eq 19)."""
    cfg, policy, method = run.cfg, training.policy, training.method
    ids, mask, ref_logp, reward = candidates(run, training.feedback, training.K)
    check_start(run, policy, ids[:8], mask[:8], ref_logp[:8])
    K = ids.shape[1]
    plain_order = torch.zeros(len(ids))                              # batches are not sorted by length
    for step, bar in training.steps(cfg.align_steps):
        index = batch_at(step, cfg.align_batch, plain_order, "align", training.seed, window=1)
        sums = Sums()
        for part in micro_batches(index, run.at_once(K)):
            x, m = trim(ids[part].flatten(0, 1).long(), mask[part].flatten(0, 1))      # (b, K, T) -> (b K, t)
            logp = sequence_logprob(policy, x, m, cfg.temperature).view(len(part), K)    # (b K,) -> (b, K)
            ref, r = ref_logp[part], reward[part]                                        # (b, K)
            if training.feedback == "preferences" and method == "exo":
                loss = exo_pref_loss(logp, ref, cfg.beta_pi, cfg.eps)
            elif training.feedback == "preferences":
                loss = dpo_loss(logp, ref, cfg.beta_pi)
            elif method == "exo":
                loss = exo_loss(logp, ref, r, cfg.beta_r, cfg.beta_pi)
            else:
                loss = dpo_reward_loss(logp, ref, r, cfg.beta_r, cfg.beta_pi)
            (loss * len(part)).backward()
            implicit_reward = cfg.beta_pi * (logp - ref).detach()                        # (b, K)
            margins = compare(implicit_reward, r.argmax(1), r.argmin(1))
            sums.add(len(part), loss=loss * len(part), **margins, tokens=m.sum())
        lr = cfg.align_lr * cosine(step, cfg.align_steps)
        means = update(training.optimizer, lr, sums, index, f"{method}, step {step + 1}")
        training.record(step, means, means["tokens"] * len(index), bar)


def candidates(run, feedback, K):
    """What EXO and DPO train on.  -> ids, mask (P, K, T), ref_logp, reward (P, K)

    Pairs: column 0 is the chosen response; the rewards are 1 and 0.
    """
    sampled = read_tensors(stages.responses(run) / "responses.safetensors")[0]
    P = len(sampled["ids"])
    if feedback == "reward":
        order = torch.arange(K).expand(P, K)                                             # (P, K)
        if not run.scored:
            sampled |= read_tensors(stages.reward_model(run) / "rewards.safetensors")[0]
    else:
        winner = stages.winners(run, sampled["reward"][:, :2], "train")                  # (P,)
        order = torch.stack([winner, 1 - winner], dim=1)                                 # (P, 2)
        sampled["reward"] = torch.stack([1 - winner, winner], dim=1).float()             # (P, 2)
    row = torch.arange(P)[:, None]                                                       # (P, 1)
    return [sampled[name][row, order].to(run.device) for name in ("ids", "mask", "ref_logp", "reward")]


def check_start(run, policy, ids, mask, ref_logp):
    """Under bfloat16, prints how far log pi lies from the stored log pi_sft; in float32 a test holds 1e-4."""
    if run.bf16:
        with torch.no_grad():
            logp = sequence_logprob(policy, ids.flatten(0, 1).long(), mask.flatten(0, 1), run.cfg.temperature)
        h = (logp - ref_logp.flatten()).abs().max()
        print(f"bfloat16: the largest |log pi - log pi_sft| before the first step is {h:.1e} nats")


def compare(implicit_reward, best, worst):
    """What beta_pi h, (b, K), says of the preferred response and of the other.  -> sums over the batch"""
    row = torch.arange(len(implicit_reward))
    chosen = implicit_reward[row, best]                                                  # (b,)
    rejected = implicit_reward[row, worst]                                               # (b,)
    return {"rewards_chosen": chosen.sum(), "rewards_rejected": rejected.sum(),
            "rewards_margin": (chosen - rejected).sum(), "rewards_accuracy": (chosen > rejected).sum()}


# ---- XPO ----------------------------------------------------------------------------------------------

def train_xpo(run, training):
    """XPO, and online DPO at --alpha 0: rounds of fresh pairs, labelled by the judge, and replay."""
    cfg, policy = run.cfg, training.policy
    history, closed = Rows(), Rows()                                 # all pairs; the rounds that ended early
    answers = read_tensors(stages.answers(run) / "responses.safetensors")[0]
    floor = -float(answers["reward"].max() - answers["reward"].min()) / cfg.beta_pi      # -R_max / beta
    schedule = xpo.schedule(cfg.xpo_rounds, cfg.xpo_prompts, cfg.xpo_epochs, cfg.align_batch)
    for step, bar in training.steps(len(schedule), history=history, closed=closed):
        t, i = schedule[step]
        if i == 0:
            history.append(**fresh_pairs(run, training, answers, t))
        if len(closed) and closed.columns["round"][-1] == t:         # no step until the next round
            training.record(step, {"loss": float("nan"), "grad_norm": float("nan")}, 0, bar)
            continue
        plain_order = torch.zeros(len(history))                      # batches are not sorted by length
        index = batch_at(i, cfg.align_batch, plain_order, "xpo", training.seed, t, window=1)
        sums = Sums()
        for part in micro_batches(index, run.at_once(2)):
            pairs = {name: column[part].to(run.device) for name, column in history.columns.items()}
            x, m = trim(pairs["ids"].flatten(0, 1).long(), pairs["mask"].flatten(0, 1))  # (b 2, t)
            logp = sequence_logprob(policy, x, m, cfg.temperature).view(len(part), 2)    # (b 2,) -> (b, 2)
            ref, explore = pairs["ref_logp"], pairs["explore"][:, None]                  # (b, 2), (b, 1)
            explore_logp = logp.gather(1, explore).squeeze(1)                      # (b,) of pi_sft's response
            loss = xpo.xpo_loss(logp, ref, explore_logp, cfg.beta_pi, cfg.alpha)
            (loss * len(part)).backward()
            h = (logp - ref).detach()                                                    # (b, 2)
            margins = compare(cfg.beta_pi * h, torch.zeros_like(part), torch.ones_like(part))
            sums.add(len(part), loss=loss * len(part), **margins, tokens=m.sum(),
                     explore_logp=explore_logp.sum(), explore_log_ratio=h.gather(1, explore).sum())
        lr = cfg.align_lr * cosine(step, len(schedule))
        means = update(training.optimizer, lr, sums, index, f"xpo, step {step + 1}")
        if means["explore_log_ratio"] < floor:                 # the bonus has no floor of its own on a replay
            closed.append(round=torch.tensor([t]))
        training.record(step, means, means["tokens"] * len(index), bar)


def fresh_pairs(run, training, answers, t):
    """Round t's pairs: the present policy's answers to its prompts, and pi_sft's."""
    cfg, seed = run.cfg, training.seed
    order = torch.randperm(cfg.prompts, generator=rng("xpo prompts", seed))
    places = torch.arange(t * cfg.xpo_prompts, (t + 1) * cfg.xpo_prompts) % cfg.prompts
    sampled = {name: column[order[places], 0] for name, column in answers.items()}       # (n, ...)
    prompts = stages.prompts_of(sampled["ids"], sampled["mask"])

    def label(reward):
        return stages.winners(run, reward, "xpo", seed, t)

    return xpo.play(training.policy, training.ref, training.judge, label, prompts, sampled, cfg.new_tokens,
                    cfg.temperature, run.eos_id, rng("xpo", seed, t), cfg.sample_batch)


# ---- PPO ----------------------------------------------------------------------------------------------

def train_ppo(run, training):
    """PPO on the reward model's reward, at beta = beta_r beta_pi: the objective of the other methods."""
    cfg, seed, trained = run.cfg, training.seed, stages.reward_model(run)
    reward = stages.reward_function(run, trained)
    critic = run.scorer(trained)
    critic.score.weight.data *= read_json(trained / "report.json")["scale"]
    critic_optimizer = adamw(critic, cfg.ppo_critic_lr, eps=1e-5)
    prompts = run.train_prompts()
    plain_order = torch.zeros(len(prompts))
    for step, bar in training.steps(cfg.ppo_steps, critic=critic, critic_optimizer=critic_optimizer):
        index = batch_at(step, cfg.ppo_batch, plain_order, "ppo", seed)
        factor = cosine(step, cfg.ppo_steps)
        stats = ppo.iteration(
            training.policy, training.ref, critic, training.optimizer, critic_optimizer, reward,
            [prompts[i] for i in index], policy_lr=cfg.ppo_lr * factor, critic_lr=cfg.ppo_critic_lr * factor,
            beta=cfg.beta_pi * cfg.beta_r, max_new_tokens=cfg.new_tokens, temperature=cfg.temperature,
            eos_id=run.eos_id, generator=rng("ppo", seed, step), epochs=cfg.ppo_epochs,
            minibatches=cfg.ppo_minibatches, critic_only=step < cfg.ppo_warmup,
            micro_batch_size=cfg.micro_batch_size, where=f"ppo, step {step + 1}")
        training.record(step, stats, stats["length"] * cfg.ppo_batch, bar)


# ---- what the loops share -----------------------------------------------------------------------------

class Training:
    """One alignment of a run: the policy to train, its folder, its logs, and the checkpoints on the way."""

    def __init__(self, run, method, feedback, K, seed):
        self.run, self.method, self.feedback, self.K, self.seed = run, method, feedback, K, seed
        self.folder = run.folder / name_of(run.cfg, method, feedback, K, seed)
        sft, oracle = stages.sft(run), stages.oracle(run)
        upstream = [sft, oracle, stages.responses(run)]
        if feedback == "reward":
            upstream.append(stages.reward_model(run))
        self.finished = begin(self.folder, self.settings(), upstream, self.about())
        if self.finished:
            return
        self.policy = run.policy(sft)
        self.ref = run.policy(sft)
        self.judge = stages.judge(run)
        self.optimizer = adamw(self.policy, run.cfg.align_lr, eps=1e-5 if method == "ppo" else 1e-8)
        self.metrics = Log(self.folder / "metrics.csv")
        self.evaluations = Log(self.folder / "eval.csv")
        self.start = read_tensors(stages.reference(run) / "samples.safetensors")[0]      # pi_sft's responses
        self.tokens = self.seconds = 0.0                             # trained on since the last printed line

    def settings(self):
        kind = self.method if self.method in ("ppo", "xpo") else "offline"
        return self.run.settings("align", kind) | {"method": self.method, "seed": self.seed}

    def about(self):
        """What figures and sample.py read in stage.json."""
        cfg = self.run.cfg
        return {"method": self.method, "feedback": self.feedback, "K": self.K, "beta_pi": cfg.beta_pi,
                "beta_r": cfg.beta_r, "alpha": cfg.alpha if self.method == "xpo" else 0.0,
                "lr": cfg.ppo_lr if self.method == "ppo" else cfg.align_lr, "seed": self.seed}

    def steps(self, total, **state):
        """Yields (step, progress bar), resumable; state: what the loop keeps beside policy and optimizer."""
        n = self.run.cfg.checkpoints
        self.checkpoints = [round(total * (i + 1) / n) for i in range(n)]
        state |= {"policy": self.policy, "optimizer": self.optimizer, "metrics": self.metrics,
                  "eval": self.evaluations}
        every = min(self.run.cfg.save_every, max(1, total // 10))
        for step, bar in resumable(self.folder, state, total, every, self.folder.name):
            if step == 0:
                self.evaluations.write(step=0, **summary(self.start, self.run.eos_id))
            self.began = time.perf_counter()
            yield step, bar

    def record(self, step, means, tokens, bar):
        """Logs a step, which trained on so many tokens; at a checkpoint evaluates and keeps the policy."""
        self.metrics.write(step=step + 1, **means)
        self.tokens += tokens
        self.seconds += time.perf_counter() - self.began
        shown = ("loss", "rewards_margin", "rewards_accuracy", "reward", "kl", "explore_log_ratio")
        postfix = {name.removeprefix("rewards_"): f"{means[name]:.3f}" for name in shown if name in means}
        bar.set_postfix(postfix, refresh=False)
        if step + 1 in self.checkpoints:
            self.checkpoint(step + 1, means, bar)

    def checkpoint(self, step, means, bar):
        run = self.run
        folder = self.folder / f"step-{step:05d}"
        samples = stages.evaluation(run, self.policy, self.ref, self.judge, rng("evaluate", self.seed, step))
        row = summary(samples, run.eos_id)
        self.policy.save_pretrained(folder, run.eos_id)
        write_tensors(folder / "samples.safetensors", samples)
        self.evaluations.write(step=step, **row)                     # last: a row says that the rest is there
        learned = ""
        if "rewards_margin" in means:
            learned = f", margin {means['rewards_margin']:.3f}, accuracy {means['rewards_accuracy']:.3f}"
        speed = self.tokens / self.seconds if self.seconds else 0
        bar.write(f"step {step}: loss {means['loss']:.3f}{learned}, reward {row['reward']:.2f} at KL "
                  f"{row['kl']:.2f} nats, length {row['length']:.0f}, {speed:,.0f} tokens/s")
        self.tokens = self.seconds = 0.0
        figures.progress(run)

    def finish(self):
        final = f"step-{self.checkpoints[-1]:05d}"
        samples = read_tensors(self.folder / final / "samples.safetensors")[0]
        figures.write_samples(self.run, self.folder, self.start, samples)
        finish(self.folder, final=final)


def name_of(cfg, method, feedback, K, seed):
    """An alignment's folder: exo-preferences-s0, exo-reward-k4-betapi0.25-s0; a trial names its rate too."""
    usual = vars(Config()) | PRESETS[cfg.preset]
    online_dpo = method == "xpo" and cfg.alpha == 0
    name = f"{'online-dpo' if online_dpo else method}-{feedback}"
    if K:
        name += f"-k{K}"
    for setting in ("beta_pi", "beta_r", "alpha"):
        shown = setting != "alpha" or (method == "xpo" and not online_dpo)
        if shown and getattr(cfg, setting) != usual[setting]:
            name += f"-{setting.replace('_', '')}{getattr(cfg, setting):g}"
    if cfg.eval_split == "train":
        name += f"-lr{cfg.ppo_lr if method == 'ppo' else cfg.align_lr:g}"
    return f"{name}-s{seed}"


def plan(cfg):
    """The alignments that the command asks for: (method, feedback, K)."""
    on_pairs = [(method, "preferences", 0) for method in ("exo", "dpo")]
    on_rewards = [(method, "reward", K) for K in cfg.num_candidates for method in ("exo", "dpo")]
    online = [("ppo", "reward", 0), ("xpo", "preferences", 0)]
    if cfg.method == "all":
        return on_pairs + on_rewards + online
    if cfg.method in ("ppo", "xpo"):
        return [one for one in online if one[0] == cfg.method]
    return [one for one in on_pairs + on_rewards if one[:2] == (cfg.method, cfg.feedback)]


def align(run, method, feedback, K, seed):
    """One alignment, unless it is there: pi_sft trained by the method, evaluated on the way."""
    training = Training(run, method, feedback, K, seed)
    checkpoint.write_json(run.folder / "config.json", vars(run.cfg))    # once the stages accepted them
    if training.finished:
        return
    if method == "ppo":
        train_ppo(run, training)
    elif method == "xpo":
        train_xpo(run, training)
    else:
        train_offline(run, training)
    training.finish()


def introduce(cfg, why, device, bf16):
    """One line: what runs where, and why."""
    where = f"{torch.get_num_threads()} threads"
    if device.type == "cuda":
        where = torch.cuda.get_device_name()
    if compute.world() > 1:
        where += f" · {compute.world()} processes"
    products = "bfloat16 products, float32 weights" if bf16 else f"float32, {cfg.matmul} precision"
    print(f"preset {cfg.preset} ({why}; --preset tiny, imdb-small, imdb or imdb-large to choose) · "
          f"{device.type} {where} · {products} · torch {torch.__version__} · {cfg.run}")


def main(argv=None):
    cfg, why = parse(argv)
    try:
        device = compute.start(compute.pick_device(cfg.device))
        bf16 = compute.arithmetic(device, cfg.matmul)
        introduce(cfg, why, device, bf16)
        held = checkpoint.lock(cfg.run) if rank() == 0 else None     # open and locked until the end
        compute.agreed(0)                                         # no process goes on before process 0 has it
        checkpoint.catch_signals()
        run = Run(cfg, device, bf16)
        if run.own:
            settle(run)
        for seed in cfg.seeds:
            for method, feedback, K in plan(cfg):
                align(run, method, feedback, K, seed)
        stages.limit(run)
        figures.draw(run)
        compute.stop()
        if held:
            held.close()
    except UserError as error:
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
