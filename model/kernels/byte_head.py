"""The byte head over all patches as one operation: a GRU over a patch's bytes, and the logits of the byte after each.

    [a, x] = F latent + f,   h₀ = tanh a,   h_j = GRU(h_{j−1}, x + table[byte_j]),   logits_j = O h_j / rms(h_j) + b

Notable: no norm of the states is ever written. Its size is one number a byte, of sums of squares that the GRU's kernel
has at hand; the product with O is taken of the state itself and scaled afterwards, and backward the norm is two numbers
a byte: what scales the gradient of the product, and how much of the state itself is in that of the state. What the
latent gives, start and inputs, is one product each way. States are byte by byte in memory, [P, N, C], so that the
gradient of the recurrent weights is one product as well. The gradient of the table, whose column sums are those of the
biases, is a product with the one-hot bytes, as in `gru`.
"""

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from model.kernels import gru
from model.kernels.gru import TYPES, launch_backward, launch_forward
from model.kernels.products import product
from model.kernels.transforms import apply, batched, hooked

try:
    import triton
    import triton.language as tl
except ImportError:  # the layers one after the other do everywhere
    triton = None

ROWS, TILES = 8, 8  # bytes of a program's tile of logits; tiles of one that adds up the gradient of their bias


def fits(latents: Tensor, previous: Tensor, table: Tensor, layers: tuple[nn.Linear, ...]) -> bool:
    """Whether `byte_head` can do what the layers (initial, condition, recurrent, output) do one after the other."""
    if triton is None or not latents.is_cuda or not previous.numel() or any(hooked(layer) for layer in layers):
        return False
    weights = [table, *(x for layer in layers for x in (layer.weight, layer.bias))]
    if any(x is None for x in weights) or batched(latents, previous, *weights):
        return False
    dtype = type_of(latents)
    autocast = torch.is_autocast_enabled(latents.device.type)
    return dtype in TYPES and all(x.dtype in TYPES and (autocast or x.dtype == dtype) for x in (latents, *weights))


def type_of(latents: Tensor) -> torch.dtype:
    """The type of the arithmetic: autocast's, or the latents'."""
    kind = latents.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else latents.dtype


