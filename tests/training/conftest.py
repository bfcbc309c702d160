"""Fixtures for the training tests."""

import pytest

from model.genesis.surprise import RecurringSurprises

SURPRISES = 2**14


@pytest.fixture(scope="module", autouse=True)
def small_tables():
    """A memory of surprises is 32 MB, in every checkpoint of a run too; these tests' texts need a fraction of it."""
    before = RecurringSurprises.__init__.__defaults__
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RecurringSurprises.__init__, "__defaults__", (SURPRISES, *before[1:]))
        yield
