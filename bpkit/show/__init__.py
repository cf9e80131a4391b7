"""Figures: ``timeline``, ``breakdown``, ``speedup`` and ``plan`` by matplotlib; ``explorer``, ``merging``
and ``pipelines`` to be used by hand.

Nothing heavy is loaded before a figure is asked for.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from bpkit.show.collectives import Merging, merging
    from bpkit.show.explorers import Explorer, explorer
    from bpkit.show.figures import alt_text, breakdown, plan, setup, speedup, timeline
    from bpkit.show.schedules import Pipelines, pipelines

__all__ = [
    "Explorer", "Merging", "Pipelines", "alt_text", "breakdown", "explorer", "merging", "pipelines", "plan", "setup",
    "speedup", "timeline",
]  # fmt: skip

# Which module has a name, and what that module needs beside bpkit itself.
_EXPLORERS, _MERGING, _FIGURES = ("explorers", "anywidget"), ("collectives", "anywidget"), ("figures", "matplotlib")
_PLACES = dict.fromkeys(("Explorer", "explorer"), _EXPLORERS) | dict.fromkeys(("Merging", "merging"), _MERGING)
_PLACES |= dict.fromkeys(("Pipelines", "pipelines"), ("schedules", "anywidget"))
_PLACES |= dict.fromkeys(("alt_text", "breakdown", "plan", "setup", "speedup", "timeline"), _FIGURES)


def __getattr__(name: str) -> Any:
    """Load the figures, or the explorer, when one is first used."""
    if name not in _PLACES:
        raise AttributeError(f"module 'bpkit.show' has no attribute {name!r}")
    module, package = _PLACES[name]
    try:
        return getattr(importlib.import_module(f"bpkit.show.{module}"), name)
    except ModuleNotFoundError as error:
        if (error.name or "").split(".")[0] != package:
            raise
        raise ModuleNotFoundError(
            f'bp.show.{name} needs {package}: pip install "bpkit[course]"', name=error.name
        ) from error
