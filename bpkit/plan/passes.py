"""Passes: from the order and place of F, B, I and W to a plan that can be run.

A strategy says only the order in which forwards and backwards run, and where.  Each pass here adds
one thing that follows from that order.  ``complete`` applies them all.
"""

from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from heapq import heappop, heappush

from bpkit.plan.action import ON_EDGES, Action, Touch
from bpkit.plan.plan import Plan

Rows = list[list[Action]]


def complete(plan: Plan, norm: bool = False) -> Plan:
    """All that a compute-only plan lacks: losses, sends and receives, reductions, zeroing and updates."""
    for step in (losses, tensor_edges, communicate, zero, tensor_gradients, reduce_gradients):
        plan = step(plan)
    return update(clip(plan) if norm else plan)


def _by_row(change: Callable[[Plan, list[Action]], Iterable[Action]]) -> Callable[[Plan], Plan]:
    """A pass that changes each row by itself, from the function that does."""

    def of_plan(plan: Plan) -> Plan:
        return plan.with_rows(change(plan, list(row)) for row in plan.rows)

    of_plan.__name__, of_plan.__doc__ = change.__name__, change.__doc__
    return of_plan


def _last_gradients(row: Sequence[Action]) -> dict[int, int]:
    """Index of the action that completes each stage's gradient in a row."""
    return {action.stage: index for index, action in enumerate(row) if action.kind in ("B", "W")}


def refine(plan: Plan, k: int) -> Plan:
    """Cut each stage of a compute-only plan into `k`: forwards run ascending, backwards descending.

    A pipeline rank so gets buckets to overlap with its backward, and a sharded rank units to unshard.

    Raises
    ------
    ValueError
        If `k` is below 1, or the plan already holds more than F, B, I and W, or cuts, or what names stages.
    """
    if k < 1:
        raise ValueError(f"refine cuts each stage in at least 1, not {k}")

    if wrong := [action for row in plan.rows for action in row if action.kind not in ("F", "B", "I", "W")]:
        raise ValueError(f"refine comes before the other passes; the plan already holds {wrong[0]}")
    if k > 1 and (plan.cuts or plan.skips or plan.tied or plan.mesh.tensor > 1):
        raise ValueError(f"{plan.name}: refine comes before cuts (then of the parts), skips, ties and a tensor axis")
    inner = {"F": range(k)}
    rows = tuple(tuple(Action(action.stage * k + i, action.kind, action.mb) for action in row
                       for i in inner.get(action.kind, range(k - 1, -1, -1))) for row in plan.rows)  # fmt: skip
    place = tuple(where for where in plan.place for _ in range(k))
    return replace(plan, rows=rows, stages=plan.stages * k, place=place, cuts=plan.cuts if k == 1 else None)


@_by_row
def recompute(plan: Plan, row: list[Action]) -> Iterable[Action]:
    """A RECOMPUTE before each backward that does not directly follow its forward, whose activations are dropped."""
    for before, action in zip([None, *row], row, strict=False):
        if action.kind in ("B", "I") and before != Action(action.stage, "F", action.mb):
            yield Action(action.stage, "RECOMPUTE", action.mb)
        yield action


@_by_row
def losses(plan: Plan, row: list[Action]) -> Iterable[Action]:
    """A LOSS before the first backward action of each microbatch on the last stage."""
    done: set[int | None] = set()
    for action in row:
        if action.stage == plan.stages - 1 and action.kind in ("B", "I") and action.mb not in done:
            done.add(action.mb)
            yield Action(action.stage, "LOSS", action.mb)
        yield action


@_by_row
def tensor_edges(plan: Plan, row: list[Action]) -> Iterable[Action]:
    """The collective on the tensor axis that each edge needs: a sum, or tokens scattered or gathered."""
    for action in row:
        yield action
        if kind := plan.edge_collective(action.kind, action.stage):
            yield Action(action.stage, kind, action.mb)


