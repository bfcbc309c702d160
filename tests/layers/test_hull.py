"""Hulls and petals: their formulas in float64, convexity before and after training, freezing, growth of a layer."""

import copy
import math
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from model import AGIFormer, AGIFormerConfig
from model.evaluation.convexity import convexity_gap
from model.layers.hull import (
    CHRYSALIS,
    CRYOGENIC,
    FLUID,
    ConvexPetals,
    HullLayer,
    PetalGroup,
    ScalarHull,
    SwiGLUPetals,
    VectorHull,
)
from tests.conftest import TINY

KINDS = [ConvexPetals, SwiGLUPetals]
ROUNDING = 1e-12  # convexity gaps of float64 functions, in units of the function's size


def random_group(kind: type[PetalGroup], dim=6, petals=5, width=4, dtype=torch.float64, seed=0) -> PetalGroup:
    """A group whose every weight counts."""
    torch.manual_seed(seed)
    group = kind(dim, petals, width).to(dtype)
    with torch.no_grad():
        for name, parameter in group.named_parameters():
            parameter.fill_(0.7) if name == "log_tau" else parameter.normal_(std=0.5)
    return group


def train(module: torch.nn.Module, dim: int, steps: int = 60) -> float:
    """Adam towards random targets, so that every weight moves far; the last loss over the first."""
    g = torch.Generator().manual_seed(1)
    x = torch.randn(64, dim, generator=g).double()
    target = 3 * torch.randn(module(x).shape, generator=g).double()
    optimizer = torch.optim.Adam(module.parameters(), 0.05)
    losses = []
    for _ in range(steps):
        loss = F.mse_loss(module(x), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses[-1] / losses[0]


# ── convex functions ─────────────────────────────────────────────────────────────────────────────────────────────────


def hull_formula(hull: VectorHull, x: torch.Tensor) -> torch.Tensor:
    """One x [D] in float64, petal by petal."""
    tau = hull.log_tau.exp()
    total = 0
    for p in range(hull.petals):
        hidden = torch.log(1 + torch.exp(hull.up[p] @ x + hull.bias[p]))
        petal = hull.raw[p].abs().T @ hidden + hull.skip[p] @ x + hull.offset[p]
        total = total + (tau * petal).exp()
    return total.log() / tau


@pytest.mark.parametrize("petals", [1, 3])
@pytest.mark.parametrize("kind", [VectorHull, ScalarHull])
def test_hulls_are_their_formula(kind, petals):
    torch.manual_seed(0)
    hull = kind(5, petals, 7).double()
    with torch.no_grad():
        for parameter in hull.parameters():
            parameter.normal_(std=0.7)
    x = torch.randn(2, 3, 5, dtype=torch.float64)
    expected = torch.stack([hull_formula(hull, row) for row in x.view(-1, 5)])
    found = hull(x)
    assert found.shape == ((2, 3, 5) if kind is VectorHull else (2, 3))
    torch.testing.assert_close(found.reshape(6, -1), expected)


@pytest.mark.parametrize("shape", [(5,), (1, 5), (4, 5), (2, 3, 4, 5), (0, 5), (2, 0, 5)])
def test_hulls_keep_every_shape_and_type(shape):
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        x = torch.randn(shape, dtype=dtype)
        vector, scalar = VectorHull(5, 2).to(dtype)(x), ScalarHull(5, 2).to(dtype)(x)
        assert (vector.shape, vector.dtype) == (shape, dtype)
        assert (scalar.shape, scalar.dtype) == (shape[:-1], dtype)
    for kind in KINDS:
        assert random_group(kind, dim=5)(torch.randn(shape, dtype=torch.float64)).shape == shape


@pytest.mark.parametrize("kind", [VectorHull, ScalarHull])
def test_hulls_are_convex_before_and_after_training(kind):
    torch.manual_seed(0)
    hull = kind(4, 3, 8).double()
    assert convexity_gap(hull, 4, 2000) < ROUNDING
    assert train(hull, 4) < 0.97  # it did learn
    assert convexity_gap(hull, 4, 2000) < ROUNDING
    assert convexity_gap(hull, 4, 2000, scale=100.0) < ROUNDING
    assert convexity_gap(lambda x: -hull(x), 4, 2000) > 1e-3  # and it is not merely a plane


def test_hulls_are_convex_for_any_weights():
    """The weights on convex features count by their size: none can be negative, whatever an optimizer does."""
    torch.manual_seed(0)
    hull = VectorHull(4, 3, 8).double()
    with torch.no_grad():
        hull.raw.normal_(std=3)
        hull.log_tau.fill_(2.0)
    assert (hull.raw < 0).any()
    assert convexity_gap(hull, 4, 2000) < ROUNDING
    mirrored = copy.deepcopy(hull)
    with torch.no_grad():
        mirrored.raw.neg_()
    x = torch.randn(9, 4, dtype=torch.float64)
    assert torch.equal(hull(x), mirrored(x))


def test_a_hull_does_not_overflow():
    hull = VectorHull(4, 2)
    with torch.no_grad():
        hull.log_tau.fill_(3.0)
    assert hull(torch.full((1, 4), 1e4)).isfinite().all()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0, 2), "dim=0: accepted is an integer ≥ 1"),
        ((4, -1), "petals=-1: accepted"),
        ((4, True), "petals=True: accepted"),
        ((4, 2, 0), "width=0: accepted"),
        ((4.0, 2), r"dim=4\.0: accepted"),
    ],
)
def test_bad_sizes_are_named(arguments, message):
    for kind in (VectorHull, ScalarHull):
        with pytest.raises(ValueError, match=message):
            kind(*arguments)


