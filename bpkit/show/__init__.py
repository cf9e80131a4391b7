"""Figures by matplotlib: ``timeline``, ``breakdown``, ``speedup`` and ``plan``; loaded when one is asked for."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from bpkit.lazy import lazy

if TYPE_CHECKING:
    from bpkit.show.figures import alt_text, breakdown, plan, setup, speedup, timeline

__all__ = ["alt_text", "breakdown", "plan", "setup", "speedup", "timeline"]


def __getattr__(name: str) -> Any:
    """Load the figures when one is first used."""
    return lazy(__name__, name, {"figures": __all__}, {"figures": "matplotlib"})
