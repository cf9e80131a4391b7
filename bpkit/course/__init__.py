"""What only the course uses: ``explorer``, ``merging`` and ``pipelines``, figures to be used by hand; ``draw_...``,
pictures; exercises; runs that were recorded; ``say``, for sentences that a cell writes.

Nothing heavy is loaded before a figure is asked for.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from bpkit.lazy import lazy

if TYPE_CHECKING:
    from bpkit.course import exercises, peers
    from bpkit.course.figures.explorers import Explorer, explorer
    from bpkit.course.figures.merging import Merging, merging
    from bpkit.course.figures.models import draw_bars, draw_block, draw_mesh
    from bpkit.course.figures.more_pictures import draw_staleness, draw_ties, draw_tokens
    from bpkit.course.figures.pictures import draw_groups, draw_messages, draw_split, draw_zero
    from bpkit.course.figures.pipelines import Pipelines, pipelines
    from bpkit.course.figures.training import draw_buckets, draw_curves, draw_grid, draw_ratios, draw_stacks
    from bpkit.course.launching import in_torch, launch, off, serial_gradient, socket_bytes, vector
    from bpkit.course.pytorch import torch_schedule
    from bpkit.course.recorded import GpuFigures, gpu_figures
    from bpkit.course.saved import SavedBytes
    from bpkit.course.schedules import bubble_in_units, hold_messages, mean_waits, measured_times, period_in_units
    from bpkit.course.slow_link import delayed_sgd, step_over
    from bpkit.course.words import how_long, say

__all__ = ["Explorer", "GpuFigures", "Merging", "Pipelines", "SavedBytes", "bubble_in_units", "delayed_sgd",
           "draw_bars", "draw_block", "draw_buckets", "draw_curves", "draw_grid", "draw_groups",
           "draw_mesh", "draw_messages", "draw_ratios", "draw_split", "draw_stacks", "draw_staleness", "draw_ties",
           "draw_tokens", "draw_zero", "exercises", "explorer", "gpu_figures", "hold_messages", "how_long", "in_torch",
           "launch", "mean_waits", "measured_times", "merging", "off", "peers", "period_in_units", "pipelines", "say",
           "serial_gradient", "socket_bytes", "step_over", "torch_schedule", "vector"]  # fmt: skip

_PLACES = {
    "schedules": ("bubble_in_units", "hold_messages", "mean_waits", "measured_times", "period_in_units"),
    "figures.explorers": ("Explorer", "explorer"), "figures.merging": ("Merging", "merging"),
    "figures.pictures": ("draw_groups", "draw_messages", "draw_split", "draw_zero"),
    "figures.more_pictures": ("draw_staleness", "draw_ties", "draw_tokens"),
    "figures.pipelines": ("Pipelines", "pipelines"), "recorded": ("GpuFigures", "gpu_figures"),
    "exercises": ("exercises",), "pytorch": ("torch_schedule",), "words": ("how_long", "say"),
    "launching": ("in_torch", "launch", "off", "serial_gradient", "socket_bytes", "vector"),
    "figures.training": ("draw_buckets", "draw_curves", "draw_grid", "draw_ratios", "draw_stacks"),
    "peers": ("peers",), "slow_link": ("delayed_sgd", "step_over"),
    "figures.models": ("draw_bars", "draw_block", "draw_mesh"), "saved": ("SavedBytes",),
}  # fmt: skip
_NEEDS = {**dict.fromkeys(("figures.explorers", "figures.merging", "figures.pipelines"), "anywidget"),
          **dict.fromkeys(("figures.models", "figures.pictures", "figures.more_pictures",
                           "figures.training"), "matplotlib")}  # fmt: skip


def __getattr__(name: str) -> Any:
    """Load what is asked for when it is first used."""
    return lazy(__name__, name, _PLACES, _NEEDS)
