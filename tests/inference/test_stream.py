"""ByteStream against the full forward: every byte, any split, any configuration; constant size; branches."""

import random

import pytest
import torch

from model import ByteStream
from model.inference.stream import PIECE
from tests.conftest import make_random_model

TOLERANCE = 1e-4
TEXTS = [
    "Pijamalı hasta yağız şoföre çabucak güvendi. İğne, ılık ÖĞÜN…".encode(),
    "zero 0️⃣ family 👩‍👩‍👧‍👦 flag 🇹🇷 漢字 \u0000 end".encode(),
    bytes(range(256)),
    b"\xff\xfe\x00\x80" * 9,
    b"x",
]


def random_bytes(batch: int, length: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, 256, (batch, length), generator=torch.Generator().manual_seed(seed))


def splits(length: int, seed: int) -> list[int]:
    """Random piece lengths that sum to `length`: empty ones, single bytes, parts of patches and long ones."""
    rng = random.Random(seed)
    pieces = []
    while (left := length - sum(pieces)) > 0:
        pieces.append(min(left, rng.choice([0, 1, 1, 2, 3, 4, 5, 7, rng.randint(0, 60)])))
    return pieces


def stream_logits(stream: ByteStream, x: torch.Tensor, pieces: list[int]) -> torch.Tensor:
    """[B, L + 1, 256]: before each byte and after the last; `score` on some pieces, bytes one by one on the others."""
    found, start = [], 0
    for i, n in enumerate(pieces):
        piece = x[:, start : start + n]
        if i % 2:
            scored = stream.score(piece)
            assert scored.shape == (x.shape[0], n, 256)
            found.append(scored)
        else:
            for byte in piece.split(1, 1) if n else [piece]:
                if n:
                    found.append(stream.logits().unsqueeze(1))
                stream.feed(byte)
        start += n
        assert stream.position == start
    return torch.cat([*found, stream.logits().unsqueeze(1)], 1)


