"""What calls find in a worker: random numbers, modules as the caller has them, own processes, parts of tensors."""

from __future__ import annotations

import importlib
import os
import random
import signal
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from bpkit.run.errors import WorkerDied
from bpkit.run.processes.parcel import Parcel
from bpkit.run.processes.pool import Pool
from bpkit.run.transports.comm import Comm

from .pools import gone, group_of, shared_pool
from .test_pool_scripts import start

pytestmark = pytest.mark.slow


def draw(comm: Comm) -> tuple[int, int, int]:
    return int(torch.randint(1 << 60, (1,))), int(np.random.randint(1 << 60)), random.randrange(1 << 60)


@pytest.mark.parametrize("method", ["forkserver", "spawn"])
def test_random_numbers_are_unlike_between_ranks_and_launches(method: str) -> None:
    drawn: list[int] = []
    for _ in range(2):
        with Pool(2, start_method=method) as pool:
            for numbers in pool.call(draw) + pool.call(draw):
                drawn += numbers
    assert len(set(drawn)) == len(drawn) == 2 * 2 * 2 * 3


Write = Callable[..., ModuleType]


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Write]:
    """Writes modules, each text as if a minute after the one before, and imports or reloads them."""
    monkeypatch.syspath_prepend(str(tmp_path))
    names: dict[str, int] = {}

    def write(name: str, text: str, load: bool = True) -> ModuleType:
        names[name] = names.get(name, 0) + 60
        path = tmp_path / f"{name}.py"
        path.write_text(textwrap.dedent(text))
        os.utime(path, (1e9 + names[name],) * 2)
        importlib.invalidate_caches()
        module = importlib.import_module(name)
        return importlib.reload(module) if load and names[name] > 60 else module

    yield write
    for name in names:
        sys.modules.pop(name, None)


@pytest.mark.parametrize("cloudpickle", [True, False])
def test_an_edited_and_reloaded_module_runs_as_it_is_here(write: Write, monkeypatch: pytest.MonkeyPatch,
                                                          cloudpickle: bool) -> None:  # fmt: skip
    if not cloudpickle:
        monkeypatch.setitem(sys.modules, "cloudpickle", None)
    module = write("edited_one", "def f(comm): return 'old'")
    with Pool(2) as pool:
        assert pool.call(module.f) == ["old"] * 2 and pool.call(module.f) == ["old"] * 2 and pool.generation == 1
        write("edited_one", "def f(comm): return 'new'")
        assert pool.call(module.f) == ["new"] * 2 and pool.call(module.f) == ["new"] * 2 and pool.generation == 2


def test_classes_constants_and_helpers_of_an_edited_module_too(write: Write) -> None:
    helper = write("edited_helper", "NUMBER = 1\nclass A:\n    def value(self): return 'old'\ndef gone(): pass")
    module = write("edited_two", "import edited_helper as h\ndef f(comm, a): return h.NUMBER, h.A().value(), a.value()")
    with Pool(1) as pool:
        assert pool.call(module.f, helper.A()) == [(1, "old", "old")]
        write("edited_helper", "NUMBER = 2\nclass A:\n    def value(self): return 'old'")
        assert pool.call(module.f, helper.A()) == [(2, "old", "old")]
        write("edited_helper", "NUMBER = 2\nclass A:\n    def value(self): return 'new'")
        assert pool.call(module.f, helper.A()) == [(2, "new", "new")]
        assert pool.call(lambda comm, a: a.value(), helper.A()) == ["new"] and pool.generation == 3


