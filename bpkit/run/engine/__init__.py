"""One rank runs its row.  `compute` and `communication` register what runs each kind of action (see `context.runs`)."""

from bpkit.run.engine import communication, compute

__all__ = ["communication", "compute"]
