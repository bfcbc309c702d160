"""Policy files: what they mean, and what is said of bad ones."""

import pytest

from model.genesis.gate.automaton import compile_policy
from model.genesis.gate.folding import fold
from model.genesis.gate.policy import DEFAULT_POLICY, Policy, load_policy


@pytest.fixture
def write(tmp_path):
    """write(text, name) → the path of a new file."""

    def make(text: str | bytes, name: str = "policy.toml"):
        path = tmp_path / name
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return path

    return make


def rules(policy: Policy) -> dict:
    return {rule.id: rule for rule in policy.rules}


def test_a_file_of_everything(write):
    write("\ufeffkötü  söz\n\n  ŞEY \r\nkötü\tsöz\n".encode(), "list.txt")
    path = write(
        """
        [hate]
        phrases = ["ﬁlth", "İki  Kelime"]
        phrases_file = "list.txt"
        word_boundaries = false
        patterns = ['ab+', "builtin:luhn"]
        [violence]
        phrases = ["filth"]
        [violence.patterns]
        shout = 'a{3}'
        [off]
        enabled = false
        phrases = ["x"]
        [empty]
        """
    )
    policy = load_policy(path, default=False)
    kinds = [(rule.category, rule.kind, rule.text, rule.word_boundaries) for rule in policy.rules]
    assert kinds == [
        ("hate", "phrase", "filth", False), ("hate", "phrase", "iki kelime", False),
        ("hate", "phrase", "kotu soz", False), ("hate", "phrase", "sey", False),
        ("hate", "pattern", "ab+", True), ("hate", "pattern", "builtin:luhn", True),
        ("violence", "phrase", "filth", True), ("violence", "pattern", "a{3}", True),
    ]  # fmt: skip
    assert "hate/builtin:luhn" in rules(policy) and "violence/shout" in rules(policy)
    assert len(rules(policy)) == len(policy.rules)
    assert all(fold(rule.text) == rule.text for rule in policy.rules if rule.kind == "phrase")
    assert load_policy(path, default=False) == policy and hash(policy)
    compile_policy(policy)


def test_ids_stay_when_lists_change_and_tell_no_phrase(write):
    first = load_policy(write('[c]\nphrases = ["geheim", "andere"]\npatterns = ["a+"]'), default=False)
    second = load_policy(write('[c]\npatterns = ["b", "a+"]\nphrases = ["x", "GEHEİM"]', "2.toml"), default=False)
    shared = rules(first).keys() & rules(second).keys()
    assert {rules(first)[name].text for name in shared} == {"geheim", "a+"}
    assert not any("geheim" in name for name in shared)


def test_the_default_policy_comes_first_unless_it_is_not_wanted(write):
    default = load_policy()
    assert {rule.category for rule in default.rules} == {"privacy"} and len(default.rules) >= 8
    path = write('[privacy]\nphrases = ["my address"]')
    both = load_policy(path)
    assert both.rules[: len(default.rules)] == default.rules and len(both.rules) == len(default.rules) + 1
    assert len(load_policy(path, default=False).rules) == 1
    assert load_policy(default=False) == Policy() and load_policy(DEFAULT_POLICY) == default


def test_files_extend_replace_and_disable(write, tmp_path):
    (tmp_path / "sub").mkdir()
    write('[c.patterns]\none = "a1"\ntwo = "a2"\n[d]\nphrases = ["y"]\n', "sub/base.toml")
    write('extends = "base.toml"\ndisabled = ["privacy/email", "c/two"]\n[c.patterns]\none = "b1"', "sub/middle.toml")
    write('extends = "sub/middle.toml"\n[d]\nenabled = false', "top.toml")
    found = rules(load_policy(tmp_path / "top.toml"))
    assert found["c/one"].text == "b1" and "c/two" not in found and "privacy/email" not in found
    assert "privacy/tckn" in found and not any(name.startswith("d/") for name in found)
    write('extends = "default"\ndisabled = ["privacy/card"]', "less.toml")
    assert rules(load_policy(tmp_path / "less.toml", default=False)).keys() == rules(load_policy()).keys() - {
        "privacy/card"
    }
    write('extends = "loop.toml"\n[c]\nphrases = ["once"]', "loop.toml")
    assert len(load_policy(tmp_path / "loop.toml", default=False).rules) == 1


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[c", ["TOML"]),
        (b"[c]\nphrases = ['\xff']", ["byte 16", "UTF-8"]),
        ("[c]\nphrase = ['x']", ["[c]", "phrase", "phrases_file"]),
        ("[c]\nphrases = 'x'", ["[c]", "phrases='x'", "list"]),
        ("[c]\nphrases = ['x', 3]", ["[c]", "phrases 2=3", "string"]),
        ("[c]\nphrases = ['x', '\u200b\u0301 ']", ["[c]", "phrases 2", "left after folding"]),
        ("[c]\nphrases_file = 'none.txt'", ["[c]", "phrases_file", "none.txt", "No such file"]),
        ("[c]\nphrases_file = ['a']", ["[c]", "phrases_file=['a']", "string"]),
        ("[c]\nword_boundaries = 'no'", ["[c]", "word_boundaries='no'", "true or false"]),
        ("[c]\nenabled = 1", ["[c]", "enabled=1", "true or false"]),
        ("[c]\npatterns = [1]", ["[c]", "patterns 1=1", "string"]),
        ("[c.patterns]\n'a b' = 'x'", ["[c]", "'a b'", "letters"]),
        ("[c.patterns]\na = 1", ["[c]", "a=1", "string"]),
        ("['a/b']\nphrases = ['x']", ["a/b", "letters"]),
        ("c = 1", ["c:", "categories"]),
        ("extends = 1", ["extends=1", '"default"']),
        ("extends = 'none.toml'", ["none.toml", "No such file"]),
        ("disabled = 'x'", ["disabled='x'", "list"]),
        ("disabled = ['c/x']", ["'c/x'", "ids"]),
    ],
)
def test_bad_files_are_named_with_category_and_entry(write, text, words):
    with pytest.raises(ValueError, match=r"^policy .*accepted") as caught:
        load_policy(write(text), default=False)
    assert ("\n" not in str(caught.value) and "policy.toml" in str(caught.value)) or "none.toml" in str(caught.value)
    assert all(word in str(caught.value) for word in words), caught.value


def test_a_bad_line_of_a_list_and_a_bad_pattern_are_named(write):
    write(b"fine\n\xff\n", "list.txt")
    with pytest.raises(ValueError, match=r"policy.toml: \[c\] phrases_file .*list\.txt.* byte 5 is not UTF-8"):
        load_policy(write("[c]\nphrases_file = 'list.txt'"))
    write("fine\n\n\u200b\u0301\n".encode(), "list.txt")
    with pytest.raises(ValueError, match=r"policy.toml: \[c\] .*list.txt line 3 "):
        load_policy(write("[c]\nphrases_file = 'list.txt'"))
    with pytest.raises(ValueError, match=r"policy.toml: \[c\] patterns loud 'a\*': it matches the empty text"):
        compile_policy(load_policy(write("[c.patterns]\nloud = 'a*'")))


def test_missing_files_and_folders(tmp_path):
    for path in (tmp_path / "missing.toml", tmp_path):
        with pytest.raises(ValueError, match=r"^policy .*accepted is a readable file"):
            load_policy(path)
