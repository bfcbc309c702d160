"""Locked weights do not move under gradient optimizers, whatever becomes of the model and of the optimizer."""

import pytest
import torch
from torch import nn

from model.sgm.locking import by_parameter, lock_gradients, lock_updates
from model.sgm.population import Population
from model.training.genesis import Genesis, GenesisOptions
from model.training.optimizer import MuonAdamW
from model.training.step import TrainingStep
from tests.conftest import make_random_model
from tests.genesis.test_replay import needs_cuda
from tests.sgm.test_locking import SMALL


def bits(x: torch.Tensor) -> torch.Tensor:
    return x.detach().contiguous().view(torch.int32)


# ── gradient optimizers ──────────────────────────────────────────────────────────────────────────────────────────────

OPTIMIZERS = {
    "sgd": lambda parameters: torch.optim.SGD(parameters, 0.01, momentum=0.9, weight_decay=0.1, nesterov=True),
    "adamw": lambda parameters: torch.optim.AdamW(parameters, 0.05, weight_decay=0.5),
    "adam": lambda parameters: torch.optim.Adam(parameters, 0.05, amsgrad=True),
}


def network(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 2))


def train(module, optimizer, steps=4, seed=0):
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        optimizer.zero_grad()
        (module(torch.randn(8, 4, generator=generator)) ** 2).sum().backward()
        optimizer.step()


def some(module, seed=1) -> tuple[Population, torch.Tensor]:
    population = Population(module)
    return population, torch.rand(population.size, generator=torch.Generator().manual_seed(seed)) < 0.5


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_locked_weights_do_not_move_under_an_optimizer(name):
    module = network()
    with torch.no_grad():
        module[0].weight[0, 0] = -0.0
    population, mask = some(module)
    mask[0] = True
    optimizer = OPTIMIZERS[name](module.parameters())
    train(module, optimizer)  # momentum is there before the lock
    before = population.values()
    unlock = lock_gradients(module, by_parameter(population, mask))
    train(module, optimizer, seed=1)
    after = population.values()
    assert torch.equal(bits(before)[mask], bits(after)[mask]) and (before != after)[~mask].all()
    gradients = torch.cat([p.grad.flatten() for p in module.parameters()])
    assert not gradients[mask].any() and gradients[~mask].all()
    unlock()
    train(module, optimizer, seed=2)
    assert (population.values() != after)[1:].all()


def test_what_is_free_moves_as_without_the_lock():
    modules = network(), network()
    population, mask = some(modules[0])
    optimizers = [torch.optim.SGD(module.parameters(), 0.1, momentum=0.9) for module in modules]
    lock_gradients(modules[0], by_parameter(population, mask))
    train(modules[0], optimizers[0], 1), train(modules[1], optimizers[1], 1)
    torch.testing.assert_close(population.values()[~mask], Population(modules[1]).values()[~mask], rtol=0, atol=0)


def test_other_modules_are_not_touched():
    module, other, reference = network(), network(1), network(1)
    population, mask = some(module)
    unlock = lock_gradients(module, by_parameter(population, torch.ones_like(mask)))
    train(other, OPTIMIZERS["adamw"](other.parameters()))
    unlock()
    train(reference, OPTIMIZERS["adamw"](reference.parameters()))
    assert torch.equal(Population(other).values(), Population(reference).values())


def test_locks_of_two_tasks_hold_together():
    module = network()
    population, first = some(module, 1)
    _, second = some(module, 2)
    optimizer = OPTIMIZERS["adamw"](module.parameters())
    one = lock_gradients(module, by_parameter(population, first))
    start = population.values()
    train(module, optimizer)
    middle = population.values()
    two = lock_gradients(module, by_parameter(population, second))
    train(module, optimizer, seed=1)
    end = population.values()
    assert torch.equal(start[first], end[first]) and torch.equal(middle[second], end[second])
    assert (middle != end)[~first & ~second].all() and (start != middle)[~first].all()
    two()
    train(module, optimizer, seed=2)
    assert torch.equal(start[first], population.values()[first])
    assert (population.values() != end)[second & ~first].all()
    one()


