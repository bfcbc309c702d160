"""Recurring surprises: bytes that surprised the model once, and do it again where they are shown again.

    s_i = 1 where L_i > mean of L over the batch                  a surprise
    r_i = 1 where byte i and the 15 before it ended in a surprise once before  that recurs
    L = Σ w_i L_i / Σ w_i,   w_i = 1 + λ s_i r_i

It is the sticky amplifier's question (seed 000, section 3: which events deserve more learning) asked of events, not of
units. A surprise alone says little: most of what a model cannot predict is noise, which it should not learn. What
recurs can be learned, and what still surprises then has not been. It counts more at its second showing alone: what goes
on to surprise is noise after all, and a loss that favours it for ever would be another objective.

The memory is a table of fingerprints, not of text: one int64 a slot, newer ones in the place of older.

Notable: shorter contexts recur everywhere. In the encyclopedia a third of the runs of 8 bytes have been seen within
200 KB before, but 1.4% of those of 16.
"""

import torch
from torch import Tensor, nn

DOUBLINGS = 4
CONTEXT = 2**DOUBLINGS  # bytes that have to recur, the surprising one among them
FINGERPRINT_BITS = 30
_MASK = 2**31 - 1
# Odd and below 2^31: products with a hash below 2^31 fit int64. A pair for the slot, a pair for the fingerprint.
_OLDER = ((0x3C6EF35F,), (0x19660D0B,))
_NEWER = ((0x41C64E6D,), (0x5851F42D,))


class RecurringSurprises(nn.Module):
    """Which bytes end a run of `CONTEXT` bytes that has been written once before.

    Buffers, all of its state:
        table [slots] int64: the write that made an entry, whether the run was known by then (one bit), and the run's
            fingerprint (30 bits); 0 is empty.
        writes: int64 scalar, number of writes so far.

    Args:
        slots: entries, a power of two; a newer run replaces what is in its slot.

    Raises:
        ValueError: slots.
    """

    def __init__(self, slots: int = 2**22, device: torch.device | None = None):
        super().__init__()
        if slots < 1 or slots & (slots - 1) or slots > 2**31:
            raise ValueError(f"slots={slots!r}: accepted is a power of two up to 2**31")
        self.register_buffer("table", torch.zeros(slots, dtype=torch.int64, device=device))
        self.register_buffer("writes", torch.zeros((), dtype=torch.int64, device=device))
        self.register_buffer("_older", torch.tensor(_OLDER, device=device).unsqueeze(-1), persistent=False)
        self.register_buffer("_newer", torch.tensor(_NEWER, device=device).unsqueeze(-1), persistent=False)

    def _places(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x [B, L] bytes → slot and fingerprint [B, L] of the run that ends at each byte, if a whole one does."""
        h = x.long() + 1  # a run of zeros is no empty run
        h = torch.stack([h, h])
        for i in range(DOUBLINGS):
            # The hash of 2k bytes from those of its halves.
            older = nn.functional.pad(h, (2**i, 0))[..., : h.shape[-1]]
            h = older * self._older + h * self._newer
            h = (h ^ (h >> 31)) & _MASK
        return h[0] & (len(self.table) - 1), h[1] & (2**FINGERPRINT_BITS - 1)

    def _look(self, slot: Tensor, fingerprint: Tensor) -> tuple[Tensor, Tensor]:
        """Whether each run is in the table, and whether it has been written more than once."""
        entry = self.table[slot]
        known = (entry > 0) & ((entry & (2**FINGERPRINT_BITS - 1)) == fingerprint)
        return known, known & ((entry >> FINGERPRINT_BITS) & 1 > 0)

    @torch.no_grad()
    def seen_once(self, x: Tensor) -> Tensor:
        """x [B, L] bytes → [B, L] bool: whether the run that ends at each byte has been written once, not more often.

        Never true for a row's first CONTEXT − 1 bytes. A run that has not been written is taken for one that has about
        once in 2^30 looks.
        """
        known, often = self._look(*self._places(x))
        return known & ~often & _whole(x)

    @torch.no_grad()
    def write(self, x: Tensor, surprising: Tensor) -> None:
        """Note the runs of x [B, L] that end at surprising [B, L] bool bytes; where none does, nothing changes."""
        kept = surprising & _whole(x)
        self.writes += kept.any()
        slot, fingerprint = self._places(x)
        known, _ = self._look(slot, fingerprint)
        entry = (((self.writes << 1) + known) << FINGERPRINT_BITS) + fingerprint
        # The largest is the newest, and the same whatever the order of the threads.
        self.table.scatter_reduce_(0, slot.flatten(), torch.where(kept, entry, 0).flatten(), "amax")


def _whole(x: Tensor) -> Tensor:
    """[L] bool: the places of x [B, L] where a whole run ends."""
    return torch.arange(x.shape[1], device=x.device) >= CONTEXT - 1


@torch.no_grad()
def surprising(losses: Tensor) -> Tensor:
    """losses [B, L] in nats → bool: those above their mean. Where one is not finite, none is."""
    return (losses > losses.mean()) & losses.isfinite().all()
