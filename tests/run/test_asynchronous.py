"""The asynchronous parameter server: live against delayed SGD in the order of arrival, and its replay."""

from __future__ import annotations

import time
from collections.abc import Sequence

import pytest
import torch

import bpkit as bp
from bpkit.nn import Context, CrossEntropy
from bpkit.plan.strategies.servers import Clock, ages

DATA = bp.data.digits(dtype=torch.float64)
NETWORK = bp.nn.mlp([64, 24, 24, 10], seed=1, dtype=torch.float64, dropout=0.1)


class Slow(CrossEntropy):
    """A loss that takes its time over small shards."""

    def value_and_gradient(self, y, targets):
        time.sleep(0.02 * (len(targets) < 10))
        return super().value_and_gradient(y, targets)


def delayed_sgd(arrivals: Sequence[int], workers: int, staleness: int, sizes: Sequence[int], optimizer):
    """Serial SGD whose gradients were taken of older weights: the server's definition, without plans."""
    server, clock = NETWORK.copy(), Clock(workers, staleness)
    state = optimizer.state(server.flat_parameters)
    readers = {worker: NETWORK.copy() for worker in range(1, workers + 1)}
    rounds = dict.fromkeys(readers, 0)
    for number, worker in enumerate(arrivals):
        inputs, targets = DATA.batch(rounds[worker], sum(sizes))
        low = sum(sizes[:worker])
        x, t = inputs[low : low + sizes[worker]], targets[low : low + sizes[worker]]
        net = readers[worker]
        _, dy = net.loss.value_and_gradient(net.forward(x, 0, Context(rounds[worker], low, True)), t)
        net.backward(dy)
        rounds[worker] += 1
        optimizer.update(server.flat_parameters, net.flat_gradients, state, number, 1 / max(1, len(t)))
        for answered in clock.arrived(worker):
            readers[answered].flat_parameters.copy_(server.flat_parameters)
    return server


@pytest.mark.parametrize("size", [2, 3, 4])
@pytest.mark.parametrize("staleness", [0, 2])
@pytest.mark.parametrize("sharding", ["even", "uneven", "a rank without samples"])
def test_live_is_delayed_sgd_and_its_plan_replays_bit_for_bit(clusters, size, staleness, sharding):
    empty = int(sharding == "a rank without samples" and size > 2)
    shards = [0] * (1 + empty) + bp.data.shard_sizes(40, size - 1 - empty)
    if sharding == "uneven":
        shards = [0, 3, *[37 // max(1, size - 2)] * (size - 2)]
    optimizer, steps = bp.optim.SGD(0.1, momentum=0.5), 6
    shared = dict(batch=sum(shards), steps=steps, optimizer=optimizer, shards=shards)
    live = clusters[size].train_asynchronous(NETWORK, DATA, staleness=staleness, **shared)
    arrivals = [action.peer for action in live.plan.rows[0] if action.kind == "RECV_G"]
    assert len(arrivals) == steps * (size - 1) and live.plan.name.startswith("asynchronous_server")
    expected = delayed_sgd(arrivals, size - 1, staleness, shards, optimizer)
    assert float((live.network.flat_parameters - expected.flat_parameters).abs().max()) <= 1e-12
    assert max(ages(live.plan)) <= live.plan.staleness
    replay = clusters[size].train(NETWORK, DATA, live.plan, **shared)
    assert torch.equal(replay.network.flat_parameters, live.network.flat_parameters)
    assert (replay.losses == live.losses).all()
    assert [live.trace.bytes[live.trace.rank == rank].sum() for rank in range(size)] == [
        replay.trace.bytes[replay.trace.rank == rank].sum() for rank in range(size)]  # fmt: skip


@pytest.mark.parametrize("staleness", [0, 1, 3])
def test_the_fast_worker_is_held_back_by_the_bound(clusters, staleness):
    network = bp.nn.mlp([64, 10], dtype=torch.float64, loss=Slow())
    result = clusters[3].train_asynchronous(
        network, DATA, batch=37, steps=8, staleness=staleness, lr=0.1, shards=[0, 5, 32]
    )
    done, lead = {1: 0, 2: 0}, 0
    for action in result.plan.rows[0]:
        if action.kind == "RECV_G":
            done[action.peer] += 1
            lead = max(lead, done[2] - done[1])
    assert lead == staleness + 1  # it gives its gradient, and then waits for its answer


def test_it_learns_as_the_synchronous_server_does(clusters):
    data, network = bp.data.digits(), bp.nn.mlp([64, 64, 10], seed=0)
    shared = dict(batch=96, steps=200, lr=0.05)
    synchronous = clusters[4].train(network, data, bp.plan.parameter_server(4), batch=96, steps=600, lr=0.05)
    live = clusters[4].train_asynchronous(network, data, staleness=1, **shared)  # three updates a step
    found = [r.network.accuracy(data.test_inputs, data.test_targets) for r in (synchronous, live)]
    assert min(found) > 0.9 and abs(found[0] - found[1]) < 0.04, found
    assert len(live.losses) == 200 and live.losses[-20:].mean() < 0.3 * live.losses[:3].mean()


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        ({"staleness": -1}, "staleness must be a whole number of at least 0, not -1"),
        ({"steps": 0}, "steps must be a whole number of at least 1, not 0"),
        ({"batch": 0}, "batch must be a whole number of at least 1"),
        ({"shards": [5, 30, 5]}, "data rank 0 only serves and takes no samples, not 5"),
        ({"optimizer": bp.optim.SGD(0.1, clip=1.0), "lr": None}, "no one gradient whose norm could be clipped"),
    ],
)
def test_bad_input_is_named_before_anything_starts(clusters, arguments, why):
    good = dict(batch=40, steps=2, lr=0.1)
    before = clusters[3].pids
    with pytest.raises(ValueError, match=why):
        clusters[3].train_asynchronous(NETWORK, DATA, **{**good, **arguments})
    assert clusters[3].pids == before


def test_progress_is_told_while_it_runs_live(clusters):
    seen: list[float] = []
    network = bp.nn.mlp([64, 10], dtype=torch.float64, loss=Slow())
    clusters[2].train_asynchronous(network, DATA, batch=5, steps=30, lr=0.1, progress=lambda part, _: seen.append(part))
    assert seen == sorted(seen) and 0 < seen[-1] <= 1


def test_a_replay_is_of_the_whole_run(clusters):
    plan = bp.plan.asynchronous_server(2, [1, 2, 2, 1])
    with pytest.raises(ValueError, match="a whole run of 2 steps without evaluations: give steps=2"):
        clusters[3].train(NETWORK, DATA, plan, batch=40, steps=3, lr=0.1)


def test_a_server_needs_a_worker():
    with bp.Cluster(1) as cluster, pytest.raises(ValueError, match="rank 0 to serve and one more rank to train"):
        cluster.train_asynchronous(NETWORK, DATA, batch=40, steps=2, lr=0.1)
