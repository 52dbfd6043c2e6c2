"""From a run's params to a prompter and to models: one place, so that every stage and `score` read alike."""

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import pandas as pd

from rgalign.data.schema import personal
from rgalign.errors import nearest, safe_repr
from rgalign.params_schema import Reasoner
from rgalign.reasoner.prompts import PROMPT, Prompter, has_ask

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
    without its personal columns (data.personal): only who names one in `reasoner.features` shows it.

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
    The layout is the tokenizer's affair: a run may have tiny models beside pretrained ones. Raises ValueError with
    Prompter's errors, and where prompt and query are longer than the model's positions.
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
