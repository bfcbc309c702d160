import math
from itertools import pairwise

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from model.evaluation.bpc import bits_per_byte, cut_lanes, cut_windows


def nats_by_hand(model, piece: bytes) -> float:
    """Sum of −ln p of a piece read alone, one full forward, cross-entropy in float64."""
    x = torch.tensor([list(piece)])
    with torch.no_grad():
        logits = model(x).double()
    return float(F.cross_entropy(logits[0], x[0], reduction="sum"))


@pytest.mark.parametrize(
    "n, context, batch_size", [(1000, 64, 4), (1000, 100, 3), (37, 64, 4), (130, 13, 16), (1, 1, 1)]
)
def test_windows_equal_a_loop_by_hand(random_model, text, n, context, batch_size):
    text = text[:n]
    nats = sum(nats_by_hand(random_model, text[i : i + context]) for i in range(0, n, context))
    result = bits_per_byte(random_model, text, context=context, batch_size=batch_size)
    assert result.bytes == n
    assert result.bpc == pytest.approx(nats / math.log(2) / n, rel=1e-6)
    assert abs(result.bpc - 8) > 0.01  # random weights: the test would prove nothing on a uniform model
    assert f"{context} bytes" in result.context


@pytest.mark.parametrize("n", [1, 3, 998])
def test_one_lane_equals_the_full_forward(random_model, text, n):
    result = bits_per_byte(random_model, text[:n], stream=True, batch_size=1)
    assert result.bpc == pytest.approx(nats_by_hand(random_model, text[:n]) / math.log(2) / n, abs=1e-5)
    assert result.bytes == n


def test_a_stream_longer_than_one_piece_keeps_its_state(random_model, text):
    long = text + text[::-1] + text[:501]
    result = bits_per_byte(random_model, long, stream=True, batch_size=1)
    assert result.bpc == pytest.approx(nats_by_hand(random_model, long) / math.log(2) / len(long), abs=1e-5)


@pytest.mark.parametrize("n, lanes", [(100, 7), (5, 8), (64, 4), (99, 2)])
def test_lanes_are_read_apart_and_every_byte_once(random_model, text, n, lanes):
    text = text[:n]
    bounds = cut_lanes(n, lanes)
    assert [byte for start, stop in bounds for byte in range(start, stop)] == list(range(n))
    nats = sum(nats_by_hand(random_model, text[start:stop]) for start, stop in bounds)
    result = bits_per_byte(random_model, text, stream=True, batch_size=lanes)
    assert result.bpc == pytest.approx(nats / math.log(2) / n, abs=1e-5)


def test_max_bytes_takes_the_same_evenly_spaced_windows(random_model, text):
    windows = cut_windows(1000, 50, 230)
    assert windows == cut_windows(1000, 50, 230)
    assert len(windows) == 4 and all(stop - start == 50 for start, stop in windows)
    starts = [start for start, _ in windows]
    assert starts == [100, 350, 600, 850]  # the middle window of each quarter
    nats = sum(nats_by_hand(random_model, text[start:stop]) for start, stop in windows)
    result = bits_per_byte(random_model, text, context=50, max_bytes=230, batch_size=3)
    assert result.bytes == 200
    assert result.bpc == pytest.approx(nats / math.log(2) / 200, rel=1e-6)
    assert "200 of 1000" in result.context


@pytest.mark.parametrize("n, context, max_bytes", [(1000, 7, 993), (1000, 64, 999), (1025, 1024, 1024), (9, 4, 5)])
def test_subsets_are_whole_disjoint_windows_inside_the_text(n, context, max_bytes):
    windows = cut_windows(n, context, max_bytes)
    assert len(windows) == max_bytes // context
    assert all(stop - start == context for start, stop in windows)
    assert all(before[1] <= after[0] for before, after in pairwise(windows))
    assert windows[0][0] >= 0 and windows[-1][1] <= n


def test_max_bytes_below_a_window_and_above_the_text():
    assert cut_windows(1000, 64, 10) == [(500, 510)]
    assert cut_windows(100, 64, 100) == cut_windows(100, 64) == [(0, 64), (64, 100)]


def test_max_bytes_of_a_stream_is_a_piece_of_every_lane():
    assert cut_lanes(1000, 4, 43) == [(0, 11), (250, 261), (500, 511), (750, 760)]


@pytest.mark.parametrize("stream", [False, True])
def test_a_uniform_model_has_exactly_eight_bits(fresh_model, text, stream):
    assert bits_per_byte(fresh_model, text, context=33, stream=stream).bpc == pytest.approx(8.0, abs=1e-6)


def test_all_kinds_of_data_agree(random_model, text, tmp_path):
    (tmp_path / "text").write_bytes(text)
    array = np.frombuffer(text, np.uint8)
    kinds = [text, array, torch.tensor(list(text), dtype=torch.uint8), np.memmap(tmp_path / "text", np.uint8, "r")]
    assert len({bits_per_byte(random_model, kind, context=128).bpc for kind in kinds}) == 1


@pytest.mark.parametrize("stream", [False, True])
def test_autocast_is_close_and_not_equal(random_model, text, stream):
    exact = bits_per_byte(random_model, text, context=128, stream=stream).bpc
    half = bits_per_byte(random_model, text, context=128, stream=stream, amp_dtype=torch.bfloat16).bpc
    assert half != exact and half == pytest.approx(exact, abs=0.05)


def test_training_flags_come_back_one_by_one(fresh_model, text):
    fresh_model.train()
    fresh_model.head.eval()
    try:
        flags = [module.training for module in fresh_model.modules()]
        bits_per_byte(fresh_model, text[:10])
        assert [module.training for module in fresh_model.modules()] == flags
        with pytest.raises(RuntimeError), torch.no_grad():
            bits_per_byte(_Broken(fresh_model), text[:10])
        assert [module.training for module in fresh_model.modules()] == flags
    finally:
        fresh_model.eval()


class _Broken(torch.nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        raise RuntimeError("broken")


@pytest.mark.parametrize(
    "arguments, named",
    [
        ({"data": b""}, r"data is uint8 of shape \(0,\)"),
        ({"data": "text"}, "data is str"),
        ({"data": np.zeros((2, 2), np.uint8)}, r"data is uint8 of shape \(2, 2\)"),
        ({"data": np.zeros(4)}, "data is float64"),
        ({"context": 0}, "context=0"),
        ({"batch_size": True}, "batch_size=True"),
        ({"max_bytes": -1}, "max_bytes=-1"),
        ({"amp_dtype": torch.float64}, "amp_dtype=torch.float64"),
    ],
)
def test_bad_arguments_are_named(fresh_model, arguments, named):
    with pytest.raises(ValueError, match=named) as error:
        bits_per_byte(fresh_model, **({"data": b"abc"} | arguments))
    assert "accepted" in str(error.value)
