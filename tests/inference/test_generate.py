"""generate(): greedy against the full forward, seeds and rows, stop strings, whole characters, and what it refuses."""

import copy
import random

import pytest
import torch

from model import ByteStream
from model.genesis.gate.classifier import HiddenStateGate
from model.genesis.gate.policy import Policy, Rule
from model.inference.draw import Row
from model.inference.generate import generate


def collect(pieces, rows: int = 1) -> list[tuple[bytes, str]]:
    """(all bytes, why it finished) of each row; every row finishes exactly once, with its last piece."""
    data, finished = [b""] * rows, [None] * rows
    for piece in pieces:
        assert finished[piece.row] is None and (piece.data or piece.finished)
        data[piece.row] += piece.data
        finished[piece.row] = piece.finished
    assert None not in finished
    return list(zip(data, finished))


def naive_greedy(model, prompt: bytes, n: int, valid=None) -> bytes:
    """The whole text through the full forward for each byte; `valid(text)` says which bytes may come next."""
    text = prompt
    for _ in range(n):
        with torch.no_grad():
            logits = model(torch.tensor([[*text, 0]]))[0, -1]
        ranked = logits.argsort(descending=True).tolist()
        text += bytes([next(byte for byte in ranked if valid is None or valid(text + bytes([byte])))])
    return text[len(prompt) :]


def can_become_utf8(text: bytes) -> bool:
    ends = [b"", *(bytes([second]) + b"\x80" * n for second in (0x80, 0x90, 0xA0) for n in range(3))]
    return any(is_utf8(text + end) for end in ends)


def is_utf8(text: bytes) -> bool:
    try:
        text.decode("utf-8")
    except UnicodeDecodeError:
        return False
    return True


@pytest.mark.parametrize("prompt", [b"", b"a", b"abcd", "Iğdır'da ılık bir gün 😀".encode(), bytes(range(120, 256))])
def test_greedy_equals_the_full_forward(tiny_model, prompt):
    model = tiny_model()
    found = collect(generate(model, prompt, max_bytes=30, temperature=0, any_bytes=True))
    assert found == [(naive_greedy(model, prompt, 30), "length")]


def test_constrained_greedy_equals_the_full_forward(tiny_model):
    model, prompt = tiny_model(), "ışık".encode()
    expected = naive_greedy(model, prompt, 30, can_become_utf8).decode("utf-8", "ignore").encode()
    assert collect(generate(model, prompt, max_bytes=30, temperature=0)) == [(expected, "length")]


def test_prompts_of_different_lengths_run_together(tiny_model):
    model = tiny_model()
    prompts = [b"", b"one", b"a longer prompt, across patches", b"two", b"x" * 1500]
    together = collect(generate(model, prompts, max_bytes=20, temperature=0, any_bytes=True), 5)
    alone = [collect(generate(model, prompt, max_bytes=20, temperature=0, any_bytes=True))[0] for prompt in prompts]
    assert together == alone


def test_seeds_and_rows(light_model):
    model = light_model

    def rows(seed, **changes):
        return collect(generate(model, [b"a", b"bc"], max_bytes=40, seed=seed, batch=3, **changes), 6)

    first = rows(1)
    assert rows(1) == first and rows(2) != first
    assert len(set(first)) == 6
    assert rows(None) != rows(None)


def test_a_row_depends_on_neither_max_bytes_nor_other_rows_ends(tiny_model):
    model = tiny_model()
    long = collect(generate(model, [b"", b"xyz"], max_bytes=60, seed=3, batch=2, any_bytes=True), 4)
    short = collect(generate(model, [b"", b"xyz"], max_bytes=25, seed=3, batch=2, any_bytes=True), 4)
    assert [data[:25] for data, _ in long] == [data for data, _ in short]
    for row in range(4):  # stop one row early: whole streams end, the others go on as before
        stop = long[row][0][4:9]
        stopped = collect(generate(model, [b"", b"xyz"], max_bytes=60, seed=3, batch=2, any_bytes=True, stop=[stop]), 4)
        assert stopped[row] == (long[row][0][:4], "stop")
        assert stopped[:row] + stopped[row + 1 :] == long[:row] + long[row + 1 :]


