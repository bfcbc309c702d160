"""A group of convex petals as one operation: against its formula in float64, forward and every gradient.

Errors are measured by norms, against the formula on the same inputs. In bfloat16 the PyTorch form is the measure: on a
card the operation has to be as near to the formula; Triton's interpreter cuts off where a card rounds, all errors in
one direction, so that it may be a few times as far.
"""

import os

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from model.kernels import petals as module
from model.kernels.petals import petal_outputs, petals

CUDA = torch.cuda.is_available()
BOUND = 5e-5  # float32: 1e-6, but for τ, whose gradient is a sum that cancels
NAMES = ("y", "x", "up", "bias", "down", "tau")
RUNS = {"all awake": [], "some": [(0, 1, True), (1, 3, False), (3, 4, True)], "none": [(0, 4, True)]}
interpreter = pytest.mark.skipif(
    module.triton is None or os.environ.get("TRITON_INTERPRET") != "1",
    reason="needs the package triton, and TRITON_INTERPRET=1, which conftest sets where there is no CUDA device",
)
card = pytest.mark.skipif(not CUDA or module.triton is None, reason="needs a CUDA device and the package triton")


def formula(x, up, bias, down, tau):
    """Term by term: P · (τ⁻¹ log mean_p exp(τ h_p max(B_p, 0)) − the same of max(−B_p, 0))."""
    hidden = torch.einsum("nd,pwd->pnw", x, up).add(bias[:, None]).clamp(min=0) ** 2
    means = []
    for weight in (down.clamp(min=0), (-down).clamp(min=0)):
        o = torch.einsum("pnw,pwd->pnd", hidden, weight)
        means.append(((tau * o).logsumexp(0) - torch.log(torch.tensor(float(len(o))))) / tau)
    return len(up) * (means[0] - means[1])


def case(
    P: int, N: int, W: int, D: int, out: int | None = None, device="cpu"
) -> tuple[list[torch.Tensor], torch.Tensor]:
    """([x, up, bias, down, tau] in float32, the gradient of the result); one position's units are all off."""
    g = torch.Generator().manual_seed(P + N + W)
    out = out or D
    x, up = torch.randn(N, D, generator=g), torch.randn(P, W, D, generator=g) * D**-0.5
    bias, down = torch.randn(P, W, generator=g) * 0.3, torch.randn(P, W, out, generator=g) * W**-0.5
    grad = torch.randn(N, out, generator=g)
    return [t.to(device) for t in (x, up, bias, down, torch.tensor([0.7]))], grad.to(device)


def results(function, inputs, grad, wanted=(0, 1, 2, 3, 4)) -> dict[str, torch.Tensor | None]:
    """The result and the gradients by name."""
    inputs = [t.detach().requires_grad_(i in wanted) for i, t in enumerate(inputs)]
    y = function(*inputs)
    gradients = torch.autograd.grad(y, [inputs[i] for i in wanted], grad.to(y.dtype), allow_unused=True)
    for i, gradient in zip(wanted, gradients):
        assert gradient is None or (gradient.dtype == inputs[i].dtype and gradient.shape == inputs[i].shape)
    return {"y": y.detach(), **dict(zip((NAMES[i + 1] for i in wanted), gradients))}


def exact(inputs, grad) -> dict[str, torch.Tensor]:
    return results(formula, [t.double() for t in inputs], grad.double())


def error(found: torch.Tensor, expected: torch.Tensor) -> float:
    return ((found.double() - expected).norm() / expected.norm().clamp(min=1e-6)).item()


def errors(inputs, grad, impl: str, runs=None) -> dict[str, float]:
    """How far an implementation is from the formula; petals asleep have gradients of zero, or none."""
    found, expected = results(lambda *t: petals(*t, runs, impl), inputs, grad), exact(inputs, grad)
    for start, stop, asleep in runs or []:
        for name in ("up", "bias", "down"):
            if asleep:
                expected[name][start:stop] = 0
    if runs and all(asleep for *_, asleep in runs):
        assert all(found.pop(name) is None for name in ("up", "bias", "down"))
    return {name: error(found[name], expected[name]) for name in found}


@pytest.mark.parametrize("runs", RUNS)
@pytest.mark.parametrize("impl", ["torch", pytest.param("triton", marks=interpreter)])
def test_forms_are_the_formula(impl, runs):
    """The pass over the hidden units takes several tiles each way, none of them full."""
    inputs, grad = case(4, 75, 150, 6, 10)
    worst = errors(inputs, grad, impl, RUNS[runs])
    assert max(worst.values()) < BOUND, worst


@interpreter
@pytest.mark.parametrize(("P", "N", "W", "D"), [(1, 1, 1, 1), (3, 9, 8, 5), (1, 2, 3, 40)])
def test_kernels_at_other_shapes(P, N, W, D):
    inputs, grad = case(P, N, W, D)
    inputs[2] += 1  # that of a single unit is on
    worst = errors(inputs, grad, "triton")
    assert max(worst.values()) < BOUND, worst


