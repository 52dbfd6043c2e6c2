"""Encoded tables: impression lists and the knowledge base as compact integer tensors."""

from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from typing import ClassVar, NamedTuple, Self

import numpy as np
import pandas as pd
import torch
from torch import Tensor

PARTS = ("train", "dev", "valid", "test")
PADDING = -1


class Bag(NamedTuple):
    """Bags of ids of any size, laid end to end: bag i is values[offsets[i]:offsets[i + 1]] (torch's EmbeddingBag).

    values   (all ids,) int16 or int32, as the vocabulary needs: cast a batch before embedding it
    offsets  (bags + 1,) int64, from 0
    """

    values: Tensor
    offsets: Tensor

    def take(self, indices: Tensor) -> "Bag":
        """The bags at these positions, in this order."""
        starts = self.offsets[indices]
        lengths = self.offsets[indices + 1] - starts
        offsets = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])
        ids = int(offsets[-1])  # the one number that a GPU is waited for
        within = torch.arange(ids, device=lengths.device)
        moved = torch.repeat_interleave(starts - offsets[:-1], lengths, output_size=ids)
        return Bag(self.values[within + moved], offsets)

    def to(self, device: torch.device | str) -> "Bag":
        return Bag(self.values.to(device), self.offsets.to(device))


class Match(NamedTuple):
    """Match terms of sessions with the whole knowledge base (ranker.match).

    values  (lists, intents, terms) float16; NaN where a term has nothing to compare
    names   of the terms
    """

    values: Tensor
    names: tuple[str, ...]

    def take(self, indices: Tensor) -> "Match":
        return Match(self.values[indices], self.names)

    def to(self, device: torch.device | str) -> "Match":
        return Match(self.values.to(device), self.names)

    def columns(self, names: Sequence[str]) -> Tensor:
        """(lists, intents, len(names)), those terms. Raises ValueError for one that is not there."""
        if missing := [name for name in names if name not in self.names]:
            found = ", ".join(self.names) or "none"
            raise ValueError(f"this ranker reads the match terms {', '.join(missing)}; these lists have: {found}")
        places = [self.names.index(name) for name in names]
        return self.values if places == [*range(len(self.names))] else self.values[:, :, places]

    def replaced(self, other: "Match | None", names: Sequence[str] = ()) -> "Match":
        """With the other's terms in place of those of their names, row by row; None: these names have nothing to
        compare."""
        names = names if other is None else other.names
        if not names:
            return self
        values, places = self.values.clone(), [self.names.index(name) for name in names]
        values[:, :, places] = float("nan") if other is None else other.values
        return Match(values, self.names)

    def of_candidates(self, candidates: Tensor, names: Sequence[str]) -> Tensor:
        """(lists, candidates, len(names)) of these rows of the KB (lists, candidates); of a padded one, any."""
        rows = candidates.long().clamp(min=0).unsqueeze(2).expand(-1, -1, len(names))
        return self.columns(names).gather(1, rows)


class _Movable:
    """A dataclass of tensors and Bags; its ids and dates stay on the host."""

    def to(self, device: torch.device | str) -> Self:
        moved = {}
        for name in (each.name for each in fields(self)):
            value = getattr(self, name)
            if isinstance(value, Tensor | Bag | Match):
                moved[name] = value.to(device)
            elif isinstance(value, tuple):
                moved[name] = tuple(bag.to(device) for bag in value)
        return replace(self, **moved)


