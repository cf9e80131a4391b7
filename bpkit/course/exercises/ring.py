"""Judging a hand-written ring all-reduce: its result, its bytes, and who sends to whom."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bpkit.course.exercises.verdict import Bench, Wrong, need_function
from bpkit.description.flat import part_bounds
from bpkit.run.transports.comm import Comm

# (workers, elements): three and ten first, since the chapter draws them; then parts that are equal, empty, and one.
CASES = ((3, 10), (2, 7), (4, 12), (4, 13), (4, 3), (1, 5))
# Rank r gives BASE**r * (j + 1) at element j, so a wrong sum still shows who is in it, and how often.
BASE = 16


class Watched:
    """A transport narrowed to `send` and `recv` between the first `size` ranks, which notes every send."""

    def __init__(self, comm: Comm, size: int) -> None:
        self._comm, self.rank, self.size = comm, comm.rank, size
        self.sends: list[tuple[int, int]] = []  # (to, elements)

    @property
    def sent(self) -> int:
        """Bytes given to `send`."""
        return self._comm.sent

    def send(self, tensor: Tensor, to: int) -> None:
        """Send to rank `to`; does not wait for it."""
        self._count()
        if isinstance(tensor, Tensor):
            self.sends.append((to, tensor.numel()))
        self._comm.send(tensor, to)

    def recv(self, tensor: Tensor | None, source: int) -> Tensor:
        """Receive from rank `source`, into `tensor` or into a new one."""
        self._count()
        return self._comm.recv(tensor, source)

    def _count(self) -> None:
        self._comm.mark[0] = max(int(self._comm.mark[0]), 0) + 1

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(f"in this exercise comm has rank, size, send, recv and sent alone, not {name}")


@dataclass(frozen=True)
class Ran:
    """What one rank ended with."""

    tensor: Tensor
    returned: Tensor | None
    sends: list[tuple[int, int]]

    @property
    def elements(self) -> int:
        """Elements sent."""
        return sum(elements for _, elements in self.sends)


def given(rank: int, size: int) -> Tensor:
    """What a rank puts in."""
    return float(BASE) ** rank * torch.arange(1, size + 1, dtype=torch.float32)


def run_ring(comm: Comm, answer: Callable[..., Any], ranks: int, size: int) -> Ran | None:
    """Run the answer on the first `ranks` ranks."""
    if comm.rank >= ranks:
        return None
    watched, tensor = Watched(comm, ranks), given(comm.rank, size)
    returned = answer(watched, tensor)
    return Ran(tensor, returned if isinstance(returned, Tensor) else None, watched.sends)


def ring(comm: Any, tensor: Tensor) -> None:
    """The reference: after step n - 1 rank r holds finished part r; the finished parts then go round."""
    n, rank = comm.size, comm.rank
    parts = [tensor[slice(*part_bounds(len(tensor), n, i))] for i in range(n)]
    right, left = (rank + 1) % n, (rank - 1) % n
    for step in range(n - 1):
        comm.send(parts[(rank - 1 - step) % n], right)
        parts[(rank - 2 - step) % n].add_(comm.recv(None, left))
    for step in range(n - 1):
        comm.send(parts[(rank - step) % n], right)
        comm.recv(parts[(rank - 1 - step) % n], left)


def judge(answer: Any, to_the_left: bool = False) -> str:
    """Refuse an answer that is not a ring all-reduce of at most 2(n - 1)/n S elements a rank."""
    need_function(answer, "ring_all_reduce(comm, tensor)")
    sent: list[int] = []
    with Bench(max(n for n, _ in CASES)) as bench:
        for ranks, size in CASES:
            case = f"{ranks} {'workers' if ranks > 1 else 'worker'}, {size} elements"
            try:
                found = bench.run(run_ring, answer, ranks, size, case=case)
            except Wrong as wrong:
                raise Wrong(_hint(str(wrong))) from None
            results = [one for one in found if one is not None]
            _judge_values(results, size, case)
            _judge_sends(results, size, case, to_the_left)
            sent = sent or [one.elements for one in results]
    n, size = CASES[0]
    return (f"every rank holds the sum, for 1, 2, 3 and 4 workers, also where a chunk is empty; of {size} elements, "
            f"{n} ranks send {', '.join(map(str, sent))}, no more than a ring needs")  # fmt: skip


def counted(ranks: int, size: int) -> list[int]:
    """Elements that each rank sends in the reference ring, counted on workers."""
    with Bench(ranks) as bench:
        return [one.elements for one in bench.run(run_ring, ring, ranks, size, case="counting")]


def _hint(sentence: str) -> str:
    if "must match the size" in sentence or "the buffer is" in sentence:
        return f"{sentence}; sender and receiver must mean the same chunk in the same step"
    return sentence


# -- the result --------------------------------------------------------------------------------------------


def _judge_values(results: list[Ran], size: int, case: str) -> None:
    """Name the first rank and chunk that do not hold the sum."""
    n = len(results)
    wanted = torch.stack([given(rank, size) for rank in range(n)]).sum(0)
    if all(torch.equal(one.tensor, wanted) for one in results):
        return
    for rank, one in enumerate(results):
        if one.tensor.shape != wanted.shape:
            raise Wrong(f"{case}: rank {rank} ends with a tensor of another shape, {tuple(one.tensor.shape)}")
    if all(one.returned is not None and torch.equal(one.returned, wanted) for one in results):
        raise Wrong(f"{case}: the sum is returned, but tensor itself is not changed: write the sum into it")
    if all(torch.allclose(one.tensor * n, wanted) for one in results):
        raise Wrong(f"{case}: every rank holds 1/{n} of the sum: the ring adds; dividing is left to the update")
    if _only_scattered(results, wanted):
        raise Wrong(f"{case}: each rank ends with one finished chunk, so the reduce-scatter is right; the all-gather, "
                    "in which finished chunks go round, is missing")  # fmt: skip
    for rank, one in enumerate(results):
        for chunk in range(n):
            low, high = part_bounds(size, n, chunk)
            if not torch.equal(one.tensor[low:high], wanted[low:high]):
                what = _contents(one.tensor[low:high], low, n)
                raise Wrong(f"{case}: rank {rank}, chunk {chunk} of {n} (elements {low} to {high - 1}) "
                            f"is wrong: {what}")  # fmt: skip


def _only_scattered(results: list[Ran], wanted: Tensor) -> bool:
    """Whether every rank finished a chunk of its own, and sent no more than that takes."""
    n, finished = len(results), []
    bounds = [part_bounds(len(wanted), n, i)[0] for i in range(1, n)]
    for one in results:
        chunks = zip(one.tensor.tensor_split(bounds), wanted.tensor_split(bounds), strict=True)
        own = [i for i, (part, true) in enumerate(chunks) if torch.equal(part, true)]
        if len(own) != 1 or len(one.sends) > n - 1:
            return False
        finished += own
    return n > 1 and sorted(finished) == list(range(n))


def _contents(values: Tensor, low: int, n: int) -> str:
    """Whose contributions a chunk holds, in words."""
    share = values.double() / torch.arange(low + 1, low + 1 + len(values), dtype=torch.float64)
    total = float(share[0])
    if not bool((share == total).all()) or total != int(total) or not 0 <= total < BASE**n:
        return "it holds elements of another chunk"
    counts = [int(total) // BASE**rank % BASE for rank in range(n)]
    lacks = [str(rank) for rank, count in enumerate(counts) if count == 0]
    often = [f"{rank} ({count} times)" for rank, count in enumerate(counts) if count > 1]
    words = [f"it lacks what rank{'s' * (len(lacks) > 1)} {' and '.join(lacks)} gave"] * bool(lacks)
    words += [f"it holds too often what rank{'s' * (len(often) > 1)} {' and '.join(often)} gave"] * bool(often)
    return " and ".join(words)


# -- the sends ---------------------------------------------------------------------------------------------


def _judge_sends(results: list[Ran], size: int, case: str, to_the_left: bool) -> None:
    """Refuse more elements than a ring sends, and sends to another rank than one neighbour."""
    n, item = len(results), given(0, 1).element_size()
    most = 2 * (size - size // n)
    for rank, one in enumerate(results):
        if one.elements > most:
            raise Wrong(
                f"{case}: the sum is right, but with too many bytes: rank {rank} sends {one.elements * item}, a ring "
                f"of chunks at most {most * item}: send one chunk at a time, not the whole vector"
            )
        peers = {to for to, _ in one.sends}
        if len(peers) > 1 or not peers <= {(rank - 1) % n, (rank + 1) % n}:
            raise Wrong(f"{case}: rank {rank} sends to ranks {sorted(peers)}: in a ring it sends to one neighbour")
        if to_the_left and not peers <= {(rank - 1) % n}:
            raise Wrong(f"{case}: rank {rank} sends to rank {peers.pop()}: this ring goes to the left, from r "
                        "to r - 1 (mod n)")  # fmt: skip
