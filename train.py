"""From reviews to aligned policies, by one command:  python train.py --method exo

Stages (stages.py): pi_sft, oracle, responses, reward model.  Then, here: alignment by a method, from the pairs or from the
reward model's scores, with a row of checkpoints evaluated on the way; at the end the table, samples.md and the frontier.
The same command again goes on where it stopped; another method starts at its alignment.
"""
import argparse
import sys
from dataclasses import dataclass, field
from pathlib import Path

import torch

import figures
import stages
from checkpoint import Log, Stopped, UserError, begin, catch_signals, finish, lock, read_tensors, resumable, rng, write_tensors
from dpo import dpo_loss, dpo_reward_loss
from evaluate import measure, summary
from exo import exo_loss, exo_pref_loss
from model import sequence_logprob
from optim import adamw, batch_at, cosine, descend
from stages import Run, trim


def opt(default, help, stages="", choices=None):
    """A setting: its default (the tiny preset's), its help with that one's origin, the stages whose artifact depends on it."""
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata=dict(help=help, stages=stages, choices=choices))
    return field(default=default, metadata=dict(help=help, stages=stages, choices=choices))


SAMPLED = "responses limit reference align"                          # the stages that sample and score at the temperature


@dataclass
class Config:
    # run
    method: str = opt("exo", "alignment method; all: every method in turn", choices=["exo", "dpo", "all"])
    feedback: str = opt("preferences", "learn from pairs, or from a reward model's scores", "", ["preferences", "reward"])
    num_candidates: list[int] = opt([4], "K, responses a prompt that a loss with --feedback reward compares [paper: up to 8]")
    seeds: list[int] = opt([0], "alignment and evaluation are repeated for each")
    preset: str = opt("", "the experiment; default: imdb with CUDA, else tiny", "",
                      ["", "tiny", "imdb-small", "imdb", "imdb-large"])
    run: str = opt("", "the folder of this run's artifacts; default: runs/PRESET")
    smoke: bool = opt(False, "everything at a toy size, in seconds: does it run from end to end?")
    device: str = opt("auto", "where to compute", "", ["auto", "cpu", "cuda", "mps"])
    matmul: str = opt("highest", "PyTorch's float32 matmul precision: medium is twice as fast on some CPUs [ours]", "",
                      ["highest", "high", "medium"])
    micro_batch_size: int = opt(0, "rows at once in training, 0 for whole batches: memory, not results [ours]")
    sample_batch: int = opt(1024, "rows sampled at once [ours]", "responses limit")
    save_every: int = opt(100, "steps between the saves that an interrupted stage goes on from [ours]")
    # reviews
    data: str = opt("tiny", "tiny: reviews of a built-in grammar; imdb: real ones", "sft", ["tiny", "imdb"])
    imdb: list[str] = opt([], "IMDB archives or extracted folders; default: download once")
    sft_reviews: int = opt(60_000, "training reviews [official code: 25,000]", "sft")
    test_reviews: int = opt(4_000, "held-out reviews of the grammar [ours]", "sft")
    prompt_tokens: int = opt(6, "first tokens of a review that make a prompt [official code: 10]", "sft")
    new_tokens: int = opt(66, "longest response, in tokens [official code: 500]", "sft")
    # model
    init: str = opt("", "start from gpt2, gpt2-medium, gpt2-large, gpt2-xl or a folder; default: from scratch", "sft")
    n_layer: int = opt(2, "layers, from scratch [ours]", "sft")
    n_head: int = opt(4, "attention heads, from scratch [ours]", "sft")
    n_embd: int = opt(64, "channels, from scratch [ours]", "sft")
    temperature: float = opt(1.0, "divides all logits, in sampling, log-probs and KL [paper: 0.8]", SAMPLED)
    # sft
    sft_steps: int = opt(1200, "steps [paper: 5 epochs; ours from scratch]", "sft")
    sft_batch: int = opt(64, "reviews a step [official code: 128]", "sft")
    sft_lr: float = opt(2e-3, "peak learning rate [official code: 1e-5; ours from scratch]", "sft")
    # oracle
    oracle_steps: int = opt(1200, "steps [official code: 5 epochs]", "oracle")
    oracle_batch: int = opt(64, "reviews a step [official code: 256]", "oracle")
    oracle_lr: float = opt(1e-3, "peak learning rate [official code: 1e-5]", "oracle")
    # responses
    prompts: int = opt(4096, "training prompts [official code: 25,000]", "responses")
    responses: int = opt(8, "responses of pi_sft a prompt [paper: K up to 8]", "responses")
    labels: str = opt("bt", "who wins a pair: the higher reward [official code], or a Bradley-Terry draw [ours]",
                      "reward_model align", ["argmax", "bt"])
    # reward model
    rm_steps: int = opt(800, "steps [official code: 3 epochs]", "reward_model")
    rm_batch: int = opt(32, "pairs a step [official code: 128]", "reward_model")
    rm_lr: float = opt(1e-3, "peak learning rate [official code: 1e-5]", "reward_model")
    # alignment
    align_steps: int = opt(300, "steps [paper: one epoch]", "align")
    align_batch: int = opt(32, "prompts a step [paper: 64]", "align")
    align_lr: float = opt(1e-4, "peak learning rate [paper: 1e-6]", "align")
    beta_pi: float = opt(0.5, "scales the policy's log-ratio; DPO's beta on pairs [official code: 0.1 on IMDB]", "align")
    beta_r: float = opt(1.0, "divides the reward; beta = beta_pi * beta_r [official code: 0.1 on IMDB]", "align")
    eps: float = opt(1e-3, "label smoothing of EXO's pairs [paper]", "align")
    # evaluation
    checkpoints: int = opt(6, "checkpoints evaluated, evenly spaced [official code: 10]", "align")
    eval_prompts: int = opt(256, "test prompts [paper: 512]", "reference align")
    eval_samples: int = opt(4, "responses a test prompt [paper]", "reference align")
    limit_prompts: int = opt(32, "test prompts that the limit is drawn on [ours]", "limit")
    limit_responses: int = opt(1024, "responses of pi_sft each [ours]", "limit")


