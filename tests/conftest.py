"""Fixtures shared by all tests."""

import os
import shutil
import sys
from pathlib import Path

import pytest
import small_run
from hypothesis import settings

settings.register_profile("untimed", deadline=None, max_examples=50)  # a busy machine is no fault
settings.load_profile("untimed")

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
sys.path.append(str(ROOT / "tests" / "tools"))  # what makes committed outputs is tested too


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Where workers share the tests, those of a file stay together, and so do all that read a run from here.

    The longest come first: the killed runs, those that read a run, files with slow tests; what is short fills the end.
    """
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    for item in items:
        item.add_marker(pytest.mark.xdist_group("the runs" if _reads_a_run(item) else str(item.path)))
    items.sort(
        key=lambda i: (i.path.name != "test_run.py", not _reads_a_run(i), i.path not in slow, i.path.parent != HERE)
    )


def _reads_a_run(item: pytest.Item) -> bool:
    return "ranked" in getattr(item, "fixturenames", ())  # a notebook's cell, for nbval, has none


@pytest.fixture(scope="session")
def public_data() -> Path:
    """Folder of the public data sets (see README); tests that need them are skipped, visibly, without it."""
    folder = Path(os.environ.get("RGALIGN_DATA", ROOT.parent / "shared" / "data"))
    if not (folder / "cfpb2014").is_dir():
        pytest.skip(f"public data not found in {folder}; set RGALIGN_DATA to the folder that holds cfpb2014/")
    return folder


@pytest.fixture(scope="session")
def ranked(tmp_path_factory) -> Path:
    """A small run through notebook 03. Copy it before anything is written into it."""
    run = tmp_path_factory.mktemp("ranked") / "run"
    for name in ("01_data", "02_reasoner", "03_rankers"):
        small_run.play(name, run)
    return run


@pytest.fixture(scope="session")
def aligned_run(ranked, tmp_path_factory) -> tuple[Path, dict]:
    """A small run through notebook 09 with the baseline beside QE-Rec, and what it changes of SMALL. Read only."""
    run, overrides = tmp_path_factory.mktemp("aligned") / "run", {"ranker.models": ["two_tower_text", "qe_rec"]}
    shutil.copytree(ranked, run)
    for name in ("02_reasoner", "03_rankers", *small_run.ALIGNMENT, "09_evaluation"):
        small_run.play(name, run, overrides)
    return run, overrides


@pytest.fixture(scope="session")
def context(ranked):
    """That run as its alignment sees it."""
    from rgalign.alignment.context import Context  # late: most tests do without torch
    from rgalign.run.stages import open_stage

    return Context.of(open_stage("04_reward_model", small_run.SMOKE, ranked, small_run.SMALL))


@pytest.fixture(scope="session")
def rewarded(context, tmp_path_factory):
    """Candidates of that run's two LLMs with their reward, and the folder of the reward model."""
    from rgalign.alignment import rewarding

    folder = tmp_path_factory.mktemp("reward")
    candidates = rewarding.write_candidates(context, context.language_models(), folder)
    embedder = rewarding.QueryEmbedder(context, context.main())
    rewarding.train_models(context, embedder, candidates, folder)
    rewarding.save_form(folder, "list")
    return rewarding.Rewarder.load(context, folder).scored(candidates), folder


@pytest.fixture(scope="module")
def one_thread():
    """As each of two workers has: their number changes the last bits, and a run opened before may have set it."""
    import torch  # late, as above

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
