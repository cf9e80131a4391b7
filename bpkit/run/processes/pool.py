"""Persistent worker processes that run a function on every rank."""

import contextlib
import os
import sys
import threading
import time
import weakref
from collections.abc import Callable
from multiprocessing import connection
from typing import Any, Self

import numpy as np

from bpkit.given import whole_numbers
from bpkit.run.errors import CommunicationError, Stopped, WorkerDied, WorkerError, WorkerStuck
from bpkit.run.processes import devices
from bpkit.run.processes import parcel as payload
from bpkit.run.processes.imports import agrees, outdated
from bpkit.run.processes.launch import Workers, start_methods
from bpkit.run.transports.shared import files as memory
from bpkit.run.transports.shared import names as layout

BACKENDS = ("auto", "shm", "gloo", "nccl")
_TICK = 0.1  # seconds between two calls of `watch`
_GRACE = 1.0  # seconds in which the reason for a lost peer may show up

Watch = Callable[[np.ndarray], None]
Describe = Callable[[int, int, int], str]


def _check(workers: int, backend: str, threads: int, timeout: float, method: str, pin: bool) -> None:
    """Refuse bad arguments before any process starts."""
    if sys.platform == "win32":
        raise RuntimeError("bpkit's workers run on Linux and macOS; on Windows use WSL2 "
                           "(https://learn.microsoft.com/windows/wsl/install)")
    whole_numbers("Cluster", workers=workers, threads_per_worker=threads)
    if backend not in BACKENDS:
        raise ValueError(f"unknown backend {backend!r}: choose one of {', '.join(map(repr, BACKENDS))}")
    if not timeout > 0:
        raise ValueError(f"timeout must be a number of seconds above 0, not {timeout!r}")
    if method not in start_methods():
        raise ValueError(f"unknown start_method {method!r}: choose one of {', '.join(start_methods())}")
    if pin and not hasattr(os, "sched_setaffinity"):
        raise ValueError(f"pin=True works on Linux only: {sys.platform} lets no program choose its cores; leave it out")


def _choose(workers: int, backend: str, on: str) -> tuple[str, str]:
    """The transport to use for workers on a device, and the reason for it."""
    if backend in ("gloo", "nccl"):
        return backend, "asked for"
    if backend == "auto" and on == "cuda" and workers <= devices.gpus():
        return "nccl", "there is a GPU for each worker"
    needed, free = layout.needed(workers), memory.free_room()
    if needed > free:
        problem = memory.no_room(f"backend 'shm' with {workers} workers", needed, free)
        if backend == "shm":
            raise problem
        return "gloo", str(problem)
    return "shm", "asked for" if backend == "shm" else "all workers are on this host"


