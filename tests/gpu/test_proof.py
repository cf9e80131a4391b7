"""The proof on GPUs: every plan against serial training on the CPU, in float64."""

from __future__ import annotations

import pytest
import torch

import bpkit as bp
from bpkit.plan import data_parallel, expand, parameter_server, serial, zero
from tests.run import networks, test_models, test_precision
from tests.run.oracle import flat, gradient_sum, worst

EXACT, SAMPLES = 1e-12, test_models.SAMPLES
MODELS = test_models.MODELS


def check(cluster: bp.Cluster, network: bp.nn.Network, data: bp.data.Dataset, plan: bp.plan.Plan, **more) -> None:
    """A plan's gradient on a GPU is serial's on the CPU."""
    inputs, targets = data.inputs[:SAMPLES], data.targets[:SAMPLES]
    oracle = gradient_sum(network, inputs, targets, step=3) / network.loss.terms(targets)
    found = cluster.gradients(network, inputs, targets, plan, step=3, **more)
    assert found.device.type == "cpu" and worst(network, found, oracle) <= EXACT, plan.name


def sharded(n: int) -> list[bp.plan.Plan]:
    made = [zero(n, level, units=3, microbatches=2) for level in (1, 2, 3)] + [parameter_server(n, buckets=2)]
    return made + [expand(data_parallel(n, 2), name) for name in ("ring", "tree")]


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("base", [serial(), serial(2), serial(3, 4)], ids=lambda plan: plan.name)
def test_one_worker(one, model, base):
    check(one, *MODELS[model], base)


def test_every_layer_and_loss(one):
    for network in (networks.every_layer(), networks.regression()):
        inputs, targets = networks.batch(network)
        check(one, network, bp.data.Dataset("batch", inputs, targets, inputs, targets), serial(2, 3))


@pytest.mark.parametrize("model", MODELS)
def test_several_workers_on_few_gpus(staged, model):
    network, data = MODELS[model]
    for plan in test_models.plans(network):
        check(staged[plan.workers], network, data, plan)


@pytest.mark.parametrize("workers", [2, 3])
def test_shards_and_expanded_collectives_on_few_gpus(staged, workers):
    for plan in sharded(workers):
        check(staged[workers], *MODELS["mlp"], plan)


def test_an_asynchronous_server_replays_on_few_gpus(staged):
    data, network = bp.data.digits(dtype=torch.float64), bp.nn.mlp([64, 16, 10], seed=1, dtype=torch.float64)
    live = staged[3].train_asynchronous(network, data, batch=60, steps=20, lr=0.1, staleness=2)
    again = staged[3].train(network, data, live.plan, batch=60, steps=20, lr=0.1)
    assert worst(network, flat(live.network.parameters()), flat(again.network.parameters())) <= 1e-10


@pytest.mark.gpus(2)
@pytest.mark.parametrize("model", MODELS)
def test_nccl_over_all_gpus(nccl, model):
    network, data = MODELS[model]
    for workers, cluster in nccl.items():
        for plan in [*test_models.plans(network), *(sharded(workers) if model == "mlp" else [])]:
            if plan.workers == workers:
                check(cluster, network, data, plan)


@pytest.mark.gpus(2)
def test_batch_norm_over_all_ranks_of_nccl(nccl):
    data = bp.data.digits(dtype=torch.float64)
    network = bp.nn.convnet(channels=(1, 4, 8), seed=1, dtype=torch.float64)
    arguments = dict(batch=50, steps=5, lr=0.1, sync_batch_norm=True)
    with bp.Cluster(2, device="cpu") as cluster:
        host = cluster.train(network, data, data_parallel(2, 3), **arguments)
    found = nccl[2].train(network, data, data_parallel(2, 3), **arguments)
    assert worst(network, flat(found.network.parameters()), flat(host.network.parameters())) <= 1e-9


@pytest.mark.parametrize("optimizer", [bp.optim.SGD(0.2, momentum=0.9), bp.optim.SGD(0.2, clip=0.05)],
                         ids=["SGD", "clipped"])  # fmt: skip
def test_weights_are_those_of_the_cpu(one, staged, optimizer):
    data = bp.data.digits(dtype=torch.float64)
    network = bp.nn.mlp([64, 24, 24, 10], seed=1, dtype=torch.float64, dropout=0.1)
    arguments = dict(batch=50, steps=20, optimizer=optimizer, evaluate_every=10)
    with bp.Cluster(1, device="cpu") as cluster:
        host = cluster.train(network, data, serial(), **arguments)
    for cluster, plan in ((one, serial()), (staged[2], data_parallel(2, 2)), (staged[2], zero(2, 3, units=3))):
        found = cluster.train(network, data, plan, **arguments)
        assert worst(network, flat(found.network.parameters()), flat(host.network.parameters())) <= 1e-10, plan.name
        assert abs(found.losses - host.losses).max() <= 1e-10 and found.accuracies == host.accuracies


def deterministic(comm: bp.run.Comm) -> None:
    torch.use_deterministic_algorithms(True, warn_only=True)  # it is bits that are compared, and they tell


@pytest.mark.parametrize("model", MODELS)
def test_the_same_run_gives_the_same_bits(one, model):
    one.call(deterministic)
    network, data = MODELS[model]
    runs = [one.train(network, data, serial(2, 2), batch=32, steps=5, lr=0.1) for _ in range(2)]
    assert torch.equal(runs[0].network.flat_parameters, runs[1].network.flat_parameters)


@pytest.mark.parametrize("name", test_precision.NETWORKS)
def test_bf16_stays_within_its_bound(one, name):
    network, data = test_precision.NETWORKS[name]
    inputs, targets = data.inputs[:64], data.targets[:64]
    oracle = gradient_sum(network, inputs, targets) / network.loss.terms(targets)
    found = one.gradients(network, inputs, targets, serial(2), precision="bf16")
    assert 1e-5 < float((found - oracle).norm() / oracle.norm()) < test_precision.BOUND
