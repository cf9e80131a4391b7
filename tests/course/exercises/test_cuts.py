"""The checks of chapter 3.3c accept right answers and reject wrong ones, with a sentence that names the fault."""

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

TEXT = 4096 * 128 * 4
RIGHT = [2 * 3 / 4 * 8 * 16 * 4, 2 * 3 / 4 * TEXT, 4 * 3 / 4 * TEXT / 4]


def test_bytes_accept() -> None:
    assert (verdict := bp.exercises.check("cut_bytes", RIGHT)).passed, verdict


@pytest.mark.parametrize(
    "answer, says",
    [
        ([2 * 3 / 4 * 8 * 64 * 4, *RIGHT[1:]], "the pair's sum: not 3,072 bytes"),
        ([RIGHT[0], 3 * 3 / 4 * TEXT, RIGHT[2]], "ring attention: not"),
        ([*RIGHT[:2], 4 * 3 / 4 * TEXT], "all-to-all: not"),
        (RIGHT[:2], "list of 3"),
        (None, "list of 3"),
    ],
)
def test_bytes_reject(answer: Any, says: str) -> None:
    rejected("cut_bytes", answer, says)


def attend(comm: Any, q: Any, k: Any, v: Any, rounds: int, divide: bool = True) -> Any:
    total, weights = 0, 0
    for turn in range(rounds):
        w = (q @ k.T).exp()
        total, weights = total + w @ v, weights + w.sum(1, keepdim=True)
        if turn < rounds - 1:
            comm.send(torch.stack((k, v)), (comm.rank + 1) % comm.size)
            k, v = comm.recv(None, (comm.rank - 1) % comm.size)
    return total / weights if divide else total


def whole(comm: Any, q: Any, k: Any, v: Any) -> Any:
    return attend(comm, q, k, v, comm.size)


def own_block_only(comm: Any, q: Any, k: Any, v: Any) -> Any:
    return attend(comm, q, k, v, 1)


def never_divided(comm: Any, q: Any, k: Any, v: Any) -> Any:
    return attend(comm, q, k, v, comm.size, False)


def mean_of_blocks(comm: Any, q: Any, k: Any, v: Any) -> Any:
    out = 0
    for turn in range(comm.size):
        out = out + (q @ k.T).softmax(1) @ v / comm.size
        if turn < comm.size - 1:
            comm.send(torch.stack((k, v)), (comm.rank + 1) % comm.size)
            k, v = comm.recv(None, (comm.rank - 1) % comm.size)
    return out


def a_row(comm: Any, q: Any, k: Any, v: Any) -> Any:
    return whole(comm, q, k, v)[0]


def test_blockwise_accepts() -> None:
    assert bp.exercises.check("blockwise", whole).passed


@pytest.mark.parametrize(
    "answer, says",
    [
        (own_block_only, "the output of rank 0 differs"),
        (never_divided, "by which sum is each value divided"),
        (mean_of_blocks, "the output of rank 0 differs"),
        (a_row, "rank 0 returns a shape of (6,), not (3, 6)"),
        (None, "a function, blockwise("),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_blockwise_rejects(answer: Any, says: str) -> None:
    rejected("blockwise", answer, says)
