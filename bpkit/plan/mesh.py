"""The grid of ranks: data, pipeline and tensor axes, with no global state."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

from bpkit.given import settle


class Coordinate(NamedTuple):
    """Where a rank stands on the mesh."""

    pipeline: int
    data: int
    tensor: int


@dataclass(frozen=True)
class Mesh:
    """Sizes of the three axes.  Ranks count tensor fastest, then data, then pipeline.

    Tensor neighbours exchange most and pipeline neighbours least, so this order puts the busiest groups
    closest together (the default order of Megatron-LM).

    Raises
    ------
    ValueError
        If a size is below 1.
    """

    data: int = 1
    pipeline: int = 1
    tensor: int = 1

    def __post_init__(self) -> None:
        settle(self, {"data": 1, "pipeline": 1, "tensor": 1})

    @property
    def size(self) -> int:
        """Number of ranks."""
        return self.data * self.pipeline * self.tensor

    def rank(self, at: Coordinate) -> int:
        """The global rank at a coordinate."""
        return (at.pipeline * self.data + at.data) * self.tensor + at.tensor

    def coordinate(self, rank: int) -> Coordinate:
        """The coordinate of a global rank."""
        rest, tensor = divmod(rank, self.tensor)
        pipeline, data = divmod(rest, self.data)
        return Coordinate(pipeline, data, tensor)

    def coordinates(self) -> Iterator[Coordinate]:
        """All coordinates, in the order of ranks."""
        return (self.coordinate(rank) for rank in range(self.size))

    def group(self, rank: int, axis: str) -> tuple[int, ...]:
        """The ranks that differ from `rank` only along `axis` (``"all"``: every rank), in order."""
        if axis == "all":
            return tuple(range(self.size))
        at = self.coordinate(rank)
        return tuple(self.rank(at._replace(**{axis: i})) for i in range(getattr(self, axis)))

    def __str__(self) -> str:
        return f"data={self.data} pipeline={self.pipeline} tensor={self.tensor}"
