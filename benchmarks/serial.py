"""A training step by hand against eager autograd: four linear layers, ReLU, cross-entropy, SGD with momentum.

One thread, denormals off for both, repetitions interleaved. The peer is ``torch.nn`` with
``torch.optim.SGD``, fused or foreach, whichever is faster at that size. The rows "ours again" compare the
hand-written step with a second copy of itself; their spread says what differences mean nothing.
``torch.compile`` (forward and loss compiled, fused SGD) is for information, where a C++ compiler is found.
"""

from __future__ import annotations

import shutil
import statistics
import time
from collections.abc import Callable

import torch
from _harness import arguments, interleave, report, row
from torch import Tensor

from bpkit import nn, optim

SIZES = [(32, 64), (32, 128), (64, 256), (256, 512), (1024, 1024)]
CLASSES = 10
LR, MOMENTUM = 0.01, 0.9

Step = Callable[[], object]


def ours(x: Tensor, t: Tensor, width: int) -> Step:
    """Return the hand-written step: forward, loss, backward, one update of the flat buffer."""
    net = nn.mlp([width] * 4 + [CLASSES])
    optimizer = optim.SGD(lr=LR, momentum=MOMENTUM)
    state = optimizer.state(net.flat_parameters)

    def step() -> Tensor:
        value, dy = net.loss.value_and_gradient(net.forward(x), t)
        net.backward(dy)
        optimizer.update(net.flat_parameters, net.flat_gradients, state, 0, 1 / net.loss.terms(t))
        return value

    return step


def eager(x: Tensor, t: Tensor, width: int, compiled: bool = False, **kind: bool) -> Step:
    """Return the same step with autograd and ``torch.optim.SGD``."""
    net = nn.mlp([width] * 4 + [CLASSES])
    linear = [torch.nn.Linear(width, width) for _ in range(3)] + [torch.nn.Linear(width, CLASSES)]
    relu = torch.nn.ReLU(inplace=True)
    model = torch.nn.Sequential(*(m for la in linear for m in (la, relu)))[:-1]
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


def measure(batch: int, width: int, seconds: float, repetitions: int, compiler: bool) -> list[dict]:
    """Return the rows of one size."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(batch, width, generator=generator)
    t = torch.randint(CLASSES, (batch,), generator=generator)
    fused, foreach = "eager autograd, fused SGD", "eager autograd, foreach SGD"
    steps = {
        "ours": ours(x, t, width),
        "ours again": ours(x, t, width),
        fused: eager(x, t, width, fused=True),
        foreach: eager(x, t, width, foreach=True),
    }
    if compiler:
        steps["torch.compile, fused SGD"] = eager(x, t, width, compiled=True, fused=True)
    runs = {name: timed(step, repeat_for(step, seconds)) for name, step in steps.items()}
    samples = interleave(runs, repetitions)
    best = min((fused, foreach), key=lambda name: statistics.median(samples[name]))
    case = f"batch {batch}, width {width}"
    return [row(case, name, samples["ours"], samples[name], info=name != best) for name in steps if name != "ours"]


def main() -> None:
    """Measure all sizes, print the table, write the file."""
    options = arguments(__doc__ or "")
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    compiler = next((c for c in ("c++", "g++", "clang++") if shutil.which(c)), None)
    note = f"torch.compile with {compiler}" if compiler else "no C++ compiler found: torch.compile is left out"
    rows = []
    for batch, width in SIZES:
        seconds, repetitions = (0.02, 7) if options.quick else (0.1, 15)
        rows += measure(batch, width, seconds, repetitions, compiler is not None)
    print(note)
    report(rows, options.json, note=note)


if __name__ == "__main__":
    main()
