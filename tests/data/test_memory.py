"""The notebooks' way with a data set folder, in a process of its own: memory grows far less than the folder does."""

import ast
import json
import subprocess
import sys

import pytest

from rgalign.params import ROOT
from rgalign.shopworld.world import write_world

SESSIONS = (20_000, 100_000)
SMALL = """
import sys
from pathlib import Path
from rgalign.data import describe, sources, tables
from rgalign.data.schema import read_yaml
from rgalign.params_schema import Data

tables.ROW_GROUP, tables.ROWS_AT_ONCE, tables.KEYS_AT_ONCE = 2**12, 2**16, 2**16  # full in the smaller size already
shop, out = Path(sys.argv[1]), Path(sys.argv[2])
"""
# not getrusage's ru_maxrss, which begins at the peak of the process that starts this one
PEAK = "print(next(line for line in open('/proc/self/status') if line.startswith('VmHWM')).split()[1])"
COPY = "tables.copy(shop, out, read_yaml(shop / 'dataset.yaml'))"
FIRST = """
kinds = sources.write_dataset(out, Data(source="folder", path="shop"), shop)
tables.check(out)
columns = [name for name, kind in kinds.items() if kind == "categorical"][:8]
seen = tables.read(out, columns=["shuffled", *columns])
for shown in (describe.overview, describe.click_rates, describe.train_clicks):
    shown(seen)
describe.value_shares(seen.sessions, columns)
few = tables.head(out, 4)
describe.session_card(few, few.sessions.session_id.iloc[3])
"""
LATER = """
columns = read_yaml(shop / "dataset.yaml")["prompt_features"]
seen = tables.excerpt(shop, columns)
tables.sessions(shop, seen.sessions.session_id.tail(9))
"""
# steps, and the KiB a session by which the peak may grow
STAGES = {
    "notebook 01": (FIRST, 1.5),  # it takes 1.0, and 2.1 where the copied tables are read whole
    # they take 0.4; with every column 1.1, with every impression 1.3, and 2.2 by tables.read
    "the ones after it": (LATER, 0.75),
}


@pytest.fixture(scope="module")
def worlds(tmp_path_factory):
    """Folders of the data sets in small row groups, the smaller one first."""
    folder = tmp_path_factory.mktemp("worlds")
    for size in SESSIONS:
        write_world(folder / "drawn" / str(size), seed=0, sessions=size, users=size // 5, transcripts=0)
        in_process(COPY, folder / "drawn" / str(size), folder / str(size))
    return [folder / str(size) for size in SESSIONS]


def in_process(steps, *folders):
    """What these steps print in a Python of their own."""
    command = [sys.executable, "-c", SMALL + steps, *map(str, folders)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="the peak is read from /proc")
@pytest.mark.parametrize("stage", STAGES)
def test_the_peak_grows_by_less_than_the_tables(tmp_path, worlds, stage):
    steps, most = STAGES[stage]
    peaks = [int(in_process(steps + PEAK, shop, tmp_path / shop.name)) for shop in worlds]
    assert peaks[1] - peaks[0] < most * (SESSIONS[1] - SESSIONS[0]), peaks


@pytest.mark.parametrize("path", sorted((ROOT / "notebooks").glob("[01][0-9]_*.ipynb")), ids=lambda path: path.stem)
def test_a_notebook_reads_no_column_that_it_does_not_use(path):
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    code = "\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "code")
    calls = [node for node in ast.walk(ast.parse(code)) if isinstance(node, ast.Call)]
    named = [(ast.unparse(call.func), {keyword.arg for keyword in call.keywords}) for call in calls]
    assert all("columns" in told for name, told in named if name == "tables.read"), path.stem
    by_context = {"00", "04", "05", "06", "07", "08"}
    assert {"tables.read", "tables.excerpt"} & {name for name, _ in named} or path.stem[:2] in by_context
    if path.stem.startswith("01"):
        assert "sources.write_dataset(" in code
