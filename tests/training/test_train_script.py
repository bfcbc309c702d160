"""train_curriculum.py as a user runs it: a whole run, its files, stops, kills and resumes, and its errors."""

import contextlib
import io
import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import train_curriculum
from model import load_checkpoint
from model.data import store
from model.training.checkpoint import load_training_state
from model.training.trainer import Trainer
from tests.conftest import fork

ROOT = Path(__file__).resolve().parents[2]
TINY = [f"--set={setting}" for setting in ("d_model=32", "n_layers=1", "n_heads=2", "ffn_dim=32", "byte_dim=16")]
TINY += [f"--set={setting}" for setting in ("window=8", "reasoning_dim=32", "head_dim=16")]
RUN = ["--preset", "nano", *TINY, "--batch-size", "2", "--seq-len", "64", "--sample-bytes", "0", "--quiet"]

TOML = """
name = "three"
[[stages]]
name = "words"
source = "words.txt"
share = 0.15
plasticity = 0.1
[[stages]]
name = "masal"
source = "masal.txt"
share = 0.25
plasticity = 0.5
seq_len = 48
[[stages]]
name = "long"
source = "long.txt"
share = 0.6
plasticity = 0.99
"""


@pytest.fixture(scope="module")
def curriculum(tmp_path_factory):
    folder = tmp_path_factory.mktemp("texts")
    rng = random.Random(0)
    for name, words in (
        ("words", "apple: a fruit. pear: another. plum: a third."),
        ("masal", "bir varmış bir yokmuş, ağaçlar ışıl ışıl 🌳"),
        ("long", "the history of the world in many volumes, with plates"),
    ):
        documents = [" ".join(rng.choices(words.split(), k=30)) for _ in range(60)]
        (folder / f"{name}.txt").write_text("\n\n".join(documents), encoding="utf-8")
    (folder / "three.toml").write_text(TOML, encoding="utf-8")
    return folder / "three.toml"


@pytest.fixture(scope="module")
def environment(tmp_path_factory):
    cache = str(tmp_path_factory.mktemp("cache"))
    return os.environ | {"OMP_NUM_THREADS": "1", "AGIFORMER_CACHE": cache, "CUDA_VISIBLE_DEVICES": ""}


@pytest.fixture(scope="module")
def script(environment):
    """script(*arguments, stop_at=…, die_at=…, plot=…) → exit code; in this process, which saves starting one.

    `stop_at`: as by a signal in that step. `die_at`: gone after that step, without a save. `plot`: which takes longer
    than many a run, for those whose plot counts.
    """

    def run(*arguments, stop_at: int | None = None, die_at: int | None = None, plot: bool = False) -> int:
        with pytest.MonkeyPatch.context() as patch:
            train_one = Trainer._train_one

            def interrupted(self):
                train_one(self)
                self.stop_requested = self.step == stop_at
                if self.step == die_at:
                    raise KeyboardInterrupt

            patch.setattr(Trainer, "_train_one", interrupted)
            if not plot:
                patch.setattr(Trainer, "plot", lambda self: None)
            patch.setenv("AGIFORMER_CACHE", environment["AGIFORMER_CACHE"])
            patch.setattr(torch.cuda, "is_available", lambda: False)  # as for the runs that are processes of their own
            patch.setattr(sys, "argv", ["train_curriculum.py", *map(str, arguments)])
            return train_curriculum.main()

    return run


@pytest.fixture
def train_here(script, capsys):
    """`train` in this process."""

    def run(*arguments, check=True):
        capsys.readouterr()
        try:
            code = script(*arguments)
        except SystemExit as exit:
            code = exit.code
        written = capsys.readouterr()
        if check:
            assert code == 0, written.err
        return SimpleNamespace(returncode=code, stdout=written.out, stderr=written.err)

    return run


class Forked:
    """script(*arguments) in a fork, which has no torch to import; of subprocess.Popen what is used here."""

    def __init__(self, script, *arguments):
        def work():
            signal.signal(signal.SIGINT, signal.default_int_handler)
            with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
                code = script(*arguments)
            os._exit(code)

        self.pid, self.returncode = fork(work), None

    def poll(self) -> int | None:
        return self.wait(os.WNOHANG)

    def wait(self, how: int = 0) -> int | None:
        if self.returncode is None:
            pid, status = os.waitpid(self.pid, how)
            self.returncode = os.waitstatus_to_exitcode(status) if pid else None
        return self.returncode

    def send_signal(self, number: int) -> None:
        os.kill(self.pid, number)


