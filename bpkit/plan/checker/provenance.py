"""Provenance: a plan run on multisets of (data shard, microbatch) instead of numbers.

Every rank's gradient of every stage is a multiset of contributions, one for each *atom*: the finest parts
that any action names.  A forward or backward moves marks along the edges; a reduction adds multisets; an
update demands that its part holds every contribution exactly once.
"""

from collections import Counter
from dataclasses import dataclass, field
from fractions import Fraction
from itertools import pairwise

from bpkit.plan.action import Action, Buffer, Part, buffer
from bpkit.plan.mesh import Coordinate
from bpkit.plan.plan import Plan, PlanError

Contributions = Counter[object]
Shares = frozenset[tuple[int, int]]  # of an edge: part of the tokens, and tensor rank that has contributed to it
STALE = "a gradient of an earlier step"


@dataclass
class Holdings:
    """What one rank holds while the plan is run on multisets."""

    at: Coordinate
    index: int  # its row in the plan
    row: tuple[Action, ...]
    edges: dict[Buffer, Shares] = field(default_factory=dict)  # A, D, S, K
    gradients: dict[int, list[Contributions]] = field(default_factory=dict)  # by stage, then atom
    reduced: dict[int, list[Contributions]] = field(default_factory=dict)  # what scatters gave this rank's own part
    versions: dict[int, list[int | None]] = field(default_factory=dict)  # parameters: updates seen, None: not held
    sharded: dict[int, bool] = field(default_factory=dict)  # whether the step begins with this rank's part only
    seen: dict[tuple[int, int | None], int] = field(default_factory=dict)  # version that each forward read
    averaged: set[int] = field(default_factory=set)  # stages whose parameters are the mean over data ranks
    normed: bool = False  # whether the global norm of the gradient is known
    tied: dict[int, Contributions] = field(default_factory=dict)  # of the tensor of which stages hold copies


Members = list[tuple[Holdings, int]]


