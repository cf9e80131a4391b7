"""The peers of benchmarks/gpu.py: the same networks in ``torch.nn``, and PyTorch's own ways to run them in parallel.

A model takes its parameters in the order of our ``Network.parameters``, so both sides start from the same numbers.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from _torch_peers import SGD, half, network
from torch import Tensor, nn
from torch.distributed import pipelining
from torch.nn.parallel import DistributedDataParallel

from bpkit.nn import Network
from bpkit.run import Comm


def mlp(sizes: Sequence[int]) -> nn.Module:
    """Linear layers with ReLU between them."""
    made = [m for a, b in pairwise(sizes) for m in (nn.Linear(a, b), nn.ReLU(inplace=True))]
    return nn.Sequential(*made[:-1])


def convnet(side: int, channels: Sequence[int], classes: int) -> nn.Module:
    """As `bpkit.nn.convnet` with batch norm."""
    made: list[nn.Module] = [nn.Unflatten(1, (channels[0], side, side))]
    for a, b in pairwise(channels):
        made += [nn.Conv2d(a, b, 3, padding=1, bias=False), nn.BatchNorm2d(b), nn.ReLU(inplace=True), nn.MaxPool2d(2)]
    features = channels[-1] * (side >> (len(channels) - 1)) ** 2
    return nn.Sequential(*made, nn.Flatten(), nn.Linear(features, classes))


class Attention(nn.Module):
    """Causal self-attention by PyTorch's own choice of kernel."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads, self.inputs, self.outputs = heads, nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        rows, tokens, width = x.shape
        q, k, v = self.inputs(x).view(rows, tokens, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.outputs(y.transpose(1, 2).reshape(rows, tokens, width))


class Block(nn.Module):
    """The norm in front, as in GPT-2."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.LayerNorm(width), Attention(width, heads))
        self.second = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, 4 * width), nn.GELU(),
                                    nn.Linear(4 * width, width))  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.first(x)
        return x + self.second(x)


class GPT(nn.Module):
    """As `bpkit.nn.gpt`: learned positions, scores by the embedding's matrix."""

    def __init__(self, vocabulary: int, length: int, width: int, heads: int, layers: int) -> None:
        super().__init__()
        self.embedding, self.positions = nn.Embedding(vocabulary, width), nn.Embedding(length, width)
        self.blocks = nn.Sequential(*(Block(width, heads) for _ in range(layers)), nn.LayerNorm(width))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(self.blocks(self.embedding(x) + self.positions.weight), self.embedding.weight)


def step(model: nn.Module, net: Network, x: Tensor, t: Tensor, bf16: bool, compiled: str = "",
         **kind: bool) -> Callable[[], Tensor]:  # fmt: skip
    """Return a training step by autograd with ``torch.optim.SGD``; it returns the mean loss.

    Parameters
    ----------
    model : Module
        Takes the values of `net`, and its device.
    bf16 : bool
        Compute under autocast; parameters and updates stay in float32.
    compiled : str
        A mode of ``torch.compile`` for the forward and the loss; "" for eager.
    **kind
        ``fused`` or ``foreach``, of the optimizer.
    """
    model.to(x.device)
    owned = [p for i, p in enumerate(net.parameters()) if net.owners[i] == i]
    with torch.no_grad():
        for own, given in zip(model.parameters(), owned, strict=True):
            own.copy_(given)
    optimizer = torch.optim.SGD(model.parameters(), **SGD, **kind)

    def loss_of(x: Tensor, t: Tensor) -> Tensor:
        # A cast kept from one step to the next would outlive the update, and a CUDA graph.
        cast = torch.autocast(x.device.type, torch.bfloat16, cache_enabled=False) if bf16 else nullcontext()
        with cast:
            y = model(x)
            return F.cross_entropy(y.reshape(-1, y.shape[-1]), t.reshape(-1))

    forward = torch.compile(loss_of, mode=compiled) if compiled else loss_of

    def run() -> Tensor:
        optimizer.zero_grad(set_to_none=True)
        loss = forward(x, t)
        loss.backward()
        optimizer.step()
        return loss.detach()

    return run


# In the workers of a cluster.


def timed(comm: Comm, run: Callable[[], object], steps: int, warm: int) -> float:
    """Seconds of a step, over `steps` of them between two moments at which the device has nothing left to do."""
    for _ in range(warm):
        run()
    _finish(comm)
    comm.barrier()
    start = time.perf_counter()
    for _ in range(steps):
        run()
    _finish(comm)
    return (time.perf_counter() - start) / steps


def _finish(comm: Comm) -> None:
    if comm.device.type == "cuda":
        torch.cuda.synchronize()


def ddp(comm: Comm, layers: int, width: int, x: Tensor, t: Tensor, steps: int, warm: int, megabytes: int) -> float:
    """Seconds of a step of DistributedDataParallel, its gradients views of its buckets."""
    model = DistributedDataParallel(network(layers, width).to(comm.device), gradient_as_bucket_view=True,
                                    static_graph=True, bucket_cap_mb=megabytes)  # fmt: skip
    optimizer = torch.optim.SGD(model.parameters(), **SGD, fused=True)
    x, t = (part.to(comm.device) for part in half(comm, x, t))

    def run() -> None:
        optimizer.zero_grad(set_to_none=False)
        F.cross_entropy(model(x), t).backward()
        optimizer.step()

    return timed(comm, run, steps, warm)


#: Schedules of ``torch.distributed.pipelining`` with one stage a rank.
SCHEDULES = {"GPipe": pipelining.ScheduleGPipe, "1F1B": pipelining.Schedule1F1B}


def pipeline(comm: Comm, schedule: str, layers: int, width: int, microbatches: int, x: Tensor, t: Tensor, steps: int,
             warm: int) -> float:  # fmt: skip
    """Seconds of a step of ``torch.distributed.pipelining``; the layers are dealt evenly to the ranks."""
    whole, per = network(layers, width), 2 * layers // comm.size
    part = whole[comm.rank * per : (comm.rank + 1) * per].to(comm.device)
    x, t = x.to(comm.device), t.to(comm.device)
    stage = pipelining.PipelineStage(part, comm.rank, comm.size, comm.device, input_args=(x[: len(x) // microbatches],))
    runner = SCHEDULES[schedule](stage, microbatches, loss_fn=F.cross_entropy)
    optimizer = torch.optim.SGD(part.parameters(), **SGD, fused=True)
    inputs = (x,) if comm.rank == 0 else ()
    targets: dict[str, Any] = {"target": t, "losses": []} if comm.rank == comm.size - 1 else {}

    def run() -> None:
        runner.step(*inputs, **targets)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return timed(comm, run, steps, warm)
