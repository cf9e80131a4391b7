"""What is checked before anything starts, with a sentence for what does not fit."""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from bpkit.compress import Compressor, PowerSGD
from bpkit.data import Dataset
from bpkit.optim import SGD, Optimizer
from bpkit.plan import Plan, Program, compile
from bpkit.plan.program import compile_collective
from bpkit.run.job import Job
from bpkit.run.transports.shared import files as memory


def checked(job: Job, workers: int, backend: str) -> Job:
    """The job with its plan compiled, once everything that it was given fits; every job comes by here.

    Raises
    ------
    ValueError, TypeError, PlanError
        If something does not fit: the sentence says what, and what would.
    """
    run_length(job)
    for_the_workers(job.plan, workers)
    batch(job)
    samples(job)
    shards(job)
    precision(job)
    clipping(job)
    program = compile(job.plan, job.network, clip=job.optimizer.clip is not None)
    job = replace(job, plan=program.plan, compiled=program)
    room(job, backend)
    return replace(job, compress=compressor(job))


def run_length(job: Job) -> None:
    """Refuse lengths of a run that make no sense, or not for this plan."""
    plan = job.plan
    if job.steps < 1 or job.record < 1:
        raise ValueError("train needs at least one step and one recorded step, not "
                         f"{job.steps} and {job.record}")  # fmt: skip
    if job.target is not None and job.evaluate_every < 1:
        raise ValueError("a target accuracy needs evaluate_every=N: how many steps between evaluations")
    if plan.servers and (job.steps != plan.microbatches or job.evaluate_every):
        raise ValueError(f"{plan.name} is a whole run of {plan.microbatches} steps without evaluations: "
                         f"give steps={plan.microbatches} and no evaluate_every")  # fmt: skip


def for_the_workers(plan: Plan, workers: int) -> None:
    """Refuse a plan for others."""
    if plan.workers != workers:
        raise ValueError(f"{plan.name} is a plan for {plan.workers} workers (mesh {plan.mesh}), but this "
                         f"cluster has {workers}")  # fmt: skip


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


def samples(job: Job) -> None:
    """Refuse samples that do not fit the network."""
    network, inputs = job.network, job.data.inputs
    if tuple(inputs.shape[1:]) != tuple(network.input_shape):
        raise ValueError(f"samples of shape {tuple(inputs.shape[1:])} do not fit the network, "
                         f"which takes {tuple(network.input_shape)}")  # fmt: skip
    if inputs.dtype != network.input_dtype:
        raise TypeError(f"inputs are {inputs.dtype} but the network takes {network.input_dtype}: load the data with "
                        "the same dtype")  # fmt: skip
    for what, place in (("the network", network.device), ("the data", inputs.device)):
        if place.type != "cpu":
            raise ValueError(f"{what} lies on {place}: give it on the CPU, workers copy it to their own device")
    network.loss.check(job.data.targets, network.output_shape)


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


def clipping(job: Job) -> None:
    """Refuse to clip where there is no one gradient."""
    if job.optimizer.clip is not None and job.plan.holds != "all":
        raise ValueError(f"{job.plan.name} has no one gradient whose norm could be clipped: do without clip")


def compressor(job: Job) -> Compressor | None:
    """The compressor, or None where nothing is reduced; refused unless the plan reduces whole gradients."""
    plan, compress = job.plan, job.compress
    if compress is not None and not isinstance(compress, Compressor):
        raise TypeError(f"compress takes a compressor, for example bp.compress.TopK(0.01), not {compress!r}")
    if compress is None or plan.mesh.size == 1:
        return None
    others = {"SCATTER_GRAD", "SEND_G", "ADD_G", "RECV_G", "SWAP_G", "SUM_G", "AVERAGE"}
    others.add("SUM_TIED")  # its copies would go apart
    found = sorted({action.kind for row in plan.rows for action in row} & others)
    if found or plan.mesh.tensor > 1 or plan.holds != "all":
        raise ValueError(f"{plan.name} cannot compress gradients with {compress}: that takes a plan that reduces whole "
                         "gradients by REDUCE_GRAD and not otherwise, and this one has "
                         f"{', '.join(found) or 'another way'}")  # fmt: skip
    if isinstance(compress, PowerSGD) and plan.mesh.pipeline > 1:
        raise ValueError(f"{plan.name} has a pipeline, which {compress} could stop for ever: its reduction blocks")
    return compress if plan.mesh.data > 1 else None


def room(job: Job, backend: str) -> None:
    """Refuse gradients that do not fit in shared memory."""
    program = job.program
    needed = program.plan.workers * sum(program.sizes) * job.network.dtype.itemsize
    if backend == "shm" and needed > memory.free_room():
        raise memory.no_room(f"the gradient of {program.plan.workers} workers", needed)


# -- what does not stand in a job -----------------------------------------------------------------------------


def made_optimizer(lr: float | None, optimizer: Optimizer | None) -> Optimizer:
    """Plain SGD at a learning rate, or the optimizer given."""
    if (lr is None) == (optimizer is None):
        raise ValueError("train takes either lr=..., for plain SGD, or optimizer=..., for example "
                         "bp.optim.SGD(0.1, momentum=0.9)")  # fmt: skip
    return SGD(lr) if optimizer is None else optimizer  # type: ignore[arg-type]


def one_batch(plan: Plan, inputs: Tensor, targets: Tensor) -> Dataset:
    """A batch of which a plan gives the gradient, as the data of a job."""
    if len(inputs) == 0:
        raise ValueError("an empty batch has no gradient: give at least one sample")
    if len(inputs) != len(targets):
        raise ValueError(f"{len(inputs)} inputs but {len(targets)} targets")
    if plan.holds != "all":
        raise ValueError(f"{plan.name} has no one gradient: its ranks apply different ones; compare "
                         "weights after train")  # fmt: skip
    return Dataset("the batch", inputs, targets, inputs[:0], targets[:0])


def checked_collective(plan: Plan, tensors: Sequence[Tensor], workers: int) -> Program:
    """A collective by itself, compiled, once the tensors fit it and each other."""
    if plan.purpose == "train" or plan.workers != workers:
        raise ValueError(f"{plan.name} is not a collective by itself for {workers} workers")
    if len(tensors) != workers:
        raise ValueError(f"a collective of {workers} ranks needs as many tensors, not {len(tensors)}")
    for rank, tensor in enumerate(tensors):
        if tensor.ndim != 1 or tensor.shape != tensors[0].shape or tensor.dtype != tensors[0].dtype:
            raise ValueError(
                f"rank {rank} has {tuple(tensor.shape)} of {tensor.dtype}, rank 0 has "
                f"{tuple(tensors[0].shape)} of {tensors[0].dtype}: all must be 1-D and alike"
            )
    size = len(tensors[0])
    if plan.purpose == "all_to_all" and size % workers:
        raise ValueError(f"{plan.name} exchanges equal parts: {workers} ranks do not divide {size} elements")
    return compile_collective(plan, size, tensors[0].dtype.itemsize)
