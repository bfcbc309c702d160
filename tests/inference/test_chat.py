"""Chat: every reply against generate() on the whole transcript, the state against the full forward, the memory's part
in both, commands, Ctrl-C; and generate.py --chat through a pipe and a terminal."""

import contextlib
import errno
import fcntl
import importlib.util
import io
import json
import os
import pty
import random
import re
import select
import shutil
import signal
import subprocess
import sys
import termios
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from model import ByteStream, save_checkpoint
from model.genesis.gate.byte_gate import GateLog
from model.genesis.gate.classifier import HiddenStateGate
from model.genesis.gate.policy import Policy, Rule, load_policy
from model.inference.chat import COMMANDS, OF_MEMORY, Chat, Conversation, framed
from model.inference.generate import generate
from model.sgm.memory import BudgetExceeded

SCRIPT = Path(__file__).parents[2] / "generate.py"
TURNS = ["Bugün hava ılık mı?".encode(), b"\xff\xfe\x00 not UTF-8", "👩‍👩‍👧 漢字".encode(), b"x" * 1500, b"", b"Why?\r"]

spec = importlib.util.spec_from_file_location("generate_script", SCRIPT)
script = importlib.util.module_from_spec(spec)
spec.loader.exec_module(script)


def say(conversation: Conversation, text: bytes, memories=()) -> tuple[bytes, str]:
    """(the reply, why it ended)."""
    pieces = list(conversation.reply(text, memories))
    assert [piece.finished for piece in pieces[:-1]] == [None] * (len(pieces) - 1)
    return b"".join(piece.data for piece in pieces), pieces[-1].finished


def assert_has_read(conversation: Conversation, transcript: bytes) -> None:
    """The state is that of one pass of the model over the transcript, also in what follows."""
    stream = conversation.stream
    assert stream.position == len(transcript)
    after = b" and then?"
    with torch.no_grad():
        logits = stream.model(torch.tensor([[*transcript, *after, 0]]))[:, len(transcript) :]
    found = stream.clone().score(torch.tensor([[*after, 0]]))
    assert (found - logits).abs().max() < 1e-4


def phrases(*texts: str) -> Policy:
    return Policy(tuple(Rule("test", text, "phrase", text, word_boundaries=False) for text in texts))


# --- the conversation ---


def classifier(model) -> HiddenStateGate:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(model.width, generator=generator) / model.width**0.5
    return HiddenStateGate(weight, torch.zeros(()), threshold=0.02, window=3.0)


@pytest.mark.parametrize(
    ("guard", "any_bytes"), [(None, False), (None, True), ("lower", False), ("block", False), ("block", True)]
)
def test_each_reply_is_that_of_the_whole_transcript(tiny_model, guard, any_bytes):
    """Drawn by generate(), which reads everything said so far anew: in one stream nothing is lost and nothing added."""
    model = tiny_model()
    settings = {"max_bytes": 30, "temperature": 1.3, "top_p": 0.98, "stop": [b"e"], "any_bytes": any_bytes}
    # Ends of replies that are common enough here: a stop, a held-back phrase, a character that is cut, all bytes.
    settings["policy"] = phrases("a", "i", "%")
    if guard:
        settings |= {"classifier": classifier(model), "classifier_mode": guard}
    conversation = Conversation(model, preamble=b"A talk.\n\n", seed=5, **settings)
    settings["stop"] = [b"\n\n", b"\nUser:", b"e"]
    seeds, transcript, reasons = random.Random(5), b"A talk.\n\n", set()
    for text in TURNS:
        transcript += b"User: " + text + b"\nAssistant: "
        expected = list(generate(model, transcript, seed=seeds.getrandbits(63), **settings))
        found = say(conversation, text)
        assert found == (b"".join(piece.data for piece in expected), expected[-1].finished)
        transcript += found[0] + b"\n\n"
        reasons.add(found[1])
        assert_has_read(conversation, transcript)
    assert reasons >= ({"stop", "length"} if guard != "block" else {"gate"})
    assert conversation.replies == len(TURNS)


class Scripted:
    """Makes a stream say one text after the other, whatever the model wants: ("text" as bytes, then what follows)."""

    def __init__(self, monkeypatch, text: bytes):
        self.text, self.begin = text, None

        def logits(stream):
            found = torch.full((stream.batch_size, 256), -20.0)
            if self.begin is not None and 0 <= stream.position - self.begin < len(self.text):
                found[:, self.text[stream.position - self.begin]] = 20.0
            return found

        monkeypatch.setattr(ByteStream, "logits", logits)


