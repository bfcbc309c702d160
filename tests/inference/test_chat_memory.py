"""Chat with a memory: what reaches the model and is shown, commands in words and with a slash, errors; generate.py
--chat --memory."""

import re
import shutil

import pytest

from model.sgm.memory import ExternalMemory
from model.sgm.memory_entry import MAX_TEXT
from model.sgm.routed import RoutedMemory
from model.sgm.router import Decision, MemoryRouter
from tests.inference.conftest import Talk, assert_has_read


class RuleOfThumb:
    """A router for which a question retrieves whatever matches, and "my" stores."""

    def __init__(self):
        self.asked = []

    def decide(self, text):
        self.asked.append(text)
        action = "retrieve" if text.endswith("?") else "store" if "my" in text else "neither"
        return Decision(action, 0.875, 0.9, "fact")

    def trust(self, query, matches):
        return [0.75] * len(matches)


@pytest.fixture
def routed(tmp_path):
    with ExternalMemory(tmp_path / "m.db") as memory:
        yield RoutedMemory(memory, RuleOfThumb())


def test_what_is_retrieved_reaches_the_model_and_is_shown_on_request(tiny_model, routed):
    talk = Talk(tiny_model(), routed)
    first, second = talk("my cat is Çakıl 🐈"), talk("the cat ?")
    assert [entry.text for entry in routed.memory.list()] == ["my cat is Çakıl 🐈"]
    transcript = (
        f"User: my cat is Çakıl 🐈\nAssistant: {first}\nMemory: my cat is Çakıl 🐈\nUser: the cat ?\nAssistant: "
    )
    assert_has_read(talk.conversation, f"{transcript}{second}\n".encode())
    assert routed.router.asked == ["my cat is Çakıl 🐈", "the cat ?"] and talk.notes == []
    shown = talk("/show on", "my dog is Max", "a cat ?", "hm")
    lines = [line for line in shown.splitlines() if line.startswith(("[router", "[stored", "[retrieved"))]
    (match,) = routed.memory.retrieve("a cat ?")
    assert lines == [
        "[router: store 0.88]", "[stored #2 fact: my dog is Max]", "[router: retrieve 0.88]",
        f"[retrieved, trust 0.75, score {match.score:.2f}: #1 fact: my cat is Çakıl 🐈]", "[router: neither 0.88]",
    ]  # fmt: skip
    assert "[router" not in talk("/show off", "a cat ?") and talk.notes == []
    talk("/show maybe")
    assert talk.notes == ["/show: 'maybe': accepted are on and off"]


def test_commands_in_words_are_answered_without_the_model(tiny_model, routed):
    talk = Talk(tiny_model(), routed)
    assert talk("list") == "Nothing is remembered.\n"
    assert talk("remember İzmir'de deniz", "remember two seas") == (
        "Remembered #1 fact: İzmir'de deniz\nRemembered #2 fact: two seas\n"
    )
    assert talk("list") == "#2 fact: two seas\n#1 fact: İzmir'de deniz\n"
    assert talk("forget seas", "forget seas") == "Forgot #2 fact: two seas\nNothing like that is remembered.\n"
    assert talk.given == [] and talk.conversation.stream.position == 0 and talk.notes == []


def test_where_several_entries_match_they_are_shown_and_stay(tiny_model, routed):
    talk = Talk(tiny_model(), routed)
    routed.memory.remember_all(["My car is red", "The car broke down", "My career is law"])
    told = (
        "#1 fact: My car is red\n#2 fact: The car broke down\n"
        "These words are in 2 entries, and none is forgotten; /forget #ID forgets one.\n"
    )
    assert talk("forget car.", "/forget car", "arabamı unut") == told * 2 + "Nothing like that is remembered.\n"
    assert len(routed.memory) == 3 and talk.given == []
    assert talk("Forget the car!", "forget 1") == "Forgot #2 fact: The car broke down\nForgot #1 fact: My car is red\n"
    talk("Forget you!", "seni unut")
    assert [text for text, _ in talk.given] == [b"Forget you!", b"seni unut"] and len(routed.memory) == 1
    routed.memory.remember_all([f"number {i}" for i in range(70)])
    assert talk("/forget number").count("\n") == 51


