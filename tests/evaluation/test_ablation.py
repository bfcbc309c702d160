import copy

import pytest
import torch

from model import AGIFormer, AGIFormerConfig
from model.evaluation.ablation import attention_reach, without_memory
from model.inference.stream import ByteStream
from model.layers.pyramid import leaves
from tests.conftest import TINY, make_random_model

SHAPES = {
    "stack": {},
    "delta": {"memory_rule": "delta"},
    "pyramid": {"growth": ("grow 0", "grow 0", "grow 1")},
    "column": {"growth": ("widen 48", "grow 2")},
    "thinking": {"thinking_reads": True, "growth": ("grow 1",)},
}


@pytest.fixture(params=SHAPES)
def model(request, tiny_model):
    return tiny_model(**SHAPES[request.param])


@pytest.fixture
def x():
    return torch.randint(0, 256, (2, 90), generator=torch.Generator().manual_seed(3))


def silenced_by_hand(model):
    """A copy whose blocks fuse their attention with zeros, and whose head has no memory."""
    model = copy.deepcopy(model)
    model.head.memory = None
    if model.config.thinking_reads:
        model.reasoning.recall.weight.data.zero_()
    for bob in model.bobs():
        for leaf in leaves(bob):
            leaf.fuse = lambda x, attended, recalled, fuse=leaf.fuse: fuse(x, attended, torch.zeros_like(recalled))
    return model


@torch.no_grad()
def test_it_equals_zeroes_by_hand_and_leaves_nothing_behind(model, x):
    before = model(x)
    expected = silenced_by_hand(model)(x)
    assert not torch.allclose(expected, before, atol=1e-2)
    with without_memory(model):
        assert torch.equal(model(x), expected)
        with without_memory(model):
            assert torch.equal(model(x), expected)
        assert torch.equal(model(x), expected)
    assert torch.equal(model(x), before)
    with pytest.raises(KeyError), without_memory(model):
        raise KeyError
    assert torch.equal(model(x), before)
    assert not any(module._forward_hooks for module in model.modules())


@torch.no_grad()
def test_each_of_its_memories_counts(random_model, x):
    """So that the ablation of one kind cannot pass for that of all."""
    logits = [random_model(x), silenced_by_hand(random_model)(x)]
    for part in ("blocks", "head"):
        model = copy.deepcopy(random_model)
        setattr(model, part, getattr(silenced_by_hand(random_model), part))
        logits.append(model(x))
    assert all(not torch.allclose(a, b, atol=1e-3) for i, a in enumerate(logits) for b in logits[:i])


@torch.no_grad()
def test_the_state_goes_on(model, x):
    latents = model.latents(x)
    _, expected = model.trunk(latents)
    with without_memory(model):
        _, state = model.trunk(latents)

    def first(block):
        return first(block.left) if hasattr(block, "left") else block.memory.tensors()

    # The first block reads what it always reads; the others read what is left without the memories before them.
    assert all(torch.equal(a, b) for a, b in zip(first(state.blocks[0]), first(expected.blocks[0])))
    second = list(zip(first(state.blocks[1]), first(expected.blocks[1])))
    assert any(not torch.allclose(a, b, atol=1e-3) and a.any() for a, b in second)


def test_a_stream_reads_without_memory(random_model, x):
    with without_memory(random_model):
        stream = ByteStream(random_model, 2)
        scored = torch.cat([stream.score(x[:, :57]), stream.score(x[:, 57:])], 1)
        torch.testing.assert_close(scored, random_model(x), atol=1e-4, rtol=1e-4)


def test_infinite_numbers_do_not_get_through(random_model):
    model = copy.deepcopy(random_model)
    with torch.no_grad():
        model.blocks[0].memory.qkv.weight.fill_(float("nan"))
        with without_memory(model):
            assert model(torch.zeros(1, 20, dtype=torch.long)).isfinite().all()


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"n_layers": 1, "patch_overlap": 0},
        {"patch_size": 2, "window": 4, "n_layers": 3},
        {"growth": ("grow 0", "grow 1", "grow 1")},
        {"growth": ("widen 48",)},
        {"growth": ("widen 48", "grow 0", "grow 2", "grow 3", "widen 64")},
    ],
)
@torch.no_grad()
def test_no_byte_is_felt_beyond_the_reach_and_one_is_at_it(changes):
    model = make_random_model(**({"window": 3} | changes)).double()
    reach, P = attention_reach(model), model.config.patch_size
    L = (reach // P + 4) * P
    x = torch.randint(0, 256, (1, L), generator=torch.Generator().manual_seed(1)).repeat(L + 1, 1)
    x[torch.arange(L), torch.arange(L)] ^= 85  # row i differs from the last one at byte i

    def furthest() -> int:
        logits = model(x)
        felt = ((logits - logits[-1]).abs().amax(-1) > 1e-13).nonzero()
        return (felt[:, 1] - felt[:, 0]).max().item()

    with without_memory(model):
        assert furthest() == reach
    assert furthest() > reach


def test_the_reach_of_a_preset():
    narrow = {name: value for name, value in TINY.items() if name not in ("n_layers", "window")}
    model = AGIFormer(AGIFormerConfig.preset("small", **narrow))
    assert attention_reach(model) == 6 * 127 * 4 + 9 == 3057  # docs/diagnostics.md names it
