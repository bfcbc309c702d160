"""A decoding step of small batches as a handful of Triton kernels: matrices times a few vectors, and what lies between.

    encode      bytes of a patch → its latent and rotary phases         tables that were multiplied out beforehand
    linear      y = W f(x) + b, or x ← x + g ⊙ W f(x)                   f: norm, squared ReLU, gated units
    hull_down   x ← x + n (lme_p(h_p max(B_p, 0)) − lme_p(h_p max(−B_p, 0)))    the second half of convex petals
    mix         window attention, fast weights and the gate between them, of one position
    read_byte   the GRU reads a byte; logits, and the product that its next step begins with

`model.inference.fused` puts a whole step together from them. Only forward, only float32, any batch size.

Notable:

- At batch 1 a step is bound by reading the weights once and by starting kernels, so there are few kernels, and each
  has a row of a matrix read by one program alone. Sums are plain float32 sums (no tensor cores) in a fixed order.
- A norm is applied after the product with its matrix: W (x · s) = s · (W x), so that one pass over x does for both.
- Normalised queries and keys have scores of at most √E ≤ 11.4, so that a softmax needs no maximum.
- A kernel that writes over its own input (states, the byte's place) has a barrier before the first store: small tensors
  are held by several warps at once, and one may be late in loading.
- Every tensor is written in place: no call makes one, none waits for the device, all can be captured in a CUDA graph.
"""

from functools import cache

import torch
from torch import Tensor

from model.kernels.recurrent import EPSILON

try:
    import triton
    import triton.language as tl
except ImportError:  # StaticStream does everywhere
    triton = None

WIDEST_HEAD, WIDEST_WINDOW, MOST_PETALS = 128, 1024, 64
NONE, SQUARED_RELU, SWIGLU = 0, 1, 2  # what is done to an input of `linear`
TILE = 4096  # elements of a matrix, times rows of a batch, that a program takes at once: 32 registers of a thread
KEYS = 8192  # elements of keys that a program takes at once
ROWS, BATCH = 8, 8  # at most so many rows of a matrix, and of a batch, in one program
PROGRAMS = 256  # at least, where there are so many rows: some two on every multiprocessor of an H100
# Whether a kernel starts, and loads weights, while the one before it still runs (programmatic dependent launch: Hopper
# and later, Triton 3.4). Each lets the next one start only when it has itself waited, so that never more than two run.
# None: where it pays, up to EARLY_ROWS rows of a batch; with more of them there is too little to wait for.
EARLY: bool | None = None
EARLY_ROWS = 8
NORMALISE_EPS = 1e-12  # torch.nn.functional.normalize's


def available(device: torch.device) -> bool:
    """Whether the kernels run there: on CUDA, or anywhere in Triton's interpreter."""
    return triton is not None and (device.type == "cuda" or _interpreted())


def _interpreted() -> bool:
    return not isinstance(_linear, triton.JITFunction)


def launch(rows: Tensor) -> dict[str, bool]:
    """How a kernel over a batch is launched, rows [B, ...]: whether it starts early, for itself and for Triton."""
    if EARLY is not None:
        early = EARLY
    else:
        early = len(rows) <= EARLY_ROWS and rows.is_cuda and _starts_early(rows.device.index)
    return {"EARLY": True, "launch_pdl": True} if early else {"EARLY": False}


@cache
def _starts_early(device: int) -> bool:
    if torch.version.hip:  # whose capabilities count otherwise
        return False
    return hasattr(tl.extra.cuda, "gdc_wait") and torch.cuda.get_device_capability(device) >= (9, 0)


def _power(n: int) -> int:
    return triton.next_power_of_2(n)


