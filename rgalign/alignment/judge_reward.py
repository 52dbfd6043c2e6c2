"""Is the reward model a good judge? Each question is one function that returns a small table.

Rewards are (rows,) in nats, a row a candidate; NaN (empty query, no click) is left out. All but calibration compare
queries inside their session, as best of N does.
"""

from collections.abc import Callable, Mapping, Sequence
from itertools import combinations

import numpy as np
import pandas as pd
from scipy import stats

from rgalign.alignment.candidates import assert_sessions_of
from rgalign.data.lists import Lists
from rgalign.evaluation.confidence import reliability
from rgalign.evaluation.judge import QueryJudge
from rgalign.evaluation.metrics import gauc
from rgalign.shopworld.tables import INTENT_IDS, ISSUE, OBJECT
from rgalign.shopworld.vocabulary import ISSUES, THINGS

# Rewrites that keep the meaning: {} is the query; `without` are words that are dropped [C].
REWRITES: Mapping[str, Mapping[str, object]] = {
    "greeting in front": {"as": "hello , {}"},
    "please behind": {"as": "{} please"},
    "fillers dropped": {"as": "{}", "without": ("a", "an", "the", "my", "is", "do", "does", "i", "please")},
}


def rewritten(name: str, queries: Sequence[str]) -> list[str]:
    """The queries as REWRITES[name] puts them; an empty one stays empty, and one of fillers alone as it was."""
    without = REWRITES[name].get("without", ())
    kept = [" ".join(word for word in query.split() if word.lower() not in without) or query for query in queries]
    return [REWRITES[name]["as"].format(query) if query.strip() else query for query in kept]


def right_over_wrong(rewards: Mapping[str, np.ndarray], right: np.ndarray, session_id: Sequence[str]) -> pd.DataFrame:
    """Does it tell right queries from wrong ones? Columns: judge, auc, sessions, left_out.

    rewards  name of a judge (a form, a reward model) -> its rewards
    right    (rows,) bool: the query leads to what was clicked, as the fixed judge of IHR reads it
    auc      of right against wrong queries inside a session, its mean over sessions; left_out have but one kind
    """
    right, session_id = np.asarray(right, dtype=bool), np.asarray(session_id, dtype=object)
    rows = []
    for name, reward in rewards.items():
        known = np.isfinite(reward)
        found = gauc(np.asarray(reward)[known], right[known], session_id[known], weights="uniform")
        rows.append((name, found.value, found.groups, found.left_out))
    return pd.DataFrame(rows, columns=["judge", "auc", "sessions", "left_out"])


def choose_form(
    rewards: Mapping[str, np.ndarray], right: np.ndarray, session_id: Sequence[str], *, dev: Lists
) -> tuple[str, pd.DataFrame]:
    """The form of reward (reward.REWARDS) with the higher AUC on the development users, and the table it is read from.

    Arguments: see `right_over_wrong`; dev: the development users of train, whose sessions these must be. `right` is
    judged by clicks, never by the simulator's truth. The first of equal ones. Raises ValueError for other sessions.
    """
    assert_sessions_of("choose_form", session_id, dev=dev)
    table = right_over_wrong(rewards, right, session_id)
    return str(table["judge"][table["auc"].fillna(-1).idxmax()]), table


def agreement(rewards: Mapping[str, np.ndarray], session_id: Sequence[str]) -> pd.DataFrame:
    """Do reward models rank a session's queries alike? Mean over sessions of rank correlations.

    Columns: first, second, spearman, kendall, sessions, left_out (fewer than two different rewards).
    """
    rows = []
    for one, other in combinations(rewards, 2):
        found = _correlations(rewards[one], rewards[other], session_id)
        rows.append((one, other, *found.mean(axis=0), len(found), pd.Series(session_id).nunique() - len(found)))
    return pd.DataFrame(rows, columns=["first", "second", "spearman", "kendall", "sessions", "left_out"])


def optimism(in_sample: np.ndarray, cross_fitted: np.ndarray, session_id: Sequence[str]) -> pd.DataFrame:
    """What rewards promise in-sample: mean reward in nats of `all` queries and of the `best` of each session.

    The last row has the queries that are best in-sample, at their cross-fitted reward: what choosing by the in-sample
    rewards earns.
    """
    frame = pd.DataFrame({"session": np.asarray(session_id, dtype=object), "in": in_sample, "out": cross_fitted})
    frame = frame.dropna().reset_index(drop=True)
    places = {name: frame.groupby("session", sort=False)[name].idxmax() for name in ("in", "out")}
    rows = {
        "in-sample": (frame["in"].mean(), frame["in"][places["in"]].mean()),
        "cross-fitted": (frame["out"].mean(), frame["out"][places["out"]].mean()),
        "best in-sample, cross-fitted": (np.nan, frame["out"][places["in"]].mean()),
    }
    return pd.DataFrame.from_dict(rows, orient="index", columns=["all", "best"])


