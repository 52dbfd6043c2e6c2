"""Two tokenizers as models have them, small enough that their tokens can be read."""

from tokenizers import AddedToken, Regex, Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from rgalign.reasoner.prompts import ASK

TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and not enable_thinking %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
)


def tiny() -> PreTrainedTokenizerFast:
    """Word-level over white space, with words for a few values and for the forged ones."""
    words = ["state=to_ship", "days=7", "state", "days", "=", "recent:", "track", "it", ";", "log", "in"]
    words += ["note:", "where", "is", "?", "ok", "title:", "description:"]
    vocabulary = {word: i for i, word in enumerate(dict.fromkeys(["<|pad|>", "<|unk|>", ASK, "<|end|>", *words]))}
    built = Tokenizer(models.WordLevel(vocabulary, unk_token="<|unk|>"))
    built.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = dict(pad_token="<|pad|>", unk_token="<|unk|>", eos_token="<|end|>", additional_special_tokens=[ASK])
    return PreTrainedTokenizerFast(tokenizer_object=built, **special)


def pretrained(template: str | None = TEMPLATE) -> PreTrainedTokenizerFast:
    """In the manner of Qwen3's: blanks belong to words, <think> is added but not special."""
    words = "user assistant state days recent note : ; \n Write one . question Question a ok < | > / im think end start"
    spaced = ["To", "Ship", "7", "Track", "it", "Log", "in", "Where", "is", "one", "question", "ok"]
    listed = ["<|unk|>", *words.split(" "), *(f" {word}" for word in spaced), "?", "To", "_"]
    built = Tokenizer(models.WordLevel({word: i for i, word in enumerate(dict.fromkeys(listed))}, "<|unk|>"))
    built.pre_tokenizer = pre_tokenizers.Split(Regex(r"\n| ?[A-Za-z]+| ?[0-9]+| ?[^\sA-Za-z0-9]"), "isolated")
    built.add_special_tokens(["<|endoftext|>", "<|im_start|>", "<|im_end|>"])
    built.add_tokens([AddedToken("<think>", normalized=False), AddedToken("</think>", normalized=False)])
    special = dict(pad_token="<|endoftext|>", unk_token="<|unk|>", eos_token="<|im_end|>")
    return PreTrainedTokenizerFast(tokenizer_object=built, chat_template=template, **special)
