"""Ours against peers, measured side by side in one run; every function returns rows of tables/benchmarks.parquet.

A ratio above 1 means that ours is better: seconds theirs / ours, rates ours / theirs, GAUC (1 - theirs) / (1 - ours).
`equal` says that both did the same work: the same values to 1e-12 (to 1e-6 where the peer has single precision), or
as many impressions. A peer that is not installed is a row with neither figure nor ratio, never a row left out.
"""

import importlib.util
import math
import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from rgalign.data.features import FeatureSpace
from rgalign.data.lists import Intents, Lists
from rgalign.evaluation.metrics import gauc, gauc_of_lists, group_auc, ndcg_at
from rgalign.params_training import RankerSettings
from rgalign.ranker.fit import fit, gauc_of
from rgalign.ranker.towers import TwoTower, TwoTowerConfig
from rgalign.run.distributed import single_process
from rgalign.seeding import seeded

COLUMNS = ("name", "peer", "peer_version", "ours", "theirs", "unit", "ratio", "equal")
MISSING = "not installed"
FUXICTR, PEER = "FUXICTR", "FuxiCTR AutoInt"  # the first: an environment variable, the folder of a clone


def table(rows: Sequence[dict]) -> pd.DataFrame:
    """The rows as tables/benchmarks.parquet has them."""
    return pd.DataFrame(rows, columns=COLUMNS).astype({"ours": float, "theirs": float, "equal": "boolean"})


def row(name: str, peer: str, peer_version: str, ours: float, theirs: float, unit: str, equal: bool | None) -> dict:
    """One row, its ratio by unit: seconds, GAUC, or a rate."""
    better = {"seconds": (theirs, ours), "GAUC": (1 - theirs, 1 - ours)}.get(unit, (ours, theirs))
    return dict(zip(COLUMNS, (name, peer, peer_version, ours, theirs, unit, better[0] / better[1], equal), strict=True))


def gauc_rows(
    *, rows: int = 7_500_000, per_list: int = 12, sampled: int | None = 5_000, seed: int = 0, repeats: int = 3
) -> list[dict]:
    """GAUC of `rows` impressions in lists of `per_list`, in seconds, against scikit-learn and torchmetrics.

    sampled  lists that the peers' loops see, their seconds scaled up to all lists; None: all of them
    Scores are random, one in ten tied with others of its list; ours is the best of `repeats`, on all rows.
    """
    scores, clicked, groups = _impressions(rows, per_list, seed)
    ours = min(_seconds(lambda: gauc(scores, clicked, groups))[0] for _ in range(repeats))
    lists = rows // per_list
    seen = lists if sampled is None else min(sampled, lists)
    head = slice(0, seen * per_list)
    auc, _, _ = group_auc(scores[head], clicked[head], groups[head])
    name, how = f"gauc of {rows:,} rows", f"{seen:,} of {lists:,} lists, scaled" if seen < lists else "all lists"

    def compared(peer: str, package: str, peers: Callable[[], float], ours_there: float, tolerance: float) -> dict:
        if (found := installed(package)) is None:
            return row(name, peer, MISSING, ours, math.nan, "seconds", None)
        seconds, value = _seconds(peers)
        equal = abs(value - ours_there) <= tolerance
        return row(name, f"{peer} ({how})", found, ours, seconds * lists / seen, "seconds", equal)

    whole = gauc(scores[head], clicked[head], groups[head]).value
    return [
        compared(
            "loop over sklearn.metrics.roc_auc_score",
            "scikit-learn",
            lambda: _gauc_by_loop(scores[head], clicked[head], groups[head]),
            whole,
            1e-12,
        ),
        compared(
            "torchmetrics RetrievalAUROC, float32, lists weighted alike",
            "torchmetrics",
            lambda: _gauc_by_torchmetrics(scores[head], clicked[head], groups[head]),
            float(np.nanmean(auc)),
            1e-6,
        ),
    ]


def ndcg_rows(*, lists: int = 100_000, per_list: int = 12, seed: int = 0) -> list[dict]:
    """NDCG@3 of lists without ties, in seconds, against ranx (compiled beforehand, its input built beforehand)."""
    name, peer = f"ndcg@3 of {lists:,} lists", "ranx"
    scores, clicked, _ = (array.reshape(lists, per_list) for array in _impressions(lists * per_list, per_list, seed, 0))
    seconds, ours = _seconds(lambda: ndcg_at(scores, clicked, np.ones_like(clicked, dtype=bool), 3))
    if (found := installed("ranx")) is None:
        return [row(name, peer, MISSING, seconds, math.nan, "seconds", None)]
    from ranx import Qrels, Run, evaluate

    names = [str(i) for i in range(per_list)]
    keys = [f"{i:08d}" for i in range(lists)]
    qrels = Qrels({key: {names[j]: 1 for j in np.flatnonzero(own)} for key, own in zip(keys, clicked, strict=True)})
    run = Run({key: dict(zip(names, own.tolist(), strict=True)) for key, own in zip(keys, scores, strict=True)})
    evaluate(qrels, run, "ndcg@3")
    theirs, value = _seconds(lambda: evaluate(qrels, run, "ndcg@3"))
    return [row(name, peer, found, seconds, theirs, "seconds", abs(value - ours.mean()) <= 1e-12)]


