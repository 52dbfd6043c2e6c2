"""The impression lists and what refers to them: orphans, doubles, positions, clicks, valid_from; transcripts, truth.

Impressions are held as integers: the row of their session and the row of their intent, -1 where there is none.
"""

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from rgalign.data.check_schema import READ_ERRORS, Source
from rgalign.data.schema import PROBABILITIES, REQUIRED, SPLITS, STRING, TIME, as_type, is_empty, regrouped
from rgalign.errors import Report, count_rows, count_values, quote
from rgalign.params_schema import Experiment

ROWS_AT_ONCE = 2**22  # impressions whose strings are in memory together
DISTRIBUTIONS = [column for column, kind in REQUIRED["truth"].items() if kind == PROBABILITIES]
LISTS_AT_ONCE = 2**14  # of truth's, each as long as the knowledge base
MAX_POSITIONS = 2**15
CLIP = Experiment().clip  # of a run whose params do not say another
SURPRISE = 4  # standard deviations of a Poisson count, and rows, beyond which rare propensities are too many [C]
SUM_TOLERANCE = 1e-3  # of a posterior stored in 32 bits


def check_impressions(report: Report, source: Source) -> None:
    """Adds what is wrong with impressions.parquet, alone and against sessions and intents."""
    if "impressions" not in source.files:
        return
    session = _codes(report, source, "session_id", "sessions", "every impression belongs to a session")
    intent = _codes(report, source, "intent_id", "intents", "every impression shows an intent")
    position = _numbers(report, source, "position", "expected 0 for the first place, then 1, 2, ...")
    clicked = _numbers(report, source, "clicked", "expected 0 or 1")
    propensity = _numbers(report, source, "propensity", "fill every row, or leave the column out")
    if clicked is not None:
        _check_range(report, "clicked", clicked, (clicked != 0) & (clicked != 1), "expected 0 or 1")
    if propensity is not None:
        wrong = ~((propensity > 0) & (propensity <= 1)) & ~np.isnan(propensity)
        _check_range(report, "propensity", propensity, wrong, "expected a probability, above 0 and at most 1")
        _note_rare(report, propensity, len(source.ids.get("intents", ())))
    if session is None or "sessions" not in source.ids:
        return
    source.shown = np.bincount(session[session >= 0], minlength=len(source.ids["sessions"]))
    if intent is not None:
        _check_doubles(report, source, session, intent)
        _check_valid_from(report, source, session, intent)
    if position is not None:
        _check_positions(report, session, position)
    _check_clicks(report, source, session, clicked)
    lists = np.count_nonzero(np.bincount(session[session >= 0], minlength=1))
    if (session >= 0).all() and np.count_nonzero(np.diff(session)) + 1 > lists:
        report.note("impressions", "rows are not grouped by session: reading puts each list together")


def _codes(report: Report, source: Source, column: str, table: str, why: str) -> np.ndarray | None:
    """Row of each impression's session or intent in its own table, -1 for empty and orphaned, which are faults."""
    if not source.has("impressions", column):
        return None
    ids = source.ids.get(table)
    codes, empty, orphans, orphan_rows = [], [], [], 0
    try:
        for rows in regrouped(source.files["impressions"].iter_batches(ROWS_AT_ONCE, [column]), ROWS_AT_ONCE):
            keys = as_type(rows.column(0), STRING)
            keys.validate(full=True)
            empty.append(np.asarray(is_empty(keys)))
            code = pc.fill_null(pc.index_in(keys, value_set=ids), -1).to_numpy() if ids is not None else None
            if code is not None:
                codes.append(code)
                lost = (code < 0) & ~empty[-1]
                orphan_rows += lost.sum()
                orphans += pc.unique(keys.filter(pa.array(lost))).to_pylist()[:3]
    except READ_ERRORS as error:
        report.fault(f"impressions.{column}", f"cannot be read, the file is corrupt ({error}); write it again")
        return None
    missing = np.concatenate(empty) if empty else np.zeros(0, bool)
    if missing.any():
        report.fault(f"impressions.{column}", f"{count_rows(missing, 'is empty')}; {why}")
    if orphan_rows:
        what = count_values(orphans, orphan_rows, f"names what {table}.parquet does not have")
        report.fault(f"impressions.{column}", what)
    return np.concatenate(codes) if codes else None


def _numbers(report: Report, source: Source, column: str, why: str) -> np.ndarray | None:
    """A number column of the impressions; empty rows are a fault and become NaN."""
    values = source.load(report, "impressions", column)
    if values is None:
        return None
    empty = np.asarray(is_empty(values))
    if empty.any():
        report.fault(f"impressions.{column}", f"{count_rows(empty, 'is empty')}; {why}")
    if column == "propensity" or empty.any():
        values = as_type(values, pa.float64())
    elif pa.types.is_boolean(values.type):
        values = as_type(values, pa.int8())
    return values.to_numpy()


