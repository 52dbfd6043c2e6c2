"""The small tables that the notebooks show: queries, rankings, alignment steps, experiments."""

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from timeit import timeit
from typing import Any

import numpy as np
import pandas as pd
from scipy.stats import spearmanr
from torch import nn

from rgalign.alignment.context import MAIN, Context
from rgalign.alignment.judge_reward import calibration, expected_calibration_error, ladder, nearness
from rgalign.alignment.monitor import Hits, ProbeSet
from rgalign.alignment.rewarding import Rewarder
from rgalign.data.features import UNKNOWN
from rgalign.data.lists import Intents, Lists
from rgalign.data.schema import HIDDEN, masked, personal
from rgalign.data.tables import Dataset
from rgalign.data.vectors import Vectors
from rgalign.evaluation import writing_checks
from rgalign.evaluation.confidence import reliability
from rgalign.evaluation.judge import IHR, Judge, QueryJudge, query_judge
from rgalign.evaluation.metrics import gauc_of_lists
from rgalign.evaluation.results import MODELS
from rgalign.experiment.ab_test import Lift, guardrails, lift, rejected_by_look, sample_ratio
from rgalign.experiment.online import Audience, Experiment
from rgalign.ranker.fit import score, with_click
from rgalign.ranker.match import log_clicks
from rgalign.ranker.towers import ThreeTower, TwoTower
from rgalign.ranker.train import Parts
from rgalign.reasoner.embed import embed
from rgalign.reasoner.generate import greedy_and_samples
from rgalign.reasoner.model import Reasoner
from rgalign.reasoner.prompts import Prompter
from rgalign.run.stages import OpenStage
from rgalign.shopworld.world import oracle_scores


def wins_and_losses(metrics: pd.DataFrame, model: str, against: str, count: int = 5) -> pd.DataFrame:
    """The sessions with the largest differences in the click's place, wins first: session_id, outcome (win | loss),
    place under each model (1 / mean reciprocal rank over seeds), named by the models.

    metrics  a session_metrics table of one split
    """
    mean = metrics[metrics["model"].isin([model, against])].pivot_table("mrr", "session_id", "model")
    place = (1 / mean).dropna()
    gain = (place[against] - place[model]).sort_values(ascending=False, kind="stable")
    chosen = {"win": gain[gain > 0].index[:count], "loss": gain[gain < 0].index[::-1][:count]}
    rows = [place.loc[ids].assign(outcome=outcome) for outcome, ids in chosen.items()]
    return pd.concat(rows).reset_index()[["session_id", "outcome", against, model]]


def with_context(cases: pd.DataFrame, sessions: pd.DataFrame, clicks: pd.DataFrame, columns: list[str]) -> pd.DataFrame:
    """The cases with the features of their sessions, personal ones hidden, and what was clicked.

    clicks  session_id, title of the clicked intent, query (where one was written)
    """
    known = sessions[["session_id", *columns]].astype(object)
    for column in columns:
        known[column] = known[column].map(lambda text: masked(text) if isinstance(text, str) else text)
    known[personal(columns)] = HIDDEN
    first = clicks.drop_duplicates("session_id")
    return cases.merge(known, "left", "session_id").merge(first, "left", "session_id").set_index("outcome")


# Notebook 02: what a reasoner writes and reads.

QUERY_COLUMNS = ["session_id", "candidate", "query", "log_probability", "tokens", "count", "source"]


def model_card(reasoner: Reasoner) -> dict[str, Any]:
    """Name, architecture, sizes and pooling."""
    parameters = sum(p.numel() for p in reasoner.model.parameters())
    sizes = {"parameters": parameters, "tokens": len(reasoner.tokenizer), "width": reasoner.hidden_size}
    return {"model": reasoner.name, "architecture": type(reasoner.model).__name__, **sizes, "pooling": reasoner.pooling}


def clicked_sessions(dataset: Dataset, split: str) -> pd.DataFrame:
    """The split's sessions with a click, in order."""
    clicked = dataset.impressions.loc[dataset.impressions.clicked == 1, "session_id"]
    sessions = dataset.sessions
    return sessions[(sessions.split == split) & sessions.session_id.isin(clicked)].reset_index(drop=True)