def autocast_errors(inputs, grad, impl, device):
    with torch.autocast(device, torch.bfloat16):
        return errors(inputs, grad, impl)


@interpreter
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_kernels_under_autocast(dtype):
    """The residual stream may come in either type; the result has autocast's, as the PyTorch form's."""
    inputs, grad = case(4, 40, 16, 24)
    inputs[0] = inputs[0].to(dtype)
    found, plain = (autocast_errors(inputs, grad, impl, "cpu") for impl in ("triton", "torch"))
    assert all(found[name] < 4 * plain[name] + 1e-4 for name in NAMES), (found, plain)
    with torch.autocast("cpu", torch.bfloat16):
        assert petals(*inputs, impl="triton").dtype == petals(*inputs, impl="torch").dtype == torch.bfloat16


@interpreter
def test_a_unit_that_is_off_stops_its_gradient_and_a_nan_is_seen():
    inputs, grad = case(2, 5, 4, 3)
    inputs[2] = torch.full_like(inputs[2], -100.0)
    found = results(lambda *t: petals(*t, impl="triton"), inputs, grad)
    assert not any(found[name].any() for name in NAMES)
    inputs[1][0, 3] = float("nan")  # of one petal: NumPy warns of maxima of NaNs alone
    found = results(lambda *t: petals(*t, impl="triton"), inputs, grad)
    assert found["y"].isnan().all() and found["bias"].isnan().tolist() == [[False] * 3 + [True], [False] * 4]


@interpreter
def test_inputs_that_lie_apart_that_want_nothing_and_that_are_none():
    (x, up, bias, down, tau), grad = case(2, 6, 4, 5)
    expected = results(lambda *t: petals(*t, impl="triton"), (x, up, bias, down, tau), grad)
    apart = [torch.stack([t, t + 1], -1)[..., 0] for t in (x, up, bias, down)]
    found = results(lambda *t: petals(*t, impl="triton"), (*apart, tau), torch.stack([grad, grad], -1)[..., 0])
    for name in NAMES:
        torch.testing.assert_close(found[name], expected[name])
    for wanted in ((0,), (2,), (3,)):
        part = results(lambda *t: petals(*t, impl="triton"), (x, up, bias, down, tau), grad, wanted)
        assert all(torch.equal(part[name], expected[name]) for name in part) and len(part) == 2
    with torch.no_grad():
        assert torch.equal(petals(x, up, bias, down, tau, impl="triton"), expected["y"])
    empty = results(lambda *t: petals(*t, impl="triton"), (x[:0], up, bias, down, tau), grad[:0])
    assert empty["y"].shape == (0, 5) and not any(empty[name].any() for name in NAMES)


