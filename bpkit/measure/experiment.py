"""``scaling``: the same training with 1, 2, 4 ... workers, beside the serial run, in one interleaved measurement."""

import re
import threading
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import numpy as np

from bpkit.data import Dataset
from bpkit.given import integers, number
from bpkit.measure.host import cpu_times, machine, stolen
from bpkit.measure.measurement import Event, Point, Scaling
from bpkit.measure.reports import Report, summarize
from bpkit.measure.steps import Steps
from bpkit.nn import Network
from bpkit.optim import SGD, Optimizer
from bpkit.plan import Plan, data_parallel, serial
from bpkit.run import checks
from bpkit.run.cluster import Cluster, TrainResult
from bpkit.run.errors import Stopped
from bpkit.run.job import Job
from bpkit.run.processes.devices import choose
from bpkit.run.progress import Bar, Tell
from bpkit.trace import Trace


def scaling(network: Network, data: Dataset, workers: Sequence[int] = (1, 2, 4), scaling: str = "strong", *,
            plan: Callable[[int], Plan] = data_parallel, batch: int = 256, lr: float | None = None,
            optimizer: Optimizer | None = None, steps: int = 40, warmup: int = 10, repetitions: int = 5,
            backend: str = "auto", threads_per_worker: int = 1, target: float | None = 0.97, target_steps: int = 400,
            evaluate_every: int = 5, seed: int = 0, timeout: float = 60.0, name: str | None = None,
            progress: Tell | None = None, stop: threading.Event | None = None) -> Scaling:  # fmt: skip
    """Measure how a training step scales with the number of workers.

    The serial plan on one worker and the given plan on each other count run in turn, `repetitions` times
    over, from the same weights, so that what the machine does meanwhile hits all alike.

    Parameters
    ----------
    network, data
        What is trained; a copy is, the network stays as it is.
    workers : sequence of int
        The counts.  One worker is the serial plan, and is always measured.
    scaling : {"strong", "weak"}
        ``strong``: `batch` is the global batch.  ``weak``: it is the batch of each worker; efficiency is then
        throughput over that of the same number of serial runs.
    plan : callable
        Gives the plan for a number of workers, for example
        ``lambda n: bp.plan.data_parallel(n, buckets=3)``.
    batch : int
    lr, optimizer
        Plain SGD of a learning rate, or an optimizer; SGD(0.1, momentum=0.9) where neither is given.
    steps, warmup, repetitions : int
        Timed steps of each run, steps before them that are not timed, and runs of each count.
    backend, threads_per_worker, timeout
        See `bpkit.Cluster`.
    target : float or None
        Test accuracy to which one more run of each count is timed, evaluated every `evaluate_every` steps and
        given up after `target_steps`.
    seed : int
        Of the order of samples.
    name : str, optional
        What the machine shall be called.
    progress : callable, optional
        Called with (fraction done, text); by default a bar, where somebody looks.
    stop : threading.Event, optional
        Ends the measurement when it is set.

    Raises
    ------
    ValueError
        If an argument does not fit; nothing has been started then.
    Stopped
        If `stop` was set.
    WorkerError, WorkerDied, WorkerStuck
        If a worker fails.
    """
    counts = _counts(workers)
    batch, repetitions, target_steps, evaluate_every, steps, warmup = _numbers(
        scaling, batch, steps, warmup, repetitions, target, target_steps, evaluate_every)  # fmt: skip
    largest = batch * (counts[-1] if scaling == "weak" else 1)
    if largest > len(data):
        raise ValueError(f"a global batch of {largest} ({scaling} scaling, {counts[-1]} workers) is larger than "
                         f"{data.name}, which has {len(data)} training samples")  # fmt: skip
    if lr is not None and optimizer is not None:
        raise ValueError("scaling takes either lr=... or optimizer=..., not both")
    plans = {n: _plan(plan, n) for n in counts}
    optimizer = optimizer or (SGD(0.1, momentum=0.9) if lr is None else SGD(lr))

    def job(n: int, what: str, **settings: Any) -> tuple[str, Plan, dict[str, Any]]:
        size = batch * (n if scaling == "weak" else 1)
        same = {"batch": size, "optimizer": optimizer, "seed": seed}
        return f"{what}, {n} worker{'s' * (n > 1)}", plans[n], {**same, **settings}

    timed = [job(n, f"repetition {r + 1} of {repetitions}", steps=warmup + steps, record=steps, target=None)
             for r in range(repetitions) for n in np.roll(counts, -r).tolist()]  # fmt: skip
    more = [job(n, "target accuracy", steps=target_steps, record=1, evaluate_every=evaluate_every, target=target)
            for n in counts if target is not None]  # fmt: skip
    before = cpu_times()
    results = train_in_turn(network, data, [*timed, *more], progress, stop, (backend, threads_per_worker, timeout))
    runs = {n: [result for result in results[: len(timed)] if result.workers == n] for n in counts}
    reached = {result.workers: result for result in results[len(timed) :]}
    experiment = {"network": network.describe().split(", ")[0],
                  "parameters": sum(p.numel() for p in network.parameters()), "data": data.name, "batch": batch,
                  "scaling": scaling, "plan": _plan_name(plans[counts[-1]], counts[-1]),
                  "backend": runs[counts[-1]][0].backend, "threads_per_worker": threads_per_worker, "steps": steps,
                  "warmup": warmup, "repetitions": repetitions, "optimizer": str(optimizer), "seed": seed,
                  "target_accuracy": target, "steal": stolen(before)}  # fmt: skip
    return Scaling(machine(name), experiment, _points(runs, reached, target))


