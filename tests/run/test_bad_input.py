"""Bad input of Cluster.train and Cluster.gradients: refused with its reason before anything starts."""

from __future__ import annotations

import pytest
import torch

import bpkit as bp
from bpkit.data import Dataset
from bpkit.plan import Plan
from bpkit.run import memory
from tests.plan.hand_written import TENSOR


@pytest.fixture
def cluster():
    with bp.Cluster(2, backend="shm") as made:
        yield made
        assert made.pids == ()  # nothing was started


NET = bp.nn.mlp([64, 16, 10])
DATA = bp.data.digits()


def small(samples: int) -> Dataset:
    return Dataset("tiny", DATA.inputs[:samples], DATA.targets[:samples], DATA.test_inputs, DATA.test_targets)


def few_labels(value: int) -> Dataset:
    targets = DATA.targets.clone()
    targets[5] = value
    return Dataset("labels", DATA.inputs, targets, DATA.test_inputs, DATA.test_targets)


CASES = {
    "an empty batch": (dict(batch=0), "at least one sample, not 0"),
    "a batch larger than the data": (dict(batch=5000), "larger than digits, which has 1437"),
    "a data set smaller than the workers": (dict(data=small(1), batch=1), "1 training samples for 2 workers"),
    "no steps": (dict(steps=0), "at least one step"),
    "neither rate nor optimizer": (dict(lr=None), "either lr="),
    "both rate and optimizer": (dict(optimizer=bp.optim.SGD(0.1)), "either lr="),
    "a plan for another cluster": (dict(plan=bp.plan.data_parallel(3)), "plan for 3 workers .* has 2"),
    "more buckets than layers": (dict(plan=bp.plan.data_parallel(2, buckets=9)), "9 stages, but the network has only"),
    "shapes that do not fit": (dict(network=bp.nn.mlp([60, 10])), r"\(64,\) do not fit the network"),
    "another dtype": (dict(network=bp.nn.mlp([64, 10], dtype=torch.float64)), "load the data with the same dtype"),
    "a label out of range": (dict(data=few_labels(10)), "10"),
    "shards that do not fit": (dict(shards=[1, 2, 3]), "2 sizes or weights, not 3"),
    "a negative shard": (dict(shards=[-1, 2]), "not negative"),
    "a target without evaluations": (dict(target=0.9), "evaluate_every"),
}  # fmt: skip


@pytest.mark.parametrize(("change", "why"), CASES.values(), ids=CASES.keys())
def test_train_refuses(cluster, change, why):
    arguments = dict(network=NET, data=DATA, plan=None, batch=32, steps=2, lr=0.1) | change
    network, data, plan = (arguments.pop(key) for key in ("network", "data", "plan"))
    with pytest.raises((ValueError, TypeError), match=why):
        cluster.train(network, data, plan, **arguments)


def test_gradients_refuses(cluster):
    with pytest.raises(ValueError, match="an empty batch has no gradient"):
        cluster.gradients(NET, DATA.inputs[:0], DATA.targets[:0])
    with pytest.raises(ValueError, match="4 inputs but 3 targets"):
        cluster.gradients(NET, DATA.inputs[:4], DATA.targets[:3])


def test_a_wrong_plan_never_starts(cluster):
    plan = bp.plan.data_parallel(2)
    wrong = plan.with_rows([[a for a in plan.rows[0] if a.kind != "REDUCE_GRAD"]])
    with pytest.raises(bp.plan.PlanError, match="lacks shard 1"):
        cluster.train(NET, DATA, wrong, batch=32, steps=2, lr=0.1)


def test_a_small_shared_memory_is_named(cluster, monkeypatch):
    monkeypatch.setattr(memory, "free_room", lambda: 1000)
    with pytest.raises(RuntimeError, match=r"the gradient of 2 workers needs .* are free .*backend='gloo'"):
        cluster.train(NET, DATA, batch=32, steps=2, lr=0.1)


def test_plans_that_workers_cannot_run_yet_are_refused(cluster):
    with pytest.raises(NotImplementedError, match="tensor=2"):
        cluster.gradients(NET, DATA.inputs[:8], DATA.targets[:8], Plan.parse(TENSOR))


def test_clipping_needs_one_gradient(cluster):
    with pytest.raises(ValueError, match="no one gradient whose norm could be clipped"):
        cluster.train(NET, DATA, bp.plan.local_sgd(2, 2), batch=32, steps=2, optimizer=bp.optim.SGD(0.1, clip=1.0))
