"""The params schema: what is refused, how it is said, and that shipped files are valid."""

import dataclasses
import re
from pathlib import Path
from typing import Literal

import pytest
import yaml
from hypothesis import example, given
from hypothesis import strategies as st

from rgalign.evaluation.results import MODELS
from rgalign.params import ParamsError, check, dump, flat, load, parse_assignments, shipped_files
from rgalign.params_schema import Params
from rgalign.params_training import CORE_RANKERS, RANKER_NAMES, RankerSettings
from rgalign.ranker.store import ARCHITECTURES
from rgalign.ranker.towers import INTERACTIONS
from rgalign.ranker.variants import RANKERS
from rgalign.report.plots import MODEL_STYLE

SHIPPED = shipped_files()


def params_file(folder: Path, text: str) -> Path:
    path = folder / "mine.yaml"
    path.write_text(text)
    return path


@pytest.mark.parametrize("path", SHIPPED, ids=lambda p: p.name)
def test_every_shipped_file_is_valid_and_reads_back_resolved(path, tmp_path):
    params = load(path)
    assert params.data.seed is not None
    assert params.ranker.seeds
    assert load(params_file(tmp_path, dump(params))) == params


def test_all_faults_are_reported_at_once_with_the_nearest_name(tmp_path):
    text = """
    ranker: {seds: [1], seeds: [1, -2]}
    run: {seed: 1.5}
    data: {source: cfpb, world: {distance: 3}}
    evalution: {}
    """
    with pytest.raises(ParamsError) as error:
        load(params_file(tmp_path, text))
    message = str(error.value)
    assert message.startswith("mine.yaml fails 6 checks:")
    for words in (
        "did you mean ranker.seeds?",
        "ranker.seeds.1",
        "found -2",
        "found 1.5",
        "data.path",
        "found 3",
        "did you mean evaluation?",
    ):
        assert words in message


@pytest.mark.parametrize(
    ("wrong", "meant"),
    [
        ("run.devise", "run.device"),
        ("data.world.distanse", "data.world.distance"),
        ("ranker.bootstrap", "evaluation.bootstrap"),  # the right name in the wrong section
        ("transcripts", "data.world.transcripts"),
    ],
)
def test_an_unknown_key_names_the_nearest_one(wrong, meant):
    with pytest.raises(ParamsError, match=f"did you mean {meant}"):
        load("params/smoke.yaml", {wrong: 1})


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("- a\n- b", "holds a list"),
        ("run: {", "cannot be read as YAML"),
        ("run:\n  seed: 1\n  seed: 2", "the key seed stands twice"),
        ("ranker: 3", "ranker"),
        ("run: {threads: yes}", "valid integer"),
        ("data: {dev_users: .nan}", "found nan"),
        ("!!python/object/apply:os.getcwd []", "cannot be read as YAML"),
        ("run: {seed: 2026-13-45}", "cannot be read as YAML"),
        ("[" * 5000, "cannot be read as YAML"),
        ("run: {seed: 0x" + "f" * 5000 + "}", "found a number of thousands of digits"),
        ("run: {seed: " + "9" * 5000 + "}", "cannot be read as YAML"),
    ],
)
def test_broken_files_end_in_one_clear_error(tmp_path, text, words):
    with pytest.raises(ParamsError, match=words):
        load(params_file(tmp_path, text))


def test_exponents_without_a_dot_are_numbers(tmp_path):
    assert yaml.safe_load("1e-1") == "1e-1"  # the trap: YAML 1.1 reads a string
    assert load(params_file(tmp_path, "data: {dev_users: 1e-1}")).data.dev_users == 0.1


def test_an_empty_file_and_empty_sections_are_the_defaults(tmp_path):
    assert load(params_file(tmp_path, "")) == load(params_file(tmp_path, "ranker:\nrun:\n"))


