"""Tensor parallelism: each stage's products split over the ranks of the tensor axis (Shoeybi et al. 2019)."""

from dataclasses import replace
from itertools import pairwise

from bpkit.description.costs import balanced_cuts
from bpkit.description.tensor import TensorLayout
from bpkit.plan.action import PASSES, Action
from bpkit.plan.mesh import Mesh
from bpkit.plan.passes import complete
from bpkit.plan.plan import Plan


def tensor_parallel(plan: Plan, tensor: int, layout: TensorLayout) -> Plan:
    """The plan with its products split over a tensor axis: stages are cut at the sums that this needs.

    With one worker's plan, and a network of one split stage between two whole ones::

        0ZERO 1ZERO 2ZERO 0F0 1F0 1SUM_F0 2F0 2LOSS0 2B0 1I0 1SUM_B0 1W0 0B0 2UPDATE 1UPDATE 0UPDATE

    A split stage's whole backward B is written as I and W, so that W overlaps the sum.  Two sums of one edge a
    microbatch and split stage: sent a rank by a ring of t ranks, ``4 (t-1)/t`` edges (Shoeybi et al. 2019, section 3).
    With sequence parallelism each SUM_F is a SCATTER_F and a later GATHER_F, each SUM_B a SCATTER_B and a later
    GATHER_B: as many bytes; and SUM_G adds the gradients of what every rank holds and uses for its own tokens
    (Korthikanti et al. 2022, section 4.2).  Where the layout splits the classes of the last stage, LOSS sums one
    maximum and two numbers a row over the tensor ranks.

    Parameters
    ----------
    plan : Plan
        Serial, data-parallel or a pipeline; its order of F, B, I and W and its data axis are kept.
    tensor : int
        Ranks of the tensor axis.
    layout : TensorLayout
        Of the network (`bpkit.nn.tensor_layout`); each stage of `plan` takes consecutive stages of it, balanced by
        their costs, and joins those that are not split.

    Raises
    ------
    ValueError
        If the plan has more stages than the layout, is expanded, or reduces otherwise than by REDUCE_GRAD.
    """
    kinds = {action.kind for row in plan.rows for action in row}
    if plan.expanded or plan.holds != "all" or kinds & {"SCATTER_GRAD", "UNSHARD"}:
        raise ValueError(f"{plan.name}: a tensor axis is laid under serial, data_parallel and pipeline plans; "
                         "shard_optimizer, expand and the like come after it")  # fmt: skip
    count = len(layout.cuts) + 1
    starts = [s for s in range(count) if not any(start < s <= end for start, end in layout.skips)]
    if plan.stages > len(starts):
        raise ValueError(f"{plan.name} has {plan.stages} stages, but the network can only be cut into {len(starts)} "
                         "here, where no skip connection goes past")  # fmt: skip
    costs = [sum(layout.costs[low:high]) for low, high in pairwise([*starts, count])]
    cuts = [layout.cuts[starts[cut] - 1] for cut in balanced_cuts(costs, plan.stages)]
    layout = layout.joined(cuts)
    count = len(layout.cuts) + 1
    bounds = list(pairwise([0, *(layout.cuts.index(cut) + 1 for cut in cuts), count]))
    split = {*layout.partial_outputs, *layout.partial_inputs} if tensor > 1 else set()
    rows = tuple(tuple(a for action in row for a in _cut(action, bounds, split)) for row in plan.rows)
    place = tuple(plan.place[stage] for stage, (low, high) in enumerate(bounds) for _ in range(low, high))
    shares = (layout.partial_outputs, layout.partial_inputs, layout.own_tokens) if tensor > 1 else ((), (), ())
    return complete(Plan(f"tensor_parallel({plan.name}, {tensor})", rows, count,
                         Mesh(plan.mesh.data, plan.mesh.pipeline, tensor), plan.microbatches, plan.merge, place,
                         layout.cuts, *shares, skips=layout.skips, opened=True))  # fmt: skip


def _cut(action: Action, bounds: list[tuple[int, int]], split: set[int]) -> list[Action]:
    """An action of one stage as actions of its parts: forwards ascending, backwards descending."""
    if action.kind not in PASSES:
        return []
    low, high = bounds[action.stage]
    stages = range(low, high) if action.kind in ("F", "RECOMPUTE") else range(high - 1, low - 1, -1)
    return [Action(stage, kind, action.mb) for stage in stages
            for kind in (("I", "W") if action.kind == "B" and stage in split else (action.kind,))]


def shard_optimizer(plan: Plan) -> Plan:
    """ZeRO level 1 along the data axis of any plan: reductions scatter, updates are of the rank's part, then gathered.

    Raises
    ------
    ValueError
        If the plan has no REDUCE_GRAD to replace.
    """
    kinds = {"REDUCE_GRAD": "SCATTER_GRAD"}
    rows = [[each for action in row for each in [replace(action, kind=kinds.get(action.kind, action.kind)),
                                                 *[Action(action.stage, "UNSHARD")] * (action.kind == "UPDATE")]]
            for row in plan.rows]  # fmt: skip
    if not any(action.kind == "SCATTER_GRAD" for row in rows for action in row):
        raise ValueError(f"{plan.name} reduces no gradient over a data axis: there is nothing to shard")
    return replace(plan.with_rows(rows), name=f"shard_optimizer({plan.name})")
