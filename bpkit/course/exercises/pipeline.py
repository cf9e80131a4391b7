"""The exercises of chapters 3.3a and 3.3c."""

from __future__ import annotations

import re
from collections.abc import Callable
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from bpkit.course.exercises.trainer import LEARNING_RATE, TOLERANCE, need_serial, serial_gradient, watched
from bpkit.course.exercises.verdict import Bench, Wrong, need_function, need_numbers
from bpkit.data import digits
from bpkit.nn import Network, mlp
from bpkit.plan import Action, Mesh, Plan, complete, gpipe, interleaved, one_f_one_b
from bpkit.plan.liveness import peak_activations
from bpkit.simulate import Times, simulate

#: (ranks, microbatches) of the order, and samples of each microbatch of the step.
PIPELINES, MICROBATCHES = ((4, 8), (4, 2), (2, 5)), ((4, 4, 4), (6, 3, 2))
_WORK = "a rank works 36 units, and waits until the first microbatch is at the last rank and until the last is back"
_HELD = "count the microbatches whose forward has run and whose backward has not"


# -- predict: what does a schedule cost? -------------------------------------------------------------------


def _units(plan: Plan, chunks: int = 1) -> float:
    """Duration of a step in which a forward through a rank's share takes one unit and its backward two."""
    return float(simulate(plan, Times(1 / chunks, 1 / chunks, 1 / chunks)).step_times()[1])


