"""The tiny model's tokenizer: one token a word, one token a feature value, built deterministically.

Training BPE is not deterministic over runs (threads; a silent mismatch cost 0.01 GAUC), counting words is.
"""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

import pandas as pd
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import PreTrainedTokenizerFast

from rgalign.data.features import column_of
from rgalign.reasoner import verbalize
from rgalign.reasoner.prompts import ASK
from rgalign.reasoner.verbalize import FieldTemplate

PAD, UNKNOWN, END = "<|pad|>", "<|unk|>", "<|end|>"


def build(counts: Mapping[str, int], *, min_count: int = 2) -> PreTrainedTokenizerFast:
    """A word-level tokenizer of the words seen at least `min_count` times, by falling count, then by name.

    Special tokens have the first ids: pad, unknown, ask, end. The same counts give the same files.
    Raises ValueError where no word is left.
    """
    kept = sorted((-count, word) for word, count in counts.items() if count >= min_count)
    if not kept:
        raise ValueError(f"none of {len(counts)} words was seen {min_count} times: there is no vocabulary to build")
    words = dict.fromkeys([PAD, UNKNOWN, ASK, END, *(word for _, word in kept)])
    vocabulary = {word: number for number, word in enumerate(words)}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token=UNKNOWN))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    special = dict(pad_token=PAD, unk_token=UNKNOWN, eos_token=END, additional_special_tokens=[ASK])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, clean_up_tokenization_spaces=False, **special)


def count_words(
    *,
    features: Sequence[str],
    kinds: Mapping[str, str],
    intents: pd.DataFrame,
    sessions: pd.DataFrame | None = None,
    transcripts: pd.DataFrame | None = None,
) -> Counter[str]:
    """Words of the KB, of training sessions and of transcripts as compact prompts put them, with their counts.

    A word of the KB counts twice: an intent's title may stand in no transcript and must still have its tokens.
    Raises ValueError for sessions of another split than train.
    """
    counts: Counter[str] = Counter()
    titles = dict(zip(intents["intent_id"], intents["title"].fillna(""), strict=True))
    put = dict(layout="compact", titles=titles)
    _add(counts, verbalize.intent_fields(intents, layout="compact") * 2)
    if sessions is not None:
        if others := set(sessions["split"].dropna()) - {"train"} if "split" in sessions else set():
            raise ValueError(f"a vocabulary is built on train alone; these sessions have split {sorted(others)}")
        _add(counts, verbalize.session_fields(sessions, features, kinds, **put))
    if transcripts is not None:
        if "features" in transcripts:
            maps = column_of(transcripts, "features")
            _add(counts, verbalize.transcript_fields(maps, features, kinds, **put))
        for query, count in Counter(transcripts["typed_query"].dropna()).items():
            for word in verbalize.compact_text(query).split():
                counts[word] += count
    return counts


def _add(counts: Counter[str], rows: Iterable[list[FieldTemplate]]) -> None:
    seen = Counter(field for row in rows for field in row)
    for field, count in seen.items():
        for word in field.words:
            counts[word] += count
