"""Invented measurements in the explorer's format, and a page that shows them as a built page would.

They are inputs of tests, not results: no figure of them is quoted anywhere.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
LOADER = ROOT / "book" / "static" / "bpkit-widgets.js"
#: For each swatch of a legend its colour, and the fill of the first mark of its class.
COLOURS = """(panel, mark) => {
  const found = {};
  for (const swatch of panel.querySelectorAll(".bpkit-swatch")) {
    const name = swatch.classList.item(1);
    const drawn = panel.querySelector(mark.replace("*", name));
    if (drawn) found[name] = [getComputedStyle(swatch).backgroundColor, getComputedStyle(drawn).fill];
  }
  return found;
}"""
#: Elements whose text is under nine pixels.
SMALL = """figure => [...figure.querySelectorAll("*")]
    .filter(e => e.getClientRects().length)
    .filter(e => [...e.childNodes].some(node => node.nodeType === 3 && node.textContent.trim()))
    .filter(e => parseFloat(getComputedStyle(e).fontSize) < 9)
    .map(e => e.tagName + ": " + e.textContent.slice(0, 40))"""


def timeline(workers: int, step_us: float) -> list[list[Any]]:
    """One step of data parallelism in three buckets: forward, backward, sums, updates; 4 workers wait for cores."""
    cells = [("0F0", 0.0, 0.1, 0), ("1F0", 0.1, 0.2, 0), ("2F0", 0.2, 0.3, 0), ("2B0", 0.3, 0.45, 0),
             ("2REDUCE_GRAD", 0.45, 0.55, 0.02), ("1B0", 0.45, 0.6, 0), ("1REDUCE_GRAD", 0.6, 0.7, 0.02),
             ("0B0", 0.6, 0.75, 0), ("0REDUCE_GRAD", 0.75, 0.85, 0.05), ("0UPDATE", 0.85, 1.0, 0.06)]
    share = 0.8 if workers > 2 else 1.0  # of an action that has a core
    return [[rank, cell, step_us * (start + 0.005 * rank), step_us * end, step_us * wait,
             share * step_us * (end - start - 0.005 * rank - wait)]
            for rank in range(workers) for cell, start, end, wait in cells]


def point(workers: int, serial_s: float, speedup: float, counted: bool, simulated: bool) -> dict[str, Any]:
    """The point of one worker count, its parts summing to the step time."""
    step = serial_s / speedup
    parts = {"compute": 1.0 if workers == 1 else 0.72, "waiting_for_core": 0.12 if workers > 2 else 0.0}
    parts["exposed_communication"] = 0.0 if workers == 1 else 0.12
    parts["idle"] = 1.0 - sum(parts.values())
    made = {
        "workers": workers, "batch": 256, "throughput": 256 / step, "speedup": speedup,
        "efficiency": speedup / workers,
        "step_s": {"median": step, "q1": 0.96 * step, "q3": 1.07 * step, "samples": []},
        "parts": {name: share * step for name, share in parts.items()},
        "hidden_communication": 0.0 if workers == 1 else 0.08 * step,
        "bytes_sent": None if not counted else round(2 * (workers - 1) / workers * 1_204_264),
        "payload_bytes": 0 if workers == 1 else 1_204_264, "algorithm": "slices in shared memory",
        "time_to_accuracy_s": None if workers == 8 else 120 * step, "steps_to_accuracy": 120,
        "final_loss": 0.1,
        "timeline": timeline(workers, 1e6 * step),
    }
    return {**made, "simulated": True} if simulated else made


def measurement(machine: str = "sample machine", scaling: str = "strong", counted: bool = False,
                speedups: dict[int, float] | None = None, simulated: bool = False) -> dict[str, Any]:
    """A whole measurement; `speedups` maps a worker count to its speedup."""
    speedups = speedups or {1: 1.0, 2: 1.62, 4: 2.31}
    return {
        "format": "bpkit-scaling/1",
        "machine": {"name": machine, "cpu": "invented CPU", "cores": 2, "gpus": [], "os": "Linux",
                    "python": "3.11", "torch": "2.13.0", "numpy": "2.0", "bpkit": "0.1.0",
                    "date": "2026-01-02T03:04:05"},
        "experiment": {"network": "mlp 64-512-512-10", "parameters": 301066, "data": "digits", "batch": 256,
                       "scaling": scaling, "plan": "data_parallel(buckets=3)", "backend": "shm",
                       "threads_per_worker": 1, "steps": 100, "repetitions": 5, "optimizer": "SGD", "seed": 0,
                       "target_accuracy": 0.97, "steal": 0.02},
        "noise": {"median": 1.0, "low": 0.96, "high": 1.05},
        "points": [point(n, 0.0042, s, counted, simulated) for n, s in speedups.items()],
    }


def write_page(folder: Path, *figures: Any, views: int = 1, theme: str = "") -> Path:
    """Write a page that holds the saved widgets `figures` as a built page does, each shown `views` times."""
    from ipywidgets.embed import embed_data

    data = embed_data(views=list(figures), drop_defaults=False)
    state = json.dumps(data["manager_state"]).replace("</", "<\\/")
    shown = "".join(
        f'<script type="application/vnd.jupyter.widget-view+json">{json.dumps(view)}</script>'
        for view in data["view_specs"] for _ in range(views))
    (folder / LOADER.name).write_text(LOADER.read_text(encoding="utf-8"), encoding="utf-8")
    path = folder / "page.html"
    path.write_text(
        f'<!doctype html><html lang="en"{theme}><head><meta charset="utf-8"><title>A page</title>'
        '<meta name="viewport" content="width=device-width, initial-scale=1"><link rel="icon" href="data:,">'
        f'<script type="application/vnd.jupyter.widget-state+json">{state}</script>'
        f'<script src="{LOADER.name}"></script>'
        '<style>:root {color-scheme: light dark} html[data-theme="dark"] {color-scheme: dark}'
        "body {background: light-dark(#fff, #121212); color: light-dark(#111, #eee)}</style>"
        f"</head><body><main><h1>A page</h1>{shown}</main></body></html>", encoding="utf-8")
    return path
