"""Text of customers and of the knowledge base is data: whatever it says, no file, figure, page or token obeys it."""

from html.parser import HTMLParser
from pathlib import Path

import pandas as pd
import pyarrow as pa
import pytest
import small_run
from matplotlib.figure import Figure
from PIL import Image
from small_shop import good_shop
from table_changes import put, write_raw
from text_faults import CHAT, CONTROL, FORMATS, FORMULA, HTML, INJECTION, MATHS, PATHS, PLAIN, feature_called, id_became

import rgalign
from rgalign.alignment import contrastive as rg_cl
from rgalign.alignment import dpo as rg_dpo
from rgalign.alignment import rewarding
from rgalign.alignment import sft as rg_sft
from rgalign.data import labels
from rgalign.data.tables import read
from rgalign.reasoner.prompts import Prompter
from rgalign.reasoner.tiny import build_tokenizer, count_words
from rgalign.report import pages as report
from rgalign.report import plots

HOSTILE = [*PLAIN.values(), *CONTROL.values()]
STEERING = ("<|pad|>", "<|ask|>", "<|end|>")


def hostile_shop(folder: Path) -> Path:
    """Every title, description, text and value of a feature is hostile; so are ids, a column's name and the shop's."""
    tables, meta = good_shop()
    intents, sessions = (tables[name].num_rows for name in ("intents", "sessions"))
    for table, column, rows in (
        ("intents", "title", intents),
        ("intents", "description", intents),
        ("intents", "category", intents),
        ("sessions", "event_text", sessions),
        ("sessions", "device", sessions),
    ):
        put(table, column, pa.array([HOSTILE[row % len(HOSTILE)] for row in range(rows)]))(tables, meta)
    put("sessions", "seen", pa.array([[HOSTILE[row % len(HOSTILE)], PATHS] for row in range(sessions)]))(tables, meta)
    queries = [HOSTILE[row % len(HOSTILE)] for row in range(tables["transcripts"].num_rows)]
    put("transcripts", "typed_query", pa.array(queries))(tables, meta)
    for table, column in (("sessions", "session_id"), ("intents", "intent_id")):
        for number, text in enumerate((PATHS, FORMULA, HTML, FORMATS, "/tmp/owned")):
            id_became(column, tables[table][column][number].as_py(), text)(tables, meta)
    feature_called(r"../$\x$<b>")(tables, meta)
    meta["name"] = f"../{HTML}"
    del tables["truth"], meta["world"]  # its ids are no longer ShopWorld's
    return write_raw(folder, tables, meta)


@pytest.fixture(scope="module")
def taught() -> dict[str, list[list[int]]]:
    """prompts and queries as token ids: all that the alignment of `hostile_run` trained the reasoner on."""
    return {"prompts": [], "queries": []}


@pytest.fixture(scope="module")
def hostile_run(taught, tmp_path_factory) -> Path:
    """Notebooks 01 to 10 over that shop; what the LLMs write is hostile too. Their folder holds shop and run alone."""
    folder = tmp_path_factory.mktemp("hostile")
    hostile_shop(folder / "shop")
    with pytest.MonkeyPatch.context() as patch:
        obeying(patch, taught)
        for name in ("01_data", "02_reasoner", "03_rankers", *small_run.ALIGNMENT, "09_evaluation", "10_ab_test"):
            small_run.play(name, folder / "run", settings(folder))
    return folder


def settings(folder: Path) -> dict:
    """What the run changes of small_run.SMALL."""
    own = {"data.source": "folder", "data.path": str(folder / "shop"), "data.dev_users": 0.3}
    return own | {"ranker.models": ["two_tower_text", "qe_rec"]}


def obeying(patch: pytest.MonkeyPatch, taught: dict[str, list]) -> None:
    """LLMs that write what a text has told them to write; and a note of what the three steps are given."""
    write, sft, dpo, contrastive = rewarding.write_candidates, rg_sft.sft, rg_dpo.dpo, rg_cl.contrastive

    def candidates(*given) -> pd.DataFrame:
        table = write(*given)
        return table.assign(query=[HOSTILE[row % len(HOSTILE)] for row in range(len(table))])

    def note(prompts, *queries) -> None:
        taught["prompts"] += prompts
        taught["queries"] += [query for side in queries for query in side]

    def noted_sft(reasoner, prompts, queries, *how, **more):
        note(prompts, queries)
        return sft(reasoner, prompts, queries, *how, **more)

    def noted_dpo(reasoner, pairs, *how, **reference):
        note(pairs.prompts, pairs.chosen, pairs.rejected)
        return dpo(reasoner, pairs, *how, **reference)

    def noted_cl(reasoner, sessions, *how):
        note(sessions.prompts, sessions.queries)
        return contrastive(reasoner, sessions, *how)

    patch.setattr(rewarding, "write_candidates", candidates)
    patch.setattr(rg_sft, "sft", noted_sft)
    patch.setattr(rg_dpo, "dpo", noted_dpo)
    patch.setattr(rg_cl, "contrastive", noted_cl)


class Page(HTMLParser):
    def __init__(self, text: str):
        super().__init__()
        self.tags, self.handlers = set(), set()
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.add(tag)
        self.handlers |= {name for name, _ in attributes if name.startswith("on")}


