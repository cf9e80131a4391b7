"""An asynchronous parameter server: live, in whatever order gradients come, and replayed by the plan of that order.

The rows of the ranks that train are the same in both: they give a gradient and take parameters.  Only the server's
row is not known before a live run.
"""

from collections.abc import Sequence
from time import perf_counter_ns

from bpkit.plan.action import Action
from bpkit.plan.strategies.servers import Clock
from bpkit.run.engine.rank import Runner, outcome
from bpkit.run.job import Job, Outcome
from bpkit.run.transports.comm import Comm
from bpkit.trace import Log


def rounds(comm: Comm, job: Job, staleness: int | None = None) -> Outcome:
    """Train by a plan of which each microbatch is a round: the samples of one synchronous step.

    Parameters
    ----------
    staleness : int, optional
        Where given, rank 0 serves live, with this bound; its row of the plan stands for any order.
    """
    runner = Runner(comm, job)
    for m in range(job.steps):  # microbatch m has the coordinates of step m
        share = runner.load(m, job.data.indices(m, job.batch, job.seed))
    row = runner.buffers.row
    log = Log.empty([0], len(row))
    arrivals: Sequence[int] = ()
    comm.barrier()
    began = perf_counter_ns()
    if staleness is not None and runner.buffers.at.data in runner.plan.servers:
        arrivals = _serve(comm, runner, staleness, log)
    else:
        runner.executor.run(0, log, 0)
        runner.executor.finish()
    losses = runner.step.loss()()
    runner.checked(job.steps - 1, losses)
    runner.look(job.steps - 1)
    starts = [int(log.start[0][i]) for i, action in enumerate(row) if action.kind == "ZERO"] or [began] * job.steps
    ended = perf_counter_ns()
    return outcome(runner.buffers, [loss * share for loss in losses], [*starts, ended], log, arrivals=tuple(arrivals))


def _serve(comm: Comm, runner: Runner, staleness: int, log: Log) -> list[int]:
    """Apply each gradient as it comes and answer whom the bound lets go on; whose came, in order."""
    buffers, plan = runner.buffers, runner.plan
    weights, gradient, state = buffers.update_of(Action(0, "UPDATE"))
    trainers = [data for data in range(plan.mesh.data) if data not in plan.servers]
    clock, arrivals = Clock(len(trainers), staleness), list[int]()
    columns: list[tuple[int, ...]] = []  # start, end, wait, CPU time (not taken) and bytes of each action
    last = perf_counter_ns()

    def note(waited: bool = False, sent: int = 0) -> None:
        nonlocal last
        began, last = last, perf_counter_ns()
        columns.append((began, last, (last - began) * waited, -1, sent))

    for worker in comm.arrivals(gradient, trainers, plan.microbatches):
        note(waited=True)
        buffers.optimizer.update(weights, gradient, state, len(arrivals), 1.0)
        arrivals.append(worker)
        comm.mark[0] = len(arrivals) // len(trainers)
        note()
        for reader in clock.arrived(worker):
            comm.post_send(weights, reader).wait()  # parameters rest until they are read
            note(sent=weights.numel() * weights.element_size())
    log.start[0], log.end[0], log.wait[0], log.cpu[0], log.bytes[0] = zip(*columns, strict=True)
    return arrivals
