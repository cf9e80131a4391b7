"""Running statistics of batch norm by every kind of plan, against the rule, step by step; and what is refused."""

from __future__ import annotations

import pytest
import torch

import bpkit as bp
from bpkit import nn
from bpkit.plan import (
    Plan,
    asynchronous_server,
    data_parallel,
    gpipe,
    local_sgd,
    one_f_one_b,
    parameter_server,
    pipedream,
    serial,
    zero,
    zero_bubble_h1,
)

STEPS, BATCH, MOMENTUM = 4, 20, 0.3
GENERATOR = torch.Generator().manual_seed(5)
INPUTS = torch.randn(60, 6, 2, generator=GENERATOR, dtype=torch.float64) * 2 + 1
DATA = bp.data.Dataset("numbers", INPUTS, torch.arange(60) % 3, INPUTS[:9], torch.arange(9) % 3)


def network() -> nn.Network:
    """Batch norm first, so that what it sees is the data; another one above, which is trained with it."""
    layers = [nn.BatchNorm(6, momentum=MOMENTUM), nn.Positions(6, 2), nn.BatchNorm(6), nn.Tanh(), nn.Flatten()]
    return nn.Network([*layers, nn.Linear(12, 3)], (6, 2), seed=1, dtype=torch.float64)


def by_rule(sizes_of_steps: list[list[int]], microbatches: int, together: bool) -> torch.Tensor:
    mean, variance = torch.zeros(6, dtype=torch.float64), torch.ones(6, dtype=torch.float64)
    for step, sizes in enumerate(sizes_of_steps):
        x, _ = DATA.batch(step, sum(sizes))
        cut = [shard.tensor_split(microbatches) for shard in x.split(sizes)]
        for mb in range(microbatches):
            groups = [parts[mb] for parts in cut if len(parts[mb])]
            groups = [torch.cat(groups)] if together and groups else groups
            total = sum(map(len, groups))
            if total:
                means, variances = ([f(g.transpose(0, 1).flatten(1), 1) * len(g) for g in groups]
                                    for f in (torch.mean, torch.var))  # fmt: skip
                mean = (1 - MOMENTUM) * mean + MOMENTUM * sum(means) / total
                variance = (1 - MOMENTUM) * variance + MOMENTUM * sum(variances) / total
    return torch.cat([mean, variance])


UNEVEN = [[13, 7], [0, 20], [20, 0], [6, 14]]
CASES: dict[str, tuple[Plan, list[list[int]]]] = {
    "one rank": (serial(), [[20]]),
    "microbatches": (serial(1, 3), [[20]]),
    "data ranks": (data_parallel(2, 2), UNEVEN),
    "data ranks with microbatches": (data_parallel(2, 2, microbatches=3), UNEVEN),
    "a first rank that never has samples": (data_parallel(3), [[0, 13, 7]]),
    "more microbatches than samples of a rank": (data_parallel(2, microbatches=6), [[16, 4]]),
    "sharded": (zero(2, 3, units=3), UNEVEN),
    "a server": (parameter_server(3), [[0, 13, 7], [8, 6, 6]]),
    "local": (local_sgd(2, 2), UNEVEN),
    "all forwards first": (gpipe(2, 3), [[20]]),
    "pipelines": (one_f_one_b(2, 3, data=2), UNEVEN),
    "weight halves late": (zero_bubble_h1(2, 4), [[20]]),
    "recomputed": (gpipe(2, 2, recompute=True), [[20]]),
}


EQUAL = data_parallel(2, microbatches=2)
IN_ORDER = """plan by hand
mesh data=2 pipeline=1 tensor=1
stages 1
microbatches 2
merge mean
expanded yes
row 0ZERO 0F0 0F1 0LOSS0 0B0 0LOSS1 0B1 0REDUCE_GRAD 0UPDATE
row 0ZERO 0F0 0F1 0LOSS0 0B0 0LOSS1 0B1 0REDUCE_GRAD 0UPDATE"""


@pytest.mark.parametrize("together", [False, True], ids=["each rank", "over data ranks"])
@pytest.mark.parametrize("name", CASES)
def test_running_statistics_follow_the_rule(clusters, name: str, together: bool) -> None:
    plan, shards = CASES[name]
    net, cluster = network(), clusters[plan.workers]
    arguments = dict(batch=BATCH, steps=STEPS, lr=0.05, shards=shards, sync_batch_norm=together, evaluate_every=2)
    found = cluster.train(net, DATA, plan, **arguments)
    expected = by_rule([shards[step % len(shards)] for step in range(STEPS)], plan.microbatches, together)
    assert torch.allclose(found.network.flat_buffers[:12], expected, rtol=1e-12)
    assert found.accuracies[-1][1] == found.network.accuracy(DATA.test_inputs, DATA.test_targets)


def test_updates_in_between_keep_one_set_of_statistics(clusters) -> None:
    """Weight stashing copies parameters, and not what is kept beside them."""
    found = clusters[2].train(network(), DATA, pipedream(2, 4), batch=BATCH, steps=STEPS, lr=0.05)
    assert torch.allclose(found.network.flat_buffers[:12], by_rule([[BATCH]] * STEPS, 4, False), rtol=1e-12)


def test_an_asynchronous_server_weighs_its_workers(clusters) -> None:
    """Both workers see each of their iterations once, in any order of arrival."""
    cluster, shards = clusters[3], [0, 13, 7]
    live = cluster.train_asynchronous(network(), DATA, batch=BATCH, steps=STEPS, lr=0.05, shards=shards)
    again = cluster.train(network(), DATA, live.plan, batch=BATCH, steps=STEPS, lr=0.05, shards=shards)
    assert torch.equal(live.network.flat_buffers, again.network.flat_buffers)
    assert torch.allclose(live.network.flat_buffers[:12], by_rule([shards] * STEPS, 1, False), rtol=1e-12)


def test_sums_over_ranks_that_do_not_run_together_are_refused(clusters) -> None:
    plan = asynchronous_server(1, [1] * STEPS)
    with pytest.raises(ValueError, match="whose data ranks run in step"):
        clusters[2].train(network(), DATA, plan, batch=BATCH, steps=STEPS, lr=0.1, sync_batch_norm=True)
    one, other = Plan.parse(IN_ORDER), Plan.parse(IN_ORDER.replace("0F0 0F1", "0F1 0F0", 1))
    data = DATA.inputs[:8], DATA.targets[:8]
    with pytest.raises(ValueError, match="whose data ranks run in step"):
        clusters[2].gradients(network(), *data, other, sync_batch_norm=True)
    found = [clusters[2].gradients(network(), *data, plan, sync_batch_norm=True) for plan in (one, EQUAL)]
    assert torch.allclose(*found, rtol=1e-12)
