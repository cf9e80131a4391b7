"""Semaphores between processes, and how a rank waits on one.

Data between processes is published through POSIX semaphores, which synchronise memory on every
processor; a bare flag in shared memory would only work where the hardware orders stores.
"""

from __future__ import annotations

import mmap
import os
import time
from _multiprocessing import SemLock  # type: ignore[import-not-found]
from collections.abc import Callable, Sequence
from functools import partial
from time import perf_counter_ns

import numpy as np

from bpkit.run.errors import PeerTimeout

_COUNTING = 1  # SemLock's kind for a counting semaphore
_TRIES = 20  # tries before the first yield: a peer on another core answers within these
_YIELDS = 200  # yields before blocking: with more workers than cores the peer needs our core
_SLICE = 0.1  # seconds of one blocking wait
_BUSY_SLICE = 0.001  # the same while there is work of our own to move along
_NAP = 1e-4  # seconds between two looks at several peers

# What a rank waits in, as a number that fits into the shared block (index 0: not waiting).
OPERATIONS = ("", "send", "recv", "barrier", "empty", "all_reduce", "reduce_scatter", "all_gather", "broadcast")

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


class Block:
    """The block that the caller shares with its workers: one row a rank.

    A row holds the mark (step, action index), the operation that the rank waits in and the rank it
    waits for. Rows lie in cache lines of their own. They only inform: nothing is synchronised by them.

    Attributes
    ----------
    marks : numpy.ndarray
        ``(ranks, 2)`` int64.
    waits : numpy.ndarray
        ``(ranks, 2)`` int64: index into `OPERATIONS`, rank waited for (-1: unknown).
    received : numpy.ndarray
        ``(ranks, ranks)`` int64: messages that the first rank has received from the second, where the
        transport cannot know when it may let go of what it has sent.
    room : numpy.ndarray
        One int64 for the answer of the rank that allocates shared memory.
    """

    WIDTH = 16

    def __init__(self, buffer: memoryview, ranks: int) -> None:
        table = np.frombuffer(buffer, np.int64, (ranks + 1) * self.WIDTH).reshape(ranks + 1, self.WIDTH)
        self.room = table[0, :1]
        self.marks = table[1:, :2]
        self.waits = table[1:, 2:4]
        self.received = np.frombuffer(buffer, np.int64, ranks * ranks, table.nbytes).reshape(ranks, ranks)

    @classmethod
    def size(cls, ranks: int) -> int:
        """Bytes of the block."""
        return 8 * (cls.WIDTH * (ranks + 1) + ranks * ranks)

    def of(self, path: str, ranks: Sequence[int]) -> Block:
        """The block of a group of ranks: a file of its own; what informs the caller stays where it is."""
        with open(path, "r+b") as file:
            block = Block(memoryview(mmap.mmap(file.fileno(), self.size(len(ranks)))), len(ranks))
        block.marks, block.waits = ([rows[rank] for rank in ranks] for rows in (self.marks, self.waits))  # type: ignore
        return block

    def waiting(self, rank: int) -> str:
        """What a rank waits in, as text; empty when it does not wait."""
        operation, peer = (int(x) for x in self.waits[rank])
        if not operation:
            return ""
        return f"waiting in {OPERATIONS[operation]}" + (f" for rank {peer}" if peer >= 0 else "")


class Waiter:
    """How one rank waits: some tries, then yields, then blocks, never longer than the time-out.

    Attributes
    ----------
    waited : int
        Nanoseconds spent in waits so far (a token that was there at the first try costs none).
    duties : dict
        What moves this rank's own unfinished sends and reductions, while there are any; one for all groups that
        the rank belongs to.
    """

    def __init__(self, rank: int, note: np.ndarray, timeout: float, ranks: Sequence[int] = (),
                 duties: dict[Callable[[], object], None] | None = None) -> None:  # fmt: skip
        self.rank = rank
        self.waited = 0
        self.duties = {} if duties is None else duties
        self._note = note
        self._timeout = timeout
        self._ranks = ranks  # of the members of a group, for messages

    def progress(self) -> None:
        """Move this rank's unfinished business along; never blocks."""
        for duty in tuple(self.duties):
            duty()

    def _global(self, peer: int) -> int:
        return self._ranks[peer] if self._ranks and peer >= 0 else peer

    def take(self, semaphore: SemLock, operation: str, peer: int) -> None:
        """Take one token of `semaphore`, which rank `peer` gives."""
        self.until(partial(semaphore.acquire, False), semaphore, operation, peer)

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
                self._note[1], self._note[0] = self._global(peer), OPERATIONS.index(operation)
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
                whom = f"rank {self._global(peer)}" if peer >= 0 else "any rank"
                raise PeerTimeout(f"waited {self._timeout:g} s in {operation} for {whom}")
            if semaphore is None:
                time.sleep(_NAP)
            elif semaphore.acquire(True, min(left, _BUSY_SLICE if self.duties else _SLICE)):
                semaphore.release()  # `check` takes it: the one place that counts tokens
            if self.duties:
                self.progress()