def written_queries(
    reasoner: Reasoner, prompter: Prompter, sessions: pd.DataFrame, sampling: Any, *, seed: int, source: str = "main"
) -> pd.DataFrame:
    """The greedy query of each session (candidate -1) and its samples: QUERY_COLUMNS; empty for an encoder.

    sampling  params.reasoner.queries
    """
    if reasoner.kind == "encoder":
        return pd.DataFrame(columns=QUERY_COLUMNS).astype({"session_id": "string", "query": "string"})
    how = {key: getattr(sampling, key) for key in ("samples", "temperature", "top_p", "max_new_tokens")}
    both = greedy_and_samples(reasoner, prompter, prompter.sessions(sessions), seed=seed, **how)
    both["session_id"] = sessions["session_id"].to_numpy()[both["row"]]
    return both.assign(source=source)[QUERY_COLUMNS]


def few_queries(queries: pd.DataFrame, sessions: pd.DataFrame, count: int = 4) -> pd.DataFrame:
    """The queries of the first sessions, with their probability; the greedy one first."""
    few = queries[queries.session_id.isin(sessions.session_id.head(count))].copy()
    few["query"] = few["query"].map(masked)
    few["probability"] = np.exp(few.log_probability.astype(float)).round(4)
    few["how"] = np.where(few.candidate < 0, "greedy", "sampled")
    return few.set_index(["session_id", "how"])[["query", "probability", "count"]]


def greedy_hits(
    queries: pd.DataFrame, judge: Judge, dataset: Dataset, name: str, reasoner: Reasoner, prompter: Prompter
) -> pd.DataFrame:
    """IHR of each greedy query against the clicked intents: session_id, ihr@1, ihr@3; empty for an encoder.

    judge  of the sessions' split;  name  evaluation.ihr_judge
    """
    best = queries[queries.candidate == -1]
    if best.empty:
        return pd.DataFrame(columns=["session_id", *IHR])
    nearest = query_judge(name, reasoner, prompter, dataset.intents)
    return judge.intent_hits(nearest.similarity(best["query"].tolist()), best.session_id)


def hit_rates(hits: pd.DataFrame) -> pd.DataFrame:
    """Mean of `greedy_hits`; empty for an encoder."""
    return hits[IHR].mean().to_frame("clicked intent").T if len(hits) else hits[IHR]


def states(reasoner: Reasoner, prompter: Prompter, session: pd.Series, others: pd.DataFrame) -> pd.DataFrame:
    """Each token of a prompt with the cosine of its state to the last one's; the mean over `others` is taken off."""
    tokens = prompter.explain(session)
    ids = tokens["id"].tolist()
    prefixes = [ids[: end + 1] for end in range(len(ids))]
    centre = embed(reasoner, prompter.sessions(others), pooling="last", progress=False).mean(axis=0)
    state = embed(reasoner, prefixes, pooling="last", progress=False) - centre
    length = np.linalg.norm(state, axis=1) * np.linalg.norm(state[-1])
    return tokens.assign(similarity=state @ state[-1] / np.maximum(length, 1e-9))


def principal_map(embedded: Vectors, sessions: pd.DataFrame, dataset: Dataset) -> pd.DataFrame:
    """The two main directions of standardised vectors: columns x, y, family (category of the clicked intent)."""
    clicked = dataset.impressions[dataset.impressions.clicked == 1].drop_duplicates("session_id")
    family = clicked.merge(dataset.intents[["intent_id", "category"]], on="intent_id").set_index("session_id")
    values = embedded.rows(sessions["session_id"].tolist()).astype(np.float64)
    values = (values - values.mean(axis=0)) / np.maximum(values.std(axis=0), 1e-6)
    _, _, directions = np.linalg.svd(values, full_matrices=False)
    signs = np.sign(directions[:2][np.arange(2), np.abs(directions[:2]).argmax(axis=1)])  # a direction has no sign
    x, y = (values @ (directions[:2] * signs[:, None]).T).T
    of_session = family["category"].astype(object).fillna("(none)")
    return pd.DataFrame({"x": x, "y": y, "family": of_session.loc[sessions["session_id"].tolist()].to_list()})


