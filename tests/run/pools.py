"""Pools shared by the tests of this folder, and how to see that a process is gone."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from functools import cache

from bpkit.run.processes.pool import Pool


@cache
def shared_pool(backend: str, workers: int) -> Pool:
    """One pool for each transport and size, for tests in which nothing fails."""
    return Pool(workers, backend, timeout=30.0)


def gone(pids: Sequence[int], seconds: float) -> bool:
    """Whether all processes have ended within `seconds` (a zombie has ended)."""
    deadline = time.monotonic() + seconds
    while any(map(alive, pids)):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True


def alive(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


def group_of(pid: int) -> list[int]:
    """The processes of a worker's group, as far as they live."""
    found = [int(name) for name in os.listdir("/proc") if name.isdigit()]
    return [other for other in found if alive(other) and _group(other) == pid]


def _group(pid: int) -> int:
    try:
        return os.getpgid(pid)
    except ProcessLookupError:
        return -1


def our_files() -> list[str]:
    """Files that bpkit has left in shared memory."""
    return [name for name in os.listdir("/dev/shm") if f"bpkit-{os.getpid()}-" in name]
