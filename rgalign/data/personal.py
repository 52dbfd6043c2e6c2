"""Personal data: which columns hold it by their name, and how it is hidden where text is shown to readers.

A prompt shows no such column unless `reasoner.features` lists it, and no report shows its values.
"""

import re
from collections.abc import Iterable

HIDDEN = "(hidden: personal)"
# The last words of a column's name; a name alone is a person's where the word before says so.
PERSONAL = re.compile(
    r"(^|_)(e_?mails?(_address)?|(tele)?phones?|(tele)?phone_(number|no)|mobile_(number|no)|msisdn|fax"
    r"|((home|street|postal|billing|shipping|delivery|mail(ing)?|ip)_)?address(_line)?(_?\d)?|street"
    r"|((first|last|full|given|family|middle|maiden|nick|user|customer|client|contact|person|recipient|buyer)_?)names?"
    r"|surnames?|ssn|social_security_(number|no)|passport(_(number|no))?|iban|card_(number|no)"
    r"|date_of_birth|birth_?(day|date)|dob)$"
)
ALONE = ("name", "names", "phone", "mobile", "tel", "mail")  # these mean a person where nothing stands before them
MAIL = re.compile(r"[\w.+-]+@[\w-]+(\.[\w-]+)+")
PHONE = re.compile(r"(?<![\w.])(\+\d{1,3}|\(?0\d)[\d ()/.-]{6,}\d(?!\w)")


def is_personal(column: str) -> bool:
    """Whether a column's name says that it holds a person's name, e-mail, phone, address or number."""
    words = re.sub(r"[^a-z0-9]+", "_", re.sub(r"(?<=[a-z])(?=[A-Z])", "_", column).lower()).strip("_")
    return words in ALONE or PERSONAL.search(words) is not None


def personal(columns: Iterable[str]) -> list[str]:
    """Those of the columns that are."""
    return [column for column in columns if is_personal(column)]


def masked(text: str) -> str:
    """E-mail addresses and telephone numbers in a text replaced: what a reader is shown of what customers wrote."""
    return PHONE.sub("(phone)", MAIL.sub("(e-mail)", text))
