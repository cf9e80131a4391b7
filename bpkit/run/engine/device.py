"""The executor of a row on a GPU: actions are given to streams, in the row's order, and the host waits for none.

Each stream of the plan is a CUDA stream.  An action runs behind the events of what it waits for: communication behind
the compute before it, whoever reads a buffer behind the communication that fills it.  Every action's times come from
events, brought to the host's clock by an anchor.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from time import perf_counter_ns
from typing import Any

import torch
from torch import Tensor

from bpkit.plan.program import Instruction
from bpkit.run.engine.context import Call
from bpkit.run.engine.groups import Groups
from bpkit.run.engine.host import Executor
from bpkit.trace import Log


@dataclass
class _Flight:
    """A step under way: its events, and where its times go."""

    log: Log
    line: int
    begin: Any
    bytes: list[int]
    # Of each action, by index: when the row reached it, when it could start, when it ended.
    events: list[tuple[Any, Any, Any]] = field(default_factory=list)


class StreamExecutor:
    """Runs the row of one rank on a device whose streams run beside the host.

    What an action returns, a handle, is waited for on the action's own stream: NCCL's handles make the stream wait and
    not the host.  The host waits in `finish` only, for the end of a step `ahead` steps back.

    Parameters
    ----------
    row : sequence of Instruction
    bound : sequence of callables
        What each instruction calls (see `bpkit.run.engine.context`).
    groups : Groups
    module
        ``torch.cuda``, or what has the same streams and events.
    """

    ahead = 2  # steps that the host may be ahead of the device

    def __init__(self, row: Sequence[Instruction], bound: Sequence[Call], groups: Groups,
                 module: Any = torch.cuda) -> None:  # fmt: skip
        self._groups, self._module = groups, module
        self._row = row
        names = [step.action.verb.stream for step in self._row]
        self._compute = module.current_stream()
        self._streams = {name: module.Stream() for name in names} | {"compute": self._compute}
        # Earlier actions of its own stream have ended anyhow when an action starts.
        needs = [[i for i in step.waits if names[i] != name] for step, name in zip(self._row, names, strict=True)]
        self._steps = list(zip(bound, needs, names, strict=True))
        self._flights: deque[_Flight] = deque()
        self._spare: list[Any] = []
        self._zero, self._anchor = self._now()

    def run(self, step: int, log: Log, line: int) -> None:
        """Give the row to the streams once; `finish` fills line `line` of the log."""
        mark, on = self._groups.world.mark, self._module.stream
        begin = previous = self._record(self._compute)  # after all of the step before
        flight = _Flight(log, line, begin, [min(0, step.bytes(1)) for step in self._row])
        mark[0] = step
        for index, (run, needs, name) in enumerate(self._steps):
            mark[1] = index
            stream, compute, sent = self._streams[name], name == "compute", self._groups.world.sent
            for need in needs:
                stream.wait_event(flight.events[need][2])
            if not compute:
                stream.wait_event(previous)
            ready = self._record(stream) if needs or not compute else previous
            if compute:
                run()
            else:
                with on(stream):
                    handle = run()
                    if handle is not None:
                        handle.wait()
            end = self._record(stream)
            flight.events.append((previous if compute else ready, ready, end))
            if flight.bytes[index] >= 0:
                flight.bytes[index] += self._groups.world.sent - sent
            previous = end if compute else previous
        for name, index in {name: index for index, (_, _, name) in enumerate(self._steps)}.items():
            if name != "compute":
                self._compute.wait_event(flight.events[index][2])
        self._flights.append(flight)

    def finish(self) -> int:
        """Wait until the oldest step under way has ended and write its times; when it began, on the host's clock."""
        flight = self._flights.popleft()
        last = self._flights[0].begin if self._flights else self._record(self._compute)
        last.synchronize()
        begin = self._zero + round(self._anchor.elapsed_time(flight.begin) * 1e6)
        log, line = flight.log, flight.line
        for index, events in enumerate(flight.events):
            reached, ready, end = (begin + round(flight.begin.elapsed_time(event) * 1e6) for event in events)
            log.start[line, index], log.end[line, index], log.wait[line, index] = reached, end, ready - reached
        log.cpu[line], log.bytes[line] = -1, flight.bytes
        used = {id(event): event for events in flight.events for event in events} | {id(flight.begin): flight.begin}
        self._spare += used.values()
        return begin

    def clock_error(self) -> float:
        """Seconds by which the device's clock, brought to the host's at the start, is wrong by now."""
        now, event = self._now()
        return abs(now - self._zero - self._anchor.elapsed_time(event) * 1e6) / 1e9

    def _now(self) -> tuple[int, Any]:
        """The host's time in nanoseconds, and an event that has just ended."""
        self._compute.synchronize()
        event = self._record(self._compute)
        event.synchronize()
        return perf_counter_ns(), event

    def _record(self, stream: Any) -> Any:
        event = self._spare.pop() if self._spare else self._module.Event(enable_timing=True)
        event.record(stream)
        return event


def executor(row: Sequence[Instruction], bound: Sequence[Call], groups: Groups,
             streams: Any = None) -> Executor | StreamExecutor:  # fmt: skip
    """Return what runs a row: by streams where the transport is the GPU's own, else by polling the host's.

    Parameters
    ----------
    streams : module, optional
        What has streams and events, in place of what the transport says.
    """
    if streams is not None or groups.world.name == "nccl":
        return StreamExecutor(row, bound, groups, streams or torch.cuda)
    if groups.world.device.type == "cuda":
        bound = [_ended(run) if step.action.verb.stream == "compute" else run
                 for run, step in zip(bound, row, strict=True)]  # fmt: skip
    return Executor(row, bound, groups)


def _ended(run: Call) -> Call:
    """The same, over only when the GPU is done: the host's clock then tells how long it took."""

    def run_to_its_end() -> None:
        run()
        torch.cuda.current_stream().synchronize()

    return run_to_its_end


class Feed:
    """Brings a step's samples to a worker's device: to a GPU from pinned memory, on a stream of their own, beside the
    steps under way.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream() if device.type == "cuda" else None

    def __call__(self, samples: Tensor) -> Tensor:
        if self._stream is None:
            return samples
        with torch.cuda.stream(self._stream):
            there = samples.pin_memory().to(self._device, non_blocking=True)
        compute = torch.cuda.current_stream()
        compute.wait_stream(self._stream)
        there.record_stream(compute)
        return there
