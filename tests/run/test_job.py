"""A job: made without a cluster, checked before it runs, printed, and run as `Cluster.train` would."""

from __future__ import annotations

import pytest
import torch

import bpkit as bp
from bpkit.run import Job

NET, DATA = bp.nn.mlp([64, 16, 10], seed=1), bp.data.digits()


def test_a_job_prints_what_it_is():
    plan = bp.plan.gpipe(2, 4)
    text = str(Job(plan, NET, DATA, bp.optim.SGD(0.1, momentum=0.9), batch=64, steps=300, record=20, evaluate_every=50))
    for words in ("gpipe(2, 4)", plan.digest, "2 workers", "4 microbatches", "mlp 64-16-10, 1,210 parameters",
                  "torch.float32", "digits: 1,437 training and 360 test samples",
                  "64", "300", "20", "SGD(lr=0.1, momentum=0.9", "evaluate_every  50"):  # fmt: skip
        assert words in text
    assert "compress" not in text and "target" not in text
    lossy = Job(plan, NET, DATA, bp.optim.SGD(0.1), 64, compress=bp.compress.TopK(0.01), precision="bf16")
    assert "TopK" in str(lossy) and "bf16" in str(lossy)


def test_a_job_is_checked_before_it_runs_and_runs_as_train():
    job = Job(bp.plan.data_parallel(2, 2), NET, DATA, bp.optim.SGD(0.1, clip=1.0), batch=64.0, steps=3, shards=[24, 40])
    with pytest.raises(RuntimeError, match="was not checked"):
        _ = job.program
    with bp.Cluster(2) as cluster:
        checked = cluster.check(job)
        assert cluster.generation == 0
        assert checked.plan is checked.program.plan and checked.plan.name.endswith("with clipping")
        assert checked.batch == 64 and checked.shard_sizes(7) == [24, 40] and checked.rows == 40
        assert checked.needs(checked.plan.mesh.coordinate(0))["gradients"] == 4 * sum(checked.program.sizes)
        assert cluster.check(checked).program == checked.program  # as often as one likes
        a = cluster.run(job)
        b = cluster.train(NET, DATA, bp.plan.data_parallel(2, 2), batch=64, steps=3, shards=[24, 40],
                          optimizer=bp.optim.SGD(0.1, clip=1.0))  # fmt: skip
        assert torch.equal(a.network.flat_parameters, b.network.flat_parameters) and (a.losses == b.losses).all()
        with pytest.raises(ValueError, match="a plan for 3 workers"):
            cluster.run(Job(bp.plan.data_parallel(3), NET, DATA, bp.optim.SGD(0.1), 64))


def test_the_largest_microbatch_of_a_server_is_a_round_of_one_rank():
    plan = bp.plan.asynchronous_server(2, [1, 2] * 4)
    assert Job(plan, NET, DATA, bp.optim.SGD(0.1), batch=20, steps=4).rows == 10  # not 10 over 4 rounds
    assert Job(bp.plan.gpipe(2, 4), NET, DATA, bp.optim.SGD(0.1), batch=22).rows == 6
    plan = bp.plan.data_parallel(2, microbatches=2)
    assert Job(plan, NET, DATA, bp.optim.SGD(0.1), batch=22, shards=[3, 19]).rows == 10
