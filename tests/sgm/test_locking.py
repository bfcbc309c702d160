"""What matters is found, as loops over hand-edited weights find it, and does not move under any optimizer."""

import copy

import pytest
import torch
from torch import nn

from model.layers.hull import ConvexPetals, SwiGLUPetals, VectorHull
from model.sgm import locking
from model.sgm.locking import (
    LockOptions,
    Units,
    ablations,
    anchors,
    by_parameter,
    find_important,
)
from model.sgm.population import Population
from tests.conftest import make_random_model

SMALL = {"d_model": 16, "n_layers": 1, "byte_dim": 8, "window": 3, "ffn_dim": 16, "reasoning_dim": 16, "head_dim": 16}


class Weights(nn.Module):
    """Nothing but weights: what they are worth is up to the test."""

    def __init__(self, *values):
        super().__init__()
        self.w = nn.Parameter(torch.tensor(values))

    def forward(self, _):
        return self.w


def priced(values, price):
    """A population of `values` whose loss is price(w); and the values."""
    population = Population(Weights(*values), lambda model, x: price(model(x)).expand(len(x)))
    return population, population.values()


BATCH = torch.zeros(2)


def unlocked(population) -> torch.Tensor:
    return torch.zeros(population.size, dtype=torch.bool)


# ── units ────────────────────────────────────────────────────────────────────────────────────────────────────────────


class Shapes(nn.Module):
    def __init__(self):
        super().__init__()
        self.matrix = nn.Parameter(torch.randn(130, 3))
        self.vector = nn.Parameter(torch.randn(150))
        self.empty = nn.Parameter(torch.randn(0, 4))
        self.scalar = nn.Parameter(torch.randn(()))


