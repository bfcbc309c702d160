"""Cross-entropy of bytes against its formula in float64: PyTorch's form, and the Triton kernels.

The loss is a difference of logits, rounded to float32; its gradient lies in [−1, 1] times the byte's.
"""

import os

import pytest
import torch
import torch.nn.functional as F

from model.kernels import cross_entropy
from model.kernels.cross_entropy import byte_cross_entropy

CUDA = torch.cuda.is_available()
interpreter = pytest.mark.skipif(
    cross_entropy.triton is None or os.environ.get("TRITON_INTERPRET") != "1",
    reason="needs the package triton, and TRITON_INTERPRET=1, which conftest sets where there is no CUDA device",
)
card = pytest.mark.skipif(not CUDA or cross_entropy.triton is None, reason="needs a CUDA device and the package triton")


def check(
    impl: str, shape, reduction="none", scale=1.0, offset=0.0, dtype=torch.float32, target=torch.uint8, device="cpu"
):
    g = torch.Generator().manual_seed(sum(shape))
    logits = (torch.randn(*shape, 256, generator=g) * scale + offset).to(dtype)
    targets = torch.randint(256, shape, generator=g)
    targets.view(-1)[:2] = torch.tensor([0, 255])[: targets.numel()]
    grad = torch.randn(shape if reduction == "none" else (), generator=g)

    x = logits.double().requires_grad_()
    largest = x.detach().amax(-1)
    each = (x - largest[..., None]).exp().sum(-1).log() + largest - x.gather(-1, targets[..., None]).squeeze(-1)
    expected = each if reduction == "none" else each.mean()
    (of_x,) = torch.autograd.grad(expected, x, grad.double())

    y = logits.to(device, copy=True).requires_grad_()
    found = byte_cross_entropy(y, targets.to(device, target), reduction, impl)
    assert found.dtype == torch.float32 and found.shape == expected.shape
    (of_y,) = torch.autograd.grad(found, y, grad.to(device))
    assert of_y.dtype == dtype
    rounding = 0.0 if dtype == torch.float32 else 2.0**-7  # the interpreter cuts bfloat16 off
    torch.testing.assert_close(found.cpu().double(), expected.detach(), rtol=1e-6, atol=1e-6)
    unit = 1e-6 * (grad.abs().max() / (1 if reduction == "none" else targets.numel())).item()
    assert ((of_y.cpu().double() - of_x).abs() <= 2 * unit + rounding * of_x.abs()).all()


def test_pytorch_form_is_the_formula_and_has_the_bits_of_pytorchs():
    check("torch", (3, 5))
    check("torch", (7,), "mean", dtype=torch.bfloat16)
    logits, targets = torch.randn(2, 5, 256), torch.randint(256, (2, 5), dtype=torch.uint8)
    expected = F.cross_entropy(logits.flatten(0, 1), targets.flatten().long())
    assert torch.equal(byte_cross_entropy(logits, targets), expected)
    assert byte_cross_entropy(logits.double(), targets).dtype == torch.float64


@interpreter
@pytest.mark.parametrize("reduction", ["none", "mean"])
@pytest.mark.parametrize("shape", [(1,), (2, 4), (3, 7)])
def test_kernels_in_the_interpreter_are_the_formula(shape, reduction):
    assert shape == (2, 4) or torch.Size(shape).numel() % cross_entropy.ROWS
    check("triton", shape, reduction)


@interpreter
@pytest.mark.parametrize(("scale", "offset"), [(0.0, 0.0), (100.0, 0.0), (1.0, 1e4), (1.0, -1e4), (1e30, 0.0)])
def test_logits_of_any_size(scale, offset):
    """Nothing overflows, and what all logits have in common does not count."""
    check("triton", (9,), scale=scale, offset=offset)


@interpreter
def test_half_precision_and_wider_targets():
    check("triton", (9,), dtype=torch.bfloat16, target=torch.int64)


@interpreter
def test_strided_inputs_none_and_minus_infinity():
    logits = torch.randn(2, 256, 3).transpose(1, 2)
    logits[0, 0, 5] = -torch.inf
    targets = torch.randint(6, 256, (3, 2), dtype=torch.uint8).T
    torch.testing.assert_close(*(byte_cross_entropy(logits, targets, "none", impl) for impl in ("torch", "triton")))
    empty = torch.empty(0, 256, requires_grad=True)
    loss = byte_cross_entropy(empty, targets[:0, 0], "none", "triton")
    loss.sum().backward()
    assert loss.shape == (0,) and empty.grad.shape == (0, 256)


@card
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("reduction", ["none", "mean"])
@pytest.mark.parametrize("shape", [(1,), (3, 7), (32, 1024)])
def test_kernels_on_the_card_are_the_formula(shape, reduction, dtype):
    check("triton", shape, reduction, dtype=dtype, device="cuda")
    check("auto", shape, reduction, scale=30.0, dtype=dtype, device="cuda")


def test_bad_arguments_are_named(monkeypatch):
    logits, targets = torch.zeros(2, 256), torch.zeros(2, dtype=torch.long)
    with pytest.raises(ValueError, match="impl='magic': accepted are auto, torch, triton"):
        byte_cross_entropy(logits, targets, impl="magic")
    with pytest.raises(ValueError, match="reduction='sum': accepted are mean and none"):
        byte_cross_entropy(logits, targets, "sum")
    with pytest.raises(ValueError, match=r"\[2, 256\], \[1\]; accepted are shapes \[..., 256\] and \[...\]"):
        byte_cross_entropy(logits, targets[:1])
    monkeypatch.setattr(cross_entropy, "triton", None)
    with pytest.raises(ValueError, match=r"impl='triton': needs the package triton; accepted here are auto and torch"):
        byte_cross_entropy(logits, targets, impl="triton")
