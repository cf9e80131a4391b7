"""bpkit: backpropagation in parallel, from one hand-written backward pass to many processors.

A parallel backpropagation is a plan: for every rank, a list of actions.  The plan is written once; it is run
on real workers, simulated, and drawn.  See ``bpkit.plan`` for plans, ``Cluster`` for running them.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from bpkit import compress, data, nn, optim, plan, run, simulate, trace
from bpkit.run.cluster import Cluster

if TYPE_CHECKING:
    from bpkit import exercises, measure, show
    from bpkit.measure import report, scaling

__version__ = "0.1.0"
__all__ = ["Cluster", "compress", "data", "exercises", "measure", "nn", "optim", "plan", "report", "run", "scaling",
           "show", "simulate", "trace"]  # fmt: skip

_LAZY = {"report": "measure", "scaling": "measure"}


def __getattr__(name: str) -> Any:
    """Load the upper floors when they are first used, so that the library runs without what they need."""
    if name in ("measure", "show", "exercises"):
        return importlib.import_module(f"bpkit.{name}")
    if name in _LAZY:
        return getattr(importlib.import_module(f"bpkit.{_LAZY[name]}"), name)
    raise AttributeError(f"module 'bpkit' has no attribute {name!r}")
