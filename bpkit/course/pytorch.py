"""Our plans in PyTorch's own programs: its schedule runtime with one of them loaded.

The runtime is not public: what is here was tested on the versions of PyTorch in :data:`TESTED`.
"""

import tempfile
from collections.abc import Callable, Sequence
from typing import Any, Final

import torch
from torch.distributed.pipelining.schedules import _PipelineScheduleRuntime

from bpkit.plan import Plan, to_csv

#: Versions of PyTorch whose private schedule runtime was tested.
TESTED: Final = ("2.13",)


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
        If the plan does not fit the form (see `bpkit.plan.to_csv`) or the microbatches would be of unequal size, whose
        mean of means is not the mean.
    RuntimeError
        If this version of PyTorch was not tested.
    """
    text = to_csv(plan)
    if batch % plan.microbatches:
        raise ValueError(f"{plan.name}: PyTorch needs equal microbatches, but {plan.microbatches} do not divide "
                         f"a batch of {batch}: it would give the mean of unequal means")  # fmt: skip
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