def train_in_turn(network: Network, data: Dataset, jobs: Sequence[tuple[str, Plan, dict[str, Any]]],
                  progress: Tell | None, stop: threading.Event | None,
                  cluster: tuple[str, int, float] = ("auto", 1, 60.0)) -> list[TrainResult]:  # fmt: skip
    """Train by each job's plan and settings, from the same weights; `cluster`: backend, threads, timeout.

    All jobs are checked before anything starts.
    """
    results = []
    checks.watchers(progress, stop)
    for plan, settings in {(plan.digest, settings["steps"]): (plan, settings) for _, plan, settings in jobs}.values():
        optimizer = checks.made_optimizer(settings.get("lr"), settings.get("optimizer"))
        rest = {name: value for name, value in settings.items() if name not in ("lr", "optimizer")}
        checks.checked(Job(plan, network, data, optimizer, **rest), plan.workers, cluster[0])
    with ExitStack() as stack:
        bar = stack.enter_context(Bar(progress))
        counts = dict.fromkeys(plan.workers for _, plan, _ in jobs)
        device = choose(max(counts), cluster[0], "auto")  # one for all, or a GPU's step would be held against a CPU's
        clusters = {n: stack.enter_context(Cluster(n, *cluster, device=device)) for n in counts}
        for index, (what, plan, settings) in enumerate(jobs):
            if stop is not None and stop.is_set():
                raise Stopped("the measurement was stopped")
            tell = bar.part(index, len(jobs), what)
            tell(0.0, "")
            results.append(clusters[plan.workers].train(network, data, plan, progress=tell, stop=stop, **settings))
        bar(1.0, "done")
    return results


def _points(runs: dict[int, list[TrainResult]], reached: dict[int, TrainResult],
            target: float | None) -> tuple[Point, ...]:  # fmt: skip
    medians = {n: [float(np.median(Steps.of(r.trace).period.mean(axis=0))) for r in results]
               for n, results in runs.items()}  # fmt: skip
    best = runs[1][0].batch / min(medians[1])
    return tuple(_point(results, summarize(results), medians[n], best, _accuracy(reached.get(n), target))
                 for n, results in runs.items())  # fmt: skip


