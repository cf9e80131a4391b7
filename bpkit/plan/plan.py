"""The plan: for every rank a list of actions.  It is written once; it is run, simulated and drawn."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from typing import Any, Final

from bpkit.plan.action import PARTNERS, PASSES, Action
from bpkit.plan.mesh import Coordinate, Mesh

#: What a plan is for: a training step, or a collective by itself over one buffer.
PURPOSES: Final = ("train", "all_reduce", "reduce_scatter", "all_gather", "broadcast", "all_to_all")

#: What a merge of gradients does: weight of a shard in LOSS, factor in UPDATE, and its class.
#: ``terms`` is the number of loss terms, n the number of data ranks (an empty shard counts as one).
MERGES: Final[dict[str, str]] = {
    "mean": "sum of the shards' gradient sums, divided once by the global number of terms (exact)",
    "mean-of-means": "mean over each shard, summed, divided by the number of ranks (the document's average)",
    "sum": "mean over each shard, summed, not divided (the document's sum)",
}


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(map(int, text.split()))


#: The lines of a plan's text between its name and its rows, in their order, and what reads each.
_LINES: Final[dict[str, Callable[[str], Any]]] = {
    "mesh": lambda text: Mesh(**{axis: int(size) for axis, size in (word.split("=") for word in text.split())}),
    "stages": int, "microbatches": int, "merge": str,
    **dict.fromkeys(("place", "cuts", "partial_outputs", "partial_inputs", "own_tokens", "servers"), _numbers),
    "tied": lambda text: tuple(map(_numbers, text.split(","))),
    "skips": lambda text: tuple(tuple(map(int, word.split("-"))) for word in text.split()),
    **dict.fromkeys(("opened", "expanded", "stashed"), "yes".__eq__),
    "purpose": str, "holds": str, **dict.fromkeys(("staleness", "gradient_buffers", "parameter_buffers"), int),
}  # fmt: skip


@dataclass(frozen=True)
class Plan:
    """A plan for one training step.

    Parameters
    ----------
    name : str
        How it was made, for example ``data_parallel(4, buckets=3)``.
    rows : tuple of tuples of Action
        One row a pipeline coordinate, shared by its data and tensor replicas; one row a (pipeline, data)
        coordinate, data fastest, where the plan is `expanded`.
    stages : int
        Number of stages, the atoms of the plan.
    mesh : Mesh
        Sizes of the axes.
    microbatches : int
        Microbatches into which each rank's shard is cut.
    merge : str
        A key of :data:`MERGES`.
    place : tuple of int, optional
        Pipeline coordinate of each stage; taken from the rows where it is not given.
    cuts : tuple of int, optional
        Layers at which a stage starts (without 0); None lets ``compile`` balance the stages.
    partial_outputs, partial_inputs : tuple of int
        Stages whose output (gradient of input) is only this tensor rank's share until a SUM_F (SUM_B).
    own_tokens : tuple of int
        Stages that a tensor rank computes for its own tokens only: a SCATTER_F (GATHER_B) comes before them on the way
        there (back), a GATHER_F (SCATTER_B) after them.
    skips : tuple of pairs of int
        Stages at which a skip connection starts and ends; both stand on one pipeline rank.
    opened : bool
        Whether `cuts` count the layers of the network with its containers opened (`Network.opened`).
    expanded : bool
        Whether data replicas have rows of their own.
    purpose : str
        One of :data:`PURPOSES`.
    holds : {"all", "own", "one"}
        What the gradient of each UPDATE must hold: every shard's every microbatch (once a step), one microbatch
        of the rank's own shard, or one microbatch of one shard.
    servers : tuple of int
        Data coordinates that hold no shard and only serve.
    staleness : int
        With ``holds="one"``: how many updates a gradient may be older than the parameters it updates.
    gradient_buffers, parameter_buffers : int
        Buffers that stages share in turn (see `room`); 0 gives each stage its own.
    tied : tuple of tuples of int
        Stages that use one tensor, for each such tensor.  The first of them on a pipeline rank holds it, and its
        others on that rank work in its memory; pipeline ranks hold copies (see `bpkit.plan.passes.tie`).
    stashed : bool
        Whether a backward uses the parameters that its forward used, kept over the updates between.

    Raises
    ------
    ValueError
        If the numbers do not fit each other.
    """

    name: str
    rows: tuple[tuple[Action, ...], ...]
    stages: int
    mesh: Mesh = field(default_factory=Mesh)
    microbatches: int = 1
    merge: str = "mean"
    place: tuple[int, ...] = ()
    cuts: tuple[int, ...] | None = None
    partial_outputs: tuple[int, ...] = ()
    partial_inputs: tuple[int, ...] = ()
    own_tokens: tuple[int, ...] = ()
    skips: tuple[tuple[int, int], ...] = ()
    opened: bool = False
    expanded: bool = False
    purpose: str = "train"
    holds: str = "all"
    servers: tuple[int, ...] = ()
    staleness: int = 0
    gradient_buffers: int = 0
    parameter_buffers: int = 0
    tied: tuple[tuple[int, ...], ...] = ()
    stashed: bool = False

    def __post_init__(self) -> None:
        if self.stages < 1 or self.microbatches < 1:
            raise ValueError(f"{self.name}: a plan needs at least one stage and one microbatch, not "
                             f"{self.stages} and {self.microbatches}")  # fmt: skip
        for what, known in (("merge", MERGES), ("purpose", PURPOSES), ("holds", ("all", "own", "one"))):
            if (given := getattr(self, what)) not in known:
                raise ValueError(f"{self.name}: unknown {what} {given!r}: choose one of {', '.join(known)}")
        needed = self.mesh.pipeline * (self.mesh.data if self.expanded else 1)
        if len(self.rows) != needed:
            each = "(pipeline, data) coordinate" if self.expanded else "pipeline coordinate"
            raise ValueError(f"{self.name}: {len(self.rows)} rows, but a mesh of {self.mesh} needs "
                             f"{needed}: one a {each}")  # fmt: skip
        if min(self.staleness, self.gradient_buffers, self.parameter_buffers) < 0:
            raise ValueError(f"{self.name}: a staleness and numbers of buffers are not negative")
        if self.cuts is not None and len(self.cuts) != self.stages - 1:
            raise ValueError(f"{self.name}: {self.stages} stages need {self.stages - 1} cuts, not {len(self.cuts)}")
        if not self.place:
            object.__setattr__(self, "place", self._places())
        if len(self.place) != self.stages or not {*self.place} <= {*range(self.mesh.pipeline)}:
            raise ValueError(f"{self.name}: place gives each of {self.stages} stages one of {self.mesh.pipeline} "
                             f"pipeline ranks, not {self.place}")  # fmt: skip
        if any(len(group) < 2 or list(group) != sorted({*group} & {*range(self.stages)}) for group in self.tied):
            raise ValueError(f"{self.name}: tied are two or more of {self.stages} stages, in order, not {self.tied}")
        for start, end in self.skips:
            if not 0 <= start < end < self.stages or self.place[start] != self.place[end]:
                raise ValueError(f"{self.name}: a skip connection from stage {start} to stage {end} needs both on one "
                                 "pipeline rank, in this order: give cuts that no skip connection goes past")
        for index, row in enumerate(self.rows):
            for action in row:
                self._fits(action, index)

    def __hash__(self) -> int:
        return hash((self.name, self.mesh, self.stages, self.microbatches, *map(len, self.rows)))  # all actions: slow

    def _places(self) -> tuple[int, ...]:
        """Where each stage's forwards stand."""
        per_row = self.mesh.data if self.expanded else 1
        found: dict[int, int] = {}
        for index, row in enumerate(self.rows):
            for action in row:
                if action.kind == "F" and found.setdefault(action.stage, index // per_row) != index // per_row:
                    raise ValueError(f"{self.name}: stage {action.stage} is run forward in rows of two pipeline ranks")
        missing = next((stage for stage in range(self.stages) if stage not in found), None)
        if missing is not None:
            raise ValueError(f"{self.name}: no row runs stage {missing} forward")
        return tuple(found[stage] for stage in range(self.stages))

    def _fits(self, action: Action, row: int) -> None:
        if (action.stage < self.stages and (action.mb is None or action.mb < self.microbatches)
                and (action.peer is None or (self.expanded and action.peer < self.mesh.data))):
            return
        if action.stage >= self.stages:
            why = f"the plan has stages 0 to {self.stages - 1}"
        elif action.mb is not None and action.mb >= self.microbatches:
            why = f"the plan has microbatches 0 to {self.microbatches - 1}"
        else:
            why = f"a peer is a coordinate on the data axis (0 to {self.mesh.data - 1}) of an expanded plan"
        raise ValueError(f"{self.name}: {action} in row {row}: {why}")

    @property
    def exact(self) -> bool:
        """Whether the plan must equal serial training (class *exact*); other plans are *defined*."""
        return self.merge == "mean" and self.holds == "all"

    def edge_collective(self, kind: str, stage: int) -> str:
        """The kind of the collective on the tensor axis that must follow an action of a stage; "" for none."""
        way, to = ("F", stage + 1) if kind == "F" else ("B", stage - 1)
        partial = self.partial_outputs if kind == "F" else self.partial_inputs
        if kind not in ("F", "B", "I") or to < 0:
            return ""
        if stage in self.own_tokens:
            return "" if to in self.own_tokens else f"GATHER_{way}"
        return (f"SCATTER_{way}" if to in self.own_tokens else f"SUM_{way}") if stage in partial else ""

    @cached_property
    def holders(self) -> tuple[dict[int, int], ...]:
        """For each tied tensor, the stage that holds it on each pipeline rank which uses it: the first."""
        return tuple({self.place[stage]: stage for stage in reversed(group)} for group in self.tied)

    @cached_property
    def lenders(self) -> tuple[tuple[int, ...], ...]:
        """For each stage, the other stages of its pipeline rank that hold a tensor which it uses."""
        found = [{at[self.place[stage]] for at, group in zip(self.holders, self.tied, strict=True) if stage in group}
                 for stage in range(self.stages)]  # fmt: skip
        return tuple(tuple(sorted(near - {stage})) for stage, near in enumerate(found))

    @cached_property
    def lending(self) -> frozenset[int]:
        """Stages that hold a tensor which another stage of their pipeline rank uses."""
        return frozenset(sum(self.lenders, ()))

    @property
    def copied(self) -> tuple[tuple[int, ...], ...]:
        """For each tied tensor of which several pipeline ranks hold copies: the stages that hold them."""
        return tuple(tuple(sorted(at.values())) for at in self.holders if len(at) > 1)

    def near(self, action: Action, letter: str) -> tuple[int, ...]:
        """The stages whose buffer of a letter an action touches: its own, and those that lend tensors to its pass."""
        lent = letter in "GP" and action.kind in PASSES
        return (action.stage, *(self.lenders[action.stage] if lent else ()))

    def room(self, letter: str, stage: int) -> int:
        """Which of a rank's buffers of a letter is a stage's: stages with one number share it in turn.

        What a stage lends to others must stay while they run, so it is never in a buffer that is shared.
        """
        count = {"G": self.gradient_buffers, "P": self.parameter_buffers}.get(letter, 0)
        return stage % count if count and stage not in self.lending else count + stage

    def rooms(self, letter: str, sizes: Mapping[int, int]) -> dict[int, int]:
        """Each buffer of a letter, by its number, and how large it must be for stages of given sizes."""
        numbers = {stage: self.room(letter, stage) for stage in sizes}
        return {n: max(sizes[stage] for stage in sizes if numbers[stage] == n) for n in numbers.values()}

    @property
    def workers(self) -> int:
        """Number of ranks that run the plan."""
        return self.mesh.size

    def row(self, at: Coordinate) -> tuple[Action, ...]:
        """The actions of the rank at a coordinate."""
        return self.rows[self.row_index(at)]

    def row_index(self, at: Coordinate) -> int:
        """Which row the rank at a coordinate runs."""
        return at.pipeline * self.mesh.data + at.data if self.expanded else at.pipeline

    def owned(self, pipeline: int) -> tuple[int, ...]:
        """Stages that live on a pipeline coordinate, in order."""
        return tuple(stage for stage, place in enumerate(self.place) if place == pipeline)

    def partner(self, at: Coordinate, action: Action) -> Coordinate:
        """Where the other end of a message of the rank at a coordinate stands."""
        if action.peer is not None:
            return Coordinate(at.pipeline, action.peer, at.tensor)
        after = (action.kind in PARTNERS) == action.kind.endswith("F")  # SEND_F and RECV_B face the next stage
        return Coordinate(self.place[action.stage + (1 if after else -1)], at.data, at.tensor)

    def with_rows(self, rows: Iterable[Iterable[Action]]) -> Plan:
        """The same plan with other rows."""
        return replace(self, rows=tuple(map(tuple, rows)))

    @cached_property
    def digest(self) -> str:
        """A name for the text of the plan that is the same in every process."""
        return hashlib.sha256(str(self).encode()).hexdigest()[:16]

    def __str__(self) -> str:
        lines, defaults = [f"plan {self.name}"], {f.name: f.default for f in fields(self)}
        for key in _LINES:
            value = ", ".join(map(_written, self.tied)) if key == "tied" else getattr(self, key)
            if key in ("microbatches", "merge") or value not in (defaults[key], (), ""):
                lines.append(f"{key} {_written(value)}")
        lines += ["row " + " ".join(map(str, row)) for row in self.rows]
        return "\n".join(lines)

    @classmethod
    def parse(cls, text: str) -> Plan:
        """Read the text form of a plan.

        Raises
        ------
        ValueError
            If a line is not of the form that ``str(plan)`` prints; the line is named.
        """
        values: dict[str, Any] = {}
        rows: list[tuple[Action, ...]] = []
        for number, line in enumerate(text.strip().splitlines(), 1):
            key, _, rest = line.strip().partition(" ")
            try:
                if key == "row":
                    rows.append(tuple(map(Action.parse, rest.split())))
                elif key == "plan":
                    values["name"] = rest
                elif key in _LINES:
                    values[key] = _LINES[key](rest)
                else:
                    raise ValueError(f"unknown key {key!r}")
            except (ValueError, TypeError) as error:
                raise ValueError(f"line {number} of the plan, {line.strip()!r}: {error}") from None
        return cls(rows=tuple(rows), **values)


def _written(value: object) -> str:
    """A value as `_LINES` reads it."""
    if isinstance(value, tuple):
        return " ".join("-".join(map(str, one)) if isinstance(one, tuple) else str(one) for one in value)
    return "yes" if value is True else str(value)


def scatters(row: Sequence[Action], stage: int) -> bool:
    """Whether a row scatters a stage's gradient, so that UPDATE without a part is of the rank's own part."""
    return any(action.kind == "SCATTER_GRAD" and action.stage == stage for action in row)


def grid(plan: Plan, marked: tuple[int, int] | None = None, around: int = 8) -> str:
    """The rank-by-step table of a plan, with one cell marked.

    Parameters
    ----------
    marked : (row, column), optional
        The cell to mark with ``>>`` and ``<<``; only `around` columns on each side of it are shown.
    """
    width = max(map(len, plan.rows), default=0)
    low = 0 if marked is None else max(0, marked[1] - around)
    high = width if marked is None else min(width, marked[1] + around + 1)

    def cell(row: int, column: int) -> str:
        text = str(plan.rows[row][column]) if column < len(plan.rows[row]) else ""
        return f">>{text or 'end of row'}<<" if marked == (row, column) else text

    numbers = range(low, high + (marked is not None))
    lines = [["step", *map(str, numbers)]]
    lines += [[f"row {r}", *(cell(r, c) for c in numbers)] for r in range(len(plan.rows))]
    widths = [8, *(max(map(len, column)) for column in list(zip(*lines, strict=True))[1:])]
    padded = ([text.ljust(width) for text, width in zip(line, widths, strict=True)] for line in lines)
    return "\n".join(f"{name}{'... ' if low else ''}{'  '.join(cells)}{' ...' if high < width else ''}".rstrip()
                     for name, *cells in padded)  # fmt: skip


class PlanError(ValueError):
    """A plan that must not be run; the message shows the grid of ranks and steps with the faulty cell marked."""

    def __init__(self, plan: Plan, row: int, column: int, why: str) -> None:
        action = plan.rows[row][column] if column < len(plan.rows[row]) else "the end of the row"
        super().__init__(f"{plan.name}: row {row}, {action}: {why}\n{grid(plan, (row, column))}")
