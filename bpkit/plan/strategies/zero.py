"""ZeRO: data parallelism that shards optimizer state, gradients and parameters (Rajbhandari et al. 2020)."""

from itertools import groupby

from bpkit.given import whole_numbers
from bpkit.plan.action import Action
from bpkit.plan.mesh import Mesh
from bpkit.plan.plan import Plan
from bpkit.plan.strategies.data_parallel import call_text, serial


def zero(workers: int, level: int, units: int = 1, microbatches: int = 1, prefetch: bool = True,
         reshard: bool = True) -> Plan:  # fmt: skip
    """Each rank keeps 1/n of the optimizer state (level 1), of the gradients (2), of the parameters (3).

    Level 1 with two units, one row that all ranks share::

        0ZERO 1ZERO 0F0 1F0 1LOSS0 1B0 1SCATTER_GRAD 0B0 0SCATTER_GRAD 1UPDATE 1UNSHARD 0UPDATE 0UNSHARD

    An UPDATE after a SCATTER_GRAD is of the rank's own part.  Level 2 scatters after every microbatch, so that
    whole gradients live only in two buffers that the units share in turn.  Level 3 also gathers parameters
    before each use and drops them after it.

    Volume a step, in parameters, times (n-1)/n, for k microbatches: level 1: 2; level 2: k + 1; level 3: 3k,
    less what two uses in a row save.  Memory a rank, with Psi parameters of b bytes and an optimizer that keeps K bytes
    a parameter: level 1 ``2 b Psi + (b + K) Psi / n``; level 2 ``b Psi + (b + K) Psi / n`` and two unit gradients;
    level 3 ``(2 b + K) Psi / n``, two unit gradients and two units' parameters (all with `reshard` off).

    Parameters
    ----------
    workers : int
    level : {1, 2, 3}
    units : int
        Stages: what is scattered and gathered at a time.
    microbatches : int
    prefetch : bool
        Level 3: gather the next unit's parameters while this one computes.
    reshard : bool
        Level 3: drop a unit's parameters after its forward and gather them again for its backward.

    Raises
    ------
    ValueError
        If the level is not 1, 2 or 3, or a number is below 1.
    """
    workers, units, microbatches = whole_numbers("zero", workers=workers, units=units, microbatches=microbatches)
    if level not in (1, 2, 3):
        raise ValueError("zero: the level is 1 (optimizer state), 2 (and gradients) or 3 (and "
                         f"parameters), not {level!r}")  # fmt: skip
    level = int(level)
    row: list[Action] = []
    for action in serial(units, microbatches).rows[0]:
        scatter = action.kind == "B" and (level > 1 or action.mb == microbatches - 1)
        row += [action] * (action.kind != "UPDATE") + [Action(action.stage, "SCATTER_GRAD")] * scatter
    if level == 3:
        row = _gathered(row, prefetch) if reshard else _kept(row, units)
    for stage in reversed(range(units)):
        row += [Action(stage, "UPDATE")] + [Action(stage, "UNSHARD")] * (level < 3)
    name = call_text("zero", workers, level, units=units, microbatches=microbatches, prefetch=prefetch, reshard=reshard)
    shared = 2 * (units > 2 and workers > 1)
    return Plan(name, (tuple(row),), units, Mesh(data=workers), microbatches, gradient_buffers=shared * (level > 1),
                parameter_buffers=shared * (level == 3 and reshard))  # fmt: skip


def _gathered(row: list[Action], prefetch: bool) -> list[Action]:
    """Parameters gathered before each run of actions of one stage, dropped after it."""
    head = [action for action in row if action.kind == "ZERO"]
    runs = [(stage, list(run)) for stage, run in groupby(row[len(head) :], key=lambda action: action.stage)]
    out = list(head)
    for i, (stage, run) in enumerate(runs):
        if i == 0 or not prefetch:
            out.append(Action(stage, "UNSHARD"))
        if prefetch and i + 1 < len(runs):
            out.append(Action(runs[i + 1][0], "UNSHARD"))
        out += [*run, Action(stage, "RESHARD")]
    return out


def _kept(row: list[Action], units: int) -> list[Action]:
    """Parameters gathered at the start of the step, all at once, and dropped after the last backward."""
    head = [Action(stage, "UNSHARD") for stage in range(units)]
    last = {action.stage: i for i, action in enumerate(row) if action.kind == "B"}
    return head + [each for i, action in enumerate(row)
                   for each in [action, *[Action(action.stage, "RESHARD")] * (last.get(action.stage) == i)]]
