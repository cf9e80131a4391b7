"""Gradient compression: what a rank sends instead of a bucket's gradient, the bytes, and what is lost.

A compressor is a frozen description, given to ``Cluster.train(..., compress=...)``; a run with one is of class
*lossy*, within the bound that its docstring states.  Every rank encodes its own gradient, a sum of loss terms, all
ranks exchange the encoded bytes, and each adds what all have sent, decoded to the network's dtype, in the order of
ranks: the same bits on every rank.  (`PowerSGD` sums its two factors over ranks instead.)

*Error feedback* (Seide et al. 2014, Interspeech; Stich et al. 2018, arXiv:1809.07599): a rank keeps what it has
not sent, the residual, and adds it to its next gradient, so that over steps ::

    sum of what was applied = sum of the true gradients - the ranks' last residuals

to rounding.  Gradients are sums; the scale is applied afterwards, in UPDATE.  So a residual means to the next step
what it meant to its own only while the number of loss terms of the global batch stays the same from step to step.

Below, n is the number of elements of a bucket (a stage's flat gradient, padding included), b the bytes of one
(4 or 8), v the gradient of a rank plus its residual, and bounds are for one rank and one step, to rounding in the
network's dtype; the error of the sum is at most the sum of theirs.  Encoded sizes are rounded up to 8 bytes.
"""

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor


class Compressor:
    """Base of all compressors.

    Attributes
    ----------
    feedback : bool
        Whether a rank keeps what was not sent and adds it to its next gradient.
    """

    feedback = True


