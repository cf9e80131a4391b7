"""What callers give, taken or refused by name."""


def whole_number(caller: str, least: int = 1, **values: int) -> None:
    """Refuse what is no whole number, or below `least`, by name."""
    for name, value in values.items():
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            raise ValueError(f"{caller}: {name} must be a whole number of at least {least}, not {value!r}")
