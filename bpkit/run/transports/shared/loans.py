"""Activations and their gradients between stages: lent by the sender, read in place, given back.

On shared memory a sender writes a message once, into a slot that its peer sees; the peer computes from that memory
and gives the slot back after its backward.  A channel has as many slots as the receiver's row ever holds of it
(`Program.slots`), so a send that its receive has been posted for always finds one.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence

import torch
from torch import Tensor

from bpkit.run.transports.comm import Channel, Comm, Edges, Handle, Slots, Taker, Then
from bpkit.run.transports.shared.semaphores import Pairs, Waiter

_LENT, _RETURNED = 0, 1


class Loans(Edges):
    """One rank's messages through memory of all ranks (see `Comm.edges`).

    Parameters
    ----------
    lent, returned : mapping of rank to pair of semaphores
    waiter : Waiter
    """

    def __init__(self, comm: Comm, lent: Pairs, returned: Pairs, waiter: Waiter, slots: Slots, elements: int,
                 tokens: int, dtype: torch.dtype) -> None:  # fmt: skip
        self._comm, self._tokens, self._waiter = comm, tokens, waiter
        for semaphore, _ in returned.values():  # of slots of the run before, which its end did not wait for
            while semaphore.acquire(False):
                pass
        self._rows = comm.peers(comm.empty(elements, dtype)) or []
        words = comm.peers(comm.empty(2 * comm.size * tokens, torch.int64)) or []
        self._words = [row.view(2, comm.size, tokens).numpy() for row in words]  # [rank][way, peer, number]
        self._semaphores = (lent, returned)
        self._free: dict[Channel, list[int]] = {}
        self._channel: dict[int, Channel] = {}
        low = 0
        for channel, (count, size) in slots.items():
            self._free[channel] = [low + i * size for i in range(count)]
            self._channel |= dict.fromkeys(self._free[channel], channel)
            low += count * size
        self._outgoing: dict[int, deque[_Message]] = {peer: deque() for peer in lent}
        self._incoming: dict[int, deque[_Message]] = {peer: deque() for peer in lent}
        self._said = {(way, peer): 0 for way in (_LENT, _RETURNED) for peer in lent}
        self._heard = dict(self._said)

    def send(self, channel: Channel, tensor: Tensor, to: int) -> Handle:
        self._comm.sent += tensor.numel() * tensor.element_size()
        message = _Message(self, to, _RETURNED, channel, tensor)
        self._outgoing[to].append(message)
        self._waiter.duties[self._advance] = None
        return message

    def _advance(self) -> None:
        """Send what waits for a slot, while this rank waits for something else."""
        for peer, waiting in self._outgoing.items():
            if waiting:
                self.move(peer)
        if not any(self._outgoing.values()):
            self._waiter.duties.pop(self._advance, None)

    def receive(self, shape: Sequence[int], dtype: torch.dtype, source: int, take: Taker) -> Then:
        message = _Message(self, source, _LENT)
        self._incoming[source].append(message)
        size = math.prod(shape)
        return Then(message, then=lambda: take(self._rows[source][message.place : message.place + size].view(*shape)),
                    release=lambda: self._say(_RETURNED, source, message.place))  # fmt: skip

    def _say(self, way: int, peer: int, word: int) -> None:
        """Tell a peer a number: written first, published by the semaphore."""
        self._words[self._comm.rank][way, peer, self._said[way, peer] % self._tokens] = word
        self._said[way, peer] += 1
        self._semaphores[way][peer][1].release()

    def _hear(self, way: int, peer: int) -> int | None:
        """The next number that a peer told, if there is one."""
        if not self._semaphores[way][peer][0].acquire(False):
            return None
        number, self._heard[way, peer] = self._heard[way, peer], self._heard[way, peer] + 1
        return int(self._words[peer][way, self._comm.rank, number % self._tokens])

    def move(self, peer: int) -> None:
        """Hand out what a peer lent and take back what it returned; send what waits for a slot, in order."""
        while (place := self._hear(_RETURNED, peer)) is not None:
            self._free[self._channel[place]].append(place)
        waiting = self._outgoing[peer]
        while waiting and self._free[waiting[0].channel]:
            message = waiting.popleft()
            message.place = self._free[message.channel].pop()
            slot = self._rows[self._comm.rank][message.place : message.place + message.tensor.numel()]
            slot.view(message.tensor.shape).copy_(message.tensor)
            self._say(_LENT, peer, message.place)
            message.finished = True
        while self._incoming[peer] and (place := self._hear(_LENT, peer)) is not None:
            received = self._incoming[peer].popleft()
            received.place, received.finished = place, True

    def wait(self, message: _Message, peer: int, way: int) -> None:
        """Block until a message has moved."""
        self._waiter.until(message.poll, self._semaphores[way][peer][0], "recv" if way == _LENT else "send", peer)


class _Message(Handle):
    """One message at either end; `way` is the token that it waits for."""

    def __init__(self, book: Loans, peer: int, way: int, channel: Channel = ("", 0),
                 tensor: Tensor | None = None) -> None:  # fmt: skip
        self._book, self._peer, self._way, self.channel = book, peer, way, channel
        self.tensor = torch.empty(0) if tensor is None else tensor
        self.place, self.finished = -1, False
        self.polled = way == _RETURNED  # the peer waits for it

    def poll(self) -> bool:
        if not self.finished:
            self._book.move(self._peer)
        return self.finished

    def wait(self) -> None:
        self._book.wait(self, self._peer, self._way)
