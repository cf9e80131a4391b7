"""Linear, LayerNorm and the activations, each with forward and both halves of backward written out.

Notation: x input, y output, dx and dy gradients of the loss with respect to them; W is (outputs, inputs) as
in ``torch.nn.Linear``; a sum over rows runs over all leading dimensions.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from bpkit.nn.costs import StageCost
from bpkit.nn.layer import Context, Elementwise, Layer, Pass, Shape, Site, put_sum


@dataclass(frozen=True)
class Linear(Layer):
    """y = x W^T + b over the last dimension; leading dimensions are free.

    Backward: dx = dy W (input half), dW = dy^T x and db = sum of dy over rows (weight half).
    """

    inputs: int
    outputs: int
    bias: bool = True

    def __post_init__(self) -> None:
        if self.inputs < 1 or self.outputs < 1:
            raise ValueError(f"Linear needs at least 1 input and 1 output, not {self.inputs}, {self.outputs}")

    def output_shape(self, shape: Shape) -> Shape:
        if not shape or shape[-1] != self.inputs:
            raise ValueError(f"{self!r} takes samples of shape ({_leading(shape)}{self.inputs},)")
        return (*shape[:-1], self.outputs)

    def parameter_shapes(self, shape: Shape) -> tuple[Shape, ...]:
        weight: Shape = (self.outputs, self.inputs)
        return (weight, (self.outputs,)) if self.bias else (weight,)

    def initial(self, shape: Shape, generator: torch.Generator) -> list[Tensor]:
        """Draw from U(-1/sqrt(inputs), 1/sqrt(inputs)), as ``torch.nn.Linear`` does."""
        bound = 1 / math.sqrt(self.inputs)
        return [torch.rand(s, generator=generator, dtype=torch.float64) * (2 * bound) - bound
                for s in self.parameter_shapes(shape)]  # fmt: skip

    def cost(self, shape: Shape) -> StageCost:
        """Count 2 x inputs x outputs for each product; the bias adds `outputs` to F and W."""
        rows = math.prod(shape[:-1])
        product, bias = 2 * rows * self.inputs * self.outputs, rows * self.outputs * self.bias
        size = self.outputs * (self.inputs + self.bias)
        return StageCost(product + bias, product, product + bias, rows * self.inputs, rows * self.outputs, size)

    def at(self, site: Site) -> Pass:
        return _LinearPass(self, site)

    def reference(self, x: Tensor, parameters: Sequence[Tensor], context: Context, site: Site) -> Tensor:
        return F.linear(x, *parameters)


class _LinearPass(Pass):
    """Products go straight into kept buffers; the transposed views are made once."""

    def __init__(self, layer: Linear, site: Site) -> None:
        lead = site.shape[:-1]
        self._rows, self._inputs, self._outputs = math.prod(lead), layer.inputs, layer.outputs
        self._flat = len(lead) == 1
        self._weight, self._dweight = site.parameters[0], site.gradients[0]
        self._weight_t = self._weight.t()
        self._bias = site.parameters[1] if layer.bias else None
        self._dbias = site.gradients[1] if layer.bias else None
        self._y, self._dx = site.empty(*lead, layer.outputs), site.empty()
        self._y2 = self._y.view(self._rows, layer.outputs)
        self._dx2 = self._dx.view(self._rows, layer.inputs)
        self._x = self._dy = self._y2

    def forward(self, x: Tensor, context: Context) -> Tensor:
        self._x = x if self._flat else x.reshape(self._rows, self._inputs)
        if self._bias is None:
            torch.mm(self._x, self._weight_t, out=self._y2)
        else:
            torch.addmm(self._bias, self._x, self._weight_t, out=self._y2)
        return self._y

    def backward_input(self, dy: Tensor, need: bool = True) -> Tensor | None:
        self._dy = dy if self._flat else dy.reshape(self._rows, self._outputs)
        if not need:
            return None
        torch.mm(self._dy, self._weight, out=self._dx2)
        return self._dx

    def backward_weight(self, accumulate: bool = False) -> None:
        if accumulate:
            self._dweight.addmm_(self._dy.t(), self._x)
        else:
            torch.mm(self._dy.t(), self._x, out=self._dweight)
        if self._dbias is not None:
            put_sum(self._dbias, self._dy, 0, accumulate)


@dataclass(frozen=True)
class LayerNorm(Layer):
    """y = w n + b, n = (x - mean) / sqrt(variance + eps), over the last dimension (Ba et al., 1607.06450).

    Backward: with g = w dy, dx = (g - mean(g) - n mean(g n)) / sqrt(variance + eps); dw = sum of dy n, db =
    sum of dy, both over rows.
    """

    features: int
    eps: float = 1e-5
    shared: bool = False  # on a tensor rank that has some of the tokens: its gradient is a share

    def partial(self, shape: Shape) -> tuple[bool, ...]:
        return (self.shared, self.shared)

    def output_shape(self, shape: Shape) -> Shape:
        if not shape or shape[-1] != self.features:
            raise ValueError(f"{self!r} takes samples of shape ({_leading(shape)}{self.features},)")
        return shape

    def parameter_shapes(self, shape: Shape) -> tuple[Shape, ...]:
        return ((self.features,), (self.features,))

    def initial(self, shape: Shape, generator: torch.Generator) -> list[Tensor]:
        return [torch.ones(self.features, dtype=torch.float64), torch.zeros(self.features, dtype=torch.float64)]

    def cost(self, shape: Shape) -> StageCost:
        """Count 8 FLOPs an element for F and for I (two means and three elementwise steps each), 3 for W."""
        size = math.prod(shape)
        return StageCost(8 * size, 8 * size, 3 * size, size, size, 2 * self.features)

    def at(self, site: Site) -> Pass:
        return _LayerNormPass(self, site)

    def reference(self, x: Tensor, parameters: Sequence[Tensor], context: Context, site: Site) -> Tensor:
        weight, bias = parameters
        return F.layer_norm(x, (self.features,), weight, bias, self.eps)


class _LayerNormPass(Pass):
    def __init__(self, layer: LayerNorm, site: Site) -> None:
        self._eps, self._features, self._rows = layer.eps, layer.features, math.prod(site.shape[:-1])
        self._weight, self._bias = site.parameters
        self._dweight, self._dbias = site.gradients
        self._n, self._y, self._dx = site.empty(), site.empty(), site.empty()
        self._scale = self._dy = self._y  # 1 / sqrt(variance + eps), and the gradient from above

    def forward(self, x: Tensor, context: Context) -> Tensor:
        torch.sub(x, x.mean(-1, keepdim=True), out=self._n)
        self._scale = self._n.square().mean(-1, keepdim=True).add_(self._eps).rsqrt_()
        self._n.mul_(self._scale)
        return torch.addcmul(self._bias, self._n, self._weight, out=self._y)

    def backward_input(self, dy: Tensor, need: bool = True) -> Tensor | None:
        self._dy = dy
        if not need:
            return None
        g = torch.mul(dy, self._weight, out=self._dx)
        along_n = (g * self._n).mean(-1, keepdim=True)
        return g.sub_(g.mean(-1, keepdim=True)).addcmul_(self._n, along_n, value=-1).mul_(self._scale)

    def backward_weight(self, accumulate: bool = False) -> None:
        n = self._n.view(self._rows, self._features)
        dy = self._dy.reshape(n.shape)
        put_sum(self._dweight, dy * n, 0, accumulate)
        put_sum(self._dbias, dy, 0, accumulate)


class _ActivationPass(Pass):
    """Buffers of an elementwise layer: the neighbour's memory where nobody else reads it, else its own."""

    def __init__(self, layer: Layer, site: Site) -> None:
        self._y = None if site.reuse_input else site.empty()
        self._dx = None if site.reuse_gradient else site.empty()
        self._kept = self._y


