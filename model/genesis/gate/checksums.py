"""Numbers with a checksum, which no regular expression of sensible size describes: transition functions, by name.

A function takes (state, digit or None, whether the symbol is a separator) and gives (state, whether a number is
complete).

Notable: a number begins with the first digit of a run of digits and is complete with its own last digit, whatever
follows: what follows a card number does not make it less of one.
"""

import numpy as np

from model.genesis.gate.dfa import Alphabet, Dfa
from model.genesis.gate.patterns import PatternError

PREFIX = "builtin:"
DIGITS = "0123456789"
SEPARATORS = " -‐‒–−"  # of groups of digits; others fold to these
_IDLE, _RUN = "idle", "run"  # the last symbol was no digit; in digits that cannot become a number any more


def _luhn(grouped: bool):
    """13 to 19 digits that pass the Luhn checksum (ISO/IEC 7812), from the first digit of a run; it is not 0.

    A state is (digits read, sum with the last digit as it is, sum with the last one doubled, just after a separator).
    """

    def step(state, digit: int | None, separator: bool):
        if digit is None:
            goes_on = grouped and separator and not isinstance(state, str) and not state[3]
            return ((*state[:3], True) if goes_on else _IDLE), False
        if state == _IDLE:
            return ((1, digit, _doubled(digit), False) if digit else _RUN), False
        if state == _RUN or state[0] == 19:
            return _RUN, False
        n, plain, doubled, _ = state
        after = (n + 1, (doubled + digit) % 10, (plain + _doubled(digit)) % 10, False)
        return after, after[0] >= 13 and after[1] == 0

    return step


def _doubled(digit: int) -> int:
    return 2 * digit - 9 * (digit > 4)


def _tckn(state, digit: int | None, separator: bool):
    """T.C. Kimlik No: 11 digits d₁ … d₁₁ in a row, d₁ ≠ 0, with two check digits, from the first digit of a run.

    d₁₀ = 7 · (d₁ + d₃ + … + d₉) − (d₂ + d₄ + … + d₈) mod 10, and d₁₁ = d₁ + … + d₁₀ mod 10.
    """
    if digit is None:
        return _IDLE, False
    if state == _IDLE:
        return ((1, digit, 0) if digit else _RUN), False
    if state == _RUN or state[0] == 11:
        return _RUN, False
    n, odd, even = state
    if n == 9:
        return ((10, (odd + even + digit) % 10, 0) if digit == (7 * odd - even) % 10 else _RUN), False
    if n == 10:
        return _RUN, digit == odd
    return (n + 1, (odd + digit * (n % 2 == 0)) % 10, (even + digit * (n % 2)) % 10), False


_BUILTINS = {"luhn": _luhn(grouped=False), "luhn-grouped": _luhn(grouped=True), "tckn": _tckn}


def builtin_step(source: str):
    """The transition function of "builtin:NAME"; None for other patterns. Raises PatternError for an unknown name."""
    if not source.startswith(PREFIX):
        return None
    if (name := source.removeprefix(PREFIX)) not in _BUILTINS:
        raise PatternError(f"unknown {source!r}; accepted are {', '.join(PREFIX + each for each in _BUILTINS)}")
    return _BUILTINS[name]


def builtin_dfa(step, alphabet: Alphabet, rule: int) -> Dfa:
    """The automaton of a transition function (state, digit or None, separator) → (state, complete)."""
    kinds = [*((digit, False) for digit in range(10)), (None, True), (None, False)]
    numbers, queue = {_IDLE: 0}, [_IDLE]
    after, hits = [], []
    for state in queue:
        row = [step(state, *kind) for kind in kinds]
        for each, _ in row:
            if each not in numbers:
                numbers[each] = len(queue)
                queue.append(each)
        after.append([numbers[each] for each, _ in row])
        hits.append([hit * (rule + 1) for _, hit in row])
    columns = np.full(len(alphabet), len(kinds) - 1, dtype=np.int32)
    columns[alphabet.classes[list(map(ord, SEPARATORS))]] = 10
    columns[alphabet.classes[list(map(ord, DIGITS))]] = np.arange(10)
    table = np.array(hits, dtype=np.int32)
    return Dfa(np.array(after, dtype=np.int32), table, table, np.zeros(len(table), dtype=np.int32), columns)
