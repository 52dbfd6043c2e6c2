"""Params of the ablations: each differs from the whole in what it is about, and in nothing else."""

import pytest

from rgalign.evaluation.results import MODELS
from rgalign.params import ROOT, flat, load

ABLATED = {  # what sets each row of the stage table apart from the whole
    "no_alignment": {"sft.use", "dpo.use", "cl.use"},
    "random_sft": {"sft.select", "dpo.use", "cl.use"},
    "sft_only": {"dpo.use", "cl.use"},
    "sft_dpo": {"cl.use"},
    "cl_only": {"sft.use", "dpo.use", "cl.lm_weight"},
    "no_dpo": {"dpo.use"},
    "one_llm": {"candidates.llms"},
    "no_neftune": {"sft.neftune"},
    "naive_dpo": {
        *("dpo.beta", "dpo.learning_rate", "dpo.sft_weight"),
        *("dpo.min_margin", "dpo.margin_quantile", "dpo.tolerance"),
    },
    "cosine_cl": {"cl.similarity", "cl.temperature"},
    "frozen_ranker": {"loop.ranker", "loop.refit_whitening"},
    "scratch_ranker": {"loop.ranker"},
    "end_to_end": {"sft.use", "dpo.use", "cl.ranker_learns", "loop.ranker", "loop.refit_whitening"},
}


def test_every_ablation_has_a_name_and_differs_from_the_study_in_what_it_is_about():
    whole, found = flat(load("params/alignment.yaml")), {}
    for path in (ROOT / "params" / "ablations").glob("*.yaml"):
        own = flat(load(path))
        found[path.stem] = {key.removeprefix("alignment.") for key in own if own[key] != whole[key]}
    assert found == ABLATED
    measured = {name for name in MODELS if name.startswith("rgalign_rec/")} - {"rgalign_rec/old_order"}  # published
    assert {f"rgalign_rec/{name}" for name in found} == measured


@pytest.mark.parametrize("data", ["cfpb2014", "cfpb2014-minilm", "msweb", "msweb-minilm"])
def test_the_control_of_a_public_set_is_its_alignment_left_out(data):
    whole, own = flat(load(f"params/{data}-alignment.yaml")), flat(load(f"params/{data}/ablations/no_alignment.yaml"))
    left_out = {key for key in own if own[key] != whole[key]} - {"alignment.cl.epochs", "alignment.cl.learning_rate"}
    used = {f"alignment.{step}.use" for step in ("sft", "dpo", "cl")}
    assert left_out == {key for key in used if whole[key]}
    assert not any(own[key] for key in used)
