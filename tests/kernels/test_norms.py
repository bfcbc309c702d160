"""Norms, residual sums, thinking steps and the mixers' fusion against their formulas in float64: PyTorch and kernels.

Errors are measured in units of the largest value of an output or a gradient: 3e-6 in float32; where inputs are bfloat16
2⁻⁶, for results that are rounded to it after a sum that was (Triton's interpreter cuts off instead of rounding).
"""

import os

import pytest
import torch

from model.kernels import fusion, norms
from model.kernels.fusion import fuse
from model.kernels.norms import add_rms_norm, rms_norm, think
from model.layers.block import HybridBlock
from model.layers.reasoning import RecurrentReasoningBlock
from model.layers.rotary import Rotary
from tests.conftest import TINY, AGIFormerConfig

CUDA = torch.cuda.is_available()
EPS, RECALL_EPS = 1e-6, 1e-3
EXACT, HALF = 3e-6, 2.0**-6
F32, BF16 = torch.float32, torch.bfloat16


def normed(x: torch.Tensor, eps: float = EPS) -> torch.Tensor:
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt()


def logistic(x: torch.Tensor) -> torch.Tensor:
    return 1 / (1 + (-x).exp())


def thought_through(z, h, gate, thought):
    return z + (1 - logistic(h)) * logistic(gate) * thought


def fused(gate, attended, recalled, heads=4, recall_eps=RECALL_EPS):
    a, r = attended.unflatten(-1, (heads, -1)), recalled.unflatten(-1, (heads, -1))
    share = logistic(gate)
    return share * normed(a).flatten(-2) + (1 - share) * normed(r, recall_eps).flatten(-2)


def with_halt(z, w, b):
    return z, normed(z) @ w.T + b, normed(z), normed(z)


# name: (the shapes of the inputs for rows × D, the formula, ours; both give a tuple of tensors).
ROW, ONE, WEIGHT, BIAS = "row", "one", "weight", "bias"
CASES = {
    "norm": ((ROW,), lambda x: (normed(x),), lambda impl, x: (rms_norm(x, EPS, impl),)),
    "pass": ((ROW,), lambda x: (x, normed(x)), lambda impl, x: add_rms_norm(x, None, EPS, impl=impl)),
    "three": ((ROW,), lambda x: (x, *[normed(x)] * 3), lambda impl, x: add_rms_norm(x, None, EPS, 3, impl)),
    "add": ((ROW, ROW), lambda x, y: (x + y, normed(x + y)), lambda impl, x, y: add_rms_norm(x, y, EPS, impl=impl)),
    "begin": ((ROW, WEIGHT, BIAS), with_halt, lambda impl, z, *halt: think(z, None, halt, EPS, 2, impl)),
    "think": (
        (ROW, ONE, ROW, ROW, WEIGHT, BIAS),
        lambda z, h, gate, thought, *halt: with_halt(thought_through(z, h, gate, thought), *halt),
        lambda impl, z, h, gate, thought, *halt: think(z, (h, gate, thought), halt, EPS, 2, impl),
    ),
    "end": (
        (ROW, ONE, ROW, ROW),
        lambda *inputs: (thought_through(*inputs),),
        lambda impl, z, *step: think(z, step, None, EPS, impl=impl),
    ),
    "fuse": ((ROW, ROW, ROW), lambda *x: (fused(*x),), lambda impl, *x: (fuse(*x, 4, EPS, RECALL_EPS, impl),)),
}
# The types of the inputs under autocast, and those of the outputs.
HALVES = {
    "norm": ((BF16,), (BF16,)),
    "pass": ((BF16,), (BF16, BF16)),
    "three": ((BF16,), (BF16,) * 4),
    "add": ((BF16, BF16), (BF16, BF16)),
    "begin": ((BF16, F32, F32), (BF16, F32, BF16, BF16)),
    "think": ((BF16, F32, BF16, BF16, F32, F32), (BF16, F32, BF16, BF16)),
    "end": ((BF16, F32, BF16, BF16), (BF16,)),
    "fuse": ((BF16, BF16, F32), (BF16,)),
}


