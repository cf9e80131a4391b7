"""The transport for workers of one host: gradients lie in shared memory and are added where they lie.

`all_reduce` of memory from `Comm.empty`: between two barriers each rank adds its own slice over all ranks,
in rank order, and writes it into every rank's row. No byte is copied but the result. Other tensors go
through a scratch row, one copy in and one out.
"""

from __future__ import annotations

import mmap
import os
import weakref
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch

from . import memory
from .barrier import Barrier, Block, SemLock, Waiter, create_semaphore, open_semaphore, unlink_semaphore
from .comm import Comm, Handle, part_bounds
from .errors import NoRoom
from .mailbox import Inbox, Outbox, message_bytes, raw_bytes, ring_shape

_LINE = 64
_CACHE = 1 << 16  # bytes that one block of a sum takes of each row
_SCRATCH = 1 << 22  # bytes of a rank's scratch row, at most, of which there are two
_MAIL = 1 << 26  # bytes of all mailboxes together, at most

Program = list[tuple[Callable[..., Any], tuple]]


@dataclass(frozen=True)
class Layout:
    """What a worker must know to join: the name that semaphores and files begin with, and the rings."""

    name: str
    ranks: int
    slots: int
    slot_bytes: int

    @property
    def mail_bytes(self) -> int:
        """Bytes of all rings."""
        return self.ranks * (self.ranks - 1) * self.slots * self.slot_bytes

    @property
    def rounds(self) -> int:
        """Rounds of the barrier."""
        return (self.ranks - 1).bit_length()

    def semaphores(self) -> dict[str, int]:
        """Names of all semaphores and their first values."""
        ranks = range(self.ranks)
        pairs = [(a, b) for a in ranks for b in ranks if a != b]
        values = {self.semaphore("b", r, k): 0 for r in ranks for k in range(self.rounds)}
        for kind, value in (("i", 0), ("o", self.slots), ("r", 0), ("d", 0)):
            values |= {self.semaphore(kind, a, b): value for a, b in pairs}
        return values

    def semaphore(self, kind: str, a: int, b: int) -> str:
        """Name of one semaphore: (b)arrier of rank a, round b; from a to b: slots f(i)lled, sl(o)ts free,
        (r)eady and (d)one of posted sums."""
        return f"{self.name}-{kind}{a}.{b}"


