"""Warnings on queries made by hand: each fires alone, none on good queries, and each names a parameter that exists."""

import re
import shutil
from dataclasses import replace
from html import escape
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
from scipy.stats import binom

from rgalign.commands import estimate
from rgalign.evaluation import writing_checks as checks
from rgalign.evaluation.writing_checks import Chance
from rgalign.params import flat, load
from rgalign.reasoner.generate import repeated_share
from rgalign.report import pages

SESSIONS = 200
GOOD = [f"where is parcel number {n % 50} now" for n in range(SESSIONS)]  # 50 different ones
HITS = [1.0] * 40 + [0.0] * 160
CHANCE = Chance(SESSIONS, clicked=30, hit=0.1)
KNOWN = set(flat(load("params/smoke.yaml")))


def fired(stage="02_reasoner", queries=GOOD, hits=HITS, chance=CHANCE, reward=0.2, **how) -> list[str]:
    told = checks.figures(queries, hits) | {"reward": reward}
    return checks.warnings_of(stage, told, chance, **how)["check"].tolist()


@pytest.mark.parametrize("stage", ["02_reasoner", "05_rg_sft", "06_rg_dpo"])
def test_good_queries_warn_of_nothing(stage):
    assert fired(stage) == []
    assert "no warning" in repr(checks.Box(checks.none()))


@pytest.mark.parametrize("stage", ["02_reasoner", "05_rg_sft", "06_rg_dpo"])
def test_each_warning_fires_alone(stage):
    assert fired(stage, queries=[f"my parcel {n % 29} is late" for n in range(SESSIONS)]) == ["distinct"]
    assert fired(stage, queries=[f"my parcel {n % 30} is late" for n in range(SESSIONS)]) == []
    repeats = [f"{query} and where is parcel" if n < 21 else query for n, query in enumerate(GOOD)]
    assert fired(stage, queries=repeats) == ["repeated"]
    assert fired(stage, queries=repeats[1:] + GOOD[:1]) == [], "a tenth of them is not more than a tenth"
    assert fired(stage, hits=[1.0] * 20 + [0.0] * 180) == ["ihr@1"]
    assert fired(stage, reward=-0.01) == ([] if stage == "02_reasoner" else ["reward"])


@pytest.mark.parametrize("hit", [0.02, 0.1, 0.4])
def test_chance_is_left_behind_by_a_binomial_test(hit):
    """The first number of hits that so many draws by chance would reach in at most one case of twenty."""
    needed = next(k for k in range(SESSIONS) if binom.sf(k - 1, SESSIONS, hit) <= 0.05)
    chance = replace(CHANCE, hit=hit)
    for hits, expected in ((needed, []), (needed - 1, ["ihr@1"])):
        assert fired(hits=[1.0] * hits + [0.0] * (SESSIONS - hits), chance=chance) == expected


def test_repetition_by_hand():
    assert repeated_share([]) == 0
    for text in ("no no no no", "a b a b a b", "where is it and where is it"):
        assert repeated_share([text]) == 1, text
    for text in ("", "no no no", "where is it", "where is my parcel and where is her parcel"):
        assert repeated_share([text]) == 0, text
    assert repeated_share(["no no no no", "where is it"]) == 0.5


def test_chance_of_a_small_shop_by_hand():
    """Train clicked a most; of four sessions of valid one clicked a, one both b and c, two b: a hits one of four."""
    sessions = pd.DataFrame({"session_id": list("tuvwxyz"), "split": ["train"] * 3 + ["valid"] * 4})
    rows = [("t", "a", 1), ("u", "a", 1), ("v", "b", 1), ("v", "a", 0), ("w", "a", 1), ("x", "b", 1), ("x", "c", 1)]
    rows += [("y", "b", 1), ("z", "b", 1), ("z", "a", 0)]
    shop = SimpleNamespace(
        sessions=sessions,
        impressions=pd.DataFrame(rows, columns=["session_id", "intent_id", "clicked"]),
        intents=pd.DataFrame({"intent_id": list("abcdefghij")}),
    )
    assert Chance.of(shop, list("wxyz")) == Chance(4, clicked=3, hit=0.25)
    assert Chance.of(shop, list("xyz")) == Chance(3, clicked=2, hit=0.1), "a draw from the KB is the better guess"


def test_what_was_not_judged_is_no_fault():
    told = checks.figures(GOOD, [np.nan] * SESSIONS)
    assert "ihr@1" not in told
    assert checks.warnings_of("05_rg_sft", {**told, "reward": np.nan, "ihr@1": np.nan}, CHANCE).empty


