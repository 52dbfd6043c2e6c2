"""`new`: what it leaves, and that a copy which fails leaves nothing."""

import json
import shutil

import pytest

from rgalign.commands import runs
from rgalign.run import artifacts


def test_a_new_folder_has_the_notebooks_without_outputs_the_params_and_the_docs(tmp_path):
    made = runs.make(tmp_path / "mine")
    notebooks = sorted((tmp_path / "mine" / "notebooks").glob("*.ipynb"))
    assert len(notebooks) == made > 10
    for path in notebooks:
        cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
        assert not any(cell.get("outputs") for cell in cells)
    assert (tmp_path / "mine" / "params" / "ablations" / "no_dpo.yaml").is_file()
    assert (tmp_path / "mine" / "docs" / "own-logs.md").is_file()


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
