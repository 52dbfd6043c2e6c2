"""The four lines on top of a report: does it work, where, how sure is that, and what would happen online.

The best trained model is held against the best simple one, both chosen by GAUC on valid.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from rgalign.data import shards, tables
from rgalign.evaluation import slices
from rgalign.evaluation.comparisons import comparisons, holm, verdict
from rgalign.evaluation.results import COLUMNS, MODELS, UNTRAINED
from rgalign.params import Params
from rgalign.ranker.variants import RANKERS

SIMPLE = (*UNTRAINED, "two_tower", "two_tower_text")
BEST = tuple(name for name in RANKERS if "/" not in name and name not in SIMPLE)
FEW = 500  # lists: with fewer, the 95 % interval of a difference in GAUC is about +-0.02 or wider [C]
SLICE = 100  # lists: a smaller slice is not named [C]
CTR = "ctr@3/kb"  # estimated from the log where it has propensities (evaluation.judge)
SESSIONS, DATASET = "tables/session_metrics.parquet", "tables/dataset"
OUTCOMES = {"gain": ("Yes.", "ranks better than"), "loss": ("No.", "ranks worse than")}
UNDECIDED = "Not shown.", "does not differ significantly from"
NEVER = "Cannot be known from this log: it has no propensities, and nobody knows what would have been clicked."
NOT_YET = "Not known yet: notebook 10 has not run with these params."

Line = list[tuple[str, str]]  # the parts of a line: gain | loss | soft, and the text


def decide(
    run: Path, params: Params, results: pd.DataFrame, compared: pd.DataFrame, online: Mapping[Any, Mapping[str, Any]]
) -> dict[str, Any]:
    """lines (question -> Line), lists (how many were judged, in words) and few (fewer than FEW).

    compared  the run's comparisons rows of test;  online  what notebook 10 found: (treatment, control) -> its row
    """
    best, simple = chosen(results, BEST), chosen(results, SIMPLE)
    if best is None or simple is None:
        lines = {"Does it work?": [("soft", f"Not known: the run has no {'simple' if best else 'trained'} model.")]}
        return {"lines": lines, "lists": "", "few": False}
    judged = results[(results.metric == "gauc") & (results.split == "test") & (results.model == best)]
    counts, sessions = judged.groupby("slice")["groups"].max(), pd.read_parquet(run / SESSIONS).query("split == 'test'")
    unit = "users" if params.evaluation.gauc_group == "user" else "lists"
    lists = f"{counts['all']:,} {unit}"
    if unit == "lists":
        own = sessions[(sessions.model == best) & sessions.gauc.notna()]
        lists += f" of {own.user_id.nunique():,} users"
    rows = _rows(run, params, sessions, compared, (best, simple))
    gauc = rows[rows.metric == "gauc"].set_index("slice", drop=False)
    whole, simulated = gauc.loc["all"], bool(results.world_seed.notna().any())
    says = shown(whole)
    answer, verb = OUTCOMES.get(says, UNDECIDED)
    works = f"{answer} {MODELS[best]} {verb} {MODELS[simple]}, the best simple model by GAUC on valid"
    lines = {
        "Does it work?": [(css(says), f"{works}: {interval(whole)} GAUC ({says}), on {lists} of the test split.")],
        "Where?": _where(gauc, counts, unit),
        "How sure is that?": [("", _sure(whole, simulated))],
        "And online?": _online(rows[(rows.metric == CTR) & (rows.slice == "all")], online, best, simulated),
    }
    return {"lines": lines, "lists": lists, "few": bool(counts["all"] < FEW)}


def chosen(results: pd.DataFrame, names: Sequence[str]) -> str | None:
    """Of these models the one with the highest GAUC on valid, the first of equals; None where valid has none."""
    rows = results[(results.split == "valid") & (results.slice == "all") & (results.metric == "gauc")]
    means = rows[rows.model.isin(names)].groupby("model")["value"].mean()
    means = means.reindex([name for name in names if name in means.index]).dropna()
    return str(means.idxmax()) if len(means) else None


def shown(row: Any) -> str:
    """gain, loss or not significant; that a run is one world is said once, not in every row."""
    return verdict(row).removesuffix(" (in one world)")


def css(says: str) -> str:
    return says if says in OUTCOMES else "soft"


def interval(row: Mapping[str, Any]) -> str:
    """A difference and its interval, with so many decimals that no end other than zero looks like zero."""
    values = [row["difference"], row["ci_low"], row["ci_high"]]
    digits = next((n for n in range(4, 9) if all(value == 0 or round(value, n) for value in values)), 9)
    middle, low, high = (f"{value:+.{digits}f}" for value in values)
    return f"{middle} [{low}, {high}]"


def _rows(run: Path, params: Params, sessions: pd.DataFrame, compared: pd.DataFrame, pair: tuple[str, str]):
    """Comparisons rows of the pair, by slice: the run's own where it compared them, else made from its sessions."""
    own = compared[(compared.model == pair[0]) & (compared.against == pair[1])]
    if len(own):
        return own.assign(p_holm=own.p)  # one comparison, chosen on valid: not one of the table's many
    names = [*COLUMNS["session_metrics"], *(name for name in ("gauc", CTR) if name in sessions)]
    how, masks = {"seed": params.run.seed, "replicates": params.evaluation.bootstrap}, None
    if (run / DATASET).is_dir():  # the slices of notebook 09
        shop = tables.excerpt(run / DATASET, ["shuffled"], splits=("test",))
        seen = [shards.load_lists(run / "tables/encoded", part) for part in ("train", "dev")]
        known = slices.of_train(seen, shards.load_intents(run / "tables/encoded_test"))
        masks = slices.session_slices(shop.sessions, shop.impressions, **known)
    return comparisons(sessions[names], [pair], masks, **how)


