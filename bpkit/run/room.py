"""The memory that a plan takes on a device, by calculation, and what is said where there is too little."""

import contextlib
from collections.abc import Callable, Iterator

import torch

from bpkit.nn import Network
from bpkit.optim import Optimizer
from bpkit.plan import Plan, Program
from bpkit.plan.mesh import Coordinate
from bpkit.plan.plan import scatters
from bpkit.plan.program import of_rank
from bpkit.run.transports.shared.files import megabytes


def predicted(program: Program, at: Coordinate, network: Network, optimizer: Optimizer, rows: int,
              precision: str) -> dict[str, int]:  # fmt: skip
    """Bytes of parameters, gradients, optimizer state and activations that the rank at a coordinate keeps.

    Activations are the rank's saved forwards at their peak (`Program.peak`), each of a microbatch's `rows` inputs and
    outputs of all layers; what a layer allocates for a moment is left out, as are messages.  With a transport whose
    ranks share memory, gathered parameters are one for all of them and take less.
    """
    plan, size = program.plan, network.dtype.itemsize
    row, stages = plan.row(at), plan.owned(at.pipeline)
    own = {stage: program.sizes[stage] for stage in stages}
    parts = {stage: own[stage] // plan.mesh.data for stage in stages if scatters(row, stage)}
    updated = sum((own | parts).values())
    gathered = plan.mesh.data > 1 and any(action.kind == "RESHARD" for action in row)
    count = (plan.gradient_buffers, plan.parameter_buffers if gathered else 0)
    gradients, parameters = (_buffers(program.sizes, buffers) if buffers else sum(own.values()) for buffers in count)
    half = 2 * 2 * sum(own.values()) if precision == "bf16" else 0
    costs, bounds = of_rank(plan, network.description, at.tensor).costs(), (0, *program.cuts, None)
    kept = [cost for stage in stages for cost in costs[bounds[stage] : bounds[stage + 1]]]
    saved = sum(cost.inputs + cost.outputs for cost in kept) * program.peak[plan.row_index(at)] // len(stages)
    return {"parameters": size * (parameters + updated * gathered) + half,
            "gradients": size * (gradients + sum(parts.values())),
            "optimizer": size * updated * len(optimizer.state(torch.empty(1))),
            "activations": size * saved * rows}  # fmt: skip


def _buffers(sizes: tuple[int, ...], count: int) -> int:
    """Elements of `count` buffers that stages share in turn."""
    return sum(max((size for stage, size in enumerate(sizes) if stage % count == i), default=0) for i in range(count))


@contextlib.contextmanager
def explained(plan: Plan, needed: Callable[[], dict[str, int]]) -> Iterator[None]:
    """Say what the plan needs, and what would need less, where the device's memory is not enough.

    Raises
    ------
    torch.OutOfMemoryError
    """
    try:
        yield
    except torch.OutOfMemoryError as error:
        needs, kinds = needed(), {action.kind for row in plan.rows for action in row}
        said = ", ".join(f"{name} {megabytes(size)}" for name, size in needs.items())
        less = ["a smaller batch"]
        less += ["more microbatches, of which a pipeline keeps few at a time"] if plan.mesh.pipeline > 1 else []
        less += ["recompute=True"] if "RECOMPUTE" not in kinds and plan.mesh.pipeline > 1 else []
        less += ["bp.plan.zero, which shards optimizer state (level 1), gradients (2) and parameters (3) over data "
                 "ranks"] if "RESHARD" not in kinds and plan.holds == "all" else []  # fmt: skip
        text = f"{plan.name} takes about {megabytes(sum(needs.values()))} here, by calculation: {said}"
        raise torch.OutOfMemoryError(f"{text}. Less is needed with {', or '.join(less)}.\n{error}") from error
