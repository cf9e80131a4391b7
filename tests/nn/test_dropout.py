"""The dropout mask depends on coordinates alone."""

from __future__ import annotations

import pytest
import torch

from bpkit import nn
from bpkit.nn.layers.dropout import key, mix, mix_

from .cases import D


def mask(rows: int = 64, first: int = 0, **other: int) -> torch.Tensor:
    at = {"seed": 1, "step": 2, "layer": 3, **other}
    return nn.dropout_mask(0.3, (rows, 50), first=first, **at)  # type: ignore[arg-type]


def test_hash_is_lowbias32() -> None:
    """Against the formula in plain integers, which cannot overflow."""

    def lowbias32(x: int) -> int:
        x = ((x ^ (x >> 16)) * 0x7FEB352D) % 2**32
        x = ((x ^ (x >> 15)) * 0x846CA68B) % 2**32
        return x ^ (x >> 16)

    values = [0, 1, 2**31 - 1, 2**31, 2**32 - 1, 123456789]
    assert mix_(torch.tensor(values)).tolist() == [lowbias32(v) for v in values] == [mix(v) for v in values]


def test_cutting_the_batch_changes_nothing() -> None:
    whole = mask(64)
    parts = [mask(b - a, a) for a, b in ((0, 1), (1, 30), (30, 30), (30, 64))]
    assert torch.equal(torch.cat(parts), whole)


def test_each_coordinate_matters() -> None:
    other = [mask(seed=2), mask(step=3), mask(layer=4), mask(first=1), mask(seed=1 + 2**32), mask(step=3, layer=2)]
    for m in other:
        assert 0.35 < float(((m > 0) == (mask() > 0)).float().mean()) < 0.8  # independent masks agree at 0.58
    assert key(1, 2) != key(2, 1)


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_rate_and_independence(p: float) -> None:
    m = nn.dropout_mask(p, (1000, 1000), seed=0, step=0, layer=0, dtype=D)
    kept = (m > 0).double()
    n = kept.numel()
    assert abs(float(kept.mean()) - (1 - p)) < 4 * (p * (1 - p) / n) ** 0.5
    assert set(m.unique().tolist()) == {0.0, 1 / (1 - p)}
    for a, b in ((kept[1:], kept[:-1]), (kept[:, 1:], kept[:, :-1])):
        covariance = float((a * b).mean() - a.mean() * b.mean())
        assert abs(covariance) < 4 * p * (1 - p) / n**0.5
    spread = (p * (1 - p) / 1000) ** 0.5
    for dim in (0, 1):
        assert 0.9 * spread < float(kept.mean(dim).std()) < 1.1 * spread


def test_masks_are_those_of_the_first_release() -> None:
    """A training run of old must replay: these bits are part of the interface."""
    bits = (nn.dropout_mask(0.5, (2, 16), seed=0, step=0, layer=0) > 0).int().flatten().tolist()
    assert "".join(map(str, bits)) == "01100101001111100101101010101101"


def test_neither_nesting_nor_cutting_twice_changes_the_mask() -> None:
    x = torch.ones(4, 50, dtype=D)
    layers = [nn.Linear(50, 50), nn.Tanh(), nn.Dropout(0.3), nn.Tanh(), nn.Dropout(0.3)]
    plain = nn.Network(layers, 50, dtype=D)
    nested = nn.Network([nn.Sequential(*layers[:3]), nn.Residual(layers[3]), layers[4]], 50, dtype=D)
    expected = plain.forward(x)
    first, rest = plain.split([1])
    second, third = rest.split([2])
    assert torch.equal(third.forward(second.forward(first.forward(x))), expected)
    dropped = nested.forward(x) == 0
    assert torch.equal(dropped, expected == 0) and dropped.any()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_draws_the_same_mask() -> None:
    kwargs = {"seed": 5, "step": 2**40, "layer": 7, "first": 2**33}
    cpu = nn.dropout_mask(0.1, (300, 700), **kwargs)  # type: ignore[arg-type]
    assert torch.equal(nn.dropout_mask(0.1, (300, 700), device="cuda", **kwargs).cpu(), cpu)  # type: ignore[arg-type]
