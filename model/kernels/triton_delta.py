"""The gated delta rule as Triton kernels: `model.kernels.chunked.chunked_delta` with the same contract.

With U the corrections that a chunk really writes, the delta rule is the Hebbian rule without a normaliser and with U
for V, and so most of it is `model.kernels.triton_hebbian`'s kernels. What is added finds U, per chunk::

    (I + A) U = β (V − decay · K M_in)     A = tril(β Γ ⊙ K Kᵀ, −1)     R = (I + A)⁻¹
    M_out = total · M_in + K_endᵀ U

Notable:

- R is found by forward substitution: in diagonal blocks of 16 row by row, then two blocks at a time,
  R₂₁ = −R₂₂ A₂₁ R₁₁. Its entries stay within [−1, 1] for keys of norm 1 and β, λ in [0, 1], whatever repeats.
- U = R β (V − decay · K M_in) and M_out go from chunk to chunk, in one kernel forward and one back. Keys are read once
  a chunk, for both products with them, and nothing of size E × E is made, however wide they are.
- Each of its programs carries 16 columns of M, transposed, in float32, so that what is merely remembered is not rounded
  by a product. A warp owns the same rows of M all along: products with keys have the warp as a third dimension
  (such a product is never wgmma, see triton_hebbian), what is read is summed over warps, what is written stays in them.
"""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from model.kernels.transforms import apply
from model.kernels.triton_hebbian import (
    AVAILABLE,
    STEP,
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
CARRIED = 16  # columns of M that one program carries
FEWEST, MOST = 4, 8  # warps of such a program: with fewer or more its registers spill
OWNED = 16  # rows of M that one of them owns at least


def triton_delta(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, beta: Tensor, state: State
) -> tuple[Tensor, State]:
    """`recurrent_delta` on the card, with gradients of all inputs.

    Args:
        q, k: [B, H, T, E] float32, T ≥ 1, E ≤ 256, of any strides.
        v: [B, H, T, V], V ≤ 128.
        log_decay, beta: [B, H, T]; log_decay ≤ 0, −inf erases; beta in [0, 1].
        state: (M [B, H, E, V], z [B, H, E]); z is handed through.

    Returns:
        out [B, H, T, V], laid out in memory as [B, T, H, V], and the state after step T.

    Raises:
        ValueError: without triton or CUDA, or for another dtype or a wider E or V.
    """
    check(q, v)
    out, M = apply(_TritonDelta, q, k, v, log_decay, beta, state[0])
    return out, (M, state[1])


class _TritonDelta(torch.autograd.Function):
    """States are [chunks, E · V], inverses (R) [chunks, C, C], corrections (U) [B, H, T, V]."""

    @staticmethod
    def forward(ctx, q, k, v, log_decay, beta, M):
        s = Shape(q, v)
        q, k, v, M = readable(q), readable(k), readable(v), M.contiguous()
        sums = running_sums(log_decay, s)
        inverse = _inverse(k, beta, sums, s)
        states, corrections = q.new_empty(s.chunks, s.E * s.V), q.new_empty(v.shape)
        M_out = _chain(states, k, v, corrections, corrections, beta, sums, inverse, M, s, reverse=False)
        out = heads_last(v)
        outputs_kernel[(s.chunks * s.blocks * s.across,)](
            q, q.stride(), k, k.stride(), corrections, corrections.stride(), sums, states, out, out.stride(), sums,
            *s.sizes(), s.rows, s.columns, STEP, False, 0.0, **s.launch,
        )  # fmt: skip
        ctx.save_for_backward(q, k, v, beta, sums, inverse, states, corrections)
        return out, M_out

    @staticmethod
    @once_differentiable
    def backward(ctx, d_out, d_M):
        q, k, v, beta, sums, inverse, states, corrections = ctx.saved_tensors
        s = Shape(q, v)
        d_out = readable(d_out)
        # What the outputs of a chunk add to the gradients of its corrections and of the state before it; from that,
        # chunk by chunk, all of those of its corrections, of the system's right side and of the state after it.
        d_corrections, d_sides = torch.empty_like(corrections), torch.empty_like(corrections)
        d_states = torch.empty_like(states)
        inner_corrections_gradient_kernel[(s.chunks * s.blocks * s.across,)](
            q, q.stride(), k, k.stride(), d_out, d_out.stride(), sums, d_corrections, d_corrections.stride(),
            *s.sizes(), s.rows, s.columns, STEP, **s.launch,
        )  # fmt: skip
        reads_gradient_kernel[(s.chunks * s.squares,)](
            q, q.stride(), d_out, d_out.stride(), d_out, d_out.stride(), sums, sums, sums, d_states,
            *s.sizes(), s.state_rows, s.columns, s.steps, STEP, False, **s.launch,
        )  # fmt: skip
        d_M = _chain(
            d_states, k, d_corrections, d_corrections, d_sides, beta, sums, inverse, d_M.contiguous(), s, reverse=True
        )

        d_q, d_k, d_v = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
        d_beta = torch.empty_like(beta)
        parts = q.new_empty(s.chunks, 3 * s.blocks, s.C)
        inner_gradients(
            q, k, corrections, d_out, sums, states, d_states, sums, sums, d_q, d_k, d_corrections, parts, s, False
        )
        system_gradient_kernel[(s.chunks * s.blocks,)](
            k, k.stride(), v, v.stride(), beta, beta.stride(), sums, states, corrections, d_sides, d_sides.stride(),
            d_k, d_k.stride(), d_v, d_v.stride(), d_beta, d_beta.stride(), parts,
            *s.sizes(), s.rows, s.key_columns, s.columns, STEP, **s.key_launch,
        )  # fmt: skip
        return d_q, d_k, d_v, decay_gradient(parts, s), d_beta, d_M


def _inverse(k: Tensor, beta: Tensor, sums: Tensor, s: Shape) -> Tensor:
    """(I + A)⁻¹ [chunks, C, C] of every chunk."""
    inverse = k.new_empty(s.chunks, s.C, s.C)
    system_kernel[(s.chunks * s.blocks,)](
        k, k.stride(), beta, beta.stride(), sums, inverse, *s.sizes(), s.rows, STEP, **s.key_launch
    )
    invert_kernel[(s.chunks * (s.C // BLOCK),)](inverse, s.C, BLOCK, num_warps=1)
    size = BLOCK
    while size < s.C:
        merge_kernel[(s.chunks * (s.C // (2 * size)),)](inverse, s.C, size, num_warps=size // 16)
        size *= 2
    return inverse


def _chain(states, k, given, whole, solved, beta, sums, inverse, M, s: Shape, reverse: bool) -> Tensor:
    """Write the states before each chunk and U, from v (or gradients: see the kernel); the last state is returned."""
    M_out = torch.empty_like(M)
    warps = min(max(FEWEST, s.width // OWNED), MOST)
    chain_kernel[(s.B * s.H * -(-s.V // CARRIED),)](
        states, k, k.stride(), given, given.stride(), whole, solved, solved.stride(), beta, beta.stride(),
        sums, inverse, M, M_out, *s.sizes(), max(OWNED, s.width // warps), CARRIED, warps, reverse, num_warps=warps,
    )  # fmt: skip
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
        reads_gradient_kernel,
        since_start,
        store,
    )

    @triton.jit
    def system_kernel(
        k, ks, beta, bs, sums, system,
        H, N, T, E: tl.constexpr, V: tl.constexpr, C: tl.constexpr,
        BM: tl.constexpr, BX: tl.constexpr,
    ):  # fmt: skip
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
    def chain_kernel(
        states, k, ks, given, vs, whole, solved, us, beta, bs, sums, inverse, M, M_out,
        H, N, T, E: tl.constexpr, V: tl.constexpr, C: tl.constexpr,
        BE: tl.constexpr, BV: tl.constexpr, WARPS: tl.constexpr, REVERSE: tl.constexpr,
    ):  # fmt: skip
        """U = R β (V − decay · K M), M ← total M + K_endᵀ U over chunks; every M and U is stored.

        Back: dU = (given, by the chunk's outputs) + K_end dM, stored as `whole`, Y = Rᵀ dU, stored as `solved`, and
        dM ← total dM + (by the chunk's outputs, in the place of dM) − Kᵀ (decay β Y).
        """
        TILES: tl.constexpr = (V + BV - 1) // BV
        bh = (tl.program_id(0) // TILES).to(tl.int64)
        b, h = bh // H, bh % H
        x, c = tl.program_id(0) % TILES * BV + tl.arange(0, BV), tl.arange(0, C)
        # Three dimensions: warp; column of M, or step; row of M that the warp owns.
        e = tl.arange(0, WARPS)[:, None, None] * BE + tl.arange(0, BE)[None, None, :]
        here = e * V + x[None, :, None]
        inside = (e < E) & (x[None, :, None] < V)
        row, column = 1, C
        if REVERSE:
            row, column = C, 1
        state = tl.load(M + bh * E * V + here, inside, other=0.0)
        for step in range(0, N):
            n = step
            if REVERSE:
                n = N - 1 - step
            chunk, first = bh * N + n, (n * C).to(tl.int64)
            left = T - n * C
            keys = tl.load(
                at(k, ks, b, h, first) + c[None, :, None] * ks[2] + e, (c[None, :, None] < left) & (e < E), other=0.0
            )
            R = matrix(inverse + chunk * C * C, c, c, row, column, C, C)
            values = load_t(at(given, vs, b, h, first), vs, x, c, left, V)
            sums_here = sums + chunk * 3 * C
            since, at_end = since_start(sums_here, c, C)[None, :], between(sums_here, C - 1, c, C)[None, :]
            strength = load_vector(at(beta, bs, b, h, first), bs, c, left)[None, :]
            place_of_state = states + chunk * E * V + here
            after = since_start(sums_here, C - 1, C) * state
            if REVERSE:
                after += tl.load(place_of_state, inside, other=0.0)
            recalled = tl.sum(dot(state, tl.permute(keys, (0, 2, 1))), 0)
            # All threads have read what was in the places of outputs before one stores there: the sum over warps, and
            # the product after it, see to it.
            there = x[:, None] + c[None, :] * us[2]
            written = (x[:, None] < V) & (c[None, :] < left)
            if REVERSE:
                side = values + recalled * at_end
                tl.store(at(whole, us, b, h, first) + there, side, written)
            else:
                side = strength * (values - recalled * since)
            result = dot(side, R)
            tl.store(at(solved, us, b, h, first) + there, result, written)
            tl.store(place_of_state, state, inside)
            if REVERSE:
                result *= -strength * since
            else:
                result *= at_end
            state = after + dot(tl.broadcast_to(result[None, :, :], (WARPS, BV, C)), keys)
        tl.store(M_out + bh * E * V + here, state, inside)

    @triton.jit
    def inner_corrections_gradient_kernel(
        q, qs, k, ks, d_out, ds, sums, d_corrections, us,
        H, N, T, E: tl.constexpr, V: tl.constexpr, C: tl.constexpr,
        BM: tl.constexpr, BV: tl.constexpr, BX: tl.constexpr,
    ):  # fmt: skip
        """Rows of scoresᵀ d_out: U's gradient by the reads of its own chunk."""
        ACROSS: tl.constexpr = (V + BV - 1) // BV
        tile, chunk, b, h, first, left = place(H, N, T, C, C // BM * ACROSS)
        j, i, x = tile // ACROSS * BM + tl.arange(0, BM), tl.arange(0, C), tile % ACROSS * BV + tl.arange(0, BV)
        q, k, d_out = at(q, qs, b, h, first), at(k, ks, b, h, first), at(d_out, ds, b, h, first)
        scores = tl.zeros([BM, C], tl.float32)
        for e0 in range(0, E, BX):
            e = e0 + tl.arange(0, BX)
            scores += dot(load(k, ks, j, e, left, E), load_t(q, qs, e, i, left, E))
        scores *= between(sums + chunk * 3 * C, i[None, :], j[:, None], C)
        result = dot(scores, load(d_out, ds, i, x, left, V))
        store(at(d_corrections, us, b, h, first), us, j, x, result, left, V)

    @triton.jit
    def system_gradient_kernel(
        k, ks, v, vs, beta, bs, sums, states, corrections, d_sides, ss, d_k, dks, d_v, dvs, d_beta, dbs, parts,
        H, N, T, E: tl.constexpr, V: tl.constexpr, C: tl.constexpr,
        BM: tl.constexpr, BE: tl.constexpr, BV: tl.constexpr, BX: tl.constexpr,
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
        states += chunk * E * V
        strength, since = load_vector(beta, bs, r, left), since_start(sums, r, C)
        of_strength = tl.zeros([BM], tl.float32)
        of_since = tl.zeros([BM], tl.float32)
        for x0 in range(0, V, BV):
            x = x0 + tl.arange(0, BV)
            recalled = tl.zeros([BM, BV], tl.float32)
            for e0 in range(0, E, BX):
                e = e0 + tl.arange(0, BX)
                recalled += dot(load(k, ks, r, e, left, E), matrix(states, e, x, V, 1, E, V))
            recalled *= since[:, None]
            d_side = load(d_sides, ss, r, x, left, V)
            of_strength += tl.sum(d_side * (load(v, vs, r, x, left, V) - recalled), 1)
            d_side *= strength[:, None]
            of_since -= tl.sum(d_side * recalled, 1)
            store(d_v, dvs, r, x, d_side, left, V)
        # −dA with these rows as its rows, and −dAᵀ with these rows as its columns
        products = tl.zeros([BM, C], tl.float32)
        for e0 in range(0, E, BX):
            e = e0 + tl.arange(0, BX)
            products += dot(load(k, ks, r, e, left, E), load_t(k, ks, e, c, left, E))
        as_rows = tl.zeros([BM, C], tl.float32)
        as_columns = tl.zeros([BM, C], tl.float32)
        for x0 in range(0, V, BX):
            x = x0 + tl.arange(0, BX)
            as_rows += dot(load(d_sides, ss, r, x, left, V), load_t(corrections, ss, x, c, left, V))
            as_columns += dot(load(corrections, ss, r, x, left, V), load_t(d_sides, ss, x, c, left, V))
        as_rows *= -tl.where(r[:, None] > c[None, :], between(sums, r[:, None], c[None, :], C), 0.0)
        as_columns *= -tl.where(c[None, :] > r[:, None], between(sums, c[None, :], r[:, None], C), 0.0)
        of_strength += tl.sum(as_rows * products, 1)
        as_rows *= strength[:, None]
        # d log Γ_ij spreads over steps j + 1 … i: summed over the j before a step, then over the i from it on.
        before = (c[:, None] < c[None, :]).to(tl.float32)
        d_steps = dot(as_rows * products, before)
        d_products = as_rows + as_columns * load_vector(beta, bs, c, left)[None, :]
        for e0 in range(0, E, BE):
            e = e0 + tl.arange(0, BE)
            d_keys = tl.zeros([BM, BE], tl.float32)
            for x0 in range(0, V, BX):
                x = x0 + tl.arange(0, BX)
                d_keys += dot(load(d_sides, ss, r, x, left, V), matrix(states, x, e, 1, V, V, E))
            d_keys = load(d_k, dks, r, e, left, E) - (strength * since)[:, None] * d_keys
            store(d_k, dks, r, e, d_keys + dot(d_products, load(k, ks, c, e, left, E)), left, E)
        tl.store(d_beta + r * dbs[2], of_strength, r < left)
        d_steps = tl.sum(tl.where(r[:, None] >= c[None, :], d_steps + of_since[:, None], 0.0), 0)
        tl.store(parts + (chunk * (3 * (C // BM)) + 2 * (C // BM) + tile) * C + c, d_steps)
