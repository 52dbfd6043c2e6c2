"""The impression lists and what refers to sessions and intents: orphans, repeats, positions, clicks, valid_from, truth.

Impressions are held as integers: the row of their session and the row of their intent, -1 where there is none.
"""

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc

from rgalign.data.check_values import DISTRIBUTIONS, NEVER_EMPTY, Source
from rgalign.data.schema import SPLITS, STRING, TIME, as_type, is_empty, regrouped
from rgalign.errors import Report, safe_repr
from rgalign.params_schema import Experiment

ROWS_AT_ONCE = 2**22  # impressions whose strings are in memory together
LISTS_AT_ONCE = 2**14  # of truth's, each as long as the knowledge base
MAX_POSITIONS = 2**15
CHANCES = ("propensity", "selection")  # columns of impressions
SURPRISE = 4  # standard deviations of a Poisson count, and rows, beyond which rare propensities are too many [C]
SUM_TOLERANCE = 1e-3  # of a posterior stored in 32 bits


def check_lists(report: Report, source: Source) -> None:
    """Adds to `report` what is wrong with impressions, and with transcripts, labels and truth against other tables."""
    if "impressions" in source.files:
        _check_impressions(report, source)
    _check_references(report, source)
    _check_truth(report, source)


def _check_impressions(report: Report, source: Source) -> None:
    session = _rows_of(report, source, "session_id", "sessions")
    intent = _rows_of(report, source, "intent_id", "intents")
    position, clicked, *chances = (_numbers(report, source, n) for n in ("position", "clicked", *CHANCES))
    if clicked is not None:
        _check_range(report, "clicked", clicked, (clicked != 0) & (clicked != 1), "expected 0 or 1")
    for name, chance in zip(CHANCES, chances, strict=True):
        if chance is not None:
            wrong = ~((chance > 0) & (chance <= 1))
            _check_range(report, name, chance, wrong, "expected a probability, above 0 and at most 1")
    if (propensity := chances[0]) is not None:
        _note_rare(report, propensity, len(source.ids.get("intents", ())))
    if session is None or "sessions" not in source.ids:
        return
    known = session >= 0
    source.shown = np.bincount(session[known], minlength=len(source.ids["sessions"]))
    if intent is not None:
        pairs = session.astype(np.int64) * len(source.ids["intents"]) + intent
        again, then = _repeated(pairs, known & (intent >= 0)), "; expected each (session_id, intent_id) once"
        report.error_rows("impressions", again, "shows an intent that its session was already shown", then)
        time, valid_from = source.load(report, "sessions", "timestamp"), source.load(report, "intents", "valid_from")
        if time is not None and valid_from is not None:
            starts = as_type(valid_from, TIME).to_numpy()[intent]
            # NaT compares as False: such rows pass
            early = known & (intent >= 0) & (as_type(time, TIME).to_numpy()[session] < starts)
            ids = source.ids["intents"].take(pa.array(intent[early])).to_pylist()
            then = "; correct valid_from or leave the intent out of the list"
            report.error_values("impressions.intent_id", ids, "shows an intent before its valid_from", then)
    if position is not None:
        _check_positions(report, session, position)
    _check_clicks(report, source, session, clicked)
    if known.all() and np.count_nonzero(np.diff(session)) + 1 > np.count_nonzero(source.shown):
        report.note("impressions", "rows are not grouped by session: reading puts each list together")


def _rows_of(report: Report, source: Source, column: str, table: str) -> np.ndarray | None:
    """Row of each impression's session or intent in its own table, -1 for empty and orphaned, which are errors."""
    where, ids = f"impressions.{column}", source.ids.get(table)
    codes, empty, orphans, orphan_rows = [np.empty(0, np.int32)], [np.empty(0, bool)], [], 0
    pieces = (pa.table({column: piece}) for piece in source.pieces(report, "impressions", column, ROWS_AT_ONCE))
    for rows in regrouped(pieces, ROWS_AT_ONCE):
        keys = as_type(rows.column(0), STRING)
        empty.append(np.asarray(is_empty(keys)))
        if ids is not None:
            codes.append(_row_in(keys, ids))
            lost = (codes[-1] < 0) & ~empty[-1]
            orphan_rows += lost.sum()
            orphans += pc.unique(keys.filter(pa.array(lost))).to_pylist()[:3]
    if not source.has("impressions", column):
        return None
    report.error_rows(where, np.concatenate(empty), "is empty", f"; {NEVER_EMPTY[where]}")
    report.error_values(where, orphans, f"names what {table}.parquet does not have", number=int(orphan_rows))
    return np.concatenate(codes) if len(codes) > 1 else None


