r"""Aho and Corasick's automaton (CACM 1975) for phrases, with word boundaries and runs of white space.

Notable: word boundaries are symbols. The text is read as if a mark stood wherever a word character meets another
character (before the text counts as another), and a phrase that must begin or end a word begins or ends with the mark.
The mark takes no step of its own: the transition for a symbol includes that for a mark before it.
"""

from collections.abc import Sequence

import numpy as np

from model.genesis.gate.dfa import Alphabet, Dfa

_NONE = np.iinfo(np.int32).max


def phrase_dfa(
    phrases: Sequence[tuple[str, bool, int]], alphabet: Alphabet, limit: int, largest_table: int
) -> Dfa | None:
    """The automaton that finds phrases anywhere in a text.

    Args:
        phrases: (phrase, word_boundaries, index of its rule). A phrase is folded, with single spaces for white space,
            and stands for any white space there. With word boundaries, an end of it that is a word character must also
            be the end of a word.
        alphabet: has a class for each of their symbols.
        limit: of states. largest_table: of states times columns.

    Returns:
        None when there are more states or entries than that.
    """
    used = np.unique(alphabet.classes[sorted({ord(c) for phrase, _, _ in phrases for c in phrase})])
    # Columns: classes that are in some phrase, white space as one, other word characters, all others; and the mark.
    space, other_word, other = len(used), len(used) + 1, len(used) + 2
    columns = np.where(alphabet.word, other_word, other).astype(np.int32)
    columns[used] = np.arange(len(used))
    columns[alphabet.space] = space
    W, mark = other + 1, other + 1
    word = np.zeros(W, dtype=bool)
    word[: len(used)], word[other_word] = alphabet.word[used], True

    children, found = _trie(phrases, columns, alphabet, mark)
    if len(children) > limit or len(children) * W > largest_table:
        return None
    delta, output, last = _automaton(children, found, W + 1)

    # States of the result: what a mark leads to is passed through. The root is two: after a word character, and not.
    kept = np.flatnonzero(last != mark)[1:]
    nodes = np.concatenate([[0, 0], kept])
    in_word = np.concatenate([[False, True], word[last[kept]]])
    number = np.zeros(len(delta), dtype=np.int32)
    number[kept] = np.arange(2, len(nodes), dtype=np.int32)

    marked = delta[nodes, mark]
    crossing = in_word[:, None] != word
    through = np.where(crossing, marked[:, None], nodes[:, None])
    after = delta[through, np.arange(W)]
    late = output[after]
    early = np.where(crossing, output[marked][:, None], _NONE)
    ends = np.where(in_word, output[marked], _NONE)
    following = np.where(after == 0, word.astype(np.int32), number[after])
    # A run of white space is one space: where one has been read, more of it changes nothing.
    spaced = np.concatenate([[False, False], last[kept] == space])
    following[spaced, space] = np.flatnonzero(spaced)
    late[spaced, space] = early[spaced, space] = _NONE
    hits = np.minimum(early, late)
    rules = [np.where(each == _NONE, 0, each + 1).astype(np.int32) for each in (hits, late, ends)]
    return Dfa(following.astype(np.int32), *rules, columns)


def _trie(
    phrases: Sequence[tuple[str, bool, int]], columns: np.ndarray, alphabet: Alphabet, mark: int
) -> tuple[list[dict[int, int]], dict[int, int]]:
    """(children by column of each node, the lowest rule that ends in a node)."""
    children: list[dict[int, int]] = [{}]
    found: dict[int, int] = {}
    of = {c: (int(columns[alphabet.classes[ord(c)]]), bool(alphabet.word[alphabet.classes[ord(c)]]))
          for phrase, _, _ in phrases for c in set(phrase)}  # fmt: skip
    for phrase, bounded, rule in phrases:
        symbols = [of[c] for c in phrase]
        path = [mark] if bounded and symbols[0][1] else []
        before = symbols[0][1]
        for column, is_word in symbols:
            if is_word != before:
                path.append(mark)
            path.append(column)
            before = is_word
        if bounded and before:
            path.append(mark)
        node = 0
        for column in path:
            if column not in children[node]:
                children[node][column] = len(children)
                children.append({})
            node = children[node][column]
        found[node] = min(rule, found.get(node, rule))
    return children, found


def _automaton(
    children: list[dict[int, int]], found: dict[int, int], width: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(transitions [N, width], the lowest rule complete in each node [N], the column that led to it [N])."""
    N = len(children)
    delta = np.zeros((N, width), dtype=np.int32)
    output = np.full(N, _NONE, dtype=np.int32)
    output[list(found)] = list(found.values())
    last = np.full(N, -1, dtype=np.int32)
    failure = np.zeros(N, dtype=np.int32)
    level = [0]
    while level:  # one depth of the trie at a time
        edges = [(node, column, child) for node in level for column, child in children[node].items()]
        level = [child for _, _, child in edges]
        if edges:
            parent, column, child = np.array(edges).T
            # What the parent's failure would do; children of the root fail to the root.
            failure[child] = np.where(parent == 0, 0, delta[failure[parent], column])
            last[child] = column
            delta[parent, column] = child
            output[child] = np.minimum(output[child], output[failure[child]])
            delta[child] = delta[failure[child]]
    return delta, output, last
