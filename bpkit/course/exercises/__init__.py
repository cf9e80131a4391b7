"""Exercises of the course: ``check(name, answer)`` runs an answer on real workers and says what is wrong."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from bpkit.course.exercises import cuts, data_parallel, models, pipeline, sharding, trainer, zero_bubble
from bpkit.course.exercises.verdict import Verdict, Wrong

__all__ = ["EXERCISES", "Verdict", "check"]

#: The judge of every exercise, by name: it returns praise, or raises `Wrong`.
EXERCISES: dict[str, Callable[[Any], str]] = {
    **data_parallel.EXERCISES, **pipeline.EXERCISES, **trainer.EXERCISES, **models.EXERCISES,
    **zero_bubble.EXERCISES, **cuts.EXERCISES, **sharding.EXERCISES,
}  # fmt: skip


def check(name: str, answer: Any) -> Verdict:
    """Judge an answer to an exercise, in under ten seconds, even if the answer hangs.

    Parameters
    ----------
    name : str
        A key of `EXERCISES`; the chapter gives it.
    answer : object
        What the exercise asks for: a number, a list, or a function, also one of a cell.

    Returns
    -------
    Verdict
        Prints as one sentence; ``passed`` says whether the answer is right.

    Raises
    ------
    ValueError
        If there is no exercise of that name.
    """
    if name not in EXERCISES:
        raise ValueError(f"there is no exercise {name!r}: choose one of {', '.join(map(repr, EXERCISES))}")
    try:
        return Verdict(True, EXERCISES[name](answer))
    except Wrong as wrong:
        return Verdict(False, str(wrong))
