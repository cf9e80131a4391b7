"""Layers without a number in them: hyperparameters, shapes, ties and costs.

`bpkit.nn` adds to each of these what computes: its layers are these, with first values, a passage and a reference.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import count
from typing import ClassVar

from bpkit.description.costs import StageCost
from bpkit.description.flat import Shape
from bpkit.given import settle


class Layer:
    """Base of all layers. Subclasses are frozen dataclasses of hyperparameters.

    A layer with parameters overrides `parameter_shapes`; every layer overrides `cost`. `leaves` counts the layers in
    it that have a number of their own, on which dropout masks depend. `takes` says what hyperparameters must be: whole
    numbers of at least so much, or numbers between two, both included; others are refused by name.
    """

    leaves: int = 1
    takes: ClassVar[Mapping[str, int | tuple[float, float]]] = {}

    def __post_init__(self) -> None:
        settle(self, self.takes)

    def output_shape(self, shape: Shape) -> Shape:
        """Return the shape of one output sample for input samples of `shape`; ValueError if it can't be."""
        return shape

    def parameter_shapes(self, shape: Shape) -> tuple[Shape, ...]:
        """Return the shapes of the parameters, in the order weight, bias."""
        return ()

    def buffer_shapes(self, shape: Shape) -> tuple[Shape, ...]:
        """Return the shapes of what is kept but not trained, such as running statistics."""
        return ()

    def ties(self, shape: Shape) -> tuple[str, ...]:
        """Return a name for each parameter: parameters of one name (not "") are one tensor."""
        return ("",) * len(self.parameter_shapes(shape))

    def partial(self, shape: Shape) -> tuple[bool, ...]:
        """Say of each parameter's gradient whether it is only a tensor rank's share, to be summed over them."""
        return (False,) * len(self.parameter_shapes(shape))

    def produced(self, shape: Shape) -> list[int]:
        """Return the indices of the parameters in the order in which backward produces their gradients."""
        return list(range(len(self.parameter_shapes(shape))))

    def cost(self, shape: Shape) -> StageCost:
        """Return FLOPs, edges and parameters for one sample of `shape`."""
        raise NotImplementedError


def output_shapes(layers: Sequence[Layer], shape: Shape) -> tuple[Shape, ...]:
    """Return the shape in front of each layer and, last, the output's.

    Raises
    ------
    ValueError
        Where two layers do not fit: it names both and both shapes.
    """
    shapes = [shape]
    for i, layer in enumerate(layers):
        try:
            shapes.append(tuple(layer.output_shape(shapes[-1])))
        except ValueError as error:
            source = f"layer {i - 1} ({layers[i - 1]!r}) gives" if i else "the network's input has"
            raise ValueError(f"{source} samples of shape {shapes[-1]}, but layer {i}: {error}") from None
    return tuple(shapes)


def spans(counts: Sequence[int]) -> Iterator[slice]:
    """Yield consecutive slices of the given lengths."""
    start = 0
    for n in counts:
        yield slice(start, start + n)
        start += n


def produced(layers: Sequence[Layer], shapes: Sequence[Shape]) -> list[int]:
    """Return the parameter indices of layers in a chain, given the shapes in front of them, in the order of their
    gradients: last layer first."""
    orders = [layer.produced(s) for layer, s in zip(layers, shapes, strict=False)]
    places = list(spans([len(order) for order in orders]))
    return [place.start + i for order, place in zip(orders[::-1], places[::-1], strict=True) for i in order]


class Elementwise(Layer):
    """A layer without parameters that treats each element alone."""

    flops: ClassVar[int] = 1  # a forward element, and a backward one, each counted as one operation

    def cost(self, shape: Shape) -> StageCost:
        """Count `flops` for each element, forward and backward; there is no weight half."""
        size = math.prod(shape)
        return StageCost(self.flops * size, self.flops * size, 0, size, size, 0)


@dataclass(frozen=True)
class ReLU(Elementwise):
    """The larger of each element and 0."""


@dataclass(frozen=True)
class Tanh(Elementwise):
    """The hyperbolic tangent."""

    flops = 4


@dataclass(frozen=True)
class Sigmoid(Elementwise):
    """The logistic function."""

    flops = 4


@dataclass(frozen=True)
class GELU(Elementwise):
    """Each element times the normal distribution function of it."""

    flops = 8


@dataclass(frozen=True)
class Dropout(Elementwise):
    """Elements set to 0 with probability `p`; features are counted from `start`."""

    p: float = 0.5
    start: int = 0
    takes = {"p": (0, 1), "start": 0}

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.p == 1:
            raise ValueError("Dropout: p is a probability below 1, which would drop everything")


