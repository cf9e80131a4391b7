"""Files in shared memory that leave nothing behind.

A file is unlinked as soon as it is open wherever it is needed, so a killed program leaves no file. A
name carries the pid of the program for the short time between, and `sweep` removes those of dead pids.
"""

import contextlib
import errno
import itertools
import os
import re
import shutil
import tempfile
from pathlib import Path

from bpkit.run.errors import NoRoom

PREFIX = "bpkit"
_numbers = itertools.count()


def directory() -> str:
    """Where shared memory lives: ``/dev/shm`` on Linux, the folder for temporary files elsewhere."""
    return "/dev/shm" if os.path.isdir("/dev/shm") else tempfile.gettempdir()


def free_room() -> int:
    """Bytes that are free in shared memory now."""
    return shutil.disk_usage(directory()).free


def megabytes(count: float) -> str:
    """Bytes as text, e.g. ``"64.0 MB"``."""
    return f"{count / 1e6:,.1f} MB"


def no_room(what: str, needed: int, free: int | None = None) -> NoRoom:
    """The error for a shared memory that is too small: what is needed, what is free, what helps."""
    free = free_room() if free is None else free
    return NoRoom(f"{what} needs {megabytes(needed)} of shared memory, {megabytes(free)} are free in {directory()}: "
                  "enlarge it (docker run --shm-size=2g, or mount -o remount,size=2G /dev/shm), "
                  "or use backend='gloo'")  # fmt: skip


def unique_name() -> str:
    """A name nobody else uses; it carries this program's pid for `sweep`."""
    return f"{PREFIX}-{os.getpid()}-{next(_numbers)}-{os.urandom(3).hex()}"


def create(path: str, size: int, what: str, reserve: bool = True) -> int:
    """Open a new file of `size` bytes of zeros; with `reserve` its pages exist, so no later SIGBUS.

    Raises
    ------
    NoRoom
        When `size` bytes are not free.
    """
    if size > free_room():
        raise no_room(what, size)
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        if reserve and hasattr(os, "posix_fallocate"):
            os.posix_fallocate(fd, 0, max(size, 1))
        else:
            os.ftruncate(fd, max(size, 1))
    except OSError as error:
        os.close(fd)
        os.unlink(path)
        if error.errno == errno.ENOSPC:
            raise no_room(what, size) from None
        raise
    return fd


def anonymous(size: int, what: str, reserve: bool = True) -> int:
    """Like `create`, without a name: the descriptor is all there is."""
    path = os.path.join(directory(), unique_name())
    fd = create(path, size, what, reserve)
    os.unlink(path)
    return fd


def remove(name: str) -> None:
    """Remove the files and semaphores whose names begin with `name`."""
    for folder in {directory(), tempfile.gettempdir()}:
        for path in (*Path(folder).glob(f"{name}*"), *Path(folder).glob(f"sem.{name}*")):
            with contextlib.suppress(OSError):
                path.unlink()


def sweep() -> None:
    """Remove files that programs left which were killed in the short time while a file has a name."""
    found = [path.name for folder in {directory(), tempfile.gettempdir()} for path in Path(folder).glob(f"*{PREFIX}-*")]
    pids = {match[1] for name in found if (match := re.match(rf"(?:sem\.)?{PREFIX}-(\d+)-", name))}
    for pid in pids if os.path.isdir("/proc") else ():
        if not os.path.exists(f"/proc/{pid}"):
            remove(f"{PREFIX}-{pid}-")
