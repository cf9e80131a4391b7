"""Workers that raise, die or wait in vain: one clear error in time, no process left, the next call works."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator

import pytest
import torch

from bpkit.run.errors import WorkerDied, WorkerError, WorkerStuck
from bpkit.run.processes.pool import Pool
from bpkit.run.transports.comm import Comm

from .pools import gone, our_files

pytestmark = pytest.mark.slow


@pytest.fixture(params=["shm", "gloo"])
def pool(request: pytest.FixtureRequest) -> Iterator[Pool]:
    """A pool that has failed in the test: its workers must be gone, and the next call must work."""
    with Pool(3, request.param, timeout=1.5) as pool:
        pool.start()
        pids = pool.pids
        yield pool
        assert gone(pids, 2.0) and pool.pids == () and not our_files()
        assert pool.call(lambda comm: float(comm.all_reduce(torch.ones(1)))) == [3.0] * 3
        pids = pool.pids
    assert gone(pids, 2.0)


class OwnError(Exception):
    """An error with an argument that its message does not show."""

    def __init__(self, code: int) -> None:
        super().__init__(f"code {code}")
        self.code = code

    def __reduce__(self) -> tuple:
        return OwnError, (self.code,)


def raise_in(comm: Comm, rank: int) -> None:
    comm.mark[:] = 4, 2
    if comm.rank == rank:
        raise OwnError(7)
    comm.recv(None, rank)


def describe(rank: int, step: int, index: int) -> str:
    return f"action {index} of rank {rank}"


def test_a_worker_that_raises(pool: Pool) -> None:
    start = time.monotonic()
    with pytest.raises(WorkerError) as info:
        pool.call(raise_in, 1, describe=describe)
    assert time.monotonic() - start < 5
    error, text = info.value, str(info.value)
    assert type(error) is WorkerError and error.rank == 1
    assert text.startswith("rank 1 raised in step 4, action 2 of rank 1:\n")
    assert "Traceback" in text and "raise OwnError(7)" in text and text.endswith("OwnError: code 7")
    assert isinstance(error.__cause__, OwnError) and error.__cause__.code == 7


def test_an_error_that_cannot_be_pickled_arrives_as_text(pool: Pool) -> None:
    def fail(comm: Comm) -> None:
        class Strange(Exception):
            def __reduce__(self) -> tuple:
                raise RuntimeError("no")

        raise Strange("deep")

    with pytest.raises(WorkerError, match=r"rank \d raised in fail\(\):\n(.|\n)*Strange: deep") as info:
        pool.call(fail)
    assert info.value.__cause__ is None


def test_a_result_that_cannot_be_pickled(pool: Pool) -> None:
    def give(comm: Comm) -> object:
        return (i for i in range(3))

    with pytest.raises(WorkerError, match="cannot pickle 'generator' object"):
        pool.call(give)


def test_sys_exit_is_an_error_like_others(pool: Pool) -> None:
    with pytest.raises(WorkerError, match="SystemExit: 3"):
        pool.call(lambda comm: exit(3))


def die_in(comm: Comm, how: str) -> None:
    comm.mark[:] = 9, comm.rank
    if comm.rank == 2:
        time.sleep(0.2)
        os.kill(os.getpid(), signal.SIGKILL) if how == "kill" else os._exit(5)
    if how == "kill":
        comm.barrier()
    else:
        time.sleep(60)


@pytest.mark.parametrize(("how", "words"), [
    ("kill", "rank 2 was killed by SIGKILL in step 9, action 2 of rank 2"),
    ("exit", r"rank 2 ended without an answer \(exit code 5\) in step 9, action 2 of rank 2"),
])  # fmt: skip
def test_a_worker_that_dies(pool: Pool, how: str, words: str) -> None:
    start = time.monotonic()
    with pytest.raises(WorkerDied, match=words) as info:
        pool.call(die_in, how, describe=describe)
    assert time.monotonic() - start < 5 and info.value.rank == 2


def test_a_worker_killed_from_outside_while_it_waits(pool: Pool) -> None:
    def wait(comm: Comm) -> None:
        comm.mark[0] = 0
        if comm.rank == 0:
            comm.recv(None, 1)
        time.sleep(60)

    def kill(marks: object) -> None:
        if time.monotonic() > start + 0.5:
            os.kill(victim, signal.SIGKILL)

    start, victim = time.monotonic(), pool.pids[0]
    with pytest.raises(WorkerDied, match=r"rank 0 was killed by SIGKILL in wait\(\), waiting in recv for rank 1"):
        pool.call(wait, watch=kill)
    assert time.monotonic() - start < 5


def test_a_resting_worker_that_was_killed_is_replaced(pool: Pool) -> None:
    pids = pool.pids
    os.kill(pids[1], signal.SIGKILL)
    while not pool._running.dead():
        time.sleep(0.02)
    assert pool.call(lambda comm: comm.rank) == [0, 1, 2]
    assert gone(pids, 2.0) and pool.generation == 2
    pool._end()


def never_send(comm: Comm, operation: str) -> None:
    if comm.rank == 0:
        time.sleep(60)
    elif operation == "recv":
        comm.recv(None, 0)
    else:
        comm.all_reduce(torch.ones(3))


@pytest.mark.parametrize("operation", ["recv", "all_reduce"])
def test_a_peer_that_never_comes(pool: Pool, operation: str) -> None:
    start = time.monotonic()
    with pytest.raises(WorkerStuck) as info:
        pool.call(never_send, operation)
    assert 1.0 < time.monotonic() - start < 1.5 + 5
    text = str(info.value)
    assert f"waited 1.5 s in {operation}" in text and info.value.rank in (1, 2)
    if operation == "recv":
        assert f"rank {info.value.rank} waited 1.5 s in recv for rank 0" in text
    assert "rank 0: never_send()" in text  # who was not waiting


def test_no_answer_of_a_failed_call_is_read_later(pool: Pool) -> None:
    def late(comm: Comm, value: int) -> int:
        if comm.rank == 0 and value == 1:
            raise ValueError
        return value

    with pytest.raises(WorkerError):
        pool.call(late, 1)
    assert pool.call(late, 2) == [2, 2, 2]
    pool._end()


@pytest.mark.parametrize("ask", [lambda comm: comm.empty(1000), lambda comm: comm.group([[0, 1], [2]])])
def test_memory_that_only_one_rank_asked_for_is_given_back(pool: Pool, ask: Callable[[Comm], object]) -> None:
    def one_sided(comm: Comm) -> None:
        if comm.rank == 1:
            time.sleep(0.3)  # rank 0 has made the file and waits for us
            raise ValueError
        ask(comm)

    with pytest.raises(WorkerError):
        pool.call(one_sided)  # the fixture looks for what is left


class Broken:
    """A sum of torch.distributed whose connection broke: ended, as it says, and only who waits learns how."""

    def is_completed(self) -> bool:
        return True

    def wait(self) -> None:
        raise RuntimeError("Connection reset by peer")


def poll_a_broken_sum(comm: Comm) -> bool:
    from bpkit.run.transports.distributed import DistributedComm, _Work

    assert isinstance(comm, DistributedComm)
    return _Work(comm, Broken(), "all_reduce").poll()


def test_a_sum_that_ended_by_an_error_is_no_sum() -> None:
    with Pool(1, "gloo") as pool, pytest.raises(WorkerError, match="all_reduce failed: Connection reset by peer"):
        pool.call(poll_a_broken_sum)


def lead(comm: Comm, pieces: int, seconds: float) -> int:
    done = []
    for _ in range(2):  # the second work is not taken for the first
        comm.alone(1, (done.append(time.sleep(seconds)) for _ in range(pieces)))
    comm.barrier()
    return len(done)


def test_work_of_one_rank_may_take_longer_than_the_time_out(pool: Pool) -> None:
    start = time.monotonic()
    assert pool.call(lead, 4, 0.5) == [0, 8, 0]
    assert time.monotonic() - start > 2 * 1.5  # each work is longer than the time-out, each piece is shorter
    pool._end()


def test_work_of_one_rank_that_does_not_move_is_stuck(pool: Pool) -> None:
    words = r"rank [02] waited 1.5 s in evaluation for rank 1 in (.|\n)*rank 1: lead\(\), in an evaluation of its own"
    with pytest.raises(WorkerStuck, match=words):
        pool.call(lead, 1, 60.0)
