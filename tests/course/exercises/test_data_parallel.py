"""Every check accepts right answers and rejects wrong ones, with a sentence that names the fault."""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

import cloudpickle
import pytest
import torch
from torch import Tensor

import bpkit as bp
from bpkit.course.exercises.ring import ring

pytestmark = pytest.mark.slow

# As functions of a cell travel: by value, so that no worker imports this module.
cloudpickle.register_pickle_by_value(sys.modules[__name__])

# -- predict -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("answer", [[14, 13, 13], (14.0, 13.0, 13.0), torch.tensor([14, 13, 13])], ids=type)
def test_ring_sends_accepts(answer: Any) -> None:
    assert bp.exercises.check("ring_sends", answer).passed


@pytest.mark.parametrize(
    "answer, says",
    [
        ([13, 13, 14], "not their ranks"),
        ([56, 52, 52], "bytes"),
        ([40 / 3] * 3, "whole elements"),
        ([20, 20, 20], "whole vectors"),
        ([14, 13, 12], "rank 2 does not send 12"),
        ([14, 13], "list of 3"),
        (14, "list of 3"),
        (None, "list of 3"),
        ("fourteen", "list of 3"),
    ],
)
def test_ring_sends_rejects(answer: Any, says: str) -> None:
    verdict = bp.exercises.check("ring_sends", answer)
    assert not verdict.passed and says in verdict.sentence


# -- unequal shards ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("answer, says", [(20, ""), (20.0, ""), (0.05, "one of the first"), (1, "whole batch"),
                                          (4, "what weight"), (None, "how many times"), ("x", "how many times")])
def test_sample_weight(answer: Any, says: str) -> None:
    verdict = bp.exercises.check("sample_weight", answer)
    assert verdict.passed == (not says) and says in verdict.sentence


def weighted(means: list[Tensor], sizes: list[int]) -> Tensor:
    return sum((m * size for m, size in zip(means, sizes, strict=True) if size), torch.zeros(5)) / sum(sizes)


@pytest.mark.parametrize(
    "answer, says",
    [
        (weighted, ""),
        (lambda means, sizes: sum(means) / len(means), "(6, 4, 2)"),
        (lambda means, sizes: sum(means), "3 times as long"),
        (lambda means, sizes: sum(m * s for m, s in zip(means, sizes, strict=True)) / sum(sizes), "finite"),
        (lambda means, sizes: sum(m * s for m, s in zip(means, sizes, strict=True) if s), "12 times as long"),
        (lambda means: means, "raises TypeError"),
        (None, "is a function"),
    ],
)
def test_merge_means(answer: Any, says: str) -> None:
    verdict = bp.exercises.check("merge_means", answer)
    assert verdict.passed == (not says) and says in verdict.sentence


# -- the ring ----------------------------------------------------------------------------------------------


