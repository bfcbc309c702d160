"""Runs with GENESIS through train_curriculum.py: exact resumes, two workers, the boom, and refused options."""

import json
import math
import os
import runpy
import signal
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import matplotlib.axes
import numpy as np
import pytest
import torch

from model import load_checkpoint
from model.genesis.learning_curve import LearningCurveOptions
from model.training import genesis
from model.training.checkpoint import load_training_state
from model.training.genesis import Genesis
from model.training.options import TrainingOptions
from model.training.step import TrainingStep
from model.training.trainer import Trainer
from tests.conftest import fork
from tests.training.conftest import SURPRISES
from tests.training.test_train_script import RUN, curriculum, environment, identical, metrics, script  # noqa: F401

ROOT = Path(__file__).resolve().parents[2]
LAST = "last_model_curriculum.safetensors"
ALL = ["--genesis", "all", "--replay-rows", "1", "--replay-size", "50", "--save-every", "7", "--eval-every", "30"]
RECOMPUTED = [*ALL, "--replay-depth", "1", "--grow", "12:petals,31:blocks"]
STORED = [*ALL, "--replay", "stored", "--replay-depth", "1", "--grow", "27:widen=48", "--amp", "bf16"]
MIXED = [*ALL, "--replay-mixed", "--amplifier", "rate", "--learning-curve", "off", "--grow-left", "thawed"]
STEPS = 36
KINDS = {"recomputed": RECOMPUTED, "stored": STORED, "mixed": MIXED}


@pytest.fixture(scope="module")
def stages(curriculum):  # noqa: F811
    """As `curriculum`, of 36 steps: the last stage, before which the boom has come, is short. The learning curve waits
    as long as in a run of 60."""
    text = curriculum.read_text("utf-8")
    for before, steps in (("0.6", 12), ("0.25", 15), ("0.15", 9)):
        text = text.replace(f"share = {before}", f"share = {steps / STEPS!r}")
    file = curriculum.with_name("genesis.toml")
    file.write_text(text, encoding="utf-8")
    curve = genesis._curve_options
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(genesis, "_curve_options", lambda steps: curve(60))
        yield file


@pytest.fixture(scope="module")
def whole(script, stages, tmp_path_factory):  # noqa: F811
    """whole(kind) → of an unbroken run its folder, the batches' shapes, the plot's texts, and whether its steps know
    the policy; each made once."""
    made = {}

    def make(kind: str):
        if kind not in made:
            out = tmp_path_factory.mktemp(kind)
            address = torch.tensor([list(b"or write to ayse@example.com, she said")], dtype=torch.uint8)
            shapes, texts, guarded = [], [], set()
            with pytest.MonkeyPatch.context() as patch:
                step, text = TrainingStep.run, matplotlib.axes.Axes.text

                def run(self, x, weights=None):
                    shapes.append(tuple(x.shape))
                    guarded.add(bool(self.genesis.blocked(address).any()))
                    return step(self, x, weights)

                patch.setattr(TrainingStep, "run", run)
                patch.setattr(
                    matplotlib.axes.Axes,
                    "text",
                    lambda self, x, y, s, *a, **k: texts.append((x, s)) or text(self, x, y, s, *a, **k),
                )
                arguments = [*RUN, "--curriculum", stages, "--steps", STEPS, *KINDS[kind], "--out", out]
                assert script(*arguments, plot=kind != "stored") == 0
            made[kind] = SimpleNamespace(out=out, shapes=shapes, texts=texts, guarded=guarded)
        return made[kind]

    return make


def tensors(out: Path) -> dict[str, torch.Tensor]:
    return load_training_state(out / LAST)[0]