def _point(results: list[TrainResult], found: Report, medians: list[float], best: float,
           accuracy: tuple[float | None, int | None]) -> Point:  # fmt: skip
    speedup = found.throughput / best
    return Point(workers=found.workers, batch=found.batch, step_s=replace(found.step_s, samples=tuple(medians)),
                 throughput=found.throughput, speedup=speedup, efficiency=speedup / found.workers, parts=found.parts,
                 hidden_communication=found.hidden_communication, bytes_sent=found.bytes_sent,
                 payload_bytes=found.payload_bytes, memory_bytes=found.memory_bytes, algorithm=found.algorithm,
                 time_to_accuracy_s=accuracy[0],
                 steps_to_accuracy=accuracy[1], final_loss=float(results[-1].losses[-1]),
                 timeline=_timeline([r.trace for r in results], found.step_s.median))  # fmt: skip


def _accuracy(result: TrainResult | None, target: float | None) -> tuple[float | None, int | None]:
    """Seconds and steps to the target, or twice None."""
    if result is None or target is None:
        return None, None
    step = next((step for step, accuracy in result.accuracies if accuracy >= target), None)
    return (None, None) if step is None else (float(result.step_times[:step].sum()), step)


def _timeline(traces: Sequence[Trace], median: float) -> tuple[Event, ...]:
    """The step whose duration is nearest to the median, in microseconds from its first start."""
    times = [zip(trace.steps, trace.step_times(), strict=True) for trace in traces]
    _, trace, step = min(((abs(time - median), trace, step) for trace, pairs in zip(traces, times, strict=True)
                          for step, time in pairs), key=lambda found: found[0])  # fmt: skip
    chosen = trace.at_step(step)
    origin = int(chosen.start.min())
    return tuple((rank, cell, (start - origin) / 1e3, (end - origin) / 1e3, wait / 1e3, max(-1.0, cpu / 1e3))
                 for (rank, _, cell, start, end, wait), cpu in zip(chosen.rows(), chosen.cpu.tolist(), strict=True))


# -- arguments ------------------------------------------------------------------------------------------------


def _counts(workers: Sequence[int]) -> list[int]:
    """The counts in order, each once, and always one worker."""
    try:
        counts = list(workers)
    except TypeError:
        raise TypeError(f"workers must be a list of counts, for example [1, 2, 4], not {workers!r}") from None
    if not counts:
        raise ValueError("workers is empty: name at least one count, for example [1, 2, 4]")
    return sorted({1, *(integers("scaling", workers=n)[0] for n in counts)})


def _numbers(scaling: str, batch: int, steps: int, warmup: int, repetitions: int, target: float | None, cap: int,
             every: int) -> list[int]:  # fmt: skip
    if scaling not in ("strong", "weak"):
        raise ValueError('scaling must be "strong" (fixed global batch) or "weak" (fixed batch a worker), '
                         f'not {scaling!r}')  # fmt: skip
    if target is not None and number("target, an accuracy,", target, above=0) > 1:
        raise ValueError(f"target is an accuracy above 0 and at most 1, or None, not {target!r}")
    return [*integers("scaling", batch=batch, repetitions=repetitions, target_steps=cap, evaluate_every=every),
            *integers("scaling", 2, steps=steps), *integers("scaling", 0, warmup=warmup)]  # fmt: skip


def _plan(plan: Callable[[int], Plan], n: int) -> Plan:
    """The plan for a count: serial for one worker."""
    if not callable(plan):
        raise TypeError("plan must be a function of the number of workers, such as "
                        f"bp.plan.data_parallel, not {plan!r}")  # fmt: skip
    made = serial() if n == 1 else plan(n)
    if made.workers != n:
        raise ValueError(f"plan({n}) gave {made.name}, a plan for {made.workers} workers")
    return made


def _plan_name(plan: Plan, workers: int) -> str:
    """The plan's name with n for the number of workers."""
    return re.sub(rf"\b{workers}\b", "n", plan.name, count=1) if workers > 1 else plan.name
