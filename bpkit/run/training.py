"""What a worker does in ``Cluster.train`` and ``Cluster.gradients``."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from time import perf_counter_ns

import torch
from torch import Tensor

from bpkit.data import Dataset, shard_sizes
from bpkit.nn import Network
from bpkit.nn.losses import Loss
from bpkit.optim import Optimizer
from bpkit.plan.compile import Program
from bpkit.run.comm import Comm
from bpkit.run.executor import Executor
from bpkit.trace import Log


@dataclass(frozen=True)
class Job:
    """A training run, as it travels to the workers."""

    program: Program
    network: Network
    data: Dataset
    optimizer: Optimizer
    batch: int
    steps: int
    seed: int
    shards: tuple[float, ...] | None
    record: int
    evaluate_every: int
    target: float | None


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
        Flat parameters by stage, from data coordinate 0; elsewhere only their digests.
    digests : dict
        A digest of the bits of each stage's parameters.
    accuracies : list of (step, test accuracy)
    """

    losses: list[float]
    starts: list[int]
    log: Log
    parameters: dict[int, Tensor]
    digests: dict[int, str]
    accuracies: list[tuple[int, float]]


@dataclass(frozen=True)
class Shard:
    """A rank's rows of the global batch, and the factors that its merge gives them."""

    low: int
    high: int
    weight: float
    scale: float


def cut(merge: str, targets: Tensor, loss: Loss, sizes: Sequence[int], index: int) -> Shard:
    """The shard of data rank `index` of a global batch.

    Parameters
    ----------
    merge : str
        See `bpkit.plan.MERGES`.
    targets : Tensor
        Of the whole global batch.
    sizes : sequence of int
        Samples of each data rank.
    """
    low = sum(sizes[:index])
    high = low + sizes[index]
    if merge == "mean":
        return Shard(low, high, 1.0, 1.0 / max(1, loss.terms(targets)))
    own = max(1, loss.terms(targets[low:high]))
    return Shard(low, high, 1.0 / own, 1.0 / len(sizes) if merge == "mean-of-means" else 1.0)


def train(comm: Comm, job: Job) -> Outcome:
    """Run all steps of a job on one rank."""
    executor = Executor(job.program, job.network, comm, job.optimizer)
    sizes = shard_sizes(job.batch, job.program.plan.mesh.data, job.shards)
    recorded = min(job.steps, job.record)
    log = Log.empty(range(job.steps - recorded, job.steps), max(1, len(executor.row)))
    losses, starts, accuracies, paused = [], [], [], 0
    comm.barrier()
    for step in range(job.steps):
        starts.append(perf_counter_ns() - paused)
        rows = job.data.indices(step, job.batch, job.seed)
        targets = job.data.targets[rows]
        shard = cut(job.program.plan.merge, targets, job.network.loss, sizes, executor.at.data)
        mine = rows[shard.low : shard.high]
        line = max(0, step - (job.steps - recorded))
        log.steps[line] = step
        loss = executor.run(
            step,
            job.data.inputs[mine],
            targets[shard.low : shard.high],
            shard.low,
            shard.weight,
            shard.scale,
            log,
            line,
        )
        losses.append(loss * shard.scale)
        if job.evaluate_every and (step + 1) % job.evaluate_every == 0:
            began = perf_counter_ns()
            accuracies.append((step + 1, evaluate(comm, executor, job)))
            paused += perf_counter_ns() - began
            if job.target is not None and accuracies[-1][1] >= job.target:
                log = log.until(line)
                break
    starts.append(perf_counter_ns() - paused)
    digests = {s: _digest(net.flat_parameters) for s, net in executor.stages.items()}
    first = executor.at.data == executor.at.tensor == 0
    parameters = {s: net.flat_parameters.clone() for s, net in executor.stages.items()} if first else {}
    return Outcome(losses, starts, log, parameters, digests, accuracies)


def evaluate(comm: Comm, executor: Executor, job: Job) -> float:
    """Test accuracy, computed by rank 0 from the stages of all pipeline ranks; the same number on every rank."""
    plan, at = job.program.plan, executor.at
    if at.pipeline and at.data == at.tensor == 0:
        for net in executor.stages.values():
            comm.send(net.flat_parameters, 0)
    result = torch.zeros(1, dtype=torch.float64)
    if comm.rank == 0:
        parts = job.network.split(job.program.cuts)
        for stage, part in enumerate(parts):
            if plan.place[stage] == 0:
                part.flat_parameters.copy_(executor.stages[stage].flat_parameters)
            else:
                source = plan.mesh.rank(at._replace(pipeline=plan.place[stage]))
                comm.recv(part.flat_parameters, source)
        result[0] = join(job.network, parts).accuracy(job.data.test_inputs, job.data.test_targets)
    return float(comm.broadcast(result, 0)) if comm.size > 1 else float(result)


def join(network: Network, stages: Sequence[Network]) -> Network:
    """A copy of `network` with the parameters of its stages."""
    whole = network.copy()
    whole.load([tensor for stage in stages for tensor in stage.parameters()])
    return whole


def gradients(
    comm: Comm,
    program: Program,
    network: Network,
    inputs: Tensor,
    targets: Tensor,
    optimizer: Optimizer,
    shards: tuple[float, ...] | None,
    step: int,
) -> dict[int, Tensor]:
    """Run one step up to UPDATE; what each UPDATE would have applied, by stage."""
    captured: dict[int, Tensor] = {}
    executor = Executor(program, network, comm, optimizer, captured)
    sizes = shard_sizes(len(inputs), program.plan.mesh.data, shards)
    shard = cut(program.plan.merge, targets, network.loss, sizes, executor.at.data)
    part = slice(shard.low, shard.high)
    log = Log.empty([step], len(executor.row))
    executor.run(step, inputs[part], targets[part], shard.low, shard.weight, shard.scale, log, 0)
    return captured


def _digest(tensor: Tensor) -> str:
    return hashlib.sha256(tensor.numpy(force=True).tobytes()).hexdigest()[:16]
