"""The exercises of chapters 4.1b and 4.1c accept right answers and reject wrong ones."""

from __future__ import annotations

import sys
from typing import Any

import cloudpickle
import pytest
import torch

import bpkit as bp

from .judge import rejected

# As functions of a cell travel: by value, so that no worker imports this module.
cloudpickle.register_pickle_by_value(sys.modules[__name__])


def careful(comm: Any, weights: Any, gradient: Any, lr: float) -> None:
    if comm.all_reduce((~gradient.isfinite()).any().double().reshape(1)) == 0:
        weights -= lr * gradient


def alone(comm: Any, weights: Any, gradient: Any, lr: float) -> None:
    if gradient.isfinite().all():
        weights -= lr * gradient


def never(comm: Any, weights: Any, gradient: Any, lr: float) -> None:
    pass


def always(comm: Any, weights: Any, gradient: Any, lr: float) -> None:
    weights -= lr * gradient


def test_careful_step_accepts() -> None:
    assert bp.exercises.check("careful_step", careful).passed


@pytest.mark.parametrize("answer, says", [(alone, "rank 1 makes a step that rank 0 cannot make"),
                                          (never, "all gradients finite: rank 0 must make the step"),
                                          (always, "rank 0 makes the step with"), (None, "a function")])  # fmt: skip
def test_careful_step_rejects(answer: Any, says: str) -> None:
    rejected("careful_step", answer, says)


def test_gpus_needed() -> None:
    assert bp.exercises.check("gpus_needed", [7, 4, 3]).passed  # 28 + 84/7 = 40; 14 + 98/4 = 38.5; 112/3 = 37.3
    rejected("gpus_needed", [7, 3, 3], "ZeRO 2, 3 GPUs: it does not fit")
    rejected("gpus_needed", [8, 4, 3], "ZeRO 1, 8 GPUs: fewer do")
    rejected("gpus_needed", [7, 4], "list of 3 numbers")


def test_gradient_ages() -> None:
    assert bp.exercises.check("gradient_ages", [0, 1, 2, 0, 3, 3]).passed
    rejected("gradient_ages", [0, 1, 2, 0, 2, 3], "arrival 5, worker 1: not 2")
    rejected("gradient_ages", None, "list of 6 numbers")


def largest(gradient: Any, memory: Any, k: int) -> Any:
    wanted = gradient + memory
    sent = torch.zeros_like(wanted)
    at = wanted.abs().topk(k).indices
    sent[at] = wanted[at]
    return sent, wanted - sent


def forgets(gradient: Any, memory: Any, k: int) -> Any:
    sent, _ = largest(gradient, 0 * memory, k)
    return sent, memory


def first(gradient: Any, memory: Any, k: int) -> Any:
    wanted = gradient + memory
    sent = torch.zeros_like(wanted)
    sent[:k] = wanted[:k]
    return sent, wanted - sent


def everything(gradient: Any, memory: Any, k: int) -> Any:
    return gradient + memory, 0 * memory


def test_top_k_accepts() -> None:
    assert bp.exercises.check("top_k", largest).passed


@pytest.mark.parametrize("answer, says", [(forgets, "do not add up"), (first, "not the largest"),
                                          (everything, "12 elements are sent, not 3"), (len, "raises TypeError"),
                                          (3, "a function")])  # fmt: skip
def test_top_k_rejects(answer: Any, says: str) -> None:
    rejected("top_k", answer, says)
