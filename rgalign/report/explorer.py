"""One session through the whole system, for the tour (notebook 00): what is shown, and what people can change.

Customer text is escaped wherever it becomes HTML.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from html import escape
from typing import Any

import numpy as np
import pandas as pd

from rgalign.alignment.context import Context
from rgalign.alignment.rewarding import Rewarder
from rgalign.data import tables
from rgalign.data.lists import Lists
from rgalign.evaluation.results import MODELS
from rgalign.reasoner import generate
from rgalign.run.artifacts import ArtifactError
from rgalign.run.stages import OpenStage
from rgalign.seeding import derived
from rgalign.serve import ENCODED, Ranking, Scorer, load
from rgalign.shopworld.text import explained

SAMPLES = 4  # queries drawn a reasoner, beside the greedy one
BASELINE = "two_tower_text"
CLICKED = " ✓"
BEFORE, AFTER = "before", "after"


@dataclass(frozen=True, eq=False)
class Explorer:
    """A finished run's models, asked about one session at a time.

    scorers   name of the ranker -> its scorer: qe_rec, and rgalign_rec where the run has an alignment
    baseline  two_tower_text, None where the run has not trained it
    rewarder  None where no reward model was trained, or the reasoner writes nothing
    sessions  of the valid split, each with a click, all their columns; first the one that the tour follows, whose click
              rose most by the last ranker. clicked  session_id -> the ids it clicked on
    """

    scorers: Mapping[str, Scorer]
    baseline: Ranking | None
    rewarder: Rewarder | None
    lists: Lists
    sessions: pd.DataFrame
    clicked: Mapping[str, set[str]]
    seed: int
    simulated: bool = False  # by ShopWorld, whose rules are known

    @classmethod
    def of(cls, stage: OpenStage) -> "Explorer":
        """From the tour's declared inputs. Raises ArtifactError for a run without QE-Rec."""
        if "qe_rec" not in stage.params.ranker.models:
            raise ArtifactError("the tour follows QE-Rec, which this run has not trained: add qe_rec to ranker.models")
        context, run = Context.of(stage), stage.run
        aligned = bool(stage.params.alignment.loop.rounds)
        scorers = {"qe_rec": load(run, aligned=False)} | ({"rgalign_rec": load(run)} if aligned else {})
        folder, baseline = stage.path("models/rankers") / BASELINE / f"seed-{stage.params.ranker.seeds[0]}", None
        if folder.is_dir():
            sampled = context.shop.meta.get("sampled_negatives")
            baseline = Ranking.of(folder, run / ENCODED, scorers["qe_rec"].ranking.kb, None, sampled)
        rewards = aligned and context.writes
        shown = context.shop.impressions
        clicks = shown[shown.clicked == 1].groupby("session_id")["intent_id"].apply(set)
        own = context.shop.sessions[context.shop.sessions.split == "valid"]
        rewarder = Rewarder.load(context, stage.path("models/reward")) if rewards else None
        ids = own.session_id[own.session_id.isin(clicks.index)]
        on_valid = stage.read("tables/aligned_valid_metrics.parquet" if aligned else "tables/valid_metrics.parquet")
        place = on_valid[on_valid.session_id.isin(ids)].pivot_table("mrr/kb", "session_id", "model")
        tours = (place[list(scorers)[-1]] - place["qe_rec" if aligned else "popularity"]).idxmax()
        ids = sorted(ids, key=lambda name: name != tours)  # the rest as it was
        sessions = tables.sessions(stage.path("tables/dataset"), ids)
        seed, simulated = derived(stage.params.run.seed, "tour"), "world" in context.shop.meta
        return cls(scorers, baseline, rewarder, context.parts.valid, sessions, clicks.to_dict(), seed, simulated)

    @property
    def kinds(self) -> Mapping[str, str]:
        return self.scorers["qe_rec"].kinds

    @property
    def typed(self) -> list[str]:
        """Columns of the prompt that people can type: all but histories."""
        return [name for name in self.scorers["qe_rec"].prompter.features if self.kinds[name] != "history"]

    @property
    def allowed(self) -> dict[str, list[str]]:
        """Categorical columns that can be typed -> the values that training knew, in order."""
        seen = self.scorers["qe_rec"].ranking.seen
        return {name: sorted(seen[name]) for name in self.typed if name in seen}

    def session(self, session_id: str, changed: Mapping[str, str] | None = None) -> pd.DataFrame:
        """One row of sessions, with some features changed to what was typed; nothing typed: missing.

        Raises ValueError for an unknown session or column, for what is no number where one is expected, and for a value
        that training did not know.
        """
        row = self.sessions[self.sessions.session_id == session_id].reset_index(drop=True)
        if row.empty:
            raise ValueError(f"{session_id!r} is no session of the valid split with a click")
        faults = [f"{name} is no feature that can be typed" for name in changed or {} if name not in self.typed]
        values: dict[str, Any] = {}
        for name, text in (changed or {}).items():
            values[name] = text or None
            if text and self.kinds.get(name) == "numeric":
                values[name] = pd.to_numeric(text, errors="coerce")
                faults += [f"{name} is a number; found {text!r}"] if pd.isna(values[name]) else []
            elif text and text not in (known := self.allowed.get(name, [text])):
                faults.append(f"{name} is one of {', '.join(known[:20])}{', ..' * (len(known) > 20)}; found {text!r}")
        if faults:
            raise ValueError("; ".join(faults))
        return row.assign(**values)

    def prompt(self, row: pd.DataFrame) -> str:
        """What the reasoner reads of a session."""
        scorer = self.scorers["qe_rec"]
        (ids,) = scorer.prompter.sessions(row)
        return scorer.reasoner.tokenizer.decode(ids)

    def decoded(self, row: pd.DataFrame) -> pd.DataFrame:
        """The prompt column by column: column, value, and what it tells: by ShopWorld's rules, else its kind."""
        known = [name for name in self.typed if not row[name].isna().iloc[0]]
        values = {name: str(row[name].iloc[0]) for name in known}
        tells = [explained(name, values[name]) if self.simulated else self.kinds[name] for name in known]
        return pd.DataFrame({"value": values.values(), "what it tells": tells}, index=pd.Index(known, name="column"))

    def queries(self, row: pd.DataFrame, *, rewarded: bool = True) -> pd.DataFrame:
        """What is written for a session: written (before | after the alignment), query, drawn, reward (nats).

        The greedy query stands first, with drawn 0. rewarded: a reward needs the features of the session that clicked
        """
        tables = []
        for when, scorer in zip((BEFORE, AFTER), self.scorers.values(), strict=False):
            if scorer.reasoner.kind != "causal":
                return pd.DataFrame(columns=["written", "query", "drawn", "reward"])
            put = scorer.prompter
            how = {"samples": SAMPLES, "seed": self.seed, "max_new_tokens": put.max_new_tokens, "progress": False}
            both = generate.greedy_and_samples(scorer.reasoner, put, put.sessions(row), **how)
            drawn = both["count"].where(both["candidate"] >= 0, 0)
            tables.append(both.assign(written=when, drawn=drawn).drop_duplicates("query"))
        table = pd.concat(tables, ignore_index=True)[["written", "query", "drawn"]]
        if self.rewarder is None or not rewarded:
            return table.assign(reward=np.nan)
        place = int(np.flatnonzero(self.lists.session_id == row.session_id[0])[0])
        lists = self.lists.take([place] * len(table))
        return table.assign(reward=self.rewarder.of_texts(lists, table["query"].tolist()))

    def ranking(self, row: pd.DataFrame, k: int = 5, *, marked: bool = True) -> pd.DataFrame:
        """The k best intents of each ranker side by side, by title; clicked intents are marked."""
        clicked = self.clicked[row.session_id[0]] if marked else set()
        tables = {name: scorer.score(row, top=k) for name, scorer in self.scorers.items()}
        if self.baseline is not None:
            scores = self.baseline.scores(self.baseline.lists(row, None), row.timestamp.to_numpy("datetime64[us]"))
            tables = {BASELINE: self.baseline.top(row.session_id.to_numpy(), scores, k)} | tables
        marks = {name: np.where(table.intent_id.isin(clicked), CLICKED, "") for name, table in tables.items()}
        shown = {MODELS[name]: table.title + marks[name] for name, table in tables.items()}
        return pd.DataFrame(shown).set_axis(pd.RangeIndex(1, max(map(len, shown.values())) + 1, name="rank"))

    def terms(self, row: pd.DataFrame, k: int = 5) -> pd.DataFrame:
        """What the scores of the last ranker's k best intents add up from: title, interaction (of the towers, and the
        intent's bias), a column a match term, score. Without a row where the ranker reads no match terms."""
        scorer = list(self.scorers.values())[-1]
        ranking, names = scorer.ranking, list(scorer.ranking.model.config.match)
        columns = ["title", "interaction", *names, "score"]
        if not names:
            return pd.DataFrame(columns=columns)
        lists, match = scorer.lists(row, scorer.embed(row)), ranking.model.match.cpu()
        scores = ranking.scores(lists, row.timestamp.to_numpy("datetime64[us]"))[0]
        best = np.argsort(-scores, kind="stable")[:k]
        parts = (match.standardised(lists.match.columns(names)[0, best]) * match.weight).detach().numpy()
        found = pd.DataFrame(parts, columns=names).assign(title=ranking.kb.title.to_numpy()[best], score=scores[best])
        table = found.assign(interaction=scores[best] - parts.sum(axis=1))[columns]
        return table.set_axis(pd.RangeIndex(1, len(best) + 1, name="rank"))

    def page(self, session_id: str, changed: Mapping[str, str] | None = None) -> str:
        """All of it as HTML. changed: a click belongs to the session as it was, so no rewards and no marks then."""
        row = self.session(session_id, changed)
        ranking = self.ranking(row, marked=not changed)
        parts = [f"<p><b>The reasoner reads</b></p><pre style='white-space: pre-wrap'>{escape(self.prompt(row))}</pre>"]
        if self.scorers["qe_rec"].reasoner.kind == "causal":
            written = self.queries(row, rewarded=not changed)
            parts.append(f"<p><b>It writes</b></p>{written.round(2).to_html(index=False, na_rep='')}")
        parts.append(f"<p><b>The rankers show</b> (✓: clicked)</p>{ranking.to_html()}")
        if len(terms := self.terms(row)):
            parts.append(f"<p><b>What the last ranker's scores add up from</b></p>{terms.round(2).to_html()}")
        return "".join(parts)