def byte_head(
    latents: Tensor,
    previous: Tensor,
    table: Tensor,
    layers: tuple[nn.Linear, ...],
    eps: float,
    states: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Logits of all bytes of all patches, by the kernels (CUDA, or Triton's interpreter).

    Args:
        latents: [..., D], normed.
        previous: [..., P] of any integer type, in 0…V − 1: the byte before each.
        table: [V, 3C], the GRU's inputs of each byte.
        layers: initial D → C, condition D → 3C, recurrent C → 3C, output C → W, all with biases.
        eps: of the norm of the states.
        states: whether the states are wanted too.

    Returns:
        (logits [..., P, W] float32, the states [..., P, C] of the arithmetic's type or None).
    """
    *shape, P = previous.shape
    weights = [x for layer in layers for x in (layer.weight, layer.bias)]
    flat = latents.flatten(0, -2), previous.reshape(-1, P).contiguous()
    logits, found = apply(_ByteHead, *flat, table, *weights, type_of(latents), eps, states)
    return logits.view(*shape, P, -1), found.view(*shape, P, -1) if states else None


class _ByteHead(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx, latents, previous, table, initial, initial_bias, condition, condition_bias, recurrent, recurrent_bias,
        output, output_bias, dtype, eps, wanted,
    ):  # fmt: skip
        (N, P), C, device = previous.shape, recurrent.shape[1], latents.device
        with torch.autocast(device.type, enabled=False):
            low, entries = latents.to(dtype), table.to(dtype).contiguous()
            first = torch.cat([initial, condition]).to(dtype)
            began = torch.addmm(torch.cat([initial_bias, condition_bias]).to(dtype), low, first.t())  # [N, 4C]
            matrix, last = recurrent.to(dtype), output.to(dtype)
            states = torch.empty(P + 1, N, C, dtype=dtype, device=device)
            torch.tanh(began[:, :C], out=states[0])
            products = torch.empty(P, N, 3 * C, dtype=dtype, device=device)
            squares = torch.empty(P, N, triton.cdiv(C, gru.COLUMNS), dtype=torch.float32, device=device)
            for j in range(P if N else 0):
                torch.mm(states[j], matrix.t(), out=products[j])
                launch_forward(
                    products[j], recurrent_bias, began[:, C:], entries, previous, states[j], states[j + 1], squares[j],
                    j,
                )  # fmt: skip
            y = states[1:].view(P * N, C).mm(last.t())
            logits = torch.empty(N, P, len(output), dtype=torch.float32, device=device)
            if logits.numel():
                _logits_kernel[(triton.cdiv(P * N, ROWS),)](
                    y, squares, output_bias, logits, eps, N, P, C, *_widths(output, squares), ROWS
                )
        ctx.save_for_backward(
            low, previous, entries, first, began, matrix, recurrent_bias, states, products, last, y, squares
        )
        ctx.eps, ctx.types = eps, (latents.dtype, table.dtype, initial.dtype)
        ctx.materialize_grads = False  # as a plain attribute: `apply` runs this without autograd's context too
        return logits, states[1:].transpose(0, 1).reshape(N, P, C) if wanted else None

    @staticmethod
    @once_differentiable
    def backward(ctx, of_logits, of_states):
        low, previous, entries, first, began, matrix, bias, states, products, last, y, squares = ctx.saved_tensors
        (N, P), C, dtype, device = previous.shape, matrix.shape[1], low.dtype, low.device
        latents_type, table_type, weight_type = ctx.types
        if of_logits is None:
            of_logits = torch.zeros(N, P, len(last), device=device)
        of_logits, of_states = (None if x is None else x.contiguous() for x in (of_logits, of_states))
        empty = {"dtype": torch.float32, "device": device}
        sums = torch.zeros(triton.cdiv(P * N, ROWS * TILES), len(last), **empty)
        slope, of_y = torch.empty(P, N, **empty), torch.empty_like(y)
        with torch.autocast(device.type, enabled=False):
            if y.numel():
                _logits_backward_kernel[(len(sums),)](
                    of_logits, y, squares, of_y, slope, sums, ctx.eps, N, P, C, *_widths(last, squares), ROWS, TILES
                )
            flat = states[1:].view(P * N, C)
            of_output = product(of_y.t(), flat, weight_type)
            of_output_bias = sums.sum(0).to(weight_type)
            if not any(ctx.needs_input_grad[:9]):
                return (None,) * 9 + (of_output, of_output_bias, None, None, None)
            grad = of_y.mm(last).view(P, N, C)
            # Of the candidate's input, and of the product's three parts, of which two are the inputs' too: the gradient
            # of the inputs is the first three quarters, that of the product the last three.
            parts = torch.empty(P, N, 4 * C, dtype=dtype, device=device)
            of_hidden, of_began = torch.empty(N, C, dtype=dtype, device=device), torch.empty_like(began)
            partial = torch.zeros(P, gru.programs(N), C, **empty)
            for j in reversed(range(P if N else 0)):
                launch_backward(
                    products[j], bias, began[:, C:], entries, previous, states[j], grad[j], slope[j],
                    None if of_states is None else of_states[:, j], of_hidden, parts, of_began[:, C:], partial[j], j,
                )  # fmt: skip
                of_hidden.addmm_(parts[j, :, C:], matrix)
            starts = torch.zeros(triton.cdiv(N, ROWS * TILES), C, **empty)
            if starts.numel():
                _tanh_backward_kernel[(len(starts), triton.cdiv(C, gru.COLUMNS))](
                    of_hidden, states[0], of_began, starts, N, C, of_began.stride(0), ROWS, gru.COLUMNS, TILES
                )
            of_latents = of_began.mm(first).to(latents_type)
            of_first = product(of_began.t(), low, weight_type)
            flat = parts.view(P * N, 4 * C)
            of_recurrent = product(flat[:, C:].t(), states[:-1].view(P * N, C), weight_type)
            sums = sums_by_byte(flat[:, : 3 * C], previous, len(entries))
            sums = sums.roll(-C, 1)  # reset, update, candidate
            of_condition_bias = sums.sum(0)
            of_bias = torch.cat([of_condition_bias[: 2 * C], partial.view(-1, C).sum(0)])
            of_initial_bias = starts.sum(0)
        biases = (x.to(weight_type) for x in (of_initial_bias, of_condition_bias, of_bias))
        of_initial_bias, of_condition_bias, of_bias = biases
        return (
            of_latents, None, sums.to(table_type), of_first[:C], of_initial_bias, of_first[C:], of_condition_bias,
            of_recurrent, of_bias, of_output, of_output_bias, None, None, None,
        )  # fmt: skip


def _widths(output: Tensor, squares: Tensor) -> tuple[int, int, int, int]:
    """(logits of a byte, parts of a state's sum of squares), and the powers of two that hold them."""
    sizes = len(output), squares.shape[-1]
    return *sizes, *(triton.next_power_of_2(size) for size in sizes)


def sums_by_byte(rows: Tensor, previous: Tensor, V: int) -> Tensor:
    """rows [P · N, W] of bytes previous [N, P] → their sums for each of V bytes [V, W] float32."""
    one_hot = torch.zeros(len(rows), -(-V // 8) * 8, dtype=rows.dtype, device=rows.device)  # rows of 16 bytes at least
    one_hot.scatter_(1, previous.t().reshape(-1, 1).long(), 1)
    return product(one_hot.t(), rows, torch.float32)[:V]


if triton is not None:

    @triton.jit
    def _scale(squares, row, inside, eps, C, PARTS: tl.constexpr, BLOCK: tl.constexpr):
        """1 / rms of the states of `row` [ROWS]."""
        part = tl.arange(0, BLOCK)[None, :]
        sums = tl.load(squares + row[:, None] * PARTS + part, inside[:, None] & (part < PARTS), other=0.0)
        return tl.rsqrt(tl.sum(sums, 1) / C + eps)

    @triton.jit(do_not_specialize=["N"])
    def _logits_kernel(
        y_at, squares, bias_at, logits_at, eps, N, P, C,
        WIDTH: tl.constexpr, PARTS: tl.constexpr, BLOCK: tl.constexpr, PART: tl.constexpr, ROWS: tl.constexpr,
    ):  # fmt: skip
        """y [P, N, WIDTH] → logits [N, P, WIDTH]."""
        row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
        column = tl.arange(0, BLOCK)[None, :]
        inside = row < N.to(tl.int64) * P
        source = row % P * N + row // P
        scale = _scale(squares, source, inside, eps, C, PARTS, PART)[:, None]
        there = inside[:, None] & (column < WIDTH)
        y = tl.load(y_at + source[:, None] * WIDTH + column, there, other=0.0).to(tl.float32)
        bias = tl.load(bias_at + column, column < WIDTH, other=0.0).to(tl.float32)
        tl.store(logits_at + row[:, None] * WIDTH + column, (y * scale + bias).to(logits_at.dtype.element_ty), there)

    @triton.jit(do_not_specialize=["N"])
    def _logits_backward_kernel(
        of_logits, y_at, squares, of_y, slope, sums, eps, N, P, C,
        WIDTH: tl.constexpr, PARTS: tl.constexpr, BLOCK: tl.constexpr, PART: tl.constexpr,
        ROWS: tl.constexpr, TILES: tl.constexpr,
    ):  # fmt: skip
        """The gradient of y [P, N, WIDTH]; what times a state is the part of its gradient that passes by its size
        [P, N]; and sums of the logits' own gradients, one row a program."""
        column = tl.arange(0, BLOCK)[None, :]
        total = tl.zeros((ROWS, BLOCK), tl.float32)
        for tile in range(TILES):
            row = (tl.program_id(0).to(tl.int64) * TILES + tile) * ROWS + tl.arange(0, ROWS)
            inside = row < N.to(tl.int64) * P
            source = row % P * N + row // P
            scale = _scale(squares, source, inside, eps, C, PARTS, PART)
            there = inside[:, None] & (column < WIDTH)
            y = tl.load(y_at + source[:, None] * WIDTH + column, there, other=0.0).to(tl.float32)
            grad = tl.load(of_logits + row[:, None] * WIDTH + column, there, other=0.0).to(tl.float32)
            total += grad
            tl.store(of_y + source[:, None] * WIDTH + column, (grad * scale[:, None]).to(of_y.dtype.element_ty), there)
            # d scale = −scale³ h · dh / C
            tl.store(slope + source, -tl.sum(grad * y, 1) * (scale * scale * scale) / C, inside)
        column = tl.arange(0, BLOCK)
        tl.store(sums + tl.program_id(0) * WIDTH + column, tl.sum(total, 0), column < WIDTH)

    @triton.jit
    def _tanh_backward_kernel(
        grad_at, y_at, out, sums, N, C, stride, ROWS: tl.constexpr, COLUMNS: tl.constexpr, TILES: tl.constexpr
    ):  # fmt: skip
        """The gradient of what y [N, C] is the tanh of, into rows of any stride, and sums of it, one row a program."""
        column = (tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS))[None, :]
        total = tl.zeros((ROWS, COLUMNS), tl.float32)
        for tile in range(TILES):
            row = ((tl.program_id(0).to(tl.int64) * TILES + tile) * ROWS + tl.arange(0, ROWS))[:, None]
            inside = (row < N) & (column < C)
            y = tl.load(y_at + row * C + column, inside, other=0.0).to(tl.float32)
            grad = tl.load(grad_at + row * C + column, inside, other=0.0).to(tl.float32) * (1.0 - y * y)
            tl.store(out + row * stride + column, grad.to(out.dtype.element_ty), inside)
            total += grad
        tl.store(sums + tl.program_id(0) * C + column, tl.sum(total, 0)[None, :], column < C)
