"""Data sets: digits (embedded), MNIST (downloaded on request), one seeded order of samples, shards."""

from bpkit.data.dataset import Dataset, shard_sizes
from bpkit.data.sets import digits, mnist

__all__ = ["Dataset", "digits", "mnist", "shard_sizes"]
