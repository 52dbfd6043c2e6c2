"""Fixtures of the reasoner's tests."""

from dataclasses import replace

import pytest
import small_models

from rgalign.data.tables import Dataset
from rgalign.shopworld import world


@pytest.fixture
def folder(tmp_path):
    """A small Qwen3 model, as transformers itself saves it."""
    return small_models.qwen3(tmp_path / "qwen")


@pytest.fixture
def no_network(monkeypatch):
    """Whoever asks for the network fails."""
    small_models.forbid_network(monkeypatch)


@pytest.fixture(scope="module")
def shop() -> Dataset:
    """A small world with chats, all of whose sessions are train."""
    whole = world.generate(seed=11, sessions=300, users=200, distance=0.5, transcripts=120)
    return replace(whole, truth=None, sessions=whole.sessions.assign(split="train"))
