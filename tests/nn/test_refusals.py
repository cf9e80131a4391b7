"""What layers, losses and networks refuse, and what of near kinds they take."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F

from bpkit import nn

from .cases import D

LOSSES: dict[str, tuple[nn.Loss, torch.Tensor, torch.Tensor, str]] = {
    "squared error of vectors": (nn.MSE(), torch.randn(6, 1), torch.randn(6), r"\(1,\) a sample .*not \(\)"),
    "squared error of numbers": (nn.MSE(), torch.randn(6), torch.randn(6, 1), r"outputs of \(\) .*not \(1,\)"),
    "squared error of a row": (nn.MSE(), torch.randn(6, 3), torch.randn(1, 3), r"\(6, 3\) .*\(1, 3\)"),
    "squared error of one number": (nn.MSE(), torch.randn(6, 3), torch.randn(6, 1), r"\(3,\) .*\(1,\)"),
    "classes one hot": (nn.CrossEntropy(), torch.randn(6, 3), torch.zeros(6, 3, dtype=torch.int64), r"\(\) a .*\(3,\)"),
    "classes of fewer samples": (nn.CrossEntropy(), torch.randn(6, 3), torch.tensor([0, 1]), r"\(6, 3\) .*\(2,\)"),
    "classes of tokens as samples": (nn.CrossEntropy(), torch.randn(2, 3, 4), torch.tensor([0] * 6), r"\(3,\) .*\(\)"),
    "classes of a vocabulary's part": (
        nn.VocabularyCrossEntropy(low=0, high=3, classes=6, reduce=lambda t, how: t),
        torch.randn(2, 3),
        torch.tensor([[0], [1]]),
        r"\(\) a .*\(1,\)",
    ),
}


@pytest.mark.parametrize("name", LOSSES)
def test_targets_that_would_broadcast_are_refused(name: str) -> None:
    loss, y, t, text = LOSSES[name]
    for entry in (loss.value_and_gradient, loss.value, loss.reference):
        with pytest.raises(ValueError, match=text):
            entry(y, t)


def test_classes_are_whole_numbers_at_every_entry() -> None:
    loss, y, t = nn.CrossEntropy(), torch.randn(3, 4), torch.zeros(3)
    for entry in (lambda: loss.value_and_gradient(y, t), lambda: loss.value(y, t), lambda: loss.terms(t)):
        with pytest.raises(TypeError, match=r"torch.int64, not torch.float32"):
            entry()
    with pytest.raises(TypeError, match=r"floating targets, not torch.int64"):
        nn.MSE().value_and_gradient(y, y.long())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("outputs", [torch.float64, torch.float32])
def test_floating_targets_are_taken_in_the_dtype_of_the_outputs(dtype: torch.dtype, outputs: torch.dtype) -> None:
    net = nn.mlp([3, 1], loss="mse", dtype=outputs)
    y, t = net.forward(torch.randn(6, 3, dtype=outputs)), torch.randn(6, 1, dtype=D).to(dtype)
    net.loss.check(t, net.output_shape)
    value, gradient = net.loss.value_and_gradient(y, t)
    assert value.dtype is gradient.dtype is outputs
    assert torch.equal(gradient, 2 * (y - t.to(outputs))) and net.loss.value(y, t).dtype is outputs
    net.backward(gradient)


def test_tokens_outside_the_vocabulary_are_named() -> None:
    wanted = r"token 7 at position \(1, 2\) is outside .*Embedding\(vocabulary=7.*from 0 to 6"
    tokens = torch.tensor([[0, 1, 2], [3, 6, 7]])
    for layers in ([nn.Embedding(7, 4)], [nn.Sequential(nn.Embedding(7, 4), nn.Positions(3, 4)), nn.Tanh()]):
        net = nn.Network(layers, 3)
        net.check_inputs(tokens.clamp(max=6))
        for entry in (net.check_inputs, net.forward, net.predict):
            with pytest.raises(ValueError, match=wanted):
                entry(tokens)
        with pytest.raises(ValueError, match=r"token -1 at position \(0, 0\)"):
            net.check_inputs(tokens - 1)


def test_a_part_of_the_vocabulary_checks_the_whole() -> None:
    whole = nn.gpt(8, 3, width=8, heads=2, layers=1)
    for index in range(2):
        part = nn.shard(whole, index, 2)
        part.check_inputs(torch.tensor([[0, 4, 7]]))
        with pytest.raises(ValueError, match="token 8 .* from 0 to 7"):
            part.check_inputs(torch.tensor([[0, 4, 8]]))


def test_the_form_of_inputs_is_checked() -> None:
    text, image = nn.gpt(8, 3, width=8, heads=2, layers=1), nn.mlp([4, 2])
    with pytest.raises(ValueError, match=r"'rows', 3\), not \(1, 4\)"):  # a sequence longer than the positions
        text.check_inputs(torch.zeros(1, 4, dtype=torch.int64))
    with pytest.raises(TypeError, match=r"torch.int64 and got inputs of torch.int32"):
        text.check_inputs(torch.zeros(1, 3, dtype=torch.int32))
    with pytest.raises(ValueError, match="on cpu and got inputs on meta"):
        image.check_inputs(torch.zeros(1, 4, device="meta"))
    image.check_inputs(torch.zeros(0, 4))


NORMED: dict[str, tuple[tuple[int, ...], list[nn.Layer], int]] = {
    "vectors": ((3,), [nn.BatchNorm(3), nn.Linear(3, 2)], 2),
    "one place": ((3, 1, 1), [nn.BatchNorm(3), nn.Flatten(), nn.Linear(3, 2)], 2),
    "inside": ((4,), [nn.Linear(4, 3), nn.Residual(nn.Sequential(nn.BatchNorm(3))), nn.Linear(3, 2)], 2),
    "images": ((3, 2, 1), [nn.BatchNorm(3), nn.Flatten(), nn.Linear(6, 2)], 1),
    "layer norm": ((3,), [nn.LayerNorm(3), nn.Linear(3, 2)], 1),
}


@pytest.mark.parametrize("name", NORMED)
def test_one_value_a_channel_is_an_error_in_training_alone(name: str) -> None:
    shape, layers, least = NORMED[name]
    net = nn.Network(layers, shape, dtype=D)
    assert net.least_rows == least
    assert [stage.least_rows for stage in net.split(range(1, len(layers)))].count(2) == (least == 2)
    for rows in (0, least, 3):
        net.forward(torch.randn(rows, *shape, dtype=D))
    one = torch.randn(1, *shape, dtype=D)
    net.forward(one, context=nn.Context(training=False))
    if least == 2:
        with pytest.raises(ValueError, match=r"layer \d, BatchNorm\(channels=3.*more than 1 value per channel"):
            net.forward(one)
        with pytest.raises(ValueError, match="more than 1 value per channel"):  # of all data ranks together
            net.forward(one, context=nn.Context(sum_over_data=lambda v: v))
        net.forward(one, context=nn.Context(sum_over_data=lambda v: 2 * v))


def test_load_takes_a_module_or_changes_nothing() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 3))
    net, x, t = nn.mlp([4, 8, 3]), torch.randn(5, 4), torch.tensor([0, 1, 2, 0, 1])
    net.load(model.parameters())
    loss = F.cross_entropy(model(x), t, reduction="sum")
    loss.backward()
    value, dy = net.loss.value_and_gradient(net.forward(x), t)
    net.backward(dy)
    assert torch.allclose(value, loss)
    assert all(torch.allclose(g, p.grad) for g, p in zip(net.gradients(), model.parameters(), strict=True))  # type: ignore[arg-type]
    before = net.flat_parameters.clone()
    first, *others = model.parameters()
    with pytest.raises(ValueError, match=r"parameter 3 has shape \(3,\), not \(2,\)"):
        net.load([first + 1, *others[:-1], torch.zeros(2)])
    assert torch.equal(net.flat_parameters, before) and not net.flat_parameters.requires_grad


def test_autograd_does_not_follow_what_is_given() -> None:
    def entries(net: nn.Network) -> list[Callable[[torch.Tensor], torch.Tensor | None]]:
        return [lambda dy: net.backward(dy, need_input=True), net.backward_input]

    start: list[nn.Layer] = [nn.Conv2d(1, 2), nn.BatchNorm(2), nn.GELU(), nn.MaxPool2d()]
    layers = [*start, nn.Flatten(), nn.Linear(8, 3)]
    for own, shape in ((layers, (1, 6, 6)), ([nn.Linear(4, 3), nn.Tanh()], (4,))):
        net = nn.Network(own, shape)
        x = torch.randn(5, *shape)
        for number in (0, 1):
            y = net.forward(x.clone().requires_grad_())
            dy = torch.randn(5, *net.output_shape)
            dx = entries(net)[number](dy.clone().requires_grad_())
            assert dx is not None and not y.requires_grad and not dx.requires_grad
            net.forward(x)
            assert torch.equal(dx, entries(net)[number](dy))  # type: ignore[arg-type]