def inputs(name: str, rows: tuple[int, ...], D: int, device: str = "cpu") -> list[torch.Tensor]:
    """Rows of very different sizes, from where ε counts to far beyond."""
    g = torch.Generator().manual_seed(D)
    shapes = {ROW: (*rows, D), ONE: (*rows, 1), WEIGHT: (1, D), BIAS: (1,)}
    found = [torch.randn(shapes[kind], generator=g) for kind in CASES[name][0]]
    sizes = torch.logspace(-3, 1, found[0][..., 0].numel()).view(*rows, 1)
    if name in ("norm", "pass", "three", "fuse"):
        found = [found[0] * sizes, *(x * sizes.flip(0) for x in found[1:])]
    return [x.to(device) for x in found]


def run(function, given, types, wanted=None):
    """Outputs and gradients: those of the outputs whose numbers are `wanted` (all when None), 0 where there is none."""
    given = [x.detach().to(dtype).requires_grad_() for x, dtype in zip(given, types)]
    outputs = function(*given)
    g = torch.Generator().manual_seed(1)
    grads = [torch.randn(y.shape, generator=g).to(y) for y in outputs]
    picked = range(len(outputs)) if wanted is None else wanted
    gradients = torch.autograd.grad([outputs[i] for i in picked], given, [grads[i] for i in picked], allow_unused=True)
    for x, gradient in zip(given, gradients):
        assert gradient is None or (gradient.dtype, gradient.shape) == (x.dtype, x.shape)
    gradients = [torch.zeros_like(x) if gradient is None else gradient for x, gradient in zip(given, gradients)]
    return list(outputs), gradients


def check(name, impl, rows, D, half=False, types=None, wanted=None, device="cpu"):
    """One implementation against the formula, within the bounds above."""
    shapes, formula, ours = CASES[name]
    kinds, results = HALVES[name] if half else ((F32,) * len(shapes), None)
    kinds, results = types or (kinds, results)
    given = [
        x.to(dtype) for x, dtype in zip(inputs(name, rows, D, device), kinds)
    ]  # the formula gets the rounded values
    expected = run(formula, given, (torch.float64,) * len(given), wanted)
    found = run(lambda *x: ours(impl, *x), given, kinds, wanted)
    if results is not None:
        assert tuple(y.dtype for y in found[0]) == results
    bound = HALF if BF16 in kinds else EXACT
    for x, y in zip([*found[0], *found[1]], [*expected[0], *expected[1]]):
        assert x.isfinite().all() and x.shape == y.shape
        assert (x.double() - y).abs().max().item() <= bound * max(1e-3, y.abs().max().item())


SHAPES = [((300,), 60), ((1,), 4), ((3, 1), 2048)]  # several programs and a part, one row, the widest
interpreter = pytest.mark.skipif(
    norms.triton is None or os.environ.get("TRITON_INTERPRET") != "1",
    reason="needs the package triton, and TRITON_INTERPRET=1, which conftest sets where there is no CUDA device",
)
card = pytest.mark.skipif(not CUDA or norms.triton is None, reason="needs a CUDA device and the package triton")


@pytest.mark.parametrize("name", CASES)
def test_pytorch_form_is_the_formula(name):
    check(name, "torch", (2, 3), 12)


@interpreter
@pytest.mark.parametrize(("rows", "D"), SHAPES)
@pytest.mark.parametrize("name", CASES)
def test_kernel_in_the_interpreter_is_the_formula(name, rows, D):
    check(name, "triton", rows, D)


@interpreter
@pytest.mark.parametrize("name", CASES)
def test_kernel_in_the_interpreter_with_the_types_of_autocast(name):
    check(name, "triton", (5, 7), 12, half=True)


@interpreter
def test_a_float32_stream_takes_bfloat16():
    """As that of the first patch, which no product has made narrower."""
    check("add", "triton", (5,), 12, types=((F32, BF16), (F32, F32)))
    check("think", "triton", (5,), 12, types=((F32, F32, BF16, BF16, F32, F32), (F32,) * 4))


@interpreter
@pytest.mark.parametrize("impl", ["torch", "triton"])
@pytest.mark.parametrize(
    ("name", "wanted"),
    [("add", [0]), ("add", [1]), ("pass", [0]), ("three", [2]), ("think", [0]), ("think", [1]), ("think", [0, 3])],
)
def test_gradients_of_some_of_the_outputs(name, wanted, impl):
    check(name, impl, (5,), 12, wanted=wanted)