def test_a_module_that_was_edited_and_not_reloaded_stays_as_it_is_here(write: Write) -> None:
    """A program may run for long while somebody edits its files; what cannot be had is said."""
    module = write("edited_three", "def f(comm): return 'old'")
    with Pool(1) as pool:
        assert pool.call(module.f) == ["old"]
        write("edited_three", "def f(comm): return 'newer'", load=False)
        assert module.f(None) == "old" and pool.call(module.f) == ["old"] and pool.generation == 1
        write("edited_three", "def f(comm): return (", load=False)  # in the middle of an edit
        assert pool.call(module.f) == ["old"]
        write("edited_three", "def f(comm): return 'newer'", load=False)
    with Pool(1) as pool:
        with pytest.raises(RuntimeError, match=r"edited_three was edited after this program imported it: the workers "
                                               r"run .*edited_three.py as it is now, .* reload it"):
            pool.call(module.f)
        importlib.reload(module)
        assert pool.call(module.f) == ["newer"]


def test_a_decorated_or_deleted_module_is_no_edited_one(write: Write, tmp_path: Path) -> None:
    module = write("edited_four", """
        import dataclasses, functools
        def twice(f):
            @functools.wraps(f)
            def inner(*args): return 2 * f(*args)
            return inner
        @dataclasses.dataclass
        class Point:
            x: int = 3
            @property
            def y(self): return self.x
            @staticmethod
            def z(): return 4
        made = lambda x: x
        @twice
        def f(comm): return Point().y + Point.z() + made(1)
        """)  # fmt: skip
    with Pool(1) as pool:
        assert pool.call(module.f) == [16]
        (tmp_path / "edited_four.py").unlink()
        assert pool.call(module.f) == [16] and pool.generation == 1


@pytest.mark.parametrize("method", ["forkserver", "spawn"])
def test_a_worker_may_have_loaders(method: str) -> None:
    class Squares(torch.utils.data.Dataset):  # of a cell: no module has it
        def __len__(self) -> int:
            return 4

        def __getitem__(self, index: int) -> int:
            return index**2

    def load(comm: Comm, workers: int) -> list[int]:
        return [int(x) for x in DataLoader(Squares(), num_workers=workers)]

    with Pool(2, start_method=method) as pool:
        assert pool.call(load, 2) == [[0, 1, 4, 9]] * 2
        assert not any(set(group_of(pid)) - {pid} for pid in pool.pids)


def breed(comm: Comm) -> None:
    """Start a process that would live on, and keep it."""
    import multiprocessing

    child = multiprocessing.Process(target=time.sleep, args=(60,))
    child.start()
    comm.cache["child"] = child


@pytest.mark.parametrize("method", ["forkserver", "spawn"])
def test_processes_of_a_worker_end_with_it(method: str) -> None:
    with Pool(2, start_method=method) as pool:
        pool.call(breed)
        groups = [group_of(pid) for pid in pool.pids]
        assert [len(group) for group in groups] == [2, 2]
        start = time.monotonic()
    assert gone([*groups[0], *groups[1]], 2.0) and time.monotonic() - start < 4


@pytest.mark.parametrize("method", ["forkserver", "spawn"])
def test_processes_of_a_worker_that_dies_end_with_it(method: str) -> None:
    with Pool(2, start_method=method) as pool:
        pool.call(breed)
        groups = [group_of(pid) for pid in pool.pids]
        begin = time.monotonic()
        with pytest.raises(WorkerDied, match="rank 1 was killed by SIGKILL"):
            pool.call(lambda comm: os.kill(os.getpid(), signal.SIGKILL) if comm.rank else time.sleep(60))
        assert gone([*groups[0], *groups[1]], 2.0) and time.monotonic() - begin < 5


def test_processes_of_workers_end_with_a_killed_caller(tmp_path: Path) -> None:
    process = start(tmp_path, """
        import time
        from bpkit.run.processes.pool import Pool
        def breed(comm):
            import multiprocessing
            child = multiprocessing.Process(target=time.sleep, args=(60,))
            child.start()
            comm.cache["child"] = child
        pool = Pool(2)
        pool.call(breed)
        print(*pool.pids, flush=True)
        time.sleep(60)
        """)  # fmt: skip
    assert process.stdout is not None
    groups = [group_of(int(pid)) for pid in process.stdout.readline().split()]
    assert [len(group) for group in groups] == [2, 2]
    process.kill()
    process.wait()
    assert gone([*groups[0], *groups[1]], 2.0)


