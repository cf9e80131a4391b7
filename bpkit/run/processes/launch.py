"""The processes of one launch: started together, ended together."""

import contextlib
import functools
import multiprocessing
import os
import shutil
import signal
import sys
import tempfile
import threading
import time
import weakref
from collections.abc import Iterator
from multiprocessing import connection, forkserver, reduction, resource_tracker, spawn
from multiprocessing.util import Finalize
from typing import Any

from bpkit.run.errors import WorkerDied
from bpkit.run.processes import devices, worker
from bpkit.run.processes.imports import Version
from bpkit.run.transports.board import Board
from bpkit.run.transports.shared import files as memory
from bpkit.run.transports.shared import names

_START_LIMIT = 120.0  # seconds until every worker must have joined
_LONGEST = 60  # characters of the path of a folder for sockets, whose own paths may have 107 (103 on macOS)
_main_lock = threading.Lock()


@functools.cache
def _meeting(pid: int) -> str:
    """The folder in which the processes of this program (`pid`) meet: that of the fork server's socket, too.

    It goes with the program; where that is killed, its workers remove it, or the `sweep` of the next program.
    """
    for place in (tempfile.gettempdir(), *memory.SHORT):
        if len(place) <= _LONGEST and os.access(place, os.W_OK):
            folder = tempfile.mkdtemp(prefix=memory.prefix(pid), dir=place)
            Finalize(None, shutil.rmtree, (folder, True), exitpriority=-100)  # a forked copy of the program does not
            return folder
    raise OSError(f"no folder for the sockets of workers: the path of {tempfile.gettempdir()} is too long, and none of "
                  f"{', '.join(memory.SHORT)} can be written: set TMPDIR to one of at most {_LONGEST} characters")


@contextlib.contextmanager
def _apart(meeting: str) -> Iterator[None]:
    """Start processes that do not import the user's ``__main__``: scripts need no main guard, and
    nothing of a notebook runs twice. What a worker needs of ``__main__`` travels with the function.
    A fork server that is started for them has its socket in the folder `meeting`."""
    me, original = threading.get_ident(), spawn.get_preparation_data
    config = multiprocessing.current_process()._config  # type: ignore[attr-defined]

    def filtered(name: str) -> dict[str, Any]:
        data = original(name)
        if threading.get_ident() == me:
            for key in ("init_main_from_name", "init_main_from_path", "dir"):  # the worker goes where the caller is now
                data.pop(key, None)
        return data

    with _main_lock:
        before = config.get("tempdir")
        spawn.get_preparation_data, config["tempdir"] = filtered, meeting
        try:
            yield
        finally:
            spawn.get_preparation_data, config["tempdir"] = original, before


class _Descriptor:
    """An open file on its way to a process that is being started, which gets the number of its own descriptor."""

    def __init__(self, fd: int) -> None:
        self._fd = fd

    def __reduce__(self) -> tuple[Any, ...]:
        copy = reduction.DupFd(self._fd)
        return type(copy).detach, (copy,)


@contextlib.contextmanager
def _uninterrupted() -> Iterator[None]:
    """Ctrl-C, which a terminal sends to all, does not end what starts here: an interrupt is the caller's to handle."""
    resource_tracker.ensure_running()  # which would lift the mask
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def start_methods() -> list[str]:
    """The ways to start workers here, the default first. Never fork: see `bpkit.run.processes.worker`."""
    return ["forkserver", "spawn"] if sys.platform == "linux" else ["spawn"]


