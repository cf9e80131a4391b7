"""Every plan of data parallelism, run on both transports, against the oracle of its class."""

from __future__ import annotations

import pytest
import torch

import bpkit as bp
from bpkit.plan import collective, data_parallel, expand, local_sgd, parameter_server, zero
from bpkit.plan.strategies.collectives import ALGORITHMS

from .networks import SAMPLES, batch, every_layer
from .oracle import flat, gradient_sum, worst

pytestmark = pytest.mark.slow

EXACT = 1e-12
NETWORK = every_layer()
EXPANDED = [name for name, (purpose, _) in ALGORITHMS.items() if purpose == "all_reduce"]


def plans(n: int) -> dict[str, bp.plan.Plan]:
    """Exact plans for n workers, by name."""
    hosts = {"hosts": 2 if n % 2 == 0 else 1}
    made = [expand(data_parallel(n, 3), name, **(hosts if name == "hierarchical" else {})) for name in EXPANDED]
    made += [zero(n, level, units=3, microbatches=m) for level in (1, 2, 3) for m in (1, 2)]
    made += [zero(n, 3, units=3, prefetch=False), zero(n, 3, units=3, reshard=False), zero(n, 2)]
    made += [parameter_server(n, servers, buckets=2) for servers in {1, n}]
    return {plan.name: plan for plan in made}


@pytest.mark.parametrize("workers", [1, 2, 3, 4])
@pytest.mark.parametrize("sharding", ["even", "uneven", "a rank without samples"])
def test_gradients_equal_serial(clusters, workers, sharding):
    inputs, targets = batch(NETWORK)
    sizes = bp.data.shard_sizes(SAMPLES, workers)
    if sharding == "uneven":
        sizes = [1] * (workers - 1) + [SAMPLES - workers + 1]
    elif sharding != "even" and workers > 1:
        sizes = [0, *bp.data.shard_sizes(SAMPLES, workers - 1)]
    oracle = gradient_sum(NETWORK, inputs, targets, step=3) / SAMPLES
    for plan in plans(workers).values():
        found = clusters[workers].gradients(NETWORK, inputs, targets, plan, shards=sizes, step=3)
        assert worst(NETWORK, found, oracle) <= EXACT, plan.name


@pytest.mark.parametrize("workers", [2, 3])
@pytest.mark.parametrize(
    "optimizer", [bp.optim.SGD(0.2, momentum=0.9), bp.optim.SGD(0.2, clip=0.05)], ids=["SGD", "clipped"]
)
def test_weights_equal_serial_after_several_steps(clusters, workers, optimizer):
    data = bp.data.digits(dtype=torch.float64)
    network = bp.nn.mlp([64, 24, 24, 10], seed=1, dtype=torch.float64, dropout=0.1)
    arguments = dict(batch=50, steps=8, optimizer=optimizer)
    serial = clusters[1].train(network, data, bp.plan.serial(), **arguments)
    made = [
        expand(data_parallel(workers, 3), "ring"),
        *(zero(workers, level, units=3, microbatches=2) for level in (1, 2, 3)),
        parameter_server(workers, buckets=2),
    ]
    for plan in made:
        result = clusters[workers].train(network, data, plan, **arguments)
        difference = flat(result.network.parameters()) - flat(serial.network.parameters())
        assert float(difference.abs().max()) <= 1e-10, plan.name
        assert abs(result.losses - serial.losses).max() <= 1e-10, plan.name


@pytest.mark.parametrize("workers", [2, 3])
def test_local_sgd_is_the_mean_of_serial_runs(clusters, workers):
    data = bp.data.digits(dtype=torch.float64)
    network = bp.nn.mlp([64, 24, 10], seed=1, dtype=torch.float64)
    optimizer, period, size = bp.optim.SGD(0.1, momentum=0.9), 3, 60
    result = clusters[workers].train(
        network, data, local_sgd(workers, period), batch=size, steps=2, optimizer=optimizer
    )
    ends = [network.copy() for _ in range(workers)]
    states = [optimizer.state(net.flat_parameters) for net in ends]
    for step in range(2):
        inputs, targets = data.batch(step, size)
        shards = zip(inputs.tensor_split(workers), targets.tensor_split(workers), strict=True)
        for net, state, (x, t) in zip(ends, states, shards, strict=True):
            for m, (part, labels) in enumerate(zip(x.tensor_split(period), t.tensor_split(period), strict=True)):
                _, dy = net.loss.value_and_gradient(net.forward(part), labels)
                net.backward(dy)
                optimizer.update(net.flat_parameters, net.flat_gradients, state, step * period + m, 1 / len(labels))
        mean = sum(net.flat_parameters for net in ends) / workers
        for net in ends:
            net.flat_parameters.copy_(mean)
    assert float((result.network.flat_parameters - ends[0].flat_parameters).abs().max()) <= 1e-12