# Notebook 09: what rankers recommend, confuse and cost.


def best(scores: np.ndarray, exists: np.ndarray, k: int) -> np.ndarray:
    """Rows of the k best intents that exist (lists, k), from scores (lists, intents); ties in the KB's order."""
    return np.argsort(-np.where(exists, scores, -np.inf), axis=1, kind="stable")[:, :k]


def recommended(shown: np.ndarray, intents: int) -> pd.Series:
    """What the k intents of each session (lists, k) are, all together.

    coverage  share of the KB that is shown at all
    top tenth  share of all slots that the most shown tenth of the KB takes
    gini      0 where all intents are shown alike, 1 where one has all slots
    """
    counts = np.sort(np.bincount(shown.ravel(), minlength=intents))
    most = max(1, intents // 10)
    gini = 2 * (np.arange(1, intents + 1) * counts).sum() / (intents * counts.sum()) - (intents + 1) / intents
    top = counts[-most:].sum() / counts.sum()
    return pd.Series({"coverage": (counts > 0).mean(), "top tenth": top, "gini": gini})


def confusions(lists: Lists, first: np.ndarray, categories: np.ndarray) -> pd.DataFrame:
    """Share of the clicks of each category (rows) where the first intent is of each category (columns).

    first       (lists,) KB row of each session's best intent
    categories  (intents,) names; a list with several clicks counts once for each
    NaN in the row of a category without a click.
    """
    row, place = np.nonzero(lists.clicked.numpy())
    clicked = categories[lists.candidates.numpy()[row, place]]
    table = pd.crosstab(pd.Series(clicked, name="clicked"), pd.Series(categories[first[row]], name="first"))
    names = sorted(set(categories))
    return table.reindex(index=names, columns=names, fill_value=0).pipe(lambda t: t.div(t.sum(axis=1), axis=0))


def most_confused(before: pd.DataFrame, after: pd.DataFrame, count: int = 8) -> pd.DataFrame:
    """The pairs of categories that were mixed up most before, and how often they are after."""
    wide = before.stack().rename("before").to_frame().join(after.stack().rename("after"))
    apart = wide[wide.index.get_level_values(0) != wide.index.get_level_values(1)]
    return apart.sort_values("before", ascending=False, kind="stable").head(count)


def match_weights(model: TwoTower | ThreeTower, parts: Parts) -> pd.DataFrame:
    """What the match terms contribute to a ranker: weight (nats for one std), missing (the value of a term that has
    nothing to compare, in std), dev_gauc of the term alone."""
    weights, names, alone = model.match, model.config.match, []
    for name in names:
        terms = parts.dev.match.columns([name])[:, :, 0].float().nan_to_num(-1e4)
        scores = terms.gather(1, parts.dev.candidates.long().clamp(min=0)).numpy()
        alone.append(gauc_of_lists(scores, parts.dev.clicked.numpy(), parts.dev.shown.numpy()).value)
    found = {"weight": weights.weight.tolist(), "missing": weights.missing.tolist(), "dev_gauc": alone}
    return pd.DataFrame(found, index=list(names))


def decided_by_match(model: TwoTower | ThreeTower, parts: Parts, shop: Dataset, count: int = 5) -> pd.DataFrame:
    """Sessions of valid whose clicked intent stands among the first three of the list by one match term alone.

    Columns session_id, clicked (its title), place, term, without (the place without that term): those that lose most.
    shop  its intents
    """
    lists = parts.valid.take(np.flatnonzero(parts.valid.clicked.numpy().sum(axis=1) == 1))
    names, clicked, rows = model.config.match, lists.clicked.numpy().argmax(axis=1), np.arange(len(lists))

    def place(ranker: nn.Module) -> np.ndarray:
        """(lists,) of the clicked intent, from 1; among equal scores the middle one."""
        found = score(ranker, lists, parts.intents)
        own = found[rows, clicked][:, None]
        return (found > own).sum(axis=1) + ((found == own).sum(axis=1) + 1) / 2

    places = {"": place(model)}
    for column, name in enumerate(names):
        without = copy.deepcopy(model)
        without.match.weight.data[column] = 0
        places[name] = place(without)
    titles = shop.intents["title"].to_numpy()[lists.candidates.numpy()[rows, clicked]]
    shown = pd.DataFrame({"session_id": lists.session_id, "clicked": titles, "place": places.pop("")})
    table = pd.concat([shown.assign(term=name, without=own) for name, own in places.items()])
    table = table[(table["place"] <= 3) & (table["without"] > 3)].sort_values("without", ascending=False, kind="stable")
    return table.drop_duplicates("session_id").head(count).reset_index(drop=True)


def stopped_by(scores: Mapping[str, Sequence[np.ndarray]], dev: Lists, intents: Intents) -> pd.DataFrame:
    """GAUC on the lists that say when to stop, by what was clicked: rows model, columns all, known and new intents.

    scores   model -> (lists, candidates) of each seed;  dev  the lists
    intents  the KB: new intents have no click in train
    The row `lists` counts those with a click; NaN where a column has none that can be judged.
    """
    clicked, shown = dev.clicked.numpy(), dev.shown.numpy()
    of_new = (clicked & (intents.id.numpy()[dev.candidates.numpy()] == UNKNOWN)).any(axis=1)
    columns = {"all": clicked.any(axis=1), "known intents": clicked.any(axis=1) & ~of_new, "new intents": of_new}
    table = pd.DataFrame({column: {"lists": float(rows.sum())} for column, rows in columns.items()})
    for name, of_seeds in scores.items():
        gauc = [
            [gauc_of_lists(s[rows], clicked[rows], shown[rows]).value for rows in columns.values()] for s in of_seeds
        ]
        table.loc[name] = np.mean(gauc, axis=0)
    return table


def costs(steps: Mapping[str, Callable[[], object]], sessions: int) -> pd.DataFrame:
    """Milliseconds a session of each step, run once on `sessions` of them."""
    seconds = [timeit(run, "gc.enable()", number=1) for run in steps.values()]  # timeit would turn it off
    return pd.DataFrame({"step": list(steps), "milliseconds a session": 1000 * np.array(seconds) / sessions})


# Notebooks 04 to 08: what an alignment step did.

FIGURES = ["ranking", "reward", "ihr@1", "ihr@3", "tokens", "distinct", "repeated", "seconds"]


def probe_set(context: Context, rewards: Path, read: Context | None = None) -> ProbeSet:
    """The sessions of valid that a step is measured on, with reward and IHR where the reasoner writes.

    rewards  models/reward;  read  the context whose ranker and vectors are measured; None: this one
    """
    if not context.writes:
        return ProbeSet.of(read or context)
    hits = hits_by_click(context, context.main())
    return ProbeSet.of(read or context, Rewarder.load(context, rewards), hits)


def warned_after(stage: OpenStage, probe: ProbeSet, row: pd.Series, learnt: pd.DataFrame) -> pd.DataFrame:
    """Can it still write? The warnings of notebook 05 or 06, none of a step that learnt nothing.

    row  of the stage table;  learnt  the step's curve
    """
    if not probe.context.writes or learnt.empty:
        return writing_checks.none()
    chance = writing_checks.Chance.of(probe.context.shop, probe.valid.session_id)
    return writing_checks.after_tuning(stage.stage.name, row, chance, stage.read("tables/writing.parquet"))


def on_greedy_queries(rewarder: Rewarder, dev: pd.DataFrame) -> tuple[pd.DataFrame, dict[str, np.ndarray]]:
    """Of the main LLM's greedy queries for development users: the reward model's calibration, and the place of the
    click in its list with the session's own query and with another session's. dev: scored candidates."""
    context = rewarder.embedder.context
    greedy = dev[(dev.source == MAIN) & (dev.candidate < 0)].dropna(subset="reward")
    lists = context.rows_of(context.parts.dev, greedy.session_id)
    texts = {"own query": greedy["query"], "another session's": greedy["query"].sample(frac=1, random_state=0)}
    said = {name: rewarder.probabilities(lists, own.tolist()) for name, own in texts.items()}
    reliable = calibration(said["own query"], lists.clicked.numpy())
    return reliable, {name: places_of_click(own, lists) for name, own in said.items()}


def made_queries(rewarder: Rewarder) -> pd.DataFrame:
    """judge_reward.ladder of the reward model, and of the judge of IHR, for development users; empty where the data are
    not ShopWorld's or the reasoner writes nothing."""
    context = rewarder.embedder.context
    if not context.writes or "world" not in context.shop.meta:
        return pd.DataFrame(columns=["judge", "accuracy"])
    words = nearness(_judge_of(context, rewarder.embedder.reasoner))
    judges = {"the reward model": rewarder.of_texts, "words in common": words}
    return ladder(judges, with_click(context.parts.dev), context.parts.intents.intent_id)


def hits_by_click(context: Context, reader: Reasoner) -> Hits:
    """IHR of valid's watched queries, against the clicked intents (METHOD.md 4).

    reader  whose embeddings judge the queries if evaluation.ihr_judge is embedding: the reasoner before its alignment
    """
    lists, judge = ProbeSet.of(context).valid, _judge_of(context, reader)
    bench = Judge.of(context.shop, lists, context.parts.intents, ())

    def hits(queries: Sequence[str]) -> dict[str, float]:
        found = bench.intent_hits(judge.similarity(list(queries)), lists.session_id.tolist())
        return found[IHR].mean().to_dict()

    return hits


def _judge_of(context: Context, reader: Reasoner) -> QueryJudge:
    prompter = context.recipe.prompter(context.shop, reader)
    return query_judge(context.params.evaluation.ihr_judge, reader, prompter, context.shop.intents)


def leads_to_click(context: Context, reader: Reasoner, candidates: pd.DataFrame) -> np.ndarray:
    """(rows,) bool: the KB intent nearest to the query, by the fixed judge, is one that its session clicked.

    An intent that entered the KB after the session does not count.
    """
    if candidates.empty:
        return np.zeros(0, dtype=bool)
    similarity = np.nan_to_num(_judge_of(context, reader).similarity(candidates["query"].tolist()), nan=-1.0)
    when = context.shop.sessions.set_index("session_id")["timestamp"].loc[candidates["session_id"].tolist()]
    times = when.to_numpy(dtype="datetime64[us]", na_value=np.datetime64("NaT"))
    similarity = np.where(context.parts.intents.existing(times), similarity, -1.0)
    nearest = context.shop.intents["intent_id"].to_numpy(dtype=object)[similarity.argmax(axis=1)]
    clicks = context.shop.impressions
    clicks = clicks[(clicks["clicked"] == 1) & clicks["session_id"].isin(candidates["session_id"])]
    clicked = set(clicks[["session_id", "intent_id"]].itertuples(index=False, name=None))
    led = [pair in clicked for pair in zip(candidates["session_id"], nearest, strict=True)]
    return (similarity.max(axis=1) > 0) & np.array(led, dtype=bool)  # a query may share no word with the KB


def row(step: str, figures: Mapping[str, float], seconds: float) -> pd.DataFrame:
    """A step's row of the stage table: index step, columns FIGURES. seconds: NaN of a step that is switched off."""
    values = {**dict.fromkeys(FIGURES, np.nan), **figures, "seconds": round(float(np.nan_to_num(seconds)), 1)}
    return pd.DataFrame([values], index=pd.Index([step], name="step"))[FIGURES]


def before_and_after(probe: ProbeSet, models: Mapping[str, Reasoner], sessions: int = 6) -> pd.DataFrame:
    """The same sessions' greedy queries by several reasoners, beside what was clicked: index session_id. Empty for an
    encoder."""
    context, lists = probe.context, probe.valid
    if not context.writes:
        return pd.DataFrame(columns=["clicked", *models])
    titles = context.shop.intents["title"].fillna("").to_numpy(dtype=object)
    clicked = titles[np.take_along_axis(lists.candidates.numpy(), _first_click(lists), axis=1)[:, 0]]
    written = {name: probe.written(reasoner)["query"].to_numpy() for name, reasoner in models.items()}
    index = pd.Index(lists.session_id, name="session_id")
    return pd.DataFrame({"clicked": clicked, **written}, index=index).head(sessions)


def places_of_click(scores: np.ndarray, lists: Lists) -> np.ndarray:
    """(lists,) place of the first click in its list, from 1; ties count one half. scores (lists, candidates)."""
    own, shown = np.take_along_axis(scores, _first_click(lists), axis=1), lists.shown.numpy()
    return 0.5 + ((scores > own) & shown).sum(axis=1) + ((scores == own) & shown).sum(axis=1) / 2


def _first_click(lists: Lists) -> np.ndarray:
    """(lists, 1) position of the first clicked candidate."""
    return lists.clicked.numpy().argmax(axis=1)[:, None]


POPULARITY = "popularity"
LIFT = ["difference", "ci_low", "ci_high", "relative", "relative_low", "relative_high", "p_value"]
FOUND = ["treatment", "control", "method", "users", "ctr_control", "ctr_treatment", *LIFT, "variance_removed", "truth"]


def arms_of(models: Iterable[str], most: int = 3) -> list[str]:
    """The last few of popularity and the trained models that are no controls, in the order of results.MODELS."""
    return [name for name in MODELS if name == POPULARITY or (name in models and "/" not in name)][-most:]


def scores_of(
    bench: Judge, model, name: str, vectors: tuple[Vectors, Vectors] | None, train: Lists, seed: int
) -> np.ndarray:
    """Scores (lists, intents) by which a ranker ranks the KB for the judge's sessions; -inf for what did not exist yet.

    model    None: popularity, by the clicks in train
    vectors  of sessions and intents, None where the model reads none; seed: of the order of shuffled queries
    """
    if name == POPULARITY:
        found = np.broadcast_to(log_clicks(train, bench.intents), bench.exists.shape)
    else:
        found = (bench.with_vectors(name, *vectors, train, seed) if vectors else bench).over_kb(model)
    return np.where(bench.exists, found, -np.inf)


def oracles(bench: Judge, shop: Dataset) -> list[pd.DataFrame]:
    """session_metrics of the simulator's two oracles; none where the data have no truth. shop: with its truth"""
    if shop.truth is None:
        return []
    truth = shop.truth.set_index("session_id").loc[list(bench.lists.session_id)].reset_index()
    kinds = {"oracle_discrete": "discrete", "oracle": "all"}
    return [bench.scores(oracle_scores(shop.meta, truth, which), name) for name, which in kinds.items()]


def neighbours_agree(embedded: Vectors, sessions: pd.DataFrame, dataset: Dataset) -> tuple[float, float]:
    """Share of sessions whose nearest other session, by the cosine of their vectors less the mean, clicked on the same
    category; and the share that pairs drawn at random would have. sessions: each with a click"""
    first = dataset.impressions[dataset.impressions.clicked == 1].drop_duplicates("session_id")
    category = dataset.intents.set_index("intent_id").category.astype(object).fillna("none")
    own = category[first.set_index("session_id").intent_id[sessions.session_id]].to_numpy()
    vectors = embedded.rows(sessions.session_id).astype(np.float32)
    vectors = vectors - vectors.mean(axis=0)
    vectors /= np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-9)
    cosine = vectors @ vectors.T
    np.fill_diagonal(cosine, -np.inf)
    shares = pd.Series(own).value_counts(normalize=True)
    return float((own[cosine.argmax(axis=1)] == own).mean()), float((shares**2).sum())


