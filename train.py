"""From reviews to aligned policies, by one command:  python train.py --method exo

Stages (stages.py) run when first needed: pi_sft, oracle, responses, for some methods a reward model.  The
loops in this file align pi_sft and evaluate it on the way.  The figures and the table come last.  The same
command given again resumes where it stopped.

EXO, DPO and XPO are one loop: they differ in whose responses are compared (`candidates`) and in one line of
loss (`loss_of`).  PPO is `ppo.iteration` in a loop.
"""
import itertools
import sys

import torch

import data
import figures
import ppo
import stages
import xpo
from dpo import dpo_loss, dpo_reward_loss
from evaluate import summary, wins
from exo import exo_loss, exo_pref_loss
from loop import (
    Columns, Log, Sums, UserError, adamw, cosine, finish, lock, my_rows, read_tensors, resumable,
    shuffled_batch, update, write_json, write_tensors)
from model import sequence_logprob, trim
from settings import SCORED, parse

# ---- EXO, DPO, XPO ------------------------------------------------------------------------------------

def loss_of(method, logp, c, cfg):
    """The line in which the methods differ.  -> scalar, the mean over b prompts

    logp: (b, K), with gradient; c: the same rows of `candidates`; in pairs, column 0 is the winner.
    """
    ref_logp, reward = c["ref_logp"], c["reward"]                                # (b, K) each
    if method == "exo":
        return exo_pref_loss(logp, ref_logp, cfg.beta_pi, cfg.eps)               # Eq 18
    if method == "dpo":
        return dpo_loss(logp, ref_logp, cfg.beta_pi)                             # Eq 7
    if method == "exo-rw":
        return exo_loss(logp, ref_logp, reward, cfg.beta_r, cfg.beta_pi)         # Eq 15
    if method == "dpo-rw":
        return dpo_reward_loss(logp, ref_logp, reward, cfg.beta_r, cfg.beta_pi)  # Eq 19
    explore_logp = logp.gather(1, c["explore"][:, None]).squeeze(1)              # (b,)  of pi_sft's response
    return xpo.xpo_loss(logp, ref_logp, explore_logp, cfg.beta_pi, cfg.alpha * cfg.beta_pi)


