"""What runs in a worker process: join the others, then answer calls until the caller goes.

This module is preloaded by the fork server, which never computes: a forked child of a process that has
run a multi-threaded product hangs.
"""

import contextlib
import mmap
import multiprocessing
import os
import pickle
import signal
import sys
import threading
import traceback
from multiprocessing import connection, reduction
from multiprocessing.connection import Connection
from typing import Any

import torch

from bpkit.run.errors import CommunicationError, PeerTimeout
from bpkit.run.processes.parcel import Parcel, Received
from bpkit.run.transports.comm import Comm
from bpkit.run.transports.shared.names import Layout
from bpkit.run.transports.shared.semaphores import Block
from bpkit.run.transports.shared.transport import SharedMemoryComm
from bpkit.run.transports.through_host import Staged


def main(rank: int, channel: Connection) -> None:
    """Entry point of the process of `rank`."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # an interrupt is the caller's to handle
    files: list[str] = []
    threading.Thread(target=_die_with_parent, args=(files,), daemon=True).start()
    try:
        comm = _join(rank, channel, files)
    except BaseException as error:
        channel.send(("failed", "".join(traceback.format_exception(error))))
        return
    channel.send(("ready", None))
    while True:
        try:
            call = Received(channel)
        except (EOFError, OSError):
            return
        _answer(comm, call, channel)


def _die_with_parent(files: list[str]) -> None:
    """End when the caller is gone, and remove the files that it no longer can."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        connection.wait([parent.sentinel])
        for path in files:
            with contextlib.suppress(OSError):
                os.unlink(path)
        os._exit(1)


def _join(rank: int, channel: Connection, files: list[str]) -> Comm:
    """Take over the caller's environment and join the transport."""
    setup: dict[str, Any] = channel.recv()
    files.append(setup["path"])
    log, control, mail = (reduction.recv_handle(channel) for _ in range(3))
    os.environ.clear()  # a fork server keeps the environment of its own start
    os.environ.update(setup["environment"])
    os.chdir(setup["folder"])
    for descriptor in (1, 2):
        os.dup2(log, descriptor)
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(line_buffering=True)  # type: ignore[union-attr]  # a killed worker's lines are kept
    torch.set_num_threads(setup["threads"])
    there = _take(rank, setup["device"])
    size = setup["ranks"]
    block = Block(memoryview(mmap.mmap(control, Block.size(size))), size)
    os.close(control)
    if setup["backend"] == "shm":
        layout: Layout = setup["layout"]
        comm: Comm = SharedMemoryComm(rank, layout, mail, block, setup["timeout"])
    else:
        from bpkit.run.transports.distributed import DistributedComm, loopback

        loopback()
        comm = DistributedComm(rank, size, block, setup["backend"], setup["timeout"], setup["path"])
    return comm if comm.device.type == there.type else Staged(comm, there)


def _take(rank: int, device: str) -> torch.device:
    """The device of this process, from now on its current one; nothing has touched CUDA before."""
    if device == "cuda":
        torch.cuda.set_device(rank % torch.cuda.device_count())
    return torch.device(device)


def _answer(comm: Comm, call: Received, channel: Connection) -> None:
    """Run one call and send its result or its error."""
    try:
        function, args = call.load(0)
        sent, received = list(comm.sent_to), list(comm.received_from)
        result = function(comm, *args)
        comm.finish()
        messages = ([b - a for a, b in zip(sent, comm.sent_to, strict=True)],
                    [b - a for a, b in zip(received, comm.received_from, strict=True)])
        parcel, kind = Parcel([(result, messages)]), "result"
    except BaseException as error:
        kind, parcel = _failure(error)
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    parcel.send(channel, kind)
    parcel.close()


def _failure(error: BaseException) -> tuple[str, Parcel]:
    """An error as text, and as an object where it can be pickled."""
    kinds: dict[type, str] = {PeerTimeout: "stuck", CommunicationError: "lost"}
    kind = "lost" if "Connection closed by peer" in str(error) else kinds.get(type(error), "raised")
    text = "".join(traceback.format_exception(error)).rstrip()
    try:
        parcel = Parcel([(text, str(error)), error])
        pickle.loads(parcel.streams[1][0], buffers=parcel.buffers(1))
    except BaseException:
        parcel = Parcel([(text, str(error)), None])
    return kind, parcel
