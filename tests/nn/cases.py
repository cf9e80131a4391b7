"""Networks that together hold every layer type, and batches for them."""

from __future__ import annotations

import torch

from bpkit import nn
from bpkit.nn.gradcheck import reference_loss

D = torch.float64
START = nn.Context()

LAYERS: dict[str, list[nn.Layer]] = {
    "linear": [nn.Linear(6, 5), nn.Linear(5, 4)],
    "linear without bias": [nn.Linear(6, 4, bias=False)],
    "relu": [nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 4)],
    "tanh": [nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 4)],
    "sigmoid": [nn.Linear(6, 8), nn.Sigmoid(), nn.Linear(8, 4)],
    "gelu": [nn.Linear(6, 8), nn.GELU(), nn.Linear(8, 4)],
    "layer norm": [nn.Linear(6, 8), nn.LayerNorm(8), nn.Tanh(), nn.Linear(8, 4)],
    "layer norm first": [nn.LayerNorm(6), nn.Linear(6, 4)],
    "dropout": [nn.Linear(6, 8), nn.Dropout(0.1), nn.Tanh(), nn.Dropout(0.5), nn.Linear(8, 4)],
    "residual": [nn.Linear(6, 8), nn.Residual(nn.ReLU(), nn.Linear(8, 8), nn.Tanh()), nn.ReLU(), nn.Linear(8, 4)],
    "skips": [nn.StashSkip(0), nn.Linear(6, 6), nn.StashSkip(1), nn.Tanh(), nn.AddSkip(0), nn.Linear(6, 6),
              nn.AddSkip(1), nn.Dropout(0.1), nn.Linear(6, 4)],
    "residual first": [nn.Residual(nn.Linear(6, 6), nn.GELU()), nn.Linear(6, 4)],
    "sequential": [nn.Sequential(nn.Linear(6, 8), nn.ReLU()), nn.Sequential(nn.Tanh(), nn.Linear(8, 4))],
    "activations in a row": [nn.ReLU(), nn.Linear(6, 4), nn.Tanh(), nn.ReLU(), nn.Sigmoid(), nn.GELU(), nn.Tanh()],
    "nested": [
        nn.Linear(6, 8),
        nn.Residual(nn.LayerNorm(8), nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.1), nn.Residual(nn.Sigmoid()))),
        nn.ReLU(),
        nn.Linear(8, 4),
    ],
}


def network(name: str, loss: str = "cross_entropy", seed: int = 1) -> nn.Network:
    """Return the float64 network of a case."""
    return nn.Network(LAYERS[name], 6, loss=loss, seed=seed, dtype=D)


def batch(rows: int = 7, loss: str = "cross_entropy", seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Return inputs and targets."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, 6, generator=g, dtype=D)
    if loss == "mse":
        return x, torch.randn(rows, 4, generator=g, dtype=D)
    return x, torch.randint(4, (rows,), generator=g)


def autograd(
    net: nn.Network, x: torch.Tensor, t: torch.Tensor, context: nn.Context = START
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Return the gradients of the loss's sum by autograd: the input's, and the parameters'."""
    leaves = [p.clone().requires_grad_() for p in (x, *net.parameters())]
    dx, *rest = torch.autograd.grad(reference_loss(net, leaves[0], leaves[1:], t, context), leaves)
    return dx, rest


def by_hand(
    net: nn.Network, x: torch.Tensor, t: torch.Tensor, context: nn.Context = START
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Return the same by hand."""
    _, dy = net.loss.value_and_gradient(net.forward(x, context=context), t)
    dx = net.backward(dy, need_input=True)
    assert dx is not None
    return dx.clone(), [g.clone() for g in net.gradients()]


def close(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether max|a - b| <= 1e-12 max|b|."""
    return bool((a - b).abs().max() <= 1e-12 * b.abs().max())
