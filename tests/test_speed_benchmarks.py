"""The benchmarks of speed: that their tables say what was timed, counted and attributed, and go on when a row fails."""

import gc
import json
import re
import weakref
from contextlib import redirect_stderr, redirect_stdout
from io import StringIO
from itertools import cycle
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import generate, machine, memory_op, scaling, train
from model import AGIFormer, AGIFormerConfig
from model.inference import write
from model.inference.stream import ByteStream
from model.layers import attention, byte_memory, memory
from model.training.optimizer import MuonAdamW
from model.training.step import TrainingStep

CPU = torch.device("cpu")
PROGRAMS = {"train": train, "memory_op": memory_op, "generate": generate, "scaling": scaling}
TEXT = "Elma ağacı çiçek açtı 🌳 and the quick fox — naïve, ılık — ran.\n".encode() * 40 + bytes(range(256)) * 8
DOCUMENT = Path(__file__).parents[1] / "docs" / "performance.md"


def command(name: str, *arguments) -> tuple[int, str, str]:
    """Exit code, stdout and stderr."""
    out, err = StringIO(), StringIO()
    with redirect_stdout(out), redirect_stderr(err):
        try:
            code = PROGRAMS[name].main([str(argument) for argument in arguments])
        except SystemExit as stop:
            code = stop.code
    return code, out.getvalue(), err.getvalue()


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """A quick run of each on the CPU: what it printed, and its JSON."""
    folder = tmp_path_factory.mktemp("speed")
    (folder / "text.txt").write_bytes(TEXT)
    own = {
        "train": ["--what", "plain,petals", "--profile", "--corpus", folder / "text.txt", "--batch-size", 2],
        "memory_op": ["--forms", "recurrent,chunked,fla,attention"],
        "generate": ["--batch-size", 2],
        "scaling": [],
    }
    found = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AGIFORMER_CACHE", str(folder / "cache"))
        patch.setattr(memory_op, "import_module", missing)
        for name, arguments in own.items():
            file = folder / f"{name}.json"
            code, out, err = command(name, "--quick", "--device", "cpu", "--json", file, *arguments)
            assert code == 0, err
            found[name] = out, json.loads(file.read_text("utf-8"))
    return found


def missing(name):
    raise ModuleNotFoundError(f"No module named {name!r}", name="fla")


def cells(out: str) -> list[dict[str, str]]:
    """The rows of the first table, by title."""
    lines = out.split("\n\n")[1].split("\n")
    titles = [title.strip() for title in re.split(r"\s{2,}", lines[0].strip())]
    rows = []
    for line in lines[1:]:
        parts = re.split(r"\s{2,}", line.strip(), maxsplit=len(titles))
        rows.append(dict(zip(titles, parts)) | {"told": parts[len(titles)] if len(parts) > len(titles) else ""})
    return rows


# ── what the table says is what the file says ────────────────────────────────────────────────────────────────────

NUMBERS = {
    "train": {
        "batch": lambda r: r["batch_size"],
        "ms/step": lambda r: 1000 * float(np.median(r["step_seconds"])),
        "MB/s": lambda r: 2 * 64 / float(np.median(r["step_seconds"])) / 1e6,
        "with data MB/s": lambda r: 2 * 64 / float(np.median(r["run_seconds"])) / 1e6,
    },
    "memory_op": {
        "forward ms": lambda r: 1000 * float(np.median(r["forward_seconds"])),
        "with backward ms": lambda r: 1000 * float(np.median(r["both_seconds"])),
        "error out": lambda r: r["errors"]["out"],
        "worst": lambda r: max(r["errors"].values()),
    },
    "generate": {
        "rows": lambda r: r["batch_size"],
        "context": lambda r: r["context"],
        "bytes/s": lambda r: r["batch_size"] * 8 / float(np.median(r["seconds"])),
        "reading bytes/s": lambda r: r["batch_size"] * r["context"] / r["reading_seconds"],
        "patch step ms": lambda r: r["patch_step_ms"][1],
        "byte step ms": lambda r: r["byte_step_ms"][1],
        "state kB/row": lambda r: r["state_bytes"] / 1000,
    },
    "scaling": {
        "bytes a row": lambda r: r["seq_len"],
        "rows": lambda r: 128 // r["seq_len"],
        "ms/step": lambda r: 1000 * float(np.median(r["step_seconds"])),
        "ns/byte": lambda r: 1e9 * float(np.median(r["step_seconds"])) / 128,
        "MB/s": lambda r: 128 / float(np.median(r["step_seconds"])) / 1e6,
    },
}


