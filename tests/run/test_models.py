"""Real models on meshes of up to three axes: gradients and weights against serial training, on both transports."""

from __future__ import annotations

import pytest
import torch

import bpkit as bp
from bpkit.nn import Network
from bpkit.plan import (
    Plan,
    data_parallel,
    gpipe,
    interleaved,
    one_f_one_b,
    serial,
    shard_optimizer,
    tensor_parallel,
    zb_v,
    zero,
    zero_bubble_h1,
    zero_bubble_h2,
)
from bpkit.run.whole import unsharded
from tests.nn import test_gpt

from .oracle import flat, gradient_sum, worst

pytestmark = pytest.mark.slow

EXACT, SAMPLES = 1e-12, 11
TEXT, DIGITS = bp.data.text(length=12), bp.data.digits(dtype=torch.float64)
F64 = {"seed": 1, "dtype": torch.float64}


def gpt(tied: bool) -> Network:
    return bp.nn.gpt(int(TEXT.inputs.max()) + 1, 12, width=16, heads=4, layers=2, tied=tied, dropout=0.1, **F64)


MODELS = {
    "mlp": (bp.nn.mlp([64, 24, 20, 16, 10], **F64), DIGITS),
    "convnet": (bp.nn.convnet(channels=(1, 4, 8), norm="layer", **F64), DIGITS),
    "gpt": (gpt(tied=False), TEXT),
    "gpt, tied": (gpt(tied=True), TEXT),
}


def plans(network: Network) -> list[Plan]:
    """Pipelines, tensor plans and hybrids of up to four workers."""
    made = [data_parallel(2, 3, microbatches=2), zero(2, 1, units=3), gpipe(2, 3), gpipe(4, 2)]
    made += [one_f_one_b(3, 1), one_f_one_b(2, 3, data=2), one_f_one_b(2, 5, recompute=True), interleaved(2, 3)]
    made += [zero_bubble_h1(2, 3, data=2, recompute=True), zero_bubble_h2(3, 4), zb_v(2, 3), zb_v(2, 3, data=2)]
    made.append(shard_optimizer(one_f_one_b(2, 3, data=2)))
    layouts = [bp.nn.tensor_layout(network)]
    layouts += [bp.nn.tensor_layout(network, sequence=True)] if len(network.output_shape) == 2 else []
    for layout in layouts if layouts[0].partial_outputs else []:
        bases = [serial(1, 2), data_parallel(2), one_f_one_b(2, 3), zero_bubble_h1(2, 2), zb_v(1, 2)]
        made += [tensor_parallel(base, 2, layout) for base in [*bases, one_f_one_b(2, 2, recompute=True)]]
        chunked = [zb_v(2, 4), interleaved(2, 2)] if layout.vocabulary else []  # four stages; their loss sums too
        made += [tensor_parallel(base, 2, layout) for base in chunked]
        made += [tensor_parallel(serial(), 4, layout), shard_optimizer(tensor_parallel(data_parallel(2), 2, layout))]
    return made


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("uneven", [False, True], ids=["even", "uneven"])
def test_gradients_equal_serial(clusters, model, uneven):
    network, data = MODELS[model]
    inputs, targets = data.inputs[:SAMPLES], data.targets[:SAMPLES]
    oracle = gradient_sum(network, inputs, targets, step=3) / network.loss.terms(targets)
    for plan in plans(network):
        shards = [9, 2] if uneven and plan.mesh.data == 2 else None
        found = clusters[plan.workers].gradients(network, inputs, targets, plan, step=3, shards=shards)
        assert worst(network, found, oracle) <= EXACT, plan.name


