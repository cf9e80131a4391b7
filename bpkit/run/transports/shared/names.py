"""What the workers of one launch find each other by: names of semaphores, and the mailboxes' file."""

import contextlib
import errno
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

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
    members : sequence of int
        All ranks, or those of a group.
    frame_bytes : int
        Bytes of one frame of a mailbox; 0 for a group of ranks, which has no mailboxes.
    """

    name: str
    members: Sequence[int]
    frame_bytes: int = 0

    @property
    def ranks(self) -> int:
        """How many there are."""
        return len(self.members)

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

    @contextlib.contextmanager
    def named(self) -> Iterator[None]:
        """The semaphores have their names, by which the ranks open them."""
        try:
            try:
                for name, value in self.semaphores().items():
                    create_semaphore(name, value)
            except OSError as error:
                if error.errno in (errno.ENOSPC, errno.EROFS, errno.EACCES):
                    what = f"backend 'shm' with {self.ranks} workers"
                    raise memory.no_room(what, needed(self.ranks)) from error
                raise
            yield
        finally:
            for name in self.semaphores():
                with contextlib.suppress(OSError):  # not made
                    unlink_semaphore(name)


def needed(ranks: int) -> int:
    """Bytes of shared memory without which `ranks` workers cannot start: a page a semaphore."""
    return _PAGE * len(Layout("", range(ranks), _PAGE).semaphores())


@contextlib.contextmanager
def meeting(ranks: int, name: str) -> Iterator[tuple[Layout, int]]:
    """The caller's side of a launch, while its workers join: what they must know, and the file of all mailboxes."""
    frame = _MAIL // (max(ranks * (ranks - 1), 1) * FRAMES) // _PAGE * _PAGE  # all mailboxes take little together
    layout = Layout(name, range(ranks), min(max(frame, _PAGE), 1 << 18))
    fd = memory.unnamed(layout.mail_bytes)  # a mailbox takes memory only as far as messages fill it
    try:
        with layout.named():
            yield layout, fd
    finally:
        os.close(fd)
