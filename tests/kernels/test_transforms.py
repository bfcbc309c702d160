"""`apply`: the Function's own gradient where one is wanted, plain operations for vmap where none is."""

import pytest
import torch
from torch.func import functional_call, stack_module_state, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

from model.kernels.chunked import chunked_hebbian
from model.kernels.hull import signed_hull
from model.kernels.transforms import apply, batched
from model.layers.attention import WindowAttention
from model.layers.pyramid import SinkhornMixer
from tests.conftest import TINY, make_random_model


class Doubled(torch.autograd.Function):
    """Twice x, with a gradient that no transform could derive."""

    @staticmethod
    def forward(ctx, x, factor):
        ctx.save_for_backward(x)
        return factor * x

    @staticmethod
    def backward(ctx, grad):
        (x,) = ctx.saved_tensors
        return grad * 0 + 7 * x, None


def test_the_gradient_is_the_functions_own():
    x = torch.randn(5, requires_grad=True)
    y = apply(Doubled, x, 2.0)
    (gradient,) = torch.autograd.grad(y.sum(), x)
    assert torch.equal(y, 2 * x) and torch.equal(gradient, 7 * x)


@pytest.mark.parametrize("off", [torch.no_grad, torch.inference_mode])
def test_without_gradients_it_is_the_forward_alone(off):
    x = torch.randn(5, requires_grad=True)
    with off():
        y = apply(Doubled, x, 2.0)
    assert torch.equal(y, 2 * x) and y.grad_fn is None and not y.requires_grad


def test_vmap_goes_through_it_without_gradients():
    x = torch.randn(4, 3, 5)
    with torch.no_grad():
        y = vmap(lambda row: apply(Doubled, row, 3.0))(x)
    assert torch.equal(y, 3 * x)


def test_batched():
    seen = []

    def look(x, y):
        seen.append((batched(x), batched(y), batched(y, x), batched()))
        return x

    x = torch.randn(2, 3)
    vmap(look, in_dims=(0, None))(x, torch.randn(3))
    assert seen == [(True, False, True, False)] and not batched(x)


# ── the operations that go through it ────────────────────────────────────────────────────────────────────────────────


def hebbian_case(generator):
    q, k, v = (torch.randn(5, 1, 2, 21, 8, generator=generator) for _ in range(3))
    decay = -torch.rand(5, 1, 2, 21, generator=generator)
    M, z = torch.randn(5, 1, 2, 8, 8, generator=generator), torch.rand(5, 1, 2, 8, generator=generator)

    def run(q, k, v, decay, M, z):
        out, (M, z) = chunked_hebbian(q, k, v, decay, (M, z))
        return out, M, z

    return run, (q, k, v, decay, M, z)


def hull_case(generator):
    o, tau = torch.randn(5, 3, 4, 12, generator=generator), torch.rand(5, 1, generator=generator) + 0.1
    return lambda o, tau: (signed_hull(o, tau),), (o, tau)


CASES = {"hebbian": hebbian_case, "hull": hull_case}


@pytest.mark.parametrize("name", CASES)
def test_operations_under_vmap_agree_with_a_loop(name):
    run, inputs = CASES[name](torch.Generator().manual_seed(0))
    with torch.no_grad():
        together = vmap(run)(*inputs)
    for i in range(5):
        alone = run(*(x[i] for x in inputs))  # with gradients on: the Function itself
        for found, expected in zip(together, alone):
            torch.testing.assert_close(found[i], expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", CASES)
def test_operations_have_equal_outputs_with_and_without_gradients(name):
    run, inputs = CASES[name](torch.Generator().manual_seed(1))
    inputs = [x[0].clone().requires_grad_() for x in inputs]
    wanted = run(*inputs)
    with torch.no_grad():
        plain = run(*inputs)
    for x, y in zip(wanted, plain):
        assert torch.equal(x, y) and x.requires_grad and not y.requires_grad
    gradients = torch.autograd.grad(sum(x.square().sum() for x in wanted), inputs)
    assert all(gradient.abs().sum() > 0 for gradient in gradients)


PARTS = {
    "hebbian": {},
    "delta": {"memory_rule": "delta"},
    "swiglu": {"hull": "swiglu"},
    "tree": {"growth": ("grow 0", "grow 0")},
    "widened": {"growth": ("widen 64", "petals 1 2")},
    "anchors": {"anchors": True},
}


@pytest.mark.parametrize("length", [1, 37])
@pytest.mark.parametrize("variant", PARTS)
def test_whole_models_under_vmap_agree_with_a_loop(variant, length):
    models = [make_random_model(seed, **(TINY | {"n_layers": 1} | PARTS[variant])) for seed in range(3)]
    parameters, buffers = stack_module_state(models)
    x = torch.randint(256, (2, length), dtype=torch.uint8, generator=torch.Generator().manual_seed(4))
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        together = vmap(lambda p, b: functional_call(models[0], (p, b), (x,)))(parameters, buffers)
    with torch.no_grad():
        alone = torch.stack([model(x) for model in models])
    assert alone.std(0).min() > 0
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=2e-5)


def test_layers_have_equal_outputs_with_and_without_gradients():
    model = make_random_model(growth=("grow 0", "thaw 0"))
    x = torch.randint(256, (2, 37), dtype=torch.uint8, generator=torch.Generator().manual_seed(4))
    kinds = {type(each) for each in model.modules()}
    assert {WindowAttention, SinkhornMixer} <= kinds  # all that go through `apply`
    wanted = model(x)
    with torch.no_grad():
        assert torch.equal(model(x), wanted)
    wanted.square().mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_transforms_that_want_gradients_say_that_they_cannot():
    """An autograd.Function of ours has no rule for them: an error, never a wrong gradient."""
    with pytest.raises(RuntimeError, match="setup_context"):
        torch.func.grad(lambda x: apply(Doubled, x, 2.0).sum())(torch.randn(3))
