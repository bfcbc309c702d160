"""The Hebbian rule straight from a layer's projection: queries, keys, values and gates side by side, as one product
leaves them, in; heads side by side, as the next product wants them, out. And one packed gradient back.

`model.kernels.hebbian` wants heads apart, features and log λ made: a dozen passes over memory that say nothing new.
Here a program walks over the chunks of one head with M and z in registers. Its backward pass walks back with their
gradients, which it leaves behind for every chunk; then each chunk's gradients are programs of their own: one for the
queries, and after it one for keys, values and gates. One for all would want more registers than there are.

Notable:

- φ = elu + 1 is x + 1 or exp(x), and its slope min(φ, 1). What lies outside is loaded as −inf, whose φ is 0.
- Decays and sizes of products are those of `model.kernels.triton_hebbian`, for its reasons: exp of differences of
  running sums that begin anew in each chunk, erasing steps counted apart; no more than 32 rows of a result, so that M
  on its way is held in two halves; nothing is transposed but by its addresses, or while it is parts.
- Products keep 22 of float32's 24 bits: a number is the sum of two of float16, its parts, and three products of parts
  are added in float32. Parts are made once, where they are loaded. A tile is scaled by a power of two to 2¹⁴, from its
  largest number or a bound of it; numbers below 2⁻³⁸ of that are lost. A tile with an infinity or NaN is NaN, and
  earlier steps of a chunk are rounded by the size of later ones. Normal numbers do not notice: pre-activations up to
  N(−6, 4) or N(0, 8) are right to 6e-7. But where all of a step's φ are below 1e-6 of its chunk's, that step's output
  has 6e-6 (at 1e-7 6e-5, worse in its keys' gradient), and a channel of 3e3 in q and k costs its chunk 1e-5. Two
  parts of bfloat16 would need no scale, but have 16 bits: 1.2e-5 in the gradient of q, where 1e-5 is allowed. Two of
  TF32 are as exact in twice the instructions and bytes: 1.2 to 1.5 times the time, measured on an H200.
- Normalisers are kept inverted: a division costs as much as many products.
- Sizes of a row are constants to the compiler, which could not tell that rows of 3 · H · E + H floats are aligned.
- Every number is added up in a fixed order: the same bits every time.
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from model.kernels.hebbian import hebbian
from model.kernels.recurrent import EPSILON
from model.kernels.transforms import apply, batched

try:
    import triton
    import triton.language as tl

    from model.kernels.triton_hebbian import ERASES
except ImportError:  # the PyTorch form does everywhere
    triton = None

State = tuple[Tensor, Tensor]

IMPLEMENTATIONS = ("auto", "torch", "triton")
CHUNK = 32  # steps; states are kept every so many, and the products have as many rows
WIDEST = 64  # E: two halves of 32 rows
SHORTEST = 64  # steps from which "auto" takes the kernels; fewer come in many lengths, each to be compiled for
PROGRAMS = 128  # heads of all rows, from which on walking over chunks one by one leaves no multiprocessor idle
# How each kernel is launched: the fastest that was measured on an H200.
FORWARD = {"num_warps": 4, "num_stages": 2}
STATES_GRADIENT = {"num_warps": 4, "num_stages": 2, "maxnreg": 128}
QUERIES = {"num_warps": 4, "num_stages": 1}
KEYS = {"num_warps": 4, "num_stages": 1, "maxnreg": 168}


def packed_hebbian(
    heads: Tensor,
    bias: Tensor,
    plasticity: Tensor,
    n_heads: int,
    *,
    state: State | None = None,
    impl: str = "auto",
) -> tuple[Tensor, State]:
    """`hebbian` of φ(q), φ(k), v and log λ = log α + log sigmoid(gate + bias), with φ = elu + 1.

    Args:
        heads: [B, T, 3 · H · E + H], T ≥ 1: all heads' q, then k, then v, then one gate for each head.
        bias: [H] of the gates.
        plasticity: α, of one element, in [0, 1]; 0 erases at every step. It gets no gradient from the kernels.
        n_heads: H.
        state: (M [B, H, E, E], z [B, H, E]) carried from earlier steps; zeros when None.
        impl: "torch" (any device and type), "triton" (CUDA or Triton's interpreter, float32, E ≤ 64), "auto" picks.

    Returns:
        out [B, T, H · E] and the state after step T; float32, or float64 when heads are.

    Raises:
        ValueError: naming the argument, what it was and what is accepted.
    """
    if impl not in IMPLEMENTATIONS:
        raise ValueError(f"impl={impl!r}: accepted are {', '.join(IMPLEMENTATIONS)}")
    if heads.dim() != 3 or heads.shape[1] < 1 or heads.shape[2] % n_heads or heads.shape[2] // n_heads % 3 != 1:
        raise ValueError(f"heads has shape {tuple(heads.shape)}: accepted is [B, T ≥ 1, 3 · {n_heads} · E + {n_heads}]")
    E = heads.shape[2] // n_heads // 3
    if impl == "auto":
        impl = "triton" if suits(heads, n_heads, E, bias, plasticity, *(state or ())) else "torch"
    if impl == "triton":
        _check(heads, E)
        M, z = (None, None) if state is None else (x.to(heads.dtype).contiguous() for x in state)
        alpha, bias = plasticity.detach().to(heads.dtype), bias.to(heads.dtype).contiguous()
        out, M, z = apply(_PackedHebbian, heads.contiguous(), bias, alpha, n_heads, M, z)
        return out, (M, z)
    dtype = torch.promote_types(heads.dtype, torch.float32)
    heads, gates = heads.to(dtype).split((3 * n_heads * E, n_heads), -1)
    q, k, v = unpacked(heads, n_heads)
    out, state = hebbian(F.elu(q) + 1, F.elu(k) + 1, v, log_decays(gates + bias.to(dtype), plasticity), state=state)
    return out.transpose(1, 2).flatten(2), state


def unpacked(heads: Tensor, n_heads: int) -> Tensor:
    """q, k and v [3, B, H, T, E] of [B, T, 3 · H · E]: a copy, each of them contiguous."""
    return heads.unflatten(-1, (3, n_heads, -1)).permute(2, 0, 3, 1, 4).contiguous()


def log_decays(gates: Tensor, plasticity: Tensor) -> Tensor:
    """log λ = log α + log sigmoid(gate), of gates with their bias: [B, T, H] → [B, H, T] ≤ 0; −inf at α = 0."""
    return plasticity.to(gates.dtype).log() + F.logsigmoid(gates).transpose(1, 2)


def suits(x: Tensor, n_heads: int, E: int, *others: Tensor) -> bool:
    """Whether "auto" takes the kernels for heads made of x [B, T, ...] of any float type; others: what goes with it."""
    if triton is None or not x.is_cuda or x.dtype == torch.float64 or batched(x, *others):
        return False
    if torch.version.hip:  # `pin` is NVIDIA's assembler
        return False
    return E <= WIDEST and x.shape[1] >= SHORTEST and x.shape[0] * n_heads >= PROGRAMS


def _check(heads: Tensor, E: int) -> None:
    if triton is None or not (heads.is_cuda or not isinstance(forward_kernel, triton.JITFunction)):
        raise ValueError("impl='triton': accepted on a CUDA device with triton installed")
    if heads.dtype != torch.float32:
        raise ValueError(f"heads has dtype {heads.dtype}: with impl='triton', accepted is torch.float32")
    if not 1 <= E <= WIDEST:
        raise ValueError(f"heads of E={E}: with impl='triton', accepted is 1 to {WIDEST}")


class _PackedHebbian(torch.autograd.Function):
    """States, and gradients of states, are [B · H · chunks, E · E + E]: M and then z."""

    @staticmethod
    def forward(ctx, heads, bias, alpha, H, M, z):
        B, T, width = heads.shape
        E = width // H // 3
        rows, sizes = B * H, _sizes(H, E)
        states = heads.new_empty(rows * -(-T // CHUNK), E * E + E)
        out, inverse = heads.new_empty(B, T, H * E), heads.new_empty(rows, T)
        M_out, z_out = heads.new_empty(B, H, E, E), heads.new_empty(B, H, E)
        if rows:
            forward_kernel[(rows,)](
                heads, bias, alpha, M, z, out, inverse, states, M_out, z_out, T, *sizes, EPSILON, **FORWARD
            )
        ctx.save_for_backward(heads, bias, alpha, out, inverse, states)
        ctx.heads, ctx.carried = H, M is not None
        return out, M_out, z_out

    @staticmethod
    @once_differentiable
    def backward(ctx, d_out, d_M, d_z):
        heads, bias, alpha, out, inverse, states = ctx.saved_tensors
        H, (B, T, width) = ctx.heads, heads.shape
        E = width // H // 3
        rows, sizes = B * H, _sizes(H, E)
        d_out, d_M, d_z = d_out.contiguous(), d_M.contiguous(), d_z.contiguous()
        d_heads = torch.empty_like(heads, dtype=getattr(ctx, "gradient_type", heads.dtype))
        d_states, d_normaliser = torch.empty_like(states), torch.empty_like(inverse)
        d_M_in = d_z_in = None
        if ctx.carried:
            d_M_in, d_z_in = heads.new_empty(B, H, E, E), heads.new_empty(B, H, E)
        if rows:
            inputs = heads, bias, alpha, d_out, inverse, d_normaliser
            states_gradient_kernel[(rows,)](
                *inputs, out, d_M, d_z, d_states, d_M_in, d_z_in, T, *sizes, **STATES_GRADIENT
            )
            chunks = (len(states),)
            queries_kernel[chunks](*inputs, states, d_states, d_heads, T, *sizes, **QUERIES)
            keys_kernel[chunks](*inputs, d_states, d_heads, T, *sizes, **KEYS)
        return d_heads, d_heads[..., 3 * H * E :].sum((0, 1), dtype=heads.dtype), None, None, d_M_in, d_z_in


def _sizes(H: int, E: int) -> tuple[int, ...]:
    """H, E, the rows of half a state, and the steps of a chunk: constants of every kernel."""
    return H, E, 32 if E > 32 else 16, CHUNK


if triton is not None:

    @triton.jit
    def pin(x):
        """x, of 16 bits: made where it is loaded, and not anew, after 32 bits have travelled, in every warp."""
        return tl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [x], dtype=x.dtype, is_pure=False, pack=2)

    if not isinstance(pin, triton.JITFunction):  # Triton's interpreter, which knows no assembler

        @triton.jit
        def pin(x):
            return x

    @triton.jit
    def largest(x):
        """The largest |x|; an infinity or NaN where there is one."""
        return tl.max(x.to(tl.int32, bitcast=True) & 0x7FFFFFFF).to(tl.float32, bitcast=True)

    @triton.jit
    def parts(x, bound):
        """What `product` takes: |x| up to bound scaled to 2¹⁴, NaN if it is none, and split in two; the way back."""
        exponent = bound.to(tl.int32, bitcast=True) >> 23
        up = tl.minimum(267 - exponent, 247)  # exponents with their bias of 127
        down = ((254 - up) << 23).to(tl.float32, bitcast=True)
        x *= tl.where(exponent < 255, (up << 23).to(tl.float32, bitcast=True), float("nan"))
        big = x.to(tl.float16)
        return pin(big), pin((x - big.to(tl.float32)).to(tl.float16)), down

    @triton.jit
    def turned(x):
        """Transposed, which parts may be: they are no sums."""
        return tl.trans(x[0]), tl.trans(x[1]), x[2]

    @triton.jit
    def product(a, b):
        return tl.dot(a[0], b[0], tl.dot(a[1], b[0], tl.dot(a[0], b[1]))) * (a[2] * b[2])

    @triton.jit
    def feature(x):
        """elu + 1; 0 of −inf."""
        return tl.where(x > 0, x + 1.0, tl.exp(tl.where(x > 0, 0.0, x)))

    @triton.jit
    def rows(x, i, e, left, E: tl.constexpr, ROW: tl.constexpr, other):
        """Steps i × channels e of x, whose steps lie ROW apart."""
        return tl.load(x + i[:, None] * ROW + e[None, :], (i[:, None] < left) & (e[None, :] < E), other=other)

    @triton.jit
    def columns(x, e, i, left, E: tl.constexpr, ROW: tl.constexpr, other):
        """Channels e × steps i: transposed by its addresses."""
        return tl.load(x + e[:, None] + i[None, :] * ROW, (e[:, None] < E) & (i[None, :] < left), other=other)

    @triton.jit
    def store_rows(x, i, e, value, left, E: tl.constexpr, ROW: tl.constexpr):
        tl.store(x + i[:, None] * ROW + e[None, :], value, (i[:, None] < left) & (e[None, :] < E))

    @triton.jit
    def square(x, e, f, E: tl.constexpr):
        """x[e, f] of an E × E matrix; 0 outside."""
        return tl.load(x + e[:, None] * E + f[None, :], (e[:, None] < E) & (f[None, :] < E), other=0.0)

    @triton.jit
    def store_state(state, e, f, M, z, E: tl.constexpr):
        tl.store(state + e[:, None] * E + f[None, :], M, (e[:, None] < E) & (f[None, :] < E))
        tl.store(state + E * E + e, z, e < E)

    @triton.jit
    def gates_of(heads, bias, h, i, left, H: tl.constexpr, E: tl.constexpr):
        """What log λ is made of: gates and their bias at the steps i of one head; heads point at the first step."""
        return tl.load(heads + 3 * H * E + h + i * (3 * H * E + H), i < left, other=0.0) + tl.load(bias + h)

    @triton.jit
    def running(gate, alpha, i, left, reverse: tl.constexpr = False):
        """→ the sum of log λ from the chunk's start in float64 and the count of erasing steps; reverse: i falls."""
        y = tl.exp(-tl.abs(gate))
        w = 1.0 + y
        log1p = tl.where(w == 1.0, y, tl.log(w) * y / tl.where(w == 1.0, 1.0, w - 1.0))  # after Kahan
        alpha = tl.load(alpha)
        log_alpha = tl.where(alpha > 0, tl.log(tl.where(alpha > 0, alpha, 1.0)), float("-inf"))
        step = log_alpha + (tl.where(gate > 0, 0.0, gate) - log1p)
        step = tl.where(i < left, step, 0.0)
        erases = step < ERASES
        step = tl.where(erases, 0.0, step).to(tl.float64)
        S, erased = tl.cumsum(step, 0), tl.cumsum(erases.to(tl.int32), 0)
        if reverse:
            S, erased = tl.sum(step, 0) - S + step, tl.sum(erases.to(tl.int32), 0) - erased + erases.to(tl.int32)
        return S, erased

    @triton.jit
    def decay(difference, kept):
        return tl.exp(tl.where(kept, difference.to(tl.float32), float("-inf")))

    @triton.jit
    def around(S, erased, i, C: tl.constexpr):
        """→ λ_0 ⋯ λ_i, λ_{i+1} ⋯ λ_{C−1}, λ_0 ⋯ λ_{C−1}."""
        end = tl.sum(tl.where(i == C - 1, S, 0.0), 0)
        count = tl.max(erased, 0)
        return decay(S, erased == 0), decay(end - S, erased == count), decay(end, count == 0)

    @triton.jit(do_not_specialize=["T"])
    def forward_kernel(
        heads, bias, alpha, M, z, out, inverse, states, M_out, z_out, T,
        H: tl.constexpr, E: tl.constexpr, HALF: tl.constexpr, C: tl.constexpr, EPSILON: tl.constexpr,
    ):  # fmt: skip
        ROW: tl.constexpr = 3 * H * E + H
        bh = tl.program_id(0).to(tl.int64)
        b, h = bh // H, bh % H
        N = tl.cdiv(T, C)
        i, f = tl.arange(0, C), tl.arange(0, 2 * HALF)
        e0 = tl.arange(0, HALF)
        e1 = HALF + e0
        M0, M1 = tl.zeros([HALF, 2 * HALF], tl.float32), tl.zeros([HALF, 2 * HALF], tl.float32)
        z0, z1 = tl.zeros([HALF], tl.float32), tl.zeros([HALF], tl.float32)
        if M is not None:
            M0, M1 = square(M + bh * E * E, e0, f, E), square(M + bh * E * E, e1, f, E)
            z0 = tl.load(z + bh * E + e0, e0 < E, other=0.0)
            z1 = tl.load(z + bh * E + e1, e1 < E, other=0.0)
        most_M = largest(tl.maximum(tl.abs(M0), tl.abs(M1)))  # a bound, from here on
        for m in range(0, N):
            state = states + (bh * N + m) * (E * E + E)
            store_state(state, e0, f, M0, z0, E)
            store_state(state, e1, f, M1, z1, E)
            left = T - m * C
            step = heads + (b * T + m * C) * ROW
            q, k, v = step + h * E, step + (H + h) * E, step + (2 * H + h) * E
            S, erased = running(gates_of(step, bias, h, i, left, H, E), alpha, i, left)
            since, to_end, whole = around(S, erased, i, C)
            q0 = feature(rows(q, i, e0, left, E, ROW, float("-inf")))
            q1 = feature(rows(q, i, e1, left, E, ROW, float("-inf")))
            k0 = feature(columns(k, e0, i, left, E, ROW, float("-inf")))
            k1 = feature(columns(k, e1, i, left, E, ROW, float("-inf")))
            values = rows(v, i, f, left, E, ROW, 0.0)
            most_q, most_k = largest(tl.maximum(q0, q1)), largest(tl.maximum(k0, k1))
            most_v = largest(values)
            queries0, queries1 = parts(q0, most_q), parts(q1, most_q)
            keys0, keys1 = parts(k0, most_k), parts(k1, most_k)
            scores = product(queries0, keys0) + product(queries1, keys1)
            scores *= decay(S[:, None] - S[None, :], (i[:, None] >= i[None, :]) & (erased[:, None] == erased[None, :]))
            total = (tl.sum(q0 * z0[None, :], 1) + tl.sum(q1 * z1[None, :], 1)) * since
            over = 1.0 / (total + tl.sum(scores, 1) + EPSILON)
            result = product(queries0, parts(M0, most_M)) + product(queries1, parts(M1, most_M))
            scores = parts(scores, 2 * HALF * (most_q * most_k))
            result = result * since[:, None] + product(scores, parts(values, most_v))
            store_rows(out + (b * T + m * C) * (H * E) + h * E, i, f, result * over[:, None], left, E, H * E)
            tl.store(inverse + bh * T + m * C + i, over, i < left)
            values = parts(values * to_end[:, None], most_v)
            M0, M1 = M0 * whole + product(keys0, values), M1 * whole + product(keys1, values)
            most_M = most_M * whole + C * (most_k * most_v)
            z0, z1 = z0 * whole + tl.sum(k0 * to_end[None, :], 1), z1 * whole + tl.sum(k1 * to_end[None, :], 1)
        tl.store(M_out + bh * E * E + e0[:, None] * E + f[None, :], M0, (e0[:, None] < E) & (f[None, :] < E))
        tl.store(M_out + bh * E * E + e1[:, None] * E + f[None, :], M1, (e1[:, None] < E) & (f[None, :] < E))
        tl.store(z_out + bh * E + e0, z0, e0 < E)
        tl.store(z_out + bh * E + e1, z1, e1 < E)

    @triton.jit(do_not_specialize=["T"])
    def states_gradient_kernel(
        heads, bias, alpha, d_out, inverse, d_normaliser, out, d_M, d_z, d_states, d_M_in, d_z_in, T,
        H: tl.constexpr, E: tl.constexpr, HALF: tl.constexpr, C: tl.constexpr,
    ):  # fmt: skip
        """From the end: the gradient of the state after every chunk, and of the normaliser."""
        ROW: tl.constexpr = 3 * H * E + H
        bh = tl.program_id(0).to(tl.int64)
        b, h = bh // H, bh % H
        N = tl.cdiv(T, C)
        i, f = tl.arange(0, C), tl.arange(0, 2 * HALF)
        e0 = tl.arange(0, HALF)
        e1 = HALF + e0
        D0, D1 = square(d_M + bh * E * E, e0, f, E), square(d_M + bh * E * E, e1, f, E)
        d0 = tl.load(d_z + bh * E + e0, e0 < E, other=0.0)
        d1 = tl.load(d_z + bh * E + e1, e1 < E, other=0.0)
        for back in range(0, N):
            m = N - 1 - back
            left = T - m * C
            state = d_states + (bh * N + m) * (E * E + E)
            store_state(state, e0, f, D0, d0, E)
            store_state(state, e1, f, D1, d1, E)
            step = heads + (b * T + m * C) * ROW
            here = (b * T + m * C) * (H * E) + h * E
            S, erased = running(gates_of(step, bias, h, i, left, H, E), alpha, i, left)
            since, _, whole = around(S, erased, i, C)
            u = tl.load(inverse + bh * T + m * C + i, i < left, other=1.0)[:, None]
            u *= rows(d_out + here, i, f, left, E, H * E, 0.0)
            of_total = -tl.sum(u * rows(out + here, i, f, left, E, H * E, 0.0), 1)
            tl.store(d_normaliser + bh * T + m * C + i, of_total, i < left)
            q0 = feature(columns(step + h * E, e0, i, left, E, ROW, float("-inf"))) * since[None, :]
            q1 = feature(columns(step + h * E, e1, i, left, E, ROW, float("-inf"))) * since[None, :]
            most_q, read = largest(tl.maximum(q0, q1)), parts(u, largest(u))
            D0 = D0 * whole + product(parts(q0, most_q), read)
            D1 = D1 * whole + product(parts(q1, most_q), read)
            d0, d1 = d0 * whole + tl.sum(q0 * of_total[None, :], 1), d1 * whole + tl.sum(q1 * of_total[None, :], 1)
        if d_M_in is not None:
            tl.store(d_M_in + bh * E * E + e0[:, None] * E + f[None, :], D0, (e0[:, None] < E) & (f[None, :] < E))
            tl.store(d_M_in + bh * E * E + e1[:, None] * E + f[None, :], D1, (e1[:, None] < E) & (f[None, :] < E))
            tl.store(d_z_in + bh * E + e0, d0, e0 < E)
            tl.store(d_z_in + bh * E + e1, d1, e1 < E)

    @triton.jit
    def place(chunk, T, H: tl.constexpr, C: tl.constexpr):
        """→ a chunk's first step among all rows', and among all heads', steps; its head, and the steps left."""
        N = tl.cdiv(T, C)
        bh, first = chunk // N, chunk % N * C
        return bh // H * T + first, bh * T + first, bh % H, (T - first).to(tl.int32)

    @triton.jit(do_not_specialize=["T"])
    def queries_kernel(
        heads, bias, alpha, d_out, inverse, d_normaliser, states, d_states, d_heads, T,
        H: tl.constexpr, E: tl.constexpr, HALF: tl.constexpr, C: tl.constexpr,
    ):  # fmt: skip
        """One chunk's gradients of q; in the gates' place, the part of log λ's that comes with them."""
        ROW: tl.constexpr = 3 * H * E + H
        chunk = tl.program_id(0).to(tl.int64)
        i, f = tl.arange(0, C), tl.arange(0, 2 * HALF)
        first, at, h, left = place(chunk, T, H, C)
        heads, d_heads = heads + first * ROW, d_heads + first * ROW
        q, k, v = heads + h * E, heads + (H + h) * E, heads + (2 * H + h) * E
        d_out += first * (H * E) + h * E
        states += chunk * (E * E + E)
        d_states += chunk * (E * E + E)
        # All that comes from afar is asked for at once.
        u, values = rows(d_out, i, f, left, E, H * E, 0.0), rows(v, i, f, left, E, ROW, 0.0)
        M = square(states, f, f, E)
        of_state = M * square(d_states, f, f, E)
        keys = rows(k, i, f, left, E, ROW, float("-inf"))
        queries = rows(q, i, f, left, E, ROW, float("-inf"))
        S, erased = running(gates_of(heads, bias, h, i, left, H, E), alpha, i, left)
        since, _, whole = around(S, erased, i, C)
        inverse = tl.load(inverse + at + i, i < left, other=1.0)
        of_total = tl.load(d_normaliser + at + i, i < left, other=0.0)
        u *= inverse[:, None]
        most_u, most_v = largest(u), largest(values)
        most_within = 2 * HALF * (most_u * most_v) + largest(of_total)
        u = parts(u, most_u)
        d_within = product(u, turned(parts(values, most_v)))
        d_queries = product(u, turned(parts(M, largest(M))))
        z, d_z = tl.load(states + E * E + f, f < E, other=0.0), tl.load(d_states + E * E + f, f < E, other=0.0)
        of_start = tl.sum(tl.sum(of_state, 0) + z * d_z, 0) * whole
        queries = feature(queries)
        d_queries = (d_queries + of_total[:, None] * z[None, :]) * since[:, None]
        # The decay from the start to step i holds the steps 0 … i.
        d_log = tl.sum(tl.where(i[:, None] >= i[None, :], tl.sum(d_queries * queries, 1)[:, None], 0.0), 0) + of_start
        tl.store(d_heads + 3 * H * E + h + i * ROW, d_log, i < left)
        kept = (i[:, None] >= i[None, :]) & (erased[:, None] == erased[None, :])
        d_within = (d_within + of_total[:, None]) * decay(S[:, None] - S[None, :], kept)
        keys = feature(keys)
        d_queries += product(parts(d_within, most_within), parts(keys, largest(keys)))
        store_rows(d_heads + h * E, i, f, d_queries * tl.minimum(queries, 1.0), left, E, ROW)

    @triton.jit(do_not_specialize=["T"])
    def keys_kernel(
        heads, bias, alpha, d_out, inverse, d_normaliser, d_states, d_heads, T,
        H: tl.constexpr, E: tl.constexpr, HALF: tl.constexpr, C: tl.constexpr,
    ):  # fmt: skip
        """One chunk's gradients of k, v and the gates. Rows are keys j, columns queries i from the last one on."""
        ROW: tl.constexpr = 3 * H * E + H
        chunk = tl.program_id(0).to(tl.int64)
        j, f = tl.arange(0, C), tl.arange(0, 2 * HALF)
        i = C - 1 - j
        first, at, h, left = place(chunk, T, H, C)
        heads, d_heads = heads + first * ROW, d_heads + first * ROW
        q, k, v = heads + h * E, heads + (H + h) * E, heads + (2 * H + h) * E
        d_out += first * (H * E) + h * E
        d_states += chunk * (E * E + E)
        # All that comes from afar is asked for at once.
        keys = rows(k, j, f, left, E, ROW, float("-inf"))
        queries = rows(q, i, f, left, E, ROW, float("-inf"))
        values, u = rows(v, j, f, left, E, ROW, 0.0), rows(d_out, i, f, left, E, H * E, 0.0)
        D = square(d_states, f, f, E)
        S, erased = running(gates_of(heads, bias, h, j, left, H, E), alpha, j, left)
        gate_i = gates_of(heads, bias, h, i, left, H, E)
        S_i, erased_i = running(gate_i, alpha, i, left, True)
        _, to_end, _ = around(S, erased, j, C)
        inverse = tl.load(inverse + at + i, i < left, other=1.0)
        of_total = tl.load(d_normaliser + at + i, i < left, other=0.0)
        across = decay(S_i[None, :] - S[:, None], (j[:, None] <= i[None, :]) & (erased[:, None] == erased_i[None, :]))
        keys, queries = feature(keys), feature(queries)
        u *= inverse[:, None]
        most_k, most_q, most_v, most_u = largest(keys), largest(queries), largest(values), largest(u)
        most_scores = 2 * HALF * (most_k * most_q)
        most_across = 2 * HALF * (most_v * most_u) + largest(of_total)
        by_keys, queries = parts(keys, most_k), parts(queries, most_q)
        values, u, D = parts(values, most_v), parts(u, most_u), parts(D, largest(D))
        scores = product(by_keys, turned(queries)) * across
        d_values = product(by_keys, D)
        d_across = product(values, turned(u))
        d_keys = product(values, turned(D))
        d_values = d_values * to_end[:, None] + product(parts(scores, most_scores), u)
        store_rows(d_heads + (2 * H + h) * E, j, f, d_values, left, E, ROW)

        d_across += of_total[None, :]
        # d log Γ_ij spreads over steps j + 1 … i: first over those up to i, then those after j are kept.
        d_log = tl.cumsum(d_across * scores, 1)
        d_log = tl.sum(tl.where(j[:, None] < i[None, :], d_log, 0.0), 0)
        d_z = tl.load(d_states + E * E + f, f < E, other=0.0)
        d_keys = (d_keys + d_z[None, :]) * to_end[:, None]
        # The decay from j to the end holds the steps after j.
        d_log += tl.sum(tl.where(j[:, None] < i[None, :], tl.sum(d_keys * keys, 1)[:, None], 0.0), 0)
        of_scores = product(parts(d_across * across, most_across), queries)
        d_keys = (d_keys + of_scores) * tl.minimum(keys, 1.0)
        store_rows(d_heads + (H + h) * E, j, f, d_keys, left, E, ROW)

        y = tl.exp(-tl.abs(gate_i))
        slope = tl.where(gate_i > 0, y, 1.0) / (1.0 + y)  # of log sigmoid
        d_gate = d_heads + 3 * H * E + h + i * ROW
        tl.store(d_gate, (d_log + tl.load(d_gate, i < left, other=0.0)) * slope, i < left)
