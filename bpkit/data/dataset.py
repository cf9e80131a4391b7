"""A data set in memory, its order of samples, and its cuts into shards."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

import torch
from torch import Tensor


@lru_cache(maxsize=4)
def _order(samples: int, epoch: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed((seed * 1_000_003 + epoch) % 2**63)
    return torch.randperm(samples, generator=generator)


@dataclass(frozen=True)
class Dataset:
    """Samples for training and for testing; row i of `inputs` belongs to row i of `targets`.

    Parameters
    ----------
    name : str
    inputs, test_inputs : Tensor, shape (samples, ...)
    targets, test_targets : Tensor, shape (samples, ...)

    Raises
    ------
    ValueError
        If inputs and targets differ in number, or there is no training sample.
    """

    name: str
    inputs: Tensor
    targets: Tensor
    test_inputs: Tensor
    test_targets: Tensor

    def __post_init__(self) -> None:
        # Autograd does not follow samples.
        vars(self).update({name: held.detach() for name, held in vars(self).items() if isinstance(held, Tensor)})
        for kind, x, t in (("training", self.inputs, self.targets), ("test", self.test_inputs, self.test_targets)):
            if len(x) != len(t):
                raise ValueError(f"{self.name}: {len(x)} {kind} inputs, but {len(t)} {kind} targets")
        if len(self.inputs) == 0:
            raise ValueError(f"{self.name}: a data set needs at least one training sample")

    def __len__(self) -> int:
        return len(self.inputs)

    def __repr__(self) -> str:
        train, test, shape = len(self.inputs), len(self.test_inputs), tuple(self.inputs.shape[1:])
        return f"<Dataset {self.name}: {train:,} training and {test:,} test samples of {shape}>"

    def order(self, epoch: int, seed: int = 0) -> Tensor:
        """Return an epoch's order of samples: a permutation that depends on `seed` and `epoch` alone."""
        return _order(len(self), epoch, seed).clone()

    def indices(self, step: int, size: int, seed: int = 0) -> Tensor:
        """Return the sample numbers of global batch `step`.

        The stream of samples is the epochs' orders one after another; batch `step` takes the next `size` of
        it, so a batch may end one epoch and begin the next, and no sample is dropped.

        Raises
        ------
        ValueError
            If the batch is empty or larger than the data set.
        """
        n = len(self)
        if size < 1:
            raise ValueError(f"a batch has at least one sample, not {size}")
        if size > n:
            raise ValueError(f"a batch of {size} is larger than {self.name}, which has {n} training samples")
        epoch, start = divmod(step * size, n)
        part = _order(n, epoch, seed)[start : start + size]
        rest = size - len(part)
        return torch.cat([part, _order(n, epoch + 1, seed)[:rest]]) if rest else part.clone()

    def batch(self, step: int, size: int, seed: int = 0) -> tuple[Tensor, Tensor]:
        """Return inputs and targets of global batch `step`; see `indices`."""
        rows = self.indices(step, size, seed).to(self.inputs.device)
        return self.inputs[rows], self.targets[rows]

    def shards(self, n: int, uneven: Sequence[float] | None = None) -> tuple[Dataset, ...]:
        """Cut the training samples into `n` contiguous shards that share the test samples.

        Parameters
        ----------
        n : int
        uneven : sequence of float, optional
            Sizes or weights; see `shard_sizes`.

        Raises
        ------
        ValueError
            If there are fewer samples than shards, or a shard would be empty.
        """
        if n > len(self):
            raise ValueError(f"{self.name} has {len(self)} training samples, fewer than {n} shards")
        sizes = shard_sizes(len(self), n, uneven)
        if 0 in sizes:
            raise ValueError(f"shard {sizes.index(0)} of {self.name} would be empty: sizes {sizes}")
        parts = zip(self.inputs.split(sizes), self.targets.split(sizes), strict=True)
        return tuple(replace(self, name=f"{self.name} {i + 1}/{n}", inputs=x, targets=t)
                     for i, (x, t) in enumerate(parts))  # fmt: skip

    def to(self, device: str | torch.device | None = None, dtype: torch.dtype | None = None) -> Dataset:
        """Return the data set on a device, its floating tensors in `dtype`."""

        def move(t: Tensor) -> Tensor:
            return t.to(device=device, dtype=dtype if t.dtype.is_floating_point else None)

        x, t, test_x, test_t = map(move, (self.inputs, self.targets, self.test_inputs, self.test_targets))
        return replace(self, inputs=x, targets=t, test_inputs=test_x, test_targets=test_t)


def shard_sizes(samples: int, n: int, uneven: Sequence[float] | None = None) -> list[int]:
    """Return the sizes of `n` contiguous shards of `samples` samples; a shard may be empty.

    Parameters
    ----------
    samples : int
    n : int
    uneven : sequence of float, optional
        Without it the sizes differ by at most one, the first shards taking the remainder. Integers that add
        up to `samples` are the sizes themselves; other numbers are weights, rounded by the largest remainder
        (of equal ones, the first).

    Raises
    ------
    ValueError
        For fewer than one shard, a wrong number of weights, or weights that are negative or all zero.
    """
    if n < 1:
        raise ValueError(f"there must be at least one shard, not {n}")
    weights = [1] * n if uneven is None else list(uneven)
    if len(weights) != n:
        raise ValueError(f"{n} shards need {n} sizes or weights, not {len(weights)}")
    total = sum(weights)
    if min(weights) < 0 or not total > 0:
        raise ValueError(f"sizes and weights are not negative and not all zero: {weights}")
    exact = [samples * w / total for w in weights]  # sizes, where these are the weights, as they are
    sizes = [int(e) for e in exact]
    by_remainder = sorted(range(n), key=lambda i: (sizes[i] - exact[i], i))
    for i in by_remainder[: samples - sum(sizes)]:
        sizes[i] += 1
    return sizes
