"""Pictures that chapters show before their tables: who sends what to whom, who holds what, what is cut.

Each is drawn from a plan, a mesh or a network, none by hand; each is a `bpkit.show.drawing.Drawing`, which a notebook
shows as SVG and which says in words what it shows (``figure.alt``).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.patches import Circle, FancyArrowPatch, Patch, Rectangle

from bpkit.description.layers import Linear
from bpkit.description.network import Described
from bpkit.description.tensor import Piece, cut
from bpkit.measure.messages import Message, messages
from bpkit.plan import Mesh, Plan, data_parallel, zero
from bpkit.plan.memory import Memory
from bpkit.plan.mesh import Coordinate
from bpkit.plan.program import compile, compile_collective
from bpkit.show.drawing import INK, STYLE, Drawing
from bpkit.show.looks import FILLS

#: Every word in a picture stands here: a translation is one more catalogue.
WORDS = {
    "added": "sent, and added to what is there", "stored": "sent, and stored", "step": "step {0}", "rank": "rank {0}",
    "messages": "{0}: who sends to whom. {1}", "one": "Step {0}: {1}.", "sends": "rank {0} to {1}{2}",
    "parameters": "parameters", "gradients": "gradients", "optimizer": "optimizer state", "level": "level {0}",
    "zero": "What each of {0} ranks keeps, by ZeRO level. {1}", "zero_one": "Level {0}: {1} a rank ({2})",
    "bytes": "kept by a rank", "data": "data", "pipeline": "pipeline", "tensor": "tensor",
    "mesh": "Ranks on the mesh {0}. {1}", "axis": "On the {0} axis go together {1}",
    "columns": "cut by columns", "rows": "cut by rows", "whole": "whole on every rank",
    "split": "Which part of each matrix a rank has. {0}", "split_one": "Layer {0}, {1} x {2}, {3}",
    "updates": "update of the server, in order", "worker": "worker {0}", "behind": "number: updates made meanwhile",
    "staleness": "From reading the weights to the update with the gradient. {0}",
    "stale_one": "Update {0}, by worker {1}, is {2} behind", "holds": "stage {0}",
    "tie": "{0}: gradients are added", "copy": "{0}: one copy on one rank",
    "ties": "Stages that share a tensor. {0}", "ties_one": "{0}: stages {1}", "nothing": "No tensor is on two stages",
    "all": "all tokens, some of the columns", "own": "own tokens, all columns", "everything": "all tokens, all columns",
    "tokens": "Tokens on {0} tensor ranks. {1}", "tokens_one": "stage {0}: {1}", "stages": "stages, in order",
}  # fmt: skip
WIDTH = 4.8  # inches: as of the figures of bpkit.show, so that its text is nine pixels tall on a telephone
_ADDED, _STORED = FILLS["communication"][0], FILLS["update"][0]
#: Fills that tell ranks apart.
RANKS = tuple(FILLS[name][0] for name in ("forward", "weight_half", "waiting_for_core", "input_half"))


def blank(height: float, across: int = 1, down: int = 1) -> tuple[Drawing, list[Axes]]:
    """A drawing of empty panels, row by row."""
    figure = Drawing((WIDTH, height), layout="constrained")
    made = figure.subplots(down, across, squeeze=False)
    for axes in made.flat:
        axes.set_axis_off()
    return figure, list(made.flat)


def legend(figure: Drawing, entries: dict[str, str], across: int = 2) -> None:
    """A legend of fills by their words, under the panels."""
    marks = [Patch(facecolor=fill, label=words) for words, fill in entries.items()]
    figure.legend(handles=marks, loc="outside lower left", ncols=across, handlelength=1.2)


# -- who sends what to whom


def draw_messages(plan: Plan, each: bool = True) -> Drawing:
    """Draw a collective, such as ``bp.plan.collective("ring", 4)``: an arrow for each message, a panel for each step.

    Where every rank gives its sum to one other (a server, a tree) the ranks stand in the levels of that tree, hosts of
    a hierarchical merge beside each other, all others in a circle.  Messages that can travel at the same time
    are of one step.

    Parameters
    ----------
    plan : Plan
        A collective by itself, of 2 to 16 ranks.
    each : bool
        A panel for each step, with the part of the vector beside its arrow (a part i of n is written ``i``); else one
        panel with all arrows.

    Raises
    ------
    ValueError
        If the plan trains.
    """
    parts = math.lcm(*(a.part.of for row in plan.rows for a in row if a.part is not None), 1)
    found = messages(compile_collective(plan, parts, 4), lambda *_: 1.0)
    adds = {m: plan.rows[m.to][m.receive].kind == "ADD_G" for m in found}
    steps = sorted({round(m.start) for m in found})
    shown = [[m for m in found if round(m.start) == step] for step in steps] if each else [found]
    places = _places(plan, [m for m in found if adds[m]])
    across = min(len(shown), 3 if plan.workers <= 8 else 2)
    down = -(-len(shown) // across)
    with rc_context(STYLE):
        figure, panels = blank(0.5 + (WIDTH / across) * down * (1.0 if across > 1 else 0.6), across, down)
        for step, (axes, some) in enumerate(zip(panels, shown, strict=False)):
            _network(axes, places, some, adds, plan if each else None)
            if each and len(shown) > 1:
                axes.set_title(WORDS["step"].format(step + 1), fontsize=9.5)
        kinds = [(WORDS["added"], _ADDED, True), (WORDS["stored"], _STORED, False)]
        legend(figure, {words: fill for words, fill, which in kinds if which in adds.values()})
    said = [WORDS["one"].format(i + 1, ", ".join(_said(plan, m) for m in found if round(m.start) == step))
            for i, step in enumerate(steps)]  # fmt: skip
    figure.alt = WORDS["messages"].format(plan.name, " ".join(said))
    return figure


def _said(plan: Plan, message: Message) -> str:
    part = _part(plan, message)
    return WORDS["sends"].format(message.source, message.to, f" (part {part})" if part else "")


def _part(plan: Plan, message: Message) -> str:
    """The part of the vector that travels, without what it is of; nothing where the whole does."""
    part = plan.rows[message.source][message.send].part
    return "" if part is None or part.hi - part.lo == part.of else str(part)[1:-1].split("/")[0]


def _places(plan: Plan, added: Sequence[Message]) -> list[tuple[float, float]]:
    """Where each rank stands, in a square from -1 to 1."""
    n, gives = plan.workers, dict[int, set[int]]()
    for message in added:
        gives.setdefault(message.source, set()).add(message.to)
    roots = [rank for rank in range(n) if rank not in gives]
    if len(roots) == 1 and all(len(to) == 1 for to in gives.values()):
        depth = [0] * n
        for rank in range(n):
            at = rank
            while at != roots[0]:
                (at,) = gives[at]
                depth[rank] += 1
        levels = [[rank for rank in range(n) if depth[rank] == level] for level in range(max(depth) + 1)]
        return [_on_line(levels[depth[rank]].index(rank), len(levels[depth[rank]]),
                         depth[rank], len(levels)) for rank in range(n)]  # fmt: skip
    if plan.name.startswith("hierarchical"):
        # Ranks of a host stand below each other: those that exchange first.
        early = [abs(m.to - m.source) for m in added if round(m.start) == 0]
        size = 1 + max(early, default=0)
        size = next((k for k in range(size, n + 1) if n % k == 0), n)
        return [_on_line(rank // size, n // size, rank % size, size) for rank in range(n)]
    return [(math.sin(2 * math.pi * rank / n), math.cos(2 * math.pi * rank / n)) for rank in range(n)]


def _on_line(i: int, n: int, level: int, levels: int) -> tuple[float, float]:
    return ((2 * i + 1) / n - 1) * 1.1, 1 - 2 * level / max(1, levels - 1)


def _network(axes: Axes, places: Sequence[tuple[float, float]], some: Sequence[Message], adds: dict[Message, bool],
             plan: Plan | None) -> None:  # fmt: skip
    """Ranks as circles, and an arrow for each message; with a plan also the part that travels."""
    radius = 0.26 if len(places) <= 8 else 0.17
    axes.set(xlim=(-1.4, 1.4), ylim=(-1.4, 1.4), aspect="equal")
    pairs = {(m.source, m.to): m for m in some}
    for (source, to), message in pairs.items():
        (x0, y0), (x1, y1) = places[source], places[to]
        length = math.hypot(x1 - x0, y1 - y0)
        ux, uy = (x1 - x0) / length, (y1 - y0) / length
        bent = 0.18 if (to, source) in pairs or length > 1.5 else 0.0
        fill = _ADDED if adds[message] else _STORED
        axes.add_patch(FancyArrowPatch(
            (x0 + ux * radius, y0 + uy * radius), (x1 - ux * radius, y1 - uy * radius), arrowstyle="-|>",
            mutation_scale=9, color=fill, linewidth=1.4, shrinkA=0, shrinkB=0,
            connectionstyle=f"arc3,rad={bent}"))  # fmt: skip
        if plan is not None and (words := _part(plan, message)):
            off, along = 0.14 + bent * length * 0.42, 0.5 if length <= 1.5 else 0.34  # long ones cross in the middle
            axes.text(x0 + along * (x1 - x0) + uy * off, y0 + along * (y1 - y0) - ux * off, words, color=INK,
                      ha="center", va="center", fontsize=9)  # fmt: skip
    for rank, place in enumerate(places):
        axes.add_patch(Circle(place, radius, facecolor=FILLS["forward"][0], edgecolor="none", zorder=3))
        style: dict[str, Any] = {"ha": "center", "va": "center", "zorder": 4, "fontsize": 9.5}
        axes.text(*place, str(rank), color=FILLS["forward"][1], **style)


# -- who holds what


def draw_zero(network: Described, workers: int = 4, states: int = 2, units: int | None = None,
              levels: Sequence[int] = (0, 1, 2, 3)) -> Drawing:  # fmt: skip
    """Draw what each rank keeps under ZeRO levels 0 (plain data parallelism) to 3: a column of blocks a level.

    Heights are bytes, from the library's calculation of memory (`bpkit.plan.memory`); the part of a block that a
    rank does not keep is outlined.  Activations are not in it.

    Parameters
    ----------
    network : Network or Description
    workers : int
    states : int
        Numbers that the optimizer keeps for each parameter: 2 for Adam, 1 for momentum.
    units : int, optional
        Units that level 2 and 3 work with, one after the other; eight where None, or one a layer if that is fewer.
    levels : sequence of int
    """
    names = ("parameters", "gradients", "optimizer")
    units, kept = units or min(8, len(network.description.layers)), []
    for level in levels:
        plan = zero(workers, level, units=units) if level else data_parallel(workers, units)
        memory = Memory(compile(plan, network), network.description, 1)
        kept.append([memory.kept(at, states) for at in plan.mesh.coordinates()])
    whole = {name: max(own[name] for own in kept[0]) for name in names}
    tall = max(sum(max(own[name], whole[name]) for name in names) for ranks in kept for own in ranks)
    fills = dict(zip(names, (FILLS["forward"][0], FILLS["backward"][0], FILLS["waiting_for_core"][0]), strict=True))
    with rc_context(STYLE):
        figure, (axes,) = blank(2.9)
        for column, ranks in enumerate(kept):
            for rank, own in enumerate(ranks):
                left, bottom = column * (workers + 1.0) + rank, 0.0
                for name in names:
                    axes.add_patch(Rectangle((left, bottom), 0.86, whole[name], facecolor="none", edgecolor=fills[name],
                                             linewidth=0.8, linestyle=":"))  # fmt: skip
                    axes.add_patch(Rectangle((left, bottom), 0.86, own[name], facecolor=fills[name]))
                    bottom += max(own[name], whole[name])  # level 1 keeps its part of the sum beside its gradients
            total = max(sum(own[name] for name in names) for own in ranks)
            middle = column * (workers + 1.0) + workers / 2 - 0.07
            words = f"{WORDS['level'].format(levels[column])}\n{_bytes(total)}"
            axes.text(middle, -0.03 * tall, words, color=INK, ha="center", va="top")
        axes.set(xlim=(-0.2, len(kept) * (workers + 1.0) - 0.8),
                 ylim=(-0.22 * tall, 1.02 * tall))  # fmt: skip
        legend(figure, {WORDS[name]: fills[name] for name in names}, 3)
    said = [WORDS["zero_one"].format(level, _bytes(max(sum(own[name] for name in names) for own in ranks)), ", ".join(
                f"{WORDS[name]} {_bytes(max(own[name] for own in ranks))}" for name in names))
            for level, ranks in zip(levels, kept, strict=True)]  # fmt: skip
    figure.alt = WORDS["zero"].format(workers, "; ".join(said) + ".")
    return figure


def _bytes(size: float) -> str:
    unit, factor = next(((unit, f) for unit, f in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)) if size >= f), ("B", 1.0))
    return f"{size / factor:.3g} {unit}"


def draw_groups(mesh: Mesh) -> Drawing:
    """Draw a mesh: its ranks, and around each group of an axis a line in the colour of the axis.

    Data runs to the right, tensor inside a cell, pipeline downwards; groups are those of `Mesh.group`.

    Parameters
    ----------
    mesh : Mesh
        Such as ``bp.plan.Mesh(data=2, tensor=2)``; of at most 64 ranks.
    """
    if mesh.size > 64:
        raise ValueError(f"a mesh of at most 64 ranks can be drawn, not of {mesh.size}")
    fills = {"data": FILLS["communication"][0], "tensor": FILLS["weight_half"][0], "pipeline": FILLS["input_half"][0]}
    used = [axis for axis in fills if getattr(mesh, axis) > 1]
    spread = {"data": (mesh.tensor + 0.7, 0.0), "tensor": (1.0, 0.0), "pipeline": (0.0, 1.15)}

    def place(at: Coordinate) -> tuple[float, float]:
        return (at.data * spread["data"][0] + at.tensor, -at.pipeline * spread["pipeline"][1])

    width, height = mesh.data * spread["data"][0] + 0.6, mesh.pipeline * 1.15 + 0.6
    with rc_context(STYLE):
        figure, (axes,) = blank(min(4.5, 0.5 + (WIDTH * 0.6) * height / max(width, 3.0)))
        for axis in used:
            for group in sorted({mesh.group(rank, axis) for rank in range(mesh.size)}):
                above = (0.4 + 0.1 * mesh.coordinate(group[0]).tensor) * (axis == "data")
                _through(axes, [place(mesh.coordinate(rank)) for rank in group], fills[axis], above)
        for rank in range(mesh.size):
            x, y = place(mesh.coordinate(rank))
            axes.add_patch(Rectangle((x - 0.3, y - 0.28), 0.6, 0.56, facecolor=FILLS["forward"][0], zorder=3))
            axes.text(x, y, str(rank), color=FILLS["forward"][1], ha="center", va="center", zorder=4)
        axes.set(xlim=(-0.7, max(width, 3.0) - 0.9), ylim=(-height + 0.6, 0.5 + 0.1 * mesh.tensor), aspect="equal")
        legend(figure, {WORDS[axis]: fills[axis] for axis in used}, 3)
    groups = {axis: sorted({mesh.group(rank, axis) for rank in range(mesh.size)}) for axis in used}
    said = [WORDS["axis"].format(WORDS[axis], "; ".join(" ".join(map(str, one)) for one in found))
            for axis, found in groups.items()]  # fmt: skip
    figure.alt = WORDS["mesh"].format(mesh, ". ".join(said) + ".")
    return figure


def _through(axes: Axes, points: Sequence[tuple[float, float]], fill: str, above: float) -> None:
    """A line through the middles of the ranks of a group, or so far above them, with a foot on each."""
    style: dict[str, Any] = {"color": fill, "linewidth": 2.2, "solid_capstyle": "round", "zorder": 1}
    axes.plot([x for x, _ in points], [y + above for _, y in points], **style)
    if above:
        for x, y in points:
            axes.plot([x, x], [y, y + above], **style)


# -- what is cut


def draw_split(network: Described, tensor: int = 2, first: int = 0, last: int | None = None) -> Drawing:
    """Draw which part of each product's matrix a tensor rank has: cut by columns, then by rows.

    The matrix A of ``X A`` has a row an input and a column an output, as in the literature (`bpkit.nn` stores its
    transpose); colours are ranks.

    Parameters
    ----------
    network : Network or Description
        Its products from layer `first` to `last` (of the network with its containers opened) are drawn, at most four.
    tensor : int
        Ranks of the tensor axis.

    Raises
    ------
    ValueError
        If there is no product among these layers.
    """
    described = network.description.opened()
    ranks = [cut(described, index, tensor, False) for index in range(tensor)]
    last = len(described.layers) if last is None else last
    whole = [(i, layer.inputs, layer.outputs) for i, layer in enumerate(described.layers)
             if isinstance(layer, Linear) and first <= i <= last]  # fmt: skip
    if not whole:
        raise ValueError(f"the {described.text} has no product from layer {first} on that could be cut")
    whole = whole[:4]
    longest = max(max(inputs, outputs) for _, inputs, outputs in whole)
    said = []
    with rc_context(STYLE):
        figure, panels = blank(2.3, len(whole))
        for axes, (i, inputs, outputs) in zip(panels, whole, strict=True):
            pieces = [own[i][1][0] for own in ranks]
            how = "whole" if all(p.ranges is None for p in pieces) else "rows" if pieces[0].dim else "columns"
            for rank, piece in enumerate(pieces):
                for x, y, w, h in _rectangles(piece, inputs, outputs):
                    fill = INK if how == "whole" else RANKS[rank % len(RANKS)]
                    axes.add_patch(Rectangle((x, y), w, h, facecolor=fill, edgecolor="white", linewidth=1))
            axes.set(xlim=(-0.02 * longest, longest * 1.02), ylim=(longest * 1.02, -0.02 * longest), aspect="equal")
            axes.set_title(f"{inputs} x {outputs}\n{WORDS[how]}", fontsize=9.5)
            said.append(WORDS["split_one"].format(i, inputs, outputs, WORDS[how]))
        legend(figure, {WORDS["rank"].format(rank): RANKS[rank % len(RANKS)] for rank in range(tensor)}, 4)
    figure.alt = WORDS["split"].format("; ".join(said) + ".")
    return figure


def _rectangles(piece: Piece, inputs: int, outputs: int) -> Iterable[tuple[int, int, int, int]]:
    """What a rank has of the matrix with a row an input: x, y, width and height of each piece."""
    for low, high in piece.places((outputs, inputs)[piece.dim]):
        yield (0, low, outputs, high - low) if piece.dim else (low, 0, high - low, inputs)
