"""What our own engine costs: memory a worker, speedup, and the interpreter between actions."""

from __future__ import annotations

import statistics
import time
from functools import partial

import _harness
import _torch_peers as peers
import torch
from torch import Tensor

import bpkit as bp
from bpkit.data import Dataset
from bpkit.nn import Context, Linear, Network
from bpkit.plan import Plan, compile
from bpkit.run import Comm
from bpkit.run.engine.rank import Runner
from bpkit.run.job import Job
from bpkit.trace import Log

MEGABYTE = 1e6


def formula(level: int, elements: int, unit: int, n: int) -> float:
    """Bytes a rank by the docstring of `bpkit.plan.strategies.zero`, with AdamW: b = 4, K = 8; level 0: all whole."""
    b, k = 4, 8
    own = (b + k) * elements / n
    unit_gradients, unit_parameters = 2 * b * unit, 2 * b * unit
    return {0: (2 * b + k) * elements, 1: 2 * b * elements + own, 2: b * elements + own + unit_gradients,
            3: own + b * elements / n + unit_gradients + unit_parameters}[level]  # fmt: skip


def memory(shm: bp.Cluster, gloo: bp.Cluster, net: Network, data: Dataset, size: tuple[int, int]) -> list[str]:
    """A table: parameters, gradients and optimizer state of the worker that holds most, in megabytes."""
    n, units = shm.workers, size[0]
    run = partial(bp.Cluster.train, network=net, data=data, batch=len(data), steps=2, optimizer=bp.optim.AdamW(1e-3))
    lines = [f"memory a worker, MB: {size[0]} x {size[1]}, AdamW, {n} workers, {units} units",
             f"  {'':<34}{'parameters':>11}{'gradients':>11}{'optimizer':>11}{'in all':>9}{'formula':>9}"]  # fmt: skip

    def line(name: str, found: dict[str, int], predicted: float | None) -> None:
        total = sum(found.values())
        parts = "".join(f"{value / MEGABYTE:>11.2f}" for value in found.values())
        end = "" if predicted is None else f"{predicted / MEGABYTE:>9.2f}"
        lines.append(f"  {name:<34}{parts}{total / MEGABYTE:>9.2f}{end}")

    for level in (0, 1, 2, 3):
        plan = bp.plan.zero(n, level, units=units) if level else bp.plan.data_parallel(n, units)
        for cluster in (shm, gloo):
            result = run(cluster, plan=plan)
            sizes = result.program.sizes
            name = f"{f'ZeRO {level}' if level else 'data parallel'}, {cluster.backend}"
            most = max(result.memory, key=lambda m: sum(m.values()))
            line(name, most, formula(level, sum(sizes), max(sizes), n))
    for name, shards in (("DDP, gradients as bucket views", False), ("FSDP (fully_shard), own shards", True)):
        found = gloo.call(peers.memory, size, data.inputs, data.targets, shards)
        line(name, max(found, key=lambda m: sum(m.values())), None)
    lines.append("  on shm the parameters of ZeRO lie once for all workers, counted 1/n each: below the formula; "
                 "FSDP's gathered parameters and whole gradients are not counted, our two units of each are")
    return lines


def compute_only(comm: Comm, net: Network, x: Tensor, t: Tensor, parts: int, steps: int) -> float:
    """Median seconds of forward, backward and update on 1/`parts` of a batch, with no communication."""
    net, optimizer = net.copy(), bp.optim.SGD(**peers.SGD)
    x, t = x.tensor_split(parts)[comm.rank], t.tensor_split(parts)[comm.rank]
    state = optimizer.state(net.flat_parameters)

    def step() -> None:
        _, dy = net.loss.value_and_gradient(net.forward(x, 0, Context(0, 0, True)), t)
        net.backward(dy, 0, False)
        optimizer.update(net.flat_parameters, net.flat_gradients, state, 0, 1 / len(t))

    return peers.timed(comm, step, steps)


def speedup(
    shm: bp.Cluster, one: bp.Cluster, net: Network, data: Dataset, plan: Plan, label: str, rounds: int, steps: int
) -> tuple[list[dict], list[str]]:
    """Speedup of two workers over one, against that of the same compute without communication."""

    def train(cluster: bp.Cluster, by: Plan) -> float:
        optimizer = bp.optim.SGD(**peers.SGD)
        result = cluster.train(net, data, by, batch=len(data), steps=steps + peers.warm_up(steps), optimizer=optimizer)
        return statistics.median(result.step_times[-steps:])

    x, t = data.inputs, data.targets
    times = _harness.interleave({
        "one worker": lambda: train(one, bp.plan.serial()),
        "two workers": lambda: train(shm, plan),
        "whole batch": lambda: max(one.call(compute_only, net, x, t, 1, steps)),
        "halves": lambda: max(shm.call(compute_only, net, x, t, 2, steps)),
    }, rounds)  # fmt: skip
    ours = [a / b for a, b in zip(times["one worker"], times["two workers"], strict=True)]
    bare = [a / b for a, b in zip(times["whole batch"], times["halves"], strict=True)]
    share = [a / b for a, b in zip(ours, bare, strict=True)]
    text = (f"speedup of 2 workers over 1, {label}: {statistics.median(ours):.2f}; of the compute alone "
            f"{statistics.median(bare):.2f}; share {statistics.median(share):.2f} "
            f"(least {min(share):.2f}, most {max(share):.2f}; 0.9 wanted)")  # fmt: skip
    row = _harness.row(label, "halves, no communication", times["two workers"], times["halves"], info=True,
                       ours_transport=plan.name)  # fmt: skip
    return [row], [text]


def interpreter(comm: Comm, plan: Plan, repeats: int) -> tuple[float, int]:
    """Seconds an action that ``Executor.run`` takes beyond calling the same bound actions in a bare loop.

    The plan is of one worker, over one tiny layer a stage; the two loops alternate, and the least of each counts.
    """
    net = Network([Linear(2, 2) for _ in range(plan.stages)], 2, seed=0)
    program = compile(plan, net)
    inputs, targets = torch.zeros(1, 2), torch.zeros(1, dtype=torch.int64)
    data = bp.data.Dataset("one sample", inputs, targets, inputs, targets)
    runner = Runner(comm, Job(program.plan, net, data, bp.optim.SGD(0.0), batch=1, compiled=program))
    runner.load(0, torch.zeros(1, dtype=torch.int64))
    bound, width = runner.executor.bound, len(runner.executor.row)
    log = Log.empty([0], width)
    spent: dict[str, list[float]] = {"executor": [], "bare": []}
    for _ in range(repeats):
        began = time.perf_counter()
        runner.executor.run(0, log, 0)
        middle = time.perf_counter()
        for run in bound:
            run()
        spent["executor"].append(middle - began)
        spent["bare"].append(time.perf_counter() - middle)
    return (statistics.median(spent["executor"]) - statistics.median(spent["bare"])) / width, width


def overhead(one: bp.Cluster) -> list[str]:
    """The interpreter's cost an action: of a row of compute, and of one that also scatters and gathers."""
    lines = ["interpreter, us an action: Executor.run less a bare loop over the same bound actions (5 wanted)"]
    plans = {"compute only": bp.plan.serial(64), "with UNSHARD, SCATTER_GRAD": bp.plan.zero(1, 3, units=64)}
    for name, plan in plans.items():
        ((each, width),) = one.call(interpreter, plan, 200)
        lines.append(f"  {name:<34}{each * 1e6:>11.2f}   {width} actions a step, 64 stages, one worker")
    return lines
