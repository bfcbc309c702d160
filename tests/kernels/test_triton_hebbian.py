"""The Triton kernels of the fast weights against the float64 recurrence: both rules, forward and every gradient.

Without a card they run in Triton's interpreter, a few heads and steps at a time; the last part wants a card.
"""

import os

import pytest
import torch
import torch.nn.functional as F

from model.kernels import hebbian
from tests.kernels.test_hebbian import RULES, TOLERANCE
from tests.kernels.test_hebbian import inputs as random_inputs

pytest.importorskip("triton")

from model.kernels import triton_delta as delta_kernels
from model.kernels import triton_hebbian as kernels
from model.kernels.triton_hebbian import triton_hebbian

CUDA = torch.cuda.is_available()
anywhere = pytest.mark.skipif(
    not CUDA and os.environ.get("TRITON_INTERPRET") != "1",
    reason="needs a CUDA device, or TRITON_INTERPRET=1, which conftest sets where there is none",
)
needs_cuda = pytest.mark.skipif(not CUDA, reason="needs a CUDA device")
DEVICE = "cuda" if CUDA else "cpu"


def inputs(
    rule: str, alpha: float, T: int, E: int, B: int = 1, H: int = 1, V: int | None = None
) -> dict[str, torch.Tensor]:
    """Of float32's values, so that only what is done with them is compared. V is E unless given."""
    V = V or E
    a = random_inputs(rule, alpha, T, max(E, V), B, H, seed=T + E)
    a |= {"v": a["v"][..., :V], "M": a["M"][..., :E, :V]} | {name: a[name][..., :E] for name in ("q", "k", "z")}
    if rule == "delta":
        a["k"] = F.normalize(a["k"], dim=-1)
    return {name: x.float().double() for name, x in a.items()}


def of_bytes(T: int, E: int, V: int, B: int = 1, H: int = 1) -> dict[str, torch.Tensor]:
    """What a byte memory gives: queries of norm 1, one decay a head and none in the first, one step in ten written."""
    a = inputs("delta", 1.0, T, E, B, H, V)
    a["q"] = F.normalize(a["q"], dim=-1).float().double()
    a["log_decay"] = -torch.arange(H, dtype=torch.float64)[:, None].expand(B, H, T) / 512
    a["beta"][torch.rand(B, H, T, generator=torch.Generator().manual_seed(T)) > 0.1] = 0
    return a


def call(impl: str, a: dict[str, torch.Tensor]) -> tuple[torch.Tensor, tuple[torch.Tensor, torch.Tensor]]:
    return hebbian(a["q"], a["k"], a["v"], a["log_decay"], beta=a.get("beta"), state=(a["M"], a["z"]), impl=impl)


def run(impl: str, arguments: dict, wanted: tuple[str, ...] | None = None, lay=lambda x: x) -> tuple[dict, dict]:
    """(outputs, gradients of a random weighting of all outputs) by name; `lay` decides how the inputs lie in memory."""
    dtype = torch.float32 if impl == "triton" else torch.float64
    leaves = {
        name: x.to(DEVICE, dtype, copy=True).requires_grad_(wanted is None or name in wanted)
        for name, x in arguments.items()
    }
    out, (M, z) = call(impl, {name: lay(x) for name, x in leaves.items()})
    outputs = {"out": out, "M": M, "z": z}
    g = torch.Generator().manual_seed(1)
    weights = {name: torch.randn(x.shape, generator=g, dtype=torch.float64) for name, x in outputs.items()}
    total = sum((x * weights[name].to(DEVICE, dtype)).sum() for name, x in outputs.items())
    asked = [name for name, x in leaves.items() if x.requires_grad]
    gradients = torch.autograd.grad(total, [leaves[name] for name in asked], allow_unused=True)
    return {name: x.detach().cpu() for name, x in outputs.items()}, {
        name: None if x is None else x.cpu() for name, x in zip(asked, gradients)
    }


