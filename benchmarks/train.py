"""How fast a model trains, how close that is to the arithmetic, and where a step's time goes.

    python benchmarks/train.py --json train.json                      # the preset's sequence length, five batch sizes
    python benchmarks/train.py --what plain,genesis,petals --batch-size 32,64,128
    python benchmarks/train.py --what genesis --batch-size 64 --profile
    python benchmarks/train.py --quick                                # seconds on a CPU; its numbers say nothing

Each line is a trainer of its own, made as train_curriculum.py makes it, in the last of three stages, where rehearsal
costs most: `plain` without GENESIS, `genesis` as it is by default, `petals` with all of GENESIS, damped updates and
petals that may set. Bytes are random unless --corpus names a text. docs/performance.md explains the columns.
"""

import argparse
import json
import math
import sys
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from itertools import cycle, islice
from pathlib import Path
from typing import Any
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile, record_function

from benchmarks import machine
from benchmarks.machine import Report, Row
from model import agiformer
from model.agiformer import AGIFormer
from model.cli import Parser, guarded, positive
from model.config import AGIFormerConfig
from model.data import load_curriculum, open_store
from model.data.sources import SourceSpec
from model.evaluation.report import text_table
from model.kernels import packed_hebbian, triton_delta, triton_hebbian
from model.layers import attention, byte_memory, memory
from model.layers.block import HybridBlock
from model.layers.encoder import ByteLatentEncoder
from model.layers.head import LocalAutoregressiveHead
from model.layers.hull import ConvexPetals, HullLayer
from model.layers.reasoning import RecurrentReasoningBlock
from model.training import genesis as genesis_losses
from model.training import step as main_losses
from model.training.optimizer import NEWTON_SCHULZ_STEPS, MuonAdamW
from model.training.options import TrainingOptions
from model.training.step import EAGER_STEPS
from model.training.trainer import Trainer

# Options of the run that are not train_curriculum.py's defaults.
WHAT: dict[str, dict[str, Any]] = {
    "plain": {"genesis": "off"},
    "genesis": {},
    "petals": {"genesis": "all", "freeze": "cryogenic"},  # with freezing, damped updates are on by default
}
STEPS = 100_000  # of the run that the timed steps are the middle of
NOISE = 2**22  # bytes of random text, at least
SEED = 0
PEAK = 798.0  # TFLOP/s
BATCHES = 4  # that the timed steps take in turn
PROFILED = 3  # steps

QUICK = {"repeats": 3, "seq_len": 64, "batch_size": (1, 2)}


# ── a trainer in its last stage ──────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class Setting:
    """What is trained, and how.

    Attributes:
        what: of WHAT.
        config: the model.
        text: file that all stages read.
        folder: for what goes away with the run.
        graph: capture the step.
    """

    what: str
    preset: str
    config: AGIFormerConfig
    seq_len: int
    batch_size: int
    amp: str
    graph: bool
    text: Path
    folder: Path

    @property
    def cache(self) -> Path | None:
        """Folder of the encoded text; None for that of all corpora."""
        return self.folder / "cache" if self.text.parent == self.folder else None


def make_trainer(setting: Setting, device: torch.device) -> Trainer:
    """As train_curriculum.py does; the learning curve's slow start, with its short rows, is taken to be over."""
    options = TrainingOptions.build(
        setting.preset,
        "pydoc",
        steps=STEPS,
        batch_size=setting.batch_size,
        seq_len=setting.seq_len,
        amp=setting.amp,
        seed=SEED,
        **WHAT[setting.what],
    )
    curriculum = load_curriculum("pydoc")
    stages = tuple(replace(stage, source=SourceSpec(files=(str(setting.text),))) for stage in curriculum.stages)
    trainer = Trainer(
        setting.config,
        options,
        replace(curriculum, stages=stages),
        out=setting.folder / "run",
        cache_dir=setting.cache,
        device=device,
        graph=setting.graph,
        quiet=True,
    )
    trainer.model.train()
    trainer.slow_samplers = []
    return trainer


