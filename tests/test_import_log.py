"""`python -m rgalign import`: a click log in any dress becomes the tables that it says, or one clear error."""

import json
import shlex
import shutil
from datetime import datetime, timedelta

import numpy as np
import pandas as pd
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from rgalign.__main__ import main
from rgalign.commands import import_log
from rgalign.data.sources import write_dataset
from rgalign.data.tables import check, read
from rgalign.params import ROOT, load

START = datetime(2026, 3, 1)
ANSWERS = {"renew": "Renew a loan", "pay": "Pay a fee", "card": "Replace a card", "lost": "Report a lost book"}
SPLITS = ["train", "train", "train", "valid", "test"]


def log_of(sessions: int = 60, **columns) -> pd.DataFrame:
    """One row a shown intent, in the schema's names; every session but each third has a click. columns: function of
    (session, intent, place, clicked) -> value."""
    rows, draw = [], np.random.default_rng(0)
    for session in range(sessions):
        shown = draw.permutation(list(ANSWERS))[:3]
        wanted = int(draw.integers(3))
        for place, intent in enumerate(shown):
            clicked = int(session % 3 > 0 and place == wanted)
            row = {
                "session_id": f"v{session:03d}",
                "user_id": f"m{session % 17:02d}",
                "timestamp": START + timedelta(hours=session),
                "split": SPLITS[session % 5],
                "intent_id": intent,
                "title": ANSWERS[intent],
                "position": place,
                "clicked": clicked,
                "status": ["open", "late", "lost"][session % 7 % 3],
            }
            rows.append(row | {name: of(session, intent, place, clicked) for name, of in columns.items()})
    return pd.DataFrame(rows)


def run(log: pd.DataFrame | str | bytes, folder, *flags: str, name: str = "log.csv", yes: bool = True) -> int:
    """Exit status of the command on this log; the data set is folder/shop."""
    path = folder / name
    if isinstance(log, pd.DataFrame):
        log.to_csv(path, index=False)
    else:
        path.write_bytes(log if isinstance(log, bytes) else log.encode())
    return command(str(path), folder, *flags, *["--yes"] * yes)


def command(log: str, folder, *flags: str) -> int:
    """The exit status where `folder` is the project: it has params/quickstart.yaml."""
    (folder / "params").mkdir(exist_ok=True)
    shutil.copy(ROOT / "params/quickstart.yaml", folder / "params")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(import_log, "ROOT", folder)
        return main(["import", log, str(folder / "shop"), *flags])


def tables_of(folder) -> dict[str, pd.DataFrame]:
    return {path.stem: pd.read_parquet(path) for path in sorted((folder / "shop").glob("*.parquet"))}


def mapping_of(printed: str) -> dict[str, str]:
    """Column -> what it becomes, of the printed table."""
    lines = [line.split("  ") for line in printed.splitlines() if "  " in line and not line.startswith(" ")]
    return {words[0]: next(word for word in words[1:] if word).strip() for words in lines}


# The property: the tables do not depend on how the log is dressed.


@st.composite
def logs(draw) -> pd.DataFrame:
    rows = []
    for session in range(draw(st.integers(5, 9))):
        shown = draw(st.permutations(list(ANSWERS)))[: draw(st.integers(2, 4))]
        wanted = draw(st.integers(0, len(shown) - 1))
        known = {
            "session_id": f"{session:03d}",
            "user_id": f"00{session}",
            "timestamp": START + timedelta(seconds=draw(st.integers(0, 10**7))),
            "split": SPLITS[session % 5],
            "status": draw(st.sampled_from(["open", "a;b,c", 'say "no"', "NA", "é\nline"])),
            "days": draw(st.none() | st.integers(-5, 10**6)),
        }
        for place, intent in enumerate(shown):
            row = {"intent_id": intent, "title": ANSWERS[intent], "position": place, "clicked": int(place == wanted)}
            rows.append(known | row)
    return pd.DataFrame(rows).astype({"days": "Int64"})


RENAMED = {
    "session_id": ["visit", "Session ID", "requestId"],
    "user_id": ["member", "customer_id"],
    "timestamp": ["time", "Created At"],
    "intent_id": ["item", "answer_id"],
    "title": ["answer", "headline"],
    "position": ["slot", "Rank"],
    "clicked": ["click", "isClicked"],
}


