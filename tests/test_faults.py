"""A run's bad day: killed, stopped, out of disk or memory, started twice, with a broken save or other settings.

Most tests start processes.  Importing PyTorch is what a start costs, so one process imports it, and each `train.py`
is a fork of that one; what happens after the imports is what happens in a process of its own.
"""
import json
import os
import random
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import ppo
import stages
import train
import xpo
from dpo import dpo_loss, dpo_reward_loss
from evaluate import read_csv, summary
from exo import exo_loss, exo_pref_loss
from files import UserError, read_tensors
from model import GPT, ScalarGPT, sequence_logprob
from optim import adamw, descend, stuck

ROOT = Path(__file__).parent.parent
STARTER = """
import gc, json, os, runpy, sys
import torch._dynamo, train                                    # the first is what optimizers import
gc.freeze()
for line in iter(sys.stdin.readline, ""):
    order = json.loads(line)
    if "wait" in order:
        print(os.waitstatus_to_exitcode(os.waitpid(order["wait"], 0)[1]), flush=True)
    elif pid := os.fork():
        print(pid, flush=True)
    else:
        for number, name in enumerate(["/dev/null", order["out"], order["err"]]):
            os.dup2(os.open(name, os.O_RDWR), number)
        sys.argv = ["train.py", *order["arguments"]]
        exec(order["before"])
        code = 0
        try:
            runpy.run_path("train.py", run_name="__main__")
        except SystemExit as leaving:
            code = leaving.code if isinstance(leaving.code, int) else print(leaving.code, file=sys.stderr) or 1
        sys.stdout.flush()
        os._exit(code)
"""


