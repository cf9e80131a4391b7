"""Compressed reductions on workers, against references written with plain tensors, on both transports."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

import bpkit as bp
from bpkit.compress import BF16, FP16, Compressor, Int8, PowerSGD, TopK
from bpkit.nn import Network
from bpkit.plan import Action, Mesh, Plan, data_parallel
from bpkit.plan.passes import complete
from bpkit.run.engine.compression import Gathered, reducer

from .oracle import flat, gradient_sum

SAMPLES = 22
ALL = [BF16(), FP16(), Int8(), TopK(0.1), PowerSGD(2)]
SHARDS = {"even": None, "uneven": (1, 17, 4), "a rank without samples": (0, 12, 10)}


def network(dtype: torch.dtype = torch.float64) -> Network:
    return bp.nn.mlp([64, 24, 20, 10], seed=1, dtype=dtype)


def digits(dtype: torch.dtype = torch.float64) -> bp.data.Dataset:
    """Disturbed, so that no two entries of a gradient are equal in magnitude: top-k may take either."""
    data, generator = bp.data.digits(dtype=dtype), torch.Generator().manual_seed(5)
    noise = torch.rand(data.inputs.shape, generator=generator, dtype=torch.float64)
    return replace(data, inputs=data.inputs + 0.1 * noise.to(dtype))


def shards_of(workers: int, kind: str) -> list[int]:
    if SHARDS[kind] is None or workers == 1:
        return bp.data.shard_sizes(SAMPLES, workers)
    first = list(SHARDS[kind][: workers - 1])
    return [*first, SAMPLES - sum(first)]


# -- references ---------------------------------------------------------------------------------------------


def sent(compressor: Compressor, v: Tensor) -> Tensor:
    """What a vector becomes, by arithmetic alone."""
    if not len(v):  # a stage without parameters
        return v
    most = float(v.abs().max())
    if isinstance(compressor, BF16):
        return v.bfloat16().to(v.dtype)
    if most == 0:
        return v
    if isinstance(compressor, FP16):
        power = 2.0 ** (14 - math.floor(math.log2(most)))
        return ((v.double() * power).half().double() / power).to(v.dtype)
    if isinstance(compressor, Int8):
        return ((v.double() / (most / 127)).round() * (most / 127)).to(v.dtype)
    assert isinstance(compressor, TopK)
    cut = v.abs().sort(descending=True).values[math.ceil(compressor.share * len(v)) - 1]
    return torch.where(v.abs() >= cut, v, 0)


class Reference:
    """The same compressor, serially: one vector a rank and bucket, and each rank's residuals."""

    def __init__(self, compressor: Compressor, net: Network, buckets: int, ranks: int) -> None:
        self.compressor, self.parts = compressor, net.split(data_parallel_cuts(net, buckets))
        self.residuals: list[dict] = [{} for _ in range(ranks)]  # by bucket; PowerSGD: by bucket and tensor
        self.q: dict[tuple[int, int], Tensor] = {}

    def reduce(self, whole: list[Tensor]) -> Tensor:
        """What all ranks get from the gradients of each, in the order of parameters."""
        applied, low = [], 0
        for s, part in enumerate(self.parts):
            sizes = [p.numel() for p in part.parameters()]
            own = [w[low : low + sum(sizes)].split(sizes) for w in whole]
            low += sum(sizes)
            if sizes:
                applied.append((self._low_rank if isinstance(self.compressor, PowerSGD) else self._coded)(s, own))
        return torch.cat(applied)

    def _coded(self, s: int, own: list[tuple[Tensor, ...]]) -> Tensor:
        part, total = self.parts[s], torch.zeros_like(self.parts[s].flat_gradients)
        for rank, tensors in enumerate(own):
            part.flat_gradients.zero_()
            for place, tensor in zip(part.gradients(), tensors, strict=True):
                place.copy_(tensor.view(place.shape))
            v = part.flat_gradients + self.residuals[rank].get(s, 0.0)
            gone = sent(self.compressor, v)
            if not isinstance(self.compressor, BF16 | FP16):
                self.residuals[rank][s] = v - gone
            total += gone
        part.flat_gradients.copy_(total)
        return flat(part.gradients())

    def _low_rank(self, s: int, own: list[tuple[Tensor, ...]]) -> Tensor:
        part, applied, r, seed = self.parts[s], [], self.compressor.rank, torch.Generator().manual_seed(0)
        for i, shape in enumerate(p.shape for p in part.parameters()):
            if len(shape) == 1 or r * (shape[0] + shape[1]) >= shape[0] * shape[1]:
                applied.append(sum(tensors[i] for tensors in own))
                continue
            start = torch.randn(shape[1], r, generator=seed, dtype=torch.float64).to(part.dtype)
            q = self.q.get((s, i), start)
            ms = [tensors[i].view(shape) + kept.get((s, i), 0.0)
                  for tensors, kept in zip(own, self.residuals, strict=True)]  # fmt: skip
            p = torch.linalg.svd(sum(ms) @ q, full_matrices=False).U  # other columns than ours, the same span
            for kept, m in zip(self.residuals, ms, strict=True):
                kept[s, i] = m - p @ (p.T @ m)
            self.q[s, i] = sum(ms).T @ p
            applied.append((p @ self.q[s, i].T).flatten())
        return torch.cat(applied)


