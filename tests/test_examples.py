"""Each program to take away runs on two processes, as its first lines say."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.parametrize("path", sorted((ROOT / "examples").glob("pytorch_*.py")), ids=lambda path: path.stem)
def test_it_runs_on_two_processes(path: Path) -> None:
    assert f"torchrun --nproc-per-node 2 examples/{path.name}" in path.read_text()
    loopback = "lo0" if sys.platform == "darwin" else "lo"
    run = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", path],
                         env=os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": loopback},
                         cwd=ROOT, capture_output=True, text=True, timeout=100)  # fmt: skip
    assert run.returncode == 0, run.stderr[-3000:]
    assert run.stdout.strip(), "it says nothing of what it found"


@pytest.mark.parametrize("broken", [float("inf"), float("nan")])
def test_a_checked_update_leaves_out_a_step_that_is_not_finite(broken: float, tmp_path: Path) -> None:
    path = ROOT / "examples" / "pytorch_split_backward.py"
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    stage = torch.nn.Linear(3, 2)
    before = [p.detach().clone() for p in stage.parameters()]
    for p in stage.parameters():
        p.grad = torch.ones_like(p)
    stage.weight.grad[0, 0] = broken
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/meet", rank=0, world_size=1)
    try:
        example.step_with_validation(stage, torch.optim.SGD(stage.parameters(), lr=0.5))
    finally:
        dist.destroy_process_group()
    assert all(torch.equal(p, old) for p, old in zip(stage.parameters(), before, strict=True))
