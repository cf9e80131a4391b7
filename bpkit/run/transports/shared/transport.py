"""The transport for workers of one host: gradients lie in shared memory and are added where they lie.

`all_reduce` of memory from `Comm.empty`: between two barriers each rank adds its own slice over all ranks,
in rank order, and writes it into every rank's row. No byte is copied but the result. Other tensors go
through a scratch row, one copy in and one out.
"""

import mmap
import os
import weakref
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch

from bpkit.run.errors import NoRoom
from bpkit.run.transports.comm import Comm, Edges, Handle, Slots, Then
from bpkit.run.transports.shared import files as memory
from bpkit.run.transports.shared.direct import Direct
from bpkit.run.transports.shared.loans import Loans
from bpkit.run.transports.shared.mailbox import Inbox, Outbox
from bpkit.run.transports.shared.names import Layout
from bpkit.run.transports.shared.posted import PostedSums
from bpkit.run.transports.shared.rows import Program, Rows, run_program
from bpkit.run.transports.shared.scratch import Scratch
from bpkit.run.transports.shared.semaphores import (
    Barrier,
    Block,
    Pairs,
    SemLock,
    Waiter,
    create_semaphore,
    open_semaphore,
    unlink_semaphore,
)

_LINE = 64


class SharedMemoryComm(Comm):
    """One rank's end of the shared-memory transport (see `Comm`)."""

    name = "shm"

    def __init__(self, rank: int, layout: Layout, fd: int, block: Block, timeout: float,
                 ranks: Sequence[int] = (), duties: dict[Callable[[], object], None] | None = None) -> None:
        super().__init__(rank, layout.ranks, block, timeout)
        self._layout = layout
        self._waiter = Waiter(rank, block.waits[rank], timeout, ranks, duties)
        self.progress = self._waiter.progress  # type: ignore[method-assign]  # of all groups of this rank
        self._others = [r for r in range(self.size) if r != rank]
        self._join_barrier()
        self._join_mail(fd)
        self._posted = PostedSums(self._pairs("r"), self._pairs("d"), self._waiter, self.progress)
        self._direct = Direct(self._pairs("m"), self._pairs("t"), self._waiter)
        self._lent, self._returned = self._pairs("l"), self._pairs("u")
        self._common: list[tuple[int, int]] = []  # addresses of `shared` memory
        self._blocks: list[tuple[int, int, Rows]] = []
        self._sums: dict[tuple, Program] = {}  # by address, length, type: valid while the memory lives
        self._allocations = 0
        self._scratch = Scratch(self, self._empty, self._in_rows, self._barrier.cross)

    def _join_barrier(self) -> None:
        rounds, name = range(self._layout.rounds), self._layout.semaphore
        own = [open_semaphore(name("b", self.rank, k)) for k in rounds]
        theirs = [open_semaphore(name("b", (self.rank + 2**k) % self.size, k)) for k in rounds]
        self._barrier = Barrier(own, theirs, self._waiter, self.size)

    def _join_mail(self, fd: int) -> None:
        self._outboxes: dict[int, Outbox] = {}
        self._inboxes: dict[int, Inbox] = {}
        if self.size == 1 or not self._layout.slot_bytes:
            return
        mail = np.frombuffer(mmap.mmap(fd, self._layout.mail_bytes), np.uint8)
        rings = mail.reshape(self.size, self.size - 1, -1)

        def box(kind: type, a: int, b: int) -> Any:
            filled, free = (open_semaphore(self._layout.semaphore(which, a, b)) for which in "io")
            return kind(rings[a, b - (b > a)], filled, free)

        for peer in self._others:
            self._outboxes[peer] = box(Outbox, self.rank, peer)
            self._inboxes[peer] = box(Inbox, peer, self.rank)

    def edges(self, slots: Slots, elements: int, tokens: int, dtype: torch.dtype) -> Edges:
        return Loans(self, self._lent, self._returned, self._waiter, slots, elements, tokens, dtype)

    def group(self, groups: Sequence[Sequence[int]]) -> Comm:
        self._allocations += 1
        index = next(i for i, ranks in enumerate(groups) if self.rank in ranks)
        layout = Layout(f"{self._layout.name}-{self._allocations}.{index}", len(groups[index]), 0)
        path = os.path.join(memory.directory(), layout.name)
        first, held = self.rank == groups[index][0], []
        if first:
            held = [create_semaphore(name, value) for name, value in layout.semaphores().items()]
            os.close(memory.create(path, Block.size(layout.ranks), "a group of ranks"))
        self._barrier.cross("barrier")
        block = self.block.of(path, groups[index])
        comm = SharedMemoryComm(groups[index].index(self.rank), layout, -1, block, self.timeout, groups[index],
                                self._waiter.duties)
        self._barrier.cross("barrier")
        if first:
            for name in layout.semaphores():
                unlink_semaphore(name)
            os.unlink(path)
        del held
        return comm

    def _pairs(self, kind: str) -> Pairs:
        def end(a: int, b: int) -> SemLock:
            return open_semaphore(self._layout.semaphore(kind, a, b))

        return {peer: (end(peer, self.rank), end(self.rank, peer)) for peer in self._others}

    @property
    def waited(self) -> int:
        return self._waiter.waited

    # Messages, and what moves along beside other things

    def send(self, tensor: torch.Tensor, to: int) -> None:
        self.check_peer(to, "send")
        self.check_tensor(tensor, "send")
        self._outboxes[to].post(tensor, self._waiter)
        self.sent += tensor.numel() * tensor.element_size()
        self.sent_to[to] += 1
        if self._outboxes[to].pending:
            self._waiter.duties[self._advance] = None

    def recv(self, tensor: torch.Tensor | None, source: int) -> torch.Tensor:
        self.check_peer(source, "recv")
        if tensor is not None:
            self.check_tensor(tensor, "recv")
        tensor = self._inboxes[source].take(tensor, source, self._waiter)
        self.received_from[source] += 1
        return tensor

    def _advance(self) -> None:
        """Move unfinished sends and posted sums along; never blocks."""
        busy = False
        for box in self._outboxes.values():
            if box.pending and not box.push():
                busy = True
        self._posted.progress()
        if not (busy or self._posted):
            self._waiter.duties.pop(self._advance, None)

    def finish(self) -> None:
        self._posted.settle()
        for peer, box in self._outboxes.items():
            if box.pending:
                self._waiter.until(partial(self._pushed, box), box.free, "send", peer)
        self._waiter.duties.pop(self._advance, None)

    def _pushed(self, box: Outbox) -> bool:
        self.progress()
        return not box.pending

    # Memory of all ranks

    def empty(self, n: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return self._empty(n, dtype, "empty")

    def _empty(self, n: int, dtype: torch.dtype, operation: str) -> torch.Tensor:
        if n < 0:
            raise ValueError(f"empty: {n} elements")
        self._posted.settle()
        row = -(-max(n * dtype.itemsize, 1) // _LINE) * _LINE
        rows = Rows(self._map(row * self.size, operation), self.size, row)
        if n == 0:
            return torch.empty(0, dtype=dtype)
        # Its own exporter: when the last tensor over it goes, so does the entry, and with it the mapping.
        own = rows.arrays[self.rank][: n * dtype.itemsize]
        start = own.ctypes.data
        self._blocks.append((start, start + row, rows))
        weakref.finalize(own, self._forget, start).atexit = False
        return torch.frombuffer(own, dtype=dtype)

    def shared(self, n: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        self._posted.settle()
        size = -(-max(n * dtype.itemsize, 1) // _LINE) * _LINE
        own = Rows(self._map(size), 1, size).arrays[0]
        self._common.append((own.ctypes.data, own.ctypes.data + size))
        weakref.finalize(own, self._common.remove, self._common[-1]).atexit = False
        return torch.frombuffer(own, dtype=dtype)[:n]

    def _forget(self, start: int) -> None:
        self._blocks = [block for block in self._blocks if block[0] != start]
        self._sums = {}

    def _map(self, size: int, operation: str = "empty") -> mmap.mmap:
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
        self._barrier.cross(operation)
        free = int(self.block.room[0])
        if free < 0 and self.rank != 0:
            fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        self._barrier.cross(operation)
        if free >= 0:
            raise memory.no_room(what, size, free)
        if self.rank == 0:
            os.unlink(path)
        try:
            return mmap.mmap(fd, size, mmap.MAP_SHARED | getattr(mmap, "MAP_POPULATE", 0))
        finally:
            os.close(fd)

    def _find(self, tensor: torch.Tensor) -> tuple[Rows, int] | None:
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
        return [rows.view(rank, start, tensor.numel(), tensor.dtype).view(tensor.shape) for rank in range(self.size)]

    # Collectives

    def barrier(self) -> None:
        self._posted.settle()
        self._barrier.cross("barrier")

    def _sum(self, tensor: torch.Tensor, operation: str) -> Program | None:
        """The steps that sum a tensor of all ranks' memory where it lies; None for private memory."""
        key = (tensor.data_ptr(), tensor.numel(), tensor.dtype)
        program = self._sums.get(key)
        if program is None or not tensor.is_contiguous():
            self.check_tensor(tensor, operation)
            found = self._find(tensor)
            if found is None:
                return None
            rows, start = found
            program = rows.sum_program(start, self.bounds(tensor.numel()), tensor.dtype, range(1, self.size))
            self._sums[key] = program
        return program

    def all_reduce(self, tensor: torch.Tensor) -> torch.Tensor:
        program = self._sum(tensor, "all_reduce")
        if self._posted:
            self._posted.settle()
        if program is None:
            return self._scratch.reduce(tensor, "all_reduce")
        self._barrier.cross("all_reduce")
        run_program(program)
        self._barrier.cross("all_reduce")
        return tensor

    def post_all_reduce(self, tensor: torch.Tensor) -> Handle:
        program = self._sum(tensor, "post_all_reduce")
        if program is None:  # without memory of all ranks it is done now
            self.all_reduce(tensor)
            return Then()
        return self._post(program)

    def _post(self, program: Program) -> Handle:
        posted = self._posted.post(program)
        self._waiter.duties[self._advance] = None
        self.progress()
        return posted

    def _in_rows(self, tensor: torch.Tensor, operation: str) -> tuple[Rows, int]:
        found = self._find(tensor)
        if found is None:
            raise ValueError(f"{operation}: the tensor must lie in memory of comm.empty")
        return found

    def post_reduce_scatter(self, tensor: torch.Tensor, out: torch.Tensor, add: bool) -> Handle:
        key = (tensor.data_ptr(), tensor.numel(), out.data_ptr(), add)
        program = self._sums.get(key)
        if program is None:
            rows, start = self._in_rows(tensor, "post_reduce_scatter")
            program = rows.sum_program(start, self.bounds(tensor.numel()), out.dtype, out=out, add=add)
            self._sums[key] = program
        return self._post(program)

    def post_all_gather(self, tensor: torch.Tensor) -> Handle:
        if any(low <= tensor.data_ptr() < high for low, high in self._common):
            return self._post([])  # the parts are where they belong: only wait until all are written
        rows, start = self._in_rows(tensor, "post_all_gather")
        bounds = [self.bounds(tensor.numel(), rank) for rank in self._others]
        return self._post([rows.copy(start, b, tensor.dtype, rank, self.rank)
                           for rank, b in zip(self._others, bounds, strict=True)])

    def post_send(self, tensor: torch.Tensor, to: int) -> Handle:
        self._in_rows(tensor, "post_send")
        self.sent += tensor.numel() * tensor.element_size()
        return self._direct.send(to)

    def post_recv(self, tensor: torch.Tensor, source: int, add: bool = False) -> Handle:
        rows, start = self._in_rows(tensor, "post_recv")
        bounds = (0, tensor.numel())
        program = [rows.addition(start, bounds, tensor.dtype, source, self.rank) if add
                   else rows.copy(start, bounds, tensor.dtype, source, self.rank)]
        return self._direct.recv(source, program)

    def arrivals(self, tensor: torch.Tensor, sources: Sequence[int], each: int) -> Iterator[int]:
        left = dict.fromkeys(sources, each)
        posted = {source: self.post_recv(tensor, source) for source in sources}
        came: list[int] = []

        def look() -> bool:
            source = next((s for s in posted if posted[s].poll()), -1)
            if source >= 0:
                came.append(source)
            return source >= 0

        while posted:
            self._waiter.until(look, None, "recv", -1)
            source = came.pop()
            del posted[source]  # to the end: who has just been served is looked at last
            left[source] -= 1
            if left[source]:
                posted[source] = self.post_recv(tensor, source)
            yield source

    def reduce_scatter(self, tensor: torch.Tensor) -> torch.Tensor:
        self.check_tensor(tensor, "reduce_scatter")
        self._posted.settle()
        found = self._find(tensor)
        lo, hi = self.bounds(tensor.numel())
        if found is None:
            self._scratch.reduce(tensor, "reduce_scatter")
        else:
            rows, start = found
            own = [self.rank] if self.rank else []
            self._barrier.cross("reduce_scatter")
            run_program(rows.sum_program(start, (lo, hi), tensor.dtype, own))
            self._barrier.cross("reduce_scatter")
        return tensor.view(-1)[lo:hi]

    def all_gather(self, tensor: torch.Tensor) -> torch.Tensor:
        self.check_tensor(tensor, "all_gather")
        bounds = [self.bounds(tensor.numel(), rank) for rank in range(self.size)]
        return self._spread(tensor, "all_gather", bounds)

    def broadcast(self, tensor: torch.Tensor, root: int = 0) -> torch.Tensor:
        self.check_tensor(tensor, "broadcast")
        if not 0 <= root < self.size:
            raise ValueError(f"broadcast: root {root} is not a rank (0 to {self.size - 1})")
        bounds = [(0, tensor.numel() if rank == root else 0) for rank in range(self.size)]
        return self._spread(tensor, "broadcast", bounds)

    def _spread(self, tensor: torch.Tensor, operation: str, bounds: list[tuple[int, int]]) -> torch.Tensor:
        """Copy each rank's range of elements to all the others."""
        self._posted.settle()
        peers = self.peers(tensor)
        if peers is None:
            return self._scratch.spread(tensor, operation, bounds)
        self._barrier.cross(operation)
        for rank in self._others:
            lo, hi = bounds[rank]
            tensor.view(-1)[lo:hi] = peers[rank].view(-1)[lo:hi]
        self._barrier.cross(operation)
        return tensor