def ranker_rows(
    train: Lists,
    dev: Lists,
    valid: Lists,
    intents: Intents,
    space: FeatureSpace,
    *,
    epochs: int = 30,
    lists_per_batch: int = 512,
    learning_rates: Sequence[float] = (1e-3, 4e-3, 1e-2),
    embedding_dim: int = 16,
    seed: int = 0,
) -> list[dict]:
    """Training the two-tower against FuxiCTR's AutoInt on the same impressions: rate, and GAUC on valid.

    Both: ids only, one attention layer of one head as wide as the embedding, 256 hidden units, then 32; batches of the
    same impressions; the better of `learning_rates` and the best of `epochs` on dev; the rest as each library has it.
    Both train on the CPU, also where there is a GPU.
    AutoInt reads session and intent as the fields of one row, so it attends once an impression, ours once a list: most
    of the ratio is that, and not tuning. It gets its batches from memory; its own loaders would slow it down.
    After the same seconds: AutoInt as before, ours in as many epochs as fit into its training time.
    Lists without a click are left out, as a listwise loss does. Raises ValueError for a set with history columns.
    """
    if space.histories:
        raise ValueError("AutoInt is fed single-valued fields here: take a data set without history columns")
    train = train.take(train.clicked.any(dim=1).nonzero().squeeze(1))
    task = _Task(train, dev, valid, intents, space, lists_per_batch, embedding_dim, seed)

    def better(train_one: Callable[[_Task, int, float], _Trained], most: int) -> _Trained:
        return max((train_one(task, most, rate) for rate in learning_rates), key=lambda trained: trained.dev_gauc)

    ours = better(_two_tower, epochs)
    try:
        theirs, found = better(_autoint, epochs), _fuxictr()[0]
        longer = better(_two_tower, max(1, int(theirs.seconds / ours.seconds * epochs)))
    except ImportError as fault:
        theirs, found, longer = _Trained(math.nan, math.nan, math.nan, math.nan), f"{MISSING} ({fault})", ours
    equal = None if math.isnan(theirs.seconds) else theirs.impressions == ours.impressions
    rates = ours.impressions / ours.seconds, theirs.impressions / theirs.seconds
    return [
        row("two-tower training", PEER, found, *rates, "impressions/s", equal),
        row(f"two-tower, {epochs} epochs of both", PEER, found, ours.gauc, theirs.gauc, "GAUC", equal),
        row("two-tower, as many seconds as the peer", PEER, found, longer.gauc, theirs.gauc, "GAUC", equal),
    ]


@dataclass(frozen=True)
class _Task:
    train: Lists
    dev: Lists
    valid: Lists
    intents: Intents
    space: FeatureSpace
    lists_per_batch: int
    embedding_dim: int
    seed: int


@dataclass(frozen=True)
class _Trained:
    """gauc: on valid; seconds: of training alone; impressions: seen, over all epochs."""

    dev_gauc: float
    gauc: float
    seconds: float
    impressions: float


def _two_tower(task: _Task, epochs: int, learning_rate: float) -> _Trained:
    space = task.space
    settings = RankerSettings(
        epochs=epochs, patience=epochs, lists_per_batch=task.lists_per_batch, learning_rate=learning_rate,
        embedding_dim=task.embedding_dim, attention_layers=1, heads=1, experts=4, dim=32,
    )  # fmt: skip
    config = TwoTowerConfig.of(
        settings, field_sizes=space.field_sizes, history_sizes=(), word_buckets=space.word_buckets,
        intent_ids=space.intent_ids_size, categories=space.category_size, positions=0, text=False, query_dim=0,
    )  # fmt: skip
    model, how = TwoTower(config, seed=task.seed), {"seed": task.seed, "progress": False}
    with single_process() as accelerator:
        fitted = fit(model, task.train, task.dev, task.intents, settings, accelerator=accelerator, **how)
    judging, dev_gauc = _seconds(lambda: gauc_of(model, task.dev, task.intents).value)
    epochs_run, spent = len(fitted.curve), fitted.curve["seconds"].sum()
    gauc_on_valid = gauc_of(model, task.valid, task.intents).value
    return _Trained(dev_gauc, gauc_on_valid, spent - epochs_run * judging, epochs_run * int(task.train.shown.sum()))


