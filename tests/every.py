"""Many cases in one test, with one report of all that fail: a test id for each would cost more than the cases."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest


def every(cases: Mapping[str, Any], judge: Callable[[Any, Path], None], folder: Path) -> None:
    """Calls judge(case, an own folder) for each case; fails once, naming all cases that do not hold."""
    assert cases, "there is no case to judge"
    failed = []
    for number, (name, case) in enumerate(cases.items()):
        own = folder / f"case-{number}"
        own.mkdir()
        try:
            judge(case, own)
        except (Exception, pytest.fail.Exception) as error:
            failed.append(f"{name}: {type(error).__name__}: {error}")
    assert not failed, f"{len(failed)} of {len(cases)} cases fail:\n" + "\n".join(failed)
