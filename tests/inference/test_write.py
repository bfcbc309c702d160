"""Writing in graphs against writing byte by byte: equal bytes, ends and log lines, whatever the rows do."""

import os
import random
from collections import Counter

import pytest
import torch

from model.genesis.gate.byte_gate import GateLog
from model.genesis.gate.policy import Policy, Rule
from model.inference import write
from model.inference.chat import Conversation
from model.inference.draw import Row
from model.inference.fused import FusedStream
from model.inference.generate import generate
from model.inference.static import StaticStream
from model.inference.stream import ByteStream
from model.kernels import choose, decode
from tests.conftest import make_random_model
from tests.inference.test_fused import draw_vectors, random_small
from tests.inference.test_generate import collect

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
interpreter_or_card = pytest.mark.skipif(
    decode.triton is None or (not CUDA and os.environ.get("TRITON_INTERPRET") != "1"),
    reason="needs the package triton, and a CUDA device or TRITON_INTERPRET=1, which conftest sets where there is none",
)
POLICY = Policy(
    tuple(
        Rule("c", text, "phrase", text, bool(i % 2)) for i, text in enumerate(["e", "ab", "ğ", "x", "q", "\U0001f600"])
    )
)


@pytest.fixture(scope="module")
def model():
    made = make_random_model(n_layers=1, thinking_steps=1, window=4, hull="swiglu", n_heads=1, recall_heads=0)
    return draw_vectors(made).to(DEVICE)


class Seen(GateLog):
    """A log that is looked into."""

    def __init__(self):
        super().__init__()
        self.lines = []

    def add(self, removal, position, text=b""):
        super().add(removal, position, text)
        found = removal.row, position, removal.category, removal.rule, removal.state, removal.byte, bytes(text)
        self.lines.append((*found, round(removal.mass, 4)))


@pytest.fixture
def graphs(monkeypatch):
    """Counts graphs and their replays; on the CPU a graph is its work, done again."""
    counts = Counter()
    real = write.captured

    def captured(work):
        counts["captured"] += 1
        replay = real(work) if CUDA else work

        def counted():
            counts["replayed"] += 1
            replay()

        return counted

    steps = write.Writer.draw

    def draw(writer, until):
        began, P = writer.stream.position - writer.steps, writer.stream.model.config.patch_size
        steps(writer, until)
        assert writer.stream.position - began == writer.steps and until <= writer.steps < until + P

    monkeypatch.setattr(write.Writer, "draw", draw)
    monkeypatch.setattr(write, "captured", captured)
    monkeypatch.setattr(write, "captures", lambda device: True)
    monkeypatch.setattr(write, "FIRST", 5)
    monkeypatch.setattr(write, "AHEAD", 4)
    if not CUDA:
        monkeypatch.setattr(choose, "OTHERS", 128)
        # The interpreter takes long for a step, and test_fused.py sees to it.
        monkeypatch.setattr(write, "FusedStream", lambda stream, weights: StaticStream(stream))
    return counts


def both(monkeypatch, model, prompt, rows: int, **arguments) -> tuple[list[tuple[bytes, str]], Seen]:
    """What is written in graphs, which is what is written byte by byte."""
    results = []
    for captures in (True, False):
        monkeypatch.setattr(write, "captures", lambda device, captures=captures: captures)
        log = Seen()
        pieces = list(generate(model, prompt, log=log, **arguments))
        results.append((collect(pieces, rows), log))
    (found, told), (expected, expected_told) = results
    assert found == expected
    if CUDA:
        # Logits of fused steps differ by rounding, and what they take away is told of from a certain probability on.
        close = set(told.lines) ^ set(expected_told.lines)
        assert len(close) <= 1 + len(expected_told.lines) // 200
        return found, told
    # Rows are told of one after the other; each of them in order.
    assert sorted(told.lines, key=lambda line: line[:2]) == sorted(expected_told.lines, key=lambda line: line[:2])
    assert told.counts == expected_told.counts
    return found, told


@interpreter_or_card
def test_streams_of_different_places_and_rows_that_end_one_after_another(model, graphs, monkeypatch):
    prompts = ["ışık".encode()[:3], b"", b"abcdefg"]
    arguments = {"max_bytes": 25, "temperature": 1.3, "seed": 4, "policy": POLICY}
    found, told = both(monkeypatch, model, prompts, 3, **arguments)
    assert graphs["captured"] == 3 and 3 * 3 <= graphs["replayed"] <= 3 * 4
    assert told.lines and not all(data.isascii() for data, _ in found)
    for prompt, (data, _) in zip(prompts, found):
        (prompt + data).decode("utf-8")
    # One ends in the middle of a graph, one after most of them; their streams are left alone from there on.
    stops, replayed = [found[0][0][9:12], found[2][0][17:20]], graphs["replayed"]
    graphs.clear()
    ended, _ = both(monkeypatch, model, prompts, 3, stop=stops, **arguments)
    assert [reason for _, reason in ended].count("stop") >= 2 and graphs["replayed"] < replayed
    assert all(whole.startswith(part) for (whole, _), (part, _) in zip(found, ended))