BAD_MASKS = {
    "locked 'nothing': accepted are names of the model's": {"nothing": torch.ones(6, 4, dtype=torch.bool)},
    r"locked '0.weight': float32 \(6, 4\), accepted is bool \(6, 4\)": {"0.weight": torch.ones(6, 4)},
    r"locked '0.weight': bool \(4,\), accepted is bool \(6, 4\)": {"0.weight": torch.ones(4, dtype=torch.bool)},
    r"locked '0.bias': bool \(1,\), accepted is bool \(6,\)": {"0.bias": torch.ones(1, dtype=torch.bool)},
    r"locked '0.bias': bool \(\), accepted is bool \(6,\)": {"0.bias": torch.tensor(True)},
}


@pytest.mark.parametrize("said", BAD_MASKS)
def test_masks_that_do_not_fit_are_refused(said):
    module = network()
    updates = MuonAdamW(module)
    good = {"2.bias": torch.ones(2, dtype=torch.bool)}
    for lock in (lambda masks: lock_gradients(module, masks), lambda masks: lock_updates(updates, masks)):
        with pytest.raises(ValueError, match=said):
            lock(good | BAD_MASKS[said])
    before = Population(module).values()
    train(module, OPTIMIZERS["sgd"](module.parameters()))
    assert (before != Population(module).values()).all()  # nothing was locked by what was refused
    assert not updates.locked()


def test_putting_back_looks_at_no_value(monkeypatch):
    """On a card, a mask as an index would wait for it."""
    module = network()
    population, mask = some(module)
    optimizer = OPTIMIZERS["sgd"](module.parameters())
    lock_gradients(module, by_parameter(population, mask))
    before, indexed = population.values(), []
    monkeypatch.setattr(torch.Tensor, "__setitem__", lambda *_: indexed.append("set"))
    monkeypatch.setattr(torch.Tensor, "__getitem__", lambda *_: indexed.append("get"))
    optimizer.step()
    for p in module.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()
    monkeypatch.undo()
    assert not indexed
    assert torch.equal(before[mask], population.values()[mask]) and (before != population.values())[~mask].all()


def test_frozen_parameters_can_be_locked():
    module = network()
    module[0].weight.requires_grad_(False)
    population, mask = some(module)
    unlock = lock_gradients(module, by_parameter(population, mask))
    before = population.values()
    train(module, OPTIMIZERS["sgd"]([p for p in module.parameters() if p.requires_grad]))
    assert torch.equal(before[mask], population.values()[mask])
    unlock()


# ── MuonAdamW ────────────────────────────────────────────────────────────────────────────────────────────────────────


def language_model():
    model = make_random_model(**SMALL)
    generator = torch.Generator().manual_seed(0)
    return model, torch.randint(256, (4, 24), dtype=torch.uint8, generator=generator)


@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
def test_locked_weights_do_not_move_under_muonadamw(optimizer):
    model, x = language_model()
    population, mask = some(model)
    with torch.no_grad():
        for p in model.parameters():
            p.view(-1)[::2] *= -0.0  # half of all weights are zeros of either sign
    updates = MuonAdamW(model, optimizer=optimizer, lr=0.02, weight_decay=0.3)
    step = TrainingStep(model, updates)
    step.run(x)
    step.run(x)
    before = population.values()
    unlock = lock_updates(updates, by_parameter(population, mask))
    for _ in range(3):
        step.run(x)
    after = population.values()
    assert torch.equal(bits(before)[mask], bits(after)[mask])
    moved = by_parameter(population, before != after)
    free = by_parameter(population, ~mask)
    assert all(moved[name][free[name]].any() for name in moved if free[name].any())
    unlock()
    step.run(x)
    assert not torch.equal(population.values()[mask], after[mask]) and not updates.locked()


def test_weight_decay_alone_does_not_move_what_is_locked():
    model, _ = language_model()
    population, mask = some(model)
    updates = MuonAdamW(model, lr=0.1, weight_decay=0.5)
    lock_updates(updates, by_parameter(population, mask))
    before = population.values()
    updates.zero_grad()
    updates.step()
    decayed = before != population.values()
    assert not decayed[mask].any() and decayed[~mask].sum() > 100


