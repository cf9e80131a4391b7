"""Sums that are started in one place and finished in another, while the rank computes.

A posted sum has two phases: all ranks are ready, whereupon each adds its slice; all ranks have added.
Each pair of ranks has a semaphore for either phase, so that a rank announces many sums at once, and
nobody passes signals on for others.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

from bpkit.run.transports.comm import Handle
from bpkit.run.transports.shared.rows import Program, run_program
from bpkit.run.transports.shared.semaphores import Pairs, SemLock, Waiter


class PostedSum(Handle):
    """One posted sum."""

    def __init__(self, queue: PostedSums, program: Program, peers: int) -> None:
        self.program = program
        self.finished = False
        self.left = peers  # peers whose token of the present phase has not come
        self._queue = queue

    def poll(self) -> bool:
        if not self.finished:
            self._queue.progress()
        return self.finished

    def wait(self) -> None:
        if not self.poll():
            self._queue.finish(self)


class PostedSums:
    """A rank's posted sums, first in, first out in either phase.

    Parameters
    ----------
    ready, done : mapping of rank to pair of semaphores
        Tokens from and to each other rank, of either phase.
    waiter : Waiter
    progress : callable
        Moves all unfinished business of the rank along, these sums included.
    """

    def __init__(self, ready: Pairs, done: Pairs, waiter: Waiter, progress: Callable[[], None]) -> None:
        self._peers, self._waiter, self._all = list(ready), waiter, progress
        self._ready_in, self._ready_out = ([pair[way] for pair in ready.values()] for way in (0, 1))
        self._done_in, self._done_out = ([pair[way] for pair in done.values()] for way in (0, 1))
        self._unready: deque[PostedSum] = deque()
        self._undone: deque[PostedSum] = deque()

    def __bool__(self) -> bool:
        return bool(self._unready or self._undone)

    def post(self, program: Program) -> PostedSum:
        """Say that this rank is ready for its next sum."""
        posted = PostedSum(self, program, len(self._peers))
        for semaphore in self._ready_out:
            semaphore.release()
        self._unready.append(posted)
        return posted

    def progress(self) -> None:
        """Do what can be done without waiting."""
        while self._unready and self._collect(self._unready[0], self._ready_in):
            posted = self._unready.popleft()
            run_program(posted.program)
            posted.left = len(self._peers)
            for semaphore in self._done_out:
                semaphore.release()
            self._undone.append(posted)
        while self._undone and self._collect(self._undone[0], self._done_in):
            self._undone.popleft().finished = True

    @staticmethod
    def _collect(posted: PostedSum, tokens: list[SemLock]) -> bool:
        while posted.left:
            if not tokens[posted.left - 1].acquire(False):
                return False
            posted.left -= 1
        return True

    def finish(self, posted: PostedSum) -> None:
        """Block until a posted sum has finished."""
        while not posted.finished:
            # Woken by the next token that the queue `posted` stands in waits for.
            queue, tokens = self._unready, self._ready_in
            if posted not in queue:
                queue, tokens = self._undone, self._done_in
            head, index = queue[0], queue[0].left - 1

            def moved(queue: deque = queue, head: PostedSum = head, left: int = index + 1) -> bool:
                self._all()
                return not queue or queue[0] is not head or head.left != left

            self._waiter.until(moved, tokens[index], "post_all_reduce", self._peers[index])

    def settle(self) -> None:
        """Finish all: collectives keep the order in which they were called."""
        while self:
            self.finish((self._unready or self._undone)[-1])
