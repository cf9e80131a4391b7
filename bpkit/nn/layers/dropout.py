"""Dropout whose mask is a function of coordinates, so that no cut of the batch and no device changes it.

The mask is counter-based, as in Salmon et al., "Parallel random numbers: as easy as 1, 2, 3" (SC 2011):
no state moves along; each element's number is a hash of where it stands. The hash is `lowbias32` by Chris
Wellons ("Prospecting for Hash Functions", nullprogram.com, 2018), computed in int64 with masks, which gives
the same bits on the CPU and on a GPU.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from bpkit.description import layers as description
from bpkit.description.flat import Shape
from bpkit.nn.layer import Context, Elementwise, Layer, Pass, Site

_LOW = 0xFFFFFFFF
_M1 = 0x7FEB352D
_M2 = 0x846CA68B - (1 << 32)  # the same factor modulo 2^32; negative, so that no product overflows int64


def mix(value: int) -> int:
    """Return `lowbias32` of a Python integer's low 32 bits."""
    value &= _LOW
    value = ((value ^ (value >> 16)) * _M1) & _LOW
    value = ((value ^ (value >> 15)) * _M2) & _LOW
    return value ^ (value >> 16)


def mix_(values: Tensor) -> Tensor:
    """Apply `lowbias32` in place to int64 values between 0 and 2^32 - 1."""
    values.bitwise_xor_(values >> 16).mul_(_M1).bitwise_and_(_LOW)
    values.bitwise_xor_(values >> 15).mul_(_M2).bitwise_and_(_LOW)
    return values.bitwise_xor_(values >> 16)


def key(*coordinates: int) -> int:
    """Hash integers (each taken modulo 2^64) into 32 bits; the order of the coordinates matters."""
    result = 0x9E3779B9  # 2^32 / golden ratio: any start but 0, which `mix` maps to itself
    for c in coordinates:
        result = mix(mix(result ^ (c & _LOW)) + ((c >> 32) & _LOW))
    return result


def dropout_mask(p: float, shape: Shape, *, seed: int, step: int, layer: int, first: int = 0, start: int = 0,
                 dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu") -> Tensor:  # fmt: skip
    """Return the mask of a batch: 0 with probability `p`, else 1 / (1 - p).

    Parameters
    ----------
    p : float
        Probability of dropping an element, 0 <= p < 1.
    shape : tuple of int
        Shape of the batch, rows first. Row r is sample ``first + r`` of the step's global batch.
    seed, step, layer, first : int
        The coordinates: the network's seed, the training step, the layer's index, the first sample.
    start : int
        Number of the first feature, of a sample counted in one row; of a tensor rank's own tokens.
    dtype, device
        Of the result.
    """
    features = math.prod(shape[1:])
    origin = key(seed, step, layer)
    rows = mix_(torch.arange(first, first + shape[0], device=device).bitwise_xor_(origin).bitwise_and_(_LOW))
    places = torch.arange(start, start + features, device=device)
    columns = mix_(places.add_(key(origin, 1)).bitwise_and_(_LOW))
    numbers = mix_((rows[:, None] + columns[None, :]).bitwise_and_(_LOW))
    keep = numbers >= round(p * 2**32)
    return keep.to(dtype).mul_(1 / (1 - p)).view(shape)


class Dropout(description.Dropout, Elementwise):
    """y = mask x in training, y = x otherwise (Srivastava et al. 2014, JMLR 15, with inverted scaling).

    dx = mask dy. The mask is `dropout_mask` at the network's seed, the context's step and first sample, and
    the layer's index among all layers; with `start`, from that feature on.
    """

    keeps_output = True  # outside training the output is the input
    fresh_gradient = False

    def at(self, site: Site) -> Pass:
        return _DropoutPass(self, site)

    def reference(self, x: Tensor, parameters: Sequence[Tensor], context: Context, site: Site) -> Tensor:
        return x * _mask(self, site, context) if context.training and self.p else x


def _mask(layer: Dropout, site: Site, context: Context) -> Tensor:
    """Return the mask at a site and a context."""
    return dropout_mask(layer.p, site.shape, seed=site.seed, step=context.step, layer=site.layer,
                        first=context.first, start=layer.start, dtype=site.dtype, device=site.device)  # fmt: skip


class _DropoutPass(Pass):
    def __init__(self, layer: Layer, site: Site) -> None:
        assert isinstance(layer, Dropout)
        self._layer, self._site = layer, site
        self._mask: Tensor | None = None
        self._y, self._dx = site.empty(), site.empty()

    def forward(self, x: Tensor, context: Context) -> Tensor:
        self._mask = _mask(self._layer, self._site, context) if context.training and self._layer.p else None
        return x if self._mask is None else torch.mul(x, self._mask, out=self._y)

    def backward_input(self, dy: Tensor, need: bool = True) -> Tensor | None:
        return dy if self._mask is None else torch.mul(dy, self._mask, out=self._dx)
