"""Hyperparameters that make no sense are refused by layer and name; near types are taken as what they mean."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from bpkit import nn

from .cases import D

WHOLE = {  # layer, whole-number arguments with the least that each may be
    nn.Linear: ({"inputs": 1, "outputs": 1}, {}),
    nn.Unembedding: ({"inputs": 1, "outputs": 1}, {}),
    nn.Conv2d: ({"inputs": 1, "outputs": 1, "kernel": 1, "stride": 1, "padding": 0}, {}),
    nn.AveragePool2d: ({"size": 1}, {}),
    nn.MaxPool2d: ({"size": 1}, {}),
    nn.Embedding: ({"vocabulary": 1, "width": 1}, {}),
    nn.Positions: ({"length": 1, "width": 1}, {}),
    nn.LayerNorm: ({"features": 1}, {"eps": (0.0, math.inf)}),
    nn.GroupNorm: ({"channels": 1, "groups": 1}, {"eps": (0.0, math.inf)}),
    nn.BatchNorm: ({"channels": 1}, {"eps": (0.0, math.inf), "momentum": (0.0, 1.0)}),
    nn.Dropout: ({"start": 0}, {"p": (0.0, 0.999)}),
    nn.Heads: ({"heads": 1}, {}),
    nn.StashSkip: ({"number": 0}, {}),
    nn.AddSkip: ({"number": 0}, {}),
}
VALUES = {"inputs": 4, "outputs": 4, "vocabulary": 4, "width": 4, "length": 4, "features": 4, "channels": 4,
          "heads": 2, "number": 0}  # fmt: skip


def make(kind: type, **changed: object) -> nn.Layer:
    required = {name: value for name, value in VALUES.items() if name in WHOLE[kind][0]}
    return kind(**{**required, **changed})


@pytest.mark.parametrize("kind", WHOLE, ids=lambda kind: kind.__name__)
def test_whole_numbers(kind: type) -> None:
    for name, least in WHOLE[kind][0].items():
        for wrong in (least - 1, -3, 2.5, 2.0, True, "2", None, np.float64(2), math.nan, [2]):
            text = rf"{kind.__name__}: {name} must be a whole number of at least {least}"
            with pytest.raises(ValueError, match=text):
                make(kind, **{name: wrong})
        for right in (np.int64(4), np.int32(4), torch.tensor(4)):
            layer = make(kind, **{name: right})
            assert getattr(layer, name) == 4 and type(getattr(layer, name)) is int and layer == make(kind, **{name: 4})


@pytest.mark.parametrize("kind", [kind for kind, (_, numbers) in WHOLE.items() if numbers], ids=lambda k: k.__name__)
def test_numbers(kind: type) -> None:
    for name, (low, high) in WHOLE[kind][1].items():
        for wrong in (low - 0.1, high + 0.1, math.nan, math.inf, "0.1", None, True):
            with pytest.raises(ValueError, match=f"{kind.__name__}: {name} "):
                make(kind, **{name: wrong})
        for right in (np.float64(0.25), np.float32(0.25), 0.25):
            layer = make(kind, **{name: right})
            assert getattr(layer, name) == 0.25 and type(getattr(layer, name)) is float
        assert getattr(make(kind, **{name: int(low)}), name) == low


@pytest.mark.parametrize(
    ("build", "text"),
    [
        (lambda: nn.Network([nn.GroupNorm(4, 3)], (4, 2)), r"GroupNorm\(channels=4.*groups=3\).*equal groups"),
        (lambda: nn.Network([nn.GroupNorm(4, 4)], (4, 1)), r"GroupNorm\(channels=4.*groups of more than one value"),
        (lambda: nn.Network([nn.Linear(2, 2)], 2.5), "Network: each number of input_shape must be a whole number"),
        (lambda: nn.Network([nn.Conv2d(3, 2)], (3, 0, 8)), "at least 1, not 0"),
        (lambda: nn.Network([nn.Linear(2, 2)], 2, seed=0.5), "Network: seed must be a whole number"),
        (lambda: nn.Network([nn.Reshape((3, -2, -2))], 12), r"Reshape\(shape=\(3, -2, -2\)\)"),
        (lambda: nn.Attention(8, 0), "width of 8 cannot be divided among 0 heads"),
        (lambda: nn.Attention(8.0, 2), "Linear: inputs must be a whole number"),
        (lambda: nn.Attention(8, 3), "width of 8 cannot be divided among 3 heads"),
        (lambda: nn.Network([nn.Heads(2)], (5, 9)), r"Heads\(heads=2.*3 x 2 heads"),
        (lambda: nn.Network([nn.AveragePool2d(3)], (1, 8, 8)), r"AveragePool2d\(size=3\).*multiples of 3"),
        (lambda: nn.Network([nn.Conv2d(1, 1, 9)], (1, 8, 8)), r"Conv2d\(.*kernel=9.*as large as its kernel"),
        (lambda: nn.mlp([4.5, 2]), "must be a whole number"),
        (lambda: nn.gpt(0, 4), "Embedding: vocabulary must be a whole number of at least 1"),
    ],
)
def test_what_does_not_fit_is_named(build, text: str) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(ValueError, match=text):
        build()


def test_near_types_make_the_same_network() -> None:
    plain = nn.convnet(8, (1, 2, 3), dtype=D)
    near = nn.convnet(np.int64(8), np.array([1, 2, 3]), seed=np.int64(0), dtype=D)
    assert near.layers == plain.layers and near.input_shape == plain.input_shape and type(near.input_shape[0]) is int
    assert torch.equal(near.flat_parameters, plain.flat_parameters)
    shaped = nn.Network([nn.Flatten(), nn.Linear(8, 3)], torch.Size([2, 4]))
    assert shaped.input_shape == (2, 4) and repr(nn.mlp(np.array([4, 2])).layers[0]) == repr(nn.Linear(4, 2))
