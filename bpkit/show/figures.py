"""Figures by matplotlib: the timeline of a step, where its time goes, the speedup, a plan."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import cycle
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.patches import Patch
from matplotlib.transforms import blended_transform_factory

from bpkit.measure import Parts, Report, Scaling, table
from bpkit.plan import Action, Plan
from bpkit.run.cluster import TrainResult
from bpkit.show.drawing import INK, STYLE, TEXT, Drawing, alt_text, setup
from bpkit.show.looks import FILLS
from bpkit.trace import Trace

__all__ = ["alt_text", "breakdown", "plan", "setup", "speedup", "timeline"]

_WIDTH = 4.8  # inches: on a telephone's page its text is still 9 pixels tall
_CHARACTER = 0.078  # inches of one character of a label
_HATCH = "////"
_MARKERS = {"backward": "o", "communication": "s", "update": "D", "waiting_for_core": "^", "forward": "v", "other": "P"}


def timeline(what: Trace | TrainResult, step: int | None = None, ranks: Sequence[int] | None = None,
             unit: float | None = None) -> Drawing:  # fmt: skip
    """Draw one step: a lane a rank for its compute, and below it a thin one for its communication.

    Hatched: the row was blocked by communication (the exposed part); in a simulation also what is left of the step when
    a rank has nothing more to do.  The wait for a core is drawn at the end of its action: where in the action
    the core was elsewhere is not known.  Simulated traces have dashed outlines, and no communication where
    messages take no time.

    Parameters
    ----------
    what : Trace or TrainResult
    step : int, optional
        Training step; by default the recorded one whose duration is nearest to the median.
    ranks : sequence of int, optional
        Ranks to draw; all where None.
    unit : float, optional
        Seconds of one unit of the axis.  A simulation in whole tenths of seconds (as of `bpkit.simulate.Times` without
        arguments) is drawn in units of one second; everything else in milliseconds or microseconds.

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
    whole = int(chosen.end.max() - chosen.start.min())
    chosen = chosen.where(np.isin(chosen.rank, shown))
    span = whole if trace.simulated else int(chosen.end.max() - chosen.start.min())
    if trace.simulated and unit is None and not (chosen.start % 10**8).any() and not (chosen.end % 10**8).any():
        unit = 1.0
    factor, name = (1e6, "ms") if span >= 1e6 else (1e3, "us")
    if unit is not None:
        factor, name = 1e9 * unit, TEXT["units"]
    label = TEXT["time_simulated"].format(name) if trace.simulated else TEXT["time"].format(step, name)
    with rc_context(STYLE):
        figure = Drawing((_WIDTH, 1.0 + 0.5 * len(shown)))
        axes = figure.add_subplot()
        seen = _events(axes, chosen, shown, span, factor)
        axes.set_yticks(range(len(shown)), [TEXT["rank"].format(rank) for rank in shown])
        axes.set(xlim=(0, span / factor), ylim=(len(shown) - 0.4, -0.45), xlabel=label)
        axes.spines["left"].set_visible(False)
        axes.tick_params(axis="y", length=0)
        _legend(axes, seen)
    figure.alt = _timeline_words(chosen, step, shown, span)
    return figure


def _typical(trace: Trace) -> int:
    """The step whose duration is nearest to the median."""
    times = trace.step_times()
    return int(trace.steps[np.argmin(np.abs(times - np.median(times)))])


