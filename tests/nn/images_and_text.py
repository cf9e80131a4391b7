"""Networks of layers for images and for text, and batches for them."""

from __future__ import annotations

import torch

from bpkit import nn

from .cases import D

IMAGE = (2, 6, 6)
TOKENS = 5
NORMED = [nn.Conv2d(2, 4, 3, padding=1), nn.BatchNorm(4), nn.ReLU()]  # the bias of the first vanishes in theory

LAYERS: dict[str, tuple[tuple[int, ...], list[nn.Layer]]] = {
    "embedding": ((TOKENS,), [nn.Embedding(7, 8), nn.Positions(TOKENS, 8), nn.Linear(8, 4)]),
    "positions first": ((TOKENS, 6), [nn.Positions(TOKENS, 6), nn.ReLU(), nn.Linear(6, 4)]),
    "attention": ((TOKENS, 6), [nn.Attention(6, 2, fused=False), nn.Linear(6, 4)]),
    "attention, fused": ((TOKENS, 6), [nn.Attention(6, 2, fused=True), nn.Linear(6, 4)]),
    "attention, all see all": ((TOKENS, 6), [nn.Attention(6, 3, causal=False, fused=False), nn.Linear(6, 4)]),
    "heads first": ((TOKENS, 12), [nn.Heads(2), nn.Linear(4, 4)]),
    "blocks": ((TOKENS, 8), [*nn.block(8, 2, 0.1), *nn.block(8, 4, fused=False), nn.Linear(8, 4)]),
    "tied": (
        (TOKENS,),
        [nn.Embedding(4, 8, "m"), nn.Positions(TOKENS, 8), *nn.block(8, 2), nn.Unembedding(8, 4, tied="m")],
    ),
    "tied inside": (
        (TOKENS,),
        [nn.Sequential(nn.Embedding(4, 8, "m"), nn.Positions(TOKENS, 8)), nn.Unembedding(8, 4, tied="m")],
    ),
    "tied three times": (
        (TOKENS,),
        [nn.Embedding(4, 8, "m"), nn.Unembedding(8, 4, tied="m"), nn.Linear(4, 8), nn.Unembedding(8, 4, tied="m")],
    ),
    "tied, owner with a bias": (
        (TOKENS, 6),
        [
            nn.Linear(6, 8),
            nn.Unembedding(8, 4, bias=True, tied="m"),
            nn.Linear(4, 8),
            nn.Unembedding(8, 4, bias=True, tied="m"),
        ],
    ),
    "two tied names, one in containers": (
        (TOKENS,),
        [
            nn.Sequential(
                nn.Embedding(4, 8, "a"),
                nn.Unembedding(8, 8, bias=True, tied="b"),
                nn.Residual(nn.Tanh(), nn.Unembedding(8, 8, bias=True, tied="b")),
            ),
            nn.Residual(nn.Unembedding(8, 8, tied="b"), nn.Tanh(), nn.Sequential(nn.Unembedding(8, 8, True, "b"))),
            nn.Unembedding(8, 4, tied="a"),
        ],
    ),
    "convolution": (
        IMAGE,
        [
            nn.Conv2d(2, 3, 3, padding=1),
            nn.Tanh(),
            nn.Conv2d(3, 4, 2, stride=2, bias=False),
            nn.Flatten(),
            nn.Linear(36, 4),
        ],
    ),
    "max pool": (IMAGE, [nn.Conv2d(2, 3, 3, padding=1), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(27, 4)]),
    "average pool": (IMAGE, [nn.AveragePool2d(3), nn.Flatten(), nn.ReLU(), nn.Linear(8, 4)]),
    "reshape": ((12,), [nn.Linear(12, 12), nn.Reshape((3, 2, 2)), nn.ReLU(), nn.Flatten(), nn.Linear(12, 4)]),
    "group norm": (
        IMAGE,
        [nn.Conv2d(2, 4, 3), nn.GroupNorm(4), nn.ReLU(), nn.GroupNorm(4, 2), nn.Flatten(), nn.Linear(64, 4)],
    ),
    "batch norm": (IMAGE, [*NORMED, nn.Flatten(), nn.Linear(144, 4)]),
    "batch norm of vectors": ((6,), [nn.BatchNorm(6), nn.Linear(6, 8), nn.BatchNorm(8), nn.Tanh(), nn.Linear(8, 4)]),
}
# Parameters whose gradient is zero but for rounding: a bias in front of batch norm, and a shift before that.
VANISHING = {"batch norm": {1}, "batch norm of vectors": {1, 3}}
COUPLED = {"batch norm", "batch norm of vectors"}  # rows of a microbatch are not independent


def network(name: str, seed: int = 1) -> nn.Network:
    shape, layers = LAYERS[name]
    net = nn.Network(layers, shape, seed=seed, dtype=D)
    g = torch.Generator().manual_seed(9)
    for p in net.parameters():  # away from zeros and ones, which would hide a factor
        p.add_(torch.randn(p.shape, generator=g, dtype=D), alpha=0.1)
    return net


def batch(net: nn.Network, rows: int = 7) -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(0)
    if net.input_dtype is torch.int64:
        x = torch.randint(4, (rows, *net.input_shape), generator=g)
    else:
        x = torch.randn(rows, *net.input_shape, generator=g, dtype=D)
    return x, torch.randint(4, (rows, *net.output_shape[:-1]), generator=g)
