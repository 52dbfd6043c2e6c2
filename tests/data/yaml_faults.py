"""One fault of dataset.yaml at a time, and the words that its complaint must hold."""

from datetime import date

from builders import WORLD
from table_changes import declare, kind, put, together, undeclare


def sampled(**keys):
    return declare(sampled_negatives={"popularity": 2, "uniform": 1, "smoothing": 0.5} | keys)


YAML_FAULTS = {
    "declared, absent": (kind("browser", "categorical"), ["sessions.browser", "declares it (categorical)"]),
    "unknown kind": (kind("note", "txt"), ["features.note", "has the kind 'txt'", "did you mean 'text'?"]),
    "a key as feature": (kind("user_id", "categorical"), ["features.user_id", "cannot be a feature"]),
    "features as a list": (declare(features=["state"]), ["dataset.yaml features", "expected one line a feature"]),
    "no name": (declare(name=None), ["dataset.yaml name", "is None"]),
    "position_is_real": (declare(position_is_real="no"), ["position_is_real", "is 'no'; expected true or false"]),
    "no features": (undeclare("features"), ["dataset.yaml features", "declares no feature column"]),
    "features empty": (declare(features={}), ["dataset.yaml features", "declares no feature column"]),
    "negatives misspelt": (sampled(populrity=3), ["populrity", "did you mean 'popularity'?"]),
    "negatives without one": (
        declare(sampled_negatives={"popularity": 2, "uniform": 1}),
        ["sampled_negatives.smoothing", "is missing; expected a finite number above 0"],
    ),
    "negatives below 0": (sampled(uniform=-1), ["sampled_negatives.uniform", "is -1; expected a whole number from 0"]),
    "negatives in parts": (sampled(popularity=1.5), ["sampled_negatives.popularity", "is 1.5; expected a whole"]),
    "negatives true": (sampled(popularity=True), ["sampled_negatives.popularity", "is True; expected a whole"]),
    "smoothing zero": (sampled(smoothing=0), ["sampled_negatives.smoothing", "is 0; expected a finite number above 0"]),
    "smoothing infinite": (sampled(smoothing=float("inf")), ["sampled_negatives.smoothing", "is inf; expected"]),
    "smoothing in words": (sampled(smoothing="1e-1"), ["sampled_negatives.smoothing", "is '1e-1'; expected"]),
    "no negatives": (sampled(popularity=0, uniform=0), ["sampled_negatives ", "popularity and uniform are 0"]),
    "negatives a number": (declare(sampled_negatives=19), ["sampled_negatives ", "is 19; expected popularity"]),
    "one date": (
        declare(time_split={"valid_from": "2024-03-07"}),
        ["time_split.test_from", "is missing; expected a date such as 2024-03-05"],
    ),
    "one share": (declare(time_split={"train": 0.7}), ["time_split.valid", "is missing; expected a number above 0"]),
    "dates and shares": (
        declare(time_split={"valid_from": "2024-03-07", "train": 0.7}),
        ["dataset.yaml time_split ", "mixes dates (valid_from) and shares (train)"],
    ),
    "no date": (
        declare(time_split={"valid_from": "today", "test_from": date(2024, 3, 9)}),
        ["time_split.valid_from", "is 'today'; expected a date such as"],
    ),
    "a year": (
        declare(time_split={"valid_from": "2024-03-07", "test_from": 2025}),
        ["time_split.test_from", "is 2025; expected a date such as"],
    ),
    "share in words": (
        declare(time_split={"train": "most", "valid": 0.1}),
        ["time_split.train", "is 'most'; expected a number above 0 and below 1"],
    ),
    "shares of all": (declare(time_split={"train": 0.8, "valid": 0.2}), ["time_split ", "must leave something for"]),
    "dates with half a zone": (
        declare(time_split={"valid_from": "2024-03-07", "test_from": "2024-03-09T00:00:00Z"}),
        ["time_split ", "test_from has a time zone, valid_from none; give both one or neither"],
    ),
    "dates reversed": (
        declare(time_split={"valid_from": "2024-03-09", "test_from": "2024-03-07"}),
        ["time_split ", "must lie before test_from"],
    ),
    "unknown rule": (
        declare(time_split={"valid_form": "2024-03-07", "test_from": "2024-03-09"}),
        ["time_split.valid_form", "is unknown; expected valid_from and", "did you mean 'valid_from'?"],
    ),
    "rule in words": (declare(time_split="by week"), ["time_split ", "is 'by week'; expected valid_from"]),
    "rule used": (
        together(put("sessions", "split", [None] * 10), declare(time_split={"train": "most", "valid": 0.1})),
        ["time_split.train", "is 'most'"],
    ),
    "no world": (undeclare("world"), ["dataset.yaml world", "is missing, and truth.parquet is there"]),
    "world in words": (declare(world="shop"), ["dataset.yaml world", "is 'shop'; expected version, seed and rules"]),
    "another world": (declare(world=WORLD | {"version": 0}), ["dataset.yaml world.version", "is 0; this code knows"]),
    "no seed": (declare(world=WORLD | {"seed": None}), ["dataset.yaml world.seed", "is None; expected a whole"]),
    "unknown rules": (declare(world=WORLD | {"rules": {"gravity": 1}}), ["dataset.yaml world.rules", "are not those"]),
}
