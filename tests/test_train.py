"""`python train.py` as a user meets it: from nothing to the frontier by one command, settings, errors."""
import math
import shutil
from functools import partialmethod

import pytest
import torch
from conftest import ALIGNED, small

import data
import stages
import train
from checkpoint import read_json, read_tensors, write_json
from compute import batch_by_length, shuffled_batch
from evaluate import read_csv
from model import GPT, sequence_logprob
from run import Run, alignments, open_run
from settings import Config, parse


def test_one_command_leaves_policies_metrics_samples_and_the_frontier(first_run):
    folder, ended = first_run
    assert "preset tiny (as asked" in ended.out and "cpu" in ended.out and ALIGNED in ended.out
    for name in ("frontier", "accuracy", "curves", "density", "training"):
        assert (folder / f"{name}.png").read_bytes()[:4] == b"\x89PNG"
    metrics = read_csv(folder / ALIGNED / "metrics.csv")
    assert [row["step"] for row in metrics] == [1, 2, 3, 4, 5, 6]
    assert metrics[0]["lr"] == 1e-4 and 0 < metrics[-1]["lr"] < metrics[1]["lr"]
    assert "steps: sft 6, oracle 6, reward model 6; alignments: 1, evaluated 2 times each" in ended.out
    assert "samples: 256 responses, 32 an evaluation, 512 for the limit" in ended.out
    assert "sft took 0." in ended.out and "at its speed the rest takes about" in ended.out
    disk = int(ended.out.split("disk: about ")[1].split(" MB")[0])      # MB, while it runs
    assert sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) / 1e6 < disk + 1
    assert ended.out.endswith(f"{folder}/frontier.png and others · samples: {folder / ALIGNED}/samples.md\n")
    rows = read_csv(folder / ALIGNED / "eval.csv")
    assert len(rows) == 3 and rows[0]["step"] == rows[0]["kl"] == 0 and rows[-1]["step"] == 6
    assert "π_sft" in (folder / ALIGNED / "samples.md").read_text(encoding="utf-8")


@pytest.mark.slow
def test_all_methods_in_one_command_leave_a_policy_each(all_methods):
    cfg = Config(**read_json(all_methods / "config.json"))
    aligned = alignments(all_methods)
    names = [one.folder.name for one in aligned]
    assert names == sorted(train.name_of(cfg, *one, 0) for one in train.plan(cfg)) and len(names) == 7
    assert all(GPT.from_pretrained(one.last) and len(one.rows) == 3 for one in aligned)
    assert aligned[-1].about == {"method": "xpo", "feedback": "preferences", "K": 0, "rounds": 1, "seed": 0,
                                 "beta_pi": 0.5, "beta_r": 1.0, "alpha": 0.0015, "lr": 1e-4, "labels": "bt",
                                 "steps": 12, "reward": "", "prompts": 32}


def test_a_second_method_starts_at_its_alignment_and_there_at_the_reference(finished):
    """The cached log pi_sft are those that training computes: DPO's loss starts at log 2."""
    stamps = {path: path.stat().st_mtime_ns for path in finished.rglob("*.safetensors")}
    ended = small(finished, "--method", "dpo", "--feedback", "preferences")
    assert ended.code == 0 and "sft took" not in ended.out
    assert all(path.stat().st_mtime_ns == stamp for path, stamp in stamps.items())
    first = read_csv(finished / "dpo-preferences-s0" / "metrics.csv")[0]
    assert first["loss"] == pytest.approx(math.log(2), abs=1e-4)
    assert abs(first["rewards_chosen"]) < 1e-4 and abs(first["rewards_rejected"]) < 1e-4


