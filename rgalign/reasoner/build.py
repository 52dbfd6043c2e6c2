"""What a run's params ask for: its language models, and one way of embedding for each set of vectors a ranker reads.

models/reasoner/<name>/   a reasoner, or where it was taken from (source.json) and the adapters of its warm-up: main,
                          other-1, .., kb_lm; reader, an encoder that reads texts for the match terms
"""

import copy
import shutil
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from sklearn.decomposition import TruncatedSVD
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.pipeline import Pipeline, make_pipeline
from transformers.utils import logging as transformers_logging

from rgalign.data import shards, tables
from rgalign.data.schema import YAML_FILE, Table, is_there, read_yaml
from rgalign.data.tables import Dataset
from rgalign.data.vectors import Vectors
from rgalign.params import Params
from rgalign.params_schema import Reasoner as ReasonerSettings
from rgalign.params_schema import TinyModel
from rgalign.params_training import WRITTEN_TERMS, Ranker
from rgalign.reasoner import generate, verbalize
from rgalign.reasoner.adapter import adapted
from rgalign.reasoner.embed import Prompts, embed_by_processes, embed_to_shards, gather
from rgalign.reasoner.folder import positions
from rgalign.reasoner.model import (
    WARMED_UP,
    Reasoner,
    ReasonerError,
    fold_name,
    load_saved,
    look,
    name_source,
    place_of,
    save,
    tiny,
)
from rgalign.reasoner.prompts import PROMPT, PROMPT_QUERY, TINY, Prompter, intent_texts, prompter, shown_features
from rgalign.reasoner.tiny import build_tokenizer, count_words, pretrain
from rgalign.reasoner.trainer import Setup
from rgalign.reasoner.warmup import before_and_after, folds_of, write_adapters
from rgalign.reasoner.written import TextEmbedder, WrittenQueries, write
from rgalign.run.distributed import each
from rgalign.seeding import seeded


def learnable(dataset: Dataset, folder: Path, encoded: Path) -> tuple[Dataset, dict[str, int]]:
    """The data set with nothing in it but what a run's language models may be trained on, and the numbers of
    transcripts kept and left out; empty without any.

    dataset  with its transcripts, of train and valid;  folder  it was read from;  encoded  tables/encoded
    Kept are sessions of train whose user is no development user; of transcripts that name a session, those of kept
    sessions whose user has none in valid or test [C]: what a user typed earlier may reveal what they ask later. A
    transcript that names no session must be of no user of the run; whoever provides it is responsible for that.
    """
    developing = set(shards.load_lists(encoded, "dev").user_id)
    sessions = dataset.sessions
    learners = sessions[sessions["split"].eq("train") & ~sessions["user_id"].isin(developing)]
    transcripts = dataset.transcripts
    if transcripts is not None and "session_id" in transcripts:
        judged = tables.user_ids(folder, ("valid", "test"))
        allowed = learners["session_id"][~learners["user_id"].isin(judged)]
        transcripts = transcripts[transcripts["session_id"].isna() | transcripts["session_id"].isin(allowed)]
    every = Table(folder, "transcripts").rows if is_there(folder, "transcripts") else 0
    kept = 0 if transcripts is None else len(transcripts)
    told = {"transcripts": kept, "of development, valid or test users, left out": every - kept} if every else {}
    return replace(dataset, sessions=learners, transcripts=transcripts), told


Ids = Sequence[Sequence[int]]


def fit(documents: Ids, *, dim: int, seed: int) -> Pipeline:
    """The control without a language model (LSA): TF-IDF of token ids and a truncated SVD to at most `dim`, of the
    documents that the tiny model is pre-trained on, so that the difference is what language modelling adds. Raises
    ValueError where fewer than two words stand in two documents each."""
    words = TfidfVectorizer(analyzer=lambda ids: ids, min_df=2, sublinear_tf=True, dtype=np.float32)
    seen = Counter(word for ids in documents for word in set(ids))
    if sum(count >= words.min_df for count in seen.values()) < 2:
        raise ValueError(
            f"vectors lsa cannot be fitted on {len(documents)} transcripts: fewer than two words stand in two of them; "
            "is typed_query blank? Give transcripts with words, or leave qe_rec/lsa out of ranker.models"
        )
    counted = words.fit_transform(documents)
    reduced = TruncatedSVD(min(dim, counted.shape[1] - 1), random_state=seed).fit(counted)
    return make_pipeline(words, reduced)


