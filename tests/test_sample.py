"""`python sample.py` on a finished run: what it prints is what the policies and the scorer say, and a sentence where it cannot."""
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import figures
import sample
from checkpoint import rng
from model import generate
from stages import reward_function

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parent.parent
PROMPT = "Last night I watched this film"
EXO, DPO = "exo-reward-k4-s0", "dpo-preferences-s0"
ROW = re.compile(rf"^(pi_sft|{EXO}|{DPO}) +([-+]\d+\.\d\d|–) +([-+]\d+\.\d\d)   (.*)$")


def python(script, *arguments, **environment):
    command = [sys.executable, str(ROOT / script), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, encoding="utf-8", env=os.environ | environment)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A smoke run with EXO from rewards and DPO from pairs, so with a reward model."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    for arguments in (["exo", "--feedback", "reward"], ["dpo"]):
        done = python("train.py", "--smoke", "--preset", "tiny", "--run", folder, "--method", *arguments, OMP_NUM_THREADS="1")
        assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture
def show(capsys, monkeypatch):
    """show(*arguments) -> what sample.py prints on a terminal so wide that each completion stays in one line."""
    monkeypatch.setenv("COLUMNS", "10000")

    def call(*arguments):
        sample.main(list(map(str, arguments)))
        return capsys.readouterr().out
    return call


def table(text):
    """-> {policy: [(reward or None, log-ratio, completion), in the order of samples]}"""
    found = {}
    for match in filter(None, map(ROW.match, text.splitlines())):
        reward = None if match[2] == "–" else float(match[2])
        found.setdefault(match[1], []).append((reward, float(match[3]), match[4]))
    return found


def sentence(*arguments):
    with pytest.raises(SystemExit) as stopped:
        sample.main(list(map(str, arguments)))
    return stopped.value.code


def copy(folder, tmp_path, *without):
    return shutil.copytree(folder, tmp_path / "run", ignore=shutil.ignore_patterns(*without))


def test_each_prompt_and_sample_has_a_line_of_each_policy(finished, show):
    text = show(finished, "--prompt", PROMPT, "--prompt", "This movie", "--n", 3)
    assert [line for line in text.splitlines() if " … sample " in line] == [
        f"{prompt} … sample {k}" for prompt in (PROMPT, "This movie") for k in (1, 2, 3)]
    assert {name: len(rows) for name, rows in table(text).items()} == {"pi_sft": 6, EXO: 6, DPO: 6}
    assert all(h == 0 for _, h, _ in table(text)["pi_sft"]) and any(h != 0 for _, h, _ in table(text)[EXO])


def test_rewards_are_the_oracles_and_ratios_those_of_the_policies_that_wrote_the_text(finished, show):
    shown, run = table(show(finished, "--prompt", PROMPT)), figures.open_run(finished)
    prompt, sft, score = run.encoding.encode_ordinary(PROMPT), run.policy(finished / "sft"), run.scorer(finished / "oracle")
    for name, folder in sample.policies(finished, []).items():
        policy = run.policy(folder)
        ids, mask = generate(policy, [prompt] * 2, 66, 1.0, run.eos_id, rng(0, "sample", prompt))
        with torch.no_grad():
            reward = score(ids, mask)
            logp = [torch.log_softmax(gpt(ids[:, :-1]), -1).gather(2, ids[:, 1:, None]).squeeze(2) for gpt in (policy, sft)]
        ratio = ((logp[0] - logp[1]) * mask[:, 1:]).sum(1)
        assert [r for r, _, _ in shown[name]] == pytest.approx(reward.tolist(), abs=0.0051)
        assert [h for _, h, _ in shown[name]] == pytest.approx(ratio.tolist(), abs=0.0052)


def test_the_policies_are_the_last_checkpoints(finished):
    folders = sample.policies(finished, [])
    assert folders == {"pi_sft": finished / "sft", DPO: finished / DPO / "step-00010", EXO: finished / EXO / "step-00010"}


