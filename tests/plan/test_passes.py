"""Passes: refine, sends and receives, reductions, clipping."""

from dataclasses import replace

import pytest

from bpkit.plan import Action, Mesh, Plan, check, complete, refine
from bpkit.plan.liveness import loans, peak_activations
from bpkit.plan.passes import communicate


def one_f_one_b(stages: int, microbatches: int, **mesh: int) -> Plan:
    """Compute-only 1F1B: warm-up forwards, then one forward and one backward in turn."""
    rows = []
    for stage in range(stages):
        warm = min(microbatches, stages - stage - 1)
        row = [Action(stage, "F", m) for m in range(warm)]
        for m in range(microbatches):
            row += [Action(stage, "F", warm + m)] * (warm + m < microbatches) + [Action(stage, "B", m)]
        rows.append(tuple(row))
    return Plan("1F1B", tuple(rows), stages, Mesh(pipeline=stages, **mesh), microbatches)


@pytest.mark.parametrize(("stages", "microbatches"), [(2, 1), (2, 4), (4, 2), (4, 8), (3, 7)])
@pytest.mark.parametrize("data", [1, 2])
def test_a_completed_pipeline_is_accepted(stages, microbatches, data):
    check(complete(one_f_one_b(stages, microbatches, data=data)))


def test_peak_activations_of_1f1b():
    plan = complete(one_f_one_b(4, 8))
    assert [peak_activations(row) for row in plan.rows] == [4, 3, 2, 1]  # min(m, p - rank)


def test_slots_cover_what_is_received_and_not_yet_freed():
    plan = complete(one_f_one_b(4, 8))
    assert loans(plan.rows[0]) == {("RECV_B", 0): 1}
    assert loans(plan.rows[1])["RECV_F", 1] >= 3
    assert all(count <= 8 for row in plan.rows for count in loans(row).values())


def test_refined_stages_are_reduced_one_by_one():
    plan = complete(refine(one_f_one_b(2, 2, data=2), 3))
    check(plan)
    row = [str(action) for action in plan.rows[1]]
    assert plan.stages == 6 and plan.place == (0, 0, 0, 1, 1, 1)
    assert row.index("5REDUCE_GRAD") < row.index("4B1") < row.index("3B1") < row.index("3SEND_B1")
    assert row.index("3SEND_B1") < row.index("3REDUCE_GRAD")


def test_refine_comes_first():
    with pytest.raises(ValueError, match="refine comes before the other passes"):
        refine(complete(one_f_one_b(2, 2)), 2)


def test_refine_keeps_what_a_plan_says_and_comes_before_its_cuts():
    plan = replace(one_f_one_b(2, 2, data=2), merge="sum", opened=True, staleness=3, cuts=(4,))
    assert refine(plan, 1) == plan
    kept = refine(replace(plan, cuts=None), 2)
    assert (kept.merge, kept.opened, kept.staleness, kept.stages, kept.cuts) == ("sum", True, 3, 4, None)
    with pytest.raises(ValueError, match="refine comes before cuts"):
        refine(plan, 2)


def test_compute_that_waits_in_a_circle_is_named():
    rows = (
        tuple(map(Action.parse, ("0F0", "0B0", "0F1", "0B1"))),
        tuple(map(Action.parse, ("1F1", "1F0", "1B0", "1B1"))),
    )
    with pytest.raises(ValueError, match="wait for each other .*row 0 at 0B0"):
        communicate(Plan("p", rows, 2, Mesh(pipeline=2), 2))


def test_split_halves_reduce_after_the_last_w():
    rows = (tuple(map(Action.parse, ["0F0", "1F0", "1I0", "0I0", "1W0", "0W0"])),)
    row = [str(action) for action in complete(Plan("p", rows, 2, Mesh(data=2))).rows[0]]
    assert row.index("1REDUCE_GRAD") == row.index("1W0") + 1
    assert row.index("0REDUCE_GRAD") == row.index("0W0") + 1


def test_clipping_puts_a_norm_after_all_reductions_and_before_all_updates():
    plan = complete(one_f_one_b(2, 2, data=2), norm=True)
    check(plan)
    row = [action.kind for action in plan.rows[0]]
    assert row.index("REDUCE_GRAD") < row.index("NORM") < row.index("UPDATE")
