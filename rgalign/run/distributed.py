"""Several processes: who am I among them, and starting them by the user's own launcher (run.launcher).

`torchrun ..` or `accelerate launch ..` starts `python -m rgalign.commands.worker JOB`, whose arguments lie in the
folder JOB; a job goes on from what an earlier start of it left. With one process nothing is sent or waited for."""

import codecs
import functools
import json
import os
import shlex
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from hashlib import sha256
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.distributed as dist
import yaml
from joblib import Parallel, delayed
from tqdm import tqdm

from rgalign.errors import UserError
from rgalign.params import ROOT
from rgalign.run.artifacts import atomic, write_text

if TYPE_CHECKING:
    from accelerate import Accelerator


def each(
    job: Callable[..., Any],
    arguments: Iterable[dict[str, Any]],
    *,
    total: int,
    workers: int,
    title: str,
    progress: bool = True,
) -> list[Any]:
    """[job(**a) for a in arguments], up to `workers` at once, which share out the caller's threads of torch.

    job        a function of a module (its process imports it); with one worker it is simply called, in this process
    arguments  `total` of them, made as they are needed
    The first error ends all and is raised here.
    """
    if workers == 1:
        return [job(**own) for own in arguments]
    threads = max(1, torch.get_num_threads() // workers)
    pool = Parallel(n_jobs=workers, return_as="generator", mmap_mode=None, max_nbytes=None)
    results = pool(delayed(_with_threads)(threads, job, own) for own in arguments)
    return list(tqdm(results, total=total, desc=title, disable=not progress))


def _with_threads(threads: int, job: Callable[..., Any], own: dict[str, Any]) -> Any:
    _end_with_the_parent()
    torch.set_num_threads(threads)  # their number changes the last bits of sums
    return job(**own)


@functools.cache
def _end_with_the_parent() -> None:
    """A worker whose kernel was killed must not write on into a run directory that a new run is at work in."""
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.2)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


ARGUMENTS, RESULT, ERROR = "job.json", "result.json", "error.txt"
COUNTS = ("--nproc_per_node", "--nproc-per-node", "--num_processes", "--num-processes")
NODES = ("--nnodes", "--num_machines", "--num-machines")
CONFIGS = ("--config_file", "--config-file")
STARTS = 2  # of a job that loses a process without a word
OF_A_MODEL = "alignment.engine.tokens_per_batch or reasoner.embed_tokens_per_batch"
OF_OTHERS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")  # a launcher tells a process of others by these
OF_ACCELERATE = "ACCELERATE_"  # and by what begins so how they train one model; the device stays the process's own
KEPT = 4000  # characters of what the processes said, for the message


class ProcessesError(UserError, RuntimeError):
    """The processes did not do their job; the message says what they said last, and what to change."""


def several() -> bool:
    """Whether this is one of several processes."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def index() -> int:
    return dist.get_rank() if several() else 0


def count() -> int:
    return dist.get_world_size() if several() else 1


def wait_for_all() -> None:
    """Return when every process has come here."""
    if several():
        dist.barrier()


def broadcast(value: bool) -> bool:
    """The first process's value, in all of them."""
    values = [value]
    if several():
        dist.broadcast_object_list(values, src=0)
    return values[0]


def summed(values: torch.Tensor) -> torch.Tensor:
    """The sum over the processes, in all of them; with one process the values themselves."""
    if several():
        dist.all_reduce(values)
    return values


def all_gather_with_grad(rows: torch.Tensor) -> torch.Tensor:
    """The rows of all processes, by rank: (own rows, ..) -> (rows of all, ..). Processes may have different numbers.
    Differentiable: a row's gradients of all processes' losses reach the process that owns it, as with one process."""
    if not several():
        return rows
    own = torch.tensor([len(rows)], device=rows.device)
    counts = [torch.empty_like(own) for _ in range(dist.get_world_size())]
    dist.all_gather(counts, own)
    return _AllGather.apply(rows, [int(count) for count in counts])


