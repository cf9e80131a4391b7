"""Tensor parallelism: the network of one tensor rank, and the whole from the ranks' parts.

A product x W^T is split by the rows of W (by columns of the mathematicians' W^T: each rank has some outputs), the next
one by its columns (each rank has some inputs), so that two products need one sum over the ranks forward and one
backward (Shoeybi et al. 2019, arXiv:1909.08053, section 3). The sum over the ranks of the shards' outputs, given the
whole input, is the whole's output; the sum of their input gradients, given the whole output gradient, is the whole's.
So a skip, the second bias and learned positions belong to rank 0 alone.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from bpkit.nn.attention import Heads
from bpkit.nn.containers import Residual, Sequential
from bpkit.nn.dropout import Dropout
from bpkit.nn.embedding import Embedding, Positions
from bpkit.nn.layer import Elementwise, Layer, Shape
from bpkit.nn.layers import LayerNorm, Linear
from bpkit.nn.losses import CrossEntropy, VocabularyCrossEntropy
from bpkit.nn.network import Network

Range = tuple[int, int]


@dataclass(frozen=True)
class Piece:
    """What a tensor rank holds of a parameter: these ranges along `dim`, or nothing, or (None) all of it."""

    ranges: tuple[Range, ...] | None = None
    dim: int = 0

    def index(self, shape: Shape) -> Tensor:
        """Return the places along `dim`."""
        ranges = ((0, shape[self.dim]),) if self.ranges is None else self.ranges
        return torch.cat([torch.arange(low, high) for low, high in ranges] or [torch.arange(0)])


Cut = tuple[Layer, list[Piece]]
ALL, NONE = Piece(), Piece(())


def _part(size: int, index: int, of: int, what: str) -> Range:
    if size < of:
        raise ValueError(f"{what} {size} cannot be divided among {of} tensor ranks")
    return index * size // of, (index + 1) * size // of


def _first(layer: Linear, index: int, of: int, heads: Heads | None) -> Cut:
    """A product of which each rank has some outputs; in front of `Heads` those of whole heads, of q, k and v."""
    if heads is None:
        ranges = [_part(layer.outputs, index, of, "a width of")]
    else:
        if heads.heads % of:
            raise ValueError(f"{heads.heads} heads cannot be divided among {of} tensor ranks")
        third, part = layer.outputs // 3, layer.outputs // (3 * of)
        ranges = [(i * third + index * part, i * third + (index + 1) * part) for i in range(3)]
    piece = Piece(tuple(ranges))
    return replace(layer, outputs=sum(high - low for low, high in ranges)), [piece] * (1 + layer.bias)


def _second(layer: Linear, index: int, of: int) -> Cut:
    """A product of which each rank has some inputs; the bias is rank 0's."""
    low, high = _part(layer.inputs, index, of, "a width of")
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
        elif not isinstance(layer, Elementwise | Heads):
            start = None
    return found


