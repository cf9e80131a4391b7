"""Training in bfloat16 with weights in float32: class lossy, within the bound that `Cluster.train` states."""

from __future__ import annotations

import pytest
import torch

import bpkit as bp
from bpkit.plan import data_parallel, one_f_one_b, serial, tensor_parallel, zero, zero_bubble_h1

from .oracle import flat, gradient_sum

BOUND = 0.08  # found: 0.05 at most, of the whole gradient in the Euclidean norm
DIGITS, TEXT = bp.data.digits(), bp.data.text(length=16)
GPT = bp.nn.gpt(int(TEXT.inputs.max()) + 1, 16, width=32, heads=4, layers=2, tied=True)
NETWORKS = {"mlp": (bp.nn.mlp([64, 48, 48, 48, 10], seed=1), DIGITS), "gpt": (GPT, TEXT)}


def plans(network: bp.nn.Network) -> list[bp.plan.Plan]:
    made = [serial(2), data_parallel(2, 3, microbatches=2), one_f_one_b(2, 3, recompute=True), zero_bubble_h1(2, 3)]
    if network is GPT:
        return [*made, tensor_parallel(data_parallel(2), 2, bp.nn.tensor_layout(network))]
    return [*made, *(zero(2, level, units=3, microbatches=2) for level in (1, 2, 3))]


@pytest.mark.parametrize("name", NETWORKS)
def test_gradients_stay_within_the_bound(clusters, name):
    network, data = NETWORKS[name]
    inputs, targets = data.inputs[:64], data.targets[:64]
    oracle = gradient_sum(network, inputs, targets) / network.loss.terms(targets)
    for plan in plans(network):
        found = clusters[plan.workers].gradients(network, inputs, targets, plan, precision="bf16")
        assert found.dtype is torch.float32
        error = float((found - oracle).norm() / oracle.norm())
        assert 1e-5 < error < BOUND, plan.name  # not float32's either


def test_digits_learn_and_replicas_agree(clusters):
    network = bp.nn.mlp([64, 128, 10], seed=0)
    arguments = dict(batch=128, steps=150, optimizer=bp.optim.SGD(0.1, momentum=0.9), evaluate_every=150)
    full = clusters[2].train(network, DIGITS, **arguments)
    half = clusters[2].train(network, DIGITS, precision="bf16", **arguments)
    assert half.accuracies[-1][1] > full.accuracies[-1][1] - 0.01 > 0.93
    size = network.flat_size
    assert half.memory[0] == full.memory[0] | {"bfloat16": 2 * 2 * size}
    assert "bf16" in repr(half) and "bf16" not in repr(full)


def test_weights_move_by_less_than_bfloat16_can_hold(clusters):
    network = bp.nn.mlp([64, 16, 10], seed=0)
    result = clusters[1].train(network, DIGITS, batch=64, steps=20, lr=1e-5, precision="bf16")
    before, after = flat(network.parameters()), flat(result.network.parameters())
    moved = (before != after).double().mean()
    assert moved > 0.3 and (before.bfloat16() != after.bfloat16()).double().mean() < 0.05 < moved


@pytest.mark.parametrize(("change", "error", "why"), [
    ({"precision": "fp8"}, ValueError, "unknown precision 'fp8': choose 'full' or 'bf16'"),
    ({"network": bp.nn.mlp([64, 10], dtype=torch.float64), "data": bp.data.digits(dtype=torch.float64)}, TypeError,
     "its weights in torch.float32, but the network's are torch.float64"),
    ({"plan": bp.plan.local_sgd(2, 2)}, ValueError, "takes a plan with one gradient"),
    ({"network": bp.nn.convnet(channels=(1, 4, 8))}, ValueError, "without running statistics"),
    ({"network": bp.nn.mlp([64, 10], dtype=torch.bfloat16), "data": bp.data.digits(dtype=torch.bfloat16)}, TypeError,
     "a network in bfloat16 has no float32 weights"),
])  # fmt: skip
def test_what_bf16_does_not_do_is_refused(clusters, change, error, why):
    arguments = dict(network=bp.nn.mlp([64, 10]), data=DIGITS, plan=None, batch=32, steps=2, lr=0.1, precision="bf16")
    arguments |= change
    with pytest.raises(error, match=why):
        clusters[2].train(**arguments)
