"""``Cluster``: persistent workers that run plans and functions."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from bpkit.data import Dataset, shard_sizes
from bpkit.nn import Network
from bpkit.optim import SGD, Optimizer
from bpkit.plan import Plan, Program, compile, data_parallel
from bpkit.run import memory
from bpkit.run.pool import Pool
from bpkit.run.progress import Progress
from bpkit.run.training import Job, Outcome, gradients, join, train
from bpkit.trace import Trace


@dataclass(frozen=True)
class TrainResult:
    """What a training run gives.

    Parameters
    ----------
    network : Network
        A trained copy; the network that was given is as it was.
    losses : ndarray, shape (steps,)
        Loss of each step before its update, by the plan's merge (``mean``: the mean loss of the global batch).
    step_times : ndarray, shape (steps,)
        Seconds from the start of a step to the start of the next, mean over ranks; evaluations are left out.
    trace : Trace
        The last recorded steps.
    accuracies : tuple of (step, accuracy)
        Test accuracy after so many steps, where it was asked for.
    program : Program
        The compiled plan that ran.
    batch : int
        Samples of a global batch.
    backend : str
        The transport that carried it.
    """

    network: Network
    losses: NDArray[np.float64]
    step_times: NDArray[np.float64]
    trace: Trace
    accuracies: tuple[tuple[int, float], ...]
    program: Program
    batch: int
    backend: str

    @property
    def plan(self) -> Plan:
        """The plan that ran."""
        return self.program.plan

    @property
    def workers(self) -> int:
        """Number of ranks."""
        return self.plan.workers

    def __repr__(self) -> str:
        return (
            f"<TrainResult: {self.plan.name} over {self.backend}, {len(self.losses)} steps, "
            f"loss {self.losses[0]:.4f} to {self.losses[-1]:.4f}>"
        )


class Cluster:
    """Worker processes that stay alive between runs.

    Parameters
    ----------
    workers : int
        Number of ranks.
    backend : {"auto", "shm", "gloo", "nccl"}
        Transport: shared memory of one host, gloo (TCP, on one host over loopback), or NCCL (one GPU a rank).
        ``auto`` takes shared memory where there is room for it.
    threads_per_worker : int
        Threads that each worker computes with.
    timeout : float
        Seconds that a worker may wait for another before the run is given up.
    start_method : str, optional
        ``forkserver`` or ``spawn``; chosen for the platform where None.

    Raises
    ------
    ValueError, RuntimeError
        If the numbers, the backend or the machine do not fit; nothing has been started then.

    Examples
    --------
    >>> with bp.Cluster(workers=2) as cluster:
    ...     cluster.call(lambda comm: comm.rank)
    [0, 1]
    """

    def __init__(
        self,
        workers: int,
        backend: str = "auto",
        threads_per_worker: int = 1,
        timeout: float = 60.0,
        start_method: str | None = None,
    ) -> None:
        self._pool = Pool(workers, backend, threads_per_worker, timeout, start_method=start_method)

    @property
    def workers(self) -> int:
        """Number of ranks."""
        return self._pool.workers

    @property
    def backend(self) -> str:
        """The transport in use."""
        return self._pool.backend

    @property
    def threads_per_worker(self) -> int:
        """Threads that each worker computes with."""
        return self._pool.threads_per_worker

    @property
    def pids(self) -> tuple[int, ...]:
        """Process ids of the workers, empty before the first run."""
        return tuple(self._pool.pids)

    def __enter__(self) -> Cluster:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """End the workers; a later run starts new ones."""
        self._pool.close()

    def __repr__(self) -> str:
        return f"<Cluster: {self.workers} workers over {self.backend}>"

    def call(self, fn: Callable[..., Any], *args: Any, timeout: float | None = None) -> list[Any]:
        """Run ``fn(comm, *args)`` on each rank and return the results by rank.

        Parameters
        ----------
        fn : callable
            A function of a module, a cell or a closure.  ``comm`` has ``rank``, ``size``, ``send``, ``recv``,
            ``barrier`` and the collectives (see `bpkit.run.comm.Comm`).
        timeout : float, optional
            Seconds that the whole call may take.

        Raises
        ------
        WorkerError
            If a worker raises; names its rank and carries its traceback.
        """
        return self._pool.call(fn, *args, timeout=timeout)

    def train(
        self,
        network: Network,
        data: Dataset,
        plan: Plan | None = None,
        *,
        batch: int,
        steps: int,
        lr: float | None = None,
        optimizer: Optimizer | None = None,
        seed: int = 0,
        shards: Sequence[float] | None = None,
        evaluate_every: int = 0,
        target: float | None = None,
        record: int = 200,
        progress: Callable[[float, str], None] | None = None,
        stop: threading.Event | None = None,
    ) -> TrainResult:
        """Train a copy of a network by a plan.

        Parameters
        ----------
        network : Network
        data : Dataset
        plan : Plan, optional
            Default: ``data_parallel(workers)``.
        batch : int
            Samples of the global batch, over all ranks.
        steps : int
            Updates to make.
        lr : float, optional
            Learning rate of plain SGD, where no optimizer is given.
        optimizer : Optimizer, optional
        seed : int
            Of the order of samples.
        shards : sequence of float, optional
            Samples (or weights) of each data rank in a global batch; even where None.  A rank may have none.
        evaluate_every : int
            Steps between evaluations on the test samples (0: none); their time is not counted.
        target : float, optional
            Stop once this test accuracy is reached.
        record : int
            Steps to trace, counted from the end.
        progress : callable, optional
            Called with (fraction done, text); by default a bar for long runs, where somebody looks.
        stop : threading.Event, optional
            Ends the run when it is set.

        Raises
        ------
        ValueError
            If something does not fit; nothing has been started then.
        WorkerError, WorkerDied, WorkerStuck, Stopped
            If a worker raises, ends, waits too long, or the run was stopped.
        """
        plan = data_parallel(self.workers) if plan is None else plan
        optimizer = _optimizer(lr, optimizer)
        if steps < 1 or record < 1:
            raise ValueError(f"train needs at least one step and one recorded step, not {steps} and {record}")
        if target is not None and evaluate_every < 1:
            raise ValueError("a target accuracy needs evaluate_every=N: how many steps between evaluations")
        data.indices(0, batch, seed)  # refuses an empty batch and one larger than the data set
        if len(data) < self.workers:
            raise ValueError(
                f"{data.name} has {len(data)} training samples for {self.workers} workers: use fewer workers"
            )
        self._fits(plan, network, data.inputs, data.targets)
        _shards(batch, plan, shards)
        program = compile(plan, network, clip=optimizer.clip is not None)
        self._room(program, network)
        job = Job(
            program,
            network,
            data,
            optimizer,
            batch,
            steps,
            seed,
            _shards(batch, plan, shards),
            record,
            evaluate_every,
            target,
        )
        with Progress(steps, progress) as bar:
            outcomes: list[Outcome] = self._pool.call(
                train, job, watch=bar.watch, describe=_describer(program), stop=stop
            )
        return self._result(job, outcomes)

    def _result(self, job: Job, outcomes: list[Outcome]) -> TrainResult:
        plan, mesh = job.program.plan, job.program.plan.mesh
        _same_bits(plan, outcomes)
        parts = job.network.split(job.program.cuts)
        for outcome in outcomes:
            for stage, flat in outcome.parameters.items():
                parts[stage].flat_parameters.copy_(flat)
        loss_ranks = [
            rank for rank, at in enumerate(mesh.coordinates()) if at.pipeline == plan.place[-1] and at.tensor == 0
        ]
        losses = np.sum([outcomes[rank].losses for rank in loss_ranks], axis=0)
        starts = np.array([outcome.starts for outcome in outcomes], dtype=float)
        rows = [[str(step.action) for step in job.program.row(at)] for at in mesh.coordinates()]
        trace = Trace.collect([outcome.log for outcome in outcomes], rows)
        return TrainResult(
            join(job.network, parts),
            losses,
            np.diff(starts, axis=1).mean(axis=0) / 1e9,
            trace,
            tuple(outcomes[0].accuracies),
            job.program,
            job.batch,
            self.backend,
        )

    def gradients(
        self,
        network: Network,
        inputs: Tensor,
        targets: Tensor,
        plan: Plan | None = None,
        *,
        shards: Sequence[float] | None = None,
        step: int = 0,
    ) -> Tensor:
        """What UPDATE would apply, after one step on the given global batch; for proofs.

        Parameters
        ----------
        inputs, targets : Tensor
            The global batch, samples first.
        plan : Plan, optional
            Default: ``data_parallel(workers)``, for which this is the gradient of the mean loss.
        shards : sequence of float, optional
            Samples (or weights) of each data rank.
        step : int
            Step number, on which dropout masks depend.

        Returns
        -------
        Tensor, shape (parameters,)
            Without padding, in the order of ``network.parameters()``.

        Raises
        ------
        ValueError
            If something does not fit; nothing has been started then.
        RuntimeError
            If data replicas end with different gradients.
        """
        plan = data_parallel(self.workers) if plan is None else plan
        if len(inputs) == 0:
            raise ValueError("an empty batch has no gradient: give at least one sample")
        if len(inputs) != len(targets):
            raise ValueError(f"{len(inputs)} inputs but {len(targets)} targets")
        self._fits(plan, network, inputs, targets)
        program = compile(plan, network)
        self._room(program, network)
        found: list[dict[int, Tensor]] = self._pool.call(
            gradients,
            program,
            network,
            inputs,
            targets,
            SGD(),
            _shards(len(inputs), plan, shards),
            step,
            describe=_describer(program),
        )
        parts = network.split(program.cuts)
        for rank, at in enumerate(plan.mesh.coordinates()):
            first = found[plan.mesh.rank(at._replace(data=0))]
            for stage, flat in found[rank].items():
                if not torch.equal(flat, first[stage]):
                    raise RuntimeError(
                        f"{plan.name}: rank {rank} ends with another gradient of stage {stage} than data rank 0"
                    )
                parts[stage].flat_gradients.copy_(flat)
        return torch.cat([tensor.flatten() for part in parts for tensor in part.gradients()])

    # -- checks before anything starts -------------------------------------------------------------------

    def _fits(self, plan: Plan, network: Network, inputs: Tensor, targets: Tensor) -> None:
        if plan.workers != self.workers:
            raise ValueError(
                f"{plan.name} is a plan for {plan.workers} workers (mesh {plan.mesh}), "
                f"but this cluster has {self.workers}"
            )
        if tuple(inputs.shape[1:]) != tuple(network.input_shape):
            raise ValueError(
                f"samples of shape {tuple(inputs.shape[1:])} do not fit the network, "
                f"which takes {tuple(network.input_shape)}"
            )
        if inputs.dtype != network.dtype:
            raise TypeError(
                f"inputs are {inputs.dtype} but the network computes in {network.dtype}: "
                "load the data with the same dtype"
            )
        network.loss.check(targets, network.output_shape)

    def _room(self, program: Program, network: Network) -> None:
        """Refuse gradients that do not fit in shared memory, before anything starts."""
        needed = self.workers * sum(program.sizes) * network.dtype.itemsize
        if self.backend == "shm" and needed > memory.free_room():
            raise memory.no_room(f"the gradient of {self.workers} workers", needed)


def _optimizer(lr: float | None, optimizer: Optimizer | None) -> Optimizer:
    if (lr is None) == (optimizer is None):
        raise ValueError(
            "train takes either lr=..., for plain SGD, or optimizer=..., for example bp.optim.SGD(0.1, momentum=0.9)"
        )
    return SGD(lr) if optimizer is None else optimizer  # type: ignore[arg-type]


def _shards(batch: int, plan: Plan, shards: Sequence[float] | None) -> tuple[float, ...] | None:
    """Shares of the data ranks, checked."""
    shard_sizes(batch, plan.mesh.data, shards)
    return None if shards is None else tuple(shards)


def _describer(program: Program) -> Callable[[int, int, int], str]:
    """Names what a rank was doing, for error messages."""

    def describe(rank: int, step: int, index: int) -> str:
        row = program.row(program.plan.mesh.coordinate(rank))
        return str(row[index].action) if 0 <= index < len(row) else "between steps"

    return describe


def _same_bits(plan: Plan, outcomes: list[Outcome]) -> None:
    """Data and tensor replicas of a stage must hold the same weights, to the bit."""
    for rank, at in enumerate(plan.mesh.coordinates()):
        first = outcomes[plan.mesh.rank(at._replace(data=0))].digests
        for stage, digest in outcomes[rank].digests.items():
            if digest != first[stage]:
                raise RuntimeError(
                    f"{plan.name}: rank {rank} ends with other weights of stage {stage} than data rank 0"
                )
