"""`python train.py` as a user meets it: one command from nothing to the frontier, and a sentence where something is wrong."""
import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import data
import stages
import train
from evaluate import read_csv
from exo import exo_pref_loss
from files import read_tensors
from model import GPT, sequence_logprob

ROOT = Path(__file__).parent.parent


def run(*arguments, **environment):
    command = [sys.executable, str(ROOT / "train.py"), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=os.environ | environment)


@pytest.fixture(scope="module")
def smoke(tmp_path_factory):
    """A finished `train.py --smoke --method exo`, whose folder the tests below share."""
    folder = tmp_path_factory.mktemp("runs") / "a run with spaces"
    done = run("--smoke", "--method", "exo", "--preset", "tiny", "--run", folder)
    assert done.returncode == 0, done.stderr
    return folder, done


def test_one_command_leaves_policies_metrics_samples_and_the_frontier(smoke):
    folder, done = smoke
    alignment = folder / "exo-preferences-s0"
    assert "preset tiny (as asked" in done.stdout and "cpu" in done.stdout and "exo-preferences-s0" in done.stdout
    assert (folder / "frontier.png").read_bytes()[:4] == b"\x89PNG"
    steps = [int(row["step"]) for row in read_csv(alignment / "metrics.csv")]
    assert steps == list(range(1, 11))
    rows = read_csv(alignment / "eval.csv")
    assert [row["step"] for row in rows] == [0, 5, 10] and rows[0]["kl"] == 0
    assert set(rows[0]) == {"step", "reward", "reward_se", "accuracy", "kl", "kl_se", "kl_k1", "length", "ended", "distinct2"}
    assert "π_sft" in (alignment / "samples.md").read_text(encoding="utf-8")


def test_the_first_step_starts_at_the_reference(smoke):
    folder, _ = smoke
    first = read_csv(folder / "exo-preferences-s0" / "metrics.csv")[0]
    same = torch.zeros(1, 2)
    assert first["loss"] == pytest.approx(float(exo_pref_loss(same, same)), abs=1e-4)       # 2.7612, whatever the batch
    assert abs(first["rewards_chosen"]) < 1e-4 and abs(first["rewards_rejected"]) < 1e-4


def test_cached_reference_log_probs_are_those_that_training_computes(smoke):
    table = read_tensors(smoke[0] / "responses" / "responses.safetensors")[0]
    policy = GPT.from_pretrained(smoke[0] / "sft")
    ids, mask = table["ids"][:8].flatten(0, 1).long(), table["mask"][:8].flatten(0, 1)
    with torch.no_grad():
        again = sequence_logprob(policy, ids, mask, 1.0)
    assert (again - table["ref_logp"][:8].flatten()).abs().max() < 1e-4


def test_responses_are_prompt_then_response_then_padding_and_end_once(smoke):
    table, eos = read_tensors(smoke[0] / "responses" / "responses.safetensors")[0], data.tiny_encoding().eot_token
    ids, mask = table["ids"].flatten(0, 1), table["mask"].flatten(0, 1)
    assert not mask[:, :6].any() and (ids[:, :6] != eos).all() and mask[:, 6].all()
    ends = ((ids == eos) & mask).sum(1)
    full = mask.sum(1) == 66
    assert ((ends == 1) | full).all() and (ends <= 1).all()


def test_a_second_method_reuses_every_stage(smoke):
    folder, _ = smoke
    stamps = {path: path.stat().st_mtime_ns for path in folder.glob("*/*.safetensors")}
    done = run("--smoke", "--method", "dpo", "--preset", "tiny", "--run", folder)
    assert done.returncode == 0, done.stderr
    assert all(path.stat().st_mtime_ns == stamp for path, stamp in stamps.items())
    assert read_csv(folder / "dpo-preferences-s0" / "metrics.csv")[0]["loss"] == pytest.approx(math.log(2), abs=1e-4)
    assert "dpo-preferences-s0" in done.stdout and "exo-preferences-s0" in done.stdout      # the table holds both