def test_a_data_set_without_a_question_is_told_before_and_after(tmp_path):
    asked = pd.DataFrame({"session_id": list("wxyz"), "candidate": -1, "query": ["a", "b", "c", "d"]})
    hits = pd.DataFrame({"session_id": list("wxyz"), "ihr@1": [1.0] * 4})
    clicks = pd.DataFrame({"session_id": list("wxyz"), "intent_id": list("abcd"), "clicked": 1})
    sessions = pd.DataFrame({"session_id": list("wxyz"), "split": "valid"})
    shop = SimpleNamespace(sessions=sessions, impressions=clicks, intents=clicks[["intent_id"]])
    before = checks.of_reasoner(asked, hits, shop, trained_here=True, asked=False)
    assert before["check"].tolist() == ["transcripts"]
    assert "has never seen a question" in repr(checks.Box(before))
    assert checks.of_reasoner(asked, hits, shop, trained_here=True, asked=True).empty
    assert checks.of_reasoner(asked, hits, shop, trained_here=False, asked=False).empty
    assert checks.of_reasoner(asked.iloc[:0], hits.iloc[:0], shop, trained_here=True, asked=False).empty, "an encoder"
    after = checks.after_tuning("05_rg_sft", checks.figures(GOOD, HITS), CHANCE, before)
    assert after[["stage", "check"]].to_numpy().tolist() == [["05_rg_sft", "transcripts"]]
    (tmp_path / "shop").mkdir()
    folder = {"data.source": "folder", "data.path": str(tmp_path / "shop")}
    assert "has never seen a question" in estimate.pretraining_note(load("params/smoke.yaml", folder))
    off = {"alignment.sft.use": False, "alignment.dpo.use": False}
    for silent in (off, {"alignment.loop.rounds": 0}, {"reasoner.model": "some/model", "reasoner.others": []}):
        assert estimate.pretraining_note(load("params/smoke.yaml", folder | silent)) == ""
    (tmp_path / "shop" / "transcripts.parquet").touch()
    assert (
        estimate.pretraining_note(load("params/smoke.yaml", folder))
        == estimate.pretraining_note(load("params/smoke.yaml"))
        == ""
    )
    assert estimate.pretraining_note(load("params/smoke.yaml", {"data.world.transcripts": 0}))


def test_what_was_wrong_before_a_step_is_not_blamed_on_it():
    before = checks.warnings_of("02_reasoner", checks.figures(["hello"] * SESSIONS, HITS), CHANCE)
    told = checks.figures(["hello"] * SESSIONS, HITS[20:] + [0.0] * 20)
    now = checks.after_tuning("05_rg_sft", told, CHANCE, before).set_index("check")["change"]
    assert now["distinct"] == checks.CHANGE["02_reasoner"]
    assert now["ihr@1"] == checks.CHANGE["05_rg_sft"], "this one is new"


def test_every_warning_names_parameters_that_exist():
    texts = [*checks.CHANGE.values(), *checks.REWARD.values(), checks.PRETRAINED, checks.NEVER_ASKED[1]]
    for text in texts:
        named = re.findall(r"(?:alignment|reasoner|data)\.[a-z_.]+", text)
        assert named, text
        assert set(named) <= KNOWN | {"reasoner.tiny.hidden"}, text


@pytest.mark.slow
def test_the_report_repeats_what_the_notebooks_warn_of(aligned_run, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(aligned_run[0], run)
    said = {name: pd.read_parquet(run / name) for name in checks.TABLES}
    assert said[checks.TABLES[0]]["stage"].eq("02_reasoner").all()
    hostile = said[checks.TABLES[1]].iloc[:0]
    hostile.loc[0] = ["05_rg_sft", "reward", -1.0, 0.0, "the <b>reward</b> is low", "alignment.sft.use"]
    hostile.to_parquet(run / checks.TABLES[1])
    page = pages.write(run)[0].read_text(encoding="utf-8")
    assert "the &lt;b&gt;reward&lt;/b&gt; is low" in page
    for name in (checks.TABLES[0], checks.TABLES[2]):
        assert all(escape(text) in page for text in said[name]["warning"])
    for name in checks.TABLES:
        checks.none().to_parquet(run / name)
    assert "can this language model write" not in pages.write(run)[0].read_text(encoding="utf-8")


def test_a_box_shows_each_warning_and_escapes_it():
    table = checks.warnings_of("05_rg_sft", {"distinct": 0.01, "reward": -1.0}, CHANCE).assign(change="<script>")
    page = checks.Box(table)._repr_html_()
    assert page.count("<li>") == 2
    assert "<script>" not in page
    assert "&lt;script&gt;" in page
