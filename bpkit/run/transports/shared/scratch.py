"""Collectives of tensors that lie in a rank's own memory: through two scratch areas that all ranks see, in turn.

Whoever writes into an area again has met all ranks after they have read it.
"""

from collections.abc import Callable

import torch

from bpkit.run.transports.comm import Comm, Then
from bpkit.run.transports.shared.symmetric import Steps, Symmetric, run

_LARGEST = 1 << 20  # bytes of one area, at most


class Scratch:
    """The scratch areas of one rank; made when they are first needed, on all ranks.

    Parameters
    ----------
    comm : Comm
    allocate, find, meet : callable
        Make memory of all ranks, find a tensor in it, and wait for all ranks, in an operation that errors name.
    """

    def __init__(self, comm: Comm, allocate: Callable[[int, torch.dtype, str], torch.Tensor],
                 find: Callable[[torch.Tensor, str], tuple[Symmetric, int]],
                 meet: Callable[[str], None]) -> None:  # fmt: skip
        self._comm, self._allocate, self._find, self._meet = comm, allocate, find, meet
        self._memory = torch.empty(0, dtype=torch.uint8)
        self._areas: dict[tuple, tuple[list[torch.Tensor], Steps]] = {}
        self._half = 0

    def _room(self, size: int, operation: str) -> int:
        """Bytes of one area, made larger for `size` bytes; the same on every rank."""
        want = min(1 << max(size - 1, 4095).bit_length(), _LARGEST)
        if self._memory.numel() < 2 * want:
            self._areas = {}
            self._memory = self._allocate(2 * want, torch.uint8, operation)
        return self._memory.numel() // 2

    def _next(self, n: int, dtype: torch.dtype) -> tuple[list[torch.Tensor], Steps]:
        """The next area, of each rank, and the steps that sum them, into rank 0's."""
        self._half = 1 - self._half
        key = (self._half, n, dtype)
        if key not in self._areas:
            memory, start = self._find(self._memory, "scratch")
            start += self._half * (self._memory.numel() // 2)
            self._areas[key] = ([memory.view(rank, start, n, dtype) for rank in range(self._comm.size)],
                                memory.sum(start, self._comm.bounds(n), dtype))  # fmt: skip
        return self._areas[key]

    def sum(self, tensor: torch.Tensor, operation: str) -> Then:
        """Sum over ranks, in place."""
        flat, own = tensor.detach().reshape(-1), self._comm.rank
        most = flat.numel() and self._room(flat.numel() * flat.element_size(), operation) // flat.element_size()
        for piece in flat.split(most) if most < flat.numel() else (flat,) if most else ():
            areas, steps = self._next(piece.numel(), piece.dtype)
            areas[own].copy_(piece)
            self._meet(operation)
            run(steps)
            self._meet(operation)
            piece.copy_(areas[0])
        return self._put_back(flat, tensor)

    def exchange(self, tensor: torch.Tensor, operation: str, bounds: list[tuple[int, int]]) -> Then:
        """Copy each rank's range of elements to all the others."""
        flat, own = tensor.detach().reshape(-1), self._comm.rank
        most, size = max(hi - lo for lo, hi in bounds), flat.element_size()
        width = self._room(most * size, operation) // size if most else 1
        for done in range(0, most, width):
            pieces = [flat[min(lo + done, hi) : min(lo + done + width, hi)] for lo, hi in bounds]
            areas, _ = self._next(min(width, most - done), flat.dtype)
            areas[own][: len(pieces[own])].copy_(pieces[own])
            self._meet(operation)
            for rank, piece in enumerate(pieces):
                if rank != own:
                    piece.copy_(areas[rank][: len(piece)])
        return self._put_back(flat, tensor)

    @staticmethod
    def _put_back(flat: torch.Tensor, tensor: torch.Tensor) -> Then:
        if flat.data_ptr() != tensor.data_ptr():
            tensor.detach().copy_(flat.view(tensor.shape))
        return Then()
