"""The parts of a block of blocks: router, mixer, node; against their formulas, their bounds and their states."""

import math

import pytest
import torch

from model import AGIFormerConfig
from model.agiformer import initialise
from model.layers.block import BlockState, HybridBlock
from model.layers.pyramid import (
    COLDEST,
    COOLING,
    HOTTEST,
    LOAD_MEMORY,
    DirichletRouter,
    Node,
    NodeState,
    SinkhornMixer,
    depth,
    learning_leaves,
    leaves,
)
from model.layers.rotary import Rotary
from tests.conftest import TINY

# ── router ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def random_router(std: float = 0.5) -> DirichletRouter:
    torch.manual_seed(0)
    router = DirichletRouter(8)
    with torch.no_grad():
        router.concentration.weight.normal_(std=std)
        router.concentration.bias.normal_(std=std)
    return router


def concentrations(router: DirichletRouter, x: torch.Tensor) -> torch.Tensor:
    """softplus(W x + b) + 1/2 in float64."""
    return (
        x.double() @ router.concentration.weight.double().T + router.concentration.bias.double()
    ).exp().log1p() + 0.5


def test_evaluation_is_the_mean():
    router = random_router().eval()
    x = torch.randn(3, 7, 8)
    c = concentrations(router, x)
    for temperature in (1.0, 0.1):
        router.temperature.fill_(temperature)
        found = router(x)
        assert found.dtype == torch.float32
        torch.testing.assert_close(found.double(), c / c.sum(-1, keepdim=True), rtol=1e-5, atol=1e-6)
        assert torch.equal(router(x), found)
    assert router.temperature.item() == pytest.approx(0.1) and torch.equal(router.load, torch.tensor([0.5, 0.5]))


def test_training_draws_samples():
    router = random_router()
    x = torch.randn(3, 7, 8)
    torch.manual_seed(5)
    first, second = router(x), router(x)
    assert not torch.isclose(first, second).all(-1).any()  # at every position
    torch.manual_seed(5)
    router.temperature.fill_(HOTTEST)
    assert torch.equal(router(x), first)
    for weights in (first, second, router.eval()(x)):
        assert weights.shape == (3, 7, 2) and (weights >= 0).all()
        torch.testing.assert_close(weights.sum(-1), torch.ones(3, 7), rtol=0, atol=1e-6)


@pytest.mark.parametrize("temperature", [1.0, 0.1, 0.01])
def test_samples_have_the_moments_of_the_dirichlet(temperature):
    """Mean m and variance m (1 − m) / (s + 1), s the sum of concentrations over the temperature; within 5 sigmas."""
    n = 20_000
    router = random_router()
    x = torch.randn(1, 2, 8)
    router.temperature.fill_(temperature)
    samples = router(x.expand(n, 2, 8)).double().detach()
    c = concentrations(router, x)[0] / temperature
    s = c.sum(-1, keepdim=True)
    mean, variance = c / s, c / s * (1 - c / s) / (s + 1)
    assert ((samples.mean(0) - mean).abs() < 5 * (variance / n).sqrt()).all()
    torch.testing.assert_close(samples.var(0), variance, rtol=0.06, atol=0)


def test_the_temperature_falls_and_the_sample_closes_in_on_the_mean():
    router = random_router()
    x = torch.randn(2, 50, 8)
    mean = router.eval()(x)
    router.train()
    distances = []
    for step in range(1, 1001):
        weights = router(x)
        if step in (1, 300, 1000):
            distances.append((weights - mean).square().mean().sqrt().item())
            assert router.temperature.item() == pytest.approx(max(HOTTEST * COOLING**step, COLDEST), rel=1e-3)
    # The standard deviation goes with the root of the temperature once that is low.
    assert distances[0] > 1.5 * distances[1] > 3 * distances[2] and distances[2] < 0.05


def test_load_follows_the_weights():
    router = random_router(std=0.0)
    with torch.no_grad():
        router.concentration.bias.copy_(torch.tensor([20.0, -20.0]))  # nearly all to the first
    x = torch.randn(1, 64, 8)
    expected = torch.tensor([0.5, 0.5])
    for _ in range(50):
        expected = LOAD_MEMORY * expected + (1 - LOAD_MEMORY) * router(x).detach().mean((0, 1))
    torch.testing.assert_close(router.load, expected)
    assert router.load[0] > 0.65
    assert not router.load.requires_grad


