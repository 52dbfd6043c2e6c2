"""Time and memory before a run: against counts worked by hand from Qwen3-4B's published sizes."""

import json

import pandas as pd
import pytest
from transformers import Qwen3Config

from rgalign.__main__ import main
from rgalign.alignment.objectives import OBJECTIVES
from rgalign.alignment.reward import REWARDS
from rgalign.commands import estimate
from rgalign.commands.estimate import CARDS, model_size
from rgalign.params import ROOT, ParamsError, load

# huggingface.co/Qwen/Qwen3-4B/config.json
QWEN3_4B = dict(
    vocab_size=151936,
    hidden_size=2560,
    intermediate_size=9728,
    num_hidden_layers=36,
    num_attention_heads=32,
    num_key_value_heads=8,
    head_dim=128,
    tie_word_embeddings=True,
)
# q and o 2560 x 4096, k and v 2560 x 1024, three of 2560 x 9728 in the MLP
LINEAR = 36 * (2 * 2560 * 4096 + 2 * 2560 * 1024 + 3 * 2560 * 9728)
NORMS = 36 * (2 * 2560 + 2 * 128) + 2560
ENDS = 36 * (2 * (2560 + 4096) + 2 * (2560 + 1024) + 3 * (2560 + 9728))
TABLE = 151936 * 2560
SETTINGS = {"reasoner.max_tokens": 100, "reasoner.queries.max_new_tokens": 20, "data.world.sessions": 600}


@pytest.fixture(scope="module")
def size():
    return model_size(Qwen3Config(**QWEN3_4B))


def params(**other):
    return load(ROOT / "params" / "qwen3-4b.yaml", {**SETTINGS, **other})


def test_qwen3_4b_has_its_published_parameters(size):
    assert size.parameters == LINEAR + NORMS + TABLE == 4_022_468_096
    assert size.trunk == LINEAR + NORMS == 3_633_511_936  # 3.6 billion without the table, says its card
    assert size.linear == LINEAR
    assert size.lora(16) == 16 * ENDS == 33_030_144


def test_an_untied_head_is_a_parameter_and_not_in_the_trunk():
    untied = model_size(Qwen3Config(**{**QWEN3_4B, "tie_word_embeddings": False}))
    assert untied.parameters == LINEAR + NORMS + 2 * TABLE
    assert untied.trunk == LINEAR + NORMS
    assert untied.linear == LINEAR


@pytest.mark.parametrize(
    ("lora", "checkpointing", "times"), [(True, False, 4), (True, True, 6), (False, False, 6), (False, True, 8)]
)
def test_operations_a_token_in_training(size, lora, checkpointing, times):
    own = {"alignment.engine.gradient_checkpointing": checkpointing} | ({} if lora else {"alignment.lora": None})
    table = estimate.work(params(**own), size, 600).set_index("what")
    assert table.loc["RG-SFT", "operations"] == times * size.trunk


def test_work_is_tokens_times_operations(size):
    how = {"alignment.sft.epochs": 2, "alignment.cl.epochs": 3, "alignment.dpo.margin_quantile": 0.5}
    how |= {"alignment.candidates.samples": 4, "alignment.dpo.epochs": 1}
    table = estimate.work(params(**how), size, 600).set_index("what")
    assert table.loc["embed train and valid", "read"] == 500 * 100
    assert table.loc["embed test", "read"] == 100 * 100
    assert table.loc["write 5 queries a session, by each of 1 models", "written"] == 400 * 5 * 20
    assert table.loc["RG-SFT", "read"] == 2 * 400 * 120
    assert table.loc["RG-DPO", "read"] == 200 * (100 + 1 + 2 * 20)
    assert table.loc["RG-CL", "read"] == 3 * 400 * 120
    assert table.loc["embed train and valid for the retraining", "read"] == 500 * 100
    assert table.loc["embed train and valid", "operations"] == 2 * size.trunk


@pytest.mark.parametrize(
    ("own", "again"), [({"alignment.sft.use": False}, 1), ({"alignment.sft.use": False, "alignment.dpo.use": False}, 0)]
)
def test_sessions_are_embedded_for_the_retraining_where_the_model_has_moved(size, own, again):
    table = estimate.work(params(**own), size, 600)
    assert (table["what"] == "embed train and valid for the retraining").sum() == again


def test_a_model_with_a_sliding_window_reads_a_pairs_prompt_twice(size):
    config = Qwen3Config(**QWEN3_4B, use_sliding_window=True, sliding_window=8, max_window_layers=0)
    sliding, own = model_size(config), params(**{"alignment.dpo.margin_quantile": 0.5, "alignment.dpo.epochs": 1})
    table = estimate.work(own, sliding, 600).set_index("what")
    assert table.loc["RG-DPO", "read"] == table.loc["reference", "read"] == 200 * 2 * (100 + 20)
    assert estimate.memory(own, sliding)["activations"] >= estimate.memory(own, size)["activations"]


def test_seconds_are_operations_over_the_cards_peak(size):
    table = estimate.work(params(), size, 600)
    row = table[table["what"] == "embed train and valid"]
    found = estimate.seconds(row, params(), size, CARDS["H100"], processes=2).item()
    assert found == pytest.approx(2 * 3_633_511_936 * 50_000 / 989e12 / 0.4 / 2)