@interpreter
def test_kernels_take_strided_inputs_and_none():
    for name, (_, formula, ours) in CASES.items():
        given = inputs(name, (5, 3), 8)
        # A stride of 2, and rows in another order; then no rows.
        apart = [torch.stack([x.movedim(0, -1), x.movedim(0, -1)], -1)[..., 0].movedim(-1, 0) for x in given]
        assert not any(x.is_contiguous() for x in apart if x.numel() > 1)
        for x, y in zip(formula(*given), ours("triton", *apart)):
            torch.testing.assert_close(y, x, rtol=1e-5, atol=1e-5)
        empty = [x[:, :0] if x.dim() == 3 else x for x in given]
        outputs, gradients = run(lambda *x, ours=ours: ours("triton", *x), empty, (F32,) * len(empty))
        assert all(y.numel() == 0 for y in outputs) and not any(x.any() for x in gradients)


@interpreter
def test_a_halted_step_changes_nothing():
    z, h, gate, thought, *halt = inputs("think", (4,), 12)
    h[::2] = torch.inf
    leaves = [x.requires_grad_() for x in (z, h, gate, thought)]
    out = think(z, (h, gate, thought), halt, EPS, 2, "triton")
    assert torch.equal(out[0][::2], z[::2]) and (out[0][1::2] != z[1::2]).all()
    gradients = torch.autograd.grad(out[0].square().sum() + out[1].sum(), leaves)
    for gradient in gradients[1:]:
        assert gradient.isfinite().all() and not gradient[::2].any() and gradient[1::2].all()


