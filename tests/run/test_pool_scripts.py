"""Whole programs: a script without a main guard, a killed caller, an interrupt; nothing is left."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import textwrap
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

from .pools import gone

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]


def start(tmp_path: Path, text: str, before: Sequence[str] = (), flags: Sequence[str] = (),
          stdin: int | None = None, **variables: str) -> subprocess.Popen:  # fmt: skip
    script = tmp_path / "script.py"
    script.write_text(textwrap.dedent(text))
    environment = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"} | variables
    return subprocess.Popen([*before, sys.executable, *flags, str(script)], env=environment, cwd=tmp_path, text=True,
                            stdin=stdin, stdout=subprocess.PIPE, stderr=subprocess.PIPE, preexec_fn=_take_interrupts)


def _take_interrupts() -> None:
    """What a shell starts in the background ignores them, and so would what we start."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def family(pid: int) -> list[int]:
    """A process's descendants."""
    parents = {}
    for name in os.listdir("/proc"):
        if name.isdigit():
            try:
                parents[int(name)] = int(Path(f"/proc/{name}/stat").read_text().rsplit(")", 1)[1].split()[1])
            except OSError:
                continue
    found, border = [], [pid]
    while border:
        border = [child for child, parent in parents.items() if parent in border]
        found += border
    return found


def files_of(pid: int) -> list[str]:
    names = [name for folder in ("/dev/shm", tempfile.gettempdir()) for name in os.listdir(folder)]
    return [name for name in names if f"bpkit-{pid}-" in name]


@pytest.mark.parametrize("method", ["forkserver", "spawn"])
def test_a_script_without_a_main_guard(tmp_path: Path, method: str) -> None:
    process = start(tmp_path, f"""
        print("once")
        from dataclasses import dataclass
        import torch
        torch.ones(300, 300) @ torch.ones(300, 300)  # a fork of this process would hang
        from bpkit.run.processes.pool import Pool
        factor = 10
        @dataclass
        class Answer:
            value: int
        def f(comm):
            torch.ones(300, 300) @ torch.ones(300, 300)
            return Answer(factor * comm.rank)
        pool = Pool(2, start_method={method!r})
        assert pool.call(f) == [Answer(0), Answer(10)]
        print("end")
        """)  # fmt: skip
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0 and out.split() == ["once", "end"] and err == "", err
    assert not files_of(process.pid)


RUN = """
    import sys, time, torch
    from bpkit.run.processes.pool import Pool
    pool = Pool(3, {backend!r})
    def f(comm):
        tensor = comm.empty(1000)
        comm.mark[0] = 1
        comm.barrier()
        {body}
    try:
        pool.call(f, torch.ones(100_000), watch=lambda marks: marks.min(0)[0] == 1 and print("go"))
    except KeyboardInterrupt:
        print("interrupted", pool.pids)
        print(pool.call(lambda comm: comm.rank))
    """


@pytest.mark.parametrize("backend", ["shm", "gloo"])
@pytest.mark.parametrize("body", ["time.sleep(100)", "while True: pass", "comm.recv(None, (comm.rank + 1) % 3)"])
def test_a_killed_caller_leaves_nothing(tmp_path: Path, backend: str, body: str) -> None:
    text = RUN.replace("def f(comm)", "def f(comm, data)").format(backend=backend, body=body)
    process = start(tmp_path, text)
    assert process.stdout is not None and process.stdout.readline() == "go\n"
    children = family(process.pid)
    assert len(children) >= 5  # three workers, the fork server, the resource tracker
    process.kill()
    killed = time.monotonic()
    process.wait()
    assert gone(children, 2.0)
    print(f"all gone {time.monotonic() - killed:.2f} s after the caller")
    assert not files_of(process.pid)
    process.communicate()


def test_an_interrupt_ends_the_workers_and_leaves_a_usable_pool(tmp_path: Path) -> None:
    text = RUN.replace("def f(comm)", "def f(comm, data)").format(backend="shm", body="time.sleep(100)")
    process = start(tmp_path, text)
    assert process.stdout is not None and process.stdout.readline() == "go\n"
    workers = family(process.pid)
    for pid in [*workers, process.pid]:  # a terminal interrupts them all; the workers ignore it
        os.kill(pid, signal.SIGINT)
    out, err = process.communicate(timeout=30)
    assert [line for line in out.splitlines() if line != "go"] == ["interrupted ()", "[0, 1, 2]"], err
    assert process.returncode == 0 and gone(workers, 2.0) and not files_of(process.pid)


def test_files_of_the_dead_are_swept() -> None:
    from bpkit.run.transports.shared import files as memory

    process = subprocess.Popen([sys.executable, "-c", "pass"])
    process.wait()
    stale = [Path("/dev/shm") / f"{kind}{memory.prefix(process.pid)}0-abc" for kind in ("", "sem.")]
    living = Path("/dev/shm") / f"{memory.prefix(os.getpid())}living"
    for path in [*stale, living]:
        path.touch()
    try:
        memory.sweep()
        assert not any(path.exists() for path in stale) and living.exists()
    finally:
        living.unlink()
