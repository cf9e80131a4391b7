"""What a worker does in ``Cluster.train`` and ``Cluster.gradients``."""

import hashlib
import math
from collections import deque
from collections.abc import Callable, Sequence
from time import perf_counter_ns
from typing import Any

import torch
from torch import Tensor

from bpkit.nn.losses import Loss
from bpkit.plan.plan import Plan
from bpkit.plan.program import Program
from bpkit.run.engine.context import Rank, StepData
from bpkit.run.engine.device import Feed, executor
from bpkit.run.engine.groups import Groups
from bpkit.run.engine.memory import Buffers, OneBuffer
from bpkit.run.errors import EvaluationError
from bpkit.run.job import Job, Outcome
from bpkit.run.room import explained
from bpkit.run.transports.comm import Comm
from bpkit.run.whole import gathered
from bpkit.trace import Log


def factors(plan: Plan, targets: Tensor, own: Tensor, loss: Loss) -> tuple[Sequence[float], float, float]:
    """What a plan multiplies with: each microbatch's loss, in LOSS; the gradient, in UPDATE; and the weighted loss, in
    the loss that is reported.

    Parameters
    ----------
    targets, own : Tensor
        Of the whole global batch, and of this rank's shard of it.
    """
    m, ranks = 1 if plan.servers else plan.microbatches, plan.mesh.data - len(plan.servers)  # a round is a whole shard
    if plan.holds != "all":
        return [1.0 / max(1, loss.terms(part)) for part in own.tensor_split(m)], 1.0, 1.0 / (ranks * m)
    if plan.merge == "mean":
        scale = 1.0 / max(1, loss.terms(targets))
        return [1.0] * m, scale, scale
    scale = 1.0 / ranks if plan.merge == "mean-of-means" else 1.0
    return [1.0 / max(1, loss.terms(own))] * m, scale, scale


