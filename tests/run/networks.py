"""Networks that hold every layer type, in float64, with a batch that suits them."""

from __future__ import annotations

import torch
from torch import Tensor

import bpkit as bp
from bpkit.nn import GELU, MSE, Dropout, LayerNorm, Linear, Network, ReLU, Residual, Sequential, Sigmoid, Tanh

SAMPLES = 11


def every_layer() -> Network:
    """One of each layer, dropout at 0.1 included."""
    layers = [
        Linear(6, 8),
        GELU(),
        Residual(LayerNorm(8), Linear(8, 8), Tanh(), Dropout(0.1)),
        Sequential(Linear(8, 7, bias=False), Sigmoid()),
        LayerNorm(7),
        Dropout(0.1),
        Linear(7, 9),
        ReLU(),
        Linear(9, 4),
    ]
    return Network(layers, 6, seed=3, dtype=torch.float64)


def regression() -> Network:
    """The same kinds under the mean squared error, whose terms are elements."""
    return bp.nn.mlp([6, 8, 8, 3], seed=4, dtype=torch.float64, activation="tanh", loss=MSE(), dropout=0.1)


def batch(network: Network) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(7)
    inputs = torch.randn(SAMPLES, 6, generator=generator, dtype=torch.float64)
    if isinstance(network.loss, MSE):
        return inputs, torch.randn(SAMPLES, 3, generator=generator, dtype=torch.float64)
    return inputs, torch.randint(0, 4, (SAMPLES,), generator=generator)
