"""Pictures of chapter 4.2: a block of a GPT, a mesh of ranks, and bars for what ranks hold."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.patches import FancyBboxPatch

from bpkit.plan import Mesh
from bpkit.show.drawing import INK, STYLE, Drawing
from bpkit.show.looks import FILLS

_WIDTH = 4.8  # inches: as of the figures of bpkit.show, so that text is nine pixels tall on a telephone
_SHADES = tuple(FILLS[name] for name in ("forward", "communication", "update", "backward"))


def _ground(width: float, height: float, inches: float) -> tuple[Drawing, Axes]:
    """A drawing with axes of these units and no frame."""
    figure = Drawing((_WIDTH, inches))
    axes = figure.add_subplot()
    axes.set(xlim=(0, width), ylim=(0, height))
    axes.axis("off")
    return figure, axes


def _box(axes: Axes, x: float, y: float, size: tuple[float, float], text: str,
         look: tuple[str, str] = ("none", INK)) -> None:  # fmt: skip
    """A box around its middle (x, y), with text in it."""
    (width, height), (fill, ink) = size, look
    place = (x - width / 2, y - height / 2)
    style = "round,pad=0,rounding_size=0.06"
    axes.add_patch(FancyBboxPatch(place, width, height, boxstyle=style, facecolor=fill, edgecolor=INK, linewidth=0.8))
    axes.text(x, y, text, ha="center", va="center", color=ink)


def _arrow(axes: Axes, start: tuple[float, float], end: tuple[float, float], bend: float = 0.0) -> None:
    look = {"arrowstyle": "->", "color": INK, "connectionstyle": f"arc3,rad={bend}"}
    axes.annotate("", end, start, arrowprops=look)


def draw_block() -> Drawing:
    """Draw the way through a block of a GPT: norm, attention and skip, then norm, two linear layers and skip."""
    halves = (("layer norm", "attention", "+"), ("layer norm", "linear", "GELU", "linear", "+"))
    wide = {"+": 0.5, "layer norm": 2.2, "attention": 2.0, "linear": 1.3, "GELU": 1.1}
    with rc_context(STYLE):
        figure, axes = _ground(10, 4.4, 2.3)
        for y, names in zip((3.1, 1.0), halves, strict=True):
            x, ends = 0.6, [(0.0, 0.1)]
            for name in names:
                look = _SHADES[0] if name in ("attention", "linear") else ("none", INK)
                _box(axes, x + wide[name] / 2, y, (wide[name], 0.7), name, look)
                ends.append((x, x + wide[name]))
                x += wide[name] + 0.5
            for (_, start), (end, _) in pairwise([*ends, (x + 0.1, 0)]):
                _arrow(axes, (start, y), (end, y))
            middle = sum(ends[-1]) / 2
            _arrow(axes, (0.35, y + 0.05), (middle, y + 0.4), bend=-0.25)
            axes.text((0.35 + middle) / 2, y + (1.0 if len(names) == 3 else 1.15), "skip", ha="center", color=INK)
        axes.text(8.0, 3.1, "then:", color=INK, va="center")
        axes.text(0.0, 0.2, "a vector for each token goes in, and one comes out", color=INK)
    figure.alt = ("A block of a GPT. A vector for each token passes a layer norm and attention, and is added to "
                  "itself; then it passes a layer norm, a linear layer, GELU and a linear layer, and is added again.")
    return figure


def draw_mesh(mesh: Mesh, *, host: int | None = None) -> Drawing:
    """Draw the ranks of a mesh: columns are pipeline stages, rows data replicas, and tensor ranks lie side by side.

    Parameters
    ----------
    mesh : Mesh
    host : int, optional
        Ranks of a host; ranks of one host then have one fill.
    """
    columns, rows = mesh.pipeline * mesh.tensor, mesh.data
    with rc_context(STYLE):
        figure, axes = _ground(10, rows + 0.9, 0.62 * rows + 0.6)
        step = 8.6 / columns
        for at in mesh.coordinates():
            rank = mesh.rank(at)
            x = 1.4 + step * (at.pipeline * mesh.tensor + at.tensor + 0.5) + 0.12 * at.pipeline
            text = f"rank {rank}" if columns < 8 else str(rank)
            look = ("none", INK) if host is None else _SHADES[rank // host % len(_SHADES)]
            _box(axes, x, rows - 0.5 - at.data, (0.86 * step, 0.7), text, look)
        for pipeline in range(mesh.pipeline):
            x = 1.4 + step * mesh.tensor * (pipeline + 0.5) + 0.12 * pipeline
            axes.text(x, rows + 0.3, f"stage {pipeline}", ha="center", color=INK)
        for data in range(mesh.data):
            axes.text(0, rows - 0.5 - data, f"shard {data}", va="center", color=INK)
    said = "; ".join(f"rank {mesh.rank(at)}: stage {at.pipeline}, part {at.tensor}, shard {at.data}"
                     for at in mesh.coordinates())  # fmt: skip
    figure.alt = f"A mesh of {mesh}. {said}." + (f" Hosts of {host} ranks." if host else "")
    return figure


def draw_bars(groups: Mapping[str, Mapping[str, float]], unit: str, *, line: float | None = None) -> Drawing:
    """Draw bars side by side: a group for each entry, in it a bar for each name.

    Parameters
    ----------
    groups : mapping of str to mapping of str to float
        Values by group and name; the names are those of the legend.
    unit : str
        Of the values, as the axis says it.
    line : float, optional
        A line across, such as 1 for equal.

    Raises
    ------
    ValueError
        If there is nothing to draw.
    """
    if not groups or not all(groups.values()):
        raise ValueError('draw_bars draws at least one value of each group, as in {"GPipe": {"rank 0": 8}}')
    names = list(dict.fromkeys(name for values in groups.values() for name in values))
    with rc_context(STYLE):
        figure = Drawing((_WIDTH, 0.6 + 0.2 * len(groups) * (len(names) + 0.8)))
        axes = figure.add_subplot()
        high = 0.8 / len(names)
        for number, name in enumerate(names):
            places = [group + high * (number - (len(names) - 1) / 2) for group in range(len(groups))]
            values = [each.get(name, 0.0) for each in groups.values()]
            axes.barh(places, values, 0.92 * high, color=_SHADES[number % len(_SHADES)][0], label=name)
            for place, value in zip(places, values, strict=True):
                axes.text(value, place, f" {value:,.0f}" if value >= 100 else f" {value:.3g}", va="center", fontsize=9)
        axes.set_yticks(range(len(groups)), list(groups))
        axes.invert_yaxis()
        axes.set_xlabel(unit)
        axes.margins(x=0.14)
        if line is not None:
            axes.axvline(line, color=INK, linestyle="--", linewidth=0.8)
        if len(names) > 1:
            axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=len(names))
    said = "; ".join(f"{group}: " + ", ".join(f"{name} {value:.3g}" for name, value in each.items())
                     for group, each in groups.items())  # fmt: skip
    figure.alt = f"Bars, {unit}. {said}."
    return figure
