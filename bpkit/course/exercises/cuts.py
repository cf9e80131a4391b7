"""The exercises of chapter 3.3c that count bytes and cut the text; `split_layers` stands with the pipelines."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from bpkit.course.exercises.trainer import TOLERANCE
from bpkit.course.exercises.verdict import Bench, Wrong, need_function, need_numbers


def _attend(comm: Any, way: str, tokens: int, width: int) -> int:
    """The bytes that a rank sends to attend to a text that is cut, by a ring or by all-to-all."""
    before, piece = comm.sent, torch.zeros(tokens // comm.size, width)
    peers = [peer for peer in range(comm.size) if peer != comm.rank]
    if way == "ring":  # keys and values, to the right, until all have met all
        for _ in peers:
            comm.send(torch.stack((piece, piece)), (comm.rank + 1) % comm.size)
            comm.recv(None, (comm.rank - 1) % comm.size)
    else:  # queries, keys, values, and what comes of them: a slice to each peer
        for _ in range(4):
            for peer in peers:
                comm.send(piece.chunk(comm.size, 1)[0].contiguous(), peer)
            for peer in peers:
                comm.recv(None, peer)
    return int(comm.sent - before)


def _judge_bytes(answer: Any) -> str:
    said = need_numbers(answer, 3, "the bytes that a rank sends for the sum, by ring attention and by all-to-all")
    with Bench(4) as bench:
        sent = [bench.run(_attend, way, 4096, 128, case=way)[0] for way in ("ring", "all-to-all")]
    names = "the pair's sum", "ring attention", "all-to-all"
    hints = ("a ring sends 2 (t-1)/t times what is summed, and that is the pair's outputs",
             "keys and values of a rank's own tokens, to the right, n - 1 times",
             "of q, k, v and the result each peer gets its own slice of the rank's own tokens")  # fmt: skip
    for name, one, truth, hint in zip(names, said, [2 * 3 * 8 * 16 * 4 // 4, *sent], hints, strict=True):
        if not abs(one - truth) < 0.5:
            raise Wrong(f"{name}: not {one:,.0f} bytes; {hint}")
    return f"{said[0]:,.0f} bytes for the sum, and the workers count {sent[0]:,} and {sent[1]:,}"


def _block(comm: Any, answer: Callable[..., Any], q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.as_tensor(answer(comm, *(one.chunk(comm.size)[comm.rank].clone() for one in (q, k, v))))


def _judge_blockwise(answer: Any) -> str:
    need_function(answer, "blockwise(comm, q, k, v)")
    made = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(12, 6, dtype=torch.float64, generator=made) for _ in "qkv")
    right = (q @ k.T).softmax(1) @ v
    with Bench(4) as bench:
        ends = bench.run(_block, answer, q, k, v, case="4 workers")
    for rank, (found, true) in enumerate(zip(ends, right.chunk(4), strict=True)):
        if found.shape != true.shape:
            raise Wrong(f"rank {rank} returns a shape of {tuple(found.shape)}, not {tuple(true.shape)}")
        if not (found - true).norm() <= TOLERANCE * true.norm():
            off = float((found - true).norm() / true.norm())
            raise Wrong(f"the output of rank {rank} differs from attention over all tokens by {off:.0%}: by which sum "
                        "is each value divided?")  # fmt: skip
    return "four ranks end with the attention of one, each for its own tokens"


#: The exercises by name.
EXERCISES = {"cut_bytes": _judge_bytes, "blockwise": _judge_blockwise}