GROUPS = ["run", "reviews", "model", "sft", "oracle", "responses", "reward model", "alignment", "evaluation"]
FIRST = ["method", "data", "init", "sft_steps", "oracle_steps", "prompts", "rm_steps", "align_steps", "checkpoints"]

IMDB = dict(data="imdb", prompt_tokens=10, new_tokens=502, temperature=0.8, labels="argmax", init="gpt2", sft_reviews=25_000,
            sft_steps=977, sft_batch=128, sft_lr=1e-5, oracle_steps=488, oracle_batch=256, oracle_lr=1e-5,    # 5 epochs each
            prompts=25_000, rm_steps=586, rm_batch=128, rm_lr=1e-5,                                          # 3 epochs
            align_steps=391, align_batch=64, align_lr=1e-6, beta_pi=0.1, beta_r=0.1,                          # one epoch
            checkpoints=10, eval_prompts=512, limit_prompts=64, sample_batch=512, micro_batch_size=64)
PRESETS = {
    "tiny": {},
    "imdb-small": IMDB | dict(new_tokens=118, init="", n_layer=6, n_head=8, n_embd=512,                       # ours
                              sft_reviews=75_000, sft_steps=4688, sft_batch=64, sft_lr=6e-4,                  # 4 epochs
                              oracle_steps=1172, oracle_batch=64, oracle_lr=1e-4,                             # 3 epochs
                              prompts=12_800, rm_steps=400, rm_batch=64, rm_lr=1e-4,                          # 2 epochs
                              align_steps=200, align_lr=3e-5, limit_responses=4096, sample_batch=1024, micro_batch_size=256),
    "imdb": IMDB,
    "imdb-large": IMDB | dict(init="gpt2-large", sample_batch=128, micro_batch_size=16),
}
SMOKE = dict(init="", n_layer=2, n_head=2, n_embd=32, sft_reviews=2_000, test_reviews=500, sft_steps=30, sft_batch=16,
             oracle_steps=30, oracle_batch=16, prompts=64, rm_steps=10, rm_batch=16, align_steps=10, align_batch=8, checkpoints=2,
             eval_prompts=16, limit_prompts=8, limit_responses=128, sample_batch=256, save_every=5)


def parse(argv=None):
    """Command line -> Config: the preset's settings, then --smoke's, then the flags.  Usage errors are one sentence, status 2."""
    class Parser(argparse.ArgumentParser):
        def error(self, message):
            self.exit(2, f"train.py: {message}: see python train.py --help\n")

    def build(defaults):
        parser = Parser(description=__doc__.split("\n")[0], allow_abbrev=False,
                        formatter_class=argparse.ArgumentDefaultsHelpFormatter)
        group = None
        for name, f in Config.__dataclass_fields__.items():
            if name in FIRST:
                group = parser.add_argument_group(GROUPS[FIRST.index(name)])
            kind = {"action": argparse.BooleanOptionalAction} if f.type is bool else {"type": f.type, "metavar": "X"}
            if f.metadata["choices"]:
                kind = {"choices": f.metadata["choices"]}
            elif f.type in (list[int], list[str]):
                kind = {"type": f.type.__args__[0], "nargs": "+", "metavar": "X"}
            group.add_argument("--" + name.replace("_", "-"), help=f.metadata["help"], default=defaults[name], **kind)
        return parser

    plain = vars(Config())
    first = build(plain).parse_args([a for a in (sys.argv[1:] if argv is None else argv) if a not in ("-h", "--help")])
    preset = first.preset or ("imdb" if torch.cuda.is_available() and first.device in ("auto", "cuda") else "tiny")
    smoke = SMOKE if first.smoke else {}
    parser = build(plain | PRESETS[preset] | smoke | {"run": f"runs/{preset}{'-smoke' * first.smoke}"})
    cfg = Config(**vars(parser.parse_args(argv)))
    cfg.preset = preset
    if problem := impossible(cfg):
        parser.error(problem)
    return cfg, "as asked" if first.preset else "CUDA is there" if preset == "imdb" else "no CUDA"


