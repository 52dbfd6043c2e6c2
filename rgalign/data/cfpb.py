"""The CFPB's consumer complaints: its CSV in every spelling since 2014, and the data set that is made of it."""

import csv
import hashlib
import io
import re
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.csv

from rgalign.data.candidates import sampled_dataset
from rgalign.data.split import by_time
from rgalign.data.tables import Dataset, TableError
from rgalign.errors import Report, nearest, safe_repr

NEEDED = ("complaint_id", "date_received", "product", "sub_product", "issue", "sub_issue", "company", "state")
NEEDED += ("zip_code", "submitted_via")
# Later releases add these; the download and the search API name the narrative differently.
LATER = {"tags": ("tags",), "narrative": ("consumer_complaint_narrative", "complaint_what_happened")}
LEAKS = (  # known only after the complaint was made
    "company response",
    "timely response",
    "consumer disputed",
    "consent",
    "company public response",
    "date sent to company",
)
# The forms of a date as `_parsed` writes it; of the last two the column has to tell which one it has.
DATE_FORMS = ("%Y %m %d", "%d %b %Y", "%b %d %Y")
DAY_FIRST, MONTH_FIRST = "%d %m %Y", "%m %d %Y"
REWRITTEN = {  # parts of a date, as the forms have them
    r"^(\d{4})(\d{2})(\d{2})$": r"\1 \2 \3",  # eight digits; with fewer month and day could be read in two ways
    r"[ .,/-]+": " ",
    r"([A-Za-z]{3})[A-Za-z]*": r"\1",
    r"^(\w{1,3} \w{1,3}) (\d{2})$": r"\1 20\2",  # the CFPB began in 2011
}
TIME_OF_DAY = r"[Tt ]\s*\d{1,2}:\d{2}.*$"
EMPTY = ("", "N/A", "None")
READ_AT_ONCE = 2**24  # bytes; a row must fit in
MOST_BROKEN_ROWS = 0.01  # of a file: one is cut off at its end, more is another kind of file
# bytes of a CSV whose rows are counted; a longer one (the CFPB's has gigabytes) is estimated from these [C]
COUNTED = 2**26


def cfpb(path: str | Path, *, seed: int, day_first: bool | None = None) -> Dataset:
    """The CFPB's consumer complaints, one session a complaint, one intent an issue with its sub-issue.

    Reads a CSV or a folder of them, in the spelling of 2014 and the later ones, `day_first` where their dates do not
    tell (`read_rows`). Split by date: first 70 % train, next 10 % valid, rest test, whole days. An intent new
    after train is valid from the first day of valid. Narratives, where released, become transcripts; tags a feature.
    `seed` draws the candidates. Raises TableError.
    """
    rows, left_out = read_rows(path, day_first=day_first)
    sessions = _cfpb_sessions(rows)
    try:
        sessions["split"] = by_time(sessions)
    except ValueError as error:
        raise TableError(f"{path}: {error}. Nothing was read") from error
    title = rows["issue"] + np.where(rows["sub_issue"] == "", "", ": " + rows["sub_issue"])
    in_train = sessions["split"].eq("train").to_numpy(dtype=bool)
    intents = _cfpb_intents(rows, title, in_train)
    true_intent = pd.Index(intents["title"]).get_indexer(title)
    train_clicks = np.bincount(true_intent[in_train], minlength=len(intents))
    intents["valid_from"] = sessions["timestamp"][sessions["split"].eq("valid")].min()
    intents["valid_from"] = intents["valid_from"].where(train_clicks == 0)
    kinds = {name: "categorical" for name in sessions.columns[5:] if name != "profile"} | {"profile": "text"}
    transcripts = None
    if rows["narrative"].ne("").any():
        typed = rows["narrative"].ne("").to_numpy(dtype=bool)
        columns = {"session_id": sessions["session_id"], "typed_query": rows["narrative"]}
        transcripts = pd.DataFrame(columns | {"intent_id": intents["intent_id"].to_numpy()[true_intent]})[typed]
    meta = {
        "title": "CFPB consumer complaints",
        "what": f"A bank customer's profile and product; rank the reason for her complaint. {len(intents)} reasons.",
        "licence": "Work of the US government, public domain (CFPB Consumer Complaint Database)",
        "origin": "The CFPB's CSV; rows left out, and why: see left_out",
        "split": "By date: first 70 % of the sessions train, next 10 % valid, last 20 % test, whole days.",
        "leaks_removed": list(LEAKS),
        "caution": "Product names the issue family by construction: always ablate product and sub_product.",
        "left_out": left_out,
    }
    return sampled_dataset("cfpb", kinds, meta, intents, sessions, true_intent, train_clicks, seed, transcripts)


