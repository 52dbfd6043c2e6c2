"""Adapters: the public tables come out as they were published; every spelling of the CSV gives the same."""

import csv

import numpy as np
import pandas as pd
import pytest

from rgalign.data import cfpb, sources, tables
from rgalign.data.schema import SPLITS
from rgalign.data.tables import TableError

HEADER_2014 = [
    *("Complaint ID", "Product", "Sub-product", "Issue", "Sub-issue", "State", "ZIP code", "Submitted via"),
    *("Date received", "Date sent to company", "Company", "Company response", "Timely response?", "Consumer disputed?"),
]
LATER = {
    "Company response": "Company response to consumer",
    "Company": "Company",
    "Narrative": "Consumer complaint narrative",
    "Tags": "Tags",
}


def complaints() -> pd.DataFrame:
    """40 complaints on 10 days, newest first, under the names of 2014, with the later narrative and tags."""
    number = np.arange(40)[::-1]
    day = 1 + number // 4
    return pd.DataFrame(
        {
            "Complaint ID": [str(1000 + n) for n in number],
            "Product": np.where(number % 3 == 0, "Mortgage", "Debt collection"),
            "Sub-product": np.where(number % 5 == 0, "", 'Other, "quoted"'),
            "Issue": np.where(number >= 36, "A new issue", np.where(number % 3 == 0, "Payments", "Not my debt")),
            "Sub-issue": np.where((number % 6 == 1) & (number < 36), "Paid it", ""),
            "State": np.where(number % 7 == 0, "", "TX"),
            "ZIP code": np.where(number % 4 == 0, "750XX", "06138"),
            "Submitted via": "Web",
            "Date received": [f"{d:02d}/03/2014" for d in day],
            "Date sent to company": "11/03/2014",
            "Company": "Citibank",
            "Company response": "Closed",
            "Timely response?": "Yes",
            "Consumer disputed?": "",
            "Narrative": np.where(number % 2 == 0, "They call me,\nevery day {x}", ""),
            "Tags": np.where(number % 8 == 0, "Older American", ""),
        }
    )


def write_csv(path, frame: pd.DataFrame, **keywords):
    frame.to_csv(path, index=False, **keywords)
    return path


def read(path, **how):
    """Its days and months are all below 13."""
    return cfpb.cfpb(path, **{"seed": 1, "day_first": False, **how})


def in_2014(frame):
    return frame[HEADER_2014]


def in_2020(frame):
    iso = pd.to_datetime(frame["Date received"], format="%m/%d/%Y").dt.strftime("%Y-%m-%d")
    later = frame.assign(**{"Date received": iso, "Consumer consent provided?": "N/A"}).rename(columns=LATER)
    return later[sorted(later.columns)]


def in_the_search_api(frame):
    iso = pd.to_datetime(frame["Date received"], format="%m/%d/%Y").dt.strftime("%Y-%m-%dT12:00:00-05:00")
    names = {name: name.lower().replace("-", "_").replace(" ", "_").rstrip("?") for name in frame.columns}
    return frame.assign(**{"Date received": iso}).rename(columns=names | {"Narrative": "complaint_what_happened"})


@pytest.mark.parametrize("name", ["cfpb2014", "msweb"])
def test_raw_files_give_the_published_tables(public_data, name):
    raw = public_data / name / "raw"
    ours = cfpb.cfpb(raw / "Consumer_Complaints.csv", seed=1) if name == "cfpb2014" else sources.msweb(raw)
    published = tables.read(public_data / name, splits=SPLITS)
    own = ["intent_id", "title", "valid_from"]  # the published descriptions of the CFPB knew valid and test
    assert ours.intents[own].equals(published.intents[own])
    if name == "cfpb2014":
        assert_described_by_train(ours.intents, published)
    else:
        assert ours.intents.equals(published.intents)
    assert ours.sessions.equals(published.sessions)
    assert ours.kinds == published.kinds
    assert ours.meta["position_is_real"] is False
    clicks = [data.impressions[data.impressions["clicked"] == 1] for data in (ours, published)]
    assert clicks[0]["intent_id"].tolist() == clicks[1]["intent_id"].tolist()
    assert len(ours.impressions) == len(published.impressions)
    # Other draws by the same rule: as often in the lists as in the published ones, within sampling error.
    often = [
        data.impressions["intent_id"].value_counts().reindex(published.intents["intent_id"])
        for data in (ours, published)
    ]
    ours_often, theirs = (np.nan_to_num(counts.to_numpy(dtype=float)) for counts in often)
    assert (np.abs(ours_often - theirs) < 5 * np.sqrt(ours_often + theirs + 1)).all()


