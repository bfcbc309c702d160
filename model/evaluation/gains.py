"""Which bytes thinking helps: bits without it and with it, by byte, by kind of byte, and the extremes in their text."""

import string
from dataclasses import dataclass

import numpy as np

from model.evaluation.report import number, text_table

BEFORE, AFTER = 28, 12  # bytes of text shown around a byte
OPEN, CLOSE = "⟦⟧"  # around the byte itself

_NAMES = ("letter", "digit", "space", "punctuation", "non-ASCII", "control")
_SETS = (string.ascii_letters, string.digits, string.whitespace, string.punctuation)
KIND_OF = np.full(256, _NAMES.index("control"))  # the kind of every byte value, an index of _NAMES
KIND_OF[0x80:] = _NAMES.index("non-ASCII")
for _kind, _characters in enumerate(_SETS):
    KIND_OF[list(_characters.encode())] = _kind
FIRST, LATER = "first of its patch", "later in its patch"


@dataclass(frozen=True)
class ByteGain:
    """One byte: where it stands in the text, its value, its kind, its bits without and with thinking, and how it is
    shown: `text`, the byte's character between ⟦ and ⟧ (with "2/3" for the second of three bytes)."""

    position: int
    byte: int
    kind: str
    before: float
    after: float
    gain: float
    text: str


@dataclass(frozen=True)
class GroupGain:
    """All bytes of one kind: mean bits without and with thinking, and the shares that gain and that lose."""

    name: str
    bytes: int
    before: float
    after: float
    gain: float
    gaining: float
    losing: float


@dataclass(frozen=True)
class Gains:
    """What K = `steps` thinking steps are worth by byte. Gains are bits before minus bits after: above 0 is better.

    Attributes:
        groups: all bytes first, then by kind, then the first byte of a patch against the later ones; those that occur.
        best, worst: the bytes that gain most and lose most, the most extreme first; fewer where fewer change.
    """

    steps: int
    groups: list[GroupGain]
    best: list[ByteGain]
    worst: list[ByteGain]

    def table(self) -> str:
        """One line a kind."""
        header = ["bytes that are", "number", "bits at 0", f"bits at {self.steps}", "gain", "gain %", "lose %"]
        rows = [
            [
                group.name,
                str(group.bytes),
                *(number(value, 4) for value in (group.before, group.after, group.gain)),
                *(f"{100 * share:.1f}" for share in (group.gaining, group.losing)),
            ]
            for group in self.groups
        ]
        return text_table(header, rows)

    def extremes_table(self) -> str:
        """The best and then the worst bytes in their text, aligned at the byte."""
        listed = [*self.best, *self.worst]
        if not listed:
            return "no byte changes"
        header = ["byte at", "value", "bits at 0", f"bits at {self.steps}", "gain"]
        rows = [
            [str(each.position), f"{each.byte:02x}", *(number(x) for x in (each.before, each.after, each.gain))]
            for each in listed
        ]
        lines = text_table(header, rows).splitlines()
        lefts = [each.text.index(OPEN) for each in listed]
        texts = [" " * (max(lefts) - left) + each.text for left, each in zip(lefts, listed)]
        marked = [f"{line}  {text}" for line, text in zip(lines[1:], texts)]
        if self.best:
            marked.insert(0, "most gained:")
        if self.worst:
            marked.insert(len(marked) - len(self.worst), "most lost:")
        return "\n".join([lines[0], *marked])


def byte_gains(
    text: np.ndarray,
    windows: list[tuple[int, int]],
    before: np.ndarray,
    after: np.ndarray,
    *,
    steps: int,
    patch_size: int,
    top: int,
) -> Gains:
    """Compare the bits of the bytes of some windows.

    Args:
        text: uint8 [n].
        windows: (start, stop) in the text; every one begins with a whole patch.
        before, after: bits [bytes of all windows], one window after the other, without thinking and with it.
        steps: K of `after`.
        patch_size: bytes.
        top: how many bytes to show at either end.
    """
    positions = np.concatenate([np.arange(start, stop) for start, stop in windows])
    first = np.concatenate([np.arange(stop - start) % patch_size == 0 for start, stop in windows])
    values = text[positions]
    kinds = KIND_OF[values]
    gain = before - after
    chosen = [("all", np.ones(len(values), bool)), *((name, kinds == i) for i, name in enumerate(_NAMES))]
    chosen += [(FIRST, first), (LATER, ~first)]
    groups = [
        GroupGain(
            name,
            int(where.sum()),
            float(before[where].mean()),
            float(after[where].mean()),
            float(gain[where].mean()),
            float(np.mean(gain[where] > 0)),
            float(np.mean(gain[where] < 0)),
        )
        for name, where in chosen
        if where.any()
    ]

    def listed(order: np.ndarray) -> list[ByteGain]:
        return [
            ByteGain(
                int(positions[i]),
                int(values[i]),
                _NAMES[kinds[i]],
                *(float(bits[i]) for bits in (before, after, gain)),
                in_its_text(text, int(positions[i])),
            )
            for i in order
        ]

    return Gains(steps, groups, listed(_largest(gain, top)), listed(_largest(-gain, top)))


def in_its_text(text: np.ndarray | bytes, at: int) -> str:
    """The byte at `at` between ⟦ and ⟧, with up to 28 bytes before and 12 after it, as one printable line.

    Characters are whole: one that the edge or the byte itself cuts is shown completely, and in a character of several
    bytes the mark says which byte it is (⟦ğ 2/2⟧). Escaped are bytes that are no UTF-8 (\\xff), what does not print
    (\\n, \\x00, \\u200d), the backslash and the marks themselves.
    """
    begin, end = max(0, at - BEFORE), at + AFTER
    shown = []
    for start, unit in _units(bytes(text[max(0, begin - 3) : end + 4]), max(0, begin - 3)):
        if start + len(unit) <= begin or start > end:
            continue
        character = _escaped(unit)
        if start <= at < start + len(unit):
            which = f" {at - start + 1}/{len(unit)}" if len(unit) > 1 else ""
            character = f"{OPEN}{character}{which}{CLOSE}"
        shown.append(character)
    return "".join(shown)


def _largest(values: np.ndarray, top: int) -> np.ndarray:
    """Indices of the `top` largest values above 0, the first in the text first among equals."""
    above = np.flatnonzero(values > 0)
    return above[np.argsort(-values[above], kind="stable")[:top]]


def _units(data: bytes, offset: int) -> list[tuple[int, bytes]]:
    """(position, bytes) of every character of UTF-8, and of every byte that belongs to none."""
    units, i = [], 0
    while i < len(data):
        length = 1 if data[i] < 0xC0 else 2 if data[i] < 0xE0 else 3 if data[i] < 0xF0 else 4
        unit = data[i : i + length]
        if _decoded(unit) is None:
            unit = unit[:1]
        units.append((offset + i, unit))
        i += len(unit)
    return units


def _decoded(unit: bytes) -> str | None:
    try:
        return unit.decode()
    except UnicodeDecodeError:
        return None


def _escaped(unit: bytes) -> str:
    character = _decoded(unit)
    if character is None:
        return f"\\x{unit[0]:02x}"
    if character.isprintable() and character not in ("\\", OPEN, CLOSE):
        return character
    # As \x.. these would look like bytes that are no UTF-8.
    return f"\\u{ord(character):04x}" if "\x80" <= character <= "\xff" else character.encode("unicode_escape").decode()
