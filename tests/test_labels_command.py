"""The sheet goes out, a human fills it in, and `labels` of the data set holds what she chose."""

import csv

import pandas as pd
import pytest
import yaml
from data.builders import good_meta, good_tables
from table_changes import write_raw

from rgalign.__main__ import main
from rgalign.data import tables
from rgalign.params import dump, load
from rgalign.run.artifacts import record_stage, write_text
from rgalign.shopworld import world


def test_a_filled_sheet_becomes_the_labels_of_the_data_set(tmp_path, capsys):
    shop = world.generate(seed=3, sessions=300, users=100, distance=0.5, transcripts=0)
    folder, sheet = tmp_path / "shop", tmp_path / "sheet.csv"
    tables.write(shop, folder)
    assert main(["labels", str(folder), str(sheet), "--sessions", "4"]) == 0
    with sheet.open(encoding="utf-8-sig", newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 4
    rows[1]["intent_id"] = "kb_003"
    with sheet.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, rows[0].keys())
        writer.writeheader()
        writer.writerows(rows)
    assert main(["labels", str(folder), str(sheet), "--read"]) == 0
    found = pd.read_parquet(folder / "labels.parquet")
    assert found.to_dict("records") == [{"session_id": rows[1]["session_id"], "intent_id": "kb_003"}]
    assert not tables.check(folder).errors

    sheet.write_text("session_id,session,intent_id\nnobody,x,kb_03\n", encoding="utf-8")
    assert main(["labels", str(folder), str(sheet), "--read"]) == 1
    assert "'nobody' is not known" in capsys.readouterr().err


@pytest.fixture
def run(tmp_path):
    """A run directory in which stage 01 has ended; `reasoner.features` and `data.features.drop` are set."""
    run = tmp_path / "run"
    write_raw(run / "tables/dataset", good_tables(), good_meta())
    overrides = {"reasoner.features": ["note", "amount"], "data.features.drop": ["amount"]}
    write_text(run / "params.yaml", dump(load("params/smoke.yaml", overrides)))
    record_stage(
        run, "01_data", {"params": {}, "code": {}, "inputs": {}, "outputs": {}, "seconds": 1, "peak_memory_mb": 1}
    )
    return run


def rows_of(sheet):
    with sheet.open(encoding="utf-8-sig", newline="") as file:
        return list(csv.DictReader(file))


def test_labels_of_a_run_lie_beside_what_its_stages_made(run, tmp_path):
    before = {path: path.read_bytes() for path in (run / "tables").rglob("*") if path.is_file()}
    sheet = tmp_path / "sheet.csv"
    assert main(["labels", str(run), str(sheet)]) == 0
    assert [row["session_id"] for row in rows_of(sheet)] == ["s8", "s9"]
    sheet.write_text("session_id,intent_id\ns8,i3\n", encoding="utf-8")
    assert main(["labels", str(run), str(sheet), "--read"]) == 0
    found = pd.read_parquet(run / "labels.parquet")
    assert found[["session_id", "intent_id"]].to_dict("records") == [{"session_id": "s8", "intent_id": "i3"}]
    assert {path: path.read_bytes() for path in (run / "tables").rglob("*") if path.is_file()} == before


def test_a_sheet_shows_what_a_prompt_may_show_and_no_more(run, tmp_path):
    assert main(["labels", str(run), str(tmp_path / "of_run.csv")]) == 0
    assert [row["session"] for row in rows_of(tmp_path / "of_run.csv")] == ["note: gift", ""]

    folder = write_raw(tmp_path / "shop", good_tables(), good_meta() | {"prompt_features": ["state"]})
    assert main(["labels", str(folder), str(tmp_path / "of_shop.csv")]) == 0
    assert [row["session"] for row in rows_of(tmp_path / "of_shop.csv")] == ["state: paid", ""]

    (folder / "dataset.yaml").write_text(yaml.safe_dump(good_meta(), sort_keys=False))
    assert main(["labels", str(folder), str(tmp_path / "all.csv")]) == 0
    assert rows_of(tmp_path / "all.csv")[0]["session"] == "state: paid\namount: 8\nnote: gift\nvisited: a; b"


def test_what_cannot_be_done_is_said_in_one_line(run, tmp_path, capsys):
    sheet = tmp_path / "sheet.csv"
    sheet.write_text("session_id,intent_id\ns8,i3\n", encoding="utf-8")
    folder = write_raw(tmp_path / "shop", good_tables(), good_meta() | {"prompt_features": ["stat"]})
    for arguments, message in (
        ([str(run / "tables/dataset"), str(sheet), "--read"], f"name {run}"),
        ([str(run / "tables/dataset"), str(tmp_path / "new.csv")], f"name {run}"),
        ([str(run), str(tmp_path / "sheet.xlsx")], "is no .csv"),
        ([str(run), str(tmp_path / "sheet.xlsx"), "--read"], "save the sheet as 'CSV UTF-8'"),
        ([str(folder), str(tmp_path / "new.csv")], "dataset.yaml prompt_features  names"),
    ):
        assert main(["labels", *arguments]) == 1
        assert message in capsys.readouterr().err
    assert not (run / "labels.parquet").exists()
    (run / "tables/dataset").rename(run / "tables/gone")
    assert main(["labels", str(run), str(tmp_path / "new.csv")]) == 1
    assert "run 01_data first" in capsys.readouterr().err
