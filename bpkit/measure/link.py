"""Times of messages, of additions and of all-reduces by size, on the workers of a cluster, in one interleaved run."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from bpkit.given import integers
from bpkit.measure.fit import AlphaBeta, alpha_beta
from bpkit.run.cluster import Cluster
from bpkit.run.transports.comm import Comm

#: Of messages: from what latency decides to what bandwidth does.
SIZES = tuple(4 * 4**k for k in range(1, 11))
_LEAST = 2e-4  # seconds that one sample lasts at least, as estimated from the first: a clock read is no part of it then


@dataclass(frozen=True)
class LinkTimes:
    """What `link_times` measured: seconds, for each size its repetitions; the i-th of all are of one turn.

    Parameters
    ----------
    workers : int
    sizes_bytes : tuple of int
    message_s : tuple of tuple of float
        Half a round trip between rank 0 and rank 1, by the clock of rank 0.
    all_reduce_s : tuple of tuple of float
        The transport's own sum over all ranks, by the clock of rank 0.
    add_s : tuple of tuple of float
        Adding one buffer of the size to another, on rank 0 alone.
    """

    workers: int
    sizes_bytes: tuple[int, ...]
    message_s: tuple[tuple[float, ...], ...]
    all_reduce_s: tuple[tuple[float, ...], ...]
    add_s: tuple[tuple[float, ...], ...]

    @property
    def link(self) -> AlphaBeta:
        """alpha, seconds, and beta, seconds a byte, of a message."""
        return alpha_beta(self.sizes_bytes, self.message_s)

    @property
    def gamma(self) -> AlphaBeta:
        """The same line through the additions: its `beta_s_per_byte` is gamma, seconds a byte that is added."""
        return alpha_beta(self.sizes_bytes, self.add_s)


def link_times(cluster: Cluster, sizes_bytes: Sequence[int] = SIZES, repetitions: int = 20) -> LinkTimes:
    """Measure messages, all-reduces and additions of given sizes on a cluster of two or more workers.

    In each repetition everything is measured once, in an order that is shuffled anew, after a first one that is not
    kept.  A sample is the mean of as many calls as last 0.2 ms together.

    Parameters
    ----------
    cluster : Cluster
        Its transport is what is measured: what a message costs there, copies included.  While rank 0 and 1 exchange
        messages, other ranks wait for a barrier.
    sizes_bytes : sequence of int
        Multiples of 4: the buffers are float32.  Take at least eight for a fit.
    repetitions : int

    Raises
    ------
    ValueError
        If the cluster has one worker, or a size or number does not fit.
    """
    (repetitions,) = integers("link_times", repetitions=repetitions)
    sizes = [integers("link_times", 4, sizes_bytes=size)[0] for size in sizes_bytes]
    if cluster.workers < 2:
        raise ValueError("messages need a cluster of at least two workers")
    if not sizes or any(size % 4 for size in sizes):
        raise ValueError(f"sizes_bytes must be multiples of 4, the bytes of a float32, not {sizes_bytes!r}")
    times = cluster.call(_measure, sizes, repetitions)[0]
    times["round_trip"] = [[seconds / 2 for seconds in own] for own in times["round_trip"]]
    return LinkTimes(cluster.workers, tuple(sizes), *(tuple(map(tuple, times[kind])) for kind in _KINDS))


def _measure(comm: Comm, sizes: list[int], repetitions: int) -> dict[str, list[list[float]]]:
    """On each rank: all samples, of which rank 0's count."""
    buffers = {size: (comm.empty(size // 4).zero_(), torch.zeros(size // 4, device=comm.device)) for size in sizes}
    cases = [(kind, size) for kind in _KINDS for size in sizes]
    times: dict[tuple[str, int], list[float]] = {case: [] for case in cases}
    calls = dict.fromkeys(cases, 1)
    order = random.Random(0)  # the same on all ranks
    for turn in range(repetitions + 2):
        for kind, size in order.sample(cases, len(cases)):
            seconds = _sample(comm, _KINDS[kind], *buffers[size], calls[kind, size])
            if turn == 0:  # how many calls fit: rank 0 says it for all
                wanted = torch.tensor([max(1.0, min(100.0, _LEAST / seconds))])
                calls[kind, size] = int(comm.broadcast(wanted.to(comm.device)).item())
            elif turn > 1:
                times[kind, size].append(seconds)
    return {kind: [times[kind, size] for size in sizes] for kind in _KINDS}


def _sample(comm: Comm, run: Callable[[Comm, torch.Tensor, torch.Tensor], None], buffer: torch.Tensor,
            other: torch.Tensor, calls: int) -> float:  # fmt: skip
    comm.barrier()
    begin = time.perf_counter()
    for _ in range(calls):
        run(comm, buffer, other)
    return (time.perf_counter() - begin) / calls


def _round_trip(comm: Comm, buffer: torch.Tensor, other: torch.Tensor) -> None:
    if comm.rank == 0:
        comm.send(buffer, 1)
        comm.recv(buffer, 1)
    elif comm.rank == 1:
        comm.recv(buffer, 0)
        comm.send(buffer, 0)


def _all_reduce(comm: Comm, buffer: torch.Tensor, other: torch.Tensor) -> None:
    comm.all_reduce(buffer)


def _add(comm: Comm, buffer: torch.Tensor, other: torch.Tensor) -> None:
    if comm.rank == 0:
        other.add_(buffer)


_KINDS: dict[str, Callable[[Comm, torch.Tensor, torch.Tensor], None]] = {
    "round_trip": _round_trip, "all_reduce": _all_reduce, "add": _add}  # fmt: skip