def align_by_comparison(run, alignment):
    """EXO, DPO and XPO: steps on candidates, which are drawn once, or again in each round.

    XPO learns from the pairs of all rounds so far, the others from their round's candidates.
    """
    cfg, method, policy = run.cfg, alignment.method, alignment.policy
    if method == "xpo":
        sizes = xpo.schedule(cfg.xpo_rounds, prompts_per_round(cfg, cfg.xpo_rounds), cfg.align_batch)
    else:
        rounds = cfg.rounds if method in SCORED else 1
        sizes = [cfg.align_steps // rounds] * rounds                             # steps of each round
    schedule = [(t, i) for t, size in enumerate(sizes) for i in range(size)]
    in_rounds = len(sizes) > 1
    compared = Columns() if in_rounds else candidates(run, alignment, 0)
    kept = {"compared": compared} if in_rounds else {}       # pi_t's responses cannot be drawn again
    for step in alignment.steps(len(schedule), **kept):
        t, i = schedule[step]
        if in_rounds and i == 0:
            if method != "xpo":
                compared.clear()
            compared.append(candidates(run, alignment, t))
        P, K = compared["reward"].shape
        index = shuffled_batch(i, cfg.align_batch, P, cfg.pipeline, "align", alignment.seed, t)
        index = index[compared["mask"][index].any(1).sum(1).argsort()]           # micro-batches pad less
        sums = Sums()
        for part in my_rows(index).split(run.at_once(K, len(index))):
            c = {name: column[part].to(run.device) for name, column in compared.items()}
            ids, mask = trim(c["ids"].flatten(0, 1).long(), c["mask"].flatten(0, 1))     # (b K, t) x2
            logp = sequence_logprob(policy, ids, mask, cfg.temperature).view(-1, K)      # (b, K)
            loss = loss_of(method, logp, c, cfg) * len(part)                     # a sum: `update` divides
            loss.backward()
            sums.add(len(part), loss=loss, **implicit_rewards(logp.detach(), c, cfg.beta_pi))
        lr = (cfg.rw_lr if method in SCORED else cfg.align_lr) * cosine(step, len(schedule))
        means = update([alignment.optimizer], lr, sums, f"{method}, step {step + 1}")
        alignment.metrics.write(step=step + 1, lr=lr, **means)


def implicit_rewards(logp, c, beta_pi):
    """beta_pi h of the best and the worst response, how often the best's is higher.  -> {name: sum over b}"""
    h = beta_pi * (logp - c["ref_logp"])                                         # (b, K)
    best = h.gather(1, c["reward"].argmax(1, keepdim=True))                      # (b, 1)
    worst = h.gather(1, c["reward"].argmin(1, keepdim=True))                     # (b, 1)
    return {"chosen": best.sum(), "rejected": worst.sum(), "accuracy": wins(best, worst).sum()}


# ---- whose responses are compared ---------------------------------------------------------------------

def candidates(run, alignment, t):
    """Round t's responses.  -> {ids, mask: (P, K, T), ref_logp, reward: (P, K)}, for XPO also explore: (P,)

    The paper draws them once, from pi_sft: pairs, or K scored ones.  With --rounds they are drawn in each
    round, from the current policy pi_t, which is then the loss's reference, and the KL to pi_sft is already
    subtracted from the reward: R = r - beta (log pi_t - log pi_sft).  The optimum is pi*_beta in either case.
    XPO pairs pi_t's response with pi_sft's; explore says which column is pi_sft's.
    """
    cfg, method = run.cfg, alignment.method
    if method == "xpo":
        return fresh_pairs(run, alignment, t)
    if method in SCORED and cfg.rounds > 1:
        return fresh_responses(run, alignment, t)
    sampled = read_tensors(stages.responses(run) / "responses.safetensors")
    if method in SCORED and cfg.reward == "model" and not cfg.own:
        sampled |= read_tensors(stages.reward_model(run) / "rewards.safetensors")        # not the oracle's
    K = cfg.num_candidates if method in SCORED else 2
    first = {name: column[:, :K] for name, column in sampled.items()}                    # (P, K, ...)
    if method in SCORED:
        return first
    return xpo.pairs(first, stages.winners(run, first["reward"], stages.PAIR, "train").squeeze(1))


def prompts_per_round(cfg, rounds):
    return cfg.round_prompts or max(1, cfg.prompts // rounds)


def prompts_of_round(run, alignment, t, rounds):
    """The training prompts of round t: each round takes the next ones of a shuffled order."""
    n, prompts = prompts_per_round(run.cfg, rounds), run.prompts("train", run.cfg.prompts)
    order = torch.randperm(len(prompts), generator=run.rng("rounds", alignment.seed))
    return [prompts[order[i % len(prompts)]] for i in range(t * n, (t + 1) * n)]


def fresh_responses(run, alignment, t):
    """K responses of pi_t to each prompt of the round."""
    cfg, policy, ref = run.cfg, alignment.policy, alignment.ref
    prompts = prompts_of_round(run, alignment, t, cfg.rounds)
    reward = stages.reward_function(run, alignment.rewarded_by)

    def measure(ids, mask):                                                              # -> (n,) each
        logp, ref_logp = (sequence_logprob(gpt, ids, mask, cfg.temperature) for gpt in (policy, ref))
        shaped = reward(ids, mask) - cfg.beta_r * cfg.beta_pi * (logp - ref_logp)
        return {"ref_logp": logp, "reward": shaped}                             # pi_t is the loss's reference

    generator = run.rng("rounds", alignment.seed, t)
    return stages.sample_responses(run, policy, prompts, cfg.num_candidates, generator, measure)


def fresh_pairs(run, alignment, t):
    """Algorithm 1: a response of pi_t and one of pi_sft to each prompt are a pair; the labeler labels it."""
    cfg, seed, ref = run.cfg, alignment.seed, alignment.ref
    prompts = prompts_of_round(run, alignment, t, cfg.xpo_rounds)
    measure = stages.scored(run, ref, stages.labeler(run))
    drawn = [stages.sample_responses(run, policy, prompts, 1, run.rng("xpo", seed, t, name), measure)
             for policy, name in ((alignment.policy, "pi_t"), (ref, "pi_sft"))]          # (n, 1, ...) each
    both = {name: torch.cat([each[name] for each in drawn], dim=1) for name in drawn[0]}        # (n, 2, ...)
    winner = stages.winners(run, both["reward"], stages.PAIR, "xpo", seed, t)            # (n, 1)
    return xpo.pairs(both, winner.squeeze(1))


# ---- PPO ----------------------------------------------------------------------------------------------

def align_by_ppo(run, alignment):
    """PPO at beta = beta_r beta_pi: the objective of the other methods."""
    cfg, seed = run.cfg, alignment.seed
    reward = stages.reward_function(run, alignment.rewarded_by)
    critic = run.scorer(alignment.rewarded_by)                       # it starts as the reward model
    critic_optimizer = adamw(critic.parameters(), eps=1e-5)
    prompts = run.prompts("train", cfg.prompts)
    alone = cfg.ppo_steps // 8                                       # warm-up: only the critic trains
    for step in alignment.steps(cfg.ppo_steps, alone, critic=critic, critic_optimizer=critic_optimizer):
        index = shuffled_batch(step, cfg.ppo_batch, len(prompts), cfg.pipeline, "align", seed, 0)
        factor = cosine(step, cfg.ppo_steps)
        stats = ppo.iteration(
            alignment.policy, alignment.ref, critic, alignment.optimizer, critic_optimizer, reward,
            [prompts[i] for i in index], policy_lr=cfg.ppo_lr * factor, critic_lr=cfg.scorer_lr * factor,
            beta=cfg.beta_pi * cfg.beta_r, new_tokens=cfg.new_tokens, T=run.T, temperature=cfg.temperature,
            eos_id=run.eos_id, generator=run.rng("ppo", seed, step), critic_only=step < alone,
            micro_batch=cfg.micro_batch, sample_batch=cfg.sample_batch)
        alignment.metrics.write(step=step + 1, **stats)


# ---- what the loops share -----------------------------------------------------------------------------

class Alignment:
    """One alignment of a run: the policy to train, its folder, its logs, its evaluations on the way."""

    def __init__(self, run, method, seed):
        self.run, self.method, self.seed = run, method, seed
        cfg, name = run.cfg, method
        if method in SCORED:
            name += f"-k{cfg.num_candidates}" + (f"-rounds{cfg.rounds}" if cfg.rounds > 1 else "")
        if cfg.label:
            name += f"-{cfg.label}"
        for other in run.folder.glob("*-s*/stage.json"):           # refuses other settings of another seed
            if other.parent.name.rpartition("-s")[0] == name:
                run.begin(other.parent.name, method)
        self.folder, self.finished = run.begin(f"{name}-s{seed}", method)
        if self.finished:
            return
        if method == "ppo" or method in SCORED:
            self.rewarded_by = stages.reward_model(run) if cfg.reward == "model" else stages.labeler(run)
        self.judge = stages.judge(run)                                           # for evaluation
        self.before = read_tensors(stages.reference(run) / "samples.safetensors")     # pi_sft's responses
        self.policy, self.ref = run.gpt(stages.sft(run)), run.gpt(stages.sft(run))
        self.optimizer = adamw(self.policy.parameters(), max(cfg.adam_eps, 1e-5 if method == "ppo" else 0))
        self.metrics = Log(self.folder / "metrics.csv")
        self.evaluations = Log(self.folder / "eval.csv")

    def steps(self, total, frozen=0, **kept):
        """Yields the steps, resumable, and evaluates after some of them.

        kept: a loop's state besides policy and optimizer.  frozen: how many first steps leave the policy as
        it is.  Evaluations are spaced evenly in sqrt(step), counted after the frozen ones.
        """
        n = self.run.cfg.checkpoints
        evaluated = {max(1, round(frozen + (total - frozen) * ((i + 1) / n) ** 2)) for i in range(n)}
        kept |= {"policy": self.policy, "optimizer": self.optimizer}
        kept |= {"metrics": self.metrics, "eval": self.evaluations}
        for step in resumable(self.folder, kept, total, self.folder.name):
            if step == 0:
                self.write_evaluation(0, self.before)
            yield step
            if step + 1 in evaluated:
                generator = self.run.rng("evaluate", self.seed, step + 1)
                samples = stages.evaluation(self.run, self.policy, self.ref, self.judge, generator)
                self.write_evaluation(step + 1, samples)

    def write_evaluation(self, step, samples):
        """A row of eval.csv, printed too.  samples: of `stages.evaluation`; the last ones stay on disk"""
        row = summary(samples, self.run.eos_id)
        if self.run.cfg.data == "tiny":
            texts = stages.texts(self.run, samples["ids"], samples["mask"])
            row["faulty"] = sum(map(data.faulty, texts)) / len(texts)
        if self.run.cfg.own:
            row |= stages.implicit(self.run, self.policy, self.ref)
        self.evaluations.write(step=step, **row)
        print(f"{self.folder.name}, step {step}: reward {row['reward']:.2f} at KL {row['kl']:.2f} nats")
        write_tensors(self.folder / "samples.safetensors", samples)              # overwritten each time

    def train(self):
        if self.method == "ppo":
            align_by_ppo(self.run, self)
        else:
            align_by_comparison(self.run, self)
        self.policy.save_pretrained(self.folder, self.run.eos_id)
        last = read_tensors(self.folder / "samples.safetensors")
        figures.write_samples(self.run, self.folder, self.before, last)
        finish(self.folder)


def align(run, method, seed):
    """Trains one alignment, unless it is there; its models leave the memory when it returns."""
    alignment = Alignment(run, method, seed)
    write_json(run.folder / "config.json", vars(run.cfg))                        # nothing has refused it
    if not alignment.finished:
        alignment.train()


def main(argv=None):
    """The command: every stage and alignment that is not there yet, then the figures and the table."""
    try:
        run = stages.Run(parse(argv))
        with lock(run.folder):
            run.refuse_changes()
            if run.cfg.judge:
                stages.judge(run)                                                # a broken judge fails early
            for seed, method in itertools.product(run.cfg.seeds, run.cfg.method):
                align(run, method, seed)
            figures.draw(run)
    except (UserError, OSError) as error:
        sys.exit(f"train.py: {error}")
    except KeyboardInterrupt:
        sys.exit("train.py: stopped; the same command continues")
    except torch.OutOfMemoryError:
        sys.exit("train.py: out of memory: lower --micro-batch (results do not change) or --sample-batch")


if __name__ == "__main__":
    main()
