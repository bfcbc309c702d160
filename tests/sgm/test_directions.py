"""What earlier tasks read is not seen to change, to float32's rounding, and new inputs have the room that is left."""

import copy

import numpy as np
import pytest
import torch
from torch import nn

from model.sgm.directions import RELATIVE, Directions, orthogonal_part
from model.sgm.learner import Learner
from model.sgm.locking import Units
from model.sgm.mutations import LearnerOptions
from model.sgm.population import Population, byte_losses
from tests.conftest import make_random_model

SMALL = {"d_model": 16, "n_layers": 1, "byte_dim": 8, "window": 3, "ffn_dim": 16, "reasoning_dim": 16, "head_dim": 48}


def squares(model, x, target):
    return (model(x) - target).square().mean(1)


def layer_problem(inputs=40, outputs=100):
    """A linear layer behind a fixed one; the first's weights are what learns."""
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(12, inputs), nn.Tanh(), nn.Linear(inputs, outputs))
    population = Population(module, squares)
    free = torch.zeros(population.size, dtype=torch.bool)
    free[population.spans["2.weight"]] = True
    return module, population, Directions(population, ["2.weight"]), free


@torch.no_grad()
def outputs(population, values, x) -> torch.Tensor:
    module = copy.deepcopy(population.module)
    nn.utils.vector_to_parameters(values, module.parameters())
    return module(x)


# ── orthogonal_part ──────────────────────────────────────────────────────────────────────────────────────────────────


def by_least_squares(new: np.ndarray, old: np.ndarray) -> np.ndarray:
    """new less what a combination of old rows comes nearest to it, in float64."""
    if not len(old):
        return new
    return new - (old.T @ np.linalg.lstsq(old.T, new.T, rcond=None)[0]).T


@pytest.mark.parametrize(("n", "m", "D"), [(3, 0, 10), (3, 4, 10), (7, 2, 10), (25, 3, 10), (2, 9, 10), (1, 1, 2)])
def test_orthogonal_part_is_the_residual_of_least_squares(n, m, D):
    generator = torch.Generator().manual_seed(n * 100 + m)
    new, old = torch.randn(n, D, generator=generator), torch.randn(m, D, generator=generator)
    basis = orthogonal_part(new, old)
    residual = by_least_squares(new.double().numpy(), old.double().numpy())
    rank = min(n, D - m)
    assert basis.shape == (rank, D) and basis.dtype == torch.float32
    torch.testing.assert_close(basis @ basis.T, torch.eye(rank), rtol=0, atol=1e-6)
    assert (basis @ old.T).abs().max() < 1e-5 if m else True
    # The basis spans what is left, no less.
    left = torch.from_numpy(residual).float()
    torch.testing.assert_close(left @ basis.T @ basis, left, rtol=0, atol=1e-5)


def test_orthogonal_part_of_what_is_known_is_nothing():
    generator = torch.Generator().manual_seed(0)
    old = torch.randn(4, 10, generator=generator)
    mixed = torch.randn(6, 4, generator=generator) @ old
    assert orthogonal_part(mixed, old).shape == (0, 10)
    assert orthogonal_part(mixed, torch.eye(10)).shape == (0, 10)
    assert orthogonal_part(torch.zeros(3, 10), old).shape == (0, 10)
    assert orthogonal_part(torch.zeros(0, 10), old).shape == (0, 10)
    assert orthogonal_part(torch.zeros(3, 10), old[:0]).shape == (0, 10)
    assert orthogonal_part(torch.cat([mixed, old]), old[:0]).shape == (4, 10)


def test_orthogonal_part_with_dependent_old_rows_loses_room_and_nothing_else():
    generator = torch.Generator().manual_seed(0)
    old = torch.randn(3, 10, generator=generator)
    doubled = torch.cat([old, old, old[:1] - old[1:2]])
    basis = orthogonal_part(torch.randn(10, 10, generator=generator), doubled)
    assert 3 <= len(basis) <= 7 and (basis @ old.T).abs().max() < 1e-5