@settings(max_examples=25, deadline=None)
@given(log=logs(), data=st.data())
def test_any_dress_gives_the_same_tables(log, data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("dress")
    dressed = log.copy()
    since = (log.timestamp - datetime(1970, 1, 1)) // timedelta(milliseconds=1)
    time = data.draw(st.sampled_from(["iso", "zone", "s", "ms"]))
    dressed["timestamp"] = {
        "iso": log.timestamp.astype(str),
        "zone": log.timestamp.dt.strftime("%Y-%m-%dT%H:%M:%S+00:00"),
        "s": since // 1000,
        "ms": since,
    }[time]
    dressed["position"] += data.draw(st.integers(0, 1))
    yes, no = data.draw(st.sampled_from([("1", "0"), ("true", "false"), ("Yes", "No")]))
    dressed["clicked"] = np.where(log.clicked == 1, yes, no)
    dressed = dressed.sample(frac=1, random_state=data.draw(st.integers(0, 99)))
    dressed = dressed[data.draw(st.permutations(list(dressed)))]
    dressed = dressed.rename(columns={name: data.draw(st.sampled_from([name, *RENAMED[name]])) for name in RENAMED})
    delimiter = data.draw(st.sampled_from([",", ";", "\t"]))
    text = dressed.to_csv(index=False, sep=delimiter)
    text = data.draw(st.sampled_from(["", f"sep={delimiter}\n", "\ufeff"])) + text
    assert run(text, folder, "--feature", "status=categorical", "--feature", "days=numeric") == 0

    found = tables_of(folder)
    sessions = log.drop_duplicates("session_id").sort_values(["timestamp", "session_id"]).reset_index(drop=True)
    columns = ["session_id", "user_id", "timestamp", "split", "status", "days"]
    pd.testing.assert_frame_equal(found["sessions"][columns], sessions[columns], check_dtype=False)
    assert found["sessions"].region.isna().all()
    titles = log[["intent_id", "title"]].drop_duplicates().sort_values("intent_id").reset_index(drop=True)
    pd.testing.assert_frame_equal(found["intents"][["intent_id", "title"]], titles, check_dtype=False)
    shown = log.merge(sessions.session_id.reset_index().rename(columns={"index": "row"}))
    shown = shown.sort_values(["row", "position"])[["session_id", "intent_id", "position", "clicked"]]
    pd.testing.assert_frame_equal(found["impressions"], shown.reset_index(drop=True), check_dtype=False)
    kinds = yaml.safe_load((folder / "shop/dataset.yaml").read_text(encoding="utf-8"))["features"]
    assert kinds == {"status": "categorical", "days": "numeric"}


# The way of a user.


def test_a_csv_is_imported_checked_loaded_and_read_as_a_source(tmp_path, capsys):
    log = log_of(
        searched=lambda s, *_: ["loan", "", "fee"][s % 4 % 3], typed=lambda s, *_: "hello" if s % 4 == 0 else None
    )
    assert run(log, tmp_path) == 0
    folder = tmp_path / "shop"
    last = capsys.readouterr().out.splitlines()[-3:]
    for line, words in zip(last, (["check"], ["run", "--dry-run"], ["run"]), strict=True):
        assert shlex.split(line)[:3] == ["python", "-m", "rgalign"]
        assert words == [word for word in shlex.split(line)[3:] if "/" not in word]
    assert check(folder).errors == []
    params = load(tmp_path / "params/shop.yaml")
    assert (params.data.source, params.ranker.tuned) == ("folder", {})
    assert params.alignment.sft.use
    kinds = write_dataset(tmp_path / "run", params.data, folder)
    assert kinds == {"status": "categorical", "searched": "text"}
    read_back = read(tmp_path / "run", splits=("train", "valid", "test"))
    assert len(read_back.sessions) == log.session_id.nunique()
    assert read_back.impressions.clicked.sum() == log.clicked.sum()
    assert set(read_back.transcripts.session_id) == set(log[log.typed.notna()].session_id)


def test_without_transcripts_the_params_leave_out_what_needs_them(tmp_path):
    assert run(log_of(), tmp_path) == 0
    alignment = load(tmp_path / "params/shop.yaml").alignment
    assert not alignment.sft.use
    assert not alignment.dpo.use


def test_without_yes_nothing_is_written_and_the_command_to_confirm_is_printed(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("sys.stdin.isatty", lambda: False, raising=False)
    flags = ["--column", "user_id=the user", "--drop", "x y"]
    log = log_of(**{"x y": lambda s, *_: s % 4}).rename(columns={"user_id": "the user"})
    assert run(log, tmp_path, *flags, yes=False) == 0
    assert not (tmp_path / "shop").exists()
    printed = capsys.readouterr().out
    (line,) = [line for line in printed.splitlines() if line.strip().startswith("python -m rgalign import")]
    words = shlex.split(line)
    assert words[:4] == ["python", "-m", "rgalign", "import"]
    assert command(words[4], tmp_path, *words[6:]) == 0
    assert (tmp_path / "shop/dataset.yaml").is_file()
    assert mapping_of(printed)["the user"] == "user_id"
    assert mapping_of(printed)["x y"] == "left out: as asked"


def test_a_folder_that_is_there_is_left_alone(tmp_path, capsys):
    (tmp_path / "shop").mkdir()
    (tmp_path / "shop/mine.txt").write_text("mine")
    assert run(log_of(), tmp_path) == 1
    assert "already there" in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "shop").iterdir()] == ["mine.txt"]


