"""Every way in which ranks exchange something: late tokens change nothing; a dead or stuck peer is an error in time."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from random import Random

import pytest
import torch

from bpkit.run.errors import WorkerDied, WorkerStuck
from bpkit.run.processes.pool import Pool
from bpkit.run.transports.comm import Comm, part_bounds

from . import test_comm, test_groups

pytestmark = pytest.mark.slow

TIMEOUT = 1.5
SLOT = ("SEND_F", 0)

# By name: what all ranks but 0 do, with memory of all ranks and edges of one slot; and what the error names.
EXCHANGES: dict[str, tuple[Callable, str]] = {
    "barrier": (lambda comm, memory, edges: comm.barrier(), "barrier"),
    "sum": (lambda comm, memory, edges: comm.all_reduce(memory), "all_reduce"),
    "private sum": (lambda comm, memory, edges: comm.all_reduce(memory.clone()), "all_reduce"),
    "posted sum": (lambda comm, memory, edges: comm.post_all_reduce(memory).wait(), "all_reduce"),
    "reduce-scatter": (lambda comm, memory, edges: comm.reduce_scatter(memory), "reduce_scatter"),
    "all-gather": (lambda comm, memory, edges: comm.all_gather(memory), "all_gather"),
    "broadcast": (lambda comm, memory, edges: comm.broadcast(memory, 0), "broadcast"),
    "message": (lambda comm, memory, edges: comm.recv(None, 0), "recv for rank 0"),
    "message without a copy": (lambda comm, memory, edges: comm.post_recv(memory, 0).wait(), "recv for rank 0"),
    "loan": (lambda comm, memory, edges: edges.receive((5,), torch.float32, 0, print).wait(), "recv for rank 0"),
}
IN_SHARED_MEMORY: dict[str, tuple[Callable, str]] = {
    "memory that is shown": (lambda comm, memory, edges: comm.post_send(memory, 0).wait(), "send for rank 0"),
    "a slot that does not come back": (lambda comm, memory, edges: [
        edges.send(SLOT, torch.ones(5), 0).wait() for _ in (0, 1)], "send for rank 0"),
}  # fmt: skip
CASES = [(backend, name) for backend in ("shm", "gloo") for name in EXCHANGES] + [("shm", n) for n in IN_SHARED_MEMORY]


@pytest.fixture(scope="module", params=[30.0, TIMEOUT], ids=["dies", "stuck"])
def pools(request: pytest.FixtureRequest) -> Iterator[dict[str, Pool]]:
    made = {backend: Pool(3, backend, timeout=request.param) for backend in ("shm", "gloo")}
    yield made
    for pool in made.values():
        pool.close()


def without_rank_0(comm: Comm, name: str, dies: bool) -> None:
    memory, edges = comm.empty(1000), comm.edges({SLOT: (1, 10)}, 10, 1, torch.float32)
    comm.all_reduce(torch.ones(1))  # connects the ranks
    if comm.rank:
        (EXCHANGES | IN_SHARED_MEMORY)[name][0](comm, memory, edges)
    elif dies:
        os._exit(5)
    time.sleep(10 * TIMEOUT)


@pytest.mark.parametrize(("backend", "name"), CASES)
def test_a_peer_that_does_not_come(pools: dict[str, Pool], backend: str, name: str) -> None:
    pool, words = pools[backend], (EXCHANGES | IN_SHARED_MEMORY)[name][1]
    pool.start()
    start, dies = time.monotonic(), pool.timeout > TIMEOUT
    with pytest.raises(WorkerDied if dies else WorkerStuck, match="rank 0 " if dies else f"waited 1.5 s in {words}"):
        pool.call(without_rank_0, name, dies)
    assert time.monotonic() - start < 5


def late(comm: Comm) -> None:
    """In this process, from now on: tokens are given late, often seen only when looked for again, and acted on late."""
    from bpkit.run.transports.shared import protocols
    from bpkit.run.transports.shared.protocols import Lane

    chance, give, came, run = Random(comm.rank), Lane.give, Lane.came, protocols.run

    def run_late(steps: object) -> None:
        time.sleep(chance.choice((0, 0, 1e-3)))
        run(steps)

    def give_late(lane: Lane) -> None:
        time.sleep(chance.choice((0, 0, 1e-4, 1e-3)))
        give(lane)

    protocols.run = run_late
    Lane.give, Lane.came = give_late, lambda lane: chance.random() < 0.5 and came(lane)  # type: ignore[method-assign]


@pytest.fixture(scope="module")
def delayed() -> Iterator[dict[int, Pool]]:
    made = {size: Pool(size, "shm", timeout=30) for size in (2, 4)}
    for pool in made.values():
        pool.call(late)
    yield made
    for pool in made.values():
        pool.close()


@pytest.mark.parametrize("size", [2, 4])
def test_late_tokens_change_no_collective(delayed: dict[int, Pool], size: int) -> None:
    pool, n = delayed[size], 70_001
    wanted = test_comm.total(size, n)
    for private, born in pool.call(test_comm.reduce_both, n, torch.float32):
        assert torch.equal(private, wanted) and torch.equal(born, wanted)
    test_comm.test_posted_sums(pool)
    assert all(pool.call(sums_in_turn, 20))
    for born in (True, False):
        for rank, (scattered, _, last) in enumerate(pool.call(test_comm.parts, n, born)):
            assert torch.equal(scattered, wanted[slice(*part_bounds(n, size, rank))])
            assert torch.equal(last, test_comm.values(size - 1, n))


@pytest.mark.parametrize("size", [2, 4])
def test_late_tokens_change_no_message(delayed: dict[int, Pool], size: int) -> None:
    assert all(delayed[size].call(test_comm.all_send_then_receive, 300_000))
    assert all(delayed[size].call(around, 20))
    if size == 2:
        assert [wrong for wrong, _ in delayed[2].call(test_groups.lent, 1, 100, 2)] == [0, 0]


def sums_in_turn(comm: Comm, times: int) -> bool:
    """Each rank writes, at a time of its own, what is summed, and again once it is."""
    memory, chance = comm.empty(3000), Random(comm.rank)
    out, right = torch.zeros(len(memory[slice(*comm.bounds(3000))])), 0
    for turn in range(times):
        time.sleep(chance.choice((0, 1e-3)))
        memory.fill_(comm.rank + turn)
        scatters, total = turn % 2, sum(rank + turn for rank in range(comm.size))
        handle = comm.post_reduce_scatter(memory, out, False) if scatters else comm.post_all_reduce(memory)
        handle.wait()
        right += int(((out if scatters else memory) == total).all())
    return right == times


def around(comm: Comm, times: int) -> bool:
    """Numbers go around the ranks without a copy, and who has been read writes again."""
    memory = comm.empty(1000 * comm.size, torch.int64).view(comm.size, -1)
    right, left = (comm.rank + 1) % comm.size, (comm.rank - 1) % comm.size
    right_ones = 0
    for turn in range(times):
        memory[comm.rank] = comm.rank + turn
        sent, came = comm.post_send(memory[comm.rank], right), comm.post_recv(memory[left], left)
        came.wait()
        right_ones += int((memory[left] == left + turn).all())
        sent.wait()
    return right_ones == times


def receive_while_waiting(comm: Comm) -> bool:
    """Rank 0 has posted a receive and waits for all: the sender must not wait for ever."""
    memory = comm.empty(100).fill_(float(comm.rank))
    posted = comm.post_recv(memory, 1) if comm.rank == 0 else comm.post_send(memory, 0)
    if comm.rank:
        posted.wait()
    comm.barrier()
    posted.wait()
    return bool((memory == 1).all())


def test_a_posted_receive_goes_on_while_its_rank_waits_for_something_else() -> None:
    with Pool(2, "shm", timeout=5) as pool:
        assert pool.call(receive_while_waiting) == [True, True]
