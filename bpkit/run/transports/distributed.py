"""The transport over torch.distributed: gloo for CPU workers (several hosts too), and NCCL for GPUs.

A message is one packet of `PACKET` bytes that holds shape, type and the first elements, followed, when
they do not fit, by a second packet with the rest. So a receiver needs to know nothing beforehand, and a
small message costs one packet.
"""

from __future__ import annotations

import os
import sys
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from copy import copy
from datetime import timedelta
from functools import partial
from itertools import combinations
from time import perf_counter_ns
from typing import Any

import torch
import torch.distributed as dist

from bpkit.run.errors import CommunicationError, PeerTimeout
from bpkit.run.transports.board import OPERATIONS, Board
from bpkit.run.transports.comm import HEADER, Channel, Comm, Edges, Handle, Slots, Taker, Then, header, receiver

PACKET = 4096
_HELD = 4096  # packets to one rank that may be under way where nobody tells us what it has received
# PyTorch 2.13 renamed them, and warns of the old names in the middle of a reader's output.
_gather_into: Callable[..., Any] = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)
_scatter_into: Callable[..., Any] = getattr(dist, "reduce_scatter_single", dist.reduce_scatter_tensor)


def loopback() -> None:
    """Let gloo use the loopback interface, unless the user chose one."""
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo0" if sys.platform == "darwin" else "lo")


