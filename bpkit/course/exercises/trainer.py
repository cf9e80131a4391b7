"""The exercises of chapter 4.1."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from bpkit.course.exercises.verdict import Bench, Wrong, need_function, need_numbers, need_plan
from bpkit.data import digits, shard_sizes
from bpkit.nn import Network, mlp
from bpkit.optim import SGD
from bpkit.plan import Plan, data_parallel, zero
from bpkit.run.cluster import Cluster
from bpkit.run.transports.comm import Comm

TOLERANCE, LEARNING_RATE = 1e-6, 0.5
#: Samples of each rank, and the microbatches into which it cuts them.
SHARDS, MICROBATCHES = ((6, 6), (7, 4)), 3


def serial_gradient(network: Network, inputs: Tensor, targets: Tensor) -> Tensor:
    """The gradient of the summed loss, in layer order."""
    _, dy = network.loss.value_and_gradient(network.forward(inputs), targets)
    network.backward(dy)
    return torch.cat([gradient.flatten() for gradient in network.gradients()])


def need_serial(plan: Plan, network: Network, x: Tensor, t: Tensor, who: str) -> None:
    """Run a plan on workers, and refuse a mean gradient that is not the serial one."""
    with Cluster(plan.workers, timeout=5) as cluster:
        found = cluster.gradients(network, x, t, plan)
    if not (found - serial_gradient(network, x, t) / t.numel()).norm() <= TOLERANCE * found.norm():
        raise Wrong(f"{who} do not end with the serial gradient")


def watched(comm: Comm) -> tuple[SimpleNamespace, list[int]]:
    """A transport narrowed to `all_reduce`, and the elements of each sum so far."""
    sums: list[int] = []

    def all_reduce(tensor: Tensor) -> Tensor:
        sums.append(tensor.numel())
        return comm.all_reduce(tensor)

    return SimpleNamespace(rank=comm.rank, size=comm.size, all_reduce=all_reduce), sums


# -- predict: what does each level of ZeRO keep? -----------------------------------------------------------


def _judge_memory(answer: Any) -> str:
    numbers = need_numbers(answer, 4, "the bytes that a worker keeps under data parallelism and ZeRO 1, 2 and 3")
    network, data, momentum = mlp([64] * 9), digits(), SGD(0.1, momentum=0.9)
    plans = [data_parallel(4), *(zero(4, level, units=8) for level in (1, 2, 3))]
    with Cluster(4, backend="gloo") as cluster:  # which shares no memory between workers
        runs = [cluster.train(network, data, plan, batch=8, steps=1, optimizer=momentum) for plan in plans]
    kept = [sum(run.memory[0].values()) for run in runs]
    if [4 * one for one in numbers] == kept:
        raise Wrong("these are numbers of parameters; each takes 4 bytes")
    for level, (said, is_so) in enumerate(zip(numbers, kept, strict=True)):
        if said != is_so:
            name, way = f"ZeRO {level}" if level else "data parallelism", "more" if is_so > said else "less"
            raise Wrong(f"under {name} a worker keeps {way} than {said:,.0f} bytes: what does it keep whole, of what a "
                        "quarter, and of what two whole units besides?")  # fmt: skip
    return f"the workers' own count is {', '.join(f'{one:,}' for one in kept)} bytes too"


# -- fill in: who gets which sample? -----------------------------------------------------------------------


def _deal(comm: Any, answer: Callable[..., Any], samples: int) -> list[list[int]]:
    return [[int(i) for i in answer(comm.rank, comm.size, samples, epoch)] for epoch in (0, 0, 1)]


def _judge_sampler(answer: Any) -> str:
    need_function(answer, "my_samples(rank, size, samples, epoch)")
    with Bench(4) as bench:
        for samples in (12, 10, 3):
            case = f"{samples} samples, 4 workers"
            first, again, later = zip(*bench.run(_deal, answer, samples, case=case), strict=True)
            _judge_deal(first, samples, f"{case}, epoch 0")
            _judge_deal(later, samples, f"{case}, epoch 1")
            if first != again:
                raise Wrong(f"{case}: epoch 0, asked for twice, has two orders: such a run cannot be repeated")
            if samples > 4 and first == later:
                raise Wrong(f"{case}: epoch 1 has the order of epoch 0: let the epoch choose it")
    return "each sample once an epoch, on one worker, also where they do not divide; each epoch in an order of its own"


def _judge_deal(parts: tuple[list[int], ...], samples: int, case: str) -> None:
    for i in sorted({*range(samples), *(i for part in parts for i in part)}):
        ranks = [str(rank) for rank, part in enumerate(parts) for _ in range(part.count(i))]
        if len(ranks) != 1 or i not in range(samples):
            what = f"{len(ranks)} times, to ranks {', '.join(ranks)}" if ranks else "to nobody"
            raise Wrong(f"{case}: sample {i} is given {what}; each from 0 to {samples - 1} is to be given once")
    if sorted(map(len, parts)) != sorted(shard_sizes(samples, len(parts))):
        raise Wrong(f"{case}: the workers get {', '.join(str(len(part)) for part in parts)} samples, which is not even")


# -- find the bug: accumulation ----------------------------------------------------------------------------


def _accumulate(comm: Any, answer: Callable[..., Any], network: Network, parts: list[Any]) -> tuple[Tensor, int]:
    """The change of the parameters, and how often a whole gradient was reduced."""
    before, (narrow, sums) = network.copy().parameters(), watched(comm)
    answer(narrow, network, parts[comm.rank], LEARNING_RATE)
    change = torch.cat([(a - b).flatten() for a, b in zip(network.parameters(), before, strict=True)])
    return change, sum(sums) // len(change)


def _judge_accumulate(answer: Any) -> str:
    need_function(answer, "accumulate(comm, network, microbatches, lr)")
    data, network = digits(torch.float64), mlp([64, 16, 10], seed=1, dtype=torch.float64)
    with Bench(2) as bench:
        for sizes in SHARDS:
            case, total = f"shards of {sizes[0]} and {sizes[1]} samples, {MICROBATCHES} microbatches", sum(sizes)
            cut = zip(data.inputs[:total].split(sizes), data.targets[:total].split(sizes), strict=True)
            parts = [list(zip(x.tensor_split(MICROBATCHES), t.tensor_split(MICROBATCHES), strict=True)) for x, t in cut]
            ends = bench.run(_accumulate, answer, network, parts, case=case)
            basis = torch.stack([serial_gradient(network, x, t) for share in parts for x, t in share], 1)
            for rank, (change, _) in enumerate(ends):
                _judge_change(change * total / -LEARNING_RATE, basis, f"{case}: rank {rank}")
            if ends[0][1] > 1:
                raise Wrong(f"{case}: the weights are right, but the gradient travels {ends[0][1]} times, not once")
    return "the weights equal those of the serial run, and the gradient travels once a step"


def _judge_change(change: Tensor, basis: Tensor, who: str) -> None:
    """Solve for how often each microbatch's gradient is in a change of the parameters: each must be in it once."""
    counts = torch.linalg.lstsq(basis, change[:, None]).solution[:, 0]
    for i, count in enumerate(counts.tolist()):
        if not abs(count - 1) <= TOLERANCE:
            owner, mb = divmod(i, MICROBATCHES)
            raise Wrong(f"{who} applies microbatch {mb} of rank {owner} with the weight {round(count, 3) + 0:g}, not 1")
    if (basis.sum(1) - change).norm() > TOLERANCE * change.norm():
        raise Wrong(f"{who} changes its weights by more than the gradients of the microbatches")


# -- find the bug: a schedule of buckets -------------------------------------------------------------------


def _judge_buckets(answer: Any) -> str:
    plan = need_plan(answer)
    if (plan.workers, plan.stages, plan.microbatches, plan.expanded, plan.exact) != (2, 3, 1, False, True):
        raise Wrong("the plan is for 2 workers that share one row, with 3 stages and 1 microbatch, merged by the mean")
    row = [str(action) for action in plan.rows[0]]
    for stage in (2, 1):
        if row.index(f"{stage}REDUCE_GRAD") > row.index(f"{stage - 1}B0"):
            raise Wrong(f"a right gradient, but {stage}REDUCE_GRAD comes after {stage - 1}B0 and cannot hide behind it")
    data, network = digits(torch.float64), mlp([64, 16, 16, 10], seed=1, dtype=torch.float64)
    need_serial(plan, network, *data.batch(0, 9), "two workers")
    return "two workers end with the serial gradient, and each bucket but the last can hide behind a backward"


#: The exercises by name.
EXERCISES = {
    "zero_memory": _judge_memory, "my_samples": _judge_sampler,
    "accumulate": _judge_accumulate, "bucket_plan": _judge_buckets,
}  # fmt: skip
