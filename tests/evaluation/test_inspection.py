"""The layers' report against the gates' weights, the trunk's own state, matrices of known rank, and the operator."""

import json
import math
import struct
import warnings
from dataclasses import fields, replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from model.evaluation import layer_report
from model.evaluation.inspection import inspect_layers, ranks
from model.evaluation.inspection_plots import plot_inspection
from model.evaluation.layer_report import (
    DORMANT_HEARD,
    DORMANT_LENGTH,
    DORMANT_NORM,
    DORMANT_VOTES,
    SATURATED_HEADS,
    SATURATED_RANK,
    HeadReport,
    MemoryPoint,
    MemoryReport,
    judge_memory,
)
from model.evaluation.reasoning import measure_reasoning
from model.evaluation.report import json_text
from model.kernels import hebbian
from model.layers import byte_memory, memory
from model.layers.block import HybridBlock
from model.layers.hull import CHRYSALIS, CRYOGENIC
from model.layers.pyramid import Node
from tests.conftest import make_random_model

GROWN = {"growth": ("grow 0", "grow 0", "widen 48", "petals 1 2"), "memory_rule": "delta", "anchors": True}
TEXT = ("Işık söndü; gece uzun.\n🙂 " * 9).encode()[:230]  # 57 patches and 2 bytes
TEXT += bytes(range(200, 233))
LEVELS = (0.05, 0.5, 0.95)


@torch.no_grad()
def entered(model, module, text):
    """What enters a module, [positions, D], when the model reads a text whose last patch is not whole."""
    seen = []
    hook = module.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    assert len(text) % model.config.patch_size  # so that a forward pass reads as many patches as a stream
    model(torch.tensor([list(text)]))
    hook.remove()
    return seen[0][0].double()


def quantiles(values):
    """Values that occur, at the levels of the report."""
    return np.quantile(values.detach().double().numpy(), LEVELS, method="inverted_cdf").tolist()


@pytest.fixture(params=["hebbian", "delta"])
def ruled(request, tiny_model):
    return tiny_model(memory_rule=request.param, recall_rule=request.param)


def assert_lengths(head, decay, patches_a_write):
    """λ [positions] of one head, by the formulas of the report, in float64."""
    decay = decay.double().clamp(max=1)
    mean = float(torch.exp(decay.log().mean()))
    assert head.length == pytest.approx(patches_a_write / (1 - mean), rel=1e-3)
    assert head.length_bytes == pytest.approx(4 * head.length)
    assert head.length_quantiles == pytest.approx(quantiles(patches_a_write / (1 - decay)), rel=1e-3)


@torch.no_grad()
def test_decay_and_writing_strength_of_blocks_by_hand(ruled):
    report = inspect_layers(ruled, TEXT)
    assert [m.name for m in report.memories] == ["blocks.0.memory", "blocks.1.memory", "head.memory"]
    for found in report.memories[:2]:
        layer = ruled.get_submodule(found.name)
        H = layer.n_heads
        gates = entered(ruled, layer, TEXT) @ layer.gates.weight.double().T + layer.gates.bias.double()
        assert found.rule == layer.rule and len(found.heads) == H and found.full_rank == 32 // H
        for h, head in enumerate(found.heads):
            assert_lengths(head, 0.99 * gates[:, h].sigmoid(), 1)
            if layer.rule == "hebbian":
                assert head.beta_mean is head.beta_quantiles is None
                continue
            beta = gates[:, H + h].sigmoid()
            assert head.beta_mean == pytest.approx(float(beta.mean()), rel=1e-3)
            assert head.beta_quantiles == pytest.approx(quantiles(beta), rel=1e-3)