def assert_described_by_train(intents: pd.DataFrame, published) -> None:
    """Products in the description, and the category, are those of the clicks in train, by the published tables."""
    clicks = published.impressions.query("clicked == 1").merge(published.sessions, on="session_id")
    products = clicks[clicks["split"] == "train"].groupby("intent_id")["product"]
    for row in intents.itertuples():
        asked = sorted(products.get_group(row.intent_id)) if row.intent_id in products.groups else []
        told = row.description.partition(" Asked about products: ")[2].removesuffix(".").split("; ")
        assert told == (sorted(set(asked)) or [""])
        assert pd.isna(row.category) if not asked else asked.count(row.category) == max(map(asked.count, asked))
    assert intents["category"].isna().sum() == intents["valid_from"].notna().sum() > 0


def test_rows_left_out_are_counted(public_data):
    left_out = cfpb.cfpb(public_data / "cfpb2014" / "raw" / "Consumer_Complaints.csv", seed=1).meta["left_out"]
    assert left_out == {"rows with another number of fields": 1, "rows without an issue": 2}


@pytest.mark.parametrize("name", ["cfpb", "msweb"])
def test_an_adapted_folder_passes_the_check_and_is_read_back(tmp_path, name):
    if name == "cfpb":
        dataset = read(write_csv(tmp_path / "c.csv", in_2020(complaints())))
    else:
        dataset = sources.msweb(write_msweb(tmp_path / "uci"), seed=1)
    tables.write(dataset, tmp_path / "out")
    again = tables.read(tmp_path / "out", splits=SPLITS)
    for table in ("intents", "sessions", "impressions"):
        assert getattr(again, table).equals(getattr(dataset, table))
    assert again.meta == dataset.meta
    assert again.meta["sampled_negatives"] == {"popularity": 15, "uniform": 4, "smoothing": 0.5}


def test_every_spelling_gives_the_same_sessions(tmp_path):
    frame = complaints()
    old = read(write_csv(tmp_path / "a.csv", in_2014(frame)))
    new = read(write_csv(tmp_path / "b.csv", in_2020(frame), encoding="utf-8-sig", quoting=csv.QUOTE_ALL))
    api = read(write_csv(tmp_path / "c.csv", in_the_search_api(frame)))
    assert new.sessions.drop(columns="tags").equals(old.sessions)
    assert api.sessions.equals(new.sessions)
    assert old.intents.equals(new.intents)
    assert new.intents.equals(api.intents)
    assert old.impressions.equals(api.impressions)
    assert new.kinds == old.kinds | {"tags": "categorical"}
    assert old.transcripts is None
    assert set(new.transcripts["typed_query"]) == {"They call me,\nevery day {x}"}
    assert len(new.transcripts) == 20
    assert new.transcripts.equals(api.transcripts)


def test_what_comes_after_the_complaint_stays_out(tmp_path):
    dataset = read(write_csv(tmp_path / "a.csv", in_2020(complaints())))
    assert not {"company response", "timely response", "consent"} & {
        name.replace("_", " ") for name in dataset.sessions
    }
    assert not dataset.sessions.astype(str).eq("Closed").any(axis=None)
    assert "They call" not in dataset.sessions.to_csv()  # the narrative tells the reason


def test_small_matters_of_the_cfpb(tmp_path):
    dataset = read(write_csv(tmp_path / "a.csv", in_2014(complaints())))
    sessions, intents = dataset.sessions, dataset.intents.set_index("title")
    assert sessions["timestamp"].is_monotonic_increasing
    assert set(sessions["zip3"]) == {"750", "061"}
    assert sessions["split"].value_counts().to_dict() == {"train": 28, "valid": 4, "test": 8}
    assert intents["valid_from"].dropna().to_dict() == {"A new issue": pd.Timestamp("2014-08-03")}
    assert intents.loc["Not my debt: Paid it", "description"] == (
        "The customer complains about: Not my debt. Detail: Paid it. Asked about products: Debt collection."
    )


def test_what_the_knowledge_base_says_does_not_depend_on_valid_and_test(tmp_path):
    frame = complaints()
    late = frame["Date received"] > "07/03/2014"
    altered = frame.assign(Product=frame["Product"].where(~late, "Something unheard of"))
    one, other = (read(write_csv(tmp_path / f"{n}.csv", in_2014(f))) for n, f in enumerate((frame, altered)))
    assert one.intents.equals(other.intents)
    assert not one.sessions.equals(other.sessions)