def _row_in(values: pa.ChunkedArray, ids: pa.Array) -> np.ndarray:
    return pc.fill_null(pc.index_in(as_type(values, STRING), value_set=ids), -1).to_numpy()


def _numbers(report: Report, source: Source, column: str) -> np.ndarray | None:
    """A number column of the impressions; empty rows are an error and become NaN."""
    where, values = f"impressions.{column}", source.load(report, "impressions", column)
    if values is None:
        return None
    if report.error_rows(where, is_empty(values), "is empty", f"; {NEVER_EMPTY[where]}") or column in CHANCES:
        values = as_type(values, pa.float64())
    elif pa.types.is_boolean(values.type):
        values = as_type(values, pa.int8())
    return values.to_numpy()


def _check_range(report: Report, column: str, values: np.ndarray, wrong: np.ndarray, expected: str) -> None:
    wrong = wrong & ~np.isnan(values)
    found = ", ".join(safe_repr(value) for value in np.unique(values[wrong])[:3])
    report.error_rows(f"impressions.{column}", wrong, f"has the value {found}", f"; {expected}")


def _note_rare(report: Report, propensity: np.ndarray, intents: int) -> None:
    """Propensities whose weights are clipped, and whether there are more of them than right ones can be.

    A slot shows an intent of a propensity below `least` with a probability of at most intents * least: their sum.
    """
    clip = Experiment().clip  # of a run whose params give no other
    least = 1 / clip
    rare = (propensity > 0) & (propensity < least)
    share, possible = rare.mean() if len(rare) else 0, min(1, intents * least)
    then = f", {share:.2%} of all: evaluation.experiment.clip makes their weights in off-policy estimates {clip:g}"
    if intents and rare.sum() > len(rare) * possible + SURPRISE * np.sqrt(len(rare) * possible) + SURPRISE:
        most = f"with {intents:,} intents at most {possible:.2%} can be so rare"
        then += f"; {most}: is it P(this intent at this position)?"
    report.note_rows("impressions.propensity", rare, f"is below {least:g}", then)


def _check_positions(report: Report, session: np.ndarray, position: np.ndarray) -> None:
    """Positions of each session must be 0 to n-1, each once."""
    where, checked = "impressions.position", (session >= 0) & ~np.isnan(position)
    outside = checked & ((position < 0) | (position >= MAX_POSITIONS))
    inside = checked & ~outside
    again = _repeated(session.astype(np.int64) * MAX_POSITIONS + np.where(inside, position, 0).astype(np.int64), inside)
    _check_range(report, "position", position, outside, f"expected 0 to {MAX_POSITIONS - 1}")
    then = "; expected each (session_id, position) once"
    report.error_rows(where, again, "has a position that its session already has", then)
    shown = np.bincount(session[session >= 0], minlength=1)
    beyond = inside & (position >= shown[np.where(checked, session, 0)])
    then = "; expected 0 to n-1 in each session, without gaps"
    report.error_rows(where, beyond, "has a position beyond the length of its list", then)


def _repeated(keys: np.ndarray, checked: np.ndarray) -> np.ndarray:
    """True where a checked key has come before; sorts only when it must."""
    again = np.zeros(len(keys), bool)
    own = keys if checked.all() else keys[checked]
    if not (own[1:] > own[:-1]).all():
        again[checked] = pd.Series(own).duplicated()
    return again


def _check_clicks(report: Report, source: Source, session: np.ndarray, clicked: np.ndarray | None) -> None:
    """Lists of one class are noted; a split with no other lists is an error."""
    known, shown = session >= 0, source.shown
    report.note_rows("sessions", shown == 0, "has no impression", noun="session")
    if clicked is None:
        return
    clicks = np.bincount(session[known], weights=np.nan_to_num(clicked[known]) != 0, minlength=len(shown))
    for verb, one_class in {"has no click": clicks == 0, "has only clicks": clicks == shown}.items():
        then = ": no GAUC, left out of it and counted"
        report.note_rows("impressions", (shown > 0) & one_class, verb, then, "session")
    wrong = {where for where, _ in report.errors}
    if source.parts is None or wrong & {"impressions.session_id", "impressions.clicked"}:
        return  # it would follow from an error that is already in the report
    both = (clicks > 0) & (clicks < shown)
    hint = "; a log of clicks alone needs sampled negatives: docs/own-logs.md" if (clicks == shown).all() else ""
    for number, name in enumerate(SPLITS):
        own = source.parts == number
        if own.any() and not both[own].any():
            what = f"no session of {name} has a clicked and an unclicked intent: nothing can be learnt or judged"
            report.error("impressions.clicked", what + hint)