def _rows(B: int, rows: int) -> tuple[int, int]:
    """Rows of the batch and of a matrix in one program."""
    batch = min(_power(B), BATCH)
    most = max(1, rows * triton.cdiv(B, batch) // PROGRAMS)
    return batch, min(ROWS, 1 << most.bit_length() - 1)


def linear(
    x: Tensor,
    weight: Tensor,
    out: Tensor,
    *,
    bias: Tensor | None = None,
    norm: float | None = None,
    act: int = NONE,
    add: bool = False,
    gates: Tensor | None = None,
    tanh: int = 0,
) -> None:
    """out = W f(x) + b, written over or added to what is there. All float32, the last dimension contiguous.

    Args:
        x: [B, D], of any stride; [B, 2D] for SWIGLU: f is silu of the first half times the second.
        weight: [R, D].
        out: [B, R], not x.
        bias: [R].
        norm: ε of an RMS norm of x; None for none.
        act: NONE, SQUARED_RELU or SWIGLU.
        add: whether out is added to.
        gates: [B, R + 1]: what is added is multiplied by sigmoid(gates[:, :R]) · (1 − sigmoid(gates[:, R:])).
        tanh: the hyperbolic tangent is taken of so many of the first outputs.
    """
    (B, R), D = out.shape, weight.shape[1]
    batch, rows = _rows(B, R)
    _linear[(triton.cdiv(B, batch), triton.cdiv(R, rows))](
        x, weight, bias, gates, out, B, R, x.stride(0), out.stride(0), 0 if gates is None else gates.stride(0),
        D, norm is not None, norm or 0.0, act, bias is not None, add, gates is not None, tanh,
        batch, rows, min(_power(D), TILE // (batch * rows)), **launch(out),
    )  # fmt: skip


def hull_down(hidden: Tensor, down: Tensor, tau: Tensor, out: Tensor) -> None:
    """Add to out [B, D] what a group of convex petals says (`model.layers.hull.ConvexPetals`).

    Args:
        hidden: [B, n · width], its units before the squared ReLU; the last dimension contiguous.
        down: [D, n, width], n ≤ 64.
        tau: [1], > 0.
    """
    B, (D, n, width) = len(hidden), down.shape
    batch, rows = _rows(B, D)
    block = max(1, TILE // (batch * rows * _power(n)))
    _hull_down[(triton.cdiv(B, batch), triton.cdiv(D, rows))](
        hidden, down, tau, out, B, D, hidden.stride(0), out.stride(0), n, width,
        batch, rows, _power(n), min(_power(width), block), **launch(out),
    )  # fmt: skip


def mix(
    heads: Tensor,
    phases: tuple[Tensor, Tensor],
    position: Tensor,
    plasticity: Tensor,
    keys: Tensor,
    values: Tensor,
    M: Tensor,
    z: Tensor,
    out: Tensor,
    *,
    delta: bool,
    eps: tuple[float, float],
) -> None:
    """A block's two mixers at one position, fused by its gate; their states go one step on in place.

    Args:
        heads: [B, 7D + H], or [B, 7D + 2H] for the delta rule: attention's q, k, v, the memory's q, k, v and the gate,
            [D] each; the logits of the decay, and of the delta rule's writing strength, [H] each.
        phases: (cos, sin) of this position, [E / 2] each.
        position: [] int64, how many positions have begun, this one included.
        plasticity: [] α.
        keys, values: [B, H, W, E], a ring: position p is at place p mod W, and takes that of p − W.
        M, z: [B, H, E, E] and [B, H, E].
        out: [B, D], γ ⊙ norm(attended) + (1 − γ) ⊙ norm(recalled).
        eps: of queries, keys and what attention found; of what the memory recalled.
    """
    B, H, W, E = keys.shape
    width = _power(E)
    _mix[(H, B)](
        heads, *phases, position, plasticity, keys, values, M, z, out, heads.stride(0), H, W, E, width,
        min(_power(W), KEYS // width), delta, *eps, EPSILON, NORMALISE_EPS,
        num_warps=16 if width == WIDEST_HEAD else 8, **launch(heads),
    )  # fmt: skip


def encode(
    x: Tensor,
    known: Tensor,
    table: Tensor,
    frequencies: Tensor,
    position: Tensor,
    out: Tensor,
    phases: tuple[Tensor, Tensor],
    patch_size: int,
) -> None:
    """A patch's last byte has come: its latent, and the position that it begins.

    Args:
        x: [B] any integer type and stride, the last byte.
        known: [B, n] int64, the bytes before it that its latent sees: the overlap, then the patch. The overlap of
            the next patch is written over this one's.
        table: [n, 256, D], what each byte adds at each place.
        frequencies: [E / 2] float64, angles per position.
        position: [] int64, positions that have begun; one more afterwards.
        out: [B, D].
        phases: (cos, sin) of the position, [E / 2] each, written.
    """
    B, (places, _, D) = len(x), table.shape
    count = _power(places)
    _encode[(B,)](
        x, known, table, frequencies, position, out, *phases, x.stride(0), known.stride(0), D, places,
        places - patch_size, patch_size, len(frequencies), _power(len(frequencies)), count,
        min(_power(D), max(1, TILE // count)), **launch(x),
    )  # fmt: skip


def read_byte(
    x: Tensor,
    table: Tensor,
    conditioned: Tensor,
    recurrent: Tensor,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor,
    norm: float,
    new_hidden: Tensor,
    logits: Tensor,
    keep: Tensor,
    new_recurrent: Tensor | None = None,
) -> None:
    """The byte head's GRU reads a byte: its new state, logits, and the recurrent product of that state.

    Args:
        x: [B] any integer type and stride.
        table: [257, 3C], the GRU's inputs by byte.
        conditioned: [B, 3C], its inputs from the latent.
        recurrent, hidden: [B, 3C] and [B, C]: its state, and the recurrent matrix times it plus its bias.
        weight: [256 + 3C, C], of the logits, then the recurrent one; bias: [256 + 3C].
        norm: ε of the norm between state and logits.
        new_hidden, logits: written, [B, C] and [B, 256]. The new state is not the old one's tensor.
        keep: [B] int64, where the byte is noted.
        new_recurrent: written, [B, 3C]; without it that product is not made.
    """
    B, C = hidden.shape
    R = 256 if new_recurrent is None else 256 + 3 * C
    batch, rows = _rows(B, R)
    _read_byte[(triton.cdiv(B, batch), triton.cdiv(R, rows))](
        x, table, conditioned, recurrent, hidden, weight, bias, new_hidden, logits, new_recurrent, keep, B, R,
        x.stride(0), conditioned.stride(0), hidden.stride(0), keep.stride(0),
        C, norm, new_recurrent is not None,
        batch, rows, min(_power(C), TILE // (batch * max(rows, 4))), **launch(x),
    )  # fmt: skip


if triton is not None:

    @triton.jit
    def _tanh(x):
        return 2.0 * tl.sigmoid(2.0 * x) - 1.0

    @triton.jit
    def _expm1(t):
        """exp(t) − 1 of t ≤ 0, after Kahan: the errors of w cancel."""
        w = tl.exp(t)
        kahan = (w - 1.0) * t / tl.where(w == 1.0, 1.0, tl.log(tl.maximum(w, 0.1)))
        return tl.where(w == 1.0, t, tl.where(t < -1.0, w - 1.0, kahan))

    @triton.jit
    def _log1p(x):
        """log(1 + x) of −1 < x ≤ 0."""
        w = 1.0 + x
        return tl.where(w == 1.0, x, tl.log(w) * x / tl.where(w == 1.0, 1.0, w - 1.0))

    @triton.jit
    def _linear(
        x_at, weight_at, bias_at, gates_at, out_at, B, R, x_stride, out_stride, gates_stride,
        D: tl.constexpr, NORM: tl.constexpr, EPS: tl.constexpr, ACT: tl.constexpr, BIAS: tl.constexpr,
        ADD: tl.constexpr, GATED: tl.constexpr, TANH: tl.constexpr,
        BB: tl.constexpr, BR: tl.constexpr, BD: tl.constexpr, EARLY: tl.constexpr,
    ):  # fmt: skip
        batch = tl.program_id(0) * BB + tl.arange(0, BB)
        row = tl.program_id(1) * BR + tl.arange(0, BR)
        lane = tl.arange(0, BD)[None, None, :]
        weights = weight_at + row.to(tl.int64)[None, :, None] * D + lane
        xs = x_at + batch[:, None, None] * x_stride + lane
        weight = tl.load(weights, (row[None, :, None] < R) & (lane < D), other=0.0)
        # All that does not wait for the sum is loaded before it: behind its barrier it would cost another latency.
        inside = (batch[:, None] < B) & (row[None, :] < R)
        out = out_at + batch[:, None] * out_stride + row[None, :]
        if BIAS:
            bias = tl.load(bias_at + row, row < R, other=0.0)
        if EARLY:
            tl.extra.cuda.gdc_wait()
            tl.extra.cuda.gdc_launch_dependents()
        if GATED:
            gates = gates_at + batch[:, None] * gates_stride
            gate = tl.load(gates + row[None, :], inside, other=0.0)
            halt = tl.load(gates + R, batch[:, None] < B, other=0.0)
        if ADD:
            before = tl.load(out, inside, other=0.0)
        total = tl.zeros([BB, BR, BD], tl.float32)
        squares = tl.zeros([BB, 1, BD], tl.float32)
        for d in range(0, D, BD):
            seen = (batch[:, None, None] < B) & (d + lane < D)
            x = tl.load(xs + d, seen, other=0.0)
            if ACT == 1:
                x = tl.maximum(x, 0.0)
                x = x * x
            if ACT == 2:
                x = x * tl.sigmoid(x) * tl.load(xs + D + d, seen, other=0.0)
            total += weight * x
            if NORM:
                squares += x * x
            weight = tl.load(weights + d + BD, (row[None, :, None] < R) & (d + BD + lane < D), other=0.0)
        y = tl.sum(total, 2)
        if NORM:
            y *= tl.rsqrt(tl.sum(squares, 2) / D + EPS)
        if BIAS:
            y += bias[None, :]
        if TANH:
            y = tl.where(row[None, :] < TANH, _tanh(y), y)
        if GATED:
            y *= tl.sigmoid(gate) * (1.0 - tl.sigmoid(halt))
        if ADD:
            y += before
        tl.store(out, y, inside)

    @triton.jit
    def _log_mean_exp(o, inside, tau, P: tl.constexpr):
        """τ⁻¹ log mean exp(τ o) over the last dimension, relative to the largest (see model.kernels.hull)."""
        largest = tl.max(tl.where(inside, o, float("-inf")), 2)
        below = tl.where(inside, o - largest[:, :, None], 0.0)
        return largest + _log1p(tl.sum(_expm1(below * tau), 2) / P) / tau

    @triton.jit
    def _hull_down(
        hidden_at, down_at, tau_at, out_at, B, D, hidden_stride, out_stride, P: tl.constexpr, W: tl.constexpr,
        BB: tl.constexpr, BR: tl.constexpr, BP: tl.constexpr, BW: tl.constexpr, EARLY: tl.constexpr,
    ):  # fmt: skip
        batch = tl.program_id(0) * BB + tl.arange(0, BB)
        row = tl.program_id(1) * BR + tl.arange(0, BR)
        petal = tl.arange(0, BP)
        lane = tl.arange(0, BW)[None, None, None, :]
        places = petal[None, None, :, None] * W + lane
        downs = down_at + row.to(tl.int64)[None, :, None, None] * (P * W) + places
        hiddens = hidden_at + batch[:, None, None, None] * hidden_stride + places
        tau = tl.load(tau_at)
        real = (petal[None, None, :, None] < P) & (row[None, :, None, None] < D)
        down = tl.load(downs, real & (lane < W), other=0.0)
        if EARLY:
            tl.extra.cuda.gdc_wait()
            tl.extra.cuda.gdc_launch_dependents()
        out = out_at + batch[:, None] * out_stride + row[None, :]
        kept = (batch[:, None] < B) & (row[None, :] < D)
        before = tl.load(out, kept, other=0.0)
        rising = tl.zeros([BB, BR, BP, BW], tl.float32)
        falling = tl.zeros([BB, BR, BP, BW], tl.float32)
        for w in range(0, W, BW):
            inside = (petal[None, None, :, None] < P) & (w + lane < W)
            hidden = tl.load(hiddens + w, inside & (batch[:, None, None, None] < B), other=0.0)
            hidden = tl.maximum(hidden, 0.0)
            hidden = hidden * hidden
            rising += hidden * tl.maximum(down, 0.0)
            falling += hidden * tl.maximum(-down, 0.0)
            down = tl.load(downs + w + BW, real & (w + BW + lane < W), other=0.0)
        there = petal[None, None, :] < P
        y = _log_mean_exp(tl.sum(rising, 3), there, tau, P) - _log_mean_exp(tl.sum(falling, 3), there, tau, P)
        tl.store(out, before + P * y, kept)

    @triton.jit
    def _unit(x, E: tl.constexpr, EPS: tl.constexpr):
        """An RMS norm of E values, 0 beyond them."""
        return x * tl.rsqrt(tl.sum(x * x, 0) / E + EPS)

    @triton.jit
    def _feature(x, inside, DELTA: tl.constexpr, EPS: tl.constexpr):
        if DELTA:
            return x / tl.maximum(tl.sqrt(tl.sum(x * x, 0)), EPS)
        return tl.where(inside, tl.where(x > 0.0, x + 1.0, tl.exp(tl.minimum(x, 0.0))), 0.0)

    @triton.jit
    def _mix(
        heads_at, cos_at, sin_at, position_at, plasticity_at, keys_at, values_at, M_at, z_at, out_at, stride,
        H: tl.constexpr, W: tl.constexpr, E: tl.constexpr, BE: tl.constexpr, BW: tl.constexpr, DELTA: tl.constexpr,
        EPS: tl.constexpr, RECALL_EPS: tl.constexpr, EMPTY: tl.constexpr, NORMALISE_EPS: tl.constexpr,
        EARLY: tl.constexpr,
    ):  # fmt: skip
        D: tl.constexpr = H * E
        head, row = tl.program_id(0), tl.program_id(1)
        place = row * H + head
        heads_at += row * stride + head * E
        keys_at += place.to(tl.int64) * W * E
        values_at += place.to(tl.int64) * W * E
        M_at += place.to(tl.int64) * E * E
        z_at += place * E
        e, f = tl.arange(0, BE), tl.arange(0, BE)
        inside = e < E
        # Everything is loaded before the first sum: behind the barrier of each it would cost another latency.
        square = inside[:, None] & (f[None, :] < E)
        M = tl.load(M_at + e[:, None] * E + f[None, :], square, other=0.0)
        j = tl.arange(0, BW)
        lanes = j[:, None] * E + f[None, :]
        keys = tl.load(keys_at + lanes, (j[:, None] < W) & (f[None, :] < E), other=0.0)
        values = tl.load(values_at + lanes, (j[:, None] < W) & (f[None, :] < E), other=0.0)
        if EARLY:
            tl.extra.cuda.gdc_wait()
            tl.extra.cuda.gdc_launch_dependents()
        p = tl.load(position_at) - 1
        cos = tl.load(cos_at + e % (E // 2), inside, other=0.0)
        sin = tl.load(sin_at + e % (E // 2), inside, other=0.0)
        other = tl.where(e < E // 2, e + E // 2, e - E // 2)
        q = tl.load(heads_at + e, inside, other=0.0)
        k = tl.load(heads_at + D + e, inside, other=0.0)
        other_q = tl.load(heads_at + other, inside, other=0.0)
        other_k = tl.load(heads_at + D + other, inside, other=0.0)
        v = tl.load(heads_at + 2 * D + e, inside, other=0.0)
        memory_q = tl.load(heads_at + 3 * D + e, inside, other=0.0)
        memory_k = tl.load(heads_at + 4 * D + e, inside, other=0.0)
        memory_v = tl.load(heads_at + 5 * D + e, inside, other=0.0)
        gate = tl.sigmoid(tl.load(heads_at + 6 * D + e, inside, other=0.0))
        rates = heads_at + 7 * D - head * E + head
        decay = tl.load(plasticity_at) * tl.sigmoid(tl.load(rates))
        if DELTA:
            beta = tl.sigmoid(tl.load(rates + H))
        else:
            z = tl.load(z_at + e, inside, other=0.0)

        sin = tl.where(e < E // 2, -sin, sin)
        q = (q * cos + other_q * sin) * tl.rsqrt(tl.sum(q * q, 0) / E + EPS) * E**-0.5
        k = (k * cos + other_k * sin) * tl.rsqrt(tl.sum(k * k, 0) / E + EPS)
        slot = p % W
        found = tl.zeros([BW, BE], tl.float32)
        shares = tl.zeros([BW], tl.float32)
        for w in range(0, W, BW):
            age = (slot - (w + j) + W) % W
            share = tl.exp(tl.sum(keys * q[None, :], 1))
            share = tl.where((w + j < W) & (age > 0) & (age <= p), share, 0.0)
            found += share[:, None] * values
            shares += share
            more = (w + BW + j[:, None] < W) & (f[None, :] < E)
            keys = tl.load(keys_at + (w + BW) * E + lanes, more, other=0.0)
            values = tl.load(values_at + (w + BW) * E + lanes, more, other=0.0)
        own = tl.exp(tl.sum(q * k, 0))
        attended = (tl.sum(found, 0) + own * v) / (tl.sum(shares, 0) + own)
        # It takes the place of the key that has just gone out of sight, which nothing above has counted.
        tl.store(keys_at + slot * E + e, k, inside)
        tl.store(values_at + slot * E + e, v, inside)

        q = _feature(memory_q, inside, DELTA, NORMALISE_EPS)
        k = _feature(memory_k, inside, DELTA, NORMALISE_EPS)
        M *= decay
        if DELTA:
            M += k[:, None] * (beta * (memory_v - tl.sum(k[:, None] * M, 0)))[None, :]
            recalled = tl.sum(q[:, None] * M, 0)
        else:
            M += k[:, None] * memory_v[None, :]
            z = decay * z + k
            recalled = tl.sum(q[:, None] * M, 0) / (tl.sum(q * z, 0) + EMPTY)
        tl.debug_barrier()
        tl.store(M_at + e[:, None] * E + f[None, :], M, square)
        if not DELTA:
            tl.store(z_at + e, z, inside)
        attended, recalled = _unit(attended, E, EPS), _unit(recalled, E, RECALL_EPS)
        tl.store(out_at + row * D + head * E + e, recalled + gate * (attended - recalled), inside)

    @triton.jit
    def _encode(
        x_at, known_at, table_at, frequencies_at, position_at, out_at, cos_at, sin_at, x_stride, known_stride,
        D: tl.constexpr, N: tl.constexpr, OVERLAP: tl.constexpr, P: tl.constexpr, F: tl.constexpr, BF: tl.constexpr,
        BN: tl.constexpr, BD: tl.constexpr, EARLY: tl.constexpr,
    ):  # fmt: skip
        if EARLY:
            tl.extra.cuda.gdc_wait()
            tl.extra.cuda.gdc_launch_dependents()
        row = tl.program_id(0)
        place = tl.arange(0, BN)
        known_at += row * known_stride
        x = tl.load(x_at + row * x_stride).to(tl.int64)
        byte = tl.where(place == N - 1, x, tl.load(known_at + place, place < N - 1, other=0))
        after = tl.load(known_at + P + place, place < OVERLAP - 1, other=0)
        entries = table_at + (place * 256 + byte)[:, None] * D
        for d in range(0, D, BD):
            lane = d + tl.arange(0, BD)
            each = tl.load(entries + lane[None, :], (place[:, None] < N) & (lane[None, :] < D), other=0.0)
            tl.store(out_at + row * D + lane, tl.sum(each, 0), lane < D)
        tl.debug_barrier()
        tl.store(known_at + place, tl.where(place == OVERLAP - 1, x, after), place < OVERLAP)
        if row == 0:
            f = tl.arange(0, BF)
            position = tl.load(position_at)
            # float64: float32 would be off by tenths of a radian at a million patches
            angle = position.to(tl.float64) * tl.load(frequencies_at + f, f < F, other=0.0)
            tl.store(cos_at + f, tl.cos(angle).to(tl.float32), f < F)
            tl.store(sin_at + f, tl.sin(angle).to(tl.float32), f < F)
            tl.debug_barrier()
            tl.store(position_at, position + 1)

    @triton.jit
    def _read_byte(
        x_at, table_at, conditioned_at, recurrent_at, hidden_at, weight_at, bias_at, new_hidden_at, logits_at,
        new_recurrent_at, keep_at, B, R, x_stride, conditioned_stride, hidden_stride, keep_stride,
        C: tl.constexpr, EPS: tl.constexpr, RECURRENT: tl.constexpr,
        BB: tl.constexpr, BR: tl.constexpr, BD: tl.constexpr, EARLY: tl.constexpr,
    ):  # fmt: skip
        batch = tl.program_id(0) * BB + tl.arange(0, BB)
        row = tl.program_id(1) * BR + tl.arange(0, BR)
        lane = tl.arange(0, BD)[None, None, :]
        rows = batch[:, None, None]
        weights = weight_at + row.to(tl.int64)[None, :, None] * C + lane
        weight = tl.load(weights, (row[None, :, None] < R) & (lane < C), other=0.0)
        bias = tl.load(bias_at + row, row < R, other=0.0)
        if EARLY:
            tl.extra.cuda.gdc_wait()
            tl.extra.cuda.gdc_launch_dependents()
        byte = tl.load(x_at + rows * x_stride, rows < B, other=0).to(tl.int64)
        total = tl.zeros([BB, BR, BD], tl.float32)
        squares = tl.zeros([BB, 1, BD], tl.float32)
        for d in range(0, C, BD):
            c = d + lane
            # Every program makes the whole new state for itself: cheaper than another kernel.
            inside = (rows < B) & (c < C)
            table = table_at + byte * 3 * C + c
            conditioned = conditioned_at + rows * conditioned_stride + c
            recurrent = recurrent_at + rows * 3 * C + c
            old = tl.load(hidden_at + rows * hidden_stride + c, inside, other=0.0)
            reset = tl.load(table, inside, other=0.0) + tl.load(conditioned, inside, other=0.0)
            reset = tl.sigmoid(reset + tl.load(recurrent, inside, other=0.0))
            update = tl.load(table + C, inside, other=0.0) + tl.load(conditioned + C, inside, other=0.0)
            update = tl.sigmoid(update + tl.load(recurrent + C, inside, other=0.0))
            new = tl.load(table + 2 * C, inside, other=0.0) + tl.load(conditioned + 2 * C, inside, other=0.0)
            new = _tanh(new + reset * tl.load(recurrent + 2 * C, inside, other=0.0))
            new = tl.where(inside, new + update * (old - new), 0.0)
            if tl.program_id(1) == 0:
                tl.store(new_hidden_at + rows * C + c, new, inside)
            total += weight * new
            squares += new * new
            weight = tl.load(weights + d + BD, (row[None, :, None] < R) & (d + BD + lane < C), other=0.0)
        scale = tl.rsqrt(tl.sum(squares, 2) / C + EPS)
        y = tl.sum(total, 2) * tl.where(row[None, :] < 256, scale, 1.0) + bias[None, :]
        real = batch[:, None] < B
        tl.store(logits_at + batch[:, None] * 256 + row[None, :], y, real & (row[None, :] < 256))
        if RECURRENT:
            to = new_recurrent_at + batch[:, None] * 3 * C + row[None, :] - 256
            tl.store(to, y, real & (row[None, :] >= 256) & (row[None, :] < R))
        if tl.program_id(1) == 0:
            tl.store(keep_at + rows * keep_stride, byte, rows < B)
