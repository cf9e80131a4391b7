"""Provenance: a plan run on multisets of (data shard, microbatch) instead of numbers.

Every rank's gradient of every stage is a multiset of contributions, one for each *atom*: the finest parts
that any action names.  A forward or backward moves marks along the edges; a reduction adds multisets; an
update demands that its part holds every contribution exactly once.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import product
from typing import Any, NamedTuple, NoReturn

from bpkit.plan.action import Action, Part, buffer
from bpkit.plan.checker.atoms import Atoms
from bpkit.plan.mesh import Coordinate
from bpkit.plan.plan import Plan, PlanError


class Contributions(NamedTuple):
    """A multiset of contributions, each of which is one bit: those that are there, and those that came again.

    How often a contribution came again does not matter: once is right, and more is wrong.
    """

    there: int = 0
    again: int = 0

    def plus(self, more: "Contributions") -> "Contributions":
        """Both together."""
        return Contributions(self.there | more.there, self.again | more.again | self.there & more.there)


NOTHING = Contributions()
STALE = Contributions(1)  # a gradient of an earlier step; other bits are of (data shard, microbatch, tensor rank)
Edge = tuple[str, int, int | None]  # a buffer of an edge: A, D, S or K, its number, the microbatch
Shares = frozenset[tuple[int, int]]  # of an edge: part of the tokens, and tensor rank that has contributed to it


class Facts:
    """What a row says before it runs, looked up once."""

    def __init__(self, row: Sequence[Action]) -> None:
        self.recomputed = {(a.stage, a.mb) for a in row if a.kind == "RECOMPUTE"}
        self.scattered = {a.stage for a in row if a.kind == "SCATTER_GRAD"}
        self.gathered = {a.stage for a in row if a.kind == "UNSHARD"}
        self.updates = [a for a in row if a.kind == "UPDATE"]
        self.updated_whole = {a.stage for a in self.updates if a.part is None}
        self.clipped = any(a.kind == "NORM" for a in row)
        first = {a.stage: a.kind for a in reversed(row) if a.kind in ("F", "UNSHARD")}
        self.sharded = {stage for stage, kind in first.items() if kind == "UNSHARD"}  # the step begins with parts only


@dataclass
class Holdings:
    """What one rank holds while the plan is run on multisets."""

    at: Coordinate
    index: int  # its row in the plan
    row: tuple[Action, ...]
    facts: Facts
    own_tokens: Shares  # a complete sum of this rank's own tokens
    own_share: Shares  # what it contributes to the sum of all tokens
    edges: dict[Edge, Shares] = field(default_factory=dict)
    gradients: dict[int, list[Contributions]] = field(default_factory=dict)  # by stage, then atom
    reduced: dict[int, list[Contributions]] = field(default_factory=dict)  # what scatters gave this rank's own part
    versions: dict[int, list[int | None]] = field(default_factory=dict)  # parameters: updates seen, None: not held
    # Version that each forward read, of its own stage and of those in whose memory it works.
    seen: dict[tuple[int, int | None, int], int] = field(default_factory=dict)
    averaged: set[int] = field(default_factory=set)  # stages whose parameters are the mean over data ranks
    normed: bool = False  # whether the global norm of the gradient is known


Members = list[tuple[Holdings, int]]


class Provenance:
    """The effects of actions on multisets."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        shards = [Part(d, d + 1, plan.mesh.data) for d in range(plan.mesh.data)]
        self.atoms = Atoms([*shards, *(a.part for row in plan.rows for a in row if a.part is not None)])
        self.owner = [d for d, part in enumerate(shards) for _ in self.atoms.inside(part)]  # of each atom
        ranks = range(plan.mesh.tensor)
        self.whole: Shares = frozenset(product(ranks if plan.own_tokens else [0], ranks))
        self.split = frozenset(plan.own_tokens)
        self._widths = max(plan.microbatches, plan.mesh.data), plan.mesh.tensor  # microbatch, or rank in an all-to-all
        self.uses = [(number, stage) for number, group in enumerate(plan.tied) for stage in group]  # of tied tensors
        self.block = plan.mesh.data * self._widths[0] * self._widths[1]  # bits of a stage's own, and then of each use
        self._complete = {by_tokens: self._sum_of_all(by_tokens) for by_tokens in (False, True)}
        self.reads: dict[tuple[int, int, int | None], int] = {}  # version that each shard's forward read
        self._used: set[tuple[int, int, int]] = set()

    def holdings(self, at: Coordinate) -> Holdings:
        """What the rank at a coordinate holds before the step."""
        index, row = self.plan.row_index(at), self.plan.row(at)
        tokens, share = (frozenset(s for s in self.whole if s[i] == at.tensor) for i in (0, 1))
        rank = Holdings(at, index, row, Facts(row), tokens, share)
        for stage in self.plan.owned(at.pipeline):
            rank.gradients[stage] = [STALE if self.plan.purpose == "train" else self._around(at.data, owner)[0]
                                     for owner in self.owner]  # fmt: skip
            rank.reduced[stage] = [STALE] * len(self.atoms)
            sharded = stage in rank.facts.sharded and self.plan.mesh.data > 1
            rank.versions[stage] = [0 if not sharded or owner == at.data else None for owner in self.owner]
        return rank

    # -- contributions -------------------------------------------------------------------------------------

    def one(self, data: int, mb: int, tensor: int = 0, use: int = 0) -> Contributions:
        """One contribution by itself: a stage's own, or that of a use of a tied tensor, which lies somewhere in it."""
        return Contributions(2 << (use * self.block + (data * self._widths[0] + mb) * self._widths[1] + tensor))

    def of_uses(self, held: int, uses: Iterable[int]) -> int:
        """Those bits of a gradient that are of some uses."""
        return sum(held & ((2 << self.block) - 2) << use * self.block for use in uses)

    def named(self, held: int) -> list[tuple[int, int] | None]:
        """Data shard and microbatch of each bit; None for a gradient of an earlier step."""
        mbs, tensors = self._widths
        places = [bit for bit in range(held.bit_length()) if held >> bit & 1]
        return [divmod((bit - 1) // tensors, mbs) if bit else None for bit in places]

    def _sum_of_all(self, by_tokens: bool) -> Contributions:
        """What a complete gradient holds: every shard's every microbatch once, of all tensor ranks if split."""
        keys = product(self.trained(), range(self.plan.microbatches), range(self.plan.mesh.tensor if by_tokens else 1))
        return Contributions(sum(self.one(*key).there for key in keys))

    def fail(self, rank: Holdings, index: int, why: str) -> NoReturn:
        """Refuse the plan for what one action does."""
        raise PlanError(self.plan, rank.index, index, why)

    # -- messages ----------------------------------------------------------------------------------------

    def take(self, rank: Holdings, index: int, action: Action) -> object:
        """What a send carries."""
        self.lives_here(rank, index, action.stage if action.verb.scope == "part" else None)
        if action.verb.scope == "part":
            held = (rank.gradients if action.kind == "SEND_G" else rank.versions)[action.stage]
            return [held[i] for i in self.atoms.inside(action.part)]
        buf = buffer(action, action.verb.reads[0])
        value = self.whole_edge(rank, index, buf)
        rank.edges.pop(buf)
        return value

    def deliver(self, rank: Holdings, index: int, message: object) -> None:
        """What a receive does with it."""
        action = rank.row[index]
        if isinstance(message, frozenset):
            rank.edges[buffer(action, action.verb.writes[0])] = message
            return
        assert isinstance(message, list)
        self.lives_here(rank, index, action.stage)
        held: list[Any] = (rank.versions if action.kind == "RECV_P" else rank.gradients)[action.stage]
        for i, content in zip(self.atoms.inside(action.part), message, strict=True):
            held[i] = held[i].plus(content) if action.kind == "ADD_G" else content

    def swap(self, members: Members, action: Action) -> None:
        """Two ranks exchange parts of their buffers."""
        (one, i), (two, j) = members
        mine, theirs = self.atoms.inside(one.row[i].part), self.atoms.inside(two.row[j].part)
        if len(mine) != len(theirs):
            self.fail(one, i, f"it exchanges {one.row[i].part} for {two.row[j].part}, which is not of the same size")
        left, right = one.gradients[one.row[i].stage], two.gradients[two.row[j].stage]
        for x, y in zip(mine, theirs, strict=True):
            left[x], right[y] = right[y], left[x]

    # -- demands -----------------------------------------------------------------------------------------

    def lives_here(self, rank: Holdings, index: int, stage: int | None) -> None:
        """Refuse an action on a stage that another pipeline rank holds."""
        if stage is not None and stage not in rank.gradients:
            self.fail(rank, index, f"stage {stage} does not live on this rank")

    def wanted(self, rank: Holdings, stage: int) -> Shares:
        """What a stage reads."""
        return rank.own_tokens if stage in self.split else self.whole

    def given(self, rank: Holdings, stage: int, partial: bool) -> Shares:
        """What a stage gives, which may be its rank's share of the sum."""
        return rank.own_share if partial else self.wanted(rank, stage)

    def whole_edge(self, rank: Holdings, index: int, edge: Edge) -> Shares:
        """An activation or its gradient that must be there, and be what its reader needs."""
        letter, number, mb = edge
        held = rank.edges.get(edge)
        if held is self.whole and not self.split:
            return held
        if held is None:
            names = {"A": "input", "D": "gradient of output", "S": "saved state", "K": "input half"}
            return self.fail(rank, index, f"its {names[letter]} (edge {number}, microbatch {mb}) is not on this rank")
        reader = min(number - (letter == "D"), self.plan.stages - 1)
        wanted = self.wanted(rank, reader)
        if held != wanted:
            if {part for part, _ in held} != {part for part, _ in wanted}:
                whose = "its own tokens" if reader in self.split else "all tokens"
                self.fail(rank, index, f"it needs {whose}, and edge {number} holds others")
            self.fail(rank, index, f"it reads a partial sum: {len({share for _, share in held})} of "
                      f"{self.plan.mesh.tensor} tensor ranks")  # fmt: skip
        return held

    def weights(self, rank: Holdings, index: int, stage: int) -> int:
        """The version of a stage's parameters, which must be whole, of one version and (exact) of before the update."""
        versions = rank.versions[stage]
        if None in versions:
            self.fail(rank, index, f"it reads parameters of stage {stage} that are sharded: UNSHARD comes first")
        if len(set(versions)) > 1:
            self.fail(rank, index, f"it reads parameters of stage {stage} of which only parts were updated")
        if versions[0] and self.plan.holds == "all":
            self.fail(rank, index, f"it reads parameters of stage {stage} that were already updated in this step")
        return versions[0] or 0

    def same_weights(self, rank: Holdings, index: int, stage: int, mb: int | None) -> None:
        """A backward must see the parameters that its forward saw: now, or from a stash."""
        for near in self.plan.near(rank.row[index], "P"):
            seen = rank.seen.get((stage, mb, near))
            if self.weights(rank, index, near) != seen and not self.plan.stashed:
                self.fail(rank, index, f"its forward read version {seen} of stage {near}, but there is another one now")

    def sharing(self, letter: str, rank: Holdings, stage: int) -> list[int]:
        """Other stages of the rank that use the same buffer in turn."""
        room = self.plan.room(letter, stage)
        return [other for other in rank.gradients if other != stage and self.plan.room(letter, other) == room]

    def trained(self) -> list[int]:
        """Data coordinates that hold a shard."""
        return [d for d in range(self.plan.mesh.data) if d not in self.plan.servers]

    def complete(self, rank: Holdings, index: int, stage: int, atom: int, held: Contributions) -> None:
        """Refuse a gradient that is read as complete and is not what the plan declares."""
        if self.plan.holds == "all" and not self.uses and held == self._complete[stage in self.split]:
            return
        own = (2 << self.block) - 1
        uses = Contributions(held.there & ~own, held.again & ~own)
        held = Contributions(held.there & own, held.again & own)
        if why := self._not_own(rank, stage, held):
            self.fail(rank, index, "the gradient of stage {} from {} to {} is not {}".format(
                stage, *self.atoms.fractions(atom), why))  # fmt: skip
        ties = [use for use, (number, _) in enumerate(self.uses, 1)
                if self.plan.holders[number].get(rank.at.pipeline) == stage]  # fmt: skip
        each = self._complete[False].there if self.plan.holds == "all" else held.there
        if wrong := uses.again | uses.there ^ sum(each << use * self.block for use in ties):
            number = self.uses[(wrong.bit_length() - 2) // self.block - 1][0]
            how = "SUM_TIED comes once" if len(self.plan.holders[number]) > 1 else "it is complete"
            stages = self.plan.tied[number]
            self.fail(rank, index, f"the gradient of the tensor that stages {stages} share is not the sum of all their "
                      f"contributions: {how}, after the last backward of each")  # fmt: skip

    def _not_own(self, rank: Holdings, stage: int, held: Contributions) -> str:
        """What a stage's own gradient should hold, and what it holds; nothing where that is right."""
        if self.plan.holds != "all":
            named = self.named(held.there)
            own = self.plan.holds == "one" or all(c is not None and c[0] == rank.at.data for c in named)
            whose = f"one microbatch of {'its own shard' if self.plan.holds == 'own' else 'one shard'}"
            wrong = len(named) != 1 or None in named or held.again or not own
            return f"{whose}: it holds {self.say(held.there)}" if wrong else ""
        wanted = self._complete[stage in self.split].there
        missing, extra = wanted & ~held.there, held.again | held.there & ~wanted
        parts = [f"it lacks {self.say(missing)}"] * bool(missing)
        parts += [f"it holds {self.say(extra)} too often"] * bool(extra)
        return "the sum of all shards: " + " and ".join(parts) if parts else ""

    def say(self, held: int) -> str:
        """A few contributions in words."""
        named = self.named(held)
        words = [f"shard {c[0]} microbatch {c[1]}" if c else "a gradient of an earlier step" for c in named[:3]]
        return (", ".join(words) or "nothing") + (f" and {len(named) - 3} more" if len(named) > 3 else "")

    def updates(self) -> int:
        """How often each part is updated in one run of the plan."""
        of_each = {"all": 1, "own": self.plan.microbatches, "one": len(self.trained()) * self.plan.microbatches}
        return of_each[self.plan.holds]

    def used(self, rank: Holdings, index: int, stage: int, held: Contributions) -> None:
        """Where updates hold one contribution each: every one is used once, and none is too old."""
        if self.plan.holds == "all":
            return
        for contribution in self.named(held.there & ((2 << self.block) - 1)):
            assert contribution is not None
            data, mb = contribution
            key = (stage, data, mb)
            if key in self._used:
                self.fail(rank, index, f"the gradient of shard {data} microbatch {mb} is applied twice")
            self._used.add(key)
            version = min(v or 0 for v in rank.versions[stage])
            age = version - 1 - self.reads.get((stage, data, mb), 0)
            if self.plan.holds == "one" and age > self.plan.staleness:
                self.fail(rank, index, f"this gradient is {age} updates old; the plan allows {self.plan.staleness}")

    # -- before and after --------------------------------------------------------------------------------

    def _around(self, data: int, owner: int) -> tuple[Contributions, Contributions | None]:
        """What a collective by itself begins with in an atom, and must leave there; None where that does not matter."""
        own, everyone = self.one(data, 0), self._complete[False]
        around: dict[str, tuple[Contributions, Contributions | None]] = {
            "all_reduce": (own, everyone), "reduce_scatter": (own, everyone if owner == data else None),
            "all_gather": (own if owner == data else NOTHING, self.one(owner, 0)),
            "broadcast": (NOTHING if data else own, self.one(0, 0)),
            "all_to_all": (self.one(data, owner), self.one(owner, data))}  # fmt: skip
        return around[self.plan.purpose]

    def finish(self, rank: Holdings) -> None:
        """After the last action: everything consumed, every part updated as often as declared, replicas alike."""
        end = len(rank.row)
        for letter, number, mb in rank.edges:
            if letter in "AK":
                self.fail(rank, end, f"edge {number}, microbatch {mb} was produced and never used")
        if self.plan.purpose != "train":
            return self._finish_collective(rank)
        if self.plan.holds == "one" and self.plan.servers and rank.at.data not in self.plan.servers:
            return
        wanted = self.updates()
        for stage, versions in rank.versions.items():
            resharded = None in versions
            if resharded and stage not in rank.facts.sharded:
                self.fail(rank, end, f"stage {stage} ends sharded, and the next step begins with a read of the whole")
            near = self.sharing("P", rank, stage) if self.plan.mesh.data > 1 else []
            if near and stage not in rank.facts.sharded:
                self.fail(rank, end, f"stage {stage} is whole when a step begins, in a buffer that it shares with "
                          f"stage {near[0]}, whose parameters may lie there: UNSHARD comes before its first use")
            for atom, version in enumerate(versions):
                if version != wanted and (not resharded or self.owner[atom] == rank.at.data):
                    self.fail(rank, end, f"stage {stage} was updated {version or 0} times, not {wanted}")
            if self.plan.holds == "own" and self.plan.mesh.data > 1 and stage not in rank.averaged:
                self.fail(rank, end, f"the replicas of stage {stage} end with different parameters: AVERAGE is missing")

    def _finish_collective(self, rank: Holdings) -> None:
        for atom, held in enumerate(rank.gradients[0]):
            _, wanted = self._around(rank.at.data, self.owner[atom])
            if wanted is not None and held != wanted:
                words = *self.atoms.fractions(atom), self.say(held.there), self.say(wanted.there)
                self.fail(rank, len(rank.row), "elements {} to {} end as {}, not as {}".format(*words))
