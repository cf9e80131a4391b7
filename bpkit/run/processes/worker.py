"""What runs in a worker process: join the others, then answer calls until the caller goes.

This module is preloaded by the fork server, which never computes: a forked child of a process that has
run a multi-threaded product hangs.
"""

import contextlib
import multiprocessing
import os
import random
import shutil
import signal
import sys
import threading
import traceback
from multiprocessing import connection
from multiprocessing.connection import Connection
from typing import Any

import numpy.random  # here, so that the fork server has it: it takes longer than all else of a start
import torch

from bpkit.run.errors import CommunicationError, PeerTimeout
from bpkit.run.processes.imports import Imports
from bpkit.run.processes.parcel import Parcel, Received
from bpkit.run.transports.board import Board
from bpkit.run.transports.comm import Comm
from bpkit.run.transports.shared.transport import SharedMemoryComm
from bpkit.run.transports.through_host import Staged


def main(rank: int, channel: Connection, setup: dict[str, Any]) -> None:
    """Entry point of the process of `rank`."""
    if cores := setup["cores"]:  # first of all, so that threads and memory are where these are
        first, threads = rank * setup["threads"], setup["threads"]
        os.sched_setaffinity(0, {cores[core % len(cores)] for core in range(first, first + threads)})
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # an interrupt is the caller's to handle
    os.setpgid(0, 0)  # a group with the processes that calls start: they end together
    multiprocessing.current_process().daemon = False  # which may have no processes of its own
    multiprocessing.set_start_method(setup["method"], force=True)  # for these, as in the caller
    threading.Thread(target=_die_with_caller, args=(setup,)).start()  # no daemon: this process ends when it has ended
    try:
        comm = _join(rank, setup)
    except BaseException as error:
        channel.send("".join(traceback.format_exception(error)))
        return
    channel.send("")
    imports = Imports()
    while True:
        try:
            call = Received(channel)
        except (EOFError, OSError):
            return
        _answer(comm, call, channel, imports)


def _die_with_caller(setup: dict[str, Any]) -> None:
    """End when the caller is gone, with the processes of this worker, and remove the folder that it no longer can.

    The caller's end of a pipe lives on in processes that it forked, so its process itself is watched too; and where
    a start was interrupted that end is closed while the caller lives.
    """
    caller, mother = multiprocessing.parent_process(), os.getppid()
    assert caller is not None and caller.pid is not None
    ends: list[Any] = [caller.sentinel]
    with contextlib.suppress(AttributeError, OSError):  # an old kernel, or no Linux: the mother tells
        ends.append(os.pidfd_open(caller.pid))
    while not connection.wait(ends, 0.5) and os.getppid() == mother:
        pass
    if connection.wait(ends[1:], 1.0) or os.getppid() != mother == caller.pid:
        shutil.rmtree(setup["meeting"], ignore_errors=True)
        if os.getppid() == setup.get("server"):  # kept by the same processes
            os.kill(os.getppid(), signal.SIGKILL)
    os.killpg(0, signal.SIGKILL)


def _join(rank: int, setup: dict[str, Any]) -> Comm:
    """Take over the caller's environment and join the transport."""
    os.environ.clear()  # a fork server keeps the environment of its own start
    os.environ.update(setup["environment"])
    os.chdir(setup["folder"])
    for descriptor in (1, 2):
        os.dup2(setup["log"], descriptor)
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(line_buffering=True)  # type: ignore[union-attr]  # a killed worker's lines are kept
    torch.set_num_threads(setup["threads"])
    for seed in (torch.seed, numpy.random.seed, random.seed):
        seed()  # forked from one server, all ranks and launches would draw the same numbers
    there = torch.device(setup["device"])
    if there.type == "cuda":  # which nothing has touched before
        torch.cuda.set_device(rank % torch.cuda.device_count())
    size, timeout = setup["ranks"], setup["timeout"]
    board = Board(setup["control"], size)
    if setup["backend"] == "shm":
        comm: Comm = SharedMemoryComm(rank, setup["layout"], setup["mail"], board, timeout)
    else:
        from bpkit.run.transports.distributed import DistributedComm, loopback

        loopback()
        comm = DistributedComm(rank, size, board, setup["backend"], timeout, setup["path"])
    return comm if comm.device.type == there.type else Staged(comm, there)


def _answer(comm: Comm, call: Received, channel: Connection, imports: Imports) -> None:
    """Run one call and send its result or its error."""
    try:
        function, args = call.load(0)
        result = function(comm, *args)
        comm.finish()
        parcel = Parcel([(result, (comm.sent_to, comm.received_from), imports.new())], "result")
    except BaseException as error:
        parcel = _failure(error)
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    parcel.send(channel)
    parcel.close()


def _failure(error: BaseException) -> Parcel:
    """An error as text, and as an object where it can be pickled."""
    kinds: dict[type, str] = {PeerTimeout: "stuck", CommunicationError: "lost"}
    kind = "lost" if "Connection closed by peer" in str(error) else kinds.get(type(error), "raised")
    text = "".join(traceback.format_exception(error)).rstrip(), str(error)
    try:
        parcel = Parcel([text, error], kind)
        parcel.load(1)
        return parcel
    except BaseException:
        return Parcel([text], kind)
