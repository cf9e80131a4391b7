"""``draw_kept``: what each rank keeps under several schedules."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from matplotlib import rc_context

from bpkit.show.drawing import FILLS, STYLE, Drawing

_LOOKS = ("forward", "backward", "communication", "update", "other")


def draw_kept(kept: Mapping[str, Sequence[float]]) -> Drawing:
    """Draw the most microbatches' worth of activations that each rank keeps, a bar a rank, a group a schedule.

    Parameters
    ----------
    kept : mapping of str to sequence of float
        By the name of the schedule, a number for each rank.

    Raises
    ------
    ValueError
        If there is nothing to draw.
    """
    if not kept or not all(kept.values()):
        raise ValueError('draw_kept draws at least one schedule of one rank, as in {"GPipe": [8, 8]}')
    ranks = max(map(len, kept.values()))
    height = 0.8 / len(kept)
    with rc_context(STYLE):
        figure = Drawing((4.8, 0.9 + 0.24 * ranks * len(kept)))
        axes = figure.add_subplot()
        for i, (name, values) in enumerate(kept.items()):
            lanes = [rank - 0.4 + (i + 0.5) * height for rank in range(len(values))]
            look = FILLS[_LOOKS[i % len(_LOOKS)]][0]
            bars = axes.barh(lanes, values, 0.9 * height, color=look, label=name)
            axes.bar_label(bars, [f"{value:g}" for value in values], padding=3)
        axes.set_yticks(range(ranks), [f"rank {rank}" for rank in range(ranks)])
        axes.set(xlabel="microbatches' activations, at most", ylim=(ranks - 0.5, -0.5))
        axes.set_xlim(0, 1.1 * max(map(max, kept.values())))
        axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=2, fontsize=8, borderpad=0)
    words = [f"{name}: {', '.join(f'{value:g}' for value in values)}" for name, values in kept.items()]
    figure.alt = "Most microbatches' worth of activations kept, by rank. " + "; ".join(words) + "."
    return figure