@pytest.mark.parametrize("scale", [1e-12, 1.0, 1e12])
def test_small_parts_are_left_out_by_their_share_of_the_largest(scale):
    new = torch.diag(torch.tensor([1.0, 2 * RELATIVE, 0.5 * RELATIVE])) * scale
    basis = orthogonal_part(new, torch.zeros(0, 3))
    torch.testing.assert_close(basis.abs(), torch.eye(3)[:2])


# ── what a layer reads ───────────────────────────────────────────────────────────────────────────────────────────────


def test_inputs_are_what_the_layer_is_given():
    module, population, directions, _ = layer_problem()
    values = population.values() + 0.1 * torch.randn(population.size)
    x = torch.randn(7, 12)
    read = directions.inputs(values, x)
    with torch.no_grad():
        other = copy.deepcopy(module)
        nn.utils.vector_to_parameters(values, other.parameters())
        torch.testing.assert_close(read["2.weight"], other[1](other[0](x)))
    assert not any(part._forward_pre_hooks for part in module.modules())
    assert torch.equal(population.values(), values)


def test_inputs_in_eval_mode_and_all_back_as_it_was():
    module = nn.Sequential(nn.Dropout(0.5), nn.Linear(6, 3)).train()
    module[1].eval()
    population = Population(module)
    directions, x = Directions(population, ["1.weight"]), torch.randn(5, 6)
    assert torch.equal(directions.inputs(population.values(), x)["1.weight"], x)
    assert [part.training for part in module.modules()] == [True, True, False]
    with pytest.raises(RuntimeError):
        directions.inputs(population.values(), torch.randn(5, 7))
    assert [part.training for part in module.modules()] == [True, True, False]
    assert not module[1]._forward_pre_hooks


def test_a_module_that_is_a_layer():
    population = Population(nn.Linear(4, 2))
    x = torch.randn(3, 4)
    assert torch.equal(Directions(population, ["weight"]).inputs(population.values(), x)["weight"], x)


