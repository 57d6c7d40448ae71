"""`python sample.py` on a finished run: what it prints is what policies and scorer say, else one sentence."""
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import sample
from compute import UserError, rng
from model import generate, sequence_logprob
from run import open_run

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parent.parent
PROMPT = "Last night I watched this film"
EXO, DPO = "exo-reward-k4-s0", "dpo-preferences-s0"
ROW = re.compile(r"^([\w-]+) +([-+]\d+\.\d\d|–) +([-+]\d+\.\d\d)   (.*)$", re.MULTILINE)


def python(script, *arguments, **environment):
    command, environment = [sys.executable, script, *map(str, arguments)], os.environ | environment
    return subprocess.run(command, capture_output=True, encoding="utf-8", cwd=ROOT, env=environment)


def edit(path, **changes):
    """Changes entries of a JSON file; None removes one."""
    record = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({name: value for name, value in record.items() if value is not None}))


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A smoke run with EXO from rewards, and beside it a policy called DPO's that still is pi_sft."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    done = python("train.py", "--smoke", "--preset", "tiny", "--run", folder, "--feedback", "reward")
    assert done.returncode == 0, done.stderr
    shutil.copytree(folder / EXO, folder / DPO)
    shutil.copyfile(folder / "sft" / "model.safetensors", folder / DPO / "step-00010" / "model.safetensors")
    edit(folder / DPO / "stage.json", about={"method": "dpo"})
    return folder


@pytest.fixture
def copy(finished, tmp_path):
    return shutil.copytree(finished, tmp_path / "run")


@pytest.fixture
def shown(capsys, monkeypatch):
    """shown(*arguments) -> {policy: [[reward, log-ratio, completion], all of them text]}, what was printed"""
    monkeypatch.setenv("COLUMNS", "10000")

    def call(*arguments):
        sample.main(list(map(str, arguments)))
        text, rows = capsys.readouterr().out, {}
        for name, *row in ROW.findall(text):
            rows.setdefault(name, []).append(row)
        return rows, text
    return call


def sentence(*arguments):
    with pytest.raises(SystemExit) as stopped:
        sample.main(list(map(str, arguments)))
    return stopped.value.code


def test_each_prompt_and_sample_has_a_line_of_each_policy(finished, shown):
    rows, text = shown(finished, "--prompt", PROMPT, "--prompt", "This movie", "--n", 3)
    heads = [f"{prompt} … sample {k}" for prompt in (PROMPT, "This movie") for k in (1, 2, 3)]
    assert [line for line in text.splitlines() if " … sample " in line] == heads
    assert {name: len(lines) for name, lines in rows.items()} == {"pi_sft": 6, EXO: 6, DPO: 6}


def test_rewards_are_the_scorers_and_ratios_those_of_the_policy_that_wrote_the_text(copy, shown):
    rows, text = shown(copy, "--prompt", PROMPT)
    run = open_run(copy)
    prompt = run.encoding.encode_ordinary(PROMPT)
    sft, oracle = run.policy(copy / "sft"), run.scorer(copy / "oracle")
    for name, folder in sample.policies(copy, []).items():
        policy = run.policy(folder)
        ids, mask = generate(policy, [prompt] * 2, 66, 1.0, run.eos_id, rng(0, "sample", prompt))
        ratio = sequence_logprob(policy, ids, mask) - sequence_logprob(sft, ids, mask)
        assert [float(row[0]) for row in rows[name]] == pytest.approx(oracle(ids, mask).tolist(), abs=0.0051)
        assert [float(row[1]) for row in rows[name]] == pytest.approx(ratio.tolist(), abs=0.0051)
    assert "(reward: oracle;" in text
    shutil.rmtree(copy / "oracle")
    assert "(reward: reward model;" in shown(copy, "--prompt", PROMPT)[1]
    shutil.rmtree(copy / "reward_model")
    assert [row[0] for row in shown(copy, "--prompt", PROMPT)[0][EXO]] == ["–", "–"]


def test_policies_are_the_last_checkpoints_of_finished_alignments_by_method(copy):
    sft, exo, dpo = copy / "sft", copy / EXO / "step-00010", copy / DPO / "step-00010"
    assert sample.policies(copy, []) == {"pi_sft": sft, DPO: dpo, EXO: exo}
    assert sample.policies(copy, ["dpo"]) == {"pi_sft": sft, DPO: dpo}
    edit(copy / DPO / "stage.json", about={"method": "xpo", "alpha": 0})
    assert sample.policies(copy, ["online-dpo"]) == {"pi_sft": sft, DPO: dpo}
    edit(copy / DPO / "stage.json", done=None)
    assert sample.policies(copy, []) == {"pi_sft": sft, EXO: exo}
    said = f"{copy} has no finished alignment by online-dpo (there: {EXO}): run train.py for it first"
    assert sentence(copy, "--prompt", "x", "--method", "exo", "online-dpo") == f"sample.py: {said}"


