"""Notebooks 04 to 10 in one process: an adapter from end to end, an encoder, steps that are off, no alignment."""

import json
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import small_run
import torch
from peft import PeftModel
from safetensors import safe_open
from small_run import ALIGNMENT, play
from transformers import AutoModelForCausalLM, AutoTokenizer, BertConfig, BertModel

from rgalign.commands import pipeline, sweep
from rgalign.commands.pipeline import Kernels
from rgalign.data import vectors
from rgalign.params import ROOT
from rgalign.reasoner.model import Reasoner, save
from rgalign.run import artifacts, stages
from rgalign.run.artifacts import digest

pytestmark = pytest.mark.slow

LORA = {"alignment.lora": {"rank": 2, "alpha": 4}}


@pytest.fixture
def run(ranked, tmp_path) -> Path:
    """A copy of the run through notebook 03."""
    return Path(shutil.copytree(ranked, tmp_path / "run"))


def last_states(model, prompts) -> np.ndarray:
    """(prompts, hidden) the last token's final state, each prompt alone."""
    with torch.no_grad():
        states = [model(input_ids=torch.tensor([ids]), output_hidden_states=True).hidden_states[-1] for ids in prompts]
    return torch.cat([state[:, -1] for state in states]).numpy()


def prompts_of(context, count: int) -> tuple[list[str], list[list[int]]]:
    sessions = context.shop.sessions.head(count)
    prompts = context.recipe.prompter(context.shop, context.main()).sessions(sessions)
    return sessions.session_id.tolist(), prompts


def test_one_adapter_goes_through_all_steps_and_loads_with_plain_peft(run, context):
    for name in ALIGNMENT:
        play(name, run, LORA)
    names, digests = set(), set()
    for step in ("sft", "dpo", "cl", "rgalign", "kb_reader"):
        folder = run / "models" / step
        assert json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"] == "main"
        assert not list(folder.glob("model*")), "the adapter alone"
        with safe_open(folder / "adapter_model.safetensors", "pt") as file:
            names.add(tuple(sorted(file.keys())))
        digests.add(digest(folder / "adapter_model.safetensors"))
    assert len(names) == 1
    assert len(digests) == 3, "each step trains it on, and 08 takes it as it is"
    assert digest(run / "models/kb_reader") == digest(run / "models/dpo"), "RG-CL does not move the knowledge base"
    base = AutoModelForCausalLM.from_pretrained(run / "models/reasoner/main")
    model = PeftModel.from_pretrained(base, run / "models/rgalign").eval()
    ids, prompts = prompts_of(context, 8)
    aligned = vectors.load(run / "tables/aligned_embeddings/sessions").rows(ids)
    found = last_states(model, prompts)
    np.testing.assert_allclose(found, aligned, atol=2e-3, rtol=2e-3)
    with model.disable_adapter():
        assert not np.allclose(last_states(model, prompts), aligned, atol=2e-3, rtol=2e-3)


def test_a_whole_model_loads_with_transformers_and_a_step_that_is_off_hands_on_its_bytes(run, context):
    for name in ALIGNMENT:
        play(name, run, {"alignment.dpo.use": False})
    assert digest(run / "models/dpo") == digest(run / "models/sft") != digest(run / "models/cl")
    assert pd.read_parquet(run / "tables/preferences.parquet").empty
    model = AutoModelForCausalLM.from_pretrained(run / "models/rgalign").eval()
    assert len(AutoTokenizer.from_pretrained(run / "models/rgalign")) == model.config.vocab_size
    ids, prompts = prompts_of(context, 8)
    aligned = vectors.load(run / "tables/aligned_embeddings/sessions").rows(ids)
    np.testing.assert_allclose(last_states(model, prompts), aligned, atol=2e-3, rtol=2e-3)
    rows = pd.read_parquet(run / "tables/stage_rows.parquet").set_index("step")
    assert rows.index.tolist() == ["before", "sft", "dpo", "retrained", "cl"]
    written = [name for name in rows if name != "ranking"]
    pd.testing.assert_series_equal(rows.loc["dpo", written], rows.loc["retrained", written], check_names=False)
    retrained, aligned = run / "tables/retrained_embeddings", run / "tables/aligned_embeddings"
    assert (
        digest(aligned / "intents") == digest(retrained / "intents") != digest(run / "tables/embeddings/prompt/intents")
    )
    assert digest(aligned / "sessions") != digest(retrained / "sessions")
    pd.testing.assert_series_equal(rows.loc["sft"], rows.loc["dpo"], check_names=False)


def test_all_steps_off_is_the_ranker_trained_as_often_and_nothing_else(run):
    off = {f"alignment.{step}.use": False for step in ("sft", "dpo", "cl")}
    for name in ALIGNMENT:
        play(name, run, off)
    assert digest(run / "models/cl") == digest(run / "models/reasoner/main")
    assert digest(run / "models/retrained_rankers") != digest(run / "models/rankers/qe_rec")
    assert digest(run / "tables/retrained_embeddings") == digest(run / "tables/embeddings/prompt")
    assert not list((run / "models/kb_reader").iterdir())
    before = vectors.load(run / "tables/embeddings/prompt/sessions")
    after = vectors.load(run / "tables/aligned_embeddings/sessions")
    np.testing.assert_allclose(after.rows(before.ids), before.values, atol=2e-3)


