"""Memory that every rank sees: one row a rank, and the sums over them."""

from __future__ import annotations

import mmap
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

_CACHE = 1 << 17  # bytes that one block of a sum takes of each row: they stay in the second-level cache

Program = list[tuple[Callable[..., Any], tuple]]  # steps of a collective: functions and their arguments


class Rows:
    """One symmetric allocation: the rows of all ranks in one mapped file.

    Attributes
    ----------
    arrays : list of numpy.ndarray
        By rank, bytes.
    tensors : list of torch.Tensor
        The same memory.
    """

    def __init__(self, mapped: mmap.mmap, ranks: int, row_bytes: int) -> None:
        self.arrays = [np.frombuffer(mapped, np.uint8, row_bytes, r * row_bytes) for r in range(ranks)]
        self.tensors = [torch.from_numpy(array) for array in self.arrays]

    def view(self, rank: int, start: int, n: int, dtype: torch.dtype) -> torch.Tensor:
        """`n` elements of a rank's row from byte `start`."""
        return self.tensors[rank][start : start + n * dtype.itemsize].view(dtype)

    def sum_program(self, start: int, bounds: tuple[int, int], dtype: torch.dtype, targets: list[int]) -> Program:
        """The additions of elements `bounds` over all rows into row 0, in rank order, block by block; each
        block is copied to the rows of `targets` while it is in the cache.

        `start` is the byte at which element 0 lies.
        """
        lo, hi = bounds
        step = max(_CACHE // dtype.itemsize, 1)
        program: Program = []
        for first in range(lo, hi, step):
            n, at = min(step, hi - first), start + first * dtype.itemsize
            parts = [self.view(rank, at, n, dtype) for rank in range(len(self.tensors))]
            program += [_addition(parts[0], part) for part in parts[1:]]
            size = n * dtype.itemsize
            source = self.arrays[0][at : at + size].data
            # A memoryview copies with the least overhead: small sums are bound by it.
            program += [(self.arrays[rank][at : at + size].data.__setitem__, (slice(None), source))
                        for rank in targets]
        return program


def _addition(total: torch.Tensor, other: torch.Tensor) -> tuple[Callable[..., Any], tuple]:
    if total.dtype == torch.bfloat16:  # numpy has no such type
        return total.add_, (other,)
    a, b = total.numpy(), other.numpy()
    return np.add, (a, b, a)


def run_program(program: Program) -> None:
    """Run the steps."""
    for function, arguments in program:
        function(*arguments)
