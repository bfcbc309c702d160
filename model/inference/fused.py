"""FusedStream: a StaticStream whose steps are a few Triton kernels, for generation with small batches.

A patch takes 5 kernels a block (4 and one for each of its petal groups), 2 a thinking step, and 4 around them; each of
its other bytes takes one. What a byte memory adds is its own PyTorch step.

Notable: the weights are copied once, in the order in which the kernels read them: all matrices that read one norm are
one matrix, second matrices of hulls are transposed, and the encoder's is multiplied out by byte and place.
"""

import torch
from torch import Tensor

from model.agiformer import AGIFormer, TrunkState
from model.inference.static import StaticStream
from model.inference.stream import ByteStream
from model.kernels import decode
from model.kernels.decode import MOST_PETALS, SQUARED_RELU, SWIGLU, WIDEST_HEAD, WIDEST_WINDOW
from model.layers.attention import AttentionState
from model.layers.block import BlockState, HybridBlock
from model.layers.encoder import ByteLatentEncoder
from model.layers.head import LocalAutoregressiveHead
from model.layers.hull import ConvexPetals, HullLayer
from model.layers.memory import MemoryState
from model.layers.norm import NORM_EPS

ALIGNED = 16  # rows of buffers begin at multiples of it, so that four floats are loaded at once


class FusedWeights:
    """A model's weights as the kernels read them: a copy, to be shared by all FusedStreams of the model.

    What changes in the model afterwards is not seen, until `refresh`; only its plasticity and its byte memory are read
    where they are.

    Args:
        model: see `refusal`.

    Raises:
        ValueError: for a model that the kernels do not know.
    """

    def __init__(self, model: AGIFormer):
        if (reason := refusal(model)) is not None:
            raise ValueError(reason)
        self.model = model
        self.growth = model.config.growth
        self.parts = _pack(model)

    def refresh(self) -> None:
        """Copy the model's weights again, to the same addresses: graphs that were captured go on with them.

        Raises:
            ValueError: where the model has grown since.
        """
        self.check()
        for held, new in zip(self.parts, _pack(self.model)):
            for name, tensor in new.items():
                held[name].copy_(tensor)

    def check(self) -> None:
        """Raises ValueError where the model has grown since."""
        if self.model.config.growth != self.growth:
            raise ValueError("FusedWeights: their model has grown since they were copied; accepted are new ones")


