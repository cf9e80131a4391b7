"""Training steps on a GPU against PyTorch, and against what the GPU itself can do.

    python benchmarks/gpu.py [--quick] [--json FILE] [--device cpu]

Writes book/measurements/gpu-NAME.json, which the pages show; with --quick, build/bench/gpu-NAME.json, which they do
not. Without a GPU it does nothing. ``--device cpu`` takes the same paths on the processor, to try them out, and
writes build/bench/gpu-cpu.json.

Serial: the hand-written step (forward, loss, backward, one update) against eager autograd, ``torch.compile``, and a
step captured in a CUDA graph, for multilayer perceptrons, convolutional networks and language models, in float32
("fp32"), with its products in TF32 ("tf32"), and in bfloat16 ("bf16"). Runs alternate in shuffled order and are
timed by CUDA events. A peer is timed only if its loss is ours, over two steps.

Roofline (Williams, Waterman and Patterson 2009, doi:10.1145/1498765.1498785): a step takes at least its FLOPs at the
rate of a square matrix product, and its bytes at the rate of a copy; both rates are measured between the steps. The
larger of the two times over ours is the row "roofline". FLOPs are those of ``Network.costs``, without the input half
that the first layer is spared. Bytes: each layer alone reads its operands and writes its results once, the update reads
three buffers and writes two. What stays in a cache costs less, so a small network may take less than this bound.

Data parallelism and a pipeline run against DDP and ``torch.distributed.pipelining`` where there are two GPUs.
"""

from __future__ import annotations

import re
import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import _gpu_peers as peers
import _harness
import torch
from _gpu_device import PRECISIONS, Clock, Roof, Run, describe, graphed, precision
from torch import Tensor

import bpkit as bp
from bpkit import nn, optim
from bpkit.course.recorded import GPU_FORMAT
from bpkit.data import Dataset
from bpkit.run.processes import devices

ROOT = Path(__file__).resolve().parents[1]
FUSED, FOREACH, COMPILED = "eager autograd, fused SGD", "eager autograd, foreach SGD", "torch.compile"
GRAPHED, REDUCED = "CUDA-graphed PyTorch", "torch.compile, reduce-overhead"  # against ours in a CUDA graph
OURS, AGAIN, OURS_GRAPHED = "ours", "ours again", "ours, CUDA-graphed"


@dataclass(frozen=True)
class Case:
    """A network and a batch.

    Parameters
    ----------
    family : "mlp", "convnet" or "gpt"
    given : tuple
        Arguments of `bpkit.nn`'s function of that name, and of the peer's.
    batch : int
    small, large : bool
        Whether more is wanted of it: 1.5 times eager of a small one, 70 % of the roofline of a large one.
    """

    family: str
    given: tuple
    batch: int
    small: bool = False
    large: bool = False

    @property
    def name(self) -> str:
        """As the rows call it."""
        said = {"mlp": lambda sizes: f"{len(sizes) - 1} x {sizes[0]}",
                "convnet": lambda side, channels, classes: f"{side} x {side}, {'-'.join(map(str, channels))}",
                "gpt": lambda _, length, width, heads, layers: f"{layers} x {width}, {length} tokens"}  # fmt: skip
        return f"{self.family} {said[self.family](*self.given)}, batch {self.batch}"

    def network(self, device: torch.device, dtype: torch.dtype) -> nn.Network:
        """Ours, on `device`."""
        more = {"fused": True} if self.family == "gpt" else {}
        return getattr(nn, self.family)(*self.given, dtype=dtype, **more).copy(device)

    def model(self) -> torch.nn.Module:
        """The peer's."""
        made = {"mlp": peers.mlp, "convnet": peers.convnet, "gpt": peers.GPT}
        return made[self.family](*self.given)

    def data(self, net: nn.Network) -> tuple[Tensor, Tensor]:
        """Random samples: speed does not depend on what they say."""
        generator = torch.Generator().manual_seed(0)
        shape, classes = (self.batch, *net.input_shape), net.output_shape[-1]
        t = torch.randint(classes, (self.batch, *net.output_shape[:-1]), generator=generator).to(net.device)
        if self.family == "gpt":
            return torch.randint(classes, shape, generator=generator).to(net.device), t
        return torch.randn(shape, generator=generator).to(net.device), t


