"""Symmetric memory: an equal share for each rank, which all ranks see, and the sums over them."""

import mmap
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

# Large sums are bound by memory. Each core must read and write back as many bytes as one share has; for 12 MB on a Xeon
# that alone takes 690 to 780 us, the sum 825 to 935, a copy of 12 MB 1,200 to 1,380; huge pages change nothing.
_CACHE = 1 << 17  # bytes that one block of a sum takes of each share: they stay in the second-level cache

Step = tuple[Callable[..., Any], tuple]
Steps = list[Step]  # of a collective: functions and their arguments


class Symmetric:
    """One allocation: the shares of all ranks, side by side in one mapped file.

    Attributes
    ----------
    arrays : list of numpy.ndarray
        By rank, bytes.
    tensors : list of torch.Tensor
        The same memory.
    """

    def __init__(self, mapped: mmap.mmap, ranks: int, share_bytes: int) -> None:
        self.arrays = [np.frombuffer(mapped, np.uint8, share_bytes, r * share_bytes) for r in range(ranks)]
        self.tensors = [torch.from_numpy(array) for array in self.arrays]

    def view(self, rank: int, start: int, n: int, dtype: torch.dtype) -> torch.Tensor:
        """`n` elements of a rank's share from byte `start`."""
        return self.tensors[rank][start : start + n * dtype.itemsize].view(dtype)

    def sum(self, start: int, bounds: tuple[int, int], dtype: torch.dtype, targets: Sequence[int] = (),
                    out: torch.Tensor | None = None, add: bool = False) -> Steps:  # fmt: skip
        """The sum of elements `bounds` over all shares, in rank order, block by block.

        Parameters
        ----------
        start : int
            The byte at which element 0 lies.
        targets : sequence of int
            Shares to which each block of share 0 is copied while it is in the cache.
        out : Tensor, optional
            Where the sum goes; into share 0 where None.
        add : bool
            Add it to `out`.
        """
        lo, hi = bounds
        step = max(_CACHE // dtype.itemsize, 1)
        steps: Steps = []
        for first in range(lo, hi, step):
            n, at = min(step, hi - first), start + first * dtype.itemsize
            parts = [self.view(rank, at, n, dtype) for rank in range(len(self.tensors))]
            into = parts[0] if out is None else out[first - lo : first - lo + n]
            if not add and len(parts) > 1:
                steps.append(_addition(parts[0], parts[1], into))
                parts = parts[2:]
            elif not add and out is not None:
                steps.append((into.copy_, (parts.pop(),)))
            steps += [_addition(into, part, into) for part in parts if part is not into]
            size = n * dtype.itemsize
            source = self.arrays[0][at : at + size].data
            # A memoryview copies with the least overhead: small sums are bound by it.
            steps += [(self.arrays[rank][at : at + size].data.__setitem__, (slice(None), source)) for rank in targets]
        return steps

    def addition(self, start: int, bounds: tuple[int, int], dtype: torch.dtype, source: int, target: int) -> Step:
        """The addition of elements of one share to those of another."""
        lo, hi = bounds
        at, n = start + lo * dtype.itemsize, hi - lo
        total = self.view(target, at, n, dtype)
        return _addition(total, self.view(source, at, n, dtype), total)

    def copy(self, start: int, bounds: tuple[int, int], dtype: torch.dtype, source: int, target: int) -> Step:
        """The copy of elements of one share to another."""
        first, last = (start + bound * dtype.itemsize for bound in bounds)
        return self.arrays[target][first:last].data.__setitem__, (slice(None), self.arrays[source][first:last].data)


def _addition(a: torch.Tensor, b: torch.Tensor, out: torch.Tensor) -> Step:
    if out.dtype == torch.bfloat16:  # numpy has no such type
        return (lambda: torch.add(a, b, out=out)), ()
    return np.add, (a.numpy(), b.numpy(), out.numpy())


def run(steps: Steps) -> None:
    """Do the steps."""
    for function, arguments in steps:
        function(*arguments)
