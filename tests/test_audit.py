"""The audit of the pins says what it has looked up: what nobody could look up is not called safe."""

import subprocess

import audit_pins
import pytest

SAFE = {"name": "numpy", "version": "2.3.5", "vulns": []}
WEAK = {"name": "jinja2", "version": "3.1.5", "vulns": [{"id": "PYSEC-1", "fix_versions": ["3.1.6"]}]}
SKIPPED = {"name": "torch", "skip_reason": "Dependency not found on PyPI and could not be audited: torch (2.13.0)"}


def answering(monkeypatch, answer: str | Exception) -> None:
    def run(*_, **__):
        if isinstance(answer, Exception):
            raise answer
        return subprocess.CompletedProcess([], 1, stdout=answer, stderr="")

    monkeypatch.setattr(audit_pins.subprocess, "run", run)


@pytest.mark.parametrize("answer", ["", '{"dependencies": []}', subprocess.TimeoutExpired("pip-audit", 120)])
def test_a_database_that_cannot_be_reached_is_told(monkeypatch, answer):
    answering(monkeypatch, answer)
    assert audit_pins.told(audit_pins.audited("pypi"), 194) == (
        "audit: no vulnerability database could be reached; nothing is known of the 194 pins"
    )


def test_what_was_skipped_was_not_looked_up(monkeypatch):
    answering(monkeypatch, f'{{"dependencies": {[SAFE, WEAK, SKIPPED]}}}'.replace("'", '"'))
    assert audit_pins.told(audit_pins.audited("pypi"), 3) == (
        "audit: 2 of 3 pins looked up, 1 known to be vulnerable\n  jinja2 3.1.5: PYSEC-1; mended in 3.1.6"
    )
