"""Notebook 01's looks at a data set, against a hand-worked log."""

from types import SimpleNamespace

import pandas as pd
import pytest

from rgalign.data import describe

SHOWN = pd.DataFrame(
    {
        "session_id": ["a", "a", "b", "b", "c", "c", "d", "d"],
        "position": [0, 1] * 4,
        "clicked": [1, 0, 0, 1, 1, 0, 1, 0],
    }
)
SESSIONS = pd.DataFrame({"session_id": list("abcd")})


@pytest.mark.parametrize("shuffled", [[True, False, None, False], ["", "no", None, "yes"]])
def test_a_list_is_shuffled_only_where_the_log_says_true(shuffled):
    shop = SimpleNamespace(impressions=SHOWN, sessions=SESSIONS.assign(shuffled=pd.Series(shuffled, dtype=object)))
    rates = describe.click_rates(shop).set_index(["lists", "position"])["rate"]
    if True in shuffled:
        assert rates["shuffled lists"].to_dict() == {0: 1, 1: 0}
        assert rates["lists in the shop's order"].to_dict() == pytest.approx({0: 2 / 3, 1: 1 / 3})
    else:
        assert rates["lists in the shop's order"].to_dict() == {0: 0.75, 1: 0.25}


def test_without_that_column_all_lists_stand_together():
    rates = describe.click_rates(SimpleNamespace(impressions=SHOWN, sessions=SESSIONS))
    assert rates["lists"].unique().tolist() == ["all lists"]
    assert rates["rate"].tolist() == [0.75, 0.25]
    assert rates["error"].tolist() == pytest.approx([(0.75 * 0.25 / 4) ** 0.5] * 2)