def _autoint(task: _Task, epochs: int, learning_rate: float) -> _Trained:
    """FuxiCTR's AutoInt, one training step of its own after another. Raises ImportError where it is not there."""
    _, AutoInt, FeatureMap = _fuxictr()
    sizes = [*task.space.field_sizes, task.space.intent_ids_size, task.space.category_size]
    names = [f"field_{i}" for i in range(len(sizes))]
    fields = FeatureMap("benchmark", "")
    for name, size in zip(names, sizes, strict=True):
        fields.features[name] = {"type": "categorical", "source": "", "vocab_size": size}
    fields.labels, fields.num_fields, fields.default_emb_dim = ["clicked"], len(names), task.embedding_dim
    train, dev, valid = (_impression_rows(part, task.intents, names) for part in (task.train, task.dev, task.valid))
    size = task.lists_per_batch * task.train.candidates.shape[1]
    seconds, best_gauc, best, order = 0.0, -math.inf, {}, torch.Generator().manual_seed(task.seed)
    with seeded(task.seed), TemporaryDirectory() as scratch:
        model = AutoInt(
            fields, learning_rate=learning_rate, embedding_dim=task.embedding_dim, attention_dim=task.embedding_dim,
            attention_layers=1, num_heads=1, dnn_hidden_units=[256, 32], optimizer="adam", loss="binary_crossentropy",
            metrics=["AUC"], verbose=0, model_root=scratch,
        )  # fmt: skip
        model._max_gradient_norm = 10.0  # set by its fit, which also writes and reads checkpoints: not timed here
        for _ in range(epochs):
            model.train()
            started = time.perf_counter()
            for rows in torch.randperm(len(train["clicked"]), generator=order).split(size):
                model.train_step({name: column[rows] for name, column in train.items()})
            seconds += time.perf_counter() - started
            if (dev_gauc := _gauc_of(task.dev, _autoint_scores(model, dev, task.dev))) > best_gauc:
                best_gauc, best = dev_gauc, {name: value.clone() for name, value in model.state_dict().items()}
        model.load_state_dict(best)
        gauc_on_valid = _gauc_of(task.valid, _autoint_scores(model, valid, task.valid))
    return _Trained(best_gauc, gauc_on_valid, seconds, epochs * len(train["clicked"]))


def _impression_rows(lists: Lists, intents: Intents, names: list[str]) -> dict[str, Tensor]:
    """One row an impression: the fields of its session, then id and category of its intent, and the click."""
    row_of, _ = lists.shown.nonzero(as_tuple=True)
    intent = lists.candidates[lists.shown].long()
    columns = [*lists.fields[row_of].unbind(dim=1), intents.id[intent], intents.category[intent]]
    return dict(zip(names, columns, strict=True)) | {"clicked": lists.clicked[lists.shown]}


def _autoint_scores(model, rows: dict[str, Tensor], lists: Lists) -> np.ndarray:
    model.eval()
    scores = np.full(lists.candidates.shape, -np.inf)
    with torch.no_grad():
        batches = torch.arange(len(rows["clicked"])).split(65_536)
        pieces = [model({name: column[own] for name, column in rows.items()})["y_pred"].flatten() for own in batches]
    scores[lists.shown.numpy()] = torch.cat(pieces).double().numpy()
    return scores


def _fuxictr() -> tuple[str, type, type]:
    """(version, AutoInt, FeatureMap) from the clone that FUXICTR names; its AutoInt is in no package."""
    clone = Path(os.environ.get(FUXICTR, ""))
    source = clone / "model_zoo" / "AutoInt" / "src" / "AutoInt.py"
    if not source.is_file():
        raise ImportError(f"set {FUXICTR} to a clone of github.com/reczoo/FuxiCTR")
    if str(clone) not in sys.path:
        sys.path.append(str(clone))
    import fuxictr
    from fuxictr.features import FeatureMap

    specification = importlib.util.spec_from_file_location("fuxictr_autoint", source)
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return fuxictr.__version__, module.AutoInt, FeatureMap


def _gauc_of(lists: Lists, scores: np.ndarray) -> float:
    return gauc_of_lists(scores, lists.clicked.numpy(), lists.shown.numpy()).value


def _impressions(rows: int, per_list: int, seed: int, tied: float = 0.1) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(scores, clicked, groups), each (rows,): one click a list, and this share of scores the same."""
    rng, lists = np.random.default_rng(seed), rows // per_list
    scores = rng.normal(size=lists * per_list)
    scores[rng.random(len(scores)) < tied] = 0.0
    clicked = np.zeros(len(scores), np.int8)
    clicked[np.arange(lists) * per_list + rng.integers(0, per_list, lists)] = 1
    return scores, clicked, np.repeat(np.arange(lists), per_list)


def _gauc_by_loop(scores: np.ndarray, clicked: np.ndarray, groups: np.ndarray) -> float:
    from sklearn.metrics import roc_auc_score

    ends = np.flatnonzero(np.diff(groups, append=-1)) + 1
    bounds = list(zip([0, *ends[:-1]], ends, strict=True))
    auc = [roc_auc_score(clicked[start:end], scores[start:end]) for start, end in bounds]
    return float(np.average(auc, weights=[end - start for start, end in bounds]))


def _gauc_by_torchmetrics(scores: np.ndarray, clicked: np.ndarray, groups: np.ndarray) -> float:
    from torchmetrics.retrieval import RetrievalAUROC

    metric = RetrievalAUROC(empty_target_action="skip")
    return float(metric(torch.from_numpy(scores), torch.from_numpy(clicked).bool(), indexes=torch.from_numpy(groups)))


def _seconds(work: Callable):
    started = time.perf_counter()
    result = work()
    return time.perf_counter() - started, result


def installed(package: str) -> str | None:
    """Its version, None where it is not installed."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None
