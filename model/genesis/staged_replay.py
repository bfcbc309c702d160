"""Replay over the stages of a curriculum: each stage keeps its own sample of what it showed, later ones rehearse it.

The stage being trained is written, never drawn: what it shows is being learned anyway, and on a single ring most draws
would be its own. Earlier stages are drawn in equal parts, entries of one stage in proportion to their priority. Each
stage keeps a uniform sample (reservoir) in its equal share of the room; the last one, after which nothing comes, has
none.
"""

import torch
from torch import Tensor, nn

from model.genesis.replay import ReplayRing


class StagedReplay(nn.Module):
    """One `ReplayRing` a stage but the last, behind one draw. Static shapes, no host synchronisation.

    Args:
        stages: S ≥ 1, of the run.
        size: N, entries in all; each of the S − 1 rings has N / (S − 1), at least one.
        hidden_shape: of an entry's latents; (0,) when they are not stored.
        target_shape: of an entry's bytes.
        mixed: instead keep one ring of all stages that is written and drawn from throughout: experience replay as in
            Rolnick et al. 2019, for comparison.
    """

    def __init__(
        self,
        stages: int,
        size: int,
        hidden_shape: tuple[int, ...],
        target_shape: tuple[int, ...],
        *,
        mixed: bool = False,
        device: torch.device | str | None = None,
    ):
        super().__init__()
        self.mixed = mixed
        count = 1 if mixed else stages - 1
        self.rings = nn.ModuleList(
            ReplayRing(max(1, size // count), hidden_shape, target_shape, eviction="reservoir", device=device)
            for _ in range(count)
        )

    def past(self, stage: int) -> int:
        """Number of rings that a stage rehearses from."""
        return len(self.rings) if self.mixed else min(stage, len(self.rings))

    def written_by(self, stage: int) -> ReplayRing | None:
        """The ring that a stage's entries go to, None for the last stage's."""
        if self.mixed:
            return self.rings[0]
        return self.rings[stage] if stage < len(self.rings) else None

    @torch.no_grad()
    def draw(self, n: int, stage: int) -> tuple[Tensor, Tensor]:
        """Which entries to rehearse in a stage, with replacement: numbers of rings [n] and rows in them [n]."""
        past = self.past(stage)
        device = self.rings[0].priority.device
        # Which stage's turn it is goes round from a random start: n draws divide the stages as evenly as they can.
        first = torch.rand((), device=device) * past
        rings = (first.long() + torch.arange(n, device=device)) % past
        rows = torch.stack([ring.draw(n) for ring in self.rings[:past]])
        return rings, rows.gather(0, rings.unsqueeze(0))[0]

    def gather(self, rings: Tensor, rows: Tensor, stage: int) -> tuple[Tensor, Tensor, Tensor]:
        """Entries → latents [n, *hidden_shape] float32, bytes [n, *target_shape], and whether each is one [n] bool."""
        entries = [ring.gather(rows.clamp(max=ring.size)) for ring in self.rings[: self.past(stage)]]
        result = list(entries[0])
        for i, entry in enumerate(entries[1:], 1):
            for j, part in enumerate(entry):
                mine = (rings == i).view(-1, *[1] * (part.dim() - 1))
                result[j] = torch.where(mine, part, result[j])
        return tuple(result)

    @torch.no_grad()
    def reprioritise(self, rings: Tensor, rows: Tensor, values: Tensor, stage: int) -> None:
        """Set the priorities [n] of entries; values that are not finite change nothing."""
        for i, ring in enumerate(self.rings[: self.past(stage)]):
            ring.reprioritise(rows.clamp(max=ring.size), torch.where(rings == i, values, torch.inf))
