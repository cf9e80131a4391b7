"""Skip connections written as two layers, over the cuts of every kind of plan."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import bpkit as bp
from bpkit.nn import AddSkip, Linear, Network, Residual, StashSkip, Tanh
from bpkit.plan import (
    Mesh,
    Plan,
    compile,
    data_parallel,
    gpipe,
    interleaved,
    one_f_one_b,
    pipedream,
    refine,
    serial,
    zb_v,
    zero,
    zero_bubble_h2,
)
from bpkit.plan.passes import communicate, losses, update_each

X = torch.randn(20, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
T = torch.arange(20) % 4
#: One long skip connection, one inside it, one over a single layer.
NETWORK = Network([Linear(6, 6), StashSkip(7), Linear(6, 6), StashSkip(2), Tanh(), AddSkip(2), Linear(6, 6), Tanh(),
                   AddSkip(7), Residual(Linear(6, 6)), Linear(6, 6), Linear(6, 4)], 6, dtype=torch.float64,
                  seed=1)  # fmt: skip


def by_hand(network: Network = NETWORK) -> torch.Tensor:
    """The gradient of the mean loss in one process."""
    own = network.copy()
    _, gradient = own.loss.value_and_gradient(own.forward(X), T)
    own.backward(gradient / len(X))
    return torch.cat([g.flatten() for g in own.gradients()])


RIGHT = [
    serial(1, 2), data_parallel(2, buckets=[1, 4, 7]), data_parallel(3, 6), zero(2, 1, units=4), zero(2, 2, units=4),
    zero(2, 3, units=5), data_parallel(4, 3, microbatches=3), gpipe(2, 2), gpipe(2, 4, cuts=[9]), zb_v(2, 3),
    one_f_one_b(2, 4, recompute=True), one_f_one_b(2, 3, data=2), zero_bubble_h2(2, 4),
    zb_v(2, 4, cuts=[2, 5, 8]), interleaved(2, 4, 2, cuts=[2, 7, 9]), interleaved(2, 2, 2, cuts=[2, 7, 9], data=2),
    interleaved(2, 4, 2, cuts=[2, 7, 9], recompute=True),
]  # fmt: skip
REFUSED = [gpipe(2, 2, cuts=[3]), gpipe(2, 2, cuts=[5]), one_f_one_b(2, 4, cuts=[2]), zb_v(2, 4, cuts=[4, 5, 9]),
           interleaved(2, 4, 2, cuts=[2, 5, 7]), one_f_one_b(6, 6)]  # fmt: skip


@pytest.mark.parametrize("plan", RIGHT, ids=[plan.name for plan in RIGHT])
def test_a_skip_within_a_rank_is_right(clusters, plan):
    compiled = compile(plan, NETWORK).plan
    assert compiled.skips or plan.mesh.pipeline > 1 or plan.stages == 1
    assert Plan.parse(str(compiled)) == compiled
    found, right = clusters[plan.workers].gradients(NETWORK, X, T, plan), by_hand()
    assert (found - right).abs().max() <= 1e-12 * right.abs().max()


@pytest.mark.parametrize("plan", REFUSED, ids=[f"{plan.name} at {plan.cuts}" for plan in REFUSED])
def test_a_skip_from_rank_to_rank_is_refused_before_the_start(plan):
    with pytest.raises(ValueError, match="needs both on one pipeline rank, in this order: give cuts"):
        compile(plan, NETWORK)


def test_a_rank_without_samples_hands_on_no_skip(clusters):
    found = clusters[2].gradients(NETWORK, X, T, data_parallel(2, buckets=[1, 4, 7], microbatches=3), shards=[2, 18])
    assert (found - by_hand()).abs().max() <= 1e-12 * by_hand().abs().max()
    found = clusters[2].gradients(NETWORK, X, T, data_parallel(2, buckets=[1, 4, 7]), shards=[0, 20])
    assert (found - by_hand()).abs().max() <= 1e-12 * by_hand().abs().max()


def test_copies_of_a_stage_share_what_goes_past_it(clusters):
    """Weight stashing with two stages a rank, over whose cut a skip goes, is that with one stage a rank."""
    coarse = replace(pipedream(2, 4), cuts=(9,))
    rows = tuple(tuple(action for action in row if action.kind in ("F", "B")) for row in coarse.rows)
    fine = replace(refine(Plan("two stages a rank", rows, 2, Mesh(pipeline=2), 4), 2), cuts=(3, 9, 10), holds="one",
                   staleness=1, stashed=True)  # fmt: skip
    data = bp.data.Dataset("twenty", X, T, X[:4], T[:4])
    trained = [clusters[2].train(NETWORK, data, plan, batch=20, lr=0.5, steps=3).network.parameters()
               for plan in (coarse, update_each(communicate(losses(fine))))]  # fmt: skip
    assert all((a - b).abs().max() <= 1e-12 for a, b in zip(*trained, strict=True))
    assert not torch.equal(trained[0][0], NETWORK.parameters()[0])
