"""The checker: correct plans are accepted, and each kind of mistake is refused, at its cell."""

import sys
from contextlib import nullcontext
from time import perf_counter

import pytest

import bpkit as bp
from bpkit.plan import Action, Part, Plan, PlanError, check
from bpkit.plan.checker.check import order

from .hand_written import PIPELINE_1F1B, SHARDED, TENSOR, TOKENS, plans, ring


@pytest.mark.parametrize("plan", plans(), ids=lambda plan: plan.name)
def test_correct_plans_are_accepted(plan):
    check(plan)


def test_a_norm_before_the_sum_of_tied_gradients_is_refused():
    network = bp.nn.gpt(12, 8, width=8, heads=2, layers=1)
    plan = bp.plan.compile(bp.plan.one_f_one_b(2, 2), network, clip=True).plan
    check(plan)
    rows = [list(row) for row in plan.rows]
    for row in rows:
        norm = row.pop(next(i for i, action in enumerate(row) if action.kind == "NORM"))
        row.insert(next(i for i, action in enumerate(row) if action.kind == "SUM_TIED"), norm)
    with pytest.raises(PlanError, match="SUM_TIED comes once"):
        check(plan.with_rows(rows))


def test_a_sum_of_tied_gradients_before_a_backward_is_refused():
    network = bp.nn.gpt(12, 8, width=8, heads=2, layers=1)
    plan = bp.plan.compile(bp.plan.one_f_one_b(2, 2), network).plan
    rows = [[Action(stage, "SUM_TIED"), *row] for stage, row in enumerate(plan.rows)]
    with pytest.raises(PlanError, match="no backward of stage 0 has run"):
        check(plan.with_rows(rows))


def test_an_update_before_the_norm_that_clips_it_is_refused():
    plan = bp.plan.compile(bp.plan.data_parallel(2, 2), bp.nn.mlp([4, 4, 4]), clip=True).plan
    row = list(plan.rows[0])
    update = row.pop(next(i for i, action in enumerate(row) if action.kind == "UPDATE"))
    row.insert(next(i for i, action in enumerate(row) if action.kind == "NORM"), update)
    with pytest.raises(PlanError, match="NORM comes later"):
        check(plan.with_rows([row]))


@pytest.mark.parametrize(
    ("plan", "was", "now", "why"),
    [
        (bp.plan.zero(2, 1, units=2), "1SCATTER_GRAD", "1REDUCE_GRAD", "no parts to gather"),
        (bp.plan.local_sgd(2, 2), "0UPDATE 0ZERO", "0UPDATE 0UPDATE 0ZERO", "applied twice"),
        (bp.plan.local_sgd(2, 2), "0UPDATE 0ZERO", "0UPDATE 0AVERAGE 0ZERO", "averaged once, after all 2 updates"),
        (bp.plan.gpipe(1, 1, buckets=2, recompute=True), "0RECOMPUTE0", "0RECOMPUTE0 0RECOMPUTE0", "kept already"),
    ],
)  # fmt: skip
def test_what_random_mutants_found_is_refused(plan, was, now, why):
    check(plan)
    text = str(plan)
    assert was in text
    with pytest.raises(PlanError, match=why):
        check(Plan.parse(text.replace(was, now, 1)))


def test_a_stage_that_shares_its_parameter_buffer_is_not_whole_when_a_step_begins():
    """Where each rank has a buffer of its own, another stage's parameters lie there: on gloo, not in shared memory."""
    plan = bp.plan.zero(2, 3, units=3, microbatches=2)
    moved = str(plan).replace(" 0UNSHARD 1UNSHARD 0F0", " 1UNSHARD 0F0") + " {}UNSHARD"
    with pytest.raises(PlanError, match="stage 0 is whole when a step begins, in a buffer that it shares with stage 2"):
        check(Plan.parse(moved.format(0)))
    alone = bp.plan.zero(2, 3, units=2)  # each of its stages has a buffer to itself
    check(Plan.parse(str(alone).replace(" 0UNSHARD 1UNSHARD 0F0", " 1UNSHARD 0F0") + " 0UNSHARD"))


def test_an_update_of_another_ranks_stage_after_the_norm_is_refused_as_others_are():
    plan = bp.plan.compile(bp.plan.one_f_one_b(2, 1), bp.nn.mlp([4, 4, 4]), clip=True).plan
    with pytest.raises(PlanError, match="0UPDATE: stage 0 does not live on this rank"):
        check(plan.with_rows([list(plan.rows[0]), [*plan.rows[1], Action(0, "UPDATE")]]))


