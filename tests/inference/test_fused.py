"""FusedStream against the full forward: every byte, from any place of a patch, at addresses that stay."""

import os

import pytest
import torch

from model import AGIFormer, AGIFormerConfig, ByteStream
from model.inference import fused
from model.inference.fused import FusedStream, FusedWeights
from model.kernels import decode
from tests.conftest import draw_weights, make_random_model
from tests.inference.test_static import replayed
from tests.inference.test_stream import TEXTS, TOLERANCE, random_bytes

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
interpreter_or_card = pytest.mark.skipif(
    decode.triton is None or (not CUDA and os.environ.get("TRITON_INTERPRET") != "1"),
    reason="needs the package triton, and a CUDA device or TRITON_INTERPRET=1, which conftest sets where there is none",
)
card = pytest.mark.skipif(not CUDA or decode.triton is None, reason="needs a CUDA device and the package triton")

ONE = {"n_layers": 1, "thinking_steps": 1, "window": 4}
# batch, config changes
VARIANTS = {
    "as it is": (2, {"window": 4}),
    "delta, more petals, no thinking": (
        1,
        ONE | {"memory_rule": "delta", "thinking_steps": 0, "growth": ("petals 0 1", "petals 0 3")},
    ),
    "swiglu, more petals": (1, ONE | {"hull": "swiglu", "growth": ("petals 0 1",), "n_heads": 1}),
    "patches of 1": (1, ONE | {"patch_size": 1, "patch_overlap": 1, "n_heads": 1}),
    "patches of 3": (3, ONE | {"patch_size": 3, "patch_overlap": 0, "n_heads": 1, "recall_heads": 0}),
}


@pytest.fixture(autouse=True)
def large_programs(monkeypatch):
    """The interpreter's time goes by programs, not by their size; how rows are shared out, the kernels' tests see."""
    if not CUDA:
        for name, value in (("PROGRAMS", 1), ("ROWS", 512), ("TILE", 1 << 17)):
            monkeypatch.setattr(decode, name, value)


def draw_vectors(model: AGIFormer) -> AGIFormer:
    """Biases and temperatures of hulls, too, each of its own."""
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter += torch.randn(parameter.shape, generator=generator) * 0.5
    return model


def tensors(stream: FusedStream) -> list[torch.Tensor]:
    found = [stream._known, stream._latent, stream._states, stream._products, stream._begun, stream.logits()]
    found += [*stream._phases, *stream._trunk.tensors(), stream._trunk.position]
    return found + ([] if stream._recall is None else [*stream._recall.tensors(), stream._recalled])


def follow(model, x: torch.Tensor, start: int, tolerance: float = TOLERANCE) -> FusedStream:
    """Read all of x [B, L] behind its first `start` bytes, with the logits of every byte held to the full forward's."""
    expected = model(x)
    stream = ByteStream(model, len(x)).feed(x[:, :start])
    before = [tensor.clone() for tensor in stream._trunk.tensors()]
    found = FusedStream(stream)
    addresses = [tensor.data_ptr() for tensor in tensors(found)]
    for t in range(start, x.shape[1]):
        assert found.position == t and found.place == t % model.config.patch_size
        torch.testing.assert_close(found.logits(), expected[:, t], rtol=tolerance, atol=tolerance)
        found.read(x[:, t])
    assert addresses == [tensor.data_ptr() for tensor in tensors(found)]
    # The stream that it began from stands where it stood.
    assert all(torch.equal(a, b) for a, b in zip(before, stream._trunk.tensors())) and stream.position == start
    torch.testing.assert_close(stream.logits(), expected[:, start], rtol=TOLERANCE, atol=TOLERANCE)
    return found