def reach_last_stage(trainer: Trainer, began: float) -> dict[str, float]:
    """Train through all stages, some steps each, until the step of the last one runs as it goes on running.

    Returns:
        Seconds from `began` to the end of the first step, and to the end of the first captured one.
    """
    took = {}
    steps = EAGER_STEPS + 1 if trainer.training_step.graph else 1
    for i, start in enumerate([0, *trainer.boundaries[:-1]]):
        trainer.step = start
        for k in range(1 if 0 < i < len(trainer.boundaries) - 1 else steps):
            trainer._train_one()
            if i == 0 and k in (0, steps - 1):
                machine.synchronize(trainer.device)
                name = "graph_seconds" if k else "first_step_seconds"
                took[name] = machine.now() - began
    machine.synchronize(trainer.device)
    return took


def batches(trainer: Trainer) -> Iterator[tuple]:
    """Batches of the last stage for `TrainingStep.run`, over and over."""
    made = []
    for _ in range(BATCHES):
        parts = trainer._batch(len(trainer.boundaries) - 1)
        pinned = trainer.device.type == "cuda"
        made.append(tuple(part.pin_memory() if pinned and part is not None else part for part in parts))
    return cycle(made)


def measure(setting: Setting, device: torch.device, repeats: int) -> Row:
    """Times, speeds, memory and arithmetic of one setting."""
    began = machine.now()
    machine.start_peak(device)
    trainer = make_trainer(setting, device)
    row: Row = {"parameters": trainer.model.parameter_count()}
    row |= reach_last_stage(trainer, began)
    given, size = batches(trainer), setting.batch_size * setting.seq_len
    times = machine.seconds(lambda: trainer.training_step.run(*next(given)), repeats, warm_up=1, device=device)
    whole = machine.seconds(trainer._train_one, repeats, warm_up=1, device=device)
    row |= {
        "step_seconds": times,
        "bytes_per_second": machine.speeds(size, times),
        "run_seconds": whole,
        "run_bytes_per_second": machine.speeds(size, whole),
        "peak_bytes": machine.peak_bytes(device),
        "skipped_steps": int(trainer.training_step.optimizer.skipped),
        "flop_per_byte": sum(flop_per_byte(trainer.model).values()),
        "optimizer_flop_per_step": optimizer_flop(trainer.training_step.optimizer),
    }
    return row | {"step_ms": 1000 * machine.quartiles(times)[1]}


# ── arithmetic ───────────────────────────────────────────────────────────────────────────────────────────────────


def flop_per_byte(model: AGIFormer) -> dict[str, float]:
    """FLOP that training takes a byte, by part of the model: 6 for each weight that multiplies, each time it does.

    A multiplication and an addition forward; backward the same for the input's gradient and again for the weight's.
    Weights of the trunk multiply once a patch, those of the thinking loop K times, those of the byte head once a
    byte; a convex hull multiplies by its second matrix twice, once for each sign. Tables are looked up, not multiplied.
    What has no weights is not counted: attention's scores, the fast weights, norms and gates, and the optimizer.
    """
    P, K = model.config.patch_size, model.config.thinking_steps
    found: dict[str, float] = defaultdict(float)
    for name, module in model.named_modules():
        part = name.split(".")[0]
        for weight, parameter in module.named_parameters(recurse=False):
            if parameter.dim() < 2 or weight == "bias" or isinstance(module, nn.Embedding):
                continue
            uses = 1 / P
            if part == "reasoning":
                uses = K / P
            elif isinstance(module, ConvexPetals) and weight == "down":
                uses = 2 / P
            elif name in ("head.recurrent", "head.output") or name.startswith("head.memory"):
                uses = 1.0
            found[part] += 6 * uses * parameter.numel()
    return dict(found)


def optimizer_flop(optimizer: MuonAdamW) -> float:
    """FLOP of a step's matrix products in the optimizer: Newton–Schulz on each of Muon's matrices [m, n], m ≤ n."""
    total = 0
    for region in optimizer.regions:
        if region.matrices:
            count, *sides = region.matrices
            m, n = sorted(sides)
            total += count * NEWTON_SCHULZ_STEPS * (2 * m * m * n + 2 * m**3 + 2 * m * m * n)
    return float(total)


