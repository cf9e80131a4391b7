"""What tests of this folder measure is shown at the end of the run, as a table."""

from __future__ import annotations

from collections.abc import Sequence

import pytest


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Print the rows that tests gave to ``record_property("bytes", ...)``."""
    passed = terminalreporter.getreports("passed")
    rows = [value for report in passed for name, value in report.user_properties if name == "bytes"]
    counted: dict[tuple[str, str], list[str]] = {}
    for what, formula, transport, sent in rows:
        counted.setdefault((what, _text(formula)), []).append(f"{transport} {_text(sent)}")
    if counted:
        terminalreporter.section("bytes that each rank sends: predicted, and counted on each transport")
    for (what, formula), found in counted.items():
        terminalreporter.write_line(f"{what:<56}{formula:<24}{', '.join(found)}")


def _text(numbers: Sequence[int]) -> str:
    return " ".join(map(str, numbers))
