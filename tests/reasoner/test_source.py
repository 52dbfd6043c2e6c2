"""Models taken as they are: named, not copied, the same when loaded again, and each prompted in its own way."""

from dataclasses import replace

import pytest
import small_models
import torch
from peft import PeftModel
from transformers import GPT2Config, GPT2LMHeadModel

from rgalign.data.tables import Dataset
from rgalign.params_schema import OtherModel, Params
from rgalign.params_schema import Reasoner as ReasonerSettings
from rgalign.reasoner import build, model
from rgalign.reasoner.embed import embed
from rgalign.reasoner.model import ReasonerError, fingerprint, load
from rgalign.shopworld import world

SMALL = {"hidden": 16, "layers": 1, "heads": 2, "min_count": 1}


@pytest.fixture(scope="module")
def shop() -> Dataset:
    whole = world.generate(seed=11, sessions=300, users=200, distance=0.5, transcripts=120)
    return replace(whole, truth=None, sessions=whole.sessions.assign(split="train"))


@pytest.fixture
def folder(tmp_path):
    return small_models.qwen3(tmp_path / "qwen")


def recipe(main="tiny", others=(), **settings) -> build.Recipe:
    own = Params().reasoner.model_dump()
    own |= {"seed": 5, "tiny": SMALL, "pretraining": {**own["pretraining"], "epochs": 0.05}, "model": str(main)}
    others = [OtherModel(model=str(other), seed=6, tiny=SMALL).model_dump() for other in others]
    return build.Recipe(ReasonerSettings(**{**own, "others": others, **settings}))


def built(asked: build.Recipe, shop: Dataset, tmp_path):
    build.build_models(asked, shop, {"prompt"}, folder=tmp_path / "built", work=tmp_path / "work")
    return build.load_models(asked, tmp_path / "built")


def test_a_model_taken_as_it_is_is_named_and_not_copied(folder, shop, tmp_path):
    adapter = small_models.lora(tmp_path / "lora", folder, "qwen")
    main = built(recipe(folder, adapter=str(adapter), dtype="bfloat16"), shop, tmp_path)["main"]
    assert [path.name for path in (tmp_path / "built" / "main").iterdir()] == [model.SOURCE]
    assert fingerprint(main) == fingerprint(load(str(folder), adapter=str(adapter), dtype="bfloat16"))
    assert {weight.dtype for weight in main.model.parameters()} == {torch.bfloat16}


def test_it_is_loaded_again_as_it_was_asked_for(folder, tmp_path, monkeypatch):
    """Quantised weights need CUDA: here it is only seen that nothing of how they were asked for is lost."""
    asked = {"adapter": str(small_models.lora(tmp_path / "lora", folder, "qwen")), "kind": "causal"}
    asked |= {"dtype": "bfloat16", "quantize": "8bit"}
    model.name_source(tmp_path / "main", str(folder), **asked)
    found = []
    monkeypatch.setattr(model, "load", lambda **how: found.append(how) or load(str(folder)))
    model.load_saved(tmp_path / "main", device="cpu")
    assert found == [{"model": str(folder), **asked, "device": "cpu"}]


def test_weights_that_have_changed_since_are_refused(folder, shop, tmp_path):
    asked = recipe(folder)
    built(asked, shop, tmp_path)
    small_models.qwen3(folder, seed=1)
    with pytest.raises(ReasonerError, match="has changed since notebook 02 read it"):
        build.load_models(asked, tmp_path / "built")


@pytest.mark.parametrize("main_is_tiny", [True, False])
def test_each_model_is_prompted_in_the_layout_of_its_own_kind(folder, shop, tmp_path, main_is_tiny):
    models = ("tiny", folder) if main_is_tiny else (folder, "tiny")
    asked = recipe(models[0], others=models[1:])
    loaded = built(asked, shop, tmp_path)
    layouts = {name: asked.prompter(shop, reasoner).layout for name, reasoner in loaded.items()}
    ours, theirs = ("main", "other-1") if main_is_tiny else ("other-1", "main")
    assert (layouts[ours], layouts[theirs]) == ("compact", "lines")


def gpt2(folder):
    torch.manual_seed(0)
    size = {"n_embd": 32, "n_layer": 1, "n_head": 2, "n_positions": 64, "vocab_size": small_models.WORDS + 3}
    GPT2LMHeadModel(GPT2Config(**size)).save_pretrained(folder)
    small_models.tokenizer().save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"max_tokens": 60}, "max_tokens is 60.*the model can read 64 tokens at most: lower max_tokens to 40"),
        ({"max_tokens": 8}, "nothing is left for the session"),
    ],
)
def test_prompts_are_tried_before_anything_is_trained(shop, tmp_path, monkeypatch, settings, words):
    def trained(*_, **__):
        raise AssertionError("a model was trained first")

    monkeypatch.setattr(build, "pretrain", trained)
    asked = recipe("tiny", others=[gpt2(tmp_path / "gpt2")], **settings)
    with pytest.raises(ValueError, match=words):
        built(asked, shop, tmp_path)


def test_a_sequence_behind_the_last_position_is_one_clear_error(tmp_path):
    with pytest.raises(ValueError, match="a sequence has 65 tokens, the model 64 positions"):
        embed(load(str(gpt2(tmp_path / "gpt2"))), [[5] * 64, [5] * 65], progress=False)


def test_an_untrained_twin_of_an_adapted_model_is_the_plain_architecture(folder, tmp_path):
    adapter = small_models.lora(tmp_path / "lora", folder, "qwen")
    main = load(str(folder))
    wrapped = replace(main, model=PeftModel.from_pretrained(main.model, adapter))
    assert type(build.untrained(wrapped, seed=1).model) is type(load(str(folder)).model)
