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

from rgalign import plots
from rgalign.data import labels
from rgalign.data.prompts import Prompter
from rgalign.data.tables import read
from rgalign.evaluation import report
from rgalign.reasoner import tokenizer

HOSTILE = [*PLAIN.values(), *CONTROL.values()]


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
    return write_raw(folder, tables, meta)


@pytest.fixture(scope="module")
def hostile_run(tmp_path_factory) -> Path:
    """Notebooks 01, 02, 03 and 09 over that shop, without alignment; their folder holds the shop and the run alone."""
    folder = tmp_path_factory.mktemp("hostile")
    own = {"data.source": "folder", "data.path": str(hostile_shop(folder / "shop")), "alignment.loop.rounds": 0}
    own |= {"data.dev_users": 0.3, "ranker.models": ["two_tower_text", "qe_rec"]}
    for name in ("01_data", "02_reasoner", "03_rankers", "09_evaluation"):
        small_run.play(name, folder / "run", own)
    return folder


class Page(HTMLParser):
    def __init__(self, text: str):
        super().__init__()
        self.tags, self.handlers = set(), set()
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.add(tag)
        self.handlers |= {name for name, _ in attributes if name.startswith("on")}


def test_a_run_writes_where_it_should_and_nowhere_else(hostile_run):
    assert sorted(path.name for path in hostile_run.iterdir()) == ["run", "shop"]
    assert {path.name for path in (hostile_run / "run").iterdir()} <= {
        *("tables", "models", "figures", "work"),
        *("params.yaml", "manifest.json", "report.html", "model_card.md"),
    }
    assert not Path("/tmp/owned").exists()
    results = pd.read_parquet(hostile_run / "run/tables/results.parquet")
    assert results.value.notna().any()


def test_its_report_shows_the_text_and_runs_none_of_it(hostile_run):
    html, card = report.write(hostile_run / "run")
    page = Page(html.read_text(encoding="utf-8"))
    assert not page.handlers
    assert "script" not in page.tags
    assert "<script" not in card.read_text(encoding="utf-8")
    assert "&lt;script&gt;" in html.read_text(encoding="utf-8")


def test_its_figures_are_pictures(hostile_run):
    paths = sorted((hostile_run / "run/figures").rglob("*.png"))
    assert len(paths) > 5
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


def test_its_sheet_for_people_holds_no_formula(hostile_run, tmp_path):
    shop = read(hostile_run / "shop", splits=("train", "valid", "test"))
    paths = labels.export_sheet(
        tmp_path / "sheet.csv", shop.sessions, shop.intents, kinds=shop.kinds, features=list(shop.kinds)
    )
    for path in paths:
        cells = pd.read_csv(path, dtype=str, keep_default_na=False, encoding="utf-8-sig").to_numpy().ravel()
        assert not [cell for cell in cells if cell.startswith(("=", "+", "-", "@", "\t", "\r"))]
    assert labels.read_sheet(paths[0], shop.sessions, shop.intents).empty


def test_no_text_yields_a_token_that_steers(hostile_run):
    """Of every session, intent and query: between head and tail stands no special token, whatever was written."""
    shop = read(hostile_run / "shop", splits=("train", "valid", "test"))
    features = list(shop.kinds)
    counts = tokenizer.count_words(
        features=features, kinds=shop.kinds, intents=shop.intents, transcripts=shop.transcripts
    )
    prompter = Prompter(tokenizer.build(counts, min_count=1), features=features, kinds=shop.kinds)
    steering = {prompter.tokenizer.convert_tokens_to_ids(name) for name in ("<|pad|>", "<|ask|>", "<|end|>")}
    prompts = [*prompter.sessions(shop.sessions), *prompter.intents(shop.intents)]
    for ids in prompts:
        assert not steering & set(ids[len(prompter.head) : len(ids) - len(prompter.tail)])
    for ids in prompter.queries([CHAT, INJECTION, *HOSTILE]):
        assert not steering & set(ids[:-1])
