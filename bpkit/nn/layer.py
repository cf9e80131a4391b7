"""What a layer is: a description (`Layer`), a place to work (`Site`), and a passage (`Pass`).

A *layer* holds hyperparameters only. It says which shapes it needs, and `at` binds it to a site: views
of its parameters and gradients, the shape of its input, a seed. The result, a *pass*, holds the buffers
and the kept activations of one microbatch, and does the arithmetic: forward, and backward in halves.
The input half carries the gradient to the layer below, the weight half gives the parameters' gradients.
A `Chain` is a pass made of passes; a network's forward and backward are a chain's.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from bpkit.description import layers as description
from bpkit.description.flat import Shape
from bpkit.description.layers import output_shapes, spans


@dataclass(frozen=True)
class Context:
    """Where a microbatch stands in the training run; dropout draws its masks from it.

    Parameters
    ----------
    step : int
        Number of the training step, from 0.
    first : int
        Position of row 0 of the input in the step's global batch; the rows are contiguous.
    training : bool
        False switches dropout off, and batch norm to its running statistics.
    sum_over_data : callable, optional
        Takes a small 1-D tensor and returns its sum over the data ranks, each of which calls it; batch norm then
        takes its statistics over the samples of all ranks.
    again : bool
        Whether this forward is run once more before its backward: what a skip connection brought stays until then.
    share : float
        This rank's samples among those of all data ranks' microbatches of this number (1 where none has any): the
        weight of what it sees in the running statistics, of which a rank keeps a summand.
    """

    step: int = 0
    first: int = 0
    training: bool = True
    sum_over_data: Callable[[Tensor], Tensor] | None = None
    again: bool = False
    share: float = 1.0


START = Context()  # the first step of a training run


@dataclass(frozen=True)
class Site:
    """Where a layer works: views of its tensors, its input's shape (rows first), and its coordinates.

    `layer` counts layers without their containers over the whole network, so neither splitting nor nesting
    changes it. `reuse_input` says that the input may be overwritten: nobody else reads it. `reuse_gradient`
    says the same of the gradient that comes from above. `buffers` are values that are kept but not trained.
    `added` says of each gradient that another use of its tensor has written it before (tied weights): it is added to.
    `skips` holds what goes past layers, by (what, number of the skip, first row); stages of one network share it.
    """

    parameters: tuple[Tensor, ...]
    gradients: tuple[Tensor, ...]
    shape: Shape
    dtype: torch.dtype
    device: torch.device
    layer: int = 0
    seed: int = 0
    reuse_input: bool = False
    reuse_gradient: bool = False
    buffers: tuple[Tensor, ...] = ()
    added: tuple[bool, ...] = ()
    skips: dict[tuple[str, int, int], Tensor] = field(default_factory=dict)

    def empty(self, *shape: int) -> Tensor:
        """Return an uninitialised tensor of `shape` (default: the input's) on the site's device."""
        return torch.empty(shape or self.shape, dtype=self.dtype, device=self.device)


class Pass:
    """The passage of one microbatch through one layer: its buffers and its arithmetic."""

    def forward(self, x: Tensor, context: Context) -> Tensor:
        """Return the output; keep what backward needs. The output lives until the next forward."""
        raise NotImplementedError

    def backward_input(self, dy: Tensor, need: bool = True) -> Tensor | None:
        """Return the gradient of the input; keep what `backward_weight` needs.

        With ``need=False`` the input's gradient may be left out, and None is returned.
        """
        raise NotImplementedError

    def backward_weight(self, accumulate: bool = False) -> None:
        """Write (or add, with `accumulate`) the gradients of the parameters."""


class Layer(description.Layer):
    """Base of all layers. Subclasses are frozen dataclasses of hyperparameters.

    A layer with parameters overrides `parameter_shapes` and `initial`; every layer overrides `at`, `cost` and
    `reference`. `keeps_output`: its backward reads its output, or its output is its input, so the next layer
    must not overwrite it. `fresh_gradient`: the input gradient lies in memory that nobody else reads.
    `input_dtype`: what it takes, if not the network's dtype.
    """

    keeps_output: bool = False
    fresh_gradient: bool = True
    input_dtype: torch.dtype | None = None

    def initial(self, shape: Shape, generator: torch.Generator) -> list[Tensor]:
        """Draw initial parameters in float64 on the CPU."""
        return []

    def buffers(self, shape: Shape) -> list[Tensor]:
        """Return the first values, in float64, of what is kept but not trained, of `buffer_shapes`."""
        return []

    def check(self, x: Tensor) -> None:
        """Refuse, as the first layer, inputs whose values it cannot take (ValueError); their form fits already."""

    def least_rows(self, shape: Shape) -> int:
        """Return how many samples of `shape` training takes at least, where it has any."""
        return 1

    def at(self, site: Site) -> Pass:
        """Bind the layer to a site."""
        raise NotImplementedError

    def reference(self, x: Tensor, parameters: Sequence[Tensor], context: Context, site: Site) -> Tensor:
        """Compute the output with torch's own functions: `gradcheck` differentiates it with autograd."""
        raise NotImplementedError


class Elementwise(description.Elementwise, Layer):
    """A layer without parameters that treats each element alone."""


def put_sum(gradient: Tensor, values: Tensor, over: int | tuple[int, ...], accumulate: bool) -> None:
    """Write the sum of `values` over some dimensions into a gradient, or add it."""
    if accumulate:
        gradient.add_(values.sum(over))
    else:
        torch.sum(values, over, out=gradient)


def sites(layers: Sequence[Layer], site: Site) -> list[Site]:
    """Return one site for each layer of a chain that works at `site`."""
    shapes = output_shapes(layers, site.shape[1:])
    counts = [len(layer.parameter_shapes(s)) for layer, s in zip(layers, shapes, strict=False)]
    kept = spans([len(layer.buffer_shapes(s)) for layer, s in zip(layers, shapes, strict=False)])
    result, leaf = [], site.layer
    for i, (layer, span, own) in enumerate(zip(layers, spans(counts), kept, strict=True)):
        reuse_input = not layers[i - 1].keeps_output if i else site.reuse_input
        reuse_gradient = layers[i + 1].fresh_gradient if i + 1 < len(layers) else site.reuse_gradient
        result.append(replace(site, parameters=site.parameters[span], gradients=site.gradients[span],
                              shape=(site.shape[0], *shapes[i]), layer=leaf, reuse_input=reuse_input,
                              reuse_gradient=reuse_gradient, buffers=site.buffers[own],
                              added=site.added[span]))  # fmt: skip
        leaf += layer.leaves
    return result


def _weight_half(layer: Layer, one: Pass, site: Site) -> Callable[[bool], None]:
    """Return the weight half of a pass; it adds to the gradients that another use of a tied tensor has written."""
    half = one.backward_weight
    if not any(site.added) or layer.leaves > 1:  # a container's layers see to it, each by itself
        return half
    fresh = [gradient for gradient, added in zip(site.gradients, site.added, strict=True) if not added]

    def add(accumulate: bool) -> None:
        for gradient in () if accumulate else fresh:
            gradient.zero_()
        half(True)

    return add


class Chain(Pass):
    """Passes one after another. Its backward skips what no parameter needs when `need` is False."""

    def __init__(self, layers: Sequence[Layer], site: Site) -> None:
        places = sites(layers, site)
        passes = [layer.at(place) for layer, place in zip(layers, places, strict=True)]
        trained = [i for i, place in enumerate(places) if place.parameters]
        first = trained[0] if trained else len(layers)
        weights = {i: _weight_half(layers[i], passes[i], places[i]) for i in trained}
        self._forwards = [p.forward for p in passes]
        # Backward's order: (input half, weight half or None, is the input gradient of use to a layer below).
        halves = [(one.backward_input, weights.get(i)) for i, one in enumerate(passes)]
        self._needed = [(*halves[i], i > first) for i in reversed(range(first, len(passes)))]
        self._all = [(*pair, True) for pair in reversed(halves)]

    def forward(self, x: Tensor, context: Context) -> Tensor:
        for forward in self._forwards:
            x = forward(x, context)
        return x

    def backward_input(self, dy: Any, need: bool = True) -> Tensor | None:
        for half, _, wanted in self._all if need else self._needed:
            dy = half(dy, wanted)
        return dy if need else None

    def backward_weight(self, accumulate: bool = False) -> None:
        for _, half, _ in self._needed:
            if half is not None:
                half(accumulate)

    def backward(self, dy: Any, accumulate: bool = False, need: bool = False) -> Tensor | None:
        """Do both halves of each layer before going to the layer below (the same bits as the halves)."""
        for input_half, weight_half, wanted in self._all if need else self._needed:
            dy = input_half(dy, wanted)
            if weight_half is not None:
                weight_half(accumulate)
        return dy if need else None


@dataclass(frozen=True)
class Run:
    """A chain bound to one slot, and the inputs it is bound for."""

    shape: torch.Size
    dtype: torch.dtype
    chain: Chain
