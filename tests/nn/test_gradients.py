"""Gradients by hand against autograd, halves against wholes, stages against the whole network."""

from __future__ import annotations

import pytest
import torch

from bpkit import nn

from .cases import LAYERS, D, autograd, batch, by_hand, close, network

HERE = nn.Context(step=3, first=5)
each_layer = pytest.mark.parametrize("name", LAYERS)


@each_layer
@pytest.mark.parametrize("loss", ["cross_entropy", "mse"])
def test_autograd_agrees(name: str, loss: str) -> None:
    net, (x, t) = network(name, loss), batch(loss=loss)
    (dx, ours), (dx_a, theirs) = by_hand(net, x, t, HERE), autograd(net, x, t, HERE)
    assert close(dx, dx_a)
    for a, b in zip(ours, theirs, strict=True):
        assert close(a, b)


@each_layer
def test_nothing_given_is_overwritten(name: str) -> None:
    net, (x, _) = network(name), batch()
    before = x.clone()
    y = net.forward(x, context=HERE)
    dy = torch.randn(y.shape, dtype=D)
    dy_before = dy.clone()
    net.backward(dy, need_input=True)
    assert torch.equal(x, before) and torch.equal(dy, dy_before)


@each_layer
def test_halves_equal_the_whole_to_the_bit(name: str) -> None:
    net, (x, t) = network(name), batch()
    dx, whole = by_hand(net, x, t, HERE)
    net.flat_gradients.fill_(7.0)
    _, dy = net.loss.value_and_gradient(net.forward(x, context=HERE), t)
    half = net.backward_input(dy)
    net.backward_weight()
    assert half is not None and torch.equal(dx, half)
    assert all(torch.equal(a, b) for a, b in zip(net.gradients(), whole, strict=True))


@each_layer
@pytest.mark.parametrize("halves", [False, True])
def test_the_input_gradient_can_be_left_out(name: str, halves: bool) -> None:
    net, (x, t) = network(name), batch()
    _, whole = by_hand(net, x, t, HERE)
    _, dy = net.loss.value_and_gradient(net.forward(x, context=HERE), t)
    if halves:
        assert net.backward_input(dy, need_input=False) is None
        net.backward_weight()
    else:
        assert net.backward(dy) is None
    assert all(torch.equal(a, b) for a, b in zip(net.gradients(), whole, strict=True))


@each_layer
def test_slots_in_flight_accumulate_to_the_whole_batch(name: str) -> None:
    net, (x, t) = network(name), batch(9)
    _, whole = by_hand(net, x, t, HERE)
    net.flat_gradients.fill_(float("nan"))  # the first microbatch overwrites, so this must vanish
    bounds = [(0, 4), (4, 4), (4, 9)]  # the second has no row
    for slot, (a, b) in enumerate(bounds):
        net.forward(x[a:b], slot, nn.Context(HERE.step, HERE.first + a))
    for slot in (2, 0, 1):
        a, b = bounds[slot]
        y = net.forward(x[a:b], slot, nn.Context(HERE.step, HERE.first + a))
        net.backward_input(net.loss.value_and_gradient(y, t[a:b])[1], slot)
    for slot in (1, 2, 0):
        net.backward_weight(slot, accumulate=slot != 1)
    assert all(close(a, b) for a, b in zip(net.gradients(), whole, strict=True))


@each_layer
def test_a_batch_without_rows_gives_exact_zeros(name: str) -> None:
    net, (x, t) = network(name), batch(0)
    net.flat_gradients.fill_(7.0)
    value, dy = net.loss.value_and_gradient(net.forward(x), t)
    dx = net.backward(dy, need_input=True)
    assert dx is not None and dx.shape == x.shape and float(value) == 0
    assert all(not g.any() for g in net.gradients())


@each_layer
def test_stages_equal_the_whole(name: str) -> None:
    net, (x, t) = network(name), batch()
    dx, whole = by_hand(net, x, t, HERE)
    for count in range(1, len(net.layers) + 1):
        stages = net.split(count)
        y = x
        for stage in stages:
            y = stage.forward(y, context=HERE)
        _, dy = net.loss.value_and_gradient(y, t)
        for stage in reversed(stages):
            dy = stage.backward(dy, need_input=True)  # type: ignore[assignment]
        assert torch.equal(dy, dx)
        gradients = [g for stage in stages for g in stage.gradients()]
        assert all(torch.equal(a, b) for a, b in zip(gradients, whole, strict=True))


@pytest.mark.parametrize("tokens", [1, 5])
def test_leading_dimensions_are_rows(tokens: int) -> None:
    layers = [nn.Linear(6, 8), nn.LayerNorm(8), nn.ReLU(), nn.Dropout(0.1), nn.Linear(8, 4)]
    net = nn.Network(layers, (tokens, 6), dtype=D)
    x, t = torch.randn(3, tokens, 6, dtype=D), torch.randint(4, (3, tokens))
    t[1, 0] = -100
    (dx, ours), (dx_a, theirs) = by_hand(net, x, t), autograd(net, x, t)
    assert net.output_shape == (tokens, 4) and close(dx, dx_a)
    assert all(close(a, b) for a, b in zip(ours, theirs, strict=True))
    net.forward(x[:0])
    net.backward(x.new_zeros(0, tokens, 4))
    assert not net.flat_gradients.any()


