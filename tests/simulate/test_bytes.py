"""Bytes that the simulator gives for a program are those that a run counts, action by action, for every plan."""

from __future__ import annotations

import numpy as np
import pytest

import bpkit as bp
from bpkit.plan import (
    VERBS,
    Program,
    compile,
    data_parallel,
    expand,
    one_f_one_b,
    parameter_server,
    tensor_parallel,
    zero,
)
from bpkit.simulate import simulate
from tests.run import test_models

pytestmark = pytest.mark.slow

TEXT = bp.data.text(length=8)
GPT = bp.nn.gpt(TEXT.vocabulary, 8, width=16, heads=4, layers=2)
MLP, DIGITS = bp.nn.mlp([64, 12, 11, 10], seed=1), bp.data.digits()
BATCH = 13  # no number of ranks or microbatches divides it
SPLIT = {sequence: bp.nn.tensor_layout(GPT, sequence=sequence) for sequence in (False, True)}
OTHERS = [
    (MLP, DIGITS, expand(data_parallel(4, 2), "halving_doubling")),
    (MLP, DIGITS, expand(data_parallel(3), "ring")),
    (MLP, DIGITS, parameter_server(3, buckets=2)),
    (MLP, DIGITS, one_f_one_b(2, 3, data=2)),
    (MLP, DIGITS, zero(1, 3)),
    (MLP, DIGITS, bp.plan.local_sgd(2, 2)),
    (GPT, TEXT, one_f_one_b(2, 3)),
    *[(GPT, TEXT, tensor_parallel(one_f_one_b(2, 3), 2, layout)) for layout in SPLIT.values()],
]


def counted(cluster: bp.Cluster, network: bp.nn.Network, data: bp.data.Dataset, plan: bp.plan.Plan,
            clip: float | None) -> tuple[Program, bp.Trace]:  # fmt: skip
    optimizer = bp.optim.SGD(0.1, clip=clip)
    result = cluster.train(network, data, plan, batch=BATCH, steps=1, optimizer=optimizer)
    return result.program, result.trace


def same(program: Program, trace: bp.Trace) -> None:
    simulated = simulate(program, steps=1, batch=BATCH)
    assert simulated.cells == trace.cells and np.array_equal(simulated.cell, trace.cell)
    wrong = simulated.bytes != trace.bytes
    cells = [trace.cells[cell] for cell in trace.cell[wrong]]
    assert not wrong.any(), [*zip(cells, simulated.bytes[wrong], trace.bytes[wrong], strict=True)]


@pytest.fixture(scope="module", params=["shm", "gloo"])
def clusters(request):
    made = {n: bp.Cluster(n, backend=request.param, timeout=20) for n in (1, 2, 3, 4)}
    yield made
    for cluster in made.values():
        cluster.close()


@pytest.mark.parametrize(("network", "data", "plan"), OTHERS, ids=[plan.name for _, _, plan in OTHERS])
@pytest.mark.parametrize("clip", [None, 1.0])
def test_every_action_of_a_plan(clusters, network, data, plan, clip):
    if clip and (plan.holds != "all" or plan.name.startswith("parameter_server")):
        pytest.skip("no rank of it has the whole gradient")
    same(*counted(clusters[plan.workers], network, data, plan, clip))


@pytest.mark.parametrize("model", test_models.MODELS)
def test_every_plan_of_every_model(clusters, model):
    if clusters[1].backend != "shm":
        pytest.skip("both transports count the plans above, and it takes long")
    network, data = test_models.MODELS[model]
    for plan in test_models.plans(network):
        same(*counted(clusters[plan.workers], network, data, plan, None))


def test_a_native_collective_says_its_payload_and_that_it_is_not_counted():
    program = compile(tensor_parallel(one_f_one_b(2, 3), 2, SPLIT[True]), GPT, clip=True)
    payload = {step.action.kind: step.payload for row in program.rows for step in row if step.payload}
    assert payload["NORM"] == 8 and payload["SUM_TIED"] == 4 * (TEXT.vocabulary // 2) * 16
    for row in program.rows:
        for step in row:
            assert (step.bytes(1) == -1) == (VERBS[step.action.kind].bytes == "native" and step.payload > 0)
    assert payload["SUM_G"] == 4 * 2 * 16  # a layer norm's weight and bias
