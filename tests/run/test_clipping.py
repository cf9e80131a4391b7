"""Clipping where squares of a float32 gradient are beyond its range, and norms are not."""

from __future__ import annotations

import pytest
import torch

import bpkit as bp
from bpkit.plan import Plan, data_parallel, gpipe, zero

PLANS = [data_parallel(2), data_parallel(2, 2), zero(2, 1), zero(2, 2, units=2), zero(2, 3, units=2), gpipe(2, 2)]


@pytest.mark.parametrize("plan", PLANS, ids=lambda plan: plan.name)
@pytest.mark.parametrize("size", [1.0, 1e20, 1e30])
def test_an_update_of_the_norm_that_was_asked_for(clusters, plan: Plan, size: float) -> None:
    network = bp.nn.mlp([4, 3, 2], activation="tanh")
    weight, bias, *_ = network.parameters()
    weight.fill_(1 / size)  # so that the gradient is as large as the inputs, and nothing saturates
    bias.zero_()
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(8, 4, generator=generator).mul_(size)
    data = bp.data.Dataset("large", x, torch.tensor([0, 1] * 4), x, torch.tensor([0, 1] * 4))
    result = clusters[2].train(network, data, plan, batch=8, steps=1, optimizer=bp.optim.SGD(1.0, clip=1e-3))
    moves = [b.double() - a.double() for a, b in zip(network.parameters(), result.network.parameters(), strict=True)]
    assert abs(float(torch.cat([m.flatten() for m in moves]).norm()) / 1e-3 - 1) < 1e-3