def chunks(tensor: Tensor, n: int) -> list[Tensor]:
    return [tensor[i * len(tensor) // n : (i + 1) * len(tensor) // n] for i in range(n)]


def round_trip(comm: Any, tensor: Tensor, send: Callable[[int, int], int], add: Callable[[int, int], int],
               pass_on: Callable[[int, int], int], take: Callable[[int, int], int], by: int = 1) -> None:  # fmt: skip
    """A ring whose chunk numbers are functions of rank and step."""
    n, rank = comm.size, comm.rank
    parts, to, source = chunks(tensor, n), (rank + by) % n, (rank - by) % n
    for step in range(n - 1):
        comm.send(parts[send(rank, step) % n], to)
        parts[add(rank, step) % n].add_(comm.recv(None, source))
    for step in range(n - 1):
        comm.send(parts[pass_on(rank, step) % n], to)
        comm.recv(parts[take(rank, step) % n], source)


def to_the_right(comm: Any, x: Tensor) -> None:
    round_trip(comm, x, lambda r, s: r - s, lambda r, s: r - 1 - s, lambda r, s: r + 1 - s, lambda r, s: r - s)


def to_the_left(comm: Any, x: Tensor) -> None:
    round_trip(
        comm, x, lambda r, s: r + 1 + s, lambda r, s: r + 2 + s, lambda r, s: r + s, lambda r, s: r + 1 + s, by=-1
    )


def unchunked(comm: Any, x: Tensor) -> None:
    passed = x.clone()
    for _ in range(comm.size - 1):
        comm.send(passed, (comm.rank + 1) % comm.size)
        passed = comm.recv(None, (comm.rank - 1) % comm.size)
        x += passed


def off_by_one(comm: Any, x: Tensor) -> None:
    round_trip(comm, x, lambda r, s: r - s, lambda r, s: r - s, lambda r, s: r + 1 - s, lambda r, s: r - s)


def wrong_chunk(comm: Any, x: Tensor) -> None:
    """The second phase passes on a chunk that is not finished; sender and receiver agree, so nothing raises."""
    round_trip(comm, x, lambda r, s: r - s, lambda r, s: r - 1 - s, lambda r, s: r - s, lambda r, s: r - 1 - s)


def without_all_gather(comm: Any, x: Tensor) -> None:
    n, rank = comm.size, comm.rank
    parts = chunks(x, n)
    for step in range(n - 1):
        comm.send(parts[(rank - step) % n], (rank + 1) % n)
        parts[(rank - 1 - step) % n].add_(comm.recv(None, (rank - 1) % n))


def one_step_short(comm: Any, x: Tensor) -> None:
    n, rank = comm.size, comm.rank
    parts = chunks(x, n)
    for step in range(n - 2):
        comm.send(parts[(rank - step) % n], (rank + 1) % n)
        parts[(rank - 1 - step) % n].add_(comm.recv(None, (rank - 1) % n))


def divides(comm: Any, x: Tensor) -> None:
    ring(comm, x)
    x /= comm.size


def adds_twice(comm: Any, x: Tensor) -> None:
    round_trip(comm, x, lambda r, s: r - s, lambda r, s: r - 1 - s, lambda r, s: r + 1 - s, lambda r, s: r - s)
    if comm.rank == 0 and comm.size > 1:
        x[:1] += 1.0


def receives_first(comm: Any, x: Tensor) -> None:
    if comm.size > 1:
        got = comm.recv(None, (comm.rank - 1) % comm.size)
        comm.send(x, (comm.rank + 1) % comm.size)
        x += got


def never_ends(comm: Any, x: Tensor) -> None:
    while comm.rank == 1:
        pass


def raises(comm: Any, x: Tensor) -> None:
    if comm.rank == 1:
        raise IndexError("list index out of range")


def dies(comm: Any, x: Tensor) -> None:
    if comm.rank == 2:
        os._exit(3)


def returns_it(comm: Any, x: Tensor) -> Tensor:
    y = x.clone()
    ring(comm, y)
    return y


def uses_all_reduce(comm: Any, x: Tensor) -> None:
    comm.all_reduce(x)


def sends_too_often(comm: Any, x: Tensor) -> None:
    ring(comm, x)
    if comm.size > 1:
        comm.send(x[:1], (comm.rank + 1) % comm.size)


def everyone_to_everyone(comm: Any, x: Tensor) -> None:
    n, rank = comm.size, comm.rank
    parts = chunks(x, n)
    others = [peer for peer in range(n) if peer != rank]
    for peer in others:
        comm.send(parts[peer], peer)
    for peer in others:
        parts[rank].add_(comm.recv(None, peer))
    for peer in others:
        comm.send(parts[rank], peer)
    for peer in others:
        comm.recv(parts[peer], peer)


def does_nothing(comm: Any, x: Tensor) -> None:
    return None


@pytest.mark.parametrize("answer", [ring, to_the_right, to_the_left])
def test_ring_accepts(answer: Callable[..., Any]) -> None:
    verdict = bp.exercises.check("ring_all_reduce", answer)
    assert verdict.passed, verdict


WRONG_RINGS = [
    (unchunked, "too many bytes: rank 0 sends 80, a ring of chunks at most 56"),
    (off_by_one, "same chunk in the same step"),
    (wrong_chunk, "rank 0, chunk 0 of 3 (elements 0 to 2) is wrong: it lacks what rank"),
    (without_all_gather, "all-gather"),
    (one_step_short, "lacks what rank"),
    (divides, "1/3 of the sum"),
    (adds_twice, "rank 0, chunk 0 of 3"),
    (receives_first, "deadlock: rank 0 waits in recv for rank 2 (its operation 1)"),
    (never_ends, "rank 1 computes without end"),
    (raises, "rank 1 raises IndexError: list index out of range"),
    (dies, "the process of rank 2 ended"),
    (returns_it, "tensor itself is not changed"),
    (uses_all_reduce, "not all_reduce"),
    (sends_too_often, "never received: rank 0 sent 5 messages to rank 1"),
    (everyone_to_everyone, "sends to ranks [1, 2]"),
    (does_nothing, "lacks what ranks 1 and 2 gave"),
    (42, "a function, ring_all_reduce(comm, tensor)"),
    (None, "None"),
    (lambda: None, "TypeError"),
]


@pytest.mark.parametrize("answer, says", WRONG_RINGS, ids=lambda value: getattr(value, "__name__", None))
def test_ring_rejects(answer: Any, says: str) -> None:
    start = time.monotonic()
    verdict = bp.exercises.check("ring_all_reduce", answer)
    assert time.monotonic() - start < 10
    assert not verdict.passed and says in verdict.sentence, verdict
    assert "\n" not in repr(verdict)


def test_the_ring_to_the_left_has_a_direction() -> None:
    assert bp.exercises.check("ring_to_the_left", to_the_left).passed
    verdict = bp.exercises.check("ring_to_the_left", to_the_right)
    assert not verdict.passed and "this ring goes to the left" in verdict.sentence


# -- find the bug ------------------------------------------------------------------------------------------


def backward(net: bp.nn.Network, x: Tensor, t: Tensor) -> Tensor:
    _, dy = net.loss.value_and_gradient(net.forward(x), t)
    net.backward(dy)
    return net.flat_gradients


def samples(comm: Any, t: Tensor) -> Tensor:
    return comm.all_reduce(torch.tensor([float(len(t))], dtype=torch.float64))


def right_step(comm: Any, net: bp.nn.Network, x: Tensor, t: Tensor, lr: float) -> None:
    total = samples(comm, t)
    net.flat_parameters -= lr / total * comm.all_reduce(backward(net, x, t))


def weighted_parameters(comm: Any, net: bp.nn.Network, x: Tensor, t: Tensor, lr: float) -> None:
    """Averaging parameters is right too, if each rank steps by n times its share."""
    net.flat_parameters -= comm.size * lr / samples(comm, t) * backward(net, x, t)
    comm.all_reduce(net.flat_parameters).div_(comm.size)


def averages_parameters(comm: Any, net: bp.nn.Network, x: Tensor, t: Tensor, lr: float) -> None:
    net.flat_parameters -= lr / samples(comm, t) * backward(net, x, t)
    comm.all_reduce(net.flat_parameters).div_(comm.size)


def divides_twice(comm: Any, net: bp.nn.Network, x: Tensor, t: Tensor, lr: float) -> None:
    net.flat_parameters -= lr / samples(comm, t) / comm.size * comm.all_reduce(backward(net, x, t))


def mean_of_means(comm: Any, net: bp.nn.Network, x: Tensor, t: Tensor, lr: float) -> None:
    gradient = backward(net, x, t).div_(max(len(t), 1))
    net.flat_parameters -= lr / comm.size * comm.all_reduce(gradient)


def sum_of_means(comm: Any, net: bp.nn.Network, x: Tensor, t: Tensor, lr: float) -> None:
    net.flat_parameters -= lr * comm.all_reduce(backward(net, x, t).div_(max(len(t), 1)))


def never_divides(comm: Any, net: bp.nn.Network, x: Tensor, t: Tensor, lr: float) -> None:
    net.flat_parameters -= lr * comm.all_reduce(backward(net, x, t))


def never_merges(comm: Any, net: bp.nn.Network, x: Tensor, t: Tensor, lr: float) -> None:
    net.flat_parameters -= lr / samples(comm, t) * backward(net, x, t)


def empty_shard_divides(comm: Any, net: bp.nn.Network, x: Tensor, t: Tensor, lr: float) -> None:
    gradient = backward(net, x, t) / torch.tensor(len(t)) * len(t)
    net.flat_parameters -= lr / samples(comm, t) * comm.all_reduce(gradient)


def accumulates(comm: Any, net: bp.nn.Network, x: Tensor, t: Tensor, lr: float) -> None:
    _, dy = net.loss.value_and_gradient(net.forward(x), t)
    net.backward(dy, accumulate=True)
    net.flat_parameters -= lr / samples(comm, t) * comm.all_reduce(net.flat_gradients)


def climbs(comm: Any, net: bp.nn.Network, x: Tensor, t: Tensor, lr: float) -> None:
    net.flat_parameters += lr / samples(comm, t) * comm.all_reduce(backward(net, x, t))


def one_rank_skips(comm: Any, net: bp.nn.Network, x: Tensor, t: Tensor, lr: float) -> None:
    if comm.rank:
        right_step(comm, net, x, t, lr)


@pytest.mark.parametrize("answer", [right_step, weighted_parameters])
def test_train_step_accepts(answer: Callable[..., Any]) -> None:
    verdict = bp.exercises.check("train_step", answer)
    assert verdict.passed, verdict


WRONG_STEPS = [
    (averages_parameters, "3 times too small"),
    (divides_twice, "3 times too small"),
    (mean_of_means, "shards of 6, 4, 2: equal shards give the serial weights"),
    (sum_of_means, "3 times too large"),
    (never_divides, "12 times too large"),
    (never_merges, "rank 1 ends with other weights than rank 0"),
    (empty_shard_divides, "not numbers"),
    (accumulates, "3 do not: something of one step is left over"),
    (climbs, "turned round"),
    (does_nothing, "TypeError"),
    (lambda *args: None, "do not change"),
    (one_rank_skips, "deadlock: rank 1 waits in"),
    ([1, 2], "a function, train_step("),
]


@pytest.mark.parametrize("answer, says", WRONG_STEPS, ids=lambda value: getattr(value, "__name__", None))
def test_train_step_rejects(answer: Any, says: str) -> None:
    start = time.monotonic()
    verdict = bp.exercises.check("train_step", answer)
    assert time.monotonic() - start < 10
    assert not verdict.passed and says in verdict.sentence, verdict


# -- check itself ------------------------------------------------------------------------------------------


def test_an_unknown_exercise_names_the_known_ones() -> None:
    with pytest.raises(ValueError, match="no exercise 'ring': choose one of 'ring_sends'"):
        bp.exercises.check("ring", 1)


def test_an_answer_that_cannot_be_sent_is_a_sentence() -> None:
    lock = threading.Lock()
    verdict = bp.exercises.check("ring_all_reduce", lambda comm, tensor: lock.acquire())
    assert not verdict.passed and "cannot be sent to the workers" in verdict.sentence
