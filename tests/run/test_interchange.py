"""Exchange with torch.distributed.pipelining: our plans in its runtime, its schedules as our plans."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import bpkit as bp
from bpkit.course import torch_schedule
from bpkit.plan import Plan, check, pipedream, serial
from bpkit.plan.interchange import from_csv, to_csv
from tests.plan.test_pipeline import SCHEDULES

from .oracle import gradient_sum, worst

SAMPLES = 24
NETWORK = bp.nn.mlp([6] + [8] * 11 + [4], seed=5, dtype=torch.float64, activation="tanh")
THEIRS = ["LoopedBFS", "Interleaved1F1B", "InterleavedZeroBubble", "ZBVZeroBubble", "DualPipeV"]


@pytest.fixture(scope="module")
def clusters() -> Iterator[dict[int, bp.Cluster]]:
    made = {n: bp.Cluster(n, backend="gloo", timeout=60) for n in (2, 4)}
    yield made
    for cluster in made.values():
        cluster.close()


def samples() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(SAMPLES, 6, generator=generator, dtype=torch.float64)
    return x, torch.randint(0, 4, (SAMPLES,), generator=generator)


def oracle() -> Tensor:
    return gradient_sum(NETWORK, *samples()) / SAMPLES


def modules(cuts: tuple[int, ...]) -> list[torch.nn.Sequential]:
    """The network's stages as modules of PyTorch."""
    parameters, made = iter(NETWORK.parameters()), []
    for layer in NETWORK.layers:
        module: torch.nn.Module = torch.nn.Tanh()
        if isinstance(layer, bp.nn.Linear):
            weight, bias = next(parameters), next(parameters)
            module = torch.nn.Linear(layer.inputs, layer.outputs, dtype=torch.float64)
            with torch.no_grad():
                module.weight.copy_(weight)
                module.bias.copy_(bias)
        made.append(module)
    bounds = [0, *cuts, len(made)]
    return [torch.nn.Sequential(*made[a:b]) for a, b in zip(bounds, bounds[1:], strict=False)]


def in_their_runtime(comm: Any, plan: Plan, cuts: tuple[int, ...]) -> list[tuple[int, list[Tensor]]]:
    """Gradients of this rank's stages, by PyTorch's own schedule runtime."""
    from torch.distributed.pipelining import PipelineStage

    parts, (x, t) = modules(cuts), samples()
    mine = [PipelineStage(parts[s], s, plan.stages, torch.device("cpu")) for s in plan.owned(comm.rank)]
    runtime = torch_schedule(plan, mine, torch.nn.functional.cross_entropy, SAMPLES)
    inputs = (x,) if 0 in plan.owned(comm.rank) else ()
    targets = {"target": t, "losses": []} if plan.stages - 1 in plan.owned(comm.rank) else {}
    runtime.step(*inputs, **targets)
    return [(s, [p.grad for p in parts[s].parameters()]) for s in plan.owned(comm.rank)]


@pytest.mark.parametrize("name", SCHEDULES)
def test_our_plans_run_in_their_runtime(clusters, name):
    plan = SCHEDULES[name](2, 4)
    cuts = bp.plan.compile(plan, NETWORK).cuts
    found = dict(stage for rank in clusters[2].call(in_their_runtime, plan, cuts, timeout=60) for stage in rank)
    gradient = torch.cat([g.flatten() for stage in range(plan.stages) for g in found[stage]])
    assert worst(NETWORK, gradient, oracle()) <= 1e-12


def their_csv(comm: Any, name: str, microbatches: int) -> str:
    """A schedule of PyTorch as it writes it."""
    from torch.distributed import pipelining
    from torch.distributed.pipelining import PipelineStage

    p, parts = comm.size, modules(tuple(range(1, 2 * comm.size)))
    owned = (comm.rank, 2 * p - 1 - comm.rank if name in ("ZBVZeroBubble", "DualPipeV") else comm.rank + p)
    stages = [PipelineStage(parts[s], s, 2 * p, torch.device("cpu")) for s in owned]
    schedule = getattr(pipelining, f"Schedule{name}")(stages, microbatches, loss_fn=torch.nn.functional.cross_entropy)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "schedule.csv"
        schedule._dump_csv(str(path), format="compute_only")
        return path.read_text()


@pytest.mark.parametrize("name", THEIRS)
@pytest.mark.parametrize("workers", [2, 4])
def test_their_schedules_run_on_our_workers(clusters, name, workers):
    text = clusters[workers].call(their_csv, name, 8, timeout=60)[0]
    plan = from_csv(text, name)
    check(plan)
    assert plan.stages == 2 * workers and plan.microbatches == 8
    assert worst(NETWORK, clusters[workers].gradients(NETWORK, *samples(), plan), oracle()) <= 1e-12


def test_nested_cells_are_read(clusters):
    text = clusters[2].call(their_csv, "DualPipeV", 8, timeout=60)[0]
    assert "OVERLAP_F_B" in text


@pytest.mark.parametrize("name", SCHEDULES)
def test_what_is_written_reads_back(name):
    plan = SCHEDULES[name](3, 5)
    assert from_csv(to_csv(plan), plan.name) == plan


def test_what_the_form_cannot_hold_is_refused():
    with pytest.raises(ValueError, match="pipeline axis only"):
        to_csv(SCHEDULES["1f1b"](2, 2, data=2))
    with pytest.raises(ValueError, match="no recomputation"):
        to_csv(SCHEDULES["gpipe"](2, 2, recompute=True))
    with pytest.raises(ValueError, match="one exact step"):
        to_csv(pipedream(2, 2))
    swapped = from_csv("0F1,0F0,0B0,0B1\n1F1,1F0,1B0,1B1\n")
    check(swapped)
    with pytest.raises(ValueError, match=r"the last stage's forwards run as \[1, 0\]"):
        to_csv(swapped)
    with pytest.raises(ValueError, match="5 do not divide a batch of 24"):
        torch_schedule(SCHEDULES["gpipe"](2, 5), [], torch.nn.functional.cross_entropy, SAMPLES)


def test_an_untested_version_is_refused(monkeypatch):
    monkeypatch.setattr(torch, "__version__", "3.1.0")
    with pytest.raises(RuntimeError, match=r"tested on 2\.13, not on 3\.1\.0"):
        torch_schedule(serial(microbatches=2), [], torch.nn.functional.cross_entropy, SAMPLES)


def test_bad_text_is_named():
    with pytest.raises(ValueError, match="line 2 of the CSV: 1SEND_B0"):
        from_csv("0F0,0B0\n1F0,1B0,1SEND_B0\n")
    with pytest.raises(ValueError, match="'x' is not an action"):
        from_csv("0F0,x\n")
    for text, why in (("0F0,0B0\n\n1F0,1B0\n", "line 2 of the CSV holds no action: each line is a rank"),
                      ("0F0,0B0\n,,\n1F0,1B0\n", "line 2 of the CSV holds no action"),
                      ("0F0,0F99999999,0B0,0B99999999", "has microbatch 99999999, but no microbatch 1"),
                      ("0F0,99999999F0,99999999B0,0B0", "has stage 99999999, but no stage 1"),
                      ("1F0,1B0", "has stage 1, but no stage 0")):  # fmt: skip
        with pytest.raises(ValueError, match=why):
            bp.plan.from_csv(text)
    with pytest.raises(ValueError, match="holds no actions"):
        from_csv("\n")