def test_a_worker_may_have_a_pool_of_its_own() -> None:
    def nest(comm: Comm) -> list[int]:
        with Pool(2) as inner:
            return inner.call(lambda comm: comm.rank)

    assert shared_pool("shm", 2).call(nest) == [[0, 1]] * 2
    assert shared_pool("shm", 2).call(lambda comm: comm.rank) == [0, 1]


def test_a_slice_travels_as_a_slice() -> None:
    big = torch.arange(4_000_000, dtype=torch.float64).view(-1, 4)
    whole = big.numel() * 8
    cases = [(big[500:508], 8 * 32), (big[-3:], 3 * 32), (big[7], 32), (big[5:5], 0), (big.view(-1)[3:4], 8)]
    for view, needed in cases:
        parcel = Parcel([view])
        assert parcel.size < needed + 1000 < whole
        parcel.close()
    for views in ([big[:500_000], big[500_000:]], [big, big[3:5]], [big[3:5], big]):  # one storage travels once
        parcel = Parcel([views])
        assert whole <= parcel.size < whole + 2000
        parcel.close()


def back(comm: Comm, views: list[torch.Tensor]) -> list[torch.Tensor]:
    views[0] += 1  # of the memory that they share, too
    return views


def test_slices_arrive_with_their_values_and_shared_memory() -> None:
    for dtype in (torch.float32, torch.int8, torch.complex128):
        base = (torch.arange(60_000) % 100).to(dtype)
        table = base.view(200, 300)
        views = [base[777:900], base[800:1000], table[3:9, 10:20], table.t()[5:7], base[30:30], table[7, 7]]
        kept = [view.clone() for view in views]
        expected = back(None, [*views])  # type: ignore[arg-type]
        expected = [view.clone() for view in expected]
        for view, old in zip(views, kept, strict=True):
            view.copy_(old)
        for _ in range(2):
            for found in shared_pool("shm", 2).call(back, views):
                for a, b, c in zip(found, expected, views, strict=True):
                    assert torch.equal(a, b) and a.dtype == b.dtype and a.stride() == c.stride()
        assert all(torch.equal(view, old) for view, old in zip(views, kept, strict=True))


def test_a_result_that_is_a_slice_travels_as_a_slice() -> None:
    def cut(comm: Comm) -> tuple[torch.Tensor, int]:
        row = torch.full((1_000_000, 8), 3.0)[5]
        parcel = Parcel([row])
        parcel.close()
        return row, parcel.size

    for row, size in shared_pool("shm", 2).call(cut):
        assert torch.equal(row, torch.full((8,), 3.0)) and size < 1000 and row.untyped_storage().nbytes() < 1000


def cores_of_this(comm: Comm) -> set[int]:
    return os.sched_getaffinity(0)


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="only Linux lets a program choose its cores")
@pytest.mark.parametrize("method", ["forkserver", "spawn"])
def test_pinned_workers_have_cores_in_turn_of_those_that_the_caller_may_use(method: str) -> None:
    before = os.sched_getaffinity(0)
    cores = sorted(before)
    with Pool(len(cores) + 1, start_method=method, pin=True) as pool:
        assert pool.call(cores_of_this) == [{core} for core in [*cores, cores[0]]]
    with Pool(2, start_method=method, pin=True, threads_per_worker=len(cores)) as pool:
        assert pool.call(cores_of_this) == [before] * 2
    os.sched_setaffinity(0, cores[-1:])
    try:
        with Pool(2, start_method=method, pin=True) as pool:
            assert pool.call(cores_of_this) == [{cores[-1]}] * 2
    finally:
        os.sched_setaffinity(0, before)
    with Pool(1, start_method=method) as pool:
        assert pool.call(cores_of_this) == [before]


def test_pinning_where_it_cannot_be_had(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(os, "sched_setaffinity", raising=False)
    with pytest.raises(ValueError, match=r"pin=True works on Linux only: .* leave it out"):
        Pool(2, pin=True)
