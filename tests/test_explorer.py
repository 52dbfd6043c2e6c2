"""The tour on a small run: what it shows is what the run's models say, and what is typed is never obeyed."""

import shutil

import pytest
from small_run import play

import rgalign
from rgalign.report.explorer import AFTER, BEFORE, CLICKED, widget

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def tour(aligned_run):
    """The notebook's variables at its end."""
    return play("00_tour", *aligned_run)


def test_the_tour_follows_one_customer_through_every_model(tour):
    explorer, written, shown = (tour[name] for name in ("explorer", "written", "shown"))
    assert set(written.written) == {BEFORE, AFTER}
    assert written.groupby("written").drawn.min().tolist() == [0, 0], "the greedy one is there"
    assert written.reward.notna().any()
    assert list(shown) == ["two-tower + text", "QE-Rec", "RGAlign-Rec"]
    assert set(explorer.sessions.split) == {"valid"}, "the test split stays closed"


def test_it_shows_what_the_scorer_ranks_and_marks_the_click(aligned_run, tour):
    explorer = tour["explorer"]
    scorer = rgalign.load(aligned_run[0])
    for session in explorer.sessions.session_id.head(5):
        row = explorer.session(session)
        best = scorer.score(row, top=96)
        mine = explorer.ranking(row, k=len(best))["RGAlign-Rec"]
        assert mine.str.removesuffix(CLICKED).tolist() == best.title.tolist()
        marked = set(best.intent_id[mine.str.endswith(CLICKED).to_numpy()])
        assert marked == explorer.clicked[session]


def test_choosing_another_session_changes_the_page(tour):
    box = widget(tour["explorer"])
    first, one, other = box.page.value, *box.session.options[:2]
    box.session.value = other
    assert box.page.value != first
    assert box.page.value == tour["explorer"].page(other)
    box.session.value = one
    assert box.page.value == first


def test_what_is_typed_is_read_and_can_be_taken_back(tour):
    explorer = tour["explorer"]
    box = widget(explorer)
    before, field = box.page.value, box.features["event_text"]
    was = field.value
    field.value = "<script>alert(1)</script> where is my parcel"
    assert "<script>" not in box.page.value
    assert CLICKED not in box.page.value.split("<table", 1)[1], "no click belongs to a session that was not"
    assert box.page.value != before
    field.value = was
    assert box.page.value == before


def test_a_word_where_a_number_belongs_is_told(tour):
    explorer = tour["explorer"]
    number = next(name for name in explorer.typed if explorer.kinds[name] == "numeric")
    box = widget(explorer)
    box.features[number].value = "<b>many"
    assert box.page.value == f"<p>{number} is a number; found &#x27;&lt;b&gt;many&#x27;</p>"
    box.features[number].value = ""
    assert "The rankers show" in box.page.value, "nothing typed: missing"
    with pytest.raises(ValueError, match="'nobody' is no session of the valid split"):
        explorer.session("nobody")
    with pytest.raises(ValueError, match="user_id is no feature that can be typed"):
        explorer.session(explorer.sessions.session_id[0], {"user_id": "x"})


def test_the_tours_customer_comes_first_and_every_session_can_be_chosen(tour):
    explorer, box = tour["explorer"], widget(tour["explorer"])
    assert box.session.value == explorer.sessions.session_id[0] == tour["chosen"]
    assert sorted(box.session.options) == sorted(explorer.sessions.session_id)
    assert len(box.session.options) == len(explorer.clicked.keys() & set(explorer.lists.session_id))


def test_a_categorical_column_offers_what_training_knew_and_refuses_the_rest(tour):
    explorer = tour["explorer"]
    name, values = next((name, values) for name, values in explorer.allowed.items() if len(values) > 1)
    train = explorer.scorers["qe_rec"].ranking.seen[name]
    field = widget(explorer).features[name]
    offered = {value for _, value in field.options}
    assert set(train) <= offered
    assert offered - set(train) <= {"", field.value}
    session = explorer.sessions.session_id[0]
    with pytest.raises(ValueError, match=f"{name} is one of {values[0]}.*; found 'never seen'"):
        explorer.session(session, {name: "never seen"})
    assert explorer.session(session, {name: values[1]})[name].item() == values[1]


def test_terms_add_up_to_the_score_that_is_served(tour, ranked, tmp_path):
    assert tour["explorer"].terms(tour["row"]).empty, "its rankers read no match terms"
    run, asked = (
        shutil.copytree(ranked, tmp_path / "run"),
        {"alignment.loop.rounds": 0, "ranker.match": ["word_overlap"]},
    )
    for name in ("02_reasoner", "03_rankers", "09_evaluation"):
        play(name, run, asked)
    last = play("00_tour", run, asked)
    explorer, row = last["explorer"], last["row"]
    table, served = explorer.terms(row), explorer.scorers["qe_rec"].score(row, top=5)
    assert list(table) == ["title", "interaction", "word_overlap", "score"]
    assert table.title.tolist() == served.title.tolist()
    assert table[["interaction", "word_overlap"]].sum(axis=1).tolist() == pytest.approx(served.score.tolist(), abs=1e-4)
    assert table.word_overlap.nunique() > 1
    assert "add up from" in explorer.page(row.session_id[0])


def test_it_says_while_it_works_and_is_silent_after(tour):
    box, said = widget(tour["explorer"]), []
    box.busy.observe(lambda change: said.append(change["new"]), "value")
    box.session.value = box.session.options[1]
    assert "at work" in said[0]
    assert said[-1] == box.busy.value == ""


def test_a_run_without_alignment_has_its_tour_too(ranked, tmp_path):
    run = shutil.copytree(ranked, tmp_path / "run")
    none = {"alignment.loop.rounds": 0}
    play("09_evaluation", run, none)
    shown = play("00_tour", run, none)["shown"]
    assert list(shown) == ["QE-Rec"]
