"""Training steps of PyTorch beside those of the library: DDP, FSDP2, and plain autograd with one flat sum."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel

from bpkit.course.launching import in_torch
from bpkit.data import Dataset
from bpkit.measure import Ratio, interleave, ratio
from bpkit.nn import Network
from bpkit.optim import SGD
from bpkit.plan import Plan
from bpkit.run.cluster import Cluster
from bpkit.run.transports.comm import Comm

Wrap = Callable[[nn.Sequential], Any]
Run = Callable[[Network, Dataset, int, int], tuple[list[float], list[float]]]
_LR, _MOMENTUM, _WARM = 0.1, 0.9, 2


class Flat(nn.Module):
    """Plain autograd: no wrapper; after the backward pass all gradients travel as one vector."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        """The model's own."""
        y: Tensor = self.model(x)
        return y

    def merge(self) -> None:
        """Average the gradients over the ranks."""
        gradients = [p.grad for p in self.parameters() if p.grad is not None]
        flat = torch.cat([gradient.flatten() for gradient in gradients])
        dist.all_reduce(flat)
        for gradient, part in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
            gradient.copy_(part.view_as(gradient)).div_(dist.get_world_size())


def sharded(model: nn.Sequential, reshard: bool = True) -> Any:
    """FSDP2 with a group for each linear layer; with ``reshard=False`` parameters stay whole until the backward."""
    for layer in model:
        if isinstance(layer, nn.Linear):
            fully_shard(layer, reshard_after_forward=reshard)
    return fully_shard(model, reshard_after_forward=reshard)


#: PyTorch's ways of training, by name, with the settings that the chapter shows.
TORCH: Mapping[str, Wrap] = {
    "DDP": DistributedDataParallel,
    "DDP tuned": partial(DistributedDataParallel, bucket_cap_mb=4, gradient_as_bucket_view=True, static_graph=True),
    "torch flat": Flat,
    "FSDP2": sharded,
    "FSDP2 tuned": partial(sharded, reshard=False),
}


def train_torch(comm: Comm, wrap: Wrap, network: Network, data: Dataset, batch: int,
                steps: int) -> tuple[list[float], list[float]]:  # fmt: skip
    """On one rank of a gloo cluster: the mean loss of each step over all ranks, and the seconds of each step."""
    model = wrap(in_torch(network))
    optimizer = torch.optim.SGD(model.parameters(), lr=_LR, momentum=_MOMENTUM)
    losses, marks = [], [time.perf_counter()]
    for step in range(steps):
        x, t = (a.chunk(comm.size)[comm.rank] for a in data.batch(step, batch))
        optimizer.zero_grad()
        loss = cross_entropy(model(x), t)
        loss.backward()
        if isinstance(model, Flat):
            model.merge()
        optimizer.step()
        losses.append(loss.detach())
        marks.append(time.perf_counter())
    total = comm.all_reduce(torch.stack(losses)) / comm.size
    return total.tolist(), torch.tensor(marks, dtype=torch.float64).diff().tolist()


def runs(cluster: Cluster, systems: Sequence[str], ours: Mapping[str, Plan]) -> dict[str, Run]:
    """What trains ``(network, data, batch, steps)`` and gives losses and seconds, by name; all on one gloo cluster."""

    def by_torch(wrap: Wrap, *given: Any) -> tuple[list[float], list[float]]:
        found: tuple[list[float], list[float]] = cluster.call(train_torch, wrap, *given)[0]
        return found

    def by_plan(plan: Plan, network: Network, data: Dataset, batch: int, steps: int) -> tuple[list[float], list[float]]:
        result = cluster.train(network, data, plan, batch=batch, steps=steps, optimizer=SGD(_LR, momentum=_MOMENTUM))
        return result.losses.tolist(), result.step_times.tolist()

    return {**{name: partial(by_torch, TORCH[name]) for name in systems},
            **{name: partial(by_plan, plan) for name, plan in ours.items()}}  # fmt: skip


def compare(made: Mapping[str, Run], against: str, sizes: Sequence[tuple[Network, Dataset, int]], *,
            repetitions: int = 20, steps: int = 6) -> list[tuple[float, dict[str, Ratio]]]:  # fmt: skip
    """Time all systems in turn at each size.

    Parameters
    ----------
    made : mapping of str to run
        From `runs`.
    against : str
        The one by whose time the others' is divided.
    sizes : sequence of (network, data, batch)

    Returns
    -------
    list of (float, dict of str to Ratio)
        For each size the milliseconds of a step of `against`, and every other system's ratio to it, above 1 slower.
    """
    found = []
    for network, data, batch in sizes:
        def step(run: Run, network: Network = network, data: Dataset = data, batch: int = batch) -> float:
            return statistics.median(run(network, data, batch, steps)[1][_WARM:])

        seconds = interleave({name: partial(step, run) for name, run in made.items()}, repetitions)
        others = {name: ratio(seconds[name], seconds[against]) for name in made if name != against}
        found.append((1e3 * statistics.median(seconds[against]), others))
    return found
