"""Strategies: short pure functions that return plans."""

from collections.abc import Iterable, Sequence
from dataclasses import replace
from operator import index

from bpkit.given import whole_numbers
from bpkit.plan.action import Action
from bpkit.plan.mesh import Mesh
from bpkit.plan.passes import complete
from bpkit.plan.plan import Plan


def serial(buckets: int = 1, microbatches: int = 1) -> Plan:
    """One worker: forward, loss, backward, update.

    ::

        0ZERO 0F0 0LOSS0 0B0 0UPDATE

    Parameters
    ----------
    buckets : int
        Stages into which the network is cut; one pair of flat buffers each.
    microbatches : int
        Microbatches whose gradients are accumulated.
    """
    plan = data_parallel(1, buckets, microbatches=microbatches)
    return replace(plan, name=call_text("serial", buckets=buckets, microbatches=microbatches))


def data_parallel(workers: int, buckets: int | Sequence[int] = 1, merge: str = "mean", microbatches: int = 1) -> Plan:
    """Every worker holds the whole network and a shard of each batch; the gradients become one.

    With two workers and ``buckets=2`` the one row that all workers share is ::

        0ZERO 1ZERO 0F0 1F0 1LOSS0 1B0 1REDUCE_GRAD 0B0 0REDUCE_GRAD 1UPDATE 0UPDATE

    Parameters
    ----------
    workers : int
        Number of data-parallel ranks.
    buckets : int or sequence of int
        Stages into which the network is cut, balanced by cost, or the layers at which a new one starts (see
        `bucket_cuts` for buckets of a size in bytes).  A bucket is one stage's gradient: its reduction starts while
        the backward of earlier layers still runs.
    merge : {"mean", "mean-of-means", "sum"}
        ``mean`` is exact: gradient sums, added, divided once by the number of loss terms of the global batch.
        ``mean-of-means`` is the mean over each shard, averaged over workers; ``sum`` the same undivided.  Both
        are of class *defined*: they equal the gradient of the mean loss only for equal shards, and (``sum``)
        only up to the factor `workers`.
    microbatches : int
        Microbatches a worker; gradients are accumulated and reduced once.

    Raises
    ------
    ValueError
        If a number is below 1 or the merge is unknown.
    """
    cuts = tuple(map(index, buckets)) if isinstance(buckets, Iterable) else None
    workers, count, microbatches = whole_numbers(
        "data_parallel", workers=workers, buckets=buckets if cuts is None else len(cuts) + 1, microbatches=microbatches)
    row: list[Action] = []
    for mb in range(microbatches):
        row += [Action(stage, "F", mb) for stage in range(count)]
        row += [Action(stage, "B", mb) for stage in reversed(range(count))]
    name = call_text("data_parallel", workers, buckets=buckets, microbatches=microbatches, merge=merge)
    return complete(Plan(name, (tuple(row),), count, Mesh(data=workers), microbatches, merge, cuts=cuts))


def call_text(function: str, *args: int, **options: object) -> str:
    """The call that makes a plan, without the options that are at their defaults."""
    defaults = {"merge": "mean", "prefetch": True, "reshard": True, "recompute": False}
    options = {key: value.tolist() if hasattr(value, "tolist") else value for key, value in options.items()}  # NumPy's
    words = [str(arg) for arg in args]
    words += [f"{key}={value!r}" for key, value in options.items() if value != defaults.get(key, 1)]
    return f"{function}({', '.join(words)})"
