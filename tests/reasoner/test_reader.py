"""An encoder that reads texts beside the LLM that writes: whose vectors the match terms compare."""

import json

import numpy as np
import pytest
import small_models
from pydantic import ValidationError

from rgalign.params import load as load_params
from rgalign.params_schema import Params, Untrained
from rgalign.params_schema import Reasoner as ReasonerSettings
from rgalign.params_training import Ranker
from rgalign.ranker.match import TEXT, Compared
from rgalign.reasoner import build
from rgalign.reasoner.model import ReasonerError, load
from rgalign.reasoner.written import TextEmbedder
from rgalign.run import external_inputs

SMALL = {"hidden": 16, "layers": 1, "heads": 2, "min_count": 1}
READS = Ranker(match=("raw_cosine", "written_cosine"), written={"samples": 2})


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    folder = small_models.bert(tmp_path_factory.mktemp("encoder") / "small-encoder")
    modules = [{"path": "", "type": "a.Transformer"}, {"path": "1_Pooling", "type": "a.Pooling"}]
    (folder / "modules.json").write_text(json.dumps(modules))
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling/config.json").write_text(json.dumps({"pooling_mode": "mean"}))
    return folder


@pytest.fixture(scope="module")
def run(encoder, shop, tmp_path_factory):
    """(recipe, folder of models, models) of a tiny LLM with a reader; the LLM is 16 wide, the reader 32."""
    own = Params().reasoner.model_dump() | {"seed": 5, "tiny": SMALL, "reader": str(encoder)}
    own["pretraining"] = {**own["pretraining"], "epochs": 0.1}
    recipe, folder = build.Recipe(ReasonerSettings(**own)), tmp_path_factory.mktemp("run") / "reasoner"
    build.build_models(recipe, shop, {"prompt"}, folder=folder, work=folder.with_name("work"))
    return recipe, folder, build.load_models(recipe, folder)


def encoder_recipe(encoder):
    own = Params().reasoner.model_dump() | {"seed": 5, "kind": "encoder", "model": str(encoder)}
    return build.Recipe(ReasonerSettings(**own))


def test_it_is_named_and_is_none_of_the_llms(run, encoder):
    _, folder, models = run
    assert set(models) == {"main"}
    assert [path.name for path in (folder / "reader").iterdir()] == ["source.json"]
    assert json.loads((folder / "reader/source.json").read_text())["model"] == str(encoder)


def test_texts_have_its_vectors_and_prompts_those_of_the_llm(run, encoder, shop, tmp_path):
    recipe, _, models = run
    alone = {"main": load(str(encoder), kind="encoder")}  # as where it stands in the LLM's place
    ways = [build.embedding(TEXT, *own, shop) for own in ((recipe, models), (encoder_recipe(encoder), alone))]
    for number, frames in enumerate((shop.intents.head(3), shop.sessions.head(3))):
        found = [
            (way.sessions if number else way.intents)(frames, tmp_path / f"{place}-{number}").values
            for place, way in enumerate(ways)
        ]
        assert found[0].shape == (3, 32)
        assert np.array_equal(*found)
    prompts = build.embedding("prompt", recipe, models, shop)
    assert prompts.sessions(shop.sessions.head(3), tmp_path / "prompts").dim == 16


def test_written_queries_are_the_llms_and_their_vectors_the_readers(run, encoder, shop):
    recipe, _, models = run
    main = models["main"]
    found = build.written(recipe, main, shop, READS, shop.sessions.head(4), main, seed=0)
    assert set(found.queries["session_id"]) == set(shop.sessions["session_id"].head(4))
    reader = load(str(encoder), kind="encoder")
    embedder = TextEmbedder(reader, encoder_recipe(encoder).prompter(shop, reader))
    texts = found.vectors.ids.tolist()
    assert np.array_equal(found.vectors.values, embedder.vectors(texts).values)
    assert np.array_equal(found.intents.values, embedder.intents(shop.intents).values)
    assert found.intents.dim == 32


def test_the_raw_cosine_compares_the_text_columns_with_titles():
    compared = Compared(Untrained(), "reader", ["story"], {"story": "text"})
    assert compared.vector_sets == (TEXT, TEXT)
    assert compared.reads().loc["raw_cosine"].tolist() == ["story", "title"]
    asked = Untrained(raw_cosine={"session": "prompt"})  # the params refuse it beside a reader
    assert Compared(asked, "reader", ["story"], {"story": "text"}).reads().loc["raw_cosine", "of a session"] == "story"
    assert Compared(Untrained(), "causal", ["story"], {"story": "text"}).vector_sets == ("prompt", "prompt")


def test_a_run_says_in_its_inputs_which_reader_it_had(encoder):
    params = load_params("params/smoke.yaml", {"reasoner.reader": str(encoder)})
    assert external_inputs.models(params) == {f"model:{encoder}": external_inputs.content(encoder)}


def test_a_reader_that_is_not_there_or_is_no_encoder_is_refused_before_anything_is_trained(run, shop, folder, tmp_path):
    for name, says in (("gone", "'gone' is not on this machine"), (str(folder), "kind: causal")):
        own = build.Recipe(run[0].settings.model_copy(update={"reader": name}))
        with pytest.raises(ReasonerError, match=says):
            build.build_models(own, shop, {"prompt"}, folder=tmp_path / "built", work=tmp_path / "work")
        assert not (tmp_path / "work").exists()


def test_an_encoder_needs_no_reader():
    with pytest.raises(ValidationError, match="stands beside an LLM"):
        ReasonerSettings(kind="encoder", model="some-encoder", reader="other")
