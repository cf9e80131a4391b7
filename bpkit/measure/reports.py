"""``report``: where each millisecond and each byte of a training run went."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bpkit.compress import Codec
from bpkit.measure import table
from bpkit.measure.comparison import FEWEST, Ratio, ratio, said
from bpkit.measure.steps import Steps
from bpkit.plan.action import VERBS
from bpkit.run.cluster import TrainResult

#: How each transport sums gradients; it names what "not counted" hides.
ALGORITHMS = {"shm": "each rank adds its own slice of all gradients, in shared memory", "gloo": "gloo's all-reduce",
              "nccl": "NCCL's all-reduce"}  # fmt: skip


@dataclass(frozen=True)
class Spread:
    """Median and quartiles of samples, seconds."""

    median: float
    q1: float
    q3: float
    samples: tuple[float, ...]

    @classmethod
    def of(cls, values: NDArray[np.float64]) -> Spread:
        """Median and quartiles of `values`, which are kept."""
        q1, median, q3 = (float(q) for q in np.quantile(values, [0.25, 0.5, 0.75]))
        return cls(median, q1, q3, tuple(map(float, values)))


@dataclass(frozen=True)
class Parts:
    """The parts of a step's time, in seconds; they sum to it.  `Report` defines them."""

    compute: float
    waiting_for_core: float
    exposed_communication: float
    idle: float

    @property
    def total(self) -> float:
        """Their sum: the step time."""
        return self.compute + self.waiting_for_core + self.exposed_communication + self.idle


@dataclass(frozen=True, kw_only=True)
class Share:
    """What is said of each rank, and of their mean; `Report` defines each quantity."""

    parts: Parts
    hidden_communication: float
    bubble: float | None
    bytes_sent: int | None
    payload_bytes: int
    memory_bytes: int


@dataclass(frozen=True, kw_only=True)
class RankReport(Share):
    """One rank's share."""

    rank: int


@dataclass(frozen=True, kw_only=True)
class Report(Share):
    """Where the time and the bytes of a training run went.

    Every quantity is defined here and nowhere else.  The source of times is the trace: the recorded steps that
    another recorded step follows directly, with no evaluation between.

    Parameters
    ----------
    plan, backend, workers, batch
        What ran: ``batch`` is the global batch.
    steps : int
        Steps that the figures rest on.
    step_s : Spread
        Step time: a rank's period, from the first start of a step to the first start of the next, averaged
        over ranks; median and quartiles over steps.  Unlike last end minus first start it is right for steps
        that overlap.
    throughput : float
        Samples a second: samples of a step / median step time (an asynchronous server's plan is one long step).
    parts : Parts
        The median step time in four parts, averaged over ranks.  A part is its share of a rank's period, taken
        over the half of the steps nearest to the median (an interruption should not shape the picture), times
        the median step time.

        - ``compute``: CPU time inside compute actions (forward, loss, backward, update).  The clock is the one
          of the rank's main thread: with several threads a worker, what its other threads do is not in it.
        - ``waiting_for_core``: wall time minus CPU time inside compute actions: the operating system had given
          the core to someone else.
        - ``exposed_communication``: time in which the row itself was blocked by communication: before a compute
          action, for what it reads, and inside communication.  It holds the wait for slower peers, and in
          a pipeline the bubble.
        - ``idle``: the rest of the period: loading the batch, the interpreter between actions.
    hidden_communication : float
        Time in which communication was under way without blocking its row: the union of all intervals from post
        to seen end, without the waits.  Not a part of the step time: compute runs meanwhile.  Under way is not
        the same as moving: shared memory moves at the boundaries of actions only.  Seconds, averaged over ranks.
    bubble : float or None
        For a plan with a pipeline: last end minus first start of a rank in a step, minus the wall time of its
        compute actions; averaged over ranks.  It overlaps ``exposed_communication`` and ``idle``.  None without
        a pipeline.
    bytes_sent : int or None
        Bytes that a worker gives to sends in a step, counted at the send, averaged over ranks.  None: not
        counted, since a native collective does not tell what it sends; then payload and algorithm say
        what there is to say.
    payload_bytes : int
        Bytes of gradient that a worker gives to reductions or sends in a step (padding of the flat buffers
        included), from the compiled plan, or as encoded where gradients were compressed; averaged over ranks.
    compress : str
        How gradients were compressed, and how many times fewer bytes that gives than the compiled plan's; then the
        run was lossy.  Empty: not at all.
    algorithm : str
        What sums the gradients.
    memory_bytes : int
        Parameters, gradients and optimizer state that a worker keeps (`TrainResult.memory`), averaged over ranks.
    ranks : tuple of RankReport
        The same for each rank.
    noise : Ratio or None
        The same work against itself: each second step over the one before it.  None with fewer than ten such pairs.
        Runs differ by more than steps of one run do.
    """

    plan: str
    backend: str
    workers: int
    batch: int
    steps: int
    step_s: Spread
    throughput: float
    compress: str
    algorithm: str
    ranks: tuple[RankReport, ...]
    noise: Ratio | None = None

    def to_json(self) -> dict[str, Any]:
        """Everything as numbers, texts, lists and dictionaries."""
        return asdict(self)

    def _table(self) -> tuple[str, list[str], list[list[str]]]:
        spread = f"{table.seconds(self.step_s.q1)} to {table.seconds(self.step_s.q3)}"
        caption = (f"{self.plan} over {self.backend}, batch {self.batch:,}: a step takes "
                   f"{table.seconds(self.step_s.median)} (quartiles {spread}, {self.steps} steps), "
                   f"{self.throughput:,.0f} samples/s{said(self.noise)}")  # fmt: skip
        columns: list[Share] = [self, *(self.ranks if self.workers > 1 else ())]
        rows = [[name.replace("_", " "), *(table.seconds(getattr(c.parts, name)) for c in columns)]
                for name in Parts.__dataclass_fields__]  # fmt: skip
        rows.append(["sum: step time", *(table.seconds(c.parts.total) for c in columns)])
        rows.append(["hidden communication", *(table.seconds(c.hidden_communication) for c in columns)])
        if self.bubble is not None:
            rows.append(["bubble", *(table.seconds(c.bubble) for c in columns)])
        rows.append(["bytes sent", *(table.count(c.bytes_sent) for c in columns)])
        rows.append(["payload, bytes", *(table.count(c.payload_bytes) for c in columns)])
        rows.append(["memory, bytes", *(table.count(c.memory_bytes) for c in columns)])
        head = ["a step"] + ["mean of ranks", *(f"rank {r.rank}" for r in self.ranks)][: len(columns)]
        return caption, head, rows

    def __repr__(self) -> str:
        return table.text(*self._table()) + self._note()

    def _repr_html_(self) -> str:
        return table.html(*self._table()) + (f"<p>{self._note().strip()}</p>" if self._note() else "")

    def _note(self) -> str:
        lossy = f"\nlossy: {self.compress}" if self.compress else ""
        return lossy + (f"\nnot counted: {self.algorithm}" if self.bytes_sent is None else "")


