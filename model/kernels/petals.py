"""A group of convex petals as one operation: two products a petal, squared ReLU, and the difference of two hulls.

    h_p = relu(A_p x + b_p)²,   o_p = h_p · [ max(B_p, 0)  max(−B_p, 0) ],   y = signed_hull(o, τ)

Notable: the products are PyTorch's, and half of the time; what is between them is passes over memory, of which this
takes no more than it must. Weights are converted once. Squared ReLU replaces its input: the root of a rounded square,
rounded, is the number that was squared (Boldo 2015), so that nothing is lost (but in float16, below 1e-3: such a square
has few bits left). Gradients of h are written by the product where the next one reads them, and one pass turns them
into those of A x + b, replaces them, and adds up those of b. Gradients of float32 weights come out of the products in
float32, not rounded to the products' type before. Products of our own (`OWN_PRODUCTS`) do what comes after them before
they write their results, which saves two of the passes.
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from model.kernels.elementwise import split_backward, split_forward, split_signs, square_, squared_relu
from model.kernels.hull import hull_backward, hull_forward, signed_hull
from model.kernels.products import HALF, product
from model.kernels.transforms import apply, batched, check_impl

try:
    import triton
    import triton.language as tl
except ImportError:  # the PyTorch form does everywhere
    triton = None
try:
    from triton.tools.tensor_descriptor import TensorDescriptor
except ImportError:  # only `OWN_PRODUCTS` wants it
    TensorDescriptor = None

ROWS, STEP, COLUMNS = 64, 4, 512  # of the pass over h: a program's positions, those of one tile, its hidden units
OWN_PRODUCTS = ""  # "forward", "backward", "both": which products towards h are ours, on cards with TMA and wgmma
TILE, DEPTH, STAGES, WARPS = (128, 256), 64, 3, 8  # of ours: positions and hidden units; terms; tiles of them in flight
BY_PETAL = False  # whether the gradient of B is a product for each petal, which libraries divide among more programs
Runs = list[tuple[int, int, bool]]


def petals(
    x: Tensor,
    up: Tensor,
    bias: Tensor,
    down: Tensor,
    tau: Tensor,
    runs: Runs | None = None,
    impl: str = "auto",
    onto: Tensor | None = None,
) -> Tensor:
    """x [N, D] → [N, D'], of x's type, or autocast's; with `onto` their sum.

    Args:
        up: A, [P, W, D].
        bias: b, [P, W].
        down: B, [P, W, D'].
        tau: τ > 0, of one element.
        runs: [start, stop, asleep) of neighbouring petals; those asleep take no gradient. Empty or None: all are awake.
        impl: "torch" (any device; one operation after the other, each in the form that it picks itself), "triton"
            (CUDA, or Triton's interpreter), "auto" picks.
        onto: [N, D'], that the result, rounded, is added to.
    """
    check_impl(impl, triton)
    kind = x.device.type
    autocast = torch.is_autocast_enabled(kind)
    dtype = torch.get_autocast_dtype(kind) if autocast else x.dtype
    if impl == "auto":
        tensors = (x, up, bias, down, tau) if onto is None else (x, up, bias, down, tau, onto)
        # float64 is for references: the kernels work in float32. Without autocast types that differ are an error.
        fits = x.is_cuda and x.numel() > 1 and down.numel() and not batched(*tensors)
        fits = fits and all(t.dtype != torch.float64 and (autocast or t.dtype == dtype) for t in (x, up, bias))
        fits = fits and (onto is None or onto.dtype != torch.float64)
        impl = "triton" if fits and triton is not None else "torch"
    if impl == "torch":
        y = signed_hull(petal_outputs(x, up, bias, down, runs), tau)
        return y if onto is None else onto + y
    awake = [(start, stop) for start, stop, asleep in runs or [(0, len(up), False)] if not asleep]
    return apply(_Petals, x, up, bias, down, tau, onto if onto is None else onto.contiguous(), awake, dtype)


def petal_outputs(x: Tensor, up: Tensor, bias: Tensor, down: Tensor, runs: Runs | None = None) -> Tensor:
    """x [N, D] → o [P, N, 2D']: each petal's outputs of the rising hull, then of the falling one. By PyTorch."""
    if not runs:
        return _outputs(x, up, bias, down)
    parts = []
    for start, stop, asleep in runs:
        weights = [weight[start:stop] for weight in (up, bias, down)]
        parts.append(_outputs(x, *((weight.detach() for weight in weights) if asleep else weights)))
    return torch.cat(parts)


def _outputs(x: Tensor, up: Tensor, bias: Tensor, down: Tensor) -> Tensor:
    hidden = squared_relu(F.linear(x, up.flatten(0, 1), bias.flatten()))
    hidden = hidden.unflatten(-1, up.shape[:2]).transpose(0, 1)  # [P, N, W]
    return torch.bmm(hidden, split_signs(down, hidden.dtype))


class _Petals(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, up, bias, down, tau, onto, awake, dtype) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            low = x.to(dtype)
            first = up.to(dtype).flatten(0, 1)  # [PW, D]
            second = split_forward(down.contiguous(), dtype)  # [P, W, 2D']
            flat = bias.to(dtype).flatten()
            if _ours("forward", low.unsqueeze(0), first):
                hidden = _product(low.unsqueeze(0), first, bias=flat)[0]  # [N, PW]
            else:
                hidden = square_(torch.addmm(flat, low, first.t()))
            o = torch.bmm(_by_petal(hidden, up), second)
            y = hull_forward(o, tau, onto)
        ctx.save_for_backward(low, first, second, hidden, o, down, tau)
        ctx.awake, ctx.types = awake, (x.dtype, up.dtype, bias.dtype, None if onto is None else onto.dtype)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        low, first, second, hidden, o, down, tau = ctx.saved_tensors
        x_type, up_type, bias_type, onto_type = ctx.types
        of_x = of_up = of_bias = of_down = None
        awake = ctx.awake
        wants_x, wants_up, wants_bias, wants_down, _ = (
            wanted and (i in (0, 4) or bool(awake)) for i, wanted in enumerate(ctx.needs_input_grad[:5])
        )
        P, W = down.shape[:2]
        with torch.autocast(grad.device.type, enabled=False):
            grad_o, of_tau = hull_backward(o, tau, grad)
            if wants_down:
                parts = _by_petal(hidden, down)
                of_down = _awake(down, awake, lambda a, b: split_backward(
                    down[a:b].contiguous(), _of_split(parts[a:b], grad_o[a:b], down.dtype)))  # fmt: skip
            if wants_x or wants_up or wants_bias:
                if _ours("backward", grad_o, second.flatten(0, 1)):
                    of_hidden, sums = _product(grad_o, second.flatten(0, 1), hidden=hidden)
                else:
                    of_hidden = torch.empty_like(hidden)
                    torch.bmm(grad_o, second.transpose(1, 2), out=_by_petal(of_hidden, down))
                    sums = _square_backward_(hidden, of_hidden)
                del grad_o
                sums = sums.view(P, W)
                if wants_bias:
                    of_bias = _awake(sums, awake, lambda a, b: sums[a:b]).to(bias_type)
                if wants_up:
                    of_up = _awake(first.view(P, W, -1), awake, lambda a, b: product(
                        of_hidden[:, a * W : b * W].t(), low, up_type).view(b - a, W, -1), up_type)  # fmt: skip
                if wants_x:
                    of_x = torch.mm(of_hidden, first).to(x_type)
        of_onto = None if onto_type is None or not ctx.needs_input_grad[5] else grad.to(onto_type)
        return of_x, of_up, of_bias, of_down, of_tau, of_onto, None, None


def _by_petal(hidden: Tensor, weight: Tensor) -> Tensor:
    """[N, PW] → [P, N, W], the same memory."""
    return hidden.view(hidden.shape[0], *weight.shape[:2]).transpose(0, 1)


def _of_split(hidden: Tensor, grad_o: Tensor, dtype: torch.dtype) -> Tensor:
    """The gradient [P, W, 2D'] of the split B, from h [P, N, W] and that of o [P, N, 2D']."""
    if BY_PETAL:
        return torch.stack([product(h.t(), g, dtype) for h, g in zip(hidden, grad_o)])
    return product(hidden.transpose(1, 2), grad_o, dtype)


def _awake(like: Tensor, awake: list[tuple[int, int]], part, dtype: torch.dtype | None = None) -> Tensor:
    """part(start, stop) of every run of petals that are awake, and zeros for the others."""
    if awake == [(0, len(like))]:
        return part(0, len(like))
    out = torch.zeros(like.shape, dtype=dtype or like.dtype, device=like.device)
    for a, b in awake:
        out[a:b] = part(a, b)
    return out


def _square_backward_(hidden: Tensor, grad: Tensor) -> Tensor:
    """Turn `grad`, of hidden = relu(z)² [N, C], into the gradient of z, in place → its column sums [C], float32."""
    N, columns = hidden.shape
    partial = torch.empty(-(-N // ROWS), columns, dtype=torch.float32, device=hidden.device)
    if grad.numel():
        grid = (partial.shape[0], triton.cdiv(columns, COLUMNS))
        _square_backward_kernel[grid](hidden, grad, partial, N, columns, ROWS, STEP, COLUMNS)
    return partial.sum(0)


def _ours(way: str, a: Tensor, b: Tensor) -> bool:
    """Whether a product [P, N, K] × [PW, K]ᵀ is ours: where its tiles are whole and TMA can read them."""
    if OWN_PRODUCTS not in (way, "both") or a.dtype not in HALF or a.shape[1] < TILE[0] or b.shape[1] % 8:
        return False
    fits = len(b) // len(a) % TILE[1] == 0 and not (a.data_ptr() | b.data_ptr()) % 16
    return fits and a.is_contiguous() and (not a.is_cuda or torch.cuda.get_device_capability(a.device)[0] == 9)


def _product(
    a: Tensor, b: Tensor, bias: Tensor | None = None, hidden: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    """a [P, N, K] × b [PW, K]ᵀ, petal by petal → [N, PW]: with a bias [PW] its squared ReLU, with h [N, PW], which is
    one, the gradient of what was squared, and the column sums of that [PW], float32."""
    (P, N, K), columns = a.shape, len(b)
    out = torch.empty(N, columns, dtype=a.dtype, device=a.device)
    tiles, partial = -(-N // TILE[0]), None
    if hidden is not None:
        partial = torch.empty(tiles, columns, dtype=torch.float32, device=a.device)
    programs = torch.cuda.get_device_properties(a.device).multi_processor_count if a.is_cuda else 2
    a_tiles = TensorDescriptor.from_tensor(a.view(P * N, K), [TILE[0], DEPTH])
    b_tiles = TensorDescriptor.from_tensor(b, [TILE[1], DEPTH])
    _product_kernel[(programs,)](
        a_tiles, b_tiles, bias, hidden, out, partial, N, columns, columns // P, K, programs, *TILE, DEPTH,
        num_stages=STAGES, num_warps=WARPS,
    )  # fmt: skip
    return out, None if partial is None else partial.sum(0)


if triton is not None:

    @triton.jit
    def _finish(total, row, column, bias_at, hidden_at, out_at, partial, N, columns: tl.constexpr):
        """What comes after a product, on a tile of it: squared ReLU, or its gradient and this one's column sums."""
        inside = (row < N)[:, None]
        at = row.to(tl.int64)[:, None] * columns + column[None, :]
        if bias_at is not None:
            total += tl.load(bias_at + column).to(tl.float32)[None, :]
            total = total.to(out_at.dtype.element_ty).to(tl.float32)  # whose square has it as its root
            total = tl.where(total < 0.0, 0.0, total)  # a NaN stays one
            total *= total
        if hidden_at is not None:
            hidden = tl.load(hidden_at + at, inside, other=0.0).to(tl.float32)
            root = tl.sqrt(hidden).to(hidden_at.dtype.element_ty).to(tl.float32)
            total = tl.where(hidden == 0.0, 0.0, 2.0 * root * total)
            tl.store(partial + column, tl.sum(total, 0))
        tl.store(out_at + at, total.to(out_at.dtype.element_ty), inside)

    @triton.jit
    def _product_kernel(
        a, b, bias_at, hidden_at, out_at, partial, N, columns: tl.constexpr, W: tl.constexpr, K: tl.constexpr,
        PROGRAMS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
    ):  # fmt: skip
        across: tl.constexpr = columns // COLUMNS
        for tile in tl.range(tl.program_id(0), tl.cdiv(N, ROWS) * across, PROGRAMS, flatten=True):
            first, begin = tile // across * ROWS, tile % across * COLUMNS
            total = tl.zeros([ROWS, COLUMNS], tl.float32)
            for k in range(0, K, DEPTH):
                # What follows a petal's last position is another's, and not written.
                total = tl.dot(a.load([begin // W * N + first, k]), b.load([begin, k]).T, total)
            # In halves: with all of it, numbers in flight spill out of the registers.
            halves = tl.permute(tl.reshape(total, (ROWS, 2, COLUMNS // 2)), (0, 2, 1))
            left, right = tl.split(halves)
            row, column = first + tl.arange(0, ROWS), begin + tl.arange(0, COLUMNS // 2)
            to = partial if partial is None else partial + tile // across * columns
            _finish(left, row, column, bias_at, hidden_at, out_at, to, N, columns)
            _finish(right, row, column + COLUMNS // 2, bias_at, hidden_at, out_at, to, N, columns)

    @triton.jit
    def _square_backward_kernel(
        hidden_at, grad_at, partial, N, columns, ROWS: tl.constexpr, STEP: tl.constexpr, COLUMNS: tl.constexpr
    ):
        first = tl.program_id(0).to(tl.int64) * ROWS
        column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
        total = tl.zeros([STEP, COLUMNS], tl.float32)
        for k in range(0, ROWS, STEP):
            row = first + k + tl.arange(0, STEP)
            inside = (row < N)[:, None] & (column < columns)[None, :]
            at = row[:, None] * columns + column[None, :]
            hidden = tl.load(hidden_at + at, inside, other=0.0).to(tl.float32)
            grad = tl.load(grad_at + at, inside, other=0.0).to(tl.float32)
            root = tl.sqrt(hidden).to(hidden_at.dtype.element_ty).to(tl.float32)
            # Not 0 · grad: where a unit is off, even an infinite gradient stops.
            grad = tl.where(hidden == 0.0, 0.0, 2.0 * root * grad)
            tl.store(grad_at + at, grad.to(grad_at.dtype.element_ty), inside)
            total += grad
        tl.store(partial + tl.program_id(0) * columns + column, tl.sum(total, 0), column < columns)
