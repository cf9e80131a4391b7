"""Both cuts beside PyTorch over a sweep of sizes: what chapter 4.2b shows.

    python benchmarks/model_parallel.py [--json FILE] [--quick]

Two workers, one thread each, the same network, batch, microbatches, loss and SGD with momentum; 20 turns, in each every
system runs once, in an order that is shuffled anew.  Peers are tuned: fused SGD and stages that know their shapes
beforehand (pipelining), SGD without foreach (tensor.parallel); gradients are set to None.  The network is made of
linear layers with ReLU (pipelining) and of residual blocks (tensor.parallel).
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from functools import partial

import _harness
import torch
from _pipelining_peer import train as train_pipeline
from _tensor_peer import train as train_tensor
from tensor import network as residual_blocks

import bpkit as bp
from bpkit.data import Dataset
from bpkit.nn import Linear, Network, ReLU

#: Width and batch, from a step that is mostly messages and Python to one that is mostly products.
SIZES = ((64, 64), (128, 256), (256, 512))
LAYERS, BLOCKS, MICROBATCHES, WARM = 8, 4, 4, 2
OPTIMIZER = {"lr": 0.01, "momentum": 0.9}


def samples(width: int, count: int) -> Dataset:
    """Random samples: speed does not depend on what they say."""
    made = torch.Generator().manual_seed(0)
    x, t = torch.randn(count, width, generator=made), torch.randint(0, width, (count,), generator=made)
    return Dataset("random", x, t, x[:1], t[:1])


def ours(cluster: bp.Cluster, net: Network, data: Dataset, plan: bp.plan.Plan, steps: int) -> float:
    """Median seconds of a step of ours."""
    result = cluster.train(net, data, plan, batch=len(data), steps=steps + WARM, optimizer=bp.optim.SGD(**OPTIMIZER))
    return statistics.median(result.step_times[WARM:])


def runs(gloo: bp.Cluster, shm: bp.Cluster, width: int, count: int, steps: int) -> dict[str, Callable[[], float]]:
    """Every system of one size."""
    data = samples(width, count)
    layers = [layer for _ in range(LAYERS - 1) for layer in (Linear(width, width), ReLU())]
    deep = Network([*layers, Linear(width, width)], width, seed=0)
    wide = residual_blocks(BLOCKS, width)
    pipe = bp.plan.Plan.parse(f"{bp.plan.one_f_one_b(2, MICROBATCHES)}\ncuts {LAYERS}")
    split = bp.plan.tensor_parallel(bp.plan.serial(), 2, bp.nn.tensor_layout(wide))
    of_pipeline = (LAYERS, width, MICROBATCHES, data.inputs, data.targets, OPTIMIZER, steps, WARM)
    of_tensor = (BLOCKS, width, data.inputs, data.targets, OPTIMIZER, steps, WARM)
    return {
        "pipeline, ours, gloo": partial(ours, gloo, deep, data, pipe, steps),
        "pipeline, ours, gloo again": partial(ours, gloo, deep, data, pipe, steps),
        "pipeline, ours, shared memory": partial(ours, shm, deep, data, pipe, steps),
        "pipeline, torch, gloo": lambda: max(gloo.call(train_pipeline, "1F1B", *of_pipeline)),
        "tensor, ours, gloo": partial(ours, gloo, wide, data, split, steps),
        "tensor, ours, shared memory": partial(ours, shm, wide, data, split, steps),
        "tensor, torch, gloo": lambda: max(gloo.call(train_tensor, *of_tensor)),
    }


def rows(width: int, count: int, times: dict[str, list[float]]) -> list[dict]:
    """What is compared with what, at one size."""
    row = partial(_harness.row, ours_transport="gloo", peer_transport="gloo", info=True)
    pairs = [("pipeline, ours, gloo", "pipeline, torch, gloo"), ("tensor, ours, gloo", "tensor, torch, gloo"),
             ("pipeline, ours, gloo", "pipeline, ours, shared memory"),
             ("tensor, ours, gloo", "tensor, ours, shared memory"),
             ("pipeline, ours, gloo", "pipeline, ours, gloo again")]  # fmt: skip
    return [row(f"{mine.split(',')[0]}, width {width}, batch {count}", other, times[mine], times[other])
            | {"width": width, "batch": count} for mine, other in pairs]  # fmt: skip


def main() -> None:
    """Run all sizes."""
    given = _harness.arguments(__doc__ or "")
    turns, steps = (2, 2) if given.quick else (20, 3)
    found: list[dict] = []
    with bp.Cluster(2, backend="gloo", device="cpu") as gloo, bp.Cluster(2, device="cpu") as shm:
        for width, count in SIZES[: 1 if given.quick else None]:
            systems = runs(gloo, shm, width, count, steps)
            _harness.interleave(systems, 1)  # warms up
            found += rows(width, count, _harness.interleave(systems, turns))
    _harness.report(found, given.json)


if __name__ == "__main__":
    main()
