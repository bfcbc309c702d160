"""Learning by mutation: kept only when better, locks to the bit, and every step against its formula in float64."""

import copy
import itertools
import json

import pytest
import torch
from torch import nn

from model.sgm import learner as learner_module
from model.sgm.learner import Learner
from model.sgm.mutations import LearnerOptions, Mutations, scales
from model.sgm.population import Population
from tests.conftest import make_random_model


def squares(model, x, target):
    return (model(x) - target).square().mean(1)


class Watched(Population):
    """Keeps what has been evaluated: versions, of what, on what base, and their mean losses."""

    def __init__(self, module, loss=squares):
        super().__init__(module, loss)
        self.seen = []

    def losses(self, versions, *batch, of=None, base=None):
        found = super().losses(versions, *batch, of=of, base=base)
        self.seen.append((versions.clone(), of, base, found.mean(1)))
        return found

    def rows(self) -> int:
        return sum(len(versions) for versions, *_ in self.seen)


def flags(options: dict) -> list[bool]:
    return [options["perturbation"] == "dense", options["antithetic"], options["recombine"]]


def problem(seed=0):
    """A small network and a batch that another network of its shape made: it can be learned."""
    torch.manual_seed(seed)
    module, other = (nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3)) for _ in range(2))
    x = torch.randn(12, 5)
    return module, (x, other(x).detach())


@torch.no_grad()
def loss_of(module, values, batch) -> float:
    """In a copy, by float64."""
    module = copy.deepcopy(module).double()
    nn.utils.vector_to_parameters(values.double(), module.parameters())
    return (module(batch[0].double()) - batch[1]).square().mean().item()


def bits(x: torch.Tensor) -> torch.Tensor:
    return x.view(torch.int32)


@pytest.fixture
def draws(monkeypatch):
    """Every draw of directions, as it was made."""
    made, draw = [], Mutations.draw

    def watched(self, count):
        made.append(draw(self, count))
        return made[-1].clone()

    monkeypatch.setattr(Mutations, "draw", watched)
    return made


OPTIONS = [
    {"perturbation": perturbation, "antithetic": antithetic, "recombine": recombine}
    for perturbation, antithetic, recombine in itertools.product(("low-rank", "dense"), (False, True), (False, True))
]


# ── kept only when better ────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("options", OPTIONS)
def test_what_is_kept_is_better_and_learns(options):
    module, batch = problem()
    learner = Learner(Watched(module), LearnerOptions(population=16, **options))
    first, kept = learner.values.clone(), []
    learned = learner.learn(*batch, evaluations=800, on_accept=lambda: kept.append(learner.values.clone()))
    losses = [loss_of(module, values, batch) for values in [first, *kept]]
    assert learned.accepted == len(kept) >= 10 and torch.equal(kept[-1], learner.values)
    assert all(after < before + 1e-7 for before, after in itertools.pairwise(losses))
    assert learned.before == pytest.approx(losses[0], rel=1e-5) and learned.after == pytest.approx(losses[-1], rel=1e-5)
    assert learned.after < 0.6 * learned.before
    assert torch.equal(learner.population.values(), first)  # the module's own weights are not touched


def test_a_generation_without_a_better_one_changes_nothing():
    module, (x, _) = problem()
    population = Watched(module)
    learner = Learner(population)
    perfect = module(x).detach()
    first = learner.values.clone()
    learned = learner.learn(x, perfect, evaluations=200, target=-1.0)
    assert torch.equal(bits(first), bits(learner.values))
    assert learned.accepted == 0 and learned.generations == 7 and learned.before == learned.after


def test_what_is_taken_is_the_best_of_all_that_were_seen():
    module, batch = problem()
    for options in OPTIONS:
        population = Watched(module)
        learner = Learner(population, LearnerOptions(population=12, **options))
        learned = learner.learn(*batch, evaluations=2)
        assert learned.generations == 1
        versions = torch.cat([of.take(v) if of is None else of.put(v[i], base)[None]
                              for v, of, base, _ in population.seen[1:] for i in range(len(v))])  # fmt: skip
        losses = torch.cat([losses for *_, losses in population.seen[1:]])
        assert len(versions) == len(losses) == 12
        if learned.accepted:
            assert torch.equal(learner.values, versions[losses.argmin()])
        else:
            assert losses.min() >= learned.before


