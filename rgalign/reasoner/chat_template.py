"""A chat template, split into the text around the user's words and around the answer, thinking switched off."""

import datetime
import logging
import re
from collections.abc import Sequence
from dataclasses import dataclass

USER, ANSWER = "5e55104", "5e55105"  # stand for the user's words and the answer while the template is split
TODAY = datetime.date(2024, 7, 26)  # to every template, on every day [C]: Llama's own default
CLOCK = re.compile(r"""\bstrftime_now\s*\(\s*(?P<quote>["'])(?P<format>.*?)(?P=quote)\s*\)""")  # in a template
# <think>, </think>, [THINK], <seed:think>, <|begin_of_thought|>: what opens and closes a thought
THOUGHT = re.compile(r"[<\[]\|?(?P<end>/|end_of_)?(?:begin_of_)?[\w:]*(?:think|thought|reasoning)\w*\|?[>\]]", re.I)
# The names under which public templates have the switch; a template that knows neither leaves them unread.
NO_THINKING = {"enable_thinking": False, "thinking": False}
MEND = "write a template that does into chat_template.jinja beside the tokenizer, or remove the template"

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Frame:
    """before | user's words | opening | answer | closing. opening: up to the answer's first token, no thought open."""

    before: str
    opening: str
    closing: str


def frame(tokenizer) -> Frame | None:
    """The tokenizer's chat template around one turn of the user and its answer; None where it has no template.

    Where the template opens a thought although thinking is off, the thought is closed, and the log says so.
    Raises ValueError for a template that cannot be split, with the way to mend it.
    """
    if not getattr(tokenizer, "chat_template", None):
        return None
    template = _source(tokenizer)
    before, opening, turns = _split(tokenizer, template)
    answered, closing = _answered(tokenizer, template, turns)
    mark = _open_thought(opening)
    # as the template writes a given answer: past a thought, in the channel for answers, behind its turn's beginning
    if answered.startswith(opening) and not _open_thought(answered):
        more = template_ids(tokenizer, answered[len(opening) :])
        if mark or not controls(tokenizer).isdisjoint(more):
            return Frame(before, answered, closing)
    return Frame(before, _closed(tokenizer, opening, mark) if mark else opening, closing)


def _source(tokenizer) -> str:
    """The template, the date in it. Templates that name the date (Llama's) get TODAY: a prompt must not change
    overnight."""
    named = tokenizer.chat_template
    if isinstance(named, dict) and "default" not in named:
        raise ValueError(
            f"the tokenizer has chat templates named {', '.join(sorted(named))} and no default: write the one to use "
            "into chat_template.jinja beside the tokenizer"
        )
    template = CLOCK.sub(lambda call: repr(TODAY.strftime(call["format"])), tokenizer.get_chat_template())
    if re.search(r"\bstrftime_now\s*\(", template):
        raise ValueError(
            "the chat template reads the clock (strftime_now with a format that is no literal), so that prompts would "
            "change from day to day; write a date into the tokenizer's chat_template"
        )
    return template


def _split(tokenizer, template: str) -> tuple[str, str, list[dict]]:
    """Text before and after the user's words, the answer asked for; and the turns that the template takes: as text or
    as a list of parts, and behind an empty system turn where it insists on one."""
    system = [{"role": "system", "content": ""}]
    errors = []
    for first in ([], system):
        for content in (USER, [{"type": "text", "text": USER}]):
            turns = [*first, {"role": "user", "content": content}]
            try:
                text = _rendered(tokenizer, template, turns, add_generation_prompt=True)
            except Exception as error:  # whatever a template raises, jinja's errors and its own
                errors.append(f"{type(error).__name__}: {error}")
                continue
            if text.count(USER) == 1 and "'type': 'text'" not in text:  # a list that was printed
                return *text.split(USER), turns
            errors.append(f"it renders the user's words {text.count(USER)} times, expected once")
    raise ValueError(f"the chat template cannot render one turn of a user ({errors[0]}): {MEND}")


def _answered(tokenizer, template: str, turns: Sequence[dict]) -> tuple[str, str]:
    """Text between the user's words and a given answer, and behind it; empty where the template takes no answer."""
    content = turns[-1]["content"]
    forms = [ANSWER] if isinstance(content, str) else [[{"type": "text", "text": ANSWER}], ANSWER]
    for answer in forms:
        try:
            answered = [*turns, {"role": "assistant", "content": answer}]
            text = _rendered(tokenizer, template, answered, add_generation_prompt=False)
        except Exception:  # as above: the prompt ends with the generation prompt
            continue
        if text.count(USER) == text.count(ANSWER) == 1 and "'type': 'text'" not in text:
            opening, _, closing = text.partition(USER)[2].partition(ANSWER)
            return opening, closing
    return "", ""


def _rendered(tokenizer, template: str, turns: Sequence[dict], *, add_generation_prompt: bool) -> str:
    how = {"add_generation_prompt": add_generation_prompt, "tokenize": False, **NO_THINKING}
    return tokenizer.apply_chat_template(turns, chat_template=template, date_string=TODAY.strftime("%d %b %Y"), **how)


def _open_thought(text: str) -> str | None:
    """The mark of a thought that this text opens and does not close."""
    marks = list(THOUGHT.finditer(text))
    return marks[-1][0] if marks and not marks[-1]["end"] else None


def _closed(tokenizer, opening: str, mark: str) -> str:
    """The opening with its thought closed, as hybrid models have it without a thought. Raises ValueError."""
    begin = re.match(r"[<\[]\|?", mark)[0]
    close = mark.replace("begin_of_", "end_of_") if "begin_of_" in mark else f"{begin}/{mark[len(begin) :]}"
    vocabulary = tokenizer.get_vocab()
    if mark in vocabulary and close not in vocabulary:
        raise ValueError(
            f"the chat template opens a thought ({mark}) and the tokenizer has no {close} to close it: {MEND}"
        )
    logger.warning(
        "the chat template opens a thought (%s) although thinking is off: it is closed in the prompt (%s), so that the "
        "query is no thought. An edition of the model that answers without thinking may write better queries.",
        mark,
        close,
    )
    return f"{opening}{'' if opening.endswith(chr(10)) else chr(10)}\n{close}\n\n"


def template_ids(tokenizer, text: str) -> list[int]:
    """Ids of a text of the template's own, whose special tokens are parsed."""
    return list(tokenizer(text, add_special_tokens=False)["input_ids"]) if text else []


def controls(tokenizer) -> frozenset[int]:
    """Ids that no data may yield: special tokens, and added ones in brackets (Qwen's <think> is not special)."""
    added = tokenizer.added_tokens_decoder.items()
    marks = {i for i, token in added if token.special or token.content.strip().startswith(("<", "[", "{", "|"))}
    return frozenset((marks | set(tokenizer.all_special_ids)) - {tokenizer.unk_token_id})
