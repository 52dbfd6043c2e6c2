"""`python -m rgalign import`: one file of shown answers and clicks becomes the tables of a data set folder.

A row of the log is one answer that was shown in one session. Every column gets a role by its name or by what is in it;
what was guessed is printed, and nothing is written until the user agrees.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pandas as pd

from rgalign.data import tables
from rgalign.data.checks import EPOCH, UNITS
from rgalign.data.dataset_yaml import RESERVED
from rgalign.data.schema import KINDS, MAIL, PHONE, is_personal
from rgalign.data.tables import Dataset, TableError
from rgalign.errors import nearest, safe_repr
from rgalign.run import artifacts

# role -> names that say it, without case and punctuation; of several columns the role's own name is taken
ROLES = {
    "session_id": ("sessionid", "session", "visitid", "visit", "requestid", "request", "searchid", "queryid"),
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
    "typed_query": ("typedquery", "typed", "usertyped"),
}
NEEDED = ("session_id", "clicked")
OF_INTENT = ("title", "description", "category")
TIME = "\0time"  # a column of the log while it is imported; no file has such a name
ZONE = re.compile(r":.*(?:Z|[+-]\d\d:?\d\d)$")
WORDY = "search|query|text|message|comment"  # in the name of a column of words
FEATURE, LEFT_OUT = "feature", "left out"
YEARS = (1990, 2100)
CHANCE = 1e-6  # below it a value that is there with clicks alone, or never with one, is no coincidence [C]
MANY, FEW = 50, 20  # distinct values of a categorical at most; sessions below which nothing is concluded from counts
SUSPECT, OWN_VALUE = 0.9, 0.9  # share of clicks that a column foretells; of sessions with a value of their own
MISSING = ("", "null", "none", "nan", "na", "n/a")
TRUE, FALSE = ("1", "1.0", "true", "t", "yes", "y"), ("0", "0.0", "false", "f", "no", "n")


@dataclass
class Asked:
    """What the user says of the log's columns; the rest is guessed."""

    roles: Mapping[str, str] = field(default_factory=dict)  # role -> column
    kinds: Mapping[str, str] = field(default_factory=dict)  # feature column -> kind
    drop: Sequence[str] = ()
    time_unit: str | None = None
    time_format: str | None = None


@dataclass
class Plan:
    """What `import` would write: a role or a kind for each column, and all that was mended, left out or is wrong."""

    roles: dict[str, str]  # role -> column
    columns: pd.DataFrame  # column, becomes: one row a column
    notes: list[str]
    dataset: Dataset