@pytest.mark.parametrize("model", ["gpt, tied", "mlp"])
@pytest.mark.parametrize("clip", [None, 0.05], ids=["SGD", "clipped"])
def test_weights_equal_serial_after_several_steps(clusters, model, clip):
    network, data = MODELS[model]
    arguments = dict(batch=12, steps=6, optimizer=bp.optim.SGD(0.2, momentum=0.9, clip=clip))
    expected = clusters[1].train(network, data, serial(), **arguments)
    for plan in plans(network):
        result = clusters[plan.workers].train(network, data, plan, **arguments)
        difference = flat(result.network.parameters()) - flat(expected.network.parameters())
        assert float(difference.abs().max()) <= 1e-10, plan.name
        assert abs(result.losses - expected.losses).max() <= 1e-10, plan.name


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_gpt_learns_step_by_step_as_in_pytorch(clusters, tied):
    text = bp.data.text(test_gpt.LENGTH)
    sizes = (test_gpt.LENGTH, test_gpt.WIDTH, test_gpt.HEADS, test_gpt.BLOCKS)
    network = bp.nn.gpt(text.vocabulary, *sizes, dtype=torch.float64, tied=tied)
    copy = test_gpt.copied(network, text.vocabulary, tied)
    optimizer, expected = torch.optim.SGD(copy.parameters(), lr=0.5), []
    for step in range(15):
        x, t = text.batch(step, 16)
        loss = torch.nn.functional.cross_entropy(copy(x).flatten(0, 1), t.flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        expected.append(float(loss.detach()))
    assert expected[-1] < expected[0] - 0.3
    layout, by_tokens = bp.nn.tensor_layout(network), bp.nn.tensor_layout(network, sequence=True)
    two = one_f_one_b(2, 2)
    split = [tensor_parallel(base, 2, one) for base in (serial(), two) for one in (layout, by_tokens)]
    for plan in (serial(), two, *split):
        result = clusters[plan.workers].train(network, text, plan, batch=16, steps=15, lr=0.5)
        assert abs(result.losses - expected).max() < 1e-8, plan.name


def by_groups(network: Network, groups: list[torch.Tensor], inputs, targets) -> torch.Tensor:
    """The gradient whose batch norm takes its statistics over each group of samples in turn."""
    return sum(gradient_sum(network, inputs[rows], targets[rows]) for rows in groups) / len(inputs)


@pytest.mark.parametrize("synchronised", [False, True], ids=["local", "over data ranks"])
def test_batch_norm_has_the_same_statistic_groups(clusters, synchronised):
    network = bp.nn.convnet(channels=(1, 4, 8), norm="batch", **F64)
    inputs, targets = DIGITS.inputs[:20], DIGITS.targets[:20]
    made = [data_parallel(2, microbatches=2), one_f_one_b(2, 2, data=2), data_parallel(3), one_f_one_b(2, 2)]
    for plan in made:
        ranks, m = plan.mesh.data, plan.microbatches
        sizes = [13, 7, 0][:ranks] if ranks > 1 else [20]
        own = [rows.tensor_split(m) for rows in torch.arange(20).split(sizes)]
        groups = [rows for parts in own for rows in parts if len(rows)]
        if synchronised:
            groups = [torch.cat([parts[k] for parts in own]) for k in range(m)]
        found = clusters[plan.workers].gradients(
            network, inputs, targets, plan, shards=sizes, sync_batch_norm=synchronised
        )
        assert worst(network, found, by_groups(network, groups, inputs, targets)) <= EXACT, plan.name


def test_running_statistics_come_back(clusters):
    network = bp.nn.convnet(channels=(1, 4), norm="batch", **F64)
    arguments = dict(batch=40, steps=30, lr=0.1, evaluate_every=30)
    one = clusters[1].train(network, DIGITS, serial(), **arguments)
    many = clusters[4].train(network, DIGITS, one_f_one_b(2, 1, data=2), sync_batch_norm=True, **arguments)
    assert torch.allclose(one.network.flat_buffers, many.network.flat_buffers, rtol=1e-9)
    assert not torch.equal(one.network.flat_buffers, network.flat_buffers)
    accuracy = many.network.accuracy(DIGITS.test_inputs, DIGITS.test_targets)
    assert many.accuracies[-1][1] == accuracy == one.accuracies[-1][1] > 0.6


def test_copies_of_a_tied_tensor_that_differ_are_an_error():
    network = gpt(tied=True)
    program = bp.plan.compile(one_f_one_b(2, 2), network)
    flats = [[part.flat_parameters.clone()] for part in network.split(program.cuts)]
    assert all(map(torch.equal, unsharded(network, program, flats), network.parameters()))
    flats[1][0][network.split(program.cuts)[1].tied_slices()["embedding"].start] += 1e-6
    with pytest.raises(RuntimeError, match=r"stages \(0, 1\) end with different copies of 'embedding'"):
        unsharded(network, program, flats, within=1e-8)