def impossible(cfg):
    """What is wrong with these values, or None."""
    for name in Config.__dataclass_fields__:
        value = getattr(cfg, name)
        if isinstance(value, int | float) and not isinstance(value, bool):
            if not (value >= 0 if name == "micro_batch_size" else value > 0):
                return f"--{name.replace('_', '-')} must be positive, got {value}"
    if not 0 < cfg.eps < 0.5:
        return f"--eps must lie in (0, 0.5), got {cfg.eps}"
    if not all(2 <= k <= cfg.responses for k in cfg.num_candidates):
        return f"--num-candidates must lie between 2 and --responses {cfg.responses}, got {cfg.num_candidates}"
    if cfg.responses < 4:
        return f"--responses must be at least 4 (two pairs: to train on, and to check the reward model), got {cfg.responses}"
    if cfg.init == "" and cfg.n_embd % cfg.n_head:
        return f"--n-embd {cfg.n_embd} must be a multiple of --n-head {cfg.n_head}"
    if len(set(cfg.seeds)) < len(cfg.seeds):
        return f"--seeds must be different, got {cfg.seeds}"
    for small, large in (("checkpoints", "align_steps"), ("limit_prompts", "eval_prompts"), ("align_batch", "prompts")):
        if getattr(cfg, small) > getattr(cfg, large):
            return f"--{small.replace('_', '-')} must be at most --{large.replace('_', '-')} {getattr(cfg, large)}"


def pick_device(cfg, why):
    """The device and whether to compute in bf16 there; prints one line that says what runs where, and why."""
    there = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    name = next(d for d in ("cuda", "mps", "cpu") if there[d]) if cfg.device == "auto" else cfg.device
    if not there[name]:
        raise UserError(f"--device {name}: PyTorch finds no such device here, use --device auto")
    torch.set_float32_matmul_precision(cfg.matmul)
    bf16 = name == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    kind = "bfloat16 products, float32 weights" if bf16 else f"float32, {cfg.matmul} precision"
    print(f"preset {cfg.preset} ({why}; --preset tiny, imdb-small, imdb or imdb-large to choose) · {name} "
          f"{torch.cuda.get_device_name() if name == 'cuda' else f'{torch.get_num_threads()} threads'} · "
          f"{kind} · torch {torch.__version__} · {cfg.run}")
    return torch.device(name), bf16


# ---- alignment -------------------------------------------------------------------------------------------------------------

def candidates(run, feedback, K):
    """What EXO and DPO train on: ids, mask (P, K, T), ref_logp, reward (P, K).  Pairs: column 0 is the chosen response."""
    table = read_tensors(stages.responses(run) / "responses.safetensors")[0]
    if feedback == "reward":
        table["reward"] = read_tensors(stages.reward_model(run) / "rewards.safetensors")[0]["reward"]
        order = torch.arange(K).expand(run.cfg.prompts, K)
    else:
        winner = stages.winners(run, table["reward"][:, :2], "train")                       # (P,)
        order = torch.stack([winner, 1 - winner], dim=1)                                    # (P, 2)
    row = torch.arange(run.cfg.prompts)[:, None]
    return [table[k][row, order].to(run.device) for k in ("ids", "mask", "ref_logp", "reward")]


def align_offline(run, policy, method, feedback, K, seed):
    """EXO and DPO, from pairs or from a reward model's scores.  -> step(step, optimizer, lr) -> stats"""
    cfg = run.cfg
    ids, mask, ref_logp, reward = candidates(run, feedback, K)
    length = mask.sum(2).amax(1).cpu()                                                      # (P,)

    def loss_sum(index):
        x, m = trim(ids[index].flatten(0, 1).long(), mask[index].flatten(0, 1))             # (b K, T)
        logp = sequence_logprob(policy, x, m, cfg.temperature).view(len(index), -1)         # (b K,) -> (b, K)
        ref, r = ref_logp[index], reward[index]                                             # (b, K)
        if feedback == "preferences":
            loss = exo_pref_loss(logp, ref, cfg.beta_pi, cfg.eps) if method == "exo" else dpo_loss(logp, ref, cfg.beta_pi)
            best, worst = torch.zeros_like(index), torch.ones_like(index)
        else:
            loss = (exo_loss if method == "exo" else dpo_reward_loss)(logp, ref, r, cfg.beta_r, cfg.beta_pi)
            best, worst = r.argmax(1), r.argmin(1)
        implicit = cfg.beta_pi * (logp - ref).detach()                                      # (b, K) the implicit reward
        row = torch.arange(len(index))
        chosen, rejected = implicit[row, best], implicit[row, worst]
        return {"loss": loss * len(index), "rewards_chosen": chosen.sum(), "rewards_rejected": rejected.sum(),
                "rewards_margin": (chosen - rejected).sum(), "rewards_accuracy": (chosen > rejected).sum()}, len(index)

    def step(step, optimizer, lr):
        index = batch_at(step, cfg.align_batch, length, "align", seed)
        return descend(optimizer, lr, run.part(index, ids.shape[1]), loss_sum, f"{method} step {step + 1}")

    return step