def _events(axes: Axes, trace: Trace, shown: list[int], span: int, factor: float) -> list[str]:
    """Draw all actions; return the kinds of what was drawn."""
    origin, seen = int(trace.start.min()), []
    outline: dict[str, Any] = {"linestyle": "--", "edgecolor": INK} if trace.simulated else {"edgecolor": "none"}
    inch = factor * (_WIDTH - 0.7) / span  # of a unit of the axis
    instant = trace.simulated and not (trace.end - trace.start)[[cell in _sends(trace) for cell in trace.cell]].any()
    lost = trace.waiting_for_core()
    for (rank, _, cell, start, end, wait), away in zip(trace.rows(), lost.tolist(), strict=True):
        action, lane = Action.parse(cell), shown.index(rank)
        compute = action.verb.stream == "compute"
        kind = action.verb.look
        if instant and (not compute or start + wait == end):
            continue
        left, right = (start + wait * compute - origin) / factor, (end - origin) / factor
        width = max(0.0, right - left)
        height, top = (0.44, lane - 0.35) if compute else (0.13, lane + 0.13)
        seen.append(kind)
        axes.broken_barh([(left, width)], (top, height), facecolor=FILLS[kind][0], linewidth=0.6, **outline)
        if away and compute:
            seen.append("waiting_for_core")
            core = FILLS["waiting_for_core"][0]
            axes.broken_barh([(right - away / factor, away / factor)], (top, height), facecolor=core, linewidth=0)
        if wait:
            seen.append("wait")
            _hatched(axes, (start - origin) / factor, wait / factor, lane)
        room = (width - away / factor) * inch
        fits = [text for text in (cell, "" if action.mb is None else str(action.mb)) if text and compute
                and room > _CHARACTER * len(text) + 0.02]  # fmt: skip
        if fits:
            seen += ["number"] * (fits[0] != cell)
            middle = left + (width - away / factor) / 2
            axes.text(middle, lane - 0.13, fits[0], color=FILLS[kind][1], ha="center", va="center")
    for lane, rank in enumerate(shown if trace.simulated else ()):
        last = int(trace.end[trace.rank == rank].max())
        if last < origin + span:
            seen.append("wait")
            _hatched(axes, (last - origin) / factor, (origin + span - last) / factor, lane)
    return seen


def _sends(trace: Trace) -> set[int]:
    """The cells that give something to the wire."""
    return {i for i, cell in enumerate(trace.cells) if Action.parse(cell).verb.bytes == "sent"}


def _hatched(axes: Axes, left: float, width: float, lane: int) -> None:
    colour = FILLS["exposed_communication"][0]
    style: dict[str, Any] = {"facecolor": "none", "edgecolor": colour, "hatch": _HATCH, "linewidth": 0}
    axes.broken_barh([(left, width)], (lane - 0.35, 0.44), **style)


def _timeline_words(trace: Trace, step: int, shown: Iterable[int], span: int) -> str:
    words = []
    for rank in shown:
        mine = trace.where(trace.rank == rank)
        cells = [mine.cells[i] for i in mine.cell[np.argsort(mine.start, kind="stable")]]
        listed = " ".join(cells[:24]) + (f" and {len(cells) - 24} more" if len(cells) > 24 else "")
        away = int(mine.waiting_for_core().sum())
        core = TEXT["timeline_core"].format(table.seconds(away / 1e9)) if away else ""
        words.append(TEXT["timeline_rank"].format(rank, listed, table.seconds(int(mine.wait.sum()) / 1e9), core))
    head = TEXT["timeline_alt"].format(step, len(words), table.seconds(span / 1e9))
    return " ".join([head + (f" ({TEXT['simulated']})" if trace.simulated else ""), *words])


