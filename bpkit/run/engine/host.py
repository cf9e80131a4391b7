"""The executor: a small interpreter of one compiled row.

A row is bound once into closures over this rank's buffers and transport; each step then calls them in order.
Communication is posted: it starts when what it waits for has ended, and whoever reads its buffers waits for it
(the exposed communication).  What is under way is moved along at action boundaries.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from time import perf_counter_ns, thread_time_ns

from bpkit.plan.program import Instruction
from bpkit.run.engine.context import Call
from bpkit.run.engine.groups import Groups
from bpkit.run.errors import PeerTimeout
from bpkit.run.transports.comm import Handle
from bpkit.run.transports.shared.semaphores import yield_core
from bpkit.trace import Log

_YIELDS = 1000  # times the core is given away before the wait sleeps
_NAP = 5e-5  # seconds of one sleep


@dataclass
class _Pending:
    """Communication that has not ended: not started while `posted` is None."""

    start: Call
    needs: tuple[int, ...]
    posted: Handle | None = None


@dataclass
class Executor:
    """Runs the row of one rank.

    Parameters
    ----------
    row : sequence of Instruction
    bound : sequence of callables
        What each instruction calls (see `bpkit.run.engine.context`).
    groups : Groups
    """

    row: Sequence[Instruction]
    bound: Sequence[Call]
    groups: Groups
    ahead = 0  # steps under way when `run` returns
    _pending: dict[int, _Pending] = field(default_factory=dict)

    def __post_init__(self) -> None:
        compute = [step.action.verb.stream == "compute" for step in self.row]
        self._steps = [(run, step.waits, c) for run, step, c in zip(self.bound, self.row, compute, strict=True)]
        self._uncounted = [min(0, step.bytes(1)) for step in self.row]
        self._columns = self._blank()

    def _blank(self) -> tuple[list[int], ...]:
        """One step's columns: start, end, wait, CPU time (-1: not taken) and bytes (-1: not counted)."""
        width = len(self.row)
        return [0] * width, [0] * width, [0] * width, [-1] * width, self._uncounted.copy()

    def finish(self) -> int:
        """Nothing to wait for: `run` has filled the log, and the host's clock says when the step began (0)."""
        return 0

    def clock_error(self) -> float:
        """None: times are the host's own."""
        return 0.0

    def run(self, step: int, log: Log, line: int) -> None:
        """Run the row once; line `line` of the log is filled."""
        start, end, wait, cpu, _ = self._columns
        pending, mark = self._pending, self.groups.world.mark
        mark[0] = step
        for index, (run, needs, compute) in enumerate(self._steps):
            mark[1] = index
            start[index] = began = ready = perf_counter_ns()
            if not compute:
                pending[index] = _Pending(run, needs)
                self._move()
                wait[index] = perf_counter_ns() - began
                continue
            if pending:
                self._until(needs)
                ready = perf_counter_ns()
            busy = thread_time_ns()
            run()
            cpu[index] = thread_time_ns() - busy  # first: the kernel takes the core away at such calls
            end[index] = perf_counter_ns()
            wait[index] = ready - began
        if pending:
            last, began = max(pending), perf_counter_ns()
            self._until(tuple(pending))
            wait[last] += perf_counter_ns() - began
        log.start[line], log.end[line], log.wait[line], log.cpu[line], log.bytes[line] = self._columns
        self._columns = self._blank()

    # -- communication under way -------------------------------------------------------------------------

    def _move(self) -> bool:
        """Start what can start and look once at the rest; whether anything ended."""
        ended = False
        for index, entry in list(self._pending.items()):
            if entry.posted is None:
                if any(need in self._pending for need in entry.needs):
                    continue
                before = self.groups.world.sent
                entry.posted = entry.start()
                if self._columns[4][index] >= 0:
                    self._columns[4][index] += self.groups.world.sent - before
            if entry.posted is None or entry.posted.poll():
                self._end(index)
                ended = True
        return ended

    def _end(self, index: int) -> None:
        self._columns[1][index] = perf_counter_ns()
        del self._pending[index]

    def _until(self, needs: Sequence[int]) -> None:
        """Return when the communication that `needs` names has ended; move everything else along."""
        spins, deadline = 0, 0.0
        while True:
            moved = self._move()
            left = [index for index in needs if index in self._pending]
            if not left:
                return
            first = self._pending[left[0]].posted
            if first is not None and self._may_block():
                first.wait()
            elif (message := self._message_for(left)) is not None and not self._others_follow():
                message.wait()
            elif not moved:
                if message is not None:
                    message.watch()
                self.groups.world.progress()
                spins += 1
                yield_core() if spins < _YIELDS else time.sleep(_NAP)
                deadline = self._still_in_time(spins, deadline, left[0])

    def _may_block(self) -> bool:
        """Whether nothing else of this rank waits to be started or polled."""
        handles = [entry.posted for entry in self._pending.values()]
        return len(handles) == 1 or not any(handle is None or handle.polled for handle in handles)

    def _others_follow(self) -> bool:
        """Whether something waits to be started after communication that ends by itself, such as a send of a sum."""
        posted = {i for i, entry in self._pending.items() if entry.posted is not None and not entry.posted.passive}
        return any(entry.posted is None and not posted.isdisjoint(entry.needs) for entry in self._pending.values())

    def _message_for(self, indices: Sequence[int]) -> Handle | None:
        """A message that only its reader takes, among all that must end first."""
        for index in indices:
            entry = self._pending.get(index)
            if entry is not None and entry.posted is None:
                found = self._message_for(entry.needs)
                if found is not None:
                    return found
            elif entry is not None and entry.posted is not None and entry.posted.passive:
                return entry.posted
        return None

    def _still_in_time(self, spins: int, deadline: float, index: int) -> float:
        """Raise once a wait has lasted too long; looks at the clock now and then."""
        if spins % 256 != 1:
            return deadline
        now = time.monotonic()
        if deadline and now > deadline:
            raise PeerTimeout(f"waited {self.groups.world.timeout:g} s for {self.row[index].action}")
        return deadline or now + self.groups.world.timeout

