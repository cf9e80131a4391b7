"""Losses: sums, terms, masks and refusals."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from bpkit import nn

from .cases import D, close


@pytest.mark.parametrize("shape", [(7, 4), (3, 5, 4)])
@pytest.mark.parametrize("masked", [False, True])
def test_cross_entropy_is_the_sum_that_torch_gives(shape: tuple[int, ...], masked: bool) -> None:
    y, t = torch.randn(shape, dtype=D) * 30, torch.randint(4, shape[:-1])
    if masked:
        t.view(-1)[::2] = -100
    loss = nn.CrossEntropy()
    leaf = y.clone().requires_grad_()
    expected = F.cross_entropy(leaf.reshape(-1, 4), t.reshape(-1), reduction="sum")
    expected.backward()
    value, gradient = loss.value_and_gradient(y, t)
    assert close(value, expected) and close(gradient, leaf.grad) and value.ndim == 0
    assert torch.equal(loss.value(y, t), value)
    assert loss.terms(t) == int((t >= 0).sum())
    mean = F.cross_entropy(y.reshape(-1, 4), t.reshape(-1))
    assert torch.allclose(value / loss.terms(t), mean, rtol=1e-12)


def test_all_masked_and_none() -> None:
    loss = nn.CrossEntropy()
    for t in (torch.full((3,), -100), torch.zeros(0, dtype=torch.int64)):
        value, gradient = loss.value_and_gradient(torch.randn(len(t), 4), t)
        assert float(value) == 0 and not gradient.any() and loss.terms(t) == 0


def test_squared_error_counts_elements() -> None:
    y, t = torch.randn(7, 4, dtype=D), torch.randn(7, 4, dtype=D)
    value, gradient = nn.MSE().value_and_gradient(y, t)
    assert close(value / nn.MSE().terms(t), F.mse_loss(y, t))
    assert close(gradient, 2 * (y - t)) and nn.MSE().terms(t) == 28


def test_bad_targets_are_named() -> None:
    loss = nn.CrossEntropy()
    loss.check(torch.tensor([0, 3, -100]), (4,))
    with pytest.raises(ValueError, match="label 4 at position 1 is out of range: the network has 4 classes"):
        loss.check(torch.tensor([0, 4, -1]), (4,))
    with pytest.raises(ValueError, match=r"label -1 at position \(0, 1\)"):
        loss.check(torch.tensor([[0, -1]]), (2, 4))
    with pytest.raises(TypeError, match=r"torch.int64, not torch.float32"):
        loss.check(torch.zeros(3), (4,))
    with pytest.raises(ValueError, match="targets"):
        loss.check(torch.zeros(3, 4, dtype=torch.int64), (4,))
    with pytest.raises(ValueError, match=r"same shape, not \(3,\)"):
        nn.MSE().check(torch.zeros(2, 3), (4,))
    with pytest.raises(TypeError, match="floating"):
        nn.MSE().check(torch.zeros(2, 4, dtype=torch.int64), (4,))
    with pytest.raises(ValueError, match="negative"):
        nn.CrossEntropy(ignore_index=3)