def test_of_what_comes_to_the_target_the_smallest_change_is_taken():
    """A larger one says more about all other inputs, and the loss is low enough."""
    module, batch = problem()
    population = Watched(module)
    taken = []
    for target in (0.0, 0.93, 0.97):
        population.seen.clear()
        learner = Learner(population, LearnerOptions(population=16, sigma=0.02))
        start = population.losses(learner.values[None], *batch).mean().item()
        learner.learn(*batch, evaluations=2, target=target * start)
        (tried, _, _, losses), (steps, _, _, of_steps) = population.seen[2:]
        sizes = torch.tensor([0.02] * len(tried) + [0.02 * s for s in (0.5, 1, 2, 4)])
        losses, versions = torch.cat([losses, of_steps]), torch.cat([tried, steps])
        there = losses <= target * start
        expected = sizes.where(there, torch.inf).argmin() if there.any() else losses.argmin()
        assert torch.equal(learner.values, versions[expected])
        taken.append((learner.values - tried.mean(0)).norm().item())
    assert there.sum() > 1 and losses.argmin() != expected
    assert taken[2] < taken[0]


def test_target_and_evaluations_end_it():
    module, batch = problem()
    learner = Learner(Watched(module), LearnerOptions(population=16))
    start = learner.learn(*batch, evaluations=1)
    assert start.generations == 0 and start.evaluations == 1
    for evaluations in (0, -1, 1.5, "9"):
        with pytest.raises(ValueError, match=f"evaluations={evaluations!r}: accepted is an integer ≥ 1"):
            learner.learn(*batch, evaluations=evaluations)
    some = learner.learn(*batch, evaluations=100_000, target=0.8 * start.before)
    assert some.after <= 0.8 * start.before and some.evaluations < 5_000
    again = learner.learn(*batch, evaluations=1_000, target=0.8 * start.before)
    assert again.generations == 0 and again.before == pytest.approx(some.after, rel=1e-6)


# ── what may move ────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("options, half", [(options, bool(sum(flags(options)) % 2)) for options in OPTIONS])
def test_locked_weights_stay_to_the_bit(options, half):
    module, batch = problem()
    with torch.no_grad():
        module[0].weight[0, :3] = torch.tensor([-0.0, 1e-42, -0.0])
    keep = (lambda values: values.half().float()) if half else (lambda values: values)
    population = Watched(module)
    locked = torch.rand(population.size, generator=torch.Generator().manual_seed(1)) < 0.5
    locked[:3] = True
    basis = torch.linalg.qr(torch.randn(5, 3))[0].T
    for within in (None, {"0.weight": [(slice(0, 4), basis), (slice(4, 7), basis[:0])]}):
        learner = Learner(population, LearnerOptions(population=12, **options), locked=locked, keep=keep)
        before = learner.values.clone()
        learned = learner.learn(*batch, evaluations=400, within=within)
        assert learned.accepted > 2 and torch.equal(bits(learner.values)[locked], bits(before)[locked])
        moved = learner.values != before
        rows = torch.zeros(population.size, dtype=torch.bool)
        rows[4 * 5 : 7 * 5] = within is not None
        assert moved[~locked & ~rows].float().mean() > 0.9 and not (moved & rows).any()
        for versions, of, base, _ in population.seen[1:]:  # nor were they ever tried
            if of is not None:
                tried, kept = (bits(each[..., of.take(locked)]) for each in (versions, of.take(base)))
                assert (tried == kept).all()
        population.seen.clear()


def test_only_free_weights_that_are_not_locked_move():
    module, batch = problem()
    population = Watched(module)
    locked, free = torch.zeros(2, population.size, dtype=torch.bool)
    locked[population.spans["2.weight"]] = True
    free[population.spans["2.weight"]] = free[population.spans["2.bias"]] = True
    learner = Learner(population, locked=locked)
    before = learner.values.clone()
    assert learner.learn(*batch, evaluations=200, free=free).accepted
    moved = (learner.values != before).nonzero().flatten().tolist()
    assert moved == list(range(*population.spans["2.bias"].indices(population.size)))
    learner.locked[population.spans["2.bias"]] = True  # between calls
    before = learner.values.clone()
    learner.learn(*batch, evaluations=200)
    moved = learner.values != before
    assert moved[: population.spans["2.weight"].start].all() and not moved[population.spans["2.weight"].start :].any()


