"""The peer of benchmarks/tensor.py: torch.distributed.tensor.parallel over gloo, one call a run."""

from __future__ import annotations

import statistics
import time

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from bpkit.run import Comm


class Block(nn.Module):
    """x + up and down again, with ReLU between."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.relu(self.up(x)))


def train(comm: Comm, layers: int, width: int, x: Tensor, t: Tensor, optimizer: dict[str, float], steps: int,
          warm: int) -> float:  # fmt: skip
    """Median seconds of a step of residual blocks, split over the ranks where there is more than one."""
    torch.manual_seed(0)
    model = nn.Sequential(*[Block(width) for _ in range(layers)])
    if comm.size > 1:
        mesh = init_device_mesh("cpu", (comm.size,))
        ways = {"up": ColwiseParallel(), "down": RowwiseParallel()}
        for block in model:
            parallelize_module(block, mesh, ways)
    sgd = torch.optim.SGD(model.parameters(), **optimizer, foreach=False)
    marks = []
    for step in range(steps + warm):
        if step == warm:
            comm.barrier()
        marks.append(time.perf_counter())
        torch.nn.functional.cross_entropy(model(x), t).backward()
        sgd.step()
        sgd.zero_grad(set_to_none=True)
    marks.append(time.perf_counter())
    return statistics.median(b - a for a, b in zip(marks[warm:], marks[warm + 1 :], strict=False))
