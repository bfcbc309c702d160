"""The Hebbian rule on packed projections against its recurrence in float64: outputs, states and all gradients.

Without a card the kernels run in Triton's interpreter, a few heads and steps at a time; the last part wants a card.
"""

import os

import pytest
import torch
import torch.nn.functional as F

from model.kernels import packed_hebbian as kernels
from model.kernels.packed_hebbian import packed_hebbian
from model.layers import memory as memory_module
from model.layers.memory import HebbianMemory, MemoryState

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
anywhere = pytest.mark.skipif(
    kernels.triton is None or (not CUDA and os.environ.get("TRITON_INTERPRET") != "1"),
    reason="needs the package triton, and CUDA or TRITON_INTERPRET=1, which conftest sets where there is no card",
)
needs_cuda = pytest.mark.skipif(not CUDA or kernels.triton is None, reason="needs CUDA and the package triton")
TOLERANCE = 1e-5  # relative, DESIGN: HebbianMemory


def formula(a: dict, alpha: float, H: int) -> tuple[torch.Tensor, ...]:
    """One step after another: (out, M, z)."""
    B, T, width = a["heads"].shape
    E, M, z, outputs = width // H // 3, a["M"], a["z"], []
    for t in range(T):
        q, k, v, gate = a["heads"][:, t].split((H * E, H * E, H * E, H), -1)
        q, k, v = (F.elu(x.view(B, H, E)) + 1 if x is not v else x.view(B, H, E) for x in (q, k, v))
        decay = alpha * torch.sigmoid(gate + a["bias"])
        M = decay[:, :, None, None] * M + k.unsqueeze(-1) * v.unsqueeze(-2)
        z = decay[:, :, None] * z + k
        outputs.append(((q.unsqueeze(-2) @ M).squeeze(-2) / ((q * z).sum(-1, keepdim=True) + 1e-6)).flatten(1))
    return torch.stack(outputs, 1), M, z


def inputs(T: int, E: int, B: int = 1, H: int = 1) -> dict[str, torch.Tensor]:
    """Of float32's values, so that only what is done with them is compared."""
    g = torch.Generator().manual_seed(T + E)
    shapes = {"heads": (B, T, 3 * H * E + H), "bias": (H,), "M": (B, H, E, E), "z": (B, H, E)}
    a = {name: torch.randn(shape, generator=g).double() for name, shape in shapes.items()}
    return a | {"bias": a["bias"] + 2, "z": a["z"].abs()}


def call(a: dict, alpha: float, H: int, impl: str) -> tuple[torch.Tensor, ...]:
    state = (a["M"], a["z"]) if "M" in a else None
    out, (M, z) = packed_hebbian(a["heads"], a["bias"], torch.tensor(alpha, device=DEVICE), H, state=state, impl=impl)
    return out, M, z


def run(function, a: dict, dtype: torch.dtype, lay=lambda x: x) -> tuple[list, list]:
    """(outputs, gradients of a random weighting of all of them)."""
    leaves = {name: x.to(DEVICE, dtype, copy=True).requires_grad_() for name, x in a.items()}
    outputs = function({name: lay(x) for name, x in leaves.items()})
    g = torch.Generator().manual_seed(1)
    weights = [torch.randn(x.shape, generator=g, dtype=torch.float64).to(DEVICE, x.dtype) for x in outputs]
    gradients = torch.autograd.grad(sum((x * w).sum() for x, w in zip(outputs, weights)), list(leaves.values()))
    return [x.detach() for x in outputs], list(gradients)


def error(found: torch.Tensor, expected: torch.Tensor, floor: float = 0.0) -> float:
    size = max(expected.norm().item(), floor)
    difference = (found.double() - expected).norm().item()
    return difference / size if size else difference


