"""Plans: actions, passes, the checker and the strategies."""

from bpkit.plan.action import VERBS, Action, Part, Verb
from bpkit.plan.checker.check import check
from bpkit.plan.interchange import from_csv, to_csv
from bpkit.plan.mesh import Coordinate, Mesh
from bpkit.plan.passes import complete, refine
from bpkit.plan.plan import MERGES, Plan, PlanError, grid
from bpkit.plan.program import Instruction, Program, bucket_cuts, compile
from bpkit.plan.strategies.collectives import collective, expand
from bpkit.plan.strategies.data_parallel import data_parallel, serial
from bpkit.plan.strategies.pipeline import gpipe, interleaved, naive, one_f_one_b, pipedream
from bpkit.plan.strategies.servers import asynchronous_server, local_sgd, parameter_server
from bpkit.plan.strategies.tensor import shard_optimizer, tensor_parallel
from bpkit.plan.strategies.zero import zero
from bpkit.plan.strategies.zero_bubble import zb_v, zero_bubble_h1, zero_bubble_h2

__all__ = ["MERGES", "VERBS", "Action", "Coordinate", "Instruction", "Mesh", "Part", "Plan", "PlanError", "Program",
           "Verb", "asynchronous_server", "bucket_cuts", "check", "collective", "compile", "complete", "data_parallel",
           "expand", "from_csv", "gpipe", "grid", "interleaved", "local_sgd", "naive", "one_f_one_b",
           "parameter_server", "pipedream", "refine", "serial", "shard_optimizer", "tensor_parallel", "to_csv",
           "zb_v", "zero", "zero_bubble_h1", "zero_bubble_h2"]  # fmt: skip
