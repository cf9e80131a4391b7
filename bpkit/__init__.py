"""bpkit: backpropagation in parallel, from one hand-written backward pass to many processors.

A parallel backpropagation is a plan: for every rank, a list of actions.  The plan is written once; it is run
on real workers, simulated, and drawn.  See ``bpkit.plan`` for plans, ``Cluster`` for running them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from bpkit import compress, data, nn, optim, plan, run, simulate, trace
from bpkit.lazy import lazy
from bpkit.run.cluster import Cluster

if TYPE_CHECKING:
    from bpkit import course, measure, show
    from bpkit.course import exercises
    from bpkit.measure import report, scaling

__version__ = "0.1.0"
__all__ = ["Cluster", "compress", "course", "data", "exercises", "measure", "nn", "optim", "plan", "report", "run",
           "scaling", "show", "simulate", "trace"]  # fmt: skip

#: The upper floors, which need more than torch and numpy, and short names for what is in them.
_PLACES = {"course": ("course", "exercises"), "measure": ("measure", "report", "scaling"), "show": ("show",)}


def __getattr__(name: str) -> Any:
    """Load the upper floors when they are first used."""
    return lazy(__name__, name, _PLACES, {})
