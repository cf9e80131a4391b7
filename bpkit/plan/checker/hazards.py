"""What each action of a row waits for, derived from the table of verbs."""

from collections.abc import Mapping, Sequence
from types import MappingProxyType

from bpkit.plan.action import Action, Buffer, buffer


def _overlap(a: Action, b: Action) -> bool:
    """Whether the parts of two actions share elements (None is the whole)."""
    if a.part is None or b.part is None:
        return True
    (a_lo, a_hi), (b_lo, b_hi) = a.part.fractions(), b.part.fractions()
    return a_lo < b_hi and b_lo < a_hi


def _buffers(action: Action, stages: set[int], shared: Mapping[str, int]) -> tuple[set[Buffer], set[Buffer]]:
    """Buffers that an action only reads, and those that it changes (writes or frees)."""
    verb = action.verb
    changed = {buffer(action, touch) for touch in verb.writes + verb.frees}
    reads = {buffer(action, touch) for touch in verb.reads}
    if action.kind == "NORM":  # one scalar over all stages of the rank
        reads = {Buffer(letter, stage, None) for stage in stages for letter in "GR"}
    if action.kind == "SUM_TIED":  # copies in several stages of the rank
        changed = {Buffer("G", stage, None) for stage in stages}
    changed, reads = ({_slot(buf, shared) for buf in bufs} for bufs in (changed, reads))
    return reads - changed, changed


def _slot(buf: Buffer, shared: Mapping[str, int]) -> Buffer:
    """The buffer that stages with the same remainder share, where they share any."""
    count = shared.get(buf.letter, 0)
    return Buffer(buf.letter, buf.stage % count, buf.mb) if count else buf


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
    last_compute = -1
    last_in_stream: dict[str, int] = {}
    readers: dict[Buffer, list[int]] = {}
    changers: dict[Buffer, list[int]] = {}
    for index, action in enumerate(row):
        reads, changes = _buffers(action, stages, shared)
        waits = {last_compute, last_in_stream.get(action.verb.stream, -1)}
        for buf in reads | changes:
            waits.update(i for i in changers.get(buf, ()) if _overlap(row[i], action))
        for buf in changes:
            waits.update(i for i in readers.get(buf, ()) if _overlap(row[i], action))
        compute = {i for i in waits if i >= 0 and row[i].verb.stream == "compute"}
        result.append(tuple(sorted({i for i in waits if i >= 0} - compute | ({max(compute)} if compute else set()))))
        for buf in reads:
            readers.setdefault(buf, []).append(index)
        for buf in changes:
            if action.part is None:  # a change of the whole makes all that came before irrelevant
                changers[buf], readers[buf] = [], []
            changers.setdefault(buf, []).append(index)
        last_in_stream[action.verb.stream] = index
        if action.verb.stream == "compute":
            last_compute = index
    return tuple(result)
