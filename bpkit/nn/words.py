"""What a network says: its title, and why inputs do not fit it."""

from collections.abc import Sequence

import torch
from torch import Tensor

from bpkit.nn.layer import Layer, Shape
from bpkit.nn.layers.dropout import Dropout
from bpkit.nn.layers.linear import GELU, Linear, ReLU, Sigmoid, Tanh


def check_form(x: Tensor, shape: Shape, dtype: torch.dtype, device: torch.device) -> None:
    """Refuse inputs whose samples are not of `shape` and `dtype`, on `device` (ValueError, TypeError)."""
    if tuple(x.shape[1:]) != shape or x.ndim == 0:
        raise ValueError(f"the network takes inputs of shape {('rows', *shape)}, not {tuple(x.shape)}")
    if x.dtype is not dtype:
        raise TypeError(f"the network takes inputs of {dtype} and got inputs of {x.dtype}")
    if x.device.type != device.type:
        raise ValueError(f"the network is on {device} and got inputs on {x.device}")


def title(layers: Sequence[Layer], input_shape: Shape) -> str:
    """Return ``mlp 64-512-10`` for a multilayer perceptron, else the number of layers."""
    small = (Linear, ReLU, Tanh, Sigmoid, GELU, Dropout)
    if all(isinstance(layer, small) for layer in layers) and len(input_shape) == 1:
        sizes = [input_shape[0], *(layer.outputs for layer in layers if isinstance(layer, Linear))]
        return f"mlp {'-'.join(map(str, sizes))}"
    return f"network of {len(layers)} layers"
