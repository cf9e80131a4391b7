"""Tokens to vectors and back: `Embedding`, learned `Positions`, and `Unembedding`, which may share a matrix."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from bpkit.description import layers as description
from bpkit.description.flat import Shape
from bpkit.nn.layer import Context, Layer, Pass, Site, put_sum
from bpkit.nn.layers.linear import Linear


class _Normal(Layer):
    """A layer whose parameters are drawn from N(0, 0.02), as in GPT-2 (Radford et al. 2019)."""

    def initial(self, shape: Shape, generator: torch.Generator) -> list[Tensor]:
        return [torch.randn(s, generator=generator, dtype=torch.float64).mul_(0.02)
                for s in self.parameter_shapes(shape)]  # fmt: skip


class Embedding(description.Embedding, _Normal):
    """y = W[token], W (vocabulary, width), for int64 tokens of any shape.

    Backward: row t of dW is the sum of dy over the places of token t, added in their order; there is no dx.

    Parameters
    ----------
    vocabulary, width : int
    tied : str
        Parameters of this name are one tensor; "" for a matrix of its own.
    rows : (int, int), optional
        Hold these rows of W only; other tokens give zeros (a tensor rank's share).
    """

    input_dtype = torch.int64

    def check(self, x: Tensor) -> None:
        """Refuse tokens outside the vocabulary, of which `rows` may be a part."""
        outside = (x < 0) | (x >= self.vocabulary)
        if outside.any():
            place = tuple(outside.nonzero()[0].tolist())
            raise ValueError(f"token {int(x[place])} at position {place} is outside the vocabulary of {self!r}: tokens "
                             f"run from 0 to {self.vocabulary - 1}")  # fmt: skip

    def at(self, site: Site) -> Pass:
        return _EmbeddingPass(self, site)

    def reference(self, x: Tensor, parameters: Sequence[Tensor], context: Context, site: Site) -> Tensor:
        low, high = self.bounds
        return F.embedding((x - low).clamp(0, high - low - 1), parameters[0]) * ((x >= low) & (x < high)).unsqueeze(-1)


class _EmbeddingPass(Pass):
    def __init__(self, layer: Embedding, site: Site) -> None:
        self._check = layer.check
        self._low, self._high = layer.bounds
        self._part, self._width = layer.rows is not None, layer.width
        (self._weight,), (self._dweight,) = site.parameters, site.gradients
        self._y = site.empty(*site.shape, layer.width)
        self._dy, self._tokens = self._y, torch.empty(0, dtype=torch.int64)
        self._outside: Tensor | None = None

    def forward(self, x: Tensor, context: Context) -> Tensor:
        self._tokens = x.reshape(-1)
        if self._part:
            self._outside = (self._tokens < self._low) | (self._tokens >= self._high)
            self._tokens = (self._tokens - self._low).masked_fill_(self._outside, 0)
        y = self._y.view(-1, self._width)
        try:
            torch.index_select(self._weight, 0, self._tokens, out=y)
        except IndexError:
            self._check(x)
            raise
        if self._outside is not None:
            y.masked_fill_(self._outside.unsqueeze(1), 0.0)
        return self._y

    def backward_input(self, dy: Tensor, need: bool = True) -> Tensor | None:
        self._dy = dy
        return None

    def backward_weight(self, accumulate: bool = False) -> None:
        if not accumulate:
            self._dweight.zero_()
        dy = self._dy.reshape(-1, self._width)
        if self._outside is not None:
            dy = dy.masked_fill(self._outside.unsqueeze(1), 0.0)
        self._dweight.index_add_(0, self._tokens, dy)


class Positions(description.Positions, _Normal):
    """y = x + P, P (length, width) learned; dx = dy, dP = sum of dy over rows."""

    fresh_gradient = False

    def at(self, site: Site) -> Pass:
        return _PositionsPass(site)

    def reference(self, x: Tensor, parameters: Sequence[Tensor], context: Context, site: Site) -> Tensor:
        return x + parameters[0]


class _PositionsPass(Pass):
    def __init__(self, site: Site) -> None:
        self._site, self._y = site, site.empty()
        self._dy = self._y

    def forward(self, x: Tensor, context: Context) -> Tensor:
        return torch.add(x, self._site.parameters[0], out=self._y)

    def backward_input(self, dy: Tensor, need: bool = True) -> Tensor | None:
        self._dy = dy
        return dy

    def backward_weight(self, accumulate: bool = False) -> None:
        put_sum(self._site.gradients[0], self._dy, 0, accumulate)


class Unembedding(description.Unembedding, _Normal, Linear):
    """Scores of the tokens, y = x W^T, by the matrix of the `Embedding` of the same `tied` name (Press and Wolf 2017,
    arXiv:1608.05859): its gradient is the sum of both layers' parts. Written ``Unembedding(width, vocabulary)``.
    Where the embedding lies in the same network, the embedding's first values count.
    """
