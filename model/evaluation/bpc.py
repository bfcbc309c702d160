"""Bits per byte of a model on a text, under a context rule that the result states.

Two rules. Windows: the text is cut into windows of `context` bytes that do not overlap, and a byte is predicted from
the bytes before it in its window alone. Stream: the text is cut into equal lanes, each read from its start to its end
with the state carried. Windows are comparable between models of any kind; the stream shows what a longer context buys.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.evaluation.report import check_count
from model.inference.stream import ByteStream

AMP_DTYPES = (None, torch.bfloat16, torch.float16)
PIECE = 1024  # bytes of every lane scored at once: bounds the working memory, changes no number

Text = np.ndarray | Tensor | bytes


@dataclass(frozen=True)
class BPCResult:
    """Bits per byte over `bytes` bytes, and the rule that says what each was predicted from."""

    bpc: float
    bytes: int
    context: str


def bits_per_byte(
    model: nn.Module,
    data: Text,
    *,
    context: int = 1024,
    batch_size: int = 16,
    stream: bool = False,
    max_bytes: int | None = None,
    amp_dtype: torch.dtype | None = None,
    progress: bool = False,
) -> BPCResult:
    """Mean −log₂ p of the bytes of `data`, every byte counted once; the model's training flags come back as they were.

    Args:
        model: an AGIFormer; without `stream` any module with parameters that maps bytes
            [B, L] to aligned logits [B, L, 256].
        data: uint8 [n] (NumPy, also memory-mapped, or torch) or bytes; n ≥ 1.
        context: bytes in a window. The last window may be shorter.
        batch_size: windows, or lanes, read together. With `stream` it is part of the rule: every lane starts afresh.
        stream: lanes instead of windows, read with `ByteStream`.
        max_bytes: read at most this many bytes: whole windows, evenly spaced over all of the text and the same ones at
            every call; with `stream` the beginning of every lane. None reads everything.
        amp_dtype: torch.bfloat16 or torch.float16 to run under autocast, None for float32.
        progress: a bar on stderr.

    Raises:
        ValueError: naming the argument, its value and what is accepted.
    """
    text = as_bytes(data)
    check_count("context", context)
    check_count("batch_size", batch_size)
    if max_bytes is not None:
        check_count("max_bytes", max_bytes)
    if amp_dtype not in AMP_DTYPES:
        raise ValueError(f"amp_dtype={amp_dtype!r}: accepted are torch.bfloat16, torch.float16 and None")
    device = next(model.parameters()).device
    with evaluation_mode(model), _autocast(device, amp_dtype):
        if stream:
            lanes = cut_lanes(len(text), batch_size, max_bytes)
            count = sum(stop - start for start, stop in lanes)
            with _bar(progress, count) as advance:
                nats = _score_lanes(model, text, lanes, device, advance)
            return BPCResult(float(nats) / math.log(2) / count, count, _lane_rule(lanes, count, len(text)))
        windows = cut_windows(len(text), context, max_bytes)
        count = sum(stop - start for start, stop in windows)
        with _bar(progress, count) as advance:
            nats = torch.zeros((), dtype=torch.float64, device=device)
            for x in batches(text, windows, batch_size, device):
                nats += byte_nats(model(x), x).sum()
                advance(x.numel())
        return BPCResult(float(nats) / math.log(2) / count, count, window_rule(context, max_bytes, count, len(text)))


def as_bytes(data: Text, name: str = "data") -> np.ndarray:
    """A text of any accepted kind as uint8 [n], n ≥ 1, without copying where that is possible. Raises ValueError."""
    if isinstance(data, bytes | bytearray | memoryview):
        data = np.frombuffer(data, np.uint8)
    elif isinstance(data, Tensor) and data.dtype == torch.uint8:
        data = data.detach().cpu().numpy()
    if not isinstance(data, np.ndarray) or data.dtype != np.uint8 or data.ndim != 1 or not len(data):
        kind = type(data).__name__
        if hasattr(data, "shape"):
            kind = f"{data.dtype} of shape {tuple(data.shape)}"
        raise ValueError(f"{name} is {kind}: accepted are bytes, or uint8 of shape [n], with n ≥ 1")
    return data


def cut_windows(n: int, context: int, max_bytes: int | None = None) -> list[tuple[int, int]]:
    """(start, stop) of the windows of n bytes, in order: all of them, or as many whole ones as `max_bytes` allows.

    A subset takes the middle window of each of as many equal spans of the text. Below one window `max_bytes` itself is
    the window's length.
    """
    if max_bytes is None or max_bytes >= n:
        return [(start, min(start + context, n)) for start in range(0, n, context)]
    context = min(context, max_bytes)
    whole, wanted = n // context, max_bytes // context
    starts = [(2 * i + 1) * whole // (2 * wanted) * context for i in range(wanted)]
    return [(start, start + context) for start in starts]


def cut_lanes(n: int, batch_size: int, max_bytes: int | None = None) -> list[tuple[int, int]]:
    """(start, stop) of at most `batch_size` lanes of n bytes, lengths differing by at most one, the longer ones first.

    With `max_bytes` every lane stops early, so that together they read that many.
    """
    read = n if max_bytes is None else min(max_bytes, n)
    count = min(batch_size, read)
    starts = [i * (n // count) + min(i, n % count) for i in range(count)]
    return [(start, start + read // count + (i < read % count)) for i, start in enumerate(starts)]


def batches(
    text: np.ndarray, windows: list[tuple[int, int]], batch_size: int, device: torch.device
) -> Iterator[Tensor]:
    """Windows as uint8 [≤ batch_size, length] on the device; a shorter last window comes alone."""
    full = windows[0][1] - windows[0][0]
    short = [window for window in windows[-1:] if window[1] - window[0] < full]
    whole = windows[: len(windows) - len(short)]
    groups = [whole[i : i + batch_size] for i in range(0, len(whole), batch_size)]
    for group in [*groups, *([short] if short else [])]:
        yield _to_device(np.stack([text[start:stop] for start, stop in group]), device)


def byte_nats(logits: Tensor, x: Tensor) -> Tensor:
    """−ln p of every byte: logits [B, L, 256] aligned with x [B, L] → [B, L] float64."""
    nats = F.cross_entropy(logits.float().flatten(0, 1), x.flatten().long(), reduction="none")
    return nats.double().view(x.shape)


def window_rule(context: int, max_bytes: int | None, count: int, n: int) -> str:
    """The windows' context rule in words."""
    length = context if max_bytes is None or max_bytes >= n else min(context, max_bytes)
    rule = f"windows of {length} bytes that do not overlap; a byte is predicted from those before it in its window"
    return rule if count == n else f"{rule}; {count} of {n} bytes, evenly spaced"


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Eval mode without gradients; afterwards every submodule has the training flag that it had."""
    flags = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, training in flags:
            module.training = training


def _score_lanes(model: nn.Module, text: np.ndarray, lanes: list, device: torch.device, advance) -> Tensor:
    """Nats of all lanes, read side by side: the steps that all of them have, then the last byte of the longer ones."""
    reader = ByteStream(model, len(lanes))
    nats = torch.zeros((), dtype=torch.float64, device=device)
    shortest = lanes[-1][1] - lanes[-1][0]
    for at in range(0, shortest, PIECE):
        size = min(PIECE, shortest - at)
        x = _to_device(np.stack([text[start + at : start + at + size] for start, _ in lanes]), device)
        nats += byte_nats(reader.score(x), x).sum()
        advance(x.numel())
    longer = [stop - 1 for start, stop in lanes if stop - start > shortest]
    if longer:
        x = _to_device(text[longer], device).unsqueeze(1)
        nats += byte_nats(reader.logits()[: len(longer)].unsqueeze(1), x).sum()
        advance(x.numel())
    return nats


def _lane_rule(lanes: list[tuple[int, int]], count: int, n: int) -> str:
    longest = lanes[0][1] - lanes[0][0]
    rule = f"{len(lanes)} lanes of up to {longest} bytes, streamed; a byte is predicted from all of its lane before it"
    return rule if count == n else f"{rule}; {count} of {n} bytes, the beginning of every lane"


def _to_device(x: np.ndarray, device: torch.device) -> Tensor:
    # A copy, because a memory-mapped text is read-only; pinned, because a copy from pageable memory waits for the card.
    tensor = torch.from_numpy(np.array(x))
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


def _autocast(device: torch.device, dtype: torch.dtype | None):
    return nullcontext() if dtype is None else torch.autocast(device.type, dtype)


@contextmanager
def _bar(progress: bool, total: int):
    """A function that advances a bar of `total` bytes; without `progress`, one that does nothing."""
    if not progress:
        yield lambda n: None
        return
    from tqdm import tqdm

    with tqdm(total=total, desc="BPC", unit="B", unit_scale=True, leave=False) as bar:
        yield bar.update
