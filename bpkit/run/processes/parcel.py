"""What travels between the caller and its workers: pickled once, big parts through one shared file.

The pickle stream (protocol 5) leaves the memory of CPU tensors and arrays out of band. A parcel above
`SMALL` bytes is written once into an unnamed file in shared memory whose descriptor goes to every
worker; each maps it copy-on-write, so ranks neither copy it nor see each other's changes.

Tensors that share memory still share it on arrival, and it travels once: from the first to the last element that
any of them has, so 8 rows of a large tensor cost what 8 rows cost (and every thousandth row what all rows cost).
"""

import io
import mmap
import os
import pickle
import sys
from collections.abc import Callable, Sequence
from multiprocessing import reduction
from multiprocessing.connection import Connection
from typing import Any

import numpy as np
import torch

from bpkit.run.errors import NoRoom
from bpkit.run.transports.shared import files as memory

SMALL = 65536
_ALIGN = 64


class _Storage:
    """The memory of one or more tensors, as far as they use it; pickled once a stream, so views stay views."""

    def __init__(self, storage: torch.UntypedStorage) -> None:
        self._raw = torch.empty(0, dtype=torch.uint8).set_(storage).numpy()  # type: ignore[call-overload]
        self._used = np.array([len(self._raw), 0])  # first and last-plus-one byte; known once all is pickled
        self.whole = pickle.PickleBuffer(self._raw.data)

    def use(self, first: int, last: int) -> None:
        """Some tensor has these bytes."""
        self._used[:] = min(self._used[0], first - first % _ALIGN), max(self._used[1], last)

    def part(self) -> pickle.PickleBuffer:
        """What travels in place of the whole."""
        return pickle.PickleBuffer(self._raw[slice(*self._used)].data)

    def __reduce__(self) -> tuple:
        return _storage_from, (self.whole, pickle.PickleBuffer(self._used.data))


def _storage_from(buffer: Any, used: Any) -> tuple[torch.Tensor, int]:
    raw = torch.frombuffer(buffer, dtype=torch.uint8) if len(memoryview(buffer)) else torch.empty(0, dtype=torch.uint8)
    return raw, int(np.frombuffer(used, np.int64)[0])