def test_gradients_without_a_number_do_not_reach_what_is_locked():
    model, _ = language_model()
    population, mask = some(model)
    updates = MuonAdamW(model, lr=0.1)
    lock_updates(updates, by_parameter(population, mask))
    before = population.values()
    updates.grads.fill_(torch.nan)
    updates.step()  # neither clipped nor checked
    assert torch.equal(bits(before)[mask], bits(population.values())[mask])
    assert population.values()[~mask].isnan().all()


def test_locks_of_two_tasks_hold_together_under_muonadamw():
    model, x = language_model()
    population, first = some(model, 1)
    _, second = some(model, 2)
    updates = MuonAdamW(model, lr=0.02)
    step = TrainingStep(model, updates)
    one = lock_updates(updates, by_parameter(population, first))
    start = population.values()
    step.run(x)
    middle = population.values()
    lock_updates(updates, by_parameter(population, second))
    step.run(x)
    end = population.values()
    assert torch.equal(start[first], end[first]) and torch.equal(middle[second], end[second])
    assert (start != middle)[second & ~first].any() and (middle != end)[~first & ~second].any()
    one()
    step.run(x)
    assert torch.equal(end[second], population.values()[second])
    assert (end != population.values())[first & ~second].any()


GROWTH = {
    "petals": lambda model: model.add_petals(0, 2),
    "blocks": lambda model: model.grow(0),
    "thawed blocks": lambda model: (model.grow(0), model.thaw(0)),
    "wider": lambda model: model.widen(32),
}


@pytest.mark.parametrize("growth", GROWTH)
def test_locks_stay_where_they_are_when_the_model_grows(growth):
    """The buffers are laid out anew, names change and some parameters freeze: locks are of parameters."""
    model, x = language_model()
    updates = MuonAdamW(model, lr=0.02, weight_decay=0.3)
    population, mask = some(model)
    parts = by_parameter(population, mask)
    locked = [(p, parts[name]) for name, p in model.named_parameters()]
    unlock = lock_updates(updates, parts)
    TrainingStep(model, updates).run(x)
    before = [p.detach().clone() for p, _ in locked]
    GROWTH[growth](model)
    updates.rebuild(model)
    for _ in range(2):
        TrainingStep(model, updates).run(x)
    moved = torch.zeros((), dtype=torch.int64)
    for (p, each), then in zip(locked, before):
        assert torch.equal(bits(p)[each], bits(then)[each])
        moved += (p != then)[~each].sum()
    assert moved > 100
    unlock()
    TrainingStep(model, updates).run(x)
    assert sum(int((p != then)[each].sum()) for (p, each), then in zip(locked, before)) > 100


def test_a_lock_outlives_freezing_and_thawing():
    model, x = language_model()
    updates = MuonAdamW(model, lr=0.02)
    weight = model.head.initial.weight
    mask = torch.rand(weight.shape, generator=torch.Generator().manual_seed(0)) < 0.5
    lock_updates(updates, {"head.initial.weight": mask})
    before = weight.detach().clone()
    for frozen in (True, False):
        weight.requires_grad_(not frozen)
        updates.rebuild(model)
        assert updates.locked().keys() == {"head.initial.weight"}
        TrainingStep(model, updates).run(x)
        assert torch.equal(before[mask], weight[mask]) and torch.equal(before, weight) == frozen
    torch.testing.assert_close(updates.state_tensors()["optimizer.locked.head.initial.weight"], mask)


def test_a_rebuild_of_equal_size_moves_no_lock():
    """What was locked is frozen, and something as large thaws: the buffer is as long as before."""
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[1].requires_grad_(False)
    updates = MuonAdamW(model, lr=0.1)
    lock_updates(updates, {"0.weight": torch.ones(4, 4, dtype=torch.bool)})
    model[0].requires_grad_(False)
    model[1].requires_grad_(True)
    updates.rebuild(model)
    before = model[1].weight.detach().clone()
    updates.grads.fill_(1.0)
    updates.step()
    assert (model[1].weight != before).all()


