"""Plans: actions, passes, the checker and the strategies."""

from bpkit.plan.actions import VERBS, Action, Part, Verb
from bpkit.plan.check import check
from bpkit.plan.compile import Instruction, Program, compile
from bpkit.plan.mesh import Coordinate, Mesh
from bpkit.plan.passes import complete, refine
from bpkit.plan.plan import MERGES, Plan, PlanError, grid
from bpkit.plan.strategies import data_parallel, serial

__all__ = [
    "MERGES", "VERBS", "Action", "Coordinate", "Instruction", "Mesh", "Part", "Plan", "PlanError", "Program", "Verb",
    "check", "compile", "complete", "data_parallel", "grid", "refine", "serial",
]  # fmt: skip