class _ReLUPass(_ActivationPass):
    def forward(self, x: Tensor, context: Context) -> Tensor:
        y = torch.relu_(x) if self._y is None else torch.clamp_min(x, 0, out=self._y)
        self._kept = y
        return y

    def backward_input(self, dy: Tensor, need: bool = True) -> Tensor | None:
        dx = dy if self._dx is None else self._dx
        # dy where y > 0, else 0: one pass over memory, where `dy * (y > 0)` takes two.
        return torch.ops.aten.threshold_backward.grad_input(dy, self._kept, 0, grad_input=dx)


class _TanhPass(_ActivationPass):
    def forward(self, x: Tensor, context: Context) -> Tensor:
        self._kept = torch.tanh(x, out=x if self._y is None else self._y)
        return self._kept

    def backward_input(self, dy: Tensor, need: bool = True) -> Tensor | None:
        assert self._kept is not None
        slope = torch.mul(self._kept, self._kept).neg_().add_(1)
        return torch.mul(dy, slope, out=dy if self._dx is None else self._dx)


class _SigmoidPass(_ActivationPass):
    def forward(self, x: Tensor, context: Context) -> Tensor:
        self._kept = torch.sigmoid(x, out=x if self._y is None else self._y)
        return self._kept

    def backward_input(self, dy: Tensor, need: bool = True) -> Tensor | None:
        assert self._kept is not None
        slope = torch.mul(self._kept, self._kept).neg_().add_(self._kept)
        return torch.mul(dy, slope, out=dy if self._dx is None else self._dx)


