"""What the fast-weight operator costs, each form of it beside its peers, and how exact each is.

    python benchmarks/memory_op.py --json memory_op.json               # B 8, H 8, T 4096, E 64; both rules
    python benchmarks/memory_op.py --rule delta --heads 1 --length 4096 --width 256 --value-dim 64    # the byte memory
    python benchmarks/memory_op.py --forms triton,fla --repeats 100
    python benchmarks/memory_op.py --quick                             # seconds on a CPU; its numbers say nothing

A state is carried in and out, and all inputs have gradients. Peers are flash-linear-attention's simple GLA (no
normaliser) and gated delta rule, from the package fla-core where it is installed, and PyTorch's full causal attention
of the same shape. docs/performance.md explains the columns.
"""

import argparse
import math
import sys
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks import machine
from benchmarks.machine import Report, Row
from model.cli import Parser, guarded, positive
from model.kernels.hebbian import hebbian
from model.kernels.recurrent import recurrent_delta, recurrent_hebbian
from model.kernels.triton_hebbian import check

RULES = ("hebbian", "delta")
FORMS = ("recurrent", "chunked", "triton", "fla", "attention")
LONGEST_RECURRENCE = 512  # steps: it is the reference, of a handful of kernels a step
EXACT_ROWS, EXACT_HEADS = 1, 2  # of the batch, that are compared with float64
SEED = 0

DEFAULTS = {"repeats": 30, "batch": 8, "heads": 8, "length": 4096, "width": 64}
QUICK = {"repeats": 3, "batch": 1, "heads": 2, "length": 80, "width": 16}

# [q, k, v, log_decay, beta or None, M, z] → outputs that have gradients: heads [B, H, T, V], and states.
Tensors = list[Tensor | None]
Function = Callable[..., tuple[Tensor, ...]]


@dataclass(frozen=True)
class Case:
    """One row.

    Attributes:
        function, exact: what is measured, and the same in float64, by its definition.
        dtype: of q, k and v.
        heads_last: whether it wants them as [B, T, H, ...] in memory.
        optional: whether its failing is a remark.
        note: what it does differently.
        without: why it is not measured; None if it is.
    """

    rule: str
    form: str
    function: Function
    exact: Function
    dtype: torch.dtype = torch.float32
    heads_last: bool = False
    optional: bool = False
    note: str | None = None
    without: str | None = None


# ── forms ────────────────────────────────────────────────────────────────────────────────────────────────────────


def ours(q, k, v, log_decay, beta, M, z, *, impl: str) -> tuple[Tensor, ...]:
    out, (M, z) = hebbian(q, k, v, log_decay, beta=beta, state=(M, z), impl=impl)
    return (out, M) if beta is not None else (out, M, z)


def exact_ours(q, k, v, log_decay, beta, M, z) -> tuple[Tensor, ...]:
    if beta is not None:
        out, (M, _) = recurrent_delta(q, k, v, log_decay, beta, (M, z))
        return out, M
    out, (M, z) = recurrent_hebbian(q, k, v, log_decay, (M, z))
    return out, M, z


def fla_simple_gla(q, k, v, log_decay, beta, M, z, *, function: Callable) -> tuple[Tensor, ...]:
    q, k, v, log_decay = (x.transpose(1, 2) for x in (q, k, v, log_decay))  # [B, T, H, ...]
    out, M = function(q, k, v, log_decay, scale=1.0, initial_state=M, output_final_state=True)
    return out.transpose(1, 2), M


def exact_simple_gla(q, k, v, log_decay, beta, M, z) -> tuple[Tensor, ...]:
    """M_t = λ_t M_{t−1} + k_t v_tᵀ, o_t = M_tᵀ q_t."""
    outputs = []
    for t in range(q.shape[2]):
        M = log_decay[:, :, t, None, None].exp() * M + k[:, :, t, :, None] * v[:, :, t, None, :]
        outputs.append((q[:, :, t, None, :] @ M).squeeze(-2))
    return torch.stack(outputs, 2), M