# ── resumes ──────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_with_everything_on_resumes_exactly(kind, whole, script, stages, tmp_path):  # noqa: F811
    """Stopped where a stage ends, before the boom and at it, and killed between two saves; to the same bits."""
    arguments = [*RUN, "--curriculum", stages, "--steps", STEPS, *KINDS[kind], "--out", tmp_path]
    on = ["--resume", "--out", tmp_path, "--quiet", "--sample-bytes", 0]
    assert script(*arguments, stop_at=9) == 0
    stops = ((15, 0), (24, 0), (33, 130))  # at 33 it is killed, what is saved is older
    for stop, expected in stops[1:] if kind == "mixed" else stops:
        assert script(*on, **{"stop_at" if expected == 0 else "die_at": stop}) == expected
        assert load_training_state(tmp_path / LAST)[1]["step"] == {33: 28}.get(stop, stop)
    assert script(*on) == 0
    assert identical(tmp_path, whole(kind).out)
    assert whole(kind).guarded == {True}  # targets that the gate blocks are known in every step, after growth too


def test_what_a_run_saves_of_genesis(whole):
    out = whole("stored").out
    state = tensors(out)
    assert state["genesis.stage"] == 2 and state["genesis.consolidates"] == 1
    # Stages of 9 and 15 steps; two sequences a step, 25 of each stage remembered.
    assert [int(state[f"worker.0.genesis.memory.rings.{i}.written"]) for i in range(2)] == [18, 30]
    assert state["worker.0.genesis.memory.rings.1.hidden"].shape == (26, 12, 48)
    assert state["genesis.importance"].any() and state["genesis.curve.steps"] == STEPS
    for name, tensor in state.items():
        assert not tensor.is_floating_point() or tensor.isfinite().all(), name
    model = load_checkpoint(out / LAST)
    assert model.config.anchors and model.anchors.any()
    rows = metrics(out)["genesis"]
    assert rows[-1]["remembered"] == [18, 25] and rows[-1]["flagged_units"] > 0
    assert sum(rows[-1]["loss_weights"]) == pytest.approx(2)
    events = [json.loads(line) for line in (out / "log_curriculum.jsonl").read_text().splitlines()]
    assert [e["step"] for e in events if e["event"] == "genesis"] == [row["step"] for row in rows]


# ── off, and on with nothing to do ───────────────────────────────────────────────────────────────────────────────────


def test_off_makes_no_genesis_and_on_begins_as_off(script, curriculum, tmp_path, monkeypatch):  # noqa: F811
    """To the end of the first stage, of a batch whose size does not divide exactly, weights are the same bits."""
    arguments = [*RUN, "--curriculum", curriculum, "--steps", 60, "--batch-size", "3", "--set", "patch_size=3"]
    assert script(*arguments, "--seq-len", "51", "--out", tmp_path / "on", stop_at=9) == 0

    def refuse(*_, **__):
        raise AssertionError("--genesis off has no mechanisms")

    monkeypatch.setattr(Genesis, "__init__", refuse)
    assert script(*arguments, "--seq-len", "51", "--genesis", "off", "--out", tmp_path / "off", stop_at=9) == 0
    on, off = tensors(tmp_path / "on"), tensors(tmp_path / "off")
    assert any(name.startswith("worker.0.genesis.memory") for name in on)
    assert not any("genesis" in name for name in off)
    assert all(torch.equal(on[name], tensor) for name, tensor in off.items() if name != "worker.0.losses")
    torch.testing.assert_close(on["worker.0.losses"], off["worker.0.losses"], rtol=1e-6, atol=0)
    models = [load_checkpoint(tmp_path / name / LAST) for name in ("on", "off")]
    assert not models[0].config.anchors
    for (name, a), b in zip(models[0].state_dict().items(), models[1].state_dict().values()):
        assert torch.equal(a, b), name
    assert metrics(tmp_path / "off")["genesis"] == []


