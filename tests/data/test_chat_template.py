"""Chat templates as the field writes them: split where they can be, thoughts closed, else refused with the mend."""

import logging

import pandas as pd
import pytest
from prompt_tokenizers import TEMPLATE, pretrained

from rgalign.reasoner import chat_template
from rgalign.reasoner.prompts import Prompter

TURNS = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
ASKED = "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
THINKS = TURNS + "{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n{% endif %}"
PARTS = TURNS.replace("{{ m.content }}", "{% for c in m.content %}{{ c.text }}{% endfor %}") + ASKED
DEMANDING = "{% if messages[0].role != 'system' %}{{ raise_exception('First turn must be system') }}{% endif %}" + TURNS
# answers stand in a channel of their own, behind thoughts, as gpt-oss has it
CHANNELS = (
    "{% for m in messages %}<|im_start|>{{ m.role }}{% if m.role == 'assistant' %}<think>final</think>{% endif %}\n"
    "{{ m.content }}<|im_end|>{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant{% endif %}"
)


def prompt(template) -> str:
    tokenizer = pretrained(template)
    own = Prompter(tokenizer, features=["note"], kinds={"note": "text"}, layout="lines", instruction="Write one.")
    return tokenizer.decode(own.sessions(pd.DataFrame({"note": ["Where is it"]}))[0], skip_special_tokens=False)


def opening(template) -> str:
    return chat_template.frame(pretrained(template)).opening


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        (TURNS + ASKED, "<|im_end|>\n<|im_start|>assistant\n"),
        ({"default": TURNS + ASKED, "tool_use": "x"}, "<|im_end|>\n<|im_start|>assistant\n"),
        (TEMPLATE, "<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"),
        (PARTS, "<|im_end|>\n<|im_start|>assistant\n"),
        (DEMANDING + ASKED, "<|im_end|>\n<|im_start|>assistant\n"),
        (TURNS, "<|im_end|>\n<|im_start|>assistant\n"),  # without a generation prompt: as it begins a given answer
        (CHANNELS, "<|im_end|><|im_start|>assistant<think>final</think>"),
    ],
    ids=["plain", "named with a default", "hybrid", "list of parts", "system demanded", "not asked", "channels"],
)
def test_a_template_is_split_up_to_where_its_answer_begins(template, expected):
    assert opening(template) == expected


def test_the_users_words_stand_once_in_a_prompt_of_parts_behind_a_demanded_system_turn():
    demanding = DEMANDING.replace("{{ m.content }}", "{% for c in m.content %}{{ c.text }}{% endfor %}")
    assert prompt(demanding + ASKED).count("Where") == 1


@pytest.mark.parametrize(
    ("mark", "closed"),
    [
        ("<think>", "</think>"),
        ("[THINK]", "[/THINK]"),
        ("<seed:think>", "</seed:think>"),
        ("<|begin_of_thought|>", "<|end_of_thought|>"),
    ],
)
def test_a_thought_that_is_always_opened_is_closed_and_the_log_says_so(mark, closed, caplog):
    with caplog.at_level(logging.WARNING):
        assert opening(THINKS.replace("<think>", mark)).endswith(f"assistant\n{mark}\n\n{closed}\n\n")
    assert mark in caplog.text


def test_a_thought_is_closed_as_the_template_itself_does_for_an_answer(caplog):
    """Qwen3's thinking editions: a given answer stands behind an empty thought."""
    own = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n"
        "{% if m.role == 'assistant' %}<think>\n\n</think>\n\n{% endif %}{{ m.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n{% endif %}"
    )
    assert opening(own).endswith("<think>\n\n</think>\n\n")


def test_a_thought_that_the_tokenizer_cannot_close_is_refused():
    tokenizer = pretrained(THINKS.replace("<think>", "<thinking>"))
    tokenizer.add_tokens(["<thinking>"])
    with pytest.raises(ValueError, match="no </thinking> to close it: write a template"):
        chat_template.frame(tokenizer)


@pytest.mark.parametrize(
    ("template", "words"),
    [
        ({"rag": TURNS, "tool_use": TURNS}, "named rag, tool_use and no default: write the one to use"),
        (TURNS.replace("m.content", "m.content | upper"), "user's words 0 times, expected once.*chat_template.jinja"),
        (TURNS + TURNS, "the user's words 2 times, expected once.*chat_template.jinja"),
        ("{% for m in messages %}{{ m.content }}", "TemplateSyntaxError.*chat_template.jinja"),
        ("{{ raise_exception('no') }}", "TemplateError: no.*chat_template.jinja"),
        ("{{ messages[7].content.strip() }}", "UndefinedError.*chat_template.jinja"),
    ],
    ids=["no default", "rewritten", "twice", "broken", "refusing", "other turns"],
)
def test_a_template_that_cannot_be_split_says_how_to_mend_it(template, words):
    with pytest.raises(ValueError, match=words):
        prompt(template)
