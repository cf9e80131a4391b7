"""Stored activations, counted while the workers run, against what the compiled plan and the schedules promise."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

import bpkit as bp
from bpkit.nn import Context, Layer, Linear, Network, ReLU, Site
from bpkit.plan import compile, gpipe, interleaved, one_f_one_b, zb_v, zero_bubble_h1, zero_bubble_h2

KEPT: dict[str, set[int]] = {}  # in a worker: passes whose forward has run and whose weight half has not
PEAK: dict[str, int] = {}


@dataclass(frozen=True)
class Watched(Linear):
    """A linear layer that notes how many microbatches its rank keeps."""

    def at(self, site: Site):
        made = super().at(site)
        forward, weight = made.forward, made.backward_weight
        kept = KEPT.setdefault("all", set())

        def watched_forward(x: Tensor, context: Context) -> Tensor:
            kept.add(id(made))
            PEAK["all"] = max(PEAK.get("all", 0), len(kept))
            return forward(x, context)

        def watched_weight(accumulate: bool = False) -> None:
            kept.discard(id(made))
            weight(accumulate)

        made.forward, made.backward_weight = watched_forward, watched_weight
        return made


def network(stages: int) -> Network:
    """One watched layer a stage."""
    layers: list[Layer] = [layer for _ in range(stages) for layer in (Watched(8, 8), ReLU())]
    return Network(layers[:-1], 8, dtype=torch.float64)


def read(comm) -> int:
    peak = PEAK.pop("all", 0)
    KEPT.clear()
    return peak


@pytest.mark.parametrize("workers", [2, 4])
def test_peaks_are_as_promised(workers):
    p = workers
    promised = {
        gpipe: lambda r, m: m,
        one_f_one_b: lambda r, m: min(m, p - r),
        zero_bubble_h1: lambda r, m: min(m, p),
        zero_bubble_h2: lambda r, m: min(m, 2 * p - 1),
        zb_v: None,
        interleaved: None,
    }
    with bp.Cluster(workers, timeout=20) as cluster:
        for make, formula in promised.items():
            for m in (1, 3, 8):
                plan = make(workers, m)
                net = network(plan.stages)
                plan = bp.plan.Plan.parse(f"{plan}\ncuts {' '.join(str(2 * s) for s in range(1, plan.stages))}")
                x, t = torch.randn(8, 8, dtype=torch.float64), torch.arange(8)
                cluster.call(read)
                cluster.gradients(net, x, t, plan)
                counted = cluster.call(read)
                assert counted == list(compile(plan, net).peak), plan.name
                if formula is not None:
                    assert counted == [formula(rank, m) for rank in range(workers)], plan.name
