"""Traces: collecting, choosing, step times, and the file that Perfetto opens."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from bpkit.trace import Log, Trace

CELLS = ["0F0", "0REDUCE_GRAD", "0UPDATE"]


def made() -> Trace:
    """Two ranks, steps 3 and 4; nanoseconds.  Rank 1 is 500 later."""
    logs = []
    for rank in range(2):
        log = Log.empty([3, 4], 3)
        for line in range(2):
            at = 1_000_000 + 10_000 * line + 500 * rank
            log.start[line] = [at, at + 3_000, at + 3_500]
            log.end[line] = [at + 3_000, at + 6_000, at + 8_000]
            log.wait[line] = [0, 500, 2_500]
        logs.append(log)
    return Trace.collect(logs, [CELLS, CELLS])


def test_collect_joins_the_logs_and_starts_at_zero() -> None:
    trace = made()
    assert len(trace) == 12 and trace.ranks == 2 and trace.cells == tuple(CELLS)
    assert trace.steps.tolist() == [3, 4] and trace.start.min() == 0
    assert next(trace.rows()) == (0, 3, "0F0", 0, 3_000, 0)
    assert list(trace.rows())[-1] == (1, 4, "0UPDATE", 14_000, 18_500, 2_500)


def test_choosing_entries() -> None:
    trace = made()
    assert len(trace.at_step(4)) == 6 and set(trace.at_step(4).step) == {4}
    assert trace.where(trace.kinds() == "REDUCE_GRAD").wait.tolist() == [500] * 4
    assert trace.compute().tolist() == [True, False, True] * 4
    assert not trace.where(trace.rank == 0).simulated


def test_step_times_are_periods_and_the_last_lasts_to_its_end() -> None:
    assert made().step_times() == pytest.approx([10e-6, 8e-6])


def test_a_log_that_ended_early() -> None:
    log = Log.empty(range(5), 2).until(1)
    assert log.steps.tolist() == [0, 1] and log.start.shape == (2, 2)


def test_ranks_with_rows_of_their_own() -> None:
    logs = [Log.empty([0], 1), Log.empty([0], 2)]
    trace = Trace.collect(logs, [["0F0"], ["1F0", "1B0"]])
    assert trace.cells == ("0F0", "1F0", "1B0") and trace.cell.tolist() == [0, 1, 2]
    assert np.array_equal(trace.rank, [0, 1, 1])


def test_chrome_trace(tmp_path: Path) -> None:
    read = json.loads(made().to_chrome(tmp_path / "step.json").read_text())
    events = [e for e in read["traceEvents"] if e["ph"] == "X"]
    assert len([e for e in events if e["cat"] == "F"]) == 4
    first = next(e for e in events if e["name"] == "0F0")
    assert (first["ts"], first["dur"], first["pid"], first["args"]) == (0, 3, 0, {"step": 3})
    update = next(e for e in events if e["name"] == "0UPDATE")
    assert (update["ts"], update["dur"]) == (6, 2)  # the work, after the wait
    wait = next(e for e in events if e["name"] == "wait for 0UPDATE")
    assert (wait["ts"], wait["dur"], wait["cat"]) == (3.5, 2.5, "wait")
    assert wait["tid"] == update["tid"]
    reduce = next(e for e in events if e["name"] == "0REDUCE_GRAD")
    assert (reduce["ts"], reduce["dur"]) == (3, 3) and reduce["tid"] != update["tid"]
    names = {e["args"]["name"] for e in read["traceEvents"] if e["name"] == "process_name"}
    assert names == {"rank 0", "rank 1"}
