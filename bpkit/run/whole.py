"""What a rank holds of a network, and whole networks and gradients from what ranks hold."""

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from bpkit.nn import Network, merge, shard
from bpkit.plan.plan import Plan
from bpkit.plan.program import Program, tied_copies

Held = Mapping[int, tuple[Tensor, Tensor]]  # by stage: flat parameters, and what is kept beside them


def rank_network(plan: Plan, network: Network, tensor: int) -> Network:
    """The network that a tensor rank computes, as its stages are cut."""
    if plan.mesh.tensor > 1:
        return shard(network, tensor, plan.mesh.tensor, bool(plan.own_tokens))
    return network.opened() if plan.opened else network


def gathered(network: Network, program: Program, held: Sequence[Held]) -> Network:
    """A copy of a network with what ranks hold: one mapping a rank, empty where its values are another's too."""
    stages = [[mapping[stage] for mapping in held if stage in mapping] for stage in range(program.plan.stages)]
    whole = network.copy()
    whole.load(unsharded(network, program, [[flat for flat, _ in flats] for flats in stages]))
    whole.flat_buffers.copy_(torch.cat([flats[0][1] for flats in stages]))
    return whole


def unsharded(network: Network, program: Program, flats: Sequence[Sequence[Tensor]],
              within: float = math.inf) -> list[Tensor]:  # fmt: skip
    """Tensors of the whole network, in the order of ``parameters()``.

    Parameters
    ----------
    flats : sequence of sequence of Tensor
        For each stage, the flat buffer of each tensor rank.
    within : float
        Copies of one tensor, in several stages or on several tensor ranks, may differ by this share of its norm.

    Raises
    ------
    RuntimeError
        If they differ more: an exchange went wrong.
    """
    ranks, sequence, found = len(flats[0]), bool(program.plan.own_tokens), []
    for index in range(ranks):
        parts = rank_network(program.plan, network, index).split(program.cuts, program.plan.place)
        for part, flat in zip(parts, flats, strict=True):
            part.flat_parameters.copy_(flat[index])
        _compare_tied(program.plan, parts, within)
        found.append([tensor for part in parts for tensor in part.parameters()])
    return merge(network, found, sequence=sequence, within=within) if ranks > 1 else found[0]


def _compare_tied(plan: Plan, parts: Sequence[Network], within: float) -> None:
    for name, copies in tied_copies([part.description for part in parts]):
        first, *others = (parts[stage].flat_parameters[place] for stage, place in copies.items())
        if any((first - other).norm() > within * first.norm() for other in others):
            raise RuntimeError(f"{plan.name}: stages {tuple(copies)} end with different copies of {name!r}")


def overlaid(plan: Plan, stage: int, pieces: Sequence[Tensor]) -> Tensor:
    """One gradient from those of all ranks, which are NaN where another rank updates, and must agree elsewhere."""
    whole = torch.full_like(pieces[0], math.nan)
    for rank, piece in enumerate(pieces):
        both = ~torch.isnan(piece) & ~torch.isnan(whole)
        if not torch.equal(piece[both], whole[both]):
            raise RuntimeError(f"{plan.name}: replica {rank} ends with another gradient of stage {stage} "
                               "than the others")  # fmt: skip
        whole = torch.where(torch.isnan(piece), whole, piece)
    if torch.isnan(whole).any():
        raise FloatingPointError(f"{plan.name}: the gradient of stage {stage} is not a number")
    return whole