def test_all_locked_nothing_moves():
    module, batch = problem()
    population = Watched(module)
    learner = Learner(population, locked=torch.ones(population.size, dtype=torch.bool))
    before = learner.values.clone()
    learned = learner.learn(*batch, evaluations=500)
    assert torch.equal(bits(before), bits(learner.values))
    assert (learned.evaluations, learned.generations, learned.accepted, population.rows()) == (1, 0, 0, 1)
    assert learned.before == learned.after == pytest.approx(loss_of(module, before, batch), rel=1e-5)
    some = Learner(population)
    assert some.learn(*batch, evaluations=9, free=torch.zeros(population.size, dtype=torch.bool)).generations == 0


def test_the_lock_given_is_copied():
    module, _ = problem()
    population = Watched(module)
    locked = torch.zeros(population.size, dtype=torch.bool)
    learner = Learner(population, locked=locked)
    learner.locked[3] = True
    assert not locked.any()


def test_float16_weights_are_rounded_before_they_are_judged():
    module, batch = problem()
    calls = []

    def keep(values):
        calls.append(values.shape)
        return values.half().float()

    population = Watched(module)
    learner = Learner(population, LearnerOptions(population=12, sigma=0.005), keep=keep)
    assert torch.equal(learner.values, learner.values.half().float())
    learned = learner.learn(*batch, evaluations=300)
    assert learned.accepted and torch.equal(learner.values, learner.values.half().float())
    assert learned.after == pytest.approx(loss_of(module, learner.values, batch), rel=1e-5)
    for versions, *_ in population.seen:
        assert torch.equal(versions, versions.half().float())


def test_the_guard_has_the_last_word():
    module, batch = problem()
    population = Watched(module)
    options = LearnerOptions(population=16)
    asked = []

    def never(versions, of):
        asked.append((versions, of))
        return torch.zeros(len(versions), dtype=torch.bool)

    learner = Learner(population, options)
    before = learner.values.clone()
    learned = learner.learn(*batch, evaluations=160, guard=never)
    assert torch.equal(before, learner.values) and learned.accepted == 0
    assert learned.refused == len(asked) > 3
    start = learned.before
    for versions, of in asked:
        losses = population.losses(versions, *batch, of=of, base=before).mean(1)
        assert (losses < start).all() and torch.equal(losses, losses.sort().values) and 1 <= len(versions) <= 4

    # One that turns down the best each time: what is taken is the next.
    chosen = []

    def second(versions, of):
        allowed = torch.arange(len(versions)) > 0
        chosen.append(of.put(versions[1], learner.values) if len(versions) > 1 else None)
        return allowed

    learner = Learner(population, options)
    taken = []
    learned = learner.learn(*batch, evaluations=160, guard=second, on_accept=lambda: taken.append(learner.values))
    expected = [values for values in chosen if values is not None]
    assert learned.refused == len(chosen) and learned.accepted == len(taken) == len(expected) > 3
    assert all(torch.equal(x, y) for x, y in zip(taken, expected))

    learner = Learner(population, options)
    learned = learner.learn(*batch, evaluations=160, guard=lambda v, of: torch.ones(len(v), dtype=torch.bool))
    assert learned.accepted and learned.refused == 0


# ── losses that are not finite ───────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("options", OPTIONS)
def test_versions_without_a_finite_loss_are_never_taken(options):
    """The better the loss, the nearer to where it is no number."""
    module = nn.Linear(3, 2)
    with torch.no_grad():
        module.weight.fill_(0.5), module.bias.fill_(0.1)

    def loss(model, x):
        total = model(x).sum(1)
        return torch.where(total < 3.0, total, torch.nan).sqrt()

    population = Watched(module, loss)
    learner = Learner(population, LearnerOptions(population=12, sigma=0.1, **options))
    learned = learner.learn(torch.tensor([[1.0, 0.5, 0.2], [0.2, 0.2, 0.2]]), evaluations=600)
    losses = torch.cat([losses for *_, losses in population.seen])
    assert losses.isinf().sum() > 10 and learned.accepted > 3
    assert learner.values.isfinite().all() and 0 <= learned.after < 0.5 * learned.before


