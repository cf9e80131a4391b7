"""Running plans and functions on real processes."""

from bpkit.run.comm import Comm
from bpkit.run.errors import Stopped, WorkerDied, WorkerError, WorkerStuck

__all__ = ["Comm", "Stopped", "WorkerDied", "WorkerError", "WorkerStuck"]
