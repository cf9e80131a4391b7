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
from functools import partial
from itertools import cycle

import torch
from torch import Tensor

from bpkit.run.transports.comm import Channel, Comm, Edges, Handle, Slots, Taker, Then
from bpkit.run.transports.shared.names import Layout
from bpkit.run.transports.shared.semaphores import Waiter, open_semaphore
from bpkit.run.transports.shared.symmetric import Steps, run

Exchange = Iterator["Lane"]  # an exchange under way, by the tokens that it waits for


class Lane:
    """The tokens of one meaning between this rank and some peers, and what waits for them, first in, first out.

    An exchange takes one token of each peer.  Tokens bear no name, so each belongs to who has waited longest.

    Attributes
    ----------
    peers : list of int
        Their ranks in the whole, for errors.
    line : deque of Posted
    left : int
        Tokens that have not come for the first in line.
    """

    def __init__(self, layout: Layout, kind: str, rank: int, peers: Sequence[int], waiter: Waiter) -> None:
        self.peers, self.waiter = [layout.members[peer] for peer in peers], waiter
        self.tokens = [open_semaphore(layout.semaphore(kind, peer, rank)) for peer in peers]
        self._gives = [open_semaphore(layout.semaphore(kind, rank, peer)).release for peer in peers]
        self._takes = [(partial(token.acquire, False), token, peer)
                       for token, peer in zip(self.tokens, self.peers, strict=True)]  # fmt: skip
        self.line: deque[Posted] = deque()
        self.left = len(peers)

    def give(self) -> None:
        """Give each peer a token."""
        for release in self._gives:
            release()

    def came(self) -> bool:
        """Take the tokens of the first in line that are there; whether it now has all."""
        while self.left:
            if not self.tokens[self.left - 1].acquire(False):
                return False
            self.left -= 1
        self.left = len(self.tokens)
        return True

    def take(self, operation: str) -> None:
        """Wait for a token of each peer; nothing may stand in line."""
        for take, token, peer in self._takes:
            if not take():
                self.waiter.until(take, token, operation, peer)

    def __call__(self) -> None:
        """Let all act whose tokens have come; never blocks."""
        while self.line and self.line[0].lane.came():  # type: ignore[union-attr]
            self.line[0].act()
        if not self.line:
            self.waiter.duties.pop(self, None)


class Posted(Handle):
    """An exchange under way; it stands in line in `lane`, and has finished where that is None."""

    def __init__(self, exchange: Exchange, operation: str, polled: bool = False) -> None:
        self._exchange, self._operation, self.polled = exchange, operation, polled
        self.lane: Lane | None = None
        self.act()

    def act(self) -> None:
        """Go on until it must wait for tokens that have not come."""
        before = self.lane
        while (lane := next(self._exchange, None)) is not None:
            if lane is before:
                return  # still first in line, for another token of the same kind
            if lane.line or not lane.came():
                lane.line.append(self)
                lane.waiter.duties[lane] = None
                break
        if before is not None:
            before.line.popleft()
        self.lane = lane

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
                lane()
                return first.lane is not lane or lane.left != left

            lane.waiter.until(moved, lane.tokens[left - 1], self._operation, lane.peers[left - 1])


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
        self._ready, self._done = (Lane(layout, kind, rank, others, waiter) for kind in "rd")
        self._shown, self._seen, self.lent, self.returned, self.filled, self.free = (
            {peer: Lane(layout, kind, rank, [peer], waiter) for peer in others if kind in layout.kinds}
            for kind in "mtluio")  # fmt: skip

    # Protocols

    def together(self, steps: Steps) -> Exchange:
        """Once all ranks are ready each does its steps; it has ended once all have done theirs."""
        self._ready.give()
        yield self._ready
        run(steps)
        self._done.give()
        yield self._done

    def show(self, to: int) -> Exchange:
        """Let a peer read this rank's memory, until it says that it has."""
        self._shown[to].give()
        yield self._seen[to]

    def see(self, source: int, steps: Steps) -> Exchange:
        """Read a peer's memory once it is shown."""
        yield self._shown[source]
        self.read(source, steps)

    def read(self, source: int, steps: Steps) -> None:
        """Read what a peer shows, and say so."""
        run(steps)
        self._seen[source].give()

    def shown(self, source: int) -> bool:
        """Whether a peer shows its memory; `read` follows."""
        return self._shown[source].came()

    # Blocking

    def meet(self, operation: str) -> None:
        """Wait until all ranks are here, and have done what was posted before."""
        if self._ready.line or self._done.line:
            self.settle()
        self._ready.give()
        self._ready.take(operation)

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
        self._comm.account.sent += tensor.numel() * tensor.element_size()
        return Posted(self._lend(channel, tensor, to), "send", polled=True)  # the peer waits for it

    def receive(self, shape: Sequence[int], dtype: torch.dtype, source: int, take: Taker) -> Then:
        size, places = math.prod(shape), list[int]()
        return Then(Posted(self._borrow(source, places), "recv"),
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
        self.peers, self.waiter, self.left = returned.peers, returned.waiter, 1
        self.tokens, self.line = returned.tokens, returned.line

    def came(self) -> bool:
        while self._returned.came():
            self._loans.take_back(self.peers[0])
        return bool(self._loans.free[self._channel])
