"""Bad input of Cluster.train and Cluster.gradients: refused with its reason before anything starts."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

import bpkit as bp
from bpkit.data import Dataset
from bpkit.plan import Action, Plan
from bpkit.plan.strategies.pipeline import gpipe, interleaved
from bpkit.run.job import Job
from bpkit.run.transports.shared import files as memory
from tests.plan.hand_written import TENSOR


@pytest.fixture
def cluster():
    with bp.Cluster(2, backend="shm") as made:
        yield made
        assert made.generation == 0 and made.pids == ()  # nothing was started


NET = bp.nn.mlp([64, 16, 10])
DATA = bp.data.digits()
REGRESSION, NUMBERS = bp.nn.mlp([3, 1], loss="mse"), torch.ones(6, 3)


def small(samples: int) -> Dataset:
    return Dataset("tiny", DATA.inputs[:samples], DATA.targets[:samples], DATA.test_inputs, DATA.test_targets)


def with_(**tensors) -> Dataset:
    """The digits with other tensors."""
    return replace(DATA, **tensors)


def spoiled(tensor: torch.Tensor, row: int, value: float) -> torch.Tensor:
    tensor = tensor.clone()
    tensor[row] = value
    return tensor


def few_labels(value: int) -> Dataset:
    targets = DATA.targets.clone()
    targets[5] = value
    return Dataset("labels", DATA.inputs, targets, DATA.test_inputs, DATA.test_targets)


CASES = {
    "an empty batch": (dict(batch=0), "batch must be a whole number of at least 1, not 0"),
    "a batch larger than the data": (dict(batch=5000), "larger than digits, which has 1437"),
    "a data set smaller than the workers": (dict(data=small(1), batch=1), "1 training samples for 2 workers"),
    "no steps": (dict(steps=0), "steps must be a whole number of at least 1, not 0"),
    "neither rate nor optimizer": (dict(lr=None), "either lr="),
    "both rate and optimizer": (dict(optimizer=bp.optim.SGD(0.1)), "either lr="),
    "a plan for another cluster": (dict(plan=bp.plan.data_parallel(3)), "plan for 3 workers .* has 2"),
    "more buckets than layers": (dict(plan=bp.plan.data_parallel(2, buckets=9)), "9 stages, but the network has only"),
    "shapes that do not fit": (dict(network=bp.nn.mlp([60, 10])),
                               r"training samples: the network takes inputs of shape \('rows', 60\), not \(1437, 64\)"),
    "another dtype": (dict(network=bp.nn.mlp([64, 10], dtype=torch.float64)),
                      "takes inputs of torch.float64 and got inputs of torch.float32"),
    "a label out of range": (dict(data=few_labels(10)), "10"),
    "shards that do not fit": (dict(shards=[1, 2, 3]), "2 sizes or weights, not 3"),
    "a negative shard": (dict(shards=[-1, 2]), "a share of the samples must be a finite number of at least 0, not -1"),
    "a target without evaluations": (dict(target=0.9), "evaluate_every"),
    # Kinds and numbers.
    "a fraction of a sample": (dict(batch=64.5), "batch must be a whole number of at least 1, not 64.5"),
    "a batch in words": (dict(batch="64"), "batch must be a whole number of at least 1, not '64'"),
    "a batch that is true": (dict(batch=True), "batch must be a whole number .* not True"),
    "steps without end": (dict(steps=float("inf")), "steps must be a whole number .* not inf"),
    "half a step": (dict(steps=2.5), "steps must be a whole number .* not 2.5"),
    "a seed in words": (dict(seed="one"), "seed must be a whole number, not 'one'"),
    "nothing recorded": (dict(record=0), "record must be a whole number of at least 1, not 0"),
    "evaluations backwards": (dict(evaluate_every=-1), "evaluate_every must be a whole number of at least 0"),
    "a target above 1": (dict(target=97, evaluate_every=1), "target, a test accuracy, is at most 1, not 97"),
    "a target in words": (dict(target="good", evaluate_every=1), "target, a test accuracy, must be a finite number"),
    "a rate in words": (dict(lr="0.1"), "a learning rate must be a finite number of at least 0, not '0.1'"),
    "a schedule without rates": (dict(lr=lambda step: None), "the learning rate of step 0 must be a finite number"),
    "a schedule that ends": (dict(lr=lambda step: (0.1, None)[step]), "the learning rate of step 1 must be"),
    "another library's optimizer": (dict(lr=None, optimizer=torch.optim.SGD([torch.zeros(1, requires_grad=True)], 0.1)),
                                    "optimizer must be one of bpkit's own, .* not a torch.optim.sgd.SGD"),
    "an optimizer that was not made": (dict(lr=None, optimizer=bp.optim.SGD), "one of bpkit's own, .*bp.optim.SGD"),
    "a plan's name": (dict(plan="gpipe"), "'gpipe' is a name: call what makes one.*there are .*data_parallel.*gpipe"),
    "a plan not made": (dict(plan=bp.plan.gpipe), "gpipe is the function that makes one: call"),
    "a collective by itself": (dict(plan=bp.plan.collective("ring", 2)), "run it by Cluster.collective"),
    "another library's network": (dict(network=torch.nn.Linear(64, 10)), "network must be a bp.nn.Network.*not Linear"),
    "tensors in place of data": (dict(data=(DATA.inputs, DATA.targets)), "data must be a bp.data.Dataset"),
    "words in place of data": (dict(data=with_(inputs=["a"] * 1437)), "digits: inputs must be a tensor or an array"),
    "progress that is no function": (dict(progress=3), "progress must take .* not be 3"),
    "stop that is no event": (dict(stop=True), "stop must be a threading.Event, not True"),
    "no shards": (dict(shards=[]), r"a number for each data rank, .* not \[\]"),
    "shards in words": (dict(shards="ab"), "a number for each data rank, .* not 'ab'"),
    "a shard that is no number": (dict(shards=[float("nan"), 1]), "a share of the samples must be .* not nan"),
    "shards of two depths": (dict(shards=[[1, 2], 3]), "a number for each data rank, .* not 3"),
    "shards of which one step is wrong": (dict(shards=[[16, 16], [1, 2, 3]]), "2 sizes or weights, not 3"),
    "an unknown compressor": (dict(compress="topk"), "compress takes a compressor"),
    "an unknown precision": (dict(precision=16), "unknown precision 16"),
    "statistics in words": (dict(sync_batch_norm="yes"), "sync_batch_norm is True or False, not 'yes'"),
    # Samples.
    "an input that is no number": (dict(data=with_(inputs=spoiled(DATA.inputs, 7, float("nan")))),
                                   "training input 7 holds what is not finite"),
    "an infinite input": (dict(data=with_(inputs=spoiled(DATA.inputs, 9, float("-inf")))), "training input 9 holds"),
    "labels in int32": (dict(data=with_(targets=DATA.targets.int())), "class numbers as torch.int64, not torch.int32"),
    "a label below 0": (dict(data=few_labels(-1)), "label -1 at position 5"),
    "no test samples": (dict(data=bp.data.digits(test=0), evaluate_every=300), "digits has no test samples, but"),
    "test samples of another shape": (dict(data=with_(test_inputs=DATA.test_inputs[:, :60]), evaluate_every=1),
                                      r"test samples: the network takes inputs of shape .*, not \(360, 60\)"),
    "test samples in another dtype": (dict(data=with_(test_inputs=DATA.test_inputs.double()), evaluate_every=1),
                                      "test samples: the network takes inputs of torch.float32 and got"),
    "a test label out of range": (dict(data=with_(test_targets=DATA.test_targets + 1), evaluate_every=1),
                                  "label 10 .* is out of range"),
    "a test input that is no number": (dict(data=with_(test_inputs=DATA.test_inputs.log()), evaluate_every=1),
                                       "test input 0 holds what is not finite"),
    "an accuracy of what has no classes": (dict(network=REGRESSION, evaluate_every=1, batch=6, data=Dataset(
        "line", NUMBERS, NUMBERS[:, :1], NUMBERS, NUMBERS[:, :1])), "test targets are torch.float32"),
    "a target that is no number": (dict(network=REGRESSION, batch=6, data=Dataset(
        "line", NUMBERS, spoiled(NUMBERS[:, :1], 3, float("inf")), NUMBERS, NUMBERS[:, :1])),
        "training target 3 holds what is not finite"),
}  # fmt: skip


@pytest.mark.parametrize(("change", "why"), CASES.values(), ids=CASES.keys())
def test_train_refuses(cluster, change, why):
    arguments = dict(network=NET, data=DATA, plan=None, batch=32, steps=2, lr=0.1) | change
    network, data, plan = (arguments.pop(key) for key in ("network", "data", "plan"))
    with pytest.raises((ValueError, TypeError), match=why):
        cluster.train(network, data, plan, **arguments)


def test_gradients_refuses(cluster):
    with pytest.raises(ValueError, match="an empty batch has no gradient"):
        cluster.gradients(NET, DATA.inputs[:0], DATA.targets[:0])
    with pytest.raises(ValueError, match="4 inputs but 3 targets"):
        cluster.gradients(NET, DATA.inputs[:4], DATA.targets[:3])


    for inputs, why in ((object(), "inputs must be a tensor or an array, not a builtins.object"),
                        (torch.tensor(1.0), "an empty batch")):  # fmt: skip
        with pytest.raises((TypeError, ValueError), match=why):
            cluster.gradients(NET, inputs, DATA.targets[:4])
    with pytest.raises(ValueError, match="gradients: step must be a whole number of at least 0, not -1"):
        cluster.gradients(NET, DATA.inputs[:4], DATA.targets[:4], step=-1)
    with pytest.raises(TypeError, match="'serial' is a name"):
        cluster.gradients(NET, DATA.inputs[:4], DATA.targets[:4], "serial")


def test_collective_refuses(cluster):
    ring, ones = bp.plan.collective("ring", 2), torch.ones(4)
    for plan, tensors, repeat, why in (
        ("ring", [ones, ones], 1, "'ring' is a name"),
        (bp.plan.data_parallel(2), [ones, ones], 1, "not a collective by itself"),
        (ring, [ones], 1, "needs a list of as many tensors"),
        (ring, (one for one in (ones, ones)), 1, "needs a list of as many tensors, not a builtins.generator"),
        (ring, [ones, [1.0] * 4], 1, "rank 1 needs a tensor on the CPU"),
        (ring, [ones, ones.double()], 1, "all must be 1-D and alike"),
        (ring, [ones, ones], 0, "repeat must be a whole number of at least 1, not 0"),
    ):
        with pytest.raises((ValueError, TypeError), match=why):
            cluster.collective(plan, tensors, repeat)


@pytest.mark.parametrize(("change", "why"), [
    (dict(steps=2.5), "steps must be a whole number of at least 1, not 2.5"),
    (dict(staleness=0.5), "staleness must be a whole number of at least 0, not 0.5"),
    (dict(batch="8"), "batch must be a whole number"),
    (dict(progress=1), "progress must take"),
    (dict(data=with_(inputs=spoiled(DATA.inputs, 7, float("nan")))), "training input 7"),
])  # fmt: skip
def test_train_asynchronous_refuses(cluster, change, why):
    arguments = dict(network=NET, data=DATA, batch=32, steps=2, lr=0.1) | change
    with pytest.raises((ValueError, TypeError), match=why):
        cluster.train_asynchronous(arguments.pop("network"), arguments.pop("data"), **arguments)


def test_statistics_over_ranks_that_run_apart(cluster):
    network = bp.nn.convnet(8, (1, 4), norm="batch")
    with pytest.raises(ValueError, match="sync_batch_norm takes a plan whose data ranks run in step"):
        cluster.train(network, DATA, bp.plan.asynchronous_server(1, [1, 1]), batch=8, steps=2, lr=0.1,
                      sync_batch_norm=True)  # fmt: skip


GPT, TOKENS = bp.nn.gpt(20, 8, width=16, heads=2, layers=1), torch.arange(32).view(4, 8) % 20
NORM = bp.nn.Network([bp.nn.Linear(64, 8), bp.nn.BatchNorm(8), bp.nn.ReLU(), bp.nn.Linear(8, 10)], 64)


@pytest.mark.parametrize("plan", [bp.plan.data_parallel(2), bp.plan.gpipe(2, 2), bp.plan.tensor_parallel(
    bp.plan.serial(), 2, bp.nn.tensor_layout(GPT))], ids=lambda plan: plan.name)  # fmt: skip
@pytest.mark.parametrize("token", [20, -1, 2**40])
def test_tokens_outside_the_vocabulary(cluster, plan, token):
    with pytest.raises(ValueError, match=rf"training samples: token {token} at position \(3, 2\) is outside the voc"):
        cluster.gradients(GPT, spoiled(TOKENS, (3, 2), token), TOKENS, plan)
    data = Dataset("words", TOKENS, TOKENS, spoiled(TOKENS, (0, 1), token), TOKENS)
    with pytest.raises(ValueError, match=f"test samples: token {token} at position"):
        cluster.train(GPT, data, plan, batch=4, steps=2, lr=0.1, evaluate_every=2)


@pytest.mark.parametrize(("plan", "options"), [
    (bp.plan.data_parallel(2), {}),
    (bp.plan.data_parallel(2), dict(shards=[1, 7])),
    (bp.plan.data_parallel(2), dict(shards=[[4, 4], [7, 1]])),
    (bp.plan.data_parallel(2, microbatches=2), dict(shards=[3, 5])),
    (bp.plan.data_parallel(2, microbatches=2), dict(shards=[2, 0], sync_batch_norm=True)),
    (bp.plan.zero(2, 3), {}),
    (bp.plan.gpipe(2, 2), {}),
    (bp.plan.local_sgd(2, 2), dict(shards=[2, 6])),
    (bp.plan.asynchronous_server(1, [1]), dict(shards=[0, 1])),
])  # fmt: skip
def test_batch_norm_of_one_value(cluster, plan, options):
    sizes = options.get("shards", [1, 1])
    samples = sum(sizes[0]) if isinstance(sizes[0], list) else sum(sizes)
    with pytest.raises(ValueError, match="batch norm expects more than 1 value per channel when training"):
        cluster.train(NORM, DATA, plan, batch=samples, steps=1, lr=0.1, **options)


def test_batch_norm_of_two_values_runs():
    with bp.Cluster(2) as cluster:
        for options in (dict(shards=[2, 2]), dict(shards=[0, 2]), dict(shards=[1, 1], sync_batch_norm=True)):
            assert cluster.gradients(NORM, DATA.inputs[:sum(options["shards"])], DATA.targets[:sum(options["shards"])],
                                     **options).any()  # fmt: skip


def test_float_targets_are_rounded_to_the_outputs_dtype():
    targets = torch.linspace(0, 1, 6, dtype=torch.float64).view(6, 1)
    with bp.Cluster(2) as cluster:
        a, b = (cluster.gradients(REGRESSION, NUMBERS, t) for t in (targets, targets.float()))
        assert torch.equal(a, b)


def test_workers_are_counted():
    for wrong in (2.5, "2", None, True, 0):
        with pytest.raises(ValueError, match="Cluster: workers must be a whole number of at least 1"):
            bp.Cluster(wrong)
    assert bp.Cluster(np.int64(2)).workers == bp.Cluster(2.0).workers == 2


def test_what_can_be_taken_is_taken():
    """Numbers of NumPy and of PyTorch, floats without a fraction, arrays, and tensors that autograd follows."""
    followed = with_(inputs=DATA.inputs.clone().requires_grad_() * 1.0)
    arrays = Dataset("digits", *(t.numpy() for t in (DATA.inputs, DATA.targets, DATA.test_inputs, DATA.test_targets)))
    same = dict(batch=64, steps=2, lr=0.1, seed=1, shards=[30, 34])
    near = [dict(batch=np.int64(64), steps=np.int32(2), seed=np.int8(1)), dict(batch=64.0, steps=2.0, seed=1.0),
            dict(batch=torch.tensor(64), lr=np.float64(0.1)), dict(shards=np.array([30, 34])),
            dict(shards=(np.float64(30), 34.0)), dict(shards=torch.tensor([[30, 34]])),
            dict(record=np.int64(1), evaluate_every=np.int64(2), target=np.float32(1)), dict(sync_batch_norm=np.True_),
            dict(data=followed), dict(data=arrays)]  # fmt: skip
    with bp.Cluster(np.int64(2)) as cluster:
        right = cluster.train(NET, DATA, **same).network.flat_parameters
        for change in near:
            data, *_ = [change.pop("data", DATA)]
            assert torch.equal(cluster.train(NET, data, **{**same, **change}).network.flat_parameters, right), change
        found = [cluster.gradients(NET, x, t) for x, t in (
            (DATA.inputs[:8], DATA.targets[:8]), (DATA.inputs[:8].numpy(), DATA.targets[:8].tolist()),
            (followed.inputs[:8], DATA.targets[:8]))]  # fmt: skip
        assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])


def test_a_large_finite_sum_is_no_fault(cluster):
    """What overflows only in the sum of all is finite itself."""
    job = Job(bp.plan.data_parallel(2), REGRESSION, Dataset(
        "large", NUMBERS * 3e38, NUMBERS[:, :1], NUMBERS, NUMBERS[:, :1]), bp.optim.SGD(0.1), 6)  # fmt: skip
    assert cluster.check(job).program.plan.workers == 2


def test_a_plan_with_an_idle_rank(cluster):
    plan = replace(bp.plan.serial(), mesh=bp.plan.Mesh(pipeline=2), rows=(*bp.plan.serial().rows, ()))
    with pytest.raises(ValueError, match="pipeline rank 1 holds no stage"):
        cluster.train(NET, DATA, plan, batch=32, steps=2, lr=0.1)


def test_a_wrong_plan_never_starts(cluster):
    plan = bp.plan.data_parallel(2)
    wrong = plan.with_rows([[a for a in plan.rows[0] if a.kind != "REDUCE_GRAD"]])
    with pytest.raises(bp.plan.PlanError, match="lacks shard 1"):
        cluster.train(NET, DATA, wrong, batch=32, steps=2, lr=0.1)


def test_a_small_shared_memory_is_named(cluster, monkeypatch):
    monkeypatch.setattr(memory, "free_room", lambda: 1000)
    with pytest.raises(RuntimeError, match=r"data_parallel\(2\) with batches of 32 needs .* are free .*backend='gloo'"):
        cluster.train(NET, DATA, batch=32, steps=2, lr=0.1)


def test_plans_that_do_not_fit_the_network_are_refused(cluster):
    gpt = bp.nn.gpt(20, 8, width=12, heads=3, layers=1)
    layout = bp.nn.tensor_layout(gpt)
    tokens = torch.zeros(4, 8, dtype=torch.int64)
    with pytest.raises(ValueError, match="3 heads cannot be divided among 2 tensor ranks"):
        cluster.gradients(gpt, tokens, tokens, bp.plan.tensor_parallel(bp.plan.serial(), 2, layout))
    odd = bp.nn.gpt(20, 7, width=12, heads=4, layers=1)
    by_tokens = bp.plan.tensor_parallel(bp.plan.serial(), 2, bp.nn.tensor_layout(odd, sequence=True))
    with pytest.raises(ValueError, match="as many tokens, which samples of 7 tokens do not allow"):
        cluster.gradients(odd, tokens[:, :7], tokens[:, :7], by_tokens)
    for plan in (Plan.parse(TENSOR), bp.plan.tensor_parallel(bp.plan.serial(), 2, layout)):
        with pytest.raises(ValueError, match="splits another network than this one"):
            cluster.gradients(bp.nn.mlp([64, 20, 20, 16, 16, 16, 10]), DATA.inputs[:8], DATA.targets[:8], plan)
    with pytest.raises(ValueError, match="10 stages, but the network has only 5 layers"):
        cluster.train(bp.nn.mlp([64, 20, 20, 10]), DATA, interleaved(2, 2, chunks=5), batch=32, steps=1, lr=0.1)
    with pytest.raises(ValueError, match="9 microbatches of a batch of 8 samples"):
        cluster.gradients(NET, DATA.inputs[:8], DATA.targets[:8], gpipe(2, 9))
    with pytest.raises(ValueError, match="is a plan for 4 workers"):
        cluster.gradients(NET, DATA.inputs[:8], DATA.targets[:8], gpipe(2, 2, data=2))
    with pytest.raises(bp.plan.PlanError, match="deadlock"):
        rows = [[*row] for row in gpipe(2, 2).rows]
        rows[0].insert(1, rows[0].pop(rows[0].index(Action(0, "RECV_B", 0))))
        rows[0].insert(2, rows[0].pop(rows[0].index(Action(0, "B", 0))))
        cluster.gradients(NET, DATA.inputs[:8], DATA.targets[:8], gpipe(2, 2).with_rows(rows))


def test_clipping_needs_one_gradient(cluster):
    with pytest.raises(ValueError, match="no one gradient whose norm could be clipped"):
        cluster.train(NET, DATA, bp.plan.local_sgd(2, 2), batch=32, steps=2, optimizer=bp.optim.SGD(0.1, clip=1.0))


def test_copies_of_a_tied_tensor_are_not_compressed_apart(cluster):
    text = bp.data.text(length=8)
    network = bp.nn.gpt(text.vocabulary, 8, width=16, heads=2, layers=1)
    options = dict(batch=8, steps=1, lr=0.1, compress=bp.compress.TopK(0.1))
    with pytest.raises(ValueError, match=r"cannot compress gradients with TopK.* and this one has SUM_TIED"):
        cluster.train(network, text, bp.plan.one_f_one_b(2, 2), **options)
