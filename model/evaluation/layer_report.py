"""The report on a model's layers and memories: its tables, and verdicts on the memories by the thresholds below."""

import math
from dataclasses import asdict, dataclass
from typing import Any

from model.evaluation.distribution import QUANTILES
from model.evaluation.report import number, text_table
from model.layers.hull import CHRYSALIS, CRYOGENIC, FLUID

CLOSED, OPEN = 0.1, 0.9  # γ from OPEN on leaves the memory less than a tenth

DORMANT_HEARD = 0.01  # a block's memory has a tenth or more at fewer positions and channels than this: dormant
DORMANT_VOTES = 0.01  # what the byte head's memory adds to the logits is smaller: dormant
DORMANT_NORM = 1e-3  # no M was ever larger on the mean over heads: dormant
DORMANT_LENGTH = 2.0  # patches: no head remembers longer: dormant
# Effective rank of M as a share of its full rank, when random values stand under random keys and as many writes are
# remembered, 1/(1 − λ), as a key is wide. Measured; the same for widths from 16 to 128.
SATURATED_RANK = {"hebbian": 0.54, "delta": 0.72}
SATURATED_HEADS = 0.5  # of the heads, whose effective rank is at least that: saturated

STATUS_NAMES = {FLUID: "fluid", CRYOGENIC: "cryogenic", CHRYSALIS: "chrysalis"}


@dataclass(frozen=True)
class HeadReport:
    """One head of a memory.

    Attributes:
        length: effective memory length 1 / (1 − λ) in patches, of the geometric mean of λ over positions; α is in λ.
        length_bytes: the same in bytes.
        length_quantiles: at 5, 50 and 95% of the positions, in patches: how far the input moves it.
        beta_mean, beta_quantiles: of the delta rule's writing strength over positions; None for the Hebbian rule.
        norm, effective_rank, numerical_rank: of M at the end of the text; ranks are None where M is not finite.
    """

    length: float
    length_bytes: float
    length_quantiles: tuple[float, ...]
    beta_mean: float | None
    beta_quantiles: tuple[float, ...] | None
    norm: float
    effective_rank: float | None
    numerical_rank: int | None


@dataclass(frozen=True)
class MemoryPoint:
    """M after so many `bytes` of the text, means over heads: norm (Frobenius), and the ranks, None where not finite."""

    bytes: int
    norm: float
    effective_rank: float | None
    numerical_rank: float | None


@dataclass(frozen=True)
class MemoryReport:
    """The fast weights of one block, or of the byte head.

    Attributes:
        name: the module's path in the model.
        rule: how it writes, "hebbian" or "delta".
        full_rank: the largest rank that M can have.
        finite: whether M, what was read from it, and the block's gate were finite throughout.
        heads: one by one.
        points: M along the text.
        heard: the share of positions and channels where the block's gate leaves it a tenth or more; None in the head.
        votes: root mean square of what it adds to the logits; None in a block.
    """

    name: str
    rule: str
    full_rank: int
    finite: bool
    heads: list[HeadReport]
    points: list[MemoryPoint]
    heard: float | None
    votes: float | None


@dataclass(frozen=True)
class LayerReport:
    """One HybridBlock but for its memory.

    Attributes:
        name: its path in the model.
        frozen: whether it is in a frozen tree.
        gate_mean, gate_quantiles: of γ over positions and channels; 1 is attention alone. Quantiles to 1/1000.
        gate_closed, gate_open: shares of them with γ < 0.1, and with γ ≥ 0.9.
        tau: the temperature of each petal group's hulls; empty for petals without.
        petals: their numbers by status.
    """

    name: str
    frozen: bool
    gate_mean: float
    gate_quantiles: tuple[float, ...] | None
    gate_closed: float | None
    gate_open: float | None
    tau: list[float]
    petals: dict[str, int]


@dataclass(frozen=True)
class NodeReport:
    """An inner node of a pyramid; pairs are left child, right child.

    Attributes:
        load: the running mean of the router's weights in training.
        weights, weight_quantiles: mean on this text; quantiles of the left child's weight.
        concentration: mean of the Dirichlet concentrations on this text, before the temperature.
        temperature: of the router's sample in training.
    """

    name: str
    frozen: bool
    load: tuple[float, ...]
    weights: tuple[float, ...]
    weight_quantiles: tuple[float, ...] | None
    concentration: tuple[float, ...]
    temperature: float


@dataclass(frozen=True)
class BlockReport:
    """What GENESIS knows of the units after a block of the stack: mean and largest |anchor|, mean and largest
    importance, and the share of units that were ever flagged. None for what the checkpoint lacks."""

    name: str
    anchor_mean: float | None
    anchor_max: float | None
    importance_mean: float | None
    importance_max: float | None
    flagged: float | None


