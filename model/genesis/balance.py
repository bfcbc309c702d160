"""GradNorm (Chen et al. 2018, arXiv 1711.02257): weights of several losses from how fast each one falls.

    G_i = w_i · ‖∂L_i/∂W‖,  r_i = (L_i / L_i(0)) / mean,  L_grad = Σ |G_i − mean(G) · r_i^α|,  target held constant
    w_i ← w_i − lr · ∂L_grad/∂w_i = w_i − lr · sign(G_i − mean(G) · r_i^α) · ‖∂L_i/∂W‖,  then Σ w_i = n again

A loss that falls more slowly than the others (r > 1) gets a larger share of the gradient (seed 000, section 7). W are
the weights that all losses share; the norms are measured there, without the weights w.

Static shapes and no host synchronisation.
"""

import torch
from torch import Tensor, nn

LEAST_WEIGHT = 1e-3  # a loss whose weight reached 0 would never come back


class GradNorm(nn.Module):
    """The weights of n losses.

    Args:
        n: losses.
        alpha: α ≥ 0, the pull towards equal training rates; 0 makes the gradients equally large.
        lr: of the weights.

    Attributes:
        weights: w [n] float32, Σ = n.
        initial: L_i(0) [n], the first finite positive value of each loss; 0 before.
    """

    def __init__(self, n: int, *, alpha: float = 1.5, lr: float = 0.025, device: torch.device | str | None = None):
        super().__init__()
        for name, value, good, accepted in (
            ("n", n, isinstance(n, int) and n >= 1, "an integer ≥ 1"),
            ("alpha", alpha, alpha >= 0, "a number ≥ 0"),
            ("lr", lr, lr >= 0, "a number ≥ 0"),
        ):
            if not good:
                raise ValueError(f"{name}={value!r}: accepted is {accepted}")
        self.alpha, self.lr = alpha, lr
        self.register_buffer("weights", torch.ones(n, device=device))
        self.register_buffer("initial", torch.zeros(n, device=device))

    @torch.no_grad()
    def update(self, losses: Tensor, grad_norms: Tensor) -> None:
        """One step of the weights.

        A loss that is absent (0, as replay is while nothing is stored) keeps its weight and does not count; values
        that are not finite are taken as absent.

        Args:
            losses: L [n], unweighted.
            grad_norms: ‖∂L_i/∂W‖ [n], unweighted.

        Raises:
            ValueError: for other shapes.
        """
        n = self.weights.shape
        if losses.shape != n or grad_norms.shape != n:
            raise ValueError(
                f"losses {tuple(losses.shape)} and grad_norms {tuple(grad_norms.shape)}: accepted is {tuple(n)}"
            )
        losses, norms = losses.detach().float(), grad_norms.detach().float()
        active = losses.isfinite() & norms.isfinite() & (losses > 0)
        # Absent entries become harmless numbers: 0 times what is not finite is not finite.
        losses, norms = torch.where(active, losses, 1), torch.where(active, norms, 0)
        self.initial.copy_(torch.where(active & (self.initial == 0), losses, self.initial))
        ratio = torch.where(active, losses / torch.where(active, self.initial, 1), 0)
        present = active.sum().clamp_min(1)
        rate = ratio / (ratio.sum() / present).clamp_min(torch.finfo(torch.float32).tiny)
        size = self.weights * norms
        target = size.sum() / present * rate.pow(self.alpha)
        moved = self.weights - self.lr * torch.sign(size - target) * norms
        moved = torch.where(active, moved.clamp_min(LEAST_WEIGHT), 0)
        room = torch.where(active, self.weights, 0).sum()  # what the present ones share: n, less the absent ones' part
        moved = moved * (room / moved.sum().clamp_min(LEAST_WEIGHT))
        self.weights.copy_(torch.where(active & moved.isfinite().all(), moved, self.weights))
