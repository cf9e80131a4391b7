"""`LayerNorm` over the last dimension; `GroupNorm` and `BatchNorm`, for (channels,) or (channels, height, width)."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from bpkit.description import layers as description
from bpkit.description.flat import Shape
from bpkit.nn.layer import Context, Layer, Pass, Site, put_sum


class _Norm(description.Norm, Layer):
    """What has a weight, at first 1, and a bias, at first 0, of one size."""

    eps: float

    def initial(self, shape: Shape, generator: torch.Generator) -> list[Tensor]:
        (size, *_), _ = self.parameter_shapes(shape)
        return [torch.ones(size, dtype=torch.float64), torch.zeros(size, dtype=torch.float64)]


class LayerNorm(description.LayerNorm, _Norm):
    """y = w n + b, n = (x - mean) / sqrt(variance + eps), over the last dimension (Ba et al., 1607.06450).

    Backward: with g = w dy, dx = (g - mean(g) - n mean(g n)) / sqrt(variance + eps); dw = sum of dy n, db =
    sum of dy, both over rows.
    """

    def at(self, site: Site) -> Pass:
        return _LayerNormPass(self, site)

    def reference(self, x: Tensor, parameters: Sequence[Tensor], context: Context, site: Site) -> Tensor:
        weight, bias = parameters
        return F.layer_norm(x, (self.features,), weight, bias, self.eps)


class _LayerNormPass(Pass):
    """By PyTorch's kernels, which take fewer passes over memory than the formulas; each half asks for its own part."""

    def __init__(self, layer: _Norm, site: Site) -> None:
        self._layer, self._site = layer, site
        self._x = self._dy = self._mean = self._scale = site.empty(0)

    def forward(self, x: Tensor, context: Context) -> Tensor:
        self._x, (weight, bias) = x, self._site.parameters
        y, self._mean, self._scale = torch.native_layer_norm(x, weight.shape, weight, bias, self._layer.eps)
        return y

    def _backward(self, *parts: bool) -> Sequence[Tensor]:
        weight, bias = self._site.parameters
        kept = self._mean, self._scale, weight, bias
        return torch.ops.aten.native_layer_norm_backward(self._dy, self._x, weight.shape, *kept, parts)

    def backward_input(self, dy: Tensor, need: bool = True) -> Tensor | None:
        self._dy = dy
        return self._backward(True, False, False)[0] if need else None

    def backward_weight(self, accumulate: bool = False) -> None:
        for own, made in zip(self._site.gradients, self._backward(False, True, True)[1:], strict=True):
            own.add_(made) if accumulate else own.copy_(made)


@dataclass(frozen=True)
class _ChannelNorm(_Norm):
    """What has a weight and a bias for each channel."""

    channels: int
    eps: float = field(default=1e-5, kw_only=True)

    def output_shape(self, shape: Shape) -> Shape:
        if not shape or shape[0] != self.channels or self.channels % getattr(self, "groups", 1):
            raise ValueError(f"{self!r} takes samples of shape ({self.channels}, ...), in equal groups")
        return shape

    def parameter_shapes(self, shape: Shape) -> tuple[Shape, ...]:
        return ((self.channels,), (self.channels,))


@dataclass(frozen=True)
class GroupNorm(_ChannelNorm):
    """y = w n + b, n = (x - mean) / sqrt(variance + eps), the statistics of each sample's groups of channels with all
    their places (Wu and He 2018, arXiv:1803.08494); w and b by channel. One group is layer norm for images.

    Backward: with g = w dy, dx = (g - mean(g) - n mean(g n)) / sqrt(variance + eps); dw = sum of dy n, db = sum
    of dy, over rows and places.
    """

    groups: int = 1

    def at(self, site: Site) -> Pass:
        return _GroupNormPass(self, site)

    def reference(self, x: Tensor, parameters: Sequence[Tensor], context: Context, site: Site) -> Tensor:
        return F.group_norm(x, self.groups, parameters[0], parameters[1], self.eps)


@dataclass(frozen=True)
class BatchNorm(_ChannelNorm):
    """y = w n + b, n = (x - mean) / sqrt(variance + eps), the statistics of each channel over all rows and places of
    the microbatch (Ioffe and Szegedy 2015, arXiv:1502.03167), or, where the context has `sum_over_data`, of all data
    ranks' rows of this microbatch, weighted by their numbers (a rank may have none).

    Backward as in `GroupNorm`, with means over the same rows; a bias in front of it has no gradient in theory.
    The weight half also moves the running mean and (unbiased) variance by `momentum`; evaluation uses these, and there
    dx = w dy / sqrt(variance + eps).
    """

    momentum: float = 0.1

    def buffer_shapes(self, shape: Shape) -> tuple[Shape, ...]:
        return ((self.channels,), (self.channels,))

    def buffers(self, shape: Shape) -> list[Tensor]:
        """Return running mean and running variance."""
        return self.initial(shape, torch.Generator())[::-1]

    def least_rows(self, shape: Shape) -> int:
        """Return 2 where a sample has one value a channel."""
        return 2 if math.prod(shape[1:]) == 1 else 1

    def at(self, site: Site) -> Pass:
        return _BatchNormPass(self, site)

    def reference(self, x: Tensor, parameters: Sequence[Tensor], context: Context, site: Site) -> Tensor:
        """Over this rank's rows, without `sum_over_data`."""
        mean, variance = (b.clone() for b in site.buffers)
        return F.batch_norm(x, mean, variance, parameters[0], parameters[1], context.training, 0.0, self.eps)