def check(a: dict, alpha: float, H: int, impl: str = "triton") -> None:
    """All outputs and gradients; those of q, k, v and the gates are parts, each on its own scale."""
    alpha = torch.tensor(alpha).item()  # float32's value
    expected = run(lambda a: formula(a, alpha, H), a, torch.float64)
    found = run(lambda a: call(a, alpha, H, impl), a, torch.float32)
    for x, y in zip(found[0], expected[0]):
        assert x.dtype == torch.float32 and x.shape == y.shape
        assert error(x, y) < TOLERANCE
    HE = a["heads"].shape[2] // H // 3 * H
    parts = [gradients[0].split((HE, HE, HE, H), -1) for gradients in (found[1], expected[1])]
    # Where nothing is remembered the output is v, whatever q is: its gradient is a difference of equal terms.
    floor = parts[1][2].norm().item() * (alpha == 0)
    for x, y in zip(*parts):
        assert x.isfinite().all() and error(x, y, floor) < TOLERANCE
    for x, y in zip(found[1][1:], expected[1][1:]):
        assert x.isfinite().all() and error(x, y) < TOLERANCE


@anywhere
@pytest.mark.parametrize(
    ("alpha", "T", "E", "B", "H"),
    # Parts of a chunk, its last step and one too many; E in one half and in two, and not a power of two.
    [
        (0.9, 1, 8, 2, 1),
        (0.1, 17, 24, 1, 2),
        (0.5, 33, 64, 1, 1),
        (0.99, 66, 40, 1, 1),
        (0.0, 18, 8, 1, 1),
    ],
)
def test_kernels_are_the_recurrence(alpha, T, E, B, H):
    check(inputs(T, E, B, H), alpha, H)


@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
def test_pytorch_form_is_the_recurrence(alpha):
    check(inputs(20, 8, 2, 2), alpha, 2, "torch")
    a = {name: x.to(DEVICE) for name, x in inputs(20, 8, 2, 2).items()}
    out, M, z = call(a, 0.5, 2, "auto")
    assert out.dtype == M.dtype == z.dtype == torch.float64
    for x, y in zip((out, M, z), formula(a, 0.5, 2)):
        torch.testing.assert_close(x, y)
    del a["M"]
    assert call({name: x.bfloat16() for name, x in a.items()}, 0.5, 2, "auto")[0].dtype == torch.float32


@anywhere
def test_erasing_steps_and_extreme_gates():
    """−inf within a chunk, at its last and at its first step; steps that come to the same; λ that is 1."""
    a = inputs(40, 8)
    gates = a["heads"][..., -1]
    for step, value in {16: "-inf", 20: -200, 25: -1e30, 31: "-inf", 32: "-inf", 33: 100, 34: 1e30, 35: "inf"}.items():
        gates[:, step] = float(value)
    check(a, 0.9, 1)
    # Nothing from before the last one is left, to the bit.
    a = {name: x.float().to(DEVICE) for name, x in a.items()}
    before = call(a, 0.9, 1, "triton")
    a["heads"][:, :32, :-1] += 3
    after = call(a | {"M": a["M"] + 100}, 0.9, 1, "triton")
    assert torch.equal(before[0][:, 32:], after[0][:, 32:]) and torch.equal(before[1], after[1])
    assert not torch.equal(before[0][:, 31], after[0][:, 31])


@anywhere
def test_long_sums_and_nearly_no_decay():
    """Decays of e⁻⁸⁰ before ordinary ones in a chunk; and 1 − λ of 6e-6, of which no digit may be lost."""
    a = inputs(32, 8)
    a["heads"][:, :10, -1] = -80.0
    check(a, 1.0, 1)
    a["heads"][..., -1], a["bias"][:] = 12.0, 0.0
    a["M"] *= 1000
    expected = formula(a, 1.0, 1)[1]
    found = call({name: x.float().to(DEVICE) for name, x in a.items()}, 1.0, 1, "triton")[1]
    assert error(found.cpu(), expected) < 5e-7


