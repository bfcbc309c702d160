"""The gated delta rule as Triton kernels: `model.kernels.chunked.chunked_delta` with the same contract.

With U the corrections that a chunk really writes, the delta rule is the Hebbian rule without a normaliser and with U
for V, and so most of it is `model.kernels.triton_hebbian`'s kernels. What is added finds U, per chunk::

    (I + A) U = β (V − decay · K M_in)     A = tril(β Γ ⊙ K Kᵀ, −1)     R = (I + A)⁻¹
    M_out = (total − X) M_in + W           W = K_endᵀ R (β V)           X = K_endᵀ R (β decay · K)

Notable:

- R is found by forward substitution: in diagonal blocks of 16 row by row, then two blocks at a time,
  R₂₁ = −R₂₂ A₂₁ R₁₁. Its entries stay within [−1, 1] for keys of norm 1 and β, λ in [0, 1], whatever repeats.
- The states go from chunk to chunk in one kernel forward and one back. Each program keeps some columns of M,
  transposed, so that the long side of every product is shared by the warps and the short one is never 64 (see
  triton_hebbian on wgmma); `total` multiplies in float32, apart from the product with X, so that what is merely
  remembered is not rounded by the product.
"""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from model.kernels.transforms import apply
from model.kernels.triton_hebbian import (
    AVAILABLE,
    Shape,
    State,
    check,
    decay_gradient,
    heads_last,
    inner_gradients,
    readable,
    running_sums,
)

BLOCK = 16  # of the system, solved row by row
WRITTEN = 16  # rows of W and X in one program: with 32 its registers spill
CARRIED = 16  # columns of M that one program carries


def triton_delta(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, beta: Tensor, state: State
) -> tuple[Tensor, State]:
    """`recurrent_delta` on the card, with gradients of all inputs.

    Args:
        q, k, v: [B, H, T, E] float32, T ≥ 1, E ≤ 128, of any strides.
        log_decay, beta: [B, H, T]; log_decay ≤ 0, −inf erases; beta in [0, 1].
        state: (M [B, H, E, E], z [B, H, E]); z is handed through.

    Returns:
        out [B, H, T, E], laid out in memory as [B, T, H, E], and the state after step T.

    Raises:
        ValueError: without triton or CUDA, or for another dtype or a wider E.
    """
    check(q, v)
    out, M = apply(_TritonDelta, q, k, v, log_decay, beta, state[0])
    return out, (M, state[1])