def error(found: torch.Tensor, expected: torch.Tensor, floor: float = 0.0) -> float:
    size = max(expected.norm().item(), floor)
    difference = (found.double() - expected).norm().item()
    return difference / size if size else difference


def check(arguments: dict, floor_of: str | None = None, **how) -> None:
    """The kernels against the recurrence, all outputs and all gradients, the latter on the scale of `floor_of`'s."""
    expected, expected_gradients = run("recurrent", arguments)
    found, gradients = run("triton", arguments, **how)
    for name, x in expected.items():
        assert found[name].dtype == torch.float32 and found[name].shape == x.shape
        assert error(found[name], x) < TOLERANCE, name
    floor = expected_gradients[floor_of].norm().item() if floor_of else 0.0
    for name, gradient in gradients.items():
        assert gradient.isfinite().all(), name
        assert error(gradient, expected_gradients[name], floor) < TOLERANCE, name


@anywhere
@pytest.mark.parametrize(
    ("alpha", "T", "E", "B", "H"),
    [
        # Chunks of 16, 32, 64; one step of one, its last, one too many, several; E in parts and not a power of two.
        (0.0, 1, 8, 1, 2),
        (0.1, 2, 72, 1, 1),
        (0.99, 16, 24, 1, 1),
        (0.5, 17, 64, 1, 1),
        (0.0, 34, 24, 1, 1),
        (1.0, 129, 8, 1, 1),
    ],
)
@pytest.mark.parametrize("rule", RULES)
def test_kernels_are_the_recurrence(rule, alpha, T, E, B, H):
    # At α = 0 the Hebbian output is v_t whatever q and k are: their gradients are differences of equal terms.
    check(inputs(rule, alpha, T, E, B, H), "v" if alpha == 0 else None)


@anywhere
@pytest.mark.parametrize(
    ("T", "E", "V"),
    # Blocks of keys and of values, in parts, of either more; the widest keys there are.
    [(2, 8, 24), (1, 40, 72), (5, 256, 40)],
)
@pytest.mark.parametrize("rule", RULES)
def test_keys_and_values_of_different_widths(rule, T, E, V):
    check(inputs(rule, 0.9, T, E, V=V))


@anywhere
def test_most_steps_write_nothing():
    check(of_bytes(40, 24, 8, H=2))
    a = of_bytes(70, 24, 8)
    a["beta"].zero_()
    _, (M, _) = call("triton", {name: x.to(DEVICE, torch.float32) for name, x in a.items()})
    # What is merely remembered is not rounded.
    assert torch.equal(M.cpu(), a["M"].float())


@anywhere
@pytest.mark.parametrize("rule", RULES)
def test_a_split_with_the_state_carried_is_the_whole(rule):
    a = inputs(rule, 0.9, 70, 24, V=8)
    expected, (M, z) = call("recurrent", a)
    a = {name: x.to(DEVICE, torch.float32) for name, x in a.items()}
    outputs = []
    for part in (slice(0, 66), slice(66, 67), slice(67, None)):
        piece = {name: x if name in ("M", "z") else x[:, :, part] for name, x in a.items()}
        out, (a["M"], a["z"]) = call("triton", piece)
        outputs.append(out)
    assert error(torch.cat(outputs, 2).cpu(), expected) < TOLERANCE
    assert error(a["M"].cpu(), M) < TOLERANCE
    assert error(a["z"].cpu(), z) < TOLERANCE


@anywhere
@pytest.mark.parametrize("rule", RULES)
def test_erasing_steps(rule):
    """−inf inside a chunk, at its first and its last step, twice in a row, and steps that come to the same."""
    a = inputs(rule, 0.9, 80, 24, V=8)
    for step, value in {20: "-inf", 21: "-inf", 50: -1e30, 63: "-inf", 64: -200, 70: "-inf"}.items():
        a["log_decay"][:, :, step] = float(value)
    check(a)
    # Nothing from before the last one is left, to the bit.
    before = call("triton", {name: x.to(DEVICE, torch.float32) for name, x in a.items()})
    a["v"][:, :, :70] += 100
    a["M"] += 100
    after = call("triton", {name: x.to(DEVICE, torch.float32) for name, x in a.items()})
    assert torch.equal(before[0][:, :, 70:], after[0][:, :, 70:])
    assert torch.equal(before[1][0], after[1][0])


