"""The whole model: alignment, causality at every byte, any length, its loss, its configuration."""

import copy
import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from model import AGIFormer, AGIFormerConfig
from model.config import HULLS, PRESETS
from tests.conftest import make_random_model

# Shapes whose every parameter has a part: both kinds of petals, and all that grows.
SHAPES = [
    {"hull": "convex"},
    {"hull": "swiglu"},
    {"growth": ("grow 0", "thaw 0", "grow 0", "thaw 0", "petals 1 2", "widen 64", "grow 2")},
]


def random_bytes(B: int, L: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, 256, (B, L), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("rule", ["hebbian", "delta"])
@pytest.mark.parametrize(("patch_size", "overlap"), [(1, 0), (3, 2), (4, 2), (4, 0), (5, 5)])
@torch.no_grad()
def test_causality_at_every_byte(tiny_model, rule, patch_size, overlap):
    """Changing byte t leaves the logits at ≤ t as they are, bit for bit, and changes a later one."""
    model = tiny_model(memory_rule=rule, patch_size=patch_size, patch_overlap=overlap)
    L = 57
    x = random_bytes(1, L)
    logits = model(x)
    for t in range(L):
        # One text at a time: rows of one batch may round differently, the same row of two batches may not.
        variant = x.clone()
        variant[0, t] = (x[0, t] + 1) % 256
        changed = (model(variant) != logits)[0].any(-1)
        assert not changed[: t + 1].any(), t
        if t + 1 < L:
            assert changed[t + 1], t


@torch.no_grad()
def test_any_length_is_exact(tiny_model):
    """A text's logits do not depend on what follows it: every prefix gives the same ones, whatever its length."""
    model = tiny_model()
    x = random_bytes(2, 90)
    whole = model(x)
    for L in (*range(1, 20), 63, 64, 65, 89):
        logits = model(x[:, :L])
        assert logits.shape == (2, L, 256)
        torch.testing.assert_close(logits, whole[:, :L], rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_integer_types_give_the_same(tiny_model):
    x = random_bytes(1, 30)
    expected = tiny_model()(x)
    for dtype in (torch.uint8, torch.int16, torch.int32):
        assert torch.equal(tiny_model()(x.to(dtype)), expected)


@torch.no_grad()
def test_loss_is_the_mean_cross_entropy_of_the_input(tiny_model):
    x = random_bytes(3, 41)
    logits = tiny_model()(x).double()
    expected = -logits.log_softmax(-1).gather(-1, x.unsqueeze(-1)).mean()
    assert tiny_model().loss(x).item() == pytest.approx(expected.item(), rel=1e-5)


@pytest.mark.parametrize("changes", [{}, {"hull": "swiglu"}, {"growth": ("grow 0", "widen 160", "petals 3 2")}])
def test_a_new_model_predicts_uniformly(changes):
    model = AGIFormer(AGIFormerConfig.preset("nano", **changes))
    assert model.loss(random_bytes(1, 50)).item() == pytest.approx(math.log(256), rel=1e-6)


@torch.no_grad()
def test_thinking_steps_per_call(tiny_model):
    x = random_bytes(1, 30)
    model = tiny_model(thinking_steps=3)
    assert torch.equal(model(x), model(x, thinking_steps=3))
    assert not torch.allclose(model(x), model(x, thinking_steps=0))
    with pytest.raises(ValueError, match="thinking_steps=-2"):
        model(x, thinking_steps=-2)


@torch.no_grad()
def test_thinking_that_reads_wants_the_trunks_state():
    model, x = make_random_model(thinking_reads=True).eval(), random_bytes(1, 30)
    z, state = model.trunk(model.latents(x))
    assert torch.equal(model.read_out(model.think(z, state), x), model(x))
    for given, said in ((None, "None"), (state.clone(), "a copy")):
        with pytest.raises(ValueError, match=f"state={said}: accepted with thinking_reads is what the trunk returned"):
            model.think(z, given)
    with pytest.raises(TypeError):
        model.think(z, state, 2)  # a number of steps has its name


@torch.no_grad()
def test_plasticity_reaches_every_memory(tiny_model):
    x = random_bytes(1, 60)
    model = tiny_model(window=2)
    outputs = []
    for alpha in (0.0, 0.5, 1.0):
        model.set_plasticity(alpha)
        outputs.append(model(x))
    model.set_plasticity(model.config.plasticity)
    assert not torch.allclose(outputs[0], outputs[1])
    assert not torch.allclose(outputs[1], outputs[2])
    with pytest.raises(ValueError, match=r"plasticity=1\.5"):
        model.set_plasticity(1.5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("changes", SHAPES)
def test_under_autocast_loss_and_gradients_stay_close(tiny_model, changes, dtype):
    model = tiny_model(**changes)
    x = random_bytes(2, 100)
    expected = model.loss(x)
    with torch.autocast("cpu", dtype):
        loss = model.loss(x)
    loss.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=0.02)
    learning = [p for p in model.parameters() if p.requires_grad]
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in learning)
    model.zero_grad(set_to_none=True)


@pytest.mark.parametrize("changes", SHAPES)
def test_every_parameter_gets_a_gradient(tiny_model, changes):
    model = tiny_model(**changes)
    model.loss(random_bytes(2, 100)).backward()
    silent = {name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()}
    model.zero_grad(set_to_none=True)
    assert silent == {name for name, p in model.named_parameters() if not p.requires_grad}


HULL = [f"blocks.1.hull.groups.0.{name}" for name in ("up", "bias", "down", "log_tau")]
NODE = ("projector.weight", "router.concentration.weight", "mixer.scores", "mixer.amount", "attention.qkv.weight",
        "gate.weight", "left.right.hull.groups.0.down", "right.right.memory.qkv.weight")  # fmt: skip
COLUMN = ("encoder.columns.0.weight", "head.columns.0.weight", "columns.0.start", "columns.0.lateral.0.weight",
          "columns.0.blocks.0.right.gate.weight", "blocks.1.hull.groups.1.up")  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "names"),
    [
        (SHAPES[0], ["start", "blocks.0.memory.gates.bias", "blocks.1.memory.qkv.weight", "encoder.projection.weight"]),
        (SHAPES[0], HULL),
        (SHAPES[1], [HULL[0], HULL[2]]),
        (SHAPES[2], [f"blocks.0.{name}" for name in NODE]),
        (SHAPES[2], COLUMN),
        ({"thinking_reads": True}, ["reasoning.query.weight", "reasoning.recall.weight", "blocks.1.memory.qkv.weight"]),
        ({"thinking_reads": True, "memory_rule": "delta"}, ["reasoning.query.weight", "blocks.1.memory.gates.bias"]),
        ({"recall_rule": "delta"}, [f"head.memory.{name}.weight" for name in ("queries", "keys", "gates", "values")]),
    ],
)
def test_gradients_agree_with_finite_differences(tiny_model, changes, names):
    model = copy.deepcopy(tiny_model(**changes)).double()
    x = random_bytes(1, 40)
    model.loss(x).backward()
    generator = torch.Generator().manual_seed(3)
    for name in names:
        parameter = dict(model.named_parameters())[name]
        direction = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        with torch.no_grad():
            parameter.add_(direction, alpha=1e-7)
            above = model.loss(x)
            parameter.sub_(direction, alpha=2e-7)
            below = model.loss(x)
            parameter.add_(direction, alpha=1e-7)
        expected = (above - below).item() / 2e-7
        assert (parameter.grad * direction).sum().item() == pytest.approx(expected, rel=1e-6, abs=2e-8), name