# What is left out, and why.


def test_columns_known_after_the_click_that_vary_or_are_personal_are_left_out_and_named(tmp_path, capsys):
    log = log_of(
        300,
        dwell=lambda s, i, p, clicked: 3.5 * s if clicked else None,
        any_dwell=lambda s, *_: 10 + s if s % 3 else None,
        bought=lambda s, *_: 0 if s % 3 == 0 else s % 2,
        score=lambda s, i, p, clicked: s + p / 10,
        email=lambda s, *_: f"m{s}@example.org",
        reach=lambda s, *_: f"+49 170 55 55 {s:03d}",
        days=lambda s, *_: s % 7 if s % 2 else None,
        device=lambda s, *_: ["phone", "desk"][s % 2],
        opened_in=lambda s, *_: f"{s % 7:03d}",
        constant=lambda *_: "web",
    )
    solved = log[log.clicked == 1].set_index("session_id").title
    log["solved_by"] = log.session_id.map(solved)
    assert run(log, tmp_path) == 0
    printed = capsys.readouterr().out
    becomes = mapping_of(printed)
    out = {column for column, what in becomes.items() if what.startswith("left out")}
    assert out == {"dwell", "any_dwell", "score", "email", "reach", "constant", "solved_by", "bought"}
    kinds = yaml.safe_load((tmp_path / "shop/dataset.yaml").read_text())["features"]
    assert kinds == {
        "status": "categorical",
        "days": "numeric",
        "device": "categorical",
        "opened_in": "categorical",
    }
    reasons = {line.split()[0]: line for line in printed.splitlines() if "left out" in line}
    assert "varies inside" in reasons["dwell"]
    assert "varies inside" in reasons["score"]
    assert "known after the click" in reasons["any_dwell"]
    assert "known after the click" in reasons["solved_by"]
    assert "known after the click" in reasons["bought"]
    assert "personal" in reasons["email"]
    assert "personal" in reasons["reach"]
    assert not out & set(tables_of(tmp_path)["sessions"])


def test_a_region_is_a_feature(tmp_path):
    assert run(log_of().rename(columns={"status": "country"}), tmp_path) == 0
    kinds = yaml.safe_load((tmp_path / "shop/dataset.yaml").read_text())["features"]
    assert kinds == {"region": "categorical"}
    assert set(tables_of(tmp_path)["sessions"].region) == {"open", "late", "lost"}


def test_a_feature_that_is_asked_for_stays(tmp_path):
    log = log_of(any_dwell=lambda s, *_: 10 + s if s % 3 else None, level=lambda s, *_: s % 4)
    assert run(log, tmp_path, "--feature", "any_dwell=numeric", "--feature", "level=categorical") == 0
    kinds = yaml.safe_load((tmp_path / "shop/dataset.yaml").read_text())["features"]
    assert kinds == {"status": "categorical", "any_dwell": "numeric", "level": "categorical"}


def test_users_that_are_addresses_are_told(tmp_path, capsys):
    log = log_of(typed=lambda s, *_: f"call +49 170 55 55 {s:03d}" if s < 7 else "hello")
    log["user_id"] += "@example.org"
    assert run(log, tmp_path) == 0
    printed = capsys.readouterr().out
    assert "user_id holds e-mail addresses or telephone numbers in 60 sessions" in printed
    assert "typed holds e-mail addresses or telephone numbers in 7 sessions" in printed
    assert "@example" not in printed


# What is mended, and said.


def test_positions_with_gaps_keep_their_order_and_it_is_said(tmp_path, capsys):
    log = log_of()
    log["position"] = 4 * log.position + 2
    assert run(log, tmp_path) == 0
    assert "60 of 60 sessions" in capsys.readouterr().out
    expected = log_of()[["session_id", "intent_id", "position"]]
    pd.testing.assert_frame_equal(tables_of(tmp_path)["impressions"][list(expected)], expected, check_dtype=False)


