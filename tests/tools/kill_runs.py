"""Kills runs at seeded moments and goes on from there: the end must have the bytes of a run that nobody killed.

    python tests/tools/kill_runs.py              # fifty moments over all stages; docs/reliability.json gets the counts
    python tests/tools/kill_runs.py --moments 4  # fewer, counted nowhere

A chain is one run directory: the same command is given again and again, and killed once in every stage. Then it is left
alone to its end and compared with the unbroken run.
"""

import argparse
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from file_events import MADE, RENAMED, WRITTEN, Events
from refresh_reliability import record_kills

from rgalign.params import ROOT
from rgalign.run import artifacts
from rgalign.run.plan import STAGES

MICRO = "tests/tools/micro.yaml"
SEQUENCE = [stage for stage in STAGES.values() if stage.in_sequence]
FOLDERS = ("", "tables", "models", "notebooks")  # of a run directory, watched
TRAINED = ("05_rg_sft", "06_rg_dpo", "07_rg_cl")  # stages that leave checkpoints at this size
SIGNALS = {"SIGKILL": signal.SIGKILL, "SIGTERM": signal.SIGTERM, "SIGINT": signal.SIGINT}
ENDS = {"SIGKILL": (-signal.SIGKILL,), "SIGTERM": (128 + signal.SIGTERM,), "SIGINT": (128 + signal.SIGINT,)}
WHERE = {
    "at a share of its time": "time",
    "in papermill's writing": "notebook",
    "in a table's or model's writing": "writing",
    "after an output's rename": "renamed",
    "in the manifest's writing": "manifest",
    "after the manifest, before the notebook": "recorded",
    "after the notebook, before its page": "copied",
    "in a checkpoint": "checkpoint",
}
LONGEST = 300.0  # seconds a stage may take on a busy machine


@dataclass(frozen=True)
class Moment:
    """When a run is killed, and how. alone: SIGKILL hits the run and not its kernel, which must end by itself."""

    stage: str
    where: str
    signal: str
    share: float  # of the stage's time, or of the events counted
    alone: bool = True


def moments(seed: int, number: int) -> list[list[Moment]]:
    """Chains of one moment a stage, `number` in all; in one stage no place comes twice before all others came."""
    draw = random.Random(seed)
    places, drawn = {}, []
    for number_of_moment in range(number):
        stage = SEQUENCE[number_of_moment % len(SEQUENCE)].name
        if not places.get(stage):
            can = [name for name, kind in WHERE.items() if kind != "checkpoint" or stage in TRAINED]
            places[stage] = draw.sample(can, len(can))
        name = draw.choice(list(SIGNALS))
        drawn.append(Moment(stage, places[stage].pop(), name, draw.random(), draw.random() < 0.5))
    return [drawn[start : start + len(SEQUENCE)] for start in range(0, number, len(SEQUENCE))]


def command(run: Path) -> list[str]:
    return [sys.executable, "-m", "rgalign", "run", MICRO, "--run-dir", str(run)]


def start(command: list[str]) -> subprocess.Popen:
    """With signals as in a terminal: a shell in the background would have Ctrl-C ignored."""
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    default = {"preexec_fn": lambda: signal.signal(signal.SIGINT, signal.default_int_handler)}
    return subprocess.Popen(command, cwd=ROOT, **pipes, **default)


def children(process: int) -> list[int]:
    """All processes below this one."""
    try:
        own = Path(f"/proc/{process}/task/{process}/children").read_text().split()
    except OSError:
        return []
    return [child for each in map(int, own) for child in (each, *children(each))]


def alive(process: int) -> bool:
    try:
        state = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state not in "ZX"


