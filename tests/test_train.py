"""`python train.py` as a user meets it: from nothing to the frontier by one command, settings, errors."""
import math
import os
import shutil
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest
import torch
from conftest import ALIGNED, SMALL, small

import data
import figures
import sample
import stages
import train
from loop import read_csv, read_json, read_tensors, write_json
from model import GPT, GPTConfig, sequence_logprob
from settings import METHODS, Config, parse
from stages import Run, open_run

ROOT = Path(__file__).parent.parent


def test_one_command_leaves_a_policy_metrics_samples_and_the_frontier(smoke):
    for name in ("frontier", "accuracy", "curves", "density"):
        assert (smoke / f"{name}.png").read_bytes()[:4] == b"\x89PNG"
    metrics = read_csv(smoke / ALIGNED / "metrics.csv")
    assert [row["step"] for row in metrics] == [1, 2, 3, 4, 5, 6] and metrics[0]["loss"] > 0
    assert metrics[0]["lr"] == 1.5e-4 and 0 < metrics[-1]["lr"] < metrics[1]["lr"]
    rows = read_csv(smoke / ALIGNED / "eval.csv")
    assert [row["step"] for row in rows] == [0, 2, 6] and rows[0]["kl"] == pytest.approx(0, abs=1e-5)
    assert list(rows[0])[:6] == ["step", "reward", "reward_se", "accuracy", "kl", "kl_se"]
    assert "π_sft" in (smoke / ALIGNED / "samples.md").read_text(encoding="utf-8")
    (row,) = (smoke / "table.csv").read_text().splitlines()[1:]
    assert row.startswith(f"{ALIGNED},6,")
    lines = {line.split(",")[0] for line in (smoke / "frontier.csv").read_text().splitlines()[1:]}
    limits = {"the limit", "the reward model's limit"}
    assert lines == limits | {"best of n", "best of n by the reward model"}


@pytest.mark.slow
def test_all_methods_and_seeds_in_one_command_leave_a_policy_each_and_train_once(tmp_path):
    flags = ["--method", "all", "--rounds", "2", "--seeds", "0", "1"]
    assert small(tmp_path, *flags, draw=figures.draw).code == 0
    groups = stages.alignments(open_run(tmp_path))
    assert sorted(groups) == ["dpo", "dpo-rw-k4-rounds2", "exo", "exo-rw-k4-rounds2", "ppo", "xpo"]
    for folders in groups.values():
        assert [folder.name[-3:] for folder in folders] == ["-s0", "-s1"]
        assert all(GPT.from_pretrained(folder) for folder in folders)
    times = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.safetensors")}
    assert small(tmp_path, *flags).code == 0
    assert all(path.stat().st_mtime_ns == time for path, time in times.items())


def test_a_second_method_starts_at_its_alignment_and_there_at_the_reference(finished):
    """The cached log pi_sft are those that training computes: DPO's loss starts at log 2."""
    times = {path: path.stat().st_mtime_ns for path in finished.rglob("*.safetensors")}
    assert small(finished, "--method", "dpo", "--beta-r", "3").code == 0         # beta_r is not DPO's
    assert all(path.stat().st_mtime_ns == time for path, time in times.items())
    first = read_csv(finished / "dpo-s0" / "metrics.csv")[0]
    assert first["loss"] == pytest.approx(math.log(2), abs=1e-4)
    assert abs(first["chosen"]) < 1e-4 and abs(first["rejected"]) < 1e-4


def test_every_method_sees_the_same_prompts_in_the_same_order(smoke, monkeypatch):
    """EXO and DPO from pairs, and from K = 2 and K = 4 rewards: K takes a prompt's first K responses."""
    run, seen = open_run(smoke), {}
    for method, K in (("exo", 2), ("exo-rw", 4), ("exo-rw", 2)):
        run.cfg.num_candidates = K
        alignment = type("Alignment", (), {"method": method, "seed": 0})
        seen[method, K] = train.candidates(run, alignment, 0)
    pairs, four, two = seen.values()
    assert torch.equal(two["ids"], four["ids"][:, :2])
    assert torch.equal(pairs["ids"].sort(1).values, two["ids"].sort(1).values)


