"""What each kind of action does to the multisets of `bpkit.plan.checker.provenance`."""

from collections import Counter
from collections.abc import Callable

from bpkit.plan.action import ON_EDGES, Action, Buffer, buffer
from bpkit.plan.checker.provenance import STALE, Contributions, Holdings, Members, Provenance, Shares
from bpkit.plan.plan import scatters

# -- compute actions ---------------------------------------------------------------------------------------


def _zero(world: Provenance, rank: Holdings, index: int, action: Action) -> None:
    world.lives_here(rank, index, action.stage)
    rank.tied |= {action.stage: Counter()} if action.stage in rank.tied else {}
    rank.gradients[action.stage] = [Counter() for _ in world.atoms]
    rank.reduced[action.stage] = [Counter() for _ in world.atoms]


def _forward(world: Provenance, rank: Holdings, index: int, action: Action) -> None:
    version = rank.seen[action.stage, action.mb] = world.weights(rank, index, action.stage)
    world.reads[action.stage, rank.at.data, action.mb] = version
    if action.stage > 0:
        world.whole_edge(rank, index, Buffer("A", action.stage, action.mb))
    saved = Buffer("S", action.stage, action.mb)
    if saved in rank.edges:
        world.fail(rank, index, "this forward already ran and its backward has not")
    partial = action.stage in world.plan.partial_outputs
    rank.edges[Buffer("A", action.stage + 1, action.mb)] = world.given(rank, action.stage, partial)
    if not any(a.kind == "RECOMPUTE" and (a.stage, a.mb) == (action.stage, action.mb) for a in rank.row):
        rank.edges[saved] = world.wanted(rank, action.stage)


def _loss(world: Provenance, rank: Holdings, index: int, action: Action) -> None:
    if action.stage != world.plan.stages - 1:
        world.fail(rank, index, f"the loss follows the last stage, {world.plan.stages - 1}")
    world.whole_edge(rank, index, Buffer("A", action.stage + 1, action.mb))
    del rank.edges[Buffer("A", action.stage + 1, action.mb)]
    rank.edges[Buffer("D", action.stage + 1, action.mb)] = world.wanted(rank, action.stage)


def _input_half(world: Provenance, rank: Holdings, index: int, action: Action) -> None:
    world.same_weights(rank, index, action.stage, action.mb)
    world.whole_edge(rank, index, Buffer("D", action.stage + 1, action.mb))
    world.whole_edge(rank, index, Buffer("S", action.stage, action.mb))
    partial = action.stage in world.plan.partial_inputs
    if action.stage > 0:  # nobody asks for the gradient of the network's input
        rank.edges[Buffer("D", action.stage, action.mb)] = world.given(rank, action.stage, partial)
    rank.edges[Buffer("K", action.stage, action.mb)] = world.wanted(rank, action.stage)


def _weight_half(world: Provenance, rank: Holdings, index: int, action: Action) -> None:
    world.whole_edge(rank, index, Buffer("K", action.stage, action.mb))
    for buf in (Buffer("K", action.stage, action.mb), Buffer("S", action.stage, action.mb),
                Buffer("D", action.stage + 1, action.mb), Buffer("A", action.stage, action.mb)):  # fmt: skip
        rank.edges.pop(buf, None)
    for stage in world.sharing("G", rank, action.stage):
        if any(counts and STALE not in counts for counts in rank.gradients[stage]):
            world.fail(rank, index, f"the gradient buffer it writes still holds the gradient of stage {stage}")
    if action.stage in rank.tied:
        rank.tied[action.stage][rank.at.data, action.mb, action.stage] += 1
    share = (rank.at.tensor,) if action.stage in world.plan.own_tokens else ()
    for counts in rank.gradients[action.stage]:
        counts[(rank.at.data, action.mb, *share)] += 1


def _backward(world: Provenance, rank: Holdings, index: int, action: Action) -> None:
    _input_half(world, rank, index, action)
    _weight_half(world, rank, index, action)


def _recompute(world: Provenance, rank: Holdings, index: int, action: Action) -> None:
    world.same_weights(rank, index, action.stage, action.mb)
    if Buffer("S", action.stage, action.mb) in rank.edges:
        world.fail(rank, index, "what it computes again is kept already")
    if action.stage > 0:
        world.whole_edge(rank, index, Buffer("A", action.stage, action.mb))
    rank.edges[Buffer("S", action.stage, action.mb)] = world.wanted(rank, action.stage)


def _update(world: Provenance, rank: Holdings, index: int, action: Action) -> None:
    world.lives_here(rank, index, action.stage)
    if not rank.normed and any(other.kind == "NORM" for other in rank.row):
        world.fail(rank, index, "it is clipped by the norm of the whole gradient, and NORM comes later")
    versions = rank.versions[action.stage]
    scattered = scatters(rank.row, action.stage)
    held = rank.reduced[action.stage] if scattered else rank.gradients[action.stage]
    atoms = world.inside(action.part)
    if scattered and action.part is None:
        atoms = [atom for atom in atoms if world.owner(atom) == rank.at.data]
    for atom in atoms:
        world.complete(rank, index, action.stage, atom, held[atom])
        version = versions[atom]
        if version is None:
            return world.fail(rank, index, f"this part of stage {action.stage} is not on this rank")
        versions[atom] = version + 1
    if action.stage in rank.tied:
        world.complete_tie(rank, index, action.stage)
    world.used(rank, index, action.stage, held[atoms[0]] if atoms else Counter())
    rank.averaged.discard(action.stage)


