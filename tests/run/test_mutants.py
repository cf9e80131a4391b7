"""The checker against random mutants: what it accepts is right when it is run, so nothing wrong is missed."""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import replace

import pytest

import bpkit as bp
from bpkit.plan import Action, Part, Plan, check, data_parallel, expand, parameter_server, zero
from bpkit.plan.pipeline import gpipe, interleaved, one_f_one_b, zb_v
from tests.plan.hand_written import PIPELINE_1F1B

from .networks import SAMPLES, batch, every_layer
from .oracle import gradient_sum, worst

NETWORK = every_layer()
MUTANTS = 60  # a plan


def plans() -> list[Plan]:
    made = [data_parallel(2, 3, microbatches=2), Plan.parse(PIPELINE_1F1B), parameter_server(3, 2, buckets=2)]
    made += [expand(data_parallel(n, 2), name) for n in (2, 3) for name in ("ring", "tree", "halving_doubling")]
    made += [one_f_one_b(3, 3), zb_v(2, 2), interleaved(2, 3), gpipe(2, 2, recompute=True)]
    return made + [zero(2, level, units=3, microbatches=2) for level in (1, 2, 3)]


def altered(action: Action, draw: random.Random, plan: Plan) -> Action:
    """The same action with one coordinate changed."""
    changes = [{"stage": draw.randrange(plan.stages)}]
    if action.mb is not None:
        changes.append({"mb": draw.randrange(plan.microbatches)})
    if action.peer is not None:
        changes.append({"peer": draw.randrange(plan.mesh.data)})
    if action.part is not None:
        low = draw.randrange(action.part.of)
        changes.append({"part": Part(low, low + 1, action.part.of)})
    twins = {"ADD_G": "RECV_G", "RECV_G": "ADD_G", "REDUCE_GRAD": "SCATTER_GRAD", "SCATTER_GRAD": "REDUCE_GRAD"}
    if action.kind in twins:
        changes.append({"kind": twins[action.kind]})
    return replace(action, **draw.choice(changes))


def mutant(plan: Plan, draw: random.Random) -> Plan:
    """A plan with one action dropped, doubled, moved or altered."""
    rows = [list(row) for row in plan.rows]
    row = draw.choice(rows)
    at = draw.randrange(len(row))
    how = draw.choice(["drop", "double", "move", "alter"])
    if how == "drop":
        del row[at]
    elif how == "double":
        row.insert(draw.randrange(len(row) + 1), row[at])
    elif how == "move":
        row.insert(draw.randrange(len(row)), row.pop(at))
    else:
        row[at] = altered(row[at], draw, plan)
    return plan.with_rows(rows)


@pytest.fixture(scope="module")
def clusters():
    made = {n: bp.Cluster(n, backend="shm", timeout=10) for n in (2, 3)}
    yield made
    for cluster in made.values():
        cluster.close()


@pytest.mark.parametrize("plan", plans(), ids=lambda plan: plan.name)
def test_what_the_checker_accepts_is_right(clusters, plan):
    inputs, targets = batch(NETWORK)
    oracle = gradient_sum(NETWORK, inputs, targets, step=1) / SAMPLES
    draw, counts = random.Random(plan.digest), Counter()
    for _ in range(MUTANTS):
        try:
            changed = mutant(plan, draw)
            check(changed)
        except ValueError:
            counts["refused"] += 1
            continue
        found = clusters[plan.workers].gradients(NETWORK, inputs, targets, changed, step=1)
        counts["harmless" if worst(NETWORK, found, oracle) <= 1e-12 else "missed"] += 1
    print(f"{plan.name}: {dict(counts)}")
    assert counts["missed"] == 0
    assert counts["refused"] > MUTANTS // 4
