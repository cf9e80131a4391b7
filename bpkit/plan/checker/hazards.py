"""What each action of a row waits for, derived from the table of verbs."""

from collections.abc import Sequence

from bpkit.plan.action import VERBS, Action, Touch
from bpkit.plan.checker.atoms import Atoms
from bpkit.plan.plan import Plan

#: Of each kind: letter and edge of what it touches, and whether it changes or only reads it.
_TOUCHES = {kind: {**dict.fromkeys(verb.reads, False), **dict.fromkeys((*verb.writes, *verb.frees), True)}
            for kind, verb in VERBS.items()}  # fmt: skip
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
    noted = {touch.letter for kind in {a.kind for a in row if a.verb.stream != "compute"} for touch in _TOUCHES[kind]}
    last: dict[str, int] = {}  # by stream
    # Communication that touched a buffer; compute needs no note, since all later actions wait for the last of it.
    changer: dict[_Key, int] = {}
    readers: dict[_Key, list[int]] = {}
    for index, action in enumerate(row):
        stream = action.verb.stream
        waits = {-1, last.get("compute", -1), last.get(stream, -1)}
        for touch, changes in _TOUCHES[action.kind].items():
            for key in _keys(action, touch, stages, atoms, plan) if touch.letter in noted else ():
                waits.add(changer.get(key, -1))
                if changes:
                    waits.update(readers.pop(key, ()))
                    changer[key] = index if stream != "compute" else -1
                elif stream != "compute":
                    readers.setdefault(key, []).append(index)
        result.append(tuple(sorted(waits - {-1})))
        last[stream] = index
    return tuple(result)


def _keys(action: Action, touch: Touch, stages: set[int], atoms: Atoms, plan: Plan | None) -> list[_Key]:
    """The buffers that an action means by one of its touches."""
    if touch.letter in "ADSKN":
        return [(touch.letter, -1 if touch.letter == "N" else action.stage + touch.edge, action.mb, 0)]
    own = plan.near(action, touch.letter) if plan else (action.stage,)
    near = stages if action.kind in ("NORM", "SUM_TIED") else own  # those touch every stage's gradient
    places = {plan.room(touch.letter, other) if plan else other for other in near}
    return [(touch.letter, place, None, atom) for place in places for atom in atoms.inside(action.part)]
