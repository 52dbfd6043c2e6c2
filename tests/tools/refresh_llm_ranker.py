"""The language model ranks the intents itself (reasoner.listwise), on valid of runs finished through notebook 01.

python tests/tools/refresh_llm_ranker.py OPENING SITUATION writes outputs/published/llm-ranker-valid/ranking.csv and
cost.csv. The published tables are of

    python -m rgalign run params/govuk2021-opening-smollm2.yaml --run-dir OPENING --through 01
    python -m rgalign run params/govuk2021-smollm2.yaml --run-dir SITUATION --through 01

and SmolLM2-135M-Instruct as it is, with the prompts of these runs. Scores are kept in the runs' work folders.
"""

import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from refresh_writer import ENCODER, centred_cosine, embedded, judged

from rgalign.data import tables
from rgalign.evaluation import results
from rgalign.evaluation.judge import Judge
from rgalign.params import ROOT, load_run
from rgalign.ranker.train import Parts, load_parts
from rgalign.reasoner import build, listwise
from rgalign.reasoner.model import Reasoner, load
from rgalign.reasoner.prompts import Prompter

TARGET = ROOT / "outputs/published/llm-ranker-valid"
FEW, OVER_KB = (
    150,
    10,
)  # sessions of the slower rankers and the controls; of the whole knowledge base, for its time alone
COSINE = "cosine of MiniLM"
GUIDE = "Name the GOV.UK guide that this person needs."  # an instruction that fits titles, in place of the run's


@dataclass
class Data:
    """The valid part of one data set and its language model."""

    run: Path
    shop: tables.Dataset
    parts: Parts
    recipe: build.Recipe
    reasoner: Reasoner

    @classmethod
    def of(cls, run: Path) -> "Data":
        params, folder = load_run(run), run / "tables/dataset"
        recipe = build.Recipe.of(params)
        shop = tables.excerpt(folder, recipe.columns(folder), splits=("valid",))
        parts = load_parts(run / "tables/encoded")
        assert parts.valid.session_id.tolist() == shop.sessions["session_id"].tolist()
        dtype = params.reasoner.dtype
        return cls(run, shop, parts, recipe, load(params.reasoner.model, dtype=dtype, device="cpu"))

    @property
    def few(self) -> np.ndarray:
        """Rows of FEW sessions, drawn once."""
        rows = np.random.default_rng(0).permutation(len(self.shop.sessions))[:FEW]
        return np.sort(rows)

    def titles(self, shuffled: bool) -> list[str]:
        titles = self.shop.intents["title"].tolist()
        return [titles[i] for i in np.random.default_rng(1).permutation(len(titles))] if shuffled else titles

    def candidates(self, rows: np.ndarray) -> np.ndarray:
        return self.parts.valid.candidates[rows].numpy().astype(int)

    def kept(self, name: str, make) -> dict[str, np.ndarray]:
        """What `make` returns, made once; with the seconds of the processor that it took."""
        path = self.run / f"work/{name}.npz"
        if not path.is_file():
            start = time.process_time()
            made = make()
            path.parent.mkdir(exist_ok=True)
            np.savez(path, seconds=time.process_time() - start, **made)
            print(self.run.name, name, f"{time.process_time() - start:.0f} s", flush=True)
        return dict(np.load(path))

    def prompter(self, instruction: str | None) -> Prompter:
        """The run's, with another instruction where one is given."""
        changed = {} if instruction is None else {"instruction": instruction}
        recipe = replace(self.recipe, settings=self.recipe.settings.model_copy(update=changed))
        return recipe.prompter(self.shop, self.reasoner)

    def likelihood(
        self, suffix: str, rows: np.ndarray, *, shuffled=False, whole=False, instruction: str | None = None
    ) -> dict:
        """log_p (rows, intents) of the titles, and without (intents,), that of the prompt without a session."""
        put = self.prompter(instruction)
        titles = put.queries(self.titles(shuffled))

        def of(prompts, candidates):
            return listwise.log_likelihood(self.reasoner, prompts, titles, candidates, progress=False)

        prompts = put.sessions(self.shop.sessions.iloc[rows])
        found = self.kept(
            f"likelihood{suffix}", lambda: {"log_p": of(prompts, None if whole else self.candidates(rows))}
        )
        if not whole:
            alone = [listwise.without_session(put)]
            found["without"] = self.kept(f"without{suffix}", lambda: {"log_p": of(alone, None)})["log_p"][0]
        return found | {"titles": titles}

    def setwise(self, name: str, rows: np.ndarray, *, shuffled: bool = False) -> dict:
        """The fields of listwise.Answers."""
        put = self.prompter(listwise.CHOOSE)
        titles = [title[:-1] for title in put.queries(self.titles(shuffled))]
        prompts = put.sessions(self.shop.sessions.iloc[rows])

        def make():
            candidates = self.candidates(rows)
            return listwise.setwise(self.reasoner, put, prompts, titles, candidates, seed=0, progress=False)._asdict()

        return self.kept(name, make)

    def judged(self, rows: np.ndarray, scores: dict[str, np.ndarray]) -> pd.DataFrame:
        """GAUC and Recall@3 of the shown list, with the difference to the cosine of the same sessions."""
        lists = self.parts.valid.take(rows)
        judge = Judge.of(self.shop, lists, self.parts.intents, (self.parts.train, self.parts.dev))
        results.MODELS.update({name: name for name in scores})
        metrics = pd.concat([judge.scores(own, name) for name, own in scores.items()])
        pairs = [(name, COSINE) for name in scores if name != COSINE]
        found = judged(metrics, pairs, self.shop, self.parts)
        found = found[found["metric"].isin(["gauc", "recall@3"]) & (found["slice"] == "all")].drop(columns="slice")
        return found.assign(data=self.shop.name, sessions=len(rows))

    def cosine(self) -> np.ndarray:
        """MiniLM's, as in refresh_writer: it needs no training either."""
        shop = self.shop
        column = next(name for name, kind in shop.meta["features"].items() if kind == "text" and name in shop.sessions)

        def make():
            encoder = load(ENCODER, kind="encoder")
            texts = (shop.sessions[column].tolist(), shop.intents["title"].tolist())
            return {"scores": centred_cosine(*(embedded(encoder, side) for side in texts)).astype(np.float32)}

        return self.kept("cosine", make)["scores"]