class Provenance:
    """The effects of actions on multisets."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.atoms = _atoms(plan)
        parts, ranks = range(plan.mesh.tensor if plan.own_tokens else 1), range(plan.mesh.tensor)
        self.whole: Shares = frozenset((part, rank) for part in parts for rank in ranks)
        self.reads: dict[tuple[int, int, int | None], int] = {}  # version that each shard's forward read
        self._used: set[tuple[int, object, object]] = set()

    def holdings(self, at: Coordinate) -> Holdings:
        """What the rank at a coordinate holds before the step."""
        rank = Holdings(at, self.plan.row_index(at), self.plan.row(at))
        for stage in self.plan.owned(at.pipeline):
            rank.gradients[stage] = [self._before(at.data, atom) for atom in range(len(self.atoms))]
            rank.reduced[stage] = [Counter({STALE: 1}) for _ in self.atoms]
            rank.tied |= {stage: Counter()} if stage in self.plan.tied else {}
            touching = [a.kind for a in rank.row if a.stage == stage and a.kind in ("F", "UNSHARD")]
            sharded = touching[:1] == ["UNSHARD"] and self.plan.mesh.data > 1
            rank.sharded[stage] = sharded
            rank.versions[stage] = [0 if not sharded or self.owner(i) == at.data else None
                                    for i in range(len(self.atoms))]  # fmt: skip
        return rank

    def owner(self, atom: int) -> int:
        """The data rank whose part [d/D] contains an atom."""
        return int(self.atoms[atom][0] * self.plan.mesh.data)

    def fail(self, rank: Holdings, index: int, why: str) -> None:
        """Refuse the plan for what one action does."""
        raise PlanError(self.plan, rank.index, index, why)

    def inside(self, part: Part | None) -> list[int]:
        """The atoms of a part."""
        low, high = (Fraction(0), Fraction(1)) if part is None else part.fractions()
        return [i for i, (a, b) in enumerate(self.atoms) if low <= a and b <= high]

    # -- messages ----------------------------------------------------------------------------------------

    def take(self, rank: Holdings, index: int, action: Action) -> object:
        """What a send carries."""
        self.lives_here(rank, index, action.stage if action.verb.scope == "part" else None)
        if action.kind == "SEND_G":
            return [Counter(rank.gradients[action.stage][i]) for i in self.inside(action.part)]
        if action.kind == "SEND_P":
            return [rank.versions[action.stage][i] for i in self.inside(action.part)]
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
        for i, content in zip(self.inside(action.part), message, strict=True):
            if action.kind == "RECV_P":
                rank.versions[action.stage][i] = content
            elif action.kind == "ADD_G":
                rank.gradients[action.stage][i] = rank.gradients[action.stage][i] + content
            else:
                rank.gradients[action.stage][i] = Counter(content)

    def swap(self, a: tuple[Holdings, int], b: tuple[Holdings, int]) -> None:
        """Two ranks exchange parts of their buffers."""
        (one, i), (two, j) = a, b
        mine, theirs = self.inside(one.row[i].part), self.inside(two.row[j].part)
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

    def own_tokens(self, rank: Holdings) -> Shares:
        """A complete sum of this rank's own tokens."""
        return frozenset(share for share in self.whole if share[0] == rank.at.tensor)

    def wanted(self, rank: Holdings, stage: int) -> Shares:
        """What a stage reads."""
        return self.own_tokens(rank) if stage in self.plan.own_tokens else self.whole

    def given(self, rank: Holdings, stage: int, partial: bool) -> Shares:
        """What a stage gives, which may be its rank's share of the sum."""
        own = frozenset(share for share in self.whole if share[1] == rank.at.tensor)
        return own if partial else self.wanted(rank, stage)

    def whole_edge(self, rank: Holdings, index: int, buf: Buffer) -> Shares:
        """An activation or its gradient that must be there, and be what its reader needs."""
        names = {"A": "input", "D": "gradient of output", "S": "saved state", "K": "input half"}
        if buf not in rank.edges:
            self.fail(rank, index, f"its {names[buf.letter]} (edge {buf.stage}, microbatch {buf.mb}) is not on this "
                      "rank")  # fmt: skip
        reader = min(buf.stage - (buf.letter == "D"), self.plan.stages - 1)
        held, wanted = rank.edges[buf], self.wanted(rank, reader)
        if {part for part, _ in held} != {part for part, _ in wanted}:
            whose = "its own tokens" if reader in self.plan.own_tokens else "all tokens"
            self.fail(rank, index, f"it needs {whose}, and edge {buf.stage} holds others")
        if held != wanted:
            self.fail(rank, index, f"it reads a partial sum: {len({share for _, share in held})} of "
                      f"{self.plan.mesh.tensor} tensor ranks")  # fmt: skip
        return held

    def weights(self, rank: Holdings, index: int, stage: int) -> int:
        """The version of a stage's parameters, which must be whole, of one version and (exact) of before the update."""
        self.lives_here(rank, index, stage)
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
        seen = rank.seen.get((stage, mb))
        if self.weights(rank, index, stage) != seen and not self.plan.stashed:
            self.fail(rank, index, f"its forward read version {seen} of stage {stage}, but there is another one now")

    def sharing(self, letter: str, rank: Holdings, stage: int) -> list[int]:
        """Other stages of the rank that use the same buffer in turn."""
        count = self.plan.shared.get(letter, 0)
        return [other for other in rank.gradients if count and other != stage and other % count == stage % count]

    def trained(self) -> list[int]:
        """Data coordinates that hold a shard."""
        return [d for d in range(self.plan.mesh.data) if d not in self.plan.servers]

    def expected(self, stage: int) -> Contributions:
        """What a complete gradient holds: every shard's every microbatch once, of all tensor ranks if split."""
        ranks = range(self.plan.mesh.tensor)
        shares = [(t,) for t in ranks] if stage in self.plan.own_tokens else [()]
        microbatches = range(self.plan.microbatches)
        return Counter({(d, m, *share): 1 for d in self.trained() for m in microbatches for share in shares})

    def complete(self, rank: Holdings, index: int, stage: int, atom: int, held: Contributions) -> None:
        """Refuse a gradient that is read as complete and is not what the plan declares."""
        low, high = self.atoms[atom]
        where = f"the gradient of stage {stage} from {low} to {high} is not"
        if self.plan.holds != "all":
            whose = f"one microbatch of {'its own shard' if self.plan.holds == 'own' else 'one shard'}"
            own = self.plan.holds == "one" or all(isinstance(c, tuple) and c[0] == rank.at.data for c in held)
            if held.total() != 1 or STALE in held or not own:
                self.fail(rank, index, f"{where} {whose}: it holds {_say(held)}")
            return
        wanted = self.expected(stage)
        if held != wanted:
            missing, extra = wanted - held, held - wanted
            parts = [f"it lacks {_say(missing)}"] * bool(missing) + [f"it holds {_say(extra)} too often"] * bool(extra)
            self.fail(rank, index, f"{where} the sum of all shards: " + " and ".join(parts))

    def complete_tie(self, rank: Holdings, index: int, stage: int) -> None:
        """Refuse a tied gradient that lacks what another stage's copy contributed, or holds it twice."""
        wanted = Counter({(*key, s): 1 for key in self.expected(-1) for s in self.plan.tied})  # type: ignore[misc]
        if rank.tied[stage] != wanted:
            self.fail(rank, index, f"the gradient of the tensor that stages {self.plan.tied} share is not the sum of "
                      "all their contributions: SUM_TIED comes once, after the last backward of each")  # fmt: skip

    def updates(self) -> int:
        """How often each part is updated in one run of the plan."""
        of_each = {"all": 1, "own": self.plan.microbatches, "one": len(self.trained()) * self.plan.microbatches}
        return of_each[self.plan.holds]

    def used(self, rank: Holdings, index: int, stage: int, held: Contributions) -> None:
        """Where updates hold one contribution each: every one is used once, and none is too old."""
        if self.plan.holds == "all":
            return
        for contribution in held:
            assert isinstance(contribution, tuple)
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

    def _before(self, data: int, atom: int) -> Contributions:
        """A gradient before the plan: stale in training, this rank's own in a collective by itself."""
        if self.plan.purpose == "train":
            return Counter({STALE: 1})
        if self.plan.purpose == "all_to_all":
            return Counter({(data, self.owner(atom)): 1})
        holds = {"all_gather": self.owner(atom) == data, "broadcast": data == 0}.get(self.plan.purpose, True)
        return Counter({(data, 0): 1}) if holds else Counter()

    def _after(self, data: int, atom: int) -> Contributions | None:
        """What a collective by itself must leave; None where it does not matter."""
        purpose, everyone = self.plan.purpose, Contributions({(d, 0): 1 for d in range(self.plan.mesh.data)})
        if purpose == "all_reduce":
            return everyone
        if purpose == "reduce_scatter":
            return everyone if self.owner(atom) == data else None
        if purpose == "all_to_all":
            return Contributions({(self.owner(atom), data): 1})
        return Counter({(self.owner(atom) if purpose == "all_gather" else 0, 0): 1})

    def finish(self, rank: Holdings) -> None:
        """After the last action: everything consumed, every part updated as often as declared, replicas alike."""
        end = len(rank.row)
        left = [buf for buf in rank.edges if buf.letter in "AK"]
        if left:
            self.fail(rank, end, f"edge {left[0].stage}, microbatch {left[0].mb} was produced and never used")
        if self.plan.purpose != "train":
            return self._finish_collective(rank)
        if self.plan.holds == "one" and self.plan.servers and rank.at.data not in self.plan.servers:
            return
        for stage, versions in rank.versions.items():
            resharded = None in versions
            if resharded and not rank.sharded[stage]:
                self.fail(rank, end, f"stage {stage} ends sharded, and the next step begins with a read of the whole")
            for atom, version in enumerate(versions):
                mine = not resharded or self.owner(atom) == rank.at.data
                if mine and version != self.updates():
                    self.fail(rank, end, f"stage {stage} was updated {version or 0} times, not {self.updates()}")
            if self.plan.holds == "own" and self.plan.mesh.data > 1 and stage not in rank.averaged:
                self.fail(rank, end, f"the replicas of stage {stage} end with different parameters: AVERAGE is missing")

    def _finish_collective(self, rank: Holdings) -> None:
        for atom, held in enumerate(rank.gradients[0]):
            wanted = self._after(rank.at.data, atom)
            if wanted is not None and held != wanted:
                low, high = self.atoms[atom]
                self.fail(rank, len(rank.row), f"elements {low} to {high} end as {_say(held)}, not as {_say(wanted)}")


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
    return (", ".join(words) or "nothing") + (f" and {len(counts) - 3} more" if len(counts) > 3 else "")