def test_commands_of_the_memory(tiny_model, routed, tmp_path):
    talk = Talk(tiny_model(), routed)
    assert talk("/remember bir 😀", "/remember  two\udcff\0 ", "/list", "/list fact") == (
        "Remembered #1 fact: bir 😀\nRemembered #2 fact: two\ufffd\\x00\n"
        + "#2 fact: two\ufffd\\x00\n#1 fact: bir 😀\n" * 2
    )
    routed.memory.list = None  # to count, entries need not be read
    assert talk("/memory") == "2 remembered: fact 2, episode 0, skill 0; writes left today: 98\n"
    del routed.memory.list
    assert talk(f"/export {tmp_path}/a.json", "/forget #1", "/forget #1", "/forget two\udcff\0") == (
        f"Exported 2 to {tmp_path}/a.json\nForgot #1 fact: bir 😀\nNothing like that is remembered.\n"
        "Forgot #2 fact: two\ufffd\\x00\n"
    )
    assert (
        talk(f"/import {tmp_path}/a.json", "/list episode")
        == f"Imported 2 new from {tmp_path}/a.json\nNothing is remembered.\n"
    )
    assert talk.notes == [] and talk.given == [] and routed.router.asked == []
    routed.memory.daily_budget = None
    assert "; writes left today: no limit\n" in talk("/memory")
    assert "needs --memory" not in talk("/help")


def test_control_characters_of_entries_do_not_reach_the_terminal(tiny_model, routed):
    talk = Talk(tiny_model(), routed, temperature=0)
    routed.memory.remember("my \x1b]0;title\x07 \x9b31m cat\n\nsecond\tline")
    said = talk("/show on", "/list", "list", "a cat ?", "/forget cat", "/x\x1b[2J")
    reply = talk.given and said  # what the model says is bytes of its own
    told = [line for line in said.splitlines() if "cat" in line]
    assert told[:2] == ["#1 fact: my \\x1b]0;title\\x07 \\x9b31m cat second line"] * 2 and len(told) == 4
    assert all(line.isprintable() for line in (*told, *talk.notes)) and "/x\\x1b[2J" in talk.notes[0] and reply
    assert talk.given == [
        (b"a cat ?", ["my \x1b]0;title\x07 \x9b31m cat\n\nsecond\tline"])
    ]  # the model is given it raw


def test_what_is_too_long_to_be_stored_is_told(tiny_model, routed):
    talk = Talk(tiny_model(), routed)
    line = "my " + "x" * MAX_TEXT
    talk(line)
    assert talk.notes == ["memory: not stored, the line is too long; accepted are 10,000 characters"]
    assert talk.given == [(line.encode(), [])] and len(routed.memory) == 0
    assert talk("remember: " + "x" * MAX_TEXT) == "" and len(talk.notes) == 1 and len(talk.given) == 1
    assert talk("/remember " + "x" * (MAX_TEXT + 1)) == "" and "1 to 10000 characters" in talk.notes[0]
    talk("x" * (MAX_TEXT + 1))  # was not to be stored
    assert talk.notes == []


def test_errors_of_the_memory_do_not_end_the_chat(tiny_model, routed, tmp_path):
    talk = Talk(tiny_model(), routed)
    (tmp_path / "text").write_text("{")
    wrong = ["/list facts", "/forget #one", "/forget #", f"/forget #{10**30}", "/remember",
             f"/import {tmp_path}/text", "/import /missing", "/import ~no-such-user/x", "/export ~no-such-user/x",
             f"/export {tmp_path}/m.db", f"/export {tmp_path}/m.db-wal", f"/export {tmp_path}/m.db.router.safetensors",
             "/export a\0b", f"/export {tmp_path}", "/import \udcff",
             "/forget", "/memory now"]  # fmt: skip
    assert talk(*wrong) == "" and len(talk.notes) == len(wrong)
    assert all(note.startswith(line.split()[0]) and "\n" not in note for note, line in zip(talk.notes, wrong))
    assert routed.memory.verify() == []

    routed.memory.daily_budget = 0
    shown = talk("/remember x", "remember x", "my x")
    assert [("budget" in note or "used up" in note) for note in talk.notes] == [True] * 3
    assert len(shown.splitlines()) >= 1 and talk.given == [(b"my x", [])] and len(routed.memory) == 0

    def broken(text):
        raise OSError("memory m.db: database is locked")

    routed.handle = broken
    assert talk("hello", "again") and talk.notes == ["memory: m.db: database is locked"] * 2
    assert len(talk.given) == 3


