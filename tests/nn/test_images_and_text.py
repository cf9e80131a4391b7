"""Layers for images and text: gradients against autograd, halves, microbatches, no rows, stages."""

from __future__ import annotations

import copy
import math
import pickle

import pytest
import torch

from bpkit import nn
from bpkit.description import network as description
from bpkit.nn.gradcheck import reference_loss
from bpkit.nn.layer import Pass, put_sum

from .cases import D, close
from .images_and_text import COUPLED, LAYERS, TOKENS, VANISHING, batch, network

HERE = nn.Context(step=3, first=5)
each = pytest.mark.parametrize("name", LAYERS)


def autograd(net, x, t, context=HERE):  # type: ignore[no-untyped-def]
    own = [p.clone().requires_grad_() for p in net.parameters()]
    leaves = [own[i] for i in net.owners]
    return list(torch.autograd.grad(reference_loss(net, x, leaves, t, context), leaves))


def by_hand(net, x, t, context=HERE):  # type: ignore[no-untyped-def]
    _, dy = net.loss.value_and_gradient(net.forward(x, context=context), t)
    net.backward(dy)
    return [g.clone() for g in net.gradients()]


def agree(name, ours, theirs) -> bool:  # type: ignore[no-untyped-def]
    largest = max(float(g.abs().max()) for g in theirs)
    return all(
        float((a - b).abs().max()) <= 1e-13 * largest if i in VANISHING.get(name, ()) else close(a, b)
        for i, (a, b) in enumerate(zip(ours, theirs, strict=True))
    )


@each
@pytest.mark.parametrize("training", [True, False])
def test_autograd_and_differences_agree(name: str, training: bool) -> None:
    net = network(name)
    result = nn.gradcheck(net, *batch(net), context=nn.Context(3, 5, training))
    assert result.ok, str(result)
    assert ("input" in result.autograd) == (net.input_dtype is D)


@each
def test_halves_equal_the_whole_to_the_bit(name: str) -> None:
    net = network(name)
    x, t = batch(net)
    whole = by_hand(net, x, t)
    for need in (True, False):
        net.flat_gradients.fill_(7.0)
        _, dy = net.loss.value_and_gradient(net.forward(x, context=HERE), t)
        before = dy.clone()
        net.backward_input(dy, need_input=need)
        net.backward_weight()
        assert all(torch.equal(a, b) for a, b in zip(net.gradients(), whole, strict=True))
        assert torch.equal(dy, before)


@each
def test_microbatches_accumulate(name: str) -> None:
    net = network(name)
    x, t = batch(net, 9)
    parts = [(0, 4), (4, 4), (4, 9)]
    contexts = [nn.Context(HERE.step, HERE.first + a) for a, _ in parts]
    if name in COUPLED:  # its reference is the sum of the microbatches' own gradients
        each_own = [autograd(net, x[a:b], t[a:b], c) for (a, b), c in zip(parts, contexts, strict=True) if a < b]
        expected = [sum(gs) for gs in zip(*each_own, strict=True)]
    else:
        expected = by_hand(net, x, t)
    net.flat_gradients.fill_(float("nan"))
    for slot, (a, b) in enumerate(parts):
        net.forward(x[a:b], slot, contexts[slot])
    for slot in (2, 0, 1):
        a, b = parts[slot]
        y = net.forward(x[a:b], slot, contexts[slot])
        net.backward_input(net.loss.value_and_gradient(y, t[a:b])[1], slot)
    for slot in (1, 2, 0):
        net.backward_weight(slot, accumulate=slot != 1)
    assert agree(name, net.gradients(), expected)


@each
@pytest.mark.parametrize("dtype", [torch.float32, D])
def test_no_rows_give_exact_zeros(name: str, dtype: torch.dtype) -> None:
    shape, layers = LAYERS[name]
    net = nn.Network(layers, shape, dtype=dtype)
    x, t = batch(net, 0)
    net.flat_gradients.fill_(7.0)
    value, dy = net.loss.value_and_gradient(net.forward(x.to(net.input_dtype)), t)
    dx = net.backward(dy, need_input=True)
    assert (dx is None) == (net.input_dtype is torch.int64) and (dx is None or dx.shape == x.shape)
    assert float(value) == 0 and all(not g.any() for g in net.gradients())
    assert all(b.isfinite().all() for b in net.buffers())


