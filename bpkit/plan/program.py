"""``compile``: derive once, for run and simulate alike, what a plan leaves implicit."""

import math
from bisect import bisect_right
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import pairwise

from bpkit.description.costs import balanced_cuts
from bpkit.description.network import Described, Description
from bpkit.description.tensor import TensorLayout, shard, tensor_layout
from bpkit.plan.action import Action, buffer
from bpkit.plan.checker.check import check
from bpkit.plan.liveness import loans, peak_activations, waits_by_row
from bpkit.plan.mesh import Coordinate
from bpkit.plan.passes import clip as clipped
from bpkit.plan.passes import tie
from bpkit.plan.plan import Plan


@dataclass(frozen=True)
class Instruction:
    """An action with what is derived for it.

    Parameters
    ----------
    action : Action
    waits : tuple of int
        Indices in the row of communication actions that must have ended before this one runs.  Earlier
        compute needs no entry: a row runs its compute in order.
    payload : int
        Bytes of the buffer (part) that the action gives to the wire, for one sample of the batch where the
        buffer is an edge; 0 for compute, and over an axis of one.
    """

    action: Action
    waits: tuple[int, ...]
    payload: int

    @property
    def counted(self) -> bool:
        """Whether the payload is sent as it stands, so that bytes are counted at the send."""
        return self.action.verb.bytes == "sent"

    def given(self, samples: int) -> int:
        """Bytes that go to the wire where a microbatch has so many samples."""
        return self.payload * (samples if self.action.verb.scope == "mb" else 1)

    def bytes(self, samples: int) -> int:
        """Bytes that are counted; -1 where a native collective counts none."""
        return self.given(samples) if self.counted or not self.payload else -1


@dataclass(frozen=True)
class Program:
    """A compiled plan: rows of instructions for one network.

    Parameters
    ----------
    plan : Plan
    cuts : tuple of int
        Layers at which stages 1, 2, ... start.
    sizes : tuple of int
        Elements of each stage's flat buffers, padding included.
    rows : tuple of tuples of Instruction
    loans : tuple of dicts
        For each row, the messages that each receive channel (kind, stage) holds at a time, so that a receive can be
        posted where the row posts it.
    peak : tuple of int
        For each row, the largest number of saved forwards (stage, microbatch) held at a time.
    """

    plan: Plan
    cuts: tuple[int, ...]
    sizes: tuple[int, ...]
    rows: tuple[tuple[Instruction, ...], ...]
    loans: tuple[dict[tuple[str, int], int], ...]
    peak: tuple[int, ...]

    def row(self, at: Coordinate) -> tuple[Instruction, ...]:
        """The instructions of the rank at a coordinate."""
        return self.rows[self.plan.row_index(at)]

    def payload(self, at: Coordinate) -> int:
        """Bytes of gradients that a rank gives to reductions and sends of parts in one step."""
        verbs = ((step, step.action.verb) for step in self.row(at))
        return sum(step.payload for step, verb in verbs if verb.axis == "data" and verb.touches("G"))


