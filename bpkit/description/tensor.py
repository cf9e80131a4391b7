"""Tensor parallelism: the network of one tensor rank, and the whole from the ranks' parts.

A product x W^T is split by the rows of W (by columns of the mathematicians' W^T: each rank has some outputs), the next
one by its columns (each rank has some inputs), so that two products need one sum over the ranks forward and one
backward (Shoeybi et al. 2019, arXiv:1909.08053, section 3). The sum over the ranks of the shards' outputs, given the
whole input, is the whole's output; the sum of their input gradients, given the whole output gradient, is the whole's.
So the second bias belongs to rank 0 alone. What stands between such pairs (norms, dropout, skips) every rank computes
whole; or, with sequence parallelism, for its own tokens only (Korthikanti et al. 2022, arXiv:2205.05198, section 4.2).
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate

from bpkit.description import layers as bare
from bpkit.description.flat import Shape, part_bounds
from bpkit.description.layers import Layer, Linear, output_shapes
from bpkit.description.network import Described, Description

Range = tuple[int, int]


@dataclass(frozen=True)
class Piece:
    """What a tensor rank holds of a parameter: these ranges along `dim`, or nothing, or (None) all of it."""

    ranges: tuple[Range, ...] | None = None
    dim: int = 0

    def places(self, size: int) -> tuple[Range, ...]:
        """Return the ranges along `dim`, of `size` elements."""
        return ((0, size),) if self.ranges is None else self.ranges


Cut = tuple[Layer, list[Piece]]
ALL, NONE = Piece(), Piece(())
#: Layers that treat each token alone and whose parameters, if any, know how to be shared or cut by tokens.
BY_TOKEN = (bare.Elementwise, bare.LayerNorm, bare.Positions, bare.StashSkip, bare.AddSkip)


def part_of(size: int, index: int, of: int, what: str) -> Range:
    """Return a rank's part of a size; ValueError, which says of what, where it is too small."""
    if size < of:
        raise ValueError(f"{what} {size} cannot be divided among {of} tensor ranks")
    return part_bounds(size, of, index)


def _first(layer: Linear, index: int, of: int, behind: Sequence[Layer]) -> Cut:
    """A product of which each rank has some outputs; in front of `Heads` those of whole heads, of q, k and v."""
    heads = next((la.heads for la in behind[:1] if isinstance(la, bare.Heads)), 0)
    if not heads:
        ranges = [part_of(layer.outputs, index, of, "a width of")]
    else:
        if heads % of:
            raise ValueError(f"{heads} heads cannot be divided among {of} tensor ranks")
        third, part = layer.outputs // 3, layer.outputs // (3 * of)
        ranges = [(i * third + index * part, i * third + (index + 1) * part) for i in range(3)]
    piece = Piece(tuple(ranges))
    return replace(layer, outputs=sum(high - low for low, high in ranges)), [piece] * (1 + layer.bias)


def _second(layer: Linear, index: int, of: int) -> Cut:
    """A product of which each rank has some inputs; the bias is rank 0's."""
    low, high = part_of(layer.inputs, index, of, "a width of")
    bias = [ALL if index == 0 else NONE] * layer.bias
    return replace(layer, inputs=high - low, bias=layer.bias and index == 0), [Piece(((low, high),), 1), *bias]


def _pairs(layers: Sequence[Layer]) -> list[Range]:
    """Return the bounds [first, second] of each product-then-product with elementwise layers or heads between."""
    found, start = [], None
    for i, layer in enumerate(layers):
        if isinstance(layer, Linear):
            if start is None:
                start = i
            else:
                found.append((start, i))
                start = None
        elif not isinstance(layer, bare.Elementwise | bare.Heads):
            start = None
    return found


def _by_token(layer: Layer, shape: Shape, index: int, of: int) -> Cut:
    """A layer for this rank's tokens only."""
    own = shape[0] // of
    if isinstance(layer, bare.Positions):
        return replace(layer, length=own), [Piece(((index * own, (index + 1) * own),))]
    if isinstance(layer, bare.LayerNorm):
        return replace(layer, shared=True), [ALL, ALL]
    if isinstance(layer, bare.Dropout):
        return replace(layer, start=index * own * shape[1]), []
    return layer, []


