"""The simulator gives exactly the makespans, bubbles and periods of the literature, where communication is free."""

from __future__ import annotations

import re

import numpy as np
import pytest

import bpkit as bp
from bpkit.measure.pipeline import bubble, makespan, period
from bpkit.measure.steps import Steps
from bpkit.plan import (
    Action,
    Plan,
    PlanError,
    data_parallel,
    expand,
    gpipe,
    interleaved,
    naive,
    one_f_one_b,
    parameter_server,
    pipedream,
    serial,
    zb_v,
    zero,
    zero_bubble_h1,
    zero_bubble_h2,
)
from bpkit.plan.passes import tie
from bpkit.simulate import Times, simulate
from tests.plan.hand_written import plans

THIRDS = [(1, 1, 1), (1, 0.5, 1.5), (2, 1.5, 1), (0.25, 1, 1)]


@pytest.mark.parametrize("schedule", [gpipe, one_f_one_b])
@pytest.mark.parametrize("times", THIRDS)
@pytest.mark.parametrize(("p", "m"), [(1, 3), (2, 1), (3, 2), (4, 8), (8, 24), (8, 5)])
def test_gpipe_and_1f1b(schedule, times, p, m):
    trace = simulate(schedule(p, m), Times(*times))
    assert makespan(trace) == pytest.approx((m + p - 1) * sum(times))
    assert period(trace) == pytest.approx((m + p - 1) * sum(times))
    assert bubble(trace)[0] == pytest.approx((p - 1) * sum(times))


@pytest.mark.parametrize(("p", "m", "fraction"), [(4, 8, 0.2727), (8, 24, 0.2258), (8, 64, 0.0986)])
def test_fractions_of_bubble(p, m, fraction):
    span, work = makespan(simulate(one_f_one_b(p, m), steps=1)), 3 * m
    assert round((span - work) / span, 4) == fraction
    assert (span - work) / work == pytest.approx((p - 1) / m)


def table(plan: Plan) -> list[str]:
    """One line a rank, one cell a unit of time, small letters for the second chunk."""
    trace, p = simulate(plan, steps=1), plan.mesh.pipeline
    cells = [["."] * round(trace.end.max() / 1e9) for _ in range(p)]
    for rank, _, text, start, end, wait in trace.rows():
        action = Action.parse(text)
        letter = action.kind if action.stage < p else action.kind.lower()
        for unit in range(round((start + wait) / 1e9), round(end / 1e9)):
            cells[rank][unit] = f"{letter}{action.mb}" if action.verb.stream == "compute" else cells[rank][unit]
    return [" ".join(cell.ljust(2) for cell in row).strip() for row in cells]


@pytest.mark.parametrize(
    "plan", [naive(3), gpipe(2, 3), one_f_one_b(2, 3), interleaved(2, 2), zero_bubble_h1(2, 3), zero_bubble_h2(2, 3),
             zb_v(2, 3), pipedream(2, 3)], ids=lambda plan: plan.name,
)  # fmt: skip
def test_tables_in_docstrings_are_what_happens(plan):
    said = re.findall(r"rank \d  (.*)", getattr(bp.plan, plan.name.split("(")[0]).__doc__)
    assert said == table(plan)


def test_one_rank_at_a_time():
    assert makespan(simulate(naive(4))) == 12


@pytest.mark.parametrize(("v", "gap"), [(1, 9), (2, 4.5), (4, 2.25)])
def test_interleaving_divides_the_bubble(v, gap):
    trace = simulate(interleaved(4, 8, v), Times(1 / v, 1 / v, 1 / v))
    assert makespan(trace) - 24 == pytest.approx(gap)
    assert period(trace) - 24 == pytest.approx(gap)


@pytest.mark.parametrize(
    ("plan", "chunks", "expected"),
    [(one_f_one_b(4, 8), 1, 33), (zero_bubble_h1(4, 8), 1, 27), (zero_bubble_h2(4, 8), 1, 24), (zb_v(4, 8), 2, 24),
     (zb_v(3, 7), 2, 21)], ids=str,
)  # fmt: skip
def test_periods_of_zero_bubble(plan, chunks, expected):
    trace = simulate(plan, Times(1 / chunks, 1 / chunks, 1 / chunks), steps=5)
    assert period(trace) == pytest.approx(expected)


@pytest.mark.parametrize(("f", "i", "w"), [(1, 1, 1), (1, 1, 0.5), (1, 1.2, 0.8), (2, 1, 1)])
@pytest.mark.parametrize(("p", "m"), [(3, 5), (4, 12), (8, 24)])
def test_bubbles_of_zero_bubble_where_w_is_at_most_i(p, m, f, i, w):
    times, work = Times(f, i, w), m * (f + i + w)
    assert period(simulate(zero_bubble_h1(p, m), times, 5)) - work == pytest.approx((p - 1) * (f + i - w))
    assert period(simulate(zero_bubble_h2(p, m), times, 5)) - work == pytest.approx((p - 1) * (f + i - 2 * w))


@pytest.mark.parametrize("p", [2, 3, 4, 8])
def test_a_rank_of_zero_bubble_never_waits_after_its_first_start(p):
    m = 3 * p
    assert bubble(simulate(zero_bubble_h2(p, m))) == pytest.approx(np.zeros(p))
    assert makespan(simulate(zero_bubble_h2(p, m))) == 3 * m + p - 1
    assert bubble(simulate(zb_v(p, m), Times(0.5, 0.5, 0.5))) == pytest.approx(np.zeros(p))
    assert makespan(simulate(zero_bubble_h1(p, m))) == 3 * m + p - 1  # (p-1)(F+I-W)


