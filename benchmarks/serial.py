"""A training step by hand against eager autograd: linear layers with ReLU, or convolutions with batch norm, ReLU and
max pooling; cross-entropy, SGD with momentum.

One thread, denormals off for both, repetitions interleaved. The peer is ``torch.nn`` with
``torch.optim.SGD``, fused or foreach, whichever is faster at that size. The rows "ours again" compare the
hand-written step with a second copy of itself; their spread says what differences mean nothing.
``torch.compile`` (forward and loss compiled, fused SGD) is for information, where a C++ compiler is found.
"""

from __future__ import annotations

import copy
import shutil
import statistics
import time
from collections.abc import Callable
from itertools import pairwise

import torch
from _harness import arguments, interleave, report, row
from torch import Tensor

from bpkit import nn, optim

SIZES = [(32, 64), (32, 128), (64, 256), (256, 512), (1024, 1024)]
IMAGES = [(16, 8, (1, 16, 32)), (32, 8, (1, 16, 32)), (32, 16, (1, 16, 32)), (64, 8, (1, 8, 16, 32))]
CLASSES = 10
LR, MOMENTUM = 0.01, 0.9

Step = Callable[[], object]


def mlp(width: int) -> tuple[nn.Network, torch.nn.Sequential]:
    """Return the multilayer perceptron, ours and as a module."""
    linear = [torch.nn.Linear(width, width) for _ in range(3)] + [torch.nn.Linear(width, CLASSES)]
    relu = torch.nn.ReLU(inplace=True)
    return nn.mlp([width] * 4 + [CLASSES]), torch.nn.Sequential(*(m for la in linear for m in (la, relu)))[:-1]


def convnet(side: int, channels: tuple[int, ...]) -> tuple[nn.Network, torch.nn.Sequential]:
    """Return the convolutional network with batch norm, ours and as a module."""
    made: list[torch.nn.Module] = [torch.nn.Unflatten(1, (channels[0], side, side))]
    for a, b in pairwise(channels):
        made += [torch.nn.Conv2d(a, b, 3, padding=1, bias=False), torch.nn.BatchNorm2d(b), torch.nn.ReLU(inplace=True)]
        made.append(torch.nn.MaxPool2d(2))
    features = channels[-1] * (side >> (len(channels) - 1)) ** 2
    made += [torch.nn.Flatten(), torch.nn.Linear(features, CLASSES)]
    return nn.convnet(side, channels), torch.nn.Sequential(*made)


def ours(x: Tensor, t: Tensor, net: nn.Network) -> Step:
    """Return the hand-written step: forward, loss, backward, one update of the flat buffer."""
    net = net.copy()
    optimizer = optim.SGD(lr=LR, momentum=MOMENTUM)
    state = optimizer.state(net.flat_parameters)

    def step() -> Tensor:
        value, dy = net.loss.value_and_gradient(net.forward(x), t)
        net.backward(dy)
        optimizer.update(net.flat_parameters, net.flat_gradients, state, 0, 1 / net.loss.terms(t))
        return value

    return step


def eager(x: Tensor, t: Tensor, net: nn.Network, model: torch.nn.Sequential, compiled: bool = False,
          **kind: bool) -> Step:  # fmt: skip
    """Return the same step with autograd and ``torch.optim.SGD``."""
    model = copy.deepcopy(model)
    with torch.no_grad():
        for own, given in zip(model.parameters(), net.parameters(), strict=True):
            own.copy_(given)
    optimizer = torch.optim.SGD(model.parameters(), lr=LR, momentum=MOMENTUM, **kind)

    def loss_of(x: Tensor, t: Tensor) -> Tensor:
        return torch.nn.functional.cross_entropy(model(x), t)

    forward = torch.compile(loss_of) if compiled else loss_of

    def step() -> Tensor:
        optimizer.zero_grad(set_to_none=True)
        loss = forward(x, t)
        loss.backward()
        optimizer.step()
        return loss

    return step


def timed(step: Callable[[], object], times: int) -> Callable[[], float]:
    """Return a run of `times` steps, after one that is not timed, that reports the seconds of one."""

    def run() -> float:
        step()  # brings back what the previous run drove out of the caches
        start = time.perf_counter()
        for _ in range(times):
            step()
        return (time.perf_counter() - start) / times

    return run


def repeat_for(step: Callable[[], object], seconds: float) -> int:
    """Return how often `step` fits into `seconds`, at least once; the first call warms up."""
    step()
    start, count = time.perf_counter(), 0
    while time.perf_counter() - start < seconds / 4:
        step()
        count += 1
    return max(1, 4 * count)


def measure(case: str, batch: int, both: tuple[nn.Network, torch.nn.Sequential], seconds: float, repetitions: int,
            compiler: bool) -> list[dict]:  # fmt: skip
    """Return the rows of one network and batch."""
    generator = torch.Generator().manual_seed(0)
    net, model = both
    x = torch.randn(batch, *net.input_shape, generator=generator)
    t = torch.randint(CLASSES, (batch,), generator=generator)
    fused, foreach = "eager autograd, fused SGD", "eager autograd, foreach SGD"
    steps = {
        "ours": ours(x, t, net),
        "ours again": ours(x, t, net),
        fused: eager(x, t, net, model, fused=True),
        foreach: eager(x, t, net, model, foreach=True),
    }
    if compiler:
        steps["torch.compile, fused SGD"] = eager(x, t, net, model, compiled=True, fused=True)
    runs = {name: timed(step, repeat_for(step, seconds)) for name, step in steps.items()}
    samples = interleave(runs, repetitions)
    best = min((fused, foreach), key=lambda name: statistics.median(samples[name]))
    return [row(case, name, samples["ours"], samples[name], info=name != best) for name in steps if name != "ours"]


def main() -> None:
    """Measure all sizes, print the table, write the file."""
    options = arguments(__doc__ or "")
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    compiler = next((c for c in ("c++", "g++", "clang++") if shutil.which(c)), None)
    note = f"torch.compile with {compiler}" if compiler else "no C++ compiler found: torch.compile is left out"
    rows = []
    amount = (0.02, 7) if options.quick else (0.1, 15)
    for batch, width in SIZES:
        rows += measure(f"batch {batch}, width {width}", batch, mlp(width), *amount, compiler is not None)
    for batch, side, channels in IMAGES:
        case = f"batch {batch}, {side} x {side}, {'-'.join(map(str, channels))}"
        rows += measure(case, batch, convnet(side, channels), *amount, False)
    print(note)
    report(rows, options.json, note=note)


if __name__ == "__main__":
    main()
