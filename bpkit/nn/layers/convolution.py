"""Layers for images, samples of shape (channels, height, width): convolution, pooling, and changes of shape."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from bpkit.description.costs import StageCost
from bpkit.description.flat import Shape
from bpkit.nn.layer import Context, Layer, Pass, Site
from bpkit.nn.layers.linear import uniform


@dataclass(frozen=True)
class Conv2d(Layer):
    """y[o, r, c] = b[o] + sum over i, u, v of W[o, i, u, v] x[i, stride r + u - padding, stride c + v - padding].

    Backward: the input half spreads dy[o, r, c] W[o, i, u, v] over the places that it was read from; the weight half is
    dW[o, i, u, v] = sum over rows, r, c of dy[o, r, c] x[i, stride r + u - padding, ...], db = sum of dy. Each half is
    one call of PyTorch's kernel (Goodfellow et al. 2016, "Deep Learning", 9.5).

    Parameters
    ----------
    inputs, outputs : int
        Channels.
    kernel, stride, padding : int
        The same for both dimensions.
    bias : bool
    """

    inputs: int
    outputs: int
    kernel: int = 3
    stride: int = 1
    padding: int = 0
    bias: bool = True
    takes = {"inputs": 1, "outputs": 1, "kernel": 1, "stride": 1, "padding": 0}

    def output_shape(self, shape: Shape) -> Shape:
        if len(shape) != 3 or shape[0] != self.inputs or min(shape[1:]) + 2 * self.padding < self.kernel:
            raise ValueError(f"{self!r} takes samples of shape ({self.inputs}, height, width), as large as its kernel")
        return (self.outputs, *((n + 2 * self.padding - self.kernel) // self.stride + 1 for n in shape[1:]))

    def parameter_shapes(self, shape: Shape) -> tuple[Shape, ...]:
        weight: Shape = (self.outputs, self.inputs, self.kernel, self.kernel)
        return (weight, (self.outputs,)) if self.bias else (weight,)

    def initial(self, shape: Shape, generator: torch.Generator) -> list[Tensor]:
        """Draw from U(-1/sqrt(n), 1/sqrt(n)), n = inputs x kernel^2, as ``torch.nn.Conv2d`` does."""
        return uniform(self.parameter_shapes(shape), self.inputs * self.kernel**2, generator)

    def cost(self, shape: Shape) -> StageCost:
        """Count 2 x inputs x kernel^2 for each output element and each of F, I, W (padding too); the bias 1 in F, W."""
        outputs = math.prod(self.output_shape(shape))
        weights = self.inputs * self.kernel**2
        product, bias = 2 * weights * outputs, outputs * self.bias
        size = self.outputs * (weights + self.bias)
        return StageCost(product + bias, product, product + bias, math.prod(shape), outputs, size)

    def at(self, site: Site) -> Pass:
        return _ConvPass(self, site)

    def reference(self, x: Tensor, parameters: Sequence[Tensor], context: Context, site: Site) -> Tensor:
        return F.conv2d(x, parameters[0], parameters[1] if self.bias else None, self.stride, self.padding)


class _ConvPass(Pass):
    def __init__(self, layer: Conv2d, site: Site) -> None:
        self._layer, self._site = layer, site
        self._x = self._dy = torch.empty(0)

    def forward(self, x: Tensor, context: Context) -> Tensor:
        self._x = x
        return self._layer.reference(x, self._site.parameters, context, self._site)

    def backward_input(self, dy: Tensor, need: bool = True) -> Tensor | None:
        self._dy = dy
        return self._backward(True, False, False)[0] if need else None

    def backward_weight(self, accumulate: bool = False) -> None:
        for own, made in zip(self._site.gradients, self._backward(False, True, self._layer.bias)[1:], strict=False):
            own.add_(made) if accumulate else own.copy_(made)

    def _backward(self, *wanted: bool) -> Sequence[Tensor]:
        """The gradients of input, weight and bias that are wanted."""
        stride, padding = [self._layer.stride] * 2, [self._layer.padding] * 2
        if not len(self._x):
            return self._x, *(torch.zeros_like(p) for p in self._site.parameters)
        biases, weight = [self._layer.outputs], self._site.parameters[0]
        return torch.ops.aten.convolution_backward(self._dy, self._x, weight, biases, stride, padding, [1, 1], False,
                                                   [0, 0], 1, wanted)  # fmt: skip


@dataclass(frozen=True)
class AveragePool2d(Layer):
    """The mean of each square of size x size places, side by side; dx = dy / size^2 on all of them."""

    size: int = 2
    takes = {"size": 1}

    def output_shape(self, shape: Shape) -> Shape:
        if len(shape) != 3 or shape[1] % self.size or shape[2] % self.size:
            raise ValueError(f"{self!r} takes samples (channels, height, width) of multiples of {self.size}")
        return (shape[0], shape[1] // self.size, shape[2] // self.size)

    def cost(self, shape: Shape) -> StageCost:
        """Count one FLOP for each input element, forward and backward."""
        size = math.prod(shape)
        return StageCost(size, size, 0, size, math.prod(self.output_shape(shape)), 0)

    def at(self, site: Site) -> Pass:
        return _AveragePass(self.size, site)

    def reference(self, x: Tensor, parameters: Sequence[Tensor], context: Context, site: Site) -> Tensor:
        return F.avg_pool2d(x, self.size)


@dataclass(frozen=True)
class MaxPool2d(AveragePool2d):
    """The largest of each square of size x size places, side by side; dx = dy at its place (the first), else 0."""

    def at(self, site: Site) -> Pass:
        return _MaxPass(self.size, site)

    def reference(self, x: Tensor, parameters: Sequence[Tensor], context: Context, site: Site) -> Tensor:
        return F.max_pool2d(x, self.size)


class _AveragePass(Pass):
    def __init__(self, size: int, site: Site) -> None:
        rows, channels, height, width = site.shape
        self._squares = (rows, channels, height // size, size, width // size, size)
        self._size, self._dx, self._where = size, site.empty(), torch.empty(0)

    def forward(self, x: Tensor, context: Context) -> Tensor:
        return x.reshape(self._squares).mean((3, 5))

    def backward_input(self, dy: Tensor, need: bool = True) -> Tensor | None:
        self._dx.view(self._squares).copy_((dy / self._size**2)[:, :, :, None, :, None])
        return self._dx


class _MaxPass(_AveragePass):
    def forward(self, x: Tensor, context: Context) -> Tensor:
        # On the CPU PyTorch's kernel is up to three times as fast, copies included, where channels lie side by side.
        laid = x.contiguous(memory_format=torch.channels_last) if x.is_cpu else x
        y, where = torch.ops.aten.max_pool2d_with_indices(laid, [self._size] * 2)
        self._x, self._where = x, where.contiguous()
        return y.contiguous()

    def backward_input(self, dy: Tensor, need: bool = True) -> Tensor | None:
        square = [self._size] * 2
        put = torch.ops.aten.max_pool2d_with_indices_backward.grad_input
        put(dy, self._x, square, square, [0, 0], [1, 1], False, self._where, grad_input=self._dx)
        return self._dx


@dataclass(frozen=True)
class Reshape(Layer):
    """The same numbers as samples of another shape; so is the gradient."""

    shape: tuple[int, ...]
    keeps_output = True
    fresh_gradient = False

    def output_shape(self, shape: Shape) -> Shape:
        if math.prod(shape) != math.prod(self.shape) or min(self.shape, default=1) < 1:
            raise ValueError(f"{self!r} takes samples of {math.prod(self.shape)} numbers")
        return self.shape

    def cost(self, shape: Shape) -> StageCost:
        """Count nothing."""
        return StageCost(0, 0, 0, math.prod(shape), math.prod(shape), 0)

    def at(self, site: Site) -> Pass:
        return _ReshapePass(site.shape, (site.shape[0], *self.output_shape(site.shape[1:])))

    def reference(self, x: Tensor, parameters: Sequence[Tensor], context: Context, site: Site) -> Tensor:
        return x.reshape(len(x), *self.output_shape(tuple(x.shape[1:])))


@dataclass(frozen=True)
class Flatten(Reshape):
    """Samples of any shape as vectors."""

    shape: tuple[int, ...] = ()

    def output_shape(self, shape: Shape) -> Shape:
        return (math.prod(shape),)


@dataclass
class _ReshapePass(Pass):
    before: Shape
    after: Shape

    def forward(self, x: Tensor, context: Context) -> Tensor:
        return x.reshape(self.after)

    def backward_input(self, dy: Tensor, need: bool = True) -> Tensor | None:
        return dy.reshape(self.before)