def of_likelihood(found: dict) -> dict[str, np.ndarray]:
    how = found["log_p"], found["titles"], found["without"]
    return {form: listwise.scores_of(form, *how) for form in listwise.FORMS}


def of_setwise(found: dict, intents: int) -> tuple[dict[str, np.ndarray], pd.DataFrame]:
    answers = listwise.Answers(found["titles"], found["logits"])
    scores = {"setwise": answers.scores(intents), "setwise, calibrated": answers.scores(intents, calibrated=True)}
    return scores, answers.copied()


def tables_of(run: Path, whole: bool) -> tuple[pd.DataFrame, pd.DataFrame]:
    """ranking and cost of a run. whole: all sessions for the likelihood, and the controls; else FEW sessions."""
    data = Data.of(run)
    few, intents, cosine = data.few, len(data.shop.intents), data.cosine()
    chosen = data.setwise("setwise", few)
    scores, copied = of_setwise(chosen, intents)
    every = np.arange(len(data.shop.sessions)) if whole else few
    likelihood = data.likelihood("" if whole else "-few", every)
    timed = {"likelihood, shown list": (likelihood, len(every)), "setwise, shown list, 3 orders": (chosen, len(few))}
    parts = []
    if whole:
        parts.append(data.judged(every, {COSINE: cosine, **of_likelihood(likelihood)}))
        scores["pmi"] = of_likelihood(likelihood)["pmi"][few]
        other = data.likelihood("-guide", few, instruction=GUIDE)
        scores |= {f"{name}, asked for the guide": own for name, own in of_likelihood(other).items()}
        wrong = of_likelihood(data.likelihood("-shuffled", few, shuffled=True))
        wrong |= of_setwise(data.setwise("setwise-shuffled", few, shuffled=True), intents)[0]
        scores |= {f"{name}, titles shuffled": own for name, own in wrong.items()}
        timed["likelihood, whole KB"] = data.likelihood("-over-kb", few[:OVER_KB], whole=True), OVER_KB
    else:
        scores |= of_likelihood(likelihood)
    parts.append(data.judged(few, {COSINE: cosine[few], **scores}))
    cost = pd.DataFrame(
        [(data.shop.name, name, count, found["seconds"] / count) for name, (found, count) in timed.items()],
        columns=["data", "ranker", "sessions", "seconds_a_session"],
    )
    probe = {"kendall": copied["kendall"].mean(), "first": copied["first"].mean()}
    return pd.concat(parts), cost.join(pd.DataFrame([probe], index=[1])).round(3)


if __name__ == "__main__":
    torch.set_num_threads(1)
    TARGET.mkdir(parents=True, exist_ok=True)
    made = [tables_of(Path(run), whole=not place) for place, run in enumerate(sys.argv[1:])]
    for name, parts in zip(("ranking", "cost"), zip(*made, strict=True), strict=True):
        pd.concat(parts).to_csv(TARGET / f"{name}.csv", index=False, lineterminator="\n")