@pytest.mark.parametrize("shape", [(), (3,), (4, 3), (4, 0)])
def test_bad_inputs_are_named(shape):
    with pytest.raises(ValueError, match=r"x of shape .*: accepted is \[\.\.\., 4\]"):
        VectorHull(4, 2)(torch.zeros(shape))


# ── petals ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_convex_petals_are_their_formula():
    """n · (rising − falling), each hull a log-mean-exp over petals of squared ReLU features; one x at a time."""
    group = random_group(ConvexPetals)
    x = torch.randn(2, 3, 6, dtype=torch.float64)
    tau, n = group.log_tau.exp().item(), 5
    expected, hulls = [], ([], [])
    for row in x.view(-1, 6):
        features = [torch.relu(group.up[p] @ row + group.bias[p]) ** 2 for p in range(n)]
        for side, sign in enumerate((1, -1)):
            petals = [(sign * group.down[p]).clamp(min=0).T @ features[p] for p in range(n)]
            hulls[side].append(torch.stack([(tau * petal).exp() for petal in petals]).mean(0).log() / tau)
        expected.append(n * (hulls[0][-1] - hulls[1][-1]))
    torch.testing.assert_close(group(x), torch.stack(expected).view(2, 3, 6))
    rising, falling = group.hulls(x)
    torch.testing.assert_close(rising, torch.stack(hulls[0]).view(2, 3, 6))
    torch.testing.assert_close(falling, torch.stack(hulls[1]).view(2, 3, 6))
    torch.testing.assert_close(group(x), n * (rising - falling))


def test_convex_petals_without_temperature_are_a_plain_layer():
    """τ → 0: the two matrices with a squared ReLU between them."""
    group = random_group(ConvexPetals)
    with torch.no_grad():
        group.log_tau.fill_(math.log(1e-9))
    x = torch.randn(7, 6, dtype=torch.float64)
    hidden = torch.relu(x @ group.up.flatten(0, 1).T + group.bias.flatten()) ** 2
    torch.testing.assert_close(group(x), hidden @ group.down.flatten(0, 1), rtol=1e-6, atol=1e-6)