@pytest.mark.parametrize("name", PROGRAMS)
def test_table_and_json_hold_the_same_numbers_and_the_machine(name, results):
    out, found = results[name]
    rows = cells(out)
    assert len(rows) == len(found["rows"]) > 0
    compared = 0
    for shown, row in zip(rows, found["rows"]):
        for title, expected in NUMBERS[name].items():
            if shown[title] != "-":
                tolerance = 0.06 if title in ("error out", "worst") else 6e-4  # of two digits, and of four
                assert float(shown[title]) == pytest.approx(expected(row), rel=tolerance), title
                compared += 1
        assert shown["told"] == row.get("note", row.get("error", ""))
    assert compared >= 2 * len(NUMBERS[name])
    first = out.split("\n")[0]
    about = found["machine"]
    assert about["torch"] == torch.__version__ and f"torch {torch.__version__}" in first
    assert about["device"] in first and f"{about['threads']} threads" in first and about["threads"] == 1
    assert found["settings"]["quick"] is True and found["settings"]["repeats"] == 3
    assert all(note in out for note in found["notes"]) and found["notes"]


@pytest.mark.parametrize("name", PROGRAMS)
def test_every_column_is_explained(name):
    text = DOCUMENT.read_text("utf-8")
    section = text.split(f"## `benchmarks/{name}.py`")[1].split("\n## ")[0]
    explained = {
        cell.strip(" `")
        for line in section.split("\n")
        if line.startswith("| ")
        for cell in line[1:].split("|")[0].split(", ")
    }
    assert {title.strip() for title in PROGRAMS[name].COLUMNS} <= explained


# ── times ────────────────────────────────────────────────────────────────────────────────────────────────────────


class Clock:
    """A clock that only moves when it is told to."""

    def __init__(self, monkeypatch):
        self.time = 0.0
        monkeypatch.setattr(machine, "now", lambda: self.time)

    def moving(self, function, durations):
        """`function`, each call of which takes the next of the durations."""

        def run(*args, **kwargs):
            self.time += next(durations)
            return function(*args, **kwargs)

        return run


def test_times_are_of_the_repeats_alone(monkeypatch):
    clock = Clock(monkeypatch)
    run = clock.moving(lambda: None, iter([100.0, 50.0, 3.0, 1.0, 2.0]))
    assert machine.seconds(run, 3, warm_up=2) == [3, 1, 2]
    assert machine.quartiles([3, 1, 2, 10]) == pytest.approx(tuple(np.percentile([3, 1, 2, 10], [25, 50, 75])))
    assert machine.quartiles([7.0]) == (7, 7, 7)
    assert machine.speeds(12, [3, 1, 2]) == (12 / 2.5, 6, 12 / 1.5)


def test_times_on_cuda_are_those_between_events(monkeypatch):
    stream = []

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            self.at = sum(stream)

        def elapsed_time(self, other):
            assert waited  # before that the events have not come
            return other.at - self.at

    waited = []
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda *_: waited.append(True))
    durations = iter([9.0, 1.0, 4.0, 2.0])
    times = machine.seconds(lambda: stream.append(next(durations)), 3, warm_up=1, device=torch.device("cuda"))
    assert times == pytest.approx([0.001, 0.004, 0.002])


def test_training_is_as_fast_as_its_clock_says(monkeypatch, tmp_path):
    """Steps before those that are timed, and those of the whole run, take other times."""
    clock, steps = Clock(monkeypatch), []

    def run(self, batch, weights=None):
        steps.append(batch.shape)
        # Three to reach the last stage, one that warms up; three that count; again one and three of the run.
        clock.time += [100, 10, 10, 50, 1, 4, 2, 50, 8, 8, 16][len(steps) - 1]
        return real(self, batch, weights)

    real = TrainingStep.run
    monkeypatch.setattr(TrainingStep, "run", run)
    file = tmp_path / "train.json"
    code, _, err = command("train", "--quick", "--device", "cpu", "--batch-size", 2, "--json", file, "--peak", 1e-9)
    assert code == 0, err
    (row,) = json.loads(file.read_text())["rows"]
    assert row["step_seconds"] == [1, 4, 2] and row["step_ms"] == 2000
    assert row["bytes_per_second"] == [2 * 64 / 3, 2 * 64 / 2, 2 * 64 / 1.5]
    assert row["run_bytes_per_second"][1] == 2 * 64 / 8
    assert row["first_step_seconds"] == 100 and "graph_seconds" not in row
    assert row["share_of_floor"] == pytest.approx(64 * row["flop_per_byte"] / 1e3)  # 1e-9 TFLOP/s


