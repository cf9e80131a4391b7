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
        ``name cpu cores steal gpus os python torch numpy bpkit date``.  ``cores`` are those that this process may
        use, which can be fewer than the machine has; on a virtual machine each may be half of a core.  ``steal`` is
        `stolen` since the machine started.
    """
    from bpkit import __version__

    cpu, count = _cpu(), cores()
    return {"name": name or f"{cpu}, {count} core{'s' * (count != 1)}", "cpu": cpu, "cores": count, "steal": stolen(),
            "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
            "os": f"{platform.system()} {platform.release()}", "python": platform.python_version(),
            "torch": torch.__version__, "numpy": numpy.__version__, "bpkit": __version__,
            "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")}  # fmt: skip


def cpu_times(stat: Path = Path("/proc/stat")) -> tuple[int, int] | None:
    """Stolen and all CPU time of all cores since the start, in the kernel's ticks; None where it does not say."""
    try:
        fields = [int(field) for field in stat.read_text().split("\n", 1)[0].split()[1:9]]
    except (OSError, ValueError):
        return None
    return (fields[7], sum(fields)) if len(fields) == 8 else None


def stolen(since: tuple[int, int] | None = (0, 0)) -> float | None:
    """Share of CPU time in which a virtual machine wanted a core that its host had given to someone else.

    The guest cannot tell such time from work: in a trace it is compute, not waiting for a core.

    Parameters
    ----------
    since : (int, int), optional
        What `cpu_times` gave at the beginning; the start of the machine where not given.

    Returns
    -------
    float or None
        None where the operating system does not tell (it is not Linux).
    """
    now = cpu_times()
    return None if now is None or since is None else (now[0] - since[0]) / max(1, now[1] - since[1])


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