def widget(explorer: Explorer, most: int | None = None):
    """The explorer to click through: a session to choose or to search for, features to change. An ipywidgets box.

    Its parts by name: box.session, box.features (by column), box.busy, box.page. most: sessions to choose from
    """
    import ipywidgets  # late: a page without it is static

    whole = {"style": {"description_width": "initial"}, "layout": {"width": "97%"}}  # labels are not cut
    ids = explorer.sessions.session_id.tolist()[:most]
    hint = {"placeholder": "type a part of an id", "ensure_option": True, "continuous_update": False}
    session = ipywidgets.Combobox(options=ids, value=ids[0], description="session", **hint, **whole)
    fields = {
        name: ipywidgets.Dropdown(description=name, **whole)
        if name in explorer.allowed
        else ipywidgets.Text(description=name, continuous_update=False, **whole)
        for name in explorer.typed
    }
    page, busy, known = ipywidgets.HTML(), ipywidgets.HTML(), {}

    def fill(_change=None) -> None:
        if session.value not in ids:  # while it is being typed
            return
        row = explorer.session(session.value).iloc[0]
        for name, field in fields.items():
            field.unobserve_all("value")
            known[name] = "" if pd.isna(row[name]) else str(row[name])
            if name in explorer.allowed:
                values = dict.fromkeys(["", known[name], *explorer.allowed[name]])
                field.options = [(value or "(empty)", value) for value in values]
            field.value = known[name]
            field.observe(show, "value")
        show()

    def show(_change=None) -> None:
        busy.value = "<p><b>The models are at work ..</b></p>"
        try:
            changed = {name: field.value for name, field in fields.items() if field.value != known[name]}
            page.value = explorer.page(session.value, changed)
        except ValueError as error:
            page.value = f"<p>{escape(str(error))}</p>"
        finally:
            busy.value = ""

    session.observe(fill, "value")
    fill()
    typed = [session, ipywidgets.HTML("What the shop knows; change it:"), *fields.values()]
    columns = [ipywidgets.VBox(typed, layout={"width": "38%"}), ipywidgets.VBox([busy, page], layout={"width": "60%"})]
    box = ipywidgets.HBox(columns)
    box.session, box.features, box.busy, box.page = session, fields, busy, page
    return box
