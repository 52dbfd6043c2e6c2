"""Personal columns stay out of prompts and reports; the network is not asked; nothing that is read can run code."""

import json
import re
import socket
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st
from small_shop import good_shop
from table_changes import put, rename, write_raw

from rgalign.data import describe
from rgalign.data.checks import check
from rgalign.data.schema import HIDDEN, SPLITS, is_personal, masked
from rgalign.data.tables import read
from rgalign.params import ROOT
from rgalign.reasoner.prompts import shown_features
from rgalign.reasoner.verbalize import Serialiser
from rgalign.report import summaries

PERSONAL = [
    "name",
    "customer_name",
    "FirstName",
    "last_name",
    "e_mail",
    "E-Mail",
    "emailAddress",
    "user_email",
    "phone",
]
PERSONAL += ["phone_number", "mobile", "telephone", "address", "home_address", "shipping_address", "street", "iban"]
PERSONAL += ["passport_number", "date_of_birth", "birthday", "ip_address", "username", "card_number", "ssn"]
NOT = [
    "product_name",
    "item_name",
    "address_state",
    "phone_model",
    "device",
    "mail_opt_in",
    "email_verified",
    "username_set",
]
MAIL = "a.b+c@example.org"


def test_a_personal_column_is_known_by_its_name_and_what_only_looks_alike_is_not():
    assert [column for column in PERSONAL + NOT if is_personal(column)] == PERSONAL


@pytest.fixture
def shop(tmp_path):
    """A shop with the customer's e-mail address as a feature, which its prompt_features list."""
    tables, meta = good_shop()
    put("sessions", "device", pa.array([f"c{row}@example.org" for row in range(240)]))(tables, meta)
    rename("sessions", "device", "customer_email")(tables, meta)
    meta["features"]["customer_email"] = meta["features"].pop("device")
    meta["prompt_features"] = ["customer_email", "event_text"]
    return write_raw(tmp_path / "shop", tables, meta)


def test_no_prompt_shows_it_unless_the_reasoners_features_list_it(shop):
    meta = read(shop).meta
    assert shown_features(None, meta) == ["event_text"]
    assert shown_features(["customer_email"], meta) == ["customer_email"]
    with pytest.raises(ValueError, match=r"customer_email are personal: shown where reasoner\.features lists them"):
        shown_features(None, {**meta, "prompt_features": ["customer_email"]})
    assert "sessions.customer_email" in str(check(shop))
    assert "no prompt shows it unless reasoner.features lists it" in str(check(shop))


def test_transcripts_of_other_shops_do_not_bring_it_in(shop):
    maps = pa.array([[("email", MAIL), ("state", "paid")]], pa.map_(pa.string(), pa.string()))
    for shown, expected in (([], ["state"]), (["email"], ["email", "state"])):
        found = Serialiser("compact").transcripts(maps, shown, {name: "text" for name in shown})
        assert [field.column for field in found[0]] == expected


def test_no_report_shows_its_values(shop):
    data = read(shop, splits=SPLITS)
    card, _ = describe.session_card(data, data.sessions.session_id[0])
    assert card["customer_email"] == HIDDEN
    shares = describe.value_shares(data.sessions, ["customer_email"])
    assert shares.value.tolist() == [HIDDEN]
    found = pd.DataFrame({"session_id": data.sessions.session_id[:1].astype(object), "outcome": ["win"]})
    sessions = data.sessions.assign(event_text=f"write to {MAIL} or call +65 9123 4567")
    table = summaries.with_context(found, sessions, sessions[["session_id"]], ["customer_email", "event_text"])
    assert table.iloc[0].tolist()[-2:] == [HIDDEN, "write to (e-mail) or call (phone)"]


@given(st.text(max_size=20), st.from_regex(r"[a-z]{1,8}@[a-z]{1,8}\.(com|org|sg)", fullmatch=True))
def test_an_address_never_survives_masking(around, address):
    assert address not in masked(f"{around} {address} {around}")


def test_dates_amounts_and_order_numbers_are_left_as_they_are():
    text = "order 123456789 of 2024-03-05, 10.50 paid at 09:30, 12 items"
    assert masked(text) == text


SOURCES = sorted((ROOT / "rgalign").rglob("*.py"))
RUNS_DATA = re.compile(
    r"\bpickle\b|\bmarshal\b|\bshelve\b|\bdill\b|torch\.load\(|np\.load\(|read_pickle|allow_pickle|joblib\.load"
    r"|yaml\.(unsafe_|full_)?load\((?!.*_UniqueKeys)|(?<![.\w])eval\(|(?<![.\w])exec\(|trust_remote_code"
    r"|os\.system|shell=True|__import__\("
)


def test_nothing_in_the_package_runs_what_it_reads():
    notebooks = sorted((ROOT / "notebooks").glob("*.ipynb"))
    cells = [
        (path.name, "".join(cell["source"]))
        for path in notebooks
        for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]
        if cell["cell_type"] == "code"
    ]
    texts = [(path.name, path.read_text(encoding="utf-8")) for path in SOURCES] + cells
    assert len(texts) > 100
    assert not [(name, found.group()) for name, text in texts if (found := RUNS_DATA.search(text))]


def test_the_search_itself_finds_what_it_looks_for():
    for bad in ("import pickle", "torch.load(p)", "yaml.load(t, yaml.Loader)", "x = eval(s)", "trust_remote_code=True"):
        assert RUNS_DATA.search(bad), bad
    for good in ("model.eval()", "yaml.load(t, _UniqueKeys)", "retrieval(x)"):
        assert not RUNS_DATA.search(good), good


OFFLINE = """
import socket, sys
class Refused(socket.socket):
    def connect(self, address):
        if self.family != socket.AF_UNIX and address[0] not in ("127.0.0.1", "localhost", "::1"):
            raise AssertionError(f"the network was asked: {address}")
        return super().connect(address)
def lookup(*address, **_):
    raise AssertionError(f"the network was asked: {address}")
socket.socket, socket.getaddrinfo, socket.gethostbyname = Refused, lookup, lookup
sys.path[:0] = sys.argv[2:]
from pathlib import Path
import small_run
for name in ("01_data", "02_reasoner", "03_rankers"):
    small_run.play(name, Path(sys.argv[1]) / "run")
print("done")
"""


def offline(tmp_path, before: list[str] = ()) -> subprocess.CompletedProcess:
    command = [
        *before,
        sys.executable,
        "-c",
        OFFLINE,
        str(tmp_path),
        str(Path(__file__).resolve().parents[1]),
        str(ROOT),
    ]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


@pytest.mark.slow
def test_a_run_asks_the_network_for_nothing(tmp_path):
    """Stages 01 to 03, which build, train, embed and rank; without any network at all where that can be had."""
    alone = ["unshare", "--net"]
    can = subprocess.run([*alone, "true"], capture_output=True, check=False).returncode == 0
    done = offline(tmp_path, alone if can else [])
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.endswith("done\n")


def test_the_guard_would_have_seen_it():
    code = OFFLINE.split("sys.path")[0] + "socket.create_connection(('192.0.2.1', 80), timeout=1)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert "the network was asked" in done.stderr
    assert socket.socket.__name__ == "socket"
