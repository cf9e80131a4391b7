"""The peer of benchmarks/pipeline.py: torch.distributed.pipelining over gloo, one call a run."""

from __future__ import annotations

import statistics
import time
from typing import Any

import torch
from torch import Tensor
from torch.distributed import pipelining as pp

from bpkit.run import Comm

#: Schedules by name: the class, and the stages of each rank of two.
SCHEDULES: dict[str, tuple[Any, tuple[tuple[int, ...], ...]]] = {
    "GPipe": (pp.ScheduleGPipe, ((0,), (1,))),
    "1F1B": (pp.Schedule1F1B, ((0,), (1,))),
    "interleaved 1F1B": (pp.ScheduleInterleaved1F1B, ((0, 2), (1, 3))),
    "interleaved zero bubble": (pp.ScheduleInterleavedZeroBubble, ((0, 2), (1, 3))),
    "ZBV zero bubble": (pp.ScheduleZBVZeroBubble, ((0, 3), (1, 2))),
}


def train(comm: Comm, schedule: str, layers: int, width: int, microbatches: int, x: Tensor, t: Tensor,
          optimizer: dict[str, float], steps: int, warm: int) -> float:  # fmt: skip
    """Median seconds of a step of a network of linear layers with ReLU between them, on two ranks."""
    kind, owned = SCHEDULES[schedule]
    stages = sum(len(own) for own in owned)
    torch.manual_seed(0)
    made: list[torch.nn.Module] = []
    for layer in range(layers):
        made.append(torch.nn.Sequential(torch.nn.Linear(width, width), *[torch.nn.ReLU()] * (layer + 1 < layers)))
    per = layers // stages
    example = (x[: len(x) // microbatches],)
    parts = [torch.nn.Sequential(*made[s * per : (s + 1) * per]) for s in range(stages)]
    mine = [pp.PipelineStage(parts[s], s, stages, comm.device, input_args=example) for s in owned[comm.rank]]
    runner = kind(mine if stages > 2 else mine[0], microbatches, loss_fn=torch.nn.functional.cross_entropy)
    parameters = [p for stage in mine for p in stage.submod.parameters()]
    sgd = torch.optim.SGD(parameters, **optimizer, fused=True)
    inputs = (x,) if 0 in owned[comm.rank] else ()
    targets: dict[str, Any] = {"target": t, "losses": []} if stages - 1 in owned[comm.rank] else {}
    marks = []
    for step in range(steps + warm):
        if step == warm:
            comm.barrier()
        marks.append(time.perf_counter())
        runner.step(*inputs, **targets)
        sgd.step()
        sgd.zero_grad(set_to_none=True)
    marks.append(time.perf_counter())
    return statistics.median(b - a for a, b in zip(marks[warm:], marks[warm + 1 :], strict=False))