def test_the_same_policy_under_another_name_writes_the_same(finished, tmp_path, show):
    """All policies read the same uniform numbers."""
    folder = copy(finished, tmp_path)
    shutil.copyfile(folder / "sft" / "model.safetensors", folder / EXO / "step-00010" / "model.safetensors")
    shown = table(show(folder, "--prompt", PROMPT))
    assert shown[EXO] == shown["pi_sft"] != shown[DPO]


def test_the_same_seed_gives_the_same_text_whatever_else_is_asked_for(finished, show):
    both = show(finished, "--prompt", "This movie", "--prompt", PROMPT, "--seed", 1)
    alone = show(finished, "--prompt", PROMPT, "--seed", 1, "--method", "dpo")
    assert show(finished, "--prompt", PROMPT, "--seed", 1, "--method", "dpo") == alone
    assert table(both)[DPO][2:] == table(alone)[DPO]
    other = show(finished, "--prompt", PROMPT, "--seed", 2, "--method", "dpo")
    assert not {y for _, _, y in table(other)[DPO]} & {y for _, _, y in table(alone)[DPO]}


def test_a_method_is_the_start_of_an_alignments_name(finished, tmp_path):
    assert list(sample.policies(finished, ["dpo"])) == ["pi_sft", DPO]
    assert list(sample.policies(finished, ["exo-reward", "dpo"])) == ["pi_sft", DPO, EXO]
    folder = copy(finished, tmp_path)
    (folder / DPO).rename(folder / f"online-{DPO}")
    assert list(sample.policies(folder, ["online-dpo"])) == ["pi_sft", f"online-{DPO}"]
    assert sentence(folder, "--prompt", "x", "--method", "dpo").startswith(f"sample.py: {folder} has no finished alignment by dpo")


def test_without_an_oracle_the_reward_model_scores_and_is_named(finished, tmp_path, show):
    folder = copy(finished, tmp_path, "oracle")
    text, run = show(folder, "--prompt", PROMPT, "--method", "dpo"), figures.open_run(folder)
    assert "(reward: reward model;" in text and "(reward: oracle;" in show(finished, "--prompt", PROMPT)
    prompt = run.encoding.encode_ordinary(PROMPT)
    ids, mask = generate(run.policy(folder / "sft"), [prompt] * 2, 66, 1.0, run.eos_id, rng(0, "sample", prompt))
    with torch.no_grad():
        reward = reward_function(run, folder / "reward_model")(ids, mask)
    assert [r for r, _, _ in table(text)["pi_sft"]] == pytest.approx(reward.tolist(), abs=0.0051)


def test_without_any_scorer_the_ratios_are_shown_alone(finished, tmp_path, show):
    text = show(copy(finished, tmp_path, "oracle", "reward_model"), "--prompt", PROMPT)
    assert "(reward: none in this run;" in text and {r for rows in table(text).values() for r, _, _ in rows} == {None}
    assert any(h != 0 for _, h, _ in table(text)[DPO])


def test_lines_are_as_wide_as_the_terminal_and_texts_have_a_column_of_their_own(finished):
    done = python("sample.py", finished, "--prompt", PROMPT, COLUMNS="70")
    assert done.returncode == 0, done.stderr
    block = done.stdout.split("\n\n")[1].splitlines()[1:]
    assert len(block) > 6 and all(len(line) <= 70 for line in block)
    start = re.match(r".{18}[-+ .\d]+   ", block[0]).end()
    assert all(ROW.match(line) or line[:start].isspace() for line in block)


def test_a_terminal_without_unicode_gets_question_marks(finished):
    done = python("sample.py", finished, "--prompt", PROMPT, "--n", 1, PYTHONIOENCODING="ascii")
    assert done.returncode == 0 and f"{PROMPT} ? sample 1" in done.stdout, done.stderr


def test_a_text_is_one_line_without_control_characters_and_its_cut_shows(finished):
    run = figures.open_run(finished)
    written = run.encoding.encode_ordinary(" It\r\n was \x1b[2J\x07dull \u2028.")
    assert sample.one_line(run, [*written, run.eos_id]) == "It was \N{REPLACEMENT CHARACTER}[2J\N{REPLACEMENT CHARACTER}dull ."
    assert sample.one_line(run, written[:2]) == "It …" and sample.one_line(run, [run.eos_id]) == ""


