"""The exercises of chapter 4.1 accept right answers and reject wrong ones, with a sentence that names the fault."""

from __future__ import annotations

import os
import random
import sys
from collections.abc import Callable
from typing import Any

import cloudpickle
import pytest
import torch
from torch.utils.data.distributed import DistributedSampler

import bpkit as bp

from .judge import rejected

pytestmark = pytest.mark.slow

# As functions of a cell travel: by value, so that no worker imports this module.
cloudpickle.register_pickle_by_value(sys.modules[__name__])


# -- predict: memory ---------------------------------------------------------------------------------------

PSI = 8 * (64 * 64 + 64)  # parameters; a unit is an eighth of them
KEPT = [3 * 4 * PSI, 2 * 4 * PSI + 8 * PSI // 4, 4 * PSI + 8 * PSI // 4 + PSI, 12 * PSI // 4 + 2 * PSI]


@pytest.mark.parametrize("answer", [KEPT, tuple(map(float, KEPT)), torch.tensor(KEPT)], ids=type)
def test_zero_memory_accepts(answer: Any) -> None:
    verdict = bp.exercises.check("zero_memory", answer)
    assert verdict.passed, verdict


@pytest.mark.parametrize(
    "answer, says",
    [
        ([one // 4 for one in KEPT], "numbers of parameters"),
        ([*KEPT[:3], 3 * PSI], "under ZeRO 3 a worker keeps more than 99,840"),
        ([*KEPT[:2], 6 * PSI, KEPT[3]], "under ZeRO 2 a worker keeps more"),
        ([KEPT[0], 12 * PSI, *KEPT[2:]], "under ZeRO 1 a worker keeps less than 399,360"),
        ([8 * PSI, *KEPT[1:]], "under data parallelism a worker keeps more"),
        (KEPT[:3], "list of 4 numbers"),
        (None, "list of 4 numbers"),
    ],
)
def test_zero_memory_rejects(answer: Any, says: str) -> None:
    rejected("zero_memory", answer, says)


# -- fill in: the sampler ----------------------------------------------------------------------------------


def order(samples: int, seed: int) -> list[int]:
    return torch.randperm(samples, generator=torch.Generator().manual_seed(seed)).tolist()


def every_nth(rank: int, size: int, samples: int, epoch: int) -> list[int]:
    return order(samples, epoch)[rank::size]


def in_pieces(rank: int, size: int, samples: int, epoch: int) -> torch.Tensor:
    return torch.tensor(order(samples, epoch + 5)).tensor_split(size)[rank]


def the_sampler(rank: int, size: int, samples: int, epoch: int) -> list[int]:
    sampler = DistributedSampler(range(samples), num_replicas=size, rank=rank)  # type: ignore[arg-type]
    sampler.set_epoch(epoch)
    return list(sampler)


def drops_the_last(rank: int, size: int, samples: int, epoch: int) -> list[int]:
    each = samples // size
    return order(samples, epoch)[rank * each : (rank + 1) * each]


def one_order(rank: int, size: int, samples: int, epoch: int) -> list[int]:
    return order(samples, 0)[rank::size]


def seeded_by_rank(rank: int, size: int, samples: int, epoch: int) -> list[int]:
    return order(samples, 10 * epoch + rank)[rank::size]


def never_again(rank: int, size: int, samples: int, epoch: int) -> list[int]:
    mine = order(samples, epoch)[rank::size]
    return random.sample(mine, len(mine))


def all_to_one(rank: int, size: int, samples: int, epoch: int) -> list[int]:
    return [] if rank else order(samples, epoch)


def from_one(rank: int, size: int, samples: int, epoch: int) -> list[int]:
    return [i + 1 for i in every_nth(rank, size, samples, epoch)]


def hangs(rank: int, *rest: Any) -> list[int]:
    while rank == 1:
        pass
    return []


def dies(rank: int, *rest: Any) -> None:
    os._exit(3)


@pytest.mark.parametrize("answer", [every_nth, in_pieces])
def test_my_samples_accepts(answer: Callable[..., Any]) -> None:
    verdict = bp.exercises.check("my_samples", answer)
    assert verdict.passed, verdict


@pytest.mark.parametrize(
    "answer, says",
    [
        (the_sampler, "10 samples, 4 workers, epoch 0: sample 1 is given 2 times"),
        (drops_the_last, "10 samples, 4 workers, epoch 0: sample 2 is given to nobody"),
        (one_order, "epoch 1 has the order of epoch 0"),
        (seeded_by_rank, "to nobody"),
        (never_again, "asked for twice"),
        (all_to_one, "the workers get 12, 0, 0, 0 samples"),
        (from_one, "sample 0 is given to nobody"),
        (lambda *args: None, "TypeError"),
        (hangs, "rank 1 computes without end"),
        (dies, "ended without an answer"),
        ([0, 1], "a function, my_samples("),
    ],
)
def test_my_samples_rejects(answer: Any, says: str) -> None:
    rejected("my_samples", answer, says)


# -- find the bug: accumulation ----------------------------------------------------------------------------


def backward(net: bp.nn.Network, x: torch.Tensor, t: torch.Tensor, add: bool) -> None:
    _, dy = net.loss.value_and_gradient(net.forward(x), t)
    net.backward(dy, accumulate=add)


def total(comm: Any, parts: Any) -> torch.Tensor:
    return comm.all_reduce(torch.tensor([float(sum(len(t) for _, t in parts))], dtype=torch.float64))


def once_at_the_end(comm: Any, net: bp.nn.Network, parts: Any, lr: float) -> None:
    for i, (x, t) in enumerate(parts):
        backward(net, x, t, add=i > 0)
    net.flat_parameters -= lr / total(comm, parts) * comm.all_reduce(net.flat_gradients)


def tensor_by_tensor(comm: Any, net: bp.nn.Network, parts: Any, lr: float) -> None:
    for i, (x, t) in enumerate(parts):
        backward(net, x, t, add=i > 0)
    for p, g in zip(net.parameters(), net.gradients(), strict=True):
        p -= lr / total(comm, parts) * comm.all_reduce(g.clone().flatten()).view_as(g)


def in_each(comm: Any, net: bp.nn.Network, parts: Any, lr: float) -> None:
    for i, (x, t) in enumerate(parts):
        backward(net, x, t, add=i > 0)
        comm.all_reduce(net.flat_gradients)
    net.flat_parameters -= lr / total(comm, parts) * net.flat_gradients


def in_the_first(comm: Any, net: bp.nn.Network, parts: Any, lr: float) -> None:
    for i, (x, t) in enumerate(parts):
        backward(net, x, t, add=i > 0)
        if i == 0:
            comm.all_reduce(net.flat_gradients)
    net.flat_parameters -= lr / total(comm, parts) * net.flat_gradients


def only_the_last(comm: Any, net: bp.nn.Network, parts: Any, lr: float) -> None:
    for x, t in parts:
        backward(net, x, t, add=False)
    net.flat_parameters -= lr / total(comm, parts) * comm.all_reduce(net.flat_gradients)


def right_but_often(comm: Any, net: bp.nn.Network, parts: Any, lr: float) -> None:
    samples, merged = total(comm, parts), torch.zeros_like(net.flat_gradients)
    for x, t in parts:
        backward(net, x, t, add=False)
        merged += comm.all_reduce(net.flat_gradients)
    net.flat_parameters -= lr / samples * merged


def averages_parameters(comm: Any, net: bp.nn.Network, parts: Any, lr: float) -> None:
    for i, (x, t) in enumerate(parts):
        backward(net, x, t, add=i > 0)
    net.flat_parameters -= lr / sum(len(t) for _, t in parts) * net.flat_gradients
    comm.all_reduce(net.flat_parameters).div_(comm.size)


def mean_of_microbatches(comm: Any, net: bp.nn.Network, parts: Any, lr: float) -> None:
    for x, t in parts:
        backward(net, x, t, add=False)
        net.flat_parameters -= lr / len(t) / len(parts) / comm.size * comm.all_reduce(net.flat_gradients)


def decays(comm: Any, net: bp.nn.Network, parts: Any, lr: float) -> None:
    shrunk = 0.01 * net.flat_parameters
    once_at_the_end(comm, net, parts, lr)
    net.flat_parameters -= shrunk


def one_rank_waits(comm: Any, net: bp.nn.Network, parts: Any, lr: float) -> None:
    if comm.rank:
        once_at_the_end(comm, net, parts, lr)


@pytest.mark.parametrize("answer", [once_at_the_end, tensor_by_tensor])
def test_accumulate_accepts(answer: Callable[..., Any]) -> None:
    verdict = bp.exercises.check("accumulate", answer)
    assert verdict.passed, verdict


@pytest.mark.parametrize(
    "answer, says",
    [
        (in_each, "rank 0 applies microbatch 0 of rank 0 with the weight 4, not 1"),
        (in_the_first, "rank 0 applies microbatch 1 of rank 1 with the weight 0"),
        (only_the_last, "microbatch 0 of rank 0 with the weight 0"),
        (right_but_often, "the weights are right, but the gradient travels 3 times"),
        (averages_parameters, "shards of 7 and 4 samples"),
        (mean_of_microbatches, "rank 0"),
        (decays, "rank 0"),
        (one_rank_waits, "deadlock: rank 1 waits"),
        (lambda *args: None, "with the weight 0"),
        (lambda comm, *args: comm.size / 0, "ZeroDivisionError"),
        ("accumulate", "a function, accumulate("),
    ],
)
def test_accumulate_rejects(answer: Any, says: str) -> None:
    rejected("accumulate", answer, says)


# -- find the bug: buckets ---------------------------------------------------------------------------------

PLAN = str(bp.plan.data_parallel(2, buckets=3))


@pytest.mark.parametrize("answer", [PLAN, bp.plan.Plan.parse(PLAN)], ids=type)
def test_bucket_plan_accepts(answer: Any) -> None:
    verdict = bp.exercises.check("bucket_plan", answer)
    assert verdict.passed, verdict


@pytest.mark.parametrize(
    "answer, says",
    [
        (PLAN.replace(" 1REDUCE_GRAD", ""), "1UPDATE: the gradient of stage 1"),
        (PLAN.replace("1REDUCE_GRAD 0B0 0REDUCE_GRAD", "0REDUCE_GRAD 0B0 1REDUCE_GRAD"), "0UPDATE: the gradient of"),
        (PLAN.replace("2REDUCE_GRAD", "2REDUCE_GRAD 2REDUCE_GRAD"), "too often"),
        (PLAN.replace("2REDUCE_GRAD 1B0", "1B0 2REDUCE_GRAD"), "2REDUCE_GRAD comes after 1B0"),
        (PLAN.replace("1REDUCE_GRAD 0B0", "0B0 1REDUCE_GRAD"), "1REDUCE_GRAD comes after 0B0"),
        (PLAN.replace("merge mean", "merge sum"), "merged by the mean"),
        (bp.plan.data_parallel(2), "with 3 stages"),
        (bp.plan.data_parallel(3, buckets=3), "for 2 workers"),
        ("a plan", "line 1 of the plan"),
        (None, "a plan, or the text of one"),
    ],
)
def test_bucket_plan_rejects(answer: Any, says: str) -> None:
    rejected("bucket_plan", answer, says)