class Train:
    """A started `python train.py ARGUMENTS`; `before`: lines of Python that it runs first.  It writes into pipes."""

    def __init__(self, starter, place, arguments, before):
        self.starter, self.pipes = starter, {}
        self.arguments = list(map(str, arguments))
        for name in ("out", "err"):
            path = place / f"pipe {name} {len(list(place.iterdir()))}"
            os.mkfifo(path)
            self.pipes[name] = path, os.open(path, os.O_RDONLY | os.O_NONBLOCK)
        self.pid = self.say(arguments=self.arguments, before=before, **{k: str(p) for k, (p, _) in self.pipes.items()})

    def say(self, **order):
        print(json.dumps(order), file=self.starter.stdin, flush=True)
        return int(self.starter.stdout.readline())

    def wait(self):
        self.code = self.say(wait=self.pid)
        for name, (_, pipe) in self.pipes.items():
            setattr(self, name, b"".join(iter(lambda pipe=pipe: os.read(pipe, 2 ** 16), b"")).decode())
            os.close(pipe)
        return self


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    """start(*arguments, before="") -> a Train that is under way."""
    quiet = dict(OMP_NUM_THREADS="1", TQDM_DISABLE="1", PYTHONPATH=str(ROOT))
    starter = subprocess.Popen([sys.executable, "-c", STARTER], cwd=ROOT, text=True, env=os.environ | quiet,
                               stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    place = tmp_path_factory.mktemp("pipes")
    yield lambda *arguments, before="": Train(starter, place, arguments, before)
    starter.communicate()


SMALL = ("--smoke --preset tiny --feedback reward --new-tokens 8 --sft-reviews 200 --test-reviews 60 --prompts 32 "
         "--sft-steps 6 --oracle-steps 6 --rm-steps 6 --align-steps 6 --save-every 2 --limit-responses 64 "
         "--eval-samples 2").split()
ALIGNED = "exo-reward-k4-s0"
NO_FIGURES = "import figures; figures.draw = lambda run: None\n"


@pytest.fixture(scope="module")
def small(start):
    """small(folder, *arguments, before="") -> a finished small run in this folder; flags that come later win."""
    def run(folder, *arguments, before=""):
        return start(*SMALL, "--run", folder, *arguments, before=NO_FIGURES + before).wait()
    return run


@pytest.fixture(scope="module")
def undisturbed(small, tmp_path_factory):
    folder = tmp_path_factory.mktemp("undisturbed") / "run"
    done = small(folder)
    assert done.code == 0, done.err
    return folder


def copy(folder, tmp_path, without=(ALIGNED,)):
    shutil.copytree(folder, tmp_path / "run", ignore=shutil.ignore_patterns(*without))
    return tmp_path / "run"


def files(folder):
    """Every file of a run and what is in it, but for those that hold a process id or the folder's own path."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*"))
            if path.is_file() and str(path.relative_to(folder)) not in (".lock", "config.json")}


def same(folder, other):
    ours, theirs = files(folder), files(other)
    assert [name for name in sorted({*ours, *theirs}) if ours.get(name) != theirs.get(name)] == []


def at(stage, step, action):
    """Lines that make a process run `action` in this step of a stage, which is taken and not yet saved."""
    return f"""
import os, resource, signal, time, checkpoint
def write(log, _write=checkpoint.Log.write, **row):
    _write(log, **row)
    if log.path.parent.name == {stage!r} and log.path.name == "metrics.csv" and row["step"] == {step}:
        {action}
checkpoint.Log.write = write
"""


KILL = "os.kill(os.getpid(), signal.SIGKILL)"


def killed(small, folder, stage=ALIGNED, step=5, *arguments):
    assert small(folder, *arguments, before=at(stage, step, KILL)).code == -signal.SIGKILL
    return sorted((folder / stage).glob("resume-*.safetensors"))


def newest(folder):
    return max((folder / ALIGNED).glob("resume-*")).name


def one_sentence(done, *words):
    assert done.code == 1 and done.err.startswith("train.py: ") and len(done.err.splitlines()) == 1, done.err
    assert all(str(word) in done.err for word in words), done.err


# ---- killed ----------------------------------------------------------------------------------------------------------

def kill_at_file_operation(n):
    """Lines that kill a process right before its n-th creating, renaming or removing of a file."""
    return f"""
import os, signal, sys
left = {n}
def hook(event, arguments):
    global left
    if event in ("os.rename", "os.remove") or event == "open" and str(arguments[0]).endswith(".part"):
        left -= 1
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
sys.addaudithook(hook)
"""


def die_in_the_middle_of_a_file(size):
    """Lines that kill a process inside the write that makes any file longer than this."""
    return f"""
import resource, signal
resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
resource.setrlimit(resource.RLIMIT_FSIZE, ({size}, {size}))
signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
"""


def disturb(start, command, kills, seed):
    """Starts a command again and again until it has been killed so many times; then lets it finish."""
    draw, died, tries = random.Random(seed), 0, 0
    while died < kills:
        if tries % 5 == 4:
            child = start(*command, before=die_in_the_middle_of_a_file(draw.randrange(2_000, 170_000)))
        elif tries % 2:
            child = start(*command)
            time.sleep(draw.uniform(0, 1))
            os.kill(child.pid, signal.SIGKILL)
        else:
            child = start(*command, before=kill_at_file_operation(draw.randrange(1, 13)))
        died += child.wait().code in (-signal.SIGKILL, -signal.SIGXFSZ)
        tries += 1
    done = start(*command).wait()
    assert done.code == 0, done.err


@pytest.fixture(scope="module")
def smoke(start, tmp_path_factory):
    folder = tmp_path_factory.mktemp("smoke") / "run"
    done = start("--smoke", "--preset", "tiny", "--feedback", "reward", "--run", folder).wait()
    assert done.code == 0, done.err
    return folder


@pytest.mark.slow
def test_a_run_that_is_killed_20_times_leaves_what_an_undisturbed_one_leaves(start, smoke, tmp_path):
    command = "--smoke", "--preset", "tiny", "--feedback", "reward", "--run", tmp_path / "run"
    disturb(start, command, 20, seed=0)
    same(tmp_path / "run", smoke)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["ppo", "xpo"])
def test_ppo_and_xpo_killed_5_times_leave_what_undisturbed_ones_leave(start, smoke, tmp_path, method):
    folders = copy(smoke, tmp_path / "undisturbed"), copy(smoke, tmp_path / "killed")
    commands = [("--smoke", "--preset", "tiny", "--method", method, "--save-every", every, "--run", folder)
                for every, folder in zip((100, 1), folders)]
    assert start(*commands[0]).wait().code == 0
    disturb(start, commands[1], 5, seed=1)
    same(*folders)


@pytest.mark.parametrize("n", [2, 5, 8, 11])
def test_killed_right_at_a_file_operation_nothing_is_lost(start, small, undisturbed, tmp_path, n):
    """The 2nd: config.json is whole and has not got its name; the 5th: so the stage's record; then the first saves."""
    folder = copy(undisturbed, tmp_path)
    assert small(folder, before=kill_at_file_operation(n)).code == -signal.SIGKILL
    assert small(folder).code == 0
    same(folder, undisturbed)


def test_what_a_killed_process_left_half_written_is_removed_at_the_next_start(small, undisturbed, tmp_path):
    folder = copy(undisturbed, tmp_path, without=())
    for place in (folder, folder / "sft", folder / ALIGNED / "step-00003"):
        (place / ".model.safetensors.123.part").write_bytes(b"half")
    (folder / "sft" / "resume-00000006.safetensors").write_bytes(b"not removed in time")
    assert small(folder).code == 0
    same(folder, undisturbed)


# ---- stopped ---------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("number, stage", [(signal.SIGINT, "sft"), (signal.SIGTERM, ALIGNED)])
def test_ctrl_c_and_sigterm_save_the_step_and_say_how_to_go_on(start, small, undisturbed, tmp_path, number, stage):
    folder = copy(undisturbed, tmp_path, without=["*"] if stage == "sft" else [ALIGNED])
    stopped = small(folder, before=at(stage, 3, f"os.kill(os.getpid(), {int(number)})"))
    said, command = stopped.err.splitlines()[-1].split("python train.py ")
    assert stopped.code == 128 + number and said == "stopped; go on with: "
    assert (folder / stage / "resume-00000003.safetensors").exists()
    again = shlex.split(command)
    assert again == stopped.arguments and start(*again, before=NO_FIGURES).wait().code == 0
    same(folder, undisturbed)


def test_a_second_signal_leaves_at_once_and_harms_nothing(small, undisturbed, tmp_path):
    folder = copy(undisturbed, tmp_path)
    left = small(folder, before=at(ALIGNED, 3, "[os.kill(os.getpid(), signal.SIGTERM) for _ in range(2)]"))
    assert left.code == 143 and "once more to leave at once" in left.err
    assert newest(folder) == "resume-00000002.safetensors"
    assert small(folder).code == 0
    same(folder, undisturbed)


# ---- two runs --------------------------------------------------------------------------------------------------------

def test_a_second_run_in_the_same_folder_is_refused_until_the_first_is_gone(start, small, undisturbed, tmp_path):
    folder = copy(undisturbed, tmp_path)
    first = start(*SMALL, "--run", folder, before=NO_FIGURES + at(ALIGNED, 1, "time.sleep(600)"))
    while not (folder / ALIGNED / "metrics.csv").exists():
        time.sleep(0.01)
    one_sentence(small(folder), folder, f"in use by process {first.pid}", "--run")
    os.kill(first.pid, signal.SIGKILL)
    assert first.wait().code == -signal.SIGKILL and small(folder).code == 0
    same(folder, undisturbed)


# ---- numbers that are not finite, and losses that stand still --------------------------------------------------------

def finite(path):
    return all(tensor.isfinite().all() for tensor in read_tensors(path)[0].values() if tensor.is_floating_point())


@pytest.mark.parametrize("method, folder", [("exo", ALIGNED), ("ppo", "ppo-reward-s0"), ("xpo", "xpo-preferences-s0")])
def test_a_loss_that_blows_up_stops_the_run_before_the_step(small, undisturbed, tmp_path, method, folder):
    place = copy(undisturbed, tmp_path)
    done = small(place, "--method", method, "--align-lr", "1e30", "--ppo-lr", "1e30", "--save-every", 1)
    one_sentence(done, f"{method}, step ", "the loss is", "gradient's norm", "nothing was changed", "learning rate")
    examples = json.loads(done.err[done.err.index("["):])
    assert examples and all(0 <= i < 32 for i in examples)
    rows, saves = read_csv(place / folder / "metrics.csv"), sorted((place / folder).glob("resume-*"))
    assert f"step {len(rows) + 1}" in done.err and saves[-1].name == f"resume-{len(rows):08d}.safetensors"
    assert all(finite(path) for path in saves)


def test_weights_with_a_nan_to_start_from_stop_the_run_at_its_first_step(small, undisturbed, tmp_path):
    gpt = GPT.from_pretrained(undisturbed / "sft")
    gpt.wte.weight.data[7, 0] = float("nan")
    gpt.save_pretrained(tmp_path / "poisoned", 0)
    done = small(tmp_path / "run", "--init", tmp_path / "poisoned")
    one_sentence(done, "sft, step 1: the loss is nan")
    assert not list((tmp_path / "run" / "sft").glob("resume-*"))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_a_step_that_is_refused_changes_neither_weights_nor_optimizer(value, what):
    weight = torch.nn.Parameter(torch.ones(2))
    optimizer = torch.optim.AdamW([weight], lr=0.1)
    bad = weight.sum() * value if what == "loss" else weight.sum() + (weight * 0).sqrt().sum()
    with pytest.raises(UserError):
        descend(optimizer, 0.1, torch.arange(3), 0, lambda part: ({"loss": bad}, 3), "sft, step 1")
    assert torch.equal(weight, torch.ones(2)) and not optimizer.state


@pytest.mark.parametrize("losses, constant", [([0.6931] * 50, True), ([0.69312, 0.69310, 0.69311], True), ([0.6931, 0.6], False),
                                              ([0.6931 - 1e-4 * i for i in range(50)], False)])
def test_a_loss_is_stuck_if_it_has_not_moved(losses, constant):
    assert stuck(losses) == constant


def test_an_alignment_that_learns_nothing_says_so_and_finishes(small, undisturbed, tmp_path):
    done = small(copy(undisturbed, tmp_path), "--method", "dpo", "--feedback", "preferences", "--align-lr", "1e-30",
                 "--align-steps", 50, "--save-every", 100)
    assert done.code == 0 and done.err.count("step 50: warning: the loss has stood at 0.693") == 1


# ---- no memory, no disk ----------------------------------------------------------------------------------------------

@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory. Tried to allocate"), MemoryError(),
                                   RuntimeError("MPS backend out of memory (MPS allocated: 1 GB)")])
