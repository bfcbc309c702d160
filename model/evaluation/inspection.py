"""What the layers of a model do on a text: the gate between attention and memory, how long the memories' heads
remember, how full their fast weights are, and the routers, petals and anchors around them.

The text is read as one stream from its beginning, its state carried, in a few pieces; M is looked at after each.
Layers, memories and nodes are named by their paths in the model: `blocks.0.left`, `columns.0.blocks.1.memory`.

Notable: decays, writing strengths and M are taken at the call of the operator (`model.kernels.hebbian`, or
`packed_hebbian` where a layer gives it a projection as it lies), whose arguments are a contract. How a layer arrives at
them is its own affair, and α is among or in them already.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.agiformer import AGIFormer
from model.evaluation.bpc import Text, as_bytes, evaluation_mode
from model.evaluation.distribution import QUANTILES, UnitHistogram
from model.evaluation.layer_report import (
    CLOSED,
    OPEN,
    STATUS_NAMES,
    BlockReport,
    HeadReport,
    InspectionReport,
    LayerReport,
    MemoryPoint,
    MemoryReport,
    NodeReport,
)
from model.evaluation.report import check_count
from model.inference.stream import ByteStream
from model.kernels.packed_hebbian import log_decays
from model.layers import byte_memory, memory
from model.layers.block import HybridBlock
from model.layers.pyramid import Node, learning_leaves

POINTS = 8  # places of the text where M is looked at


def inspect_layers(
    model: AGIFormer,
    data: Text,
    *,
    importance: Tensor | None = None,
    points: int = POINTS,
    max_bytes: int | None = 65536,
) -> InspectionReport:
    """Read a text as one stream and report what the layers do with it. Not for two threads at once.

    Args:
        model: an AGIFormer, grown or not; its training flags come back as they were.
        data: uint8 [n] or bytes, n ≥ 1.
        importance: GENESIS's importance [blocks of the stack, d_model], from a run's training state; None for none.
        points: places in the text, evenly spaced and the last at its end, where M is looked at.
        max_bytes: read at most this many bytes, the first ones. None reads everything.

    Raises:
        ValueError: naming the argument, its value and what is accepted.
    """
    text = as_bytes(data)
    check_count("points", points)
    if max_bytes is not None:
        check_count("max_bytes", max_bytes)
    wanted = (len(model.blocks), model.config.d_model)
    if importance is not None and tuple(importance.shape) != wanted:
        raise ValueError(f"importance has shape {tuple(importance.shape)}: accepted is {wanted}")
    n = len(text) if max_bytes is None else min(len(text), max_bytes)
    stops = sorted({-(-n * (i + 1) // points) for i in range(points)})
    with evaluation_mode(model), _Recorder(model).recording() as recorder:
        stream = ByteStream(model)
        for start, stop in zip([0, *stops], stops):
            stream.feed(torch.from_numpy(text[start:stop].copy()).unsqueeze(0))
            for record in recorder.memories.values():
                record.look(stop)
    gates = {f"{name}.memory": gate for name, gate in recorder.gates.items()}
    blocks = [_block_report(model, i, importance) for i in range(len(model.blocks))]
    return InspectionReport(
        n,
        [_layer_report(name, model.get_submodule(name), gate, model) for name, gate in recorder.gates.items()],
        [_memory_report(name, r, gates.get(name), model.config.patch_size) for name, r in recorder.memories.items()],
        [_node_report(name, record, model) for name, record in recorder.routers.items()],
        blocks if model.anchors is not None or importance is not None else [],
    )


def ranks(M: Tensor) -> tuple[float | None, int | None]:
    """(effective rank, numerical rank) of a matrix [E, F]; (None, None) when it is not finite.

    Effective: exp of the entropy of the singular values divided by their sum (Roy and Vetterli 2007). Numerical: how
    many of them exceed max(E, F) · 2⁻²³ times the largest, what float32 can tell from 0. Both are 0 for a zero matrix.
    """
    if not bool(M.isfinite().all()):
        return None, None
    sizes = torch.linalg.svdvals(M.double().cpu())
    if not sizes[0] > 0:
        return 0.0, 0
    shares = sizes / sizes.sum()
    entropy = -torch.xlogy(shares, shares).sum()
    least = max(M.shape) * torch.finfo(torch.float32).eps * sizes[0]
    return float(entropy.exp()), int((sizes > least).sum())


# ── recording ────────────────────────────────────────────────────────────────────────────────────────────────────────


class _MemoryRecord:
    """What the calls of the operator by one memory showed so far.

    Args:
        step: bytes from one write to the next.
    """

    def __init__(self, step: int):
        self.step = step
        self.log_decays: list[np.ndarray] = []  # [H, positions] each
        self.betas: list[np.ndarray] = []
        self.M: Tensor | None = None  # [H, E, F], the last
        self.finite = True
        self.looked: list[tuple[int, list[float], list[tuple[float | None, int | None]]]] = []
        self.votes = 0.0  # sum of squares over positions, mean over channels
        self.positions = 0

    def take(self, log_decay: Tensor, beta: Tensor | None, out: Tensor, M: Tensor) -> None:
        self.M = M[0]
        self.finite &= bool(out.isfinite().all()) and bool(M.isfinite().all())
        self.log_decays.append(log_decay[0].double().cpu().numpy())
        if beta is not None:
            self.betas.append(beta[0].double().cpu().numpy())

    def take_votes(self, votes: Tensor) -> None:
        self.votes += float(votes.double().square().mean(-1).sum())
        self.positions += votes[..., 0].numel()

    def look(self, stop: int) -> None:
        """Norms and ranks of M by head after `stop` bytes."""
        M = self.M.double().cpu()
        self.looked.append((stop, M.flatten(1).norm(dim=1).tolist(), [ranks(head) for head in M]))


class _RouterRecord:
    """Sums over positions of one router's weights and concentrations."""

    def __init__(self) -> None:
        self.left = UnitHistogram()
        self.positions = 0
        self.weights: Tensor | float = 0.0
        self.concentration: Tensor | float = 0.0

    def take(self, router: nn.Module, x: Tensor, weights: Tensor) -> None:
        concentration = F.softplus(router.concentration(x.to(router.concentration.weight.dtype))) + 0.5
        self.left.add(weights[..., 0])
        self.positions += weights[..., 0].numel()
        self.weights = self.weights + weights.double().flatten(0, -2).sum(0)
        self.concentration = self.concentration + concentration.double().flatten(0, -2).sum(0)


