"""Plans that move parameters: parameter servers, synchronous and asynchronous, and local SGD."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

from bpkit.given import whole_numbers
from bpkit.plan.action import Action, Part
from bpkit.plan.mesh import Mesh
from bpkit.plan.plan import Plan
from bpkit.plan.strategies.data_parallel import call_text, serial


def parameter_server(workers: int, servers: int = 1, buckets: int = 1) -> Plan:
    """Synchronous parameter servers on the first ranks: they add gradients, update, and send parameters back.

    Server j of k holds part j of every bucket and also trains.  Sent a step, with S bytes of gradients: by a rank
    that serves, ``S - s_j + (n - 1) s_j``; by another, S (Li et al. 2014).  Exact.

    Raises
    ------
    ValueError
        If there are more servers than workers, or a number is below 1.
    """
    workers, servers, buckets = whole_numbers("parameter_server", workers=workers, servers=servers, buckets=buckets)
    if servers > workers:
        raise ValueError(f"parameter_server: {servers} servers do not fit on {workers} workers")
    rows: list[list[Action]] = [[] for _ in range(workers)]
    for rank, row in enumerate(rows):
        for action in serial(buckets).rows[0]:
            row += _serve(action.stage, rank, workers, servers) if action.kind == "UPDATE" else [action]
            row += _give(action.stage, rank, workers, servers) if action.kind == "B" else []
    name = call_text("parameter_server", workers, servers=servers, buckets=buckets)
    return Plan(name, tuple(map(tuple, rows)), buckets, Mesh(data=workers), expanded=True)


def _share(j: int, servers: int) -> Part | None:
    return None if servers == 1 else Part(j, j + 1, servers)


def _give(stage: int, rank: int, workers: int, servers: int) -> list[Action]:
    """Gradients to the servers, and the additions of a rank that serves."""
    row = [Action(stage, "SEND_G", None, _share(j, servers), j) for j in range(servers) if j != rank]
    if rank < servers:
        others = [peer for peer in range(workers) if peer != rank]
        row += [Action(stage, "ADD_G", None, _share(rank, servers), peer) for peer in others]
    return row


def _serve(stage: int, rank: int, workers: int, servers: int) -> list[Action]:
    """The update of a rank that serves, and parameters to and from all."""
    row: list[Action] = []
    if rank < servers:
        part = _share(rank, servers)
        row.append(Action(stage, "UPDATE", None, part))
        row += [Action(stage, "SEND_P", None, part, peer) for peer in range(workers) if peer != rank]
    return row + [Action(stage, "RECV_P", None, _share(j, servers), j) for j in range(servers) if j != rank]


def local_sgd(workers: int, period: int, buckets: int = 1) -> Plan:
    """Each rank makes `period` updates on its own shard; then parameters are averaged (Stich 2019).

    One plan is one period: a rank's shard of the batch is cut into `period` microbatches, one an update, each
    divided by its own number of loss terms.  Class *defined*: the mean of n serial runs.

    Raises
    ------
    ValueError
        If a number is below 1.
    """
    workers, period, buckets = whole_numbers("local_sgd", workers=workers, period=period, buckets=buckets)
    step = serial(buckets).rows[0]
    row = [action if action.mb is None else replace(action, mb=m) for m in range(period) for action in step]
    row += [Action(stage, "AVERAGE") for stage in reversed(range(buckets))]
    name = call_text("local_sgd", workers, period, buckets=buckets)
    return Plan(name, (tuple(row),), buckets, Mesh(data=workers), period, holds="own")


class Clock:
    """Whom the server answers (stale synchronous parallel, Ho et al. 2013).

    A worker may be at most `staleness` iterations ahead of the slowest; one that is further waits for its answer.

    Parameters
    ----------
    workers : int
        Workers, numbered from 1.
    staleness : int
    """

    def __init__(self, workers: int, staleness: int) -> None:
        self._staleness = staleness
        self._done = dict.fromkeys(range(1, workers + 1), 0)
        self._waiting: set[int] = set()

    def arrived(self, worker: int) -> list[int]:
        """Note that a worker's gradient arrived; the workers that are answered now."""
        self._done[worker] += 1
        self._waiting.add(worker)
        most = min(self._done.values()) + self._staleness
        now = sorted(w for w in self._waiting if self._done[w] <= most)
        self._waiting -= set(now)
        return now

    def waits(self, worker: int) -> bool:
        """Whether a worker has not been answered yet."""
        return worker in self._waiting


def ages(plan: Plan) -> list[int]:
    """For each update of an asynchronous server, how many updates its gradient's parameters were behind."""
    updates, read, found = 0, dict[int | None, int](), list[int]()
    for action in plan.rows[0]:
        if action.kind == "RECV_G":
            found.append(updates - read.get(action.peer, 0))
            updates += 1
        elif action.kind == "SEND_P":
            read[action.peer] = updates
    return found


def asynchronous_server(workers: int, arrivals: Sequence[int], staleness: int = 1) -> Plan:
    """An asynchronous parameter server, in the order in which gradients arrived.

    Rank 0 serves, ranks 1 to `workers` train; every arrival is an update by itself, with what the worker read
    before.  A live run (`Cluster.train_asynchronous`) records such a plan; running it again gives the same bits.
    Class *defined*: delayed SGD in this order; a gradient is at most ``(workers - 1) (2 staleness + 1)`` updates old.

    Parameters
    ----------
    workers : int
        Ranks that train; the mesh has one more.
    arrivals : sequence of int
        Workers (from 1) in the order of their gradients; each equally often.
    staleness : int
        Iterations that a worker may be ahead of the slowest.

    Raises
    ------
    ValueError
        If the staleness is below zero, the arrivals name other workers, or could not have happened.
    """
    (workers,) = whole_numbers("asynchronous_server", workers=workers)
    (staleness,) = whole_numbers("asynchronous_server", 0, staleness=staleness)
    counts = Counter(arrivals)
    rounds = counts[1]
    if set(counts) != set(range(1, workers + 1)) or len(set(counts.values())) != 1:
        raise ValueError(f"asynchronous_server: arrivals must name each worker from 1 to {workers} equally often")
    server: list[Action] = []
    clock = Clock(workers, staleness)
    for worker in map(int, arrivals):
        if clock.waits(worker):
            raise ValueError(f"asynchronous_server: worker {worker} cannot arrive again before it is answered "
                             f"(staleness {staleness})")  # fmt: skip
        server += [Action(0, "RECV_G", None, None, worker), Action(0, "UPDATE")]
        server += [Action(0, "SEND_P", None, None, w) for w in clock.arrived(worker)]
    row: list[Action] = []
    for m in range(rounds):
        row += [Action(0, "ZERO"), Action(0, "F", m), Action(0, "LOSS", m), Action(0, "B", m)]
        row += [Action(0, "SEND_G", None, None, 0), Action(0, "RECV_P", None, None, 0)]
    rows = (tuple(server), *[tuple(row)] * workers)
    name = f"asynchronous_server({workers}, staleness={staleness})"
    return Plan(name, rows, 1, Mesh(data=workers + 1), rounds, place=(0,), expanded=True, holds="one",
                servers=(0,), staleness=(workers - 1) * (2 * staleness + 1))  # fmt: skip
