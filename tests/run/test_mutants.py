"""The checker against random mutants: what it accepts is right when it is run, so nothing wrong is missed.

Mutants insert any kind with any stage, microbatch, part and peer; drop, double, move, alter, swap, also between rows;
and come in pairs.  ``python tools/mutants.py`` makes many more of them.
"""

from __future__ import annotations

import random

import pytest

import bpkit as bp
from bpkit.plan import compile, data_parallel, serial, tensor_parallel

from .mutants import GPT, NEAR, Judge, originals

pytestmark = pytest.mark.slow

MUTANTS = 24  # a plan and transport
CORRECT = 48  # a transport


@pytest.fixture(scope="module", params=["shm", "gloo"])
def judge(request):
    made = Judge(request.param)
    yield made
    made.close()


@pytest.mark.parametrize("plan", originals(), ids=lambda plan: plan.name)
def test_what_the_checker_accepts_is_right(judge, plan):
    judge.counts.clear()
    judge.of_mutants(plan, random.Random(f"{plan.digest} {judge.backend}"), MUTANTS)
    assert judge.missed == []
    assert judge.counts["refused"] > MUTANTS // 4


def test_random_correct_plans_are_accepted_and_equal_serial(judge):
    judge.of_correct(random.Random(judge.backend), CORRECT)
    assert judge.missed == []


@pytest.mark.parametrize("sequence", [False, True])
def test_a_rank_without_a_sample_joins_the_collectives_of_the_tensor_axis(judge, sequence):
    plan = tensor_parallel(data_parallel(2, microbatches=4), 2, bp.nn.tensor_layout(GPT, sequence))  # 3 samples a rank
    found, alone = (judge.weights(compile(p, GPT).plan, True) for p in (plan, serial()))
    assert float((found - alone).abs().max()) <= NEAR