def test_responses_are_prompt_response_padding_and_have_the_log_probs_of_pi_sft(smoke):
    sampled = read_tensors(smoke / "responses" / "responses.safetensors")[0]
    ids, mask = sampled["ids"].flatten(0, 1).long(), sampled["mask"].flatten(0, 1)       # (P K, T)
    end = ids == data.tiny_encoding().eot_token
    assert not mask[:, :6].any() and not end[:, :6].any() and mask[:, 6].all()
    ends = (end & mask).sum(1)                                                           # (P K,)
    assert (ends[mask.sum(1) < 8] == 1).all() and (ends <= 1).all()
    with torch.no_grad():
        logp = sequence_logprob(GPT.from_pretrained(smoke / "sft"), ids, mask)           # (P K,)
    assert (logp - sampled["ref_logp"].flatten()).abs().max() < 1e-4


def test_pairs_take_two_responses_and_the_others_follow_by_the_same_random_numbers(finished, smoke, tmp_path):
    for folder in ("responses", "other_responses", "reward_model", ALIGNED):
        shutil.rmtree(finished / folder)
    ended = small(finished, "--feedback", "preferences", "--align-steps", "2", "--limit-responses", "0")
    assert ended.code == 0 and "samples: 64 responses" in ended.out, ended.err
    assert not (finished / "other_responses").exists()
    run = open_run(finished)
    drawn = stages.read_responses(stages.all_responses(run))
    for name, column in stages.read_responses([smoke / "responses", smoke / "other_responses"]).items():
        assert torch.equal(drawn[name], column)
    at_once = stages.sample_responses(run, tmp_path / "at once", "responses", run.train_prompts(), 8)
    assert torch.equal(drawn["ids"], at_once["ids"]) and torch.equal(drawn["mask"], at_once["mask"])
    assert (drawn["ref_logp"] - at_once["ref_logp"]).abs().max() < 1e-4


def test_trials_are_evaluated_on_training_prompts_that_no_method_aligns_on(finished):
    cfg = Config(**read_json(finished / "config.json") | {"eval_split": "train", "run": str(finished)})
    (finished / "reference" / "stage.json").unlink()
    trial = Run(cfg, torch.device("cpu"), bf16=False)
    prompts = [ids[:6].tolist() for ids in trial.reviews["train"].ids]
    samples = read_tensors(stages.reference(trial) / "samples.safetensors")[0]
    assert stages.prompts_of(samples["ids"][:, 0], samples["mask"][:, 0]) == prompts[:-17:-1]
    assert trial.train_prompts() == prompts[:32]


def test_fewer_prompts_to_align_on_are_the_first_ones_with_the_same_labels(smoke):
    run = open_run(smoke)
    whole = train.drawn_from_sft(run, "preferences", 0)
    run.cfg.align_prompts = 10
    for feedback, K in (("preferences", 0), ("reward", 4)):
        assert len(train.drawn_from_sft(run, feedback, K)["ids"]) == 10
    assert torch.equal(train.drawn_from_sft(run, "preferences", 0)["ids"], whole["ids"][:10])


def test_with_the_oracle_as_reward_there_is_no_reward_model(begun):
    shutil.rmtree(begun / "reward_model")
    assert small(begun, "--reward", "oracle", "--method", "ppo").code == 0
    assert not (begun / "reward_model").exists() and (begun / "ppo-reward-oracle-s0" / "eval.csv").exists()
    run = open_run(begun)
    by_oracle = stages.read_responses(stages.all_responses(run))["reward"]
    assert torch.equal(train.drawn_from_sft(run, "reward", 4)["reward"], by_oracle[:, :4])


def test_a_reward_model_can_learn_from_all_pairs_of_more_responses(begun):
    """Of 6 responses 15 pairs; the labels of the first pair stay as they are."""
    for stage in ("reward_model", "limit-8x64-reward-model"):
        shutil.rmtree(begun / stage)
    flags = ["--rm-responses", "6", "--rm-steps", "40", "--rm-batch", "32", "--labels", "argmax"]
    assert small(begun, *flags).code == 0
    accuracy = [row["accuracy"] for row in read_csv(begun / "reward_model" / "metrics.csv")]
    pairs = 15 * 32 * accuracy[-1]
    assert accuracy[-1] > 0.6 and pairs == pytest.approx(round(pairs), abs=1e-2)


