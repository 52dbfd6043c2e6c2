"""What grows with the sessions: exponents by hand, and one measured size end to end."""

import pandas as pd
import pytest

from benchmarks import scaling


def test_growth_is_the_exponent_of_a_power_law():
    sizes = [1_000, 10_000, 100_000]
    rows = [(n, step, seconds) for n in sizes for step, seconds in (("draw", 2e-3 * n), ("encode", 1e-6 * n**2))]
    found = scaling.growth(pd.DataFrame(rows, columns=["sessions", "step", "seconds"]))
    assert found["draw"] == pytest.approx(1)
    assert found["encode"] == pytest.approx(2)
    assert pd.isna(found["train"])


@pytest.mark.slow
def test_a_size_is_measured_from_world_to_evaluation(tmp_path, capfd):
    table = scaling.measure(tmp_path, [600], lists=50)
    assert table["step"].tolist() == list(scaling.STEPS)
    assert (table["sessions"] == 600).all()
    rows = table.set_index("step")["rows"]
    assert rows["load"] == rows["encode"] == rows["draw"] == 600
    assert 0 < rows["train"] <= 50
    assert (table["peak_mb"] > 0).all()
    assert "GAUC of test" in capfd.readouterr().out
    pd.testing.assert_frame_equal(pd.read_parquet(tmp_path / scaling.TABLE), table)
    assert pd.isna(scaling.growth(table)).all()
    assert (tmp_path / scaling.FIGURE).read_bytes().startswith(b"\x89PNG")
    again = scaling.measure(tmp_path, [600], lists=50)
    pd.testing.assert_frame_equal(again, table)  # to the second: it was not measured again
    assert "600" not in capfd.readouterr().out
