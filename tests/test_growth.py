"""Growth of the whole model: exact to the bit, then trainable; frozen trees; streams; shape in the configuration."""

import copy
import itertools
import json
from dataclasses import replace

import pytest
import torch

from model import AGIFormer, AGIFormerConfig, ByteStream
from model.layers.hull import CHRYSALIS
from model.layers.pyramid import DirichletRouter, Node, depth, leaves
from model.training.growth import GrowthStep, carry_out, half_more, parse_growth
from tests.conftest import TINY, draw_weights

STREAM_TOLERANCE = 1e-4  # as in tests/inference/test_stream.py
# Every kind of growth, and growth of what grew: trees of depth 2 and 1, petals in them, two columns, one of them grown.
MANY = (
    "grow 0", "petals 0 2", "thaw 0", "grow 0", "petals 1 1", "widen 48", "grow 2", "grow 1", "widen 80", "petals 5 1"
)  # fmt: skip


def random_bytes(B: int, L: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, 256, (B, L), generator=torch.Generator().manual_seed(seed))


def train(model: AGIFormer, x: torch.Tensor, steps: int = 5, lr: float = 1e-3) -> AGIFormer:
    """Until every matrix counts: a new model's zero branches take some steps to open one after the other."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr)
    model.train()
    for _ in range(steps):
        loss = model.loss(x)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.zero_grad(set_to_none=True)
    return model


def nowhere_at_its_start(model: AGIFormer) -> AGIFormer:
    for block in model.blocks:
        assert block.output.weight.any(1).all() and block.hull.groups[0].down.flatten(1).any(1).all()
    assert model.head.output.weight.any() and model.reasoning.mlp.down.weight.any()
    return model


@pytest.fixture(scope="module")
def nano() -> dict[str, AGIFormer]:
    """Trained models; copy before growing."""
    models = {}
    for hull in ("convex", "swiglu"):
        torch.manual_seed(0)
        model = train(AGIFormer(AGIFormerConfig.preset("nano", hull=hull)), random_bytes(2, 96, seed=1))
        models[hull] = nowhere_at_its_start(model)
    return models


@pytest.fixture(scope="module")
def small() -> AGIFormer:
    """Drawn: training one this large takes seconds, and what growth must keep is the same."""
    model = AGIFormer(AGIFormerConfig.preset("small")).train()
    draw_weights(model, torch.Generator().manual_seed(1))
    return nowhere_at_its_start(model)


@torch.no_grad()
def logits(model: AGIFormer, x: torch.Tensor, mode: bool = False, autocast: bool = False) -> torch.Tensor:
    """Of a forward in that mode, from one seed, with no trace left in the routers' buffers."""
    training, buffers = model.training, copy.deepcopy(dict(model.named_buffers()))
    torch.manual_seed(7)
    with torch.autocast(x.device.type, torch.bfloat16, enabled=autocast):
        y = model.train(mode)(x)
    model.train(training)
    for name, buffer in model.named_buffers():
        buffer.copy_(buffers[name])
    return y


def all_logits(model: AGIFormer, x: torch.Tensor) -> list[torch.Tensor]:
    """Eval and training mode, float32 and under autocast; and a text of one patch, which is not read."""
    modes = [(mode, half) for mode in (False, True) for half in (False, True)]
    return [logits(model, x, *mode) for mode in modes] + [logits(model, x[:, :3], half, half) for half in (False, True)]


@torch.no_grad()
def greedy(model: AGIFormer, prompt: torch.Tensor, n: int) -> tuple[list[int], torch.Tensor]:
    """(the bytes, the logits of each)."""
    stream = ByteStream(model.eval(), prompt.shape[0]).feed(prompt)
    written, seen = [], []
    for _ in range(n):
        seen.append(stream.logits())
        byte = seen[-1].argmax(-1, keepdim=True)
        stream.feed(byte)
        written.append(byte)
    return torch.cat(written, 1).tolist(), torch.stack(seen, 1)


