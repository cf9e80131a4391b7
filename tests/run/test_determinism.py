"""Which runs end with the same bits: what book/howto.md says under "What gives the same bits"."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import bpkit as bp
from bpkit.plan import Plan, data_parallel, expand, parameter_server, serial, zero
from bpkit.plan.strategies.collectives import ALGORITHMS
from tests.plan.hand_written import PIPELINE_1F1B, PIPELINE_HALVES

DATA, NETWORK = bp.data.digits(), bp.nn.mlp([64, 48, 32, 10], seed=2, dropout=0.1)
MERGES = [name for name, (purpose, _) in ALGORITHMS.items() if purpose == "all_reduce"]


def weights(plan: Plan, backend: str) -> Tensor:
    """The weights after six steps on workers of their own."""
    with bp.Cluster(plan.workers, backend=backend, timeout=20) as cluster:
        result = cluster.train(NETWORK, DATA, plan, batch=72, steps=6, optimizer=bp.optim.SGD(0.1, momentum=0.9))
    return result.network.flat_parameters


@pytest.mark.parametrize("backend", ["shm", "gloo"])
@pytest.mark.parametrize(
    "plan",
    [data_parallel(3, 3), expand(data_parallel(3, 2), "ring"), zero(3, 1, units=3), zero(3, 3, units=3, microbatches=2),
     parameter_server(3, 3, buckets=2), Plan.parse(PIPELINE_1F1B), Plan.parse(PIPELINE_HALVES)],
    ids=lambda plan: plan.name,
)  # fmt: skip
def test_the_same_plan_gives_the_same_bits_again(plan, backend):
    assert torch.equal(weights(plan, backend), weights(plan, backend))


def test_two_workers_give_the_same_bits_by_every_merge_and_transport():
    expected = weights(data_parallel(2, 2), "shm")
    assert torch.equal(weights(data_parallel(2, 2), "gloo"), expected)
    for name in MERGES:
        plan = expand(data_parallel(2, 2), name)
        for backend in ("shm", "gloo"):
            assert torch.equal(weights(plan, backend), expected), (name, backend)


@pytest.mark.parametrize("workers", [3, 4])
def test_shared_memory_adds_in_the_order_of_a_server(workers):
    plan = data_parallel(workers, 2)
    assert torch.equal(weights(plan, "shm"), weights(expand(plan, "server"), "shm"))


@pytest.mark.parametrize("backend", ["shm", "gloo"])
def test_a_pipeline_gives_the_bits_of_serial_training_with_its_microbatches(backend):
    assert torch.equal(weights(Plan.parse(PIPELINE_1F1B), backend), weights(serial(1, 3), "shm"))
