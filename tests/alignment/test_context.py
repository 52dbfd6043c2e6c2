"""Who is learnt from; what a step hands on; an adapter stays one, on the run's own reasoner."""

import json
from dataclasses import replace

import numpy as np
import pytest
import small_run
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from rgalign.alignment.context import MAIN, Context, copy_folder, load_aligned
from rgalign.data import tables
from rgalign.params_training import Lora
from rgalign.reasoner.adapter import trainable, tuned
from rgalign.reasoner.model import fingerprint
from rgalign.run.artifacts import digest
from rgalign.run.stages import open_stage

LORA = Lora(rank=2, alpha=4)


def moved(reasoner, lora=LORA, seed=0):
    """The reasoner after something like training."""
    model = trainable(reasoner, lora, seed=seed)
    with torch.no_grad():
        for number, weight in enumerate(model.parameters()):
            if weight.requires_grad:
                weight += torch.from_numpy(np.random.default_rng([seed, number]).normal(size=weight.shape) / 9).float()
    return tuned(reasoner, model)


def test_learners_have_a_click_and_are_nobody_elses(context):
    learners, parts = context.clicked_lists, context.parts
    sessions = context.shop.sessions.set_index("session_id")
    clicked = tables.read(context.run / "tables/dataset").impressions.groupby("session_id").clicked.max()
    own = set(learners.session_id)
    assert learners.part == "train"
    assert 0 < len(own) == len(learners)
    assert (clicked.loc[list(own)] == 1).all()
    assert (sessions.loc[list(own), "split"] == "train").all()
    assert not own & (set(parts.dev.session_id) | set(parts.valid.session_id))
    assert not set(learners.user_id) & set(parts.dev.user_id)
    rest = sessions.index[(sessions.split == "train") & ~sessions.user_id.isin(parts.dev.user_id)]
    assert own == set(rest[clicked.reindex(rest) == 1])


def test_nothing_of_the_test_week_is_in_reach(context):
    assert set(context.shop.sessions.split) == {"train", "valid"}
    assert context.shop.truth is None


def test_of_the_shop_it_holds_what_prompts_show_and_the_clicks(context):
    whole = tables.read(context.run / "tables/dataset")
    shown = context.recipe.prompter(whole, context.main()).features
    assert set(context.shop.sessions) == {"session_id", "user_id", "timestamp", "region", "split", *shown}
    assert len(shown) < len(whole.kinds), "most columns are only encoded"
    assert context.shop.sessions.equals(whole.sessions[list(context.shop.sessions)])
    assert context.shop.impressions.equals(whole.impressions.query("clicked == 1").reset_index(drop=True))


def test_rows_of_follows_the_sessions_asked_for(context):
    lists = context.clicked_lists
    asked = [lists.session_id[i] for i in (3, 0, 3)]
    assert context.rows_of(lists, asked).session_id.tolist() == asked
    assert torch.equal(context.rows_of(lists, asked).candidates[2], lists.candidates[3])


def test_without_real_positions_none_are_learnt(context):
    assert context.positions == context.parts.train.candidates.shape[1]
    shop = replace(context.shop, meta={**context.shop.meta, "position_is_real": False})
    assert replace(context, shop=shop).positions == 0
    unbiased = small_run.small({"ranker.position_bias": False})
    assert replace(context, params=unbiased).positions == 0


def test_vectors_of_the_unaligned_reasoner_are_those_of_notebook_02(context):
    for lists in (context.parts.train, context.parts.valid):
        made = context.with_vectors_of(context.main(), lists)
        torch.testing.assert_close(made.query.float(), lists.query.float(), atol=2e-3, rtol=2e-3)


def test_handing_on_copies_every_byte(context, tmp_path):
    copy_folder(context.models / MAIN, tmp_path / "sft")
    assert digest(tmp_path / "sft") == digest(context.models / MAIN)
    (tmp_path / "sft" / "config.json").write_text("{}")
    assert digest(tmp_path / "sft") != digest(context.models / MAIN), "a copy, not the thing itself"


@pytest.mark.parametrize("off_before", [False, True], ids=["after a step", "after a step that is off"])
def test_an_adapter_is_saved_alone_and_belongs_to_the_runs_reasoner(context, tmp_path, off_before):
    start = context.main()
    if off_before:
        copy_folder(context.models / MAIN, tmp_path / "sft")
        start = context.load(tmp_path / "sft")
    first = moved(start)
    context.save(first, tmp_path / "dpo")
    loaded = context.load(tmp_path / "dpo")
    assert fingerprint(loaded) == fingerprint(first)
    second = moved(loaded, seed=1)
    context.save(second, tmp_path / "cl")
    plain = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(context.models / MAIN), tmp_path / "cl")
    ids = torch.tensor([[5, 6, 7, 2]])
    with torch.no_grad():
        torch.testing.assert_close(plain(ids).logits, second.model(ids).logits)
    for name in ("dpo", "cl"):
        assert json.loads((tmp_path / name / "adapter_config.json").read_text())["base_model_name_or_path"] == MAIN
        assert not list((tmp_path / name).glob("model*"))


def test_what_is_only_loaded_and_saved_again_has_the_same_bytes(context, tmp_path, monkeypatch):
    """As notebook 08 does; peft keeps its targets in a set, whose order changes, and would ask the hub."""
    monkeypatch.setattr("socket.socket.connect", lambda *address: pytest.fail("the network was tried"))
    context.save(moved(context.main()), tmp_path / "cl")
    context.save(context.load(tmp_path / "cl"), tmp_path / "rgalign")
    assert digest(tmp_path / "rgalign") == digest(tmp_path / "cl")


def test_a_run_without_alignment_has_no_aligned_reasoner(context, ranked):
    stage = open_stage("03_rankers", small_run.SMOKE, ranked, small_run.SMALL)
    stage.params = small_run.small({"alignment.loop.rounds": 0})
    assert load_aligned(stage, context.recipe, context.main()) is None


def test_an_objective_that_nobody_wrote_is_told_before_anything_is_trained(context):
    how = context.params.alignment
    wrong = how.model_copy(update={"dpo": how.dpo.model_copy(update={"objective": "ipoo"})})
    with pytest.raises(ValueError, match=r"alignment\.dpo\.objective is 'ipoo'.* did you mean 'ipo'"):
        Context.at(context.params.model_copy(update={"alignment": wrong}), lambda artifact: context.run / artifact)