def _tie(world: Provenance, members: Members, action: Action) -> None:
    copies = [(rank, stage) for rank, _ in members for stage in rank.tied]
    total = sum((rank.tied[stage] for rank, stage in copies), Counter[object]())
    for rank, stage in copies:
        if not rank.tied[stage]:
            world.fail(*members[0], f"no backward of stage {stage} has run, whose tied gradient it sums")
        rank.tied[stage] = Counter(total)


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


def _reduce_data(world: Provenance, members: Members, action: Action) -> None:
    _reduce(world, members, action)
    _reduce_tied(world, members, action)


def _reduce_tied(world: Provenance, members: Members, action: Action) -> None:
    if action.stage in world.plan.tied:
        total = sum((rank.tied[action.stage] for rank, _ in members), Counter[object]())
        for rank, _ in members:
            rank.tied[action.stage] = Counter(total)


def _scatter(world: Provenance, members: Members, action: Action) -> None:
    _reduce_tied(world, members, action)
    if not any(counts for rank, _ in members for counts in rank.gradients[action.stage]):
        world.fail(*members[0], "there is nothing to scatter: no rank has written this gradient")
    for atom in range(len(world.atoms)):
        total: Contributions = Counter()
        for rank, _ in members:
            total.update(rank.gradients[action.stage][atom])
            rank.gradients[action.stage][atom] = Counter()
        members[world.owner(atom)][0].reduced[action.stage][atom] += total


def _unshard(world: Provenance, members: Members, action: Action) -> None:
    for rank, index in members:
        if Action(action.stage, "UPDATE") in rank.row and not scatters(rank.row, action.stage):
            # Where parameters lie once for all ranks, each would apply the gradient.
            world.fail(rank, index, "every rank updates the whole of this stage: there are no parts to gather")
    owned = [members[world.owner(atom)][0].versions[action.stage][atom] for atom in range(len(world.atoms))]
    for rank, index in members:
        for stage in world.sharing("P", rank, action.stage):
            if None not in rank.versions[stage]:
                world.fail(rank, index, f"the parameter buffer it fills still holds stage {stage}: RESHARD comes first")
        rank.versions[action.stage] = list(owned)


def _average(world: Provenance, members: Members, action: Action) -> None:
    for rank, index in members:
        if world.plan.holds != "own":
            world.fail(rank, index, "averaging parameters is not what this plan declares; gradients are merged instead")
        if rank.versions[action.stage] != members[0][0].versions[action.stage]:
            world.fail(rank, index, "the replicas have made different numbers of updates")
        if set(rank.versions[action.stage]) != {world.updates()}:
            world.fail(rank, index, f"parameters are averaged once, after all {world.updates()} updates of the period")
        rank.averaged.add(action.stage)


def _swap(world: Provenance, members: Members, action: Action) -> None:
    world.swap(*members)


def _on_edge(world: Provenance, members: Members, action: Action) -> None:
    buf, gathers = buffer(action, action.verb.writes[0]), action.kind.startswith("GATHER")
    for rank, index in members:
        if buf not in rank.edges:
            world.fail(rank, index, f"there is nothing on edge {buf.stage}")
        if gathers and rank.edges[buf] != world.own_tokens(rank):
            world.fail(rank, index, f"edge {buf.stage} does not hold the sum of this rank's own tokens")
        if not gathers and any(share != rank.at.tensor for _, share in rank.edges[buf]):
            world.fail(rank, index, f"edge {buf.stage} is not a partial sum: it would be counted {len(members)} times")
    total: Shares = frozenset().union(*(rank.edges[buf] for rank, _ in members))
    for rank, _ in members:
        rank.edges[buf] = total & world.own_tokens(rank) if action.kind.startswith("SCATTER") else total


def _norm(world: Provenance, members: Members, action: Action) -> None:
    for rank, index in members:
        rank.normed = True
        for stage in rank.tied:
            world.complete_tie(rank, index, stage)
        for stage in rank.gradients:
            scattered = scatters(rank.row, stage)
            held = rank.reduced[stage] if scattered else rank.gradients[stage]
            for atom, counts in enumerate(held):
                if not scattered or world.owner(atom) == rank.at.data:
                    world.complete(rank, index, stage, atom, counts)


COMPUTE: dict[str, Callable[[Provenance, Holdings, int, Action], None]] = {
    "ZERO": _zero, "F": _forward, "LOSS": _loss, "B": _backward, "I": _input_half, "W": _weight_half,
    "RECOMPUTE": _recompute, "UPDATE": _update, "RESHARD": _reshard,
}  # fmt: skip
GROUP: dict[str, Callable[[Provenance, Members, Action], None]] = {
    "REDUCE_GRAD": _reduce_data, "SCATTER_GRAD": _scatter, "UNSHARD": _unshard, "AVERAGE": _average,
    "SUM_G": _reduce, "SUM_TIED": _tie, "NORM": _norm, "SWAP_G": _swap, **dict.fromkeys(ON_EDGES, _on_edge),
}  # fmt: skip
