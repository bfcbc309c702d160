r"""The pattern language of policies: a subset of regular expressions over folded symbols, and checksummed numbers.

    literal   . (all but \n)   [a-z_] [^...]   \d \w \s \D \W \S   \b   (...) (?:...)   a|b   * + ? {m} {m,} {m,n}
    \n \t \r \xHH \uHHHH and \ before punctuation        builtin:luhn   builtin:luhn-grouped   builtin:tckn

Notable: patterns are folded as the text is. A literal that folds to several symbols, as ß does, is their sequence; of a
class, members that fold to several symbols or to none do not count. \d is 0-9, since all decimal digits fold to those.
A match is complete as soon as any of its texts is, so `a{2,5}` is `aa`, and `*` and `+` are neither greedy nor lazy.
"""

import re
import unicodedata
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np

from model.genesis.gate.dfa import Alphabet, Dfa, SymbolSet, symbol_set
from model.genesis.gate.folding import CODE_POINTS, fold, fold_table, space_symbols, word_symbols

LARGEST_REPEAT = 1000
MOST_NFA_STATES = 20_000
_CONTROLS = {"n": "\n", "t": "\t", "r": "\r"}
_CODES = re.compile(r"x([0-9a-fA-F]{2})|u([0-9a-fA-F]{4})")
_QUANTIFIER = re.compile(r"\{(\d+)(,?)(\d*)\}")
ACCEPTED = "accepted are the patterns of docs/gate.md"


class PatternError(ValueError):
    """What is wrong with a pattern and what is accepted, without saying where the pattern stands."""


# ── the syntax tree ──────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class Symbols:
    """One symbol of a set."""

    ranges: SymbolSet


@dataclass(frozen=True)
class Boundary:
    """\\b."""


@dataclass(frozen=True)
class Sequence:
    parts: tuple


@dataclass(frozen=True)
class Choice:
    options: tuple


@dataclass(frozen=True)
class Repeat:
    part: object
    least: int
    most: int | None  # None: no limit


def _complement(mask_of: Callable[[], np.ndarray]) -> Callable[[], np.ndarray]:
    return lambda: ~mask_of()


def _digits() -> np.ndarray:
    digits = np.zeros(CODE_POINTS, dtype=bool)
    digits[ord("0") : ord("9") + 1] = True
    return digits


_SHORTHANDS = {"d": _digits, "w": word_symbols, "s": space_symbols}
_SHORTHANDS |= {name.upper(): _complement(mask_of) for name, mask_of in _SHORTHANDS.items()}


