"""Messages of any shape and type between processes of one host: a ring of frames in shared memory for each pair."""

import mmap
from collections.abc import Iterator
from itertools import cycle
from time import perf_counter_ns

import numpy as np
import torch

from bpkit.run.transports.comm import header, receiver
from bpkit.run.transports.shared.names import FRAMES, Layout
from bpkit.run.transports.shared.protocols import Exchange, Posted, Protocols
from bpkit.run.transports.shared.semaphores import yield_core

_HEADER = 128  # bytes of a frame before the payload
_FULL_TRIES = 100  # a full ring is waited for this many yields, then the rest is kept back


def raw_bytes(tensor: torch.Tensor) -> np.ndarray:
    """The elements of a contiguous CPU tensor as a flat array of bytes, without a copy."""
    plain = tensor.view(torch.int16) if tensor.dtype == torch.bfloat16 else tensor  # numpy has no such type
    return plain.detach().numpy().reshape(-1).view(np.uint8)


class Mail:
    """One rank's mailboxes. `send` never blocks; what does not fit goes out while this rank waits for something.

    Parameters
    ----------
    fd : int
        The file of all rings.
    """

    def __init__(self, layout: Layout, rank: int, fd: int, protocols: Protocols) -> None:
        self._filled, self._free = protocols.filled, protocols.free
        if self._free:
            mail = np.frombuffer(mmap.mmap(fd, layout.mail_bytes), np.uint8)
            rings = mail.reshape(layout.ranks, layout.ranks - 1, FRAMES, -1)
        self._out = {peer: _frames(rings[rank, peer - (peer > rank)]) for peer in self._free}
        self._in = {peer: _frames(rings[peer, rank - (rank > peer)]) for peer in self._free}

    def send(self, tensor: torch.Tensor, to: int) -> None:
        """Write a message; what does not fit is copied."""
        rest, head, lane = [raw_bytes(tensor.contiguous())], header(tensor.dtype, tensor.shape), self._free[to]
        if not lane.line and lane.came() and self._fill(rest, head, to):
            return  # as most do: in one frame, which is free
        posted = Posted(self._put(rest, head, to), "send")
        start, left, tries = perf_counter_ns(), 0, 0
        while not posted.poll() and lane.line[0] is posted and tries < _FULL_TRIES:
            tries = tries + 1 if len(rest[0]) == left else 0
            left = len(rest[0])
            yield_core()
        lane.waiter.waited += perf_counter_ns() - start
        rest[0] = rest[0].copy()

    def _put(self, rest: list[np.ndarray], start: bytes, to: int) -> Exchange:
        """Fill frames as they become free, with what is in `rest` then."""
        yield self._free[to]
        while not self._fill(rest, start, to):
            yield self._free[to]

    def _fill(self, rest: list[np.ndarray], start: bytes, to: int) -> bool:
        """Fill a free frame; whether nothing is left."""
        head, payload = next(self._out[to])
        head[: len(start)] = start
        size = min(len(payload), len(rest[0]))
        payload[:size] = rest[0][:size]
        self._filled[to].give()
        rest[0] = rest[0][size:]
        return not len(rest[0])

    def receive(self, tensor: torch.Tensor | None, source: int) -> torch.Tensor:
        """Read the next message into `tensor`, or into a new tensor when None."""
        filled, free, frames = self._filled[source], self._free[source], self._in[source]
        filled.take("recv")
        head, payload = next(frames)
        tensor = receiver(head, tensor, source, torch.device("cpu"))
        target = tensor if tensor.is_contiguous() else torch.empty(tensor.shape, dtype=tensor.dtype)
        data = raw_bytes(target)
        while True:
            size = min(len(payload), len(data))
            data[:size] = payload[:size]
            free.give()
            data = data[size:]
            if not len(data):
                break
            filled.take("recv")
            _, payload = next(frames)
        return tensor if target is tensor else tensor.copy_(target)


def _frames(ring: np.ndarray) -> Iterator[tuple[memoryview, np.ndarray]]:
    """The frames of a ring in turn: header and payload."""
    return cycle([(frame[:_HEADER].data, frame[_HEADER:]) for frame in ring])
