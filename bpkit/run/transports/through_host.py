"""The transport for several ranks on one GPU, and for GPUs without NCCL: through the memory of the host.

What a rank sends is copied to the host, goes by a transport of the host (shared memory or gloo), and is copied to the
peer's device.  The copies block: this is for trying plans out, not for speed.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Sequence
from functools import partial

import torch
from torch import Tensor

from bpkit.run.transports.comm import Channel, Comm, Edges, Handle, Slots, Taker, Then


class Staged(Comm):
    """One rank's end of a transport of the host, for tensors of a device (see `Comm`); CPU tensors go as they are.

    Memory of `empty` has a mirror in the host transport's own memory, through which it travels.
    """

    def __init__(self, host: Comm, device: torch.device) -> None:
        super().__init__(host.rank, host.size, host.board, host.timeout, str(device), host.account)
        self._host, self.name, self.mark, self.cache = host, host.name, host.mark, host.cache
        self.sent_to, self.received_from = host.sent_to, host.received_from
        self.progress = host.progress  # type: ignore[method-assign]
        self._mirrors: dict[int, tuple[int, Tensor]] = {}  # by address: bytes, and what mirrors them

    def barrier(self) -> None:
        self._host.barrier()

    def finish(self) -> None:
        self._host.finish()

    # -- memory ------------------------------------------------------------------------------------------

    def empty(self, n: int, dtype: torch.dtype = torch.float32) -> Tensor:
        mirror = self._host.empty(n, dtype)
        if self.device.type == "cuda" and self._host.peers(mirror) is None:  # not memory of all ranks: it may be pinned
            mirror = mirror.pin_memory()
        return self._mirrored(torch.zeros(n, dtype=dtype, device=self.device), mirror)

    def _mirrored(self, tensor: Tensor, mirror: Tensor) -> Tensor:
        """Remember the mirror of a tensor for as long as the tensor's memory lives."""
        if tensor.numel():
            start = tensor.data_ptr()
            self._mirrors[start] = (tensor.numel() * tensor.element_size(), mirror)
            weakref.finalize(tensor.untyped_storage(), self._mirrors.pop, start).atexit = False
        return tensor

    def _mirror(self, tensor: Tensor) -> Tensor | None:
        for start, (size, mirror) in self._mirrors.items():
            offset, length = tensor.data_ptr() - start, tensor.numel() * tensor.element_size()
            if 0 <= offset < offset + length <= size and tensor.is_contiguous():
                whole = mirror.view(torch.uint8)[offset : offset + length]
                return whole.view(tensor.dtype).view(tensor.shape)
        return None

    def _out(self, tensor: Tensor) -> Tensor:
        """The values of a device's tensor, on the host: in its mirror, or in pinned memory of their own."""
        mirror = self._mirror(tensor)
        if mirror is None:
            mirror = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=self.device.type == "cuda")
        return mirror.copy_(tensor.detach())

    # -- messages ----------------------------------------------------------------------------------------

    def _send(self, tensor: Tensor, to: int) -> None:
        self._host._send(self._out(tensor), to)

    def _receive(self, tensor: Tensor | None, source: int) -> Tensor:
        came = self._host._receive(None if tensor is None else self._out(tensor), source)
        return came.to(self.device) if tensor is None else tensor.detach().copy_(came)

    def post_send(self, tensor: Tensor, to: int) -> Handle:
        return self._host.post_send(self._out(tensor), to)

    def post_recv(self, tensor: Tensor, source: int, add: bool = False) -> Handle:
        return self._through(tensor, partial(self._host.post_recv, source=source, add=add))

    def arrivals(self, tensor: Tensor, sources: Sequence[int], each: int) -> Iterator[int]:
        mirror = self._out(tensor)
        for source in self._host.arrivals(mirror, sources, each):
            tensor.copy_(mirror)
            yield source

    def edges(self, slots: Slots, elements: int, tokens: int, dtype: torch.dtype) -> Edges:
        return _StagedEdges(self._host.edges(slots, elements, tokens, dtype), self.device)

    def group(self, groups: Sequence[Sequence[int]]) -> Comm:
        return Staged(self._host.group(groups), self.device)

    # -- collectives -------------------------------------------------------------------------------------

    def reduce_scatter(self, tensor: Tensor) -> Tensor:
        part = self._host.reduce_scatter(self._out(tensor))
        return tensor.detach().view(-1)[slice(*self.bounds(tensor.numel()))].copy_(part)

    def _through(self, tensor: Tensor, post: Callable[[Tensor], Handle]) -> Handle:
        mirror = self._out(tensor)
        return Then(post(mirror), then=lambda: tensor.detach().copy_(mirror))

    def post_all_reduce(self, tensor: Tensor) -> Handle:
        return self._through(tensor, self._host.post_all_reduce)

    def post_broadcast(self, tensor: Tensor, root: int) -> Handle:
        return self._through(tensor, partial(self._host.post_broadcast, root=root))

    def post_reduce_scatter(self, tensor: Tensor, out: Tensor, add: bool) -> Handle:
        if self._mirror(out) is None:  # one for good: the host's transport remembers where it puts what
            self._mirrored(out, torch.empty(out.numel(), dtype=out.dtype))
        mirror = self._out(out)
        handle = self._host.post_reduce_scatter(self._out(tensor), mirror, add)
        return Then(handle, then=lambda: out.copy_(mirror))

    def post_all_gather(self, tensor: Tensor) -> Handle:
        return self._through(tensor, self._host.post_all_gather)


class _StagedEdges(Edges):
    """Messages between stages, each in pinned memory of its own on its way."""

    def __init__(self, host: Edges, device: torch.device) -> None:
        self._host, self._device = host, device

    def send(self, channel: Channel, tensor: Tensor, to: int) -> Handle:
        there = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=self._device.type == "cuda")
        return self._host.send(channel, there.copy_(tensor), to)

    def receive(self, shape: Sequence[int], dtype: torch.dtype, source: int, take: Taker) -> Then:
        return self._host.receive(shape, dtype, source, lambda came: take(came.to(self._device, copy=True)))
