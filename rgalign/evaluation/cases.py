"""Sessions to look at: where one model ranks the click higher than another, and where lower."""

import pandas as pd

from rgalign.data.personal import HIDDEN, masked, personal


def wins_and_losses(metrics: pd.DataFrame, model: str, against: str, count: int = 5) -> pd.DataFrame:
    """The sessions with the largest differences in the click's place, wins first.

    metrics  a session_metrics table of one split; means over seeds
    Columns: session_id, outcome (win | loss), place under each model (1 / mean reciprocal rank), named by the models.
    """
    mean = metrics[metrics["model"].isin([model, against])].pivot_table("mrr", "session_id", "model")
    place = (1 / mean).dropna()
    gain = (place[against] - place[model]).sort_values(ascending=False, kind="stable")
    chosen = {"win": gain[gain > 0].index[:count], "loss": gain[gain < 0].index[::-1][:count]}
    rows = [place.loc[ids].assign(outcome=outcome) for outcome, ids in chosen.items()]
    return pd.concat(rows).reset_index()[["session_id", "outcome", against, model]]


def shown(cases: pd.DataFrame, sessions: pd.DataFrame, clicks: pd.DataFrame, columns: list[str]) -> pd.DataFrame:
    """The cases with what the shop knew and what was clicked, side by side.

    sessions  with these columns: what personal ones hold is hidden, and addresses and telephone numbers in the others
    clicks    session_id, title of the clicked intent, query (where one was written)
    """
    known = sessions[["session_id", *columns]].astype(object)
    for column in columns:
        known[column] = known[column].map(lambda text: masked(text) if isinstance(text, str) else text)
    known[personal(columns)] = HIDDEN
    first = clicks.drop_duplicates("session_id")
    return cases.merge(known, "left", "session_id").merge(first, "left", "session_id").set_index("outcome")
