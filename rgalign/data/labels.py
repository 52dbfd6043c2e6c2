"""Human labels: a sheet to fill in with any spreadsheet program, and the way back to the table `labels`."""

import csv
import io
import re
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd

from rgalign.data.schema import STRING, location
from rgalign.data.tables import Dataset
from rgalign.errors import SHOWN, UserError, nearest, safe_repr
from rgalign.run import artifacts

COLUMNS = ("session_id", "session", "intent_id")  # of the sheet; `intent_id` is for the human
MADE_FOR = "sessions_sha256"  # column of a run's labels: which sessions they are of
KB_COLUMNS = ("intent_id", "title", "description", "category")
FORMULA = ("=", "+", "-", "@", "\t", "\r")  # a spreadsheet computes a cell that begins so
DELIMITERS = (",", ";", "\t")  # spreadsheet programs save with their country's
SEPARATOR = re.compile(r'"?sep=(.)"?(?:\r\n|\r|\n|$)', re.I)  # a first line of Excel's own: the delimiter, no row
UTF_16 = (b"\xff\xfe", b"\xfe\xff")  # first bytes of Excel's "Unicode text"
SPREADSHEETS = (".xlsx", ".xlsm", ".xls", ".ods", ".numbers")
LONGEST_VALUE = 1_000  # characters of one feature that the sheet shows: more than anybody reads [C]
LONGEST_CELL = 16_000  # characters; Excel holds 32,767 UTF-16 units a cell, and an emoji takes two
CUT = " [...]"


class LabelError(UserError, ValueError):
    """A sheet or labels that cannot be written or read; the message lists every error, a sheet's by its row numbers."""


def export_sheet(
    path: str | Path,
    sessions: pd.DataFrame,
    intents: pd.DataFrame,
    *,
    kinds: Mapping[str, str],
    features: Sequence[str],
) -> tuple[Path, Path]:
    """Write the sheet, and the KB beside it as NAME_intents.csv; returns both paths.

    path      a .csv: UTF-8 with a byte order mark, one row a session: session_id, the session in words, empty intent_id
    features  columns of `sessions` that the labeller sees, in this order; nothing else of a session is written
    kinds     column -> categorical | numeric | text | history; a history's intent ids show their title
    A cell that a spreadsheet would take for a formula gets an apostrophe in front. Of a long feature LONGEST_VALUE
    characters are shown, of a session and of a text of the KB LONGEST_CELL; ' [...]' says that there is more.
    Raises LabelError for another suffix and unknown columns (all of them), FileExistsError where a file is there
    already: it may hold labels.
    """
    path = Path(path)
    kb = path.with_name(f"{path.stem}_intents.csv")
    if path.suffix.lower() != ".csv":
        raise LabelError(f"{path} is no .csv: the sheet is written as one, which any spreadsheet program opens")
    known = [name for name in kinds if name in sessions]
    if unknown := [f"  {safe_repr(name)}{nearest(name, known)}" for name in features if name not in known]:
        raise LabelError("\n".join(["features to be shown that are no feature columns of the sessions:", *unknown]))
    if there := [str(file) for file in (path, kb) if file.exists()]:
        raise FileExistsError(f"{', '.join(there)} is there already and may hold labels: give another name")
    titles = {intent: title for intent, title in zip(intents.intent_id, intents.title, strict=True) if pd.notna(title)}

    def shortened(cell: object) -> str:
        return "" if pd.isna(cell) else _cut(str(cell), LONGEST_CELL)

    words = [_in_words(row, features, kinds, titles) for row in sessions[list(features)].to_dict("records")]
    columns = {"session_id": sessions.session_id, "session": words, "intent_id": ""}
    texts = {name: intents[name].map(shortened) for name in KB_COLUMNS[1:] if name in intents}
    _write(kb, pd.DataFrame({"intent_id": intents.intent_id, **texts}))
    _write(path, pd.DataFrame(columns))
    return path, kb


