"""The exercises of chapter 4.2."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise, product
from typing import Any

import torch
from torch import Tensor

from bpkit.course.exercises.trainer import TOLERANCE, need_serial, serial_gradient
from bpkit.course.exercises.verdict import Bench, Wrong, need_function, need_numbers, need_plan
from bpkit.data import text
from bpkit.nn import Network, gpt, tensor_layout
from bpkit.plan import Mesh, one_f_one_b, serial, tensor_parallel
from bpkit.run.cluster import Cluster

#: Samples and microbatches of the step whose bytes are asked for, and limits of the norm in `finish_step`.
BATCH, MICROBATCHES, CLIPS = 16, 4, (0.5, 1e3)
_HINTS = (
    "the activations: a vector for each token of each sample crosses the cut, in however many microbatches",
    "the tied matrix: its gradient crosses once a step, however large the batch",
)


def _model(length: int, width: int, blocks: int, dtype: torch.dtype) -> tuple[Network, Tensor, Tensor]:
    data = text(length)
    return gpt(data.vocabulary, length, width, 4, blocks, seed=1, dtype=dtype), data.inputs, data.targets


# -- predict: what travels? --------------------------------------------------------------------------------


def _judge_pipeline_bytes(answer: Any) -> str:
    said = need_numbers(answer, 2, "the bytes that rank 0 gives to sends of activations and to SUM_TIED")
    network, data = _model(32, 64, 2, torch.float32)[0], text(32)
    with Cluster(2, timeout=5) as cluster:
        run = cluster.train(network, data, one_f_one_b(2, MICROBATCHES), batch=BATCH, steps=1, lr=0.1)
    trace = run.trace.where(run.trace.rank == 0)
    return _compare_bytes(said, [int(trace.bytes[trace.kinds() == kind].sum()) for kind in ("SEND_F", "SUM_TIED")])


def _judge_tensor_bytes(answer: Any) -> str:
    said = need_numbers(answer, 2, "the number of sums of a step, and the bytes that rank 0 gives to them together")
    network, data = _model(32, 64, 2, torch.float32)[0], text(32)
    split = tensor_parallel(serial(), 2, tensor_layout(network))
    with Cluster(2, timeout=5) as cluster:
        run = cluster.train(network, data, split, batch=BATCH, steps=1, lr=0.1)
    trace = run.trace.where(run.trace.rank == 0)
    sums = int(sum(kind in ("SUM_F", "SUM_B") for kind in trace.kinds()))
    edge = next(step.payload for step in run.program.rows[0] if step.action.kind == "SUM_F") * BATCH
    if said[0] != sums:
        raise Wrong(f"not {said[0]:,.0f} sums: one forward behind the first layer and behind each half of a block, and "
                    "one back before each half and before the scores")  # fmt: skip
    if said[1] != sums * edge:
        raise Wrong(f"not {said[1]:,.0f} bytes: a sum is as large as all activations that cross a cut between layers")
    return f"the workers' own count is {sums} sums and {sums * edge:,} bytes too"


def _compare_bytes(said: list[float], so: list[int]) -> str:
    if [4 * one for one in said] == so:
        raise Wrong("these are numbers of elements; each takes 4 bytes")
    for one, truth, hint in zip(said, so, _HINTS, strict=True):
        if one != truth:
            raise Wrong(f"not {one:,.0f} bytes for {hint}")
    return f"the workers' own count is {so[0]:,} and {so[1]:,} bytes too"


# -- fill in: what does a rank of a pipeline keep? ---------------------------------------------------------


def _judge_memory(answer: Any) -> str:
    need_function(answer, "kept(p, m, r, L, s, b, h, a, again)")
    for p, m, heads, again in product((1, 2, 4), (1, 2, 8), (1, 4), (True, False)):
        length, samples, width, blocks = 96, 2, 32, 8
        for r in range(p):
            block = samples * length * (34 * width + (0 if again else 5 * heads * length))
            stage, held = blocks // p * block, min(m, p - r)
            said = float(answer(p, m, r, blocks, length, samples, width, heads, again))
            done = "attention" if again else "nothing"
            case = f"p = {p}, m = {m}, r = {r}, a = {heads}, {done} recomputed"
            if abs(said - held * stage) > TOLERANCE * held * stage:
                raise Wrong(f"{case}: {_memory_hint(said / stage, held, m, p, blocks)}")
    return "right for every p, m, r, a of the grid, with and without recomputation"


def _memory_hint(found: float, held: int, m: int, p: int, blocks: int) -> str:
    """What a wrong number of microbatches points to."""
    said = ((m, "1F1B does not keep all microbatches"), (p * held, "a rank has only its share of the blocks"),
            (p, "the last ranks keep fewer than the first"))  # fmt: skip
    near = ", or ".join(text for number, text in said if abs(found - number) < TOLERANCE * number)
    return f"this is {found:.3g} microbatches, each in {blocks // p} blocks" + (f": {near}" if near else
           ", where it should be a whole number: look at what one block keeps")  # fmt: skip


# -- find the bug: a plan of two by two --------------------------------------------------------------------


def _judge_hybrid(answer: Any) -> str:
    plan = need_plan(answer)
    wanted = ("data=2 pipeline=2 tensor=1", 2, "mean", ((0, 1),))
    if (str(plan.mesh), plan.microbatches, plan.merge, plan.tied) != wanted:
        raise Wrong("the plan has a mesh of data=2 pipeline=2 tensor=1, 2 microbatches, a merge by the mean and the "
                    "line 'tied 0 1'")  # fmt: skip
    network, inputs, targets = _model(8, 16, 1, torch.float64)
    x, t = inputs[:5], targets[:5]  # of unequal microbatches
    need_serial(plan, network, x, t, "four workers")
    return "four workers, two stages of two replicas each, end with the serial gradient"


# -- find the bug: which ranks lie next to each other ------------------------------------------------------


def _judge_mesh(answer: Any) -> str:
    need_function(answer, "coordinate(rank, data, pipeline, tensor), which returns (pipeline, data, tensor)")
    for data, pipeline, tensor in product((1, 2, 3), (1, 2), (1, 2, 4)):
        mesh = Mesh(data, pipeline, tensor)
        found = [tuple(map(int, answer(rank, data, pipeline, tensor))) for rank in range(mesh.size)]
        case = f"a mesh of {mesh}"
        if set(found) != {tuple(at) for at in mesh.coordinates()}:
            raise Wrong(f"{case}: the ranks do not stand on all places of the mesh once")
        for axis, gap in ((2, 1), (1, tensor)):
            groups = [[rank for rank, at in enumerate(found) if at[:axis] + at[axis + 1:] == rest]
                      for rest in {at[:axis] + at[axis + 1:] for at in found}]  # fmt: skip
            far = next((group for group in groups for a, b in pairwise(group) if b - a != gap), None)
            if far:
                name = ("pipeline", "data", "tensor")[axis]
                raise Wrong(f"{case}: ranks {far} differ along the {name} axis only, and should lie {gap} apart")
    return "tensor ranks are neighbours, then data replicas, then stages: as `bp.plan.Mesh` and Megatron-LM count"


# -- find the bug: the end of a step -----------------------------------------------------------------------


def _finish(comm: Any, answer: Callable[..., Any], network: Network, x: Tensor, t: Tensor, clip: float) -> Any:
    """This rank's gradient sums, where the tied matrix lies in them, and what the answer makes of them."""
    stage = network.split(2)[comm.rank]
    tied, other = stage.tied_slices()["embedding"], 1 - comm.rank
    outputs = stage.forward(comm.recv(None, other) if comm.rank else x)
    if comm.rank:
        comm.send(stage.backward(stage.loss.value_and_gradient(outputs, t)[1], need_input=True), other)
    else:
        comm.send(outputs, other)
        stage.backward(comm.recv(None, other))
    given = stage.flat_gradients.clone()
    return given, tied, torch.as_tensor(answer(comm, stage.flat_gradients, tied, t.numel(), clip)).clone()