class _Parser:
    def __init__(self, source: str):
        # Composed, a quantifier after a letter with its mark means both.
        self.source = unicodedata.normalize("NFC", source)
        self.at = 0

    def parse(self):
        tree = self._choice()
        if self.at < len(self.source):
            raise self._wrong("')' closes nothing")
        return tree

    def _wrong(self, what: str) -> PatternError:
        return PatternError(f"{what} at character {self.at + 1}; {ACCEPTED}")

    def _peek(self) -> str:
        return self.source[self.at : self.at + 1]

    def _take(self) -> str:
        character = self._peek()
        self.at += 1
        return character

    def _choice(self):
        options = [self._sequence()]
        while self._peek() == "|":
            self.at += 1
            options.append(self._sequence())
        return options[0] if len(options) == 1 else Choice(tuple(options))

    def _sequence(self):
        parts = []
        while self._peek() not in ("", "|", ")"):
            parts.append(self._quantified(self._atom()))
        return Sequence(tuple(parts))

    def _quantified(self, part):
        character = self._peek()
        if character == "{":
            match = _QUANTIFIER.match(self.source, self.at)
            if match is None:
                raise self._wrong("'{' begins no {m}, {m,} or {m,n}; a literal one is \\{")
            least = int(match[1])
            most = least if not match[2] else int(match[3]) if match[3] else None
            if max(least, most or 0) > LARGEST_REPEAT or (most is not None and most < least):
                raise self._wrong(f"{match[0]} does not rise, or goes beyond {LARGEST_REPEAT}")
            self.at = match.end()
        elif character in ("*", "+", "?") and character:
            least, most = {"*": (0, None), "+": (1, None), "?": (0, 1)}[character]
            self.at += 1
        else:
            return part
        if self._peek() in ("*", "+", "?", "{") and self._peek():
            raise self._wrong("a quantifier after a quantifier")
        return Repeat(part, least, most)

    def _atom(self):
        character = self._take()
        if character == "(":
            if self._peek() == "?":
                if self.source[self.at : self.at + 2] != "?:":
                    raise self._wrong("'(?' other than (?:...)")
                self.at += 2
            inner = self._choice()
            if self._take() != ")":
                raise self._wrong("'(' is not closed")
            return inner
        if character == "[":
            return Symbols(symbol_set(self._class()))
        if character == ".":
            every = np.ones(CODE_POINTS, dtype=bool)
            every[ord("\n")] = False
            return Symbols(symbol_set(every))
        if character in "*+?{":
            self.at -= 1
            raise self._wrong(f"{character!r} has nothing to repeat")
        if character in "^$":
            self.at -= 1
            raise self._wrong(f"{character!r}, which is not supported (a literal one is \\{character})")
        if character == "\\":
            if self._peek() == "b":
                self.at += 1
                return Boundary()
            if self._peek() in _SHORTHANDS:
                return Symbols(symbol_set(_SHORTHANDS[self._take()]()))
            character = self._escaped()
        return Sequence(tuple(Symbols(((ord(c), ord(c)),)) for c in fold(character)))

    def _escaped(self) -> str:
        """The character of an escape, the backslash being read."""
        if match := _CODES.match(self.source, self.at):
            self.at = match.end()
            return chr(int(match[1] or match[2], 16))
        character = self._take()
        if character in _CONTROLS:
            return _CONTROLS[character]
        if not character or character.isalnum():
            self.at -= 1
            raise self._wrong(f"the escape '\\{character}'")
        return character

    def _class(self) -> np.ndarray:
        """[0x110000] bool of a class, the bracket being read."""
        begin = self.at
        negated = self._peek() == "^"
        self.at += negated
        mask = np.zeros(CODE_POINTS, dtype=bool)
        first = True
        while first or self._peek() != "]":
            first = False
            if not self._peek():
                self.at = begin - 1
                raise self._wrong("'[' is not closed")
            low = high = self._member()
            if self._peek() == "-" and self.source[self.at + 1 : self.at + 2] not in ("", "]"):
                self.at += 1
                high = self._member()
                if isinstance(low, np.ndarray) or isinstance(high, np.ndarray) or high < low:
                    raise self._wrong("a range that does not rise")
            if isinstance(low, np.ndarray):
                mask |= low
                continue
            folded = fold_table().single[low : high + 1]
            mask[folded[folded >= 0]] = True
        self.at += 1
        return ~mask if negated else mask

    def _member(self) -> int | np.ndarray:
        """A code point, or the mask of a shorthand."""
        character = self._take()
        if character == "\\":
            if self._peek() in _SHORTHANDS:
                return _SHORTHANDS[self._take()]()
            character = self._escaped()
        return ord(character)


def parse(source: str):
    """The syntax tree of a pattern. Raises PatternError."""
    return _Parser(source).parse()


def sets_of(tree) -> Iterable[SymbolSet]:
    """The sets of symbols that a syntax tree tells apart."""
    if isinstance(tree, Symbols):
        yield tree.ranges
    elif isinstance(tree, Repeat):
        yield from sets_of(tree.part)
    elif isinstance(tree, Sequence | Choice):
        for part in tree.parts if isinstance(tree, Sequence) else tree.options:
            yield from sets_of(part)


# ── the automaton of a pattern ───────────────────────────────────────────────────────────────────────────────────────

_ACCEPT = 0


