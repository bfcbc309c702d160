"""Deterministic automata over classes of folded symbols, and the partition of all symbols into such classes.

Sets of symbols are tuples of inclusive ranges of code points, in order and apart: ((48, 57), (95, 95)).
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from model.genesis.gate.folding import CODE_POINTS, space_symbols, word_symbols

SymbolSet = tuple[tuple[int, int], ...]


def symbol_set(members: np.ndarray) -> SymbolSet:
    """The ranges of a mask [0x110000], or of code points in any order."""
    codes = np.flatnonzero(members) if members.dtype == bool else np.unique(members)
    if not len(codes):
        return ()
    breaks = np.flatnonzero(np.diff(codes) > 1)
    return tuple(zip(codes[np.r_[0, breaks + 1]].tolist(), codes[np.r_[breaks, len(codes) - 1]].tolist()))


class Alphabet:
    """The coarsest partition of all symbols that tells apart the members of some sets, word characters and white space.

    `classes` [0x110000] int32 is each symbol's class, `word` and `space` [classes] bool say what its symbols are.

    Args:
        singles: symbols that get a class of their own.
        sets: sets of symbols that are told from their complements.
    """

    def __init__(self, singles: Iterable[int], sets: Iterable[SymbolSet]):
        singles = np.unique(np.fromiter(singles, np.int64))
        word, space = word_symbols(), space_symbols()
        sets = [symbol_set(word), symbol_set(space), *dict.fromkeys(sets)]
        edges = [0, CODE_POINTS, *(edge for ranges in sets for first, last in ranges for edge in (first, last + 1))]
        edges = np.unique(np.concatenate([np.array(edges), singles, singles + 1]))
        begins = edges[:-1]
        label = np.zeros(len(begins), dtype=np.int64)
        label[np.searchsorted(begins, singles)] = np.arange(1, len(singles) + 1)
        for ranges in sets:
            label = np.unique(label * 2 + _inside(begins, ranges), return_inverse=True)[1]
        self.classes = np.repeat(label, np.diff(edges)).astype(np.int32)
        _, first = np.unique(label, return_index=True)
        self._examples = begins[first]  # a symbol of each class
        self.word, self.space = word[self._examples], space[self._examples]

    def __len__(self) -> int:
        return len(self._examples)

    def members(self, ranges: SymbolSet) -> np.ndarray:
        """[classes] bool: which classes a set consists of; it must be one that the alphabet was made for."""
        return _inside(self._examples, ranges)


def _inside(codes: np.ndarray, ranges: SymbolSet) -> np.ndarray:
    """[len(codes)] bool: whether each code point is in one of the ranges."""
    bounds = np.array(ranges, dtype=np.int64).reshape(-1, 2)
    place = np.searchsorted(bounds[:, 0], codes, side="right") - 1
    return (
        (place >= 0) & (codes <= bounds[np.maximum(place, 0), 1]) if len(bounds) else np.zeros(len(codes), dtype=bool)
    )


@dataclass
class Dfa:
    """A complete deterministic automaton with S states and W columns; it starts in state 0.

    next [S, W] int32: the state after a symbol of that column.
    hits [S, W] int32: 1 + the index of a rule of which a match is known to be complete with that symbol; 0 for none.
    late [S, W] int32: as `hits`, but only for matches of which that symbol is a part. The others were complete before
        it, and it confirmed that the word ends there.
    ends [S] int32: as `hits`, should the text end in that state.
    columns [C] int32: the column of each class of the alphabet.
    """

    next: np.ndarray
    hits: np.ndarray
    late: np.ndarray
    ends: np.ndarray
    columns: np.ndarray

    def __len__(self) -> int:
        return len(self.next)

    def minimal(self) -> "Dfa":
        """The smallest automaton that says the same (Moore's algorithm); unreachable states are not removed."""
        label, count = _rows(np.concatenate([self.hits, self.late, self.ends[:, None]], 1)), 0
        while count < (count := label.max() + 1):
            label = _rows(np.concatenate([label[:, None], label[self.next]], 1))
        label = _numbered_from(label, label[0])
        _, kept = np.unique(label, return_index=True)
        return replace(
            self, next=label[self.next[kept]].astype(np.int32), hits=self.hits[kept], late=self.late[kept],
            ends=self.ends[kept],
        )  # fmt: skip

    def product(self, other: "Dfa", limit: int) -> "Dfa | None":
        """The automaton that does what both do; None when it has more than `limit` states.

        Where both have a hit, the rule with the lower index is told.
        """
        pairs, columns = np.unique(np.stack([self.columns, other.columns]), axis=1, return_inverse=True)
        mine, theirs = pairs
        size = len(other)
        known = frontier = np.zeros(1, dtype=np.int64)
        while len(frontier):
            after = (
                self.next[frontier // size][:, mine].astype(np.int64) * size + other.next[frontier % size][:, theirs]
            )
            frontier = np.setdiff1d(after, known)
            known = np.union1d(known, frontier)  # sorted, the start first
            if len(known) > limit:
                return None
        a, b = known // size, known % size
        after = self.next[a][:, mine].astype(np.int64) * size + other.next[b][:, theirs]
        return Dfa(
            np.searchsorted(known, after).astype(np.int32),
            _either(self.hits[a][:, mine], other.hits[b][:, theirs]),
            _either(self.late[a][:, mine], other.late[b][:, theirs]),
            _either(self.ends[a], other.ends[b]),
            columns.reshape(-1).astype(np.int32),
        )

    def after_prompts(self) -> tuple["Dfa", np.ndarray]:
        """With copies of states in which the symbol that follows confirms no match that was complete before it.

        Returns:
            The automaton, its former states first, and [S] int32: the state to go on in when a prompt ended in a state.
            A match that lies in the prompt alone is then nobody's but the prompt's.
        """
        copied = np.flatnonzero((self.hits != self.late).any(1) | (self.ends > 0))
        resume = np.arange(len(self), dtype=np.int32)
        resume[copied] = len(self) + np.arange(len(copied), dtype=np.int32)
        grown = replace(
            self, next=np.concatenate([self.next, self.next[copied]]),
            hits=np.concatenate([self.hits, self.late[copied]]), late=np.concatenate([self.late, self.late[copied]]),
            ends=np.concatenate([self.ends, np.zeros_like(self.ends[copied])]),
        )  # fmt: skip
        return grown, resume


def _either(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """The lower of two rules, where 0 is none."""
    return np.where((a > 0) & ((b == 0) | (a < b)), a, b)


def _rows(table: np.ndarray) -> np.ndarray:
    """A number for each row, the same for equal rows."""
    return np.unique(table, axis=0, return_inverse=True)[1].reshape(-1)


def _numbered_from(label: np.ndarray, first: int) -> np.ndarray:
    """The same numbers with `first` and 0 exchanged: automata start in state 0."""
    exchanged = label.copy()
    exchanged[label == first], exchanged[label == 0] = 0, first
    return exchanged


def union(automata: Sequence[Dfa], limit: int) -> list[Dfa]:
    """As few automata as a greedy search finds that together do what all do, none made larger than `limit` states."""
    bins: list[Dfa] = []
    for automaton in sorted(automata, key=len):
        for i, other in enumerate(bins):
            if len(other) <= limit and (joined := other.product(automaton, limit)) is not None:
                bins[i] = joined
                break
        else:
            bins.append(automaton)
    return bins
