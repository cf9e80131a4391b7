"""What callers give, taken or refused by name: whole numbers are Python's, NumPy's, or a tensor of one element."""

import operator
from typing import Any


def whole(caller: str, name: str, value: Any, least: int | None = 1) -> int:
    """Return a whole number as an int; ValueError for a float, a bool, or what is below `least`, by name."""
    try:
        number = None if isinstance(value, bool) else operator.index(value)
    except TypeError:
        number = None
    if number is None or (least is not None and number < least):
        at_least = "" if least is None else f" of at least {least}"
        raise ValueError(f"{caller}: {name} must be a whole number{at_least}, not {value!r}")
    return number


def whole_number(caller: str, least: int = 1, **values: Any) -> None:
    """Refuse what is no whole number, or below `least`, by name."""
    for name, value in values.items():
        whole(caller, name, value, least)


def whole_fields(described: Any, *names: str, least: int = 1) -> None:
    """Make fields of a frozen dataclass ints, or refuse them, naming its class and the field."""
    for name in names:
        object.__setattr__(described, name, whole(type(described).__name__, name, getattr(described, name), least))