@pytest.mark.parametrize("rule", ["hebbian", "delta"])
@pytest.mark.parametrize("patch_size", [1, 3, 4])
@pytest.mark.parametrize("overlap", [0, 2])
def test_equals_the_full_forward_at_every_byte(tiny_model, rule, patch_size, overlap):
    model = tiny_model(memory_rule=rule, patch_size=patch_size, patch_overlap=min(overlap, patch_size))
    x = random_bytes(3, 100)
    one_more = torch.cat([x, x[:, :1]], 1)  # its last logits are those after x
    with torch.no_grad():
        expected = model(one_more)
    assert expected.std() > 0.3  # a model whose logits are flat would agree with anything
    found = stream_logits(ByteStream(model, 3), x, splits(100, seed=6 * patch_size + 2 * overlap + (rule == "delta")))
    torch.testing.assert_close(found, expected, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("steps", [0, 1, 3])
def test_thinking_steps_per_stream(tiny_model, steps):
    model = tiny_model(thinking_steps=2)
    x = random_bytes(2, 70, seed=1)
    with torch.no_grad():
        expected = model(x, thinking_steps=steps)
        assert (expected - model(x)).abs().max() > 1e-3
    found = stream_logits(ByteStream(model, 2, thinking_steps=steps), x, splits(70, 4))
    torch.testing.assert_close(found[:, :-1], expected, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("rule", ["hebbian", "delta"])
@pytest.mark.parametrize("growth", [(), ("grow 1", "widen 48")])
def test_steps_that_read_memory(rule, growth):
    model = make_random_model(thinking_reads=True, memory_rule=rule, growth=growth).eval()
    x = random_bytes(2, 90, seed=1)
    with torch.no_grad():
        expected = model(x)
        model.reasoning.recall.weight.mul_(-1)
        assert (expected - model(x)).abs().max() > 1e-2
        model.reasoning.recall.weight.mul_(-1)
    stream = ByteStream(model, 2)
    found = stream_logits(stream, x[:, :89], splits(89, 1))
    torch.testing.assert_close(found, expected, atol=TOLERANCE, rtol=0)
    # Nothing of a call stays behind but its state.
    last = stream._trunk.blocks[1]
    while hasattr(last, "left"):
        last = last.left
    assert last.memory.read is None


def test_halting_per_stream(tiny_model):
    model = tiny_model()
    x = random_bytes(2, 60, seed=2)
    with torch.no_grad():
        expected = model(x, halt_threshold=0.5)
    found = stream_logits(ByteStream(model, 2, halt_threshold=0.5), x, splits(60, 5))
    torch.testing.assert_close(found[:, :-1], expected, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
def test_any_plasticity(tiny_model, alpha):
    model = tiny_model(plasticity=alpha)
    x = random_bytes(1, 90, seed=3)
    with torch.no_grad():
        expected = model(x)
    found = stream_logits(ByteStream(model), x, splits(90, 6))
    torch.testing.assert_close(found[:, :-1], expected, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize(("alpha", "patch_size", "overlap"), [(0.0, 1, 0), (0.1, 3, 2)])
def test_delta_reads_that_find_nothing(alpha, patch_size, overlap):
    """Strong forgetting makes delta-rule reads nearly zero: their rounding must not be blown up to full size."""
    for seed in range(4):
        model = make_random_model(seed=seed, memory_rule="delta", patch_size=patch_size, patch_overlap=overlap)
        model.set_plasticity(alpha)
        x = random_bytes(8, 90, seed)
        with torch.no_grad():
            expected = model(x)
        found = stream_logits(ByteStream(model, 8), x, splits(90, seed))
        torch.testing.assert_close(found[:, :-1], expected, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("window", [1, 2, 8])
@pytest.mark.parametrize("before", [0, 1, 5, 1030])
def test_long_prompts_cross_pieces(tiny_model, window, before):
    """One feed of more than PIECE patches equals the full forward, begun at the start, mid-patch, or late."""
    model = tiny_model(window=window)
    length = PIECE * 4 + 1100
    x = random_bytes(2, length, seed=7)
    with torch.no_grad():
        expected = model(torch.cat([x, x[:, :1]], 1))
    stream = ByteStream(model, 2).feed(x[:, :before])
    scored = stream.clone().score(x[:, before:])
    torch.testing.assert_close(scored, expected[:, before:-1], atol=TOLERANCE, rtol=0)
    stream.feed(x[:, before:])
    torch.testing.assert_close(stream.logits(), expected[:, -1], atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("text", TEXTS)
def test_prompts_of_any_bytes(tiny_model, text):
    model = tiny_model()
    x = torch.tensor([list(text)], dtype=torch.uint8)
    with torch.no_grad():
        expected = model(x)
    found = stream_logits(ByteStream(model), x, splits(len(text), len(text)))
    torch.testing.assert_close(found[:, :-1], expected, atol=TOLERANCE, rtol=0)


def test_rows_do_not_see_each_other(tiny_model):
    model = tiny_model()
    x = random_bytes(3, 77, seed=8)
    together = ByteStream(model, 3).feed(x).logits()
    alone = torch.cat([ByteStream(model).feed(row.unsqueeze(0)).logits() for row in x])
    torch.testing.assert_close(together, alone, atol=TOLERANCE, rtol=0)


def test_empty_stream_gives_the_first_byte(tiny_model):
    model = tiny_model()
    stream = ByteStream(model, 2).feed(torch.zeros(2, 0, dtype=torch.long))
    assert stream.position == 0 and stream.score(torch.zeros(2, 0, dtype=torch.long)).shape == (2, 0, 256)
    with torch.no_grad():
        expected = model(torch.zeros(2, 1, dtype=torch.long))[:, 0]
    torch.testing.assert_close(stream.logits(), expected, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("length", [0, 6, 41, 200])
def test_clones_are_independent(tiny_model, length):
    model = tiny_model(memory_rule="delta" if length == 41 else "hebbian")
    x = random_bytes(2, length, seed=9)
    left, right = random_bytes(2, 30, seed=10), random_bytes(2, 30, seed=11)
    stream = ByteStream(model, 2).feed(x)
    before = stream.logits().clone()
    branch = stream.clone()
    second = branch.clone()
    assert not torch.equal(branch.feed(left).logits(), before)
    assert torch.equal(stream.logits(), before) and stream.position == length
    stream.feed(right)
    for found, continuation in ((stream, right), (branch, left), (second.feed(left), left)):
        expected = ByteStream(model, 2).feed(torch.cat([x, continuation], 1)).logits()
        torch.testing.assert_close(found.logits(), expected, atol=TOLERANCE, rtol=0)


def test_state_has_a_constant_size(tiny_model):
    """Full after `window` patches, and the same after 50 KB, in one feed or byte by byte."""
    model = tiny_model()
    P, window = model.config.patch_size, model.config.window
    stream = ByteStream(model, 2).feed(random_bytes(2, P * window))
    full = stream.state_bytes()
    stream.feed(random_bytes(2, 50_000, seed=12))
    assert stream.position == 50_000 + P * window and stream.state_bytes() == full
    sizes = set()
    for byte in random_bytes(2, 4 * P, seed=13).split(1, 1):
        stream.feed(byte)
        sizes.add(stream.state_bytes())
    assert max(sizes) <= full + 2 * P * 8 and min(sizes) == full  # the open patch: P int64 bytes a row
    assert stream.logits().isfinite().all()


def test_the_state_keeps_nothing_else_alive(tiny_model):
    """No tensor of the state is a view into a buffer that grows with what was read."""
    stream = ByteStream(tiny_model()).feed(random_bytes(1, 20_000))
    tensors = [stream._tail, stream._boundary, stream._open, stream._latent]
    for block in stream._trunk.blocks:
        tensors += [block.attention.k, block.attention.v, block.memory.M, block.memory.z]
    longest = PIECE + stream.model.config.window
    allowed = 4 * longest * 3 * stream.model.config.d_model
    assert all(tensor.untyped_storage().nbytes() <= allowed for tensor in tensors)


def test_bad_input_is_named(tiny_model):
    model = tiny_model()
    for value in (0, -1, 1.0, True, None):
        with pytest.raises(ValueError, match=r"batch_size=.*accepted"):
            ByteStream(model, value)
    with pytest.raises(ValueError, match=r"thinking_steps=-1.*accepted"):
        ByteStream(model, thinking_steps=-1)
    stream = ByteStream(model, 2)
    for wrong in (torch.zeros(1, 4, dtype=torch.long), torch.zeros(2, dtype=torch.long), torch.zeros(2, 4)):
        with pytest.raises(ValueError, match=r"x is .*accepted are integer bytes \[2, n\]"):
            stream.feed(wrong)
