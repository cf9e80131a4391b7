"""Gradients that are not finite: an error that names rank, stage, layer and step, under every plan."""

from __future__ import annotations

import re

import pytest
import torch

import bpkit as bp
from bpkit.data import Dataset
from bpkit.nn import CrossEntropy
from bpkit.plan import Plan
from bpkit.run import WorkerError

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
