"""The checks of chapter 3.3 accept right answers and reject wrong ones, with a sentence that names the fault."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from typing import Any

import cloudpickle
import pytest
import torch
from torch import Tensor

import bpkit as bp

from .judge import rejected

pytestmark = pytest.mark.slow

# As functions of a cell travel: by value, so that no worker imports this module.
cloudpickle.register_pickle_by_value(sys.modules[__name__])


def named(value: Any) -> str | None:
    return getattr(value, "__name__", None)


# -- predict -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("answer", [[45, 45, 40.5, 12, 4], torch.tensor([45, 45, 40.5, 12, 4])], ids=type)
def test_costs_accept(answer: Any) -> None:
    assert bp.exercises.check("pipeline_costs", answer).passed


@pytest.mark.parametrize(
    "answer, says",
    [
        ([36, 45, 40.5, 12, 4], "GPipe: not 36; a rank works 36"),
        ([45, 36, 40.5, 12, 4], "1F1B: not 36"),
        ([45, 45, 45, 12, 4], "interleaved 1F1B: not 45"),
        ([45, 45, 40.5, 4, 4], "GPipe: not 4; count the microbatches"),
        ([45, 45, 40.5, 12, 12], "1F1B: not 12; count"),
        ([0.2, 0.2, 0.11, 12, 4], "GPipe: not 0.2"),
        ([float("nan")] * 5, "GPipe: not nan"),
        ([45, 45, 40.5], "list of 5"),
        (None, "list of 5"),
    ],
)
def test_costs_reject(answer: Any, says: str) -> None:
    rejected("pipeline_costs", answer, says)


# -- the order of 1F1B -------------------------------------------------------------------------------------


def right_order(rank: int, ranks: int, microbatches: int) -> list[str]:
    warm = min(ranks - rank - 1, microbatches)
    row = [f"F{k}" for k in range(warm)]
    for k in range(microbatches):
        row += [f"F{k + warm}"] * (k + warm < microbatches) + [f"B{k}"]
    return row


def as_the_library(rank: int, ranks: int, microbatches: int) -> tuple[str, ...]:
    row = bp.plan.one_f_one_b(ranks, microbatches).rows[rank]
    return tuple(f"{a.kind}{a.mb}" for a in row if a.kind in ("F", "B"))


def backward_never_runs(rank: int, ranks: int, microbatches: int) -> list[str]:
    row = [f"F{k}" for k in range(microbatches)]
    row += [f"B{k}" for k in range(microbatches - 1, 0)]
    return row


def gpipe_order(rank: int, ranks: int, microbatches: int) -> list[str]:
    return [f"{kind}{k}" for kind in "FB" for k in range(microbatches)]


def warm_everywhere(rank: int, ranks: int, microbatches: int) -> list[str]:
    """The warm-up grows with the rank: the last one waits for forwards that the first holds back."""
    return right_order(ranks - 1 - rank, ranks, microbatches)


def one_at_a_time(rank: int, ranks: int, microbatches: int) -> list[str]:
    return [f"{kind}{k}" for k in range(microbatches) for kind in "FB"]


def half_warm(rank: int, ranks: int, microbatches: int) -> list[str]:
    return right_order(rank + (ranks - 1 - rank + 1) // 2, ranks, microbatches)


def more_than_there_are(rank: int, ranks: int, microbatches: int) -> list[str]:
    """Right as long as there are as many microbatches as ranks."""
    warm = ranks - rank - 1
    return [f"F{k}" for k in range(warm)] + [cell for k in range(microbatches) for cell in (f"F{k + warm}", f"B{k}")]


def twice(rank: int, ranks: int, microbatches: int) -> list[str]:
    return right_order(rank, ranks, microbatches) + ["B0"]


def in_other_words(rank: int, ranks: int, microbatches: int) -> list[str]:
    return [f"{rank}{cell}" for cell in right_order(rank, ranks, microbatches)]


def backward_first(rank: int, ranks: int, microbatches: int) -> list[str]:
    row = right_order(rank, ranks, microbatches)
    return row if rank < ranks - 1 else ["B0", "F0", *row[2:]]


def order_never_ends(rank: int, ranks: int, microbatches: int) -> list[str]:
    while rank == 1:
        pass
    return right_order(rank, ranks, microbatches)


def order_raises(rank: int, ranks: int, microbatches: int) -> list[str]:
    if rank == 2:
        raise IndexError("list index out of range")
    return right_order(rank, ranks, microbatches)


@pytest.mark.parametrize("answer", [right_order, as_the_library])
def test_order_accepts(answer: Callable[..., Any]) -> None:
    start = time.monotonic()
    verdict = bp.exercises.check("my_order", answer)
    assert verdict.passed, verdict
    assert time.monotonic() - start < 10


WRONG_ORDERS = [
    (backward_never_runs, "4 ranks, 8 microbatches: rank 0 has B0 0 times, and 0 backwards in all"),
    (gpipe_order, "rank 0 stores 5 microbatches after F4, its action 5; 1F1B keeps at most 4"),
    (warm_everywhere, "deadlock: rank 0 waits at B0, rank 1 waits at F1"),
    (one_at_a_time, "a step takes 96 units and 1F1B's 33"),
    (half_warm, "units and 1F1B's 33"),
    (more_than_there_are, "rank 0 has F8 1 times"),
    (twice, "rank 0 has B0 2 times"),
    (in_other_words, "rank 0 has F0 0 times"),
    (backward_first, "deadlock"),
    (order_never_ends, "rank 1 computes without end"),
    (order_raises, "rank 2 raises IndexError"),
    (lambda *given: None, "TypeError"),
    ("F0 B0", "a function, my_order(rank, ranks, microbatches)"),
]


@pytest.mark.parametrize("answer, says", WRONG_ORDERS, ids=named)
def test_order_rejects(answer: Any, says: str) -> None:
    rejected("my_order", answer, says)


# -- a pipelined step --------------------------------------------------------------------------------------


def step(comm: Any, stage: Any, inputs: list[Tensor], targets: list[Tensor], lr: float, share: Callable[[int], float],
         scale: float = 1.0, accumulate: bool = True, backwards: int | None = None) -> None:  # fmt: skip
    """A pipelined step in which microbatch k's gradient counts ``share(k)``."""
    first, last, outputs = comm.rank == 0, comm.rank == comm.size - 1, []
    for k, given in enumerate(inputs):
        outputs.append(stage.forward(given if first else comm.recv(None, comm.rank - 1), k))
        if not last:
            comm.send(outputs[-1], comm.rank + 1)
    for k in range(len(inputs))[:backwards]:
        if last:
            dy = stage.loss.value_and_gradient(outputs[k], targets[k])[1] * share(k)
        else:
            dy = comm.recv(None, comm.rank + 1)
        dx = stage.backward(dy, k, accumulate=accumulate and k > 0, need_input=True)
        if not first:
            comm.send(dx, comm.rank - 1)
    stage.flat_parameters -= lr * scale * stage.flat_gradients