def test_swiglu_petals_are_their_formula():
    group = random_group(SwiGLUPetals)
    x = torch.randn(2, 3, 6, dtype=torch.float64)
    expected = 0
    for p in range(5):
        gate, value = x @ group.up[p, :4].T, x @ group.up[p, 4:].T
        expected = expected + (gate / (1 + torch.exp(-gate)) * value) @ group.down[p]
    torch.testing.assert_close(group(x), expected)


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_agree_with_finite_differences(kind):
    group = random_group(kind, petals=2, width=3)
    names = [name for name, _ in group.named_parameters()]

    def function(x, *weights):
        return torch.func.functional_call(group, dict(zip(names, weights)), (x,))

    x = torch.randn(3, 6, dtype=torch.float64, requires_grad=True)
    weights = [p.detach().clone().requires_grad_() for p in group.parameters()]
    assert torch.autograd.gradcheck(function, (x, *weights))


@pytest.mark.parametrize("kind", KINDS)
def test_a_new_group_gives_nothing_and_learns(kind):
    torch.manual_seed(0)
    group = kind(6, 3, 4)
    x = torch.randn(50, 6)
    assert torch.equal(group(x), torch.zeros(50, 6))
    optimizer = torch.optim.SGD(group.parameters(), 0.01)
    (group(x) - x).square().sum().backward()
    assert group.down.grad.flatten(0, 1).any(1).all()  # every hidden unit's way out
    optimizer.step()
    optimizer.zero_grad()
    (group(x) - x).square().sum().backward()
    assert all(parameter.grad.any() for parameter in group.parameters())
    assert all(weight.grad.flatten(1).any(1).all() for weight in group.petal_parameters().values())


@pytest.mark.parametrize("kind", KINDS)
def test_a_layer_has_the_weights_of_a_two_matrix_layer(kind):
    """4 petals in the size of 2048 hidden units: within 1%."""
    name = "convex" if kind is ConvexPetals else "swiglu"
    with torch.device("meta"):
        layer = HullLayer(512, 4, 2048, name)
    assert sum(p.numel() for p in layer.parameters()) == pytest.approx(2 * 512 * 2048, rel=0.01)


def test_both_hulls_of_every_block_are_convex_before_and_after_training():
    torch.manual_seed(0)
    model = AGIFormer(AGIFormerConfig(**TINY))
    model.add_petals(n=2)
    x = torch.randint(0, 256, (4, 64), generator=torch.Generator().manual_seed(2))

    def gaps() -> list[float]:
        found = []
        for block in model.blocks:
            for group in copy.deepcopy(block.hull).double().groups:
                for side in (0, 1):
                    found.append(convexity_gap(lambda x, g=group, s=side: g.hulls(x)[s], 32, 300))
        return found

    def falls() -> list[float]:
        groups = [group for block in model.blocks for group in copy.deepcopy(block.hull).double().groups]
        return [convexity_gap(lambda x, g=g: -g.hulls(x)[0], 32, 300) for g in groups]

    assert len(gaps()) == 8 and max(gaps()) < ROUNDING
    before = [p.detach().clone() for p in model.parameters()]
    optimizer = torch.optim.AdamW(model.parameters(), 0.01)
    losses = []
    for _ in range(12):
        loss = model.loss(x)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.3
    assert not any(torch.equal(p, old) for p, old in zip(model.parameters(), before))
    assert max(gaps()) < ROUNDING
    assert min(falls()) > 1e-3  # the hulls are curved by now: the audit had something to find
    # What the layer returns is their difference, which need not be convex, and is not.
    assert max(convexity_gap(copy.deepcopy(block.hull).double(), 32, 300) for block in model.blocks) > 1e-3