def test_patch_steps_and_byte_steps_are_told_apart(monkeypatch):
    clock, real = Clock(monkeypatch), ByteStream.feed
    config = AGIFormerConfig.preset("nano").with_settings(machine.TINY)
    stream = ByteStream(AGIFormer(config).eval()).feed(torch.zeros(1, 6, dtype=torch.uint8))  # inside a patch

    def feed(self, x):
        clock.time += 10 if (self.position + 1) % 4 == 0 else 1
        return real(self, x)

    monkeypatch.setattr(ByteStream, "feed", feed)
    assert generate.steps(stream, 3) == {"patch_step_ms": [10_000] * 3, "byte_step_ms": [1000] * 3}
    assert stream.position == 6 + 4 * 3


def test_writing_is_compared_with_that_after_the_first_context(monkeypatch, tmp_path):
    clock, real = Clock(monkeypatch), generate.sample
    # One repeat that warms up and three that count, of two bytes; after the longer context half as fast.
    durations = iter([9, 9, *[0.25] * 6, 9, 9, *[0.75] * 6])
    monkeypatch.setattr(generate, "sample", clock.moving(real, durations))
    monkeypatch.setattr(ByteStream, "feed", clock.moving(ByteStream.feed, cycle([0.25])))
    file = tmp_path / "generate.json"
    given = ["--what", "stream", "--bytes", 2, "--batch-size", 1, "--contexts", "16,40"]
    code, out, err = command("generate", "--quick", "--device", "cpu", "--json", file, *given)
    assert code == 0, err
    rows = json.loads(file.read_text())["rows"]
    assert [row["bytes_per_second"][1] for row in rows] == [2, 1] and [row["change"] for row in rows] == [0, -0.5]
    assert [row["read_bytes_per_second"] for row in rows] == [16 / 0.25, 40 / 0.25]
    assert [row["against first %"] for row in cells(out)] == ["+0.0", "-50.0"]


def test_what_a_byte_costs_is_compared_with_the_first_row_that_was_measured():
    rows = [{"note": "out of memory"}]
    for times, peak in (([1.0, 2.0, 9.0], 1000), ([3.0, 4.0, 4.0], 1100), ([1.0], 500)):
        rows.append(scaling.compared({"step_seconds": times, "peak_bytes": peak}, rows, 4))
    assert [row["seconds_per_byte"][1] for row in rows[1:]] == [0.5, 1, 0.25]
    assert [row["time_ratio"] for row in rows[1:]] == [1, 2, 0.5]
    assert [row["peak_per_byte"] for row in rows[1:]] == [250, 275, 125]
    assert [row["memory_ratio"] for row in rows[1:]] == [1, 1.1, 0.5]
    assert scaling.compared({"note": "out of memory"}, rows, 4) == {"note": "out of memory"}


def test_the_best_batch_is_the_fastest_a_byte_and_is_profiled(monkeypatch):
    took, profiled = {1: 1.0, 2: 1.5, 4: 4.0}, []

    def measure(setting, device, repeats):
        times = [took[setting.batch_size]] * repeats
        speeds = machine.speeds(setting.batch_size * setting.seq_len, times)
        about = {"parameters": 1, "flop_per_byte": 1.0, "optimizer_flop_per_step": 1.0, "peak_bytes": None}
        return about | {"step_seconds": times, "step_ms": 1000 * times[0], "bytes_per_second": speeds}

    monkeypatch.setattr(train, "measure", measure)
    monkeypatch.setattr(train, "profile_step", lambda setting, device: profiled.append(setting.batch_size) or [])
    code, out, _ = command("train", "--quick", "--device", "cpu", "--batch-size", "4,2,1", "--profile")
    assert code == 0 and profiled == [2] and "genesis: best at batch 2, " in out


def test_generate_is_the_whole_of_it(results):
    rows = [row for row in results["generate"][1]["rows"] if row["what"] == "generate"]
    assert [row["context"] for row in rows] == [64, 256] and all(len(row["seconds"]) == 3 for row in rows)


def test_graphs_are_measured_on_a_card_only(monkeypatch, results):
    assert {row["what"] for row in results["generate"][1]["rows"]} == {"stream", "generate"}
    given = ["--quick", "--device", "cpu", "--what", "graphs", "--batch-size", 2, "--contexts", 16]
    code, out, err = command("generate", *given)
    assert code == 1 and "--what graphs: model on cpu: accepted is one on CUDA" in cells(out)[0]["told"]
    # Here graphs do nothing.
    monkeypatch.setattr(write, "captures", lambda device: True)
    monkeypatch.setattr(write, "refusal", lambda model: None)
    monkeypatch.setattr(write, "FusedWeights", lambda model: model)
    monkeypatch.setattr(write.Writer, "draw", lambda writer, until: drawn.append(until))
    monkeypatch.setattr(write, "FusedStream", lambda stream, weights: None)
    drawn: list[int] = []
    code, out, err = command("generate", *given, "--bytes", 100)
    (row,) = cells(out)
    assert code == 0, err
    assert row["what"] == "graphs" and float(row["bytes/s"]) > 0
    assert drawn == [t for n in range(4) for t in (100 * n + 64, 100 * n + 100)]


