"""Many versions at once against one deep copy after another, for models of every kind that we have."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from model.layers.hull import ConvexPetals, SwiGLUPetals, VectorHull
from model.sgm import population as population_module
from model.sgm.population import Matrices, Population, byte_losses, evaluating, matrices, place_losses
from tests.conftest import make_random_model

VARIANTS = {
    "hebbian": {},
    "delta": {"memory_rule": "delta"},
    "swiglu": {"hull": "swiglu"},
    "grown": {"growth": ("grow 0", "petals 1 2"), "n_layers": 2},
    "columns": {"growth": ("widen 32",)},
    "anchors": {"anchors": True},
}
SMALL = {"d_model": 16, "n_layers": 1, "byte_dim": 8, "window": 3, "ffn_dim": 16, "reasoning_dim": 16, "head_dim": 16}


def byte_rows(rows=3, length=22, seed=1) -> torch.Tensor:
    return torch.randint(256, (rows, length), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def some_versions(population: Population, count=4, size=0.05, seed=0) -> torch.Tensor:
    noise = torch.randn(count, population.size, generator=torch.Generator().manual_seed(seed))
    return population.values() + size * noise


@torch.no_grad()
def one_by_one(module, versions, loss) -> torch.Tensor:
    """Each version in a copy of its own: loss(copy) → [B]."""
    found = []
    for version in versions:
        each = copy.deepcopy(module).eval()
        nn.utils.vector_to_parameters(version, each.parameters())
        found.append(loss(each))
    return torch.stack(found)


def cross_entropy_rows(x, counts=None):
    """Nats per byte of each row, by PyTorch's own means, row by row."""

    def loss(model):
        rows = []
        for i, row in enumerate(model(x)):
            chosen = slice(None) if counts is None else counts[i]
            rows.append(F.cross_entropy(row[chosen], x[i][chosen].long()))
        return torch.stack(rows)

    return loss


@pytest.mark.parametrize("variant", VARIANTS)
def test_losses_are_those_of_separate_copies(variant):
    model = make_random_model(**(SMALL | VARIANTS[variant]))
    population, x = Population(model), byte_rows()
    versions = some_versions(population)
    expected = one_by_one(model, versions, cross_entropy_rows(x))
    losses = population.losses(versions, x)
    assert losses.shape == (4, 3) and losses.dtype == torch.float32 and expected.std(0).min() > 1e-3
    torch.testing.assert_close(losses, expected, rtol=2e-5, atol=2e-5)


def test_plasticity_is_that_of_the_module():
    model = make_random_model(**SMALL)
    population, x = Population(model), byte_rows(length=40)
    versions = some_versions(population)
    before = population.losses(versions, x)
    model.set_plasticity(0.1)
    after = population.losses(versions, x)
    torch.testing.assert_close(after, one_by_one(model, versions, cross_entropy_rows(x)), rtol=2e-5, atol=2e-5)
    assert not torch.allclose(before, after, rtol=1e-4)


def test_only_what_counts_counts():
    model = make_random_model(**SMALL)
    population, x = Population(model), byte_rows()
    counts = torch.rand(x.shape, generator=torch.Generator().manual_seed(2)) < 0.4
    counts[0] = False
    counts[0, 5] = True
    versions = some_versions(population)
    expected = one_by_one(model, versions, cross_entropy_rows(x, counts))
    torch.testing.assert_close(population.losses(versions, x, counts), expected, rtol=2e-5, atol=2e-5)
    assert population.losses(versions, x, torch.zeros_like(counts)).eq(0).all()


def test_losses_of_places_are_those_of_rows_byte_by_byte():
    model = make_random_model(**SMALL)
    x = byte_rows()
    counts = torch.rand(x.shape, generator=torch.Generator().manual_seed(2)) < 0.4
    with torch.no_grad():
        logs = F.cross_entropy(model(x).flatten(0, 1), x.flatten().long(), reduction="none").view(x.shape)
        for each in (None, counts, torch.zeros_like(counts)):
            losses = place_losses(model, x, each)
            chosen = torch.ones_like(counts) if each is None else each
            assert losses.shape == x.shape and not losses[~chosen].any()
            shares = chosen.sum(1, keepdim=True).expand_as(x)[chosen] / x.shape[1]
            torch.testing.assert_close(losses[chosen] * shares, logs[chosen], rtol=1e-5, atol=1e-6)
            torch.testing.assert_close(byte_losses(model, x, each), losses.mean(1))
        population = Population(model, place_losses)
        found = population.losses(some_versions(population), x, counts)
        assert found.shape == (4, *x.shape)
        rows = Population(model).losses(some_versions(population), x, counts)
        torch.testing.assert_close(found.mean(2), rows)