class Places(nn.Module):
    """A layer that reads every byte, one that reads one mean a patch of `size`, and one that reads one a row."""

    def __init__(self, size, fill):
        super().__init__()
        self.size, self.fill = size, fill
        self.byte, self.patch, self.row = nn.Linear(1, 1), nn.Linear(1, 1), nn.Linear(1, 1)

    def forward(self, x):
        """Reads the place of each byte, the numbers of its patches, and the rows' own."""
        rows = torch.arange(len(x)).view(-1, 1) * 1000
        L, patches = x.shape[1], -(-x.shape[1] // self.size)
        places = rows + torch.arange(patches * self.size if self.fill else L)
        self.byte(places.unsqueeze(-1).float())
        self.patch((rows + torch.arange(patches)).unsqueeze(-1).float())
        return self.row(rows.float())


@pytest.mark.parametrize("fill", [False, True])
@pytest.mark.parametrize(("L", "size"), [(12, 4), (9, 4), (10, 4), (7, 3), (5, 4), (48, 4), (13, 2), (4, 4), (3, 8)])
def test_places_that_count(L, size, fill):
    population = Population(Places(size, fill))
    directions = Directions(population, ["byte.weight", "patch.weight", "row.weight"])
    generator = torch.Generator().manual_seed(L)
    x = torch.zeros(3, L, dtype=torch.uint8)
    counts = torch.rand(3, L, generator=generator) < 0.2
    counts[1, L - 1] = True
    read = {
        name: set(each.flatten().tolist()) for name, each in directions.inputs(population.values(), x, counts).items()
    }
    places = counts.nonzero().tolist()
    assert read["byte.weight"] == {1000.0 * row + place for row, place in places}
    needed = {1000.0 * row + place // size for row, place in places}
    # Every patch with a byte that counts; and where the size of patches is certain, no other.
    patches = -(-L // size)
    certain = [each for each in range(1, L + 1) if -(-L // each) == patches] == [size]
    assert needed == read["patch.weight"] if certain else needed <= read["patch.weight"]
    assert read["row.weight"] == {1000.0 * row for row, _ in places}
    everything = directions.inputs(population.values(), x)
    assert len(everything["patch.weight"]) == 3 * patches and len(everything["row.weight"]) == 3


def test_places_of_a_language_model():
    model = make_random_model(**SMALL)
    population = Population(model)
    names = ["head.output.weight", "blocks.0.output.weight", "encoder.projection.weight"]
    directions = Directions(population, names)
    x = torch.randint(256, (2, 24), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    counts = torch.zeros(2, 24, dtype=torch.bool)
    counts[0, 9:15] = True
    whole, read = directions.inputs(population.values(), x), directions.inputs(population.values(), x, counts)
    assert len(read[names[0]]) == 6 and torch.equal(read[names[0]], whole[names[0]][9:15])
    assert len(read[names[1]]) == 2 and torch.equal(read[names[1]], whole[names[1]][2:4])
    written = []
    handle = model.head.output.register_forward_hook(lambda *given: written.append(given[2]))
    with torch.no_grad():  # and the outputs that count follow from those inputs
        model(x)
        logits = nn.functional.linear(read[names[0]], model.head.output.weight, model.head.output.bias)
    handle.remove()
    torch.testing.assert_close(logits, written[0].view(2, 24, 256)[0, 9:15], rtol=1e-5, atol=1e-5)
    everywhere = Directions(population, names, everywhere=names[1:]).inputs(population.values(), x, counts)
    assert torch.equal(everywhere[names[0]], read[names[0]])
    assert all(torch.equal(everywhere[name], whole[name]) for name in names[1:])


def test_bad_names():
    _, population, _, _ = layer_problem()
    for name in ("1.weight", "2.bias", "2", "weight", "3.weight", "2.other_weight", ""):
        with pytest.raises(ValueError, match=f"names='{name}': accepted are weights of nn.Linear layers"):
            Directions(population, [name])
    tied = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3), nn.Embedding(3, 3), nn.Linear(3, 3))
    tied[1].weight, tied[2].weight = tied[0].weight, tied[3].weight
    for name in ("0.weight", "2.weight", "3.weight"):
        with pytest.raises(ValueError, match=f"names='{name}': accepted are"):
            Directions(Population(tied), [name])
    module = nn.ModuleList([nn.Linear(3, 3), nn.Linear(3, 3)])
    module.forward = lambda x: module[0](x)
    population = Population(module)
    with pytest.raises(ValueError, match=r"names='1\.weight': accepted are layers that the module calls"):
        Directions(population, ["0.weight", "1.weight"]).inputs(population.values(), torch.randn(2, 3))


# ── learning beside what is known ────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("options", [{}, {"rank": 3}, {"recombine": False}, {"antithetic": True}])
@pytest.mark.parametrize("locks", [False, True])
def test_protected_outputs_stay_and_new_ones_change(locks, options):
    _, population, directions, free = layer_problem()
    old, new = torch.randn(8, 12), torch.randn(5, 12)
    learner = Learner(population, LearnerOptions(population=16, **options))
    if locks:  # columns of either half of the outputs, and a whole one
        units = Units(population)
        spans = units.of_weight[population.spans["2.weight"]].view(100, 40)
        learner.locked |= units.mask(torch.cat([spans[0, ::3], spans[99, 1::4], spans[[0, 99], 5]]).unique())
    start = learner.values.clone()
    before = outputs(population, start, old), outputs(population, start, new)
    directions.protect(directions.inputs(start, old))
    within = directions.within(directions.inputs(start, new), learner.locked)
    target = before[1] + torch.randn(5, 100)
    learned = learner.learn(new, target, evaluations=800, free=free, within=within)
    assert learned.after < 0.9 * learned.before
    after = outputs(population, learner.values, old), outputs(population, learner.values, new)
    change = (after[0] - before[0]).abs().max(), (after[1] - before[1]).abs().max()
    assert change[1] > 0.3 and change[0] < 1e-5 * change[1]
    assert torch.equal(learner.values[learner.locked], start[learner.locked])
    # Without it, a step as large is seen by the old inputs.
    plain = Learner(population, LearnerOptions(population=16, **options), locked=learner.locked)
    plain.learn(new, target, evaluations=800, free=free)
    assert (outputs(population, plain.values, old) - before[0]).abs().max() > 0.03


def test_task_after_task_leaves_all_earlier_ones_as_they_were():
    _, population, directions, free = layer_problem()
    learner, kept = Learner(population, LearnerOptions(population=16)), []
    for task in range(6):
        generator = torch.Generator().manual_seed(task)
        x, target = torch.randn(3, 12, generator=generator), torch.randn(3, 100, generator=generator)
        read = directions.inputs(learner.values, x)
        learned = learner.learn(x, target, evaluations=600, free=free, within=directions.within(read, learner.locked))
        assert learned.after < 0.9 * learned.before
        directions.protect(read)
        kept.append((x, outputs(population, learner.values, x)))
        assert directions.used("2.weight") == 3 * (task + 1) / 40
    for x, expected in kept:
        torch.testing.assert_close(outputs(population, learner.values, x), expected, rtol=0, atol=1e-5)
    basis = directions.protected["2.weight"]
    torch.testing.assert_close(basis @ basis.T, torch.eye(18), rtol=0, atol=1e-5)


def test_a_language_models_answers_stay():
    model = make_random_model(**SMALL)
    population = Population(model, byte_losses)
    directions = Directions(population, ["head.output.weight"])
    free = torch.zeros(population.size, dtype=torch.bool)
    free[population.spans["head.output.weight"]] = True
    texts = ["Başkent: Ankara 🙂", "Q: 2+2? A: dört \x00\xff!"]
    rows = [torch.tensor([list(text.encode()[:20])], dtype=torch.uint8) for text in texts]
    counts = torch.zeros(1, 20, dtype=torch.bool)
    counts[0, 10:] = True
    learner = Learner(population, LearnerOptions(population=24))
    read = directions.inputs(learner.values, rows[0], counts)
    directions.protect(read)
    before = outputs(population, learner.values, rows[0])
    new = directions.inputs(learner.values, rows[1], counts)
    within = directions.within(new, learner.locked)
    learned = learner.learn(rows[1], counts, evaluations=600, free=free, within=within)
    assert learned.after < 0.8 * learned.before
    change = (outputs(population, learner.values, rows[0]) - before).abs().amax(2)
    assert change[counts].max() < 1e-4 and change[~counts].max() > 0.01  # what did not count is not protected


def test_reading_the_same_again_protects_no_more():
    _, population, directions, _ = layer_problem()
    x = torch.randn(6, 12)
    for _ in range(3):
        directions.protect(directions.inputs(population.values(), x))
        assert len(directions.protected["2.weight"]) == 6
    within = directions.within(
        directions.inputs(population.values(), x), torch.zeros(population.size, dtype=torch.bool)
    )
    assert all(len(basis) == 0 for _, basis in within["2.weight"])


def test_inputs_that_differ_little_are_protected_each():
    """A ten-thousandth apart: a change along their difference, which a later task reads too, would be seen."""
    _, population, directions, _ = layer_problem()
    generator = torch.Generator().manual_seed(0)
    read, apart, other = torch.randn(3, 40, generator=generator)
    near = read + 1e-4 * apart
    directions.protect({"2.weight": torch.stack([read, near])})
    within = directions.within({"2.weight": (apart + other)[None]}, torch.zeros(population.size, dtype=torch.bool))
    for _, basis in within["2.weight"]:
        assert len(basis) == 1 and (basis @ torch.stack([read, near]).T).abs().max() < 1e-5
    assert len(directions.protected["2.weight"]) == 2


def test_within_follows_rows_and_their_free_inputs():
    _, population, directions, _ = layer_problem()
    locked = torch.zeros(population.size, dtype=torch.bool)
    layer = locked[population.spans["2.weight"]].view(100, 40)
    layer[:64, ::2] = True
    layer[64:, 3] = True
    read = directions.inputs(population.values(), torch.randn(5, 12))
    directions.protect(directions.inputs(population.values(), torch.randn(7, 12)))
    (first, one), (second, two) = directions.within(read, locked)["2.weight"]
    assert (first, second) == (slice(0, 64), slice(64, 100)) and one.shape == two.shape == (5, 40)
    assert (
        one[:, ::2].abs().max() < 1e-12 and two[:, 3].abs().max() < 1e-12 and (one[:, 1::2].abs() > 1e-6).any(0).all()
    )
    old = directions.protected["2.weight"]
    for basis in (one, two):
        torch.testing.assert_close(basis @ basis.T, torch.eye(5), rtol=0, atol=1e-6)
        assert (basis @ old.T).abs().max() < 1e-5


@pytest.mark.parametrize("m", [0, 7, 33])
def test_within_is_what_projecting_the_free_inputs_alone_gives(m):
    """Single locks, row by row; each row keeps the room that its neighbours' locks take from them."""
    _, population, directions, _ = layer_problem()
    generator = torch.Generator().manual_seed(m)
    locked = torch.zeros(population.size, dtype=torch.bool)
    mask = locked[population.spans["2.weight"]].view(100, 40)
    mask[:] = torch.rand(100, 40, generator=generator) < torch.linspace(0, 0.4, 100).unsqueeze(1) ** 2
    mask[3], mask[4:9] = mask[2], True
    old = torch.randn(m, 40, generator=generator)
    read = torch.randn(5, 40, generator=generator)
    directions.protect({"2.weight": old})
    pieces = directions.within({"2.weight": read}, locked)["2.weight"]
    assert [row for rows, _ in pieces for row in range(rows.start, rows.stop)] == list(range(100))
    sizes = set()
    for rows, basis in pieces:
        held = mask[rows.start]
        assert (mask[rows] == held).all()
        expected = orthogonal_part(read * ~held, old * ~held)
        assert basis.shape == expected.shape
        torch.testing.assert_close(basis.T @ basis, expected.T @ expected, rtol=0, atol=1e-5)
        if len(basis):
            assert not held.any() or basis[:, held].abs().max() < 1e-12
            assert not m or (basis @ old.T).abs().max() < 1e-5
        sizes.add(len(basis))
    assert 0 in sizes and max(sizes) == 5


def test_a_full_layer_has_no_room():
    _, population, directions, free = layer_problem(inputs=8)
    learner = Learner(population)
    directions.protect(directions.inputs(learner.values, torch.randn(30, 12)))
    assert directions.used("2.weight") == 1
    x = torch.randn(4, 12)
    within = directions.within(directions.inputs(learner.values, x), learner.locked)
    assert [len(basis) for _, basis in within["2.weight"]] == [0]
    before = learner.values.clone()
    learner.learn(x, torch.randn(4, 100), evaluations=100, free=free, within=within)
    assert torch.equal(before, learner.values)
    # As full when the inputs that are free are spanned, though the layer is not.
    _, population, directions, _ = layer_problem(inputs=8)
    directions.protect(directions.inputs(population.values(), torch.randn(4, 12)))
    locked = torch.zeros(population.size, dtype=torch.bool)
    locked[population.spans["2.weight"]].view(100, 8)[:64, :4] = True
    within = directions.within(directions.inputs(population.values(), x), locked)
    assert [len(basis) for _, basis in within["2.weight"]] == [0, 4]


@pytest.mark.parametrize("energy", [0.5, 0.9, 0.999])
def test_anchors_are_the_fewest_directions_with_so_much_energy(energy):
    _, population, directions, _ = layer_problem()
    read = directions.inputs(population.values(), torch.randn(50, 12) * torch.linspace(0.1, 2, 12) + 0.5)
    matrix = read["2.weight"].double().numpy()
    directions.anchor(read, energy)
    basis = directions.protected["2.weight"].double().numpy()
    share = np.square(matrix @ basis.T).sum() / np.square(matrix).sum()
    eigenvalues = np.sort(np.linalg.eigvalsh(matrix.T @ matrix))[::-1]
    fewest = int((np.cumsum(eigenvalues) / eigenvalues.sum() < energy).sum()) + 1
    assert share >= energy - 1e-6 and len(basis) == fewest
    assert eigenvalues[: fewest - 1].sum() / eigenvalues.sum() < energy
    np.testing.assert_allclose(basis @ basis.T, np.eye(fewest), atol=1e-6)


def test_anchors_come_beside_what_is_protected():
    _, population, directions, _ = layer_problem()
    read = directions.inputs(population.values(), torch.randn(50, 12))
    directions.protect({name: each[:3] for name, each in read.items()})
    directions.anchor(read, 0.7)
    basis = directions.protected["2.weight"]
    torch.testing.assert_close(basis @ basis.T, torch.eye(len(basis)), rtol=0, atol=1e-5)
    assert orthogonal_part(read["2.weight"][:3], basis).shape[0] == 0