def same(a: list[torch.Tensor], b: list[torch.Tensor]) -> bool:
    return all(x.dtype == y.dtype and torch.equal(x, y) for x, y in zip(a, b, strict=True))


# ── exact to the bit ─────────────────────────────────────────────────────────────────────────────────────────────────

GROWTHS = {
    "one block": lambda model: model.grow(1),
    "all blocks": lambda model: model.grow(),
    "one hull": lambda model: model.add_petals(2, 3),
    "all hulls": lambda model: model.add_petals(n=2),
    "wider": lambda model: model.widen(160),
    "much wider": lambda model: model.widen(256),
    "two columns": lambda model: (model.widen(160), model.widen(224)),
    "a column's block": lambda model: (model.widen(192), model.grow(4)),
    "a column's hull": lambda model: (model.widen(192), model.add_petals(5, 2)),
    "twice": lambda model: (model.grow(0), model.grow(0)),
    "petals in a tree": lambda model: (model.grow(), model.add_petals(n=4)),
    "thawed": lambda model: (model.grow(), model.thaw()),
    "all kinds": lambda model: (
        model.grow(), model.add_petals(n=2), model.widen(160), model.grow(), model.add_petals(4, 1), model.grow(3)
    ),
}  # fmt: skip


@pytest.mark.parametrize(
    ("growth", "hull"),
    [*((growth, "convex") for growth in GROWTHS), *((growth, "swiglu") for growth in ("all hulls", "all kinds"))],
)
def test_growth_changes_no_bit_of_nano(nano, growth, hull):
    model = copy.deepcopy(nano[hull])
    x = random_bytes(1, 131, seed=2)
    before = all_logits(model, x)
    assert all(y.std() > 0.01 for y in before)
    count = model.parameter_count()
    GROWTHS[growth](model)
    assert model.training  # as it was
    assert same(all_logits(model, x), before)
    assert model.parameter_count() > count


def test_growth_changes_no_bit_where_thinking_reads_memory():
    """What is read stays the memory of the block that was there."""
    model = AGIFormer(AGIFormerConfig.preset("nano", thinking_reads=True)).train()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("reasoning.recall.weight", "blocks.2.output.weight", "head.output.weight")):
                parameter.normal_(std=0.1)
    x = random_bytes(1, 131, seed=2)
    before = all_logits(model, x)
    model.grow(2)
    GROWTHS["all kinds"](model)
    assert same(all_logits(model, x), before)
    with torch.no_grad():
        model.reasoning.recall.weight.zero_()
    assert not same(all_logits(model, x), before)


def test_growth_changes_no_bit_of_small(small):
    model = copy.deepcopy(small)
    x = random_bytes(1, 23, seed=2)
    modes = [(False, False), (True, True)]
    before, (text, seen) = [logits(model, x, *mode) for mode in modes], greedy(model, x[:, :5], 4)
    for grow in (lambda: model.add_petals(n=2), lambda: model.widen(576), lambda: model.grow()):
        grow()
        assert same([logits(model, x, *mode) for mode in modes], before)
    written, logits_of_each = greedy(model, x[:, :5], 4)
    assert written == text and torch.equal(logits_of_each, seen)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("growth", GROWTHS)
def test_growth_changes_no_bit_on_the_card(nano, growth):
    model = copy.deepcopy(nano["convex"]).cuda()
    x = random_bytes(3, 1031, seed=2).cuda()
    before, (text, seen) = all_logits(model, x), greedy(model, x[:, :50], 30)
    GROWTHS[growth](model)
    assert all(p.is_cuda for p in (*model.parameters(), *model.buffers()))
    assert same(all_logits(model, x), before)
    written, logits_of_each = greedy(model, x[:, :50], 30)
    assert written == text and torch.equal(logits_of_each, seen)


@pytest.mark.parametrize("growth", ["all blocks", "all hulls", "two columns", "all kinds"])
def test_growth_changes_no_byte_of_a_stream(nano, growth):
    model = copy.deepcopy(nano["convex"])
    prompt = random_bytes(2, 13, seed=3)
    text, seen = greedy(model, prompt, 30)
    GROWTHS[growth](model)
    written, logits_of_each = greedy(model, prompt, 30)
    assert written == text and torch.equal(logits_of_each, seen)


