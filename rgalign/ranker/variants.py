"""The one list of rankers that can be trained: the models of the study and their controls.

QE-Rec reads the same features as its control two_tower_text, the hashed words among them, and the vectors besides [C].
three_tower_no_query is QE-Rec without the session's vector, tuned as a model of its own: what the architecture and the
intents' vectors are worth. qe_rec/constant_query is the same model with QE-Rec's settings.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Variant:
    """What sets a ranker apart from the others; all else is settings.

    against  the model it is compared with: for a control its parent, so that the difference is what is controlled
    words    the hashed words of session and intent texts are read
    vectors  which vectors of sessions and intents are read; None: none
               prompt        the language model's state at the end of what reasoner.embed names (METHOD.md 2.1)
               prompt_alone  that of the prompt, whatever reasoner.embed says
               prompt_query  that of prompt, written query and the asking mark again, whatever reasoner.embed says
               random_lm     the same model before any training
               no_text       prompts without the text fields
               kb_lm         a model pre-trained on the knowledge base's text alone
               lsa           TF-IDF and singular vectors of the same texts: no language model
               mean          mean over the prompt's states instead of the last one
               aligned       as prompt, of the aligned model
    chats    the chats that the language model learns from are learnt before the clicks (ranker.chats)
    query    own: each session has its own vector; constant: all have the mean of train; shuffled: another session's
    """

    architecture: Literal["two_tower", "three_tower"]
    against: str
    words: bool
    vectors: str | None = None
    query: Literal["own", "constant", "shuffled"] = "own"
    chats: bool = False


VARIANTS = {
    "two_tower": Variant("two_tower", "popularity", words=False),
    "two_tower_text": Variant("two_tower", "two_tower", words=True),
    "two_tower_text/lm_features": Variant("two_tower", "two_tower_text", words=True, vectors="mean"),
    "two_tower_text/chats": Variant("two_tower", "two_tower_text", words=True, chats=True),
    "three_tower_no_query": Variant("three_tower", "two_tower_text", words=True, vectors="prompt", query="constant"),
    "qe_rec": Variant("three_tower", "two_tower_text", words=True, vectors="prompt"),
    "qe_rec/no_words": Variant("three_tower", "qe_rec", words=False, vectors="prompt"),
    "qe_rec/prompt": Variant("three_tower", "qe_rec", words=True, vectors="prompt_alone"),
    "qe_rec/prompt_query": Variant("three_tower", "qe_rec", words=True, vectors="prompt_query"),
    "qe_rec/random_lm": Variant("three_tower", "qe_rec", words=True, vectors="random_lm"),
    "qe_rec/no_text": Variant("three_tower", "qe_rec", words=True, vectors="no_text"),
    "qe_rec/kb_lm": Variant("three_tower", "qe_rec", words=True, vectors="kb_lm"),
    "qe_rec/lsa": Variant("three_tower", "qe_rec", words=True, vectors="lsa"),
    "qe_rec/constant_query": Variant("three_tower", "qe_rec", words=True, vectors="prompt", query="constant"),
    "qe_rec/shuffled_query": Variant("three_tower", "qe_rec/constant_query", True, "prompt", "shuffled"),
    "rgalign_rec": Variant("three_tower", "qe_rec", words=True, vectors="aligned"),  # trained by notebook 08
}


def pairs(models: Sequence[str], simple: str | None = None) -> list[tuple[str, str]]:
    """(model, against) for each of `models`, in order; against popularity where its counterpart is not trained.

    QE-Rec is compared with three_tower_no_query too, where it is trained: the difference is what e_q adds.
    simple  the best model without training (results.best_untrained): both of the headline are compared with it too
    """
    found = [(name, own if (own := VARIANTS[name].against) in models else "popularity") for name in models]
    if {"qe_rec", "three_tower_no_query"} <= {*models}:  # before its own pair, which stays the headline
        found.insert([name for name, _ in found].index("qe_rec"), ("qe_rec", "three_tower_no_query"))
    more = [(name, simple) for name in reversed(headline(models)) if name in VARIANTS] if simple else []
    return [*found, *(pair for pair in more if pair not in found)]


def reader_of_prompts(models: Sequence[str]) -> str | None:
    """The first of VARIANTS among `models` that reads each session's own prompt vector; None where none does.

    What the main language model writes for a session (IHR) is a property of that model, and is listed with this reader.
    """
    return next((n for n, v in VARIANTS.items() if n in models and (v.vectors, v.query) == ("prompt", "own")), None)


def headline(models: Sequence[str]) -> tuple[str, str]:
    """The pair that a notebook looks into: of the last model that is no control."""
    found = pairs(models)
    return next((pair for pair in reversed(found) if "/" not in pair[0]), found[-1])