def test_pieces_come_before_the_model_moves_on(light_model, monkeypatch):
    model, fed = light_model, []
    feed = ByteStream.feed
    monkeypatch.setattr(ByteStream, "feed", lambda self, x: (fed.append(x.shape[1]), feed(self, x))[1])
    pieces = generate(model, b"prompt", max_bytes=5, seed=0, any_bytes=True)
    assert fed == [6]  # the prompt in one piece, by the call itself
    for i in range(5):
        assert len(next(pieces).data) == 1 and len(fed) == 1 + i
    assert next(pieces, None) is None and len(fed) == 5


@pytest.mark.parametrize("seed", range(4))
def test_text_is_always_valid_and_pieces_are_whole_characters(light_model, seed):
    model = light_model
    for max_bytes in (1, 2, 3, 4, 5, 50):
        data = [b""] * 4
        for piece in generate(model, b"ab", max_bytes=max_bytes, temperature=1.5, seed=seed, batch=4):
            piece.data.decode("utf-8")
            data[piece.row] += piece.data
        assert all(max_bytes - 3 <= len(row) <= max_bytes for row in data)


def test_a_prompt_inside_a_character_is_completed_first(light_model):
    prompt = "漢".encode()[:1]
    for data, _ in collect(generate(light_model, prompt, max_bytes=20, seed=1, batch=8), 8):
        assert len((prompt + data).decode("utf-8")) > 1
    assert collect(generate(light_model, prompt, max_bytes=1, seed=1)) == [(b"", "length")]
    ((two, _),) = collect(generate(light_model, prompt, max_bytes=2, seed=1))
    assert len((prompt + two).decode("utf-8")) == 1


def test_early_halting_reaches_the_stream(tiny_model):
    """Every halting probability is under 1 and over 1e-6: these thresholds are K steps and none."""
    model = tiny_model(thinking_steps=3)

    def text(**arguments) -> list:
        return collect(generate(model, b"abc", max_bytes=20, temperature=0, any_bytes=True, **arguments))

    assert text(halt_threshold=1.0) == text()
    assert text(halt_threshold=1e-6) == text(thinking_steps=0)
    assert text() != text(thinking_steps=0)


def test_thinking_steps_matter(tiny_model):
    results = {
        collect(generate(tiny_model(), b"abc", max_bytes=40, temperature=0, thinking_steps=k))[0] for k in (0, 1, 3)
    }
    assert len(results) == 3


@pytest.mark.parametrize("any_bytes", [True, False])
def test_stop_strings(light_model, any_bytes):
    model = light_model

    def run(**changes):
        return collect(generate(model, b"q", max_bytes=60, seed=2, any_bytes=any_bytes, **changes))[0]

    whole, _ = run()
    for n in (1, 2, 3, 7):
        stop = whole[30 : 30 + n]
        expected = whole[: whole.find(stop)]
        if not any_bytes:
            expected = expected.decode("utf-8", "ignore").encode()
        assert run(stop=[b"never in there at all", stop]) == (expected, "stop")
        assert run(stop=[stop + b"?!"])[0].startswith(whole[:30])


@pytest.mark.parametrize("seed", range(60))
def test_rows_release_all_but_a_possible_stop(seed):
    """Against a reference that looks at the whole text after every byte."""
    rng = random.Random(seed)
    text = bytes(rng.choices(b"ab", k=40))
    stops = tuple(bytes(rng.choices(b"ab", k=rng.randint(3, 8))) for _ in range(rng.randint(0, 3)))
    row, given = Row(0, b"ab", 40, stops, whole_characters=False), b""
    for i in range(1, 41):
        piece = row.push(text[i - 1])
        given += piece.data if piece else b""
        met = [stop for stop in stops if text[:i].endswith(stop)]
        if met:
            assert row.finished == "stop" and given == text[: i - max(map(len, met))]
            return
        possible = [n for stop in stops for n in range(len(stop)) if text[:i].endswith(stop[:n])]
        assert given == (text if i == 40 else text[: i - max(possible, default=0)])
    assert row.finished == "length"


def test_a_stop_inside_characters_leaves_whole_ones():
    row, given = Row(0, b"", 99, (b"\x9fx", b"\xbc!"), whole_characters=True), b""
    for byte in "ığşğxü!".encode():
        piece = row.push(byte)
        if piece:
            piece.data.decode("utf-8")
            given += piece.data
        if row.finished:
            break
    assert (given, row.finished) == ("ığş".encode(), "stop")


