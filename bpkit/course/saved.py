"""Counts the bytes that PyTorch's autograd keeps between a forward and its backward, at their peak."""

from __future__ import annotations

import weakref
from collections import Counter
from typing import Any

import torch
from torch import Tensor


class _Kept:
    """A saved tensor; it goes when autograd lets go of it."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor


class SavedBytes:
    """A context in which autograd's saved tensors are counted; parameters, which are there anyway, are not.

    Several saved views of one storage count once, by the bytes of the storage.

    Parameters
    ----------
    *parameters : Tensor
        Not counted.

    Attributes
    ----------
    now, peak : int
        Bytes that are kept now, and at most so far.

    Examples
    --------
    >>> x, weight = torch.ones(4, 8), torch.ones(8, 8, requires_grad=True)
    >>> with SavedBytes(weight) as saved:
    ...     y = (x @ weight).sum()
    >>> saved.peak  # x, for the gradient of the weight
    128
    """

    def __init__(self, *parameters: Tensor) -> None:
        self.now = self.peak = 0
        self._left_out = {p.untyped_storage().data_ptr() for p in parameters}
        self._holders: Counter[int] = Counter()
        self._hooks = torch.autograd.graph.saved_tensors_hooks(self._pack, lambda kept: kept.tensor)

    def __enter__(self) -> SavedBytes:
        self._hooks.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._hooks.__exit__(*error)

    def _pack(self, tensor: Tensor) -> _Kept:
        kept, storage = _Kept(tensor.detach()), tensor.untyped_storage()
        place, size = storage.data_ptr(), storage.nbytes()
        if place not in self._left_out:
            if not self._holders[place]:
                self.now += size
                self.peak = max(self.peak, self.now)
            self._holders[place] += 1
            weakref.finalize(kept, self._let_go, place, size)
        return kept

    def _let_go(self, place: int, size: int) -> None:
        self._holders[place] -= 1
        if not self._holders[place]:
            self.now -= size