# ── arithmetic ───────────────────────────────────────────────────────────────────────────────────────────────────


def counted(model: AGIFormer, x: torch.Tensor) -> int:
    model.train()
    with FlopCounterMode(display=False) as counter:
        model.loss(x).backward()
    return counter.get_total_flops()


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"hull": "swiglu", "thinking_steps": 2},
        {"recall_heads": 2, "recall_dim": 8, "recall_key_dim": 12, "recall_span": 3, "patch_size": 8},
        {"memory_rule": "delta", "thinking_steps": 1, "thinking_reads": True},
    ],
)
def test_flop_a_byte_are_those_of_all_products_with_weights(changes, monkeypatch):
    """Counted by PyTorch, with what has no weights taken out: attention's scores and the fast weights."""
    model = AGIFormer(AGIFormerConfig.preset("nano").with_settings(machine.TINY))
    model = AGIFormer(AGIFormerConfig.from_dict(model.config.to_dict() | changes))
    x = torch.randint(0, 256, (2, 64), generator=torch.Generator().manual_seed(0))
    everything = counted(model, x)
    state = (torch.zeros(()), torch.zeros(()))

    def no_operator(q, k, v, log_decay, *, beta=None, state=None, impl="auto"):
        gates = log_decay if beta is None else log_decay + beta
        return v + (q * k).sum(-1, keepdim=True) + gates.unsqueeze(-1), (v.sum(), k.sum())

    for module in (memory, byte_memory):
        monkeypatch.setattr(module, "hebbian", no_operator)
    monkeypatch.setattr(attention, "window_attention", lambda q, k, v, window, cached=0: q + k + v)
    T, P = 64 // model.config.patch_size, model.config.patch_size
    parts = train.flop_per_byte(model)
    # The last patch is predicted and not read: the encoder has one less, which a long sequence does not show.
    expected = 2 * 64 * (sum(parts.values()) - parts["encoder"] / T)
    found = counted(model, x)
    assert found == pytest.approx(expected, rel=1e-12) and everything > found
    assert P * T == 64 and state


def test_flop_of_the_optimizer():
    model = AGIFormer(AGIFormerConfig.preset("nano").with_settings(machine.TINY))
    model.loss(torch.zeros(1, 8, dtype=torch.long)).backward()
    for kind in ("muon", "adamw"):
        optimizer = MuonAdamW(model, optimizer=kind)
        with FlopCounterMode(display=False) as counter:
            optimizer.step()
        assert train.optimizer_flop(optimizer) == counter.get_total_flops()
        assert (counter.get_total_flops() > 0) == (kind == "muon")


def test_the_document_has_the_arithmetic_of_the_code():
    with torch.device("meta"):
        model = AGIFormer(AGIFormerConfig.preset("small"))
    flop = sum(train.flop_per_byte(model).values())
    text = DOCUMENT.read_text("utf-8")
    assert f"{flop / 1e6:.1f} MFLOP a byte" in text and f"{train.PEAK * 1e12 / flop / 1e6:.1f} MB/s" in text


# ── where the time goes ──────────────────────────────────────────────────────────────────────────────────────────


def span(cat, name, ts, dur, tid=1, **args):
    return {"ph": "X", "cat": cat, "name": name, "ts": ts, "dur": dur, "tid": tid, "args": args}


