"""Layer times, and stages balanced by them."""

from __future__ import annotations

import pytest
import torch

import bpkit as bp
from bpkit.nn import Linear, Network, ReLU, balanced_cuts
from bpkit.plan import compile, one_f_one_b


def test_a_larger_layer_takes_longer() -> None:
    torch.set_num_threads(1)
    network = Network([Linear(16, 16), ReLU(), Linear(16, 1024), ReLU(), Linear(1024, 1024), Linear(1024, 10)], 16)
    times = bp.measure.layer_times(network, torch.randn(64, 16))
    assert len(times) == 6 and min(times) > 0
    assert max(times) == times[4] > 5 * times[0]


def test_stages_are_balanced_by_given_costs() -> None:
    network = bp.nn.mlp([8, 8, 8, 8, 8])
    costs = [1, 1, 1, 1, 9, 1, 1]
    plan = one_f_one_b(3, 2, cuts=balanced_cuts(costs, 3))
    assert compile(plan, network).cuts == (4, 5)
    with pytest.raises(ValueError, match="3 stages need 2 cuts, not 1"):
        one_f_one_b(3, 2, cuts=[4])