@interpreter_or_card
@torch.no_grad()
@pytest.mark.parametrize("variant", VARIANTS)
def test_it_equals_the_full_forward_at_every_byte(variant):
    """From a window of 4 patches that is not full to one that was written over; it begins inside a patch."""
    batch, changes = VARIANTS[variant]
    model = draw_vectors(make_random_model(**changes)).to(DEVICE)
    P = model.config.patch_size
    follow(model, random_bytes(batch, 5 * P + 2).to(DEVICE), P + P // 2)


@interpreter_or_card
@torch.no_grad()
@pytest.mark.parametrize("start", [46, 51])
def test_it_begins_with_a_full_window(start):
    """At the ring's place that the position says, and with a patch whose last byte is the next."""
    model = make_random_model(**ONE, recall_heads=0, seed=3).to(DEVICE)
    text = b"".join(TEXTS[:2]) + b"\0\xff"
    follow(model, torch.tensor([list(text[: start + 6])], device=DEVICE), start)


@interpreter_or_card
@torch.no_grad()
def test_thinking_steps_are_the_stream_s_and_plasticity_is_the_model_s():
    model = make_random_model(**ONE).to(DEVICE)
    x = random_bytes(1, 17).to(DEVICE)
    stream = ByteStream(model, thinking_steps=3).feed(x[:, :8])
    found = FusedStream(stream)
    model.set_plasticity(0.25)
    for t in range(8, 16):
        found.read(x[:, t])
    expected = stream.feed(x[:, 8:16]).logits()
    torch.testing.assert_close(found.logits(), expected, rtol=TOLERANCE, atol=TOLERANCE)


@interpreter_or_card
@torch.no_grad()
def test_weights_are_shared_and_refreshed():
    model = make_random_model(**ONE, recall_heads=0).to(DEVICE)
    x = random_bytes(1, 12).to(DEVICE)
    weights = FusedWeights(model)
    stream = ByteStream(model).feed(x[:, :4])
    old, new = FusedStream(stream, weights), FusedStream(stream, weights)
    addresses = [tensor.data_ptr() for part in weights.parts for tensor in part.values()]

    def read(found: FusedStream) -> torch.Tensor:
        for t in range(4, 12):
            found.read(x[:, t])
        return found.logits()

    was = stream.clone().feed(x[:, 4:]).logits()
    for parameter in model.parameters():
        parameter.mul_(1.1)
    torch.testing.assert_close(read(old), was, rtol=TOLERANCE, atol=TOLERANCE)
    weights.refresh()
    assert addresses == [tensor.data_ptr() for part in weights.parts for tensor in part.values()]
    # What was begun with the old weights goes on with the new ones: the product that the next byte begins with, too.
    expected = stream.feed(x[:, 4:]).logits()
    assert (read(new) - expected).abs().max() < 0.1 * (was - expected).abs().max()
    model.add_petals(0)
    for call in (weights.refresh, lambda: FusedStream(stream, weights), lambda: old.read(x[:, 0])):
        with pytest.raises(ValueError, match="their model has grown since they were copied; accepted are new ones"):
            call()


@interpreter_or_card
def test_what_it_cannot_go_on_from():
    model = make_random_model(**ONE).to(DEVICE)
    with pytest.raises(ValueError, match="stream at byte 3: accepted is one that has read a patch of 4 bytes"):
        FusedStream(ByteStream(model).feed(random_bytes(1, 3)))
    stream = ByteStream(model, halt_threshold=0.5).feed(random_bytes(1, 8))
    with pytest.raises(ValueError, match=r"halt_threshold=0\.5: accepted is None"):
        FusedStream(stream)
    other = FusedWeights(make_random_model(**ONE).to(DEVICE))
    with pytest.raises(ValueError, match="weights of another model: accepted are those of the stream's"):
        FusedStream(ByteStream(model).feed(random_bytes(1, 8)), other)


@interpreter_or_card
def test_what_it_cannot_read():
    model = make_random_model(**ONE).to(DEVICE)
    found = FusedStream(ByteStream(model, 2).feed(random_bytes(2, 8)))
    for x in (torch.zeros(1, dtype=torch.long), torch.zeros(2, 1, dtype=torch.long), torch.zeros(2)):
        with pytest.raises(ValueError, match=r"x is torch\..* of shape .*: accepted are integer bytes \[2\]"):
            found.read(x.to(DEVICE))
    assert found.position == 8


@interpreter_or_card
@torch.no_grad()
def test_its_buffers_are_float32_under_autocast_and_another_default_type():
    model = make_random_model(n_layers=1, thinking_steps=1, window=4, n_heads=1).to(DEVICE)
    x = random_bytes(1, 8).to(DEVICE)
    with torch.autocast(DEVICE, torch.bfloat16):
        stream = ByteStream(model).feed(x[:, :6])
        torch.set_default_dtype(torch.float64)
        try:
            found = FusedStream(stream)
            made = [*tensors(found), found._heads, found._mixed, found._units, found._thought, found._conditioned]
            assert {tensor.dtype for tensor in made if tensor.is_floating_point()} == {torch.float32}
            assert {t.dtype for part in found._weights.parts for name, t in part.items() if name != "frequencies"} == {
                torch.float32
            }
            found.read(x[:, 6])
            found.read(x[:, 7])
        finally:
            torch.set_default_dtype(torch.float32)
    assert found.logits().isfinite().all() and found.position == 8


REFUSED = {
    "growth 'grow 0': accepted are added petals only": {"growth": ("petals 0 1", "grow 0")},
    "growth 'widen 48': accepted are added petals only": {"growth": ("widen 48",)},
    "anchors=True: accepted is False": {"anchors": True},
    "thinking_reads=True: accepted is False": {"thinking_reads": True},
    "d_model / n_heads=130: accepted is at most 128": {"d_model": 260},
    "window=1025: accepted is at most 1024": {"window": 1025},
    "petals=65: accepted is at most 64": {"growth": ("petals 0 65",)},
}


@interpreter_or_card
@pytest.mark.parametrize("reason", REFUSED)
def test_what_the_kernels_do_not_know(reason):
    model = make_random_model(**ONE | REFUSED[reason]).to(DEVICE)
    assert not FusedStream.accepts(model)
    with pytest.raises(ValueError) as error:
        FusedStream(ByteStream(model).feed(random_bytes(1, 8)))
    assert str(error.value) == reason


@interpreter_or_card
def test_other_types_and_devices(monkeypatch):
    model = make_random_model(**ONE).to(DEVICE)
    assert FusedStream.accepts(model)
    assert not FusedStream.accepts(make_random_model(**ONE).to(DEVICE).double())
    monkeypatch.setattr(fused.decode, "available", lambda device: False)
    with pytest.raises(ValueError, match=f"model on {DEVICE}.*: accepted is one on CUDA, with the package triton"):
        FusedStream(ByteStream(model).feed(random_bytes(1, 8)))


@pytest.mark.skipif(decode.triton is None, reason="needs the package triton")
def test_which_kernels_start_early(monkeypatch):
    class Rows:
        def __init__(self, rows: int, device: str):
            self.rows, self.device, self.is_cuda = rows, torch.device(device), device != "cpu"

        def __len__(self) -> int:
            return self.rows

    monkeypatch.setattr(decode.tl.extra.cuda, "gdc_wait", None, raising=False)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: {0: (9, 0), 1: (8, 6)}[device])
    monkeypatch.setattr(decode, "_starts_early", decode._starts_early.__wrapped__)
    early, late = {"EARLY": True, "launch_pdl": True}, {"EARLY": False}
    assert [decode.launch(Rows(n, "cuda:0")) for n in (1, 8, 9)] == [early, early, late]
    assert decode.launch(Rows(1, "cuda:1")) == decode.launch(Rows(1, "cpu")) == late
    monkeypatch.setattr(torch.version, "hip", "6.4")
    assert decode.launch(Rows(1, "cuda:0")) == late
    monkeypatch.setattr(decode, "EARLY", True)
    assert decode.launch(Rows(99, "cpu")) == early


