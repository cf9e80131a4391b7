"""Networks of a standard form."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch

from bpkit.nn.dropout import Dropout
from bpkit.nn.layer import Layer
from bpkit.nn.layers import GELU, Linear, ReLU, Sigmoid, Tanh
from bpkit.nn.losses import Loss
from bpkit.nn.network import Network


def mlp(
    sizes: Sequence[int],
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    activation: str = "relu",
    loss: str | Loss = "cross_entropy",
    dropout: float = 0.0,
) -> Network:
    """Return a multilayer perceptron: linear layers with an activation between them.

    Parameters
    ----------
    sizes : sequence of int
        Widths from the input to the output, at least two.
    seed, dtype, loss
        As in `Network`.
    activation : "relu", "tanh", "sigmoid" or "gelu"
    dropout : float
        Probability of dropping an activation, after each activation; 0 adds no layer.

    Raises
    ------
    ValueError
        For fewer than two sizes or an unknown activation.
    """
    known: dict[str, type[Layer]] = {"relu": ReLU, "tanh": Tanh, "sigmoid": Sigmoid, "gelu": GELU}
    if activation not in known:
        raise ValueError(f"unknown activation {activation!r}: choose from {', '.join(known)}")
    if len(sizes) < 2:
        raise ValueError(f"an mlp needs the sizes of its input and its output, not {list(sizes)}")
    layers: list[Layer] = []
    for i, (inputs, outputs) in enumerate(pairwise(sizes)):
        if i:
            layers += [known[activation](), *([Dropout(dropout)] if dropout else [])]
        layers.append(Linear(inputs, outputs))
    return Network(layers, sizes[0], loss=loss, seed=seed, dtype=dtype)
