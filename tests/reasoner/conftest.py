"""Fixtures of the reasoner's tests."""

import pytest
import small_models


@pytest.fixture
def folder(tmp_path):
    """A small Qwen3 model, as transformers itself saves it."""
    return small_models.qwen3(tmp_path / "qwen")


@pytest.fixture
def no_network(monkeypatch):
    """Whoever asks for the network fails."""
    small_models.forbid_network(monkeypatch)