def test_an_infinite_loss_where_nothing_counts_is_not_seen():
    logits = torch.zeros(1, 2, 256)
    logits[0, 1, 7] = -torch.inf
    x = torch.tensor([[3, 7]])
    counts = torch.tensor([[True, False]])
    torch.testing.assert_close(byte_losses(lambda _: logits, x, counts), torch.tensor([256.0]).log())
    assert byte_losses(lambda _: logits, x).isinf().all()


class Custom(nn.Module):
    """A module with a scalar, a vector, a table and a buffer; no kernels of ours."""

    def __init__(self):
        super().__init__()
        self.amount = nn.Parameter(torch.tensor(0.7))
        self.table = nn.Embedding(5, 4)
        self.norm = nn.LayerNorm(4)
        self.convolution = nn.Conv1d(4, 3, 3, padding=1)
        self.register_buffer("offset", torch.randn(3, 1))

    def forward(self, x):
        y = self.convolution(self.norm(self.table(x)).transpose(1, 2)) + self.offset
        return self.amount * y.tanh().mean(2)


def squares(model, x, target):
    return (model(x) - target).square().mean(1)


class Kinds(nn.Module):
    """A parameter of every kind that is cut in its own way."""

    def __init__(self):
        super().__init__()
        self.linear, self.table = nn.Linear(5, 7), nn.Embedding(9, 4)
        self.line, self.plane = nn.Conv1d(6, 8, 3, groups=2), nn.Conv2d(3, 10, (2, 5))
        self.back = nn.ConvTranspose1d(6, 8, 3)
        self.convex, self.swiglu = ConvexPetals(12, 3, 16), SwiGLUPetals(12, 2, 16)
        self.hull = VectorHull(6, 4, 5)
        self.stack, self.scalar = nn.Parameter(torch.zeros(6, 5, 4)), nn.Parameter(torch.zeros(()))
        self.bias = nn.Parameter(torch.zeros(2, 3))
        self.tied = nn.Linear(5, 7)
        self.tied.weight = self.linear.weight


def test_how_parameters_are_cut_into_matrices():
    def vector(count, length):
        return Matrices(count, length, 1, True, vector=True)

    found = matrices(Kinds())
    assert found == {
        "stack": Matrices(1, 6, 20, False), "scalar": vector(1, 1), "bias": vector(1, 6),
        "linear.weight": Matrices(1, 7, 5, False), "linear.bias": vector(1, 7),
        "table.weight": Matrices(1, 9, 4, False),
        "line.weight": Matrices(1, 8, 9, False), "line.bias": vector(1, 8),
        "plane.weight": Matrices(1, 10, 30, False), "plane.bias": vector(1, 10),
        "back.weight": Matrices(1, 24, 6, True), "back.bias": vector(1, 8),
        "convex.up": Matrices(3, 16, 12, False), "convex.bias": vector(3, 16), "convex.down": Matrices(3, 12, 16, True),
        "convex.log_tau": vector(1, 1),
        "swiglu.up": Matrices(2, 32, 12, False), "swiglu.down": Matrices(2, 12, 16, True),
        "hull.up": Matrices(4, 5, 6, False), "hull.bias": vector(4, 5), "hull.raw": Matrices(4, 6, 5, True),
        "hull.skip": Matrices(4, 6, 6, False), "hull.offset": vector(4, 6), "hull.log_tau": vector(1, 1),
        "tied.bias": vector(1, 7),
    }  # fmt: skip
    for name, p in Kinds().named_parameters():
        n, rows, columns = found[name].shape
        assert n * rows * columns == p.numel(), name
        assert p.shape[:1] == (n,) or n == 1