def test_a_reduction_of_another_ranks_stage_is_refused():
    rows = [list(row) for row in bp.plan.one_f_one_b(2, 1, data=2).rows]
    rows[0].append(Action(1, "REDUCE_GRAD"))
    with pytest.raises(PlanError, match="stage 1 does not live on this rank"):
        check(bp.plan.one_f_one_b(2, 1, data=2).with_rows(rows))


@pytest.mark.parametrize("plan", plans(), ids=lambda plan: plan.name)
def test_every_plan_with_one_action_missing_is_refused(plan):
    missed = []
    for r, row in enumerate(plan.rows):
        for i, action in enumerate(row):
            rows = [list(other) for other in plan.rows]
            del rows[r][i]
            try:
                check(plan.with_rows(rows))
                missed.append(str(action))
            except ValueError:
                pass
    assert missed == []


@pytest.mark.parametrize("plan", plans(), ids=lambda plan: plan.name)
def test_every_doubled_gradient_or_update_is_refused(plan):
    for r, row in enumerate(plan.rows):
        for i, action in enumerate(row):
            if action.kind in ("B", "W", "REDUCE_GRAD", "UPDATE", "ADD_G"):
                rows = [list(other) for other in plan.rows]
                rows[r].insert(i, action)
                if action.kind == "REDUCE_GRAD" and plan.mesh.data == 1:
                    continue
                with pytest.raises(PlanError):
                    check(plan.with_rows(rows))


def edited(text: str, old: str, new: str) -> Plan:
    assert text.count(old) == 1
    return Plan.parse(text.replace(old, new))


DATA = str(bp.plan.data_parallel(2, buckets=2))


@pytest.mark.parametrize(
    ("plan", "cell", "why"),
    [
        (edited(DATA, " 1REDUCE_GRAD", ""), "1UPDATE", "lacks shard 1 microbatch 0"),
        (edited(DATA, "0B0 0REDUCE_GRAD", "0REDUCE_GRAD 0B0"), "0UPDATE", "is not the sum of all shards"),
        (edited(DATA, "0ZERO 1ZERO", "1ZERO"), "0UPDATE", "a gradient of an earlier step"),
        (edited(DATA, "0F0 1F0 1LOSS0", "0F0 1UPDATE 1F0 1LOSS0"), "1UPDATE", "is not the sum"),
        (edited(DATA, "1UPDATE 0UPDATE", "1UPDATE"), "end of row", "stage 0 was updated 0 times"),
        (edited(DATA, "1REDUCE_GRAD 0B0", "1REDUCE_GRAD 1REDUCE_GRAD 0B0"), "1UPDATE", "too often"),
        (edited(DATA, "1LOSS0 1B0", "1B0 1LOSS0"), "1B0", "gradient of output"),
        (edited(DATA, "1UPDATE 0UPDATE", "1UPDATE 0UPDATE 0AVERAGE"), "0AVERAGE", "averaging parameters"),
        (edited(PIPELINE_1F1B, "1RECV_F0 1F0", "1F0 1RECV_F0"), "1F0", "is not on this rank"),
        (edited(PIPELINE_1F1B, " 0SEND_F1", ""), "1RECV_F1", "the next message from rank 0 is 0SEND_F2"),
        (edited(PIPELINE_1F1B, " 0SEND_F2", ""), "0RECV_B2", "deadlock"),
        (edited(PIPELINE_1F1B, "0F2 0SEND_F2 0RECV_B1 0B1 0RECV_B2 0B2", "0RECV_B1 0B1 0RECV_B2 0B2 0F2 0SEND_F2"),
         "0RECV_B2", "deadlock"),
        (edited(TENSOR, " 1SUM_F0", ""), "2F0", "reads a partial sum: 1 of 2 tensor ranks"),
        (edited(TENSOR, " 1SUM_B0", ""), "0B0", "reads a partial sum"),
        (edited(TENSOR, "0F0 1F0", "0F0 0SUM_F0 1F0"), "0SUM_F0", "counted 2 times"),
        (edited(TOKENS, " 1GATHER_F0", ""), "2F0", "needs all tokens, and edge 2 holds others"),
        (edited(TOKENS, "2SCATTER_F0", "2SUM_F0"), "3F0", "needs its own tokens, and edge 3 holds others"),
        (edited(TOKENS, "0F0 0SCATTER_F0", "0F0 0GATHER_F0"), "0GATHER_F0", "not hold the sum of this rank's"),
        (edited(TOKENS, "3GATHER_B0", "3SUM_B0"), "3SUM_B0", "not a partial sum"),
        (edited(TOKENS, " 1SUM_G", ""), "1UPDATE", "lacks shard 0 microbatch 0"),
        (edited(SHARDED, "0UPDATE[1/2]", "0UPDATE[0/2]"), "UPDATE", "lacks shard 0 microbatch 0, shard 1"),
    ],
)  # fmt: skip
def test_mistakes_are_refused_at_their_cell(plan, cell, why):
    with pytest.raises(PlanError, match=why) as error:
        check(plan)
    marked = str(error.value).split(">>", 1)[1].split("<<", 1)[0]
    assert cell in marked


