"""What chapter 4.1 uses: PyTorch on a cluster's workers, peers, a throttled link, delayed descent, pictures."""

from __future__ import annotations

import math
import os
import sys
import time
from typing import Any

import cloudpickle
import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.functional import cross_entropy

import bpkit as bp
from bpkit.course import draw_buckets, draw_curves, draw_grid, draw_ratios, draw_stacks, launch, off, peers, vector
from bpkit.course.slow_link import Throttled

cloudpickle.register_pickle_by_value(sys.modules[__name__])
DATA = bp.data.digits(torch.float64)
NETWORK = bp.nn.mlp([64, 12, 10], seed=0, dtype=torch.float64)


def who(offset: int) -> tuple[str, str, float]:
    total = torch.tensor(float(dist.get_rank() + offset))
    dist.all_reduce(total)
    return os.environ["LOCAL_RANK"], os.environ["WORLD_SIZE"], total.item()


def sent(kind: str) -> float:
    part, whole = torch.ones(50_000), torch.ones(100_000)
    dist.barrier()
    before = bp.course.socket_bytes()
    if kind == "sum":
        dist.all_reduce(whole)
    elif kind == "scatter":
        dist.reduce_scatter_tensor(part, whole)
    else:
        dist.all_gather_into_tensor(whole, part)
    dist.barrier()
    return (bp.course.socket_bytes() - before) / (4 * len(whole))


def test_launch_plays_torchrun() -> None:
    with bp.Cluster(2, device="cpu") as cluster:
        for _ in range(2):  # the group is gone after the first
            assert launch(cluster, who, 1, backend="gloo") == [("0", "2", 3.0), ("1", "2", 3.0)]
        assert launch(cluster, dist.is_initialized) == [False, False]


@pytest.mark.skipif(sys.platform != "linux", reason="TCP_INFO counts bytes on Linux only")
def test_gloo_reduces_and_scatters_by_an_all_reduce() -> None:
    with bp.Cluster(2, device="cpu") as cluster:
        lengths = [launch(cluster, sent, kind, backend="gloo")[0] for kind in ("sum", "scatter", "gather")]
    assert lengths == pytest.approx([1, 1, 0.5], abs=0.02)


def test_the_same_network_in_torch_has_the_same_gradient() -> None:
    x, t = DATA.batch(0, 9)
    model = bp.course.in_torch(NETWORK)
    cross_entropy(model(x), t).backward()
    found = vector(p.grad for p in model.parameters() if p.grad is not None)
    assert off(found, bp.course.serial_gradient(NETWORK, x, t)) < 1e-12
    assert off(torch.tensor([2.0, 0]), torch.tensor([1.0, 0])) == 1


def test_all_peers_train_alike() -> None:
    ours = {"one": bp.plan.data_parallel(2), "zero": bp.plan.zero(2, 3, units=2)}
    with bp.Cluster(2, backend="gloo") as cluster:
        runs = peers.runs(cluster, list(peers.TORCH), ours)
        losses = {name: run(NETWORK, DATA, 16, 3)[0] for name, run in runs.items()}
    assert len(losses) == 7
    for values in losses.values():
        assert values == pytest.approx(losses["one"], rel=1e-12)


def test_compare_divides_by_the_one_it_is_held_against() -> None:
    def taking(seconds: float) -> Any:
        return lambda network, data, batch, steps: ([0.0] * steps, [9.0, 9.0] + [seconds] * (steps - 2))

    (ms, ratios), = peers.compare({"a": taking(0.3), "b": taking(0.2)}, "b", [(NETWORK, DATA, 8)], repetitions=10)
    assert ms == pytest.approx(200) and list(ratios) == ["a"]
    assert ratios["a"].median == pytest.approx(1.5) and ratios["a"].resolved


class Quick:
    rank, size = 0, 4

    def all_reduce(self, tensor: Tensor) -> Tensor:
        return tensor


def test_a_throttled_link_waits_as_long_as_its_bytes_take() -> None:
    link = Throttled(Quick(), 1e6)  # type: ignore[arg-type]
    begin = time.perf_counter()
    link.all_reduce(torch.ones(10_000))
    assert time.perf_counter() - begin >= 0.06 and link.sent == 2 * 3 / 4 * 40_000
    assert link.size == 4
    free = Throttled(Quick(), math.inf)  # type: ignore[arg-type]
    begin = time.perf_counter()
    free.all_reduce(torch.ones(10_000))
    assert time.perf_counter() - begin < 0.05


@pytest.mark.parametrize("compress", [None, bp.compress.TopK(0.1), bp.compress.PowerSGD(1)])
def test_a_step_over_a_slow_link(compress: Any) -> None:
    with bp.Cluster(2) as cluster:
        _, count = bp.course.step_over(cluster, NETWORK, DATA, compress, batch=8, steps=3)
        slow, again = bp.course.step_over(cluster, NETWORK, DATA, compress, batch=8, steps=3, rate=count / 0.05)
    assert count == again > 0 and slow >= 0.05
    if compress is None:
        assert count == 8 * NETWORK.flat_size  # a ring of two sends each byte once


def by_hand(lr: float, momentum: float, staleness: int, updates: int) -> float:
    network, seen, velocity = NETWORK.copy(), [NETWORK.flat_parameters.clone()], 0.0
    for t in range(updates):
        network.flat_parameters.copy_(seen[max(0, t - staleness)])
        x, y = DATA.batch(t, 16)
        _, dy = network.loss.value_and_gradient(network.forward(x), y)
        network.backward(dy)
        velocity = momentum * velocity + network.flat_gradients / 16
        seen.append(seen[-1] - lr * velocity)
    network.flat_parameters.copy_(seen[-1])
    return float(network.accuracy(DATA.test_inputs, DATA.test_targets))


@pytest.mark.parametrize("staleness", [0, 1, 3])
def test_delayed_descent(staleness: int) -> None:
    given: dict[str, Any] = {"lr": 0.3, "momentum": 0.5, "staleness": staleness, "updates": 12}
    assert bp.course.delayed_sgd(NETWORK, DATA, batch=16, **given) == by_hand(**given)
    assert torch.equal(NETWORK.flat_parameters, bp.nn.mlp([64, 12, 10], seed=0, dtype=torch.float64).flat_parameters)


def test_pictures_say_what_they_show() -> None:
    one = bp.measure.Ratio(1.5, 1.2, 1.8)
    drawn = {
        draw_stacks({"a": {"parameters": 1.0, "other things": 2.0}}, "GB"): "parameters 1, other things 2",
        draw_buckets({"way": [[("w", 2.0), ("b", 0.5)], [("v", 1.0)]]}): "2 buckets of 2.50 MB, 1.00 MB",
        draw_grid([[[0.1, 0.9, 0.5]]], ["row"], ["column"], "shares"): "row, column: 50%",
        draw_curves({"a": [(1, 2), (10, 20)]}, "x", "y", {"a": [(1, 2), (10, 20)]}): "2 at 1, 20 at 10",
        draw_ratios([("small", {"DDP": one})], "time"): "DDP 1.50 [1.20, 1.80]",
    }
    for figure, words in drawn.items():
        assert words in bp.show.alt_text(figure) and figure.svg().startswith("<?xml")