def _inside(layers: Sequence[Layer], index: int, of: int) -> list[Cut]:
    """Cut the layers inside a container: norms, one pair of products, dropout."""
    flat: list[Layer] = []
    for layer in layers:
        flat += layer.layers if type(layer) is not Residual and isinstance(layer, Sequential) else [layer]
    pairs = _pairs(flat)
    if len(pairs) != 1:
        raise ValueError("a tensor axis cuts one pair of Linear layers in a container, and finds "
                         f"{len(pairs)} in {flat}")  # fmt: skip
    (a, b), result = pairs[0], []
    for i, layer in enumerate(flat):
        heads = flat[a + 1] if isinstance(flat[a + 1], Heads) else None
        if i == a:
            result.append(_first(layer, index, of, heads))  # type: ignore[arg-type]
        elif i == b:
            result.append(_second(layer, index, of))  # type: ignore[arg-type]
        elif a < i < b and isinstance(layer, Dropout):
            raise ValueError("Dropout between two split products: put it at the end, where every rank has all features")
        elif isinstance(layer, Heads):
            result.append((replace(layer, heads=layer.heads // of), []))
        elif i > b and not isinstance(layer, Dropout):
            raise ValueError(f"{layer!r} stands behind the pair of Linear layers, where each rank has a share only")
        elif isinstance(layer, LayerNorm):
            result.append((replace(layer, shared=True), [ALL, ALL]))
        else:
            result.append((layer, []))
    return result


@dataclass(frozen=True)
class TensorLayout:
    """Where a network is cut for the tensor axis: what `bpkit.plan.tensor_parallel` asks for.

    Parameters
    ----------
    cuts : tuple of int
        Layers at which stages 1, 2, ... start.
    partial_outputs, partial_inputs : tuple of int
        Stages whose output (gradient of input) is to be summed over the tensor ranks.
    costs : tuple of int
        FLOPs of each stage's F, I and W a sample.
    vocabulary : bool
        The last stage gives each rank's scores of its classes only, for `VocabularyCrossEntropy`.
    """

    cuts: tuple[int, ...]
    partial_outputs: tuple[int, ...]
    partial_inputs: tuple[int, ...]
    costs: tuple[int, ...]
    vocabulary: bool


def _groups(network: Network) -> list[tuple[str, int, int]]:
    """Return (kind, start, stop) of runs of layers: "tokens", "pair", "classes", or "whole" (every rank has all)."""
    layers, n, i = network.layers, len(network.layers), 0
    result: list[tuple[str, int, int]] = []
    pairs = dict(_pairs(layers))
    scores = isinstance(layers[-1], Linear) and n - 1 not in pairs.values() and isinstance(network.loss, CrossEntropy)
    norm = n - 1 - (n > 1 and isinstance(layers[-2], LayerNorm))
    while i < n:
        if i == norm and scores:
            kind, stop = "classes", n
        elif isinstance(layers[i], Embedding):
            kind, stop = "tokens", i + 1
        elif isinstance(layers[i], Sequential):
            kind, stop = "pair", i + 1
        elif i in pairs:
            kind, stop = "pair", pairs[i] + 1
        else:
            kind, stop = "whole", i + 1
        tail = (Positions, Dropout) if kind == "tokens" else (Dropout,) if kind == "pair" else ()
        while stop < n and isinstance(layers[stop], tail):
            stop += 1
        if kind == "whole" and result and result[-1][0] == "whole":
            result[-1] = ("whole", result[-1][1], stop)
        else:
            result.append((kind, i, stop))
        i = stop
    return result


def tensor_layout(network: Network) -> TensorLayout:
    """Return where a network is cut for the tensor axis, for any number of ranks."""
    groups, costs = _groups(network), [cost.total for cost in network.costs()]
    return TensorLayout(tuple(start for _, start, _ in groups[1:]),
                        tuple(i for i, (kind, _, _) in enumerate(groups) if kind in ("tokens", "pair")),
                        tuple(i for i, (kind, _, _) in enumerate(groups) if kind in ("pair", "classes")),
                        tuple(sum(costs[start:stop]) for _, start, stop in groups),
                        groups[-1][0] == "classes")  # fmt: skip


def _cut(network: Network, index: int, of: int) -> list[Cut]:
    """Return each layer of one tensor rank, with what it holds of each parameter of the whole's layer."""
    result: list[Cut] = []
    counts = [len(la.parameter_shapes(s)) for la, s in zip(network.layers, network.shapes, strict=False)]
    for kind, start, stop in _groups(network):
        for i in range(start, stop):
            layer = network.layers[i]
            pieces = [ALL] * counts[i]
            if isinstance(layer, Sequential) and kind == "pair":
                cuts = _inside(layer.layers, index, of)
                skip = isinstance(layer, Residual) and index == 0
                made = (Residual if skip else Sequential)(*(la for la, _ in cuts))
                result.append((made, [piece for _, own in cuts for piece in own]))
            elif isinstance(layer, Embedding):
                rows = _part(layer.vocabulary, index, of, "a vocabulary of")
                result.append((replace(layer, rows=rows), [Piece((rows,))]))
            elif isinstance(layer, Positions) and kind == "tokens":
                result.append((replace(layer, held=index == 0), [ALL if index == 0 else NONE]))
            elif kind == "classes" and isinstance(layer, Linear):
                result.append(_first(layer, index, of, None))
            elif kind == "classes" and isinstance(layer, LayerNorm):
                result.append((replace(layer, shared=True), pieces))
            elif kind == "pair" and isinstance(layer, Linear):
                result.append(_first(layer, index, of, None) if i == start else _second(layer, index, of))
            elif (kind == "pair" and isinstance(layer, Dropout)
                  and any(isinstance(later, Linear) for later in network.layers[i:stop])):  # fmt: skip
                raise ValueError(f"layer {i}: Dropout between two split products: put it behind the second one")
            else:
                result.append((layer, pieces))
    return result


def shard(network: Network, index: int, of: int) -> Network:
    """Return the network that tensor rank `index` of `of` computes; it is split into stages as the whole is.

    Where the last stage's classes are split, its loss is a `VocabularyCrossEntropy` for this rank's classes.

    Raises
    ------
    ValueError
        If heads, widths or vocabulary are too few to be divided, or layers stand where each rank has a share only.
    """
    cuts = _cut(network, index, of)
    loss = network.loss
    if isinstance(loss, CrossEntropy) and _groups(network)[-1][0] == "classes":
        low, high = _part(network.output_shape[-1], index, of, "a vocabulary of")
        loss = VocabularyCrossEntropy(loss.ignore_index, low, high, network.output_shape[-1])
    made = network.like(tuple(layer for layer, _ in cuts), loss)
    pieces = [piece for _, own in cuts for piece in own]
    held = zip(network.parameters(), pieces, strict=True)
    made.load([p.index_select(x.dim, x.index(tuple(p.shape)).to(p.device)) for p, x in held if x != NONE])
    made.flat_buffers.copy_(network.flat_buffers)
    return made


def merge(network: Network, shards: Sequence[Sequence[Tensor]], add: bool = False) -> list[Tensor]:
    """Return whole tensors from those of all tensor ranks: the inverse of `shard`.

    Parameters
    ----------
    network : Network
        The whole one, for its form.
    shards : sequence of sequence of Tensor
        For each tensor rank its parameters (or gradients), in the order of its network's ``parameters()``.
    add : bool
        Sum what several ranks hold, as for gradients before they are summed over the ranks (`Network.shares`);
        else rank 0's counts.
    """
    result = [torch.zeros_like(p) for p in network.parameters()]
    for index, tensors in enumerate(shards):
        cuts, given = _cut(network, index, len(shards)), iter(tensors)
        shares = [share for (la, own), s in zip(cuts, network.shapes, strict=False) for share in _partial(la, own, s)]
        pieces = [piece for _, own in cuts for piece in own]
        for out, piece, share in zip(result, pieces, shares, strict=True):
            if piece == NONE:
                continue
            value, where = next(given), piece.index(tuple(out.shape)).to(out.device)
            if piece.ranges is None and index and not (add and share):
                continue
            out.index_add_(piece.dim, where, value) if add and share else out.index_copy_(piece.dim, where, value)
    return result


def _partial(layer: Layer, pieces: Sequence[Piece], shape: Shape) -> list[bool]:
    """Say of each parameter of the whole whether a rank's gradient is a share of the sum."""
    own = iter(layer.partial(shape))
    return [piece != NONE and next(own) for piece in pieces]