@pytest.fixture
def scripted(tiny_model, monkeypatch):
    """talk(text, said, **settings) → (conversation after one turn, reply, reason), the model wanting to say `said`."""

    def talk(text: bytes, said: bytes, **settings):
        wanted = Scripted(monkeypatch, said)
        conversation = Conversation(tiny_model(), temperature=0, **settings)
        wanted.begin = len(framed(text))
        return conversation, *say(conversation, text)

    return talk


@pytest.mark.parametrize(
    ("said", "reply"),
    [
        (b"Fine.\n\nOnce upon", b"Fine."),
        (b"Fine.\nUser: And you?", b"Fine."),
        (b"One.\nTwo.\n\n", b"One.\nTwo."),
        (b"\n\n", b""),
        (b"User: is a word\n\n", b"User: is a word"),
    ],
)
def test_where_a_reply_ends(scripted, monkeypatch, said, reply):
    conversation, found, reason = scripted(b"How are you?", said)
    assert (found, reason) == (reply, "stop")
    monkeypatch.undo()
    assert_has_read(conversation, b"User: How are you?\nAssistant: " + reply + b"\n\n")


def test_a_character_that_is_cut_is_neither_said_nor_kept(scripted, monkeypatch):
    conversation, found, reason = scripted(b"?", "ağ😀".encode(), max_bytes=6)
    assert (found.decode(), reason) == ("ağ", "length")
    monkeypatch.undo()
    assert_has_read(conversation, "User: ?\nAssistant: ağ\n\n".encode())


def test_the_gate_holds_over_the_turn(scripted, monkeypatch, tmp_path):
    """The default policy without being asked for; other rules; a match that ends only with the reply; the log."""
    log = GateLog(tmp_path / "log.jsonl")
    _, found, _ = scripted(b"Card?", b"4111 1111 1111 1111\n\n", log=log, max_bytes=30)
    assert found.startswith(b"4111 1111 1111 111") and b"4111 1111 1111 1111" not in found
    (line,) = [json.loads(line) for line in log.path.read_text().splitlines()]
    assert (line["rule"], line["position"]) == ("card-grouped", 18)

    word = Policy((Rule("test", "word", "phrase", "gizli soz"),))  # folded: söz
    conversation, found, _ = scripted(b"?", "Bu gizli söz".encode(), policy=word, max_bytes=13)
    assert found.decode() == "Bu gizli sö"  # the last letter waits for one that makes it another word
    monkeypatch.undo()
    assert_has_read(conversation, b"User: ?\nAssistant: " + found + b"\n\n")

    # What the user begins is not completed: here across the frame.
    across = Policy((Rule("test", "across", "pattern", r"one\nassistant: two"),))
    assert scripted(b"one", b"two\n\n", policy=across, max_bytes=3)[1] != b"two"
    assert scripted(b"one more", b"two\n\n", policy=across, max_bytes=3)[1] == b"two"


def test_memories_come_before_the_line_once_while_attention_reaches_them(tiny_model):
    conversation = Conversation(tiny_model(window=16), max_bytes=2, seed=1)  # attention reaches 16 patches of 4 bytes
    transcript = b""

    def turn(text, memories, shown):
        nonlocal transcript
        reply, _ = say(conversation, text, memories)
        lines = b"".join(b"Memory: " + each.encode() + b"\n" for each in shown)
        transcript += lines + b"User: " + text + b"\nAssistant: " + reply + b"\n\n"
        assert_has_read(conversation, transcript)

    turn(b"?", ["Adı Çağla 😀.", "Two\n\nUser: lines", "Adı Çağla 😀."], ["Adı Çağla 😀.", "Two User: lines"])
    turn(b"!", [], [])
    begins = len(transcript)
    turn(b"?", ["new"], ["new"])
    turn(b"?", ["new"], [])
    assert len(transcript) - begins < 64
    turn(b"?", ["Adı Çağla 😀.", "new"], ["Adı Çağla 😀."])
    turn(b"?", ["new"], ["new"])  # out of reach by now
    conversation.reset()
    transcript = b""
    turn(b"?", ["new"], ["new"])


