"""Figures by matplotlib: the timeline of a step, where its time goes, the speedup, a plan."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import cycle
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.patches import Patch

from bpkit.measure import Parts, Report, Scaling, table
from bpkit.plan import Action, Plan
from bpkit.run.cluster import TrainResult
from bpkit.show.drawing import FILLS, INK, STYLE, TEXT, Drawing, alt_text, setup
from bpkit.trace import Trace

__all__ = ["alt_text", "breakdown", "plan", "setup", "speedup", "timeline"]

_WIDTH = 7.2  # inches, of the book's column
_CHARACTER = 0.075  # inches of one character of a label
_HATCH = "////"
_MARKERS = {"backward": "o", "communication": "s", "update": "D", "waiting_for_core": "^", "forward": "v", "other": "P"}


def timeline(what: Trace | TrainResult, step: int | None = None, ranks: Sequence[int] | None = None) -> Drawing:
    """Draw one step: a lane a rank for its compute, and below it a thin one for its communication.

    Hatched: the row was blocked by communication (the exposed part).  Simulated traces have dashed outlines.

    Parameters
    ----------
    what : Trace or TrainResult
    step : int, optional
        Training step; by default the recorded one whose duration is nearest to the median.
    ranks : sequence of int, optional
        Ranks to draw; all where None.

    Raises
    ------
    ValueError
        If the step or a rank is not in the trace.
    """
    trace = what if isinstance(what, Trace) else what.trace
    step = _typical(trace) if step is None else step
    if step not in trace.steps:
        raise ValueError(f"step {step} is not in the trace, which has steps {trace.steps.min()} to {trace.steps.max()}")
    shown = list(range(trace.ranks)) if ranks is None else list(ranks)
    if unknown := [rank for rank in shown if not 0 <= rank < trace.ranks]:
        raise ValueError(f"rank {unknown[0]} is not in the trace, which has ranks 0 to {trace.ranks - 1}")
    chosen = trace.at_step(step)
    chosen = chosen.where(np.isin(chosen.rank, shown))
    span = int(chosen.end.max() - chosen.start.min())
    factor, unit = (1e6, "ms") if span >= 1e6 else (1e3, "us")
    with rc_context(STYLE):
        figure = Drawing((_WIDTH, 0.9 + 0.55 * len(shown)))
        axes = figure.add_subplot()
        seen = _events(axes, chosen, shown, span / factor, factor)
        axes.set_yticks(range(len(shown)), [TEXT["rank"].format(rank) for rank in shown])
        axes.set(xlim=(0, span / factor), ylim=(len(shown) - 0.4, -0.45), xlabel=TEXT["time"].format(unit))
        axes.spines["left"].set_visible(False)
        axes.tick_params(axis="y", length=0)
        _legend(axes, seen, hatched=bool((chosen.wait > 0).any()))
        if trace.simulated:
            axes.set_title(TEXT["simulated"], loc="right", fontstyle="italic", fontsize=9)
    figure.alt = _timeline_words(chosen, step, shown, span)
    return figure


def _typical(trace: Trace) -> int:
    """The step whose duration is nearest to the median."""
    times = trace.step_times()
    return int(trace.steps[np.argmin(np.abs(times - np.median(times)))])


def _events(axes: Axes, trace: Trace, shown: list[int], span: float, factor: float) -> list[str]:
    """Draw all actions; return their kinds."""
    origin, seen = trace.start.min(), []
    outline = {"linestyle": "--", "edgecolor": INK, "alpha": 0.6} if trace.simulated else {"edgecolor": "none"}
    for rank, _, cell, start, end, wait in trace.rows():
        action, lane = Action.parse(cell), shown.index(rank)
        compute = action.verb.stream == "compute"
        kind = action.verb.look
        seen.append(kind)
        left = (start + wait * compute - origin) / factor
        width = max(0.0, (end - origin) / factor - left)
        height, top = (0.44, lane - 0.35) if compute else (0.13, lane + 0.13)
        axes.broken_barh([(left, width)], (top, height), facecolor=FILLS[kind][0], linewidth=0.6, **outline)
        if wait:
            blocked = ((start - origin) / factor, wait / factor)
            axes.broken_barh([blocked], (lane - 0.35, 0.44), facecolor="none", edgecolor=INK, hatch=_HATCH, linewidth=0)
        if compute and width / span * (_WIDTH - 1.2) > _CHARACTER * len(cell):
            axes.text(left + width / 2, lane - 0.13, cell, color=FILLS[kind][1], ha="center", va="center", fontsize=8)
    return seen


def _timeline_words(trace: Trace, step: int, shown: Iterable[int], span: int) -> str:
    words = []
    for rank in shown:
        mine = trace.where(trace.rank == rank)
        cells = [mine.cells[i] for i in mine.cell[np.argsort(mine.start, kind="stable")]]
        listed = " ".join(cells[:24]) + (f" and {len(cells) - 24} more" if len(cells) > 24 else "")
        words.append(TEXT["timeline_rank"].format(rank, listed, table.seconds(int(mine.wait.sum()) / 1e9)))
    head = TEXT["timeline_alt"].format(step, len(words), table.seconds(span / 1e9))
    return " ".join([head + (f" ({TEXT['simulated']})" if trace.simulated else ""), *words])


def breakdown(what: Report | Scaling) -> Drawing:
    """Draw where the time of a step goes: a bar a rank of a report, or a worker count of a scaling measurement.

    The bar is the step time; the stripe at its foot is communication that was hidden under compute.
    """
    if isinstance(what, Report):
        bars: list[tuple[str, Any]] = [(TEXT["mean"], what)] if what.workers > 1 else []
        bars += [(TEXT["rank"].format(r.rank), r) for r in what.ranks]
    else:
        bars = [(TEXT["serial"].format(1) if p.workers == 1 else str(p.workers), p) for p in what.points]
    names = list(Parts.__dataclass_fields__)
    longest = max(bar.parts.total for _, bar in bars)
    factor, unit = (1e3, "ms") if longest >= 1e-3 else (1e6, "us")
    with rc_context(STYLE):
        figure = Drawing((_WIDTH, 0.9 + 0.4 * len(bars)))
        axes = figure.add_subplot()
        for lane, (_, bar) in enumerate(bars):
            left = 0.0
            for name in names:
                width = getattr(bar.parts, name) * factor
                axes.barh(lane, width, 0.64, left, color=FILLS[name][0])
                left += width
            axes.text(left, lane, f" {table.seconds(bar.parts.total)}", va="center")
            if bar.hidden_communication > 0:
                wide = min(bar.hidden_communication * factor, left)
                axes.barh(lane + 0.25, wide, 0.14, 0, color=FILLS["hidden_communication"][0])
        axes.set_yticks(range(len(bars)), [label for label, _ in bars])
        axes.set(xlim=(0, 1.12 * longest * factor), ylim=(len(bars) - 0.5, -0.5), xlabel=TEXT["step_time"].format(unit))
        if isinstance(what, Scaling):
            axes.set_ylabel(TEXT["workers"])
        hidden = any(bar.hidden_communication > 0 for _, bar in bars)
        _legend(axes, [*names, *["hidden_communication"] * hidden])
    words = []
    for label, bar in bars:
        parts = ", ".join(f"{TEXT[name]} {table.seconds(getattr(bar.parts, name))}" for name in names)
        words.append(TEXT["breakdown_bar"].format(label, table.seconds(bar.parts.total), parts))
    figure.alt = TEXT["breakdown_alt"].format("; ".join(words) + ".")
    return figure


def speedup(*measured: Scaling, names: Sequence[str] | None = None) -> Drawing:
    """Draw speedup over the best serial run against the number of workers; bars span the quartiles.

    Parameters
    ----------
    *measured : Scaling
        One curve each.
    names : sequence of str, optional
        Their names in the legend; scaling and network where None.

    Raises
    ------
    ValueError
        If there is nothing to draw, or not one name for each.
    """
    if not measured:
        raise ValueError("speedup draws at least one measurement of bp.scaling")
    usual = [f"{m.experiment['scaling']}, {m.experiment['network']}" for m in measured]
    shown = usual if names is None else list(names)
    if len(shown) != len(measured):
        raise ValueError(f"{len(measured)} measurements but {len(shown)} names")
    most = max(p.workers for m in measured for p in m.points)
    with rc_context(STYLE):
        figure = Drawing((4.8, 3.4))
        axes = figure.add_subplot()
        axes.plot([1, most], [1, most], color=INK, linestyle="--", linewidth=1, label=TEXT["ideal"])
        for one, name, (kind, marker) in zip(measured, shown, cycle(_MARKERS.items()), strict=False):
            counts = [p.workers for p in one.points]
            values = np.array([p.speedup for p in one.points])
            # A step as short as the first quartile would be faster by median / q1.
            high = [p.speedup * (p.step_s.median / p.step_s.q1 - 1) for p in one.points]
            low = [p.speedup * (1 - p.step_s.median / p.step_s.q3) for p in one.points]
            axes.errorbar(counts, values, [low, high], color=FILLS[kind][0], marker=marker, capsize=3, label=name)
        axes.set(xlabel=TEXT["workers"], ylabel=TEXT["speedup"], ylim=(0, None), xlim=(0.8, most + 0.2))
        axes.set_xticks(sorted({p.workers for m in measured for p in m.points}))
        axes.legend()
    curves = [", ".join(TEXT["speedup_point"].format(p.speedup, p.workers) for p in one.points) for one in measured]
    words = [f"{name}: {curve}" for name, curve in zip(shown, curves, strict=True)]
    figure.alt = TEXT["speedup_alt"].format("; ".join(words) + ".")
    return figure


def plan(plan: Plan) -> Drawing:
    """Draw the grid of a plan: its rows, each action in a cell of its own, in the order of the row.

    Widths stand for order, not for time: communication starts where it stands and runs beside what follows.
    """
    labels = [[str(action).replace("_", "_\n", 1) for action in row] for row in plan.rows]
    columns = range(max(map(len, plan.rows)))
    widths = [max(_width(row[c]) for row in labels if c < len(row)) for c in columns]
    lefts = [sum(widths[:c]) for c in columns]
    with rc_context(STYLE):
        figure = Drawing((max(3.0, sum(widths) + 0.8), 0.9 + 0.42 * len(plan.rows)))
        axes = figure.add_subplot()
        seen = []
        for lane, row in enumerate(plan.rows):
            for action, label, left, width in zip(row, labels[lane], lefts, widths, strict=False):
                kind = action.verb.look
                seen.append(kind)
                axes.barh(lane, width - 0.04, 0.76, left + 0.02, color=FILLS[kind][0])
                style: dict[str, Any] = {"color": FILLS[kind][1], "ha": "center", "va": "center", "fontsize": 7.5}
                axes.text(left + width / 2, lane, label, **style)
        axes.set_yticks(range(len(plan.rows)), [TEXT["row"].format(i) for i in range(len(plan.rows))])
        axes.set(xlim=(0, sum(widths)), ylim=(len(plan.rows) - 0.5, -0.5), xlabel=TEXT["order"])
        axes.set_xticks([])
        axes.tick_params(axis="y", length=0)
        for spine in axes.spines.values():
            spine.set_visible(False)
        _legend(axes, seen)
    rows = [f"{TEXT['row'].format(i)}: {' '.join(map(str, row))}" for i, row in enumerate(plan.rows)]
    figure.alt = TEXT["plan_alt"].format(plan.name, "; ".join(rows) + ".")
    return figure


def _width(label: str) -> float:
    """Inches that a label in a cell takes."""
    return 0.18 + _CHARACTER * max(map(len, label.split("\n")))


def _legend(axes: Axes, seen: Sequence[str], hatched: bool = False) -> None:
    """A legend of the kinds that were drawn, above the axes."""
    marks = [Patch(facecolor=FILLS[kind][0], label=TEXT[kind]) for kind in FILLS if kind in seen]
    if hatched:
        marks.append(Patch(facecolor="none", edgecolor=INK, hatch=_HATCH, linewidth=0, label=TEXT["wait"]))
    style: dict[str, Any] = {"loc": "lower left", "bbox_to_anchor": (0, 1), "ncols": 3, "fontsize": 8}
    axes.legend(handles=marks, handlelength=1.2, borderpad=0, **style)
