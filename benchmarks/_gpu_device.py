"""What benchmarks/gpu.py asks of a device: its clock, its ceilings, its precision, its name."""

from __future__ import annotations

import statistics
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import _harness
import torch

Run = Callable[[], Any]
PRECISIONS = ("fp32", "tf32", "bf16")


class Clock:
    """Times calls: by CUDA events on a GPU, by the host's clock elsewhere.

    Parameters
    ----------
    device : torch.device
    seconds : float
        About how long one measurement takes.
    """

    def __init__(self, device: torch.device, seconds: float) -> None:
        self.device, self.cuda, self._seconds = device, device.type == "cuda", seconds

    def once(self, run: Run, times: int) -> float:
        """Return the seconds of one of `times` calls; the host waits for the device only after the last."""
        if not self.cuda:
            start = time.perf_counter()
            for _ in range(times):
                run()
            return (time.perf_counter() - start) / times
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        for _ in range(times):
            run()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1e3 / times

    def timed(self, run: Run) -> Callable[[], float]:
        """Return a measurement of `run` that is long enough; each starts with a call that is not timed."""
        run()
        times = max(1, round(self._seconds / self.once(run, 3)))

        def measurement() -> float:
            run()
            return self.once(run, times)

        return measurement


class Roof:
    """The two ceilings of a device, as runs to be timed between others.

    Attributes
    ----------
    product, copy : callable
        A square matrix product of the best of some sizes, and a copy of memory that is larger than the caches.
    flops, bytes : int
        Of one call.
    """

    def __init__(self, clock: Clock, dtype: torch.dtype) -> None:
        sizes = (2048, 4096, 8192) if clock.cuda else (256, 512)
        made = {n: self._product(n, dtype, clock.device) for n in sizes}
        rates = {n: 2 * n**3 / statistics.median(clock.timed(run)() for _ in range(3)) for n, run in made.items()}
        best = max(rates, key=lambda n: rates[n])
        self.product, self.flops = made[best], 2 * best**3
        source = torch.ones(2**26 if clock.cuda else 2**24, device=clock.device)
        target = torch.empty_like(source)
        self.copy, self.bytes = (lambda: target.copy_(source)), 2 * source.nbytes

    @staticmethod
    def _product(n: int, dtype: torch.dtype, device: torch.device) -> Run:
        a, b, c = (torch.randn(n, n, device=device).to(dtype) for _ in range(3))
        return lambda: torch.mm(a, b, out=c)


@contextmanager
def precision(kind: str) -> Iterator[None]:
    """Let float32 products use TF32 for "tf32", and not otherwise."""
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    torch.set_float32_matmul_precision("high" if kind == "tf32" else "highest")
    torch.backends.cudnn.allow_tf32 = kind == "tf32"
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before[0])
        torch.backends.cudnn.allow_tf32 = before[1]


def graphed(run: Run) -> Run:
    """Capture a call in a CUDA graph, after some on a stream of their own, and return its replay."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay


def describe(device: torch.device) -> dict[str, Any]:
    """Return what is measured; ``type`` says whether it is a GPU."""
    if device.type != "cuda":
        return {"type": device.type, "name": _harness.machine()["cpu"], "count": 1}
    found = torch.cuda.get_device_properties(device)
    return {"type": "cuda", "name": found.name, "count": torch.cuda.device_count(), "memory_bytes": found.total_memory,
            "capability": f"{found.major}.{found.minor}", "multiprocessors": found.multi_processor_count,
            "cuda": torch.version.cuda, "cudnn": torch.backends.cudnn.version(), "driver": _driver()}  # fmt: skip


def _driver() -> str | None:
    """The driver's version, where its own tool is found."""
    try:
        command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=30).stdout.split("\n")[0]
    except (OSError, subprocess.SubprocessError):
        return None
