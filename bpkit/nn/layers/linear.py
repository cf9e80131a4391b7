"""Linear and the activations, each with forward and both halves of backward written out.

Notation: x input, y output, dx and dy gradients of the loss with respect to them; W is (outputs, inputs) as
in ``torch.nn.Linear``; a sum over rows runs over all leading dimensions.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from bpkit.description import layers as description
from bpkit.description.flat import Shape
from bpkit.nn.layer import Context, Elementwise, Layer, Pass, Site, put_sum

#: One kernel does in one pass over memory what a formula, written with torch's operators, does in several.
_ATEN = torch.ops.aten


class Linear(description.Linear, Layer):
    """y = x W^T + b over the last dimension; leading dimensions are free.

    Backward: dx = dy W (input half), dW = dy^T x and db = sum of dy over rows (weight half).
    """

    def initial(self, shape: Shape, generator: torch.Generator) -> list[Tensor]:
        """Draw from U(-1/sqrt(inputs), 1/sqrt(inputs)), as ``torch.nn.Linear`` does."""
        return uniform(self.parameter_shapes(shape), self.inputs, generator)

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


class _Activation(Elementwise):
    """An elementwise layer of one function."""

    function: ClassVar[Callable[..., Tensor]]
    passage: ClassVar[type[_ActivationPass]]

    def at(self, site: Site) -> Pass:
        return self.passage(self, site)

    def reference(self, x: Tensor, parameters: Sequence[Tensor], context: Context, site: Site) -> Tensor:
        return self.function(x)


class _ActivationPass(Pass):
    """Buffers of an elementwise layer: the neighbour's memory where nobody else reads it, else its own."""

    def __init__(self, layer: _Activation, site: Site) -> None:
        self._function = layer.function
        self._y = None if site.reuse_input else site.empty()
        self._dx = None if site.reuse_gradient else site.empty()
        self._kept = site.empty(0)

    def _into(self, dy: Tensor) -> Tensor:
        return dy if self._dx is None else self._dx


class _ReLUPass(_ActivationPass):
    def forward(self, x: Tensor, context: Context) -> Tensor:
        self._kept = torch.relu_(x) if self._y is None else torch.clamp_min(x, 0, out=self._y)
        return self._kept

    def backward_input(self, dy: Tensor, need: bool = True) -> Tensor | None:
        return _ATEN.threshold_backward.grad_input(dy, self._kept, 0, grad_input=self._into(dy))


class _TanhPass(_ActivationPass):
    slope = _ATEN.tanh_backward.grad_input

    def forward(self, x: Tensor, context: Context) -> Tensor:
        self._kept = self._function(x, out=x if self._y is None else self._y)
        return self._kept

    def backward_input(self, dy: Tensor, need: bool = True) -> Tensor | None:
        return self.slope(dy, self._kept, grad_input=self._into(dy))


class _SigmoidPass(_TanhPass):
    slope = _ATEN.sigmoid_backward.grad_input


class _GELUPass(_ActivationPass):
    def __init__(self, layer: _Activation, site: Site) -> None:
        super().__init__(layer, site)
        self._out = site.empty()  # backward reads the input

    def forward(self, x: Tensor, context: Context) -> Tensor:
        self._kept = x
        return _ATEN.gelu.out(x, out=self._out)

    def backward_input(self, dy: Tensor, need: bool = True) -> Tensor | None:
        return _ATEN.gelu_backward.grad_input(dy, self._kept, grad_input=self._into(dy))


class ReLU(description.ReLU, _Activation):
    """y = max(x, 0); dx = dy where y > 0, else 0."""

    keeps_output = True
    function, passage = staticmethod(torch.relu), _ReLUPass


class Tanh(description.Tanh, _Activation):
    """y = tanh(x); dx = dy (1 - y^2). Counted as 4 FLOPs an element."""

    keeps_output = True
    function, passage = staticmethod(torch.tanh), _TanhPass


class Sigmoid(description.Sigmoid, _Activation):
    """y = 1 / (1 + exp(-x)); dx = dy (y - y^2). Counted as 4 FLOPs an element."""

    keeps_output = True
    function, passage = staticmethod(torch.sigmoid), _SigmoidPass


class GELU(description.GELU, _Activation):
    """y = x P(x), P the normal distribution function, by erf (Hendrycks and Gimpel 2016, arXiv:1606.08415).

    dx = dy (P(x) + x p(x)) with p the normal density. Counted as 8 FLOPs an element.
    """

    function, passage = staticmethod(F.gelu), _GELUPass


def uniform(shapes: Sequence[Shape], inputs: int, generator: torch.Generator) -> list[Tensor]:
    """Draw from U(-1/sqrt(inputs), 1/sqrt(inputs)), as ``torch.nn.Linear`` and ``torch.nn.Conv2d`` do."""
    bound = 1 / math.sqrt(inputs)
    return [torch.rand(s, generator=generator, dtype=torch.float64) * (2 * bound) - bound for s in shapes]