class Codec(Compressor):
    """A compressor that turns a flat gradient into bytes, and bytes into a gradient."""

    def size(self, n: int, itemsize: int) -> int:
        """Bytes that encode `n` elements of `itemsize` bytes, rounded up to 8."""
        return -(-self._bytes(n, itemsize) // 8) * 8

    def _bytes(self, n: int, itemsize: int) -> int:
        raise NotImplementedError

    def encode(self, values: Tensor, out: Tensor) -> None:
        """Write the code of `values`, shape (n,), into `out`: bytes, uint8, shape (size,)."""
        raise NotImplementedError

    def decode(self, code: Tensor, like: Tensor) -> Tensor:
        """What a code stands for, shape and dtype of `like`."""
        raise NotImplementedError


@dataclass(frozen=True)
class BF16(Codec):
    """Each element as bfloat16, 8 bits of precision, with float32's range; no feedback.

    - Bytes: 2 n.
    - Bound: |error| <= 2^-8 |v|, each element (rounding to nearest; in the range of normal float32 numbers).
    - Source: Kalamkar et al. 2019, arXiv:1905.12322.
    """

    feedback = False

    def _bytes(self, n: int, itemsize: int) -> int:
        return 2 * n

    def encode(self, values: Tensor, out: Tensor) -> None:
        out.view(torch.bfloat16)[: len(values)] = values

    def decode(self, code: Tensor, like: Tensor) -> Tensor:
        return code.view(torch.bfloat16)[: len(like)].to(like.dtype)


class Scaled(Codec):
    """Each element divided by a scale that is sent with them, as a number of type `kind`."""

    kind: ClassVar[torch.dtype]

    def _scale(self, most: float) -> float:
        """The scale of a gradient whose largest magnitude is `most`; never 0."""
        raise NotImplementedError

    def _bytes(self, n: int, itemsize: int) -> int:
        return 8 + n * self.kind.itemsize

    def encode(self, values: Tensor, out: Tensor) -> None:
        scale = self._scale(float(values.abs().max()))
        scaled = values.double() / scale
        out[:8].view(torch.float64).fill_(scale)
        out[8:].view(self.kind)[: len(values)] = scaled if self.kind.is_floating_point else scaled.round_()

    def decode(self, code: Tensor, like: Tensor) -> Tensor:
        return (code[8:].view(self.kind)[: len(like)].double() * code[:8].view(torch.float64)).to(like.dtype)


@dataclass(frozen=True)
class FP16(Scaled):
    """Each element as float16, 11 bits of precision, times a power of two that is sent with them; no feedback.

    Gradient sums overflow float16 (65,504): the power, one a bucket and rank, brings the largest element to
    2^14 or more and below 2^15, and the sum over ranks is made in the network's dtype.

    - Bytes: 2 n + 8.
    - Bound: |error| <= 2^-11 |v| + 2^-39 max |v|, each element (the second where the scaled element is subnormal).
    - Source: Micikevicius et al. 2017, arXiv:1710.03740 (loss scaling; here it is the gradient).
    """

    feedback = False
    kind = torch.float16

    def _scale(self, most: float) -> float:
        return math.ldexp(1.0, max(-1000, math.frexp(most)[1]) - 15)


@dataclass(frozen=True)
class Int8(Scaled):
    """Each element as one of 255 even steps from -max |v| to max |v|, with error feedback.

    - Bytes: n + 8 (the step is sent with them).
    - Bound: |error| <= max |v| / 254, each element; so is what the residual holds.
    - Source: Alistarh et al. 2017 (QSGD), arXiv:1610.02132, rounding to nearest and feeding the error back (Seide
      et al. 2014) instead of rounding at random.
    """

    kind = torch.int8

    def _scale(self, most: float) -> float:
        return most / 127 or 1.0  # zeros only: any scale will do


@dataclass(frozen=True)
class TopK(Codec):
    """The k = ceil(share n) elements that are largest in magnitude, and where they are, with error feedback.

    - Bytes: k (b + 4).
    - Bound: |error|^2 <= (1 - k/n) |v|^2, in the Euclidean norm; so is what the residual holds.
    - Source: Stich et al. 2018, arXiv:1809.07599 (the bound: lemma A.1), Lin et al. 2018 (Deep Gradient
      Compression), arXiv:1712.01887, without its momentum correction and warm-up.

    Parameters
    ----------
    share : float
        Of the elements of each bucket; above 0, at most 1.
    """

    share: float = 0.01

    def __post_init__(self) -> None:
        if not 0 < self.share <= 1:
            raise ValueError(f"TopK sends a share above 0 and at most 1 of the elements, not {self.share!r}")

    def count(self, n: int) -> int:
        """Elements that are sent of `n`."""
        return math.ceil(self.share * n)

    def _bytes(self, n: int, itemsize: int) -> int:
        return self.count(n) * (itemsize + 4)

    def encode(self, values: Tensor, out: Tensor) -> None:
        k, width = self.count(len(values)), values.element_size()
        where = values.abs().topk(k, sorted=False).indices
        out[: k * width].view(values.dtype).copy_(values[where])
        out[k * width : k * (width + 4)].view(torch.int32).copy_(where)

    def decode(self, code: Tensor, like: Tensor) -> Tensor:
        k, width = self.count(len(like)), like.element_size()
        where = code[k * width : k * (width + 4)].view(torch.int32).long()
        return torch.zeros_like(like).index_copy_(0, where, code[: k * width].view(like.dtype))


@dataclass(frozen=True)
class PowerSGD(Compressor):
    """Each matrix V as a product P Q' of rank `rank`, by one step of power iteration a step, with error feedback.

    P = orthonormal columns of sum V Q, with the Q of the step before (at first normal numbers of a fixed seed, the
    same on every rank); then Q = sum V' P; both sums are all-reduces, and P Q' is the gradient.  A rank's residual
    is V - P P' V.  A tensor of rows x columns (the first dimension x all others) goes so where
    rank (rows + columns) < rows columns; others, biases among them, go whole, beside the first factor.

    - Bytes: b rank (rows + columns) for each such matrix, b for each element of the others.
    - Bound: |error| <= |v| in the Euclidean norm (a projection), and no error where the sum over ranks has
      at most rank `rank` and the residuals have been zero; the rest is left to feedback.
    - The second sum needs the first, so the reduction blocks, and a plan with a pipeline is refused.
    - Source: Vogels et al. 2019, arXiv:1905.13727; its residual is taken against the mean over ranks, ours against
      the rank's own projection, which also keeps the sum of residuals and is never longer than v.

    Parameters
    ----------
    rank : int
        At least 1.
    """

    rank: int = 4

    def __post_init__(self) -> None:
        if not isinstance(self.rank, int) or isinstance(self.rank, bool) or self.rank < 1:
            raise ValueError(f"PowerSGD needs a whole rank of at least 1, not {self.rank!r}")

    def applies(self, tensor: Tensor) -> bool:
        """Whether a gradient of this shape is sent as two factors."""
        rows, columns = len(tensor), tensor.numel() // max(1, len(tensor))
        return tensor.ndim > 1 and self.rank * (rows + columns) < rows * columns