class Pool:
    """Worker processes, one a rank, that stay from call to call.

    They start at the first call, from a fork server that has loaded torch (by spawn where there is none),
    and start anew after a failure, and after a module that they imported was edited and reloaded. They end with
    `close`, with the pool, and within 2 s of the caller's death; so do the processes that they have started.

    The random numbers of torch, NumPy and ``random`` are unlike on all ranks and in all launches: a function that
    is to draw the same ones sets the seed. (Training draws from coordinates, not from these.)

    Parameters
    ----------
    workers : int
    backend : {"auto", "shm", "gloo", "nccl"}
        Transport; ``"auto"`` is NCCL on GPUs of their own, else shared memory, or gloo where that has no room (see
        `backend_reason`).
    threads_per_worker : int
        Threads of one worker's computations.
    timeout : float
        Seconds that a worker may wait for a peer.
    start_method : {"forkserver", "spawn"}, optional
        How processes start.
    device : {"auto", "cpu", "cuda"}
        What workers compute on; ``"auto"`` is CUDA only where there is a GPU for each worker.
    pin : bool
        Give each worker `threads_per_worker` cores of those that this process may use at the launch, in turn.

    Attributes
    ----------
    device : str
        The device chosen, ``"cpu"`` or ``"cuda"``.
    backend, backend_reason : str
        The transport chosen, and why.
    generation : int
        Number of launches so far; what workers keep (`Comm.cache`) lives as long as a generation.
    logs : list of str
        What each rank printed in the last call.

    Raises
    ------
    ValueError, RuntimeError
        For arguments that cannot work; no process has started then.
    """

    def __init__(self, workers: int, backend: str = "auto", threads_per_worker: int = 1, timeout: float = 60.0,
                 start_method: str | None = None, device: str = "auto", pin: bool = False) -> None:  # fmt: skip
        method = start_method or start_methods()[0]
        _check(workers, backend, threads_per_worker, timeout, method, pin)
        self.device = devices.choose(workers, backend, device)
        self.workers, self.threads_per_worker, self.timeout = workers, threads_per_worker, timeout
        self.backend, self.backend_reason = _choose(workers, backend, self.device)
        self.start_method, self.pin = method, pin
        self.generation = 0
        self.logs = [""] * workers
        self._lock = threading.RLock()  # `watch` may close the pool whose call it watches
        self._running: Workers | None = None
        self._finalizer: Any = None
        self._closed = False

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    @property
    def pids(self) -> tuple[int, ...]:
        """Process ids by rank; empty when no worker runs."""
        return tuple(process.pid for process in self._running.processes) if self._running else ()

    def start(self) -> None:
        """Start the workers, if they do not run (`call` does so by itself)."""
        with self._lock:
            self._start()

    def close(self) -> None:
        """End the workers, and a call that runs in another thread (`Stopped`). A closed pool takes no more calls."""
        self._closed = True
        with self._lock:
            self._end()

    def call(self, fn: Callable[..., Any], *args: Any, timeout: float | None = None, watch: Watch | None = None,
             describe: Describe | None = None, stop: threading.Event | None = None) -> list[Any]:  # fmt: skip
        """Run ``fn(comm, *args)`` on every rank and return the results by rank.

        Parameters
        ----------
        fn : callable
            Functions from cells, scripts and closures too (with cloudpickle); those of modules travel by name, and
            an edited module must be reloaded here first. ``comm`` has ``rank``, ``size``, ``send``, ``recv``,
            ``barrier`` and the collectives (see `bpkit.run.transports.comm.Comm`).
        *args
            Pickled once for all ranks. A worker may change what it gets; nobody else sees it. Of a tensor travels
            what lies between its first and last element.
        timeout : float, optional
            Limit for the whole call in seconds.
        watch : callable, optional
            Called about every 0.1 s with the ranks' marks, ``(workers, 2)`` int64: step and action index.
        describe : callable, optional
            ``describe(rank, step, index)`` gives the action's text for error messages.
        stop : threading.Event, optional
            Ends the run when set.

        Raises
        ------
        WorkerError
            A worker raised; its exception is the cause.
        WorkerDied
            A worker's process ended.
        WorkerStuck
            A worker waited for a peer longer than the pool's time-out, or `timeout` is over.
        Stopped
            `stop` was set, or the pool closed by another thread.
        CommunicationError
            A message was sent that nobody received.
        RuntimeError
            A module was edited and not reloaded, so that the workers ran another text of it than this program does.
        """
        try:
            parcel = payload.Parcel([(fn, args)], "call")
        except Exception as error:
            raise TypeError(payload.explain(fn, args, error)) from error
        try:
            with self._lock:
                self._start()
                assert self._running is not None
                run = _Run(self._running, getattr(fn, "__name__", repr(fn)), describe)
                try:
                    return run.results(parcel, timeout, watch, lambda: self._why_end(stop))
                except BaseException:
                    self._end()
                    raise
                finally:
                    self._take_logs(run.workers)
        finally:
            parcel.close()

    def _why_end(self, stop: threading.Event | None) -> str:
        """Why the call in flight is to end before its time; empty if it is not."""
        if self._closed:
            return "ended: its cluster was closed meanwhile"
        return "stopped" if stop is not None and stop.is_set() else ""

    def _start(self) -> None:
        if self._closed:
            raise RuntimeError("this pool is closed; make a new one")
        if self._running and (self._running.dead() or connection.wait(self._running.channels, 0)
                              or outdated(self._running.imported)):  # fmt: skip
            self._end()  # somebody killed a resting worker (its channel is at its end), or a module was edited
        if self._running is None:
            self._running = Workers(self.workers, self.backend, self.device, self.threads_per_worker, self.timeout,
                                    self.start_method, self.pin)  # fmt: skip
            self._finalizer = weakref.finalize(self, self._running.end)
            self.generation += 1

    def _end(self) -> None:
        if self._running:
            self._running.end()  # again, should an interrupt end this in the middle
            self._finalizer.detach()
            self._running = None

    def _take_logs(self, running: Workers) -> None:
        """Keep what the ranks printed, and print it, each line with its rank."""
        self.logs = [running.read_log(rank) for rank in range(self.workers)]
        for rank, text in enumerate(self.logs):
            for line in text.splitlines():
                print(f"[rank {rank}] {line}")


