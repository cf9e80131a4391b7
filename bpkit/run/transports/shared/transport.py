"""The transport for workers of one host: gradients lie in shared memory and are added where they lie.

`all_reduce` of memory from `Comm.empty`: once all are ready each rank adds its own slice over all ranks, in rank
order, and writes it into every rank's share. No byte is copied but the result. Other tensors go through a scratch
area, one copy in and one out.
"""

import contextlib
import mmap
import os
import weakref
from collections.abc import Iterator, Sequence

import torch

from bpkit.run.errors import NoRoom
from bpkit.run.transports.board import Board
from bpkit.run.transports.comm import Comm, Edges, Handle, Slots, Then
from bpkit.run.transports.shared import files
from bpkit.run.transports.shared.mailbox import Mail
from bpkit.run.transports.shared.names import Layout
from bpkit.run.transports.shared.protocols import Loans, Posted, Protocols
from bpkit.run.transports.shared.scratch import Scratch
from bpkit.run.transports.shared.semaphores import Waiter
from bpkit.run.transports.shared.symmetric import Steps, Symmetric, run

_LINE = 64


class SharedMemoryComm(Comm):
    """One rank's end of the shared-memory transport (see `Comm`)."""

    name = "shm"

    def __init__(self, rank: int, layout: Layout, fd: int, board: Board, timeout: float,
                 waiter: Waiter | None = None) -> None:  # fmt: skip
        self._layout, self._waiter = layout, waiter or Waiter(board.waits[rank], timeout)
        super().__init__(rank, layout.ranks, board, timeout, account=self._waiter)
        self.progress = self._waiter.progress  # type: ignore[method-assign]  # of all groups of this rank
        self._protocols = Protocols(layout, rank, self._waiter)
        self._mail = Mail(layout, rank, fd, self._protocols)
        self._blocks: list[tuple[int, int, Symmetric]] = []
        self._sums: dict[tuple, Steps] = {}  # by addresses, length, type: valid while the memory lives
        self._allocations = 0
        self._scratch = Scratch(self, self._allocate, self._of_all, self._protocols.meet)

    def edges(self, slots: Slots, elements: int, tokens: int, dtype: torch.dtype) -> Edges:
        return Loans(self, self._protocols, slots, elements, tokens, dtype)

    def group(self, groups: Sequence[Sequence[int]]) -> Comm:
        self._allocations += 1
        index, ranks = next((i, ranks) for i, ranks in enumerate(groups) if self.rank in ranks)
        layout = Layout(f"{self._layout.name}-{self._allocations}.{index}", ranks)
        with layout.named() if self.rank == ranks[0] else contextlib.nullcontext():
            self._protocols.meet("barrier")
            comm = SharedMemoryComm(ranks.index(self.rank), layout, -1, self.board, self.timeout, self._waiter)
            self._protocols.meet("barrier")
        comm.mark = self.mark
        return comm

    # Messages, and what moves along beside other things

    def _send(self, tensor: torch.Tensor, to: int) -> None:
        self._mail.send(tensor, to)

    def _receive(self, tensor: torch.Tensor | None, source: int) -> torch.Tensor:
        return self._mail.receive(tensor, source)

    def finish(self) -> None:
        self._protocols.settle(*self._protocols.free.values())

    # Memory of all ranks

    def empty(self, n: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return self._allocate(n, dtype, "empty")

    def shared(self, n: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return self._allocate(n, dtype, "empty", shares=1)

    def _allocate(self, n: int, dtype: torch.dtype, operation: str, shares: int = 0) -> torch.Tensor:
        """This rank's share of new memory of all ranks."""
        if n < 0:
            raise ValueError(f"empty: {n} elements")
        shares, share = shares or self.size, -(-max(n * dtype.itemsize, 1) // _LINE) * _LINE
        memory = Symmetric(self._map(share * shares, operation), shares, share)
        if n == 0:
            return torch.empty(0, dtype=dtype)
        # Its own exporter: when the last tensor over it goes, so does the entry, and with it the mapping.
        own = memory.arrays[self.rank % shares][: n * dtype.itemsize]
        start = own.ctypes.data
        self._blocks.append((start, start + share, memory))
        weakref.finalize(own, self._forget, start).atexit = False
        return torch.frombuffer(own, dtype=dtype)

    def _forget(self, start: int) -> None:
        self._blocks = [block for block in self._blocks if block[0] != start]
        self._sums = {}

    def _map(self, size: int, operation: str = "empty") -> mmap.mmap:
        """Map one new file of `size` bytes on every rank; its name is gone when this returns."""
        self._allocations += 1
        path = os.path.join(files.directory(), f"{self._layout.name}-{self._allocations}")
        what, fd = f"comm.empty for {self.size} ranks", -1
        if self.rank == 0:
            with contextlib.suppress(NoRoom):
                fd = files.create(path, size, what)
        self._protocols.meet(operation)
        if self.rank:
            with contextlib.suppress(FileNotFoundError):
                fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        self._protocols.meet(operation)
        if fd < 0:
            raise files.no_room(what, size)
        if self.rank == 0:
            os.unlink(path)
        try:
            return mmap.mmap(fd, size, mmap.MAP_SHARED | getattr(mmap, "MAP_POPULATE", 0))
        finally:
            os.close(fd)

    def _find(self, tensor: torch.Tensor, common: bool = False) -> tuple[Symmetric, int] | None:
        """The memory of all ranks that a contiguous tensor lies in and its byte offset there, or None.

        Memory that is one for all ranks is only found where `common`.
        """
        pointer = tensor.data_ptr()
        for start, end, memory in self._blocks:
            if start <= pointer < end and (common or len(memory.tensors) == self.size):
                return (memory, pointer - start) if tensor.is_contiguous() else None
        return None

    def _of_all(self, tensor: torch.Tensor, operation: str) -> tuple[Symmetric, int]:
        found = self._find(tensor)
        if found is None:
            raise ValueError(f"{operation}: the tensor must lie in memory of comm.empty")
        return found

    def peers(self, tensor: torch.Tensor) -> list[torch.Tensor] | None:
        found = self._find(tensor)
        if found is None:
            return None
        memory, start = found
        return [memory.view(rank, start, tensor.numel(), tensor.dtype).view(tensor.shape) for rank in range(self.size)]

    # Collectives: of memory of all ranks where it lies, of a rank's own memory at once

    def barrier(self) -> None:
        self._protocols.meet("barrier")

    def _sum(self, tensor: torch.Tensor) -> Steps | None:
        """The steps that sum a tensor of all ranks' memory where it lies; None for private memory."""
        key = (tensor.data_ptr(), tensor.numel(), tensor.dtype)
        steps = self._sums.get(key)
        if steps is None or not tensor.is_contiguous():
            self.check_tensor(tensor, "all_reduce")
            found = self._find(tensor)
            if found is None:
                return None
            memory, start = found
            steps = memory.sum(start, self.bounds(tensor.numel()), tensor.dtype, range(1, self.size))
            self._sums[key] = steps
        return steps

    def post_all_reduce(self, tensor: torch.Tensor) -> Handle:
        steps = self._sum(tensor)
        if steps is None:
            return self._scratch.sum(tensor, "all_reduce")
        return Posted(self._protocols.together(steps), "all_reduce")

    def all_reduce(self, tensor: torch.Tensor) -> torch.Tensor:
        steps = self._sum(tensor)
        if steps is None:
            self._scratch.sum(tensor, "all_reduce")
        else:  # as if posted and waited for, without a handle: small sums are bound by what is done here
            self._protocols.meet("all_reduce")
            run(steps)
            self._protocols.meet("all_reduce")
        return tensor

    def post_reduce_scatter(self, tensor: torch.Tensor, out: torch.Tensor, add: bool) -> Handle:
        key = (tensor.data_ptr(), tensor.numel(), out.data_ptr(), add)
        steps = self._sums.get(key)
        if steps is None:
            lo, hi = bounds = self.bounds(tensor.numel())
            found, part = self._find(tensor), tensor.view(-1)[lo:hi]
            here = part.data_ptr() == out.data_ptr()
            if found is None:
                self._scratch.sum(tensor, "reduce_scatter")
                return Then(then=lambda: here or (out.add_(part) if add else out.copy_(part)))
            memory, start = found
            into, targets = (None, [self.rank] if self.rank else []) if here else (out, [])
            steps = self._sums[key] = memory.sum(start, bounds, out.dtype, targets, into, add)
        return Posted(self._protocols.together(steps), "reduce_scatter")

    def post_all_gather(self, tensor: torch.Tensor) -> Handle:
        return self._spread(tensor, "all_gather", [self.bounds(tensor.numel(), rank) for rank in range(self.size)])

    def post_broadcast(self, tensor: torch.Tensor, root: int) -> Handle:
        return self._spread(tensor, "broadcast", [(0, tensor.numel() * (rank == root)) for rank in range(self.size)])

    def _spread(self, tensor: torch.Tensor, operation: str, bounds: list[tuple[int, int]]) -> Handle:
        """Copy each rank's range of elements to all the others."""
        self.check_tensor(tensor, operation)
        found = self._find(tensor, common=True)
        if found is None:
            return self._scratch.exchange(tensor, operation, bounds)
        memory, start = found
        apart = range(self.size) if len(memory.tensors) == self.size else ()  # else all is where it belongs
        steps = [memory.copy(start, bounds[rank], tensor.dtype, rank, self.rank) for rank in apart if rank != self.rank]
        return Posted(self._protocols.together(steps), operation)

    # Messages without a copy

    def post_send(self, tensor: torch.Tensor, to: int) -> Handle:
        self._of_all(tensor, "post_send")
        self.account.sent += tensor.numel() * tensor.element_size()
        return Posted(self._protocols.show(to), "send", polled=True)

    def post_recv(self, tensor: torch.Tensor, source: int, add: bool = False) -> Handle:
        return Posted(self._protocols.see(source, self._take(tensor, source, add)), "recv", polled=True)

    def _take(self, tensor: torch.Tensor, source: int, add: bool = False) -> Steps:
        """The steps that read a peer's memory into a tensor."""
        key = (tensor.data_ptr(), tensor.numel(), tensor.dtype, source, add)
        steps = self._sums.get(key)
        if steps is None or not tensor.is_contiguous():
            memory, start = self._of_all(tensor, "post_recv")
            act = memory.addition if add else memory.copy
            steps = self._sums[key] = [act(start, (0, tensor.numel()), tensor.dtype, source, self.rank)]
        return steps

    def arrivals(self, tensor: torch.Tensor, sources: Sequence[int], each: int) -> Iterator[int]:
        # Nothing is posted: what is posted acts whenever its message comes, and all of these have one place.
        steps = {source: self._take(tensor, source) for source in sources}
        left, came = dict.fromkeys(sources, each), list[int]()

        def look() -> bool:
            came.extend(next(([source] for source in left if self._protocols.shown(source)), []))
            return bool(came)

        while left:
            self._waiter.until(look, None, "recv", -1)
            source = came.pop()
            self._protocols.read(source, steps[source])
            if again := left.pop(source) - 1:
                left[source] = again  # at the end: who has just been served is looked at last
            yield source
