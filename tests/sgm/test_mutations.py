"""Mutations have their rank, their scale and their places, and what they say is the sum of what each place says."""

import pytest
import torch
from torch import nn

from model.layers.hull import ConvexPetals
from model.sgm.learner import Learner
from model.sgm.mutations import PLACE_SCALE, LearnerOptions, Mutations, Places, scales
from model.sgm.population import Population
from tests.sgm.test_learner import bits


class Shapes(nn.Module):
    """A matrix, a wide one, a vector, a scalar, a stack of matrices; petals, whose `down` has its inputs first."""

    def __init__(self):
        super().__init__()
        self.matrix = nn.Parameter(torch.randn(24, 16))
        self.row = nn.Parameter(torch.randn(1, 30))
        self.vector = nn.Parameter(torch.randn(40))
        self.scalar = nn.Parameter(torch.randn(()))
        self.stack = nn.Parameter(torch.randn(6, 5, 4))
        self.petals = ConvexPetals(9, 2, 16)


UNITS = {
    "matrix": 1 / 4, "row": 30**-0.5, "vector": 0.1, "scalar": 0.1, "stack": 20**-0.5,
    "petals.up": 1 / 3, "petals.bias": 0.1, "petals.down": 1 / 4, "petals.log_tau": 0.1,
}  # fmt: skip


def mutations(options, free=None, within=None, seed=0):
    population = Population(Shapes())
    free = torch.ones(population.size, dtype=torch.bool) if free is None else free
    return population, Mutations(population, options, torch.Generator().manual_seed(seed), free, within)


def test_scales():
    population, _ = mutations(LearnerOptions())
    for name, span in population.spans.items():
        torch.testing.assert_close(scales(population)[span], torch.full((span.stop - span.start,), UNITS[name]))


@pytest.mark.parametrize(("perturbation", "rank"), [("low-rank", 1), ("low-rank", 3), ("dense", 1)])
def test_draws_have_their_rank_their_scale_and_no_bias(perturbation, rank):
    population, made = mutations(LearnerOptions(perturbation=perturbation, rank=rank))
    drawn = made.draw(3_000)
    for name, span in population.spans.items():
        each = drawn[:, span] / UNITS[name]
        # Standard errors: of a mean 1/√n, of a mean square √(k/n) with k = E x⁴ − 1, at most 8 + 6/rank.
        # Weights of one low-rank draw depend on each other, hence those of one weight over draws.
        assert each.mean(0).abs().max() < 5 / 3_000**0.5, name
        assert (each.square().mean(0) - 1).abs().max() < 5.5 * (8 / 3_000) ** 0.5, name
        assert each.square().mean() == pytest.approx(1, abs=0.1)
    singular = torch.linalg.svdvals(drawn[:50, population.spans["matrix"]].view(50, 24, 16))
    ranks = (singular > 1e-5 * singular[:, :1]).sum(1)
    assert (ranks == (rank if perturbation == "low-rank" else 16)).all()
    singular = torch.linalg.svdvals(drawn[:50, population.spans["stack"]].view(50, 6, 20))
    assert ((singular > 1e-5 * singular[:, :1]).sum(1) == (rank if perturbation == "low-rank" else 6)).all()
    for name, shape in (("petals.up", (16, 9)), ("petals.down", (16, 9))):  # each petal for itself
        singular = torch.linalg.svdvals(drawn[:50, population.spans[name]].view(50, 2, *shape))
        assert ((singular > 1e-5 * singular[..., :1]).sum(-1) == (rank if perturbation == "low-rank" else 9)).all()
    # Directions are independent of each other.
    unit = nn.functional.normalize(drawn[:200, population.spans["matrix"]], dim=1)
    cosine = (unit @ unit.T)[~torch.eye(200, dtype=torch.bool)]
    assert cosine.mean().abs() < 5 * cosine.std() / 200**0.5 and cosine.abs().max() < 0.95


