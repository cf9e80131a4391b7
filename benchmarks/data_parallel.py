"""Data-parallel training on one host: shared memory and gloo against PyTorch's ways over gloo (TCP loopback).

    python benchmarks/data_parallel.py [--json FILE] [--quick]

Two workers, one thread each; the same networks, batches and SGD with momentum; runs alternate in shuffled order, and
a warm-up comes before every timed run.  Peers: DDP as it comes; DDP tuned (gradients as bucket views, static graph,
best of three bucket sizes); FSDP (``fully_shard``, every layer a unit); autograd with one flat all-reduce.

Fair choice: as DDP may choose among three bucket sizes by the medians of this very run, ours on either transport may
choose among 1, 2 and 4 buckets, and on shared memory also ZeRO 1, which is exact as well.  Rows of `ratio` are ours
on shared memory against DDP tuned; all else is for information.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from functools import partial

import _engine_costs as costs
import _harness
import _torch_peers as peers
import torch

import bpkit as bp
from bpkit.data import Dataset
from bpkit.nn import Linear, Network, ReLU

WORKERS = 2
SIZES = ((12, 512, 128), (24, 256, 64), (6, 1024, 64), (4, 128, 64), (12, 512, 512), (4, 1024, 512))
FEW_PEERS = 512  # batch from which, for time, only DDP and shared memory run
BUCKET_MEGABYTES = (1, 4, 25)
BUCKETS = (1, 2, 4)
FSDP_STEPS = 4  # it is so much slower that more would only take time
LEAST_WORK = 5e7  # multiply-adds of a forward; smaller sizes take more steps, so that no run is over in a moment


def network(layers: int, width: int) -> Network:
    """Linear layers of one width with ReLU between them, under cross-entropy."""
    made = [layer for _ in range(layers - 1) for layer in (Linear(width, width), ReLU())]
    return Network([*made, Linear(width, width)], width, seed=0)


def data(width: int, samples: int) -> Dataset:
    """Random samples: speed does not depend on what they say."""
    generator = torch.Generator().manual_seed(0)
    x, t = torch.randn(samples, width, generator=generator), torch.randint(0, width, (samples,), generator=generator)
    return Dataset("random", x, t, x[:1], t[:1])


class Ours:
    """Runs of ours, and the share of communication that each run hid."""

    def __init__(self, net: Network, samples: Dataset, steps: int) -> None:
        self.net, self.samples, self.steps = net, samples, steps
        self.hidden: dict[str, list[float]] = {}

    def run(self, name: str, cluster: bp.Cluster, plan: bp.plan.Plan) -> float:
        """Median seconds of a step."""
        batch, steps, optimizer = len(self.samples), self.steps + peers.warm_up(self.steps), bp.optim.SGD(**peers.SGD)
        result = cluster.train(self.net, self.samples, plan, batch=batch, steps=steps, optimizer=optimizer,
                               record=self.steps)  # fmt: skip
        found = bp.report(result)
        hidden, exposed = found.hidden_communication, found.parts.exposed_communication
        self.hidden.setdefault(name, []).append(hidden / (hidden + exposed))
        return statistics.median(result.step_times[-self.steps :])


def runs_of(shm: bp.Cluster, gloo: bp.Cluster, size: tuple[int, int, int], ours: Ours) -> dict[str, Callable]:
    """Everything that is timed on one size, by name."""
    layers, width, batch = size
    x, t = ours.samples.inputs, ours.samples.targets
    plans = {f"{k} bucket{'s' * (k > 1)}": bp.plan.data_parallel(WORKERS, k) for k in BUCKETS}
    runs: dict[str, Callable[[], float]] = {}

    def add(name: str, cluster: bp.Cluster, plan: bp.plan.Plan) -> None:
        runs[name] = partial(ours.run, name, cluster, plan)

    def peer(name: str, function: Callable, *more: object) -> None:
        runs[name] = lambda: max(gloo.call(function, (layers, width), x, t, ours.steps, *more))

    for name, plan in plans.items():
        add(f"shm, {name}", shm, plan)
    add("shm, ZeRO 1, 4 units", shm, bp.plan.zero(WORKERS, 1, units=4))
    add("again shm, 1 bucket", shm, plans["1 bucket"])
    tuned = {"gradient_as_bucket_view": True, "static_graph": True}
    peer("DDP default", peers.ddp, {})
    for megabytes in BUCKET_MEGABYTES:
        peer(f"DDP tuned, {megabytes} MB", peers.ddp, tuned | {"bucket_cap_mb": megabytes})
    if batch < FEW_PEERS:
        for name, plan in plans.items():
            add(f"gloo, {name}", gloo, plan)
        add("again gloo, 1 bucket", gloo, plans["1 bucket"])
        runs["FSDP"] = lambda: max(gloo.call(peers.fsdp, (layers, width), x, t, FSDP_STEPS))
        peer("flat all-reduce", peers.flat_all_reduce)
    return runs


def case(shm: bp.Cluster, gloo: bp.Cluster, size: tuple[int, int, int], rounds: int, steps: int
         ) -> tuple[list[dict], list[str]]:  # fmt: skip
    """The rows of one size, and what its traces say of hidden communication."""
    layers, width, batch = size
    steps *= max(1, round(LEAST_WORK / (layers * width * width * batch)))
    ours = Ours(network(layers, width), data(width, batch), steps)
    runs = runs_of(shm, gloo, size, ours)
    times = _harness.interleave(runs, rounds)
    label = f"{layers} x {width}, batch {batch}"

    def best(start: str) -> str:
        return min((n for n in runs if n.startswith(start)), key=lambda name: statistics.median(times[name]))

    def row(mine: str, theirs: str, info: bool = True) -> dict:
        transport = "shm" if "shm" in theirs else "gloo (TCP loopback)"
        return _harness.row(label, f"{mine} : {theirs}", times[mine], times[theirs], ours_transport=mine,
                            peer_transport=transport, info=info)  # fmt: skip

    shared = best("shm")
    rows = [row(shared, best("DDP tuned"), info=False), row(shared, "DDP default")]
    rows += [row(shared, name) for name in ("FSDP", "flat all-reduce") if name in runs]
    if batch < FEW_PEERS:
        rows += [row(best("gloo"), "DDP default"), row(best("gloo"), best("DDP tuned"))]
        rows += [row("gloo, 1 bucket", "again gloo, 1 bucket")]
    rows.append(row("shm, 1 bucket", "again shm, 1 bucket"))
    shares = [f"{name} {statistics.median(ours.hidden[name]):.0%}"
              for name in ours.hidden if "again" not in name and " 2 " not in name]  # fmt: skip
    return rows, [f"communication hidden, {label}: {'; '.join(shares)}"]


def main() -> None:
    """Run all sizes, then what the engine itself costs."""
    given = _harness.arguments(__doc__ or "")
    rounds, steps = (3, 4) if given.quick else (10, 4)
    rows: list[dict] = []
    facts: list[str] = []
    with (
        bp.Cluster(1) as one,
        bp.Cluster(WORKERS, backend="shm") as shm,
        bp.Cluster(WORKERS, backend="gloo") as gloo,
    ):
        for size in SIZES:
            found, said = case(shm, gloo, size, rounds, steps)
            rows, facts = rows + found, facts + said
        net, samples = network(12, 512), data(512, 512)
        plan = bp.plan.zero(WORKERS, 1, units=4)
        found, said = costs.speedup(shm, one, net, samples, plan, "12 x 512, batch 512", rounds, steps)
        rows, facts = rows + found, facts + said
        facts += costs.overhead(one)
        facts += costs.memory(shm, gloo, net, data(512, 64), (12, 512))
    _harness.report(rows, given.json, facts=facts)
    print("\n" + "\n".join(facts))


if __name__ == "__main__":
    main()