# ── where a step's time goes ─────────────────────────────────────────────────────────────────────────────────────

RANGE = "part: "  # before the name of a range of ours
EVALUATE = "autograd::engine::evaluate_function"
ACCUMULATE = f"{EVALUATE}: torch::autograd::AccumulateGrad"
OPERATOR, ATTENTION, LOSS = "fast-weight operator", "attention", "cross-entropy"
OPTIMIZER, GENESIS, HEAD = "optimizer", "GENESIS", "byte head (GRU)"

# Parts of the step, by the module or function in which work is begun; the innermost counts.
MODULES: dict[type[nn.Module], str] = {
    ByteLatentEncoder: "encoder",
    HybridBlock: "blocks: gate, output, norms",
    attention.WindowAttention: "blocks: attention's projections",
    memory.HebbianMemory: "blocks: memory's projections",
    HullLayer: "blocks: hulls",
    RecurrentReasoningBlock: "thinking",
    LocalAutoregressiveHead: HEAD,
    byte_memory.ByteMemory: "byte memory's projections",
}
FUNCTIONS = (
    (memory, "hebbian", OPERATOR),
    (memory, "packed_hebbian", OPERATOR),
    (byte_memory, "hebbian", OPERATOR),
    (attention, "window_attention", ATTENTION),
    *((module, "byte_cross_entropy", LOSS) for module in (agiformer, main_losses, genesis_losses)),
)
OPTIMIZER_METHODS = ("zero_grad", "clip", "step")
GENESIS_METHODS = ("blocked", "_rehearsal", "_positions_that_count", "_watch", "_main_loss", "_balanced")
GENESIS_METHODS += ("amplify", "pace", "remember", "note")

OPERATOR_MODULES = packed_hebbian, triton_hebbian, triton_delta
OPERATOR_KERNELS = {name for module in OPERATOR_MODULES for name in dir(module) if "_kernel" in name}
# Groups by what is in a kernel's name (or, on a CPU, an operator's); the first that fits.
MATRICES, COPIES, ELEMENTWISE = "matrix products", "copies and fills", "hulls, norms, other elementwise"
LOOK_UPS, OTHER = "look-ups", "other"
KINDS: tuple[tuple[str, tuple[str, ...]], ...] = (
    (ATTENTION, ("flash", "fmha", "sdpa", "scaled_dot_product")),
    (MATRICES, ("gemm", "gemv", "cutlass", "cublas", "nvjet", "xmma", "splitk")),
    (MATRICES, ("aten::mm", "aten::bmm", "aten::addmm", "aten::baddbmm", "aten::linear", "aten::matmul")),
    (LOSS, ("softmax", "nll_loss", "cross_entropy")),
    (COPIES, ("memcpy", "memset", "copy", "fill", "catarray", "aten::cat", "aten::zero_", "aten::clone")),
    (LOOK_UPS, ("embedding", "index", "gather", "scatter", "sort", "radix")),
    (ELEMENTWISE, ("elementwise", "reduce", "norm", "_square_", "_split_", "_forward", "_backward", "foreach")),
    (ELEMENTWISE, tuple(f"aten::{name}" for name in (
        "mul", "add", "sub", "div", "neg", "sigmoid", "tanh", "lerp", "exp", "log", "sqrt", "pow", "relu", "clamp",
        "threshold", "where", "sum", "mean", "logsigmoid", "elu", "silu", "cumsum", "tril", "abs", "max", "min",
    ))),
)  # fmt: skip
LAUNCHES = ("cuda_runtime", "cuda_driver")  # of the host's spans, those that begin a kernel


@dataclass(frozen=True)
class Kernel:
    """A kernel that ran, or on a CPU an operator without those that it called.

    Attributes:
        seconds: that it took.
        part: of the step, by our ranges; None where it was begun outside of all.
        phase: "forward", "backward", or "update" for the optimizer's and GENESIS's work.
    """

    name: str
    seconds: float
    part: str | None
    phase: str

    @property
    def group(self) -> str:
        """What it is: by its part where that says it, else by its name."""
        if self.part in (OPERATOR, ATTENTION, LOSS, OPTIMIZER, HEAD):
            return self.part
        name = self.name.lower()
        return next((group for group, marks in KINDS if any(mark in name for mark in marks)), OTHER)


