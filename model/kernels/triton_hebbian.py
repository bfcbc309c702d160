"""The Hebbian rule as Triton kernels: `model.kernels.chunked.chunked_hebbian` with the same contract, on a CUDA device.

Forward: running sums of log λ; what each chunk writes; the states carried from chunk to chunk, in place of the writes;
outputs, numerator and normaliser in one pass. Backward: the same backwards, with the scores computed again.
`model.kernels.triton_delta` puts the delta rule together from the same kernels.

Notable:

- Decays inside a chunk are exp(S_i − S_j) of two running sums, which is safe here and only here: steps with
  log λ < −128, −inf among them, are counted and not summed (any product with one of them is exactly 0 in float32),
  so |S| < 2^13; S is summed in float64 and kept as two float32, so the difference has float32's relative error.
- Products are `tf32x3` (each operand split in two TF32, three products, small ones added up apart): 22 of float32's 24
  bits, on the tensor cores. Single TF32 keeps 11 and fails the tolerance of 1e-5; `ieee` keeps all, on the CUDA cores,
  where the arithmetic would take longer than the memory. PRECISION is the one switch.
- Triton 3.4 to 3.7 miscompile some kernels on Hopper where `tl.dot` becomes wgmma (transposed accumulators, and several
  products in one kernel; flash-linear-attention issues 640 and 984). wgmma needs 64 rows of the result: no product here
  has more than ROWS = 32, so that all are mma.sync. And no accumulator is transposed: a transposed product is
  computed as such, from operands that are loaded transposed (`load_t`, and `matrix` with its strides swapped).
- Every number is added up in a fixed order: the same bits every time. Nothing on the host waits for the device.
"""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from model.kernels.recurrent import EPSILON
from model.kernels.transforms import apply

try:
    import triton
    import triton.language as tl
except ImportError:  # the other forms do everywhere
    triton = None

State = tuple[Tensor, Tensor]

AVAILABLE = triton is not None  # whether the kernels can be called at all; they want CUDA, or Triton's interpreter
CHUNK = 64  # steps per chunk, as in model.kernels.chunked; fewer for short sequences
ROWS = 32  # rows of any product's result: 64 would be wgmma
COLUMNS = 64  # columns of a result: more than rows, or warps would be given the same rows twice
STEP, STEPS = 16, 32  # channels, and steps of a chunk, that a product takes at once
REGISTERS = 128  # of a thread, of 8 warps: two programs on a multiprocessor
WIDEST_KEYS, WIDEST_VALUES = 256, 128  # E, V
CARRIED = 512  # elements of a state that one program carries


def triton_hebbian(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, state: State) -> tuple[Tensor, State]:
    """`recurrent_hebbian` on the card, with gradients of all inputs.

    Args:
        q, k: [B, H, T, E] float32, T ≥ 1, E ≤ 256, of any strides.
        v: [B, H, T, V], V ≤ 128.
        log_decay: [B, H, T] ≤ 0; −inf erases.
        state: (M [B, H, E, V], z [B, H, E]).

    Returns:
        out [B, H, T, V], laid out in memory as [B, T, H, V], and the state after step T.

    Raises:
        ValueError: without triton or CUDA, or for another dtype or a wider E or V.
    """
    check(q, v)
    out, M, z = apply(_TritonHebbian, q, k, v, log_decay, *state)
    return out, (M, z)


def check(q: Tensor, v: Tensor) -> None:
    """Raises ValueError where the kernels cannot run on tensors like q and v."""
    if reason := _refuses(q, v):
        raise ValueError(reason)


def accepts(q: Tensor, v: Tensor) -> bool:
    """Whether the kernels can run on tensors like q and v."""
    return _refuses(q, v) is None


def _refuses(q: Tensor, v: Tensor) -> str | None:
    if not AVAILABLE or not (q.is_cuda or _interpreted()):
        return "impl='triton': accepted on a CUDA device with triton installed"
    if q.dtype != torch.float32:
        return f"q has dtype {q.dtype}: with impl='triton', accepted is torch.float32"
    if not 1 <= q.shape[-1] <= WIDEST_KEYS:
        return f"q has E={q.shape[-1]}: with impl='triton', accepted is 1 to {WIDEST_KEYS}"
    if not 1 <= v.shape[-1] <= WIDEST_VALUES:
        return f"v has V={v.shape[-1]}: with impl='triton', accepted is 1 to {WIDEST_VALUES}"
    return None


