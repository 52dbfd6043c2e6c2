"""`python -m rgalign import`: one file of shown answers and clicks becomes the tables of a data set folder.

A row of the log is one answer that was shown in one session. Every column gets a role by its name or by what is in it;
what was guessed is printed, and nothing is written until the user agrees.
"""

import csv
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa

from rgalign.data import tables
from rgalign.data.schema import KINDS, MAIL, PHONE, is_personal
from rgalign.data.tables import Dataset, TableError
from rgalign.errors import nearest, safe_repr

# role -> names that say it, without case and punctuation; of several columns the one that comes first here
ROLES = {
    "session_id": ("sessionid", "session", "visitid", "visit", "impressionid", "requestid", "searchid", "queryid"),
    "user_id": ("userid", "user", "memberid", "member", "customerid", "customer", "accountid", "visitorid", "uid"),
    "timestamp": ("timestamp", "time", "datetime", "eventtime", "ts", "shownat", "createdat", "date"),
    "intent_id": ("intentid", "intent", "itemid", "item", "answerid", "articleid", "docid", "documentid", "faqid"),
    "title": ("title", "answer", "question", "intenttitle", "itemtitle", "answertitle", "headline"),
    "description": ("description", "summary", "body", "content", "intentdescription"),
    "category": ("category", "topic", "group", "section", "intentcategory"),
    "position": ("position", "slot", "rank", "pos", "place"),
    "clicked": ("clicked", "click", "isclick", "isclicked", "label", "clicks"),
    "propensity": ("propensity", "pscore"),
    "selection": ("selection",),
    "shuffled": ("shuffled", "randomized", "randomised"),
    "region": ("region", "country", "market", "locale"),
    "split": ("split", "fold"),
    "typed_query": ("typedquery", "typed", "query", "usertyped", "message"),
}
NEEDED = ("session_id", "clicked")
OF_INTENT = ("title", "description", "category")
FEATURE, LEFT_OUT = "feature", "left out"
UNITS = {"s": 1e9, "ms": 1e12, "us": 1e15, "ns": 1e18}  # unit -> about what 2001 and later is in it
YEARS = (1990, 2100)
MANY, FEW = 50, 20  # distinct values of a categorical at most; sessions below which nothing is concluded from counts
SUSPECT, OWN_VALUE = 0.9, 0.9  # share of clicks that a column foretells; of sessions with a value of their own
MISSING = ("", "null", "none", "nan", "na", "n/a")
TRUE, FALSE = ("1", "1.0", "true", "t", "yes", "y"), ("0", "0.0", "false", "f", "no", "n", *MISSING)


@dataclass
class Asked:
    """What the user says of the log's columns; the rest is guessed."""

    roles: Mapping[str, str] = field(default_factory=dict)  # role -> column
    kinds: Mapping[str, str] = field(default_factory=dict)  # feature column -> kind
    drop: Sequence[str] = ()
    time_unit: str | None = None


@dataclass
class Plan:
    """What `import` would write: a role or a kind for each column, and all that was mended, left out or is wrong."""

    log: pd.DataFrame  # strings or numbers, lists of a history; missing is NA
    roles: dict[str, str]  # role -> column
    columns: pd.DataFrame  # column, becomes, example: one row a column, in the log's order
    notes: list[str]
    dataset: Dataset


