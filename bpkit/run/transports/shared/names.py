"""What the workers of one launch find each other by: names of semaphores, and the mailboxes' file."""

import contextlib
import errno
import os
from dataclasses import dataclass

from bpkit.run.transports.board import Board
from bpkit.run.transports.shared import files as memory
from bpkit.run.transports.shared.semaphores import create_semaphore, unlink_semaphore

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

    @property
    def kinds(self) -> dict[str, int]:
        """The kinds of tokens, and how many there are at first."""
        return dict.fromkeys("rdmtlu", 0) | ({"i": 0, "o": FRAMES} if self.frame_bytes else {})

    def semaphores(self) -> dict[str, int]:
        """Names of all semaphores and their first values."""
        return {self.semaphore(kind, a, b): value for kind, value in self.kinds.items()
                for a in range(self.ranks) for b in range(self.ranks) if a != b}  # fmt: skip


def needed(ranks: int) -> int:
    """Bytes of shared memory without which `ranks` workers cannot start: a page a semaphore and frame."""
    smallest = Layout("", ranks, _PAGE)
    return Board.size(ranks) + smallest.mail_bytes + _PAGE * len(smallest.semaphores())


class Hub:
    """The caller's side: makes the semaphores and the mailboxes of one launch.

    Attributes
    ----------
    layout : Layout
    fd : int
        The mailboxes' file; the workers map it.
    """

    def __init__(self, ranks: int) -> None:
        budget = min(_MAIL, memory.free_room() // 4)
        self.layout = Layout(memory.unique_name(), ranks, frame_size(ranks, budget))
        try:
            self._held = [create_semaphore(name, value) for name, value in self.layout.semaphores().items()]
            # Not reserved: a mailbox takes pages only as far as messages fill it.
            self.fd = memory.anonymous(self.layout.mail_bytes, "mail between the workers", reserve=False)
        except BaseException as error:
            self.unlink()
            if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EROFS, errno.EACCES):
                raise memory.no_room(f"backend 'shm' with {ranks} workers", needed(ranks)) from error
            raise

    def close(self) -> None:
        """Let go of all, once all workers have joined (or none will)."""
        os.close(self.fd)
        self.unlink()

    def unlink(self) -> None:
        """Remove the names."""
        for name in self.layout.semaphores():
            with contextlib.suppress(OSError):  # not made yet, or removed already
                unlink_semaphore(name)
        self._held = []


def frame_size(ranks: int, budget: int) -> int:
    """Bytes of a frame, so that the mailboxes of all ordered pairs stay within `budget` bytes."""
    pairs = max(ranks * (ranks - 1), 1)
    return min(max(budget // (pairs * FRAMES) // _PAGE * _PAGE, _PAGE), 1 << 18)