def calibration(probabilities: np.ndarray, clicked: np.ndarray, *, bins: int = 10) -> pd.DataFrame:
    """Reliability of the list softmax: how often the likeliest candidate was clicked, by its probability.

    probabilities, clicked  (lists, candidates); lists without a click are left out
    Columns: see `confidence.reliability`. Clicks follow positions as well, which the softmax does not know.
    """
    probabilities, clicked = np.asarray(probabilities), np.asarray(clicked, dtype=bool)
    has_click = clicked.any(axis=1)
    top = probabilities[has_click].argmax(axis=1)
    confidence = np.take_along_axis(probabilities[has_click], top[:, None], axis=1)[:, 0].astype(float)
    hit = np.take_along_axis(clicked[has_click], top[:, None], axis=1)[:, 0]
    return reliability(confidence, hit, bins=bins)


def expected_calibration_error(table: pd.DataFrame) -> float:
    """Mean over lists of |hit - confidence| of their bin (Guo et al. 2017), from `calibration`; NaN without lists."""
    there = table[table["lists"] > 0]
    if there.empty:
        return float("nan")
    return float(np.average((there["hit"] - there["confidence"]).abs(), weights=there["lists"]))


def stability(
    reward: np.ndarray, rewards_rewritten: Mapping[str, np.ndarray], session_id: Sequence[str]
) -> pd.DataFrame:
    """Does the reward stay where the query is only put differently? One row a rewrite (REWRITES).

    reward             of the queries as they are;  rewards_rewritten  rewrite -> those of the same queries, rewritten
    Columns: rewrite, queries, shift and distance (mean difference and its mean size, nats), of_spread (distance as a
    share of the mean deviation from the session's mean: 1 is as much as another query), spearman (inside a session).
    """
    reward = np.asarray(reward, dtype=float)
    spread = np.nanmean(np.abs(reward - pd.Series(reward).groupby(np.asarray(session_id)).transform("mean")))
    rows = []
    for name, other in rewards_rewritten.items():
        moved = np.asarray(other, dtype=float) - reward
        moved = moved[np.isfinite(moved)]
        distance, found = np.abs(moved).mean(), _correlations(reward, other, session_id)
        of_spread = distance / spread if spread else np.nan
        rows.append((name, len(moved), moved.mean(), distance, of_spread, found["spearman"].mean()))
    return pd.DataFrame(rows, columns=["rewrite", "queries", "shift", "distance", "of_spread", "spearman"])


def length_effect(reward: np.ndarray, tokens: np.ndarray, session_id: Sequence[str]) -> pd.DataFrame:
    """Does it reward length? Rank correlation of reward with tokens: columns spearman (mean over sessions), kendall,
    sessions, overall (spearman over all rows)."""
    known = np.isfinite(reward)
    found = _correlations(reward, tokens, session_id)
    overall = stats.spearmanr(np.asarray(reward)[known], np.asarray(tokens)[known]).statistic
    columns = ["spearman", "kendall", "sessions", "overall"]
    return pd.DataFrame([(*found.mean(axis=0), len(found), overall)], columns=columns)


# What a good judge has: question, limit, whether the figure should be at least or at most that [C].
GOOD = {
    "auc": ("right queries earn more than wrong ones (AUC)", 0.7, "at least"),
    "seeds": ("another seed ranks alike (rank correlation)", 0.7, "at least"),
    "empty words": ("empty words move it (1: as another query)", 0.25, "at most"),
    "length": ("length moves it (rank correlation)", 0.1, "at most"),
    "calibration": ("what it says differs from what happens (ECE)", 0.1, "at most"),
    "made queries": ("made queries in the right order (share of pairs)", 0.7, "at least"),
    "query": ("another's query lowers the click (places)", 0.1, "at least"),
}


def verdict(found: Mapping[str, float]) -> pd.DataFrame:
    """Is it a good judge? One row a question of GOOD: found, should be, holds (yes | no | not known, for NaN)."""
    rows = []
    for name, (question, limit, side) in GOOD.items():
        value = float(found.get(name, np.nan))
        holds = value >= limit if side == "at least" else value <= limit
        rows.append(
            (question, value, f"{side} {limit:g}", "not known" if np.isnan(value) else "yes" if holds else "no")
        )
    return pd.DataFrame(rows, columns=["question", "found", "should be", "holds"]).set_index("question")


# How good the queries of `ladder` are, by construction: those of equal height are not compared.
RUNGS = {"wanted": 3, "other issue": 2, "other object": 2, "neither": 1, "empty": 0}
STEPS = {"wanted_over_half": (3, 2), "half_over_neither": (2, 1), "neither_over_empty": (1, 0)}
Judged = Callable[[Lists, list[str]], np.ndarray]  # lists, each with a query -> rewards (lists,), NaN where it has none