def read_log(path: Path) -> pd.DataFrame:
    """The log's rows: .csv, .tsv and .txt (as text), .jsonl, .parquet. Raises TableError."""
    if not path.is_file():
        raise TableError(f"there is no file {path}; expected a log: one row for each answer that was shown")
    kind = path.suffix.lower()
    try:
        if kind in (".parquet", ".pq"):
            frame = pd.read_parquet(path)
        elif kind in (".jsonl", ".ndjson"):
            frame = pd.read_json(path, lines=True, dtype=False, convert_dates=False)
        elif kind in (".csv", ".tsv", ".txt"):
            with path.open(encoding="utf-8-sig", newline="") as file:
                head = file.read(20_000)
            separator = "\t" if kind == ".tsv" else _separator(head)
            how = {"sep": separator, "dtype": str, "keep_default_na": False, "encoding": "utf-8-sig"}
            frame = pd.read_csv(path, **how, index_col=False, on_bad_lines="error")
        else:
            raise TableError(f"{path} ends in {kind or 'nothing'}; expected .csv, .tsv, .txt, .jsonl or .parquet")
    except UnicodeDecodeError as error:
        raise TableError(f"{path} is no UTF-8 at byte {error.start:,}; save it as UTF-8") from None
    except pd.errors.EmptyDataError:
        raise TableError(f"{path} is empty; expected a line of column names, then one line for each answer") from None
    except (ValueError, OSError, pa.ArrowException, csv.Error) as error:  # ParserError is a ValueError
        if isinstance(error, TableError):
            raise
        raise TableError(f"{path} cannot be read as {kind}: {' '.join(str(error).split())}") from None
    frame.columns = [str(name).strip() for name in frame.columns]
    twice = sorted({name for name in frame.columns if list(frame.columns).count(name) > 1})
    if twice or not len(frame):
        wrong = f"has {', '.join(map(safe_repr, twice))} more than once" if twice else "has no rows"
        raise TableError(f"{path} {wrong}; expected column names that differ, and one row for each answer shown")
    for name in frame:
        if pd.api.types.is_string_dtype(frame[name]):
            words = frame[name].astype("string").str.strip()
            frame[name] = words.mask(words.str.lower().isin(MISSING))
    return frame


def _separator(head: str) -> str:
    try:
        return csv.Sniffer().sniff(head, delimiters=",;\t|").delimiter
    except csv.Error:
        return ","


def plan(log: pd.DataFrame, name: str, asked: Asked | None = None) -> Plan:
    """How a log becomes tables. Raises TableError with all that is wrong with it."""
    asked = asked or Asked()
    faults, notes = _of_what_was_asked(log, asked), []
    roles = {} if faults else _roles(log, asked, faults)
    for role in NEEDED:
        if role not in roles and not faults:
            faults.append(f"no column is {role}: --column {role}=NAME; columns: {', '.join(log)}")
    if not faults and not {"intent_id", "title"} & set(roles):
        faults.append(f"no column says which answer was shown: --column title=NAME; columns: {', '.join(log)}")
    if faults:
        _refuse(faults)
    session, answer = log[roles["session_id"]].astype("string"), log[roles.get("intent_id", roles.get("title"))]
    answer = answer.astype("string")
    for what, values in ((roles["session_id"], session), (answer.name, answer)):
        if values.isna().any():
            faults.append(f"column {what}: {_rows(values.isna())} empty; expected a value in each row")
    clicked = _flags(log[roles["clicked"]], faults)
    shuffled = _flags(log[roles["shuffled"]], faults) if "shuffled" in roles else None
    times = _times(log, roles, asked.time_unit, faults, notes)
    twice = pd.DataFrame({"session": session, "answer": answer}).duplicated(keep=False)
    if twice.any():
        faults.append(f"{_rows(twice)} the same answer twice in one session; expected each answer once a session")
    position = _positions(log, roles, session, faults, notes)
    if faults:
        _refuse(faults)
    becomes = {column: role for role, column in roles.items()}
    kinds = {}
    for column in (column for column in log if column not in becomes):
        kind, why = _feature(log, column, roles, clicked.astype(bool), asked, notes)
        becomes[column] = f"{FEATURE}, {kind}" if kind else f"{LEFT_OUT}: {why}"
        if kind:
            kinds[column] = kind
    if not kinds:
        raise TableError(
            "no column is left that says something of a session before its list is shown; expected at least one "
            f"(--feature NAME=KIND): {'; '.join(f'{name} is {what}' for name, what in becomes.items())}"
        )
    first = ~session.duplicated()
    sessions = pd.DataFrame({"session_id": session, "user_id": _of(log, roles, "user_id", session), "timestamp": times})
    sessions["region"], sessions["split"] = (_of(log, roles, each) for each in ("region", "split"))
    if shuffled is not None:
        sessions["shuffled"] = shuffled
    for column, kind in kinds.items():
        sessions[column] = pd.to_numeric(log[column]) if kind == "numeric" else log[column]
    varying = [name for name in sessions if name != "session_id" and _varying(sessions[name], session)]
    if varying:
        notes.append(
            f"{', '.join(varying)} differ inside some sessions, which have one value: that of the session's first row"
        )
    kept = sessions[first].sort_values("timestamp", kind="stable") if "timestamp" in roles else sessions[first]
    intents, ids = _intents(log, roles, answer)
    for role in OF_INTENT:
        if role in roles and (different := _varying(log[roles[role]], answer)):
            notes.append(f"{roles[role]} differs for {different:,} answers: each has that of its first row")
    impressions = pd.DataFrame(
        {"session_id": session, "intent_id": answer.map(ids), "position": position, "clicked": clicked.astype("int8")}
    )
    for role in ("propensity", "selection"):
        if role in roles:
            impressions[role] = pd.to_numeric(log[roles[role]])
    typed = None
    if "typed_query" in roles:
        typed = pd.DataFrame({"session_id": session, "typed_query": log[roles["typed_query"]]})
        typed = typed.dropna().drop_duplicates("session_id")
    examples = [next((safe_repr(value) for value in log[column].dropna().head(1)), "(empty)") for column in log]
    columns = pd.DataFrame({"column": list(log), "becomes": [becomes[name] for name in log], "example": examples})
    meta = {"name": name, "features": kinds, "position_is_real": "position" in roles}
    order = kept["session_id"].tolist()
    place = impressions["session_id"].map(pd.Series(range(len(order)), order))
    impressions = impressions.iloc[np.lexsort([impressions["position"], place])]
    tables_of = (frame.reset_index(drop=True) for frame in (intents, kept, impressions))
    return Plan(log, roles, columns, notes, Dataset(name, kinds, meta, *tables_of, typed))


