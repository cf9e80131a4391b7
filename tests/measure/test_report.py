"""Each quantity of a report, on made traces with known answers and on real workers."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass

import pytest

import bpkit as bp
from bpkit.measure import Parts
from bpkit.measure.steps import Steps, covered

from .made import PERIOD, STEP, pipeline, repeated, result, trace


def micro(parts: Parts) -> list[float]:
    """Compute, waiting for a core, exposed, idle; microseconds."""
    return [round(x * 1e6, 9) for x in (parts.compute, parts.waiting_for_core, parts.exposed_communication, parts.idle)]


def test_parts_of_a_made_trace() -> None:
    report = bp.report(result(repeated()))
    assert report.step_s.median == pytest.approx(1e-4) and report.steps == 2
    assert micro(report.ranks[0].parts) == [65, 5, 20, 10]
    assert micro(report.ranks[1].parts) == [70, 0, 10, 20]
    assert micro(report.parts) == [67.5, 2.5, 15, 15]
    assert report.throughput == pytest.approx(8 / 1e-4)


def test_hidden_communication_is_what_no_wait_covers() -> None:
    ranks = bp.report(result(repeated())).ranks
    assert [r.hidden_communication * 1e6 for r in ranks] == pytest.approx([0, 20])


def test_overlapping_communication_counts_once() -> None:
    entries = [
        (0, 0, "1REDUCE_GRAD", 0, 60, 0, -1, -1),
        (0, 0, "0REDUCE_GRAD", 20, 80, 5, -1, -1),
        (0, 0, "0B0", 25, 70, 0, 45, 0),
        (0, 0, "0UPDATE", 70, 100, 10, 20, 0),
    ]
    steps = Steps.of(trace(entries))
    assert steps.hidden_communication.item() * 1e9 == pytest.approx(80 - 5 - 10)
    assert covered([(0, 10), (5, 12), (20, 21)]) == 13 and covered([]) == 0


def test_bytes_are_not_counted_for_a_native_collective() -> None:
    report = bp.report(result(repeated()))
    assert report.bytes_sent is None and "shared memory" in report.algorithm
    assert "not counted" in repr(report)


def test_bytes_that_were_counted_at_the_send() -> None:
    report = bp.report(result(repeated(sent=120)))
    assert report.bytes_sent == 120 and [r.bytes_sent for r in report.ranks] == [120, 120]


def test_payload_is_of_the_flat_buffers_and_memory_what_the_ranks_keep() -> None:
    made = result(repeated())
    flat = sum(made.program.sizes) * 4
    report = bp.report(made)
    assert report.payload_bytes == flat and report.memory_bytes == 600
    assert [rank.memory_bytes for rank in report.ranks] == [500, 700]


def test_a_step_before_an_evaluation_is_left_out() -> None:
    starts = [0, PERIOD, 9 * PERIOD, 10 * PERIOD]  # an evaluation after the second step
    assert bp.report(result(repeated(starts=starts), accuracies=((2, 0.5),))).step_s.samples == (1e-4, 1e-4)
    assert max(bp.report(result(repeated(starts=starts))).step_s.samples) > 7e-4


def test_one_step_lasts_to_its_own_end() -> None:
    report = bp.report(result(repeated(1)))
    assert report.step_s.median == pytest.approx((90e-6 + 80e-6) / 2)
    assert report.parts.total == pytest.approx(report.step_s.median)


def test_an_interruption_does_not_shape_the_parts() -> None:
    starts = [PERIOD * i + (50 * PERIOD if i > 4 else 0) for i in range(11)]
    report = bp.report(result(repeated(starts=starts)))
    assert max(report.step_s.samples) > 50e-4
    assert micro(report.parts) == [67.5, 2.5, 15, 15]


def test_parts_sum_to_the_median_when_steps_differ() -> None:
    starts = [0, 95_000, 210_000, 300_000, 520_000, 630_000]
    report = bp.report(result(repeated(starts=starts)))
    for parts in (report.parts, *(r.parts for r in report.ranks)):
        assert parts.total == pytest.approx(report.step_s.median, rel=1e-12)
        assert min(micro(parts)) >= 0


def test_the_bubble_of_a_pipeline_is_its_span_without_work() -> None:
    entries = []
    for step, begin in enumerate((0, 80_000)):
        for rank, cell, start, end, wait, cpu in (
            (0, "0F0", 0, 10_000, 0, 10_000),
            (0, "0B0", 10_000, 60_000, 30_000, 18_000),  # blocked for 30,000, works for 20,000 wall
            (1, "1F0", 0, 20_000, 10_000, 10_000),
            (1, "1B0", 20_000, 40_000, 0, 20_000),
        ):
            entries.append((rank, step, cell, begin + start, begin + end, wait, cpu, 0))
    report = bp.report(result(trace(entries), plan=pipeline()))
    assert [round(r.bubble * 1e6, 6) for r in report.ranks if r.bubble is not None] == [30, 10]
    assert report.bubble == pytest.approx(20e-6)
    assert bp.report(result(repeated())).bubble is None


def test_simulated_traces_have_no_cpu_time() -> None:
    entries = [(rank, 0, cell, start, end, wait, -1, sent) for rank, cell, start, end, wait, _, sent in STEP]
    report = bp.report(result(trace(entries, simulated=True)))
    assert report.parts.waiting_for_core == 0


def test_table_html_and_json() -> None:
    report = bp.report(result(repeated()))
    text = repr(report)
    for words in ("waiting for core", "exposed communication", "rank 1", "100 us", "mean of ranks"):
        assert words in text
    assert report._repr_html_().count("<tr>") == 1 + 9
    read = json.loads(json.dumps(report.to_json()))
    assert read["parts"]["compute"] == report.parts.compute and len(read["ranks"]) == 2


# -- real workers -------------------------------------------------------------------------------------------


def test_two_workers_parts_sum_to_the_step_time() -> None:
    network, data = bp.nn.mlp([64, 32, 10]), bp.data.digits()
    with bp.Cluster(2) as cluster:
        found = cluster.train(network, data, bp.plan.data_parallel(2, buckets=2), batch=64, lr=0.1, steps=12)
    report = bp.report(found)
    assert report.steps == 11 and report.workers == 2
    for parts in (report.parts, *(r.parts for r in report.ranks)):
        assert parts.total == pytest.approx(report.step_s.median, rel=1e-12)
        assert all(value >= 0 for value in micro(parts)) and parts.compute > 0
    assert report.payload_bytes == sum(part.flat_size for part in network.split(found.program.cuts)) * 4
    assert report.bytes_sent is None


def test_a_sleeping_worker_is_the_other_ones_exposed_communication() -> None:
    pause = 0.03

    # Defined here, so that the class itself travels to the workers.
    @dataclass(frozen=True)
    class SleepyLinear(bp.nn.Linear):
        def at(self, site):  # type: ignore[no-untyped-def]
            passage = super().at(site)
            forward = passage.forward

            def sleepy(x, context):  # type: ignore[no-untyped-def]
                if context.first > 0:  # rows of rank 1
                    time.sleep(pause)
                return forward(x, context)

            passage.forward = sleepy  # type: ignore[method-assign]
            return passage

    network = bp.nn.Network([SleepyLinear(64, 10)], 64)
    with bp.Cluster(2) as cluster:
        found = cluster.train(network, bp.data.digits(), batch=32, lr=0.1, steps=8)
    awake, asleep = bp.report(found).ranks
    assert awake.parts.exposed_communication > 0.8 * pause
    assert asleep.parts.exposed_communication < 0.5 * pause
    assert asleep.parts.waiting_for_core > 0.8 * pause and awake.parts.waiting_for_core < 0.5 * pause