@pytest.mark.parametrize("workers", [2, 3, 4])
def test_collectives_by_themselves_count_their_bytes(clusters, workers):
    size = 12 * 1001
    tensors = [
        torch.randn(size, generator=torch.Generator().manual_seed(r), dtype=torch.float64) for r in range(workers)
    ]
    total = torch.stack(tensors).sum(0)
    for name, (purpose, _) in ALGORITHMS.items():
        plan = collective(name, workers, **({"hosts": 2 if workers % 2 == 0 else 1} if name == "hierarchical" else {}))
        result = clusters[workers].collective(plan, tensors, repeat=2)
        predicted = [sum(i.payload for i in row if i.counted) for row in result.program.rows]
        assert list(result.sent) == predicted, name
        if purpose == "all_reduce":
            assert all(float((out - total).abs().max()) <= 1e-12 * float(total.abs().max()) for out in result.tensors)
        if purpose == "broadcast":
            assert all(torch.equal(out, tensors[0]) for out in result.tensors)
        if purpose == "all_to_all":
            parts = [t.view(workers, -1) for t in tensors]
            assert all(torch.equal(out.view(workers, -1)[q], parts[q][r])
                       for r, out in enumerate(result.tensors) for q in range(workers))  # fmt: skip
        assert (result.seconds > 0).all()


def test_same_bits_where_the_order_of_additions_is_the_same(clusters):
    """The levels of ZeRO end with the same bits on shared memory.

    Plain data parallelism adds in the same order too, but updates whole buffers: where a part ends within a vector
    register the update's last bit may differ, so against it only closeness is promised.
    """
    if clusters[2].backend != "shm":
        pytest.skip("gloo's sum adds in an order of its own")
    data, network = bp.data.digits(), bp.nn.mlp([64, 32, 10], seed=2)
    arguments = dict(batch=64, steps=6, optimizer=bp.optim.SGD(0.1, momentum=0.9))
    plain, *levels = (
        clusters[3].train(network, data, plan, **arguments).network.flat_parameters
        for plan in (data_parallel(3, 3), *(zero(3, level, units=3) for level in (1, 2, 3)))
    )
    assert torch.equal(levels[0], levels[1]) and torch.equal(levels[1], levels[2])
    assert float((plain - levels[0]).abs().max()) < 1e-8


def test_memory_follows_the_formula(clusters):
    """float32, SGD with momentum (K = 4 bytes a parameter), 4 workers; units of equal size up to the padding."""
    data = bp.data.digits()
    network = bp.nn.mlp([64] + [256] * 8 + [10], seed=0)
    psi, n = network.flat_size, 4
    optimizer = bp.optim.SGD(0.1, momentum=0.9)

    def memory(plan):
        return clusters[n].train(network, data, plan, batch=64, steps=1, optimizer=optimizer).memory[0]

    whole, third = memory(data_parallel(n, 8)), memory(zero(n, 3, units=8))
    first, second = memory(zero(n, 1, units=8)), memory(zero(n, 2, units=8))
    assert whole == {"parameters": 4 * psi, "gradients": 4 * psi, "optimizer": 4 * psi}
    assert first["optimizer"] == pytest.approx(psi, rel=0.01) and first["gradients"] == pytest.approx(5 * psi, rel=0.01)
    assert second["gradients"] < 0.55 * whole["gradients"] and second["optimizer"] == first["optimizer"]
    assert third["parameters"] < 0.55 * whole["parameters"]


def test_bad_collectives_are_named(clusters):
    one, other = torch.zeros(4), torch.zeros(5)
    with pytest.raises(ValueError, match=r"rank 1 has \(5,\)"):
        clusters[2].collective(collective("ring", 2), [one, other])
    with pytest.raises(ValueError, match="2 ranks do not divide 5 elements"):
        clusters[2].collective(collective("all_to_all", 2), [other, other])
    with pytest.raises(ValueError, match="not a collective by itself for 2 workers"):
        clusters[2].collective(data_parallel(2), [one, one])


def test_the_plan_of_a_clipped_run_runs_again(clusters):
    data, network = bp.data.digits(), bp.nn.mlp([64, 16, 10], seed=2)
    arguments = dict(batch=64, steps=3, optimizer=bp.optim.SGD(0.5, clip=0.1))
    first = clusters[2].train(network, data, data_parallel(2), **arguments)
    again = clusters[2].train(network, data, first.plan, **arguments)
    assert first.plan == again.plan and torch.equal(first.network.flat_parameters, again.network.flat_parameters)
