"""What the chapters on pipelines use: periods in units, what a run waited for, messages held back on purpose."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from bpkit.course.figures.schedules import measured_times
from bpkit.measure import report
from bpkit.measure.pipeline import period
from bpkit.plan import Plan
from bpkit.run.cluster import TrainResult
from bpkit.run.transports.comm import Channel, Comm, Edges, Handle, Taker, Then
from bpkit.simulate import Times, simulate

_STAMPS = 1024  # messages of a pair of ranks whose departure is remembered
_NAP = 5e-5


def period_in_units(plan: Plan, microbatches: int, forward: float = 1, input_half: float = 1, weight_half: float = 1,
                    message: float = 0) -> float:  # fmt: skip
    """From the start of a step to that of the next, simulated, whatever the plan's cuts.

    Parameters
    ----------
    plan : Plan
    microbatches : int
        Those of the comparison: one unit is of 1/`microbatches` of the batch and a rank's whole share of the network.
    forward, input_half, weight_half : float
        Units of F, I and W.
    message : float
        Units that a message is under way.
    """
    one = microbatches / plan.microbatches * plan.workers / plan.stages
    other = {"SEND_F": message, "SEND_B": message}
    return period(simulate(plan, Times(one * forward, one * input_half, one * weight_half, other), steps=5))


def bubble_in_units(plan: Plan, microbatches: int, forward: float = 1, input_half: float = 1,
                    weight_half: float = 1) -> float:  # fmt: skip
    """A rank's units without work in a step that follows another: period less work."""
    found = period_in_units(plan, microbatches, forward, input_half, weight_half)
    return found - microbatches * (forward + input_half + weight_half)


@dataclass(frozen=True)
class Waits:
    """Shares of a step in which a rank does no work, means over ranks.

    Parameters
    ----------
    simulated : float
        Of the plan at the compute times that the run measured, where messages take no time.
    measured : float
        Of the run: one less compute, less the wait for a core.
    no_core : float
        The wait for a core.
    """

    simulated: float
    measured: float
    no_core: float


def waits_of(result: TrainResult) -> Waits:
    """What a run waited for, beside its simulation at its own compute times."""
    model = simulate(result.plan, measured_times(result.trace, result.plan.stages), steps=5)
    work = float(model.cpu[model.step == 2].sum()) / 1e9 / result.workers
    parts = report(result).parts
    lost = 1 - (parts.compute + parts.waiting_for_core) / parts.total
    return Waits(1 - work / period(model), lost, parts.waiting_for_core / parts.total)


def mean_waits(results: Sequence[TrainResult]) -> Waits:
    """The medians of `waits_of` several runs."""
    found = [waits_of(result) for result in results]
    return Waits(*(float(np.median([getattr(one, name) for one in found])) for name in Waits.__dataclass_fields__))


def hold_messages(comm: Comm, seconds: float) -> None:
    """From the next training on, let every edge between stages arrive so much after it was sent.

    To be called on all ranks by ``cluster.call(hold_messages, seconds)``, on shared memory and before the first
    training.  The sender goes on at once, as with a network card of its own: the receiver holds back what has come
    until it is due, by the one clock of the host.
    """
    held = comm.cache.get("held messages")
    if held is None:
        stamps = comm.shared(comm.size * comm.size * _STAMPS, torch.int64)
        if stamps is None:
            raise ValueError(f"messages are held back in shared memory, not over {comm.name}")
        held = comm.cache["held messages"] = {"seconds": seconds}
        board = stamps.view(comm.size, comm.size, _STAMPS)
        plain = comm.edges
        comm.edges = lambda *given: _HeldEdges(plain(*given), comm, board, held)  # type: ignore[method-assign]
    held["seconds"] = seconds


class _HeldEdges(Edges):
    """Edges whose messages are noted when they are sent, and handed on when they are due."""

    def __init__(self, edges: Edges, comm: Comm, board: torch.Tensor, held: dict[str, float]) -> None:
        self._edges, self._comm, self._board, self._held = edges, comm, board, held
        self._sent, self._received = ([0] * comm.size for _ in "sr")

    def __getattr__(self, name: str) -> Any:
        return getattr(self._edges, name)

    def send(self, channel: Channel, tensor: torch.Tensor, to: int) -> Handle:
        self._board[self._comm.rank, to, self._sent[to] % _STAMPS] = time.monotonic_ns()
        self._sent[to] += 1
        return self._edges.send(channel, tensor, to)

    def receive(self, shape: Sequence[int], dtype: torch.dtype, source: int, take: Taker) -> Then:
        at = self._board[source, self._comm.rank, self._received[source] % _STAMPS]
        self._received[source] += 1
        return _Held(self._edges.receive(shape, dtype, source, take), self._comm, at, self._held["seconds"])


class _Held(Then):
    """A message that has ended when it has come and is due."""

    def __init__(self, inner: Then, comm: Comm, at: torch.Tensor, seconds: float) -> None:
        super().__init__(inner, release=inner.release)
        self._inner, self._comm, self._at, self._seconds = inner, comm, at, seconds

    def _due(self) -> bool:
        return time.monotonic_ns() >= int(self._at) + self._seconds * 1e9

    def poll(self) -> bool:
        return self._inner.poll() and self._due()

    def wait(self) -> None:
        self._inner.wait()
        while not self._due():
            self._comm.progress()
            time.sleep(_NAP)
