"""The trace: what each rank did when, measured or simulated, in columns."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bpkit.plan.action import Action

Column = NDArray[np.int64]
_COLUMNS = ("rank", "step", "cell", "start", "end", "wait", "cpu", "bytes")


@dataclass(frozen=True)
class Trace:
    """Columns of equal length, one entry an executed action.

    Times are nanoseconds on one clock for all ranks (the host's monotonic clock for a measured trace), from
    the start of the first action.

    Parameters
    ----------
    cells : tuple of str
        The distinct actions, as text.
    rank, step, cell : ndarray
        Rank, training step, and index into `cells`.
    start, end : ndarray
        When the row reached the action, and when it ended.  A communication that runs beside the row's
        compute ends when its end was first seen, at an action boundary.
    wait : ndarray
        How long the row itself was blocked: before a compute action, for the communication it reads (the
        *exposed* communication); in a communication, until the row went on.
    cpu : ndarray
        CPU time of the row's thread inside a compute action; -1 where it was not taken.
    bytes : ndarray
        Bytes counted at the send; 0 where nothing was sent, -1 where a native collective does not count.
    simulated : bool
        Whether the times come from a model and not from a clock.
    """

    cells: tuple[str, ...]
    rank: Column
    step: Column
    cell: Column
    start: Column
    end: Column
    wait: Column
    cpu: Column
    bytes: Column
    simulated: bool = False

    def __len__(self) -> int:
        return len(self.rank)

    @property
    def ranks(self) -> int:
        """Number of ranks."""
        return int(self.rank.max()) + 1 if len(self) else 0

    @property
    def steps(self) -> NDArray[np.int64]:
        """The training steps, in order."""
        return np.unique(self.step)

    def where(self, mask: NDArray[np.bool_]) -> Trace:
        """The entries that `mask` selects."""
        return replace(self, **{name: getattr(self, name)[mask] for name in _COLUMNS})

    def at_step(self, step: int) -> Trace:
        """The entries of one training step."""
        return self.where(self.step == step)

    def kinds(self) -> NDArray[np.str_]:
        """The kind of action of each entry (``F``, ``REDUCE_GRAD``, ...)."""
        names = np.array([Action.parse(cell).kind for cell in self.cells] or [""])
        return names[self.cell]

    def compute(self) -> NDArray[np.bool_]:
        """Which entries are compute actions."""
        is_compute = np.array([Action.parse(cell).verb.stream == "compute" for cell in self.cells] or [False])
        return is_compute[self.cell]

    def waiting_for_core(self) -> Column:
        """Nanoseconds of each compute action in which the operating system had given the core to someone else.

        A clock read costs a little CPU time, so an action that never lost its core can show more CPU than wall time.
        """
        lost = np.maximum(0, self.end - self.start - self.wait - self.cpu)
        return np.where(self.compute() & (self.cpu >= 0) & (not self.simulated), lost, 0)

    def step_times(self) -> NDArray[np.float64]:
        """Duration of each step in seconds: the period from its first start to the next step's (rank mean).

        The last step lasts to its own last end, since no step follows it.
        """
        start, end = self.bounds()
        return np.diff(np.column_stack([start, end.max(axis=1)]), axis=1).mean(axis=0) / 1e9

    def places(self) -> NDArray[np.int64]:
        """Where each entry stands in a flattened table of shape (ranks, steps)."""
        return self.rank * len(self.steps) + np.searchsorted(self.steps, self.step)

    def bounds(self) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """First start and last end of each rank in each step, in nanoseconds, of shape (ranks, steps)."""
        shape = (self.ranks, len(self.steps))
        start, end = np.full(shape, np.inf), np.full(shape, -np.inf)
        np.minimum.at(start.reshape(-1), self.places(), self.start)
        np.maximum.at(end.reshape(-1), self.places(), self.end)
        return start, end

    def rows(self) -> Iterator[tuple[int, int, str, int, int, int]]:
        """Entries as (rank, step, cell, start, end, wait)."""
        columns = (self.rank, self.step, self.cell, self.start, self.end, self.wait)
        for rank, step, cell, start, end, wait in zip(*(column.tolist() for column in columns), strict=True):
            yield rank, step, self.cells[cell], start, end, wait

    def to_chrome(self, path: str | Path) -> Path:
        """Write the trace in Chrome's trace-event format, which Perfetto opens.

        One process a rank, one thread a stream; ``ts`` and ``dur`` are microseconds.  A wait is an event of its own.
        """
        streams = ["compute", "data", "tensor", "in", "out"]
        events: list[dict[str, object]] = []
        for rank in range(self.ranks):
            events.append({"ph": "M", "pid": rank, "name": "process_name", "args": {"name": f"rank {rank}"}})
            events += [{"ph": "M", "pid": rank, "tid": i, "name": "thread_name", "args": {"name": name}}
                       for i, name in enumerate(streams)]  # fmt: skip
        for rank, step, cell, start, end, wait in self.rows():
            action = Action.parse(cell)
            stream = action.verb.stream
            base = {"ph": "X", "pid": rank, "tid": streams.index(stream), "args": {"step": step}}
            begin = start + (wait if stream == "compute" else 0)
            events.append({**base, "name": cell, "cat": action.kind, "ts": begin / 1e3,
                           "dur": max(0, end - begin) / 1e3})  # fmt: skip
            if wait and stream == "compute":
                events.append({**base, "name": f"wait for {cell}", "cat": "wait", "ts": start / 1e3, "dur": wait / 1e3})
        target = Path(path)
        target.write_text(json.dumps({"displayTimeUnit": "ms", "traceEvents": events}))
        return target

    @classmethod
    def collect(cls, logs: Sequence[Log], cells: Sequence[Sequence[str]], simulated: bool = False) -> Trace:
        """One trace from the logs of all ranks.

        Parameters
        ----------
        logs : sequence of Log
            One a rank.
        cells : sequence of sequences of str
            The row of each rank, as text.
        """
        names = tuple(dict.fromkeys(name for row in cells for name in row))
        lookup = {name: i for i, name in enumerate(names)}
        parts = []
        for rank, (log, row) in enumerate(zip(logs, cells, strict=True)):
            steps, width = log.start.shape
            index = np.tile([lookup[name] for name in row], steps)
            noted = (log.start, log.end, log.wait, log.cpu, log.bytes)
            parts.append([np.full(steps * width, rank), np.repeat(log.steps, width), index, *map(np.ravel, noted)])
        joined = [np.concatenate(values).astype(np.int64) for values in zip(*parts, strict=True)]
        columns: dict[str, Any] = dict(zip(_COLUMNS, joined, strict=True))
        found = cls(names, **columns, simulated=simulated)
        origin = found.start.min() if len(found) else 0
        return replace(found, start=found.start - origin, end=found.end - origin)


@dataclass(frozen=True)
class Log:
    """What one rank noted: arrays of shape (steps, actions of its row), times in nanoseconds."""

    steps: Column
    start: Column
    end: Column
    wait: Column
    cpu: Column
    bytes: Column

    @classmethod
    def empty(cls, steps: Sequence[int], width: int) -> Log:
        """Room for the given steps of a row of `width` actions."""
        return cls.of(steps, *([[0] * width] * len(steps) for _ in range(5)))

    @classmethod
    def of(cls, *columns: Sequence[Any]) -> Log:
        """What was noted in plain lists, in the order of the columns."""
        return cls(*(np.asarray(column, dtype=np.int64) for column in columns))

    def until(self, line: int) -> Log:
        """The lines up to and with `line`, when a run ended early."""
        return Log(*(getattr(self, column.name)[: line + 1] for column in fields(self)))
