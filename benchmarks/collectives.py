"""All-reduce of float32 between two processes: our shared memory against gloo and Open MPI.

"gloo" is torch.distributed over TCP loopback: its only transport on one host. "Open MPI" is its shared memory,
driven by mpi4py, in place. "born" means that the tensor lies in memory from ``comm.empty``; "private" that it
is copied in and out. A memory copy of as many floats stands beside for information. One thread a process;
all are measured in turns. At the end a token goes back and forth a million times, checked.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from _harness import arguments, interleave, report, row

from bpkit.run.processes.pool import Pool
from bpkit.run.transports.comm import Comm

SIZES = {"2 thousand": 2_000, "20 thousand": 20_000, "200 thousand": 200_000, "3 million": 3_000_000,
         "20 million": 20_000_000}  # fmt: skip
FLOATS_A_TURN = 30_000_000  # one turn reduces about as many floats, and at most TIMES times
TIMES = 500
GLOO = "gloo (TCP loopback)"
MPI = "Open MPI (shared memory)"


def turn(comm: Comm, kind: str, n: int, times: int) -> float:
    """Seconds of one operation of `kind` on `n` floats, on this rank."""
    tensors = comm.cache.setdefault("tensors", {})
    if (kind, n) not in tensors:
        tensors[kind, n] = comm.empty(n) if kind == "born" else torch.full((n,), 0.0)
    tensor = tensors[kind, n]
    if kind == "copy":
        source = tensors.setdefault(("source", n), torch.full((n,), 0.0))
        step: Callable[[], object] = lambda: tensor.copy_(source)  # noqa: E731
    elif kind == "plain":
        step = lambda: torch.distributed.all_reduce(tensor)  # noqa: E731
    else:
        step = lambda: comm.all_reduce(tensor)  # noqa: E731
    step()  # the others' turns have emptied the caches
    comm.barrier()
    start = time.perf_counter()
    for _ in range(times):
        step()
    return (time.perf_counter() - start) / times


class OpenMPI:
    """Two ranks under mpirun that wait for commands. `reason` says why it cannot run, if it cannot."""

    def __init__(self) -> None:
        self.reason = self._missing()
        self._process: subprocess.Popen | None = None
        if self.reason:
            return
        self._folder = Path(tempfile.mkdtemp())
        for name in ("command0", "command1", "answer"):
            os.mkfifo(self._folder / name)
        peer = Path(__file__).with_name("_openmpi_peer.py")
        command = [self._mpirun(), "--allow-run-as-root", "--oversubscribe", "-n", "2", sys.executable, peer,
                   self._folder]  # fmt: skip
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        self._process = subprocess.Popen(list(map(str, command)), env=environment, stdin=subprocess.DEVNULL)
        self._answer = open(self._folder / "answer")  # noqa: SIM115
        self._commands = [open(self._folder / f"command{r}", "w") for r in (0, 1)]  # noqa: SIM115

    @staticmethod
    def _mpirun() -> str:
        beside = Path(sys.executable).with_name("mpirun")
        return str(beside) if beside.exists() else shutil.which("mpirun") or ""

    def _missing(self) -> str:
        # Not imported here: that would make this process a rank of its own, which leaves a file behind.
        if find_spec("mpi4py") is None:
            return "mpi4py is not installed"
        return "" if self._mpirun() else "there is no mpirun"

    def seconds(self, n: int, times: int) -> float:
        for pipe in self._commands:
            print(n, times, file=pipe, flush=True)
        return float(self._answer.readline())

    def close(self) -> None:
        if self._process:
            for pipe in self._commands:
                pipe.close()
            self._process.wait(20)
            self._answer.close()
            shutil.rmtree(self._folder)


def exchange(comm: Comm, times: int) -> int:
    """Pass a token back and forth; every hand-off changes it, so a lost or stale one changes the end."""
    token, peer = torch.zeros(1, dtype=torch.int64), 1 - comm.rank
    for _ in range(times // 2):
        if comm.rank == 0:
            comm.send(token.mul_(3).add_(1), peer)
            comm.recv(token, peer)
        else:
            comm.recv(token, peer)
            comm.send(token.mul_(5).add_(2), peer)
    return int(token)


def expected_token(times: int) -> int:
    token = 0
    for _ in range(times // 2):
        token = ((token * 3 + 1) * 5 + 2) % 2**64
    return token - 2**64 if token >= 2**63 else token


def hand_off(pool: Pool, times: int) -> dict[str, Any]:
    start = time.perf_counter()
    results = pool.call(exchange, times)
    seconds = time.perf_counter() - start
    ok = results[0] == expected_token(times)
    print(f"hand-off: {times:,} exchanges in {seconds:.1f} s, {seconds / times * 1e6:.2f} us each, "
          f"checksum {'right' if ok else 'WRONG'}")
    return {"exchanges": times, "seconds": seconds, "checksum_right": ok}


def rows_of(case: str, n: int, shm: Pool, gloo: Pool, mpi: OpenMPI, repetitions: int) -> list[dict[str, Any]]:
    """Measure all at one size, in turns."""
    times = max(2, min(TIMES, FLOATS_A_TURN // n))

    def run(pool: Pool, kind: str, times: int) -> Callable[[], float]:
        return lambda: max(pool.call(turn, kind, n, times))

    slow = max(2, times // 10)  # gloo: a turn as long as the others'
    runs = {"born": run(shm, "born", times), "private": run(shm, "private", times),
            "copy": run(shm, "copy", times), GLOO: run(gloo, "plain", slow), "our gloo": run(gloo, "ours", slow)}
    if not mpi.reason:
        runs[MPI] = lambda: mpi.seconds(n, times)
    for once in runs.values():
        once()
    seconds = interleave(runs, repetitions)

    def against(kind: str, peer: str, transport: str, peer_transport: str, info: bool) -> dict[str, Any]:
        name = {"born": "born", "private": "private", "our gloo": "gloo"}[kind]
        return row(f"{case}, {name}", peer, seconds[kind], seconds[peer], ours_transport=transport,
                   peer_transport=peer_transport, info=info)

    rows = [against("born", GLOO, "shm", "tcp loopback", False)]
    if not mpi.reason:  # no target is set at 20 thousand
        rows += [against("born", MPI, "shm", "shared memory", n == SIZES["20 thousand"])]
        rows += [against("private", MPI, "shm", "shared memory", True)]
    rows += [against("private", GLOO, "shm", "tcp loopback", True), against("born", "copy", "shm", "none", True),
             against("our gloo", GLOO, "gloo (TCP loopback)", "tcp loopback", True)]
    return rows


def main() -> None:
    options = arguments(__doc__)
    repetitions = 5 if options.quick else 15
    mpi = OpenMPI()
    if mpi.reason:
        print(f"no rows against Open MPI: {mpi.reason}")
    rows: list[dict[str, Any]] = []
    try:
        with Pool(2, "shm") as shm, Pool(2, "gloo") as gloo:
            for case, n in SIZES.items():
                rows += rows_of(case, n, shm, gloo, mpi, repetitions)
            handed = hand_off(shm, 50_000 if options.quick else 1_000_000)
        report(rows, options.json, hand_off=handed, skipped=mpi.reason)
    finally:
        mpi.close()


if __name__ == "__main__":
    main()
