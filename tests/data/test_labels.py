"""The labelling sheet: out, filled in as a human would with a spreadsheet, and back."""

import csv
import io
import itertools

import pandas as pd
import pyarrow as pa
import pytest
from builders import good_meta, good_tables
from every import every
from table_changes import replaced, write_raw

from rgalign.data import tables
from rgalign.data.labels import (
    LONGEST_CELL,
    LONGEST_VALUE,
    LabelError,
    export_sheet,
    read_sheet,
    with_labels_of_run,
    write_labels,
)

KINDS = {"state": "categorical", "amount": "numeric", "note": "text", "visited": "history", "secret": "text"}
INTENTS = pd.DataFrame(
    {
        "intent_id": ["i_refund", "i_track", "-odd"],
        "title": ["Refund", "Track, please", None],
        "description": ["Money back", '=HYPERLINK("x")', ""],
        "category": ["after", None, "before"],
    }
)
SESSIONS = pd.DataFrame(
    {
        "session_id": ["s0", "=s1", "007", "'s3"],
        "user_id": ["anna", "ben", "carl", "dora"],
        "state": ["paid", None, "open", ""],
        "amount": [1234567.5, 7.0, None, None],
        "note": ['late;\n"very"\u202e late', "@me", None, "café ไทย"],
        "visited": [["i_track", "home"], [], None, ["-odd"]],
        "secret": ["4111 1111"] * 4,
    }
)
SHOWN = ["note", "state", "amount", "visited"]


def export(folder, sessions=SESSIONS, **more):
    return export_sheet(folder / "sheet.csv", sessions, INTENTS, kinds=KINDS, **{"features": SHOWN, **more})


def cells(path, delimiter=","):
    with path.open(encoding="utf-8-sig", newline="") as file:
        return list(csv.reader(file, delimiter=delimiter))


def fill(path, intents, *, delimiter=",", encoding="utf-8-sig"):
    """What a human does: one intent a row, saved by her program."""
    rows = cells(path)
    for row, intent in zip(rows[1:], intents, strict=True):
        row[-1] = intent
    with path.open("w", encoding=encoding, newline="") as file:
        csv.writer(file, delimiter=delimiter).writerows(rows)
    return path


def test_the_sheet_shows_a_session_in_words_and_nothing_else_of_it(tmp_path):
    sheet, kb = export(tmp_path)
    assert sheet.read_bytes().startswith(b"\xef\xbb\xbf")
    assert cells(sheet) == [
        ["session_id", "session", "intent_id"],
        ["s0", 'note: late; "very" late\nstate: paid\namount: 1234567.5\nvisited: Track, please; home', ""],
        ["'=s1", "note: @me\namount: 7", ""],
        ["007", "state: open", ""],
        ["''s3", "note: café ไทย\nvisited: -odd", ""],
    ]
    assert cells(kb) == [
        ["intent_id", "title", "description", "category"],
        ["i_refund", "Refund", "Money back", "after"],
        ["i_track", "Track, please", '\'=HYPERLINK("x")', ""],
        ["'-odd", "", "", "before"],
    ]


@pytest.mark.parametrize("feature", ["=1+1", "+1", "-1", "@SUM(A1)", "\t=1", "\r=1"])
def test_no_cell_begins_as_a_formula(tmp_path, feature):
    sessions = SESSIONS.assign(**{"session_id": [f"{feature}{row}" for row in range(4)]})
    intents = INTENTS.assign(title=feature, category=feature)
    for path in export_sheet(tmp_path / "s.csv", sessions, intents, kinds=KINDS, features=["note"]):
        assert not any(cell.startswith(("=", "+", "-", "@", "\t", "\r")) for row in cells(path) for cell in row)


@pytest.mark.parametrize(("delimiter", "encoding"), [(",", "utf-8-sig"), (";", "utf-8"), ("\t", "utf-8-sig")])
def test_a_filled_sheet_comes_back_as_labels(tmp_path, delimiter, encoding):
    sheet, _ = export(tmp_path)
    fill(sheet, ["i_track", " '-odd ", "", "-odd"], delimiter=delimiter, encoding=encoding)
    labels = read_sheet(sheet, SESSIONS, INTENTS)
    assert labels.to_dict("list") == {"session_id": ["s0", "=s1", "'s3"], "intent_id": ["i_track", "-odd", "-odd"]}


