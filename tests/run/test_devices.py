"""Which device a cluster takes, and the sentence where it cannot: on machines that are only pretended here."""

from __future__ import annotations

import pytest
import torch

import bpkit as bp
from bpkit.run.processes.pool import Pool

TOO_OLD = "The NVIDIA driver on your system is too old (found version 11040)."


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch):
    """Pretend so many GPUs, a build of PyTorch, and what CUDA says when it starts."""

    def pretend(gpus: int, build: str | None = "12.8", starts: str = "") -> None:
        def init() -> None:
            if starts:
                raise RuntimeError(starts)

        monkeypatch.setattr(torch.version, "cuda", build)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus > 0)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
        monkeypatch.setattr(torch.cuda, "init", init)
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)

    return pretend


@pytest.mark.parametrize(("gpus", "workers", "asked", "taken"), [
    (0, 2, {}, ("cpu", "shm")),
    (1, 1, {}, ("cuda", "nccl")),
    (1, 2, {}, ("cpu", "shm")),  # auto never lets workers share a GPU
    (4, 4, {}, ("cuda", "nccl")),
    (4, 2, {"device": "cpu"}, ("cpu", "shm")),
    (4, 2, {"backend": "gloo"}, ("cpu", "gloo")),  # who asks for a transport of the host gets the host
    (1, 2, {"device": "cuda"}, ("cuda", "shm")),  # several workers on one GPU: staged
    (1, 2, {"device": "cuda", "backend": "gloo"}, ("cuda", "gloo")),
    (2, 2, {"device": "cuda"}, ("cuda", "nccl")),
    (2, 2, {"backend": "nccl"}, ("cuda", "nccl")),
])  # fmt: skip
def test_what_is_taken(machine, gpus, workers, asked, taken):
    machine(gpus)
    cluster = bp.Cluster(workers, **asked)
    assert (cluster.device, cluster.backend) == taken
    assert ("on GPUs" in repr(cluster)) == (taken[0] == "cuda")


def test_more_nccl_ranks_than_gpus(machine):
    machine(2)
    with pytest.raises(ValueError, match=r"one GPU a worker: 3 workers, 2 GPUs here, and NCCL refuses two ranks on one "
                                         r"GPU; use backend='shm' or 'gloo'.*device='cuda'"):  # fmt: skip
        Pool(3, "nccl", device="cuda")
    machine(0, starts=TOO_OLD)
    with pytest.raises(ValueError, match="1 workers, 0 GPUs here.*driver on your system is too old"):
        Pool(1, "nccl")
    with pytest.raises(ValueError, match="'nccl' connects GPUs, and device='cpu' takes none"):
        Pool(1, "nccl", device="cpu")


def test_a_driver_that_is_too_old(machine):
    machine(0, starts=TOO_OLD)
    with pytest.raises(RuntimeError, match=r"device 'cuda': no GPU is to be seen: The NVIDIA driver .* version 11040"):
        Pool(1, device="cuda")


def test_a_variable_that_hides_all_gpus(machine, monkeypatch):
    for value in ("", "-1"):
        machine(0, starts="No CUDA GPUs are available")
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", value)
        with pytest.raises(RuntimeError, match=f"CUDA_VISIBLE_DEVICES='{value}' hides all GPUs: unset it"):
            Pool(1, device="cuda")
        machine(0, starts=TOO_OLD)  # that is the reason then
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", value)
        with pytest.raises(RuntimeError, match="is too old"):
            Pool(1, device="cuda")


def test_a_build_without_cuda(machine):
    machine(0, build=None)
    with pytest.raises(RuntimeError, match=r"PyTorch .* is a build without CUDA: install one with it"):
        Pool(1, device="cuda")


def test_an_unknown_device(machine):
    machine(1)
    with pytest.raises(ValueError, match="unknown device 'tpu': choose one of 'auto', 'cpu', 'cuda'"):
        Pool(1, device="tpu")


def cuda_is_untouched(comm):
    return torch.cuda.is_initialized(), comm.device.type


@pytest.mark.parametrize("method", ["forkserver", "spawn"])
def test_workers_of_the_cpu_never_start_cuda(method):
    with Pool(2, device="cpu", start_method=method) as pool:
        assert pool.call(cuda_is_untouched) == [(False, "cpu")] * 2


def test_networks_and_data_come_from_the_cpu():
    data = bp.data.digits()
    network = bp.nn.mlp([64, 16, 10])
    with bp.Cluster(2, backend="shm") as cluster:
        with pytest.raises(ValueError, match="the network lies on meta: give it on the CPU"):
            cluster.train(network.copy("meta"), data, batch=32, steps=1, lr=0.1)
        with pytest.raises(ValueError, match="the data lies on meta: give it on the CPU"):
            cluster.train(network, data.to("meta"), batch=32, steps=1, lr=0.1)
        assert cluster.pids == ()