def _tensor_from(memory: tuple[torch.Tensor, int], dtype: torch.dtype, offset: int, shape: tuple, stride: tuple,
                 grad: bool) -> torch.Tensor:
    raw, first = memory
    start = max(0, offset - first // dtype.itemsize)
    return torch.empty(0, dtype=dtype).set_(raw.untyped_storage(), start, shape, stride).requires_grad_(grad)


def _reduce_tensor(tensor: torch.Tensor, storages: dict[int, _Storage]) -> Any:
    """How one plain CPU tensor is pickled; `NotImplemented` leaves it to torch."""
    if (type(tensor) is not torch.Tensor or tensor.device.type != "cpu" or tensor.layout != torch.strided
        or tensor.is_quantized or tensor.is_conj() or tensor.is_neg() or not tensor.is_leaf):  # fmt: skip
        return NotImplemented
    whole, shape, stride = tensor.untyped_storage(), tuple(tensor.shape), tensor.stride()
    storage = storages.setdefault(whole.data_ptr() or -1 - len(storages), _Storage(whole))
    first, size = int(tensor.storage_offset()), tensor.element_size()
    if tensor.numel():
        last = first + sum((int(n) - 1) * step for n, step in zip(shape, stride, strict=True))
        storage.use(first * size, (last + 1) * size)
    return _tensor_from, (storage, tensor.dtype, first, shape, stride, tensor.requires_grad)


def _pickler_class() -> type:
    """The pickler: cloudpickle's when installed (functions from cells and closures), else plain."""
    base: Any
    try:
        import cloudpickle

        base = cloudpickle.Pickler
    except ImportError:
        base = pickle.Pickler

    class Pickler(base):
        def __init__(self, file: io.BytesIO, keep: Callable[[pickle.PickleBuffer], object]) -> None:
            super().__init__(file, protocol=5, buffer_callback=keep)
            self.storages: dict[int, _Storage] = {}

        def reducer_override(self, obj: Any) -> Any:
            if isinstance(obj, torch.Tensor):
                return _reduce_tensor(obj, self.storages)
            override = getattr(super(), "reducer_override", None)
            return override(obj) if override else NotImplemented

    return Pickler


class Parcel:
    """Several objects, pickled each on its own, whose big parts lie in one list.

    Parameters
    ----------
    objects : sequence
        What to send. A receiver unpickles only the ones it asks for.
    """

    def __init__(self, objects: Sequence[Any]) -> None:
        self._buffers: list[memoryview] = []
        self.streams: list[tuple[bytes, list[int]]] = []
        for item in objects:
            file, found = io.BytesIO(), list[pickle.PickleBuffer]()
            pickler = _pickler_class()(file, found.append)
            pickler.dump(item)
            parts = {id(storage.whole): storage.part() for storage in pickler.storages.values()}
            self.streams.append((file.getvalue(), [len(self._buffers) + index for index in range(len(found))]))
            self._buffers += [parts.get(id(buffer), buffer).raw() for buffer in found]
        self.size = sum(len(data) for data, _ in self.streams) + sum(b.nbytes for b in self._buffers)
        self._fd = self._write() if self.size > SMALL else None
        self._message: bytes | None = None

    def _write(self) -> int | None:
        """Copy the buffers into one unnamed shared file; None when there is no room for it."""
        self._places, end = [], 0
        for buffer in self._buffers:
            self._places.append((end, buffer.nbytes))
            end += -(-buffer.nbytes // _ALIGN) * _ALIGN
        try:
            fd = memory.anonymous(end, "a payload") if end else None
        except NoRoom:
            return None
        if fd is not None:
            with mmap.mmap(fd, end) as target:
                for (start, size), buffer in zip(self._places, self._buffers, strict=True):
                    target[start : start + size] = buffer
        return fd

    def send(self, connection: Connection, kind: str) -> None:
        """Send the parcel, under the name `kind`."""
        if self._message is None:
            inline = None if self._fd is not None else [bytes(b) for b in self._buffers]
            places = self._places if self._fd is not None else None
            self._message = pickle.dumps((kind, self.streams, inline, places), protocol=5)
        connection.send_bytes(self._message)
        if self._fd is not None:
            reduction.send_handle(connection, self._fd, 0)

    def buffers(self, index: int) -> list[memoryview]:
        """The out-of-band buffers of object number `index`."""
        return [self._buffers[i] for i in self.streams[index][1]]

    def close(self) -> None:
        """Let go of the file; what receivers have mapped stays."""
        if self._fd is not None:
            os.close(self._fd)
            self._fd = None
        self._buffers.clear()


class Received:
    """A parcel as it arrived; `load` unpickles one of its objects."""

    def __init__(self, connection: Connection, copy: bool = False) -> None:
        self.kind, self._streams, inline, places = pickle.loads(connection.recv_bytes())
        if places is None:
            self._buffers: list[Any] = [bytearray(b) for b in inline]
            return
        fd = reduction.recv_handle(connection)
        try:
            # A private mapping: pages are shared until somebody writes to them.
            mapped = mmap.mmap(fd, 0, access=mmap.ACCESS_COPY)
        finally:
            os.close(fd)
        whole = memoryview(mapped)
        parts = [whole[start : start + size] for start, size in places]
        self._buffers = [bytearray(part) for part in parts] if copy else parts

    def load(self, index: int) -> Any:
        """Unpickle object number `index`."""
        data, used = self._streams[index]
        return pickle.loads(data, buffers=[self._buffers[i] for i in used])


def explain(function: Any, args: tuple, error: BaseException) -> str:
    """Why a call cannot be sent: names the function and the object that cannot be pickled."""
    name = getattr(function, "__qualname__", repr(function))
    why = f"{type(error).__name__}: {error}"
    of_a_cell = getattr(function, "__module__", "") == "__main__" or "<" in name
    if of_a_cell and not sys.modules.get("cloudpickle"):
        return (f"cannot send {name}() to the workers: it is defined in a cell, a script or another "
                "function. Install cloudpickle (pip install cloudpickle), or put it into a module")
    parts: list[tuple[str, Any]] = [(f"argument {i + 1}", value) for i, value in enumerate(args)]
    if code := getattr(function, "__code__", None):
        cells, used = zip(code.co_freevars, function.__closure__ or (), strict=False), function.__globals__
        parts += [(f"its variable {name!r}", cell.cell_contents) for name, cell in cells]
        parts += [(f"its global {name!r}", used[name]) for name in code.co_names if name in used]
    for place, value in parts:
        try:
            Parcel([value]).close()
        except Exception as problem:
            return (f"cannot send {name}() to the workers: {place} is a {type(value).__module__}."
                    f"{type(value).__qualname__}, which cannot be pickled ({problem}). "
                    "Make it inside the function, or pass what it is made of")
    return f"cannot send {name}() to the workers: it cannot be pickled ({why})"