def sample_ratios(experiment: Experiment, arms: Sequence[str]) -> pd.DataFrame:
    """Users of each arm, and whether they fit an equal split: arm, users, planned, p_value, alarm."""
    users = np.array([(experiment.arm == name).sum() for name in arms])
    ratio, planned = sample_ratio(users), users.sum() / len(arms)
    fixed = {"planned": planned, "p_value": float(ratio.p_value), "alarm": bool(ratio.alarm)}
    return pd.DataFrame({"arm": list(arms), "users": users}).assign(**fixed)


def sureness(confidence: np.ndarray, click_probability: np.ndarray) -> pd.Series:
    """Is confidence the chance of a click on at least one of the three intents shown? And does it order sessions?

    confidence (sessions,); click_probability (sessions, 3) true ones, of each slot (Traffic.click_probability)
    confidence and chance are means, ece is by ten bins (judge_reward.expected_calibration_error), rank_correlation is
    Spearman's; best_tenth and all are true CTR@3, of the most confident tenth and of all sessions.
    """
    chance, ctr = 1 - (1 - click_probability).prod(axis=1), click_probability.mean(axis=1)
    first = np.argsort(-confidence, kind="stable")[: max(1, round(len(ctr) / 10))]
    found = {"confidence": confidence.mean(), "chance": chance.mean()}
    found["ece"] = expected_calibration_error(reliability(confidence, chance))
    found["rank_correlation"] = spearmanr(confidence, chance).statistic
    return pd.Series(found | {"best_tenth": ctr[first].mean(), "all": ctr.mean()})