def test_ctrl_c_in_the_memory_is_not_the_end(tiny_model, routed):
    talk = Talk(tiny_model(), routed)

    def interrupted(*_, **__):
        raise KeyboardInterrupt

    routed.handle = routed.memory.remember = interrupted
    assert talk("hello", "/remember x") == "" and talk.notes == ["stopped"] * 2
    assert talk.conversation.stream.position == 0


# --- generate.py --chat --memory ---


@pytest.fixture
def remembering(call, router_file, tmp_path):
    """remembering(lines, *arguments): a chat with the memory m.db, whose router is there already."""
    shutil.copy(router_file, tmp_path / "m.db.router.safetensors")
    return lambda lines, *arguments: call(lines, "--chat", "--memory", "m.db", "--seed", "1", *arguments)


def test_the_router_is_trained_at_the_first_use(call, router_file, monkeypatch):
    trained = []
    monkeypatch.setattr("model.sgm.router.train_router", lambda: trained.append(1) or MemoryRouter.load(router_file))
    for said in ("training the memory's router, once, for some seconds: m.db.router.safetensors\n", ""):
        assert call(b"/memory\n", "--chat", "--memory", "m.db", "--seed", "1") == (
            0, "0 remembered: fact 0, episode 0, skill 0; writes left today: 100\n",
            said + "0 replies, 0 bytes; seed 1\n",
        )  # fmt: skip
    assert trained == [1]


def test_a_memory_lasts_over_chats(remembering, tmp_path):
    """Stored in words, by command and by the router, in two languages; the next chat finds it."""
    lines = "remember that my cat is called Luna 🐈\nunutma: kapının şifresi 4711\n/remember Ankara is cold\n/list\n"
    code, out, err = remembering(lines.encode())
    assert code == 0 and "0 replies" in err and len(out.splitlines()) == 6
    assert all(out.count(text) == 2 for text in ("Luna 🐈", "4711", "Ankara is cold"))

    lines = "/show on\nWhat is my cat called?\n/export all.json\nforget Luna\nkapının şifresi neydi?\n"
    lines += "My brother lives in Berlin.\nWrite a poem about the sea.\n/list\n/export ./m.db\n"
    code, out, err = remembering(lines.encode(), "--max-bytes", "20")
    assert code == 0 and "4 replies" in err and err.startswith("/export: path='m.db': of the memory itself")
    retrieved = [line for line in out.splitlines() if line.startswith("[retrieved, trust ")]
    assert len(retrieved) == 2 and "Luna 🐈" in retrieved[0] and "4711" in retrieved[1]
    decisions = re.findall(r"^\[router: (\w+)", out, re.MULTILINE)
    assert decisions == ["retrieve", "retrieve", "store", "neither"]
    listed = [line for line in out.splitlines() if line.startswith("#")]
    assert [line.partition(": ")[2] for line in listed] == [
        "My brother lives in Berlin.", "Ankara is cold", "kapının şifresi 4711",
    ]  # fmt: skip
    assert "Luna" in (tmp_path / "all.json").read_text("utf-8")


def test_lines_of_all_kinds_do_not_upset_the_memory(remembering):
    lines = [
        b"\xff\xfe raw",
        b"a\0b",
        b'"(* NEAR OR',
        b"x" * 20_000,
        "İ ı 😀 ' -- ;".encode(),
        b"/remember \xff",
        b"/forget '",
    ]
    code, _, err = remembering(b"\n".join(lines), "--max-bytes", "8")
    assert code == 0 and "5 replies" in err and "memory:" not in err


def test_a_memory_that_cannot_be_opened_is_one_line_and_code_2(call, tmp_path):
    (tmp_path / "text").write_text("no database, but long enough to be one that is damaged\n" * 100)
    for name in ("text", ".", "text/m.db"):
        code, out, err = call(b"x\n", "--chat", "--memory", name)
        assert code == 2 and out == "" and err.count("\n") == 1 and f"--memory {name!r}" in err, err


def test_a_damaged_router_is_one_line_and_code_2(call, tmp_path):
    (tmp_path / "m.db.router.safetensors").write_bytes(b"PK")
    code, out, err = call(b"/memory\n", "--chat", "--memory", "m.db")
    assert code == 2 and out == "" and err.count("\n") == 1 and "m.db.router.safetensors" in err
