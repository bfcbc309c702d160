"""Generation that steers away from what the classifier on the model's latents fears, patch by patch.

writer = PatchWriter(GuardedStream(model, HiddenStateGate.load(gate_path(checkpoint), model)), draw, redraw)
writer.write()  # the bytes up to the next patch boundary
"""

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from model.agiformer import AGIFormer
from model.genesis.gate.classifier import HiddenStateGate
from model.inference.stream import ByteStream


class GuardedStream(ByteStream):
    """A ByteStream that carries the gate's risk of what it has read, prompt included: `risk` [B], log-odds.

    The risk is that of the whole patches; an open patch does not count yet. Arguments are those of ByteStream.
    """

    def __init__(
        self,
        model: AGIFormer,
        gate: HiddenStateGate,
        batch_size: int = 1,
        *,
        thinking_steps: int | None = None,
        halt_threshold: float | None = None,
    ):
        self.gate = gate
        self.risk = torch.zeros(batch_size, device=model.start.device)
        super().__init__(model, batch_size, thinking_steps=thinking_steps, halt_threshold=halt_threshold)

    def _advance(self, latents: Tensor) -> Tensor:
        z = super()._advance(latents)
        self.risk = self.gate.update(self.risk, z)[:, -1]
        return z


@dataclass(frozen=True)
class Patch:
    """What a PatchWriter has written: the bytes up to a patch boundary, n of each row."""

    data: Tensor  # [B, n] int64
    logits: Tensor  # [B, n, 256] the model's for each of them, before any constraint
    risk: Tensor  # [B] after them, log-odds
    rejected: Tensor  # [B] bool: no try was under the threshold, and these bytes are those of the least risk
    banned: Tensor  # [B, 256] bool: first bytes of patches that were rejected
    mass: Tensor  # [B] probability that these bytes had, before temperature


class PatchWriter:
    """Draws a stream patch by patch, and draws a patch again when the gate's risk after it is above the threshold.

    The first byte of a rejected patch is not drawn again in its place: a peaked distribution, or a greedy choice, would
    only repeat the patch. Of a row that is still above the threshold after all tries the least risky patch stays, and
    `Patch.rejected` says so: the caller goes on with it (lowering the risk) or ends the row (blocking it).

    Args:
        stream: fed with the prompts; the writer goes on with it, or with branches of it: `writer.stream`.
        draw: logits [B, 256] → bytes [B]; every patch is first drawn by it.
        redraw: the same, for patches drawn again. With a random generator of its own, rows whose patches are all
            accepted say what they would without a gate; with one that is seeded before each `write`, what a row says
            does not depend on how often others are drawn again.
        constraints: what else decides on bytes, such as Utf8Constraint and ByteGate: `mask(logits)` and
            `advance(chosen)`. Their state is copied by copy.copy, to go back to the beginning of a patch.
        tries: how often a patch is drawn again, at most.
    """

    def __init__(
        self,
        stream: GuardedStream,
        draw: Callable[[Tensor], Tensor],
        redraw: Callable[[Tensor], Tensor] | None = None,
        *,
        constraints: Sequence = (),
        tries: int = 4,
    ):
        if isinstance(tries, bool) or not isinstance(tries, int) or tries < 0:
            raise ValueError(f"tries={tries!r}: accepted is an integer ≥ 0")
        self.stream = stream
        self.constraints = list(constraints)
        self._draw, self._redraw, self._tries = draw, redraw or draw, tries

    @torch.no_grad()
    def write(self, watched: Tensor | None = None) -> Patch:
        """Draw the rest of the open patch of every row; a whole one at a boundary.

        Args:
            watched: [B] bool, the rows to judge; the others keep what is drawn first. None judges all.
        """
        beginning = self.stream.clone(), list(map(copy.copy, self.constraints))
        banned = torch.zeros(self.stream.batch_size, 256, dtype=torch.bool, device=self.stream.device)
        written, logits, mass = self._patch(lambda j, logits: self._draw(logits), banned)
        best, least = written, self.stream.risk
        for _ in range(self._tries):
            again = self._too_high(least, watched)
            if not again.any():
                break
            first = written[:, :1]
            banned = banned.scatter(1, first, banned.gather(1, first) | again.unsqueeze(1))
            self._go_back(beginning)
            written, logits, mass = self._patch(
                lambda j, logits, again=again, kept=best: torch.where(again, self._redraw(logits), kept[:, j]), banned
            )
            better = again & (self.stream.risk < least)
            best = torch.where(better.unsqueeze(1), written, best)
            least = torch.where(better, self.stream.risk, least)
        if not torch.equal(written, best):
            self._go_back(beginning)
            _, logits, _ = self._patch(lambda j, logits: best[:, j], banned)
        return Patch(best, logits, least, self._too_high(least, watched), banned, mass)

    def _patch(self, choose: Callable[[int, Tensor], Tensor], banned: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Write the rest of the open patch → its bytes [B, n], their logits, the probability [B] of `banned`.

        `choose` takes the place in the patch, and the logits of what may be drawn there.
        """
        P = self.stream.model.config.patch_size
        written, seen = [], []
        for j in range(P - self.stream.position % P):
            logits = self.stream.logits()
            seen.append(logits)
            for constraint in self.constraints:
                logits = constraint.mask(logits)
            if not j:
                mass = (logits.softmax(-1) * banned).sum(-1)
                left = logits.masked_fill(banned, -torch.inf)
                # Where the constraints allow no other byte, the same one has to do.
                logits = torch.where(left.isfinite().any(-1, keepdim=True), left, logits)
            chosen = choose(j, logits)
            for constraint in self.constraints:
                constraint.advance(chosen)
            self.stream.feed(chosen.unsqueeze(1))
            written.append(chosen)
        return torch.stack(written, 1), torch.stack(seen, 1), mass

    def _go_back(self, beginning: tuple[GuardedStream, list]) -> None:
        stream, constraints = beginning
        self.stream, self.constraints = stream.clone(), list(map(copy.copy, constraints))

    def _too_high(self, risk: Tensor, watched: Tensor | None) -> Tensor:
        too_high = ~(risk <= self.stream.gate.threshold)  # a risk that is no number as well
        return too_high if watched is None else too_high & watched