@pytest.mark.parametrize("variant", VARIANTS)
def test_all_parameters_of_a_language_model_are_cut(variant):
    model = make_random_model(**(SMALL | VARIANTS[variant]))
    found = matrices(model)
    assert list(found) == [name for name, _ in model.named_parameters()]
    for name, p in model.named_parameters():
        if p.dim() == 3:
            assert found[name].shape == tuple(p.shape) and found[name].inputs_first == name.endswith("down"), name
        assert found[name].vector == (p.dim() < 2 or name.endswith("bias")), name


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_versions_are_evaluated_in_the_dtype_of_each_parameter(dtype):
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 2)).to(dtype)
    x, target = torch.randn(5, 4).to(dtype), torch.randn(5, 2).to(dtype)
    population = Population(module, squares)
    versions = some_versions(population, 3, size=0.3)
    assert versions.dtype == torch.float32
    expected = []
    for version in versions:
        each = copy.deepcopy(module)
        Population(each).load(version)
        with torch.no_grad():
            expected.append(squares(each, x, target).float())
    expected = torch.stack(expected)
    losses = population.losses(versions, x, target)
    assert losses.dtype == torch.float32
    rounding = {"rtol": 4 * torch.finfo(dtype).eps, "atol": 4 * max(torch.finfo(dtype).eps, 1e-7)}
    torch.testing.assert_close(losses, expected, **rounding)
    of = population.select(torch.arange(population.size) >= population.spans["2.weight"].start)
    parts = of.take(versions)
    whole = torch.stack([of.put(part, population.values()) for part in parts])
    expected = population.losses(whole, x, target)
    found = population.losses(parts, x, target, of=of, base=population.values())
    torch.testing.assert_close(found, expected, **rounding)


def small_cases():
    torch.manual_seed(3)
    sequential = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2))
    tied = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4))
    tied[2].weight = tied[0].weight
    return {
        "sequential": (sequential, torch.randn(5, 4), torch.randn(5, 2)),
        "custom": (Custom(), torch.randint(5, (5, 7)), torch.randn(5, 3)),
        "tied": (tied, torch.randn(5, 4), torch.randn(5, 4)),
    }


@pytest.mark.parametrize("name", ["sequential", "custom", "tied"])
def test_any_module_and_any_loss(name):
    module, x, target = small_cases()[name]
    population = Population(module, squares)
    assert population.size == sum(p.numel() for p in module.parameters())
    versions = some_versions(population, 7, size=0.3)
    expected = one_by_one(module, versions, lambda copy: squares(copy, x, target))
    torch.testing.assert_close(population.losses(versions, x, target), expected, rtol=1e-5, atol=1e-6)


def test_values_and_load_are_inverses():
    module, *_ = small_cases()["tied"]
    population = Population(module)
    assert list(population.spans) == ["0.weight", "0.bias", "2.bias"] and population.size == 24
    torch.testing.assert_close(population.values(), nn.utils.parameters_to_vector(module.parameters()))
    new = torch.randn(24)
    population.load(new)
    assert torch.equal(population.values(), new)
    assert torch.equal(module[2].weight.flatten(), new[:16])
    population.values().zero_()  # a copy
    assert torch.equal(population.values(), new)


@pytest.mark.parametrize("variant", ["hebbian", "grown", "columns"])
def test_a_selection_on_a_base_is_the_whole_with_the_rest_of_the_base(variant):
    model = make_random_model(**(SMALL | VARIANTS[variant]))
    population, x = Population(model), byte_rows()
    base = some_versions(population, 1, seed=7)[0]  # not the module's own
    free = torch.zeros(population.size, dtype=torch.bool)
    names = [name for name in population.spans if "qkv" in name or name.startswith("head.")]
    for name in names:
        free[population.spans[name].stop - 1] = True
    of = population.select(free)
    assert list(of.spans) == names and 0 < of.size < population.size
    parts = of.take(some_versions(population, seed=8))
    whole = torch.stack([of.put(part, base) for part in parts])
    expected = one_by_one(model, whole, cross_entropy_rows(x))
    torch.testing.assert_close(population.losses(parts, x, of=of, base=base), expected, rtol=2e-5, atol=2e-5)
    # Without a base, the others are as they are in the module.
    expected = one_by_one(model, torch.stack([of.put(p, population.values()) for p in parts]), cross_entropy_rows(x))
    torch.testing.assert_close(population.losses(parts, x, of=of), expected, rtol=2e-5, atol=2e-5)


def test_take_and_put():
    module, *_ = small_cases()["sequential"]
    population = Population(module)
    free = torch.zeros(population.size, dtype=torch.bool)
    free[[2, population.size - 1]] = True  # in 0.weight and in 2.bias
    of = population.select(free)
    values = torch.arange(population.size).float()
    kept = values.clone()
    part = of.take(values)
    assert part.tolist() == [*range(24), *range(population.size - 2, population.size)]
    assert torch.equal(of.put(part, values), values)
    changed = of.put(-part, values)
    assert torch.equal(changed[:24], -values[:24]) and torch.equal(changed[24:-2], values[24:-2])
    assert torch.equal(values, kept)
    assert of.take(torch.stack([values, changed])).shape == (2, 26)
    assert of.parameters(part[None])["0.weight"].shape == (1, 6, 4)


