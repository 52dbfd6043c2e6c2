"""Prompts: one class puts a session before a model, for embedding, sampling, tuning and pre-training alike.

A prompt is head + body + tail. The body is tokenised field by field without special tokens, so that no customer can
write a token of the chat template; what is too long is truncated by one rule (`truncate`)."""

from bisect import bisect_right
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any

import pandas as pd
import pyarrow as pa

from rgalign.data.features import Rows, column_of
from rgalign.data.schema import CHARACTERS_A_TOKEN, personal
from rgalign.errors import count_rows, nearest, safe_repr
from rgalign.params_schema import Reasoner
from rgalign.reasoner import chat_template, verbalize
from rgalign.reasoner.chat_template import Frame, controls, template_ids
from rgalign.reasoner.verbalize import FieldTemplate, Serialiser


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

    First the longest text loses its end until it is no longer than the next, then both, and so on; then the longest
    history its oldest entry, one at a time; then the last features go.
    """
    lengths = [sum(map(len, field.units)) for field in fields if field.kind == "text"]
    spare = budget - (_size(fields) - sum(lengths))
    if spare < sum(lengths):
        limits = range(max(lengths, default=0) + 1)  # of every text: the largest that keeps all within the budget
        limit = bisect_right(limits, spare, key=lambda limit: sum(min(length, limit) for length in lengths)) - 1
        kept = [field for field in fields if limit > 0 or field.kind != "text"]
        fields = [replace(f, units=[[*chain(*f.units)][:limit]]) if f.kind == "text" else f for f in kept]
    while _size(fields) > budget and any(field.kind == "history" for field in fields):
        longest = max((f for f in fields if f.kind == "history"), key=lambda field: len(field.ids))
        shorter = replace(longest, units=longest.units[1:])
        fields = [shorter if field is longest else field for field in fields]
        fields = [field for field in fields if field.units]
    while _size(fields) > budget:
        fields = fields[:-1]
    return fields


def _size(fields: list[TokenisedField]) -> int:
    return sum(len(field.ids) for field in fields)


ASK = "<|ask|>"  # the tiny tokenizer's mark between a prompt and its query
PROMPT, PROMPT_QUERY = "prompt", "prompt_query"  # what is embedded (reasoner.embed)
QUESTION = "Question:"  # the same for a pretrained model without chat template [C]


class Prompter:
    """Makes prompts of sessions, KB intents and transcripts for one tokenizer.

    tokenizer    any tokenizer of transformers; it needs a pad token, and an end-of-text token where it is asked to ask
    features     columns shown, in this order; no other column of a session ever enters a prompt
    kinds        column -> categorical | numeric | text | history (dataset.yaml)
    layout       compact | lines (verbalize.py)
    instruction  what the model is asked to do; part of the head
    max_tokens   budget of a whole prompt
    max_new_tokens  most tokens of a query, its end token included, sampled or given; None: as many as a prompt
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
        self.max_tokens, self.titles, self.embed = max_tokens, titles or {}, embed
        self._serialiser = Serialiser(layout, self.titles, CHARACTERS_A_TOKEN * max_tokens)
        self.max_new_tokens = max_tokens if max_new_tokens is None else max_new_tokens
        _check_tokenizer(tokenizer, layout, ask)
        self._controls = controls(tokenizer)
        frame = chat_template.frame(tokenizer) if ask else None
        # the token with which the template closes an answer may not be the end of text (gemma's <end_of_turn>)
        closing = [i for i in template_ids(tokenizer, frame.closing) if i in self._controls] if frame else []
        ends_of_text = tokenizer.eos_token_id, tokenizer.sep_token_id, tokenizer.pad_token_id
        self.end_id = next(i for i in (*closing, *ends_of_text) if i is not None)
        self.ends = frozenset({self.end_id, tokenizer.eos_token_id, *ends} - {None})
        if layout == "compact":
            instruction = verbalize.compact_text(instruction)
        before, asked, after = self._frame_of(instruction, ask, frame)
        self._framing = [(before, "control"), (asked, "instruction")], [(after, "control")]
        self.head, self.tail = (*before, *asked), tuple(after)
        templated = layout == "compact" or getattr(tokenizer, "chat_template", None)
        # without a template on a line of its own, as behind a prompt's last line
        self.again = self.tail if templated else (*template_ids(tokenizer, "\n"), *self.tail)
        self._budget = max_tokens - len(self.head) - len(self.tail)
        if self._budget < 1:
            taken = len(self.head) + len(self.tail)
            raise ValueError(
                f"max_tokens is {max_tokens}, but instruction and template alone take {taken}: nothing is left for "
                "the session; raise max_tokens or shorten the instruction"
            )

    def sessions(self, frame: Rows) -> list[list[int]]:
        """Whole prompts, one a row, of at most max_tokens ids and at least one."""
        return self._prompts(self._serialiser.sessions(frame, self.features, self.kinds))

    def intents(self, frame: pd.DataFrame) -> list[list[int]]:
        """KB intents as prompts of title and description; without both, of the intent_id."""
        return self._prompts(self._serialiser.intents(frame))

    def transcripts(
        self, frame: pd.DataFrame, sessions: pd.DataFrame | None = None
    ) -> tuple[list[list[int]], list[list[int]]]:
        """(prompts, queries) of the rows that have a query; queries close with end_id.

        A row's features are its map column `features` (Serialiser.transcripts), or, without that column, those of the
        session it names in `sessions`. Raises ValueError where neither is there.
        """
        frame = frame[frame["typed_query"].fillna("").str.strip() != ""]
        if "features" in frame:
            rows = self._serialiser.transcripts(column_of(frame, "features"), self.features, self.kinds)
        else:
            rows = self._serialiser.sessions(sessions_of(frame, sessions), self.features, self.kinds)
        return self._prompts(rows), self.queries(frame["typed_query"].tolist())

    def queries(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of queries, end_id last; cut at the end, so that with it they have at most max_new_tokens ids."""
        return [[*query[: self.max_new_tokens - 1], self.end_id] for query in self._query_ids(texts)]

    def too_long(self, texts: Sequence[str]) -> int:
        """How many of these queries `queries` cuts."""
        return sum(len(query) > self.max_new_tokens - 1 for query in self._query_ids(texts))

    def asked_again(self, prompts: Sequence[Sequence[int]], texts: Sequence[str]) -> list[list[int]]:
        """Each prompt, its query without an end token (no loss trains its state), and the mark that asks for one again
        [C] (METHOD.md 2.1)."""
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
        templates = self._serialiser.sessions(pd.DataFrame([row]), self.features, self.kinds)[0]
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

    def _encode(self, texts: list[str]) -> list[list[int]]:
        """Ids of data: special tokens are not parsed, and those that a vocabulary yields all the same are removed."""
        if not texts:
            return []
        plain = dict(add_special_tokens=False, split_special_tokens=True, return_attention_mask=False, verbose=False)
        found = self.tokenizer(texts, **plain)["input_ids"]
        return [ids if self._controls.isdisjoint(ids) else [i for i in ids if i not in self._controls] for ids in found]

    def _frame_of(self, instruction: str, ask: bool, frame: Frame | None) -> tuple[list[int], list[int], list[int]]:
        """Ids before the instruction, of the instruction, and after the body."""
        asked = self._encode([instruction + ("\n" if self.layout == "lines" else "")])[0] if instruction else []
        if frame:
            return template_ids(self.tokenizer, frame.before), asked, template_ids(self.tokenizer, frame.opening)
        plain, whole = template_ids(self.tokenizer, "a"), list(self.tokenizer("a")["input_ids"])
        at = next((i for i in range(len(whole)) if whole[i : i + len(plain)] == plain), 0) if plain else 0
        mark = template_ids(self.tokenizer, ASK if self.layout == "compact" else QUESTION)
        return whole[:at], asked, mark if ask else whole[at + len(plain) :]


def intent_texts(frame: pd.DataFrame) -> list[str]:
    """A KB intent as a query: its title; without one its description; without both nothing."""
    named = [frame[name].fillna("").astype(str) if name in frame else "" for name in ("title", "description")]
    title = pd.Series(named[0], index=frame.index, dtype=object)
    return title.where(title.str.strip() != "", named[1]).tolist()


def has_ask(tokenizer) -> bool:
    """Whether its vocabulary has the token ASK, as a tiny model's has; the compact layout needs it."""
    return tokenizer.convert_tokens_to_ids(ASK) not in (None, tokenizer.unk_token_id)


def _check_tokenizer(tokenizer, layout: str, ask: bool) -> None:
    errors = []
    if tokenizer.pad_token_id is None:
        errors.append("the tokenizer has no pad token; batches cannot be padded (set tokenizer.pad_token)")
    if ask and tokenizer.eos_token_id is None:
        errors.append("the tokenizer has no end-of-text token; a query would never end (set tokenizer.eos_token)")
    if ask and layout == "compact" and not has_ask(tokenizer):
        errors.append(f"the tokenizer has no {ASK} token, which the compact layout asks by; use layout: lines")
    if errors:
        raise ValueError("the prompt cannot be made:\n  " + "\n  ".join(errors))


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


# The prompter that a run's params ask for: one place, so that every stage and `score` read alike.

TINY = "tiny"
NEVER_ASKED = (  # what is wrong, and what to change
    "this data set has no transcripts: the tiny LM has never seen a question, and what it writes repeats the columns",
    "set alignment.sft.use and alignment.dpo.use to false, or give transcripts",
)
INSTRUCTION = (  # [C]: the paper shows no prompt
    "A customer opens the support chat of a shop and has not typed anything yet. From what the shop knows about her, "
    "write the one question she is about to ask, in her own words."
)


def shown_features(
    named: Sequence[str] | None, meta: Mapping[str, Any], drop: Sequence[str] = (), *, texts: bool = True
) -> list[str]:
    """Feature columns that a prompt shows, in order: what `reasoner.features` names, else the data set's own choice
    without its personal columns, which are shown only where `reasoner.features` names them.

    named  reasoner.features; meta  dataset.yaml's; drop  data.features.drop: never shown
    texts  False leaves out the columns of kind text (the control qe_rec/no_text)
    Raises ValueError naming every unknown column and where none is left.
    """
    kinds = meta["features"]
    names = list(named if named is not None else meta.get("prompt_features") or kinds)
    if unknown := [name for name in names if name not in kinds]:
        lines = "\n".join(f"  {safe_repr(name)}{nearest(name, kinds)}" for name in unknown)
        where = "dataset.yaml prompt_features" if named is None else "reasoner.features"
        raise ValueError(f"{where} names what is no feature column:\n{lines}")
    if doubled := [name for name in dict.fromkeys(names) if names.count(name) > 1]:
        raise ValueError(f"{', '.join(map(safe_repr, doubled))}: shown more than once; once is enough")
    private = personal(names) if named is None else []
    shown = [name for name in names if name not in (*drop, *private) and (texts or kinds[name] != "text")]
    if not shown and texts:
        why = f" ({', '.join(private)} are personal: shown where reasoner.features lists them)" if private else ""
        raise ValueError(f"reasoner.features and data.features.drop leave no column to show to the reasoner{why}")
    return shown


def prompter(
    settings: Reasoner,
    meta: Mapping[str, Any],
    intents: pd.DataFrame,
    tokenizer,
    *,
    drop: Sequence[str] = (),
    texts: bool = True,
    embed: str | None = None,
    ends: Collection[int] = (),
    positions: int | None = None,
) -> Prompter:
    """The prompter of one of a run's models, for its tokenizer. Arguments as in `shown_features`.

    embed            prompt | prompt_query, for a control; None: reasoner.embed
    ends, positions  the model's own (Reasoner)
    Raises ValueError with Prompter's errors, and where prompt and query are longer than the model's positions.
    """
    own = has_ask(tokenizer)
    instruction = settings.instruction
    if instruction is None:  # the tiny model knows no words but the shop's; an embedder is told nothing
        instruction = "" if own or settings.kind == "encoder" else INSTRUCTION
    made = Prompter(
        tokenizer,
        features=shown_features(settings.features, meta, drop, texts=texts),
        kinds=meta["features"],
        layout="compact" if own else "lines",
        instruction=instruction,
        max_tokens=settings.max_tokens,
        max_new_tokens=settings.queries.max_new_tokens,
        embed=settings.embed if embed is None else embed,
        titles=dict(zip(intents["intent_id"], intents["title"].fillna(""), strict=True)),
        ask=settings.kind == "causal",
        ends=ends,
    )
    if positions is not None:
        _check_positions(made, settings.kind == "causal", positions)
    return made


def _check_positions(made: Prompter, writes: bool, positions: int) -> None:
    """Raises ValueError where prompt, query and a repeated asking mark do not fit into the model's positions."""
    parts = {"reasoner.max_tokens": made.max_tokens}
    if writes:
        parts["reasoner.queries.max_new_tokens"] = made.max_new_tokens
    if made.embed != PROMPT:
        parts["the asking mark again (reasoner.embed)"] = len(made.again)
    together = sum(parts.values())
    if together > positions:
        asked = ", ".join(f"{name} {count}" for name, count in parts.items()).replace(" ", " is ", 1)
        asked += f": {together} together" if len(parts) > 1 else ""
        raise ValueError(
            f"{asked}; the model can read {positions} tokens at most: lower max_tokens to "
            f"{positions - together + made.max_tokens}"
        )
