"""Groups of ranks with a transport of their own, and messages that are lent between stages."""

from __future__ import annotations

import random
import time

import pytest
import torch

import bpkit as bp
from bpkit.plan import Mesh
from bpkit.run import WorkerError
from bpkit.run.engine.groups import Groups
from bpkit.run.processes.pool import Pool

from .pools import shared_pool

MESHES = [Mesh(data=2, pipeline=2), Mesh(data=2, tensor=2), Mesh(pipeline=2, tensor=2), Mesh(data=4), Mesh(tensor=4)]


def sums_along(comm, mesh, rounds):
    """Sums over each axis in turn, blocking and posted, of memory that ranks share and of their own."""
    groups = Groups(comm, mesh)
    results = []
    for axis in ("data", "tensor"):
        group = getattr(groups, axis)
        if getattr(mesh, axis) == 1:
            continue
        shared = group.empty(1001, torch.float64)
        for number in range(rounds):
            shared.fill_(comm.rank + number)
            handle = group.post_all_reduce(shared)
            while not handle.poll():
                comm.progress()
                if group.name == "gloo":
                    handle.wait()
            own = torch.full((77,), float(comm.rank), dtype=torch.float64)
            group.all_reduce(own)
            scattered = group.reduce_scatter(torch.full((10,), 1.0 + comm.rank, dtype=torch.float64)).clone()
            first = group.broadcast(torch.full((5,), float(comm.rank)))[0]
            results.append((axis, number, shared.unique().tolist(), own.unique().tolist(), scattered.tolist(), first))
    total = torch.ones(3, dtype=torch.float64)
    comm.all_reduce(total)
    return results, total.tolist()


@pytest.mark.parametrize("backend", ["shm", "gloo"])
@pytest.mark.parametrize("mesh", MESHES, ids=str)
def test_each_group_sums_over_its_own_ranks(backend, mesh):
    pool = shared_pool(backend, 4)
    for _ in range(2):  # the second time the groups are there already
        found = pool.call(sums_along, mesh, 3)
        for rank, (results, total) in enumerate(found):
            assert total == [4.0] * 3
            for axis, number, posted, own, scattered, first in results:
                ranks = mesh.group(rank, axis)
                low, high = (ranks.index(rank) + i for i in (0, 1))
                assert posted == [sum(ranks) + number * len(ranks)] and own == [sum(ranks)]
                width = 10 * high // len(ranks) - 10 * low // len(ranks)
                assert scattered == [sum(ranks) + len(ranks)] * width and first == ranks[0]


def never_comes(comm, mesh):
    group = Groups(comm, mesh).data
    if comm.rank != 3:
        group.barrier()
    else:
        time.sleep(3)


def test_a_rank_that_stays_away_is_named_by_its_number_in_the_whole():
    with Pool(4, "shm", timeout=1.0) as pool, pytest.raises(WorkerError, match="for rank 3"):
        pool.call(never_comes, Mesh(data=2, pipeline=2))


def lent(comm, seed, messages, slots):
    """Messages of random sizes both ways; received ones are held for a while and given back in a random order."""
    channel, peer, chance = ("SEND_F", 0), 1 - comm.rank, random.Random(seed)
    edges = comm.edges({channel: (slots, 1000)}, slots * 1000, slots, torch.float64)
    held, wrong, sent, received, waiting = [], 0, 0, 0, []
    taken: dict[int, torch.Tensor] = {}
    loans = {}
    before = comm.sent
    while received < messages or sent < messages or waiting:
        if sent < messages and len(waiting) < 3:
            size = 1 + (sent * 37) % 1000
            waiting.append(edges.send(channel, torch.full((size,), float(sent + 1000 * comm.rank)).double(), peer))
            sent += 1
        if received < messages and len(held) < slots and received not in loans:
            size = 1 + (received * 37) % 1000
            loans[received] = edges.receive((size,), torch.float64, peer, lambda t, n=received: taken.update({n: t}))
        if received in loans and (loans[received].poll() or comm.name == "gloo"):
            loans[received].wait()
            held.append(received)
            received += 1
        waiting = [handle for handle in waiting if not handle.poll()]
        if len(held) >= slots or (held and chance.random() < 0.3):
            number = held.pop(chance.randrange(len(held)))
            wrong += int((taken.pop(number) != number + 1000 * peer).any())
            loans.pop(number).release()
    return wrong, comm.sent - before


@pytest.mark.parametrize("backend", ["shm", "gloo"])
@pytest.mark.parametrize("slots", [1, 3])
def test_lent_memory_rests_until_it_is_given_back(backend, slots):
    pool = shared_pool(backend, 2)
    expected = 8 * sum(1 + (n * 37) % 1000 for n in range(200))
    for seed in range(3):  # what one call leaves unheard must not reach the next
        assert pool.call(lent, seed, 200, slots) == [(0, expected)] * 2


def test_sums_inside_actions_do_not_meet_those_that_are_posted(clusters):
    """A posted sum may start before a backward on one rank and after it on another: batch norm sums by itself."""
    data = bp.data.digits(dtype=torch.float64)
    network = bp.nn.convnet(channels=(1, 4, 8), seed=1, dtype=torch.float64)
    runs = [
        clusters[2].train(network, data, bp.plan.data_parallel(2, 3), batch=50, steps=5, lr=0.1, sync_batch_norm=True)
        for _ in range(15)
    ]
    assert all(torch.equal(run.network.flat_parameters, runs[0].network.flat_parameters) for run in runs)
