"""PipeDream on workers against its definition: SGD whose gradients were taken of older weights, stage by stage."""

from __future__ import annotations

import pytest
import torch

import bpkit as bp
from bpkit.nn import Context
from bpkit.plan import Action
from bpkit.plan.liveness import weight_copies
from bpkit.plan.strategies.pipeline import pipedream

from .oracle import flat

DATA = bp.data.digits(dtype=torch.float64)
NETWORK = bp.nn.mlp([64, 24, 24, 24, 10], seed=1, dtype=torch.float64, dropout=0.1)
OPTIMIZER = bp.optim.SGD(0.1, momentum=0.5)


def delayed(ranks: int, microbatches: int, batch: int, steps: int) -> torch.Tensor:
    """Rank r's forward and backward of microbatch k use the weights after its first k - (p-r-1) updates of the step."""
    stages = NETWORK.copy().split(ranks)
    states = [OPTIMIZER.state(stage.flat_parameters) for stage in stages]
    for step in range(steps):
        inputs, targets = (tensor.tensor_split(microbatches) for tensor in DATA.batch(step, batch))
        versions = [[stage.flat_parameters.clone()] for stage in stages]
        first = 0
        for k in range(microbatches):
            y = inputs[k]
            for r, stage in enumerate(stages):
                stage.flat_parameters.copy_(versions[r][max(0, k - (ranks - r - 1))])
                y = stage.forward(y, 0, Context(step, first, True)).clone()
            gradient = NETWORK.loss.value_and_gradient(y, targets[k])[1] / len(targets[k])
            for stage in reversed(stages):
                gradient = stage.backward(gradient, 0, False, True).clone()
            for stage, state, own in zip(stages, states, versions, strict=True):
                own.append(own[-1].clone())
                OPTIMIZER.update(own[-1], stage.flat_gradients, state, step * microbatches + k, 1.0)
            first += len(inputs[k])
        for stage, own in zip(stages, versions, strict=True):
            stage.flat_parameters.copy_(own[-1])
    return flat([tensor for stage in stages for tensor in stage.parameters()])


@pytest.mark.parametrize("backend", ["shm", "gloo"])
@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
def test_it_is_sgd_with_the_declared_delay(backend, ranks):
    with bp.Cluster(ranks, backend=backend, timeout=20) as cluster:
        for microbatches in (1, 3, 6):
            plan = pipedream(ranks, microbatches)
            result = cluster.train(NETWORK, DATA, plan, batch=50, steps=3, optimizer=OPTIMIZER)
            expected = delayed(ranks, microbatches, 50, 3)
            assert float((flat(result.network.parameters()) - expected).abs().max()) <= 1e-12, plan.name
            if ranks > 1 and microbatches > 1:  # and the delay is there to be seen
                undelayed = delayed(1, microbatches, 50, 3)
                assert float((flat(result.network.parameters()) - undelayed).abs().max()) > 1e-6


def test_as_many_copies_as_versions_are_read():
    for rank in range(4):
        row = pipedream(4, 8).rows[rank]
        used, copies = weight_copies(row)
        assert copies == {rank: 4 - rank}
        last = max(i for i, action in enumerate(row) if action.kind == "UPDATE")
        assert used[last][1] == 0
        for index, action in enumerate(row):
            if action.kind == "B":
                assert used[index] == used[row.index(Action(rank, "F", action.mb))]


def test_the_copies_are_counted_as_memory():
    with bp.Cluster(3) as cluster:
        result = cluster.train(NETWORK, DATA, pipedream(3, 6), batch=50, steps=1, optimizer=OPTIMIZER)
    sizes = [8 * stage.flat_size for stage in NETWORK.split(3)]
    assert [rank["parameters"] for rank in result.memory] == [size * (3 - r) for r, size in enumerate(sizes)]