CASES = (
    Case("mlp", ((64, 64, 64, 64, 10),), 32, small=True),
    Case("mlp", ((256, 256, 256, 256, 10),), 64, small=True),
    Case("mlp", ((1024, 1024, 1024, 1024, 10),), 512),
    Case("mlp", ((4096, 4096, 4096, 4096, 10),), 8192, large=True),
    Case("convnet", (8, (1, 16, 32), 10), 64, small=True),
    Case("convnet", (32, (3, 64, 128, 256), 10), 256),
    Case("gpt", (256, 64, 128, 4, 2), 16, small=True),
    Case("gpt", (8192, 512, 1024, 16, 4), 16),
)
# What --device cpu runs: the same code on sizes that take a moment.
REHEARSED = (
    Case("mlp", ((64, 64, 64, 64, 10),), 32, small=True),
    Case("convnet", (8, (1, 8, 16), 10), 16),
    Case("gpt", (32, 16, 32, 2, 1), 4),
)
#: Layers, width, global batch of the parallel runs.
PARALLEL, PARALLEL_REHEARSED = ((8, 1024, 512), (8, 4096, 4096)), ((8, 128, 64),)
MICROBATCHES, WARM = 8, 5


@dataclass
class Record:
    """What is found: rows, and what could not be run and why."""

    cuda: bool
    rows: list[dict[str, Any]] = field(default_factory=list)
    not_run: list[dict[str, str]] = field(default_factory=list)

    def row(self, group: str, case: str, peer: str, ours: list[float], theirs: list[float],
            wanted: float | None = None, **more: Any) -> None:  # fmt: skip
        """Add a row; something is wanted of a GPU only."""
        made = _harness.row(case, peer, ours, theirs, info=wanted is None or not self.cuda)
        self.rows.append({"group": group, **made, **({} if made["info"] else {"wanted": wanted}), **more})

    def skip(self, case: str, peer: str, why: object) -> None:
        """Say that something was not run."""
        line = re.sub(r"(?:/[\w.+-]+)+/", "", str(why).strip().split("\n")[0])  # no folders of this machine
        self.not_run.append({"case": case, "peer": peer, "why": line})


class Disagreement(Exception):
    """A peer does not compute what we compute."""


# Serial.


def our_step(net: nn.Network, x: Tensor, t: Tensor) -> Run:
    """Return the hand-written step: forward, loss, backward, one update; it returns the loss's sum.

    The loss's terms are all targets: none is masked, and counting them on the device would wait for it.
    """
    optimizer = optim.SGD(**peers.SGD)
    state = optimizer.state(net.flat_parameters)

    def run() -> Tensor:
        value, dy = net.loss.value_and_gradient(net.forward(x), t)
        net.backward(dy)
        optimizer.update(net.flat_parameters, net.flat_gradients, state, 0, 1 / t.numel())
        return value

    return run


def makers(case: Case, net: nn.Network, x: Tensor, t: Tensor, bf16: bool) -> dict[str, Callable[[], Run]]:
    """How each run of a case is made, by name."""
    ours = lambda: our_step(net.copy(), x.to(net.input_dtype), t)  # noqa: E731
    peer = lambda **kind: peers.step(case.model(), net, x, t, bf16, **kind)  # noqa: E731
    return {
        OURS: ours,
        AGAIN: ours,
        FUSED: partial(peer, fused=True),
        FOREACH: partial(peer, foreach=True),
        COMPILED: partial(peer, fused=True, compiled="default"),
        OURS_GRAPHED: lambda: graphed(ours()),
        GRAPHED: lambda: graphed(peer(fused=True)),
        REDUCED: partial(peer, fused=True, compiled="reduce-overhead"),
    }


def left_out(name: str, cuda: bool, quick: bool) -> str:
    """Why a run is not tried; "" where it is."""
    if name in (OURS_GRAPHED, GRAPHED, REDUCED) and not cuda:
        return "CUDA graphs need a GPU"
    return "--quick leaves compilation out" if quick and name in (COMPILED, REDUCED) else ""


def unsupported(kind: str, device: torch.device) -> str:
    """Why a precision is not measured; "" where it is."""
    if kind == "tf32" and (device.type != "cuda" or torch.cuda.get_device_capability(device) < (8, 0)):
        return "TF32 is a format of NVIDIA GPUs from compute capability 8.0 on"
    if kind == "bf16":
        try:
            nn.mlp((8, 8), dtype=torch.bfloat16)
        except TypeError as error:  # the library does not have it
            return str(error)
    return ""


