"""bpkit: backpropagation in parallel, from one hand-written backward pass to many processors.

A parallel backpropagation is a plan: for every rank, a list of actions.  The plan is written once; it is run
on real workers, simulated, and drawn.  See ``bpkit.plan`` for plans, ``Cluster`` for running them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from bpkit.lazy import lazy

if TYPE_CHECKING:
    from bpkit import compress, course, data, description, measure, nn, optim, plan, run, show, simulate, trace
    from bpkit.course import exercises
    from bpkit.measure import report, scaling
    from bpkit.run.cluster import Cluster

__version__ = "0.1.0"
__all__ = ["Cluster", "compress", "course", "data", "description", "exercises", "measure", "nn", "optim", "plan",
           "report", "run", "scaling", "show", "simulate", "trace"]  # fmt: skip

#: The rooms, each loaded when it is first used, with short names for what is in them.
_ROOMS = ("compress", "data", "description", "nn", "optim", "plan", "run", "show", "simulate", "trace")
_PLACES = {**{room: (room,) for room in _ROOMS}, "run.cluster": ("Cluster",), "course": ("course", "exercises"),
           "measure": ("measure", "report", "scaling")}  # fmt: skip


def __getattr__(name: str) -> Any:
    """Load a room when it is first used: `bpkit.plan` needs the standard library alone, `bpkit.nn` torch."""
    return lazy(__name__, name, _PLACES, {})


def __dir__() -> list[str]:
    return [*globals(), *__all__]