def refusal(model: AGIFormer) -> str | None:
    """Why there can be no FusedStream of the model, in one line; None where there can be one."""
    c, device = model.config, model.start.device
    if not decode.available(device):
        return f"model on {device}: accepted is one on CUDA, with the package triton installed"
    dtypes = sorted({str(parameter.dtype) for parameter in model.parameters()})
    if dtypes != ["torch.float32"]:
        return f"model of {', '.join(dtypes)}: accepted is torch.float32"
    for change in c.growth:
        if change.split()[0] in ("grow", "widen"):
            return f"growth {change!r}: accepted are added petals only"
    for name in ("anchors", "thinking_reads"):
        if getattr(c, name):
            return f"{name}=True: accepted is False"
    widest = max(group.petals for block in model.blocks for group in block.hull.groups)
    limits = (("d_model / n_heads", c.d_model // c.n_heads, WIDEST_HEAD), ("window", c.window, WIDEST_WINDOW))
    for name, value, most in (*limits, ("petals", widest, MOST_PETALS)):
        if value > most:
            return f"{name}={value}: accepted is at most {most}"
    return None


class FusedStream(StaticStream):
    """Goes on from where a ByteStream stands, a byte at a time; its logits are the stream's up to rounding.

    As a StaticStream: every step reads and writes the same tensors, nothing waits for the device, and which kernels a
    step is follows from `place`. So `read` at each place can be captured as a CUDA graph, after it has run once.
    The window caches are rings: position p is at place p mod W of [B, H, W, E].

    Args:
        stream: that has read at least one whole patch, of a model that `accepts` accepts. It is not changed.
        weights: of its model; made when None.

    Raises:
        ValueError: where StaticStream does; for a model that the kernels do not know, or other weights.
    """

    def __init__(self, stream: ByteStream, weights: FusedWeights | None = None):
        if weights is None:
            weights = FusedWeights(stream.model)
        elif weights.model is not stream.model:
            raise ValueError("weights of another model: accepted are those of the stream's")
        weights.check()
        super().__init__(stream)
        self._weights = weights
        model, B, c, device = self.model, self.batch_size, self.model.config, self.device
        P, overlap, C = c.patch_size, c.patch_overlap, c.head_dim
        if self.thinking_steps is None:
            self.thinking_steps = model.reasoning.steps

        # The kernels read float32, whatever autocast or the default type made of the stream's state.
        def zeros(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=torch.float32, device=device)

        def buffer(width: int) -> Tensor:
            return zeros(B, -(-width // ALIGNED) * ALIGNED)[:, :width]

        # The last bytes before the open patch, and the open patch.
        self._known = torch.zeros(B, overlap + P, dtype=torch.long, device=device)
        self._known[:, :overlap] = self._tail
        self._known[:, overlap : overlap + self.place] = self._open[:, : self.place]
        del self._open, self._tail, self._boundary
        half = c.d_model // c.n_heads // 2
        self._phases = zeros(half), zeros(half)
        self._trunk = _rings(stream._trunk, c.window, device)
        *blocks, _ = weights.parts
        self._latent = self._latent.float().contiguous()
        self._heads, self._mixed = buffer(len(blocks[0]["read"])), zeros(B, c.d_model)
        self._units = buffer(max(len(block["up"]) for block in blocks))
        self._thought = buffer(c.reasoning_dim + c.d_model + 1)
        # One state of the GRU for each place: a kernel cannot write over what its other programs still read. The
        # product for the state that the next patch begins with has the last place, whose own is never asked for.
        self._states = zeros(P, B, C)
        self._products = zeros(P, B, 3 * C)
        self._begun = zeros(B, 4 * C)
        with torch.no_grad():
            self._states[self.place] = stream._hidden
            self._products[self.place] = model.head.recurrent(stream._hidden)
            self._begun[:, C:] = stream._conditioned
            self._conditioned = self._begun[:, C:]
            if self._recall is not None:
                self._recalled = self._recalled.float()
            self._logits = stream.logits().to(torch.float32, copy=True)

    @staticmethod
    def accepts(model: AGIFormer) -> bool:
        """Whether there can be a FusedStream of the model: `refusal` says why not."""
        return refusal(model) is None

    def logits(self) -> Tensor:
        """Logits of the next byte, [B, 256] float32: a tensor that the next `read` writes over."""
        return self._logits

    @torch.no_grad()
    def read(self, x: Tensor) -> None:
        """Read one byte of every row, x [B] of any integer type; that they are bytes, nothing looks at."""
        self._weights.check()
        if x.shape != (self.batch_size,) or x.is_floating_point() or x.dtype == torch.bool:
            raise ValueError(
                f"x is {x.dtype} of shape {tuple(x.shape)}: accepted are integer bytes [{self.batch_size}]"
            )
        P, C, place = self.model.config.patch_size, self.model.config.head_dim, self.place
        head = self._weights.parts[-1]
        to = (place + 1) % P
        if to == 0:
            self._read_patch(x)
            hidden, product = self._begun[:, :C], self._products[-1]
        else:
            hidden, product = self._states[place], self._products[place]
        decode.read_byte(
            x, head["bytes"], self._conditioned, product, hidden, head["head"], head["head bias"], NORM_EPS,
            self._states[to], self._logits, self._known[:, place - P], None if to == P - 1 else self._products[to],
        )  # fmt: skip
        if self._recall is not None:
            self._hidden = self._states[to]
            self._remember(x.long().unsqueeze(1))
            self._logits.add_(self._recalled)
        self.count()

    def _read_patch(self, x: Tensor) -> None:
        """The open patch is whole with x [B]: the latent that the next begins with, and what its bytes begin with."""
        model, C, D = self.model, self.model.config.head_dim, self.model.config.d_model
        *blocks, rest = self._weights.parts
        z, trunk = self._latent, self._trunk
        frequencies, P = rest["frequencies"], model.config.patch_size
        decode.encode(x, self._known, rest["encoder"], frequencies, trunk.position, z, self._phases, P)
        for block, weights, state in zip(model.blocks, blocks, trunk.blocks):
            decode.linear(z, weights["read"], self._heads, bias=weights["read bias"], norm=NORM_EPS)
            decode.mix(
                self._heads, self._phases, trunk.position, model.plasticity, state.attention.k, state.attention.v,
                state.memory.M, state.memory.z, self._mixed,
                delta=block.memory.rule == "delta", eps=(NORM_EPS, block.recall_eps),
            )  # fmt: skip
            decode.linear(self._mixed, weights["output"], z, add=True)
            _hull(block.hull, weights, z, self._units[:, : len(weights["up"])])
        R = model.config.reasoning_dim
        for _ in range(self.thinking_steps):
            decode.linear(z, rest["think"], self._thought, bias=rest["think bias"], norm=NORM_EPS)
            units, gates = self._thought[:, :R], self._thought[:, R : R + D + 1]
            decode.linear(units, rest["thought"], z, act=SQUARED_RELU, add=True, gates=gates)
        decode.linear(z, rest["begin"], self._begun, bias=rest["begin bias"], norm=NORM_EPS, tanh=C)
        decode.linear(self._begun[:, :C], rest["head"][256:], self._products[-1], bias=rest["head bias"][256:])


def _hull(hull: HullLayer, weights: dict[str, Tensor], z: Tensor, units: Tensor) -> None:
    """z ← z + hull(norm(z))."""
    if hull.kind is not ConvexPetals:
        decode.linear(z, weights["up"], units, norm=NORM_EPS)
        decode.linear(units, weights["down"], z, act=SWIGLU, add=True)
        return
    decode.linear(z, weights["up"], units, bias=weights["up bias"], norm=NORM_EPS)
    first = 0
    for i in range(len(hull.groups)):
        down = weights[f"down {i}"]
        last = first + down[0].numel()
        decode.hull_down(units[:, first:last], down, weights[f"tau {i}"], z)
        first = last


def _rings(trunk: TrunkState, window: int, device: torch.device) -> TrunkState:
    """The state of a stream with its window caches as rings, in tensors of its own."""
    blocks = []
    for block in trunk.blocks:
        rings, cached = [], block.attention.k.shape[1]
        places = torch.arange(trunk.position - cached, trunk.position, device=device) % window
        for tensor in (block.attention.k, block.attention.v):
            ring = tensor.new_zeros(tensor.shape[0], tensor.shape[2], window, tensor.shape[3], dtype=torch.float32)
            ring[:, :, places] = tensor.transpose(1, 2).float()
            rings.append(ring)
        M, z = (tensor.to(torch.float32, copy=True) for tensor in (block.memory.M, block.memory.z))
        blocks.append(BlockState(AttentionState(*rings), MemoryState(M.contiguous(), z.contiguous())))
    return TrunkState(blocks, torch.tensor(trunk.position, device=device))


@torch.no_grad()
def _pack(model: AGIFormer) -> list[dict[str, Tensor]]:
    """One dictionary for each block, and one for what is around them."""
    head, reasoning = model.head, model.reasoning
    rest = {
        "encoder": _encoder_table(model.encoder),
        "frequencies": model.encoder.rotary._frequencies.to(model.start.device, copy=True),
        "think": torch.cat([reasoning.mlp.up.weight, reasoning.gate.weight, reasoning.halt.weight]),
        "think bias": torch.cat(
            [reasoning.gate.bias.new_zeros(len(reasoning.mlp.up.weight)), reasoning.gate.bias, reasoning.halt.bias]
        ),
        "thought": reasoning.mlp.down.weight.clone(),
        **_pack_head(head),
    }
    return [*(_pack_block(block) for block in model.blocks), rest]


def _pack_block(block: HybridBlock) -> dict[str, Tensor]:
    attention, memory, gate, groups = block.attention, block.memory, block.gate, block.hull.groups
    packed = {
        "read": torch.cat([attention.qkv.weight, memory.qkv.weight, gate.weight, memory.gates.weight]),
        "read bias": torch.cat([gate.bias.new_zeros(6 * len(gate.bias)), gate.bias, memory.gates.bias]),
        "output": block.output.weight.clone(),
    }
    if block.hull.kind is not ConvexPetals:
        # All gates, then all values: one layer of gated units, whatever petals they belong to.
        halves = torch.cat(
            [group.up.unflatten(1, (2, group.width)).transpose(0, 1).flatten(1, 2) for group in groups], 1
        )
        down = torch.cat([group.down.flatten(0, 1) for group in groups])
        return packed | {"up": halves.flatten(0, 1), "down": down.t().contiguous()}
    packed["up"] = torch.cat([group.up.flatten(0, 1) for group in groups])
    packed["up bias"] = torch.cat([group.bias.flatten() for group in groups])
    for i, group in enumerate(groups):
        packed[f"down {i}"] = group.down.permute(2, 0, 1).contiguous()  # [D, n, width]
        packed[f"tau {i}"] = group.log_tau.exp()
    return packed


def _pack_head(head: LocalAutoregressiveHead) -> dict[str, Tensor]:
    return {
        "begin": torch.cat([head.initial.weight, head.condition.weight]),
        "begin bias": torch.cat([head.initial.bias, head.condition.bias]),
        "bytes": head.bytes.weight.clone(),
        "head": torch.cat([head.output.weight, head.recurrent.weight]),
        "head bias": torch.cat([head.output.bias, head.recurrent.bias]),
    }


def _encoder_table(encoder: ByteLatentEncoder) -> Tensor:
    """What each byte adds to a latent at each place that its patch sees: [overlap + P, 256, D]."""
    embedding, places = encoder.embedding.weight.double(), encoder.patch_size + encoder.overlap
    projections = encoder.projection.weight.unflatten(1, (places, -1)).unbind(1)  # [D, byte_dim] each
    return torch.stack([(embedding @ projection.double().t()).float() for projection in projections])