def command(*arguments) -> list[str]:
    return [sys.executable, str(ROOT / "train_curriculum.py"), *map(str, arguments)]


def as_users_do(environment, *arguments) -> subprocess.Popen:
    # A shell's background jobs are deaf to Ctrl-C, and what they start.
    hears = {"preexec_fn": lambda: signal.signal(signal.SIGINT, signal.default_int_handler)}
    return subprocess.Popen(command(*arguments), env=environment, stdout=subprocess.PIPE, text=True, **hears)


@pytest.fixture
def start(script, environment):
    """start(*arguments) → a process that trains."""
    if torch.cuda.is_available():  # where autograd has threads of its own, which a fork would miss
        return lambda *arguments: as_users_do(environment, *arguments)
    return lambda *arguments: Forked(script, *arguments)


@pytest.fixture(scope="module")
def whole_run(curriculum, script, tmp_path_factory):
    """An unbroken run of 60 steps, and what it printed."""
    out, stdout = tmp_path_factory.mktemp("whole"), io.StringIO()
    with contextlib.redirect_stdout(stdout):
        arguments = [*RUN, "--curriculum", curriculum, "--steps", 60, "--sample-bytes", 20, "--out", out]
        assert script(*arguments, plot=True) == 0
    return out, stdout.getvalue()


def metrics(out: Path) -> dict:
    return json.loads((out / "metrics_curriculum.json").read_text("utf-8"))


def identical(a: Path, b: Path) -> bool:
    """Whether two runs left the same metrics, weights and training state, bit for bit."""
    names = ("last_model_curriculum.safetensors", "best_model_curriculum.safetensors", "metrics_curriculum.json")
    return all((a / name).read_bytes() == (b / name).read_bytes() for name in names)


def test_a_run_leaves_its_files_and_ends_with_bpc_and_a_sample(whole_run):
    out, stdout = whole_run
    expected = {"best_model_curriculum.safetensors", "last_model_curriculum.safetensors"}
    expected |= {"metrics_curriculum.json", "log_curriculum.jsonl", "curriculum.png"}
    assert set(os.listdir(out)) == expected
    for name, bpc in metrics(out)["retention"][-1]["bpc"].items():
        assert re.search(rf"BPC {name}: {bpc:.3f}\b", stdout)
    assert "sample" in stdout
    load_checkpoint(out / "best_model_curriculum.safetensors")
    assert (out / "curriculum.png").read_bytes().startswith(b"\x89PNG")


def test_metrics_hold_stages_curve_and_retention(whole_run):
    data = metrics(whole_run[0])
    assert [(s["name"], s["start"], s["end"], s["plasticity"]) for s in data["stages"]] == [
        ("words", 0, 9, 0.1),
        ("masal", 9, 24, 0.5),
        ("long", 24, 60, 0.99),
    ]
    assert [row["after"] for row in data["retention"]] == ["words", "masal", "long"]
    assert all(set(row["bpc"]) == {"words", "masal", "long"} for row in data["retention"])
    assert data["train"][-1]["step"] == 60
    assert data["train"][-1]["bpc"] < data["train"][0]["bpc"]
    assert data["skipped_steps"] == 0
    assert data["best"]["mean"] == min(sum(e["bpc"].values()) / 3 for e in data["evaluations"])


def test_the_checkpoint_carries_the_last_stage_plasticity(whole_run):
    model = load_checkpoint(whole_run[0] / "last_model_curriculum.safetensors")
    assert model.plasticity.item() == pytest.approx(0.99)


def test_every_line_of_the_log_is_json(whole_run):
    lines = (whole_run[0] / "log_curriculum.jsonl").read_text("utf-8").splitlines()
    events = [json.loads(line)["event"] for line in lines]
    assert {"train", "evaluation", "stage_end"} <= set(events)