def test_growing_what_grew_and_learned(nano):
    """Grow, train, grow again, each kind: no bit, while everything that grew before is at work."""
    model = copy.deepcopy(nano["convex"])
    x = random_bytes(1, 50, seed=4)
    model.grow()
    model.widen(160)
    train(model, random_bytes(2, 40, seed=5), lr=3e-3)
    for node in (model.blocks[0], model.blocks[2]):
        assert node.gate.weight.any(1).all() and node.right.output.weight.any(1).all()
    assert model.head.columns[0].weight.any()
    for grow in (lambda: model.add_petals(n=3), lambda: model.add_petals(4, 1), lambda: model.widen(224)):
        before = [logits(model, x, mode) for mode in (False, True)]
        assert not torch.equal(*before)  # the routers draw samples in training
        grow()
        assert same([logits(model, x, mode) for mode in (False, True)], before)
    # A tree that becomes a left child is in eval mode from then on: its routers stop drawing.
    before, streamed = all_logits(model, x), greedy(model, x[:, :9], 10)
    model.grow()
    after = all_logits(model, x)
    assert same([after[i] for i in (0, 1, 4)], [before[i] for i in (0, 1, 4)])
    assert same(after[2:4], before[:2])
    written, logits_of_each = greedy(model, x[:, :9], 10)
    assert written == streamed[0] and torch.equal(logits_of_each, streamed[1])
    assert [depth(bob) for bob in model.bobs()] == [2] * 3 + [1] * 6


@torch.no_grad()
def test_frozen_trees_keep_their_plasticity(nano):
    """α at the time of growth; right after it nothing else has a say, so α changes no logit until the trees thaw."""
    model = copy.deepcopy(nano["convex"])
    x = random_bytes(1, 80)
    model.set_plasticity(0.2)
    before = all_logits(model, x)
    model.grow()
    for alpha in (0.0, 1.0, 0.7):
        model.set_plasticity(alpha)
        assert torch.equal(logits(model, x), before[0])
    model.grow(1)  # a second time under another one
    assert same(all_logits(model, x), before)
    assert [
        node.plasticity.item() for node in (model.blocks[0], model.blocks[1], model.blocks[1].left)
    ] == pytest.approx([0.2, 0.7, 0.2])
    model.thaw()
    assert not torch.equal(logits(model, x), before[0])
    model.set_plasticity(0.2)
    assert torch.equal(logits(model, x), before[0])


def test_growth_is_exact_with_petals_asleep(nano):
    model = copy.deepcopy(nano["convex"])
    x = random_bytes(2, 60)
    for block in model.blocks:
        block.hull.groups[0].set_status([1, 2], CHRYSALIS)
    before = all_logits(model, x)
    model.grow()
    model.add_petals(n=1)
    assert same(all_logits(model, x), before)
    assert model.blocks[0].left.hull.groups[0].status.tolist() == [0, 2, 2, 0]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
@torch.no_grad()
def test_grown_models_of_other_types_run(dtype):
    model = AGIFormer(AGIFormerConfig(**TINY)).to(dtype)
    x = random_bytes(2, 40)
    before = logits(model, x)
    model.grow()
    model.widen(48)
    model.add_petals(n=1)
    assert torch.equal(logits(model, x), before) and torch.equal(logits(model, x, True), before)


def test_growth_keeps_type_and_mode(nano):
    for mode in (True, False):
        model = copy.deepcopy(nano["convex"]).double().train(mode)
        before = model(random_bytes(1, 30)) if not mode else None
        model.grow(0)
        model.add_petals(0, 2)
        model.widen(160)
        assert all(p.dtype == torch.float64 for p in model.parameters())
        frozen = set(model.blocks[0].left.modules())
        assert all(module.training == mode for module in model.modules() if module not in frozen)
        if not mode:
            assert torch.equal(model(random_bytes(1, 30)), before)


