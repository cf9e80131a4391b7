"""From a trace to the quantities of each rank and step."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bpkit.trace import Trace

Table = NDArray[np.float64]


@dataclass(frozen=True)
class Steps:
    """Quantities of each rank and step: arrays of shape (ranks, steps); seconds, but for `sent`.

    `bpkit.measure.Report` defines them.  `span` is last end minus first start of a rank in a step, and `sent`
    is -1 where a step sends bytes that are not counted.
    """

    period: Table
    compute: Table
    waiting_for_core: Table
    exposed_communication: Table
    hidden_communication: Table
    span: Table
    sent: Table

    @classmethod
    def of(cls, trace: Trace, paused: Iterable[int] = ()) -> Steps:
        """Measure the steps of a trace whose period is known.

        That is each step which another recorded step follows directly.  Where there is none, a step lasts
        from its first start to its own last end.

        Parameters
        ----------
        trace : Trace
        paused : iterable of int
            Steps after which something else was done (an evaluation): their period is not the step's time.
        """
        steps = trace.steps
        if not len(steps):
            raise ValueError("the trace is empty: there is nothing to report")
        place, (start, end) = trace.places(), trace.bounds()
        followed = (np.diff(steps, append=steps[-1]) == 1) & ~np.isin(steps, list(paused))
        following = np.roll(start, -1, axis=1)
        period = np.where(followed, following - start, end - start)
        kept = followed if followed.any() else np.ones_like(followed)

        def total(values: NDArray[Any]) -> Table:
            return np.bincount(place, values, minlength=start.size).reshape(start.shape).astype(float)

        compute = trace.compute()
        wall = np.maximum(0, trace.end - trace.start - trace.wait)
        lost = trace.waiting_for_core()
        table = {"period": period, "span": end - start, "compute": total((wall - lost) * compute),
                 "waiting_for_core": total(lost), "exposed_communication": total(trace.wait),
                 "hidden_communication": _hidden(trace, place, start.size, ~compute).reshape(start.shape)}  # fmt: skip
        sent = np.where(total(trace.bytes < 0) > 0, -1.0, total(np.maximum(0, trace.bytes)))
        return cls(**{name: values[:, kept] / 1e9 for name, values in table.items()}, sent=sent[:, kept])

    @classmethod
    def join(cls, parts: Iterable[Steps]) -> Steps:
        """The steps of several runs of one plan."""
        tables = list(parts)
        return cls(*(np.concatenate([getattr(t, name) for t in tables], axis=1) for name in cls.__dataclass_fields__))


def _hidden(trace: Trace, place: NDArray[np.int64], size: int, communication: NDArray[np.bool_]) -> Table:
    """Time in which communication is under way and its row is not blocked, at each (rank, step)."""
    moving: list[list[tuple[int, int]]] = [[] for _ in range(size)]
    blocked: list[list[tuple[int, int]]] = [[] for _ in range(size)]
    columns = (place, trace.start, trace.end, trace.wait, communication)
    for at, start, end, wait, is_moving in zip(*(column.tolist() for column in columns), strict=True):
        if is_moving:
            moving[at].append((start, end))
        if wait:
            blocked[at].append((start, start + wait))
    # |A without B| = |A or B| - |B|
    return np.array([covered(a + b) - covered(b) for a, b in zip(moving, blocked, strict=True)], dtype=float)


def covered(intervals: Iterable[tuple[int, int]]) -> int:
    """Length of the union of intervals."""
    total, reached = 0, -(1 << 62)
    for start, end in sorted(intervals):
        total += max(0, end - max(start, reached))
        reached = max(reached, end)
    return total
