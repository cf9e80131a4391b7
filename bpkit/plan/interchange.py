"""Plans to and from ``torch.distributed.pipelining``: its compute-only CSV form, and its schedule runtime.

One line a pipeline rank, one cell an action, no header: ``0F0,0F1,,0B0``.  Empty cells are ticks without work; nested
cells, ``(0F3;3B1)OVERLAP_F_B``, are read as their actions one after another.  The runtime is not public: what is here
was tested on the versions of PyTorch in :data:`TESTED`.
"""

import csv
import io
import re
import tempfile
from collections.abc import Callable, Sequence
from typing import Any, Final

from bpkit.plan.action import Action
from bpkit.plan.mesh import Mesh
from bpkit.plan.passes import complete
from bpkit.plan.plan import Plan

#: Versions of PyTorch whose private schedule runtime was tested.
TESTED: Final = ("2.13",)
_COMPUTE: Final = ("F", "B", "I", "W")


def to_csv(plan: Plan) -> str:
    """The order of F, B, I and W of each pipeline rank; the reader adds communication.

    Raises
    ------
    ValueError
        If the form cannot hold what the plan says: other axes, recomputation, an update for each microbatch; or if
        PyTorch's runtime would compute something else: forwards of the last stage out of order.
    """
    if plan.mesh.data * plan.mesh.tensor > 1:
        raise ValueError(f"{plan.name}: the CSV form has a pipeline axis only, not a mesh of {plan.mesh}")
    if not plan.exact or any(action.kind == "RECOMPUTE" for row in plan.rows for action in row):
        raise ValueError(f"{plan.name}: the CSV form holds F, B, I and W of one exact step, no recomputation, no merge")
    last = [action.mb for row in plan.rows for action in row if (action.stage, action.kind) == (plan.stages - 1, "F")]
    if last != sorted(last, key=lambda mb: mb or 0):
        raise ValueError(f"{plan.name}: PyTorch takes targets in order, but the last stage's forwards run as {last}")
    return "".join(",".join(str(a) for a in row if a.kind in _COMPUTE) + "\n" for row in plan.rows)


def from_csv(text: str, name: str = "from_csv", data: int = 1, merge: str = "mean") -> Plan:
    """A whole plan from the compute-only form.

    Raises
    ------
    ValueError
        If a cell holds anything but F, B, I and W, a line holds nothing, stages or microbatches have gaps, or the
        actions wait for each other in a circle.
    """
    if not text.strip():
        raise ValueError("the CSV holds no actions")
    rows = []
    for number, line in enumerate(csv.reader(io.StringIO(text.strip())), 1):
        flat = [re.sub(r"^\((.*)\)OVERLAP_F_B$", r"\1", cell.strip()) for cell in line]
        row = tuple(Action.parse(part) for cell in flat if cell for part in cell.split(";"))
        wrong = [action for action in row if action.kind not in _COMPUTE]
        if wrong:
            raise ValueError(f"line {number} of the CSV: {wrong[0]}: the compute-only form holds {', '.join(_COMPUTE)}")
        if not row:
            raise ValueError(f"line {number} of the CSV holds no action: each line is a rank; leave out an idle one")
        rows.append(row)
    every = [action for row in rows for action in row]
    stages, microbatches = {a.stage for a in every}, {a.mb or 0 for a in every}
    for what, found in (("stage", stages), ("microbatch", microbatches)):
        if gap := {*range(len(found))} - found:
            raise ValueError(f"the CSV has {what} {max(found)}, but no {what} {min(gap)}: they are numbered from 0")
    return complete(Plan(name, tuple(rows), len(stages), Mesh(data, len(rows)), len(microbatches), merge))


def torch_schedule(plan: Plan, stages: Sequence[Any], loss: Callable[..., Any], batch: int) -> Any:
    """PyTorch's schedule runtime with the plan loaded, to be stepped on each rank of its process group.

    ``step(x)`` on the rank of stage 0, ``step(target=y, losses=[])`` on the rank of the last stage.

    Parameters
    ----------
    plan : Plan
    stages : sequence of torch.distributed.pipelining.PipelineStage
        Those of this rank.
    loss : callable
        Mean over a microbatch; the runtime divides gradients by the number of microbatches.
    batch : int
        Samples of the batch.

    Raises
    ------
    ValueError
        If the plan does not fit the form (see `to_csv`) or the microbatches would be of unequal size, whose mean of
        means is not the mean.
    RuntimeError
        If this version of PyTorch was not tested.
    """
    text = to_csv(plan)
    if batch % plan.microbatches:
        raise ValueError(f"{plan.name}: PyTorch needs equal microbatches, but {plan.microbatches} do not divide "
                         f"a batch of {batch}: it would give the mean of unequal means")  # fmt: skip
    import torch
    from torch.distributed.pipelining.schedules import _PipelineScheduleRuntime

    version = ".".join(torch.__version__.split(".")[:2])
    if version not in TESTED:
        raise RuntimeError(f"the schedule runtime of PyTorch is private and was tested on {', '.join(TESTED)}, "
                           f"not on {torch.__version__}: its meaning may have changed")  # fmt: skip
    runtime = _PipelineScheduleRuntime(list(stages), plan.microbatches, loss_fn=loss, scale_grads=True)
    with tempfile.NamedTemporaryFile("w", suffix=".csv") as file:
        file.write(text)
        file.flush()
        runtime._load_csv(file.name, format="compute_only")
    return runtime