def read_sheet(path: str | Path, sessions: pd.DataFrame, intents: pd.DataFrame) -> pd.DataFrame:
    """The labels of a filled sheet: session_id, intent_id, in its order; rows without an intent are not labelled.

    Read as spreadsheet programs save it: comma, semicolon or tab, with a `sep=` line or without, in UTF-8 or UTF-16.
    Raises LabelError with every error at once: columns missing, sessions that are unknown or labelled twice, intents
    that the KB does not have (with the nearest that it has), rows that have more cells than the header or are a part of
    one; or with the line at which the file is no CSV. Rows are numbered as a spreadsheet numbers them.
    """
    path = Path(path)
    sheet, errors = _read(path)
    known = {}  # what may stand in the sheet for an id: itself, and its cell as it was written
    for kind, ids in (("session", sessions.session_id), ("intent", intents.intent_id)):
        names = list(map(str, ids))
        known[kind] = {_defused(name).strip(): name for name in names} | {name.strip(): name for name in names}
    parts = sheet.short & ~sheet.session_id.isin(known["session"])
    for row in sheet.index[parts]:
        first = safe_repr(sheet.session_id[row])
        what = f"row {row} is a part of a row: fewer cells than the header, and {first}, which is no session, first"
        errors.append((row, f"{what}; a row was broken over two lines"))
    given = sheet[(sheet.intent_id != "") & ~parts]
    session, intent = given.session_id.map(known["session"]), given.intent_id.map(known["intent"])
    for kind, cells, found in (("session", given.session_id, session), ("intent", given.intent_id, intent)):
        unknown = cells[found.isna()]
        for cell in unknown.unique():
            near = nearest(cell, known[kind]) if kind == "intent" else ""
            rows = unknown.index[unknown == cell]
            errors.append((rows[0], f"{kind}_id {safe_repr(cell)} is not known ({_rows(rows)}){near}"))
    again = session[session.notna() & session.duplicated(keep=False)]
    for twice in again.unique():
        rows = again.index[again == twice]
        errors.append((rows[0], f"session_id {safe_repr(twice)} is labelled {len(rows)} times ({_rows(rows)})"))
    if errors:
        _raise(path, [what for _, what in sorted(errors)])
    dtype = pd.ArrowDtype(STRING)
    return pd.DataFrame({"session_id": session.astype(dtype), "intent_id": intent.astype(dtype)}).reset_index(drop=True)


def write_labels(path: Path, labels: pd.DataFrame, dataset: Path | None = None) -> None:
    """The table `labels`, in place of one that is there.

    dataset  the run's data set folder, for labels that lie outside of it: they hold the digest of its sessions, since
             another seed's sessions have the same ids
    """
    artifacts.write_table(path, labels if dataset is None else labels.assign(**{MADE_FOR: _digest(dataset)}))


def with_labels_of_run(shop: Dataset, path: Path | None, dataset: Path) -> Dataset:
    """The data set with the labels that `write_labels` left in a run beside it; `shop` itself where path is None.

    A session that has labels in both has those of the run. Raises LabelError where they were made for other sessions.
    """
    if path is None:
        return shop
    own = pd.read_parquet(path, dtype_backend="pyarrow")
    if MADE_FOR not in own or (own[MADE_FOR] != _digest(dataset)).any():
        raise LabelError(
            f"{path} was not made for the sessions of {dataset}, which may have the same ids and mean others. "
            "Take it away, and have these sessions labelled: python -m rgalign labels RUN new-sheet.csv"
        )
    others = None if shop.labels is None else shop.labels[~shop.labels.session_id.isin(own.session_id)]
    labels = pd.concat([own[["session_id", "intent_id"]], others], ignore_index=True)
    return replace(shop, labels=labels)


def _digest(dataset: Path) -> str:
    return artifacts.digest(location(dataset, "sessions"))


def _in_words(row: dict, features: Sequence[str], kinds: Mapping[str, str], titles: Mapping[str, str]) -> str:
    """'name: value' lines; what is missing or empty is left out."""
    lines = []
    for name in features:
        value = row[name]
        if kinds[name] == "history":
            entries = [entry for entry in value if not pd.isna(entry)] if np.ndim(value) else []
            shown = "; ".join(_plain(titles.get(entry, entry)) for entry in entries)
        else:
            shown = "" if pd.isna(value) else _plain(f"{value:.10g}" if isinstance(value, float) else value)
        if shown:
            lines.append(f"{name}: {_cut(shown, LONGEST_VALUE)}")
    return _cut("\n".join(lines), LONGEST_CELL)


