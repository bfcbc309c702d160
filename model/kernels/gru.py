"""A gated recurrent unit over the few bytes of a patch, for all patches at once (Cho et al. 2014).

    x = table[byte] + conditioned,   y = W h + b              three parts each: reset, update, candidate
    r = σ(x_r + y_r),   u = σ(x_u + y_u),   c = tanh(x_c + r y_c),   h' = c + u (h − c)

Notable: a byte costs one matrix product each way and one kernel for all the rest, which is bound by memory. The kernels
look up the table themselves, so that what is looked up, the largest tensor of the model, is never written. Gates are
float32 inside and computed again in the backward pass. The gradients of table and biases are one product with the
one-hot bytes: PyTorch's own look-up sorts, and then adds up the many rows of a frequent byte one after the other.
"""

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from model.kernels.products import product
from model.kernels.transforms import apply, batched, check_impl, hooked

try:
    import triton
    import triton.language as tl
except ImportError:  # the PyTorch form does everywhere
    triton = None

ROWS, COLUMNS = 8, 128  # of a program; 8 elements a thread
TILES = 4  # of a program that also adds up gradients over rows: fewer partial sums
TYPES = (torch.float32, torch.bfloat16, torch.float16)


def gru_cell(inputs: Tensor, product: Tensor, hidden: Tensor) -> Tensor:
    """One step by PyTorch: inputs x [..., 3C], product y [..., 3C], hidden h [..., C] → the next hidden [..., C]."""
    reset_in, update_in, candidate_in = inputs.chunk(3, -1)
    reset, update, candidate = product.chunk(3, -1)
    reset = (reset_in + reset).sigmoid()
    update = (update_in + update).sigmoid()
    candidate = torch.tanh(candidate_in + reset * candidate)
    return torch.lerp(candidate, hidden.to(candidate.dtype), update)


def gru_patch(
    hidden: Tensor, conditioned: Tensor, table: Tensor, previous: Tensor, recurrent: nn.Linear, impl: str = "auto"
) -> Tensor:
    """The states of a GRU that reads P bytes of every patch.

    Args:
        hidden: [..., C], before the first byte.
        conditioned: [..., 3C], part of the inputs at every byte; its type is that of the arithmetic.
        table: [V, 3C], the inputs of each byte.
        previous: [..., P] of any integer type, in 0…V − 1, the bytes.
        recurrent: C → 3C with biases.
        impl: "torch" (any device), "triton" (CUDA, or Triton's interpreter), "auto" picks.

    Returns:
        [..., P, C], the hidden after each byte.
    """
    check_impl(impl, triton)
    if impl == "auto":
        impl = "triton" if triton is not None and _fits(hidden, conditioned, table, previous, recurrent) else "torch"
    if impl == "triton":
        *shape, P = previous.shape
        flat = (hidden.flatten(0, -2), conditioned.flatten(0, -2), previous.reshape(-1, P))
        states = apply(_GRUPatch, *(x.contiguous() for x in (*flat, table)), recurrent.weight, recurrent.bias)
        return states.view(*shape, P, hidden.shape[-1])
    # Cast the table, not what is gathered from it: that is the largest tensor of the model.
    inputs = F.embedding(previous.long(), table.to(conditioned.dtype)) + conditioned.unsqueeze(-2)
    states = []
    for x in inputs.unbind(-2):
        hidden = gru_cell(x, recurrent(hidden), hidden)
        states.append(hidden)
    return torch.stack(states, -2)


def _fits(hidden: Tensor, conditioned: Tensor, table: Tensor, previous: Tensor, recurrent: nn.Linear) -> bool:
    """Whether the kernels can do what the PyTorch form does."""
    if hooked(recurrent) or recurrent.bias is None or hidden.dim() < 2 or not previous.numel():
        return False
    # float64 is for references.
    if batched(hidden, conditioned, table, previous, recurrent.weight, recurrent.bias):
        return False
    return conditioned.is_cuda and hidden.dtype == conditioned.dtype and conditioned.dtype in TYPES


