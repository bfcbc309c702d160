"""The projection and the rule as one operation against the two, which have tests of their own."""

import os

import pytest
import torch

from model.kernels import packed_hebbian as rule
from model.kernels import projected_hebbian as module
from model.kernels.float32_linear import split_forward
from model.kernels.packed_hebbian import packed_hebbian
from model.kernels.projected_hebbian import projected_hebbian
from model.layers.memory import HebbianMemory

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
anywhere = pytest.mark.skipif(
    rule.triton is None or (not CUDA and os.environ.get("TRITON_INTERPRET") != "1"),
    reason="needs the package triton, and CUDA or TRITON_INTERPRET=1, which conftest sets where there is no card",
)
needs_cuda = pytest.mark.skipif(not CUDA or rule.triton is None, reason="needs CUDA and the package triton")


def compared(B, T, D, H, E, carried):
    """Outputs to the bit, gradients to the rounding of the projection's one."""
    g = torch.Generator().manual_seed(0)
    shapes = {"x": (B, T, D), "weight": (3 * H * E + H, D), "bias": (H,), "M": (B, H, E, E), "z": (B, H, E)}
    given = {name: torch.randn(shape, generator=g).to(DEVICE) for name, shape in shapes.items()}
    given["x"], given["weight"], given["z"] = given["x"].to(torch.bfloat16), given["weight"] / D**0.5, given["z"].abs()
    if not carried:
        del given["M"], given["z"]
    alpha = torch.tensor(0.99, device=DEVICE)

    def two(x, weight, *rest, state):
        heads = split_forward(x.detach().flatten(0, 1), weight.detach()).view(B, T, -1)
        # The split product's result with PyTorch's own gradients.
        exact = x.float() @ weight.T
        return packed_hebbian(exact + (heads - exact).detach(), *rest, state=state, impl="triton")

    runs = []
    for form in (two, projected_hebbian):
        leaves = {name: x.detach().requires_grad_() for name, x in given.items()}
        state = (leaves["M"], leaves["z"]) if carried else None
        out, (M, z) = form(leaves["x"], leaves["weight"], leaves["bias"], alpha, H, state=state)
        loss = sum((y * y.detach().sin()).sum() for y in (out, M, z))
        runs.append(([out, M, z], torch.autograd.grad(loss, list(leaves.values()))))
    for found, expected in zip(runs[1][0], runs[0][0]):
        torch.testing.assert_close(found, expected, rtol=2e-5, atol=2e-5)
    for name, found, expected in zip(given, runs[1][1], runs[0][1]):
        assert found.dtype == expected.dtype == given[name].dtype and found.shape == expected.shape
        # The interpreter cuts off where the card rounds.
        assert (found - expected).float().norm() <= (2.0**-6 if name != "M" else 1e-5) * expected.float().norm()


@anywhere
@pytest.mark.parametrize(("B", "T", "D", "H", "E", "carried"), [(1, 33, 16, 1, 8, True), (2, 5, 8, 2, 8, False)])
def test_one_operation_is_the_two(B, T, D, H, E, carried):
    compared(B, T, D, H, E, carried)


@anywhere
def test_nothing_is_kept_where_no_gradient_is_wanted():
    x, weight = torch.randn(1, 4, 8, device=DEVICE).to(torch.bfloat16), torch.randn(25, 8, device=DEVICE)
    bias, alpha = torch.zeros(1, device=DEVICE), torch.ones((), device=DEVICE)
    with torch.no_grad():
        out, _ = projected_hebbian(x, weight, bias, alpha, 1)
        expected, _ = packed_hebbian(split_forward(x[0], weight)[None], bias, alpha, 1, impl="triton")
    assert torch.equal(out, expected) and not out.requires_grad
    only = weight.clone().requires_grad_()  # x and bias want none
    (found,) = torch.autograd.grad(projected_hebbian(x, only, bias, alpha, 1)[0].sum(), only)
    assert found.shape == weight.shape


@needs_cuda
def test_on_the_card_a_layer_that_learns_takes_the_one(monkeypatch):
    compared(16, 256, 512, 8, 64, False)
    layer, calls = HebbianMemory(512, 8).cuda(), []
    one = module.projected_hebbian
    monkeypatch.setattr("model.layers.memory.projected_hebbian", lambda *a, **b: calls.append(1) or one(*a, **b))
    x = torch.randn(16, 256, 512, device="cuda").to(torch.bfloat16)
    alpha, found = torch.ones((), device="cuda"), []
    for joins in (lambda *_: False, module.joins):
        monkeypatch.setattr("model.layers.memory.joins", joins)
        out, _ = layer(x, alpha)
        found.append((out, *torch.autograd.grad(out.sin().sum(), list(layer.parameters()))))
    assert len(calls) == 1 and torch.equal(found[0][0], found[1][0])
    for a, b in zip(*found):
        assert (a - b).norm() <= 2.0**-6 * a.norm()
    with torch.no_grad():
        layer(x, alpha)
    assert len(calls) == 1
