"""Causal self-attention by heads, and the block of a transformer."""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from bpkit.description import layers as description
from bpkit.nn.layer import Context, Layer, Pass, Site
from bpkit.nn.layers.containers import Residual, Sequential
from bpkit.nn.layers.dropout import Dropout
from bpkit.nn.layers.linear import GELU, Linear
from bpkit.nn.layers.normalisation import LayerNorm


class Heads(description.Heads, Layer):
    """y = softmax(q k^T / sqrt(d) + mask) v in each head (Vaswani et al. 2017, arXiv:1706.03762), on samples of shape
    (tokens, 3 heads d): all queries, all keys, all values, each head by head. Output (tokens, heads d).

    Backward, with p the softmax, dp = dy v^T and ds = p (dp - sum of dp p over keys): dv = p^T dy,
    dq = ds k / sqrt(d), dk = ds^T q / sqrt(d). All of it is the input half; there are no parameters.

    Parameters
    ----------
    heads : int
    causal : bool
        A token sees itself and earlier tokens only.
    fused : bool, optional
        Use PyTorch's fused kernels, which keep no (tokens, tokens) matrix: equal up to rounding, and on a GPU not in
        float64. None: on the CPU yes, elsewhere no.
    """

    keeps_output = True

    def at(self, site: Site) -> Pass:
        cpu = site.device.type == "cpu"
        if not (cpu if self.fused is None else self.fused):
            return _HeadsPass(self, site)
        if not cpu and site.dtype is torch.float64:
            raise ValueError(f"{self!r}: fused kernels compute in float64 on the CPU only, not on {site.device}")
        return (_FusedPass if cpu else _EfficientPass)(self, site)

    def reference(self, x: Tensor, parameters: Sequence[Tensor], context: Context, site: Site) -> Tensor:
        q, k, v = _split(x, self.heads)
        mask = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool, device=x.device)
        scores = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])
        if self.causal:
            scores = scores.masked_fill(~mask.tril(), -math.inf)
        return (F.softmax(scores, -1) @ v).transpose(1, 2).flatten(2)


def _split(x: Tensor, heads: int) -> tuple[Tensor, ...]:
    """Return views of queries, keys and values, each (rows, heads, tokens, d)."""
    rows, tokens, width = x.shape
    return x.view(rows, tokens, 3, heads, width // (3 * heads)).permute(2, 0, 3, 1, 4).unbind(0)


class _HeadsPass(Pass):
    def __init__(self, layer: Heads, site: Site) -> None:
        rows, tokens, width = site.shape
        self._heads, self._scale = layer.heads, 1 / math.sqrt(width // (3 * layer.heads))
        unseen = torch.ones(tokens, tokens, dtype=torch.bool, device=site.device).triu(1)
        self._unseen = unseen if layer.causal else torch.zeros_like(unseen)
        self._y, self._dx = site.empty(rows, tokens, width // 3), site.empty()
        self._out = self._y.view(rows, tokens, layer.heads, width // (3 * layer.heads)).transpose(1, 2)
        self._x = self._p = self._y

    def forward(self, x: Tensor, context: Context) -> Tensor:
        self._x = x
        q, k, v = _split(x, self._heads)
        scores = (q @ k.transpose(-1, -2)).mul_(self._scale).masked_fill_(self._unseen, -math.inf)
        self._p = torch.softmax(scores, -1)
        self._out.copy_(self._p @ v)
        return self._y

    def backward_input(self, dy: Tensor, need: bool = True) -> Tensor | None:
        (q, k, v), (dq, dk, dv) = _split(self._x, self._heads), _split(self._dx, self._heads)
        dy = dy.view(*dy.shape[:2], self._heads, -1).transpose(1, 2) if len(dy) else self._out
        dp = dy @ v.transpose(-1, -2)
        ds = dp.sub_((dp * self._p).sum(-1, keepdim=True)).mul_(self._p).mul_(self._scale)
        dq.copy_(ds @ k)
        dk.copy_(ds.transpose(-1, -2) @ q)
        dv.copy_(self._p.transpose(-1, -2) @ dy)
        return self._dx


class _FusedPass(Pass):
    """The same by PyTorch's kernels (Dao et al. 2022, arXiv:2205.14135), which keep the sums of exponentials only."""

    def __init__(self, layer: Heads, site: Site) -> None:
        self._heads, self._causal = layer.heads, layer.causal
        self._dx = site.empty()
        self._kept: tuple[Tensor, ...] = ()

    def forward(self, x: Tensor, context: Context) -> Tensor:
        q, k, v = _split(x, self._heads)
        y, *more = self._attend(q, k, v)
        self._kept = (q, k, v, y, *more)
        return y.transpose(1, 2).flatten(2)

    def backward_input(self, dy: Tensor, need: bool = True) -> Tensor | None:
        if not len(dy):
            return self._dx
        dy = dy.reshape(*dy.shape[:2], self._heads, -1).transpose(1, 2)
        for own, made in zip(_split(self._dx, self._heads), self._gradients(dy, *self._kept), strict=True):
            own.copy_(made)
        return self._dx

    def _attend(self, *qkv: Tensor) -> tuple[Tensor, ...]:
        """The output, and what the gradients need besides."""
        return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(*qkv, 0.0, self._causal)

    def _gradients(self, *kept: Tensor) -> tuple[Tensor, ...]:
        """The gradients of queries, keys and values."""
        return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(*kept, 0.0, self._causal)


class _EfficientPass(_FusedPass):
    """The same on a GPU, by the kernel that also takes float32 (Rabe and Staats 2021, arXiv:2112.05682)."""

    def _attend(self, *qkv: Tensor) -> tuple[Tensor, ...]:
        return torch.ops.aten._scaled_dot_product_efficient_attention(*qkv, None, True, 0.0, self._causal)

    def _gradients(self, *kept: Tensor) -> tuple[Tensor, ...]:
        (dy, *qkv), more, wanted = kept[:4], kept[4:], (True, True, True, False)
        backward = torch.ops.aten._scaled_dot_product_efficient_attention_backward
        return backward(dy, *qkv, None, *more, 0.0, wanted, self._causal)[:3]


class Attention(Sequential):
    """Multi-head self-attention: Linear(width, 3 width), `Heads`, Linear(width, width).

    The third of the first bias that belongs to the keys has no gradient in theory: it shifts all scores of a row alike.

    Raises
    ------
    ValueError
        If the width is not a multiple of the heads.
    """

    def __init__(self, width: int, heads: int, causal: bool = True, fused: bool | None = None) -> None:
        if heads < 1 or width % heads:
            raise ValueError(f"a width of {width} cannot be divided among {heads} heads")
        super().__init__(Linear(width, 3 * width), Heads(heads, causal, fused), Linear(width, width))


def block(width: int, heads: int, dropout: float = 0.0, fused: bool | None = None) -> list[Layer]:
    """Return the two halves of a transformer's block, with the norm in front as in GPT-2 (Radford et al. 2019):
    x + attention(norm(x)) and x + mlp(norm(x)), the mlp four times as wide; each ends in dropout, if any.
    """
    drop = [Dropout(dropout)] if dropout else []
    mlp = (Linear(width, 4 * width), GELU(), Linear(4 * width, width))
    return [Residual(LayerNorm(width), Attention(width, heads, fused=fused), *drop),
            Residual(LayerNorm(width), *mlp, *drop)]  # fmt: skip