class _GroupNormPass(_LayerNormPass):
    def __init__(self, layer: GroupNorm, site: Site) -> None:
        super().__init__(layer, site)
        rows, channels, *places = site.shape
        self._sizes = rows, channels, math.prod(places), layer.groups

    def forward(self, x: Tensor, context: Context) -> Tensor:
        self._x, (weight, bias) = x.contiguous(), self._site.parameters
        y, self._mean, self._scale = torch.native_group_norm(self._x, weight, bias, *self._sizes, self._layer.eps)
        return y

    def _backward(self, *parts: bool) -> Sequence[Tensor]:
        given = self._dy.contiguous(), self._x, self._mean, self._scale, self._site.parameters[0]
        return torch.ops.aten.native_group_norm_backward(*given, *self._sizes, parts)


class _BatchNormPass(Pass):
    """Works on (rows, channels, places)."""

    def __init__(self, layer: BatchNorm, site: Site) -> None:
        self._layer, self._site = layer, site
        self._view = (*site.shape[:2], math.prod(site.shape[2:]))
        self._weight, self._bias = (p.view(-1, 1) for p in site.parameters)
        self._n, self._y = site.empty(*self._view), site.empty(*self._view)
        self._dy = self._scale = self._y  # the gradient from above, and 1 / sqrt(variance + eps)

    def _means(self, *values: Tensor) -> Sequence[Tensor]:
        """One sum over the data ranks, the number of rows with it."""
        count = values[0].new_full((1,), self._view[0] * self._view[2])
        sums = torch.cat([*(v.sum((0, 2)) for v in values), count])
        if self._context.sum_over_data is not None:
            sums = self._context.sum_over_data(sums)
            self._refuse_one(int(sums[-1]) if sums.is_cpu else 0)  # a GPU is not waited for
        self._count = sums[-1]
        means = sums[:-1] / self._count.clamp(min=1)
        return means.view(len(values), 1, -1, 1).unbind(0)

    def _refuse_one(self, values: int) -> None:
        if values == 1:
            raise ValueError(f"layer {self._site.layer}, {self._layer!r}: expected more than 1 value per channel when "
                             "training, and this microbatch has one, from which nothing is learned: give more samples "
                             "to each rank and microbatch, or sync_batch_norm=True")  # fmt: skip

    def forward(self, x: Tensor, context: Context) -> Tensor:
        self._context, x = context, x.reshape(self._view)
        if context.training and context.sum_over_data is None:
            self._refuse_one(self._view[0] * self._view[2])
        mean, variance = (b.view(1, -1, 1) for b in self._site.buffers)
        if context.training:
            (mean,) = self._means(x)
        torch.sub(x, mean, out=self._n)
        if context.training:
            (variance,) = self._means(self._n.square())
        self._mean, self._variance, self._scale = mean, variance, (variance + self._layer.eps).rsqrt_()
        self._n.mul_(self._scale)
        return torch.addcmul(self._bias, self._n, self._weight, out=self._y).view(self._site.shape)

    def backward_input(self, dy: Tensor, need: bool = True) -> Tensor | None:
        self._dy = dy.reshape(self._view)
        if not need:
            return None
        g = self._dy * self._weight
        if self._context.training:
            mean, along_n = self._means(g, g * self._n)
            g.sub_(mean).addcmul_(self._n, along_n, value=-1)
        return g.mul_(self._scale).view(self._site.shape)

    def backward_weight(self, accumulate: bool = False) -> None:
        for own, made in zip(self._site.gradients, (self._dy * self._n, self._dy), strict=True):
            put_sum(own, made, (0, 2), accumulate)
        if self._context.training:  # here, as a forward may be computed again (RECOMPUTE)
            unbiased = self._variance * (self._count / (self._count - 1).clamp(min=1))
            weight = self._layer.momentum * self._count.clamp(max=1)  # 0 without rows; a GPU is not waited for
            for own, seen in zip(self._site.buffers, (self._mean, unbiased), strict=True):
                own.lerp_(seen.view(-1), weight)
