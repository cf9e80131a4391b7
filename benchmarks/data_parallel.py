"""Data-parallel training on one host: shared memory against PyTorch's DistributedDataParallel over gloo (TCP loopback).

    python benchmarks/data_parallel.py [--json FILE] [--quick]

Two workers, one thread each, the same networks, batches and SGD with momentum; runs alternate. The peer is DDP as it
comes, and tuned: gradients as bucket views, static graph, and the best of three bucket sizes. A warm-up comes before
every timed run, since DDP rebuilds its buckets after its first step.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from functools import partial

import _harness
import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

import bpkit as bp
from bpkit.data import Dataset
from bpkit.nn import Linear, Network, ReLU
from bpkit.run import Comm

WORKERS = 2
SIZES = (
    (12, 512, 128),
    (12, 512, 512),
    (24, 256, 64),
    (6, 1024, 64),
    (4, 128, 64),
    (4, 1024, 512),
)  # layers, width, batch
BUCKET_MEGABYTES = (1, 4, 25)
OPTIMIZER = {"lr": 0.01, "momentum": 0.9}


def network(layers: int, width: int) -> Network:
    """Linear layers of one width with ReLU between them, under cross-entropy."""
    made = [layer for _ in range(layers - 1) for layer in (Linear(width, width), ReLU())]
    return Network([*made, Linear(width, width)], width, seed=0)


def data(width: int, samples: int) -> Dataset:
    """Random samples: speed does not depend on what they say."""
    generator = torch.Generator().manual_seed(0)
    x, t = torch.randn(samples, width, generator=generator), torch.randint(0, width, (samples,), generator=generator)
    return Dataset("random", x, t, x[:1], t[:1])


def ddp(comm: Comm, layers: int, width: int, x: Tensor, t: Tensor, steps: int, options: dict[str, object]) -> float:
    """Median seconds of a DDP step on this rank's half of the batch."""
    torch.manual_seed(0)
    made = [m for _ in range(layers - 1) for m in (torch.nn.Linear(width, width), torch.nn.ReLU())]
    model = DistributedDataParallel(torch.nn.Sequential(*made, torch.nn.Linear(width, width)), **options)
    optimizer = torch.optim.SGD(model.parameters(), **OPTIMIZER, fused=True)
    x, t = x.tensor_split(comm.size)[comm.rank], t.tensor_split(comm.size)[comm.rank]
    marks = []
    for step in range(steps + 5):
        if step == 5:
            comm.barrier()
        if step >= 5:
            marks.append(time.perf_counter())
        optimizer.zero_grad(set_to_none=not options.get("gradient_as_bucket_view", False))
        torch.nn.functional.cross_entropy(model(x), t).backward()
        optimizer.step()
    marks.append(time.perf_counter())
    return statistics.median(b - a for a, b in zip(marks, marks[1:], strict=False))


def ours(cluster: bp.Cluster, net: Network, samples: Dataset, plan: bp.plan.Plan, steps: int) -> float:
    """Median seconds of a step of ours."""
    optimizer = bp.optim.SGD(**OPTIMIZER)
    result = cluster.train(net, samples, plan, batch=len(samples), steps=steps + 5, optimizer=optimizer, record=1)
    return statistics.median(result.step_times[5:])


def case(shm: bp.Cluster, gloo: bp.Cluster, size: tuple[int, int, int], rounds: int, steps: int) -> list[dict]:
    """The rows of one size."""
    layers, width, batch = size
    net, samples = network(layers, width), data(width, batch)
    x, t = samples.inputs, samples.targets
    tuned = {"gradient_as_bucket_view": True, "static_graph": True}
    plans = {f"data_parallel, {b} buckets": bp.plan.data_parallel(WORKERS, b) for b in (1, min(4, layers))}
    plans["zero 1, 4 units"] = bp.plan.zero(WORKERS, 1, units=min(4, layers))
    runs: dict[str, Callable[[], float]] = {
        f"shm, {k}": partial(ours, shm, net, samples, p, steps) for k, p in plans.items()
    }
    runs["shm again"] = partial(ours, shm, net, samples, plans["data_parallel, 1 buckets"], steps)
    runs["gloo"] = partial(ours, gloo, net, samples, plans[f"data_parallel, {min(4, layers)} buckets"], steps)
    options = {"default": {}} | {f"tuned, {mb} MB": tuned | {"bucket_cap_mb": mb} for mb in BUCKET_MEGABYTES}
    for name, given in options.items():
        runs[name] = lambda given=given: max(gloo.call(ddp, layers, width, x, t, steps, given))
    times = _harness.interleave(runs, rounds)
    median = {name: statistics.median(values) for name, values in times.items()}
    best_tuned = min((n for n in runs if n.startswith("tuned")), key=median.__getitem__)
    best_ours = min((n for n in runs if n.startswith("shm, ")), key=median.__getitem__)
    label = f"{layers} x {width}, batch {batch}"
    row = partial(_harness.row, case=label, peer_transport="gloo (TCP loopback)")
    rows = [
        row(peer=f"DDP {best_tuned}", ours_transport=best_ours, ours=times[best_ours], theirs=times[best_tuned]),
        row(peer="DDP default", ours_transport=best_ours, ours=times[best_ours], theirs=times["default"], info=True),
        row(peer="DDP default", ours_transport="gloo", ours=times["gloo"], theirs=times["default"], info=True),
        row(peer="the same again (A/A)", ours_transport="shm", ours=times["shm, data_parallel, 1 buckets"],
            theirs=times["shm again"], info=True),
    ]  # fmt: skip
    return rows


def main() -> None:
    """Run all sizes."""
    given = _harness.arguments(__doc__ or "")
    rounds, steps = (3, 5) if given.quick else (5, 12)
    rows: list[dict] = []
    with bp.Cluster(WORKERS, backend="shm") as shm, bp.Cluster(WORKERS, backend="gloo") as gloo:
        for size in SIZES:
            rows += case(shm, gloo, size, rounds, steps)
    _harness.report(rows, given.json)


if __name__ == "__main__":
    main()
