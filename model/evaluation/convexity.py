"""Is a function convex, and how far do a model's hulls reach? (seed 003: convexity audit, hull radius)"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from model.agiformer import AGIFormer
from model.layers.hull import HullLayer


@torch.no_grad()
def convexity_gap(
    fn: Callable[[Tensor], Tensor],
    dim: int,
    pairs: int = 1000,
    *,
    scale: float = 3.0,
    seed: int = 0,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
) -> float:
    """Jensen audit: the largest f(λx + (1 − λ)y) − λ f(x) − (1 − λ) f(y) over random pairs and random λ.

    A convex function has at most rounding error here; a positive gap is a proof of the contrary. Half of the pairs lie
    close together, where a small dent shows.

    Args:
        fn: [n, dim] → [n] or [n, outputs]; every output is audited by itself.
        dim: width of the input.
        pairs: how many.
        scale: standard deviation of the points.
        dtype: of the points; the function's parameters' if it is a module, else float64.

    Returns:
        The gap in units of each output's standard deviation over the points, the largest of all outputs. Rounding shows
        in it as the type's precision times mean over deviation.
    """
    for name, value in (("dim", dim), ("pairs", pairs)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"{name}={value!r}: accepted is an integer ≥ 1")
    if dtype is None:
        parameter = next(fn.parameters(), None) if isinstance(fn, nn.Module) else None
        dtype = torch.float64 if parameter is None else parameter.dtype
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    x = draw(pairs, dim) * scale
    far = draw(pairs, dim) * scale
    y = torch.where((torch.arange(pairs) % 2 == 0).unsqueeze(1), far, x + 0.1 * far)
    share = torch.rand(pairs, 1, generator=generator, dtype=torch.float64)
    between = share * x + (1 - share) * y
    values = [fn(point.to(device, dtype)).cpu().double().reshape(pairs, -1) for point in (between, x, y)]
    gap = values[0] - share * values[1] - (1 - share) * values[2]
    points = torch.cat(values)
    # A nearly constant output deviates by rounding: under a thousandth of its size it is not measured against itself.
    least = 1e-3 * points.square().mean(0).sqrt() + torch.finfo(torch.float64).tiny
    return (gap.amax(0) / torch.maximum(points.std(0), least)).max().item()


@torch.no_grad()
def hull_radii(model: AGIFormer, x: Tensor) -> dict[str, float]:
    """How far each hull's output reaches around its centre on bytes x [B, L]: {module path: radius}.

    The radius is the root mean square, over positions and channels, of the distance to the mean output. It grows while
    a layer finds its work and should come to rest after; a layer whose radius keeps growing is running away.
    """
    outputs: dict[str, Tensor] = {}
    hooks = []
    for name, module in model.named_modules():
        if isinstance(module, HullLayer):

            def keep(module, inputs, output, name=name):
                flat = output.float().flatten(0, -2)
                outputs[name] = (flat - flat.mean(0)).square().mean().sqrt()

            hooks.append(module.register_forward_hook(keep))
    training = model.training
    try:
        model.eval()(x)
    finally:
        model.train(training)
        for hook in hooks:
            hook.remove()
    return {name: value.item() for name, value in outputs.items()}
