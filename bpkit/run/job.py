"""What travels to a worker, and what comes back."""

from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from bpkit.compress import Compressor
from bpkit.data import Dataset, shard_sizes
from bpkit.nn import Network
from bpkit.optim import Optimizer
from bpkit.plan.memory import Memory
from bpkit.plan.mesh import Coordinate
from bpkit.plan.plan import Plan
from bpkit.plan.program import Program
from bpkit.trace import Log

Shards = Sequence[float] | Sequence[Sequence[float]]


@dataclass(frozen=True, eq=False)
class Job:
    """A training run, as it is given and as it travels to the workers; it prints as text.

    A job is checked once, before anything starts (see `bpkit.run.checks.checked`): `program` is there from then on.

    Parameters
    ----------
    plan : Plan
    network : Network
    data : Dataset
    optimizer : Optimizer
    batch : int
        Samples of the global batch, over all ranks.
    steps, seed, shards, record, evaluate_every, target, compress, sync_batch_norm, precision, skip_nonfinite
        As in `bpkit.Cluster.train`.
    compiled : Program, optional
        The plan as it was compiled for the network.
    """

    plan: Plan
    network: Network
    data: Dataset
    optimizer: Optimizer
    batch: int
    steps: int = 1
    seed: int = 0
    shards: Shards | None = None
    record: int = 1
    evaluate_every: int = 0
    target: float | None = None
    compress: Compressor | None = None
    sync_batch_norm: bool = False
    precision: str = "full"
    skip_nonfinite: bool = False
    compiled: Program | None = None

    @property
    def program(self) -> Program:
        """The compiled plan.

        Raises
        ------
        RuntimeError
            If the job was not checked.
        """
        if self.compiled is None:
            raise RuntimeError("this job was not checked: give it to Cluster.check or to Cluster.run")
        return self.compiled

    def shard_sizes(self, step: int = 0) -> list[int]:
        """Samples of each data rank in a step's global batch; ranks that only serve have none unless `shards` say."""
        n, shards = self.plan.mesh.data, self.shards
        if shards is not None:
            own = shards[step % len(shards)] if shards and isinstance(shards[0], Sequence) else shards
            return shard_sizes(self.batch, n, own)  # type: ignore[arg-type]
        even = iter(shard_sizes(self.batch, n - len(self.plan.servers)))
        return [0 if data in self.plan.servers else next(even) for data in range(n)]

    def microbatches(self, step: int = 0) -> list[list[int]]:
        """Samples of each of a step's microbatches on each data rank; with servers a shard is one of its own."""
        m, sizes = 1 if self.plan.servers else self.plan.microbatches, self.shard_sizes(step)
        return [[size // m + (mb < size % m) for size in sizes] for mb in range(m)]  # as Tensor.tensor_split

    def microbatch_shares(self, data: int, step: int = 0) -> list[float]:
        """A data rank's share of the samples of each of a step's microbatches; 1 where no rank has any."""
        return [own[data] / sum(own) if any(own) else 1.0 for own in self.microbatches(step)]

    @property
    def different_steps(self) -> range:
        """Steps after which shards repeat."""
        return range(len(self.shards) if self.shards and isinstance(self.shards[0], Sequence) else 1)

    @property
    def rows(self) -> int:
        """Samples of the largest microbatch of any rank in any step."""
        return max(max(part) for step in self.different_steps for part in self.microbatches(step))

    @property
    def memory(self) -> Memory:
        """What the ranks hold, by calculation."""
        return Memory(self.program, self.network.description, self.rows)

    def needs(self, at: Coordinate) -> dict[str, int]:
        """The memory that the rank at a coordinate takes, by calculation: bytes of what is kept (see `Memory`)."""
        return self.memory.kept(at, len(self.optimizer.state(torch.empty(1))), self.precision == "bf16")

    def __str__(self) -> str:
        plan, given = self.plan, {f.name: getattr(self, f.name) for f in fields(self) if f.name != "compiled"}
        changed = {name: value for name, value in given.items() if value != getattr(Job, name, None)}
        lines = {**changed, "network": f"{self.network.describe()}, {self.network.dtype}",
                 "plan": f"{plan.name} (digest {plan.digest}) for {plan.workers} workers: {plan.mesh}, {plan.stages} "
                         f"stages, {plan.microbatches} microbatches, merge {plan.merge}"}  # fmt: skip
        return "\n".join(f"{name:<15} {lines[name]}" for name in given if name in lines)


@dataclass(frozen=True)
class Outcome:
    """What one rank returns.

    Parameters
    ----------
    losses : list of float
        For each step, this rank's share of the mean loss.
    starts : list of int
        When each step began and, last, when the last one ended, without the time of evaluations; nanoseconds.
    log : Log
        The last steps, as many as were to be recorded.
    parameters : dict
        Flat parameters by stage, and what is kept beside them, from data coordinate 0; elsewhere only their digests.
    digests : dict
        A digest of the bits of each stage's parameters.
    memory : dict
        Bytes of parameters, gradients and optimizer state on this rank.
    encoded : int
        Payload bytes of a step, where gradients are compressed.
    accuracies : sequence of (step, test accuracy)
    peak : int
        The most bytes that the GPU's allocator held at once.
    clock_error : float
        Seconds by which the GPU's times are wrong on the host's clock.
    arrivals : tuple of int
        On an asynchronous server that ran live: whose gradients came, in order.
    skipped : int
        Steps that made no update.
    """

    losses: list[float]
    starts: list[int]
    log: Log
    parameters: dict[int, tuple[Tensor, Tensor]]
    digests: dict[int, str]
    memory: dict[str, int]
    encoded: int = 0
    accuracies: Sequence[tuple[int, float]] = ()
    peak: int = 0
    clock_error: float = 0.0
    arrivals: tuple[int, ...] = ()
    skipped: int = 0
