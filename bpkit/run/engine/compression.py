"""REDUCE_GRAD with compression: what `bpkit.compress` describes, exchanged over the data axis."""

from __future__ import annotations

import math
from functools import partial

import torch
from torch import Tensor

from bpkit.compress import Codec, Compressor, PowerSGD
from bpkit.nn import Network
from bpkit.run.transports.comm import Comm, Handle, Then


def reducer(compressor: Compressor, network: Network, comm: Comm) -> Gathered | LowRank:
    """What reduces the gradient of a stage: called once a step; `payload` says the bytes that it sends.

    All ranks of `comm` make theirs in the same order.
    """
    if isinstance(compressor, PowerSGD):
        return LowRank(compressor, network, comm)
    assert isinstance(compressor, Codec)
    return Gathered(compressor, network.flat_gradients, comm)


class Gathered:
    """Every rank gets the codes of all, and adds what they stand for in the order of ranks."""

    def __init__(self, codec: Codec, flat: Tensor, comm: Comm) -> None:
        self._codec, self._flat, self._comm = codec, flat, comm
        self.payload = codec.size(len(flat), flat.element_size())
        self._codes = comm.empty(comm.size * self.payload, torch.uint8)
        self.residual = torch.zeros_like(flat)

    def __call__(self) -> Handle:
        own = self._codes.view(self._comm.size, -1)[self._comm.rank]
        if self._codec.feedback:
            self._flat.add_(self.residual)
        self._codec.encode(self._flat, own)
        if self._codec.feedback:
            torch.sub(self._flat, self._codec.decode(own, self._flat), out=self.residual)
        return Then(self._comm.post_all_gather(self._codes), then=self._sum)

    def _sum(self) -> None:
        self._flat.zero_()
        for code in self._codes.view(self._comm.size, -1):
            self._flat.add_(self._codec.decode(code, self._flat))


class LowRank:
    """PowerSGD on the matrices of a stage; tensors that are not worth it travel whole, with the first factors."""

    def __init__(self, compressor: PowerSGD, network: Network, comm: Comm) -> None:
        self._comm = comm
        gradients = [network.gradients()[i] for i in network.description.own]
        self._matrices = [g.view(len(g), -1) for g in gradients if compressor.applies(g)]
        self._others = [g for g in gradients if not compressor.applies(g)]
        r = compressor.rank
        make = partial(_laid_out, comm, network.dtype)
        first, factors = make([(len(m), r) for m in self._matrices] + [tuple(g.shape) for g in self._others])
        self._left, self._whole = factors[: len(self._matrices)], factors[len(self._matrices) :]
        second, self._right = make([(m.shape[1], r) for m in self._matrices])
        self._sums = first, second
        self.payload = sum(flat.numel() * flat.element_size() for flat in self._sums)
        seed = torch.Generator().manual_seed(0)
        for q in self._right:
            q.copy_(torch.randn(q.shape, generator=seed, dtype=torch.float64))
        self._residuals = [torch.zeros_like(m) for m in self._matrices]

    def __call__(self) -> None:
        """Blocks: the second sum needs the first."""
        for place, gradient in zip(self._whole, self._others, strict=True):
            place.copy_(gradient)
        for m, residual, p, q in zip(self._matrices, self._residuals, self._left, self._right, strict=True):
            torch.mm(m.add_(residual), q, out=p)
        self._comm.all_reduce(self._sums[0])
        for m, residual, p, q in zip(self._matrices, self._residuals, self._left, self._right, strict=True):
            p.copy_(torch.linalg.qr(p).Q)
            torch.mm(m.T, p, out=q)
            torch.sub(m, p @ q.T, out=residual)
        if self._right:
            self._comm.all_reduce(self._sums[1])
        for m, p, q in zip(self._matrices, self._left, self._right, strict=True):
            torch.mm(p, q.T, out=m)
        for place, gradient in zip(self._whole, self._others, strict=True):
            gradient.copy_(place)


def _laid_out(comm: Comm, dtype: torch.dtype, shapes: list[tuple[int, ...]]) -> tuple[Tensor, list[Tensor]]:
    """Memory that is summed in one piece, and the tensors in it."""
    sizes = [math.prod(shape) for shape in shapes]
    flat = comm.empty(sum(sizes), dtype)
    return flat, [part.view(shape) for part, shape in zip(flat.split(sizes), shapes, strict=True)]
