"""One door for every source of data: the simulator, a folder of tables, raw public files."""

import csv
import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from rgalign.data import cfpb_csv, tables
from rgalign.data.candidates import SAMPLED_NEGATIVES, draw_lists, impressions
from rgalign.data.schema import to_frame, to_table
from rgalign.data.split import by_fraction
from rgalign.data.tables import Dataset, TableError
from rgalign.errors import nearest, safe_repr
from rgalign.shopworld import world
from rgalign.shopworld.columns import KINDS, TEXT_COLUMNS

# Public logs into the project's tables: one function a source, each returns a Dataset ready for `tables.write`.
#
# tables.write(adapters.cfpb("complaints.csv", seed=11), "data/cfpb/")

PUBLISHED_SEED = 11  # the seed of the published msweb: withheld areas and valid users come out as they are there
CANDIDATES = (
    "20 a session: the true intent, 15 distinct negatives drawn with p ~ (train clicks + 0.5), 4 uniform ones. "
    "Never a candidate: an intent before its valid_from, an area already visited. "
    "position is a random shuffle. Add log q(i) (candidates.kb_correction) when all intents are ranked."
)


def cfpb(path: str | Path, *, seed: int, day_first: bool | None = None) -> Dataset:
    """The CFPB's consumer complaints, one session a complaint, one intent an issue with its sub-issue.

    Reads a CSV or a folder of them, in the spelling of 2014 and the later ones, `day_first` where their dates do not
    tell (`cfpb_csv.read_rows`). Split by date: first 70 % train, next 10 % valid, rest test, whole days. An intent new
    after train is valid from the first day of valid. Narratives, where released, become transcripts; tags a feature.
    `seed` draws the candidates. Raises TableError.
    """
    rows, left_out = cfpb_csv.read_rows(path, day_first=day_first)
    sessions = _cfpb_sessions(rows)
    try:
        sessions["split"] = by_fraction(sessions)
    except ValueError as error:
        raise TableError(f"{path}: {error}. Nothing was read") from error
    title = rows["issue"] + np.where(rows["sub_issue"] == "", "", ": " + rows["sub_issue"])
    in_train = sessions["split"].eq("train").to_numpy(dtype=bool)
    intents = _cfpb_intents(rows, title, in_train)
    true_intent = pd.Index(intents["title"]).get_indexer(title)
    train_clicks = np.bincount(true_intent[in_train], minlength=len(intents))
    intents["valid_from"] = sessions["timestamp"][sessions["split"].eq("valid")].min()
    intents["valid_from"] = intents["valid_from"].where(train_clicks == 0)
    kinds = {name: "categorical" for name in sessions.columns[5:] if name != "profile"} | {"profile": "text"}
    transcripts = None
    if rows["narrative"].ne("").any():
        told = rows["narrative"].ne("").to_numpy(dtype=bool)
        typed = {"session_id": sessions["session_id"], "typed_query": rows["narrative"]}
        transcripts = pd.DataFrame(typed | {"intent_id": intents["intent_id"].to_numpy()[true_intent]})[told]
    meta = {
        "title": "CFPB consumer complaints",
        "what": f"A bank customer's profile and product; rank the reason for her complaint. {len(intents)} reasons.",
        "licence": "Work of the US government, public domain (CFPB Consumer Complaint Database)",
        "origin": "The CFPB's CSV; rows left out, and why: see left_out",
        "split": "By date: first 70 % of the sessions train, next 10 % valid, last 20 % test, whole days.",
        "leaks_removed": list(cfpb_csv.LEAKS),
        "caution": "Product names the issue family by construction: always ablate product and sub_product.",
        "left_out": left_out,
    }
    return _dataset("cfpb", kinds, meta, intents, sessions, true_intent, train_clicks, seed, transcripts)


def _cfpb_sessions(rows: pd.DataFrame) -> pd.DataFrame:
    """Sessions in the order of dates; the company's answer and all that comes after the complaint stay out."""
    session_id = "c" + _digests(rows["complaint_id"], 12)
    sub_product = rows["sub_product"].where(rows["sub_product"] != "", "unspecified")
    holds = "Holds: " + rows["product"] + " (" + sub_product + ") with " + rows["company"]
    columns = {
        "session_id": session_id,
        "user_id": session_id,  # the CFPB does not say who complains twice
        "timestamp": rows["date_received"],
        "region": rows["state"].where(rows["state"] != ""),
        "split": None,
        "product": rows["product"],
        "sub_product": rows["sub_product"],
        "company": rows["company"],
        "state": rows["state"],
        "zip3": rows["zip_code"].str.extract(r"^(\d{3})", expand=False).fillna(""),
        "channel": rows["submitted_via"],
        "weekday": rows["date_received"].dt.day_name(),
        "profile": holds + ". State " + rows["state"] + ".",
    }
    if rows["tags"].ne("").any():
        columns["tags"] = rows["tags"]
    return pd.DataFrame(columns)


