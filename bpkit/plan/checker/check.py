"""The checker: is this plan runnable, and is what it computes what it promises?

Two halves, in one walk over all ranks of the mesh.  **Order**: every action can start at some time, also
where a send waits for its receive; nothing is left unsent or unreceived.  **Provenance**: the plan is run on
multisets of (data shard, microbatch) instead of numbers, so a missing, doubled or misplaced reduction, a stale
gradient and a partial sum read as a whole are seen before anything starts.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from heapq import heappop, heappush

from bpkit.plan.action import PARTNERS, Action
from bpkit.plan.checker.effects import COMPUTE, GROUP
from bpkit.plan.checker.provenance import Holdings, Provenance
from bpkit.plan.liveness import waits_by_row
from bpkit.plan.plan import Plan, PlanError

#: Actions that happen together, each as its rank and its index in the row: one of compute, or all ends of a
#: communication, of a message the sender first.
Together = tuple[tuple[int, int], ...]


#: More ranks or actions are not walked over: it would take minutes.
MOST = 10_000_000


@dataclass
class _Rank:
    """How far one rank has come."""

    number: int
    holds: Holdings
    followers: Sequence[Sequence[int]]  # of each action: those that wait for it
    left: list[int]  # for each action, how many that it waits for have not ended; -1 once it has ended itself
    ready: list[int]  # a heap: what can start

    def end(self, index: int) -> None:
        """Note that an action has ended, and what can start now."""
        self.left[index] = -1
        for later in self.followers[index]:
            self.left[later] -= 1
            if not self.left[later]:
                heappush(self.ready, later)


def check(plan: Plan) -> None:
    """Refuse a plan that would deadlock, lose a message, or compute something else than it declares; remembered.

    In an accepted plan each part of each stage is updated once a step, from a gradient that holds the
    contribution of every (data shard, microbatch) exactly once, whatever the order in which independent
    actions run; every forward and backward sees the weights of before the update; and every rank that holds
    a stage ends with the same weights.

    Raises
    ------
    PlanError
        Naming the row, the action and the reason.
    ValueError
        If there are more than `MOST` ranks or actions.
    """
    order(plan)


@lru_cache(maxsize=256)
def order(plan: Plan) -> tuple[Together, ...]:
    """An order in which all actions of an accepted plan can run, whatever time they take.

    Raises
    ------
    PlanError, ValueError
        As `check`.
    """
    actions = plan.workers // len(plan.rows) * sum(map(len, plan.rows))
    if max(plan.workers, actions) > MOST:
        raise ValueError(f"{plan.name}: {plan.workers:,} ranks with {actions:,} actions are more than the {MOST:,} "
                         "that are checked: check the same plan on a smaller mesh")  # fmt: skip
    named = {action.mb for row in plan.rows for action in row} - {None}
    if 1 < plan.microbatches != len(named):
        missing = next(mb for mb in range(plan.microbatches) if mb not in named)
        raise PlanError(plan, 0, len(plan.rows[0]), f"no action is of microbatch {missing} of {plan.microbatches}")
    return _Walk(plan).run()


def _followers(waits: Sequence[Sequence[int]]) -> list[list[int]]:
    """For each action of a row, those that wait for it."""
    followers: list[list[int]] = [[] for _ in waits]
    for index, own in enumerate(waits):
        for earlier in own:
            followers[earlier].append(index)
    return followers


class _Walk:
    """One walk over a plan in an order that its waits allow."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.world = Provenance(plan)
        rows = waits_by_row(plan)
        followers = list(map(_followers, rows))
        self.ranks = [_Rank(number, holds, followers[holds.index], list(map(len, rows[holds.index])),
                            [i for i, own in enumerate(rows[holds.index]) if not own])
                      for number, holds in enumerate(map(self.world.holdings, plan.mesh.coordinates()))]  # fmt: skip
        self.arrivals: dict[tuple[str, object], list[tuple[_Rank, int]]] = {}
        # By from, to, and whether it sends: what has no partner yet, and what it carries.
        self.posted: dict[tuple[int, int, bool], tuple[_Rank, int, object]] = {}
        self.partners: dict[tuple[int, str, int, int | None], int] = {}  # of messages, found once
        self.order: list[Together] = []

    def run(self) -> tuple[Together, ...]:
        """Walk to the end, or to the first fault; the order in which actions have ended."""
        while any(rank.ready for rank in self.ranks):
            for rank in self.ranks:
                while rank.ready:
                    self._start(rank, heappop(rank.ready))
        for rank in self.ranks:
            if max(rank.left, default=-1) >= 0:
                self._blocked(rank)
        for rank in self.ranks:
            self.world.finish(rank.holds)
        return tuple(self.order)

    def _blocked(self, rank: _Rank) -> None:
        index = next(i for i, left in enumerate(rank.left) if left >= 0)
        action = rank.holds.row[index]
        why = f"deadlock: rank {rank.number} never gets past it"
        if not rank.left[index]:  # it has started
            why += "; " + (f"no partner of {action.kind} ever comes" if action.verb.axis else "its inputs never come")
        raise PlanError(self.plan, rank.holds.index, index, why)

    def _start(self, rank: _Rank, index: int) -> None:
        action = rank.holds.row[index]
        if effect := COMPUTE.get(action.kind):
            self.world.lives_here(rank.holds, index, action.stage)
            effect(self.world, rank.holds, index, action)
            self._done((rank, index))
        elif action.kind in GROUP:
            self._collective(rank, index)
        else:
            self._match(rank, index)

    def _collective(self, rank: _Rank, index: int) -> None:
        """Wait until all members of the group have come; each has one collective of a stream under way at a time."""
        action, at = rank.holds.row[index], rank.holds.at
        self.world.lives_here(rank.holds, index, action.stage)
        key: tuple[object, ...]
        if action.kind == "NORM":
            size, key = self.plan.mesh.size, ("NORM",)
        elif action.kind == "SUM_TIED":
            copies = {*sum(self.plan.copied, ())}
            size, key = len({self.plan.place[stage] for stage in copies}), (at.data, at.tensor)
            if action.stage not in copies:
                self.world.fail(rank.holds, index, f"stage {action.stage} holds no copy of a tied tensor")
        elif action.kind == "SWAP_G":
            size, key = 2, (action.stage, *sorted((rank.number, self._partner(rank, index, action))))
            if self.plan.purpose == "train":
                why = "its rank does nothing else until its peer comes: it stands only in a collective by itself"
                self.world.fail(rank.holds, index, why)
        else:
            axis = action.verb.axis or ""
            size, key = getattr(self.plan.mesh, axis), (action.stage, action.mb, at._replace(**{axis: 0}))
        arrivals = self.arrivals.setdefault((action.kind, key), [])
        arrivals.append((rank, index))
        if len(arrivals) == size:
            del self.arrivals[action.kind, key]
            arrivals.sort(key=lambda pair: pair[0].holds.at)
            GROUP[action.kind](self.world, [(member.holds, i) for member, i in arrivals], action)
            self._done(*arrivals)

    def _match(self, rank: _Rank, index: int) -> None:
        """Pair a send with the peer's receive: messages keep their order, since a stream has one under way at a time.

        Both end when both have started, as on a transport whose sends wait for their receives.
        """
        action = rank.holds.row[index]
        sends, peer = action.kind in PARTNERS, self._partner(rank, index, action)
        own = rank, index, self.world.take(rank.holds, index, action) if sends else None
        found = self.posted.pop((peer, rank.number, not sends), None)
        if found is None:
            self.posted[rank.number, peer, sends] = own
            return
        (sender, i, content), (receiver, j, _) = (own, found) if sends else (found, own)
        if not self._fit(sender.holds.row[i], receiver.holds.row[j]):
            self.world.fail(receiver.holds, j, f"the next message from rank {sender.number} is {sender.holds.row[i]}")
        self.world.deliver(receiver.holds, j, content)
        self._done((sender, i), (receiver, j))

    def _partner(self, rank: _Rank, index: int, action: Action) -> int:
        """The rank at the other end of a message."""
        asked = rank.number, action.kind, action.stage, action.peer
        if asked in self.partners:
            return self.partners[asked]
        other = action.stage + (1 if (action.kind in PARTNERS) == action.kind.endswith("F") else -1)
        if action.peer is None and not 0 <= other < self.plan.stages:
            self.world.fail(rank.holds, index, f"there is no stage {other} to exchange with")
        peer = self.plan.mesh.rank(self.plan.partner(rank.holds.at, action))
        if peer == rank.number:
            self.world.fail(rank.holds, index, "its partner is this rank itself, where nothing has to be sent")
        self.partners[asked] = peer
        return peer

    def _fit(self, send: Action, receive: Action) -> bool:
        """Whether a receive takes what a send gives."""
        kinds, step = PARTNERS[send.kind]
        inside = self.world.atoms.inside
        return (receive.kind in kinds and receive.stage == send.stage + step and receive.mb == send.mb
                and (receive.part == send.part or inside(receive.part) == inside(send.part)))  # fmt: skip

    def _done(self, *ends: tuple[_Rank, int]) -> None:
        """Note what has happened together."""
        for rank, index in ends:
            rank.end(index)
        self.order.append(tuple([(rank.number, index) for rank, index in ends]))