def test_router_trains_towards_the_child_that_helps():
    """The gradient passes through the samples, and several calls before one backward pass are as good as one."""
    router = random_router(std=0.0)
    optimizer = torch.optim.Adam(router.parameters(), 0.1)
    x = torch.randn(4, 16, 8)
    better = (x[..., 0] > 0).long()
    for _ in range(60):
        loss = -sum(router(x).gather(-1, better.unsqueeze(-1)).mean() for _ in range(2))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    mean = router.eval()(x).gather(-1, better.unsqueeze(-1)).mean()
    assert mean > 0.75


def test_router_is_float32_under_autocast():
    router = random_router().eval()
    x = torch.randn(2, 9, 8).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        found = router(x)
    assert found.dtype == torch.float32 and torch.equal(found, router(x.float()))


# ── mixer ────────────────────────────────────────────────────────────────────────────────────────────────────────────


def random_mixer(slices: int, amount: float, std: float = 1.0, seed: int = 0) -> SinkhornMixer:
    torch.manual_seed(seed)
    mixer = SinkhornMixer(slices)
    mixer.reset()
    with torch.no_grad():
        mixer.scores.mul_(std)
        mixer.amount.fill_(amount)
    return mixer


@pytest.mark.parametrize("slices", [1, 2, 4, 8, 20])
def test_the_matrix_is_doubly_stochastic(slices):
    """Rows to rounding; columns within 1e-2 for scores of the size they start with, 0.15 for three times that."""
    for seed in range(10):
        matrix = random_mixer(slices, 0.0, seed=seed).matrix().detach()
        assert (matrix >= 0).all()
        torch.testing.assert_close(matrix.sum(1), torch.ones(slices), rtol=0, atol=1e-5)
        torch.testing.assert_close(matrix.sum(0), torch.ones(slices), rtol=0, atol=1e-2)
        sharper = random_mixer(slices, 0.0, std=3.0, seed=seed).matrix().detach()
        torch.testing.assert_close(sharper.sum(0), torch.ones(slices), rtol=0, atol=0.15)
        large = random_mixer(slices, 0.0, std=30.0, seed=seed).matrix()  # no overflow; rows still hold
        torch.testing.assert_close(large.sum(1), torch.ones(slices), rtol=0, atol=1e-5)


def test_the_mixer_is_its_formula():
    mixer = random_mixer(4, 0.3)
    x = torch.randn(2, 5, 12)
    S = mixer.scores.detach().double().exp()
    for _ in range(10):
        S = S / S.sum(0, keepdim=True)
        S = S / S.sum(1, keepdim=True)
    expected = 0.7 * x.double() + 0.3 * torch.cat(
        [sum(S[s, t] * x[..., 3 * t : 3 * t + 3].double() for t in range(4)) for s in range(4)], -1
    )
    torch.testing.assert_close(mixer(x).double(), expected, rtol=1e-5, atol=1e-5)


def test_mixing_is_an_average():
    """Every slice is an average of slices, and the sum over slices does not change: what doubly stochastic means."""
    for amount in (0.5, 1.0, 7.0):  # more than 1 is 1
        mixer = random_mixer(4, amount)
        x = torch.randn(50, 12)
        y = mixer(x).detach().unflatten(-1, (4, 3))
        x = x.unflatten(-1, (4, 3))
        torch.testing.assert_close(y.sum(1), x.sum(1), rtol=0, atol=1e-2)
        assert (y.amax(1) <= x.amax(1) + 1e-6).all() and (y.amin(1) >= x.amin(1) - 1e-6).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_amount_zero_is_the_identity_to_the_bit(dtype):
    x = torch.randn(3, 5, 12) * torch.logspace(-20, 20, 12)
    for amount in (0.0, -0.5):
        mixer = random_mixer(4, amount)
        assert torch.equal(mixer(x.to(dtype)), x.to(dtype))
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(mixer(x.to(dtype)), x.to(dtype))