def test_labels_have_the_types_of_the_table(tmp_path):
    sheet, _ = export(tmp_path)
    for filled in (["i_track", "", "", ""], ["", "", "", ""]):
        labels = read_sheet(fill(sheet, filled), SESSIONS, INTENTS)
        assert (labels.dtypes == pd.ArrowDtype(pa.large_string())).all()
        assert len(labels) == sum(map(bool, filled))


def test_labels_of_a_world_are_written_with_it(tmp_path):
    """Through the data set's own reader and writer: the table passes every check."""
    folder = write_raw(tmp_path / "shop", good_tables(), good_meta())
    dataset = tables.read(folder)
    kinds, features = dataset.kinds, list(dataset.kinds)
    sheet, _ = export_sheet(tmp_path / "s.csv", dataset.sessions, dataset.intents, kinds=kinds, features=features)
    assert cells(sheet)[1][1] == "state: paid\namount: 0\nnote: gift\nvisited: a; b"
    rows = len(dataset.sessions)
    labels = read_sheet(fill(sheet, ["i1"] * rows), dataset.sessions, dataset.intents)
    assert labels.session_id.tolist() == dataset.sessions.session_id.tolist()
    (folder / "labels.parquet").unlink()
    labels.to_parquet(folder / "labels.parquet", index=False)
    assert not tables.check(folder).errors


def test_every_fault_of_a_sheet_is_told_at_once(tmp_path):
    sheet, _ = export(tmp_path)
    sheet.write_text(
        "session_id,intent_id\ns0,i_trak\ns9,i_track\n=s1,i_track\n'=s1,i_refund\n007,i_trak\ns8,\n,i_track\n",
        encoding="utf-8",
    )
    with pytest.raises(LabelError) as caught:
        read_sheet(sheet, SESSIONS, INTENTS)
    assert str(caught.value).splitlines()[1:] == [
        "  intent_id 'i_trak' is not known (rows 2, 6); did you mean 'i_track'?",
        "  session_id 's9' is not known (row 3)",
        "  session_id '=s1' is labelled 2 times (rows 4, 5)",
        "  session_id '' is not known (row 8)",
        "Nothing was read.",
    ]
    assert "fails 4 checks" in str(caught.value)


def test_a_sheet_of_another_form_is_refused(tmp_path):
    sheet = tmp_path / "sheet.csv"
    for text, fault in (("session,intent\n", "no column session_id; did you mean 'session'?"), ("", "no column")):
        sheet.write_text(text, encoding="utf-8")
        with pytest.raises(LabelError, match="fails 2 checks") as caught:
            read_sheet(sheet, SESSIONS, INTENTS)
        assert fault in str(caught.value)
    sheet.write_bytes("session_id,intent_id\ncafé,i\n".encode("cp1252"))
    with pytest.raises(LabelError, match="is not UTF-8"):
        read_sheet(sheet, SESSIONS, INTENTS)


def test_nobodys_labels_are_written_over(tmp_path):
    sheet, kb = export(tmp_path)
    before = sheet.read_bytes()
    with pytest.raises(FileExistsError, match="may hold labels"):
        export(tmp_path)
    assert sheet.read_bytes() == before
    sheet.unlink()
    with pytest.raises(FileExistsError, match=kb.name):
        export(tmp_path)


def test_unknown_columns_and_other_suffixes_are_refused(tmp_path):
    with pytest.raises(LabelError, match="'stat'; did you mean 'state'") as caught:
        export(tmp_path, features=["stat", "user_id", "note"])
    assert "'user_id'" in str(caught.value)
    with pytest.raises(LabelError, match=r"no \.csv"):
        export_sheet(tmp_path / "sheet.xlsx", SESSIONS, INTENTS, kinds=KINDS, features=SHOWN)
    assert not list(tmp_path.iterdir())


