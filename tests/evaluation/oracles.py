"""Streams that answer by reading the text itself: what a model with a perfect memory, or a short one, would do."""

import re

import torch

from model.data.haystack import LANGUAGES
from model.layers.memory import HebbianMemory

WORDS = "|".join(sorted({word for language in LANGUAGES.values() for word in language.keys}))
KEY = re.compile(rf"\b(?:[0-9]{{4}}|{WORDS})\b")
CERTAIN = 20.0  # logit of the byte that an oracle expects; 0 of the others


class Oracle:
    """Knows what keys look like, and says the first one it has read, from where its own answer stands.

    `window` is the number of last bytes that it remembers, None for all.
    """

    window: int | None = None

    def __init__(self, model, batch_size: int):
        assert not torch.is_grad_enabled() and not any(module.training for module in model.modules())
        self.rows = [b""] * batch_size
        self.largest_piece = 0

    def feed(self, x):
        assert x.dtype == torch.uint8 or x.shape[1] == 1  # prompts come as they are
        self.largest_piece = max(self.largest_piece, x.shape[1])
        self.rows = [row + bytes(part.tolist()) for row, part in zip(self.rows, x)]

    def clone(self):
        twin = type(self).__new__(type(self))
        twin.__dict__ = dict(self.__dict__)
        return twin

    def state_bytes(self) -> int:
        return 100 * len(self.rows)

    def logits(self):
        logits = torch.zeros(len(self.rows), 256)
        for row, text in zip(logits, self.rows):
            byte = self.next(text if self.window is None else text[-self.window :])
            if byte is not None:
                row[byte] = CERTAIN
        return logits

    def next(self, text: bytes) -> int | None:
        found = KEY.search(text.decode(errors="ignore"))
        if not found:
            return None
        key = found.group().encode()
        written = max(n for n in range(len(key)) if text.endswith(key[:n]))
        return key[written]


class PairOracle(Oracle):
    """Looks up the key of the open question in the list."""

    def next(self, text: bytes) -> int | None:
        before, asked, question = text.rpartition(b"?")
        key, _, written = question.partition(b"=")
        pairs = dict(re.findall(rb"([a-z]{3})=([0-9]{3});", before))
        return pairs[key][len(written)] if asked and key in pairs else None


def forgetful(oracle: type[Oracle], n: int) -> type[Oracle]:
    """One that remembers its last n bytes."""
    return type("Forgetful", (oracle,), {"window": n})


def remembering(oracle: type[Oracle], n: int) -> type[Oracle]:
    """One that remembers all where the model's memory hands anything on, and its last n bytes where it does not."""

    class Remembering(oracle):
        def __init__(self, model, batch_size: int):
            super().__init__(model, batch_size)
            memory = next(module for module in model.modules() if isinstance(module, HebbianMemory))
            with torch.no_grad():
                out, _ = memory(torch.ones(1, 2, memory.qkv.in_features), model.plasticity)
            self.window = None if out.any() else n

    return Remembering