@pytest.mark.parametrize("plasticity", [0.0, 0.5, 0.99, 1.0])
def test_lengths_of_gates_that_do_not_listen(plasticity, ruled):
    """With gates' weights at 0 every λ is α · sigmoid(b), whatever else the layer does: 1 / (1 − λ) is known."""
    model = make_random_model(memory_rule=ruled.config.memory_rule, recall_rule=ruled.config.recall_rule)
    model.set_plasticity(plasticity)
    with torch.no_grad():
        gates = model.blocks[0].memory.gates
        gates.weight.zero_()
        gates.bias.zero_()
        gates.bias[0] = 3.0
        gates.bias[1] = 200.0  # sigmoid is 1 in float32
    report = inspect_layers(model, TEXT)
    lengths = [1 / (1 - plasticity / (1 + math.exp(-3))), 1 / (1 - plasticity) if plasticity < 1 else math.inf]
    for head, length in zip(report.memories[0].heads, lengths):
        assert head.length == pytest.approx(length, rel=1e-3)
        assert head.length_quantiles == pytest.approx((length,) * 3, rel=1e-3)
        assert head.length_bytes == pytest.approx(4 * length, rel=1e-3)
        assert head.beta_mean is None or head.beta_mean == pytest.approx(0.5)
    assert json.loads(json_text(report.to_dict()))


def trees(state, tree):
    """The memories' states of a tree, left to right."""
    if isinstance(tree, Node):
        return trees(state.left, tree.left) + trees(state.right, tree.right)
    return [state.memory]


@torch.no_grad()
@pytest.mark.parametrize("changes", [{}, {"memory_rule": "delta"}, GROWN])
def test_M_along_the_text_is_the_trunks_state(tiny_model, changes):
    model = tiny_model(**changes)
    report = inspect_layers(model, TEXT, points=5)
    assert [p.bytes for p in report.memories[0].points] == [53, 106, 158, 211, 263] and report.bytes == len(TEXT)
    for i, point in enumerate(report.memories[0].points):
        read = point.bytes // 4 * 4 + 1  # a whole patch more does not count before its last byte is in
        _, state = model.trunk(model.latents(torch.tensor([list(TEXT[:read])])))
        memories = [memory for s, bob in zip(state.blocks, model.bobs()) for memory in trees(s, bob)]
        assert len(memories) == len(report.layers)
        for found, expected in zip(report.memories, memories):
            M = expected.M[0].double()
            assert found.points[i].norm == pytest.approx(float(M.square().sum((1, 2)).sqrt().mean()), rel=1e-4)
            sizes = torch.linalg.svdvals(M)
            shares = sizes / sizes.sum(1, keepdim=True)
            effective = torch.exp(-(shares * shares.log()).nan_to_num().sum(1))
            assert found.points[i].effective_rank == pytest.approx(float(effective.mean()), rel=1e-3)
            numerical = torch.linalg.matrix_rank(expected.M[0]).double()
            assert found.points[i].numerical_rank == pytest.approx(float(numerical.mean()))
            if i == 4:
                assert [head.norm for head in found.heads] == pytest.approx(M.flatten(1).norm(dim=1).tolist(), rel=1e-4)
                assert [head.effective_rank for head in found.heads] == pytest.approx(effective.tolist(), rel=1e-3)


def test_a_packed_projection_shows_the_same(tiny_model, monkeypatch):
    """On a card the blocks' memories give the operator their projection as it lies."""
    model = tiny_model()
    expected = inspect_layers(model, TEXT, points=3).memories
    calls, operator = [], memory.packed_hebbian
    monkeypatch.setattr(memory, "suits", lambda *_: True)
    monkeypatch.setattr(memory, "packed_hebbian", lambda *args, **rest: calls.append(args) or operator(*args, **rest))
    found = inspect_layers(model, TEXT, points=3).memories
    assert len(calls) >= 6 and memory.packed_hebbian(*calls[0])[0].isfinite().all()  # the hook is gone again
    for one, other in zip(found, expected):
        assert (one.name, one.rule, one.finite) == (other.name, other.rule, other.finite)
        for head, like in zip(one.heads, other.heads):
            assert_near(head, like)
        for point, like in zip(one.points, other.points):
            assert_near(point, like)


def assert_near(one, other):
    """Two records of numbers, tuples of them, and None."""
    for field in fields(one):
        x, y = getattr(one, field.name), getattr(other, field.name)
        assert (x is None and y is None) or x == pytest.approx(y, rel=1e-3)


