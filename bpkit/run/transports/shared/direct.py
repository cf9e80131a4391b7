"""Messages that are not copied: the receiver reads the sender's memory, and says when it has.

Two semaphores a pair of ranks: one counts messages that are ready, one those that were taken.  Messages of a
pair keep their order.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

from bpkit.run.transports.comm import Handle
from bpkit.run.transports.shared.rows import Program, run_program
from bpkit.run.transports.shared.semaphores import Pairs, SemLock, Waiter


class _Message(Handle):
    """One message under way, at either end of it; `then` runs when the peer's token has come."""

    polled = True

    def __init__(self, queue: deque[_Message], token: SemLock, peer: int, waiter: Waiter, operation: str,
                 then: Callable[[], object] = lambda: None) -> None:  # fmt: skip
        self._queue, self._token, self._peer = queue, token, peer
        self._waiter, self._operation, self._then = waiter, operation, then
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
        self._then()
        self.finished = True


class Direct:
    """One rank's messages in memory that its peers see.

    Parameters
    ----------
    ready, taken : mapping of rank to pair of semaphores
        Tokens from and to each other rank.
    waiter : Waiter
    """

    def __init__(self, ready: Pairs, taken: Pairs, waiter: Waiter) -> None:
        self._ready, self._taken, self._waiter = ready, taken, waiter
        self._outgoing: dict[int, deque[_Message]] = {peer: deque() for peer in ready}
        self._incoming: dict[int, deque[_Message]] = {peer: deque() for peer in ready}

    def send(self, to: int) -> Handle:
        """Say that a message is ready; it rests until the handle has finished."""
        self._ready[to][1].release()
        return _Message(self._outgoing[to], self._taken[to][0], to, self._waiter, "send")

    def recv(self, source: int, program: Program) -> Handle:
        """Run `program`, which reads the sender's memory, once the next message of `source` is ready."""

        def take() -> None:
            run_program(program)
            self._taken[source][1].release()

        return _Message(self._incoming[source], self._ready[source][0], source, self._waiter, "recv", take)
