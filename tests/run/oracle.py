"""Serial oracles, written without plans: autograd of the loss, and sums over shards for merges of class *defined*."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from bpkit.nn import Context, Network


def flat(tensors: Sequence[Tensor]) -> Tensor:
    return torch.cat([tensor.flatten() for tensor in tensors])


def gradient_sum(network: Network, inputs: Tensor, targets: Tensor, step: int = 0, first: int = 0) -> Tensor:
    """The gradient of the summed loss of some samples, by one serial backward of a copy."""
    net = network.copy()
    y = net.forward(inputs, 0, Context(step, first, True))
    _, dy = net.loss.value_and_gradient(y, targets)
    net.backward(dy)
    return flat(net.gradients()).clone()


def merged(
    network: Network, inputs: Tensor, targets: Tensor, sizes: Sequence[int], merge: str, step: int = 0
) -> Tensor:
    """What a merge of shards must give: exact, the document's average, or its sum."""
    if merge == "mean":
        return gradient_sum(network, inputs, targets, step) / network.loss.terms(targets)
    total, low = torch.zeros(sum(p.numel() for p in network.parameters()), dtype=network.dtype), 0
    for size in sizes:
        part = slice(low, low + size)
        if size:
            total += gradient_sum(network, inputs[part], targets[part], step, low) / network.loss.terms(targets[part])
        low += size
    return total / len(sizes) if merge == "mean-of-means" else total


def worst(network: Network, a: Tensor, b: Tensor) -> float:
    """DESIGN's distance: the largest difference in a tensor over its largest entry, over all tensors."""
    found, low = 0.0, 0
    for parameter in network.parameters():
        part = slice(low, low + parameter.numel())
        low += parameter.numel()
        scale = b[part].abs().max()
        if scale > 0:
            found = max(found, float((a[part] - b[part]).abs().max() / scale))
        else:
            assert torch.equal(a[part], b[part])
    return found