def data_parallel_cuts(net: Network, buckets: int) -> tuple[int, ...]:
    return bp.plan.compile(data_parallel(2, buckets), net).cuts


def shard_gradients(net: Network, inputs: Tensor, targets: Tensor, sizes: list[int], step: int = 0) -> list[Tensor]:
    found, low = [], 0
    for size in sizes:
        part = slice(low, low + size)
        found.append(gradient_sum(net, inputs[part], targets[part], step, low) if size
                     else torch.zeros(sum(p.numel() for p in net.parameters()), dtype=net.dtype))  # fmt: skip
        low += size
    return found


# -- tests --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("sharding", SHARDS)
@pytest.mark.parametrize("workers", [1, 2, 3])
def test_one_step_equals_the_serial_reference_and_keeps_the_bound(clusters, workers, sharding, dtype):
    """The reference, whose codes differ from ours by rounding; the bound; and with one worker, no loss at all."""
    net, data = network(dtype), digits(dtype)
    inputs, targets, sizes = data.inputs[:SAMPLES], data.targets[:SAMPLES], shards_of(workers, sharding)
    own = shard_gradients(net, inputs, targets, sizes)
    plan, close = data_parallel(workers, 3), 1e-12 if dtype == torch.float64 else 1e-5
    exact = clusters[workers].gradients(net, inputs, targets, plan, shards=sizes)
    for compressor in ALL:
        found = clusters[workers].gradients(net, inputs, targets, plan, shards=sizes, compress=compressor)
        if workers == 1:
            assert torch.equal(found, exact)
            continue
        expected = Reference(compressor, net, 3, workers).reduce(own) / SAMPLES
        scale, error = float(expected.abs().max()), (found - exact) * SAMPLES
        if dtype == torch.float64:  # a code may fall to the other side of a float32's rounding
            assert float((found - expected).abs().max()) <= close * scale, compressor
        assert not torch.equal(found, exact), compressor
        if isinstance(compressor, BF16 | FP16):
            unit = 2**-8 if isinstance(compressor, BF16) else 2**-11
            bound = sum(unit * g.abs() + 2**-39 * g.abs().max() for g in own) + close * SAMPLES * scale
            assert (error.abs() <= 1.01 * bound).all(), compressor
        elif isinstance(compressor, Int8):
            assert float(error.abs().max()) <= 1.01 * sum(float(g.abs().max()) for g in own) / 254
        else:
            assert float(error.norm()) <= sum(float(g.norm()) for g in own), compressor


@pytest.mark.parametrize("compressor", ALL, ids=str)
@pytest.mark.parametrize("workers", [2, 3])
def test_training_equals_the_serial_reference(clusters, workers, compressor):
    """Twelve steps of SGD in float64: a residual dropped, kept of the wrong step or of one rank only shows."""
    net, data = network(), digits()
    sizes = shards_of(workers, "uneven")
    result = clusters[workers].train(net, data, data_parallel(workers, 2), batch=SAMPLES, steps=12, lr=0.2,
                                     shards=sizes, compress=compressor)  # fmt: skip
    serial, reference = net.copy(), Reference(compressor, net, 2, workers)
    for step in range(12):
        rows = data.indices(step, SAMPLES, 0)
        own = shard_gradients(serial, data.inputs[rows], data.targets[rows], sizes, step)
        update, low = reference.reduce(own) * (0.2 / SAMPLES), 0
        for parameter in serial.parameters():
            parameter -= update[low : low + parameter.numel()].view(parameter.shape)
            low += parameter.numel()
    difference = (flat(result.network.parameters()) - flat(serial.parameters())).abs().max()
    assert float(difference) <= 1e-10


def synthetic(rank: int, step: int, n: int, dtype: torch.dtype) -> Tensor:
    generator = torch.Generator().manual_seed(100 * rank + step)
    return torch.randn(n, generator=generator, dtype=torch.float64).to(dtype)


def reduce_often(comm, compressor, net, steps):
    """The sum of what this rank applied, of what it computed, and its last residual; by tensor."""
    compressed = reducer(compressor, net, comm)
    truth, applied = torch.zeros_like(net.flat_gradients), torch.zeros_like(net.flat_gradients)
    for step in range(steps):
        net.flat_gradients.zero_()
        for i, gradient in enumerate(net.gradients()):
            gradient.copy_(synthetic(comm.rank, 10 * step + i, gradient.numel(), net.dtype).view(gradient.shape))
        truth += net.flat_gradients
        handle = compressed()
        if handle is not None:
            handle.wait()
        applied += net.flat_gradients
    net.flat_gradients.zero_()
    if isinstance(compressed, Gathered):
        net.flat_gradients.copy_(compressed.residual)
    else:
        for m, residual in zip(compressed._matrices, compressed._residuals, strict=True):
            m.copy_(residual)
    return applied, truth, net.flat_gradients.clone()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("compressor", [Int8(), TopK(0.02), PowerSGD(2)], ids=str)