def test_a_file_says_only_what_it_changes_of_its_base(tmp_path):
    """Every leaf that the file does not name is the base's, and the run's own params.yaml has no base any more."""
    (tmp_path / "below").mkdir()
    below = "ranker: {seeds: [4, 5], epochs: 7}\ndata: {world: {sessions: 999}}\nreasoner: {others: [{}]}"
    (tmp_path / "mine.yaml").write_text(below)
    above = "base: ../mine.yaml\nranker: {seeds: [6]}\nreasoner: {others: []}\nrun: {seed: 3}"
    found = load(params_file(tmp_path / "below", above))
    changed = {"ranker.seeds": [6], "reasoner.others": [], "run.seed": 3}
    assert found == load(tmp_path / "mine.yaml", changed)
    assert (found.ranker.epochs, found.data.world.sessions) == (7, 999)
    assert load(params_file(tmp_path, dump(found))) == found


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("base: ../params/quikstart.yaml", r"which is not there; did you mean \.\./params/quickstart\.yaml"),
        ("base: [1]", "which is not there: expected a params file"),
        ("base:", "which is not there"),
        ("base: mine.yaml", r"bases that go in a circle: mine\.yaml -> mine\.yaml"),
        ("base: ../params/round.yaml", r"in a circle: mine\.yaml -> round\.yaml -> about\.yaml -> round\.yaml"),
        ("base: ../params/far0.yaml", r"more than 8 bases in a chain: mine\.yaml -> far0\.yaml"),
        ("base: ../params/lost.yaml", r"lost\.yaml has the base 'quikstart\.yaml', .*did you mean quickstart\.yaml"),
        ("base: ../params/list.yaml", "list.yaml holds a list"),
        ("base: ../params/quickstart.yaml\nrun: {sed: 1}", r"mine\.yaml fails 1 check.*\n.*did you mean run\.seed"),
    ],
)
def test_a_base_that_will_not_do_is_named(tmp_path, text, words):
    for folder in ("params", "own"):
        (tmp_path / folder).mkdir()
    files = {"quickstart": "run: {seed: 1}", "list": "- 1", "round": "base: about.yaml", "about": "base: round.yaml"}
    files |= {f"far{number}": f"base: far{number + 1}.yaml" for number in range(8)} | {"far8": "run: {seed: 1}"}
    for name, said in (files | {"lost": "base: quikstart.yaml"}).items():
        (tmp_path / "params" / f"{name}.yaml").write_text(said)
    with pytest.raises(ParamsError, match=words):
        load(params_file(tmp_path / "own", text))


def test_a_base_may_have_a_base(tmp_path):
    """Through three folders; the nearest file has the last word, and each name is seen from its own file."""
    said = {
        "mine.yaml": "base: a/one.yaml\nranker: {epochs: 1}",
        "a/one.yaml": "base: ../b/two.yaml\nranker: {epochs: 2, dim: 2}",
        "b/two.yaml": "base: three.yaml\nranker: {epochs: 3, dim: 3, experts: 3}\nrun: {seed: 3}",
        "b/three.yaml": "ranker: {seeds: [9]}\nrun: {seed: 4}",
    }
    for name, text in said.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    found = load(tmp_path / "mine.yaml")
    ranker = found.ranker
    assert (ranker.epochs, ranker.dim, ranker.experts, ranker.seeds, found.run.seed) == (1, 2, 3, (9,), 3)


BELOW = """
ranker: {epochs: 7, tuned: {two_tower: {dim: 4}, qe_rec: {dim: 8, epochs: 2}}}
data: {features: {min_count: 5}}
"""


@pytest.mark.parametrize(
    ("above", "tuned", "rest"),
    [
        ("ranker: {tuned: {}}", {}, (7, 5)),
        ("ranker: {tuned: {qe_rec: {}}}", {"two_tower": {"dim": 4}, "qe_rec": {}}, (7, 5)),
        ("ranker: {tuned: {qe_rec: {dim: 1}}}", {"two_tower": {"dim": 4}, "qe_rec": {"dim": 1, "epochs": 2}}, (7, 5)),
        ("ranker: {}", {}, (60, 5)),
        ("ranker:", {"two_tower": {"dim": 4}, "qe_rec": {"dim": 8, "epochs": 2}}, (7, 5)),
        ("data: {features: {}}\nranker:\n", {"two_tower": {"dim": 4}, "qe_rec": {"dim": 8, "epochs": 2}}, (7, 2)),
    ],
)
def test_an_empty_mapping_empties_what_the_base_has_there(tmp_path, above, tuned, rest):
    """At any depth of files between; what is said of nothing else stays, and an empty section says nothing."""
    (tmp_path / "low.yaml").write_text(BELOW)
    (tmp_path / "between.yaml").write_text("base: low.yaml\nrun: {seed: 1}")
    for base in ("low", "between"):
        found = load(params_file(tmp_path, f"base: {base}.yaml\n{above}"))
        assert found.model_dump()["ranker"]["tuned"] == tuned
        assert (found.ranker.epochs, found.data.features.min_count) == rest


