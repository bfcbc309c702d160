"""A matcher that shares nothing with the gate but the meaning of a policy: Python's re on the folded whole text."""

import re

from benchmarks.gate import folded as fold  # the benchmark's matcher, which has nothing of the gate either


def phrase_regex(phrase: str, word_boundaries: bool) -> str:
    """A regular expression over folded text for one phrase."""
    words = fold(phrase).split()
    body = r"\s+".join(map(re.escape, words))
    before = r"(?<!\w)" if word_boundaries and re.match(r"\w", words[0]) else ""
    after = r"(?!\w)" if word_boundaries and re.match(r"\w", words[-1][-1]) else ""
    return f"{before}{body}{after}"


def decoded(data: bytes) -> list[tuple[str, int]]:
    """(character, index of the byte that completed it) of a byte string; what is unfinished at its end is left out."""
    found, known = [], 0
    for i in range(1, len(data) + 1):
        text = settled(data[:i])
        found += [(c, i - 1) for c in text[known:]]
        known = len(text)
    return found


def settled(data: bytes) -> str:
    """The characters of a byte string that no continuation could change."""
    more = [b"AAAA", *(bytes([second]) + b"\x80\x80AAAA" for second in (0x80, 0x90, 0xA0, 0xBF))]
    texts = [(data + each).decode("utf-8", "replace") for each in more]
    return texts[0][: next(i for i, column in enumerate(zip(*texts)) if len(set(column)) > 1)]


def completions(regexes: list[str], text: str) -> tuple[list[bool], bool]:
    """Which symbols of a folded text complete a match, and whether its end does.

    A match is complete with its last symbol where nothing that follows could undo it, else with the one after it.
    """
    hits, ends = [False] * len(text), False
    for regex in regexes:
        for end in range(1, len(text) + 1):

            def matches(following: str, regex=regex, end=end) -> set[int]:
                exactly = re.compile(rf"(?:{regex})(?={following}\Z)")
                return {start for start in range(end) if exactly.match(text[:end] + following, start)}

            word, other, nothing = matches("a"), matches("!"), matches("")
            certain = word & other
            hits[end - 1] |= bool(certain)
            if end < len(text):
                hits[end] |= bool((word if re.match(r"\w", text[end]) else other) - certain)
            else:
                ends |= bool(nothing - certain)
    return hits, ends