@dataclass(frozen=True)
class Lists(_Movable):
    """Impression lists of one part; row i of everything is one session, in the order of sessions.parquet.

    fields      (lists, fields) ids as in FeatureSpace: 0 missing, 1 unknown, values from 2
    history     one Bag a history column, the most recent values, oldest first; an empty bag where there is none
    words       Bag of hashed words of all text columns, 0 .. word_buckets - 1, ascending, each once
    candidates  (lists, candidates) row in intents.parquet of the intent shown at position 0, 1, ..; -1 where padded
    clicked     (lists, candidates) bool, False where padded
    match       match terms of each session with every intent of the KB; None: the run has none
    timestamp   (lists,) datetime64, NaT where unknown; None: no ranker asks for it (ranker.exposure)
    weight      (lists, candidates) float32, of each click; None: no ranker asks for it
    unshown     how many candidates on the right the list did not show (losses.with_unshown)
    Ids are int16 or int32, as their vocabulary needs: cast a batch (`.long()`) before embedding it.
    """

    SHARED: ClassVar[tuple[str, ...]] = ("part", "unshown")  # fields that are no rows

    part: str
    session_id: np.ndarray
    user_id: np.ndarray
    fields: Tensor
    history: tuple[Bag, ...]
    words: Bag
    candidates: Tensor
    clicked: Tensor
    match: Match | None = field(default=None, kw_only=True)
    timestamp: np.ndarray | None = field(default=None, kw_only=True)
    weight: Tensor | None = field(default=None, kw_only=True)
    unshown: int = field(default=0, kw_only=True)

    def __post_init__(self):
        if self.part not in PARTS:
            raise ValueError(f"part is {self.part!r}; expected one of {', '.join(PARTS)}")

    def __len__(self) -> int:
        return len(self.candidates)

    @property
    def shown(self) -> Tensor:
        """(lists, candidates) bool: False where padded."""
        return self.candidates >= 0

    def take(self, indices: Tensor | np.ndarray | Sequence[int]) -> Self:
        """The lists at these positions, in this order. indices: integers (not a mask), best on the host, as the ids
        are: a GPU would be waited for."""
        on_host, indices = _places(indices, "cpu").numpy(), _places(indices, self.candidates.device)

        def taken(value: Tensor | Bag | Match | np.ndarray | tuple[Bag, ...] | None) -> object:
            if value is None or isinstance(value, Bag | Match):
                return None if value is None else value.take(indices)
            if isinstance(value, tuple):
                return tuple(bag.take(indices) for bag in value)
            return value[on_host if isinstance(value, np.ndarray) else indices]

        return replace(
            self, **{f.name: taken(getattr(self, f.name)) for f in fields(self) if f.name not in self.SHARED}
        )


@dataclass(frozen=True)
class Intents(_Movable):
    """The knowledge base; row i of everything is row i of intents.parquet, which is what Lists.candidates points to.

    id          (intents,) 1 = unknown (never clicked in train), values from 2
    category    (intents,) 0 missing, 1 unknown (no intent of it was clicked in train), values from 2; missing is
                unknown too where every clicked intent had one
    words       Bag of hashed words of title and description, in the same buckets as the sessions' words
    valid_from  (intents,) datetime64[us], NaT: always
    """

    intent_id: np.ndarray
    valid_from: np.ndarray
    id: Tensor
    category: Tensor
    words: Bag

    def __len__(self) -> int:
        return len(self.id)

    def existing(self, timestamps: np.ndarray) -> np.ndarray:
        """(rows, intents) bool: the intent was in the KB at each of these times (rows,); without a date it always was.

        timestamps  datetime64, NaT where unknown: then every intent was
        """
        return ~(self.valid_from[None, :] > np.asarray(timestamps)[:, None])


@dataclass(frozen=True)
class QueryLists(Lists):
    """Impression lists whose sessions have a query embedding e_q, made by a reasoner.

    query  (lists, query_dim) float16 or float32: cast a batch (`.float()`) before use
    """

    query: Tensor


@dataclass(frozen=True)
class QueryIntents(Intents):
    """The knowledge base with each intent's text embedded by the same reasoner.

    text  (intents, query_dim) float16 or float32
    """

    text: Tensor


def with_queries(lists: Lists, query: Tensor | np.ndarray) -> QueryLists:
    """The lists with these query embeddings, row by row. Raises ValueError for another number of rows, NaN or inf."""
    return QueryLists(**_own(lists, Lists), query=_vectors(query, len(lists), "lists"))


def with_match(lists: Lists, match: Match | None) -> Lists:
    """The lists with these match terms, row by row. Raises ValueError for another number of rows, or infinity."""
    if match is not None and (match.values.ndim != 3 or len(match.values) != len(lists)):
        raise ValueError(f"match terms are {tuple(match.values.shape)}; expected ({len(lists)} lists, intents, terms)")
    if match is not None and match.values.isinf().any():
        raise ValueError("a match term is infinite; NaN stands for nothing to compare")
    return replace(lists, match=match)


def with_texts(intents: Intents, text: Tensor | np.ndarray) -> QueryIntents:
    """The intents with these text embeddings, row by row. Raises ValueError for another number of rows, NaN or inf."""
    return QueryIntents(**_own(intents, Intents), text=_vectors(text, len(intents), "intents"))