def compile(plan: Plan, network: Described, clip: bool = False, weights: Sequence[int] | None = None,
            norm: bool = False) -> Program:  # fmt: skip
    """Check a plan and resolve it for a network.

    Parameters
    ----------
    plan : Plan
    network : Network or Description
        Gives the layers, but no tensor; stages are balanced by their cost where the plan holds no cuts.
    clip : bool
        Whether gradients are clipped by their global norm: a NORM is put before the first UPDATE.
    weights : sequence of int, optional
        What to balance stages by where the plan holds no cuts: a number a layer, for example measured nanoseconds.
    norm : bool
        Whether to put the NORM there although nothing is clipped.

    Raises
    ------
    PlanError
        If the plan would deadlock or compute something else than it declares.
    ValueError
        If the network has fewer layers than the plan has stages, there is not one weight a layer, or the network
        cannot be split over the plan's tensor ranks.
    """
    network = network.description
    network = network.opened() if plan.opened else network
    if weights is not None and len(weights) != len(network.layers):
        raise ValueError(f"compile takes one weight a layer: {len(network.layers)}, not {len(weights)}")
    if plan.stages > len(network.layers):
        raise ValueError(f"{plan.name} has {plan.stages} stages, but the network has only {len(network.layers)} "
                         "layers: use fewer stages or buckets")  # fmt: skip
    _same_layout(plan, network)
    cuts = _cuts(plan, network, [cost.total for cost in network.costs()] if weights is None else weights)
    parts = network.split(cuts)
    plan = _tied(replace(plan, skips=_skips(network, cuts)), parts)
    if (clip or norm) and not any(action.kind == "NORM" for row in plan.rows for action in row):
        plan = replace(clipped(plan), name=f"{plan.name} with {'clipping' if clip else 'its norm'}")
    check(plan)
    edges = (*(math.prod(part.input_shape) for part in parts), math.prod(network.output_shape))
    ranks = [of_rank(plan, network, index).split(cuts, plan.place) for index in range(plan.mesh.tensor)]
    own, sizes = ranks[0], tuple(max(part.flat_size for part in parts) for parts in zip(*ranks, strict=True))
    shares = tuple(sum(math.prod(p.shape) for p in part.shares()) for part in own)
    copies = [(plan.place[stage], lies, len(held) - 1) for _, held in tied_copies(own) for stage, lies in held.items()]
    tied = tuple(sum((lies.stop - lies.start) * others for at, lies, others in copies if at == rank)
                 for rank in range(plan.mesh.pipeline))  # fmt: skip
    rows = _instructions(plan, _Wire(network.itemsize, sizes, edges, shares, tied))
    return Program(plan, cuts, sizes, rows, tuple(map(loans, plan.rows)), tuple(map(peak_activations, plan.rows)))


def _cuts(plan: Plan, network: Description, weights: Sequence[int]) -> tuple[int, ...]:
    """The plan's cuts, or balanced ones; of a pipeline, where it can be, where no skip connection goes past."""
    if plan.cuts is not None:
        return network.checked(plan.cuts)
    past = {layer for start, end in network.skips() for layer in range(start + 1, end + 1)}
    starts = [i for i in range(len(weights)) if i not in past]
    if plan.mesh.pipeline == 1 or len(starts) < plan.stages:
        starts = list(range(len(weights)))
    runs = [sum(weights[low:high]) for low, high in pairwise([*starts, len(weights)])]
    return tuple(starts[cut] for cut in balanced_cuts(runs, plan.stages))


def _skips(network: Description, cuts: Sequence[int]) -> tuple[tuple[int, int], ...]:
    """Stages at which skip connections start and end, where these are two."""
    ends = {(bisect_right(cuts, start), bisect_right(cuts, end)) for start, end in network.skips()}
    return tuple(sorted((start, end) for start, end in ends if start < end))


def of_rank(plan: Plan, network: Description, tensor: int) -> Description:
    """What a tensor rank computes, as its stages are cut."""
    network = network.opened() if plan.opened else network
    return shard(network, tensor, plan.mesh.tensor, bool(plan.own_tokens)) if plan.mesh.tensor > 1 else network


def tied_copies(parts: Sequence[Description]) -> list[tuple[str, dict[int, slice]]]:
    """Each tied tensor of which several stages hold copies, by name: where it lies in each stage that does."""
    held = [part.tied_slices() for part in parts]
    names = sorted(name for name, n in Counter(name for own in held for name in own).items() if n > 1)
    return [(name, {stage: own[name] for stage, own in enumerate(held) if name in own}) for name in names]


def _tied(plan: Plan, parts: Sequence[Description]) -> Plan:
    """The plan with what the tensors that several of its stages use add to it, or as it is where it says so itself."""
    tied = tuple(sorted({tuple(copies) for _, copies in tied_copies(parts)}))
    if plan.tied and plan.tied != tied:
        raise ValueError(f"{plan.name} says that stages {plan.tied} share a tensor, but in this network "
                         f"{tied or 'none'} do: leave it out, and compile finds them")  # fmt: skip
    return tie(plan, tied) if tied and not plan.tied else plan