def plan(log: pd.DataFrame, name: str, asked: Asked | None = None) -> Plan:
    """How a log becomes tables. Raises TableError with all that is wrong with it."""
    asked = asked or Asked()
    faults, notes = _of_what_was_asked(log, asked), []
    roles = _roles(log, asked, faults)
    lost = [f"{role}: --column {role}=NAME" for role in NEEDED if role not in roles]
    if not {"intent_id", "title"} & set(roles):
        lost.append("intent_id or title, what was shown: --column title=NAME")
    if lost:
        _refuse([*faults, *(f"no column is {one}; columns: {', '.join(log)}" for one in lost)])
    log = _in_order(log, roles, asked, faults, notes)
    session, answer = (_text(log[roles[r]]).fillna("") for r in ("session_id", _key(roles)))
    log[session.name], log[answer.name] = session, answer
    for values in (session, answer):
        if (empty := values.str.strip() == "").any():
            faults.append(f"column {values.name}: {_rows(empty)} empty; expected a value in each row")
    clicked = _flags(log[roles["clicked"]], faults)
    shuffled = _flags(log[roles["shuffled"]], faults) if "shuffled" in roles else None
    twice = pd.DataFrame({"session": session, "answer": answer}).duplicated(keep=False)
    if twice.any():
        faults.append(f"{_rows(twice)} an intent twice in one session; expected each once in a session")
    position = _positions(log, roles, session, faults, notes)
    faults += _varying_roles(log, roles, session)
    if "timestamp" not in roles and "split" not in roles:
        faults.append("no column is timestamp, and none split: --column timestamp=NAME")
    becomes = {column: role for role, column in roles.items()}
    kinds, clicks = {"region": "categorical"} if "region" in roles else {}, clicked.astype(bool)
    for column in (column for column in log if column not in (*becomes, TIME)):
        kind, why = _feature(log, column, roles, clicks, asked, notes)
        becomes[column] = f"{FEATURE}, {kind}" if kind else f"{LEFT_OUT}: {why}"
        if kind:
            kinds[column] = kind
        elif column in asked.kinds:
            faults.append(f"--feature {column}: it {why}")
    if not kinds:
        faults.append(
            "no column is left that says something of a session before its list is shown; expected at least one "
            f"(--feature NAME=KIND): {'; '.join(f'{name} is {what}' for name, what in becomes.items())}"
        )
    if faults:
        _refuse(faults)
    first = ~session.duplicated()
    sessions = pd.DataFrame({"session_id": session, "user_id": _of(log, roles, "user_id", session)})
    sessions["timestamp"] = log[TIME] if TIME in log else pd.Series(pd.NaT, log.index, dtype="datetime64[us]")
    sessions["region"], sessions["split"] = (_of(log, roles, each) for each in ("region", "split"))
    for role in ("user_id", "typed_query"):
        if role in roles and (held := _holds_personal(_text(log[roles[role]])[first].dropna()).sum()):
            what = "holds e-mail addresses or telephone numbers"
            notes.append(f"{roles[role]} {what} in {held:,} sessions: hash ids, take them out of texts")
    if shuffled is not None:
        sessions["shuffled"] = shuffled
    for column, kind in ((column, kind) for column, kind in kinds.items() if column != "region"):
        sessions[column] = _numbers(log[column])[0].convert_dtypes() if kind == "numeric" else log[column]
    kept = sessions[first]
    intents, ids = _intents(log, roles, answer)
    for role in OF_INTENT:
        if role in roles and (different := _varying(log[roles[role]], answer)):
            notes.append(f"{roles[role]} differs for {different:,} answers: each has that of its last row")
    impressions = pd.DataFrame(
        {"session_id": session, "intent_id": answer.map(ids), "position": position, "clicked": clicked.astype("int8")}
    )
    for role in ("propensity", "selection"):
        if role in roles:
            impressions[role] = _numbers(log[roles[role]])[0]
    typed = None
    if "typed_query" in roles:
        typed = pd.DataFrame({"session_id": session, "typed_query": log[roles["typed_query"]]})
        typed = typed.dropna().drop_duplicates("session_id").reset_index(drop=True)
    shown = [name if name.isprintable() and len(name) <= 40 else safe_repr(name) for name in becomes]
    columns = pd.DataFrame({"column": shown, "becomes": becomes.values()})  # no values: they may be personal
    meta = {"name": name, "features": kinds, "position_is_real": "position" in roles}
    tables_of = (frame.reset_index(drop=True) for frame in (intents, kept, impressions))
    return Plan(roles, columns, notes, Dataset(name, kinds, meta, *tables_of, typed))


def write(planned: Plan, folder: Path) -> None:
    """Write the tables, if `check` passes them; all of the folder or nothing. Raises TableError."""
    if folder.exists() or folder.is_symlink():
        raise TableError(f"{folder} is there already; expected a new folder: name another")
    with artifacts.atomic(folder) as fresh:
        tables.write(planned.dataset, fresh)
        report = tables.check(fresh)
        if report.errors:
            _refuse([f"{where} {what}" for where, what in report.errors])


