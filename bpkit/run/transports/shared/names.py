"""What the workers of one launch find each other by: names of semaphores, and the mailboxes' file."""

from dataclasses import dataclass

from bpkit.run.transports.shared import files as memory
from bpkit.run.transports.shared.mailbox import SLOTS, slot_size
from bpkit.run.transports.shared.semaphores import Block, SemLock, create_semaphore, unlink_semaphore

_MAIL = 1 << 26  # bytes of all mailboxes together, at most
_PAGE = 4096


@dataclass(frozen=True)
class Layout:
    """What a worker must know to join.

    Attributes
    ----------
    name : str
        What the names of semaphores and files begin with.
    ranks, slot_bytes : int
        Workers, and bytes of one slot of a mailbox; 0 for a group of ranks, which has no mailboxes.
    """

    name: str
    ranks: int
    slot_bytes: int

    @property
    def mail_bytes(self) -> int:
        """Bytes of all mailboxes."""
        return self.ranks * (self.ranks - 1) * SLOTS * self.slot_bytes

    @property
    def rounds(self) -> int:
        """Rounds of the barrier."""
        return (self.ranks - 1).bit_length()

    def semaphore(self, kind: str, a: int, b: int) -> str:
        """Name of one semaphore: (b)arrier of rank a in round b; from rank a to rank b slots f(i)lled,
        sl(o)ts free, (r)eady and (d)one of posted sums, (m)essages ready and (t)aken without a copy,
        (l)oans of memory and their re(u)rn."""
        return f"{self.name}-{kind}{a}.{b}"

    def semaphores(self) -> dict[str, int]:
        """Names of all semaphores and their first values."""
        ranks = range(self.ranks)
        values = {self.semaphore("b", r, k): 0 for r in ranks for k in range(self.rounds)}
        mail = (("i", 0), ("o", SLOTS)) if self.slot_bytes else ()
        for kind, value in (*mail, ("r", 0), ("d", 0), ("m", 0), ("t", 0), ("l", 0), ("u", 0)):
            values |= {self.semaphore(kind, a, b): value for a in ranks for b in ranks if a != b}
        return values


def needed(ranks: int) -> int:
    """Bytes of shared memory without which `ranks` workers cannot start: a page a semaphore and slot."""
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
        self.layout = Layout(memory.unique_name(), ranks, slot_size(ranks, budget))
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
