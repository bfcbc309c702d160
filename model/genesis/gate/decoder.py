"""From bytes to classes of folded symbols: UTF-8 as a trie, whose leaves are what characters fold to.

Notable: an automaton over bytes needs no state of its own for the many ways to write a letter. Blocks of 64 characters
that fold alike are one node of the trie, so that a policy in Latin letters needs some 400 nodes for all of Unicode.
"""

import numpy as np

from model.genesis.gate.dfa import Alphabet
from model.genesis.gate.folding import REPLACEMENT, fold_table


class Outcomes:
    """What a character can fold to, as classes of an alphabet: outcome 0 is nothing.

    of [0x110000] int32: the outcome of each code point.
    sequences [2K, M], lengths [2K] int32: the classes of outcome i < K; those of K + i are the same after a U+FFFD, for
    a byte that shows that those before it were no character.
    """

    def __init__(self, alphabet: Alphabet):
        table, singles = fold_table(), len(alphabet)
        self.of = np.where(table.single >= 0, alphabet.classes[np.maximum(table.single, 0)] + 1, 0).astype(np.int32)
        known: dict[tuple[int, ...], int] = {}
        classes, at, several = alphabet.classes[table.symbols].tolist(), 0, []
        for length in table.lengths.tolist():
            symbols = tuple(classes[at : at + length])
            several.append(1 + singles + known.setdefault(symbols, len(known)))
            at += length
        self.of[table.several] = several
        sequences = [(), *((c,) for c in range(singles)), *known]
        self._count = len(sequences)
        self.replacement = int(alphabet.classes[REPLACEMENT])
        sequences += [(self.replacement, *sequence) for sequence in sequences]
        self.lengths = np.array(list(map(len, sequences)), dtype=np.int32)
        self.sequences = np.zeros((len(sequences), self.lengths.max()), dtype=np.int32)
        for i, sequence in enumerate(sequences):
            self.sequences[i, : len(sequence)] = sequence

    def __len__(self) -> int:
        """K."""
        return self._count


def decoder_tables(outcomes: Outcomes) -> tuple[np.ndarray, np.ndarray]:
    """(next node, outcome) [U, 256] int32: a trie of UTF-8 (Unicode 15, table 3-7) whose equal branches are one."""
    K = len(outcomes)
    last, last_of = _distinct(outcomes.of.reshape(-1, 64))  # nodes that wait for the last byte
    two_left = last_of.reshape(-1, 64).copy()
    two_left[0x00, :0x20] = two_left[0x0D, 0x20:] = -1  # longer than needed; surrogates
    middle, middle_of = _distinct(two_left)
    three_left = np.full((5, 64), -1, dtype=np.int32)
    three_left.reshape(-1)[0x10:0x110] = middle_of[0x10:]  # longer than needed before, above U+10FFFF after
    first_middle = 1 + len(last)
    first_top = first_middle + len(middle)

    next_node = np.zeros((first_top + len(three_left), 256), dtype=np.int32)
    outcome = np.zeros_like(next_node)
    outcome[0] = outcomes.of[REPLACEMENT]
    outcome[0, :0x80] = outcomes.of[:0x80]
    outcome[0, 0xC2:0xF5] = 0
    next_node[0, 0xC2:0xE0] = 1 + last_of[2:0x20]
    next_node[0, 0xE0:0xF0] = first_middle + middle_of[:0x10]
    next_node[0, 0xF0:0xF5] = first_top + np.arange(5)
    # Inside a character other bytes end it as U+FFFD and begin anew.
    next_node[1:], outcome[1:] = next_node[0], outcome[0] + K
    inside = slice(0x80, 0xC0)
    outcome[1:first_middle, inside] = last
    next_node[1:first_middle, inside] = 0
    for rows, children, base in (
        (slice(first_middle, first_top), middle, 1),
        (slice(first_top, None), three_left, first_middle),
    ):
        valid = children >= 0
        next_node[rows, inside] = np.where(valid, base + children, next_node[rows, inside])
        outcome[rows, inside] = np.where(valid, 0, outcome[rows, inside])
    return next_node, outcome


def _distinct(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(the rows without repetition, in order of appearance, the place of each row among them int32)."""
    places: dict[bytes, int] = {}
    of = np.array([places.setdefault(row.tobytes(), len(places)) for row in rows], dtype=np.int32)
    return rows[np.unique(of, return_index=True)[1]], of


def byte_sets(next_node: np.ndarray, outcome: np.ndarray, K: int, groups: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(for each node and byte the number of a set [U, 256] int32, the sets of groups that they can become [N, 2G])."""
    U, G = len(next_node), int(groups.max()) + 1
    of_node = np.zeros((U, G), dtype=bool)
    for _ in range(3):  # what waits for one byte, then for two, then for three
        for byte in range(0x80, 0xC0):
            goes_on = outcome[:, byte] < K
            goes_on[0] = False
            ended, inside = goes_on & (next_node[:, byte] == 0), goes_on & (next_node[:, byte] > 0)
            of_node[ended, groups[outcome[ended, byte]]] = True
            of_node[inside] |= of_node[next_node[inside, byte]]
    single = np.eye(G, dtype=bool)
    sets = np.zeros((2 * (G + U), 2 * G), dtype=bool)
    sets[:G, :G] = sets[G : 2 * G, G:] = single
    sets[2 * G : 2 * G + U, :G] = sets[2 * G + U :, G:] = of_node
    begins_anew = outcome >= K
    completes = begins_anew * G + groups[outcome % K]
    return np.where(next_node == 0, completes, 2 * G + begins_anew * U + next_node).astype(np.int32), sets