def concat_lists(parts: Sequence[Lists]) -> Lists:
    """The lists of several Lists of one part, one after the other, padded to the longest list.

    Queries are kept where all parts have them.
    """
    whole = Lists(
        part=parts[0].part,
        session_id=np.concatenate([lists.session_id for lists in parts]),
        user_id=np.concatenate([lists.user_id for lists in parts]),
        fields=torch.cat([lists.fields for lists in parts]),
        history=tuple(_concat_bags(bags) for bags in zip(*(lists.history for lists in parts), strict=True)),
        words=_concat_bags([lists.words for lists in parts]),
        candidates=concat_padded([lists.candidates for lists in parts], PADDING),
        clicked=concat_padded([lists.clicked for lists in parts], False),
        match=_concat_match([lists.match for lists in parts]),
    )
    if all(isinstance(lists, QueryLists) for lists in parts):
        return with_queries(whole, torch.cat([lists.query for lists in parts]))
    return whole


def clicks_of(parts: Sequence[Lists], intents: int) -> np.ndarray:
    """(intents,) how often each intent of the KB was clicked in these lists."""
    clicked = [lists.candidates[lists.clicked].numpy() for lists in parts]
    return np.bincount(np.concatenate([np.zeros(0, int), *clicked]), minlength=intents)


def listed_in(lists: Lists, intents: int) -> np.ndarray:
    """(intents,) bool: which intents of the KB are candidates in these lists."""
    return np.bincount(lists.candidates[lists.shown].numpy(), minlength=intents) > 0


def by_user(parts: Sequence[Lists]) -> pd.DataFrame:
    """What these lists have of each user, by user_id: columns clicks, impressions."""
    counts = [{"clicks": lists.clicked.sum(1).numpy(), "impressions": lists.shown.sum(1).numpy()} for lists in parts]
    users = np.concatenate([lists.user_id for lists in parts])
    return pd.concat(map(pd.DataFrame, counts)).groupby(pd.Index(users, name="user_id")).sum()


def concat_padded(tensors: Sequence[Tensor], value: int | bool) -> Tensor:
    """(lists of all, columns of the widest), narrower ones filled up on the right."""
    width = max(tensor.shape[1] for tensor in tensors)
    return torch.cat([torch.nn.functional.pad(t, (0, width - t.shape[1]), value=value) for t in tensors])


def concat_offsets(offsets: Sequence[Tensor]) -> Tensor:
    """Offsets of several Bags for their values laid end to end."""
    starts = np.cumsum([0, *(int(each[-1]) for each in offsets)]).tolist()
    return torch.cat([offsets[0][:1], *(each[1:] + start for each, start in zip(offsets, starts, strict=False))])


def _places(indices: Tensor | np.ndarray | Sequence[int], device: torch.device | str) -> Tensor:
    """Indices as torch wants them; what pandas lends is read-only, of which torch would warn."""
    return torch.as_tensor(indices if isinstance(indices, Tensor) else np.array(indices), device=device).long()


def _concat_bags(bags: Sequence[Bag]) -> Bag:
    return Bag(torch.cat([bag.values for bag in bags]), concat_offsets([bag.offsets for bag in bags]))


def _concat_match(parts: Sequence[Match | None]) -> Match | None:
    """Of lists laid end to end; None unless all have the same terms."""
    found = [match for match in parts if match is not None]
    if len(found) < len(parts) or len({match.names for match in found}) != 1:
        return None
    return Match(torch.cat([match.values for match in found]), found[0].names)


def _own(container: Lists | Intents, kind: type) -> dict:
    """The fields of `kind`, also where the container has more: new vectors replace those it had."""
    return {field.name: getattr(container, field.name) for field in fields(kind)}


def _vectors(values: Tensor | np.ndarray, rows: int, what: str) -> Tensor:
    values = torch.as_tensor(values)
    if values.ndim != 2 or len(values) != rows or not values.is_floating_point():
        raise ValueError(f"vectors are {values.dtype} {tuple(values.shape)}; expected floats ({rows} {what}, dim)")
    if not values.isfinite().all():
        raise ValueError(f"{int((~values.isfinite()).any(1).sum())} of {rows} {what} have a vector with NaN or inf")
    return values
