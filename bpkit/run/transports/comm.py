"""What one rank can do with its peers: the transport's interface and the parts all transports share."""

from __future__ import annotations

import abc
import struct
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Protocol

import numpy as np
import torch

from bpkit.description.flat import part_bounds
from bpkit.run.errors import PeerTimeout
from bpkit.run.transports.board import OPERATIONS, Board

# Types that travel in a message's header, by position.
DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.int16,
          torch.int8, torch.uint8, torch.bool, torch.complex64, torch.complex128)  # fmt: skip
DTYPE_CODES = {dtype: code for code, dtype in enumerate(DTYPES)}
MAX_DIMS = 8
_NAP = 1e-3  # seconds between two looks at what a rank does by itself
HEADER = struct.Struct(f"<{2 + MAX_DIMS}q")  # of a message: type, number of dimensions, shape

Channel = tuple[str, int]  # kind of the send, and stage
Slots = Mapping[Channel, tuple[int, int]]  # slots of a channel, and elements of one
Taker = Callable[[torch.Tensor], object]


@dataclass
class Account:
    """What a rank has sent, in bytes, and waited for, in nanoseconds, in all its groups."""

    sent: int = 0
    waited: int = 0


class Handle(Protocol):
    """Posted communication.

    Attributes
    ----------
    passive : bool
        Whether only `wait` ends it: `poll` never does.
    polled : bool
        Whether peers wait for this rank to `poll` it, so that the rank must not block on anything else.
    """

    passive: bool = False
    polled: bool = False

    def poll(self) -> bool:
        """Whether it has finished; moves it along, never blocks."""

    def wait(self) -> None:
        """Block until it has finished."""

    def watch(self) -> None:
        """Let a thread wait for it, so that `poll` tells its end although it is passive."""
        return


class Then(Handle):
    """What is done once some communication has ended; of no communication it is the handle of one that has.

    Parameters
    ----------
    handles : Handle
        Of the communication.
    then : callable
        Called once, when all have ended.
    release : callable
        To be called once nobody reads any more what came: gives its memory back.
    """

    def __init__(self, *handles: Handle, then: Callable[[], object] = lambda: None,
                 release: Callable[[], object] = lambda: None) -> None:  # fmt: skip
        self._handles, self._then, self.release, self._finished = handles, then, release, False
        for handle in handles:
            self.passive, self.polled = self.passive or handle.passive, self.polled or handle.polled

    def poll(self) -> bool:
        if not self._finished:
            for handle in self._handles:
                if not handle.poll():
                    return False
            self.wait()
        return True

    def watch(self) -> None:
        for handle in self._handles:
            handle.watch()

    def wait(self) -> None:
        if not self._finished:
            for handle in self._handles:
                handle.wait()
            self._then()
            self._finished = True


class Edges(Protocol):
    """Messages between stages, in order for each pair of ranks."""

    def send(self, channel: Channel, tensor: torch.Tensor, to: int) -> Handle:
        """Send a tensor; it may change once the handle has finished."""

    def receive(self, shape: Sequence[int], dtype: torch.dtype, source: int, take: Taker) -> Then:
        """Post the receive of the next message of `source`; `take` gets the tensor, until `release`."""


