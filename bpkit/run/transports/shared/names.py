"""What the workers of one launch find each other by: names of semaphores, and the mailboxes' file."""

from dataclasses import dataclass

from bpkit.run.transports.shared import files as memory
from bpkit.run.transports.shared.semaphores import Block, SemLock, create_semaphore, unlink_semaphore

_MAIL = 1 << 26  # bytes of all mailboxes together, at most
_PAGE = 4096
FRAMES = 16  # of a mailbox


@dataclass(frozen=True)
class Layout:
    """What a worker must know to join.

    Attributes
    ----------
    name : str
        What the names of semaphores and files begin with.
    ranks, frame_bytes : int
        Workers, and bytes of one frame of a mailbox; 0 for a group of ranks, which has no mailboxes.
    """

    name: str
    ranks: int
    frame_bytes: int

    @property
    def mail_bytes(self) -> int:
        """Bytes of all mailboxes."""
        return self.ranks * (self.ranks - 1) * FRAMES * self.frame_bytes

    def semaphore(self, kind: str, giver: int, taker: int) -> str:
        """Name of the semaphore of one kind of token from a rank to another: all ranks are (r)eady, or (d)one; a
        message without a copy is shown (m) and (t)aken; memory is (l)ent and ret(u)rned; a frame of a mailbox is
        f(i)lled, or free again (o)."""
        return f"{self.name}-{kind}{giver}.{taker}"

    def semaphores(self) -> dict[str, int]:
        """Names of all semaphores and their first values."""
        values = dict.fromkeys("rdmtlu", 0) | ({"i": 0, "o": FRAMES} if self.frame_bytes else {})
        pairs = [(a, b) for a in range(self.ranks) for b in range(self.ranks) if a != b]
        return {self.semaphore(kind, *pair): value for kind, value in values.items() for pair in pairs}


def needed(ranks: int) -> int:
    """Bytes of shared memory without which `ranks` workers cannot start: a page a semaphore and frame."""
    smallest = Layout("", ranks, _PAGE)
    return Block.size(ranks) + smallest.mail_bytes + _PAGE * len(smallest.semaphores())


class Hub:
    """The caller's side: makes the semaphores and the mailboxes of one launch.

    Attributes
    ----------
    layout : Layout
    fd : int
        The mailboxes' file; the workers map it.
    """

    def __init__(self, ranks: int) -> None:
        memory.sweep()
        budget = min(_MAIL, memory.free_room() // 4)
        self.layout = Layout(memory.unique_name(), ranks, frame_size(ranks, budget))
        self._names: list[str] = []
        self._held: list[SemLock] = []
        try:
            for name, value in self.layout.semaphores().items():
                self._held.append(create_semaphore(name, value))
                self._names.append(name)
            # Not reserved: a mailbox takes pages only as far as messages fill it.
            self.fd = memory.anonymous(self.layout.mail_bytes, "mail between the workers", reserve=False)
        except BaseException:
            self.unlink()
            raise

    def unlink(self) -> None:
        """Remove the names, once all workers have joined (or none will)."""
        for name in self._names:
            unlink_semaphore(name)
        self._names.clear()
        self._held.clear()


def frame_size(ranks: int, budget: int) -> int:
    """Bytes of a frame, so that the mailboxes of all ordered pairs stay within `budget` bytes."""
    pairs = max(ranks * (ranks - 1), 1)
    return min(max(budget // (pairs * FRAMES) // _PAGE * _PAGE, _PAGE), 1 << 18)
