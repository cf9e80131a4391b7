"""Liveness: how long values live in a row, and what follows from it.

Which slot holds what a forward saved, how many loans a channel needs, who gives a loan back, which copy of the weights
a pass reads, which write of a gradient is the first, and so what an action waits for: derived from a row once, for the
checker, the simulator and the executor alike.
"""

import heapq
from collections import Counter, defaultdict
from collections.abc import Sequence
from functools import lru_cache
from itertools import chain

from bpkit.plan.action import GIVES, VERBS, Action, Buffer, buffer
from bpkit.plan.checker.hazards import hazards
from bpkit.plan.plan import Plan

Key = tuple[int, int | None]  # stage and microbatch
#: Of what writes into a slot or gives away what is in it: A on the way there, D on the way back.
_GIVEN = {kind: (VERBS[kind].writes or VERBS[kind].reads)[0].letter for kind in {"F", "B", "I"} | GIVES}


def loans(row: Sequence[Action]) -> dict[tuple[str, int], int]:
    """Messages that each receive channel (kind, stage) of a row holds at a time, at most.

    A receive starts after the compute before it, and compute frees buffers in order, so counting in the order
    of the row is exact.
    """
    lent = {buffer(action, action.verb.writes[0]): action for action in row if action.kind in ("RECV_F", "RECV_B")}
    held: Counter[tuple[str, int]] = Counter()
    most: dict[tuple[str, int], int] = {}
    for index, returned in enumerate(given_back(row)):
        action = row[index]
        if action.kind in ("RECV_F", "RECV_B"):
            channel = (action.kind, action.stage)
            held[channel] += 1
            most[channel] = max(most.get(channel, 0), held[channel])
        held.subtract((lent[key].kind, lent[key].stage) for key in returned)
    return most


def given_back(row: Sequence[Action]) -> list[tuple[Buffer, ...]]:
    """For each action of a row, the received edges that it is the last to read."""
    lent: set[Buffer] = set()
    result: list[tuple[Buffer, ...]] = []
    for action in row:
        freed = [buffer(action, touch) for touch in action.verb.frees] if action.verb.stream == "compute" else []
        result.append(tuple(key for key in freed if key in lent))
        lent.difference_update(freed)
        lent |= {buffer(action, touch) for touch in action.verb.writes} if action.verb.stream == "in" else set()
    return result


def recomputed(row: Sequence[Action]) -> set[Key]:
    """The forwards of which nothing is kept but the output, until they are computed again."""
    return {(action.stage, action.mb) for action in row if action.kind == "RECOMPUTE"}


def peak_activations(row: Sequence[Action]) -> int:
    """The largest number of (stage, microbatch) whose forward is saved at a time in a row."""
    again = recomputed(row)
    held = most = 0
    for action in row:
        saves = action.kind == ("RECOMPUTE" if (action.stage, action.mb) in again else "F")
        held += saves - (action.kind in ("B", "W"))
        most = max(most, held)
    return most


def forward_slots(row: Sequence[Action]) -> dict[Key, int]:
    """The lowest free slot for each (stage, microbatch), so that a stage keeps no more slots than its peak.

    A slot holds what its stage gives to both neighbours, the output and the gradient of the input, which they keep
    by reference; so it is free once the backward of the microbatch has run on it and on its neighbours in the row,
    and what it gives has been sent or summed.  It is taken by the forward whose activations are kept: the second one,
    where they are computed again.
    """
    here = {action.stage for action in row if action.kind == "F"}
    again = recomputed(row)
    readers = [_readers_of_slots(action, here) for action in row]
    left = Counter(chain.from_iterable(readers))  # that are still to come
    free: defaultdict[int, list[int]] = defaultdict(list)
    used: Counter[int] = Counter()
    held: dict[Key, int] = {}
    slots: dict[Key, int] = {}
    for action, others in zip(row, readers, strict=True):
        key = (action.stage, action.mb)
        if action.kind == ("RECOMPUTE" if key in again else "F"):
            used[action.stage] += not free[action.stage]
            slots[key] = held[key] = heapq.heappop(free[action.stage]) if free[action.stage] else used[action.stage] - 1
        for other in others:
            left[other] -= 1
            if not left[other] and other in held:
                heapq.heappush(free[other[0]], held.pop(other))
    return slots


def _readers_of_slots(action: Action, here: set[int]) -> Sequence[Key]:
    """The slots, as (stage, microbatch), of which an action is one of the readers."""
    if action.kind in ("B", "W"):
        return [(stage, action.mb) for stage in (action.stage - 1, action.stage, action.stage + 1) if stage in here]
    return [(action.stage, action.mb)] if action.kind in GIVES else ()