class _Recorder:
    """Records of a model's memories, fusion gates and routers by path, filled by each forward pass of one row."""

    def __init__(self, model: AGIFormer):
        self.model = model
        modules = dict(model.named_modules())
        blocks = [name for name, module in modules.items() if isinstance(module, HybridBlock)]
        self.gates = {name: UnitHistogram() for name in blocks}
        self.memories = {f"{name}.memory": _MemoryRecord(model.config.patch_size) for name in blocks}
        if model.head.memory is not None:
            self.memories["head.memory"] = _MemoryRecord(1)
        self.routers = {name: _RouterRecord() for name, module in modules.items() if isinstance(module, Node)}
        self._running: list[_MemoryRecord] = []

    @contextmanager
    def recording(self) -> Iterator["_Recorder"]:
        """Hooks on the model and a wrapped operator, both undone at the end."""
        with ExitStack() as undo:

            def hook(register: Callable, action: Callable) -> None:
                undo.callback(register(action).remove)

            for name, record in self.memories.items():
                module = self.model.get_submodule(name)
                hook(module.register_forward_pre_hook, lambda *_, record=record: self._running.append(record))
                hook(module.register_forward_hook, lambda *_: self._leave())
            if "head.memory" in self.memories:
                record = self.memories["head.memory"]
                hook(
                    self.model.head.memory.register_forward_hook, lambda _, x, y, record=record: record.take_votes(y[0])
                )
            for name, gate in self.gates.items():
                module = self.model.get_submodule(f"{name}.gate")
                hook(module.register_forward_hook, lambda _, x, y, gate=gate: gate.add(y.sigmoid()))
            for name, record in self.routers.items():
                module = self.model.get_submodule(f"{name}.router")
                hook(module.register_forward_hook, lambda m, x, y, record=record: record.take(m, x[0], y))
            for module in (memory, byte_memory):
                undo.callback(setattr, module, "hebbian", module.hebbian)
                module.hebbian = self._recorded(module.hebbian)
            undo.callback(setattr, memory, "packed_hebbian", memory.packed_hebbian)
            memory.packed_hebbian = self._recorded_packed(memory.packed_hebbian)
            yield self

    def _recorded(self, operator: Callable) -> Callable:
        def recorded(q, k, v, log_decay, *, beta=None, **rest):
            out, state = operator(q, k, v, log_decay, beta=beta, **rest)
            if self._running:
                self._running[-1].take(log_decay, beta, out, state[0])
            return out, state

        return recorded

    def _recorded_packed(self, operator: Callable) -> Callable:
        def recorded(heads, bias, plasticity, n_heads, **rest):
            out, state = operator(heads, bias, plasticity, n_heads, **rest)
            if self._running:
                gates = heads[..., -n_heads:] + bias.to(heads.dtype)
                self._running[-1].take(log_decays(gates, plasticity), None, out, state[0])
            return out, state

        return recorded

    def _leave(self) -> None:
        self._running.pop()  # what a hook returns, if anything, replaces the module's result