@dataclass(frozen=True)
class TensorLayout:
    """Where a network is cut for the tensor axis: what `bpkit.plan.tensor_parallel` asks for.

    Parameters
    ----------
    cuts : tuple of int
        Layers at which stages 1, 2, ... start, of the network with its containers opened (`Network.opened`).
    partial_outputs, partial_inputs : tuple of int
        Stages whose output (gradient of input) is to be summed over the tensor ranks.
    own_tokens : tuple of int
        Stages that each tensor rank computes for its own tokens only (sequence parallelism).
    skips : tuple of pairs of int
        Stages at which a skip connection starts and ends, which must stand on one rank.
    costs : tuple of int
        FLOPs of each stage's F, I and W a sample.
    vocabulary : bool
        The last stage gives each rank's scores of its classes only, for `VocabularyCrossEntropy`.
    """

    cuts: tuple[int, ...]
    partial_outputs: tuple[int, ...]
    partial_inputs: tuple[int, ...]
    own_tokens: tuple[int, ...]
    skips: tuple[tuple[int, int], ...]
    costs: tuple[int, ...]
    vocabulary: bool

    def joined(self, cuts: Collection[int]) -> TensorLayout:
        """Return the layout with fewer cuts: between two stages that are not split only those in `cuts` stay."""
        split = {*self.partial_outputs, *self.partial_inputs}
        stays = [i in split or i - 1 in split or cut in cuts for i, cut in enumerate(self.cuts, 1)]
        number = [0, *accumulate(map(int, stays))]  # of the joined stage, for each stage

        def joined(stages: tuple[int, ...]) -> tuple[int, ...]:
            return tuple(sorted({number[stage] for stage in stages}))

        ends = sorted({(number[start], number[end]) for start, end in self.skips})
        costs = [sum(c for n, c in zip(number, self.costs, strict=True) if n == i) for i in range(number[-1] + 1)]
        return TensorLayout(tuple(cut for cut, stay in zip(self.cuts, stays, strict=True) if stay),
                            joined(self.partial_outputs), joined(self.partial_inputs), joined(self.own_tokens),
                            tuple((start, end) for start, end in ends if start < end), tuple(costs),
                            self.vocabulary)  # fmt: skip


Group = tuple[str, int, int]


def _groups(network: Description, sequence: bool) -> list[Group]:
    """Return (kind, start, stop) of runs of layers: "vocabulary", "pair" or "classes", which are split over the ranks,
    "whole" (every rank has all), or "tokens" (each rank has its own)."""
    layers, n, i = network.layers, len(network.layers), 0
    result: list[Group] = []
    pairs = dict(_pairs(layers))
    scores = isinstance(layers[-1], Linear) and n - 1 not in pairs.values() and network.loss == "cross_entropy"
    while i < n:
        kind, stop = "whole", i + 1
        if i == n - 1 and scores:
            kind = "classes"
        elif isinstance(layers[i], bare.Embedding):
            kind = "vocabulary"
        elif i in pairs:
            kind, stop = "pair", pairs[i] + 1
        between_skips = isinstance(layers[i], bare.StashSkip) and i > 0 and isinstance(layers[i - 1], bare.AddSkip)
        if kind == "whole" and result and result[-1][0] == "whole" and not between_skips:  # there a pipeline may be cut
            result[-1] = ("whole", result[-1][1], stop)
        else:
            result.append((kind, i, stop))
        i = stop
    return [_of_tokens(network, result, i) for i in range(len(result))] if sequence else result


def _of_tokens(network: Description, groups: list[Group], index: int) -> Group:
    """Make a group one of own tokens, where all between two split groups treats each token alone."""
    low = high = index
    while low >= 0 and groups[low][0] == "whole":
        low -= 1
    while high < len(groups) and groups[high][0] == "whole":
        high += 1
    kind, start, stop = groups[index]
    if kind != "whole" or low < 0 or high == len(groups):
        return groups[index]
    between = range(groups[low][2], groups[high][1])
    alone = all(isinstance(network.layers[i], BY_TOKEN) and len(network.shapes[i]) == 2 for i in between)
    return ("tokens" if alone else "whole", start, stop)


