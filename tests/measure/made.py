"""Traces and results made by hand, with known answers."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np

import bpkit as bp
from bpkit.plan import Action, Mesh, Plan, compile, complete
from bpkit.run.cluster import TrainResult
from bpkit.trace import Trace

Entry = tuple[int, int, str, int, int, int, int, int]  # rank, step, cell, start, end, wait, cpu, bytes

#: One step of two ranks, two buckets; nanoseconds, period 100,000.
#: Rank 0 loses its core for 5,000 in 1F0 and is blocked for 2,000 + 18,000.
#: Rank 1 is blocked for 1,000 + 9,000, and hides 20,000 of its communication under 0B0.
STEP: tuple[tuple[int, str, int, int, int, int, int], ...] = (
    (0, "1F0", 0, 30_000, 0, 25_000, 0),
    (0, "1B0", 30_000, 60_000, 0, 30_200, 0),  # more CPU than wall: the clock was read twice
    (0, "1REDUCE_GRAD", 60_000, 80_000, 2_000, -1, -1),
    (0, "1UPDATE", 62_000, 90_000, 18_000, 10_000, 0),
    (1, "1F0", 0, 20_000, 0, 20_000, 0),
    (1, "1B0", 20_000, 40_000, 0, 20_000, 0),
    (1, "1REDUCE_GRAD", 40_000, 70_000, 1_000, -1, -1),
    (1, "0B0", 41_000, 61_000, 0, 20_000, 0),
    (1, "1UPDATE", 61_000, 80_000, 9_000, 10_000, 0),
)
PERIOD = 100_000


def trace(entries: Iterable[Entry], simulated: bool = False) -> Trace:
    """A trace of the given entries."""
    rows = list(entries)
    cells = tuple(dict.fromkeys(row[2] for row in rows))
    columns = [np.array([row[i] for row in rows], dtype=np.int64) for i in (0, 1, 3, 4, 5, 6, 7)]
    rank, step, *times = columns
    return Trace(cells, rank, step, np.array([cells.index(row[2]) for row in rows]), *times, simulated=simulated)


def repeated(steps: int = 3, starts: Iterable[int] | None = None, sent: int = -1, ranks: int = 2) -> Trace:
    """`STEP` over and over, each from its start (a period apart where None); `sent` bytes a reduction."""
    pairs = [(rank + more, *rest) for more in range(0, ranks, 2) for rank, *rest in STEP]
    begins = [PERIOD * i for i in range(steps)] if starts is None else list(starts)
    return trace(
        (rank, step, cell, begin + start, begin + end, wait, cpu, sent if counted else 0)
        for step, begin in enumerate(begins)
        for rank, cell, start, end, wait, cpu, counted in pairs
    )


def result(of: Trace, plan: Plan | None = None, batch: int = 8, **settings: Any) -> TrainResult:
    """A result with a trace, for a network 4-6-3."""
    network = bp.nn.mlp([4, 6, 3])
    program = compile(plan or bp.plan.data_parallel(of.ranks, buckets=2), network)
    given = {"losses": np.ones(len(of.steps)), "step_times": of.step_times(), "accuracies": (), "backend": "shm"}
    given["memory"] = tuple({"parameters": 200, "gradients": 300 + 200 * rank} for rank in range(of.ranks))
    given |= settings
    return TrainResult(network=network, trace=of, program=program, batch=batch, **given)


def pipeline() -> Plan:
    """Two stages on two ranks, one microbatch."""
    rows = ((Action(0, "F", 0), Action(0, "B", 0)), (Action(1, "F", 0), Action(1, "B", 0)))
    return complete(Plan("pipeline", rows, 2, Mesh(pipeline=2)))
