"""What only shared memory has: rows of peers, memory that is given back, hand-offs without loss."""

from __future__ import annotations

import os
import time

import pytest
import torch

from bpkit.run.processes.pool import Pool
from bpkit.run.transports.comm import Comm
from bpkit.run.transports.shared.files import free_room

from .pools import our_files, shared_pool


def look_at_peers(comm: Comm) -> list[float]:
    tensor = comm.empty(100, torch.float64)
    assert tensor.data_ptr() % 64 == 0 and not tensor.any()
    tensor.fill_(comm.rank + 1.0)
    comm.barrier()
    rows = comm.peers(tensor[10:20].view(2, 5))
    assert rows is not None and all(row.shape == (2, 5) for row in rows)
    assert comm.peers(torch.ones(3)) is None
    seen = [float(row[0, 0]) for row in rows]
    comm.barrier()
    rows[(comm.rank + 1) % comm.size][0, 0] = 100.0 + comm.rank  # what we write there, its owner has
    comm.barrier()
    return [*seen, float(tensor[10])]


def test_peers_see_each_others_rows() -> None:
    results = shared_pool("shm", 3).call(look_at_peers)
    assert results == [[1.0, 2.0, 3.0, 100.0 + (r - 1) % 3] for r in range(3)]


def allocate(comm: Comm, n: int, times: int) -> int:
    for _ in range(times):
        tensor = comm.empty(n)
        comm.all_reduce(tensor)
        part = tensor[5:]
        del tensor
        comm.all_reduce(part)  # a view keeps the memory
        del part
    comm.barrier()
    return free_room()


def test_memory_is_given_back() -> None:
    pool = shared_pool("shm", 2)
    pool.call(allocate, 10, 1)
    before = free_room()
    pool.call(allocate, 5_000_000, 10)  # 40 MB each time
    assert abs(before - free_room()) < 30e6
    assert not our_files()


def too_much(comm: Comm) -> None:
    comm.empty(10**13)


def test_no_room_names_what_is_needed_and_what_helps() -> None:
    from bpkit.run.errors import NoRoom, WorkerError

    with Pool(2, "shm") as pool:
        with pytest.raises(WorkerError, match=r"needs 80,000,000\.0 MB of shared memory, [\d,.]+ MB are free") as info:
            pool.call(too_much)
        assert isinstance(info.value.__cause__, NoRoom)
        assert "--shm-size" in str(info.value) and "backend='gloo'" in str(info.value)
    assert not our_files()


def hand_off(comm: Comm, times: int) -> int:
    """A token goes back and forth; every hand-off changes it."""
    token, peer = torch.zeros(1, dtype=torch.int64), 1 - comm.rank
    for _ in range(times // 2):
        if comm.rank == 0:
            comm.send(token.mul_(3).add_(1), peer)
            comm.recv(token, peer)
        else:
            comm.recv(token, peer)
            comm.send(token.mul_(5).add_(2), peer)
    return int(token)


@pytest.mark.parametrize("times", [50_000, pytest.param(1_000_000, marks=pytest.mark.slow)])
def test_no_hand_off_is_lost(times: int) -> None:
    token = 0
    for _ in range(times // 2):
        token = ((3 * token + 1) * 5 + 2) % 2**64
    start = time.perf_counter()
    results = shared_pool("shm", 2).call(hand_off, times)
    print(f"{times:,} exchanges: {(time.perf_counter() - start) / times * 1e6:.1f} us each")
    assert results[0] % 2**64 == token


def change_in_turn(comm: Comm, times: int) -> bool:
    """Each round every rank reads what the one before wrote: a barrier that lets one through early shows."""
    cells = comm.empty(8, torch.int64)
    rows = comm.peers(cells)
    assert rows is not None
    before = rows[(comm.rank - 1) % comm.size]
    for turn in range(times):
        cells[0] = turn
        comm.barrier()
        if int(before[0]) != turn:
            return False
        comm.barrier()
    return True


@pytest.mark.parametrize("ranks", [2, 3, 4, 8])
def test_the_barrier_lets_nobody_through_early(ranks: int) -> None:
    times = 300 if ranks == 8 else 2000  # eight workers share what cores there are
    with Pool(ranks, "shm", timeout=60) as pool:
        start = time.perf_counter()
        assert all(pool.call(change_in_turn, times))
        print(f"{ranks} ranks, {os.cpu_count()} cores: {(time.perf_counter() - start) / times / 2 * 1e6:.0f} us")
