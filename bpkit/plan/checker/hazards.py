"""What each action of a row waits for, derived from the table of verbs."""

from collections.abc import Sequence

from bpkit.plan.action import VERBS, Action, Part
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
    kinds = {action.kind for action in row}
    noted = {touch.letter for kind in kinds if VERBS[kind].stream != "compute" for touch in _TOUCHES[kind]}
    touches = {kind: [(touch, changes) for touch, changes in _TOUCHES[kind].items() if touch.letter in noted]
               for kind in kinds}  # fmt: skip
    stages, atoms = {action.stage for action in row}, Atoms(action.part for action in row if action.part)
    flat: dict[tuple[str, str, int, Part | None], list[_Key]] = {}  # what has been asked for
    last = {"compute": -1}  # by stream
    # Communication that touched a buffer; compute needs no note, since all later actions wait for the last of it.
    changer: dict[_Key, int] = {}
    readers: dict[_Key, list[int]] = {}
    for index, action in enumerate(row):
        stream = VERBS[action.kind].stream
        waits = {last["compute"], last.get(stream, -1)}
        for (letter, edge), changes in touches[action.kind]:
            if letter in "AD":
                keys = [(letter, action.stage + edge, action.mb, 0)]
            elif (asked := (letter, action.kind, action.stage, action.part)) not in flat:
                keys = flat[asked] = _flat(letter, action, stages, atoms, plan)
            else:
                keys = flat[asked]
            for key in keys:
                waits.add(changer.get(key, -1))
                if changes:
                    waits.update(readers.pop(key, ()))
                    changer[key] = index if stream != "compute" else -1
                elif stream != "compute":
                    readers.setdefault(key, []).append(index)
        waits.discard(-1)
        result.append(tuple(sorted(waits)))
        last[stream] = index
    return tuple(result)


def _flat(letter: str, action: Action, stages: set[int], atoms: Atoms, plan: Plan | None) -> list[_Key]:
    """The flat buffers of a letter, in atoms, or the norm, that an action touches."""
    if letter == "N":
        return [("N", -1, None, 0)]
    own = plan.near(action, letter) if plan else (action.stage,)
    near = stages if action.kind in ("NORM", "SUM_TIED") else own  # those touch every stage's gradient
    places = {plan.room(letter, other) if plan else other for other in near}
    return [(letter, place, None, atom) for place in places for atom in atoms.inside(action.part)]