def test_what_is_not_free_is_not_drawn():
    population, _ = mutations(LearnerOptions())
    free = torch.rand(population.size, generator=torch.Generator().manual_seed(0)) < 0.3
    free[population.spans["vector"]] = False
    population, made = mutations(LearnerOptions(), free)
    assert "vector" not in made.selection.spans
    drawn = made.draw(5)
    chosen = made.selection.take(free)
    assert drawn.shape == (5, made.selection.size)
    assert not drawn[:, ~chosen].any() and (drawn[:, chosen] != 0).all()


@pytest.mark.parametrize("rank", [1, 4])
def test_draws_within_a_basis(rank):
    generator = torch.Generator().manual_seed(5)
    basis = torch.linalg.qr(torch.randn(16, 5, generator=generator))[0].T
    other = torch.linalg.qr(torch.randn(16, 2, generator=generator))[0].T
    pieces = [(slice(0, 10), basis), (slice(10, 20), other), (slice(20, 24), basis[:0])]
    population, made = mutations(LearnerOptions(rank=rank), within={"matrix": pieces})
    drawn = made.draw(2_000)[:, population.spans["matrix"]].view(-1, 24, 16) / UNITS["matrix"]
    for rows, span in pieces[:2]:
        part = drawn[:, rows]
        torch.testing.assert_close(part @ span.T @ span, part, rtol=0, atol=2e-5)
        assert part.square().mean() == pytest.approx(1, abs=0.15)
        assert (torch.linalg.matrix_rank(part[:20], rtol=1e-4) == min(rank, len(span))).all()
    assert not drawn[:, 20:].any()
    assert made.draw(3)[:, population.spans["vector"]].all()  # the others as ever


def test_low_rank_draws_take_less_from_the_generator(monkeypatch):
    """Which is what makes them fast: rows + columns numbers a direction, not rows × columns."""
    counted, normal = [], Mutations._normal

    def watched(self, *shape):
        counted.append(torch.Size(shape).numel())
        return normal(self, *shape)

    monkeypatch.setattr(Mutations, "_normal", watched)
    free = torch.zeros(Population(Shapes()).size, dtype=torch.bool)
    free[: 24 * 16] = True
    mutations(LearnerOptions(), free)[1].draw(10)
    assert sum(counted) == 10 * (24 + 16)


# ── credit by place ──────────────────────────────────────────────────────────────────────────────────────────────────


def place_squares(model, x, target):
    return (model(x) - target).square().sum(-1)