def kill_at(run: Path, moment: Moment, seconds: float, given: list[str]) -> str:
    """Start a run and kill it at the moment. Returns what was wrong with the way it ended; '' where nothing was,
    'missed' where the stage ended before the moment came."""
    for name in FOLDERS:
        (run / name).mkdir(parents=True, exist_ok=True)
    events = Events([run / name for name in FOLDERS])
    process = start(given)
    try:
        if not _comes(process, run, moment, seconds, events):
            return "missed"  # stopped all the same: the chain's later moments are still to come
        below = children(process.pid)
        hit = [process.pid] if moment.alone or moment.signal != "SIGKILL" else [process.pid, *below]
        for each in hit:
            os.kill(each, SIGNALS[moment.signal])
        said = process.communicate(timeout=60)[1]
    finally:
        events.close()
        if process.poll() is None:
            process.kill()
            process.communicate()
    return _ended_well(run, moment, process.returncode, said, below)


def _comes(process: subprocess.Popen, run: Path, moment: Moment, seconds: float, events: Events) -> bool:
    """Wait for the moment; False where the stage ended before."""
    os.set_blocking(process.stdout.fileno(), False)
    if not _stage_begins(process, moment.stage):
        return False
    kind = WHERE[moment.where]
    if kind == "time":
        return _pause(process, moment.stage, moment.share * seconds)
    if kind == "checkpoint":
        return _checkpoint(process, moment.stage, run / "work" / moment.stage, moment.share)
    wanted = _wanted(kind, run, moment)
    for _ in range(int(LONGEST * 10)):
        if _is_over(process, moment.stage):
            return False
        for happened, path in events.wait(0.1):
            if wanted(happened, path):
                return True
    return False


def _stage_begins(process: subprocess.Popen, stage: str) -> bool:
    said, ends = "", time.monotonic() + LONGEST
    while time.monotonic() < ends:
        said += _printed(process)
        if f"] {STAGES[stage].title}: " in said:
            return True
        if process.poll() is not None:
            return False
        time.sleep(0.005)
    return False


def _is_over(process: subprocess.Popen, stage: str) -> bool:
    """The run has ended, or says that it has come to a later stage."""
    later = [f"] {each.title}: " for each in SEQUENCE if each.name > stage]
    said = _printed(process)
    return process.poll() is not None or any(title in said for title in later)


def _printed(process: subprocess.Popen) -> str:
    """What it has printed since the last look."""
    try:
        return os.read(process.stdout.fileno(), 1 << 16).decode()
    except BlockingIOError:
        return ""


def _pause(process: subprocess.Popen, stage: str, seconds: float) -> bool:
    ends = time.monotonic() + seconds
    while not (over := _is_over(process, stage)) and time.monotonic() < ends:
        time.sleep(0.005)
    return not over


def _checkpoint(process: subprocess.Popen, stage: str, work: Path, share: float) -> bool:
    """A checkpoint's folder is there; the later ones for a larger share, whole or not."""
    wanted = 1 + int(3 * share)
    seen: set[str] = set()
    while not _is_over(process, stage):
        seen |= {path.name for path in work.glob("**/checkpoint-*")}
        if len(seen) >= wanted:
            return True
        time.sleep(0.002)
    return False


def _wanted(kind: str, run: Path, moment: Moment):
    """The event that is waited for: (kind, path) -> bool."""
    outputs = STAGES[moment.stage].writes
    output = run / outputs[int(moment.share * len(outputs))]
    copy = run / "notebooks" / f"{moment.stage}.ipynb"
    return {
        "notebook": lambda happened, path: happened == WRITTEN and path == artifacts.temporary_of(copy),
        # a folder may be made under a name of its own first, and then be moved to its temporary one
        "writing": lambda happened, path: happened in (MADE, RENAMED) and path == artifacts.temporary_of(output),
        "renamed": lambda happened, path: happened == RENAMED and path == output,
        "manifest": lambda happened, path: happened == MADE and path.name == ".manifest.part.json",
        "recorded": lambda happened, path: happened == RENAMED and path.name == artifacts.MANIFEST,
        "copied": lambda happened, path: happened == RENAMED and path == copy,
    }[kind]


