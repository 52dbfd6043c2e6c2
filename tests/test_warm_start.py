"""A run that goes on from another: what is taken, what is refused, and that it is recorded as an input."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from rgalign.__main__ import main
from rgalign.params import dump, load
from rgalign.params_schema import OtherModel, Params
from rgalign.params_schema import Reasoner as ReasonerSettings
from rgalign.params_training import Lora
from rgalign.reasoner import build
from rgalign.reasoner.adapter import trainable
from rgalign.reasoner.embed import embed
from rgalign.reasoner.model import Reasoner, ReasonerError, fingerprint, save, tiny
from rgalign.run import artifacts, external_inputs, stages
from rgalign.run.artifacts import ArtifactError
from rgalign.run.plan import STAGES
from rgalign.shopworld import world

SMOKE = "params/smoke.yaml"


@pytest.fixture
def last(tmp_path):
    """An aligned run as its manifest tells it: all artifacts of all stages, of one line each."""
    run, params = tmp_path / "last", load(SMOKE)
    artifacts.write_text(run / "params.yaml", dump(params))
    for stage in STAGES.values():
        for name in stage.writes:
            artifacts.write_text(run / name, f"{name} of the last run")
        entry = {
            "params": stages.stage_params(stage, params),
            "code": {},
            "inputs": {},
            "seconds": 1,
            "peak_memory_mb": 1,
        }
        entry["outputs"] = {name: artifacts.digest(run / name) for name in stage.writes}
        if stage.in_sequence:
            artifacts.record_stage(run, stage.name, entry)
    return run


def opened(run, last=None):
    return stages.open_stage("01_data", SMOKE, run, {"run.warm_start": last and str(last)})


def test_what_is_taken_is_an_input(last, tmp_path):
    fresh = opened(tmp_path / "fresh")
    assert fresh.last("tables/encoded") is None
    assert not fresh.inputs
    stage = opened(tmp_path / "next", last)
    assert stage.last("tables/encoded").read_text() == "tables/encoded of the last run"
    ((name, was),) = stage.inputs.items()
    assert was == artifacts.digest(last / "tables/encoded")
    changed = lambda: stages.changed_file(tmp_path / "next", "input", {name: was})  # noqa: E731
    assert changed() is None
    artifacts.write_text(last / "tables/encoded", "made again")
    assert "changed" in changed()
    with pytest.raises(ArtifactError, match="was altered after 01_data wrote it"):
        stage.last("tables/encoded")


def test_a_run_that_is_not_aligned_or_is_this_very_run_is_refused_before_anything_runs(last, tmp_path, capsys):
    given = load(SMOKE, {"run.warm_start": str(last)})
    assert external_inputs.last_run(given, tmp_path / "next") == last
    assert external_inputs.last_run(load(SMOKE), tmp_path / "next") is None

    def told(of, run):
        assert main(["run", SMOKE, "--warm-start", str(of), "--run-dir", str(run), "--dry-run"]) == 1
        return capsys.readouterr().err

    assert "this very run: give another --run-dir" in told(last, last)
    assert "08_closed_loop has not run" in told(tmp_path, tmp_path / "next")
    assert main(["run", SMOKE, "--warm-start", str(last), "--run-dir", str(tmp_path / "next"), "--dry-run"]) == 0


def test_development_users_that_the_last_run_learnt_from_are_refused(last, tmp_path):
    given = {"run.warm_start": str(last)}
    with pytest.raises(ArtifactError, match="development users") as error:
        external_inputs.last_run(load(SMOKE, given | {"run.seed": 7, "data.dev_users": 0.5}), tmp_path / "next")
    assert "data.seed is 7; expected 0, as there" in str(error.value)
    assert "data.dev_users is 0.5; expected at most 0.1, as there" in str(error.value)
    kept = {"run.seed": 7, "data.seed": 0, "data.dev_users": 0.05}
    assert external_inputs.last_run(load(SMOKE, given | kept), tmp_path / "next") == last
    for name, value in (("data.dev_days", 2), ("data.dev_new_intents", 0.1)):
        with pytest.raises(ArtifactError, match=f"{name} is {value}; expected 0 in a warm start"):
            external_inputs.last_run(load(SMOKE, given | {name: value}), tmp_path / "next")


SMALL = {"hidden": 16, "layers": 1, "heads": 2, "min_count": 1}


@pytest.fixture(scope="module")
def shop():
    whole = world.generate(seed=11, sessions=300, users=200, distance=0.5, transcripts=60)
    return replace(whole, truth=None, sessions=whole.sessions.assign(split="train"))


@pytest.fixture(scope="module")
def made(shop, tmp_path_factory):
    """(recipe, folder) of the last run's models: main and other-1."""
    own, folder = Params().reasoner.model_dump(), tmp_path_factory.mktemp("models")
    others = [OtherModel(seed=6, tiny=SMALL).model_dump()]
    own |= {"seed": 5, "tiny": SMALL, "others": others}
    recipe = build.Recipe(ReasonerSettings(**own | {"pretraining": {**own["pretraining"], "epochs": 0.2}}))
    build.build_models(recipe, shop, {"prompt"}, folder=folder / "reasoner", work=folder / "work")
    return recipe, folder / "reasoner"