def test_long_texts_are_cut_and_the_sheet_comes_back(tmp_path):
    kinds = {f"text_{number}": "text" for number in range(40)} | {"visited": "history"}
    row = dict.fromkeys(list(kinds)[:-1], "\U0001f600" * 1_000_000) | {"visited": [["i_track"] * 5_000]}
    sessions = pd.DataFrame({"session_id": ["s0"], **row})
    intents = INTENTS.assign(description="d" * 1_000_000)
    how = {"kinds": kinds, "features": ["visited", *list(kinds)[:-1]]}
    sheet, kb = export_sheet(tmp_path / "sheet.csv", sessions, intents, **how)
    shown = cells(sheet)[1][1]
    assert all(
        len(cell.encode("utf-16-le")) // 2 <= 32_767 for path in (sheet, kb) for row in cells(path) for cell in row
    )
    assert len(shown) == LONGEST_CELL
    visited, text = shown.split("\n")[:2]
    for line, name in ((visited, "visited: "), (text, "text_0: ")):
        assert line.endswith(" [...]")
        assert len(line) == len(name) + LONGEST_VALUE
    assert read_sheet(fill(sheet, ["i_track"]), sessions, intents).intent_id.tolist() == ["i_track"]


def test_a_text_of_just_the_length_is_whole(tmp_path):
    sessions = SESSIONS.head(1).assign(note="n" * LONGEST_VALUE)
    sheet, _ = export(tmp_path, sessions, features=["note"])
    assert cells(sheet)[1][1] == "note: " + "n" * LONGEST_VALUE


def test_what_is_no_csv_is_told_with_its_line(tmp_path):
    sheet = tmp_path / "sheet.csv"
    sheet.write_text(f'session_id,session,intent_id\ns0,"a\nb",i_track\n007,{"x" * 200_000},\n', encoding="utf-8")
    with pytest.raises(LabelError, match="row 3, which begins in line 4, is no CSV: field larger"):
        read_sheet(sheet, SESSIONS, INTENTS)
    sheet.write_text('session_id,session,intent_id\ns0,"a,i_track\n007,b,i_track\n', encoding="utf-8")
    with pytest.raises(LabelError, match="row 2, which begins in line 2"):  # an open quotation mark swallows no row
        read_sheet(sheet, SESSIONS, INTENTS)
    with pytest.raises(LabelError, match=r"sheet\.xlsx fails 1 check.*\n.*save the sheet as 'CSV UTF-8'"):
        read_sheet(tmp_path / "sheet.xlsx", SESSIONS, INTENTS)


def test_labels_of_a_run_stand_before_those_of_its_data_set(tmp_path):
    folder = write_raw(tmp_path / "shop", good_tables(), good_meta())  # its own label: s9 wants i1
    shop = tables.read(folder, splits=("test",))
    assert with_labels_of_run(shop, None, folder) is shop
    path = tmp_path / "labels.parquet"
    for given, expected in (({"s8": "i0"}, {"s8": "i0", "s9": "i1"}), ({"s9": "i3"}, {"s9": "i3"}), ({}, {"s9": "i1"})):
        frame = pd.DataFrame({"session_id": list(given), "intent_id": list(given.values())}, dtype="string[pyarrow]")
        write_labels(path, frame, folder)
        found = with_labels_of_run(shop, path, folder).labels
        assert dict(zip(found.session_id, found.intent_id, strict=True)) == expected


def test_labels_made_for_other_sessions_of_the_same_ids_are_refused(tmp_path):
    folder = write_raw(tmp_path / "shop", good_tables(), good_meta())
    path = tmp_path / "labels.parquet"
    write_labels(path, pd.DataFrame({"session_id": ["s8"], "intent_id": ["i0"]}), folder)
    shop = tables.read(folder, splits=("test",))
    others = good_tables()
    others["sessions"] = replaced(others["sessions"], "note", ["another"] * len(others["sessions"]))
    write_raw(folder, others, good_meta())
    with pytest.raises(LabelError, match="not made for the sessions of"):
        with_labels_of_run(shop, path, folder)


FILLED = ["i_track", "i_refund", "", "-odd"]
EXPECTED = {"s0": "i_track", "=s1": "i_refund", "'s3": "-odd"}


def saved(folder, delimiter, end, quoting):
    """The filled sheet as text, as a program of one's own writes it."""
    sheet, _ = export(folder)
    rows = cells(fill(sheet, FILLED))
    text = io.StringIO(newline="")
    csv.writer(text, delimiter=delimiter, lineterminator=end, quoting=quoting).writerows(rows)
    return text.getvalue()


