"""Losses: sums over their terms, with the gradient of the sum written out.

A loss never divides: the mean is taken once, in the optimizer's update, by the number of terms of the whole
global batch (`terms`), whatever the number of workers and microbatches.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from bpkit.description.flat import Shape


class Loss:
    """Base of all losses; subclasses are frozen and hold options only. `name` stands in a network's description."""

    name: ClassVar[str] = ""

    def value_and_gradient(self, y: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Return the sum of the loss terms (0-d) and its gradient with respect to `y`."""
        raise NotImplementedError

    def value(self, y: Tensor, targets: Tensor) -> Tensor:
        """Return the sum of the loss terms (0-d)."""
        return self.reference(y, targets)

    def terms(self, targets: Tensor) -> int:
        """Return the number of loss terms, by which a mean divides."""
        raise NotImplementedError

    def check(self, targets: Tensor, output_shape: Shape) -> None:
        """Refuse targets that do not fit outputs of `output_shape` a sample."""
        raise NotImplementedError

    def reference(self, y: Tensor, targets: Tensor) -> Tensor:
        """Compute the sum with torch's own functions; `gradcheck` differentiates it with autograd."""
        raise NotImplementedError

    def _refuse(self, y: Tensor, targets: Tensor) -> None:
        """Say why targets do not fit outputs."""
        self.check(targets, tuple(y.shape[1:]))
        raise ValueError(f"outputs of shape {tuple(y.shape)} do not fit targets of shape {tuple(targets.shape)}")


@dataclass(frozen=True)
class CrossEntropy(Loss):
    """Softmax cross-entropy: the sum over samples of logsumexp(y) - y[target].

    The gradient is softmax(y) - onehot(target) (Goodfellow et al. 2016, "Deep Learning", 6.2.2.3).

    Parameters
    ----------
    ignore_index : int
        Targets of this value are masked: no term, no gradient. Must be negative.

    Notes
    -----
    Outputs are (rows, classes) with targets (rows,), or (rows, tokens, classes) with (rows, tokens).
    """

    ignore_index: int = -100
    name = "cross_entropy"

    def __post_init__(self) -> None:
        if self.ignore_index >= 0:
            raise ValueError(f"ignore_index must be negative, to be no class, and not {self.ignore_index}")

    def _fit(self, y: Tensor, targets: Tensor) -> None:
        if y.shape[:-1] != targets.shape or targets.dtype is not torch.int64:
            self._refuse(y, targets)

    def value_and_gradient(self, y: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        self._fit(y, targets)
        flat = targets.reshape(-1)
        log_p = torch.log_softmax(y.reshape(flat.numel(), y.shape[-1]), 1)
        value = F.nll_loss(log_p, flat, ignore_index=self.ignore_index, reduction="sum")
        gradient = log_p.exp_()
        index = flat.clamp(min=0).unsqueeze(1)  # a masked target points at class 0; its row is cleared below
        gradient.scatter_add_(1, index, gradient.new_full(index.shape, -1.0))
        if self._may_be_masked(flat):
            gradient.mul_((flat != self.ignore_index).unsqueeze(1))
        return value, gradient.view(y.shape)

    def _may_be_masked(self, targets: Tensor) -> bool:
        """Look for masked targets; on a GPU, where looking would wait for it, assume that there are some."""
        return not targets.is_cpu or (targets.numel() > 0 and int(targets.min()) < 0)

    def terms(self, targets: Tensor) -> int:
        self._refuse_dtype(targets)
        return int(torch.count_nonzero(targets != self.ignore_index))

    def check(self, targets: Tensor, output_shape: Shape) -> None:
        """Refuse targets of the wrong dtype or shape, or out of range.

        Raises
        ------
        TypeError
            If the targets are not int64.
        ValueError
            If the shape does not fit, or a label is neither a class nor `ignore_index`.
        """
        self._refuse_dtype(targets)
        if tuple(targets.shape[1:]) != tuple(output_shape[:-1]):
            raise ValueError(f"outputs of {output_shape} a sample take targets of {output_shape[:-1]} a sample, "
                             f"not {tuple(targets.shape[1:])}")  # fmt: skip
        classes = output_shape[-1]
        bad = ((targets < 0) | (targets >= classes)) & (targets != self.ignore_index)
        if bad.any():
            where = bad.nonzero()[0].tolist()
            position = where[0] if len(where) == 1 else tuple(where)
            raise ValueError(f"label {int(targets[tuple(where)])} at position {position} is out of range: "
                             f"the network has {classes} classes, so labels run from 0 to {classes - 1}")  # fmt: skip

    def _refuse_dtype(self, targets: Tensor) -> None:
        if targets.dtype is not torch.int64:
            raise TypeError(f"cross-entropy takes class numbers as torch.int64, not {targets.dtype}")

    def reference(self, y: Tensor, targets: Tensor) -> Tensor:
        self._fit(y, targets)
        flat = targets.reshape(-1)
        logits = y.reshape(flat.numel(), y.shape[-1])
        return F.cross_entropy(logits, flat, ignore_index=self.ignore_index, reduction="sum")


@dataclass(frozen=True)
class VocabularyCrossEntropy(CrossEntropy):
    """Cross-entropy of scores whose classes are split over tensor ranks: this one has classes low to high of `classes`.

    The maximum, then the sum of exponentials together with the target's score, are taken over the ranks (Shoeybi et al.
    2019, arXiv:1909.08053, section 3). Every rank returns the value of the whole, and the gradient of its own classes.

    Parameters
    ----------
    reduce : callable, optional
        ``reduce(tensor, "max" or "sum")`` over the tensor ranks, each of which calls it; bound where the loss runs.
    """

    low: int = 0
    high: int = 0
    classes: int = 0
    reduce: Callable[[Tensor, str], Tensor] | None = None

    def value_and_gradient(self, y: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        if self.reduce is None:
            raise RuntimeError("VocabularyCrossEntropy needs `reduce`, which sums over the tensor ranks")
        self._fit(y, targets)
        flat, rows = y.reshape(targets.numel(), y.shape[-1]), targets.reshape(-1, 1)
        valid, own = rows != self.ignore_index, (rows >= self.low) & (rows < self.high)
        top = self.reduce(flat.amax(1, keepdim=True), "max")
        gradient = (flat - top).exp_()
        index = (rows - self.low).masked_fill(~own, 0)
        mine = (flat.gather(1, index) - top) * own
        total, score = self.reduce(torch.cat([gradient.sum(1, keepdim=True), mine], 1), "sum").split(1, 1)
        gradient.div_(total).scatter_add_(1, index, -own.to(y.dtype)).mul_(valid)
        return ((total.log() - score) * valid).sum(), gradient.view(y.shape)

    def value(self, y: Tensor, targets: Tensor) -> Tensor:
        return self.value_and_gradient(y, targets)[0]

    def check(self, targets: Tensor, output_shape: Shape) -> None:
        """Refuse what `CrossEntropy` refuses, of all classes."""
        super().check(targets, (*output_shape[:-1], self.classes))


@dataclass(frozen=True)
class MSE(Loss):
    """Squared error: the sum over elements of (y - target)^2, with gradient 2 (y - target).

    Targets of any floating dtype are taken, and rounded to that of the outputs.
    """

    def _fitted(self, y: Tensor, targets: Tensor) -> Tensor:
        if y.shape != targets.shape or not targets.is_floating_point():
            self._refuse(y, targets)
        return targets.detach().to(y.dtype)

    name = "mse"

    def value_and_gradient(self, y: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        difference = y - self._fitted(y, targets)
        value = difference.square().sum()
        return value, difference.mul_(2)

    def terms(self, targets: Tensor) -> int:
        return targets.numel()

    def check(self, targets: Tensor, output_shape: Shape) -> None:
        """Refuse targets that are not floating or not shaped as the outputs (TypeError, ValueError)."""
        if not targets.dtype.is_floating_point:
            raise TypeError(f"squared error takes floating targets, not {targets.dtype}")
        if tuple(targets.shape[1:]) != tuple(output_shape):
            raise ValueError(f"outputs of {output_shape} a sample take targets of the same shape, not "
                             f"{tuple(targets.shape[1:])}")  # fmt: skip

    def reference(self, y: Tensor, targets: Tensor) -> Tensor:
        return F.mse_loss(y, self._fitted(y, targets), reduction="sum")


def make_loss(loss: str | Loss) -> Loss:
    """Return the loss of a name ("cross_entropy" or "mse"), or `loss` itself.

    Raises
    ------
    ValueError
        For an unknown name.
    """
    if isinstance(loss, Loss):
        return loss
    known: dict[str, type[Loss]] = {"cross_entropy": CrossEntropy, "mse": MSE}
    if loss not in known:
        raise ValueError(f'unknown loss {loss!r}: choose "cross_entropy", "mse", or give a bp.nn.Loss')
    return known[loss]()