class _TritonDelta(torch.autograd.Function):
    """States and turns (X) are [chunks, E · E], inverses (R) [chunks, C, C], corrections (U) [B, H, T, E]."""

    @staticmethod
    def forward(ctx, q, k, v, log_decay, beta, M):
        s = Shape(q)
        q, k, v, M = readable(q), readable(k), readable(v), M.contiguous()
        sums = running_sums(log_decay, s)
        inverse = _inverse(k, beta, sums, s)
        states, turns = q.new_empty(s.chunks, s.E * s.E), q.new_empty(s.chunks, s.E * s.E)
        delta_writes_kernel[(s.chunks * -(-s.E // WRITTEN),)](
            k, k.stride(), v, v.stride(), beta, beta.stride(), sums, inverse, states, turns,
            *s.sizes(), WRITTEN, s.columns, s.steps, **s.launch,
        )  # fmt: skip
        M_out = _chain(states, turns, sums, M, s, reverse=False)
        corrections = q.new_empty(q.shape)
        grid = (s.chunks * s.blocks * -(-s.E // s.columns),)
        corrections_kernel[grid](
            k, k.stride(), v, v.stride(), beta, beta.stride(), sums, inverse, states,
            corrections, corrections.stride(), *s.sizes(), s.rows, s.columns, s.steps, **s.launch,
        )  # fmt: skip
        out = heads_last(q)
        outputs_kernel[grid](
            q, q.stride(), k, k.stride(), corrections, corrections.stride(), sums, states, out, out.stride(), sums,
            *s.sizes(), s.rows, s.columns, s.step, False, 0.0, **s.launch,
        )  # fmt: skip
        ctx.save_for_backward(q, k, v, beta, sums, inverse, turns, states, corrections)
        return out, M_out

    @staticmethod
    @once_differentiable
    def backward(ctx, d_out, d_M):
        q, k, v, beta, sums, inverse, turns, states, corrections = ctx.saved_tensors
        s = Shape(q)
        d_out = readable(d_out)
        # Gradients of the states before each chunk, by what its outputs read, then of those after each chunk.
        d_corrections, d_states = torch.empty_like(corrections), torch.empty_like(states)
        across = -(-s.E // s.columns)
        inner_corrections_gradient_kernel[(s.chunks * s.blocks * across,)](
            q, q.stride(), k, k.stride(), d_out, d_out.stride(), sums, d_corrections, d_corrections.stride(),
            *s.sizes(), s.rows, s.columns, s.step, **s.launch,
        )  # fmt: skip
        delta_reads_gradient_kernel[(s.chunks * -(-s.E // s.state_rows),)](
            q, q.stride(), k, k.stride(), d_out, d_out.stride(), d_corrections, d_corrections.stride(),
            beta, beta.stride(), sums, inverse, d_states, *s.sizes(), s.state_rows, s.columns, s.steps, **s.launch,
        )  # fmt: skip
        d_M = _chain(d_states, turns, sums, d_M.contiguous(), s, reverse=True)

        d_q, d_k, d_v = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
        d_beta = torch.empty_like(beta)
        parts = q.new_empty(s.chunks, 3 * s.blocks, s.C)
        inner_gradients(
            q, k, corrections, d_out, sums, states, d_states, sums, sums, d_q, d_k, d_corrections, parts, s, False
        )
        # The system: the gradient of its right side, and from that of everything in it.
        d_sides = torch.empty_like(corrections)
        sides_gradient_kernel[(s.chunks * s.blocks * across,)](
            inverse, d_corrections, d_corrections.stride(), d_sides, d_sides.stride(),
            *s.sizes(), s.rows, s.columns, s.steps, **s.launch,
        )  # fmt: skip
        system_gradient_kernel[(s.chunks * s.blocks,)](
            k, k.stride(), v, v.stride(), beta, beta.stride(), sums, states, corrections, d_sides, d_sides.stride(),
            d_k, d_k.stride(), d_v, d_v.stride(), d_beta, d_beta.stride(), parts,
            *s.sizes(), s.rows, s.columns, s.step, **s.launch,
        )  # fmt: skip
        return d_q, d_k, d_v, decay_gradient(parts, s), d_beta, d_M


def _inverse(k: Tensor, beta: Tensor, sums: Tensor, s: Shape) -> Tensor:
    """(I + A)⁻¹ [chunks, C, C] of every chunk."""
    inverse = k.new_empty(s.chunks, s.C, s.C)
    system_kernel[(s.chunks * s.blocks,)](
        k, k.stride(), beta, beta.stride(), sums, inverse, *s.sizes(), s.rows, s.step, **s.launch
    )
    invert_kernel[(s.chunks * (s.C // BLOCK),)](inverse, s.C, BLOCK, num_warps=1)
    size = BLOCK
    while size < s.C:
        merge_kernel[(s.chunks * (s.C // (2 * size)),)](inverse, s.C, size, num_warps=size // 16)
        size *= 2
    return inverse


def _chain(states: Tensor, turns: Tensor, sums: Tensor, M: Tensor, s: Shape, reverse: bool) -> Tensor:
    """Turn writes into the states before each chunk, in place (or gradients likewise); the last one is returned."""
    M_out = torch.empty_like(M)
    chain_kernel[(s.B * s.H * -(-s.E // CARRIED),)](
        states, turns, sums, M, M_out, s.N, s.E, s.C, s.width, reverse, CARRIED, num_warps=8 if s.width == 128 else 4
    )
    return M_out


if AVAILABLE:
    import triton
    import triton.language as tl

    from model.kernels.triton_hebbian import (
        at,
        between,
        dot,
        load,
        load_t,
        load_vector,
        matrix,
        outputs_kernel,
        place,
        since_start,
        store,
    )

    @triton.jit
    def system_kernel(
        k, ks, beta, bs, sums, system, H, N, T, E: tl.constexpr, C: tl.constexpr, BM: tl.constexpr, BX: tl.constexpr
    ):
        """Rows of A = tril(β Γ ⊙ K Kᵀ, −1)."""
        tile, chunk, b, h, first, left = place(H, N, T, C, C // BM)
        i, j = tile * BM + tl.arange(0, BM), tl.arange(0, C)
        k = at(k, ks, b, h, first)
        products = tl.zeros([BM, C], tl.float32)
        for e0 in range(0, E, BX):
            e = e0 + tl.arange(0, BX)
            products += dot(load(k, ks, i, e, left, E), load_t(k, ks, e, j, left, E))
        strength = load_vector(at(beta, bs, b, h, first), bs, i, left)
        products *= strength[:, None] * between(sums + chunk * 3 * C, i[:, None], j[None, :], C)
        products = tl.where(i[:, None] > j[None, :], products, 0.0)
        tl.store(system + chunk * C * C + i[:, None] * C + j[None, :], products)

    @triton.jit
    def invert_kernel(system, C: tl.constexpr, BLOCK: tl.constexpr):
        """A diagonal block of I + A → its inverse, in place, row by row."""
        COUNT: tl.constexpr = C // BLOCK
        chunk = (tl.program_id(0) // COUNT).to(tl.int64)
        system += chunk * C * C + tl.program_id(0) % COUNT * BLOCK * (C + 1)
        i = tl.arange(0, BLOCK)
        # Columns are rows of A: each is wanted along the rows of the inverse.
        A = tl.load(system + i[:, None] + i[None, :] * C)
        inverse = (i[:, None] == i[None, :]).to(tl.float32)
        for r in range(1, BLOCK):
            row = tl.sum(tl.where(i[None, :] == r, A, 0.0), 1)
            taken = tl.sum(row[:, None] * inverse, 0)
            inverse -= tl.where(i[:, None] == r, taken[None, :], 0.0)
        tl.store(system + i[:, None] * C + i[None, :], inverse)

    @triton.jit
    def merge_kernel(system, C: tl.constexpr, SIZE: tl.constexpr):
        """Two inverted diagonal blocks, and A below the first → the block of the inverse there, in place."""
        COUNT: tl.constexpr = C // (2 * SIZE)
        chunk = (tl.program_id(0) // COUNT).to(tl.int64)
        system += chunk * C * C + tl.program_id(0) % COUNT * 2 * SIZE * (C + 1)
        i = tl.arange(0, SIZE)
        here = i[:, None] * C + i[None, :]
        below = system + SIZE * C + here
        first, second = tl.load(system + here), tl.load(below + SIZE)
        tl.store(below, -dot(second, dot(tl.load(below), first)))

    @triton.jit
    def delta_writes_kernel(
        k, ks, v, vs, beta, bs, sums, inverse, states, turns,
        H, N, T, E: tl.constexpr, C: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, BC: tl.constexpr,
    ):  # fmt: skip
        """Rows of W and of X."""
        tile, chunk, b, h, first, left = place(H, N, T, C, (E + BK - 1) // BK)
        e, j = tile * BK + tl.arange(0, BK), tl.arange(0, C)
        k, v = at(k, ks, b, h, first), at(v, vs, b, h, first)
        sums += chunk * 3 * C
        strength = load_vector(at(beta, bs, b, h, first), bs, j, left)
        keys = tl.zeros([BK, C], tl.float32)
        for i0 in range(0, C, BC):
            i = i0 + tl.arange(0, BC)
            keys_at_end = load_t(k, ks, e, i, left, E) * between(sums, C - 1, i, C)[None, :]
            keys += dot(keys_at_end, matrix(inverse + chunk * C * C, i, j, C, 1, C))
        since = strength * since_start(sums, j, C)
        for x0 in range(0, E, BV):
            x = x0 + tl.arange(0, BV)
            there = chunk * E * E + e[:, None] * E + x[None, :]
            inside = (e[:, None] < E) & (x[None, :] < E)
            tl.store(states + there, dot(keys, load(v, vs, j, x, left, E) * strength[:, None]), inside)
            tl.store(turns + there, dot(keys, load(k, ks, j, x, left, E) * since[:, None]), inside)

    @triton.jit
    def chain_kernel(
        states, turns, sums, M, M_out, N, E: tl.constexpr, C: tl.constexpr, WIDTH: tl.constexpr, REVERSE: tl.constexpr,
        BV: tl.constexpr,
    ):  # fmt: skip
        """M ← (total_n − X_n) M + W_n over chunks, every M stored in the place of its W; back, with X_nᵀ."""
        TILES: tl.constexpr = (E + BV - 1) // BV
        bh = (tl.program_id(0) // TILES).to(tl.int64)
        v, e = tl.program_id(0) % TILES * BV + tl.arange(0, BV), tl.arange(0, WIDTH)
        here = v[:, None] + e[None, :] * E
        inside = (v[:, None] < E) & (e[None, :] < E)
        # Mᵀ Xᵀ forward, and dᵀ X back.
        row, column = 1, E
        n, direction = bh * N, 1
        if REVERSE:
            row, column = E, 1
            n, direction = bh * N + N - 1, -1
        state = tl.load(M + bh * E * E + here, inside, other=0.0)
        write = tl.load(states + n * E * E + here, inside, other=0.0)
        turn = matrix(turns + n * E * E, e, e, row, column, E)
        # All threads have read W before one stores M there; in the loop the product's own barriers see to it.
        tl.debug_barrier()
        for step in range(0, N):
            # The next chunk's are fetched while this one is worked on; after the last, that one again, unused.
            following = n + direction * min(1, N - 1 - step)
            next_write = tl.load(states + following * E * E + here, inside, other=0.0)
            next_turn = matrix(turns + following * E * E, e, e, row, column, E)
            tl.store(states + n * E * E + here, state, inside)
            total = since_start(sums + n * 3 * C, C - 1, C)
            state = total * state + write - dot(state, turn)
            write, turn, n = next_write, next_turn, following
        tl.store(M_out + bh * E * E + here, state, inside)

    @triton.jit
    def corrections_kernel(
        k, ks, v, vs, beta, bs, sums, inverse, states, corrections, us,
        H, N, T, E: tl.constexpr, C: tl.constexpr, BM: tl.constexpr, BE: tl.constexpr, BC: tl.constexpr,
    ):  # fmt: skip
        """Rows of U = R (β V) − R (β decay · K) M_in."""
        ACROSS: tl.constexpr = (E + BE - 1) // BE
        tile, chunk, b, h, first, left = place(H, N, T, C, C // BM * ACROSS)
        i, x = tile // ACROSS * BM + tl.arange(0, BM), tile % ACROSS * BE + tl.arange(0, BE)
        k, v, beta = at(k, ks, b, h, first), at(v, vs, b, h, first), at(beta, bs, b, h, first)
        sums += chunk * 3 * C
        inverse += chunk * C * C
        result = tl.zeros([BM, BE], tl.float32)
        for e0 in range(0, E, BE):
            e = e0 + tl.arange(0, BE)
            lookups = tl.zeros([BM, BE], tl.float32)
            for j0 in range(0, C, BC):
                j = j0 + tl.arange(0, BC)
                strength = load_vector(beta, bs, j, left) * since_start(sums, j, C)
                rows = matrix(inverse, i, j, C, 1, C)
                lookups += dot(rows, load(k, ks, j, e, left, E) * strength[:, None])
            result -= dot(lookups, matrix(states + chunk * E * E, e, x, E, 1, E))
        for j0 in range(0, C, BC):
            j = j0 + tl.arange(0, BC)
            strength = load_vector(beta, bs, j, left)
            result += dot(matrix(inverse, i, j, C, 1, C), load(v, vs, j, x, left, E) * strength[:, None])
        store(at(corrections, us, b, h, first), us, i, x, result, left, E)

    @triton.jit
    def inner_corrections_gradient_kernel(
        q, qs, k, ks, d_out, ds, sums, d_corrections, us,
        H, N, T, E: tl.constexpr, C: tl.constexpr, BM: tl.constexpr, BE: tl.constexpr, BX: tl.constexpr,
    ):  # fmt: skip
        """Rows of scoresᵀ d_out: U's gradient by the reads of its own chunk."""
        ACROSS: tl.constexpr = (E + BE - 1) // BE
        tile, chunk, b, h, first, left = place(H, N, T, C, C // BM * ACROSS)
        j, i, x = tile // ACROSS * BM + tl.arange(0, BM), tl.arange(0, C), tile % ACROSS * BE + tl.arange(0, BE)
        q, k, d_out = at(q, qs, b, h, first), at(k, ks, b, h, first), at(d_out, ds, b, h, first)
        scores = tl.zeros([BM, C], tl.float32)
        for e0 in range(0, E, BX):
            e = e0 + tl.arange(0, BX)
            scores += dot(load(k, ks, j, e, left, E), load_t(q, qs, e, i, left, E))
        scores *= between(sums + chunk * 3 * C, i[None, :], j[:, None], C)
        result = dot(scores, load(d_out, ds, i, x, left, E))
        store(at(d_corrections, us, b, h, first), us, j, x, result, left, E)

    @triton.jit
    def delta_reads_gradient_kernel(
        q, qs, k, ks, d_out, ds, d_corrections, us, beta, bs, sums, inverse, d_states,
        H, N, T, E: tl.constexpr, C: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, BC: tl.constexpr,
    ):  # fmt: skip
        """What each chunk's outputs add to the gradient of the state before it, directly and through U."""
        tile, chunk, b, h, first, left = place(H, N, T, C, (E + BK - 1) // BK)
        e, i = tile * BK + tl.arange(0, BK), tl.arange(0, C)
        d_out, d_corrections = at(d_out, ds, b, h, first), at(d_corrections, us, b, h, first)
        q, k, beta = at(q, qs, b, h, first), at(k, ks, b, h, first), at(beta, bs, b, h, first)
        sums += chunk * 3 * C
        lookups = tl.zeros([BK, C], tl.float32)
        for j0 in range(0, C, BC):
            j = j0 + tl.arange(0, BC)
            strength = load_vector(beta, bs, j, left) * since_start(sums, j, C)
            keys = load_t(k, ks, e, j, left, E) * strength[None, :]
            lookups += dot(keys, matrix(inverse + chunk * C * C, j, i, 1, C, C))  # the transposed inverse
        for x0 in range(0, E, BV):
            x = x0 + tl.arange(0, BV)
            d_M = -dot(lookups, load(d_corrections, us, i, x, left, E))
            for j0 in range(0, C, BC):
                j = j0 + tl.arange(0, BC)
                queries = load_t(q, qs, e, j, left, E) * since_start(sums, j, C)[None, :]
                d_M += dot(queries, load(d_out, ds, j, x, left, E))
            inside = (e[:, None] < E) & (x[None, :] < E)
            tl.store(d_states + chunk * E * E + e[:, None] * E + x[None, :], d_M, inside)

    @triton.jit
    def sides_gradient_kernel(
        inverse, d_corrections, us, d_sides, ss,
        H, N, T, E: tl.constexpr, C: tl.constexpr, BM: tl.constexpr, BE: tl.constexpr, BC: tl.constexpr,
    ):  # fmt: skip
        """Rows of Rᵀ dU."""
        ACROSS: tl.constexpr = (E + BE - 1) // BE
        tile, chunk, b, h, first, left = place(H, N, T, C, C // BM * ACROSS)
        j, x = tile // ACROSS * BM + tl.arange(0, BM), tile % ACROSS * BE + tl.arange(0, BE)
        d_corrections = at(d_corrections, us, b, h, first)
        result = tl.zeros([BM, BE], tl.float32)
        for i0 in range(0, C, BC):
            i = i0 + tl.arange(0, BC)
            rows = matrix(inverse + chunk * C * C, j, i, 1, C, C)  # of the transposed inverse
            result += dot(rows, load(d_corrections, us, i, x, left, E))
        store(at(d_sides, ss, b, h, first), ss, j, x, result, left, E)

    @triton.jit
    def system_gradient_kernel(
        k, ks, v, vs, beta, bs, sums, states, corrections, d_sides, ss, d_k, dks, d_v, dvs, d_beta, dbs, parts,
        H, N, T, E: tl.constexpr, C: tl.constexpr, BM: tl.constexpr, BE: tl.constexpr, BX: tl.constexpr,
    ):  # fmt: skip
        """From the gradient Y of the system's right side: of keys (added to d_k), values, β, and the decays in it."""
        tile, chunk, b, h, first, left = place(H, N, T, C, C // BM)
        r, c = tile * BM + tl.arange(0, BM), tl.arange(0, C)
        k, v, d_k, d_v = (
            at(k, ks, b, h, first),
            at(v, vs, b, h, first),
            at(d_k, dks, b, h, first),
            at(d_v, dvs, b, h, first),
        )
        corrections, d_sides = at(corrections, ss, b, h, first), at(d_sides, ss, b, h, first)
        beta, d_beta = at(beta, bs, b, h, first), at(d_beta, dbs, b, h, first)
        sums += chunk * 3 * C
        states += chunk * E * E
        strength = load_vector(beta, bs, r, left)
        # −dA with these rows as its rows, and −dAᵀ with these rows as its columns
        products = tl.zeros([BM, C], tl.float32)
        as_rows = tl.zeros([BM, C], tl.float32)
        as_columns = tl.zeros([BM, C], tl.float32)
        for e0 in range(0, E, BX):
            e = e0 + tl.arange(0, BX)
            products += dot(load(k, ks, r, e, left, E), load_t(k, ks, e, c, left, E))
            as_rows += dot(load(d_sides, ss, r, e, left, E), load_t(corrections, ss, e, c, left, E))
            as_columns += dot(load(corrections, ss, r, e, left, E), load_t(d_sides, ss, e, c, left, E))
        as_rows *= -tl.where(r[:, None] > c[None, :], between(sums, r[:, None], c[None, :], C), 0.0)
        as_columns *= -tl.where(c[None, :] > r[:, None], between(sums, c[None, :], r[:, None], C), 0.0)
        of_strength = tl.sum(as_rows * products, 1)
        as_rows *= strength[:, None]
        # d log Γ_ij spreads over steps j + 1 … i: summed over the j before a step, then over the i from it on.
        before = (c[:, None] < c[None, :]).to(tl.float32)
        d_steps = dot(as_rows * products, before)
        d_products = as_rows + as_columns * load_vector(beta, bs, c, left)[None, :]
        since = since_start(sums, r, C)
        of_since = tl.zeros([BM], tl.float32)
        for x0 in range(0, E, BE):
            x = x0 + tl.arange(0, BE)
            recalled = tl.zeros([BM, BE], tl.float32)
            d_keys = tl.zeros([BM, BE], tl.float32)
            for e0 in range(0, E, BX):
                e = e0 + tl.arange(0, BX)
                recalled += dot(load(k, ks, r, e, left, E), matrix(states, e, x, E, 1, E))
                d_keys += dot(load(d_sides, ss, r, e, left, E), matrix(states, e, x, 1, E, E))
            recalled *= since[:, None]
            d_side = load(d_sides, ss, r, x, left, E)
            of_strength += tl.sum(d_side * (load(v, vs, r, x, left, E) - recalled), 1)
            d_side *= strength[:, None]
            of_since -= tl.sum(d_side * recalled, 1)
            store(d_v, dvs, r, x, d_side, left, E)
            d_keys = load(d_k, dks, r, x, left, E) - (strength * since)[:, None] * d_keys
            store(d_k, dks, r, x, d_keys + dot(d_products, load(k, ks, c, x, left, E)), left, E)
        tl.store(d_beta + r * dbs[2], of_strength, r < left)
        d_steps = tl.sum(tl.where(r[:, None] >= c[None, :], d_steps + of_since[:, None], 0.0), 0)
        tl.store(parts + (chunk * (3 * (C // BM)) + 2 * (C // BM) + tile) * C + c, d_steps)
