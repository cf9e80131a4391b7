"""The description of a network: its layers, shapes, costs and where its tensors would lie, without a tensor."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise
from typing import Final, NamedTuple, Protocol

from bpkit.description import layers as bare
from bpkit.description.costs import StageCost
from bpkit.description.flat import Shape, added, lay_out, owners
from bpkit.description.layers import Layer

#: Bytes of an element of each dtype that a network may have.
ITEMSIZES: Final = {"float32": 4, "float64": 8, "bfloat16": 2}


class Parameter(NamedTuple):
    """A parameter: `number` of its `layer`, and where it starts in the flat buffer.

    ``owner`` is the first parameter of its name, with which it is one tensor, or itself; ``added`` says whether
    another use of the tensor writes its gradient before, or may do so; ``held`` whether it lies here, not in another
    stage (see `Description.split`).
    """

    layer: int
    number: int
    name: str
    shape: Shape
    owner: int
    offset: int
    added: bool
    held: bool

    @property
    def slice(self) -> slice:
        """Where it lies in the flat buffer."""
        return slice(self.offset, self.offset + math.prod(self.shape))


class Described(Protocol):
    """What has a description: a network, or the description itself."""

    @property
    def description(self) -> Description:
        """The description."""


@dataclass(frozen=True)
class Description:
    """A network, or a run of its layers, without a number in it.

    Parameters
    ----------
    layers : tuple of Layer
        At least one.
    input_shape : tuple of int
        Shape of one sample.
    loss : str
        "cross_entropy", "mse", or "" for another.
    dtype : str
        "float32", "float64" or "bfloat16".
    first_leaf : int
        Number of the first layer in the whole network.
    given_shapes : tuple of tuples of int
        In front of each layer and behind the last, where they do not follow from each other: collectives between.
    lent : tuple of (str, int)
        Names of the tied tensors that another stage holds, in whose memory this one works, and which (see `split`).

    Raises
    ------
    ValueError
        If there is no layer, or the layers' shapes do not chain.
    """

    layers: tuple[Layer, ...]
    input_shape: Shape
    loss: str = "cross_entropy"
    dtype: str = "float32"
    first_leaf: int = 0
    given_shapes: tuple[Shape, ...] = ()
    lent: tuple[tuple[str, int], ...] = ()

    def __post_init__(self) -> None:
        if not self.layers:
            raise ValueError("a network needs at least one layer")
        _ = self.shapes

    @property
    def description(self) -> Description:
        """This one: a description stands where a network would."""
        return self

    @cached_property
    def shapes(self) -> tuple[Shape, ...]:
        """Shapes in front of each layer and, last, of the output."""
        return self.given_shapes or bare.output_shapes(self.layers, self.input_shape)

    @property
    def output_shape(self) -> Shape:
        """Shape of one sample's output."""
        return self.shapes[-1]

    @property
    def itemsize(self) -> int:
        """Bytes of an element."""
        return ITEMSIZES[self.dtype]

    def placed(self) -> Iterator[tuple[Layer, Shape]]:
        """Return each layer with the shape in front of it."""
        return zip(self.layers, self.shapes, strict=False)

    def costs(self) -> tuple[StageCost, ...]:
        """Return the cost of each layer for one sample."""
        return tuple(layer.cost(shape) for layer, shape in self.placed())

    @property
    def text(self) -> str:
        """A short text, such as ``mlp 64-512-512-10, 301,066 parameters``."""
        count = sum(math.prod(p.shape) for i, p in enumerate(self.parameters) if p.owner == i)
        if all(isinstance(la, bare.Linear | bare.Elementwise) for la in self.layers) and len(self.input_shape) == 1:
            sizes = [self.input_shape[0], *(la.outputs for la in self.layers if isinstance(la, bare.Linear))]
            return f"mlp {'-'.join(map(str, sizes))}, {count:,} parameters"
        return f"network of {len(self.layers)} layers, {count:,} parameters"

    # Tensors.

    @cached_property
    def _layout(self) -> tuple[tuple[Parameter, ...], int]:
        placed = list(self.placed())
        places = [(i, j, shape) for i, (layer, s) in enumerate(placed)
                  for j, shape in enumerate(layer.parameter_shapes(s))]  # fmt: skip
        names, shapes = [name for layer, s in placed for name in layer.ties(s)], [shape for _, _, shape in places]
        own = owners(names, shapes)
        order = bare.produced(self.layers, self.shapes)
        lent = dict(self.lent)
        adds = [name in lent or again for name, again in zip(names, added(order, own), strict=True)]
        offsets, size = lay_out([i for i in order if names[i] not in lent], own, shapes, max(4, self.itemsize))
        parts = zip(places, names, own, offsets, adds, strict=True)
        return tuple(Parameter(i, j, name, shape, o, at, adds, name not in lent)
                     for (i, j, shape), name, o, at, adds in parts), size  # fmt: skip

    @property
    def parameters(self) -> tuple[Parameter, ...]:
        """The parameters in layer order, weight then bias."""
        return self._layout[0]

    @property
    def own(self) -> list[int]:
        """Numbers of the parameters that lie here, each tensor once: not what another stage holds."""
        return [i for i, p in enumerate(self.parameters) if p.owner == i and p.held]

    @property
    def flat_size(self) -> int:
        """Elements of a flat buffer of parameters or gradients, padding included."""
        return self._layout[1]

    @property
    def buffer_shapes(self) -> tuple[Shape, ...]:
        """Shapes of what is kept but not trained, in layer order."""
        return tuple(shape for layer, s in self.placed() for shape in layer.buffer_shapes(s))

    def tied_slices(self) -> dict[str, slice]:
        """Return where each parameter with a name lies in the flat buffers; other stages may hold copies of it."""
        return {p.name: p.slice for p in self.parameters if p.name and p.held}

    def shares(self) -> tuple[Parameter, ...]:
        """Return the parameters of whose gradient a tensor rank has only a share: to be summed over the ranks."""
        partial = [share for layer, s in self.placed() for share in layer.partial(s)]
        return tuple(p for p, share in zip(self.parameters, partial, strict=True) if share)

    # Skip connections.

    def skips(self) -> tuple[tuple[int, int], ...]:
        """Return the layers at which each skip connection written as two layers starts and ends.

        Raises
        ------
        ValueError
            If a number has not one `StashSkip` and, behind it, one `AddSkip` of the same shape.
        """
        ends: dict[int, list[tuple[int, Layer, Shape]]] = {}
        for i, (layer, shape) in enumerate(self.placed()):
            for leaf, at in bare.leaves(layer, shape):
                if isinstance(leaf, bare.Skip):
                    ends.setdefault(leaf.number, []).append((i, leaf, at))
        for number, found in ends.items():
            kinds, shapes = [isinstance(leaf, bare.StashSkip) for _, leaf, _ in found], {at for _, _, at in found}
            if kinds != [True, False] or len(shapes) > 1:
                there = ", ".join(f"{leaf!r} on samples of shape {at} in layer {i}" for i, leaf, at in found)
                raise ValueError("a skip connection is one StashSkip and, behind it, one AddSkip of the same shape, of "
                                 f"a number that no other has, and number {number} is {there}")  # fmt: skip
        return tuple((found[0][0], found[1][0]) for found in ends.values())

    # Cutting.

    def opened(self) -> Description:
        """Return the description with its containers written out as layers, skips as pairs of layers: cut anywhere.

        It is this one where no layer is a container.
        """
        contained = any(isinstance(layer, bare.Sequential) for layer in self.layers)
        return replace(self, layers=tuple(bare.opened(self.layers)), given_shapes=()) if contained else self

    def checked(self, cuts: Sequence[int]) -> tuple[int, ...]:
        """Return layers at which stages 1, 2, ... start.

        Raises
        ------
        ValueError
            If the network cannot be cut so.
        """
        n = len(self.layers)
        if any(b <= a for a, b in zip((0, *cuts), (*cuts, n), strict=True)):
            raise ValueError(f"cuts of {n} layers increase strictly from 1 to {n - 1}, not {list(cuts)}")
        return tuple(cuts)

    def split(self, cuts: Sequence[int], together: Sequence[int] | None = None) -> tuple[Description, ...]:
        """Return the stages that start at the given layers, and at layer 0, each a description.

        `together` gives the process of each stage. Stages of one process hold a tied tensor once, in the first of them
        that uses it; without it each has its own.
        """
        parts = [self.part(a, b) for a, b in pairwise((0, *self.checked(cuts), len(self.layers)))]
        uses = [{p.name for p in part.parameters if p.name} for part in parts]
        for i, own in enumerate(uses):
            first = {name: j for j in reversed(range(i)) if together and together[j] == together[i] for name in uses[j]}
            parts[i] = replace(parts[i], lent=tuple((name, first[name]) for name in sorted(own & {*first})))
        return tuple(parts)

    def part(self, start: int, stop: int) -> Description:
        """Return layers `start` to `stop` by themselves."""
        leaf = self.first_leaf + sum(layer.leaves for layer in self.layers[:start])
        return Description(self.layers[start:stop], self.shapes[start], self.loss, self.dtype, leaf)