def write(planned: Plan, folder: Path) -> None:
    """Write the tables, if `check` passes them; all of the folder or nothing. Raises TableError, FileExistsError."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise TableError(f"{folder} is there already and is not empty; expected a new folder: name another")
    tables.write(planned.dataset, folder)
    report = tables.check(folder)
    if report.errors:
        for path in folder.iterdir():
            path.unlink()
        folder.rmdir()
        raise TableError(f"{report}\nSo {folder} was not written: mend the log, or say more of its columns")


def _of_what_was_asked(log: pd.DataFrame, asked: Asked) -> list[str]:
    named = [*asked.roles.values(), *asked.kinds, *asked.drop]
    faults = [f"there is no column {safe_repr(each)}{nearest(each, log)}" for each in named if each not in log]
    unknown = [each for each in asked.roles if each not in ROLES]
    faults += [f"{each} is no role{nearest(each, ROLES)}: {', '.join(ROLES)}" for each in unknown]
    for column, kind in asked.kinds.items():
        if kind not in KINDS:
            faults.append(f"--feature {column}={kind}: expected one of {', '.join(KINDS)}{nearest(kind, KINDS)}")
    if asked.time_unit is not None and asked.time_unit not in UNITS:
        faults.append(f"--time-unit is {asked.time_unit}; expected one of {', '.join(UNITS)}")
    return faults


def _roles(log: pd.DataFrame, asked: Asked, faults: list[str]) -> dict[str, str]:
    """role -> column: as asked, else the first of ROLES' names that a column has; `clicked` also by its values."""
    taken = {*asked.roles.values(), *asked.kinds, *asked.drop}
    plain = {column: re.sub(r"[^a-z0-9]", "", column.lower()) for column in log if column not in taken}
    roles = dict(asked.roles)
    for role, names in ROLES.items():
        if role in roles:
            continue
        found = sorted((names.index(name), column) for column, name in plain.items() if name in names)
        if len(found) > 1 and found[0][0] == found[1][0]:
            both = ", ".join(column for _, column in found)
            faults.append(f"several columns could be {role}: {both}; say which: --column {role}={found[0][1]}")
        elif found:
            roles[role] = found[0][1]
            del plain[found[0][1]]
    if "clicked" not in roles:
        two = [column for column in plain if {*log[column].dropna().astype("string").str.lower()} == {"0", "1"}]
        if len(two) == 1:
            roles["clicked"] = two[0]
    return roles


def _flags(values: pd.Series, faults: list[str]) -> pd.Series:
    """(rows,) 1 and 0 of what says yes or no; empty is no."""
    words = values.astype("string").str.lower().fillna("")
    wrong = ~words.isin([*TRUE, *FALSE])
    if wrong.any():
        shown = ", ".join(map(safe_repr, values[wrong].unique()[:3]))
        faults.append(f"column {values.name}: {_rows(wrong)} neither yes nor no (first: {shown}); expected 1 or 0")
    return words.isin(TRUE).astype("int8")