# ── what grew, and what is frozen ────────────────────────────────────────────────────────────────────────────────────


def test_a_tree_doubles():
    model = AGIFormer(AGIFormerConfig(**TINY))
    first = model.blocks[1]
    for k in range(4):
        assert depth(model.blocks[1]) == k
        blocks = list(leaves(model.blocks[1]))
        assert len(blocks) == 2**k and blocks[0] is first and len(set(map(id, blocks))) == 2**k
        before = model.blocks[1]
        model.grow(1)
        assert model.blocks[1].left is before and depth(model.blocks[1].right) == k
    assert depth(model.blocks[0]) == 0
    assert model.config.growth == ("grow 1",) * 4


def test_parameters_are_linear_in_leaves():
    """Everything outside the trees, and for each tree 2^k leaves and 2^k − 1 nodes, k from 0 to 3."""
    counts = [AGIFormer(AGIFormerConfig(**(TINY | {"n_layers": n}))).parameter_count() for n in (1, 2)]
    leaf = counts[1] - counts[0]
    outside = counts[0] - leaf
    D, H = TINY["d_model"], TINY["n_heads"]
    node = D * D + (2 * D + 2) + (H * H + 1) + 2 * D * 3 * D + 2 * D * D  # projector, router, mixer, attention, gate
    model = AGIFormer(AGIFormerConfig(**TINY))
    for k in range(4):
        assert model.parameter_count() == outside + 2 * (2**k * leaf + (2**k - 1) * node)
        model.grow()


def test_frozen_trees_take_no_gradient_and_do_not_move(nano):
    model = copy.deepcopy(nano["convex"])
    model.grow()
    frozen = {name for name, _ in model.named_parameters() if ".left." in name}
    for mode in (True, False, True):
        model.train(mode)
        for bob in model.blocks:
            assert not any(module.training for module in bob.left.modules())
            assert bob.right.training == bob.training == mode
    assert frozen and all(p.requires_grad == (name not in frozen) for name, p in model.named_parameters())
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    train(model, random_bytes(2, 60, seed=6), steps=4)
    for name, p in model.named_parameters():
        if not name.endswith("mixer.amount"):  # it may well stay 0
            assert torch.equal(p, before[name]) == (name in frozen), name


def test_thawed_trees_learn_again(nano):
    model = copy.deepcopy(nano["convex"])
    model.grow()
    model.grow(1)
    model.thaw(1)
    assert all(p.requires_grad for p in model.blocks[1].parameters())
    assert all(module.training for module in model.blocks[1].modules())
    assert not any(p.requires_grad for p in model.blocks[0].left.parameters())
    model.loss(random_bytes(2, 60)).backward()
    oldest = next(leaves(model.blocks[1]))
    assert all(p.grad is not None and p.grad.any() for p in oldest.parameters())
    model.thaw()
    assert all(p.requires_grad for p in model.parameters())
    assert model.config.growth[-3:] == ("thaw 0", "thaw 1", "thaw 2")


def test_gradients_reach_the_gate_at_once_and_then_all_that_is_new(nano):
    """Step 1 opens the gates; step 2 the new branches' own outputs, which begin at zero too; step 3 is everything."""
    model = copy.deepcopy(nano["convex"])
    old = set(map(id, model.parameters()))
    model.grow()
    model.add_petals(n=2)
    model.widen(160)
    new = {name: p for name, p in model.named_parameters() if id(p) not in old}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 1e-3)
    x = random_bytes(2, 96, seed=1)
    moving = []
    for _ in range(4):
        optimizer.zero_grad()
        model.loss(x).backward()
        moving.append({name for name, p in new.items() if p.grad is not None and p.grad.any()})
        optimizer.step()
    # At once: through the gates, the head's reading of the column, and where the mixers' loss lies inside [0, 1].
    at_once = {name for name in moving[0] if not name.endswith("mixer.amount")}
    assert at_once == {f"blocks.{i}.gate.weight" for i in range(3)} | {"head.columns.0.weight"}
    second = ("projector.weight", "router.concentration.weight", "router.concentration.bias", "attention.qkv.weight")
    for i in range(3):
        assert {f"blocks.{i}.{name}" for name in second} <= moving[1]
        assert {f"blocks.{i}.right.{name}" for name in ("output.weight", "hull.groups.0.down")} <= moving[1]
    assert {"encoder.columns.0.weight", "columns.0.start", "columns.0.lateral.0.weight"} <= moving[1]
    # A mixer stays the identity as long as the loss wants it so; its scores count once it is not.
    assert all(".mixer." in name for name in set(new) - moving[2])


