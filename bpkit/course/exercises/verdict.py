"""What a check gives, and how it runs an answer that may raise, hang or die."""

import re
from collections.abc import Callable
from dataclasses import dataclass
from html import escape
from typing import Any, Self

import numpy as np

from bpkit.plan import Plan, check
from bpkit.run.errors import CommunicationError, WorkerDied, WorkerError, WorkerStuck
from bpkit.run.processes.pool import Pool

# Seconds that one call may take. An answer needs milliseconds; the rest of the ten seconds is for starting workers.
LIMIT = 5.0
_WAITING = re.compile(r"rank (\d+): .*waiting in (\w+) for rank (\d+)")
_COMPUTING = re.compile(r"rank (\d+): (?!had finished)(?!.*waiting)")


@dataclass(frozen=True)
class Verdict:
    """The outcome of a check; prints as one sentence.

    Parameters
    ----------
    passed : bool
    sentence : str
        What is right, or what is wrong.
    """

    passed: bool
    sentence: str

    def __bool__(self) -> bool:
        return self.passed

    def __repr__(self) -> str:
        return f"{self._word}: {self.sentence}"

    def _repr_html_(self) -> str:
        # So that a notebook wraps the sentence.
        return f"<p><strong>{self._word}:</strong> {escape(self.sentence)}</p>"

    @property
    def _word(self) -> str:
        return "Right" if self.passed else "Not yet"


class Wrong(Exception):
    """Ends a check; the message is the sentence that the reader sees."""


def need_plan(answer: Any) -> Plan:
    """The answer as a plan that the checker accepts; otherwise what is wrong with it ends the check."""
    if not isinstance(answer, Plan | str):
        raise Wrong("the answer is a plan, or the text of one")
    try:
        plan = Plan.parse(str(answer))
        check(plan)
    except ValueError as error:
        raise Wrong(str(error).splitlines()[0]) from None
    return plan


def need_function(answer: Any, signature: str) -> None:
    """Refuse an answer that cannot be called."""
    if not callable(answer):
        kind = "None" if answer is None else f"a value of type {type(answer).__name__}"
        raise Wrong(f"the answer is a function, {signature}, not {kind}")


def need_numbers(answer: Any, count: int, what: str) -> list[float]:
    """Refuse an answer that is not a list of `count` numbers; return it."""
    try:
        numbers = [float(one) for one in answer]
    except (TypeError, ValueError):
        numbers = []
    if len(numbers) != count:
        raise Wrong(f"the answer is a list of {count} numbers, {what}: [{', '.join(['...'] * count)}]")
    return numbers


class Bench(Pool):
    """Workers on which answers are run; every failure becomes a sentence."""

    def __enter__(self) -> Self:
        self.start()  # so that an answer's limit does not count the start
        return self

    def run(self, fn: Callable[..., Any], *args: Any, case: str) -> list[Any]:
        """Run ``fn(comm, *args)`` on each rank and return the results by rank.

        `fn` may count the operations of its rank in ``comm.mark[0]``, for the sentence about a deadlock.

        Raises
        ------
        Wrong
            If a rank raises, ends, waits for ever, or leaves a message behind; `case` says where.
        """
        marks = np.zeros((self.workers, 2), dtype=np.int64)

        def watch(seen: np.ndarray) -> None:
            marks[:] = seen

        try:
            return self.call(fn, *args, timeout=LIMIT, watch=watch)
        except WorkerStuck as error:
            raise Wrong(_stuck(str(error), marks[:, 0], case)) from None
        except WorkerDied as error:
            raise Wrong(f"{case}: the process of rank {error.rank} ended without an answer") from None
        except WorkerError as error:
            raise Wrong(_raised(error, case)) from None
        except CommunicationError as error:
            raise Wrong(f"{case}: a message is never received: {error}") from None
        except TypeError as error:
            raise Wrong(f"the answer cannot be sent to the workers: {str(error).splitlines()[0]}") from None


def _stuck(message: str, operations: np.ndarray, case: str) -> str:
    """Which rank waits for which, at which of its operations."""
    waits = [(int(rank), kind, int(peer)) for rank, kind, peer in _WAITING.findall(message)]
    busy = [f"rank {rank} computes without end" for rank in _COMPUTING.findall(message)]
    nth = [f" (its operation {operation})" if operation > 0 else "" for operation in operations]
    texts = [f"rank {rank} waits in {kind} for rank {peer}{nth[rank]}" for rank, kind, peer in waits]
    why = "" if busy else "; what a rank waits for must have been sent by its peer before that peer waits itself"
    return f"{case}: {'it does not end' if busy else 'deadlock'}: {', '.join(texts + busy)}{why}"


def _raised(error: WorkerError, case: str) -> str:
    """The exception of the answer and the line of it that raised, on one line."""
    cause = error.__cause__
    what = str(error).strip().splitlines()[-1]
    if cause is not None:
        what = ": ".join([type(cause).__name__, *str(cause).splitlines()[:1]])
    return f"{case}: rank {error.rank} raises {what}"
