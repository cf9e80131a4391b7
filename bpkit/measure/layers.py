"""How long each layer of a network takes on this machine, to balance stages by measured times."""

from statistics import median
from time import perf_counter_ns

import torch
from torch import Tensor

from bpkit.nn import Network


def layer_times(network: Network, inputs: Tensor, repetitions: int = 7) -> list[int]:
    """Measure each layer's forward and whole backward on the given samples, in this process.

    Parameters
    ----------
    network : Network
    inputs : Tensor, shape (rows, *input_shape)
        As many rows as a microbatch has.
    repetitions : int
        After one that is not counted; medians are taken.

    Returns
    -------
    list of int
        Nanoseconds of each layer; `bpkit.nn.balanced_cuts` makes stages of them.
    """
    layers = network.split(range(1, len(network.layers)))
    samples: list[list[int]] = [[] for _ in layers]
    for _ in range(repetitions + 1):
        x, edges = inputs, []
        for layer, times in zip(layers, samples, strict=True):
            began = perf_counter_ns()
            x = layer.forward(x)
            times.append(perf_counter_ns() - began)
            edges.append(x)
        for layer, times, y in zip(reversed(layers), reversed(samples), reversed(edges), strict=True):
            dy = torch.ones_like(y)
            began = perf_counter_ns()
            layer.backward(dy, need_input=layer is not layers[0])
            times[-1] += perf_counter_ns() - began
    return [round(median(times[1:])) for times in samples]
