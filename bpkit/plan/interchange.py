"""Plans to and from the compute-only CSV form of ``torch.distributed.pipelining``.

One line a pipeline rank, one cell an action, no header: ``0F0,0F1,,0B0``.  Empty cells are ticks without work; nested
cells, ``(0F3;3B1)OVERLAP_F_B``, are read as their actions one after another.
"""

import csv
import io
import re
from typing import Final

from bpkit.plan.action import Action
from bpkit.plan.mesh import Mesh
from bpkit.plan.passes import complete
from bpkit.plan.plan import Plan

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
