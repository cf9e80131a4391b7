"""Pictures of chapter 4.1: stacked bars, what is in a bucket, ratios with intervals, curves and grids."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.ticker import NullFormatter

from bpkit.course.figures.pictures import WIDTH
from bpkit.show.drawing import FILLS, INK, STYLE, TEXT, Drawing

#: The looks of what a worker keeps, as in `draw_zero`, and of the parts of a step.
_LOOKS = {**FILLS, "parameters": FILLS["forward"], "gradients": FILLS["backward"],
          "optimizer": FILLS["waiting_for_core"]}  # fmt: skip
_CYCLE = ("#3a73ad", "#d0622f", "#5b8f4d", "#8a63a8", "#c9932f", "#2f8f95", "#9aa1a9")
_MARKERS = "osD^vPX"


def draw_stacks(stacks: Mapping[str, Mapping[str, float]], label: str) -> Drawing:
    """Bars side by side, each of parts on top of one another; known parts have their own colours."""
    names = list(dict.fromkeys(part for stack in stacks.values() for part in stack))
    look = {name: _LOOKS.get(name, (_CYCLE[i % len(_CYCLE)],))[0] for i, name in enumerate(names)}
    with rc_context(STYLE):
        figure = Drawing((WIDTH, 2.6))
        axes = figure.add_subplot()
        bottom = np.zeros(len(stacks))
        for name in names:
            values = np.array([stack.get(name, 0.0) for stack in stacks.values()])
            axes.bar(range(len(stacks)), values, 0.6, bottom, color=look[name], label=TEXT.get(name, name))
            bottom += values
        for at, total in enumerate(bottom):
            axes.text(at, total, f"{total:.3g}", ha="center", va="bottom")
        axes.set_xticks(range(len(stacks)), list(stacks))
        axes.set_ylabel(label)
        axes.legend(loc="lower left", bbox_to_anchor=(-0.1, 1.02), ncols=3, columnspacing=1, handlelength=1.4)
    said = {name: ", ".join(f"{part} {value:.3g}" for part, value in stack.items()) for name, stack in stacks.items()}
    figure.alt = f"{label}. " + " ".join(f"{name}: {text}." for name, text in said.items())
    return figure


def draw_buckets(rows: Mapping[str, Sequence[Sequence[tuple[str, float]]]]) -> Drawing:
    """Which tensors go together: a line a way of cutting, a block a tensor as wide as it is large, a colour a bucket.

    Parameters
    ----------
    rows : mapping of str to sequence of buckets
        A bucket is a list of (name, megabytes) in the order in which it is reduced.
    """
    with rc_context(STYLE):
        figure = Drawing((WIDTH, 0.5 + 0.45 * len(rows)))
        axes = figure.add_subplot()
        for y, buckets in enumerate(rows.values()):
            left = 0.0
            for nth, bucket in enumerate(buckets):
                for name, size in bucket:
                    axes.barh(y, size, 0.6, left, color=_CYCLE[nth % len(_CYCLE)], edgecolor="#ffffff", linewidth=0.6)
                    if size > 1:
                        axes.text(left + size / 2, y, name, ha="center", va="center", color="#ffffff", fontsize=9)
                    left += size
        axes.set_yticks(range(len(rows)), list(rows))
        axes.set(ylim=(len(rows) - 0.5, -0.5), xlabel="megabytes of gradient, in the order of reduction")
        axes.tick_params(axis="y", length=0)
    figure.alt = " ".join(f"{name}: {len(buckets)} buckets of " + ", ".join(
        f"{sum(size for _, size in bucket):.2f} MB" for bucket in buckets) + "." for name, buckets in rows.items())
    return figure


def draw_grid(values: Any, rows: Sequence[str], columns: Sequence[str], title: str = "") -> Drawing:
    """Shares from 0 to 1 as a grid of coloured cells with their percentage in them.

    Parameters
    ----------
    values : array_like, shape (rows, columns, draws)
        Of each cell the median is drawn, and written with the least and the largest draw.
    """
    cells = np.asarray(values, dtype=float)
    middle = np.median(cells, axis=2)
    with rc_context(STYLE):
        figure = Drawing((WIDTH, 0.8 + 0.48 * len(rows)), layout="constrained")
        axes = figure.add_subplot()
        axes.imshow(middle, cmap="cividis", vmin=0, vmax=1, aspect="auto")
        for y, x in np.ndindex(middle.shape):
            low, high = cells[y, x].min(), cells[y, x].max()
            text = f"{100 * middle[y, x]:.0f}\n{100 * low:.0f} to {100 * high:.0f}"
            axes.text(x, y, text, ha="center", va="center", color="#101418" if middle[y, x] > 0.55 else "#ffffff")
        axes.set_xticks(range(len(columns)), columns)
        axes.set_yticks(range(len(rows)), rows)
        axes.tick_params(length=0)
        axes.set_title(title, fontsize=9.5)
        axes.spines[:].set_visible(False)
    figure.alt = f"{title}. " + " ".join(
        f"{row}, {column}: {middle[y, x]:.0%}." for y, row in enumerate(rows) for x, column in enumerate(columns))
    return figure


def draw_curves(points: Mapping[str, Sequence[tuple[float, float]]], x: str, y: str,
                lines: Mapping[str, Sequence[tuple[float, float]]] | None = None) -> Drawing:  # fmt: skip
    """Measured points, and where given the line that was predicted for each, on two logarithmic axes."""
    with rc_context(STYLE):
        figure = Drawing((WIDTH, 3.0))
        axes = figure.add_subplot()
        for nth, (name, pairs) in enumerate(points.items()):
            colour, marker = _CYCLE[nth % len(_CYCLE)], _MARKERS[nth % len(_MARKERS)]
            axes.plot(*zip(*pairs, strict=True), marker, color=colour, label=name)
            if lines and name in lines:
                axes.plot(*zip(*lines[name], strict=True), "--", color=colour, linewidth=1)
        axes.set(xscale="log", yscale="log", xlabel=x, ylabel=y)
        for axis in (axes.xaxis, axes.yaxis):  # no exponents, whose text is too small
            axis.set_major_formatter("{x:g}")
            axis.set_minor_formatter(NullFormatter() if axis is axes.xaxis else "{x:g}")
        axes.legend(loc="lower left", bbox_to_anchor=(-0.1, 1.02), ncols=3, columnspacing=1, handlelength=1.4)
    figure.alt = f"{y} by {x}. " + " ".join(
        f"{name}: {', '.join(f'{b:.3g} at {a:.3g}' for a, b in pairs)}." for name, pairs in points.items())
    return figure


def draw_ratios(found: Sequence[tuple[str, Mapping[str, Any]]], label: str) -> Drawing:
    """Ratios with their intervals, a group for each size; the line at 1 is where two do not differ.

    Parameters
    ----------
    found : sequence of (str, mapping of str to Ratio)
        Name of a size, and the ratios by system.
    """
    names = list(found[0][1])
    with rc_context(STYLE):
        figure = Drawing((WIDTH, 2.6))
        axes = figure.add_subplot()
        axes.axhline(1, color=INK, linewidth=0.8, linestyle="--")
        for nth, name in enumerate(names):
            at = np.arange(len(found)) + 0.12 * (nth - (len(names) - 1) / 2)
            ratios = [ratios[name] for _, ratios in found]
            middle = np.array([one.median for one in ratios])
            ends = np.array([[one.median - one.low, one.high - one.median] for one in ratios]).T
            axes.errorbar(at, middle, ends, fmt=_MARKERS[nth], color=_CYCLE[nth], capsize=3, label=name)
        axes.set_xticks(range(len(found)), [name for name, _ in found])
        axes.set_ylabel(label)
        axes.legend(loc="lower left", bbox_to_anchor=(-0.1, 1.02), ncols=3, columnspacing=1, handlelength=1.4)
    figure.alt = f"{label}. " + " ".join(
        f"{size}: {', '.join(f'{name} {one}' for name, one in ratios.items())}." for size, ratios in found)
    return figure
