"""A run of a plan in an order that its waits allow, with given times instead of work."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from bpkit.plan import Plan, Program
from bpkit.plan.action import PARTNERS, Action
from bpkit.plan.checker.check import order
from bpkit.plan.liveness import waits_by_row
from bpkit.plan.mesh import Coordinate

if TYPE_CHECKING:
    from bpkit.trace import Trace

Time = float | Sequence[float]


@dataclass(frozen=True)
class Times:
    """Seconds that compute takes: one number for all stages, or one a stage.

    Parameters
    ----------
    forward, backward_input, backward_weight : float or sequence of float
        F, I and W of one microbatch; the whole backward B is I + W, and RECOMPUTE is F again.
    other : mapping of str to float
        Seconds by kind, 0 where absent: of other compute actions (LOSS, UPDATE, ZERO), and from a send to the arrival
        of its message (SEND_F, SEND_B), while the sender goes on.

    Raises
    ------
    ValueError
        If a time is negative.
    """

    forward: Time = 1.0
    backward_input: Time = 1.0
    backward_weight: Time = 1.0
    other: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for value in (self.forward, self.backward_input, self.backward_weight, *self.other.values()):
            if min(value if isinstance(value, Sequence) else [value], default=0) < 0:
                raise ValueError(f"a time is not negative, but one of {value} is")

    def nanoseconds(self, action: Action) -> int:
        """How long an action computes."""
        parts = {"F": (self.forward,), "RECOMPUTE": (self.forward,), "I": (self.backward_input,),
                 "W": (self.backward_weight,), "B": (self.backward_input, self.backward_weight)}  # fmt: skip
        values = parts.get(action.kind, (self.other.get(action.kind, 0.0),))
        return round(1e9 * sum(v[action.stage] if isinstance(v, Sequence) else v for v in values))


def simulate(plan: Plan | Program, times: Times | None = None, steps: int = 3, batch: int = 0) -> Trace:
    """Run a plan on a model of time.

    Waits are those of the executor: compute runs in the order of the row; a communication is posted when the row
    reaches it, moves when what it waits for has ended, and is waited for by the action that reads it.  It takes no
    time once all partners have come to it and a message, if `times` say so, has travelled; a send ends when it has
    started, since the transports buffer it.
    Steps follow one another without a barrier: a rank begins the next when all its communication has ended.

    Parameters
    ----------
    plan : Plan or Program
    times : Times, optional
        F = I = W = 1 s on every stage where not given.
    steps : int
        Steps that follow one another.  The first fills an empty pipeline; later ones have the period of training.
    batch : int, optional
        Samples of a global batch, cut evenly: what the edges carry depends on it.

    Returns
    -------
    Trace
        With ``simulated`` set.  Of a program its bytes are those that a run counts; of a plan alone they are 0.

    Raises
    ------
    PlanError
        If the checker refuses the plan.
    ValueError
        If there is no step, or times for another number of stages.
    """
    program, times = plan if isinstance(plan, Program) else None, times or Times()
    plan = plan.plan if isinstance(plan, Program) else plan
    if steps < 1:
        raise ValueError(f"a simulation needs at least one step, not {steps}")
    for value in (times.forward, times.backward_input, times.backward_weight):
        if isinstance(value, Sequence) and len(value) != plan.stages:
            raise ValueError(f"{plan.name} has {plan.stages} stages, but there are times for {len(value)}")
    from bpkit.trace import Log, Trace  # they need NumPy, which the simulation itself does not

    ranks = run(plan, times, steps)
    sent = [[0] * len(r.row) for r in ranks] if program is None else [
        [step.bytes(_samples(plan, at, batch, step.action.mb or 0)) for step in program.row(at)]
        for at in plan.mesh.coordinates()]  # fmt: skip
    logs = [Log.of(range(steps), r.start, r.end, r.wait, r.cpu, [own] * steps)
            for r, own in zip(ranks, sent, strict=True)]  # fmt: skip
    return Trace.collect(logs, [list(map(str, r.row)) for r in ranks], simulated=True)


def _samples(plan: Plan, at: Coordinate, batch: int, mb: int) -> int:
    """Samples of a microbatch of a rank's even shard: the first shards, and microbatches, take the remainder."""
    trained = [data for data in range(plan.mesh.data) if data not in plan.servers]
    own = batch // len(trained) + (trained.index(at.data) < batch % len(trained)) if at.data in trained else 0
    return own // plan.microbatches + (mb < own % plan.microbatches)


def run(plan: Plan, times: Times, steps: int) -> list[Rank]:
    """The simulation itself, of plain numbers: each rank with what it notes."""
    together, waits = order(plan), waits_by_row(plan)
    ranks = [Rank(plan.row(at), waits[plan.row_index(at)], steps) for at in plan.mesh.coordinates()]
    for step in range(steps):
        begun = [max(rank.end[step - 1], default=0) for rank in ranks]  # 0 for the first: nothing has ended
        for ends in together:
            free = [ranks[rank].reach(step, i, begun[rank]) for rank, i in ends]
            ended = max(own + times.nanoseconds(ranks[rank].row[i]) for (rank, i), own in zip(ends, free, strict=True))
            for (rank, i), own in zip(ends, free, strict=True):
                sends = ranks[rank].row[i].kind in PARTNERS  # it waits for nobody
                ranks[rank].run(step, i, own if sends else ended, times)
    return ranks


@dataclass
class Rank:
    """The row of one rank, and what it notes by step and action, in nanoseconds (see `bpkit.trace.Trace`)."""

    row: tuple[Action, ...]
    waits: tuple[tuple[int, ...], ...]
    steps: int

    def __post_init__(self) -> None:
        self.start, self.end, self.wait, self.cpu = ([[0] * len(self.row) for _ in range(self.steps)] for _ in range(4))

    def reach(self, step: int, i: int, begun: int) -> int:
        """Note when the row comes to action i; when all that this waits for has ended."""
        ends = {j: self.end[step][j] for j in self.waits[i]}
        start = max((at for j, at in ends.items() if self.row[j].verb.stream == "compute"), default=begun)
        self.start[step][i] = start
        return max([start, *ends.values()])

    def run(self, step: int, i: int, ended: int, times: Times) -> None:
        """Note the end of an action, and of compute how long it took and had waited."""
        self.end[step][i] = ended
        if self.row[i].verb.stream == "compute":
            self.cpu[step][i] = times.nanoseconds(self.row[i])
            self.wait[step][i] = ended - self.cpu[step][i] - self.start[step][i]
