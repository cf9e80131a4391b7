"""The pipeline explorer: schedules from the naive split to zero bubble, simulated, and measured beside it."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import traitlets

from bpkit.course.figures.explorers import Explorer, bundle, stylesheet
from bpkit.course.figures.schedules import FORMAT, equal_stages, schedules
from bpkit.data import Dataset, digits
from bpkit.measure.pipeline import makespan, period
from bpkit.nn import Network
from bpkit.plan import Plan, gpipe, interleaved, liveness, naive, one_f_one_b, zb_v, zero_bubble_h1, zero_bubble_h2
from bpkit.plan.checker.check import order
from bpkit.simulate import Times, simulate

#: The schedules that the figure offers, in its order: each gives the plan of p ranks and m microbatches.
SCHEDULES: dict[str, Callable[[int, int], Plan]] = {
    "naive": lambda p, m: naive(p), "gpipe": gpipe, "one_f_one_b": one_f_one_b, "interleaved": interleaved,
    "zero_bubble_h1": zero_bubble_h1, "zero_bubble_h2": zero_bubble_h2, "zb_v": zb_v,
}  # fmt: skip
WORKERS, MICROBATCHES = range(1, 5), range(1, 9)
#: Units that a pass takes, of a rank's whole share of one microbatch.
UNITS = {"F": 1, "B": 2, "I": 1, "W": 1}
#: Modules of the figure, each after those that it imports.
MODULES = ("text", "dom", "data", "describe", "controls", "predict", "pipelines_words", "pipelines_view",
           "pipelines_lanes", "pipelines_panels", "pipelines")  # fmt: skip


def formulas(name: str, p: int, m: int) -> tuple[float | None, list[float] | None]:
    """Bubble of a step and peak of stored activations by rank, as `bpkit.plan.gpipe` and others say for F = I = W = 1.

    None where the formula does not hold.  The naive split is of the whole batch, so a pass takes m units.
    """
    bubble = {"naive": 3.0 * m * (p - 1), "gpipe": 3.0 * (p - 1), "one_f_one_b": 3.0 * (p - 1)}
    bubble |= {"interleaved": 1.5 * (p - 1)} if m % p == 0 else {}
    bubble |= {"zero_bubble_h1": p - 1.0} if m >= p else {}
    bubble |= {"zero_bubble_h2": 0.0, "zb_v": 0.0} if m >= 2 * p - 1 else {}
    rank = {"naive": lambda r: m, "gpipe": lambda r: m, "one_f_one_b": lambda r: min(m, p - r),
            "zero_bubble_h1": lambda r: min(m, p), "zero_bubble_h2": lambda r: min(m, 2 * p - 1)}  # fmt: skip
    rank |= {"interleaved": lambda r: (2 * (p - r - 1) + p + 1) / 2} if m % p == 0 and m > p else {}
    rank |= {"zb_v": lambda r: p} if m >= 2 * p - 1 else {}
    return bubble.get(name), [float(rank[name](r)) for r in range(p)] if name in rank else None


def film(name: str, p: int, m: int) -> dict[str, Any]:
    """One schedule, simulated in units of a forward of one microbatch through a rank's whole share of the network.

    Returns
    -------
    dict
        ``plan``: its name.  ``unit``: what 1 means in ``begin``.  For each rank: ``rows``, its passes; ``begin``, when
        they begin in the first step; ``needs``, the number (over all ranks) of the pass on another rank whose message a
        pass is the first to read, -1 for none; ``peak``, stored activations in microbatches.  ``makespan`` of the first
        step, ``period`` from each step to the next, and the `formulas`.
    """
    plan = SCHEDULES[name](p, m)
    unit = float(m) if name == "naive" else p / plan.stages
    trace = simulate(plan, Times(unit, unit, unit))
    passes = [[i for i, action in enumerate(row) if action.kind in UNITS] for row in plan.rows]
    numbers = {place: n for n, place in enumerate((rank, i) for rank, row in enumerate(passes) for i in row)}

    first = [trace.where((trace.rank == rank) & (trace.step == 0)) for rank in range(p)]
    starts = [(mine.start + mine.wait) / (1e9 * unit) for mine in first]
    needs = {(rank, i): numbers[source] for rank, i, source in _messages(plan)}
    bubble, stored = formulas(name, p, m)
    return {"name": name, "p": p, "m": m, "plan": plan.name, "unit": unit,
            "begin": [[round(start[i]) for i in row] for start, row in zip(starts, passes, strict=True)],
            "rows": [" ".join(str(plan.rows[rank][i]) for i in row) for rank, row in enumerate(passes)],
            "needs": [[needs.get((rank, i), -1) for i in row] for rank, row in enumerate(passes)],
            "messages": sum(action.verb.bytes == "sent" for row in plan.rows for action in row),
            "makespan": makespan(trace), "period": period(trace), "formula": {"bubble": bubble, "peak": stored},
            "peak": [unit * liveness.peak_activations(row) for row in plan.rows]}  # fmt: skip


def _messages(plan: Plan) -> Iterator[tuple[int, int, tuple[int, int]]]:
    """For each message between passes: rank and index of the first to wait for it, and of the pass that gave it."""
    waits = [liveness.waits(row, plan) for row in plan.rows]
    for (sender, send), (rank, receive) in (ends for ends in order(plan) if len(ends) == 2):
        gave = max(i for i in waits[sender][send] if plan.rows[sender][i].verb.stream == "compute")
        takes = (i for i, action in enumerate(plan.rows[rank]) if action.kind in UNITS and receive in waits[rank][i])
        yield rank, next(takes), (sender, gave)


class Pipelines(Explorer):
    """The figure of pipeline schedules; made by `pipelines`, which describes it.

    What the reader does is synced: ``schedule``, ``workers``, ``microbatches``, ``ahead`` (the next step is shown too),
    ``prediction`` (by "gpipe/4/8": ``{"period": 33, "bubble": 27}``), ``shown`` (the same keys, of answers that were
    asked for), ``skipped`` (all answers are shown) and ``own`` (what was measured with the button).
    """

    _esm = bundle(*MODULES)
    _css = stylesheet("explorer") + stylesheet("pipelines")

    films: Any = traitlets.List().tag(sync=True)
    units: Any = traitlets.Dict(UNITS).tag(sync=True)
    schedule = traitlets.Unicode().tag(sync=True)
    microbatches = traitlets.Int().tag(sync=True)
    ahead = traitlets.Bool(False).tag(sync=True)
    shown = traitlets.List(traitlets.Unicode()).tag(sync=True)
    skipped = traitlets.Bool(False).tag(sync=True)

    def __repr__(self) -> str:
        return f"Pipelines({self.schedule}, {self.workers} ranks, {self.microbatches} microbatches)"

    def _checked(self, found: Any) -> dict[str, Any]:
        return _measurement(found, "the new measurement")


def _measurement(found: Any, source: str) -> dict[str, Any]:
    if not isinstance(found, dict) or found.get("format") != FORMAT:
        raise ValueError(f'{source} is not a measurement of pipelines: its "format" must be "{FORMAT}"')
    return found


def _load(path: Path) -> list[dict[str, Any]]:
    paths = sorted(path.glob("pipelines-*.json")) if path.is_dir() else [path] * path.is_file()
    if not paths:
        raise ValueError(f"there is no measurement of pipelines in {path}")
    return [_measurement(json.loads(one.read_text(encoding="utf-8")), one.name) for one in paths]


def pipelines(
    measurements: str | Path | None = None, schedule: str = "gpipe", workers: int = 4, microbatches: int = 8, *,
    network: Network | None = None, data: Dataset | None = None, revealed: bool = False,
) -> Pipelines:  # fmt: skip
    """An interactive figure of pipelines: the timeline of a schedule, what each pass waits for, and what it costs.

    The reader chooses the schedule, 1 to 4 ranks and 1 to 8 microbatches, predicts the time of a step and the share of
    the bubble, and then looks at the simulated timeline, in units of a forward, with what was measured under it.  Every
    state is also said in words and as a table.  In JupyterLab, Measure runs the chosen plan on real workers.

    Parameters
    ----------
    measurements : path, optional
        A file that ``tools/record.py`` recorded, or a folder with such files named ``pipelines-*.json``.
    schedule, workers, microbatches
        To open with; a schedule is one of `SCHEDULES`.
    network, data : optional
        What Measure trains: `bpkit.course.figures.schedules.equal_stages` on digits where not given.
    revealed : bool
        Show the timeline without asking for a prediction.

    Raises
    ------
    ValueError
        If there is no such schedule, number or measurement.
    """
    films = [film(name, p, m) for name in SCHEDULES for p in WORKERS for m in MICROBATCHES]
    if (schedule, workers, microbatches) not in [(one["name"], one["p"], one["m"]) for one in films]:
        raise ValueError(f"no {schedule!r} of {workers} ranks and {microbatches} microbatches: choose one of "
                         f"{', '.join(SCHEDULES)}, 1 to 4 ranks and 1 to 8 microbatches")  # fmt: skip

    def run(scaling: str = "", **live: Any) -> dict[str, Any]:
        plan = SCHEDULES[figure.schedule](figure.workers, figure.microbatches)
        return schedules(network or equal_stages(), data or digits(), [plan], **live)

    figure = Pipelines(run, films=films, schedule=schedule, workers=workers, microbatches=microbatches,
                       recorded=_load(Path(measurements)) if measurements else [], skipped=revealed)  # fmt: skip
    return figure