@each
def test_both_dtypes(name: str) -> None:
    shape, layers = LAYERS[name]
    double, single = (nn.Network(layers, shape, seed=2, dtype=dtype) for dtype in (D, torch.float32))
    x, t = batch(double)
    a, b = by_hand(double, x, t), by_hand(single, x.to(single.input_dtype), t)
    largest = max(float(g.abs().max()) for g in a)
    assert all(float((p - q.double()).abs().max()) < 1e-4 * largest for p, q in zip(a, b, strict=True))


@each
def test_stages_equal_the_whole(name: str) -> None:
    net = network(name)
    x, t = batch(net)
    whole = by_hand(net, x, t)
    stages = net.split(range(1, len(net.layers)))
    y = x
    for stage in stages:
        y = stage.forward(y, context=HERE)
    _, dy = net.loss.value_and_gradient(y, t)
    for stage in reversed(stages):
        dy = stage.backward(dy, need_input=True)
    ours = [g for stage in stages for g in stage.gradients()]
    for name_ in {n for stage in stages for n in stage.tied_slices()}:  # copies: the plan adds what they give
        copies = [s.flat_gradients[s.tied_slices()[name_]] for s in stages if name_ in s.tied_slices()]
        total = sum(copies)
        for one in copies:
            one.copy_(total)
    assert agree(name, ours, whole)


@each
def test_costs_know_edges_and_parameters(name: str) -> None:
    net = network(name)
    for cost, stage in zip(net.costs(), net.split(range(1, len(net.layers))), strict=True):
        assert (cost.inputs, cost.outputs) == (math.prod(stage.input_shape), math.prod(stage.output_shape))
        assert cost.parameters == sum(p.numel() for p in stage.parameters())
        assert (cost.backward_weight > 0) == (cost.parameters > 0)


def test_costs_of_the_products() -> None:
    conv = nn.Conv2d(2, 3, 3, padding=1).cost((2, 6, 6))
    assert conv.forward == 2 * 18 * 108 + 108 and conv.backward_input == 2 * 18 * 108
    heads = nn.Heads(2).cost((5, 12))
    assert heads.forward == 2 * (2 * 25 * 4) + 5 * 50 and heads.backward_input == 4 * (2 * 25 * 4) + 4 * 50


def test_plain_and_fused_attention_are_equal() -> None:
    x = torch.randn(3, 33, 24, dtype=D)
    nets = [nn.Network([nn.Heads(2, causal, fused)], (33, 24), dtype=D) for causal in (True, False) for fused in (0, 1)]
    results = [(net.forward(x), net.backward(x[..., :8], need_input=True)) for net in nets]
    for plain, fused in (results[:2], results[2:]):
        assert all(close(a, b) for a, b in zip(plain, fused, strict=True))
    with pytest.raises(ValueError, match="width of 6 cannot be divided among 4 heads"):
        nn.Attention(6, 4)


@pytest.mark.parametrize(("channels", "size"), [(1, 2), (2, 3), (16, 2)])
def test_max_pool_gives_ties_to_the_first_place(channels: int, size: int) -> None:
    net = nn.Network([nn.ReLU(), nn.MaxPool2d(size)], (channels, 6, 12), dtype=D)
    x = torch.randint(-3, 3, (5, channels, 6, 12), dtype=D)
    leaf = x.clone().requires_grad_()
    expected = torch.nn.functional.max_pool2d(leaf.relu(), size)
    y = net.forward(x)
    dy = torch.randn(y.shape, dtype=D)
    expected.backward(dy)
    assert torch.equal(y, expected) and torch.equal(net.backward(dy, need_input=True), leaf.grad)  # type: ignore[arg-type]


def test_key_bias_vanishes_in_theory() -> None:
    net = network("attention")
    bias = by_hand(net, *batch(net))[1]
    assert float(bias[6:12].abs().max()) < 1e-13 < 1e-4 < float(bias[:6].abs().max())


def test_convolution_halves_are_separate() -> None:
    net = nn.Network([nn.Conv2d(2, 3, 3, stride=2, padding=1)], (2, 6, 6), dtype=D)
    x = torch.randn(4, 2, 6, 6, dtype=D)
    y, dy = net.forward(x), torch.randn(4, 3, 3, 3, dtype=D)
    weight = net.parameters()[0]
    assert close(net.backward_input(dy), torch.nn.grad.conv2d_input(x.shape, weight, dy, 2, 1))  # type: ignore[arg-type]
    assert not net.flat_gradients.any() and y.shape == dy.shape
    net.backward_weight()
    assert close(net.gradients()[0], torch.nn.grad.conv2d_weight(x, weight.shape, dy, 2, 1))


