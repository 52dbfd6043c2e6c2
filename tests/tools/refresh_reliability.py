"""The counts in docs/reliability.md, by the harness that makes them: `python tests/tools/refresh_reliability.py`.

Never typed. It runs every case of bad tables and bad params and keeps what came of them in docs/reliability.json;
tests/tools/kill_runs.py keeps its kills there.
"""

import contextlib
import io
import json
import re
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

from rgalign.params import ROOT
from rgalign.run.artifacts import write_text

COUNTS, DOCUMENT = ROOT / "docs" / "reliability.json", ROOT / "docs" / "reliability.md"
BEGIN, END = "<!-- counts: made by tests/tools/refresh_reliability.py -->", "<!-- end of counts -->"


def read_counts() -> dict:
    return json.loads(COUNTS.read_text(encoding="utf-8")) if COUNTS.exists() else {}


def record(counts: dict) -> None:
    """Keep the counts of some kinds of case, and write the document's section again once all kinds are there."""
    kept = {**read_counts(), **counts}
    write_text(COUNTS, json.dumps(kept, indent=2, sort_keys=True) + "\n")
    if {"tables", "params"} <= set(kept):
        write_text(DOCUMENT, with_counts(DOCUMENT.read_text(encoding="utf-8")))


def record_kills(told: list[tuple[str, str, str]], seed: int) -> None:
    """told: (where, signal, outcome) of each moment; outcome is survived, missed or lost."""
    by_place: dict[str, Counter] = {}
    for where, signal, outcome in told:
        by_place.setdefault(where, Counter())[signal if outcome == "survived" else outcome] += 1
    record({"kills": {"seed": seed, "moments": len(told), "by place": {k: dict(v) for k, v in by_place.items()}}})


def judge_tables() -> dict:
    """Group -> outcome -> cases that ended so; `failed` did not end as they say they must."""
    from table_faults import GROUPS, judge

    found = {}
    for group, cases in GROUPS.items():
        found[group] = Counter()
        for case in cases.values():
            with tempfile.TemporaryDirectory() as folder:
                try:
                    judge(case, Path(folder) / "shop")
                except Exception:
                    found[group]["failed"] += 1
                else:
                    found[group][case.outcome] += 1
    return {group: dict(counts) for group, counts in found.items()}


def judge_params() -> dict:
    """Kind -> refused or failed -> number, and the seconds of the slowest refusal of all (of this process's time)."""
    import torch  # noqa: F401 its import is not what is timed
    from param_faults import CASES

    from rgalign.__main__ import main

    found, slowest = {}, 0.0
    for case in CASES.values():
        with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stderr(io.StringIO()) as said:
            run, began = Path(folder) / "run", time.process_time()
            command = ["run", "params/smoke.yaml", "--dry-run", "--run-dir", str(run)]
            status = main([*command, "--set", f"{case.key}={case.value}"])
            slowest = max(slowest, time.process_time() - began)
            good = status == 1 and not run.exists() and case.named in said.getvalue()
        found.setdefault(case.kind, Counter())["refused" if good else "failed"] += 1
    return {"by kind": {kind: dict(counts) for kind, counts in found.items()}, "slowest": round(slowest, 2)}


def section() -> str:
    """The tables of the document, from the counts that are kept."""
    counts = read_counts()
    tables, params = counts["tables"], counts["params"]
    outcomes = ("refused", "noted", "kept", "failed")
    rows = {group: [found.get(name, 0) for name in outcomes] for group, found in tables.items()}
    rows["all"] = [sum(column) for column in zip(*rows.values(), strict=True)]
    lines = ["| bad tables | refused with one error | read whole, with a note | read whole | failed |"]
    lines += ["|---|---|---|---|---|", *(f"| {group} | {' | '.join(map(str, row))} |" for group, row in rows.items())]
    kinds = params["by kind"]
    lines += ["", "| bad params | refused before anything starts | failed |", "|---|---|---|"]
    lines += [f"| {kind} | {found.get('refused', 0)} | {found.get('failed', 0)} |" for kind, found in kinds.items()]
    lines += [f"| all | {sum(k.get('refused', 0) for k in kinds.values())} | "
              f"{sum(k.get('failed', 0) for k in kinds.values())} |"]  # fmt: skip
    lines += ["", f"The slowest refusal took {params['slowest']:.2f} s of processor time.", ""]
    return "\n".join([*lines, *_kills(counts.get("kills"))])


def _kills(kills: dict | None) -> list[str]:
    if kills is None:
        return ["Kills are not counted yet: `python tests/tools/kill_runs.py`."]
    columns = ("SIGKILL", "SIGTERM", "SIGINT", "missed", "lost")
    lines = [
        "| killed | by SIGKILL | by SIGTERM | by SIGINT | ended before it came | lost |",
        "|---|---|---|---|---|---|",
    ]
    rows = {place: [found.get(name, 0) for name in columns] for place, found in sorted(kills["by place"].items())}
    rows["all"] = [sum(column) for column in zip(*rows.values(), strict=True)]
    lines += [f"| {place} | {' | '.join(map(str, row))} |" for place, row in rows.items()]
    survived = sum(rows["all"][:3])
    said = (
        f"{survived} of {kills['moments']} moments (seed {kills['seed']}): the run was killed, went on, and ended with"
    )
    return [*lines, "", f"{said} the bytes of the unbroken one, with no temporary file and no process left behind."]


def with_counts(text: str) -> str:
    """The document with its counts between their marks."""
    made = f"{BEGIN}\n{section()}\n{END}"
    return re.sub(f"{re.escape(BEGIN)}.*?{re.escape(END)}", lambda _: made, text, flags=re.S)


if __name__ == "__main__":
    sys.path += [str(ROOT / "tests"), str(ROOT / "tests" / "reliability")]
    record({"tables": judge_tables(), "params": judge_params()})
    print(section())