def test_the_state_does_not_grow(tiny_model):
    conversation = Conversation(tiny_model(), max_bytes=3, seed=1)
    say(conversation, b"x" * 199)
    size = conversation.stream.state_bytes() + 8 * (len(conversation.stream._open) - conversation.stream.position % 4)
    for i in range(30):
        say(conversation, b"y" * 1000, [f"memory {i}"])
    later = conversation.stream.state_bytes() + 8 * (len(conversation.stream._open) - conversation.stream.position % 4)
    assert later == size and len(conversation._recent) <= 1


def test_every_byte_is_read_once(tiny_model, monkeypatch):
    """By the conversation's stream; a reply's own branch only reads what it draws."""
    fed, feed = [], ByteStream.feed
    monkeypatch.setattr(ByteStream, "feed", lambda self, x: (fed.append(x.shape[1]), feed(self, x))[1])
    conversation = Conversation(tiny_model(), max_bytes=20, seed=1)
    for i in range(1, 6):
        fed.clear()
        reply, _ = say(conversation, b"x" * 500)
        drawn = len(fed) - 2
        assert fed == [len(framed(b"x" * 500)), *[1] * drawn, len(reply) + 2] and drawn < 20
        assert conversation.replies == i


def test_a_reply_that_is_closed_or_interrupted_stays_as_far_as_it_went(tiny_model, monkeypatch):
    conversation = Conversation(tiny_model(), max_bytes=100, seed=1)
    pieces = conversation.reply(b"one")
    said = next(pieces).data + next(pieces).data
    pieces.close()
    transcript = b"User: one\nAssistant: " + said + b"\n\n"
    assert_has_read(conversation, transcript)

    head, calls = type(conversation.stream.model.head), [0]
    step = head.step

    def interrupted(self, *arguments):
        calls[0] += 1
        if calls[0] == 50:
            raise KeyboardInterrupt
        return step(self, *arguments)

    monkeypatch.setattr(head, "step", interrupted)
    said = b""
    with pytest.raises(KeyboardInterrupt):
        for piece in conversation.reply(b"two"):
            said += piece.data
    assert 10 < len(said) < 60
    transcript += b"User: two\nAssistant: " + said + b"\n\n"
    assert_has_read(conversation, transcript)

    # While the line is read: none of the turn.
    calls[0] = 49
    with pytest.raises(KeyboardInterrupt):
        next(conversation.reply(b"three"))
    assert_has_read(conversation, transcript)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"max_bytes": 0}, ["max_bytes=0", "≥ 1"]),
        ({"temperature": -1}, ["temperature=-1", "≥ 0"]),
        ({"top_k": 0}, ["top_k=0"]),
        ({"seed": -1}, ["seed=-1"]),
        ({"stop": [b""]}, ["stop=b''"]),
        ({"preamble": "text"}, ["str", "bytes"]),
        ({"classifier_mode": "off"}, ["classifier_mode='off'"]),
    ],
)
def test_bad_settings_are_named(tiny_model, settings, words):
    with pytest.raises(ValueError) as error:
        Conversation(tiny_model(), **settings)
    assert all(word in str(error.value) for word in words)


def test_numbers_that_are_not_finite_are_told(tiny_model, monkeypatch):
    conversation = Conversation(tiny_model())
    monkeypatch.setattr(ByteStream, "logits", lambda self: torch.full((1, 256), torch.nan))
    with pytest.raises(FloatingPointError):
        next(conversation.reply(b"x"))
    with pytest.raises(FloatingPointError):
        Conversation(tiny_model())


# --- lines and commands ---


class Talk:
    """A chat over a list of lines: what it wrote, what it noted, and what the model was given."""

    def __init__(self, model, memory=None, **settings):
        self.shown, self.notes, self.given = "", [], []
        self.conversation = Conversation(model, **{"max_bytes": 20, "seed": 3} | settings)
        reply = self.conversation.reply

        def recorded(text, memories=()):
            self.given.append((text, list(memories)))
            return reply(text, memories)

        self.conversation.reply = recorded
        self.lines: list[str] = []
        self.chat = Chat(self.conversation, self.read, self.write, self.notes.append, memory)

    def read(self) -> str:
        if not self.lines:
            raise EOFError
        return self.lines.pop(0)

    def write(self, text: str) -> None:
        text.encode("utf-8")  # raises for surrogates
        self.shown += text

    def __call__(self, *lines: str) -> str:
        """Run over these lines → what was shown."""
        self.shown, self.lines = "", list(lines)
        self.notes.clear()
        self.chat.run()
        return self.shown


