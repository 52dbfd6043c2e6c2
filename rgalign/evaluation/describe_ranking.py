"""What rankers recommend, what they mix up and what they cost: the tables of notebook 09 beside its metrics."""

import time
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import pandas as pd

from rgalign.data.features import UNKNOWN
from rgalign.data.lists import Intents, Lists
from rgalign.evaluation.metrics import gauc_of_lists


def best(scores: np.ndarray, exists: np.ndarray, k: int) -> np.ndarray:
    """Rows of the k best intents that exist (lists, k), from scores (lists, intents); ties in the KB's order."""
    return np.argsort(-np.where(exists, scores, -np.inf), axis=1, kind="stable")[:, :k]


def recommended(shown: np.ndarray, intents: int) -> pd.Series:
    """What the k intents of each session (lists, k) are, all together.

    coverage  share of the KB that is shown to anybody
    top tenth  share of all slots that the most shown tenth of the KB takes
    gini      0 where all intents are shown alike, 1 where one has all slots
    """
    counts = np.sort(np.bincount(shown.ravel(), minlength=intents))
    most = max(1, intents // 10)
    ranks = np.arange(1, intents + 1)
    gini = 2 * (ranks * counts).sum() / (intents * counts.sum()) - (intents + 1) / intents
    shares = {"coverage": (counts > 0).mean(), "top tenth": counts[-most:].sum() / counts.sum(), "gini": gini}
    return pd.Series(shares)


def confusions(lists: Lists, first: np.ndarray, categories: np.ndarray) -> pd.DataFrame:
    """Share of the clicks of each category (rows) where the first intent is of each category (columns).

    first       (lists,) KB row of each session's best intent
    categories  (intents,) names; a list with several clicks counts once for each
    NaN in the row of a category that nobody clicked on.
    """
    row, place = np.nonzero(lists.clicked.numpy())
    clicked = categories[lists.candidates.numpy()[row, place]]
    table = pd.crosstab(pd.Series(clicked, name="clicked"), pd.Series(categories[first[row]], name="first"))
    names = sorted(set(categories))
    return table.reindex(index=names, columns=names, fill_value=0).pipe(lambda t: t.div(t.sum(axis=1), axis=0))


def most_confused(before: pd.DataFrame, after: pd.DataFrame, count: int = 8) -> pd.DataFrame:
    """The pairs of different categories that were mixed up most before, and how often they are after."""
    wide = before.stack().rename("before").to_frame().join(after.stack().rename("after"))
    apart = wide[wide.index.get_level_values(0) != wide.index.get_level_values(1)]
    return apart.sort_values("before", ascending=False, kind="stable").head(count)


def stopped_by(scores: Mapping[str, Sequence[np.ndarray]], dev: Lists, intents: Intents) -> pd.DataFrame:
    """GAUC on the lists that say when to stop, by what was clicked: rows model, columns all, known and new intents.

    scores  model -> (lists, candidates) of each seed;  dev  the lists;  intents  the KB: new is whom train never saw
            clicked
    The row `lists` counts those with a click; NaN where a column has none that can be judged.
    """
    clicked, shown = dev.clicked.numpy(), dev.shown.numpy()
    of_new = (clicked & (intents.id.numpy()[dev.candidates.numpy()] == UNKNOWN)).any(axis=1)
    columns = {"all": clicked.any(axis=1), "known intents": clicked.any(axis=1) & ~of_new, "new intents": of_new}
    table = pd.DataFrame({column: {"lists": float(rows.sum())} for column, rows in columns.items()})
    for name, of_seeds in scores.items():
        judged = [
            [gauc_of_lists(found[rows], clicked[rows], shown[rows]).value for rows in columns.values()]
            for found in of_seeds
        ]
        table.loc[name] = np.mean(judged, axis=0)
    return table


def costs(steps: Mapping[str, Callable[[], object]], sessions: int) -> pd.DataFrame:
    """Milliseconds a session of each step, run once on `sessions` of them."""
    rows = []
    for name, run in steps.items():
        began = time.perf_counter()
        run()
        rows.append((name, 1000 * (time.perf_counter() - began) / sessions))
    return pd.DataFrame(rows, columns=["step", "milliseconds a session"])
