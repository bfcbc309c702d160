"""Float32 products as sums of bfloat16 ones, against float64: results, gradients, and the parts they are made of.

Bounds are relative to the sums of magnitudes |x| |W|ᵀ, as those of any sum of products are.
"""

import os

import pytest
import torch
import torch.nn.functional as F

from model.kernels import float32_linear as module
from model.kernels.float32_linear import float32_linear, parts, splits
from model.layers import byte_memory
from model.layers.byte_memory import ByteMemory

# One part is within 2⁻⁸ of a number, two within 2⁻¹⁷; a product of two numbers of one part each within 2⁻⁷.
FLOAT32, ONE, TWO, PRODUCT = 3e-7, 2.0**-8, 2.0**-17, 2.0**-7 + 2.0**-16
SHAPES = [
    # leading dimensions of x, I, O: one row, odd numbers, as many gates as heads, rows in two dimensions, narrow, wide.
    ((1,), 24, 16),
    ((3,), 7, 5),
    ((2, 5), 64, 8),
    ((4, 3, 2), 40, 16),
    ((24,), 16, 48),
]
CUDA = torch.cuda.is_available()
card = pytest.mark.skipif(not CUDA or module.triton is None, reason="needs a CUDA device and the package triton")
interpreter = pytest.mark.skipif(
    module.triton is None or os.environ.get("TRITON_INTERPRET") != "1",
    reason="needs the package triton, and TRITON_INTERPRET=1, which conftest sets where there is no CUDA device",
)


def inputs(shape, I, O, dtype=torch.bfloat16, bias=True, device="cpu"):  # noqa: E741
    """x, weight, bias, the gradient of the result."""
    g = torch.Generator().manual_seed(I * O)
    x, weight = torch.randn(*shape, I, generator=g), torch.randn(O, I, generator=g) / I**0.5
    grad = torch.randn(*shape, O, generator=g)
    x = x.to(device, dtype).requires_grad_()
    bias = torch.randn(O, generator=g).to(device).requires_grad_() if bias else None
    return x, weight.to(device).requires_grad_(), bias, grad.to(device)


def check(impl, shape, I, O, dtype=torch.bfloat16, bias=True, device="cpu"):  # noqa: E741
    x, weight, bias, grad = inputs(shape, I, O, dtype, bias, device)
    y = float32_linear(x, weight, bias, impl)
    wanted = [tensor for tensor in (x, weight, bias) if tensor is not None]
    found = torch.autograd.grad(y, wanted, grad)
    assert y.dtype == torch.float32 and y.shape == grad.shape
    assert all(a.dtype == b.dtype and a.shape == b.shape for a, b in zip(found, wanted))
    exact = FLOAT32 if device == "cpu" else 1e-6  # tensor cores cut off where float32 units round
    one, two = (0.0, 0.0) if impl == "torch" else (ONE, TWO)
    with torch.no_grad():
        rows, w, g = (tensor.double().flatten(0, -2) for tensor in (x, weight, grad))
        b = torch.zeros(O, dtype=torch.float64, device=device) if bias is None else bias.double()
        error = y.double().flatten(0, -2) - (rows @ w.T + b)
        assert (error.abs() <= (exact + two) * (rows.abs() @ w.T.abs() + b.abs())).all()
        of_x, scale = g @ w, g.abs() @ w.abs()
        error = (found[0].double().flatten(0, -2) - of_x).abs()
        if dtype == torch.bfloat16:
            # As the gradient of any layer under autocast: of bfloat16, and rounded to it again.
            assert (error <= 2.0**-8 * of_x.abs() + (1 + 2.0**-8) * PRODUCT * scale).all()
            assert error.norm() <= 2.0**-8 * of_x.norm()
        else:
            assert (error <= exact * scale).all()
        error = (found[1].double() - g.T @ rows).abs()
        assert (error <= (exact + one) * (g.abs().T @ rows.abs())).all()
        if bias is not None:
            assert ((found[2].double() - g.sum(0)).abs() <= exact * g.abs().sum(0)).all()


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("shape", "I", "O"), SHAPES)
def test_split_form_is_nearly_float32(shape, I, O, bias, monkeypatch):  # noqa: E741
    monkeypatch.setattr(module, "CHUNK", 4)  # 24 rows are four sums
    check("split", shape, I, O, bias=bias)