@contextmanager
def ranges(trainer: Trainer) -> Iterator[None]:
    """While inside, the step's parts open a profiler's range each."""
    with ExitStack() as stack:
        for module in trainer.model.modules():
            if part := MODULES.get(type(module)):
                for hook in _hooks(module, part):
                    stack.callback(hook.remove)
        step = trainer.training_step
        methods = [(step.optimizer, name, OPTIMIZER) for name in OPTIMIZER_METHODS]
        methods += [(step.genesis, name, GENESIS) for name in GENESIS_METHODS]
        for owner, name, part in (*FUNCTIONS, *methods):
            if getattr(owner, name, None) is not None:
                stack.enter_context(mock.patch.object(owner, name, _ranged(getattr(owner, name), part)))
        yield


def _hooks(module: nn.Module, part: str) -> list[Any]:
    opened: list[record_function] = []

    def begin(module, arguments):
        opened.append(record_function(RANGE + part))
        opened[-1].__enter__()

    def end(module, arguments, output):
        opened.pop().__exit__(None, None, None)

    return [module.register_forward_pre_hook(begin), module.register_forward_hook(end)]


def _ranged(function: Callable, part: str) -> Callable:
    def run(*args, **kwargs):
        with record_function(RANGE + part):
            return function(*args, **kwargs)

    return run


def profile_step(setting: Setting, device: torch.device) -> list[Kernel]:
    """The kernels of PROFILED eager steps: a captured step runs the same."""
    trainer = make_trainer(replace(setting, graph=False), device)
    reach_last_stage(trainer, machine.now())
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device.type == "cuda" else [])]
    given = batches(trainer)
    with ranges(trainer):
        trainer.training_step.run(*next(given))
        machine.synchronize(device)
        with profile(activities=activities) as profiler:
            for batch in islice(given, PROFILED):
                trainer.training_step.run(*batch)
            machine.synchronize(device)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "trace.json")
        profiler.export_chrome_trace(str(file))
        events = json.loads(file.read_text("utf-8", errors="replace"))["traceEvents"]
    return kernels(events, on_device=device.type == "cuda")