@pytest.mark.slow
def test_a_run_writes_where_it_should_and_nowhere_else(hostile_run):
    assert sorted(path.name for path in hostile_run.iterdir()) == ["run", "shop"]
    assert {path.name for path in (hostile_run / "run").iterdir()} <= {
        *("tables", "models", "figures", "work"),
        *("params.yaml", "manifest.json", "report.html", "model_card.md"),
        ".stage.lock",  # empty: filelock keeps the file of a lock that is free
    }
    assert not Path("/tmp/owned").exists()
    results = pd.read_parquet(hostile_run / "run/tables/results.parquet")
    assert results[results.model == "rgalign_rec"].value.notna().any()


@pytest.mark.slow
def test_its_report_shows_the_text_and_runs_none_of_it(hostile_run):
    html, card = report.write(hostile_run / "run")
    page = Page(html.read_text(encoding="utf-8"))
    assert not page.handlers
    assert "script" not in page.tags
    assert "<script" not in card.read_text(encoding="utf-8")
    assert "&lt;script&gt;" in html.read_text(encoding="utf-8")


@pytest.mark.slow
def test_its_figures_are_pictures(hostile_run):
    paths = sorted((hostile_run / "run/figures").rglob("*.png"))
    assert len(paths) > 20
    for path in paths:
        with Image.open(path) as picture:
            assert picture.size[0] > 100


@pytest.mark.parametrize("text", [MATHS, "$", r"$\x$", r"\$", "${", "a$b$c_d^e"])
def test_a_dollar_in_a_label_is_a_dollar(text):
    """matplotlib reads what stands between two dollars as mathematics, and fails on what is none."""
    figure = plots.feature_values(pd.DataFrame({"feature": [text] * 2, "value": [text, "b"], "share": [0.5, 0.5]}))
    assert isinstance(figure, Figure)
    figure.canvas.draw()
    assert figure.axes[0].get_title().replace(r"\$", "$") == text


@pytest.mark.slow
def test_its_sheet_for_people_holds_no_formula(hostile_run, tmp_path):
    shop = read(hostile_run / "shop", splits=("train", "valid", "test"))
    paths = labels.export_sheet(
        tmp_path / "sheet.csv", shop.sessions, shop.intents, kinds=shop.kinds, features=list(shop.kinds)
    )
    for path in paths:
        cells = pd.read_csv(path, dtype=str, keep_default_na=False, encoding="utf-8-sig").to_numpy().ravel()
        assert not [cell for cell in cells if cell.startswith(("=", "+", "-", "@", "\t", "\r"))]
    assert labels.read_sheet(paths[0], shop.sessions, shop.intents).empty


@pytest.mark.slow
def test_no_text_yields_a_token_that_steers(hostile_run):
    """Of every session, intent and query: between head and tail stands no special token, whatever was written."""
    shop = read(hostile_run / "shop", splits=("train", "valid", "test"))
    features = list(shop.kinds)
    counts = count_words(features=features, kinds=shop.kinds, intents=shop.intents, transcripts=shop.transcripts)
    prompter = Prompter(build_tokenizer(counts, min_count=1), features=features, kinds=shop.kinds)
    steering = {prompter.tokenizer.convert_tokens_to_ids(name) for name in STEERING}
    prompts = [*prompter.sessions(shop.sessions), *prompter.intents(shop.intents)]
    for ids in prompts:
        assert not steering & set(ids[len(prompter.head) : len(ids) - len(prompter.tail)])
    for ids in prompter.queries([CHAT, INJECTION, *HOSTILE]):
        assert not steering & set(ids[:-1])


@pytest.mark.slow
def test_candidates_and_preferences_are_kept_as_they_were_written(hostile_run):
    tables = hostile_run / "run/tables"
    assert set(pd.read_parquet(tables / "candidates.parquet")["query"]) == set(HOSTILE)
    preferences = pd.read_parquet(tables / "preferences.parquet")
    assert len(preferences) > 5
    assert set(preferences.chosen) | set(preferences.rejected) <= set(HOSTILE)


@pytest.mark.slow
def test_the_alignment_is_taught_no_token_that_steers(hostile_run, taught):
    """Of RG-SFT, RG-DPO and RG-CL: special tokens frame a prompt and end a query, and stand nowhere else."""
    prompter = rgalign.load(hostile_run / "run").prompter
    steering = {prompter.tokenizer.convert_tokens_to_ids(name) for name in STEERING}
    assert len(taught["queries"]) > len(taught["prompts"]) > 50
    for ids in taught["prompts"]:
        assert ids[len(ids) - len(prompter.tail) :] == list(prompter.tail)
        assert not steering & set(ids[len(prompter.head) : len(ids) - len(prompter.tail)])
    for *words, end in taught["queries"]:
        assert end == prompter.end_id
        assert not steering & set(words)


@pytest.mark.slow
def test_the_tours_pages_show_the_text_and_run_none_of_it(hostile_run):
    explorer = small_run.play("00_tour", hostile_run / "run", settings(hostile_run))["explorer"]
    pages = [explorer.page(session) for session in explorer.sessions.session_id]
    assert any("&lt;script&gt;" in page for page in pages)
    for page in map(Page, pages):
        assert not page.handlers
        assert page.tags <= {"p", "b", "pre", "table", "thead", "tbody", "tr", "th", "td"}
