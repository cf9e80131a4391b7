"""Provenance: a plan run on multisets of (data shard, microbatch) instead of numbers.

Every rank's gradient of every stage is a multiset of contributions, one for each *atom*: the finest parts
that any action names.  A forward or backward moves marks along the edges; a reduction adds multisets; an
update demands that its part holds every contribution exactly once.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from fractions import Fraction
from itertools import pairwise

from bpkit.plan.actions import Action, Buffer, Part, buffer, stage_of
from bpkit.plan.mesh import Coordinate
from bpkit.plan.plan import Plan, PlanError

Contributions = Counter[object]
STALE = "a gradient of an earlier step"
SCATTERED = "a part that was scattered to another rank"


@dataclass
class Holdings:
    """What one rank holds while the plan is run on multisets."""

    at: Coordinate
    index: int  # its row in the plan
    row: tuple[Action, ...]
    edges: dict[Buffer, frozenset[int]] = field(default_factory=dict)  # A, D, S, K: tensor shares held
    gradients: dict[int, list[Contributions]] = field(default_factory=dict)  # by stage, then atom
    versions: dict[int, list[int | None]] = field(default_factory=dict)  # parameters: updates seen, None: not held


Members = list[tuple[Holdings, int]]


class Provenance:
    """The effects of actions on multisets."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.atoms = _atoms(plan)
        self.whole = frozenset(range(plan.mesh.tensor))

    def holdings(self, at: Coordinate) -> Holdings:
        """What the rank at a coordinate holds before the step."""
        rank = Holdings(at, self.plan.row_index(at), self.plan.row(at))
        for stage in self.plan.owned(at.pipeline):
            rank.gradients[stage] = [Counter({STALE: 1}) for _ in self.atoms]
            touching = [a.kind for a in rank.row if a.stage == stage and a.kind in ("F", "UNSHARD")]
            sharded = touching[:1] == ["UNSHARD"]
            rank.versions[stage] = [
                0 if not sharded or self.owner(i) == at.data else None for i in range(len(self.atoms))
            ]
        return rank

    def owner(self, atom: int) -> int:
        """The data rank whose part [d/D] contains an atom."""
        return int(self.atoms[atom][0] * self.plan.mesh.data)

    def fail(self, rank: Holdings, index: int, why: str) -> None:
        """Refuse the plan for what one action does."""
        raise PlanError(self.plan, rank.index, index, why)

    def compute(self, rank: Holdings, index: int) -> None:
        """A compute action, or one that moves no bytes."""
        _COMPUTE[rank.row[index].kind](self, rank, index, rank.row[index])

    def collective(self, members: Members, action: Action) -> None:
        """A collective, once all members of its group have started it (in the order of the axis)."""
        _GROUP[action.kind](self, members, action)

    def inside(self, part: Part | None) -> list[int]:
        low, high = (Fraction(0), Fraction(1)) if part is None else part.fractions()
        return [i for i, (a, b) in enumerate(self.atoms) if low <= a and b <= high]

    def take(self, rank: Holdings, index: int, action: Action) -> object:
        """What a send carries."""
        if action.kind == "SEND_G":
            if action.stage not in rank.gradients:
                self.fail(rank, index, f"this rank does not hold stage {action.stage}")
            return [Counter(rank.gradients[action.stage][i]) for i in self.inside(action.part)]
        buf = buffer(action, action.verb.reads[0])
        value = self.whole_edge(rank, index, buf)
        rank.edges.pop(buf)
        return value

    def deliver(self, rank: Holdings, index: int, message: object) -> None:
        action = rank.row[index]
        if action.kind in ("ADD_G", "RECV_G"):
            assert isinstance(message, list)
            if action.stage not in rank.gradients:
                self.fail(rank, index, f"this rank does not hold stage {action.stage}")
            for i, counts in zip(self.inside(action.part), message, strict=True):
                mine = rank.gradients[action.stage][i]
                rank.gradients[action.stage][i] = mine + counts if action.kind == "ADD_G" else Counter(counts)
            return
        assert isinstance(message, frozenset)
        rank.edges[buffer(action, action.verb.writes[0])] = message

    def whole_edge(self, rank: Holdings, index: int, buf: Buffer) -> frozenset[int]:
        """An activation or its gradient that must be there, and be the sum over the tensor axis."""
        names = {"A": "input", "D": "gradient of output", "S": "saved state", "K": "input half"}
        if buf not in rank.edges:
            self.fail(
                rank, index, f"its {names[buf.letter]} (edge {buf.stage}, microbatch {buf.mb}) is not on this rank"
            )
        if rank.edges[buf] != self.whole:
            self.fail(rank, index, f"it reads a partial sum: {len(rank.edges[buf])} of {len(self.whole)} tensor ranks")
        return rank.edges[buf]

    def fresh_weights(self, rank: Holdings, index: int, stage: int) -> None:
        """Forward and backward must see whole weights of before this step's update."""
        if stage not in rank.versions:
            self.fail(rank, index, f"stage {stage} does not live on this rank")
        if None in rank.versions[stage]:
            self.fail(rank, index, f"it reads parameters of stage {stage} that are sharded: UNSHARD comes first")
        if any(rank.versions[stage]):
            self.fail(rank, index, f"it reads parameters of stage {stage} that were already updated in this step")

    def expected(self) -> Contributions:
        """What a complete gradient holds: every shard's every microbatch, once."""
        return Counter({(d, m): 1 for d in range(self.plan.mesh.data) for m in range(self.plan.microbatches)})

    def complete(self, rank: Holdings, index: int, stage: int, atom: int) -> bool:
        """Refuse a gradient that is read as complete and is not."""
        held = rank.gradients[stage][atom]
        wanted = self.expected()
        if held == wanted:
            return True
        missing, extra = wanted - held, held - wanted
        parts = [f"it lacks {_say(missing)}"] * bool(missing) + [f"it holds {_say(extra)} too often"] * bool(extra)
        low, high = self.atoms[atom]
        self.fail(
            rank,
            index,
            f"the gradient of stage {stage} from {low} to {high} is not the sum of all shards: " + " and ".join(parts),
        )
        return False

    def finish(self, rank: Holdings) -> None:
        """After the last action: everything consumed, every part updated exactly once."""
        end = len(rank.row)
        left = [buf for buf in rank.edges if buf.letter in "AK"]
        if left:
            self.fail(rank, end, f"edge {left[0].stage}, microbatch {left[0].mb} was produced and never used")
        for stage, versions in rank.versions.items():
            resharded = None in versions
            for atom, version in enumerate(versions):
                mine = not resharded or self.owner(atom) == rank.at.data
                if mine and version != 1:
                    self.fail(rank, end, f"stage {stage} was updated {version or 0} times in this step, not once")