# ── freezing ─────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("kind", KINDS)
def test_a_status_is_validated(kind):
    group = random_group(kind, petals=3)
    for status in (-1, 3, 0.5, None, "fluid"):
        with pytest.raises(ValueError, match=r"status=.*accepted are 0 fluid, 1 cryogenic, 2 chrysalis"):
            group.set_status([0], status)
    for petals in ([3], [-1], [0, 7], [True, False, True], torch.tensor([True, False, True]), [0.5]):
        with pytest.raises(ValueError, match=r"petals=.*: accepted are indices from 0 to 2"):
            group.set_status(petals, CHRYSALIS)
    assert not group.status.any()
    group.set_status(torch.tensor([2, 0], dtype=torch.int32), CRYOGENIC)
    group.set_status([], CHRYSALIS)
    group.set_status([2], FLUID)
    assert group.status.tolist() == [1, 0, 0] and group.status.dtype == torch.uint8


def results(group: PetalGroup, x: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """(output, gradients by name with that of the input as "x")."""
    x = x.clone().requires_grad_()
    group.zero_grad(set_to_none=True)
    y = group(x)
    (y * torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y)).sum().backward()
    gradients = {name: p.grad for name, p in group.named_parameters()}
    return y.detach(), {name: None if g is None else g.clone() for name, g in gradients.items()} | {"x": x.grad}


@pytest.mark.parametrize("asleep", [[0], [4], [2], [0, 1], [0, 2, 4], [1, 2, 3], [0, 1, 2, 3]])
@pytest.mark.parametrize("kind", KINDS)
def test_petals_in_chrysalis_take_no_gradient_and_nothing_else_changes(kind, asleep):
    group = random_group(kind)
    x = torch.randn(3, 4, 6, dtype=torch.float64)
    y, expected = results(group, x)
    group.set_status(asleep, CHRYSALIS)
    found, gradients = results(group, x)
    torch.testing.assert_close(found, y)
    awake = [i for i in range(5) if i not in asleep]
    for name in group.petal_parameters():
        assert not gradients[name][asleep].any(), name
        assert expected[name][asleep].flatten(1).any(1).all(), name
        torch.testing.assert_close(gradients[name][awake], expected[name][awake])
    torch.testing.assert_close(gradients["x"], expected["x"])
    if kind is ConvexPetals:
        torch.testing.assert_close(gradients["log_tau"], expected["log_tau"])
    group.set_status(range(5), FLUID)
    again, gradients = results(group, x)
    assert torch.equal(again, y) and all(torch.equal(gradients[name], expected[name]) for name in expected)


@pytest.mark.parametrize("kind", KINDS)
def test_a_group_wholly_in_chrysalis_has_no_gradients(kind):
    group = random_group(kind)
    x = torch.randn(3, 6, dtype=torch.float64)
    y, expected = results(group, x)
    group.set_status(range(5), CHRYSALIS)
    found, gradients = results(group, x)
    torch.testing.assert_close(found, y)
    torch.testing.assert_close(gradients["x"], expected["x"])
    assert all(gradients[name] is None for name in group.petal_parameters())


@pytest.mark.parametrize("kind", KINDS)
def test_cryogenic_petals_are_the_optimizers_business(kind):
    group = random_group(kind)
    x = torch.randn(3, 6, dtype=torch.float64)
    y, expected = results(group, x)
    group.set_status([1, 3], CRYOGENIC)
    found, gradients = results(group, x)
    assert torch.equal(found, y) and all(torch.equal(gradients[name], expected[name]) for name in expected)


