"""Independent jobs side by side on one machine's CPU, each in a process of its own; the results are those of a loop."""

import functools
import os
import threading
import time
from collections.abc import Callable, Iterable
from typing import Any

import torch
from joblib import Parallel, delayed
from tqdm import tqdm


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
    with tqdm(total=total, desc=title, disable=not progress) as bar:
        results = []
        for result in pool(delayed(_with_threads)(threads, job, own) for own in arguments):
            results.append(result)
            bar.update(1)
    return results


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