class Comm(abc.ABC):
    """One rank's end of a transport.

    Operations on all ranks (all but `send` and `recv`) must be called in the same order on each rank.

    Attributes
    ----------
    rank, size : int
    name : str
        ``"shm"``, ``"gloo"`` or ``"nccl"``.
    device : torch.device
        Where tensors for this transport live.
    timeout : float
        Seconds that this rank may wait for a peer.
    mark : numpy.ndarray
        Two int64 (step, action index) that the caller sees; the executor writes them.
    cache : dict
        Kept from call to call for as long as these workers live (see `Pool.generation`).
    """

    name = ""

    def __init__(self, rank: int, size: int, board: Board, timeout: float, device: str = "cpu",
                 account: Account | None = None) -> None:  # fmt: skip
        self.rank, self.size, self.timeout, self.device = rank, size, timeout, torch.device(device)
        self.board, self.account = board, account or Account()
        self.mark: np.ndarray = board.marks[rank]
        self.cache: dict[Any, Any] = {}
        self.sent_to, self.received_from = [0] * size, [0] * size  # messages, compared after each call

    @property
    def waited(self) -> int:
        """Nanoseconds this rank has spent waiting for peers so far, in all its groups."""
        return self.account.waited

    @property
    def sent(self) -> int:
        """Payload bytes sent so far, in all its groups, other than by collectives."""
        return self.account.sent

    def send(self, tensor: torch.Tensor, to: int) -> None:
        """Send to rank `to`; buffered: returns without waiting for the receiver, whatever the size."""
        self.check_peer(to, "send")
        self.check_tensor(tensor, "send")
        if tensor.dim() > MAX_DIMS:
            raise ValueError(f"send: a tensor of {tensor.dim()} dimensions; at most {MAX_DIMS} travel")
        self._send(tensor, to)
        self.account.sent += tensor.numel() * tensor.element_size()
        self.sent_to[to] += 1

    def recv(self, tensor: torch.Tensor | None, source: int) -> torch.Tensor:
        """Receive the next message of rank `source` into `tensor`, or into a new tensor when None."""
        self.check_peer(source, "recv")
        if tensor is not None:
            self.check_tensor(tensor, "recv")
        tensor = self._receive(tensor, source)
        self.received_from[source] += 1
        return tensor

    @abc.abstractmethod
    def _send(self, tensor: torch.Tensor, to: int) -> None:
        """`send`, of what can be sent."""

    @abc.abstractmethod
    def _receive(self, tensor: torch.Tensor | None, source: int) -> torch.Tensor:
        """`recv`."""

    @abc.abstractmethod
    def barrier(self) -> None:
        """Wait until every rank is here."""

    @abc.abstractmethod
    def empty(self, n: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """Memory for `n` elements (zeros) that `all_reduce` reduces in place; on all ranks, same `n`."""

    # Posted: they return what is under way.  Ranks post in the same order.

    @abc.abstractmethod
    def post_all_reduce(self, tensor: torch.Tensor) -> Handle:
        """Start a sum over ranks; `tensor` must rest until the handle has finished."""

    @abc.abstractmethod
    def post_reduce_scatter(self, tensor: torch.Tensor, out: torch.Tensor, add: bool) -> Handle:
        """Start a sum over ranks of this rank's part of `tensor`, put into `out` or added to it."""

    @abc.abstractmethod
    def post_all_gather(self, tensor: torch.Tensor) -> Handle:
        """Start to fill the other ranks' parts of `tensor` (of `shared`: wait until all have written theirs)."""

    @abc.abstractmethod
    def post_broadcast(self, tensor: torch.Tensor, root: int) -> Handle:
        """Start to copy the root's values to all ranks."""

    @abc.abstractmethod
    def post_send(self, tensor: torch.Tensor, to: int) -> Handle:
        """Start to send memory of `empty` without copying it; it must rest until the handle has finished."""

    @abc.abstractmethod
    def post_recv(self, tensor: torch.Tensor, source: int, add: bool = False) -> Handle:
        """Start to receive what `source` posts next, from the same place of its memory, or to add it."""

    @abc.abstractmethod
    def arrivals(self, tensor: torch.Tensor, sources: Sequence[int], each: int) -> Iterator[int]:
        """Receive what each of `sources` posts, `each` times, into `tensor` as it comes; yields whose it is."""

    @abc.abstractmethod
    def group(self, groups: Sequence[Sequence[int]]) -> Comm:
        """The transport of the group, of `groups` without common ranks, to which this rank belongs; on all ranks."""

    @abc.abstractmethod
    def edges(self, slots: Slots, elements: int, tokens: int, dtype: torch.dtype) -> Edges:
        """What carries activations and their gradients; on all ranks, same `elements` and `tokens`.

        Parameters
        ----------
        slots : mapping
            For each channel on which this rank sends, its slots and their elements.
        elements, tokens : int
            The largest sums over channels of any rank: of elements, and of slots.
        """

    def shared(self, n: int, dtype: torch.dtype = torch.float32) -> torch.Tensor | None:
        """Memory for `n` elements that is one for all ranks; None where ranks share no memory."""
        return None

    def progress(self) -> None:  # noqa: B027 - a transport with threads of its own needs none
        """Move this rank's unfinished business along; never blocks."""

    # Blocking: posted and waited for.

    def all_reduce(self, tensor: torch.Tensor) -> torch.Tensor:
        """Sum over ranks, in place, the same bits on every rank; returns `tensor`."""
        self.post_all_reduce(tensor).wait()
        return tensor

    def reduce_scatter(self, tensor: torch.Tensor) -> torch.Tensor:
        """Sum over ranks of this rank's part (`part_bounds`), in place; returns the part, a view.

        The other parts are undefined afterwards.
        """
        self.check_tensor(tensor, "reduce_scatter")
        part = tensor.detach().view(-1)[slice(*self.bounds(tensor.numel()))]
        self.post_reduce_scatter(tensor, part, False).wait()
        return part

    def all_gather(self, tensor: torch.Tensor) -> torch.Tensor:
        """Fill the other ranks' parts of `tensor` from their owners; returns `tensor`."""
        self.post_all_gather(tensor).wait()
        return tensor

    def broadcast(self, tensor: torch.Tensor, root: int = 0) -> torch.Tensor:
        """Copy the root's values to all ranks, in place; returns `tensor`."""
        if not 0 <= root < self.size:
            raise ValueError(f"broadcast: root {root} is not a rank (0 to {self.size - 1})")
        self.post_broadcast(tensor, root).wait()
        return tensor

    def alone(self, root: int, pieces: Iterable[object]) -> None:
        """Let rank `root` do work of its own, piece by piece, while the others wait for it; on all ranks of a cluster.

        However long the work takes, the time-out is for one piece.  Only the wait is common: what comes of the work
        travels by an operation afterwards.

        Raises
        ------
        PeerTimeout
            If no piece ended within the time-out.
        """
        waits, own, work = self.board.waits[self.rank], self.board.works[self.rank], self.board.works[root]
        waits[1], waits[0] = root, OPERATIONS.index("evaluation")
        if self.rank == root:
            for _ in pieces:
                own[1] += 1
        own[0] += 1
        seen, since = -1, 0.0
        while work[0] < own[0]:
            self.progress()
            if work[1] != seen:
                seen, since = int(work[1]), time.monotonic()
            if time.monotonic() - since > self.timeout:
                raise PeerTimeout(f"waited {self.timeout:g} s in evaluation for rank {root}")
            time.sleep(_NAP)
        waits[0] = 0

    @abc.abstractmethod
    def finish(self) -> None:
        """End of a call: deliver what `send` still holds and finish posted reductions."""

    def peers(self, tensor: torch.Tensor) -> list[torch.Tensor] | None:
        """The same tensor on every rank, when `tensor` lies in memory of `empty`; else None."""
        return None

    def bounds(self, size: int, rank: int | None = None) -> tuple[int, int]:
        """Bounds of a rank's part of `size` elements; of this rank's where None."""
        return part_bounds(size, self.size, self.rank if rank is None else rank)

    def check_peer(self, peer: int, what: str) -> None:
        """Refuse a rank that is not another rank of this transport."""
        if not 0 <= peer < self.size or peer == self.rank:
            raise ValueError(f"{what}: rank {peer} is not one of the other ranks (0 to {self.size - 1}, "
                             f"this is rank {self.rank})")

    def check_tensor(self, tensor: torch.Tensor, what: str) -> None:
        """Refuse what this transport cannot carry."""
        if not isinstance(tensor, torch.Tensor):
            raise TypeError(f"{what} takes a torch.Tensor, not {type(tensor).__name__}")
        if tensor.device.type not in (self.device.type, "cpu"):  # those of the CPU go by way of the device
            raise ValueError(f"{what}: the {self.name} transport carries {self.device.type} tensors, "
                             f"this one is on {tensor.device}")
        if tensor.dtype not in DTYPE_CODES:
            raise TypeError(f"{what}: dtype {tensor.dtype} is not supported")


@lru_cache(1024)
def header(dtype: torch.dtype, shape: tuple[int, ...]) -> bytes:
    """What travels before the elements of a message."""
    return HEADER.pack(DTYPE_CODES[dtype], len(shape), *shape, *[0] * (MAX_DIMS - len(shape)))


def receiver(head: bytes | memoryview, tensor: torch.Tensor | None, source: int, device: torch.device) -> torch.Tensor:
    """`tensor`, or a new one where None, for the message with this header; refused where it does not fit."""
    if tensor is not None and head[: HEADER.size] == header(tensor.dtype, tensor.shape):
        return tensor
    code, dims, *sizes = HEADER.unpack_from(head)
    shape, dtype = tuple(sizes[:dims]), DTYPES[code]
    if tensor is None:
        return torch.empty(shape, dtype=dtype, device=device)
    raise ValueError(f"recv from rank {source}: the message is {dtype} {shape}, "
                     f"the buffer is {tensor.dtype} {tuple(tensor.shape)}")
