"""`LayerNorm` over the last dimension; `GroupNorm` and `BatchNorm`, for (channels,) or (channels, height, width)."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from bpkit.description import layers as description
from bpkit.description.flat import Shape
from bpkit.nn.layer import Context, Layer, Pass, Site


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
    takes = {"channels": 1, "eps": (0, math.inf)}

    def output_shape(self, shape: Shape) -> Shape:
        groups = getattr(self, "groups", 0)
        if not shape or shape[0] != self.channels or self.channels % (groups or 1) or math.prod(shape) == groups:
            raise ValueError(f"{self!r} takes samples of shape ({self.channels}, ...), in equal groups of more than "
                             "one value")  # fmt: skip
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
    takes = {**_ChannelNorm.takes, "groups": 1}

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
    Evaluation uses running statistics, and there dx = w dy / sqrt(variance + eps).

    Notes
    -----
    The rule for running statistics, of every plan and every cut of the batch: each microbatch of which any data rank
    has samples moves them once, by `momentum`, towards the mean of what the data ranks saw in it (mean and unbiased
    variance), weighted by their samples. So a rank without samples, or one that only serves, counts for nothing. A rank
    keeps its own summand, with `Context.share` as its weight, and the sum over the data ranks is what comes back. The
    weight half moves them, in its order. In an asynchronous run a worker's iterations are its microbatches.
    """

    momentum: float = 0.1
    takes = {**_ChannelNorm.takes, "momentum": (0, 1)}

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
    """By PyTorch's kernels, one a half, on (rows, channels, places).

    With `sum_over_data` they are given the statistics, and the input's gradient is the formula: two sums over the ranks
    forward and one backward. The sums that are the parameters' gradients belong to the input's, so the input half has
    them made.
    """

    def __init__(self, layer: BatchNorm, site: Site) -> None:
        self._layer, self._site = layer, site
        self._view = (*site.shape[:2], math.prod(site.shape[2:]))
        self._values = site.empty(1).fill_(self._view[0] * self._view[2])  # of a channel
        self._seen = tuple(site.empty(2, layer.channels).zero_())  # mean and unbiased variance of this microbatch

    def _means(self, *sums: Tensor) -> Sequence[Tensor]:
        """Sums over values as means over all data ranks' values, by one sum over the ranks, their number with it."""
        assert self._context.sum_over_data is not None
        total = self._context.sum_over_data(torch.cat([*sums, self._values]))
        self._count = total[-1]
        return (total[:-1] / self._count.clamp(min=1)).chunk(len(sums))

    def forward(self, x: Tensor, context: Context) -> Tensor:
        self._context, self._x = context, x.reshape(self._view)
        together = context.training and context.sum_over_data is not None
        given, (rows, _, places) = self._seen if context.training else self._site.buffers, self._view
        if together:
            (mean,) = self._means(self._x.sum((0, 2)))
            (variance,) = self._means((self._x - mean.view(-1, 1)).square_().sum((0, 2)))
            self._seen[0].copy_(mean)
            self._seen[1].copy_(variance * (self._count / (self._count - 1).clamp(min=1)))
            given = mean, variance
        # A GPU is not waited for.
        if context.training and (self._count.is_cpu and self._count == 1 if together else rows * places == 1):
            raise ValueError(f"layer {self._site.layer}, {self._layer!r}: expected more than 1 value per channel when "
                             "training, and this microbatch has one, from which nothing is learned: give more samples "
                             "to each rank and microbatch, or sync_batch_norm=True")  # fmt: skip
        local, (weight, bias) = context.training and not together, self._site.parameters
        self._given, self._training, eps = given, local, self._layer.eps
        if not rows:
            return x.clone()
        # The kernel moves what it is given by its momentum: with 1 it writes what it has seen.
        y, *self._saved = torch.native_batch_norm(self._x, weight, bias, *given, local, 1.0, eps)  # type: ignore
        return y.view(self._site.shape)

    def backward_input(self, dy: Tensor, need: bool = True) -> Tensor | None:
        dy, weight, rows = dy.reshape(self._view), self._site.parameters[0], self._view[0]
        together = self._context.training and not self._training
        if not rows:
            dx, *self._made = dy.clone(), torch.zeros_like(weight), torch.zeros_like(weight)
        else:
            given = dy, self._x, weight, *self._given, *self._saved, self._training, self._layer.eps
            dx, *self._made = torch.ops.aten.native_batch_norm_backward(*given, (need and not together, True, True))
        if not need:
            return None
        if together:
            scale = (self._given[1] + self._layer.eps).rsqrt_()
            along, mean = self._means(*self._made)
            n = (self._x - self._given[0].view(-1, 1)).mul_(scale.view(-1, 1))
            dx = (dy - mean.view(-1, 1)).sub_(n.mul_(along.view(-1, 1))).mul_((weight * scale).view(-1, 1))
        return dx.view(self._site.shape)

    def backward_weight(self, accumulate: bool = False) -> None:
        for own, made in zip(self._site.gradients, self._made, strict=True):
            own.add_(made) if accumulate else own.copy_(made)
        context, momentum = self._context, self._layer.momentum
        nowhere = not self._view[0] and context.share == 1.0  # no data rank has rows
        if context.training and not nowhere:  # here, as a forward may be computed again (RECOMPUTE)
            for own, seen in zip(self._site.buffers, self._seen, strict=True):
                own.mul_(1 - momentum).add_(seen, alpha=momentum * context.share)