ENCODINGS = {
    "utf-8": lambda text: text.encode(),
    "utf-8-sig": lambda text: text.encode("utf-8-sig"),
    "utf-16": lambda text: text.encode("utf-16"),
    "utf-16-be with a mark": lambda text: ("\ufeff" + text).encode("utf-16-be"),
    "two marks": lambda text: ("\ufeff" + text).encode("utf-8-sig"),
}
SAVED = [*itertools.product(ENCODINGS, [",", ";", "\t"], ["\r\n", "\n", "\r"], ["", "sep={}", '"sep={}"', "SEP={}"])]


def test_a_sheet_is_read_as_spreadsheet_programs_save_it(tmp_path):
    every({repr(case): case for case in SAVED}, read_as_saved, tmp_path)


def read_as_saved(case, folder):
    encoding, delimiter, end, first = case
    quoting = csv.QUOTE_ALL if end == "\r" else csv.QUOTE_MINIMAL  # which would leave a cell's own line feeds bare
    text = (first.format(delimiter) + end if first else "") + saved(folder, delimiter, end, quoting)
    path = folder / "saved.csv"
    path.write_bytes(ENCODINGS[encoding](text))
    labels = read_sheet(path, SESSIONS, INTENTS)
    assert dict(zip(labels.session_id, labels.intent_id, strict=True)) == EXPECTED


HEAD = "session_id,session,intent_id\n"
PART = "is a part of a row: fewer cells than the header, and"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (HEAD + '"s0","note: a\nstate: b, c","i_track"\n', {"s0": "i_track"}),  # broken inside quotation marks: one row
        (HEAD + "s0,note: a\nstate: b,i_track\n", [f"row 3 {PART} 'state: b', which is no session, first"]),
        (HEAD + "s0,a\nb\nc,i_track\n007,,i_refund\n", [f"row 3 {PART} 'b'", f"row 4 {PART} 'c'"]),
        ("session_id,intent_id,session\ns0,i_track,a\nb\n", [f"row 3 {PART} 'b'"]),
        (HEAD + "s0,late, very late,i_track\n", ["row 2 has 4 cells, and the header 3"]),
        (HEAD + "s0,late,,i_track\n", ["row 2 has 4 cells, and the header 3"]),
        (HEAD + "s0,late,i_track,,\n", {"s0": "i_track"}),  # empty cells behind
        (HEAD + "s0,late\n007,a,i_track\n", {"007": "i_track"}),  # an empty last cell is left out
        (HEAD + "\n,,\ns0,a,i_track\n,,\n\n", {"s0": "i_track"}),
        ("session_id,intent_id,intent_id\ns0,i_track,\n", ["has 2 columns intent_id; expected one"]),
        (HEAD + "s0,a,i_track\nb,i_refund\n", [f"row 3 {PART} 'b'"]),
        ("sep=;\nsession_id;intent_id\ns0;i_trak\n", ["'i_trak' is not known (row 2); did you mean 'i_track'?"]),
    ],
)
def test_no_row_is_dropped_silently(tmp_path, text, expected):
    """A dictionary: what is read; a list: what is told, each with its row."""
    path = tmp_path / "sheet.csv"
    path.write_text(text, encoding="utf-8", newline="")
    if isinstance(expected, dict):
        labels = read_sheet(path, SESSIONS, INTENTS)
        assert dict(zip(labels.session_id, labels.intent_id, strict=True)) == expected
        return
    with pytest.raises(LabelError) as caught:
        read_sheet(path, SESSIONS, INTENTS)
    told = str(caught.value).splitlines()[1:-1]
    assert len(told) == len(expected)
    assert all(part in line for part, line in zip(expected, told, strict=True)), told


@pytest.mark.parametrize("encoding", ["utf-16-le", "utf-16-be"])
def test_utf_16_without_its_mark_is_told(tmp_path, encoding):
    path = tmp_path / "sheet.csv"
    path.write_bytes((HEAD + "s0,a,i_track\n").encode(encoding))
    with pytest.raises(LabelError, match="holds NUL characters, as UTF-16 without"):
        read_sheet(path, SESSIONS, INTENTS)
