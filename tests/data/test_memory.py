"""Notebook 01's way with a data set folder, in a process of its own: memory grows far less than the folder does."""

import json
import subprocess
import sys

import pytest

from rgalign.data.world_shards import write_world
from rgalign.params import ROOT

SESSIONS = (20_000, 100_000)
MOST = 2.4  # KiB a session: it takes 0.6, and 4.4 where the tables are read whole and written
STEPS = """
import resource, sys
from pathlib import Path
from rgalign.data import describe, load, tables

tables.ROW_GROUP, tables.ROWS_AT_ONCE, tables.KEYS_AT_ONCE = 2**12, 2**16, 2**16  # full in the smaller size already
shop, out = Path(sys.argv[1]), Path(sys.argv[2])
kinds = load.write_dataset(out, "folder", seed=0, world_settings={}, path=shop)
tables.check(out)
columns = [name for name, kind in kinds.items() if kind == "categorical"][:8]
seen = tables.read(out, columns=["shuffled", *columns])
for shown in (describe.overview, describe.click_rates, describe.train_clicks):
    shown(seen)
describe.value_shares(seen.sessions, columns)
few = tables.head(out, 4)
describe.session_card(few, few.sessions.session_id.iloc[3])
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="macOS counts the peak in other units, and compresses")
def test_the_peak_grows_by_less_than_the_tables(tmp_path):
    peaks = []
    for size in SESSIONS:
        shop = tmp_path / str(size)
        write_world(shop, seed=0, sessions=size, users=size // 5, transcripts=0)
        command = [sys.executable, "-c", STEPS, str(shop), str(tmp_path / f"{size}-copy")]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
        peaks.append(int(done.stdout))
    assert peaks[1] - peaks[0] < MOST * (SESSIONS[1] - SESSIONS[0]), peaks


def test_the_notebook_reads_no_column_that_it_does_not_show():
    notebook = json.loads((ROOT / "notebooks/01_data.ipynb").read_text(encoding="utf-8"))
    code = "".join("".join(cell["source"]) + "\n" for cell in notebook["cells"] if cell["cell_type"] == "code")
    reads = [line for line in code.splitlines() if "tables.read(" in line]
    assert reads
    assert all("columns=" in line for line in reads), reads
    assert "load.write_dataset(" in code