class Workers:
    """The processes of one launch, their channels, their logs and the board.

    Attributes
    ----------
    processes, channels : list
        By rank.
    board : Board
    imported : dict
        Modules that workers have imported, with the version of each.
    """

    def __init__(self, ranks: int, backend: str, device: str, threads: int, timeout: float, method: str,
                 pin: bool) -> None:  # fmt: skip
        if backend == "gloo":
            devices.check_interface()
        self._pid = os.getpid()
        self.processes: list[Any] = []
        self.channels: list[Any] = []
        self.imported: dict[str, Version] = {}
        self._logs: list[int] = []
        self._read = [0] * ranks
        memory.sweep()
        meeting = _meeting(self._pid)
        self._name = memory.unique_name()
        self._path = os.path.join(meeting, self._name)
        try:
            with contextlib.ExitStack() as joining:
                control = memory.unnamed(Board.size(ranks))
                joining.callback(os.close, control)
                self.board = Board(control, ranks)
                setup = {"backend": backend, "device": device, "ranks": ranks, "threads": threads, "timeout": timeout,
                         "meeting": meeting, "path": self._path, "environment": dict(os.environ),
                         "folder": os.getcwd(), "cores": sorted(os.sched_getaffinity(0)) if pin else [],
                         "control": _Descriptor(control),
                         "method": multiprocessing.get_start_method(allow_none=True)}  # fmt: skip
                if backend == "shm":
                    setup["layout"], mail = joining.enter_context(names.meeting(ranks, self._name))
                    setup["mail"] = _Descriptor(mail)
                with _apart(meeting):
                    self._start(ranks, method, setup)
                self._until_ready()
        except BaseException:
            self.end()
            raise
        for rank in range(ranks):
            self.read_log(rank)  # what libraries print while they join is nobody's result

    def _start(self, ranks: int, method: str, setup: dict[str, Any]) -> None:
        context: Any = multiprocessing.get_context(method)
        if method == "forkserver":
            context.set_forkserver_preload(["torch", "bpkit.run.processes.worker", "bpkit.run.cluster"])
            with _uninterrupted():
                forkserver.ensure_running()
            setup["server"] = forkserver._forkserver._forkserver_pid  # type: ignore[attr-defined]
        for rank in range(ranks):
            with tempfile.TemporaryFile() as log:
                self._logs.append(os.dup(log.fileno()))
            weakref.finalize(self, os.close, self._logs[rank])
            ours, theirs = context.Pipe()
            self.channels.append(ours)
            args = rank, theirs, setup | {"log": _Descriptor(self._logs[rank])}
            self.processes.append(context.Process(target=worker.main, args=args, name=f"bpkit-{rank}", daemon=True))
            with _uninterrupted() if method == "spawn" else contextlib.nullcontext():
                self.processes[rank].start()
            theirs.close()

    def _until_ready(self) -> None:
        deadline = time.monotonic() + _START_LIMIT
        for rank, (channel, process) in enumerate(zip(self.channels, self.processes, strict=True)):
            if not connection.wait([channel, process.sentinel], max(0.0, deadline - time.monotonic())):
                raise WorkerDied(f"rank {rank} did not start within {_START_LIMIT:g} s", rank, "start")
            try:
                problem = channel.recv()
            except (EOFError, OSError):
                log = self.read_log(rank)
                text = f"rank {rank} {self.ending(rank)} while starting" + (f":\n{log}" if log else "")
                raise WorkerDied(text, rank, "start") from None
            if problem:
                raise RuntimeError(f"rank {rank} could not join the others:\n{problem}")

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

    def read_log(self, rank: int) -> str:
        """What a rank has printed since the last look."""
        fd, start = self._logs[rank], self._read[rank]
        data = os.pread(fd, os.fstat(fd).st_size - start, start)
        self._read[rank] += len(data)
        return data.decode(errors="replace")

    def end(self) -> None:
        """Kill every process, with those that its calls have started, and wait until it is gone; may be repeated."""
        if os.getpid() != self._pid:  # a forked copy of the caller owns nothing
            return
        started = [process for process in self.processes if process.pid]
        for process in started:
            _kill(process)
        for process in started:
            process.join(5.0)
        for channel in self.channels:
            channel.close()
        with contextlib.suppress(OSError):
            os.unlink(self._path)
        memory.remove(f"{self._name}-")  # workers may have been ended between making a file and unlinking it


def _kill(process: Any) -> None:
    """Kill a worker with its group, which may have outlived it."""
    with contextlib.suppress(OSError):
        try:
            ours = process.is_alive() or not os.getpgid(process.pid)
        except ProcessLookupError:
            ours = True  # its number is not another's by now
        if ours:
            os.killpg(process.pid, signal.SIGKILL)
    process.kill()  # it may not have made its group yet