def total(targets: list[Tensor]) -> int:
    return sum(map(len, targets))


def right_step(comm: Any, stage: Any, x: list[Tensor], t: list[Tensor], lr: float) -> None:
    step(comm, stage, x, t, lr, lambda k: 1 / total(t))


def divides_at_the_end(comm: Any, stage: Any, x: list[Tensor], t: list[Tensor], lr: float) -> None:
    step(comm, stage, x, t, lr, lambda k: 1, 1 / total(t))


def too_large(comm: Any, stage: Any, x: list[Tensor], t: list[Tensor], lr: float) -> None:
    step(comm, stage, x, t, lr, lambda k: 1 / len(t[k]))


def mean_of_means(comm: Any, stage: Any, x: list[Tensor], t: list[Tensor], lr: float) -> None:
    step(comm, stage, x, t, lr, lambda k: 1 / len(t[k]) / len(t))


def last_only(comm: Any, stage: Any, x: list[Tensor], t: list[Tensor], lr: float) -> None:
    step(comm, stage, x, t, lr, lambda k: 1 / total(t), accumulate=False)


def one_stage_too_large(comm: Any, stage: Any, x: list[Tensor], t: list[Tensor], lr: float) -> None:
    step(comm, stage, x, t, lr, lambda k: 1 / total(t), 1 + 2 * comm.rank)


def no_backward(comm: Any, stage: Any, x: list[Tensor], t: list[Tensor], lr: float) -> None:
    step(comm, stage, x, t, lr, lambda k: 1 / total(t), backwards=0)


def merges_stages(comm: Any, stage: Any, x: list[Tensor], t: list[Tensor], lr: float) -> None:
    """What the document's fourth step says: gradients of different parameters, added."""
    before = stage.flat_parameters.clone()
    right_step(comm, stage, x, t, lr)
    change = torch.zeros(1200, dtype=before.dtype)
    change[: len(before)] = stage.flat_parameters - before
    stage.flat_parameters.copy_(before + comm.all_reduce(change)[: len(before)])


def receives_too_often(comm: Any, stage: Any, x: list[Tensor], t: list[Tensor], lr: float) -> None:
    right_step(comm, stage, x, t, lr)
    if comm.rank == 0:
        comm.recv(None, 1)


def step_dies(comm: Any, stage: Any, x: list[Tensor], t: list[Tensor], lr: float) -> None:
    if comm.rank == 1:
        os._exit(3)


