"""What each action of a row waits for, derived from the table of verbs."""

from collections.abc import Iterable, Mapping, Sequence
from types import MappingProxyType

from bpkit.plan.action import VERBS, Action, Touch
from bpkit.plan.checker.atoms import Atoms

_Key = tuple[str, int, int | None]  # of a buffer: letter, stage, microbatch
_BY_MICROBATCH = "ADSK"
_CHANGES = {kind: tuple({*verb.writes, *verb.frees}) for kind, verb in VERBS.items()}
_READS = {kind: tuple({*verb.reads} - {*_CHANGES[kind]}) for kind, verb in VERBS.items()}


class _Note:
    """Which communication touched a buffer last: the whole of it, and since then atoms of it (-1: none).

    Compute needs no note: it runs in the order of the row, and everything waits for the last one before it.
    """

    def __init__(self) -> None:
        self.changed, self.readers = -1, list[int]()
        self.atoms: dict[int, _Note] = {}

    def _touched(self, where: Iterable[int] | None) -> "list[_Note]":
        inner = self.atoms.values() if where is None else (self.atoms[i] for i in where if i in self.atoms)
        return [self, *inner]

    def before_reading(self, where: range | None) -> list[int]:
        """What a read of some atoms (None: all) waits for."""
        return [note.changed for note in self._touched(where)]

    def before_changing(self, where: range | None) -> list[int]:
        """What a change of some atoms waits for."""
        return [i for note in self._touched(where) for i in (note.changed, *note.readers)]

    def read(self, where: range | None, index: int) -> None:
        """Note a read by communication."""
        for note in [self] if where is None else [self.atoms.setdefault(i, _Note()) for i in where]:
            note.readers.append(index)

    def change(self, where: range | None, index: int) -> None:
        """Note a change, which makes irrelevant what came before it; by compute, -1."""
        if where is None:
            self.changed, self.readers, self.atoms = index, [], {}
        for i in where or ():
            self.atoms[i] = _Note()
            self.atoms[i].changed = index


def hazards(row: Sequence[Action], shared: Mapping[str, int] = MappingProxyType({})) -> tuple[tuple[int, ...], ...]:
    """Indices of the earlier actions of the row that each action waits for.

    An action starts after the last earlier compute action of its row, after the last earlier action of its
    own stream, and after whatever last touched its buffers (read after write, write after write, write after
    read).  Compute actions run in order, so the first rule covers all earlier compute.

    Parameters
    ----------
    row : sequence of Action
    shared : mapping
        For a buffer's letter, the number of buffers that the stages share in turn (see `Plan.shared`).

    Returns
    -------
    tuple of tuples of int
        For each action, sorted indices; of earlier compute only the last.
    """
    result: list[tuple[int, ...]] = []
    stages = {action.stage for action in row}
    atoms = Atoms(action.part for action in row if action.part is not None)
    last: dict[str, int] = {}  # by stream
    notes: dict[_Key, _Note] = {}
    for index, action in enumerate(row):
        stream = action.verb.stream
        where = None if action.part is None else atoms.inside(action.part)
        waits = {last.get("compute", -1), last.get(stream, -1)}
        communicates = stream != "compute"
        for key in _keys(action, _READS[action.kind], stages, shared):
            if key in notes:
                waits.update(notes[key].before_reading(where))
            if communicates:
                notes.setdefault(key, _Note()).read(where, index)
        for key in _keys(action, _CHANGES[action.kind], stages, shared):
            if key in notes:
                waits.update(notes[key].before_changing(where))
            if communicates or key in notes:
                notes.setdefault(key, _Note()).change(where, index if communicates else -1)
        waits.discard(-1)
        result.append(tuple(sorted(waits)))
        last[stream] = index
    return tuple(result)


def _keys(action: Action, touches: Iterable[Touch], stages: set[int], shared: Mapping[str, int]) -> list[_Key]:
    """The buffers that an action touches, each by what tells it from others of its rank."""
    own, mb = action.stage, action.mb
    if mb is not None and not shared:  # most actions by far
        return [(letter, own + edge, mb if letter in _BY_MICROBATCH else None) for letter, edge in touches]
    near = stages if action.kind in ("NORM", "SUM_TIED") else (own,)  # those touch every stage's gradient
    keys: set[_Key] = set()
    for letter, edge in touches:
        count = shared.get(letter, 0)
        if letter == "N":
            keys.add((letter, -1, None))
        else:
            keys.update((letter, (stage + edge) % count if count else stage + edge,
                         mb if letter in _BY_MICROBATCH else None) for stage in near)  # fmt: skip
    return list(keys)
