"""A policy compiled to one deterministic automaton over bytes, kept in factors.

    decoder    UTF-8 and folding: a trie over the bytes of a character, whose leaves are the symbols it folds to
    phrases    one automaton (Aho and Corasick) over these symbols
    patterns   a few automata more, at most MOST_AUTOMATA in all

Multiplied out it is one table [states, 256] (`ByteAutomaton.flat`), but each state of a phrase would be there once for
each of the decoder's nodes. In factors a text is at one decoder node and in one state of each automaton, its registers:
a byte costs a look-up in the decoder and one in each automaton for each symbol that it completes, whatever the policy.

Notable: symbols that no rule tells apart are one class. Bytes that are not UTF-8 read as U+FFFD, as Python's "replace"
error handler has it. A byte inside a character completes no symbol; it is blocked when every character that it can
still become would complete a match, so whoever avoids blocked bytes always has one that is not: characters that fold to
nothing change nothing, and the byte that begins one (E2, of U+200B) is never blocked.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import pairwise

import numpy as np
import torch

from model.genesis.gate.checksums import DIGITS, SEPARATORS, builtin_dfa, builtin_step
from model.genesis.gate.decoder import Outcomes, byte_sets, decoder_tables
from model.genesis.gate.dfa import Alphabet, Dfa, union
from model.genesis.gate.folding import REPLACEMENT
from model.genesis.gate.patterns import PatternError, parse, pattern_dfa, sets_of
from model.genesis.gate.phrases import phrase_dfa
from model.genesis.gate.policy import Policy, Rule
from model.kernels.automaton import AutomatonTables, run

LARGEST = 2**20  # states of all automata together
LARGEST_TABLE = 2**27  # transitions of all automata together
LARGEST_PATTERN = 2**14  # states of one pattern
LARGEST_SHARED = 2**12  # states of an automaton that several patterns share
MOST_AUTOMATA = 8
_HEAD = 2  # entries of a row before its transitions: its blocked set, and −1 where a text must not end, else 0
_CHUNK = 2**14  # states whose blocked sets are worked out together


@dataclass(frozen=True)
class MaskTables:
    """What blocks which bytes, as sets of groups of outcomes: bits in int64 words.

    byte_sets [U, 256] int32: for each decoder node and byte, the set of outcomes that it can still become.
    sets [N, W]: these. blocked [M, W]: the sets of outcomes that complete a match, numbered in the head of table rows.
    """

    byte_sets: torch.Tensor
    sets: torch.Tensor
    blocked: torch.Tensor

    def to(self, device: torch.device | str) -> "MaskTables":
        return MaskTables(self.byte_sets.to(device), self.sets.to(device), self.blocked.to(device))


@dataclass(frozen=True)
class FlatAutomaton:
    """The product: state 0 is before a text.

    next [N, 256] int32; hits [N, 256] bool, the byte completes a match; blocked [N, 256] bool, hits and the bytes
    inside characters that can become nothing else; ends [N] bool, the text must not end there.
    """

    next: np.ndarray
    hits: np.ndarray
    blocked: np.ndarray
    ends: np.ndarray


@lru_cache(maxsize=4)
def compile_policy(policy: Policy) -> "ByteAutomaton":
    """The automaton of a policy; made once for equal policies.

    Raises:
        ValueError: a pattern is malformed, or the policy needs too many states, naming the rule's place, what is wrong
            and what is accepted.
    """
    return ByteAutomaton(policy)


class ByteAutomaton:
    """See the module. `automata` are its factors but for the decoder; a text's state is (node, registers).

    Args:
        policy: its rules; none is a policy too.
    """

    def __init__(self, policy: Policy):
        self.rules: tuple[Rule, ...] = policy.rules
        alphabet, self.automata = _automata(self.rules)
        resumes = []
        for i, automaton in enumerate(self.automata):
            self.automata[i], resume = automaton.after_prompts()
            resumes.append(resume)
        outcomes = Outcomes(alphabet)
        next_node, outcome = decoder = decoder_tables(outcomes)
        self.nodes, self._outcomes = len(next_node), len(outcomes)
        # The first byte that goes on with the character, for each node inside one.
        self._onward = [0x80 + int(i) for i in (outcome[:, 0x80:0xC0] < len(outcomes)).argmax(1)]
        self._tables, self._masks = {}, {}
        heads, blocked, groups = _blocked_sets(self.automata, outcomes)
        self._lay_out(heads, resumes)
        columns = [automaton.columns for automaton in self.automata]
        self._host = AutomatonTables(
            torch.from_numpy(next_node),
            torch.from_numpy(outcome),
            torch.from_numpy(outcomes.sequences),
            torch.from_numpy(outcomes.lengths),
            torch.from_numpy(
                np.stack(columns) + np.int32(_HEAD) if columns else np.zeros((0, len(alphabet)), np.int32)
            ),
            torch.from_numpy(self._table),
            torch.tensor(self._bases, dtype=torch.int32),
        )
        byte_sets_of, sets = byte_sets(*decoder, len(outcomes), groups)
        self._host_masks = MaskTables(*(torch.from_numpy(each) for each in (byte_sets_of, _bits(sets), _bits(blocked))))
        self.replacement = [int(each[alphabet.classes[REPLACEMENT]]) + _HEAD for each in columns]

    def _lay_out(self, heads: list[np.ndarray], resumes: list[np.ndarray]) -> None:
        """One table of all rows: head, then for each column the place of the next row, ~ of it where there is a hit."""
        self._bases, parts, base = [], [], 0
        for automaton, head in zip(self.automata, heads):
            width = automaton.next.shape[1] + _HEAD
            place = base + automaton.next.astype(np.int32) * np.int32(width)
            rows = np.where(automaton.hits > 0, ~place, place)
            ends = -(automaton.ends > 0)[:, None].astype(np.int32)
            parts.append(np.concatenate([head[:, None], ends, rows], 1).astype(np.int32).ravel())
            self._bases.append(base)
            base += len(parts[-1])
        self._table = np.concatenate(parts) if parts else np.zeros(0, dtype=np.int32)
        self._widths = [automaton.next.shape[1] + _HEAD for automaton in self.automata]
        self._resumes = resumes

    def __len__(self) -> int:
        """States of all automata together, the decoder's nodes not among them."""
        return sum(map(len, self.automata))

    def table_bytes(self) -> int:
        """Size of what a device holds, in bytes."""
        tensors = [*vars(self._host).values(), *vars(self._host_masks).values()]
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)

    def tables(self, device: torch.device | str = "cpu") -> AutomatonTables:
        """For `model.kernels.automaton`; the same object for the same device."""
        device = torch.device(device)
        if device not in self._tables:
            self._tables[device] = self._host.to(device)
        return self._tables[device]

    def masks(self, device: torch.device | str = "cpu") -> MaskTables:
        """For `ByteGate`; the same object for the same device."""
        device = torch.device(device)
        if device not in self._masks:
            self._masks[device] = self._host_masks.to(device)
        return self._masks[device]

    @cached_property
    def _views(self) -> tuple:
        """The tables as Python reads them fastest."""
        host = self._host
        sequences = [row[:length] for row, length in zip(host.sequences.tolist(), host.lengths.tolist())]
        flat = (host.next_node, host.outcome, self._host.table)
        return *(memoryview(each.numpy().reshape(-1)) for each in flat), sequences, host.columns.tolist()

    def read(self, prompt: bytes) -> tuple[int, list[int]]:
        """The state after a prompt, from which what the prompt alone completed is not held against what follows."""
        next_node, outcome, table, sequences, columns = self._views
        node, registers = 0, list(self._bases)
        for byte in prompt:
            at = node * 256 + byte
            node = next_node[at]
            for symbol in sequences[outcome[at]]:
                for f, row in enumerate(columns):
                    value = table[registers[f] + row[symbol]]
                    registers[f] = value if value >= 0 else ~value
        for f, (base, width) in enumerate(zip(self._bases, self._widths)):
            registers[f] = base + int(self._resumes[f][(registers[f] - base) // width]) * width
        return node, registers

    def explain(self, node: int, registers: list[int], byte: int) -> tuple[Rule, int] | None:
        """Why a byte is blocked: the rule of a match that it completes, and the state of the rule's automaton before.

        Of several rules the first of the policy, where one symbol completes them. A byte inside a character is
        answered for by the first character that it can become. None where that character completes nothing.
        """
        next_node, outcome, table, sequences, columns = self._views
        states, at = list(registers), node * 256 + byte
        while True:
            for symbol in sequences[outcome[at]]:
                rules = []
                for f, row in enumerate(columns):
                    column = row[symbol]
                    value = table[states[f] + column]
                    if value < 0:
                        state = (states[f] - self._bases[f]) // self._widths[f]
                        before = (registers[f] - self._bases[f]) // self._widths[f]
                        rules.append((int(self.automata[f].hits[state, column - _HEAD]) - 1, before))
                    states[f] = value if value >= 0 else ~value
                if rules:
                    rule, before = min(rules)
                    return self.rules[rule], before
            node = next_node[at]
            if node == 0:
                return None
            at = node * 256 + self._onward[node]

    def flat(self, limit: int = 2**16) -> FlatAutomaton:
        """The one table over bytes that the factors are the factors of.

        Raises:
            ValueError: it has more than `limit` states.
        """
        states = new = np.array([[0, *self._bases]], dtype=np.int32)
        numbers, after, hits = {new.tobytes(): 0}, [], []
        every_byte = torch.arange(256, dtype=torch.uint8)
        while len(new):
            here = torch.from_numpy(np.repeat(new, 256, axis=0))
            found = run(self._host, every_byte.repeat(len(new))[:, None], here[:, 0], here[:, 1:])
            reached, of = np.unique(np.column_stack(found[1:]), axis=0, return_inverse=True)
            number = np.array([numbers.setdefault(state.tobytes(), len(numbers)) for state in reached])
            after.append(number[of].reshape(-1, 256))
            hits.append(found[0].view(-1, 256).numpy())
            new = reached[number >= len(states)]
            states = np.concatenate([states, new])
            if len(states) > limit:
                raise ValueError(f"limit={limit}: the flat automaton has more states; accepted is a larger one")
        after, hits = np.concatenate(after).astype(np.int32), np.concatenate(hits)
        inside = states[:, :1] > 0
        goes_on = self._host.outcome.numpy()[states[:, 0]] < self._outcomes  # with the character, if inside one
        blocked = hits
        for _ in range(3):  # as many bytes may follow inside a character
            blocked = hits | (inside & (blocked | ~goes_on)).all(1)[after]
        columns = np.where(inside, np.array(self.replacement, dtype=np.int64), 1)
        return FlatAutomaton(after, hits, blocked, (self._table[states[:, 1:] + columns] < 0).any(1))


# ── from rules to automata ───────────────────────────────────────────────────────────────────────────────────────────


def _automata(rules: tuple[Rule, ...]) -> tuple[Alphabet, list[Dfa]]:
    """The alphabet of all rules, and the automata, that of the phrases first."""
    phrases = [(rule.text, rule.word_boundaries, i) for i, rule in enumerate(rules) if rule.kind == "phrase"]
    singles = {REPLACEMENT, *(ord(c) for phrase, _, _ in phrases for c in phrase)}
    trees, steps = {}, {}
    for i, rule in enumerate(rules):
        if rule.kind == "pattern":
            with _naming(rule):
                if step := builtin_step(rule.text):
                    steps[i] = step
                else:
                    trees[i] = parse(rule.text)
    if steps:
        singles.update(map(ord, DIGITS + SEPARATORS))
    alphabet = Alphabet(singles, (ranges for tree in trees.values() for ranges in sets_of(tree)))
    automata = []
    if phrases:
        found = phrase_dfa(phrases, alphabet, LARGEST, LARGEST_TABLE)
        if found is None:
            rule = next(rule for rule in rules if rule.kind == "phrase")
            raise ValueError(
                f"{rule.origin} and the policy's other {len(phrases) - 1} phrases: accepted are phrases of at most "
                f"{LARGEST} symbols together, and {LARGEST_TABLE} when multiplied by the number of different ones"
            )
        automata.append(found)
    patterns = [builtin_dfa(step, alphabet, i) for i, step in steps.items()]
    for i, tree in trees.items():
        with _naming(rules[i]):
            patterns.append(pattern_dfa(tree, alphabet, i, LARGEST_PATTERN))
    automata += union(patterns, LARGEST_SHARED)
    if len(automata) > MOST_AUTOMATA or sum(map(len, automata)) > LARGEST:
        last = rules[max([*trees, *steps])]
        raise ValueError(
            f"{last.origin} and the policy's other {len(patterns) - 1} patterns: they need {len(automata)} automata of "
            f"up to {LARGEST_PATTERN} states; accepted are at most {MOST_AUTOMATA}, with {LARGEST} states together"
        )
    return alphabet, automata


@contextmanager
def _naming(rule: Rule) -> Iterator[None]:
    try:
        yield
    except PatternError as error:
        raise ValueError(f"{rule.origin} {rule.text!r}: {error}") from None


# ── what blocks which bytes ──────────────────────────────────────────────────────────────────────────────────────────


def _blocked_sets(automata: list[Dfa], outcomes: Outcomes) -> tuple[list[np.ndarray], np.ndarray, np.ndarray]:
    """Which outcomes complete a match in which states.

    Returns:
        The number of each state's set, for each automaton; the sets [M, 2G] bool, of G groups of outcomes that are
        always blocked together, and the same after a U+FFFD; the group of each outcome [K].
    """
    K, numbers, found = len(outcomes), [], [np.zeros((1, len(outcomes)), dtype=bool)]
    for automaton in automata:
        sets, of = _sets_of_states(automaton, outcomes.sequences[:K], outcomes.lengths[:K])
        numbers.append(of + sum(map(len, found)))
        found.append(sets)
    sets = np.concatenate(found)
    group_sets, groups = np.unique(sets, axis=1, return_inverse=True)
    # The first is the empty set, the last is everything.
    group_sets = np.concatenate([group_sets, np.ones_like(group_sets[:1])])
    group_sets, same = np.unique(group_sets, axis=0, return_inverse=True)
    numbers, everything, pairs = [same.reshape(-1)[of] for of in numbers], len(group_sets) - 1, []
    for automaton, of in zip(automata, numbers):
        column = automaton.columns[outcomes.replacement]
        afterwards = np.where(automaton.hits[:, column] > 0, everything, of[automaton.next[:, column]])
        pairs.append(np.stack([of, afterwards], 1))
    ends = np.cumsum([0, *map(len, pairs)])
    pairs, of = np.unique(np.concatenate([np.zeros((1, 2), dtype=np.int64), *pairs]), axis=0, return_inverse=True)
    heads = [of.reshape(-1)[1 + begin : 1 + end] for begin, end in pairwise(ends)]
    return heads, np.concatenate([group_sets[pairs[:, 0]], group_sets[pairs[:, 1]]], 1), groups.reshape(-1)


def _sets_of_states(automaton: Dfa, sequences: np.ndarray, lengths: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(the different sets [m, K] bool of sequences that complete a match, the number of each state's [S])."""
    as_columns = automaton.columns[sequences]
    as_columns[np.arange(sequences.shape[1]) >= lengths[:, None]] = -1
    rows, of_sequence = np.unique(as_columns, axis=0, return_inverse=True)
    trie: dict = {}
    for i, row in enumerate(rows.tolist()):
        node = trie
        for column in row:
            if column >= 0:
                node = node.setdefault(column, {})
        node[None] = i  # no column
    after, hits = np.ascontiguousarray(automaton.next.T), np.ascontiguousarray(automaton.hits.T > 0)
    places: dict[bytes, int] = {}
    numbers = []
    for begin in range(0, len(automaton), _CHUNK):
        states = np.arange(begin, min(begin + _CHUNK, len(automaton)))
        blocked = np.zeros((len(rows), len(states)), dtype=bool)
        todo = [(trie, states, blocked[0])]
        while todo:
            node, reached, hit = todo.pop()
            for column, child in node.items():
                if column is None:
                    blocked[child] = hit
                else:
                    todo.append((child, after[column][reached], hit | hits[column][reached]))
        packed = np.ascontiguousarray(np.packbits(blocked, axis=0).T)
        numbers += [places.setdefault(row, len(places)) for row in packed.view(f"V{packed.shape[1]}")[:, 0].tolist()]
    packed = np.frombuffer(b"".join(places), dtype=np.uint8).reshape(len(places), -1)
    sets = np.unpackbits(packed, axis=1, count=len(rows)).astype(bool)
    return sets[:, of_sequence.reshape(-1)], np.array(numbers)


def _bits(sets: np.ndarray) -> np.ndarray:
    """[N, n] bool → [N, ⌈n/64⌉] int64."""
    padded = np.pad(sets, ((0, 0), (0, -sets.shape[1] % 64)))
    return np.packbits(padded, axis=1, bitorder="little").view(np.int64)
