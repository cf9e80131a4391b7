"""What each rank is doing, written by the rank itself and read by the caller and by who waits for it."""

import mmap

import numpy as np

# What a rank waits in, as a number that fits into the board (index 0: not waiting).
OPERATIONS = ("", "send", "recv", "barrier", "empty", "all_reduce", "reduce_scatter", "all_gather", "broadcast",
              "evaluation")  # fmt: skip


class Board:
    """The memory that the caller shares with its workers: one row a rank.

    Rows lie in cache lines of their own. They only inform: nothing is synchronised by them.

    Attributes
    ----------
    marks : numpy.ndarray
        ``(ranks, 2)`` int64: step and action index.
    waits : numpy.ndarray
        ``(ranks, 2)`` int64: index into `OPERATIONS`, rank waited for (-1: unknown; the rank itself: it does the work).
    works : numpy.ndarray
        ``(ranks, 2)`` int64: what `Comm.alone` counts, works that have ended and pieces of work.
    received : numpy.ndarray
        ``(ranks, ranks)`` int64: messages that the first rank has received from the second, where the
        transport cannot know when it may let go of what it has sent.
    """

    WIDTH = 16

    def __init__(self, file: int, ranks: int) -> None:
        buffer = mmap.mmap(file, self.size(ranks))
        table = np.frombuffer(buffer, np.int64, ranks * self.WIDTH).reshape(ranks, self.WIDTH)
        self.marks, self.waits, self.works = table[:, :2], table[:, 2:4], table[:, 4:6]
        self.received = np.frombuffer(buffer, np.int64, ranks * ranks, table.nbytes).reshape(ranks, ranks)

    @classmethod
    def size(cls, ranks: int) -> int:
        """Bytes of the board."""
        return 8 * ranks * (cls.WIDTH + ranks)

    def clear(self) -> None:
        """Begin a call: no rank has done anything yet."""
        self.marks[:] = -1
        self.waits[:] = self.works[:] = 0

    def waiting(self, rank: int) -> str:
        """What a rank waits in, or what it does while others wait for it, as text; empty when it does neither."""
        operation, peer = (int(x) for x in self.waits[rank])
        if not operation:
            return ""
        if peer == rank:
            return f"in an {OPERATIONS[operation]} of its own"
        return f"waiting in {OPERATIONS[operation]}" + (f" for rank {peer}" if peer >= 0 else "")