class _Nfa:
    """Thompson's construction. State 0 accepts; sets of states are the bits of an integer."""

    def __init__(self, tree):
        self.silent: list[list[int]] = [[]]  # edges that read nothing
        self.at_boundary: list[list[int]] = [[]]  # the same, but only between a word character and another
        self.reads: list[tuple[SymbolSet, int] | None] = [None]
        self.start = self._add(tree, _ACCEPT)

    def _state(self) -> int:
        if len(self.reads) >= MOST_NFA_STATES:
            raise PatternError(f"repetitions that make it longer than {MOST_NFA_STATES} states; {ACCEPTED}")
        self.silent.append([])
        self.at_boundary.append([])
        self.reads.append(None)
        return len(self.reads) - 1

    def _add(self, tree, then: int) -> int:
        """Build what matches `tree` and goes on at `then`; where it begins."""
        if isinstance(tree, Sequence):
            for part in reversed(tree.parts):
                then = self._add(part, then)
            return then
        if isinstance(tree, Repeat):
            return self._repeat(tree, then)
        state = self._state()
        if isinstance(tree, Symbols):
            self.reads[state] = (tree.ranges, then)
        elif isinstance(tree, Boundary):
            self.at_boundary[state].append(then)
        else:
            self.silent[state] += [self._add(option, then) for option in tree.options]
        return state

    def _repeat(self, tree: Repeat, then: int) -> int:
        if tree.most is None:
            loop = self._state()
            self.silent[loop] += [self._add(tree.part, loop), then]
            then = loop
        else:
            end = then
            for _ in range(tree.most - tree.least):
                option = self._state()
                self.silent[option] += [self._add(tree.part, then), end]
                then = option
        for _ in range(tree.least):
            then = self._add(tree.part, then)
        return then

    def closures(self, across_boundaries: bool) -> list[int]:
        """For each state, the set of states that it is in without reading."""
        closed = []
        for state in range(len(self.reads)):
            found, new = 1 << state, [state]
            while new:
                each = new.pop()
                for after in self.silent[each] + (self.at_boundary[each] if across_boundaries else []):
                    if not found >> after & 1:
                        found |= 1 << after
                        new.append(after)
            closed.append(found)
        return closed


def pattern_dfa(tree, alphabet: Alphabet, rule: int, limit: int) -> Dfa:
    """The automaton that finds a pattern anywhere in a text (subset construction).

    Args:
        tree: of `parse`; the alphabet must know its sets.
        rule: index of the rule.
        limit: of states.

    Raises:
        PatternError: it matches the empty text, or nothing, or has more than `limit` states.
    """
    nfa = _Nfa(tree)
    plain, bounded = nfa.closures(False), nfa.closures(True)
    if bounded[nfa.start] >> _ACCEPT & 1:
        raise PatternError(f"it matches the empty text; {ACCEPTED} that need a character")
    sets = list(dict.fromkeys(ranges for ranges, _ in filter(None, nfa.reads)))
    if () in sets:
        raise PatternError(f"a class of which no character is left after folding; {ACCEPTED}")
    has_boundary = any(nfa.at_boundary)
    # Columns: classes of the alphabet that this pattern does not tell apart.
    signature = np.stack([alphabet.members(ranges) for ranges in sets] + [alphabet.word & has_boundary])
    kinds, columns = np.unique(signature, axis=1, return_inverse=True)
    place = {ranges: i for i, ranges in enumerate(sets)}
    moves = [
        [plain[read[1]] if read is not None and kinds[place[read[0]], k] else 0 for read in nfa.reads]
        for k in range(kinds.shape[1])
    ]
    word = kinds[-1].tolist()

    start = (plain[nfa.start], False)
    numbers, queue = {start: 0}, [start]
    after, hits, late, ends = [], [], [], []
    for states, inside_word in queue:
        across = _join(bounded, states)
        ends.append(bool(inside_word and across >> _ACCEPT & 1))
        rows = [], [], []
        for k, is_word in enumerate(word):
            reading = across if is_word != inside_word else states
            early = reading >> _ACCEPT & 1
            moved = _join(moves[k], reading)
            here = moved >> _ACCEPT & 1
            key = (moved & ~(1 << _ACCEPT) | plain[nfa.start], is_word)
            if key not in numbers:
                numbers[key] = len(queue)
                queue.append(key)
                if len(queue) > limit:
                    raise PatternError(f"it needs more than {limit} states; {ACCEPTED} that repeat less")
            for row, value in zip(rows, (numbers[key], early | here, here)):
                row.append(value)
        for table, row in zip((after, hits, late), rows):
            table.append(row)
    as_rule = np.int32(rule + 1)
    return Dfa(
        np.array(after, dtype=np.int32), np.array(hits, dtype=np.int32) * as_rule,
        np.array(late, dtype=np.int32) * as_rule, np.array(ends, dtype=np.int32) * as_rule,
        columns.reshape(-1).astype(np.int32),
    ).minimal()  # fmt: skip


def _join(sets: list[int], states: int) -> int:
    """The union of the sets of all states in a set."""
    joined = 0
    while states:
        lowest = states & -states
        joined |= sets[lowest.bit_length() - 1]
        states ^= lowest
    return joined