class _Run:
    """One call in flight: collects answers and finds out what went wrong."""

    def __init__(self, workers: Workers, name: str, describe: Describe | None) -> None:
        self.workers = workers
        self._name, self._describe = name, describe
        self._answers: dict[int, payload.Received] = {}

    def results(self, parcel: payload.Parcel, timeout: float | None, watch: Watch | None,
                why_end: Callable[[], str]) -> list[Any]:
        """Send the call, wait for every answer, and return the results by rank."""
        self.workers.board.clear()
        for channel in self.workers.channels:
            with contextlib.suppress(OSError):  # a dead worker: `_collect` finds it
                parcel.send(channel)
        limit = time.monotonic() + timeout if timeout is not None else float("inf")
        while len(self._answers) < len(self.workers.channels):
            if why := why_end():
                raise Stopped(f"{self._name}() was {why}")
            if time.monotonic() > limit:
                raise self._stuck(f"{self._name}() did not finish within {timeout:g} s")
            self._collect(min(_TICK, max(limit - time.monotonic(), 0.0)))
            failure = self._failure()
            if failure is not None:
                raise failure
            if watch is not None:
                watch(self.workers.board.marks.copy())
        loaded = [self._answers[rank].load(0) for rank in range(len(self.workers.channels))]
        _check_messages([messages for _, messages, _ in loaded])
        for name, known in (item for _, _, imported in loaded for item in imported.items()):
            if not agrees(name):
                raise RuntimeError(f"{name} was edited after this program imported it: the workers run {known[0]} as "
                                   "it is now, this program as it was; reload it (importlib.reload), or start anew")
            self.workers.imported[name] = known
        return [result for result, _, _ in loaded]

    def _collect(self, timeout: float) -> None:
        """Wait for something to happen and read the answers that came."""
        missing = {c: r for r, c in enumerate(self.workers.channels) if r not in self._answers}
        for ready in connection.wait([*missing, *(process.sentinel for process in self.workers.processes)], timeout):
            if ready in missing:
                try:
                    self._answers[missing[ready]] = payload.Received(ready, copy=True)  # type: ignore[arg-type]
                except (EOFError, OSError):
                    self.workers.processes[missing[ready]].join(1.0)

    def _failure(self) -> WorkerError | None:
        """The error to raise, if something failed: a death explains more than what its peers report."""
        if self._kinds("lost") and not self.workers.dead():
            deadline = time.monotonic() + _GRACE
            while time.monotonic() < deadline and not (self.workers.dead() or self._kinds("raised")):
                self._collect(0.05)
        dead = [rank for rank in self.workers.dead() if rank not in self._answers] or self.workers.dead()
        if dead:
            action = self._action(dead[0])
            return WorkerDied(f"rank {dead[0]} {self.workers.ending(dead[0])} in {action}", dead[0], action)
        for kind in ("raised", "stuck", "lost"):
            for rank in self._kinds(kind):
                return self._report(rank)
        return None

    def _kinds(self, kind: str) -> list[int]:
        return sorted(rank for rank, answer in self._answers.items() if answer.kind == kind)

    def _report(self, rank: int) -> WorkerError:
        answer, action = self._answers[rank], self._action(rank)
        text, short = answer.load(0)
        if answer.kind == "stuck":
            return self._stuck(f"rank {rank} {short} in {action}", rank)
        error = WorkerError(f"rank {rank} raised in {action}:\n{text}", rank, action)
        with contextlib.suppress(Exception):  # the text says it all
            error.__cause__ = answer.load(1)
        return error

    def _stuck(self, message: str, rank: int = -1) -> WorkerStuck:
        """A time-out, with what every other rank was doing."""
        others, done = [r for r in range(len(self.workers.channels)) if r != rank], self._kinds("result")
        lines = [f"rank {r}: {'had finished' if r in done else self._action(r)}" for r in others]
        return WorkerStuck("\n  ".join([message, *lines]), rank, self._action(rank) if rank >= 0 else "")

    def _action(self, rank: int) -> str:
        """What a rank is doing: the action of its mark, or the function, and what it waits in."""
        step, index = (int(x) for x in self.workers.board.marks[rank])
        text = f"{self._name}()"
        if self._describe is not None and step >= 0:
            text = f"step {step}, {self._describe(rank, step, index)}"
        waiting = self.workers.board.waiting(rank)
        return f"{text}, {waiting}" if waiting else text


def _check_messages(messages: list[tuple[list[int], list[int]]]) -> None:
    """Refuse a run that left a message behind: the next call would receive it."""
    for source, (sent, _) in enumerate(messages):
        for target, (_, received) in enumerate(messages):
            if sent[target] != received[source]:
                raise CommunicationError(f"rank {source} sent {sent[target]} messages to rank {target}, which received "
                                         f"{received[source]} of them, since these workers started")  # fmt: skip