@anywhere
def test_large_and_missing_numbers():
    """φ of −600 is 0 and of 600 linear; a NaN reaches the outputs from its step on, and none of earlier chunks."""
    a = inputs(34, 8)
    a["heads"][:, 3:9] *= 300
    check(a, 0.9, 1)
    a["heads"][0, 33, 9] = float("nan")  # a key
    out = call({name: x.float().to(DEVICE) for name, x in a.items()}, 0.9, 1, "triton")[0]
    assert out[0, : kernels.CHUNK].isfinite().all() and out[0, 33:].isnan().all()


@anywhere
@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # the interpreter's
@pytest.mark.parametrize(
    ("place", "number"), [("q", "inf"), ("k", "nan"), ("v", "inf"), ("gate", "nan"), ("M", "-inf"), ("d_out", "inf")]
)
def test_what_is_not_finite_stays_so(place, number):
    """Wherever it comes from, outputs and gradients tell, and what is finite is right."""
    a = {name: x.float().to(DEVICE) for name, x in inputs(5, 8).items()}
    clean = call(a, 0.9, 1, "torch")[0]
    weight = torch.ones(1, 5, 8, device=DEVICE)
    if place in ("M", "d_out"):
        (a["M"][0, 0, 1] if place == "M" else weight[0, 3])[2] = float(number)
    else:
        a["heads"][0, 2, 8 * ("q", "k", "v", "gate").index(place)] = float(number)
    out = call({name: x.requires_grad_() for name, x in a.items()}, 0.9, 1, "triton")[0]
    assert place == "d_out" or not out[0, 2:].isfinite().all()
    before = out[0, : 5 if place == "d_out" else 2]
    assert place == "M" or torch.where(before.isfinite(), before - clean[0, : len(before)], 0).abs().max() < 1e-4
    assert not torch.autograd.grad(out, a["heads"], weight)[0].isfinite().all()


@anywhere
def test_large_and_small_scales_give_the_same_digits():
    """Values times 2⁸⁰ or gradients times 2⁻⁹⁰ leave nothing infinite or 0: what comes of them is that many times as
    large, to the bit."""
    heads, bias = (inputs(5, 8)[name].float().to(DEVICE) for name in ("heads", "bias"))
    found = []
    for of_values, of_gradient in ((1, 1), (2.0**-70, 2.0**40), (2.0**80, 2.0**-90)):
        leaf = torch.cat([heads[..., :16], heads[..., 16:24] * of_values, heads[..., 24:]], -1).requires_grad_()
        out, M, _ = call({"heads": leaf, "bias": bias}, 0.9, 1, "triton")
        (gradient,) = torch.autograd.grad(out, leaf, torch.ones_like(out) * of_gradient)
        parts = [*gradient[..., :16].split(8, -1), gradient[..., 16:24] * of_values, gradient[..., 24:]]
        found.append([out / of_values, M / of_values, *(x / of_gradient / of_values for x in parts)])
        assert all(x.isfinite().all() and x.any() for x in found[-1])
        assert all(torch.equal(x, y) for x, y in zip(found[-1], found[0])), (of_values, of_gradient)


@anywhere
def test_a_split_with_the_state_carried_is_the_whole():
    a = inputs(37, 8, 1, 2)
    expected = formula(a, torch.tensor(0.9).item(), 2)
    a = {name: x.float().to(DEVICE) for name, x in a.items()}
    outputs = []
    for part in (slice(0, 18), slice(18, 19), slice(19, None)):
        out, a["M"], a["z"] = call(a | {"heads": a["heads"][:, part]}, 0.9, 2, "triton")
        outputs.append(out)
    for x, y in zip((torch.cat(outputs, 1), a["M"], a["z"]), expected):
        assert error(x.cpu(), y) < TOLERANCE


