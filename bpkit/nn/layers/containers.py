"""Layers made of layers: `Sequential` runs them in order, `Residual` adds its input to their output.

A skip connection over several layers of a network, even over stages of one rank, is a pair of `StashSkip` and
`AddSkip`; `bpkit.description.layers.opened` writes containers out so.
"""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from bpkit.description import layers as description
from bpkit.description.flat import Shape
from bpkit.description.layers import output_shapes, spans
from bpkit.nn.layer import Chain, Context, Layer, Pass, Site, sites


class Sequential(description.Sequential, Layer):
    """Layers one after another, treated as one layer: a network is never cut inside it.

    Parameters
    ----------
    *layers : Layer
        At least one.
    """

    layers: tuple[Layer, ...]

    def __init__(self, *layers: Layer) -> None:
        super().__init__(*layers)
        self.keeps_output = layers[-1].keeps_output
        self.fresh_gradient = layers[0].fresh_gradient
        self.input_dtype = layers[0].input_dtype

    def inner(self, shape: Shape) -> list[tuple[Layer, Shape]]:  # type: ignore[override]
        return list(zip(self.layers, output_shapes(self.layers, shape), strict=False))

    def initial(self, shape: Shape, generator: torch.Generator) -> list[Tensor]:
        return [p for layer, s in self.inner(shape) for p in layer.initial(s, generator)]

    def buffers(self, shape: Shape) -> list[Tensor]:
        return [b for layer, s in self.inner(shape) for b in layer.buffers(s)]

    def check(self, x: Tensor) -> None:
        self.layers[0].check(x)

    def least_rows(self, shape: Shape) -> int:
        return max(layer.least_rows(s) for layer, s in self.inner(shape))

    def at(self, site: Site) -> Pass:
        return Chain(self.layers, site)

    def reference(self, x: Tensor, parameters: Sequence[Tensor], context: Context, site: Site) -> Tensor:
        places = sites(self.layers, site)
        for layer, place, span in zip(self.layers, places, spans([len(p.parameters) for p in places]), strict=True):
            x = layer.reference(x, parameters[span], context, place)
        return x


class Residual(description.Residual, Sequential):
    """y = x + f(x), f the given layers in order (He et al. 2016, arXiv:1512.03385); dx = dy + f's dx.

    Raises
    ------
    ValueError
        When a network is built whose f changes the shape.
    """

    def __init__(self, *layers: Layer) -> None:
        super().__init__(*layers)
        self.keeps_output = False
        self.fresh_gradient = True

    def at(self, site: Site) -> Pass:
        return _ResidualPass(self.layers, site)

    def reference(self, x: Tensor, parameters: Sequence[Tensor], context: Context, site: Site) -> Tensor:
        return x + super().reference(x, parameters, context, site)


class _ResidualPass(Pass):
    """Neither the input nor the gradient from above may be overwritten inside: both are read again."""

    def __init__(self, layers: Sequence[Layer], site: Site) -> None:
        inside = replace(site, reuse_input=False, reuse_gradient=False)
        self._inner = Chain(layers, inside)
        self._y, self._dx = site.empty(), site.empty()

    def forward(self, x: Tensor, context: Context) -> Tensor:
        return torch.add(x, self._inner.forward(x, context), out=self._y)

    def backward_input(self, dy: Tensor, need: bool = True) -> Tensor | None:
        dx = self._inner.backward_input(dy, need)
        return torch.add(dy, dx, out=self._dx) if dx is not None else None

    def backward_weight(self, accumulate: bool = False) -> None:
        self._inner.backward_weight(accumulate)


class StashSkip(description.StashSkip, Layer):
    """y = x, and keeps x for the `AddSkip` of the same number; dx = dy + the gradient that one has kept."""

    keeps_output = True  # its output is its input
    fresh_gradient = True

    def at(self, site: Site) -> Pass:
        return _StashPass(self.number, site)

    def reference(self, x: Tensor, parameters: Sequence[Tensor], context: Context, site: Site) -> Tensor:
        site.skips["x", self.number, context.first] = x
        return x


class AddSkip(description.AddSkip, Layer):
    """y = x + what the `StashSkip` of the same number has kept of this microbatch; dx = dy, kept for it in turn."""

    fresh_gradient = False

    def at(self, site: Site) -> Pass:
        return _AddPass(self.number, site)

    def reference(self, x: Tensor, parameters: Sequence[Tensor], context: Context, site: Site) -> Tensor:
        return x + site.skips.pop(("x", self.number, context.first))


class _SkipPass(Pass):
    """What is kept is copied: the two ends may stand in different stages, whose buffers are used again in turn."""

    def __init__(self, number: int, site: Site) -> None:
        self._number, self._skips, self._first = number, site.skips, 0
        self._sum = site.empty()

    def _keep(self, what: str, value: Tensor) -> None:
        if len(value):  # empty microbatches have one place in the batch in common, and nothing to add
            self._skips[what, self._number, self._first] = value.clone()

    def _add(self, what: str, value: Tensor, again: bool = False) -> Tensor:
        """Add what was kept, for the last time or to be added `again`."""
        if not len(value):
            return value
        key = (what, self._number, self._first)
        return torch.add(value, self._skips[key] if again else self._skips.pop(key), out=self._sum)


class _StashPass(_SkipPass):
    def forward(self, x: Tensor, context: Context) -> Tensor:
        self._first = context.first
        self._keep("x", x)
        return x

    def backward_input(self, dy: Tensor, need: bool = True) -> Tensor | None:
        self._skips.pop(("x", self._number, self._first), None)  # kept once more, where this forward ran again
        return self._add("dx", dy)


class _AddPass(_SkipPass):
    def forward(self, x: Tensor, context: Context) -> Tensor:
        self._first = context.first
        return self._add("x", x, context.again)

    def backward_input(self, dy: Tensor, need: bool = True) -> Tensor | None:
        self._keep("dx", dy)
        return dy


Residual.ends = (StashSkip, AddSkip)