def test_messages_between_two_ranks_keep_their_order():
    plan = ring(3)
    rows = [list(row) for row in plan.rows]
    receives = [i for i, action in enumerate(rows[0]) if action.kind == "ADD_G"]
    a, b = receives
    rows[0][a], rows[0][b] = rows[0][b], rows[0][a]
    with pytest.raises(PlanError, match=r"next message from rank 2 is 0SEND_G\[2/3\]>0"):
        check(plan.with_rows(rows))


@pytest.mark.parametrize(("was", "now"), [
    ("0F0", "0F0 0SEND_F0 1RECV_F0"),  # neighbouring stages on one rank
    ("0UPDATE", "0SEND_P>0 0RECV_P<0 0UPDATE"),
    ("0UPDATE", "0SWAP_G[0/2]>0 0UPDATE"),
])  # fmt: skip
def test_a_message_to_oneself_is_refused(was, now):
    plan = bp.plan.expand(bp.plan.data_parallel(2, 2), "ring")
    changed = Plan.parse(str(plan).replace(f" {was}", f" {now}", 1))
    with pytest.raises(PlanError, match="is this rank itself"):
        check(changed)


def test_an_exchange_that_blocks_has_no_place_in_training():
    """Twice the same exchange leaves all as it was, so only where it stands is wrong."""
    plan = bp.plan.expand(bp.plan.one_f_one_b(2, 2, data=2), "ring")
    check(plan)
    rows = [list(row) for row in plan.rows]
    for index, row in enumerate(rows):
        at = next(i for i, action in enumerate(row) if action.kind == "UPDATE")
        row[at:at] = [Action(row[at].stage, "SWAP_G", None, Part(0, 1, 2), 1 - index % 2)] * 2
    with pytest.raises(PlanError, match="SWAP_G.*: it stands only in a collective by itself"):
        check(plan.with_rows(rows))
    check(bp.plan.collective("all_to_all", 3))


def test_a_deadlock_shows_the_grid():
    plan = ring(2)
    rows = [list(row) for row in plan.rows]
    rows[0] = [action for action in rows[0] if action.kind != "SEND_G"]
    with pytest.raises(PlanError, match="deadlock") as error:
        check(plan.with_rows(rows))
    assert "row 0" in str(error.value) and "row 1" in str(error.value)


def test_the_order_of_independent_collectives_must_agree():
    row = "0ZERO 1ZERO 0F0 1F0 1LOSS0 1B0 0B0 {} {} 1UPDATE 0UPDATE"
    one, two = row.format("1REDUCE_GRAD", "0REDUCE_GRAD"), row.format("0REDUCE_GRAD", "1REDUCE_GRAD")
    text = "plan p\nmesh data=2\nstages 2\nmicrobatches 1\nmerge mean\nexpanded yes\nrow {}\nrow {}"
    check(Plan.parse(text.format(one, one)))
    with pytest.raises(PlanError, match="deadlock"):
        check(Plan.parse(text.format(one, two)))


@pytest.mark.parametrize(("was", "now", "why"), [
    ("microbatches 1", "microbatches 99999999", "no action is of microbatch 1 of 99999999"),
    ("stages 1", "stages 99999999", "place gives each of 99999999 stages one of 1 pipeline ranks, not"),
    ("stages 1\nmicrobatches 1\nmerge mean\nplace 0", "stages 99999999\nmicrobatches 1", "no row runs stage 1 forward"),
    ("data=2", "data=99999999", "99,999,999 ranks with 599,999,994 actions are more than the 10,000,000"),
    ("tensor=1", "tensor=99999999", "199,999,998 ranks with"),
    ("pipeline=1", "pipeline=99999999", "needs 99999999: one a pipeline coordinate"),
    ("place 0", "place 0\nexpanded yes", "needs 2: one a .pipeline, data. coordinate"),
    ("place 0", "place 0\ntied 0 99999999", "tied are two or more of 1 stages"),
    ("place 0", "place 0\nservers 99999999", ""),
    ("0UPDATE", "0UPDATE[0/99999999] 0UPDATE[1:99999999/99999999]", ""),
], ids=lambda text: text[:24])  # fmt: skip
def test_large_numbers_end_at_once(was, now, why):
    text = str(bp.plan.data_parallel(2))
    assert was in text
    began = perf_counter()
    with pytest.raises(ValueError, match=why) if why else nullcontext():
        check(Plan.parse(text.replace(was, now)))
    assert perf_counter() - began < 2