def _check_range(report: Report, column: str, values: np.ndarray, wrong: np.ndarray, expected: str) -> None:
    wrong &= ~np.isnan(values)
    if wrong.any():
        found = ", ".join(quote(value) for value in np.unique(values[wrong])[:3])
        what = count_rows(wrong, f"has the value {found}")
        report.fault(f"impressions.{column}", f"{what}; {expected}")


def _note_rare(report: Report, propensity: np.ndarray, intents: int) -> None:
    """Propensities whose weights are clipped, and whether there are more of them than right ones can be.

    A slot shows an intent of a propensity below `least` with a probability of at most intents * least: their sum.
    """
    least = 1 / CLIP
    rare = (propensity > 0) & (propensity < least)
    if not rare.any():
        return
    share, possible = rare.mean(), min(1, intents * least)
    what = f"{count_rows(rare, f'is below {least:g}')}, {share:.2%} of all: evaluation.experiment.clip makes their "
    what += f"weights in off-policy estimates {CLIP:g}"
    if intents and rare.sum() > len(rare) * possible + SURPRISE * np.sqrt(len(rare) * possible) + SURPRISE:
        what += (
            f"; with {intents:,} intents at most {possible:.2%} can be so rare: is it P(this intent at this position)?"
        )
    report.note("impressions.propensity", what)


def _check_doubles(report: Report, source: Source, session: np.ndarray, intent: np.ndarray) -> None:
    again = _repeated(session.astype(np.int64) * len(source.ids["intents"]) + intent, (session >= 0) & (intent >= 0))
    if again.any():
        what = count_rows(again, "shows an intent that its session was already shown")
        report.fault("impressions", f"{what}; expected each (session_id, intent_id) once")


def _check_positions(report: Report, session: np.ndarray, position: np.ndarray) -> None:
    """Positions of each session must be 0 to n-1, each once."""
    judged = (session >= 0) & ~np.isnan(position)
    outside = judged & ((position < 0) | (position >= MAX_POSITIONS))
    inside = judged & ~outside
    again = _repeated(session.astype(np.int64) * MAX_POSITIONS + np.where(inside, position, 0).astype(np.int64), inside)
    _check_range(report, "position", position, outside, f"expected 0 to {MAX_POSITIONS - 1}")
    if again.any():
        what = count_rows(again, "has a position that its session already has")
        report.fault("impressions.position", f"{what}; expected each (session_id, position) once")
    shown = np.bincount(session[session >= 0], minlength=1)
    beyond = inside & (position >= shown[np.where(judged, session, 0)])
    if beyond.any():
        what = count_rows(beyond, "has a position beyond the length of its list")
        report.fault("impressions.position", f"{what}; expected 0 to n-1 in each session, without gaps")


def _repeated(keys: np.ndarray, judged: np.ndarray) -> np.ndarray:
    """True where a judged key has come before; sorts only when it must."""
    again = np.zeros(len(keys), bool)
    own = keys if judged.all() else keys[judged]
    if (own[1:] > own[:-1]).all():
        return again
    rows = np.flatnonzero(judged)
    order = rows[np.argsort(keys[rows], kind="stable")]
    again[order[1:]] = np.diff(keys[order]) == 0
    return again


def _check_valid_from(report: Report, source: Source, session: np.ndarray, intent: np.ndarray) -> None:
    time = source.load(report, "sessions", "timestamp")
    valid_from = source.load(report, "intents", "valid_from")
    if time is None or valid_from is None:
        return
    known = (session >= 0) & (intent >= 0)
    starts = as_type(valid_from, TIME).to_numpy()[intent]
    early = known & (as_type(time, TIME).to_numpy()[session] < starts)  # NaT compares as False: such rows pass
    if early.any():
        ids = source.ids["intents"].take(pa.array(intent[early]))
        what = count_values(ids.to_pylist(), early.sum(), "shows an intent before its valid_from")
        report.fault("impressions.intent_id", f"{what}; correct valid_from or leave the intent out of the list")


def _check_clicks(report: Report, source: Source, session: np.ndarray, clicked: np.ndarray | None) -> None:
    known, sessions, shown = session >= 0, len(source.ids["sessions"]), source.shown
    if (shown == 0).any():
        report.note("sessions", count_rows(shown == 0, "has no impression", "session"))
    if clicked is None:
        return
    clicks = np.bincount(session[known], weights=np.nan_to_num(clicked[known]) != 0, minlength=sessions)
    one_class = {"has no click": clicks == 0, "has only clicks": clicks == shown}
    for verb, which in one_class.items():
        if (wrong := (shown > 0) & which).any():
            report.note("impressions", f"{count_rows(wrong, verb, 'session')}: no GAUC, left out of it and counted")
    keys = ("impressions.session_id", "impressions.clicked")
    if source.parts is None or any(where in keys for where, _ in report.faults):
        return  # what follows from a fault already told is none of its own
    both = (clicks > 0) & (clicks < shown)
    hint = "; a log of clicks alone needs sampled negatives: docs/own-logs.md" if (clicks == shown).all() else ""
    for number, name in enumerate(SPLITS):
        own = source.parts == number
        if own.any() and not both[own].any():
            what = f"no session of {name} has a clicked and an unclicked intent: nothing can be learnt or judged"
            report.fault("impressions.clicked", what + hint)


