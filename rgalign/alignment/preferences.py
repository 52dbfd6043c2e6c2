"""Preference data: the best of N for RG-SFT, best against worse for RG-DPO (METHOD.md 2.3, step 2).

`scored` is always candidates (alignment.candidates) with a column `reward` (reward.score_candidates).
"""

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd

from rgalign.alignment.candidates import assert_sessions_of, nonempty
from rgalign.alignment.context import Context
from rgalign.alignment.objectives import LIST_OBJECTIVES
from rgalign.data.lists import Lists
from rgalign.reasoner.model import Reasoner
from rgalign.reasoner.prompts import Prompter
from rgalign.seeding import derived

COLUMNS = [
    *("prompt", "chosen", "rejected", "reward_chosen", "reward_rejected", "source_chosen", "source_rejected"),
    "session_id",  # TRL leaves it alone
]
BETWEEN = ["between", "reward_between"]  # of lists: texts and rewards of the queries between chosen and rejected


def best_queries(context: Context, scored: pd.DataFrame) -> pd.DataFrame:
    """RG-SFT's targets: one query a session of train's part (`best_of_n`). Candidates of other sessions are ignored."""
    settings, lists = context.params.alignment.sft, context.clicked_lists
    seed = derived(context.params.run.seed, "best of n")
    scored = scored[scored["session_id"].isin(lists.session_id.tolist())]
    return best_of_n(scored, train=lists, select=settings.select, min_reward=settings.min_reward, seed=seed)


def best_of_n(
    scored: pd.DataFrame, *, train: Lists, select: str = "best", min_reward: float | None = None, seed: int
) -> pd.DataFrame:
    """One row of `scored` a session: what RG-SFT learns to write. Empty queries and those without a reward are ignored.

    train       the lists whose sessions these must be: development users and other parts are refused
    select      best: the highest reward, the first of equal ones; random: as likely as it was sampled, the control
                with as much data and without rewards [C]
    min_reward  nats; sessions whose best query is below are left out, whatever is selected, so that the control learns
                from the same sessions; None: none is left out
    Sessions keep their order. Raises ValueError.
    """
    assert_sessions_of("best_of_n", scored["session_id"], train=train)
    kept = scored[nonempty(scored) & scored["reward"].notna()].reset_index(drop=True)
    if min_reward is not None:
        best = kept.groupby("session_id")["reward"].transform("max")
        kept = kept[best >= min_reward].reset_index(drop=True)
    value = kept["reward"]
    if select == "random":  # of exponential waiting times, the first to end is i in proportion to its rate
        value = -np.random.default_rng(seed).exponential(size=len(kept)) / kept["count"]
    first = value.groupby(kept["session_id"], sort=False).idxmax()
    return kept.loc[first].reset_index(drop=True)


def preference_pairs(context: Context, start: Reasoner, scored: pd.DataFrame) -> tuple[pd.DataFrame, pd.DataFrame]:
    """RG-DPO's pairs for this reasoner, or a list objective's lists, and what each filter left (`pairs`); of none where
    the step is switched off. Other sessions' candidates are ignored."""
    settings, lists = context.params.alignment.dpo, context.clicked_lists
    if not settings.use:
        return no_pairs()
    scored = scored[scored["session_id"].isin(lists.session_id.tolist())]
    prompter, prompts = context.recipe.prompter(context.shop, start), context.prompts_by_session(start)
    how = {"min_margin": settings.min_margin, "margin_quantile": settings.margin_quantile}
    how |= {"size": settings.list_size} if settings.objective in LIST_OBJECTIVES else {}
    return pairs(scored, prompts, prompter, train=lists, **how)


def no_pairs() -> tuple[pd.DataFrame, pd.DataFrame]:
    """The empty tables of `preference_pairs`, where the step is switched off."""
    return pd.DataFrame(columns=COLUMNS), pd.DataFrame(columns=["filter", "of", "left"])


def no_reference() -> pd.DataFrame:
    """The empty table of dpo.reference_log_probabilities."""
    return pd.DataFrame(columns=["reference_chosen", "reference_rejected", "checkpoint", "pairs"])


