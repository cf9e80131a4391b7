"""What is said of the machine: stolen time."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from bpkit.measure import host, machine


def test_stolen_time_is_the_eighth_number_of_the_kernel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stat = tmp_path / "stat"
    stat.write_text("cpu  100 0 50 800 10 0 0 40 7 0\ncpu0 1 2 3\n")
    assert host.cpu_times(stat) == (40, 1000)  # the guests' 7 are in the first 100 already
    monkeypatch.setattr(host, "cpu_times", lambda: (40, 1000))
    assert host.stolen() == pytest.approx(0.04)
    assert host.stolen((20, 500)) == pytest.approx(0.04) and host.stolen((40, 900)) == 0


@pytest.mark.parametrize("text", [None, "", "cpu 1 2 3", "cpu a b c d e f g h"])
def test_where_the_system_does_not_tell_it_is_unknown(tmp_path: Path, text: str | None) -> None:
    if text is not None:
        (tmp_path / "stat").write_text(text)
    assert host.cpu_times(tmp_path / "stat") is None


def test_unknown_stays_unknown(monkeypatch: pytest.MonkeyPatch) -> None:
    assert host.stolen(None) is None
    monkeypatch.setattr(host, "cpu_times", lambda: None)
    assert host.stolen() is None and machine()["steal"] is None


@pytest.mark.skipif(sys.platform != "linux", reason="/proc/stat is Linux's")
def test_a_machine_says_how_much_was_stolen() -> None:
    assert 0 <= machine()["steal"] < 1