def go_on(recipe, shop, folder, *, aligned, last):
    how = {"folder": folder, "work": folder.parent / "work", "aligned": aligned, "last": last}
    curves = build.build_models(recipe, shop, {"prompt"}, **how)
    return build.load_models(recipe, folder), curves


def test_the_aligned_reasoner_becomes_the_main_one_and_nothing_is_trained(made, shop, tmp_path):
    recipe, folder = made
    before = build.load_models(recipe, folder)
    aligned = replace(before["main"], model=tiny(before["main"].tokenizer, hidden=16, layers=1, seed=9).model)
    save(aligned, tmp_path / "rgalign")
    models, curves = go_on(recipe, shop, tmp_path / "next", aligned=tmp_path / "rgalign", last=folder)
    assert curves.empty
    assert fingerprint(models["main"]) == fingerprint(aligned) != fingerprint(before["main"])
    assert fingerprint(models["other-1"]) == fingerprint(before["other-1"])


def test_another_llm_that_the_last_run_had_not_is_trained(made, shop, tmp_path):
    recipe, folder = made
    more = [*recipe.settings.others, OtherModel(seed=7, tiny=SMALL)]
    recipe = replace(recipe, settings=recipe.settings.model_copy(update={"others": more}))
    models, curves = go_on(recipe, shop, tmp_path / "next", aligned=folder / "main", last=folder)
    assert set(curves["model"]) == {"other-2"}
    assert set(models) == {"main", "other-1", "other-2"}


def test_an_adapter_is_merged_into_the_model_that_it_was_trained_on(made, shop, tmp_path):
    recipe, folder = made
    main_model: Reasoner = build.load_models(recipe, folder)["main"]
    model = trainable(main_model, Lora(rank=2, alpha=4), seed=1)
    with torch.no_grad():
        for name, value in model.named_parameters():
            if "lora_B" in name:
                value.normal_(generator=torch.Generator().manual_seed(2))
    adapted = replace(main_model, model=model.train(False))
    save(adapted, tmp_path / "rgalign")
    assert (tmp_path / "rgalign" / build.ADAPTER).is_file()
    models, _ = go_on(recipe, shop, tmp_path / "next", aligned=tmp_path / "rgalign", last=folder)
    prompts = [[4, 5, 2], [6, 7, 8, 2]]
    vectors = [embed(each, prompts, progress=False) for each in (models["main"], adapted, main_model)]
    np.testing.assert_allclose(vectors[0], vectors[1], atol=1e-4)
    assert np.abs(vectors[0] - vectors[2]).max() > 0.01
    quantised = replace(recipe, settings=recipe.settings.model_copy(update={"quantize": "4bit"}))
    with pytest.raises(ReasonerError, match="into which it cannot be merged"):
        go_on(quantised, shop, tmp_path / "again", aligned=tmp_path / "rgalign", last=folder)