@pytest.mark.parametrize(("text", "was", "now"), [
    (TOKENS, " 1B0", " 1I0 1B0"), (TOKENS, " 2I0", " 2I0 2I0"),
    (str(bp.plan.zero_bubble_h1(2, 2)), " 1I0", " 1I0 1I0"), (str(bp.plan.zero_bubble_h1(2, 2)), " 1I0", " 1I0 1B0"),
], ids=["skip B", "skip I", "pipeline I", "pipeline B"])  # fmt: skip
def test_an_input_half_that_runs_twice_is_refused(text, was, now):
    """Where a skip connection ends, the second finds nothing of what the first gave away."""
    check(Plan.parse(text))
    with pytest.raises(PlanError, match="the input half of this backward has run already"):
        check(Plan.parse(text.replace(was, now, 1)))


def test_a_later_step_sees_new_weights_only():
    row = tuple(map(Action.parse, ["0ZERO", "0F0", "0LOSS0", "0B0", "0UPDATE", "0F0"]))
    with pytest.raises(PlanError, match="already updated"):
        check(Plan("p", (row,), 1))


def test_skips_may_be_nested_and_computed_again():
    """What goes past a stage is there whenever the stage runs: its data came the same way (tests/run/test_skips.py)."""
    check(Plan.parse(TOKENS.replace("skips 1-3", "skips 1-2 1-3 2-4")))
    check(Plan.parse(TOKENS.replace("4LOSS0 ", "4LOSS0 3RECOMPUTE0 ")))


@pytest.mark.parametrize("make", [
    lambda n: bp.plan.data_parallel(8, n),
    lambda n: bp.plan.one_f_one_b(4, 4 * n),
    lambda n: bp.plan.one_f_one_b(n, 16),
    lambda n: bp.plan.zero(4, 3, units=n),
    lambda n: bp.plan.expand(bp.plan.data_parallel(8, n), "ring"),
], ids=["buckets", "microbatches", "stages", "units", "parts"])  # fmt: skip
def test_the_work_of_the_checker_grows_with_the_actions(make):
    """Calls of functions, not seconds: four times the plan takes about four times the work."""

    def work(plan: Plan) -> float:
        calls = 0

        def count(frame, event, argument):
            nonlocal calls
            calls += event in ("call", "c_call")

        sys.setprofile(count)
        try:
            order.__wrapped__(plan)
        finally:
            sys.setprofile(None)
        return calls / sum(len(plan.row(at)) for at in plan.mesh.coordinates())

    assert work(make(16)) < 1.5 * work(make(4))
    assert work(make(16)) < 300


def test_an_action_on_the_stage_of_another_rank_is_refused():
    plan = bp.plan.one_f_one_b(2, 1)
    for kind in ("ZERO", "UPDATE", "RESHARD"):
        with pytest.raises(PlanError, match="stage 1 does not live on this rank"):
            check(plan.with_rows([[*plan.rows[0], Action(1, kind)], list(plan.rows[1])]))


def test_a_sum_of_a_gradient_that_was_scattered_and_not_written_since_is_refused():
    plan = bp.plan.zero(2, 3, units=3, microbatches=2)
    for kind in ("SUM_G", "REDUCE_GRAD", "SCATTER_GRAD"):
        changed = Plan.parse(str(plan).replace("2SCATTER_GRAD", f"2SCATTER_GRAD 2{kind}", 1))
        with pytest.raises(PlanError, match="no rank has written this gradient"):
            check(changed)


def test_parameters_that_are_never_gathered_are_not_dropped():
    plan = bp.plan.parameter_server(3, 2, buckets=2)
    changed = Plan.parse(str(plan).replace(" 0RECV_P", " 0RESHARD 0RECV_P", 1))
    with pytest.raises(PlanError, match="no UNSHARD of the row gathers stage 0"):
        check(changed)