@pytest.mark.parametrize("words, arguments, room", [
    (1, [], 66), (6, [], 66), (20, [], 52), (71, [], 1), (68, ["--new-tokens", 4], 4)])
def test_a_prompt_has_any_length_that_the_context_leaves_room_after(finished, show, words, arguments, room):
    prompt, run = "film" + " film" * (words - 1), figures.open_run(finished)
    assert table(show(finished, "--prompt", prompt, "--n", 1, *arguments))["pi_sft"]
    assert sample.encode(run, prompt, 72, arguments[1] if arguments else None)[1] == room


@pytest.mark.parametrize("words, arguments, said", [
    (72, [], "a prompt of 72 tokens with 1 to follow does not fit into the model's context of 72: shorten the prompt"),
    (6, ["--new-tokens", 67], "a prompt of 6 tokens with 67 to follow does not fit into the model's context of 72: "
                              "shorten the prompt, or lower --new-tokens"),
    (0, [], "--prompt is empty: give the first words of a text"),
    (6, ["--n", 0], "--n and --new-tokens must be at least 1"),
    (6, ["--new-tokens", 0], "--n and --new-tokens must be at least 1"),
    (6, ["--method", "kto"], "--method kto is unknown: name exo, dpo, ppo, xpo or online-dpo"),
    (6, ["--method", "exo", "ppo"],
     "{run} has no finished alignment by ppo (there: " + f"{DPO}, {EXO}): run train.py for it first"),
])
def test_what_cannot_be_done_is_one_sentence(finished, words, arguments, said):
    said = "sample.py: " + said.replace("{run}", str(finished))
    assert sentence(finished, "--prompt", ("film" + " film" * (words - 1)) if words else " ", *arguments) == said


def test_a_folder_that_is_not_a_run_is_one_sentence_and_status_1(finished, tmp_path):
    for folder in (tmp_path, tmp_path / "none", finished / "sft", finished / EXO):
        assert sentence(folder, "--prompt", "x") == f"sample.py: {folder} is not a run folder: name one that train.py has made"
    done = python("sample.py", tmp_path, "--prompt", "x")
    assert done.returncode == 1 and done.stderr.startswith("sample.py: ") and done.stderr.count("\n") == 1


def test_a_run_without_a_finished_sft_is_one_sentence(finished, tmp_path):
    folder = copy(finished, tmp_path)
    said = f"sample.py: {folder} has no finished sft, which everything starts from: run train.py first"
    record = json.loads((folder / "sft" / "stage.json").read_text())
    (folder / "sft" / "stage.json").write_text(json.dumps({k: v for k, v in record.items() if k != "done"}))
    assert sentence(folder, "--prompt", "x") == said
    shutil.rmtree(folder / "sft")
    assert sentence(folder, "--prompt", "x") == said


def test_an_unfinished_alignment_is_left_out(finished, tmp_path):
    folder = copy(finished, tmp_path)
    record = json.loads((folder / DPO / "stage.json").read_text())
    (folder / DPO / "stage.json").write_text(json.dumps({k: v for k, v in record.items() if k != "done"}))
    assert list(sample.policies(folder, [])) == ["pi_sft", EXO]
    assert sentence(folder, "--prompt", "x", "--method", "dpo") == (
        f"sample.py: {folder} has no finished alignment by dpo (there: {EXO}): run train.py for it first")


def test_the_temperature_is_the_runs(finished, tmp_path, show):
    """At a very low one a policy writes its likeliest words, whatever the uniform numbers."""
    folder = copy(finished, tmp_path)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"temperature": 1e-3}))
    text = table(show(folder, "--prompt", PROMPT))["pi_sft"]
    run = figures.open_run(folder)
    policy, row = run.policy(folder / "sft"), run.encoding.encode_ordinary(PROMPT)
    first = int(policy(torch.tensor([row]))[0, -1].argmax())
    assert text[0] == text[1] and text[0][2].startswith(run.encoding.decode([first]).strip())