def test_a_run_is_opened_in_the_arithmetic_that_it_was_trained_in(finished):
    stage = read_json(finished / "sft" / "stage.json")
    assert stage["settings"]["precision"] == "float32 highest"
    for precision, bf16 in (("bf16", True), ("float32 highest", False)):
        stage["settings"]["precision"] = precision
        write_json(finished / "sft" / "stage.json", stage)
        assert open_run(finished).bf16 is bf16
    assert not torch.backends.cuda.cudnn_sdp_enabled()               # it plans anew for every shape


@pytest.mark.slow
def test_a_compiled_run_learns_what_an_eager_one_does(begun, smoke, monkeypatch):
    quick = partialmethod(torch.nn.Module.compile, backend="aot_eager")      # the default takes minutes
    monkeypatch.setattr(torch.nn.Module, "compile", quick)
    assert small(begun, "--compile").code == 0
    ours, theirs = read_csv(begun / ALIGNED / "metrics.csv"), read_csv(smoke / ALIGNED / "metrics.csv")
    assert [row["loss"] for row in ours] == pytest.approx([row["loss"] for row in theirs], rel=1e-3)


def test_smoke_of_an_imdb_preset_reads_the_built_in_reviews_unless_archives_are_given():
    for preset in ("imdb-mini", "imdb-small", "imdb"):
        cfg, why = parse(["--preset", preset, "--smoke"])
        assert (cfg.data, cfg.tokenizer, cfg.init, cfg.run) == ("tiny", "tiny", "", f"runs/{preset}-smoke")
        assert "built-in reviews" in why and cfg.temperature == parse(["--preset", preset])[0].temperature
        assert parse(["--preset", preset, "--smoke", "--imdb", "x"])[0].data == "imdb"
        assert parse(["--preset", preset, "--smoke", "--data", "imdb"])[0].data == "imdb"


def test_presets_are_those_of_the_paper_and_flags_win():
    cfg, _ = parse(["--preset", "imdb", "--align-steps", "77"])
    assert (cfg.beta_pi, cfg.beta_r, cfg.temperature, cfg.align_lr, cfg.eps) == (0.1, 0.1, 0.8, 1e-6, 1e-3)
    assert (cfg.eval_prompts, cfg.eval_samples, cfg.prompt_tokens, cfg.align_batch) == (512, 4, 10, 64)
    assert cfg.labels == "argmax" and cfg.align_steps == 77


@pytest.mark.parametrize("flags, names", [
    ("", ["exo-preferences-s1"]), ("--method ppo --eval-split train", ["ppo-reward-lr0.0004-s1"]),
    ("--feedback reward --num-candidates 2 8", ["exo-reward-k2-s1", "exo-reward-k8-s1"]),
    ("--method dpo --feedback reward --rounds 2 --beta-pi 0.25", ["dpo-reward-k4-rounds2-betapi0.25-s1"]),
    ("--method xpo --alpha 0.01", ["xpo-preferences-alpha0.01-s1"]),
    ("--method xpo --alpha 0", ["online-dpo-preferences-s1"]),
    ("--method exo --feedback reward --reward oracle", ["exo-reward-oracle-k4-s1"])])
def test_alignments_are_named_by_what_the_command_asks_for_beside_the_usual(flags, names):
    cfg, _ = parse(["--preset", "tiny", *flags.split()])
    assert [train.name_of(cfg, *one, 1) for one in train.plan(cfg)] == names


def test_the_help_names_every_setting_and_the_origin_of_every_number(capsys):
    with pytest.raises(SystemExit):
        parse(["--help"])
    text = capsys.readouterr().out
    for name, field in Config.__dataclass_fields__.items():
        assert "--" + name.replace("_", "-") in text
        assert "[" in field.metadata["help"] or field.type not in (int, float), name


