"""Periods in units, published bubbles with messages that take time, and messages that are held back on real workers."""

from __future__ import annotations

import numpy as np
import pytest

import bpkit as bp
from bpkit.course.schedules import bubble_in_units, hold_messages, mean_waits, period_in_units
from bpkit.simulate import Times, simulate

# Qi et al. 2024 (arXiv:2401.10241), tables 5 and 9: p, m, milliseconds of F, I, W and a message; 1F1B, H1 and H2.
PUBLISHED = [
    (8, 24, 18.522, 18.086, 9.337, 0.601, 0.2431, 0.1585, 0.1083),
    (8, 32, 18.513, 18.086, 9.331, 0.626, 0.1985, 0.1242, 0.0837),
    (8, 64, 18.546, 18.097, 9.321, 0.762, 0.1240, 0.0674, 0.0444),
    (8, 24, 29.718, 29.444, 19.927, 0.527, 0.2347, 0.1323, 0.0698),
    (8, 32, 29.802, 29.428, 19.530, 0.577, 0.1898, 0.1045, 0.0559),
    (16, 48, 11.347, 11.248, 8.132, 0.377, 0.2552, 0.1397, 0.0672),
]


@pytest.mark.parametrize("row", PUBLISHED, ids=str)
def test_bubbles_are_those_that_were_published(row):
    p, m, f, i, w, message, *published = row
    times = Times(f, i, w, {"SEND_F": message, "SEND_B": message})
    for make, bubble in zip((bp.plan.one_f_one_b, bp.plan.zero_bubble_h1, bp.plan.zero_bubble_h2), published,
                            strict=True):  # fmt: skip
        trace = simulate(make(p, m), times, steps=1)
        work = trace.where(trace.compute() & (trace.cpu > 0))
        own = [work.where(work.rank == rank) for rank in range(p)]
        span = max(one.end.max() - (one.start + one.wait).min() for one in own) / 1e9
        assert 1 - m * (f + i + w) / span == pytest.approx(bubble, abs=5.1e-5)


def test_a_message_travels_while_its_sender_goes_on():
    plan = bp.plan.gpipe(2, 4)
    assert period_in_units(plan, 4, message=3) == period_in_units(plan, 4) + 2 * 3  # one way and back, all at once
    assert period_in_units(bp.plan.naive(3), 4, message=3) == 4 * 9 + 4 * 3


def test_units_are_of_a_ranks_whole_share():
    for plan in (bp.plan.naive(4), bp.plan.one_f_one_b(4, 8), bp.plan.interleaved(4, 8), bp.plan.zb_v(4, 8)):
        work = 8 * 3
        assert period_in_units(plan, 8) == pytest.approx(work + bubble_in_units(plan, 8))
    assert bubble_in_units(bp.plan.naive(4), 8) == 3 * work
    assert bubble_in_units(bp.plan.interleaved(4, 8, 2), 8) == pytest.approx(4.5)


def test_messages_that_are_held_back_lengthen_a_step_and_change_no_gradient():
    network, data = bp.nn.mlp([64, 32, 32, 10], seed=0), bp.data.digits()
    plan, seconds = bp.plan.gpipe(2, 4), 0.15
    with bp.Cluster(2) as cluster:
        runs = []
        for late in (0.0, seconds, 0.0):
            cluster.call(hold_messages, late)
            runs.append(cluster.train(network, data, plan, batch=32, lr=0.1, steps=4))
    before, late, after = (float(np.median(run.step_times)) for run in runs)
    assert late > 1.9 * seconds  # there and back
    assert max(before, after) < late
    assert np.array_equal(runs[0].losses, runs[1].losses)
    waits = mean_waits(runs[1:2])
    assert 0 <= waits.simulated < 1 and waits.measured > 0.5
