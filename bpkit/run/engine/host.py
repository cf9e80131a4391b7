"""The executor: a small interpreter of one compiled row.

A row is bound once into closures over this rank's buffers and transport; each step then calls them in order.
Communication is posted: it starts when what it waits for has ended, and whoever reads its buffers waits for it
(the exposed communication).  What is under way is moved along at action boundaries.
"""

import time
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from time import perf_counter_ns, thread_time_ns
from typing import Any

import torch
from torch import Tensor

from bpkit.nn import Context
from bpkit.plan.action import ON_EDGES, Action
from bpkit.plan.program import Instruction
from bpkit.run.engine.groups import Groups
from bpkit.run.errors import PeerTimeout
from bpkit.run.transports.comm import Handle
from bpkit.run.transports.shared.semaphores import yield_core
from bpkit.trace import Log

Runner = Callable[[], Any]  # communication returns what it posted, or None; what compute returns is not used

_YIELDS = 1000  # times the core is given away before the wait sleeps
_GIVES = ON_EDGES | {"SEND_F", "SEND_B"}  # read what a slot holds
_NAP = 5e-5  # seconds of one sleep


@dataclass
class StepData:
    """What one step works on; filled before the row runs."""

    number: int = 0
    inputs: Sequence[Tensor] = ()
    targets: Sequence[Tensor] = ()
    contexts: Sequence[Context] = ()
    weights: Sequence[float] = ()  # of each microbatch's terms, in LOSS
    scale: float = 1.0  # of the merged gradient, in UPDATE
    losses: dict[int, Tensor] = field(default_factory=dict)  # of each microbatch: the sum over its terms
    sum_over_data: Callable[[Tensor], Tensor] | None = None  # for batch norm over all data ranks

    def load(self, number: int, inputs: Tensor, targets: Tensor, first: int, microbatches: int) -> None:
        """Cut this rank's shard into microbatches; the first ones take the remainder."""
        self.inputs, self.targets = inputs.tensor_split(microbatches), targets.tensor_split(microbatches)
        starts = [first]
        for part in self.inputs:
            starts.append(starts[-1] + len(part))
        self.contexts = [Context(number, start, True, self.sum_over_data) for start in starts[:-1]]
        self.number, self.losses = number, {}

    def loss(self, ahead: bool = False) -> Callable[[], list[float]]:
        """What gives the microbatches' weighted losses, once the step has ended where the host is `ahead` of it."""
        places, weights, values = list(self.losses), self.weights, list(self.losses.values())
        if values and values[0].is_cuda:
            values = list(torch.stack(values).to("cpu", non_blocking=ahead))  # into pinned memory then

        def read() -> list[float]:
            result = [0.0] * len(weights)
            for mb, value in zip(places, values, strict=True):
                result[mb] = float(value) * weights[mb]
            return result

        return read


@dataclass
class _Pending:
    """Communication that has not ended: not started while `posted` is None."""

    start: Runner
    needs: tuple[int, ...]
    posted: Handle | None = None


@dataclass
class Executor:
    """Runs the row of one rank.

    Parameters
    ----------
    row : sequence of Instruction
    bound : sequence of callables
        What each instruction calls (see `bpkit.run.engine.compute`).
    groups : Groups
    """

    row: Sequence[Instruction]
    bound: Sequence[Runner]
    groups: Groups
    ahead = 0  # steps under way when `run` returns
    _pending: dict[int, _Pending] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.row = with_slot_waits(self.row)
        compute = [step.action.verb.stream == "compute" for step in self.row]
        self._steps = [(run, step.waits, c) for run, step, c in zip(self.bound, self.row, compute, strict=True)]
        self._columns = self._blank()

    def _blank(self) -> tuple[list[int], ...]:
        """One step's columns: start, end, wait, CPU time (-1: not taken) and bytes (-1: not counted)."""
        width = len(self.row)
        return [0] * width, [0] * width, [0] * width, [-1] * width, native_bytes(self.row)

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
                before = self.groups.sent
                entry.posted = entry.start()
                if self._columns[4][index] >= 0:
                    self._columns[4][index] += self.groups.sent - before
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


def native_bytes(row: Sequence[Instruction]) -> list[int]:
    """Bytes of each action before anything is counted; -1 where a native collective does not count."""
    return [-1 if step.action.verb.axis and step.payload and not step.counted else 0 for step in row]


def assign_slots(row: Sequence[Action]) -> dict[tuple[int, int], int]:
    """The lowest free slot for each (stage, microbatch), so that a stage keeps no more slots than its peak.

    A slot holds what its stage gives to both neighbours, the output and the gradient of the input, which they keep
    by reference; so it is free once the backward of the microbatch has run on it and on its neighbours in the row,
    and what it gives has been sent or summed.  It is taken by the forward whose activations are kept: the second one,
    where they are computed again.
    """
    taken: defaultdict[int, dict[int, int]] = defaultdict(dict)
    slots: dict[tuple[int, int], int] = {}
    here = {action.stage for action in row if action.kind == "F"}
    again = {(action.stage, action.mb) for action in row if action.kind == "RECOMPUTE"}
    users = Counter((a.stage, a.mb) for a in row if a.kind in ("B", "W", *_GIVES))  # those that are still to come
    backward = {(a.stage, a.mb) for a in row if a.kind in ("B", "W")}
    for action in row:
        stage, mb = action.stage, action.mb
        if action.kind == ("RECOMPUTE" if (stage, mb) in again else "F") and mb is not None:
            held = taken[stage]
            slot = next(i for i in range(len(held) + 1) if i not in held.values())
            slots[stage, mb] = held[mb] = slot
        elif action.kind in ("B", "W", *_GIVES) and mb is not None:
            users[stage, mb] -= 1
            backward -= {(stage, mb)} if action.kind in ("B", "W") else set()
            for near in (stage - 1, stage, stage + 1):
                around = {near - 1, near, near + 1} & here
                if not users[near, mb] and not any((other, mb) in backward for other in around):
                    taken[near].pop(mb, None)
    return slots


def with_slot_waits(row: Sequence[Instruction]) -> list[Instruction]:
    """The row in which what writes into a slot also waits for what gives away the values that are in it."""
    slots = assign_slots([step.action for step in row])
    copied = {(step.action.stage, step.action.mb) for step in row if step.action.kind == "RECOMPUTE"}  # what F gives
    giving: defaultdict[tuple[str, int, int], list[int]] = defaultdict(list)  # letter, stage and slot
    result = []
    for index, step in enumerate(row):
        stage, mb, kind = step.action.stage, step.action.mb, step.action.kind
        letter = (step.action.verb.writes or step.action.verb.reads)[0].letter  # A on the way there, D on the way back
        place = (letter, stage, slots.get((stage, -1 if mb is None else mb), -1))
        if letter == "A" and (stage, mb) in copied:
            pass
        elif kind in ("F", "B", "I"):
            step = replace(step, waits=tuple(sorted({*step.waits, *giving.pop(place, [])})))
        elif kind in _GIVES:
            giving[place].append(index)
        result.append(step)
    return result
