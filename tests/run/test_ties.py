"""Tied tensors: any number of names, uses, stages and ranks, against serial training, on both transports."""

from __future__ import annotations

import random
from collections import Counter

import pytest
import torch

import bpkit as bp
from bpkit.nn import GELU, Dropout, Embedding, Linear, Network, Residual, Tanh, Unembedding
from bpkit.plan import (
    Action,
    Plan,
    PlanError,
    compile,
    data_parallel,
    expand,
    gpipe,
    interleaved,
    local_sgd,
    one_f_one_b,
    parameter_server,
    pipedream,
    serial,
    shard_optimizer,
    tensor_parallel,
    zb_v,
    zero,
    zero_bubble_h1,
    zero_bubble_h2,
)  # fmt: skip

from .mutants import mutant
from .oracle import flat, gradient_sum, worst

pytestmark = pytest.mark.slow

EXACT, SAMPLES = 1e-12, 11
V, W, H, LENGTH = 7, 6, 5, 4
F64 = {"seed": 1, "dtype": torch.float64}

NETWORKS = {
    "gpt": bp.nn.gpt(V, LENGTH, width=8, heads=2, layers=2, dropout=0.1, **F64),
    "one name, three uses": Network(
        [Embedding(V, W, "e"), Linear(W, W), Unembedding(W, V, tied="e"), GELU(), Linear(V, W), Dropout(0.1),
         Unembedding(W, V, tied="e", bias=True)], LENGTH, **F64),
    "three names": Network(
        [Embedding(V, W, "a"), Unembedding(W, H, True, "b"), Tanh(), Linear(H, W), Unembedding(W, H, tied="b"),
         Unembedding(H, W, True, "c"), Residual(Linear(W, W), Tanh()), Unembedding(W, H, True, "b"), GELU(),
         Unembedding(H, W, tied="c"), Dropout(0.1), Unembedding(W, V, tied="a")], LENGTH, **F64),
}  # fmt: skip


def samples(network: Network) -> tuple[torch.Tensor, torch.Tensor]:
    draw = torch.Generator().manual_seed(0)
    x, t = (torch.randint(V, (SAMPLES, LENGTH), generator=draw) for _ in range(2))
    t[3, 1:] = -100
    return x, t


def plans(network: Network) -> list[Plan]:
    made = [serial(3), serial(4, microbatches=2), data_parallel(2, 4, microbatches=2), data_parallel(3, 3)]
    made += [zero(2, level, units=units, microbatches=2) for level in (1, 2, 3) for units in (4, 6)]
    made += [zero(3, 3, units=5, prefetch=False), zero(2, 3, units=4, reshard=False), zero(4, 2, units=4)]
    made += [expand(data_parallel(3, 3), name) for name in ("ring", "tree", "sharded_server")]
    made += [expand(data_parallel(4, 3, microbatches=2), "hierarchical"), expand(data_parallel(4, 2), "ring")]
    made += [expand(data_parallel(2, 3), "halving_doubling"), parameter_server(3, 2, buckets=4)]
    made += [gpipe(2, 3), gpipe(4, 2), one_f_one_b(3, 4), one_f_one_b(4, 3), one_f_one_b(3, 3, recompute=True)]
    made += [one_f_one_b(2, 3, buckets=2), one_f_one_b(2, 2, data=2, buckets=2), interleaved(2, 3), interleaved(3, 3)]
    made += [zero_bubble_h1(3, 3), zero_bubble_h2(2, 4, recompute=True), zb_v(2, 3), zb_v(3, 2), zb_v(2, 3, data=2)]
    made += [shard_optimizer(one_f_one_b(2, 3, data=2, buckets=2)), expand(one_f_one_b(2, 2, data=2), "ring")]
    return [plan for plan in made if plan.stages <= len(network.layers)]


def tensor_plans(network: Network) -> list[Plan]:
    layout = bp.nn.tensor_layout(network)
    bases = [serial(2), data_parallel(2), one_f_one_b(2, 2), zb_v(1, 2)]
    return [tensor_parallel(base, 2, layout) for base in bases]


@pytest.mark.parametrize("name", NETWORKS)
def test_autograd_agrees_with_serial(name):
    report = bp.nn.gradcheck(NETWORKS[name], *samples(NETWORKS[name]))
    assert report.ok, str(report)


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("uneven", [False, True], ids=["even", "uneven"])
def test_gradients_equal_serial(clusters, name, uneven):
    network = NETWORKS[name]
    inputs, targets = samples(network)
    oracle = gradient_sum(network, inputs, targets, step=3) / network.loss.terms(targets)
    for plan in [*plans(network), *(tensor_plans(network) if name == "gpt" else [])]:
        shards = [8, 3, 0, 0][: plan.mesh.data] if uneven and plan.mesh.data > 1 else None
        if uneven and shards is None:
            continue
        found = clusters[plan.workers].gradients(network, inputs, targets, plan, step=3, shards=shards)
        assert worst(network, found, oracle) <= EXACT, plan.name


