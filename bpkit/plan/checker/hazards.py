"""What each action of a row waits for, derived from the table of verbs."""

from collections.abc import Sequence

from bpkit.plan.action import VERBS, Action
from bpkit.plan.checker.atoms import Atoms
from bpkit.plan.plan import Plan

_CHANGES = {kind: {*verb.writes, *verb.frees} for kind, verb in VERBS.items()}
_READS = {kind: {*verb.reads} - _CHANGES[kind] for kind, verb in VERBS.items()}
_Key = tuple[str, int, int | None, int]  # of a buffer: letter, stage, microbatch, and an atom of it


def hazards(row: Sequence[Action], plan: Plan | None = None) -> tuple[tuple[int, ...], ...]:
    """Indices of the earlier actions of the row that each action waits for.

    An action starts after the last earlier compute action of its row, after the last earlier action of its
    own stream, and after whatever last touched its buffers (read after write, write after write, write after
    read).  Compute actions run in order, so the first rule covers all earlier compute.

    Parameters
    ----------
    row : sequence of Action
    plan : Plan, optional
        Whose row it is: it says which stages share a buffer, or work in the memory of others.

    Returns
    -------
    tuple of tuples of int
        For each action, sorted indices; of earlier compute only the last.
    """
    result: list[tuple[int, ...]] = []
    stages, atoms = {action.stage for action in row}, Atoms(action.part for action in row if action.part)
    last: dict[str, int] = {}  # by stream
    # Communication that touched a buffer; compute needs no note, since all later actions wait for the last of it.
    changer: dict[_Key, int] = {}
    readers: dict[_Key, list[int]] = {}
    for index, action in enumerate(row):
        stream = action.verb.stream
        waits = {-1, last.get("compute", -1), last.get(stream, -1)}
        for key in _keys(action, False, stages, atoms, plan):
            waits.add(changer.get(key, -1))
            if stream != "compute":
                readers.setdefault(key, []).append(index)
        for key in _keys(action, True, stages, atoms, plan):
            waits.update(readers.pop(key, ()), (changer.pop(key, -1),))
            if stream != "compute":
                changer[key] = index
        result.append(tuple(sorted(waits - {-1})))
        last[stream] = index
    return tuple(result)


def _keys(action: Action, changes: bool, stages: set[int], atoms: Atoms, plan: Plan | None) -> list[_Key]:
    """The buffers that an action changes, or only reads."""
    keys: list[_Key] = []
    for letter, edge in (_CHANGES if changes else _READS)[action.kind]:
        if letter in "ADSKN":
            keys.append((letter, -1 if letter == "N" else action.stage + edge, action.mb, 0))
        else:
            own = plan.near(action, letter) if plan else (action.stage,)
            near = stages if action.kind in ("NORM", "SUM_TIED") else own  # those touch every stage's gradient
            places = {plan.room(letter, other) if plan else other for other in near}
            keys += [(letter, place, None, atom) for place in places for atom in atoms.inside(action.part)]
    return keys
