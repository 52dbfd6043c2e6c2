"""All cases of bad tables, and the judge of each: `python -m rgalign check`, `tables.read`, encoding, prompts."""

import itertools
from pathlib import Path

import file_faults
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import text_faults
import type_faults
import value_faults
from small_shop import good_shop
from table_case import Case
from table_changes import write_raw

from rgalign.data import shards, split, vectors
from rgalign.data.schema import SPLITS
from rgalign.data.tables import Dataset, TableError, check, read
from rgalign.reasoner.prompts import Prompter
from rgalign.reasoner.tiny import build_tokenizer, count_words

GROUPS = {
    "types and columns": type_faults.CASES,
    "values": value_faults.CASES,
    "text": text_faults.CASES,
    "files and dataset.yaml": file_faults.CASES,
}
CASES: dict[str, Case] = {name: case for group in GROUPS.values() for name, case in group.items()}
SEED = 0
SPREADING = tuple(  # faults that make other tables wrong too: an id that is gone leaves orphans behind
    CASES[name]
    for name in (
        *("truth without rows", "a session twice", "an intent twice", "truth twice", "every row of sessions twice"),
        *("every row of intents twice", "every row of impressions twice", "an orphan in impressions.session_id"),
        *("an orphan in truth.session_id", "an id with a blank too many", "nothing clicked", "all clicked"),
        *("lists of one", "one moment and no split", "no features", "session_id empty in a row"),
    )
)


def written(case: Case, folder: Path) -> Path:
    tables, meta = good_shop()
    case.change(tables, meta)
    write_raw(folder, tables, meta)
    if case.damage:
        case.damage(folder)
    return folder


def judge(case: Case, folder: Path) -> None:
    """Raises AssertionError where the case does not end as it says it must."""
    written(case, folder)
    report = check(folder)
    text = str(report)
    for word in case.words:
        assert word in text, f"{word!r} is not in\n{text}"
    assert len(text) < 20_000, "an error is to be read"
    if case.outcome == "refused":
        assert len(report.errors) == 1 or (report.errors and case in SPREADING), text
        _is_refused(folder, text)
        return
    assert not report.errors, text
    assert bool(case.words) == (case.outcome == "noted")
    shop = read(folder, splits=SPLITS, truth=(folder / "truth.parquet").is_file())
    _nothing_is_lost(folder, shop)
    _goes_on(folder, shop)


def _is_refused(folder: Path, text: str) -> None:
    with pytest.raises(TableError) as raised:
        read(folder, splits=SPLITS)
    assert str(raised.value) == text


def _nothing_is_lost(folder: Path, shop: Dataset) -> None:
    """Row by row what is in the files: numbers and words as they were written, impressions in any order."""
    for name in ("intents", "sessions", "impressions", "transcripts", "labels", "truth"):
        path = folder / f"{name}.parquet"
        if not path.is_file():
            continue
        raw, frame = pq.read_table(path), getattr(shop, name)
        assert len(frame) == raw.num_rows, name
        for column in raw.column_names:
            if pa.types.is_temporal(raw[column].type) or column == "split":
                continue  # zones become UTC, an empty split is filled in: both are told or tested elsewhere
            old, new = (list(map(_plain, values)) for values in (raw[column].to_pylist(), frame[column].tolist()))
            assert old == new or (name == "impressions" and sorted(old) == sorted(new)), f"{name}.{column}"


def _plain(value: object) -> str:
    """One spelling of a value, whatever type holds it."""
    if isinstance(value, str):
        return value
    if hasattr(value, "__len__"):
        return "|".join(map(str, value))
    if isinstance(value, int):
        return str(int(value))
    return "" if pd.isna(value) else f"{float(value):.12g}"


def _goes_on(folder: Path, shop: Dataset) -> None:
    """Encoding, prompts and the keeping of vectors take what `read` took."""

    def development(users):
        return split.development_users(users, share=0.3, seed=SEED)

    space = shards.fit_folder(folder, development=development, min_count=1)
    count = shards.encode_folder(space, folder, folder / "encoded", splits=SPLITS, development=development)
    assert sum(count.values()) == shop.impressions.session_id.nunique()
    features = list(shop.meta.get("prompt_features") or shop.kinds)
    counts = count_words(features=features, kinds=shop.kinds, intents=shop.intents)
    prompter = Prompter(build_tokenizer(counts, min_count=1), features=features, kinds=shop.kinds)
    assert all(map(len, itertools.chain(prompter.sessions(shop.sessions), prompter.intents(shop.intents))))
    for ids in (shop.sessions.session_id, shop.intents.intent_id):
        kept = vectors.Vectors(ids.to_numpy(dtype=object), [[0.0]] * len(ids))
        assert kept.ids.tolist() == ids.tolist()