def _interpreted() -> bool:
    return not isinstance(carry_kernel, triton.JITFunction)


class Shape:
    """The sizes of one call, and what follows from them: all choices of blocks and warps are made here."""

    def __init__(self, q: Tensor, v: Tensor):
        self.B, self.H, self.T, self.E = q.shape
        self.V = v.shape[-1]
        self.C = min(CHUNK, max(16, 1 << (self.T - 1).bit_length()))
        self.N = -(-self.T // self.C)
        self.chunks = self.B * self.H * self.N
        self.width = max(16, 1 << (self.E - 1).bit_length())  # E padded to a power of two
        self.rows = min(ROWS, self.C)  # of a chunk, in one program
        self.state_rows = min(ROWS, self.width)  # of a state, in one program
        self.key_columns = min(COLUMNS, self.width)
        self.columns = min(COLUMNS, max(16, 1 << (self.V - 1).bit_length()))  # of values
        self.steps = min(STEPS, self.C)
        self.blocks = self.C // self.rows
        self.across = -(-self.V // self.columns)
        self.squares = -(-self.E // self.state_rows) * self.across  # of a state
        self.launch = self.warps(self.columns)
        self.key_launch = self.warps(max(self.columns, self.key_columns))  # where there are results of either width

    def warps(self, columns: int) -> dict[str, int]:
        """How to launch a kernel whose results have so many columns: warps share them, at least 8 each."""
        launch = {"num_warps": max(2, columns // 8)}
        if columns == COLUMNS and self.C == CHUNK:
            launch["maxnreg"] = REGISTERS
        return launch

    def sizes(self) -> tuple[int, ...]:
        """The arguments of every kernel over chunks: H, N, T, E, V, C."""
        return self.H, self.N, self.T, self.E, self.V, self.C


def readable(x: Tensor) -> Tensor:
    """x with its last dimension contiguous: a copy only where it is not."""
    return x if x.stride(-1) == 1 else x.contiguous()


def running_sums(log_decay: Tensor, s: Shape) -> Tensor:
    """Sums of log λ from each chunk's start, [chunks, 3, C]: high part, low part, count of erasing steps."""
    sums = log_decay.new_empty(s.chunks, 3, s.C)
    sums_kernel[(s.chunks,)](log_decay, log_decay.stride(), sums, *s.sizes(), num_warps=1)
    return sums


def heads_last(v: Tensor) -> Tensor:
    """An empty [B, H, T, V] in the order [B, T, H, V], in which layers join the heads without a copy."""
    B, H, T, V = v.shape
    return v.new_empty(B, T, H, V).transpose(1, 2)


def decay_gradient(parts: Tensor, s: Shape) -> Tensor:
    """Partial gradients [chunks, parts, C] of log λ → [B, H, T]."""
    return parts.sum(1).view(s.B, s.H, -1)[:, :, : s.T]


class _TritonHebbian(torch.autograd.Function):
    """States are [chunks, E · V + E]: M and then z."""

    @staticmethod
    def forward(ctx, q, k, v, log_decay, M, z):
        s = Shape(q, v)
        q, k, v, M, z = readable(q), readable(k), readable(v), M.contiguous(), z.contiguous()
        sums = running_sums(log_decay, s)
        states = q.new_empty(s.chunks, s.E * s.V + s.E)
        writes_kernel[(s.chunks * s.squares,)](
            k, k.stride(), v, v.stride(), sums, states, *s.sizes(), s.state_rows, s.columns, s.steps, **s.launch
        )
        M_out, z_out = _carry(states, sums, M, z, s, reverse=False)
        out, normaliser = heads_last(v), q.new_empty(s.chunks, s.C)
        outputs_kernel[(s.chunks * s.blocks * s.across,)](
            q, q.stride(), k, k.stride(), v, v.stride(), sums, states, out, out.stride(), normaliser,
            *s.sizes(), s.rows, s.columns, STEP, True, EPSILON, **s.launch,
        )  # fmt: skip
        ctx.save_for_backward(q, k, v, sums, states, out, normaliser)
        return out, M_out, z_out

    @staticmethod
    @once_differentiable
    def backward(ctx, d_out, d_M, d_z):
        q, k, v, sums, states, out, normaliser = ctx.saved_tensors
        s = Shape(q, v)
        d_out = readable(d_out)
        d_states, d_normaliser = torch.empty_like(states), torch.empty_like(normaliser)
        reads_gradient_kernel[(s.chunks * s.squares,)](
            q, q.stride(), d_out, d_out.stride(), out, out.stride(), sums, normaliser, d_normaliser, d_states,
            *s.sizes(), s.state_rows, s.columns, s.steps, STEP, True, **s.launch,
        )  # fmt: skip
        d_M, d_z = _carry(d_states, sums, d_M.contiguous(), d_z.contiguous(), s, reverse=True)
        d_q, d_k, d_v = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
        parts = q.new_empty(s.chunks, 2 * s.blocks, s.C)
        inner_gradients(q, k, v, d_out, sums, states, d_states, normaliser, d_normaliser, d_q, d_k, d_v, parts, s, True)
        return d_q, d_k, d_v, decay_gradient(parts, s), d_M, d_z


def _carry(states: Tensor, sums: Tensor, M: Tensor, z: Tensor, s: Shape, reverse: bool) -> State:
    """Turn writes into the states before each chunk, in place (or gradients likewise); the last one is returned."""
    M_out, z_out = torch.empty_like(M), torch.empty_like(z)
    tiles = -(-states.shape[1] // CARRIED)
    carry_kernel[(s.B * s.H * tiles,)](
        states, sums, M, z, M_out, z_out, s.N, s.E, s.V, s.C, tiles, reverse, CARRIED, num_warps=4
    )
    return M_out, z_out


def inner_gradients(
    q, k, v, d_out, sums, states, d_states, normaliser, d_normaliser, d_q, d_k, d_v, parts, s: Shape, normalise: bool
) -> None:
    """Write d_q, d_k, d_v, and 2 · blocks parts of log λ's gradient. d_states: that of the state after each chunk.

    Without a normaliser it is the delta rule, whose d_v (that of its corrections) is known by then and not written.
    """
    grid = (s.chunks * s.blocks,)
    shared, last = (*s.sizes(), s.rows, s.key_columns, STEP), (normalise, parts.shape[1])
    query_gradients_kernel[grid](
        q, q.stride(), k, k.stride(), v, v.stride(), d_out, d_out.stride(), sums, normaliser, d_normaliser, states,
        d_q, d_q.stride(), parts, *shared, *last, **s.key_launch,
    )  # fmt: skip
    key_gradients_kernel[grid](
        q, q.stride(), k, k.stride(), v, v.stride(), d_out, d_out.stride(), sums, normaliser, d_normaliser, states,
        d_states, d_k, d_k.stride(), d_v, d_v.stride(), parts, *shared, s.columns, *last, **s.key_launch,
    )  # fmt: skip


if triton is not None:
    PRECISION = tl.constexpr("tf32x3")
    ERASES = tl.constexpr(-128.0)  # exp of it is 0 in float32

    @triton.jit
    def dot(a, b):
        return tl.dot(a, b, input_precision=PRECISION)

    @triton.jit
    def place(H, N, T, C: tl.constexpr, TILES: tl.constexpr):
        """→ this program's tile, chunk, and the batch, head, first step and number of steps of that chunk."""
        chunk = (tl.program_id(0) // TILES).to(tl.int64)
        first = chunk % N * C
        return tl.program_id(0) % TILES, chunk, chunk // N // H, chunk // N % H, first, (T - first).to(tl.int32)

    @triton.jit
    def at(x, strides, b, h, first):
        return x + b * strides[0] + h * strides[1] + first * strides[2]

    @triton.jit
    def load(x, strides, i, e, left, E: tl.constexpr):
        """Steps i × channels e; 0 outside."""
        inside = (i[:, None] < left) & (e[None, :] < E)
        return tl.load(x + i[:, None] * strides[2] + e[None, :], inside, other=0.0)

    @triton.jit
    def load_t(x, strides, e, i, left, E: tl.constexpr):
        """Channels e × steps i: transposed by its addresses, never by `tl.trans`."""
        inside = (e[:, None] < E) & (i[None, :] < left)
        return tl.load(x + e[:, None] + i[None, :] * strides[2], inside, other=0.0)

    @triton.jit
    def store(x, strides, i, e, value, left, E: tl.constexpr):
        tl.store(x + i[:, None] * strides[2] + e[None, :], value, (i[:, None] < left) & (e[None, :] < E))

    @triton.jit
    def load_vector(x, strides, i, left):
        return tl.load(x + i * strides[2], i < left, other=0.0)

    @triton.jit
    def matrix(x, i, j, row, column, HEIGHT: tl.constexpr, WIDTH: tl.constexpr):
        """x[i, j] of a matrix of this size with these strides; 0 outside."""
        inside = (i[:, None] < HEIGHT) & (j[None, :] < WIDTH)
        return tl.load(x + i[:, None] * row + j[None, :] * column, inside, other=0.0)

    @triton.jit
    def between(sums, i, j, C: tl.constexpr):
        """λ_{j+1} ⋯ λ_i for j ≤ i, else 0; i and j broadcast."""
        difference = (tl.load(sums + i) - tl.load(sums + j)) + (tl.load(sums + C + i) - tl.load(sums + C + j))
        kept = (i >= j) & (tl.load(sums + 2 * C + i) == tl.load(sums + 2 * C + j))
        return tl.exp(tl.where(kept, difference, float("-inf")))

    @triton.jit
    def since_start(sums, i, C: tl.constexpr):
        """λ_0 ⋯ λ_i."""
        return tl.exp(tl.where(tl.load(sums + 2 * C + i) == 0, tl.load(sums + i), float("-inf")))

    @triton.jit
    def sums_kernel(g, gs, sums, H, N, T, E: tl.constexpr, V: tl.constexpr, C: tl.constexpr):
        _, chunk, b, h, first, left = place(H, N, T, C, 1)
        i = tl.arange(0, C)
        step = load_vector(at(g, gs, b, h, first), gs, i, left)
        erases = step < ERASES
        exact = tl.cumsum(tl.where(erases, 0.0, step).to(tl.float64), 0)
        high = exact.to(tl.float32)
        sums += chunk * 3 * C + i
        tl.store(sums, high)
        tl.store(sums + C, (exact - high.to(tl.float64)).to(tl.float32))
        tl.store(sums + 2 * C, tl.cumsum(erases.to(tl.int32), 0).to(tl.float32))

    @triton.jit
    def writes_kernel(
        k, ks, v, vs, sums, states,
        H, N, T, E: tl.constexpr, V: tl.constexpr, C: tl.constexpr,
        BK: tl.constexpr, BV: tl.constexpr, BC: tl.constexpr,
    ):  # fmt: skip
        """What each chunk adds to M and to z."""
        ACROSS: tl.constexpr = (V + BV - 1) // BV
        tile, chunk, b, h, first, left = place(H, N, T, C, (E + BK - 1) // BK * ACROSS)
        e, x = tile // ACROSS * BK + tl.arange(0, BK), tile % ACROSS * BV + tl.arange(0, BV)
        k, v = at(k, ks, b, h, first), at(v, vs, b, h, first)
        sums += chunk * 3 * C
        write = tl.zeros([BK, BV], tl.float32)
        total = tl.zeros([BK], tl.float32)
        for j0 in range(0, C, BC):
            j = j0 + tl.arange(0, BC)
            keys = load_t(k, ks, e, j, left, E) * between(sums, C - 1, j, C)[None, :]
            write += dot(keys, load(v, vs, j, x, left, V))
            total += tl.sum(keys, 1)
        states += chunk * (E * V + E)
        tl.store(states + e[:, None] * V + x[None, :], write, (e[:, None] < E) & (x[None, :] < V))
        if tile % ACROSS == 0:
            tl.store(states + E * V + e, total, e < E)

    @triton.jit
    def reads_gradient_kernel(
        q, qs, d_out, ds, out, os, sums, normaliser, d_normaliser, d_states,
        H, N, T, E: tl.constexpr, V: tl.constexpr, C: tl.constexpr,
        BK: tl.constexpr, BV: tl.constexpr, BC: tl.constexpr, BX: tl.constexpr, NORMALISE: tl.constexpr,
    ):  # fmt: skip
        """What each chunk's outputs add to the gradient of the state before it; and the gradient of the normaliser."""
        ACROSS: tl.constexpr = (V + BV - 1) // BV
        tile, chunk, b, h, first, left = place(H, N, T, C, (E + BK - 1) // BK * ACROSS)
        e, x = tile // ACROSS * BK + tl.arange(0, BK), tile % ACROSS * BV + tl.arange(0, BV)
        q, d_out, out = at(q, qs, b, h, first), at(d_out, ds, b, h, first), at(out, os, b, h, first)
        sums += chunk * 3 * C
        d_M = tl.zeros([BK, BV], tl.float32)
        d_z = tl.zeros([BK], tl.float32)
        for i0 in range(0, C, BC):
            i = i0 + tl.arange(0, BC)
            queries = load_t(q, qs, e, i, left, E) * since_start(sums, i, C)[None, :]
            d_numerator = load(d_out, ds, i, x, left, V)
            if NORMALISE:
                inverse = 1.0 / tl.load(normaliser + chunk * C + i)
                d_numerator *= inverse[:, None]
                if tile % ACROSS == 0:
                    of_normaliser = tl.zeros([BC], tl.float32)
                    for x0 in range(0, V, BX):
                        some = x0 + tl.arange(0, BX)
                        of_normaliser -= tl.sum(load(d_out, ds, i, some, left, V) * load(out, os, i, some, left, V), 1)
                    of_normaliser *= inverse
                    d_z += tl.sum(queries * of_normaliser[None, :], 1)
                    if tile == 0:
                        tl.store(d_normaliser + chunk * C + i, of_normaliser)
            d_M += dot(queries, d_numerator)
        d_states += chunk * (E * V + E if NORMALISE else E * V)
        tl.store(d_states + e[:, None] * V + x[None, :], d_M, (e[:, None] < E) & (x[None, :] < V))
        if NORMALISE:
            d_states += E * V + e
            if tile % ACROSS == 0:
                tl.store(d_states, d_z, e < E)

    @triton.jit
    def carry_step(x, write, state, sums, inside, C: tl.constexpr):
        tl.store(state, x, inside)
        return since_start(sums, C - 1, C) * x + write

    @triton.jit
    def carry_kernel(
        states, sums, M, z, M_out, z_out, N, E: tl.constexpr, V: tl.constexpr, C: tl.constexpr, TILES,
        REVERSE: tl.constexpr, BLOCK: tl.constexpr,
    ):  # fmt: skip
        """x ← total_n x + w_n over chunks, every x stored in the place of its w; element by element."""
        SIZE: tl.constexpr = E * V + E
        bh = (tl.program_id(0) // TILES).to(tl.int64)
        f = tl.program_id(0) % TILES * BLOCK + tl.arange(0, BLOCK)
        of_M, of_z = f < E * V, (f >= E * V) & (f < SIZE)
        x = tl.load(M + bh * E * V + f, of_M, other=0.0) + tl.load(z + bh * E + f - E * V, of_z, other=0.0)
        inside = f < SIZE
        start = bh * N
        direction = 1
        if REVERSE:
            start += N - 1
            direction = -1
        for n in range(0, N, 4):  # four loads under way at once; past the end, the last chunk again, unused
            n0, n1 = start + direction * n, start + direction * min(n + 1, N - 1)
            n2, n3 = start + direction * min(n + 2, N - 1), start + direction * min(n + 3, N - 1)
            w0 = tl.load(states + n0 * SIZE + f, inside, other=0.0)
            w1 = tl.load(states + n1 * SIZE + f, inside, other=0.0)
            w2 = tl.load(states + n2 * SIZE + f, inside, other=0.0)
            w3 = tl.load(states + n3 * SIZE + f, inside, other=0.0)
            x = carry_step(x, w0, states + n0 * SIZE + f, sums + n0 * 3 * C, inside, C)
            if n + 1 < N:
                x = carry_step(x, w1, states + n1 * SIZE + f, sums + n1 * 3 * C, inside, C)
            if n + 2 < N:
                x = carry_step(x, w2, states + n2 * SIZE + f, sums + n2 * 3 * C, inside, C)
            if n + 3 < N:
                x = carry_step(x, w3, states + n3 * SIZE + f, sums + n3 * 3 * C, inside, C)
        tl.store(M_out + bh * E * V + f, x, of_M)
        tl.store(z_out + bh * E + f - E * V, x, of_z)

    @triton.jit
    def outputs_kernel(
        q, qs, k, ks, v, vs, sums, states, out, os, normaliser,
        H, N, T, E: tl.constexpr, V: tl.constexpr, C: tl.constexpr,
        BM: tl.constexpr, BV: tl.constexpr, BX: tl.constexpr, NORMALISE: tl.constexpr, EPSILON: tl.constexpr,
    ):  # fmt: skip
        """Rows of scores inside the chunk, and the read of the state before it."""
        ACROSS: tl.constexpr = (V + BV - 1) // BV
        tile, chunk, b, h, first, left = place(H, N, T, C, C // BM * ACROSS)
        i, j, x = tile // ACROSS * BM + tl.arange(0, BM), tl.arange(0, C), tile % ACROSS * BV + tl.arange(0, BV)
        q, k, v = at(q, qs, b, h, first), at(k, ks, b, h, first), at(v, vs, b, h, first)
        sums += chunk * 3 * C
        states += chunk * (E * V + E if NORMALISE else E * V)
        scores = tl.zeros([BM, C], tl.float32)
        result = tl.zeros([BM, BV], tl.float32)
        total = tl.zeros([BM], tl.float32)
        since = since_start(sums, i, C)
        for e0 in range(0, E, BX):
            e = e0 + tl.arange(0, BX)
            queries = load(q, qs, i, e, left, E)
            scores += dot(queries, load_t(k, ks, e, j, left, E))
            queries *= since[:, None]
            result += dot(queries, matrix(states, e, x, V, 1, E, V))
            if NORMALISE:
                total += tl.sum(queries * tl.load(states + E * V + e, e < E, other=0.0)[None, :], 1)
        scores *= between(sums, i[:, None], j[None, :], C)
        result += dot(scores, load(v, vs, j, x, left, V))
        if NORMALISE:
            total += tl.sum(scores, 1) + EPSILON
            result = result / total[:, None]
            if tile % ACROSS == 0:
                tl.store(normaliser + chunk * C + i, total)
        store(at(out, os, b, h, first), os, i, x, result, left, V)

    @triton.jit
    def query_gradients_kernel(
        q, qs, k, ks, v, vs, d_out, ds, sums, normaliser, d_normaliser, states, d_q, dqs, parts,
        H, N, T, E: tl.constexpr, V: tl.constexpr, C: tl.constexpr,
        BM: tl.constexpr, BE: tl.constexpr, BX: tl.constexpr, NORMALISE: tl.constexpr, PARTS: tl.constexpr,
    ):  # fmt: skip
        """Gradients of some rows of queries, and of the decay since the chunk's start."""
        tile, chunk, b, h, first, left = place(H, N, T, C, C // BM)
        i, j = tile * BM + tl.arange(0, BM), tl.arange(0, C)
        q, k, v = at(q, qs, b, h, first), at(k, ks, b, h, first), at(v, vs, b, h, first)
        d_out, d_q = at(d_out, ds, b, h, first), at(d_q, dqs, b, h, first)
        sums += chunk * 3 * C
        states += chunk * (E * V + E if NORMALISE else E * V)
        since = since_start(sums, i, C)
        inverse = since * 0.0 + 1.0
        of_normaliser = since * 0.0
        if NORMALISE:
            inverse = 1.0 / tl.load(normaliser + chunk * C + i)
            of_normaliser = tl.load(d_normaliser + chunk * C + i)
        d_scores = tl.zeros([BM, C], tl.float32)
        for x0 in range(0, V, BX):
            x = x0 + tl.arange(0, BX)
            d_scores += dot(load(d_out, ds, i, x, left, V) * inverse[:, None], load_t(v, vs, x, j, left, V))
        d_scores = (d_scores + of_normaliser[:, None]) * between(sums, i[:, None], j[None, :], C)
        of_since = tl.zeros([BM], tl.float32)
        for e0 in range(0, E, BE):
            e = e0 + tl.arange(0, BE)
            d_queries = tl.zeros([BM, BE], tl.float32)
            for x0 in range(0, V, BX):
                x = x0 + tl.arange(0, BX)
                # the transposed state: rows are its columns
                d_queries += dot(load(d_out, ds, i, x, left, V) * inverse[:, None], matrix(states, x, e, 1, V, V, E))
            if NORMALISE:
                d_queries += of_normaliser[:, None] * tl.load(states + E * V + e, e < E, other=0.0)[None, :]
            d_queries *= since[:, None]
            of_since += tl.sum(d_queries * load(q, qs, i, e, left, E), 1)
            store(d_q, dqs, i, e, d_queries + dot(d_scores, load(k, ks, j, e, left, E)), left, E)
        # the decay since the start at step i holds the steps 0 … i
        d_steps = tl.sum(tl.where(i[:, None] >= j[None, :], of_since[:, None], 0.0), 0)
        tl.store(parts + (chunk * PARTS + tile) * C + j, d_steps)

    @triton.jit
    def key_gradients_kernel(
        q, qs, k, ks, v, vs, d_out, ds, sums, normaliser, d_normaliser, states, d_states, d_k, dks, d_v, dvs, parts,
        H, N, T, E: tl.constexpr, V: tl.constexpr, C: tl.constexpr,
        BM: tl.constexpr, BE: tl.constexpr, BX: tl.constexpr, BV: tl.constexpr,
        NORMALISE: tl.constexpr, PARTS: tl.constexpr,
    ):  # fmt: skip
        """Gradients of some rows of keys and values, and of the decays inside, to the end of, and over the chunk."""
        SIZE: tl.constexpr = E * V + E if NORMALISE else E * V
        tile, chunk, b, h, first, left = place(H, N, T, C, C // BM)
        j, i = tile * BM + tl.arange(0, BM), tl.arange(0, C)
        q, k, v = at(q, qs, b, h, first), at(k, ks, b, h, first), at(v, vs, b, h, first)
        d_out, d_k, d_v = at(d_out, ds, b, h, first), at(d_k, dks, b, h, first), at(d_v, dvs, b, h, first)
        sums += chunk * 3 * C
        states += chunk * SIZE
        d_states += chunk * SIZE
        inverse = tl.full([C], 1.0, tl.float32)
        if NORMALISE:
            inverse = 1.0 / tl.load(normaliser + chunk * C + i)
        # Rows are keys and columns queries: the transposed scores, computed as such.
        scores = tl.zeros([BM, C], tl.float32)
        for e0 in range(0, E, BX):
            e = e0 + tl.arange(0, BX)
            scores += dot(load(k, ks, j, e, left, E), load_t(q, qs, e, i, left, E))
        within = between(sums, i[None, :], j[:, None], C)
        scores *= within
        at_end = between(sums, C - 1, j, C)
        if NORMALISE:
            for x0 in range(0, V, BV):
                x = x0 + tl.arange(0, BV)
                d_values = tl.zeros([BM, BV], tl.float32)
                for e0 in range(0, E, BX):
                    e = e0 + tl.arange(0, BX)
                    d_values += dot(load(k, ks, j, e, left, E), matrix(d_states, e, x, V, 1, E, V))
                d_values *= at_end[:, None]
                d_values += dot(scores, load(d_out, ds, i, x, left, V) * inverse[:, None])
                store(d_v, dvs, j, x, d_values, left, V)
        d_scores = tl.zeros([BM, C], tl.float32)
        for x0 in range(0, V, BX):
            x = x0 + tl.arange(0, BX)
            d_scores += dot(load(v, vs, j, x, left, V), load_t(d_out, ds, x, i, left, V) * inverse[None, :])
        if NORMALISE:
            d_scores += tl.load(d_normaliser + chunk * C + i)[None, :]
        # d log Γ_ij spreads over steps j + 1 … i: first over those up to i, then those after j are kept.
        from_step = (i[:, None] >= i[None, :]).to(tl.float32)
        d_steps = dot(d_scores * scores, from_step)
        d_scores *= within
        of_end = tl.zeros([BM], tl.float32)
        for e0 in range(0, E, BE):
            e = e0 + tl.arange(0, BE)
            d_keys = tl.zeros([BM, BE], tl.float32)
            for x0 in range(0, V, BX):
                x = x0 + tl.arange(0, BX)
                d_keys += dot(load(v, vs, j, x, left, V), matrix(d_states, x, e, 1, V, V, E))
            if NORMALISE:
                d_keys += tl.load(d_states + E * V + e, e < E, other=0.0)[None, :]
            d_keys *= at_end[:, None]
            of_end += tl.sum(d_keys * load(k, ks, j, e, left, E), 1)
            store(d_k, dks, j, e, d_keys + dot(d_scores, load(q, qs, i, e, left, E)), left, E)
        # This program's share of the gradient of the decay over the whole chunk.
        of_total = 0.0
        BLOCK: tl.constexpr = 1024
        for f0 in range(0, SIZE, BLOCK * (C // BM)):
            f = f0 + tile * BLOCK + tl.arange(0, BLOCK)
            of_total += tl.sum(tl.load(states + f, f < SIZE, other=0.0) * tl.load(d_states + f, f < SIZE, other=0.0), 0)
        of_total *= since_start(sums, C - 1, C)
        d_steps = tl.sum(tl.where(j[:, None] < i[None, :], d_steps + of_end[:, None], 0.0), 0) + of_total
        tl.store(parts + (chunk * PARTS + C // BM + tile) * C + i, d_steps)