def by_place(rows=9, inputs=24, outputs=40, seed=0):
    """A linear layer that reads 3 rows of 3 places each, and has a target at every place."""
    generator = torch.Generator().manual_seed(seed)
    module = nn.Linear(inputs, outputs)
    x = torch.randn(3, rows // 3, inputs, generator=generator)
    target = 3 * torch.randn(3, rows // 3, outputs, generator=generator)
    population = Population(module, place_squares)
    free = torch.zeros(population.size, dtype=torch.bool)
    free[population.spans["weight"]] = True
    basis = torch.linalg.qr(x.flatten(0, 1).T).Q.T
    within = {"weight": [(slice(0, 25), basis), (slice(25, outputs), basis)]}
    places = {"weight": Places(x.flatten(0, 1), torch.arange(rows))}
    return population, (x, target), free, within, places


def test_mutations_by_place_change_the_outputs_of_one_place_each_by_as_much():
    population, (x, _), free, within, places = by_place()
    # Inputs that lie within the basis by a hundredth: their outputs move as much as the others'.
    x = x.clone()
    x[0, 0] = 0.01 * within["weight"][0][1][0] + torch.linalg.svd(within["weight"][0][1]).Vh[-1]
    places = {"weight": Places(x.flatten(0, 1), torch.arange(9))}
    made = Mutations(population, LearnerOptions(), torch.Generator().manual_seed(0), free, within, places)
    drawn = made.draw(2_000).view(-1, 40, 24)
    moved = drawn @ x.flatten(0, 1).T  # [K, outputs, places]
    torch.testing.assert_close(moved.std(0), torch.full((40, 9), PLACE_SCALE), rtol=0.1, atol=0)
    flat = moved.permute(2, 0, 1).flatten(1)
    correlation = torch.corrcoef(flat)
    assert (correlation - torch.eye(9)).abs().max() < 0.02  # each place for itself
    basis = within["weight"][0][1]
    torch.testing.assert_close(drawn @ basis.T @ basis, drawn, rtol=1e-3, atol=1e-3)
    # A step is as large as a mutation of the same size.
    relative = (drawn.flatten(1) / made.scale).square().sum(1).mean()
    assert relative.item() == pytest.approx(made.square, rel=0.05)


def test_the_estimate_by_place_is_the_sum_of_each_places_own():
    population, batch, free, within, places = by_place()
    order = torch.tensor([3, 1, 4, 0, 5, 8, 2, 6, 7])  # which loss is which place's
    places = {"weight": Places(places["weight"].inputs[order], order)}
    made = Mutations(population, LearnerOptions(), torch.Generator().manual_seed(0), free, within, places)
    noise = made.draw(50)
    d = torch.randn(50, 9, generator=torch.Generator().manual_seed(1))
    said = made.said(noise, d.mean(1), d).view(40, 24).double()
    inputs = batch[0].flatten(0, 1).double()
    moved = noise.view(50, 40, 24).double() @ inputs.T
    for place in range(9):  # what it says of a place's output is what the losses there said of its moves
        expected = sum(d[k, place].double() * moved[k, :, place] for k in range(50)) / 9
        torch.testing.assert_close(said @ inputs[place], expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("antithetic", [False, True])
def test_credit_by_place_learns_in_a_fraction_of_the_evaluations(antithetic):
    population, batch, free, within, places = by_place(rows=30, inputs=48)
    after = {}
    for name, given in (("rows", None), ("places", places)):
        learner = Learner(population, LearnerOptions(antithetic=antithetic))
        learned = learner.learn(*batch, evaluations=600, free=free, within=within, places=given)
        after[name] = learned.after / learned.before
        kept = learner.values.clone()
        change = (kept - population.values())[population.spans["weight"]].view(-1, 48)
        basis = within["weight"][0][1]
        torch.testing.assert_close(change @ basis.T @ basis, change, rtol=1e-3, atol=1e-3)
    assert after["places"] < 0.2 < 0.6 < after["rows"]


def test_locked_weights_stay_with_credit_by_place():
    population, batch, free, within, places = by_place()
    locked = torch.zeros(population.size, dtype=torch.bool)
    layer = locked[population.spans["weight"]].view(40, 24)
    layer[:25, 3] = layer[25:, 7:9] = True
    basis = {}
    for part, columns in ((slice(0, 25), [3]), (slice(25, 40), [7, 8])):
        x = places["weight"].inputs.clone()
        x[:, columns] = 0
        basis[part.start] = torch.linalg.qr(x.T).Q.T
    within = {"weight": [(slice(0, 25), basis[0]), (slice(25, 40), basis[25])]}
    learner = Learner(population, LearnerOptions(), locked=locked)
    before = learner.values.clone()
    learned = learner.learn(*batch, evaluations=300, free=free, within=within, places=places)
    assert learned.after < 0.7 * learned.before
    assert torch.equal(bits(before)[locked | ~free], bits(learner.values)[locked | ~free])


def test_places_without_room_or_without_a_finite_loss_do_no_harm():
    population, (x, target), free, within, places = by_place()
    empty = {"weight": [(slice(0, 40), torch.zeros(0, 24))]}
    learner = Learner(population)
    before = learner.values.clone()
    learned = learner.learn(x, target, evaluations=100, free=free, within=empty, places=places)
    assert learned.accepted == 0 and torch.equal(before, learner.values)
    same = x.clone()
    same[1] = same[0]  # places that cannot be told apart
    places = {"weight": Places(same.flatten(0, 1), torch.arange(9))}
    learned = learner.learn(same, target, evaluations=300, free=free, within=within, places=places)
    assert learned.after < 0.9 * learned.before and learner.values.isfinite().all()
    population.loss = lambda model, x, target: place_squares(model, x, target).where(model(x)[..., 0] < 1, torch.nan)
    learned = Learner(population).learn(x, target, evaluations=200, free=free, within=within, places=places)
    assert learned.after <= learned.before