@torch.no_grad()
def test_the_byte_heads_memory(ruled):
    found = inspect_layers(ruled, TEXT).memories[-1]
    seen = []
    hook = ruled.head.memory.register_forward_hook(lambda module, inputs, output: seen.append((inputs, output)))
    ruled(torch.tensor([list(TEXT)]))
    hook.remove()
    (hidden, *_), (votes, _) = seen[0]
    assert found.name == "head.memory" and found.heard is None and found.full_rank == ruled.config.recall_dim
    # A stream's last state has read one byte more than a forward pass's, which predicts the last and does not write it.
    assert found.votes == pytest.approx(float(votes[:, : len(TEXT)].square().mean().sqrt()), rel=0.02)
    layer, h = ruled.head.memory, F.rms_norm(hidden[0], (ruled.config.head_dim,), eps=1e-6)
    beta = (1.5 * (h @ layer.gates.weight.T + layer.gates.bias).sigmoid() - 0.25).clamp(0, 1)
    for i, head in enumerate(found.heads):
        assert head.length == math.inf  # nothing decays
        if layer.rule == "delta":
            assert head.beta_mean == pytest.approx(float(beta[: len(TEXT), i].mean()), rel=0.02)


def test_a_model_without_a_memory_in_its_head(tiny_model):
    report = inspect_layers(tiny_model(recall_heads=0), TEXT)
    assert [m.name for m in report.memories] == ["blocks.0.memory", "blocks.1.memory"]


@torch.no_grad()
def test_fusion_gates_by_hand(random_model):
    report = inspect_layers(random_model, TEXT)
    for layer in report.layers:
        gate = random_model.get_submodule(layer.name).gate
        values = F.linear(entered(random_model, gate, TEXT), gate.weight.double(), gate.bias.double()).sigmoid()
        assert layer.gate_mean == pytest.approx(float(values.mean()), rel=1e-5)
        assert layer.gate_quantiles == pytest.approx(quantiles(values), abs=6e-4)
        assert layer.gate_closed == pytest.approx(float((values < 0.1).double().mean()), abs=1e-4)
        assert layer.gate_open == pytest.approx(float((values >= 0.9).double().mean()), abs=1e-4)
        assert 0 < layer.gate_closed < 1 and 0 < layer.gate_open < 1


def test_names_statuses_and_temperatures_of_a_grown_model():
    model = make_random_model(**GROWN)
    names = [name for name, module in model.named_modules() if isinstance(module, HybridBlock)]
    for i, name in enumerate(names):
        groups = model.get_submodule(name).hull.groups
        with torch.no_grad():
            groups[0].log_tau.fill_(math.log(0.5 + i))
        groups[0].set_status([0], CRYOGENIC)
        groups[0].set_status([1, 2], CHRYSALIS)
    report = inspect_layers(model, TEXT)
    left = ["blocks.0.left.left", "blocks.0.left.right"]
    fresh = ["blocks.0.right.left", "blocks.0.right.right", "blocks.1", "columns.0.blocks.0", "columns.0.blocks.1"]
    assert [layer.name for layer in report.layers] == names == left + fresh
    assert [layer.name for layer in report.layers if layer.frozen] == left
    assert [m.name for m in report.memories] == [*(f"{name}.memory" for name in names), "head.memory"]
    for i, layer in enumerate(report.layers):
        assert layer.petals == {"fluid": 3 if layer.name == "blocks.1" else 1, "cryogenic": 1, "chrysalis": 2}
        assert layer.tau[0] == pytest.approx(0.5 + i) and len(layer.tau) == (2 if layer.name == "blocks.1" else 1)
    for table in (report.layers_table(), report.heads_table(), report.points_table()):
        assert all(name in table for name in names)
    assert "blocks.0.left.left (frozen)" in report.layers_table()


def test_gated_petals_have_no_temperature(tiny_model):
    report = inspect_layers(tiny_model(hull="swiglu"), TEXT)
    assert report.layers[0].tau == [] and report.layers_table().splitlines()[1].endswith(" -")


