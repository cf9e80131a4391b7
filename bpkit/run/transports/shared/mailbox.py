"""Messages between two processes of one host: a ring of slots in shared memory, two semaphores a pair."""

import struct
from collections import deque

import numpy as np
import torch

from bpkit.run.transports.comm import DTYPE_CODES, DTYPES, MAX_DIMS, check_message
from bpkit.run.transports.shared.semaphores import SemLock, Waiter

HEADER = 128
SLOTS = 16  # of a mailbox
_HEAD = struct.Struct("<3q")  # dtype, dimensions, (reserved); the shape follows
_SHAPES = [struct.Struct(f"<{dims}q") for dims in range(MAX_DIMS + 1)]
_FULL_TRIES = 100  # a full ring is waited for this many yields, then the rest is kept back


def raw_bytes(tensor: torch.Tensor) -> np.ndarray:
    """The elements of a contiguous CPU tensor as a flat array of bytes, without a copy."""
    return tensor.detach().reshape(-1).view(torch.uint8).numpy()


class _Box:
    """One direction of one pair: the ring and the semaphores that count its filled and free slots."""

    def __init__(self, ring: np.ndarray, filled: SemLock, free: SemLock) -> None:
        self._payloads = [slot[HEADER:] for slot in ring.reshape(SLOTS, -1)]
        self._headers = [slot[:HEADER].data for slot in ring.reshape(SLOTS, -1)]
        self.room = len(self._payloads[0])
        self.filled, self.free = filled, free
        self.turn = 0  # the slot that comes next, on this side

    def _advance(self) -> int:
        slot, self.turn = self.turn, (self.turn + 1) % SLOTS
        return slot


class Outbox(_Box):
    """The sender's side. `post` never blocks; what does not fit is kept back for `push`."""

    def __init__(self, ring: np.ndarray, filled: SemLock, free: SemLock) -> None:
        super().__init__(ring, filled, free)
        self.pending: deque[tuple[bytes | None, np.ndarray]] = deque()

    def post(self, tensor: torch.Tensor, waiter: Waiter) -> None:
        """Write a message; what does not fit is copied, and goes out in later calls of `push`."""
        shape = tuple(tensor.shape)
        if len(shape) > MAX_DIMS:
            raise ValueError(f"send: a tensor of {len(shape)} dimensions; at most {MAX_DIMS} travel")
        header = _HEAD.pack(DTYPE_CODES[tensor.dtype], len(shape), 0) + _SHAPES[len(shape)].pack(*shape)
        data = raw_bytes(tensor.contiguous())
        if self.pending:
            self.pending.append((header, data.copy()))
            return
        rest = self._fill(header, data, waiter)
        if rest is not None:
            self.pending.append((rest[0], rest[1].copy()))

    def _fill(self, header: bytes | None, data: np.ndarray, waiter: Waiter | None) -> tuple | None:
        """Write slots while there are free ones; returns what is left, or None."""
        while True:
            if not self.free.acquire(False) and not (waiter and waiter.briefly(self.free, _FULL_TRIES)):
                return header, data
            slot = self._advance()
            if header is not None:
                self._headers[slot][: len(header)] = header
                header = None
            size = min(self.room, data.size)
            self._payloads[slot][:size] = data[:size]
            self.filled.release()
            data = data[size:]
            if not data.size:
                return None

    def push(self) -> bool:
        """Write what was kept back, as far as there is room; whether nothing is left."""
        while self.pending:
            header, data = self.pending.popleft()
            rest = self._fill(header, data, None)
            if rest is not None:
                self.pending.appendleft(rest)
                return False
        return True


class Inbox(_Box):
    """The receiver's side."""

    def take(self, tensor: torch.Tensor | None, source: int, waiter: Waiter) -> torch.Tensor:
        """Read the next message into `tensor`, or into a new tensor when None."""
        waiter.take(self.filled, "recv", source)
        slot = self._advance()
        code, dims, _ = _HEAD.unpack_from(self._headers[slot])
        shape, dtype = _SHAPES[dims].unpack_from(self._headers[slot], _HEAD.size), DTYPES[code]
        if tensor is None:
            tensor = torch.empty(shape, dtype=dtype)
        else:
            check_message(tensor, shape, dtype, source)
        target = tensor if tensor.is_contiguous() else torch.empty(shape, dtype=dtype)
        self._read(slot, raw_bytes(target), source, waiter)
        if target is not tensor:
            tensor.copy_(target)
        return tensor

    def _read(self, slot: int, data: np.ndarray, source: int, waiter: Waiter) -> None:
        while True:
            size = min(self.room, data.size)
            data[:size] = self._payloads[slot][:size]
            self.free.release()
            data = data[size:]
            if not data.size:
                return
            waiter.take(self.filled, "recv", source)
            slot = self._advance()


def slot_size(ranks: int, budget: int) -> int:
    """Bytes of a slot, so that the mailboxes of all ordered pairs stay within `budget` bytes."""
    pairs = max(ranks * (ranks - 1), 1)
    return min(max(budget // (pairs * SLOTS) // 4096 * 4096, 4096), 1 << 18)
