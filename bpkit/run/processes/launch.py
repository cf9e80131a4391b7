"""The processes of one launch: started together, ended together."""

import contextlib
import mmap
import multiprocessing
import os
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from multiprocessing import connection, reduction, spawn
from typing import Any

import numpy as np

from bpkit.run.errors import WorkerDied
from bpkit.run.processes import worker
from bpkit.run.transports.shared import files as memory
from bpkit.run.transports.shared.names import Hub
from bpkit.run.transports.shared.semaphores import Block

_START_LIMIT = 120.0  # seconds until every worker must have joined
_main_lock = threading.Lock()


@contextlib.contextmanager
def _without_main() -> Iterator[None]:
    """Start processes that do not import the user's ``__main__``: scripts need no main guard, and
    nothing of a notebook runs twice. What a worker needs of ``__main__`` travels with the function."""
    me, original = threading.get_ident(), spawn.get_preparation_data

    def filtered(name: str) -> dict[str, Any]:
        data = original(name)
        if threading.get_ident() == me:
            data.pop("init_main_from_name", None)
            data.pop("init_main_from_path", None)
        return data

    with _main_lock:
        spawn.get_preparation_data = filtered
        try:
            yield
        finally:
            spawn.get_preparation_data = original


def start_methods() -> list[str]:
    """The ways to start workers here, the default first. Never fork: see `bpkit.run.processes.worker`."""
    return ["forkserver", "spawn"] if sys.platform == "linux" else ["spawn"]


class Workers:
    """The processes of one launch, their channels, their logs and the shared block.

    Attributes
    ----------
    processes, channels : list
        By rank.
    block : Block
    """

    def __init__(self, ranks: int, backend: str, device: str, threads: int, timeout: float, method: str) -> None:
        self._pid = os.getpid()
        self.processes: list[Any] = []
        self.channels: list[Any] = []
        self._logs = [tempfile.TemporaryFile() for _ in range(ranks)]  # noqa: SIM115
        self._read = [0] * ranks
        self._hub: Hub | None = None
        # Where the processes of torch.distributed find each other, later groups of them too.
        self._path = os.path.join(tempfile.gettempdir(), memory.unique_name())
        control = memory.anonymous(Block.size(ranks), "the workers' shared block")
        try:
            self.block = Block(memoryview(mmap.mmap(control, Block.size(ranks))), ranks)
            self._hub = Hub(ranks) if backend == "shm" else None
            setup = {"backend": backend, "device": device, "ranks": ranks, "threads": threads, "timeout": timeout,
                     "path": self._path, "layout": self._hub.layout if self._hub else None,
                     "environment": dict(os.environ), "folder": os.getcwd()}  # fmt: skip
            self._start(ranks, method)
            self._set_up(setup, control, self._hub.fd if self._hub else control)
            self._until_ready()
        except BaseException:
            self.end()
            raise
        finally:
            os.close(control)
            if self._hub:
                os.close(self._hub.fd)
                self._hub.unlink()
        for rank in range(ranks):
            self.read_log(rank)  # what libraries print while they join is nobody's result

    def _start(self, ranks: int, method: str) -> None:
        context: Any = multiprocessing.get_context(method)
        if method == "forkserver":
            context.set_forkserver_preload(["torch", "bpkit.run.processes.worker", "bpkit.run.cluster"])
        with _without_main():
            for rank in range(ranks):
                ours, theirs = context.Pipe()
                self.channels.append(ours)
                process = context.Process(target=worker.main, args=(rank, theirs), name=f"bpkit-{rank}", daemon=True)
                process.start()
                self.processes.append(process)
                theirs.close()

    def _set_up(self, setup: dict[str, Any], control: int, mail: int) -> None:
        for channel, log in zip(self.channels, self._logs, strict=True):
            with contextlib.suppress(BrokenPipeError):  # its death is found in `_until_ready`
                channel.send(setup)
                for fd in (log.fileno(), control, mail):
                    reduction.send_handle(channel, fd, 0)

    def _until_ready(self) -> None:
        deadline = time.monotonic() + _START_LIMIT
        for rank, (channel, process) in enumerate(zip(self.channels, self.processes, strict=True)):
            while not channel.poll():
                if time.monotonic() > deadline:
                    raise WorkerDied(f"rank {rank} did not start within {_START_LIMIT:g} s", rank, "start")
                if not process.is_alive() and not channel.poll():
                    raise self._died_at_start(rank)
                connection.wait([channel, process.sentinel], 1.0)
            try:
                state, text = channel.recv()
            except (EOFError, OSError):
                raise self._died_at_start(rank) from None
            if state != "ready":
                raise RuntimeError(f"rank {rank} could not join the others:\n{text}")

    def _died_at_start(self, rank: int) -> WorkerDied:
        log = self.read_log(rank)
        return WorkerDied(f"rank {rank} {self.ending(rank)} while starting" + (f":\n{log}" if log else ""),
                          rank, "start")

    def ending(self, rank: int) -> str:
        """How a dead worker ended, as text."""
        process = self.processes[rank]
        process.join(1.0)
        code = process.exitcode
        if code is None or code >= 0:
            return f"ended without an answer (exit code {code})"
        name = signal.Signals(-code).name
        hint = " (shared memory may be full)" if name == "SIGBUS" else ""
        return f"was killed by {name}{hint}"

    def dead(self) -> list[int]:
        """Ranks whose process has ended."""
        return [rank for rank, process in enumerate(self.processes) if not process.is_alive()]

    def marks(self) -> np.ndarray:
        """A copy of the ranks' marks, ``(ranks, 2)``."""
        return self.block.marks.copy()

    def read_log(self, rank: int) -> str:
        """What a rank has printed since the last look."""
        fd, parts = self._logs[rank].fileno(), []
        while data := os.pread(fd, 1 << 20, self._read[rank]):
            parts.append(data)
            self._read[rank] += len(data)
        return b"".join(parts).decode(errors="replace")

    def end(self) -> None:
        """Kill every process and wait until it is gone."""
        if os.getpid() != self._pid:  # a forked copy of the caller owns nothing
            return
        for process in self.processes:
            with contextlib.suppress(OSError):
                process.kill()
        for process in self.processes:
            process.join(5.0)
        for channel in self.channels:
            channel.close()
        with contextlib.suppress(OSError):
            os.unlink(self._path)
        if self._hub:  # workers that were ended between making a file and unlinking it
            memory.remove(f"{self._hub.layout.name}-")