def test_out_of_memory_says_which_flag_to_lower(error):
    def loss_sum(part):
        raise error
    with pytest.raises(UserError, match="^exo, step 3: out of memory: lower --micro-batch-size") as told:
        descend(torch.optim.AdamW([torch.ones(1)]), 0.1, torch.arange(2), 0, loss_sum, "exo, step 3")
    assert "\n" not in str(told.value)


def test_an_error_of_another_kind_is_not_taken_for_a_lack_of_memory():
    def loss_sum(part):
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")
    with pytest.raises(RuntimeError, match="shapes"):
        descend(torch.optim.AdamW([torch.ones(1)]), 0.1, torch.arange(2), 0, loss_sum, "exo, step 3")


def test_a_run_without_memory_stops_in_one_sentence_and_goes_on_in_smaller_parts(small, undisturbed, tmp_path):
    folder = copy(undisturbed, tmp_path)
    greedy = "import exo; exo.exo_loss = lambda *arguments: __import__('torch').empty(10 ** 15)"
    one_sentence(small(folder, before=greedy), "exo, step 1: out of memory: lower --micro-batch-size")
    assert small(folder, "--micro-batch-size", 8).code == 0
    ours, theirs = (read_tensors(f / ALIGNED / "step-00006" / "model.safetensors")[0] for f in (folder, undisturbed))
    assert all((ours[name] - theirs[name]).abs().max() <= 1e-5 for name in theirs)          # rounding, nothing else


