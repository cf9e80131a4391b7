"""How ranks exchange anything in shared memory: release tokens, wait for tokens, act.

A token is one count of a semaphore from one rank to another, which also publishes what its giver has written.  A
protocol is a generator: it yields the lane whose tokens it waits for, and acts once they have come.  So a sum, a
message and a loan are a few lines each, which read in the order in which things happen; whoever waits, polls or
blocks moves them along.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterator, Sequence
from itertools import cycle

import torch
from torch import Tensor

from bpkit.run.transports.comm import Channel, Comm, Edges, Handle, Slots, Taker, Then
from bpkit.run.transports.shared.names import Layout
from bpkit.run.transports.shared.semaphores import Waiter, open_semaphore
from bpkit.run.transports.shared.symmetric import Steps

Exchange = Iterator["Lane"]  # an exchange under way, by the tokens that it waits for


class Lane:
    """The tokens of one meaning between this rank and some peers, and what waits for them, first in, first out.

    An exchange takes one token of each peer.  Tokens bear no name, so each belongs to who has waited longest.

    Attributes
    ----------
    line : deque of Posted
    left : int
        Tokens that have not come for the first in line.
    """

    def __init__(self, layout: Layout, kind: str, rank: int, peers: Sequence[int], waiter: Waiter,
                 operation: str) -> None:  # fmt: skip
        self.peers, self.waiter, self.operation = peers, waiter, operation
        self.tokens = [open_semaphore(layout.semaphore(kind, peer, rank)) for peer in peers]
        self._gives = [open_semaphore(layout.semaphore(kind, rank, peer)) for peer in peers]
        self.line: deque[Posted] = deque()
        self.left = len(peers)

    def give(self) -> None:
        """Give each peer a token."""
        for semaphore in self._gives:
            semaphore.release()

    def came(self) -> bool:
        """Take the tokens of the first in line that are there; whether it now has all."""
        while self.left:
            if not self.tokens[self.left - 1].acquire(False):
                return False
            self.left -= 1
        self.left = len(self.tokens)
        return True

    def take(self, operation: str = "") -> None:
        """Wait for a token of each peer; nothing may stand in line."""
        for peer, token in zip(self.peers, self.tokens, strict=True):
            if not token.acquire(False):
                self.waiter.take(token, operation or self.operation, peer)

    def __call__(self) -> None:
        """Let all act whose tokens have come; never blocks."""
        while self.line and self.line[0].lane.came():  # type: ignore[union-attr]
            self.line[0].act()
        if not self.line:
            self.waiter.duties.pop(self, None)


class Posted(Handle):
    """An exchange under way; it stands in line in `lane`, and has finished where that is None."""

    def __init__(self, exchange: Exchange, polled: bool = False) -> None:
        self._exchange, self.polled = exchange, polled
        self.lane: Lane | None = None
        self.act()

    def act(self) -> None:
        """Go on until it must wait for tokens again."""
        lane, before = next(self._exchange, None), self.lane
        if lane is before:
            return  # it waits for another token of the same kind, still first in line
        if before is not None:
            before.line.popleft()
        self.lane = lane
        if lane is not None:
            lane.line.append(self)
            lane.waiter.duties[lane] = None
            lane()

    def poll(self) -> bool:
        while (lane := self.lane) is not None:
            lane()
            if self.lane is lane:
                return False
        return True

    def wait(self) -> None:
        while not self.poll():
            assert self.lane is not None
            first = self.lane.line[0]  # woken by the next token that it lacks
            lane = first.lane or self.lane
            left = lane.left

            def moved(first: Posted = first, lane: Lane = lane, left: int = left) -> bool:
                return self.poll() or first.lane is not lane or lane.left != left

            lane.waiter.until(moved, lane.tokens[left - 1], lane.operation, lane.peers[left - 1])


class Protocols:
    """One rank's lanes, and what it does with the other ranks by them.

    Parameters
    ----------
    layout : Layout
    rank : int
    waiter : Waiter
    """

    def __init__(self, layout: Layout, rank: int, waiter: Waiter) -> None:
        others = [peer for peer in range(layout.ranks) if peer != rank]
        self._ready, self._done = (Lane(layout, kind, rank, others, waiter, "all_reduce") for kind in "rd")

        def each(kind: str, operation: str) -> dict[int, Lane]:
            return {peer: Lane(layout, kind, rank, [peer], waiter, operation) for peer in others}

        self._shown, self._seen = each("m", "recv"), each("t", "send")
        self.lent, self.returned = each("l", "recv"), each("u", "send")
        self.filled, self.free = (each("i", "recv"), each("o", "send")) if layout.frame_bytes else ({}, {})

    # Protocols

    def meet(self) -> Exchange:
        """All ranks are here."""
        self._ready.give()
        yield self._ready

    def together(self, steps: Steps) -> Exchange:
        """Once all ranks are ready each does its steps; it has ended once all have done theirs."""
        self._ready.give()
        yield self._ready
        for function, arguments in steps:
            function(*arguments)
        self._done.give()
        yield self._done

    def show(self, to: int) -> Exchange:
        """Let a peer read this rank's memory, until it says that it has."""
        self._shown[to].give()
        yield self._seen[to]

    def see(self, source: int, steps: Steps) -> Exchange:
        """Read a peer's memory once it is shown."""
        yield self._shown[source]
        for function, arguments in steps:
            function(*arguments)
        self._seen[source].give()

    # How they are carried out

    def complete(self, exchange: Exchange, operation: str) -> None:
        """Carry out an exchange of all ranks, after those that are posted: the same as posted and waited for."""
        if self._ready.line or self._done.line:
            self.settle()
        for lane in exchange:
            lane.take(operation)

    def settle(self, *more: Lane) -> None:
        """Finish what all ranks have posted, and what stands in line in `more`."""
        for lane in (self._ready, self._done, *more):
            while lane.line:
                lane.line[-1].wait()