SETTINGS = [
    {"temperature": 0, "policy": POLICY},
    {"temperature": 0.8, "top_p": 0.9, "any_bytes": True, "policy": Policy()},
    {"temperature": 1.5, "top_k": 60, "top_p": 0.95, "thinking_steps": 0, "policy": POLICY},
]


@interpreter_or_card
@pytest.mark.parametrize("settings", SETTINGS, ids=["greedy", "top-p", "top-k and top-p"])
def test_settings(model, graphs, monkeypatch, settings):
    found, _ = both(monkeypatch, model, b"x\xc4", 2, max_bytes=20, batch=2, seed=7, **settings)
    assert graphs["captured"] == 1 and (len(set(found)) == 1) == (settings["temperature"] == 0)


@interpreter_or_card
def test_with_the_fused_step(model, graphs, monkeypatch):
    if not CUDA:
        for name, value in (("PROGRAMS", 1), ("ROWS", 512), ("TILE", 1 << 17)):
            monkeypatch.setattr(decode, name, value)
    monkeypatch.setattr(write, "FusedStream", FusedStream)
    both(monkeypatch, model, b"abcd", 2, max_bytes=15, batch=2, seed=7, policy=POLICY)
    assert graphs == {"captured": 1, "replayed": 1}


@interpreter_or_card
def test_a_longer_request_goes_on_and_a_row_is_its_own(model, graphs, monkeypatch):
    """Neither how many bytes are asked for, nor how many are begun at once, changes any."""

    def text(max_bytes: int, ahead: int) -> bytes:
        monkeypatch.setattr(write, "AHEAD", ahead)
        return collect(generate(model, b"abc", max_bytes=max_bytes, seed=2, any_bytes=True, policy=Policy()))[0][0]

    long = text(40, 4)
    assert text(40, 64) == long and text(17, 8) == long[:17]
    graphs.clear()
    assert text(5, 8) == long[:5] and not graphs


@interpreter_or_card
def test_replies_of_a_conversation(model, graphs, monkeypatch):
    replies = []
    for captures in (True, False):
        monkeypatch.setattr(write, "captures", lambda device, captures=captures: captures)
        conversation = Conversation(model, seed=3, max_bytes=16, policy=POLICY)
        said = [list(conversation.reply(text)) for text in (b"Merhaba", b"and then?")]
        assert [sum(len(piece.data) for piece in pieces) > 5 for pieces in said] == [True, True]
        replies.append([(b"".join(p.data for p in pieces), pieces[-1].finished) for pieces in said])
    assert replies[0] == replies[1] and graphs["captured"] == 2


@interpreter_or_card
def test_what_is_not_written_in_graphs(model, graphs, monkeypatch):
    for arguments in ({"halt_threshold": 0.5}, {"batch": 3}):
        monkeypatch.setattr(write, "MOST_ROWS", 2)
        list(generate(model, b"abc", max_bytes=12, seed=1, any_bytes=True, policy=Policy(), **arguments))
    anchored = make_random_model(n_layers=1, anchors=True).to(DEVICE)
    list(generate(anchored, b"abc", max_bytes=12, seed=1, any_bytes=True, policy=Policy()))
    assert not graphs


def test_only_cuda_devices_capture():
    assert write.captures(torch.device("cuda:1")) and not write.captures(torch.device("cpu"))


@interpreter_or_card
def test_a_model_that_grows_meanwhile(graphs):
    model = make_random_model(n_layers=1, thinking_steps=0, window=4, recall_heads=0).to(DEVICE)
    pieces = generate(model, b"abc", max_bytes=100, seed=1, any_bytes=True, policy=Policy())
    while graphs["replayed"] < 1:
        next(pieces)
    model.add_petals(0)
    with pytest.raises(ValueError, match="has grown"):
        list(pieces)


@interpreter_or_card
def test_begun_in_inference_mode_and_continued_outside(model, graphs):
    arguments = {"max_bytes": 29, "seed": 1, "any_bytes": True, "policy": Policy()}
    expected = collect(generate(model, b"abcd", **arguments))
    graphs.clear()
    with torch.inference_mode():
        pieces = generate(model, b"abcd", **arguments)
        begun = []
        while not graphs["replayed"] or len(begun) < 6:
            begun.append(next(pieces))
    inside = graphs["replayed"]
    assert collect([*begun, *pieces]) == expected and graphs["replayed"] > inside


