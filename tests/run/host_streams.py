"""Streams and events on the host, with the names of ``torch.cuda``: everything has ended when it returns, and is noted.

`NOTES` lists what was done, as (what, stream, event or action), so that a test can say what came behind what.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator
from time import perf_counter_ns

NOTES: list[tuple[str, int, int]] = []
_numbers = itertools.count(1)


class Event:
    def __init__(self, enable_timing: bool = False) -> None:
        self.number, self.at = -1, 0

    def record(self, stream: Stream) -> None:
        self.number, self.at = next(_numbers), perf_counter_ns()  # a number for each time that it is recorded
        NOTES.append(("record", stream.number, self.number))

    def synchronize(self) -> None:
        NOTES.append(("host waits", -1, self.number))

    def elapsed_time(self, other: Event) -> float:
        return (other.at - self.at) / 1e6


class Stream:
    def __init__(self) -> None:
        self.number = next(_numbers)

    def wait_event(self, event: Event) -> None:
        NOTES.append(("wait", self.number, event.number))

    def synchronize(self) -> None:
        NOTES.append(("host waits", -1, -1))


_current = [Stream()]


def current_stream() -> Stream:
    return _current[-1]


@contextlib.contextmanager
def stream(chosen: Stream) -> Iterator[None]:
    _current.append(chosen)
    yield
    _current.pop()


def behind(actions: int, repeat: int = 1) -> list[set[int]]:
    """What each of `actions` actions, numbered over `repeat` runs, surely came behind, by the notes."""
    seen: dict[int, set[int]] = {}  # of each stream, what has surely ended where it stands
    recorded: dict[int, set[int]] = {}
    result: list[set[int]] = [set() for _ in range(actions * repeat)]
    for what, on, number in NOTES:
        past = seen.setdefault(on, set())
        if what == "record":
            recorded[number] = set(past)
        elif what == "wait":
            past |= recorded[number]
        elif what == "run":
            result[number] = set(past)
            past.add(number)
    return result