def align(run, method, feedback, K, seed):
    """One alignment: pi_sft's weights, --align-steps steps of the method, checkpoints evaluated on the way.  -> its folder"""
    cfg = run.cfg
    usual = vars(Config()) | PRESETS[cfg.preset]
    other = [f"{name.replace('_', '')}{getattr(cfg, name):g}" for name in ("beta_pi", "beta_r") if getattr(cfg, name) != usual[name]]
    folder = run.folder / "-".join([method, feedback, *([f"k{K}"] if feedback == "reward" else []), *other, f"s{seed}"])
    sft, oracle = stages.sft(run), stages.oracle(run)
    upstream = [sft, oracle, stages.responses(run)] + ([stages.reward_model(run)] if feedback == "reward" else [])
    if begin(folder, run.settings("align") | {"method": method, "seed": seed}, upstream):
        return folder
    policy, ref, score = run.policy(sft), run.policy(sft), run.scorer(oracle)
    take = align_offline(run, policy, method, feedback, K, seed)
    optimizer = adamw(policy, cfg.align_lr)
    state = {"policy": policy, "optimizer": optimizer, "metrics": Log(folder / "metrics.csv"), "eval": Log(folder / "eval.csv")}
    evaluated = [round(cfg.align_steps * (i + 1) / cfg.checkpoints) for i in range(cfg.checkpoints)]
    start = read_tensors(stages.reference(run) / "samples.safetensors")[0]
    for step, bar in resumable(folder, state, cfg.align_steps, cfg.save_every, folder.name):
        if step == 0:
            state["eval"].write(step=0, **summary(start, run.eos_id))
        stats = take(step, optimizer, cfg.align_lr * cosine(step, cfg.align_steps))
        state["metrics"].write(step=step + 1, **stats)
        if step + 1 in evaluated:
            found = measure(run, policy, ref, score, rng("evaluate", seed, step + 1))
            row = summary(found, run.eos_id)
            state["eval"].write(step=step + 1, **row)
            policy.save_pretrained(folder / f"step-{step + 1:05d}", run.eos_id)
            write_tensors(folder / f"step-{step + 1:05d}" / "samples.safetensors", found)
            bar.write(f"step {step + 1}: reward {row['reward']:.2f} at KL {row['kl']:.2f} nats, length {row['length']:.0f}")
        bar.set_postfix({k.removeprefix("rewards_"): f"{v:.3f}" for k, v in stats.items() if k != "grad_norm"}, refresh=False)
    figures.write_samples(run, folder, start, found_at(folder, evaluated[-1]))
    finish(folder, final=f"step-{evaluated[-1]:05d}")
    return folder


def found_at(folder, step):
    return read_tensors(folder / f"step-{step:05d}" / "samples.safetensors")[0]


def plan(cfg):
    """The alignments that the command asks for: (method, feedback, K)."""
    if cfg.method != "all":
        return [(cfg.method, cfg.feedback, K) for K in (cfg.num_candidates if cfg.feedback == "reward" else [2])]
    offline = [(m, "preferences", 2) for m in ("exo", "dpo")]
    return offline + [(m, "reward", K) for K in cfg.num_candidates for m in ("exo", "dpo")]


def main(argv=None):
    cfg, why = parse(argv)
    try:
        device, bf16 = pick_device(cfg, why)
        held = lock(cfg.run)                                         # kept open: the lock lasts as long as the process
        catch_signals()
        run = Run(cfg, device, bf16)
        for seed in cfg.seeds:
            for method, feedback, K in plan(cfg):
                align(run, method, feedback, K, seed)
        stages.limit(run)
        figures.draw(Path(cfg.run))
        held.close()
    except UserError as error:
        sys.exit(f"train.py: {error}")
    except Stopped as stopped:
        print(f"stopped; go on with: python train.py {' '.join(sys.argv[1:] if argv is None else argv)}", file=sys.stderr)
        sys.exit(128 + stopped.args[0])


if __name__ == "__main__":
    main()