def trace() -> list[dict]:
    """A step as a profiler of a card writes it: launches on two threads of the host, kernels on the device."""

    def launch(ts, correlation, tid=1, cat="cuda_runtime"):
        return span(cat, "launch", ts, 1, tid, correlation=correlation)

    def kernel(name, dur, correlation, cat="kernel", **args):
        return span(cat, name, 1000 + correlation, dur, 7, correlation=correlation, **args)

    number = {"Sequence number": 5}
    return [
        {"ph": "M", "name": "process_name"},
        span("user_annotation", "part: encoder", 0, 50),
        span("cpu_op", "aten::detach", 1, 2, **number),  # has seen the number that the product takes
        span("user_annotation", "part: blocks: hulls", 60, 50),
        span("cpu_op", "aten::mm", 62, 10, **number, **{"External id": 3}),
        launch(63, 1),
        kernel("nvjet_hsh_128x128", 30, 1),
        span("user_annotation", "part: fast-weight operator", 80, 20),
        launch(85, 2, cat="cuda_driver"),  # of Triton's, without an operation
        kernel("carry_kernel", 20, 2),
        span("user_annotation", "part: optimizer", 200, 50),
        launch(210, 3),
        kernel("nvjet_tst", 7, 3),
        launch(300, 4),
        kernel("void at::native::vectorized_elementwise_kernel<4, at::native::AddFunctor<float>>", 5, 4),
        span("cpu_op", "autograd::engine::evaluate_function: MmBackward0", 120, 30, 2, **number),
        span("cpu_op", "aten::mm", 121, 20, 2, **{"External id": 9}),
        launch(125, 5, tid=2),
        kernel("sm90_xmma_gemm_bf16", 11, 5),
        launch(127, 9, tid=2),
        kernel("keys_kernel", 6, 9),  # the rule's, in one operation with something else
        kernel("Memcpy DtoD (Device -> Device)", 2, 6, cat="gpu_memcpy", **{"External id": 9}),  # its launch is lost
        span("cpu_op", "autograd::engine::evaluate_function: torch::autograd::AccumulateGrad", 160, 10, 2),
        launch(162, 8, tid=2),
        kernel("void at::native::reduce_kernel<512>", 3, 8),
        kernel("something_else", 4, 99),
        span("gpu_user_annotation", "part: optimizer", 1000, 500, 7),
    ]


def test_kernels_belong_to_the_part_that_began_them():
    found = {kernel.name.split("<")[0]: kernel for kernel in train.kernels(trace(), on_device=True)}
    told = {name: (kernel.part, kernel.phase, kernel.group) for name, kernel in found.items()}
    assert told == {
        "nvjet_hsh_128x128": ("blocks: hulls", "forward", "matrix products"),
        "carry_kernel": ("fast-weight operator", "forward", "fast-weight operator"),
        "nvjet_tst": ("optimizer", "update", "optimizer"),
        "void at::native::vectorized_elementwise_kernel": (None, "forward", "hulls, norms, other elementwise"),
        "sm90_xmma_gemm_bf16": ("blocks: hulls", "backward", "matrix products"),
        "keys_kernel": ("fast-weight operator", "backward", "fast-weight operator"),
        "Memcpy DtoD (Device -> Device)": ("blocks: hulls", "backward", "copies and fills"),
        "void at::native::reduce_kernel": ("gradients added up", "backward", "hulls, norms, other elementwise"),
        "something_else": (None, "forward", "other"),
    }
    rows = {row["part"]: row for row in train.breakdown(list(found.values()), "part")}
    hulls = rows["blocks: hulls"]
    assert hulls["forward_ms"] == pytest.approx(0.030 / train.PROFILED)
    assert hulls["backward_ms"] == pytest.approx(0.013 / train.PROFILED)
    assert hulls["kernels"] == 3 / train.PROFILED and hulls["share"] == pytest.approx(43 / 88)
    assert rows["outside of all parts"]["share"] == pytest.approx(9 / 88)
    with pytest.raises(ValueError, match="no kernel"):
        train.kernels(
            [each for each in trace() if each.get("cat") != "kernel" and each.get("cat") != "gpu_memcpy"], True
        )


def test_operators_on_a_cpu_have_their_own_time_only():
    events = [
        span("user_annotation", "part: thinking", 0, 100),
        span("cpu_op", "aten::linear", 10, 50),
        span("cpu_op", "aten::addmm", 20, 30),
    ]
    found = train.kernels(events, on_device=False)
    assert [(each.name, each.part) for each in found] == [("aten::linear", "thinking"), ("aten::addmm", "thinking")]
    assert [each.seconds for each in found] == pytest.approx([20e-6, 30e-6])


PARTS = ["encoder", "blocks: gate, output, norms", "blocks: attention's projections", "blocks: memory's projections"]
PARTS += ["blocks: hulls", "thinking", "byte head (GRU)", "fast-weight operator", "attention", "cross-entropy"]


