"""A collective over an axis of one rank changes nothing, on any transport, or is refused before the start."""

from __future__ import annotations

from itertools import product

import pytest
import torch

import bpkit as bp
from bpkit.compress import TopK
from bpkit.plan import Action, Plan, PlanError, check, data_parallel, one_f_one_b, serial, zero
from bpkit.plan.action import VERBS

from .networks import batch, every_layer

NETWORK = every_layer()
PLANS = [one_f_one_b(2, 2), data_parallel(2, 2), serial(2)]
KINDS = [kind for kind, verb in VERBS.items() if verb.axis in ("data", "tensor") and not verb.peer]


def accepted(plan: Plan, kind: str) -> list[Plan]:
    """The plan with one more collective in one of its rows, wherever the checker takes it."""
    found = []
    mb = 0 if VERBS[kind].scope == "mb" else None
    for r, row in enumerate(plan.rows):
        for place, stage in product(range(len(row) + 1), {action.stage for action in row}):
            rows = [list(other) for other in plan.rows]
            rows[r].insert(place, Action(stage, kind, mb))
            try:
                check(plan.with_rows(rows))
            except PlanError:
                continue
            found.append(plan.with_rows(rows))
    return found


@pytest.mark.parametrize("plan", PLANS, ids=lambda plan: plan.name)
@pytest.mark.parametrize("kind", KINDS)
def test_a_collective_over_one_rank_changes_nothing(clusters, plan, kind):
    inputs, targets = batch(NETWORK)
    cluster = clusters[plan.workers]
    expected = cluster.gradients(NETWORK, inputs, targets, plan)
    plans = accepted(plan, kind)
    alone = getattr(plan.mesh, VERBS[kind].axis) == 1
    assert plans or not alone or not kind.startswith(("SUM", "REDUCE"))
    for changed in plans:
        found = cluster.gradients(NETWORK, inputs, targets, changed)
        assert torch.allclose(found, expected, rtol=0, atol=1e-14), changed


def test_nothing_is_compressed_where_nothing_is_sent(clusters):
    digits, network = bp.data.digits(torch.float64), bp.nn.mlp([64, 12, 10], seed=1, dtype=torch.float64)
    plan = serial()
    row = [*plan.rows[0][:-1], Action(0, "REDUCE_GRAD"), plan.rows[0][-1]]
    by_hand, alone = (clusters[1].train(network, digits, p, batch=8, steps=2, lr=0.1, compress=compress).network
                      for p, compress in ((plan.with_rows([row]), TopK(0.1)), (plan, None)))  # fmt: skip
    assert torch.equal(by_hand.flat_parameters, alone.flat_parameters)


@pytest.mark.parametrize("pieces", [["[0/2]"], ["[0/4]", "[1/4]"], ["[0/6]", "[1:3/6]"], ["[0/8]", "[1/8]", "[1/4]"]])
@pytest.mark.parametrize("optimizer", [bp.optim.SGD(0.1), bp.optim.Adam(0.01), bp.optim.SGD(0.1, clip=0.01)])
def test_a_rank_may_update_its_own_part_in_pieces(clusters, pieces, optimizer):
    digits, network = bp.data.digits(torch.float64), bp.nn.mlp([64, 13, 10], seed=1, dtype=torch.float64)
    whole = zero(2, 1)
    rows = [[action for action in whole.rows[0] if action.kind not in ("UPDATE", "UNSHARD")] for _ in range(2)]
    for data, row in enumerate(rows):
        for text in pieces:
            part = Action.parse(f"0UPDATE{text}").part
            shift = data * part.of // 2
            row.append(Action(0, "UPDATE", part=part._replace(lo=part.lo + shift, hi=part.hi + shift)))
        row.append(Action(0, "UNSHARD"))
    by_hand = Plan("by pieces", tuple(map(tuple, rows)), 1, whole.mesh, expanded=True)
    one, two = (clusters[2].train(network, digits, plan, batch=8, steps=3, optimizer=optimizer).network
                for plan in (whole, by_hand))  # fmt: skip
    assert torch.allclose(one.flat_parameters, two.flat_parameters, rtol=0, atol=1e-14)
