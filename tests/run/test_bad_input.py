"""Bad input of Cluster.train and Cluster.gradients: refused with its reason before anything starts."""

from __future__ import annotations

import pytest
import torch

import bpkit as bp
from bpkit.data import Dataset
from bpkit.plan import Action, Plan
from bpkit.plan.strategies.pipeline import gpipe, interleaved
from bpkit.run.transports.shared import files as memory
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


def test_plans_that_do_not_fit_the_network_are_refused(cluster):
    gpt = bp.nn.gpt(20, 8, width=12, heads=3, layers=1)
    layout = bp.nn.tensor_layout(gpt)
    tokens = torch.zeros(4, 8, dtype=torch.int64)
    with pytest.raises(ValueError, match="3 heads cannot be divided among 2 tensor ranks"):
        cluster.gradients(gpt, tokens, tokens, bp.plan.tensor_parallel(bp.plan.serial(), 2, layout))
    odd = bp.nn.gpt(20, 7, width=12, heads=4, layers=1)
    by_tokens = bp.plan.tensor_parallel(bp.plan.serial(), 2, bp.nn.tensor_layout(odd, sequence=True))
    with pytest.raises(ValueError, match="as many tokens, which samples of 7 tokens do not allow"):
        cluster.gradients(odd, tokens[:, :7], tokens[:, :7], by_tokens)
    for plan in (Plan.parse(TENSOR), bp.plan.tensor_parallel(bp.plan.serial(), 2, layout)):
        with pytest.raises(ValueError, match="splits another network than this one"):
            cluster.gradients(bp.nn.mlp([64, 20, 20, 16, 16, 16, 10]), DATA.inputs[:8], DATA.targets[:8], plan)
    with pytest.raises(ValueError, match="10 stages, but the network has only 5 layers"):
        cluster.train(bp.nn.mlp([64, 20, 20, 10]), DATA, interleaved(2, 2, chunks=5), batch=32, steps=1, lr=0.1)
    with pytest.raises(ValueError, match="9 microbatches of a batch of 8 samples"):
        cluster.gradients(NET, DATA.inputs[:8], DATA.targets[:8], gpipe(2, 9))
    with pytest.raises(ValueError, match="is a plan for 4 workers"):
        cluster.gradients(NET, DATA.inputs[:8], DATA.targets[:8], gpipe(2, 2, data=2))
    with pytest.raises(bp.plan.PlanError, match="deadlock"):
        rows = [[*row] for row in gpipe(2, 2).rows]
        rows[0].insert(1, rows[0].pop(rows[0].index(Action(0, "RECV_B", 0))))
        rows[0].insert(2, rows[0].pop(rows[0].index(Action(0, "B", 0))))
        cluster.gradients(NET, DATA.inputs[:8], DATA.targets[:8], gpipe(2, 2).with_rows(rows))


def test_clipping_needs_one_gradient(cluster):
    with pytest.raises(ValueError, match="no one gradient whose norm could be clipped"):
        cluster.train(NET, DATA, bp.plan.local_sgd(2, 2), batch=32, steps=2, optimizer=bp.optim.SGD(0.1, clip=1.0))


def test_copies_of_a_tied_tensor_are_not_compressed_apart(cluster):
    text = bp.data.text(length=8)
    network = bp.nn.gpt(text.vocabulary, 8, width=16, heads=2, layers=1)
    options = dict(batch=8, steps=1, lr=0.1, compress=bp.compress.TopK(0.1))
    with pytest.raises(ValueError, match=r"cannot compress gradients with TopK.* and this one has SUM_TIED"):
        cluster.train(network, text, bp.plan.data_parallel(2, buckets=2), **options)