def _cfpb_sessions(rows: pd.DataFrame) -> pd.DataFrame:
    """Sessions in the order of dates; the company's answer and all that comes after the complaint stay out."""
    sub_product = rows["sub_product"].where(rows["sub_product"] != "", "unspecified")
    holds = "Holds: " + rows["product"] + " (" + sub_product + ") with " + rows["company"]
    sessions = pd.DataFrame({"session_id": "c" + digests(rows["complaint_id"], 12)})
    sessions["user_id"] = sessions["session_id"]  # the CFPB does not say who complains twice
    sessions["timestamp"] = rows["date_received"]
    sessions["region"] = rows["state"].where(rows["state"] != "")
    sessions["split"] = None
    names = ["product", "sub_product", "company", "state"]
    sessions[names] = rows[names]
    sessions["zip3"] = rows["zip_code"].str.extract(r"^(\d{3})", expand=False).fillna("")
    sessions["channel"] = rows["submitted_via"]
    sessions["weekday"] = rows["date_received"].dt.day_name()
    sessions["profile"] = holds + ". State " + rows["state"] + "."
    if rows["tags"].ne("").any():
        sessions["tags"] = rows["tags"]
    return sessions


def _cfpb_intents(rows: pd.DataFrame, title: pd.Series, in_train: np.ndarray) -> pd.DataFrame:
    """One row an issue and sub-issue, in the order of titles.

    Which products it is about, and the one most often meant, its category, train's complaints alone say (in_train): a
    knowledge base is written before what is asked of it later. An intent that train has not knows neither.
    """
    pairs = rows.assign(title=title).groupby("title", sort=True)
    issue, sub_issue = pairs["issue"].first(), pairs["sub_issue"].first()
    known = rows.assign(title=title)[in_train]
    counts = known.groupby(["title", "product"]).size().rename("rows").reset_index()
    main = counts.sort_values(["title", "rows", "product"], ascending=[True, False, True]).groupby("title").first()
    detail = np.where(sub_issue == "", "", " Detail: " + sub_issue + ".")
    products = counts.groupby("title")["product"].agg("; ".join)
    products = (" Asked about products: " + products + ".").reindex(issue.index, fill_value="")
    key = issue + np.where(sub_issue == "", "", " | " + sub_issue)
    return pd.DataFrame(
        {
            "intent_id": "i" + digests(key, 8),
            "title": issue.index,
            "description": "The customer complains about: " + issue + "." + detail + products,
            "category": main["product"].reindex(issue.index),
        }
    ).reset_index(drop=True)


def digests(values: pd.Series, length: int) -> pd.Series:
    """First hex digits of the SHA-1, as the published tables have them: they do not show customer ids."""
    return values.map(lambda value: hashlib.sha1(value.encode()).hexdigest()[:length])


# The CSV as one table of strings under one set of names.


