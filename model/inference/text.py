"""Text out of a stream of bytes: whole characters as they come, and sampling that can only write valid UTF-8.

`Utf8Emitter` turns bytes into characters; `Utf8Constraint` masks logits so that every byte continues or begins a
character. Both treat what is not UTF-8 as Python's "replace" error handler does.
"""

import codecs

import torch
from torch import Tensor

_decoder = codecs.getincrementaldecoder("utf-8")

# States of the automaton over bytes: what may come next inside a character (Unicode 15, table 3-7).
START, ONE_LEFT, TWO_LEFT, THREE_LEFT, AFTER_E0, AFTER_ED, AFTER_F0, AFTER_F4 = range(8)
_TRANSITIONS = (  # (state, first byte, last byte, next state)
    (START, 0x00, 0x7F, START),
    (START, 0xC2, 0xDF, ONE_LEFT),
    (START, 0xE0, 0xE0, AFTER_E0),
    (START, 0xE1, 0xEC, TWO_LEFT),
    (START, 0xED, 0xED, AFTER_ED),
    (START, 0xEE, 0xEF, TWO_LEFT),
    (START, 0xF0, 0xF0, AFTER_F0),
    (START, 0xF1, 0xF3, THREE_LEFT),
    (START, 0xF4, 0xF4, AFTER_F4),
    (ONE_LEFT, 0x80, 0xBF, START),
    (TWO_LEFT, 0x80, 0xBF, ONE_LEFT),
    (THREE_LEFT, 0x80, 0xBF, TWO_LEFT),
    (AFTER_E0, 0xA0, 0xBF, ONE_LEFT),  # no longer than needed
    (AFTER_ED, 0x80, 0x9F, ONE_LEFT),  # no surrogates
    (AFTER_F0, 0x90, 0xBF, TWO_LEFT),
    (AFTER_F4, 0x80, 0x8F, TWO_LEFT),  # nothing above U+10FFFF
)


class Utf8Emitter:
    """Characters of a byte stream, each as soon as its last byte is in.

    A byte that cannot belong to a character comes out as U+FFFD. A character that is still unfinished when the stream
    ends is withheld, unless `close` is called.

    Args:
        prompt: the bytes before the stream, not emitted. When they end inside a character, the stream's first
            character comes out whole, the prompt's bytes of it included.
    """

    def __init__(self, prompt: bytes = b""):
        self._decoder = _decoder("replace")
        self._decoder.decode(prompt)

    def feed(self, data: bytes) -> str:
        """The characters that `data` completes; often none, for part of a character."""
        return self._decoder.decode(data)

    def close(self) -> str:
        """U+FFFD for an unfinished last character, else nothing."""
        return self._decoder.decode(b"", final=True)


def _rows() -> list[list[int]]:
    rows = [[-1] * 256 for _ in range(8)]
    for state, first, last, after in _TRANSITIONS:
        rows[state][first : last + 1] = [after] * (last - first + 1)
    return rows


NEXT = _rows()  # NEXT[state][byte] is the state after the byte, −1 where the byte is not valid


def unfinished(data: bytes) -> tuple[bytes, int]:
    """The 0 to 3 bytes at the end of `data` that begin a character without ending it, and the automaton's state."""
    # Our own automaton: Python's incremental decoder also waits after the beginning of a surrogate.
    tail = data[-3:]  # a longer beginning does not exist, and a lead byte is never inside a character
    state, begin = START, 0
    for i, byte in enumerate(tail):
        if state == START or NEXT[state][byte] < 0:
            state, begin = max(NEXT[START][byte], START), i
        else:
            state = NEXT[state][byte]
    return (b"" if state == START else tail[begin:]), state


class Utf8Constraint:
    """Keeps every row of a batch within valid UTF-8, on the device and without synchronisation.

    Args:
        prompts: the bytes before each row. A row whose prompt ends inside a character must complete it; a prompt that
            ends in bytes that are no beginning of a character counts for nothing.
        device: where the logits are.
    """

    def __init__(self, prompts: list[bytes], device: torch.device | str = "cpu"):
        self._next = torch.tensor(NEXT, device=device)  # [8, 256]
        self._forbidden = self._next < 0
        self._states = torch.tensor([unfinished(prompt)[1] for prompt in prompts], device=device)  # [B]

    def mask(self, logits: Tensor) -> Tensor:
        """logits [B, 256] with −inf at every byte that would break a character; some byte is always left."""
        return logits.masked_fill(self._forbidden[self._states], -torch.inf)

    def advance(self, chosen: Tensor) -> None:
        """Read the bytes chosen [B] from masked logits."""
        self._states = self._next[self._states, chosen]