def test_another_seed_is_another_run(whole_run, curriculum, script, tmp_path):
    arguments = [*RUN, "--curriculum", curriculum, "--steps", 60, "--out", tmp_path, "--seed", 1]
    assert script(*arguments, stop_at=10) == 0
    seen = metrics(tmp_path)["train"]
    assert [row["step"] for row in seen] == [9, 10]
    for row, other in zip(seen, metrics(whole_run[0])["train"]):
        assert row["step"] == other["step"] and row["bpc"] != other["bpc"]


def await_step(process, out: Path, step: int) -> None:
    log = out / "log_curriculum.jsonl"
    while process.poll() is None and not (log.exists() and f'"step": {step},' in log.read_text()):
        time.sleep(0.002)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_and_a_resumed_run_is_bit_identical(
    whole_run, curriculum, environment, start, train_here, tmp_path, number
):
    """Stopped at an arbitrary step by a signal, resumed without further arguments, to the same bits.

    The one is a process as a user starts it: what it trains is what it would be in this one.
    """
    arguments = [*RUN, "--curriculum", curriculum, "--steps", 60, "--out", tmp_path]
    as_users = number == signal.SIGINT
    process = as_users_do(environment, *arguments) if as_users else start(*arguments)
    await_step(process, tmp_path, 20)
    process.send_signal(number)
    stdout = process.communicate(timeout=60)[0] if as_users else process.wait() and ""
    assert process.returncode == 0
    stopped = load_training_state(tmp_path / "last_model_curriculum.safetensors")[1]["step"]
    assert stopped >= 20
    if as_users and stopped < 60:
        assert f"stopped at step {stopped}" in stdout
    train_here("--resume", "--out", tmp_path, "--quiet", "--sample-bytes", 0)
    assert identical(whole_run[0], tmp_path)


def test_kill_in_the_middle_always_leaves_something_to_resume(whole_run, curriculum, start, train_here, tmp_path):
    """Kill -9 three times, with saves so frequent that a kill falls into one as often as not; the end is the same."""
    arguments = [*RUN, "--curriculum", curriculum, "--steps", 60, "--out", tmp_path, "--save-every", 1, "--resume"]
    last = tmp_path / "last_model_curriculum.safetensors"
    rng = random.Random(1)
    for reached in (10, 20, 40):
        process = start(*arguments)
        await_step(process, tmp_path, reached)
        time.sleep(rng.random() * 0.1)
        assert process.poll() is None, "it ended before it could be killed"
        process.send_signal(signal.SIGKILL)
        process.wait()
        load_checkpoint(last)
        assert reached - 1 <= load_training_state(last)[1]["step"] < 60
    train_here(*arguments)
    a, b = metrics(tmp_path), metrics(whole_run[0])
    assert (a["train"], a["evaluations"], a["retention"]) == (b["train"], b["evaluations"], b["retention"])
    a, b = (load_checkpoint(out / last.name).state_dict() for out in (tmp_path, whole_run[0]))
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_two_workers_share_a_run(script, curriculum, environment, tmp_path):
    """As torchrun has them; but it forks them, where a fork can train, and none has to import torch."""
    arguments = [*RUN, "--curriculum", curriculum, "--steps", 6, "--out", tmp_path / "out"]

    def worker():
        sys.stdout = os.fdopen(1, "w")
        code = script(*arguments)
        sys.stdout.flush()
        return code

    def work():
        from torch.distributed.launcher.api import LaunchConfig, elastic_launch

        signal.alarm(120)
        os.environ |= environment
        for number, name in ((1, "stdout"), (2, "stderr")):
            os.dup2(os.open(tmp_path / name, os.O_WRONLY | os.O_CREAT), number)
        config = LaunchConfig(
            min_nodes=1, max_nodes=1, nproc_per_node=2, max_restarts=0, monitor_interval=0.05, start_method="fork",
            rdzv_backend="c10d", rdzv_endpoint="localhost:0", run_id="test",
        )  # fmt: skip
        if torch.cuda.is_available():
            elastic_launch(config, sys.executable)(*command(*arguments)[1:])
        else:
            assert elastic_launch(config, worker)() == {0: 0, 1: 0}

    code = os.waitstatus_to_exitcode(os.waitpid(fork(work), 0)[1])
    assert code == 0, (tmp_path / "stderr").read_text()
    assert metrics(tmp_path / "out")["run"]["workers"] == 2
    assert metrics(tmp_path / "out")["train"][-1]["step"] == 6
    assert (tmp_path / "stdout").read_text().count("validation BPC") == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--preset", "huge"], "preset='huge': accepted are nano, small, base, large"),
        (["--set", "windw=3"], "--set windw=3: accepted is field=value"),
        (["--set", "window=-3"], "window=-3: accepted is an integer"),
        (["--steps", "0"], "steps=0: accepted is an integer ≥ 1"),
        (["--lr", "-1"], "lr=-1.0: accepted is a number > 0"),
        (["--lr", "nan"], "lr=nan: accepted is a number > 0"),
        (["--amp", "int8"], "amp='int8': accepted is one of auto, bf16, fp16, off"),
        (["--steps", "2"], "steps=2: accepted is at least one for each of 3 stages"),
        (["--seed", "99999999999999999999"], "seed=99999999999999999999: accepted is an integer from 0"),
        (["--set", "plasticity=0.5"], "--set plasticity"),
        (["--stepz", "2"], "unrecognized arguments: --stepz"),
        (["--steps", "many"], "--steps: invalid int value: 'many'"),
        (["--optimizer", "sgd"], "optimizer='sgd': accepted is one of muon, adamw"),
        (["--curriculum", "nowhere"], "nowhere"),
        (["--resume", "missing.safetensors"], "--resume missing.safetensors: no such file"),
        (["--device", "cuda"], "--device cuda: no CUDA device"),
        (["--device", "tpu"], "--device tpu: accepted are auto, cpu, cuda"),
    ],
)
def test_bad_input_gets_one_line(train_here, tmp_path, arguments, message):
    done = train_here("--preset", "nano", "--out", tmp_path / "out", *arguments, check=False)
    assert done.returncode != 0
    assert message in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    assert not (tmp_path / "out").exists()


