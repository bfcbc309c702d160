"""ByteStream: the model fed byte by byte, or in pieces, at constant memory."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from model.agiformer import AGIFormer, TrunkState
from model.layers.byte_memory import ByteMemoryState
from model.layers.head import BEGIN

PIECE = 256  # patches taken through the trunk at once while reading a long prompt: bounds the working memory


@contextmanager
def without_draws(model: AGIFormer) -> Iterator[None]:
    """Evaluation mode, if the model is not in it already: in training routers would draw samples."""
    training = model.training
    if training:
        model.eval()
    try:
        yield
    finally:
        if training:
            model.train()


class ByteStream:
    """Batched streaming state of a model; its logits equal the full forward's at every byte.

    The state is the blocks' window caches and fast weights, the last `patch_overlap` bytes of the patch before, the
    open patch, the GRU's hidden state in it, and the byte memory. Its size stops growing once the attention window is
    full.

    Args:
        model: the model, read without gradients, with its plasticity as it is.
        batch_size: B, rows that are fed together.
        thinking_steps, halt_threshold: as in `AGIFormer.forward`.
    """

    def __init__(
        self,
        model: AGIFormer,
        batch_size: int = 1,
        *,
        thinking_steps: int | None = None,
        halt_threshold: float | None = None,
    ):
        if isinstance(batch_size, bool) or not isinstance(batch_size, int) or batch_size < 1:
            raise ValueError(f"batch_size={batch_size!r}: accepted is an integer ≥ 1")
        self.model = model
        self.batch_size = batch_size
        self.thinking_steps = thinking_steps
        self.halt_threshold = halt_threshold
        self.device = model.start.device
        self.position = 0  # bytes read
        self._growth = model.config.growth
        self._trunk: TrunkState | None = None
        self._tail: Tensor | None = None  # [B, overlap] last bytes before the open patch
        self._boundary = torch.full((batch_size, 1), BEGIN, device=self.device)  # the byte before the open patch
        self._open = torch.empty(batch_size, 0, dtype=torch.long, device=self.device)
        self._recall: ByteMemoryState | None = None
        with torch.no_grad():
            self._begin_patch(self._advance(model.start_latents(batch_size))[:, -1])

    @torch.no_grad()
    def feed(self, x: Tensor) -> "ByteStream":
        """Read bytes x [B, n], any integer type, n ≥ 0. Returns the stream itself."""
        self._read(self._check(x), score=False)
        return self

    @torch.no_grad()
    def score(self, x: Tensor) -> Tensor:
        """Read bytes x [B, n] and return the logits that predicted them, [B, n, 256]."""
        return self._read(self._check(x), score=True)

    @torch.no_grad()
    def logits(self) -> Tensor:
        """Logits of the next byte, [B, 256] float32."""
        self._check_model()
        return self._logits()

    def clone(self) -> "ByteStream":
        """An independent copy of the state, sharing the model: a branch of the stream."""
        twin = copy.copy(self)
        twin._trunk = self._trunk.clone()
        # The stream's own tensors are replaced, never written in place: sharing them is safe.
        return twin

    def state_bytes(self) -> int:
        """Size of the state in bytes."""
        tensors = [self._tail, self._boundary, self._open, self._latent, self._hidden, self._conditioned]
        tensors += self._trunk.tensors() + ([] if self._recall is None else [*self._recall.tensors(), self._recalled])
        return sum(t.numel() * t.element_size() for t in tensors if t is not None)

    def _check_model(self) -> None:
        if self.model.config.growth != self._growth:
            raise ValueError("ByteStream: its model has grown since it began; accepted is a new stream, fed again")

    def _check(self, x: Tensor) -> Tensor:
        self._check_model()
        if x.dim() != 2 or x.shape[0] != self.batch_size or x.is_floating_point() or x.dtype == torch.bool:
            raise ValueError(
                f"x is {x.dtype} of shape {tuple(x.shape)}: accepted are integer bytes [{self.batch_size}, n]"
            )
        return x.to(self.device, torch.long)

    def _advance(self, latents: Tensor) -> Tensor:
        """Latents [B, T, D] through trunk and reasoning, carrying the state."""
        with without_draws(self.model):
            return self._read_patches(latents)

    def _read_patches(self, latents: Tensor) -> Tensor:
        z, state = self.model.trunk(latents, self._trunk)
        # The window caches are views of all keys of the piece, and a state that is read knows the writes of this call:
        # a copy lets go of both.
        copied = latents.shape[1] > 1 or self.model.config.thinking_reads
        self._trunk = state.clone() if copied else state
        return self.model.think(z, state, steps=self.thinking_steps, halt_threshold=self.halt_threshold)

    def _begin_patch(self, latent: Tensor) -> None:
        """Open the patch that `latent` [B, D] predicts; `_hidden` always holds what predicts the next byte."""
        self._latent = latent
        hidden, self._conditioned = self.model.head.begin(latent)
        self._hidden = self.model.head.step(self._boundary[:, 0], hidden, self._conditioned)
        self._remember(self._hidden.unsqueeze(1), self._boundary)

    def _remember(self, hidden: Tensor, previous: Tensor) -> Tensor | None:
        """Take the states [B, n, head_dim] that predict the next bytes, and the bytes [B, n] before those, into the
        byte memory → its votes [B, n, 256]. The last of them is part of the next byte's logits."""
        memory = self.model.head.memory
        if memory is None or not hidden.shape[1]:
            return None
        recalled, self._recall = memory(hidden, previous, self._recall)
        self._recalled = recalled[:, -1]
        return recalled

    def _logits(self) -> Tensor:
        logits = self.model.head.logits(self._hidden)
        return logits if self._recall is None else logits + self._recalled

    def _read(self, x: Tensor, score: bool) -> Tensor | None:
        P = self.model.config.patch_size
        pieces = []
        while x.shape[1]:
            room = PIECE * P - self._open.shape[1]
            piece, x = x[:, :room], x[:, room:]
            if self._open.shape[1] + piece.shape[1] < P:
                pieces.append(self._read_inside(piece, score))
            else:
                pieces.append(self._read_across(piece, score))
            self.position += piece.shape[1]
        if score:
            return torch.cat(pieces, 1) if pieces else self._latent.new_zeros(self.batch_size, 0, 256).float()
        return None

    def _read_inside(self, piece: Tensor, score: bool) -> Tensor | None:
        """Bytes that leave the open patch open: only the GRU moves."""
        scored = []
        for byte in piece.unbind(1):
            if score:
                scored.append(self._logits())
            self._hidden = self.model.head.step(byte, self._hidden, self._conditioned)
            self._remember(self._hidden.unsqueeze(1), byte.unsqueeze(1))
        self._open = torch.cat([self._open, piece], 1)
        return torch.stack(scored, 1) if scored else None

    def _read_across(self, piece: Tensor, score: bool) -> Tensor | None:
        """Bytes that complete at least one patch: whole patches go through the trunk together."""
        P, overlap = self.model.config.patch_size, self.model.config.patch_overlap
        known = torch.cat([self._open, piece], 1)
        whole = known.shape[1] // P * P
        z = self._advance(self.model.encoder(known[:, :whole], self._tail))
        head, read = self.model.head, self._open.shape[1]
        scored = None
        if score or head.memory is not None:
            # The state that predicts byte `read` is known: it is of the open patch, whose first bytes come again here.
            latents = torch.cat([self._latent.unsqueeze(1), z[:, :-1]], 1)
            previous = self.model.previous_bytes(known[:, :whole], self._boundary)
            hidden = head.states(latents, previous).flatten(1, 2)[:, read + 1 :]
            first = self._logits().unsqueeze(1) if score else None
            recalled = self._remember(hidden, previous.flatten(1)[:, read + 1 :])
            if score:
                logits = head.logits(hidden)
                scored = [first, logits if recalled is None else logits + recalled]
        self._tail = known[:, whole - overlap : whole]
        self._boundary = known[:, whole - 1 : whole]
        self._open = known[:, :0]
        self._begin_patch(z[:, -1])
        rest = self._read_inside(known[:, whole:], score)
        return torch.cat([*scored, *([] if rest is None else [rest])], 1) if score else None
