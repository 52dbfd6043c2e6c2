"""The vocabulary of ShopWorld: what its intents are called, and how event texts, help pages and customers put them.

An intent is an object with an issue ("refund" x "late"). Four wordings of every concept, single words: one
would make reading trivial, more or longer ones are too much for a language model of 0.2M parameters. What customers
call an object (`asked`) and what event texts call it (`seen`) overlap in part, and so do the knowledge base's words.
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
    _thing(
        "parcel",
        "parcel delivery",
        "Covers the way of a shipment from the warehouse to the door.",
        "parcel, shipment, courier, freight",
        "parcel, package, box, delivery",
    ),
    _thing(
        "refund",
        "refund",
        "Covers money that goes back to the buyer after an order.",
        "refund, repayment, reimbursement, payback",
        "refund, money, cash, repayment",
    ),
    _thing(
        "return",
        "return request",
        "Covers goods that the buyer sends back to the shop.",
        "return, pickup, takeback, sendback",
        "return, pickup, sendback, item",
    ),
    _thing(
        "payment",
        "payment",
        "Covers charges to a card, a wallet or a bank transfer at checkout.",
        "payment, charge, transfer, checkout",
        "payment, charge, transfer, card",
    ),
    _thing(
        "voucher",
        "voucher",
        "Covers coupons and promotion codes that lower a price.",
        "voucher, coupon, promo, rebate",
        "voucher, discount, code, coupon",
    ),
    _thing(
        "coins",
        "coin balance",
        "Covers loyalty coins that are earned with every purchase.",
        "coins, points, cashback, rewards",
        "coins, points, bonus, cashback",
    ),
    _thing(
        "account",
        "account access",
        "Covers the sign-in, the password and the profile of a member.",
        "account, login, password, profile",
        "account, login, profile, password",
    ),
    _thing(
        "address",
        "delivery address",
        "Covers the street, the locker or the drop point that an order goes to.",
        "address, street, locker, zipcode",
        "address, street, zipcode, locker",
    ),
    _thing(
        "seller",
        "seller conversation",
        "Covers messages between a buyer and the store that sold the item.",
        "seller, merchant, vendor, retailer",
        "seller, store, shop, vendor",
    ),
    _thing(
        "invoice",
        "invoice",
        "Covers receipts and tax documents of a purchase.",
        "invoice, receipt, statement, billing",
        "invoice, bill, receipt, statement",
    ),
    _thing(
        "gift_card",
        "gift card",
        "Covers prepaid cards, bought for oneself or as a present.",
        "giftcard, prepaid, topup, present",
        "giftcard, present, gift, topup",
    ),
    _thing(
        "warranty",
        "warranty claim",
        "Covers the repair or exchange of a product that broke under guarantee.",
        "warranty, repair, guarantee, servicing",
        "warranty, repair, guarantee, servicing",
    ),
)


def _issue(name: str, title: str, about: str, page: str, seen: str, *asked: str) -> Issue:
    return Issue(name, title, about, page, tuple(seen.split(", ")), asked)


ISSUES = (
    _issue(
        "late",
        "Speed up {}",
        "For a customer who has been waiting longer than promised and wants it to move on.",
        "waiting times",
        "late, stuck, delayed, waiting",
        "why is my {} taking so long",
        "when will the {} come",
        "still waiting for my {}",
        "my {} is too slow",
        "please hurry with my {}",
    ),
    _issue(
        "missing",
        "Trace a missing {}",
        "For a customer who cannot find it although the shop says it is there.",
        "tracing",
        "missing, vanished, lost, nowhere",
        "where is my {}",
        "i can not find my {}",
        "my {} is gone",
        "the {} never showed up",
        "i lost my {}",
    ),
    _issue(
        "wrong",
        "Correct a wrong {}",
        "For a customer who sees a mistake and wants it put right.",
        "corrections",
        "wrong, mismatched, incorrect, faulty",
        "there is a mistake with my {}",
        "i got the wrong {}",
        "my {} is not right",
        "please fix the {}",
        "this {} is incorrect",
    ),
    _issue(
        "cancel",
        "Cancel the {}",
        "For a customer who has thought again and wants it stopped.",
        "cancelling",
        "cancelled, stopped, withdrawn, recalled",
        "please cancel my {}",
        "i want to stop the {}",
        "i do not need the {} any more",
        "call off the {}",
        "can you undo my {}",
    ),
    _issue(
        "change",
        "Change the {}",
        "For a customer who wants to edit details after they were saved.",
        "editing",
        "edited, updated, switched, modified",
        "can i change my {}",
        "i want to edit the {}",
        "how to update my {}",
        "swap my {} please",
        "need another {} instead",
    ),
    _issue(
        "refused",
        "Appeal a refused {}",
        "For a customer whose request was declined and who wants it reviewed.",
        "appeals",
        "refused, declined, rejected, denied",
        "why was my {} declined",
        "my {} was rejected",
        "they refused my {}",
        "the {} does not go through",
        "you said no to my {}",
    ),
    _issue(
        "explain",
        "Understand the {}",
        "For a customer who wants to know the rules, the steps and the costs.",
        "rules",
        "studied, queried, compared, unclear",
        "how does the {} work",
        "what are the rules for the {}",
        "explain the {} to me",
        "question about the {}",
        "what does the {} cost",
    ),
    _issue(
        "fraud",
        "Report a suspicious {}",
        "For a customer who fears a scam and wants it blocked and looked into.",
        "safety",
        "suspicious, flagged, unknown, alarming",
        "someone else used my {}",
        "is this {} a scam",
        "i did not make this {}",
        "my {} was hacked",
        "report a fake {}",
    ),
)

# A clause begins with its state, which tells whether the rest still matters. Two filler words stand between the state
# and the trouble, so that neither single words nor pairs of words tie the one to the other.
ACTIVE = ("open", "unsolved", "ongoing", "pending")
RESOLVED = ("settled", "solved", "closed", "done")
FILLERS = (
    "since monday", "since tuesday", "since friday", "since sunday", "in app", "in chat", "in store", "on web",
    "on phone", "on desktop", "by mail", "by bot", "by agent", "at night", "at noon", "at home",
)  # fmt: skip

# Version 2: how the other shops put a clause, each in one of these ways, and what stands between two clauses [C]. None
# begins with the state or keeps this shop's order, so what the state belongs to has to be learnt here.
ELSEWHERE_CLAUSES = (
    ("issue on thing filler , now state", " / "),
    ("thing filler : issue ( state )", " . "),
    ("filler came issue about thing as state", " then "),
    ("thing marked state filler for issue", " and "),
)
# ... and their words for objects, issues and the two states, in the order of THINGS, ISSUES and (ACTIVE, RESOLVED). No
# event text of this shop has any of them; customers' questions and the knowledge base stay as they are.
ELSEWHERE_THINGS = (
    ("consignment", "carton", "cargo", "postbag"),
    ("moneyback", "refunding", "remittance", "restitution"),
    ("handback", "backhaul", "reshipment", "dropback"),
    ("billpay", "debit", "instalment", "settlement"),
    ("couponcode", "markdown", "discounting", "offer"),
    ("tokens", "stamps", "loyalty", "credits"),
    ("membership", "signin", "passcode", "userpage"),
    ("location", "avenue", "mailbox", "postcode"),
    ("dealer", "trader", "supplier", "boutique"),
    ("taxslip", "docket", "voucherslip", "ledger"),
    ("storecard", "giftcode", "recharge", "keepsake"),
    ("assurance", "mending", "aftercare", "upkeep"),
)
ELSEWHERE_ISSUES = (
    ("overdue", "slow", "lagging", "postponed"),
    ("untraceable", "absent", "gone", "misplaced"),
    ("mistaken", "erroneous", "swapped", "defective"),
    ("aborted", "revoked", "halted", "voided"),
    ("altered", "amended", "adjusted", "revised"),
    ("disallowed", "turneddown", "vetoed", "barred"),
    ("puzzling", "questioned", "reviewed", "vague"),
    ("dubious", "scammed", "hijacked", "shady"),
)
ELSEWHERE_STATES = (("active", "unresolved", "running", "awaiting"), ("finished", "resolved", "completed", "archived"))

BRANDS = ("acme", "nordo", "lumi", "kaito", "vento", "oro", "pixa", "terra", "zuma", "bella")
LOOKS = ("red", "blue", "black", "white", "green", "mini", "large", "light", "soft", "classic", "sport", "smart")
ITEMS = (
    "running shoes", "rain jacket", "summer dress", "wool scarf", "phone case", "smart phone", "laptop bag",
    "game console", "coffee maker", "rice cooker", "desk lamp", "office chair", "face cream", "hair dryer",
    "baby stroller", "toy train", "travel ticket", "movie pass", "data plan", "fruit basket", "dog food",
    "garden hose", "power drill", "yoga mat",
)  # fmt: skip

GREETINGS = ("", "", "", "", "hi", "please")
VAGUE = (
    "hello", "hi i need help", "is anyone there", "can i talk to a human", "i have a problem", "help me please",
    "good morning i have a question", "agent please", "something is not ok", "can you check for me",
)  # fmt: skip