def test_a_real_step_is_attributed(results):
    out, data = results["train"]
    for profile in data["profiles"]:
        for key in ("group", "part"):
            assert sum(row["total_ms"] for row in profile[key]) == pytest.approx(profile["total_ms"])
            assert sum(row["share"] for row in profile[key]) == pytest.approx(1)
        parts = {row["part"]: row for row in profile["part"]}
        for part in PARTS:
            assert parts[part]["forward_ms"] > 0 and parts[part]["backward_ms"] > 0, part
        assert parts["optimizer"]["update_ms"] == parts["optimizer"]["total_ms"] > 0
        assert parts["outside of all parts"]["share"] < 0.2
        assert f"Where a step's time goes: {profile['what']}, batch 2 × 64 bytes" in out
    assert [profile["what"] for profile in data["profiles"]] == ["plain", "petals"]
    plain, petals = ({row["part"] for row in profile["part"]} for profile in data["profiles"])
    assert petals - plain == {"GENESIS"}


def test_ranges_leave_nothing_behind():
    model = AGIFormer(AGIFormerConfig.preset("nano").with_settings(machine.TINY))
    step = TrainingStep(model, MuonAdamW(model))
    before = memory.hebbian, attention.window_attention, torch.nn.functional.cross_entropy
    with train.ranges(SimpleNamespace(model=model, training_step=step)):
        assert memory.hebbian is not before[0] and any(module._forward_hooks for module in model.modules())
    assert (memory.hebbian, attention.window_attention, torch.nn.functional.cross_entropy) == before
    assert "step" not in vars(step.optimizer)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_each_row_trains_what_it_says(tmp_path):
    arguments = train.parse(["--quick"])
    base = train.base_setting(arguments, CPU, str(tmp_path), "plain", 2)
    rehearsed = []
    for what, mechanisms in (("plain", None), ("genesis", "off"), ("petals", "all")):
        trainer = train.make_trainer(train.replace(base, what=what), CPU)
        genesis = trainer.genesis
        assert (genesis and genesis.options.amplifier) == mechanisms
        assert (trainer.training_step.optimizer.viscosity is not None) == (what == "petals")
        train.reach_last_stage(trainer, 0.0)
        assert trainer.curriculum.stage_at(trainer.step, train.STEPS) == 2
        assert trainer._batch(2)[0].shape == (2, 64)  # no short rows of a slow start
        if genesis:
            rehearsed.append(int(genesis.stage) == 2 and genesis.memory.past(2) == 2)
    assert rehearsed == [True, True]


# ── the operator ─────────────────────────────────────────────────────────────────────────────────────────────────


def test_forms_of_the_operator_are_exact_and_missing_peers_are_named(results):
    out, found = results["memory_op"]
    rows = {(row["rule"], row["form"], row["dtype"]): row for row in found["rows"]}
    for rule in memory_op.RULES:
        for form in ("recurrent", "chunked"):
            errors = rows[rule, form, "float32"]["errors"]
            assert {"out", "state M", "d q", "d k", "d v", "d log_decay", "d M"} <= errors.keys()
            assert ("d beta" in errors) == (rule == "delta") and ("state z" in errors) == (rule == "hebbian")
            assert 0 < max(errors.values()) < 1e-5
    for form in (("hebbian", "fla simple GLA"), ("delta", "fla gated delta rule")):
        for dtype in ("bfloat16", "float32"):
            assert rows[*form, dtype]["note"] == "not installed" and "forward_ms" not in rows[*form, dtype]
    assert out.count("not installed") == 4 and found["fla_core"] is None
    assert 1e-4 < rows["-", "attention", "bfloat16"]["error_worst"] < 3e-2


def test_an_error_of_the_operator_shows():
    arguments = memory_op.parse(["--quick"])
    tensors = [x if x is None else x.requires_grad_() for x in memory_op.inputs("delta", arguments, torch.float32, CPU)]

    def wrong(q, k, v, log_decay, beta, M, z):
        out, state = memory_op.ours(q, k, v, log_decay, beta, M, z, impl="chunked")
        return out * 1.01, state

    case = memory_op.Case("delta", "wrong", wrong, memory_op.exact_ours)
    errors = memory_op.compare(case, tensors, torch.ones_like(tensors[2]))
    assert errors["out"] == pytest.approx(0.01, rel=1e-3) and errors["state M"] < 1e-5
    assert errors["d q"] == pytest.approx(0.01, rel=1e-3)


def test_a_gradient_that_is_not_finite_shows():
    def wrong(q, k, v, log_decay, beta, M, z):
        out, state = memory_op.exact_ours(q, k, v, log_decay, beta, M, z)
        return out + 0 * (M.detach() - M).sum().sqrt(), state  # the gradient is 0 times infinity

    case = memory_op.Case("delta", "wrong", wrong, memory_op.exact_ours)
    row = memory_op.measure(case, memory_op.parse(["--quick", "--length", "3", "--repeats", "1"]), CPU)
    assert row["error_forward"] < 1e-5 and memory_op.COLUMNS["worst"](row) == "nan"