@anywhere
def test_without_a_state_and_with_the_gradients_of_one_output():
    a = {name: x.float().to(DEVICE) for name, x in inputs(5, 8).items()}
    zeros = a | {"M": torch.zeros_like(a["M"]), "z": torch.zeros_like(a["z"])}
    none = {name: a[name].requires_grad_() for name in ("heads", "bias")}
    outputs = {impl: call(none, 0.9, 1, impl) for impl in ("triton", "torch")}
    for outs in zip(*outputs.values()):
        gradients = [torch.autograd.grad(x.sum(), list(none.values()), retain_graph=True) for x in outs]
        for x, y in zip(*gradients):
            torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-5)
    with torch.no_grad():
        for x, y in zip(outputs["triton"], call(zeros, 0.9, 1, "triton")):
            assert torch.equal(x, y) and not y.requires_grad
    empty = {"heads": torch.zeros(0, 3, 25, device=DEVICE, requires_grad=True), "bias": none["bias"]}
    call(empty, 0.9, 1, "triton")[0].sum().backward()
    assert not none["bias"].grad.any() and empty["heads"].grad.shape == (0, 3, 25)


@anywhere
def test_strided_inputs_give_the_same_bits_and_a_second_derivative_is_an_error():
    a = inputs(3, 8)
    a, found = {name: x.float().to(DEVICE).requires_grad_() for name, x in a.items()}, []
    for lay in (lambda x: x, lambda x: torch.stack([x, x + 1], -1)[..., 0]):
        outputs = call({name: lay(x) for name, x in a.items()}, 0.9, 1, "triton")
        gradients = torch.autograd.grad(sum(x.square().sum() for x in outputs), list(a.values()), create_graph=True)
        found.append([*outputs, *gradients])
    assert all(torch.equal(x, y) for x, y in zip(*found))
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradients[0].sum().backward()


def test_many_models_at_once_take_the_pytorch_form():
    one, other = ({name: x.to(DEVICE) for name, x in inputs(4, 8, B).items()} for B in (2, 2))
    other["heads"] = other["heads"] + 1
    both = {name: torch.stack([one[name], other[name]]) for name in one}
    with torch.no_grad():
        found = torch.func.vmap(lambda a: call(a, 0.9, 1, "auto")[0])(both)
        for x, a in zip(found, (one, other)):
            torch.testing.assert_close(x, call(a, 0.9, 1, "torch")[0])
    assert not torch.func.vmap(lambda x: torch.tensor(kernels.suits(x, 8, 8)))(torch.zeros(2, 32, 64, 8)).any()


def test_bad_input_is_named(monkeypatch):
    a = {name: x.float().to(DEVICE) for name, x in inputs(3, 8).items()}
    with pytest.raises(ValueError, match="impl='fast': accepted are auto, torch, triton"):
        call(a, 0.9, 1, "fast")
    for shape in ((3, 25), (1, 0, 25), (1, 3, 24), (1, 3, 26)):
        with pytest.raises(ValueError, match=r"heads has shape .* accepted is \[B, T ≥ 1, 3 · 1 · E \+ 1\]"):
            call({"heads": torch.zeros(shape), "bias": a["bias"]}, 0.9, 1, "auto")
    if kernels.triton is not None:
        with pytest.raises(ValueError, match=r"heads has dtype torch.float64: .* accepted is torch.float32"):
            call(a | {"heads": a["heads"].double()}, 0.9, 1, "triton")
        with pytest.raises(ValueError, match="heads of E=65: with impl='triton', accepted is 1 to 64"):
            call({"heads": torch.zeros(1, 3, 196, device=DEVICE), "bias": a["bias"]}, 0.9, 1, "triton")
    monkeypatch.setattr(kernels, "triton", None)
    with pytest.raises(ValueError, match="impl='triton': accepted on a CUDA device with triton installed"):
        call(a, 0.9, 1, "triton")


