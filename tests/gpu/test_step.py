"""A step on a GPU: the host waits for nothing in it, its times, what overlaps, its memory."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.profiler import ProfilerActivity, profile

import bpkit as bp
from bpkit.plan import data_parallel, serial
from bpkit.run.engine.rank import Runner
from bpkit.run.job import Job
from bpkit.trace import Log

DIGITS = bp.data.digits()
WIDE = bp.nn.mlp([64, 2048, 2048, 2048, 10], seed=0)
WAITS = {"cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaMemcpy"}  # an event's wait is none of them


def profiled(comm: bp.run.Comm, job: Job, looks: bool) -> list[str]:
    """CUDA's calls in five steps, after three to warm up; with `looks` the host reads a loss, as it must not."""
    runner = Runner(comm, job)
    log = Log.empty([0], len(runner.buffers.row))
    for step in range(3):
        runner.run(step, job.data.indices(step, job.batch), log, 0)
    runner.settle()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as seen:
        for step in range(3, 8):
            runner.run(step, job.data.indices(step, job.batch), log, 0)
            if looks:
                float(runner.buffers.gradients[0][0])
    names = [event.name for event in seen.events() if event.name.startswith("cuda")]
    runner.settle()
    return names


@pytest.mark.parametrize("network", [WIDE, bp.nn.convnet(channels=(1, 8, 16), seed=0)], ids=["mlp", "batch norm"])
def test_the_host_waits_for_nothing_in_a_step(one, network):
    program = bp.plan.compile(serial(2, 2), network, clip=True)
    job = Job(program.plan, network, DIGITS, bp.optim.SGD(0.1, momentum=0.9, clip=1.0), 128, compiled=program)
    (names,), (looked,) = one.call(profiled, job, False), one.call(profiled, job, True)
    assert "cudaLaunchKernel" in names or "cudaLaunchKernelExC" in names
    # The profiler itself waits for the device when it ends, once.
    assert len([name for name in names if name in WAITS and name != "cudaDeviceSynchronize"]) == 0
    assert names.count("cudaDeviceSynchronize") <= 1
    assert any(name in WAITS for name in looked)  # the check sees a wait that is there


def test_times_are_the_gpus_own_on_the_hosts_clock(one):
    result = one.train(WIDE, DIGITS, serial(2, 2), batch=512, steps=30, lr=0.01)
    trace = result.trace
    assert 0 <= result.clock_error < 1e-3
    assert (trace.end >= trace.start + trace.wait).all() and (trace.wait >= 0).all()
    compute = trace.where(trace.compute())
    assert (compute.start[1:] - compute.end[:-1] >= -2000).all()  # 2 us: an event's resolution, twice
    busy = (compute.end - compute.start - compute.wait).sum() / 1e9
    assert 0.2 < busy / result.step_times.sum() <= 1.05


@pytest.mark.gpus(2)
def test_a_reduction_overlaps_a_backward(nccl):
    trace = nccl[2].train(WIDE, DIGITS, data_parallel(2, 3), batch=1024, steps=30, lr=0.01).trace
    kinds, overlaps = trace.kinds(), []
    for step in trace.steps[10:]:
        own = (trace.rank == 0) & (trace.step == step)
        for i in np.flatnonzero(own & (kinds == "REDUCE_GRAD")):
            backward = own & (kinds == "B") & (trace.start + trace.wait < trace.end[i]) & (trace.end > trace.start[i])
            overlaps.append(backward.any())
    assert np.mean(overlaps) > 0.2


def test_memory_is_about_what_was_calculated(one):
    result = one.train(WIDE, DIGITS, serial(), batch=1024, steps=5, optimizer=bp.optim.Adam(1e-3))
    said, kept = sum(result.predicted[0].values()), sum(result.memory[0].values())
    assert kept < result.peak[0] and said / 2 < result.peak[0] < 3 * said


def small(comm: bp.run.Comm) -> None:
    """Let this worker have 256 MB of its GPU."""
    torch.cuda.set_per_process_memory_fraction(256e6 / torch.cuda.get_device_properties(0).total_memory)


def test_a_full_gpu_says_what_the_plan_takes_and_what_takes_less():
    network = bp.nn.mlp([64, 8192, 8192, 10], seed=0)  # 270 MB of parameters
    with bp.Cluster(1, device="cuda") as cluster:
        cluster.call(small)
        with pytest.raises(bp.run.WorkerError, match=r"MB here, by calculation: parameters .*smaller batch") as caught:
            cluster.train(network, DIGITS, batch=64, steps=1, lr=0.1)
        assert isinstance(caught.value.__cause__, torch.OutOfMemoryError)


def test_a_loss_that_is_not_a_number_is_found(one):
    with pytest.raises(bp.run.WorkerError, match=r"step \d+: the loss is not a number"):
        one.train(bp.nn.mlp([64, 16, 10]), DIGITS, batch=32, steps=50, lr=1e30)


def test_a_call_carries_tensors_of_either_device(one):
    def sums(comm: bp.run.Comm) -> list[torch.Tensor]:
        there = torch.ones(3, device=comm.device)
        return [comm.all_reduce(torch.ones(3)), comm.all_reduce(there).cpu(), comm.empty(3).cpu()]

    ((host, device, empty),) = one.call(sums)
    assert torch.equal(host, torch.ones(3)) and torch.equal(device, host) and not empty.any()