def read_rows(path: str | Path, *, day_first: bool | None = None) -> tuple[pd.DataFrame, dict[str, int]]:
    """Complaints in the order of dates, then of the file; and how many rows were left out, by reason.

    path       a CSV, or a folder of CSVs, each with a header in its own spelling, one after the other by name
    day_first  how 03/04/2014 is read; None: as the rows that leave no doubt say (13/04/2014, 04/13/2014)
    Columns: NEEDED, tags, narrative; strings, '' where empty; date_received as datetime64.
    Left out: rows with another number of fields than the header (a file cut short), rows without an issue.
    Raises TableError naming file, column and rows: no such file, a column missing, a date that is unreadable or can be
    read in two ways, an id doubled.
    """
    path = Path(path)
    report, files = Report(path), _files(path)
    before = {file: f"{file.name} " if len(files) > 1 else "" for file in files}  # of a column's name in an error
    spelt = {file: _columns(report, file, before[file]) for file in files}
    _raise(report)
    frames, broken = {}, 0
    for file, names in spelt.items():
        frames[file], skipped = _read_csv(file, names)
        broken += skipped
    written = {file: rows["date_received"].str.replace(TIME_OF_DAY, "", regex=True) for file, rows in frames.items()}
    first = _day_comes_first(report, pd.concat(written.values()).unique(), day_first)
    expected = f"; expected {'13/11/2014' if first else '11/13/2014'} or 2014-11-13"
    for file, rows in frames.items():
        days = pd.Series(written[file].unique(), dtype=object)
        dates = written[file].map(dict(zip(days, _parsed(days, first), strict=True))).astype("datetime64[us]")
        wrong = dates.isna().to_numpy()
        found = ", ".join(map(safe_repr, written[file][wrong].unique()[:3]))
        report.error_rows(f"{before[file]}date_received", wrong, f"is no date ({found})", expected)
        rows["date_received"] = dates
        empty = rows["complaint_id"].eq("").to_numpy()
        report.error_rows(f"{before[file]}complaint_id", empty, "is empty", "; every complaint needs its number")
    rows = pd.concat(frames.values(), ignore_index=True)
    again = rows["complaint_id"][rows["complaint_id"].duplicated() & rows["complaint_id"].ne("")]
    report.error_values("complaint_id", again, "repeats a number", "; expected each complaint once, in one file")
    _raise(report)
    usable = rows["issue"] != ""
    if not usable.any():
        raise TableError(f"{path}: none of {len(rows)} rows has an issue. Nothing was read")
    left_out = {"rows with another number of fields": broken, "rows without an issue": int((~usable).sum())}
    return rows[usable].sort_values("date_received", kind="stable", ignore_index=True), left_out


def _raise(report: Report) -> None:
    if report.errors:
        raise TableError("\n".join([*str(report).splitlines()[:-1], "Nothing was read. Rows count from 0."]))


def _files(path: Path) -> list[Path]:
    if not path.is_dir():
        return [path]
    found = sorted(file for file in path.iterdir() if file.suffix.lower() == ".csv" and not file.name.startswith("."))
    if not found:
        raise TableError(f"{path}/ holds no .csv; expected one or more of the CFPB's files. Nothing was read")
    return found


def _columns(report: Report, path: Path, before: str) -> dict[str, str]:
    """Our name -> the header's, for the columns that are read."""
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            header = next(csv.reader(file), [])
    except (OSError, ValueError, csv.Error) as error:
        raise TableError(f"{path} cannot be read as CSV: {error}. Nothing was read") from error
    names = {re.sub(r"[^a-z0-9]+", "_", name.lower()).strip("_"): name for name in header}
    for column in NEEDED:
        if column not in names:
            report.error(before + column, f"is missing{nearest(column, names, 0.7)}")
    for name in (name for name in dict.fromkeys(header) if header.count(name) > 1):
        report.error(before + safe_repr(name), f"is in the header {header.count(name)} times; expected once")
    later = {column: names[name] for column, options in LATER.items() for name in options if name in names}
    return {column: names.get(column, column) for column in NEEDED} | later


