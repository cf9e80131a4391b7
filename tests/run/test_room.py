"""The memory that a plan takes, by calculation, and what is said where a GPU has too little."""

from __future__ import annotations

import inspect

import pytest
import torch

import bpkit as bp
from bpkit.plan import (
    data_parallel,
    expand,
    interleaved,
    local_sgd,
    parameter_server,
    serial,
    tensor_parallel,
    zero,
)
from bpkit.plan.strategies.pipeline import gpipe, one_f_one_b
from bpkit.run import checks
from bpkit.run import cluster as of_cluster
from bpkit.run.checks import checked
from bpkit.run.engine import rank as training
from bpkit.run.errors import NoRoom
from bpkit.run.job import Job
from bpkit.run.transports.shared import files
from bpkit.run.transports.shared.transport import SharedMemoryComm

pytestmark = pytest.mark.slow

DATA = bp.data.digits()
NETWORK = bp.nn.mlp([64, 48, 40, 32, 10], seed=1)
PLANS = [serial(), data_parallel(2, 3), zero(2, 1, units=3), zero(2, 2, units=3), zero(2, 3, units=3), gpipe(2, 4),
         one_f_one_b(2, 4), one_f_one_b(2, 4, data=2)]  # fmt: skip


@pytest.fixture(scope="module")
def four():
    """Clusters on shared memory."""
    made = {n: bp.Cluster(n, backend="shm", timeout=30) for n in (1, 2, 4)}
    yield made
    for cluster in made.values():
        cluster.close()


@pytest.mark.parametrize("plan", PLANS, ids=[plan.name for plan in PLANS])
def test_what_is_kept_is_what_was_calculated(clusters, plan):
    result = clusters[plan.workers].train(NETWORK, DATA, plan, batch=64, steps=1, optimizer=bp.optim.Adam(1e-3))
    assert result.peak == (0,) * plan.workers and result.clock_error == 0.0  # this is the CPU
    for kept, said in zip(result.memory, result.predicted, strict=True):
        shared = result.backend == "shm" and "UNSHARD" in str(plan)
        assert kept["optimizer"] == pytest.approx(said["optimizer"], abs=64)  # parts differ by an element
        assert kept["gradients"] == pytest.approx(said["gradients"], abs=256)
        assert shared or kept["parameters"] == pytest.approx(said["parameters"], abs=256)


TEXT = bp.data.text(length=8)
GPT = bp.nn.gpt(TEXT.vocabulary, 8, width=12, heads=2, layers=2)
IN_COMMON = [
    *[(plan, NETWORK, DATA) for plan in (*PLANS, local_sgd(2, 2), parameter_server(2, 2), one_f_one_b(4, 8),
                                         interleaved(2, 4, 2, data=2), expand(data_parallel(4, 2), "ring"))],
    (one_f_one_b(2, 4), GPT, TEXT), (one_f_one_b(2, 2, data=2), GPT, TEXT),
    *[(tensor_parallel(plan, 2, bp.nn.tensor_layout(GPT, sequence)), GPT, TEXT)
      for plan in (serial(), data_parallel(2, 2), gpipe(2, 2)) for sequence in (False, True)],
]  # fmt: skip


def taken(comm, job):
    """The bytes of shared memory that a rank makes for itself and others, besides those of messages."""
    sizes, real = [], SharedMemoryComm._map

    def noted(own, size, *args):
        in_buffers = any(frame.function == "__post_init__" for frame in inspect.stack())
        sizes.append(size if own.rank == 0 and in_buffers else 0)
        return real(own, size, *args)

    SharedMemoryComm._map = noted  # in this worker only
    try:
        training.train(comm, job)
    finally:
        SharedMemoryComm._map = real
    return sum(sizes)


@pytest.mark.parametrize(("plan", "network", "data"), IN_COMMON, ids=[plan.name for plan, _, _ in IN_COMMON])
@pytest.mark.parametrize("clip", [None, 1.0])
def test_the_room_is_what_workers_take(four, plan, network, data, clip):
    if clip and plan.holds != "all":  # no one gradient to be clipped
        return
    cluster = four[plan.workers]
    job = cluster.check(Job(plan, network, data, bp.optim.SGD(0.1, clip=clip), 22, steps=1))
    assert sum(cluster.call(taken, job)) == job.memory.shared()


