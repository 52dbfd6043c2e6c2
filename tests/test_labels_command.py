"""The sheet goes out, a human fills it in, and `labels` of the data set holds what she chose."""

import csv

import pandas as pd

from rgalign.__main__ import main
from rgalign.data import tables, world


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
    assert not tables.check(folder).faults

    sheet.write_text("session_id,session,intent_id\nnobody,x,kb_03\n", encoding="utf-8")
    assert main(["labels", str(folder), str(sheet), "--read"]) == 1
    assert "'nobody' is not known" in capsys.readouterr().err