def test_it_finds_its_way_out_of_infinity():
    module = nn.Linear(3, 1)
    with torch.no_grad():
        module.weight.fill_(0.2), module.bias.fill_(0.1)
    population = Watched(module, lambda model, x: torch.where(model(x)[:, 0] < 0.65, model(x)[:, 0], torch.inf))
    learned = Learner(population).learn(torch.ones(1, 3), evaluations=300, target=0.6)
    assert learned.before == torch.inf and learned.after <= 0.6 and learned.accepted


@pytest.mark.parametrize("antithetic", [False, True])
def test_infinite_losses_are_worth_as_much_as_the_worst_finite_one(draws, antithetic):
    module = nn.Linear(3, 1)
    with torch.no_grad():
        module.weight.fill_(0.2), module.bias.fill_(0.1)
    population = Watched(module, lambda model, x: torch.where(model(x)[:, 0] < 0.71, model(x)[:, 0], torch.nan))
    options = LearnerOptions(population=20, antithetic=antithetic, momentum=0.0)
    learner = Learner(population, options)
    start = learner.values.double()
    learner.learn(torch.ones(1, 3), evaluations=2)
    (_, _, _, losses), (steps, _, _, _) = population.seen[1:]
    assert 3 < losses.isinf().sum() < len(losses) - 3
    losses = losses.where(losses.isfinite(), losses[losses.isfinite()].max()).double()
    noise = draws[0].double()
    half = len(losses) // 2
    weights = (losses[:half] - losses[half:]) / 2 if antithetic else losses - losses.mean()
    estimate = weights @ noise
    size = (estimate / scales(population)).square().mean().sqrt()
    expected = torch.stack([start - s * options.sigma * estimate / size for s in (0.5, 1, 2, 4)])
    torch.testing.assert_close(steps.double(), expected, rtol=0, atol=1e-6)


def test_all_infinite_leaves_all_as_it_is():
    module, batch = problem()
    for options in OPTIONS:
        learner = Learner(
            Watched(module, lambda model, x, target: model(x)[:, 0] * torch.nan), LearnerOptions(**options)
        )
        before = learner.values.clone()
        learned = learner.learn(*batch, evaluations=100)
        assert learned.accepted == 0 and learned.after == torch.inf and torch.equal(before, learner.values)


# ── the formulas ─────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("antithetic", [False, True])
@pytest.mark.parametrize("perturbation", ["low-rank", "dense"])
def test_candidates_estimate_and_sizes_are_the_documented_ones(draws, perturbation, antithetic):
    module, batch = problem(3)
    population = Watched(module)
    options = LearnerOptions(population=14, perturbation=perturbation, antithetic=antithetic, momentum=0.7, sigma=0.04)
    locked = torch.rand(population.size, generator=torch.Generator().manual_seed(1)) < 0.3
    learner = Learner(population, options, locked=locked)
    values = [learner.values.double()]
    taken = {}
    learner.learn(
        *batch, evaluations=350, on_accept=lambda: taken.setdefault(len(population.seen), learner.values.double())
    )
    scale, estimate = scales(population).double(), torch.zeros(population.size, dtype=torch.float64)
    now, best, eta, sigma = values[0], population.seen[0][3].item(), 0.04, 0.04
    assert len(draws) >= 20 and len(taken) >= 5 and len(population.seen) == 1 + 2 * len(draws)
    outcomes = set()
    for generation, drawn in enumerate(draws):
        (tried, _, _, losses), (steps, _, _, of_steps) = population.seen[1 + 2 * generation : 3 + 2 * generation]
        noise = drawn.double()
        assert not noise[:, locked].any()
        signed = torch.cat([noise, -noise]) if antithetic else noise
        torch.testing.assert_close(tried.double(), now + sigma * signed, rtol=0, atol=2e-7)
        losses = losses.double()
        if antithetic:
            weights = (losses[: len(noise)] - losses[len(noise) :]) / 2
        else:
            weights = losses - losses.mean()
        said = sum(w * e for w, e in zip(weights, noise)) / weights.abs().max()
        estimate = 0.7 * estimate + 0.3 * said
        size = ((estimate / scale)[~locked]).square().mean().sqrt()
        expected = torch.stack([now - s * eta * estimate / size for s in (0.5, 1, 2, 4)])
        torch.testing.assert_close(steps.double(), expected, rtol=0, atol=2e-6)
        both = torch.cat([losses, of_steps.double()])
        better = both.min().item() < best
        if better:
            best, chosen = both.min().item(), int(both.argmin())
            now = taken[3 + 2 * generation]
            assert torch.equal(now, torch.cat([tried, steps])[chosen].double())
            if chosen >= len(losses):
                eta *= (0.6, 0.9, 1.3, 1.8)[chosen - len(losses)]
                outcomes.add(chosen - len(losses))
        else:
            eta *= 0.6
            outcomes.add("none")
        eta = min(max(eta, options.sigma_min / 5), 2 * options.sigma_max)
        sigma = min(max(eta, options.sigma_min), options.sigma_max)
    assert {"none", 0, 3} & outcomes and len(outcomes) >= 3