# ── reports ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def _layer_report(name: str, block: HybridBlock, gate: UnitHistogram, model: AGIFormer) -> LayerReport:
    groups = block.hull.groups
    status = torch.cat([group.status for group in groups]).tolist()
    return LayerReport(
        name=name,
        frozen=not any(block is leaf for bob in model.bobs() for leaf in learning_leaves(bob)),
        gate_mean=gate.mean,
        gate_quantiles=gate.quantiles(),
        gate_closed=gate.below(CLOSED),
        gate_open=gate.above(OPEN),
        tau=[float(group.log_tau.detach().exp()) for group in groups if hasattr(group, "log_tau")],
        petals={each: status.count(value) for value, each in STATUS_NAMES.items()},
    )


def _memory_report(name: str, record: _MemoryRecord, gate: UnitHistogram | None, patch_size: int) -> MemoryReport:
    log_decay = np.concatenate(record.log_decays, 1)
    beta = np.concatenate(record.betas, 1) if record.betas else None
    _, norms, by_head = record.looked[-1]
    heads = []
    for h, decays in enumerate(log_decay):
        length = float(_length(decays.mean())) * record.step
        heads.append(
            HeadReport(
                length / patch_size,
                length,
                _quantiles(_length(decays) * record.step / patch_size),
                None if beta is None else float(beta[h].mean()),
                None if beta is None else _quantiles(beta[h]),
                norms[h],
                *by_head[h],
            )
        )
    unheard = None if gate is None else gate.above(OPEN)
    return MemoryReport(
        name,
        rule="hebbian" if beta is None else "delta",
        full_rank=min(record.M.shape[-2:]),
        finite=record.finite and (gate is None or bool(np.isfinite(gate.mean))),
        heads=heads,
        points=[
            MemoryPoint(stop, float(np.mean(norms)), *(_mean(values) for values in zip(*by_head)))
            for stop, norms, by_head in record.looked
        ],
        heard=None if unheard is None else 1 - unheard,
        votes=(record.votes / record.positions) ** 0.5 if record.positions else None,
    )


def _length(log_decay: np.ndarray) -> np.ndarray:
    """1 / (1 − λ) in writes: 1 for λ = 0, infinite for λ = 1."""
    with np.errstate(divide="ignore"):
        return 1 / np.abs(np.expm1(log_decay))


def _quantiles(values: np.ndarray) -> tuple[float, ...]:
    # Values that occur, none between two of them: lengths may be infinite.
    return tuple(np.quantile(values, QUANTILES, method="inverted_cdf").tolist())


def _mean(values: tuple[float | None, ...]) -> float | None:
    return None if any(value is None for value in values) else float(np.mean(values))


def _node_report(name: str, record: _RouterRecord, model: AGIFormer) -> NodeReport:
    node = model.get_submodule(name)
    return NodeReport(
        name,
        any(node is each for bob in model.bobs() for each in _frozen_nodes(bob)),
        tuple(node.router.load.tolist()),
        tuple((record.weights / record.positions).tolist()),
        record.left.quantiles(),
        tuple((record.concentration / record.positions).tolist()),
        float(node.router.temperature),
    )


def _frozen_nodes(tree: nn.Module, frozen: bool = False) -> Iterator[Node]:
    """The nodes of a tree that stand in a frozen one."""
    if isinstance(tree, Node):
        if frozen:
            yield tree
        yield from _frozen_nodes(tree.left, frozen or tree.frozen)
        yield from _frozen_nodes(tree.right, frozen)


def _block_report(model: AGIFormer, i: int, importance: Tensor | None) -> BlockReport:
    anchor = None if model.anchors is None else model.anchors[i].double().abs()
    flags = None if importance is None else importance[i].double()
    return BlockReport(
        f"blocks.{i}",
        None if anchor is None else float(anchor.mean()),
        None if anchor is None else float(anchor.max()),
        None if flags is None else float(flags.mean()),
        None if flags is None else float(flags.max()),
        None if flags is None else float((flags > 0).double().mean()),
    )