def kernels(events: list[dict[str, Any]], on_device: bool) -> list[Kernel]:
    """The kernels in a profiler's trace, or the operators of a CPU's.

    A kernel belongs to what the host was in when it began it. The backward pass of an operation has the sequence
    number of its forward pass, and belongs to the same part.

    Raises:
        ValueError: `on_device`, and there is no kernel in the trace.
    """
    spans = [event for event in events if event.get("ph") == "X" and "dur" in event]
    host = _nested([span for span in spans if span.get("cat") in ("cpu_op", "user_annotation", *LAUNCHES)])
    # Before an operation takes its number, others that need none have seen the same: the last of them is the one.
    forward = {node.sequence: node.part for node in host if node.sequence is not None and node.backward is None}

    def kernel(name: str, microseconds: float, node: "_Node | None") -> Kernel:
        if node is None:
            return Kernel(name, microseconds / 1e6, None, "forward")
        if node.backward is None:
            phase = "update" if node.part in (OPTIMIZER, GENESIS) else "forward"
            return Kernel(name, microseconds / 1e6, node.part, phase)
        part = node.part or forward.get(node.backward)
        return Kernel(name, microseconds / 1e6, part, "backward")

    def of_device(name: str, microseconds: float, node: "_Node | None") -> Kernel:
        found = kernel(name, microseconds, node)
        # The memory's projection and rule are one operation, and only the rule's kernels are ours.
        return replace(found, part=OPERATOR) if name in OPERATOR_KERNELS else found

    device = [span for span in spans if span.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset")]
    if on_device and not device:
        raise ValueError("the profiler has seen no kernel; accepted is a system that lets it look at the device")
    if not on_device:
        operators = [node for node in host if node.category == "cpu_op" and node.own > 0]
        return [kernel(node.name, node.own, node) for node in operators]
    by_launch = {node.correlation: node for node in host if node.correlation is not None and node.nested}
    by_id = {node.identity: node for node in host if node.identity is not None and node.category not in LAUNCHES}
    found = []
    for span in device:
        about = span.get("args", {})
        node = by_launch.get(about.get("correlation")) or by_id.get(about.get("External id"))
        found.append(of_device(span["name"], span["dur"], node))
    return found


class _Node:
    """A span on the host: what it is inside of, and how much of its time is its own."""

    def __init__(self, span: dict[str, Any], parent: "_Node | None"):
        about = span.get("args", {})
        self.name, self.category = span["name"], span["cat"]
        self.start, self.end, self.own = span["ts"], span["ts"] + span["dur"], span["dur"]
        self.identity = about.get("External id")
        self.correlation = about.get("correlation") if self.category in LAUNCHES else None
        self.sequence = about.get("Sequence number")
        self.nested = parent is not None
        self.part = parent.part if parent else None
        self.backward = parent.backward if parent else None  # of its operation's forward pass; −1 is unknown
        if parent:
            parent.own -= self.own
        if self.name.startswith(RANGE):
            self.part = self.name.removeprefix(RANGE)
        elif self.name.startswith(EVALUATE):
            self.backward = -1 if self.sequence is None else self.sequence
            self.part = "gradients added up" if self.name.startswith(ACCUMULATE) else None


def _nested(spans: list[dict[str, Any]]) -> list[_Node]:
    nodes: list[_Node] = []
    inside: dict[Any, list[_Node]] = defaultdict(list)  # by thread
    for span in sorted(spans, key=lambda span: (span["ts"], -span["dur"])):
        stack = inside[span.get("tid")]
        while stack and stack[-1].end <= span["ts"]:
            stack.pop()
        node = _Node(span, stack[-1] if stack else None)
        stack.append(node)
        nodes.append(node)
    return nodes


def breakdown(found: list[Kernel], key: str) -> list[Row]:
    """Milliseconds of a step and kernels by a Kernel's `group`, `part` or `name`, the most expensive first."""
    total = sum(kernel.seconds for kernel in found) or math.inf
    sums: dict[str, dict[str, float]] = defaultdict(
        lambda: dict.fromkeys(("forward", "backward", "update", "count"), 0)
    )
    for kernel in found:
        row = sums[getattr(kernel, key) or "outside of all parts"]
        row[kernel.phase] += kernel.seconds
        row["count"] += 1
    rows = []
    for name, row in sums.items():
        took = row["forward"] + row["backward"] + row["update"]
        phases = {f"{phase}_ms": 1000 * row[phase] / PROFILED for phase in ("forward", "backward", "update")}
        counted = {"total_ms": 1000 * took / PROFILED, "share": took / total, "kernels": row["count"] / PROFILED}
        rows.append({key: name} | phases | counted)
    return sorted(rows, key=lambda row: -row["total_ms"])


def short(name: str) -> str:
    """A kernel's name without what all of them have in common, so that the beginning tells them apart."""
    for common in ("void ", "at::native::", "(anonymous namespace)::", "at::cuda::"):
        name = name.replace(common, "")
    return name if len(name) <= 100 else name[:99] + "…"


def profile_tables(
    found: list[Kernel], setting: Setting, step_ms: float, device: torch.device
) -> tuple[str, dict[str, Any]]:
    """What --profile prints, and the same for the JSON file."""
    unit = "kernels" if device.type == "cuda" else "operators"
    by = {key: breakdown(found, key) for key in ("group", "part", "name")}
    top = by["name"] = by["name"][:25]
    total = sum(row["total_ms"] for row in by["group"])
    outside = sum(row["share"] for row in by["part"] if row["part"] == "outside of all parts")
    columns = {
        "forward ms": machine.fixed("forward_ms", 3),
        "backward ms": machine.fixed("backward_ms", 3),
        "update ms": machine.fixed("update_ms", 3),
        "ms": machine.fixed("total_ms", 3),
        "%": machine.fixed("share", 1, 100),
        unit: machine.fixed("kernels", 0),
    }

    def table(title: str, key: str) -> str:
        rows = [[short(row[key]), *(column(row) for column in columns.values())] for row in by[key]]
        return text_table([title, *columns], rows)

    about = f"{setting.what}, batch {setting.batch_size} × {setting.seq_len} bytes"
    lines = [
        f"Where a step's time goes: {about}, {total:.3f} ms of {unit}, mean of {PROFILED} eager steps; "
        f"{100 * outside:.1f}% outside of all parts; the timed step took {step_ms:.3f} ms",
        *(table("what", "group"), "", table("part of the step", "part"), "", table(f"top {len(top)}", "name")),
    ]
    return "\n".join(lines), {"what": setting.what, "batch_size": setting.batch_size, "total_ms": total} | by


# ── command line ─────────────────────────────────────────────────────────────────────────────────────────────────

COLUMNS: machine.Columns = {
    "what": machine.text("what"),
    "batch": machine.text("batch_size"),
    "ms/step": machine.cell("step_ms"),
    "MB/s": machine.middle("bytes_per_second", 1e-6),
    "quartiles": machine.spread("bytes_per_second", 1e-6),
    "with data MB/s": machine.middle("run_bytes_per_second", 1e-6),
    "% of floor": machine.fixed("share_of_floor", 1, 100),
    "peak GiB": machine.fixed("peak_bytes", 2, 2**-30),
    "first step s": machine.fixed("first_step_seconds", 1),
    "graph s": machine.fixed("graph_seconds", 1),
}


def add_model_arguments(parser: Parser) -> None:
    """What is trained; benchmarks/scaling.py has the same."""
    add = parser.add_argument
    add("--preset", help="nano, small, base or large (default: small on CUDA, else nano)")
    add("--set", action="append", default=[], metavar="FIELD=VALUE", help="change a field of the model")
    add("--corpus", metavar="FILE", help="a text that all stages read (default: random bytes)")
    add("--amp", default="auto", help="auto, bf16, fp16 or off (default: auto: bf16 or fp16 on CUDA, off on a CPU)")
    add("--no-graph", action="store_true", help="do not capture the step as a CUDA graph")


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(prog="train.py", description=__doc__)
    add_model_arguments(parser)
    add = parser.add_argument
    add("--what", default="genesis", metavar="A,B", help=f"of {', '.join(WHAT)} (default: genesis)")
    add("--seq-len", type=positive, metavar="N", help="bytes of a row (default: the preset's)")
    add("--batch-size", type=machine.several, metavar="N,N", help="rows of a step (default: 8,16,32,64,128)")
    add("--peak", type=float, metavar="TFLOPS", help=f"of the device (default: {PEAK:g} on CUDA, an H100 in bf16)")
    add("--profile", action="store_true", help="tables of where a step's time goes, at the best batch size of each")
    return machine.read_arguments(parser, argv, {"repeats": 30, "batch_size": (8, 16, 32, 64, 128)}, QUICK)


def main(argv: list[str] | None = None) -> int:
    arguments = parse(argv)
    return guarded("train.py", lambda: run(arguments))


def base_setting(arguments: argparse.Namespace, device: torch.device, folder: str, what: str, rows: int) -> Setting:
    """What all lines of a table share. Raises ValueError for what cannot be trained; `rows` is the largest batch."""
    config = machine.model_config(arguments, device)
    setting = Setting(
        what=what,
        preset=arguments.preset,
        config=config,
        seq_len=arguments.seq_len,
        batch_size=rows,
        amp=arguments.amp,
        graph=not arguments.no_graph,
        text=Path(folder, "noise.bin"),
        folder=Path(folder),
    )
    # Checked, and the text encoded, once here: a line that fails does not end the others.
    options = TrainingOptions.build(
        setting.preset, "pydoc", seq_len=setting.seq_len, batch_size=rows, amp=setting.amp, **WHAT[what]
    )
    if arguments.corpus:
        if not Path(arguments.corpus).is_file():
            raise ValueError(f"--corpus {arguments.corpus}: accepted is a file")
        setting = replace(setting, text=Path(arguments.corpus).resolve())
    else:
        size = max(2**16 if arguments.quick else NOISE, 2 * options.seq_len * rows)
        setting.text.write_bytes(np.random.default_rng(SEED).bytes(size))
    open_store(SourceSpec(files=(str(setting.text),)), cache_dir=setting.cache, progress=False)
    return replace(setting, seq_len=options.seq_len)


def run(arguments: argparse.Namespace) -> int:
    if arguments.peak is not None and not 0 < arguments.peak < math.inf:
        raise ValueError(f"--peak {arguments.peak}: accepted is a number above 0")
    names = machine.chosen("--what", arguments.what, list(WHAT))
    device = machine.set_up(arguments)
    if arguments.peak is None and device.type == "cuda":
        arguments.peak = PEAK
    with tempfile.TemporaryDirectory() as folder:
        base = base_setting(arguments, device, folder, names[0], max(arguments.batch_size))
        report = Report(arguments, device, COLUMNS)
        report.more = {"config": base.config.to_dict(), "process_seconds": machine.process_seconds()}
        best: dict[str, Row] = {}
        for what in names:
            for size in arguments.batch_size:
                setting = replace(base, what=what, batch_size=size)
                row = line(setting, device, arguments)
                report.add(row)
                if "step_ms" in row and (what not in best or per_row(row) < per_row(best[what])):
                    best[what] = row
        report.notes = notes(report.rows, best, base, arguments, report.more["process_seconds"])
        code = report.finish()
        if arguments.profile:
            profiles(report, best, base, device)
    return code


def per_row(row: Row) -> float:
    """Milliseconds for a row of a batch."""
    return row["step_ms"] / row["batch_size"]


def line(setting: Setting, device: torch.device, arguments: argparse.Namespace) -> Row:
    """A row of the table."""
    row = {"what": setting.what, "seq_len": setting.seq_len, "batch_size": setting.batch_size}
    found, told = machine.attempt(lambda: measure(setting, device, arguments.repeats))
    machine.release()
    if found and arguments.peak:
        found["share_of_floor"] = found["bytes_per_second"][1] * found["flop_per_byte"] / (arguments.peak * 1e12)
    return row | (found or {}) | told


def profiles(report: Report, best: dict[str, Row], base: Setting, device: torch.device) -> None:
    """Print the tables of --profile, and add them to the JSON file."""
    report.more["profiles"] = []
    for what, row in best.items():
        setting = replace(base, what=what, batch_size=row["batch_size"])
        found, told = machine.attempt(
            lambda setting=setting, row=row: profile_tables(
                profile_step(setting, device), setting, row["step_ms"], device
            ),
            optional=True,
        )
        machine.release()
        table, data = found or (f"profile of {what}: {told['note']}", {"what": what} | told)
        print(f"\n{table}", flush=True)
        report.more["profiles"].append(data)
        report.write()


def notes(
    rows: list[Row], best: dict[str, Row], base: Setting, arguments: argparse.Namespace, before: float | None
) -> list[str]:
    """What a reader of the table has to know, a line each."""
    lines = [f"{machine.model_name(arguments)}, rows of {base.seq_len} bytes, amp {base.amp}"]
    if before is not None:
        lines[0] += f"; the first line began {before:.1f} s after the process"
    for what, row in best.items():
        floor = ""
        if arguments.peak:
            floor = f" (floor {arguments.peak * 1e6 / row['flop_per_byte']:.2f} MB/s at {arguments.peak:g} TFLOP/s)"
        lines.append(
            f"{what}: best at batch {row['batch_size']}, {COLUMNS['MB/s'](row)} MB/s; "
            f"{row['parameters'] / 1e6:.2f} M parameters, {row['flop_per_byte'] / 1e6:.2f} MFLOP a byte{floor}; "
            "the optimizer's products are another "
            f"{row['optimizer_flop_per_step'] / row['batch_size'] / row['seq_len'] / 1e6:.2f}"
        )
    lines += [f"{row['what']}: {row['skipped_steps']} steps skipped" for row in rows if row.get("skipped_steps")]
    return lines


if __name__ == "__main__":
    sys.exit(main())