def _of_what_was_asked(log: pd.DataFrame, asked: Asked) -> list[str]:
    named = [*filter(None, asked.roles.values()), *asked.kinds, *asked.drop]
    faults = [f"there is no column {safe_repr(each)}{nearest(each, log)}" for each in named if each not in log]
    unknown = [each for each in asked.roles if each not in ROLES]
    faults += [f"{each} is no role{nearest(each, ROLES)}: {', '.join(ROLES)}" for each in unknown]
    for column, kind in asked.kinds.items():
        if column in RESERVED:
            faults.append(
                f"--feature {column}: a table has a column of this name already; name it otherwise in the log"
            )
        if kind not in KINDS:
            faults.append(f"--feature {column}={kind}: expected one of {', '.join(KINDS)}{nearest(kind, KINDS)}")
    if asked.time_unit is not None and asked.time_unit not in EPOCH:
        faults.append(f"--time-unit is {asked.time_unit}; expected one of {', '.join(EPOCH)}")
    return faults


def _roles(log: pd.DataFrame, asked: Asked, faults: list[str]) -> dict[str, str]:
    """role -> column: as asked, else by ROLES' names; `clicked` also by its values. A fault where several could be."""
    taken = {*asked.roles.values(), *asked.kinds, *asked.drop}
    plain = {column: re.sub(r"[^a-z0-9]", "", column.lower()) for column in log if column not in taken}
    roles = {role: column for role, column in asked.roles.items() if column in log}
    for role, names in ROLES.items():
        if role in asked.roles:
            continue
        found = [column for column, name in plain.items() if name == names[0]]
        found = found or [column for column, name in plain.items() if name in names]
        if len(found) > 1:
            both = " or ".join(map(safe_repr, found))
            faults.append(f"{role} may be {both}; say which: --column {role}=NAME")
        if found:
            roles[role] = found[0]
            del plain[found[0]]
    if "clicked" not in roles:
        two = [
            column for column in plain if {*_text(log[column]).dropna().str.lower()} in ({"0", "1"}, {"true", "false"})
        ]
        session = log[roles["session_id"]] if "session_id" in roles else pd.Series(0, log.index)
        two = [column for column in two if _varying(log[column], session)]
        if len(two) == 1:
            roles["clicked"] = two[0]
        elif two:
            faults.append(f"clicked may be {' or '.join(map(safe_repr, two))}; say which: --column clicked=NAME")
    return roles


def _flags(values: pd.Series, faults: list[str]) -> pd.Series:
    """(rows,) 1 and 0 of what says yes or no."""
    words = _text(values).str.strip().str.lower().fillna("")
    wrong = ~words.isin([*TRUE, *FALSE])
    if wrong.any():
        shown = ", ".join(map(safe_repr, words[wrong].unique()[:3]))
        faults.append(f"column {values.name}: {_rows(wrong)} neither yes nor no: {shown}; expected 1 or 0")
    return words.isin(TRUE).astype("int8")


def _in_order(log: pd.DataFrame, roles: Mapping, asked: Asked, faults: list[str], notes: list[str]) -> pd.DataFrame:
    """The log without rows that repeat another, by time, session and position: no table depends on the file's order.

    Its column TIME is the session's time, the earliest of its rows.
    """
    again = pd.DataFrame({column: _text(log[column]).fillna("") for column in log}).duplicated()
    if again.any():
        notes.append(f"{again.sum():,} rows repeat another one in every column: each is kept once")
    log = log[~again].copy()
    keys = [roles["session_id"], *([roles["position"]] if "position" in roles else [])]
    by = pd.DataFrame({"session": _text(log[keys[0]]), "position": _numbers(log[keys[-1]])[0]}, log.index)
    if "timestamp" in roles:
        times = _times(log[roles["timestamp"]], asked, faults, notes)
        log[TIME] = times.groupby(by["session"]).transform("min")
        if (moved := (log[TIME] != times) & times.notna()).any():
            count = by["session"][moved].nunique()
            notes.append(f"{roles['timestamp']} differs inside {count:,} sessions: each has the earliest of its times")
        by.insert(0, "time", log[TIME])
    by = by if "position" in roles else by.drop(columns="position")
    return log.loc[by.sort_values(list(by), kind="stable").index]


