"""What is said where a device has too little memory for a plan."""

import contextlib
from collections.abc import Callable, Iterator

import torch

from bpkit.plan import Plan
from bpkit.run.transports.shared.files import megabytes


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