@pytest.mark.parametrize("antithetic", [False, True])
def test_evolution_strategy_adapts_sigma_by_its_successes(draws, antithetic):
    module, batch = problem()
    population = Watched(module)
    options = LearnerOptions(population=16, recombine=False, antithetic=antithetic, sigma=0.02, sigma_max=0.05)
    learner = Learner(population, options)
    now = [learner.values.clone()]
    learner.learn(*batch, evaluations=1_500, on_accept=lambda: now.append(learner.values.clone()))
    sigma, best, current, kinds, sizes = 0.02, population.seen[0][3], now.pop(0), set(), []
    assert len(population.seen) == 1 + len(draws)  # nothing but mutations
    for drawn, (tried, _, _, losses) in zip(draws, population.seen[1:]):
        signed = torch.cat([drawn, -drawn]) if antithetic else drawn
        assert len(tried) == 16
        torch.testing.assert_close(tried, current + sigma * signed, rtol=0, atol=3e-7)
        share = (losses < best).double().mean().item()
        factor = 1.15 if share > 0.2 else 0.95 if share < 0.05 else 1.0
        sigma = min(max(sigma * factor, 0.005), 0.05)
        kinds.add(factor), sizes.append(sigma)
        if losses.min() < best:
            best, current = losses.min(), now.pop(0)
    assert kinds == {1.15, 0.95, 1.0} and max(sizes) == 0.05 and not now


@pytest.mark.parametrize("population_size", [8, 13, 32])
@pytest.mark.parametrize("options", OPTIONS)
def test_evaluations_are_counted_exactly(options, population_size):
    module, batch = problem()
    population = Watched(module)
    learner = Learner(population, LearnerOptions(population=population_size, **options))
    for budget in (1, 2, 75):
        population.seen.clear()
        before = learner.evaluations
        learned = learner.learn(*batch, evaluations=budget)
        assert learned.evaluations == population.rows() == learner.evaluations - before
        assert budget <= learned.evaluations < budget + population_size
        steps = 4 if options["recombine"] else 0
        mutated = population_size - steps - (population_size - steps) % (2 if options["antithetic"] else 1)
        assert learned.evaluations == 1 + learned.generations * (mutated + steps)


@pytest.mark.parametrize("options", OPTIONS)
def test_a_generation_in_parts_is_as_one(monkeypatch, options):
    """Directions that do not fit into memory together are drawn again, the same, for the estimate."""
    module, batch = problem()
    largest, draw = [], Mutations.draw

    def watched(self, count):
        largest.append(count)
        # Directions one by one, so that what is drawn does not depend on how many are drawn together.
        return torch.cat([draw(self, 1) for _ in range(count)])

    monkeypatch.setattr(Mutations, "draw", watched)
    found = []
    for at_once in (16_000_000, 3 * 66, 1):
        monkeypatch.setattr(learner_module, "AT_ONCE", at_once)
        learner = Learner(Population(module, squares), LearnerOptions(population=18, **options), seed=2)
        largest.clear()
        learned = learner.learn(*batch, evaluations=200)
        assert learned.accepted > 3
        assert max(largest) == {16_000_000: 7 if options["antithetic"] else 14, 198: 3, 1: 1}[at_once] + (
            (2 if options["antithetic"] else 4) * (at_once == 16_000_000 and not options["recombine"])
        )
        found.append((learned, learner.values, learner.generator.get_state()))
    for learned, values, state in found[1:]:
        assert torch.equal(state, found[0][2])
        assert learned.evaluations == found[0][0].evaluations and learned.accepted == found[0][0].accepted
        torch.testing.assert_close(values, found[0][1], rtol=1e-4, atol=1e-5)