def pairs(
    scored: pd.DataFrame,
    prompts: Mapping[str, Sequence[int]],
    prompter: Prompter,
    *,
    train: Lists,
    min_margin: float = 0.0,
    margin_quantile: float = 0.5,
    size: int | None = None,
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Preference pairs (COLUMNS), a session's best query against its worst, and what each filter left.

    prompts          session_id -> token ids;  prompter: of the model to be aligned: queries of the same tokens are one
                     query, whose best reward counts
    train            the lists whose sessions these must be: development users and other parts are refused
    min_margin       nats; a pair's margin exceeds it [C]
    margin_quantile  of all margins so far; pairs below are left out; 0.5: the upper half stays [C]
    size             None: pairs; of lists: queries of a session at most, so many less two in the columns BETWEEN, at
                     ranks evenly between best and worst
    Columns of the second: filter, of (queries | pairs), left.
    `prompt` is text from which `prompter`'s tokenizer makes the prompt's ids again (`prompt_text`); chosen and rejected
    are the queries as written. Raises ValueError for sessions without a prompt.
    """
    assert_sessions_of("pairs", scored["session_id"], train=train)
    if missing := [session for session in scored["session_id"].unique() if session not in prompts]:
        raise ValueError(f"no pairs can be made: {len(missing)} sessions have no prompt (first: {missing[0]!r})")
    left = [("written", "queries", len(scored))]
    kept = scored[nonempty(scored)]
    ids = kept["query"].map({text: tuple(prompter.queries([text])[0]) for text in kept["query"].unique()})
    kept = kept[ids.map(len) > 1]  # one token: the end
    left.append(("not empty", "queries", len(kept)))
    kept = kept[kept["reward"].notna()]
    left.append(("session has a click", "queries", len(kept)))
    ranked = kept.assign(ids=ids[kept.index]).sort_values("reward", ascending=False, kind="stable")
    kept = kept[~ranked.duplicated(["session_id", "ids"])[kept.index]]
    left.append(("different in its session", "queries", len(kept)))
    found = _best_and_worst(kept, size)
    left.append(("best against worst", "pairs", len(found)))
    margin = found["reward_chosen"] - found["reward_rejected"]
    found, margin = found[margin > min_margin], margin[margin > min_margin]
    left.append((f"margin over {min_margin:g}", "pairs", len(found)))
    if len(found):
        found = found[margin >= np.quantile(margin, margin_quantile)]
    left.append((f"margin from quantile {margin_quantile:g}", "pairs", len(found)))
    texts = {session: prompt_text(prompter, prompts[session]) for session in found["session_id"].unique()}
    columns = COLUMNS if size is None else [*COLUMNS, *BETWEEN]
    found = found.assign(prompt=found["session_id"].map(texts))[columns].reset_index(drop=True)
    return found, pd.DataFrame(left, columns=["filter", "of", "left"])


def _best_and_worst(kept: pd.DataFrame, size: int | None) -> pd.DataFrame:
    """A row a session with two queries or more: its best (the first of equals) and its worst (the last of equals); with
    a size, the columns BETWEEN too."""
    ranked = kept.assign(session=pd.factorize(kept["session_id"])[0])
    ranked = ranked.sort_values(["session", "reward"], ascending=[True, False], kind="stable")
    rank = ranked.groupby("session").cumcount()
    last = ranked.groupby("session")["reward"].transform("size") - 1
    worst = ranked[(rank == last) & (last > 0)]
    found = worst.merge(ranked[rank == 0], on=["session", "session_id"], suffixes=("_rejected", "_chosen"))
    found = found.rename(columns={"query_chosen": "chosen", "query_rejected": "rejected"})
    if size is None:
        return found
    lists = {session: (own["query"].tolist(), own["reward"].tolist()) for session, own in ranked.groupby("session")}
    for name, part in zip(BETWEEN, (0, 1), strict=True):
        own = [lists[session][part] for session in found["session"]]
        found[name] = [[values[place] for place in _places(len(values), size)[1:-1]] for values in own]
    return found


def _places(count: int, size: int) -> list[int]:
    """Ranks of at most `size` of so many queries, the best and the worst among them, evenly apart."""
    return np.linspace(0, count - 1, min(count, size)).round().astype(int).tolist()


def prompt_text(prompter: Prompter, ids: Sequence[int]) -> str:
    """A prompt as text, control tokens included, for a library that tokenises by itself: the same ids again, unless a
    customer wrote out a control token. A begin token that the tokenizer adds to every text is left out.
    """
    tokenizer = prompter.tokenizer
    added = tokenizer("")["input_ids"][:1]
    ids = ids[1:] if added and added == list(ids[:1]) else ids
    return tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
