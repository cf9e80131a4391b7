"""Running plans and functions on real processes."""

from bpkit.run.errors import Stopped, WorkerDied, WorkerError, WorkerStuck
from bpkit.run.transports.comm import Comm

__all__ = ["Comm", "Stopped", "WorkerDied", "WorkerError", "WorkerStuck"]