def ladder(judges: Mapping[str, Judged], lists: Lists, intent_id: Sequence[str], *, seed: int = 0) -> pd.DataFrame:
    """Does it put made queries of known quality in order? ShopWorld only (after RAG-Zeval's ladder; [C]).

    For each session with one click: a question about the clicked intent, one about its object with another issue, one
    about another object with its issue, one about neither, and an empty query (RUNGS).
    judges     name -> judge: Rewarder.of_texts of any form, `nearness` of a query judge
    intent_id  of the KB, in its order
    Columns: judge, accuracy (share of pairs of unequal quality in one session that are put right, ties one half; 0.5
    would be a coin), the same of each of STEPS, pairs, left_out (a judge that gives an empty query no reward).
    Raises ValueError for a KB that is not ShopWorld's.
    """
    number = pd.Index(INTENT_IDS).get_indexer(pd.Index(list(intent_id)))
    if (number < 0).any():
        raise ValueError(
            f"{(number < 0).sum()} intents are not ShopWorld's (first: {list(intent_id)[int(np.argmin(number))]!r}); "
            "the ladder's questions are made of its objects and issues"
        )
    lists = lists.take(np.flatnonzero(lists.clicked.sum(dim=1).numpy() == 1))
    made = ladder_queries(number[clicked_row(lists)], seed=seed)
    height, rows = np.array([RUNGS[name] for name in made]), []
    for name, judge in judges.items():
        found = np.stack([np.asarray(judge(lists, queries), dtype=float) for queries in made.values()], axis=1)
        better, worse = np.nonzero(height[:, None] > height)
        gap = found[:, better] - found[:, worse]  # (lists, pairs of rungs)
        right = np.where(np.isnan(gap), np.nan, (np.sign(gap) + 1) / 2)
        steps = [right[:, (height[better] == high) & (height[worse] == low)] for high, low in STEPS.values()]
        known = np.isfinite(right)
        rows.append((name, *map(_mean, (right, *steps)), known.sum(), (~known).sum()))
    return pd.DataFrame(rows, columns=["judge", "accuracy", *STEPS, "pairs", "left_out"])


def ladder_queries(wanted: np.ndarray, *, seed: int) -> dict[str, list[str]]:
    """Name of RUNGS -> a question for each wanted intent (sessions,), in the words of ShopWorld's customers."""
    rng, count = np.random.default_rng(seed), len(wanted)
    thing, issue = OBJECT[wanted], ISSUE[wanted]
    other_thing = (thing + rng.integers(1, len(THINGS), size=count)) % len(THINGS)
    other_issue = (issue + rng.integers(1, len(ISSUES), size=count)) % len(ISSUES)
    word, question = rng.random(count), rng.random(count)  # which wording: the same on all rungs of a session

    def asked(things: np.ndarray, issues: np.ndarray) -> list[str]:
        rows = zip(things, issues, word, question, strict=True)
        return [_nth(ISSUES[s].asked, q).format(_nth(THINGS[o].asked, w)) for o, s, w, q in rows]

    about = [(thing, issue), (thing, other_issue), (other_thing, issue), (other_thing, other_issue)]
    return dict(zip(RUNGS, [*(asked(*each) for each in about), [""] * count], strict=True))


def nearness(judge: QueryJudge) -> Judged:
    """A query judge as a rival of the reward model: similarity of a query with the session's first clicked intent."""
    return lambda lists, queries: judge.similarity(queries)[np.arange(len(lists)), clicked_row(lists)]


def clicked_row(lists: Lists) -> np.ndarray:
    """(lists,) row in the KB of the first clicked intent of each list, which has one."""
    place = lists.clicked.int().argmax(dim=1, keepdim=True)
    return lists.candidates.long().gather(1, place)[:, 0].numpy()


def _nth(choices: Sequence[str], share: float) -> str:
    return choices[int(share * len(choices))]


def _mean(values: np.ndarray) -> float:
    return float(np.nanmean(values)) if np.isfinite(values).any() else float("nan")


def _correlations(one: np.ndarray, other: np.ndarray, session_id: Sequence[str]) -> pd.DataFrame:
    """spearman and kendall (tau-b) of every session in which both have different values.

    Both from the signs of the differences of two values, whose sum is a value's rank, halved and centred: scipy's
    functions take a millisecond a session.
    """
    one, other = np.asarray(one, float), np.asarray(other, float)
    known = np.flatnonzero(np.isfinite(one) & np.isfinite(other))
    rows = []
    for _, own in pd.Series(known).groupby(np.asarray(session_id, dtype=object)[known], sort=False):
        first, second = (np.sign(np.subtract.outer(values, values)) for values in (one[own], other[own]))
        if first.any() and second.any():
            ranks, others = first.sum(axis=1), second.sum(axis=1)
            spearman = ranks @ others / np.sqrt((ranks @ ranks) * (others @ others))
            rows.append((spearman, (first * second).sum() / np.sqrt((first**2).sum() * (second**2).sum())))
    return pd.DataFrame(rows, columns=["spearman", "kendall"], dtype=float)
