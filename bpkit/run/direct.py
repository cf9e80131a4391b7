"""Messages that are not copied: the receiver reads the sender's memory, and says when it has.

Two semaphores a pair of ranks: one counts messages that are ready, one those that were taken.  Messages of a
pair keep their order.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping

from .barrier import SemLock, Waiter
from .comm import Handle
from .rows import Program, run_program

Pairs = Mapping[int, SemLock]  # by the other rank


class _Message(Handle):
    """One message under way, at either end of it."""

    polled = True

    def __init__(self, queue: deque[_Message], token: SemLock, peer: int, waiter: Waiter, operation: str) -> None:
        self._queue, self._token, self._peer = queue, token, peer
        self._waiter, self._operation = waiter, operation
        self.finished = False
        queue.append(self)

    def poll(self) -> bool:
        while not self.finished and self._token.acquire(False):
            self._queue.popleft().end()
        return self.finished

    def wait(self) -> None:
        while not self.finished:
            self._waiter.take(self._token, self._operation, self._peer)
            self._queue.popleft().end()

    def end(self) -> None:
        """The peer's token has come."""
        self.finished = True


class _Incoming(_Message):
    def __init__(self, queue: deque[_Message], token: SemLock, peer: int, waiter: Waiter, program: Program,
                 taken: SemLock) -> None:  # fmt: skip
        super().__init__(queue, token, peer, waiter, "recv")
        self._program, self._taken = program, taken

    def end(self) -> None:
        run_program(self._program)
        self._taken.release()
        self.finished = True


class Direct:
    """One rank's messages in memory that its peers see.

    Parameters
    ----------
    ready_in, ready_out, taken_in, taken_out : mapping of rank to semaphore
        Tokens from and to each other rank.
    waiter : Waiter
    """

    def __init__(self, ready_in: Pairs, ready_out: Pairs, taken_in: Pairs, taken_out: Pairs, *, waiter: Waiter) -> None:
        self._ready_in, self._ready_out, self._taken_in, self._taken_out = ready_in, ready_out, taken_in, taken_out
        self._waiter = waiter
        self._outgoing: dict[int, deque[_Message]] = {peer: deque() for peer in ready_in}
        self._incoming: dict[int, deque[_Message]] = {peer: deque() for peer in ready_in}

    def send(self, to: int) -> Handle:
        """Say that a message is ready; it rests until the handle has finished."""
        self._ready_out[to].release()
        return _Message(self._outgoing[to], self._taken_in[to], to, self._waiter, "send")

    def recv(self, source: int, program: Program) -> Handle:
        """Run `program`, which reads the sender's memory, once the next message of `source` is ready."""
        return _Incoming(self._incoming[source], self._ready_in[source], source, self._waiter, program,
                         self._taken_out[source])  # fmt: skip