@torch.no_grad()
def test_routers(tiny_model):
    model = tiny_model(**GROWN)
    report = inspect_layers(model, TEXT)
    nodes = {name: module for name, module in model.named_modules() if isinstance(module, Node)}
    assert [node.name for node in report.nodes] == list(nodes) == ["blocks.0", "blocks.0.left", "blocks.0.right"]
    assert [node.frozen for node in report.nodes] == [False, True, False]
    for found, node in zip(report.nodes, nodes.values()):
        x = entered(model, node.router, TEXT)
        weights = node.router(x.float()).double()
        assert found.weights == pytest.approx(weights.mean(0).tolist(), rel=1e-5)
        assert found.weight_quantiles == pytest.approx(quantiles(weights[:, 0]), abs=6e-4)
        linear = node.router.concentration
        concentrations = F.softplus(F.linear(x, linear.weight.double(), linear.bias.double())) + 0.5
        assert found.concentration == pytest.approx(concentrations.mean(0).tolist(), rel=1e-5)
        shares = (concentrations / concentrations.sum(1, keepdim=True)).mean(0)
        assert found.weights == pytest.approx(shares.tolist(), rel=1e-4)
        assert found.load == pytest.approx(node.router.load.tolist()) and found.temperature == 1.0
    assert "blocks.0.left (frozen)" in report.nodes_table()


def test_load_and_temperature_are_those_of_training():
    model = make_random_model(growth=("grow 1",))
    model.blocks[1].router.load.copy_(torch.tensor([0.8, 0.2]))
    model.blocks[1].router.temperature.fill_(0.25)
    (node,) = inspect_layers(model, TEXT).nodes
    assert node.load == pytest.approx((0.8, 0.2)) and node.temperature == 0.25


def test_anchors_and_importance(random_model):
    assert inspect_layers(random_model, TEXT).blocks == [] and inspect_layers(random_model, TEXT).blocks_table() == ""
    model = make_random_model(anchors=True)
    model.anchors[0, :4] = torch.tensor([0.1, -0.3, 0.0, 0.2])
    importance = torch.zeros(2, 32)
    importance[1, :8] = 4.0
    first, second = inspect_layers(model, TEXT, importance=importance).blocks
    assert first.name == "blocks.0"
    assert (first.anchor_mean, first.anchor_max) == (pytest.approx(0.6 / 32), pytest.approx(0.3))
    assert (first.importance_mean, first.flagged) == (0, 0) and (second.anchor_mean, second.anchor_max) == (0, 0)
    assert (second.importance_mean, second.importance_max, second.flagged) == (1, 4, 0.25)
    (alone, _) = inspect_layers(random_model, TEXT, importance=importance).blocks
    assert alone.anchor_mean is None and alone.importance_mean == 0
    (anchored, _) = inspect_layers(model, TEXT).blocks
    assert anchored.importance_mean is None and "-" in inspect_layers(model, TEXT).blocks_table()


# ── rank ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


def orthogonal(n, seed):
    return torch.linalg.qr(torch.randn(n, n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64))[0]


@pytest.mark.parametrize(
    "sizes, effective, numerical",
    [
        ([1, 1, 1, 1], 4, 4),
        ([7, 7, 0, 0], 2, 2),
        ([3, 0, 0, 0], 1, 1),
        ([0, 0, 0, 0], 0, 0),
        ([2, 1, 1, 0], 2**1.5, 3),  # shares 1/2, 1/4, 1/4: an entropy of 1.5 bits
        ([1e20, 1e20, 1e20, 1e-20], 3, 3),
        ([1, 1, 1e-6, 1e-8], 2, 3),  # float32 cannot tell the last from 0
    ],
)
def test_ranks_of_known_matrices(sizes, effective, numerical):
    M = orthogonal(4, 0) @ torch.diag(torch.tensor(sizes, dtype=torch.float64)) @ orthogonal(4, 1)
    found = ranks(M if any(sizes) else torch.zeros(4, 4))
    assert found == (pytest.approx(effective, rel=1e-4), numerical)