def test_responses_are_prompt_response_padding_and_have_the_log_probs_of_pi_sft(smoke):
    sampled = read_tensors(smoke / "responses" / "responses.safetensors")
    ids, mask = sampled["ids"].flatten(0, 1).long(), sampled["mask"].flatten(0, 1)       # (P K, T)
    end = ids == data.tiny_encoding().eot_token
    assert not mask[:, :6].any() and not end[:, :6].any() and mask[:, 6].all()
    ends = (end & mask).sum(1)                                                           # (P K,)
    assert (ends[mask.sum(1) < 8] == 1).all() and (ends <= 1).all()
    with torch.no_grad():
        logp = sequence_logprob(GPT.from_pretrained(smoke / "sft"), ids, mask)           # (P K,)
    assert (logp - sampled["ref_logp"].flatten()).abs().max() < 1e-4


def test_trials_are_evaluated_on_training_prompts_that_no_method_aligns_on(smoke):
    cfg = Config(**read_json(smoke / "config.json") | {"eval_split": "train", "run": str(smoke)})
    trial = Run(cfg)
    prompts = [ids[:6].tolist() for ids in trial.reviews["train"].ids]
    evaluated = [list(map(int, prompt)) for prompt in trial.prompts("evaluated", 16)]
    assert evaluated == prompts[:-17:-1]
    assert not set(map(tuple, evaluated)) & set(map(tuple, prompts[:cfg.prompts]))
    assert parse(["--preset", "tiny", "--eval-split", "train"]).run == "runs/tiny-trials"


def test_with_the_oracle_as_reward_there_is_no_reward_model(finished):
    shutil.rmtree(finished / "reward_model")
    shutil.rmtree(finished / ALIGNED)
    for method in ("exo-rw", "ppo"):
        assert small(finished, "--reward", "oracle", "--method", method).code == 0
    assert not (finished / "reward_model").exists() and (finished / "ppo-s0" / "eval.csv").exists()


def test_the_reward_model_is_scaled_as_the_oracle_and_may_learn_from_all_pairs_of_more_responses(finished):
    shutil.rmtree(finished / "reward_model")
    run = open_run(finished)
    run.cfg.rm_responses, run.cfg.rm_steps, run.cfg.labels = 4, 40, "argmax"
    rewards = read_tensors(stages.reward_model(run) / "rewards.safetensors")["reward"]           # (P, K)
    oracle = read_tensors(stages.responses(run) / "responses.safetensors")["reward"]
    assert abs(float(rewards.mean())) < 1e-5
    assert float(rewards.var(1).mean()) == pytest.approx(float(oracle.var(1).mean()), rel=1e-4)
    accuracy = [row["accuracy"] for row in read_csv(finished / "reward_model" / "metrics.csv")]
    assert accuracy[-1] > 0.6
    assert 6 * 32 * accuracy[-1] == pytest.approx(round(6 * 32 * accuracy[-1]), abs=1e-2)        # 6 pairs


def test_winners_of_the_first_pair_are_the_same_however_many_pairs_are_drawn(smoke):
    run = open_run(smoke)
    reward = torch.randn(5000, 4, generator=torch.Generator().manual_seed(0))
    pairs = torch.triu_indices(4, 4, offset=1)
    every = stages.winners(run, reward, pairs, "x")                                      # (5000, 6)
    assert torch.equal(every[:, :1], stages.winners(run, reward, stages.PAIR, "x"))
    expected = torch.sigmoid(reward[:, pairs[1]] - reward[:, pairs[0]]).mean(0)          # (6,)
    assert (every.float().mean(0) - expected).abs().max() < 0.03                         # Bradley-Terry


def test_muon_and_stretches_of_whole_reviews_train_pi_sft(tmp_path):
    assert small(tmp_path, "--sft-optimizer", "muon", "--sft-stretches", "3", "--sft-lr", "3e-3").code == 0
    losses = [row["loss"] for row in read_csv(tmp_path / "sft" / "metrics.csv")]
    assert len(losses) == 6 and losses[-1] < losses[0]


