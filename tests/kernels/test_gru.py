"""A GRU over the bytes of patches against its formula in float64: PyTorch's form, and the Triton kernels.

Bounds are multiples of the rounding of the type of the arithmetic, times the largest value of what is compared: states
pass through P steps, and gradients of weights are sums over all bytes, in which errors of either sign cancel.
"""

import os

import pytest
import torch
from torch import nn
from torch.func import vmap

from model.kernels import gru
from model.kernels.gru import gru_patch

CUDA = torch.cuda.is_available()
NAMES = ("states", "hidden", "conditioned", "table", "weight", "bias")
ROUNDING = {torch.float32: 2.0**-23, torch.bfloat16: 2.0**-8}
interpreter = pytest.mark.skipif(
    gru.triton is None or os.environ.get("TRITON_INTERPRET") != "1",
    reason="needs the package triton, and TRITON_INTERPRET=1, which conftest sets where there is no CUDA device",
)
card = pytest.mark.skipif(not CUDA or gru.triton is None, reason="needs a CUDA device and the package triton")


def formula(hidden, conditioned, table, previous, weight, bias):
    """Byte by byte as Cho et al. 2014 have it, the reset inside the candidate's product (PyTorch's GRU)."""
    states = []
    for byte in previous.unbind(-1):
        (x_r, x_u, x_c), (y_r, y_u, y_c) = (
            (table[byte] + conditioned).chunk(3, -1),
            (hidden @ weight.T + bias).chunk(3, -1),
        )
        r, u = 1 / (1 + (-x_r - y_r).exp()), 1 / (1 + (-x_u - y_u).exp())
        hidden = u * hidden + (1 - u) * (x_c + r * y_c).tanh()
        states.append(hidden)
    return torch.stack(states, -2)


def inputs(shape: tuple[int, ...], P: int, C: int, V: int, dtype: torch.dtype):
    """hidden, conditioned and table, weight, bias of values that `dtype` can hold; previous; the states' gradient."""
    g = torch.Generator().manual_seed(P * C + V)
    sizes = {(*shape, C): 1.0, (*shape, 3 * C): 0.7, (V, 3 * C): 0.7, (3 * C, C): 1.5 * C**-0.5, (3 * C,): 0.5}
    hidden, conditioned, table, weight, bias = (
        (torch.randn(size, generator=g) * scale).to(dtype).double() for size, scale in sizes.items()
    )
    previous = torch.randint(V, (*shape, P), generator=g)
    previous.view(-1, P)[:1] = V - 1
    grad = torch.randn(*shape, P, C, generator=g).to(dtype).double()
    return (hidden.tanh().to(dtype).double(), conditioned, table, previous, weight, bias), grad


def exact(given, grad, device: str = "cpu"):
    given = tuple(x.to(device, copy=True).requires_grad_(x.is_floating_point()) for x in given)
    states = formula(*given)
    gradients = torch.autograd.grad(states, [x for x in given if x.requires_grad], grad.to(device))
    return tuple(x.detach().cpu() for x in (states, *gradients))


def found(given, grad, impl: str, dtype: torch.dtype, device: str = "cpu"):
    """States and gradients; table, weight and bias are float32 parameters under autocast, as in training."""
    hidden, conditioned, table, previous, weight, bias = (x.detach().to(device) for x in given)
    hidden, conditioned = (x.to(dtype).requires_grad_() for x in (hidden, conditioned))
    kept = torch.float64 if dtype == torch.float64 else torch.float32
    layer = nn.Linear(*weight.T.shape, device=device, dtype=kept)
    with torch.no_grad():
        layer.weight.copy_(weight)
        layer.bias.copy_(bias)
    table = table.to(kept).requires_grad_()
    with torch.autocast(device, torch.bfloat16, enabled=dtype == torch.bfloat16):
        states = gru_patch(hidden, conditioned, table, previous, layer, impl)
    wanted = (hidden, conditioned, table, layer.weight, layer.bias)
    gradients = torch.autograd.grad(states, wanted, grad.to(states))
    assert states.dtype == dtype and all(x.dtype == y.dtype for x, y in zip(gradients, wanted))
    return tuple(x.detach().cpu().double() for x in (states, *gradients))


def check(impl: str, shape, P, C, V, dtype=torch.float32, device="cpu", factor: float = 4.0):
    given, grad = inputs(shape, P, C, V, dtype)
    for name, x, y in zip(NAMES, found(given, grad, impl, dtype, device), exact(given, grad, device)):
        assert x.shape == y.shape, name
        # Largest values alone would hide a part that is wrong and small.
        for part, expected in zip(
            *(z.chunk(3, -1) if name in ("conditioned", "table", "bias") else (z,) for z in (x, y))
        ):
            bound = factor * ROUNDING.get(dtype, 1e-14) * expected.abs().max()
            error = (part - expected).abs().max()
            assert error <= bound, f"{name}: {error} > {bound}"


def test_pytorch_form_is_the_formula():
    check("torch", (2, 3), 4, 5, 9, torch.float64)
    check("auto", (3,), 1, 4, 9, torch.float64)


