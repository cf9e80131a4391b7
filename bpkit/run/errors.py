"""What can go wrong between the caller and its workers, one class a case."""

from typing import Any


class WorkerError(RuntimeError):
    """A worker raised: the message carries its rank, what it was doing and its traceback.

    Attributes
    ----------
    rank : int
        Rank of the worker.
    action : str
        What it was doing, e.g. ``"step 3, 0F0"`` or ``"train(), waiting in recv for rank 1"``.
    """

    def __init__(self, message: str, rank: int = -1, action: str = "") -> None:
        super().__init__(message)
        self.rank = rank
        self.action = action


class WorkerDied(WorkerError):
    """A worker's process ended without an answer (a signal, a crash, ``os._exit``)."""


class WorkerStuck(WorkerError):
    """A worker waited longer than the time-out, or the whole call took longer than its limit."""


class Stopped(RuntimeError):
    """The run was ended by the caller's ``stop`` event."""


class EvaluationError(RuntimeError):
    """The test accuracy could not be computed; what was trained until then is not lost.

    Attributes
    ----------
    network : Network
        A copy with the weights after the steps that the message says.
    """

    def __init__(self, message: str, network: Any = None) -> None:
        super().__init__(message)
        self.network = network


class CommunicationError(RuntimeError):
    """A message was sent and never received, or a peer was lost."""


class NoRoom(RuntimeError):
    """Shared memory (``/dev/shm``) is too small for what was asked."""


class PeerTimeout(RuntimeError):
    """Inside a worker: a wait for a peer ran out of time. The caller sees `WorkerStuck`."""