@pytest.mark.parametrize("rule", memory_op.RULES)
def test_peers_are_given_what_they_ask_for(rule, monkeypatch):
    """A peer of that signature, [B, T, H, ...], by the definition."""

    def simple_gla(q, k, v, g, *, scale, initial_state, output_final_state):
        assert scale == 1 and output_final_state and all(x.is_contiguous() for x in (q, k, v, g))
        q, k, v, g = (x.transpose(1, 2) for x in (q, k, v, g))
        # o_t = q_t M_0 λ_1 … λ_t + Σ_{j ≤ t} λ_{j+1} … λ_t (q_t · k_j) v_j
        sums = g.cumsum(-1)
        decays = (sums.unsqueeze(-1) - sums.unsqueeze(-2)).tril().exp().tril()
        out = ((q @ k.mT) * decays) @ v + sums.exp().unsqueeze(-1) * (q @ initial_state)
        last = (sums[..., -1:] - sums).exp().unsqueeze(-1)
        return out.transpose(1, 2), (k * last).mT @ v + sums[..., -1].exp()[..., None, None] * initial_state

    def gated_delta_rule(q, k, v, g, beta, *, scale, initial_state, output_final_state):
        assert scale == 1 and output_final_state
        S, outputs = initial_state, []
        for t in range(q.shape[1]):
            S = g[:, t, :, None, None].exp() * S
            error = v[:, t] - torch.einsum("bhe,bhev->bhv", k[:, t], S)
            S = S + torch.einsum("bh,bhe,bhv->bhev", beta[:, t], k[:, t], error)
            outputs.append(torch.einsum("bhe,bhev->bhv", q[:, t], S))
        return torch.stack(outputs, 1), S

    modules = {
        "fla.ops.simple_gla": SimpleNamespace(chunk_simple_gla=simple_gla),
        "fla.ops.gated_delta_rule": SimpleNamespace(chunk_gated_delta_rule=gated_delta_rule),
    }
    monkeypatch.setattr(memory_op, "import_module", modules.__getitem__)
    assert {case.without for case in memory_op.fla_cases(rule, CPU)} == {"needs CUDA"}
    case = list(memory_op.fla_cases(rule, torch.device("cuda")))[1]
    assert case.without is None and case.optional and case.dtype == torch.float32
    row = memory_op.measure(case, memory_op.parse(["--quick", "--value-dim", "8", "--repeats", "1"]), CPU)
    assert 0 < row["error_worst"] < 1e-5
    assert (case.note == "without normaliser") == (rule == "hebbian")


def test_what_a_form_does_not_take_is_a_remark(monkeypatch):
    def check(q, v):
        assert q.shape == (1, 2, 600, 16) and v.shape == (1, 2, 600, 8)
        raise ValueError("q has E=16: accepted is none")

    monkeypatch.setattr(memory_op, "check", check)
    given = ["--quick", "--device", "cpu", "--rule", "hebbian", "--forms", "recurrent,triton"]
    code, out, _ = command("memory_op", *given, "--length", 600, "--value-dim", 8)
    assert code == 0
    told = [row["told"] for row in cells(out)]
    assert told == ["not run: more than 512 steps", "not run: q has E=16: accepted is none"]


def test_a_package_that_breaks_when_it_is_imported_is_a_remark(monkeypatch):
    def broken(name):
        raise ImportError("undefined symbol")

    monkeypatch.setattr(memory_op, "import_module", broken)
    assert memory_op.peer("fla.ops.simple_gla", "chunk_simple_gla") == (
        None,
        "not usable: ImportError: undefined symbol",
    )


# ── rows that fail, and bad arguments ────────────────────────────────────────────────────────────────────────────


def test_memory_that_does_not_suffice_is_a_row(monkeypatch, tmp_path):
    real = train.make_trainer

    def make(setting, device):
        if setting.seq_len == 32:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return real(setting, device)

    monkeypatch.setattr(train, "make_trainer", make)
    code, out, err = command("scaling", "--quick", "--device", "cpu", "--seq-len", "32,64,128", "--repeats", 1)
    rows = cells(out)
    assert code == 0 and [row["told"] for row in rows] == ["out of memory", "", ""] and "Traceback" not in err
    assert [row["time ratio"] == "-" for row in rows] == [True, False, False] and rows[1]["time ratio"] == "1.000"