@pytest.mark.parametrize("kind", KINDS)
def test_chrysalis_saves_the_compute_of_its_gradients(kind):
    """Forward 1, gradient of the input 1, of the weights 1: of 8 petals asleep 6 save 6/8 of the last third."""
    group = random_group(kind, petals=8)
    x = torch.randn(10, 6, dtype=torch.float64)
    flops = []
    for asleep in ([], [0, 1, 2, 3, 4, 5]):
        group.set_status(asleep, CHRYSALIS)
        with FlopCounterMode(display=False) as counter:
            results(group, x)
        flops.append(counter.get_total_flops())
    assert flops[1] / flops[0] == pytest.approx(1 - 6 / 8 / 3, rel=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_a_status_is_loaded_copied_and_pickled(kind):
    """Not only the numbers: the petals sleep in the copy too, and wake when a state without sleepers is loaded."""
    x = torch.randn(3, 6, dtype=torch.float64)
    group = random_group(kind)
    awake = copy.deepcopy(group.state_dict())
    group.set_status([1, 2], CHRYSALIS)
    group.set_status([4], CRYOGENIC)
    loaded = random_group(kind, seed=9)
    nested = torch.nn.Sequential(torch.nn.Identity(), loaded)  # as a part of a model
    nested.load_state_dict({f"1.{name}": value for name, value in group.state_dict().items()})
    for twin in (loaded, copy.deepcopy(group), pickle.loads(pickle.dumps(group))):
        assert twin.status.tolist() == [0, 2, 2, 0, 1]
        y, gradients = results(twin, x)
        expected, expected_gradients = results(group, x)
        assert torch.equal(y, expected)
        for name in group.petal_parameters():
            assert torch.equal(gradients[name], expected_gradients[name])
            assert not gradients[name][[1, 2]].any() and gradients[name][[0, 3, 4]].flatten(1).any(1).all()
        twin.load_state_dict(awake)
        assert results(twin, x)[1]["up"].flatten(1).any(1).all()


# ── growth of a layer ────────────────────────────────────────────────────────────────────────────────────────────────


def random_layer(kind: str, dtype=torch.float32) -> HullLayer:
    torch.manual_seed(0)
    layer = HullLayer(16, 3, 48, kind).to(dtype)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.normal_(std=0.3)
    return layer


@pytest.mark.parametrize("kind", ["convex", "swiglu"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_added_petals_change_no_bit(kind, dtype):
    layer = random_layer(kind, dtype)
    x = torch.randn(2, 33, 16, dtype=dtype)
    before = layer(x)
    layer.eval()
    for n, total in ((1, 4), (5, 9)):
        layer.add_petals(n)
        assert torch.equal(layer(x), before) and layer.petals == total
    assert all(p.dtype == dtype and p.requires_grad for p in layer.parameters())
    assert not any(module.training for module in layer.modules())
    assert [group.petals for group in layer.groups] == [3, 1, 5]
    assert len({group.width for group in layer.groups}) == 1  # new petals are as wide as the old


@pytest.mark.parametrize("kind", ["convex", "swiglu"])
def test_added_petals_change_no_bit_under_autocast(kind):
    layer = random_layer(kind)
    for x in (torch.randn(2, 33, 16), torch.randn(2, 33, 16).bfloat16()):
        with torch.autocast("cpu", torch.bfloat16):
            before = layer(x)
            layer.add_petals(2)
            after = layer(x)
        assert after.dtype == before.dtype and torch.equal(after, before)


@pytest.mark.parametrize("kind", ["convex", "swiglu"])
def test_added_petals_change_no_gradient_of_the_old_and_learn(kind):
    layer = random_layer(kind)
    x = torch.randn(40, 16)
    old = list(layer.parameters())

    def gradients() -> list[torch.Tensor]:
        layer.zero_grad()
        (layer(x) - 1).square().sum().backward()
        return [p.grad.clone() for p in old]

    before = gradients()
    layer.add_petals(2)
    assert all(torch.equal(a, b) for a, b in zip(gradients(), before))
    assert layer.groups[1].down.grad.flatten(1).any(1).all()
    # Grown, the layer is the sum of its groups.
    with torch.no_grad():
        layer.groups[1].down.normal_()
    torch.testing.assert_close(layer(x), layer.groups[0](x) + layer.groups[1](x))
    assert not torch.allclose(layer(x), layer.groups[0](x))