def fla_gated_delta(q, k, v, log_decay, beta, M, z, *, function: Callable) -> tuple[Tensor, ...]:
    q, k, v, log_decay, beta = (x.transpose(1, 2) for x in (q, k, v, log_decay, beta))
    beta = beta.to(q.dtype)
    out, M = function(q, k, v, log_decay, beta, scale=1.0, initial_state=M, output_final_state=True)
    return out.transpose(1, 2), M


def full_attention(q, k, v, log_decay, beta, M, z, *, backend: SDPBackend | None = None) -> tuple[Tensor, ...]:
    with nullcontext() if backend is None else sdpa_kernel([backend]):
        return (F.scaled_dot_product_attention(q, k, v, is_causal=True),)


def exact_attention(q, k, v, log_decay, beta, M, z) -> tuple[Tensor, ...]:
    T = q.shape[2]
    scores = (q @ k.transpose(-1, -2)) * q.shape[-1] ** -0.5
    seen = torch.ones(T, T, dtype=torch.bool, device=q.device).tril()
    return (scores.masked_fill(~seen, -torch.inf).softmax(-1) @ v,)


def peer(module: str, name: str) -> tuple[Callable | None, str | None]:
    """A function of a package that may not be there, or why it is not."""
    try:
        return getattr(import_module(module), name), None
    except ModuleNotFoundError as error:
        return None, "not installed" if error.name and error.name.split(".")[0] == "fla" else f"not usable: {error}"
    except Exception as error:  # whatever a package does while it is imported
        return None, f"not usable: {type(error).__name__}: {error}"[:200]


def cases(arguments: argparse.Namespace, rules: list[str], forms: list[str], device: torch.device) -> Iterator[Case]:
    """All rows of the table."""
    for rule in rules:
        for impl in ("recurrent", "chunked", "triton"):
            if impl in forms:
                without = refusal(impl, arguments, device)
                yield Case(rule, impl, partial(ours, impl=impl), exact_ours, without=without)
        if "fla" in forms:
            yield from fla_cases(rule, device)
    if "attention" in forms:
        for name, backend in (
            ("", None),
            (" cuDNN", SDPBackend.CUDNN_ATTENTION),
            (" flash", SDPBackend.FLASH_ATTENTION),
        ):
            if backend is None or device.type == "cuda":
                function = partial(full_attention, backend=backend)
                optional = backend is not None
                yield Case("-", f"attention{name}", function, exact_attention, torch.bfloat16, optional=optional)


def refusal(impl: str, arguments: argparse.Namespace, device: torch.device) -> str | None:
    """Why a form of ours is not measured; None where it is."""
    if impl == "recurrent" and arguments.length > LONGEST_RECURRENCE:
        return f"not run: more than {LONGEST_RECURRENCE} steps"
    if impl == "triton":
        shape = arguments.batch, arguments.heads, arguments.length
        q, v = (torch.empty(*shape, width, device=device) for width in (arguments.width, arguments.value_dim))
        try:
            check(q, v)
        except ValueError as error:
            return f"not run: {error}"
    return None


def fla_cases(rule: str, device: torch.device) -> Iterator[Case]:
    if rule == "hebbian":
        function, without = peer("fla.ops.simple_gla", "chunk_simple_gla")
        form, call, exact, note = "fla simple GLA", fla_simple_gla, exact_simple_gla, "without normaliser"
    else:
        function, without = peer("fla.ops.gated_delta_rule", "chunk_gated_delta_rule")
        form, call, exact, note = "fla gated delta rule", fla_gated_delta, exact_ours, None
    if without is None and device.type != "cuda":
        without = "needs CUDA"
    for dtype in (torch.bfloat16, torch.float32):
        yield Case(rule, form, partial(call, function=function), exact, dtype, True, True, note, without)


# ── measuring ────────────────────────────────────────────────────────────────────────────────────────────────────