@interpreter
@pytest.mark.parametrize(
    ("shape", "P", "C", "V"),
    [((1,), 1, 1, 2), ((2, 9), 4, 24, 257), ((3,), 2, 130, 7)],
    ids=["one element", "several programs", "more columns than a program's"],
)
def test_kernels_in_the_interpreter_are_the_formula(shape, P, C, V):
    check("triton", shape, P, C, V, factor=8.0)


@interpreter
def test_kernels_in_half_precision():
    """The interpreter cuts bfloat16 off where a card rounds it, twice as far off."""
    check("triton", (2, 5), 4, 24, 257, torch.bfloat16, factor=8.0)


@interpreter
def test_kernels_take_strided_inputs_no_patches_and_frozen_weights():
    (hidden, conditioned, table, previous, *_), _ = inputs((6,), 3, 4, 9, torch.float32)
    layer = nn.Linear(4, 12)
    strided = [torch.stack([x.float(), x.float() + 1], -1)[..., 0] for x in (hidden, conditioned, table)]
    previous = torch.stack([previous, previous], -1)[..., 0].to(torch.uint8)
    layer.requires_grad_(False)
    start, grad = strided[0].requires_grad_(), torch.randn(6, 4, 3).transpose(1, 2)
    states = [gru_patch(*strided, previous, layer, impl) for impl in ("torch", "triton")]
    torch.testing.assert_close(*states)
    torch.testing.assert_close(*(torch.autograd.grad(each, start, grad)[0] for each in states))
    empty = torch.empty(0, 4, requires_grad=True)
    states = gru_patch(empty, strided[1][:0], strided[2], previous[:0], layer, "triton")
    assert states.shape == (0, 3, 4)
    states.sum().backward()
    assert empty.grad.shape == (0, 4)


@interpreter
def test_kernels_are_once_differentiable():
    (hidden, conditioned, table, previous, *_), _ = inputs((2,), 2, 4, 9, torch.float32)
    hidden = hidden.float().requires_grad_()
    states = gru_patch(hidden, conditioned.float(), table.float(), previous, nn.Linear(4, 12), "triton")
    (gradient,) = torch.autograd.grad(states.square().sum(), hidden, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


def test_what_the_kernels_take_of_a_card(monkeypatch):
    """Not float64, not types that differ, not vmap's tensors, and no layer without biases or with a hook."""
    (hidden, conditioned, table, previous, *_), _ = inputs((2,), 3, 4, 9, torch.float32)
    given, layer = (hidden.float(), conditioned.float(), table.float(), previous), nn.Linear(4, 12)
    assert not gru._fits(*given, layer)
    monkeypatch.setattr(torch.Tensor, "is_cuda", True)
    assert gru._fits(*given, layer)
    assert not gru._fits(hidden, *given[1:], layer)
    assert not gru._fits(hidden, conditioned, *given[2:], layer)
    assert not gru._fits(*given[:3], previous[:0], layer)
    assert not gru._fits(*given, nn.Linear(4, 12, bias=False))
    answers = []

    def look(table, bias):
        answers.append(gru._fits(*given[:2], table, previous, layer))
        kept, layer._parameters["bias"] = layer.bias, bias  # as torch.func.functional_call does
        answers.append(gru._fits(*given, layer))
        layer._parameters["bias"] = kept
        return table

    vmap(look)(torch.zeros(5, 9, 12), torch.zeros(5, 12))
    assert answers == [False, False]
    layer.register_forward_pre_hook(lambda module, read: answers.append(read[0]))
    assert not gru._fits(*given, layer)
    gru_patch(*given, layer)
    assert len(answers) == 2 + previous.shape[-1]


@card
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("shape", "P", "C"), [((1,), 1, 1), ((2, 9), 4, 24), ((3,), 2, 130), ((32, 256), 4, 512)])
def test_kernels_on_the_card_are_the_formula(shape, P, C, dtype):
    # Gradients of a row pass through three more products, and sums over all bytes come from split products.
    check("triton", shape, P, C, 257, dtype, "cuda", factor=8.0 if dtype == torch.bfloat16 else 64.0)


@card
def test_the_same_bits_every_time_and_in_a_graph():
    given, grad = inputs((4, 65), 4, 96, 257, torch.bfloat16)
    runs = [found(given, grad, impl, torch.bfloat16, "cuda") for impl in ("auto", "triton", "triton")]
    for other in runs[1:]:
        assert all(torch.equal(x, y) for x, y in zip(runs[0], other))


def test_bad_implementations_are_named(monkeypatch):
    layer, x = nn.Linear(1, 3), torch.zeros(1, 1)
    given = x, x.expand(1, 3), torch.zeros(2, 3), torch.zeros(1, 1, dtype=torch.long), layer
    with pytest.raises(ValueError, match="impl='magic': accepted are auto, torch, triton"):
        gru_patch(*given, "magic")
    monkeypatch.setattr(gru, "triton", None)
    with pytest.raises(ValueError, match=r"impl='triton': needs the package triton; accepted here are auto and torch"):
        gru_patch(*given, "triton")
