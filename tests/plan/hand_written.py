"""Plans written by hand whose strategies come later: a pipeline, a ring, a tensor split, shards of the update."""

from __future__ import annotations

import bpkit as bp
from bpkit.plan import Action, Mesh, Plan

PIPELINE_1F1B = """
plan 1F1B by hand
mesh data=1 pipeline=2 tensor=1
stages 2
microbatches 3
merge mean
row 0ZERO 0F0 0SEND_F0 0F1 0SEND_F1 0RECV_B0 0B0 0F2 0SEND_F2 0RECV_B1 0B1 0RECV_B2 0B2 0UPDATE
row 1ZERO 1RECV_F0 1F0 1LOSS0 1B0 1SEND_B0 1RECV_F1 1F1 1LOSS1 1B1 1SEND_B1 1RECV_F2 1F2 1LOSS2 1B2 1SEND_B2 1UPDATE
"""

PIPELINE_HALVES = """
plan zero bubble by hand, replicated twice
mesh data=2 pipeline=2 tensor=1
stages 2
microbatches 2
merge mean
row 0ZERO 0F0 0SEND_F0 0F1 0SEND_F1 0RECV_B0 0I0 0RECV_B1 0I1 0W0 0W1 0REDUCE_GRAD 0UPDATE
row 1ZERO 1RECV_F0 1F0 1LOSS0 1I0 1SEND_B0 1RECV_F1 1F1 1LOSS1 1I1 1SEND_B1 1W0 1W1 1REDUCE_GRAD 1UPDATE
"""

TENSOR = """
plan column then row split by hand
mesh data=1 pipeline=1 tensor=2
stages 3
microbatches 1
merge mean
partial_outputs 1
partial_inputs 1
row 0ZERO 1ZERO 2ZERO 0F0 1F0 1SUM_F0 2F0 2LOSS0 2B0 1I0 1SUM_B0 1W0 0B0 2UPDATE 1UPDATE 0UPDATE
"""

TOKENS = """
plan sequence parallel by hand
mesh data=1 pipeline=1 tensor=2
stages 5
microbatches 1
merge mean
partial_outputs 0 2
partial_inputs 2 4
own_tokens 1 3
skips 1-3
row 0ZERO 1ZERO 2ZERO 3ZERO 4ZERO 0F0 0SCATTER_F0 1F0 1GATHER_F0 2F0 2SCATTER_F0 3F0 3GATHER_F0 4F0 4LOSS0 """
TOKENS += "4I0 4SCATTER_B0 4W0 3B0 3GATHER_B0 3SUM_G 2I0 2SCATTER_B0 2W0 1B0 1GATHER_B0 1SUM_G 0B0 "
TOKENS += "4UPDATE 3UPDATE 2UPDATE 1UPDATE 0UPDATE"

SHARDED = """
plan ZeRO-3 by hand
mesh data=2 pipeline=1 tensor=1
stages 1
microbatches 1
merge mean
expanded yes
row 0ZERO 0UNSHARD 0F0 0LOSS0 0B0 0RESHARD 0SCATTER_GRAD 0UPDATE[0/2]
row 0ZERO 0UNSHARD 0F0 0LOSS0 0B0 0RESHARD 0SCATTER_GRAD 0UPDATE[1/2]
"""


def ring(n: int) -> Plan:
    """A ring all-reduce of the gradient, part by part: n - 1 additions, then n - 1 replacements."""
    rows = []
    for rank in range(n):
        to, source = (rank + 1) % n, (rank - 1) % n
        row = "0ZERO 0F0 0LOSS0 0B0"
        for k in range(n - 1):
            row += f" 0SEND_G[{(rank - k) % n}/{n}]>{to} 0ADD_G[{(rank - k - 1) % n}/{n}]<{source}"
        for k in range(n - 1):
            row += f" 0SEND_G[{(rank + 1 - k) % n}/{n}]>{to} 0RECV_G[{(rank - k) % n}/{n}]<{source}"
        rows.append(tuple(map(Action.parse, f"{row} 0UPDATE".split())))
    return Plan(f"ring by hand ({n})", tuple(rows), 1, Mesh(data=n), expanded=True)


def texts() -> list[str]:
    """All of them as text."""
    return [PIPELINE_1F1B, PIPELINE_HALVES, TENSOR, TOKENS, SHARDED, str(ring(2)), str(ring(3)), str(ring(4))]


def plans() -> list[Plan]:
    """Hand-written plans and those of the strategies, all correct."""
    own = [bp.plan.serial(), bp.plan.serial(3, 2), bp.plan.data_parallel(2), bp.plan.data_parallel(3, 4)]
    own += [bp.plan.data_parallel(4, 2, merge) for merge in ("mean-of-means", "sum")]
    return [Plan.parse(text) for text in texts()] + own
