"""The texts of a memory: which words are one, which texts are one, and what a terminal is given of them."""

import pytest

from model.sgm.memory_text import contains_all, identity, one_line, same_word, search_words, shown


@pytest.mark.parametrize(
    ("a", "b", "same"),
    [
        ("arabam", "arabamı", True), ("köpeğim", "köpeğimin", True), ("telefon", "telefonumu", True),
        ("doktor", "doktorlar", True), ("okulum", "okulumda", True), ("sister", "sisters", True), ("at", "at", True),
        ("car", "career", False), ("you", "your", False), ("adım", "adımı", False), ("planet", "plane", False),
        ("paint", "painter", False), ("law", "lawyer", False), ("telefon", "telefonculuk", False),
        ("köpek", "köpekçi", False),
        ("career", "care", False), ("doktor", "doktorlarımdan", False), ("abcde", "abcdf", False), ("", "abc", False),
    ],
)  # fmt: skip
def test_only_an_ending_of_a_long_word_makes_no_other_word(a, b, same):
    (a,), (b,) = search_words(a) or [""], search_words(b)
    assert same_word(a, b) == same == same_word(b, a)
    assert contains_all([b, "other"], [a]) == same
    assert not contains_all([b], [a, "other"])


@pytest.mark.parametrize(
    ("a", "b", "same"),
    [
        ("My dog.", "my  DOG", True), ("Kızım İPEK", "kızım ipek", True), ("IŞIK açık", "ışık AÇIK", True),
        ("I live in Rome!", "i LIVE in Rome…", True), ("Şifre é", "şifre e\u0301", True), (" x\n y", "x y", True),
        ("!!!", "...", False), ("!", "!!", False), ("...", "…", False), ("Kızın adı Sıla", "Kızın adı Sila", False),
        ("Kızın adı SILA", "Kızın adı Sila", False), ("ön", "on", False), ("2⁵", "25", False), ("①", "1", False),
        ("Maße", "Masse", False), ("x?", "x", False), ("😀", "😁", False),
    ],
)  # fmt: skip
def test_texts_are_one_but_for_case_spaces_normalisation_and_a_full_stop(a, b, same):
    assert (identity(a) == identity(b)) == same


def test_a_terminal_is_given_no_control_characters():
    controls = [chr(code) for code in (*range(32), *range(127, 160))]
    line = shown("".join(controls))
    assert line.isprintable() and line == "".join(f"\\x{ord(control):02x}" for control in controls)
    assert shown("ağ 😀 \udcff  x") == "ağ 😀 \ufffd  x"
    assert shown(one_line("\x1b[31m a\n\tb\u2028\x9bc ")) == "\\x1b[31m a b \\x9bc"