def _atoms(plan: Plan) -> list[tuple[Fraction, Fraction]]:
    """The finest parts that any action of the plan names, and the shards of the data axis."""
    bounds = {Fraction(d, plan.mesh.data) for d in range(plan.mesh.data + 1)}
    for row in plan.rows:
        for action in row:
            if action.part is not None:
                bounds.update(action.part.fractions())
    ordered = sorted(bounds)
    return list(pairwise(ordered))


def _say(counts: Contributions) -> str:
    """A few contributions in words."""
    words = [str(c) if isinstance(c, str) else f"shard {c[0]} microbatch {c[1]}" for c in list(counts)[:3]]  # type: ignore[index]
    return ", ".join(words) + (f" and {len(counts) - 3} more" if len(counts) > 3 else "")


# -- compute actions ---------------------------------------------------------------------------------------


def _zero(world: Provenance, rank: Holdings, index: int, action: Action) -> None:
    if action.stage not in rank.gradients:
        world.fail(rank, index, f"stage {action.stage} does not live on this rank")
    rank.gradients[action.stage] = [Counter() for _ in world.atoms]


def _forward(world: Provenance, rank: Holdings, index: int, action: Action) -> None:
    world.fresh_weights(rank, index, action.stage)
    if action.stage > 0:
        world.whole_edge(rank, index, Buffer("A", action.stage, action.mb))
    saved = Buffer("S", action.stage, action.mb)
    if saved in rank.edges:
        world.fail(rank, index, "this forward already ran and its backward has not")
    partial = action.stage in world.plan.partial_outputs
    rank.edges[Buffer("A", action.stage + 1, action.mb)] = frozenset({rank.at.tensor}) if partial else world.whole
    rank.edges[saved] = world.whole


def _loss(world: Provenance, rank: Holdings, index: int, action: Action) -> None:
    if action.stage != world.plan.stages - 1:
        world.fail(rank, index, f"the loss follows the last stage, {world.plan.stages - 1}")
    world.whole_edge(rank, index, Buffer("A", action.stage + 1, action.mb))
    del rank.edges[Buffer("A", action.stage + 1, action.mb)]
    rank.edges[Buffer("D", action.stage + 1, action.mb)] = world.whole


def _input_half(world: Provenance, rank: Holdings, index: int, action: Action) -> None:
    world.fresh_weights(rank, index, action.stage)
    world.whole_edge(rank, index, Buffer("D", action.stage + 1, action.mb))
    world.whole_edge(rank, index, Buffer("S", action.stage, action.mb))
    partial = action.stage in world.plan.partial_inputs
    rank.edges[Buffer("D", action.stage, action.mb)] = frozenset({rank.at.tensor}) if partial else world.whole
    rank.edges[Buffer("K", action.stage, action.mb)] = world.whole


