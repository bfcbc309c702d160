"""Fixtures for the SGM tests."""

import pytest

from model.sgm.router import MemoryRouter


@pytest.fixture(scope="session")
def router(router_file) -> MemoryRouter:
    """A trained router."""
    return MemoryRouter.load(router_file)