def _cfpb_intents(rows: pd.DataFrame, title: pd.Series, in_train: np.ndarray) -> pd.DataFrame:
    """One row an issue and sub-issue, in the order of titles.

    Which products it is about, and the one most often meant, its category, train's complaints alone say (in_train): a
    knowledge base is written before what is asked of it later. An intent that train has not knows neither.
    """
    pairs = rows.assign(title=title).groupby("title", sort=True)
    issue, sub_issue = pairs["issue"].first(), pairs["sub_issue"].first()
    known = rows.assign(title=title)[in_train]
    counts = known.groupby(["title", "product"]).size().rename("rows").reset_index()
    main = counts.sort_values(["title", "rows", "product"], ascending=[True, False, True]).groupby("title").first()
    detail = np.where(sub_issue == "", "", " Detail: " + sub_issue + ".")
    products = counts.groupby("title")["product"].agg("; ".join)
    products = (" Asked about products: " + products + ".").reindex(issue.index, fill_value="")
    key = issue + np.where(sub_issue == "", "", " | " + sub_issue)
    return pd.DataFrame(
        {
            "intent_id": "i" + _digests(key, 8),
            "title": issue.index,
            "description": "The customer complains about: " + issue + "." + detail + products,
            "category": main["product"].reindex(issue.index),
        }
    ).reset_index(drop=True)


def msweb(folder: str | Path, *, seed: int = PUBLISHED_SEED) -> Dataset:
    """The UCI anonymous-msweb files (.data: train users, .test: test users): areas visited so far -> one withheld.

    Users with a single area are left out. For each user in file order, `seed` draws the area to withhold and, for
    train users, whether she is valid (one in ten); PUBLISHED_SEED repeats the published choices. Raises TableError.
    """
    titles, train = _msweb_file(Path(folder) / "anonymous-msweb.data")
    _, test = _msweb_file(Path(folder) / "anonymous-msweb.test")
    generator = np.random.default_rng(seed)
    users = [("tr" + user, areas) for user, areas in train.items() if len(areas) > 1]
    testers = [("te" + user, areas) for user, areas in test.items() if len(areas) > 1]
    known = sorted({area for _, areas in users + testers for area in areas})
    withheld, split, recent = [], [], []
    for number, (_, areas) in enumerate(users + testers):
        which = generator.integers(len(areas))
        withheld.append(areas[which])
        recent.append(areas[:which] + areas[which + 1 :])
        if number < len(users):
            split.append("valid" if generator.random() < 0.1 else "train")
        else:
            split.append("test")
    name = np.array([user for user, _ in users + testers], dtype=object)
    sessions = pd.DataFrame(
        {
            "session_id": "w" + name,
            "user_id": "u" + name,
            "timestamp": None,
            "region": None,
            "split": split,
            "n_visited": [len(areas) for areas in recent],
            "recent": [["v" + area for area in areas] for areas in recent],
            "recent_text": ["Visited: " + "; ".join(titles[area][0] for area in areas) for areas in recent],
        }
    )
    intents = _msweb_intents(known, titles)
    true_intent = pd.Index(known).get_indexer(withheld)
    train_clicks = np.bincount(true_intent[np.array(split) == "train"], minlength=len(known))
    meta = {
        "title": "Anonymous Microsoft web data, one week of February 1998",
        "what": f"Areas of a site that a visitor has opened; rank the one that is withheld. {len(known)} areas.",
        "licence": "Donated to the UCI KDD archive by Breese, Heckerman, Kadie (1998); UCI: CC BY 4.0",
        "origin": "The published train and test users",
        "split": "The published train and test users; a random 10 % of train users are valid.",
        "leaks_removed": [],
        "caution": "No timestamps, no regions; the withheld area may lie before later visits.",
        "left_out": {"users with a single area": len(train) + len(test) - len(sessions)},
    }
    kinds = {"n_visited": "numeric", "recent": "history", "recent_text": "text"}
    visitor = np.repeat(np.arange(len(recent)), sessions["n_visited"])
    visited = pd.Index(known).get_indexer([area for areas in recent for area in areas])
    return _dataset("msweb", kinds, meta, intents, sessions, true_intent, train_clicks, seed, barred=(visitor, visited))


def _msweb_intents(known: list[str], titles: dict[str, tuple[str, str]]) -> pd.DataFrame:
    support = [path == "/kb" or "support" in (title + path).lower() for title, path in map(titles.get, known)]
    return pd.DataFrame(
        {
            "intent_id": ["v" + area for area in known],
            "title": [titles[area][0].strip() for area in known],
            "description": [f"Area {titles[area][1]} of the site: {titles[area][0].strip()}." for area in known],
            "category": np.where(support, "support", "site area"),
            "valid_from": None,
        }
    )


