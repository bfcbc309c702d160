"""Explicit commands: what is one, what is none, and what "forget" removes."""

import pytest

from model.sgm.commands import Command, forget, parse_command
from model.sgm.memory import ExternalMemory
from model.sgm.memory_entry import MAX_TEXT


@pytest.mark.parametrize(
    ("text", "name", "argument"),
    [
        ("Remember that my name is Ali.", "remember", "my name is Ali."), ("remember: tea", "remember", "tea"),
        ("don't forget to buy milk", "remember", "buy milk"), ("/remember a\nb", "remember", "a\nb"),
        ("Hatırla: kapı şifrem 42", "remember", "kapı şifrem 42"), ("HATIRLA: x", "remember", "x"),
        ("Unutma ki annem gelecek", "remember", "annem gelecek"), ("şunu not et: 😀", "remember", "😀"),
        ("forget my name", "forget", "my name"), ("Forget about Anna.", "forget", "Anna"),
        ("forget #12", "forget", "#12"),
        ("arabamı unut", "forget", "arabamı"), ("unut: kapı", "forget", "kapı"), ("unut 3", "forget", "3"),
        ("list", "list", ""), ("List facts", "list", "fact"), ("show my memories", "list", ""),
        ("/list skills", "list", "skill"),
        ("listele", "list", ""), ("becerileri listele", "list", "skill"), ("Neleri hatırlıyorsun?", "list", ""),
        ("What do you remember about me?", "list", ""),
    ],
)  # fmt: skip
def test_commands(text, name, argument):
    assert parse_command(f"  {text} ") == Command(name, argument)


@pytest.mark.parametrize(
    "text",
    [
        "", "Do you remember my name?", "Remember me?", "Remember when we met?", "forget it", "Forget about it.",
        "forget everything", "I forgot my name", "list three advantages of tea", "show me the way", "bunu unut",
        "adımı unuttum", "her şeyi unut", "Beni hatırlıyor musun?", "/remember", "remember:", "/listing", "\x00",
        "Forget you!", "forget about him", "Forget her, please.", "forget them all", "please forget us",
        "forget: these", "seni unut", "Onları unut!", "lütfen bizi unut", "unut: onu", "SİZİ UNUT",
        "Forget my name?", "adımı unut?",
    ],
)  # fmt: skip
def test_what_is_no_command(text):
    assert parse_command(text) is None


@pytest.mark.parametrize("run", [" ", ".", "!", " .", "\t\n", "x", "unut ", "all "])
def test_long_messages_are_read_as_short_ones(run):
    """Each of these makes a pattern that tries every way to part a run take minutes, or years."""
    long, short = run * (MAX_TEXT // 2 // len(run)), run * 2
    forms = ("forget x{}?", "forget x{}y", "forget x{}", "{}x unut?", "{}x unut y", "x{}unut", "remember{}that x",
             "remember{}x?", "remember that x{}", "hatırla{}: x", "unutma{}x", "list {}x", "list {}",
             "/forget {}x")  # fmt: skip
    for form in forms:
        one, other = (parse_command(form.format(each)) for each in (long, short))
        assert (one is None) == (other is None), form
        if one is not None:
            assert one.name == other.name, form
            assert one.argument.replace(" ", "") == other.argument.replace(" ", "") or len(one.argument) > 1000, form


def test_spaces_and_stops_do_not_count():
    assert parse_command("forget" + " " * 9000 + "my \n name" + " ." * 400) == Command("forget", "my name")
    assert parse_command("remember" + "\t" * 9000 + "that a\n  b ") == Command("remember", "a\n  b")
    assert parse_command(" " * 100_000 + "x unut" + " " * 100_000) == Command("forget", "x")
    assert parse_command("forget x" + " " * 100_000 + "?") is None
    assert parse_command("remember  me!") is None
    assert parse_command("remember that " + "x" * (MAX_TEXT - 14)).argument == "x" * (MAX_TEXT - 14)
    assert parse_command("remember that " + "x" * (MAX_TEXT - 13)) is None


# ── forgetting ───────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def memory(tmp_path):
    with ExternalMemory(tmp_path / "m.db", daily_budget=None) as made:
        yield made


def test_only_what_is_meant_is_forgotten(memory):
    for text in ("My career is law", "Your flat is in Bursa", "Köpeğim Karabaş", "Kapı şifresi 4711", "atlas"):
        memory.remember(text)
    before = memory.list()
    for text in ("car.", "you", "köpe", "şifre 47", "at", "at las", "#99", "0", "99", "xyzzy", "?!", "lawyer"):
        assert forget(memory, text) == ([], []), text
    assert memory.list() == before
    (gone,), none = forget(memory, "köpeğimi")
    assert (gone.text, none) == ("Köpeğim Karabaş", [])
    assert [entry.text for entry in forget(memory, "kapının şifresini")[0]] == []  # four letters: no ending is cut
    assert [entry.text for entry in forget(memory, "KAPI ŞİFRESİNİ")[0]] == ["Kapı şifresi 4711"]
    assert [entry.text for entry in forget(memory, "law career")[0]] == ["My career is law"]
    assert len(memory) == 2


def test_where_several_entries_match_none_is_forgotten(memory):
    first, second = memory.remember("My car is red"), memory.remember("The car is at the garage")
    assert forget(memory, "car") == ([], [first, second])
    assert len(memory) == 2
    assert forget(memory, "red car") == ([first], [])
    third = memory.remember("car", "episode")
    assert forget(memory, "car") == ([], [second, third])
    assert forget(memory, f"#{second.id}") == ([second], []) and forget(memory, str(third.id)) == ([third], [])
    for wrong in ("#", "#one", f"#{10**20}", "#-1"):
        with pytest.raises(ValueError, match="accepted is # and the number"):
            forget(memory, wrong)
