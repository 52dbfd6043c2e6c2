"""Chats learnt by a ranker without a language model: the control two_tower_text/chats [C].

QE-Rec's language model reads chats (transcripts.parquet) that no other ranker sees. To tell whether its gain comes from
language or from the chats alone, a two-tower learns from the same chats before it learns from clicks: the vector of a
session is pulled to the words typed in its chat, and the typed words to the chat's intent where it is labelled.

folder/   train-*.safetensors, train.json (data.shards: the sessions), typed.safetensors (the words typed)
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from safetensors.torch import load_file, save_file
from torch import Tensor

from rgalign.data import shards, tables
from rgalign.data.encode import IMPRESSION_COLUMNS, as_bag, encode_lists, hashed_words, session_columns
from rgalign.data.features import UNKNOWN, FeatureSpace, column_of, ids_of
from rgalign.data.lists import Bag, Intents, Lists, listed_in
from rgalign.data.schema import FEATURE_TYPES, STRING
from rgalign.data.tables import Dataset
from rgalign.errors import TrainingError
from rgalign.params_training import RankerSettings
from rgalign.ranker.towers import TwoTower
from rgalign.ranker.variants import RANKERS
from rgalign.reasoner.prompts import sessions_of
from rgalign.seeding import seeded

CHATS, TYPED = "chats", "typed.safetensors"


@dataclass(frozen=True)
class Chats:
    """Chats as a ranker reads them; row i of both is one chat.

    sessions  what was known before anything was typed; the one candidate of a list is the chat's intent, -1: none
    typed     Bag of the hashed words of typed_query, in the same buckets as the intents' words
    """

    sessions: Lists
    typed: Bag

    def __len__(self) -> int:
        return len(self.sessions)


def of_run(models: Sequence[str], dataset: Dataset, folder: Path, encoded: Path) -> Chats | None:
    """`encode` if one of a run's rankers learns from chats, else None; encoded: tables/encoded."""
    name = next((name for name in models if RANKERS[name].chats), None)
    return encode(dataset, folder, shards.load_space(encoded), name) if name else None


def encode(dataset: Dataset, folder: Path, space: FeatureSpace, name: str) -> Chats:
    """The chats that a language model may learn from, those with a typed text.

    dataset  that of reasoner.learnable: without the transcripts of evaluated and development users
    folder   its tables/dataset, where a chat's session is looked up if transcripts have no `features`
    name     of the ranker, for the message
    A column that a chat does not mention is unknown, not missing; so are histories, since a chat's features are texts
    [C]. Raises ValueError if there are fewer than two chats.
    """
    frame = dataset.transcripts
    frame = None if frame is None else frame[frame["typed_query"].fillna("").str.strip() != ""]
    if frame is None or len(frame) < 2:
        raise ValueError(
            f"{name} learns from chats before it learns from clicks; transcripts that may be learnt from: "
            f"{0 if frame is None else len(frame)}, expected 2 or more. Remove {name} from ranker.models, or give "
            "transcripts (data.world.transcripts of ShopWorld, transcripts.parquet of a folder)"
        )
    names, of_maps = session_columns(space)[2:], "features" in frame
    if of_maps:
        sessions = _columns_of_maps(column_of(frame, "features"), names, dataset.kinds)
    else:
        known = sessions_of(frame, tables.excerpt(folder, names, splits=("train",)).sessions)
        sessions = {column: column_of(known, column) for column in names}
    ids = pa.array([f"chat-{row}" for row in range(len(frame))], STRING)
    table = pa.table({"session_id": ids, "user_id": ids, **sessions})
    intent = ids_of(frame, "intent_id") if "intent_id" in frame else pa.nulls(len(frame), pa.large_string())
    labelled = pc.is_in(intent, value_set=ids_of(dataset.intents, "intent_id")).to_numpy(zero_copy_only=False)
    rows, count = pa.array(np.flatnonzero(labelled)), int(labelled.sum())
    shown = (ids.take(rows), intent.take(rows), pa.array(np.zeros(count, int)), pa.array(np.ones(count, int)))
    labels = pa.table(dict(zip(IMPRESSION_COLUMNS, shown, strict=True)))
    lists = encode_lists(space, table, labels, dataset.intents, "train")
    for column, field in enumerate(space.fields if of_maps else ()):
        lists.fields[sessions[field.name].is_null().to_numpy(zero_copy_only=False), column] = UNKNOWN
    typed = hashed_words([column_of(frame, "typed_query")], buckets=space.word_buckets, pairs=space.word_pairs)
    return Chats(lists, as_bag(*typed, bags=len(frame), size=space.word_buckets))


