"""More pictures for chapters: what waits for what in time, and what lies on several ranks (see `pictures`)."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

from matplotlib import rc_context
from matplotlib.patches import FancyArrowPatch, Rectangle

from bpkit.course.figures.pictures import RANKS, WIDTH, WORDS, blank, legend
from bpkit.description.network import Described
from bpkit.plan import Plan
from bpkit.plan.program import compile, of_rank, tied_copies
from bpkit.plan.strategies.servers import ages
from bpkit.show.drawing import INK, STYLE, TEXT, Drawing
from bpkit.show.looks import FILLS


def draw_staleness(plan: Plan, updates: int = 16) -> Drawing:
    """Draw how old gradients are: a lane a worker, a bar from the update whose weights it read to the update it makes.

    The number in a bar is its staleness: how many updates others made meanwhile (`bpkit.plan.strategies.servers.ages`).

    Parameters
    ----------
    plan : Plan
        Of an asynchronous server: ``result.plan`` of `Cluster.train_asynchronous`, or made by
        ``bp.plan.asynchronous_server``.
    updates : int
        The first so many are drawn.

    Raises
    ------
    ValueError
        If no rank of the plan serves.
    """
    if not plan.servers:
        raise ValueError(f"{plan.name} has no server: draw_staleness shows an asynchronous server's plan")
    workers = [action.peer or 0 for action in plan.rows[0] if action.kind == "RECV_G"][:updates]
    old = ages(plan)[:updates]
    with rc_context(STYLE):
        figure, (axes,) = blank(0.9 + 0.4 * len({*workers}))
        axes.set_axis_on()
        lanes = sorted({*workers})
        for update, (worker, behind) in enumerate(zip(workers, old, strict=True)):
            fill, ink = FILLS["forward"] if not behind else FILLS["waiting_for_core"]
            lane = lanes.index(worker)
            axes.add_patch(Rectangle((update - behind, lane - 0.32), behind + 0.92, 0.64, facecolor=fill))
            axes.text(update - behind + 0.46 + behind / 2, lane, str(behind), color=ink, ha="center", va="center")
        axes.set(xlim=(0, len(workers)), ylim=(len(lanes) - 0.4, -0.6), xlabel=WORDS["updates"])
        axes.set_xticks(range(len(workers) + 1))  # there are no half updates
        axes.set_yticks(range(len(lanes)), [WORDS["worker"].format(worker) for worker in lanes])
        axes.tick_params(axis="y", length=0)
        axes.spines["left"].set_visible(False)
        axes.set_title(WORDS["behind"], loc="left", fontsize=9.5)
    said = [WORDS["stale_one"].format(i, worker, behind)
            for i, (worker, behind) in enumerate(zip(workers, old, strict=True))]  # fmt: skip
    figure.alt = WORDS["staleness"].format("; ".join(said) + ".")
    return figure


def draw_ties(plan: Plan, network: Described) -> Drawing:
    """Draw the stages of a pipeline on their ranks, and an arc between stages that share a tensor (tied weights).

    A shared tensor on one rank is one copy: its arc is dashed, and nothing is sent.

    Parameters
    ----------
    plan : Plan
        A pipeline.
    network : Network or Description
    """
    program = compile(plan, network)
    compiled, parts = program.plan, of_rank(program.plan, network.description, 0).split(program.cuts)
    ties = tied_copies(parts)
    ranks, place = compiled.mesh.pipeline, compiled.place
    order = [stage for rank in range(ranks) for stage in range(compiled.stages) if place[stage] == rank]
    before = {stage: sum(place[other] < place[stage] for other in order) for stage in order}
    at = {stage: (float(place[stage]), order.index(stage) - before[stage]) for stage in order}
    with rc_context(STYLE):
        tall = max(sum(place[s] == rank for s in order) for rank in range(ranks))
        figure, (axes,) = blank(1.1 + 0.55 * tall + 0.25 * len(ties))
        for stage, (x, y) in at.items():
            fill, ink = FILLS["forward"]
            axes.add_patch(Rectangle((x - 0.4, -y - 0.36), 0.8, 0.72, facecolor=fill))
            axes.text(x, -y, WORDS["holds"].format(stage), color=ink, ha="center", va="center")
        for rank in range(ranks):
            axes.text(rank, -tall + 0.2, TEXT["rank"].format(rank), color=INK, ha="center", va="top")
        for number, (_, copies) in enumerate(ties):
            for a, b in pairwise(sorted(copies)):
                same = place[a] == place[b]
                style: dict[str, Any] = {"linestyle": "--" if same else "-", "color": FILLS["communication"][0]}
                (xa, ya), (xb, yb) = at[a], at[b]
                height = (0.25 if same else -0.25) - 0.1 * number
                start, end = ((xa - 0.42, -ya), (xb - 0.42, -yb)) if same else ((xa, 0.4 - ya), (xb, 0.4 - yb))
                axes.add_patch(FancyArrowPatch(start, end, arrowstyle="<|-|>", linewidth=1.6,
                                               mutation_scale=9, connectionstyle=f"arc3,rad={height}",
                                               **style))  # fmt: skip
        axes.set(xlim=(-0.6, ranks - 0.4), ylim=(-tall - 0.2, 1.0 + 0.12 * ranks))
        fill = FILLS["communication"][0]
        key = {name: "tie" if len({place[stage] for stage in own}) > 1 else "copy" for name, own in ties}
        legend(figure, {WORDS[key[name]].format(name): fill for name in key}, 1)
    said = "; ".join(WORDS["ties_one"].format(name, " and ".join(map(str, sorted(own)))) for name, own in ties)
    figure.alt = WORDS["ties"].format((said or WORDS["nothing"]) + ".")
    return figure


def draw_tokens(plan: Plan, stages: Sequence[int] | None = None) -> Drawing:
    """Draw which tokens, and which columns of them, each tensor rank works on: a lane a rank, a box a stage.

    A stage between split products works on all tokens and some of the columns; with sequence parallelism what
    stands between them (norms, dropout, skips) works on a rank's own tokens and all columns.  Between two stages stands
    the collective of the plan that changes the one into the other.

    Parameters
    ----------
    plan : Plan
        With a tensor axis: ``bp.plan.tensor_parallel(bp.plan.serial(), 2, layout)``.
    stages : sequence of int, optional
        Which to draw, for example those of one block; the first six where None.

    Raises
    ------
    ValueError
        If the plan has no tensor axis.
    """
    ranks = plan.mesh.tensor
    if ranks == 1:
        raise ValueError(f"{plan.name} has no tensor axis: make it with bp.plan.tensor_parallel")
    shown = list(range(min(6, plan.stages))) if stages is None else list(stages)
    split = {*plan.partial_outputs, *plan.partial_inputs}
    how = {stage: "own" if stage in plan.own_tokens else "all" if stage in split else "everything" for stage in shown}
    sums = {action.stage: action.kind for row in plan.rows for action in row
            if action.verb.stream == "tensor" and action.kind.endswith("_F")}  # fmt: skip
    fills = {"own": RANKS[0], "all": RANKS[1], "everything": FILLS["idle"][0]}
    with rc_context(STYLE):
        figure, (axes,) = blank(1.1 + 0.75 * ranks)
        step = WIDTH / len(shown)
        for i, stage in enumerate(shown):
            for rank in range(ranks):
                x, y = i * step, -rank * 1.0
                axes.add_patch(Rectangle((x + 0.08, y - 0.8), step - 0.3, 0.74, facecolor="none", edgecolor=INK,
                                         linewidth=0.8))  # fmt: skip
                w, h = step - 0.3, 0.74
                left, top, wide, tall = {"own": (0, rank / ranks, 1, 1 / ranks), "everything": (0, 0, 1, 1),
                                         "all": (rank / ranks, 0, 1 / ranks, 1)}[how[stage]]  # fmt: skip
                axes.add_patch(Rectangle((x + 0.08 + left * w, y - 0.06 - (top + tall) * h), wide * w, tall * h,
                                         facecolor=fills[how[stage]]))  # fmt: skip
            axes.text(i * step + step / 2 - 0.07, 0.05, str(stage), color=INK, ha="center", va="bottom")
            if stage in sums:
                axes.text((i + 1) * step - 0.07, -ranks - 0.02, sums[stage].replace("_F", ""), color=INK, ha="center",
                          va="top", rotation=0)  # fmt: skip
        for rank in range(ranks):
            axes.text(-0.05, -rank - 0.43, TEXT["rank"].format(rank), color=INK, ha="right", va="center")
        axes.set(xlim=(-0.75, WIDTH + 0.2), ylim=(-ranks - 0.35, 0.4))
        legend(figure, {WORDS[name]: fills[name] for name in ("own", "all", "everything") if name in how.values()}, 1)
    said = [WORDS["tokens_one"].format(stage, WORDS[how[stage]]) + (f", then {sums[stage]}" if stage in sums else "")
            for stage in shown]  # fmt: skip
    figure.alt = WORDS["tokens"].format(ranks, "; ".join(said) + ".")
    return figure
