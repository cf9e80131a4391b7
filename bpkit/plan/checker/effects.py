"""What each kind of action does to the multisets of `bpkit.plan.checker.provenance`."""

from collections.abc import Callable, Sequence
from functools import reduce

from bpkit.plan.action import ON_EDGES, Action, buffer
from bpkit.plan.checker.provenance import NOTHING, STALE, Contributions, Holdings, Members, Provenance, Shares

# -- compute actions ---------------------------------------------------------------------------------------


def _zero(world: Provenance, rank: Holdings, index: int, action: Action) -> None:
    rank.gradients[action.stage] = [NOTHING] * len(world.atoms)
    rank.reduced[action.stage] = [NOTHING] * len(world.atoms)


def _forward(world: Provenance, rank: Holdings, index: int, action: Action) -> None:
    stage, mb = action.stage, action.mb
    for near in world.plan.near(action, "P"):
        rank.seen[stage, mb, near] = world.weights(rank, index, near)
    world.reads[stage, rank.at.data, mb] = rank.seen[stage, mb, stage]
    if stage > 0:
        world.whole_edge(rank, index, ("A", stage, mb))
    if ("S", stage, mb) in rank.edges:
        world.fail(rank, index, "this forward already ran and its backward has not")
    rank.edges["A", stage + 1, mb] = world.given(rank, stage, stage in world.plan.partial_outputs)
    if (stage, mb) not in rank.facts.recomputed:
        rank.edges["S", stage, mb] = world.wanted(rank, stage)


def _loss(world: Provenance, rank: Holdings, index: int, action: Action) -> None:
    if action.stage != world.plan.stages - 1:
        world.fail(rank, index, f"the loss follows the last stage, {world.plan.stages - 1}")
    world.whole_edge(rank, index, ("A", action.stage + 1, action.mb))
    del rank.edges["A", action.stage + 1, action.mb]
    rank.edges["D", action.stage + 1, action.mb] = world.wanted(rank, action.stage)


def _input_half(world: Provenance, rank: Holdings, index: int, action: Action) -> None:
    stage, mb = action.stage, action.mb
    world.same_weights(rank, index, stage, mb)
    if ("K", stage, mb) in rank.edges:
        world.fail(rank, index, "the input half of this backward has run already, and its weight half has not")
    world.whole_edge(rank, index, ("D", stage + 1, mb))
    world.whole_edge(rank, index, ("S", stage, mb))
    if stage > 0:  # nobody asks for the gradient of the network's input
        rank.edges["D", stage, mb] = world.given(rank, stage, stage in world.plan.partial_inputs)
    rank.edges["K", stage, mb] = world.wanted(rank, stage)


def _weight_half(world: Provenance, rank: Holdings, index: int, action: Action) -> None:
    stage, mb = action.stage, action.mb
    world.whole_edge(rank, index, ("K", stage, mb))
    for edge in (("K", stage, mb), ("S", stage, mb), ("D", stage + 1, mb), ("A", stage, mb)):
        rank.edges.pop(edge, None)
    for other in world.sharing("G", rank, stage) if world.plan.gradient_buffers else ():
        if any(held != NOTHING and not held.there & STALE.there for held in rank.gradients[other]):
            world.fail(rank, index, f"the gradient buffer it writes still holds the gradient of stage {other}")
    for use, (number, user) in enumerate(world.uses, 1):
        if user == stage:
            lies, gives = world.plan.holders[number][rank.at.pipeline], world.one(rank.at.data, mb or 0, 0, use)
            rank.gradients[lies] = [held.plus(gives) for held in rank.gradients[lies]]
    made = world.one(rank.at.data, mb or 0, rank.at.tensor if stage in world.split else 0)
    rank.gradients[stage] = [held.plus(made) for held in rank.gradients[stage]]


def _backward(world: Provenance, rank: Holdings, index: int, action: Action) -> None:
    _input_half(world, rank, index, action)
    _weight_half(world, rank, index, action)


def _recompute(world: Provenance, rank: Holdings, index: int, action: Action) -> None:
    world.same_weights(rank, index, action.stage, action.mb)
    if ("S", action.stage, action.mb) in rank.edges:
        world.fail(rank, index, "what it computes again is kept already")
    if action.stage > 0:
        world.whole_edge(rank, index, ("A", action.stage, action.mb))
    rank.edges["S", action.stage, action.mb] = world.wanted(rank, action.stage)


def _update(world: Provenance, rank: Holdings, index: int, action: Action) -> None:
    if rank.facts.clipped and not rank.normed:
        world.fail(rank, index, "it is clipped by the norm of the whole gradient, and NORM comes later")
    versions = rank.versions[action.stage]
    held, atoms = _updated(world, rank, action)
    for atom in atoms:
        world.complete(rank, index, action.stage, atom, held[atom])
        version = versions[atom]
        if version is None:
            world.fail(rank, index, f"this part of stage {action.stage} is not on this rank")
        versions[atom] = version + 1
    world.used(rank, index, action.stage, held[atoms[0]] if atoms else NOTHING)
    rank.averaged.discard(action.stage)


def _updated(world: Provenance, rank: Holdings, action: Action) -> tuple[list[Contributions], Sequence[int]]:
    """The gradient of the stage that an UPDATE applies, and the atoms that it applies."""
    atoms = world.atoms.inside(action.part)
    if action.stage not in rank.facts.scattered:
        return rank.gradients[action.stage], atoms
    whole = action.part is None
    return rank.reduced[action.stage], [atom for atom in atoms if not whole or world.owner[atom] == rank.at.data]


