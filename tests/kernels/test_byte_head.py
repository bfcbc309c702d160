"""The byte head as one operation, against its formula in float64, and where the head uses it.

Bounds are multiples of the rounding of the arithmetic's type, times the largest value of what is compared.
"""

import os

import pytest
import torch
from torch import nn

from model.kernels import byte_head, gru
from model.kernels.byte_head import sums_by_byte
from model.kernels.products import product
from model.layers.byte_memory import ByteMemory
from model.layers.head import LocalAutoregressiveHead

CUDA = torch.cuda.is_available()
EPS = 1e-2  # large enough that a wrong gradient of it shows
ROUNDING = {torch.float32: 2.0**-23, torch.bfloat16: 2.0**-8}
NAMES = ("initial", "condition", "recurrent", "output")
interpreter = pytest.mark.skipif(
    gru.triton is None or os.environ.get("TRITON_INTERPRET") != "1",
    reason="needs the package triton, and TRITON_INTERPRET=1, which conftest sets where there is no CUDA device",
)
card = pytest.mark.skipif(not CUDA or gru.triton is None, reason="needs a CUDA device and the package triton")


def formula(latents, previous, table, initial, b_i, condition, b_c, recurrent, b_r, output, b_o):
    """Byte by byte: a GRU after Cho et al. 2014 (the reset inside the candidate's product), norm, linear layer."""
    hidden, conditioned = (latents @ initial.T + b_i).tanh(), latents @ condition.T + b_c
    states = []
    for byte in previous.unbind(-1):
        (x_r, x_u, x_c), (y_r, y_u, y_c) = (
            (table[byte] + conditioned).chunk(3, -1),
            (hidden @ recurrent.T + b_r).chunk(3, -1),
        )
        r, u = 1 / (1 + (-x_r - y_r).exp()), 1 / (1 + (-x_u - y_u).exp())
        hidden = u * hidden + (1 - u) * (x_c + r * y_c).tanh()
        states.append(hidden)
    states = torch.stack(states, -2)
    normed = states / (states.square().mean(-1, keepdim=True) + EPS).sqrt()
    return normed @ output.T + b_o, states


