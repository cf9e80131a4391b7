"""The executor that a GPU takes, on the host: the order of its waits, its numbers, its clock."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import bpkit as bp
from bpkit.nn import CrossEntropy
from bpkit.plan import compile, liveness
from bpkit.run import cluster as of_cluster
from bpkit.run.engine import communication
from bpkit.run.engine.device import StreamExecutor
from bpkit.run.engine.rank import Runner, train
from bpkit.run.job import Job, Outcome
from bpkit.trace import Log

from . import host_streams, test_finite, test_models
from .networks import batch, every_layer
from .oracle import flat, gradient_sum, worst

pytestmark = pytest.mark.slow

SAMPLES = test_models.SAMPLES
PLANS = {plan.name: plan for plan in test_models.plans(test_models.MODELS["gpt, tied"][0])}


# -- the order of waits ----------------------------------------------------------------------------------


def action(index: int, width: int, mark: list[int]) -> Callable[[], None]:
    """An action that only notes on which stream it ran, numbered over all steps."""

    def run() -> None:
        host_streams.NOTES.append(("run", host_streams.current_stream().number, index + width * mark[0]))

    return run


def noted(plan: bp.plan.Plan, steps: int = 1, model: str = "gpt, tied") -> list[tuple]:
    """Each row of a plan run without work: its executor, what every action came behind, the row."""
    program = compile(plan, test_models.MODELS[model][0])
    found = []
    for row in program.rows:
        mark, width = [0, 0], len(row)
        groups = SimpleNamespace(world=SimpleNamespace(mark=mark, name="", sent=0))
        executor = StreamExecutor(row, [action(i, width, mark) for i in range(width)], groups, host_streams)
        host_streams.NOTES.clear()
        log = Log.empty(range(steps), len(row))
        for step in range(steps):
            executor.run(step, log, step)
        found.append((executor, host_streams.behind(len(row), steps), row))
    return found


def broken(plan: bp.plan.Plan) -> list[str]:
    """What a row should have waited for and did not: the plan's hazards, and slots that are still being sent."""
    wrong = []
    for _, behind, row in noted(plan):
        actions = [step.action for step in row]
        for index, waits in enumerate(liveness.waits(actions, plan)):
            missing = {*waits} - behind[index]
            wrong += [f"{actions[index]} did not wait for {actions[i]}" for i in missing]
    return wrong


@pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS.keys())
def test_every_action_comes_behind_what_it_waits_for(plan):
    assert broken(plan) == []


def test_the_checker_of_waits_sees_a_wait_that_is_left_out(monkeypatch):
    monkeypatch.setattr(host_streams.Stream, "wait_event", lambda stream, event: None)
    for plan in PLANS.values():
        if any(action.verb.axis for row in plan.rows for action in row):
            assert broken(plan) != [], plan.name


@pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS.keys())
def test_a_step_comes_behind_the_step_before_and_the_host_waits_for_neither(plan):
    for _, behind, row in noted(plan, steps=2):
        width = len(row)
        assert all(behind[index] >= set(range(width)) for index in range(width, 2 * width))
        assert not any(what == "host waits" for what, _, _ in host_streams.NOTES)


def test_communication_does_not_wait_for_compute_that_comes_after_it():
    """That is what overlaps: the first bucket is reduced while the second is computed, and the other way round."""
    (_, behind, row), *_ = noted(bp.plan.data_parallel(2, 3), model="gpt")
    texts = [str(step.action) for step in row]
    reduce, compute = texts.index("2REDUCE_GRAD"), texts.index("1B0")
    assert reduce < compute and compute not in behind[reduce] and reduce not in behind[compute]


# -- numbers and the log ---------------------------------------------------------------------------------


def gradients_by_streams(comm: bp.run.Comm, job: Job, step: int) -> dict[int, torch.Tensor]:
    captured: dict[int, torch.Tensor] = {}
    runner = Runner(comm, job, captured, host_streams)
    runner.run(step, torch.arange(job.batch), Log.empty([step], len(runner.buffers.row)), 0)
    runner.settle()
    return captured


def train_by_streams(comm: bp.run.Comm, job: Job) -> Outcome:
    return train(comm, job, host_streams)


@pytest.mark.parametrize("model", ["gpt, tied", "convnet"])
def test_gradients_equal_serial(clusters, model, monkeypatch):
    monkeypatch.setattr(of_cluster, "gradients", gradients_by_streams)
    network, data = test_models.MODELS[model]
    inputs, targets = data.inputs[:SAMPLES], data.targets[:SAMPLES]
    oracle = gradient_sum(network, inputs, targets, step=3) / network.loss.terms(targets)
    for plan in test_models.plans(network):
        found = clusters[plan.workers].gradients(network, inputs, targets, plan, step=3)
        assert worst(network, found, oracle) <= 1e-12, plan.name


def test_training_equals_the_polling_executor_and_its_log_says_the_same(clusters, monkeypatch):
    network, data = every_layer(), bp.data.Dataset("batch", *batch(every_layer()), *batch(every_layer()))
    arguments = dict(batch=9, steps=6, optimizer=bp.optim.SGD(0.2, momentum=0.9, clip=0.1), evaluate_every=4)
    plan = bp.plan.zero(2, 2, units=3, microbatches=2)
    polled = clusters[2].train(network, data, plan, **arguments)
    monkeypatch.setattr(of_cluster, "train", train_by_streams)
    found = clusters[2].train(network, data, plan, **arguments)
    assert torch.equal(flat(found.network.parameters()), flat(polled.network.parameters()))
    assert found.accuracies == polled.accuracies and np.array_equal(found.losses, polled.losses)
    trace = found.trace
    assert len(trace) == len(polled.trace) and trace.cells == polled.trace.cells
    assert np.array_equal(trace.bytes, polled.trace.bytes)
    assert (trace.end >= trace.start + trace.wait).all() and (trace.wait >= 0).all() and (trace.cpu == -1).all()
    compute = trace.where((trace.rank == 0) & trace.compute())
    assert (compute.start[1:] >= compute.end[:-1]).all()  # a stream does one thing at a time, steps in order
    assert len(found.step_times) == 6 and (found.step_times > 0).all()