MAIN, KB_LM = "main", "kb_lm"
READER = "reader"  # the encoder that reads texts for the match terms (reasoner.reader)
PROMPT_ALONE = "prompt_alone"  # vectors of the prompt, whatever reasoner.embed is
TEXT = "text"  # vectors of the text columns alone and of titles alone (ranker.match)
ADAPTER = "adapter_config.json"  # of a folder that holds an adapter alone
KB_ALONE_REPEATS = 200  # of the KB for the control that is trained on it alone: some 20,000 documents [C]


@dataclass(frozen=True)
class Recipe:
    """The params that models and vectors are made by: the section `reasoner`, data.features.drop, and those of run."""

    settings: ReasonerSettings
    drop: Sequence[str] = ()
    device: str = "cpu"
    launcher: str | None = None

    @classmethod
    def of(cls, params: Params) -> "Recipe":
        """By a run's params."""
        return cls(params.reasoner, params.data.features.drop, params.run.device, params.run.launcher)

    @property
    def own(self) -> bool:
        """The main model is built here."""
        return self.settings.model == TINY

    @property
    def loading(self) -> dict[str, str]:
        """How a reasoner of this run is read from its folder: arguments of `load_saved`."""
        return {**self.settings.model_dump(include={"kind", "dtype", "pooling"}), "device": self.device}

    def columns(self, folder: Path) -> list[str]:
        """The feature columns of a data set folder that a prompt shows (prompts.shown_features)."""
        return shown_features(self.settings.features, read_yaml(folder / YAML_FILE), self.drop)

    def prompter(
        self, dataset: Dataset, reasoner: Reasoner, *, texts: bool = True, embed: str | None = None
    ) -> Prompter:
        """The prompter for this one of the run's models. embed: what it embeds, where that is not reasoner.embed's."""
        put = {"drop": self.drop, "texts": texts, "embed": embed}
        put |= {"ends": reasoner.ends, "positions": reasoner.positions}
        return prompter(self.settings, dataset.meta, dataset.intents, reasoner.tokenizer, **put)


def build_models(
    recipe: Recipe,
    dataset: Dataset,
    vectors: Collection[str],
    *,
    folder: Path,
    work: Path,
    workers: int = 1,
    aligned: Path | None = None,
    last: Path | None = None,
) -> pd.DataFrame:
    """Build every model of the run and save it below `folder`, or name it there. Returns the curves of pre-training.

    A pretrained model's folder, tokenizer and prompts are checked before anything is trained; its weights are read for
    a warm-up alone.
    vectors  the sets of vectors that will be asked for (ranker.variants)
    work     for checkpoints;  workers  tiny models trained at once, on a CPU
    aligned  reasoner of the run that this one continues: it becomes the main one, and keeps its tokenizer, to which new
             words are unknown;  last  folder of all that run's models: its other LLMs are copied
    Curves: model, step, loss (nats a token); empty where nothing was trained. Raises ReasonerError, ValueError.
    """
    wanted, settings = _models_of(recipe, vectors), recipe.settings
    if aligned is not None:
        _copy_aligned(recipe, aligned, last / MAIN, folder / MAIN)
        del wanted[MAIN]
        for other in [name for name in wanted if name != KB_LM and (last / name).is_dir()]:
            shutil.copytree(last / other, folder / other)
            del wanted[other]
    how = settings.model_dump(include={"kind", "dtype", "quantize", "pooling"})
    curves = []
    for name, (source, *_) in wanted.items():
        if source != TINY:
            adapter = settings.adapter if name == MAIN else None
            found = look(source, kind=how["kind"], adapter=adapter, device=recipe.device, quantize=how["quantize"])
            put = {"drop": recipe.drop, "positions": positions(found.config)}
            prompter(settings, dataset.meta, dataset.intents, found.tokenizer, **put)  # raises where it cannot prompt
            name_source(folder / name, source, adapter=adapter, **how)
    if settings.reader is not None:
        look(settings.reader, kind="encoder", device=recipe.device)
        name_source(folder / READER, settings.reader, kind="encoder", dtype="float32")
    for name, (source, seed, _) in wanted.items():
        if source != TINY and _is_warmed_up(settings, name):
            curves.append(_warm_up(recipe, dataset, folder / name, work / name, seed))
    own = {name: made_by for name, (source, *made_by) in wanted.items() if source == TINY}
    if not own:
        return pd.concat([pd.DataFrame({"model": [], "step": [], "loss": []}), *curves], ignore_index=True)
    workers = min(workers, len(own))  # two bars at once would write over each other
    shared = {"recipe": recipe, "dataset": dataset, "words": _vocabulary(recipe, dataset), "progress": workers == 1}
    jobs = [
        {**shared, "seed": seed, "size": size, "work": work / name, "kb_only": name == KB_LM, "folder": folder / name}
        for name, (seed, size) in own.items()
    ]
    found = each(_train_tiny, jobs, total=len(jobs), workers=workers, title="language models")
    return pd.concat([*curves, *(curve.assign(model=name) for name, curve in zip(own, found, strict=True))])