def test_changed_settings_upstream_are_refused_by_name(smoke):
    done = run("--smoke", "--method", "exo", "--preset", "tiny", "--run", smoke[0], "--sft-lr", "0.5")
    assert done.returncode == 1 and "sft_lr = 0.002 (now 0.5)" in done.stderr and "--run" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_rerun_sft_makes_downstream_artifacts_stale(smoke, tmp_path):
    folder = tmp_path / "run"
    subprocess.run(["cp", "-r", str(smoke[0]), str(folder)], check=True)
    record = json.loads((folder / "sft" / "stage.json").read_text())
    record["done"]["model.safetensors"] = "another one"
    (folder / "sft" / "stage.json").write_text(json.dumps(record))
    done = run("--smoke", "--preset", "tiny", "--run", folder)
    assert done.returncode == 1 and "made from another sft" in done.stderr


@pytest.mark.parametrize("arguments, sentence", [
    (["--preset", "huge"], "invalid choice: 'huge'"),
    (["--sft-stepz", "3"], "unrecognized arguments: --sft-stepz"),
    (["--beta-pi", "-1"], "--beta-pi must be positive"),
    (["--beta-r", "nan"], "--beta-r must be positive"),
    (["--eps", "0.5"], "--eps must lie in (0, 0.5)"),
    (["--num-candidates", "1"], "--num-candidates must lie between 2"),
    (["--num-candidates", "9"], "--num-candidates must lie between 2"),
    (["--seeds", "1", "1"], "--seeds must be different"),
    (["--n-embd", "65"], "must be a multiple of --n-head"),
    (["--checkpoints", "999"], "--checkpoints must be at most"),
    (["--init", "no/such/folder", "--new-tokens", "3"], None),
])
def test_usage_errors_are_one_sentence(arguments, sentence, capsys, tmp_path):
    if sentence is None:                                             # not usage: found when the stage starts
        done = run("--preset", "tiny", "--smoke", "--run", tmp_path / "r", *arguments)
        assert done.returncode == 1 and "no/such/folder is neither one of gpt2" in done.stderr and "Traceback" not in done.stderr
        return
    with pytest.raises(SystemExit) as stopped:
        train.parse(["--preset", "tiny", *arguments] if "--preset" not in arguments else arguments)
    text = capsys.readouterr().err
    assert stopped.value.code == 2 and sentence in text and text.count("\n") == 1


def test_help_is_grouped_and_names_each_defaults_origin(capsys):
    with pytest.raises(SystemExit) as stopped:
        train.parse(["--preset", "imdb", "--help"])
    text = capsys.readouterr().out
    assert stopped.value.code == 0 and "alignment:" in text and "(default: 1e-06)" in text
    for name, field in train.Config.__dataclass_fields__.items():
        assert "--" + name.replace("_", "-") in text
        if field.metadata["stages"] and not field.metadata["choices"] and name not in ("init", "eval_data"):
            assert "[" in field.metadata["help"] or "tiny" in field.metadata["help"], name


def test_presets_are_those_of_the_paper():
    cfg, _ = train.parse(["--preset", "imdb"])
    assert (cfg.beta_pi, cfg.beta_r, cfg.temperature, cfg.align_lr, cfg.align_batch) == (0.1, 0.1, 0.8, 1e-6, 64)
    assert (cfg.eval_prompts, cfg.eval_samples, cfg.prompt_tokens, cfg.labels, cfg.eps) == (512, 4, 10, "argmax", 1e-3)
    assert train.parse(["--preset", "imdb-large"])[0].init == "gpt2-large"
    assert train.parse(["--preset", "imdb-small", "--align-lr", "0.1"])[0].align_lr == 0.1  # flags win over presets