def test_lines_of_all_kinds_reach_the_model_as_they_are(tiny_model):
    lines = ["Bir varmış", "", "   ", "a\0b", "\udcff\udcfe raw", " /slash", "x" * 30_000, "👩‍👩‍👧", "\r"]
    talk = Talk(tiny_model())
    shown = talk(*lines)
    expected = [line.encode("utf-8", "surrogateescape") for line in lines if line.strip()]
    assert talk.given == [(line, []) for line in expected] and talk.notes == []
    # Replies and nothing else, each with a line end, and the same once more.
    again = Conversation(tiny_model(), max_bytes=20, seed=3)
    assert shown == "".join(say(again, line)[0].decode() + "\n" for line in expected)
    assert talk.conversation.stream.position == again.stream.position


def test_replies_come_as_they_are_drawn(tiny_model):
    talk = Talk(tiny_model(), max_bytes=60, temperature=1.5)
    pieces = []
    talk.chat._writer = pieces.append
    talk("x")
    assert len([piece for piece in pieces if piece]) > 20
    assert all(len(piece) <= 2 for piece in pieces) and not "".join(pieces).isascii()


def test_any_bytes_come_out_as_replacement_characters(tiny_model):
    assert "\ufffd" in Talk(tiny_model(), any_bytes=True, temperature=2.0, max_bytes=60)("x")


def test_commands_without_a_memory(tiny_model):
    talk = Talk(tiny_model())
    shown = talk("/help")
    assert [line.split()[0] for line in shown.splitlines()[:-1]] == [f"/{name}" for name in COMMANDS]
    assert shown.count("--memory FILE") == len(OF_MEMORY) and talk.notes == []
    arguments = [f"/{name} {'x' if COMMANDS[name][0] else ''}".strip() for name in OF_MEMORY]
    assert talk(*arguments) == "" and len(talk.notes) == len(OF_MEMORY)
    assert all("--chat --memory FILE" in note for note in talk.notes)
    assert talk("/remembr x\udcff", "/", "/Help") == "" and len(talk.notes) == 3
    assert all(f"/{name}" in note for note in talk.notes for name in COMMANDS)
    assert talk("/help x", "/temperature", "/reset now") == ""
    assert talk.notes == ["/help x: accepted is /help", "/temperature : accepted is /temperature T",
                          "/reset now: accepted is /reset"]  # fmt: skip
    assert talk("/quit", "never read") == "" and talk.lines == ["never read"]
    assert talk.given == [] and talk.conversation.stream.position == 0


def test_temperature_and_reset(tiny_model):
    talk = Talk(tiny_model())
    for wrong in ("-1", "nan", "inf", "hot"):
        talk(f"/temperature {wrong}")
        assert len(talk.notes) == 1 and "accepted is a finite number" in talk.notes[0]
    assert talk.conversation.temperature == 0.8
    greedy = talk("/temperature 0", "x")
    talk("y")
    assert talk("/reset", "x") == "A new conversation.\n" + greedy and talk.conversation.replies == 3
    assert Talk(tiny_model(), temperature=0)("x") == greedy


def test_ctrl_c_ends_the_reply_and_not_the_chat(tiny_model):
    talk, said = Talk(tiny_model(), max_bytes=300, seed=4), []

    def interrupt(text):
        said.append(text)
        if len(said) == 5:
            raise KeyboardInterrupt

    talk.chat._writer = interrupt
    talk("one")
    assert talk.notes == ["stopped"] and said[-1] == "\n" and 3 < talk.conversation.generated < 30
    talk.chat._writer = talk.write
    assert len(talk("two")) > 200 and talk.conversation.replies == 2


# --- the memory ---


