"""Can the reasoner write? Checks of its greedy queries on valid; a warning names the parameter to change.

A model that cannot write still embeds, but RG-SFT and RG-DPO learn nothing from queries that are all alike, repeat
themselves or match no intent. Notebooks 02, 05 and 06 write the warnings, the report reads them. METHOD.md 2.1 and 2.3.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape

import numpy as np
import pandas as pd
from scipy.stats import binomtest

from rgalign.data.tables import Dataset
from rgalign.reasoner.generate import repeated_share
from rgalign.reasoner.prompts import NEVER_ASKED

COLUMNS = ["stage", "check", "found", "limit", "warning", "change"]
# Share of queries that repeat three words [C]. Questions that people typed hardly ever do (measured: ShopWorld 0 %,
# govuk2021 0.2 %); those of a model that cannot write often do.
REPEATED = 0.1
LEVEL = 0.05  # of the one-sided test that IHR@1 is above chance, the usual one
TABLES = ("tables/writing.parquet", "tables/writing_sft.parquet", "tables/writing_dpo.parquet")  # of 02, 05, 06
CHANGE = {  # stage -> what to change; of a pretrained model in notebook 02 PRETRAINED
    "02_reasoner": "raise reasoner.pretraining.epochs or reasoner.tiny.hidden, or give more chats "
    "(transcripts; data.world.transcripts)",
    "05_rg_sft": "lower alignment.sft.epochs or alignment.sft.learning_rate, or set alignment.sft.use to false",
    "06_rg_dpo": "raise alignment.dpo.beta or alignment.dpo.sft_weight, or set alignment.dpo.use to false",
}
PRETRAINED = "take a larger reasoner.model, or change reasoner.instruction or reasoner.features"
REWARD = {  # of queries with which the ranker is worse than without
    "05_rg_sft": "raise alignment.candidates.samples or alignment.sft.min_reward, or set alignment.sft.use to false",
    "06_rg_dpo": "raise alignment.dpo.min_margin or alignment.dpo.beta, or set alignment.dpo.use to false",
}


@dataclass(frozen=True)
class Chance:
    """What the same sessions give without any model.

    sessions  looked at, each with a click
    clicked   different intents that were clicked in them
    hit       IHR@1 of a query that is always the same (of the intent that train's users clicked most), or of a draw
              from the KB, if that is more
    """

    sessions: int
    clicked: int
    hit: float

    @classmethod
    def of(cls, dataset: Dataset, session_ids: Sequence[str]) -> "Chance":
        """dataset: with train's clicks and those of these sessions."""
        clicks = dataset.impressions.loc[dataset.impressions["clicked"] == 1, ["session_id", "intent_id"]]
        sessions = dataset.sessions
        train = clicks[clicks["session_id"].isin(sessions.loc[sessions["split"] == "train", "session_id"])]
        own = clicks[clicks["session_id"].isin(list(session_ids))]
        most = train["intent_id"].value_counts().head(1).index
        popular = own.loc[own["intent_id"].isin(most), "session_id"].nunique() / max(1, own["session_id"].nunique())
        return cls(len(session_ids), own["intent_id"].nunique(), max(popular, 1 / max(1, len(dataset.intents))))


def figures(queries: Sequence[str], hits: Sequence[float] = ()) -> dict[str, float]:
    """What `warnings_of` reads, of one greedy query a session: distinct and repeated (shares), ihr@1.

    hits  IHR@1 of each, NaN where its intent was not in the KB yet; none: not judged
    """
    values = {"distinct": len(set(queries)) / max(1, len(queries)), "repeated": repeated_share(queries)}
    judged = np.asarray(hits, dtype=float)
    return values | ({"ihr@1": float(np.nanmean(judged))} if np.isfinite(judged).any() else {})


def warnings_of(stage: str, figures: Mapping[str, float], chance: Chance, *, trained_here: bool = True) -> pd.DataFrame:
    """One row (COLUMNS) a warning, none where the reasoner writes well or nothing at all (an encoder).

    stage    02_reasoner | 05_rg_sft | 06_rg_dpo
    figures  of `figures` or of the stage table, whose `reward` counts in 05 and 06; NaN and absent ones are left out
    trained_here  the reasoner is the tiny one that is built here
    """
    values = {name: float(value) for name, value in figures.items() if pd.notna(value)}
    change = CHANGE[stage] if trained_here or stage != "02_reasoner" else PRETRAINED
    rows, sessions = [], chance.sessions
    if "distinct" in values and (different := round(values["distinct"] * sessions)) < chance.clicked:
        text = f"{sessions:,} sessions have {different:,} different greedy queries, fewer than the {chance.clicked:,} "
        rows.append(("distinct", different, chance.clicked, text + "intents that were clicked in them", change))
    if (repeated := values.get("repeated", 0)) > REPEATED:
        text = f"{repeated:.0%} of the greedy queries say three words in a row twice: the model repeats itself"
        rows.append(("repeated", repeated, REPEATED, text, change))
    if stage in REWARD and (reward := values.get("reward", 0)) < 0:
        text = f"the mean reward of the greedy queries is {reward:.3f} nats: the ranker does better without them"
        rows.append(("reward", reward, 0, text, REWARD[stage]))
    if "ihr@1" in values:
        hit = min(sessions, round(values["ihr@1"] * sessions))
        if binomtest(hit, sessions, chance.hit, alternative="greater").pvalue > LEVEL:
            text = f"IHR@1 is {values['ihr@1']:.3f} in {sessions:,} sessions, not above chance: the same query for all "
            rows.append(("ihr@1", values["ihr@1"], chance.hit, f"{text}would reach {chance.hit:.3f}", change))
    return _table([(stage, *row) for row in rows])


def of_reasoner(
    queries: pd.DataFrame, hits: pd.DataFrame, dataset: Dataset, *, trained_here: bool, asked: bool
) -> pd.DataFrame:
    """The warnings of notebook 02, before any alignment.

    queries  summaries.written_queries, whose greedy ones count;  hits  summaries.greedy_hits
    trained_here  the reasoner is the tiny one, trained in this run;  asked  on questions (build.is_asked)
    """
    greedy = queries[queries["candidate"] == -1]
    if greedy.empty:  # an encoder
        return none()
    never = _table([("02_reasoner", "transcripts", 0.0, 1.0, *NEVER_ASKED)] if trained_here and not asked else [])
    values, chance = figures(greedy["query"].tolist(), hits["ihr@1"]), Chance.of(dataset, greedy["session_id"])
    return joined(never, warnings_of("02_reasoner", values, chance, trained_here=trained_here))


def after_tuning(stage: str, values: Mapping[str, float], chance: Chance, before: pd.DataFrame) -> pd.DataFrame:
    """The warnings of notebooks 05 and 06: values is the step's row of the stage table.

    before  those of notebook 02: what was wrong before the step is to be changed there, and what the data lack still is
    """
    now = warnings_of(stage, values, chance)
    earlier = now["check"].map(before.set_index("check")["change"])
    now = now.assign(change=earlier.where(earlier.notna(), now["change"]))
    return joined(before[before["check"] == "transcripts"], now, stage=stage)


def joined(*tables: pd.DataFrame, stage: str | None = None) -> pd.DataFrame:
    """Several as one, all of them with this `stage` if it is given."""
    table = pd.concat([table for table in tables if len(table)] or [none()], ignore_index=True)
    return table if stage is None else table.assign(stage=stage)


def none() -> pd.DataFrame:
    """No warning."""
    return _table([])


@dataclass(frozen=True, eq=False)
class Box:
    """Warnings as a notebook shows them: the last line of a cell."""

    warnings: pd.DataFrame

    def __repr__(self) -> str:
        if self.warnings.empty:
            return "no warning: the queries differ, and they match intents"
        return "\n".join(f"WARNING: {row.warning}. To change: {row.change}." for row in self.warnings.itertuples())

    def _repr_html_(self) -> str:
        if self.warnings.empty:
            return f"<p>{self!r}</p>"
        style = "border: 2px solid #b3400e; border-radius: 4px; padding: .4em 1em"
        rows = zip(self.warnings["warning"].map(escape), self.warnings["change"].map(escape), strict=True)
        items = "".join(f"<li>{warning}. <b>To change:</b> {change}.</li>" for warning, change in rows)
        return f"<div style='{style}'><b>Warning: can this model write?</b><ul>{items}</ul></div>"


def _table(rows: Sequence[tuple]) -> pd.DataFrame:
    types = {"stage": object, "check": object, "found": float, "limit": float, "warning": object, "change": object}
    return pd.DataFrame(list(rows), columns=COLUMNS).astype(types)