@pytest.mark.parametrize("clip", [None, 0.05], ids=["SGD", "clipped"])
def test_weights_equal_serial_after_several_steps(clusters, clip):
    network = NETWORKS["three names"]
    inputs, targets = samples(network)
    data = bp.data.Dataset("tokens", inputs, targets, inputs[:0], targets[:0])
    arguments = dict(batch=8, steps=4, optimizer=bp.optim.SGD(0.3, momentum=0.9, clip=clip))
    expected = clusters[1].train(network, data, serial(), **arguments)
    for plan in plans(network):
        result = clusters[plan.workers].train(network, data, plan, **arguments)
        difference = flat(result.network.parameters()) - flat(expected.network.parameters())
        assert float(difference.abs().max()) <= 1e-11, plan.name
        assert abs(result.losses - expected.losses).max() <= 1e-11, plan.name


def test_local_sgd_and_bf16_are_the_same_in_stages_and_in_one(clusters):
    network = NETWORKS["three names"]
    inputs, targets = samples(network)
    data = bp.data.Dataset("tokens", inputs, targets, inputs[:0], targets[:0])
    ends = [clusters[2].train(network, data, local_sgd(2, 2, buckets=n), batch=8, steps=2, lr=0.3) for n in (1, 4)]
    assert torch.allclose(*(flat(end.network.parameters()) for end in ends), rtol=0, atol=1e-13)
    single = Network(network.layers, LENGTH, seed=1)
    runs = [clusters[2].train(single, data, data_parallel(2, n), batch=8, steps=2, lr=0.3, precision="bf16")
            for n in (1, 4)]  # fmt: skip
    assert torch.allclose(*(flat(end.network.parameters()) for end in runs), rtol=0, atol=1e-3)


def test_a_tied_tensor_is_held_once_on_a_rank(clusters):
    network = NETWORKS["gpt"]
    data = bp.data.Dataset("t", *samples(network), *samples(network))
    for buckets in (1, 4):
        result = clusters[2].train(network, data, data_parallel(2, buckets), batch=8, steps=1, lr=0.1)
        assert result.memory[0]["gradients"] == 8 * network.flat_size
    compressed = dict(batch=8, steps=1, lr=0.1, compress=bp.compress.TopK(0.1))
    clusters[2].train(network, data, data_parallel(2, 4), **compressed)  # no copies that could go apart


def mutated() -> list[Plan]:
    made = [zero(2, 3, units=4, microbatches=2), one_f_one_b(2, 2, data=2, buckets=2)]
    return [compile(plan, NETWORKS["three names"]).plan for plan in made]


@pytest.mark.parametrize("plan", mutated(), ids=lambda plan: plan.name)
def test_what_the_checker_accepts_is_right(plan):
    network, draw, counts = NETWORKS["three names"], random.Random(plan.digest), Counter()
    inputs, targets = samples(network)
    oracle = gradient_sum(network, inputs, targets, step=1) / network.loss.terms(targets)
    with bp.Cluster(plan.workers, backend="shm", timeout=10) as cluster:
        for _ in range(60):
            try:
                changed = mutant(plan, draw)
                bp.plan.check(changed)
            except ValueError:
                counts["refused"] += 1
                continue
            found = cluster.gradients(network, inputs, targets, changed, step=1)
            counts["harmless" if worst(network, found, oracle) <= EXACT else "missed"] += 1
    assert counts["missed"] == 0 and counts["refused"] > 15


def test_updates_and_reductions_wait_for_all_uses():
    plan = compile(data_parallel(2, 4), NETWORKS["three names"]).plan
    assert plan.tied == ((0, 1, 2), (0, 3), (1, 3)) and Plan.parse(str(plan)) == plan
    row = list(plan.rows[0])
    row.remove(Action(0, "REDUCE_GRAD"))
    row.insert(row.index(Action(1, "B", 0)), Action(0, "REDUCE_GRAD"))
    with pytest.raises(PlanError, match="0UPDATE: the gradient of stage 0 from 0 to 1/2 is not"):
        bp.plan.check(plan.with_rows([row]))


def test_what_cannot_be_is_refused_before_the_start():
    network = NETWORKS["three names"]
    with pytest.raises(ValueError, match="updates after single microbatches, .* cut so that one stage holds them all"):
        compile(pipedream(2, 3), network)
    with pytest.raises(ValueError, match=r"says that stages \(\(0, 1\),\) share a tensor, but in this network"):
        compile(Plan.parse(str(compile(one_f_one_b(2, 2), NETWORKS["gpt"]).plan)), bp.nn.mlp([4, 4, 4], seed=0))
    with pytest.raises(ValueError, match="tied are two or more of 2 stages"):
        Plan.parse(str(serial(2)).replace("row", "tied 0 3\nrow"))
