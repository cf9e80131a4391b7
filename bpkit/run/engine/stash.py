"""Weight stashing: which copy of a stage's parameters each action uses, where updates do not wait for backwards."""

from collections import Counter, defaultdict
from collections.abc import Sequence

from bpkit.plan.action import Action


def stash(row: Sequence[Action]) -> tuple[dict[int, tuple[int, int]], dict[int, int]]:
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
    of_forward: dict[tuple[int, int | None], int] = {}
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
