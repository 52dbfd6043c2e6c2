"""How a value that somebody gave is put into a message: escaped and short, however much there is of it."""

import reprlib

_BRIEF = reprlib.Repr()
_BRIEF.maxlevel, _BRIEF.maxlist, _BRIEF.maxtuple, _BRIEF.maxdict = 3, 8, 8, 8
_BRIEF.maxstring = _BRIEF.maxother = 100


def quoted(value: object, longest: int) -> str:
    """The value in at most `longest` characters; strings as Python writes them, so that nothing in them is obeyed."""
    if isinstance(value, str):
        text = repr(value[:longest])
    elif isinstance(value, list | tuple | dict):
        text = _BRIEF.repr(value)  # ten lines of YAML can say a list of a billion lists
    else:
        try:
            text = str(value)
        except ValueError:  # Python prints no number of more than 4,300 digits
            text = "a number of thousands of digits"
    return text if len(text) <= longest else text[: longest - 3] + "..."