class FakeMemory:
    """As ExternalMemory, over a list."""

    def __init__(self):
        self.entries, self.next, self.left, self.path = [], 1, 100, Path("memory.db")

    def remember(self, text, kind="fact", **_):
        if not self.left:
            raise BudgetExceeded("daily budget of 100 writes is used up")
        self.left -= 1
        entry = SimpleNamespace(id=self.next, kind=kind, text=text)
        self.next += 1
        self.entries.append(entry)
        return entry

    def forget(self, id):
        found = [entry for entry in self.entries if entry.id == id]
        self.entries = [entry for entry in self.entries if entry.id != id]
        return found[0] if found else None

    def forget_matching(self, query):
        found = [entry for entry in self.entries if set(query.split()) <= set(entry.text.split())]
        return [self.forget(entry.id) for entry in found]

    def list(self, kind=None, *, limit=50, offset=0):
        if kind not in (None, "fact", "episode", "skill"):
            raise ValueError(f"kind={kind!r}: accepted are fact, episode, skill")
        return [entry for entry in self.entries if kind in (None, entry.kind)][offset : offset + limit]

    def __len__(self):
        return len(self.entries)

    def writes_left(self):
        return self.left

    def export_json(self, path):
        path.write_text(json.dumps([[entry.kind, entry.text] for entry in self.entries]))

    def import_json(self, path):
        entries = json.loads(path.read_text())  # JSON's error is a ValueError
        for kind, text in entries:
            self.remember(text, kind)
        return len(entries)


class FakeRouted:
    """As RoutedMemory, by rules of thumb: a question retrieves what shares a word, "my" stores."""

    def __init__(self):
        self.memory, self.handled = FakeMemory(), []

    def handle(self, text):
        self.handled.append(text)
        command, _, rest = text.partition(" ")
        found = SimpleNamespace(
            decision=None, command=None, stored=None, forgotten=[], listed=[], retrieved=[], budget_exceeded=False
        )
        if command in ("remember", "forget", "list"):
            found.command = command
            found.forgotten = self.memory.forget_matching(rest) if command == "forget" else []
            found.listed = self.memory.list() if command == "list" else []
        else:
            action = "retrieve" if text.endswith("?") else "store" if "my" in text else "neither"
            found.decision = SimpleNamespace(action=action, probability=0.875, trust=0.9, kind="fact")
            if action == "retrieve":
                shared = [entry for entry in self.memory.entries if set(text[:-1].split()) & set(entry.text.split())]
                found.retrieved = [(SimpleNamespace(entry=entry, score=2.5), 0.75) for entry in shared]
        if command == "remember" or (found.decision and found.decision.action == "store"):
            found.budget_exceeded = not self.memory.left
            found.stored = self.memory.remember(rest if found.command else text) if self.memory.left else None
        return found


def test_what_is_retrieved_reaches_the_model_and_is_shown_on_request(tiny_model):
    routed = FakeRouted()
    talk = Talk(tiny_model(), routed)
    first, second = talk("my cat is Çakıl 🐈"), talk("the cat ?")
    assert [entry.text for entry in routed.memory.entries] == ["my cat is Çakıl 🐈"]
    transcript = (
        f"User: my cat is Çakıl 🐈\nAssistant: {first}\nMemory: my cat is Çakıl 🐈\nUser: the cat ?\nAssistant: "
    )
    assert_has_read(talk.conversation, f"{transcript}{second}\n".encode())
    assert routed.handled == ["my cat is Çakıl 🐈", "the cat ?"] and talk.notes == []
    shown = talk("/show on", "my dog is Max", "a cat ?", "hm")
    lines = [line for line in shown.splitlines() if line.startswith(("[router", "[stored", "[retrieved"))]
    assert lines == [
        "[router: store 0.88]", "[stored #2 fact: my dog is Max]", "[router: retrieve 0.88]",
        "[retrieved, trust 0.75, score 2.50: #1 fact: my cat is Çakıl 🐈]", "[router: neither 0.88]",
    ]  # fmt: skip
    assert "[router" not in talk("/show off", "a cat ?") and talk.notes == []
    talk("/show maybe")
    assert talk.notes == ["/show: 'maybe': accepted are on and off"]


def test_commands_in_words_are_answered_without_the_model(tiny_model):
    talk = Talk(tiny_model(), FakeRouted())
    assert talk("list") == "Nothing is remembered.\n"
    assert talk("remember İzmir'de deniz", "remember two seas") == (
        "Remembered #1 fact: İzmir'de deniz\nRemembered #2 fact: two seas\n"
    )
    assert talk("list") == "#1 fact: İzmir'de deniz\n#2 fact: two seas\n"
    assert talk("forget seas", "forget seas") == "Forgot #2 fact: two seas\nNothing like that is remembered.\n"
    assert talk.given == [] and talk.conversation.stream.position == 0 and talk.notes == []