def test_a_missing_file_names_the_nearest_shipped_one():
    with pytest.raises(ParamsError, match=r"did you mean params/quickstart\.yaml"):
        load("params/quikstart.yaml")


def test_overrides_and_the_file_go_through_the_same_door():
    params = load("params/smoke.yaml", {"ranker.seeds": [7, 8], "data.world.distance": 1})
    assert params.ranker.seeds == (7, 8)
    assert params.data.world.distance == 1


LIKE_YAML = ["Write question #1 of the customer", "Note: write one", "yes", "[INST] ask [/INST]", "2025-03-01", "- ask"]
LIKE_YAML += [
    "'quoted'",
    "null",
    "~",
    "12",
    "1e5",
    "0x1F",
    "ask\none",
    "{}",
    "[1, 2]",
    "a: b",
    "!!int 3",
    "&a",
    "*a",
    "",
]


@pytest.mark.parametrize("text", LIKE_YAML)
def test_a_python_string_given_as_an_override_stays_itself(text, tmp_path):
    """In every field that holds text, and in the run's own params.yaml, which is YAML."""
    given = {"reasoner.instruction": text, "run.warm_start": text, "data.features.drop": [text]}
    params = load("params/smoke.yaml", given)
    assert (params.reasoner.instruction, params.run.warm_start, params.data.features.drop) == (text, text, (text,))
    assert load(params_file(tmp_path, dump(params))) == params


@given(text=st.text(max_size=20))
def test_no_python_string_goes_through_yaml(text):
    assert load("params/smoke.yaml", {"reasoner.instruction": text}).reasoner.instruction == text


def test_text_for_a_number_is_judged_by_the_schema_alone():
    """`1e-5` is a number in every field of one ; no list, mapping, bool or int is made of text."""
    assert load("params/smoke.yaml", {"ranker.learning_rate": "1e-5"}).ranker.learning_rate == 1e-5
    wrong = {"ranker.seeds": "[0, 1]", "alignment.sft.use": "true", "ranker.epochs": "3", "ranker.tuned": "{}"}
    for key, text in wrong.items():
        with pytest.raises(ParamsError, match=rf"{key} .*found '{re.escape(text)}'"):
            load("params/smoke.yaml", {key: text})


def test_text_of_the_command_line_is_yaml_and_all_its_faults_are_told():
    said = ["ranker.seeds=[7, 8]", "data.seed=null", "reasoner.instruction='#1 = one'", "run.warm_start=a=b"]
    found = parse_assignments([*said, "ranker.tuned={}"])
    assert found == dict(zip(("ranker.seeds", "data.seed", "reasoner.instruction", "run.warm_start", "ranker.tuned"),
                             ([7, 8], None, "#1 = one", "a=b", {}), strict=True))  # fmt: skip
    with pytest.raises(ParamsError) as error:
        parse_assignments(["ranker.seeds", "a.b=[1", "c.d={x: 1, x: 2}"])
    assert "key=value, found: 'ranker.seeds'" in str(error.value)
    assert "the value '[1' of a.b cannot be read as YAML" in str(error.value)
    assert "the key x stands twice" in str(error.value)


def test_seeds_derive_from_the_run_unless_they_are_set():
    derived = load("params/cfpb2014.yaml", {"run.seed": 3, "reasoner.others": [{}, {"seed": 9}, {}]})
    assert (derived.data.seed, derived.ranker.seeds, derived.reasoner.seed) == (3, (3000, 3001, 3002), 3)
    assert [other.seed for other in derived.reasoner.others] == [4, 9, 10]
    assert load("params/quickstart.yaml", {"run.seed": 3, "data.seed": 9}).data.seed == 9


def test_an_override_that_a_tuned_value_would_overrule_is_refused():
    with pytest.raises(ParamsError, match=r"ranker\.dropout has no effect beside ranker\.tuned\.two_tower\.dropout"):
        load("params/cfpb2014.yaml", {"ranker.dropout": 0})
    assert load("params/cfpb2014.yaml", {"ranker.dropout": 0, "ranker.tuned": {}}).ranker.dropout == 0
    own = load("params/cfpb2014.yaml", {"ranker.tuned.two_tower.dropout": 0}).ranker.settings()
    assert (own["two_tower"].dropout, own["two_tower_text"].dropout) == (0, 0.5)