def _times(column: pd.Series, asked: Asked, faults: list[str], notes: list[str]) -> pd.Series:
    """(rows,) UTC without zone. Numbers count from 1970 in a unit that is asked for, or told by their size."""
    nothing = pd.Series(pd.NaT, column.index, dtype="datetime64[us]")
    numbers, words = _numbers(column)
    if pd.api.types.is_datetime64_any_dtype(column) or pd.api.types.is_object_dtype(column):
        moments = pd.to_datetime(column, errors="coerce", utc=True)
    elif numbers.notna().any() and not words.any() and asked.time_format is None:
        units = [asked.time_unit] if asked.time_unit else EPOCH
        told = [unit for unit in units if numbers.dropna().between(*EPOCH[unit], inclusive="left").all()]
        if not told:
            faults.append(
                f"column {column.name}: numbers from {numbers.min():.12g} to {numbers.max():.12g} are no times since "
                f"1970 in one unit; expected {' | '.join(units)}, or --time-format"
            )
            return nothing
        moments = pd.to_datetime(numbers, unit=told[0]).dt.tz_localize("UTC")
        notes.append(
            f"{column.name} is read as {UNITS[told[0]]} since 1970: {moments.min():%Y-%m-%d %H:%M} to "
            f"{moments.max():%Y-%m-%d %H:%M}"
        )
    else:
        text = _text(column).str.strip()
        moments = pd.to_datetime(text.astype(object), errors="coerce", utc=True, format=asked.time_format or "ISO8601")
        zoned = text.str.contains(ZONE) & text.notna()
        if zoned.any() and not zoned[text.notna()].all():
            faults.append(f"column {column.name}: {_rows(zoned)} with a zone, others without; expected all or none")
        elif zoned.any():
            notes.append(f"{column.name} has time zones: it is kept in UTC")
    wrong, far = moments.isna() & column.notna(), moments.notna() & ~moments.dt.year.between(YEARS[0], YEARS[1] - 1)
    dates = asked.time_format or "2026-01-31 18:05, or --time-format"
    for rows, what in (
        (wrong, f"no date like {dates}"),
        (far, f"before {YEARS[0]} or after {YEARS[1]}"),
        (column.isna(), "empty"),
    ):
        if rows.any():
            faults.append(f"column {column.name}: {_rows(rows)} {what}: {safe_repr(column[rows].iloc[0])}")
    return moments.dt.tz_localize(None).astype("datetime64[us]")


def _positions(log: pd.DataFrame, roles: Mapping, session: pd.Series, faults: list[str], notes: list[str]) -> pd.Series:
    """(rows,) from 0, without gaps in a session; the order of the rows where no column says it."""
    if "position" not in roles:
        notes.append("no column is position: the order of rows is taken, and no position bias is learnt from it")
        return session.groupby(session).cumcount().astype("int16")
    given = _numbers(log[roles["position"]])[0]
    if (wrong := given.isna() | (given % 1 != 0)).any():
        shown = safe_repr(log[roles["position"]][wrong].iloc[0])
        faults.append(f"column {roles['position']}: {_rows(wrong)} no whole number: {shown}; expected 1, 2, 3, ..")
        return given
    twice = pd.DataFrame({"session": session, "position": given}).duplicated(keep=False)
    if twice.any():
        faults.append(f"column {roles['position']}: {_rows(twice)} the place of another answer of its session")
    found = given.groupby(session).rank(method="first").sub(1)
    if (found + 1 == given).all():
        notes.append(f"{roles['position']} begins at 1; in the tables it begins at 0")
    elif (found != given).any():
        odd = session[found != given].nunique()
        notes.append(
            f"{roles['position']} does not count from 0 (or from 1 throughout) without gaps in {odd:,} of "
            f"{session.nunique():,} sessions: it is counted again, in the same order"
        )
    return found.astype("int16")


