"""Data sets: digits and text (embedded), MNIST (downloaded on request), one seeded order of samples, shards."""

from bpkit.data.dataset import Dataset, shard_sizes
from bpkit.data.sets import digits, mnist
from bpkit.data.text import Text, text

__all__ = ["Dataset", "Text", "digits", "mnist", "shard_sizes", "text"]