def _is_warmed_up(settings: ReasonerSettings, name: str) -> bool:
    """Whether a pretrained model of the run is."""
    if not settings.warmup.epochs:
        return False
    return name == MAIN or settings.others[int(name.removeprefix("other-")) - 1].warmup


def _warm_up(recipe: Recipe, dataset: Dataset, folder: Path, work: Path, seed: int) -> pd.DataFrame:
    transcripts, how = _transcripts(dataset), recipe.settings
    if transcripts is None:
        raise ReasonerError(
            f"reasoner.warmup.epochs is {how.warmup.epochs:g}, and no transcript may be read: set it to 0"
        )
    reasoner = load_saved(folder, device=recipe.device)
    put = recipe.prompter(dataset, reasoner)
    given = {"folder": folder, "work": work, "seed": seed, "fold_seed": how.seed}
    curve = write_adapters(reasoner, put, transcripts, _train(dataset), how.warmup, **given)
    curve["model"] = folder.name + curve.pop("adapter").map(lambda name: "" if name == WARMED_UP else f"/{name}")
    return curve.drop(columns="seconds")


def warmed_up(recipe: Recipe, dataset: Dataset, folder: Path) -> tuple[pd.DataFrame, pd.DataFrame] | None:
    """What the main model's warm-up changed (warmup.before_and_after); None where there was none. folder: of models."""
    if not (folder / MAIN / WARMED_UP).is_dir():
        return None
    put = recipe.prompter(dataset, load_saved(folder / MAIN, device=recipe.device))
    given = _transcripts(dataset), _train(dataset), recipe.settings.warmup
    return before_and_after(folder / MAIN, put, *given, fold_seed=recipe.settings.seed, device=recipe.device)


def by_writer(
    recipe: Recipe, models: Mapping[str, Reasoner], sessions: pd.DataFrame
) -> Iterator[tuple[np.ndarray, dict[str, Reasoner]]]:
    """Who writes for these sessions: (rows (sessions,) bool, name -> reasoner), a part at a time.

    A session of train is written for by the adapter of its user's fold, where a model has read what that user typed
    (reasoner.warmup); a model that was trained on since writes all the same.
    """
    places = {name: place_of(model) for name, model in models.items()}
    folders = {name: Path(place["folder"]) for name, place in places.items() if place and not place["adapter"]}
    folded = {name for name, folder in folders.items() if (folder / fold_name(0)).is_dir()}
    fold = np.full(len(sessions), -1)
    if folded:
        of_train = sessions["split"].eq("train").to_numpy()
        fold[of_train] = folds_of(sessions["user_id"][of_train], recipe.settings.warmup, recipe.settings.seed)
    for number in np.unique(fold) if len(fold) else [-1]:
        own = (
            {}
            if number < 0
            else {name: load_saved(folders[name], device=recipe.device, adapter=fold_name(number)) for name in folded}
        )
        yield fold == number, {**models, **own}


