"""Networks of a standard form."""

from collections.abc import Callable, Sequence
from itertools import pairwise

import torch

from bpkit.nn.layer import Layer
from bpkit.nn.layers.attention import block
from bpkit.nn.layers.convolution import Conv2d, Flatten, MaxPool2d, Reshape
from bpkit.nn.layers.dropout import Dropout
from bpkit.nn.layers.embedding import Embedding, Positions, Unembedding
from bpkit.nn.layers.linear import GELU, Linear, ReLU, Sigmoid, Tanh
from bpkit.nn.layers.normalisation import BatchNorm, GroupNorm, LayerNorm
from bpkit.nn.losses import Loss
from bpkit.nn.network import Network


def mlp(sizes: Sequence[int], seed: int = 0, dtype: torch.dtype = torch.float32, activation: str = "relu",
        loss: str | Loss = "cross_entropy", dropout: float = 0.0) -> Network:  # fmt: skip
    """Return a multilayer perceptron: linear layers with an activation between them.

    Parameters
    ----------
    sizes : sequence of int
        Widths from the input to the output, at least two.
    seed, dtype, loss
        As in `Network`.
    activation : "relu", "tanh", "sigmoid" or "gelu"
    dropout : float
        Probability of dropping an activation, after each activation; 0 adds no layer.

    Raises
    ------
    ValueError
        For fewer than two sizes or an unknown activation.
    """
    known: dict[str, type[Layer]] = {"relu": ReLU, "tanh": Tanh, "sigmoid": Sigmoid, "gelu": GELU}
    if activation not in known:
        raise ValueError(f"unknown activation {activation!r}: choose from {', '.join(known)}")
    if len(sizes) < 2:
        raise ValueError(f"an mlp needs the sizes of its input and its output, not {list(sizes)}")
    layers: list[Layer] = []
    for i, (inputs, outputs) in enumerate(pairwise(sizes)):
        if i:
            layers += [known[activation](), *([Dropout(dropout)] if dropout else [])]
        layers.append(Linear(inputs, outputs))
    return Network(layers, sizes[0], loss=loss, seed=seed, dtype=dtype)


def gpt(vocabulary: int, length: int, width: int = 64, heads: int = 4, layers: int = 2, seed: int = 0,
        dtype: torch.dtype = torch.float32, tied: bool = True, dropout: float = 0.0,
        fused: bool | None = None) -> Network:  # fmt: skip
    """Return a language model of the form of GPT-2 (Radford et al. 2019): tokens (length,) in, scores of the next out.

    Its layers: `Embedding`, `Positions`, two halves for each `block`, a last `LayerNorm`, and the scores.

    Parameters
    ----------
    vocabulary, length, width, heads : int
        Different tokens; tokens of a sample; width of the vectors; heads, which divide it.
    layers : int
        Blocks.
    seed, dtype
        As in `Network`.
    tied : bool
        The scores use the embedding's matrix.
    dropout : float
        After the positions and at the end of each half block; 0 adds no layer.
    fused : bool, optional
        As in `Heads`.
    """
    start: list[Layer] = [Embedding(vocabulary, width, "embedding" if tied else ""), Positions(length, width)]
    halves = [half for _ in range(layers) for half in block(width, heads, dropout, fused)]
    scores = Unembedding(width, vocabulary) if tied else Linear(width, vocabulary, bias=False)
    drop: list[Layer] = [Dropout(dropout)] if dropout else []
    return Network([*start, *drop, *halves, LayerNorm(width), scores], length, seed=seed, dtype=dtype)


def convnet(side: int = 8, channels: Sequence[int] = (1, 16, 32), classes: int = 10, norm: str | None = "batch",
            seed: int = 0, dtype: torch.dtype = torch.float32) -> Network:  # fmt: skip
    """Return a small convolutional network for square images given as vectors, such as digits or MNIST (side 28).

    For each further number of channels: a 3 x 3 `Conv2d` that keeps the size, the norm, `ReLU`, `MaxPool2d`.

    Parameters
    ----------
    side : int
        Height and width of an image, a multiple of 2 for each halving.
    channels : sequence of int
        Of the image, then of each convolution.
    classes : int
    norm : "batch", "layer" or None
        "layer" is `GroupNorm` with one group: over channels and places, the layer norm for images.
    seed, dtype
        As in `Network`.

    Raises
    ------
    ValueError
        For an unknown norm.
    """
    norms: dict[str | None, Callable[[int], Layer] | None] = {"batch": BatchNorm, "layer": GroupNorm, None: None}
    if norm not in norms:
        raise ValueError(f'unknown norm {norm!r}: choose "batch", "layer" or None')
    kind = norms[norm]
    made: list[Layer] = [Reshape((channels[0], side, side))]
    for inputs, outputs in pairwise(channels):
        made.append(Conv2d(inputs, outputs, 3, padding=1, bias=norm != "batch"))
        made += [*([kind(outputs)] if kind else []), ReLU(), MaxPool2d(2)]
    features = channels[-1] * (side >> (len(channels) - 1)) ** 2
    inputs = channels[0] * side * side
    return Network([*made, Flatten(), Linear(features, classes)], inputs, seed=seed, dtype=dtype)