@anywhere
@pytest.mark.parametrize("rule", RULES)
def test_long_sums_lose_no_digit_of_short_ones(rule):
    """Steps that all but erase make running sums of thousands: those of the steps between them still count."""
    a = inputs(rule, 1.0, 64, 8)
    a["log_decay"][:, :, 0:40] = -80.0  # e⁻⁸⁰ is a normal float32: a card takes the others for 0
    a["log_decay"][:, :, 40:] = torch.linspace(-0.7, -1e-3, 24, dtype=torch.float64)
    a["log_decay"] = a["log_decay"].float().double()
    check(a)


@anywhere
def test_delta_with_repeated_keys_and_extreme_strengths():
    """One key over and over, β exactly 0 and 1, no decay: where inverting by powers cancels."""
    a = inputs("delta", 1.0, 64, 8)
    a["k"][:, :, 5:50] = a["k"][:, :, 5:6]
    a["log_decay"].zero_()
    a["beta"][:, :, :32] = 1
    a["beta"][:, :, 32:40] = 0
    check(a)
    a["beta"].fill_(1)
    a["k"] = a["k"][:, :, 5:6].expand_as(a["k"]).clone()
    _, (M, _) = call("triton", {name: x.to(DEVICE, torch.float32) for name, x in a.items()})
    # The last value of a key counts.
    recalled = (a["k"][:, :, -1:].to(DEVICE, torch.float32) @ M).cpu()
    torch.testing.assert_close(recalled, a["v"][:, :, -1:].float(), rtol=1e-5, atol=1e-5)


@anywhere
@pytest.mark.parametrize("rule", RULES)
def test_inputs_of_any_strides(rule):
    def apart(x):
        return torch.stack([x, x + 1], -1)[..., 0]  # no dimension is contiguous

    def steps_first(x):
        return x.transpose(1, 2).contiguous().transpose(1, 2) if x.dim() > 2 else x

    check(inputs(rule, 0.5, 3, 8, V=5), lay=apart)
    check(inputs(rule, 0.5, 3, 8, 2, 2, V=5), lay=steps_first)


@anywhere
@pytest.mark.parametrize("rule", RULES)
def test_gradients_of_some_inputs(rule):
    a = inputs(rule, 0.5, 5, 8)
    for wanted in (("v",), ("log_decay", "M"), ("beta",) if rule == "delta" else ("z",)):
        check(a, wanted=wanted)
    with torch.no_grad():
        out, _ = call("triton", {name: x.to(DEVICE, torch.float32) for name, x in a.items()})
    assert not out.requires_grad
    assert error(out.cpu(), call("recurrent", a)[0]) < TOLERANCE


@anywhere
@pytest.mark.parametrize("rule", RULES)
def test_one_output_alone_gives_gradients(rule):
    """The gradients of the other outputs are then missing, and that of a sum is one number with strides of 0."""
    a = {name: x.to(DEVICE) for name, x in inputs(rule, 0.5, 3, 8).items()}
    for output in range(3):
        found = []
        for impl, dtype in (("recurrent", torch.float64), ("triton", torch.float32)):
            leaf = a["k"].to(dtype).requires_grad_()
            out, (M, z) = call(impl, {name: x.to(dtype) for name, x in a.items()} | {"k": leaf})
            x = (out, M, z)[output]
            found.append(torch.autograd.grad(x.sum(), leaf)[0].cpu() if x.requires_grad else None)
        assert found[0] is found[1] is None or error(found[1], found[0]) < TOLERANCE