def _ended_well(run: Path, moment: Moment, code: int, said: str, below: list[int]) -> str:
    if code not in ENDS[moment.signal]:
        return f"exit status {code}: {said[-300:]}"
    if moment.signal != "SIGKILL":
        if "Give the same command again" not in said:
            return f"does not say how to go on: {said[-300:]}"
        if left := temporaries(run):
            return f"leaves {left}"
    ends = time.monotonic() + 10
    while orphans := [each for each in below if alive(each)]:
        if time.monotonic() > ends:
            return f"leaves processes {orphans}"
        time.sleep(0.05)
    return ""


def temporaries(run: Path) -> list[str]:
    """What is no artifact: half-written files, what training goes on from is not among them."""
    found = [path for path in run.rglob(".*") if artifacts.TEMPORARY in path.name or path.name.endswith(".lock.json")]
    return sorted(str(path.relative_to(run)) for path in found if "work" not in path.relative_to(run).parts)


def outputs(run: Path) -> dict[str, str]:
    """Artifact -> digest of what lies there now, of every stage."""
    stages = artifacts.read_manifest(run)["stages"].values()
    return {name: artifacts.digest(run / name) for stage in stages for name in stage["outputs"]}


def differs(run: Path, unbroken: Path) -> str:
    """What a run that was killed and went on has otherwise than the unbroken one; '' where nothing."""
    mine, theirs = outputs(run), outputs(unbroken)
    if wrong := sorted(name for name in {*mine, *theirs} if mine.get(name) != theirs.get(name)):
        return f"other bytes: {', '.join(wrong)}"
    if left := [*temporaries(run), *(str(path) for path in run.glob("work/*"))]:
        return f"leaves {left}"
    pages = [sorted(path.name for path in (each / "notebooks").iterdir()) for each in (run, unbroken)]
    return "" if pages[0] == pages[1] else f"other notebooks: {sorted(set(pages[0]) ^ set(pages[1]))}"


def finish(run: Path) -> str:
    done = subprocess.run(command(run), cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{run} does not go on:\n{done.stderr}")
    return done.stdout


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--moments", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, default=ROOT / "outputs" / "kills", help="new runs, outputs/kills")
    parser.add_argument("--record", action="store_true", help="keep the counts of fewer than fifty as well")
    options = parser.parse_args()
    unbroken = options.folder / "unbroken"
    began = time.monotonic()
    finish(unbroken)
    print(f"the unbroken run: {time.monotonic() - began:.0f} s, {len(SEQUENCE)} stages", flush=True)
    seconds = {name: entry["seconds"] for name, entry in artifacts.read_manifest(unbroken)["stages"].items()}
    rows = []
    for number, chain in enumerate(moments(options.seed, options.moments)):
        run, told = options.folder / f"chain-{number}", []
        shutil.rmtree(run, ignore_errors=True)
        for moment in chain:
            wrong = kill_at(run, moment, seconds[moment.stage] + 5, command(run))
            told.append((moment, wrong))
            print(f"{number} {moment.stage} {moment.where}, {moment.signal}: {wrong or 'killed'}", flush=True)
        finish(run)
        wrong = differs(run, unbroken)
        print(f"chain {number}: {wrong or 'the same bytes'}", flush=True)
        rows += [(moment, one or wrong) for moment, one in told]
    lost = [row for row in rows if row[1] not in ("", "missed")]
    counts = Counter("survived" if not wrong else "missed" if wrong == "missed" else "lost" for _, wrong in rows)
    print(dict(counts), f"{time.monotonic() - began:.0f} s")
    if options.record or options.moments >= 50:
        told = [
            (moment.where, moment.signal, {"": "survived", "missed": "missed"}.get(wrong, "lost"))
            for moment, wrong in rows
        ]
        record_kills(told, options.seed)
    return 1 if lost else 0


if __name__ == "__main__":
    sys.exit(main())
