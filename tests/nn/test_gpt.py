"""A GPT by hand beside PyTorch's modules and autograd: the same losses, step by step."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from bpkit import data, nn

from .cases import D

LENGTH, WIDTH, HEADS, BLOCKS = 16, 16, 4, 2


class Block(torch.nn.Module):
    """Attention through F.scaled_dot_product_attention, not through bpkit's formulas."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.qkv = torch.nn.LayerNorm(WIDTH, dtype=D), torch.nn.Linear(WIDTH, 3 * WIDTH, dtype=D)
        self.out, self.norm2 = torch.nn.Linear(WIDTH, WIDTH, dtype=D), torch.nn.LayerNorm(WIDTH, dtype=D)
        self.up = torch.nn.Linear(WIDTH, 4 * WIDTH, dtype=D)
        self.down = torch.nn.Linear(4 * WIDTH, WIDTH, dtype=D)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        parts = self.qkv(self.norm1(x)).chunk(3, -1)
        q, k, v = (part.unflatten(-1, (HEADS, -1)).transpose(1, 2) for part in parts)
        seen = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(seen.transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class Model(torch.nn.Module):
    def __init__(self, vocabulary: int, tied: bool) -> None:
        super().__init__()
        self.tokens = torch.nn.Embedding(vocabulary, WIDTH, dtype=D)
        self.places = torch.nn.Parameter(torch.zeros(LENGTH, WIDTH, dtype=D))
        self.blocks = torch.nn.ModuleList(Block() for _ in range(BLOCKS))
        self.norm = torch.nn.LayerNorm(WIDTH, dtype=D)
        self.scores = torch.nn.Linear(WIDTH, vocabulary, bias=False, dtype=D)
        if tied:
            self.scores.weight = self.tokens.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.tokens(x) + self.places
        for block in self.blocks:
            x = block(x)
        return self.scores(self.norm(x))


def order(model: Model) -> list[str]:
    """Names in our order: the module lists its free parameter first and a tied matrix once."""
    names = [name for name, _ in model.named_parameters(remove_duplicate=False)]
    return ["tokens.weight", "places", *(n for n in names if n not in ("tokens.weight", "places"))]


def copied(ours: nn.Network, vocabulary: int, tied: bool) -> Model:
    """PyTorch's model with our initial weights."""
    model = Model(vocabulary, tied)
    weights = dict(model.named_parameters(remove_duplicate=False))
    with torch.no_grad():
        for name, value in zip(order(model), ours.parameters(), strict=True):
            weights[name].copy_(value)
    return model


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("fused", [True, False])
def test_losses_follow_pytorch_step_by_step(tied: bool, fused: bool) -> None:
    text = data.text(LENGTH)
    ours = nn.gpt(text.vocabulary, LENGTH, WIDTH, HEADS, BLOCKS, dtype=D, tied=tied, fused=fused)
    theirs = copied(ours, text.vocabulary, tied)
    names = order(theirs)
    optimizer, losses = torch.optim.SGD(theirs.parameters(), lr=0.5), []
    for step in range(12):
        x, t = text.batch(step, 16)
        value, dy = ours.loss.value_and_gradient(ours.forward(x, context=nn.Context(step)), t)
        ours.backward(dy)
        ours.flat_parameters.sub_(ours.flat_gradients, alpha=0.5 / t.numel())
        optimizer.zero_grad()
        loss = F.cross_entropy(theirs(x).flatten(0, 1), t.flatten())
        loss.backward()
        optimizer.step()
        assert abs(float(value) / t.numel() - float(loss.detach())) < 1e-8
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0] - 0.3
    weights = dict(theirs.named_parameters(remove_duplicate=False))
    worst = max(float((weights[n].detach() - p).abs().max()) for n, p in zip(names, ours.parameters(), strict=True))
    assert worst < 1e-10
