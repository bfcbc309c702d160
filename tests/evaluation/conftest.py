"""A tiny model with random weights for the tests of this folder."""

import pytest
import torch

from model import AGIFormer, AGIFormerConfig

TINY = AGIFormerConfig(
    d_model=32, n_layers=2, n_heads=2, byte_dim=16, window=8, ffn_dim=64, reasoning_dim=64, head_dim=32
)


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Tiny tensors: more threads only wait for each other on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def make_random_model(seed: int = 0) -> AGIFormer:
    """A fresh model starts with zero output layers: every matrix is drawn, so that every part has an effect."""
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        model = AGIFormer(TINY)
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=parameter.shape[1] ** -0.5)
    return model.eval()


@pytest.fixture(scope="session")
def random_model() -> AGIFormer:
    return make_random_model()


@pytest.fixture(scope="session")
def fresh_model() -> AGIFormer:
    """Zero output layers: every byte has probability 1/256."""
    return AGIFormer(TINY).eval()


@pytest.fixture(scope="session")
def text() -> bytes:
    """1000 bytes of all values, without structure."""
    return bytes(torch.randint(0, 256, (1000,), generator=torch.Generator().manual_seed(1)).tolist())