def test_in_parts_is_as_at_once(monkeypatch):
    module, x, target = small_cases()["sequential"]
    population = Population(module, squares)
    versions = some_versions(population, 7, size=0.3)
    whole, sizes, vmap = population.losses(versions, x, target), [], population_module.vmap

    def watched(function, **options):
        def run(parameters):
            sizes.append(len(next(iter(parameters.values()))))
            return vmap(function, **options)(parameters)

        return run

    monkeypatch.setattr(population_module, "vmap", watched)
    monkeypatch.setattr(population_module, "AT_ONCE", 2 * population.size + 1)
    torch.testing.assert_close(population.losses(versions, x, target), whole)
    assert sizes == [2, 2, 2, 1]
    monkeypatch.setattr(population_module, "AT_ONCE", 1)  # one version is larger than that
    torch.testing.assert_close(population.losses(versions, x, target), whole)


@pytest.mark.parametrize("members", [1, 3, 50])
def test_one_forward_for_all_members(members):
    model = make_random_model(**SMALL)
    population, calls = Population(model), []
    handles = [
        each.register_forward_hook(lambda *_, name=name: calls.append(name)) for name, each in model.named_modules()
    ]
    with torch.no_grad():
        model(byte_rows())
    once, calls[:] = list(calls), []
    population.losses(some_versions(population, members), byte_rows())
    for handle in handles:
        handle.remove()
    assert len(once) > 10 and calls == once


def test_losses_that_are_not_finite_are_infinite():
    module = nn.Linear(1, 1)
    population = Population(module, lambda model, x: model(x)[:, 0].sqrt())
    versions = torch.tensor([[1.0, 0.0], [torch.nan, 0.0], [torch.inf, 0.0], [4.0, 0.0]])
    losses = population.losses(versions, torch.tensor([[1.0], [-1.0], [4.0]]))
    assert losses.tolist() == [[1, torch.inf, 2], [torch.inf] * 3, [torch.inf] * 3, [2, torch.inf, 4]]


def test_evaluated_in_eval_mode_and_every_part_back_in_its_own():
    module = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5), nn.Sequential(nn.Dropout(0.5)), nn.Linear(4, 2)).train()
    module[2].eval()
    population, x = Population(module, lambda model, x: model(x).sum(1)), torch.randn(6, 4)
    versions = some_versions(population)
    expected = one_by_one(module, versions, lambda copy: copy(x).sum(1))
    torch.testing.assert_close(population.losses(versions, x), expected)
    assert [part.training for part in module.modules()] == [True, True, True, False, False, True]
    with pytest.raises(RuntimeError):
        population.losses(versions, torch.randn(6, 5))
    assert [part.training for part in module.modules()] == [True, True, True, False, False, True]
    with evaluating(module.eval()) as same:
        assert same is module
    assert not any(part.training for part in module.modules())


def test_the_modules_own_weights_are_left_alone():
    model = make_random_model(**SMALL)
    population = Population(model)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    versions = some_versions(population)
    kept = versions.clone()
    population.losses(versions, byte_rows())
    of = population.select(torch.ones(population.size, dtype=torch.bool))
    population.losses(versions, byte_rows(), of=of, base=versions[0])
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert torch.equal(versions, kept) and all(p.grad is None and p.requires_grad for p in model.parameters())
    with torch.no_grad():  # and they are not read
        for p in model.parameters():
            p.fill_(torch.nan)
    assert population.losses(versions, byte_rows()).isfinite().all()


def test_no_versions_no_losses():
    module, x, target = small_cases()["sequential"]
    population = Population(module, squares)
    assert population.losses(torch.zeros(0, population.size), x, target).shape == (0, 5)


def test_bad_shapes():
    module, x, target = small_cases()["sequential"]
    population = Population(module, squares)
    N = population.size
    for versions in (torch.zeros(N), torch.zeros(2, N + 1), torch.zeros(1, 2, N)):
        with pytest.raises(ValueError, match=rf"versions have shape .*: accepted is \[P, {N}\]"):
            population.losses(versions, x, target)
    free = torch.zeros(N, dtype=torch.bool)
    free[0] = True
    with pytest.raises(ValueError, match=r"accepted is \[P, 24\]"):
        population.losses(torch.zeros(2, N), x, target, of=population.select(free))
    with pytest.raises(ValueError, match=rf"values have shape \(2,\): accepted is \({N},\)"):
        population.load(torch.zeros(2))
    with pytest.raises(ValueError, match="module has no parameters"):
        Population(nn.ReLU())