def test_a_row_that_fails_is_told_and_the_others_go_on(monkeypatch, tmp_path):
    real = train.make_trainer

    def make(setting, device):
        if setting.what == "plain":
            raise RuntimeError("CUDA error: misaligned address\nCUDA kernel errors might be reported elsewhere")
        return real(setting, device)

    monkeypatch.setattr(train, "make_trainer", make)
    file = tmp_path / "train.json"
    given = ["--quick", "--device", "cpu", "--what", "plain,genesis", "--batch-size", 1, "--repeats", 1]
    code, out, err = command("train", *given, "--json", file)
    told = "RuntimeError: CUDA error: misaligned address"
    assert code == 1 and [row["told"] for row in cells(out)] == [told, ""] and "Traceback" in err
    assert [row.get("error") for row in json.loads(file.read_text())["rows"]] == [told, None]


def test_a_profile_that_fails_is_told(monkeypatch):
    def broken(*_):
        raise RuntimeError("CUPTI_ERROR_INSUFFICIENT_PRIVILEGES")

    monkeypatch.setattr(train, "profile_step", broken)
    given = ["--quick", "--device", "cpu", "--batch-size", 1, "--repeats", 1, "--profile"]
    code, out, _ = command("train", *given)
    assert code == 0 and "profile of genesis: RuntimeError: CUPTI_ERROR_INSUFFICIENT_PRIVILEGES" in out


def test_what_failed_lets_go_of_its_memory(capsys):
    held = []

    def run():
        tensor = torch.zeros(10)
        held.append(weakref.ref(tensor))
        try:
            raise MemoryError
        finally:
            raise RuntimeError("cudaErrorStreamCaptureInvalidated")  # as a capture ends that ran out of memory

    assert machine.attempt(run) == (None, {"note": "out of memory"})
    gc.collect()
    assert held[0]() is None
    assert machine.attempt(lambda: 3) == (3, {})

    def fault():
        raise KeyError("x")

    assert machine.attempt(fault, optional=True) == (None, {"note": "KeyError: 'x'"})
    assert "Traceback" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (15000.4, "15000"),
        (0.00012345, "0.0001234"),
        (1.425, "1.425"),
        (0.0, "0.000"),
        (123456789.0, "123456789"),
        (-34.567, "-34.57"),
        (1e-15, "0.000000000"),
        (None, "-"),
        (float("inf"), "inf"),
    ],
)
def test_cells_have_four_digits_and_no_exponent(value, shown):
    assert machine.significant(value) == shown


@pytest.mark.parametrize(
    ("name", "arguments", "named"),
    [
        ("train", ["--what", "plain,all"], "--what all: accepted are plain, genesis, petals"),
        ("train", ["--preset", "tiny"], "preset='tiny'"),
        ("train", ["--set", "d_model=30"], "d_model=30"),
        ("train", ["--set", "width=3"], "--set width=3"),
        ("train", ["--seq-len", "1"], "seq_len=1"),
        ("train", ["--batch-size", "8,x"], "'x'"),
        ("train", ["--amp", "fp8"], "amp='fp8'"),
        ("train", ["--peak", "nan"], "--peak nan"),
        ("train", ["--corpus", "missing.txt"], "missing.txt"),
        ("train", ["--corpus", "empty.txt"], "empty"),
        ("train", ["--json", "."], "--json ."),
        ("train", ["--device", "abacus"], "abacus"),
        ("train", ["--repeats", "0"], "--repeats"),
        ("memory_op", ["--rule", "hopfield"], "--rule hopfield: accepted are hebbian, delta"),
        ("memory_op", ["--forms", ""], "accepted are recurrent, "),
        ("memory_op", ["--width", "0"], "'0'"),
        ("generate", ["--what", "chat"], "--what chat"),
        ("generate", ["--contexts", "1e6"], "'1e6'"),
        ("generate", ["--checkpoint", "missing.safetensors"], "missing.safetensors"),
        ("generate", ["--checkpoint", "m.safetensors", "--preset", "nano"], "--checkpoint"),
        ("generate", ["--threads", "-1"], "'-1'"),
        ("scaling", ["--seq-len", "48"], "--seq-len 48: accepted is a divisor of --bytes, 128"),
        ("scaling", ["--what", "plain,genesis"], "--what plain,genesis"),
        ("scaling", ["--seq-len", "1"], "--seq-len 1"),
    ],
)
def test_bad_arguments_are_one_line(name, arguments, named, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("AGIFORMER_CACHE", str(tmp_path / "cache"))
    (tmp_path / "empty.txt").touch()
    code, out, err = command(name, "--quick", *arguments)
    assert code == 2 and not out
    assert len(err.strip().split("\n")) == 1 and err.startswith(f"{name}.py: error: ") and named in err