@dataclass(frozen=True)
class Linear(Layer):
    """A product with a matrix (outputs, inputs) over the last dimension, and a bias."""

    inputs: int
    outputs: int
    bias: bool = True
    takes = {"inputs": 1, "outputs": 1}

    def output_shape(self, shape: Shape) -> Shape:
        if not shape or shape[-1] != self.inputs:
            raise ValueError(f"{self!r} takes samples of shape {(*shape[:-1], self.inputs)}")
        return (*shape[:-1], self.outputs)

    def parameter_shapes(self, shape: Shape) -> tuple[Shape, ...]:
        weight: Shape = (self.outputs, self.inputs)
        return (weight, (self.outputs,)) if self.bias else (weight,)

    def cost(self, shape: Shape) -> StageCost:
        """Count 2 x inputs x outputs for each product; the bias adds `outputs` to F and W."""
        rows = math.prod(shape[:-1])
        product, bias = 2 * rows * self.inputs * self.outputs, rows * self.outputs * self.bias
        size = self.outputs * (self.inputs + self.bias)
        return StageCost(product + bias, product, product + bias, rows * self.inputs, rows * self.outputs, size)


@dataclass(frozen=True)
class Embedding(Layer):
    """Rows of a matrix (vocabulary, width), one for each token; only `rows` of it on a tensor rank."""

    vocabulary: int
    width: int
    tied: str = ""
    rows: tuple[int, int] | None = None
    takes = {"vocabulary": 1, "width": 1}

    @property
    def bounds(self) -> tuple[int, int]:
        """The rows of the matrix that are held."""
        return self.rows or (0, self.vocabulary)

    def output_shape(self, shape: Shape) -> Shape:
        return (*shape, self.width)

    def parameter_shapes(self, shape: Shape) -> tuple[Shape, ...]:
        return ((self.bounds[1] - self.bounds[0], self.width),)

    def ties(self, shape: Shape) -> tuple[str, ...]:
        return (self.tied,)

    def cost(self, shape: Shape) -> StageCost:
        """Count one FLOP for each element moved: F reads them, W adds them; I does nothing."""
        tokens, size = math.prod(shape), math.prod(self.parameter_shapes(shape)[0])
        return StageCost(tokens * self.width, 0, tokens * self.width, tokens, tokens * self.width, size)


@dataclass(frozen=True)
class Positions(Layer):
    """A learned matrix (length, width), added."""

    length: int
    width: int
    takes = {"length": 1, "width": 1}

    def output_shape(self, shape: Shape) -> Shape:
        if shape != (self.length, self.width):
            raise ValueError(f"{self!r} takes samples of shape ({self.length}, {self.width})")
        return shape

    def parameter_shapes(self, shape: Shape) -> tuple[Shape, ...]:
        return ((self.length, self.width),)

    def cost(self, shape: Shape) -> StageCost:
        """Count one FLOP an element for F and for W; I passes the gradient on."""
        size = self.length * self.width
        return StageCost(size, 0, size, size, size, size)


@dataclass(frozen=True)
class Unembedding(Linear):
    """Scores of the tokens by the matrix of the `Embedding` of the same `tied` name."""

    bias: bool = False
    tied: str = "embedding"

    def ties(self, shape: Shape) -> tuple[str, ...]:
        return (self.tied, "") if self.bias else (self.tied,)


class Norm(Layer):
    """What normalises, with a weight and a bias of one size."""

    def cost(self, shape: Shape) -> StageCost:
        """Count 8 FLOPs an element for F and for I (two means and three elementwise steps each), 3 for W."""
        size, parameters = math.prod(shape), sum(n for (n, *_) in self.parameter_shapes(shape))
        return StageCost(8 * size, 8 * size, 3 * size, size, size, parameters)


@dataclass(frozen=True)
class LayerNorm(Norm):
    """Normalisation over the last dimension."""

    features: int
    eps: float = 1e-5
    shared: bool = False  # on a tensor rank that has some of the tokens: its gradient is a share
    takes = {"features": 1, "eps": (0, math.inf)}

    def partial(self, shape: Shape) -> tuple[bool, ...]:
        return (self.shared, self.shared)

    def output_shape(self, shape: Shape) -> Shape:
        if not shape or shape[-1] != self.features:
            raise ValueError(f"{self!r} takes samples of shape {(*shape[:-1], self.features)}")
        return shape

    def parameter_shapes(self, shape: Shape) -> tuple[Shape, ...]:
        return ((self.features,), (self.features,))