def test_trials_are_evaluated_on_training_prompts_that_no_method_aligns_on_and_named_by_their_learning_rate(smoke, tmp_path):
    settings = ["--smoke", "--preset", "tiny", "--beta-pi", "0.25"]
    cfg = train.parse([*settings, "--eval-split", "train", "--align-lr", "3e-4"])[0]
    assert cfg.run == "runs/tiny-smoke-trials" and train.parse(settings)[0].run == "runs/tiny-smoke"
    cfg.run = str(tmp_path)
    for stage in ("sft", "oracle"):
        shutil.copytree(smoke[0] / stage, tmp_path / stage)
    trial = stages.Run(cfg, torch.device("cpu"), bf16=False)
    ids = [review[:6].tolist() for review in trial.reviews["train"].ids]
    found = read_tensors(stages.reference(trial) / "samples.safetensors")[0]
    assert stages.prompts_of(found["ids"][:, 0], found["mask"][:, 0]) == ids[:-17:-1]
    assert found["data_ids"][3, :6].tolist() == ids[-4]
    assert trial.train_prompts() == ids[:64]
    assert train.name_of(cfg, "exo", "reward", 4, 0) == "exo-reward-k4-betapi0.25-lr0.0003-s0"
    assert train.name_of(cfg, "ppo", "reward", 0, 0) == "ppo-reward-betapi0.25-lr0.0002-s0"
    assert train.name_of(train.parse(settings)[0], "exo", "preferences", 0, 1) == "exo-preferences-betapi0.25-s1"


@pytest.mark.parametrize("folder", ["file", "read only"])
def test_an_unusable_run_folder_is_one_sentence(folder, tmp_path):
    (tmp_path / "file").write_text("not a folder")
    place = tmp_path / "file" if folder == "file" else Path("/proc/nowhere")
    done = run("--smoke", "--preset", "tiny", "--run", place)
    assert done.returncode == 1 and str(place) in done.stderr and "Traceback" not in done.stderr


def test_without_a_network_the_sentence_says_what_to_do(tmp_path):
    """An unreachable proxy stands for the missing network."""
    dead = dict(http_proxy="http://127.0.0.1:9", https_proxy="http://127.0.0.1:9", EXO_CACHE=str(tmp_path),
                TIKTOKEN_CACHE_DIR=str(tmp_path / "none"))
    done = run("--preset", "imdb-small", "--smoke", "--run", tmp_path / "r", **dead)
    assert done.returncode == 1 and "TIKTOKEN_CACHE_DIR" in done.stderr and "--preset tiny" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_prompt_longer_than_the_context_is_refused(smoke, tmp_path):
    done = run("--preset", "tiny", "--smoke", "--init", smoke[0] / "sft", "--new-tokens", 500, "--run", tmp_path / "r")
    assert done.returncode == 1 and "block" in done.stderr and "Traceback" not in done.stderr


@pytest.mark.parametrize("place", ["sft/model.safetensors", "responses/responses.safetensors"])
def test_a_flipped_bit_in_an_artifact_is_found(smoke, tmp_path, place):
    folder = tmp_path / "run"
    subprocess.run(["cp", "-r", str(smoke[0]), str(folder)], check=True)
    subprocess.run(["rm", "-r", str(folder / "exo-preferences-s0")], check=True)
    blob = bytearray((folder / place).read_bytes())
    blob[len(blob) // 2] ^= 1
    (folder / place).write_bytes(blob)
    done = run("--smoke", "--method", "exo", "--preset", "tiny", "--run", folder)
    assert done.returncode == 1 and place.split("/")[1] in done.stderr and "corrupt" in done.stderr


@pytest.mark.slow
def test_real_reviews_from_archive_to_frontier(real_data, tmp_path):
    """The real IMDB archives through every stage at smoke size."""
    archives = [real_data / "aclImdb_labelled.tar.xz", real_data / "aclImdb_unsup.tar.xz"]
    done = run("--preset", "imdb-small", "--smoke", "--imdb", *archives, "--new-tokens", 20, "--feedback", "reward",
               "--run", tmp_path / "r", EXO_CACHE=str(tmp_path / "cache"))
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "r" / "frontier.png").exists()


@pytest.mark.slow
def test_a_compiled_run_learns_what_an_eager_one_does(smoke, tmp_path):
    done = run("--smoke", "--method", "exo", "--preset", "tiny", "--compile", "--run", tmp_path)
    assert done.returncode == 0, done.stderr
    ours, theirs = (read_csv(folder / "exo-preferences-s0" / "metrics.csv") for folder in (tmp_path, smoke[0]))
    assert [row["loss"] for row in ours] == pytest.approx([row["loss"] for row in theirs], rel=1e-3)