@pytest.mark.parametrize(
    ("start", "target"), [(0.0, 0.6), (-0.05, 0.6), (1.0, 0.4), (1.05, 0.4), (0.0, -3.0), (1.0, 5.0)]
)
def test_the_amount_is_not_stuck_at_a_border(start, target):
    """It leaves the border when the loss wants it inside, and stays when it wants it further out."""
    mixer = random_mixer(4, start)
    mixer.scores.requires_grad_(False)
    x = torch.randn(100, 12)
    slices = x.unflatten(-1, (4, -1))
    mixed = torch.einsum("st,btd->bsd", mixer.matrix(), slices).flatten(1)
    wanted = x + target * (mixed - x)
    optimizer = torch.optim.SGD([mixer.amount], 0.2)
    for _ in range(80):
        loss = (mixer(x) - wanted).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    reached = mixer.amount.clamp(0, 1).item()
    assert reached == pytest.approx(min(max(target, 0), 1), abs=0.02)
    assert -0.1 <= mixer.amount.item() <= 1.1  # it did not run away


def test_a_mixer_learns_a_permutation():
    mixer = random_mixer(3, 0.0)
    optimizer = torch.optim.Adam(mixer.parameters(), 0.1)
    x = torch.randn(64, 6)
    wanted = x.unflatten(-1, (3, 2)).roll(1, 1).flatten(1)
    for _ in range(150):
        loss = (mixer(x) - wanted).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.01


# ── node ─────────────────────────────────────────────────────────────────────────────────────────────────────────────

D, H = TINY["d_model"], TINY["n_heads"]
ALPHA = torch.tensor(0.9, dtype=torch.float64)


def block() -> HybridBlock:
    return HybridBlock(D, H, AGIFormerConfig(**TINY))


def node(left=None, right=None) -> Node:
    return Node(left or block(), right or block(), D, H, TINY["window"])


def randomise(tree: Node) -> Node:
    torch.manual_seed(3)
    tree = tree.double()
    with torch.no_grad():
        for name, p in tree.named_parameters():
            p.fill_(0.4) if name.endswith("amount") else p.normal_(std=max(p.shape) ** -0.5 if p.dim() > 1 else 0.2)
    return tree