def inputs(rule: str, arguments: argparse.Namespace, dtype: torch.dtype, device: torch.device) -> Tensors:
    """[q, k, v, log_decay, beta, M, z] as the layers make them; the same numbers every time, rounded to `dtype`."""
    B, H, T, E = arguments.batch, arguments.heads, arguments.length, arguments.width
    V = arguments.value_dim
    generator = torch.Generator(device).manual_seed(SEED)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=device)

    q, k, v, log_decay = normal(B, H, T, E), normal(B, H, T, E), normal(B, H, T, V), normal(B, H, T)
    M, z, beta = normal(B, H, E, V), E * normal(B, H, E).abs(), normal(B, H, T).sigmoid()
    if rule == "hebbian":
        q, k, beta = F.elu(q) + 1, F.elu(k) + 1, None
    elif rule == "delta":
        q, k = F.normalize(q, dim=-1), F.normalize(k, dim=-1)
    q, k, v = (x.to(dtype) for x in (q, k, v))
    return [q, k, v, F.logsigmoid(log_decay + 4), beta, M, z]


def measure(case: Case, arguments: argparse.Namespace, device: torch.device) -> Row:
    """Times, memory and errors of one form."""
    tensors = inputs(case.rule, arguments, case.dtype, device)
    if case.heads_last:
        tensors[:5] = [x if x is None else x.transpose(1, 2).contiguous().transpose(1, 2) for x in tensors[:5]]
    tensors = [x if x is None else x.requires_grad_() for x in tensors]
    weight = torch.randn(tensors[2].shape, generator=torch.Generator(device).manual_seed(SEED + 1), device=device)
    weight = weight.to(case.dtype)  # what the gradients are exact for

    def forward() -> None:
        with torch.no_grad():
            case.function(*tensors)

    def both() -> None:
        with_gradients(case.function, tensors, weight)

    errors = compare(case, tensors, weight)
    worst = max(errors.values(), key=lambda error: math.inf if math.isnan(error) else error)
    row: Row = {"errors": errors, "error_forward": errors["out"], "error_worst": worst}
    for name, step in (("forward", forward), ("both", both)):
        row[f"{name}_peak_bytes"] = peak(step, device)
    for name, step in (("forward", forward), ("both", both)):
        timed, captured = captured_or_not(step, device)
        row[f"{name}_captured"] = captured
        times = machine.seconds(timed, arguments.repeats, warm_up=2, device=device)
        row[f"{name}_seconds"], row[f"{name}_ms"] = times, [1000 * t for t in machine.quartiles(times)]
    return row


def with_gradients(function: Function, tensors: Tensors, weight: Tensor) -> dict[str, Tensor]:
    """Outputs and the gradients of all inputs that they depend on, by name, for a loss that reads all outputs."""
    out, *states = function(*tensors)
    loss = (out * weight.to(out.dtype)).sum() + sum(state.sum() for state in states)
    names = ["q", "k", "v", "log_decay", "beta", "M", "z"]
    leaves = {name: x for name, x in zip(names, tensors) if x is not None}
    gradients = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
    found = {"out": out.detach()} | {f"state {name}": state.detach() for name, state in zip("Mz", states)}
    return found | {f"d {name}": gradient for name, gradient in zip(leaves, gradients) if gradient is not None}


def compare(case: Case, tensors: Tensors, weight: Tensor) -> dict[str, float]:
    """Relative errors ‖found − exact‖ / ‖exact‖ of outputs and gradients, on a part of the batch.

    The exact ones are computed in float64 from the inputs as the form is given them.
    """

    def part(x: Tensor) -> Tensor:
        return x[:EXACT_ROWS, :EXACT_HEADS]

    found = {name: part(x).double() for name, x in with_gradients(case.function, tensors, weight).items()}
    exact_tensors = [x if x is None else part(x).detach().double().requires_grad_() for x in tensors]
    exact = with_gradients(case.exact, exact_tensors, part(weight).double())
    errors = {}
    for name, expected in exact.items():
        size = expected.norm().clamp_min(torch.finfo(torch.float64).tiny)
        # z of the delta rule is handed through, and reaches nothing.
        if name in found:
            errors[name] = ((found[name] - expected).norm() / size).item()
    return errors


