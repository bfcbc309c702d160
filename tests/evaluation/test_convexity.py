"""The Jensen audit finds what is not convex and passes what is; hull radii against their definition."""

import pytest
import torch
import torch.nn.functional as F

from model.evaluation import convexity_gap, hull_radii
from model.layers.hull import ScalarHull, VectorHull
from tests.conftest import make_random_model

CONVEX = {
    "a plane": lambda x: x @ torch.linspace(-1, 1, 3).double() + 2,
    "a constant": lambda x: torch.full((len(x),), 3.0).double(),
    "zero": lambda x: x[:, 0] * 0,
    "a norm": lambda x: x.norm(dim=1),
    "a square": lambda x: x.square(),
    "log-sum-exp": lambda x: x.logsumexp(1),
    "a maximum of planes": lambda x: torch.stack([x.sum(1), -2 * x[:, 1], x[:, 2] + 1]).amax(0),
    "softplus of a plane": lambda x: torch.logaddexp(5 * x.sum(1), torch.zeros(len(x)).double()),
    "a relu": lambda x: x.relu(),
}
NOT_CONVEX = {
    "sin": lambda x: x.sin(),
    "concave": lambda x: -x.norm(dim=1),
    "a minimum": lambda x: x.amin(1),
    "tanh": lambda x: x[:, 0].tanh(),
    "gelu": lambda x: F.gelu(x),
    "a saddle": lambda x: x[:, 0] * x[:, 1],
    "one bad output of many": lambda x: torch.cat([x.square(), x.square() / 10, x[:, :1].sin()], 1),
}


@pytest.mark.parametrize("name", CONVEX)
def test_convex_functions_pass(name):
    for scale in (0.01, 3.0, 1000.0):
        gap = convexity_gap(CONVEX[name], 3, 2000, scale=scale)
        assert isinstance(gap, float) and gap < 1e-13, (name, scale)


@pytest.mark.parametrize("name", NOT_CONVEX)
def test_functions_that_are_not_convex_are_found(name):
    for seed in range(3):
        assert convexity_gap(NOT_CONVEX[name], 3, 1000, seed=seed) > 1e-3, name


def test_a_small_dent_is_found_where_the_points_are():
    def dented(x):
        return x.square().sum(1) + 0.5 * torch.exp(-20 * x.square().sum(1))

    assert convexity_gap(dented, 3, scale=0.3) > 0.1


@pytest.mark.parametrize("kind", [VectorHull, ScalarHull])
def test_a_hull_gated_or_divided_by_its_input_is_found(kind):
    """What DESIGN forbids: each breaks the convexity of a hull that has it."""
    torch.manual_seed(0)
    hull, direction = kind(6, 3).double(), torch.randn(6, 1, dtype=torch.float64)

    def gate(x):
        return (x @ direction).sigmoid() if kind is VectorHull else (x @ direction).sigmoid().squeeze(1)

    assert convexity_gap(hull, 6) < 1e-13
    assert convexity_gap(lambda x: gate(x) * hull(x), 6) > 1e-2
    assert convexity_gap(lambda x: hull(x) / (1 + gate(x)), 6) > 1e-2
    signed = kind(6, 3).double()
    gain = torch.tensor([1.0, -1, 1, -1, 1, -1]) if kind is VectorHull else -1
    assert convexity_gap(lambda x: gain * signed(x), 6) > 1e-2  # a falling hull is concave


def test_the_gap_is_jensens():
    """Of a step down from 1 to 0 it can be found by hand: with all of the share on the upper side, nearly 1."""
    gap = convexity_gap(lambda x: (x[:, 0] < 0).double(), 1, 20_000)
    size = 0.5  # the standard deviation of as many ones as zeros
    assert 0.9 / size < gap < 1.02 / size
    # In units of the function: of a multiple it is the same.
    assert convexity_gap(lambda x: 1e9 * x.sin(), 2) == pytest.approx(convexity_gap(lambda x: x.sin(), 2))


