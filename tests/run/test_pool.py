"""The pool: what it refuses, what it runs, what it sends and what it gives back."""

from __future__ import annotations

import os
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from bpkit.run.errors import CommunicationError, NoRoom, Stopped, WorkerStuck
from bpkit.run.processes.pool import Pool
from bpkit.run.transports.comm import Comm
from bpkit.run.transports.shared import files as memory
from bpkit.run.transports.shared import names as layout

from .pools import gone, our_files, shared_pool


def rank_and_pid(comm: Comm) -> tuple[int, int]:
    return comm.rank, os.getpid()


@pytest.mark.parametrize(("arguments", "message"), [
    ({"workers": 0}, "workers must be a whole number of at least 1, not 0"),
    ({"workers": -2}, "not -2"),
    ({"workers": 1.5}, "not 1.5"),
    ({"workers": 2, "backend": "mpi"}, "unknown backend 'mpi': choose one of 'auto', 'shm', 'gloo', 'nccl'"),
    ({"workers": 2, "threads_per_worker": 0}, "threads_per_worker must be"),
    ({"workers": 2, "timeout": 0}, "timeout must be"),
    ({"workers": 2, "start_method": "fork"}, "unknown start_method 'fork': choose one of"),
    ({"workers": 999, "backend": "nccl"}, r"'nccl' needs one GPU a worker: 999 workers, \d+ GPUs here"),
])  # fmt: skip
def test_bad_arguments_are_refused_before_anything_starts(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Pool(**arguments)


def test_windows_is_told_about_wsl(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "win32")
    with pytest.raises(RuntimeError, match="WSL2"):
        Pool(2)


def test_too_small_shared_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "free_room", lambda: 100_000)
    with pytest.raises(NoRoom, match=r"backend 'shm' with 4 workers needs [\d.]+ MB of shared memory, 0\.1 MB"):
        Pool(4, "shm")
    pool = Pool(4)
    assert pool.backend == "gloo" and "0.1 MB are free" in pool.backend_reason
    assert layout.needed(4) < 64e6 and layout.needed(8) < 64e6  # what a container has by default


def test_auto_is_shared_memory() -> None:
    assert Pool(2, device="cpu").backend == "shm"


@pytest.mark.parametrize("method", ["forkserver", "spawn"])
@pytest.mark.parametrize("backend", ["shm", "gloo"])
def test_call_and_close(backend: str, method: str) -> None:
    start = time.perf_counter()
    with Pool(2, backend, start_method=method) as pool:
        assert pool.pids == () and pool.generation == 0
        first = pool.call(rank_and_pid)
        print(f"{backend}, {method}: first call after {time.perf_counter() - start:.2f} s")
        assert [rank for rank, _ in first] == [0, 1] and tuple(pid for _, pid in first) == pool.pids
        assert pool.call(rank_and_pid) == first and pool.generation == 1  # the same processes
        value = torch.arange(5.0)
        assert [float(x) for x in pool.call(lambda comm, x: x.sum() + comm.rank, value)] == [10.0, 11.0]
        pids = pool.pids
    assert gone(pids, 2.0) and not our_files()
    with pytest.raises(RuntimeError, match="closed"):
        pool.call(rank_and_pid)


def test_a_second_launch_is_fast() -> None:
    Pool(1).start()
    start = time.perf_counter()
    with Pool(2) as pool:
        pool.start()
        took = time.perf_counter() - start
    print(f"second launch: {took:.3f} s")
    assert took < 3.0  # 0.02 s on a quiet machine


def change_it(comm: Comm, tensor: torch.Tensor, array: np.ndarray, views: list) -> tuple:
    tensor += comm.rank  # nobody else sees it
    array[0] = 7
    views[0][0] = -1.0  # shares memory with views[1]
    comm.barrier()
    return float(tensor.sum()), float(array.sum()), float(views[1][0])


@pytest.mark.parametrize("n", [10, 100_000])  # through the pipe, and through a shared file
def test_arguments_are_private_and_views_stay_views(n: int) -> None:
    tensor, array, base = torch.ones(n), np.zeros(n), torch.zeros(n)
    results = shared_pool("shm", 3).call(change_it, tensor, array, [base[:5], base])
    assert results == [(n * (1.0 + rank), 7.0, -1.0) for rank in range(3)]
    assert float(tensor.sum()) == n and float(array.sum()) == 0 and float(base.sum()) == 0


def test_no_room_for_a_payload_means_the_pipe(monkeypatch: pytest.MonkeyPatch) -> None:
    pool = shared_pool("shm", 2)
    pool.start()
    monkeypatch.setattr(memory, "free_room", lambda: 1000)
    assert pool.call(lambda comm, x: float(x.sum()), torch.ones(200_000)) == [200_000.0] * 2