def _read_csv(path: Path, names: dict[str, str]) -> tuple[pd.DataFrame, int]:
    """Our columns (our name -> the header's) as strings; how many rows with another number of fields are left out."""
    broken = []

    def skip(row: pyarrow.csv.InvalidRow) -> str:
        broken.append(row.number)
        return "skip"

    types = dict.fromkeys(names.values(), pa.large_string())
    try:
        table = pyarrow.csv.read_csv(
            path,
            read_options=pyarrow.csv.ReadOptions(use_threads=False, block_size=READ_AT_ONCE),
            parse_options=pyarrow.csv.ParseOptions(newlines_in_values=True, invalid_row_handler=skip),
            convert_options=pyarrow.csv.ConvertOptions(include_columns=list(names.values()), column_types=types),
        )
    except (pa.ArrowException, OSError) as error:
        raise TableError(f"{path} cannot be read as CSV: {error}. Nothing was read") from error
    if len(broken) > max(1, MOST_BROKEN_ROWS * table.num_rows):
        what = f"{len(broken):,} rows have another number of fields than the header"
        raise TableError(f"{path}: {what} (first: {', '.join(map(str, broken[:3]))}). Nothing was read")
    rows = pd.DataFrame({column: table[name].to_pandas().astype(object) for column, name in names.items()})
    for column in rows:
        rows[column] = rows[column].str.strip()
        rows.loc[rows[column].isin(EMPTY), column] = ""
    for column in LATER:
        rows[column] = rows.get(column, "")
    return rows, len(broken)


def _day_comes_first(report: Report, days: Iterable[str], given: bool | None) -> bool:
    """Whether 03/04/2014 is the third of April: as given, else as the column's other dates say.

    An error where they contradict each other, or where none of them tells. Dots (03.04.2014) are day-first [C].
    """
    if given is not None:
        return given
    written = pd.Series(list(days), dtype=object)
    by_day, by_month = (_parsed(written, first) for first in (True, False))
    day_first, month_first = written[by_month.isna() & by_day.notna()], written[by_day.isna() & by_month.notna()]
    open_ones = written[by_day.notna() & by_month.notna() & (by_day != by_month)]
    dotted = open_ones.str.contains(".", regex=False)
    settle = "say which with data.day_first: true, or false for the CFPB's own month-first form"
    if len(day_first) and len(month_first):
        found = f"{safe_repr(day_first.iloc[0])} has the day first, {safe_repr(month_first.iloc[0])} the month"
        report.error("date_received", f"mixes two forms: {found}; expected one form for all, or {settle}")
    elif not len(day_first) and not len(month_first) and not dotted.all():
        row = open_ones.index[~dotted][0]
        read = f"{by_day[row]:%d %B %Y} or {by_month[row]:%d %B %Y}"
        report.error("date_received", f"{safe_repr(written[row])} may be {read}, and no other date tells; {settle}")
    return len(day_first) > 0 or (not len(month_first) and bool(dotted.any()))


def _parsed(written: pd.Series, day_first: bool) -> pd.Series:
    """The day of each text, NaT where it has none of the forms."""
    for pattern, form in REWRITTEN.items():
        written = written.str.replace(pattern, form, regex=True)
    found = pd.Series(pd.NaT, index=written.index, dtype="datetime64[us]")
    for form in (*DATE_FORMS, DAY_FIRST if day_first else MONTH_FIRST):
        found = found.fillna(pd.to_datetime(written, format=form, errors="coerce").astype("datetime64[us]"))
    return found


def count_sessions(path: Path) -> tuple[int, bool]:
    """Sessions of a CSV or a folder of them, and whether the number is an estimate. Raises ValueError, OSError."""
    sessions, about = 0.0, False
    for file in _files(path):
        size = file.stat().st_size
        with file.open("rb") as raw:
            beginning = raw.read(COUNTED)
        lines = io.TextIOWrapper(io.BytesIO(beginning), encoding="utf-8", errors="replace", newline="")
        rows = max(sum(1 for _ in csv.reader(lines)) - 1, 0)  # below the header
        sessions += rows * size / max(len(beginning), 1)
        about |= len(beginning) < size
    return round(sessions), about
