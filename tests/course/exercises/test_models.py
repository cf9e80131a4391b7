"""The checks of chapter 4.2 accept right answers and reject wrong ones, with a sentence that names the fault."""

from __future__ import annotations

import os
import sys
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


def accepted(name: str, answer: Any) -> None:
    verdict = bp.exercises.check(name, answer)
    assert verdict.passed, verdict


# -- predict -----------------------------------------------------------------------------------------------

EDGE, MATRIX = 16 * 32 * 64 * 4, 42 * 64 * 4


@pytest.mark.parametrize("answer", [[EDGE, MATRIX], torch.tensor([EDGE, MATRIX])], ids=type)
def test_pipeline_bytes_accept(answer: Any) -> None:
    accepted("pipeline_bytes", answer)


@pytest.mark.parametrize(
    "answer, says",
    [
        ([EDGE // 4, MATRIX // 4], "each takes 4 bytes"),
        ([4 * EDGE, MATRIX], "not 524,288 bytes for the activations"),
        ([EDGE // 4, MATRIX], "not 32,768 bytes for the activations"),
        ([EDGE, 0], "not 0 bytes for the tied matrix"),
        ([EDGE, 16 * MATRIX], "for the tied matrix"),
        ([EDGE, float("nan")], "not nan bytes for the tied matrix"),
        ([EDGE], "list of 2"),
        (None, "list of 2"),
    ],
)
def test_pipeline_bytes_reject(answer: Any, says: str) -> None:
    rejected("pipeline_bytes", answer, says)


def test_tensor_bytes_accept() -> None:
    accepted("tensor_bytes", [10, 10 * EDGE])


@pytest.mark.parametrize(
    "answer, says",
    [([8, 8 * EDGE], "not 8 sums"), ([10, 4 * EDGE], "a sum is as large as all activations"), (None, "list of 2")],
)
def test_tensor_bytes_reject(answer: Any, says: str) -> None:
    rejected("tensor_bytes", answer, says)


# -- fill in: what a rank of a pipeline keeps ---------------------------------------------------------------


def kept(p: int, m: int, r: int, blocks: int, s: int, b: int, h: int, a: int, again: bool, *, held: str = "min",
         own: bool = True, pairs: bool = True) -> float:  # fmt: skip
    block = s * b * h * 34 + (5 * a * s * s * b if pairs and not again else 0)
    return {"min": min(m, p - r), "all": m, "p": p}[held] * (blocks // p if own else blocks) * block


def test_memory_accepts() -> None:
    accepted("activation_memory", kept)


@pytest.mark.parametrize(
    "how, says",
    [
        ({"held": "all"}, "1F1B does not keep all microbatches"),
        ({"held": "p"}, "the last ranks keep fewer than the first"),
        ({"own": False}, "a rank has only its share of the blocks"),
        ({"pairs": False}, "look at what one block keeps"),
    ],
)
def test_memory_rejects(how: dict[str, Any], says: str) -> None:
    rejected("activation_memory", lambda *given: kept(*given, **how), says)


def test_memory_rejects_what_is_no_function() -> None:
    rejected("activation_memory", 34, "the answer is a function")


# -- find the bug: the order of ranks ------------------------------------------------------------------------


def test_mesh_accepts() -> None:
    accepted("mesh_order", lambda rank, d, p, t: (rank // (d * t), rank // t % d, rank % t))


@pytest.mark.parametrize(
    "answer, says",
    [
        (lambda rank, d, p, t: (rank % p, rank // p % d, rank // (p * d)), "along the tensor axis only"),
        (lambda rank, d, p, t: (rank // t % p, rank // (t * p), rank % t), "along the data axis only"),
        (lambda rank, d, p, t: (0, 0, rank % t), "not stand on all places"),
        (None, "the answer is a function"),
    ],
)
def test_mesh_rejects(answer: Any, says: str) -> None:
    rejected("mesh_order", answer, says)


# -- find the bug: a plan of two by two --------------------------------------------------------------------


def tied_plan() -> str:
    network = bp.nn.gpt(bp.data.text(8).vocabulary, 8, 16, layers=1)
    return str(bp.plan.compile(bp.plan.one_f_one_b(2, 2, data=2), network).plan)


PLAN = tied_plan()


@pytest.mark.parametrize("answer", [PLAN, bp.plan.Plan.parse(PLAN)], ids=type)
def test_hybrid_accepts(answer: Any) -> None:
    accepted("hybrid_plan", answer)


@pytest.mark.parametrize(
    "answer, says",
    [
        (PLAN.replace(" 0REDUCE_GRAD", ""), "row 0, 0UPDATE: the gradient of stage 0"),
        (PLAN.replace(" 1REDUCE_GRAD", ""), "row 1, 1UPDATE: the gradient of stage 1"),
        (PLAN.replace(" 0SUM_TIED", "").replace(" 1SUM_TIED", ""), "that stages (0, 1) share is not the sum"),
        (PLAN.replace("1SUM_TIED 1REDUCE_GRAD", "1REDUCE_GRAD 1SUM_TIED"), "that stages (0, 1) share is not the sum"),
        (PLAN.replace(" 0SUM_TIED", ""), "SUM_TIED"),
        (str(bp.plan.one_f_one_b(2, 2, data=2)), "the line 'tied 0 1'"),
        (str(bp.plan.one_f_one_b(2, 2)), "a mesh of data=2 pipeline=2"),
        (PLAN.replace("merge mean", "merge sum"), "by the mean"),
        ("a plan", "line 1 of the plan"),
        (None, "a plan, or the text of one"),
    ],
)
def test_hybrid_rejects(answer: Any, says: str) -> None:
    rejected("hybrid_plan", answer, says)


# -- find the bug: the end of a step -----------------------------------------------------------------------


def finish(comm: Any, gradient: Tensor, tied: slice, terms: int, clip: float, *, sum_tied: bool = True,
           once: bool = True, globally: bool = True, whole: bool = False, mean: bool = True) -> Tensor:  # fmt: skip
    if sum_tied:
        comm.all_reduce(gradient[tied])
    gradient = gradient / terms if mean else gradient
    square = gradient.square().sum()
    if once and comm.rank:
        square -= gradient[tied].square().sum()
    norm = float(comm.all_reduce(square).sqrt() if globally else square.sqrt())
    gradient = gradient * min(1.0, clip / norm) / (1 if mean else terms)
    return comm.all_reduce(gradient) if whole else gradient


def right_finish(comm: Any, gradient: Tensor, tied: slice, terms: int, clip: float) -> Tensor:
    return finish(comm, gradient, tied, terms, clip)


def wrong_finish(**how: bool) -> Callable[..., Tensor]:
    return lambda *given: finish(*given, **how)


def averages_the_matrix(comm: Any, gradient: Tensor, tied: slice, terms: int, clip: float) -> Tensor:
    comm.all_reduce(gradient[tied])
    gradient[tied] /= comm.size
    return finish(comm, gradient, tied, terms, clip, sum_tied=False)


def only_one_sums(comm: Any, gradient: Tensor, tied: slice, terms: int, clip: float) -> Tensor:
    if comm.rank == 0:
        comm.all_reduce(gradient[tied])
    return finish(comm, gradient, tied, terms, clip, sum_tied=False, globally=False)


def zeros(comm: Any, gradient: Tensor, *rest: Any) -> Tensor:
    return torch.zeros_like(gradient)


def dies(comm: Any, gradient: Tensor, *rest: Any) -> Tensor:
    if comm.rank:
        os._exit(3)
    return comm.all_reduce(gradient)


def test_finish_accepts() -> None:
    accepted("finish_step", right_finish)


WRONG = [
    (wrong_finish(sum_tied=False), "rank 0: in the gradient of the tied matrix, its use as embedding counts 1 "
                                   "times and its use for the scores 0 times"),
    (averages_the_matrix, "counts 0.5 times and its use for the scores 0.5 times"),
    (wrong_finish(globally=False), "there is one norm, of all ranks together"),
    (wrong_finish(once=False), "is each number in it once, the tied matrix too?"),
    (wrong_finish(mean=False), "clip 0.5: the gradient is scaled by"),
    (lambda comm, gradient, *rest: gradient * 0.5, "its use for the scores 0 times"),
    (wrong_finish(whole=True), "rank"),
    (only_one_sums, "deadlock: rank 0 waits"),
    (zeros, "rank 0 changes the gradient of what only it holds"),
    (lambda comm, gradient, *rest: gradient[:3], "a shape of (3,)"),
    (lambda *given: None, "raises"),
    (dies, "the process of rank 1 ended"),
    (None, "a function, finish_step("),
]  # fmt: skip


@pytest.mark.parametrize("answer, says", WRONG, ids=[says for _, says in WRONG])
def test_finish_rejects(answer: Any, says: str) -> None:
    rejected("finish_step", answer, says)