def seconds_of_writing(size, card, **more):
    own = params(**{"alignment.candidates.samples": 4, **more})
    table = estimate.work(own, size, 600)
    return estimate.seconds(table[table["written"] > 0], own, size, CARDS[card], processes=1).item()


READ_TWICE = 2 * 2 * 3_633_511_936 * 400 * 100  # the prompts, for the greedy queries and for the drawn ones


@pytest.mark.parametrize("card", ["H100", "L4"])
def test_seconds_of_a_step_of_writing_are_the_bytes_that_it_moves(size, card):
    """131072 tokens are 1092 queries of 120; 36 layers keep a key and a value of 1024 numbers, two bytes each."""
    cache = 1092 * 120 * 36 * 2 * 1024 * 2
    step = (2 * 4_022_468_096 + 3 * cache) / CARDS[card].bandwidth / 0.4
    expected = READ_TWICE / CARDS[card].operations / 0.4 + 400 * 5 * 20 / 1092 * step
    assert step > 36 * 0.7e-3
    assert seconds_of_writing(size, card) == pytest.approx(expected)


def test_a_step_of_writing_lasts_no_less_than_its_launches(size):
    """13 queries of 10,000 tokens on a B200: 4-bit weights and their cache would take 21 ms."""
    more = {"reasoner.max_tokens": 9_980, "reasoner.quantize": "4bit"}
    found = seconds_of_writing(size, "B200", **more)
    read = 2 * 2 * 3_633_511_936 * 400 * 9_980 / CARDS["B200"].operations / 0.4
    assert found == pytest.approx(read + 400 * 5 * 20 / 13 * 36 * 0.7e-3)


def test_seconds_of_the_papers_size_are_not_too_large_a_number(size):
    own = params(
        **{"reasoner.max_tokens": 512, "alignment.sft.epochs": 2, "alignment.engine.gradient_checkpointing": True}
    )
    table = estimate.work(own, size, 7_530_000)
    found = estimate.seconds(table, own, size, CARDS["H100"], processes=8)[table["what"] == "RG-SFT"].item()
    assert found == pytest.approx(6 * 3_633_511_936 * 2 * 5_020_000 * 532 / (8 * 0.4 * 989e12))


def test_memory_of_an_adapter(size):
    own = params(**{"alignment.engine.tokens_per_batch": 1200, "alignment.cl.use": False})
    held = estimate.memory(own, size)
    assert held["weights"] == 2 * 2 * 4_022_468_096  # the stage's own and the one that learns, two bytes each
    assert held["gradients"] == 4 * 33_030_144
    assert held["optimizer"] == 2 * 4 * 33_030_144
    layer = 4 * 2560 + 3 * 32 * 128 + 4 * 8 * 128 + 4 * 9728
    assert held["activations"] == 1200 * (36 * 2560 + layer) * 2  # ten documents of 120 tokens
    assert held["logits"] == 8 * 2 * 20 * 151936 * (2 + 4 + 4)  # eight pairs behind their prompts, of 141 tokens


def test_memory_of_all_weights_shared_out_over_eight(size):
    own = params(**{"alignment.lora": None, "alignment.engine.optimizer": "adamw_8bit"})
    held = estimate.memory(own, size, processes=8, sharded=True)
    # the stage's own in bfloat16; of the one that learns, an eighth of its float32 and of its bfloat16 copies
    assert held["weights"] == 4_022_468_096 * (2 + (4 + 2) / 8)
    assert held["gradients"] == 4 * 4_022_468_096 / 8
    assert held["optimizer"] == 2 * 4_022_468_096 / 8  # two numbers of one byte


def test_quantised_weights_leave_the_table_as_it_is(size):
    assert estimate.memory_of_weights(params(**{"reasoner.quantize": "8bit"}), size) == LINEAR + 2 * (NORMS + TABLE)
    assert estimate.memory_of_weights(params(**{"reasoner.quantize": "4bit"}), size) == LINEAR / 2 + 2 * (NORMS + TABLE)


@pytest.fixture
def folder(tmp_path):
    """A model's folder with a config alone: nothing else is read for an estimate."""
    Qwen3Config(**QWEN3_4B).save_pretrained(tmp_path / "qwen")
    assert json.loads((tmp_path / "qwen" / "config.json").read_text())["hidden_size"] == 2560
    return tmp_path / "qwen"


def test_a_dry_run_says_what_a_card_would_take(folder, tmp_path, capsys):
    place = ["--run-dir", str(tmp_path / "run"), "--set", f"reasoner.model={folder}", "--card", "A100"]
    assert main(["run", "params/qwen3-4b.yaml", "--dry-run", *place]) == 0
    said = capsys.readouterr().out
    assert "4,022,468,096 parameters" in said
    assert "estimate for 1 x A100" in said
    assert "RG-SFT" in said
    assert "memory a card, GiB" in said
    assert "beside what the language model takes (?)" in said  # no seconds of a tiny one
    assert [line.split()[0] for line in said.splitlines() if line.endswith("?")][:2] == [
        "02_reasoner",
        "04_reward_model",
    ]


