"""Collectives of tensors that lie in a rank's own memory: through two scratch rows that all ranks see, in turn.

Whoever writes into a row again has passed a barrier that all reach only after they have read it.
"""

from collections.abc import Callable

import torch

from bpkit.run.transports.comm import Comm
from bpkit.run.transports.shared.rows import Program, Rows, run_program

_LARGEST = 1 << 20  # bytes of one scratch row, at most


class Scratch:
    """The scratch rows of one rank; made when they are first needed, on all ranks.

    Parameters
    ----------
    comm : Comm
    allocate, find, cross : callable
        Make memory of all ranks, find a tensor in it, and wait for all ranks, in an operation that errors name.
    """

    def __init__(self, comm: Comm, allocate: Callable[[int, torch.dtype, str], torch.Tensor],
                 find: Callable[[torch.Tensor, str], tuple[Rows, int]],
                 cross: Callable[[str], None]) -> None:  # fmt: skip
        self._comm, self._allocate, self._find, self._cross = comm, allocate, find, cross
        self._memory = torch.empty(0, dtype=torch.uint8)
        self._stages: dict[tuple, tuple[torch.Tensor, Program, torch.Tensor]] = {}
        self._half = 0

    def _room(self, size: int, operation: str) -> int:
        """Bytes of one scratch row, made larger for `size` bytes; the same on every rank."""
        want = min(1 << max(size - 1, 4095).bit_length(), _LARGEST)
        if self._memory.numel() < 2 * want:
            self._stages = {}
            self._memory = self._allocate(2 * want, torch.uint8, operation)
        return self._memory.numel() // 2

    def _stage(self, n: int, dtype: torch.dtype) -> tuple[torch.Tensor, Program, torch.Tensor]:
        """For the next scratch row: where this rank writes, the sum's steps, where the sum is read."""
        self._half = 1 - self._half
        key = (self._half, n, dtype)
        if key not in self._stages:
            rows, start = self._find(self._memory, "scratch")
            start += self._half * (self._memory.numel() // 2)
            self._stages[key] = (rows.view(self._comm.rank, start, n, dtype),
                                 rows.sum_program(start, self._comm.bounds(n), dtype),
                                 rows.view(0, start, n, dtype))  # fmt: skip
        return self._stages[key]

    def reduce(self, tensor: torch.Tensor, operation: str) -> torch.Tensor:
        """Sum over ranks, in place."""
        flat = tensor.detach().reshape(-1)
        if flat.numel() == 0:
            return tensor
        most = self._room(flat.numel() * flat.element_size(), operation) // flat.element_size()
        for piece in flat.split(most) if most < flat.numel() else (flat,):
            own, program, total = self._stage(piece.numel(), piece.dtype)
            own.copy_(piece)
            self._cross(operation)
            run_program(program)
            self._cross(operation)
            piece.copy_(total)
        if flat.data_ptr() != tensor.data_ptr():
            tensor.detach().copy_(flat.view(tensor.shape))
        return tensor

    def spread(self, tensor: torch.Tensor, operation: str, bounds: list[tuple[int, int]]) -> torch.Tensor:
        """Copy each rank's range of elements to all the others."""
        comm, flat = self._comm, tensor.detach().reshape(-1)
        most, size = max(hi - lo for lo, hi in bounds), flat.element_size()
        width = self._room(most * size, operation) // size if most else 1
        for done in range(0, most, width):
            pieces = [flat[min(lo + done, hi) : min(lo + done + width, hi)] for lo, hi in bounds]
            self._stage(1, torch.uint8)
            half = self._memory.view(2, -1)[self._half]
            own = pieces[comm.rank]
            half[: own.numel() * size].view(flat.dtype).copy_(own)
            self._cross(operation)
            rows = comm.peers(half) or []
            for rank, piece in enumerate(pieces):
                if rank != comm.rank:
                    piece.copy_(rows[rank][: piece.numel() * size].view(flat.dtype))
        if flat.data_ptr() != tensor.data_ptr():
            tensor.detach().copy_(flat.view(tensor.shape))
        return tensor