def _judge_costs(answer: Any) -> str:
    said = need_numbers(answer, 5, "the units of a step by the three schedules, and what rank 0 stores by two of them")
    plans = {"GPipe": gpipe(4, 12), "1F1B": one_f_one_b(4, 12), "interleaved 1F1B": interleaved(4, 12)}
    so = [_units(p, p.stages // 4) for p in plans.values()] + [peak_activations(p.rows[0]) for p in plans.values()][:2]
    for name, one, truth, hint in zip([*plans, *plans], said, so, [_WORK] * 3 + [_HELD] * 2, strict=False):
        if not abs(one - truth) < 0.01:
            raise Wrong(f"{name}: not {one:g}; {hint}")
    return f"the simulator says {so[0]:g}, {so[1]:g} and {so[2]:g} units, and the plans store {so[3]:g} and {so[4]:g}"


# -- fill in: the order of 1F1B ----------------------------------------------------------------------------


def _order(comm: Any, answer: Callable[..., Any], ranks: int, microbatches: int) -> list[str]:
    return [str(cell) for cell in answer(comm.rank, ranks, microbatches)] if comm.rank < ranks else []


def _judge_order(answer: Any) -> str:
    need_function(answer, "my_order(rank, ranks, microbatches)")
    cases = [(p, m, f"{p} ranks, {m} microbatches") for p, m in PIPELINES]
    with Bench(4) as bench:
        plans = [_judge_words(bench.run(_order, answer, p, m, case=case)[:p], m, case) for p, m, case in cases]
    data, network = digits(torch.float64), mlp([64, *[16] * 6, 10], seed=1, dtype=torch.float64)
    need_serial(plans[0], network, *data.batch(0, 22), "four workers that run this order")
    return "no deadlock, no more stored than 1F1B stores, no unit slower, and four workers end with the serial gradient"


def _judge_words(words: list[list[str]], m: int, case: str) -> Plan:
    """The plan of the ranks' orders; refuses a missing pass, a deadlock, too much stored, too long a step."""
    ranks, passes = len(words), [f"{kind}{k}" for kind in "FB" for k in range(m)]
    for rank, word in enumerate(words):
        for cell in [*passes, *word]:
            if cell not in passes or word.count(cell) != 1:
                raise Wrong(f"{case}: rank {rank} has {cell} {word.count(cell)} times, and {''.join(word).count('B')} "
                            f"backwards in all; it runs F0 to F{m - 1} and B0 to B{m - 1}, each once")  # fmt: skip
    rows = tuple(tuple(Action.parse(f"{rank}{cell}") for cell in word) for rank, word in enumerate(words))
    try:
        plan = complete(Plan("the order", rows, ranks, Mesh(pipeline=ranks), m))
    except ValueError as error:
        waits = re.findall(r"row (\d+) at \d+(\w+)", str(error))
        raise Wrong(f"{case}: deadlock: " + ", ".join(f"rank {rank} waits at {cell}" for rank, cell in waits)) from None
    for rank, word in enumerate(words):
        most = min(m, ranks - rank)
        for index, held in enumerate(accumulate(1 if cell[0] == "F" else -1 for cell in word)):
            if held > most:
                raise Wrong(f"{case}: rank {rank} stores {held} microbatches after {word[index]}, its action "
                            f"{index + 1}; 1F1B keeps at most {most} there")  # fmt: skip
    if (units := _units(plan)) > (best := 3.0 * (m + ranks - 1)):
        raise Wrong(f"{case}: a step takes {units:g} units and 1F1B's {best:g}: who waits and could run a forward?")
    return plan


# -- find the bug: a pipelined step ------------------------------------------------------------------------


def _step(comm: Any, answer: Callable[..., Any], network: Network, x: list[Tensor], t: list[Tensor]) -> Tensor:
    stage = network.split(comm.size)[comm.rank]
    before = stage.copy().parameters()
    answer(comm, stage, x, t, LEARNING_RATE)
    return torch.cat([(a - b).flatten() for a, b in zip(before, stage.parameters(), strict=True)]) / LEARNING_RATE


def _judge_step(answer: Any) -> str:
    need_function(answer, "pipeline_step(comm, stage, inputs, targets, lr)")
    data, network = digits(torch.float64), mlp([64, 16, 16, 10], seed=1, dtype=torch.float64)
    with Bench(2) as bench:
        for sizes in MICROBATCHES:
            case, total = f"microbatches of {', '.join(map(str, sizes))} samples", sum(sizes)
            x, t = (list(tensor[:total].split(sizes)) for tensor in (data.inputs, data.targets))
            change = torch.cat(bench.run(_step, answer, network, x, t, case=case)) * total
            basis = torch.stack([serial_gradient(network, *pair) for pair in zip(x, t, strict=True)], 1)
            weights = torch.linalg.lstsq(basis, change[:, None]).solution[:, 0]
            if not (basis @ weights - change).norm() <= TOLERANCE * basis.norm():
                raise Wrong(f"{case}: some stage's weights change by something else than the microbatches' gradients")
            for k, weight in enumerate(weights.tolist()):
                if abs(weight - 1) > TOLERANCE:
                    raise Wrong(f"{case}: in the applied gradient a sample of microbatch {k} counts "
                                f"{round(weight, 3) + 0:g} times as much as in the mean over all {total}")  # fmt: skip
    return "two workers end with the weights of the serial step, also where microbatches are unequal"


# -- fill in: where does the sum stand? --------------------------------------------------------------------


def _split(comm: Any, answer: Callable[..., Any], x: Tensor, w1: Tensor, w2: Tensor, bias: Tensor, dz: Tensor) -> Any:
    """What the answer returns on this rank, and the elements of each sum."""
    (narrow, sums), rank, size = watched(comm), comm.rank, comm.size
    z, dx, dw1, dw2 = answer(narrow, x, w1.chunk(size)[rank], w2.chunk(size, 1)[rank], bias, dz)
    return [torch.as_tensor(one) for one in (z, dx, dw1, dw2)], sums


def _judge_split(answer: Any) -> str:
    need_function(answer, "split_layers(comm, x, w1, w2, bias, dz)")
    made, shapes = torch.Generator().manual_seed(0), ((7, 6), (12, 6), (5, 12), (5,), (7, 5))
    x, w1, w2, bias, dz = (torch.randn(*shape, dtype=torch.float64, generator=made) for shape in shapes)
    h = (x @ w1.T).relu()
    dh = (dz @ w2) * (h > 0)
    with Bench(3) as bench:
        ends = bench.run(_split, answer, x, w1, w2, bias, dz, case="3 workers")
    for rank, (found, _) in enumerate(ends):
        right = h @ w2.T + bias, dh @ w1, (dh.T @ x).chunk(3)[rank], (dz.T @ h).chunk(3, 1)[rank]
        for name, one, true in zip(("z", "dx", "dw1", "dw2"), found, right, strict=True):
            if one.shape != true.shape or not (one - true).norm() <= TOLERANCE * true.norm():
                often = ": the bias is in it 3 times" if name == "z" and torch.allclose(one, true + 2 * bias) else ""
                raise Wrong(f"3 workers: {name} of rank {rank} is wrong{often}; which products have split inputs?")
    if ends[0][1] != [dz.numel(), x.numel()]:
        raise Wrong(f"all is right, but with sums of {ends[0][1]} elements; one there of 35, one back of 42 will do")
    return "three workers hold z and dx whole and their own shares of dw1 and dw2, with one sum there and one back"


#: The exercises by name.
EXERCISES = {
    "pipeline_costs": _judge_costs, "my_order": _judge_order,
    "pipeline_step": _judge_step, "split_layers": _judge_split,
}  # fmt: skip