class Looks(TorchDispatchMode):
    """Notes operations for which the host would wait on a GPU: those that give it a value, or a size by values."""

    WAITS = ("_local_scalar_dense", "nonzero", "equal", "masked_select", "unique")

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        if name.startswith(self.WAITS) or (name == "_to_copy" and (kwargs or {}).get("device") is not None):
            self.found.append(name)
        return func(*args, **(kwargs or {}))


def what_the_host_waits_for(comm: bp.run.Comm, job: Job, looks: bool) -> list[str]:
    CrossEntropy._may_be_masked = lambda self, targets: True  # as on a GPU; in this worker only
    communication.square_sum = lambda flat: torch.linalg.vector_norm(flat, dtype=torch.float64).square_()
    runner = Runner(comm, job, streams=host_streams)
    if looks:
        runner.executor._steps[-1] = (lambda: float(runner.buffers.gradients[0].sum()), [], "compute")
    seen, run = Looks(), runner.executor.run

    def watched(*args):
        with seen:
            run(*args)

    runner.executor.run = watched
    log = Log.empty([0], len(runner.buffers.row))
    for step in range(2):
        runner.run(step, job.data.indices(step, job.batch), log, 0)
    runner.settle()
    return seen.found


def test_the_host_looks_at_no_value_in_a_step():
    """On a GPU each look would wait for it; the CPU's own operations show them as well."""
    digits, text = bp.data.digits(), bp.data.text(length=12)
    gpt = bp.nn.gpt(int(text.inputs.max()) + 1, 12, width=16, heads=4, layers=2, tied=True, dropout=0.1)
    networks = [(bp.nn.convnet(channels=(1, 4, 8)), digits), (bp.nn.convnet(channels=(1, 4, 8), norm="layer"), digits)]
    with bp.Cluster(1, device="cpu") as cluster:
        for network, data in [*networks, (gpt, text), (bp.nn.mlp([64, 16, 10], dropout=0.1), digits)]:
            for optimizer in (bp.optim.SGD(0.1, momentum=0.9, nesterov=True, clip=1.0), bp.optim.AdamW(1e-3, clip=1.0)):
                program = compile(bp.plan.serial(2, 2), network, clip=True)
                precision = "full" if len(network.flat_buffers) else "bf16"
                job = Job(program.plan, network, data, optimizer, batch=12, precision=precision, compiled=program)
                assert cluster.call(what_the_host_waits_for, job, False) == [[]], network
                job = replace(job, precision="full")
                assert cluster.call(what_the_host_waits_for, job, False) == [[]], network
        assert cluster.call(what_the_host_waits_for, job, True) == [["_local_scalar_dense"] * 2]  # one that is there


def test_a_step_is_skipped_although_the_host_is_ahead(clusters, monkeypatch):
    samples, spoiled = test_finite.data(32)
    network, plan = test_finite.network(test_finite.Overflows()), bp.plan.zero(2, 2, units=2)
    arguments = dict(batch=test_finite.BATCH, steps=32, lr=0.1, skip_nonfinite=True)
    polled = clusters[2].train(network, samples, plan, **arguments)
    monkeypatch.setattr(of_cluster, "train", train_by_streams)
    found = clusters[2].train(network, samples, plan, **arguments)
    assert found.skipped == polled.skipped == len(spoiled) > 1
    assert np.array_equal(found.losses, polled.losses, equal_nan=True)
    assert torch.equal(flat(found.network.parameters()), flat(polled.network.parameters()))


def test_a_loss_that_is_not_a_number_is_found_although_the_host_is_ahead(clusters, monkeypatch):
    monkeypatch.setattr(of_cluster, "train", train_by_streams)
    data = bp.data.digits(dtype=torch.float64)
    network = bp.nn.mlp([64, 16, 10], dtype=torch.float64, activation="relu")
    with pytest.raises(bp.run.WorkerError, match=r"step \d+: the loss is not a number"):
        clusters[2].train(network, data, batch=32, steps=200, lr=1e200)


def test_times_of_the_device_come_to_the_clock_of_the_host(monkeypatch):
    """A device whose clock starts elsewhere and runs fast: times are right to the error that is stated."""
    rate, offset = 1.001, 5e9
    monkeypatch.setattr(host_streams.Event, "elapsed_time", lambda a, b: (b.at - a.at) * rate / 1e6)
    real = host_streams.Event.record

    def record(event, stream):
        real(event, stream)
        event.at += offset

    monkeypatch.setattr(host_streams.Event, "record", record)
    (executor, _, row), *_ = noted(bp.plan.serial(), steps=3)
    log = Log.empty(range(3), len(row))
    start = host_streams.perf_counter_ns()
    began = [executor.finish() for _ in range(3)]
    error = executor.clock_error()
    assert began == sorted(began) and all(abs(time - start) < 1e9 for time in began)
    assert 0 < error < 0.1 and log.start.shape == (3, len(row))
    assert (log.bytes == 0).all()