@pytest.mark.parametrize("answer", [right_step, divides_at_the_end])
def test_step_accepts(answer: Callable[..., Any]) -> None:
    verdict = bp.exercises.check("pipeline_step", answer)
    assert verdict.passed, verdict


WRONG_STEPS = [
    (too_large, "4, 4, 4 samples: in the applied gradient a sample of microbatch 0 counts 3 times"),
    (mean_of_means, "6, 3, 2 samples: in the applied gradient a sample of microbatch 0 counts 0.61"),
    (last_only, "a sample of microbatch 0 counts"),
    (one_stage_too_large, "some stage's weights change by something else"),
    (merges_stages, "some stage's weights change by something else"),
    (no_backward, "counts 0 times"),
    (receives_too_often, "deadlock: rank 0 waits in recv for rank 1"),
    (step_dies, "the process of rank 1 ended"),
    (lambda comm: None, "TypeError"),
    (None, "a function, pipeline_step("),
]


@pytest.mark.parametrize("answer, says", WRONG_STEPS, ids=named)
def test_step_rejects(answer: Any, says: str) -> None:
    rejected("pipeline_step", answer, says)


# -- where the sum stands ----------------------------------------------------------------------------------


def split(comm: Any, x: Tensor, w1: Tensor, w2: Tensor, bias: Tensor, dz: Tensor, *, bias_in: bool = False,
          sum_z: bool = True, sum_dx: bool = True, sum_weights: bool = False, sum_h: bool = False,
          ) -> tuple[Tensor, ...]:  # fmt: skip
    h = (x @ w1.T).relu()
    if sum_h:
        comm.all_reduce(h)
    z = h @ w2.T + bias * bias_in
    z = (comm.all_reduce(z) if sum_z else z) + bias * (not bias_in)
    dh = (dz @ w2) * (h > 0)
    dx, dw1, dw2 = dh @ w1, dh.T @ x, dz.T @ h
    if sum_weights:
        dw1, dw2 = comm.all_reduce(dw1), comm.all_reduce(dw2)
    return comm.all_reduce(dx) if sum_dx else dx, dw1, dw2, z


def right_split(*given: Any) -> tuple[Tensor, ...]:
    dx, dw1, dw2, z = split(*given)
    return z, dx, dw1, dw2


def wrong_split(**how: bool) -> Callable[..., tuple[Tensor, ...]]:
    def answer(*given: Any) -> tuple[Tensor, ...]:
        dx, dw1, dw2, z = split(*given, **how)
        return z, dx, dw1, dw2

    return answer


def gathers_first(comm: Any, x: Tensor, w1: Tensor, w2: Tensor, bias: Tensor, dz: Tensor) -> tuple[Tensor, ...]:
    """Right, but h is made whole though nobody needs it."""
    n, rank = len(w1), comm.rank
    h = torch.zeros(len(x), n * comm.size, dtype=x.dtype)
    h[:, rank * n : (rank + 1) * n] = (x @ w1.T).relu()
    mine = comm.all_reduce(h)[:, rank * n : (rank + 1) * n]
    dh = (dz @ w2) * (mine > 0)
    return comm.all_reduce(mine @ w2.T) + bias, comm.all_reduce(dh @ w1), dh.T @ x, dz.T @ mine


def one_rank_sums_more(comm: Any, x: Tensor, *given: Tensor) -> tuple[Tensor, ...]:
    if comm.rank == 0:
        comm.all_reduce(torch.zeros(35, dtype=x.dtype))
    return right_split(comm, x, *given)


def three_results(*given: Any) -> tuple[Tensor, ...]:
    return right_split(*given)[:3]


def test_split_accepts() -> None:
    verdict = bp.exercises.check("split_layers", right_split)
    assert verdict.passed, verdict


WRONG_SPLITS = [
    (wrong_split(sum_z=False), "z of rank 0 is wrong; which products"),
    (wrong_split(sum_dx=False), "dx of rank 0 is wrong; which products"),
    (wrong_split(bias_in=True), "z of rank 0 is wrong: the bias is in it 3 times"),
    (wrong_split(sum_h=True), "z of rank 0 is wrong"),
    (wrong_split(sum_weights=True), "dw1 of rank 0 is wrong"),
    (gathers_first, "sums of [84, 35, 42] elements; one there of 35"),
    (three_results, "ValueError: not enough values"),
    (one_rank_sums_more, "deadlock: rank 0 waits in"),
    (0, "a function, split_layers("),
]


@pytest.mark.parametrize("answer, says", WRONG_SPLITS, ids=[says for _, says in WRONG_SPLITS])
def test_split_rejects(answer: Any, says: str) -> None:
    rejected("split_layers", answer, says)