def serial(case: Case, kind: str, clock: Clock, roof: Roof, repetitions: int, quick: bool, record: Record) -> None:
    """Measure one case in one precision."""
    label, bf16 = f"{case.name}, {kind}", kind == "bf16"
    net = case.network(clock.device, torch.bfloat16 if bf16 else torch.float32)
    x, t = case.data(net)
    runs: dict[str, Run] = {}
    expected: list[float] = []
    for name, make in makers(case, net, x, t, bf16).items():
        if why := left_out(name, clock.cuda, quick):
            record.skip(label, name, why)
            continue
        try:
            run = make()
            if name == OURS:
                expected = [float(run()) / t.numel() for _ in range(2)]
            elif name in (FUSED, FOREACH, COMPILED, REDUCED):
                agree(label, name, expected, [float(run()) for _ in range(2)], 1e-4 if kind == "fp32" else 2e-2)
            runs[name] = run
        except RuntimeError as error:  # too little memory; or a peer that cannot run here: no compiler, for one
            if name == OURS and not isinstance(error, torch.OutOfMemoryError):
                raise
            record.skip(label, name, error)
            if name == OURS:
                return
    timed = {name: clock.timed(run) for name, run in {**runs, "product": roof.product, "copy": roof.copy}.items()}
    serial_rows(record, case, label, kind, net, roof, _harness.interleave(timed, repetitions))


def agree(case: str, peer: str, ours: list[float], theirs: list[float], tolerance: float) -> None:
    """Raise where losses differ by more than `tolerance` of ours."""
    if any(not abs(a - b) <= tolerance * abs(a) for a, b in zip(ours, theirs, strict=True)):
        raise Disagreement(f"{case}: our losses are {ours}, those of {peer} {theirs}")


def serial_rows(record: Record, case: Case, label: str, kind: str, net: nn.Network, roof: Roof,
                times: dict[str, list[float]]) -> None:  # fmt: skip
    """Add the rows of one case."""
    eager = sorted({FUSED, FOREACH} & set(times), key=lambda name: statistics.median(times[name]))
    wanted: dict[str, float | None] = dict.fromkeys(eager[:1], 1.5 if case.small else 1.0)
    wanted[COMPILED] = 0.9 if case.family in ("mlp", "gpt") else None
    for name in (FUSED, FOREACH, COMPILED, AGAIN):
        if name in times:
            record.row("serial", label, name, times[OURS], times[name], wanted.get(name))
    for name in (GRAPHED, REDUCED):
        if name in times and OURS_GRAPHED in times:
            record.row("serial", label, f"{name} (ours too)", times[OURS_GRAPHED], times[name])
    work, moved = flops(net) * case.batch, bytes_moved(net, case.batch)
    bound = [max(work * a / roof.flops, moved * b / roof.bytes)
             for a, b in zip(times["product"], times["copy"], strict=True)]  # fmt: skip
    rate, bandwidth = (size / statistics.median(times[name])
                       for size, name in ((roof.flops, "product"), (roof.bytes, "copy")))  # fmt: skip
    record.row("roofline", label, "roofline", times[OURS], bound, 0.7 if case.large and kind != "fp32" else None,
               flops=work, bytes=moved, product_flops_per_s=rate, copy_bytes_per_s=bandwidth)  # fmt: skip


def first_trained(net: nn.Network) -> int:
    """The first layer with parameters: its input half is not computed, nor anything below."""
    return next(i for i, cost in enumerate(net.costs()) if cost.parameters)


def flops(net: nn.Network) -> int:
    """FLOPs of a sample's forward and backward."""
    spared = net.costs()[: first_trained(net) + 1]
    return sum(cost.total for cost in net.costs()) - sum(cost.backward_input for cost in spared)


def bytes_moved(net: nn.Network, rows: int) -> int:
    """Bytes of a step if each layer alone reads its operands and writes its results once in each of F, I and W."""
    moved, first = 0, first_trained(net)
    for i, cost in enumerate(net.costs()):
        halves = 1 + (i > first) + (cost.parameters > 0)
        moved += halves * (rows * (cost.inputs + cost.outputs) + cost.parameters)
        moved += 5 * cost.parameters  # the update reads gradient, velocity and parameter, and writes the last two
    return moved * net.dtype.itemsize


# Two GPUs and more.


def parallel(clock: Clock, rounds: int, steps: int, record: Record) -> None:
    """Measure data parallelism and a pipeline, over NCCL on GPUs, over gloo on the processor."""
    count = torch.cuda.device_count() if clock.cuda else 2
    ranks = max((n for n in (2, 4, 8) if n <= count), default=0)
    for size in PARALLEL if clock.cuda else PARALLEL_REHEARSED:
        layers, width, batch = size
        label = f"{layers} x {width}, batch {batch}, {ranks or 2} ranks, fp32"
        if not ranks:
            for peer in ("DDP", "torch.distributed.pipelining"):
                record.skip(label, peer, f"needs two GPUs, and there is {count}")
            continue
        with bp.Cluster(ranks, "nccl" if clock.cuda else "gloo", device=clock.device.type) as cluster:
            runs = {name: partial(run, steps) for name, run in parallel_runs(cluster, size)}
            times = _harness.interleave(runs, rounds)
        for group, theirs in (("data parallel", "DDP"), ("pipeline", "torch.distributed.pipelining")):
            ours, peer = ([name for name in times if name.startswith(start)] for start in (group, theirs))
            a, b = (min(names, key=lambda name: statistics.median(times[name])) for names in (ours, peer))
            record.row(group, label, f"{a.removeprefix(group)[2:]} : {b}", times[a], times[b], 1.0)