@pytest.mark.parametrize(
    ("written", "expected", "day_first"),
    [
        ("11/13/2014", "2014-11-13", None),
        ("13/11/2014", "2014-11-13", None),
        ("13.11.2014", "2014-11-13", None),
        ("3.4.2014", "2014-04-03", None),
        ("13-11-2014", "2014-11-13", None),
        ("11/13/14", "2014-11-13", None),
        ("2014-11-13", "2014-11-13", None),
        ("2014/11/13", "2014-11-13", None),
        ("20141113", "2014-11-13", None),
        ("2014-11-13T12:00:00-05:00", "2014-11-13", None),
        ("11/13/2014 01:30:00 PM", "2014-11-13", None),
        ("13 Nov 2014", "2014-11-13", None),
        ("13-NOV-14", "2014-11-13", None),
        ("November 13, 2014", "2014-11-13", None),
        ("13 NOVEMBER 2014", "2014-11-13", None),
        ("8 Oct 2014 10:00", "2014-10-08", None),
        ("03/04/2014", "2014-03-04", False),
        ("03/04/2014", "2014-04-03", True),
        ("04/04/2014", "2014-04-04", None),
    ],
)
def test_every_form_of_a_date(tmp_path, written, expected, day_first):
    frame = in_2014(complaints()).assign(**{"Date received": written})
    rows, _ = cfpb.read_rows(write_csv(tmp_path / "a.csv", frame), day_first=day_first)
    assert set(rows["date_received"]) == {pd.Timestamp(expected)}


def test_one_date_that_leaves_no_doubt_settles_the_others(tmp_path):
    for last, expected in (("25/04/2014", "2014-04-03"), ("04/25/2014", "2014-03-04")):
        frame = in_2014(complaints()).assign(**{"Date received": ["03/04/2014"] * 39 + [last]})
        rows, _ = cfpb.read_rows(write_csv(tmp_path / "a.csv", frame))
        assert set(rows["date_received"]) == {pd.Timestamp(expected), pd.Timestamp("2014-04-25")}


@pytest.mark.parametrize(
    ("dates", "day_first", "words"),
    [
        (["03/04/2014"] * 40, None, ["'03/04/2014' may be 03 April 2014 or 04 March 2014", "data.day_first: true"]),
        (["13/04/2014", "04/13/2014"] * 20, None, ["mixes two forms: '13/04/2014' has the day first", "'04/13/2014'"]),
        (["13/04/2014", "04/13/2014"] * 20, True, ["20 rows are no date ('04/13/2014')", "expected 13/11/2014"]),
        (["2014-13-04"] * 40, None, ["40 rows are no date ('2014-13-04')"]),
        (["13 Foo 2014"] * 40, None, ["40 rows are no date"]),
    ],
)
def test_dates_in_doubt_are_a_question(tmp_path, dates, day_first, words):
    path = write_csv(tmp_path / "a.csv", in_2014(complaints()).assign(**{"Date received": dates}))
    with pytest.raises(TableError) as raised:
        cfpb.read_rows(path, day_first=day_first)
    for word in [str(path), "date_received", *words]:
        assert word in str(raised.value)


def test_several_files_are_read_as_one(tmp_path):
    frame = complaints()
    one = read(write_csv(tmp_path / "whole.csv", frame[HEADER_2014]))
    folder = tmp_path / "files"
    folder.mkdir()
    write_csv(folder / "a.csv", in_2014(frame.iloc[:15]))
    write_csv(folder / "b.CSV", in_2020(frame.iloc[15:]).drop(columns=["Tags", "Consumer complaint narrative"]))
    (folder / "notes.txt").write_text("not read")
    many = read(folder)
    for table in ("intents", "sessions", "impressions"):
        assert getattr(many, table).equals(getattr(one, table))


def test_faults_of_several_files_name_the_file(tmp_path):
    with pytest.raises(TableError, match=r"holds no \.csv"):
        read(tmp_path)
    for name in ("a", "b"):
        write_csv(tmp_path / f"{name}.csv", in_2014(complaints()))
    with pytest.raises(TableError, match=r"40 rows repeat a number .* in one file"):
        read(tmp_path)
    frame = in_2014(complaints()).drop(columns="Issue")
    write_csv(tmp_path / "b.csv", frame)
    with pytest.raises(TableError, match=r"b\.csv issue +is missing"):
        read(tmp_path)
    frame = in_2014(complaints()).assign(**{"Date received": "soon", "Complaint ID": [f"x{n}" for n in range(40)]})
    write_csv(tmp_path / "b.csv", frame)
    with pytest.raises(TableError, match=r"b\.csv date_received +40 rows are no date \('soon'\)"):
        read(tmp_path)