def _models_of(recipe: Recipe, vectors: Collection[str]) -> dict[str, tuple[str, int, TinyModel]]:
    """name -> source, seed and size of every model of the run."""
    settings = recipe.settings
    if KB_LM in vectors and not recipe.own:
        raise ReasonerError(f"vectors {KB_LM} need reasoner.model tiny; {settings.model} is pretrained on more")
    wanted = {MAIN: (settings.model, settings.seed, settings.tiny)}
    for number, other in enumerate(settings.others, start=1):
        wanted[f"other-{number}"] = (other.model, other.seed, other.tiny)
    return wanted | ({KB_LM: wanted[MAIN]} if KB_LM in vectors else {})


def _copy_aligned(recipe: Recipe, aligned: Path, main: Path, folder: Path) -> None:
    """Write the aligned reasoner of another run; an adapter is merged into the model that it was trained on."""
    if not (aligned / ADAPTER).is_file():
        shutil.copytree(aligned, folder)
        return
    if recipe.settings.quantize:
        raise ReasonerError(f"{aligned} is an adapter of a quantised model, into which it cannot be merged")
    before = load_saved(main, **recipe.loading)
    save(replace(before, model=adapted(before.model, aligned, before.name, merge=True)), folder)


def load_models(recipe: Recipe, folder: Path) -> dict[str, Reasoner]:
    """name -> the reasoner that `build_models` saved or named."""
    folders = [path for path in sorted(folder.iterdir()) if path.is_dir() and path.name != READER]
    return {path.name: load_saved(path, **recipe.loading) for path in folders}


@dataclass(frozen=True, eq=False)
class Embedding:
    """One way from prompts to vectors (ranker.variants.Variant says which there are)."""

    name: str
    reasoner: Reasoner
    prompter: Prompter
    recipe: Recipe  # with a launcher, several processes embed
    words: Pipeline | None = None  # instead of the reasoner: TF-IDF and SVD

    def sessions(self, frame: pd.DataFrame, work: Path) -> Vectors:
        """Vectors of sessions by session_id. work: folder for finished shards; a killed call goes on from them."""
        prompts = generate.embedded_sessions(self.reasoner, self.prompter, Prompts(self.prompter, frame))
        return self._vectors(frame["session_id"].tolist(), prompts, work)

    def intents(self, frame: pd.DataFrame, work: Path) -> Vectors:
        """Vectors of KB intents by intent_id (Prompter.embedded_intents)."""
        frame = frame.assign(description=None) if self.name == TEXT else frame  # titles alone
        return self._vectors(frame["intent_id"].tolist(), self.prompter.embedded_intents(frame), work)

    def _vectors(self, ids: list[str], sequences: Sequence[list[int]], work: Path) -> Vectors:
        if self.words is not None:
            return Vectors(ids, self.words.transform(list(sequences)).astype(np.float32))
        settings, launcher = self.recipe.settings, self.recipe.launcher
        how = {"pooling": "mean" if self.name == "mean" else None, "prefix": len(self.prompter.head)}
        how["tokens_per_batch"] = settings.embed_tokens_per_batch
        if launcher:
            where = {"dtype": settings.dtype, "device": self.recipe.device}
            embed_by_processes(work, self.reasoner, ids, sequences, launcher=launcher, **where, **how)
        else:
            embed_to_shards(work, self.reasoner, ids, sequences, **how)
        vectors = gather(work)
        shutil.rmtree(work)
        return vectors