def test_rows_that_repeat_another_are_kept_once_and_it_is_said(tmp_path, capsys):
    assert run(pd.concat([log_of(), log_of().head(7)]), tmp_path) == 0
    assert "7 rows repeat another one" in capsys.readouterr().out
    assert len(tables_of(tmp_path)["impressions"]) == len(log_of())


@pytest.mark.parametrize(("unit", "number"), [("seconds", 1), ("milliseconds", 10**3), ("nanoseconds", 10**9)])
def test_the_unit_of_numbers_is_said(tmp_path, capsys, unit, number):
    log = log_of()
    expected = log.timestamp.drop_duplicates().tolist()
    log["timestamp"] = [int((time - datetime(1970, 1, 1)).total_seconds()) * number for time in log.timestamp]
    assert run(log, tmp_path) == 0
    assert f"timestamp is read as {unit} since 1970: 2026-03-01 00:00" in capsys.readouterr().out
    assert tables_of(tmp_path)["sessions"].timestamp.tolist() == expected


def test_times_of_the_rows_become_the_session_s_first(tmp_path, capsys):
    log = log_of()
    log["timestamp"] += pd.to_timedelta(log.position, unit="s")
    assert run(log, tmp_path) == 0
    assert "differs inside 60 sessions" in capsys.readouterr().out
    assert tables_of(tmp_path)["sessions"].timestamp.tolist() == log_of().timestamp.drop_duplicates().tolist()


def test_a_format_of_times_can_be_given(tmp_path):
    log = log_of()
    log["timestamp"] = log.timestamp.dt.strftime("%d.%m.%Y %H:%M")
    assert run(log, tmp_path) == 1
    assert run(log, tmp_path, "--time-format", "%d.%m.%Y %H:%M") == 0
    assert tables_of(tmp_path)["sessions"].timestamp.tolist() == log_of().timestamp.drop_duplicates().tolist()


# Other kinds of files.