def _times(log: pd.DataFrame, roles: Mapping, unit: str | None, faults: list[str], notes: list[str]) -> pd.Series:
    """(rows,) UTC without zone. Numbers count from 1970 in a unit that is asked for, or told by their size."""
    if "timestamp" not in roles:
        notes.append("no column is timestamp: sessions cannot be split by time, so split must say train, valid or test")
        return pd.Series(pd.NaT, log.index, dtype="datetime64[us]")
    column = log[roles["timestamp"]]
    numbers = pd.to_numeric(column, errors="coerce")
    if numbers.notna().any() and not pd.api.types.is_datetime64_any_dtype(column):
        size = float(numbers.abs().median())
        told = unit or next((name for name, scale in UNITS.items() if scale * 0.5 <= size <= scale * 5), None)
        if told is None:
            faults.append(
                f"column {column.name}: numbers like {numbers.iloc[0]:g} are no time since 1970 that is known; "
                f"expected seconds (about 1.7e9): say --time-unit {' | '.join(UNITS)}, or write dates"
            )
            return pd.Series(pd.NaT, log.index, dtype="datetime64[us]")
        notes.append(f"{column.name} counts {told} since 1970" + ("" if unit else ", by its size (--time-unit)"))
        moments = pd.to_datetime(numbers, unit=told, errors="coerce")
    else:
        if (slashed := column.astype("string").str.contains(r"^\d{1,2}[/.]\d{1,2}[/.]\d{4}")).any():
            notes.append(f"{column.name}: {safe_repr(column[slashed.fillna(False)].iloc[0])} is read as month/day/year")
        moments = pd.to_datetime(column, errors="coerce", utc=True, format="mixed").dt.tz_localize(None)
    wrong = moments.isna() & column.notna()
    far = moments.notna() & ~moments.dt.year.between(YEARS[0], YEARS[1] - 1)
    for rows, what in ((wrong, "no date"), (far, f"before {YEARS[0]} or after {YEARS[1]}"), (column.isna(), "empty")):
        if rows.any():
            faults.append(f"column {column.name}: {_rows(rows)} {what} (first: {safe_repr(column[rows].iloc[0])})")
    return moments.astype("datetime64[us]")


def _positions(log: pd.DataFrame, roles: Mapping, session: pd.Series, faults: list[str], notes: list[str]) -> pd.Series:
    """(rows,) from 0, without gaps in a session; the order of the rows where no column says it."""
    if "position" not in roles:
        notes.append("no column is position: the order of rows is taken, and no position bias is learnt from it")
        return session.groupby(session).cumcount().astype("int16")
    given = pd.to_numeric(log[roles["position"]], errors="coerce")
    if given.isna().any():
        faults.append(f"column {roles['position']}: {_rows(given.isna())} no number; expected the place in the list")
        return given
    twice = pd.DataFrame({"session": session, "position": given}).duplicated(keep=False)
    if twice.any():
        faults.append(f"column {roles['position']}: {_rows(twice)} the place of another answer of its session")
    found = given.groupby(session).rank(method="first").sub(1)
    if (found != given).any():
        begins = f" (they begin at {given.min():g})" if given.min() else ""
        notes.append(f"{roles['position']} is counted again from 0 at the top{begins}, without gaps")
    return found.astype("int16")