def test_ranks_of_other_shapes_and_of_nothing_finite():
    assert ranks(torch.ones(3, 7)) == (pytest.approx(1), 1)
    assert ranks(torch.eye(5)[:, :2]) == (pytest.approx(2), 2)
    for bad in (math.nan, math.inf):
        M = torch.eye(3)
        M[0, 1] = bad
        assert ranks(M) == (None, None)


@pytest.mark.parametrize("rule", ["hebbian", "delta"])
@pytest.mark.parametrize("E", [16, 64])
def test_the_saturated_rank_is_that_of_random_writes(rule, E):
    """Random values under random keys, 1 / (1 − λ) = E writes remembered: what the threshold says of itself."""
    source = torch.Generator().manual_seed(E)
    k, v = (torch.randn(1, 16, 6 * E, E, generator=source) for _ in range(2))
    log_decay = torch.full((1, 16, 6 * E), 1 - 1 / E).log()
    if rule == "delta":
        k = F.normalize(k, dim=-1)
        _, (M, _) = hebbian(k, k, v, log_decay, beta=torch.full((1, 16, 6 * E), 0.5))
    else:
        k = F.elu(k) + 1
        _, (M, _) = hebbian(k, k, v, log_decay)
    share = np.mean([ranks(head)[0] for head in M[0]]) / E
    assert share == pytest.approx(SATURATED_RANK[rule], abs=0.02)


# ── verdicts ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def memory_report(
    heard=0.5, votes=None, norms=(1.0, 1.0), lengths=(4.0, 8.0), filled=(0.1, 0.1), finite=True, rule="delta"
):
    """A memory of full rank 100 with so many heads as `lengths`."""
    heads = [
        HeadReport(length, 4 * length, (length,) * 3, 0.5, (0.5,) * 3, 1.0, 100 * share, 100)
        for length, share in zip(lengths, filled)
    ]
    points = [MemoryPoint(100 * i, norm, 50.0, 100.0) for i, norm in enumerate(norms)]
    return MemoryReport("blocks.0.memory", rule, 100, finite, heads, points, heard, votes)


@pytest.mark.parametrize(
    "changes, verdict",
    [
        ({}, "active"),
        ({"heard": DORMANT_HEARD}, "active"),
        ({"heard": DORMANT_HEARD * 0.99}, "dormant"),
        ({"heard": None, "votes": DORMANT_VOTES}, "active"),
        ({"heard": None, "votes": DORMANT_VOTES * 0.99}, "dormant"),
        ({"norms": (DORMANT_NORM, 0.0)}, "active"),
        ({"norms": (DORMANT_NORM * 0.99, 0.0)}, "dormant"),
        ({"lengths": (1.0, DORMANT_LENGTH)}, "active"),
        ({"lengths": (1.0, DORMANT_LENGTH * 0.99)}, "dormant"),
        ({"filled": (SATURATED_RANK["delta"], 0.1)}, "saturated"),
        ({"filled": (SATURATED_RANK["delta"] * 0.99, 0.1)}, "active"),
        ({"filled": (SATURATED_RANK["hebbian"], 0.1), "rule": "hebbian"}, "saturated"),
        ({"filled": (0.9, 0.1, 0.1), "lengths": (4.0, 4.0, 4.0)}, "active"),
        ({"filled": (0.9, 0.9), "heard": 0.0}, "dormant"),
        ({"lengths": (4.0, math.inf)}, "active"),
        ({"finite": False}, "unstable"),
        ({"heard": None, "votes": math.nan}, "unstable"),
        ({"heard": None}, "unstable"),
    ],
)
def test_verdict_thresholds(changes, verdict):
    assert judge_memory(memory_report(**changes))[0] == verdict


def test_the_documented_thresholds():
    assert (DORMANT_HEARD, DORMANT_VOTES, DORMANT_NORM, DORMANT_LENGTH) == (0.01, 0.01, 1e-3, 2.0)
    assert (SATURATED_RANK, SATURATED_HEADS) == ({"hebbian": 0.54, "delta": 0.72}, 0.5)
    assert (layer_report.CLOSED, layer_report.OPEN) == (0.1, 0.9)