class Runner:
    """One rank's buffers, bound row and executor; `captured` takes what each UPDATE would apply, in its place."""

    def __init__(self, comm: Comm, job: Job, captured: dict[int, Tensor] | None = None, streams: Any = None) -> None:
        self.job, self.program, self.plan, self.network = job, job.program, job.program.plan, job.network
        there = comm.device == job.network.device
        network = job.network if there else job.network.copy(comm.device)
        groups = Groups(comm, self.plan.mesh)
        self.buffers = Buffers(self.program, network, groups, job.optimizer, job.rows, job.compress)
        apart = job.sync_batch_norm and self.plan.mesh.data > 1
        over = groups.apart(self.plan.mesh, "data", "batch norm").all_reduce if apart else None
        self.step = StepData(sum_over_data=over, skips=job.skip_nonfinite)
        bound = Rank(self.buffers, self.step, captured, job.precision).bind()
        self.executor = executor(self.program.row(self.buffers.at), bound, groups, streams)
        self.feed = Feed(comm.device)
        self.losses: list[float] = []  # this rank's share of the mean loss, for each step that has ended
        self.starts: list[int] = []  # when it began, without the time of `paused`; nanoseconds
        self.paused = 0
        self._flights: deque[tuple[int, int, bool, float, Callable[[], list[float]]]] = deque()

    def run(self, number: int, rows: Tensor, log: Log, line: int) -> None:
        """Run one step on this rank's shard of the global batch `rows`; on a GPU it ends later (see `settle`)."""
        began = perf_counter_ns()
        self.step.begin(number)
        share = self.load(number, rows)
        kept = [(net.flat_buffers, net.flat_buffers.clone()) for net in self.buffers.stages.values() if self.step.skips]
        self.executor.run(number, log, line)
        if skipped := self.step.skips and not math.isfinite(self.buffers.squares):  # for which a GPU is waited for
            self.step.skipped += 1
            for statistics, before in kept:
                statistics.copy_(before)
        self._flights.append((number, began, skipped, share, self.step.loss(self.executor.ahead > 0)))
        self.settle(self.executor.ahead)

    def load(self, number: int, rows: Tensor) -> float:
        """Load this rank's shard of a step's global batch; the factor of its weighted loss in the reported one."""
        job, data, everyone = self.job, self.buffers.at.data, self.job.data.targets[rows]
        sizes = job.shard_sizes(number)
        own = slice(first := sum(sizes[:data]), first + sizes[data])
        weights, self.step.scale, share = factors(self.plan, everyone, everyone[own], self.network.loss)
        kept = len(self.network.flat_buffers) > 0  # running statistics, in which each rank has a share
        shares = job.microbatch_shares(data, number) if kept else [1.0] * len(weights)
        inputs, targets = self.feed(job.data.inputs[rows[own]]), self.feed(everyone[own])
        self.step.load(number, inputs, targets, first, weights, shares)
        return share

    def settle(self, ahead: int = 0) -> None:
        """Wait until no more than `ahead` steps are under way; FloatingPointError if a loss is not finite."""
        squares = self.buffers.squares
        while len(self._flights) > ahead:
            number, began, skipped, share, loss = self._flights.popleft()
            self.starts.append((self.executor.finish() or began) - self.paused)
            self.losses.append((sum(loss()) if skipped else self.checked(number, loss())) * share)
            if not self.step.skips and len(squares) and squares.is_cpu and not math.isfinite(squares):
                self.look(number)

    def checked(self, number: int, losses: Sequence[float]) -> float:
        """The sum of a step's losses; FloatingPointError if it is not finite."""
        total = sum(losses)
        if not math.isfinite(total):
            self.look(number, "the loss is not a number, and ")
            raise FloatingPointError(f"step {number}: the loss is not a number, though what this rank holds is finite")
        return total

    def look(self, number: int, why: str = "") -> None:
        """FloatingPointError if this rank's gradient, weights or optimizer's state are not finite; with the layer."""
        buffers, cuts = self.buffers, (0, *self.program.cuts)
        for stage, net in sorted(buffers.stages.items(), reverse=True):
            own = buffers.reduced.get(stage, buffers.gradients[stage])
            low = buffers.own_bounds(net.flat_size)[0] if stage in buffers.reduced else 0
            flats = [("gradient is", own), ("weights are", buffers.masters[stage]),
                     *(("optimizer's state is", one) for one in buffers.state[stage])]  # fmt: skip
            for what, flat in flats[1:] if self.step.skips else flats:  # what is skipped leaves only its gradient
                if not math.isfinite(flat.sum()) and len(bad := (~flat.isfinite()).nonzero()):  # a sum may overflow
                    layer = max((p.offset, p.layer) for p in net.description.parameters if p.offset <= low + bad[0])[1]
                    raise FloatingPointError(f"step {number}: {why}the {what} not finite in stage {stage}, layer "
                                             f"{cuts[stage] + layer}{' (opened)' * self.plan.opened}")  # fmt: skip


def train(comm: Comm, job: Job, streams: Any = None) -> Outcome:
    """Run all steps of a job on one rank."""
    plan = job.program.plan
    with explained(plan, lambda: job.needs(plan.mesh.coordinate(comm.rank))):
        return _steps(comm, job, streams)


def _steps(comm: Comm, job: Job, streams: Any) -> Outcome:
    runner = Runner(comm, job, streams=streams)
    recorded = min(job.steps, job.record)
    log = Log.empty(range(job.steps - recorded, job.steps), len(runner.buffers.row))
    accuracies = []
    if comm.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    comm.barrier()
    for step in range(job.steps):
        line = max(0, step - (job.steps - recorded))
        log.steps[line] = step
        runner.run(step, job.data.indices(step, job.batch, job.seed), log, line)
        evaluates = bool(job.evaluate_every) and (step + 1) % job.evaluate_every == 0
        if evaluates or step == job.steps - 1 or (step % 32 == 31 and comm.device.type == "cpu"):
            runner.settle()
            runner.look(step)  # a pass over memory; between such steps weights that are not finite show in the loss
        if evaluates:
            began = perf_counter_ns()
            accuracies.append((step + 1, evaluate(comm, runner.buffers, job, step + 1)))
            runner.paused += perf_counter_ns() - began
            if job.target is not None and accuracies[-1][1] >= job.target:
                log = log.until(line)
                break
    runner.settle()
    starts = [*runner.starts, perf_counter_ns() - runner.paused]
    peak = torch.cuda.max_memory_allocated() if comm.device.type == "cuda" else 0
    return outcome(runner.buffers, runner.losses, starts, log, accuracies=accuracies, peak=peak,
                   clock_error=runner.executor.clock_error(), skipped=runner.step.skipped)  # fmt: skip