def _feature(
    log: pd.DataFrame, column: str, roles: Mapping, clicked: pd.Series, asked: Asked, notes: list[str]
) -> tuple[str, str]:
    """(kind, "") of a column that says something of a session before its list is shown; ("", why) of another."""
    values, session = log[column], log[roles["session_id"]].astype("string")
    answer = log[roles.get("intent_id", roles.get("title"))].astype("string")
    if column in asked.kinds:
        return asked.kinds[column], ""
    if column in asked.drop:
        return "", "as asked"
    if values.isna().all():
        return "", "empty"
    words = values.dropna().astype("string")
    if is_personal(column):
        return "", "personal, by its name"
    if words.head(1000).map(lambda one: bool(MAIL.search(one) or PHONE.fullmatch(one))).mean() > 0.5:
        return "", "personal: e-mail addresses or telephone numbers"
    if clicked.sum() >= FEW and not values.notna()[~clicked].any():
        return "", "filled in clicked rows alone: known after the click"
    if different := _varying(values, session):
        return "", f"varies inside {different:,} sessions" + ("" if _varying(values, answer) else ": of the answer")
    first, with_click = ~session.duplicated(), session.isin(session[clicked])
    there, without = values.notna()[first & with_click], values.notna()[first & ~with_click]
    if min(len(there), len(without)) >= FEW and not without.any() and there.mean() > SUSPECT:
        return "", "filled in sessions with a click alone: known after it"
    of_answer = [log[roles[role]].astype("string") for role in ("intent_id", "title", "category") if role in roles]
    chosen = clicked & values.notna()
    if chosen.sum() >= FEW and any((words[chosen] == one[chosen]).mean() > SUSPECT for one in of_answer):
        return "", "is the clicked answer's own: known after the click"
    _note_foretelling(column, words[chosen], answer[chosen], notes)
    if values.dropna().map(lambda one: isinstance(one, list | np.ndarray)).all():
        return "history", ""
    each = words[first[words.index]]
    distinct = each.nunique()
    if pd.to_numeric(each, errors="coerce").notna().all() and distinct > FEW:
        return "numeric", ""
    if each.str.split().str.len().mean() >= 2 and distinct > FEW:
        return "text", ""
    if distinct > OWN_VALUE * len(each) and len(each) >= FEW:
        return "", "nearly every session has a value of its own"
    return "categorical", ""


def _note_foretelling(column: str, value: pd.Series, answer: pd.Series, notes: list[str]) -> None:
    """Note a column by which alone nearly every click is known: a search word may be one, an outcome must not be."""
    if answer.nunique() < 5 or len(value) < 5 * value.nunique():
        return
    told = answer.groupby(value).agg(lambda one: one.value_counts().iloc[0]).sum() / len(value)
    if told > SUSPECT:
        notes.append(
            f"{column} alone says which answer is clicked in {told:.0%} of the clicks where it is filled: was it there "
            f"before the list was shown? If not: --drop {column}"
        )


def _intents(log: pd.DataFrame, roles: Mapping, answer: pd.Series) -> tuple[pd.DataFrame, dict[str, str]]:
    """(the table of intents, answer -> intent_id): ids as given, else numbers in the order of their first row."""
    first = ~answer.duplicated()
    table = pd.DataFrame({"intent_id": answer[first]})
    ids = {one: one for one in table["intent_id"]}
    if "intent_id" not in roles:
        width = len(str(len(table)))
        ids = {one: f"i{number:0{width}d}" for number, one in enumerate(table["intent_id"], start=1)}
        table["intent_id"] = table["intent_id"].map(ids)
    for role in OF_INTENT:
        table[role] = log[roles[role]][first] if role in roles else pd.Series(pd.NA, table.index, dtype="string")
    table["title"] = table["title"].fillna(answer[first])
    return table.assign(valid_from=pd.Series(pd.NaT, table.index, dtype="datetime64[us]")), ids


def _of(log: pd.DataFrame, roles: Mapping, role: str, otherwise: pd.Series | None = None) -> pd.Series:
    if role in roles:
        found = log[roles[role]].astype("string")
        return found if otherwise is None else found.fillna(otherwise)
    return pd.Series(pd.NA, log.index, dtype="string") if otherwise is None else otherwise


def _comparable(values: pd.Series) -> pd.Series:
    return values.map(lambda one: str(one) if isinstance(one, list | np.ndarray) else one).astype("string").fillna("")


def _varying(values: pd.Series, group: pd.Series) -> int:
    """Groups in which the values differ."""
    return int((_comparable(values).groupby(group).nunique() > 1).sum())


def _rows(wrong: pd.Series) -> str:
    """'3 rows (first: line 5) have'; a line counts from 1, the header's."""
    rows = np.flatnonzero(wrong.to_numpy(bool))
    return (
        f"{len(rows):,} row{'s' * (len(rows) != 1)} (first: line {rows[0] + 2:,}) {'is' if len(rows) == 1 else 'are'}"
    )


def _refuse(faults: Sequence[str]) -> None:
    lines = "\n".join(f"  {fault}" for fault in faults)
    raise TableError(f"the log cannot be imported; nothing was written:\n{lines}")