def breakdown(what: Report | Scaling) -> Drawing:
    """Draw where the time of a step goes: a bar a rank of a report, or a worker count of a scaling measurement.

    The bar is the step time; the stripe at its foot is communication that was hidden under compute.
    """
    if isinstance(what, Report):
        steps = what.steps
        bars: list[tuple[str, Any]] = [(TEXT["mean"], what)] if what.workers > 1 else []
        bars += [(TEXT["rank"].format(r.rank), r) for r in what.ranks]
    else:
        steps = what.experiment["steps"] * what.experiment["repetitions"]
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
        axes.set(xlim=(0, 1.12 * longest * factor), ylim=(len(bars) - 0.5, -0.5))
        axes.set_xlabel(TEXT["step_time"].format(unit, steps))
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
        figure = Drawing((_WIDTH, 3.4))
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

    Widths stand for order, not for time: communication starts where it stands and runs beside what follows.  Long rows
    go on in a second band, below.
    """
    labels = [[str(action).replace("_", "_\n", 1) for action in row] for row in plan.rows]
    bands = _bands([max(_width(row[c]) for row in labels if c < len(row)) for c in range(max(map(len, plan.rows)))])
    lanes = len(plan.rows)
    with rc_context(STYLE):
        figure = Drawing((_WIDTH, 0.9 + 0.42 * (lanes + 0.4) * len(bands)))
        axes, seen, column = figure.add_subplot(), [], 0
        for band, widths in enumerate(bands):
            top = band * (lanes + 0.4)
            for lane, row in enumerate(plan.rows):
                left = 0.0
                for action, label, width in zip(row[column:], labels[lane][column:], widths, strict=False):
                    kind = action.verb.look
                    seen.append(kind)
                    axes.barh(top + lane, width - 0.04, 0.76, left + 0.02, color=FILLS[kind][0])
                    style: dict[str, Any] = {"color": FILLS[kind][1], "ha": "center", "va": "center", "fontsize": 9}
                    axes.text(left + width / 2, top + lane, label, linespacing=0.9, **style)
                    left += width
            column += len(widths)
        starts = [sum(map(len, bands[:band])) for band in range(len(bands))]
        places = [(band * (lanes + 0.4) + lane, TEXT["row"].format(lane)) for band, start in enumerate(starts)
                  for lane in range(lanes) if start < len(plan.rows[lane])]  # fmt: skip
        axes.set_yticks([at for at, _ in places], [name for _, name in places])
        axes.set(xlim=(0, max(map(sum, bands))), ylim=(len(bands) * (lanes + 0.4) - 0.9, -0.5), xlabel=TEXT["order"])
        axes.set_xticks([])
        axes.tick_params(axis="y", length=0)
        for spine in axes.spines.values():
            spine.set_visible(False)
        _legend(axes, seen)
    rows = [f"{TEXT['row'].format(i)}: {' '.join(map(str, row))}" for i, row in enumerate(plan.rows)]
    figure.alt = TEXT["plan_alt"].format(plan.name, "; ".join(rows) + ".")
    return figure


def _bands(widths: Sequence[float]) -> list[list[float]]:
    """The columns of a plan, parted where a line of the page is full."""
    bands: list[list[float]] = [[]]
    for width in widths:
        if bands[-1] and sum(bands[-1]) + width > _WIDTH - 0.7:
            bands.append([])
        bands[-1].append(width)
    return bands


def _width(label: str) -> float:
    """Inches that a label in a cell takes."""
    return 0.12 + _CHARACTER * max(map(len, label.split("\n")))


def _legend(axes: Axes, seen: Sequence[str]) -> None:
    """A legend of what was drawn, above the axes."""
    marks = [Patch(facecolor=FILLS[kind][0], label=TEXT[kind]) for kind in FILLS if kind in seen]
    if "wait" in seen:
        colour = FILLS["exposed_communication"][0]
        marks.append(Patch(facecolor="none", edgecolor=colour, hatch=_HATCH, linewidth=0, label=TEXT["wait"]))
    if "number" in seen:
        marks.append(Patch(alpha=0, label=TEXT["number"]))
    # From the left edge of the figure, whose width it does not change.
    figure = axes.get_figure(root=True)
    assert figure is not None
    at = blended_transform_factory(figure.transFigure, axes.transAxes)
    style: dict[str, Any] = {"loc": "lower left", "bbox_to_anchor": (0.02, 1.02), "bbox_transform": at, "ncols": 2}
    axes.legend(handles=marks, handlelength=1.2, borderpad=0, **style)