def phases(T: int, offset: int = 0):
    cos, sin = Rotary(D // H, 10_000.0)(T, offset, torch.device("cpu"))
    return cos.double(), sin.double()


def norm(x: torch.Tensor) -> torch.Tensor:
    return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt()


def test_a_node_is_its_formula():
    tree = randomise(node()).eval()
    tree.plasticity.fill_(0.3)  # what the frozen tree learned under
    x = torch.randn(2, 20, D, dtype=torch.float64)
    at = phases(20)
    found, state = tree(x, at, ALPHA)
    left, left_state = tree.left(x, at, tree.plasticity)
    right, right_state = tree.right(x @ tree.projector.weight.T, at, ALPHA)
    c = torch.log1p((norm(x) @ tree.router.concentration.weight.T + tree.router.concentration.bias).exp()) + 0.5
    share = c / c.sum(-1, keepdim=True)
    S, g = tree.mixer.matrix(), tree.mixer.amount
    left = (1 - g) * left + g * torch.einsum("st,...td->...sd", S, left.unflatten(-1, (H, -1))).flatten(-2)
    seen, fresh = 2 * share[..., :1] * norm(left), 2 * share[..., 1:] * norm(right)
    attended, attention_state = tree.attention(torch.cat([seen, fresh], -1), at)
    expected = left + 2 * share[..., 1:] * (torch.cat([attended, fresh], -1) @ tree.gate.weight.T)
    torch.testing.assert_close(found, expected)
    assert isinstance(state, NodeState) and isinstance(state.left, BlockState)
    parts = [*left_state.tensors(), *right_state.tensors(), *attention_state.tensors()]
    for a, b in zip(state.tensors(), parts, strict=True):
        torch.testing.assert_close(a, b)


def test_nodes_in_pieces_are_the_whole():
    """Trees of nodes: the states of all children and wide attentions are carried, and cloned apart."""
    tree = randomise(node(node(), node(right=node()))).eval()
    x = torch.randn(2, 40, D, dtype=torch.float64)
    whole, last = tree(x, phases(40), ALPHA)
    state, outs, start = None, [], 0
    for n in (1, 3, 9, 1, 20, 6):
        out, state = tree(x[:, start : start + n], phases(n, start), ALPHA, state)
        outs.append(out)
        start += n
        copy = state.clone()
        for tensor in copy.tensors():
            tensor.fill_(float("nan"))  # must not reach `state`
    torch.testing.assert_close(torch.cat(outs, 1), whole)
    assert len(state.tensors()) == 5 * 4 + 4 * 2  # 5 leaves, 4 nodes
    for a, b in zip(state.tensors(), last.tensors(), strict=True):
        torch.testing.assert_close(a, b)


def test_trees_are_walked_oldest_first():
    a, b, c, d = (block() for _ in range(4))
    tree = node(node(a, b), node(c, d))
    assert [*map(id, leaves(tree))] == [*map(id, (a, b, c, d))]
    assert depth(tree) == 2 and depth(a) == 0 and depth(node(tree)) == 3
    assert [*map(id, learning_leaves(tree))] == [id(d)]  # every node is new, and its left side frozen
    tree.right.thaw()
    assert [*map(id, learning_leaves(tree))] == [*map(id, (c, d))]
    tree.thaw()
    assert [*map(id, learning_leaves(tree))] == [*map(id, (a, b, c, d))]


def test_frozen_means_no_gradients_and_eval_mode():
    tree = node(node(node()), node())
    for mode in (True, False, True):
        torch.nn.Sequential(torch.nn.ModuleList([tree])).train(mode)
        assert not any(module.training for module in tree.left.modules())
        assert tree.training == tree.right.training == tree.gate.training == mode
        assert not tree.right.left.training
    assert not any(p.requires_grad for p in tree.left.parameters())
    assert not any(p.requires_grad for p in tree.right.left.parameters())
    assert all(p.requires_grad for part in (tree.gate, tree.router, tree.right.right) for p in part.parameters())
    tree.thaw()
    assert all(module.training for module in tree.left.modules())
    assert all(p.requires_grad for p in tree.left.parameters())
    assert all(p.requires_grad for p in tree.left.left.parameters())
    assert not any(p.requires_grad for p in tree.right.left.parameters())  # thawing is of the left tree


def test_a_frozen_tree_keeps_its_plasticity_until_it_is_thawed():
    tree = randomise(node(node())).eval()
    tree.plasticity.fill_(0.3)
    tree.left.plasticity.fill_(0.6)
    x, at = torch.randn(1, 12, D, dtype=torch.float64), phases(12)

    def memories(alpha: float) -> list[torch.Tensor]:
        """Of left.left, left.right and right."""
        _, state = tree(x, at, torch.tensor(alpha).double())
        return [leaf.memory.M for leaf in (state.left.left, state.left.right, state.right)]

    low, high = memories(0.1), memories(0.9)
    assert torch.equal(low[0], high[0]) and torch.equal(low[1], high[1]) and not torch.allclose(low[2], high[2])
    direct = [
        tree.left.left(x, at, tree.left.plasticity)[1],
        tree.left.right(tree.left.projector(x), at, tree.plasticity)[1],
    ]
    for found, expected in zip(low, direct):
        torch.testing.assert_close(found, expected.memory.M)
    tree.thaw()
    assert not any(torch.allclose(a, b) for a, b in zip(memories(0.1), memories(0.9)))


def test_a_new_node_lets_nothing_pass():
    tree = node()
    for part in (tree.left, tree.right, tree.projector, tree.router, tree.mixer, tree.attention, tree.gate):
        initialise(part)
    tree.reset()
    x = torch.randn(2, 20, D)
    at = Rotary(D // H, 10_000.0)(20, 0, torch.device("cpu"))
    alpha = torch.tensor(0.9)
    for mode in (True, False):
        assert torch.equal(tree.train(mode)(x, at, alpha)[0], tree.left(x, at, tree.plasticity)[0])


def test_parameters_of_a_node():
    """Projector, router, mixer, wide attention, gate; docs and the linear cost of depth count on it."""
    tree = node()
    own = sum(p.numel() for p in tree.parameters()) - sum(p.numel() for leaf in leaves(tree) for p in leaf.parameters())
    assert own == D * D + (2 * D + 2) + (H * H + 1) + 2 * D * 3 * D + 2 * D * D
    assert math.log2(len([*leaves(node(node(), node()))])) == depth(node(node(), node()))
