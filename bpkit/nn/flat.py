"""Flat memory: tensors one after another, each on a 64-byte boundary (`bpkit.description.flat` says where)."""

import math
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from bpkit.description.flat import ALIGNMENT, Shape
from bpkit.description.network import Described


def aligned(size: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return `size` zeros whose first element lies on a 64-byte boundary."""
    room = torch.zeros(size + ALIGNMENT // dtype.itemsize, dtype=dtype, device=device)
    skip = (-room.data_ptr() % ALIGNMENT) // dtype.itemsize
    return room[skip : skip + size]


def views(network: Described, lenders: Mapping[str, Described], what: str) -> tuple[Tensor, ...]:
    """Return the tensors that lie in a network's flat buffer, and in those of the stages that lend it some, by name."""
    lent = {name: getattr(net, f"flat_{what}")[net.description.tied_slices()[name]] for name, net in lenders.items()}
    flat, places = getattr(network, f"flat_{what}"), network.description.parameters
    return tuple((flat[p.slice] if p.held else lent[p.name]).view(p.shape) for p in places)


def packed(flat: Tensor, shapes: Sequence[Shape]) -> tuple[Tensor, ...]:
    """Return tensors that lie one after another, without gaps."""
    parts = flat.split(list(map(math.prod, shapes))) if shapes else ()
    return tuple(part.view(shape) for part, shape in zip(parts, shapes, strict=True))


def fitting(tensors: Iterable[Tensor], parameters: Sequence[Tensor]) -> list[Tensor]:
    """Return values that are given for parameters, or refuse them."""
    values = list(tensors)
    if len(values) != len(parameters):
        raise ValueError(f"the network has {len(parameters)} parameter tensors, not {len(values)}")
    for i, (own, given) in enumerate(zip(parameters, values, strict=True)):
        if own.shape != given.shape:
            raise ValueError(f"parameter {i} has shape {tuple(own.shape)}, not {tuple(given.shape)}")
    return values


def check_flat(name: str, flat: Tensor, size: int, dtype: torch.dtype) -> None:
    """Refuse a buffer that is not 1-D of `size` elements of `dtype`, on a 64-byte boundary."""
    if flat.shape != (size,) or flat.dtype is not dtype:
        raise ValueError(f"flat {name} must be 1-D with {size} elements of {dtype}, not {tuple(flat.shape)} of "
                         f"{flat.dtype}")  # fmt: skip
    if size and (flat.data_ptr() % ALIGNMENT or not flat.is_contiguous()):
        raise ValueError(f"flat {name} must be contiguous and start on a {ALIGNMENT}-byte boundary")