def test_a_pipeline_takes_no_room_for_gradients(monkeypatch):
    network = bp.nn.mlp([64, 1024, 1024, 1024, 10])
    jobs = {plan.name: Job(plan, network, DATA, bp.optim.SGD(0.1), 64, compiled=bp.plan.compile(plan, network))
            for plan in (gpipe(4, 4), data_parallel(4))}  # fmt: skip
    assert jobs["gpipe(4, 4)"].memory.shared() < 4e6 < 34e6 < jobs["data_parallel(4)"].memory.shared()
    monkeypatch.setattr(files, "free_room", lambda: 20_000_000)
    checks.room(jobs["gpipe(4, 4)"], "shm")
    checks.room(jobs["data_parallel(4)"], "gloo")
    with pytest.raises(NoRoom, match=r"data_parallel\(4\) with batches of 64 needs 34\.8 MB"):
        checks.room(jobs["data_parallel(4)"], "shm")


def test_activations_follow_the_schedule_and_the_microbatch():
    def saved(plan, batch=64):
        job = checked(Job(plan, NETWORK, DATA, bp.optim.SGD(0.1), batch), plan.workers, "gloo")
        return job.needs(plan.mesh.coordinate(0))["activations"]

    assert saved(serial(), 128) == 2 * saved(serial()) == 4 * saved(serial(1, 2))  # two microbatches, one at a time
    assert saved(gpipe(2, 4)) == 2 * saved(one_f_one_b(2, 4)) > 0  # four microbatches at a time, or two
    widths = sum(cost.inputs + cost.outputs for cost in NETWORK.costs())
    assert saved(serial()) == 4 * 64 * widths


@pytest.mark.parametrize("sequence", [False, True])
def test_a_tensor_rank_keeps_what_its_own_layers_give(sequence):
    text = bp.data.text(length=8)
    network = bp.nn.gpt(text.vocabulary, 8, width=12, heads=2, layers=1)
    plan = bp.plan.tensor_parallel(serial(), 2, bp.nn.tensor_layout(network, sequence))
    job = checked(Job(plan, network, text, bp.optim.SGD(0.1), 16), 2, "gloo")
    layers = bp.nn.shard(network, 0, 2, sequence).split(range(1, len(network.opened().layers)))
    numbers = [torch.Size(shape).numel() for one in layers for shape in (one.input_shape, one.output_shape)]
    said = job.needs(plan.mesh.coordinate(0))["activations"]
    assert said == 4 * 16 * sum(numbers)
    whole = sum(cost.inputs + cost.outputs for cost in network.opened().costs())
    assert said < 4 * 16 * whole


def out_of_memory(comm, job):
    """A training run that finds the memory of its device full."""

    class Full(training.Runner):
        def run(self, *args):
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    training.Runner = Full  # in this worker only, which ends with its error
    return training.train(comm, job)


@pytest.mark.parametrize(("plan", "helps", "no_help"), [
    (data_parallel(2, 3), ["a smaller batch", "bp.plan.zero"], ["recompute", "microbatches"]),
    (one_f_one_b(2, 4), ["more microbatches", "recompute=True", "bp.plan.zero"], []),
    (one_f_one_b(2, 4, recompute=True), ["more microbatches"], ["recompute=True"]),
    (zero(2, 3, units=3), ["a smaller batch"], ["bp.plan.zero"]),
])  # fmt: skip
def test_a_full_gpu_says_what_the_plan_takes_and_what_takes_less(monkeypatch, plan, helps, no_help):
    monkeypatch.setattr(of_cluster, "train", out_of_memory)
    with bp.Cluster(2, backend="shm") as cluster, pytest.raises(bp.run.WorkerError) as caught:
        cluster.train(NETWORK, DATA, plan, batch=64, steps=1, lr=0.1)
    text, cause = str(caught.value), caught.value.__cause__
    assert isinstance(cause, torch.OutOfMemoryError) and "Tried to allocate 2.00 GiB" in str(cause)
    assert "MB here, by calculation: parameters" in text and "activations" in text
    message = str(cause).split("Less is needed with")[1]
    assert all(word in message for word in helps) and not any(word in message for word in no_help)