def communicate(plan: Plan) -> Plan:
    """Sends and receives where neighbouring stages stand on different pipeline ranks.

    The rows are walked by the clock, in the order in which actions end (F, I and W take one unit, B two).  With a
    send, its receive is appended to the partner's row, so that every row is a projection of one order and cannot
    deadlock, even where a send waits for its receive, and receives are posted in the order in which they arrive.
    (``torch.distributed.pipelining`` places receives by the same rule, in ticks of one action each.)

    Raises
    ------
    ValueError
        If the compute actions wait for each other in a circle; the first blocked action of each row is named.
    """
    if plan.mesh.pipeline == 1:
        return plan
    queues = [deque(row) for row in plan.rows]
    rows: Rows = [[] for _ in queues]
    free = [0] * len(rows)
    arrived: dict[tuple[str, int, int | None], int] = {}
    ends: list[tuple[int, int]] = []  # a heap: when the next action of a rank ends, where its inputs are there
    known: set[int] = set()  # ranks that are in it

    def look(ranks: Iterable[int]) -> None:
        for rank in {*ranks} - known:
            ready = _ready(plan, queues[rank][0], arrived) if queues[rank] else None
            if ready is not None:
                heappush(ends, (max(free[rank], ready) + _UNITS.get(queues[rank][0].kind, 0), rank))
                known.add(rank)

    look(range(len(rows)))
    while ends:
        end, rank = heappop(ends)
        known.remove(rank)
        free[rank], action = end, queues[rank].popleft()
        rows[rank].append(action)
        _hand_over(plan, rank, action, end, rows, arrived)
        look([rank, *plan.place[max(action.stage - 1, 0) : action.stage + 2]])
    if any(queues):
        heads = ", ".join(f"row {rank} at {queue[0]}" for rank, queue in enumerate(queues) if queue)
        raise ValueError(f"{plan.name}: the compute actions wait for each other ({heads})")
    return plan.with_rows(rows)


_UNITS = {"F": 1, "RECOMPUTE": 1, "I": 1, "W": 1, "B": 2}


def _ready(plan: Plan, action: Action, arrived: dict[tuple[str, int, int | None], int]) -> int | None:
    """When the inputs of an action were produced or received; None where they are still to come."""
    if action.kind in ("F", "RECOMPUTE") and action.stage > 0:
        return arrived.get(("A", action.stage, action.mb))
    if action.kind in ("B", "I"):
        return arrived.get(("A" if action.stage == plan.stages - 1 else "D", action.stage + 1, action.mb))
    return 0


def _hand_over(plan: Plan, rank: int, action: Action, end: int, rows: Rows,
               arrived: dict[tuple[str, int, int | None], int]) -> None:  # fmt: skip
    """Mark what an action produced, and send it where the next stage is elsewhere."""
    stage, mb, made = action.stage, action.mb, action.verb.writes[:1]
    if made not in ((Touch("A", 1),), (Touch("D"),)) or plan.edge_collective(action.kind, stage):
        return  # of a pass before a collective, what is handed over is the collective's result
    way, to = ("F", stage + 1) if made[0].edge else ("B", stage - 1)
    arrived[made[0].letter, stage + made[0].edge, mb] = end
    if 0 <= to < plan.stages and plan.place[to] != rank:
        rows[rank].append(Action(stage, f"SEND_{way}", mb))
        rows[plan.place[to]].append(Action(to, f"RECV_{way}", mb))


@_by_row
def zero(plan: Plan, row: list[Action]) -> Iterable[Action]:
    """A ZERO for each stage of a row, before its first action that adds to the gradient."""
    yield from (Action(stage, "ZERO") for stage in sorted({action.stage for action in row if action.kind == "F"}))
    yield from row


def tensor_gradients(plan: Plan) -> Plan:
    """A SUM_G after the gradient of each stage of own tokens is complete: each tensor rank has a share of it."""
    return _after_gradients(plan, "SUM_G", set(plan.own_tokens))


def reduce_gradients(plan: Plan) -> Plan:
    """A REDUCE_GRAD after the action that completes a stage's gradient, and after its SEND_B.

    The send comes first because another rank's backward waits for it; the reduction is waited for last.
    """
    return _after_gradients(plan, "REDUCE_GRAD", set(range(plan.stages))) if plan.mesh.data > 1 else plan