def test_embedding_adds_repeated_tokens_and_takes_tokens_only() -> None:
    net = nn.Network([nn.Embedding(5, 2)], 3, dtype=D)
    net.forward(torch.tensor([[1, 1, 4]]))
    net.backward(torch.ones(1, 3, 2, dtype=D))
    assert net.gradients()[0].tolist() == [[0, 0], [2, 2], [0, 0], [0, 0], [1, 1]]
    with pytest.raises(TypeError, match=r"inputs of torch.int64 and got inputs of torch.float64"):
        net.forward(torch.ones(1, 3, dtype=D))


class _Quadratic(nn.Layer):
    """y = w x + w, by one vector that stands twice in one layer."""

    def parameter_shapes(self, shape):  # type: ignore[no-untyped-def]
        return shape, shape

    def initial(self, shape, generator):  # type: ignore[no-untyped-def]
        return [torch.full(shape, 0.5, dtype=D)] * 2

    def ties(self, shape):  # type: ignore[no-untyped-def]
        return "w", "w"

    def at(self, site):  # type: ignore[no-untyped-def]
        return _QuadraticPass(site)

    def reference(self, x, parameters, context, site):  # type: ignore[no-untyped-def]
        return parameters[0] * x + parameters[1]


class _QuadraticPass(Pass):
    def __init__(self, site) -> None:  # type: ignore[no-untyped-def]
        self.site = site

    def forward(self, x, context):  # type: ignore[no-untyped-def]
        self.x = x
        return self.site.parameters[0] * x + self.site.parameters[1]

    def backward_input(self, dy, need=True):  # type: ignore[no-untyped-def]
        self.dy = dy
        return dy * self.site.parameters[0]

    def backward_weight(self, accumulate=False):  # type: ignore[no-untyped-def]
        for gradient, values in zip(self.site.gradients, (self.dy * self.x, self.dy), strict=True):
            put_sum(gradient, values, 0, accumulate)


def test_a_tensor_may_stand_twice_in_one_layer() -> None:
    net = nn.Network([_Quadratic(), nn.Tanh(), _Quadratic(), nn.Linear(4, 4)], 4, dtype=D)
    x, t = batch(net)
    net.flat_gradients.fill_(7.0)
    assert agree("", by_hand(net, x, t), autograd(net, x, t))