def test_a_mechanism_alone_is_switched_on_by_itself():
    for name, value, attribute, expected in (
        ("replay", "stored", "replay", "stored"),
        ("amplifier", "anchor", "amplifier", "anchor"),
        ("persistence", "on", "persistence", 0.5),
        ("learning_curve", "on", "learning_curve", True),
        ("balance", "on", "balance", True),
    ):
        chosen = TrainingOptions.build("nano", "pydoc", **{name: value}).genesis_options
        default = TrainingOptions.build("nano", "pydoc").genesis_options
        assert getattr(chosen, attribute) == expected != getattr(default, attribute)
        for other in ("replay", "amplifier", "persistence", "learning_curve", "balance"):
            assert other == attribute or getattr(chosen, other) == getattr(default, other)
        off = TrainingOptions.build("nano", "pydoc", genesis="all", **{name: "off"}).genesis_options
        assert getattr(off, attribute) in ("off", 0.0, False)
    assert not TrainingOptions.build("nano", "pydoc", genesis="off").genesis_options.any
    chosen = TrainingOptions.build("nano", "pydoc", batch_size=64).genesis_options
    assert (chosen.replay_rows, chosen.replay_weight) == (4, 4 / 64)


# ── the learning curve ───────────────────────────────────────────────────────────────────────────────────────────────


