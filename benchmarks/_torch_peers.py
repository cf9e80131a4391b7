"""Data-parallel training by PyTorch, over gloo, in the workers of a cluster: DDP, FSDP, and one flat all-reduce.

Every function takes a rank's `Comm` first; the process group is the one that our gloo transport has set up.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel

from bpkit.run import Comm

SGD = {"lr": 0.01, "momentum": 0.9}


def warm_up(steps: int) -> int:
    """Steps before `steps` that are timed: DDP rebuilds its buckets after its first, and the system must have put
    the workers on different cores."""
    return max(3, steps // 2)


def timed(comm: Comm, step: Callable[[], object], steps: int) -> float:
    """Median seconds of `step`, after the warm-up; all ranks start together."""
    for _ in range(warm_up(steps)):
        step()
    comm.barrier()
    marks = [time.perf_counter()]
    for _ in range(steps):
        step()
        marks.append(time.perf_counter())
    return statistics.median(b - a for a, b in zip(marks, marks[1:], strict=False))


def network(layers: int, width: int) -> torch.nn.Sequential:
    """Linear layers of one width with ReLU between them."""
    torch.manual_seed(0)
    made = [m for _ in range(layers - 1) for m in (torch.nn.Linear(width, width), torch.nn.ReLU())]
    return torch.nn.Sequential(*made, torch.nn.Linear(width, width))


def half(comm: Comm, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    """This rank's part of a batch."""
    return x.tensor_split(comm.size)[comm.rank], t.tensor_split(comm.size)[comm.rank]


def ddp(comm: Comm, size: tuple[int, int], x: Tensor, t: Tensor, steps: int, options: dict[str, Any]) -> float:
    """Median seconds of a step of DistributedDataParallel."""
    model = DistributedDataParallel(network(*size), **options)
    optimizer = torch.optim.SGD(model.parameters(), **SGD, fused=True)
    x, t = half(comm, x, t)
    to_none = not options.get("gradient_as_bucket_view", False)

    def step() -> None:
        optimizer.zero_grad(set_to_none=to_none)
        cross_entropy(model(x), t).backward()
        optimizer.step()

    return timed(comm, step, steps)


def sharded(comm: Comm, size: tuple[int, int]) -> torch.nn.Module:
    """A network under FSDP (``torch.distributed.fsdp.fully_shard``), every linear layer a unit."""
    mesh = init_device_mesh("cpu", (comm.size,))
    model = network(*size)
    for module in model:
        if isinstance(module, torch.nn.Linear):
            fully_shard(module, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model


def fsdp(comm: Comm, size: tuple[int, int], x: Tensor, t: Tensor, steps: int) -> float:
    """Median seconds of a step of FSDP."""
    model = sharded(comm, size)
    optimizer = torch.optim.SGD(model.parameters(), **SGD)
    x, t = half(comm, x, t)

    def step() -> None:
        optimizer.zero_grad()
        cross_entropy(model(x), t).backward()
        optimizer.step()

    return timed(comm, step, steps)


def flat_all_reduce(comm: Comm, size: tuple[int, int], x: Tensor, t: Tensor, steps: int) -> float:
    """Median seconds of a step written by hand: autograd into one flat buffer, one all-reduce, one update."""
    model = network(*size)
    lengths = [p.numel() for p in model.parameters()]
    weights = torch.cat([p.detach().flatten() for p in model.parameters()])
    gradients, velocity = torch.zeros_like(weights), torch.zeros_like(weights)
    for p, own, gradient in zip(model.parameters(), weights.split(lengths), gradients.split(lengths), strict=True):
        p.data, p.grad = own.view_as(p), gradient.view_as(p)
    x, t = half(comm, x, t)

    def step() -> None:
        gradients.zero_()
        cross_entropy(model(x), t).backward()
        dist.all_reduce(gradients)
        velocity.mul_(SGD["momentum"]).add_(gradients, alpha=1 / comm.size)
        weights.add_(velocity, alpha=-SGD["lr"])

    return timed(comm, step, steps)


def memory(comm: Comm, size: tuple[int, int], x: Tensor, t: Tensor, shards: bool) -> dict[str, int]:
    """Bytes of parameters, gradients and AdamW state that a rank keeps after a step; of FSDP, its own shards.

    What DDP and FSDP hold besides (buckets that are no views, gathered parameters) is not in it.
    """
    views = {"gradient_as_bucket_view": True}
    model = sharded(comm, size) if shards else DistributedDataParallel(network(*size), **views)
    optimizer = torch.optim.AdamW(model.parameters())
    x, t = half(comm, x, t)
    cross_entropy(model(x), t).backward()
    optimizer.step()
    parameters = list(model.parameters())
    state = [tensor for entry in optimizer.state.values() for tensor in entry.values() if tensor.dim()]
    return {"parameters": _bytes(parameters), "gradients": _bytes(p.grad for p in parameters),
            "optimizer": _bytes(state)}  # fmt: skip


def _bytes(tensors: Iterable[Any]) -> int:
    local = [tensor.to_local() if hasattr(tensor, "to_local") else tensor for tensor in tensors]
    return sum(tensor.numel() * tensor.element_size() for tensor in local)