@pytest.mark.parametrize("arguments, sentence", [
    ("--preset huge", "invalid choice: 'huge'"), ("--sft-stepz 3", "did you mean --sft-steps?"),
    ("--beta-pi -1", "--beta-pi must be positive"), ("--beta-r nan", "--beta-r must be positive"),
    ("--held-out 1", "--held-out must lie in (0, 1)"), ("--eps 0.5", "must lie in (0, 0.5)"),
    ("--warmup 1", "--warmup must lie in [0, 1)"), ("--rounds 4", "--rounds is for --method exo and dpo"),
    ("--method exo --feedback reward --rounds 200", "--rounds must be at most"),
    ("--num-candidates 9", "--num-candidates must lie between 2"),
    ("--n-embd 65", "must be a multiple of --n-head"), ("--seeds 1 1", "--seeds must be different"),
    ("--checkpoints 999", "must be at most"), ("--data reviews.txt", "neither tiny, nor imdb, nor a .jsonl")])
def test_usage_errors_are_one_sentence(arguments, sentence, capsys):
    with pytest.raises(SystemExit) as stopped:
        parse(["--preset", "tiny", *arguments.split()])
    text = capsys.readouterr().err
    assert stopped.value.code == 2 and sentence in text and text.count("\n") == 1


@pytest.mark.parametrize("flags, sentence", [
    ("--run /proc/nowhere", "cannot use /proc/nowhere"), ("--init no/such", "no/such is neither one of gpt2"),
    ("--init sft --new-tokens 500", "positions (its block size)")])
def test_errors_that_only_the_start_finds_are_one_sentence_too(smoke, tmp_path, monkeypatch, flags, sentence):
    monkeypatch.chdir(smoke)
    ended = small(tmp_path / "run", *flags.split())
    assert ended.code == 1 and sentence in ended.err and ended.err.count("\n") == 1
    assert not (tmp_path / "run").exists()                           # nothing is reserved


def test_a_start_that_fails_leaves_a_run_as_it_was(finished, smoke):
    """A mistyped judge: no folder and no settings are left behind."""
    def names(folder):
        return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))

    before = names(finished)
    assert small(finished, "--method", "dpo", "--align-lr", "1e-4", "--alpha", "0", "--judge", "x").code == 1
    assert names(finished) == before


def test_batches_go_through_shuffled_epochs():
    length = torch.arange(24) % 7
    plain = torch.stack([shuffled_batch(step, 3, 24, "x") for step in range(16)])
    by_length = torch.stack([batch_by_length(step, 3, length, "x", window=4) for step in range(16)])
    for batches in (plain, by_length):
        for epoch in batches.view(2, 24):
            assert epoch.bincount().tolist() == 24 * [1]
        assert not torch.equal(batches[:8], batches[8:])
    assert (length[by_length].diff() >= 0).all()


def test_no_training_step_holds_more_rows_than_the_flag_says(tmp_path, monkeypatch):
    rows = []
    hidden = GPT.hidden

    def recorded(gpt, ids, cache=None):
        rows.append(len(ids) if torch.is_grad_enabled() else 0)
        return hidden(gpt, ids, cache)
    monkeypatch.setattr(GPT, "hidden", recorded)
    assert small(tmp_path / "run", "--method", "ppo", "--micro-batch-size", 6).code == 0
    assert max(rows) == 6


def test_a_lack_of_memory_names_the_flag_which_changes_nothing_but_rounding(begun, smoke, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(train, "exo_loss", lambda *arguments: torch.empty(10 ** 15))
        ended = small(begun)
    assert ended.code == 1 and ended.err.startswith("train.py: out of memory: lower --micro-batch-size")
    assert small(begun, "--micro-batch-size", 8).code == 0
    ours, theirs = [read_tensors(run / ALIGNED / "step-00006/model.safetensors")[0] for run in (begun, smoke)]
    assert all((ours[name] - theirs[name]).abs().max() <= 1e-5 for name in theirs)
