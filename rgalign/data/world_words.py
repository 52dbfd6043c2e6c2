"""The vocabulary of ShopWorld: what its intents are called, and how event texts, help pages and customers put them.

An intent is an object with an issue ("refund" x "late"). Four wordings of every concept, because one wording a
concept would make reading trivial, and many would not fit a language model of 0.2M parameters. The customer's words
(`asked`) differ from the event's (`seen`) and from the knowledge base's, and share some words with each.
"""

from typing import NamedTuple


class Thing(NamedTuple):
    """An object of the taxonomy: `title` and `about` in the knowledge base, `seen` in event texts, `asked` in chats."""

    name: str
    title: str
    about: str
    seen: tuple[str, str, str, str]
    asked: tuple[str, str, str, str]


class Issue(NamedTuple):
    """An issue: `title` with {} for the object; `page` begins help pages; `asked` are questions about {}."""

    name: str
    title: str
    about: str
    page: str
    seen: tuple[str, str, str, str]
    asked: tuple[str, str, str, str, str]


def _thing(name: str, title: str, about: str, seen: str, asked: str) -> Thing:
    return Thing(name, title, about, tuple(seen.split(", ")), tuple(asked.split(", ")))


THINGS = (
    _thing("parcel", "parcel delivery", "Covers the way of a shipment from the warehouse to the door.",
           "parcel, shipment, courier run, freight", "parcel, package, box, delivery"),
    _thing("refund", "refund", "Covers money that goes back to the buyer after an order.",
           "refund, money back, reimbursement, repayment", "refund, money, cash, money back"),
    _thing("return", "return request", "Covers goods that the buyer sends back to the shop.",
           "return, send back, pick up slip, goods back", "return, item i send back, return label, pick up"),
    _thing("payment", "payment", "Covers charges to a card, a wallet or a bank transfer at checkout.",
           "payment, card charge, transfer, checkout", "payment, charge, card payment, bank transfer"),
    _thing("voucher", "voucher", "Covers coupons and promotion codes that lower a price.",
           "voucher, coupon, promo code, price cut", "voucher, discount, code, coupon"),
    _thing("coins", "coin balance", "Covers loyalty coins that are earned with every purchase.",
           "coins, loyalty points, cashback, rewards", "coins, points, bonus, cashback"),
    _thing("account", "account access", "Covers the sign-in, the password and the profile of a member.",
           "account, sign in, password, member profile", "account, login, profile, password"),
    _thing("address", "delivery address", "Covers the street, the locker or the drop point that an order goes to.",
           "address, street entry, locker choice, drop point", "address, street, house number, pick up point"),
    _thing("seller", "seller conversation", "Covers messages between a buyer and the store that sold the item.",
           "seller, merchant chat, store reply, vendor", "seller, shop owner, store, vendor"),
    _thing("invoice", "invoice", "Covers receipts and tax documents of a purchase.",
           "invoice, receipt, tax bill, statement", "invoice, bill, receipt, tax paper"),
    _thing("gift_card", "gift card", "Covers prepaid cards, bought for oneself or as a present.",
           "gift card, prepaid card, present card, top up", "gift card, present, prepaid card, card i was given"),
    _thing("warranty", "warranty claim", "Covers the repair or exchange of a product that broke under guarantee.",
           "warranty, repair job, guarantee, service claim", "warranty, repair, guarantee, broken thing"),
)


def _issue(name: str, title: str, about: str, page: str, seen: str, *asked: str) -> Issue:
    return Issue(name, title, about, page, tuple(seen.split(", ")), asked)


ISSUES = (
    _issue("late", "Speed up {}", "For a customer who has been waiting longer than promised and wants it to move on.",
           "waiting times", "late, stuck, delayed, without progress",
           "why is my {} taking so long", "when will the {} come", "still waiting for my {}",
           "my {} is too slow", "please hurry with my {}"),
    _issue("missing", "Trace a missing {}", "For a customer who cannot find it although the shop says it is there.",
           "tracing", "missing, not found, vanished, lost",
           "where is my {}", "i can not find my {}", "my {} is gone", "the {} never showed up", "i lost my {}"),
    _issue("wrong", "Correct a wrong {}", "For a customer who sees a mistake and wants it put right.",
           "corrections", "wrong, mismatched, incorrect, mixed up",
           "there is a mistake with my {}", "i got the wrong {}", "my {} is not right", "please fix the {}",
           "this {} is incorrect"),
    _issue("cancel", "Cancel the {}", "For a customer who has thought again and wants it stopped.",
           "cancelling", "cancelled by app, stop tapped, withdrawn, called off",
           "please cancel my {}", "i want to stop the {}", "i do not need the {} any more", "call off the {}",
           "can you undo my {}"),
    _issue("change", "Change the {}", "For a customer who wants to edit details after they were saved.",
           "editing", "edited, update tapped, switched, modified",
           "can i change my {}", "i want to edit the {}", "how to update my {}", "swap my {} please",
           "need another {} instead"),
    _issue("refused", "Appeal a refused {}", "For a customer whose request was declined and who wants it reviewed.",
           "appeals", "refused, declined, rejected, not accepted",
           "why was my {} declined", "my {} was rejected", "they refused my {}", "the {} does not go through",
           "you said no to my {}"),
    _issue("explain", "Understand the {}", "For a customer who wants to know the rules, the steps and the costs.",
           "rules", "rules opened, terms read, steps viewed, costs looked up",
           "how does the {} work", "what are the rules for the {}", "explain the {} to me", "question about the {}",
           "what does the {} cost"),
    _issue("fraud", "Report a suspicious {}", "For a customer who fears a scam and wants it blocked and looked into.",
           "safety", "suspicious, flagged, unknown to user, under alert",
           "someone else used my {}", "is this {} a scam", "i did not make this {}", "my {} was hacked",
           "report a fake {}"),
)

# How an event ends tells whether it still matters. The marker stands at the end of its clause, two filler words away
# from the trouble, so that neither single words nor pairs of words tie the one to the other.
ACTIVE = ("still open", "unsolved", "ongoing", "not settled")
RESOLVED = ("all settled", "solved", "now closed", "done")
FILLERS = (
    "since monday", "since tuesday", "since friday", "this week", "last week", "two days", "three days", "five days",
    "in app", "on web", "by phone", "after sale", "before noon", "at night", "per mail", "via bot",
)  # fmt: skip

BRANDS = ("acme", "nordo", "lumi", "kaito", "vento", "oro", "pixa", "terra", "zuma", "bella")
LOOKS = ("red", "blue", "black", "white", "green", "mini", "large", "light", "soft", "classic", "sport", "smart")
ITEMS = (
    "running shoes", "rain jacket", "summer dress", "wool scarf", "phone case", "smart phone", "laptop bag",
    "game console", "coffee maker", "rice cooker", "desk lamp", "office chair", "face cream", "hair dryer",
    "baby stroller", "toy train", "travel ticket", "movie pass", "data plan", "fruit basket", "dog food",
    "garden hose", "power drill", "yoga mat",
)  # fmt: skip

GREETINGS = ("", "", "", "hi", "hello", "sorry", "hey there", "please help")
VAGUE = (
    "hello", "hi i need help", "is anyone there", "can i talk to a human", "i have a problem", "help me please",
    "good morning i have a question", "agent please", "something is not ok", "can you check for me",
)  # fmt: skip
