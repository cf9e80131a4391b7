"""Pipelines: every plan is accepted, holds as many activations as its formula says, and its mutants are refused."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial

import pytest

import bpkit as bp
from bpkit.plan import (
    Action,
    Plan,
    PlanError,
    check,
    gpipe,
    interleaved,
    naive,
    one_f_one_b,
    pipedream,
    zb_v,
    zero_bubble_h1,
    zero_bubble_h2,
)
from bpkit.plan.liveness import peak_activations

SCHEDULES: dict[str, Callable[..., Plan]] = {
    "gpipe": gpipe, "1f1b": one_f_one_b, "h1": zero_bubble_h1, "h2": zero_bubble_h2, "zb_v": zb_v,
    **{f"interleaved {v}": partial(interleaved, chunks=v) for v in (1, 2, 3)},
}  # fmt: skip
OPTIONS = [{}, {"data": 2}, {"recompute": True}, {"data": 2, "recompute": True, "buckets": 2}]


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_every_pipeline_is_accepted(name, options):
    for workers in (1, 2, 3, 4):
        for microbatches in range(1, 9):
            plan = SCHEDULES[name](workers, microbatches, **options)
            check(plan)
            assert Plan.parse(str(plan)) == plan


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("microbatches", [1, 5, 8])
def test_eight_ranks_are_accepted(name, microbatches):
    check(SCHEDULES[name](8, microbatches))


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_naive_runs_one_microbatch(options):
    plan = naive(3, **options)
    check(plan)
    assert plan.microbatches == 1 and all(peak_activations(row) == options.get("buckets", 1) for row in plan.rows[:1]
                                          if not options.get("recompute"))  # fmt: skip


@pytest.mark.parametrize("p", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("m", [1, 2, 3, 5, 8])
def test_peak_activations_follow_the_formulas(p, m):
    def peaks(plan: Plan) -> list[int]:
        return [peak_activations(row) for row in plan.rows]

    ranks = range(p)
    assert peaks(gpipe(p, m)) == [m] * p
    assert peaks(one_f_one_b(p, m)) == peaks(pipedream(p, m)) == [min(m, p - r) for r in ranks]
    assert peaks(zero_bubble_h1(p, m)) == [min(m, p)] * p
    assert peaks(zero_bubble_h2(p, m)) == [min(m, 2 * p - 1)] * p
    assert max(peaks(zb_v(p, m))) <= min(2 * m, 2 * p)
    if m >= 2 * p - 1:
        assert peaks(zb_v(p, m)) == [2 * p] * p
    for v in (1, 2, 4):
        most = max(peaks(interleaved(p, m, v)))
        assert most <= m * v
        if m > p and m % p == 0:
            assert peaks(interleaved(p, m, v)) == [2 * (p - r - 1) + (v - 1) * p + 1 for r in ranks]


def test_recomputation_keeps_one_forward_at_a_time():
    for plan in (gpipe(4, 8, recompute=True), one_f_one_b(4, 8, recompute=True)):
        assert [peak_activations(row) for row in plan.rows] == [1] * 4
    last = [str(action) for action in one_f_one_b(2, 2, recompute=True).rows[1]]
    assert "1RECOMPUTE0" not in last  # its backward follows its forward directly: nothing would be gained


def test_a_backward_without_its_recomputation_is_refused():
    plan = gpipe(2, 2, recompute=True)
    backward = replace(plan, rows=(tuple(a for a in plan.rows[0] if str(a) != "0RECOMPUTE1"), plan.rows[1]))
    check(backward)  # then the activations of the forward are simply kept
    early = [a for a in plan.rows[0] if str(a) != "0RECOMPUTE1"] + [Action(0, "RECOMPUTE", 1)]
    with pytest.raises(PlanError, match="saved state"):
        check(replace(plan, rows=(tuple(early), plan.rows[1])))


def test_reductions_come_after_the_last_weight_half_and_its_send():
    row = [str(action) for action in zero_bubble_h1(3, 4, data=2).rows[1]]
    assert row.index("1REDUCE_GRAD") > max(row.index("1W3"), row.index("1SEND_B3"))


def test_layers_of_a_stage_are_balanced_or_given():
    network = bp.nn.mlp([4, 64, 64, 4, 4], seed=0)
    program = bp.plan.compile(one_f_one_b(2, 2), network)
    assert program.cuts == tuple(bp.nn.balanced_cuts([c.total for c in network.costs()], 2))
    given = bp.plan.compile(one_f_one_b(2, 2), network, weights=[1] * len(network.layers))
    assert given.cuts == tuple(bp.nn.balanced_cuts([1] * len(network.layers), 2)) != program.cuts
    with pytest.raises(ValueError, match="one weight a layer"):
        bp.plan.compile(one_f_one_b(2, 2), network, weights=[1])


# PipeDream


@pytest.mark.parametrize("p", [1, 2, 3, 4])
@pytest.mark.parametrize("m", [1, 2, 5, 8])
def test_pipedream_is_accepted_with_its_stash_and_staleness_only(p, m):
    plan = pipedream(p, m)
    check(plan)
    assert Plan.parse(str(plan)) == plan and not plan.exact
    if p > 1 and m > 1:
        with pytest.raises(PlanError, match="its forward read version 0"):
            check(replace(plan, stashed=False))
        with pytest.raises(PlanError, match=f"updates old; the plan allows {min(p, m) - 2}"):
            check(replace(plan, staleness=min(p, m) - 2))


def test_each_update_of_pipedream_holds_one_microbatch():
    plan = pipedream(2, 3)
    last = plan.rows[1]
    at = [i for i, action in enumerate(last) if action.kind == "ZERO"][1]
    with pytest.raises(PlanError, match="is not one microbatch of one shard"):
        check(plan.with_rows([list(plan.rows[0]), [*last[:at], *last[at + 1 :]]]))
    at = max(i for i, action in enumerate(last) if action.kind == "UPDATE")
    with pytest.raises(PlanError, match="was updated 2 times, not 3"):
        check(plan.with_rows([list(plan.rows[0]), [*last[:at], *last[at + 1 :]]]))


# Mutants


def mutants(plan: Plan, draw: random.Random, count: int) -> Iterator[tuple[str, Plan]]:
    """One action of a plan dropped or doubled."""
    for _ in range(count):
        rows = [list(row) for row in plan.rows]
        row = draw.choice(rows)
        at = draw.randrange(len(row))
        action = row[at]
        how = draw.choice(["drop", "double"])
        if how == "drop":
            del row[at]
        else:
            row.insert(draw.randrange(len(row) + 1), action)
        yield f"{how} {action}", plan.with_rows(rows)


@pytest.mark.parametrize(
    "plan", [gpipe(2, 3, data=2), one_f_one_b(3, 4), zero_bubble_h2(3, 4), zb_v(2, 4), interleaved(2, 4),
             one_f_one_b(3, 4, recompute=True), pipedream(3, 4)], ids=lambda plan: plan.name,
)  # fmt: skip
def test_what_mutants_lack_is_named(plan):
    harmless = {"ZERO", "RECOMPUTE", "LOSS"}  # twice in a row, or kept instead of computed again, they change nothing
    for what, changed in mutants(plan, random.Random(plan.digest), 80):
        try:
            check(changed)
        except ValueError:
            continue
        how, action = what.split()
        kind = Action.parse(action).kind
        assert kind in harmless or (how, kind) in {("double", kind) for kind in ("F", "I", "REDUCE_GRAD")}, what
        assert not (how == "drop" and kind in ("LOSS", "ZERO")), what


def test_bad_numbers_are_named():
    with pytest.raises(ValueError, match="one_f_one_b: microbatches must be a whole number"):
        one_f_one_b(2, 0)
    with pytest.raises(ValueError, match="gpipe: workers must be"):
        gpipe(0, 2)
    with pytest.raises(ValueError, match="interleaved: chunks must be"):
        interleaved(2, 2, 0)
    with pytest.raises(ValueError, match="zb_v: data must be"):
        zb_v(2, 2, data=0)
    with pytest.raises(ValueError, match="unknown merge"):
        gpipe(2, 2, merge="median")