def test_evaluation_has_gradients_too() -> None:
    off = nn.Context(training=False)
    net, (x, t) = network("dropout"), batch()
    (_, ours), (_, theirs) = by_hand(net, x, t, off), autograd(net, x, t, off)
    assert all(close(a, b) for a, b in zip(ours, theirs, strict=True))


def test_a_slot_follows_a_change_of_shape() -> None:
    net = network("nested")
    for rows in (7, 3, 7):
        x, t = batch(rows, seed=rows)
        _, ours = by_hand(net, x, t)
        assert all(close(a, b) for a, b in zip(ours, autograd(net, x, t)[1], strict=True))


@each_layer
def test_gradcheck_accepts_every_layer(name: str) -> None:
    result = nn.gradcheck(network(name), *batch(), context=HERE)
    assert result.ok, str(result)
    assert "gradients agree" in str(result)


def test_gradcheck_finds_a_wrong_gradient() -> None:
    class WrongPass(nn.Pass):
        def forward(self, x: torch.Tensor, context: nn.Context) -> torch.Tensor:
            return 3 * x

        def backward_input(self, dy: torch.Tensor, need: bool = True) -> torch.Tensor:
            return 2 * dy

    class Wrong(nn.ReLU):
        def at(self, site: nn.Site) -> nn.Pass:
            return WrongPass()

        def reference(self, x, parameters, context, site):  # type: ignore[no-untyped-def]
            return 3 * x

    net = nn.Network([nn.Linear(6, 5), Wrong(), nn.Linear(5, 4)], 6, dtype=D)
    result = nn.gradcheck(net, *batch())
    assert not result.ok and "DIFFER" in str(result)
    assert result.autograd["parameter 0"] > 0.1 and result.differences["parameter 0"] > 0.1
    assert result.autograd["parameter 2"] < 1e-12  # above the wrong layer all is well


def test_gradcheck_refuses_what_it_cannot_check() -> None:
    with pytest.raises(TypeError, match=r"float64; this network is of torch\.float32"):
        nn.gradcheck(nn.mlp([6, 4]), *batch())
    with pytest.raises(ValueError, match="empty batch"):
        nn.gradcheck(network("linear"), *batch(0))


IMAGES = {
    "channels last": lambda x: x.to(memory_format=torch.channels_last),
    "turned": lambda x: x.transpose(2, 3),
    "every second": lambda x: x.repeat_interleave(2, 0)[::2],
    "expanded": lambda x: x[:1].expand(4, -1, -1, -1),
    "followed by autograd": lambda x: x.clone().requires_grad_(),
}


@pytest.mark.parametrize("norm", [[nn.GroupNorm(4, 2)], [nn.BatchNorm(4)], []], ids=["group", "batch", "no norm"])
@pytest.mark.parametrize("how", IMAGES)
def test_inputs_may_lie_in_memory_as_they_like(how: str, norm: list[nn.Layer]) -> None:
    pools: list[nn.Layer] = [nn.MaxPool2d(2), nn.Conv2d(4, 3, 2, stride=2), nn.AveragePool2d(2)]
    layers = [nn.Conv2d(3, 4, 3, padding=1), *norm, nn.GELU(), *pools, nn.Flatten(), nn.Linear(3, 5)]
    net = nn.Network(layers, (3, 8, 8), dtype=D)
    x = IMAGES[how](torch.randn(4, 3, 8, 8, dtype=D, generator=torch.Generator().manual_seed(0)))
    before = x.clone()
    result = nn.gradcheck(net, x, torch.tensor([0, 4, 1, 2]))
    assert result.ok, str(result)
    assert torch.equal(x, before)
    y = net.forward(x).clone()
    dy = torch.randn(5, 4, dtype=D).t()
    strided = net.backward(dy, need_input=True).clone()  # type: ignore[union-attr]
    assert torch.allclose(y, net.forward(x.detach().contiguous()), rtol=1e-12)
    assert torch.allclose(strided, net.backward(dy.contiguous(), need_input=True), rtol=1e-12)  # type: ignore[arg-type]


def test_vectors_and_tokens_may_be_strided() -> None:
    x, t = torch.randn(6, 7, dtype=D).t(), torch.tensor([0, 1, 2, 3, 0, 1, 2])
    assert nn.gradcheck(network("nested"), x, t).ok
    text = nn.gpt(7, 5, width=8, heads=2, layers=1, dtype=D)
    tokens = torch.randint(7, (5, 3)).t()
    assert nn.gradcheck(text, tokens, tokens).ok and nn.gradcheck(text, tokens[:1].expand(3, 5), tokens).ok