def test_an_encoder_goes_through_contrastive_alignment_and_the_loop(run, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(run / "models/reasoner/main")
    size = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24}
    torch.manual_seed(0)
    model = BertModel(BertConfig(vocab_size=len(tokenizer), **size)).eval()
    save(Reasoner("bert", "encoder", model, tokenizer, "mean"), tmp_path / "bert")
    encoder = {
        "reasoner": {"kind": "encoder", "model": str(tmp_path / "bert")},
        "reasoner.others": [],
        "alignment.sft.use": False,
        "alignment.dpo.use": False,
        "alignment.cl.lm_weight": 0.0,
    }
    own = {key: value for key, value in small_run.SMALL.items() if not key.startswith("reasoner")}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(small_run, "SMALL", own)
        for name in ("02_reasoner", "03_rankers", *ALIGNMENT, "09_evaluation", "10_ab_test", "00_tour"):
            play(name, run, encoder)
    assert pd.read_parquet(run / "tables/candidates.parquet").empty
    assert not (run / "models/reward/all").exists()
    assert (run / "models/rgalign/modules.json").is_file(), "a sentence-transformers folder"
    results = pd.read_parquet(run / "tables/results.parquet")
    assert {"qe_rec", "rgalign_rec"} <= set(results.model)
    assert not results.metric.str.startswith("ihr").any()


def test_without_rounds_there_is_no_alignment_anywhere(run, capsys):
    none = {"alignment.loop.rounds": 0}
    params = small_run.small(none)
    left = ["01_data", "02_reasoner", "03_rankers", "09_evaluation", "10_ab_test"]
    assert pipeline.plan(run, params, pipeline.chosen(), forced=True).stage.tolist() == left
    stages.write_params(run, params)
    assert pipeline.status(run)[0].stage.tolist() == left
    for name in ALIGNMENT:
        with pytest.raises(artifacts.ArtifactError, match=r"not part of this run: alignment\.loop\.rounds is 0"):
            play(name, run, none)
    for name in ("09_evaluation", "10_ab_test"):
        play(name, run, none)
    entry = artifacts.read_manifest(run)["stages"]["09_evaluation"]
    assert not [name for name in entry["inputs"] if "align" in name]
    assert "rgalign_rec" not in set(pd.read_parquet(run / "tables/results.parquet").model)
    given = {"params_file": small_run.SMOKE, "run_dir": str(run), "overrides": {**small_run.SMALL, **none}}
    pipeline.execute(run, pipeline.chosen(), given, params, forced=False)
    study = sweep.Run(run, small_run.SMOKE, given["overrides"], params)
    with Kernels(ROOT) as kernels:
        sweep._execute_run(study, pipeline.chosen(), kernels)
    printed = capsys.readouterr().out
    assert printed.count("unchanged, skipped") == 2 * len(left)
    assert "[4/5] evaluation: " in printed
    assert "reward model" not in printed


def test_params_that_change_between_two_steps_are_told_before_the_later_one_runs(run):
    for name in ALIGNMENT[:2]:
        play(name, run)
    with pytest.raises(artifacts.ArtifactError, match=r"models/sft was made by 05_rg_sft with other .*epochs 1.* -> 2"):
        play("06_rg_dpo", run, {"alignment.sft.epochs": 2})
    with pytest.raises(artifacts.ArtifactError, match="look_sessions 20 -> 10"):
        play("06_rg_dpo", run, {"alignment.loop.look_sessions": 10})


def test_one_llm_alone_is_enough(run):
    alone = {"reasoner.others": [], "alignment.reward.compared": True, "reasoner.seed": 0}
    shutil.rmtree(run / "models/reasoner/other-1")
    manifest = json.loads((run / "manifest.json").read_text())
    manifest["stages"] = {"01_data": manifest["stages"]["01_data"]}
    (run / "manifest.json").write_text(json.dumps(manifest))
    for name in ("02_reasoner", "03_rankers", "04_reward_model"):
        play(name, run, alone)
    assert set(pd.read_parquet(run / "tables/candidates.parquet").source) == {"main"}
    judged = pd.read_parquet(run / "tables/reward_judged.parquet").judge.tolist()
    assert judged == ["the reward model", "another seed"]


def test_a_run_of_baselines_alone_is_evaluated_and_has_no_tour(ranked, tmp_path):
    run = Path(shutil.copytree(ranked, tmp_path / "run"))
    alone = {"ranker.models": ["two_tower", "two_tower_text"], "alignment.loop.rounds": 0}
    for name in ("02_reasoner", "03_rankers", "09_evaluation", "10_ab_test"):
        play(name, run, alone)
    results = pd.read_parquet(run / "tables/results.parquet")
    assert {"two_tower", "two_tower_text"} <= set(results.model)
    assert len(pd.read_parquet(run / "tables/experiment.parquet"))
    with pytest.raises(artifacts.ArtifactError, match="the tour follows QE-Rec, which this run has not trained"):
        play("00_tour", run, alone)