# Transcripts, labels and truth, which refer to sessions and intents.


def _check_references(report: Report, source: Source) -> None:
    for table in ("transcripts", "labels", "truth"):
        for column, owner in (("session_id", "sessions"), ("intent_id", "intents")):
            values = source.load(report, table, column)
            if values is None or owner not in source.ids:
                continue
            lost = ~np.asarray(is_empty(values)) & (_row_in(values, source.ids[owner]) < 0)
            if table == "transcripts" and column == "session_id" and source.has(table, "features"):
                lost &= np.asarray(pc.is_null(source.load(report, table, "features")))
            names = as_type(values, STRING).filter(pa.array(lost)).slice(0, 1000).to_pylist()
            verb = f"names what {owner}.parquet does not have"
            report.error_values(f"{table}.{column}", names, verb, number=int(lost.sum()))
    if (labels := source.load(report, "labels", "intent_id")) is not None:
        report.note_rows("labels.intent_id", is_empty(labels), "is empty", ": not labelled yet")
    own = [source.load(report, "transcripts", column) for column in ("session_id", "features")]
    if empty := [np.asarray(is_empty(column)) for column in own if column is not None]:
        bare = np.logical_and.reduce(empty)  # a transcript needs its features: its own, or those of its session
        report.error_rows("transcripts", bare, "has neither session_id nor features", "; fill in either")


def _check_truth(report: Report, source: Source) -> None:
    """Every session has its probabilities: as many as intents, or as intents it was shown; distributions sum to 1."""
    lists = {column: _lists_of(report, source, column) for column in DISTRIBUTIONS}
    owner = source.load(report, "truth", "session_id")
    if owner is None or not {"sessions", "intents"} <= set(source.ids):
        return
    code, sessions = _row_in(owner, source.ids["sessions"]), len(source.ids["sessions"])
    shown = np.zeros(sessions, int) if source.shown is None else source.shown
    absent = np.bincount(code[code >= 0], minlength=sessions) == 0
    then = "; expected one for every session, or no truth.parquet"
    report.error_rows("truth.session_id", absent, "has no row", then, "session")
    for column in (column for column in DISTRIBUTIONS if source.has("truth", column)):
        where, of_list = f"truth.{column}", column == "click_probability"
        lengths, outside, total = lists[column]
        expected = shown[code] if of_list else np.full(len(code), len(source.ids["intents"]))
        what = "its session was shown intents" if of_list else "intents.parquet has rows"
        wrong = (lengths != expected) & (code >= 0) & (shown.any() or not of_list)
        report.error_rows(where, wrong, "has a list of another length", f"; expected as many as {what}")
        beyond = report.error_rows(where, outside, "has a value outside 0 to 1")
        if not of_list and not beyond and not wrong.any():
            off = np.abs(total - 1) > SUM_TOLERANCE
            report.error_rows(where, off, "does not sum to 1", "; expected a distribution")


def _lists_of(report: Report, source: Source, column: str) -> tuple[np.ndarray, ...]:
    """(rows,) each: a list's length, whether it has a value outside 0 to 1, its sum; up to where it can be read."""
    found = [(np.zeros(0, int), np.zeros(0, bool), np.zeros(0))]
    for lists in source.pieces(report, "truth", column, LISTS_AT_ONCE):
        flat, parents = (of(lists).to_numpy(zero_copy_only=False) for of in (pc.list_flatten, pc.list_parent_indices))
        outside = np.zeros(len(lists), bool)
        outside[parents[~((flat >= 0) & (flat <= 1))]] = True
        lengths = pc.fill_null(pc.list_value_length(lists), 0).to_numpy(zero_copy_only=False)
        found.append((lengths, outside, np.bincount(parents, weights=flat, minlength=len(lists))))
    return tuple(np.concatenate(parts) for parts in zip(*found, strict=True))