@pytest.mark.parametrize(
    "x", [torch.zeros(1, 0).long(), torch.zeros(0, 4).long(), torch.zeros(3).long(), torch.zeros(1, 3)]
)
def test_bad_bytes_are_named(tiny_model, x):
    with pytest.raises(ValueError, match="accepted are integer bytes"):
        tiny_model()(x)


def test_values_that_are_no_bytes_are_named(tiny_model):
    for value in (256, -1):
        with pytest.raises(ValueError, match=f"{value}.*: accepted are bytes from 0 to 255"):
            tiny_model()(torch.tensor([[0, value]]))


def parameter_count(name: str, **changes) -> int:
    with torch.device("meta"):
        return AGIFormer(replace(PRESETS[name], **changes)).parameter_count()


@pytest.mark.parametrize("hull", HULLS)
@pytest.mark.parametrize(
    ("name", "millions", "share"), [("nano", 1.25, 0.25), ("small", 31, 0.1), ("base", 100, 0.1), ("large", 350, 0.1)]
)
def test_preset_sizes(name, millions, share, hull):
    assert parameter_count(name, hull=hull) / 1e6 == pytest.approx(millions, rel=share)


@pytest.mark.parametrize("name", PRESETS)
def test_a_models_size_does_not_depend_on_its_petals(name):
    """The kind and the number of petals divide the same weights: within 4%."""
    sizes = [parameter_count(name, hull=hull, petals=petals) for hull in HULLS for petals in (1, 4, 8)]
    assert max(sizes) < 1.04 * min(sizes)