def test_cards_and_models_that_nobody_knows(folder):
    own = params(**{"reasoner.model": str(folder)})
    with pytest.raises(ParamsError, match="--card is H10; expected one of B200"):
        estimate.describe(own, "H10")
    assert "is not on this machine" in estimate.describe(params(**{"reasoner.model": "nobody/nothing"}))
    assert "is tiny" in estimate.describe(load(ROOT / "params" / "smoke.yaml"))
    small = Qwen3Config(
        **{**QWEN3_4B, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3, "vocab_size": 99}
    )
    small.save_pretrained(folder)
    said = estimate.describe(params(**{"reasoner.model": str(folder), "run.device": "cpu"}))
    assert "estimate for 1 x this CPU; at most" in said
    assert "hours in all" in said


def test_a_launcher_shares_out_time(folder):
    own = {"reasoner.model": str(folder), "run.launcher": "torchrun --nproc_per_node 4"}
    assert "estimate for 4 x H100" in estimate.describe(params(**own), "H100")


@pytest.mark.parametrize(
    ("key", "value", "named"),
    [
        ("reasoner.quantize", "8bit", "reasoner.quantize (8bit)"),
        ("alignment.engine.optimizer", "adamw_8bit", "alignment.engine.optimizer (adamw_8bit)"),
    ],
)
def test_what_needs_cuda_is_refused_by_name_on_a_cpu(key, value, named):
    with pytest.raises(ParamsError, match=r"run on CUDA alone, and run\.device is cpu") as caught:
        params(**{key: value, "run.device": "cpu"})
    assert named in str(caught.value)


def test_a_run_without_its_gpu_ends_before_a_kernel_starts(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    run = tmp_path / "run"
    assert main(["run", "params/qwen3-4b.yaml", "--run-dir", str(run), "--set", "reasoner.quantize=8bit"]) == 1
    said = capsys.readouterr().err
    assert "run.device is cuda, and torch finds none on this machine; set run.device to auto" in said
    assert "reasoner.quantize (8bit) run on CUDA alone" in said
    assert not run.exists()


def test_an_objective_or_reward_that_somebody_wrote_is_known_by_its_name(monkeypatch):
    monkeypatch.setitem(OBJECTIVES, "hinge", OBJECTIVES["dpo"])
    monkeypatch.setitem(REWARDS, "margin", REWARDS["list"])
    named = {"alignment.dpo.objective": "hinge", "alignment.reward.form": "margin"}
    estimate.check_machine(load("params/smoke.yaml", named))
    monkeypatch.undo()
    with pytest.raises(ParamsError) as error:
        estimate.check_machine(
            load("params/smoke.yaml", {"alignment.dpo.objective": "ipoo", "alignment.reward.form": "KB"})
        )
    assert str(error.value).splitlines()[1:] == [
        "  alignment.dpo.objective is 'ipoo'; expected dpo | ipo | sft | irpo | plackett_luce | rebel; "
        "did you mean 'ipo'?",
        "  alignment.reward.form is 'KB'; expected auto | list | kb; did you mean 'kb'?",
    ]


def test_a_warm_up_and_written_queries_are_counted(size):
    """400 sessions of train, 100 of valid, 100 of test; three folds read two thirds each, and one adapter reads all."""
    own = {"reasoner.warmup": {"epochs": 2, "folds": 3}, "ranker.match": ["written_overlap"]}
    found = estimate.work(params(**own, **{"ranker.written.samples": 5}), size, 600, (30, 10)).set_index("what")
    assert found.loc["warm-up", ["read", "operations"]].tolist() == [2 * 3 * 400 * 40, 4 * size.trunk]
    written = found.loc["write queries for the match terms"].set_index("stage")["written"]
    assert written["02_reasoner"] == 500 * 5 * 10
    assert written["08_closed_loop"] == 100 * 5 * 10, "train's queries stay those of the LM before the alignment"
    plain = estimate.work(params(), size, 600)
    assert not plain["what"].str.contains("warm-up|match terms").any()


def test_a_prompt_is_as_long_as_the_tables_say(tmp_path):
    folder = tmp_path / "log"
    folder.mkdir()
    (folder / "dataset.yaml").write_text("name: log\nfeatures: {story: text, state: categorical}\n")
    stories, asked = ["x" * 100, "x" * 300], ["y" * 16, "y" * 24]
    pd.DataFrame({"session_id": ["a", "b"], "story": stories}).to_parquet(folder / "sessions.parquet")
    pd.DataFrame({"session_id": ["a", "b"], "typed_query": asked}).to_parquet(folder / "transcripts.parquet")
    found = estimate.mean_lengths(
        params(**{"data": {"source": "folder", "path": str(folder)}, "reasoner.max_tokens": 512})
    )
    assert found is not None
    assert found[0] == pytest.approx(200 / 4 + 40, abs=60 / 4), "and the instruction"
    assert found[1] == 20 / 4 + 1
    assert estimate.mean_lengths(params()) is None, "a simulated world has no tables yet"
