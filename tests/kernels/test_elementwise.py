"""Squared ReLU and the split by sign: PyTorch against the formula, and the Triton kernels against that, to the bit."""

import pytest
import torch

from model.kernels import elementwise
from model.kernels.elementwise import split_signs, squared_relu

CUDA = torch.cuda.is_available()
needs_triton = pytest.mark.skipif(elementwise.triton is None, reason="needs the package triton")
cuda = pytest.mark.skipif(not CUDA, reason="needs a CUDA device")
SPECIAL = [0.0, -0.0, 1e-30, -1e-30, 1e4, -1e4, float("inf"), float("-inf")]
SHAPES = [(8,), (3, 5), (2, 7, 129), (1, 1, 1025), (0, 4)]


def values(shape, dtype=torch.float32, device="cpu"):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1)) * 3
    flat = x.view(-1)
    if flat.numel() >= len(SPECIAL):
        flat[: len(SPECIAL)] = torch.tensor(SPECIAL)
    return x.to(device, dtype).requires_grad_()


def both(function, x, impl, grad):
    x = x.detach().clone().requires_grad_()
    y = function(x, impl=impl)
    return y.detach(), torch.autograd.grad(y, x, grad.to(y))[0]


def agree(function, x, grad):
    for found, expected in zip(both(function, x, "triton", grad), both(function, x, "torch", grad)):
        assert found.dtype == expected.dtype
        assert torch.equal(found.nan_to_num(7.0), expected.nan_to_num(7.0))
        assert torch.equal(found.isnan(), expected.isnan())


def test_squared_relu_is_its_formula_and_its_gradient():
    x = torch.tensor([-2.0, -0.0, 0.0, 0.5, 3.0], dtype=torch.float64, requires_grad=True)
    y = squared_relu(x)
    assert y.tolist() == [0, 0, 0, 0.25, 9]
    assert torch.autograd.grad(y.sum(), x)[0].tolist() == [0, 0, 0, 1, 6]
    smooth = torch.tensor([-1.5, 0.3, 2.0], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(squared_relu, smooth)


def test_the_split_keeps_both_sides_and_frees_a_zero():
    weight = torch.tensor([[-2.0, 0.0, 3.0]], dtype=torch.float64, requires_grad=True)
    out = split_signs(weight)
    assert out.tolist() == [[0, 0, 3, 2, 0, 0]]
    (grad,) = torch.autograd.grad(out, weight, torch.tensor([[1.0, 2, 3, 4, 5, 6]], dtype=torch.float64))
    assert grad.tolist() == [[-4, 2 - 5, 3]]
    assert split_signs(weight, torch.bfloat16).dtype == torch.bfloat16


@needs_triton
@pytest.mark.skipif(CUDA, reason="with a CUDA device the kernels are compiled for it")
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("function", [squared_relu, split_signs])
def test_kernels_in_the_interpreter(function, shape):
    x = values(shape)
    wide = shape if function is squared_relu else (*shape[:-1], 2 * shape[-1])
    agree(function, x, torch.randn(wide, generator=torch.Generator().manual_seed(2)))


@cuda
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("function", [squared_relu, split_signs])
def test_kernels_on_the_card(function, shape, dtype):
    x = values(shape, dtype, "cuda")
    wide = shape if function is squared_relu else (*shape[:-1], 2 * shape[-1])
    agree(function, x, torch.randn(wide, generator=torch.Generator().manual_seed(2)).cuda())


@pytest.mark.parametrize("function", [squared_relu, split_signs])
def test_an_unknown_implementation_is_named(function):
    with pytest.raises(ValueError, match="impl='cuda': accepted are auto, torch, triton"):
        function(torch.zeros(2, 2), impl="cuda")