def _key(roles: Mapping) -> str:
    """The role that says which intent was shown."""
    return "intent_id" if "intent_id" in roles else "title"


def _varying_roles(log: pd.DataFrame, roles: Mapping, session: pd.Series) -> list[str]:
    """Faults: of what a session has once, columns that differ inside sessions."""
    once = (roles[role] for role in ("user_id", "region", "split", "typed_query", "shuffled") if role in roles)
    return [
        f"column {column} differs inside {count:,} sessions; expected one value in each"
        for column in once
        if (count := _varying(log[column], session))
    ]


def _feature(
    log: pd.DataFrame, column: str, roles: Mapping, clicked: pd.Series, asked: Asked, notes: list[str]
) -> tuple[str, str]:
    """(kind, "") of a column that says something of a session before its list is shown; ("", why) of another."""
    values, words, session = log[column], _text(log[column]).str.strip(), log[roles["session_id"]]
    if column in asked.drop:
        return "", "as asked"
    if different := _varying(values, session):
        answer = log[roles[_key(roles)]]
        return "", f"varies inside {different:,} sessions" + ("" if _varying(values, answer) else ": of the answer")
    if column in asked.kinds:
        wrong = asked.kinds[column] == "numeric" and _numbers(values)[1].any()
        return ("", "has words that are no numbers") if wrong else (asked.kinds[column], "")
    each, first = words[~session.duplicated()].dropna(), ~session.duplicated()
    if column in RESERVED:
        return "", "has a name that the tables have"
    if each.nunique() < 2 and len(each) in (0, first.sum()):
        return "", "empty" if each.empty else "has one value"
    personal = _holds_personal(each)
    if is_personal(column) or personal.mean() > 0.5:
        why = "by its name" if is_personal(column) else "e-mail addresses or telephone numbers"
        return "", f"personal, {why} (--feature {column}=KIND keeps it)"
    if leak := _leak(log, words.fillna(""), roles, clicked):
        return "", f"{leak}: known after the click (--feature {column}=KIND keeps it)"
    if personal.any():
        notes.append(f"{column} holds e-mail addresses or telephone numbers in {personal.sum():,} sessions")
    chosen = clicked & words.notna()
    _note_foretelling(column, words[chosen], _text(log[roles[_key(roles)]])[chosen], notes)
    return _kind(column, values[first].dropna(), each)


def _holds_personal(words: pd.Series) -> pd.Series:
    """(rows,) True where a text holds an e-mail address or a telephone number."""
    return words.map({one: bool(MAIL.search(one) or PHONE.search(one)) for one in words.unique()}).astype(bool)


def _leak(log: pd.DataFrame, words: pd.Series, roles: Mapping, clicked: pd.Series) -> str:
    """How a column of the session says that there was a click, or which one; "" where it does not.

    A value, emptiness among them, that is there with clicks alone or never with one is found where that is no chance.
    """
    session = log[roles["session_id"]]
    any_click, first = clicked.groupby(session).transform("any"), ~session.duplicated()
    share = any_click[first].mean()
    if 0 < share < 1:
        by_value = any_click[first].groupby(words[first].to_numpy(dtype=object))
        count, clicks = by_value.size(), by_value.sum()
        always, never = (clicks == count) & (share**count < CHANCE), (clicks == 0) & ((1 - share) ** count < CHANCE)
        for found, where in ((always, "where something was clicked"), (never, "where nothing was clicked")):
            if found.any():
                return f"is {safe_repr(found.idxmax(), 20) if found.idxmax() else 'empty'} only {where}"
    chosen = clicked & (words != "")
    of_answer = [_text(log[roles[role]]) for role in ("intent_id", "title", "category") if role in roles]
    if chosen.sum() >= FEW and any((words[chosen] == one[chosen]).mean() > SUSPECT for one in of_answer):
        return "is the clicked answer's own"
    return ""


