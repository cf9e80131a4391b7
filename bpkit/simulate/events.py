"""An event-driven run of a plan: the waits of the executor, with given times."""

from collections import Counter, deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from bpkit.plan import Plan, Program
from bpkit.plan.actions import PARTNERS, Action
from bpkit.plan.compile import check_once
from bpkit.plan.hazards import hazards
from bpkit.plan.mesh import Coordinate
from bpkit.trace import Log, Trace

Time = float | Sequence[float]


@dataclass(frozen=True)
class Times:
    """Seconds that compute takes: one number for all stages, or one a stage.

    Parameters
    ----------
    forward, backward_input, backward_weight : float or sequence of float
        F, I and W of one microbatch; the whole backward B is I + W, and RECOMPUTE is F again.
    other : mapping of str to float
        Seconds of other compute actions by kind (LOSS, UPDATE, ZERO); 0 where absent.

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


def simulate(plan: Plan | Program, times: Times | None = None, steps: int = 3) -> Trace:
    """Run a plan on a model of time.

    Waits are those of the executor: compute runs in the order of the row; a communication is posted when the row
    reaches it, moves when what it waits for has ended, and is waited for by the action that reads it.  It takes no
    time once all partners have come to it; a send ends when it has started, since the transports buffer it.
    Steps follow one another without a barrier: a rank begins the next when all its communication has ended.

    Parameters
    ----------
    plan : Plan or Program
    times : Times, optional
        F = I = W = 1 s on every stage where not given.
    steps : int
        Steps that follow one another.  The first fills an empty pipeline; later ones have the period of training.

    Returns
    -------
    Trace
        With ``simulated`` set.

    Raises
    ------
    PlanError
        If the checker refuses the plan.
    ValueError
        If there is no step, or times for another number of stages.
    """
    plan, times = plan.plan if isinstance(plan, Program) else plan, times or Times()
    if steps < 1:
        raise ValueError(f"a simulation needs at least one step, not {steps}")
    for value in (times.forward, times.backward_input, times.backward_weight):
        if isinstance(value, Sequence) and len(value) != plan.stages:
            raise ValueError(f"{plan.name} has {plan.stages} stages, but there are times for {len(value)}")
    check_once(plan)
    world = _World(plan)
    ranks = [_Rank(at, plan, steps) for at in plan.mesh.coordinates()]
    while any([rank.advance(world, times) for rank in ranks]):
        pass
    assert all(rank.finished for rank in ranks), "the checker accepts no plan that hangs"
    rows = [[str(action) for action in rank.row] for rank in ranks]
    return Trace.collect([rank.log for rank in ranks], rows, simulated=True)


@dataclass
class _World:
    """What ranks know of each other: when each message was sent and each member came to a collective."""

    plan: Plan
    sent: dict[tuple[object, ...], deque[int]] = field(default_factory=dict)
    came: dict[tuple[object, ...], dict[int, int]] = field(default_factory=dict)

    def meet(self, at: Coordinate, action: Action, nth: tuple[int, int], start: int) -> int | None:
        """When a communication that starts at `start` ends; None while a partner has not come."""
        mesh, me = self.plan.mesh, self.plan.mesh.rank(at)
        if action.verb.axis is None:
            return start
        if action.kind in PARTNERS or action.verb.stream == "in":
            return self._message(at, action, start)
        group = mesh.group(me, action.verb.axis)
        if action.kind == "SWAP_G":
            group = tuple(sorted((me, mesh.rank(at._replace(data=action.peer or 0)))))
        stage = 0 if action.kind == "NORM" else action.stage
        came = self.came.setdefault((group, action.kind, stage, action.mb, nth), {})
        came[me] = start
        return max(came.values()) if len(came) == len(group) else None

    def _message(self, at: Coordinate, action: Action, start: int) -> int | None:
        sends, me = action.kind in PARTNERS, self.plan.mesh.rank(at)
        peer = self.plan.mesh.rank(self.plan.partner(at, action))
        line = self.sent.setdefault((me, peer) if sends else (peer, me), deque())
        if sends:
            line.append(start)
            return start
        return max(start, line.popleft()) if line else None


class _Rank:
    """How far one rank has come, and when."""

    def __init__(self, at: Coordinate, plan: Plan, steps: int) -> None:
        self.at, self.row = at, plan.row(at)
        self.waits = hazards(self.row, plan.shared)
        seen: Counter[Action] = Counter()
        self.nth = [seen.update([action]) or seen[action] for action in self.row]  # which of its like in the row
        self.log = Log.empty(range(steps), len(self.row))
        self.now = self.step = self.index = 0
        self.pending: dict[int, int] = {}  # communication of this step that has not ended: when the row reached it

    @property
    def finished(self) -> bool:
        return self.step == len(self.log.steps)

    def advance(self, world: _World, times: Times) -> bool:
        """Go on until the row waits for another rank; whether anything happened."""
        moved = self._move(world)
        while not self.finished and self._next(times):
            moved = True
            self._move(world)
        return moved

    def _next(self, times: Times) -> bool:
        """The next action of the row, or the end of the step; False where it must wait for what is pending."""
        if self.index == len(self.row):
            if self.pending:
                return False
            last = int(self.log.end[self.step].max(initial=self.now))
            self.now, self.step, self.index = last, self.step + 1, 0
            return True
        at, action, start = (self.step, self.index), self.row[self.index], self.now
        if action.verb.stream != "compute":
            self.pending[self.index] = self.log.start[at] = start
        elif any(i in self.pending for i in self.waits[self.index]):
            return False
        else:
            ready = max([start, *(int(self.log.end[self.step, i]) for i in self.waits[self.index])])
            cost = times.nanoseconds(action)
            self.now = ready + cost
            self.log.start[at], self.log.wait[at], self.log.end[at] = start, ready - start, self.now
            self.log.cpu[at] = cost
        self.index += 1
        return True

    def _move(self, world: _World) -> bool:
        """End what can end of the pending communication; whether anything did."""
        before = len(self.pending)
        for i, posted in list(self.pending.items()):
            if any(j in self.pending for j in self.waits[i]):
                continue
            start = max([posted, *(int(self.log.end[self.step, j]) for j in self.waits[i])])
            end = world.meet(self.at, self.row[i], (self.step, self.nth[i]), start)
            if end is not None:
                self.log.end[self.step, i] = end
                del self.pending[i]
        return len(self.pending) < before
