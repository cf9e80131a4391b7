"""Running plans and functions on real processes."""

from bpkit.run.errors import EvaluationError, Stopped, WorkerDied, WorkerError, WorkerStuck
from bpkit.run.job import Job
from bpkit.run.transports.comm import Comm

__all__ = ["Comm", "EvaluationError", "Job", "Stopped", "WorkerDied", "WorkerError", "WorkerStuck"]
