"""Fixtures shared by all rooms."""

import os
from pathlib import Path

import pytest
from hypothesis import settings

settings.register_profile("untimed", deadline=None)  # a busy machine is no fault; speed is measured in notebook 91
settings.load_profile("untimed")

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="session")
def public_data() -> Path:
    """Folder of the public data sets (see README); tests that need them are skipped, visibly, without it."""
    folder = Path(os.environ.get("RGALIGN_DATA", ROOT.parent / "shared" / "data"))
    if not (folder / "cfpb2014").is_dir():
        pytest.skip(f"public data not found in {folder}; set RGALIGN_DATA to the folder that holds cfpb2014/")
    return folder