def test_the_seed_and_the_runs_temperature_decide_the_text_for_all_policies_alike(copy, shown):
    both, _ = shown(copy, "--prompt", "This movie", "--prompt", PROMPT, "--seed", 1)
    alone, _ = shown(copy, "--prompt", PROMPT, "--seed", 1, "--method", "exo")
    other, _ = shown(copy, "--prompt", PROMPT, "--seed", 2, "--method", "exo")
    assert both[DPO] == both["pi_sft"] != both[EXO] and both[EXO][2:] == alone[EXO] != other[EXO]
    edit(copy / "config.json", temperature=1e-3)                    # now it writes its likeliest words
    first, second = shown(copy, "--prompt", PROMPT)[0]["pi_sft"]
    assert first == second


def test_lines_fit_the_terminal_and_its_characters(finished):
    done = python("sample.py", finished, "--prompt", PROMPT, COLUMNS="70", PYTHONIOENCODING="ascii")
    assert done.returncode == 0 and f"{PROMPT} ? sample 1" in done.stdout, done.stderr
    block = done.stdout.split("\n\n")[1].splitlines()[1:]
    start = re.match(r".{18}[-+ .\d]+   ", block[0]).end()           # texts have a column of their own
    assert len(block) > 6 and all(len(line) <= 70 for line in block)
    assert all(ROW.match(line) or line[:start].isspace() for line in block)


def test_a_text_is_one_line_without_control_characters_and_its_cut_shows(finished):
    run = open_run(finished)
    ids = run.encoding.encode_ordinary(" It\r\n was \x1b[2J\x07dull \u2028.")
    assert sample.one_line(run, [*ids, run.eos_id]) == "It was \ufffd[2J\ufffddull ."
    assert sample.one_line(run, ids[:2]) == "It …" and sample.one_line(run, [run.eos_id]) == ""


def test_a_prompt_has_any_length_that_the_context_leaves_room_after(finished):
    for words, asked, room in ((1, None, 66), (20, None, 52), (71, None, 1), (68, 4, 4)):
        assert sample.encode(open_run(finished), " film" * words, 72, asked)[1] == room
    for words, asked in ((72, None), (6, 67)):
        said = f"a prompt of {words} tokens with {asked or 1} to follow does not fit into the context of 72"
        with pytest.raises(UserError, match=said):
            sample.encode(open_run(finished), " film" * words, 72, asked)


def test_transformers_reads_the_same_tokens_and_samples_the_same_policy(copy):
    transformers = pytest.importorskip("transformers")
    edit(copy / "config.json", temperature=0.5)
    run = open_run(copy)
    folder = copy / "there"
    ours = run.policy(copy / EXO / "step-00010")
    run.save_policy(ours, folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    text = PROMPT + ", caf\u00e9 \n twice"
    ids = run.encoding.encode_ordinary(text)
    assert tokenizer(text)["input_ids"] == ids and tokenizer.decode(ids) == text
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder)
    drawn = theirs.generate(torch.tensor([ids]), return_dict_in_generate=True, output_scores=True)
    assert drawn.sequences.shape[1] <= 72
    with torch.no_grad():
        logp = (ours(torch.tensor([ids]))[0, -1] / 0.5).log_softmax(-1)
    torch.testing.assert_close(drawn.scores[0][0].log_softmax(-1), logp, rtol=1e-4, atol=1e-4)
    write = transformers.pipeline("text-generation", str(folder))
    assert write(PROMPT)[0]["generated_text"].startswith(PROMPT)


def test_what_cannot_be_done_is_one_sentence(copy, tmp_path):
    assert sentence(copy, "--prompt", " ") == "sample.py: --prompt is empty: give the first words of a text"
    assert sentence(copy, "--prompt", "x", "--n", 0) == "sample.py: --n and --new-tokens must be at least 1"
    for folder in (tmp_path, tmp_path / "none", copy / "sft"):
        said = f"sample.py: {folder} is not a run folder: name one that train.py has made"
        assert sentence(folder, "--prompt", "x") == said
    edit(copy / "sft" / "stage.json", done=None)
    assert sentence(copy, "--prompt", "x").startswith(f"sample.py: {copy} has no finished sft")
