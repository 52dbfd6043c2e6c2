"""The three long tables that every comparison, plot and report is made from (ARCHITECTURE.md, Results).

session_metrics  one row a session, model and seed; one column a metric: what paired intervals need
results          one row a metric, slice, model and seed
comparisons      one row a metric, slice and pair of models, with an interval: evaluation.comparisons
"""

import difflib
from collections.abc import Iterator

import numpy as np
import pandas as pd

from rgalign.evaluation import metrics
from rgalign.ranker import variants

# Every model's name and how a figure shows it; tables list them in this order. Ablations join here.
MODELS = {
    **variants.UNTRAINED,
    **{name: ranker.label for name, ranker in variants.RANKERS.items() if ranker.in_params},
    "qe_rec/retrained": "QE-Rec retrained after RG-SFT and RG-DPO",
    "rgalign_rec": variants.RANKERS["rgalign_rec"].label,
    "rgalign_rec/no_alignment": "QE-Rec retrained once more",  # from here on: params/ablations/<name>.yaml
    "rgalign_rec/random_sft": "SFT on random candidates alone",
    "rgalign_rec/sft_only": "RG-SFT alone",
    "rgalign_rec/sft_dpo": "RG-SFT and RG-DPO",
    "rgalign_rec/cl_only": "RG-CL alone",
    "rgalign_rec/no_dpo": "RGAlign-Rec without RG-DPO",
    "rgalign_rec/one_llm": "RGAlign-Rec, candidates of one LLM",
    "rgalign_rec/no_neftune": "RGAlign-Rec without NEFTune",
    "rgalign_rec/naive_dpo": "RGAlign-Rec, naive DPO",
    "rgalign_rec/cosine_cl": "RGAlign-Rec, RG-CL by cosine",
    "rgalign_rec/old_order": "RGAlign-Rec, RG-CL into the space of QE-Rec",
    "rgalign_rec/frozen_ranker": "RGAlign-Rec, ranker not retrained",
    "rgalign_rec/scratch_ranker": "RGAlign-Rec, ranker from random weights",
    "rgalign_rec/end_to_end": "ranking loss through the LM",
    "oracle_discrete": "oracle, discrete features",
    "oracle": "oracle",
}
UNTRAINED = tuple(variants.UNTRAINED)  # need no training (ranker/match.py)
GAUC_WEIGHT = "gauc_weight"  # of a session; by list and impressions it is the number of candidates shown

# Table -> columns with their types; in session_metrics the metrics follow, as float64.
COLUMNS = {
    "session_metrics": dict.fromkeys(("session_id", "user_id", "model"), "string")
    | {"seed": "Int64", "split": "string", GAUC_WEIGHT: "float64"},
    "results": dict.fromkeys(("model", "metric", "slice", "split", "data"), "string")
    | {"distance": "float64"}
    | dict.fromkeys(("world_seed", "lm_seed", "seed"), "Int64")
    | {"value": "float64", "groups": "int64", "left_out": "int64"},
    "comparisons": dict.fromkeys(("model", "against", "metric", "slice", "split"), "string")
    | dict.fromkeys(("distance", "difference", "relative", "ci_low", "ci_high", "relative_low"), "float64")
    | dict.fromkeys(("relative_high", "sampling_error", "p", "p_holm"), "float64")
    | {"worlds": "int64", "world_seeds": "string", "seeds": "int64"},
}
ORDER = {  # what rows are sorted by; no two rows of a table are equal in all of these
    "session_metrics": ["split", "model", "seed", "session_id"],
    "results": ["data", "split", "slice", "metric", "distance", "world_seed", "lm_seed", "model", "seed"],
    "comparisons": ["split", "slice", "metric", "distance", "model", "against"],
}


def session_metrics(
    scores, clicked, shown, *, session_id, user_id, model: str, seed: int | None, split: str, group: str = "session",
    weights: str = "impressions", whole_kb: tuple | None = None, ctr: np.ndarray | None = None
) -> pd.DataFrame:  # fmt: skip
    """The session_metrics rows of one model and ranker seed (None if nothing was drawn: popularity, an oracle).

    scores, clicked, shown  (lists, candidates), padded as in evaluation.metrics; session_id, user_id (lists,)
    group, weights          GAUC's, METHOD.md 4. By user, each session has its user's AUC, and its part of the user's
                            weight, so that the weighted mean of the column is GAUC whatever the group
    whole_kb                the same three over all intents of the KB (lists, intents), `shown` where an intent was
                            already there: adds the metrics over them, such as recall@3/kb
    ctr                     (lists,) debiased CTR@3 over the KB, where it is known: adds ctr@3/kb (judge.Judge.with_log)
    """
    if group not in ("session", "user"):
        raise ValueError(f"group is {group!r}; expected 'session' or 'user'")
    weight = metrics.group_weights(weights, np.sum(shown, axis=1), np.sum(clicked, axis=1))
    inputs = {False: (scores, clicked, shown)} | ({} if whole_kb is None else {True: whole_kb})
    found = {
        name: metric.of_lists(*inputs[metric.over_kb])
        for name, metric in metrics.METRICS.items()
        if metric.of_lists is not None and metric.over_kb in inputs
    }
    found |= {} if ctr is None else {"ctr@3/kb": ctr}
    if group == "user":
        user, inside = pd.factorize(np.asarray(user_id, dtype=object))[0], np.asarray(shown, dtype=bool)
        of_row = user[np.nonzero(inside)[0]]
        auc, _, _ = metrics.group_auc(np.asarray(scores)[inside], np.asarray(clicked)[inside], of_row)
        found["gauc"] = pd.Series(auc, np.unique(of_row)).reindex(user).to_numpy()
        weight = weight / (np.bincount(user)[user] if weights == "uniform" else 1)
    keys = {"session_id": session_id, "user_id": user_id, "model": model, "seed": seed, "split": split}
    return conform(pd.DataFrame(keys | {GAUC_WEIGHT: weight} | found), "session_metrics")