@anywhere
def test_a_layer_gives_its_projection_as_it_lies(monkeypatch):
    """The layer by its kernels against the layer by PyTorch's operations: outputs, states, gradients of all weights."""
    torch.manual_seed(0)
    layer = HebbianMemory(16, 2).to(DEVICE)
    with torch.no_grad():
        layer.gates.weight.normal_()
    x, calls = torch.randn(1, 9, 16, device=DEVICE).bfloat16().requires_grad_(), []

    def packed(*arguments, **rest):
        calls.append(1)
        return packed_hebbian(*arguments, **rest, impl="triton")

    monkeypatch.setattr(memory_module, "packed_hebbian", packed)
    results = []
    for fits in (False, True):
        monkeypatch.setattr(memory_module, "suits", lambda *_, fits=fits: fits)
        with torch.autocast(DEVICE, torch.bfloat16):
            alpha = torch.tensor(0.9, device=DEVICE)
            _, state = layer(x[:, :4], alpha)
            out, state = layer(x[:, 4:], alpha, state)
        assert isinstance(state, MemoryState) and state.read is None
        outputs = out, state.M, state.z
        gradients = torch.autograd.grad(sum(y.square().sum() for y in outputs), [x, *layer.parameters()])
        results.append([*outputs, *gradients])
    assert len(calls) == 2
    for i, (found, expected) in enumerate(zip(results[1], results[0])):
        assert found.dtype == expected.dtype
        bound = 1e-2 if i == 3 else TOLERANCE  # x's gradient has x's type
        assert error(found, expected.double()) < bound
    # Who thinks with the state later, other rules and other forms need keys and values.
    layer.readable = True
    assert layer(x, alpha)[1].read is not None
    layer.readable = False
    layer(x, alpha, impl="chunked")
    HebbianMemory(16, 2, "delta").to(DEVICE)(x, alpha)
    assert len(calls) == 2


@needs_cuda
@pytest.mark.parametrize("alpha", [0.0, 0.1, 0.5, 0.99, 1.0])
@pytest.mark.parametrize(
    ("T", "E", "B", "H"), [(256, 64, 4, 8), (300, 64, 2, 3), (1, 64, 1, 1), (65, 32, 2, 2), (47, 20, 3, 1)]
)
def test_on_the_card(alpha, T, E, B, H):
    check(inputs(T, E, B, H), alpha, H)


@needs_cuda
def test_long_sequences_and_erasing_steps_on_the_card():
    a = inputs(2048, 64, 1, 2)
    check(a, 1.0, 2)
    for step, value in {15: "-inf", 16: "-inf", 50: -1e30, 63: "-inf", 64: -200, 100: "-inf", 101: "inf"}.items():
        a["heads"][:, step, -2:] = float(value)
    check(a, 0.9, 2)


@needs_cuda
def test_auto_is_the_kernels_on_the_card_and_its_captured_graph():
    """Captured once, replayed on other inputs: what eager calls give, to the bit."""
    rows = kernels.PROGRAMS // 8
    sizes = {"heads": (rows, 100, 1544), "bias": (8,)}
    leaves = {name: torch.randn(shape, device="cuda", requires_grad=True) for name, shape in sizes.items()}
    assert kernels.suits(leaves["heads"], 8, 64) and not kernels.suits(leaves["heads"][:-1], 8, 64)

    alpha = torch.tensor(0.9, device="cuda")

    def step(impl="auto"):
        out, (M, z) = packed_hebbian(leaves["heads"], leaves["bias"], alpha, 8, impl=impl)
        return [out, M, z, *torch.autograd.grad(out.square().sum() + M.sum() + z.sum(), list(leaves.values()))]

    for found, expected in zip(step(), step("triton")):
        assert torch.equal(found, expected)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    with torch.no_grad():
        for x in leaves.values():
            x.mul_(0.7)
    graph.replay()
    for found, expected in zip(captured, step()):
        assert torch.equal(found, expected)


@needs_cuda
def test_no_product_is_wgmma():
    """Which is what Triton miscompiles on Hopper."""
    for E in (8, 64):
        run(lambda a: call(a, 0.9, 1, "triton"), inputs(40, E), torch.float32)
    made = [each for f in vars(kernels).values() if hasattr(f, "device_caches") for each in f.device_caches.values()]
    compiled = [kernel for caches in made for kernel in caches[0].values()]
    assert sum("mma.sync" in kernel.asm["ptx"] for kernel in compiled) >= 6
    assert not [kernel.name for kernel in compiled if "wgmma" in kernel.asm["ptx"]]