@pytest.mark.parametrize("workers", [2, 3])
def test_what_is_applied_is_the_truth_minus_the_last_residuals(clusters, workers, compressor, dtype):
    found = clusters[workers].call(reduce_often, compressor, network(dtype), 9)
    applied, truth = found[0][0], sum(entry[1] for entry in found)
    left = sum(entry[2] for entry in found)
    assert all(torch.equal(applied, other) for other, _, _ in found)  # the same bits on every rank
    close = (1e-13 if dtype == torch.float64 else 1e-5) * float(truth.abs().max())
    assert float((applied - (truth - left)).abs().max()) <= close
    assert float((applied - truth).abs().max()) > 100 * close


@pytest.mark.parametrize("workers", [2, 3])
def test_a_sum_of_low_rank_loses_nothing(clusters, workers):
    """Two samples make a gradient of rank two at most in each layer; three do not."""
    net, data = network(), digits()
    errors = []
    for samples in (2, 9):
        inputs, targets = data.inputs[:samples], data.targets[:samples]
        exact = clusters[workers].gradients(net, inputs, targets)
        found = clusters[workers].gradients(net, inputs, targets, compress=PowerSGD(2))
        errors.append(float((found - exact).norm() / exact.norm()))
    assert errors[0] <= 1e-12 and 1e-3 < errors[1] < 1


@pytest.mark.parametrize("compressor", ALL[:4], ids=str)
def test_a_mesh_with_a_pipeline(clusters, compressor):
    """Each stage's replicas compress among themselves: what data parallelism with the same cuts gives."""
    net, data = network(), digits()
    rows = tuple(tuple(Action(stage, kind, 0) for kind in "FB") for stage in (0, 1))
    hybrid = complete(Plan("hybrid", rows, 2, Mesh(data=2, pipeline=2)))
    cuts = bp.plan.compile(hybrid, net).cuts
    arguments = dict(batch=20, steps=6, lr=0.2, compress=compressor)
    a = clusters[4].train(net, data, hybrid, **arguments)
    b = clusters[2].train(net, data, data_parallel(2, cuts), **arguments)
    assert float((flat(a.network.parameters()) - flat(b.network.parameters())).abs().max()) <= 1e-10
    with pytest.raises(ValueError, match="hybrid .* blocks"):
        clusters[4].train(net, data, hybrid, **arguments | {"compress": PowerSGD(2)})


def test_bytes_are_counted_from_what_is_sent(clusters):
    net, data = network(torch.float32), digits(torch.float32)
    plan = data_parallel(2, 2)
    sizes = bp.plan.compile(plan, net).sizes
    matrices, others = [(24, 64), (20, 24), (10, 20)], 24 + 20 + 10
    expected = {
        None: sum(4 * n for n in sizes),
        BF16(): sum(2 * n for n in sizes),
        FP16(): sum(2 * n + 8 for n in sizes),
        Int8(): sum(n + 8 for n in sizes),
        TopK(0.1): sum(8 * math.ceil(0.1 * n) for n in sizes),
        PowerSGD(2): sum(4 * 2 * (rows + columns) for rows, columns in matrices) + 4 * others,
    }
    for compressor, size in expected.items():
        result = clusters[2].train(net, data, plan, batch=20, steps=3, lr=0.1, compress=compressor)
        assert [result.payload(rank) for rank in range(2)] == [size, size], compressor
        report = bp.report(result)
        assert report.payload_bytes == size and report.bytes_sent is None
        assert ("lossy" in repr(report)) == (compressor is not None) == ("lossy" in repr(result))
        if compressor:
            assert f"{compressor}, {expected[None] / size:.1f} times fewer" in repr(report)


def test_one_worker_sends_and_loses_nothing(clusters):
    net, data = network(), digits()
    arguments = dict(batch=20, steps=3, lr=0.1)
    a = clusters[1].train(net, data, compress=TopK(), **arguments)
    b = clusters[1].train(net, data, **arguments)
    assert a.compress is None and torch.equal(flat(a.network.parameters()), flat(b.network.parameters()))


@pytest.mark.parametrize(
    "plan",
    [
        bp.plan.zero(2, 2),
        bp.plan.expand(data_parallel(2), "ring"),
        bp.plan.local_sgd(2, 2),
        bp.plan.parameter_server(2, 1),
    ],
    ids=lambda plan: plan.name,
)
def test_plans_without_a_whole_reduction_are_refused(clusters, plan):
    net, data = network(), digits()
    with pytest.raises(ValueError, match="cannot compress"):
        clusters[2].train(net, data, plan, batch=20, steps=2, lr=0.1, compress=BF16())


@pytest.mark.parametrize("nothing", ["topk", 0.01, TopK])
def test_what_is_no_compressor_is_refused(clusters, nothing):
    net, data = network(), digits()
    with pytest.raises(TypeError, match="takes a compressor"):
        clusters[2].train(net, data, batch=20, steps=2, lr=0.1, compress=nothing)
    with pytest.raises(TypeError, match="takes a compressor"):
        clusters[2].gradients(net, data.inputs[:8], data.targets[:8], compress=nothing)
