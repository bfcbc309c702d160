"""StaticStream: a stream whose state has fixed shapes at fixed addresses, so that a step can be one CUDA graph."""

import torch
import torch.nn.functional as F
from torch import Tensor

from model.agiformer import TrunkState
from model.inference.stream import ByteStream, without_draws
from model.layers.block import BlockState
from model.layers.byte_memory import ByteMemoryState
from model.layers.memory import MemoryState
from model.layers.pyramid import Node, NodeState


class StaticStream:
    """Goes on from where a ByteStream stands, a byte at a time; its logits are the stream's.

    Every step reads and writes the same tensors, and nothing of it waits for the device: which of its two kinds a step
    is (inside a patch, or the last byte of one) follows from `place`, which the host counts.

    Args:
        stream: that has read at least one whole patch. It is not changed.

    Attributes:
        place: how many bytes of the open patch have been read, 0 … P − 1.

    Raises:
        ValueError: for a stream at its beginning, or with a halting threshold, which has to look at values.
    """

    def __init__(self, stream: ByteStream):
        model, P = stream.model, stream.model.config.patch_size
        if stream.position < P:
            raise ValueError(f"stream at byte {stream.position}: accepted is one that has read a patch of {P} bytes")
        if stream.halt_threshold is not None:
            raise ValueError(f"halt_threshold={stream.halt_threshold!r}: accepted is None")
        self.model, self.batch_size, self.device = model, stream.batch_size, stream.device
        self.thinking_steps = stream.thinking_steps
        self.position = stream.position
        self.place = stream._open.shape[1]
        self._open = F.pad(stream._open, (0, P - self.place))  # [B, P]
        self._tail, self._boundary = stream._tail.clone(), stream._boundary.clone()
        self._latent, self._hidden = stream._latent.clone(), stream._hidden.clone()
        self._conditioned = stream._conditioned.clone()
        memory = stream._recall is not None
        self._recall: ByteMemoryState | None = stream._recall.clone() if memory else None
        self._recalled = stream._recalled.clone() if memory else None
        position = torch.tensor(stream._trunk.position, device=self.device)
        self._trunk = TrunkState([_padded(*pair) for pair in zip(model.bobs(), stream._trunk.blocks)], position)

    @torch.no_grad()
    def logits(self) -> Tensor:
        """Logits of the next byte, [B, 256] float32."""
        logits = self.model.head.logits(self._hidden)
        return logits if self._recalled is None else logits + self._recalled

    @torch.no_grad()
    def read(self, x: Tensor) -> None:
        """Read one byte of every row, x [B] int64."""
        P = self.model.config.patch_size
        self._open[:, self.place].copy_(x)
        if self.place == P - 1:
            self._read_patch()
        else:
            self._hidden.copy_(self.model.head.step(x, self._hidden, self._conditioned))
            self._remember(x.unsqueeze(1))
        self.count()

    def count(self) -> None:
        """What the host knows of a step: a graph that has read a byte leaves that out."""
        self.position += 1
        self.place = (self.place + 1) % self.model.config.patch_size

    def _read_patch(self) -> None:
        """The open patch is whole: open the next."""
        model = self.model
        P, overlap = model.config.patch_size, model.config.patch_overlap
        with without_draws(model):
            z, trunk = model.trunk(model.encoder(self._open, self._tail), self._trunk)
            latent = model.think(z, trunk, steps=self.thinking_steps)[:, -1]
        _hold(self._trunk, trunk)
        self._trunk.position.copy_(trunk.position)
        self._tail.copy_(self._open[:, P - overlap :])
        self._boundary.copy_(self._open[:, P - 1 :])
        self._latent.copy_(latent)
        hidden, conditioned = model.head.begin(latent)
        self._conditioned.copy_(conditioned)
        self._hidden.copy_(model.head.step(self._boundary[:, 0], hidden, conditioned))
        self._remember(self._boundary)

    def _remember(self, previous: Tensor) -> None:
        """As `ByteStream._remember`, of one byte."""
        if self._recall is None:
            return
        recalled, state = self.model.head.memory(self._hidden.unsqueeze(1), previous, self._recall)
        _hold(self._recall, state)
        self._recalled.copy_(recalled[:, -1])


def _hold(held: TrunkState | ByteMemoryState, new: TrunkState | ByteMemoryState) -> None:
    """Take over what is new, where the tensors that are held lie."""
    for old, tensor in zip(held.tensors(), new.tensors()):
        old.copy_(tensor)


def _padded(module, state: BlockState | NodeState) -> BlockState | NodeState:
    """The state of a block of blocks with every window cache at its full size, in tensors of its own."""
    attention = state.attention.padded(module.attention.window)
    if isinstance(module, Node):
        return NodeState(_padded(module.left, state.left), _padded(module.right, state.right), attention)
    return BlockState(attention, MemoryState(state.memory.M.clone(), state.memory.z.clone()))
