"""Pipelines on real workers: gradients equal serial, whatever the schedule, the microbatches and the transport."""

from __future__ import annotations

import pytest
import torch

import bpkit as bp
from bpkit.plan import Action, Plan, naive
from tests.plan.test_pipeline import SCHEDULES

from .networks import SAMPLES, batch, every_layer
from .oracle import flat, gradient_sum, worst

EXACT = 1e-12
NETWORK = every_layer()  # nine layers, dropout at 0.1 in two places; 11 samples: the last microbatch is smaller


def assert_exact(clusters: dict[int, bp.Cluster], plan: Plan, shards: list[int] | None = None) -> None:
    inputs, targets = batch(NETWORK)
    found = clusters[plan.workers].gradients(NETWORK, inputs, targets, plan, step=3, shards=shards)
    assert worst(NETWORK, found, gradient_sum(NETWORK, inputs, targets, step=3) / SAMPLES) <= EXACT, plan.name


def fits(plan: Plan) -> bool:
    return plan.stages <= len(NETWORK.layers)


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("workers", [2, 3, 4])
@pytest.mark.parametrize("recompute", [False, True])
def test_gradients_equal_serial(clusters, name, workers, recompute):
    """One microbatch, fewer than stages, a number that divides nothing, and as many as samples."""
    for microbatches in (1, 2, 5, 11):
        plan = SCHEDULES[name](workers, microbatches, recompute=recompute)
        if fits(plan):
            assert_exact(clusters, plan)


@pytest.mark.parametrize("workers", [2, 3, 4])
def test_layer_split_equals_serial(clusters, workers):
    assert_exact(clusters, naive(workers))


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize(
    "options", [{"data": 2}, {"buckets": 2}, {"data": 2, "buckets": 2, "recompute": True}], ids=str
)
def test_replicas_and_buckets_equal_serial(clusters, name, options):
    plan = SCHEDULES[name](2, 3, **options)
    if fits(plan):
        assert_exact(clusters, plan)


def test_empty_microbatches_of_a_small_shard_change_nothing(clusters):
    for name in SCHEDULES:
        assert_exact(clusters, SCHEDULES[name](2, 5, data=2), shards=[9, 2])


def test_a_gradient_that_is_sent_late_is_not_overwritten(clusters):
    # Microbatches of one sample each: of equal size, so that a slot's memory is used again.
    rows = [list(row) for row in SCHEDULES["1f1b"](2, SAMPLES).rows]
    late = rows[1].pop(rows[1].index(Action(1, "SEND_B", 0)))
    rows[1].insert(rows[1].index(Action(1, "SEND_B", 1)), late)
    assert rows[1].index(late) > rows[1].index(Action(1, "B", 1))
    assert_exact(clusters, SCHEDULES["1f1b"](2, SAMPLES).with_rows(rows))


@pytest.mark.parametrize("name", ["1f1b", "h2", "zb_v"])
def test_weights_equal_serial_after_several_steps(clusters, name):
    data = bp.data.digits(dtype=torch.float64)
    network = bp.nn.mlp([64, 24, 24, 24, 10], seed=1, dtype=torch.float64, dropout=0.1)
    arguments = dict(batch=50, steps=8, optimizer=bp.optim.SGD(0.2, momentum=0.9))
    serial = clusters[1].train(network, data, bp.plan.serial(), **arguments)
    result = clusters[3].train(network, data, SCHEDULES[name](3, 4), **arguments)
    difference = flat(result.network.parameters()) - flat(serial.network.parameters())
    assert float(difference.abs().max()) <= 1e-10
    assert abs(result.losses - serial.losses).max() <= 1e-10