def test_equal_seeds_are_equal_and_others_are_not():
    module, batch = problem()

    def run(seed, **options):
        learner = Learner(Watched(module), LearnerOptions(population=12, **options), seed=seed)
        torch.randn(3)  # PyTorch's own generator has no part in it
        learner.learn(*batch, evaluations=150)
        return learner.values

    for options in OPTIONS:
        assert torch.equal(run(1, **options), run(1, **options))
        assert not torch.equal(run(1, **options), run(2, **options))


@pytest.mark.parametrize("options", OPTIONS[:2])
def test_going_on_from_a_state_is_as_going_on(options):
    module, batch = problem()
    options = LearnerOptions(population=12, sigma=0.03, **options)
    whole = Learner(Watched(module), options, seed=4)
    whole.learn(*batch, evaluations=100)
    state, values = json.loads(json.dumps(whole.state())), whole.values.clone()
    second = whole.learn(*batch, evaluations=100)

    module = copy.deepcopy(module)
    resumed = Learner(Watched(module), options, seed=99)
    resumed.population.load(values)
    resumed = Learner(resumed.population, options, seed=99)
    resumed.load_state(state)
    assert resumed.learn(*batch, evaluations=100) == second
    assert torch.equal(resumed.values, whole.values) and resumed.state() == whole.state()

    elsewhere = state | {"random": [0] * 16}  # as long as a card's
    drawn = []
    for _ in range(2):
        learner = Learner(Watched(module), options, seed=len(drawn))
        learner.load_state(elsewhere)
        drawn.append(torch.rand(3, generator=learner.generator))
    assert torch.equal(*drawn) and learner.evaluations == state["evaluations"]

    other = Learner(Watched(module), LearnerOptions(population=13))
    with pytest.raises(ValueError, match=r"options=.*accepted are those that learned so far"):
        other.load_state(state)


@pytest.mark.parametrize(
    "change",
    [
        {"population": 7}, {"population": 8.0}, {"population": "8"}, {"perturbation": "sparse"}, {"perturbation": ""},
        {"rank": 0}, {"rank": 1.5}, {"momentum": 1.0}, {"momentum": -0.1}, {"momentum": float("nan")},
        {"sigma_min": 0.0}, {"sigma_min": 0.2}, {"sigma_max": 0.001}, {"sigma": 0.2}, {"sigma": 0.001},
        {"sigma": float("nan")},
    ],
)  # fmt: skip
def test_options_out_of_range(change):
    with pytest.raises(ValueError, match=r"=.*: accepted is "):
        LearnerOptions(**change)
    (name,) = change
    if name not in ("sigma_min", "sigma_max"):
        with pytest.raises(ValueError, match=f"^{name}={change[name]!r}: accepted is "):
            LearnerOptions(**change)


def test_without_room_nothing_moves():
    module, batch = problem()
    population = Watched(module)
    learner = Learner(population)
    free = torch.zeros(population.size, dtype=torch.bool)
    free[population.spans["0.weight"]] = True
    before = learner.values.clone()
    learner.learn(*batch, evaluations=100, free=free, within={"0.weight": [(slice(0, 7), torch.zeros(0, 5))]})
    assert torch.equal(bits(before), bits(learner.values))


def test_a_language_model_learns_bytes():
    model = make_random_model(
        d_model=16, n_layers=1, byte_dim=8, window=3, ffn_dim=16, reasoning_dim=16, head_dim=16, n_heads=2
    )
    x = torch.tensor([list("Ankara başkent 🙂".encode())], dtype=torch.uint8)
    population = Population(model)
    learner = Learner(population, LearnerOptions(population=24))
    learned = learner.learn(x, evaluations=400)
    population.load(learner.values)
    with torch.no_grad():
        assert model.loss(x).item() == pytest.approx(learned.after, rel=1e-4)
    assert learned.after < 0.9 * learned.before
