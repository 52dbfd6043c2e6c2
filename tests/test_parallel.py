"""Jobs side by side give what a loop gives, in its order; the first error ends all."""

import os

import pytest
import torch

from rgalign.run.distributed import each


def job(number: int) -> tuple[int, int, float]:
    """A module's function: another process can import it."""
    if number == 3:
        raise ValueError("three is refused")
    values = torch.arange(1, 1000, dtype=torch.float32).sin() * number
    return number, os.getpid(), float(values.sum())


def threads(number: int) -> int:
    return torch.get_num_threads()


def run(numbers, workers: int, of=job) -> list:
    return each(of, ({"number": n} for n in numbers), total=len(numbers), workers=workers, title="t", progress=False)


def test_one_worker_is_this_process():
    assert {pid for _, pid, _ in run([0, 1, 2], 1)} == {os.getpid()}


def test_several_workers_are_others_and_their_results_come_in_the_order_of_the_jobs():
    numbers = [5, 1, 4, 0, 2]
    alone, beside = run(numbers, 1), run(numbers, 2)
    assert [number for number, _, _ in beside] == numbers
    assert [value for _, _, value in beside] == [value for _, _, value in alone]
    assert os.getpid() not in {pid for _, pid, _ in beside}


def test_workers_share_the_callers_threads_out():
    before = torch.get_num_threads()
    try:
        for own, expected in ((4, 2), (1, 1)):
            torch.set_num_threads(own)
            assert set(run([0, 1], 2, threads)) == {expected}
            assert torch.get_num_threads() == own
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("workers", [1, 2])
def test_the_first_error_is_raised_here(workers):
    with pytest.raises(ValueError, match="three is refused"):
        run([0, 3, 1], workers)
