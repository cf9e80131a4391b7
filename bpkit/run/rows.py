"""Memory that every rank sees: one row a rank, and the sums over them."""

from __future__ import annotations

import mmap
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

_CACHE = 1 << 17  # bytes that one block of a sum takes of each row: they stay in the second-level cache

Step = tuple[Callable[..., Any], tuple]
Program = list[Step]  # steps of a collective: functions and their arguments


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
            program += [(self.arrays[rank][at : at + size].data.__setitem__, (slice(None), source)) for rank in targets]
        return program


    def sum_into(self, start: int, bounds: tuple[int, int], out: torch.Tensor, add: bool) -> Program:
        """The sum of elements `bounds` over all rows, in rank order, put into `out` or added to it."""
        lo, hi = bounds
        step = max(_CACHE // out.element_size(), 1)
        program: Program = []
        for first in range(lo, hi, step):
            n, at = min(step, hi - first), start + first * out.element_size()
            into = out[first - lo : first - lo + n]
            parts = [self.view(rank, at, n, out.dtype) for rank in range(len(self.tensors))]
            if not add and len(parts) > 1:
                program.append(_sum_of_two(parts[0], parts[1], into))
                parts = parts[2:]
            elif not add:
                program.append((into.copy_, (parts.pop(),)))
            program += [_addition(into, part) for part in parts]
        return program

    def addition(self, start: int, bounds: tuple[int, int], dtype: torch.dtype, source: int, target: int) -> Step:
        """The addition of elements of one row to those of another."""
        lo, hi = bounds
        at, n = start + lo * dtype.itemsize, hi - lo
        return _addition(self.view(target, at, n, dtype), self.view(source, at, n, dtype))

    def copy(self, start: int, bounds: tuple[int, int], dtype: torch.dtype, source: int, target: int) -> Step:
        """The copy of elements of one row to another."""
        first, last = (start + bound * dtype.itemsize for bound in bounds)
        return self.arrays[target][first:last].data.__setitem__, (slice(None), self.arrays[source][first:last].data)


def _addition(total: torch.Tensor, other: torch.Tensor) -> tuple[Callable[..., Any], tuple]:
    if total.dtype == torch.bfloat16:  # numpy has no such type
        return total.add_, (other,)
    a, b = total.numpy(), other.numpy()
    return np.add, (a, b, a)


def _sum_of_two(a: torch.Tensor, b: torch.Tensor, out: torch.Tensor) -> Step:
    if out.dtype == torch.bfloat16:
        return (lambda: torch.add(a, b, out=out)), ()
    return np.add, (a.numpy(), b.numpy(), out.numpy())


def run_program(program: Program) -> None:
    """Run the steps."""
    for function, arguments in program:
        function(*arguments)
