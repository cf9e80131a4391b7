"""The transport for several ranks on one GPU, on the host: what would be a device's memory is the host's own."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

import pytest
import torch

import bpkit as bp
from bpkit.plan import data_parallel, local_sgd, parameter_server, zero
from bpkit.run import cluster as of_cluster
from bpkit.run.engine.rank import gradients, train
from bpkit.run.engine.server import rounds
from bpkit.run.transports.comm import Comm
from bpkit.run.transports.through_host import Staged

from . import test_models
from .oracle import flat, gradient_sum, worst
from .pools import shared_pool

pytestmark = pytest.mark.slow

SAMPLES = test_models.SAMPLES


def staged(comm: Comm) -> Staged:
    """The transport of a rank, staged; one for as long as the rank lives."""
    return comm.cache.setdefault("staged", Staged(comm, torch.device("cpu")))


def on_staged(work: Callable[..., Any]) -> Callable[..., Any]:
    def run(comm: Comm, *args: Any) -> Any:
        return work(staged(comm), *args)

    return run


@pytest.fixture
def through_staging(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, work in (("gradients", gradients), ("train", train), ("rounds", rounds)):
        monkeypatch.setattr(of_cluster, name, on_staged(work))


@pytest.mark.parametrize("model", ["gpt, tied", "convnet"])
def test_gradients_equal_serial(clusters, model, through_staging):
    network, data = test_models.MODELS[model]
    inputs, targets = data.inputs[:SAMPLES], data.targets[:SAMPLES]
    oracle = gradient_sum(network, inputs, targets, step=3) / network.loss.terms(targets)
    more = [zero(3, level, units=3, microbatches=2) for level in (1, 2, 3)] + [parameter_server(3, 2, buckets=2)]
    more += [bp.plan.expand(data_parallel(4, 2), name) for name in ("ring", "tree", "hierarchical")]
    for plan in test_models.plans(network) + (more if model == "convnet" else []):
        found = clusters[plan.workers].gradients(network, inputs, targets, plan, step=3)
        assert worst(network, found, oracle) <= 1e-12, plan.name


CASES = {
    "data parallel": (data_parallel(2, 3), {}),
    "compressed": (data_parallel(2, 3), {"compress": bp.compress.TopK(0.1)}),
    "one batch norm": (data_parallel(2, 3), {"sync_batch_norm": True}),
    "zero 1": (zero(2, 1, units=3), {}),
    "zero 3": (zero(2, 3, units=3), {}),
    "local SGD": (local_sgd(2, 2), {}),
    "1F1B": (bp.plan.one_f_one_b(2, 3), {}),
}


@pytest.mark.parametrize(("plan", "extra"), CASES.values(), ids=CASES.keys())
def test_weights_are_those_of_the_host_transport(clusters, plan, extra, monkeypatch):
    data = bp.data.digits(dtype=torch.float64)
    network = bp.nn.convnet(channels=(1, 4, 8), seed=1, dtype=torch.float64)
    optimizer = bp.optim.SGD(0.1, momentum=0.9, clip=None if plan.holds != "all" else 1.0)
    arguments = dict(batch=50, steps=5, optimizer=optimizer, evaluate_every=5, **extra)
    host = clusters[2].train(network, data, plan, **arguments)
    monkeypatch.setattr(of_cluster, "train", on_staged(train))
    found = clusters[2].train(network, data, plan, **arguments)
    assert torch.equal(flat(found.network.parameters()), flat(host.network.parameters()))
    assert found.accuracies == host.accuracies
    assert (found.trace.bytes == host.trace.bytes).all()


def test_an_asynchronous_server_works_and_replays(clusters, through_staging):
    data, network = bp.data.digits(dtype=torch.float64), bp.nn.mlp([64, 16, 10], seed=1, dtype=torch.float64)
    live = clusters[3].train_asynchronous(network, data, batch=60, steps=20, lr=0.1, staleness=2)
    again = clusters[3].train(network, data, live.plan, batch=60, steps=20, lr=0.1)
    assert torch.equal(flat(live.network.parameters()), flat(again.network.parameters()))
    assert live.losses[-5:].mean() < live.losses[:5].mean()


def everything(comm: Comm) -> list[torch.Tensor]:
    """Each operation on a tensor of one's own and on memory of `empty`."""
    there, last = staged(comm), comm.size - 1
    found = []
    for make in (torch.zeros, there.empty):
        values = make(10).add_(torch.arange(10.0) + comm.rank)
        found.append(there.all_reduce(values.clone() if make is torch.zeros else values).clone())
        found.append(there.reduce_scatter(values.fill_(comm.rank + 1.0)).clone())
        found.append(there.all_gather(values.fill_(comm.rank)).clone())
        found.append(there.broadcast(values.fill_(comm.rank), last).clone())
    there.send(found[0].view(2, 5) * comm.rank, (comm.rank + 1) % comm.size)
    if comm.rank == last:
        there.send(torch.ones(3), 0)
    found.append(there.recv(None, (comm.rank - 1) % comm.size))
    found.append(found[0] if comm.rank else there.recv(torch.zeros(3), last))
    there.barrier()
    return found


@pytest.mark.parametrize("backend", ["shm", "gloo"])
def test_each_operation(backend):
    ranks = shared_pool(backend, 3).call(everything)
    for found in ranks:
        for reduced, part, gathered, spread in (found[:4], found[4:8]):
            assert torch.equal(reduced, 3 * torch.arange(10.0) + 3)
            assert (part == 6).all() and len(part) in (3, 4)
            assert torch.equal(gathered, torch.tensor([0.0] * 3 + [1.0] * 3 + [2.0] * 4)) and (spread == 2).all()
    assert torch.equal(ranks[2][8], ranks[1][0].view(2, 5)) and torch.equal(ranks[0][9], torch.ones(3))


def mirrors(comm: Comm) -> list[int]:
    there = Staged(comm, torch.device("cpu"))
    counts = []
    memory = there.empty(100)
    part = memory[10:20]
    del memory
    counts.append(len(there._mirrors))
    part.fill_(1.0)
    there.all_reduce(part)
    assert (part == comm.size).all()
    del part
    gc.collect()
    return [*counts, len(there._mirrors)]


@pytest.mark.parametrize("backend", ["shm", "gloo"])
def test_a_mirror_lives_as_long_as_a_view_of_its_memory(backend):
    assert shared_pool(backend, 3).call(mirrors) == [[1, 0]] * 3