def random_small(**changes) -> AGIFormer:
    """Of the preset small's shapes, every matrix drawn."""
    with torch.device("cuda"):
        model = AGIFormer(AGIFormerConfig.preset("small", **changes)).eval()
    draw_weights(model, torch.Generator("cuda").manual_seed(1))
    return model


SMALL = [
    {},
    {"memory_rule": "delta", "hull": "swiglu"},
    {"recall_heads": 1, "n_heads": 4},
    {"patch_size": 1, "patch_overlap": 1},
]


@card
@pytest.mark.parametrize("batch", [1, 3, 16])
@pytest.mark.parametrize("changes", SMALL, ids=str)
@torch.no_grad()
def test_its_steps_are_graphs(changes, batch):
    """Of the preset small, from before and after a window of 16 patches is full."""
    model = random_small(n_layers=2, window=16, **changes)
    x = random_bytes(batch, 160).cuda()
    found = replayed(FusedStream, model, x)
    torch.testing.assert_close(found, model(x)[:, -found.shape[1] :], rtol=1e-3, atol=1e-3)


@card
@pytest.mark.skipif(CUDA and torch.cuda.get_device_capability() < (9, 0), reason="needs programmatic dependent launch")
@pytest.mark.parametrize("batch", [1, 16])
@torch.no_grad()
def test_the_same_bits_every_time_and_when_kernels_start_early(batch, monkeypatch):
    model = random_small(recall_heads=1)
    x = random_bytes(batch, 400).cuda()
    monkeypatch.setattr(decode, "EARLY", False)
    expected = replayed(FusedStream, model, x)
    for early in (False, True, None):
        monkeypatch.setattr(decode, "EARLY", early)
        assert torch.equal(replayed(FusedStream, model, x), expected)
