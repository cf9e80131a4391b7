"""ZeRO, parameter servers and local SGD as plans: accepted, and their mutants refused."""

from __future__ import annotations

import itertools

import pytest

from bpkit.plan import Action, PlanError, asynchronous_server, check, local_sgd, parameter_server, zero
from bpkit.plan.strategies.servers import Clock, ages


@pytest.mark.parametrize("level", [1, 2, 3])
@pytest.mark.parametrize("workers", [1, 2, 3])
def test_zero_is_accepted(workers, level):
    for units, microbatches, prefetch, reshard in itertools.product((1, 2, 4), (1, 2), (True, False), (True, False)):
        check(zero(workers, level, units, microbatches, prefetch, reshard))


def volume(plan) -> float:
    """Parameters moved a step, times (n-1)/n, with units of equal size."""
    moved = sum(a.kind in ("SCATTER_GRAD", "UNSHARD") for a in plan.rows[0])
    return moved / plan.stages


def test_volumes_of_the_table():
    assert volume(zero(4, 1, units=4, microbatches=3)) == 2
    assert volume(zero(4, 2, units=4, microbatches=3)) == 4  # k + 1
    assert volume(zero(4, 3, units=4, reshard=False)) == 2
    assert volume(zero(4, 3, units=4)) == 3 - 1 / 4  # the last unit is used twice in a row


def removed(plan, kind):
    """Mutants without one action of a kind."""
    for r, row in enumerate(plan.rows):
        for i, action in enumerate(row):
            if action.kind == kind:
                rows = [list(other) for other in plan.rows]
                del rows[r][i]
                yield action, plan.with_rows(rows)


@pytest.mark.parametrize("kind", ["SCATTER_GRAD", "UNSHARD", "UPDATE", "ZERO", "B"])
@pytest.mark.parametrize("level", [1, 2, 3])
def test_zero_with_an_action_missing_is_refused(level, kind):
    for _, mutant in removed(zero(2, level, units=3), kind):
        with pytest.raises(PlanError):
            check(mutant)


def test_a_parameter_buffer_in_use_is_not_filled():
    action, mutant = next(removed(zero(2, 3, units=3), "RESHARD"))
    assert action == Action(0, "RESHARD")
    with pytest.raises(PlanError, match="the parameter buffer it fills still holds stage 0"):
        check(mutant)


@pytest.mark.parametrize(("workers", "servers"), [(1, 1), (2, 1), (3, 2), (4, 4)])
def test_parameter_servers_are_accepted_and_mutants_refused(workers, servers):
    plan = parameter_server(workers, servers, buckets=2)
    check(plan)
    for kind in ("SEND_G", "ADD_G", "SEND_P", "RECV_P", "UPDATE"):
        for _, mutant in removed(plan, kind):
            with pytest.raises(PlanError):
                check(mutant)


def test_local_sgd_needs_its_average_and_its_own_gradients():
    plan = local_sgd(3, period=2, buckets=2)
    check(plan)
    assert not plan.exact
    for _, mutant in removed(plan, "AVERAGE"):
        with pytest.raises(PlanError, match="AVERAGE is missing"):
            check(mutant)
    for _, mutant in removed(plan, "ZERO"):
        with pytest.raises(PlanError, match="not one microbatch of its own shard"):
            check(mutant)


@pytest.mark.parametrize(
    ("staleness", "arrivals", "answered"),
    [(1, [1, 1, 2, 2], [[1], [], [1, 2], [2]]), (0, [1, 2, 1, 2], [[], [1, 2], [], [1, 2]])],
)
def test_stale_synchronous_answers(staleness, arrivals, answered):
    clock = Clock(2, staleness)
    assert [clock.arrived(worker) for worker in arrivals] == answered


def test_ages_count_the_updates_since_the_parameters_were_read():
    assert ages(asynchronous_server(2, [1, 1, 2, 2], staleness=1)) == [0, 0, 2, 0]
    assert ages(asynchronous_server(2, [1, 2, 1, 2], staleness=0)) == [0, 1, 0, 1]


def test_asynchronous_plans_hold_one_gradient_an_update():
    plan = asynchronous_server(2, [1, 2, 2, 1, 1, 2], staleness=1)
    check(plan)
    rows = [list(row) for row in plan.rows]
    at = rows[0].index(Action(0, "UPDATE"))
    del rows[0][at]
    with pytest.raises(PlanError):
        check(plan.with_rows(rows))


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        ((2, [1, 2], -1), "staleness must be a whole number of at least 0, not -1"),
        ((2, [1, 1, 2]), "each worker from 1 to 2 equally often"),
        ((2, [1, 3]), "each worker from 1 to 2"),
        ((2, [1, 1, 2, 2], 0), "cannot arrive again before it is answered"),
    ],
)
def test_impossible_arrivals_are_named(arguments, why):
    with pytest.raises(ValueError, match=why):
        asynchronous_server(*arguments)


def test_bad_numbers_are_named():
    with pytest.raises(ValueError, match="the level is 1 .* not 4"):
        zero(2, 4)
    with pytest.raises(ValueError, match="3 servers do not fit on 2 workers"):
        parameter_server(2, 3)
    with pytest.raises(ValueError, match="period must be a whole number"):
        local_sgd(2, 0)
