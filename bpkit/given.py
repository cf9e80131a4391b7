"""What callers give: taken where its value is clear, else refused by name."""

import contextlib
import math
import operator
from collections.abc import Mapping
from numbers import Real
from typing import Any


def integer(what: str, value: Any, least: float | None = None, floats: bool = True) -> int:
    """Return a whole number as an int: Python's, NumPy's, a tensor of one element, or (with `floats`) a float without
    a fraction.

    Raises
    ------
    ValueError
        If it is something else (True and False are no numbers), or below `least`.
    """
    found = None
    if not isinstance(value, bool):
        real = floats and isinstance(value, Real) and math.isfinite(value) and value == math.floor(value)
        with contextlib.suppress(TypeError):
            found = int(value) if real else operator.index(value)
    if found is None or (least is not None and found < least):
        at_least = "" if least is None else f" of at least {least}"
        raise ValueError(f"{what} must be a whole number{at_least}, not {value!r}")
    return found


def number(what: str, value: Any, least: float = -math.inf, above: float = -math.inf) -> float:
    """Return a finite number as a float, at least `least` and above `above`; NumPy's numbers are taken.

    Raises
    ------
    ValueError
        If it is something else.
    """
    real = isinstance(value, Real) and not isinstance(value, bool)
    if not real or not math.isfinite(value) or value < least or value <= above:
        beyond = f" above {above:g}" if above > -math.inf else f" of at least {least:g}" if least > -math.inf else ""
        raise ValueError(f"{what} must be a finite number{beyond}, not {value!r}")
    return float(value)


def integers(caller: str, least: float = 1, **values: Any) -> list[int]:
    """Return whole numbers as ints, or refuse one by name (see `integer`)."""
    return [integer(f"{caller}: {name}", value, least) for name, value in values.items()]


def between(what: str, value: Any, least: float, most: float) -> float:
    """Return a finite number from `least` to `most` as a float; ValueError for something else."""
    if (found := number(what, value, least)) > most:
        raise ValueError(f"{what} must be a number from {least:g} to {most:g}, not {value!r}")
    return found


def whole_numbers(caller: str, least: int = 1, **values: Any) -> list[int]:
    """Return whole numbers as ints, or refuse by name what is none (also a float), or below `least`."""
    return [integer(f"{caller}: {name}", value, least, floats=False) for name, value in values.items()]


def settle(described: Any, takes: Mapping[str, int | tuple[float, float]]) -> None:
    """Make fields of a frozen dataclass ints of at least so much, or floats between two, or refuse them by name."""
    for name, wanted in takes.items():
        what, value = f"{type(described).__name__}: {name}", getattr(described, name)
        found = integer(what, value, wanted, False) if isinstance(wanted, int) else between(what, value, *wanted)
        object.__setattr__(described, name, found)
