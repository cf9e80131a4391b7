"""What every benchmark shares: interleaved repetitions, rows, the machine, the table, and the JSON file."""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import statistics
from functools import partial
from pathlib import Path
from typing import Any

import numpy
import torch

from bpkit import measure


def parser(description: str) -> argparse.ArgumentParser:
    """Return what reads ``--json FILE`` and ``--quick``."""
    made = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--json", type=Path, metavar="FILE", help="write machine and rows to FILE")
    made.add_argument("--quick", action="store_true", help="fewer repetitions")
    return made


def arguments(description: str) -> argparse.Namespace:
    """Read ``--json FILE`` and ``--quick``."""
    return parser(description).parse_args()


#: Turns of all runs, shuffled; the runs warm up by themselves.
interleave = partial(measure.interleave, warmup=0)


def row(
    case: str,
    peer: str,
    ours: list[float],
    theirs: list[float],
    *,
    ours_transport: str = "none",
    peer_transport: str = "none",
    info: bool = False,
) -> dict[str, Any]:
    """Return one row from interleaved samples, in seconds.

    `ratio` is the median of peer / ours over the repetitions (above 1: ours is better), `interval` its bootstrap
    interval (`bpkit.measure.ratio`; None under ten repetitions), and `spread` half the distance between that
    ratio's quartiles.
    """
    ratios = [b / a for a, b in zip(ours, theirs, strict=True)]
    low, _, high = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else (ratios[0],) * 3
    found = measure.ratio(theirs, ours) if len(ratios) >= measure.FEWEST else None
    return {
        "case": case,
        "peer": peer,
        "ours_transport": ours_transport,
        "peer_transport": peer_transport,
        "ours_s": statistics.median(ours),
        "peer_s": statistics.median(theirs),
        "ratio": statistics.median(ratios),
        "repetitions": len(ratios),
        "spread": (high - low) / 2,
        "interval": None if found is None else [found.low, found.high],
        "info": info,
    }


def machine() -> dict[str, Any]:
    """Describe the machine and the versions."""
    cpu = platform.processor() or platform.machine()
    if (info := Path("/proc/cpuinfo")).exists():
        names = [line.split(":", 1)[1].strip() for line in info.read_text().splitlines() if "model name" in line]
        cpu = names[0] if names else cpu
    return {
        "cpu": cpu,
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        "os": platform.platform(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": numpy.__version__,
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


def report(rows: list[dict[str, Any]], file: Path | None, **more: Any) -> None:
    """Print the table of ratios and write the JSON file, if one is asked for."""
    wide = max((len(r["case"]) + 2 for r in rows), default=0)
    print(f"{'case':<{wide}}{'peer':<42}{'ours us':>10}{'peer us':>10}{'ratio':>7}  spread, interval")
    for r in rows:
        times = f"{r['ours_s'] * 1e6:>10.1f}{r['peer_s'] * 1e6:>10.1f}"
        interval = "" if r["interval"] is None else "  [{:.2f}, {:.2f}]".format(*r["interval"])
        note = "  for information" if r["info"] else f"  wanted {r['wanted']:.2f}" if "wanted" in r else ""
        print(f"{r['case']:<{wide}}{r['peer']:<42}{times}{r['ratio']:>7.2f}  ±{r['spread']:.2f}{interval}{note}")
    if file is not None:
        file.write_text(json.dumps({"machine": machine(), "rows": rows, **more}, indent=1) + "\n")
