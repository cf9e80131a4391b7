"""Semaphores between processes, and how a rank waits on one.

Data between processes is published through POSIX semaphores, which synchronise memory on every
processor; a bare flag in shared memory would only work where the hardware orders stores.
"""

from __future__ import annotations

import os
import time
from _multiprocessing import SemLock  # type: ignore[import-not-found]
from collections.abc import Callable
from time import perf_counter_ns

import numpy as np

from bpkit.run.errors import PeerTimeout
from bpkit.run.transports.board import OPERATIONS
from bpkit.run.transports.comm import Account

_COUNTING = 1  # SemLock's kind for a counting semaphore
_TRIES = 20  # tries before the first yield: a peer on another core answers within these
_YIELDS = 200  # yields before blocking: with more workers than cores the peer needs our core
_SLICE = 0.1  # seconds of one blocking wait
_BUSY_SLICE = 0.001  # the same while there is work of our own to move along
_NAP = 1e-4  # seconds between two looks at several peers

yield_core: Callable[[], None] = getattr(os, "sched_yield", lambda: time.sleep(0))


def create_semaphore(name: str, value: int = 0) -> SemLock:
    """A new counting semaphore under a name that other processes `open_semaphore`."""
    return SemLock(_COUNTING, value, SemLock.SEM_VALUE_MAX, "/" + name, False)


def open_semaphore(name: str) -> SemLock:
    """The semaphore that another process created under this name."""
    return SemLock._rebuild(0, _COUNTING, SemLock.SEM_VALUE_MAX, "/" + name)


def unlink_semaphore(name: str) -> None:
    """Remove the name; whoever has the semaphore open keeps it."""
    from _multiprocessing import sem_unlink  # not on Windows, where `Pool` refuses with a clear message

    sem_unlink("/" + name)


class Waiter(Account):
    """How one rank waits, in all its groups: some tries, then yields, then blocks, never longer than the time-out.

    Attributes
    ----------
    waited : int
        Nanoseconds spent in waits so far (a token that was there at the first try costs none).
    duties : dict
        What moves this rank's own unfinished sends and reductions, while there are any.
    """

    def __init__(self, note: np.ndarray, timeout: float) -> None:
        super().__init__()
        self.duties: dict[Callable[[], object], None] = {}
        self._note, self._timeout = note, timeout

    def progress(self) -> None:
        """Move this rank's unfinished business along; never blocks."""
        for duty in tuple(self.duties):
            duty()

    def until(self, check: Callable[[], bool], semaphore: SemLock | None, operation: str, peer: int) -> None:
        """Wait until `check()` holds; a token on `semaphore` is a reason to look again (None: look now and then).

        Raises
        ------
        PeerTimeout
            After the time-out.
        """
        start = perf_counter_ns()
        for _ in range(_TRIES):
            if check():
                break
        else:
            try:
                self._note[1], self._note[0] = peer, OPERATIONS.index(operation)
                self._block(check, semaphore, operation, peer)
            finally:
                self._note[0] = 0
        self.waited += perf_counter_ns() - start

    def _block(self, check: Callable[[], bool], semaphore: SemLock | None, operation: str, peer: int) -> None:
        for _ in range(_YIELDS):
            if check():
                return
            if self.duties:
                self.progress()
            yield_core()
        deadline = time.monotonic() + self._timeout
        while not check():
            left = deadline - time.monotonic()
            if left <= 0:
                whom = f"rank {peer}" if peer >= 0 else "any rank"
                raise PeerTimeout(f"waited {self._timeout:g} s in {operation} for {whom}")
            if semaphore is None:
                time.sleep(_NAP)
            elif semaphore.acquire(True, min(left, _BUSY_SLICE if self.duties else _SLICE)):
                semaphore.release()  # `check` takes it: the one place that counts tokens
            if self.duties:
                self.progress()
