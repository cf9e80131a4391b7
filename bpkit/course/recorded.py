"""What was recorded on GPUs, for the pages."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

from bpkit.measure import table

GPU_FORMAT = "bpkit-gpu/1"


@dataclass(frozen=True)
class GpuFigures:
    """Rows that benchmarks/gpu.py recorded, as a table for each machine: (what it is, the table's rows)."""

    machines: tuple[tuple[str, tuple[Sequence[str], ...]], ...]
    head: Sequence[str] = ("case", "compared with", "ours", "theirs", "theirs / ours", "wanted")

    def __repr__(self) -> str:
        return "\n\n".join(table.text(said, self.head, rows) for said, rows in self.machines)

    def _repr_html_(self) -> str:
        folded = "<details><summary>{}</summary>{}</details>"
        return "".join(folded.format(escape(said), table.html(said, self.head, rows)) for said, rows in self.machines)


def gpu_figures(folder: str | Path, *groups: str) -> GpuFigures | None:
    """Return what whole runs of benchmarks/gpu.py recorded on GPUs, or None: a notebook then shows nothing.

    Parameters
    ----------
    folder : path
        Where the files gpu-*.json are. What was recorded without a GPU, or with ``--quick``, is not shown.
    groups : {"serial", "roofline", "data parallel", "pipeline"}
        Which comparisons; all where none is named.
    """
    made = []
    for path in sorted(Path(folder).glob("gpu-*.json")):
        record = json.loads(path.read_text(encoding="utf-8"))
        device, machine = record.get("device", {}), record.get("machine", {})
        if record.get("format") != GPU_FORMAT or device.get("type") != "cuda" or record.get("quick"):
            continue
        rows = tuple(_line(row) for row in record["rows"] if not row["info"] and (not groups or row["group"] in groups))
        count = f"{device['count']} x " if device["count"] > 1 else ""
        if rows:
            said = f"Recorded on {count}{device['name']}, {machine['date'][:10]}, PyTorch {machine['torch']}"
            made.append((said, rows))
    return GpuFigures(tuple(made)) if made else None


def _line(row: dict[str, Any]) -> Sequence[str]:
    """A row of the table."""
    times = (table.seconds(row["ours_s"]), table.seconds(row["peer_s"]))
    return row["case"], row["peer"], *times, f"{row['ratio']:.2f} ±{row['spread']:.2f}", f"{row['wanted']:.2f}"