def _judge_finish(answer: Any) -> str:
    need_function(answer, "finish_step(comm, gradient, tied, terms, clip)")
    network, inputs, targets = _model(8, 16, 1, torch.float64)
    x, t = inputs[:6], targets[:6]
    true = serial_gradient(network, x, t)  # the tied matrix stands in it twice, as it does in parameters()
    matrix = network.gradients()[0]
    norm = float((true.square().sum() - matrix.square().sum()).sqrt()) / t.numel()
    with Bench(2) as bench:
        for clip in CLIPS:
            case = f"clip {clip:g}"
            ends = bench.run(_finish, answer, network, x, t, clip, case=case)
            uses = torch.stack([given[tied] for given, tied, _ in ends], 1)
            scales = [_judge_rank(given, tied, found, uses, f"{case}: rank {rank}")
                      for rank, (given, tied, found) in enumerate(ends)]  # fmt: skip
            wanted = min(1.0, clip / norm) / t.numel()
            if abs(scales[0] - scales[1]) > TOLERANCE * wanted:
                raise Wrong(f"{case}: rank 0 scales its gradient by {scales[0]:.3g} and rank 1 by {scales[1]:.3g}: "
                            "there is one norm, of all ranks together")  # fmt: skip
            if abs(scales[0] - wanted) > TOLERANCE * wanted:
                raise Wrong(f"{case}: the gradient is scaled by {scales[0]:.4g}, not {wanted:.4g}: is the norm that of "
                            "the mean, and is each number in it once, the tied matrix too?")  # fmt: skip
    return "two stages end with the clipped gradient of the serial run, and both copies of the matrix with the same one"


def _judge_rank(given: Tensor, tied: slice, found: Tensor, uses: Tensor, who: str) -> float:
    """The factor by which a rank scaled its gradient; refuses other changes."""
    if found.shape != given.shape:
        raise Wrong(f"{who} returns a shape of {tuple(found.shape)}, not {tuple(given.shape)}")
    own, got = given.clone(), found.clone()
    own[tied] = got[tied] = 0
    scale = float(own @ got / (own @ own))
    if not (got - scale * own).norm() <= TOLERANCE * got.norm() or not scale > 0:
        raise Wrong(f"{who} changes the gradient of what only it holds, other than by a factor")
    solution = torch.linalg.lstsq(uses, found[tied][:, None]).solution[:, 0]
    counts = [round(one / scale, 6) + 0 for one in solution.tolist()]
    if counts != [1, 1]:
        raise Wrong(f"{who}: in the gradient of the tied matrix, its use as embedding counts {counts[0]:.3g} times and "
                    f"its use for the scores {counts[1]:.3g} times")  # fmt: skip
    return scale


#: The exercises by name.
EXERCISES = {
    "pipeline_bytes": _judge_pipeline_bytes, "tensor_bytes": _judge_tensor_bytes, "activation_memory": _judge_memory,
    "mesh_order": _judge_mesh, "hybrid_plan": _judge_hybrid, "finish_step": _judge_finish,
}  # fmt: skip