def test_half_of_the_pairs_lie_close_together():
    """A ripple that far pairs step over shows between near ones as well: with them alone, and with few pairs."""
    seen = []

    def watch(x):
        seen.append(x)
        return x.square().sum(1)

    convexity_gap(watch, 4, 100, scale=3.0)
    between, x, y = seen
    distance = (x - y).norm(dim=1)
    assert (distance[1::2] < 1.5).all() and (distance[::2] > 1.5).sum() > 45
    inside = ((between - x).norm(dim=1) + (between - y).norm(dim=1) - distance).abs()
    assert (inside < 1e-12).all()  # on the segment
    share = (between - y).norm(dim=1) / distance
    assert share.min() < 0.1 and share.max() > 0.9


def test_the_audit_is_deterministic():
    torch.manual_seed(0)
    first = convexity_gap(torch.sin, 5)
    torch.manual_seed(1)
    state = torch.get_rng_state()
    assert convexity_gap(torch.sin, 5) == first
    assert torch.equal(torch.get_rng_state(), state)
    assert convexity_gap(torch.sin, 5, seed=1) != first


def test_the_audit_takes_the_modules_type():
    types = []

    class Spy(torch.nn.Linear):
        def forward(self, x):
            types.append((x.dtype, torch.is_grad_enabled()))
            return super().forward(x)

    assert convexity_gap(Spy(4, 3), 4) < 1e-5
    assert convexity_gap(Spy(4, 3).double(), 4) < 1e-14
    assert convexity_gap(Spy(4, 3).double(), 4, dtype=torch.float64, device="cpu") < 1e-14
    assert set(types[:3]) == {(torch.float32, False)} and set(types[3:]) == {(torch.float64, False)}


def test_the_audit_does_not_pass_what_is_not_a_number():
    assert not convexity_gap(lambda x: x.log(), 2) < 1e-3
    assert not convexity_gap(lambda x: x / 0, 2) < 1e-3


@pytest.mark.parametrize("value", [0, -1, 1.5, True, None])
@pytest.mark.parametrize("name", ["dim", "pairs"])
def test_bad_arguments_are_named(name, value):
    with pytest.raises(ValueError, match=rf"{name}=.*: accepted is an integer ≥ 1"):
        convexity_gap(torch.sin, **({"dim": 2, "pairs": 5} | {name: value}))


@pytest.mark.parametrize("growth", [(), ("grow 0", "petals 0 2", "widen 48")])
@torch.no_grad()
def test_hull_radii_are_their_definition(growth):
    """Root mean square distance of a layer's outputs to their mean, by positions; against a walk through the trunk."""
    model = make_random_model(growth=growth)
    x = torch.randint(0, 256, (2, 60), generator=torch.Generator().manual_seed(0))
    expected, originals = {}, {}
    layers = {name: module for name, module in model.named_modules() if name.endswith(".hull")}
    for name, layer in layers.items():
        originals[name] = layer.forward

        def forward(x, name=name):
            y = originals[name](x)
            flat = y.double().reshape(-1, y.shape[-1])
            centre = sum(flat) / len(flat)
            expected[name] = (sum((row - centre) ** 2 for row in flat) / len(flat)).mean().sqrt().item()
            return y

        layer.forward = forward
    for mode in (True, False):
        radii = hull_radii(model.train(mode), x)
        assert radii == pytest.approx(expected, rel=1e-5)
        assert model.training == mode
    assert len(radii) == (2 if not growth else 5) and all(radius > 0.01 for radius in radii.values())
    assert not any(layer._forward_hooks for layer in layers.values())


def test_hull_radii_of_a_layer_that_says_nothing_are_zero():
    model = make_random_model()
    with torch.no_grad():
        model.blocks[0].hull.groups[0].down.zero_()
    radii = hull_radii(model, torch.randint(0, 256, (1, 30)))
    assert radii["blocks.0.hull"] == 0 < radii["blocks.1.hull"]


def test_hull_radii_leave_the_model_as_it_was_when_the_forward_fails():
    model = make_random_model().train()
    with pytest.raises(ValueError, match="accepted are integer bytes"):
        hull_radii(model, torch.zeros(1, 3))
    assert model.training and not any(module._forward_hooks for module in model.modules())
