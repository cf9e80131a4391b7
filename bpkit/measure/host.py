"""The description of a machine that goes with every measurement; it names no host, user or path."""

import datetime
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy
import torch


def machine(name: str | None = None) -> dict[str, Any]:
    """Describe this machine and the versions in use.

    Parameters
    ----------
    name : str, optional
        What readers shall call it; made of processor and cores where None.

    Returns
    -------
    dict
        ``name cpu cores gpus os python torch numpy bpkit date``.  ``cores`` are those that this process may
        use, which can be fewer than the machine has.
    """
    from bpkit import __version__

    cpu, count = _cpu(), cores()
    return {"name": name or f"{cpu}, {count} core{'s' * (count != 1)}", "cpu": cpu, "cores": count,
            "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
            "os": f"{platform.system()} {platform.release()}", "python": platform.python_version(),
            "torch": torch.__version__, "numpy": numpy.__version__, "bpkit": __version__,
            "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")}  # fmt: skip


def cores() -> int:
    """Processors that this process may run on; a share of CPU time that a container grants is not looked at."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _cpu() -> str:
    """The processor's model."""
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text(errors="replace").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    if sys.platform == "darwin":
        found = subprocess.run(["sysctl", "-n", "machdep.cpu.brand_string"], capture_output=True, text=True)
        if found.stdout.strip():
            return found.stdout.strip()
    return platform.processor() or platform.machine() or "unknown processor"
