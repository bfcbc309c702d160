"""A random and a fresh tiny model for the tests of this folder."""

import pytest
import torch

from model import AGIFormer, AGIFormerConfig
from tests.conftest import TINY, make_random_model


@pytest.fixture(scope="session")
def random_model() -> AGIFormer:
    return make_random_model()


@pytest.fixture(scope="session")
def fresh_model() -> AGIFormer:
    """Zero output layers: every byte has probability 1/256."""
    return AGIFormer(AGIFormerConfig(**TINY)).eval()


@pytest.fixture(scope="session")
def text() -> bytes:
    """1000 bytes of all values, without structure."""
    return bytes(torch.randint(0, 256, (1000,), generator=torch.Generator().manual_seed(1)).tolist())