@interpreter
def test_a_reader_without_a_gradient():
    """What reads a norm may have none to give: then its input has none."""

    class Silent(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.sum()

        @staticmethod
        def backward(ctx, grad):
            return None

    for impl in ("torch", "triton"):
        x = torch.randn(3, 8, requires_grad=True)
        Silent.apply(rms_norm(x, EPS, impl)).backward()
        assert x.grad is None


@interpreter
def test_kernels_are_once_differentiable():
    """A second derivative is an error, not a zero."""
    for name, (_, _, ours) in CASES.items():
        given = [x.requires_grad_() for x in inputs(name, (3,), 4)]
        y = ours("triton", *given)[0] if name != "pass" else ours("triton", *given)[1]
        gradient = torch.autograd.grad(y.square().sum(), given[0], create_graph=True)[0]
        with pytest.raises(RuntimeError, match="once_differentiable"):
            gradient.sum().backward()


# ── where they are used ──────────────────────────────────────────────────────────────────────────────────────────────


def both(monkeypatch, module, function) -> None:
    """Outputs and all gradients of a layer agree between the PyTorch forms and the kernels, and kernels have run."""
    found, ran = {}, []
    for impl in ("torch", "triton"):

        def pick(given, width, *tensors, impl=impl):
            ran.append(impl if given == "auto" else given)
            return ran[-1]

        monkeypatch.setattr(norms, "pick", pick)
        monkeypatch.setattr(fusion, "pick", pick)
        torch.manual_seed(3)
        outputs = function()
        gradients = torch.autograd.grad(sum(y.square().sum() for y in outputs), list(module.parameters()))
        found[impl] = [*outputs, *gradients]
    assert ran.count("triton") > 2
    for x, y in zip(found["torch"], found["triton"]):
        torch.testing.assert_close(y, x, rtol=1e-4, atol=1e-4 * x.abs().max().item())


@interpreter
@pytest.mark.parametrize("options", [{}, {"halts": True}, {"skip": 2, "halts": True}, {"halt_threshold": 0.4}])
def test_thinking_is_the_same_by_kernels(options, monkeypatch):
    block = RecurrentReasoningBlock(12, 24, 3, options.get("skip", 0)).train()
    g = torch.Generator().manual_seed(0)
    for parameter in block.parameters():
        parameter.data.normal_(std=0.5, generator=g)
    z = torch.randn(6, 5, 12, generator=g)

    def function():
        halts = [] if "halts" in options else None
        out = block(z, halt_threshold=options.get("halt_threshold"), halts=halts)
        assert all(p.shape == (6, 5, 1) for p in halts or [])
        delta, p_halt = block.step(z)  # one step by itself is the first of the loop
        torch.testing.assert_close(block(z, 1), z + delta) if not block.skip else None
        return [out, p_halt, *(halts or [])]

    both(monkeypatch, block, function)


@interpreter
def test_a_block_is_the_same_by_kernels(monkeypatch):
    block = HybridBlock(32, 2, AGIFormerConfig(**TINY))
    g = torch.Generator().manual_seed(0)
    for parameter in block.parameters():
        if parameter.dim() > 1:
            parameter.data.normal_(std=0.2, generator=g)
    x = torch.randn(2, 9, 32, generator=g)
    phases = Rotary(16, 10_000.0)(9, 0, x.device)
    both(monkeypatch, block, lambda: [block(x, phases, torch.tensor(0.9))[0]])


@pytest.mark.parametrize(("rule", "eps"), [("hebbian", 1e-6), ("delta", 1e-3)])
def test_a_blocks_fusion_has_the_epsilons_of_its_rule(rule, eps):
    block = HybridBlock(32, 2, AGIFormerConfig(**(TINY | {"memory_rule": rule})))
    x, attended, recalled = torch.randn(3, 2, 5, 32, generator=torch.Generator().manual_seed(0))
    attended, recalled = attended / 30, recalled / 30  # where ε counts
    expected = fused(block.gate(x), attended, recalled, 2, eps)
    torch.testing.assert_close(block.fuse(x, attended, recalled), expected)


# ── on a card ────────────────────────────────────────────────────────────────────────────────────────────────────────


@card
@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize(("rows", "D"), [*SHAPES, ((128, 256), 512), ((4097,), 768)])
@pytest.mark.parametrize("name", CASES)
def test_kernel_on_the_card_is_the_formula(name, rows, D, half):
    check(name, "triton", rows, D, half=half, device="cuda")


@card
@pytest.mark.parametrize("name", CASES)
def test_auto_is_the_kernel_on_the_card_and_gives_the_same_bits_every_time(name):
    given, kinds = inputs(name, (999,), 512, "cuda"), HALVES[name][0]
    runs = [run(lambda *x, impl=impl: CASES[name][2](impl, *x), given, kinds) for impl in ("auto", "triton", "triton")]
    for outputs, gradients in runs[1:]:
        assert all(torch.equal(x, y) for x, y in zip([*runs[0][0], *runs[0][1]], [*outputs, *gradients]))


@card
def test_many_weights_at_once_on_the_card():
    """vmap over the halting weights alone: no kernel may read what it takes apart."""
    z, weights, biases = torch.randn(3, 5, 12).cuda(), torch.randn(4, 1, 12).cuda(), torch.randn(4, 1).cuda()
    with torch.no_grad():
        together = torch.func.vmap(lambda *halt: think(z, None, halt, EPS)[1])(weights, biases)
    for i in range(4):
        torch.testing.assert_close(together[i], normed(z) @ weights[i].T + biases[i], rtol=1e-4, atol=1e-4)


def test_what_does_not_fit_is_left_to_pytorch():
    wide = torch.zeros(2, 4096, device="meta")
    assert norms.pick("auto", 12, torch.zeros(1, 12)) == "torch"  # on a CPU
    assert norms.pick("auto", 4096, wide) == "torch"
    # Shapes that are broadcast are no kernel's, whatever is asked for.
    total, _ = add_rms_norm(torch.ones(3, 4), torch.ones(4), EPS)
    assert total.shape == (3, 4)
    with pytest.raises(ValueError, match="impl='magic': accepted are auto, torch, triton"):
        rms_norm(torch.zeros(1, 2), EPS, "magic")


def test_without_triton_the_kernels_cannot_be_had(monkeypatch):
    monkeypatch.setattr(norms, "triton", None)
    with pytest.raises(ValueError, match=r"impl='triton': needs the package triton; accepted here are auto and torch"):
        rms_norm(torch.zeros(1, 2), EPS, "triton")
