"""StaticStream against the full forward: every byte, from any place of a patch, at addresses that stay."""

import pytest
import torch

from model import AGIFormer, ByteStream
from model.inference.static import StaticStream
from tests.conftest import make_random_model
from tests.inference.test_stream import TOLERANCE, random_bytes

VARIANTS = {
    "as it is": {},
    "delta": {"memory_rule": "delta"},
    "patches of 1": {"patch_size": 1, "patch_overlap": 1},
    "patches of 3": {"patch_size": 3, "patch_overlap": 0},
    "no byte memory": {"recall_heads": 0},
    "thinking reads": {"thinking_reads": True},
    "grown": {"growth": ("grow 0", "petals 1 2", "widen 48", "grow 0")},
}


def replayed(kind: type[StaticStream], model: AGIFormer, x: torch.Tensor) -> torch.Tensor:
    """Logits of every byte of x [B, L] from the fourth patch on, one captured graph for each place of a patch."""
    P, batch = model.config.patch_size, len(x)
    found = kind(ByteStream(model, batch).feed(x[:, : 3 * P]))
    chosen, graphs, seen = torch.zeros(batch, dtype=torch.long, device="cuda"), {}, []
    for t in range(3 * P, x.shape[1]):
        seen.append(found.logits().clone())
        chosen.copy_(x[:, t])
        place = found.place
        if t < 5 * P:  # eagerly at first, as capture wants it
            found.read(chosen)
            continue
        if place not in graphs:
            at = found.position, found.place
            graphs[place] = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graphs[place]):
                found.read(chosen)
            found.position, found.place = at
        graphs[place].replay()
        found.count()
    return torch.stack(seen, 1)


def tensors(static: StaticStream) -> list[torch.Tensor]:
    found = [static._open, static._tail, static._boundary, static._latent, static._hidden, static._conditioned]
    found += [*static._trunk.tensors(), static._trunk.position]
    return found + ([] if static._recall is None else [*static._recall.tensors(), static._recalled])


@torch.no_grad()
@pytest.mark.parametrize("start", [6, 45])
@pytest.mark.parametrize("variant", VARIANTS)
def test_it_equals_the_full_forward_at_every_byte(variant, start):
    """From before a window of 8 patches is full, and from after it."""
    model = make_random_model(**VARIANTS[variant])
    assert model.config.window == 8
    x = random_bytes(2, 80)
    expected = model(x)
    stream = ByteStream(model, 2).feed(x[:, :start])
    before = [tensor.clone() for tensor in stream._trunk.tensors()]
    static = StaticStream(stream)
    addresses = [tensor.data_ptr() for tensor in tensors(static)]
    for t in range(start, 80):
        assert static.position == t and static.place == t % model.config.patch_size
        torch.testing.assert_close(static.logits(), expected[:, t], rtol=TOLERANCE, atol=TOLERANCE)
        static.read(x[:, t])
    assert addresses == [tensor.data_ptr() for tensor in tensors(static)]
    # The stream that it began from stands where it stood.
    assert all(torch.equal(a, b) for a, b in zip(before, stream._trunk.tensors())) and stream.position == start
    torch.testing.assert_close(stream.logits(), expected[:, start], rtol=TOLERANCE, atol=TOLERANCE)


def test_routers_do_not_draw_and_the_mode_is_kept():
    model = make_random_model(growth=("grow 0",)).train()
    x = random_bytes(1, 40)
    static = StaticStream(ByteStream(model).feed(x[:, :8]))
    for t in range(8, 39):
        static.read(x[:, t])
    assert model.training
    model.eval()
    with torch.no_grad():
        torch.testing.assert_close(static.logits(), model(x)[:, 39], rtol=TOLERANCE, atol=TOLERANCE)


def test_what_it_cannot_go_on_from():
    model = make_random_model()
    with pytest.raises(ValueError, match="stream at byte 3: accepted is one that has read a patch of 4 bytes"):
        StaticStream(ByteStream(model).feed(random_bytes(1, 3)))
    stream = ByteStream(model, halt_threshold=0.5).feed(random_bytes(1, 8))
    with pytest.raises(ValueError, match=r"halt_threshold=0\.5: accepted is None"):
        StaticStream(stream)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("variant", VARIANTS)
@torch.no_grad()
def test_its_steps_are_graphs(variant):
    model = make_random_model(**VARIANTS[variant]).cuda()
    x = random_bytes(2, 120).cuda()
    found = replayed(StaticStream, model, x)
    torch.testing.assert_close(found, model(x)[:, -found.shape[1] :], rtol=1e-3, atol=1e-3)
