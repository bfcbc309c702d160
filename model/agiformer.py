"""AGIFormer: bytes in, logits of the same bytes out; its loss; and the state that carries it along a stream.

    Bytes → ByteLatentEncoder → HybridBlock × n → RecurrentReasoningBlock → LocalAutoregressiveHead → logits
            (patches)           (window attention   (thinking steps)         (GRU over a patch
                                 + fast weights)                              + fast weights over bytes)

Notable: the sequence of latents begins with a learned start latent, so that position i of the trunk has read
exactly the patches before patch i and predicts it. Nothing is padded or shifted inside the trunk.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.config import AGIFormerConfig
from model.kernels.cross_entropy import byte_cross_entropy
from model.layers.block import BlockState, HybridBlock
from model.layers.byte_memory import ByteMemory
from model.layers.encoder import ByteLatentEncoder
from model.layers.head import BEGIN, LocalAutoregressiveHead
from model.layers.norm import rms_norm
from model.layers.pyramid import Node, NodeState, depth, learning_leaves, leaves
from model.layers.reasoning import RecurrentReasoningBlock

# Called with the number of blocks passed and the latents [B, T, width] there; what it returns goes on through the rest.
Visit = Callable[[int, Tensor], Tensor]


@dataclass
class TrunkState:
    """What the blocks carry from patch to patch: one state a block of blocks, and the number of positions read."""

    blocks: list[BlockState | NodeState]
    position: int | Tensor  # a tensor [] int64 where shapes and addresses are fixed (model.inference.static)

    def clone(self) -> "TrunkState":
        return TrunkState([block.clone() for block in self.blocks], self.position)

    def tensors(self) -> list[Tensor]:
        """All tensors of the state."""
        return [tensor for block in self.blocks for tensor in block.tensors()]


class Column(nn.Module):
    """Channels added to the latents by `widen`: a stack of blocks of its own beside the first one (seed 003).

    The old channels never read the new ones, so that they stay what they were; every layer of a column reads those of
    the first stack through a lateral projection (Rusu et al. 2016). Only the byte head joins them.
    """

    def __init__(self, width: int, config: AGIFormerConfig):
        super().__init__()
        self.width = width
        n_heads = width // (config.d_model // config.n_heads)
        self.start = nn.Parameter(torch.empty(width))
        self.lateral = nn.ModuleList(nn.Linear(config.d_model, width, bias=False) for _ in range(config.n_layers))
        self.blocks = nn.ModuleList(HybridBlock(width, n_heads, config) for _ in range(config.n_layers))

    @torch.no_grad()
    def reset(self) -> None:
        """The start latent, as large as the first one."""
        nn.init.normal_(self.start)


class AGIFormer(nn.Module):
    """The byte-level language model. `AGIFormer(AGIFormerConfig.preset("small"))`."""

    def __init__(self, config: AGIFormerConfig):
        super().__init__()
        self.config = config
        D = config.d_model
        self.encoder = ByteLatentEncoder(
            D, config.byte_dim, config.patch_size, config.patch_overlap, D // config.n_heads, config.rope_base
        )
        self.start = nn.Parameter(torch.empty(D))
        self.blocks = nn.ModuleList(HybridBlock(D, config.n_heads, config) for _ in range(config.n_layers))
        self.columns = nn.ModuleList()
        heads = config.n_heads if config.thinking_reads else 0
        self.reasoning = RecurrentReasoningBlock(
            D, config.reasoning_dim, config.thinking_steps, config.thinking_skip, heads
        )
        if config.thinking_reads:
            self.blocks[-1].memory.readable = True  # the oldest leaf of the last block of blocks, whatever grows on it
        self.head = LocalAutoregressiveHead(D, config.head_dim, byte_memory(config))
        self.plasticity: Tensor
        self.register_buffer("plasticity", torch.tensor(float(config.plasticity)))
        # Added to the latents after each block. Not trained: GENESIS's amplifier moves them.
        self.anchors: Tensor | None
        self.register_buffer("anchors", torch.zeros(config.n_layers, D) if config.anchors else None)
        initialise(self)
        for change in config.growth:
            self._change_shape(change)

    @torch.no_grad()
    def reset(self) -> None:
        """The start latent."""
        nn.init.normal_(self.start)

    def set_plasticity(self, alpha: float) -> None:
        """Set α, the multiplier on every memory's decay, in [0, 1]; kept in checkpoints. No synchronisation."""
        if not 0 <= alpha <= 1:
            raise ValueError(f"plasticity={alpha!r}: accepted is a number from 0 to 1")
        self.plasticity.fill_(alpha)

    def forward(
        self,
        x: Tensor,
        *,
        thinking_steps: int | None = None,
        halt_threshold: float | None = None,
        writes: list[Tensor] | None = None,
        halts: list[Tensor] | None = None,
        told: Tensor | None = None,
    ) -> Tensor:
        """Logits aligned with their input: `logits[:, t]` predicts `x[:, t]` from `x[:, :t]`.

        Args:
            x: [B, L] bytes as any integer type, L ≥ 1.
            thinking_steps: K for this call; the configured number when None.
            halt_threshold: see RecurrentReasoningBlock; None in training.
            writes, told: see `read_out`.
            halts: see `think`.

        Returns:
            [B, L, 256] float32.
        """
        self._check_bytes(x)
        z, state = self.trunk(self.latents(x))
        z = self.think(z, state, steps=thinking_steps, halt_threshold=halt_threshold, halts=halts)
        return self.read_out(z, x, writes, told)

    def latents(self, x: Tensor) -> Tensor:
        """What enters the trunk: x [B, L] → [B, ceil(L / P), width]. Position i has read the patches before patch i."""
        P = self.config.patch_size
        T = -(-x.shape[1] // P)  # patches to predict; the last one may be partial and is never read
        latents = self.start_latents(x.shape[0])
        if T > 1:
            # Under autocast the encoder's output, and with it the residual stream, is half precision.
            rest = self.encoder(x[:, : (T - 1) * P])
            latents = torch.cat([latents.to(rest.dtype), rest], 1)
        return latents

    def read_out(self, z: Tensor, x: Tensor, writes: list[Tensor] | None = None, told: Tensor | None = None) -> Tensor:
        """Logits [B, L, 256] of x [B, L] by the latents z [B, ceil(L / P), width] that predict its patches.

        To `writes`, if given, the byte memory's writing strengths [B, H, P · ceil(L / P)] are appended. `told`
        [B, L] bool marks bytes of which its text heads write nothing down: in training, what recall tasks have put in.
        """
        if told is not None:
            told = F.pad(told, (0, -x.shape[1] % self.config.patch_size))
        return self.head(z, self.previous_bytes(x), writes, told).flatten(1, 2)[:, : x.shape[1]]

    def loss(self, x: Tensor, *, thinking_steps: int | None = None) -> Tensor:
        """Mean cross-entropy of x [B, L] in nats per byte, a scalar; BPC is this over ln 2."""
        return byte_cross_entropy(self(x, thinking_steps=thinking_steps), x)

    def start_latents(self, batch_size: int) -> Tensor:
        """What stands before the first patch: [B, 1, D], the channels of added columns included."""
        start = torch.cat([self.start, *(column.start for column in self.columns)]) if self.columns else self.start
        return start.expand(batch_size, 1, -1)

    def trunk(
        self,
        latents: Tensor,
        state: TrunkState | None = None,
        *,
        first: int = 0,
        last: int | None = None,
        visit: Visit | None = None,
    ) -> tuple[Tensor, TrunkState]:
        """Run the blocks over latents [B, T, D] that follow `state` → [B, T, D] and the state after them.

        Args:
            first: number of blocks that the latents have passed already.
            last: number of blocks that they have passed at the end; all when None.
            visit: called before the first block, between blocks and after the last; may change the latents, and add
                rows to the batch.
        """
        offset = 0 if state is None else state.position
        phases = self.encoder.phases(latents.shape[1], offset, latents.device)
        n = len(self.blocks)
        states: list[BlockState | NodeState | None] = [None] * (n * (1 + len(self.columns)))

        def run(block: nn.Module, x: Tensor, index: int) -> Tensor:
            before = None if state is None else state.blocks[index]
            x, states[index] = block(x, phases, self.plasticity, before)
            return x

        if visit is not None:
            latents = visit(first, latents)
        x, *added = self._split(latents)
        for i in range(first, n if last is None else last):
            x = run(self.blocks[i], x, i)
            if self.anchors is not None:
                x = x + self.anchors[i].to(x.dtype)
            for j, column in enumerate(self.columns):
                seen = added[j] + column.lateral[i](rms_norm(x))
                added[j] = run(column.blocks[i], seen, (j + 1) * n + i)
            if visit is not None:
                x, *added = self._split(visit(i + 1, self._join(x, added)))
        return self._join(x, added), TrunkState(states, offset + latents.shape[1])

    def think(
        self,
        z: Tensor,
        state: TrunkState | None = None,
        *,
        steps: int | None = None,
        halt_threshold: float | None = None,
        halts: list[Tensor] | None = None,
    ) -> Tensor:
        """The reasoning block on z [B, T, D]; where thinking reads memory, with the state that came with z.

        It works on the first column's channels. To `halts`, if given, p_halt [B, T, 1] of every step is appended.
        """
        first, *added = self._split(z)
        read = None
        if self.config.thinking_reads:
            last = None if state is None else state.blocks[len(self.blocks) - 1]
            while isinstance(last, NodeState):
                last = last.left
            read = None if last is None else last.memory.read
            if read is None:
                given = "None" if state is None else "a copy"
                raise ValueError(f"state={given}: accepted with thinking_reads is what the trunk returned with z")
        first = self.reasoning(first, steps, halt_threshold, read, halts)
        return torch.cat([first, *added], -1) if added else first

    @staticmethod
    def _join(x: Tensor, added: list[Tensor]) -> Tensor:
        """The columns' latents side by side."""
        return torch.cat([x, *(part.to(x.dtype) for part in added)], -1) if added else x

    def _split(self, z: Tensor) -> list[Tensor]:
        """[B, T, D] by columns. Copies, so that a column's arithmetic is the same with and without neighbours."""
        if not self.columns:
            return [z]
        return [part.contiguous() for part in z.split([self.config.d_model, *(c.width for c in self.columns)], -1)]

    def previous_bytes(self, x: Tensor, before: Tensor | None = None) -> Tensor:
        """The byte before each byte, by patch: x [B, L] → [B, ceil(L/P), P] int64.

        `before` [B, 1] is the byte before x, or None at the start of a text. What fills up a partial last patch only
        reaches logits that the caller cuts off.
        """
        P = self.config.patch_size
        before = torch.full_like(x[:, :1], BEGIN, dtype=torch.long) if before is None else before.long()
        shifted = torch.cat([before, x[:, :-1].long()], 1)
        return F.pad(shifted, (0, -x.shape[1] % P)).unflatten(1, (-1, P))

    # ── growth ───────────────────────────────────────────────────────────────────────────────────────────────────

    def bobs(self) -> list[HybridBlock | Node]:
        """The blocks of blocks, in the order of `grow`'s index: the stack, then those of added columns."""
        return [*self.blocks, *(block for column in self.columns for block in column.blocks)]

    @property
    def width(self) -> int:
        """Channels of a latent: `config.d_model` and those of added columns."""
        return self.config.d_model + sum(column.width for column in self.columns)

    def grow(self, bob: int | None = None) -> None:
        """Double a block of blocks (index in the stack; all when None): depth k becomes k + 1 (DESIGN: Pyramid).

        Today's tree becomes the left child, frozen; a fresh tree of its depth is the right one. Logits do not change in
        the last bit. An optimizer has to be told: see `MuonAdamW.rebuild`.
        """
        for i in self._chosen(bob):
            self._record(f"grow {i}")

    def thaw(self, bob: int | None = None) -> None:
        """Let the frozen left trees of a block of blocks (all when None) learn again."""
        for i in self._chosen(bob):
            self._record(f"thaw {i}")

    def add_petals(self, bob: int | None = None, n: int = 1) -> None:
        """Add n petals to the hull of every leaf that learns in a block of blocks (all when None). Exact, as `grow`."""
        if isinstance(n, bool) or not isinstance(n, int) or n < 1:
            raise ValueError(f"n={n!r}: accepted is an integer ≥ 1")
        for i in self._chosen(bob):
            self._record(f"petals {i} {n}")

    def widen(self, d_model: int) -> None:
        """Give the latents `d_model` channels in all, in place: a new column owns the new ones. Exact, as `grow`.

        The width that is added has to be a multiple of a head's, d_model / n_heads of the first column.
        """
        self._check_width(d_model)
        self._record(f"widen {d_model}")

    def _check_width(self, d_model: int) -> None:
        E = self.config.d_model // self.config.n_heads
        if isinstance(d_model, bool) or not isinstance(d_model, int) or d_model <= self.width or d_model % E:
            raise ValueError(f"d_model={d_model!r}: accepted is a multiple of {E} greater than {self.width}")

    def _chosen(self, bob: int | None) -> range | list[int]:
        count = len(self.bobs())
        if bob is None:
            return range(count)
        if isinstance(bob, bool) or not isinstance(bob, int) or not 0 <= bob < count:
            raise ValueError(f"bob={bob!r}: accepted is an index from 0 to {count - 1}, or None for all")
        return [bob]

    def _record(self, change: str) -> None:
        self._change_shape(change)
        self.config = replace(self.config, growth=(*self.config.growth, change))

    def _change_shape(self, change: str) -> None:
        """Carry out one entry of `config.growth`."""
        kind, *numbers = change.split()
        first, *rest = (int(number) for number in numbers)
        if kind == "widen":
            self._check_width(first)
            self._add_column(first - self.width)
            return
        if first >= len(self.bobs()):
            raise ValueError(f"growth {change!r}: accepted are BoBs from 0 to {len(self.bobs()) - 1}")
        bob = self.bobs()[first]
        if kind == "grow":
            width = next(leaves(bob)).output.out_features
            node = self._node(bob, self._fresh_tree(width, depth(bob)), width)
            column, i = divmod(first, len(self.blocks))
            (self.columns[column - 1].blocks if column else self.blocks)[i] = node
        elif kind == "thaw":
            if isinstance(bob, Node):
                bob.thaw()
        else:
            for leaf in learning_leaves(bob):
                leaf.hull.add_petals(*rest)

    def _fresh_tree(self, width: int, levels: int) -> HybridBlock | Node:
        if levels:
            tree = self._node(self._fresh_tree(width, levels - 1), self._fresh_tree(width, levels - 1), width)
            tree.thaw()
            return tree
        leaf = HybridBlock(width, width * self.config.n_heads // self.config.d_model, self.config)
        initialise(leaf)
        return leaf.to(self.start)

    def _node(self, left: HybridBlock | Node, right: HybridBlock | Node, width: int) -> Node:
        node = Node(left, right, width, width * self.config.n_heads // self.config.d_model, self.config.window)
        for part in (node.projector, node.router, node.mixer, node.attention, node.gate):
            initialise(part)
        node.reset()
        node.plasticity = self.plasticity.clone()
        return node.to(self.start).train(self.training)

    def _add_column(self, width: int) -> None:
        column = Column(width, self.config)
        initialise(column)
        self.columns.append(column.to(self.start).train(self.training))
        self.encoder.add_column(width)
        initialise(self.encoder.columns[-1])
        self.head.add_column(width)
        for columns in (self.encoder.columns, self.head.columns):
            columns.to(self.start).train(self.training)

    @staticmethod
    def _check_bytes(x: Tensor) -> None:
        if x.dim() != 2 or x.numel() < 1 or x.is_floating_point() or x.is_complex() or x.dtype == torch.bool:
            raise ValueError(f"x is {x.dtype} of shape {tuple(x.shape)}: accepted are integer bytes [B, L], both ≥ 1")
        # On a GPU looking at the values would wait for it; there the embedding's own assertion has to do.
        if x.device.type == "cpu" and x.dtype != torch.uint8 and (x.min() < 0 or x.max() > 255):
            raise ValueError(f"x has values from {x.min()} to {x.max()}: accepted are bytes from 0 to 255")

    def parameter_count(self) -> int:
        """Number of values in all parameters, frozen ones included."""
        return sum(parameter.numel() for parameter in self.parameters())


def weighted_mean(values: Tensor, weights: Tensor) -> Tensor:
    """Mean of `values` in which each counts as its weight says; both of one shape. 0 when no weight is above 0."""
    return (values * weights).sum() / weights.sum().clamp_min(torch.finfo(weights.dtype).tiny)


def byte_memory(config: AGIFormerConfig) -> ByteMemory | None:
    """The memory of a model's head, as its config has it."""
    c = config
    if not c.recall_heads + c.recall_text_heads:
        return None
    shape = c.recall_dim, c.recall_key_dim, c.recall_rule, c.recall_span
    return ByteMemory(c.head_dim, c.recall_heads, *shape, c.recall_text_heads)


@torch.no_grad()
def initialise(module: nn.Module) -> None:
    """Unit-variance features, and every residual branch and the output start at zero (docs/results.md says why)."""
    for each in module.modules():
        if isinstance(each, nn.Linear):
            nn.init.normal_(each.weight, std=each.in_features**-0.5)
            if each.bias is not None:
                each.bias.zero_()
        elif isinstance(each, nn.Embedding):
            nn.init.normal_(each.weight)
    for each in module.modules():
        if hasattr(each, "reset"):
            each.reset()