@pytest.mark.parametrize("written", [True, False])
@interpreter_or_card
def test_logits_that_become_broken(model, graphs, monkeypatch, written):
    """The bytes before them are given out, and a row that ends before them does not know."""
    monkeypatch.setattr(write, "captures", lambda device: written)
    arguments = {"seed": 1, "any_bytes": True, "policy": Policy(), "temperature": 0.5}
    expected = collect(generate(model, b"abcd", max_bytes=9, **arguments))[0][0]
    kind = StaticStream if written else ByteStream
    logits = kind.logits

    def broken(self):
        return logits(self) * (torch.nan if self.position >= 4 + 9 else 1.0)

    monkeypatch.setattr(kind, "logits", broken)
    if written:
        monkeypatch.setattr(write, "FusedStream", lambda stream, weights: StaticStream(stream))
        monkeypatch.setattr(write, "captured", lambda work: work)  # what a graph replays knows no position
    whole = []
    with pytest.raises(FloatingPointError, match="the model's logits are not finite"):
        for piece in generate(model, b"abcd", max_bytes=20, **arguments):
            whole.append(piece.data)
    assert b"".join(whole) == expected
    assert collect(generate(model, b"abcd", max_bytes=9, **arguments))[0] == (expected, "length")


@interpreter_or_card
def test_without_memory_for_it_bytes_are_written_one_by_one(model, graphs, monkeypatch):
    arguments = {"max_bytes": 17, "seed": 1, "batch": 2, "policy": POLICY}
    expected = collect(generate(model, b"abcd", **arguments), 2)
    assert graphs.total()
    graphs.clear()

    def full(model):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(write, "FusedWeights", full)
    assert collect(generate(model, b"abcd", **arguments), 2) == expected and not graphs


@pytest.mark.parametrize("seed", range(30))
def test_many_bytes_at_once_are_one_after_another(seed):
    rng = random.Random(seed)
    text = "".join(rng.choices("abığ😀", k=40)).encode()
    may_end = bytes(rng.random() < 0.7 for _ in text)
    stops = tuple(rng.choice([b"ab", b"ba\xc4", b"\x9f", b"baaa"]) for _ in range(rng.randint(0, 2)))
    most = rng.randint(20, 60)
    one, many = (Row(0, "ğ".encode()[:1], most, stops, whole_characters=bool(seed % 2)) for _ in range(2))
    at = 0
    while at < len(text) and not one.finished:
        n = rng.randint(0, 9)
        expected = [
            one.push(byte, may) for byte, may in zip(text[at : at + n], may_end[at : at + n]) if not one.finished
        ]
        piece = many.push_all(text[at : at + n], may_end[at : at + n])
        assert (piece.data if piece else b"") == b"".join(each.data for each in expected if each)
        assert (many.finished, many.generated, many.held, many.before) == (
            one.finished, one.generated, one.held, one.before
        )  # fmt: skip
        assert piece is None or piece.data or piece.finished
        at += n


card = pytest.mark.skipif(not CUDA or decode.triton is None, reason="needs a CUDA device and the package triton")
ON_A_CARD = [
    {"temperature": 0.8, "top_p": 0.9, "batch": 16, "policy": POLICY},
    {"temperature": 1.0, "batch": 1},
    {"temperature": 0, "batch": 64, "policy": POLICY},
]


@card
@pytest.mark.parametrize("settings", ON_A_CARD, ids=["top-p", "alone", "greedy"])
@pytest.mark.parametrize("changes", [{}, {"recall_heads": 1}, {"memory_rule": "delta", "hull": "swiglu"}], ids=str)
def test_graphs_of_the_preset_small(changes, settings, monkeypatch):
    """With its real runs, graphs and first bytes; nothing is waited for between them but what is shown."""
    model = random_small(n_layers=2, **changes)
    prompts = [b"Once upon", "Bir varmış bir yokmuş".encode()]
    settings = settings | {"batch": max(1, settings["batch"] // 2)}
    both(monkeypatch, model, prompts, 2 * settings["batch"], max_bytes=300, seed=3, **settings)


@card
def test_a_run_waits_for_nothing(monkeypatch):
    model = random_small(n_layers=1)
    made, begin = [], write.Writers.begin

    def checked(self, first, last):
        if first < 2 * AHEAD:  # compiling and capturing are over
            return begin(self, first, last)
        made.append(first)
        torch.cuda.set_sync_debug_mode("error")
        try:
            return begin(self, first, last)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    AHEAD = write.AHEAD
    monkeypatch.setattr(write.Writers, "begin", checked)
    list(generate(model, b"abc", max_bytes=500, seed=1))
    assert len(made) > 3
