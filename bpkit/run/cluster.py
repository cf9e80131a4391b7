"""``Cluster``: persistent workers that run plans and functions."""

import threading
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from bpkit.compress import Compressor
from bpkit.data import Dataset
from bpkit.given import integers
from bpkit.nn import Network
from bpkit.optim import SGD, Optimizer
from bpkit.plan import Plan, Program, asynchronous_server, compile, data_parallel
from bpkit.run import checks
from bpkit.run.engine.rank import collective, gradients, train
from bpkit.run.engine.server import rounds
from bpkit.run.job import Job, Outcome, Shards
from bpkit.run.processes.pool import Describe, Pool, Watch
from bpkit.run.progress import Bar, Tell
from bpkit.run.results import CollectiveResult, TrainResult, assemble
from bpkit.run.whole import overlaid, unsharded
from bpkit.trace import Trace


class Cluster:
    """Workers that stay alive between runs, of plans and of functions.

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
    pin : bool
        Give each worker `threads_per_worker` cores of its own, of those that this process may use when the workers
        start; where there are fewer, in turn.  What a worker starts stays there too.  Linux only.

    Raises
    ------
    ValueError, RuntimeError
        If the numbers, the backend or the machine do not fit; nothing has been started then.

    Attributes
    ----------
    device : str
        The device chosen, ``"cpu"`` or ``"cuda"``.
    backend, backend_reason : str
        The transport chosen, and why.

    Examples
    --------
    >>> with bp.Cluster(workers=2) as cluster:
    ...     cluster.call(lambda comm: comm.rank)
    [0, 1]
    """

    def __init__(self, workers: int, backend: str = "auto", threads_per_worker: int = 1, timeout: float = 60.0,
                 start_method: str | None = None, device: str = "auto", pin: bool = False) -> None:  # fmt: skip
        # What depends on where workers come from stands in the pool: launched here now, later joined as well.
        workers, threads_per_worker = integers("Cluster", workers=workers, threads_per_worker=threads_per_worker)
        self._pool = pool = Pool(workers, backend, threads_per_worker, timeout, start_method, device, pin)
        self.workers, self.threads_per_worker, self.timeout = workers, threads_per_worker, timeout
        self.backend, self.backend_reason, self.device = pool.backend, pool.backend_reason, pool.device

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def __repr__(self) -> str:
        where = " on GPUs" if self.device == "cuda" else ""
        return f"<Cluster: {self.workers} workers{where} over {self.backend}>"

    @property
    def pids(self) -> tuple[int, ...]:
        """Process ids by rank; empty when no worker runs."""
        return self._pool.pids

    @property
    def generation(self) -> int:
        """Number of launches so far; what workers keep (`Comm.cache`) lives as long as a generation."""
        return self._pool.generation

    @property
    def logs(self) -> list[str]:
        """What each rank printed in the last call."""
        return self._pool.logs

    def start(self) -> None:
        """Start the workers, if they do not run (the first call does so by itself)."""
        self._pool.start()

    def close(self) -> None:
        """End the workers. A closed cluster takes no more calls."""
        self._pool.close()

    def call(self, fn: Callable[..., Any], *args: Any, timeout: float | None = None, watch: Watch | None = None,
             describe: Describe | None = None, stop: threading.Event | None = None) -> list[Any]:  # fmt: skip
        """Run ``fn(comm, *args)`` on every rank and return the results by rank (see `Pool.call`).

        ``comm`` has ``rank``, ``size``, ``send``, ``recv``, ``barrier`` and the collectives.  Functions from cells,
        scripts and closures travel too.
        """
        return self._pool.call(fn, *args, timeout=timeout, watch=watch, describe=describe, stop=stop)

    def check(self, job: Job) -> Job:
        """The job with its plan compiled, once all fits this cluster; nothing is started.

        Raises
        ------
        ValueError, TypeError, PlanError
            If something does not fit.
        """
        return checks.checked(job, self.workers, self.backend)

    def run(self, job: Job, progress: Tell | None = None, stop: threading.Event | None = None) -> TrainResult:
        """Train by a job, which is checked first; `train` makes one of its arguments (see there)."""
        job, outcomes = self._watched(job, progress, stop)
        return assemble(job, outcomes, self.backend)

    def train(self, network: Network, data: Dataset, plan: Plan | None = None, *, batch: int, steps: int,
              lr: float | None = None, optimizer: Optimizer | None = None, seed: int = 0, shards: Shards | None = None,
              compress: Compressor | None = None, sync_batch_norm: bool = False, precision: str = "full",
              skip_nonfinite: bool = False, evaluate_every: int = 0, target: float | None = None, record: int = 200,
              progress: Tell | None = None, stop: threading.Event | None = None) -> TrainResult:  # fmt: skip
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
        skip_nonfinite : bool
            Where a step's gradient is not finite, let all ranks leave weights, optimizer's state, the count of updates
            and running statistics as they were before it; its loss is recorded, and the result counts such steps.  Else
            that is a FloatingPointError.  For plans with one gradient, not compressed.  The norm of each gradient is
            taken (a pass over memory), and a GPU is waited for.
        evaluate_every : int
            Steps between evaluations on the test samples (0: none); their time is not counted.  Where one fails, the
            WorkerError's cause is an `EvaluationError` with the network as trained until then.
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
        return self.run(Job(data_parallel(self.workers) if plan is None else plan, network, data,
                            checks.made_optimizer(lr, optimizer), batch, steps, seed, shards, record, evaluate_every,
                            target, compress, sync_batch_norm, precision, skip_nonfinite), progress, stop)  # fmt: skip

    def _watched(self, job: Job, progress: Tell | None, stop: threading.Event | None,
                 *args: Any) -> tuple[Job, list[Outcome]]:  # fmt: skip
        """The job once it is checked, and what each rank makes of it, with a bar while it does."""
        checks.watchers(progress, stop)
        job = self.check(job)
        checks.enough(job.data, self.workers)
        with Bar(progress) as bar:

            def watch(marks: NDArray[np.int64]) -> None:
                # An asynchronous plan is one step for its trainers; the server counts their iterations.
                done = max(0, int(marks[:, 0].max() if job.plan.servers else marks[:, 0].min()))
                bar(min(1.0, done / job.steps), f"step {done} of {job.steps}")

            work = rounds if job.plan.servers else train
            return job, self.call(work, job, *args, watch=watch, describe=_describer(job.program), stop=stop)

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
        (steps,), (staleness,) = integers("train", steps=steps), integers("train", 0, staleness=staleness)
        trainers = self.workers - 1
        nominal = asynchronous_server(trainers, [*range(1, self.workers)] * steps, staleness)
        job = Job(nominal, network, data, checks.made_optimizer(lr, optimizer), batch, steps, seed, shards)
        job, outcomes = self._watched(job, progress, stop, staleness)
        recorded = compile(asynchronous_server(trainers, outcomes[0].arrivals, staleness), network)
        return assemble(replace(job, plan=recorded.plan, compiled=recorded), outcomes, self.backend)

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
        data = checks.one_batch(plan, inputs, targets)
        (step,) = integers("gradients", 0, step=step)
        job = self.check(Job(plan, network, data, SGD(), len(data), shards=shards, compress=compress,
                             sync_batch_norm=sync_batch_norm, precision=precision))  # fmt: skip
        plan, program = job.plan, job.program
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
        program = checks.checked_collective(plan, tensors, self.workers)
        (repeat,) = integers("collective", repeat=repeat)
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
