"""Tensor parallelism: the network of one tensor rank, and the whole from the ranks' parts.

How a network is split `bpkit.description.tensor` says; here its tensors are.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from bpkit.description import tensor as description
from bpkit.description.flat import Shape, part_bounds
from bpkit.description.layers import Layer
from bpkit.description.tensor import NONE, Piece, cut, tensor_layout
from bpkit.nn.losses import CrossEntropy, VocabularyCrossEntropy
from bpkit.nn.network import Network


def _index(piece: Piece, tensor: Tensor) -> Tensor:
    """Return the places of a piece along its dimension of a whole tensor."""
    ranges = piece.places(tensor.shape[piece.dim])
    return torch.cat([torch.arange(low, high) for low, high in ranges] or [torch.arange(0)]).to(tensor.device)


def shard(network: Network, index: int, of: int, sequence: bool = False) -> Network:
    """Return the network that tensor rank `index` of `of` computes, its containers opened.

    It is split into stages at the layout's cuts, as the whole is. Where the last stage's classes are split, its loss is
    a `VocabularyCrossEntropy` for this rank's classes.

    Raises
    ------
    ValueError
        If heads, widths, vocabulary or tokens cannot be divided, layers stand where each rank has a share only, or the
        uses of a tied tensor would be cut in different ways.
    """
    network = network.opened()
    form, loss = network.description, network.loss
    if isinstance(loss, CrossEntropy) and tensor_layout(form).vocabulary:
        classes = form.output_shape[-1]
        loss = VocabularyCrossEntropy(loss.ignore_index, *part_bounds(classes, of, index), classes)
    made = network.like(description.shard(form, index, of, sequence), loss)
    pieces = [piece for _, own in cut(form, index, of, sequence) for piece in own]
    held = zip(network.parameters(), pieces, strict=True)
    made.load([p.index_select(x.dim, _index(x, p)) for p, x in held if x != NONE])
    made.flat_buffers.copy_(network.flat_buffers)
    return made


def merge(network: Network, shards: Sequence[Sequence[Tensor]], add: bool = False, sequence: bool = False,
          within: float = math.inf) -> list[Tensor]:  # fmt: skip
    """Return whole tensors from those of all tensor ranks: the inverse of `shard`.

    Parameters
    ----------
    network : Network
        The whole one, for its form.
    shards : sequence of sequence of Tensor
        For each tensor rank its parameters (or gradients), in the order of its network's ``parameters()``.
    add : bool
        Sum what several ranks hold a share of, as for gradients before they are summed over the ranks
        (`Network.shares`); else rank 0's counts.
    sequence : bool
        As in `shard`.
    within : float
        What several ranks hold whole may differ from rank 0's by this share of its norm.

    Raises
    ------
    RuntimeError
        If it differs more.
    """
    network = network.opened()
    result = [torch.zeros_like(p) for p in network.parameters()]
    for index, tensors in enumerate(shards):
        cuts, given = cut(network.description, index, len(shards), sequence), iter(tensors)
        shares = [share for (la, own), s in zip(cuts, network.shapes, strict=False) for share in _partial(la, own, s)]
        pieces = [piece for _, own in cuts for piece in own]
        for number, (out, piece, share) in enumerate(zip(result, pieces, shares, strict=True)):
            if piece == NONE:
                continue
            value, where = next(given), _index(piece, out)
            if piece.ranges is None and index and not (add and share):
                if (value - out).norm() > within * out.norm():
                    raise RuntimeError(f"tensor rank {index} holds other values of parameter {number} than rank 0")
                continue
            out.index_add_(piece.dim, where, value) if add and share else out.index_copy_(piece.dim, where, value)
    return result


def _partial(layer: Layer, pieces: Sequence[Piece], shape: Shape) -> list[bool]:
    """Say of each parameter of the whole whether a rank's gradient is a share of the sum."""
    own = iter(layer.partial(shape))
    return [piece != NONE and next(own) for piece in pieces]
