"""Chat: every reply against generate() on the whole transcript, the state against the full forward; lines, commands,
Ctrl-C."""

import json
import random

import pytest
import torch

from model import ByteStream
from model.genesis.gate.byte_gate import GateLog
from model.genesis.gate.classifier import HiddenStateGate
from model.genesis.gate.policy import Policy, Rule
from model.inference.chat import COMMANDS, OF_MEMORY, Conversation, framed
from model.inference.generate import generate
from tests.inference.conftest import Talk, assert_has_read, say

TURNS = ["Bugün hava ılık mı?".encode(), b"\xff\xfe\x00 not UTF-8", "👩‍👩‍👧 漢字".encode(), b"x" * 1500, b"", b"Why?\r"]


def phrases(*texts: str) -> Policy:
    return Policy(tuple(Rule("test", text, "phrase", text, word_boundaries=False) for text in texts))


# --- the conversation ---


def classifier(model) -> HiddenStateGate:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(model.width, generator=generator) / model.width**0.5
    return HiddenStateGate(weight, torch.zeros(()), threshold=0.02, window=3.0)


@pytest.mark.parametrize(("guard", "any_bytes"), [(None, False), (None, True), ("lower", False), ("block", True)])
def test_each_reply_is_that_of_the_whole_transcript(tiny_model, light_model, guard, any_bytes):
    """Drawn by generate(), which reads everything said so far anew: in one stream nothing is lost and nothing added."""
    model = light_model if any_bytes else tiny_model()
    stops = (b"e", b"o", b"r")
    settings = {"max_bytes": 30, "temperature": 1.3, "top_p": 0.98, "stop": list(stops), "any_bytes": any_bytes}
    # Ends of replies that are common enough here: a stop, a held-back phrase, a character that is cut, all bytes.
    settings["policy"] = phrases("a", "i", "%")
    if guard:
        settings |= {"classifier": classifier(model), "classifier_mode": guard}
    conversation = Conversation(model, preamble=b"A talk.\n\n", seed=5, **settings)
    settings["stop"] = [b"\n\n", b"\nUser:", *stops]
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


def test_lines_of_all_kinds_reach_the_model_as_they_are(light_model):
    lines = ["Bir varmış", "", "   ", "a\0b", "\udcff\udcfe raw", " /slash", "x" * 8_000, "👩‍👩‍👧", "\r"]
    talk = Talk(light_model)
    shown = talk(*lines)
    expected = [line.encode("utf-8", "surrogateescape") for line in lines if line.strip()]
    assert talk.given == [(line, []) for line in expected] and talk.notes == []
    # Replies and nothing else, each with a line end, and the same once more.
    again = Conversation(light_model, max_bytes=20, seed=3)
    assert shown == "".join(say(again, line)[0].decode() + "\n" for line in expected)
    assert talk.conversation.stream.position == again.stream.position


def test_replies_come_as_they_are_drawn(light_model):
    talk = Talk(light_model, max_bytes=60, temperature=1.5)
    pieces = []
    talk.chat._writer = pieces.append
    talk("x")
    assert len([piece for piece in pieces if piece]) > 20
    assert all(len(piece) <= 2 for piece in pieces) and not "".join(pieces).isascii()


def test_any_bytes_come_out_as_replacement_characters(light_model):
    assert "\ufffd" in Talk(light_model, any_bytes=True, temperature=2.0, max_bytes=60)("x")


def test_commands_without_a_memory(light_model):
    talk = Talk(light_model)
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


def test_temperature_and_reset(light_model):
    talk = Talk(light_model)
    for wrong in ("-1", "nan", "inf", "hot"):
        talk(f"/temperature {wrong}")
        assert len(talk.notes) == 1 and "accepted is a finite number" in talk.notes[0]
    assert talk.conversation.temperature == 0.8
    greedy = talk("/temperature 0", "x")
    talk("y")
    assert talk("/reset", "x") == "A new conversation.\n" + greedy and talk.conversation.replies == 3
    assert Talk(light_model, temperature=0)("x") == greedy


def test_ctrl_c_ends_the_reply_and_not_the_chat(light_model):
    talk, said = Talk(light_model, max_bytes=300, seed=4), []

    def interrupt(text):
        said.append(text)
        if len(said) == 5:
            raise KeyboardInterrupt

    talk.chat._writer = interrupt
    talk("one")
    assert talk.notes == ["stopped"] and said[-1] == "\n" and 3 < talk.conversation.generated < 30
    talk.chat._writer = talk.write
    assert len(talk("two").encode()) > 200 and talk.conversation.replies == 2