def test_seeds_change_the_lists_only(tmp_path):
    path = write_csv(tmp_path / "a.csv", in_2014(complaints()))
    one, same, other = (read(path, seed=seed) for seed in (1, 1, 2))
    assert one.impressions.equals(same.impressions)
    assert not one.impressions.equals(other.impressions)
    assert one.sessions.equals(other.sessions)


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        (lambda frame: frame.drop(columns=["Issue", "State"]), ["fails 2 checks", "issue", "state", "is missing"]),
        (lambda frame: frame.rename(columns={"Sub-issue": "Subissue"}), ["sub_issue", "did you mean 'subissue'?"]),
        (
            lambda frame: frame.assign(**{"Date received": ["soon", "31/31/2014", "201412"] + ["01/03/2014"] * 37}),
            ["3 rows are no date ('soon', '31/31/2014', '201412') (first: 0, 1, 2)", "11/13/2014 or 2014-11-13"],
        ),
        (lambda frame: frame.assign(**{"Complaint ID": "7"}), ["complaint_id", "39 rows repeat a number (first: '7')"]),
        (lambda frame: frame.assign(**{"Complaint ID": ""}), ["complaint_id", "40 rows are empty (first: 0, 1, 2)"]),
        (lambda frame: frame.assign(Issue=""), ["none of 40 rows has an issue"]),
        (lambda frame: frame.assign(**{"Date received": "01/03/2014"}), ["split", "part empty"]),
        (lambda frame: frame.iloc[:0], ["none of 0 rows has an issue"]),
    ],
)
def test_a_bad_csv_is_refused_with_column_and_rows(tmp_path, fault, words):
    path = write_csv(tmp_path / "bad.csv", fault(in_2014(complaints())))
    with pytest.raises(TableError) as raised:
        read(path)
    for word in [str(path), *words]:
        assert word in str(raised.value)


def test_files_that_are_no_csv_are_refused(tmp_path):
    with pytest.raises(TableError, match=r"nowhere\.csv"):
        cfpb.cfpb(tmp_path / "nowhere.csv", seed=1)
    (tmp_path / "latin.csv").write_bytes(",".join(HEADER_2014).encode() + b"\n" + b"\xe9," * 13 + b"\n")
    with pytest.raises(TableError, match=r"latin\.csv"):
        cfpb.cfpb(tmp_path / "latin.csv", seed=1)
    path = write_csv(tmp_path / "ragged.csv", in_2014(complaints()))
    path.write_text("\n".join(line + ",x" * (n > 30) for n, line in enumerate(path.read_text().splitlines())))
    with pytest.raises(TableError, match="10 rows have another number of fields"):
        cfpb.cfpb(path, seed=1)


AREAS = 'I,4,"www.microsoft.com","created by getlog.pl"\n' + "".join(
    f'A,{1000 + n},1,"Area {n} Support ","/area{n}"\n' for n in range(6)
)


def write_msweb(folder, extra: str = ""):
    folder.mkdir()
    generator = np.random.default_rng(3)
    for name, users in (("data", 60), ("test", 20)):
        lines = [AREAS]
        for user in range(users):
            lines.append(f'C,"{user}",{user}\n')
            lines += [f"V,{1000 + area},1\n" for area in generator.permutation(5)[: 1 + user % 4]]
        (folder / f"anonymous-msweb.{name}").write_text("".join(lines) + extra)
    return folder


def test_msweb_withholds_one_visited_area(tmp_path):
    folder = write_msweb(tmp_path / "uci")
    dataset = sources.msweb(folder, seed=5)
    assert dataset.meta["left_out"] == {"users with a single area": 20}
    assert dataset.sessions["split"].eq("test").sum() == 15
    assert dataset.intents["intent_id"].tolist() == [f"v{1000 + n}" for n in range(5)]  # nobody visited the sixth
    clicked = dataset.impressions.query("clicked == 1").set_index("session_id")["intent_id"]
    visits = {}
    for line in (folder / "anonymous-msweb.data").read_text().splitlines():
        if line.startswith("C"):
            user = visits["wtr" + line.split(",")[2]] = []
        elif line.startswith("V"):
            user.append("v" + line.split(",")[1])
    for session, recent in zip(dataset.sessions["session_id"], dataset.sessions["recent"], strict=True):
        if session in visits:
            assert sorted([*recent, clicked[session]]) == sorted(visits[session])
            assert [area for area in visits[session] if area != clicked[session]] == list(recent)
            shown = set(dataset.impressions.query("session_id == @session")["intent_id"])
            assert not shown & set(recent)


@pytest.mark.parametrize("line", ["V,9999,1", "X,1", "A,1", 'C,"1"'])
def test_a_bad_msweb_line_is_named(tmp_path, line):
    folder = write_msweb(tmp_path / "uci", extra=line + "\n")
    with pytest.raises(TableError, match=r"anonymous-msweb\.data: 1 lines cannot be read \(first: \d+\)"):
        sources.msweb(folder)
    with pytest.raises(TableError, match=r"anonymous-msweb\.data is missing"):
        sources.msweb(tmp_path)
