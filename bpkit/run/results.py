"""What runs give back, and what is put together from the answers of all ranks."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from bpkit.compress import Compressor
from bpkit.nn import Network
from bpkit.plan import Plan, Program
from bpkit.run.job import Job, Outcome
from bpkit.run.whole import gathered
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
    memory : tuple of dict
        For each rank, bytes of parameters, gradients and optimizer state.
    compress : Compressor, optional
        How gradients travelled; the run was lossy where there is one.
    precision : str
        ``full``, or ``bf16``: the run was lossy then.
    peak : tuple of int
        For each rank, the most bytes that the GPU's allocator held for tensors at once; 0 on the CPU.
    predicted : tuple of dict
        For each rank, the bytes that the plan takes by calculation (see `bpkit.plan.memory`).
    clock_error : float
        Seconds by which times of a GPU's events, brought to the host's clock, were wrong at the end; of the worst rank.
    encoded : tuple of int
        For each rank, the bytes of a step's gradients as encoded, where they were compressed.
    skipped : int
        Steps that made no update, since their gradient was not finite (`skip_nonfinite` of `bpkit.Cluster.train`).
    """

    network: Network
    losses: NDArray[np.float64]
    step_times: NDArray[np.float64]
    trace: Trace
    accuracies: tuple[tuple[int, float], ...]
    program: Program
    batch: int
    backend: str
    memory: tuple[dict[str, int], ...] = ()
    compress: Compressor | None = None
    encoded: tuple[int, ...] = ()
    precision: str = "full"
    peak: tuple[int, ...] = ()
    predicted: tuple[dict[str, int], ...] = ()
    clock_error: float = 0.0
    skipped: int = 0

    @property
    def plan(self) -> Plan:
        """The plan that ran."""
        return self.program.plan

    @property
    def workers(self) -> int:
        """Number of ranks."""
        return self.plan.workers

    @property
    def samples(self) -> int:
        """Samples that one run of the plan takes: a batch, or a whole run's where the plan is of all its steps."""
        return self.batch * (self.plan.microbatches if self.plan.servers else 1)

    def payload(self, rank: int) -> int:
        """Bytes of gradient that a rank gives to reductions and sends in a step, as encoded where compressed."""
        return self.encoded[rank] if self.compress else self.program.payload(self.plan.mesh.coordinate(rank))

    def __repr__(self) -> str:
        lossy = f" with {self.compress} (lossy)" if self.compress else " in bf16 (lossy)" * (self.precision == "bf16")
        return (f"<TrainResult: {self.plan.name}{lossy} over {self.backend}, {len(self.losses)} steps, "
                f"loss {self.losses[0]:.4f} to {self.losses[-1]:.4f}>")  # fmt: skip


@dataclass(frozen=True)
class CollectiveResult:
    """What a collective by itself gives.

    Parameters
    ----------
    tensors : tuple of Tensor
        The buffer of each rank afterwards.
    sent : tuple of int
        Bytes that each rank sent in one run, counted at the send.
    trace : Trace
        One step a run.
    program : Program
    """

    tensors: tuple[Tensor, ...]
    sent: tuple[int, ...]
    trace: Trace
    program: Program

    @property
    def seconds(self) -> NDArray[np.float64]:
        """Duration of each run: last end minus first start over all ranks."""
        steps = [self.trace.at_step(int(step)) for step in self.trace.steps]
        return np.array([(step.end.max() - step.start.min()) / 1e9 for step in steps])


def assemble(job: Job, outcomes: list[Outcome], backend: str) -> TrainResult:
    """One result from the answers of all ranks."""
    plan, mesh = job.program.plan, job.program.plan.mesh
    same_bits(plan, outcomes)
    last = [rank for rank, at in enumerate(mesh.coordinates()) if at.pipeline == plan.place[-1] and at.tensor == 0]
    losses = np.sum([outcomes[rank].losses for rank in last], axis=0)
    trained = [rank for rank, at in enumerate(mesh.coordinates()) if at.data not in plan.servers]
    starts = np.array([outcomes[rank].starts for rank in trained], dtype=float)
    rows = [[str(step.action) for step in job.program.row(at)] for at in mesh.coordinates()]
    trace = Trace.collect([outcome.log for outcome in outcomes], rows)
    return TrainResult(gathered(job.network, job.program, [outcome.parameters for outcome in outcomes]), losses,
                       np.diff(starts, axis=1).mean(axis=0) / 1e9, trace, tuple(outcomes[0].accuracies), job.program,
                       job.batch, backend, tuple(outcome.memory for outcome in outcomes), job.compress,
                       tuple(outcome.encoded for outcome in outcomes), job.precision,
                       tuple(outcome.peak for outcome in outcomes), tuple(job.needs(at) for at in mesh.coordinates()),
                       max(outcome.clock_error for outcome in outcomes), outcomes[0].skipped)  # fmt: skip


def same_bits(plan: Plan, outcomes: list[Outcome]) -> None:
    """Replicas of a stage must hold the same weights, to the bit (with an asynchronous server only its own count)."""
    if plan.holds == "one":
        return
    for rank, at in enumerate(plan.mesh.coordinates()):
        first = outcomes[plan.mesh.rank(at._replace(data=0))].digests
        for stage, digest in outcomes[rank].digests.items():
            if digest != first[stage]:
                raise RuntimeError(f"{plan.name}: rank {rank} ends with other weights of stage {stage} "
                                   "than data rank 0")  # fmt: skip
