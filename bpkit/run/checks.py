"""What is checked before anything starts, with a sentence for what does not fit."""

import inspect
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from bpkit import plan as plans
from bpkit.compress import Compressor, PowerSGD
from bpkit.data import Dataset
from bpkit.given import integer, number
from bpkit.nn import Network
from bpkit.optim import SGD, Optimizer
from bpkit.plan import Plan, Program, compile
from bpkit.plan.action import VERBS
from bpkit.plan.program import compile_collective
from bpkit.run.job import Job, Shards
from bpkit.run.transports.shared import files as memory

STRATEGIES = "bpkit.plan.strategies."  # where the functions stand that make plans


def checked(job: Job, workers: int, backend: str) -> Job:
    """The job with its plan compiled, once everything that it was given fits; every job comes by here.

    What can be taken is taken: NumPy's numbers, floats without a fraction, shares in an array.

    Raises
    ------
    ValueError, TypeError, PlanError
        If something does not fit: the sentence says what, and what would.
    """
    kinds(job)
    job = replace(numbers(job), data=tensors(job.data))
    run_length(job)
    for_the_workers(job.plan, workers)
    batch(job)
    samples(job.network, job.data.inputs, job.data.targets, "training")
    test_samples(job)
    shards(job)
    precision(job)
    clipping(job)
    batch_norm(job)
    program = compile(job.plan, job.network, job.optimizer.clip is not None, norm=job.skip_nonfinite)
    job = replace(job, plan=program.plan, compiled=program)
    room(job, backend)
    return replace(job, compress=compressor(job))


def kinds(job: Job) -> None:
    """Refuse what is of another kind than it should be."""
    this_plan(job.plan)
    for name, value, kind, right in (
        ("network", job.network, Network, "a bp.nn.Network, for example bp.nn.mlp([64, 32, 10])"),
        ("data", job.data, Dataset, "a bp.data.Dataset(name, inputs, targets, test_inputs, test_targets)"),
        ("optimizer", job.optimizer, Optimizer, "one of bpkit's own, for example bp.optim.SGD(0.1, momentum=0.9)"),
    ):
        if not isinstance(value, kind):
            raise TypeError(f"{name} must be {right}, not {_named(value)}")


def this_plan(plan: Any) -> None:
    """Refuse what is no plan."""
    if not isinstance(plan, Plan):
        call = f"{plan!r} is a name" if isinstance(plan, str) else f"{_named(plan)} is none"
        call = f"{plan.__name__} is the function that makes one" if inspect.isfunction(plan) else call
        made = [name for name, one in vars(plans).items() if getattr(one, "__module__", "").startswith(STRATEGIES)]
        raise TypeError(f"plan must be a plan, and {call}: call what makes one, for example bp.plan.gpipe(workers, "
                        f"microbatches); there are {', '.join(sorted(made))}")  # fmt: skip


def _named(value: object) -> str:
    """A value in a few words, for a sentence."""
    kind, text = type(value), " ".join(repr(value).split())
    return text if len(text) < 60 and "object at" not in text else f"a {kind.__module__}.{kind.__qualname__}"


