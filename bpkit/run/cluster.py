"""``Cluster``: persistent workers that run plans and functions."""

import threading
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from bpkit.compress import Compressor
from bpkit.data import Dataset
from bpkit.nn import Network
from bpkit.optim import SGD, Optimizer
from bpkit.plan import Plan, Program, asynchronous_server, compile, data_parallel
from bpkit.plan.program import compile_collective
from bpkit.plan.strategies.data_parallel import whole_number
from bpkit.run import checks
from bpkit.run.engine.rank import Job, Outcome, Shards, collective, gradients, train
from bpkit.run.engine.server import rounds
from bpkit.run.processes.pool import Pool
from bpkit.run.progress import Bar, Tell
from bpkit.run.results import CollectiveResult, TrainResult, assemble
from bpkit.run.whole import overlaid, unsharded
from bpkit.trace import Trace


class Cluster(Pool):
    """Worker processes that stay alive between runs, of plans and of functions (see `Pool.call`).

    Parameters
    ----------
    workers : int
        Number of ranks.
    backend : {"auto", "shm", "gloo", "nccl"}
        Transport: shared memory of one host, gloo (TCP, on one host over loopback), or NCCL (one GPU a rank).
        ``auto`` takes NCCL where each worker has a GPU of its own, else shared memory where there is room for it.
    threads_per_worker : int
        Threads that each worker computes with.
    timeout : float
        Seconds that a worker may wait for another before the run is given up.
    start_method : str, optional
        ``forkserver`` or ``spawn``; chosen for the platform where None.
    device : {"auto", "cpu", "cuda"}
        What workers compute on.  ``auto`` takes CUDA only where there is a GPU for each worker and no transport of the
        host is asked for.  With ``cuda`` and fewer GPUs than workers several share one: their tensors go through the
        host's memory, which shows that a plan is right, but no speedup.

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

    def train(self, network: Network, data: Dataset, plan: Plan | None = None, *, batch: int, steps: int,
              lr: float | None = None, optimizer: Optimizer | None = None, seed: int = 0, shards: Shards | None = None,
              compress: Compressor | None = None, sync_batch_norm: bool = False, precision: str = "full",
              evaluate_every: int = 0, target: float | None = None, record: int = 200, progress: Tell | None = None,
              stop: threading.Event | None = None) -> TrainResult:  # fmt: skip
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
        shards : sequence of float, or of such sequences, optional
            Samples (or weights) of each data rank in a global batch; even where None.
            A rank may have none.  A sequence of sequences is used step by step, in turn.
        compress : Compressor, optional
            How gradients travel (see `bpkit.compress`); the run is then *lossy*.  For plans that reduce whole gradients
            by REDUCE_GRAD; without data parallelism nothing travels, and nothing is lost.
        sync_batch_norm : bool
            Take batch norm's statistics over the samples of all data ranks (of one microbatch), not of each rank's own.
        precision : {"full", "bf16"}
            ``bf16``: stages compute in bfloat16; weights, sums of gradients and the update stay in float32.  The run is
            then *lossy*: a rounding is by at most 2^-9 of a number, and gradients of networks of up to 17 layers were
            found within 5 % of float32's, in the Euclidean norm.
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
        optimizer = checks.make_optimizer(lr, optimizer)
        checks.run_length(plan, steps, record, evaluate_every, target)
        chosen = checks.checked_shards(batch, plan, shards)
        program = self._program(plan, network, data, optimizer, batch)
        compress = checks.checked_compressor(program.plan, compress)
        checks.precision(precision, plan, network)
        job = Job(program, network, data, optimizer, batch, steps, seed, chosen, record, evaluate_every, target,
                  compress, sync_batch_norm, precision)  # fmt: skip
        outcomes = self._train(rounds if plan.servers else train, (job,), progress, stop)
        return assemble(job, outcomes, self.backend)

    def _program(self, plan: Plan, network: Network, data: Dataset, optimizer: Optimizer, batch: int) -> Program:
        """The plan compiled, once all fits."""
        data.indices(0, batch)  # refuses an empty batch and one larger than the data set
        if len(data) < self.workers:
            raise ValueError(f"{data.name} has {len(data)} training samples for {self.workers} workers: "
                             "use fewer workers")  # fmt: skip
        checks.fits(plan, network, data.inputs, data.targets, self.workers, batch)
        if optimizer.clip is not None and plan.holds != "all":
            raise ValueError(f"{plan.name} has no one gradient whose norm could be clipped: do without clip")
        program = compile(plan, network, clip=optimizer.clip is not None)
        checks.room(program, network, self.backend)
        return program

    def _train(self, work: Callable[..., Outcome], args: tuple[Any, ...], progress: Tell | None,
               stop: threading.Event | None) -> list[Outcome]:  # fmt: skip
        job: Job = args[0]
        with Bar(progress) as bar:

            def watch(marks: NDArray[np.int64]) -> None:
                # An asynchronous plan is one step for its trainers; the server counts their iterations.
                done = max(0, int(marks[:, 0].max() if job.program.plan.servers else marks[:, 0].min()))
                bar(min(1.0, done / job.steps), f"step {done} of {job.steps}")

            return self.call(work, *args, watch=watch, describe=_describer(job.program), stop=stop)

    def train_asynchronous(self, network: Network, data: Dataset, *, batch: int, steps: int, staleness: int = 1,
                           lr: float | None = None, optimizer: Optimizer | None = None, seed: int = 0,
                           shards: Shards | None = None, progress: Tell | None = None,
                           stop: threading.Event | None = None) -> TrainResult:  # fmt: skip
        """Train with an asynchronous parameter server: rank 0 applies each gradient as it comes.

        The result's plan holds the order of arrival; ``train(network, data, result.plan, batch=..., steps=...)``
        with the same optimizer and seed gives the same bits.

        Parameters
        ----------
        batch : int
            Samples that all workers together take in one of their iterations; worker w's shard of iteration m is
            its shard of step m of synchronous training.
        steps : int
            Iterations of each worker; the server makes so many updates for each of them.
        staleness : int
            Iterations that a worker may be ahead of the slowest (see `bpkit.plan.asynchronous_server`).
        network, data, lr, optimizer, seed, shards, progress, stop
            As in `train`.

        Raises
        ------
        ValueError
            If something does not fit, or there is no rank besides the server.
        """
        if self.workers < 2 or self.backend == "nccl":
            raise ValueError("an asynchronous server needs rank 0 to serve and one more rank to train, on shm or gloo: "
                             f"this cluster has {self.workers} over {self.backend}")  # fmt: skip
        whole_number("train_asynchronous", steps=steps)
        trainers = self.workers - 1
        nominal = asynchronous_server(trainers, [*range(1, self.workers)] * steps, staleness)
        optimizer = checks.make_optimizer(lr, optimizer)
        chosen = checks.checked_shards(batch, nominal, shards)
        program = self._program(nominal, network, data, optimizer, batch)
        job = Job(program, network, data, optimizer, batch, steps, seed, chosen)
        outcomes = self._train(rounds, (job, staleness), progress, stop)
        recorded = compile(asynchronous_server(trainers, outcomes[0].arrivals, staleness), network)
        return assemble(replace(job, program=recorded), outcomes, self.backend)

    def gradients(self, network: Network, inputs: Tensor, targets: Tensor, plan: Plan | None = None, *,
                  shards: Shards | None = None, step: int = 0, compress: Compressor | None = None,
                  sync_batch_norm: bool = False, precision: str = "full") -> Tensor:  # fmt: skip
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
        compress, sync_batch_norm, precision
            As in `train`, at its first step.

        Returns
        -------
        Tensor, shape (parameters,)
            Without padding, in the order of ``network.parameters()``.

        Raises
        ------
        ValueError
            If something does not fit; nothing has been started then.
        RuntimeError
            If data replicas end with different gradients, or copies of one tensor in several stages or on several
            tensor ranks differ by more than rounding.
        """
        plan = data_parallel(self.workers) if plan is None else plan
        if len(inputs) == 0:
            raise ValueError("an empty batch has no gradient: give at least one sample")
        if len(inputs) != len(targets):
            raise ValueError(f"{len(inputs)} inputs but {len(targets)} targets")
        if plan.holds != "all":
            raise ValueError(f"{plan.name} has no one gradient: its ranks apply different ones; compare "
                             "weights after train")  # fmt: skip
        checks.fits(plan, network, inputs, targets, self.workers, len(inputs))
        checks.precision(precision, plan, network)
        program = compile(plan, network)
        checks.room(program, network, self.backend)
        job = Job(program, network, Dataset("the batch", inputs, targets, inputs[:0], targets[:0]), SGD(), len(inputs),
                  shards=checks.checked_shards(len(inputs), plan, shards),
                  compress=checks.checked_compressor(program.plan, compress), sync_batch_norm=sync_batch_norm,
                  precision=precision)  # fmt: skip
        found: list[dict[int, Tensor]] = self.call(gradients, job, step, describe=_describer(program))
        ranks = plan.mesh.tensor
        flats = [[overlaid(plan, stage, [pieces[stage] for pieces in found[index::ranks] if stage in pieces])
                  for index in range(ranks)] for stage in range(plan.stages)]  # fmt: skip
        rounding = torch.finfo(network.dtype).eps ** 0.5  # copies may be summed in several orders
        return torch.cat([tensor.flatten() for tensor in unsharded(network, program, flats, rounding)])

    def collective(self, plan: Plan, tensors: Sequence[Tensor], repeat: int = 1) -> CollectiveResult:
        """Run a collective by itself (see `bpkit.plan.collective`).

        Parameters
        ----------
        plan : Plan
            With another purpose than training.
        tensors : sequence of Tensor
            One a rank, 1-D, of one size and dtype.
        repeat : int
            Runs; each begins with the given tensors.

        Raises
        ------
        ValueError
            If the tensors do not fit each other or the plan; a rank is named.
        """
        if plan.purpose == "train" or plan.workers != self.workers:
            raise ValueError(f"{plan.name} is not a collective by itself for {self.workers} workers")
        if len(tensors) != self.workers:
            raise ValueError(f"a collective of {self.workers} ranks needs as many tensors, not {len(tensors)}")
        for rank, tensor in enumerate(tensors):
            if tensor.ndim != 1 or tensor.shape != tensors[0].shape or tensor.dtype != tensors[0].dtype:
                raise ValueError(
                    f"rank {rank} has {tuple(tensor.shape)} of {tensor.dtype}, rank 0 has "
                    f"{tuple(tensors[0].shape)} of {tensors[0].dtype}: all must be 1-D and alike"
                )
        size = len(tensors[0])
        if plan.purpose == "all_to_all" and size % self.workers:
            raise ValueError(f"{plan.name} exchanges equal parts: {self.workers} ranks do not divide {size} elements")
        program = compile_collective(plan, size, tensors[0].dtype)
        found = self.call(collective, program, tensors, repeat, describe=_describer(program))
        rows = [[str(step.action) for step in program.row(at)] for at in plan.mesh.coordinates()]
        trace = Trace.collect([log for _, log, _ in found], rows)
        return CollectiveResult(tuple(out for out, _, _ in found), tuple(sent for _, _, sent in found), trace, program)


def _describer(program: Program) -> Callable[[int, int, int], str]:
    """Names what a rank was doing, for error messages."""

    def describe(rank: int, step: int, index: int) -> str:
        row = program.row(program.plan.mesh.coordinate(rank))
        return str(row[index].action) if 0 <= index < len(row) else "between steps"

    return describe
