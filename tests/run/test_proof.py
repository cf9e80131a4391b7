"""The proof: every plan, on every transport, for every way of sharding, against the oracle of its class."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

import bpkit as bp
from tests.plan.hand_written import PIPELINE_1F1B, ring

from .networks import SAMPLES, batch, every_layer, regression
from .oracle import flat, gradient_sum, merged, worst

EXACT = 1e-12
NETWORKS = {"every layer, cross-entropy": every_layer(), "regression": regression()}


def shardings(workers: int) -> dict[str, list[int]]:
    """Even, uneven, and (for more than one worker) a rank without samples."""
    even = bp.data.dataset.shard_sizes(SAMPLES, workers)
    uneven = [1] * (workers - 1) + [SAMPLES - workers + 1]
    empty = bp.data.dataset.shard_sizes(SAMPLES, workers - 1) + [0] if workers > 1 else even
    return {"even": even, "uneven": uneven, "a rank without samples": empty[::-1]}


@pytest.fixture(scope="module", params=["shm", "gloo"])
def clusters(request: pytest.FixtureRequest) -> Iterator[dict[int, bp.Cluster]]:
    made = {n: bp.Cluster(n, backend=request.param) for n in (1, 2, 3, 4)}
    yield made
    for cluster in made.values():
        cluster.close()


@pytest.mark.parametrize("network", NETWORKS.values(), ids=NETWORKS.keys())
@pytest.mark.parametrize("sharding", ["even", "uneven", "a rank without samples"])
@pytest.mark.parametrize("workers", [1, 2, 3, 4])
@pytest.mark.parametrize("merge", ["mean", "mean-of-means", "sum"])
def test_gradients_equal_the_oracle(clusters, workers, sharding, network, merge):
    inputs, targets = batch(network)
    sizes = shardings(workers)[sharding]
    for buckets, microbatches in ((1, 1), (3, 1), (2, 3)):
        plan = bp.plan.data_parallel(workers, buckets, merge, microbatches)
        found = clusters[workers].gradients(network, inputs, targets, plan, shards=sizes, step=5)
        oracle = merged(network, inputs, targets, sizes, merge, step=5)
        assert worst(network, found, oracle) <= EXACT


def test_autograd_agrees_with_serial():
    for network in NETWORKS.values():
        inputs, targets = batch(network)
        report = bp.nn.gradcheck(network, inputs, targets)
        assert report.ok, str(report)


def test_merges_differ_as_the_chapter_says(clusters):
    network = NETWORKS["every layer, cross-entropy"]
    inputs, targets = batch(network)
    mean, average, total = (
        clusters[2].gradients(network, inputs, targets, bp.plan.data_parallel(2, merge=merge), shards=[3, 8])
        for merge in ("mean", "mean-of-means", "sum")
    )
    assert worst(network, total, 2 * average) <= EXACT
    assert worst(network, average, mean) > 0.01  # unequal shards: the average is another gradient


@pytest.mark.parametrize("workers", [2, 3, 4])
def test_a_ring_written_by_hand_runs(clusters, workers):
    network = NETWORKS["every layer, cross-entropy"]
    inputs, targets = batch(network)
    found = clusters[workers].gradients(network, inputs, targets, ring(workers), shards=shardings(workers)["uneven"])
    assert worst(network, found, gradient_sum(network, inputs, targets) / SAMPLES) <= EXACT


def test_a_pipeline_written_by_hand_runs(clusters):
    network = NETWORKS["every layer, cross-entropy"]
    inputs, targets = batch(network)
    found = clusters[2].gradients(network, inputs, targets, bp.plan.Plan.parse(PIPELINE_1F1B))
    assert worst(network, found, gradient_sum(network, inputs, targets) / SAMPLES) <= EXACT


OPTIMIZERS = {
    "SGD": bp.optim.SGD(0.2, momentum=0.9, weight_decay=0.01),
    "clipped": bp.optim.SGD(0.2, clip=0.05),
    "AdamW": bp.optim.AdamW(bp.optim.cosine(0.01, 50, warmup=5)),
}


@pytest.mark.parametrize("optimizer", OPTIMIZERS.values(), ids=OPTIMIZERS.keys())
@pytest.mark.parametrize("workers", [2, 3])
def test_weights_equal_serial_after_50_steps(clusters, workers, optimizer):
    data = bp.data.digits(dtype=torch.float64)
    network = bp.nn.mlp([64, 24, 24, 10], seed=1, dtype=torch.float64, dropout=0.1)
    serial = clusters[1].train(network, data, bp.plan.serial(), batch=50, steps=50, optimizer=optimizer)
    result = clusters[workers].train(
        network,
        data,
        bp.plan.data_parallel(workers, 2),
        batch=50,
        steps=50,
        optimizer=optimizer,
        shards=range(1, workers + 1),
    )
    a, b = flat(result.network.parameters()), flat(serial.network.parameters())
    assert float((a - b).abs().max()) <= 1e-10
    assert worst(network, flat(network.parameters()), a) > 0.01  # it did train, and left the given network alone
    assert abs(result.losses - serial.losses).max() <= 1e-10


def test_same_run_same_bits(clusters):
    data, network = bp.data.digits(), bp.nn.mlp([64, 32, 10], seed=2)
    runs = [clusters[3].train(network, data, batch=64, steps=10, lr=0.1) for _ in range(2)]
    assert torch.equal(runs[0].network.flat_parameters, runs[1].network.flat_parameters)


@pytest.mark.parametrize("workers", [1, 2, 4])
def test_digits_reach_97_percent(clusters, workers):
    data = bp.data.digits(dtype=torch.float64)
    network = bp.nn.mlp([64, 128, 10], seed=0, dtype=torch.float64)
    plan = bp.plan.data_parallel(workers, 2)
    optimizer = bp.optim.SGD(0.1, momentum=0.9)
    result = clusters[workers].train(
        network, data, plan, batch=128, steps=400, optimizer=optimizer, evaluate_every=25, target=0.97
    )
    assert result.accuracies[-1][1] >= 0.97
    assert len(result.losses) == result.accuracies[-1][0] < 400  # it stopped when it got there