def test_json_lines_with_histories(tmp_path):
    log = log_of(recent=lambda s, *_: ["a", "b"][: s // 3 % 3], nested=lambda *_: {"a": 1})
    lines = log.assign(timestamp=log.timestamp.astype(str)).to_dict("records")
    assert run("\n".join(map(json.dumps, lines)), tmp_path, name="log.jsonl") == 0
    found = tables_of(tmp_path)["sessions"]
    assert [list(value) for value in found.recent] == [["a", "b"][: s // 3 % 3] for s in range(60)]
    assert "nested" not in found


def test_customers_words_are_data(tmp_path, capsys):
    """Nothing that a log says is read as YAML, a format, a path or a control sequence of the terminal."""
    strange = ["{base}", "a: b # c", "!!python/object:os.system", "../../etc", "\x1b[2J", "%s", "*x", "1e5", "null"]
    log = log_of(**{f"{name} status": (lambda s, *_, k=k: strange[(s + k) % 9]) for k, name in enumerate(strange)})
    log["title"] = log.intent_id.map(dict(zip(ANSWERS, strange, strict=False)))
    assert run(log, tmp_path) == 0
    printed = capsys.readouterr().out
    assert "\x1b" not in printed
    found = tables_of(tmp_path)
    assert list(found["intents"].title) == [strange[list(ANSWERS).index(intent)] for intent in sorted(ANSWERS)]
    for k, name in enumerate(strange):
        assert list(found["sessions"][f"{name} status"]) == [strange[(s + k) % 9] for s in range(60)]
    load(tmp_path / "params/shop.yaml")


# Bad inputs: one error that names the file or column, and nothing is written.

RAGGED = log_of(20).to_csv(index=False).splitlines()
BAD = {
    "empty": ("", ["log.csv", "is empty"]),
    "names alone": (RAGGED[0] + "\n", ["log.csv", "no row"]),
    "not UTF-8": (
        "\n".join(RAGGED).replace("Pay", "P\xe4y").encode("latin-1"),
        ["no UTF-8 in 13 lines (first: line 4)", "save it"],
    ),
    "ragged": (
        "\n".join([*RAGGED[:5], RAGGED[5] + ",more", *RAGGED[6:]]),
        ["1 rows have not the 9 columns", "row 6 has 10"],
    ),
    "an open quote": (
        "\n".join([*RAGGED[:30], RAGGED[30].replace(",lost", ',"lost'), *RAGGED[31:]]),
        ["row 30", "never closed"],
    ),
    "UTF-16": (log_of().to_csv(index=False).encode("utf-16"), ["no UTF-8"]),
    "two names alike": (log_of().assign(x=1).rename(columns={"x": "status "}), ["'status' more than once"]),
    "no click": (log_of().drop(columns="clicked"), ["no column is clicked", "--column clicked=NAME"]),
    "no session": (log_of().drop(columns="session_id"), ["no column is session_id", "--column session_id=NAME"]),
    "no intent": (log_of().drop(columns=["intent_id", "title"]), ["no column is intent_id or title"]),
    "two sessions": (
        log_of().rename(columns={"session_id": "visit"}).assign(request=lambda log: log.visit),
        ["may be 'visit' or 'request'", "--column session_id=NAME"],
    ),
    "clicked is a count": (
        log_of().assign(clicked=lambda log: 2 * log.clicked),
        ["column clicked", "'2'", "expected 1 or 0"],
    ),
    "clicked is empty": (log_of().replace({"clicked": {0: None}}), ["column clicked", "neither yes nor no: ''"]),
    "a pair twice": (log_of().assign(intent_id="pay", title="Pay a fee"), ["an intent twice in one session"]),
    "a place twice": (log_of().assign(position=1), ["column position", "the place of another"]),
    "a place is a word": (log_of().assign(position="top"), ["column position", "no whole number: 'top'"]),
    "half a place": (log_of().assign(position=lambda log: log.position + 0.5), ["position", "whole number"]),
    "no year": (log_of().assign(timestamp=lambda log: np.arange(len(log)) // 3), ["timestamp", "no times since 1970"]),
    "two units": (
        log_of().assign(timestamp=lambda log: np.where(log.index < 90, 1_770_000_000, 1_770_000_000_000)),
        ["timestamp", "in one unit"],
    ),
    "words for times": (log_of().assign(timestamp="yesterday"), ["timestamp", "'yesterday'", "--time-format"]),
    "half of the zones": (
        log_of().assign(timestamp=lambda log: log.timestamp.astype(str) + np.where(log.index < 90, "Z", "")),
        ["timestamp", "with a zone, others without"],
    ),
    "users change": (
        log_of().assign(user_id=lambda log: log.index.astype(str)),
        ["column user_id differs inside 60 sessions"],
    ),
    "no time": (log_of().drop(columns=["timestamp", "split"]), ["timestamp", "none split"]),
    "no feature": (log_of().drop(columns="status"), ["at least one (--feature NAME=KIND)"]),
    "empty ids": (log_of().replace({"session_id": {"v003": None}}), ["session_id", "empty"]),
    "nothing clicked": (log_of().assign(clicked=0), ["clicked", "no session of train"]),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_log_is_one_clear_error(case, tmp_path, capsys):
    log, words = BAD[case]
    if isinstance(log, pd.DataFrame):
        text = log.to_csv(index=False)
        log = text.replace("status ", "status") if case == "two names alike" else text
    assert run(log, tmp_path) == 1
    error = capsys.readouterr().err
    for word in words:
        assert word in error, error
    assert error.count("error:") == 1
    assert "Traceback" not in error
    assert sorted(path.name for path in tmp_path.iterdir()) == ["log.csv", "params"]
    assert [path.name for path in (tmp_path / "params").iterdir()] == ["quickstart.yaml"]


def test_all_faults_come_at_once(tmp_path, capsys):
    log = log_of().assign(timestamp="soon", clicked="maybe", position=1)
    flags = ["--column", "sesion_id=status", "--feature", "stats=text", "--drop", "nothing"]
    assert run(log, tmp_path, *flags) == 1
    error = capsys.readouterr().err
    for word in (
        "'soon'",
        "'maybe'",
        "place of another",
        "sesion_id is no role",
        "did you mean 'session_id'",
        "'status'?",
    ):
        assert word in error, error
    assert "there is no column 'nothing'" in error


@pytest.mark.parametrize("name", ["log.xlsx", "log.parquet", "log.jsonl"])
def test_a_file_of_another_kind_is_named(name, tmp_path, capsys):
    assert run("{not this", tmp_path, name=name) == 1
    assert name in capsys.readouterr().err


def test_a_missing_file_is_named(tmp_path, capsys):
    assert command(str(tmp_path / "log.csv"), tmp_path, "--yes") == 1
    assert "no file" in capsys.readouterr().err
