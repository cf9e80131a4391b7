"""Training when things go wrong: a worker killed in mid-step, one that raises, a stop; and training under spawn."""

from __future__ import annotations

import os
import re
import signal
import threading
import time

import pytest
import torch

import bpkit as bp
from bpkit.data import Dataset
from bpkit.nn import CrossEntropy
from bpkit.run import Stopped, WorkerDied, WorkerError

from .pools import alive

pytestmark = pytest.mark.slow

DATA = bp.data.digits()
NETWORK = bp.nn.mlp([64, 256, 256, 10], seed=0)


class Raising(CrossEntropy):
    """A loss that fails on one rank, whose shard holds a label that the others' do not."""

    def value_and_gradient(self, y, targets):
        if (targets == 9).any():
            raise ArithmeticError("label 9 is cursed")
        return super().value_and_gradient(y, targets)


@pytest.mark.parametrize("backend", ["shm", "gloo"])
def test_a_worker_killed_in_mid_step_is_named_with_its_action(backend):
    with bp.Cluster(2, backend=backend) as cluster:
        cluster.call(lambda comm: comm.rank)
        before = cluster.pids
        timer = threading.Timer(0.5, os.kill, (before[1], signal.SIGKILL))
        timer.start()
        with pytest.raises(WorkerDied) as error:
            cluster.train(NETWORK, DATA, batch=512, steps=100_000, lr=0.1)
        assert time.monotonic() - timer_start(timer) < 5.5
        assert error.value.rank == 1
        assert re.search(r"rank 1 .*SIGKILL.*0(ZERO|F0|LOSS0|B0|REDUCE_GRAD|UPDATE)", str(error.value), re.S)
        assert not any(alive(pid) for pid in before)
        result = cluster.train(NETWORK, DATA, batch=64, steps=2, lr=0.1)  # the next run works
        assert len(result.losses) == 2


def timer_start(timer: threading.Timer) -> float:
    """When the timer fired, at the earliest: it was started `interval` before."""
    timer.join()
    return time.monotonic() - timer.interval


def test_a_raising_action_is_named_with_its_rank_and_traceback():
    network = bp.nn.mlp([64, 16, 10], loss=Raising())
    targets = DATA.targets.clone()
    targets[targets == 9] = 8
    inputs, labels = DATA.inputs[:64], targets[:64].clone()
    labels[60] = 9  # in the second shard
    with bp.Cluster(2) as cluster:
        with pytest.raises(WorkerError, match=r"rank 1 .*0LOSS0") as error:
            cluster.gradients(network, inputs, labels)
        assert "label 9 is cursed" in str(error.value) and "value_and_gradient" in str(error.value)
        assert isinstance(error.value.__cause__, ArithmeticError)
        assert cluster.gradients(network, inputs, targets[:64]).isfinite().all()


class BreaksInTests(bp.nn.Tanh):
    """A layer that cannot take what only test samples hold."""

    def at(self, site):
        made = super().at(site)
        forward = made.forward

        def checked(x, context):
            if not context.training and (x > 99).any():
                raise ArithmeticError("a test sample too large")
            return forward(x, context)

        made.forward = checked
        return made


@pytest.mark.parametrize("plan", [bp.plan.data_parallel(2), bp.plan.gpipe(2, 2), bp.plan.zero(2, 3)],
                         ids=lambda plan: plan.name)  # fmt: skip
def test_what_was_trained_until_an_evaluation_failed_is_not_lost(plan):
    network = bp.nn.Network([bp.nn.Linear(64, 8), BreaksInTests(), bp.nn.Linear(8, 10)], 64, seed=0)
    data = Dataset("large", DATA.inputs, DATA.targets, 1e6 * DATA.test_inputs, DATA.test_targets)
    with bp.Cluster(2) as cluster:
        with pytest.raises(WorkerError, match="EvaluationError: after 3 steps") as caught:
            cluster.train(network, data, plan, batch=16, steps=9, lr=0.1, evaluate_every=3)
        cause = caught.value.__cause__
        assert isinstance(cause, bp.run.EvaluationError) and "a test sample too large" in str(cause)
        expected = cluster.train(network, data, plan, batch=16, steps=3, lr=0.1).network
        for a, b in zip(cause.network.parameters(), expected.parameters(), strict=True):
            assert torch.equal(a, b)


def test_stop_ends_a_run():
    stop = threading.Event()
    threading.Timer(0.4, stop.set).start()
    with bp.Cluster(2) as cluster, pytest.raises(Stopped):
        cluster.train(NETWORK, DATA, batch=512, steps=100_000, lr=0.1, stop=stop)


def test_progress_is_told():
    seen: list[float] = []
    with bp.Cluster(1) as cluster:
        cluster.train(NETWORK, DATA, batch=1024, steps=120, lr=0.1, progress=lambda part, text: seen.append(part))
    assert seen == sorted(seen) and seen[0] >= 0 and seen[-1] <= 1


def test_training_under_spawn():
    data = Dataset("few", *(t[:40] for t in (DATA.inputs, DATA.targets, DATA.test_inputs, DATA.test_targets)))
    network = bp.nn.mlp([64, 8, 10], seed=1)
    with bp.Cluster(2, start_method="spawn") as spawned, bp.Cluster(2) as forked:
        a, b = (c.train(network, data, batch=20, steps=3, lr=0.1).network.flat_parameters for c in (spawned, forked))
    assert torch.equal(a, b)


def test_a_gradient_that_is_not_a_number_names_its_rank_and_layer():
    network = bp.nn.mlp([64, 16, 10])
    network.parameters()[2][3, 4] = float("nan")
    with bp.Cluster(2) as cluster, pytest.raises(WorkerError, match=r"(?s)rank \d.*not a number.*layer \d"):
        cluster.train(network, DATA, batch=1437, steps=2, lr=0.1)


class SlowPass(bp.nn.ReLU.passage):
    def forward(self, x, context):
        if not context.training:
            time.sleep(0.5)
        return super().forward(x, context)


class Slow(bp.nn.ReLU):
    """Takes its time in evaluations."""

    passage = SlowPass


@pytest.mark.parametrize("backend", ["shm", "gloo"])
def test_a_long_evaluation_is_no_stuck_worker(backend):
    inputs, targets = DATA.test_inputs.repeat(12, 1), DATA.test_targets.repeat(12)  # five pieces, 2.5 s
    data = Dataset("long", DATA.inputs, DATA.targets, inputs, targets)
    network = bp.nn.Network([bp.nn.Linear(64, 10), Slow()], (64,))
    with bp.Cluster(2, backend=backend, timeout=1.5) as cluster:
        cluster.start()
        start = time.monotonic()
        result = cluster.train(network, data, batch=32, steps=2, lr=0.1, evaluate_every=2)
    assert time.monotonic() - start > 2.5
    assert result.accuracies == ((2, result.network.accuracy(DATA.test_inputs, DATA.test_targets)),)