def test_an_empty_corpus_is_named(train_here, tmp_path):
    (tmp_path / "empty.txt").write_bytes(b"")
    done = train_here("--curriculum", tmp_path / "empty.txt", "--out", tmp_path / "out", check=False)
    assert done.returncode == 2
    assert "empty.txt" in done.stderr
    assert "Traceback" not in done.stderr


def test_resuming_another_run_is_refused(whole_run, train_here):
    out = whole_run[0]
    before = (out / "last_model_curriculum.safetensors").read_bytes()
    for arguments, message in (
        (["--steps", "61"], "--steps 61: the run being resumed has 60"),
        (["--set", "window=9"], "differs from the model being resumed"),
    ):
        done = train_here("--resume", "--out", out, *arguments, check=False)
        assert done.returncode == 2
        assert message in done.stderr
    assert (out / "last_model_curriculum.safetensors").read_bytes() == before


def test_weights_alone_cannot_be_resumed(whole_run, train_here):
    best = whole_run[0] / "best_model_curriculum.safetensors"
    done = train_here("--resume", best, "--out", whole_run[0], check=False)
    assert done.returncode == 2
    assert "weights without training state" in done.stderr


def test_changed_data_is_noticed(curriculum, train_here, tmp_path):
    folder = tmp_path / "texts"
    folder.mkdir()
    for path in curriculum.parent.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    arguments = [*RUN, "--curriculum", folder / "three.toml", "--steps", 6, "--out", tmp_path / "out"]
    train_here(*arguments)
    with open(folder / "masal.txt", "a", encoding="utf-8") as file:
        file.write("\n\nbir varmış")
    done = train_here(*arguments, "--resume", check=False)
    assert done.returncode == 2
    assert "the data of stage 'masal' has changed" in done.stderr


def test_a_new_run_moves_the_old_one_aside(whole_run, curriculum, train_here, tmp_path):
    arguments = [*RUN, "--curriculum", curriculum, "--out", tmp_path]
    train_here(*arguments, "--steps", 6)
    before = (tmp_path / "last_model_curriculum.safetensors").read_bytes()
    done = train_here(*arguments, "--steps", 3)
    assert "moved to" in done.stderr
    assert (tmp_path / "previous-1" / "last_model_curriculum.safetensors").read_bytes() == before
    assert metrics(tmp_path)["train"][-1]["step"] == 3
    assert metrics(tmp_path / "previous-1")["train"][-1]["step"] == 6