def test_small_has_the_published_shape():
    small = PRESETS["small"]
    shape = (small.d_model, small.n_layers, small.n_heads, small.patch_size, small.window, small.thinking_steps)
    assert shape == (512, 6, 8, 4, 128, 3)


@pytest.mark.parametrize(
    "change",
    [
        {"d_model": 0},
        {"d_model": 30},
        {"d_model": 32.0},
        {"n_layers": True},
        {"window": 0},
        {"patch_size": 0},
        {"patch_overlap": 5},
        {"thinking_steps": -1},
        {"thinking_skip": 4},
        {"thinking_reads": 1},
        {"recall_span": 0},
        {"memory_rule": "oja"},
        {"hull": "concave"},
        {"petals": 0},
        {"ffn_dim": 0},
        {"plasticity": 1.01},
        {"rope_base": "x"},
    ],
)
def test_config_errors_name_field_value_and_what_is_accepted(change):
    (name, value), *_ = change.items()
    with pytest.raises(ValueError, match=f"{name}={value!r}: accepted") as error:
        replace(AGIFormerConfig(), **change)
    assert "\n" not in str(error.value)


def test_settings_from_the_command_line():
    config = AGIFormerConfig().with_settings(["window=64", "memory_rule=delta", "rope_base=500"])
    assert (config.window, config.memory_rule, config.rope_base) == (64, "delta", 500.0)
    assert AGIFormerConfig().with_settings(["thinking_reads=TRUE"]).thinking_reads is True
    assert config.with_settings(["thinking_reads=false"]) == config
    with pytest.raises(ValueError, match="--set thinking_reads=1: thinking_reads accepts true and false"):
        AGIFormerConfig().with_settings(["thinking_reads=1"])
    for setting, message in [("wind=3", "field=value"), ("window", "field=value"), ("window=x", "int values")]:
        with pytest.raises(ValueError, match=message):
            AGIFormerConfig().with_settings([setting])
    with pytest.raises(ValueError, match="preset='tiny': accepted are nano, small, base, large"):
        AGIFormerConfig.preset("tiny")
    with pytest.raises(ValueError, match="config field 'heads'"):
        AGIFormerConfig.from_dict({"heads": 3})
    # Heads that there are no more: a checkpoint that has none of them loads, one that has some does not.
    assert AGIFormerConfig.from_dict({"recall_short_heads": 0}) == AGIFormerConfig()
    with pytest.raises(ValueError, match="config field 'recall_short_heads'"):
        AGIFormerConfig.from_dict({"recall_short_heads": 1})


@torch.no_grad()
def test_long_texts_agree_with_the_stream_in_bits(tiny_model):
    """Cross-check of two independent paths on 5 KB: mean bits from the full forward and from the stream."""
    from model import ByteStream

    x = random_bytes(1, 5001)
    model = tiny_model()
    scored = ByteStream(model, 1).score(x)
    by_stream = F.cross_entropy(scored.flatten(0, 1), x.flatten())
    assert by_stream.item() == pytest.approx(model.loss(x).item(), rel=1e-5)