class _GELUPass(Pass):
    def __init__(self, layer: Layer, site: Site) -> None:
        self._y, self._cdf = site.empty(), site.empty()
        self._dx = None if site.reuse_gradient else site.empty()
        self._x = self._y

    def forward(self, x: Tensor, context: Context) -> Tensor:
        self._x = x
        torch.mul(x, math.sqrt(0.5), out=self._cdf).erf_().add_(1).mul_(0.5)
        return torch.mul(x, self._cdf, out=self._y)

    def backward_input(self, dy: Tensor, need: bool = True) -> Tensor | None:
        density = torch.mul(self._x, self._x).mul_(-0.5).exp_().mul_(1 / math.sqrt(2 * math.pi))
        slope = torch.addcmul(self._cdf, self._x, density, out=density)
        return torch.mul(dy, slope, out=dy if self._dx is None else self._dx)


@dataclass(frozen=True)
class ReLU(Elementwise):
    """y = max(x, 0); dx = dy where y > 0, else 0."""

    keeps_output = True

    def at(self, site: Site) -> Pass:
        return _ReLUPass(self, site)

    def reference(self, x: Tensor, parameters: Sequence[Tensor], context: Context, site: Site) -> Tensor:
        return torch.relu(x)


@dataclass(frozen=True)
class Tanh(Elementwise):
    """y = tanh(x); dx = dy (1 - y^2). Counted as 4 FLOPs an element."""

    keeps_output = True
    flops = 4

    def at(self, site: Site) -> Pass:
        return _TanhPass(self, site)

    def reference(self, x: Tensor, parameters: Sequence[Tensor], context: Context, site: Site) -> Tensor:
        return torch.tanh(x)


@dataclass(frozen=True)
class Sigmoid(Elementwise):
    """y = 1 / (1 + exp(-x)); dx = dy (y - y^2). Counted as 4 FLOPs an element."""

    keeps_output = True
    flops = 4

    def at(self, site: Site) -> Pass:
        return _SigmoidPass(self, site)

    def reference(self, x: Tensor, parameters: Sequence[Tensor], context: Context, site: Site) -> Tensor:
        return torch.sigmoid(x)


@dataclass(frozen=True)
class GELU(Elementwise):
    """y = x P(x), P the normal distribution function, by erf (Hendrycks and Gimpel 2016, arXiv:1606.08415).

    dx = dy (P(x) + x p(x)) with p the normal density. Counted as 8 FLOPs an element.
    """

    flops = 8

    def at(self, site: Site) -> Pass:
        return _GELUPass(self, site)

    def reference(self, x: Tensor, parameters: Sequence[Tensor], context: Context, site: Site) -> Tensor:
        return F.gelu(x)


def _leading(shape: Shape) -> str:
    """Write the leading dimensions of a sample for a message."""
    return "".join(f"{n}, " for n in shape[:-1])
