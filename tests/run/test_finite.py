"""Gradients that are not finite: an error that names rank, stage, layer and step, under every plan, or no step."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch

import bpkit as bp
from bpkit.data import Dataset
from bpkit.nn import BatchNorm, Context, CrossEntropy, Linear, Network, Tanh
from bpkit.plan import Plan
from bpkit.run import WorkerError

pytestmark = pytest.mark.slow

STEPS, BATCH = 16, 4


class Spoils(CrossEntropy):
    """A loss that is finite, and whose gradient is not where a label is 3."""

    def value_and_gradient(self, y, targets):
        value, gradient = super().value_and_gradient(y, targets)
        gradient[targets == 3] = float("inf")
        return value, gradient


def network(loss=None):
    loss = loss or Spoils()
    return bp.nn.mlp([4, 8, 8, 4], activation="tanh", seed=1, loss=loss, dtype=torch.float64)


class Overflows(Spoils):
    """A loss that is not finite itself, either, where a label is 3."""

    def value_and_gradient(self, y, targets):
        value, gradient = super().value_and_gradient(y, targets)
        return value + (float("nan") if (targets == 3).any() else 0.0), gradient


def data(steps: int, batch: int = BATCH, seed: int = 0) -> tuple[Dataset, list[int]]:
    """Samples of which one spoils a gradient, and the steps that it is in."""
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(64, 4, generator=generator, dtype=torch.float64)
    y = torch.randint(0, 3, (64,), generator=generator)
    y[5] = 3
    made = Dataset("spoiled", x, y, x[:4], y[:4])
    return made, [step for step in range(steps) if 5 in made.indices(step, batch, seed).tolist()]


P = bp.plan
EXACT = [P.serial(), P.data_parallel(2), P.data_parallel(2, 2), P.zero(2, 1), P.zero(2, 2, units=2),
         P.zero(2, 3, units=3), P.gpipe(2, 2), P.one_f_one_b(2, 2), P.zero_bubble_h1(2, 2), P.expand(
             P.data_parallel(2, 2), "ring"),
         P.tensor_parallel(P.serial(), 2, bp.nn.tensor_layout(network()))]  # fmt: skip
OTHERS = [P.parameter_server(2), P.local_sgd(2, 2), P.pipedream(2, 2), P.asynchronous_server(1, [1] * STEPS)]


def named(caught: pytest.ExceptionInfo[WorkerError], step: int, whole_run: bool = False) -> None:
    cause = caught.value.__cause__
    assert isinstance(cause, FloatingPointError) and caught.value.rank in (0, 1)
    seen = re.search(r"step (\d+): .* not finite in stage \d, layer \d", str(cause))
    assert seen and (int(seen[1]) in (step, step + 1) or whole_run), cause


@pytest.mark.parametrize("plan", [*EXACT, *OTHERS], ids=lambda plan: plan.name)
def test_it_is_named(clusters, plan: Plan):
    samples, (first, *_) = data(STEPS)
    assert 0 < first < STEPS - 1
    with pytest.raises(WorkerError) as caught:
        clusters[plan.workers].train(network(), samples, plan, batch=BATCH, steps=STEPS, lr=0.1)
    named(caught, first, bool(plan.servers))
    if not plan.servers:  # a plan of a whole run has its number of steps
        with pytest.raises(WorkerError) as caught:  # in the last step as well
            clusters[plan.workers].train(network(), samples, plan, batch=BATCH, steps=first + 1, lr=0.1)
        named(caught, first)
        assert plan.holds != "all" or "the gradient is not finite" in str(caught.value.__cause__)


@pytest.mark.parametrize("plan", EXACT, ids=lambda plan: plan.name)
def test_with_clipping_it_is_named_at_its_step(clusters, plan: Plan):
    samples, (first, *_) = data(STEPS)
    cluster, options = clusters[plan.workers], dict(batch=BATCH, steps=STEPS)
    with pytest.raises(WorkerError, match=f"step {first}: the gradient is not finite in stage"):
        cluster.train(network(), samples, plan, optimizer=bp.optim.SGD(0.1, clip=1.0), **options)


def without_the_steps(net, samples, optimizer, steps, left_out):
    """The reference: serial steps, in a row, of all batches but those that are left out."""
    net = net.copy()
    state = optimizer.state(net.flat_parameters)
    for number, step in enumerate(step for step in range(steps) if step not in left_out):
        x, t = samples.batch(step, BATCH)
        net.backward(net.loss.value_and_gradient(net.forward(x, 0, Context(step, 0, True)), t)[1])
        gradient = net.flat_gradients
        if optimizer.clip:
            gradient = gradient * bp.optim.clip_factor(gradient.norm() / BATCH, optimizer.clip)
        optimizer.update(net.flat_parameters, gradient, state, number, 1 / BATCH)
    return net


def close(found, expected):
    pairs = zip(found, expected, strict=True)
    return all(float((a - b).abs().max()) <= 1e-12 * float(b.abs().max()) for a, b in pairs)


SKIPS = [*EXACT, P.parameter_server(2), P.parameter_server(3, 2, buckets=2), P.one_f_one_b(2, 2, data=2)]


@pytest.mark.parametrize("plan", SKIPS, ids=lambda plan: plan.name)
def test_a_step_is_skipped_as_if_it_had_not_been(clusters, plan: Plan):
    optimizer, steps, (samples, spoiled) = bp.optim.SGD(0.1, momentum=0.9), 2 * STEPS, data(2 * STEPS)
    assert len(spoiled) > 1 and spoiled[0] > 0
    options = dict(batch=BATCH, steps=steps, optimizer=optimizer, skip_nonfinite=True)
    result = clusters[plan.workers].train(network(Overflows()), samples, plan, **options)
    assert result.skipped == len(spoiled) and len(result.losses) == steps
    assert np.flatnonzero(np.isnan(result.losses)).tolist() == spoiled
    expected = without_the_steps(network(), samples, optimizer, steps, spoiled)
    assert close(result.network.parameters(), expected.parameters())


def test_adam_counts_the_steps_that_were_taken_and_a_step_that_is_clipped_is_taken(clusters):
    (samples, spoiled), optimizer = data(STEPS), bp.optim.Adam(0.01, clip=1e-3)
    options = dict(batch=BATCH, steps=STEPS, optimizer=optimizer, skip_nonfinite=True)
    expected = without_the_steps(network(), samples, optimizer, STEPS, spoiled)
    for plan in (P.serial(2), P.data_parallel(2), P.zero(2, 3, units=3), P.one_f_one_b(2, 2)):
        result = clusters[plan.workers].train(network(), samples, plan, **options)
        assert result.skipped == len(spoiled) and result.plan.name == f"{plan.name} with clipping"
        assert close(result.network.parameters(), expected.parameters())


def test_running_statistics_are_of_the_steps_that_were_taken(clusters):
    samples, spoiled = data(STEPS)
    layers = [Linear(4, 6), BatchNorm(6), Tanh(), Linear(6, 4)]
    net = Network(layers, 4, loss=Spoils(), seed=1, dtype=torch.float64)
    optimizer = bp.optim.SGD(0.1, momentum=0.9)
    expected = without_the_steps(net, samples, optimizer, STEPS, spoiled)
    arguments = dict(batch=BATCH, steps=STEPS, optimizer=optimizer, skip_nonfinite=True)
    for plan in (P.serial(2), P.data_parallel(2), P.zero(2, 2, units=2), P.parameter_server(2)):
        more = {"sync_batch_norm": True} if plan.workers > 1 else {}
        result = clusters[plan.workers].train(net, samples, plan, **arguments, **more)
        assert result.skipped == len(spoiled)
        for a, b in zip(result.network.parameters(), expected.parameters(), strict=True):
            assert float((a - b).abs().max()) <= 1e-12  # the first bias has no effect: its gradient is rounding
        assert torch.allclose(result.network.flat_buffers, expected.flat_buffers, rtol=1e-12, atol=0)


def test_the_last_step_can_be_skipped_and_what_was_wrong_before_is_an_error(clusters):
    samples, (first, *_) = data(STEPS)
    arguments = dict(batch=BATCH, steps=first + 1, lr=0.1, skip_nonfinite=True)
    for plan in (P.data_parallel(2), P.zero(2, 3), P.gpipe(2, 2)):
        assert clusters[2].train(network(), samples, plan, **arguments).skipped == 1
        spoiled = network()
        spoiled.parameters()[0][0, 0] = float("nan")
        with pytest.raises(WorkerError, match=rf"step {first}: .*the weights are not finite in stage 0, layer 0"):
            clusters[2].train(spoiled, samples, plan, **arguments)


def test_where_steps_cannot_be_skipped(clusters):
    samples, before = data(STEPS)[0], clusters[2].generation
    asynchronous = P.asynchronous_server(1, [1] * 2)
    for plan, more in ((P.local_sgd(2, 2), {}), (P.pipedream(2, 2), {}), (asynchronous, {}),
                       (None, {"compress": bp.compress.TopK(0.1)})):  # fmt: skip
        with pytest.raises(ValueError, match="skip_nonfinite takes a plan with one gradient a step, not compressed"):
            clusters[2].train(network(), samples, plan, batch=8, steps=2, lr=0.1, skip_nonfinite=True, **more)
    with pytest.raises(TypeError, match="skip_nonfinite is True or False, not 'yes'"):
        clusters[2].train(network(), samples, batch=8, steps=2, lr=0.1, skip_nonfinite="yes")
    assert clusters[2].generation == before


def test_what_a_sum_or_a_square_cannot_hold(clusters):
    """Inputs of 1e20 are clipped to an update of norm 1; with 3e38 the gradient itself is infinite."""
    net, t = bp.nn.mlp([4, 2]), torch.tensor([0, 1] * 4)
    for parameter in net.parameters():
        parameter.zero_()
    for size, clip in ((1e20, 1.0), (3e38, None), (3e38, 1.0)):
        x = torch.full((8, 4), size)
        x[::2] *= -1
        options = dict(batch=8, steps=1, optimizer=bp.optim.SGD(1.0, clip=clip))
        if size == 1e20:
            weight, bias = clusters[2].train(net, Dataset("x", x, t, x, t), **options).network.parameters()
            assert float(torch.cat([weight.flatten(), bias]).norm()) == pytest.approx(1, rel=1e-5)
        else:
            with pytest.raises(WorkerError, match="step 0: the gradient is not finite in stage 0, layer 0"):
                clusters[2].train(net, Dataset("x", x, t, x, t), **options)
            with pytest.raises(WorkerError, match="step 0: the gradient is not finite in stage 0, layer 0"):
                clusters[2].gradients(net, x, t)



def test_weights_that_no_loss_shows_are_found_at_a_look(clusters):
    """A ReLU hides a weight of minus infinity; it is found within 32 steps, or at the end."""
    net = bp.nn.mlp([2, 3, 3])
    net.parameters()[0][1, 0] = float("-inf")
    x, t = torch.ones(8, 2), torch.tensor([0, 1, 2, 0] * 2)
    for steps, at in ((3, 2), (200, 31)):
        with pytest.raises(WorkerError, match=f"step {at}: the weights are not finite in stage 0, layer 0"):
            clusters[2].train(net, Dataset("ones", x, t, x, t), batch=8, steps=steps, lr=0.1)


def test_a_state_that_is_not_finite_is_no_step_of_zero(clusters):
    """Adam's mean of squares overflows where the gradient does not; it would stand still from then on."""
    net, t = bp.nn.mlp([4, 2]), torch.tensor([0, 1] * 4)
    for parameter in net.parameters():
        parameter.zero_()
    x = torch.full((8, 4), 1e25)
    x[::2] *= -1
    with pytest.raises(WorkerError, match="optimizer's state is not finite in stage 0, layer 0"):
        clusters[2].train(net, Dataset("x", x, t, x, t), batch=8, steps=1, optimizer=bp.optim.Adam(1e-3))


def test_a_live_server_names_whose_gradient_it_was(clusters):
    samples, _ = data(STEPS, 8)
    with pytest.raises(WorkerError, match=r"not finite in stage 0, layer"):
        clusters[3].train_asynchronous(network(), samples, batch=8, steps=STEPS, lr=0.1)


def test_a_loss_of_ones_own_is_kept_under_a_tensor_axis(clusters):
    """A subclass is not taken for the cross-entropy that is split over classes."""
    plan, (x, t) = EXACT[-1], data(1)[0].batch(0, 8)
    net = network(Doubled())
    found = clusters[2].gradients(net, x, t, plan)
    expected = clusters[1].gradients(network(CrossEntropy()), x, t)
    assert torch.allclose(found, 2 * expected, rtol=1e-12, atol=1e-15)


class Doubled(CrossEntropy):
    """Twice the cross-entropy."""

    def value_and_gradient(self, y, targets):
        value, gradient = super().value_and_gradient(y, targets)
        return 2 * value, 2 * gradient
