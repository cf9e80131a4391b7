"""The checker against random mutants: what it accepts is right when it is run, so nothing wrong is missed."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

import bpkit as bp
from bpkit.plan import (
    Action,
    Part,
    Plan,
    check,
    compile,
    data_parallel,
    expand,
    local_sgd,
    parameter_server,
    serial,
    shard_optimizer,
    tensor_parallel,
    zero,
)  # fmt: skip
from bpkit.plan.strategies.pipeline import gpipe, interleaved, one_f_one_b, zb_v
from tests.plan.hand_written import PIPELINE_1F1B

from .networks import SAMPLES, batch, every_layer
from .oracle import gradient_sum, worst

NETWORK = every_layer()
MUTANTS = 60  # a plan
EXPANDED = ["ring", "server", "sharded_server", "tree", "halving_doubling"]
TEXT = bp.data.text(length=8)
GPT = bp.nn.gpt(TEXT.vocabulary, 8, width=8, heads=2, layers=1, seed=1, dtype=torch.float64, dropout=0.1)


def plans() -> list[Plan]:
    made = [data_parallel(2, 3, microbatches=2), Plan.parse(PIPELINE_1F1B), parameter_server(3, 2, buckets=2)]
    made += [expand(data_parallel(n, 2), name) for n in (2, 3) for name in EXPANDED]
    made.append(expand(data_parallel(4), "hierarchical"))
    made += [one_f_one_b(3, 3), zb_v(2, 2), interleaved(2, 3), gpipe(2, 2, recompute=True)]
    made += [one_f_one_b(2, 2, data=2)]
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
    made = {n: bp.Cluster(n, backend="shm", timeout=10) for n in (2, 3, 4)}
    yield made
    for cluster in made.values():
        cluster.close()


def hybrids() -> list[Plan]:
    """Plans of a GPT with tied weights, as they are compiled: with SUM_TIED."""
    layout, by_tokens = bp.nn.tensor_layout(GPT), bp.nn.tensor_layout(GPT, sequence=True)
    made = [tensor_parallel(base, 2, layout) for base in (serial(1, 2), data_parallel(2), one_f_one_b(2, 2))]
    made += [one_f_one_b(2, 2), one_f_one_b(2, 2, data=2), shard_optimizer(made[1])]
    made += [tensor_parallel(base, 2, by_tokens) for base in (serial(1, 2), one_f_one_b(2, 2, recompute=True))]
    return [compile(plan, GPT).plan for plan in made]


@pytest.mark.parametrize("plan", plans(), ids=lambda plan: plan.name)
def test_what_the_checker_accepts_is_right(clusters, plan):
    judge(clusters, NETWORK, *batch(NETWORK), plan)


@pytest.mark.parametrize("plan", hybrids(), ids=lambda plan: plan.name)
def test_what_the_checker_accepts_of_hybrids_is_right(clusters, plan):
    judge(clusters, GPT, TEXT.inputs[:SAMPLES], TEXT.targets[:SAMPLES], plan)


def by_training() -> list[tuple[Plan, bp.nn.Network, bp.data.Dataset, bp.optim.Optimizer]]:
    """Plans whose outcome only weights show: clipped ones, as they are compiled, and local SGD."""
    mlp, digits = bp.nn.mlp([64, 16, 12, 10], seed=1, dtype=torch.float64), bp.data.digits(dtype=torch.float64)
    layouts = [bp.nn.tensor_layout(GPT, sequence) for sequence in (False, True)]
    cases = [(plan, mlp, digits) for plan in (data_parallel(2, 2), zero(2, 2, units=2), one_f_one_b(2, 2, data=2))]
    split = [tensor_parallel(data_parallel(2), 2, layout) for layout in layouts]
    cases += [(plan, GPT, TEXT) for plan in (one_f_one_b(2, 2), *split)]
    clip = bp.optim.SGD(0.5, clip=0.02)
    made = [(compile(plan, network, clip=True).plan, network, data, clip) for plan, network, data in cases]
    return [*made, (local_sgd(2, 2, buckets=2), mlp, digits, bp.optim.SGD(0.5))]


@pytest.mark.parametrize(("plan", "network", "data", "optimizer"), by_training(), ids=lambda x: getattr(x, "name", ""))
def test_what_the_checker_accepts_trains_to_the_same_weights(clusters, plan, network, data, optimizer):
    def weights(of: Plan) -> Tensor:
        result = clusters[of.workers].train(network, data, of, batch=12, steps=2, optimizer=optimizer)
        return result.network.flat_parameters

    expected = weights(plan)

    def harmless(changed: Plan) -> bool:
        return float((weights(changed) - expected).abs().max()) <= 1e-12

    count(plan, harmless)


def judge(clusters, network: bp.nn.Network, inputs: Tensor, targets: Tensor, plan: Plan) -> None:
    """Run each mutant that is accepted: its gradient must be right."""
    oracle = gradient_sum(network, inputs, targets, step=1) / network.loss.terms(targets)

    def harmless(changed: Plan) -> bool:
        found = clusters[plan.workers].gradients(network, inputs, targets, changed, step=1)
        return worst(network, found, oracle) <= 1e-12

    count(plan, harmless)


def count(plan: Plan, harmless: Callable[[Plan], bool]) -> None:
    """No mutant that the checker accepts may do harm."""
    draw, counts = random.Random(plan.digest), Counter()
    for _ in range(MUTANTS):
        try:
            changed = mutant(plan, draw)
            check(changed)
        except ValueError:
            counts["refused"] += 1
            continue
        counts["harmless" if harmless(changed) else "missed"] += 1
    print(f"{plan.name}: {dict(counts)}")
    assert counts["missed"] == 0
    assert counts["refused"] > MUTANTS // 4