def check_others(report: Report, source: Source) -> None:
    """Adds what is wrong with transcripts, labels and truth against sessions, intents and impressions."""
    for table in ("transcripts", "labels", "truth"):
        for column, owner in (("session_id", "sessions"), ("intent_id", "intents")):
            values = source.load(report, table, column)
            if values is None or owner not in source.ids:
                continue
            lost = ~np.asarray(is_empty(values)) & (_code_of(values, source.ids[owner]) < 0)
            if table == "transcripts" and column == "session_id" and source.has(table, "features"):
                lost &= np.asarray(pc.is_null(source.load(report, table, "features")))
            if lost.any():
                names = as_type(values, STRING).filter(pa.array(lost)).slice(0, 1000).to_pylist()
                what = count_values(names, lost.sum(), f"names what {owner}.parquet does not have")
                report.fault(f"{table}.{column}", what)
    labels = source.load(report, "labels", "intent_id")
    if labels is not None and pc.any(is_empty(labels)).as_py():
        report.note("labels.intent_id", f"{count_rows(is_empty(labels), 'is empty')}: not labelled yet")
    _check_transcripts(report, source)
    _check_truth(report, source)


def _code_of(values: pa.ChunkedArray, ids: pa.Array) -> np.ndarray:
    return pc.fill_null(pc.index_in(as_type(values, STRING), value_set=ids), -1).to_numpy()


def _check_transcripts(report: Report, source: Source) -> None:
    """Each transcript needs its features: its own, or those of the session it names."""
    columns = [source.load(report, "transcripts", column) for column in ("session_id", "features")]
    columns = [column for column in columns if column is not None]
    if columns:
        bare = np.logical_and.reduce([np.asarray(is_empty(column)) for column in columns])
        if bare.any():
            report.fault("transcripts", count_rows(bare, "has neither session_id nor features") + "; fill in either")


def _check_truth(report: Report, source: Source) -> None:
    lists = {column: _lists_of(report, source, column) for column in DISTRIBUTIONS}
    owner = source.load(report, "truth", "session_id")
    if owner is None or not {"sessions", "intents"} <= set(source.ids):
        return
    code = _code_of(owner, source.ids["sessions"])
    shown = np.zeros(len(source.ids["sessions"]), int) if source.shown is None else source.shown
    absent = np.bincount(code[code >= 0], minlength=len(source.ids["sessions"])) == 0
    if absent.any():
        what = count_rows(absent, "has no row", "session")
        report.fault("truth.session_id", f"{what}; expected one for every session, or no truth.parquet")
    for column in (column for column in DISTRIBUTIONS if source.has("truth", column)):
        lengths, outside, total = lists[column]
        wanted = shown[code] if column == "click_probability" else np.full(len(code), len(source.ids["intents"]))
        what = "intents.parquet has rows" if column != "click_probability" else "its session was shown intents"
        wrong = (lengths != wanted) & (code >= 0)
        if wrong.any() and (shown.any() or column != "click_probability"):
            found = count_rows(wrong, "has a list of another length")
            report.fault(f"truth.{column}", f"{found}; expected as many as {what}")
        if outside.any():
            report.fault(f"truth.{column}", count_rows(outside, "has a value outside 0 to 1"))
        elif column != "click_probability" and not wrong.any() and (off := np.abs(total - 1) > SUM_TOLERANCE).any():
            report.fault(f"truth.{column}", count_rows(off, "does not sum to 1") + "; expected a distribution")


def _lists_of(report: Report, source: Source, column: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(rows,) each: a list's length, whether it has a value outside 0 to 1, its sum; up to where it can be read."""
    found = [(np.zeros(0, int), np.zeros(0, bool), np.zeros(0))]
    for lists in source.pieces(report, "truth", column, LISTS_AT_ONCE):
        flat, parents = (of(lists).to_numpy(zero_copy_only=False) for of in (pc.list_flatten, pc.list_parent_indices))
        outside = np.zeros(len(lists), bool)
        outside[parents[~((flat >= 0) & (flat <= 1))]] = True
        lengths = pc.fill_null(pc.list_value_length(lists), 0).to_numpy(zero_copy_only=False)
        found.append((lengths, outside, np.bincount(parents, weights=flat, minlength=len(lists))))
    lengths, outside, total = (np.concatenate(parts) for parts in zip(*found, strict=True))
    return lengths, outside, total