def test_a_gate_that_leaves_the_memory_out_makes_it_dormant():
    model = make_random_model()
    with torch.no_grad():
        model.blocks[0].gate.bias.fill_(12)
        model.head.memory.output.weight.zero_()
    verdicts = {name: verdict for name, (verdict, _) in inspect_layers(model, TEXT).verdicts().items()}
    assert verdicts == {"blocks.0.memory": "dormant", "blocks.1.memory": "active", "head.memory": "dormant"}


def test_a_memory_that_writes_nothing_is_dormant():
    model = make_random_model()
    with torch.no_grad():
        for parameter in model.blocks[1].memory.parameters():
            parameter.zero_()
        model.blocks[1].memory.gates.bias.fill_(3)
    found = inspect_layers(model, TEXT).memories[1]
    assert all((point.norm, point.effective_rank, point.numerical_rank) == (0, 0, 0) for point in found.points)
    assert judge_memory(found)[0] == "dormant"
    assert judge_memory(replace(found, points=[MemoryPoint(1, 1.0, 1.0, 1.0)]))[0] == "active"


def test_low_plasticity_makes_all_blocks_memories_dormant():
    model = make_random_model()
    model.set_plasticity(0.1)
    report = inspect_layers(model, TEXT)
    assert {report.verdicts()[f"blocks.{i}.memory"][0] for i in (0, 1)} == {"dormant"}
    assert max(head.length for head in report.memories[0].heads) < 1.12


def test_a_memory_full_of_random_bytes_is_saturated(text):
    model = make_random_model(memory_rule="delta")
    model.set_plasticity(1.0)
    with torch.no_grad():
        model.blocks[0].memory.gates.bias.fill_(5)
    assert inspect_layers(model, text).verdicts()["blocks.0.memory"][0] == "saturated"
    assert inspect_layers(model, b"a" * len(text)).verdicts()["blocks.0.memory"][0] == "active"


@pytest.mark.parametrize("parameter", ["blocks.1.memory.qkv.weight", "blocks.1.gate.weight"])
def test_numbers_that_are_not_finite_are_unstable(parameter):
    model = make_random_model()
    with torch.no_grad():
        model.get_parameter(parameter)[0] = math.nan
    report = inspect_layers(model, TEXT)
    assert [verdict for verdict, _ in report.verdicts().values()] == ["active", "unstable", "unstable"]
    for table in (report.layers_table(), report.heads_table(), report.points_table()):
        assert table


# ── around it ────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("text", [b"a", b"abc", "ğ🙂".encode(), b"\0" * 9])
def test_short_texts(random_model, text):
    report = inspect_layers(random_model, text)
    stops = [point.bytes for point in report.memories[0].points]
    assert stops[-1] == report.bytes == len(text) and stops == sorted(set(stops)) and len(stops) == min(8, len(text))


def test_max_bytes_reads_the_beginning(random_model):
    whole, cut = (inspect_layers(random_model, data, max_bytes=n) for data, n in ((TEXT[:100], None), (TEXT, 100)))
    assert whole == cut and cut.bytes == 100
    assert inspect_layers(random_model, np.frombuffer(TEXT, np.uint8), max_bytes=10**9).bytes == len(TEXT)


def test_longer_than_a_piece_of_the_stream(tiny_model):
    model = tiny_model(memory_rule="delta", recall_heads=1, recall_dim=8)
    text = TEXT * 8
    report = inspect_layers(model, text, points=1)
    assert len(text) > 4 * 256 and [p.bytes for p in report.memories[0].points] == [len(text)]
    with torch.no_grad():
        _, state = model.trunk(model.latents(torch.tensor([list(text + b"a")])))
    assert len(text) % 4 == 0
    M = state.blocks[1].memory.M[0].double()
    assert report.memories[1].points[0].norm == pytest.approx(float(M.flatten(1).norm(dim=1).mean()), rel=1e-3)