def _bytes(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().contiguous().view(-1).view(torch.uint8)


class _Work(Handle):
    """Posted work of torch.distributed: of all ranks, or a receive, whose end gloo shows only to who waits for it."""

    def __init__(self, comm: DistributedComm, work: Any, operation: str, source: int = -1) -> None:
        self._comm, self._work, self._operation, self._source = comm, work, operation, source
        self.passive, self._finished = source >= 0, False
        self._watched: Future[Any] | None = None

    def poll(self) -> bool:
        ended = self._watched and self._watched.done() if self.passive else self._work.is_completed()
        if ended:
            self.wait()  # which raises what went wrong
        return self._finished

    def watch(self) -> None:
        if self.passive and self._watched is None:
            self._watched = self._comm.waiting_threads().submit(self._work.wait)

    def wait(self) -> None:
        if not self._finished:
            ended = self._watched.result if self._watched else self._work.wait
            self._comm.run(self._operation, self._source, ended)
            if self.passive:
                self._comm.count_received(self._source)
            self._finished = True


class DistributedComm(Comm):
    """One rank's end of a torch.distributed process group (see `Comm`).

    Parameters
    ----------
    rank, size : int
    board : Board
    backend : {"gloo", "nccl"}
    timeout : float
        Seconds that one wait may take.
    path : str or None
        The file through which the ranks find each other; None: a process group that somebody else
        (``torchrun``) has set up, or whose address the environment gives.
    """

    def __init__(self, rank: int, size: int, board: Board, backend: str, timeout: float,
                 path: str | None = None) -> None:
        self.name = backend
        device = f"cuda:{rank % torch.cuda.device_count()}" if backend == "nccl" else "cpu"
        super().__init__(rank, size, board, timeout, device)
        self._members: Any = None  # the process group; None is all ranks
        self._ranks: Sequence[int] = range(size)  # by their numbers in the whole, as
        self._me = rank
        self._threads: ThreadPoolExecutor | None = None
        self._held: list[deque[tuple[int, Any, torch.Tensor]]] = [deque() for _ in range(size)]
        if not dist.is_initialized():
            store = dist.FileStore(path, size) if path else None
            dist.init_process_group(backend, rank=rank, world_size=size, timeout=timedelta(seconds=timeout),
                                    store=store)
        self._down: Any = dist.new_group() if backend == "nccl" and size > 1 else None
        if self._down is not None:
            self._meet()

    def _meet(self) -> None:
        """Make the connections of each pair, in one order on all ranks.

        NCCL makes them when they are first used, and waits on the host until the peer does too: ranks in a ring that
        all begin with a send would wait for ever.
        """
        token = torch.zeros(1, device=self.device)
        for low, high in combinations(range(self.size), 2):
            for source, to in ((low, high), (high, low)):
                if self.rank == source:
                    dist.send(token, to, self._way(source, to))
                elif self.rank == to:
                    dist.recv(token, source, self._way(source, to))

    def _way(self, source: int, to: int) -> Any:
        """The process group of messages in one direction, None for all ranks: NCCL runs those of a pair and a group one
        after another, whatever their direction, so a message could wait for one that is given after it."""
        return self._down if to < source else None

    def waiting_threads(self) -> ThreadPoolExecutor:
        """Threads that wait for messages while this rank has something else to move along."""
        if self._threads is None:
            self._threads = ThreadPoolExecutor(self.size, "bpkit-wait")
        return self._threads

    def run(self, operation: str, peer: int, function: Callable[..., Any], *args: Any, **named: Any) -> Any:
        """Run a blocking call of torch.distributed: timed, noted for the caller, its errors translated."""
        waits = self.board.waits[self._me]
        waits[1], waits[0] = peer, OPERATIONS.index(operation)
        start = perf_counter_ns()
        try:
            return function(*args, **named)  # NCCL's only make the current stream wait
        except RuntimeError as error:
            text = str(error)
            if "imed out" in text or "imeout" in text:
                whom = f" for rank {peer}" if peer >= 0 else ""
                raise PeerTimeout(f"waited {self.timeout:g} s in {operation}{whom}") from error
            raise CommunicationError(f"{self.name}: {operation} failed: {text}") from error
        finally:
            self.account.waited += perf_counter_ns() - start
            waits[0] = 0

    # Messages

    def _post(self, packet: torch.Tensor, to: int) -> None:
        """Send a packet, and keep it until its receiver has it.

        A send's `is_completed` of gloo stays false until somebody waits, and a wait that times out breaks
        the connection; so the receiver's count tells which waits return at once.
        """
        held, received = self._held[to], int(self.board.received[to, self._me])
        while held and (held[0][0] < received or len(held) > _HELD):
            self.run("send", to, held.popleft()[1].wait)
        held.append((self.sent_to[to], dist.isend(packet, to, self._way(self._me, to)), packet))

    def _send(self, tensor: torch.Tensor, to: int) -> None:
        data = _bytes(tensor).to(self.device)
        packet = torch.empty(max(PACKET, HEADER.size + len(data)), dtype=torch.uint8, device=self.device)
        packet[: HEADER.size] = torch.frombuffer(bytearray(header(tensor.dtype, tensor.shape)), dtype=torch.uint8)
        packet[HEADER.size : HEADER.size + len(data)] = data
        for part in (packet[:PACKET], packet[PACKET:]):
            if len(part):
                self._post(part, to)

    def _receive(self, tensor: torch.Tensor | None, source: int) -> torch.Tensor:
        packet = torch.empty(PACKET, dtype=torch.uint8, device=self.device)
        way = self._way(source, self.rank)
        self.run("recv", source, dist.recv, packet, source, way)
        tensor = receiver(packet[: HEADER.size].cpu().numpy().tobytes(), tensor, source, self.device)
        there = tensor.device.type == self.device.type and tensor.is_contiguous()
        target = tensor if there else torch.empty(tensor.shape, dtype=tensor.dtype, device=self.device)
        data = _bytes(target)
        first = min(data.numel(), PACKET - HEADER.size)
        data[:first] = packet[HEADER.size : HEADER.size + first]
        if first < data.numel():
            self.run("recv", source, dist.recv, data[first:], source, way)
        self.board.received[self.rank, source] += 1
        return tensor if target is tensor else tensor.copy_(target)

    def count_received(self, source: int) -> None:
        """Tell the sender, and the check after the call, that one more message has arrived."""
        self.received_from[source] += 1
        self.board.received[self._me, source] = self.received_from[source]

    def finish(self) -> None:
        """Nothing to do: gloo delivers on its own threads, and the caller compares the counts."""

    # Collectives

    def barrier(self) -> None:
        if self.device.type == "cpu":
            self.run("barrier", -1, dist.barrier, self._members)
        else:  # a stream's own barrier is a sum; reading it waits for the stream
            self.run("barrier", -1, lambda: self.all_reduce(torch.zeros(1, device=self.device)).item())

    def empty(self, n: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        if n < 0:
            raise ValueError(f"empty: {n} elements")
        return torch.zeros(n, dtype=dtype, device=self.device)

    def _posted(self, tensor: torch.Tensor, operation: str,
                start: Callable[[torch.Tensor], tuple[Any, Callable[[], object]]]) -> Handle:  # fmt: skip
        """Start a collective on contiguous memory: `start` gives its work, and what is to be done after it."""
        self.check_tensor(tensor, operation)
        if tensor.numel() == 0:
            return Then()
        memory = tensor.detach().to(self.device).contiguous()
        work, then = self.run(operation, -1, start, memory.view(-1))

        def put_back() -> None:
            then()
            if memory.data_ptr() != tensor.data_ptr():
                tensor.detach().copy_(memory)

        return Then(_Work(self, work, operation), then=put_back)

    def post_all_reduce(self, tensor: torch.Tensor) -> Handle:
        return self._posted(tensor, "all_reduce", self._sum)

    def _sum(self, flat: torch.Tensor) -> tuple[Any, Callable[[], object]]:
        return dist.all_reduce(flat, group=self._members, async_op=True), lambda: None

    def post_broadcast(self, tensor: torch.Tensor, root: int) -> Handle:
        return self._posted(tensor, "broadcast", lambda flat: (
            dist.broadcast(flat, group_src=root, group=self._members, async_op=True), lambda: None))  # fmt: skip

    def post_all_gather(self, tensor: torch.Tensor) -> Handle:
        return self._posted(tensor, "all_gather", self._gather)

    def post_reduce_scatter(self, tensor: torch.Tensor, out: torch.Tensor, add: bool) -> Handle:
        if self.name != "gloo":
            return self._posted(tensor, "reduce_scatter", partial(self._scatter, out=out, add=add))
        # gloo's reduce-scatter is an all-reduce of a copy (two lengths of the vector cross, for equal parts too), and
        # only who waits for it learns of its end: the all-reduce itself can be polled.
        part = tensor.view(-1)[slice(*self.bounds(tensor.numel()))]
        summed = self._posted(tensor, "reduce_scatter", self._sum)
        return Then(summed, then=lambda: out.add_(part) if add else out.copy_(part))

    def _padded(self, flat: torch.Tensor) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """Memory for parts that are all as long as the longest, which PyTorch asks for, and each rank's in it."""
        width, bounds = -(-flat.numel() // self.size), [self.bounds(flat.numel(), r) for r in range(self.size)]
        every = flat.new_zeros(self.size, width)
        return every, [row[: hi - lo] for row, (lo, hi) in zip(every, bounds, strict=True)]

    def _gather(self, flat: torch.Tensor) -> tuple[Any, Callable[[], object]]:
        (every, parts), (lo, hi) = self._padded(flat), self.bounds(flat.numel())
        mine = every.new_zeros(every.shape[1])
        mine[: hi - lo] = flat[lo:hi]
        work = _gather_into(every.view(-1), mine, self._members, async_op=True)
        return work, lambda: torch.cat(parts, out=flat)

    def _scatter(self, flat: torch.Tensor, out: torch.Tensor, add: bool) -> tuple[Any, Callable[[], object]]:
        every, parts = self._padded(flat)
        for part, place in zip(flat.split([len(part) for part in parts]), parts, strict=True):
            place.copy_(part)
        mine = torch.empty_like(every[0])
        work, own = _scatter_into(mine, every.view(-1), group=self._members, async_op=True), mine[: out.numel()]
        return work, lambda: out.add_(own) if add else out.copy_(own)

    # Messages that are posted

    def post_send(self, tensor: torch.Tensor, to: int) -> Handle:
        to = self._ranks[to]  # all groups' go the way of all ranks, so they keep one order a pair
        self._post(tensor.clone(), to)  # a copy, since gloo tells only who waits when the memory is free
        if tensor.is_cuda:
            tensor.record_stream(torch.cuda.current_stream())  # a stream's copy reads it later
        self.account.sent += tensor.numel() * tensor.element_size()
        self.sent_to[to] += 1
        return Then()

    def post_recv(self, tensor: torch.Tensor, source: int, add: bool = False) -> Handle:
        into, source = torch.empty_like(tensor) if add else tensor, self._ranks[source]
        message = _Work(self, dist.irecv(into, source, self._way(source, self._me)), "recv", source)
        return Then(message, then=partial(tensor.add_, into)) if add else message

    def edges(self, slots: Slots, elements: int, tokens: int, dtype: torch.dtype) -> Edges:
        return _Copies(self)

    def group(self, groups: Sequence[Sequence[int]]) -> Comm:
        made, group = [dist.new_group(list(ranks)) for ranks in groups], copy(self)
        group._ranks, group._members = next(pair for pair in zip(groups, made, strict=True) if self.rank in pair[0])
        group.rank, group.size = group._ranks.index(self.rank), len(group._ranks)
        return group

    def arrivals(self, tensor: torch.Tensor, sources: Sequence[int], each: int) -> Iterator[int]:
        for _ in range(each * len(sources)):
            source = self.run("recv", -1, dist.recv, tensor)  # of any rank: gloo can, NCCL cannot
            self.count_received(source)
            yield source


class _Copies(Edges):
    """Messages between stages as copies: no memory is common."""

    def __init__(self, comm: Comm) -> None:
        self._comm = comm

    def send(self, channel: Channel, tensor: torch.Tensor, to: int) -> Handle:
        return self._comm.post_send(tensor.contiguous(), to)

    def receive(self, shape: Sequence[int], dtype: torch.dtype, source: int, take: Taker) -> Then:
        memory = torch.empty(tuple(shape), dtype=dtype, device=self._comm.device)
        if memory.is_cuda:
            memory.record_stream(torch.cuda.default_stream())  # whose compute reads it
        return Then(self._comm.post_recv(memory, source), then=partial(take, memory))
