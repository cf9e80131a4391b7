"""``schedules``: pipelines on real workers, their passes timed one by one, beside a simulation at the same times."""

import threading
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from bpkit.data import Dataset
from bpkit.measure.experiment import train_in_turn
from bpkit.measure.host import cpu_times, machine, stolen
from bpkit.measure.pipeline import period
from bpkit.measure.reports import summarize
from bpkit.nn import Network, mlp
from bpkit.plan import Action, Plan
from bpkit.plan.action import PASSES
from bpkit.run.cluster import TrainResult
from bpkit.run.progress import Tell
from bpkit.simulate import Times, simulate
from bpkit.trace import Trace

FORMAT = "bpkit-pipelines/1"


def equal_stages(width: int = 512) -> Network:
    """An MLP of digits with eight equal hidden layers, so that 1, 2, 4 and 8 stages weigh nearly the same."""
    return mlp([64, *[width] * 9, 10], seed=0)


def schedules(network: Network, data: Dataset, plans: Sequence[Plan], *, batch: int = 256, steps: int = 12,
              warmup: int = 3, repetitions: int = 3, name: str | None = None, progress: Tell | None = None,
              stop: threading.Event | None = None) -> dict[str, Any]:  # fmt: skip
    """Train by each plan in turn, `repetitions` times over, from the same weights.

    Parameters
    ----------
    plans : sequence of Plan
        Each of pipelines; their numbers of workers may differ.
    batch, steps, warmup : int
        Samples of a global batch; steps timed, and steps before them.
    name : str, optional
        What readers shall call this machine.
    progress, stop
        As in `Cluster.train`.

    Returns
    -------
    dict
        ``format``, ``machine``, ``experiment`` and ``points``, of each plan: ``step_s`` and ``parts`` (see
        `bpkit.measure.Report`; ``samples`` are the medians of the repetitions), ``unit_s`` (CPU time of the forward of
        one microbatch through a rank's share, mean of ranks), ``predicted_s`` (period of the simulation at the measured
        CPU times of its actions), and ``timeline`` of the step nearest to the median: ``[rank, cell, begin, end,
        cpu]`` in microseconds.
    """
    settings = {"batch": batch, "steps": warmup + steps, "lr": 0.1, "record": steps}
    jobs = [(plan.name, plan, settings) for _ in range(repetitions) for plan in plans]
    before = cpu_times()
    results = train_in_turn(network, data, jobs, progress, stop)
    experiment = {"network": network.describe().split(", ")[0], "data": data.name, "batch": batch, "steps": steps,
                  "warmup": warmup, "repetitions": repetitions, "backend": results[0].backend,
                  "steal": stolen(before)}  # fmt: skip
    points = [_point(results[i :: len(plans)]) for i in range(len(plans))]
    return {"format": FORMAT, "machine": machine(name), "experiment": experiment, "points": points}


def _point(results: list[TrainResult]) -> dict[str, Any]:
    found, plan, last = summarize(results), results[0].plan, results[-1].trace
    costs = _costs([result.trace for result in results])
    forwards = sum(cost for action, cost in costs.items() if action.kind == "F") / plan.workers / plan.microbatches
    samples = [float(np.median(result.trace.step_times()[:-1])) for result in results]
    return {"plan": plan.name, "step_s": {**asdict(found.step_s), "samples": samples}, "parts": asdict(found.parts),
            "unit_s": forwards, "predicted_s": period(simulate(plan, _times(costs, plan.stages), 5)),
            "timeline": _timeline(last, found.step_s.median)}  # fmt: skip


def _costs(traces: list[Trace]) -> dict[Action, float]:
    """Median CPU seconds of each compute action; wall time where CPU time was not taken."""
    found: dict[str, list[int]] = {}
    for trace in traces:
        spent = np.where(trace.cpu >= 0, trace.cpu, trace.end - trace.start - trace.wait)
        for cell, cost in zip(trace.cell[trace.compute()], spent[trace.compute()], strict=True):
            found.setdefault(trace.cells[cell], []).append(int(cost))
    return {Action.parse(cell): float(np.median(costs)) / 1e9 for cell, costs in found.items()}


def measured_times(trace: Trace, stages: int) -> Times:
    """The compute times of a run, by kind and stage, as a simulation takes them."""
    return _times(_costs([trace]), stages)


def _times(costs: dict[Action, float], stages: int) -> Times:
    """What the simulation takes for each kind: the mean of microbatches, a stage for passes, one for all else."""

    def mean(stage: int | None, *kinds: str) -> float:
        return float(np.mean([c for a, c in costs.items() if a.kind in kinds and stage in (None, a.stage)] or [0.0]))

    forward, first, second = ([mean(stage, *kinds) for stage in range(stages)] for kinds in ("F", "BI", "W"))
    return Times(forward, first, second, {a.kind: mean(None, a.kind) for a in costs if a.kind not in PASSES})


def _timeline(trace: Trace, median: float) -> list[list[Any]]:
    nearest = int(np.argmin(np.abs(trace.step_times()[:-1] - median)))
    kept = np.isin(trace.kinds(), ["F", "B", "I", "W", "UPDATE"])
    step = trace.where((trace.step == trace.steps[nearest]) & kept)
    begin = step.start + step.wait
    columns = (step.rank, step.cell, begin - begin.min(), step.end - begin.min(), step.cpu)
    return [[rank, step.cells[cell], *(round(t / 1e3) for t in times)] for rank, cell, *times in
            zip(*(column.tolist() for column in columns), strict=True)]  # fmt: skip
