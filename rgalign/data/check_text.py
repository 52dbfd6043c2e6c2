"""Words in a data set: ids that cannot be kept, and what a prompt will not show of a text as it was written."""

import pyarrow as pa
import pyarrow.compute as pc

from rgalign.data.faults import Report, count_rows
from rgalign.data.schema import CHARACTERS_A_TOKEN, STRING, VALUE_CHARACTERS, as_type, is_text
from rgalign.rooms import Reasoner

IDS = ("intents.intent_id", "sessions.session_id", "sessions.user_id")
TEXTS = ("intents.title", "intents.description", "transcripts.typed_query")
LONGEST_ID = 256  # characters: ids are kept in arrays of one width
CONTROL = r"\p{Cc}"
HIDDEN = r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f]|\p{Cf}"  # what is no blank anyway; joiners, byte order marks


def is_blank(values: pa.ChunkedArray) -> pa.ChunkedArray | None:
    """True for words that are there and are nothing but blanks; None where the column holds no words."""
    if not is_text(values.type):
        return None
    words = as_type(values, STRING)
    return pc.fill_null(pc.and_(pc.equal(pc.utf8_trim_whitespace(words), ""), pc.not_equal(words, "")), False)


def check_text(report: Report, where: str, kind: str | None, values: pa.ChunkedArray) -> None:
    """Faults of ids, notes on texts. where: table.column;  kind: a feature's, else None."""
    if not is_text(values.type):
        return
    words = as_type(values, STRING)
    if where in IDS:
        _check_ids(report, where, words)
    elif where in TEXTS or kind == "text":
        if _any(hidden := pc.match_substring_regex(words, HIDDEN)):
            report.note(
                where, f"{count_rows(hidden, 'holds control characters or joiners')}: a prompt has them as blanks"
            )
        longest, why = CHARACTERS_A_TOKEN * Reasoner().max_tokens, "; raise reasoner.max_tokens to show more"
        _note_long(report, where, words, longest, why)
    elif kind == "categorical":
        _note_long(report, where, words, VALUE_CHARACTERS, "")


def _check_ids(report: Report, where: str, words: pa.ChunkedArray) -> None:
    if _any(wrong := pc.match_substring_regex(words, CONTROL)):
        what = count_rows(wrong, "holds control characters")
        report.fault(where, f"{what}; an id has none, not even a line break or NUL")
    if _any(wrong := pc.greater(pc.utf8_length(words), LONGEST_ID)):
        report.fault(where, f"{count_rows(wrong, f'is longer than {LONGEST_ID} characters')}; expected a short id")


def _note_long(report: Report, where: str, words: pa.ChunkedArray, longest: int, why: str) -> None:
    if _any(long := pc.greater(pc.utf8_length(words), longest)):
        what = count_rows(long, f"is longer than {longest:,} characters")
        report.note(where, f"{what}: a prompt shows the beginning{why}")


def _any(mask: pa.ChunkedArray) -> bool:
    return bool(pc.any(mask).as_py())