def clicked_in_kb(candidates, clicked, intents: int) -> np.ndarray:
    """The clicks of padded lists over the whole KB, (lists, intents) bool; candidates are rows of the KB, or -1."""
    row, column = np.nonzero(np.asarray(clicked))
    over_kb = np.zeros((len(candidates), intents), dtype=bool)
    over_kb[row, np.asarray(candidates)[row, column]] = True
    return over_kb


def results(
    sessions: pd.DataFrame, slices: pd.DataFrame | None = None, *, data: str, distance: float | None = None,
    world_seed: int | None = None, lm_seed: int | None = None, group: str = "session"
) -> pd.DataFrame:  # fmt: skip
    """The results rows of a session_metrics table: each model's and seed's mean of each metric in each slice.

    slices  bool columns indexed by session_id (evaluation.slices); None: only `all`
    group   as it was for session_metrics: what `groups` and `left_out` of gauc count. Of the other metrics they count
            sessions. A slice in which nothing is defined has the value NaN and groups 0
    """
    sessions = conform(sessions, "session_metrics")
    fixed = {"data": data, "distance": distance, "world_seed": world_seed, "lm_seed": lm_seed}
    rows = []
    for (model, seed, split), part in sessions.groupby(["model", "seed", "split"], dropna=False, sort=False):
        for name, inside in slice_masks(slices, part["session_id"]):
            chosen = part[inside]
            for metric in metric_names(sessions):
                weight = chosen[GAUC_WEIGHT].to_numpy() if metric == "gauc" else np.ones(len(chosen))
                mean = metrics.average_auc(chosen[metric].to_numpy(), weight)
                groups, left_out = mean.groups, mean.left_out
                if metric == "gauc" and group == "user":
                    defined = chosen[metric].notna()
                    groups, left_out = (chosen.loc[side, "user_id"].nunique() for side in (defined, ~defined))
                row = {"model": model, "metric": metric, "slice": name, "split": split, "seed": seed, **fixed}
                rows.append(row | {"value": mean.value, "groups": groups, "left_out": left_out})
    return conform(pd.DataFrame(rows, columns=list(COLUMNS["results"])), "results")


def best_untrained(results: pd.DataFrame) -> str | None:
    """The model without training with the highest GAUC on valid, the first of equals; None where valid has none.

    results  results rows that hold those of valid: a comparison on test must not choose its opponent there
    """
    asked = (results["split"] == "valid") & (results["slice"] == "all") & (results["metric"] == "gauc")
    gauc = results[asked & results["model"].isin(UNTRAINED)].groupby("model")["value"].mean()
    gauc = gauc.reindex([name for name in UNTRAINED if name in gauc.index]).dropna()
    return str(gauc.idxmax()) if len(gauc) else None


def conform(frame: pd.DataFrame, table: str) -> pd.DataFrame:
    """`frame` as the table of that name: columns, types (an empty seed makes pandas read floats), order of rows.

    Raises ValueError with all that is wrong.
    """
    columns = dict(COLUMNS[table])
    faults = [f"column {name} is missing" for name in columns if name not in frame]
    extra = [name for name in frame if name not in columns]
    if table == "session_metrics":
        columns |= dict.fromkeys(extra, "float64")
    else:
        faults += [f"column {name} is not known" for name in extra]
    named = {name for column in ("model", "against") if column in frame for name in frame[column].unique()}
    faults += [unknown_model(name) for name in sorted(named - set(MODELS), key=str)]
    if not faults and (twice := frame.duplicated(ORDER[table]).sum()):
        faults.append(f"{twice} rows repeat another's {', '.join(ORDER[table])}")
    if faults:
        raise ValueError(f"{table} cannot be made:\n  " + "\n  ".join(faults))
    frame = frame[list(columns)].astype(columns)
    place = list(MODELS).index
    return frame.sort_values(
        ORDER[table],
        key=lambda column: column.map(place) if column.name in ("model", "against") else column,
        ignore_index=True,
    )


def metric_names(sessions: pd.DataFrame) -> list[str]:
    """The metric columns of a session_metrics table."""
    return [name for name in sessions if name not in COLUMNS["session_metrics"]]


def slice_masks(slices: pd.DataFrame | None, session_ids) -> Iterator[tuple[str, np.ndarray]]:
    """Name and mask (sessions,) of each slice, `all` first. Raises ValueError if a session has no row in `slices`."""
    session_ids = np.asarray(session_ids, dtype=object)
    yield "all", np.ones(len(session_ids), dtype=bool)
    if slices is None:
        return
    row = slices.index.get_indexer(session_ids)
    if (row < 0).any():
        raise ValueError(f"slices lacks {(row < 0).sum()} sessions (first: {session_ids[row < 0][0]!r})")
    for name in slices.columns.drop("all", errors="ignore"):
        yield name, slices[name].to_numpy(dtype=bool)[row]


def unknown_model(name) -> str:
    """That a name is none of MODELS, and which is nearest."""
    near = difflib.get_close_matches(str(name), MODELS, n=1)
    return f"model {name!r} is not in results.MODELS" + (f"; did you mean {near[0]!r}?" if near else "")