@pytest.mark.parametrize("kind", ["normal", "heavy tails", "one large channel", "one large weight"])
def test_result_is_within_half_of_what_the_memory_is_promised(kind):
    """1e-5 of the norm, whatever is large; the weights' gradient as exact as its one part, and no bias in either."""
    g = torch.Generator().manual_seed(0)
    x, weight, grad = (torch.randn(256, n, generator=g) for n in (64, 64, 256))
    if kind == "heavy tails":
        x, weight = (y / torch.randn(y.shape, generator=g).abs() for y in (x, weight))
    elif kind != "normal":
        (x if kind == "one large channel" else weight)[:, 7] *= 1000
    x = x / x.square().mean(1, keepdim=True).sqrt()
    x, weight = x.to(torch.bfloat16).requires_grad_(), weight.requires_grad_()
    y = float32_linear(x, weight, impl="split")
    (of_weight,) = torch.autograd.grad(y, weight, grad)
    rows, w = x.detach().double(), weight.detach().double()
    for found, exact, bound in ((y.detach(), rows @ w.T, 5e-6), (of_weight, grad.double().T @ rows, 2.5e-3)):
        error = found.double() - exact
        assert error.norm() <= bound * exact.norm()
        assert (error * exact).sum().abs() <= bound / 4 * exact.square().sum()


def test_a_gradient_of_bfloat16_is_taken_as_it_is():
    x, weight, _, grad = (t if t is None else t.detach() for t in inputs((24,), 40, 16, bias=False))
    expected = module.split_backward(x, weight, grad)
    assert all(torch.equal(a, b) for a, b in zip(module.split_backward(x, weight, grad.to(torch.bfloat16)), expected))
    assert module.split_backward(x, weight, grad.to(torch.bfloat16), to_x=False)[0] is None


def test_torch_form_is_float32():
    for dtype in (torch.float32, torch.bfloat16):
        check("torch", (2, 5), 64, 8, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_torch_form_is_what_the_layers_wrote_out(dtype):
    """To the bit, autocast or not; it is what "auto" takes on the CPU."""
    x, weight, bias, _ = inputs((2, 5), 24, 8, dtype)
    exact = torch.promote_types(dtype, torch.float32)
    expected = F.linear(x.to(exact), weight.to(exact), bias.to(exact))
    for autocast in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            found = float32_linear(x, weight, bias)
        assert found.dtype == exact and torch.equal(found, expected)
        assert [t.dtype for t in torch.autograd.grad(found.sum(), (x, weight))] == [dtype, torch.float32]
    assert float32_linear(x, weight.double()).dtype == torch.float64


def test_split_form_under_autocast_and_without_gradients():
    x, weight, bias, grad = inputs((3,), 16, 8)
    expected = float32_linear(x, weight, bias, "split")
    with torch.autocast("cpu", torch.bfloat16):
        found = float32_linear(x, weight, bias, "split")
        of_weight = torch.autograd.grad(found, weight, grad)[0]  # backward too
    assert torch.equal(found, expected)
    assert torch.equal(of_weight, torch.autograd.grad(expected, weight, grad)[0])
    with torch.no_grad():
        found = float32_linear(x, weight, bias, "split")
    assert torch.equal(found, expected) and not found.requires_grad


def test_each_gradient_alone_is_that_of_all():
    x, weight, bias, grad = inputs((5,), 24, 16)
    every = torch.autograd.grad(float32_linear(x, weight, bias, "split"), (x, weight, bias), grad)
    for i in range(3):
        alone = [tensor.detach().requires_grad_(i == j) for j, tensor in enumerate((x, weight, bias))]
        (found,) = torch.autograd.grad(float32_linear(*alone, "split"), alone[i], grad)
        assert torch.equal(found, every[i])


def test_strided_inputs_none_and_second_derivatives():
    x, weight, _, grad = inputs((6,), 24, 16, bias=False)
    apart = torch.stack([x, x + 1], -1)[..., 0], weight.T.contiguous().T
    y = float32_linear(*apart, impl="split")
    assert torch.equal(y, float32_linear(x, weight, impl="split"))
    for gradient in (grad.T.contiguous().T, torch.ones(()).expand(6, 16)):
        found = torch.autograd.grad(y, apart, gradient, retain_graph=True)
        expected = torch.autograd.grad(float32_linear(x, weight, impl="split"), (x, weight), gradient.contiguous())
        assert all(torch.equal(a, b) for a, b in zip(found, expected))
    empty = torch.empty(0, 24, dtype=torch.bfloat16, requires_grad=True)
    y = float32_linear(empty, weight, impl="split")
    assert y.shape == (0, 16)
    assert not torch.autograd.grad(y.sum(), weight)[0].any()
    y = float32_linear(x, weight, impl="split")
    (gradient,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=card)])