def test_no_training_step_holds_more_rows_than_the_flag_says_and_results_do_not_change(finished, monkeypatch):
    rows, hidden = [], GPT.hidden

    def recorded(gpt, ids, cache=None):
        rows.append(len(ids) if torch.is_grad_enabled() else 0)
        return hidden(gpt, ids, cache)

    for stage in ("sft", "oracle", "reward_model", "responses", "reference", ALIGNED):
        shutil.move(finished / stage, finished / f"{stage}-before")
    shutil.rmtree(finished / "limit-and-model")
    monkeypatch.setattr(GPT, "hidden", recorded)
    assert small(finished, "--method", "exo-rw", "--micro-batch", 6).code == 0
    assert max(rows) == 6
    names = (f"{ALIGNED}-before", ALIGNED)
    before, after = (read_tensors(finished / name / "model.safetensors") for name in names)
    assert all((before[name] - after[name]).abs().max() <= 1e-4 for name in before)


def test_a_run_is_opened_in_the_precision_that_it_was_trained_in(finished):
    stage = read_json(finished / "sft" / "stage.json")
    assert open_run(finished).bf16 is False
    stage["settings"]["bf16"] = True
    write_json(finished / "sft" / "stage.json", stage)
    assert open_run(finished).bf16 is True


def test_figures_and_samples_come_from_the_run_folder_alone(finished, capsys):
    (finished / "frontier.png").unlink()
    figures.main([str(finished)])
    assert (finished / "frontier.png").exists() and ALIGNED in capsys.readouterr().out
    sample.main([str(finished), "--prompt", "Last night we saw", "This film", "--n", "3", "--seed", "1"])
    lines = capsys.readouterr().out.splitlines()
    assert [line for line in lines if line.endswith(" …")] == ["Last night we saw …", "This film …"]
    assert [line.split()[0] for line in lines if line.startswith(("sft", ALIGNED))] == 2 * (
        ["sft"] * 3 + [ALIGNED] * 3)
    sample.main([str(finished), "--prompt", "This film", "--n", "3", "--seed", "1"])
    alone = capsys.readouterr().out.splitlines()[1:]
    assert alone == lines[lines.index("This film …"):]
    with pytest.raises(SystemExit, match="1 to 13 tokens"):
        sample.main([str(finished), "--prompt", " film" * 20])
    with pytest.raises(SystemExit, match="no finished exo-rw here: choose from exo-rw-k4"):
        sample.main([str(finished), "--prompt", "This film", "--method", "exo-rw"])
    with pytest.raises(SystemExit, match="is not a run folder"):
        figures.main([str(finished / "sft")])


def test_other_weights_under_the_same_path_are_refused(tmp_path, smoke):
    weights = shutil.copytree(smoke / "sft", tmp_path / "weights")
    assert small(tmp_path / "run", "--init", weights).code == 0
    shutil.copyfile(smoke / ALIGNED / "model.safetensors", weights / "model.safetensors")
    ended = small(tmp_path / "run", "--init", weights, "--label", "again")
    assert ended.code == 1 and "was made with init = " in ended.err


def test_a_policy_that_always_says_the_same_and_one_prompt_of_evaluation_come_to_an_end(tmp_path):
    flags = ["--temperature", "1e-5", "--eval-prompts", "1", "--limit-prompts", "1", "--label", "$x_1$"]
    ended = small(tmp_path, "--method", "exo-rw", *flags, draw=figures.draw)
    assert ended.code == 0, ended.err
    assert "exo-rw-k4-$x_1$-s0" in ended.out and "nan" not in ended.out


def test_it_runs_where_the_terminal_has_only_ascii_and_a_notebook_has_left_its_variables(tmp_path):
    odd = {"PYTHONIOENCODING": "ascii", "MPLBACKEND": "nowhere", "LOCAL_RANK": "3"}
    line = [sys.executable, "train.py", *SMALL, "--run", tmp_path / "run"]
    done = subprocess.run(line, cwd=ROOT, env=os.environ | odd, capture_output=True, text=True)
    assert done.returncode == 0 and "share of J*" in done.stdout, done.stderr


# ---- settings -----------------------------------------------------------------------------------------