def test_the_model_comes_back_as_it_was():
    model = make_random_model(growth=("grow 0",)).train()
    model.blocks[1].eval()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    flags = [module.training for module in model.modules()]
    operators = memory.hebbian, byte_memory.hebbian
    inspect_layers(model, TEXT)
    with pytest.raises(ValueError, match="importance"):
        inspect_layers(model, TEXT, importance=torch.zeros(3, 32))
    broken = make_random_model()
    broken.blocks[1].output = torch.nn.Linear(3, 3)
    with pytest.raises(RuntimeError):
        inspect_layers(broken, TEXT)
    assert (memory.hebbian, byte_memory.hebbian) == operators == (hebbian, hebbian)
    for each in (model, broken):
        assert not any(m._forward_hooks or m._forward_pre_hooks for m in each.modules())
    assert [module.training for module in model.modules()] == flags
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize(
    "arguments, named",
    [
        ({"data": b""}, "data"),
        ({"data": "text"}, "data is str"),
        ({"points": 0}, "points=0"),
        ({"max_bytes": 0}, "max_bytes=0"),
        ({"importance": torch.zeros(2, 31)}, r"importance has shape \(2, 31\): accepted is \(2, 32\)"),
    ],
)
def test_bad_arguments_are_named(random_model, arguments, named):
    with pytest.raises(ValueError, match=named):
        inspect_layers(random_model, **({"data": TEXT} | arguments))


# ── the page of plots ────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("changes, steps", [(GROWN, 4), ({"thinking_steps": 0, "n_layers": 13}, 0)])
def test_a_whole_page_without_warnings(tmp_path, changes, steps):
    model = make_random_model(**changes)
    if not steps:  # of the last layers nothing can be drawn, nor of the bits
        with torch.no_grad():
            model.blocks[-2].memory.gates.weight[0] = math.nan
    results = measure_reasoning(model, TEXT, steps=steps).to_dict()
    results |= {"checkpoint": "runs/$x_1$ 続き.safetensors", "inspection": inspect_layers(model, TEXT).to_dict()}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        path = plot_inspection(json.loads(json_text(results)), tmp_path / "new" / "page.png")
    data = path.read_bytes()
    assert data.startswith(b"\x89PNG\r\n\x1a\n") and data.endswith(b"IEND\xaeB`\x82")
    assert struct.unpack(">II", data[16:24]) == (1920, 2280)
    assert [file.name for file in path.parent.iterdir()] == ["page.png"]


def test_the_page_shows_the_numbers(tmp_path, random_model, monkeypatch):
    """What is drawn, read from the figure's own lines."""
    figures = []
    monkeypatch.setattr("model.evaluation.inspection_plots.write_figure", lambda figure, path: figures.append(figure))
    reasoning, layers = measure_reasoning(random_model, TEXT), inspect_layers(random_model, TEXT)
    results = {**reasoning.to_dict(), "inspection": layers.to_dict()}
    results["inspection"]["memories"][0]["heads"][0]["length"] = math.inf
    results["dynamics"]["z_rms"][-1] = math.inf
    plot_inspection(results, tmp_path / "page.png")
    by_title = {axes.get_title(): axes for axes in figures[0].axes}
    assert len(by_title) == 12
    assert not any(np.isinf(np.asarray(line.get_ydata(), float)).any() for a in by_title.values() for line in a.lines)
    bpc = by_title["bits per byte, decoded after a step"].lines[0]
    assert list(bpc.get_ydata()) == [step.bpc for step in reasoning.steps]
    norms = by_title["Frobenius norm of M"]
    assert [list(line.get_ydata()) for line in norms.lines] == [[p.norm for p in m.points] for m in layers.memories]
    gains = by_title["bits saved by thinking, by kind of byte"]
    assert [bar.get_width() for bar in gains.patches] == [group.gain for group in reasoning.gains.groups]
    (verdicts,) = by_title["verdicts"].texts
    assert verdicts.get_text().splitlines()[0] == f"thinking: {reasoning.verdict}"