def test_vmap_over_weights_is_the_torch_form(device):
    x, weight, bias, _ = (tensor.detach() for tensor in inputs((module.MIN_ROWS,), 16, 8, device=device))
    weights = torch.stack([weight, -weight])
    found = torch.func.vmap(lambda w: float32_linear(x, w, bias))(weights)
    torch.testing.assert_close(found, torch.stack([float32_linear(x, w, bias, "torch") for w in weights]))


def test_bad_arguments_are_named():
    x, weight, _, _ = inputs((3,), 16, 8, torch.float32)
    with pytest.raises(ValueError, match="impl='magic': accepted are auto, torch, split"):
        float32_linear(x, weight, impl="magic")
    with pytest.raises(ValueError, match=r"impl='split': needs bfloat16 x.*torch.float32.*accepted is torch"):
        float32_linear(x, weight, impl="split")


FORMS = ["torch", pytest.param("triton", marks=interpreter)]


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # the interpreter's, at an infinity less itself
@pytest.mark.parametrize("impl", FORMS)
def test_parts_sum_up_and_stay_finite(impl):
    """To 2⁻¹⁷ of it. The largest numbers would round to infinity; an infinity and a NaN are themselves."""
    g = torch.Generator().manual_seed(0)
    x = torch.randn(9, 40, generator=g) * torch.randn(9, 40, generator=g).mul(20).exp()
    x[0, :6] = torch.tensor([3.4028234e38, -3.4028234e38, 3.39e38, 3.3895e38, 0.0, 1e-30])
    first, second = (part.double() for part in parts(x, (0, 1), impl=impl).chunk(2, 1))
    assert first.isfinite().all()
    # The nearest part leaves 2⁻⁸, the interpreter's, which is cut off, 2⁻⁷.
    left = 2.0**-8 if impl == "torch" else 2.0**-7
    assert ((x - first).abs() <= left * x.abs()).all()
    assert ((x - first - second).abs() <= left**2 / 2 * x.abs() * (1 if impl == "torch" else 2)).all()
    special = torch.tensor([[float("inf"), float("-inf"), float("nan")]])
    found = parts(special, (0, 1), impl=impl).float()
    torch.testing.assert_close(found[:, :3], special, equal_nan=True)
    assert not found[:, 3:].any()


