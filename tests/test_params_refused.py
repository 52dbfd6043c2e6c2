"""Params that are each good and do not go together are refused by name."""

import pytest

from rgalign.__main__ import main
from rgalign.params import ParamsError, check


def test_an_encoder_has_a_name_and_no_company():
    with pytest.raises(ParamsError, match=r"reasoner\.model .*pretrained"):
        check({"reasoner": {"kind": "encoder"}})
    with pytest.raises(ParamsError, match=r"reasoner\.others .*write queries"):
        check({"reasoner": {"kind": "encoder", "model": "some/encoder", "others": [{}]}})


def test_what_an_encoder_cannot_learn_is_told_at_once():
    reasoner = {"kind": "encoder", "model": "some/encoder"}
    asked = {"cl": {"lm_weight": 0.1}, "lora": {"rank": 2}}
    with pytest.raises(ParamsError) as error:
        check({"reasoner": reasoner, "alignment": asked})
    for part in ("sft and dpo", "lm_weight to 0", "takes no adapter"):
        assert part in str(error.value)
    check({"reasoner": reasoner, "alignment": {**asked, "loop": {"rounds": 0}}})
    check({"reasoner": reasoner, "alignment": {"sft": {"use": False}, "dpo": {"use": False}, "cl": {"lm_weight": 0}}})


def test_packed_weights_that_are_to_learn_are_refused_by_name():
    packed = {"model": "some/model", "quantize": "4bit"}
    with pytest.raises(
        ParamsError, match=r"reasoner\.quantize is 4bit and lora is empty.* give alignment\.lora"
    ) as error:
        check({"reasoner": packed, "alignment": {"sft": {"use": False}}})
    assert "as alignment.dpo, alignment.cl would have them do" in str(error.value)
    off = {name: {"use": False} for name in ("sft", "dpo", "cl")}
    check({"reasoner": packed, "alignment": {"lora": {"rank": 2}}})
    check({"reasoner": {**packed, "adapter": "some/adapter"}})  # which is trained on beside them
    check({"reasoner": packed, "alignment": off})
    check({"reasoner": packed, "alignment": {"loop": {"rounds": 0}}})


def test_an_alignment_without_its_ranker_is_told_at_once():
    alone = {"ranker": {"models": ["two_tower"]}}
    with pytest.raises(ParamsError, match=r"ranker\.models is two_tower; .* qe_rec .*alignment\.loop\.rounds to 0"):
        check(alone)  # also where nothing is said of the alignment
    check({**alone, "alignment": {"loop": {"rounds": 0}}})


def test_contrastive_alignment_needs_something_to_push_away_from():
    with pytest.raises(ParamsError, match=r"alignment\.cl\.in_batch .*no negative"):
        check({"alignment": {"cl": {"hard": 0, "in_batch": False}}})
    for own in ({"hard": 0}, {"hard": 0, "in_batch": False, "use": False}, {"hard": 1, "in_batch": False}):
        check({"alignment": {"cl": own}})
    with pytest.raises(ParamsError, match=r"alignment\.cl\.symmetric .*cosine or dot"):
        check({"alignment": {"cl": {"symmetric": 0.5}}})


def test_what_a_tiny_model_would_ignore_is_refused():
    with pytest.raises(ParamsError) as error:
        check({"reasoner": {"adapter": "some/lora", "quantize": "4bit"}})
    for name in ("adapter", "quantize"):
        assert f"reasoner.{name}" in str(error.value)
    assert check({"reasoner": {"model": "some/model", "adapter": "some/lora"}}).reasoner.adapter == "some/lora"


def test_what_cannot_embed_a_written_query_is_told_at_once():
    with pytest.raises(
        ParamsError, match=r"reasoner\.embed .*an encoder writes no query.* set reasoner\.embed to prompt"
    ):
        check({"reasoner": {"kind": "encoder", "model": "some/encoder", "embed": "prompt_query"}})
    with pytest.raises(ParamsError, match=r"reasoner\.embed"):
        check({"reasoner": {"embed": "end"}})
    several = {"reasoner": {"embed": "prompt_query"}, "run": {"launcher": "torchrun --nproc_per_node 2"}}
    with pytest.raises(ParamsError, match=r"prompt_query is written by one process: set it to prompt, or leave"):
        check(several)
    for own, other in (("prompt", "prompt_query"), ("prompt_query", "prompt")):
        models = ["qe_rec", f"qe_rec/{other}"]
        params = {"reasoner": {"embed": own}, "ranker": {"models": models}}
        assert check(params).ranker.models == tuple(models)
        params["ranker"] = {"models": ["qe_rec", f"qe_rec/{own}"]}
        with pytest.raises(ParamsError, match=rf"qe_rec/{own} is qe_rec itself where reasoner\.embed is {own}"):
            check(params)


def test_how_dates_are_read_is_asked_of_the_cfpb_alone():
    with pytest.raises(ParamsError, match=r"data\.day_first.*only the CFPB"):
        check({"data": {"source": "folder", "path": "shop", "day_first": True}})
    assert check({"data": {"source": "cfpb", "path": "x.csv", "day_first": True}}).data.day_first is True
    assert check({"data": {"source": "cfpb", "path": "x.csv"}}).data.day_first is None


def test_a_parameter_that_was_removed_says_what_to_do():
    for space in ("before", "retrained"):
        with pytest.raises(ParamsError, match=r"alignment\.cl\.space  was removed: .*delete the line"):
            check({"alignment": {"cl": {"space": space}}})


def test_a_command_that_moved_says_where_it_is(capsys):
    with pytest.raises(SystemExit):
        main(["scale", "outputs/scaling"])
    assert "scale is another command now: python -m benchmarks.scaling" in capsys.readouterr().err