def report(result: TrainResult) -> Report:
    """Say where each millisecond and each byte of a training run went.

    Parameters
    ----------
    result : TrainResult
        What ``Cluster.train`` gave.

    Returns
    -------
    Report
        Prints as a table; its docstring defines each quantity.
    """
    return summarize([result])


def summarize(results: Sequence[TrainResult]) -> Report:
    """One report on several runs of the same plan: their steps are taken together."""
    steps = Steps.join(Steps.of(r.trace, paused=[step - 1 for step, _ in r.accuracies]) for r in results)
    result, last = results[0], results[-1]
    plan, periods = result.plan, steps.period.mean(axis=0)
    spread = Spread.of(periods)
    near = np.argsort(np.abs(periods - spread.median), kind="stable")[: (len(periods) + 1) // 2]
    ranks = tuple(_rank(last, steps, rank, near, spread.median) for rank in range(result.workers))
    means = {field.name: _mean([getattr(rank, field.name) for rank in ranks]) for field in fields(Share)}
    return Report(plan=plan.name, backend=result.backend, workers=result.workers, batch=result.batch,
                  steps=len(periods), step_s=spread, throughput=result.samples / spread.median,
                  compress=_compression(result), algorithm=_algorithm(result), ranks=ranks, **means,
                  noise=ratio(periods[1::2], periods[:-1:2]) if len(periods) >= 2 * FEWEST else None)  # fmt: skip


def _mean(values: Sequence[Any]) -> Any:
    """The average over ranks, whole for bytes; None where it is not known of all."""
    if None in values:
        return None
    if isinstance(values[0], Parts):
        return Parts(*(_mean([getattr(part, field.name) for part in values]) for field in fields(Parts)))
    mean = float(np.mean(values))
    return round(mean) if isinstance(values[0], int) else mean


def _rank(result: TrainResult, steps: Steps, rank: int, near: NDArray[np.int64], median: float) -> RankReport:
    """One rank's report, over the steps `near`."""
    period = steps.period[rank, near].sum()

    def scaled(column: NDArray[np.float64]) -> float:
        return float(column[rank, near].sum() / period * median)

    compute, core, exposed = map(scaled, (steps.compute, steps.waiting_for_core, steps.exposed_communication))
    work, span = compute + core, scaled(steps.span)
    sent = steps.sent[rank]
    return RankReport(rank=rank, parts=Parts(compute, core, exposed, median - (compute + core + exposed)),
                      hidden_communication=scaled(steps.hidden_communication),
                      bubble=None if result.plan.mesh.pipeline == 1 else span - work,
                      bytes_sent=None if (sent < 0).any() else round(float(sent.mean())),
                      payload_bytes=result.payload(rank), memory_bytes=sum(result.memory[rank].values()))  # fmt: skip


def _compression(result: TrainResult) -> str:
    if result.compress is None:
        return ""
    whole = sum(map(result.program.payload, result.plan.mesh.coordinates()))
    return f"{result.compress}, {whole / max(1, sum(result.encoded)):.1f} times fewer payload bytes"


def _algorithm(result: TrainResult) -> str:
    kinds = {action.kind for row in result.plan.rows for action in row}
    native = ALGORITHMS.get(result.backend, result.backend)
    if isinstance(result.compress, Codec):
        native = "all ranks' codes gathered by all, each rank adds them"
    verbs = [VERBS[kind] for kind in kinds]
    words = [native] * any(verb.bytes == "native" and verb.touches("ADG") and verb.axis != "all" for verb in verbs)
    words += ["sends of the plan"] * any(verb.bytes == "sent" for verb in verbs)
    return " and ".join(words) or "none"