@dataclass(frozen=True)
class Heads(Layer):
    """Attention of tokens to tokens, head by head, on (tokens, 3 heads d); output (tokens, heads d)."""

    heads: int
    causal: bool = True
    fused: bool | None = None
    takes = {"heads": 1}

    def output_shape(self, shape: Shape) -> Shape:
        if len(shape) != 2 or shape[1] % (3 * self.heads):
            raise ValueError(f"{self!r} takes samples of shape (tokens, 3 x {self.heads} heads x width of a head)")
        return (shape[0], shape[1] // 3)

    def cost(self, shape: Shape) -> StageCost:
        """Count 2 x tokens^2 x heads x d for each of 2 products forward and 4 backward (mask not deducted), and 5 and
        4 FLOPs for each element of the softmax."""
        tokens, width = self.output_shape(shape)
        product, scores = 2 * tokens * tokens * width, self.heads * tokens * tokens
        return StageCost(2 * product + 5 * scores, 4 * product + 4 * scores, 0, 3 * tokens * width, tokens * width, 0)


@dataclass(frozen=True)
class Skip(Layer):
    """One end of the skip connection of a number, unique in its network."""

    number: int
    takes = {"number": 0}
    leaves = 0  # not counted, so that masks of dropout are those of the closed container

    def cost(self, shape: Shape) -> StageCost:
        """Count one FLOP an element for F and for I: an addition or a copy."""
        size = math.prod(shape)
        return StageCost(size, size, 0, size, size, 0)


class StashSkip(Skip):
    """Where a skip connection starts."""


class AddSkip(Skip):
    """Where a skip connection ends: what its `StashSkip` took is added."""


class Sequential(Layer):
    """Layers one after another, at least one, treated as one layer: a network is never cut inside it."""

    def __init__(self, *layers: Layer) -> None:
        if not layers:
            raise ValueError(f"{type(self).__name__} needs at least one layer")
        self.layers = layers
        self.leaves = sum(layer.leaves for layer in layers)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(map(repr, self.layers))})"

    def __eq__(self, other: object) -> bool:
        return type(self) is type(other) and self.layers == other.layers  # type: ignore[attr-defined]

    def __hash__(self) -> int:
        return hash((type(self), self.layers))

    def inner(self, shape: Shape) -> list[tuple[Layer, Shape]]:
        """Return the layers inside, each with the shape in front of it."""
        return list(zip(self.layers, output_shapes(self.layers, shape), strict=False))

    def output_shape(self, shape: Shape) -> Shape:
        return output_shapes(self.layers, shape)[-1]

    def parameter_shapes(self, shape: Shape) -> tuple[Shape, ...]:
        return tuple(p for layer, s in self.inner(shape) for p in layer.parameter_shapes(s))

    def buffer_shapes(self, shape: Shape) -> tuple[Shape, ...]:
        return tuple(b for layer, s in self.inner(shape) for b in layer.buffer_shapes(s))

    def ties(self, shape: Shape) -> tuple[str, ...]:
        return tuple(name for layer, s in self.inner(shape) for name in layer.ties(s))

    def partial(self, shape: Shape) -> tuple[bool, ...]:
        return tuple(share for layer, s in self.inner(shape) for share in layer.partial(s))

    def produced(self, shape: Shape) -> list[int]:
        return produced(self.layers, output_shapes(self.layers, shape))

    def cost(self, shape: Shape) -> StageCost:
        return StageCost.merge([layer.cost(s) for layer, s in self.inner(shape)])


class Residual(Sequential):
    """The input plus what the layers inside make of it."""

    ends: ClassVar[tuple[type[Skip], type[Skip]]] = (StashSkip, AddSkip)  # what it is between, written out

    def output_shape(self, shape: Shape) -> Shape:
        out = super().output_shape(shape)
        if out != shape:
            raise ValueError(f"{self!r} must keep the shape to add its input, and gives {out} for {shape}")
        return out

    def cost(self, shape: Shape) -> StageCost:
        """Count the layers and one addition an element, forward and backward."""
        inner, size = super().cost(shape), math.prod(shape)
        add = StageCost(size, size, 0, size, size, 0)
        return StageCost.merge([inner, add])


def leaves(layer: Layer, shape: Shape) -> Iterator[tuple[Layer, Shape]]:
    """Yield the layers in a layer that are no container, each with the shape in front of it."""
    if isinstance(layer, Sequential):
        for inner, at in layer.inner(shape):
            yield from leaves(inner, at)
    else:
        yield layer, shape


def opened(layers: Sequence[Layer], numbers: Iterator[int] | None = None) -> Iterator[Layer]:
    """Yield the layers with containers written out, a `Residual` as its layers between the two ends of a skip.

    The numbers of the skips written out are none that the layers have already.
    """
    numbers = count(max(map(_last_number, layers), default=-1) + 1) if numbers is None else numbers
    for layer in layers:
        if isinstance(layer, Residual):
            number, (start, end) = next(numbers), layer.ends
            yield from (start(number), *opened(layer.layers, numbers), end(number))
        elif isinstance(layer, Sequential):
            yield from opened(layer.layers, numbers)
        else:
            yield layer


def _last_number(layer: Layer) -> int:
    """The largest number of a skip in a layer; -1 for none."""
    if isinstance(layer, Sequential):
        return max(map(_last_number, layer.layers))
    return layer.number if isinstance(layer, Skip) else -1