@pytest.mark.parametrize("modifier", [lambda updates: updates.add_(1.0), lambda updates: updates.fill_(torch.inf)])
def test_no_modifier_moves_what_is_locked(modifier):
    """Whenever it came: locks are applied last."""
    model, x = language_model()
    population, mask = some(model)
    updates = MuonAdamW(model, lr=0.02)
    lock_updates(updates, by_parameter(population, mask))
    updates.modifiers.append(modifier)
    before = population.values()
    TrainingStep(model, updates).run(x)
    after = population.values()
    assert torch.equal(bits(before)[mask], bits(after)[mask]) and (before != after)[~mask].float().mean() > 0.9


def test_locks_hold_under_genesis_and_its_rebuild_removes_nothing_of_others():
    model, x = language_model()
    updates = MuonAdamW(model, lr=0.02, weight_decay=0.3)
    other = []
    updates.modifiers.append(other.append)
    options = GenesisOptions(amplifier="rate", persistence=0.5)
    genesis = Genesis(model, updates, options, batch_size=4, entry=24, stages=2, steps=10)
    population, mask = some(model)
    lock_updates(updates, by_parameter(population, mask))
    assert len(updates.modifiers) == 3
    step = TrainingStep(model, updates, genesis=genesis)
    step.run(x)
    genesis.enter_stage(1)  # now there is a reference to be pulled to
    before = population.values()
    step.run(x)
    step.run(x)
    after = population.values()
    assert torch.equal(bits(before)[mask], bits(after)[mask]) and (before != after)[~mask].float().mean() > 0.5
    names = dict(model.named_parameters())
    parts = by_parameter(population, mask)
    held = [(names[name], each, names[name].detach().clone()) for name, each in parts.items()]
    model.add_petals(0, 1)
    updates.rebuild(model)
    genesis.rebuild()
    assert len(updates.modifiers) == 3
    seen = len(other)
    step.run(x)
    assert len(other) == seen + 1
    assert all(torch.equal(bits(p)[each], bits(then)[each]) for p, each, then in held)


def test_locks_are_in_the_optimizers_state():
    model, x = language_model()
    population, mask = some(model)
    updates = MuonAdamW(model, lr=0.02)
    lock_updates(updates, by_parameter(population, mask))
    TrainingStep(model, updates).run(x)
    state = {name: tensor.clone() for name, tensor in updates.state_tensors().items()}
    resumed = MuonAdamW(model, lr=0.02)
    resumed.load_state_tensors(state)
    before = population.values()
    TrainingStep(model, resumed).run(x)
    assert torch.equal(bits(before)[mask], bits(population.values())[mask])
    assert (before != population.values())[~mask].float().mean() > 0.5
    assert {name: each.sum() for name, each in resumed.locked().items()} == {
        name: each.sum() for name, each in by_parameter(population, mask).items() if each.any()
    }
    name = next(name for name in state if name.startswith("optimizer.locked."))
    with pytest.raises(ValueError, match=f"locked '{name.removeprefix('optimizer.locked.')}': uint8"):
        MuonAdamW(model).load_state_tensors(state | {name: state[name].byte()})


def test_frozen_parameters_are_no_part_of_it():
    model, x = language_model()
    model.grow(0)  # the left tree is frozen: the optimizer has no view of it
    population, mask = some(model)
    updates = MuonAdamW(model, lr=0.02)
    assert len(updates.views) < len(population.spans)
    lock_updates(updates, by_parameter(population, mask))
    before = population.values()
    TrainingStep(model, updates).run(x)
    assert torch.equal(before[mask], population.values()[mask])


@needs_cuda
def test_locked_weights_do_not_move_in_a_captured_step():
    model, x = language_model()
    model, x = model.cuda(), x.cuda()
    population, mask = some(model)
    mask = mask.cuda()
    updates = MuonAdamW(model, lr=0.02, weight_decay=0.3)
    step = TrainingStep(model, updates, amp_dtype=torch.bfloat16, graph=True)
    unlock = lock_updates(updates, by_parameter(population, mask))
    before = population.values()
    for _ in range(8):
        step.run(x)
    after = population.values()
    assert step._captured is not None
    assert torch.equal(bits(before)[mask], bits(after)[mask]) and (before != after)[~mask].float().mean() > 0.5
    unlock()
    step.recapture()
    for _ in range(8):
        step.run(x)
    assert (population.values() != after)[mask].float().mean() > 0.5