def test_gradcheck_sees_a_use_that_is_not_added(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(description, "added", lambda order, own: (False,) * len(own))
    net = network("tied three times")
    assert not nn.gradcheck(net, *batch(net)).ok


def test_small_gradients_are_not_held_against_the_rounding_of_differences() -> None:
    layers = [nn.Embedding(4, 8, "m"), nn.Linear(8, 8), nn.Unembedding(8, 4, tied="m")]
    net = nn.Network(layers, TOKENS, seed=1, dtype=D)
    assert nn.gradcheck(net, *batch(net, 2)).ok


def test_uses_of_a_tied_tensor_that_tensor_ranks_would_cut_in_different_ways_are_refused() -> None:
    with pytest.raises(ValueError, match=r"parameters 1 and \d are tied, one tensor, but tensor rank 0 of 2"):
        nn.shard(network("two tied names, one in containers"), 0, 2)


def test_tied_weights_are_one_tensor() -> None:
    net = network("tied")
    first, last = net.parameters()[0], net.parameters()[-1]
    assert first.data_ptr() == last.data_ptr() and net.owners[-1] == 0
    assert torch.equal(net.flat_parameters[net.tied_slices()["m"]], first.flatten())
    for again in (pickle.loads(pickle.dumps(net)), copy.deepcopy(net), net.copy(), net.opened()):
        again.parameters()[-1].add_(1)
        assert again.parameters()[0].data_ptr() == again.parameters()[-1].data_ptr() != first.data_ptr()
        assert torch.equal(again.parameters()[0], first + 1)
    with pytest.raises(ValueError, match=r"tied as 'm'.*\(4, 8\).*\(5, 8\)"):
        nn.Network([nn.Embedding(4, 8, "m"), nn.Unembedding(8, 5, tied="m")], 3)


def test_running_statistics_are_those_of_torch_and_travel() -> None:
    net = nn.Network([nn.BatchNorm(3), nn.Flatten(), nn.Linear(12, 4)], (3, 2, 2), dtype=D)
    other = torch.nn.BatchNorm2d(3, dtype=D)
    for step in range(3):
        x = torch.randn(5, 3, 2, 2, dtype=D) * 2 + step
        y = net.forward(x)
        net.forward(x)  # computed again: counts once
        net.backward(torch.ones_like(y))
        other(x)
    mean, variance = net.buffers()
    assert torch.allclose(mean, other.running_mean, rtol=1e-13) and torch.allclose(variance, other.running_var)  # type: ignore[arg-type]
    assert torch.allclose(net.split([1])[0].predict(x), other.eval()(x), rtol=1e-12)
    for twin in (net.copy(), pickle.loads(pickle.dumps(net))):
        assert torch.equal(twin.flat_buffers, net.flat_buffers)
        assert twin.flat_buffers.data_ptr() != net.flat_buffers.data_ptr()


def test_batch_norm_over_data_ranks_equals_the_whole_batch() -> None:
    """Ranks of 4, 0 and 3 samples take turns: each sum waits until all have called it."""
    from concurrent.futures import ThreadPoolExecutor
    from threading import Barrier

    for name in COUPLED:
        net = network(name)
        start = net.copy()
        x, t = batch(net)
        whole = by_hand(net, x, t, nn.Context())
        parts, barrier, given = [(0, 4), (4, 4), (4, 7)], Barrier(3), {}

        def rank(i: int, net=start, x=x, t=t, parts=parts, barrier=barrier, given=given):  # type: ignore[no-untyped-def]
            def sum_over_data(v: torch.Tensor) -> torch.Tensor:
                given[i] = v
                barrier.wait(20)
                total = given[0] + given[1] + given[2]
                barrier.wait(20)
                return total

            own, (a, b) = net.copy(), parts[i]
            own.flat_buffers.mul_(i == 0)  # a rank keeps a summand of the running statistics
            by_hand(own, x[a:b], t[a:b], nn.Context(0, a, True, sum_over_data, share=(b - a) / len(x)))
            return own

        with ThreadPoolExecutor(3) as pool:
            ranks = list(pool.map(rank, range(3)))
        total = [sum(gs) for gs in zip(*(r.gradients() for r in ranks), strict=True)]
        assert agree(name, total, whole)
        assert torch.allclose(sum(r.flat_buffers for r in ranks), net.flat_buffers, rtol=1e-12)


def test_running_statistics_are_weighted_by_samples() -> None:
    """Three replicas of uneven shards, one of them empty in turn, against the mean of what they saw, step by step."""
    start = nn.Network([nn.BatchNorm(3, momentum=0.3), nn.Flatten(), nn.Linear(12, 4)], (3, 2, 2), dtype=D)
    ranks = [start.copy() for _ in range(3)]
    for other in ranks[1:]:
        other.flat_buffers.zero_()
    mean, variance = (b.clone() for b in start.buffers())
    for step, sizes in enumerate([(4, 0, 3), (0, 5, 2), (1, 1, 1), (0, 0, 0)]):
        x = torch.randn(sum(sizes), 3, 2, 2, dtype=D) * 3 + step
        parts = x.split(sizes)
        for net, part in zip(ranks, parts, strict=True):
            context = nn.Context(step, share=len(part) / len(x) if len(x) else 1.0)
            net.backward(torch.ones_like(net.forward(part, context=context)))
        seen = [(len(p), p.mean((0, 2, 3)), p.transpose(0, 1).flatten(1).var(1)) for p in parts if len(p)]
        if seen:
            mean = 0.7 * mean + 0.3 * sum(n * m for n, m, _ in seen) / len(x)
            variance = 0.7 * variance + 0.3 * sum(n * v for n, _, v in seen) / len(x)
    assert torch.allclose(sum(net.flat_buffers for net in ranks), torch.cat([mean, variance]), rtol=1e-12)  # type: ignore[arg-type]


@pytest.mark.parametrize("norm", ["batch", "layer", None])
def test_convnet_learns_digits(norm: str | None) -> None:
    from bpkit.data import digits

    net, data = nn.convnet(channels=(1, 4, 8), norm=norm), digits()
    for step in range(100):
        x, t = data.batch(step, 64)
        by_hand(net, x, t, nn.Context(step))
        net.flat_parameters.sub_(net.flat_gradients, alpha=0.4 / 64)
    assert net.accuracy(data.test_inputs, data.test_targets) > 0.7  # chance: 0.1
    with pytest.raises(ValueError, match="unknown norm 'instance'"):
        nn.convnet(norm="instance")