def disk_full_from(size):
    return f"resource.setrlimit(resource.RLIMIT_FSIZE, ({size}, {size}))"


def test_a_disk_that_fills_up_leaves_the_last_save_and_the_run_goes_on_when_there_is_room(small, undisturbed, tmp_path):
    folder = copy(undisturbed, tmp_path)
    full = small(folder, before=at(ALIGNED, 3, disk_full_from(100_000)))
    one_sentence(full, f"cannot write {folder / ALIGNED}", "bytes are free there", "make room")
    assert newest(folder) == "resume-00000002.safetensors" and finite(folder / ALIGNED / newest(folder))
    assert not list(folder.rglob("*.part")) and small(folder).code == 0
    same(folder, undisturbed)


@pytest.mark.parametrize("size, name", [(50, "config.json"), (1, ".lock")])
def test_a_disk_that_is_full_from_the_start_is_one_sentence(small, tmp_path, size, name):
    done = small(tmp_path / "run", before=f"import resource; {disk_full_from(size)}")
    one_sentence(done, f"cannot write {tmp_path / 'run' / name}: File too large", "bytes are free there")


def test_a_row_of_metrics_that_finds_no_room_is_one_sentence_and_the_torn_row_is_repaired(small, undisturbed, tmp_path):
    full = at("sft", 3, "size = os.path.getsize(log.path) + 5; " + disk_full_from("size"))
    done = small(tmp_path / "run", "--save-every", 100, before=full)
    one_sentence(done, tmp_path / "run" / "sft" / "metrics.csv", "bytes are free there")
    assert small(tmp_path / "run").code == 0
    same(tmp_path / "run", undisturbed)