def numbers(job: Job) -> Job:
    """The job with its numbers as Python's own; what is no number, or none that makes sense, is refused."""
    wanted = {"batch": 1, "steps": 1, "record": 1, "evaluate_every": 0, "seed": None}
    found: dict[str, Any] = {name: integer(name, getattr(job, name), least) for name, least in wanted.items()}
    if job.target is not None:
        found["target"] = number("target, a test accuracy,", job.target, above=0)
        if found["target"] > 1:
            raise ValueError(f"target, a test accuracy, is at most 1, not {job.target!r}")
    for step in {0, found["steps"] // 2, found["steps"] - 1}:
        number(f"the learning rate of step {step}", job.optimizer.rate(step), 0)
    for name in ("sync_batch_norm", "skip_nonfinite"):
        if getattr(job, name) not in (True, False):
            raise TypeError(f"{name} is True or False, not {_named(getattr(job, name))}")
    return replace(job, **found, shards=None if job.shards is None else _shares(job.shards))


def _shares(given: Any) -> Shards:
    """Shares of the data ranks as tuples of numbers."""
    given = given.tolist() if hasattr(given, "tolist") else given
    if not isinstance(given, Sequence) or isinstance(given, str) or not given:
        raise TypeError("shards takes a number for each data rank, or a list of such lists, one a step, not "
                        f"{_named(given)}")  # fmt: skip
    if any(isinstance(one, Sequence) or hasattr(one, "__len__") for one in given):
        return tuple(map(_shares, given))  # type: ignore[return-value]
    return tuple(int(n) if n == int(n) else n for n in (number("a share of the samples", one, 0) for one in given))


def tensors(data: Dataset) -> Dataset:
    """The data as tensors that autograd does not follow; arrays are taken."""
    own = ("inputs", "targets", "test_inputs", "test_targets")
    return Dataset(data.name, *(_tensor(f"{data.name}: {name}", getattr(data, name)) for name in own))


def _tensor(name: str, given: Any) -> Tensor:
    try:
        return torch.as_tensor(given).detach()
    except (TypeError, ValueError, RuntimeError):
        raise TypeError(f"{name} must be a tensor or an array, not {_named(given)}") from None


def run_length(job: Job) -> None:
    """Refuse lengths of a run that do not fit each other or the plan."""
    plan = job.plan
    if job.target is not None and job.evaluate_every < 1:
        raise ValueError("a target accuracy needs evaluate_every=N: how many steps between evaluations")
    if plan.servers and (job.steps != plan.microbatches or job.evaluate_every):
        raise ValueError(f"{plan.name} is a whole run of {plan.microbatches} steps without evaluations: "
                         f"give steps={plan.microbatches} and no evaluate_every")  # fmt: skip


def for_the_workers(plan: Plan, workers: int) -> None:
    """Refuse a plan for others, and one that does not train."""
    if plan.purpose != "train":
        raise ValueError(f"{plan.name} is a collective by itself: run it by Cluster.collective")
    if plan.workers != workers:
        raise ValueError(f"{plan.name} is a plan for {plan.workers} workers (mesh {plan.mesh}), but this "
                         f"cluster has {workers}")  # fmt: skip
    idle = next((rank for rank in range(plan.mesh.pipeline) if not plan.owned(rank)), None)
    if idle is not None:
        raise ValueError(f"{plan.name}: pipeline rank {idle} holds no stage: a rank without work has no place here")


def batch(job: Job) -> None:
    """Refuse an empty batch, and one larger than the data or smaller than the plan's microbatches."""
    job.data.indices(0, job.batch)
    if job.plan.microbatches > job.batch and not job.plan.servers:
        raise ValueError(f"{job.plan.name}: {job.plan.microbatches} microbatches of a batch of {job.batch} samples: "
                         "some would be empty; use fewer microbatches or a larger batch")  # fmt: skip


def enough(data: Dataset, workers: int) -> None:
    """Refuse to train on fewer samples than there are workers."""
    if len(data) < workers:
        raise ValueError(f"{data.name} has {len(data)} training samples for {workers} workers: use fewer workers")


def samples(network: Network, inputs: Tensor, targets: Tensor, what: str) -> None:
    """Refuse samples that do not fit the network, or hold what is no number."""
    for owner, place in (("the network", network.device), ("the data", inputs.device), ("the data", targets.device)):
        if place.type != "cpu":
            raise ValueError(f"{owner} lies on {place}: give it on the CPU, workers copy it to their own device")
    try:
        network.check_inputs(inputs)
        network.loss.check(targets, network.output_shape)
    except (ValueError, TypeError) as error:
        raise type(error)(f"{what} samples: {error}") from None
    for name, tensor in (("input", inputs), ("target", targets)):
        # One sum shows whether all are finite: it is exact where it is itself not finite only by its size.
        if tensor.is_floating_point() and not tensor.sum().isfinite() and not (finite := tensor.isfinite()).all():
            first = int((~finite.flatten(1).all(1) if tensor.ndim > 1 else ~finite).nonzero()[0])
            raise ValueError(f"{what} {name} {first} holds what is not finite (inf or nan): leave such samples out")


def test_samples(job: Job) -> None:
    """Refuse evaluations without test samples that fit."""
    if not job.evaluate_every:
        return
    data = job.data
    if len(data.test_inputs) == 0:
        raise ValueError(f"{data.name} has no test samples, but evaluate_every={job.evaluate_every} asks for their "
                         "accuracy")  # fmt: skip
    samples(job.network, data.test_inputs, data.test_targets, "test")
    if data.test_targets.is_floating_point():
        raise TypeError("an accuracy is the share of right classes, but the test targets are "
                        f"{data.test_targets.dtype}: train without evaluate_every")  # fmt: skip


def shards(job: Job) -> None:
    """Refuse shares of the data ranks that do not fit, in any step."""
    for step in job.different_steps if job.shards is not None else ():
        sizes = job.shard_sizes(step)
        served = [data for data in job.plan.servers if sizes[data]]
        if served:
            raise ValueError(f"{job.plan.name}: data rank {served[0]} only serves and takes no samples, not "
                             f"{sizes[served[0]]}")  # fmt: skip


def precision(job: Job) -> None:
    """Refuse a precision that does not exist, or not for this plan or network."""
    name, network = job.precision, job.network
    if network.dtype is torch.bfloat16:
        raise TypeError("a network in bfloat16 has no float32 weights: give one in float32, with precision='bf16'")
    if name not in ("full", "bf16"):
        raise ValueError(f"unknown precision {name!r}: choose 'full' or 'bf16'")
    if name == "bf16" and network.dtype is not torch.float32:
        raise TypeError(f"bf16 keeps its weights in torch.float32, but the network's are {network.dtype}")
    if name == "bf16" and (job.plan.holds != "all" or len(network.flat_buffers)):
        raise ValueError(f"{job.plan.name}: bf16 takes a plan with one gradient, and a network without running "
                         "statistics, such as batch norm's")  # fmt: skip


def batch_norm(job: Job) -> None:
    """Refuse microbatches that give batch norm one value a channel, and statistics of ranks that do not run in step."""
    plan, network = job.plan, job.network
    for rank in range(plan.mesh.size) if job.sync_batch_norm else ():
        rows = [plan.row(plan.mesh.coordinate(other)) for other in plan.mesh.group(rank, "data")]
        orders = [[(a.stage, a.kind, a.mb) for a in row if a.kind in ("F", "RECOMPUTE", "B", "I")] for row in rows]
        if any(order != orders[0] for order in orders):  # each of these is a sum over the data ranks
            raise ValueError(f"{plan.name}: sync_batch_norm takes a plan whose data ranks run in step, with the same "
                             "forwards and backwards in one order, as those of an asynchronous one do not")  # fmt: skip
    for step in job.different_steps if network.least_rows > 1 else ():
        parts = job.microbatches(step)
        parts = [[sum(part)] for part in parts] if job.sync_batch_norm else parts
        if any(0 < rows < network.least_rows for part in parts for rows in part):
            raise ValueError(f"{plan.name}: batch norm expects more than 1 value per channel when training, and a "
                             f"microbatch would have one: shards of {job.shard_sizes(step)} samples in {len(parts)} "
                             "microbatches; give more samples, fewer of these, or sync_batch_norm=True")  # fmt: skip


def clipping(job: Job) -> None:
    """Refuse to clip where there is no one gradient, and to skip a step of which something would stay."""
    if job.optimizer.clip is not None and job.plan.holds != "all":
        raise ValueError(f"{job.plan.name} has no one gradient whose norm could be clipped: do without clip")
    if job.skip_nonfinite and (job.plan.holds != "all" or job.compress is not None):
        raise ValueError(f"{job.plan.name}: skip_nonfinite takes a plan with one gradient a step, not compressed: else "
                         "parts of a step would be applied, or stay with the compressor")  # fmt: skip


def compressor(job: Job) -> Compressor | None:
    """The compressor, or None where nothing is reduced; refused unless the plan reduces whole gradients."""
    plan, compress = job.plan, job.compress
    if compress is not None and not isinstance(compress, Compressor):
        raise TypeError(f"compress takes a compressor, for example bp.compress.TopK(0.01), not {compress!r}")
    if compress is None or plan.mesh.size == 1:
        return None
    others = {kind for kind, verb in VERBS.items() if verb.axis and verb.axis != "all" and verb.touches("G")}
    others ^= {"REDUCE_GRAD", "AVERAGE"}  # of SUM_TIED the copies would go apart
    found = sorted({action.kind for row in plan.rows for action in row} & others)
    if found or plan.mesh.tensor > 1 or plan.holds != "all":
        raise ValueError(f"{plan.name} cannot compress gradients with {compress}: that takes a plan that reduces whole "
                         "gradients by REDUCE_GRAD and not otherwise, and this one has "
                         f"{', '.join(found) or 'another way'}")  # fmt: skip
    if isinstance(compress, PowerSGD) and plan.mesh.pipeline > 1:
        raise ValueError(f"{plan.name} has a pipeline, which {compress} could stop for ever: its reduction blocks")
    return compress if plan.mesh.data > 1 else None


def room(job: Job, backend: str) -> None:
    """Refuse what does not fit in shared memory: gradients, edges and sums."""
    needed = job.memory.shared() if backend == "shm" else 0
    if needed > memory.free_room():
        raise memory.no_room(f"{job.plan.name} with batches of {job.batch}", needed)


# -- what does not stand in a job -----------------------------------------------------------------------------


def made_optimizer(lr: float | None, optimizer: Optimizer | None) -> Optimizer:
    """Plain SGD at a learning rate, or the optimizer given."""
    if (lr is None) == (optimizer is None):
        raise ValueError("train takes either lr=..., for plain SGD, or optimizer=..., for example "
                         "bp.optim.SGD(0.1, momentum=0.9)")  # fmt: skip
    return SGD(lr) if optimizer is None else optimizer  # type: ignore[arg-type]


def one_batch(plan: Plan, inputs: Any, targets: Any) -> Dataset:
    """A batch of which a plan gives the gradient, as the data of a job; arrays are taken as tensors."""
    this_plan(plan)
    inputs, targets = (_tensor(name, given) for name, given in (("inputs", inputs), ("targets", targets)))
    if inputs.ndim == 0 or targets.ndim == 0 or len(inputs) == 0:
        raise ValueError("an empty batch has no gradient: give at least one sample")
    if len(inputs) != len(targets):
        raise ValueError(f"{len(inputs)} inputs but {len(targets)} targets")
    if plan.holds != "all":
        raise ValueError(f"{plan.name} has no one gradient: its ranks apply different ones; compare "
                         "weights after train")  # fmt: skip
    return Dataset("the batch", inputs, targets, inputs[:0], targets[:0])


def watchers(progress: object, stop: object) -> None:
    """Refuse what cannot be told of progress, or asked whether to stop."""
    if progress is not None and not callable(progress):
        raise TypeError(f"progress must take (fraction done, text), as a function does, not be {_named(progress)}")
    if stop is not None and not callable(getattr(stop, "is_set", None)):
        raise TypeError(f"stop must be a threading.Event, not {_named(stop)}")


def checked_collective(plan: Plan, tensors: Sequence[Tensor], workers: int) -> Program:
    """A collective by itself, compiled, once the tensors fit it and each other."""
    this_plan(plan)
    if plan.purpose == "train" or plan.workers != workers:
        raise ValueError(f"{plan.name} is not a collective by itself for {workers} workers")
    if not isinstance(tensors, Sequence) or len(tensors) != workers:
        raise ValueError(f"a collective of {workers} ranks needs a list of as many tensors, not {_named(tensors)}")
    for rank, tensor in enumerate(tensors):
        if not isinstance(tensor, Tensor) or not tensor.is_cpu:
            raise TypeError(f"rank {rank} needs a tensor on the CPU, not {_named(tensor)}")
        if tensor.ndim != 1 or tensor.shape != tensors[0].shape or tensor.dtype != tensors[0].dtype:
            raise ValueError(f"rank {rank} has {tuple(tensor.shape)} of {tensor.dtype}, rank 0 has "
                             f"{tuple(tensors[0].shape)} of {tensors[0].dtype}: all must be 1-D and alike")  # fmt: skip
    size = len(tensors[0])
    if plan.purpose == "all_to_all" and size % workers:
        raise ValueError(f"{plan.name} exchanges equal parts: {workers} ranks do not divide {size} elements")
    return compile_collective(plan, size, tensors[0].dtype.itemsize)