def _tie(world: Provenance, members: Members, action: Action) -> None:
    for number, at in enumerate(world.plan.holders):
        uses = [use for use, (other, _) in enumerate(world.uses, 1) if other == number]
        held = [(rank.gradients[at[rank.at.pipeline]], rank, index) for rank, index in members
                if len(at) > 1 and rank.at.pipeline in at]  # fmt: skip
        own = [[Contributions(*(world.of_uses(bits, uses) for bits in one)) for one in atoms] for atoms, _, _ in held]
        for parts, (_, rank, index) in zip(own, held, strict=True):
            if not parts[0].there or any(part != parts[0] for part in parts):
                world.fail(rank, index, f"no backward of stage {at[rank.at.pipeline]} has run, or parts were exchanged")
        total = reduce(Contributions.plus, (parts[0] for parts in own), NOTHING)
        for parts, (atoms, _, _) in zip(own, held, strict=True):
            atoms[:] = [Contributions(one.there & ~part.there | total.there, one.again & ~part.again | total.again)
                        for one, part in zip(atoms, parts, strict=True)]  # fmt: skip


def _reshard(world: Provenance, rank: Holdings, index: int, action: Action) -> None:
    if action.stage not in rank.facts.gathered:
        world.fail(rank, index, f"no UNSHARD of the row gathers stage {action.stage}: its parameters must stay whole")
    versions = rank.versions[action.stage]
    rank.versions[action.stage] = [v if owner == rank.at.data else None
                                   for v, owner in zip(versions, world.owner, strict=True)]  # fmt: skip


# -- collectives -------------------------------------------------------------------------------------------


def _sums(world: Provenance, members: Members, action: Action) -> list[Contributions]:
    """The sum of each atom over the members of a group; after a scatter, memory holds anything."""
    atoms = zip(*(rank.gradients[action.stage] for rank, _ in members), strict=True)
    total = [reduce(Contributions.plus, held) for held in atoms]
    if action.stage in members[0][0].facts.scattered and not any(held.there for held in total):
        what = "scatter" if action.kind == "SCATTER_GRAD" else "sum"
        world.fail(*members[0], f"there is nothing to {what}: no rank has written this gradient")
    return total


def _reduce(world: Provenance, members: Members, action: Action) -> None:
    total = _sums(world, members, action)
    for rank, _ in members:
        rank.gradients[action.stage] = list(total)


def _scatter(world: Provenance, members: Members, action: Action) -> None:
    total = _sums(world, members, action)
    for rank, _ in members:
        rank.gradients[action.stage] = [NOTHING] * len(total)
    for atom, (held, owner) in enumerate(zip(total, world.owner, strict=True)):
        own = members[owner][0].reduced[action.stage]
        own[atom] = own[atom].plus(held)


def _unshard(world: Provenance, members: Members, action: Action) -> None:
    for rank, index in members:
        if action.stage in rank.facts.updated_whole - rank.facts.scattered:
            # Where parameters lie once for all ranks, each would apply the gradient.
            world.fail(rank, index, "every rank updates the whole of this stage: there are no parts to gather")
    owned = [members[owner][0].versions[action.stage][atom] for atom, owner in enumerate(world.owner)]
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


def _on_edge(world: Provenance, members: Members, action: Action) -> None:
    buf, gathers = buffer(action, action.verb.writes[0]), action.kind.startswith("GATHER")
    for rank, index in members:
        if buf not in rank.edges:
            world.fail(rank, index, f"there is nothing on edge {buf.stage}")
        if gathers and rank.edges[buf] != rank.own_tokens:
            world.fail(rank, index, f"edge {buf.stage} does not hold the sum of this rank's own tokens")
        if not gathers and any(share != rank.at.tensor for _, share in rank.edges[buf]):
            world.fail(rank, index, f"edge {buf.stage} is not a partial sum: it would be counted {len(members)} times")
    total: Shares = frozenset().union(*(rank.edges[buf] for rank, _ in members))
    for rank, _ in members:
        rank.edges[buf] = total & rank.own_tokens if action.kind.startswith("SCATTER") else total


def _norm(world: Provenance, members: Members, action: Action) -> None:
    for rank, index in members:
        rank.normed = True
        for applied in (action for action in rank.facts.updates if action.stage in rank.gradients):
            held, atoms = _updated(world, rank, applied)
            for atom in atoms:
                world.complete(rank, index, applied.stage, atom, held[atom])


COMPUTE: dict[str, Callable[[Provenance, Holdings, int, Action], None]] = {
    "ZERO": _zero, "F": _forward, "LOSS": _loss, "B": _backward, "I": _input_half, "W": _weight_half,
    "RECOMPUTE": _recompute, "UPDATE": _update, "RESHARD": _reshard,
}  # fmt: skip
GROUP: dict[str, Callable[[Provenance, Members, Action], None]] = {
    "REDUCE_GRAD": _reduce, "SCATTER_GRAD": _scatter, "UNSHARD": _unshard, "AVERAGE": _average,
    "SUM_G": _reduce, "SUM_TIED": _tie, "NORM": _norm, "SWAP_G": Provenance.swap, **dict.fromkeys(ON_EDGES, _on_edge),
}  # fmt: skip
