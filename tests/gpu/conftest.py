"""Tests on GPUs: ``pytest tests/gpu`` on a machine that has some; elsewhere they are skipped, with the reason."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import bpkit as bp
from bpkit.run.processes.devices import gpus, no_gpu

HERE = Path(__file__).parent


def pytest_report_header() -> list[str]:
    found = [torch.cuda.get_device_name(i) for i in range(gpus())]
    return [f"GPUs: {', '.join(found)}; CUDA {torch.version.cuda}, NCCL {torch.cuda.nccl.version()}"] if found else []


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    ours = [item for item in items if HERE in item.path.parents]
    reason = "" if gpus() else f"needs a GPU: {no_gpu()}"
    for item in ours:
        item.add_marker(pytest.mark.gpu)
        needed = item.get_closest_marker("gpus")
        if reason or (needed and gpus() < needed.args[0]):
            item.add_marker(pytest.mark.skip(reason=reason or f"needs {needed.args[0]} GPUs, {gpus()} here"))


@pytest.fixture(scope="module", params=["shm", "gloo"])
def staged(request: pytest.FixtureRequest) -> Iterator[dict[int, bp.Cluster]]:
    """Clusters of up to four workers on however few GPUs there are, through the host's memory."""
    made = {n: bp.Cluster(n, backend=request.param, device="cuda", timeout=60) for n in (1, 2, 3, 4)}
    yield made
    for cluster in made.values():
        cluster.close()


@pytest.fixture(scope="module")
def one() -> Iterator[bp.Cluster]:
    """One worker on a GPU of its own: the executor of streams."""
    os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"  # for bits that repeat; workers start with it
    with bp.Cluster(1, device="cuda", timeout=60) as cluster:
        assert cluster.backend == "nccl"
        yield cluster


@pytest.fixture(scope="module")
def nccl() -> Iterator[dict[int, bp.Cluster]]:
    """Clusters of two workers up to one for each GPU, over NCCL."""
    made = {n: bp.Cluster(n, backend="nccl", timeout=60) for n in range(2, gpus() + 1)}
    yield made
    for cluster in made.values():
        cluster.close()
