"""Flat memory: tensors one after another, each on a 64-byte boundary, and tensors that are one."""

import math
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from bpkit.nn.layer import Shape

ALIGNMENT = 64  # bytes: a cache line, and the widest vector register; unaligned views change a product's bits


def owners(names: Sequence[str], shapes: Sequence[Shape]) -> list[int]:
    """Return, for each parameter, the first one of its name: they are one tensor. Without a name each is its own.

    Raises
    ------
    ValueError
        If parameters of one name differ in shape.
    """
    result = [names.index(name) if name else i for i, name in enumerate(names)]
    for i, owner in enumerate(result):
        if shapes[i] != shapes[owner]:
            raise ValueError(f"tied as {names[i]!r}: parameters of shapes {shapes[owner]} and {shapes[i]} are not one")
    return result


def added(order: Sequence[int], own: Sequence[int]) -> tuple[bool, ...]:
    """Return, for each parameter, whether backward has written its tensor's gradient before: it is then added to.

    Of the uses of a tensor the last in the network comes first in `order`, and writes.
    """
    written: set[int] = set()
    result = [False] * len(own)
    for i in order:
        result[i] = own[i] in written
        written.add(own[i])
    return tuple(result)


def lay_out(order: Sequence[int], own: Sequence[int], shapes: Sequence[Shape], itemsize: int) -> tuple[list[int], int]:
    """Return where each tensor starts, and the size of it all: in `order`, a tied one where its gradient is whole."""
    line, offset, offsets = ALIGNMENT // itemsize, 0, [0] * len(shapes)
    for i in order:
        if own[i] == i:
            offsets[i] = offset
            offset += -(-math.prod(shapes[i]) // line) * line
    return [offsets[i] for i in own], offset


def aligned(size: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return `size` zeros whose first element lies on a 64-byte boundary."""
    room = torch.zeros(size + ALIGNMENT // dtype.itemsize, dtype=dtype, device=device)
    skip = (-room.data_ptr() % ALIGNMENT) // dtype.itemsize
    return room[skip : skip + size]


def views(flat: Tensor, offsets: Sequence[int], shapes: Sequence[Shape]) -> tuple[Tensor, ...]:
    """Return the tensors that lie in a flat buffer."""
    return tuple(flat[start : start + math.prod(shape)].view(shape)
                 for start, shape in zip(offsets, shapes, strict=True))  # fmt: skip


def check_flat(name: str, flat: Tensor, size: int, dtype: torch.dtype) -> None:
    """Refuse a buffer that is not 1-D of `size` elements of `dtype`, on a 64-byte boundary."""
    if flat.shape != (size,) or flat.dtype is not dtype:
        raise ValueError(f"flat {name} must be 1-D with {size} elements of {dtype}, not {tuple(flat.shape)} of "
                         f"{flat.dtype}")  # fmt: skip
    if size and (flat.data_ptr() % ALIGNMENT or not flat.is_contiguous()):
        raise ValueError(f"flat {name} must be contiguous and start on a {ALIGNMENT}-byte boundary")


def as_bytes(flat: Tensor) -> NDArray[np.uint8]:
    """Return a flat buffer as bytes on the CPU: of any dtype, also those that NumPy lacks."""
    return flat.cpu().view(torch.uint8).numpy()