def outcome(buffers: Buffers, losses: list[float], starts: list[int], log: Log, **more: Any) -> Outcome:
    """What a rank returns after its last step."""
    held = holdings(buffers)
    digests = {stage: _digest(flat) for stage, (flat, _) in held.items()}
    return Outcome(losses, starts, log, held if buffers.at.data == 0 else {}, digests, buffers.memory(),
                   buffers.encoded, **more)  # fmt: skip


def holdings(buffers: Buffers) -> dict[int, tuple[Tensor, Tensor]]:
    """Each stage's parameters, whole, and what is kept beside them: the sum over data ranks, all of which call this."""
    add = buffers.groups.data.all_reduce
    return {stage: (buffers.whole(stage).cpu(), add(net.flat_buffers.clone()).cpu() if len(net.flat_buffers) else
                    net.flat_buffers) for stage, net in buffers.stages.items()}  # fmt: skip


def evaluate(comm: Comm, buffers: Buffers, job: Job, steps: int) -> float:
    """Test accuracy after so many steps, computed by rank 0 from what all ranks hold; the same on every rank.

    Raises
    ------
    EvaluationError
        With what was trained, if a test sample's output cannot be computed.
    """
    plan, held = job.program.plan, holdings(buffers)
    hits = torch.zeros(2, dtype=torch.float64)  # on the CPU, as what the ranks hold: every transport carries it
    if comm.rank:
        for tensors in held.values() if buffers.at.data == 0 else ():
            for tensor in tensors:
                comm.send(tensor, 0)
    else:
        others = [{stage: (comm.recv(None, rank).cpu(), comm.recv(None, rank).cpu())
                   for stage in plan.owned(at.pipeline)}
                  for rank, at in enumerate(plan.mesh.coordinates()) if rank and at.data == 0]  # fmt: skip
        network = gathered(job.network, job.program, [held, *others]).copy(comm.device)

    def count(inputs: Tensor, targets: Tensor) -> Tensor:
        try:
            right, counted = network.predict(inputs.to(comm.device)).argmax(-1).cpu() == targets, targets >= 0
        except Exception as error:
            why = f"after {steps} steps, of which this error's `network` holds the weights: {error}"
            raise EvaluationError(why, network.copy("cpu")) from error
        return hits.add_(torch.stack([right[counted].sum(), counted.sum()]))

    # Piece by piece, so that the others see that it goes on.
    comm.alone(0, map(count, job.data.test_inputs.split(1024), job.data.test_targets.split(1024)))
    return float(torch.div(*(comm.broadcast(hits, 0) if comm.size > 1 else hits)))


def gradients(comm: Comm, job: Job, step: int) -> dict[int, Tensor]:
    """Run one step up to UPDATE; what each UPDATE would have applied, by stage (NaN where another rank updates)."""
    captured: dict[int, Tensor] = {}
    runner = Runner(comm, job, captured)
    runner.run(step, torch.arange(job.batch), Log.empty([step], len(runner.buffers.row)), 0)
    runner.settle()
    runner.look(step)
    return {stage: gradient.cpu() for stage, gradient in captured.items()}


def collective(comm: Comm, program: Program, inputs: Sequence[Tensor], repeat: int) -> tuple[Tensor, Log, int]:
    """Run a collective by itself `repeat` times; the result, the log, and the bytes that one run sent."""
    groups = Groups(comm, program.plan.mesh)
    buffers = OneBuffer(program, groups, inputs[comm.rank].dtype)
    runner = executor(program.row(buffers.at), Rank(buffers, StepData()).bind(), groups)
    log = Log.empty(range(repeat), len(buffers.row))
    buffer, before = buffers.gradients[0], comm.sent
    for line in range(repeat):
        buffer.copy_(inputs[comm.rank])
        comm.barrier()
        runner.run(line, log, line)
        runner.finish()
    return buffer.cpu().clone(), log, (comm.sent - before) // repeat


def _digest(tensor: Tensor) -> str:
    return hashlib.sha256(tensor.numpy(force=True).tobytes()).hexdigest()[:16]