def test_results_of_every_size() -> None:
    for n in (0, 3, 300_000):
        for rank, (tensor, array) in enumerate(
            shared_pool("shm", 2).call(lambda comm, n: (torch.full((n,), comm.rank), np.ones(n)), n)
        ):
            assert torch.equal(tensor, torch.full((n,), rank)) and array.shape == (n,)
            tensor += 1  # ours to change
            array += 1
    assert not our_files()


def test_environment_of_each_launch(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("BPKIT_TEST", "first")
    monkeypatch.chdir(tmp_path)

    def look(comm: Comm) -> tuple:
        return os.environ.get("BPKIT_TEST"), torch.get_num_threads(), os.getcwd()

    with Pool(1, threads_per_worker=2) as pool:
        assert pool.call(look) == [("first", 2, str(tmp_path))]
    monkeypatch.setenv("BPKIT_TEST", "second")
    with Pool(1) as pool:
        assert pool.call(look) == [("second", 1, str(tmp_path))]


def test_prints_are_kept_apart(capsys: pytest.CaptureFixture) -> None:
    def talk(comm: Comm) -> None:
        for i in range(200):
            print(f"line {i} of {comm.rank}")
        os.write(2, b"from below\n")

    pool = shared_pool("shm", 2)
    pool.call(talk)
    lines = capsys.readouterr().out.splitlines()
    for rank in (0, 1):
        assert pool.logs[rank].splitlines()[:200] == [f"line {i} of {rank}" for i in range(200)]
        assert f"[rank {rank}] line 7 of {rank}" in lines and f"[rank {rank}] from below" in lines
    assert len(lines) == 402
    pool.call(rank_and_pid)
    assert pool.logs == ["", ""] and capsys.readouterr().out == ""


def test_workers_keep_a_cache() -> None:
    pool = shared_pool("shm", 2)
    pool.call(lambda comm: comm.cache.update(key=comm.rank))
    assert pool.call(lambda comm: comm.cache["key"]) == [0, 1]


def walk(comm: Comm, seconds: float) -> None:
    for step in range(int(seconds / 0.05)):
        comm.mark[:] = step, comm.rank
        time.sleep(0.05)


def test_watch_sees_the_marks() -> None:
    seen: list[np.ndarray] = []
    shared_pool("shm", 2).call(walk, 0.6, watch=seen.append)
    steps = [int(marks[0, 0]) for marks in seen]
    assert 3 <= len(seen) <= 20 and steps == sorted(steps) and steps[-1] > 5
    assert [int(x) for x in seen[-1][:, 1]] == [0, 1]


def test_stop_from_another_thread() -> None:
    with Pool(2) as pool:
        pool.start()
        pids, stop, outcome = pool.pids, threading.Event(), []

        def run() -> None:
            try:
                pool.call(walk, 30.0, stop=stop)
            except Stopped as error:
                outcome.append(str(error))

        thread = threading.Thread(target=run)
        thread.start()
        time.sleep(0.3)
        stop.set()
        thread.join(3.0)
        assert outcome == ["walk() was stopped"] and gone(pids, 2.0)
        assert len(pool.call(rank_and_pid)) == 2 and pool.generation == 2


def test_a_limit_for_the_whole_call() -> None:
    with Pool(2) as pool:
        pool.call(rank_and_pid)
        with pytest.raises(WorkerStuck, match=r"walk\(\) did not finish within 1 s\n  rank 0: step \d+, an action"):
            pool.call(walk, 30.0, timeout=1.0, describe=lambda rank, step, index: "an action")
        assert len(pool.call(rank_and_pid)) == 2


def test_a_message_nobody_receives_is_an_error() -> None:
    def lose(comm: Comm) -> None:
        if comm.rank == 0:
            comm.send(torch.ones(2), 1)

    for backend in ("shm", "gloo"):
        with Pool(2, backend) as pool:
            with pytest.raises(CommunicationError, match="rank 0 sent 1 messages to rank 1, which received 0"):
                pool.call(lose)
            assert len(pool.call(rank_and_pid)) == 2


def test_what_cannot_be_pickled_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    lock = threading.Lock()

    def hold(comm: Comm) -> object:
        return lock

    pool = Pool(2)
    with pytest.raises(TypeError, match=
                       r"cannot send .*hold\(\) to the workers: its variable 'lock' is a _thread.lock"):
        pool.call(hold)
    with pytest.raises(TypeError, match=r"argument 2 is a _thread.lock, which cannot be pickled"):
        pool.call(rank_and_pid, 1, lock)
    monkeypatch.setitem(sys.modules, "cloudpickle", None)
    with pytest.raises(TypeError, match="Install cloudpickle"):
        pool.call(lambda comm: 1)
    assert pool.pids == ()  # nothing was started for it
    with pool:
        assert len(pool.call(rank_and_pid)) == 2  # a function of a module needs no cloudpickle