def _where(gauc: pd.DataFrame, counts: pd.Series, unit: str) -> Line:
    """The best and the worst slice by the difference; a verdict is adjusted for the number of slices (Holm)."""
    rows = gauc.assign(count=counts.reindex(gauc.index))
    rows = rows[(rows["count"] >= SLICE) & (rows.index != "all")].dropna(subset="difference")
    if len(rows) < 2:
        return [("soft", f"Not known: fewer than two slices have {SLICE} {unit}.")]
    rows = rows.assign(p_holm=holm(rows.p)).sort_values("difference", kind="stable")
    ends = {"Best": rows.iloc[-1], "Worst": rows.iloc[0]}
    return [
        (css(shown(row)), f"{end}: {row.slice}, {interval(row)} GAUC ({shown(row)}, {row['count']:,.0f} {unit}).")
        for end, row in ends.items()
    ]


def _sure(whole: pd.Series, simulated: bool) -> str:
    what, other = ("One simulated world", "world") if simulated else ("One log", "period of the log")
    seeds = "one ranker seed" if whole.seeds == 1 else f"the mean of {whole.seeds} ranker seeds"
    return (
        f"{what}, {seeds}, one language model. The 95 % interval is the noise of the users alone; another training or "
        f"another {other} may move the result by more."
    )


def _online(estimated: pd.DataFrame, online: Mapping[Any, Mapping[str, Any]], best: str, simulated: bool) -> Line:
    """The lifts of the simulated experiment, the newest first, else the log's estimate of the two models."""

    def part(row: Mapping[str, Any], text: str) -> tuple[str, str]:
        ends, middle = (row["relative_low"], row["relative_high"]), row["relative"]
        says = "gain" if ends[0] > 0 else "loss" if ends[1] < 0 else "not significant"
        return css(says), f"{text} {middle:+.1%} [{ends[0]:+.1%}, {ends[1]:+.1%}] ({says}).".replace("%", " %")

    if online:
        named = [(row, f"CTR@3 of {MODELS[new]} over {MODELS[old]}:") for (new, old), row in online.items()]
        return [part(row, text) for row, text in reversed(named)] + [("", "By a simulated experiment (notebook 10).")]
    if len(estimated) and pd.notna(estimated.difference.iloc[0]):
        row = estimated.iloc[0]
        return [part(row, f"CTR@3 of {MODELS[best]}, estimated from the log's propensities:")]
    return [("soft", NOT_YET if simulated else NEVER)]