def embedding(name: str, recipe: Recipe, models: Mapping[str, Reasoner], dataset: Dataset) -> Embedding:
    """The way of embedding of that name (ranker.variants, or TEXT). Raises ReasonerError if an encoder is to write."""
    settings, main = recipe.settings, models[MAIN]
    if name == PROMPT_QUERY and main.kind == "encoder":
        raise ReasonerError("vectors prompt_query need a model that writes; an encoder does not")
    chosen = models[KB_LM] if name == KB_LM else untrained(main, settings.seed) if name == "random_lm" else main
    # A control differs from its parent in one thing alone: except for these, it embeds what reasoner.embed says.
    own = {PROMPT_QUERY: PROMPT_QUERY, PROMPT_ALONE: PROMPT, "lsa": PROMPT, "mean": PROMPT, TEXT: PROMPT}
    if name == TEXT:
        recipe, chosen = text_reader(recipe, main)
        recipe = of_texts(recipe, dataset.meta)
    put, words = recipe.prompter(dataset, chosen, texts=name != "no_text", embed=own.get(name)), None
    if name == "lsa":
        documents = [[*prompt, *query] for prompt, query in zip(*_documents(dataset, put), strict=True)]
        words = fit(documents, dim=main.hidden_size, seed=settings.seed)
    return Embedding(name, chosen, put, recipe, words)


def written(
    recipe: Recipe, main: Reasoner, dataset: Dataset, ranker: Ranker, frame: pd.DataFrame, writer: Reasoner,
    *, seed: int, work: Path | None = None
) -> WrittenQueries | None:  # fmt: skip
    """The queries that a reasoner writes for these sessions (frame); None where no term of ranker.match reads them.

    main        the run's reasoner before its alignment: it embeds them, or the run's reader does
    seed, work  see `reasoner.written.write`
    """
    if not {*WRITTEN_TERMS} & {*ranker.match}:
        return None
    queries = []
    for number, (rows, own) in enumerate(by_writer(recipe, {MAIN: writer}, frame)):
        how = {"seed": seed, "work": work and work / f"part-{number}"}
        queries.append(write(own[MAIN], recipe.prompter(dataset, writer), frame[rows], ranker.written, **how))
    queries = pd.concat(queries, ignore_index=True)
    recipe, reads = text_reader(recipe, main)
    reader = TextEmbedder(reads, recipe.prompter(dataset, reads))
    return WrittenQueries(queries, reader.vectors(queries["query"].tolist()), reader.intents(dataset.intents))


def text_reader(recipe: Recipe, main: Reasoner | None, folder: Path | None = None) -> tuple[Recipe, Reasoner]:
    """What reads texts for the match terms, and how: the run's reader, or `main`, its reasoner before the alignment.

    folder  of the run's models; None: that which main was read from
    """
    if recipe.settings.reader is None:
        return recipe, main
    as_encoder = {"kind": "encoder", "model": recipe.settings.reader, "embed": PROMPT, "instruction": None}
    settings = recipe.settings.model_copy(update=as_encoder)
    folder = Path(place_of(main)["folder"]).parent if folder is None else folder
    return replace(recipe, settings=settings), load_saved(folder / READER, device=recipe.device)


def of_texts(recipe: Recipe, meta: Mapping[str, Any]) -> Recipe:
    """The recipe of prompts that show the text columns alone; unchanged where no column shown is text."""
    shown = shown_features(recipe.settings.features, meta, recipe.drop)
    texts = tuple(column for column in shown if meta["features"][column] == "text")
    return replace(recipe, settings=recipe.settings.model_copy(update={"features": texts})) if texts else recipe


def untrained(reasoner: Reasoner, seed: int) -> Reasoner:
    """The same architecture and tokenizer with new random weights: the control qe_rec/random_lm."""
    plain = reasoner.plain
    config = copy.deepcopy(plain.config)
    if hasattr(config, "quantization_config"):  # random weights need no packing
        del config.quantization_config
    with seeded(seed):
        drawn = type(plain)(config)
    return replace(reasoner, model=drawn.to(reasoner.device, plain.dtype).eval())


def _vocabulary(recipe: Recipe, dataset: Dataset):
    """The tiny models' tokenizer: one for all of a run, so that their queries are written in the same words."""
    settings = recipe.settings
    counts = count_words(
        features=shown_features(settings.features, dataset.meta, recipe.drop),
        kinds=dataset.meta["features"],
        intents=_known_intents(dataset),
        sessions=_train(dataset),
        transcripts=_transcripts(dataset),
    )
    min_count = settings.tiny.min_count
    instruction = verbalize.compact_text(settings.instruction or "").split()
    return build_tokenizer(counts | Counter(dict.fromkeys(instruction, min_count)), min_count=min_count)