def _weight_half(world: Provenance, rank: Holdings, index: int, action: Action) -> None:
    world.whole_edge(rank, index, Buffer("K", action.stage, action.mb))
    for buf in (
        Buffer("K", action.stage, action.mb),
        Buffer("S", action.stage, action.mb),
        Buffer("D", action.stage + 1, action.mb),
        Buffer("A", action.stage, action.mb),
    ):
        rank.edges.pop(buf, None)
    for counts in rank.gradients[action.stage]:
        counts[(rank.at.data, action.mb)] += 1


def _backward(world: Provenance, rank: Holdings, index: int, action: Action) -> None:
    _input_half(world, rank, index, action)
    _weight_half(world, rank, index, action)


def _recompute(world: Provenance, rank: Holdings, index: int, action: Action) -> None:
    world.fresh_weights(rank, index, action.stage)
    if action.stage > 0:
        world.whole_edge(rank, index, Buffer("A", action.stage, action.mb))
    rank.edges[Buffer("S", action.stage, action.mb)] = world.whole


def _update(world: Provenance, rank: Holdings, index: int, action: Action) -> None:
    versions = rank.versions.get(action.stage)
    if versions is None:
        return world.fail(rank, index, f"stage {action.stage} does not live on this rank")
    for atom in world.inside(action.part):
        world.complete(rank, index, action.stage, atom)
        held = versions[atom]
        if held is None:
            return world.fail(rank, index, f"this part of stage {action.stage} is not on this rank")
        versions[atom] = held + 1


def _reshard(world: Provenance, rank: Holdings, index: int, action: Action) -> None:
    versions = rank.versions[action.stage]
    rank.versions[action.stage] = [v if world.owner(i) == rank.at.data else None for i, v in enumerate(versions)]


# -- collectives -------------------------------------------------------------------------------------------


def _reduce(world: Provenance, members: Members, action: Action) -> None:
    for atom in range(len(world.atoms)):
        total: Contributions = Counter()
        for rank, _ in members:
            total.update(rank.gradients[action.stage][atom])
        for rank, _ in members:
            rank.gradients[action.stage][atom] = Counter(total)


def _scatter(world: Provenance, members: Members, action: Action) -> None:
    _reduce(world, members, action)
    for rank, _ in members:
        for atom in range(len(world.atoms)):
            if world.owner(atom) != rank.at.data:
                rank.gradients[action.stage][atom] = Counter({SCATTERED: 1})


def _unshard(world: Provenance, members: Members, action: Action) -> None:
    owned = [members[world.owner(atom)][0].versions[action.stage][atom] for atom in range(len(world.atoms))]
    for rank, _ in members:
        rank.versions[action.stage] = list(owned)


def _average(world: Provenance, members: Members, action: Action) -> None:
    rank, index = members[0]
    if world.plan.exact:
        world.fail(rank, index, "averaging parameters does not equal serial training; an exact plan merges gradients")


def _sum_edges(touch: int) -> Callable[[Provenance, Members, Action], None]:
    def add(world: Provenance, members: Members, action: Action) -> None:
        buf = buffer(action, action.verb.writes[0])
        for rank, index in members:
            if buf not in rank.edges:
                world.fail(rank, index, f"there is nothing on edge {stage_of(buf)} to sum")
            if rank.edges[buf] == world.whole and len(members) > 1:
                world.fail(
                    rank, index, f"edge {stage_of(buf)} is not a partial sum: it would be counted {len(members)} times"
                )
        total = frozenset().union(*(rank.edges[buf] for rank, _ in members))
        for rank, _ in members:
            rank.edges[buf] = total

    return add


def _norm(world: Provenance, members: Members, action: Action) -> None:
    for rank, index in members:
        for stage, atoms in rank.gradients.items():
            for atom, counts in enumerate(atoms):
                if counts != Counter({SCATTERED: 1}):
                    world.complete(rank, index, stage, atom)


_COMPUTE: dict[str, Callable[[Provenance, Holdings, int, Action], None]] = {
    "ZERO": _zero,
    "F": _forward,
    "LOSS": _loss,
    "B": _backward,
    "I": _input_half,
    "W": _weight_half,
    "RECOMPUTE": _recompute,
    "UPDATE": _update,
    "RESHARD": _reshard,
}
_GROUP: dict[str, Callable[[Provenance, Members, Action], None]] = {
    "REDUCE_GRAD": _reduce,
    "SCATTER_GRAD": _scatter,
    "UNSHARD": _unshard,
    "AVERAGE": _average,
    "SUM_F": _sum_edges(1),
    "SUM_B": _sum_edges(0),
    "NORM": _norm,
}
