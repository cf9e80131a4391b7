"""Clusters for the proofs of this folder; and what its tests measure, shown at the end of the run as a table."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import pytest

import bpkit as bp


@pytest.fixture(scope="module", params=["shm", "gloo"])
def clusters(request: pytest.FixtureRequest) -> Iterator[dict[int, bp.Cluster]]:
    """One cluster of each size up to 4, on each transport."""
    made = {n: bp.Cluster(n, backend=request.param, timeout=20) for n in (1, 2, 3, 4)}
    yield made
    for cluster in made.values():
        cluster.close()


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Print the rows that tests put among their properties as "bytes"."""
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