# ---- saves that are torn ---------------------------------------------------------------------------------------------

def flip(path):
    blob = bytearray(path.read_bytes())
    blob[len(blob) // 2] ^= 4
    path.write_bytes(blob)


@pytest.mark.parametrize("damage", [flip, lambda path: path.write_bytes(b""),
                                    lambda path: path.write_bytes(bytes(path.stat().st_size)),
                                    lambda path: os.truncate(path, path.stat().st_size // 2)],
                         ids=["one bit", "empty", "zeros", "half"])
def test_a_damaged_newest_save_is_named_and_the_run_goes_on_from_the_one_before(small, undisturbed, tmp_path, damage):
    folder = copy(undisturbed, tmp_path)
    before, broken = killed(small, folder)
    damage(broken)
    done = small(folder)
    assert done.code == 0 and f"{broken} is corrupt" in done.err and "the save before it" in done.err
    assert str(before) not in done.err
    same(folder, undisturbed)


# ---- other settings --------------------------------------------------------------------------------------------------

def test_other_settings_are_refused_by_name_where_the_stage_is_not_finished(small, undisturbed, tmp_path):
    folder = copy(undisturbed, tmp_path)
    saves = killed(small, folder)
    for flag, now in (("--align-lr", 0.5), ("--align-batch", 4), ("--checkpoints", 1), ("--eval-prompts", 8)):
        name = flag[2:].replace("-", "_")
        one_sentence(small(folder, flag, now), f"{name} = ", f"(now {now})", ALIGNED, "--run")
    one_sentence(small(folder, "--n-embd", 16), folder / "sft", "n_embd = 32 (now 16)")
    one_sentence(small(folder, "--temperature", 0.5), "temperature = 1.0 (now 0.5)")
    assert all(path.exists() for path in saves) and small(folder, "--save-every", 1).code == 0
    same(folder, undisturbed)                                        # how often it is saved is nobody's business


# ---- other artifacts upstream ----------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def another(small, tmp_path_factory):
    """An unfinished run with another sft."""
    folder = tmp_path_factory.mktemp("another") / "run"
    killed(small, folder, "oracle", 1, "--sft-lr", "1e-3")
    return folder


def test_cached_log_probs_of_another_sft_are_never_used(small, undisturbed, another, tmp_path):
    folder = copy(undisturbed, tmp_path, without=("sft", ALIGNED))
    shutil.copytree(another / "sft", folder / "sft")
    one_sentence(small(folder), folder / "sft", "sft_lr = 0.001 (now 0.002)")
    one_sentence(small(folder, "--sft-lr", "1e-3"), folder / "oracle", "made from another sft")
    shutil.rmtree(folder / "oracle")
    one_sentence(small(folder, "--sft-lr", "1e-3"), folder / "responses", "another sft", "another oracle")
    assert not (folder / ALIGNED).exists()


@pytest.mark.parametrize("file", ["sft/model.safetensors", "responses/responses.safetensors"])
def test_a_file_put_in_place_of_an_artifact_is_noticed_though_it_is_sound(small, undisturbed, another, tmp_path, file):
    folder = copy(undisturbed, tmp_path)
    if file.startswith("sft"):
        shutil.copy(another / file, folder / file)
    else:
        stages.write_tensors(folder / file, read_tensors(folder / file)[0] | {"ref_logp": torch.zeros(32, 8)})
        killed_before = copy(undisturbed, tmp_path / "begun")
        killed(small, killed_before)
        shutil.copy(folder / file, killed_before / file)
        folder = killed_before
    one_sentence(small(folder), f"made from another {file.split('/')[0]}")


# ---- weights that are a program --------------------------------------------------------------------------------------

class Malice:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def test_weights_that_are_a_program_are_refused_and_not_run(small, undisturbed, tmp_path):
    init = tmp_path / "init"
    init.mkdir()
    shutil.copy(undisturbed / "sft" / "config.json", init)
    torch.save({"wte.weight": Malice(tmp_path / "it ran")}, init / "pytorch_model.bin")
    one_sentence(small(tmp_path / "run", "--init", init), init / "pytorch_model.bin")
    assert not (tmp_path / "it ran").exists()


# ---- reviews and batches from which nothing can be learned -----------------------------------------------------------

REVIEWS = [b"", b"\n", b"good", b"\xef\xbb\xbfa film with a mark of three bytes at its start and with enough words",
           b"a film\r\nof lines that end as on Windows\r\nand a blank last line, long enough for a prompt\r\n\r\n"]


def test_empty_short_and_odd_reviews_are_skipped_and_counted(tmp_path, real_data, monkeypatch, capsys):
    monkeypatch.setenv("EXO_CACHE", str(tmp_path / "cache"))
    for split in ("train", "test"):
        for label in ("pos", "neg"):
            (tmp_path / "aclImdb" / split / label).mkdir(parents=True)
            for i, review in enumerate(REVIEWS):
                (tmp_path / "aclImdb" / split / label / f"{i}_7.txt").write_bytes(review)
    cfg, _ = train.parse(
        ["--preset", "imdb-small", "--smoke", "--imdb", str(tmp_path / "aclImdb"), *(
            word for flag in ("sft-reviews", "prompts", "eval-prompts", "limit-prompts", "align-batch", "ppo-batch",
                              "xpo-prompts") for word in (f"--{flag}", "4"))])
    reviews = stages.Run(cfg, torch.device("cpu"), False).reviews
    assert "train: 6 of 10 reviews skipped: not longer than a prompt" in capsys.readouterr().out
    assert [len(reviews[split]) for split in ("train", "test")] == [4, 4]
    assert all(len(ids) > cfg.prompt_tokens for split in reviews.values() for ids in split.ids)


@pytest.fixture
def ends_at_once(gpt):
    """A policy that answers every prompt with the end of the text, and nothing else."""
    gpt.ln_f.weight.data.zero_()
    gpt.ln_f.bias.data = gpt.wte.weight.data[0] * 50
    return gpt


LOSSES = [lambda logp, ref, reward: exo_loss(logp, ref, reward), lambda logp, ref, reward: exo_pref_loss(logp, ref),
          lambda logp, ref, reward: dpo_loss(logp, ref), lambda logp, ref, reward: dpo_reward_loss(logp, ref, reward),
          lambda logp, ref, reward: xpo.xpo_loss(logp, ref, logp[:, 0], alpha=0.0)]


@pytest.mark.parametrize("loss", LOSSES, ids=["exo", "exo-pref", "dpo", "dpo-reward", "online dpo"])
def test_pairs_of_the_same_response_change_no_weight(gpt, loss):
    ids = torch.randint(1, 13, (3, 9), generator=torch.Generator().manual_seed(0)).repeat_interleave(2, 0)      # (6, T)
    mask = torch.zeros_like(ids, dtype=torch.bool)
    mask[:, 4:] = True
    with torch.no_grad():
        ref_logp = sequence_logprob(gpt, ids, mask).view(3, 2) + 1
    before = [p.clone() for p in gpt.parameters()]

    def loss_sum(part):
        return {"loss": 3 * loss(sequence_logprob(gpt, ids, mask).view(3, 2), ref_logp, torch.ones(3, 2))}, 3

    stats = descend(torch.optim.SGD(gpt.parameters(), lr=0.1), 0.1, torch.arange(3), 0, loss_sum, "step 1")
    assert stats["grad_norm"] < 1e-4 and abs(stats["loss"]) < 10
    assert all((p - q).abs().max() < 1e-5 for p, q in zip(gpt.parameters(), before))


def test_ppo_survives_a_policy_that_always_ends_at_once(ends_at_once, gpt):
    ref, critic = ends_at_once, ScalarGPT(gpt, 0)
    stats = ppo.iteration(
        gpt, ref, critic, adamw(gpt, 1e-3), adamw(critic, 1e-3), lambda ids, mask: torch.ones(len(ids)),
        torch.randint(1, 13, (4, 5)), policy_lr=1e-3, critic_lr=1e-3, beta=0.1, max_new_tokens=6, eos_id=0,
        generator=torch.Generator().manual_seed(0))
    assert stats["length"] == 1 and all(torch.tensor(value).isfinite() for value in stats.values())
    assert all(p.isfinite().all() for p in gpt.parameters())


def test_xpo_and_the_reward_survive_a_policy_that_always_ends_at_once(ends_at_once):
    prompts, replay, reward = torch.randint(1, 13, (4, 5)), xpo.Replay(), ScalarGPT(ends_at_once, 0)
    ids = torch.cat([prompts, torch.zeros(4, 7, dtype=torch.long)], dim=1)
    mask = torch.zeros_like(ids, dtype=torch.bool)
    mask[:, 5] = True
    policy = ref = ends_at_once
    with torch.no_grad():
        ref_logp = sequence_logprob(ref, ids, mask)
        sampled = {"ids": ids, "mask": mask, "ref_logp": ref_logp, "reward": reward(ids, mask)}
        xpo.play(policy, ref, reward, lambda scores: scores.argmax(1), prompts, sampled, replay, 7, 1.0, 0, None)
    assert torch.equal(replay.data["ids"][:, 0], replay.data["ids"][:, 1]) and (replay.data["mask"].sum(2) == 1).all()
    logp = sequence_logprob(ends_at_once, ids, mask)
    pairs = torch.stack([logp, logp], dim=1)
    loss = xpo.xpo_loss(pairs, replay.data["ref_logp"], logp)
    loss.backward()
    assert loss.isfinite() and all(p.grad.isfinite().all() for p in ends_at_once.parameters() if p.grad is not None)


def test_responses_that_all_end_at_once_can_be_summed_up():
    ids, mask = torch.zeros(3, 2, 6, dtype=torch.int), torch.zeros(3, 2, 6, dtype=torch.bool)
    mask[..., 2] = True
    zeros = torch.zeros(3, 2)
    row = summary({"ids": ids, "mask": mask, "reward": zeros, "kl": zeros, "k1": zeros}, 0)
    assert row["length"] == 1 and row["ended"] == 1 and row["distinct2"] == 0
