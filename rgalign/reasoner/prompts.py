"""Prompts: one class puts a session before a model, for embedding, sampling, tuning and pre-training alike.

prompter = Prompter(tokenizer, features=shown, kinds=dataset.kinds)
ids = prompter.sessions(dataset.sessions)

A prompt is head + body + tail. The body is tokenised field by field without special tokens, so that no customer can
write a token of the chat template; what is too long is truncated by one rule (`truncate`).
"""

from bisect import bisect_right
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain

import pandas as pd
import pyarrow as pa

from rgalign.data.features import column_of
from rgalign.data.schema import CHARACTERS_A_TOKEN, KINDS
from rgalign.errors import count_rows, nearest, safe_repr
from rgalign.reasoner import chat_template, verbalize
from rgalign.reasoner.chat_template import Frame, controls
from rgalign.reasoner.verbalize import LAYOUTS, FieldTemplate


@dataclass(frozen=True)
class TokenisedField:
    """A FieldTemplate in ids."""

    column: str
    kind: str
    prefix: list[int]
    units: list[list[int]]
    suffix: list[int]

    @property
    def ids(self) -> list[int]:
        """All ids in order."""
        return [*self.prefix, *(i for unit in self.units for i in unit), *self.suffix]


def truncate(fields: list[TokenisedField], budget: int) -> list[TokenisedField]:
    """The fields, in their order, truncated to at most `budget` ids together [C].

    First texts lose their ends, the longest one until it is no longer than the next, then both, and so on; a text of
    which nothing is left goes. Then the longest history loses its oldest entry, one at a time. Then the last features
    go.
    """
    fields = _truncate_texts(fields, budget)
    while _size(fields) > budget and any(field.kind == "history" for field in fields):
        longest = max((f for f in fields if f.kind == "history"), key=lambda field: len(field.ids))
        shorter = replace(longest, units=longest.units[1:])
        fields = [shorter if field is longest else field for field in fields]
        fields = [field for field in fields if field.units]
    while _size(fields) > budget:
        fields = fields[:-1]
    return fields


def _truncate_texts(fields: list[TokenisedField], budget: int) -> list[TokenisedField]:
    lengths = [sum(map(len, field.units)) for field in fields if field.kind == "text"]
    spare = budget - (_size(fields) - sum(lengths))
    if spare >= sum(lengths):
        return fields
    limits = range(max(lengths, default=0) + 1)  # of every text: the largest that keeps all within the budget
    limit = bisect_right(limits, spare, key=lambda limit: sum(min(length, limit) for length in lengths)) - 1
    if limit < 1:
        return [field for field in fields if field.kind != "text"]
    return [replace(f, units=[[*chain(*f.units)][:limit]]) if f.kind == "text" else f for f in fields]


def _size(fields: list[TokenisedField]) -> int:
    return sum(len(field.ids) for field in fields)


ASK = "<|ask|>"  # the tiny tokenizer's mark between a prompt and its query
PROMPT, PROMPT_QUERY = EMBEDS = ("prompt", "prompt_query")  # what is embedded (reasoner.embed)
QUESTION = "Question:"  # the same for a pretrained model without chat template [C]