def tensor_layout(network: Described, sequence: bool = False) -> TensorLayout:
    """Return where a network is cut for the tensor axis, for any number of ranks.

    Parameters
    ----------
    network : Network or Description
    sequence : bool
        Sequence parallelism: what stands between split products each rank computes for its own tokens only.

    Raises
    ------
    ValueError
        If `sequence` finds nothing that could be computed token by token.
    """
    network = network.description.opened()
    groups, costs = _groups(network, sequence), [cost.total for cost in network.costs()]
    if sequence and not any(kind == "tokens" for kind, _, _ in groups):
        raise ValueError("sequence=True asks for layers that treat each token alone between split products, and "
                         f"the {network.text} has none")  # fmt: skip
    kinds = [kind for kind, _, _ in groups]

    def stages(*wanted: str) -> tuple[int, ...]:
        return tuple(i for i, kind in enumerate(kinds) if kind in wanted)

    def ends(which: type) -> list[int]:
        held = [network.layers[start:stop] for _, start, stop in groups]
        found = {la.number: i for i, layers in enumerate(held) for la in layers if isinstance(la, which)}  # type: ignore
        return [found[number] for number in sorted(found)]

    skips = zip(ends(bare.StashSkip), ends(bare.AddSkip), strict=True)

    return TensorLayout(tuple(start for _, start, _ in groups[1:]), stages("vocabulary", "pair"),
                        stages("pair", "classes"), stages("tokens"),
                        tuple((start, end) for start, end in skips if start < end),
                        tuple(sum(costs[start:stop]) for _, start, stop in groups),
                        kinds[-1] == "classes")  # fmt: skip


def cut(network: Description, index: int, of: int, sequence: bool) -> list[Cut]:
    """Return each layer of one tensor rank, with what it holds of each parameter of the whole's layer.

    Raises
    ------
    ValueError
        If heads, widths, vocabulary or tokens cannot be divided, layers stand where each rank has a share only, or the
        uses of a tied tensor would be cut in different ways.
    """
    result: list[Cut] = []
    layers, shapes = network.layers, network.shapes
    for kind, start, stop in _groups(network, sequence):
        for i in range(start, stop):
            layer = layers[i]
            if kind == "tokens":
                if shapes[i][0] % of:
                    raise ValueError(f"sequence parallelism gives each of {of} tensor ranks as many tokens, which "
                                     f"samples of {shapes[i][0]} tokens do not allow")  # fmt: skip
                result.append(_by_token(layer, shapes[i], index, of))
            elif isinstance(layer, bare.Embedding):
                rows = part_of(layer.vocabulary, index, of, "a vocabulary of")
                result.append((replace(layer, rows=rows), [Piece((rows,))]))
            elif isinstance(layer, Linear) and kind in ("pair", "classes"):
                first = i == start
                result.append(_first(layer, index, of, layers[i + 1 : stop]) if first else _second(layer, index, of))
            elif kind == "pair" and isinstance(layer, bare.Heads):
                result.append((replace(layer, heads=layer.heads // of), []))
            elif kind == "pair" and isinstance(layer, bare.Dropout):
                raise ValueError(f"layer {i} of the opened network: Dropout between two split products: put it behind "
                                 "the second one, where every rank has all features")  # fmt: skip
            else:
                result.append((layer, [ALL] * len(layer.parameter_shapes(shapes[i]))))
    pieces = [piece for _, own in result for piece in own]
    for i, parameter in enumerate(network.parameters):
        if pieces[i] != pieces[parameter.owner]:
            raise ValueError(f"parameters {parameter.owner} and {i} are tied, one tensor, but tensor rank {index} of "
                             f"{of} would hold other parts of it in each use: use a plan without a tensor axis, or do "
                             "not tie these two")  # fmt: skip
    return result


def shard(network: Description, index: int, of: int, sequence: bool = False) -> Description:
    """Return the description of what tensor rank `index` of `of` computes, its containers opened.

    Raises
    ------
    ValueError
        As `cut`.
    """
    network = network.opened()
    layers = tuple(layer for layer, _ in cut(network, index, of, sequence))
    return replace(network, layers=layers, given_shapes=_shapes(network, layers, of, sequence))


def _shapes(network: Description, layers: Sequence[Layer], of: int, sequence: bool) -> tuple[Shape, ...]:
    """Return the shapes in front of a rank's layers, and the last output's; collectives change them between groups."""
    result: list[Shape] = []
    for kind, start, stop in _groups(network, sequence):
        shape = network.shapes[start]
        shape = (shape[0] // of, *shape[1:]) if kind == "tokens" else shape
        result[start:] = output_shapes(layers[start:stop], shape)
    return tuple(result)
