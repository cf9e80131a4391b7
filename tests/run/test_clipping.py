"""Clipping by a norm to which each rank gives what it updates; also where squares are beyond a float32's range."""

from __future__ import annotations

import pytest
import torch

import bpkit as bp
from bpkit.plan import Plan, PlanError, check, compile, data_parallel, gpipe, parameter_server, zero

PLANS = [data_parallel(2), data_parallel(2, 2), zero(2, 1), zero(2, 2, units=2), zero(2, 3, units=2), gpipe(2, 2)]


@pytest.mark.parametrize("plan", PLANS, ids=lambda plan: plan.name)
@pytest.mark.parametrize("size", [1.0, 1e20, 1e30])
def test_an_update_of_the_norm_that_was_asked_for(clusters, plan: Plan, size: float) -> None:
    network = bp.nn.mlp([4, 3, 2], activation="tanh")
    weight, bias, *_ = network.parameters()
    weight.fill_(1 / size)  # so that the gradient is as large as the inputs, and nothing saturates
    bias.zero_()
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(8, 4, generator=generator).mul_(size)
    data = bp.data.Dataset("large", x, torch.tensor([0, 1] * 4), x, torch.tensor([0, 1] * 4))
    result = clusters[2].train(network, data, plan, batch=8, steps=1, optimizer=bp.optim.SGD(1.0, clip=1e-3))
    moves = [b.double() - a.double() for a, b in zip(network.parameters(), result.network.parameters(), strict=True)]
    assert abs(float(torch.cat([m.flatten() for m in moves]).norm()) / 1e-3 - 1) < 1e-3


def overlapping() -> Plan:
    """Rank 0 updates all; rank 1 updates the second half of stage 0 as well and takes the rest."""
    text = """plan overlapping
    mesh data=2
    stages 2
    microbatches 1
    merge mean
    expanded yes
    row {0} 1REDUCE_GRAD 0REDUCE_GRAD 1UPDATE 0UPDATE 0SEND_P[0/2]>1 1SEND_P>1
    row {0} 1REDUCE_GRAD 0REDUCE_GRAD 0UPDATE[1/2] 0RECV_P[0/2]<0 1RECV_P<0"""
    return Plan.parse(text.format("0ZERO 1ZERO 0F0 1F0 1LOSS0 1B0 0B0"))


SERVERS = [parameter_server(2), parameter_server(2, 2), parameter_server(3, buckets=3), parameter_server(3, 2, 2),
           parameter_server(4, 3, buckets=2), overlapping()]  # fmt: skip


@pytest.mark.parametrize("plan", SERVERS, ids=lambda plan: plan.name)
def test_a_server_clips_as_serial_does(clusters, plan: Plan) -> None:
    network = bp.nn.mlp([64, 24, 23, 10], seed=1, dtype=torch.float64)
    data = bp.data.digits(dtype=torch.float64)
    for optimizer in (bp.optim.SGD(0.5, momentum=0.9, clip=0.03), bp.optim.SGD(0.5, clip=1e9)):
        arguments = dict(batch=22, steps=5, optimizer=optimizer)
        result = clusters[plan.workers].train(network, data, plan, **arguments)
        serial = clusters[1].train(network, data, **arguments)
        for a, b in zip(result.network.parameters(), serial.network.parameters(), strict=True):
            assert float((a - b).abs().max()) <= 1e-12 * float(b.abs().max())


@pytest.mark.parametrize("plan", SERVERS, ids=lambda plan: plan.name)
def test_a_norm_stands_before_what_it_clips_and_behind_what_it_sums(plan: Plan) -> None:
    clipped = compile(plan, bp.nn.mlp([64, 24, 23, 10]), clip=True).plan
    assert all(sum(action.kind == "NORM" for action in row) == 1 for row in clipped.rows)
    for index, row in enumerate(clipped.rows):
        at = next(i for i, action in enumerate(row) if action.kind == "NORM")
        first = next(i for i, action in enumerate(row) if action.kind in ("UPDATE", "RECV_P"))
        assert at == first - 1
        others = list(row[:at] + row[at + 1 :])
        for to in range(len(others)):
            changed = [list(each) for each in clipped.rows]
            changed[index] = [*others[:to], row[at], *others[to:]]
            gradients = [a for a in others[to:] if a.kind in ("B", "ADD_G", "REDUCE_GRAD")]
            late = [a for a in others[:to] if a.kind == "UPDATE"]
            if (gradients and any(a.kind == "UPDATE" for a in row)) or late:
                with pytest.raises(PlanError):
                    check(clipped.with_rows(changed))
        changed = [list(each) for each in clipped.rows]
        changed[index] = others
        with pytest.raises(PlanError, match="deadlock"):
            check(clipped.with_rows(changed))