class Loans(Edges):
    """One rank's messages through memory of all ranks (see `Comm.edges`): lent, read in place, given back.

    A sender writes a message once, into a slot that its peer sees; the peer computes from that memory and gives the
    slot back after its backward.  A channel has as many slots as the receiver's row ever holds of it, so a send that
    its receive has been posted for always finds one.
    """

    def __init__(self, comm: Comm, protocols: Protocols, slots: Slots, elements: int, tokens: int,
                 dtype: torch.dtype) -> None:  # fmt: skip
        self._comm, self._lanes = comm, (protocols.lent, protocols.returned)
        self._memory = comm.peers(comm.empty(elements, dtype)) or []
        for lane in protocols.returned.values():  # of slots of the run before, which its end did not wait for
            while lane.came():
                pass
        words = comm.peers(comm.empty(2 * comm.size * tokens, torch.int64)) or []
        self._words = [row.view(2, comm.size, tokens).numpy() for row in words]  # [rank][way, peer, number]
        self._said, self._heard = ([{peer: cycle(range(tokens)) for peer in lanes} for lanes in self._lanes]
                                   for _ in (0, 1))  # fmt: skip
        self.free: dict[Channel, list[int]] = {}
        self._channel: dict[int, Channel] = {}
        low = 0
        for channel, (count, size) in slots.items():
            self.free[channel] = [low + i * size for i in range(count)]
            self._channel |= dict.fromkeys(self.free[channel], channel)
            low += count * size
        self._slots = {(channel, peer): _FreeSlot(self, lane, channel)
                       for channel in slots for peer, lane in protocols.returned.items()}  # fmt: skip

    def send(self, channel: Channel, tensor: Tensor, to: int) -> Handle:
        self._comm.sent += tensor.numel() * tensor.element_size()
        return Posted(self._lend(channel, tensor, to), polled=True)  # the peer waits for it

    def receive(self, shape: Sequence[int], dtype: torch.dtype, source: int, take: Taker) -> Then:
        size, places = math.prod(shape), list[int]()
        return Then(Posted(self._borrow(source, places)),
                    then=lambda: take(self._memory[source][places[0] : places[0] + size].view(*shape)),
                    release=lambda: self._say(1, source, places[0]))  # fmt: skip

    def _lend(self, channel: Channel, tensor: Tensor, to: int) -> Exchange:
        yield self._slots[channel, to]
        place = self.free[channel].pop()
        self._memory[self._comm.rank][place : place + tensor.numel()].view(tensor.shape).copy_(tensor)
        self._say(0, to, place)

    def _borrow(self, source: int, places: list[int]) -> Exchange:
        yield self._lanes[0][source]
        places.append(self._hear(0, source))

    def take_back(self, peer: int) -> None:
        """A peer has returned a slot."""
        place = self._hear(1, peer)
        self.free[self._channel[place]].append(place)

    def _say(self, way: int, peer: int, place: int) -> None:
        """Tell a peer a place: written first, published by the token."""
        self._words[self._comm.rank][way, peer, next(self._said[way][peer])] = place
        self._lanes[way][peer].give()

    def _hear(self, way: int, peer: int) -> int:
        """The place that came with a token."""
        return int(self._words[peer][way, self._comm.rank, next(self._heard[way][peer])])


class _FreeSlot(Lane):
    """What waits for a free slot of a channel; all channels to a peer stand in one line: messages keep their order."""

    def __init__(self, loans: Loans, returned: Lane, channel: Channel) -> None:
        self._loans, self._returned, self._channel = loans, returned, channel
        self.peers, self.waiter, self.operation = returned.peers, returned.waiter, returned.operation
        self.tokens, self.line, self.left = returned.tokens, returned.line, 1

    def came(self) -> bool:
        while self._returned.came():
            self._loans.take_back(self.peers[0])
        return bool(self._loans.free[self._channel])
