"""Flat memory by numbers: where tensors lie in one buffer, which of them are one, and where its parts begin."""

import math
from collections.abc import Sequence

Shape = tuple[int, ...]

ALIGNMENT = 64  # bytes: a cache line, and the widest vector register; unaligned views change a product's bits


def part_bounds(size: int, parts: int, index: int, stop: int | None = None) -> tuple[int, int]:
    """First and last-plus-one element of part `index`, or of the parts up to `stop`, of `parts` of `size` elements.

    Parts differ by at most one element and always cover the buffer. Every part of anything is cut here.
    """
    return index * size // parts, (index + 1 if stop is None else stop) * size // parts


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