def test_commands_of_the_memory(tiny_model, tmp_path):
    routed = FakeRouted()
    talk = Talk(tiny_model(), routed)
    assert talk("/remember bir 😀", "/remember  two\udcff\0 ", "/list", "/list fact") == (
        "Remembered #1 fact: bir 😀\nRemembered #2 fact: two\ufffd\0\n" + "#1 fact: bir 😀\n#2 fact: two\ufffd\0\n" * 2
    )
    assert talk("/memory") == "2 remembered: fact 2, episode 0, skill 0; writes left today: 98\n"
    assert talk(f"/export {tmp_path}/a.json", "/forget #1", "/forget #1", "/forget two\udcff\0") == (
        f"Exported 2 to {tmp_path}/a.json\nForgot #1 fact: bir 😀\nNothing like that is remembered.\n"
        "Forgot #2 fact: two\ufffd\0\n"
    )
    assert (
        talk(f"/import {tmp_path}/a.json", "/list episode")
        == f"Imported 2 new from {tmp_path}/a.json\nNothing is remembered.\n"
    )
    assert talk.notes == [] and talk.given == [] and routed.handled == []
    routed.memory.left = None
    assert "; writes left today: no limit\n" in talk("/memory")
    assert "needs --memory" not in talk("/help")


def test_errors_of_the_memory_do_not_end_the_chat(tiny_model, tmp_path):
    routed = FakeRouted()
    talk = Talk(tiny_model(), routed)
    (tmp_path / "text").write_text("{")
    wrong = ["/list facts", "/forget #one", "/forget #", f"/forget #{10**30}", "/remember",
             f"/import {tmp_path}/text", "/import /missing",
             "/export memory.db", "/import \udcff", "/forget", "/memory now"]  # fmt: skip
    assert talk(*wrong) == "" and len(talk.notes) == len(wrong)
    assert all(note.startswith(line.split()[0]) and "\n" not in note for note, line in zip(talk.notes, wrong))

    routed.memory.left = 0
    shown = talk("/remember x", "remember x", "my x")
    assert [("budget" in note or "used up" in note) for note in talk.notes] == [True] * 3
    assert len(shown.splitlines()) >= 1 and talk.given == [(b"my x", [])] and not routed.memory.entries

    def broken(text):
        raise OSError("memory m.db: database is locked")

    routed.handle = broken
    assert talk("hello", "again") and talk.notes == ["memory: m.db: database is locked"] * 2
    assert len(talk.given) == 3


def test_ctrl_c_in_the_memory_is_not_the_end(tiny_model):
    routed = FakeRouted()
    talk = Talk(tiny_model(), routed)

    def interrupted(*_, **__):
        raise KeyboardInterrupt

    routed.handle = routed.memory.remember = interrupted
    assert talk("hello", "/remember x") == "" and talk.notes == ["stopped"] * 2
    assert talk.conversation.stream.position == 0


# --- generate.py --chat ---


@pytest.fixture(scope="module")
def checkpoint(tiny_model, tmp_path_factory):
    return save_checkpoint(tiny_model(), tmp_path_factory.mktemp("chat") / "tiny.safetensors")


@pytest.fixture
def call(checkpoint, capsys, monkeypatch, tmp_path):
    """call(stdin, *arguments) → (exit code, stdout, stderr), run inside this process."""
    monkeypatch.chdir(tmp_path)

    def run(stdin: bytes | None, *arguments: str):
        monkeypatch.setattr(sys, "stdin", None if stdin is None else io.TextIOWrapper(io.BytesIO(stdin)))
        try:
            code = script.main([str(checkpoint), *arguments, "--device", "cpu"])
        except SystemExit as exit:
            code = exit.code
        return code, *capsys.readouterr()

    return run