@pytest.mark.parametrize("seed", range(40))
def test_rows_release_no_end_that_must_not_be(seed):
    """Against a reference that looks at the whole text: what is given out always ends where a text may end."""
    rng = random.Random(seed)
    whole_characters = bool(seed % 2)
    text = "".join(rng.choices("abığ😀", k=30)).encode()
    may_end = [rng.random() < 0.6 for _ in text]
    stops = tuple(rng.choice([b"ab", b"ba", b"\x9f", b"b\xc4"]) for _ in range(rng.randint(0, 2)))
    row, given = Row(0, b"", len(text), stops, whole_characters), b""

    def longest(n: int) -> int:
        ends = [i for i in range(n + 1) if i == 0 or (may_end[i - 1] and (not whole_characters or is_utf8(text[:i])))]
        return max(ends)

    for i in range(1, len(text) + 1):
        piece = row.push(text[i - 1], may_end[i - 1])
        given += piece.data if piece else b""
        met = max((len(stop) for stop in stops if text[:i].endswith(stop)), default=0)
        begun = max((n for stop in stops for n in range(len(stop)) if text[:i].endswith(stop[:n])), default=0)
        expected = text[: longest(i - (met or (begun if i < len(text) else 0)))]
        assert given == expected
        if met:
            break
    assert row.finished == ("stop" if met else "length")


def test_bad_policies_are_named_by_the_call_itself(tiny_model):
    policy = Policy((Rule("c", "x", "pattern", "a*", origin="policy p.toml: [c] patterns 1"),))
    with pytest.raises(ValueError, match=r"^policy p\.toml: \[c\] patterns 1 'a\*': .*accepted are"):
        generate(tiny_model(), b"x", max_bytes=3, policy=policy)


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("max_bytes", {"max_bytes": 0}),
        ("max_bytes", {"max_bytes": 1.5}),
        ("batch", {"batch": 0}),
        ("batch", {"batch": True}),
        ("seed", {"seed": -1}),
        ("seed", {"seed": 2**63}),
        ("stop", {"stop": b"x"}),
        ("stop", {"stop": ["x"]}),
        ("stop", {"stop": [b""]}),
        ("temperature", {"temperature": -0.1}),
        ("top_k", {"top_k": 0}),
        ("top_p", {"top_p": 0}),
        ("thinking_steps", {"thinking_steps": -1}),
        ("prompt", {"prompt": "text"}),
        ("prompt", {"prompt": []}),
        ("prompt", {"prompt": [b"a", "b"]}),
    ],
)
def test_bad_arguments_are_named_by_the_call_itself(tiny_model, name, changes):
    arguments = {"prompt": b"x", "max_bytes": 3} | changes
    with pytest.raises(ValueError, match=rf"^{name}\b.*accepted (is|are)"):
        generate(tiny_model(), arguments.pop("prompt"), **arguments)


@pytest.mark.parametrize(
    ("name", "changes"), [("classifier_mode", {"classifier_mode": "off"}), ("classifier", {"classifier": 7})]
)
def test_bad_classifiers_are_named_by_the_call_itself(tiny_model, name, changes):
    if "classifier" in changes:
        changes = {"classifier": HiddenStateGate(torch.ones(changes["classifier"]), torch.tensor(0.0), 0.0, 3.0)}
    with pytest.raises(ValueError, match=rf"^{name}\b.*accepted (is|are)"):
        generate(tiny_model(), b"x", max_bytes=3, **changes)


def test_broken_models_are_refused(tiny_model):
    damaged = copy.deepcopy(tiny_model())
    damaged.start.data.fill_(float("nan"))
    with pytest.raises(FloatingPointError, match="not finite"):
        generate(damaged, b"x", max_bytes=3)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_cuda_equals_the_cpu(tiny_model):
    """Greedy bytes agree; with a seed the device repeats itself, in valid text."""
    model = copy.deepcopy(tiny_model()).cuda()
    prompts = [b"", "ışık".encode(), b"x" * 1500]
    greedy = {"max_bytes": 30, "temperature": 0}
    assert collect(generate(model, prompts, **greedy), 3) == collect(generate(tiny_model(), prompts, **greedy), 3)
    drawn = {"max_bytes": 200, "top_k": 200, "top_p": 0.99, "seed": 1, "batch": 2}
    first = collect(generate(model, prompts, **drawn), 6)
    assert first == collect(generate(model, prompts, **drawn), 6) and len(set(first)) == 6
    for data, _ in first:
        data.decode("utf-8")