def test_a_global_norm_brings_the_bubble_back():
    network = bp.nn.mlp([4] * 6, seed=0)
    clipped = bp.plan.compile(zero_bubble_h2(4, 8), network, clip=True)
    assert period(simulate(clipped, steps=5)) == 27 > period(simulate(zero_bubble_h2(4, 8), steps=5)) == 24


def test_recomputation_costs_one_forward_a_microbatch():
    assert makespan(simulate(gpipe(4, 8, recompute=True))) == makespan(simulate(gpipe(4, 8))) + 8 == 41


def test_stages_of_unequal_cost_and_other_compute():
    trace = simulate(serial(2, 3), Times([1, 2], [1, 2], [3, 4], {"UPDATE": 5, "LOSS": 1}), steps=1)
    assert trace.end.max() / 1e9 == 3 * (1 + 2 + 1 + 2 + 3 + 4 + 1) + 2 * 5
    assert makespan(trace) == 3 * (1 + 2 + 1 + 2 + 3 + 4 + 1)


def test_pipedream_has_no_bubble_in_mid_run():
    short, long = (makespan(simulate(pipedream(4, m), steps=1)) for m in (20, 40))
    assert long - short == 20 * 3


@pytest.mark.parametrize(
    "plan",
    [*plans(), expand(data_parallel(3, 2), "ring"), expand(data_parallel(4), "halving_doubling"), zero(2, 3, units=3),
     parameter_server(3, 2), one_f_one_b(2, 3, data=2), tie(one_f_one_b(4, 3), [(0, 3)])], ids=lambda plan: plan.name,
)  # fmt: skip
def test_every_accepted_plan_runs_to_its_end(plan):
    trace = simulate(plan, steps=2)
    assert trace.simulated and len(trace) == 2 * sum(len(plan.row(at)) for at in plan.mesh.coordinates())
    assert (trace.end >= trace.start).all() and (trace.wait >= 0).all()
    rows = {r: [a for a in plan.row(at) if a.verb.stream == "compute"] for r, at in enumerate(plan.mesh.coordinates())}
    for rank, row in rows.items():
        kept = trace.where(trace.compute() & (trace.rank == rank))
        assert (kept.end[:-1] <= kept.start[1:] + kept.wait[1:]).all() and len(kept) == 2 * len(row)


def test_a_reader_waits_where_the_executor_would():
    trace = simulate(one_f_one_b(2, 2), steps=1)
    first = next(row for row in trace.rows() if row[2] == "1F0")
    assert first[3:] == (0, 2 * 10**9, 10**9)  # reached at 0, waits for one forward, runs one second


def test_a_simulated_trace_is_read_like_a_measured_one(tmp_path):
    trace = simulate(one_f_one_b(2, 4), steps=4)
    steps = Steps.of(trace)
    assert steps.compute == pytest.approx(np.full((2, 3), 12.0)) and (steps.waiting_for_core == 0).all()
    assert steps.exposed_communication[:, 1:] == pytest.approx(np.full((2, 2), 3.0))  # the bubble
    assert trace.to_chrome(tmp_path / "trace.json").stat().st_size > 1000
    assert bp.show.timeline(trace) is not None


def test_bad_input_is_named():
    with pytest.raises(ValueError, match="at least one step"):
        simulate(serial(), steps=0)
    with pytest.raises(ValueError, match="2 stages, but there are times for 1"):
        simulate(serial(2), Times([1.0]))
    with pytest.raises(ValueError, match="not negative"):
        Times(-1)
    with pytest.raises(ValueError, match="at least three steps"):
        period(simulate(serial(), steps=2))
    with pytest.raises(ValueError, match="no passes of step 7"):
        makespan(simulate(serial()), 7)
    with pytest.raises(PlanError):
        simulate(Plan.parse(str(one_f_one_b(2, 2)).replace("0SEND_F1 ", "")))


RATIOS = [(1, 1, 1), (2, 1, 1), (2, 3, 1), (3, 2, 2), (1, 2, 2), (1, 3, 2), (1, 1, 2)]  # F, I and W


def gaps(made, p: int, microbatches, chunks: int = 1):
    """Measured bubbles of steps that follow one another: (m, F, I, W, period less work)."""
    for m in microbatches:
        plan = made(p, m)
        for f, i, w in RATIOS:
            trace = simulate(plan, Times(f / chunks, i / chunks, w / chunks), 5)
            yield m, f, i, w, period(trace) - m * (f + i + w)


@pytest.mark.parametrize("p", [2, 3])
def test_formulas_of_bubbles_hold_inside_their_conditions_and_fail_outside(p):
    for m, f, i, w, gap in gaps(zero_bubble_h1, p, range(1, 2 * p + 2)):
        assert (gap == pytest.approx((p - 1) * (f + i - w))) == (w <= i and w <= f and m >= p), ("h1", m, f, i, w)
        if f < w <= i and m >= p:
            assert gap == pytest.approx((p - 1) * i)
    for m, f, i, w, gap in gaps(zero_bubble_h2, p, range(1, 2 * p + 2)):
        assert (gap == pytest.approx((p - 1) * (f + i - 2 * w))) == (w <= i and w <= f and m >= 2 * p - 1), (m, f, i, w)
    for m, f, i, w, gap in gaps(zb_v, p, range(1, 2 * p + 2), 2):
        if f == i == w:
            assert (gap == pytest.approx(0)) == (m >= 2 * p - 1), m
    for v in (2, 3):
        for m, f, i, w, gap in gaps(lambda p, m, v=v: interleaved(p, m, v), p, range(1, 2 * p + 1), v):
            assert (gap == pytest.approx((p - 1) * (f + i + w) / v)) == (m % p == 0), (v, m, f, i, w)
