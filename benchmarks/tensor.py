"""Tensor parallelism on one host: shared memory against torch.distributed.tensor.parallel over gloo (TCP loopback).

    python benchmarks/tensor.py [--json FILE] [--quick]

Two workers, one thread each; residual blocks x + W2 relu(W1 x) of width h and inner width 4h under cross-entropy, SGD
with momentum; W1 is split by outputs, W2 by inputs. Runs alternate.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from functools import partial

import _harness
import torch
from _tensor_peer import train

import bpkit as bp
from bpkit.data import Dataset
from bpkit.nn import Linear, Network, ReLU, Residual

CASES = ((6, 256, 64), (6, 256, 128), (4, 512, 256))  # blocks, width, batch
OPTIMIZER = {"lr": 0.01, "momentum": 0.9}
WARM = 5


def network(blocks: int, width: int) -> Network:
    """Residual blocks, under cross-entropy."""
    made = [Residual(Linear(width, 4 * width), ReLU(), Linear(4 * width, width)) for _ in range(blocks)]
    return Network(made, width, seed=0)


def data(width: int, samples: int) -> Dataset:
    """Random samples: speed does not depend on what they say."""
    generator = torch.Generator().manual_seed(0)
    x, t = torch.randn(samples, width, generator=generator), torch.randint(0, width, (samples,), generator=generator)
    return Dataset("random", x, t, x[:1], t[:1])


def ours(cluster: bp.Cluster, net: Network, samples: Dataset, plan: bp.plan.Plan, steps: int) -> float:
    """Median seconds of a step of ours."""
    result = cluster.train(net, samples, plan, batch=len(samples), steps=steps + WARM,
                           optimizer=bp.optim.SGD(**OPTIMIZER), record=1)  # fmt: skip
    return statistics.median(result.step_times[WARM:])


def case(clusters: tuple[bp.Cluster, ...], blocks: int, width: int, batch: int, rounds: int, steps: int) -> list[dict]:
    """The rows of one size."""
    one, shm, gloo = clusters
    net, samples = network(blocks, width), data(width, batch)
    plan = bp.plan.tensor_parallel(bp.plan.serial(), 2, bp.nn.tensor_layout(net))
    arguments = (blocks, width, samples.inputs, samples.targets, OPTIMIZER, steps, WARM)
    runs: dict[str, Callable[[], float]] = {
        "shm": partial(ours, shm, net, samples, plan, steps),
        "again": partial(ours, shm, net, samples, plan, steps),
        "gloo": partial(ours, gloo, net, samples, plan, steps),
        "one": partial(ours, one, net, samples, bp.plan.serial(), steps),
        "torch": lambda: max(gloo.call(train, *arguments)),
    }
    times = _harness.interleave(runs, rounds)
    row = partial(_harness.row, case=f"{blocks} x {width}, batch {batch}", peer_transport="gloo (TCP loopback)")
    peer = "tensor.parallel"
    return [
        row(peer=peer, ours_transport="shm", ours=times["shm"], theirs=times["torch"]),
        row(peer=peer, ours_transport="gloo", ours=times["gloo"], theirs=times["torch"], info=True),
        row(peer="one process of ours", ours_transport="shm", ours=times["shm"], theirs=times["one"], info=True),
        row(peer="the same again (A/A)", ours_transport="shm", ours=times["shm"], theirs=times["again"], info=True),
    ]


def main() -> None:
    """Run all sizes."""
    given = _harness.arguments(__doc__ or "")
    rounds, steps = (3, 6) if given.quick else (10, 15)
    rows: list[dict] = []
    with bp.Cluster(1) as one, bp.Cluster(2, backend="shm") as shm, bp.Cluster(2, backend="gloo") as gloo:
        for blocks, width, batch in CASES:
            rows += case((one, shm, gloo), blocks, width, batch, rounds, steps)
    _harness.report(rows, given.json)


if __name__ == "__main__":
    main()