def _same_layout(plan: Plan, network: Description) -> None:
    """Refuse a plan with a tensor axis that was made for another network."""
    if plan.mesh.tensor > 1:
        layout = tensor_layout(network, bool(plan.own_tokens)).joined(plan.cuts or ())
        if _tensor_stages(plan) != _tensor_stages(layout):
            raise ValueError(f"{plan.name} splits another network than this one over the tensor axis: make it with "
                             "bp.plan.tensor_parallel(plan, ranks, bp.nn.tensor_layout(network))")  # fmt: skip


def _tensor_stages(of: Plan | TensorLayout) -> tuple[object, ...]:
    return of.cuts, of.partial_outputs, of.partial_inputs, of.own_tokens, of.skips


def compile_collective(plan: Plan, size: int, itemsize: int) -> Program:
    """Check a collective by itself and resolve it for a buffer of `size` elements of `itemsize` bytes."""
    check(plan)
    rows = _instructions(plan, _Wire(itemsize, (size,)))
    return Program(plan, (), (size,), rows, tuple({} for _ in rows), (0,) * len(rows))


def bucket_cuts(network: Described, megabytes: float) -> tuple[int, ...]:
    """Cuts that give buckets of at most so many megabytes of gradients, filled from the last layer.

    A layer that is larger has a bucket to itself.  Backward produces the last layer's gradient first, so the first
    bucket to be reduced is full.

    Raises
    ------
    ValueError
        If the size is not positive.
    """
    if megabytes <= 0:
        raise ValueError(f"a bucket has a positive size in megabytes, not {megabytes}")
    cuts: list[int] = []
    filled, network = 0.0, network.description
    for index, cost in reversed([*enumerate(network.costs())]):
        size = cost.parameters * network.itemsize / 1e6
        if filled and size and filled + size > megabytes:
            cuts.append(index + 1)
            filled = 0.0
        filled += size
    return tuple(reversed(cuts))


@dataclass(frozen=True)
class _Wire:
    """What there is to communicate, in elements of so many bytes.

    Of each stage its flat buffer, the edge in front of it (and the output), of one sample, and the gradients of which
    tensor ranks have shares; of each pipeline rank, the copies of tied tensors that it gives to all others.
    """

    itemsize: int
    flat: tuple[int, ...]
    edges: tuple[int, ...] = ()
    shares: tuple[int, ...] = ()
    tied: tuple[int, ...] = ()

    def payload(self, action: Action, plan: Plan) -> int:
        """Bytes that an action gives to the wire: of its whole part, or of one sample of its edge."""
        stage, verb, mesh = action.stage, action.verb, plan.mesh
        if not verb.bytes or (mesh.size if verb.axis == "all" else getattr(mesh, verb.axis or "")) == 1:
            return 0
        low, high = action.part.bounds(self.flat[stage]) if action.part else (0, self.flat[stage])
        if verb.axis == "all":
            return 8 * _squares_are_shares(plan)  # one float64
        if verb.touches("AD"):
            letter, edge, _ = buffer(action, verb.reads[0])
            own = verb.axis == "pipeline" and edge - (letter == "D") in plan.own_tokens  # collectives: of all ranks
            high = self.edges[edge] // (mesh.tensor if own else 1)
        elif verb.axis != "data":
            high = self.shares[stage] if verb.axis == "tensor" else self.tied[plan.place[stage]]
        return (high - low) * self.itemsize


@lru_cache(maxsize=16)
def _squares_are_shares(plan: Plan) -> bool:
    """Whether not every rank updates everything."""
    whole = [{action.stage for action in row if action.kind == "UPDATE" and not action.part} for row in plan.rows]
    scattered = any(action.kind == "SCATTER_GRAD" for row in plan.rows for action in row)
    return plan.mesh.size > plan.mesh.data or scattered or min(map(len, whole)) < plan.stages


def _instructions(plan: Plan, wire: _Wire) -> tuple[tuple[Instruction, ...], ...]:
    return tuple(tuple(Instruction(action, tuple(i for i in needs if row[i].verb.stream != "compute"),
                                   wire.payload(action, plan)) for action, needs in zip(row, waits, strict=True))
                 for row, waits in zip(plan.rows, waits_by_row(plan), strict=True))  # fmt: skip