def test_a_grown_model_trains(nano):
    """Several forward passes before a backward pass too: the routers' temperature falls in between."""
    model = copy.deepcopy(nano["convex"])
    model.grow()
    x = random_bytes(2, 48, seed=8)
    before = model.loss(x).item()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 3e-3)
    for _ in range(8):
        optimizer.zero_grad()
        (model.loss(x) + model.loss(x)).backward()
        optimizer.step()
    assert model.loss(x).item() < before - 0.5
    routers = [m for m in model.modules() if isinstance(m, DirichletRouter)]
    assert len(routers) == 3 and all(0.9 < r.temperature.item() < 0.93 for r in routers)  # 0.995 ^ 17 = 0.918


# ── a grown model is a model ─────────────────────────────────────────────────────────────────────────────────────────


def test_the_rich_growth_is_rich(tiny_model):
    model = tiny_model(growth=MANY)
    assert [depth(bob) for bob in model.bobs()] == [2, 1, 1, 0, 0, 0]
    assert model.width == 80 and [column.width for column in model.columns] == [16, 32]
    assert sum(isinstance(module, Node) for module in model.modules()) == 3 + 1 + 1


@pytest.mark.parametrize(
    ("growth", "rule", "hull"),  # every pair of them
    [
        (MANY, "hebbian", "convex"), (MANY, "delta", "swiglu"),
        (("grow 0", "grow 1"), "hebbian", "swiglu"), (("grow 0", "grow 1"), "delta", "convex"),
        (("widen 64",), "hebbian", "convex"), (("widen 64",), "delta", "swiglu"),
    ],
)  # fmt: skip
@torch.no_grad()
def test_streams_of_grown_models_equal_the_full_forward(tiny_model, growth, rule, hull):
    model = tiny_model(growth=growth, memory_rule=rule, hull=hull)
    x = random_bytes(2, 130, seed=9)
    expected = model(x)
    assert expected.std() > 0.3
    assert (expected - tiny_model(memory_rule=rule, hull=hull)(x)).abs().max() > 0.3  # what grew counts
    stream, found = ByteStream(model, 2), []
    for byte in x[:, :50].split(1, 1):
        found.append(stream.logits().unsqueeze(1))
        stream.feed(byte)
    branch = stream.clone()
    for n in (1, 0, 6, 4, 69):
        found.append(stream.score(x[:, stream.position : stream.position + n]))
    torch.testing.assert_close(torch.cat(found, 1), expected, atol=STREAM_TOLERANCE, rtol=0)
    torch.testing.assert_close(branch.score(x[:, 50:]), expected[:, 50:], atol=STREAM_TOLERANCE, rtol=0)
    size = branch.state_bytes()
    assert branch.feed(random_bytes(2, 2000, seed=10)).state_bytes() == size


@pytest.mark.parametrize("growth", [("grow 0",), ("widen 48",), MANY])
@torch.no_grad()
def test_grown_models_are_causal(tiny_model, growth):
    """Changing byte t leaves the logits at ≤ t as they are, bit for bit, and changes the next."""
    model = tiny_model(growth=growth)
    x = random_bytes(1, 33)
    before = model(x)
    for t in range(33):
        variant = x.clone()
        variant[0, t] = (x[0, t] + 1) % 256
        changed = (model(variant) != before)[0].any(-1)
        assert not changed[: t + 1].any(), t
        if t + 1 < 33:
            assert changed[t + 1], t