def _kind(column: str, values: pd.Series, words: pd.Series) -> tuple[str, str]:
    """The kind of a feature by its name and its values of the sessions (words: the same as text), or why it is none."""
    listed = values.map(lambda one: isinstance(one, list | np.ndarray))
    if listed.any() or pd.api.types.is_object_dtype(values):
        flat = all(isinstance(entry, str | int | np.integer) for one in values[listed] for entry in one)
        return ("history", "") if listed.all() and flat else ("", "is nested")
    distinct = words.nunique()
    if pd.api.types.is_datetime64_any_dtype(values) or words.str.fullmatch(r"\d{4}-\d\d-\d\d([T ].*)?").all():
        return "", "a time: make a number or a word of it"
    spelt = words.str.match(r"[+-]?0\d").any()  # "007" is a name
    if not spelt and not _numbers(values)[1].any() and (distinct > FEW or not words.isin([*TRUE, *FALSE]).all()):
        return "numeric", ""
    if re.search(WORDY, column.lower()) or (words.str.split().str.len().mean() >= 2 and distinct > FEW):
        return "text", ""
    if distinct > OWN_VALUE * len(words) and len(words) >= FEW:
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
    """(the table of intents as they were last shown, answer -> intent_id): ids as given, else numbers by title."""
    last = log[~answer.duplicated(keep="last")].assign(**{TIME: answer}).sort_values(TIME)
    keys = last[TIME].tolist()
    width = len(str(len(keys)))
    ids = {one: one if "intent_id" in roles else f"i{number:0{width}d}" for number, one in enumerate(keys, start=1)}
    table = pd.DataFrame({"intent_id": [ids[key] for key in keys]}, last.index)
    for role in OF_INTENT:
        table[role] = _of(last, roles, role)
    table["title"] = table["title"].fillna(last[TIME])
    return table.assign(valid_from=pd.Series(pd.NaT, table.index, dtype="datetime64[us]")), ids


def _of(log: pd.DataFrame, roles: Mapping, role: str, otherwise: pd.Series | None = None) -> pd.Series:
    found = _text(log[roles[role]]) if role in roles else pd.Series(pd.NA, log.index, dtype="string")
    return found if otherwise is None else found.fillna(otherwise)


def _text(values: pd.Series) -> pd.Series:
    """Values as strings; lists and structures as Python writes them."""
    if pd.api.types.is_object_dtype(values):
        values = values.map(lambda one: str(list(one)) if isinstance(one, np.ndarray) else one)
    return values.astype("string")


def _numbers(values: pd.Series) -> tuple[pd.Series, pd.Series]:
    """(numbers, whether it is a word that is none); what spells an empty value is missing."""
    words = _text(values).str.strip()
    words = words.mask(words.str.lower().isin(MISSING))
    numbers = pd.to_numeric(words.astype(object), errors="coerce")
    return numbers, numbers.isna() & words.notna()


def _varying(values: pd.Series, group: pd.Series) -> int:
    """Groups in which the values differ."""
    codes = pd.Series(pd.factorize(_text(values).fillna(""))[0], values.index).groupby(_text(group))
    return int((codes.min() != codes.max()).sum())


def _rows(wrong: pd.Series) -> str:
    """'3 rows (first: row 5) have'; rows count from 1, without the names."""
    rows = wrong.index[wrong.to_numpy(bool)]
    return (
        f"{len(rows):,} row{'s' * (len(rows) != 1)} (first: row {min(rows) + 1:,}) {'is' if len(rows) == 1 else 'are'}"
    )


def printable(text: str) -> str:
    """Lines for a terminal: what a log's names hold of control characters is escaped."""
    return "".join(one if one.isprintable() or one == "\n" else repr(one)[1:-1] for one in text)


def _refuse(faults: Sequence[str]) -> None:
    lines = printable("\n".join(f"  {fault}" for fault in faults))
    raise TableError(f"the log cannot be imported; nothing was written:\n{lines}")
