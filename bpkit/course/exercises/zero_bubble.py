"""The exercises of chapter 3.3b."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from bpkit.course.exercises.trainer import TOLERANCE, need_serial
from bpkit.course.exercises.verdict import Bench, Wrong, need_function, need_numbers
from bpkit.course.schedules import period_in_units
from bpkit.data import digits
from bpkit.nn import mlp
from bpkit.plan import Action, Mesh, Plan, complete, one_f_one_b, zero_bubble_h1, zero_bubble_h2
from bpkit.plan.liveness import peak_activations

#: (ranks, microbatches) of the order.
PIPELINES = (4, 8), (3, 3), (4, 2)


def _judge_costs(answer: Any) -> str:
    said = need_numbers(answer, 4, "the periods of 1F1B, ZB-H1 and ZB-H2, and of 1F1B with two microbatches")
    plans = [("1F1B", one_f_one_b(3, 6), 6), ("ZB-H1", zero_bubble_h1(3, 6), 6), ("ZB-H2", zero_bubble_h2(3, 6), 6),
             ("1F1B with two microbatches", one_f_one_b(3, 2), 2)]  # fmt: skip
    so = [period_in_units(plan, m) for _, plan, m in plans]
    for (name, _, m), one, truth in zip(plans, said, so, strict=True):
        if not abs(one - truth) < 0.01:
            raise Wrong(f"{name}: not {one:g}; a rank works {3 * m} units, and the table has what it waits")
    return "the simulator says " + ", ".join(f"{one:g}" for one in so[:3]) + f" and {so[3]:g} units"


# -- fill in: an order with halves ---------------------------------------------------------------------------


def _order(comm: Any, answer: Callable[..., Any], ranks: int, microbatches: int) -> list[str]:
    return [str(cell) for cell in answer(comm.rank, ranks, microbatches)] if comm.rank < ranks else []


def _judge_halves(answer: Any) -> str:
    need_function(answer, "my_halves(rank, ranks, microbatches)")
    cases = [(p, m, f"{p} ranks, {m} microbatches") for p, m in PIPELINES]
    with Bench(4) as bench:
        plans = [_judge_words(bench.run(_order, answer, p, m, case=case)[:p], m, case) for p, m, case in cases]
    data, network = digits(torch.float64), mlp([64, *[16] * 6, 10], seed=1, dtype=torch.float64)
    need_serial(plans[0], network, *data.batch(0, 22), "four workers that run this order")
    return "no deadlock, no more kept than ZB-H1 keeps, no unit slower, and four workers end with the serial gradient"


def _judge_words(words: list[list[str]], m: int, case: str) -> Plan:
    """The plan of the ranks' orders; refuses a missing pass, a deadlock, too much kept, too long a step."""
    ranks, passes = len(words), [f"{kind}{k}" for kind in "FIW" for k in range(m)]
    for rank, word in enumerate(words):
        for cell in [*passes, *word]:
            if cell not in passes or word.count(cell) != 1:
                raise Wrong(f"{case}: rank {rank} has {cell} {word.count(cell)} times; it runs F0 to F{m - 1}, "
                            f"I0 to I{m - 1} and W0 to W{m - 1}, each once")  # fmt: skip
    rows = tuple(tuple(Action.parse(f"{rank}{cell}") for cell in word) for rank, word in enumerate(words))
    try:
        plan = complete(Plan("the order", rows, ranks, Mesh(pipeline=ranks), m))
        units = period_in_units(plan, m)
    except ValueError as error:
        waits = re.findall(r"row (\d+) at \d+(\w+)", str(error))
        why = ", ".join(f"rank {rank} waits at {cell}" for rank, cell in waits)
        raise Wrong(f"{case}: " + (f"deadlock: {why}" if waits else "a half stands before what it needs")) from None
    for rank, row in enumerate(rows):
        if (most := peak_activations(row)) > min(m, ranks):
            raise Wrong(f"{case}: rank {rank} keeps {most} microbatches at a time, until their W; ZB-H1 keeps "
                        f"{min(m, ranks)}")  # fmt: skip
    if units > (best := period_in_units(zero_bubble_h1(ranks, m), m)) + 1e-6:
        raise Wrong(f"{case}: a step takes {units:g} units and ZB-H1's {best:g}: who waits and could run a W?")
    return plan


# -- find the bug: an update that is checked afterwards --------------------------------------------------------


def _update(comm: Any, answer: Callable[..., Any], weights: Tensor, gradients: Tensor, clip: float) -> Tensor:
    return torch.as_tensor(answer(comm, weights[comm.rank].clone(), gradients[comm.rank].clone(), 0.1, clip))


def _judge_update(answer: Any) -> str:
    need_function(answer, "eager_update(comm, weights, gradient, lr, clip)")
    made = torch.Generator().manual_seed(0)
    weights, gradients = (torch.randn(4, 6, dtype=torch.float64, generator=made) for _ in "wg")
    norm = float(gradients.norm())
    cases = [("a short gradient", gradients, 2 * norm, 1.0), ("a long gradient", gradients, norm / 4, 0.25)]
    for name, value in (("an infinite element", torch.inf), ("a NaN", torch.nan)):
        broken = gradients.clone()
        broken[2, 3] = value
        cases.append((f"{name} on rank 2", broken, 2 * norm, 0.0))
    with Bench(4) as bench:
        for case, given, clip, scale in cases:
            ends = bench.run(_update, answer, weights, given, clip, case=case)
            for rank, found in enumerate(ends):
                right = weights[rank] - 0.1 * scale * gradients[rank]
                if found.shape != right.shape or not (found - right).norm() <= TOLERANCE * right.norm():
                    finite = bool(torch.isfinite(found).all())
                    raise Wrong(f"{case}: the weight vector of rank {rank} is not "
                                + ("what a run that waits has" if finite else "finite"))  # fmt: skip
    return "four ranks end with the weights of a run that waits for the norm, and skip a step that is not finite"


#: The exercises by name.
EXERCISES = {"zero_bubble_costs": _judge_costs, "my_halves": _judge_halves, "eager_update": _judge_update}