def test_presets_are_those_of_the_paper_and_flags_win():
    cfg = parse(["--preset", "imdb", "--align-steps", "77"])
    assert (cfg.beta_pi, cfg.beta_r, cfg.temperature, cfg.align_lr, cfg.eps) == (0.1, 0.1, 0.8, 1e-6, 1e-3)
    assert (cfg.eval_prompts, cfg.eval_samples, cfg.prompt_tokens, cfg.align_batch) == (512, 4, 10, 64)
    assert cfg.labels == "argmax" and cfg.align_steps == 77
    assert parse(["--preset", "tiny", "--method", "all"]).method == list(METHODS)


def test_there_are_sixty_settings_and_the_help_names_each_and_the_origin_of_every_number(capsys):
    with pytest.raises(SystemExit):
        parse(["--help"])
    text = capsys.readouterr().out
    assert len(fields(Config)) <= 60
    for field in fields(Config):
        assert "--" + field.name.replace("_", "-") in text
        assert "[" in field.metadata["help"] or field.type not in (int, float), field.name


@pytest.mark.parametrize("arguments, sentence", [
    ("--preset huge", "invalid choice: 'huge'"), ("--sft-stepz 3", "unrecognized arguments: --sft-stepz"),
    ("--beta-pi -1", "must be positive"), ("--temperature nan", "must be positive"),
    ("--eps 0.5", "must lie in (0, 0.5)"), ("--rounds 200", "--rounds must be at most"),
    ("--num-candidates 9", "must lie in [2, --responses = 4]"), ("--n-embd 65", "a multiple of --n-head"),
    ("--checkpoints 0", "must be at least 1"), ("--run=", "--run must name a folder"),
    ("--data reviews.txt", "must be tiny, imdb or a .jsonl"),
    ("--data nowhere.jsonl", "there is no file nowhere.jsonl"), ("--tokenizer gpt3", "must be tiny, gpt2"),
    ("--tokenizer gpt2-100", "must be tiny, gpt2"), ("--align-lr nan", "--align-lr must be positive"),
    ("--label a/b", "without a slash"), ("--imdb README.md", "--imdb needs an imdb preset"),
    ("--judge pairs.py", "must be FILE.py:NAME")])
def test_usage_errors_are_one_sentence(arguments, sentence, capsys):
    with pytest.raises(SystemExit) as stopped:
        parse(["--preset", "tiny", *arguments.split()])
    usage, text = capsys.readouterr().err.splitlines()
    assert stopped.value.code == 2 and sentence in text and usage.startswith("usage: python train.py")


@pytest.mark.parametrize("flags, sentence", [
    ("--run /proc/nowhere", "/proc/nowhere"), ("--init no/such", "no/such is neither one of gpt2"),
    ("--device gpu", "--device gpu unavailable"), ("--beta-pi 0.3", "was made with beta_pi = 0.5 (now 0.3)"),
    ("--beta-pi 0.3 --seeds 1", "s0 was made with beta_pi = 0.5 (now 0.3)"),
    ("--limit-prompts 4 --seeds 1", "limit-and-model was made with limit_prompts = ")])
def test_errors_that_only_the_start_finds_are_one_sentence_too(finished, flags, sentence):
    ended = small(finished, "--method", "exo-rw", *flags.split())
    assert ended.code == 1 and sentence in ended.err and ended.err.count("\n") == 1
    assert read_json(finished / "config.json")["beta_pi"] == 0.5      # what was refused is not remembered
    assert not list(finished.glob("*-s1/model.safetensors"))          # and nothing was trained for it


def test_the_reward_models_limit_is_refused_when_that_model_has_changed(finished):
    for folder in ("reward_model", ALIGNED):
        shutil.rmtree(finished / folder)
    ended = small(finished, "--method", "exo-rw", "--rm-steps", "7")
    assert ended.code == 1 and "limit-and-model was made with rm_steps" in ended.err


def test_weights_of_a_smaller_vocabulary_are_refused(tmp_path):
    GPT(GPTConfig(1, 1, 8, 300, 64)).save_pretrained(tmp_path / "weights")
    ended = small(tmp_path / "run", "--init", tmp_path / "weights")
    assert ended.code == 1 and "see --new-tokens and --tokenizer" in ended.err
