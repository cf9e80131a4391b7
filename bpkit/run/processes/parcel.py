"""What travels between the caller and its workers: pickled once, big parts through one shared file.

The pickle stream (protocol 5) leaves the memory of CPU tensors and arrays out of band. Where that is above
`SMALL` bytes it is written once into an unnamed file in memory whose descriptor goes to every
worker; each maps it copy-on-write, so ranks neither copy it nor see each other's changes.

Tensors that share memory still share it on arrival, and it travels once: from the first to the last element that
any of them has, so 8 rows of a large tensor cost what 8 rows cost (and every thousandth row what all rows cost).
"""

import ctypes
import io
import mmap
import os
import pickle
import sys
from array import array
from collections.abc import Callable, Sequence
from itertools import accumulate
from multiprocessing import reduction
from multiprocessing.connection import Connection
from typing import Any

import torch

from bpkit.run.transports.shared import files as memory

SMALL = 65536
_ALIGN = 64


class _Storage:
    """The memory of one or more tensors, as far as they use it; pickled once a stream, so views stay views."""

    def __init__(self, storage: torch.UntypedStorage) -> None:
        self._storage, self._length = storage, storage.nbytes()  # which must live as long as its bytes are looked at
        self._raw = (ctypes.c_char * self._length).from_address(storage.data_ptr())
        self._used = array("q", [self._length, 0])  # first and last-plus-one byte; known once all is pickled
        self.whole = pickle.PickleBuffer(self._raw)

    def use(self, first: int, last: int) -> None:
        """Some tensor has these bytes."""
        self._used[0], self._used[1] = min(self._used[0], first - first % _ALIGN), max(self._used[1], last)

    def part(self) -> pickle.PickleBuffer:
        """What travels in place of the whole."""
        return pickle.PickleBuffer(memoryview(self._raw)[slice(*self._used)])

    def __reduce__(self) -> tuple:
        return _storage_from, (self.whole, pickle.PickleBuffer(self._used))


def _storage_from(buffer: Any, used: Any) -> tuple[torch.UntypedStorage, int]:
    raw = torch.frombuffer(buffer, dtype=torch.uint8) if len(buffer) else torch.empty(0, dtype=torch.uint8)
    return raw.untyped_storage(), memoryview(used).cast("q")[0]


def _tensor_from(memory: tuple[torch.UntypedStorage, int], dtype: torch.dtype, offset: int, shape: tuple,
                 stride: tuple, grad: bool) -> torch.Tensor:  # fmt: skip
    storage, first = memory
    start = max(0, offset - first // dtype.itemsize)
    return torch.empty(0, dtype=dtype).set_(storage, start, shape, stride).requires_grad_(grad)  # type: ignore


def _reduce_tensor(tensor: torch.Tensor, storages: dict[int, _Storage]) -> Any:
    """How one plain CPU tensor is pickled; `NotImplemented` leaves it to torch."""
    if (type(tensor) is not torch.Tensor or tensor.device.type != "cpu" or tensor.layout != torch.strided
        or tensor.is_quantized or tensor.is_conj() or tensor.is_neg() or not tensor.is_leaf):  # fmt: skip
        return NotImplemented
    whole, shape, stride = tensor.untyped_storage(), tuple(tensor.shape), tensor.stride()
    key = whole.data_ptr() or -1 - len(storages)
    storage = storages.get(key) or storages.setdefault(key, _Storage(whole))
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


def _places(sizes: Sequence[int]) -> list[slice]:
    """Where parts of these sizes lie, one after another."""
    starts = accumulate((-(-size // _ALIGN) * _ALIGN for size in sizes), initial=0)
    return [slice(start, start + size) for start, size in zip(starts, sizes, strict=False)]


class Parcel:
    """Several objects, pickled each on its own, whose big parts lie in one piece of memory.

    Parameters
    ----------
    objects : sequence
        What to send. A receiver unpickles only the ones it asks for.
    kind : str
        What it is for.
    """

    def __init__(self, objects: Sequence[Any], kind: str = "") -> None:
        self.kind, self._fd = kind, -1
        self._streams: list[tuple[bytes, slice]] = []
        buffers: list[memoryview] = []
        for item in objects:
            file, found = io.BytesIO(), list[pickle.PickleBuffer]()
            pickler = _pickler_class()(file, found.append)
            pickler.dump(item)
            parts = {id(storage.whole): storage.part() for storage in pickler.storages.values()}
            self._streams.append((file.getvalue(), slice(len(buffers), len(buffers) + len(found))))
            buffers += [parts.get(id(buffer), buffer).raw() for buffer in found]
        sizes = [buffer.nbytes for buffer in buffers]
        places = _places(sizes)
        whole: Any = bytearray(places[-1].stop if places else 0)
        if len(whole) > SMALL:
            self._fd = memory.unnamed(len(whole))
            whole = mmap.mmap(self._fd, len(whole))
        for place, buffer in zip(places, buffers, strict=True):
            whole[place] = buffer
        self._buffers: list[Any] = [memoryview(whole)[place] for place in places]
        self.size = sum(sizes) + sum(len(data) for data, _ in self._streams)
        self._message = pickle.dumps((kind, self._streams, sizes, whole if self._fd < 0 else None), protocol=5)

    def send(self, connection: Connection) -> None:
        """Send the parcel."""
        connection.send_bytes(self._message)
        if self._fd >= 0:
            reduction.send_handle(connection, self._fd, 0)

    def load(self, index: int) -> Any:
        """Unpickle object number `index`."""
        data, used = self._streams[index]
        return pickle.loads(data, buffers=self._buffers[used])

    def close(self) -> None:
        """Let go of the file; what receivers have mapped stays."""
        if self._fd >= 0:
            os.close(self._fd)
        self._fd = -1


class Received(Parcel):
    """A parcel as it arrived; with `copy` each big part in memory of its own."""

    def __init__(self, connection: Connection, copy: bool = False) -> None:
        self.kind, self._streams, sizes, whole = pickle.loads(connection.recv_bytes())
        if whole is None:  # a private mapping: pages are shared until somebody writes to them
            self._fd = reduction.recv_handle(connection)
            whole = mmap.mmap(self._fd, 0, access=mmap.ACCESS_COPY)
            self.close()
        parts = [memoryview(whole)[place] for place in _places(sizes)]
        self._buffers = [bytearray(part) for part in parts] if copy else parts


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