class Prompter:
    """Makes prompts of sessions, KB intents and transcripts for one tokenizer.

    tokenizer    any tokenizer of transformers; it needs a pad token, and an end-of-text token where it is asked to ask
    features     columns shown, in this order; no other column of a session ever enters a prompt
    kinds        column -> categorical | numeric | text | history (dataset.yaml)
    layout       compact | lines (verbalize.py)
    instruction  what the model is asked to do; part of the head
    max_tokens   budget of a whole prompt
    max_new_tokens  most tokens of a query, its end token included, sampled or given
                 (reasoner.queries.max_new_tokens); None: as many as a prompt
    embed        prompt | prompt_query: what is embedded (reasoner.embed; METHOD.md 2.1)
    titles       intent_id -> title: entries of a history that are KB ids are shown by title
    ask          False for encoders: the body is between the tokenizer's own special tokens, and no query is asked for
    ends         ids with which the model ends what it writes, beside the tokenizer's own (Reasoner.ends)
    Raises ValueError naming all that is wrong.
    """

    head: tuple[int, ...]  # shared by all prompts: the chat template's beginning and the instruction
    tail: tuple[int, ...]  # asks for a query: a mark, or the template's generation prompt with thinking switched off
    again: tuple[int, ...]  # asks once more, behind a query (`asked_again`)
    end_id: int  # closes a given query: the chat template's own end of a turn, else the end of text
    ends: frozenset[int]  # any of them ends a sampled query

    def __init__(
        self,
        tokenizer,
        *,
        features: Sequence[str],
        kinds: Mapping[str, str],
        layout: str = "compact",
        instruction: str = "",
        max_tokens: int = 256,
        max_new_tokens: int | None = None,
        embed: str = "prompt",
        titles: Mapping[str, str] | None = None,
        ask: bool = True,
        ends: Collection[int] = (),
    ):
        self.tokenizer, self.features, self.kinds, self.layout = tokenizer, list(features), dict(kinds), layout
        self.max_tokens, self.titles, self.embed = max_tokens, titles, embed
        self.max_new_tokens = max_tokens if max_new_tokens is None else max_new_tokens
        errors = [*_feature_errors(self.features, self.kinds), *_tokenizer_errors(tokenizer, layout, ask)]
        errors += _embed_errors(embed, self.max_new_tokens, ask)
        if errors:
            raise ValueError("the prompt cannot be made:\n" + "\n".join(f"  {error}" for error in errors))
        self._controls = controls(tokenizer)
        frame = chat_template.frame(tokenizer) if ask else None
        self.end_id = next(i for i in (*self._turn_end(frame), *_ends(tokenizer)) if i is not None)
        self.ends = frozenset({self.end_id, tokenizer.eos_token_id, *ends} - {None})
        if layout == "compact":
            instruction = verbalize.compact_text(instruction)
        before, asked, after = self._frame_of(instruction, ask, frame)
        self._framing = [(before, "control"), (asked, "instruction")], [(after, "control")]
        self.head, self.tail = (*before, *asked), tuple(after)
        self.again = self._mark_again()
        self._budget = max_tokens - len(self.head) - len(self.tail)
        if self._budget < 1:
            taken = len(self.head) + len(self.tail)
            raise ValueError(
                f"max_tokens is {max_tokens}, but instruction and template alone take {taken}: nothing is left for "
                "the session; raise max_tokens or shorten the instruction"
            )

    def sessions(self, frame: pd.DataFrame) -> list[list[int]]:
        """Whole prompts, one a row, of at most max_tokens ids and at least one."""
        return self._prompts(self._session_fields(frame))

    def intents(self, frame: pd.DataFrame) -> list[list[int]]:
        """KB intents as prompts of title and description; without both, of the intent_id."""
        return self._prompts(verbalize.intent_fields(frame, layout=self.layout, characters=self._characters))

    def transcripts(
        self, frame: pd.DataFrame, sessions: pd.DataFrame | None = None
    ) -> tuple[list[list[int]], list[list[int]]]:
        """(prompts, queries) of the rows that have a query; queries close with end_id.

        A row's features are its map column `features`, in stored order; own columns that are not shown are left out,
        other shops' columns are shown. Without that column they are those of the session it names in `sessions`.
        Raises ValueError where neither is there, or a session is not.
        """
        frame = frame[frame["typed_query"].fillna("").str.strip() != ""]
        if "features" in frame:
            maps = column_of(frame, "features")
            how = dict(layout=self.layout, titles=self.titles, characters=self._characters)
            rows = verbalize.transcript_fields(maps, self.features, self.kinds, **how)
        else:
            rows = self._session_fields(sessions_of(frame, sessions))
        return self._prompts(rows), self.queries(frame["typed_query"].tolist())

    def queries(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of queries, end_id last; cut at the end, so that with it they have at most max_new_tokens ids."""
        return [[*query[: self.max_new_tokens - 1], self.end_id] for query in self._query_ids(texts)]

    def too_long(self, texts: Sequence[str]) -> int:
        """How many of these queries `queries` cuts."""
        return sum(len(query) > self.max_new_tokens - 1 for query in self._query_ids(texts))

    def asked_again(self, prompts: Sequence[Sequence[int]], texts: Sequence[str]) -> list[list[int]]:
        """Each prompt, its query without an end token, and the mark that asks for one again [C] (METHOD.md 2.1).

        The last state is one from which a query would be sampled, as in training. No loss trains the state of an end
        token: nothing follows it.
        """
        asked = zip(prompts, self._query_ids(texts), strict=True)
        return [[*prompt, *query[: self.max_new_tokens], *self.again] for prompt, query in asked]

    def embedded_intents(self, frame: pd.DataFrame) -> list[list[int]]:
        """What is embedded of KB intents: their prompts; with embed prompt_query each with its title (or, without one,
        its description) as the query, and the asking mark again."""
        prompts = self.intents(frame)
        return self.asked_again(prompts, intent_texts(frame)) if self.embed == PROMPT_QUERY else prompts

    def text(self, ids: Sequence[int]) -> str:
        """A sampled query as text: cut at the first end, special tokens left out, stripped."""
        ids = ids[: next((place for place, i in enumerate(ids) if i in self.ends), len(ids))]
        return self.tokenizer.decode([i for i in ids if i not in self._controls], skip_special_tokens=True).strip()

    def explain(self, row: pd.Series) -> pd.DataFrame:
        """One session's prompt by token: token, id, kind (instruction | name | value | text | control), column."""
        templates = self._session_fields(pd.DataFrame([row]))[0]
        tokenised = self._tokenised(templates)
        before, after = self._framing
        parts = [(ids, kind, None) for ids, kind in before]
        for field in truncate([tokenised[template] for template in templates], self._budget):
            value = "text" if field.kind == "text" else "value"
            parts += [(field.prefix, "name", field.column), *((unit, value, field.column) for unit in field.units)]
            parts.append((field.suffix, "control", field.column))
        parts += [(ids, kind, None) for ids, kind in after]
        rows = [(self.tokenizer.decode([i]), i, kind, column) for ids, kind, column in parts for i in ids]
        return pd.DataFrame(rows, columns=["token", "id", "kind", "column"])

    @property
    def _characters(self) -> int:
        return CHARACTERS_A_TOKEN * self.max_tokens

    def _session_fields(self, frame: pd.DataFrame) -> list[list[FieldTemplate]]:
        how = dict(layout=self.layout, titles=self.titles, characters=self._characters)
        return verbalize.session_fields(frame, self.features, self.kinds, **how)

    def _prompts(self, rows: list[list[FieldTemplate]]) -> list[list[int]]:
        tokenised = self._tokenised(chain(*rows))
        ids = {template: field.ids for template, field in tokenised.items()}
        prompts = []
        for row in rows:
            body = [i for template in row for i in ids[template]]
            if len(body) > self._budget:
                fields = truncate([tokenised[template] for template in row], self._budget)
                body = [i for field in fields for i in field.ids]
            prompts.append([*self.head, *body, *self.tail] or [self.end_id])
        return prompts

    def _tokenised(self, templates: Iterable[FieldTemplate]) -> dict[FieldTemplate, TokenisedField]:
        """Every different template tokenised once, every different string once."""
        different = dict.fromkeys(templates)
        strings = dict.fromkeys(part for t in different for part in (t.prefix, *t.units, t.suffix))
        ids = dict(zip(strings, self._encode(list(strings)), strict=True))
        return {
            t: TokenisedField(t.column, t.kind, ids[t.prefix], [ids[unit] for unit in t.units], ids[t.suffix])
            for t in different
        }

    def _query_ids(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of queries as they are, without an end; of a text of megabytes only the beginning is tokenised."""
        clean = verbalize.compact_text if self.layout == "compact" else verbalize.clean
        most = CHARACTERS_A_TOKEN * (self.max_new_tokens + 1)  # one token more, so that too long a query is noticed
        return self._encode([clean(str(text)[:most]) for text in texts])

    def _mark_again(self) -> tuple[int, ...]:
        """The tail; without a chat template on a line of its own, as behind a prompt's last line."""
        if self.layout == "compact" or getattr(self.tokenizer, "chat_template", None):
            return self.tail
        return (*self.tokenizer("\n", add_special_tokens=False)["input_ids"], *self.tail)

    def _encode(self, texts: list[str]) -> list[list[int]]:
        """Ids of data: special tokens are not parsed, and those that a vocabulary yields all the same are removed."""
        if not texts:
            return []
        plain = dict(add_special_tokens=False, split_special_tokens=True, return_attention_mask=False, verbose=False)
        found = self.tokenizer(texts, **plain)["input_ids"]
        return [ids if self._controls.isdisjoint(ids) else [i for i in ids if i not in self._controls] for ids in found]

    def _turn_end(self, frame: Frame | None) -> list[int]:
        """The token with which the chat template closes an answer (gemma's <end_of_turn>), which may not be the
        tokenizer's end of text: in a list, empty where there is none."""
        after = self.tokenizer(frame.closing, add_special_tokens=False)["input_ids"] if frame else []
        return [i for i in after if i in self._controls][:1]

    def _frame_of(self, instruction: str, ask: bool, frame: Frame | None) -> tuple[list[int], list[int], list[int]]:
        """Ids before the instruction, of the instruction, and after the body."""

        def control(text: str) -> list[int]:
            return list(self.tokenizer(text, add_special_tokens=False)["input_ids"]) if text else []

        asked = self._encode([instruction + ("\n" if self.layout == "lines" else "")])[0] if instruction else []
        if frame:
            return control(frame.before), asked, control(frame.opening)
        plain = list(self.tokenizer("a", add_special_tokens=False)["input_ids"])
        whole = list(self.tokenizer("a")["input_ids"])
        at = next((i for i in range(len(whole)) if whole[i : i + len(plain)] == plain), 0) if plain else 0
        if not ask:
            return whole[:at], asked, whole[at + len(plain) :]
        return whole[:at], asked, control(ASK if self.layout == "compact" else QUESTION)


def intent_texts(frame: pd.DataFrame) -> list[str]:
    """A KB intent as a query: its title; without one its description; without both nothing."""
    named = [frame[name].fillna("").astype(str) if name in frame else "" for name in ("title", "description")]
    title = pd.Series(named[0], index=frame.index, dtype=object)
    return title.where(title.str.strip() != "", named[1]).tolist()


def has_ask(tokenizer) -> bool:
    """Whether its vocabulary has the token ASK, as a tiny model's has; the compact layout needs it."""
    return tokenizer.convert_tokens_to_ids(ASK) not in (None, tokenizer.unk_token_id)


def _ends(tokenizer) -> tuple[int | None, ...]:
    return tokenizer.eos_token_id, tokenizer.sep_token_id, tokenizer.pad_token_id


def _feature_errors(features: list[str], kinds: dict[str, str]) -> list[str]:
    errors = [
        f"{safe_repr(name)} is no feature column{nearest(name, kinds)}"
        for name in dict.fromkeys(features)
        if name not in kinds
    ]
    doubled = [name for name in dict.fromkeys(features) if features.count(name) > 1]
    errors += [f"{safe_repr(name)} is shown {features.count(name)} times; once is enough" for name in doubled]
    wrong = {name: kinds[name] for name in features if kinds.get(name, KINDS[0]) not in KINDS}
    return errors + [
        f"{safe_repr(name)} has the kind {safe_repr(kind)}; expected {' | '.join(KINDS)}"
        for name, kind in wrong.items()
    ]


def _tokenizer_errors(tokenizer, layout: str, ask: bool) -> list[str]:
    errors = []
    if layout not in LAYOUTS:
        errors.append(f"layout is {safe_repr(layout)}; expected {' | '.join(LAYOUTS)}{nearest(layout, LAYOUTS)}")
    if tokenizer.pad_token_id is None:
        errors.append("the tokenizer has no pad token; batches cannot be padded (set tokenizer.pad_token)")
    if ask and tokenizer.eos_token_id is None:
        errors.append("the tokenizer has no end-of-text token; a query would never end (set tokenizer.eos_token)")
    if ask and layout == "compact" and not has_ask(tokenizer):
        errors.append(f"the tokenizer has no {ASK} token, which the compact layout asks by; use layout: lines")
    return errors


def _embed_errors(embed: str, max_new_tokens: int, ask: bool) -> list[str]:
    errors = [] if max_new_tokens > 0 else [f"max_new_tokens is {max_new_tokens}; expected 1 or more"]
    if embed not in EMBEDS:
        errors.append(f"embed is {safe_repr(embed)}; expected {' | '.join(EMBEDS)}{nearest(embed, EMBEDS)}")
    elif embed == PROMPT_QUERY and not ask:
        errors.append("embed is prompt_query; an encoder is asked nothing and writes no query: use embed prompt")
    return errors


def sessions_of(frame: pd.DataFrame, sessions: pd.DataFrame | None) -> pa.Table | pd.DataFrame:
    """The session of each transcript, in their order. Raises ValueError as `Prompter.transcripts` says."""
    if "session_id" not in frame or sessions is None:
        raise ValueError("transcripts need a column features, or a column session_id and the sessions it names")
    if (bare := frame["session_id"].isna().to_numpy()).any():
        what = count_rows(bare, "has neither features nor a session_id", "transcript")
        raise ValueError(f"{what}: it has no prompt; fill in either, or take these transcripts out")
    place = pd.Index(sessions["session_id"]).get_indexer(frame["session_id"])
    if (place < 0).any():
        missing = frame["session_id"][place < 0].iloc[0]
        raise ValueError(
            f"{(place < 0).sum()} transcripts name a session that is not there (first: {safe_repr(missing)})"
        )
    return sessions.iloc[place]
