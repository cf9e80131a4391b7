"""Nobody reads what was received after giving it back: workers that make it NaN at that moment compute the same.

And whoever receives ahead finds as much lent as its own row holds.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch

import bpkit as bp
from bpkit.nn import GELU, Flatten, Linear, Network, ReLU, Reshape
from bpkit.plan import Plan, tensor_parallel
from bpkit.run.transports.comm import Comm
from tests.plan.test_pipeline import SCHEDULES

from .oracle import gradient_sum, worst

pytestmark = pytest.mark.slow

EXACT = 1e-12
TEXT = bp.data.text(length=8)
GPT = bp.nn.gpt(TEXT.vocabulary, 8, width=16, heads=4, layers=2, dtype=torch.float64)  # no dropout: it writes anew
# The second and the fourth layer hand on what they are given, in another shape.
SHAPES = Network([Linear(6, 8), Reshape((2, 4)), Linear(4, 4), Flatten(), ReLU(), Linear(8, 8), GELU(), Linear(8, 8),
                  Linear(8, 4)], 6, seed=3,
                 dtype=torch.float64)  # fmt: skip


def spoil_what_is_given_back(comm: Comm) -> None:
    """In this process, from now on: memory of a message is NaN once its reader has given it back."""
    from bpkit.run.transports import distributed as gloo
    from bpkit.run.transports.shared.protocols import Loans

    for edges in (Loans, gloo._Copies):
        edges.receive = _spoiling(edges.receive)  # type: ignore[attr-defined, method-assign]


def _spoiling(receive: Any) -> Any:
    def receive_and_spoil(self: Any, shape: Any, dtype: Any, source: int, take: Any) -> Any:
        given: list[torch.Tensor] = []

        def taking(tensor: torch.Tensor) -> None:
            given.append(tensor)
            take(tensor)

        message = receive(self, shape, dtype, source, taking)
        release = message.release

        def spoil() -> None:
            given[0].fill_(math.nan)
            release()

        message.release = spoil
        return message

    return receive_and_spoil


@pytest.fixture(scope="module", params=["shm", "gloo"])
def spoiling(request: pytest.FixtureRequest) -> Iterator[dict[int, bp.Cluster]]:
    made = {n: bp.Cluster(n, backend=request.param, timeout=20) for n in (2, 3, 4)}
    for cluster in made.values():
        cluster.call(spoil_what_is_given_back)
    yield made
    for cluster in made.values():
        cluster.close()


def assert_exact(cluster: bp.Cluster, network: Network, inputs: torch.Tensor, targets: torch.Tensor,
                 plan: Plan) -> None:  # fmt: skip
    found = cluster.gradients(network, inputs, targets, plan, step=3)
    wanted = gradient_sum(network, inputs, targets, step=3) / network.loss.terms(targets)
    assert worst(network, found, wanted) <= EXACT, plan.name


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("workers", [2, 3])
@pytest.mark.parametrize("recompute", [False, True])
def test_a_stage_that_only_changes_shapes(spoiling, name, workers, recompute):
    generator = torch.Generator().manual_seed(7)
    inputs = torch.randn(12, 6, generator=generator, dtype=torch.float64)
    targets = torch.randint(0, 4, (12,), generator=generator)
    plan = SCHEDULES[name](workers, 4, recompute=recompute)
    assert_exact(spoiling[workers], SHAPES, inputs, targets, plan)


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("sequence", [False, True])
@pytest.mark.parametrize("recompute", [False, True])
def test_a_stage_that_is_the_end_of_a_skip(spoiling, name, sequence, recompute):
    plan = SCHEDULES[name](2, 4, recompute=recompute)
    split = tensor_parallel(plan, 2, bp.nn.tensor_layout(GPT, sequence=sequence))
    assert_exact(spoiling[4], GPT, *TEXT.batch(0, 8), split)


@pytest.mark.parametrize(("one", "other"), [*itertools.permutations(["gpipe", "1f1b", "h1"], 2)])
def test_data_replicas_that_receive_ahead_differently(spoiling, one, other):
    """Rows of their own, of two schedules: GPipe holds all microbatches, 1F1B as many as there are ranks behind."""
    plans = [SCHEDULES[name](2, 4, data=2) for name in (one, other)]
    rows = [plan.rows[pipeline] for pipeline in range(2) for plan in plans]
    plan = replace(plans[0], name=f"{one} beside {other}", expanded=True, rows=tuple(rows))
    slots = bp.plan.compile(plan, SHAPES).loans
    assert len({tuple(sorted(row.items())) for row in slots}) > 2
    generator = torch.Generator().manual_seed(7)
    inputs = torch.randn(16, 6, generator=generator, dtype=torch.float64)
    targets = torch.randint(0, 4, (16,), generator=generator)
    assert_exact(spoiling[4], SHAPES, inputs, targets, plan)