def inputs(shape, P, D, C, V, W, dtype, device):
    """latents, table and weights of values that `dtype` can hold, in float64; previous."""
    g = torch.Generator().manual_seed(P * C + V)
    layers = {"initial": (C, D), "condition": (3 * C, D), "recurrent": (3 * C, C), "output": (W, C)}
    sizes = [((*shape, D), 1.0), ((V, 3 * C), 0.7)]
    for rows, columns in layers.values():
        sizes += [((rows, columns), columns**-0.5), ((rows,), 0.5)]
    values = [(torch.randn(size, generator=g) * scale).to(dtype).double().to(device) for size, scale in sizes]
    previous = torch.randint(V, (*shape, P), generator=g)
    previous.view(-1, P)[: -(-previous.numel() // (3 * P))] = V - 1  # a frequent one; some may not be there at all
    return values, previous.to(device)


def run(function, values, previous, wanted, types):
    """What `function` gives and the gradients of all but `previous`; with those of the states where they are wanted."""
    given = [x.detach().to(dtype).requires_grad_() for x, dtype in zip(values, types)]
    outputs = [y for y in function(given[0], previous, *given[1:]) if y is not None][: 1 + wanted]
    g = torch.Generator().manual_seed(1)
    grads = [torch.randn(y.shape, generator=g).to(torch.bfloat16).to(y) for y in outputs]
    gradients = torch.autograd.grad(outputs, given, grads)
    assert [x.dtype for x in gradients] == list(types)
    return [x.detach().double() for x in (*outputs, *gradients)]


def ours(states: bool, dtype: torch.dtype):
    def function(latents, previous, table, *weights):
        layers = [nn.Linear(1, 1) for _ in NAMES]
        for layer, weight, bias in zip(layers, weights[::2], weights[1::2]):
            layer._parameters.update(weight=weight, bias=bias)
        with torch.autocast(latents.device.type, torch.bfloat16, enabled=dtype == torch.bfloat16):
            logits, found = byte_head.byte_head(latents, previous, table, layers, EPS, states)
        assert logits.dtype == torch.float32
        assert (found is not None) == states
        return logits, found

    return function


def check(shape, P, D, C, V, W, dtype=torch.float32, states=False, device="cpu", factor=16.0):
    values, previous = inputs(shape, P, D, C, V, W, dtype, device)
    kept = (dtype, *(torch.float32,) * (len(values) - 1))
    expected = run(formula, values, previous, states, (torch.float64,) * len(values))
    found = run(ours(states, dtype), values, previous, states, kept)
    biases = [f"{name} {kind}" for name in NAMES for kind in ("weight", "bias")]
    for name, x, y in zip([*("logits", "states")[: 1 + states], "latents", "table", *biases], found, expected):
        assert x.shape == y.shape, name
        error = (x - y).abs().max().item()
        assert error <= factor * ROUNDING[dtype] * y.abs().max().item(), f"{name}: {error}"


@interpreter
@pytest.mark.parametrize(
    ("shape", "P", "D", "C", "V", "W", "states"),
    [((1,), 1, 1, 3, 2, 3, False), ((2, 21), 3, 5, 12, 6, 20, True), ((5,), 2, 4, 130, 9, 8, False)],
    ids=["one row", "several programs, states too", "more columns than a program's"],
)
def test_kernels_in_the_interpreter_are_the_formula(shape, P, D, C, V, W, states):
    check(shape, P, D, C, V, W, states=states)


@interpreter
def test_kernels_in_half_precision():
    check((2, 5), 4, 8, 24, 6, 16, torch.bfloat16)


@interpreter
def test_a_gradient_of_the_states_alone():
    values, previous = inputs((3,), 2, 3, 4, 5, 6, torch.float32, "cpu")
    given = [x.float().requires_grad_() for x in values]
    _, states = ours(True, torch.float32)(given[0], previous, *given[1:])
    exact = [x.requires_grad_() for x in values]
    expected = formula(exact[0], previous, *exact[1:])[1].sum()
    # Those of the output layer are zeros.
    for x, y in zip(torch.autograd.grad(states.sum(), given), torch.autograd.grad(expected, exact[:-2])):
        torch.testing.assert_close(x.double(), y, rtol=1e-5, atol=1e-5)


def test_sums_by_byte():
    """Of rows that lie apart; bytes that never come."""
    g = torch.Generator().manual_seed(0)
    rows, previous = torch.randn(150, 28, generator=g)[:, :20], torch.randint(9, (75, 2), generator=g)
    expected = torch.zeros(11, 20, dtype=torch.float64).index_add_(0, previous.t().reshape(-1), rows.double())
    torch.testing.assert_close(sums_by_byte(rows, previous, 11).double(), expected, rtol=1e-5, atol=1e-5)


@interpreter
@pytest.mark.parametrize("remembers", [False, True])
def test_the_head_is_the_same_by_kernels(remembers, monkeypatch):
    torch.manual_seed(0)
    memory = ByteMemory(16, 1, 4, 4, "delta", 3, 1) if remembers else None
    head = LocalAutoregressiveHead(12, 16, memory)
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.normal_(std=0.3)
    latents, previous = torch.randn(2, 3, 12), torch.randint(257, (2, 3, 4))
    found, ran = [], []
    operation = byte_head.byte_head
    monkeypatch.setattr(byte_head, "byte_head", lambda *a, **k: (ran.append(1), operation(*a, **k))[1])
    for fused in (False, True):
        monkeypatch.setattr(byte_head, "fits", lambda *_, fused=fused: fused)
        logits = head(latents, previous)
        found.append([logits, *torch.autograd.grad(logits.square().mean(), list(head.parameters()), allow_unused=True)])
    assert len(ran) == 1
    for x, y in zip(*found):
        assert (x is None) == (y is None)
        if x is not None:
            torch.testing.assert_close(y, x, rtol=1e-4, atol=1e-4 * x.abs().max().item())
    head.joined = False
    assert torch.equal(head(latents, previous), found[0][0]) and len(ran) == 1
    head.joined = True
    if not remembers:  # with all but the output asleep its gradient is the same, and nobody else's is made
        products = []
        monkeypatch.setattr(byte_head, "product", lambda *a: (products.append(1), product(*a))[1])
        for name, parameter in head.named_parameters():
            parameter.requires_grad_(name.startswith("output"))
        gradients = torch.autograd.grad(head(latents, previous).square().mean(), list(head.output.parameters()))
        names = [name for name, _ in head.named_parameters()]
        for name, gradient in zip(("output.weight", "output.bias"), gradients):
            torch.testing.assert_close(gradient, found[1][1 + names.index(name)])
        assert len(products) == 1 and len(ran) == 2
        ran.pop()
    head.add_column(2)  # which the operation does not know
    assert head(torch.randn(2, 3, 14), previous).shape == (2, 3, 4, 256) and len(ran) == 1


def test_what_the_kernels_take(monkeypatch):
    """Not float64, not types that differ without autocast, no layer without biases or with a hook."""
    layers = [nn.Linear(4, width) for width in (4, 12, 12, 8)]
    latents, previous, table = torch.zeros(2, 4), torch.zeros(2, 3, dtype=torch.long), torch.zeros(5, 12)
    assert not byte_head.fits(latents, previous, table, layers)
    monkeypatch.setattr(torch.Tensor, "is_cuda", True)
    assert byte_head.fits(latents, previous, table, layers)
    assert not byte_head.fits(latents.double(), previous, table, layers)
    assert not byte_head.fits(latents.bfloat16(), previous, table, layers)
    with torch.autocast("cpu", torch.bfloat16):
        assert byte_head.fits(latents.bfloat16(), previous, table, layers)
    assert not byte_head.fits(latents, previous[:0], table, layers)
    assert not byte_head.fits(latents, previous, table, [*layers[:3], nn.Linear(4, 8, bias=False)])
    answers = []
    torch.func.vmap(lambda x: (answers.append(byte_head.fits(latents, previous, x, layers)), x)[1])(
        torch.zeros(3, 5, 12)
    )
    assert answers == [False]
    layers[2].register_forward_hook(lambda *_: None)
    assert not byte_head.fits(latents, previous, table, layers)


@card
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("states", [False, True])
@pytest.mark.parametrize(("shape", "P", "D", "C"), [((1,), 1, 1, 3), ((3,), 2, 8, 130), ((32, 256), 4, 512, 512)])
def test_kernels_on_the_card_are_the_formula(shape, P, D, C, states, dtype):
    check(
        shape, P, D, C, 257, 256, dtype, states=states, device="cuda", factor=8.0 if dtype == torch.bfloat16 else 96.0
    )


@card
def test_the_same_bits_every_time_on_the_card():
    values, previous = inputs((4, 65), 4, 64, 96, 257, 256, torch.bfloat16, "cuda")
    types = (torch.bfloat16, *(torch.float32,) * (len(values) - 1))
    first, second = (run(ours(True, torch.bfloat16), values, previous, True, types) for _ in range(2))
    assert all(torch.equal(x, y) for x, y in zip(first, second))