def test_the_boom_is_found_noted_and_plotted_and_lengthens_the_sequences(whole):
    run = whole("recomputed")
    out, shapes, texts = run.out, run.shapes, run.texts
    boom = metrics(out)["boom"]
    state = tensors(out)
    assert boom["step"] == int(state["genesis.curve.boom_step"]) and 0 < boom["step"] < STEPS
    assert state["genesis.curve.boomed"]
    found = -(-boom["step"] // 10) * 10  # the loss is read every ten steps, and where a stage ends
    found = min(found, *(end for end in (9, 24, STEPS) if end >= boom["step"]))
    full = [(2, 64)] * 9 + [(2, 48)] * 15 + [(2, 64)] * 12
    short = [(8, length // 4) for _, length in full]
    assert 9 < found < 24  # inside a stage: what changes is not the stage
    assert shapes == short[:found] + full[found:]
    assert (boom["step"], " boom") in texts
    events = [json.loads(line) for line in (out / "log_curriculum.jsonl").read_text().splitlines()]
    assert [{k: e[k] for k in ("step", "novelty")} for e in events if e["event"] == "boom"] == [boom]
    rates = [row["rate_factor"] for row in metrics(out)["genesis"]]
    assert rates[0] == 0.5 and rates[-1] == 1.5 and rates == sorted(rates)


def test_without_a_curve_there_is_no_boom(whole):
    run = whole("mixed")
    assert metrics(run.out)["boom"] is None and not any("boom" in text for _, text in run.texts)
    assert run.shapes == [(2, 64)] * 9 + [(2, 48)] * 15 + [(2, 64)] * 12


@pytest.mark.parametrize("crops", ["any", "document"])
@pytest.mark.parametrize("seq_len", [2, 3, 7, 13, 48, 52, 100, 1000, 1024])
def test_before_the_boom_rows_are_short_whole_patches_of_the_first_quarter(seq_len, crops):
    """As many bytes a step at the least, and enough rows that every sequence is remembered."""
    region = np.arange(20_000, dtype=np.int64).astype(np.uint8)
    offsets = np.arange(0, 20_001, 500)
    full = SimpleNamespace(seq_len=seq_len, batch_size=3, crops=crops)
    trainer = SimpleNamespace(
        samplers=[full],
        stores=[SimpleNamespace(train=region, offsets=offsets)],
        genesis=SimpleNamespace(curve=SimpleNamespace(options=LearningCurveOptions())),
        model=SimpleNamespace(config=SimpleNamespace(patch_size=4)),
        options=SimpleNamespace(seed=0),
        workers=SimpleNamespace(rank=0, size=1),
    )
    (slow,) = Trainer._slow_start_samplers(trainer)
    assert slow.seq_len % 4 == 0 or slow.seq_len == seq_len
    assert seq_len / 4 <= slow.seq_len <= seq_len / 4 + 4
    assert slow.batch_size * slow.seq_len >= 3 * seq_len
    assert slow.batch_size // math.ceil(seq_len / slow.seq_len) >= 3
    assert slow.n_bytes == 5000
    assert slow.next().shape == (slow.batch_size, slow.seq_len)


# ── several workers ──────────────────────────────────────────────────────────────────────────────────────────────────

DRIVER = """
import os, sys
sys.path.insert(0, {root!r})
import torch
torch.set_num_threads(1)
import model.training.run as run
from model.genesis.surprise import RecurringSurprises
from model.training.distributed import Workers
from model.training.trainer import Trainer
import train_curriculum

RecurringSurprises.__init__.__defaults__ = ({slots}, None)
child = os.fork()  # what is imported by now need not be imported twice
os.environ |= {{"RANK": str(int(child > 0)), "LOCAL_RANK": "0"}}
workers, device = run.join_workers("cpu")
leave, Workers.leave, Trainer.plot = Workers.leave, lambda self: None, lambda self: None
run.join_workers = lambda name: (workers, device)
train_one, save = Trainer._train_one, Trainer._save

def agreed(self):
    for name, tensor in self.genesis.shared_state().items():
        for part in workers.gather(tensor, device):
            assert torch.equal(part, tensor), name
    save(self)

def go(*arguments, stop_at=None, die_at=None):
    def interrupted(self):
        train_one(self)
        self.stop_requested = self.step == stop_at and workers.is_main
        if self.step == die_at:
            raise KeyboardInterrupt
    Trainer._train_one, Trainer._save = interrupted, agreed
    sys.argv = ["train_curriculum.py", *arguments]
    return train_curriculum.main()

*arguments, whole, broken = sys.argv[1:]
on = ["--resume", "--quiet", "--sample-bytes", "0", "--out", broken]
assert go(*arguments, "--out", whole) == 0
assert go(*arguments, "--out", broken, stop_at=10) == 0
assert go(*on, die_at=15) == 130
assert go(*on) == 0
leave(workers)
assert not child or os.waitpid(child, 0)[1] == 0
"""


def test_two_workers_remember_apart_and_resume_exactly(curriculum, environment, tmp_path):  # noqa: F811
    """Stopped where one worker is asked to, and killed; whatever is common stays so, bit for bit."""
    driver, said, whole, broken = (tmp_path / name for name in ("driver.py", "stderr", "whole", "broken"))
    driver.write_text(DRIVER.format(root=str(ROOT), slots=SURPRISES))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    arguments = [*RUN, "--curriculum", curriculum, "--steps", "16", *ALL, "--sample-bytes", "0", whole, broken]
    surroundings = environment | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": "2"}

    def work():
        signal.alarm(120)
        os.environ |= surroundings
        for number in (1, 2):
            os.dup2(os.open(said, os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
        sys.argv, sys.stdout, sys.stderr = [str(driver), *map(str, arguments)], os.fdopen(1, "w"), os.fdopen(2, "w")
        runpy.run_path(str(driver), run_name="__main__")

    if torch.cuda.is_available():  # where autograd has threads of its own, which a fork would miss
        with open(said, "w") as log:
            done = subprocess.run([sys.executable, driver, *arguments], env=surroundings, stderr=log, timeout=120)
        code = done.returncode
    else:
        code = os.waitstatus_to_exitcode(os.waitpid(fork(work), 0)[1])
    assert code == 0, said.read_text()[-3000:]
    assert identical(whole, broken)
    state = tensors(whole)
    memories = [
        {name: x for name, x in state.items() if name.startswith(f"worker.{rank}.genesis.memory")} for rank in (0, 1)
    ]
    assert memories[0] and len(memories[0]) == len(memories[1])
    for i in range(2):
        targets = [memories[rank][f"worker.{rank}.genesis.memory.rings.{i}.target"] for rank in (0, 1)]
        assert targets[0].any() and targets[1].any() and not torch.equal(*targets)
    assert not any(name.startswith("worker.2.") for name in state)


# ── refused options ──────────────────────────────────────────────────────────────────────────────────────────────────

REFUSED = [
    (["--genesis", "maybe"], "genesis='maybe': accepted is one of off, on, all"),
    (["--replay", "yes"], "replay='yes': accepted is one of auto, off, recomputed, stored"),
    (["--replay-rows", "0"], "replay_rows=0: accepted is an integer ≥ 1"),
    (["--replay-size", "0"], "replay_size=0: accepted is an integer ≥ 1"),
    (["--replay-weight", "-1"], "replay_weight=-1.0: accepted is a number ≥ 0"),
    (["--replay-weight", "nan"], "replay_weight=nan: accepted is a number ≥ 0"),
    (["--replay-depth", "-1"], "replay_depth=-1: accepted is an integer ≥ 0"),
    (["--replay-depth", "9"], "replay_depth=9: accepted is from 0 to 1, the model's blocks"),
    (["--set", "thinking_reads=true", "--replay-depth", "1"], "replay_depth=1: accepted with thinking_reads, of the"),
    (["--amplifier", "loud"], "amplifier='loud': accepted is one of auto, off, anchor, rate, both, surprise, all"),
    (["--persistence", "1"], "persistence='1': accepted is one of auto, off, on"),
    (["--persistence-strength", "inf"], "persistence_strength=inf: accepted is a number ≥ 0"),
    (["--learning-curve", "steep"], "learning_curve='steep': accepted is one of auto, off, on"),
    (["--balance", "both"], "balance='both': accepted is one of auto, off, on"),
    (["--balance", "on", "--replay", "off"], "balance='on': accepted with replay='off' are auto, off"),
    (["--genesis", "off", "--replay", "stored"], "replay='stored': accepted with genesis='off' are auto, off"),
    (["--genesis", "off", "--balance", "on"], "balance='on': accepted with genesis='off' are auto, off"),
    (["--replay", "stored", "--seq-len", "63"], "seq_len=48: accepted with replay='stored' is a multiple of"),
]


@pytest.mark.parametrize("given, message", REFUSED)
def test_a_bad_option_gets_one_line(given, message, script, curriculum, tmp_path, capsys):  # noqa: F811
    out = tmp_path / "out"
    if "seq_len=48" in message:  # a whole number of patches of 4, not of 5
        given = [*given, "--set", "patch_size=5"]
    assert script(*RUN, "--curriculum", curriculum, "--steps", 60, *given, "--out", out) == 2
    error = capsys.readouterr().err.strip()
    assert message in error and len(error.splitlines()) == 1
    assert not out.exists()


@pytest.mark.parametrize("given", [["--replay-rows", "many"], ["--replay-weight", "heavy"], ["--replay-mixed", "yes"]])
def test_a_value_of_another_type_gets_one_line(given, script, curriculum, tmp_path, capsys):  # noqa: F811
    with pytest.raises(SystemExit) as stopped:
        script(*RUN, "--curriculum", curriculum, *given, "--out", tmp_path / "out")
    error = capsys.readouterr().err.strip()
    assert stopped.value.code == 2 and len(error.splitlines()) == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("given", [["--replay", "stored"], ["--replay-rows", "2"], ["--genesis", "off"]])
def test_a_resumed_run_keeps_its_mechanisms(given, whole, script, capsys):  # noqa: F811
    out = whole("mixed").out
    before = (out / LAST).read_bytes()
    assert script("--resume", "--out", out, *given) == 2
    error = capsys.readouterr().err.strip()
    assert f"{given[0]} {given[1]}: the run being resumed has" in error and len(error.splitlines()) == 1
    assert (out / LAST).read_bytes() == before
    assert os.listdir(out)