def _plain(value: object) -> str:
    """One line without control characters: a customer's text cannot hide what is beside it or look like a feature."""
    blank = ("Cc", "Cf", "Zl", "Zp")
    text = _cut(str(value), LONGEST_CELL)  # a megabyte is not looked at letter by letter to show its beginning
    return " ".join("".join(" " if unicodedata.category(c) in blank else c for c in text).split())


def _cut(text: str, longest: int) -> str:
    return text if len(text) <= longest else text[: longest - len(CUT)] + CUT


def _defused(cell: object) -> str:
    text = "" if pd.isna(cell) else str(cell)
    return f"'{text}" if text.startswith((*FORMULA, "'")) else text


def _write(path: Path, frame: pd.DataFrame) -> None:
    with artifacts.atomic(path) as temporary, temporary.open("w", encoding="utf-8-sig", newline="") as file:
        writer = csv.writer(file, quoting=csv.QUOTE_ALL)  # all: so that an id such as 007 looks like text
        writer.writerow(frame.columns)
        writer.writerows([_defused(cell) for cell in row] for row in frame.itertuples(index=False))


def _read(path: Path) -> tuple[pd.DataFrame, list[tuple[int, str]]]:
    """session_id and intent_id as strings, stripped, and `short`: whether a row has fewer cells than the header; the
    index is the spreadsheet's row (the header is row 1). And (row, error) of those that have more.

    A row without a single value is none. Some programs leave out the empty cells at a row's end.
    """
    rows = _cells(path)
    names = [name.strip() for name in rows[0]] if rows else []
    needed = ("session_id", "intent_id")
    wrong = [f"has no column {name}{nearest(name, names)}" for name in needed if name not in names]
    wrong += [f"has {names.count(name)} columns {name}; expected one" for name in needed if names.count(name) > 1]
    if wrong:
        _raise(path, wrong)
    errors, found, places = [], {}, [names.index(name) for name in needed]
    for number, row in enumerate(rows[1:], start=2):
        cells = [cell.strip() for cell in row]
        if any(cells[len(names) :]):
            what = f"row {number} has {len(cells)} cells, and the header {len(names)}"
            errors.append((number, f"{what}; put a text that holds the delimiter in quotation marks"))
        elif any(cells):
            found[number] = [cells[place] if place < len(cells) else "" for place in places] + [len(cells) < len(names)]
    columns = [*needed, "short"]
    return pd.DataFrame.from_dict(found, orient="index", columns=columns).astype({"short": bool}), errors


def _cells(path: Path) -> list[list[str]]:
    """The cells, row by row, without byte order marks and a `sep=` line."""
    if path.suffix.lower() in SPREADSHEETS:
        _raise(path, ["is a spreadsheet program's own file; save the sheet as 'CSV UTF-8' and name that file"])
    raw = path.read_bytes()
    encoding = "utf-16" if raw.startswith(UTF_16) else "utf-8"
    try:
        text = raw.decode(encoding).lstrip("\ufeff")
    except UnicodeDecodeError as error:
        _raise(path, [f"is not {encoding.upper()} (byte {error.start}); save it as 'CSV UTF-8'"])
    if "\0" in text:
        _raise(path, ["holds NUL characters, as UTF-16 without a byte order mark does; save it as 'CSV UTF-8'"])
    separator = SEPARATOR.match(text)
    body = text[separator.end() :] if separator else text
    header = re.split(r"[\r\n]", body, maxsplit=1)[0]
    delimiter = separator[1] if separator else max(DELIMITERS, key=header.count)
    # strict: without it, an unclosed quotation mark swallows the rows below it silently
    reader = csv.reader(io.StringIO(body, newline=""), delimiter=delimiter, strict=True)
    rows, above = [], bool(separator)
    line = 1 + above
    try:
        for row in reader:
            rows.append(row)
            line = reader.line_num + 1 + above
    except csv.Error as error:
        _raise(path, [f"row {len(rows) + 1}, which begins in line {line}, is no CSV: {error}"])
    return rows


def _rows(rows: pd.Index) -> str:
    more = f" and {len(rows) - SHOWN} more" if len(rows) > SHOWN else ""
    return f"row{'s' * (len(rows) > 1)} {', '.join(map(str, rows[:SHOWN]))}{more}"


def _raise(path: Path, errors: list[str]) -> None:
    lines = "\n".join(f"  {error}" for error in errors)
    raise LabelError(f"{path} fails {len(errors)} check{'s' * (len(errors) > 1)}:\n{lines}\nNothing was read.")