def weighted_all_reduce(mean: torch.Tensor, count: int) -> torch.Tensor:
    """This process's mean over `count` items, weighted so that its average over processes is the mean over all items;
    0 where no process has any."""
    if not several():
        return mean
    total = torch.tensor(count, device=mean.device)
    dist.all_reduce(total)
    return mean * (count * dist.get_world_size() / total.clamp(min=1))


class _AllGather(torch.autograd.Function):
    """all_gather of different numbers of rows; its gradient is the sum over processes, each taking its own rows.
    torch.distributed.nn.functional.all_gather does so for equal numbers, and is deprecated since torch 2.13."""

    @staticmethod
    def forward(ctx, rows: torch.Tensor, counts: list[int]) -> torch.Tensor:
        ctx.counts = counts
        padded = rows.new_zeros((max(counts), *rows.shape[1:]))
        padded[: len(rows)] = rows
        parts = [torch.empty_like(padded) for _ in counts]
        dist.all_gather(parts, padded)
        return torch.cat([part[:count] for part, count in zip(parts, counts, strict=True)])

    @staticmethod
    def backward(ctx, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        total = gradient.clone()
        dist.all_reduce(total)
        return total.split(ctx.counts)[dist.get_rank()], None


def accelerator(device: str, precision: str) -> "Accelerator":
    """accelerate's view of run.device and run.precision. Raises ValueError for a device that is not there."""
    from accelerate import Accelerator  # late: the command line needs none

    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if not there.get(device, True):
        raise ValueError(f"run.device is {device}, but torch sees no such device here; expected auto or cpu")
    return Accelerator(cpu=device == "cpu", mixed_precision=precision)


@contextmanager
def kept_state(*states: type) -> Iterator[None]:
    """Afterwards these states of accelerate's (each one dict for the whole process) are as they were."""
    shared = [(state, dict(state._shared_state)) for state in states]
    try:
        yield
    finally:
        for state, was in shared:
            state._shared_state.clear()
            state._shared_state.update(was)


@contextmanager
def single_process(device: str = "cpu", precision: str = "no") -> "Iterator[Accelerator]":
    """accelerate's view of this process as if it were the only one, on the GPU that it was given; afterwards the
    process's own view is as it was. Arguments, errors: those of `accelerator`."""
    from accelerate.state import AcceleratorState, PartialState

    told = [name for name in os.environ if name in OF_OTHERS or name.startswith(OF_ACCELERATE)]
    others = {name: os.environ.pop(name) for name in told if name != "ACCELERATE_TORCH_DEVICE"}
    with kept_state(PartialState, AcceleratorState):
        for state in (PartialState, AcceleratorState):
            state._shared_state.clear()
        try:
            yield accelerator(device, precision)
        finally:
            os.environ.update(others)


def planned(launcher: str) -> int | None:
    """How many processes a launcher is told to start; None where it decides itself (gpu, auto). Raises ProcessesError
    where a configuration file that it names is not there."""
    words = [part for word in shlex.split(launcher) for part in (word.split("=", 1) if word[:2] == "--" else [word])]
    given = dict(pairwise(words))
    config: dict[str, Any] = {}
    if name := next((given[key] for key in CONFIGS if key in given), None):
        place = next((place for place in (Path(name), ROOT / name) if place.is_file()), None)
        if place is None:
            raise ProcessesError(f"run.launcher names the file {name}, which is not there")
        config = yaml.safe_load(place.read_text(encoding="utf-8"))
    said = next((given[key] for key in COUNTS if key in given), config.get("num_processes"))
    nodes = next((given[key] for key in NODES if key in given), 1)
    if not str(said).isdigit() or not str(nodes).isdigit():
        return None
    of_all = any(key in given for key in COUNTS[2:]) or "num_processes" in config  # accelerate counts over all machines
    return int(said) * (1 if of_all else int(nodes))


def run(
    job: str, folder: Path, launcher: str, arguments: dict[str, Any], *, device: str, lower: str = OF_A_MODEL
) -> dict[str, Any]:
    """Have the processes do a job of `rgalign.commands.worker`; returns what its first process wrote as its result.

    folder     the job's own: files that `arguments` (JSON) name, what the job goes on from, its result
    device     as run.device; the processes share the threads that torch has here
    lower      the params that its memory hangs on
    What the processes print is shown here as it comes. Where they end without having said why (killed, out of memory)
    they are started once more. Raises ProcessesError.
    """
    folder = folder.absolute()
    folder.mkdir(parents=True, exist_ok=True)
    for left in (RESULT, ERROR):
        (folder / left).unlink(missing_ok=True)
    given = {"job": job, "launcher": launcher, "processes": planned(launcher), "arguments": arguments}
    given |= {"device": device, "threads": torch.get_num_threads()}
    write_text(folder / ARGUMENTS, json.dumps(given, indent=2) + "\n")
    program, *words = shlex.split(launcher)
    beside = Path(sys.executable).parent / program
    place = shutil.which(program) or (str(beside) if beside.is_file() else None)
    if place is None:
        raise ProcessesError(f"run.launcher begins with {program}, which is neither on the path nor beside Python")
    command = [place, *words, "-m", "rgalign.commands.worker", str(folder)]
    for start in range(1, STARTS + 1):
        status, last = _shown(command)
        if status == 0 and (folder / RESULT).is_file():
            return json.loads((folder / RESULT).read_text(encoding="utf-8"))
        if (folder / ERROR).is_file():
            raise ProcessesError(f"{job}, by `{launcher}`: {(folder / ERROR).read_text(encoding='utf-8').strip()}")
        if start < STARTS:
            print(f"{job}: a process was lost (exit {status}); started once more, from what is finished", flush=True)
    raise ProcessesError(
        f"{job}, by `{launcher}`, ended with exit {status} {STARTS} times, most often for want of memory: lower "
        f"{lower}. Give the same command again: what is finished is kept. The processes said last:\n{last}"
    )


def _shown(command: list[str]) -> tuple[int, str]:
    """Run a command, its output on ours as it comes. Returns its exit status and the end of what it said."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))}
    decode, last = codecs.getincrementaldecoder("utf-8")("replace"), ""
    process = subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, cwd=ROOT, env=environment
    )
    try:
        while block := os.read(process.stdout.fileno(), 1 << 16):
            text = decode.decode(block)
            sys.stderr.write(text)
            last = (last + text)[-KEPT:]
        return process.wait(), last
    finally:
        if process.poll() is None:
            process.terminate()  # the launcher ends its own processes
            process.wait()


# Work in numbered shards: a killed process goes on where it stood, and several processes share the shards. A shard is a
# folder with a label that says what it was made of, there whole or not at all.

LABEL = "shard.json"


def shard_path(folder: Path, number: int) -> Path:
    """The folder of one shard."""
    return folder / f"shard-{number:05d}"


def label_of(shard: Path) -> Any:
    """What a shard was made of; None where it is not there."""
    try:
        return json.loads((shard / LABEL).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def make_shards(folder: Path, shards: int, make: Callable[[int, Path], object], *, label: Callable[[int], Any]) -> int:
    """Make this process's shards: index, index + processes, ..; returns how many it made.

    make   (number, empty folder to fill)
    label  number -> what the shard is made of, as JSON: one that is there with this label is kept, any other replaced
    """
    labels = {number: label(number) for number in range(index(), shards, count())}
    left = {number: own for number, own in labels.items() if label_of(shard_path(folder, number)) != own}
    for number, own in left.items():
        with atomic(shard_path(folder, number)) as temporary:
            temporary.mkdir()
            make(number, temporary)
            (temporary / LABEL).write_text(json.dumps(own) + "\n", encoding="utf-8")
    return len(left)


def digest_of(meaning: Any, sequences: Iterable[Sequence[int]]) -> str:
    """SHA-256 of what is done (JSON) and of the token sequences that it is done with: a label."""
    hashed = sha256(json.dumps(meaning, sort_keys=True).encode())
    for sequence in sequences:
        hashed.update(np.array([len(sequence), *sequence], dtype=np.int64).tobytes())
    return hashed.hexdigest()