def waits(row: Sequence[Action], plan: Plan | None = None) -> tuple[tuple[int, ...], ...]:
    """Indices of the earlier actions of the row that each action waits for: all that a reader of the plan waits for.

    To the hazards of buffers (see `hazards`, whose arguments these are) come those of slots: what writes into a slot
    waits for what gives away the values that are in it.
    """
    slots, copied = forward_slots(row), recomputed(row)
    giving: defaultdict[tuple[str, int, int], list[int]] = defaultdict(list)  # letter, stage and slot
    result = []
    for index, (action, own) in enumerate(zip(row, hazards(row, plan), strict=True)):
        letter, key = _GIVEN.get(action.kind), (action.stage, action.mb)
        if letter and not (letter == "A" and key in copied):
            place = (letter, action.stage, slots.get(key, -1))
            if action.kind in GIVES:
                giving[place].append(index)
            elif place in giving:
                own = tuple(sorted({*own, *giving.pop(place)}))
        result.append(own)
    return tuple(result)


@lru_cache(maxsize=16)
def waits_by_row(plan: Plan) -> tuple[tuple[tuple[int, ...], ...], ...]:
    """What each action of each row of a plan waits for (see `waits`); remembered, since several ask for it."""
    return tuple(waits(row, plan) for row in plan.rows)


def weight_copies(row: Sequence[Action]) -> tuple[dict[int, tuple[int, int]], dict[int, int]]:
    """Copies of parameters for a row whose backwards use the parameters of their forward.

    A forward uses the newest copy; an update writes into one that no later backward needs.  The last update of a
    stage writes into copy 0, with which the next step begins.

    Returns
    -------
    used : dict of int to (int, int)
        For each F, B, I, W and UPDATE, by its index in the row: the copy that it reads and the one it writes.
    copies : dict of int to int
        Copies of each stage.
    """
    newest: Counter[int] = Counter()
    of_forward: dict[Key, int] = {}
    in_use: defaultdict[int, Counter[int]] = defaultdict(Counter)
    last = {action.stage: index for index, action in enumerate(row) if action.kind == "UPDATE"}
    used: dict[int, tuple[int, int]] = {}
    for index, action in enumerate(row):
        stage, key = action.stage, (action.stage, action.mb)
        if action.kind == "F":
            of_forward[key] = newest[stage]
            in_use[stage][newest[stage]] += 1
        if action.kind == "UPDATE":
            taken = +in_use[stage]
            target = 0 if index == last[stage] else next(i for i in range(len(row)) if i not in taken)
            used[index] = (newest[stage], target)
            newest[stage] = target
        elif key in of_forward:
            used[index] = (of_forward[key], of_forward[key])
        if action.kind in ("B", "W"):
            in_use[stage][of_forward[key]] -= 1
    copies = {stage: 1 + max(max(used[i]) for i in used if row[i].stage == stage) for stage in last}
    return used, copies


def first_writes(row: Sequence[Action], plan: Plan | None = None) -> tuple[frozenset[int], frozenset[int]]:
    """Which backwards and scatters overwrite instead of adding, and which gradients must really be emptied.

    ZERO and SCATTER_GRAD leave an empty gradient.  The backward that comes next overwrites it, so no pass over memory
    is spent on zeros; only where something else comes next are they written, or where several stages add.

    Parameters
    ----------
    row : sequence of Action
    plan : Plan, optional
        Whose row it is: it says which stages add to the gradients of others.

    Returns
    -------
    overwriting : frozenset of int
        Indices of each B and W that is the first to touch its gradient since it was emptied, and of each SCATTER_GRAD
        that is the first since ZERO.
    emptying : frozenset of int
        Indices of each ZERO and SCATTER_GRAD after which zeros are read.
    """
    scattered = {action.stage for action in row if action.kind == "SCATTER_GRAD"}
    overwriting: set[int] = set()
    emptying: set[int] = set()
    empty: dict[int, int] = {}  # by stage: the action that emptied its gradient, while nothing has touched it since
    lent = plan.lending if plan else frozenset()
    kept: set[int] = set()  # stages whose own part holds what was scattered
    for index, action in enumerate(row):
        for stage in _gradients_touched(action, scattered, [*empty], plan):
            before = empty.pop(stage, None)
            if before is not None and action.kind in ("B", "W") and stage == action.stage and stage not in lent:
                overwriting.add(index)
            elif before is not None and action.kind != "ZERO":
                emptying.add(before)
        if action.kind in ("ZERO", "SCATTER_GRAD"):
            empty[action.stage] = index
        if action.kind == "ZERO":
            kept.discard(action.stage)
        if action.kind == "SCATTER_GRAD" and action.stage not in kept:
            overwriting.add(index)
            kept.add(action.stage)
    return frozenset(overwriting), frozenset(emptying)


def _gradients_touched(action: Action, scattered: set[int], empty: Sequence[int], plan: Plan | None) -> list[int]:
    """Stages whose whole gradient an action reads or writes; where it is of all stages, of those with an empty one."""
    if not action.verb.touches("G"):
        return []
    stages = empty if action.kind in ("NORM", "SUM_TIED") else plan.near(action, "G") if plan else [action.stage]
    own = action.kind in ("UPDATE", "NORM")  # read this rank's own part where the gradient was scattered
    return [stage for stage in stages if not (own and stage in scattered)]