def test_every_option_reaches_the_conversation(call, tiny_model, tmp_path):
    policy = tmp_path / "p.toml"
    policy.write_text('[c]\nphrases = ["a", "o"]\nword_boundaries = false')
    code, out, err = call(
        b"ilk\r\nson", "--chat", "--max-bytes", "40", "--temperature", "1.4", "--top-k", "120", "--top-p", "0.99",
        "--seed", "8", "--stop", "e", "--thinking-steps", "1", "--policy", str(policy), "--gate-log", "log",
        "--prompt", "Önce.\n\n",
    )  # fmt: skip
    expected = Conversation(
        tiny_model(), preamble="Önce.\n\n".encode(), max_bytes=40, temperature=1.4, top_k=120, top_p=0.99, seed=8,
        stop=[b"e"], thinking_steps=1, policy=load_policy(policy),
    )  # fmt: skip
    said = [say(expected, text)[0].decode() for text in (b"ilk", b"son")]
    assert (code, out) == (0, "".join(f"{text}\n" for text in said))
    logged = len((tmp_path / "log").read_text().splitlines())
    assert logged and err == (f"2 replies, {expected.generated} bytes; seed 8; gate: c {logged}, logged in log\n")
    assert not [path for path in tmp_path.iterdir() if path.name not in ("p.toml", "log")]  # and nothing is stored


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--chat", "--batch", "3"], ["--batch 3", "--chat", "1"]),
        (["--chat", "--prompt", "-"], ["--prompt -", "stdin"]),
        (["--memory", "m.db"], ["--memory 'm.db'", "--chat"]),
        (["--memory", "m.db", "--prompt", "x"], ["--memory 'm.db'", "--chat"]),
        (["--chat", "--prompt", "a", "--prompt-file", "b"], ["--prompt-file"]),
        (["--chat", "--prompt-file", "missing"], ["--prompt-file 'missing'"]),
        (["--chat", "--memory"], ["--memory"]),
        (["--chat", "--rows", "2"], ["--rows"]),
    ],
)
def test_what_makes_no_sense_with_a_chat_gets_one_line_and_code_2(call, tmp_path, arguments, words):
    code, out, err = call(b"x\n", *arguments)
    assert code == 2 and out == "" and err.count("\n") == 1 and all(word in err for word in words), err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("stdin", [None, b"", b"\n\n", b"/quit\nx\n"])
def test_a_chat_in_which_nothing_is_said(call, stdin):
    assert call(stdin, "--chat", "--seed", "1") == (0, "", "0 replies, 0 bytes; seed 1\n")


def test_a_model_that_is_not_finite_is_one_line_and_code_1(call, monkeypatch):
    monkeypatch.setattr(ByteStream, "logits", lambda self: torch.full((1, 256), torch.nan))
    code, out, err = call(b"x\n", "--chat")
    assert (code, out) == (1, "") and err.count("\n") == 1 and "not finite" in err


