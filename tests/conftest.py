"""Fixtures for all tests: tiny models whose every weight matters, one thread, and no cache but the test's own."""

import pytest
import torch

from model import AGIFormer, AGIFormerConfig

TINY = {
    "d_model": 32, "n_layers": 2, "n_heads": 2, "byte_dim": 16, "window": 8, "ffn_dim": 48, "reasoning_dim": 48,
    "head_dim": 32,
}  # fmt: skip


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    """Threads that share a few busy cores make tensors this small many times slower."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def make_random_model(seed: int = 5, **changes) -> AGIFormer:
    """A new model's residual branches and output are zero: here every matrix is drawn, so that all parts count."""
    model = AGIFormer(AGIFormerConfig(**(TINY | changes)))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=parameter.shape[1] ** -0.5, generator=generator)
        model.start.normal_(generator=generator)
    return model.eval()


@pytest.fixture(scope="session")
def tiny_model():
    """make(**config changes) → a model in eval mode whose matrices are all random; made once for equal changes."""
    made = {}

    def make(**changes) -> AGIFormer:
        key = tuple(sorted(changes.items()))
        if key not in made:
            made[key] = make_random_model(**changes)
        return made[key]

    return make
