"""Small tables as text and as HTML, and how quantities are written in them."""

from collections.abc import Sequence
from html import escape

Rows = Sequence[Sequence[str]]


def text(caption: str, head: Sequence[str], rows: Rows) -> str:
    """A table of aligned columns: the first to the left, the others to the right."""
    lines = [list(head), *map(list, rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(head))]
    drawn = [[line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])] for line in lines]
    return "\n".join([caption, *("  ".join(line).rstrip() for line in drawn)])


def html(caption: str, head: Sequence[str], rows: Rows) -> str:
    """The same for a notebook, with headers that a screen reader names."""
    top = "".join(f'<th scope="col">{escape(cell)}</th>' for cell in head)
    body = "".join(
        f'<tr><th scope="row">{escape(row[0])}</th>' + "".join(f"<td>{escape(cell)}</td>" for cell in row[1:]) + "</tr>"
        for row in rows
    )
    return f"<table><caption>{escape(caption)}</caption><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table>"


def seconds(value: float | None) -> str:
    """``1.24 ms``: three digits, in the unit that fits."""
    if value is None:
        return "-"
    if value < 0:  # a small remainder
        return "-" + seconds(-value)
    unit, factor = ("s", 1.0) if value >= 0.9995 else ("ms", 1e3) if value * 1e3 >= 0.9995 else ("us", 1e6)
    return f"{_digits(value * factor)} {unit}" if value else "0"


def count(value: float | None) -> str:
    """``12,345``, or ``not counted`` where there is no number."""
    return "not counted" if value is None else f"{value:,.0f}"


def percent(value: float) -> str:
    """``61 %`` of a whole."""
    return f"{100 * value:.0f} %"


def _digits(value: float) -> str:
    return f"{value:.2f}" if value < 9.995 else f"{value:.1f}" if value < 99.95 else f"{value:.0f}"