def test_tuned_settings_lie_over_the_shared_ones_and_are_checked_like_them():
    params = check({"ranker": {"epochs": 3, "tuned": {"two_tower": {"dim": 4}}}})
    own = params.ranker.settings()
    assert own["two_tower"] == own["two_tower_text"].model_copy(update={"dim": 4})
    assert check(yaml.safe_load(dump(params))).ranker.settings() == own
    with pytest.raises(ParamsError, match=r"two_tower\.dropuot +is not a parameter; did you mean ranker\.dropout"):
        check({"ranker": {"tuned": {"two_tower": {"dropuot": 0.1}}}})
    with pytest.raises(ParamsError, match=r"'two_tower', 'two_tower_text'"):
        check({"ranker": {"tuned": {"one_tower": {}}}})


def test_rankers_and_their_settings_are_the_same_wherever_they_are_named():
    assert RankerSettings.model_fields["interaction"].annotation == Literal[*INTERACTIONS]
    shape = {field.name for kind in ARCHITECTURES.values() for field in dataclasses.fields(kind.Config)}
    assert {*RankerSettings.model_fields} - shape == {
        *("learning_rate", "weight_decay", "epochs", "patience", "lists_per_batch", "kl_weight"),
        *("exposure", "kb_negatives"),
        *("chat_epochs", "chat_learning_rate", "chat_temperature"),
    }, "what does not shape a ranker is of its training"
    assert {ranker.architecture for ranker in RANKERS.values()} == {*ARCHITECTURES}
    assert tuple(name for name in RANKERS if name != "rgalign_rec") == RANKER_NAMES  # which notebook 08 trains
    assert set(RANKERS) < set(MODELS)
    assert set(CORE_RANKERS) < set(MODEL_STYLE) < set(MODELS)


def test_yaml_merge_keys_are_read(tmp_path):
    text = "data: {features: &own {min_count: 3}}\nranker: {search: {<<: {trials: 4}}}"
    params = load(params_file(tmp_path, text))
    assert (params.data.features.min_count, params.ranker.search.trials) == (3, 4)


def test_heads_must_divide_the_width():
    with pytest.raises(ParamsError, match="does not divide"):
        check({"ranker": {"heads": 3, "embedding_dim": 8}})


def test_params_are_frozen():
    with pytest.raises(ValueError, match="frozen"):
        check({}).run.seed = 1


LEAVES = sorted(flat(Params()))
SCALARS = st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=5))


def refusal(given: dict) -> str:
    """The message with which `check` refuses, empty where it takes the params (and they read back)."""
    try:
        params = check(given)
    except ParamsError as error:
        return str(error)
    return "" if check(yaml.safe_load(dump(params))) == params else "does not read back"


@given(key=st.sampled_from(LEAVES), value=SCALARS | st.lists(SCALARS, max_size=3))
@example(key="run.warm_start", value="a\x85b")  # a line break to YAML 1.1
def test_any_value_is_either_taken_or_refused_by_name(key, value):
    *sections, leaf = key.split(".")
    wanted: dict = {}
    inner = wanted
    for section in sections:
        inner = inner.setdefault(section, {})
    inner[leaf] = value
    message = refusal(wanted)
    assert not message or ".".join(sections) in message


def test_a_file_that_is_no_params_file_by_its_size_is_refused_at_once(tmp_path):
    """YAML would read it for minutes."""
    path = tmp_path / "log.yaml"
    path.write_text("run: {seed: 3}\n" + "# a comment\n" * 30_000)
    with pytest.raises(ParamsError, match=r"log\.yaml has 360,015 bytes; expected a params file, of 262,144 at most"):
        load(path)
    (tmp_path / "over.yaml").write_text("base: log.yaml\n")
    with pytest.raises(ParamsError, match=r"log\.yaml has 360,015 bytes"):
        load(tmp_path / "over.yaml")


def test_a_byte_order_mark_and_line_ends_of_windows_are_read(tmp_path):
    (tmp_path / "windows.yaml").write_bytes("\ufeffrun:\r\n  seed: 3\r\n".encode())
    assert load(tmp_path / "windows.yaml").run.seed == 3
