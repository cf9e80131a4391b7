"""What a pipeline costs in time, from a measured or simulated trace.

*Passes* are the F, B, I, W and RECOMPUTE of a step; waiting before one is not part of it.
"""

import numpy as np
from numpy.typing import NDArray

from bpkit.plan.action import PASSES
from bpkit.trace import Trace


def makespan(trace: Trace, step: int = 0) -> float:
    """Last end minus first begin of the passes of a step, over all ranks; seconds."""
    _, begin, end = _passes(trace, step)
    return float(end.max() - begin.min()) / 1e9


def bubble(trace: Trace, step: int = 0) -> NDArray[np.float64]:
    """Each rank's own bubble: its last end minus its own first begin, minus its passes; seconds.

    The wait for the first microbatch is not in it, and so it can be 0 where the makespan exceeds the work (zero bubble,
    Qi et al. 2023, section 2.2).  `Report.bubble` counts from the start of the row and subtracts all compute.
    """
    rank, begin, end = _passes(trace, step)
    own = [(end[rank == r], begin[rank == r]) for r in range(trace.ranks)]
    return np.array([e.max() - b.min() - (e - b).sum() for e, b in own]) / 1e9


def period(trace: Trace) -> float:
    """Seconds from one step's start to the next, the median of steps in mid-run (rank mean).

    The first step fills an empty pipeline and no step follows the last, so both are left out.

    Raises
    ------
    ValueError
        If the trace has fewer than three steps.
    """
    if len(trace.steps) < 3:
        raise ValueError(f"a period needs at least three steps that follow one another, not {len(trace.steps)}")
    return float(np.median(trace.step_times()[1:-1]))


def _passes(trace: Trace, step: int) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
    """Rank, begin and end of each pass of a step."""
    kept = trace.where((trace.step == step) & np.isin(trace.kinds(), [*PASSES]))
    if not len(kept):
        raise ValueError(f"the trace holds no passes of step {step}")
    return kept.rank, kept.start + kept.wait, kept.end
