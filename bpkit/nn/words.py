"""What a network says of inputs that do not fit it."""

import torch
from torch import Tensor

from bpkit.description.flat import Shape


def check_form(x: Tensor, shape: Shape, dtype: torch.dtype, device: torch.device) -> None:
    """Refuse inputs whose samples are not of `shape` and `dtype`, on `device` (ValueError, TypeError)."""
    if tuple(x.shape[1:]) != shape or x.ndim == 0:
        raise ValueError(f"the network takes inputs of shape {('rows', *shape)}, not {tuple(x.shape)}")
    if x.dtype is not dtype:
        raise TypeError(f"the network takes inputs of {dtype} and got inputs of {x.dtype}")
    if x.device.type != device.type:
        raise ValueError(f"the network is on {device} and got inputs on {x.device}")