ENVIRONMENT = os.environ | {"LC_ALL": "C", "PYTHONIOENCODING": "ascii", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"}


def test_through_a_pipe(checkpoint, tiny_model):
    """In a C locale; each line is answered before the next one is written."""
    process = subprocess.Popen(
        [sys.executable, SCRIPT, checkpoint, "--chat", "--seed", "2", "--threads", "1", "--max-bytes", "50"],
        env=ENVIRONMENT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )  # fmt: skip
    expected = Conversation(tiny_model(), seed=2, max_bytes=50)
    for text in (b"\xff \0 \xc4\xb1", "Iğdır 😀".encode()):
        process.stdin.write(text + b"\n")
        process.stdin.flush()
        reply = say(expected, text)[0] + b"\n"
        assert process.stdout.read(len(reply)) == reply
    process.stdin.write(b"/help")
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0 and out.startswith(b"/help") and err.count(b"\n") == 1 and b"; seed 2" in err


class Terminal:
    """generate.py --chat with a terminal of its own."""

    def __init__(self, *arguments: str):
        here, there = pty.openpty()

        def own_terminal():
            signal.signal(signal.SIGINT, signal.default_int_handler)
            fcntl.ioctl(0, termios.TIOCSCTTY, 0)

        self.process = subprocess.Popen(
            [sys.executable, SCRIPT, *arguments], stdin=there, stdout=there, stderr=there, start_new_session=True,
            preexec_fn=own_terminal, env=os.environ | {"TERM": "dumb", "LC_ALL": "C.UTF-8", "INPUTRC": "/dev/null"},
        )  # fmt: skip
        os.close(there)
        self.fd, self.seen = here, b""

    def send(self, data: bytes) -> None:
        os.write(self.fd, data)

    def until(self, *wanted: bytes) -> bytes:
        """Read until these have come, one after the other → what came up to the end of the last."""
        pattern, deadline = b".*?".join(map(re.escape, wanted)), time.monotonic() + 60
        while not (found := re.search(pattern, self.seen, re.DOTALL)):
            assert select.select([self.fd], [], [], deadline - time.monotonic())[0], (wanted, self.seen)
            self.seen += self._read()
        text, self.seen = self.seen[: found.end()], self.seen[found.end() :]
        return text

    def _read(self) -> bytes:
        try:
            data = os.read(self.fd, 65536)
        except OSError as error:
            assert error.errno == errno.EIO  # the other side is closed
            data = b""
        assert data, (self.process.wait(), self.seen)
        return data

    def end(self) -> int:
        code = self.process.wait(60)
        os.close(self.fd)
        return code


def test_on_a_terminal(checkpoint):
    """Editing, history, streaming, Ctrl-C in a reply and at the prompt, Ctrl-D."""
    terminal = Terminal(str(checkpoint), "--chat", "--threads", "1", "--max-bytes", "100000000")
    terminal.until(b"> ")
    # What is told of an unknown command shows the line as it was read: backspace, cursor left, beginning of the line.
    terminal.send("ağx\x7fdtwo\x1b[D\x1b[D\x1b[D \x01/\r".encode())
    terminal.until("/ağd: there is no such command".encode(), b"> ")
    terminal.send(b"/second\r")
    terminal.until(b"/second: there is no", b"> ")
    terminal.send(b"\x1b[A\x1b[A\x05 \r")  # two lines up
    terminal.until("/ağd: there is no such command".encode(), b"> ")

    terminal.send("merhaba 😀\r".encode())
    terminal.until("merhaba 😀".encode(), b"\n")
    while len(terminal.seen) < 100:  # a reply that would go on for days
        terminal.seen += terminal._read()
    terminal.send(b"\x03")
    terminal.until(b"\r\nstopped\r\n", b"> ")
    terminal.send(b"/dropped")
    terminal.until(b"/dropped")
    time.sleep(0.5)  # a signal that comes just before CPython waits for a key is seen with the next key only
    terminal.send(b"\x03")
    terminal.until(b"> ")
    terminal.send(b"/temperature -1\r")
    assert b"/dropped" not in terminal.until(b"accepted is a finite number", b"> ")
    terminal.send(b"\x04")
    assert b"1 replies, " in terminal.until(b"; seed ")
    assert terminal.end() == 0


# --- with the memory and the router of model.sgm ---


@pytest.fixture(scope="module")
def first_use(checkpoint, tmp_path_factory):
    """(the router that the first chat with a memory has trained, what that chat had to say)."""
    memory, said = tmp_path_factory.mktemp("first") / "m.db", io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stderr(said):
        patch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO()))
        assert script.main([str(checkpoint), "--chat", "--memory", str(memory), "--device", "cpu"]) == 0
    return Path(f"{memory}.router.safetensors"), said.getvalue()


@pytest.fixture
def remembering(call, first_use, tmp_path):
    """remembering(lines, *arguments): a chat with the memory m.db, whose router is there already."""
    shutil.copy(first_use[0], tmp_path / "m.db.router.safetensors")
    return lambda lines, *arguments: call(lines, "--chat", "--memory", "m.db", "--seed", "1", *arguments)


def test_the_router_is_trained_at_the_first_use(first_use, remembering):
    router, said = first_use
    assert said.startswith("training the memory's router") and str(router) in said and router.stat().st_size > 50_000
    assert remembering(b"/memory\n") == (
        0, "0 remembered: fact 0, episode 0, skill 0; writes left today: 100\n", "0 replies, 0 bytes; seed 1\n"
    )  # fmt: skip


def test_a_memory_lasts_over_chats(remembering, tmp_path):
    """Stored in words, by command and by the router, in two languages; the next chat finds it."""
    lines = "remember that my cat is called Luna 🐈\nunutma: kapının şifresi 4711\n/remember Ankara is cold\n/list\n"
    code, out, err = remembering(lines.encode())
    assert code == 0 and "0 replies" in err and len(out.splitlines()) == 6
    assert all(out.count(text) == 2 for text in ("Luna 🐈", "4711", "Ankara is cold"))

    lines = "/show on\nWhat is my cat called?\n/export all.json\nforget Luna\nkapının şifresi neydi?\n"
    lines += "My brother lives in Berlin.\nWrite a poem about the sea.\n/list\n/export ./m.db\n"
    code, out, err = remembering(lines.encode(), "--max-bytes", "20")
    assert code == 0 and "4 replies" in err and err.startswith("/export: ./m.db: the memory itself")
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
