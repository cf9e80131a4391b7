"""Atoms: the finest parts of a buffer that actions name."""

from collections.abc import Iterable
from fractions import Fraction
from math import lcm

from bpkit.plan.action import Part


class Atoms:
    """A flat buffer cut at every bound of some parts; an atom is what lies between two cuts.

    Bounds are whole numbers of one unit, so that none is ever rounded.
    """

    def __init__(self, parts: Iterable[Part]) -> None:
        known = set(parts)
        self._unit = lcm(*(part.of for part in known))
        self._bounds = sorted({0, self._unit, *(bound for part in known for bound in part.bounds(self._unit))})
        self._index = {bound: i for i, bound in enumerate(self._bounds)}
        self._inside: dict[Part | None, range] = {None: range(len(self))}  # what has been asked for

    def __len__(self) -> int:
        return len(self._bounds) - 1

    def inside(self, part: Part | None) -> range:
        """The atoms of a part whose bounds are named; None is the whole."""
        if part is not None and part not in self._inside:
            self._inside[part] = range(*(self._index[bound] for bound in part.bounds(self._unit)))
        return self._inside[part]

    def part(self, atom: int) -> Part:
        """An atom as a part."""
        return Part(self._bounds[atom], self._bounds[atom + 1], self._unit)

    def fractions(self, atom: int) -> tuple[Fraction, Fraction]:
        """The bounds of an atom as fractions of the buffer."""
        return Fraction(self._bounds[atom], self._unit), Fraction(self._bounds[atom + 1], self._unit)
