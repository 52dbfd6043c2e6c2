"""The one list of rankers that can be trained: the models of the study and their controls.

QE-Rec reads the same features as its control two_tower_text, the hashed words among them, and the vectors besides [C].
three_tower_no_query is QE-Rec without the session's vector, tuned as a model of its own: what the architecture and the
intents' vectors are worth. qe_rec/constant_query is the same model with QE-Rec's settings.

params_schema reads this list, so it imports nothing of the package.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Variant:
    """What distinguishes a ranker from the others; all else is settings.

    label         how tables and figures call it
    architecture  a name of ranker.store.ARCHITECTURES
    against       the model it is compared with: for a control its parent, so that the difference is what is controlled
    words         the hashed words of session and intent texts are read
    vectors       which vectors of sessions and intents are read; None: none
                    prompt        the language model's state at the end of what reasoner.embed names (METHOD.md 2.1)
                    prompt_alone  that of the prompt, whatever reasoner.embed says
                    prompt_query  that of prompt, written query and the ask token repeated, whatever reasoner.embed says
                    random_lm     the same model before any training
                    no_text       prompts without the text fields
                    kb_lm         a model pre-trained on the knowledge base's text alone
                    lsa           TF-IDF and singular vectors of the same texts: no language model
                    mean          mean over the prompt's states instead of the last one
                    aligned       as prompt, of the aligned model
    query         own: each session has its own vector; constant: all have the mean of train; shuffled: another
                  session's
    match         which of the run's match terms are read (ranker.match): all; words: word_overlap alone; shuffled: all,
                  of another session (the placebo); none; unwritten: all but those of written queries; shuffled_written:
                  these of another session. A control of the vectors reads words alone: the other terms
                  compare the main model's vectors
    chats         the chats that the language model learns from are learnt before the clicks (ranker.chats)
    in_params     it can be named in ranker.models; False: notebook 08 trains it
    """

    label: str
    architecture: str
    against: str
    words: bool
    vectors: str | None = None
    query: Literal["own", "constant", "shuffled"] = "own"
    match: Literal["all", "words", "shuffled", "none", "unwritten", "shuffled_written"] = "none"
    chats: bool = False
    in_params: bool = True


def _qe_rec(label: str, vectors: str = "prompt", *, words: bool = True, query="own", against: str = "qe_rec", **more):
    more.setdefault("match", "all" if (vectors.startswith(("prompt", "aligned")), query) == (True, "own") else "words")
    return Variant(label, "three_tower", against, words, vectors, query, **more)


RANKERS = {
    "two_tower": Variant("two-tower, ids only", "two_tower", "popularity", words=False),
    "two_tower_text": Variant("two-tower + text", "two_tower", "two_tower", words=True),
    "two_tower_text/lm_features": Variant("two-tower + text + frozen LM", "two_tower", "two_tower_text", True, "mean"),
    "two_tower_text/chats": Variant(
        "two-tower + text + chats, no LM", "two_tower", "two_tower_text", words=True, chats=True
    ),
    "two_tower_text/word_match": Variant(
        "two-tower + text + word overlap", "two_tower", "two_tower_text", words=True, match="words"
    ),
    "three_tower_no_query": _qe_rec("three-tower without a query", query="constant", against="two_tower_text"),
    "qe_rec": _qe_rec("QE-Rec", against="two_tower_text"),
    "qe_rec/no_match": _qe_rec("QE-Rec without match terms", match="none"),
    "qe_rec/no_written_match": _qe_rec("QE-Rec, its match terms without the written queries", match="unwritten"),
    "qe_rec/shuffled_written_match": _qe_rec("QE-Rec, written queries of another session", match="shuffled_written"),
    "qe_rec/word_match": _qe_rec("QE-Rec, word overlap its one match term", match="words"),
    "qe_rec/shuffled_match": _qe_rec("QE-Rec, match terms of another session", match="shuffled"),
    "qe_rec/no_words": _qe_rec("QE-Rec without the hashed words", words=False),
    "qe_rec/prompt": _qe_rec("QE-Rec, embedding the prompt", "prompt_alone"),
    "qe_rec/prompt_query": _qe_rec("QE-Rec, embedding prompt + query", "prompt_query"),
    "qe_rec/random_lm": _qe_rec("QE-Rec, LM not trained", "random_lm"),
    "qe_rec/no_text": _qe_rec("QE-Rec, prompt without text", "no_text"),
    "qe_rec/kb_lm": _qe_rec("QE-Rec, LM trained on the KB alone", "kb_lm"),
    "qe_rec/lsa": _qe_rec("QE-Rec, LSA for the LM", "lsa"),
    "qe_rec/constant_query": _qe_rec("QE-Rec, constant query", query="constant"),
    "qe_rec/shuffled_query": _qe_rec("QE-Rec, shuffled queries", query="shuffled", against="qe_rec/constant_query"),
    "rgalign_rec": _qe_rec("RGAlign-Rec", "aligned", in_params=False),
}
# The models that need no training, as tables and figures call them; ranker.match has their scores.
UNTRAINED = {
    "popularity": "popularity",
    "word_overlap": "word overlap (TF-IDF cosine)",
    "raw_cosine": "cosine of the raw vectors",
}


def pairs(models: Sequence[str], simple: str | None = None) -> list[tuple[str, str]]:
    """(model, against) for each of `models`, in order; against popularity where its counterpart is not trained.

    QE-Rec is compared with three_tower_no_query too, where it is trained: the difference is what e_q adds.
    RGAlign-Rec is compared with two_tower_text too, the strongest model without a language model.
    simple  the best model without training (results.best_untrained): both of the headline are compared with it too
    """
    found = [(name, own if (own := RANKERS[name].against) in models else "popularity") for name in models]
    if {"qe_rec", "three_tower_no_query"} <= {*models}:  # before its own pair, which stays the headline
        found.insert([name for name, _ in found].index("qe_rec"), ("qe_rec", "three_tower_no_query"))
    if {"rgalign_rec", "two_tower_text"} <= {*models}:  # before its own pair, which stays the headline
        found.insert([name for name, _ in found].index("rgalign_rec"), ("rgalign_rec", "two_tower_text"))
    more = [(name, simple) for name in reversed(headline(models)) if name in RANKERS] if simple else []
    return [*found, *(pair for pair in more if pair not in found)]


def reader_of_prompts(models: Sequence[str]) -> str | None:
    """The first of RANKERS among `models` that reads each session's own prompt vector; None if there is none.

    What the main language model writes for a session (IHR) is a property of that model, and is listed with this reader.
    """
    return next((n for n, v in RANKERS.items() if n in models and (v.vectors, v.query) == ("prompt", "own")), None)


def headline(models: Sequence[str]) -> tuple[str, str]:
    """The pair that a notebook looks into: of the last model that is no control."""
    found = pairs(models)
    return next((pair for pair in reversed(found) if "/" not in pair[0]), found[-1])