def _train_tiny(recipe, dataset, words, seed, size, work, progress: bool, kb_only: bool, folder: Path) -> pd.DataFrame:
    reasoner = tiny(words, hidden=size.hidden, layers=size.layers, heads=size.heads, seed=seed)
    how, known = recipe.settings.pretraining, _known_intents(dataset)
    repeats = KB_ALONE_REPEATS if kb_only else how.kb_repeats
    put = recipe.prompter(dataset, reasoner)
    prompts, asked = ([], []) if kb_only else _documents(dataset, put)
    weight = prompt_weight(how.prompt_weight, asked=kb_only or is_asked(dataset))
    how = how.model_copy(update={"prompt_weight": weight})
    prompts = prompts + put.intents(known) * repeats
    asked = asked + put.queries(intent_texts(known)) * repeats
    trained, curve = pretrain(reasoner, prompts, asked, how, Setup(folder=work, seed=seed, progress=progress))
    if not progress:
        transformers_logging.disable_progress_bar()  # of this worker's process, which would write to the terminal
    save(trained, folder)
    return curve.drop(columns="seconds")  # they differ from run to run


def prompt_weight(given: float | None, *, asked: bool) -> float:
    """reasoner.pretraining.prompt_weight as given; empty: 0, or 1 where no document has a question, so that the
    sessions' own text is all there is."""
    return given if given is not None else (0.0 if asked else 1.0)


def _documents(dataset: Dataset, put: Prompter) -> tuple[list[list[int]], list[list[int]]]:
    """Prompts and queries of the transcripts; without any, the prompts of train's sessions, each with itself as query:
    the state at a prompt's end learns nothing unless it must encode the prompt. These are no queries, so
    max_new_tokens does not truncate them [C]."""
    transcripts = _transcripts(dataset)
    if transcripts is not None:
        return put.transcripts(transcripts, _train(dataset))
    prompts = put.sessions(_train(dataset))
    return prompts, [[*prompt[len(put.head) : len(prompt) - len(put.tail)], put.end_id] for prompt in prompts]


def is_asked(dataset: Dataset) -> bool:
    """Whether a model that is built here has seen a question."""
    return _transcripts(dataset) is not None


def cut_queries(recipe: Recipe, dataset: Dataset, reasoner: Reasoner) -> pd.DataFrame:
    """What pre-training cuts at reasoner.queries.max_new_tokens: rows chats and KB intents; columns queries, cut."""
    put, chats = recipe.prompter(dataset, reasoner), _transcripts(dataset)
    texts = {"chats": [] if chats is None else chats["typed_query"].fillna("").tolist()}
    texts["KB intents"] = intent_texts(_known_intents(dataset))
    rows = {name: (len(own), put.too_long(own)) for name, own in texts.items()}
    return pd.DataFrame.from_dict(rows, orient="index", columns=["queries", "cut"])


def _transcripts(dataset: Dataset) -> pd.DataFrame | None:
    """Transcripts of train's sessions and of no session of ours; what was typed later is never read. None: none."""
    transcripts = dataset.transcripts
    if transcripts is not None and "session_id" in transcripts:
        own = transcripts["session_id"]
        transcripts = transcripts[own.isna() | own.isin(_train(dataset)["session_id"])]
    return transcripts if transcripts is not None and len(transcripts) else None


def _known_intents(dataset: Dataset) -> pd.DataFrame:
    """The knowledge base as it stood at train's last session: what was written later is not read beforehand."""
    intents, last = dataset.intents, _train(dataset)["timestamp"].max()
    return intents if pd.isna(last) else intents[intents["valid_from"].isna() | (intents["valid_from"] <= last)]


def _train(dataset: Dataset) -> pd.DataFrame:
    return dataset.sessions[dataset.sessions["split"] == "train"]
