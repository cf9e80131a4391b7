"""The checks of chapter 3.3b accept right answers and reject wrong ones, with a sentence that names the fault."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import cloudpickle
import pytest
import torch

import bpkit as bp

from .judge import rejected

# As functions of a cell travel: by value, so that no worker imports this module.
cloudpickle.register_pickle_by_value(sys.modules[__name__])


def named(value: Any) -> str | None:
    return getattr(value, "__name__", None)


def test_costs_accept() -> None:
    assert bp.exercises.check("zero_bubble_costs", [24, 20, 18, 12]).passed


@pytest.mark.parametrize(
    "answer, says",
    [
        ([18, 20, 18, 12], "1F1B: not 18; a rank works 18 units"),
        ([24, 22, 18, 12], "ZB-H1: not 22"),
        ([24, 20, 20, 12], "ZB-H2: not 20"),
        ([24, 20, 18, 8], "1F1B with two microbatches: not 8; a rank works 6 units"),
        ([24, 20, 18], "list of 4"),
        (None, "list of 4"),
    ],
)
def test_costs_reject(answer: Any, says: str) -> None:
    rejected("zero_bubble_costs", answer, says)


def halves(rank: int, ranks: int, microbatches: int, warm: int, late: int) -> list[str]:
    warm = min(warm, microbatches)
    row = [f"F{k}" for k in range(warm)]
    for k in range(microbatches):
        row += [f"I{k}"] + [f"W{k - late}"] * (k >= late) + [f"F{k + warm}"] * (k + warm < microbatches)
    return row + [f"W{k}" for k in range(max(0, microbatches - late), microbatches)]


def h1(rank: int, ranks: int, microbatches: int) -> list[str]:
    return halves(rank, ranks, microbatches, ranks - rank, rank)


def h2(rank: int, ranks: int, microbatches: int) -> list[str]:
    return halves(rank, ranks, microbatches, 2 * (ranks - rank) - 1, 2 * rank)


def nothing_moved(rank: int, ranks: int, microbatches: int) -> list[str]:
    warm = min(ranks - rank - 1, microbatches)
    row = [f"F{k}" for k in range(warm)]
    for k in range(microbatches):
        row += [f"F{k + warm}"] * (k + warm < microbatches) + [f"I{k}", f"W{k}"]
    return row


def weights_first(rank: int, ranks: int, microbatches: int) -> list[str]:
    return [f"{kind}{k}" for k in range(microbatches) for kind in "FWI"]


def without_w(rank: int, ranks: int, microbatches: int) -> list[str]:
    return [cell for cell in h1(rank, ranks, microbatches) if cell[0] != "W"]


def upside_down(rank: int, ranks: int, microbatches: int) -> list[str]:
    return h1(rank, ranks, microbatches) if rank else [f"{kind}{k}" for kind in "IFW" for k in range(microbatches)]


def test_halves_accept() -> None:
    assert bp.exercises.check("my_halves", h1).passed


@pytest.mark.parametrize(
    "answer, says",
    [
        (nothing_moved, "a step takes"),
        (h2, "keeps"),
        (weights_first, "a half stands before what it needs"),
        (without_w, "rank 0 has W0 0 times"),
        (upside_down, "4 ranks, 8 microbatches: "),
        (lambda *given: None, "TypeError"),
        ("F0 I0 W0", "a function, my_halves(rank, ranks, microbatches)"),
    ],
    ids=named,
)
def test_halves_reject(answer: Any, says: str) -> None:
    rejected("my_halves", answer, says)


def keeps_the_old(comm: Any, weights: Any, gradient: Any, lr: float, clip: float) -> Any:
    square = gradient.square().sum().view(1)
    norm = float(comm.all_reduce(square).sqrt())
    if norm <= clip:
        return weights - lr * gradient
    return weights - lr * (clip / norm) * gradient if norm < float("inf") else weights


def subtracts_again(comm: Any, weights: Any, gradient: Any, lr: float, clip: float) -> Any:
    square = gradient.square().sum().view(1)
    weights = weights - lr * gradient
    norm = float(comm.all_reduce(square).sqrt())
    if norm > clip:
        weights = weights + lr * gradient
        weights = weights - lr * (clip / norm) * gradient
    return weights


def own_norm(comm: Any, weights: Any, gradient: Any, lr: float, clip: float) -> Any:
    norm = float(gradient.norm())
    return weights - lr * min(1.0, clip / norm) * gradient


def never_clips(comm: Any, weights: Any, gradient: Any, lr: float, clip: float) -> Any:
    return weights - lr * gradient


def skips_only_itself(comm: Any, weights: Any, gradient: Any, lr: float, clip: float) -> Any:
    finite = bool(torch.isfinite(gradient).all())
    square = torch.nan_to_num(gradient, 0, 0, 0).square().sum().view(1)
    norm = float(comm.all_reduce(square).sqrt())
    return weights - lr * min(1.0, clip / norm) * gradient if finite else weights


def test_updates_accept() -> None:
    assert bp.exercises.check("eager_update", keeps_the_old).passed


@pytest.mark.parametrize(
    "answer, says",
    [
        (subtracts_again, "an infinite element on rank 2: the weight vector of rank 2 is not finite"),
        (own_norm, "a long gradient: the weight vector of rank 0 is not what a run"),
        (never_clips, "a long gradient"),
        (skips_only_itself, "an infinite element on rank 2: the weight vector of rank 0 is not what a run"),
        (None, "a function, eager_update("),
    ],
    ids=named,
)
def test_updates_reject(answer: Callable[..., Any] | None, says: str) -> None:
    rejected("eager_update", answer, says)
