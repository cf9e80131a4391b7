"""Files in shared memory that leave nothing behind.

A file is unlinked as soon as it is open wherever it is needed, so a killed program leaves no file. A
name carries the program's pid for the short time between, and the world in which pids mean what they do here:
`sweep` removes those of the dead of this world, and lets alone what another container or host has put there.
"""

import contextlib
import errno
import functools
import hashlib
import itertools
import os
import re
import shutil
import tempfile
from pathlib import Path

from bpkit.run.errors import NoRoom

PREFIX = "bpkit"
SHORT = ("/tmp", "/var/tmp", "/dev/shm")  # where sockets may lie if the folder for temporary files has a long path
_numbers = itertools.count()


def directory() -> str:
    """Where shared memory lives: ``/dev/shm`` on Linux, the folder for temporary files elsewhere."""
    return "/dev/shm" if os.path.isdir("/dev/shm") else tempfile.gettempdir()


def free_room() -> int:
    """Bytes that are free in shared memory now; none where it cannot be written."""
    return shutil.disk_usage(directory()).free if os.access(directory(), os.W_OK) else 0


def megabytes(count: float) -> str:
    """Bytes as text, e.g. ``"64.0 MB"``."""
    return f"{count / 1e6:,.1f} MB"


def no_room(what: str, needed: int, free: int | None = None) -> NoRoom:
    """The error for a shared memory that is too small: what is needed, what is free, what helps."""
    free = free_room() if free is None else free
    state = "" if os.access(directory(), os.W_OK) else ", which is read-only"
    return NoRoom(f"{what} needs {megabytes(needed)} of shared memory, {megabytes(free)} are free in {directory()}"
                  f"{state}: enlarge it (docker run --shm-size=2g, or mount -o remount,rw,size=2G /dev/shm), "
                  "or use backend='gloo'")  # fmt: skip


@functools.cache
def world() -> str:
    """What tells this boot and its namespace of pids from others that may see the same files; empty if not Linux."""
    try:
        boot, pids = Path("/proc/sys/kernel/random/boot_id").read_text(), os.stat("/proc/self/ns/pid").st_ino
    except OSError:
        return ""
    return hashlib.blake2b(f"{boot} {pids}".encode(), digest_size=4).hexdigest() + "-"


def prefix(pid: int) -> str:
    """What the names of a program of this world begin with."""
    return f"{PREFIX}-{pid}-{world()}"


def unique_name() -> str:
    """A name nobody else uses; it tells `sweep` whose it is."""
    return f"{prefix(os.getpid())}{next(_numbers)}-{os.urandom(3).hex()}"


def create(path: str, size: int, what: str) -> int:
    """Open a new file of `size` bytes of zeros, whose pages exist, so no later SIGBUS.

    Raises
    ------
    NoRoom
        When `size` bytes are not free.
    """
    if size > free_room():
        raise no_room(what, size)
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        getattr(os, "posix_fallocate", lambda fd, start, size: os.ftruncate(fd, size))(fd, 0, max(size, 1))
    except OSError as error:
        os.close(fd)
        os.unlink(path)
        if error.errno == errno.ENOSPC:
            raise no_room(what, size) from None
        raise
    return fd


def unnamed(size: int) -> int:
    """A file of zeros without a name, which on Linux needs no room where shared memory lives."""
    if hasattr(os, "memfd_create"):
        fd = os.memfd_create(PREFIX)
    else:
        fd, path = tempfile.mkstemp()
        os.unlink(path)
    os.ftruncate(fd, size)
    return fd


def remove(name: str) -> None:
    """Remove the files, folders and semaphores whose names begin with `name`."""
    for path in _found(name):
        with contextlib.suppress(OSError):
            shutil.rmtree(path) if path.is_dir() else path.unlink()


def _found(name: str) -> list[Path]:
    """What lies under names that begin with `name`, wherever names of ours may lie."""
    folders = [folder for folder in {tempfile.gettempdir(), *SHORT} if os.access(folder, os.R_OK)]
    return [Path(folder, entry) for folder in folders for entry in os.listdir(folder)
            if entry.removeprefix("sem.").startswith(name)]  # fmt: skip


def sweep() -> None:
    """Remove what programs of this world left which were killed while something had a name."""
    pids = {int(match[1]) for path in _found(PREFIX) if (match := re.search(rf"{PREFIX}-(\d+)-{world()}", path.name))}
    for pid in pids if world() else ():
        if not os.path.exists(f"/proc/{pid}"):
            remove(prefix(pid))
