"""Bad tables: each of the cases ends in one clear error, or in a stated rule; under hypothesis as well."""

from collections import Counter

import pytest
from every import every
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from small_shop import good_shop
from table_case import Case
from table_changes import replaced, write_raw
from table_faults import CASES, GROUPS, judge

from rgalign.data.checks import check_frame
from rgalign.data.schema import SPLITS, to_frame
from rgalign.data.tables import TableError, check, read


def test_the_good_shop_has_no_fault_and_its_lists_without_a_click_are_counted(tmp_path):
    tables, meta = good_shop()
    report = check(write_raw(tmp_path, tables, meta))
    assert not report.errors
    assert [where for where, _ in report.notes] == ["impressions"]


def test_there_are_a_hundred_cases_and_no_two_have_one_name():
    assert sum(map(len, GROUPS.values())) == len(CASES) >= 100
    assert Counter(case.outcome for case in CASES.values())["refused"] >= 100


@pytest.mark.parametrize("nth", [pytest.param(1, marks=pytest.mark.slow), 3])
def test_every_bad_table_ends_in_one_clear_error_or_a_stated_rule(tmp_path, nth):
    """The quick tests try every third."""
    every(dict(list(CASES.items())[::nth]), judge, tmp_path)


KINDS = good_shop()[1]["features"]
NEEDED = ["session_id", *KINDS]
OF_BOTH = ("a time zone on one side", "sessions.timestamp missing")  # which a frame alone cannot have


def of_columns(faults) -> list[tuple[str, str]]:
    """Faults of columns in the words of a parquet file, which has no seconds and its own name for a list's items."""
    checked = [f"sessions.{column}" for column in (*NEEDED, "timestamp")]
    own = [(where, what.replace("<item:", "<element:").replace("in s?", "in ms?")) for where, what in faults]
    return sorted(fault for fault in own if fault[0] in checked)


def test_a_fault_of_a_folder_is_the_same_fault_of_a_frame(tmp_path):
    compared = []

    def judge_frame(case, folder):
        tables, meta = good_shop()
        case.change(tables, meta)
        if case.damage or meta.get("features") != KINDS or tables["sessions"] is good_shop()[0]["sessions"]:
            return
        report, _ = check_frame(to_frame(tables["sessions"]), "sessions", NEEDED, kinds=KINDS)
        found = of_columns(report.errors)
        assert found == of_columns(check(write_raw(folder, tables, meta)).errors)
        compared.append(bool(found))

    refused = {name: case for name, case in CASES.items() if case.outcome == "refused" and name not in OF_BOTH}
    every(refused, judge_frame, tmp_path)
    assert sum(compared) > 30, "most refused cases are of other tables, but not all"


CELLS = {
    "sessions": ["session_id", "user_id", "split", "device", "order_amount", "event_text", "seen"],
    "intents": ["intent_id", "title", "description", "category"],
    "impressions": ["session_id", "intent_id", "position", "clicked", "propensity"],
}


@given(data=st.data())
@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_values_in_any_column_are_read_whole_or_refused_by_name(tmp_path, data):
    """Whatever stands in a few cells: `check` raises nothing, `read` agrees with it, and a fault names the table."""
    tables, meta = good_shop()
    table = data.draw(st.sampled_from(sorted(CELLS)))
    column = data.draw(st.sampled_from(CELLS[table]))
    old = tables[table][column].to_pylist()
    values = {
        str: st.text(max_size=8) | st.none() | st.sampled_from(old[:5]),
        int: st.integers(-5, 100) | st.none(),
        float: st.floats() | st.none(),
        list: st.lists(st.text(max_size=3) | st.none(), max_size=3) | st.none(),
    }[type(old[0])]
    cells = data.draw(st.dictionaries(st.integers(0, len(old) - 1), values, min_size=1, max_size=4))
    tables[table] = replaced(tables[table], column, cells)
    report = check(write_raw(tmp_path / "shop", tables, meta))
    assert all(isinstance(what, str) and where for where, what in report.errors)
    if report.errors:
        with pytest.raises(TableError) as raised:
            read(tmp_path / "shop", splits=SPLITS)
        assert str(raised.value) == str(report)
        assert any(where.startswith((table, "impressions", "truth")) for where, _ in report.errors)
        return
    shop = read(tmp_path / "shop", splits=SPLITS)
    assert [len(shop.sessions), len(shop.intents), len(shop.impressions)] == [
        tables[name].num_rows for name in ("sessions", "intents", "impressions")
    ]


def test_the_judge_sees_what_is_lost(tmp_path):
    """A case that says `kept` of what is refused, or `refused` of what is kept, is caught."""
    good = Case(lambda tables, meta: None)
    with pytest.raises(AssertionError):
        judge(good, tmp_path / "good")
    wrong = Case(CASES["one user"].change, outcome="kept")
    with pytest.raises(AssertionError):
        judge(wrong, tmp_path / "wrong")
