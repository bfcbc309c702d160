"""The learning rate over a run."""


def learning_rate(step: int, total: int, peak: float, warmup: float, decay: float) -> float:
    """Linear warm-up, a plateau, linear decay to zero (Hägele et al. 2024).

    Args:
        step: 0 … total − 1.
        total: steps of the run.
        peak: learning rate of the plateau.
        warmup, decay: shares of the run, each in [0, 1].
    """
    rising = (step + 1) / max(1.0, warmup * total)
    falling = (total - step) / max(1.0, decay * total)
    return peak * min(1.0, rising, falling)
