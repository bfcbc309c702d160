"""Fixtures for the data tests: everything stays in a temporary folder and off the network."""

import pytest


@pytest.fixture
def cache(tmp_path):
    """A cache folder of the test's own."""
    return tmp_path / "cache"


@pytest.fixture(autouse=True)
def offline(tmp_path, monkeypatch):
    """No test may touch the user's cache or the hub."""
    monkeypatch.setenv("AGIFORMER_CACHE", str(tmp_path / "default-cache"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hub"))