def test_a_finished_run_resumed_elsewhere_is_whole_there(whole_run, train_here, tmp_path):
    last = whole_run[0] / "last_model_curriculum.safetensors"
    done = train_here("--resume", last, "--out", tmp_path / "new", "--quiet", "--sample-bytes", 5)
    assert "sample" in done.stdout
    assert identical(whole_run[0], tmp_path / "new")
    assert "BPC long" in done.stdout


def test_resuming_into_an_occupied_folder_moves_what_is_there_aside(whole_run, curriculum, train_here, tmp_path):
    train_here(*RUN, "--curriculum", curriculum, "--steps", 3, "--out", tmp_path)
    before = (tmp_path / "last_model_curriculum.safetensors").read_bytes()
    last = whole_run[0] / "last_model_curriculum.safetensors"
    train_here("--resume", last, "--out", tmp_path, "--quiet", "--sample-bytes", 0)
    assert identical(whole_run[0], tmp_path)
    assert (tmp_path / "previous-1" / "last_model_curriculum.safetensors").read_bytes() == before


def test_a_missing_best_model_is_not_spoken_of(whole_run, train_here, tmp_path):
    """Only the last model was copied here: the metrics must not name a best one that is not there."""
    last = tmp_path / "last_model_curriculum.safetensors"
    last.write_bytes((whole_run[0] / last.name).read_bytes())
    done = train_here("--resume", "--out", tmp_path, "--quiet", "--sample-bytes", 0)
    assert metrics(tmp_path)["best"] is None
    assert "no best model" in done.stdout


def test_a_built_in_name_wins_over_a_folder_of_that_name(train_here, tmp_path, monkeypatch):
    (tmp_path / "local").mkdir()
    (tmp_path / "local" / "a.txt").write_text("some text " * 50)
    monkeypatch.chdir(tmp_path)
    done = train_here(*RUN, "--curriculum", "local", "--steps", 3, check=False)
    assert done.returncode == 2
    assert "corpora" in done.stderr


def test_a_diverged_run_says_so(curriculum, train_here, tmp_path):
    """Weights at 1e30: no traceback, files that are still JSON, no best model, and every skipped step counted."""
    done = train_here(*RUN, "--curriculum", curriculum, "--steps", 12, "--out", tmp_path, "--lr", 1e30, check=False)
    assert done.returncode == 0
    assert "has diverged" in done.stdout
    assert "Traceback" not in done.stderr

    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    data = json.loads((tmp_path / "metrics_curriculum.json").read_text(), parse_constant=refuse)
    assert data["skipped_steps"] > 0
    assert data["retention"][-1]["bpc"]["long"] is None
    for line in (tmp_path / "log_curriculum.jsonl").read_text().splitlines():
        json.loads(line, parse_constant=refuse)


def test_no_reading_of_the_loss_spans_two_stages(whole_run):
    """Stages end at 9 and 24: rows at the ends and at multiples of ten, each with the stage its losses came from."""
    rows = [(row["step"], row["stage"]) for row in metrics(whole_run[0])["train"]]
    assert rows[:5] == [(9, "words"), (10, "masal"), (20, "masal"), (24, "masal"), (30, "long")]


def test_ctrl_c_before_the_first_step(script, tmp_path):
    """While it encodes the first text."""
    heard, say = os.pipe()
    documents = store.iter_documents

    def slow(spec):
        for document in documents(spec):
            os.write(say, b"x")
            time.sleep(60)
            yield document

    def work():
        signal.signal(signal.SIGINT, signal.default_int_handler)
        store.iter_documents = slow
        sys.stderr = open(tmp_path / "stderr", "w")  # noqa: SIM115 (until the process ends)
        code = script("--preset", "nano", "--curriculum", text, "--out", tmp_path / "out")
        sys.stderr.close()
        os._exit(code)

    text = tmp_path / "text.txt"
    text.write_text("none has encoded this\n\n" * 20)
    child = fork(work)
    os.close(say)
    assert os.read(heard, 1) == b"x"
    os.close(heard)
    os.kill(child, signal.SIGINT)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 130
    assert "Traceback" not in (tmp_path / "stderr").read_text()
