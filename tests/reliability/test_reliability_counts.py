"""docs/reliability.md says what the harness counted, and the harness has counted every case that there is."""

from collections import Counter

import param_faults
import table_faults
from refresh_reliability import COUNTS, DOCUMENT, read_counts, with_counts

from rgalign.params import ROOT


def test_the_document_is_what_the_counts_make_of_it():
    text = DOCUMENT.read_text(encoding="utf-8")
    assert with_counts(text) == text


def test_every_case_of_a_bad_table_is_counted_and_none_has_failed():
    counted = read_counts()["tables"]
    there = {group: Counter(case.outcome for case in cases.values()) for group, cases in table_faults.GROUPS.items()}
    assert counted == {group: dict(counts) for group, counts in there.items()}


def test_every_bad_param_is_counted_and_none_has_failed():
    counted = read_counts()["params"]
    there = Counter(case.kind for case in param_faults.CASES.values())
    assert counted["by kind"] == {kind: {"refused": number} for kind, number in there.items()}
    assert counted["slowest"] < 2


def test_no_kill_was_lost():
    kills = read_counts()["kills"]
    assert not any("lost" in found for found in kills["by place"].values())


def test_the_counts_lie_where_the_document_says():
    assert COUNTS.relative_to(ROOT).as_posix() in DOCUMENT.read_text(encoding="utf-8")