def _msweb_file(path: Path) -> tuple[dict[str, tuple[str, str]], dict[str, list[str]]]:
    """Area -> (title, path), and user -> areas in file order. Lines: A(rea), C(ase = user), V(ote = visit)."""
    if not path.is_file():
        raise TableError(f"{path} is missing; expected the files anonymous-msweb.data and anonymous-msweb.test of UCI")
    titles, users, faults, areas = {}, {}, [], None
    with path.open(encoding="latin-1", newline="") as file:
        for number, row in enumerate(csv.reader(file), start=1):
            match row:
                case ["A", area, _, title, where]:
                    titles[area] = (title, where)
                case ["C", _, user]:
                    areas = users.setdefault(user, [])
                case ["V", area, _] if areas is not None and area in titles:
                    areas.append(area)
                case ["I" | "T" | "N", *_]:
                    pass
                case _:
                    faults.append(number)
    if faults or not users:
        found = (
            f"{len(faults)} lines cannot be read (first: {', '.join(map(str, faults[:3]))})" if faults else "no users"
        )
        raise TableError(
            f"{path}: {found}; expected A,area,1,title,path, then C,user,user, then V,area,1. Nothing was read"
        )
    return titles, users


def _dataset(
    name: str,
    kinds: dict[str, str],
    meta: dict,
    intents: pd.DataFrame,
    sessions: pd.DataFrame,
    true_intent: np.ndarray,
    train_clicks: np.ndarray,
    seed: int,
    transcripts: pd.DataFrame | None = None,
    barred: tuple[np.ndarray, np.ndarray] | None = None,
) -> Dataset:
    """The tables with their candidate lists, in the types that `tables.read` gives."""
    lists = draw_lists(
        true_intent,
        train_clicks,
        available=pd.to_datetime(intents["valid_from"]).to_numpy(),
        times=pd.to_datetime(sessions["timestamp"]).to_numpy(),
        barred=barred,
        generator=np.random.default_rng([seed, 1]),
    )
    shown = impressions(lists, true_intent, sessions["session_id"], intents["intent_id"])
    meta = {"name": name, **meta, "candidates": CANDIDATES, "sampled_negatives": dict(SAMPLED_NEGATIVES)}
    meta |= {"position_is_real": False, "features": dict(kinds), "seed": seed}
    frames = {"intents": intents, "sessions": sessions, "impressions": shown, "transcripts": transcripts}
    frames = {key: to_frame(to_table(frame, key, kinds)) for key, frame in frames.items() if frame is not None}
    return Dataset(name=name, kinds=kinds, meta=meta, **frames)


def _digests(values: pd.Series, length: int) -> pd.Series:
    """First hex digits of the SHA-1, as the published tables have them: customer ids become ids of nobody."""
    return values.map(lambda value: hashlib.sha1(value.encode()).hexdigest()[:length])


def write_dataset(
    folder: Path,
    source: str,
    *,
    seed: int,
    world_settings: Mapping[str, Any],
    path: Path | None = None,
    sampled_negatives: Mapping[str, Any] | None = None,
    day_first: bool | None = None,
    drop: Sequence[str] = (),
) -> dict[str, str]:
    """Writes the whole data set that the params name, every split and, of a simulator, the truth; returns its kinds.

    folder             where it is written, all of it or nothing (tables.write)
    source             shopworld | folder | cfpb | msweb; all but the first read `path`. A folder may be larger than
                       memory (tables.copy); the others are held whole
    world_settings     sessions, users, distance, transcripts, version (world.generate)
    sampled_negatives  says how a folder's lists were sampled where its dataset.yaml does not
    day_first          how the CFPB's dates are read where they do not tell (adapters.cfpb)
    drop               feature columns that will be left out (data.features.drop): only their names are checked
    Raises TableError with every fault of the files, ValueError where dataset.yaml says it differently and where `drop`
    names no feature column or leaves none.
    """
    if source == "folder":
        meta = tables.checked(path)
        _refuse_drop(drop, meta["features"])
        tables.copy(path, folder, _with_sampling(meta, sampled_negatives))
        return dict(meta["features"])
    if source == "shopworld":
        _refuse_drop(drop, [*KINDS, *TEXT_COLUMNS])  # before the minutes that a large world takes
        dataset = world.generate(seed=seed, progress=True, **world_settings)
    else:
        read = {"cfpb": partial(cfpb, day_first=day_first), "msweb": msweb}[source]
        dataset = read(path, seed=seed)
    _refuse_drop(drop, dataset.kinds)
    tables.write(replace(dataset, meta=_with_sampling(dataset.meta, sampled_negatives)), folder)
    return dataset.kinds


def _with_sampling(meta: Mapping[str, Any], sampled_negatives: Mapping[str, Any] | None) -> dict[str, Any]:
    if sampled_negatives is None:
        return dict(meta)
    stated = meta.get("sampled_negatives", sampled_negatives)
    if dict(stated) != dict(sampled_negatives):
        raise ValueError(f"data.sampled_negatives is {dict(sampled_negatives)}, but dataset.yaml says {stated}")
    return {**meta, "sampled_negatives": dict(sampled_negatives)}


def _refuse_drop(drop: Sequence[str], known: Iterable[str]) -> None:
    known = list(known)
    if unknown := [name for name in drop if name not in known]:
        lines = "\n".join(f"  {safe_repr(name)}{nearest(name, known)}" for name in unknown)
        raise ValueError(f"data.features.drop names what is no feature column:\n{lines}")
    if set(known) <= set(drop):
        raise ValueError(f"data.features.drop leaves none of the {len(known)} feature columns; a ranker needs one")
