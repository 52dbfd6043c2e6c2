"""`new`: what it leaves, and that a copy which fails leaves nothing."""

import shutil

import pytest

from rgalign.commands import runs
from rgalign.run import artifacts


def test_a_copy_that_fails_leaves_nothing_and_can_be_begun_again(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "copytree", full)
        with pytest.raises(OSError, match="No space left"):
            runs.make(tmp_path)
    assert not list(tmp_path.iterdir())
    assert runs.make(tmp_path)
    (tmp_path / "notebooks" / "mine.ipynb").write_text("{}")
    with pytest.raises(artifacts.ArtifactError, match="not empty"):
        runs.make(tmp_path)
    assert (tmp_path / "notebooks" / "mine.ipynb").read_text() == "{}"
