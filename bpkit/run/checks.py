"""What is checked before anything starts, with a sentence for what does not fit."""

from collections.abc import Sequence

import torch
from torch import Tensor

from bpkit.compress import Compressor, PowerSGD
from bpkit.nn import Network
from bpkit.optim import SGD, Optimizer
from bpkit.plan import Plan, Program
from bpkit.run.engine.rank import Shards, shard_sizes_of
from bpkit.run.transports.shared import files as memory


def fits(plan: Plan, network: Network, inputs: Tensor, targets: Tensor, workers: int, samples: int) -> None:
    """Refuse a plan for other workers or a larger batch, and samples that do not fit the network."""
    if plan.workers != workers:
        raise ValueError(f"{plan.name} is a plan for {plan.workers} workers (mesh {plan.mesh}), but this "
                         f"cluster has {workers}")  # fmt: skip
    if plan.microbatches > samples and not plan.servers:
        raise ValueError(f"{plan.name}: {plan.microbatches} microbatches of a batch of {samples} samples: some would "
                         "be empty; use fewer microbatches or a larger batch")  # fmt: skip
    if tuple(inputs.shape[1:]) != tuple(network.input_shape):
        raise ValueError(f"samples of shape {tuple(inputs.shape[1:])} do not fit the network, "
                         f"which takes {tuple(network.input_shape)}")  # fmt: skip
    if inputs.dtype != network.input_dtype:
        raise TypeError(f"inputs are {inputs.dtype} but the network takes {network.input_dtype}: load the data with "
                        "the same dtype")  # fmt: skip
    for what, place in (("the network", network.device), ("the data", inputs.device)):
        if place.type != "cpu":
            raise ValueError(f"{what} lies on {place}: give it on the CPU, workers copy it to their own device")
    if network.dtype is torch.bfloat16:
        raise TypeError("a network in bfloat16 has no float32 weights: give one in float32, with precision='bf16'")
    network.loss.check(targets, network.output_shape)


def precision(name: str, plan: Plan, network: Network) -> None:
    """Refuse a precision that does not exist, or not for this plan or network."""
    if name not in ("full", "bf16"):
        raise ValueError(f"unknown precision {name!r}: choose 'full' or 'bf16'")
    if name == "bf16" and network.dtype is not torch.float32:
        raise TypeError(f"bf16 keeps its weights in torch.float32, but the network's are {network.dtype}")
    if name == "bf16" and (plan.holds != "all" or len(network.flat_buffers)):
        raise ValueError(f"{plan.name}: bf16 takes a plan with one gradient, and a network without running statistics, "
                         "such as batch norm's")  # fmt: skip


def room(program: Program, network: Network, backend: str) -> None:
    """Refuse gradients that do not fit in shared memory, before anything starts."""
    needed = program.plan.workers * sum(program.sizes) * network.dtype.itemsize
    if backend == "shm" and needed > memory.free_room():
        raise memory.no_room(f"the gradient of {program.plan.workers} workers", needed)


def run_length(plan: Plan, steps: int, record: int, evaluate_every: int, target: float | None) -> None:
    """Refuse lengths of a run that make no sense, or not for this plan."""
    if steps < 1 or record < 1:
        raise ValueError(f"train needs at least one step and one recorded step, not {steps} and {record}")
    if target is not None and evaluate_every < 1:
        raise ValueError("a target accuracy needs evaluate_every=N: how many steps between evaluations")
    if plan.servers and (steps != plan.microbatches or evaluate_every):
        raise ValueError(f"{plan.name} is a whole run of {plan.microbatches} steps without evaluations: "
                         f"give steps={plan.microbatches} and no evaluate_every")  # fmt: skip


def make_optimizer(lr: float | None, optimizer: Optimizer | None) -> Optimizer:
    """Plain SGD at a learning rate, or the optimizer given."""
    if (lr is None) == (optimizer is None):
        raise ValueError("train takes either lr=..., for plain SGD, or optimizer=..., for example "
                         "bp.optim.SGD(0.1, momentum=0.9)")  # fmt: skip
    return SGD(lr) if optimizer is None else optimizer  # type: ignore[arg-type]


def checked_shards(batch: int, plan: Plan, shards: Shards | None) -> Shards | None:
    """Shares of the data ranks, checked for every step."""
    if shards is None:
        return None
    for step in range(len(shards) if isinstance(shards[0], Sequence) else 1):
        sizes = shard_sizes_of(plan, batch, shards, step)
        served = [data for data in plan.servers if sizes[data]]
        if served:
            raise ValueError(f"{plan.name}: data rank {served[0]} only serves and takes no samples, not "
                             f"{sizes[served[0]]}")  # fmt: skip
    return shards


def checked_compressor(plan: Plan, compress: Compressor | None) -> Compressor | None:
    """The compressor, or None where nothing is reduced; refused unless the plan reduces whole gradients."""
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
