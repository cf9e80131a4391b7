"""Each program to take away runs on two processes, as its first lines say."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

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
