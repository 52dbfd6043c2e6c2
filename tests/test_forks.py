"""Processes forked by a server that has imported the libraries: those of any other start, and gone with who asked."""

import os
import signal
import sys
import tempfile
import time
from pathlib import Path

import pytest
import torch

from rgalign.run import forks
from rgalign.run.distributed import ProcessesError, by_all_threads, each

pytestmark = pytest.mark.skipif(not forks.supported(), reason="no server here: processes are started anew")


def job(number: int) -> tuple[int, float]:
    """A module's function: another process can import it."""
    if number == 3:
        raise ValueError("three is refused")
    if number == 6:
        raise FileNotFoundError("six")
    print("what a job prints is no result")
    return os.getpid(), float((torch.arange(1, 1000, dtype=torch.float32).sin() * number).sum())


def surroundings(number: int) -> tuple:
    return os.getcwd(), os.environ.get("MARK"), torch.get_num_threads(), "peft" in sys.modules


def attention(number: int) -> tuple:
    """Outputs and gradients of attention as a worker computes it, and the threads it used."""
    values = torch.randn(3, 40, 2, 30, 4, generator=torch.Generator().manual_seed(number)).requires_grad_()
    used = []

    def operation(*inputs):
        used.append(torch.get_num_threads())
        return torch.nn.functional.scaled_dot_product_attention(*inputs)

    found = by_all_threads(operation, *values.unbind(0))
    found.grad_fn.register_prehook(lambda _: used.append(torch.get_num_threads()))
    found.square().sum().backward()
    return [*used, torch.get_num_threads()], found.detach(), values.grad


def killed(number: int) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def lasting(number: int, told: str) -> None:
    if number:
        while not Path(told).exists():
            time.sleep(0.01)
        raise ValueError("the first error")
    Path(told).with_suffix(".new").write_text(str(os.getpid()))
    Path(told).with_suffix(".new").rename(told)
    time.sleep(600)


def gone(pid: int) -> bool:
    until = time.monotonic() + 20
    while Path(f"/proc/{pid}").exists() and time.monotonic() < until:
        time.sleep(0.01)
    return not Path(f"/proc/{pid}").exists()


@pytest.fixture(scope="module")
def address():
    with tempfile.TemporaryDirectory() as folder, forks.server(Path(folder) / "forks", {}):
        yield str(Path(folder) / "forks")


@pytest.fixture
def beside(address, monkeypatch):
    """beside(job, numbers): `each` by two workers that the server forks."""
    monkeypatch.setenv(forks.ADDRESS, address)

    def run(of, numbers, **more) -> list:
        own = ({"number": number, **more} for number in numbers)
        return each(of, own, total=len(numbers), workers=2, title="t", progress=False)

    return run


def test_each_job_has_a_process_of_its_own_and_the_results_are_those_of_a_loop(beside):
    numbers = [5, 1, 4, 0, 2, 7, 8]
    found = beside(job, numbers)
    assert [value for _, value in found] == [value for _, value in map(job, numbers)]
    assert len({os.getpid(), *(pid for pid, _ in found)}) == 1 + len(numbers)


def test_a_job_sees_the_callers_folder_environment_and_share_of_threads_and_has_the_libraries(
    beside, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MARK", "here")
    threads = max(1, torch.get_num_threads() // 2)
    assert beside(surroundings, [0]) == [(str(tmp_path), "here", threads, True)]


def test_attention_takes_the_threads_of_all_workers_and_gives_the_same_bytes(beside):
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(4)
        ((threads, found, gradient),) = beside(attention, [1])
    finally:
        torch.set_num_threads(before)
    alone, expected, expected_gradient = attention(1)
    assert threads == [4, 4, 2]
    assert alone == [before] * 3
    assert torch.equal(found, expected)
    assert torch.equal(gradient, expected_gradient)


def test_the_first_error_is_raised_here_and_ends_the_others(beside, tmp_path):
    told = tmp_path / "pid"
    with pytest.raises(ValueError, match="three is refused"):
        beside(job, [0, 3, 1])
    with pytest.raises(FileNotFoundError, match="six"):
        beside(job, [6, 6])
    with pytest.raises(ValueError, match="the first error"):
        beside(lasting, [0, 1], told=str(told))
    assert gone(int(told.read_text()))


def test_a_killed_worker_is_said(beside):
    with pytest.raises(ProcessesError, match=r"a worker was killed.*lower run\.workers"):
        beside(killed, [0, 1])


def test_nothing_that_it_forked_outlives_the_server(tmp_path):
    with tempfile.TemporaryDirectory() as folder, forks.server(Path(folder) / "forks", {}):
        connection = forks.fork(str(Path(folder) / "forks"), ["timeit", "-n", "1", "import time; time.sleep(600)"])
        pid = int(connection.makefile().readline())
        assert Path(f"/proc/{pid}").exists()
    assert gone(pid)
    connection.close()