@torch.no_grad()
def test_any_length_of_a_grown_model_is_exact(tiny_model):
    model = tiny_model(growth=MANY)
    x = random_bytes(2, 90)
    whole = model(x)
    for L in (1, 2, 4, 5, 33, 64, 65):
        torch.testing.assert_close(model(x[:, :L]), whole[:, :L], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "grow", [lambda m: m.grow(0), lambda m: m.add_petals(0, 1), lambda m: m.widen(48), lambda m: (m.grow(0), m.thaw(0))]
)
def test_a_stream_from_before_growth_is_refused(grow):
    model = AGIFormer(AGIFormerConfig(**TINY)).eval()
    stream = ByteStream(model).feed(random_bytes(1, 10))
    branch = stream.clone()
    grow(model)
    for old in (stream, branch):
        with pytest.raises(ValueError, match="model has grown since it began; accepted is a new stream") as error:
            old.feed(random_bytes(1, 4))
        assert "\n" not in str(error.value)
    assert ByteStream(model).feed(random_bytes(1, 14)).clone().logits().shape == (1, 256)


# ── the shape is in the configuration ────────────────────────────────────────────────────────────────────────────────


def test_the_configuration_makes_the_same_model():
    torch.manual_seed(0)
    model = AGIFormer(AGIFormerConfig(**TINY))
    model.grow(0)
    model.add_petals(0, 2)
    model.thaw(0)
    model.grow(0)
    model.add_petals(1)
    model.widen(48)
    model.grow(2)
    model.grow(1)
    model.widen(80)
    model.add_petals(5)
    assert model.config.growth == MANY
    train(model, random_bytes(2, 40))
    model.blocks[1].left.hull.groups[1].set_status([0], CHRYSALIS)
    values = json.loads(json.dumps(model.config.to_dict()))
    config = AGIFormerConfig.from_dict(values)
    assert config == model.config and hash(config) == hash(model.config)
    with torch.device("meta"):
        twin = AGIFormer(config)
    twin = twin.to_empty(device="cpu")
    twin.load_state_dict(model.state_dict())
    shapes = [[(name, p.shape, p.requires_grad) for name, p in each.named_parameters()] for each in (model, twin)]
    assert shapes[0] == shapes[1]
    assert twin.blocks[1].left.hull.groups[1].status.tolist() == [2]
    x = random_bytes(1, 70)
    for mode in (False, True):
        assert torch.equal(logits(twin, x, mode), logits(model, x, mode))
    # And it grows on.
    model.grow(3), twin.grow(3)
    assert twin.config == model.config


def test_an_ungrown_configuration_is_what_it_was():
    config = AGIFormerConfig(**TINY)
    assert config.growth == () and AGIFormerConfig.from_dict(config.to_dict()) == config
    old = config.to_dict()
    del old["growth"]  # a file from before there was growth
    assert AGIFormerConfig.from_dict(old) == config


@pytest.mark.parametrize(
    "change",
    ["grow", "grow x", "grow -1", "grow 1.0", "grow 0 1", "petals 0", "petals 0 0", "petals 0 -2", "widen", "widen 0",
     "widen -8", "shrink 0", "", " grow 0", "grow 0\n", 3, None],
)  # fmt: skip
def test_bad_entries_are_named(change):
    with pytest.raises(ValueError, match=r"growth .*: accepted are grow BOB, thaw BOB, petals BOB N, widen D_MODEL"):
        AGIFormerConfig(**TINY, growth=("grow 0", change))


@pytest.mark.parametrize(
    ("growth", "message"),
    [
        (("grow 2",), "growth 'grow 2': accepted are BoBs from 0 to 1"),
        (("thaw 7",), "growth 'thaw 7': accepted are BoBs from 0 to 1"),
        (("petals 2 1",), "growth 'petals 2 1': accepted are BoBs from 0 to 1"),
        (("widen 48", "grow 4"), "growth 'grow 4': accepted are BoBs from 0 to 3"),
        (("widen 40",), "d_model=40: accepted is a multiple of 16 greater than 32"),
        (("widen 32",), "d_model=32: accepted is a multiple of 16 greater than 32"),
        (("widen 48", "widen 16"), "d_model=16: accepted is a multiple of 16 greater than 48"),
    ],
)
def test_entries_that_do_not_fit_are_named(growth, message):
    with pytest.raises(ValueError, match=message):
        AGIFormer(AGIFormerConfig(**TINY, growth=growth))