def test_blocks_are_64_outputs_of_one_input_or_64_in_a_row():
    population = Population(Shapes())
    units = Units(population)
    cut = by_parameter(population, units.of_weight)
    blocks = {}
    for r in range(130):
        for c in range(3):
            blocks.setdefault(("matrix", r // 64, c), set()).add(int(cut["matrix"][r, c]))
    for i in range(150):
        blocks.setdefault(("vector", i // 64), set()).add(int(cut["vector"][i]))
    blocks["scalar"] = {int(cut["scalar"])}
    assert all(len(found) == 1 for found in blocks.values())  # one number for each block
    numbers = [found.pop() for found in blocks.values()]
    assert sorted(numbers) == list(range(len(units))) and len(units) == 3 * 3 + 3 + 1
    assert sorted(units.sizes.tolist()) == sorted([64] * 6 + [2] * 3 + [64, 64, 22, 1])
    assert torch.equal(units.sizes, torch.bincount(units.of_weight))


class Petals(nn.Module):
    """Hulls of every kind, and convolutions."""

    def __init__(self):
        super().__init__()
        self.convex, self.swiglu, self.hull = ConvexPetals(70, 3, 24), SwiGLUPetals(70, 2, 40), VectorHull(66, 2, 5)
        self.convolution = nn.Conv1d(3, 70, 2)
        self.back = nn.ConvTranspose1d(3, 70, 2)


def test_blocks_of_petals_are_64_outputs_of_one_input_of_one_petal():
    """By what the weights do: a block of `down` is all of what one hidden unit says to 64 channels."""
    population = Population(Petals())
    units = Units(population)
    cut = by_parameter(population, units.of_weight)
    outputs = {  # the axis of the outputs; all others but the petals are inputs
        "convex.up": 1, "convex.down": 2, "swiglu.up": 1, "swiglu.down": 2, "hull.up": 1, "hull.raw": 2,
        "hull.skip": 1, "convolution.weight": 0, "back.weight": 1,
    }  # fmt: skip
    cut["back.weight"] = cut["back.weight"].view(3, 140)  # every output has as many as the kernel is long
    for name, axis in outputs.items():
        each = cut[name].movedim(axis, -1).reshape(-1, cut[name].shape[axis])
        for row in each:  # one petal, one input
            assert [len(part.unique()) for part in row.split(64)] == [1] * -(-len(row) // 64), name
        assert len(each.unique()) == each.shape[0] * -(-each.shape[1] // 64), name
    for name, blocks in (("convex.bias", 3), ("hull.bias", 2), ("hull.offset", 4), ("convolution.bias", 2)):
        assert len(cut[name].unique()) == blocks, name
        assert all(len(part.unique()) == 1 for row in cut[name].view(-1, cut[name].shape[-1]) for part in row.split(64))
    assert len(units) == sum(len(each.unique()) for each in cut.values()) == int(units.of_weight.max()) + 1


def test_a_block_of_down_is_heard_by_one_hidden_unit():
    """Independently of how axes are named: without the block, the layer is as if that hidden unit had been silent."""
    petals = ConvexPetals(12, 2, 8)
    with torch.no_grad():
        for p in petals.petal_parameters().values():
            p.normal_(generator=torch.Generator().manual_seed(1))
    population = Population(petals)
    units = by_parameter(population, Units(population).of_weight)["down"]
    x = torch.randn(5, 12, generator=torch.Generator().manual_seed(2))
    blocks = set()
    for unit in units.unique():
        (petal, hidden), *others = {(int(i), int(j)) for i, j, _ in (units == unit).nonzero()}
        assert not others
        with torch.no_grad():
            without, silent = copy.deepcopy(petals), copy.deepcopy(petals)
            without.down[units == unit] = 0
            silent.up[petal, hidden], silent.bias[petal, hidden] = 0, 0
            torch.testing.assert_close(without(x), silent(x))
        blocks.add((petal, hidden))
    assert len(blocks) == 2 * 8


def test_units_of_some_parameters():
    population = Population(Shapes())
    free = torch.zeros(population.size, dtype=torch.bool)
    free[population.spans["vector"].start] = free[population.spans["scalar"]] = True
    of = population.select(free)
    units = Units(of)
    assert units.of_weight.shape == (151,)
    assert units.sizes.tolist() == [64, 64, 22, 1]


def test_units_of_single_weights():
    population = Population(Shapes())
    units = Units(population, "weight")
    assert torch.equal(units.of_weight, torch.arange(population.size)) and (units.sizes == 1).all()


def test_masks_and_largest():
    population = Population(Shapes())
    units = Units(population)
    chosen = torch.tensor([0, 4, len(units) - 1])
    mask = units.mask(chosen)
    assert torch.equal(mask, torch.isin(units.of_weight, chosen)) and mask.sum() == units.sizes[chosen].sum()
    assert not units.mask(torch.zeros(0, dtype=torch.long)).any()
    weights = torch.randn(population.size) - 5  # all negative: nothing is compared with 0
    expected = [weights[units.of_weight == unit].max() for unit in range(len(units))]
    assert torch.equal(units.largest(weights), torch.stack(expected))


# ── ablation ─────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(("unit", "factor"), [("block", 0.1), ("weight", 0.0)])
@pytest.mark.parametrize("at_once", [16_000_000, 1])
def test_ablations_are_a_loop_over_hand_edited_weights(monkeypatch, unit, factor, at_once):
    monkeypatch.setattr(locking, "AT_ONCE", at_once)
    model = make_random_model(**SMALL)
    population = Population(model)
    values, of = population.values(), population.select(~anchors(model, population))
    units = Units(of, unit)
    inside = units.of_weight.unique()
    generator = torch.Generator().manual_seed(0)
    groups = inside[torch.randperm(len(inside), generator=generator)[:12]].view(4, 3)
    x = torch.randint(256, (2, 18), dtype=torch.uint8, generator=generator)
    found = ablations(of, values, units, groups, x, factor=factor)
    unit_of = of.put(units.of_weight, torch.full((population.size,), -1))
    for group, loss in zip(groups, found):
        copied = copy.deepcopy(model)
        with torch.no_grad():
            for p, unit in zip(copied.parameters(), unit_of.split([p.numel() for p in copied.parameters()])):
                p.view(-1)[[each in group.tolist() for each in unit.tolist()]] *= factor
            torch.testing.assert_close(loss, copied.loss(x), rtol=1e-5, atol=1e-5)
    assert found.std() > 0


def test_ablations_need_no_table_of_all_units(monkeypatch):
    """Of single weights there are as many units as weights: what is kept of them does not grow with both."""
    population, values = priced([1.0] * 4096, lambda w: 1 + (1 - w)[:64].sum())
    of = population.select(torch.ones(4096, dtype=torch.bool))
    sizes, zeros = [], torch.zeros
    monkeypatch.setattr(locking.torch, "zeros", lambda *a, **k: (sizes.append(a), zeros(*a, **k))[1])
    units = Units(of, "weight")
    found = ablations(of, values, units, torch.arange(2048).unsqueeze(1), BATCH, factor=0.0)
    assert torch.equal(found, torch.where(torch.arange(2048) < 64, 2.0, 1.0))
    assert max(rows * columns for rows, columns in sizes) <= 2048 * 2049


def test_importance_is_the_loss_without_the_block_and_the_best_are_locked():
    """Blocks with known worth: a price on the mean of each, the block at 10% costs 0.9 of it."""
    worth = torch.tensor([5.0, 0.0, 3.0, 7.0, 1.0, 0.5, 2.0, 0.01])

    def price(w):
        return 10.0 + (worth * (1 - w.view(8, 64).mean(1))).sum()

    population, values = priced([1.0] * 512, price)
    for budget, expected in ((1.0, [0, 2, 3, 4, 5, 6]), (0.5, [0, 2, 3, 6]), (0.25, [0, 3]), (0.13, [3]), (0.0, [])):
        options = LockOptions(threshold=0.02, minimum=0.0, budget=budget, groups=0)
        found = find_important(population, values, BATCH, locked=unlocked(population), options=options)
        assert found.weights.view(8, 64).all(1).nonzero().flatten().tolist() == expected
        assert found.weights.sum() == 64 * len(expected)
        assert (found.important, found.credited, found.filled) == (len(expected), 0, 0)
        assert found.evaluations == 9
    # Less than a block is still one.
    options = LockOptions(threshold=0.02, minimum=0.0, budget=0.01, groups=0)
    found = find_important(population, values, BATCH, locked=unlocked(population), options=options)
    assert found.weights.view(8, 64).all(1).nonzero().flatten().tolist() == [3]


def test_the_minimum_is_filled_up_with_the_next_best():
    worth = torch.tensor([5.0, 0.001, 3.0, 0.004, 0.0, 0.003, -1.0, 0.002])
    population, values = priced([1.0] * 512, lambda w: 10.0 + (worth * (1 - w.view(8, 64).mean(1))).sum())
    cases = (
        (0.0, [0, 2]),
        (0.25, [0, 2]),
        (0.251, [0, 2, 3]),
        (0.375, [0, 2, 3]),
        (0.5, [0, 2, 3, 5]),
        (0.9, range(8)),
    )
    for minimum, expected in cases:
        options = LockOptions(minimum=minimum, budget=1.0, groups=0)
        found = find_important(population, values, BATCH, locked=unlocked(population), options=options)
        assert found.weights.view(8, 64).all(1).nonzero().flatten().tolist() == list(expected)
        assert found.weights.sum() >= minimum * 512
        assert (found.important, found.filled) == (2, len(expected) - 2)
    # The budget goes before the minimum.
    options = LockOptions(minimum=0.3, budget=0.3, groups=0)
    found = find_important(population, values, BATCH, locked=unlocked(population), options=options)
    assert found.weights.view(8, 64).all(1).nonzero().flatten().tolist() == [0, 2]


def test_the_order_is_kept_where_worths_are_close():
    """Many important weights that differ in the last bits of their worth."""
    worth = 1.0 + torch.randperm(32, generator=torch.Generator().manual_seed(0)) / 1024

    population, values = priced([1.0] * 32, lambda w: 1.0 + (worth * (1 - w)).sum())
    for count in (1, 3, 10, 31):
        options = LockOptions(unit="weight", minimum=0.0, budget=count / 32, groups=0)
        found = find_important(population, values, BATCH, locked=unlocked(population), options=options)
        assert found.weights.nonzero().flatten().tolist() == sorted(worth.argsort(descending=True)[:count].tolist())


def test_the_most_changed_are_candidates_and_what_is_locked_is_not():
    population, values = priced([1.0] * 8, lambda w: 1.0 + (1 - w).sum())  # all are worth the same
    reference = values - torch.tensor([1.0, -2.0, 3.0, 0.0, -4.0, 5.0, 0.5, 0.0])
    options = LockOptions(unit="weight", candidates=3, minimum=0.0, budget=1.0, groups=0)

    def chosen(**changes):
        arguments = {"locked": unlocked(population), "reference": reference, "options": options} | changes
        found = find_important(population, values, BATCH, **arguments)
        assert found.evaluations == 1 + min(3, int((~arguments["locked"]).sum()))
        return found.weights.nonzero().flatten().tolist()

    assert chosen() == [2, 4, 5]
    assert chosen(scale=torch.tensor([0.1, 1, 1, 1, 8, 1, 0.1, 1])) == [0, 5, 6]
    locked = unlocked(population)
    locked[[4, 5]] = True
    assert chosen(locked=locked) == [0, 1, 2]
    locked[:6] = True
    assert chosen(locked=locked) == [6, 7]  # one that never moved, after the one that did
    population.load(torch.tensor([0.1, -0.9, 0.2, 0.3, -0.5, 0.1, 0.1, 0.8]))
    values = population.values()
    of_values = find_important(population, values, BATCH, locked=unlocked(population), options=options)
    assert of_values.weights.nonzero().flatten().tolist() == [7]  # of 1, 4 and 7; without the others the loss falls


def test_nothing_is_left_to_lock():
    population, values = priced([1.0] * 8, lambda w: 1.0 + (1 - w).sum())
    found = find_important(population, values, BATCH, locked=~unlocked(population))
    assert not found.weights.any() and found.evaluations == 0
    population, values = priced([1.0] * 100, lambda w: 1.0 + (1 - w).sum())
    locked = unlocked(population)
    locked[:70] = True
    options = LockOptions(minimum=0.3, budget=1.0, groups=0)
    found = find_important(population, values, BATCH, locked=locked, options=options)
    assert torch.equal(found.weights, ~locked)


def test_only_what_is_not_locked_yet_is_paid_from_the_budget():
    worth = torch.tensor([3.0, 2.0, 1.0])
    population, values = priced([1.0] * 192, lambda w: 1.0 + (worth * (1 - w.view(3, 64).mean(1))).sum())
    locked = unlocked(population)
    locked[:60] = True  # of the best block but four weights
    options = LockOptions(minimum=0.0, budget=68 / 192, groups=0)
    found = find_important(population, values, BATCH, locked=locked, options=options)
    assert found.weights.nonzero().flatten().tolist() == list(range(60, 128))


def test_a_loss_that_is_not_finite_finds_nothing_important():
    population, values = priced([1.0] * 8, lambda w: w.sum() * torch.nan)
    options = LockOptions(unit="weight", minimum=0.0, group_size=2)
    found = find_important(population, values, BATCH, locked=unlocked(population), options=options)
    assert not found.weights.any() and found.important == found.credited == 0


# ── coalitions ───────────────────────────────────────────────────────────────────────────────────────────────────────


def grouped(monkeypatch, *groups):
    """Coalitions to be tried: pairs of weak weights, by their index among those."""
    monkeypatch.setattr(locking, "_random_groups", lambda *_: torch.tensor(groups))


def gone(w) -> torch.Tensor:
    return (w == 0).float()


def pairs_of(population, values, **changes):
    options = {"unit": "weight", "minimum": 0.0, "budget": 1.0, "groups": 2, "group_size": 2, "memberships": 1}
    return find_important(
        population, values, BATCH, locked=unlocked(population), options=LockOptions(**(options | changes))
    )


def test_redundant_weights_are_found_together():
    """Weights 3 and 11 stand in for each other, as 5 and 6 do: one can go, not both."""

    def price(w):
        return 1.0 + gone(w)[3] * gone(w)[11] + gone(w)[5] * gone(w)[6]

    population, values = priced([1.0] * 16, price)
    for generator in (torch.Generator().manual_seed(0), torch.Generator().manual_seed(1)):
        options = LockOptions(unit="weight", minimum=0.0, budget=1.0, groups=600, group_size=2, memberships=2)
        found = find_important(
            population, values, BATCH, locked=unlocked(population), options=options, generator=generator
        )
        assert found.weights.nonzero().flatten().tolist() == [3, 5, 6, 11]
        assert (found.important, found.credited, found.filled) == (0, 4, 0) and found.evaluations == 1 + 16 + 600
    found = pairs_of(population, values, groups=0)
    assert not found.weights.any()  # alone, none of them matters


@pytest.mark.parametrize(("extra", "found"), [(4.0, [0, 1]), (4.5, [0, 1]), (3.9375, []), (0.0, [])])
def test_one_and_a_half_times_the_parts(monkeypatch, extra, found):
    """Each costs 4 of 512, too little to be important; together 8 + extra, against 1.5 · 8."""
    population, values = priced([1.0] * 4, lambda w: 512 + 4 * gone(w)[:2].sum() + extra * gone(w)[0] * gone(w)[1])
    grouped(monkeypatch, (0, 1), (2, 3))
    result = pairs_of(population, values)
    assert result.weights.nonzero().flatten().tolist() == found and result.credited == len(found)


def test_parts_that_help_when_they_go_do_not_count_against_the_sum(monkeypatch):
    """−4 and 4 alone, together 6.5 = over 1.5 · (0 + 4); 5.9 would not be."""
    for together, credited in ((6.5, 2), (5.9, 0)):
        population, values = priced(
            [1.0, 1.0, 1.0],
            lambda w, extra=together: 512 + 4 * gone(w)[0] - 4 * gone(w)[1] + extra * gone(w)[0] * gone(w)[1],
        )
        grouped(monkeypatch, (0, 1))
        assert pairs_of(population, values).credited == credited


def test_a_coalition_without_any_effect_is_none(monkeypatch):
    population, values = priced([1.0] * 4, lambda w: 512 + 0 * w.sum())
    grouped(monkeypatch, (0, 1), (2, 3))
    assert pairs_of(population, values).credited == 0
    # 5 of 512 is under a hundredth, 6 is over.
    for effect, credited in ((5.0, 0), (6.0, 2)):
        population, values = priced([1.0] * 4, lambda w, e=effect: 512 + e * gone(w)[0] * gone(w)[1])
        assert pairs_of(population, values).credited == credited


def test_several_memberships_are_needed(monkeypatch):
    """Weights 0 and 1 are in three harmful pairs, 2 and 3 in one; those in more come first when the budget ends."""

    def price(w):
        g = gone(w)
        return 8.0 + g[0] * g[1] + g[0] * g[2] + g[1] * g[3]

    population, values = priced([1.0] * 8, price)
    grouped(monkeypatch, (0, 1), (2, 0), (1, 3), (0, 1), (5, 6), (4, 7))
    for memberships, expected in ((1, [0, 1, 2, 3]), (2, [0, 1]), (3, [0, 1]), (4, [])):
        found = pairs_of(population, values, memberships=memberships)
        assert found.weights.nonzero().flatten().tolist() == expected
    grouped(monkeypatch, (0, 1), (2, 0), (1, 3), (1, 0), (1, 3))  # three memberships of 0, four of 1, two of 3
    for budget, expected in ((1 / 8, [1]), (2 / 8, [0, 1]), (3 / 8, [0, 1, 3])):
        found = pairs_of(population, values, budget=budget)
        assert found.weights.nonzero().flatten().tolist() == expected


def test_the_important_come_before_coalitions_and_are_in_none(monkeypatch):
    def price(w):
        g = gone(w)
        return 1.0 + 0.5 * g[4] + 9 * g[0] * g[1]

    population, values = priced([1.0] * 6, price)
    seen = []

    def groups(count, *_):
        seen.append(count)
        return torch.tensor([(0, 1), (3, 4)])  # of the weak: 4 is the sixth weight

    monkeypatch.setattr(locking, "_random_groups", groups)
    for budget, expected in ((1 / 6, [4]), (2 / 6, [0, 4]), (3 / 6, [0, 1, 4])):
        found = pairs_of(population, values, budget=budget)
        assert found.weights.nonzero().flatten().tolist() == expected
        assert (found.important, found.credited) == (1, len(expected) - 1)
    assert seen == [5, 5, 5]


def test_too_few_weak_units_make_no_coalition():
    population, values = priced([1.0] * 4, lambda w: 1.0 + gone(w)[0] * gone(w)[1])
    found = pairs_of(population, values, group_size=5)
    assert found.evaluations == 5 and not found.weights.any()


def test_random_groups():
    groups = locking._random_groups(9, 500, 4, torch.Generator().manual_seed(0), torch.device("cpu"))
    assert groups.shape == (500, 4) and all(len(set(group)) == 4 for group in groups.tolist())
    counts = torch.bincount(groups.flatten(), minlength=9).double()
    assert len(counts) == 9 and (counts - 2000 / 9).abs().max() < 5 * (2000 / 9) ** 0.5
    same = locking._random_groups(9, 500, 4, torch.Generator().manual_seed(0), torch.device("cpu"))
    assert torch.equal(groups, same)


@pytest.mark.parametrize(
    "change",
    [
        {"unit": "row"}, {"candidates": 0}, {"candidates": 1.5}, {"threshold": -0.1}, {"threshold": float("nan")},
        {"budget": 1.1}, {"budget": -0.1}, {"minimum": -0.1}, {"minimum": 0.5}, {"groups": -1}, {"group_size": 1},
        {"memberships": 0},
    ],
)  # fmt: skip
def test_options_out_of_range(change):
    ((name, value),) = change.items()
    with pytest.raises(ValueError, match=f"^{name}={value!r}: accepted is "):
        LockOptions(**change)


def test_what_a_language_model_has_learned_is_found():
    """Of blocks that a hand-made change touched, those it needs; as loops find them."""
    model = make_random_model(**SMALL)
    population = Population(model)
    x = torch.tensor([list("Türkçe 🙂 \x00\xff".encode())], dtype=torch.uint8)
    before = population.values()
    optimizer = torch.optim.SGD([p for n, p in model.named_parameters() if "output" in n], 0.5)
    for _ in range(20):
        optimizer.zero_grad()
        model.loss(x).backward()
        optimizer.step()
    values = population.values()
    options = LockOptions(candidates=30, groups=0, minimum=0.0, budget=0.02)
    found = find_important(population, values, x, locked=anchors(model, population), reference=before, options=options)
    assert 0 < found.weights.sum() <= 0.02 * population.size and not (found.weights & anchors(model, population)).any()
    assert ((values != before)[found.weights]).any()
    units = Units(population)
    for unit in units.of_weight[found.weights].unique():
        edited = torch.where(units.of_weight == unit, 0.1 * values, values)
        population.load(edited)
        with torch.no_grad():
            without = model.loss(x)
            population.load(values)
            assert without > 1.009 * model.loss(x)


# ── anchors ──────────────────────────────────────────────────────────────────────────────────────────────────────────


class Mixed(nn.Module):
    def __init__(self):
        super().__init__()
        self.read_out = nn.Linear(4, 10)
        self.embedding = nn.Embedding(10, 4)
        self.read_out.weight = self.embedding.weight  # under the name of the first
        self.norm = nn.LayerNorm(4)
        self.inner = nn.Sequential(nn.BatchNorm1d(4), nn.Linear(4, 4), nn.RMSNorm(4), nn.GroupNorm(2, 4, affine=False))


def test_anchors_are_embeddings_and_norms_alone():
    module = Mixed()
    population = Population(module)
    mask = anchors(module, population)
    names = {name for name, each in by_parameter(population, mask).items() if each.all()}
    assert names == {
        "read_out.weight", "norm.weight", "norm.bias", "inner.0.weight", "inner.0.bias", "inner.2.weight",
    }  # fmt: skip
    assert mask.sum() == sum(each.numel() for name, each in by_parameter(population, mask).items() if name in names)
    alone = nn.Embedding(3, 2)
    assert anchors(alone, Population(alone)).all()
    alone = nn.Linear(3, 2)
    assert not anchors(alone, Population(alone)).any()


def test_norms_are_known_by_their_class_or_the_end_of_its_name():
    class MyLayerNorm(nn.Linear):
        pass

    class Derived(nn.LayerNorm):
        pass

    class Normal(nn.Linear):
        pass

    class NormalisedLinear(nn.Linear):
        pass

    class GradNormBalance(nn.Linear):
        pass

    class BatchNorm2d(nn.Linear):
        pass

    for kind, expected in (
        (lambda: MyLayerNorm(2, 2), True), (lambda: Derived(2), True), (lambda: BatchNorm2d(2, 2), True),
        (lambda: nn.InstanceNorm1d(2, affine=True), True), (lambda: nn.SyncBatchNorm(2), True),
        (lambda: Normal(2, 2), False), (lambda: NormalisedLinear(2, 2), False), (lambda: GradNormBalance(2, 2), False),
    ):  # fmt: skip
        module = kind()
        assert anchors(module, Population(module)).all() == expected, module


def test_anchors_of_the_language_model():
    model = make_random_model(growth=("widen 64", "grow 0"))
    population = Population(model)
    names = {name for name, each in by_parameter(population, anchors(model, population)).items() if each.any()}
    tables = {f"{name}.weight" for name, each in model.named_modules() if isinstance(each, nn.Embedding)}
    assert names == tables and "encoder.embedding.weight" in names


def test_by_parameter():
    population = Population(Shapes())
    mask = torch.rand(population.size) < 0.5
    cut = by_parameter(population, mask)
    assert {name: tuple(each.shape) for name, each in cut.items()} == {
        "matrix": (130, 3), "vector": (150,), "empty": (0, 4), "scalar": (),
    }  # fmt: skip
    assert torch.equal(torch.cat([each.flatten() for each in cut.values()]), mask)