def parallel_runs(cluster: bp.Cluster, size: tuple[int, int, int]) -> Iterator[tuple[str, Callable[[int], float]]]:
    """Yield names and runs of some steps, which return the seconds of one; each side enters with its best."""
    (layers, width, batch), n = size, cluster.workers
    made = [layer for _ in range(layers - 1) for layer in (nn.Linear(width, width), nn.ReLU())]
    net = nn.Network([*made, nn.Linear(width, width)], width)
    generator = torch.Generator().manual_seed(0)
    x, t = torch.randn(batch, width, generator=generator), torch.randint(width, (batch,), generator=generator)
    cuts = " ".join(str(2 * layers // n * k) for k in range(1, n))

    def ours(plan: bp.plan.Plan, steps: int) -> float:
        result = cluster.train(net, Dataset("random", x, t, x[:1], t[:1]), plan, batch=batch, steps=steps + WARM,
                               optimizer=optim.SGD(**peers.SGD), record=1)  # fmt: skip
        return statistics.fmean(result.step_times[WARM:])

    def peer(function: Callable[..., float], before: tuple, after: tuple, steps: int) -> float:
        return max(cluster.call(function, *before, x, t, steps, WARM, *after))

    for buckets in (1, 4):
        yield f"data parallel, {buckets} buckets", partial(ours, bp.plan.data_parallel(n, buckets))
    for megabytes in (4, 25):
        yield f"DDP, {megabytes} MB", partial(peer, peers.ddp, (layers, width), (megabytes,))
    for make in (bp.plan.gpipe, bp.plan.one_f_one_b, bp.plan.zero_bubble_h1):
        plan = make(n, MICROBATCHES)
        yield f"pipeline, {make.__name__}", partial(ours, bp.plan.Plan.parse(f"{plan}\ncuts {cuts}"))
    for name in peers.SCHEDULES:
        yield f"torch.distributed.pipelining, {name}", partial(peer, peers.pipeline,
                                                               (name, layers, width, MICROBATCHES), ())  # fmt: skip


# The whole.


def destination(found: dict[str, Any], quick: bool) -> Path:
    """Where the record of a device goes: only a whole one of a GPU goes where the pages look."""
    if found["type"] != "cuda":
        return ROOT / "build/bench/gpu-cpu.json"
    words = f"{found['count']}x {found['name']}" if found["count"] > 1 else found["name"]
    slug = re.sub("[^a-z0-9]+", "-", words.lower()).strip("-")
    return ROOT / ("build/bench" if quick else "book/measurements") / f"gpu-{slug}.json"


def main() -> None:
    """Measure all, print the table, write the file."""
    parser = _harness.parser(__doc__ or "")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu: only try the paths out")
    options = parser.parse_args()
    if options.device == "cuda" and not devices.gpus():
        print(f"There is nothing to measure without a GPU: {devices.no_gpu()}.\n"
              "--device cpu tries the paths out on the processor.")
        return
    cuda, quick = options.device == "cuda", options.quick
    torch.set_num_threads(1)
    device = torch.device("cuda", 0) if cuda else torch.device("cpu")
    clock, record = Clock(device, (0.03 if quick else 0.1) if cuda else 0.005), Record(cuda)
    for kind in PRECISIONS:
        if why := unsupported(kind, device):
            record.skip(f"every network, {kind}", "all", why)
            continue
        with precision(kind):
            roof = Roof(clock, torch.bfloat16 if kind == "bf16" else torch.float32)
            for case in CASES if cuda else REHEARSED:
                serial(case, kind, clock, roof, 5 if quick else 15, quick, record)
                torch.compiler.reset()
                if cuda:
                    torch.cuda.empty_cache()
    parallel(clock, 3 if quick else 7, 5 if quick else 20, record)
    found = describe(device)
    file = options.json or destination(found, quick)
    file.parent.mkdir(parents=True, exist_ok=True)
    _harness.report(record.rows, file, format=GPU_FORMAT, device=found, quick=quick, not_run=record.not_run)
    for missing in record.not_run:
        print(f"not run: {missing['case']}, {missing['peer']}: {missing['why']}")
    print(f"{found['name']}: {file.relative_to(ROOT) if file.is_relative_to(ROOT) else file.name}")


if __name__ == "__main__":
    main()