@interpreter
@pytest.mark.parametrize(("R", "C"), [(1, 1), (2, 600), (300, 8), (0, 8)])
def test_kernel_in_the_interpreter_puts_parts_in_their_places(R, C):
    x = torch.randn(R, 2 * C, generator=torch.Generator().manual_seed(R))[:, :C]  # rows that lie apart
    first, second = parts(x, (0, 1), impl="triton").chunk(2, 1)
    assert ((x.double() - first - second).abs() <= 2.0**-14 * x.abs()).all()
    for slots in ((1, 0), (0, 0)):
        for stacked in (False, True):
            expected = torch.cat([(first, second)[slot] for slot in slots], 0 if stacked else 1)
            assert torch.equal(parts(x, slots, stacked, "triton"), expected)
    assert torch.equal(parts(first, (0, 0), impl="triton"), first.repeat(1, 2))


@interpreter
def test_stacked_parts_of_whole_pieces_are_cut_anywhere():
    x = torch.randn(64, 24, generator=torch.Generator().manual_seed(0))
    assert x.numel() % module.PIECE == 0
    assert torch.equal(parts(x, (1, 0), True, "triton"), torch.cat(parts(x, (1, 0), impl="triton").chunk(2, 1)))


def test_byte_memory_scales_its_rows_after_the_product(monkeypatch):
    """What it does where tensor cores take its states, against norm first and product then."""
    torch.manual_seed(0)
    memory = ByteMemory(24, 3, 8, 16, "delta", 4)
    memory.output.weight.data.normal_()
    hidden = torch.randn(2, 12, 24).to(torch.bfloat16).requires_grad_()
    previous = torch.randint(0, 256, (2, 12))

    def run():
        logits, _ = memory(hidden, previous)
        return logits, *torch.autograd.grad(logits.sin().sum(), (hidden, *memory.parameters()))

    def split(x, weight, bias=None):
        return float32_linear(x, weight, bias, "split" if x.dtype == torch.bfloat16 else "torch")

    expected = run()
    monkeypatch.setattr(byte_memory, "splits", lambda *tensors: True)
    monkeypatch.setattr(byte_memory, "float32_linear", split)
    for i, (found, exact) in enumerate(zip(run(), expected)):
        assert found.dtype == exact.dtype
        # hidden's gradient is rounded to bfloat16, those of the weights are from one part
        tolerance = (2e-5, 2.0**-7, 2.0**-8)[min(i, 2)]
        assert (found - exact).abs().max() <= tolerance * exact.abs().max()


@card
@pytest.mark.parametrize(("shape", "I", "O"), [((128, 256), 512, 1544), ((128, 256), 512, 8), ((3, 1000), 64, 520)])
def test_split_form_on_the_card_is_nearly_float32(shape, I, O):  # noqa: E741
    check("auto", shape, I, O, device="cuda")


@card
def test_on_the_card_auto_splits_what_fits_and_gives_the_same_bits_every_time():
    x, weight, bias, grad = inputs((8192,), 512, 512, device="cuda")
    assert splits(x, weight, bias)
    for unfit in ((x[:100], weight), (x.float(), weight), (x, weight[:9]), (x, weight.half())):
        assert not splits(*unfit)
    runs = []
    for impl in ("auto", "split"):
        y = float32_linear(x, weight, bias, impl)
        runs.append((y, *torch.autograd.grad(y, (x, weight, bias), grad)))
    assert all(torch.equal(a, b) for a, b in zip(*runs))


@card
@pytest.mark.parametrize("slots", [(1, 0), (0, 0)])
def test_kernel_on_the_card_is_the_torch_form(slots):
    x = torch.randn(1000, 520) * torch.randn(1000, 520).mul(20).exp()
    x[0, :5] = torch.tensor([float("inf"), float("nan"), 3.4028234e38, -3.39e38, 1e-38])
    for C in (520, 512, 8):
        for stacked in (False, True):
            found = parts(x[:, :C].cuda(), slots, stacked, "triton")
            assert torch.equal(found.nan_to_num(7.0).cpu(), parts(x[:, :C], slots, stacked, "torch").nan_to_num(7.0))