class _GRUPatch(torch.autograd.Function):
    """hidden [N, C], conditioned [N, 3C], previous [N, P], table [V, 3C], weight [3C, C], bias [3C] → [N, P, C]."""

    @staticmethod
    def forward(
        ctx, hidden: Tensor, conditioned: Tensor, previous: Tensor, table: Tensor, weight: Tensor, bias: Tensor
    ):
        (N, P), C, dtype = previous.shape, hidden.shape[1], conditioned.dtype
        entries, matrix = table.to(dtype), weight.to(dtype)
        products = torch.empty(P, N, 3 * C, dtype=dtype, device=hidden.device)
        states = torch.empty(N, P, C, dtype=dtype, device=hidden.device)
        before = hidden
        with torch.autocast(hidden.device.type, enabled=False):
            for step in range(P if N else 0):
                torch.mm(before, matrix.t(), out=products[step])
                launch_forward(
                    products[step], bias, conditioned, entries, previous, before, states[:, step], None, step
                )
                before = states[:, step]
        ctx.save_for_backward(hidden, conditioned, previous, entries, matrix, bias, products, states)
        ctx.dtypes = table.dtype, weight.dtype
        return states

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        hidden, conditioned, previous, entries, matrix, bias, products, states = ctx.saved_tensors
        (N, P), C, dtype = previous.shape, hidden.shape[1], conditioned.dtype
        grad = grad.to(dtype).contiguous()
        # Of the candidate's input, and of the product's three parts, of which two are the inputs' too: the gradient of
        # the inputs is the first three quarters, that of the product the last three.
        parts = torch.empty(P, N, 4 * C, dtype=dtype, device=grad.device)
        of_hidden, of_conditioned = torch.empty_like(hidden), torch.empty_like(conditioned)
        with torch.autocast(grad.device.type, enabled=False):
            for step in reversed(range(P if N else 0)):
                before = states[:, step - 1] if step else hidden
                launch_backward(
                    products[step], bias, conditioned, entries, previous, before, grad[:, step], None, None,
                    of_hidden, parts, of_conditioned, None, step,
                )  # fmt: skip
                of_hidden.addmm_(parts[step, :, C:], matrix)
            of_weight = of_table = of_bias = None
            if ctx.needs_input_grad[4]:
                of_weight = parts[0, :, C:].t().mm(hidden).to(ctx.dtypes[1])
                if P > 1:
                    # A product a byte: as many tiles of the result as a card has processors. Added up in float32.
                    each = parts[1:, :, C:].transpose(1, 2).bmm(states[:, :-1].transpose(0, 1))
                    of_weight = of_weight + each.sum(0, dtype=of_weight.dtype)
            if ctx.needs_input_grad[3] or ctx.needs_input_grad[5]:
                V = len(entries)
                # A last column of ones sums everything; rows of 16 bytes are what matrix products want.
                one_hot = torch.zeros(P * N, -(-(V + 1) // 8) * 8, dtype=dtype, device=grad.device)
                one_hot.scatter_(1, previous.t().reshape(-1, 1).long(), 1)
                one_hot[:, V] = 1
                sums = product(one_hot.t(), parts.view(P * N, 4 * C), torch.float32)
                of_table = sums[:V, : 3 * C].roll(-C, 1).to(ctx.dtypes[0])
                of_bias = sums[V, C:].to(bias.dtype)
        return of_hidden, of_conditioned, None, of_table, of_weight, of_bias


def launch_forward(product, bias, conditioned, table, previous, before, after, squares, step: int) -> None:
    """One byte forward: from product [N, 3C], conditioned [N, 3C] and `before` [N, C], of any row stride, to `after`.

    `squares` [N, ceil(C / COLUMNS)] float32 takes the sums of squares of parts of the new states, where it is given.
    """
    (N, P), C = previous.shape, before.shape[1]
    _gru_kernel[(triton.cdiv(N, ROWS) * triton.cdiv(C, COLUMNS),)](
        product, bias, conditioned, table, previous, before, after, squares, step,
        N, P, C, before.stride(0), after.stride(0), conditioned.stride(0), ROWS, COLUMNS,
    )  # fmt: skip


def launch_backward(
    product, bias, conditioned, table, previous, before, grad, slope, more, of_hidden, parts, of_conditioned, partial,
    step: int,
) -> None:  # fmt: skip
    """One byte backward: see `_gru_backward_kernel`. `grad` and `more` [N, C] are of the states after this byte;
    `partial` [programs(N), C] float32, where it is given, takes sums of the last quarter of parts[step]."""
    (N, P), C = previous.shape, before.shape[1]
    tiles = 1 if partial is None else TILES
    _gru_backward_kernel[(triton.cdiv(N, ROWS * tiles) * triton.cdiv(C, COLUMNS),)](
        product, bias, conditioned, table, previous, before, grad, slope, more, of_hidden, parts, of_conditioned,
        partial, step, N, P, C, before.stride(0), grad.stride(0), 0 if more is None else more.stride(0),
        conditioned.stride(0), of_conditioned.stride(0), step == 0, step == P - 1, ROWS, COLUMNS, tiles,
    )  # fmt: skip


def programs(N: int) -> int:
    """Rows of `partial` in `launch_backward`."""
    return triton.cdiv(N, ROWS * TILES)


if triton is not None:

    @triton.jit
    def _load(at, inside):
        return tl.load(at, inside, other=0.0).to(tl.float32)

    @triton.jit
    def _gates(product, bias, conditioned, table, row, byte, column, inside, C, stride):
        """→ reset, update, candidate and the product's part of the candidate's input, float32."""
        at = product + row * 3 * C + column
        extra = conditioned + row * stride + column
        entry = table + byte * 3 * C + column
        recurrent = _load(at, inside) + _load(bias + column, inside)
        reset = tl.sigmoid(recurrent + _load(extra, inside) + _load(entry, inside))
        recurrent = _load(at + C, inside) + _load(bias + C + column, inside)
        update = tl.sigmoid(recurrent + _load(extra + C, inside) + _load(entry + C, inside))
        recurrent = _load(at + 2 * C, inside) + _load(bias + 2 * C + column, inside)
        x = _load(extra + 2 * C, inside) + _load(entry + 2 * C, inside) + reset * recurrent
        return reset, update, 2.0 * tl.sigmoid(2.0 * x) - 1.0, recurrent  # tanh

    @triton.jit
    def _place(tile, previous, step, N, P, C, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
        """→ row [ROWS, 1] int64, its byte, column [1, COLUMNS], and which of all these are there."""
        tiles = tl.cdiv(C, COLUMNS)
        row = (tile.to(tl.int64) * ROWS + tl.arange(0, ROWS))[:, None]
        column = (tl.program_id(0) % tiles * COLUMNS + tl.arange(0, COLUMNS))[None, :]
        byte = tl.load(previous + row * P + step, row < N, other=0).to(tl.int32)
        return row, byte, column, (row < N) & (column < C)

    @triton.jit(do_not_specialize=["step", "N"])
    def _gru_kernel(
        product, bias, conditioned, table, previous, before, after, squares, step, N, P, C,
        before_stride, after_stride, stride, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    ):  # fmt: skip
        tiles = tl.cdiv(C, COLUMNS)
        row, byte, column, inside = _place(tl.program_id(0) // tiles, previous, step, N, P, C, ROWS, COLUMNS)
        hidden = _load(before + row * before_stride + column, inside)
        _, update, candidate, _ = _gates(product, bias, conditioned, table, row, byte, column, inside, C, stride)
        new = (candidate + update * (hidden - candidate)).to(after.dtype.element_ty)
        tl.store(after + row * after_stride + column, new, inside)
        if squares is not None:
            new = tl.where(inside, new.to(tl.float32), 0.0)
            at = squares + row * tiles + tl.program_id(0) % tiles
            tl.store(at, tl.sum(new * new, 1)[:, None], row < N)

    @triton.jit(do_not_specialize=["step", "N"])
    def _gru_backward_kernel(
        product, bias, conditioned, table, previous, before, grad, slope, more, of_hidden, parts, of_conditioned,
        partial, step, N, P, C, before_stride, grad_stride, more_stride, stride, of_stride,
        FIRST: tl.constexpr, LAST: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, TILES: tl.constexpr,
    ):  # fmt: skip
        """Writes parts[step], and to `of_hidden` what passes by the product; at the first step `of_conditioned`.

        The gradient of the state is `grad`, and where they are given slope [N] times the state, and `more`.
        """
        tiles = tl.cdiv(C, COLUMNS)
        kind = parts.dtype.element_ty
        rows = N.to(tl.int64)
        total = tl.zeros((ROWS, COLUMNS), tl.float32)
        column = (tl.program_id(0) % tiles * COLUMNS + tl.arange(0, COLUMNS))[None, :]
        for tile in range(TILES):
            row, byte, _, inside = _place(
                tl.program_id(0) // tiles * TILES + tile, previous, step, N, P, C, ROWS, COLUMNS
            )
            d = _load(grad + row * grad_stride + column, inside)
            if not LAST:
                d += _load(of_hidden + row * C + column, inside)
            hidden = _load(before + row * before_stride + column, inside)
            reset, update, candidate, y = _gates(
                product, bias, conditioned, table, row, byte, column, inside, C, stride
            )
            if slope is not None:
                new = (candidate + update * (hidden - candidate)).to(kind).to(tl.float32)
                d += _load(slope + row, row < N) * new
            if more is not None:
                d += _load(more + row * more_stride + column, inside)
            tl.store(of_hidden + row * C + column, (d * update).to(kind), inside)
            of_candidate = d * (1.0 - update) * (1.0 - candidate * candidate)
            of_reset = of_candidate * y * reset * (1.0 - reset)
            of_update = d * (hidden - candidate) * update * (1.0 - update)
            at = parts + (step * rows + row) * 4 * C + column
            tl.store(at, of_candidate.to(kind), inside)
            tl.store(at + C, of_reset.to(kind), inside)
            tl.store(at + 2 * C, of_update.to(kind), inside)
            tl.store(at + 3 * C, (of_candidate * reset).to(kind), inside)
            total += tl.where(inside, of_candidate * reset, 0.0)
            if FIRST:
                for _ in range(1, P):
                    at += rows * 4 * C
                    of_candidate += _load(at, inside)
                    of_reset += _load(at + C, inside)
                    of_update += _load(at + 2 * C, inside)
                at = of_conditioned + row * of_stride + column
                tl.store(at, of_reset.to(kind), inside)
                tl.store(at + C, of_update.to(kind), inside)
                tl.store(at + 2 * C, of_candidate.to(kind), inside)
        if partial is not None:
            tl.store(partial + tl.program_id(0) // tiles * C + column, tl.sum(total, 0)[None, :], column < C)