@anywhere
@pytest.mark.parametrize("rule", RULES)
def test_the_same_bits_every_time_and_heads_joined_without_a_copy(rule):
    a = inputs(rule, 0.9, 3, 8)
    first, second = run("triton", a), run("triton", a)
    for x, y in zip(first, second):
        assert all(torch.equal(x[name], y[name]) for name in x if x[name] is not None)
    out, _ = call("triton", {name: x.to(DEVICE, torch.float32) for name, x in a.items()})
    assert out.transpose(1, 2).flatten(2).data_ptr() == out.data_ptr()


@anywhere
@pytest.mark.parametrize("rule", RULES)
def test_a_second_derivative_is_an_error(rule):
    a = {name: x.to(DEVICE, torch.float32) for name, x in inputs(rule, 0.9, 2, 8).items()}
    a["v"].requires_grad_()
    out, _ = call("triton", a)
    (gradient,) = torch.autograd.grad(out.square().sum(), a["v"], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


@anywhere
def test_an_empty_memory_reads_zero():
    q = torch.rand(1, 1, 3, 8, device=DEVICE)
    state = (q.new_zeros(1, 1, 8, 8), q.new_zeros(1, 1, 8))
    out, _ = triton_hebbian(q, torch.zeros_like(q), torch.rand_like(q), q.new_zeros(1, 1, 3), state)
    assert torch.equal(out, torch.zeros_like(out))


@pytest.mark.parametrize("rule", RULES)
def test_bad_input_is_named(rule, monkeypatch):
    a = inputs(rule, 0.5, 2, 8)
    with monkeypatch.context() as patch:
        patch.setattr(kernels, "_interpreted", lambda: False)
        with pytest.raises(ValueError, match="impl='triton': accepted on a CUDA device with triton installed"):
            call("triton", {name: x.float() for name, x in a.items()})
    with monkeypatch.context() as patch:
        patch.setattr(kernels, "AVAILABLE", False)
        with pytest.raises(ValueError, match="impl='triton': accepted on a CUDA device with triton installed"):
            call("triton", {name: x.to(DEVICE, torch.float32) for name, x in a.items()})
    with pytest.raises(ValueError, match=r"q has dtype torch.float64: with impl='triton', accepted is torch.float32"):
        call("triton", {name: x.to(DEVICE) for name, x in a.items()})
    with pytest.raises(ValueError, match="q has E=257: with impl='triton', accepted is 1 to 256"):
        call("triton", {name: x.to(DEVICE, torch.float32) for name, x in inputs(rule, 0.5, 2, 257, V=8).items()})
    with pytest.raises(ValueError, match="v has V=129: with impl='triton', accepted is 1 to 128"):
        call("triton", {name: x.to(DEVICE, torch.float32) for name, x in inputs(rule, 0.5, 2, 8, V=129).items()})


@needs_cuda
@pytest.mark.parametrize("T", [1, 2, 15, 16, 17, 32, 33, 64, 65, 130, 300])
@pytest.mark.parametrize("E", [8, 24, 32, 64, 100, 128])  # every block size and number of warps
@pytest.mark.parametrize("rule", RULES)
def test_on_the_card(rule, E, T):
    check(inputs(rule, 0.99, T, E, 2, 3))


@needs_cuda
@pytest.mark.parametrize("T", [1, 16, 17, 64, 65, 300])
@pytest.mark.parametrize(
    ("E", "V"), [(24, 8), (8, 24), (64, 16), (32, 128), (128, 64), (200, 72), (256, 8), (256, 64), (256, 128)]
)
@pytest.mark.parametrize("rule", RULES)
def test_keys_and_values_of_different_widths_on_the_card(rule, E, V, T):
    check(inputs(rule, 0.99, T, E, 2, 3, V))


@needs_cuda
@pytest.mark.parametrize(("B", "H", "T"), [(1, 1, 8192), (4, 1, 1024), (1, 2, 2048)])
def test_a_byte_memory_on_the_card(B, H, T):
    check(of_bytes(T, 256, 64, B, H))


@needs_cuda
@pytest.mark.parametrize("alpha", [0.0, 0.1, 0.5, 0.99, 1.0])
@pytest.mark.parametrize("E", [8, 32, 64, 128])
@pytest.mark.parametrize("rule", RULES)
def test_on_the_card_at_any_plasticity(rule, E, alpha):
    check(inputs(rule, alpha, 200, E, 2, 2), "v" if alpha == 0 else None)


@needs_cuda
@pytest.mark.parametrize("E", [64, 128])
@pytest.mark.parametrize("alpha", [0.1, 0.99, 1.0])
@pytest.mark.parametrize("rule", RULES)
def test_long_sequences_on_the_card(rule, alpha, E):
    check(inputs(rule, alpha, 4096, E, 1, 2))


@needs_cuda
@pytest.mark.parametrize(("E", "V"), [(64, 64), (256, 64)])
@pytest.mark.parametrize("rule", RULES)
def test_erasing_steps_and_strides_on_the_card(rule, E, V):
    a = inputs(rule, 0.9, 200, E, 2, 2, V)
    for step, value in {20: "-inf", 21: "-inf", 50: -1e30, 63: "-inf", 64: -200, 100: "-inf"}.items():
        a["log_decay"][:, :, step] = float(value)
    check(a)
    check(a, lay=lambda x: x.transpose(1, 2).contiguous().transpose(1, 2) if x.dim() > 2 else x)


@needs_cuda
@pytest.mark.parametrize(("E", "V"), [(64, 64), (256, 64)])
def test_repeated_keys_on_the_card(E, V):
    a = inputs("delta", 1.0, 200, E, 2, 2, V)
    a["k"][:, :, 5:150] = a["k"][:, :, 5:6]
    a["log_decay"].zero_()
    a["beta"][:, :, :100] = 1
    a["beta"][:, :, 100:120] = 0
    check(a)


@needs_cuda
@pytest.mark.parametrize("rule", RULES)
def test_autocast_does_not_reach_the_kernels(rule):
    a = inputs(rule, 0.9, 130, 64, 2, 2)
    exact = run("triton", a)
    with torch.autocast("cuda", torch.bfloat16):
        found = run("triton", a)
    for x, y in zip(exact, found):
        assert all(torch.equal(x[name], y[name]) for name in x if x[name] is not None)


@needs_cuda
@pytest.mark.parametrize(("E", "V"), [(64, 64), (256, 64)])
@pytest.mark.parametrize("rule", RULES)
def test_in_a_cuda_graph(rule, E, V):
    """Captured once, replayed on other inputs: what eager calls give, to the bit."""
    leaves = {n: x.to("cuda", torch.float32).requires_grad_() for n, x in inputs(rule, 0.9, 200, E, 2, 2, V).items()}

    def step():
        out, (M, z) = call("triton", leaves)
        total = out.square().sum() + M.square().sum() + z.square().sum()
        return [out, M, z, *torch.autograd.grad(total, list(leaves.values()))]

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    with torch.no_grad():
        for name, x in inputs(rule, 0.5, 200, E, 2, 2, V).items():
            leaves[name].copy_(x * 0.9)
    graph.replay()
    for found, expected in zip(captured, step()):
        assert torch.equal(found, expected)


@needs_cuda
def test_no_product_is_wgmma():
    """Which is what Triton miscompiles on Hopper: all are mma.sync, whatever the shape."""
    for E, V in ((8, 8), (32, 32), (64, 64), (128, 128), (256, 64)):
        for T in (16, 32, 64):
            for rule in RULES:
                run("triton", inputs(rule, 0.9, T, E, V=V))
    functions = {x for m in (kernels, delta_kernels) for x in vars(m).values() if hasattr(x, "device_caches")}
    compiled = [kernel for f in functions for caches in f.device_caches.values() for kernel in caches[0].values()]
    assert sum("mma.sync" in kernel.asm["ptx"] for kernel in compiled) > 100
    assert not [kernel.name for kernel in compiled if "wgmma" in kernel.asm["ptx"]]