def captured_or_not(step: Callable[[], None], device: torch.device) -> tuple[Callable[[], None], bool]:
    """The replay of a step captured as a CUDA graph, and True; where it cannot be, the step itself."""
    if device.type != "cuda":
        return step, False
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):  # kernels are compiled, and tuned, outside
            step()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()

    def capture() -> Callable[[], None]:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            step()
        return graph.replay

    replay, told = machine.attempt(capture, optional=True)
    return (step, False) if told else (replay, True)


def peak(step: Callable[[], None], device: torch.device) -> int | None:
    """Bytes that one call takes at the most beside its inputs; None on a CPU."""
    machine.release()
    before = machine.allocated_bytes(device)
    machine.start_peak(device)
    step()
    most = machine.peak_bytes(device)
    return None if most is None or before is None else most - before


# ── command line ─────────────────────────────────────────────────────────────────────────────────────────────────


def exponent(name: str) -> Callable[[Row], str]:
    """A column of an error."""
    return lambda row: "-" if row.get(name) is None else f"{row[name]:.1e}"


def graph(row: Row) -> str:
    """Whether both times are those of a CUDA graph."""
    captured = [row.get(f"{name}_captured") for name in ("forward", "both")]
    if None in captured:
        return "-"
    return {(True, True): "yes", (False, False): "no"}.get(tuple(captured), "forward" if captured[0] else "backward")


COLUMNS: machine.Columns = {
    "rule": machine.text("rule"),
    "form": machine.text("form"),
    "type": machine.text("dtype"),
    "forward ms": machine.middle("forward_ms"),
    "quartiles": machine.spread("forward_ms"),
    "with backward ms": machine.middle("both_ms"),
    "quartiles ": machine.spread("both_ms"),
    "graph": graph,
    "peak MiB": machine.fixed("both_peak_bytes", 0, 2**-20),
    "forward MiB": machine.fixed("forward_peak_bytes", 0, 2**-20),
    "error out": exponent("error_forward"),
    "worst": exponent("error_worst"),
}


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(prog="memory_op.py", description=__doc__)
    add = parser.add_argument
    add("--rule", default=",".join(RULES), metavar="A,B", help=f"of {', '.join(RULES)} (default: both)")
    add("--forms", default=",".join(FORMS), metavar="A,B", help=f"of {', '.join(FORMS)} (default: all)")
    add("--batch", type=positive, metavar="B", help="rows (default: 8)")
    add("--heads", type=positive, metavar="H", help="(default: 8)")
    add("--length", type=positive, metavar="T", help="steps (default: 4096)")
    add("--width", type=positive, metavar="E", help="of queries and keys (default: 64)")
    add("--value-dim", type=positive, metavar="V", help="of values (default: that of keys)")
    arguments = machine.read_arguments(parser, argv, DEFAULTS, QUICK)
    machine.fill_in(arguments, {"value_dim": arguments.width})
    return arguments


def main(argv: list[str] | None = None) -> int:
    arguments = parse(argv)
    return guarded("memory_op.py", lambda: run(arguments))


def run(arguments: argparse.Namespace) -> int:
    rules = machine.chosen("--rule", arguments.rule, list(RULES))
    forms = machine.chosen("--forms", arguments.forms, list(FORMS))
    device = machine.set_up(arguments)
    report = Report(arguments, device, COLUMNS)
    report.more["fla_core"] = machine.version("fla-core")
    for case in cases(arguments, rules, forms, device):
        row = {"rule": case.rule, "form": case.form, "dtype": str(case.dtype).removeprefix("torch.")}
        if case.without:
            report.add(row | {"note": case.without})
            continue
        found, told = machine.attempt(partial(measure, case, arguments, device), optional=case.optional)
        machine.release()
        report.add(row | (found or {}) | ({"note": case.note} if case.note and not told else told))
    size = f"B {arguments.batch}, H {arguments.heads}, T {arguments.length}, E {arguments.width}"
    report.notes = [
        f"{size}, V {arguments.value_dim}; a state carried in and out; errors against float64 on "
        f"{min(EXACT_ROWS, arguments.batch)} row and {min(EXACT_HEADS, arguments.heads)} heads, of attention against "
        "attention"
    ]
    return report.finish()


if __name__ == "__main__":
    sys.exit(main())