def save(folder: Path, chats: Chats) -> None:
    """Write the folder; the same chats give the same bytes."""
    folder.mkdir(parents=True)
    shards.save_lists(folder, chats.sessions)
    save_file({"values": chats.typed.values, "offsets": chats.typed.offsets}, folder / TYPED)


def load(folder: Path) -> Chats:
    """What `save` wrote."""
    return Chats(shards.load_lists(folder, "train"), Bag(**load_file(folder / TYPED)))


def pretrain(
    model: TwoTower,
    chats: Chats,
    train: Lists,
    intents: Intents,
    settings: RankerSettings,
    *,
    seed: int,
    accelerator: Accelerator | None = None,
) -> list[float]:
    """Learn from chats in place, before `fit`; returns the mean loss of each epoch, nats.

    train     an intent that none of its lists shows is neither a label nor a negative: train does not know it yet
    settings  chat_epochs, chat_learning_rate, chat_temperature; lists_per_batch is chats in a batch, too [C]
    seed      the same seed gives the same bytes; with several processes each does the same
    By Adam: decay would shrink the tables that chats do not touch [C]. Raises TrainingError.
    """
    accelerator = accelerator or Accelerator()
    known = torch.from_numpy(listed_in(train, len(intents)))
    model.to(accelerator.device).train()
    sessions, typed, intents, known = (
        part.to(accelerator.device) for part in (chats.sessions, chats.typed, intents, known)
    )
    optimizer = torch.optim.Adam(model.parameters(), settings.chat_learning_rate)
    order, losses = torch.Generator().manual_seed(seed), []
    with seeded(seed):
        for epoch in range(settings.chat_epochs):
            count, total = math.ceil(len(chats) / settings.lists_per_batch), 0.0
            for rows in torch.randperm(len(chats), generator=order).tensor_split(count):
                batch = Chats(sessions.take(rows), typed.take(rows))
                with accelerator.autocast():
                    loss = chat_loss(model, batch, intents, known, settings.chat_temperature)
                optimizer.zero_grad(set_to_none=True)
                accelerator.backward(loss)
                optimizer.step()
                total += loss.detach() * len(rows)
            losses.append(float(total) / len(chats))
            if not math.isfinite(losses[-1]):
                raise TrainingError(
                    f"the loss of the chats is {losses[-1]} in epoch {epoch + 1}: lower ranker.chat_learning_rate "
                    f"(it is {settings.chat_learning_rate:g})"
                )
    return losses


def chat_loss(model: TwoTower, chats: Chats, intents: Intents, known: Tensor, temperature: float) -> Tensor:
    """In-batch InfoNCE from sessions to typed words, and from these to the known intents where a chat is labelled [C].

    known  (intents,) bool
    A score is the ranker's own, user . words / sqrt(dim), divided by the temperature. Chats with equal words need no
    mask: they share the probability, which adds a constant to the loss. Returns nats, a scalar: the sum of both means.
    """
    scale = model.config.dim**-0.5 / temperature
    words = model.intent.words(chats.typed)
    own = torch.arange(len(words), device=words.device)
    loss = F.cross_entropy(model.user(chats.sessions) @ words.T * scale, own)
    label = chats.sessions.candidates[:, 0].long()
    labelled = (label >= 0) & known[label.clamp(min=0)]
    if labelled.any():
        vectors, bias = model.intent(intents)
        scores = (words @ vectors.T * scale + bias / temperature).masked_fill(~known, -math.inf)
        loss = loss + F.cross_entropy(scores[labelled], label[labelled])
    return loss


def _columns_of_maps(features: pa.Array, names: tuple[str, ...], kinds: Mapping[str, str]) -> dict[str, pa.Array]:
    """The columns of sessions from maps of name -> text, each in its kind's type; null where a map lacks the name."""
    there = set(pc.unique(features.filter(features.is_valid()).keys).to_pylist())
    found = {}
    for name in names:
        texts = pc.map_lookup(features, name, "first") if name in there else pa.nulls(len(features), pa.string())
        if kinds[name] == "numeric":
            texts = pa.array(pd.to_numeric(texts.to_pandas(), errors="coerce"), pa.float64(), from_pandas=True)
        found[name] = pa.nulls(len(texts), FEATURE_TYPES["history"]) if kinds[name] == "history" else texts
    return found