@dataclass(frozen=True)
class InspectionReport:
    """All layers, memories, nodes and blocks, on the first `bytes` bytes of a text."""

    bytes: int
    layers: list[LayerReport]
    memories: list[MemoryReport]
    nodes: list[NodeReport]
    blocks: list[BlockReport]

    def verdicts(self) -> dict[str, tuple[str, str]]:
        """(verdict, reason in one line) of every memory, by its name."""
        return {memory.name: judge_memory(memory) for memory in self.memories}

    def layers_table(self) -> str:
        """Gate, petals and temperatures, one line a layer."""
        header = ["layer", "γ", *_LEVELS, f"<{CLOSED} %", f"≥{OPEN} %", *STATUS_NAMES.values(), "τ"]
        rows = [
            [
                _marked(layer),
                *_cells(layer.gate_mean, *(layer.gate_quantiles or _NONE)),
                *(_percent(share) for share in (layer.gate_closed, layer.gate_open)),
                *(str(layer.petals[name]) for name in STATUS_NAMES.values()),
                " ".join(number(tau) for tau in layer.tau) or "-",
            ]
            for layer in self.layers
        ]
        return text_table(header, rows)

    def heads_table(self) -> str:
        """Memory length, writing strength and fill, one line a head."""
        header = ["memory and head", "patches", *_LEVELS, "bytes", "β", *_LEVELS, "norm M", "eff. rank", "rank", "of"]
        rows = [
            [
                f"{memory.name} {i}",
                *_cells(head.length, *head.length_quantiles, head.length_bytes, digits=1),
                *_cells(head.beta_mean, *(head.beta_quantiles or _NONE)),
                *_cells(head.norm, head.effective_rank, digits=2),
                number(head.numerical_rank, 0),
                str(memory.full_rank),
            ]
            for memory in self.memories
            for i, head in enumerate(memory.heads)
        ]
        return text_table(header, rows)

    def points_table(self) -> str:
        """Norm and ranks of M along the text, means over heads; one column a place in it."""
        header = ["memory, after bytes", "", *(str(point.bytes) for point in self.memories[0].points)]
        rows = [
            [memory.name, name, *_cells(*(getattr(point, field) for point in memory.points), digits=2)]
            for memory in self.memories
            for name, field in (("norm M", "norm"), ("eff. rank", "effective_rank"), ("rank", "numerical_rank"))
        ]
        return text_table(header, rows)

    def nodes_table(self) -> str:
        """Routers, one line a node; empty without nodes."""
        header = ["node", "load left", "right", "weight left", "right", *(f"left {level}" for level in _LEVELS)]
        header += ["concentration left", "right", "temperature"]
        rows = [
            [
                _marked(node),
                *_cells(*node.load, *node.weights, *(node.weight_quantiles or _NONE)),
                *_cells(*node.concentration, node.temperature),
            ]
            for node in self.nodes
        ]
        return text_table(header, rows) if rows else ""

    def blocks_table(self) -> str:
        """Anchors and importance, one line a block of the stack; empty without any."""
        header = ["units after", "mean |a|", "largest", "mean importance", "largest", "flagged %"]
        rows = [
            [
                block.name,
                *_cells(block.anchor_mean, block.anchor_max, digits=4),
                *_cells(block.importance_mean, block.importance_max, digits=2),
                _percent(block.flagged),
            ]
            for block in self.blocks
        ]
        return text_table(header, rows) if rows else ""

    def to_dict(self) -> dict[str, Any]:
        """Plain values for a JSON file; every memory with its verdict and the reason for it."""
        data = asdict(self)
        for memory, (verdict, reason) in zip(data["memories"], self.verdicts().values()):
            memory |= {"verdict": verdict, "reason": reason}
        return data


def judge_memory(memory: MemoryReport) -> tuple[str, str]:
    """("dormant", "active", "saturated" or "unstable", reason in one line) of a memory; docs/diagnostics.md."""
    norms = [point.norm for point in memory.points]
    used = memory.heard if memory.votes is None else memory.votes
    if not memory.finite or used is None or not math.isfinite(used):
        return "unstable", "M, or what is made of it, is not finite"
    least = SATURATED_RANK[memory.rule] * memory.full_rank
    full = sum(head.effective_rank >= least for head in memory.heads)
    lengths = [head.length for head in memory.heads]
    end = memory.points[-1]
    measured = (
        (f"heard at {_percent(used)}%" if memory.votes is None else f"adds {used:.3f} to the logits (rms)")
        + f"; heads remember {min(lengths):.1f} to {max(lengths):.1f} patches; M has norm {end.norm:.2f} and effective "
        f"rank {end.effective_rank:.1f} of {memory.full_rank}; {full} of {len(lengths)} heads are full"
    )
    unheard = used < (DORMANT_HEARD if memory.votes is None else DORMANT_VOTES)
    if unheard or max(norms) < DORMANT_NORM or max(lengths) < DORMANT_LENGTH:
        return "dormant", measured
    return ("saturated" if full >= SATURATED_HEADS * len(lengths) else "active"), measured


_LEVELS = [f"{100 * level:g}%" for level in QUANTILES]
_NONE = (None,) * len(QUANTILES)


def _marked(part: LayerReport | NodeReport) -> str:
    return f"{part.name} (frozen)" if part.frozen else part.name


def _cells(*values: float | None, digits: int = 3) -> list[str]:
    return [number(value, digits) for value in values]


def _percent(share: float | None) -> str:
    return number(None if share is None else 100 * share, 1)