def _after_gradients(plan: Plan, kind: str, stages: set[int]) -> Plan:
    follow = ON_EDGES | {"SEND_B", "SUM_G"}

    def insert(row: Sequence[Action]) -> Iterable[Action]:
        after: dict[int, Action] = {}
        for stage, index in _last_gradients(row).items():
            for later in range(index + 1, len(row)):  # a receive may have been posted between
                if row[later].kind in follow and row[later].stage == stage:
                    index = later
                elif row[later].kind not in ("RECV_F", "RECV_B"):
                    break
            if stage in stages:
                after[index] = Action(stage, kind)
        for index, action in enumerate(row):
            yield action
            if index in after:
                yield after[index]

    return plan.with_rows(map(insert, plan.rows))


def tie(plan: Plan, groups: Sequence[Sequence[int]]) -> Plan:
    """What tied tensors add to a plan, for each group of stages that use one.

    On one pipeline rank the first stage of a group holds the tensor and the others work in its memory; its parameters,
    where they are gathered, stay until the last of them is done.
    Where several pipeline ranks hold copies, a SUM_TIED in each of their rows, when all backwards of the row have run
    and been sent, gives the copies one gradient; what exchanges it over the data axis follows, each copy by itself:
    with more than two data ranks a transport may add them in another order, so that copies differ by rounding.

    Raises
    ------
    ValueError
        If the plan updates after single microbatches.
    """
    plan = replace(plan, tied=tuple(sorted({tuple(group) for group in groups})))
    if plan.stashed or (plan.copied and plan.holds != "all"):
        raise ValueError(f"{plan.name}: it updates after single microbatches, and a tensor tied across stages needs "
                         "the gradient of all its uses at once: cut so that one stage holds them all")  # fmt: skip
    copies = {*sum(plan.copied, ())}

    def insert(row: Sequence[Action]) -> Sequence[Action]:
        for holder in plan.lending:
            uses = [i for i, a in enumerate(row) if a.verb.stream == "compute" and holder in plan.near(a, "P")
                    and a.kind not in ("ZERO", "UPDATE")]  # fmt: skip
            row = [a for i, a in enumerate(row) if a.stage != holder or a.kind not in ("UNSHARD", "RESHARD")
                   or not uses or i < uses[0] or i > uses[-1]]  # fmt: skip
        own = sorted(copies & {action.stage for action in row})
        if not own:
            return row
        late = [a for a in row if a.stage in own and a.verb.axis == "data" and a.verb.touches("G")]
        rest = [action for action in row if action not in late]
        last = max(i for i, action in enumerate(rest) if action.kind in ON_EDGES | {"B", "W", "SEND_B", "SUM_G"})
        return [*rest[: last + 1], Action(own[0], "SUM_TIED"), *late, *rest[last + 1 :]]

    plan = plan.with_rows(map(insert, plan.rows))
    return replace(plan, name=f"{plan.name} with tied weights") if copies else plan


@_by_row
def clip(plan: Plan, row: list[Action]) -> Iterable[Action]:
    """A NORM in each row, before it first updates or receives parameters, for clipping by the global norm."""
    first = next((i for i, action in enumerate(row) if action.kind in ("UPDATE", "RECV_P")), len(row))
    return [*row[:first], Action(min(action.stage for action in row), "NORM"), *row[first:]]


@_by_row
def update(plan: Plan, row: list[Action]) -> Iterable[Action]:
    """An UPDATE of each stage at the end of the row, in the order in which gradients are completed."""
    yield from row
    done = _last_gradients(row)
    yield from (Action(stage, "UPDATE") for stage in sorted(done, key=done.__getitem__))


@_by_row
def update_each(plan: Plan, row: list[Action]) -> Iterable[Action]:
    """A ZERO before each B and an UPDATE before the next compute: every microbatch is applied by itself."""
    due: list[Action] = []
    for action in row:
        if action.verb.stream == "compute":  # what is sent first does not wait for the update
            yield from due
            due.clear()
        if action.kind == "B":
            yield Action(action.stage, "ZERO")
            due.append(Action(action.stage, "UPDATE"))
        yield action
    yield from due