@pytest.mark.parametrize("impl", ["torch", pytest.param("triton", marks=interpreter)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_what_the_result_is_added_to(impl, dtype):
    """The sum has the bits that it would have apart, and its gradient goes to both.
    In float16, to which the interpreter rounds as a card does."""
    inputs, grad = case(4, 9, 6, 5)
    onto = torch.stack([grad, grad], -1)[..., 0].to(dtype).requires_grad_()
    with torch.autocast("cpu", torch.float16):
        apart = results(lambda *t: petals(*t, impl=impl), inputs, grad.half())
        found = results(lambda *t: petals(*t, impl=impl, onto=onto), inputs, grad.half())
        petals(*inputs, impl=impl, onto=onto).backward(grad.to(dtype))
        with torch.no_grad():
            assert torch.equal(petals(*inputs, impl=impl, onto=onto), found["y"])
    assert torch.equal(found.pop("y"), onto + apart["y"]) and torch.equal(onto.grad, grad.to(dtype))
    for name in found:
        torch.testing.assert_close(found[name], apart[name])


@pytest.mark.parametrize("device", [pytest.param("cpu", marks=interpreter), pytest.param("cuda", marks=card)])
@pytest.mark.parametrize("shape", [(3, 41, 32, 24, 20), (4, 8200, 512, 512, 512)])
def test_products_of_our_own(device, shape, monkeypatch):
    """Several tiles each way, those of positions and terms not full. In float16, which the interpreter multiplies."""
    if (shape[1] > 1000) != (device == "cuda"):
        pytest.skip("small shapes for the interpreter, the real one for a card")
    inputs, grad = case(*shape, device=device)
    runs = RUNS["some"] if shape[0] == 4 else [(0, 2, False), (2, 3, True)]

    def run():
        with torch.autocast(device, torch.float16):
            return errors(inputs, grad, "triton", runs)

    plain = run()
    if device == "cpu":
        monkeypatch.setattr(module, "TILE", (16, 16))
        monkeypatch.setattr(module, "DEPTH", 16)
    elif torch.cuda.get_device_capability()[0] != 9:
        pytest.skip("needs a Hopper card")
    for name, value in (("OWN_PRODUCTS", "both"), ("BY_PETAL", True), ("square_", None), ("_square_backward_", None)):
        monkeypatch.setattr(module, name, value)  # None: they are not called
    found = run()
    assert all(found[name] < 1.1 * plain[name] + 1e-4 for name in found), (found, plain)


@interpreter
def test_petals_asleep_save_the_products_of_their_gradients():
    """Forward 1, gradient of the input 1, of the weights 1: of 8 petals asleep 6 save 6/8 of the last third."""
    inputs, grad = case(8, 3, 4, 2)
    flops = []
    for runs in ([], [(0, 6, True), (6, 8, False)]):
        with FlopCounterMode(display=False) as counter:
            results(lambda *t, runs=runs: petals(*t, runs, "triton"), inputs, grad)
        flops.append(counter.get_total_flops())
    assert flops[1] / flops[0] == pytest.approx(1 - 6 / 8 / 3, rel=1e-6)


def test_the_root_of_a_square_is_the_number():
    """What lets the operation keep squares alone: every bfloat16 whose square neither over- nor underflows."""
    x = torch.arange(2**15).to(torch.int16).view(torch.bfloat16)
    x = x[(x > 1e-18) & (x < 1e18)]
    root = (x * x).float().sqrt()
    for ulp in (-(2.0**-22), 0, 2.0**-22):  # of a root that is not rounded to the nearest
        assert torch.equal((root * (1 + ulp)).bfloat16(), x) and len(x) > 15000


@interpreter
def test_the_operation_is_once_differentiable():
    inputs, _ = case(2, 3, 4, 5)
    inputs[0].requires_grad_()
    (gradient,) = torch.autograd.grad(petals(*inputs, impl="triton").square().sum(), inputs[0], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


def test_the_outputs_are_those_of_each_petal():
    (x, up, bias, down, _), _ = case(3, 7, 4, 5)
    o = petal_outputs(x, up, bias, down)
    for p in range(3):
        hidden = (x @ up[p].T + bias[p]).relu() ** 2
        torch.testing.assert_close(o[p], torch.cat([hidden @ down[p].clamp(min=0), hidden @ (-down[p]).relu()], 1))
    runs = [(0, 2, False), (2, 3, True)]
    torch.testing.assert_close(petal_outputs(x, up, bias, down, runs), o)


@card
@pytest.mark.parametrize("runs", RUNS)
@pytest.mark.parametrize(("P", "N", "W", "D"), [(4, 75, 150, 6), (4, 999, 64, 64), (4, 1, 512, 512)])
def test_kernels_on_the_card_are_the_formula(P, N, W, D, runs, monkeypatch):
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", False)
    inputs, grad = case(P, N, W, D, device="cuda")
    worst = errors(inputs, grad, "triton", RUNS[runs])
    assert max(worst.values()) < BOUND, worst


@card
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("P", "N", "W", "D"), [(4, 999, 64, 64), (4, 8192, 512, 512)])
def test_kernels_on_the_card_are_as_near_as_pytorch_under_autocast(P, N, W, D, dtype):
    inputs, grad = case(P, N, W, D, device="cuda")
    inputs[0] = inputs[0].to(dtype)
    found, plain = (autocast_errors(inputs, grad, impl, "cuda") for impl in ("triton", "torch"))
    assert all(found[name] < 1.1 * plain[name] + 1e-4 for name in NAMES), (found, plain)


@card
def test_auto_is_the_kernels_on_the_card_and_gives_the_same_bits_every_time():
    inputs, grad = case(4, 999, 64, 64, device="cuda")
    with torch.autocast("cuda", torch.bfloat16):
        runs = [
            results(lambda *t, impl=impl: petals(*t, impl=impl), inputs, grad) for impl in ("auto", "triton", "auto")
        ]
        batch = torch.stack([inputs[0], inputs[0]])
        with torch.no_grad():
            together = torch.vmap(lambda x: petals(x, *inputs[1:]))(batch)
    for other in runs[1:]:
        assert all(torch.equal(runs[0][name], other[name]) for name in NAMES)
    assert error(together[1], runs[0]["y"].double()) < 1e-2
    double = [t.double() for t in inputs]
    assert petals(*double).dtype == torch.float64  # for references: PyTorch's


def test_bad_implementations_are_named(monkeypatch):
    inputs, _ = case(1, 1, 2, 2)
    with pytest.raises(ValueError, match="impl='magic': accepted are auto, torch, triton"):
        petals(*inputs, impl="magic")
    monkeypatch.setattr(module, "triton", None)
    with pytest.raises(ValueError, match=r"impl='triton': needs the package triton; accepted here are auto and torch"):
        petals(*inputs, impl="triton")