def lifts(experiment: Experiment, pairs: Sequence[tuple[str, str]], audience: Audience) -> pd.DataFrame:
    """One row a pair (treatment, control) and method (plain | CUPED); truth: the relative lift that is to be found."""
    rows = []
    for treatment, control in pairs:
        for method in ("plain", "CUPED"):
            new, old = experiment.of_arms(treatment, control, cuped=method == "CUPED")
            found, truth = lift(new, old), audience.ctr(treatment) / audience.ctr(control) - 1
            row = {"treatment": treatment, "control": control, "method": method, "users": int(new.users + old.users)}
            row |= {"ctr_control": float(old.ctr), "ctr_treatment": float(new.ctr)}
            row |= {name: float(value) for name, value in _lift_columns(found).items()}
            rows.append(row | {"variance_removed": float(found.variance_removed), "truth": truth})
    return pd.DataFrame(rows, columns=FOUND)


def by_group(
    experiment: Experiment, treatment: str, control: str, masks: pd.DataFrame, audience: Audience
) -> pd.DataFrame:
    """The lift in each group, with intervals that hold for all groups at once: group, users, LIFT, truth.

    masks  bool columns, one a group, rows as the audience's sessions (evaluation.slices)
    """
    inside = [masks[name].to_numpy(dtype=bool) for name in masks]
    new, old = experiment.by_group(inside, treatment, control)
    ctr = {name: [audience.probability[name][mask].mean() for mask in inside] for name in (treatment, control)}
    truth = np.array(ctr[treatment]) - ctr[control]
    users = (new.users + old.users).astype(int)
    columns = _lift_columns(guardrails(new, old))
    return pd.DataFrame({"group": list(masks), "users": users, **columns, "truth": truth})


def rejections(p: Mapping[str, np.ndarray], *, alpha: float = 0.05) -> pd.DataFrame:
    """How often each test of A/A experiments was significant: test, share, low, high (Wilson, 95 %), experiments.

    p  test -> (experiments,), or (experiments, looks): then at any of the looks
    """
    shares = {name: rejected_by_look(values.reshape(len(values), -1), alpha=alpha) for name, values in p.items()}
    rows = [(name, *(float(part[-1]) for part in share), len(p[name])) for name, share in shares.items()]
    return pd.DataFrame(rows, columns=["test", "share", "low", "high", "experiments"])


def _lift_columns(found: Lift) -> dict[str, np.ndarray]:
    return dict(zip(LIFT, (*found.difference, *found.relative, found.p_value), strict=True))