def test_bad_calls_are_named_and_change_nothing():
    model = AGIFormer(AGIFormerConfig(**TINY))
    names = list(model.state_dict())
    for bob in (-1, 2, True, 1.0, "0"):
        for call in (model.grow, model.thaw, lambda bob: model.add_petals(bob, 1)):
            with pytest.raises(ValueError, match=r"bob=.*: accepted is an index from 0 to 1, or None for all"):
                call(bob)
    for n in (0, -1, True, 1.5, None):
        with pytest.raises(ValueError, match=r"n=.*: accepted is an integer ≥ 1"):
            model.add_petals(0, n)
    for d_model in (32, 31, 40, 0, -16, 48.0, True, "48", None):
        with pytest.raises(ValueError, match=r"d_model=.*: accepted is a multiple of 16 greater than 32"):
            model.widen(d_model)
    assert list(model.state_dict()) == names and model.config.growth == ()
    with pytest.raises(ValueError, match="field=value"):
        model.config.with_settings(["growth=grow 0"])
    assert replace(model.config, growth=["grow 0"]).growth == ("grow 0",)


# ── growth as a plan ─────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("text", "plan"),
    [
        ("off", []),
        ("auto", []),
        ("100", [GrowthStep(100, "blocks")]),
        ("0", [GrowthStep(0, "blocks")]),
        ("200,100", [GrowthStep(100, "blocks"), GrowthStep(200, "blocks")]),
        ("100:blocks, 200:petals", [GrowthStep(100, "blocks"), GrowthStep(200, "petals")]),
        ("5:thaw,5:1+0", [GrowthStep(5, "thaw"), GrowthStep(5, "blocks", (1, 0))]),
        ("7:3", [GrowthStep(7, "blocks", (3,))]),
        ("7:widen=192", [GrowthStep(7, "widen", d_model=192)]),
        ("7:petals=3", [GrowthStep(7, "petals", petals=3)]),
    ],
)  # fmt: skip
def test_plans(text, plan):
    assert parse_growth(text) == tuple(plan)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "x",
        "-3",
        "5:",
        "5:all",
        "5:widen",
        "5:widen=",
        "5:0+",
        "5:+1",
        "5,,6",
        "5,",
        "off,5",
        "5:petals=",
        "5:petals=0",
        "1.5",
    ],
)
def test_bad_plans_are_named(text):
    with pytest.raises(ValueError, match=r"grow=.*: .* is not accepted; accepted is off, auto, or STEP") as error:
        parse_growth(text)
    assert "\n" not in str(error.value)


def test_plans_are_carried_out():
    model = AGIFormer(AGIFormerConfig(**TINY))
    entries = [carry_out(model, step) for step in parse_growth("1:1,2:petals,3:widen=48,4:thaw")]
    assert entries == [["grow 1"], ["petals 0 2", "petals 1 2"], ["widen 48"], ["thaw 0", "thaw 1", "thaw 2", "thaw 3"]]
    assert carry_out(model, GrowthStep(8, "petals", (1,), 3)) == ["petals 1 3"]
    assert carry_out(model, GrowthStep(9, "blocks", (0,)), thawed=True) == ["grow 0", "thaw 0"]
    assert model.config.growth == (*itertools.chain(*entries), "petals 1 3", "grow 0", "thaw 0")
    # ⌈half⌉ of the leaf that has most: 4 + 2 and a fresh 4; 4 + 3 and 4 + 2 + 3; 4.
    assert [half_more(model, bob) for bob in (0, 1, 2)] == [3, 5, 2]
