"""Pipelines of two stages on one host: shared memory against torch.distributed.pipelining over gloo (TCP loopback).

    python benchmarks/pipeline.py [--json FILE] [--quick]

Two workers, one thread each; the same network (8 linear layers of width 512 with ReLU between them), microbatches, loss
and SGD with momentum; runs alternate. Each side is measured with several schedules and enters with its best one. The
rows "of the ideal" compare our speedup over one process with m/(m+1) times the speedup of two processes that each
compute their half of the layers and exchange nothing, measured in the same run.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from functools import partial

import _harness
import torch
from _pipelining_peer import SCHEDULES, train

import bpkit as bp
from bpkit.data import Dataset
from bpkit.nn import Linear, Network, ReLU
from bpkit.plan.strategies.data_parallel import pipeline
from bpkit.run import Comm

LAYERS, WIDTH, WARM = 8, 512, 4
CASES = ((256, 4), (256, 8), (1024, 8))  # batch, microbatches
OPTIMIZER = {"lr": 0.01, "momentum": 0.9}


def network() -> Network:
    """Linear layers of one width with ReLU between them, under cross-entropy."""
    made = [layer for _ in range(LAYERS - 1) for layer in (Linear(WIDTH, WIDTH), ReLU())]
    return Network([*made, Linear(WIDTH, WIDTH)], WIDTH, seed=0)


def data(samples: int) -> Dataset:
    """Random samples: speed does not depend on what they say."""
    generator = torch.Generator().manual_seed(0)
    x, t = torch.randn(samples, WIDTH, generator=generator), torch.randint(0, WIDTH, (samples,), generator=generator)
    return Dataset("random", x, t, x[:1], t[:1])


def plans(microbatches: int) -> dict[str, bp.plan.Plan]:
    """Our schedules for two ranks, cut after a ReLU each."""
    cuts = (LAYERS,)  # of 2 * LAYERS - 1 layers: half of the products on each side
    made = [pipeline.gpipe, pipeline.one_f_one_b, pipeline.zero_bubble_h1, pipeline.zero_bubble_h2]
    return {p.name: bp.plan.Plan.parse(f"{p}\ncuts {cuts[0]}") for p in (make(2, microbatches) for make in made)}


def ours(cluster: bp.Cluster, samples: Dataset, plan: bp.plan.Plan, steps: int) -> float:
    """Median seconds of a step of ours."""
    result = cluster.train(network(), samples, plan, batch=len(samples), steps=steps + WARM,
                           optimizer=bp.optim.SGD(**OPTIMIZER), record=1)  # fmt: skip
    return statistics.median(result.step_times[WARM:])


def half(comm: Comm, net: Network, x: torch.Tensor, microbatches: int, steps: int) -> float:
    """Median seconds of this rank's half of the layers, computed without exchange."""
    stage, marks = net.split([LAYERS])[comm.rank], []
    gradients = [torch.ones_like(part) for part in x.tensor_split(microbatches)]
    comm.barrier()
    for _ in range(steps + WARM):
        marks.append(time.perf_counter())
        for m, part in enumerate(x.tensor_split(microbatches)):
            stage.forward(part, m)
            stage.backward(gradients[m], m, m > 0, comm.rank > 0)
        stage.flat_parameters.add_(stage.flat_gradients, alpha=-1e-6)
    marks.append(time.perf_counter())
    return statistics.median(b - a for a, b in zip(marks[WARM:], marks[WARM + 1 :], strict=False))


def case(clusters: tuple[bp.Cluster, ...], batch: int, microbatches: int, rounds: int, steps: int) -> list[dict]:
    """The rows of one size."""
    one, shm, gloo = clusters
    samples, made = data(batch), plans(microbatches)
    x, t = samples.inputs, samples.targets
    runs: dict[str, Callable[[], float]] = {f"shm {k}": partial(ours, shm, samples, p, steps) for k, p in made.items()}
    runs |= {f"gloo {k}": partial(ours, gloo, samples, p, steps) for k, p in made.items()}
    runs["one"] = partial(ours, one, samples, bp.plan.serial(), steps)
    runs["half"] = lambda: max(shm.call(half, network(), x, microbatches, steps))
    runs["again"] = runs[f"shm one_f_one_b(2, {microbatches})"]
    for name in SCHEDULES:
        arguments = (name, LAYERS, WIDTH, microbatches, x, t, OPTIMIZER, steps, WARM)
        runs[f"torch {name}"] = lambda arguments=arguments: max(gloo.call(train, *arguments))
    times = _harness.interleave(runs, rounds)

    def best(side: str) -> str:
        return min((n for n in times if n.startswith(side)), key=lambda n: statistics.median(times[n]))

    peer, shared, tcp = best("torch "), best("shm "), best("gloo ")
    row = partial(_harness.row, case=f"batch {batch}, m = {microbatches}", peer_transport="gloo (TCP loopback)")
    speedup = [a / b for a, b in zip(times["one"], times["half"], strict=True)]
    ideal = [a / (microbatches / (microbatches + 1) * min(2.0, s)) for a, s in zip(times["one"], speedup, strict=True)]
    rows = [
        row(peer=peer, ours_transport=shared, ours=times[shared], theirs=times[peer]),
        row(peer=peer, ours_transport=tcp, ours=times[tcp], theirs=times[peer], info=True),
        row(peer="one process", ours_transport=shared, ours=times[shared], theirs=times["one"], info=True),
        row(peer="two halves, no exchange", ours_transport="one process", ours=times["half"], theirs=times["one"],
            info=True),
        row(peer="of the ideal (0.85 wanted)", ours_transport=shared, ours=times[shared], theirs=ideal, info=True),
        row(peer="the same again (A/A)", ours_transport="shm 1F1B", ours=times[f"shm one_f_one_b(2, {microbatches})"],
            theirs=times["again"], info=True),
    ]  # fmt: skip
    rows += [row(peer=name, ours_transport=shared, ours=times[shared], theirs=times[name], info=True)
             for name in times if name.startswith("torch ") and name != peer]  # fmt: skip
    return rows


def main() -> None:
    """Run all sizes."""
    given = _harness.arguments(__doc__ or "")
    rounds, steps = (3, 5) if given.quick else (10, 10)
    rows: list[dict] = []
    with bp.Cluster(1) as one, bp.Cluster(2, backend="shm") as shm, bp.Cluster(2, backend="gloo") as gloo:
        for batch, microbatches in CASES:
            rows += case((one, shm, gloo), batch, microbatches, rounds, steps)
    _harness.report(rows, given.json)


if __name__ == "__main__":
    main()
