"""Messages through a memory: what is stored, retrieved, carried out and refused."""

import pytest

from model.sgm.memory import ExternalMemory
from model.sgm.memory_entry import MAX_TEXT
from model.sgm.routed import RoutedMemory
from model.sgm.router import Decision


@pytest.fixture
def chat(router, tmp_path):
    with ExternalMemory(tmp_path / "m.db", daily_budget=5) as memory:
        yield RoutedMemory(memory, router)


def test_a_conversation(chat):
    stored = chat.handle("My dog's name is Rex.")
    assert stored.stored.text == "My dog's name is Rex." and stored.decision.action == "store"
    assert chat.handle("Arabam kırmızı.").stored.confidence == pytest.approx(
        chat.router.decide("Arabam kırmızı.").trust
    )
    for question, text in (("What is my dog's name?", "My dog's name is Rex."), ("Arabam ne renk?", "Arabam kırmızı.")):
        routed = chat.handle(question)
        assert [match.entry.text for match, trust in routed.retrieved if trust >= 0.5] == [text]
    assert {entry.text: entry.accesses for entry in chat.memory.list()} == {
        "My dog's name is Rex.": 1, "Arabam kırmızı.": 1,
    }  # fmt: skip
    for text in ("Write a poem about the sea.", "Merhaba!", "", "x" * (MAX_TEXT + 1), "\ud800"):
        routed = chat.handle(text)
        assert routed.stored is None and not routed.retrieved
    assert len(chat.memory) == 2


def test_nothing_below_the_threshold_is_retrieved(chat, monkeypatch):
    chat.handle("remember that my dog is called Rex")
    chat.handle("remember that my cat is called Rex too")
    monkeypatch.setattr(chat.router, "trust", lambda query, matches: [0.4, 0.6][: len(matches)])
    assert [trust for _, trust in chat.retrieve("what is my dog called")] == [0.6]
    monkeypatch.setattr(chat.router, "trust", lambda query, matches: [0.49] * len(matches))
    assert chat.retrieve("what is my dog called") == []
    with pytest.raises(ValueError, match=r"threshold=1\.5"):
        RoutedMemory(chat.memory, chat.router, threshold=1.5)


def test_commands_are_carried_out(chat):
    entry = chat.handle("Unutma: köpeğimin adı Karabaş").stored
    assert entry.confidence == 1.0 and chat.handle("listele").listed == [entry]
    assert chat.handle("list skills").listed == []
    assert chat.handle("köpeğimi unut").forgotten == [entry] and len(chat.memory) == 0
    entry = chat.handle("remember: tea").stored
    assert chat.handle("forget #999").forgotten == [] == chat.handle("forget 0").forgotten
    routed = chat.handle(f"forget #{entry.id}")
    assert routed.forgotten == [entry] and routed.command == "forget" and routed.decision is None
    with pytest.raises(ValueError, match="text=b''"):
        chat.handle(b"")


def test_forgetting_what_several_entries_have_forgets_none(chat):
    entries = [chat.handle(f"remember: my {what} is red").stored for what in ("car", "flat")]
    routed = chat.handle("forget what is red")
    assert routed.command is None  # "what ..." is no command
    routed = chat.handle("Forget red.")
    assert (routed.command, routed.forgotten, routed.matching) == ("forget", [], entries) and len(chat.memory) == 2
    routed = chat.handle("forget my red car")
    assert (routed.forgotten, routed.matching) == ([entries[0]], [])
    for text in ("Forget you!", "seni unut", "forget my ca", "Forget flats."):
        assert not chat.handle(text).forgotten
    assert len(chat.memory) == 1


def test_what_is_too_long_is_told(chat, monkeypatch):
    for text in ("remember: " + "x" * MAX_TEXT, "remember that " + "x" * MAX_TEXT, "Unutma ki " + "ş " * MAX_TEXT):
        routed = chat.handle(text)
        assert (routed.command, routed.too_long, routed.stored) == ("remember", True, None)
    monkeypatch.setattr(chat.router, "decide", lambda text: Decision("store", 0.9, 0.9, "fact"))
    assert chat.handle("x" * (MAX_TEXT + 1)).too_long and len(chat.memory) == 0
    routed = chat.handle("  " + "x" * MAX_TEXT + "\n")
    assert not routed.too_long and len(routed.stored.text) == MAX_TEXT
    monkeypatch.setattr(chat.router, "decide", lambda text: Decision("neither", 0.9, 0.9, "fact"))
    assert not chat.handle("x" * (MAX_TEXT + 1)).too_long


def test_a_spent_budget_is_told(chat):
    for i in range(5):
        assert chat.handle(f"remember: text {i}").stored
    assert chat.handle("remember: text 5").budget_exceeded
    routed = chat.handle("My name is Ali.")
    assert routed.budget_exceeded and routed.stored is None and routed.decision.action == "store"
    assert len(chat.memory) == 5


def test_a_doubtful_statement_is_not_stored(chat, monkeypatch):
    for probability, kept in ((0.55, False), (0.65, True)):
        monkeypatch.setattr(chat.router, "decide", lambda text, p=probability: Decision("store", p, 0.9, "skill"))
        assert bool(chat.handle("To fix it, wait.").stored) == kept
    assert chat.memory.list("skill")
