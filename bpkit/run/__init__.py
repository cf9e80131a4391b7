"""Running plans and functions on real processes."""

from bpkit.run.errors import Stopped, WorkerDied, WorkerError, WorkerStuck
from bpkit.run.job import Job
from bpkit.run.transports.comm import Comm

__all__ = ["Comm", "Job", "Stopped", "WorkerDied", "WorkerError", "WorkerStuck"]