def needed(ranks: int) -> int:
    """Bytes of shared memory without which `ranks` workers cannot start."""
    return ranks * (ranks - 1) * 16 * 4096 + Block.size(ranks) + 4096 * 4 * ranks * ranks


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
        slots, slot_bytes = ring_shape(ranks, min(_MAIL, memory.free_room() // 4))
        self.layout = Layout(memory.unique_name(), ranks, slots, slot_bytes)
        self._names: list[str] = []
        self._held: list[SemLock] = []
        try:
            for name, value in self.layout.semaphores().items():
                self._held.append(create_semaphore(name, value))
                self._names.append(name)
            # Not reserved: a ring takes pages only as far as messages fill it.
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


class _Rows:
    """One symmetric allocation: every rank's row of one mapped file."""

    def __init__(self, mapped: mmap.mmap, ranks: int, row_bytes: int) -> None:
        self.arrays = [np.frombuffer(mapped, np.uint8, row_bytes, r * row_bytes) for r in range(ranks)]
        self.tensors = [torch.from_numpy(a) for a in self.arrays]
        self.programs: dict[tuple, Program] = {}

    def typed(self, start: int, n: int, dtype: torch.dtype) -> list[Any]:
        """All ranks' `n` elements from byte `start`: arrays, or tensors for types numpy lacks."""
        parts = [t[start : start + n * dtype.itemsize].view(dtype) for t in self.tensors]
        return parts if dtype == torch.bfloat16 else [t.numpy() for t in parts]


def _add(a: Any, b: Any, out: Any) -> None:
    torch.add(a, b, out=out)


def _copy(target: Any, source: Any) -> None:
    target.copy_(source)


def sum_program(rows: list[Any], lo: int, hi: int, targets: list[Any]) -> Program:
    """The additions of elements lo:hi over all rows into row 0, block by block, each block then copied
    to `targets` while it is in the cache."""
    arrays = isinstance(rows[0], np.ndarray)
    add, copy = (np.add, np.copyto) if arrays else (_add, _copy)
    step = max(_CACHE // (rows[0].itemsize if arrays else rows[0].element_size()), 1)
    program: Program = []
    for start in range(lo, hi, step):
        part = slice(start, min(start + step, hi))
        total = rows[0][part]
        program += [(add, (total, row[part], total)) for row in rows[1:]]
        program += [(copy, (target[part], total)) for target in targets]
    return program


def run_program(program: Program) -> None:
    """Run the steps."""
    for function, arguments in program:
        function(*arguments)


class _Posted(Handle):
    """One posted sum: all must be ready, each adds its slice, all must be done."""

    def __init__(self, comm: SharedMemoryComm, program: Program) -> None:
        self.comm, self.program = comm, program
        self.finished = False
        self.left = comm.size - 1  # peers whose token of the present phase has not come

    def poll(self) -> bool:
        if not self.finished:
            self.comm.progress()
        return self.finished

    def wait(self) -> None:
        if not self.poll():
            self.comm.finish_posted(self)


class SharedMemoryComm(Comm):
    """One rank's end of the shared-memory transport (see `Comm`)."""

    name = "shm"

    def __init__(self, rank: int, layout: Layout, fd: int, block: Block, timeout: float) -> None:
        super().__init__(rank, layout.ranks, block)
        self._layout = layout
        self._waiter = Waiter(rank, block.waits[rank], timeout)
        self._join_barrier()
        self._join_mail(fd)
        self._others = [r for r in range(self.size) if r != rank]
        self._ready_in, self._ready_out = self._pairs("r")
        self._done_in, self._done_out = self._pairs("d")
        self._unready: deque[_Posted] = deque()
        self._undone: deque[_Posted] = deque()
        self._blocks: list[tuple[int, int, _Rows]] = []
        self._allocations = 0
        self._scratch: torch.Tensor | None = None
        self._half = 0

    def _join_barrier(self) -> None:
        rounds, name = range(self._layout.rounds), self._layout.semaphore
        own = [open_semaphore(name("b", self.rank, k)) for k in rounds]
        theirs = [open_semaphore(name("b", (self.rank + 2**k) % self.size, k)) for k in rounds]
        self._barrier = Barrier(own, theirs, self._waiter, self.size)

    def _join_mail(self, fd: int) -> None:
        self._outboxes: dict[int, Outbox] = {}
        self._inboxes: dict[int, Inbox] = {}
        if self.size == 1:
            return
        layout, name = self._layout, self._layout.semaphore
        mail = np.frombuffer(mmap.mmap(fd, layout.mail_bytes), np.uint8)
        rings = mail.reshape(self.size, self.size - 1, -1)

        def box(kind: type, a: int, b: int) -> Any:
            ring = rings[a, b - (b > a)]
            filled, free = open_semaphore(name("i", a, b)), open_semaphore(name("o", a, b))
            return kind(ring, layout.slots, filled, free)

        for peer in range(self.size):
            if peer != self.rank:
                self._outboxes[peer] = box(Outbox, self.rank, peer)
                self._inboxes[peer] = box(Inbox, peer, self.rank)

    def _pairs(self, kind: str) -> tuple[list[SemLock], list[SemLock]]:
        name = self._layout.semaphore
        return ([open_semaphore(name(kind, peer, self.rank)) for peer in self._others],
                [open_semaphore(name(kind, self.rank, peer)) for peer in self._others])

    @property
    def waited(self) -> int:
        return self._waiter.waited

    # Messages

    def send(self, tensor: torch.Tensor, to: int) -> None:
        self.check_peer(to, "send")
        self.check_tensor(tensor, "send")
        self._outboxes[to].post(tensor, self._waiter)
        self.sent += message_bytes(tensor)
        self.sent_to[to] += 1
        if self._outboxes[to].pending:
            self._waiter.progress = self.progress

    def recv(self, tensor: torch.Tensor | None, source: int) -> torch.Tensor:
        self.check_peer(source, "recv")
        if tensor is not None:
            self.check_tensor(tensor, "recv")
        tensor = self._inboxes[source].take(tensor, source, self._waiter)
        self.received_from[source] += 1
        return tensor

    # What moves along beside other things

    def progress(self) -> None:
        """Move unfinished sends and posted sums along; never blocks."""
        busy = False
        for box in self._outboxes.values():
            if box.pending and not box.push():
                busy = True
        while self._unready and self._collect(self._unready[0], self._ready_in):
            posted = self._unready.popleft()
            run_program(posted.program)
            posted.left = self.size - 1
            for semaphore in self._done_out:
                semaphore.release()
            self._undone.append(posted)
        while self._undone and self._collect(self._undone[0], self._done_in):
            self._undone.popleft().finished = True
        if not (busy or self._unready or self._undone):
            self._waiter.progress = None

    @staticmethod
    def _collect(posted: _Posted, tokens: list[SemLock]) -> bool:
        while posted.left:
            if not tokens[posted.left - 1].acquire(False):
                return False
            posted.left -= 1
        return True

    def finish_posted(self, posted: _Posted) -> None:
        """Block until a posted sum has finished."""
        while not posted.finished:
            queue, tokens = (self._unready, self._ready_in) if posted in self._unready else (
                self._undone, self._done_in)
            index = queue[0].left - 1
            before = (len(queue), index)

            def moved(queue: deque = queue, before: tuple = before) -> bool:
                self.progress()
                return not queue or (len(queue), queue[0].left - 1) != before

            self._waiter.until(moved, tokens[index], "post_all_reduce", self._others[index])

    def _settle(self) -> None:
        """Finish posted sums: collectives keep the order in which they were called."""
        while self._undone or self._unready:
            self.finish_posted((self._unready or self._undone)[-1])

    def finish(self) -> None:
        self._settle()
        for peer, box in self._outboxes.items():
            if box.pending:
                self._waiter.until(partial(self._pushed, box), box.free, "send", peer)
        self._waiter.progress = None

    def _pushed(self, box: Outbox) -> bool:
        self.progress()
        return not box.pending

    # Collectives

    def barrier(self) -> None:
        self._settle()
        self._sync("barrier")

    def _sync(self, operation: str) -> None:
        self._barrier.arrive()
        self._barrier.wait(operation)

    def empty(self, n: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        if n < 0:
            raise ValueError(f"empty: {n} elements")
        self._settle()
        row = -(-max(n * dtype.itemsize, 1) // _LINE) * _LINE
        rows = _Rows(self._map(row * self.size), self.size, row)
        if n == 0:
            return torch.empty(0, dtype=dtype)
        # Its own exporter: when the last tensor over it goes, so does the entry, and with it the mapping.
        own = rows.arrays[self.rank][: n * dtype.itemsize]
        start = own.ctypes.data
        entry = (start, start + row, rows)
        tensor = torch.frombuffer(own, dtype=dtype)
        self._blocks.append(entry)
        weakref.finalize(own, self._forget, start).atexit = False
        return tensor

    def _forget(self, start: int) -> None:
        self._blocks = [block for block in self._blocks if block[0] != start]

    def _map(self, size: int) -> mmap.mmap:
        """Map one new file of `size` bytes on every rank; its name is gone when this returns."""
        self._allocations += 1
        path = os.path.join(memory.directory(), f"{self._layout.name}-{self._allocations}")
        what = f"comm.empty for {self.size} ranks"
        fd = -1
        if self.rank == 0:
            try:
                fd = memory.create(path, size, what)
                self.block.room[0] = -1
            except NoRoom:
                self.block.room[0] = memory.free_room()
        self._sync("empty")
        free = int(self.block.room[0])
        if free < 0 and self.rank != 0:
            fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        self._sync("empty")
        if free >= 0:
            raise memory.no_room(what, size, free)
        if self.rank == 0:
            os.unlink(path)
        try:
            return mmap.mmap(fd, size, mmap.MAP_SHARED | getattr(mmap, "MAP_POPULATE", 0))
        finally:
            os.close(fd)

    def _find(self, tensor: torch.Tensor) -> tuple[_Rows, int] | None:
        """The rows a contiguous tensor lies in and its byte offset there, or None."""
        pointer = tensor.data_ptr()
        for start, end, rows in self._blocks:
            if start <= pointer < end:
                return (rows, pointer - start) if tensor.is_contiguous() else None
        return None

    def peers(self, tensor: torch.Tensor) -> list[torch.Tensor] | None:
        found = self._find(tensor)
        if found is None:
            return None
        rows, start = found
        size = tensor.numel() * tensor.element_size()
        return [t[start : start + size].view(tensor.dtype).view(tensor.shape) for t in rows.tensors]

    def _program(self, kind: str, rows: _Rows, start: int, n: int, dtype: torch.dtype) -> Program:
        """The steps of a collective on rows, made once for each place."""
        key = (kind, start, n, dtype)
        program = rows.programs.get(key)
        if program is None:
            parts = rows.typed(start, n, dtype)
            lo, hi = self.bounds(n)
            targets = {"all": parts[1:], "own": parts[self.rank : self.rank + 1] if self.rank else [],
                       "none": []}[kind]
            program = rows.programs[key] = sum_program(parts, lo, hi, targets)
        return program

    def all_reduce(self, tensor: torch.Tensor) -> torch.Tensor:
        self.check_tensor(tensor, "all_reduce")
        if self._undone or self._unready:
            self._settle()
        found = self._find(tensor)
        if found is None:
            self._reduce_private(tensor, "all_reduce")
            return tensor
        program = self._program("all", *found, tensor.numel(), tensor.dtype)
        self._sync("all_reduce")
        run_program(program)
        self._sync("all_reduce")
        return tensor

    def post_all_reduce(self, tensor: torch.Tensor) -> Handle:
        self.check_tensor(tensor, "post_all_reduce")
        found = self._find(tensor)
        if found is None:  # without rows of its own there is nothing to add in place: do it now
            self.all_reduce(tensor)
            handle = _Posted(self, [])
            handle.finished = True
            return handle
        handle = _Posted(self, self._program("all", *found, tensor.numel(), tensor.dtype))
        for semaphore in self._ready_out:
            semaphore.release()
        self._unready.append(handle)
        self._waiter.progress = self.progress
        self.progress()
        return handle

    def reduce_scatter(self, tensor: torch.Tensor) -> torch.Tensor:
        self.check_tensor(tensor, "reduce_scatter")
        self._settle()
        found = self._find(tensor)
        if found is None:
            self._reduce_private(tensor, "reduce_scatter")
        else:
            self._sync("reduce_scatter")
            run_program(self._program("own", *found, tensor.numel(), tensor.dtype))
            self._sync("reduce_scatter")
        lo, hi = self.bounds(tensor.numel())
        return tensor.view(-1)[lo:hi]

    def all_gather(self, tensor: torch.Tensor) -> torch.Tensor:
        self.check_tensor(tensor, "all_gather")
        self._settle()
        peers = self.peers(tensor)
        if peers is None:
            return self._spread(tensor, "all_gather", [self._own(tensor, r) for r in range(self.size)])
        self._sync("all_gather")
        for rank, peer in enumerate(peers):
            if rank != self.rank:
                lo, hi = part_bounds(tensor.numel(), self.size, rank)
                tensor.view(-1)[lo:hi].copy_(peer.view(-1)[lo:hi])
        self._sync("all_gather")
        return tensor

    def _own(self, tensor: torch.Tensor, rank: int) -> tuple[int, int]:
        return part_bounds(tensor.numel(), self.size, rank)

    def broadcast(self, tensor: torch.Tensor, root: int = 0) -> torch.Tensor:
        self.check_tensor(tensor, "broadcast")
        if not 0 <= root < self.size:
            raise ValueError(f"broadcast: root {root} is not a rank (0 to {self.size - 1})")
        self._settle()
        peers = self.peers(tensor)
        if peers is None:
            bounds = [(0, tensor.numel() if r == root else 0) for r in range(self.size)]
            return self._spread(tensor, "broadcast", bounds)
        self._sync("broadcast")
        if self.rank != root:
            tensor.copy_(peers[root])
        self._sync("broadcast")
        return tensor

    # Private tensors: through two scratch rows in turn, so that one barrier protects the other's reuse

    def _scratch_rows(self, size: int) -> tuple[_Rows, int, int]:
        """Rows, the byte offset of this turn's half, and its size; the same on every rank."""
        want = min(1 << max(size - 1, 4095).bit_length(), _SCRATCH)
        if self._scratch is None or self._scratch.numel() < 2 * want:
            self._scratch = self.empty(2 * want, torch.uint8)
        found = self._find(self._scratch)
        assert found is not None
        self._half = 1 - self._half
        half = self._scratch.numel() // 2
        return found[0], self._half * half, half

    def _reduce_private(self, tensor: torch.Tensor, operation: str) -> None:
        flat = tensor.detach().contiguous().view(-1)
        data, size, done = raw_bytes(flat), tensor.element_size(), 0
        while done < flat.numel():
            rows, start, half = self._scratch_rows(data.size)
            n = min(half // size, flat.numel() - done)
            piece = data[done * size : (done + n) * size]
            rows.arrays[self.rank][start : start + n * size] = piece
            self._sync(operation)
            run_program(self._program("none", rows, start, n, tensor.dtype))
            self._sync(operation)
            piece[:] = rows.arrays[0][start : start + n * size]
            done += n
        if flat.data_ptr() != tensor.data_ptr():
            tensor.copy_(flat.view(tensor.shape))

    def _spread(self, tensor: torch.Tensor, operation: str, bounds: list[tuple[int, int]]) -> torch.Tensor:
        """Copy each rank's range of elements to all the others."""
        flat = tensor.detach().contiguous().view(-1)
        data, size = raw_bytes(flat), tensor.element_size()
        done, most = 0, max(hi - lo for lo, hi in bounds) * size
        while done < most:
            rows, start, half = self._scratch_rows(most)
            pieces = [data[min(lo * size + done, hi * size) : min(lo * size + done + half, hi * size)]
                      for lo, hi in bounds]
            rows.arrays[self.rank][start : start + pieces[self.rank].size] = pieces[self.rank]
            self._sync(operation)
            for rank, piece in enumerate(pieces):
                if rank != self.rank:
                    piece[:] = rows.arrays[rank][start : start + piece.size]
            done += half
        if flat.data_ptr() != tensor.data_ptr():
            tensor.copy_(flat.view(tensor.shape))
        return tensor
